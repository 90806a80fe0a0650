//! Server that answers as a test wants, in HTTP or not.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
};

/// Server of a test. Its threads end with the connections, and with the test's process.
pub(super) struct Fake {
    addr: SocketAddr,
}

impl Fake {
    /// Starts a server that answers each request with the bytes that `answer` makes of its head and body. Without bytes it is
    /// silent.
    pub(super) fn start(answer: impl Fn(&str, &str) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        let answer = Arc::new(answer);
        let accept = move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let answer = Arc::clone(&answer);
                let serve = move || serve(&stream, &*answer);
                drop(thread::Builder::new().spawn(serve).unwrap());
            }
        };
        drop(thread::Builder::new().spawn(accept).unwrap());
        Self { addr }
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }
}

fn serve(stream: &TcpStream, answer: impl Fn(&str, &str) -> Vec<u8>) {
    let (mut reader, mut writer) = (BufReader::new(stream), stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.map_or(0, |it| it.parse().unwrap())];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        let answer = answer(&head, &String::from_utf8(body).unwrap());
        if writer.write_all(&answer).is_err() {
            return;
        }
    }
}

/// Returns an answer in HTTP.
pub(super) fn http(status: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// Answers as an etcd of today for its version, and by `rest` for all else.
pub(super) fn as_etcd(
    rest: impl Fn(&str, &str) -> Vec<u8> + Send + Sync + 'static,
) -> impl Fn(&str, &str) -> Vec<u8> + Send + Sync + 'static {
    move |head, body| {
        if head.starts_with("GET /version ") {
            return http("200 OK", r#"{"etcdserver":"3.5.13","etcdcluster":"3.5.0"}"#);
        }
        rest(head, body)
    }
}

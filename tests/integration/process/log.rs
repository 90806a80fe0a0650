//! Log lines and answers: an event is one line, and nothing of a peer's bytes stands there as it came.

use std::{
    fs,
    os::unix::{ffi::OsStrExt as _, net::UnixStream},
};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, socket_with,
};

use crate::harness::{Authority, Family, Proxy, Response, Stream, Upstream, echo, pattern, record};

const LEVELS: [&str; 5] = ["TRACE", "DEBUG", "INFO", "WARN", "ERROR"];

/// Returns whether a letter turns, hides or ends text on a terminal.
fn is_harmful(letter: char) -> bool {
    letter.is_control()
        || matches!(letter, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// Ends the proxy and returns its log, each line of which has been looked at.
#[track_caller]
fn good_lines(mut proxy: Proxy) -> Vec<String> {
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
    let lines: Vec<String> = proxy.log_so_far().lines().map(str::to_owned).collect();
    for line in &lines {
        let mut words = line.split(' ');
        let time = words.next().unwrap();
        assert!(time.len() == 24 && time.ends_with('Z'), "no line of ours: {line:?}");
        assert!(LEVELS.contains(&words.next().unwrap()), "no line of ours: {line:?}");
        assert!(!line.contains(is_harmful), "{line:?}");
        assert!(!line.contains("log lines dropped"), "{line:?}");
    }
    lines
}

#[test]
fn nothing_of_a_caller_is_shown() {
    let parts: [(&[u8], &[u8]); 5] = [
        (b"GE", b"T /paused HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (b"GET /pa", b"used HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (b"GET /paused?", b"=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (b"GET /paused HTTP/1.1\r\nHost: local", b"host\r\n\r\n"),
        (b"GET /paused HTTP/1.1\r\nHost: localhost\r\nX", b": a\r\nOrigin: b\r\n\r\n"),
    ];
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().control(family).upstream(&upstream).start();
        let (mut refused, mut answered) = (0, 0);
        for byte in 0..=255_u8 {
            for (number, (before, behind)) in parts.iter().enumerate() {
                // The byte, and a few that differ from run to run of the loop.
                let noise = pattern(u64::from(byte) * 8 + number as u64, usize::from(byte) % 7);
                let mut caller = proxy.control().addr().connect();
                caller.send(&[before, &[byte][..], &noise, behind].concat());
                // Whatever has come so far, nothing more will.
                caller.finish();
                let response = Response::read(&mut caller);
                let body = response.text().trim_end_matches('\n');
                assert!(!body.contains(is_harmful), "{body:?}");
                assert!(response.headers.iter().all(|(_, value)| !value.contains(is_harmful)));
                if response.status == 404 || (response.status == 400 && body.contains("parameter"))
                {
                    answered += 1;
                } else if response.status != 200 {
                    refused += 1;
                }
            }
        }
        println!("{refused} requests refused, {answered} answered with an error");
        let lines = good_lines(proxy);
        let told = lines.iter().filter(|line| line.contains("control request of ")).count();
        assert!(told <= refused && told >= refused / 2, "{told} lines for {refused} refusals");
    }
}

#[test]
fn one_of_a_kind_is_told_in_the_singular() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .args(["--proxy-threads", "1", "--proxy-max-connections", "1", "--log-connections", "all"])
        .start();
    proxy.wait_for_log(" with 1 thread, for up to 1 client");
    let mut client = proxy.connect();
    client.assert_echo(b"a");
    let mut next = proxy.connect();
    proxy.wait_for_log("all places are taken (1 in all): new clients wait");
    proxy.control().pause();
    drop(client);
    proxy.control().wait_status("the next one is held", |status| status.held == 1);
    proxy.control().resume();
    next.assert_echo(b"b");
    drop(next);
    proxy.control().wait_idle();
    proxy.wait_for_log(" to_upstream=1 to_client=1 cause=ended");
    for line in good_lines(proxy) {
        let words: Vec<&str> = line.split([' ', ',', ';', ':', '(', ')']).collect();
        let is_wrong = |pair: &[&str]| {
            pair[0] == "1" && (pair[1].ends_with('s') || ["are", "were", "have"].contains(&pair[1]))
        };
        assert!(!words.windows(2).any(is_wrong), "{line}");
    }
}

#[test]
fn nothing_of_a_client_is_shown() {
    let authority = Authority::new("ours");
    let files = tempfile::tempdir().unwrap();
    let tls = authority.write_files(files.path());
    let upstream = Upstream::tcp(record);
    let proxy = Proxy::builder()
        .listen(Family::Unix)
        .upstream(&upstream)
        .args(tls.options())
        .args(["--proxy-reject-clients", "--log-connections=all", "--log-connections-rate=1000"])
        .start();
    let mut clients = 0;
    for paused in [false, true] {
        if paused {
            proxy.control().pause();
        }
        for first in (0..=255_u8).step_by(8) {
            // A client's own path is the one thing that a UNIX socket tells of it.
            let name: Vec<u8> =
                (first..=first + 7).filter(|byte| ![0, b'/'].contains(byte)).collect();
            let path = files.path().join(std::ffi::OsStr::from_bytes(&name));
            let socket =
                socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                    .unwrap();
            bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
            connect(&socket, &SocketAddrUnix::new(proxy.addr().path()).unwrap()).unwrap();
            let mut client = Stream::try_from(UnixStream::from(socket)).unwrap();
            // As TLS and as anything else.
            client.send(&[0x16, 3, 1, 0, 4, 1, 0x1b, b'[', b'm']);
            client.send(&[&name[..], b"\r\n\x1b[31m"].concat());
            client.finish();
            drop(client.receive_all());
            fs::remove_file(path).unwrap();
            clients += 1;
        }
    }
    proxy.control().wait_idle();
    proxy.control().resume();
    let lines = good_lines(proxy);
    println!("{clients} clients, {} lines", lines.len());
    let told = lines
        .iter()
        .filter(|line| line.contains("INFO connection ") && line.contains(" client=\"uid "))
        .count();
    assert_eq!(told, clients, "of {clients} clients");
    let place = files.path().to_string_lossy();
    assert!(!lines.iter().any(|line| line.contains(&*place)), "a client's path is shown");
}

//! Clients whose host vanishes without a word. The kernel takes minutes to give them up, so `make test` leaves this out.

use std::{
    io::Write,
    net::{SocketAddr, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketType, bind, connect, socket};

use crate::harness::{
    Addr, End, FIGURE, Listener, Proxy, Received, Stream, Upstream, amount, assert_same, echo,
    in_namespace, pattern,
};

/// Addresses of the test's own network.
const HOST: &str = "10.9.0.1";
const VANISHES: &str = "10.9.0.2";
const STALLS: &str = "10.9.0.3";
const SERVER_VANISHES: &str = "10.9.0.4";

/// Far more than a client takes that does not read, and less than the proxy's kernel keeps for it.
const ANSWER_BYTES: usize = 300_000;

/// Time until a vanished peer is noticed at the latest: 150 s without an answer, a minute until the look, and some more.
const NOTICED_AFTER_MAX: Duration = Duration::from_secs(230);

#[test]
fn a_vanished_client_is_given_up_and_one_that_does_not_read_is_not() {
    if amount(1, 2) == 1 {
        return println!("skipped: it takes four minutes; TCPAUSE_SCALE=soak runs it");
    }
    in_namespace(
        "relay::vanished::a_vanished_client_is_given_up_and_one_that_does_not_read_is_not",
        || {
            for address in [HOST, VANISHES, STALLS, SERVER_VANISHES] {
                ip(&["addr", "add", &format!("{address}/32"), "dev", "lo"]);
            }
            let upstream = Upstream::on(Listener::bind(&any(HOST)), |mut stream| {
                let mut bytes = stream.receive(8);
                stream.send(&pattern(3, ANSWER_BYTES));
                stream.read_timeout(2 * NOTICED_AFTER_MAX);
                let Received { bytes: rest, end } = stream.receive_all();
                bytes.extend(rest);
                Received { bytes, end }
            });
            let proxy = logging(&upstream);
            let Addr::Tcp(addr) = *proxy.addr() else { panic!("a TCP proxy") };
            let _vanished = client(VANISHES, addr);
            let mut stalled = client(STALLS, addr);
            let all = 2 * ANSWER_BYTES as u64;
            proxy.control().wait_counts(|status| status.bytes_to_client, all);

            let server = Upstream::on(Listener::bind(&any(SERVER_VANISHES)), echo);
            let lonely = logging(&server);
            let mut left_alone = lonely.connect();
            left_alone.assert_echo(b"hello");

            for address in [VANISHES, SERVER_VANISHES] {
                ip(&["addr", "del", &format!("{address}/32"), "dev", "lo"]);
                ip(&["route", "add", "blackhole", address]);
            }
            left_alone.send(b"a question that never arrives");
            let begin = Instant::now();
            while proxy.control().status().active > 1 {
                assert!(begin.elapsed() < NOTICED_AFTER_MAX, "it is carried on and on");
                thread::sleep(Duration::from_secs(1));
            }
            println!("{FIGURE}a vanished client is given up after {:?}", begin.elapsed());
            assert_ended(&proxy, "client-vanished");
            while lonely.control().status().active > 0 {
                assert!(begin.elapsed() < NOTICED_AFTER_MAX, "it is carried on and on");
                thread::sleep(Duration::from_secs(1));
            }
            println!("{FIGURE}a vanished server is given up after {:?}", begin.elapsed());
            assert_ended(&lonely, "upstream-vanished");
            assert_eq!(left_alone.receive_all().end, End::Reset);
            // The other one has had as long, and gets everything.
            thread::sleep(NOTICED_AFTER_MAX.saturating_sub(begin.elapsed()));
            stalled.read_timeout(NOTICED_AFTER_MAX);
            assert_same(&stalled.receive(ANSWER_BYTES), &pattern(3, ANSWER_BYTES));
        },
    );
}

/// A proxy in the test's own network that logs each connection.
fn logging(upstream: &Upstream) -> Proxy {
    let builder = Proxy::builder().listen_at(&any(HOST)).upstream(upstream);
    builder.args(["--log-connections", "all"]).start()
}

/// Checks that one connection has ended, by `cause`, in log and status.
#[track_caller]
fn assert_ended(proxy: &Proxy, cause: &str) {
    let closed = proxy.control().status().closed;
    assert_eq!((closed[cause], closed.values().sum::<u64>()), (1, 1), "{closed:?}");
    let line = proxy.wait_for_log(&format!(" cause={cause}"));
    assert!(line.contains(" INFO connection "), "{line}");
}

fn any(address: &str) -> Addr {
    Addr::Tcp(SocketAddr::new(address.parse().unwrap(), 0))
}

/// A client at `source` that has asked and does not read.
fn client(source: &str, proxy: SocketAddr) -> Stream {
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&socket, &SocketAddr::new(source.parse().unwrap(), 0)).unwrap();
    connect(&socket, &proxy).unwrap();
    let mut stream = TcpStream::from(socket);
    stream.write_all(b"question").unwrap();
    Stream::Tcp(stream)
}

#[track_caller]
fn ip(args: &[&str]) {
    let status = Command::new("ip").args(args).status().unwrap();
    assert!(status.success(), "ip {args:?}: {status}");
}

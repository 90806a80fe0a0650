//! Rejecting TLS clients while paused: a real handshake, and the 503 inside.

use std::io::{self, Read, Write};

use rustls::version::{TLS12, TLS13};

use crate::{
    harness::{Authority, End, Proxy, Response, Stream, TlsClient, Upstream, echo},
    reject::plain::{Outcome, Tally, post},
};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// A paused proxy with a certificate, which trusts the clients of `authority` if it is told to.
fn paused(authority: &Authority, verifies: bool) -> (Upstream, Proxy) {
    let upstream = Upstream::tcp(echo);
    let builder = Proxy::builder().upstream(&upstream).arg("--proxy-reject-clients");
    let files = authority.write_files(builder.path("").as_path());
    let mut builder = builder.args(files.options());
    if verifies {
        builder = builder.arg(files.ca_option());
    }
    let proxy = builder.start();
    proxy.control().pause();
    (upstream, proxy)
}

#[track_caller]
fn assert_503(answer: &[u8]) {
    let response = Response::parse(answer);
    assert_eq!((response.status, response.reason.as_str()), (503, "Service Unavailable"));
    assert_eq!(response.header("Retry-After"), Some("3"));
    assert_eq!(response.header("Connection"), Some("close"));
    assert_eq!(response.header("Content-Length"), Some("0"));
    assert!(response.body.is_empty());
}

/// Returns whether the peer has refused with a TLS alert, rather than cut the connection.
pub(crate) fn is_alert(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::AlertReceived(_)))
}

#[test]
fn a_client_without_a_certificate_gets_the_503() {
    let authority = Authority::new("ours");
    for verifies in [false, true] {
        let (upstream, proxy) = paused(&authority, verifies);
        for version in [&TLS12, &TLS13] {
            let client = TlsClient::new(&authority).with_version(version);
            assert_503(&client.exchange(proxy.connect(), REQUEST).unwrap());
        }
        proxy.control().wait_status("both are counted", |status| status.rejected == 2);
        assert_eq!(upstream.accepted(), 0);
    }
}

#[test]
fn a_client_with_a_good_certificate_gets_the_503() {
    let authority = Authority::new("ours");
    let (_upstream, proxy) = paused(&authority, true);
    for version in [&TLS12, &TLS13] {
        let client =
            TlsClient::new(&authority).with_version(version).with_identity(authority.client());
        assert_503(&client.exchange(proxy.connect(), REQUEST).unwrap());
    }
}

#[test]
fn a_client_with_a_foreign_certificate_gets_an_alert() {
    let (authority, stranger) = (Authority::new("ours"), Authority::new("theirs"));
    let (_upstream, proxy) = paused(&authority, true);
    for version in [&TLS12, &TLS13] {
        for identity in [stranger.client(), authority.server()] {
            let client = TlsClient::new(&authority).with_version(version).with_identity(identity);
            let error = client.exchange(proxy.connect(), REQUEST).expect_err("a refused handshake");
            assert!(is_alert(&error), "{error:?}");
        }
    }
    let client = TlsClient::new(&authority);
    assert_503(&client.exchange(proxy.connect(), REQUEST).unwrap());
}

#[test]
fn a_client_that_does_not_trust_the_proxy_does_not_harm_it() {
    let (authority, stranger) = (Authority::new("ours"), Authority::new("theirs"));
    let (_upstream, proxy) = paused(&authority, false);
    assert!(TlsClient::new(&stranger).exchange(proxy.connect(), REQUEST).is_err());
    assert_503(&TlsClient::new(&authority).exchange(proxy.connect(), REQUEST).unwrap());
}

#[test]
fn strict_clients_all_get_the_answer_inside_and_a_clean_end() {
    let authority = Authority::new("ours");
    let (_upstream, proxy) = paused(&authority, false);
    for version in [&TLS12, &TLS13] {
        let connect = || {
            let client = TlsClient::new(&authority).with_version(version);
            proxy.addr().try_connect().map(|stream| client.over(stream))
        };
        let mut answer = Vec::new();
        let mut client = connect().unwrap();
        client.write_all(REQUEST).unwrap();
        client.read_to_end(&mut answer).unwrap();
        assert_503(&answer);
        let tally = Tally::of_batches(15, |length| Outcome::of(connect(), &post(length), &answer));
        println!("inside {:?}: {tally}", version.version);
        tally.assert_all_clean();
    }
}

/// A stream that sends one byte at a time.
struct Dribble(Stream);

impl Read for Dribble {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Dribble {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(&bytes[..bytes.len().min(1)])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[test]
fn a_handshake_in_single_bytes_gets_the_503() {
    let authority = Authority::new("ours");
    let (_upstream, proxy) = paused(&authority, false);
    assert_503(&TlsClient::new(&authority).exchange(Dribble(proxy.connect()), REQUEST).unwrap());
}

#[test]
fn a_plain_client_gets_the_plain_503_although_there_is_a_certificate() {
    let authority = Authority::new("ours");
    let (_upstream, proxy) = paused(&authority, true);
    let mut client = proxy.connect();
    client.send(REQUEST);
    assert_eq!(Response::read(&mut client).status, 503);
}

#[test]
fn without_a_certificate_a_tls_client_never_gets_plain_text() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).arg("--proxy-reject-clients").start();
    proxy.control().pause();
    let authority = Authority::new("any");
    let mut client = proxy.connect();
    client.send(&TlsClient::new(&authority).hello());
    let received = client.receive_all();
    assert_eq!(received.end, End::Eof);
    // Nothing at all, or one alert record: type 21, version 3.x.
    assert!(
        received.bytes.is_empty() || received.bytes.starts_with(&[21, 3]),
        "{:?}",
        received.bytes
    );
}

#[test]
fn a_broken_or_unfinished_handshake_ends() {
    let authority = Authority::new("ours");
    let (_upstream, proxy) = paused(&authority, false);
    let hello = TlsClient::new(&authority).hello();
    let mut unfinished = proxy.connect();
    unfinished.send(&hello[..4]);
    let mut lonely = proxy.connect();
    lonely.send(&hello);
    let mut broken = proxy.connect();
    broken.send(b"\x16\x03\x01\x00\x05this is no hello");
    for client in [&mut unfinished, &mut lonely, &mut broken] {
        let received = client.receive_all();
        assert!(matches!(received.end, End::Eof | End::Reset), "{received:?}");
        assert!(!received.bytes.starts_with(b"HTTP"));
    }
    assert_503(&TlsClient::new(&authority).exchange(proxy.connect(), REQUEST).unwrap());
}

#[test]
fn a_resumed_proxy_carries_tls_untouched() {
    let authority = Authority::new("ours");
    let (upstream, proxy) = paused(&authority, true);
    proxy.control().resume();
    let hello = TlsClient::new(&authority).hello();
    proxy.connect().assert_echo(&hello);
    assert_eq!(upstream.accepted(), 1);
}

//! A client over a UNIX socket pair, one step of each side at a time.

use std::{io::Cursor, time::Instant};

use mio::{Events, Poll, Token};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::WebPkiClientVerifier,
};

use super::*;
use crate::sys::{Socket, socket_pair};

const ANSWER: &str = "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 3\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
const DEADLINE: Duration = Duration::from_secs(10);

/// A client that is being rejected, seen from both sides.
struct Scene {
    peer: Option<Socket>,
    client: Endpoint,
    reject: Reject,
    refusal: Refusal,
    scratch: Vec<u8>,
    poll: Poll,
}

impl Scene {
    fn new(tls: Option<ServerConfig>) -> Self {
        let (peer, client) = socket_pair().unwrap();
        let poll = Poll::new().unwrap();
        client.register(poll.registry(), Token(0)).unwrap();
        Self {
            peer: Some(peer),
            client: Endpoint::connected(client),
            reject: Reject::Sniffing,
            refusal: Refusal::new(Duration::from_secs(3), tls.map(Arc::new)),
            scratch: vec![0; 16 * 1024],
            poll,
        }
    }

    fn peer(&self) -> &Socket {
        self.peer.as_ref().unwrap()
    }

    fn send(&self, bytes: &[u8]) {
        assert_eq!(self.peer().send(bytes).unwrap(), bytes.len());
    }

    /// The events there are, and one turn.
    fn drive(&mut self) -> Next {
        let mut events = Events::with_capacity(8);
        self.poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
        events.iter().for_each(|event| self.client.mark(event));
        self.reject.drive(&mut self.client, &self.refusal, &mut self.scratch)
    }

    fn expire(&mut self) -> Next {
        self.reject.expire(&mut self.client, &self.refusal)
    }

    /// All that has come to the peer, and whether the end of the stream is behind it.
    fn received(&self) -> (Vec<u8>, bool) {
        let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            match self.peer().recv(&mut buffer) {
                Ok(0) => return (all, true),
                Ok(bytes) => all.extend_from_slice(&buffer[..bytes]),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    return (all, false);
                }
            }
        }
    }

    fn assert_received(&self, expected: &[u8]) {
        let (bytes, ended) = self.received();
        assert_eq!(String::from_utf8_lossy(&bytes), String::from_utf8_lossy(expected));
        assert!(ended, "and the end behind it");
    }
}

#[test]
fn the_retry_interval_is_rounded_up_and_left_out_when_zero() {
    for (interval, line) in [
        (Duration::from_secs(3), "Retry-After: 3\r\n"),
        (Duration::from_millis(1500), "Retry-After: 2\r\n"),
        (Duration::from_nanos(1), "Retry-After: 1\r\n"),
        (Duration::ZERO, ""),
    ] {
        let answer = format!(
            "HTTP/1.1 503 Service Unavailable\r\n{line}Connection: close\r\nContent-Length: 0\r\n\r\n"
        );
        assert_eq!(*Refusal::new(interval, None).http, *answer.as_bytes());
    }
}

#[test]
fn a_plain_client_is_answered_at_its_first_byte() {
    let mut scene = Scene::new(None);
    assert_eq!(scene.drive(), Next::Wait, "nothing before it has spoken");
    assert_eq!(scene.received(), (vec![], false));
    scene.send(b"G");
    assert_eq!(scene.drive(), Next::Answered);
    scene.assert_received(ANSWER.as_bytes());
    assert_eq!(scene.drive(), Next::Wait, "it may still be sending");
    scene.send(b"ET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n");
    assert_eq!(scene.drive(), Next::Wait);
    drop(scene.peer.take());
    assert_eq!(scene.drive(), Next::Close);
}

#[test]
fn a_silent_client_is_answered_when_its_time_is_up() {
    let mut scene = Scene::new(Some(server_config(&Authority::new())));
    assert_eq!(scene.drive(), Next::Wait);
    assert_eq!(scene.expire(), Next::Answered);
    scene.assert_received(ANSWER.as_bytes());
    assert_eq!(scene.expire(), Next::Close, "it does not linger for ever");
}

#[test]
fn a_client_that_ends_its_stream_without_a_word_is_answered() {
    let mut scene = Scene::new(None);
    scene.peer().shut_down_write().unwrap();
    assert_eq!(scene.drive(), Next::Answered);
    scene.assert_received(ANSWER.as_bytes());
    assert_eq!(scene.drive(), Next::Close);
}

#[test]
fn a_client_that_has_gone_is_closed() {
    let mut scene = Scene::new(None);
    drop(scene.peer.take());
    assert_eq!(scene.drive(), Next::Close);
    assert_eq!(Scene::new(None).drive(), Next::Wait, "unlike one that is there");
}

#[test]
fn a_large_request_is_read_to_its_end_before_the_close() {
    let mut scene = Scene::new(None);
    scene.send(b"POST");
    assert_eq!(scene.drive(), Next::Answered);
    let (mut sent, deadline) = (0, Instant::now() + DEADLINE);
    while sent < 4 << 20 {
        sent += scene.peer().send(&[b'x'; 16 * 1024]).unwrap_or(0);
        let next = scene.drive();
        assert!(matches!(next, Next::Wait | Next::Again), "{next:?}");
        assert!(Instant::now() < deadline, "it stalls after {sent} bytes");
    }
    scene.peer().shut_down_write().unwrap();
    let mut next = scene.drive();
    while next == Next::Again {
        next = scene.drive();
    }
    assert_eq!(next, Next::Close);
    scene.assert_received(ANSWER.as_bytes());
}

#[test]
fn what_is_discarded_has_a_bound_in_a_turn_and_in_all() {
    let mut scene = Scene::new(None);
    scene.send(b"POST");
    assert_eq!(scene.drive(), Next::Answered);
    let Reject::Lingering { discarded } = &mut scene.reject else { panic!("{:?}", scene.reject) };
    *discarded = DISCARDED_BYTES_MAX - 100;
    scene.send(&[b'x'; 90]);
    assert_eq!(scene.drive(), Next::Wait);
    scene.send(&[b'x'; 90]);
    assert_eq!(scene.drive(), Next::Close);

    let mut scene = Scene::new(None);
    rustix::net::sockopt::set_socket_send_buffer_size(scene.peer(), 4 * TURN_BYTES_MAX).unwrap();
    scene.send(b"POST");
    assert_eq!(scene.drive(), Next::Answered);
    let mut queued = 0;
    while let Ok(bytes) = scene.peer().send(&[b'x'; 16 * 1024]) {
        queued += bytes;
    }
    assert!(queued > TURN_BYTES_MAX + scene.scratch.len(), "too small a buffer: {queued} bytes");
    assert_eq!(scene.drive(), Next::Again);
}

#[test]
fn a_tls_client_gets_an_alert_where_no_certificate_is() {
    let mut scene = Scene::new(None);
    scene.send(&[TLS_HANDSHAKE, 3, 1]);
    assert_eq!(scene.drive(), Next::Answered);
    scene.assert_received(&[0x15, 3, 3, 0, 2, 2, 40]);
}

#[test]
fn a_tls_client_gets_the_answer_inside() {
    let authority = Authority::new();
    let mut scene = Scene::new(Some(server_config(&authority)));
    let mut tls = tls_client(&authority, None);
    tls.writer().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let verdicts = converse(&mut scene, &mut tls).unwrap();
    assert_eq!(verdicts[0], Next::WaitIn(Queue::Handshaking));
    assert_eq!(verdicts.last(), Some(&Next::Answered));
    assert_eq!(told(&mut tls).unwrap(), ANSWER, "closed by close_notify");
    assert!(matches!(scene.reject, Reject::Lingering { .. }));
}

#[test]
fn a_tls_client_that_asks_for_nothing_is_answered_when_its_time_is_up() {
    let authority = Authority::new();
    let mut scene = Scene::new(Some(server_config(&authority)));
    let mut tls = tls_client(&authority, None);
    let verdicts = converse(&mut scene, &mut tls).unwrap();
    assert!(!tls.is_handshaking());
    assert!(verdicts.contains(&Next::WaitIn(Queue::Asking)), "{verdicts:?}");
    assert!(told(&mut tls).is_err(), "nothing yet");
    assert_eq!(scene.expire(), Next::Answered);
    converse(&mut scene, &mut tls).unwrap();
    assert_eq!(told(&mut tls).unwrap(), ANSWER);
}

#[test]
fn a_client_certificate_is_welcome_but_must_be_right() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    for (own, is_right) in [(None, true), (Some(&authority), true), (Some(&stranger), false)] {
        let mut scene = Scene::new(Some(server_config(&authority)));
        let mut tls = tls_client(&authority, own);
        tls.writer().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let result = converse(&mut scene, &mut tls);
        if is_right {
            result.unwrap();
            assert_eq!(told(&mut tls).unwrap(), ANSWER);
        } else {
            let error = result.unwrap_err();
            assert!(matches!(error, rustls::Error::AlertReceived(_)), "{error:?}");
            assert!(matches!(scene.reject, Reject::Lingering { .. }));
        }
    }
}

#[test]
fn rubbish_that_looks_like_tls_gets_an_alert() {
    let mut scene = Scene::new(Some(server_config(&Authority::new())));
    scene.send(&[TLS_HANDSHAKE]);
    assert_eq!(scene.drive(), Next::WaitIn(Queue::Handshaking));
    scene.send(b" GET / HTTP/1.1\r\n\r\n");
    assert_eq!(scene.drive(), Next::Answered);
    let (bytes, ended) = scene.received();
    assert!(bytes.starts_with(&[0x15, 3]) && bytes.len() == 7, "{bytes:?}");
    assert!(ended);
}

#[test]
fn a_tls_client_that_talks_without_asking_is_closed() {
    let authority = Authority::new();
    let mut scene = Scene::new(Some(server_config(&authority)));
    let mut tls = tls_client(&authority, None);
    converse(&mut scene, &mut tls).unwrap();
    let Reject::Tls { received, .. } = &mut scene.reject else {
        panic!("it waits for the request")
    };
    *received = UNASKED_BYTES_MAX;
    // A record without content.
    tls.refresh_traffic_keys().unwrap();
    let mut out = Vec::new();
    tls.write_tls(&mut out).unwrap();
    scene.send(&out);
    assert_eq!(scene.drive(), Next::Close);
}

#[test]
fn a_handshake_that_stops_halfway_is_given_up() {
    let authority = Authority::new();
    let mut scene = Scene::new(Some(server_config(&authority)));
    let mut hello = Vec::new();
    tls_client(&authority, None).write_tls(&mut hello).unwrap();
    scene.send(&hello[..hello.len() / 2]);
    assert_eq!(scene.drive(), Next::WaitIn(Queue::Handshaking));
    assert_eq!(scene.drive(), Next::Wait);
    assert_eq!(scene.expire(), Next::Close);
    assert_eq!(scene.received(), (vec![], false), "no plain text inside a TLS stream");
}

#[test]
fn a_client_that_leaves_in_its_handshake_is_closed() {
    let mut scene = Scene::new(Some(server_config(&Authority::new())));
    scene.send(&[TLS_HANDSHAKE]);
    assert_eq!(scene.drive(), Next::WaitIn(Queue::Handshaking));
    scene.peer().shut_down_write().unwrap();
    assert_eq!(scene.drive(), Next::Close);
}

/// A certificate that vouches for itself, and its key.
struct Authority {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Authority {
    fn new() -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
        Self { certificate: made.cert.der().clone(), key }
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        roots.into()
    }
}

fn server_config(authority: &Authority) -> ServerConfig {
    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(authority.roots(), provider.clone())
        .allow_unauthenticated()
        .build()
        .unwrap();
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![authority.certificate.clone()], authority.key.clone_key())
        .unwrap()
}

fn tls_client(authority: &Authority, own: Option<&Authority>) -> ClientConnection {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(authority.roots());
    let config = match own {
        None => builder.with_no_client_auth(),
        Some(own) => builder
            .with_client_auth_cert(vec![own.certificate.clone()], own.key.clone_key())
            .unwrap(),
    };
    ClientConnection::new(config.into(), "localhost".try_into().unwrap()).unwrap()
}

/// Each side has its say in turn until nothing moves. Returns what was said of each of our turns.
fn converse(scene: &mut Scene, tls: &mut ClientConnection) -> Result<Vec<Next>, rustls::Error> {
    let mut verdicts = Vec::new();
    for _round in 0..10 {
        let mut out = Vec::new();
        while tls.wants_write() {
            tls.write_tls(&mut out).unwrap();
        }
        scene.send(&out);
        if !matches!(scene.reject, Reject::Lingering { .. }) {
            verdicts.push(scene.drive());
        }
        let (bytes, ended) = scene.received();
        if !bytes.is_empty() {
            tls.read_tls(&mut Cursor::new(bytes)).unwrap();
        }
        if ended {
            tls.read_tls(&mut io::empty()).unwrap();
        }
        tls.process_new_packets()?;
    }
    Ok(verdicts)
}

/// What the client was told, up to an orderly end.
fn told(tls: &mut ClientConnection) -> io::Result<String> {
    let mut text = String::new();
    tls.reader().read_to_string(&mut text)?;
    Ok(text)
}

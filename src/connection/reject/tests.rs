//! Rejection of a client over a UNIX socket pair, one step of each side at a time.

mod authority;
mod tls;

use std::{
    io::Cursor,
    time::{Duration, Instant},
};

use mio::{Events, Poll, Token};
use rustls::{ClientConnection, ServerConfig};

use authority::{Authority, server_config, tls_client};

use super::*;
use crate::{
    admission::semaphore::Semaphore,
    connection::reject::protocol::TLS_HANDSHAKE,
    sys::{Socket, socket_pair},
};

const ANSWER: &str = "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 3\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
const DEADLINE: Duration = Duration::from_secs(10);

/// A client that is being rejected, with both of its ends.
struct Scene {
    peer: Option<Socket>,
    client: Endpoint,
    reject: Reject,
    reject_policy: RejectPolicy,
    scratch: Vec<u8>,
    /// Handshake steps that each turn may take.
    steps: usize,
    poll: Poll,
}

impl Scene {
    /// Returns a client that is answered with a 503.
    fn new(tls: Option<ServerConfig>) -> Self {
        Self::with(RejectResponse::http(Duration::from_secs(3)), tls)
    }

    fn with(answer: RejectResponse, tls: Option<ServerConfig>) -> Self {
        let (peer, client) = socket_pair().unwrap();
        let poll = Poll::new().unwrap();
        client.register(poll.registry(), Token(0)).unwrap();
        Self {
            peer: Some(peer),
            client: Endpoint::connected(client),
            reject: Reject::Sniffing,
            reject_policy: RejectPolicy::new(answer, tls.map(Arc::new)),
            scratch: vec![0; 16 * 1024],
            steps: 1,
            poll,
        }
    }

    fn peer(&self) -> &Socket {
        self.peer.as_ref().unwrap()
    }

    fn send(&self, bytes: &[u8]) {
        assert_eq!(self.peer().send(bytes).unwrap(), bytes.len());
    }

    /// Marks the pending events and drives one turn.
    fn drive(&mut self) -> Next {
        let mut events = Events::with_capacity(8);
        self.poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
        events.iter().for_each(|event| self.client.mark(event));
        let mut steps = self.steps;
        let next =
            self.reject.drive(&mut self.client, &self.reject_policy, &mut self.scratch, &mut steps);
        // `Connection` does the same for a waiting client.
        assert!(self.client.await_room(self.poll.registry(), Token(0)));
        next
    }

    /// Drives turns until none asks for another. Returns the last result.
    fn drive_on(&mut self) -> Next {
        std::iter::repeat_with(|| self.drive()).find(|&next| next != Next::Again).unwrap()
    }

    /// Gives a waiting TLS client its handshake permit.
    fn begin_handshake(&mut self) {
        assert_eq!(self.drive(), Next::WaitIn(Deadline::AwaitingHandshake));
        let permit = self.reject_policy.handshakes().take().unwrap();
        let next = self.reject.begin_handshake(&mut self.client, permit, &self.reject_policy);
        assert_eq!(next, Next::WaitIn(Deadline::Handshaking));
    }

    fn expire(&mut self) -> Next {
        self.reject.expire(&mut self.client, &self.reject_policy)
    }

    /// Returns all bytes that have reached the peer, and true if the end of the stream is behind them.
    fn received(&self) -> (Vec<u8>, bool) {
        let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            match self.peer().recv(&mut buffer).map(|read| read.bytes) {
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
    assert_eq!(scene.drive_on(), Next::Close);
    scene.assert_received(ANSWER.as_bytes());
}

#[test]
fn what_is_discarded_has_a_bound_in_a_turn_and_in_all() {
    let mut scene = Scene::new(None);
    scene.send(b"POST");
    assert_eq!(scene.drive(), Next::Answered);
    let Reject::Lingering { discarded, .. } = &mut scene.reject else {
        panic!("{:?}", scene.reject)
    };
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
fn a_client_of_another_protocol_gets_no_text() {
    for (bytes, is_other) in [
        (&b"SSH-2.0-client\r\n"[..], true),
        (b"\0\0\0\x08\x04\xd2\x16\x2f", true),
        (b"SEARCH / HTTP/1.1\r\n\r\n", false),
    ] {
        let mut scene = Scene::new(None);
        // The first byte alone does not decide.
        scene.send(&bytes[..1]);
        assert_eq!(scene.drive(), Next::Wait);
        assert_eq!(scene.received(), (vec![], false));
        scene.send(&bytes[1..]);
        assert_eq!(scene.drive(), Next::Answered);
        scene.assert_received(if is_other { b"" } else { ANSWER.as_bytes() });

        let mut scene = Scene::with(RejectResponse::File(Arc::from(*b"sorry")), None);
        scene.send(bytes);
        assert_eq!(scene.drive(), Next::Answered);
        scene.assert_received(b"sorry");
    }
}

#[test]
fn a_client_that_says_too_little_is_answered_when_its_time_is_up_or_its_stream_ends() {
    for ends in [false, true] {
        let mut scene = Scene::new(None);
        scene.send(b"SS");
        assert_eq!(scene.drive(), Next::Wait);
        let next = if ends {
            scene.peer().shut_down_write().unwrap();
            scene.drive()
        } else {
            scene.expire()
        };
        assert_eq!(next, Next::Answered);
        scene.assert_received(ANSWER.as_bytes());
    }
}

#[test]
fn a_close_and_a_reset_wait_for_nothing() {
    let mut scene = Scene::with(RejectResponse::Close, None);
    let (reject, next) = Reject::new(&mut scene.client, &scene.reject_policy);
    scene.reject = reject;
    assert_eq!(next, Next::Answered);
    scene.assert_received(b"");
    scene.send(b"what a client sends is read all the same");
    assert_eq!(scene.drive(), Next::Wait);
    assert!(matches!(scene.reject, Reject::Lingering { rest: None, discarded: 40 }));

    let mut scene = Scene::with(RejectResponse::Reset, None);
    assert_eq!(Reject::new(&mut scene.client, &scene.reject_policy).1, Next::Reset);
    assert_eq!(scene.received(), (vec![], false), "no end that looks orderly");
}

#[test]
fn an_answer_that_does_not_fit_is_written_while_the_client_sends() {
    let answer: Arc<[u8]> = (0..=u8::MAX).cycle().take(64 << 10).collect();
    let authority = Authority::new();
    for speaks_tls in [false, true] {
        let mut scene =
            Scene::with(RejectResponse::File(answer.clone()), Some(server_config(&authority)));
        rustix::net::sockopt::set_socket_send_buffer_size(scene.client.socket(), 1).unwrap();
        let mut tls = tls_client(&authority, None);
        if speaks_tls {
            tls.writer().write_all(b"POST").unwrap();
            converse(&mut scene, &mut tls).unwrap();
        } else {
            scene.send(b"POST");
            assert_eq!(scene.drive(), Next::Answered);
        }
        assert!(
            matches!(scene.reject, Reject::Lingering { rest: Some(_), .. }),
            "too large a buffer"
        );
        let permits = scene.reject_policy.handshakes().clone();
        let (mut sent, deadline) = (0, Instant::now() + DEADLINE);
        while sent < 1 << 20 {
            sent += scene.peer().send(&[b'x'; 16 * 1024]).unwrap_or(0);
            assert!(matches!(scene.drive(), Next::Wait | Next::Again));
            assert!(Instant::now() < deadline, "it stalls after {sent} bytes");
        }
        // The client has ended its stream and still waits for the answer.
        scene.peer().shut_down_write().unwrap();
        assert_eq!(scene.drive_on(), Next::Wait);
        let mut got = Vec::new();
        loop {
            let (bytes, ended) = scene.received();
            got.extend(bytes);
            if ended {
                break;
            }
            let next = scene.drive();
            assert!(matches!(next, Next::Wait | Next::Close), "{next:?}");
            assert!(Instant::now() < deadline, "it stalls after {} bytes", got.len());
        }
        assert_eq!(scene.drive(), Next::Close);
        if speaks_tls {
            let mut plain = Vec::new();
            let mut wire = Cursor::new(got);
            while tls.read_tls(&mut wire).unwrap() > 0 {
                tls.process_new_packets().unwrap();
                // The end of the stream is checked below.
                tls.reader().read_to_end(&mut plain).ok();
            }
            assert_eq!(tls.reader().read(&mut [0]).unwrap(), 0, "closed by close_notify");
            got = plain;
        }
        assert!(got == *answer, "{} other bytes", got.len());
        drop(scene);
        assert_eq!(Arc::strong_count(&permits), 1, "no permit is left");
    }
}

/// Lets both sides send in turn until nothing moves. Returns the results of our turns.
fn converse(scene: &mut Scene, tls: &mut ClientConnection) -> Result<Vec<Next>, rustls::Error> {
    let mut results = Vec::new();
    for _round in 0..10 {
        let mut out = Vec::new();
        while tls.wants_write() {
            tls.write_tls(&mut out).unwrap();
        }
        scene.send(&out);
        match scene.reject {
            Reject::Sniffing => scene.begin_handshake(),
            Reject::AwaitingHandshake | Reject::Tls { .. } => results.push(scene.drive_on()),
            Reject::Lingering { .. } => {}
        }
        let (bytes, ended) = scene.received();
        let mut bytes = Cursor::new(bytes);
        while tls.read_tls(&mut bytes).unwrap() > 0 {
            tls.process_new_packets()?;
        }
        if ended {
            tls.read_tls(&mut io::empty()).unwrap();
        }
        tls.process_new_packets()?;
    }
    Ok(results)
}

/// Returns the plain text that the client received, up to an orderly end.
fn plain_text(tls: &mut ClientConnection) -> io::Result<String> {
    let mut text = String::new();
    tls.reader().read_to_string(&mut text)?;
    Ok(text)
}

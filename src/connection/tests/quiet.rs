//! Sessions of PostgreSQL that are known to be outside transactions.

use super::*;
use crate::connection::quiet::{POSTGRES_IDLE, QuietLimits};

const LIMITS: QuietLimits = QuietLimits { any: None, postgres: Some(DEADLINE), ended: None };

/// A relayed connection whose bytes both peers take at once.
struct Scene {
    bench: Bench,
    connection: Connection,
    client: Socket,
    upstream: Socket,
}

impl Scene {
    fn new() -> Self {
        let (listener, address) = tcp_listener();
        let mut bench = Bench::new(&address);
        let (client, accepted) = tcp_pair();
        let mut connection = bench.connection(accepted);
        bench.serve(&mut connection);
        bench.until_relaying(&mut connection);
        Self { bench, connection, client, upstream: accept(&listener) }
    }

    /// Has the upstream send `bytes`, and the client take them.
    fn answer(&mut self, bytes: &[u8]) {
        let State::Relaying(session) = &self.connection.state else { panic!("not relaying") };
        let before = session.relay.delivered().1;
        assert_eq!(self.upstream.send(bytes).unwrap(), bytes.len());
        let all = before + bytes.len() as u64;
        self.bench.until(&mut self.connection, |it, _| {
            matches!(&it.state, State::Relaying(session) if session.relay.delivered().1 == all)
        });
        let mut left = bytes.len();
        while left > 0 {
            left -= read(&self.client).unwrap().len();
        }
    }

    fn is_quiet(&self) -> bool {
        self.connection.quiet_at(LIMITS).is_some()
    }
}

#[test]
fn the_end_of_each_answer_tells() {
    let mut scene = Scene::new();
    assert!(!scene.is_quiet(), "nothing is known");
    for (answer, is_quiet) in [
        (POSTGRES_IDLE, true),
        (b"Z\0\0\0\x05T", false),
        (b"C\0\0\0\x0bCOMMIT\0Z\0\0\0\x05I", true),
        (b"Z\0\0\0\x05E", false),
        (POSTGRES_IDLE, true),
        (b"N", false),
    ] {
        scene.answer(answer);
        assert_eq!(scene.is_quiet(), is_quiet, "{answer:?}");
    }
}

#[test]
fn a_spliced_end_is_unknown_unless_all_is_copied() {
    let mut scene = Scene::new();
    let large = [vec![7; 32 * 1024].as_slice(), POSTGRES_IDLE].concat();
    scene.answer(POSTGRES_IDLE);
    scene.answer(&large);
    scene.answer(POSTGRES_IDLE);
    assert!(!scene.is_quiet(), "the answer behind the large one was spliced");
    scene.answer(&large);
    scene.bench.buffers.copies_all = true;
    scene.answer(POSTGRES_IDLE);
    assert!(scene.is_quiet());
    scene.answer(&large);
    assert!(scene.is_quiet());
}

/// A server that has ended its stream has ended its transactions, too.
#[test]
fn an_ended_stream_is_quiet() {
    let mut scene = Scene::new();
    scene.answer(b"Z\0\0\0\x05T");
    scene.upstream.shut_down_write().unwrap();
    scene.bench.until(
        &mut scene.connection,
        |it, _| matches!(&it.state, State::Relaying(session) if session.relay.is_half_closed()),
    );
    assert!(scene.is_quiet());
}

//! Upgrades: a new process takes over everything, and no client notices; or it does not, and nobody notices either.

mod amid;
mod cast;
mod crash;
mod exec;
mod foreign;
mod limits;
mod number;
mod queue;
mod standstill;
mod state;
mod stop;
mod traffic;
mod twice;

use std::sync::atomic::{AtomicBool, Ordering};

use cast::Cast;

use crate::harness::{Proxy, Received, Response, Stream, wait_until};

/// Asks for an upgrade. Returns the reason if there is none; otherwise waits until the log tells who goes on.
#[track_caller]
fn refusal(proxy: &Proxy) -> Option<String> {
    let before = proxy.heirs().len();
    let answer = proxy.control().request("POST", "/upgrade", &[]);
    if answer.status != 200 {
        return Some(answer.assert_error(409));
    }
    wait_until("the log tells who goes on", || proxy.heirs().len() > before);
    None
}

/// Connections in each state that clients notice, and what must become of them.
struct Scene {
    proxy: Proxy,
    /// Relay in both directions.
    relayed: Stream,
    /// Client that has ended its stream and waits for the answer to come.
    half_closed: Stream,
    /// Client that a pause holds, with its first bytes sent.
    held: Stream,
    /// Caller that waits until the proxy is idle.
    waiting: Stream,
}

impl Scene {
    /// Brings all of it about.
    fn set(proxy: Proxy) -> Self {
        let mut relayed = proxy.connect();
        relayed.assert_echo(b"before");
        let mut half_closed = proxy.connect();
        half_closed.assert_echo(b"first");
        proxy.control().pause();
        let mut held = proxy.connect_held();
        held.send(b"from a held client");
        let waiting = proxy.control().send("GET", "/paused/block-until-idle", &[]);
        half_closed.send(b"last");
        Self { proxy, relayed, half_closed, held, waiting }
    }

    /// Checks that all of it is as it was, and ends it in good order.
    #[track_caller]
    fn finish(mut self) -> Proxy {
        self.relayed.assert_echo(b"after");
        self.half_closed.receive(4);
        self.half_closed.finish();
        assert_eq!(self.half_closed.receive_all(), Received::ended(b""));
        assert!(self.proxy.control().is_paused());
        let status = self.proxy.control().status();
        assert_eq!((status.held, status.active), (1, 1), "{status:?}");
        self.relayed.finish();
        assert_eq!(self.relayed.receive_all(), Received::ended(b""));
        assert_eq!(Response::read(&mut self.waiting).status, 204);
        self.proxy.control().resume();
        assert_eq!(self.held.receive(18), b"from a held client");
        self.proxy
    }
}

/// Flag that is set at the end of a scope, also by a panic, so that the scope's threads end.
struct SetAtDrop<'a>(&'a AtomicBool);

impl Drop for SetAtDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

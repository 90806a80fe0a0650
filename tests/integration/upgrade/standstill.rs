//! The standstill: what clients and the upstream do while neither process moves a byte has its effect afterwards, whichever of
//! the two goes on.

use std::sync::{Mutex, mpsc};

use rustix::process::{Pid, Signal, kill_process};

use super::crash::FAULT;
use crate::harness::{
    Addr, Builder, End, Family, Listener, PATIENCE, Proxy, Received, Response, Session, Stream,
    Upstream, echo, pattern, wait_until,
};

/// Bytes that sockets take while nobody reads them.
const UNREAD_BYTES: usize = 30_000;

/// Process that goes on after the standstill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Giver,
    Taker,
}

/// Hand-over of a proxy whose taker is stopped when it has everything.
struct Standstill<'a> {
    proxy: &'a Proxy,
    taker: Pid,
    caller: Stream,
}

impl<'a> Standstill<'a> {
    fn begin(proxy: &'a Proxy) -> Self {
        let caller = proxy.control().send("POST", "/upgrade", &[]);
        wait_until("the taker is stopped", || proxy.children() == ['T']);
        let taker = Pid::from_raw(proxy.child_pids()[0].cast_signed()).unwrap();
        Self { proxy, taker, caller }
    }

    #[track_caller]
    fn end(mut self, next: Next) {
        let (signal, status, heirs) = match next {
            Next::Giver => (Signal::KILL, 409, 0),
            Next::Taker => (Signal::CONT, 200, 1),
        };
        kill_process(self.taker, signal).unwrap();
        let answer = Response::read(&mut self.caller);
        assert_eq!(answer.status, status, "{answer:?}");
        wait_until("the log tells who goes on", || self.proxy.heirs().len() == heirs);
    }
}

fn builder(family: Family) -> Builder {
    Proxy::builder().listen(family).env(FAULT, "taker:ready:stop")
}

/// Returns the end of a stream that [`Stream::reset`] closes while no bytes are left unread. UNIX sockets know no reset.
fn reset_end(family: Family) -> End {
    if family.is_tcp() { End::Reset } else { End::Eof }
}

#[test]
fn clients_write_close_and_reset() {
    for (family, next) in cases() {
        clients_act(family, next);
    }
}

#[test]
fn the_upstream_writes_closes_and_resets() {
    for (family, next) in cases() {
        upstream_acts(family, next);
    }
}

#[test]
fn clients_write_and_reset_while_they_are_dialled_for() {
    for next in [Next::Giver, Next::Taker] {
        dialled_clients_act(next);
    }
}

/// Returns each kind of sockets that the clients have, and the upstream, with each process that goes on.
fn cases() -> impl Iterator<Item = (Family, Next)> {
    let both = [Next::Giver, Next::Taker];
    [Family::Tcp4, Family::Unix].into_iter().flat_map(move |family| both.map(|next| (family, next)))
}

fn clients_act(family: Family, next: Next) {
    const GREETING: &[u8] = b"before";
    let upstream = Upstream::start(family, |mut stream| {
        let greeting = stream.receive(GREETING.len());
        stream.send(&greeting);
        stream.receive_all()
    });
    let proxy = builder(family).upstream(&upstream).start();
    // One after the other, so that the upstream numbers them so.
    let [mut writes, mut closes, mut resets] = [(); 3].map(|()| {
        let mut client = proxy.connect();
        client.assert_echo(GREETING);
        client
    });
    proxy.control().pause();
    let [mut held, held_closes, held_resets] = [(); 3].map(|()| proxy.connect_held());

    let standstill = Standstill::begin(&proxy);
    let bytes = pattern(1, UNREAD_BYTES);
    writes.send(&bytes);
    writes.finish();
    closes.send(b"last words");
    drop(closes);
    resets.send(b"cut");
    resets.reset();
    held.send(GREETING);
    drop(held_closes);
    held_resets.reset();
    let mut newcomer = proxy.connect();
    newcomer.send(GREETING);
    standstill.end(next);

    let mut sessions = [(); 3].map(|()| upstream.session());
    sessions.sort_unstable_by_key(|session| session.number);
    let [first, second, third] = sessions.map(|Session { received, .. }| received);
    assert!(first == Received::ended(&bytes), "what was written differs");
    assert_eq!(second, Received::ended(b"last words"));
    assert_eq!(third, Received { bytes: b"cut".to_vec(), end: reset_end(family) });
    assert_eq!(writes.receive_all(), Received::ended(b""));
    let status = proxy.control().wait_status("two have left, and one has come", |status| {
        (status.held, status.left, status.active) == (2, 2, 0)
    });
    assert_eq!((status.accepted, status.failed), (7, 0), "{status:?}");
    proxy.control().resume();
    for client in [&mut held, &mut newcomer] {
        assert_eq!(client.receive(GREETING.len()), GREETING);
    }
}

fn upstream_acts(family: Family, next: Next) {
    let (go, gone) = mpsc::channel();
    let gone = Mutex::new(gone);
    let upstream = Upstream::start(family, move |mut stream| {
        let role = stream.receive(1);
        stream.send(&role);
        gone.lock().unwrap().recv_timeout(PATIENCE).expect("the standstill");
        match role[0] {
            b'w' => {
                stream.send(&pattern(1, UNREAD_BYTES));
                stream.finish();
                return stream.receive_all();
            }
            b'c' => stream.send(b"last words"),
            _ => {
                stream.send(b"cut");
                stream.reset();
            }
        }
        Received::ended(b"")
    });
    let proxy = builder(family).upstream(&upstream).start();
    let [mut writes, mut closes, mut resets] = [(); 3].map(|()| proxy.connect());
    for (client, role) in [(&mut writes, b"w"), (&mut closes, b"c"), (&mut resets, b"r")] {
        client.assert_echo(role);
    }

    let standstill = Standstill::begin(&proxy);
    (0..3).for_each(|_| go.send(()).unwrap());
    for _closed in 0..2 {
        upstream.session();
    }
    standstill.end(next);

    let received = writes.receive_all();
    assert!(received == Received::ended(&pattern(1, UNREAD_BYTES)), "what was written differs");
    writes.send(b"answer");
    writes.finish();
    assert_eq!(upstream.received(), Received::ended(b"answer"));
    assert_eq!(closes.receive_all(), Received::ended(b"last words"));
    closes.finish();
    let cut = Received { bytes: b"cut".to_vec(), end: reset_end(family) };
    assert_eq!(resets.receive_all(), cut);
    drop(resets);
    proxy.control().wait_counts(|status| (status.active, status.failed), (0, 0));
}

fn dialled_clients_act(next: Next) {
    let full = Listener::bind(&Addr::Tcp(([127, 0, 0, 1], 0).into()));
    full.backlog(0);
    full.fill();
    let proxy = builder(Family::Tcp4)
        .upstream_at(&full.addr())
        .args(["--upstream-connect-timeout", "20s"])
        .start();
    let [mut stays, mut writes, resets] = [(); 3].map(|()| proxy.connect());
    proxy.control().wait_counts(|status| status.connecting, 3);

    let standstill = Standstill::begin(&proxy);
    writes.send(b"written");
    writes.finish();
    resets.reset();
    standstill.end(next);

    proxy.control().wait_counts(|status| (status.connecting, status.left), (2, 1));
    full.backlog(16);
    let _upstream = Upstream::on(full, echo);
    assert_eq!(writes.receive_all(), Received::ended(b"written"));
    stays.assert_echo(b"stays");
}

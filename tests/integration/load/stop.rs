//! A stop in the middle of transfers: every one arrives whole, and the end comes when it is due.

use std::{
    io::{Read as _, Write as _},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::harness::{
    Builder, End, Family, Proxy, Received, Stream, Upstream, assert_same, echo, pattern, spawn,
};

/// Transfers that run, and clients that are held beside them.
const TRANSFERS: usize = 50;
const HELD: usize = 20;

/// A transfer: so many parts of a pattern with a rest between them, three seconds altogether.
const PARTS: usize = 30;
const PART_BYTES: usize = 8 << 10;
const REST: Duration = Duration::from_millis(100);

/// After how many parts the stop begins: 0.7 s.
const PARTS_BEFORE: usize = 7;

/// Clients in the middle of transfers, each on a thread of its own.
struct Transfers(Vec<JoinHandle<Received>>);

/// The ends of transfers.
#[derive(Debug, Default, PartialEq, Eq)]
struct Ends {
    whole: usize,
    reset: usize,
    /// A clean end before the last byte, which no transfer may have.
    short: usize,
    wrong: usize,
    failed: usize,
}

impl Transfers {
    /// Begins them, and returns once each has had its first parts.
    fn begin(proxy: &Proxy) -> Self {
        let clients: Vec<Stream> = (0..TRANSFERS)
            .map(|number| {
                let mut client = proxy.connect();
                client.send(&[u8::try_from(number).unwrap()]);
                client
            })
            .collect();
        let begun: Vec<_> = clients
            .into_iter()
            .map(|mut client| {
                let first = client.receive(PARTS_BEFORE * PART_BYTES);
                spawn(move || {
                    let rest = client.receive_all();
                    Received { bytes: [first, rest.bytes].concat(), end: rest.end }
                })
            })
            .collect();
        Self(begun)
    }

    /// Waits until all have ended.
    fn ends(self) -> Ends {
        let mut ends = Ends::default();
        for (number, transfer) in self.0.into_iter().enumerate() {
            let Received { bytes, end } = transfer.join().unwrap();
            let wanted = pattern(number as u64, PARTS * PART_BYTES);
            let count = match end {
                _ if !wanted.starts_with(&bytes) => &mut ends.wrong,
                End::Eof if bytes.len() == wanted.len() => &mut ends.whole,
                End::Eof => &mut ends.short,
                End::Reset => &mut ends.reset,
                End::Failed(_) => &mut ends.failed,
            };
            *count += 1;
        }
        ends
    }
}

/// Sends the pattern that the first byte asks for, part by part.
fn serve(mut stream: Stream) -> Received {
    let nothing = Received { bytes: Vec::new(), end: End::Eof };
    let mut asked = [0];
    // One who only looked whether clients are refused asks for nothing.
    if stream.read_exact(&mut asked).is_err() {
        return nothing;
    }
    for part in pattern(asked[0].into(), PARTS * PART_BYTES).chunks(PART_BYTES) {
        // A proxy that cuts it takes nothing more.
        if stream.write_all(part).is_err() {
            break;
        }
        thread::sleep(REST);
    }
    nothing
}

fn builder(family: Family, upstream: &Upstream) -> Builder {
    Proxy::builder().listen(family).upstream(upstream)
}

/// Runs a test for each kind of address, all at once, as they mostly wait.
fn for_each_family(test: fn(Family)) {
    thread::scope(|scope| {
        for family in [Family::Tcp4, Family::Unix, Family::Abstract] {
            scope.spawn(move || test(family));
        }
    });
}

#[test]
fn a_stop_lets_every_transfer_end_whole() {
    for_each_family(|family| {
        let upstream = Upstream::start(family, serve);
        let mut proxy = builder(family, &upstream).start();
        let transfers = Transfers::begin(&proxy);
        proxy.terminate();
        proxy.wait_refused();
        let ends = transfers.ends();
        let begun = Instant::now();
        assert_eq!(proxy.exit_code(), 0);
        println!("{family:?}: {ends:?}; exit {:?} after the last", begun.elapsed());
        assert_eq!(ends, Ends { whole: TRANSFERS, ..Ends::default() });
    });
}

#[test]
fn a_stop_while_paused_lets_transfers_end_and_serves_the_held_on_a_resume() {
    for_each_family(|family| {
        let upstream = Upstream::start(family, serve);
        let mut proxy = builder(family, &upstream).start();
        let transfers = Transfers::begin(&proxy);
        proxy.control().pause();
        let mut held: Vec<Stream> = (0..HELD).map(|_| proxy.connect()).collect();
        for client in &mut held {
            client.send(&[0]);
        }
        proxy.control().wait_counts(|status| status.held, HELD as u64);
        proxy.terminate();
        proxy.wait_refused();
        let ends = transfers.ends();
        assert_eq!(ends, Ends { whole: TRANSFERS, ..Ends::default() });
        // Nobody is left but those who are held: they stay, and so does the proxy, until they are served.
        proxy.control().wait_counts(|status| (status.held, status.active), (HELD as u64, 0));
        assert_eq!(upstream.accepted(), TRANSFERS);
        assert!(!proxy.has_ended());
        proxy.control().resume();
        let wanted = pattern(0, PARTS * PART_BYTES);
        for client in &mut held {
            let received = client.receive_all();
            assert_same(&received.bytes, &wanted);
            assert_eq!(received.end, End::Eof);
        }
        drop(held);
        assert_eq!(proxy.exit_code(), 0);
        println!("{family:?}, paused: {ends:?}; {HELD} of {HELD} held clients served");
    });
}

#[test]
fn a_stop_cuts_what_is_left_at_the_grace_limit_and_not_before() {
    const GRACE: Duration = Duration::from_millis(500);
    for is_paused in [false, true] {
        let upstream = Upstream::tcp(serve);
        let mut proxy = builder(Family::Tcp4, &upstream).grace_period(Some("500ms")).start();
        let transfers = Transfers::begin(&proxy);
        let mut held = Vec::new();
        if is_paused {
            proxy.control().pause();
            held.extend((0..HELD).map(|_| proxy.connect()));
            proxy.control().wait_counts(|status| status.held, HELD as u64);
        }
        let begun = Instant::now();
        proxy.terminate();
        assert_eq!(proxy.exit_code(), 3);
        let took = begun.elapsed();
        let ends = transfers.ends();
        println!("cut {took:?} after the signal, paused: {is_paused}: {ends:?}");
        assert!(took >= GRACE, "{took:?}");
        // A transfer that is cut never looks whole.
        assert_eq!(ends, Ends { reset: TRANSFERS, ..Ends::default() });
        for client in &mut held {
            assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Reset });
        }
        assert_eq!(upstream.accepted(), TRANSFERS);
    }
}

/// A supervisor that signals a process and its group, as `timeout` does, or two of them at once.
#[test]
fn the_twin_of_a_stop_signal_cuts_nothing() {
    for (first, twin) in [
        (Signal::TERM, Signal::TERM),
        (Signal::TERM, Signal::INT),
        (Signal::INT, Signal::QUIT),
        (Signal::QUIT, Signal::TERM),
    ] {
        let upstream = Upstream::tcp(serve);
        let mut proxy = builder(Family::Tcp4, &upstream).start();
        let transfers = Transfers::begin(&proxy);
        proxy.signal(first);
        // Else the kernel would make one of two of the same kind.
        proxy.wait_for_log("stopping once connections have ended");
        proxy.signal(twin);
        proxy.wait_for_log("is ignored: it came less than a second after the first");
        let ends = transfers.ends();
        assert_eq!(ends, Ends { whole: TRANSFERS, ..Ends::default() }, "{first:?}, {twin:?}");
        assert_eq!(proxy.exit_code(), 0);
    }
}

#[test]
fn a_second_signal_forces_the_end_of_transfers_and_of_the_held() {
    for is_paused in [false, true] {
        let upstream = Upstream::tcp(serve);
        let mut proxy = builder(Family::Tcp4, &upstream).start();
        let transfers = Transfers::begin(&proxy);
        let mut held = Vec::new();
        if is_paused {
            proxy.control().pause();
            held.extend((0..HELD).map(|_| proxy.connect()));
            proxy.control().wait_counts(|status| status.held, HELD as u64);
        }
        proxy.terminate();
        proxy.wait_refused();
        proxy.signal_a_second_later(Signal::TERM);
        let begun = Instant::now();
        assert_eq!(proxy.exit_code(), 1);
        let took = begun.elapsed();
        let ends = transfers.ends();
        println!("forced within {took:?}, paused: {is_paused}: {ends:?}");
        assert_eq!(ends, Ends { reset: TRANSFERS, ..Ends::default() });
        for client in &mut held {
            assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Reset });
        }
    }
}

#[test]
fn clients_that_are_queued_when_a_stop_begins_while_paused_are_held_and_served() {
    for_each_family(|family| {
        let upstream = Upstream::tcp(echo);
        let mut proxy = builder(family, &upstream).start();
        proxy.control().pause();
        // A process that is stopped accepts nobody: all of these wait in the listeners when the signal comes.
        proxy.signal(Signal::STOP);
        let mut queued: Vec<Stream> = (0..HELD).map(|_| proxy.connect()).collect();
        proxy.terminate();
        proxy.signal(Signal::CONT);
        proxy.control().wait_counts(|status| status.held, HELD as u64);
        proxy.wait_refused();
        assert_eq!(upstream.accepted(), 0);
        proxy.control().resume();
        for client in &mut queued {
            client.assert_echo(b"served");
        }
        drop(queued);
        assert_eq!(proxy.exit_code(), 0);
        println!("{family:?}: {HELD} of {HELD} queued clients held and served");
    });
}

//! The release of held clients: their order, their number at a time, their rate, and a few in spite of the pause.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::Ipv4Addr,
    ops::Range,
    sync::{
        Arc,
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use crate::harness::{
    Addr, Builder, End, Family, Listener, PATIENCE, Proxy, Stream, Upstream, echo, reserve, spawn,
};

/// The backlog of an upstream that has room.
const BACKLOG: i32 = 4096;

/// The time for which a connection counts as under way on which the upstream says nothing, as the page on holding tells.
const HEARING: Duration = Duration::from_millis(50);

/// A proxy of two workers: line and pace are those of both.
fn builder(upstream: &Addr) -> Builder {
    Proxy::builder().upstream_at(upstream).args(["--proxy-threads", "2"])
}

/// A listener whose queue is full: who is dialled for is under way, and stays so until there is room.
fn full_listener() -> Listener {
    let listener = Listener::bind(&Addr::Tcp((Ipv4Addr::LOCALHOST, 0).into()));
    listener.backlog(0);
    listener.fill();
    listener
}

/// A proxy in front of it that is patient.
fn slow_builder(listener: &Listener, max_connecting: u64) -> Builder {
    builder(&listener.addr())
        .args(["--upstream-connect-timeout", "20s"])
        .args(["--resume-max-connecting", &max_connecting.to_string()])
}

/// Clients that came one after the other, each of which has sent its number and is held.
pub(crate) fn held(proxy: &Proxy, numbers: Range<u8>) -> Vec<Stream> {
    numbers
        .map(|number| {
            let mut client = proxy.connect_held();
            client.send(&[number]);
            client
        })
        .collect()
}

/// An upstream that takes the numbers of its clients in the order in which they are dialled for.
pub(crate) struct Counter {
    listener: Arc<Listener>,
    numbers: Receiver<u8>,
}

/// The upstream's answer to a client: its number, or nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    Answers,
    IsSilent,
}

impl Counter {
    pub(crate) fn start(manner: Manner) -> Self {
        Self::on(Listener::bind(&Addr::Tcp((Ipv4Addr::LOCALHOST, 0).into())), manner)
    }

    pub(crate) fn on(listener: Listener, manner: Manner) -> Self {
        Self::taking(listener, manner, Duration::ZERO)
    }

    /// One that is busy for `interval` with each of them.
    fn taking(listener: Listener, manner: Manner, interval: Duration) -> Self {
        let listener = Arc::new(listener);
        let (sender, numbers) = mpsc::channel();
        let acceptor = listener.clone();
        drop(spawn(move || {
            let mut kept = Vec::new();
            while let Ok(mut stream) = acceptor.accept() {
                thread::sleep(interval);
                let mut number = [0];
                // One without a number only filled the queue.
                if stream.read_exact(&mut number).is_ok() {
                    if manner == Manner::Answers {
                        // The client may have gone with its test.
                        drop(stream.write_all(&number));
                    }
                    if sender.send(number[0]).is_err() {
                        return;
                    }
                    kept.push(stream);
                }
            }
        }));
        Self { listener, numbers }
    }

    pub(crate) fn addr(&self) -> Addr {
        self.listener.addr()
    }

    /// The next numbers that come.
    pub(crate) fn next(&self, count: usize) -> Vec<u8> {
        let next = |_| self.numbers.recv_timeout(PATIENCE).expect("one more client");
        (0..count).map(next).collect()
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.listener.close();
    }
}

#[test]
fn first_come_first_served_whichever_worker_holds_them() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Counter::start(Manner::Answers);
        let proxy = builder(&upstream.addr())
            .listen(family)
            .args(["--resume-max-connecting", "1", "--hold-timeout", "1h"])
            .start();
        proxy.control().pause();
        let mut clients = held(&proxy, 0..100);
        proxy.control().resume();
        assert_eq!(upstream.next(100), (0..100).collect::<Vec<u8>>(), "{family:?}");
        for (client, number) in clients.iter_mut().zip(0..) {
            assert_eq!(client.receive(1), [number]);
        }
    }
}

#[test]
fn new_clients_queue_behind_those_who_are_held() {
    const NEWCOMERS: u8 = 8;
    let listener = full_listener();
    let proxy = slow_builder(&listener, 1).start();
    proxy.control().pause();
    let mut clients = held(&proxy, 0..2);
    proxy.control().resume();
    // The first is dialled for, the second waits: with one of the workers, but it is the turn of nobody with the other.
    proxy.control().wait_counts(|status| (status.connecting, status.held), (1, 1));
    clients.extend((2..2 + NEWCOMERS).map(|number| {
        let mut client = proxy.connect();
        client.send(&[number]);
        client
    }));
    let newcomers = u64::from(NEWCOMERS);
    proxy.control().wait_counts(
        |status| (status.accepted, status.connecting, status.held),
        (2 + newcomers, 1, 1 + newcomers),
    );

    listener.backlog(BACKLOG);
    let upstream = Counter::on(listener, Manner::Answers);
    let order = upstream.next(clients.len());
    assert_eq!(order[..2], [0, 1]);
    assert_eq!(order[2..].iter().copied().collect::<BTreeSet<_>>(), (2..2 + NEWCOMERS).collect());
}

#[test]
fn a_few_are_let_through_in_spite_of_the_pause() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = builder(upstream.addr()).listen(family).start();
        proxy.control().pause();
        let mut clients = held(&proxy, 0..12);
        let mut through = 0;
        for count in [3, 1, 4] {
            let response = proxy.control().delete(&format!("/paused?release={count}"));
            assert_eq!(
                (response.status, response.text()),
                (200, &*format!("{{\"released\": {count}}}\n"))
            );
            let numbered = clients.iter_mut().zip(0..).skip(through).take(count);
            for (client, number) in numbered {
                assert_eq!(client.receive(1), [number], "{family:?}");
                client.assert_echo(b"let through");
            }
            through += count;
            // Another word of the operator has each worker look again.
            proxy.control().pause();
            proxy.control().wait_counts(
                |status| (status.active, status.held),
                (through as u64, (clients.len() - through) as u64),
            );
            assert_eq!(upstream.accepted(), through, "{family:?}");
            assert!(proxy.control().is_paused());
        }
        // They count as others do, and the held ones do not.
        assert_eq!(proxy.control().get("/paused/block-until-idle?timeout=1ms").status, 504);
        drop(clients.drain(..through));
        proxy.control().wait_idle();

        proxy.control().resume();
        for (client, number) in clients.iter_mut().zip(8..) {
            assert_eq!(client.receive(1), [number], "{family:?}");
        }
        assert_eq!(proxy.control().status().failed, 0);
    }
}

#[test]
fn what_was_let_through_in_vain_lets_nobody_through_later() {
    let upstream = Upstream::tcp(echo);
    let proxy = builder(upstream.addr()).start();
    assert_eq!(proxy.control().delete("/paused?release=1").status, 409);
    proxy.control().pause();
    assert_eq!(proxy.control().delete("/paused?release=5").text(), "{\"released\": 0}\n");
    let mut clients = held(&proxy, 0..2);
    assert_eq!(proxy.control().delete("/paused?release=5").text(), "{\"released\": 2}\n");
    for (client, number) in clients.iter_mut().zip(0..) {
        assert_eq!(client.receive(1), [number]);
    }

    let mut later = held(&proxy, 2..6);
    proxy.control().pause();
    let status = proxy.control().status();
    assert_eq!((status.held, status.active, status.paused), (4, 2, true));
    assert_eq!(upstream.accepted(), 2);
    // Nor does one that left before it could go.
    later.remove(0).reset();
    proxy.control().wait_counts(|status| status.held, 3);
    assert_eq!(proxy.control().delete("/paused?release=1").text(), "{\"released\": 1}\n");
    assert_eq!(later[0].receive(1), [3]);
    proxy.control().resume();
    for (client, number) in later[1..].iter_mut().zip(4..) {
        assert_eq!(client.receive(1), [number]);
    }
}

#[test]
fn a_place_of_one_who_left_lets_nobody_through_later() {
    let listener = full_listener();
    let proxy = slow_builder(&listener, 1).start();
    proxy.control().pause();
    let mut clients = held(&proxy, 0..2);
    assert_eq!(proxy.control().delete("/paused?release=2").text(), "{\"released\": 2}\n");
    proxy.control().wait_counts(|status| (status.connecting, status.held), (1, 1));
    // The second may go, and goes for good before it can.
    clients.remove(1).reset();
    proxy.control().wait_counts(|status| (status.held, status.left), (0, 1));
    let later = held(&proxy, 2..6);

    listener.backlog(BACKLOG);
    let upstream = Counter::on(listener, Manner::Answers);
    assert_eq!(upstream.next(1), [0]);
    assert_eq!(clients[0].receive(1), [0]);
    proxy.control().pause();
    let status = proxy.control().status();
    assert_eq!((status.active, status.held), (1, later.len() as u64));
    proxy.control().resume();
    assert_eq!(upstream.next(later.len()), [2, 3, 4, 5]);
}

#[test]
fn no_more_are_under_way_than_are_allowed() {
    const COUNT: u64 = 40;
    const MAX: u64 = 4;
    let listener = full_listener();
    let proxy = slow_builder(&listener, MAX).start();
    proxy.control().pause();
    let mut clients = held(&proxy, 0..u8::try_from(COUNT).unwrap());
    proxy.control().resume();
    proxy.control().wait_counts(|status| (status.connecting, status.held), (MAX, COUNT - MAX));
    proxy.control().resume();
    let bounded = |status: &crate::harness::Status| {
        assert!(status.connecting <= MAX, "{status:?}");
        status.active == COUNT
    };
    assert!(!bounded(&proxy.control().status()));

    listener.backlog(BACKLOG);
    let _upstream = Counter::on(listener, Manner::Answers);
    proxy.control().wait_status("all are served", bounded);
    for (client, number) in clients.iter_mut().zip(0..) {
        assert_eq!(client.receive(1), [number]);
    }
    assert_eq!(proxy.control().status().failed, 0);
}

#[test]
fn a_silent_upstream_gets_them_at_a_pace() {
    const COUNT: u8 = 20;
    const MAX: u8 = 4;
    let upstream = Counter::start(Manner::IsSilent);
    let proxy =
        builder(&upstream.addr()).args(["--resume-max-connecting", &MAX.to_string()]).start();
    proxy.control().pause();
    let _clients = held(&proxy, 0..COUNT);
    let begin = Instant::now();
    proxy.control().resume();
    upstream.next(COUNT.into());
    let least = HEARING * u32::from(COUNT / MAX - 1);
    assert!(begin.elapsed() >= least, "{:?} is less than {least:?}", begin.elapsed());
}

/// A UNIX socket whose queue is full says so at once, and none of those who wait is to run out of time for it.
#[test]
fn those_who_are_held_stay_so_while_the_queue_of_a_unix_socket_is_full() {
    const COUNT: u8 = 40;
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind(&Addr::Unix(dir.path().join("upstream.sock")));
    listener.backlog(0);
    let first = listener.addr().connect();
    let proxy = builder(&listener.addr()).args(["--upstream-connect-timeout", "300ms"]).start();
    proxy.control().pause();
    let _clients = held(&proxy, 0..COUNT);
    proxy.control().resume();
    let status = proxy.control().wait_status("one gives up", |status| status.failed > 0);
    assert!(status.held > u64::from(COUNT) / 2, "{status:?}");

    drop(first);
    listener.backlog(BACKLOG);
    let upstream = Counter::on(listener, Manner::Answers);
    let status =
        proxy.control().wait_status("the others go", |it| (it.held, it.connecting) == (0, 0));
    assert_eq!(status.active + status.failed, u64::from(COUNT));
    upstream.next(status.active.try_into().unwrap());
}

#[test]
fn no_more_are_let_go_in_a_second_than_are_allowed() {
    const COUNT: u8 = 20;
    let upstream = Counter::start(Manner::Answers);
    let proxy = builder(&upstream.addr()).args(["--resume-rate", "20"]).start();
    proxy.control().pause();
    let mut clients = held(&proxy, 0..COUNT);
    let begin = Instant::now();
    proxy.control().resume();
    assert_eq!(upstream.next(COUNT.into()), (0..COUNT).collect::<Vec<_>>());
    let taken = begin.elapsed();
    assert!(taken >= Duration::from_millis(800), "{taken:?}");
    for (client, number) in clients.iter_mut().zip(0..) {
        assert_eq!(client.receive(1), [number]);
    }
}

/// The longest that a crowd may take for which there is room as soon as the upstream takes somebody. TCP alone would take
/// it seconds to try again, and then ever longer.
const CROWD_PATIENCE: Duration = Duration::from_secs(3);

/// An upstream with a small backlog: it takes one each `interval`, and answers at once whatever comes first.
fn small(backlog: i32, interval: Duration) -> Counter {
    let listener = Listener::bind(&Addr::Tcp((Ipv4Addr::LOCALHOST, 0).into()));
    listener.backlog(backlog);
    Counter::taking(listener, Manner::Answers, interval)
}

/// Clients of a crowd all get their answer, without anybody's waiting for TCP to try again.
fn all_are_answered(proxy: &Proxy, clients: &mut [Stream], within: Duration) {
    let begin = Instant::now();
    proxy.control().resume();
    for (client, number) in clients.iter_mut().zip(0..) {
        assert_eq!(client.receive(1), [number]);
    }
    assert!(begin.elapsed() < within, "{:?} until all were answered", begin.elapsed());
    let status = proxy.control().status();
    assert_eq!((status.held, status.failed, status.left), (0, 0, 0));
}

#[test]
fn a_crowd_finds_the_pace_of_a_backlog_of_five_that_is_taken_at_once() {
    const COUNT: u8 = 200;
    for family in [Family::Tcp4, Family::Unix] {
        // What a thread for each of them takes to begin.
        let upstream = small(5, Duration::from_millis(1));
        let proxy = builder(&upstream.addr()).listen(family).start();
        proxy.control().pause();
        let mut clients = held(&proxy, 0..COUNT);
        all_are_answered(&proxy, &mut clients, CROWD_PATIENCE);
    }
}

#[test]
fn a_crowd_finds_the_pace_of_a_small_backlog_that_is_taken_slowly() {
    const COUNT: u8 = 100;
    const INTERVAL: Duration = Duration::from_millis(10);
    let upstream = small(5, INTERVAL);
    let proxy = builder(&upstream.addr()).start();
    proxy.control().pause();
    let mut clients = held(&proxy, 0..COUNT);
    all_are_answered(&proxy, &mut clients, INTERVAL * u32::from(COUNT) * 2 + CROWD_PATIENCE);
}

#[test]
fn those_who_have_waited_for_the_upstream_find_its_pace_too() {
    const COUNT: u8 = 200;
    let vacant = reserve();
    let proxy = builder(&vacant.addr()).args(["--upstream-retry-for", "1m"]).start();
    let mut clients: Vec<_> = (0..COUNT)
        .map(|number| {
            let mut client = proxy.connect();
            client.send(&[number]);
            client
        })
        .collect();
    proxy.control().wait_status("all wait", |status| status.held == u64::from(COUNT));
    let listener = vacant.listen();
    listener.backlog(5);
    let _upstream = Counter::on(listener, Manner::Answers);
    all_are_answered(&proxy, &mut clients, CROWD_PATIENCE);
}

/// Few are under way, and each would have the whole connect timeout: that one of them has had it is enough.
#[test]
fn a_crowd_whose_upstream_answers_nothing_is_not_kept_waiting_one_by_one() {
    const COUNT: u8 = 60;
    let listener = full_listener();
    let proxy = builder(&listener.addr()).args(["--upstream-connect-timeout", "1s"]).start();
    proxy.control().pause();
    let mut clients = held(&proxy, 0..COUNT);
    let begin = Instant::now();
    proxy.control().resume();
    for client in &mut clients {
        assert_eq!(client.receive_all().end, End::Reset);
    }
    let taken = begin.elapsed();
    assert!(taken < Duration::from_secs(8), "{taken:?} until all were given up");
    assert_eq!(proxy.control().status().failed, u64::from(COUNT));
}

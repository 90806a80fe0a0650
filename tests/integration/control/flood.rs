//! The control API under floods: whatever a crowd does to it, an operator is answered, and nothing is left of the crowd.

use std::{
    collections::BTreeMap,
    io::Write,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Resource, geteuid};

use crate::harness::{
    Control, Family, PATIENCE, Proxy, Response, Stream, Upstream, amount, echo, wait_until,
};

const GET: &[u8] = b"GET /paused HTTP/1.1\r\nHost: localhost\r\n\r\n";
const WAIT: &str = "GET /paused/block-until-idle?timeout=3s HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// A crowd.
const CROWD: usize = 2_000;
/// By so much the memory may grow.
const GROWTH_MAX_KIB: usize = 8 << 10;
/// An operator who waits longer for an answer has reason to complain. Mostly it is a few milliseconds.
const LATENCY_MAX: Duration = Duration::from_secs(2);
/// Time after which a caller that is not answered well is closed; a busy machine may take twice as long.
const CLOSED_AFTER: Duration = Duration::from_secs(5);

/// Has `attack` done to a proxy while an operator asks it all the time, and looks at what is left.
fn withstand(name: &str, attack: impl FnOnce(&Control)) {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).log_level(Some("info")).start();
    let mut carried = proxy.connect();
    carried.assert_echo(b"so that it is not idle");
    // Whatever the API starts for an ordinary crowd is there from now on.
    for mut caller in (0..60).map(|_| send(proxy.control(), GET)).collect::<Vec<_>>() {
        assert_eq!(Response::read(&mut caller).status, 200);
    }
    let descriptors = proxy.descriptors();
    let (threads, peak) = (proxy.threads(), proxy.memory_peak_kib());
    let stops = AtomicBool::new(false);
    let watched = thread::scope(|scope| {
        let operator = scope.spawn(|| watch(proxy.control(), &stops));
        // The operator has to stop even if the attack fails.
        let attacked =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| attack(proxy.control())));
        stops.store(true, Ordering::SeqCst);
        let watched = operator.join().unwrap();
        attacked.unwrap();
        watched
    });
    let grown = proxy.memory_peak_kib() - peak;
    println!(
        "{name}: the operator was answered {} times, the longest after {:?}, sent away {} times; memory grew by {grown} KiB",
        watched.answered, watched.longest, watched.refused
    );
    assert!(watched.longest < LATENCY_MAX, "{:?}", watched.longest);
    assert!(watched.refused <= 2 + watched.answered / 10, "sent away {} times", watched.refused);
    assert!(grown <= GROWTH_MAX_KIB, "the memory grew by {grown} KiB");
    wait_until("no descriptor is left", || proxy.descriptors() <= descriptors);
    wait_until("no thread is left", || proxy.has_no_more_threads_than(threads));
    carried.assert_echo(b"it has not been touched");
    assert_works(&proxy, carried);
}

/// The observations of an operator.
#[derive(Default)]
struct Watched {
    answered: usize,
    /// Times that a whole crowd came between the connect and the request, so that there was no room.
    refused: usize,
    longest: Duration,
}

fn watch(control: &Control, stops: &AtomicBool) -> Watched {
    let mut watched = Watched::default();
    while !stops.load(Ordering::SeqCst) {
        let begin = Instant::now();
        loop {
            match control.try_get() {
                Some(response) if response.status == 200 => {
                    assert_eq!(response.text(), r#"{"paused": false}"#);
                    break;
                }
                _ => watched.refused += 1,
            }
            assert!(begin.elapsed() < PATIENCE, "the operator is not answered");
        }
        watched.answered += 1;
        watched.longest = watched.longest.max(begin.elapsed());
    }
    watched
}

/// Everything that the API does.
fn assert_works(proxy: &Proxy, carried: Stream) {
    let control = proxy.control();
    control.pause();
    assert!(control.is_paused());
    assert_eq!(control.get("/paused/block-until-idle?timeout=1ms").status, 504);
    control.resume();
    assert!(!control.is_paused());
    drop(carried);
    control.wait_idle();
}

/// Connects and sends; a caller that is sent away already may have no socket to send to.
fn send(control: &Control, request: &[u8]) -> Stream {
    let mut caller = control.addr().connect();
    drop(caller.write_all(request));
    caller
}

/// Returns the number of callers with each status; 0 is none, of a connection that was closed or reset without a word.
fn statuses(callers: impl IntoIterator<Item = Stream>) -> BTreeMap<u16, usize> {
    let mut counts = BTreeMap::new();
    for mut caller in callers {
        let received = caller.receive_all();
        let status = Response::try_parse(&received.bytes).map_or(0, |response| response.status);
        *counts.entry(status).or_default() += 1;
    }
    counts
}

#[test]
fn two_thousand_half_requests() {
    withstand("half requests", |control| {
        let halves: [&[u8]; 4] = [
            b"",
            b"PUT /pau",
            b"PUT /paused HTTP/1.1\r\nHost: loc",
            b"PUT /paused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
        ];
        let callers: Vec<Stream> =
            halves.iter().cycle().take(CROWD).map(|half| send(control, half)).collect();
        let begin = Instant::now();
        let counts = statuses(callers);
        let elapsed = begin.elapsed();
        println!("half requests: {counts:?}, the last closed after {elapsed:?}");
        assert!(elapsed < 2 * CLOSED_AFTER, "{elapsed:?}");
        // Some have made room for later ones, the others had their time.
        assert!(counts.keys().all(|status| [408, 503].contains(status)), "{counts:?}");
        assert!(counts.contains_key(&408));
    });
}

#[test]
fn heads_of_two_hundred_megabytes() {
    withstand("endless heads", |control| {
        const BYTES: usize = 200 << 20;
        let chunk = vec![b'a'; 1 << 20];
        for begin in ["GET /paused HTTP/1.1\r\nX: ", "GET /", "X", "GET /paused HTTP/1.1\r\nHost: "]
        {
            let mut caller = send(control, begin.as_bytes());
            let taken = (0..BYTES).step_by(chunk.len()).find(|_| caller.write_all(&chunk).is_err());
            assert!(
                taken.is_some_and(|taken| taken < BYTES / 4),
                "{begin:?}: {taken:?} bytes were taken"
            );
        }
    });
}

#[test]
fn a_thousand_waiters_of_which_half_vanish() {
    withstand("waiters", |control| {
        let mut waiters = Vec::new();
        for number in 0..CROWD / 2 {
            let waiter = send(control, WAIT.as_bytes());
            match number % 4 {
                0 => waiter.reset(),
                1 => drop(waiter),
                _ => waiters.push(waiter),
            }
        }
        // Those that have gone have left their seats.
        wait_until("there is room for another", || {
            control.get("/paused/block-until-idle?timeout=1ms").status == 504
        });
        let counts = statuses(waiters);
        println!("waiters: {counts:?}");
        assert!(counts.keys().all(|status| [503, 504].contains(status)), "{counts:?}");
        assert!(counts[&504] >= 10, "{counts:?}");
    });
}

#[test]
fn resets_before_and_behind_every_step() {
    withstand("resets", |control| {
        let requests: [&[u8]; 4] = [b"", &GET[..20], GET, WAIT.as_bytes()];
        for request in requests.iter().cycle().take(CROWD) {
            send(control, request).reset();
        }
    });
}

#[test]
fn callers_that_do_not_read() {
    withstand("deaf callers", |control| {
        let many = GET.repeat(200);
        let callers: Vec<Stream> = (0..300).map(|_| send(control, &many)).collect();
        let begin = Instant::now();
        wait_until("all of them are closed", || {
            callers.iter().all(|caller| {
                rustix::net::send(caller, b"x", rustix::net::SendFlags::NOSIGNAL).is_err()
            })
        });
        assert!(begin.elapsed() < 2 * CLOSED_AFTER);
    });
}

#[test]
fn very_many_small_requests() {
    // Requests of each of four threads, one after the other.
    let requests = amount(2_000, 250_000);
    withstand("small requests", |control| {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for number in 0..requests {
                        let (target, status) =
                            [("/paused", 200), ("/status", 200), ("/nothing", 404)][number % 3];
                        assert_eq!(control.get(target).status, status, "{target}");
                    }
                });
            }
        });
        println!("small requests: {} answered", 4 * requests);
    });
}

#[test]
fn a_shortage_of_descriptors_passes() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().control(family).upstream(&upstream).start();
        let control = proxy.control();
        assert!(!control.is_paused());
        let (descriptors, threads) = (proxy.descriptors(), proxy.threads());
        for spare in 0..8 {
            proxy.limit(Resource::Nofile, Some((descriptors + spare) as u64));
            let callers: Vec<Stream> = (0..20).map(|_| send(control, GET)).collect();
            // The first of them meets the shortage, or is answered in spite of it.
            callers[0].read_timeout(Duration::from_millis(300));
            let early = callers[0].try_clone().receive_all().bytes;
            let early = Response::try_parse(&early);
            assert!(early.is_none_or(|response| response.status == 200));
            proxy.limit(Resource::Nofile, None);
            let counts = statuses(callers.into_iter().skip(1));
            assert_eq!(counts, BTreeMap::from([(200, 19)]), "{spare} descriptors were left");
        }
        wait_until("no descriptor is left", || proxy.descriptors() <= descriptors);
        wait_until("no thread is left", || proxy.has_no_more_threads_than(threads));
        let mut carried = proxy.connect();
        carried.assert_echo(b"not idle");
        assert_works(&proxy, carried);
    }
}

#[test]
fn a_shortage_of_threads_passes() {
    if geteuid().is_root() {
        println!("skipped: root has no such limit; make test-unprivileged shows it");
        return;
    }
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let control = proxy.control();
    assert!(!control.is_paused());
    let (descriptors, threads) = (proxy.descriptors(), proxy.threads());
    proxy.limit(Resource::Nproc, Some(1));
    let callers: Vec<Stream> = (0..100).map(|_| send(control, GET)).collect();
    assert_eq!(statuses(callers), BTreeMap::from([(200, 100)]), "no further thread is needed");
    // Now the private server is lost too, and there are no threads for another.
    // One caller and the way to the server take what is left, and the server has none for its side. The front holds one more
    // while it looks for the next caller (accept(2)).
    let mut counts = (2..=4).cycle();
    wait_until("the private server is lost", || {
        wait_until("no caller is left", || proxy.descriptors() <= descriptors);
        proxy.leave_descriptors(counts.next().expect("a count"));
        assert_eq!(Response::read(&mut send(control, GET)).status, 200);
        // Its accept thread has ended.
        proxy.threads() < threads
    });
    proxy.limit(Resource::Nofile, None);
    // One line a second is logged of this kind.
    wait_until("there is no thread for another", || {
        assert_eq!(Response::read(&mut send(control, GET)).status, 200);
        proxy.log_so_far().contains("Resource temporarily unavailable")
    });
    let callers: Vec<Stream> = (0..20).map(|_| send(control, GET)).collect();
    proxy.limit(Resource::Nproc, None);
    let counts = statuses(callers);
    assert!(counts.keys().eq(&[200]), "{counts:?}");
    println!("{counts:?} answered after a shortage of threads");
    wait_until("no descriptor is left", || proxy.descriptors() <= descriptors);
    wait_until("no thread is left", || proxy.has_no_more_threads_than(threads));
    let mut carried = proxy.connect();
    carried.assert_echo(b"not idle");
    assert_works(&proxy, carried);
}

//! A stop at each message of an upgrade, to either process or to both, as a service manager signals all processes of a service.
//! Either nobody has taken over and the old process stops, or the new one has everything and stops.

use std::time::Duration;

use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid,
};

use super::{Cast, crash::FAULT};
use crate::harness::{
    End, Family, Proxy, Received, Response, Stream, Upstream, child_pids_of, echo, hangup,
    in_namespace, state_of, wait_until,
};

/// Age of a stop from which a further signal closes all connections.
const FORCE_AFTER: Duration = Duration::from_secs(1);

/// Processes that are told to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Giver,
    Taker,
    Both,
}

/// An upgrade that stands still at a message, and a stop that comes then.
struct Stop {
    cast: Cast,
    caller: Stream,
    taker: u32,
}

impl Stop {
    /// Has an upgrade stand still right before `message` of `side`, sends the stop signal, and lets the upgrade go on.
    fn at(side: &str, message: &str, told: Told) -> Self {
        let builder = Proxy::builder().followed().env(FAULT, &format!("{side}:{message}:stop"));
        // Such an upstream spares the wait for TCP's next try.
        let mut cast = Cast::before(Family::Unix, builder);
        cast.end_answered();
        let caller = cast.proxy.control().send("POST", "/upgrade", &[]);
        let giver = cast.proxy.first_pid();
        let stands_still = |proxy: &Proxy| match side {
            "giver" => state_of(giver) == 'T',
            _ => proxy.children() == ['T'],
        };
        cast.knock(stands_still);
        wait_until("it stands still", || stands_still(&cast.proxy));
        let taker = child_pids_of(giver)[0];
        let still = if side == "giver" { giver } else { taker };
        let told = match told {
            Told::Giver => &[giver][..],
            Told::Taker => &[taker],
            Told::Both => &[giver, taker],
        };
        for &pid in told {
            send(pid, Signal::TERM);
        }
        send(still, Signal::CONT);
        Self { cast, caller, taker }
    }

    /// Checks that nobody has taken over, and that the giver stops.
    #[track_caller]
    fn giver_stops(self) {
        let Self { cast, caller, taker } = self;
        // Of a taker that has heard of the stop, too, it may hear first.
        assert!([503, 409].contains(&answer(caller)));
        let mut proxy = cast.finish_stopping();
        assert_eq!((proxy.exit_code(), state_of(taker)), (0, 'Z'));
        assert_eq!(lines(&proxy), (0, 1, 1, 1), "{}", proxy.log_so_far());
    }

    /// Checks that nobody has taken over, and that the giver goes on until it is told to stop.
    #[track_caller]
    fn giver_goes_on(self) {
        let Self { cast, caller, .. } = self;
        assert_eq!(answer(caller), 409);
        assert!(cast.proxy.child_pids().is_empty(), "the taker is left");
        let (mut proxy, _upstream) = cast.finish();
        proxy.connect().assert_echo(b"by the giver");
        proxy.terminate();
        assert_eq!(proxy.exit_code(), 0);
        assert_eq!(lines(&proxy), (0, 1, 1, 1), "{}", proxy.log_so_far());
    }

    /// Checks that the taker has everything and stops, and that it has heard of a stop so often, together with the giver.
    #[track_caller]
    fn taker_stops(self, heard: usize) {
        let Self { cast, caller, taker } = self;
        assert_eq!(answer(caller), 200);
        let mut proxy = cast.finish_stopping();
        assert_eq!(proxy.exit_code(), 0);
        proxy.wait_for_log("stopped: every connection had ended, exit code 0");
        wait_until("the taker has ended", || state_of(taker) == 'Z');
        assert_eq!(proxy.heirs(), [taker]);
        assert_eq!(lines(&proxy), (1, 0, heard, 1), "{}", proxy.log_so_far());
    }
}

/// Returns the status that the caller is answered with, who then hangs up.
fn answer(mut caller: Stream) -> u16 {
    Response::read(&mut caller).status
}

/// Returns how often the log tells of an upgrade, of one that has failed, of the beginning of a stop, and of its end.
fn lines(proxy: &Proxy) -> (usize, usize, usize, usize) {
    proxy.wait_for_log(" stopped: ");
    let texts = ["has taken over, pid", "not upgraded: ", "SIGTERM: stopping", " stopped: "];
    texts.map(|text| proxy.log_count(text)).into()
}

fn send(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.cast_signed()).expect("a process");
    kill_process(pid, signal).expect("a process of ours");
}

/// Messages of the giver before its last word.
const DESCRIPTION: [&str; 8] =
    ["hello", "begin", "listeners", "connections", "control-listeners", "control", "rest", "end"];

#[test]
fn a_giver_that_is_told_before_its_last_word_stops() {
    for message in DESCRIPTION {
        Stop::at("giver", message, Told::Giver).giver_stops();
    }
}

#[test]
fn a_giver_that_is_told_before_the_taker_is_ready_stops() {
    for message in ["hello", "warm", "ready"] {
        Stop::at("taker", message, Told::Giver).giver_stops();
    }
}

#[test]
fn a_giver_that_is_told_together_with_its_taker_stops() {
    for message in DESCRIPTION.into_iter().chain(["go"]) {
        Stop::at("giver", message, Told::Both).giver_stops();
    }
    for message in ["hello", "warm", "ready"] {
        Stop::at("taker", message, Told::Both).giver_stops();
    }
}

#[test]
fn a_taker_that_is_told_before_it_goes_on_ends_alone() {
    for (side, message) in
        [("taker", "hello"), ("taker", "warm"), ("taker", "ready"), ("giver", "go")]
    {
        Stop::at(side, message, Told::Taker).giver_goes_on();
    }
}

#[test]
fn a_taker_that_goes_on_stops_whoever_is_told() {
    for (side, message, told, heard) in [
        ("giver", "go", Told::Giver, 2),
        ("taker", "taken", Told::Giver, 2),
        ("taker", "taken", Told::Taker, 1),
        ("taker", "taken", Told::Both, 2),
        ("giver", "left", Told::Giver, 2),
        ("giver", "left", Told::Taker, 1),
        ("giver", "left", Told::Both, 2),
    ] {
        Stop::at(side, message, told).taker_stops(heard);
    }
}

/// Nothing keeps such a giver, and it leaves no taker behind.
#[test]
fn an_idle_giver_ends_with_its_taker() {
    let upstream = Upstream::tcp(echo);
    for message in ["hello", "warm"] {
        let fault = format!("taker:{message}:stop");
        let mut proxy = Proxy::builder().upstream(&upstream).followed().env(FAULT, &fault).start();
        proxy.signal(hangup());
        wait_until("the taker stands still", || proxy.children() == ['T']);
        let taker = proxy.child_pids()[0];
        proxy.terminate();
        assert_eq!(proxy.exit_code(), 0);
        wait_until("the taker has ended", || state_of(taker) == 'Z');
        assert!(proxy.heirs().is_empty());
    }
}

/// The test becomes the parent of a process that has taken over, once the old one has ended.
#[test]
fn a_process_that_has_taken_over_ends_with_the_exit_code_of_a_stop() {
    in_namespace(
        "upgrade::stop::a_process_that_has_taken_over_ends_with_the_exit_code_of_a_stop",
        || {
            set_child_subreaper(Some(getpid())).unwrap();
            let upstream = Upstream::tcp(echo);
            for (grace_period, is_cut, expected) in [("1h", false, 0), ("200ms", true, 3)] {
                let mut proxy = Proxy::builder()
                    .upstream(&upstream)
                    .followed()
                    .grace_period(Some(grace_period))
                    .start();
                let mut client = proxy.connect();
                client.assert_echo(b"before");
                proxy.upgrade();
                assert_eq!(proxy.exit_code(), 0);
                client.assert_echo(b"after");
                let heir = Pid::from_raw(proxy.pid().cast_signed());
                proxy.terminate();
                let end = if is_cut { End::Reset } else { End::Eof };
                if !is_cut {
                    client.finish();
                }
                assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end });
                let mut code = None;
                wait_until("it has ended", || {
                    let ended = waitpid(heir, WaitOptions::NOHANG).unwrap();
                    code = ended.and_then(|(_pid, status)| status.exit_status());
                    ended.is_some()
                });
                assert_eq!(code, Some(expected), "{grace_period}");
            }
        },
    );
}

/// The old process may wait for its log or for the service manager before it passes a stop on that the new one has heard, too.
#[test]
fn a_stop_that_is_passed_on_late_is_no_second_one() {
    let upstream = Upstream::tcp(echo);
    let mut proxy =
        Proxy::builder().upstream(&upstream).followed().env(FAULT, "giver:left:stop").start();
    let mut client = proxy.connect();
    client.assert_echo(b"before");
    proxy.signal(hangup());
    wait_until("the taker goes on", || proxy.heirs().len() == 1);
    let giver = proxy.first_pid();
    wait_until("it stands still", || state_of(giver) == 'T');
    proxy.terminate();
    proxy.wait_for_log("SIGTERM: stopping");
    send(giver, Signal::TERM);
    std::thread::sleep(FORCE_AFTER);
    send(giver, Signal::CONT);
    assert_eq!(proxy.exit_code(), 0);
    proxy.wait_for_log("SIGTERM is ignored: it is passed on");
    client.assert_echo(b"after");
    client.finish();
    proxy.wait_for_log("stopped: every connection had ended, exit code 0");
}

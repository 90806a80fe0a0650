//! Pauses in a hand-over: frozen while they are described.

use std::{
    sync::{MutexGuard, atomic::Ordering},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    PauseCounts, Pauses,
    fence::millis,
    leases::{Leases, words::LeasesWords},
};
use crate::handover::parcel::{Incoming, Outgoing};

/// All of the pauses in a hand-over. The gate's bits and the orders to the workers follow from the leases, and its passes from
/// the connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PausesWords {
    leases: LeasesWords,
    counts: CountsWords,
    idle_moments: u64,
    /// Milliseconds of the fence's deadline since the start of the host, by a clock that both processes have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fence: Option<u64>,
}

/// Numbers of pauses in a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
struct CountsWords {
    begun: u64,
    lifted: u64,
    expired: u64,
    undone: u64,
    caller_gone: u64,
}

/// Pauses that nothing changes. Every thread that would begin, end or renew a pause waits until this is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct FrozenPauses<'a> {
    pauses: &'a Pauses,
    leases: MutexGuard<'a, Leases>,
}

impl Pauses {
    /// Freezes the pauses, so that nothing changes behind their description.
    pub(crate) fn freeze(&self) -> FrozenPauses<'_> {
        FrozenPauses { pauses: self, leases: self.lock() }
    }

    /// Takes over pauses that were described: closes the gate and gives the workers their orders, as the leases say. Neither
    /// the log nor a watcher hears of it, as no pause begins. No lease expires before [`Pauses::go_on`].
    pub(crate) fn restore(&self, words: &PausesWords, parcel: &Incoming) {
        let PausesWords { leases, counts, idle_moments, fence } = words;
        self.awaits_word.store(true, Ordering::Release);
        let mut frozen = self.freeze();
        *frozen.leases = Leases::rebuild(leases, parcel);
        self.apply(&frozen.leases);
        self.counts.restore(counts);
        self.gate.restore_idle_moments(*idle_moments);
        self.gate.fence_at(fence.map(Duration::from_millis));
    }

    /// Lets leases that were taken over expire.
    pub(crate) fn go_on(&self) {
        self.awaits_word.store(false, Ordering::Release);
        self.expiry.try_send(()).ok();
    }
}

impl FrozenPauses<'_> {
    /// Describes the pauses for a hand-over.
    pub(crate) fn describe(&self, parcel: &Outgoing<'_>) -> PausesWords {
        let Pauses {
            gate,
            barrier: _,
            steer: _,
            drain: _,
            default_mode: _,
            default_half_closed: _,
            max_ttl: _,
            leases: _,
            counts,
            expiry: _,
            awaits_word: _,
            watchers: _,
            queue: _,
            upstream: _,
            workers: _,
        } = self.pauses;
        PausesWords {
            leases: self.leases.describe(parcel),
            counts: counts.describe(),
            idle_moments: gate.idle_moments(),
            fence: gate.fence().map(millis),
        }
    }
}

impl PauseCounts {
    fn describe(&self) -> CountsWords {
        let Self { begun, lifted, expired, undone, caller_gone } = self;
        CountsWords {
            begun: begun.load(Ordering::Relaxed),
            lifted: lifted.load(Ordering::Relaxed),
            expired: expired.load(Ordering::Relaxed),
            undone: undone.load(Ordering::Relaxed),
            caller_gone: caller_gone.load(Ordering::Relaxed),
        }
    }

    fn restore(&self, words: &CountsWords) {
        let CountsWords { begun, lifted, expired, undone, caller_gone } = *words;
        self.begun.store(begun, Ordering::Relaxed);
        self.lifted.store(lifted, Ordering::Relaxed);
        self.expired.store(expired, Ordering::Relaxed);
        self.undone.store(undone, Ordering::Relaxed);
        self.caller_gone.store(caller_gone, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::AtomicBool,
            mpsc::{RecvTimeoutError, channel},
        },
        thread,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::{
        config::HalfClosed,
        pause::{
            WaitState,
            gate::Mode,
            leases::{Lifetime, Quiet, Terms},
        },
    };

    const DEADLINE: Duration = Duration::from_secs(10);

    fn terms(name: &str, mode: Mode, ttl: Option<Duration>) -> Terms {
        Terms {
            name: name.to_owned(),
            reason: (mode == Mode::Reject).then(|| "a \"reason\"".to_owned()),
            by: "uid 0, pid 1".to_owned(),
            mode,
            ttl,
            quiet: ttl.map(|ttl| match mode {
                Mode::Hold => Quiet::Any(ttl / 7),
                Mode::Reject => Quiet::Postgres(ttl / 9),
            }),
            half_closed: if ttl.is_some() { HalfClosed::Drop } else { HalfClosed::Serve },
        }
    }

    /// Hands the pauses over to fresh ones, whose clock is ahead by `shift`. Returns the taker's words, too.
    fn hand_over(giver: &Pauses, taker: &Pauses, shift: Duration) -> [PausesWords; 2] {
        let begin = Instant::now();
        let words = giver.freeze().describe(&Outgoing::new(begin));
        let text = serde_json::to_string(&words).unwrap();
        let incoming = Incoming::new(begin + shift, Vec::new(), Vec::new());
        taker.restore(&serde_json::from_str(&text).unwrap(), &incoming);
        [words, taker.freeze().describe(&Outgoing::new(begin + shift))]
    }

    #[test]
    fn pauses_are_handed_over_with_all_that_they_need_to_end() {
        let [giver, taker] = [(); 2].map(|()| crate::tests::pauses());
        let minute = Some(Duration::from_secs(60));
        drop(giver.gate.enter());
        giver.fence_at(Some(Duration::MAX));
        giver.put(terms("a", Mode::Hold, minute), Lifetime::Committed, 1).unwrap();
        giver.put(terms("a", Mode::Hold, None), Lifetime::Pending, 2).unwrap();
        giver.put(terms("b", Mode::Reject, minute), Lifetime::ConnectionBound, 3).unwrap();
        giver.put(terms("gone", Mode::Hold, None), Lifetime::ConnectionBound, 4).unwrap();
        giver.close(4);
        for (request_id, end) in [(5, "lifted"), (6, "undone"), (7, "expired")] {
            let ttl = (end == "expired").then_some(Duration::ZERO);
            giver.put(terms(end, Mode::Hold, ttl), Lifetime::Pending, request_id).unwrap();
        }
        giver.put_fleet(terms("fleet/a", Mode::Hold, minute)).unwrap();
        giver.put_fleet(terms("fleet/b", Mode::Hold, minute)).unwrap();
        giver.force(Some("fleet/b"), "a test");
        giver.lift(Some("lifted"), "a test");
        giver.undo(6, "a test says so");
        giver.expire();

        let is_watched = Arc::new(AtomicBool::new(false));
        taker.watch({
            let is_watched = Arc::clone(&is_watched);
            move || is_watched.store(true, Ordering::Relaxed)
        });
        let shift = Duration::from_secs(1_000);
        let [told, again] = hand_over(&giver, &taker, shift);
        assert_eq!(told, again);
        let counts = CountsWords { begun: 8, lifted: 2, expired: 1, undone: 1, caller_gone: 1 };
        assert_eq!((&told.counts, told.idle_moments), (&counts, 1));
        assert!(!is_watched.load(Ordering::Relaxed), "no pause has begun");
        assert_eq!(taker.gate.mode(), Some(Mode::Reject));
        assert_eq!(taker.drain.quiet(), giver.drain.quiet());
        assert!(taker.drain.drops_half_closed());
        assert_eq!(taker.drain.postgres_quiet(), giver.drain.postgres_quiet());
        assert!(taker.drain.postgres_quiet().is_some());
        assert!(taker.drain.quiet().is_some() && taker.idle_moments() == giver.idle_moments());
        let shown = |pauses: &Pauses| pauses.lock().iter().cloned().collect::<Vec<_>>();
        for (given, taken) in shown(&giver).iter().zip(&shown(&taker)) {
            assert_eq!((&given.terms, given.lifetime), (&taken.terms, taken.lifetime));
            assert_eq!(given.since.shown, taken.since.shown);
            assert_eq!(given.ends.map(|end| end + shift), taken.ends, "it moves by nothing");
        }
        assert!(taker.gate.fence().is_some() && taker.gate.fence() == giver.gate.fence());
        assert_eq!(taker.fleet_ledger(), giver.fleet_ledger());
        assert!(taker.fleet_ledger().holding.contains("a"));
        assert!(taker.fleet_ledger().forced.contains("b"));
        taker.lift_fleet("a", "a test");
        // The pending lease is undone, and the hidden one of its name holds again.
        taker.undo(2, "a test says so");
        assert_eq!((taker.wait_state(1), taker.wait_state(2)), (WaitState::Idle, WaitState::Ended));
        taker.close(3);
        assert_eq!(taker.gate.mode(), Some(Mode::Hold));
        assert!(taker.lift(None, "a test") && taker.gate.mode().is_none());
        assert!(giver.gate.is_paused(), "the giver has stayed as it was");
    }

    #[test]
    fn an_open_gate_is_handed_over_open() {
        let [giver, taker] = [(); 2].map(|()| crate::tests::pauses());
        let [told, again] = hand_over(&giver, &taker, Duration::ZERO);
        assert_eq!(told, again);
        assert!(!taker.gate.is_paused() && taker.lock().paused_since().is_none());
    }

    #[test]
    fn a_pause_does_not_expire_before_its_taker_goes_on() {
        let (giver, (taker, notifications)) = (crate::tests::pauses(), crate::tests::new_pauses());
        crate::pause::expiry::start(&taker, notifications).unwrap();
        giver.put(terms("a", Mode::Hold, Some(Duration::ZERO)), Lifetime::Committed, 1).unwrap();
        let words = giver.freeze().describe(&Outgoing::new(Instant::now()));
        let (sender, changes) = channel();
        taker.watch(move || {
            sender.send(()).ok();
        });
        let incoming = Incoming::new(Instant::now(), Vec::new(), Vec::new());
        taker.restore(&words, &incoming);
        // As a worker does that publishes what it has adopted.
        taker.expiry.send(()).unwrap();
        let moment = Duration::from_millis(20);
        assert_eq!(changes.recv_timeout(moment), Err(RecvTimeoutError::Timeout));
        assert!(taker.gate.is_paused());
        taker.go_on();
        changes.recv_timeout(DEADLINE).unwrap();
        assert!(!taker.gate.is_paused());
    }

    #[test]
    fn frozen_pauses_keep_others_waiting() {
        let pauses = crate::tests::pauses();
        let frozen = pauses.freeze();
        let other = thread::Builder::new().spawn({
            let pauses = Arc::clone(&pauses);
            move || pauses.pause()
        });
        let begin = Instant::now();
        let told = frozen.describe(&Outgoing::new(begin));
        assert_eq!(frozen.describe(&Outgoing::new(begin)), told, "describing changes nothing");
        assert!(!pauses.gate.is_paused());
        drop(frozen);
        assert!(other.unwrap().join().unwrap(), "it was open until then");
        assert!(pauses.gate.is_paused());
    }
}

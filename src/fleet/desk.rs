//! `Desk`: the place where the control API leaves its wishes for the thread of a fleet, and reads what has become of them.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::{
    clock::BootTime,
    coordinator::{Coordinator, Phase, WaitingFor, Wanted},
    facade::{Fleets, Refusal},
    table::Table,
    threads::Bell,
};
use crate::pause::WaitState;

/// Longest wait for the commit of a record, which the coordinator gives up a moment earlier.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(6);
/// Time for which the end of a pause is kept for its caller, longer than that one waits.
const ENDED_SHOWN_FOR: Duration = Duration::from_secs(10);
/// Longest wait for the answer of an errand.
const ERRAND_TIMEOUT: Duration = Duration::from_secs(5);

/// Pauses of all hosts that were asked for at this one, and errands.
pub(super) struct Desk {
    cases: Mutex<BTreeMap<u64, Case>>,
    standing: Mutex<Standing>,
    errands: Sender<Errand>,
    bell: Arc<Bell>,
    watchers: Mutex<Vec<Watcher>>,
}

type Watcher = Box<dyn Fn() + Send + Sync>;

/// Standing of this host in the fleet, on which it depends whether it may look after a pause.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// The store has not answered yet.
    #[default]
    Unknown,
    /// It has a session.
    Member,
    /// It has none at present. Whether a pause can begin is for the store to say.
    Alone,
    /// Another host has its name: a pause would not wait for this one.
    Nameless(Refusal),
}

/// Pause that a request has asked for, until it has ended.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) wanted: Wanted,
    /// True if it ends without its caller.
    pub(super) is_bound: bool,
    pub(super) wishes: Wishes,
    pub(super) outcome: Outcome,
    /// True if its caller has ended it. It goes on until the store takes its end.
    pub(super) is_given_up: bool,
    /// Tells the caller that the record is committed, or why not.
    pub(super) begun: Option<Sender<Result<(), Refusal>>>,
}

/// Wishes of a caller that the thread has not taken yet.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Wishes {
    /// Number of orders to reset what is left.
    pub(super) kills: u32,
    pub(super) is_renewed: bool,
    /// Reason for the end.
    pub(super) end: Option<String>,
}

/// State of a pause for its caller.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Outcome {
    /// True if all hosts are idle.
    pub(super) is_idle: bool,
    pub(super) waiting_for: Vec<WaitingFor>,
    /// True while it cannot be proven that the pause holds.
    pub(super) is_lost: bool,
    /// Time from which on it is lost without another proof. Each proof is news to the caller.
    pub(super) lost_at: BootTime,
    /// Hosts that an operator has resumed since all were idle.
    pub(super) forced: Vec<String>,
    /// Time of the end. Until its caller has read of it, `waiting_for` has the hosts that have not resumed.
    pub(super) ended: Option<BootTime>,
}

/// One request to the store, with the way back for its answer.
#[derive(Debug)]
pub(super) enum Errand {
    Table(Sender<Result<Table, Refusal>>),
    Resume { name: String, by: String, answer: Sender<Result<(), Refusal>> },
    Forget { host: String, by: String, answer: Sender<Result<(), Refusal>> },
}

impl Desk {
    /// Returns a desk whose bell wakes the thread, and the errands for it.
    pub(super) fn new(bell: Arc<Bell>) -> (Self, Receiver<Errand>) {
        let (errands, errands_taken) = bounded(1);
        let (cases, standing, watchers) = Default::default();
        (Self { cases, standing, errands, bell, watchers }, errands_taken)
    }

    pub(super) fn standing(&self) -> Standing {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes the standing of this host, and wakes the thread if it has changed.
    pub(super) fn set_standing(&self, standing: Standing) {
        let mut present = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *present, standing);
        let has_changed = before != *present;
        drop(present);
        if has_changed {
            self.bell.wake();
        }
    }

    /// Calls those that watch. Never under the lock of the cases.
    pub(super) fn notify(&self) {
        let watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.iter().for_each(|watcher| watcher());
    }

    pub(super) fn cases(&self) -> MutexGuard<'_, BTreeMap<u64, Case>> {
        self.cases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the caller of a pause what has become of it. Returns the time from which on it is lost, if that is to come.
    pub(super) fn settle(
        &self,
        request_id: u64,
        coordinator: &Coordinator,
        now: BootTime,
    ) -> Option<BootTime> {
        let lost_at = coordinator.lost_at();
        let mut outcome = Outcome { is_lost: now >= lost_at, lost_at, ..Outcome::default() };
        match coordinator.phase() {
            Phase::Asking => return None,
            Phase::Ending => {
                if let Some(case) = self.cases().get_mut(&request_id) {
                    case.outcome.is_lost = outcome.is_lost;
                }
                return None;
            }
            Phase::Refused(refusal) => {
                let case = self.cases().remove(&request_id);
                case?.answer(|name| Err(Refusal::of_pause(name, refusal)));
                return None;
            }
            Phase::Waiting(hosts) => outcome.waiting_for.clone_from(hosts),
            Phase::Idle => {
                outcome.is_idle = true;
                outcome.forced = coordinator.forced().to_vec();
            }
            Phase::Ended { still_paused, .. } => {
                let why = "has not told of its resume";
                let waiting =
                    |host: &String| WaitingFor { host: host.clone(), why: why.to_owned() };
                outcome.waiting_for = still_paused.iter().map(waiting).collect();
                outcome.ended = Some(now);
            }
        }
        let is_held = outcome.ended.is_none() && !outcome.is_lost;
        let mut cases = self.cases();
        let case = cases.get_mut(&request_id)?;
        case.answer(|_name| Ok(()));
        let has_changed = case.outcome != outcome;
        case.outcome = outcome;
        drop(cases);
        if has_changed {
            self.notify();
        }
        is_held.then_some(lost_at)
    }

    /// Forgets the pauses that have ended long enough ago for their callers to have read of it, and those that were given up
    /// before anybody looked after them.
    pub(super) fn forget_ended(&self, now: BootTime, is_new: impl Fn(u64) -> bool) {
        let is_shown = |at: BootTime| now - at < ENDED_SHOWN_FOR;
        self.cases().retain(|&id, case| match case.outcome.ended {
            Some(at) => is_shown(at),
            None => !(case.is_given_up && is_new(id)),
        });
    }

    /// Refuses the pauses that nobody looks after yet.
    pub(super) fn refuse_new(&self, is_new: impl Fn(u64) -> bool, refusal: &Refusal) {
        self.cases().retain(|&id, case| {
            let is_refused = case.outcome.ended.is_none() && is_new(id);
            if is_refused {
                case.answer(|_name| Err(refusal.clone()));
            }
            !is_refused
        });
    }

    /// Counts all pauses as lost, and refuses new ones: nobody looks after them any more.
    pub(super) fn abandon(&self, refusal: &Refusal) {
        for case in self.cases().values_mut() {
            case.answer(|_name| Err(refusal.clone()));
            case.outcome.is_lost = true;
        }
        self.notify();
    }

    /// Changes the case of a request, if it is there, and wakes the thread.
    fn wish(&self, request_id: u64, change: impl FnOnce(&mut Case)) {
        if let Some(case) = self.cases().get_mut(&request_id) {
            change(case);
        }
        self.bell.wake();
    }

    /// Has the thread do an errand.
    fn ask<T>(
        &self,
        errand: impl FnOnce(Sender<Result<T, Refusal>>) -> Errand,
    ) -> Result<T, Refusal> {
        let deadline = Instant::now() + ERRAND_TIMEOUT;
        let (sender, answer) = bounded(1);
        let sent = self.errands.send_deadline(errand(sender), deadline);
        self.bell.wake();
        let answered = sent.ok().and_then(|()| answer.recv_deadline(deadline).ok());
        answered.unwrap_or_else(|| Err(late()))
    }
}

impl Case {
    /// Returns true while the pause is kept, or its end is owed to the other hosts. Without a commit or behind its loss nothing is
    /// owed: what is left in the store ends without this host.
    fn is_looked_after(&self) -> bool {
        let is_owed = self.begun.is_none() && !self.outcome.is_lost;
        self.outcome.ended.is_none() && (!self.is_given_up || is_owed)
    }

    /// Tells the caller once that the record is committed, or why not.
    fn answer(&mut self, result: impl FnOnce(&str) -> Result<(), Refusal>) {
        if let Some(begun) = self.begun.take() {
            // A caller that has gone ends its pause.
            begun.send(result(&self.wanted.name)).ok();
        }
    }
}

/// Refuses for want of an answer in time.
fn late() -> Refusal {
    Refusal::unreachable("etcd has not answered in time; see the log")
}

impl Fleets for Desk {
    fn pause(&self, wanted: Wanted, request_id: u64, is_bound: bool) -> Result<(), Refusal> {
        let (sender, begun) = bounded(1);
        let case = Case {
            wanted,
            is_bound,
            wishes: Wishes::default(),
            outcome: Outcome::default(),
            is_given_up: false,
            begun: Some(sender),
        };
        self.cases().insert(request_id, case);
        self.bell.wake();
        begun.recv_timeout(PAUSE_TIMEOUT).unwrap_or_else(|_late| {
            self.end(request_id, "it was not committed in time");
            Err(late())
        })
    }

    fn wait_state(&self, request_id: u64) -> WaitState {
        match self.cases().get(&request_id) {
            Some(Case { outcome: Outcome { ended: None, is_idle, .. }, .. }) => {
                if *is_idle {
                    WaitState::Idle
                } else {
                    WaitState::Busy
                }
            }
            Some(_) | None => WaitState::Ended,
        }
    }

    fn waiting_for(&self, request_id: u64) -> Vec<WaitingFor> {
        let cases = self.cases();
        cases.get(&request_id).map(|case| case.outcome.waiting_for.clone()).unwrap_or_default()
    }

    fn is_lost(&self, request_id: u64) -> bool {
        self.cases().get(&request_id).is_none_or(|case| case.outcome.is_lost)
    }

    fn kept_until(&self, request_id: u64) -> Option<BootTime> {
        let cases = self.cases();
        let outcome = &cases.get(&request_id)?.outcome;
        (!outcome.is_lost).then_some(outcome.lost_at)
    }

    fn forced(&self, request_id: u64) -> Vec<String> {
        let cases = self.cases();
        cases.get(&request_id).map(|case| case.outcome.forced.clone()).unwrap_or_default()
    }

    fn kill(&self, request_id: u64) {
        self.wish(request_id, |case| case.wishes.kills += 1);
    }

    fn renew(&self, request_id: u64) {
        self.wish(request_id, |case| case.wishes.is_renewed = true);
    }

    fn end(&self, request_id: u64, because: &str) {
        self.wish(request_id, |case| {
            case.is_given_up = true;
            case.wishes.end = Some(because.to_owned());
        });
    }

    fn resume(&self, name: &str, by: &str) -> Result<(), Refusal> {
        let (name, by) = (name.to_owned(), by.to_owned());
        self.ask(|answer| Errand::Resume { name, by, answer })
    }

    fn table(&self) -> Result<Table, Refusal> {
        self.ask(Errand::Table)
    }

    fn forget(&self, host: &str, by: &str) -> Result<(), Refusal> {
        let (host, by) = (host.to_owned(), by.to_owned());
        self.ask(|answer| Errand::Forget { host, by, answer })
    }

    fn coordinating(&self) -> Vec<String> {
        let cases = self.cases();
        let holding = cases.values().filter(|case| case.is_looked_after());
        holding.map(|case| case.wanted.name.clone()).collect()
    }

    fn watch(&self, watcher: Box<dyn Fn() + Send + Sync>) {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner).push(watcher);
    }
}

impl fmt::Debug for Desk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Desk").field("cases", &self.cases).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_that_was_given_up_counts_until_it_is_lost_if_it_was_committed() {
        let desk = Desk::new(Arc::new(Bell::new())).0;
        let (sender, begun) = bounded(1);
        let case = Case {
            wanted: Wanted { name: "db".to_owned(), ..Wanted::default() },
            is_bound: true,
            wishes: Wishes::default(),
            outcome: Outcome::default(),
            is_given_up: false,
            begun: Some(sender),
        };
        desk.cases().insert(1, case);
        assert_eq!(desk.coordinating(), ["db"]);
        // Its caller has waited for a commit in vain.
        desk.end(1, "a test");
        assert_eq!(desk.coordinating(), Vec::<String>::new());
        // The commit was late: its end is owed.
        desk.cases().get_mut(&1).unwrap().answer(|_name| Ok(()));
        assert_eq!((begun.recv(), desk.coordinating()), (Ok(Ok(())), vec!["db".to_owned()]));
        desk.cases().get_mut(&1).unwrap().outcome.is_lost = true;
        assert_eq!(desk.coordinating(), Vec::<String>::new());
        // Nobody has begun to look after it.
        desk.forget_ended(BootTime::default(), |_id| false);
        assert!(desk.cases().contains_key(&1));
        desk.forget_ended(BootTime::default(), |_id| true);
        assert!(desk.cases().is_empty());
    }
}

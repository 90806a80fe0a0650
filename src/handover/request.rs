//! `UpgradeRequests`: the way from a caller that asks for an upgrade to the program, and the outcome on its way back.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

/// Requests for an upgrade. All that come before the outcome of the first wait for that outcome.
#[derive(Default)]
pub(crate) struct UpgradeRequests {
    attempts: Mutex<Attempts>,
    watcher: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// Number of an attempt to upgrade, from 1 upwards. A request that was asked of the process before has [`INHERITED`].
pub(crate) type Attempt = u64;

/// Attempt that has led to this process.
pub(crate) const INHERITED: Attempt = 0;

#[derive(Default)]
struct Attempts {
    /// The way to the program, if it carries upgrades out.
    program: Option<Sender<()>>,
    /// Its end for a program that is about to ask for it.
    unclaimed: Option<Receiver<()>>,
    last: Attempt,
    /// True while the last one has no outcome.
    is_pending: bool,
    /// Reason of the last failure, and the attempt that it ends. Earlier ones have failed, too.
    failure: Option<(Attempt, String)>,
    /// Outcome of the attempt that has led to this process.
    inherited: Option<Result<Upgraded, String>>,
}

/// Outcome of an upgrade that has led to this process, as its callers are told.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Upgraded {
    pub(crate) version: String,
    pub(crate) pid: u32,
    /// Number of connections that were handed over.
    pub(crate) connections: u64,
    /// Time for which no byte was relayed.
    pub(crate) stall_seconds: f64,
}

impl UpgradeRequests {
    /// Returns the way on which the program hears of requests. Only with it an upgrade can be asked for.
    pub(crate) fn receiver(&self) -> Receiver<()> {
        let mut attempts = self.lock();
        if let Some(receiver) = attempts.unclaimed.take() {
            return receiver;
        }
        let (sender, receiver) = bounded(1);
        attempts.program = Some(sender);
        receiver
    }

    /// Keeps requests for a program that is about to ask for their [receiver](Self::receiver): callers of a process that has
    /// taken over do not wait for that.
    pub(crate) fn expect_program(&self) {
        let receiver = self.receiver();
        self.lock().unclaimed = Some(receiver);
    }

    /// Asks the program for an upgrade, unless one is pending. Returns the attempt whose outcome is to be awaited; `None` if
    /// the program hears no requests.
    pub(crate) fn ask(&self) -> Option<Attempt> {
        let mut attempts = self.lock();
        let program = attempts.program.as_ref()?;
        if !attempts.is_pending {
            // A full channel holds a request that the program has not heard yet.
            if let Err(TrySendError::Disconnected(())) = program.try_send(()) {
                return None;
            }
            attempts.is_pending = true;
            attempts.last += 1;
        }
        Some(attempts.last)
    }

    /// Ends the pending attempt: this process goes on, for this reason. A request that the program has not taken out of
    /// `unheard` has this outcome, too. Under the lock, as it must not begin another attempt, and a later one has to.
    pub(crate) fn fail(&self, why: &str, unheard: &Receiver<()>) {
        let mut attempts = self.lock();
        unheard.try_recv().ok();
        attempts.is_pending = false;
        attempts.failure = Some((attempts.last, why.to_owned()));
        drop(attempts);
        self.notify();
    }

    /// Ends the attempt that has led to this process.
    pub(crate) fn end_inherited(&self, outcome: Result<Upgraded, String>) {
        self.lock().inherited = Some(outcome);
        self.notify();
    }

    /// Returns the outcome of an attempt, once it has one.
    pub(crate) fn outcome(&self, attempt: Attempt) -> Option<Result<Upgraded, String>> {
        let attempts = self.lock();
        if attempt == INHERITED {
            return attempts.inherited.clone();
        }
        let failure = attempts.failure.as_ref().filter(|(last, _)| attempt <= *last);
        failure.map(|(_, why)| Err(why.clone()))
    }

    /// Registers the callback for each outcome. Only the first is kept.
    pub(crate) fn watch(&self, watcher: impl Fn() + Send + Sync + 'static) {
        drop(self.watcher.set(Box::new(watcher)));
    }

    fn notify(&self) {
        self.watcher.get().iter().for_each(|watcher| watcher());
    }

    fn lock(&self) -> MutexGuard<'_, Attempts> {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for UpgradeRequests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UpgradeRequests").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_before_an_outcome_share_it_and_later_ones_begin_anew() {
        let requests = UpgradeRequests::default();
        assert_eq!(requests.ask(), None);
        requests.expect_program();
        assert_eq!(requests.ask(), Some(1));
        assert_eq!(requests.receiver().try_recv(), Ok(()));
        let requests = UpgradeRequests::default();
        let program = requests.receiver();
        assert_eq!([requests.ask(), requests.ask()], [Some(1); 2]);
        assert_eq!((program.try_recv(), program.try_recv().is_err()), (Ok(()), true));
        // It is under way now, and still the same one.
        assert_eq!((requests.ask(), program.try_recv().is_err()), (Some(1), true));
        assert_eq!(requests.outcome(1), None);
        requests.fail("first", &program);
        assert_eq!(requests.outcome(1), Some(Err("first".to_owned())));
        assert_eq!((requests.ask(), program.try_recv()), (Some(2), Ok(())));
        assert_eq!(requests.outcome(2), None);
        requests.fail("second", &program);
        for attempt in [1, 2] {
            assert_eq!(requests.outcome(attempt), Some(Err("second".to_owned())));
        }
        drop(program);
        assert_eq!(requests.ask(), None);
    }

    /// The attempt was not asked for by them, but by a signal.
    #[test]
    fn requests_during_an_attempt_have_its_outcome_and_ask_for_no_other() {
        let requests = UpgradeRequests::default();
        let program = requests.receiver();
        assert_eq!(requests.ask(), Some(1));
        requests.fail("by a signal", &program);
        assert_eq!(requests.outcome(1), Some(Err("by a signal".to_owned())));
        assert!(program.is_empty(), "nobody would wait for a further attempt");
        assert_eq!((requests.ask(), program.len()), (Some(2), 1));
        assert_eq!(requests.outcome(2), None);
    }

    #[test]
    fn an_inherited_request_awaits_an_outcome_of_its_own() {
        let requests = UpgradeRequests::default();
        requests.fail("an attempt of this process", &requests.receiver());
        assert_eq!(requests.outcome(INHERITED), None);
        let upgraded =
            Upgraded { version: "1".to_owned(), pid: 2, connections: 3, stall_seconds: 0.004 };
        requests.end_inherited(Ok(upgraded.clone()));
        assert_eq!(requests.outcome(INHERITED), Some(Ok(upgraded)));
        assert_eq!(requests.outcome(1), None);
    }
}

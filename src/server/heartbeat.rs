//! `Heartbeat`: the proof that the threads of a proxy go on.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{control::Notifier, shared::Shared};

/// Proof that the threads of a proxy go on, for a watchdog.
#[derive(Debug)]
pub struct Heartbeat {
    shared: Arc<Shared>,
    front: Option<Arc<Notifier>>,
}

impl Heartbeat {
    pub(super) fn new(shared: &Arc<Shared>, front: Option<Arc<Notifier>>) -> Self {
        Self { shared: Arc::clone(shared), front }
    }

    /// Waits until every worker and the front of the control API has ended a turn, which takes well below a millisecond.
    /// Returns false if `timeout` is over first. Threads that have ended count as going on.
    pub fn wait(&self, timeout: Duration) -> bool {
        let begin = Instant::now();
        let is_front_there =
            |front: &Notifier| front.await_turn(timeout.saturating_sub(begin.elapsed()));
        self.shared.pauses.await_turns(timeout) && self.front.as_deref().is_none_or(is_front_there)
    }
}

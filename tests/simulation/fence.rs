//! The fleet: it moves the deadline of the fence, and its clock, which goes on while the host is suspended; and what must
//! come of it.
//!
//! The clock moves between two calls of the worker only. So all that the worker does until its next call has compared the
//! deadline with the same time.

use std::time::Duration;

use crate::{
    drive::{Course, Stage},
    random::Random,
};

/// The calls from the comparison to the dial: of looking at the client, of dialling and of registering.
const CALLS_TO_DIAL: u64 = 3;

/// The plans of the fleet, and the fence as it should be.
#[derive(Debug)]
pub(crate) struct Fleet {
    /// Drawn from numbers of its own, so that schedules without a fleet stay what they are.
    random: Random,
    acts: bool,
    deadline: Option<Duration>,
    /// The number of calls so far, and that at which the deadline has come.
    calls: u64,
    came: Option<u64>,
}

impl Fleet {
    pub(crate) fn new(seed: u64) -> Self {
        let random = Random::new(seed ^ 0xf1ee7);
        Self { random, acts: seed % 8 == 5, deadline: None, calls: 0, came: None }
    }

    pub(crate) fn has_come(&self) -> bool {
        self.came.is_some()
    }

    fn look_at_clock(&mut self) {
        let has_come = self.deadline.is_some_and(|at| crate::with(|kernel| kernel.boot) >= at);
        self.came = has_come.then(|| self.came.unwrap_or(self.calls));
    }
}

impl Course {
    /// Returns whether a dial of the turn that began at `turn` is one behind a pause, or behind a deadline that it must have
    /// compared.
    pub(crate) fn was_closed_before(&self, turn: Duration) -> bool {
        let was_paused = self.operator.paused.is_some_and(|since| since < turn);
        was_paused || self.fleet.came.is_some_and(|came| self.fleet.calls - came > CALLS_TO_DIAL)
    }

    /// The fleet acts at any moment, also between two calls of the worker.
    pub(crate) fn fleet_acts(&mut self) {
        self.fleet.calls += 1;
        if !self.fleet.acts || !matches!(self.stage, Stage::Chaos(_)) {
            return;
        }
        let random = &mut self.fleet.random;
        let time = Duration::from_millis(random.one_of([0, 1, 10, 10_000]));
        match random.below(60) {
            0..3 => {
                self.look_at_gate();
                crate::with(|kernel| kernel.boot += time);
                self.fleet.look_at_clock();
                self.look_at_gate();
            }
            3 => self.fence_at(Some(crate::with(|kernel| kernel.boot) + time)),
            4 => self.fence_at(None),
            _ => {}
        }
    }

    pub(crate) fn fence_at(&mut self, deadline: Option<Duration>) {
        self.look_at_gate();
        let gate = &self.shared.pauses.gate;
        let was_down = gate.fence() == Some(Duration::ZERO);
        crate::with(|kernel| kernel.tally.fences += u64::from(was_down));
        self.shared.pauses.fence_at(deadline);
        (self.fleet.deadline, self.fleet.came) = (deadline, None);
        self.fleet.look_at_clock();
        if was_down && !self.shared.pauses.gate.is_paused() {
            self.must_wake();
            self.gate_opens();
        } else if !self.shared.pauses.gate.is_paused() {
            self.operator.passes = None;
        }
        self.look_at_gate();
    }
}

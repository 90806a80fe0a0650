//! The operator: pauses, resumes, and what else may be asked for during a pause; and what must come of it.

use std::{sync::Arc, time::Duration};

use crossbeam_channel::{Receiver, TryRecvError};

use crate::{
    config::HalfClosed,
    drive::{Course, QUIET_MAX},
    kernel::LinkId,
    link::{Link, Side},
    listing::{ConnectionState, Filter, KillMode, Purpose, Selected, Selection},
    pause::{
        gate::Mode,
        leases::{Lifetime, NAME_DEFAULT, PROGRAM, Quiet, Terms},
    },
    random::Random,
    sys,
};

/// The plans of the operator.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Operator {
    pub(crate) acts: bool,
    kills: bool,
    drains: bool,
    /// True if it ends single connections, too.
    ends: bool,
    /// The result of such an order, once it is there.
    result: Option<Receiver<Selected>>,
    /// True if some were ordered to be closed in order, even without a pause.
    pub(crate) has_ordered_closes: bool,
    /// True if some may be ended, as of the next turn.
    has_ordered_ends: bool,
    drops: bool,
    /// One call in so many finds the operator acting.
    restlessness: usize,
    /// The passes at the last look during this pause.
    pub(crate) passes: Option<u64>,
    /// The clients that may still be let through, and the arrival of the last of those.
    pub(crate) permits: u64,
    horizon: Duration,
    /// The beginning of the pause, if there is one.
    pub(crate) paused: Option<Duration>,
    /// The mode of a pause that has begun while all that waited did so for an upstream that is away.
    pub(crate) pause_in_outage: Option<Mode>,
    /// The end of the last pause.
    pub(crate) resumed: Duration,
    /// True if all are to be reset, as of the next turn.
    has_ordered_resets: bool,
}

impl Operator {
    pub(crate) fn new(random: &mut Random) -> Self {
        Self {
            acts: random.below(2) == 0,
            kills: random.below(2) == 0,
            drains: random.below(3) == 0,
            ends: random.below(4) == 0,
            result: None,
            has_ordered_closes: false,
            has_ordered_ends: false,
            drops: random.below(3) == 0,
            restlessness: random.one_of([64, 64, 1000]),
            passes: None,
            permits: 0,
            horizon: Duration::ZERO,
            paused: None,
            pause_in_outage: None,
            resumed: Duration::ZERO,
            has_ordered_resets: false,
        }
    }

    /// Returns whether the result of an order is still to come. Nothing is handed over before.
    pub(crate) fn awaits_result(&mut self) -> bool {
        let result = self.result.as_ref().map(Receiver::try_recv);
        let awaits = matches!(result, Some(Err(TryRecvError::Empty)));
        self.result = self.result.take().filter(|_| awaits);
        awaits
    }
}

impl Course {
    /// The operator acts at any moment, also between two calls of the worker.
    pub(crate) fn operate_in_between(&mut self) {
        self.fleet_acts();
        let chance = self.operator.restlessness;
        if crate::with(|kernel| kernel.weather.interleaves && kernel.random.below(chance) == 0) {
            self.operate();
        }
        if crate::with(|kernel| kernel.weather.interleaves && kernel.random.below(64) == 0) {
            self.rival_acts();
        }
        if self.rules.switches
            && crate::with(|kernel| kernel.weather.interleaves && kernel.random.below(100) == 0)
        {
            self.switch();
        }
        self.look_at_gate();
    }

    pub(crate) fn operate(&mut self) {
        if !self.operator.acts {
            return;
        }
        // A moment that is rare.
        let is_tempted = crate::with(|kernel| {
            kernel.links.iter().any(Link::is_unregistered) && kernel.random.below(4) == 0
        });
        if self.operator.kills && is_tempted {
            self.kill();
        }
        match crate::with(|kernel| kernel.random.below(80)) {
            0..36 => {
                let drains =
                    self.operator.drains && crate::with(|kernel| kernel.random.below(2)) == 0;
                self.pause(drains);
            }
            36..64 => self.resume(),
            64..68 if self.operator.ends => self.end_some(),
            64..72 => self.bypass(),
            72..76 if self.operator.kills => self.kill(),
            76..78 => {
                self.may_cut(self.grace_period < QUIET_MAX);
                crate::with(|kernel| kernel.is_stopping = true);
                self.shared.stop();
            }
            78..80 => {
                self.may_cut(true);
                self.shared.abort();
            }
            _ => {}
        }
    }

    /// Pauses; the handle would wait for the turn that this happens in.
    pub(crate) fn pause(&mut self, drains: bool) {
        let (mode, quiet, half_closed) = crate::with(|kernel| {
            let rejects = self.rules.rejects && kernel.random.below(4) > 0;
            let quiet = Duration::from_millis(kernel.random.one_of([1, 30, 200]));
            let mode = if rejects { Mode::Reject } else { Mode::Hold };
            let drops = self.operator.drops && kernel.random.below(3) > 0;
            let half_closed = if drops { HalfClosed::Drop } else { HalfClosed::Serve };
            (mode, drains.then_some(quiet), half_closed)
        });
        let terms = Terms {
            name: NAME_DEFAULT.to_owned(),
            reason: None,
            by: String::new(),
            mode,
            ttl: None,
            quiet: quiet.map(Quiet::Any),
            half_closed,
        };
        self.away_since = None;
        if self.rests_in_outage && self.operator.paused.is_none() {
            self.operator.pause_in_outage = Some(mode);
        }
        // As soon as some may have been held, they stay so.
        if self.operator.pause_in_outage.is_some() && mode == Mode::Hold {
            self.operator.pause_in_outage = Some(mode);
        }
        self.shared.pauses.begin(terms, Lifetime::Committed, PROGRAM).expect("there is room");
        self.must_wake();
        crate::with(|kernel| {
            self.operator.paused.get_or_insert(kernel.now);
            kernel.was_paused = true;
            kernel.may_drop |= half_closed == HalfClosed::Drop;
            kernel.probe = None;
            kernel.may_drain = kernel.may_drain.into_iter().chain(quiet).min();
        });
        // Whoever enters from now on is let through.
        self.look_at_gate();
    }

    pub(crate) fn resume(&mut self) {
        self.shared.pauses.lift(None, "the program");
        self.gate_opens();
        // It may still be closed, by the fence.
        self.look_at_gate();
    }

    /// Nothing closes the gate any more.
    pub(crate) fn gate_opens(&mut self) {
        (self.operator.passes, self.operator.permits, self.operator.paused) = (None, 0, None);
        self.operator.pause_in_outage = None;
        crate::with(|kernel| {
            self.operator.resumed = kernel.now;
            kernel.links.iter_mut().for_each(|link| link.story.has_hold_permit = false);
        });
    }

    /// Some of those who are held are let through.
    fn bypass(&mut self) {
        let count = crate::with(|kernel| 1 + kernel.random.below(3)) as u64;
        if let Some(count) = self.shared.pauses.release(count, "") {
            self.operator.permits += count;
            self.operator.horizon = crate::with(|kernel| kernel.now);
            self.must_wake();
        }
    }

    /// All who are served are reset.
    fn kill(&mut self) {
        self.shared.pauses.kill("");
        self.must_wake();
        self.operator.has_ordered_resets = true;
        crate::with(|kernel| {
            kernel.may_kill = true;
            for link in kernel.links.iter_mut().filter(|link| link.side == Side::Client) {
                link.story.is_condemned |= link.token.is_some() && link.partner.is_some();
            }
        });
    }

    /// Some are ended, in whatever state, at once or within a while.
    fn end_some(&mut self) {
        if self.operator.awaits_result() {
            return;
        }
        let (state, how, millis) = crate::with(|kernel| {
            let states = ConnectionState::ALL.map(|(_word, state)| Some(state));
            let state =
                kernel.random.one_of([None, None, states[0], states[1], states[2], states[3]]);
            let how = kernel.random.one_of([KillMode::Reset, KillMode::Close]);
            (state, how, kernel.random.one_of([0, 0, 1, 50]))
        });
        let (begun, spread) = (sys::now(), Duration::from_millis(millis));
        let filter = Filter { state, ..Filter::default() };
        let purpose = Purpose::Kill { how, spread };
        let until = begun + Duration::from_secs(24 * 60 * 60);
        let selection = Arc::new(Selection { filter, purpose, begun, until });
        // The mailbox may be full of clients.
        let Some((asked, result)) = self.shared.workers.begin_selection(&selection) else { return };
        assert_eq!(asked, 1, "the others have no connections");
        self.must_wake();
        self.operator.result = Some(result);
        self.operator.has_ordered_ends = true;
        self.operator.has_ordered_closes |= how == KillMode::Close;
        let is_strict = state.is_none() && how == KillMode::Reset && spread.is_zero();
        crate::with(|kernel| {
            kernel.may_end = true;
            for link in kernel.links.iter_mut().filter(|link| link.side == Side::Client) {
                link.story.may_be_ended |= link.is_open;
                link.story.is_condemned |= is_strict && link.token.is_some();
            }
        });
    }

    pub(crate) fn may_cut(&mut self, may: bool) {
        self.was_cut |= may;
        crate::with(|kernel| kernel.may_cut |= may);
    }

    /// While it is paused, or the deadline of the fence has come, nobody enters but those who are let through.
    pub(crate) fn look_at_gate(&mut self) {
        let is_paused = self.shared.pauses.gate.is_paused();
        if is_paused && self.operator.paused.is_none() {
            // The worker has noticed that the deadline has come.
            assert!(self.fleet.has_come(), "it is paused by nobody");
            self.away_since = None;
            crate::with(|kernel| {
                self.operator.paused = Some(kernel.now);
                kernel.was_paused = true;
                kernel.probe = None;
            });
        }
        if is_paused || self.fleet.has_come() {
            let passes = self.shared.pauses.gate.passes();
            let entered = self.operator.passes.map_or(0, |before| passes.saturating_sub(before));
            assert!(entered <= self.operator.permits, "a client enters a closed gate");
            self.operator.permits -= entered;
            self.operator.passes = Some(passes);
        }
    }

    /// The same when a client is asked for that may have just entered.
    pub(crate) fn look_at_entrant(&mut self, id: LinkId) {
        let before = self.operator.permits;
        self.look_at_gate();
        if self.operator.permits < before {
            crate::with(|kernel| {
                let story = &mut kernel.link_mut(id).story;
                (story.has_hold_permit, story.was_let_through) = (false, true);
                let is_early = story.came.is_some_and(|came| came <= self.operator.horizon);
                assert!(is_early, "one is let through that came behind the order");
            });
        }
    }

    /// A turn begins: what was ordered before it is obeyed in it.
    pub(crate) fn orders_come(&mut self) {
        let quiet =
            self.shared.pauses.drain.quiet().filter(|_| self.shared.pauses.gate.is_paused());
        crate::with(|kernel| {
            kernel.may_drain = quiet;
            kernel.was_paused = self.shared.pauses.gate.is_paused();
            kernel.may_drop = self.shared.pauses.drain.drops_half_closed();
            kernel.may_kill = std::mem::take(&mut self.operator.has_ordered_resets);
            kernel.may_end = std::mem::take(&mut self.operator.has_ordered_ends);
            for link in &mut kernel.links {
                link.story.is_doomed = std::mem::take(&mut link.story.is_condemned);
            }
        });
    }

    /// Checks that of the waiting clients that have ended their stream, none is left that is to be dropped, and that the others
    /// are probed. Clients to be rejected wait too, and are neither.
    pub(crate) fn look_at_half_closed(&self) {
        let drops = self.shared.pauses.drain.drops_half_closed();
        crate::with(|kernel| {
            let looks = !kernel.is_cut_short && !self.rules.may_turn_away();
            let known = |link: &&Link| looks && link.is_ended && !link.has_edge;
            for link in kernel.waiting().filter(known) {
                assert!(!drops, "a half-closed client is held: {link:#?}");
                assert!(link.is_probed || link.is_unix, "it may have gone unnoticed: {link:#?}");
            }
        });
    }

    pub(crate) fn must_wake(&self) {
        assert!(crate::with(|kernel| kernel.is_woken), "an order is told to nobody");
    }
}

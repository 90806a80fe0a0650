//! The rules for the pace of a crowd: a SYN that is lost is noticed, and no other is taken for it; a loss halves the
//! window, and each that gets through widens it.

use std::time::Duration;

use crate::{
    drive::{Course, with_course},
    kernel::{Kernel, LinkId, SYN_INTERVAL},
    link::{Link, Side},
    patience::{Rules, Story},
};

/// Clients that may be under way at first.
const WINDOW_INITIAL: usize = 4;
/// For how long the window stays as it is without news, at least.
const IDLE_MIN: Duration = Duration::from_millis(500);
/// The least time for which a SYN may be without an answer, and the interval between two looks at that.
const SYN_TIMEOUT_MIN: Duration = Duration::from_millis(20);
/// From which time on it is the kernel's business.
const SYN_TIMEOUT_MAX: Duration = Duration::from_millis(300);
/// Round trips that an answer may take.
const ROUND_TRIPS_MAX: u32 = 4;

/// The worker's knowledge of the upstream.
#[derive(Debug, Default)]
pub(crate) struct Crowd {
    /// The time for which a SYN may be without an answer, if that is sure.
    syn_timeout: Option<Duration>,
    /// The beginning of the turn in which that was learnt.
    asked: Duration,
    /// The width of the window when the turn began.
    window: usize,
    /// The beginning of the turn in which it was last halved.
    halved: Duration,
    /// The least width that it has, unless something was lost.
    window_min: usize,
    was_lost: bool,
    /// The most clients that were under way.
    used: usize,
    /// The time at which one has got through.
    told: Duration,
    /// True if a dial has had its time in this turn, and its client, too.
    timed_out: bool,
    /// Those that were lost in this turn: when they were dialled, and whether they are of a crowd for sure.
    lost: Vec<(Duration, bool)>,
}

/// The worker's knowledge of one client of a crowd.
#[derive(Debug, Default)]
pub(crate) struct Way {
    /// The time for which its SYN may be without an answer, if that is sure.
    patience: Option<Duration>,
    /// True if its dial is, and is known to be.
    is_over: bool,
    is_through: bool,
    /// The most clients that were under way when it may have got through.
    used: Option<usize>,
}

impl Course {
    /// A turn begins.
    pub(crate) fn crowd_is_shown(&self) {
        let window = self.shared.admission.queue.under_way().max();
        crate::with(|kernel| kernel.crowd.window = window);
    }

    /// A turn has ended; then the worker may go to sleep.
    pub(crate) fn look_at_crowd(&self, sleeps: bool) {
        let window = self.shared.admission.queue.under_way().max();
        let is_away = self.shared.upstream.breaker().is_open();
        crate::with(|kernel| {
            assert!((1..=self.rules.max_connecting).contains(&window), "a window of {window}");
            let timed_out = std::mem::take(&mut kernel.crowd.timed_out);
            let is_sure = self.rules.is_simple() && !kernel.was_paused;
            assert!(!timed_out || !is_sure || is_away, "a dial had its time, and all go on");
            kernel.look_at_losses(window);
            kernel.note_use();
            if sleeps && !kernel.is_cut_short {
                kernel.look_at_those_through(window);
            }
        });
    }
}

impl Rules {
    /// Returns whether a dial that takes time shows what the only address is like, and nothing else.
    pub(crate) fn is_simple(&self) -> bool {
        self.sites == 1 && !self.may_be_short()
    }
}

impl Link {
    /// Returns whether its dial has come to an end in this turn.
    fn has_just_been_dialled(&self) -> bool {
        self.side == Side::Upstream && (self.is_known || !self.is_open) && !self.story.way.is_over
    }
}

impl Crowd {
    /// The dial of an upstream may have come to an end in this turn, or its SYN been repeated.
    fn looks_after(
        &mut self,
        link: &mut Link,
        now: Duration,
        turn_began: Duration,
        began: Duration,
    ) {
        if link.story.way.is_over {
            return;
        }
        link.story.way.is_over = link.is_known || !link.is_open;
        let taken = link.round_trip(now);
        if taken >= SYN_INTERVAL {
            // It is not sure whether the worker knows, and since when.
            (self.was_lost, self.halved, self.syn_timeout) = (true, turn_began, None);
        } else if link.is_known {
            // Whoever has no place asks nothing, nor does one that is closed at once; of several it is not sure who asked last.
            let timeout = (ROUND_TRIPS_MAX * taken).max(SYN_TIMEOUT_MIN);
            // What was told to the process before may have been learnt by that one.
            let is_told = link.story.known >= began;
            let asks =
                link.story.is_of_crowd && link.is_open && is_told && self.asked != turn_began;
            self.syn_timeout = asks.then_some(timeout);
            self.asked = turn_began;
        }
    }

    /// One of a crowd is lost that was dialled in that turn. Returns whether that is news.
    fn loses(&mut self, dialled: Duration, turn_began: Duration) -> bool {
        self.was_lost = true;
        let is_news = self.halved < dialled;
        if is_news {
            self.halved = turn_began;
            self.syn_timeout = self.syn_timeout.map(|timeout| 2 * timeout);
        }
        is_news
    }
}

impl Kernel {
    /// A new process knows nothing of the upstream's addresses, and attempts from before do not teach it any. The pace goes on
    /// within the bound of its `rules`.
    pub(crate) fn forget_upstream(&mut self, rules: Rules) {
        // A window that a narrow bound has cut stays as after a loss.
        self.crowd.was_lost |= self.rules.max_connecting < WINDOW_INITIAL;
        self.crowd.window_min = self.crowd.window_min.min(rules.max_connecting);
        self.rules = rules;
        (self.probe, self.missed) = (None, self.now);
        let now = self.now;
        for link in &mut self.links {
            link.story.attempt_probes = false;
            // A SYN that was repeated is a loss to it, too.
            link.story.way.is_over &= link.round_trip(now) < SYN_INTERVAL;
        }
    }

    /// One that has waited is dialled for.
    pub(crate) fn crowd_goes(&mut self, id: LinkId) {
        let count = self.under_way(true);
        let crowd = &mut self.crowd;
        crowd.used = crowd.used.max(count);
        let patience = crowd.syn_timeout.filter(|&timeout| timeout < SYN_TIMEOUT_MAX);
        // What has just come to its end may have changed that.
        let is_sure = !self.links.iter().any(Link::has_just_been_dialled);
        self.links[id].story.way.patience = patience.filter(|_| is_sure);
    }

    /// A dial has ended without an answer, as far as the worker knows, and its client goes on.
    pub(crate) fn is_given_up(&mut self, id: LinkId, is_answered: bool) {
        let link = &self.links[id];
        let age = self.turn_began.saturating_sub(link.story.dialled);
        if !self.rules.is_simple() || link.is_unix || age >= self.rules.connect_timeout {
            return;
        }
        assert!(!is_answered, "one that is answered is taken to be lost: {link:#?}");
        let patience = link.story.way.patience.unwrap_or(SYN_TIMEOUT_MIN);
        assert!(age >= patience, "a SYN is taken to be lost too soon: {link:#?}");
        let since = with_course(|course| course.operator.paused);
        let is_paused = since.is_some_and(|since| since < self.turn_began);
        assert!(!is_paused, "one that was let through loses its turn: {link:#?}");
        self.crowd.lost.push((link.story.dialled, link.story.is_of_crowd));
    }

    /// A client is given up whose dial began in that turn.
    pub(crate) fn has_timed_out(&mut self, dialled: Duration) {
        self.crowd.timed_out |= self.turn_began >= dialled + self.rules.connect_timeout;
    }

    /// Asserts that a loss in this turn, or late room, has halved the window; clients that stay are not lost.
    fn look_at_losses(&mut self, window: usize) {
        let turn_began = self.turn_began;
        let is_sure = self.rules.is_simple() && !self.was_paused;
        let mut halves = false;
        let is_learnt = |link: &Link| !self.is_cut_short || link.story.learnt < turn_began;
        let upstreams = self.links.iter_mut().filter(|link| link.side == Side::Upstream);
        for link in upstreams.filter(|link| !link.is_open || is_learnt(link)) {
            self.crowd.looks_after(link, self.now, turn_began, self.processes.began);
        }
        // Deadlines come last in a turn.
        for (dialled, is_of_crowd) in std::mem::take(&mut self.crowd.lost) {
            halves |= self.crowd.loses(dialled, turn_began) && is_of_crowd;
        }
        let may_grow = |link: &&Link| link.is_carried() && !link.story.way.is_through;
        let may_grow = self.links.iter().filter(may_grow).count();
        let half = (self.crowd.window / 2).max(1);
        assert!(!halves || window <= half + may_grow, "a loss leaves a window of {window}");
        for link in self.links.iter_mut().filter(|link| link.dials.is_some() && link.is_open) {
            // During a pause it is left to the kernel.
            let patience = link.story.way.patience.filter(|_| is_sure);
            link.story.way.patience = patience;
            let until = patience.map(|it| link.story.dialled + it + SYN_TIMEOUT_MIN);
            let is_noticed = until.is_none_or(|until| turn_began < until) || self.is_cut_short;
            assert!(is_noticed, "a SYN is lost, and nobody notices: {link:#?}");
        }
    }

    /// Notes the use of the window for each client that may have got through in this turn. Later dials do not count for it.
    fn note_use(&mut self) {
        for id in 0..self.links.len() {
            let link = &self.links[id];
            let client = link.partner.filter(|_| link.is_carried()).map(|id| &self.links[id]);
            if client.is_some_and(|client| !self.is_unheard(link, client, false)) {
                self.links[id].story.way.used.get_or_insert(self.crowd.used);
            }
        }
    }

    /// Whoever has got through has widened the window.
    fn look_at_those_through(&mut self, window: usize) {
        if self.turn_began >= self.crowd.told + IDLE_MIN {
            (self.crowd.window_min, self.crowd.used) = (WINDOW_INITIAL, 0);
        }
        for id in 0..self.links.len() {
            let link = &self.links[id];
            let Some(client) = link.partner.filter(|_| link.is_carried()) else { continue };
            let client = &self.links[client];
            let is_whole = |link: &Link| !link.is_dead && link.error.is_none() && !link.was_hurt;
            let is_through = link.story.is_of_crowd
                && !link.story.way.is_through
                && !link.is_unix
                && is_whole(link)
                && is_whole(client)
                && !self.is_unheard(link, client, true);
            if is_through {
                self.links[id].story.way.is_through = true;
                let crowd = &mut self.crowd;
                crowd.told = self.turn_began;
                // One that the process before has dialled widens only a window that is in use.
                let Story { dialled, way, .. } = &self.links[id].story;
                let is_own = *dialled >= self.processes.began;
                let used = crowd.used.min(way.used.unwrap_or(crowd.used));
                if is_own && crowd.window_min < self.rules.max_connecting.min(2 * used) {
                    crowd.window_min += 1;
                }
            }
        }
        let crowd = &self.crowd;
        let may_lose = crowd.was_lost || !self.rules.is_simple();
        let least = crowd.window_min.min(self.rules.max_connecting);
        assert!(may_lose || window >= least, "a window of {window}, {least} at least");
    }
}

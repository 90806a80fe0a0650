//! Addresses that swallow every dial, before one that answers: what must hold for those who are dialled for.

use std::time::Duration;

use crate::{
    drive::Course,
    kernel::{Kernel, LinkId, Site},
    link::{Link, Side},
};

/// The time for which an address before the one that was reached is left alone.
const EXPLORE_INTERVAL: Duration = Duration::from_secs(10);

/// The last dial of those that try an upstream that is away.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Probe {
    client: LinkId,
    /// The beginning of its attempt.
    attempt: Duration,
    site: usize,
}

impl Kernel {
    /// An upstream is registered for a client.
    pub(crate) fn look_at_route(&mut self, id: LinkId, client: LinkId, course: &Course) {
        let Some(site) = self.links[id].dials.filter(|_| self.rules.dead > 0) else {
            // Its answer has come before the socket was watched, and the address is not known here.
            self.probe = None;
            return;
        };
        let now = self.turn_began;
        let is_paused = course.shared.pauses.gate.is_paused() || self.was_paused;
        let is_away = course.shared.upstream.breaker().is_open() && !is_paused;
        let story = &mut self.links[client].story;
        // An attempt that goes on has given up another address just now.
        if story.left < now {
            (story.attempt, story.attempt_probes) = (now, is_away);
        }
        let (attempt, probes) = (story.attempt, story.attempt_probes);
        if self.sites[site] == Site::Silent {
            let carried = self.links.iter().filter(|link| link.side == Side::Upstream);
            let carried = carried.filter(|link| link.read + link.written > 0);
            // An attempt of the process before does not tell this one.
            let client = |link: &Link| link.partner.map(|client| self.links[client].story.attempt);
            let carried = carried.filter(|link| client(link) >= Some(self.processes.began));
            let carried = carried.filter(|link| link.story.known > self.missed);
            let reached = carried.map(|link| link.story.learnt).min();
            let moment = Duration::from_millis(1);
            let may_explore = |at| now + moment >= at + EXPLORE_INTERVAL;
            // Attempts of the turn that learns of it come first.
            let is_right = reached.is_none_or(|at| attempt <= at + moment || may_explore(at));
            assert!(is_right, "what was reached is forgotten");
        }
        if !is_away || probes {
            let last = self.probe.take();
            let last = last.filter(|last| is_away && self.links[last.client].peer_stays());
            // An attempt that began in an earlier outage leaves the start where another has got through.
            let last = last.filter(|last| !self.has_reached_one_since(last.attempt));
            let next = |last: usize| (last + 1) % self.sites.len();
            let goes_on = last.is_none_or(|last| site == last.site || site == next(last.site));
            assert!(goes_on, "the next attempt does not go on: {site}, {last:?}");
            self.probe = is_away.then_some(Probe { client, attempt, site });
        }
    }

    /// Returns true if the worker has learnt since `at` that an address has answered.
    pub(crate) fn has_reached_one_since(&self, at: Duration) -> bool {
        let has_answered = |link: &Link| link.is_connected && link.is_known;
        let mut upstreams = self.links.iter().filter(|link| link.side == Side::Upstream);
        upstreams.any(|link| has_answered(link) && link.story.learnt >= at)
    }

    /// A socket is closed; its dial may have been given up.
    pub(crate) fn may_have_missed(&mut self, id: LinkId) {
        let link = &self.links[id];
        let answers = link.dials.is_none_or(|site| self.sites[site] == Site::Up);
        if link.side == Side::Upstream && !link.is_known && answers {
            self.missed = self.now;
        }
    }
}

//! Who of a worker's clients that wait is served next: those held, those whose dial has failed, those let through.

use std::time::Instant;

use super::Worker;
use super::timers::Key;
use crate::connection::{ConnectTicket, deadline::Deadline};

/// How many clients are released in one turn after a resume.
const TURN_RELEASES_MAX: usize = 64;

impl Worker<'_> {
    /// When the first of those came that wait to be served.
    pub(super) fn first(&self) -> Option<Instant> {
        let firsts = [self.first_to_release(), self.queues.first(Deadline::AwaitingUpstream)];
        firsts.into_iter().flatten().map(|(_slot, since)| since).min()
    }

    /// Whether a client whose dial has failed may try again, as another has got through since; or is to be held.
    pub(super) fn can_redial(&self, now: Instant) -> bool {
        let first = |queue| Some(self.queues.first(queue)?.1);
        let (short, away) = (first(Deadline::RetryConnect), first(Deadline::AwaitingUpstream));
        if self.resources.shared.pauses.gate.is_paused() {
            return short.or(away).is_some();
        }
        let short = short.filter(|_| !self.dialer.is_short());
        let away = away.filter(|_| !self.resources.shared.upstream.outage().is_on());
        // Whoever is short of something has had its turn.
        short.map_or_else(|| away.is_some_and(|at| self.has_way(at, now)), |_| self.has_room(now))
    }

    /// Dials again for clients whose dial has failed, oldest first, until one fails. While paused they are held.
    pub(super) fn redial(&mut self, now: Instant) {
        self.probe(now);
        for _client in 0..TURN_RELEASES_MAX {
            if !self.can_redial(now) {
                return;
            }
            let turn = if self.resources.shared.pauses.gate.is_paused() {
                ConnectTicket::Its
            } else if let Some(place) = self.resources.shared.admission.queue.try_acquire(now) {
                ConnectTicket::Place(place)
            } else {
                return;
            };
            let is_short = self.dialer.is_short() && !self.resources.shared.pauses.gate.is_paused();
            let short = if is_short { None } else { self.queues.first(Deadline::RetryConnect) };
            let Some((slot, _since)) =
                short.or_else(|| self.queues.first(Deadline::AwaitingUpstream))
            else {
                return;
            };
            self.act(slot, now, |connection, context| connection.redial(turn, context));
        }
    }

    /// When this worker is to try an upstream that is away: its first client is the first of all.
    pub(super) fn probe_at(&self) -> Option<Instant> {
        let (_slot, since) = self.queues.first(Deadline::AwaitingUpstream)?;
        let shared = &self.resources.shared;
        // Those who find something of this host's short try by themselves, and all others would find the same.
        let may_try =
            !shared.pauses.gate.is_paused() && self.queues.len(Deadline::RetryConnect) == 0;
        let is_its = may_try && shared.admission.queue.is_head(self.resources.index, since);
        if is_its { shared.upstream.outage().probe_at() } else { None }
    }

    /// Has the client that has waited longest try an upstream that is away, if it is time.
    fn probe(&mut self, now: Instant) {
        if self.probe_at().is_some_and(|at| at <= now)
            && let Some((slot, _since)) = self.queues.first(Deadline::AwaitingUpstream)
            && let Some(right) = self.resources.shared.upstream.outage().take_probe()
        {
            let turn = ConnectTicket::Probe {
                _right: right,
                place: self.resources.shared.admission.queue.pace().take(now),
            };
            self.act(slot, now, |connection, context| connection.redial(turn, context));
        }
    }

    /// Whether a client that waits can be served now: not while those before it find something of this host's short.
    pub(super) fn can_release(&self, now: Instant) -> bool {
        let shared = &self.resources.shared;
        if self.queues.len(Deadline::RetryConnect) > 0 {
            return false;
        }
        match (self.first_to_release(), shared.pauses.gate.mode()) {
            (None, _) => false,
            (Some((_slot, _at)), None) if shared.upstream.outage().is_on() => true,
            (Some((_slot, at)), None) => self.has_way(at, now),
            (Some((_slot, at)), Some(_)) => {
                shared.admission.queue.lets_bypass(at) && self.has_way(at, now)
            }
        }
    }

    /// Who is served next of those that are held, or are to be rejected and were not touched yet.
    fn first_to_release(&self) -> Option<(Key, Instant)> {
        let first = |queue| self.queues.first(queue);
        let untouched = || first(Deadline::AwaitingHandshake).or_else(|| first(Deadline::Sniffing));
        let is_open = !self.resources.shared.pauses.gate.is_paused();
        first(Deadline::Held).or_else(|| if is_open { untouched() } else { None })
    }

    /// Serves clients that were held, oldest first, or are to be rejected and were not touched yet. If the upstream is away,
    /// they wait for it instead.
    pub(super) fn release(&mut self, now: Instant) {
        for _client in 0..TURN_RELEASES_MAX {
            if !self.can_release(now) {
                return;
            }
            let Some((slot, since)) = self.first_to_release() else { return };
            let shared = &self.resources.shared;
            let turn = if shared.upstream.outage().is_on() {
                ConnectTicket::Its
            } else if let Some(place) = shared.admission.queue.try_acquire(now) {
                ConnectTicket::Place(place)
            } else {
                return;
            };
            let pass = match shared.pauses.gate.enter() {
                Some(pass) => pass,
                None if shared.admission.queue.take_bypass(since) => {
                    shared.pauses.gate.enter_bypassing()
                }
                None => return,
            };
            self.act(slot, now, |connection, context| connection.serve(pass, turn, since, context));
        }
    }

    /// Whether another of a crowd may be dialled for that came at `at`.
    fn has_way(&self, at: Instant, now: Instant) -> bool {
        self.resources.shared.admission.queue.is_head(self.resources.index, at)
            && self.has_room(now)
    }

    /// Whether another of a crowd may be dialled for.
    fn has_room(&self, now: Instant) -> bool {
        let line = &self.resources.shared.admission.queue;
        line.next_at().is_none_or(|next| next <= now) && line.under_way().is_any_free_or_wish()
    }

    /// When the rate lets another go.
    pub(super) fn pace_at(&self, now: Instant) -> Option<Instant> {
        self.first().and(self.resources.shared.admission.queue.next_at()).filter(|&at| at > now)
    }
}

//! The rules for waiting clients: none waits for nothing or longer than need be, and no more start at a time than may.

use std::{num::NonZeroU32, time::Duration};

use crate::{
    config::{Overflow, SendProxy},
    crowd::Way,
    drive::{Course, with_course},
    kernel::{Backlog, Kernel, LinkId},
    link::{Link, Side},
    pause::gate::Mode,
};

/// The time for which a connection counts as under way while its upstream sends nothing.
const HEARING_TIMEOUT: Duration = Duration::from_millis(50);
/// The time for which a client to reject may be silent.
const SNIFF_TIMEOUT: Duration = Duration::from_secs(1);
/// The time between two probes of an upstream that is away.
const PROBE_INTERVAL_MAX: Duration = Duration::from_millis(250);
/// The time for which a client that was closed as quiet may go on sending.
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);
/// The silence of a connection that a stop does not wait for, as its server has ended its stream.
const STOPPING_QUIET: Duration = Duration::from_secs(1);
/// The delay with which the worker may begin its turn when it is woken.
const LATE_MAX: Duration = Duration::from_millis(400);
/// The lateness that the worker may make up for by starting clients faster than the rate.
const LATENESS_MAX: Duration = Duration::from_millis(20);
/// The longest that an upstream may be back before all are served: a probe comes in 250 ms, an attempt may last 300 ms.
const RETURN_TIME_MAX: Duration = Duration::from_secs(3);

/// The settings of a schedule, and what else it depends on whether somebody may wait, or is given up.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Rules {
    /// True if clients are rejected during some pauses.
    pub(crate) rejects: bool,
    pub(crate) hold_timeout: Option<Duration>,
    pub(crate) hold_max: Option<usize>,
    pub(crate) overflow: Overflow,
    pub(crate) max_connecting: usize,
    pub(crate) rate: Option<NonZeroU32>,
    pub(crate) connect_timeout: Duration,
    pub(crate) retry_for: Duration,
    /// True if all happens to all upstream addresses.
    pub(crate) changes_sites: bool,
    /// The number of addresses, and of the first of them that swallow dials.
    pub(crate) sites: usize,
    pub(crate) dead: usize,
    /// The bound of the upstream's backlog, if there is one.
    pub(crate) backlog: Option<usize>,
    pub(crate) is_upstream_unix: bool,
    pub(crate) is_faulty: bool,
    pub(crate) has_rival: bool,
    pub(crate) send_proxy: SendProxy,
    pub(crate) switches: bool,
}

/// The past of a connection, as far as the rules depend on it.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Story {
    /// The beginning of the turn in which the worker took the client in.
    pub(crate) came: Option<Duration>,
    /// True if the client was accepted to be held, and has a permit for it.
    pub(crate) has_hold_permit: bool,
    pub(crate) was_let_through: bool,
    /// True if the upstream is dialled for a client that has waited.
    pub(crate) is_of_crowd: bool,
    pub(crate) dialled: Duration,
    pub(crate) way: Way,
    /// True if it was dialled while it was known to be away.
    pub(crate) is_probe: bool,
    /// The beginning of the turn in which the worker learnt that it is connected.
    pub(crate) known: Duration,
    /// The same of the turn in which it did so at the latest, if that was cut short.
    pub(crate) learnt: Duration,
    /// The beginning of the turn in which the worker last learnt that none of its bytes is acknowledged.
    pub(crate) unacknowledged: Duration,
    /// The time at which the last dial for it was given up.
    pub(crate) left: Duration,
    /// The beginning of the last attempt for it, and whether that was in an outage.
    pub(crate) attempt: Duration,
    pub(crate) attempt_probes: bool,
    /// The beginning of the turn in which a byte of a client's, or for it, was moved.
    moved: Duration,
    /// The turns that moved the last byte to the upstream, and to the client.
    moved_up: u64,
    moved_down: u64,
    /// The bytes that had come when the turn began.
    pub(crate) arrived_before: usize,
    /// True if all were to be reset when this client was served: since this turn, or before it.
    pub(crate) is_condemned: bool,
    pub(crate) is_doomed: bool,
    pub(crate) was_killed: bool,
    /// True if the operator may have ordered the client's end, now or soon.
    pub(crate) may_be_ended: bool,
    /// True if it had ended its stream while held, and was closed for that.
    pub(crate) was_dropped: bool,
    /// The upstream of a connection that was closed as it was quiet.
    pub(crate) drained: Option<LinkId>,
}

impl Rules {
    pub(crate) fn patience(&self) -> Duration {
        self.retry_for.max(self.connect_timeout)
    }

    /// Returns whether this host may be short of something for a dial: a UNIX backlog that is full counts as that.
    pub(crate) fn may_be_short(&self) -> bool {
        self.is_faulty || self.changes_sites && self.is_upstream_unix
    }

    /// Returns whether clients may be given up. Ports that are short count as an upstream that is away, which the rival may
    /// hinder from being tried.
    pub(crate) fn may_be_unreachable(&self) -> bool {
        self.changes_sites || self.is_faulty && self.has_rival
    }

    /// Returns whether clients may get an answer of the proxy's.
    pub(crate) fn may_answer(&self) -> bool {
        self.rejects || self.may_refuse() && self.overflow != Overflow::Close
    }

    /// Returns whether clients may get the end of the stream instead.
    pub(crate) fn may_dismiss(&self) -> bool {
        self.may_refuse() && self.overflow == Overflow::Close
    }

    /// Returns whether clients may get either.
    pub(crate) fn may_turn_away(&self) -> bool {
        self.may_answer() || self.may_dismiss()
    }

    /// Returns whether clients that are to be held may get something else.
    fn may_refuse(&self) -> bool {
        self.hold_timeout.is_some() || self.hold_max.is_some() && self.overflow != Overflow::Backlog
    }

    /// Returns whether every dial succeeds at once, so that their order is the clients'.
    pub(crate) fn keep_order(&self) -> bool {
        let is_quick = !self.changes_sites && !self.is_faulty && self.dead == 0;
        !self.rejects && !self.may_refuse() && is_quick
    }
}

impl Course {
    /// Checks, as the worker goes to sleep, that no client is left that could go on.
    pub(crate) fn look_at_those_who_wait(&self, timeout: Option<Duration>) {
        let shared = &self.shared;
        let counters = shared.workers.counters(0);
        let held = counters.held.get();
        let is_away = shared.upstream.breaker().is_open();
        let is_paused = shared.pauses.gate.is_paused();
        crate::with(|kernel| {
            let upstreams = kernel
                .links
                .iter()
                .filter(|link| link.token.is_some() && link.side == Side::Upstream);
            let dialled = upstreams.count() as u64 - counters.active.get();
            assert_eq!(counters.connecting.get(), dialled, "an attempt is counted, and none made");
            assert!(held <= self.held_max(), "some wait for the upstream during a pause");
            let first = kernel.waiting().filter_map(|link| link.story.came).min();
            let may_go = if is_paused {
                // Clients to be rejected wait too, but are not held.
                !self.rules.may_turn_away()
                    && first
                        .is_some_and(|at| shared.admission.queue.lets_bypass(crate::instant(at)))
            } else {
                held > 0 && !is_away
            };
            let window = shared.admission.queue.under_way().max();
            let is_free = kernel.under_way(false) + self.rival.shares() < window;
            let is_its_turn = self.is_ahead_of_rival() && is_free;
            if may_go && is_its_turn {
                // Only the rate may hold it back.
                let wakes = timeout.map(|timeout| crate::instant(kernel.now + timeout));
                let is_soon = wakes.is_some_and(|at| Some(at) <= shared.admission.queue.next_at());
                assert!(is_soon, "a client waits that may start");
            }
            let is_tried = self.rival.probes() || dialled > 0;
            let is_back = |link: &Link| {
                let is_learnt = !kernel.is_cut_short || link.story.learnt < kernel.turn_began;
                let is_present = link.group == kernel.switches.present;
                link.is_carried() && is_present && link.story.known > kernel.failed && is_learnt
            };
            assert!(!is_away || !kernel.links.iter().any(is_back), "an outage does not end");
            if held > 0 && is_away && !is_paused && !is_tried && self.is_ahead_of_rival() {
                let is_soon = timeout.is_some_and(|timeout| timeout <= PROBE_INTERVAL_MAX);
                assert!(is_soon, "no probe tries an upstream that is away");
            }
            let taken_in =
                kernel.waiting().filter(|link| link.story.has_hold_permit).count() as u64;
            let rejected = kernel.waiting().count() as u64 - held;
            let max = self
                .rules
                .hold_max
                .map_or(u64::MAX, |max| self.held_bound.max(max as u64) + rejected);
            assert!(!is_paused || taken_in <= max, "more are held than may be");
            self.look_at_backlog(kernel, held);
            self.look_at_patience(kernel);
        });
    }

    /// Returns the number of clients that may be held, if the pause has begun while all that waited did so for the
    /// upstream. Each of them then needs a permit to be held, or is rejected, like the newcomers.
    fn held_max(&self) -> u64 {
        match (self.operator.pause_in_outage, self.rules.overflow, self.rules.hold_max) {
            (None, _, _) => u64::MAX,
            (Some(Mode::Reject), _, _) => 0,
            (Some(Mode::Hold), Overflow::Reject | Overflow::Close, Some(max)) => {
                self.held_bound.max(max as u64)
            }
            (Some(Mode::Hold), _, _) => u64::MAX,
        }
    }

    /// Checks that no client is rejected anew without a pause.
    pub(crate) fn look_at_rejected(&mut self) {
        let rejecting = self.shared.workers.counters(0).rejecting.get();
        let before = std::mem::replace(&mut self.rejecting, rejecting);
        let was_paused = crate::with(|kernel| kernel.was_paused);
        let may_be = was_paused || self.operator.has_ordered_closes;
        assert!(rejecting <= before || may_be, "one is rejected without a pause");
    }

    /// Checks that no client stays in the backlog while permits for it are free.
    fn look_at_backlog(&self, kernel: &Kernel, held: u64) {
        // An event that is on its way will wake the worker.
        let is_forgotten = |backlog: &Backlog| {
            !backlog.queue.is_empty() && !backlog.has_edge && backlog.token.is_some()
        };
        if self.rules.is_faulty || !kernel.backlogs.iter().any(is_forgotten) {
            return;
        }
        let is_full = self.shared.admission.clients.max() <= kernel.clients_counted();
        let is_held = self.shared.pauses.gate.mode() == Some(Mode::Hold)
            && self.rules.overflow == Overflow::Backlog
            && self.rules.hold_max.is_some_and(|max| held >= max as u64);
        assert!(is_full || is_held, "a client stays in the backlog although permits are free");
    }

    /// Checks that no client waits for longer than the settings say.
    fn look_at_patience(&self, kernel: &Kernel) {
        if kernel.is_cut_short {
            // The next turn looks at deadlines.
            return;
        }
        for link in kernel.waiting() {
            let came = link.story.came.unwrap_or_default();
            if let (Some(timeout), Some(paused)) = (self.rules.hold_timeout, self.operator.paused)
                && !link.story.was_let_through
            {
                let until = if self.rules.rejects || self.rules.overflow != Overflow::Close {
                    // A client that was to be rejected when the gate opened counts as a newcomer.
                    let came = came.max(self.operator.resumed);
                    let held = (came + timeout).max(paused).max(link.story.left);
                    held + LATE_MAX + SNIFF_TIMEOUT
                } else {
                    came + timeout
                };
                assert!(kernel.turn_began < until, "one is held for too long: {link:#?}");
            }
        }
        if let Some(since) = self.away_since {
            for link in kernel.links.iter().filter(|link| kernel.is_unserved(link)) {
                let since = link.story.came.unwrap_or_default().max(since);
                let until = since + self.rules.patience();
                assert!(kernel.turn_began <= until, "one waits for too long: {link:#?}");
            }
        }
    }
}

impl Kernel {
    /// Returns the clients that were taken in and have no upstream: they are held, wait for the upstream, or are to be
    /// rejected and were not answered yet.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &Link> {
        self.links.iter().filter(|link| link.token.is_some() && link.waits())
    }

    /// Returns their number, with those that are not registered yet.
    pub(crate) fn waiting_at_most(&self) -> u64 {
        self.links.iter().filter(|link| link.waits()).count() as u64
    }

    /// Returns true if a client waits, or the upstream is dialled for it.
    fn is_unserved(&self, link: &Link) -> bool {
        link.side == Side::Client
            && link.token.is_some()
            && (link.waits() || link.partner.is_some_and(|upstream| !self.links[upstream].is_known))
    }

    pub(crate) fn clients_counted(&self) -> usize {
        let taken = |link: &&Link| link.side == Side::Client && link.is_open;
        self.links.iter().filter(taken).count()
    }

    /// Returns the number of dials under way, or of those for clients that have waited.
    pub(crate) fn under_way(&self, of_crowd: bool) -> usize {
        let is_under_way = |link: &&Link| {
            let Some(client) = link.partner.filter(|_| link.token.is_some()) else { return false };
            let client = &self.links[client];
            let is_broken = |link: &Link| {
                let is_dead = link.is_dead || link.is_unix && link.peer_closed;
                is_dead || link.error.is_some() || link.was_hurt
            };
            link.side == Side::Upstream
                && (!of_crowd || link.story.is_of_crowd && !is_broken(link) && !is_broken(client))
                && (!link.is_known || self.is_unheard(link, client, !of_crowd))
        };
        self.links.iter().filter(is_under_way).count()
    }

    /// Returns true if the upstream has sent nothing, and has no need to. `is_late` says that the worker may have learnt late
    /// that it is connected.
    pub(crate) fn is_unheard(&self, upstream: &Link, client: &Link, is_late: bool) -> bool {
        let Story { known, learnt, unacknowledged, .. } = upstream.story;
        let since = if is_late { learnt } else { known }.max(unacknowledged);
        client.written == 0 && self.turn_began < since + HEARING_TIMEOUT
    }

    /// Returns the number of probes of an upstream that is away.
    fn probes(&self) -> usize {
        let probes = |link: &&Link| link.story.is_probe && link.is_open && !link.is_known;
        self.links.iter().filter(probes).count()
    }

    /// Checks the number of held clients, as one was accepted to be held. It may be `bound` already.
    pub(crate) fn is_held(&mut self, id: LinkId, bound: usize) {
        self.links[id].story.has_hold_permit = true;
        let is_untimed =
            self.rules.hold_timeout.is_none() || self.rules.overflow == Overflow::Close;
        let Some(max) = self.rules.hold_max.filter(|_| is_untimed && !self.rules.rejects) else {
            return;
        };
        let held = |link: &&Link| link.waits() && link.story.has_hold_permit;
        let count = match self.rules.overflow {
            Overflow::Backlog => self.links.iter().filter(held).count(),
            Overflow::Close => self.waiting().filter(held).count(),
            // A rejected client may look the same for a while.
            Overflow::Reject => 0,
        };
        assert!(count <= max.max(bound), "more are held than may be");
    }

    /// Checks a dial, as an upstream's socket is registered for a client.
    pub(crate) fn is_dialled(&mut self, id: LinkId, client: LinkId, course: &Course) {
        self.look_at_route(id, client, course);
        let now = self.turn_began;
        let has_waited = self.links[client].story.came.is_some_and(|came| came < now);
        let is_simple = self.rules.is_simple();
        let is_away = course.shared.upstream.breaker().is_open();
        // A client that waits for the upstream may start if the pause ends while it is about to be held.
        let is_paused = course.shared.pauses.gate.is_paused();
        let is_sure = is_simple && (is_paused || !self.was_paused);
        let was_closed = course.was_closed_before(now);
        // A client that enters as another leaves goes unnoticed.
        let is_let = self.links[client].story.was_let_through || course.operator.permits > 0;
        assert!(!was_closed || is_let, "a client is dialled for during a pause");
        self.links[client].story.moved = now;
        let story = &mut self.links[id].story;
        (story.known, story.learnt, story.dialled) = (now, now, now);
        story.is_of_crowd = is_sure && has_waited && !is_away;
        story.is_probe = is_sure && is_away && !is_paused;
        let is_queued = story.is_of_crowd || story.is_probe && has_waited;
        let came = self.links[client].story.came;
        let is_first = course.rival.unchanged_head().is_none_or(|first| came <= Some(first));
        assert!(!is_queued || is_first, "a client starts before an earlier one");
        if self.links[id].story.is_of_crowd {
            self.look_at_crowd(id, course);
        }
        let probes = self.probes() + usize::from(course.rival.probes());
        assert!(
            !self.links[id].story.is_probe || probes <= 1,
            "several try an upstream that is away"
        );
    }

    /// Checks window and rate, as the upstream is dialled for a client that has waited.
    fn look_at_crowd(&mut self, id: LinkId, course: &Course) {
        let shares = self.under_way(true) + course.rival.shares();
        assert!(shares <= self.rules.max_connecting, "more are under way than may be");
        let window = course.shared.admission.queue.under_way().max();
        assert!(shares <= window, "more are under way than the window is wide");
        self.crowd_goes(id);
        if let Some(rate) = self.rules.rate {
            let now = self.turn_began;
            assert!(self.next_by_rate <= now, "more go than the rate allows");
            let next = self.next_by_rate.max(now.saturating_sub(LATENESS_MAX));
            self.next_by_rate = next + Duration::from_secs(1) / rate.get();
        }
    }

    /// The worker closes a client's socket.
    pub(crate) fn is_closed(&mut self, id: LinkId) {
        let link = &self.links[id];
        let is_dropped = link.was_accepted && link.is_unregistered() && !self.may_cut;
        assert!(!is_dropped, "one is dropped that was never taken in: {link:#?}");
        if link.resets_on_close && (self.may_kill || link.story.may_be_ended) {
            let partner = link.partner;
            self.links[id].story.was_killed = true;
            if let Some(partner) = partner {
                self.links[partner].story.was_killed = true;
            }
        }
        let link = &self.links[id];
        let is_spared = link.was_hurt || link.story.may_be_ended;
        if link.story.drained.is_some() && !self.may_cut && !is_spared {
            let has_ended = link.is_ended || link.is_dead;
            let is_over = has_ended || link.story.left + LINGER_TIMEOUT <= self.now;
            assert!(is_over, "a quiet client's last bytes are not awaited: {link:#?}");
        }
        let rules = &self.rules;
        if !link.resets_on_close || self.may_cut || !self.is_unserved(link) {
            return;
        }
        let has_pass = link.partner.is_some();
        if self.may_kill && has_pass || link.story.may_be_ended {
            return;
        }
        let paused = with_course(|course| course.operator.paused);
        let is_held = !has_pass && paused.is_some_and(|since| since < self.turn_began);
        assert!(!is_held, "one that is held is given up: {link:#?}");
        let is_over = link.story.came.is_some_and(|came| came + rules.patience() <= self.now);
        assert!(rules.may_be_unreachable() && is_over, "one is given up too soon: {link:#?}");
        let is_back = self.up_since.is_some_and(|since| since + RETURN_TIME_MAX <= self.now);
        // It may have waited in vain for the end of one attempt, if its time is as short: each address has 300 ms.
        let attempt = Duration::from_millis(300) * (1 + u32::try_from(rules.sites).unwrap());
        let is_patient = rules.patience() > attempt && link.partner.is_none();
        let is_simple = is_patient && !rules.has_rival && !rules.may_be_short();
        assert!(!is_back || !is_simple, "one is given up although the upstream is back: {link:#?}");
        if let Some(upstream) = link.partner {
            self.has_timed_out(self.links[upstream].story.dialled);
        }
    }

    /// A byte was written.
    pub(crate) fn has_moved(&mut self, id: LinkId) {
        let (turn, now) = (self.tally.turns, self.turn_began);
        let link = &mut self.links[id];
        match (link.side, link.partner) {
            (Side::Client, _) => (link.story.moved, link.story.moved_down) = (now, turn),
            (Side::Upstream, Some(client)) => {
                let story = &mut self.links[client].story;
                (story.moved, story.moved_up) = (now, turn);
            }
            (Side::Upstream, None) => {}
        }
    }

    /// The worker closes a client's socket, perhaps as its half-closed connection is quiet: in good order, and before both
    /// streams have ended.
    pub(crate) fn may_be_drained(&mut self, id: LinkId) {
        let client = &self.links[id];
        let Some(upstream) = client.partner.filter(|_| client.side == Side::Client) else { return };
        let server = &self.links[upstream];
        let is_gone = |link: &Link| link.is_dead || link.is_unix && link.peer_closed;
        let is_excused = client.resets_on_close || self.may_cut || std::thread::panicking();
        if is_excused || is_gone(client) || is_gone(server) || !server.is_carried() {
            return;
        }
        if !client.is_ended || !server.is_ended {
            assert!(
                client.is_ended || server.is_ended || client.story.may_be_ended,
                "an open connection is closed: {client:#?}"
            );
            self.is_drained(id, upstream);
        }
    }

    /// A client's connection is closed as it is quiet.
    pub(crate) fn is_drained(&mut self, id: LinkId, upstream: LinkId) {
        if self.links[id].story.may_be_ended {
            // The operator's order looks the same, and waits for no quiet.
            self.links[id].story.drained = Some(upstream);
            return;
        }
        let (client, server) = (&self.links[id], &self.links[upstream]);
        let stop = (self.is_stopping && server.is_ended).then_some(STOPPING_QUIET);
        let quiet = self.may_drain.into_iter().chain(stop).min();
        let quiet = quiet.expect("an end that nobody has sent");
        let tells = || format!("{client:#?}, {server:#?}");
        let story = &client.story;
        assert!(story.moved + quiet <= self.turn_began, "not quiet for long enough: {}", tells());
        let is_answered = story.moved_up <= story.moved_down || server.is_ended;
        assert!(is_answered, "it waits for an answer: {}", tells());
        for (source, sink) in [(client, server), (server, client)] {
            assert!(source.read >= source.story.arrived_before, "bytes are unread: {}", tells());
            assert_eq!(source.read, sink.written, "bytes are buffered: {}", tells());
            assert_eq!(sink.written, sink.acked, "bytes are on their way: {}", tells());
        }
        self.links[id].story.drained = Some(upstream);
    }
}

/// Returns whether a client is quiet: what came last was an answer, or nothing did.
pub(crate) fn is_quiet(client: &Link) -> bool {
    let (up, down) = (client.story.moved_up, client.story.moved_down);
    up < down || (up, down) == (0, 0)
}

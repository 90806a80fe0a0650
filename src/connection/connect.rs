//! Connecting of an admitted client to the upstream: an attempt dials one address after the other.
//!
//! An attempt holds the client's pass. A failed one gives it back, and the client waits again.

mod words;

use std::{
    io,
    time::{Duration, Instant},
};

use mio::Registry;

use super::{Connection, Context, Patience, Session, State, Verdict};
use super::{
    deadline::{ADDRESS_TIMEOUT, Deadline},
    endpoint::{Endpoint, Registration},
    relay::Relay,
};
use crate::{
    admission::{
        pace::{Syn, UnderWay},
        semaphore::Permit,
    },
    pause::gate::Pass,
    stats::cause::{CloseCause, ConnectResult},
    sys::{Dialled, SocketAddress, is_shortage},
    upstream::{
        Present, RetryPlan, Upstream, addresses::Route, breaker::Cause, targets::TargetUse,
    },
};
pub(super) use words::DialWords;

/// A dial that is under way.
#[derive(Debug)]
pub(super) struct Dial {
    // Fields are dropped in this order: the socket, then the use of the upstream and the pass. So both count as idle only
    // after the close.
    pub(super) upstream: Endpoint,
    /// Upstream that is dialled, which was the present one when the dial began.
    pub(super) target: TargetUse,
    pub(super) attempt: Attempt,
}

/// An attempt to reach the upstream for a client, at one address after the other.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) ticket: ConnectTicket,
    /// Order in which the attempt tries the upstream's addresses.
    route: Route,
    /// Set when an address failed because this host was short of something. The next attempt then comes soon.
    is_short: bool,
    /// Beginning of the client's first attempt, or of its wait for the upstream, since it was last held: a lost SYN or a
    /// pause lets it begin anew. Its patience counts from here, but from the opening of the breaker at the earliest.
    since: Instant,
    /// Beginning of this attempt.
    begun: Instant,
    pass: Pass,
}

/// Right to dial, which a client needs besides its pass.
#[derive(Debug)]
pub(crate) enum ConnectTicket {
    /// Ticket of a client that came while no other waited. No window bounds it.
    Alone,
    /// Ticket of a client that has waited: a share of the window.
    Window(Box<UnderWay>),
    /// Ticket of the one client that probes while the circuit breaker is open. Others follow if it connects, so it takes
    /// a share of the window if one is free.
    Probe { _permit: Permit, under_way: Option<Box<UnderWay>> },
}

impl Dial {
    /// Closes the socket. Returns the attempt, which may go on to another address.
    pub(super) fn close(self, registry: &Registry) -> Attempt {
        self.upstream.deregister(registry);
        self.attempt
    }
}

impl Attempt {
    /// Returns the moment from which the client's patience runs. While the upstream is not known to be away, that is the
    /// beginning of the attempt.
    fn patience_since(&self, upstream: &Upstream) -> Instant {
        upstream.breaker().patience_since(self.since).unwrap_or(self.begun)
    }

    /// Returns the time from which the connect timeout counts. If the client's patience ends before, it counts as if the
    /// attempt had begun earlier, so that both end together.
    fn timed_since(&self, upstream: &Upstream) -> Instant {
        let spare = upstream.patience().saturating_sub(upstream.connect_timeout());
        let latest = self.patience_since(upstream).checked_add(spare);
        latest.map_or(self.begun, |latest| latest.min(self.begun))
    }

    /// Returns the pass of an attempt that is given up.
    pub(super) fn into_pass(self) -> Pass {
        self.pass
    }

    /// Returns the beginning of the client's first attempt, or of its wait for the upstream.
    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// Returns the beginning of the client's wait for an upstream that was away; none if it has not waited.
    pub(super) fn outage_began(&self) -> Option<Instant> {
        (self.since < self.begun).then_some(self.since)
    }

    /// Returns the rest of the attempt's connect timeout.
    fn time_left(&self, upstream: &Upstream, now: Instant) -> Duration {
        let spent = now.saturating_duration_since(self.timed_since(upstream));
        upstream.connect_timeout().saturating_sub(spent)
    }

    /// Returns the verdict with the deadline of the dial that has just begun.
    fn await_answer(&mut self, context: &Context<'_>) -> Verdict {
        let left = self.time_left(context.upstream, context.now);
        if self.ticket.dialled(context.now) {
            Verdict::Wait(Deadline::Unanswered)
        } else if self.route.is_last() || left <= ADDRESS_TIMEOUT {
            Verdict::WaitSince(Deadline::ConnectingLast, self.timed_since(context.upstream))
        } else {
            Verdict::Wait(Deadline::Connecting)
        }
    }

    /// Reports the failure of the attempt to the circuit breaker, which all workers share.
    fn report_failure(&self, error: &io::Error, context: &Context<'_>) {
        context.upstream.remember_error(error);
        let cause = if self.is_short { Cause::Shortage } else { Cause::Away };
        let was_probe = matches!(self.ticket, ConnectTicket::Probe { .. });
        context.upstream.breaker().failed(cause, was_probe, context.now);
    }
}

impl Connection {
    /// Begins an attempt for a client that has waited, unless it has left meanwhile.
    pub(crate) fn start_attempt(
        &mut self,
        pass: Pass,
        ticket: ConnectTicket,
        context: &mut Context<'_>,
    ) -> Verdict {
        if self.has_gone() {
            return Verdict::Close(self.left());
        }
        self.connect(pass, ticket, context)
    }

    /// Begins an attempt for a client. It may first explore an address that was dead, if that
    /// leaves enough time for the address that was reached last.
    pub(crate) fn connect(
        &mut self,
        pass: Pass,
        ticket: ConnectTicket,
        context: &mut Context<'_>,
    ) -> Verdict {
        let now = context.now;
        self.record.waited_until(now);
        let since = match &self.state {
            State::Waiting { patience: Some(patience), .. } => patience.since,
            _ => now,
        };
        let route = Route::default();
        let mut attempt = Attempt { ticket, route, is_short: false, since, begun: now, pass };
        let upstream = context.upstream;
        let has_time = attempt.time_left(upstream, now) >= 2 * ADDRESS_TIMEOUT;
        let explores = has_time && context.dialer.may_explore() && !upstream.breaker().is_open();
        attempt.route = upstream.read(context.cached).route(explores.then_some(now));
        self.dial(attempt, context)
    }

    /// Dials the present address of the attempt.
    fn dial(&mut self, mut attempt: Attempt, context: &mut Context<'_>) -> Verdict {
        let Present { target, addresses } = context.upstream.present(context.cached);
        let Some(address) = addresses.get(&attempt.route) else {
            let error = io::Error::other(addresses.lack());
            return self.attempt_failed(attempt, error, context);
        };
        let target = target.begin_use();
        let Registration { registry, upstream: token, .. } = context.registration;
        let dialled =
            context.dialer.dial(address, context.upstream).and_then(|(socket, dialled)| {
                socket.register(registry, token)?;
                Ok((socket, dialled))
            });
        match dialled {
            Ok((socket, Dialled::Connected)) => {
                let upstream = Endpoint::connected(socket);
                self.begin_relay(Dial { upstream, target, attempt }, context)
            }
            Ok((socket, Dialled::InProgress)) => {
                let verdict = attempt.await_answer(context);
                let upstream = Endpoint::connecting(socket);
                self.replace_state(State::Connecting(Dial { upstream, target, attempt }));
                verdict
            }
            Err(error) => self.next_address(attempt, error, context),
        }
    }

    /// Goes on when the deadline of an address or of the attempt has passed.
    pub(super) fn dial_expired(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Connecting(Dial { upstream, target, attempt }) = &self.state else {
            return Verdict::Stay;
        };
        let now = context.now;
        let syn = attempt.ticket.syn(upstream, now);
        let timed_out = io::Error::from(io::ErrorKind::TimedOut);
        let has_time = !attempt.time_left(context.upstream, now).is_zero();
        let is_young = has_time && matches!(syn, Syn::Young);
        if !is_young && !context.upstream.is_present(context.cached, target.target()) {
            return self.give_up_address(timed_out, context);
        }
        if !has_time {
            context.upstream.read(context.cached).ran_out(&attempt.route, now);
        }
        let patience_since = attempt.patience_since(context.upstream);
        if now.saturating_duration_since(patience_since) >= context.upstream.patience() {
            context.counters.dialled(ConnectResult::Timeout);
            if !has_time {
                attempt.report_failure(&timed_out, context);
            }
            return Verdict::Close(CloseCause::Unreachable);
        }
        match syn {
            _ if !has_time => self.give_up_attempt(timed_out, context),
            Syn::Young => Verdict::Wait(Deadline::Unanswered),
            Syn::Lost | Syn::Left if !attempt.route.is_last() => {
                self.give_up_address(timed_out, context)
            }
            Syn::Lost if !attempt.pass.is_paused() => self.lost(context),
            // The last address has the rest of the time.
            Syn::Lost | Syn::Left => {
                let since = attempt.timed_since(context.upstream);
                Verdict::WaitSince(Deadline::ConnectingLast, since)
            }
        }
    }

    /// Closes the socket, and ends the attempt as failed with `error`.
    pub(super) fn give_up_attempt(
        &mut self,
        error: io::Error,
        context: &mut Context<'_>,
    ) -> Verdict {
        let Some(dial) = self.take_dial() else { return Verdict::Stay };
        let attempt = dial.close(context.registration.registry);
        context.counters.dialled(ConnectResult::from(&error));
        self.attempt_failed(attempt, error, context)
    }

    /// Closes the socket, and goes on to the next address, as this one has failed with `error`.
    fn give_up_address(&mut self, error: io::Error, context: &mut Context<'_>) -> Verdict {
        let Some(dial) = self.take_dial() else { return Verdict::Stay };
        let is_present = context.upstream.is_present(context.cached, dial.target.target());
        let attempt = dial.close(context.registration.registry);
        if is_present {
            self.next_address(attempt, error, context)
        } else {
            self.dial_anew(attempt, error, context)
        }
    }

    /// Begins anew at the present upstream, as the dial of an earlier one has failed with `error`. That tells nothing of the
    /// present one, and the client has all of its time again.
    fn dial_anew(
        &mut self,
        attempt: Attempt,
        error: io::Error,
        context: &mut Context<'_>,
    ) -> Verdict {
        context.counters.dialled(ConnectResult::from(&error));
        if attempt.pass.is_void() {
            return self.wait(attempt, error, context);
        }
        let route = context.upstream.read(context.cached).route(None);
        self.dial(Attempt { route, is_short: false, begun: context.now, ..attempt }, context)
    }

    /// Ends an attempt whose SYN was lost. The client waits for a share of the window again, ahead of all clients that came
    /// later, or for the upstream if that is away by now.
    fn lost(&mut self, context: &mut Context<'_>) -> Verdict {
        let Some(dial) = self.take_dial() else { return Verdict::Stay };
        let attempt = dial.close(context.registration.registry);
        context.counters.dialled(ConnectResult::Timeout);
        if let Some(under_way) = attempt.ticket.under_way() {
            under_way.lost(context.now);
        }
        if context.upstream.breaker().is_away() {
            return self.wait(attempt, io::ErrorKind::TimedOut.into(), context);
        }
        Verdict::Hold
    }

    /// Takes the dial out of the connection, which is in the waiting state until the caller sets another.
    fn take_dial(&mut self) -> Option<Dial> {
        match self.replace_state(State::Waiting { hold_permit: None, patience: None }) {
            State::Connecting(dial) => Some(dial),
            other => {
                self.state = other;
                None
            }
        }
    }

    /// Dials the next address of the attempt, as the present one has failed with `error`. Without one, the attempt has
    /// failed.
    pub(super) fn next_address(
        &mut self,
        mut attempt: Attempt,
        error: io::Error,
        context: &mut Context<'_>,
    ) -> Verdict {
        context.counters.dialled(ConnectResult::from(&error));
        attempt.is_short |= is_shortage(&error);
        let is_news = !attempt.route.explores();
        let timed_out = error.kind() == io::ErrorKind::TimedOut;
        if !context.upstream.read(context.cached).advance(&mut attempt.route, timed_out) {
            return self.attempt_failed(attempt, error, context);
        }
        let is_void = attempt.pass.is_void();
        if is_news {
            log_failure(&error, context);
        }
        if is_void { self.wait(attempt, error, context) } else { self.dial(attempt, context) }
    }

    /// Reports the failure of an attempt, and makes its client wait for the next one. `error` is that of the last address.
    pub(super) fn attempt_failed(
        &mut self,
        attempt: Attempt,
        error: io::Error,
        context: &mut Context<'_>,
    ) -> Verdict {
        log_failure(&error, context);
        if let ConnectTicket::Window(under_way) = &attempt.ticket
            && attempt.is_short
        {
            under_way.lost(context.now);
        }
        attempt.report_failure(&error, context);
        self.wait(attempt, error, context)
    }

    /// Gives the pass back, and makes the client wait for the upstream, or for the resume if a pause has begun. A client
    /// that has left is closed now, as its event came before and does not come again.
    fn wait(&mut self, attempt: Attempt, error: io::Error, context: &mut Context<'_>) -> Verdict {
        let Attempt { since, pass, .. } = attempt;
        self.replace_state(State::Waiting { hold_permit: None, patience: None });
        match self.look_after_waiting(context) {
            Verdict::Stay => {}
            Verdict::Close(_) => return Verdict::Close(CloseCause::LeftConnecting),
            dropped => return dropped,
        }
        if pass.is_paused() {
            return Verdict::Hold;
        }
        self.await_upstream(Patience { since, error: Some(error) }, context)
    }

    /// Goes on when the dial has connected or failed.
    pub(super) fn connected(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Connecting(Dial { upstream, target, .. }) = &self.state else {
            return Verdict::Stay;
        };
        let socket = upstream.socket();
        let may_be_own = context.upstream.breaker().is_open()
            || !context.upstream.is_present(context.cached, target.target());
        // A failure comes with a reset event, so that a success needs no call to ask for the error.
        let failure = if upstream.is_reset() { socket.take_dial_error() } else { None };
        let failure = match failure {
            // A dial of a local port without a listener may connect to itself (TCP's simultaneous open). Then earlier dials
            // have failed, so only an open breaker, or one that a switch has closed, needs the check. The reset frees the
            // port at once for its server.
            None if may_be_own && socket.is_self_connected() => {
                socket.reset_on_close();
                Some(io::ErrorKind::ConnectionRefused.into())
            }
            // The upstream was connected, has sent bytes and was reset since: the relay passes on the bytes, then the reset.
            Some(_) if socket.peek(&mut [0]).is_ok_and(|bytes| bytes > 0) => None,
            other => other,
        };
        if let Some(error) = failure {
            return self.give_up_address(error, context);
        }
        self.take_dial().map_or(Verdict::Stay, |dial| self.begin_relay(dial, context))
    }

    /// Records and counts a successful attempt.
    fn observe_connected(
        &mut self,
        attempt: &Attempt,
        is_present: bool,
        context: &mut Context<'_>,
    ) {
        let Context { counters, now, .. } = *context;
        counters.dialled(ConnectResult::Ok);
        if let Some(held) = self.record.held_before(attempt.since) {
            counters.hold.served.observe(held);
        }
        if let Some(began) = attempt.outage_began() {
            counters.outage.served.observe(attempt.begun.saturating_duration_since(began));
        }
        let address = match context.upstream.read(context.cached).get(&attempt.route) {
            // The route of an earlier upstream leads elsewhere here.
            Some(SocketAddress::Inet(address)) if is_present => Some(*address),
            _ => None,
        };
        self.record.connected(address, now.saturating_duration_since(attempt.begun), counters);
    }

    fn begin_relay(&mut self, dial: Dial, context: &mut Context<'_>) -> Verdict {
        let addresses = match self.take_header(CloseCause::LeftConnecting) {
            Ok(addresses) => addresses,
            Err(cause) => {
                dial.close(context.registration.registry);
                return Verdict::Close(cause);
            }
        };
        self.client.socket_mut().probe_as_usual();
        let socket = dial.upstream.socket();
        let is_present = context.upstream.is_present(context.cached, dial.target.target());
        if is_present {
            context.dialer.succeeded(context.upstream);
            context.upstream.reached(context.cached, &dial.attempt.route, context.now);
        }
        if let Some(under_way) = dial.attempt.ticket.under_way() {
            under_way.answered(socket, context.now);
        }
        self.observe_connected(&dial.attempt, is_present, context);
        let header = self.header_for_upstream(addresses, context);
        let Dial { upstream, target, attempt: Attempt { ticket, pass, .. } } = dial;
        let under_way = ticket.into_under_way();
        let deadline = if under_way.is_some() {
            Deadline::AwaitingFirstByte
        } else {
            Deadline::NoKeepaliveYet
        };
        self.replace_state(State::Relaying(Session {
            relay: Relay::new(upstream, header),
            under_way,
            moved: context.now,
            asks: false,
            settling: None,
            target,
            pass,
        }));
        Verdict::Enter(deadline)
    }
}

impl ConnectTicket {
    /// Returns its share of the window, if it has one.
    fn under_way(&self) -> Option<&UnderWay> {
        match self {
            Self::Window(under_way) | Self::Probe { under_way: Some(under_way), .. } => {
                Some(under_way)
            }
            Self::Alone | Self::Probe { under_way: None, .. } => None,
        }
    }

    /// Turns the ticket of a successful attempt into its share of the window, if it has one.
    fn into_under_way(self) -> Option<Box<UnderWay>> {
        match self {
            Self::Window(under_way) => Some(under_way),
            Self::Probe { under_way, .. } => under_way,
            Self::Alone => None,
        }
    }

    /// Notes a dial. Returns true if its SYN may count as lost before the kernel repeats it.
    fn dialled(&mut self, now: Instant) -> bool {
        match self {
            Self::Window(under_way) => under_way.dialled(now),
            Self::Alone | Self::Probe { .. } => false,
        }
    }

    /// Returns the state of the dial's SYN. Without a share of the window it is left to the kernel.
    fn syn(&self, upstream: &Endpoint, now: Instant) -> Syn {
        match self {
            Self::Window(under_way) => under_way.unanswered(upstream.socket(), now),
            Self::Alone | Self::Probe { .. } => Syn::Left,
        }
    }
}

/// Logs a failure, unless this host was short of something: that is no fault of the upstream.
fn log_failure(error: &io::Error, context: &Context<'_>) {
    if !is_shortage(error) {
        context.upstream.log_failure(error, RetryPlan::TriedAgain, context.now);
    }
}

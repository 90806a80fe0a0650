//! The way from an admitted client to its upstream: one attempt at all addresses, and what comes of it.
//!
//! A client that is dialled for has a pass. An attempt that fails gives it back, and the client waits again.

use std::{
    io,
    time::{Duration, Instant},
};

use super::{Connection, Context, Patience, Reason, Session, State, Verdict};
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
    sys::{Dialled, is_shortage},
    upstream::{RetryPlan, Upstream, addresses::Route, breaker::Cause},
};

/// A dial that is under way.
#[derive(Debug)]
pub(super) struct Dial {
    // The order of the fields is the order in which they are dropped: the socket, then the pass.
    pub(super) upstream: Endpoint,
    pub(super) attempt: Attempt,
}

/// An attempt to reach the upstream for one client, at one address after the other.
#[derive(Debug)]
pub(super) struct Attempt {
    ticket: ConnectTicket,
    /// The way of the attempt through the upstream's addresses.
    route: Route,
    /// Set when an address failed because this host was short of something: all are tried again soon.
    is_short: bool,
    /// When the client came.
    arrived: Instant,
    /// Since when the client waits for the upstream, over all of its attempts.
    since: Instant,
    /// When the attempt began.
    begun: Instant,
    pass: Pass,
}

/// Right to dial, next to the pass.
#[derive(Debug)]
pub(crate) enum ConnectTicket {
    /// Of a client that came while nobody waited.
    Alone,
    /// One of those that the window lets be under way.
    Window(Box<UnderWay>),
    /// The one attempt that tries an upstream that is away. If it gets through it is the first of a crowd, and counts in the
    /// window.
    Probe { _permit: Permit, under_way: Option<Box<UnderWay>> },
}

impl Dial {
    /// Closes the socket. Returns the attempt, which may go on.
    fn close(self) -> Attempt {
        self.attempt
    }
}

impl Attempt {
    /// Returns since when the attempt's time counts. A client whose patience ends within the connect timeout has only the
    /// rest of it, as if the attempt had begun earlier.
    fn timed_since(&self, upstream: &Upstream) -> Instant {
        let spare = upstream.patience().saturating_sub(upstream.connect_timeout());
        self.since.checked_add(spare).map_or(self.begun, |latest| latest.min(self.begun))
    }

    /// Returns how much time the attempt has left.
    fn time_left(&self, upstream: &Upstream, now: Instant) -> Duration {
        let spent = now.saturating_duration_since(self.timed_since(upstream));
        upstream.connect_timeout().saturating_sub(spent)
    }

    /// Returns the deadline of the dial that has just begun.
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

    /// Tells all workers that the attempt has failed.
    fn report_failure(&self, context: &Context<'_>) {
        let cause = if self.is_short { Cause::Shortage } else { Cause::Away };
        let was_probe = matches!(self.ticket, ConnectTicket::Probe { .. });
        context.upstream.breaker().failed(cause, was_probe, context.now);
    }
}

impl Connection {
    /// Begins an attempt for a client that has waited since it came at `arrived`, unless it has left.
    pub(crate) fn release(
        &mut self,
        pass: Pass,
        ticket: ConnectTicket,
        arrived: Instant,
        context: &mut Context<'_>,
    ) -> Verdict {
        if self.client.socket().has_gone() {
            return Verdict::Close(Reason::Left);
        }
        self.connect(pass, ticket, arrived, context)
    }

    /// Begins an attempt for a client that came at `arrived`. It explores only where that leaves enough time for the address
    /// that was reached last.
    pub(crate) fn connect(
        &mut self,
        pass: Pass,
        ticket: ConnectTicket,
        arrived: Instant,
        context: &mut Context<'_>,
    ) -> Verdict {
        let now = context.now;
        let (arrived, since) = match &self.state {
            State::Waiting { patience: Some(it), .. } => (it.arrived, it.since),
            _ => (arrived, now),
        };
        let route = Route::default();
        let mut attempt =
            Attempt { ticket, route, is_short: false, arrived, since, begun: now, pass };
        let upstream = context.upstream;
        let has_time = attempt.time_left(upstream, now) >= 2 * ADDRESS_TIMEOUT;
        let explores = has_time && context.dialer.may_explore() && !upstream.breaker().is_open();
        attempt.route = upstream.read(context.cached).route(explores.then_some(now));
        self.dial(attempt, context)
    }

    /// Dials the address that is next in the attempt.
    fn dial(&mut self, mut attempt: Attempt, context: &mut Context<'_>) -> Verdict {
        let addresses = context.upstream.read(context.cached);
        let Some(address) = addresses.get(&attempt.route) else {
            let error = io::Error::other(addresses.lack());
            return self.attempt_failed(attempt, error, context);
        };
        let Registration { registry, upstream: token, .. } = context.registration;
        let dialled =
            context.dialer.dial(address, context.upstream).and_then(|(socket, dialled)| {
                socket.register(registry, token)?;
                Ok((socket, dialled))
            });
        match dialled {
            Ok((socket, Dialled::Connected)) => {
                self.begin_relay(Dial { upstream: Endpoint::connected(socket), attempt }, context)
            }
            Ok((socket, Dialled::InProgress)) => {
                let verdict = attempt.await_answer(context);
                let upstream = Endpoint::connecting(socket);
                self.replace_state(State::Connecting(Dial { upstream, attempt }));
                verdict
            }
            Err(error) => self.next_address(attempt, error, context),
        }
    }

    /// Goes on when the deadline of an address or of the attempt has passed.
    pub(super) fn dial_expired(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Connecting(Dial { upstream, attempt }) = &self.state else {
            return Verdict::Stay;
        };
        let now = context.now;
        let syn = attempt.ticket.syn(upstream, now);
        let timed_out = io::Error::from(io::ErrorKind::TimedOut);
        let has_time = !attempt.time_left(context.upstream, now).is_zero();
        if !has_time {
            context.upstream.read(context.cached).ran_out(&attempt.route, now);
        }
        if now.saturating_duration_since(attempt.since) >= context.upstream.patience() {
            if !has_time {
                attempt.report_failure(context);
            }
            return Verdict::Close(Reason::Unreachable(timed_out));
        }
        match syn {
            _ if !has_time => self.give_up_attempt(timed_out, context),
            Syn::Young => Verdict::Wait(Deadline::Unanswered),
            Syn::Lost | Syn::Left if !attempt.route.is_last() => {
                self.give_up_address(timed_out, context)
            }
            Syn::Lost if !attempt.pass.is_paused() => self.lost(context),
            // The last address has what is left of the time.
            Syn::Lost | Syn::Left => {
                let since = attempt.timed_since(context.upstream);
                Verdict::WaitSince(Deadline::ConnectingLast, since)
            }
        }
    }

    /// Closes the socket of an attempt that has failed with `error`.
    pub(super) fn give_up_attempt(
        &mut self,
        error: io::Error,
        context: &mut Context<'_>,
    ) -> Verdict {
        let Some(attempt) = self.take_dial().map(Dial::close) else { return Verdict::Stay };
        self.attempt_failed(attempt, error, context)
    }

    /// Closes the socket of an address that has failed with `error`.
    fn give_up_address(&mut self, error: io::Error, context: &mut Context<'_>) -> Verdict {
        let Some(attempt) = self.take_dial().map(Dial::close) else { return Verdict::Stay };
        self.next_address(attempt, error, context)
    }

    /// Has one of a crowd whose SYN is lost wait for the window again, before all that came later; or for the upstream, if that
    /// is away by now.
    fn lost(&mut self, context: &mut Context<'_>) -> Verdict {
        let Some(attempt) = self.take_dial().map(Dial::close) else { return Verdict::Stay };
        if let Some(under_way) = attempt.ticket.under_way() {
            under_way.lost(context.now);
        }
        if context.upstream.breaker().is_away() {
            return self.wait(attempt, io::ErrorKind::TimedOut.into(), context);
        }
        Verdict::Hold(attempt.arrived)
    }

    /// Takes the dial that is under way. The client waits, unless something else comes of it.
    fn take_dial(&mut self) -> Option<Dial> {
        match self.replace_state(State::Waiting { hold_permit: None, patience: None }) {
            State::Connecting(dial) => Some(dial),
            other => {
                self.state = other;
                None
            }
        }
    }

    /// Goes on to the next address, if there is one, as the present one has failed with `error`.
    pub(super) fn next_address(
        &mut self,
        mut attempt: Attempt,
        error: io::Error,
        context: &mut Context<'_>,
    ) -> Verdict {
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

    /// Has the client wait for the next attempt, as this one has failed at all addresses, with `error` in the end.
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
        attempt.report_failure(context);
        self.wait(attempt, error, context)
    }

    /// Gives the pass back and waits for the upstream; or for the resume, if a pause has come. No event tells of a client
    /// that has left before.
    fn wait(&mut self, attempt: Attempt, error: io::Error, context: &mut Context<'_>) -> Verdict {
        let Attempt { arrived, since, pass, .. } = attempt;
        self.replace_state(State::Waiting { hold_permit: None, patience: None });
        if let Verdict::Close(reason) = self.look_after_waiting() {
            return Verdict::Close(reason);
        }
        if pass.is_paused() {
            return Verdict::Hold(arrived);
        }
        self.await_upstream(Patience { arrived, since, error: Some(error) }, context)
    }

    /// Goes on when the dial has come to its end, good or bad.
    pub(super) fn connected(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Connecting(Dial { upstream, .. }) = &self.state else { return Verdict::Stay };
        let socket = upstream.socket();
        // A failure is told by the event; asking the kernel again would cost a call for each connection.
        let failure = if upstream.is_reset() { socket.take_dial_error() } else { None };
        let failure = match failure {
            // Where nobody listens others have failed before. The reset leaves the port free at once for who is to listen.
            None if context.upstream.breaker().is_open() && socket.is_self_connected() => {
                socket.reset_on_close();
                Some(io::ErrorKind::ConnectionRefused.into())
            }
            // It was connected, has spoken and was reset since: what it said goes to the client, and the reset behind it.
            Some(_) if socket.peek(&mut [0]).is_ok_and(|bytes| bytes > 0) => None,
            other => other,
        };
        if let Some(error) = failure {
            return self.give_up_address(error, context);
        }
        self.take_dial().map_or(Verdict::Stay, |dial| self.begin_relay(dial, context))
    }

    fn begin_relay(&mut self, dial: Dial, context: &mut Context<'_>) -> Verdict {
        let socket = dial.upstream.socket();
        context.dialer.succeeded(context.upstream);
        if let Some(under_way) = dial.attempt.ticket.under_way() {
            under_way.answered(socket, context.now);
        }
        context.upstream.reached(context.cached, &dial.attempt.route, context.now);
        let Dial { upstream, attempt: Attempt { ticket, pass, .. } } = dial;
        let under_way = ticket.into_under_way();
        let deadline = if under_way.is_some() {
            Deadline::AwaitingFirstByte
        } else {
            Deadline::NoKeepaliveYet
        };
        self.replace_state(State::Relaying(Session {
            relay: Relay::new(upstream),
            under_way,
            moved: context.now,
            asks: false,
            settling: None,
            _pass: pass,
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

    /// Returns the same, once its attempt has come to a good end.
    fn into_under_way(self) -> Option<Box<UnderWay>> {
        match self {
            Self::Window(under_way) => Some(under_way),
            Self::Probe { under_way, .. } => under_way,
            Self::Alone => None,
        }
    }

    /// Begins a dial. Returns true if its SYN may be lost before the kernel repeats it.
    fn dialled(&mut self, now: Instant) -> bool {
        match self {
            Self::Window(under_way) => under_way.dialled(now),
            Self::Alone | Self::Probe { .. } => false,
        }
    }

    /// Looks after the SYN of one of a crowd. All others are the kernel's business.
    fn syn(&self, upstream: &Endpoint, now: Instant) -> Syn {
        match self {
            Self::Window(under_way) => under_way.unanswered(upstream.socket(), now),
            Self::Alone | Self::Probe { .. } => Syn::Left,
        }
    }
}

/// Logs a failure that the upstream is to blame for.
fn log_failure(error: &io::Error, context: &Context<'_>) {
    if !is_shortage(error) {
        context.upstream.log_failure(error, RetryPlan::TriedAgain, context.now);
    }
}

//! The way from a client that is let through to its upstream: every attempt, and what comes of it.

use std::{
    io,
    time::{Duration, Instant},
};

use super::{Connection, Context, Reason, Session, State, Verdict};
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
    upstream::{RetryPlan, Upstream, addresses::Route},
};

/// The attempts to reach the upstream for one client.
#[derive(Debug)]
pub(super) struct Dial {
    /// The attempt that is under way; none while waiting to try again.
    pub(super) upstream: Option<Endpoint>,
    /// What it is dialled by, if others wait along with this client.
    pub(super) turn: ConnectTicket,
    /// The way of the attempt through the upstream's addresses.
    pub(super) route: Route,
    /// Whether one of them failed for want of something of this host's: then all are tried again soon.
    pub(super) in_short: bool,
    /// Why the last attempt has failed.
    pub(super) error: Option<io::Error>,
    /// When the client came.
    pub(super) came: Instant,
    /// Since when it waits for the upstream.
    pub(super) since: Instant,
    /// When the attempt began.
    pub(super) begun: Instant,
    pub(super) pass: Pass,
}

/// What a client is dialled for by.
#[derive(Debug)]
pub(crate) enum ConnectTicket {
    /// Nobody waits but it, or something of this host's was short.
    Its,
    /// It is one of a crowd, of those that may be under way at a time.
    Place(Box<UnderWay>),
    /// It tries an upstream that is away, for all. If it gets through it is the first of a crowd, and needs a place.
    Probe { _right: Permit, place: Option<Box<UnderWay>> },
}

impl Dial {
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
}

impl Connection {
    /// Serves a client that is held, or that is to be rejected and was not touched yet. It came at `came`.
    pub(crate) fn serve(
        &mut self,
        pass: Pass,
        turn: ConnectTicket,
        came: Instant,
        context: &mut Context<'_>,
    ) -> Verdict {
        if self.client.socket().has_gone() {
            return Verdict::Close(Reason::Left);
        }
        self.begin_to_dial(pass, turn, came, context)
    }

    /// Serves a client that was just accepted.
    pub(crate) fn serve_new(&mut self, pass: Pass, context: &mut Context<'_>) -> Verdict {
        // As nobody waits, it may be the one to try an upstream that is away.
        let outage = context.upstream.outage();
        let right = if outage.is_on() { outage.take_probe() } else { None };
        let turn = right.map_or(ConnectTicket::Its, |right| ConnectTicket::Probe {
            _right: right,
            place: None,
        });
        self.begin_to_dial(pass, turn, context.now, context)
    }

    fn begin_to_dial(
        &mut self,
        pass: Pass,
        turn: ConnectTicket,
        came: Instant,
        context: &mut Context<'_>,
    ) -> Verdict {
        let now = context.now;
        // Whom the operator lets through is to find out too.
        let is_to_try = matches!(turn, ConnectTicket::Probe { .. }) || pass.is_paused();
        let waits = context.upstream.outage().is_on() && !is_to_try;
        self.state = State::Connecting(Dial {
            upstream: None,
            turn,
            route: Route::default(),
            in_short: false,
            error: None,
            came,
            since: now,
            begun: now,
            pass,
        });
        if waits { self.wait(context) } else { self.attempt(context) }
    }

    /// Tries again to reach the upstream. A client that has left meanwhile is dropped; a pause
    /// means that no connection to the upstream begins any more, and is waited for like by any other.
    pub(crate) fn redial(&mut self, turn: ConnectTicket, context: &mut Context<'_>) -> Verdict {
        if let Verdict::Close(reason) = self.look_after_held() {
            return Verdict::Close(reason);
        }
        let State::Connecting(dial) = &mut self.state else { return Verdict::Stay };
        // Also one that was let through an earlier pause: during this one it would be held already.
        if dial.pass.is_paused() {
            return Verdict::Hold(dial.came);
        }
        (dial.turn, dial.in_short, dial.begun) = (turn, false, context.now);
        self.attempt(context)
    }

    /// Begins an attempt. It explores only where that leaves enough time for the address that was reached last.
    fn attempt(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Connecting(dial) = &mut self.state else { return Verdict::Stay };
        let upstream = context.upstream;
        let has_time = dial.time_left(upstream, context.now) >= 2 * ADDRESS_TIMEOUT;
        let explores = has_time && context.dialer.may_explore() && !upstream.outage().is_on();
        dial.route = upstream.read(context.cached).route(explores.then_some(context.now));
        self.dial(context)
    }

    /// Waits for the end of an outage; or for the resume, if a pause has come. No event tells of one that has left before.
    pub(super) fn wait(&mut self, context: &mut Context<'_>) -> Verdict {
        if let Verdict::Close(reason) = self.look_after_held() {
            return Verdict::Close(reason);
        }
        let State::Connecting(dial) = &mut self.state else { return Verdict::Stay };
        (dial.upstream, dial.turn) = (None, ConnectTicket::Its);
        if dial.pass.is_paused() {
            return Verdict::Hold(dial.came);
        }
        // It may have moved.
        context.upstream.ask();
        Verdict::WaitSince(Deadline::AwaitingUpstream, dial.since)
    }

    /// Dials the address that is next in the attempt.
    fn dial(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Connecting(dial) = &mut self.state else { return Verdict::Stay };
        let addresses = context.upstream.read(context.cached);
        let Some(address) = addresses.get(&dial.route) else {
            return self.attempt_failed(io::Error::other(addresses.lack()), context);
        };
        let Registration { registry, upstream: token, .. } = context.registration;
        let attempt =
            context.dialer.dial(address, context.upstream).and_then(|(socket, dialled)| {
                socket.register(registry, token)?;
                Ok((socket, dialled))
            });
        match attempt {
            Ok((upstream, Dialled::Connected)) => {
                dial.upstream = Some(Endpoint::connected(upstream));
                self.begin_relay(context)
            }
            Ok((upstream, Dialled::InProgress)) => {
                dial.upstream = Some(Endpoint::connecting(upstream));
                let left = dial.time_left(context.upstream, context.now);
                if dial.turn.dialled(context.now) {
                    Verdict::Wait(Deadline::Unanswered)
                } else if dial.route.is_last() || left <= ADDRESS_TIMEOUT {
                    Verdict::WaitSince(Deadline::ConnectingLast, dial.timed_since(context.upstream))
                } else {
                    Verdict::Wait(Deadline::Connecting)
                }
            }
            Err(error) => self.next_address(error, context),
        }
    }

    /// Goes on when the deadline has passed of an address, of the attempt, or of the wait for the next attempt.
    pub(super) fn dial_expired(&mut self, context: &mut Context<'_>) -> Verdict {
        let syn = self.syn(context.now);
        let State::Connecting(dial) = &mut self.state else { return Verdict::Stay };
        let timed_out = io::Error::from(io::ErrorKind::TimedOut);
        let waits = dial.upstream.is_none();
        let addresses = context.upstream.read(context.cached);
        let has_time = !dial.time_left(context.upstream, context.now).is_zero();
        if !waits && !has_time {
            addresses.ran_out(&dial.route, context.now);
        }
        if context.now.saturating_duration_since(dial.since) >= context.upstream.patience() {
            if !waits && !has_time {
                let was_probe = matches!(dial.turn, ConnectTicket::Probe { .. });
                context.upstream.outage().failed(was_probe, context.now);
            }
            let error = dial.error.take().filter(|_| waits);
            return Verdict::Close(Reason::Unreachable(error.unwrap_or(timed_out)));
        }
        if waits {
            return if dial.pass.is_paused() || context.dialer.may_retry(context.now) {
                self.redial(ConnectTicket::Its, context)
            } else {
                Verdict::Wait(Deadline::RetryConnect)
            };
        }
        match syn {
            _ if !has_time => self.attempt_failed(timed_out, context),
            Syn::Young => Verdict::Wait(Deadline::Unanswered),
            Syn::Lost | Syn::Left if !dial.route.is_last() => self.next_address(timed_out, context),
            Syn::Lost if !dial.pass.is_paused() => self.lost(context),
            // The last address has what is left of the time.
            Syn::Lost | Syn::Left => {
                Verdict::WaitSince(Deadline::ConnectingLast, dial.timed_since(context.upstream))
            }
        }
    }

    /// The present address has failed with `error`: on to the next, if there is one.
    pub(super) fn next_address(&mut self, error: io::Error, context: &mut Context<'_>) -> Verdict {
        let State::Connecting(dial) = &mut self.state else { return Verdict::Stay };
        dial.upstream = None;
        dial.in_short |= is_shortage(&error);
        let is_news = !dial.route.explores();
        let timed_out = error.kind() == io::ErrorKind::TimedOut;
        if !context.upstream.read(context.cached).advance(&mut dial.route, timed_out) {
            return self.attempt_failed(error, context);
        }
        let is_void = dial.pass.is_void();
        if is_news {
            log_failure(&error, context);
        }
        if is_void { self.wait(context) } else { self.dial(context) }
    }

    /// The attempt has failed, with `error` in the end. It is repeated as long as the client has time: soon if something of
    /// this host's was short, and otherwise once the upstream is back.
    pub(super) fn attempt_failed(
        &mut self,
        error: io::Error,
        context: &mut Context<'_>,
    ) -> Verdict {
        log_failure(&error, context);
        let State::Connecting(dial) = &mut self.state else { return Verdict::Stay };
        dial.upstream = None;
        dial.error = Some(error);
        if dial.in_short && !dial.pass.is_paused() {
            if let ConnectTicket::Place(place) =
                std::mem::replace(&mut dial.turn, ConnectTicket::Its)
            {
                place.lost(context.now);
            }
            context.upstream.ask();
            context.dialer.was_short();
            return Verdict::Wait(Deadline::RetryConnect);
        }
        if !dial.in_short {
            let was_probe = matches!(dial.turn, ConnectTicket::Probe { .. });
            context.upstream.outage().failed(was_probe, context.now);
        }
        self.wait(context)
    }

    /// Looks after the SYN of one of a crowd. Those of others are the kernel's business.
    pub(super) fn syn(&self, now: Instant) -> Syn {
        match &self.state {
            State::Connecting(Dial {
                upstream: Some(upstream),
                turn: ConnectTicket::Place(place),
                ..
            }) => place.unanswered(upstream.socket(), now),
            _ => Syn::Left,
        }
    }

    /// Has one of a crowd whose SYN is lost wait for its turn again, before all who came later.
    pub(super) fn lost(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Connecting(Dial { turn: ConnectTicket::Place(place), came, .. }) = &self.state
        else {
            return Verdict::Stay;
        };
        place.lost(context.now);
        Verdict::Hold(*came)
    }

    /// The attempt has come to its end, good or bad.
    pub(super) fn connected(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Connecting(Dial { upstream: Some(upstream), .. }) = &self.state else {
            return Verdict::Stay;
        };
        let socket = upstream.socket();
        // A failure is told by the event; asking the kernel again would cost a call for each connection.
        let failure = if upstream.is_reset() { socket.take_dial_error() } else { None };
        match failure {
            // Where nobody listens others have failed before. The reset leaves the port free at once for who is to listen.
            None if context.upstream.outage().is_on() && socket.is_self_connected() => {
                socket.reset_on_close();
                self.next_address(io::ErrorKind::ConnectionRefused.into(), context)
            }
            None => self.begin_relay(context),
            // It was connected, has spoken and was reset since: what it said goes to the client, and the reset behind it.
            Some(_) if socket.peek(&mut [0]).is_ok_and(|bytes| bytes > 0) => {
                self.begin_relay(context)
            }
            Some(error) => self.next_address(error, context),
        }
    }

    fn begin_relay(&mut self, context: &mut Context<'_>) -> Verdict {
        context.dialer.succeeded(context.upstream);
        if let State::Connecting(Dial { upstream: Some(upstream), turn, .. }) = &self.state
            && let Some(place) = turn.place()
        {
            place.answered(upstream.socket(), context.now);
        }
        match std::mem::replace(&mut self.state, State::Held { place: None }) {
            State::Connecting(Dial { upstream: Some(upstream), turn, route, pass, .. }) => {
                context.upstream.reached(context.cached, &route, context.now);
                let place = turn.into_place();
                let queue = if place.is_some() {
                    Deadline::AwaitingFirstByte
                } else {
                    Deadline::NoKeepaliveYet
                };
                self.state = State::Relaying(Session {
                    relay: Relay::new(upstream),
                    place,
                    moved: context.now,
                    asks: false,
                    settling: None,
                    _pass: pass,
                });
                Verdict::Enter(queue)
            }
            other => {
                self.state = other;
                Verdict::Stay
            }
        }
    }
}

impl ConnectTicket {
    /// Its place, if it has one.
    fn place(&self) -> Option<&UnderWay> {
        match self {
            Self::Place(place) | Self::Probe { place: Some(place), .. } => Some(place),
            Self::Its | Self::Probe { place: None, .. } => None,
        }
    }

    /// The same, once its attempt has come to a good end.
    fn into_place(self) -> Option<Box<UnderWay>> {
        match self {
            Self::Place(place) => Some(place),
            Self::Probe { place, .. } => place,
            Self::Its => None,
        }
    }

    /// Begins an attempt. Returns true if its SYN may be lost before the kernel repeats it.
    fn dialled(&mut self, now: Instant) -> bool {
        match self {
            Self::Place(place) => place.dialled(now),
            Self::Its | Self::Probe { .. } => false,
        }
    }
}

/// Logs what the upstream is to blame for.
fn log_failure(error: &io::Error, context: &Context<'_>) {
    if !is_shortage(error) {
        context.upstream.log_failure(error, RetryPlan::TriedAgain, context.now);
    }
}

//! Clients that wait without a pass: for the resume, behind other clients, or for an upstream that is away.

use std::{io, time::Instant};

use super::{Connection, Context, Rejection, State, Verdict, deadline::Deadline, reject::Reject};
use crate::{admission::semaphore::Permit, stats::cause::CloseCause, upstream::Upstream};

/// Wait of a client for an upstream that is away. It spans the client's attempts until it connects or is held again.
#[derive(Debug)]
pub(super) struct Patience {
    /// Beginning of the wait for the upstream.
    pub(super) since: Instant,
    /// Error of the client's last attempt, if it has made one.
    pub(super) error: Option<io::Error>,
}

impl Connection {
    /// Holds the client, which also ends its wait for the upstream.
    pub(crate) fn hold(&mut self, hold_permit: Option<Permit>) {
        self.replace_state(State::Waiting { hold_permit, patience: None });
        self.record.begin_wait();
    }

    /// Takes the permit to be held, if the client has one.
    pub(crate) fn take_hold_permit(&mut self) -> Option<Permit> {
        match &mut self.state {
            State::Waiting { hold_permit, .. } => hold_permit.take(),
            State::Connecting(_) | State::Relaying(_) | State::Rejecting(_) => None,
        }
    }

    /// Ends a client's wait for the upstream, as a pause has begun: it is to be held.
    pub(crate) fn end_patience(&mut self, context: &mut Context<'_>) -> Verdict {
        let verdict = self.look_after_waiting(context);
        match &self.state {
            _ if !matches!(verdict, Verdict::Stay) => verdict,
            State::Waiting { patience: Some(_), .. } => Verdict::Hold,
            _ => Verdict::Stay,
        }
    }

    /// Begins the wait for the upstream, which is away, for a client that was queued behind others.
    pub(crate) fn begin_patience(&mut self, context: &Context<'_>) -> Verdict {
        if self.has_gone() {
            return Verdict::Close(self.left());
        }
        if self.client.is_read_closed() {
            // No event comes for that, if it came together with the client's header.
            self.client.socket_mut().probe_often();
        }
        self.await_upstream(Patience { since: context.now, error: None }, context)
    }

    /// Makes a client wait for the upstream, as long as its patience lasts.
    pub(super) fn await_upstream(&mut self, patience: Patience, context: &Context<'_>) -> Verdict {
        let since = patience.since;
        self.replace_state(State::Waiting { hold_permit: None, patience: Some(patience) });
        self.record.begin_wait();
        // The upstream's name may have other addresses by now.
        context.upstream.ask();
        Verdict::WaitSince(Deadline::AwaitingUpstream, since)
    }

    /// Looks after a client that has ended its stream while it waits. If it has left, it is closed, so that the upstream is
    /// not dialled for it. Otherwise it may wait for its answer or have left all the same: a pause may have it dropped, and
    /// else the kernel probes it often, to learn of a client that has left.
    pub(super) fn look_after_waiting(&mut self, context: &mut Context<'_>) -> Verdict {
        if !self.client.is_read_closed() {
            return Verdict::Stay;
        }
        let has_gone = self.has_gone();
        if has_gone {
            return Verdict::Close(self.left());
        }
        if context.orders.drops_half_closed() {
            return self.drop_half_closed(context.now);
        }
        self.client.socket_mut().probe_often();
        Verdict::Stay
    }

    /// Drops a client in good order. It is not rejected: it counts as one that has left.
    fn drop_half_closed(&mut self, now: Instant) -> Verdict {
        self.record.waited_until(now);
        let (reject, _next) = Reject::close_gracefully(&mut self.client);
        let cause = CloseCause::LeftHeld;
        self.replace_state(State::Rejecting(Rejection { reject, cause, delivered: (0, 0) }));
        Verdict::Enter(Deadline::Lingering)
    }

    /// Returns true if the client waits and has ended its stream.
    pub(crate) fn is_waiting_half_closed(&self) -> bool {
        matches!(self.state, State::Waiting { .. }) && self.client.is_read_closed()
    }

    /// Returns the cause of the end of a connection whose client has left before it was served.
    pub(super) fn left(&self) -> CloseCause {
        match self.state {
            State::Waiting { patience: None, .. } if self.record.held().is_some() => {
                CloseCause::LeftHeld
            }
            _ => CloseCause::LeftConnecting,
        }
    }

    /// Takes the error by which the upstream could not be reached. None if the client was connected. A client that has
    /// made no attempt has the error of the last one, so that all clients of an outage tell one story.
    pub(crate) fn take_error(&mut self, upstream: &Upstream) -> Option<io::Error> {
        match &mut self.state {
            State::Waiting { patience: Some(patience), .. } => {
                Some(patience.error.take().unwrap_or_else(|| upstream.last_error()))
            }
            State::Waiting { .. } | State::Connecting(_) => Some(io::ErrorKind::TimedOut.into()),
            State::Relaying(_) | State::Rejecting(_) => None,
        }
    }

    /// Returns the time at which the client was accepted, by which waiting clients are served in order.
    pub(crate) fn accepted(&self) -> Instant {
        self.record.accepted()
    }
}

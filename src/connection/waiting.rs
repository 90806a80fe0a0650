//! Clients that wait without a pass: for the resume, behind other clients, or for an upstream that is away.

use std::{io, time::Instant};

use super::{Connection, Context, State, Verdict, deadline::Deadline};
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
    pub(crate) fn end_patience(&mut self) -> Verdict {
        if let Verdict::Close(reason) = self.look_after_waiting() {
            return Verdict::Close(reason);
        }
        match &self.state {
            State::Waiting { patience: Some(_), .. } => Verdict::Hold,
            _ => Verdict::Stay,
        }
    }

    /// Begins the wait for the upstream, which is away, for a client that was queued behind others.
    pub(crate) fn begin_patience(&mut self, context: &Context<'_>) -> Verdict {
        if self.has_gone() {
            return Verdict::Close(self.left());
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

    /// Returns the verdict to close a client that has left while it waits, so that the upstream is not dialled for it.
    pub(super) fn look_after_waiting(&self) -> Verdict {
        let gone = self.client.is_read_closed() && self.has_gone();
        if gone { Verdict::Close(self.left()) } else { Verdict::Stay }
    }

    /// Returns the cause of the end of a connection whose client has left before it was served.
    pub(super) fn left(&self) -> CloseCause {
        match self.state {
            State::Waiting { patience: None, .. } => CloseCause::LeftHeld,
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

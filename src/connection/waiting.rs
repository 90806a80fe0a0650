//! Clients that wait without a pass: for the resume, behind other clients, or for an upstream that is away.

use std::{io, time::Instant};

use super::{Connection, Context, Reason, State, Verdict, deadline::Deadline};
use crate::admission::semaphore::Permit;

/// Wait of a client for an upstream that is away. It spans the client's attempts until it connects or is held again.
#[derive(Debug)]
pub(super) struct Patience {
    pub(super) arrived: Instant,
    /// Beginning of the wait for the upstream.
    pub(super) since: Instant,
    /// Error of the client's last attempt, if it has made one.
    pub(super) error: Option<io::Error>,
}

impl Connection {
    /// Holds the client, which also ends its wait for the upstream.
    pub(crate) fn hold(&mut self, hold_permit: Option<Permit>) {
        self.replace_state(State::Waiting { hold_permit, patience: None });
    }

    /// Takes the permit to be held, if the client has one.
    pub(crate) fn take_hold_permit(&mut self) -> Option<Permit> {
        match &mut self.state {
            State::Waiting { hold_permit, .. } => hold_permit.take(),
            State::Connecting(_) | State::Relaying(_) | State::Rejecting(_) => None,
        }
    }

    /// Returns the arrival of a client that waits for the upstream.
    pub(crate) fn arrived(&self) -> Option<Instant> {
        match &self.state {
            State::Waiting { patience: Some(patience), .. } => Some(patience.arrived),
            _ => None,
        }
    }

    /// Ends a client's wait for the upstream, as a pause has begun: it is to be held.
    pub(crate) fn end_patience(&mut self) -> Verdict {
        if let Verdict::Close(reason) = self.look_after_waiting() {
            return Verdict::Close(reason);
        }
        match &self.state {
            State::Waiting { patience: Some(patience), .. } => Verdict::Hold(patience.arrived),
            _ => Verdict::Stay,
        }
    }

    /// Begins the wait for the upstream, which is away, for a client that came at `arrived` and was queued behind others.
    pub(crate) fn begin_patience(&mut self, arrived: Instant, context: &Context<'_>) -> Verdict {
        if self.client.socket().has_gone() {
            return Verdict::Close(Reason::Left);
        }
        self.await_upstream(Patience { arrived, since: context.now, error: None }, context)
    }

    /// Makes a client wait for the upstream, as long as its patience lasts.
    pub(super) fn await_upstream(&mut self, patience: Patience, context: &Context<'_>) -> Verdict {
        let since = patience.since;
        self.replace_state(State::Waiting { hold_permit: None, patience: Some(patience) });
        // The upstream's name may have other addresses by now.
        context.upstream.ask();
        Verdict::WaitSince(Deadline::AwaitingUpstream, since)
    }

    /// Returns the verdict to close a client that has left while it waits, so that the upstream is not dialled for it.
    pub(super) fn look_after_waiting(&self) -> Verdict {
        let gone = self.client.is_read_closed() && self.client.socket().has_gone();
        if gone { Verdict::Close(Reason::Left) } else { Verdict::Stay }
    }
}

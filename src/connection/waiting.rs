//! Clients that wait without a pass: for the resume, for their turn, or for an upstream that is away.

use std::{io, time::Instant};

use super::{Connection, Context, Reason, State, Verdict, deadline::Deadline};
use crate::admission::semaphore::Permit;

/// Patience of a client with an upstream that is away: the facts that outlast each of its attempts.
#[derive(Debug)]
pub(super) struct Patience {
    /// When the client came.
    pub(super) arrived: Instant,
    /// Since when it waits for the upstream.
    pub(super) since: Instant,
    /// Error of its last attempt, if it has made one.
    pub(super) error: Option<io::Error>,
}

impl Connection {
    /// Holds a client that waits.
    pub(crate) fn hold(&mut self, hold_permit: Option<Permit>) {
        self.replace_state(State::Waiting { hold_permit, patience: None });
    }

    /// Takes the permit to be held.
    pub(crate) fn take_hold_permit(&mut self) -> Option<Permit> {
        match &mut self.state {
            State::Waiting { hold_permit, .. } => hold_permit.take(),
            State::Connecting(_) | State::Relaying(_) | State::Rejecting(_) => None,
        }
    }

    /// Returns the moment at which a client that waits for the upstream came.
    pub(crate) fn arrived(&self) -> Option<Instant> {
        match &self.state {
            State::Waiting { patience: Some(patience), .. } => Some(patience.arrived),
            _ => None,
        }
    }

    /// Has a client that waits for the upstream wait for the resume instead, as a pause has come.
    pub(crate) fn end_patience(&mut self) -> Verdict {
        if let Verdict::Close(reason) = self.look_after_waiting() {
            return Verdict::Close(reason);
        }
        match &self.state {
            State::Waiting { patience: Some(patience), .. } => Verdict::Hold(patience.arrived),
            _ => Verdict::Stay,
        }
    }

    /// Has a client that came at `arrived` and waits for its turn wait for the upstream instead, which is away.
    pub(crate) fn begin_patience(&mut self, arrived: Instant, context: &Context<'_>) -> Verdict {
        if self.client.socket().has_gone() {
            return Verdict::Close(Reason::Left);
        }
        self.await_upstream(Patience { arrived, since: context.now, error: None }, context)
    }

    /// Has a client wait for an upstream that is away, for as long as its patience lasts.
    pub(super) fn await_upstream(&mut self, patience: Patience, context: &Context<'_>) -> Verdict {
        let since = patience.since;
        self.replace_state(State::Waiting { hold_permit: None, patience: Some(patience) });
        // It may have moved.
        context.upstream.ask();
        Verdict::WaitSince(Deadline::AwaitingUpstream, since)
    }

    /// Drops a client that waits and has gone: it is not dialled for any more.
    pub(super) fn look_after_waiting(&self) -> Verdict {
        let gone = self.client.is_read_closed() && self.client.socket().has_gone();
        if gone { Verdict::Close(Reason::Left) } else { Verdict::Stay }
    }
}

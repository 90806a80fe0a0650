//! A connection as an operator sees, chooses and ends it.

use std::time::Instant;

use super::{
    Connection, Context, Rejection, Session, State, Verdict, deadline::Deadline, record::millis,
    reject::Reject,
};
use crate::{
    listing::{ConnectionId, ConnectionState, Entry, Filter, KillMode, UpstreamFilter},
    stats::cause::CloseCause,
    sys::SocketAddress,
};

impl Connection {
    /// Returns the id of the client.
    pub(crate) fn id(&self) -> ConnectionId {
        self.record.id()
    }

    /// Returns true if all conditions of `filter` hold.
    pub(crate) fn is_chosen_by(&self, filter: &Filter, now: Instant) -> bool {
        let Filter { id, state, client, upstream, older, idle } = filter;
        let lasts = |since, least| now.saturating_duration_since(since) >= least;
        let moved = match &self.state {
            State::Relaying(session) => Some(session.moved),
            _ => None,
        };
        id.is_none_or(|id| id == self.id())
            && state.is_none_or(|state| state == self.listed_state())
            && older.is_none_or(|least| lasts(self.accepted(), least))
            && idle.is_none_or(|least| moved.is_some_and(|moved| lasts(moved, least)))
            && client.is_none_or(|net| self.record.client().is_some_and(|it| net.contains(it.ip())))
            && upstream.as_ref().is_none_or(|UpstreamFilter { name, at }| {
                self.target().is_some_and(|it| it.address() == name)
                    || at.is_some() && self.upstream_address() == *at
            })
    }

    /// Returns the entry of the list.
    pub(crate) fn entry(&self, now: Instant) -> Entry {
        let seconds = |since| millis(now.saturating_duration_since(since).as_secs_f64());
        let (mut idle, mut owes) = (None, None);
        let ((to_upstream, to_client), half_closed) = match &self.state {
            State::Relaying(Session { relay, moved, asks, .. }) => {
                idle = Some(seconds(*moved));
                owes = (*asks && relay.can_answer()).then_some("upstream");
                (relay.delivered(), relay.is_half_closed())
            }
            State::Rejecting(Rejection { delivered, .. }) => {
                (*delivered, self.client.is_read_closed())
            }
            State::Waiting { .. } | State::Connecting(_) => ((0, 0), self.client.is_read_closed()),
        };
        let held = match &self.state {
            State::Waiting { .. } => Some(seconds(self.accepted())),
            _ => self.record.held().map(|held| millis(held.as_secs_f64())),
        };
        Entry {
            id: self.id(),
            state: self.listed_state(),
            client: self.client_name(),
            upstream: self.upstream_address().map(|address| address.to_string()),
            age_seconds: seconds(self.accepted()),
            idle_seconds: idle,
            held_seconds: held,
            bytes_to_upstream: to_upstream,
            bytes_to_client: to_client,
            half_closed,
            owes,
        }
    }

    fn listed_state(&self) -> ConnectionState {
        match &self.state {
            State::Waiting { .. } => ConnectionState::Held,
            State::Connecting(_) => ConnectionState::Connecting,
            State::Relaying(_) => ConnectionState::Active,
            State::Rejecting(_) => ConnectionState::Rejecting,
        }
    }

    /// Returns the address of the upstream of a relayed connection, as the kernel tells it of UNIX sockets.
    fn upstream_address(&self) -> Option<SocketAddress> {
        let State::Relaying(session) = &self.state else { return None };
        match self.record.upstream() {
            Some(address) => Some(SocketAddress::Inet(address)),
            None => session.relay.upstream().socket().peer_address(),
        }
    }

    /// Ends the connection by order of an operator. A stream that would be cut is reset in any case, so that it never looks
    /// whole.
    pub(crate) fn kill(&mut self, how: KillMode, context: &mut Context<'_>) -> Verdict {
        let resets = how == KillMode::Reset;
        match &mut self.state {
            State::Relaying(session) => {
                let is_cut = session.settling.is_some()
                    || !resets && session.relay.has_undelivered(&mut self.client);
                if !resets && !is_cut {
                    return self.end_session(CloseCause::KilledOperator, context);
                }
            }
            // An earlier kill may have closed it in order. Then its end for the same cause is no reset.
            State::Rejecting(_) if resets => self.reset_on_close(),
            // It has its answer, or is about to get the rest.
            State::Rejecting(it) if it.reject.is_lingering() => return Verdict::Stay,
            _ if resets => {}
            _ => return self.dismiss(context),
        }
        Verdict::Close(CloseCause::KilledOperator)
    }

    /// Ends the stream to a client that has no upstream yet, without an answer, and discards what it still sends.
    fn dismiss(&mut self, context: &mut Context<'_>) -> Verdict {
        let cause = CloseCause::KilledOperator;
        let before = self.replace_state(State::Waiting { hold_permit: None, patience: None });
        let (reject, _next) = Reject::close_gracefully(&mut self.client);
        self.replace_state(State::Rejecting(Rejection { reject, cause, delivered: (0, 0) }));
        match before {
            State::Connecting(dial) => {
                let attempt = dial.close(context.registration.registry);
                Verdict::Linger(attempt.into_pass())
            }
            State::Waiting { .. } => {
                self.record.waited_until(context.now);
                Verdict::Enter(Deadline::Lingering)
            }
            State::Rejecting(_) | State::Relaying(_) => Verdict::Enter(Deadline::Lingering),
        }
    }
}

//! A client's connection: one enum for its state, and every legal transition.
//!
//! | from | event | to |
//! |---|---|---|
//! | | the client is accepted | waiting |
//! | waiting | the client is admitted, and an attempt begins | connecting |
//! | waiting | the client is admitted, and the dial connects at once | relaying |
//! | waiting | the upstream goes away, or a pause begins | waiting, for that to end |
//! | waiting | a pause rejects clients, or `hold.max` or `hold.timeout` is reached | rejecting |
//! | connecting | the next address is dialled | connecting |
//! | connecting | the upstream is connected | relaying |
//! | connecting | the attempt has failed, or its SYN is lost | waiting |
//! | relaying | the connection is quiet while a pause or a stop waits for it | rejecting |
//! | rejecting | a resume admits the client before it was answered | connecting, relaying |
//! | rejecting | the same, but the upstream is away | waiting |
//! | any | the connection ends | closed |
//!
//! [`State::may_become`] is this table, by which debug builds and the simulation check each change of the state. Between
//! dials, and before the relay, the state is *waiting* for a moment, from which every change is legal. So the changes
//! from *connecting* to *connecting* and *relaying* are not checked as such.
//!
//! Each state owns its resources. Only *connecting* and *relaying* own a [`Pass`], so a client that waits or is rejected
//! *cannot* be counted as active.

mod connect;
pub(crate) mod deadline;
pub(crate) mod endpoint;
mod header;
mod listed;
pub(crate) mod pipe;
pub(crate) mod quiet;
mod record;
pub(crate) mod reject;
mod rejection;
pub(crate) mod relay;
mod waiting;
pub(crate) mod words;

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

pub(crate) use connect::ConnectTicket;
use connect::Dial;
use mio::{Registry, Token, event::Event};

use crate::{
    admission::{
        hold::{HoldLimits, Overflow},
        pace::UnderWay,
        semaphore::Permit,
    },
    listing::ConnectionId,
    pause::{drain::DrainOrders, gate::Pass},
    proxy_header::ProxyHeaders,
    stats::{Counters, cause::CloseCause},
    sys::{Socket, SocketAddress},
    upstream::{Cached, Upstream, dialer::Dialer, targets::TargetUse},
    worker_pool::WorkerPool,
};
use deadline::Deadline;
use endpoint::Endpoint;
use endpoint::Registration;
use header::ClientHeader;
use quiet::QuietLimits;
use record::Record;
use reject::Reject;
use reject::policy::RejectPolicy;
use relay::{Relay, RelayBuffers, Side};
use waiting::Patience;

/// Checks for a peer's acknowledgements in quick succession. Most peers acknowledge within a round trip. A peer that
/// takes longer counts as stalled, and is checked more rarely.
const QUICK_LOOKS_MAX: u8 = 8;

/// Longest wait for an acknowledgement of one side after a reset of the other. It begins anew with each acknowledgement.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(30);

/// A client with its state.
#[derive(Debug)]
pub(crate) struct Connection {
    // Fields are dropped in this order: the client's socket, then the upstream's and the pass (in `State`), then the
    // permit. So the counts fall only after the sockets are closed.
    client: Endpoint,
    state: State,
    record: Record,
    /// Permit that counts the client among all clients.
    _permit: Permit,
}

/// State of a connection.
#[derive(Debug)]
enum State {
    /// Wait without a pass: for the resume, behind other clients, or for an upstream that is away (`patience`). The
    /// client's bytes are not read.
    Waiting { hold_permit: Option<Permit>, patience: Option<Patience> },
    /// Dial of the upstream.
    Connecting(Dial),
    /// Relay of bytes between client and upstream.
    Relaying(Session),
    /// Answer to a client that is not served, and the discarding of its bytes.
    Rejecting(Rejection),
}

/// A relay with its pass.
#[derive(Debug)]
struct Session {
    relay: Relay,
    /// Share of the window, until the upstream shows that it has taken the connection out of its backlog.
    under_way: Option<Box<UnderWay>>,
    /// Time of the last progress: a delivered byte or, after a reset of one side, an acknowledgement of the other.
    moved: Instant,
    /// Set if the last delivered byte was the client's, which may wait for an answer.
    asks: bool,
    /// Wait for the acknowledgements of the other side, once one side was reset.
    settling: Option<AwaitingAcks>,
    /// Upstream that it leads to.
    target: TargetUse,
    pass: Pass,
}

/// A rejection with its cause.
#[derive(Debug)]
struct Rejection {
    reject: Reject,
    cause: CloseCause,
    /// Bytes that were carried before to the upstream and to the client.
    delivered: (u64, u64),
}

/// Wait for the acknowledgements of one side after a reset of the other.
#[derive(Debug, Clone, Copy)]
struct AwaitingAcks {
    /// Side that was the first to reset; none if neither has.
    aborted: Option<Side>,
    /// Memory of the unacknowledged bytes at the last check.
    unacknowledged: u32,
    /// Number of checks after the first.
    looks: u8,
}

/// Next step of the worker for a connection.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Wait for an event, and keep the deadline.
    Stay,
    /// Drive it again in the next turn.
    Again,
    /// Wait for an event, with this deadline from now on.
    Wait(Deadline),
    /// The same, but drive it at once: its next state may go on without an event.
    Enter(Deadline),
    /// Linger, and drop the pass once the counts are published: the drop may make the proxy idle.
    Linger(Pass),
    /// Wait for an event, with this deadline from that time on.
    WaitSince(Deadline, Instant),
    /// Serve it, hold it or reject it: its header is there.
    Admit,
    /// Hold it for the resume or behind other clients, in the order of arrival.
    Hold,
    /// Close it.
    Close(CloseCause),
}

impl State {
    /// Returns true if the table of transitions has the one from this state to `next`.
    fn may_become(&self, next: &Self) -> bool {
        match (self, next) {
            (Self::Waiting { .. }, _) => true,
            (Self::Connecting(_) | Self::Rejecting(_), next) => !matches!(next, Self::Rejecting(_)),
            (Self::Relaying(_), next) => matches!(next, Self::Rejecting(_)),
        }
    }
}

/// Resources that a worker lends to the connection it drives.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) registration: Registration<'a>,
    pub(crate) buffers: &'a mut RelayBuffers,
    pub(crate) upstream: &'a Upstream,
    /// The worker's copy of the upstream's addresses.
    pub(crate) cached: &'a mut Cached,
    pub(crate) dialer: &'a mut Dialer,
    pub(crate) reject_policy: &'a RejectPolicy,
    pub(crate) proxy_headers: &'a ProxyHeaders,
    pub(crate) hold: &'a HoldLimits,
    /// Orders of the pauses.
    pub(crate) orders: &'a DrainOrders,
    /// Counters of this worker.
    pub(crate) counters: &'a Counters,
    /// All workers, for sums of their counters.
    pub(crate) workers: &'a WorkerPool,
    /// Steps that TLS handshakes may still take in this turn.
    pub(crate) handshake_steps: &'a mut usize,
    /// Beginning of the turn.
    pub(crate) now: Instant,
}

impl Connection {
    /// Registers the client's socket.
    pub(crate) fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        self.client.socket().register(registry, token)
    }

    /// Returns the connection of an accepted client, in the waiting state.
    pub(crate) fn new(
        client: Socket,
        address: Option<SocketAddr>,
        permit: Permit,
        hold_permit: Option<Permit>,
        now: Instant,
    ) -> Self {
        Self {
            client: Endpoint::connected(client),
            state: State::Waiting { hold_permit, patience: None },
            record: Record::new(address, now),
            _permit: permit,
        }
    }

    /// Records the id of the client, and its arrival.
    pub(crate) fn admitted(&mut self, id: ConnectionId, now: Instant) {
        self.record.admitted(id, now);
    }

    /// Remembers the readiness of the client's socket that an event reports.
    pub(crate) fn mark_client(&mut self, event: &Event) {
        self.client.mark(event);
    }

    /// Remembers the readiness of the upstream's socket that an event reports.
    pub(crate) fn mark_upstream(&mut self, event: &Event) {
        match &mut self.state {
            State::Connecting(dial) => dial.upstream.mark(event),
            State::Relaying(session) => session.relay.upstream_mut().mark(event),
            State::Waiting { .. } | State::Rejecting(_) => {}
        }
    }

    /// Replaces the state, and returns the former one.
    fn replace_state(&mut self, state: State) -> State {
        debug_assert!(self.state.may_become(&state), "{:?} becomes {state:?}", self.state);
        std::mem::replace(&mut self.state, state)
    }

    /// Goes on as far as the readiness of the sockets allows.
    pub(crate) fn drive(&mut self, context: &mut Context<'_>) -> Verdict {
        match &mut self.state {
            State::Waiting { .. } if self.record.header == ClientHeader::Awaited => {
                self.look_for_header(false, context)
            }
            State::Waiting { .. } => self.look_after_waiting(context),
            State::Connecting(dial) if dial.upstream.is_writable() => self.connected(context),
            State::Connecting(_) if self.client.is_reset() => Verdict::Close(self.left()),
            State::Connecting(_) => Verdict::Stay,
            State::Relaying(_) => self.relay(context),
            State::Rejecting(Rejection { reject, .. }) => {
                let scratch = &mut context.buffers.scratch;
                let steps = &mut *context.handshake_steps;
                let next = reject.drive(&mut self.client, context.reject_policy, scratch, steps);
                self.rejecting(next, context)
            }
        }
    }

    /// Goes on when the connection's deadline has passed.
    pub(crate) fn expire(&mut self, context: &mut Context<'_>) -> Verdict {
        match &mut self.state {
            State::Waiting { patience: Some(_), .. } => Verdict::Close(CloseCause::Unreachable),
            State::Waiting { .. } if self.record.header == ClientHeader::Awaited => {
                self.look_for_header(true, context)
            }
            State::Waiting { .. } => {
                self.record.waited_until(context.now);
                if context.hold.overflow() == Overflow::Close {
                    self.close_gracefully(CloseCause::HoldTimeout, context)
                } else {
                    self.reject(CloseCause::HoldTimeout, context)
                }
            }
            State::Connecting(_) => self.dial_expired(context),
            State::Relaying(session) if session.settling.is_none() => {
                let upstream = session.relay.upstream().socket();
                let Some(under_way) = &session.under_way else {
                    upstream.keep_alive();
                    return Verdict::Wait(Deadline::Relaying);
                };
                if !under_way.unheard(upstream, context.now) {
                    return Verdict::Wait(Deadline::AwaitingFirstByte);
                }
                session.under_way = None;
                Verdict::Wait(Deadline::NoKeepaliveYet)
            }
            State::Relaying(_) => self.relay(context),
            State::Rejecting(Rejection { reject, .. }) => {
                let next = reject.expire(&mut self.client, context.reject_policy);
                self.rejecting(next, context)
            }
        }
    }

    /// Returns true if the connection has a pass.
    pub(crate) fn is_served(&self) -> bool {
        matches!(self.state, State::Connecting(_) | State::Relaying(_))
    }

    /// Returns true if the upstream's socket leads back to tcpause itself, whose addresses are `own`.
    pub(crate) fn is_loop(&self, own: &[SocketAddress]) -> bool {
        matches!(&self.state, State::Relaying(it) if it.relay.upstream().socket().is_loop(own))
    }

    /// Returns the time from which `limits` allow the connection to be closed as quiet. None while bytes are on their
    /// way, or while the client spoke last and the upstream may still answer.
    pub(crate) fn quiet_at(&self, limits: QuietLimits) -> Option<Instant> {
        match &self.state {
            State::Relaying(Session { relay, moved, asks, settling: None, .. })
                if relay.is_at_rest(&self.client) && !(*asks && relay.can_answer()) =>
            {
                moved.checked_add(limits.of(relay.can_answer(), relay.is_postgres_idle())?)
            }
            _ => None,
        }
    }

    /// Checks for a peer that has vanished while bytes were on their way to it.
    pub(crate) fn look_for_vanished(&mut self) -> Verdict {
        let State::Relaying(session) = &mut self.state else { return Verdict::Stay };
        let has_vanished = session.relay.give_up_vanished(&mut self.client);
        if has_vanished { Verdict::Again } else { Verdict::Stay }
    }

    /// Ends a quiet connection in good order: both sides get the end of the stream. The client's bytes until it notices
    /// are read and discarded, as a close with unread bytes would be a reset. A half-closed connection is closed at
    /// once, as the end that was passed on has long been noticed.
    pub(crate) fn end_quiet(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Relaying(session) = &mut self.state else { return Verdict::Stay };
        if !session.relay.is_silent(&mut self.client) {
            session.moved = context.now;
            return Verdict::Again;
        }
        context.counters.drained.add(1);
        if session.relay.is_half_closed() {
            return Verdict::Close(CloseCause::Drained);
        }
        self.end_session(CloseCause::Drained, context)
    }

    /// Ends a relayed connection in good order.
    fn end_session(&mut self, cause: CloseCause, context: &mut Context<'_>) -> Verdict {
        let State::Relaying(session) = &mut self.state else { return Verdict::Stay };
        let delivered = session.relay.delivered();
        session.relay.upstream().deregister(context.registration.registry);
        // The client gets its end before the pass is dropped, so that it is sent by the time the proxy counts as idle.
        let reject = if session.relay.can_answer() {
            Reject::close_gracefully(&mut self.client).0
        } else {
            Reject::behind_end()
        };
        match self.replace_state(State::Rejecting(Rejection { reject, cause, delivered })) {
            // The upstream's socket is closed here.
            State::Relaying(Session { pass, .. }) => Verdict::Linger(pass),
            _ => Verdict::Enter(Deadline::Lingering),
        }
    }

    /// Ends the registrations of sockets that another process may have, too. The connection is closed next.
    pub(crate) fn deregister(&self, registry: &Registry) {
        self.client.deregister(registry);
        match &self.state {
            State::Connecting(dial) => dial.upstream.deregister(registry),
            State::Relaying(session) => session.relay.upstream().deregister(registry),
            State::Waiting { .. } | State::Rejecting(_) => {}
        }
    }

    /// Closes the connection. A close that is no orderly end is a reset, so that a cut stream never looks whole.
    pub(crate) fn close(self, cause: CloseCause) {
        // The client has had the end of the stream for that cause.
        let is_told = matches!(&self.state, State::Rejecting(it) if it.cause == cause);
        if cause.is_reset() && !is_told {
            self.reset_on_close();
        }
    }

    fn reset_on_close(&self) {
        self.client.socket().reset_on_close();
        if let State::Relaying(session) = &self.state {
            session.relay.upstream().socket().reset_on_close();
        }
    }

    fn relay(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Relaying(session) = &mut self.state else { return Verdict::Stay };
        let progress =
            session.relay.drive(&mut self.client, context.buffers, &context.registration);
        context.counters.bytes_to_upstream.add(progress.to_upstream);
        context.counters.bytes_to_client.add(progress.to_client);
        context.counters.spliced_to_upstream.add(progress.spliced_to_upstream);
        context.counters.spliced_to_client.add(progress.spliced_to_client);
        if progress.to_upstream + progress.to_client > 0 {
            // If both sides have sent in this turn, the client may have been the last.
            (session.moved, session.asks) = (context.now, progress.to_upstream > 0);
        }
        match progress.next {
            relay::Next::Wait => {
                session.ask_about_header(&self.record, context);
                let is_heard = session.relay.delivered().1 > 0;
                match session.under_way.take_if(|_under_way| is_heard) {
                    Some(under_way) => {
                        under_way.heard(context.now);
                        context.upstream.breaker().made_room(context.now);
                        Verdict::Wait(Deadline::NoKeepaliveYet)
                    }
                    None => Verdict::Stay,
                }
            }
            relay::Next::Again => Verdict::Again,
            relay::Next::Close => Verdict::Close(CloseCause::Ended),
            relay::Next::Reset(side) => {
                if side == Side::Upstream {
                    session.ask_about_header(&self.record, context);
                }
                let first = session.settling.and_then(|it| it.aborted).unwrap_or(side);
                Verdict::Close(session.relay.reset_cause(first, &self.client))
            }
            relay::Next::Settle { unacknowledged, aborted } => {
                // The connection is no longer in anyone's backlog, and may stay in this state for long.
                session.under_way = None;
                let before = session.settling.take();
                if before.is_none_or(|it| it.unacknowledged != unacknowledged) {
                    session.moved = context.now;
                }
                if context.now.duration_since(session.moved) >= SETTLE_TIMEOUT {
                    return Verdict::Close(CloseCause::Stalled);
                }
                let looks = before.map_or(0, |it| it.looks.saturating_add(1));
                let aborted = before.map_or(aborted, |it| it.aborted.or(aborted));
                session.settling = Some(AwaitingAcks { aborted, unacknowledged, looks });
                let deadline = if looks < QUICK_LOOKS_MAX {
                    Deadline::AwaitingAcks
                } else {
                    Deadline::Stalled
                };
                Verdict::Wait(deadline)
            }
        }
    }
}

impl Drop for Connection {
    /// Resets both sides if the worker panics, as a cut stream must not look like an orderly end.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.reset_on_close();
        }
    }
}

#[cfg(test)]
mod tests;

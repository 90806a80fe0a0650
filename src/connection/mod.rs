//! A client's connection: one enum for its state, and every legal transition.
//!
//! | from | event | to |
//! |---|---|---|
//! | | the client is accepted | waiting |
//! | waiting | it is admitted, and an attempt begins | connecting |
//! | waiting | it is admitted, and connected at once | relaying |
//! | waiting | the upstream is away, or it is held as a pause has come | waiting |
//! | waiting | a pause rejects, or a bound of held clients is reached | rejecting |
//! | connecting | the next address is dialled | connecting |
//! | connecting | the upstream is connected | relaying |
//! | connecting | the attempt has failed, or its SYN is lost | waiting |
//! | relaying | it is quiet while a pause or a stop waits for it | rejecting |
//! | rejecting | it is admitted after a resume, and was not touched yet | connecting, relaying |
//! | rejecting | the same, and the upstream is away | waiting |
//! | any | it ends | closed |
//!
//! [`State::may_become`] is this table; debug builds check each transition by it, and so does the simulation.
//!
//! A state owns what it may use and nothing else. Only a client that is connecting or relaying has a [`Pass`], so one that
//! waits or is rejected *cannot* be counted as active.

mod connect;
pub(crate) mod deadline;
pub(crate) mod endpoint;
pub(crate) mod pipe;
pub(crate) mod reject;
pub(crate) mod relay;
mod waiting;

use std::{
    fmt, io,
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
    pause::gate::Pass,
    stats::Counters,
    sys::{Socket, SocketAddress},
    upstream::{Cached, Upstream, dialer::Dialer},
};
use deadline::Deadline;
use endpoint::Endpoint;
use endpoint::Registration;
use reject::Reject;
use reject::policy::RejectPolicy;
use relay::Relay;
use relay::RelayBuffers;
use waiting::Patience;

/// Looks in quick succession at what a peer has yet to acknowledge. Most acknowledge within a round trip, and those that stall
/// are looked at more rarely, at a pace over all of them.
const QUICK_LOOKS_MAX: u8 = 8;

/// How long a side that was not aborted may take nothing of what the aborted one had sent.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(30);

/// A client and what is being done for it.
#[derive(Debug)]
pub(crate) struct Connection {
    // The order of the fields is the order in which they are dropped: the client's socket, then the upstream's and the
    // pass (in `State`), then the slot.
    client: Endpoint,
    state: State,
    /// Who the client is, if that is going to be logged: a socket that was reset does not tell any more.
    peer: Option<Box<str>>,
    _permit: Permit,
}

/// What is being done for a client.
#[derive(Debug)]
enum State {
    /// It waits without a pass: for the resume, for its turn, or for an upstream that is away. Nothing of it is read. It may
    /// have a permit to be held.
    Waiting { hold_permit: Option<Permit>, patience: Option<Patience> },
    /// Its upstream is being dialled.
    Connecting(Dial),
    /// Bytes are carried.
    Relaying(Session),
    /// It gets its refusal.
    Rejecting(Reject),
}

/// A relay and the pass that it is carried with.
#[derive(Debug)]
struct Session {
    relay: Relay,
    /// Its share of the window, until something shows that the upstream has taken it out of its backlog.
    under_way: Option<Box<UnderWay>>,
    /// When a byte last came through, or the other side of an aborted one last took something.
    moved: Instant,
    /// Whether that was one of the client's: then it may wait for an answer.
    asks: bool,
    /// The wait for acknowledgements, once one side was aborted.
    settling: Option<AwaitingAcks>,
    _pass: Pass,
}

/// Looks at what the other side of an aborted one has yet to acknowledge.
#[derive(Debug, Clone, Copy)]
struct AwaitingAcks {
    /// The memory of it at the last look.
    under_way: u32,
    looks: u8,
}

/// What comes next for a connection.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// An event, or the deadline it had.
    Stay,
    /// Another turn.
    Again,
    /// An event, or the deadline of this queue, which begins now.
    Wait(Deadline),
    /// The same, and being driven at once: it may go on already.
    Enter(Deadline),
    /// An event, or the deadline of this queue, which began at this moment.
    WaitSince(Deadline, Instant),
    /// The resume, or its turn: it waits in the order of arrival, and came at this moment.
    Hold(Instant),
    /// Nothing: close it.
    Close(Reason),
}

/// Why a connection is closed.
#[derive(Debug)]
pub(crate) enum Reason {
    /// Both streams have ended.
    Ended,
    /// One side was aborted, and so is the other.
    Reset,
    /// One side was aborted, and the other does not take what came before.
    Stalled,
    /// The client left before it was served.
    Left,
    /// The client was rejected, or did not wait for it.
    Rejected,
    /// The upstream cannot be reached.
    Unreachable(io::Error),
    /// It was silent, and nobody owed anything, while a pause or a stop waited for it.
    Quiet,
    /// The operator wanted the proxy idle, whatever it costs.
    Killed,
    /// The proxy stops.
    Stopped,
}

/// Durations of silence after which connections are closed as quiet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct QuietLimits {
    /// For any connection; none if they may be silent for ever.
    pub(crate) any: Option<Duration>,
    /// For one whose upstream has ended its stream.
    pub(crate) ended: Option<Duration>,
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

impl QuietLimits {
    fn of(self, can_answer: bool) -> Option<Duration> {
        if can_answer { self.any } else { self.any.into_iter().chain(self.ended).min() }
    }
}

/// What a worker lends to the connection it drives.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    /// Where its sockets are registered.
    pub(crate) registration: Registration<'a>,
    /// What bytes pass through.
    pub(crate) buffers: &'a mut RelayBuffers,
    /// Where the upstream is.
    pub(crate) upstream: &'a Upstream,
    /// The worker's copy of that.
    pub(crate) cached: &'a mut Cached,
    /// How the worker's dials fare.
    pub(crate) dialer: &'a mut Dialer,
    /// How clients are rejected.
    pub(crate) reject_policy: &'a RejectPolicy,
    /// How clients are held.
    pub(crate) hold: &'a HoldLimits,
    /// What the worker counts.
    pub(crate) counters: &'a Counters,
    /// How many more steps TLS handshakes may take in this turn.
    pub(crate) handshake_steps: &'a mut usize,
    /// When the turn began.
    pub(crate) now: Instant,
}

impl Connection {
    /// Registers the client's socket.
    pub(crate) fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        self.client.socket().register(registry, token)
    }

    /// Returns the connection of a client that was just accepted. It waits, with a permit to be held if it will need one.
    pub(crate) fn new(client: Socket, permit: Permit, hold_permit: Option<Permit>) -> Self {
        let peer = log::log_enabled!(log::Level::Debug).then(|| client.peer().into());
        Self {
            client: Endpoint::connected(client),
            state: State::Waiting { hold_permit, patience: None },
            peer,
            _permit: permit,
        }
    }

    /// Remembers what an event tells of the client.
    pub(crate) fn mark_client(&mut self, event: &Event) {
        self.client.mark(event);
    }

    /// Remembers what an event tells of the upstream.
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

    /// Rejects a client that was just accepted.
    pub(crate) fn reject(&mut self, context: &mut Context<'_>) -> Verdict {
        let (reject, next) = Reject::new(&mut self.client, context.reject_policy);
        self.replace_state(State::Rejecting(reject));
        self.rejecting(next, context)
    }

    /// Ends our stream to a client that is not served, without a word.
    pub(crate) fn close_gracefully(&mut self, context: &mut Context<'_>) -> Verdict {
        let (reject, next) = Reject::close_gracefully(&mut self.client);
        self.replace_state(State::Rejecting(reject));
        self.rejecting(next, context)
    }

    /// Begins the TLS handshake with a client to reject that waits for it.
    pub(crate) fn begin_handshake(&mut self, permit: Permit, context: &mut Context<'_>) -> Verdict {
        let State::Rejecting(reject) = &mut self.state else { return Verdict::Stay };
        let next = reject.begin_handshake(permit, context.reject_policy);
        self.rejecting(next, context)
    }

    /// Goes as far as the readiness of the sockets allows.
    pub(crate) fn drive(&mut self, context: &mut Context<'_>) -> Verdict {
        match &mut self.state {
            State::Waiting { .. } => self.look_after_waiting(),
            State::Connecting(dial) if dial.upstream.is_writable() => self.connected(context),
            State::Connecting(_) if self.client.is_reset() => Verdict::Close(Reason::Left),
            State::Connecting(_) => Verdict::Stay,
            State::Relaying(_) => self.relay(context),
            State::Rejecting(reject) => {
                let scratch = &mut context.buffers.scratch;
                let steps = &mut *context.handshake_steps;
                let next = reject.drive(&mut self.client, context.reject_policy, scratch, steps);
                self.rejecting(next, context)
            }
        }
    }

    /// The deadline of the queue it stands in has passed.
    pub(crate) fn expire(&mut self, context: &mut Context<'_>) -> Verdict {
        match &mut self.state {
            State::Waiting { patience: Some(patience), .. } => {
                let error = patience.error.take();
                let error = error.unwrap_or_else(|| io::ErrorKind::TimedOut.into());
                Verdict::Close(Reason::Unreachable(error))
            }
            State::Waiting { .. } if context.hold.overflow() == Overflow::Close => {
                self.close_gracefully(context)
            }
            State::Waiting { .. } => self.reject(context),
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
            State::Rejecting(reject) => {
                let next = reject.expire(&mut self.client, context.reject_policy);
                self.rejecting(next, context)
            }
        }
    }

    /// Returns true if it has a pass.
    pub(crate) fn is_served(&self) -> bool {
        matches!(self.state, State::Connecting(_) | State::Relaying(_))
    }

    /// Tells whether it leads back to tcpause itself, whose addresses are `own`.
    pub(crate) fn is_loop(&self, own: &[SocketAddress]) -> bool {
        matches!(&self.state, State::Relaying(it) if it.relay.upstream().socket().is_loop(own))
    }

    /// Returns the moment at which `limits` allow the connection to be closed. None while somebody is owed something: bytes
    /// are on their way, or the client spoke last and the upstream may still answer.
    pub(crate) fn quiet_at(&self, limits: QuietLimits) -> Option<Instant> {
        match &self.state {
            State::Relaying(Session { relay, moved, asks, settling: None, .. })
                if relay.is_at_rest(&self.client) && !(*asks && relay.can_answer()) =>
            {
                moved.checked_add(limits.of(relay.can_answer())?)
            }
            _ => None,
        }
    }

    /// Looks for a peer that has vanished with bytes on their way to it.
    pub(crate) fn look_for_vanished(&mut self) -> Verdict {
        let State::Relaying(session) = &mut self.state else { return Verdict::Stay };
        let has_vanished = session.relay.give_up_vanished(&mut self.client);
        if has_vanished { Verdict::Again } else { Verdict::Stay }
    }

    /// Ends in good order what is quiet: both sides get the end of the stream, and what the client sends before it has
    /// noticed is read and discarded, as a close with bytes unread would be a reset. A half-closed connection is closed at
    /// once: one end was passed on already, and its peer had all the time to notice.
    pub(crate) fn end_quiet(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Relaying(session) = &mut self.state else { return Verdict::Stay };
        if !session.relay.is_silent(&mut self.client) {
            session.moved = context.now;
            return Verdict::Again;
        }
        if session.relay.is_half_closed() {
            return Verdict::Close(Reason::Quiet);
        }
        context.counters.drained.add(1);
        let delivered = session.relay.delivered();
        log_close(self.peer.take().as_deref(), &Reason::Quiet, delivered);
        // The client's end comes first, as in any close: whoever is told "idle" finds it sent.
        let (reject, _next) = Reject::close_gracefully(&mut self.client);
        self.replace_state(State::Rejecting(reject));
        Verdict::Enter(Deadline::Lingering)
    }

    /// Closes it with its one line in the log, and so that an abort does not look like an orderly end.
    pub(crate) fn close(self, reason: &Reason) {
        let delivered = match &self.state {
            State::Relaying(session) => session.relay.delivered(),
            State::Waiting { .. } | State::Connecting(_) | State::Rejecting(_) => (0, 0),
        };
        log_close(self.peer.as_deref(), reason, delivered);
        match reason {
            Reason::Reset
            | Reason::Stalled
            | Reason::Unreachable(_)
            | Reason::Killed
            | Reason::Stopped => self.reset_on_close(),
            Reason::Ended | Reason::Left | Reason::Rejected | Reason::Quiet => {}
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
        if progress.to_upstream + progress.to_client > 0 {
            // Of both in one turn, the client's may have come last.
            (session.moved, session.asks) = (context.now, progress.to_upstream > 0);
        }
        match progress.next {
            relay::Next::Wait => {
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
            relay::Next::Close => Verdict::Close(Reason::Ended),
            relay::Next::Reset => Verdict::Close(Reason::Reset),
            relay::Next::Settle(under_way) => {
                // It is no longer in anyone's backlog, and may stay here for long.
                session.under_way = None;
                let before = session.settling.take();
                if before.is_none_or(|it| it.under_way != under_way) {
                    session.moved = context.now;
                }
                if context.now.duration_since(session.moved) >= SETTLE_TIMEOUT {
                    return Verdict::Close(Reason::Stalled);
                }
                let looks = before.map_or(0, |it| it.looks.saturating_add(1));
                session.settling = Some(AwaitingAcks { under_way, looks });
                let deadline = if looks < QUICK_LOOKS_MAX {
                    Deadline::AwaitingAcks
                } else {
                    Deadline::Stalled
                };
                Verdict::Wait(deadline)
            }
        }
    }

    fn rejecting(&mut self, next: reject::Next, context: &Context<'_>) -> Verdict {
        if matches!(next, reject::Next::Answered | reject::Next::Reset) {
            context.counters.rejected.add(1);
        }
        let Registration { registry, client: token, .. } = context.registration;
        match next {
            reject::Next::Wait if self.client.await_room(registry, token) => Verdict::Stay,
            reject::Next::Wait | reject::Next::Again => Verdict::Again,
            reject::Next::WaitIn(deadline) => Verdict::Enter(deadline),
            reject::Next::Answered => Verdict::Enter(Deadline::Lingering),
            reject::Next::Reset => {
                self.client.socket().reset_on_close();
                Verdict::Close(Reason::Rejected)
            }
            reject::Next::Close => Verdict::Close(Reason::Rejected),
        }
    }
}

/// Writes the one line of a connection at its end, if its peer was noted for that.
fn log_close(peer: Option<&str>, reason: &Reason, (up, down): (u64, u64)) {
    if let Some(peer) = peer {
        log::debug!(
            "client {peer} closed: {reason}; bytes to the upstream: {up}, to the client: {down}"
        );
    }
}

impl Drop for Connection {
    /// What a panic of the worker cuts off must not look like an orderly end.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.reset_on_close();
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended => f.write_str("both sides have ended"),
            Self::Reset => f.write_str("one side was reset, and so the other"),
            Self::Stalled => {
                f.write_str("one side was reset, and the other does not take what came before")
            }
            Self::Left => f.write_str("the client left before it was served"),
            Self::Rejected => f.write_str("rejected"),
            Self::Quiet => f.write_str("it was quiet"),
            Self::Killed => f.write_str("it was in the way of a pause"),
            Self::Unreachable(error) => write!(f, "the upstream cannot be reached: {error}"),
            Self::Stopped => f.write_str("tcpause stops"),
        }
    }
}

#[cfg(test)]
mod tests;

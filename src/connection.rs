//! A client's connection: one enum for its state, and every legal transition.
//!
//! ```text
//!            ┌──────┐ resume            ┌────────────┐ connected ┌──────────┐
//!  accept ──▶│ Held │──────────────────▶│ Connecting │──────────▶│ Relaying │──▶ closed
//!     │      └──────┘                   └────────────┘           └──────────┘
//!     ├── the gate is open ──────────────────▲  ▲
//!     │      ┌───────────┐ resume, and silent   │
//!     └─────▶│ Rejecting │──────────────────────┘
//!            └───────────┘──▶ closed
//! ```
//!
//! A state owns what it may use and nothing else. Only a client that is connecting or relaying has a [`Pass`], so a held
//! or a rejected one *cannot* be counted as active.

use std::{
    fmt, io,
    time::{Duration, Instant},
};

use mio::event::Event;

use crate::{
    counters::Counters,
    endpoint::{Endpoint, Registration},
    gate::Pass,
    queues::Queue,
    reach::{REDIAL_INTERVAL, REFUSED_INTERVAL, Reach},
    refusal::Refusal,
    reject::{self, Reject},
    relay::{self, Kit, Relay},
    slots::Slot,
    sys::{Dialled, Socket, is_shortage},
    upstream::{Cached, Outlook, Upstream},
};

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
    _slot: Slot,
}

/// What is being done for a client.
#[derive(Debug)]
enum State {
    /// It waits for the resume; nothing of it is read.
    Held,
    /// Its upstream is being dialled.
    Connecting(Dial),
    /// Bytes are carried.
    Relaying(Carriage),
    /// It gets its refusal.
    Rejecting(Reject),
}

/// The attempts to reach the upstream for one client.
#[derive(Debug)]
struct Dial {
    /// The attempt that is under way; none while waiting to try again.
    upstream: Option<Endpoint>,
    /// Whether others have waited along with this client: then they are dialled for a few at a time.
    in_crowd: bool,
    /// How many of the upstream's addresses have failed.
    failed: usize,
    /// Whether one of them failed for want of something of this host's: then all are tried again soon.
    in_short: bool,
    /// Why the last attempt has failed.
    error: Option<io::Error>,
    since: Instant,
    pass: Pass,
}

/// A relay and the pass that it is carried with.
#[derive(Debug)]
struct Carriage {
    relay: Relay,
    /// Whether it is one of a crowd, and nothing shows yet that the upstream has taken it out of its backlog.
    unheard: bool,
    /// Once one side was aborted: how much the other had yet to take when it last took something, and when that was.
    settling: Option<(u32, Instant)>,
    _pass: Pass,
}

/// What comes next for a connection.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// An event, or the deadline it had.
    Stay,
    /// Another turn.
    Again,
    /// An event, or the deadline of this queue, which begins now.
    Wait(Queue),
    /// The same, and being driven at once: it may go on already.
    Enter(Queue),
    /// The resume: the proxy is paused, and it has no pass any more.
    Hold,
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
    /// The proxy stops.
    Stopped,
}

/// What a worker lends to the connection it drives.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    /// Where its sockets are registered.
    pub(crate) registration: Registration<'a>,
    /// What bytes pass through.
    pub(crate) kit: &'a mut Kit,
    /// Where the upstream is.
    pub(crate) upstream: &'a Upstream,
    /// The worker's copy of that.
    pub(crate) cached: &'a mut Cached,
    /// How the worker's dials fare.
    pub(crate) reach: &'a mut Reach,
    /// How clients are rejected.
    pub(crate) refusal: &'a Refusal,
    /// What the worker counts.
    pub(crate) counters: &'a Counters,
    /// How many more steps TLS handshakes may take in this turn.
    pub(crate) handshake_steps: &'a mut usize,
    /// When the turn began.
    pub(crate) now: Instant,
}

impl Connection {
    /// A client that was just accepted; it is held until something else is said.
    pub(crate) fn new(client: Socket, slot: Slot) -> Self {
        let peer = log::log_enabled!(log::Level::Debug).then(|| client.peer().into());
        Self { client: Endpoint::connected(client), state: State::Held, peer, _slot: slot }
    }

    /// Remembers what an event tells of the client.
    pub(crate) fn mark_client(&mut self, event: &Event) {
        self.client.mark(event);
    }

    /// Remembers what an event tells of the upstream.
    pub(crate) fn mark_upstream(&mut self, event: &Event) {
        match &mut self.state {
            State::Connecting(Dial { upstream: Some(upstream), .. }) => upstream.mark(event),
            State::Relaying(carriage) => carriage.relay.upstream_mut().mark(event),
            State::Connecting(Dial { upstream: None, .. }) | State::Held | State::Rejecting(_) => {}
        }
    }

    /// Serves a client that is held, or that is to be rejected and was not touched yet.
    pub(crate) fn serve(&mut self, pass: Pass, context: &mut Context<'_>) -> Verdict {
        if self.client.socket().has_gone() {
            return Verdict::Close(Reason::Left);
        }
        self.begin_to_dial(pass, true, context)
    }

    /// Serves a client that was just accepted.
    pub(crate) fn serve_new(&mut self, pass: Pass, context: &mut Context<'_>) -> Verdict {
        self.begin_to_dial(pass, false, context)
    }

    fn begin_to_dial(&mut self, pass: Pass, in_crowd: bool, context: &mut Context<'_>) -> Verdict {
        self.state = State::Connecting(Dial {
            upstream: None,
            in_crowd,
            failed: 0,
            in_short: false,
            error: None,
            since: context.now,
            pass,
        });
        self.dial(context)
    }

    /// Rejects a client that was just accepted.
    pub(crate) fn reject(&mut self, context: &mut Context<'_>) -> Verdict {
        let (reject, next) = Reject::new(&mut self.client, context.refusal);
        self.state = State::Rejecting(reject);
        self.rejecting(next, context)
    }

    /// Begins the TLS handshake with a client to reject that waits for it.
    pub(crate) fn begin_handshake(&mut self, permit: Slot, context: &mut Context<'_>) -> Verdict {
        let State::Rejecting(reject) = &mut self.state else { return Verdict::Stay };
        let next = reject.begin_handshake(permit, context.refusal);
        self.rejecting(next, context)
    }

    /// Goes as far as the readiness of the sockets allows.
    pub(crate) fn drive(&mut self, context: &mut Context<'_>) -> Verdict {
        match &mut self.state {
            State::Held | State::Connecting(Dial { upstream: None, .. }) => self.look_after_held(),
            State::Connecting(Dial { upstream: Some(upstream), .. }) if upstream.is_writable() => {
                self.connected(context)
            }
            State::Connecting(_) if self.client.is_reset() => Verdict::Close(Reason::Left),
            State::Connecting(_) => Verdict::Stay,
            State::Relaying(_) => self.carry(context),
            State::Rejecting(reject) => {
                let scratch = &mut context.kit.scratch;
                let steps = &mut *context.handshake_steps;
                let next = reject.drive(&mut self.client, context.refusal, scratch, steps);
                self.rejecting(next, context)
            }
        }
    }

    /// The deadline of the queue it stands in has passed.
    pub(crate) fn expire(&mut self, context: &mut Context<'_>) -> Verdict {
        match &mut self.state {
            State::Held => Verdict::Stay,
            State::Connecting(dial)
                if context.now.duration_since(dial.since) >= context.upstream.connect_timeout() =>
            {
                let waits = dial.upstream.is_none();
                let error = dial.error.take().filter(|_| waits);
                Verdict::Close(Reason::Unreachable(
                    error.unwrap_or_else(|| io::ErrorKind::TimedOut.into()),
                ))
            }
            State::Connecting(Dial { upstream: None, in_short, pass, .. }) => {
                let (queue, interval) = waiting(*in_short);
                if pass.is_paused() || context.reach.may_probe(interval, context.now) {
                    self.redial(context)
                } else {
                    Verdict::Wait(queue)
                }
            }
            State::Connecting(dial)
                if dial.failed + 1 < context.upstream.read(context.cached).len() =>
            {
                self.next_address(io::ErrorKind::TimedOut.into(), context)
            }
            // The last address has what is left of the time.
            State::Connecting(_) => Verdict::Wait(Queue::Connecting),
            State::Relaying(carriage) if carriage.settling.is_none() && carriage.unheard => {
                carriage.unheard = false;
                Verdict::Wait(Queue::Fresh)
            }
            State::Relaying(carriage) if carriage.settling.is_none() => {
                carriage.relay.upstream().socket().keep_alive();
                Verdict::Wait(Queue::Relaying)
            }
            State::Relaying(_) => self.carry(context),
            State::Rejecting(reject) => {
                let next = reject.expire(&mut self.client, context.refusal);
                self.rejecting(next, context)
            }
        }
    }

    /// Closes it with its one line in the log, and so that an abort does not look like an orderly end.
    pub(crate) fn close(self, reason: &Reason) {
        if let Some(peer) = &self.peer {
            let (up, down) = match &self.state {
                State::Relaying(carriage) => carriage.relay.delivered(),
                State::Held | State::Connecting(_) | State::Rejecting(_) => (0, 0),
            };
            log::debug!(
                "client {peer} closed: {reason}; {up} bytes to the upstream, {down} to the client"
            );
        }
        match reason {
            Reason::Reset | Reason::Stalled | Reason::Unreachable(_) | Reason::Stopped => {
                self.reset_on_close();
            }
            Reason::Ended | Reason::Left | Reason::Rejected => {}
        }
    }

    fn reset_on_close(&self) {
        self.client.socket().reset_on_close();
        if let State::Relaying(carriage) = &self.state {
            carriage.relay.upstream().socket().reset_on_close();
        }
    }

    /// A client that waits and has gone is dropped, and not dialled for any more.
    fn look_after_held(&self) -> Verdict {
        let gone = self.client.is_read_closed() && self.client.socket().has_gone();
        if gone { Verdict::Close(Reason::Left) } else { Verdict::Stay }
    }

    /// Tries again to reach the upstream, from its first address on. A client that has left meanwhile is dropped; a pause
    /// means that no connection to the upstream begins any more, and is waited for like by any other.
    pub(crate) fn redial(&mut self, context: &mut Context<'_>) -> Verdict {
        if let Verdict::Close(reason) = self.look_after_held() {
            return Verdict::Close(reason);
        }
        let State::Connecting(dial) = &mut self.state else { return Verdict::Stay };
        if dial.pass.is_paused() {
            self.state = State::Held;
            return Verdict::Hold;
        }
        (dial.in_crowd, dial.failed, dial.in_short) = (true, 0, false);
        self.dial(context)
    }

    /// Begins an attempt at the first of the upstream's addresses that has not failed.
    fn dial(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Connecting(dial) = &mut self.state else { return Verdict::Stay };
        let addresses = context.upstream.read(context.cached);
        let Some(address) = addresses.get(dial.failed) else {
            // Its name is not known yet.
            context.upstream.ask();
            context.reach.failed();
            dial.in_short = true;
            return Verdict::Wait(waiting(true).0);
        };
        let Registration { registry, upstream: token, .. } = context.registration;
        let attempt =
            context.reach.dial(address, context.upstream).and_then(|(socket, dialled)| {
                socket.register(registry, token)?;
                Ok((socket, dialled))
            });
        match attempt {
            Ok((upstream, Dialled::Connected)) => {
                dial.upstream = Some(Endpoint::connected(upstream));
                self.begin_to_carry(context)
            }
            Ok((upstream, Dialled::InProgress)) => {
                dial.upstream = Some(Endpoint::connecting(upstream));
                Verdict::Wait(Queue::Connecting)
            }
            Err(error) => self.next_address(error, context),
        }
    }

    /// The present address has failed with `error`: on to the next, if there is one. After the last, all are tried again a
    /// little later, as long as there is time: the upstream may be restarting.
    fn next_address(&mut self, error: io::Error, context: &mut Context<'_>) -> Verdict {
        let State::Connecting(dial) = &mut self.state else { return Verdict::Stay };
        dial.upstream = None;
        dial.failed += 1;
        let is_shortage = is_shortage(&error);
        dial.in_short |= is_shortage;
        if !is_shortage {
            context.upstream.complain(&error, Outlook::TriedAgain, context.now);
        }
        dial.error = Some(error);
        if dial.pass.is_paused() {
            return self.redial(context);
        }
        if dial.failed < context.upstream.read(context.cached).len() {
            return self.dial(context);
        }
        // The server may have moved.
        context.upstream.ask();
        context.reach.failed();
        Verdict::Wait(waiting(dial.in_short).0)
    }

    /// The attempt has come to its end, good or bad.
    fn connected(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Connecting(Dial { upstream: Some(upstream), .. }) = &self.state else {
            return Verdict::Stay;
        };
        let socket = upstream.socket();
        // A failure is told by the event; asking the kernel again would cost a call for each connection.
        let failure = if upstream.is_reset() { socket.take_dial_error() } else { None };
        match failure {
            // Where nobody listens others have failed before. The reset leaves the port free at once for who is to listen.
            None if context.reach.is_failing() && socket.is_its_own_peer() => {
                socket.reset_on_close();
                self.next_address(io::ErrorKind::ConnectionRefused.into(), context)
            }
            None => self.begin_to_carry(context),
            // It was connected, has spoken and was reset since: what it said goes to the client, and the reset behind it.
            Some(_) if socket.peek(&mut [0]).is_ok_and(|bytes| bytes > 0) => {
                self.begin_to_carry(context)
            }
            Some(error) => self.next_address(error, context),
        }
    }

    fn begin_to_carry(&mut self, context: &mut Context<'_>) -> Verdict {
        context.reach.succeeded();
        match std::mem::replace(&mut self.state, State::Held) {
            State::Connecting(Dial { upstream: Some(upstream), in_crowd, pass, .. }) => {
                let relay = Relay::new(upstream);
                self.state = State::Relaying(Carriage {
                    relay,
                    unheard: in_crowd,
                    settling: None,
                    _pass: pass,
                });
                Verdict::Enter(if in_crowd { Queue::Unheard } else { Queue::Fresh })
            }
            other => {
                self.state = other;
                Verdict::Stay
            }
        }
    }

    fn carry(&mut self, context: &mut Context<'_>) -> Verdict {
        let State::Relaying(carriage) = &mut self.state else { return Verdict::Stay };
        let turn = carriage.relay.drive(&mut self.client, context.kit, &context.registration);
        context.counters.bytes_to_upstream.add(turn.to_upstream);
        context.counters.bytes_to_client.add(turn.to_client);
        match turn.next {
            relay::Next::Wait if carriage.unheard && carriage.relay.delivered().1 > 0 => {
                carriage.unheard = false;
                Verdict::Wait(Queue::Fresh)
            }
            relay::Next::Wait => Verdict::Stay,
            relay::Next::Again => Verdict::Again,
            relay::Next::Close => Verdict::Close(Reason::Ended),
            relay::Next::Reset => Verdict::Close(Reason::Reset),
            relay::Next::Settle(under_way) => {
                let is_moving = turn.to_upstream + turn.to_client > 0;
                match carriage.settling {
                    Some((before, since)) if before == under_way && !is_moving => {
                        if context.now.duration_since(since) >= SETTLE_TIMEOUT {
                            return Verdict::Close(Reason::Stalled);
                        }
                    }
                    _ => carriage.settling = Some((under_way, context.now)),
                }
                Verdict::Wait(Queue::Settling)
            }
        }
    }

    fn rejecting(&self, next: reject::Next, context: &Context<'_>) -> Verdict {
        if matches!(next, reject::Next::Answered | reject::Next::Reset) {
            context.counters.rejected.add(1);
        }
        match next {
            reject::Next::Wait => Verdict::Stay,
            reject::Next::Again => Verdict::Again,
            reject::Next::WaitIn(queue) => Verdict::Enter(queue),
            reject::Next::Answered => Verdict::Enter(Queue::Lingering),
            reject::Next::Reset => {
                self.client.socket().reset_on_close();
                Verdict::Close(Reason::Rejected)
            }
            reject::Next::Close => Verdict::Close(Reason::Rejected),
        }
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
            Self::Unreachable(error) => write!(f, "the upstream cannot be reached: {error}"),
            Self::Stopped => f.write_str("tcpause stops"),
        }
    }
}

/// Where a dial that has failed waits, and how long.
fn waiting(in_short: bool) -> (Queue, Duration) {
    if in_short { (Queue::Redial, REDIAL_INTERVAL) } else { (Queue::Refused, REFUSED_INTERVAL) }
}

#[cfg(test)]
mod tests;

//! A worker: one thread, one poll, its own listeners, connections and pipes.
//!
//! A *turn* is `wait → mark → obey → accept → release → drive → welcome → close_quiet → expire → look_for_vanished`. Marking only
//! remembers what events tell and queues the connection; nothing is read, written or closed by it, so no slot can be reused
//! while events of the same batch still name it. All work is bounded a turn, and what is left over goes to the back of the queue.

mod accept;
mod drain;
mod ready;
mod release;
pub(crate) mod table;
pub(crate) mod timers;
mod vanished;

use std::{
    collections::VecDeque,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use accept::Accepting;
use crossbeam_channel::Receiver;
use mio::{Events, Poll, Token};

use crate::{
    admission::hold::HoldDecision,
    connection::{
        Connection, Context, QuietLimits, Reason, Verdict,
        deadline::{Deadline, deadlines},
        endpoint::Registration,
        relay::RelayBuffers,
    },
    shared::{Phase, Shared},
    sys::{self, Listener, socket_file::SocketFile},
    upstream::{Cached, RetryPlan, dialer::Dialer},
    worker_pool::Accepted,
};
use ready::Ready;
use table::Table;
use table::client_token;
use table::key_of;
use table::upstream_token;
use timers::Key;
use timers::Timers;
use vanished::VanishedSweep;

/// The token of the waker. Those of the listeners are next to it, downwards.
pub(crate) const WAKER: Token = Token(usize::MAX);

/// How many events are taken in one turn.
const EVENTS_MAX: usize = 1024;
/// How many steps of TLS handshakes are taken in one turn: one may cost a signature, a millisecond with RSA, and those who
/// are carried shall not feel it.
const TURN_HANDSHAKE_STEPS_MAX: usize = 4;

/// How many connections of one queue expire in one turn.
const TURN_EXPIRES_MAX: usize = 64;
/// Time for each of the connections that stall: five hundred are looked at once a second each.
const STALLED_PACE: Duration = Duration::from_millis(2);

/// What outlives a worker that panics: its supervisor keeps it and starts the next worker with it.
#[derive(Debug)]
pub(crate) struct WorkerResources {
    /// Which of the workers it is.
    pub(crate) index: usize,
    /// Where events come from.
    pub(crate) poll: Poll,
    /// The sockets that clients come by, one for each address; none of a worker that gets them from another, or after a stop.
    pub(crate) listeners: Vec<Listener>,
    /// The file of a UNIX listener.
    pub(crate) socket_file: Option<SocketFile>,
    /// Whether clients to come get a small window.
    pub(crate) is_small: bool,
    /// Clients that another worker has accepted.
    pub(crate) mailbox: Receiver<Accepted>,
    /// What all workers share.
    pub(crate) shared: Arc<Shared>,
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Every connection had ended by itself.
    Drained,
    /// What was left was closed.
    Cut,
}

/// A worker with its resources.
struct Worker<'a> {
    resources: &'a mut WorkerResources,
    events: Events,
    connections: Table<Connection>,
    timers: Timers,
    /// Connections to be driven.
    ready: Ready,
    buffers: RelayBuffers,
    /// How many more steps TLS handshakes may take in this turn.
    handshake_steps: usize,
    cached: Cached,
    accepting: Accepting,
    /// The listeners in which a client may wait, by their indices; the first is the next to be asked.
    queued: VecDeque<usize>,
    /// Clients that the system had no memory to register; they are admitted before new ones are accepted.
    unregistered: VecDeque<Connection>,
    dialer: Dialer,
    deadlines: Box<[(Deadline, Duration)]>,
    /// Silence that connections may keep, as far as the worker has obeyed.
    quiet: QuietLimits,
    /// When to look for quiet connections, while they are to be closed.
    look_for_quiet: Option<Instant>,
    vanished: VanishedSweep,
    /// How many of the orders to reset all connections it has obeyed.
    resets: u64,
    /// How many of the orders to reset loops it has obeyed.
    loop_resets: u64,
    /// The last question of a pause that it has answered.
    epoch: u64,
}

impl From<Accepted> for Connection {
    fn from(accepted: Accepted) -> Self {
        Self::new(accepted.client, accepted.permit, accepted.hold_permit)
    }
}

impl WorkerResources {
    /// Works until the proxy has stopped.
    pub(crate) fn work(&mut self) -> io::Result<End> {
        for (index, listener) in self.listeners.iter().enumerate() {
            // A predecessor that panicked may have registered it.
            listener.deregister(self.poll.registry());
            listener.register(self.poll.registry(), Token(WAKER.0 - 1 - index))?;
        }
        let queued = (0..self.listeners.len()).collect();
        let shared = Arc::clone(&self.shared);
        let mut worker = Worker {
            resources: self,
            events: Events::with_capacity(EVENTS_MAX),
            connections: Table::new(),
            timers: Timers::new(),
            ready: Ready::default(),
            buffers: RelayBuffers::new(shared.pipes_per_worker),
            handshake_steps: TURN_HANDSHAKE_STEPS_MAX,
            cached: Cached::default(),
            accepting: Accepting::Ready,
            queued,
            unregistered: VecDeque::new(),
            dialer: Dialer::default(),
            deadlines: deadlines(
                shared.admission.hold.timeout(),
                shared.upstream.connect_timeout(),
                shared.upstream.patience(),
            ),
            quiet: QuietLimits::default(),
            look_for_quiet: None,
            vanished: VanishedSweep::default(),
            resets: shared.pauses.drain.resets(),
            loop_resets: shared.pauses.drain.loop_resets(),
            epoch: 0,
        };
        worker.publish();
        let end = worker.run();
        if end.is_err() {
            worker.close_all(&Reason::Stopped, sys::now());
        }
        end
    }
}

impl Worker<'_> {
    fn run(&mut self) -> io::Result<End> {
        loop {
            self.wait()?;
            let now = sys::now();
            self.buffers.now = now;
            self.mark();
            if let Some(end) = self.apply_orders(now) {
                return Ok(end);
            }
            self.size_accept_buffer();
            self.accept(now);
            self.release(now);
            self.drive(now);
            self.start_handshakes(now);
            self.close_quiet(now);
            self.expire(now);
            self.look_for_vanished(now);
            self.publish();
            let shared = &self.resources.shared;
            shared.pauses.barrier.ack(self.resources.index, &mut self.epoch);
            if shared.take_wanted() | self.dialer.take_end_of_outage() {
                shared.workers.wake_all();
            }
            if self.is_drained() {
                return Ok(End::Drained);
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        // One moment for both, or what falls due between the two would be told by neither.
        let now = sys::now();
        let timeout =
            if self.has_work(now) { Some(Duration::ZERO) } else { self.next_deadline(now) };
        match self.resources.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            result => result,
        }
    }

    /// Whether there is something to do without an event.
    fn has_work(&self, now: Instant) -> bool {
        let can_accept = self.accepting == Accepting::Ready && !self.queued.is_empty();
        !self.ready.is_empty() || can_accept || self.can_release(now) || self.can_start_handshake()
    }

    fn next_deadline(&self, now: Instant) -> Option<Duration> {
        let accept_again = match self.accepting {
            Accepting::Paused(until) => Some(until),
            Accepting::Ready | Accepting::Full => None,
        };
        let deadlines = (0..self.deadlines.len()).filter_map(|index| {
            let (deadline, length) = self.deadline(index)?;
            self.timers.first(deadline)?.1.checked_add(length)
        });
        let next = deadlines
            .chain(accept_again)
            .chain(self.may_start_at(now))
            .chain(self.look_for_quiet)
            .chain(self.vanished.next_at())
            .chain(self.resources.shared.shutdown.deadline())
            .min()?;
        Some(next.saturating_duration_since(now))
    }

    /// Returns a kind of deadline and its length, if it matters now: clients that wait for their turn, and no longer for the
    /// resume, are not held, and nobody loses patience during a pause.
    fn deadline(&self, index: usize) -> Option<(Deadline, Duration)> {
        let deadline = self.deadlines.get(index).copied();
        let is_paused = self.resources.shared.pauses.gate.is_paused();
        match deadline? {
            (Deadline::Held, _) if !is_paused => None,
            (Deadline::AwaitingUpstream, _) if is_paused => None,
            (Deadline::Stalled, at_least) => {
                Some((Deadline::Stalled, at_least.max(self.stalled_pace())))
            }
            other => Some(other),
        }
    }

    /// Returns the time in which each connection that stalls is looked at once: the kernel has no event for it, so a crowd
    /// is looked at more rarely.
    fn stalled_pace(&self) -> Duration {
        u32::try_from(self.timers.len(Deadline::Stalled))
            .map_or(Duration::MAX, |n| STALLED_PACE * n)
    }

    fn mark(&mut self) {
        for event in &self.events {
            match event.token() {
                WAKER => {
                    if self.accepting == Accepting::Full {
                        self.accepting = Accepting::Ready;
                    }
                }
                Token(token) if WAKER.0 - 1 - token < self.resources.listeners.len() => {
                    self.accepting = Accepting::Ready;
                    let index = WAKER.0 - 1 - token;
                    if !self.queued.contains(&index) {
                        self.queued.push_back(index);
                    }
                }
                token => {
                    let key = key_of(token);
                    // A client's event comes behind the close of its connection only if it was on its way already.
                    let Some(connection) = self.connections.get_mut(key) else {
                        continue;
                    };
                    if token == client_token(key) {
                        connection.mark_client(event);
                    } else {
                        connection.mark_upstream(event);
                    }
                    self.ready.push(key);
                }
            }
        }
    }

    /// Does what the handle or another worker asks for. Tells how to end if it is cut short.
    fn apply_orders(&mut self, now: Instant) -> Option<End> {
        let resets = self.resources.shared.pauses.drain.resets();
        if std::mem::replace(&mut self.resets, resets) != resets {
            self.close_all(&Reason::Killed, now);
        }
        let loop_resets = self.resources.shared.pauses.drain.loop_resets();
        if std::mem::replace(&mut self.loop_resets, loop_resets) != loop_resets {
            self.close_loops(now);
        }
        match self.resources.shared.phase() {
            Phase::Running => self.collect(now),
            Phase::Stopping { deadline } if now < deadline => {
                self.stop_listening(now);
                self.collect(now);
            }
            Phase::Stopping { .. } | Phase::Aborting => {
                self.stop_listening(now);
                self.close_listeners();
                self.collect(now);
                let end = if self.is_empty() { End::Drained } else { End::Cut };
                self.close_all(&Reason::Stopped, now);
                return Some(end);
            }
        }
        None
    }

    /// Whether there is nothing left to do, and there never will be.
    fn is_drained(&self) -> bool {
        // Only once nobody listens, nobody sends another client over: the order of the two looks matters.
        self.resources.shared.phase() != Phase::Running
            && !self.resources.shared.workers.is_listening()
            && self.resources.mailbox.is_empty()
            && self.is_empty()
    }

    /// Whether it has no client.
    fn is_empty(&self) -> bool {
        self.connections.is_empty() && self.unregistered.is_empty()
    }

    /// Takes in the clients that another worker has accepted.
    fn collect(&mut self, now: Instant) {
        while let Ok(accepted) = self.resources.mailbox.try_recv() {
            self.admit(accepted.into(), now);
        }
    }

    /// Gives each connection that was ready when this began its share.
    fn drive(&mut self, now: Instant) {
        self.handshake_steps = TURN_HANDSHAKE_STEPS_MAX;
        for _connection in 0..self.ready.len() {
            let Some(key) = self.ready.pop() else { return };
            self.act(key, now, Connection::drive);
        }
    }

    /// Whether a TLS handshake can begin with a client to reject.
    fn can_start_handshake(&self) -> bool {
        self.timers.len(Deadline::AwaitingHandshake) > 0
            && self.resources.shared.reject_policy.handshakes().is_any_free_or_wish()
    }

    /// Begins TLS handshakes with clients to reject, oldest first, with what those under way have left of the turn.
    fn start_handshakes(&mut self, now: Instant) {
        while self.handshake_steps > 0
            && let Some((key, _since)) = self.timers.first(Deadline::AwaitingHandshake)
            && let Some(permit) = self.resources.shared.reject_policy.handshakes().take()
        {
            self.act(key, now, |connection, context| connection.begin_handshake(permit, context));
        }
    }

    fn expire(&mut self, now: Instant) {
        for index in 0..self.deadlines.len() {
            let Some((deadline, length)) = self.deadline(index) else { continue };
            // One that stays in its queue gets a new deadline; none is looked at twice. What is left has its turn behind events.
            for _connection in 0..self.timers.len(deadline).min(TURN_EXPIRES_MAX) {
                match self.timers.first(deadline) {
                    Some((key, since)) if now.duration_since(since) >= length => {
                        self.act(key, now, Connection::expire);
                    }
                    _ => break,
                }
            }
        }
    }

    /// Lends a connection what it needs to `act`, and does what comes of it.
    fn act(
        &mut self,
        key: Key,
        now: Instant,
        act: impl FnOnce(&mut Connection, &mut Context<'_>) -> Verdict,
    ) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let shared = &self.resources.shared;
        let mut context = Context {
            registration: Registration {
                registry: self.resources.poll.registry(),
                client: client_token(key),
                upstream: upstream_token(key),
            },
            buffers: &mut self.buffers,
            upstream: &shared.upstream,
            cached: &mut self.cached,
            dialer: &mut self.dialer,
            reject_policy: &shared.reject_policy,
            hold: &shared.admission.hold,
            counters: shared.workers.counters(self.resources.index),
            handshake_steps: &mut self.handshake_steps,
            now,
        };
        let mut verdict = act(connection, &mut context);
        loop {
            match verdict {
                Verdict::Stay => return,
                Verdict::Again => return self.ready.push(key),
                Verdict::Wait(deadline) => return self.timers.enqueue(deadline, key, now),
                Verdict::Enter(deadline) => {
                    self.timers.enqueue(deadline, key, now);
                    verdict = connection.drive(&mut context);
                }
                Verdict::WaitSince(deadline, since) => {
                    return self.timers.enqueue(deadline, key, since);
                }
                Verdict::Hold(arrived) => match shared.hold_decision(connection.take_hold_permit())
                {
                    HoldDecision::Hold(permit) => {
                        connection.hold(permit);
                        return self.timers.enqueue(Deadline::Held, key, arrived);
                    }
                    HoldDecision::Reject => verdict = connection.reject(&mut context),
                    HoldDecision::Close => verdict = connection.close_gracefully(&mut context),
                },
                Verdict::Close(reason) => return self.close(key, &reason, now),
            }
        }
    }

    fn close(&mut self, key: Key, reason: &Reason, now: Instant) {
        self.timers.remove(key);
        let Some(connection) = self.connections.remove(key) else { return };
        self.timers.forget_from(self.connections.end());
        let counters = self.resources.shared.workers.counters(self.resources.index);
        match reason {
            Reason::Unreachable(error) => {
                counters.failed.add(1);
                self.resources.shared.upstream.log_failure(error, RetryPlan::GivenUp, now);
            }
            Reason::Left => counters.left.add(1),
            Reason::Quiet => counters.drained.add(1),
            Reason::Killed => counters.killed.add(1),
            _ => {}
        }
        // Whoever has learnt that the proxy is idle shall see it in the counts.
        self.publish();
        connection.close(reason);
    }

    /// Closes what is left when the proxy stops, or whatever has a pass.
    fn close_all(&mut self, reason: &Reason, now: Instant) {
        let stops = matches!(reason, Reason::Stopped);
        for key in 0..self.connections.end() {
            if stops || self.connections.get_mut(key).is_some_and(|it| it.is_served()) {
                self.close(key, reason, now);
            }
        }
        if stops {
            for connection in self.unregistered.drain(..) {
                connection.close(reason);
            }
        }
    }

    /// Closes the connections that lead back to tcpause itself. Their clients are connections of tcpause's too: these never
    /// leave by themselves, and the next of them takes each place that comes free.
    fn close_loops(&mut self, now: Instant) {
        let addresses = Arc::clone(self.resources.shared.upstream.read(&mut self.cached));
        for key in 0..self.connections.end() {
            if self.connections.get_mut(key).is_some_and(|it| it.is_loop(addresses.own())) {
                let error = io::Error::other(addresses.lack());
                self.close(key, &Reason::Unreachable(error), now);
            }
        }
    }

    /// Shows in the status the lengths of the queues, and to the other workers when the first client that waits came.
    fn publish(&self) {
        let shared = &self.resources.shared;
        let counters = shared.workers.counters(self.resources.index);
        self.timers.publish(counters);
        counters.oldest.set(self.timers.oldest().map_or(0, |at| shared.millis(at) + 1));
        let head = self.first_waiting().map(|(_key, arrived)| arrived);
        let queue = &shared.admission.queue;
        if let Some(next) = queue.publish_head(self.resources.index, head) {
            if let Some(next) = next {
                shared.workers.wake(next);
            }
            if queue.bypasses_in_vain() {
                // The last client that was to bypass the pause has left, and no pass tells of it.
                shared.pauses.notify();
            }
        }
    }
}

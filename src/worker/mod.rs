//! A worker: one thread with its own poll, listeners, connections and pipes.
//!
//! A *turn* is one round of its loop: `wait → mark → apply_orders → size_accept_buffer → accept → start_waiting →
//! drive → start_handshakes → close_quiet → select → expire → look_for_vanished → publish`, and then the acknowledgement of
//! a pause.
//!
//! Marking only remembers what events report and queues the connection. Nothing is read, written or closed by it, so no
//! key is reused while events of the same batch still name it. The work of a turn is bounded, and the rest of it waits
//! for the next turn.

mod accept;
mod drain;
mod expire;
pub(crate) mod handover;
mod kill;
mod list;
mod log;
mod publish;
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
use handover::Inherited;
use mio::{Events, Poll, Token};

use crate::{
    admission::hold::HoldDecision,
    config::duration::nanos,
    connection::{
        Connection, Context, Verdict,
        deadline::{Deadline, deadlines},
        endpoint::Registration,
        quiet::QuietLimits,
        relay::RelayBuffers,
    },
    shared::{Phase, Shared},
    stats::cause::{CloseCause, ConnectResult},
    sys::{self, Listener},
    upstream::{Cached, RetryPlan, dialer::Dialer},
    worker_pool::{Accepted, Mail},
};
use kill::Doomed;
use list::Walk;
use log::ConnectionLogLimit;
use ready::Ready;
use table::{Table, client_token, key_of, upstream_token};
use timers::{Key, Timers};
use vanished::VanishedSweep;

/// Token of the waker. The tokens of the listeners are below it, in descending order.
pub(crate) const WAKER: Token = Token(usize::MAX);

/// Events taken in one turn, at most.
const EVENTS_MAX: usize = 1024;
/// Steps of TLS handshakes in one turn, at most. A step may cost a signature, a millisecond with RSA, and must not delay
/// relayed connections.
const TURN_HANDSHAKE_STEPS_MAX: usize = 4;

/// Resources that outlive a worker's panic: its supervisor keeps them, and starts the next worker with them.
#[derive(Debug)]
pub(crate) struct WorkerResources {
    /// Index of the worker in the pool.
    pub(crate) index: usize,
    pub(crate) poll: Poll,
    /// Listeners, one for each address. There is none if another worker accepts for this one, and none after a stop.
    pub(crate) listeners: Vec<Listener>,
    /// Set while clients to come get a small receive buffer.
    pub(crate) is_small: bool,
    /// Receiver of clients that another worker has accepted.
    pub(crate) mailbox: Receiver<Mail>,
    /// Connections of the process before this one, until the worker has begun.
    pub(crate) inherited: Inherited,
    pub(crate) shared: Arc<Shared>,
}

/// End of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Every connection had ended by itself.
    Drained,
    /// The connections that were left were closed.
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
    /// Steps that TLS handshakes may still take in this turn.
    handshake_steps: usize,
    cached: Cached,
    accepting: Accepting,
    /// Indices of listeners that may have a queued client, in the order in which they are asked.
    queued: VecDeque<usize>,
    /// Clients that the system had no memory to register. They are admitted before new ones are accepted.
    unregistered: VecDeque<Connection>,
    dialer: Dialer,
    /// Kinds of deadlines and their lengths.
    deadlines: Box<[(Deadline, Duration)]>,
    /// Limits of silence by which the worker last closed quiet connections.
    quiet: QuietLimits,
    /// Time of the next search for quiet connections, while they are to be closed.
    look_for_quiet: Option<Instant>,
    vanished: VanishedSweep,
    /// Selection of connections that is under way. The control API asks for one at a time, and for the next once it has given
    /// this one up.
    walk: Option<Walk>,
    /// Connections that an operator has ordered to be killed.
    doomed: Doomed,
    log: ConnectionLogLimit,
    /// Set if the upstream was away in the last turn.
    was_away: bool,
    /// Number of changes in the treatment of half-closed clients that the worker has heeded.
    half_closed_changes: u64,
    /// Number of orders to reset all connections that the worker has carried out.
    resets: u64,
    /// Number of orders to reset loops that the worker has carried out.
    loop_resets: u64,
    /// Latest epoch of the barrier that the worker has acknowledged.
    epoch: u64,
}

impl Accepted {
    fn into_connection(self, now: Instant) -> Connection {
        Connection::new(self.client, self.address, self.permit, self.hold_permit, now)
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
            walk: None,
            doomed: Doomed::default(),
            log: ConnectionLogLimit::new(shared.log, shared.workers.len()),
            was_away: false,
            half_closed_changes: 0,
            resets: shared.pauses.drain.resets(),
            loop_resets: shared.pauses.drain.loop_resets(),
            epoch: 0,
        };
        worker.begin();
        let end = worker.run();
        worker.log.tell_all();
        if end.is_err() {
            // Logged for each client like a stop, as the supervisor tells the cause and starts a new worker.
            worker.close_all(CloseCause::Stopped, sys::now());
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
            // Counted before any of them is served in this turn.
            let waiting = self.waiting_for_upstream();
            self.drop_half_closed();
            self.size_accept_buffer();
            self.accept(now);
            self.start_waiting(now);
            self.drive(now);
            self.start_handshakes(now);
            self.close_quiet(now);
            self.select(now);
            self.expire(now);
            self.look_for_vanished(now);
            self.publish();
            self.log.tell(now);
            let shared = &self.resources.shared;
            shared.pauses.barrier.ack(self.resources.index, &mut self.epoch);
            let is_back = self.dialer.take_end_of_outage();
            if is_back {
                shared.upstream.log_return(waiting);
            }
            let is_away = shared.upstream.breaker().is_away();
            if std::mem::replace(&mut self.was_away, is_away) != is_away {
                shared.pauses.notify();
            }
            if shared.take_wanted() | is_back {
                shared.workers.wake_all();
            }
            if self.is_drained() {
                return Ok(End::Drained);
            }
            if shared.freeze.asks_workers() && self.has_obeyed() {
                self.stand_still(now);
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        // Both look at the same time, or each would miss a deadline that falls between their two times.
        let now = sys::now();
        let counters = self.resources.shared.workers.counters(self.resources.index);
        counters.busy_nanos.add(nanos(now.saturating_duration_since(self.buffers.now)));
        let timeout =
            if self.has_work(now) { Some(Duration::ZERO) } else { self.next_deadline(now) };
        match self.resources.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            result => result,
        }
    }

    /// Returns true if there is work to do without an event.
    fn has_work(&self, now: Instant) -> bool {
        let can_accept = self.accepting == Accepting::Ready && !self.queued.is_empty();
        !self.ready.is_empty()
            || self.walk.is_some()
            || can_accept
            || self.can_start_waiting(now)
            || self.can_start_handshake()
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
                    // An event may come after its connection was closed, if it was on its way already.
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

    /// Carries out the orders of the handle, and takes in clients from other workers. Returns the end of the worker if it
    /// has to end now.
    fn apply_orders(&mut self, now: Instant) -> Option<End> {
        let resets = self.resources.shared.pauses.drain.resets();
        if std::mem::replace(&mut self.resets, resets) != resets {
            self.close_all(CloseCause::KilledPause, now);
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
                self.close_all(CloseCause::Stopped, now);
                return Some(end);
            }
        }
        None
    }

    /// Returns true if no order has come during this turn. The next one obeys it, as orders do not travel.
    fn has_obeyed(&self) -> bool {
        let drain = &self.resources.shared.pauses.drain;
        (drain.resets(), drain.loop_resets()) == (self.resets, self.loop_resets)
    }

    /// Returns the number of clients that wait for an upstream that is away, with those that it is dialled for.
    fn waiting_for_upstream(&self) -> u64 {
        let shared = &self.resources.shared;
        if !shared.upstream.breaker().is_away() {
            return 0;
        }
        let awaiting = shared.workers.sum(|counters| &counters.awaiting_upstream);
        awaiting + shared.workers.sum(|counters| &counters.connecting)
    }

    /// Returns true if a stop has begun, and no client is left or can still come.
    fn is_drained(&self) -> bool {
        // The order matters: until no worker listens, another one may still send a client to the mailbox.
        self.resources.shared.phase() != Phase::Running
            && !self.resources.shared.workers.is_listening()
            && self.resources.mailbox.is_empty()
            && self.is_empty()
    }

    /// Returns true if the worker has no client.
    fn is_empty(&self) -> bool {
        self.connections.is_empty() && self.unregistered.is_empty()
    }

    /// Admits the clients that another worker has accepted, and answers questions.
    fn collect(&mut self, now: Instant) {
        while let Ok(mail) = self.resources.mailbox.try_recv() {
            match mail {
                Mail::Client(accepted) => self.admit(accepted.into_connection(now), now),
                Mail::Listen(listener) => self.listen(listener),
                // The caller may have waited too long already.
                Mail::ListOldest(reply) => drop(reply.try_send(self.oldest_served(now))),
                Mail::Select(selection, reply) => self.walk = Some(Walk::new(selection, reply)),
            }
        }
    }

    /// Drives each connection that was ready at the beginning, once.
    fn drive(&mut self, now: Instant) {
        self.handshake_steps = TURN_HANDSHAKE_STEPS_MAX;
        for _connection in 0..self.ready.len() {
            if self.resources.shared.freeze.asks_workers() {
                // A turn with thousands of busy connections must not delay it.
                return;
            }
            let Some(key) = self.ready.pop() else { return };
            self.act(key, now, Connection::drive);
        }
    }

    /// Returns true if the TLS handshake of a client to reject can begin.
    fn can_start_handshake(&self) -> bool {
        self.timers.len(Deadline::AwaitingHandshake) > 0
            && self.resources.shared.reject_policy.handshakes().is_any_free_or_wish()
    }

    /// Begins TLS handshakes of clients to reject, oldest first, with the steps that this turn's earlier handshakes left.
    fn start_handshakes(&mut self, now: Instant) {
        while self.handshake_steps > 0
            && let Some((key, _since)) = self.timers.first(Deadline::AwaitingHandshake)
            && let Some(permit) = self.resources.shared.reject_policy.handshakes().take()
        {
            self.act(key, now, |connection, context| connection.begin_handshake(permit, context));
        }
    }

    /// Calls `act` with a connection and its context, and carries out the verdict.
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
            proxy_headers: &shared.proxy_headers,
            hold: &shared.admission.hold,
            orders: &shared.pauses.drain,
            counters: shared.workers.counters(self.resources.index),
            workers: &shared.workers,
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
                Verdict::Linger(pass) => {
                    self.timers.enqueue(Deadline::Lingering, key, now);
                    context.counters.change(|| self.timers.publish(context.counters));
                    drop(pass);
                    verdict = connection.drive(&mut context);
                }
                Verdict::WaitSince(deadline, since) => {
                    return self.timers.enqueue(deadline, key, since);
                }
                Verdict::Admit => return self.place(key, now),
                Verdict::Hold => match shared.hold_decision(connection.take_hold_permit()) {
                    HoldDecision::Hold(permit) => {
                        connection.hold(permit);
                        self.ready.push_if(connection.is_waiting_half_closed(), key);
                        return self.timers.enqueue(Deadline::Held, key, connection.accepted());
                    }
                    HoldDecision::Reject(cause) => verdict = connection.reject(cause, &mut context),
                    HoldDecision::Close => {
                        let cause = CloseCause::HoldOverflow;
                        verdict = connection.close_gracefully(cause, &mut context);
                    }
                },
                Verdict::Close(cause) => return self.close(key, cause, now),
            }
        }
    }

    fn close(&mut self, key: Key, cause: CloseCause, now: Instant) {
        self.timers.remove(key);
        let Some(mut connection) = self.connections.remove(key) else { return };
        self.timers.forget_from(self.connections.end());
        connection.deregister(self.resources.poll.registry());
        let shared = &self.resources.shared;
        let counters = shared.workers.counters(self.resources.index);
        connection.observe_end(cause, counters, now);
        let error = (cause == CloseCause::Unreachable).then(|| {
            let lack = || io::Error::other(shared.upstream.read(&mut self.cached).lack());
            connection.take_error(&shared.upstream).unwrap_or_else(lack)
        });
        if let Some(error) = &error {
            shared.upstream.log_failure(error, RetryPlan::GivenUp, now);
        }
        if self.log.allow(cause, now) {
            let present = &shared.upstream.present(&mut self.cached).target;
            let upstream = connection.target().unwrap_or(present).address();
            let result = error.as_ref().map(ConnectResult::from);
            connection.log_end(cause, result, upstream, now);
        }
        counters.close(cause, || self.timers.publish(counters));
        // The close may make the proxy idle, and a caller that learns it from the gate reads the counts right away.
        self.publish_head();
        connection.close(cause);
    }
}

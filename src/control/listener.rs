//! Front: accepts callers, reads one whole request of each under a bound and a deadline, hands it to the executor, and
//! brings the answer back. One thread, one `Poll`; `conn/` is the life of one caller.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use log::error;
use mio::{Events, Interest, Poll, Token, Waker, unix::SourceFd};
use rustix::{
    io::Errno,
    net::{SocketFlags, accept_with},
};
use serde::{Deserialize, Serialize};
use slab::Slab;

use super::{
    conn::{CallerWords, ControlConn, ControlContext},
    index::Scope,
};
use crate::{
    handover::{
        fault,
        parcel::{Incoming, Outgoing},
    },
    pause::barrier::Barrier,
};

/// Most callers accepted in one turn, so that others are not starved.
const ACCEPTS_PER_TURN: usize = 64;
/// Part of the callers that may come by the read-only listeners, so that those who only look keep nobody from a resume.
const MONITOR_SHARE: usize = 4;
/// Most events of one turn.
const EVENTS_MAX: usize = 256;

/// Token of the notifier. Those of the listeners are next to it, downwards.
const NOTIFIER: Token = Token(usize::MAX);

/// Front of the control API: its listeners and its callers.
pub(super) struct ControlListener {
    poll: Poll,
    listeners: Vec<Listener>,
    callers: Slab<ControlConn>,
    /// Most callers served at once, waiting ones included. For one more, the least important has to go.
    callers_max: usize,
    context: ControlContext,
}

/// Front in a hand-over. Its listeners travel with those of the proxy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ControlWords {
    last_request_id: u64,
    /// Numbers of answers so far, by class.
    answers: Vec<u64>,
    callers: Vec<CallerWords>,
}

/// Listeners in a hand-over, whose descriptors go along in this order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ControlListenersWords {
    pub(crate) scopes: Vec<Scope>,
}

/// Message of the front, as the taker reads it among others.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
enum ControlMessage {
    ControlListeners(ControlListenersWords),
    Control(ControlWords),
}

/// Socket that callers come by.
struct Listener {
    socket: OwnedFd,
    scope: Scope,
    /// True while a caller may wait in it: an event says so only once.
    may_accept: bool,
}

/// Way of other threads to wake the front.
#[derive(Debug)]
pub(crate) struct Notifier {
    waker: Waker,
    /// Tells when the front has ended a turn.
    turns: Barrier,
    awaits_idle: AtomicBool,
    stops: AtomicBool,
}

impl Notifier {
    /// Makes the notifier of a front that waits in `poll`.
    pub(super) fn new(poll: &Poll) -> io::Result<Self> {
        let waker = Waker::new(poll.registry(), NOTIFIER)?;
        Ok(Self {
            waker,
            turns: Barrier::new(1),
            awaits_idle: AtomicBool::new(false),
            stops: AtomicBool::new(false),
        })
    }

    /// Waits until the front has ended a turn, or has ended. Returns false if `timeout` is over first.
    pub(crate) fn await_turn(&self, timeout: Duration) -> bool {
        let epoch = self.turns.ask();
        self.notify();
        self.turns.wait(epoch, timeout)
    }

    /// Asks for a notification at the next idle moment.
    pub(super) fn await_idle(&self) {
        self.awaits_idle.store(true, Ordering::SeqCst);
    }

    /// Tells that the last connection has closed, if a caller waits for it. Runs on the thread that closed it.
    pub(super) fn notify_idle(&self) {
        if self.awaits_idle.swap(false, Ordering::SeqCst) {
            self.notify();
        }
    }

    /// Makes the front send its callers away and end.
    pub(super) fn stop(&self) {
        self.stops.store(true, Ordering::SeqCst);
        self.notify();
    }

    /// Makes the front look at all its callers.
    pub(crate) fn notify(&self) {
        // Writing to an eventfd fails only when it is full, and then the front is awake.
        self.waker.wake().ok();
    }
}

impl ControlListener {
    /// Makes a front on `listeners`, which are bound, listening and non-blocking.
    pub(super) fn new(
        poll: Poll,
        listeners: Vec<(OwnedFd, Scope)>,
        callers_max: usize,
        context: ControlContext,
    ) -> io::Result<Self> {
        for (index, (listener, _)) in listeners.iter().enumerate() {
            let (fd, token) = (listener.as_raw_fd(), Token(NOTIFIER.0 - 1 - index));
            poll.registry().register(&mut SourceFd(&fd), token, Interest::READABLE)?;
        }
        let listeners = listeners
            .into_iter()
            .map(|(socket, scope)| Listener { socket, scope, may_accept: true })
            .collect();
        Ok(Self { poll, listeners, callers: Slab::new(), callers_max, context })
    }

    /// Returns true while it is to stand still as soon as it can: only callers that cannot move go on.
    fn is_freezing(&self) -> bool {
        self.context.handle.freeze().asks_front()
    }

    /// Stands still if a hand-over asks for it and every caller can move. It describes itself meanwhile.
    fn stand_still(&self) {
        let must_wait = self.callers.iter().any(|(_, caller)| caller.must_stay());
        // A switch goes on even if its caller was given up.
        if !self.is_freezing() || must_wait || self.context.handle.try_lock_switches().is_none() {
            return;
        }
        let freeze = self.context.handle.freeze();
        freeze.stand_still(self.context.handle.front_index(), |outbox| {
            let mut parcel = outbox.parcel();
            let words = self.describe_listeners(&mut parcel);
            fault::happen("giver", "control-listeners");
            outbox.send(&ControlMessage::ControlListeners(words), parcel)?;
            let mut parcel = outbox.parcel();
            let words = self.describe(&mut parcel);
            fault::happen("giver", "control");
            outbox.send(&ControlMessage::Control(words), parcel)
        });
    }

    fn describe_listeners<'a>(&'a self, parcel: &mut Outgoing<'a>) -> ControlListenersWords {
        let scopes = self.listeners.iter().map(|listener| {
            // An event that it has told of is told again by another epoll instance.
            let Listener { socket, scope, may_accept: _ } = listener;
            parcel.lend(socket.as_fd());
            *scope
        });
        ControlListenersWords { scopes: scopes.collect() }
    }

    /// Describes its callers for a hand-over. One that [must stay](ControlConn::must_stay) is left out.
    pub(super) fn describe<'a>(&'a self, parcel: &mut Outgoing<'a>) -> ControlWords {
        let Self { poll: _, listeners: _, callers, callers_max: _, context } = self;
        let ControlContext {
            notifier: _,
            handle: _,
            jobs: _,
            fleet_jobs: _,
            switch_jobs: _,
            metrics,
            hosts: _,
            timeouts: _,
            waiters_max: _,
            permit: _,
            last_request_id,
            scratch: _,
            short_until: _,
            stops_at: _,
            log_limit: _,
        } = context;
        ControlWords {
            last_request_id: *last_request_id,
            answers: metrics.answers(),
            callers: callers.iter().filter_map(|(_, caller)| caller.describe(parcel)).collect(),
        }
    }

    /// Takes over the callers of another front, also beyond the bound.
    pub(super) fn inherit(&mut self, words: ControlWords, mut parcel: Incoming) -> io::Result<()> {
        let ControlWords { last_request_id, answers, callers } = words;
        self.context.last_request_id = last_request_id;
        self.context.metrics.add_answers(&answers);
        for words in callers {
            let caller = ControlConn::rebuild(words, &mut parcel, &self.context)
                .map_err(io::Error::other)?;
            caller.register(self.poll.registry(), Token(self.callers.vacant_key()))?;
            self.callers.insert(caller);
        }
        parcel.finish().map_err(io::Error::other)
    }

    /// Serves callers until it is stopped. A panic costs the callers of the moment, and no later ones.
    pub(super) fn run(mut self) {
        // Where it takes over, the other process goes on until this returns.
        self.stand_still();
        self.callers.iter_mut().for_each(|(_, caller)| caller.own_pause());
        let mut events = Events::with_capacity(EVENTS_MAX);
        let mut epoch = 0;
        while self.context.stops_at.is_none_or(|at| !self.callers.is_empty() && Instant::now() < at)
        {
            if catch_unwind(AssertUnwindSafe(|| self.turn(&mut events))).is_err() {
                error!(
                    "a defect: the control API's front panicked; its callers are cut off and it goes on"
                );
                self.callers.clear();
                self.listeners.iter_mut().for_each(|listener| listener.may_accept = true);
            }
            self.context.notifier.turns.ack(0, &mut epoch);
            self.stand_still();
        }
        self.context.notifier.turns.leave(0);
        self.context.handle.freeze().leave(self.context.handle.front_index());
    }

    /// Waits, marks, drives and accepts. Marking closes nothing, so that no slot is reused while events still name it. Accepting
    /// comes last: where descriptors are short, a newcomer would take the one that an answer needs.
    pub(super) fn turn(&mut self, events: &mut Events) {
        if let Err(error) = self.wait(events) {
            self.context.log_failure(&format!("the control API cannot wait for callers: {error}"));
        }
        self.mark(events);
        if self.context.short_until.is_some_and(|until| until <= Instant::now()) {
            self.context.short_until = None;
        }
        let is_freezing = self.is_freezing();
        let registry = self.poll.registry();
        self.callers.retain(|_, caller| {
            let stays = is_freezing && !caller.must_stay() || caller.drive(&mut self.context);
            if !stays {
                caller.deregister(registry);
            }
            stays
        });
        self.accept();
    }

    fn wait(&mut self, events: &mut Events) -> io::Result<()> {
        let is_freezing = self.is_freezing();
        let goes_on = |caller: &&ControlConn| !is_freezing || caller.must_stay();
        let callers = || self.callers.iter().map(|(_, caller)| caller).filter(goes_on);
        let mut next: Vec<Instant> = callers().filter_map(|caller| caller.deadline).collect();
        next.extend(self.context.short_until.into_iter().chain(self.context.stops_at));
        let is_busy = callers().any(|caller| caller.ready);
        next.extend((is_busy || self.can_accept()).then(Instant::now));
        let timeout = next.iter().min().map(|at| at.saturating_duration_since(Instant::now()));
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            result => result,
        }
    }

    /// Remembers the events.
    fn mark(&mut self, events: &Events) {
        for event in events {
            match event.token() {
                NOTIFIER => {
                    if self.context.notifier.stops.load(Ordering::SeqCst) {
                        let deadline = Instant::now() + self.context.timeouts.linger;
                        self.context.stops_at.get_or_insert(deadline);
                    }
                    self.ready_all();
                }
                Token(key) => {
                    if let Some(listener) = self.listeners.get_mut(NOTIFIER.0 - 1 - key) {
                        listener.may_accept = true;
                    } else if let Some(caller) = self.callers.get_mut(key) {
                        caller.mark(event);
                    }
                }
            }
        }
    }

    fn ready_all(&mut self) {
        self.callers.iter_mut().for_each(|(_, caller)| caller.ready = true);
    }

    fn can_accept(&self) -> bool {
        !self.is_freezing()
            && self.listeners.iter().any(|listener| listener.may_accept)
            && self.context.short_until.is_none()
            && self.context.stops_at.is_none()
    }

    /// Accepts callers, one of each listener in turn.
    fn accept(&mut self) {
        for turn in 0..ACCEPTS_PER_TURN {
            if !self.can_accept() {
                return;
            }
            self.accept_by(turn % self.listeners.len());
        }
    }

    fn accept_by(&mut self, index: usize) {
        let Some(listener) = self.listeners.get_mut(index).filter(|it| it.may_accept) else {
            return;
        };
        match accept_with(&listener.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                let scope = listener.scope;
                self.admit(socket, scope);
            }
            Err(Errno::AGAIN) => listener.may_accept = false,
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(error) => self.context.run_short("accept a caller", &error.into()),
        }
    }

    fn admit(&mut self, socket: OwnedFd, scope: Scope) {
        let mut caller = ControlConn::new(socket, scope, self.context.timeouts);
        if self.is_full(scope) && !self.evict(scope) {
            return caller.refuse(&self.context.metrics);
        }
        let token = Token(self.callers.vacant_key());
        if let Err(error) = caller.register(self.poll.registry(), token) {
            return self.context.run_short("serve a caller", &error);
        }
        if caller.drive(&mut self.context) {
            self.callers.insert(caller);
        }
    }

    /// Returns true if there is no room for a caller of a listener with this scope.
    fn is_full(&self, scope: Scope) -> bool {
        let read_only = || self.callers.iter().filter(|(_, it)| it.scope == Scope::ReadOnly);
        let monitor_max = (self.callers_max / MONITOR_SHARE).max(1);
        self.callers.len() >= self.callers_max
            || scope == Scope::ReadOnly && read_only().count() >= monitor_max
    }

    /// Closes the least important caller, if any may go. Half a request must not keep out a whole one, and those who only
    /// look make room for each other alone.
    fn evict(&mut self, newcomer: Scope) -> bool {
        let expendable = self.callers.iter().filter_map(|(key, caller)| {
            let may_go = newcomer == Scope::Full || caller.scope == Scope::ReadOnly;
            may_go.then(|| Some((caller.expendable()?, key))).flatten()
        });
        let Some((_, key)) = expendable.min() else { return false };
        let caller = self.callers.remove(key);
        caller.deregister(self.poll.registry());
        caller.refuse(&self.context.metrics);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_of_the_front_is_awaited() {
        const MOMENT: Duration = Duration::from_millis(50);

        let notifier = Notifier::new(&Poll::new().unwrap()).unwrap();
        assert!(!notifier.await_turn(MOMENT), "there is no front");
        let mut epoch = 0;
        notifier.turns.ack(0, &mut epoch);
        assert!(!notifier.await_turn(MOMENT), "that turn was before the question");
        notifier.turns.leave(0);
        assert!(notifier.await_turn(MOMENT));
    }
}

//! The front: accepts callers, reads one whole request of each under a bound and a deadline, asks the private server, and
//! brings the answer back. One thread, one `Poll`; what happens to one caller is told in `caller.rs`.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use log::error;
use mio::{Events, Interest, Poll, Token, Waker, unix::SourceFd};
use rustix::{
    io::Errno,
    net::{SocketFlags, accept_with},
};
use slab::Slab;

use super::{
    Seldom, Timeouts,
    caller::{Caller, Means, Step, refuse},
    private::{Private, RETRY_INTERVAL},
    request::HostPolicy,
};

/// Accepted in one turn, so that callers already here are not starved.
const ACCEPTS_PER_TURN: usize = 64;
/// How many events are taken in one turn.
const EVENTS_MAX: usize = 256;
const READ_BYTES: usize = 16 << 10;

const LISTENER: Token = Token(usize::MAX);
const STOP: Token = Token(usize::MAX - 1);

pub(super) struct Front {
    poll: Poll,
    listener: OwnedFd,
    is_unix: bool,
    /// When to accept, although no event says so: after a full turn, or when accepting has failed (no further edge comes then).
    accept_at: Option<Instant>,
    callers: Slab<Caller>,
    /// How many callers are served at once, waiting ones included. For one more, the one that matters least has to go.
    callers_max: usize,
    next_id: u64,
    means: Means,
    complaints: Seldom,
}

impl Front {
    /// The waker stops the front.
    pub(super) fn new(
        listener: OwnedFd,
        is_unix: bool,
        hosts: HostPolicy,
        private: Arc<Private>,
        callers_max: usize,
        timeouts: Timeouts,
    ) -> io::Result<(Self, Waker)> {
        let poll = Poll::new()?;
        let registry = poll.registry().try_clone()?;
        registry.register(&mut SourceFd(&listener.as_raw_fd()), LISTENER, Interest::READABLE)?;
        let stop = Waker::new(&registry, STOP)?;
        let means = Means {
            registry,
            private,
            hosts,
            timeouts,
            stops_at: None,
            scratch: vec![0; READ_BYTES],
        };
        let (callers, complaints) = (Slab::new(), Seldom::default());
        Ok((
            Self {
                poll,
                listener,
                is_unix,
                accept_at: None,
                callers,
                callers_max,
                next_id: 1,
                means,
                complaints,
            },
            stop,
        ))
    }

    /// Serves callers until it is stopped. A panic costs the callers of the moment, and no later ones.
    pub(super) fn run(mut self) {
        let mut events = Events::with_capacity(EVENTS_MAX);
        while self.means.stops_at.is_none_or(|at| !self.callers.is_empty() && Instant::now() < at) {
            if catch_unwind(AssertUnwindSafe(|| self.turn(&mut events))).is_err() {
                error!(
                    "a defect: the control API's front panicked; its callers are cut off and it goes on"
                );
                self.callers.clear();
                self.accept_at = Some(Instant::now());
            }
        }
    }

    /// Wait, mark, drive, accept, expire. Marking closes nothing, so that no slot is reused while events still name it.
    fn turn(&mut self, events: &mut Events) {
        let deadlines = self.callers.iter().filter_map(|(_, caller)| caller.deadline);
        let next = deadlines.chain(self.accept_at).chain(self.means.stops_at).min();
        let timeout = next.map(|next| next.saturating_duration_since(Instant::now()));
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                self.complaints.error(&format!("the control API cannot wait for callers: {error}"));
            }
            _ => {}
        }
        for key in self.mark(events) {
            self.drive(key);
        }
        if self.means.stops_at.is_some() {
            self.accept_at = None;
        } else if self.accept_at.is_some_and(|at| at <= Instant::now()) {
            self.accept();
        }
        self.expire();
    }

    /// Remembers what the events say; returns whose turn it is.
    fn mark(&mut self, events: &Events) -> Vec<usize> {
        let mut ready = Vec::new();
        for event in events {
            match event.token() {
                LISTENER => self.accept_at = Some(Instant::now()),
                STOP => {
                    let deadline = Instant::now() + self.means.timeouts.stop;
                    self.means.stops_at = Some(deadline);
                    for (key, caller) in &mut self.callers {
                        caller.stop(deadline, &self.means);
                        ready.push(key);
                    }
                }
                Token(token) => {
                    let Some(caller) = self.callers.get_mut(token / 2) else { continue };
                    if token % 2 == 0 {
                        caller.mark(event); // else it is of the connection to the private server
                    }
                    ready.push(token / 2);
                }
            }
        }
        ready
    }

    fn drive(&mut self, key: usize) {
        while let Some(caller) = self.callers.get_mut(key) {
            match caller.step(Token(2 * key + 1), &mut self.means) {
                Step::Again => {}
                Step::Blocked => break,
                Step::Done => drop(self.callers.remove(key)),
            }
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS_PER_TURN {
            match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => self.admit(socket),
                Err(Errno::AGAIN) => {
                    self.accept_at = None;
                    return;
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    self.complaints.error(&format!(
                        "the control API cannot accept a caller: {error}; it is tried again"
                    ));
                    self.accept_at = Some(Instant::now() + RETRY_INTERVAL);
                    return;
                }
            }
        }
    }

    fn admit(&mut self, socket: OwnedFd) {
        if self.callers.len() >= self.callers_max && !self.evict() {
            return refuse(&socket);
        }
        let slot = self.callers.vacant_entry();
        let (key, interest) = (slot.key(), Interest::READABLE | Interest::WRITABLE);
        if let Err(error) = self.means.registry.register(
            &mut SourceFd(&socket.as_raw_fd()),
            Token(2 * key),
            interest,
        ) {
            return self
                .complaints
                .error(&format!("the control API cannot serve a caller: {error}"));
        }
        slot.insert(Caller::new(self.next_id, socket, self.is_unix, &self.means.timeouts));
        self.next_id += 1;
        self.drive(key);
    }

    /// Closes the caller that matters least. One that sends half a request must not keep out one that sends a whole one.
    fn evict(&mut self) -> bool {
        let victim = self
            .callers
            .iter()
            .filter_map(|(key, caller)| Some((caller.expendable()?, caller.id, key)))
            .min();
        if let Some((_, _, key)) = victim {
            self.callers.remove(key).evict();
        }
        victim.is_some()
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let late = self
            .callers
            .iter()
            .filter(|(_, caller)| caller.deadline.is_some_and(|deadline| deadline <= now));
        for key in late.map(|(key, _)| key).collect::<Vec<_>>() {
            match self.callers.get_mut(key).map(|caller| caller.expire(&self.means)) {
                Some(Step::Again) => self.drive(key),
                Some(Step::Done) => drop(self.callers.remove(key)),
                _ => {}
            }
        }
    }
}

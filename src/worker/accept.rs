//! Accepting of clients: as long as permits are free, and to the last queued one at a stop.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Worker, table::client_token, timers::Key};
use crate::{
    connection::{Connection, Verdict},
    pause::gate::Mode,
    shared::Phase,
    sys::{Listener, rcvbuf},
    worker_pool::Accepted,
};

/// Clients accepted in one turn, at most.
const TURN_ACCEPTS_MAX: usize = 64;
/// Queued clients accepted at a stop before the listeners are closed, at most.
const STOP_ACCEPTS_MAX: usize = 64 * 1024;
/// Pause of accepting while descriptors or memory are short. No event reports the end of a shortage.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Obstacle to accepting clients, if there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Accepting {
    /// No obstacle is known.
    Ready,
    /// No permit is free: none for a client, or none to hold one. The thread that frees one wakes the worker.
    Full,
    /// The system is short of descriptors or memory; accepting goes on at that time.
    RetryAt(Instant),
}

impl Worker<'_> {
    /// Sizes the receive buffers of clients to come: small while clients are held, as the kernel keeps their bytes all
    /// that time. UNIX listeners need none of this: the kernel charges bytes to their sender.
    pub(super) fn size_accept_buffer(&mut self) {
        let is_small = self.resources.shared.pauses.gate.mode() == Some(Mode::Hold);
        if std::mem::replace(&mut self.resources.is_small, is_small) == is_small {
            return;
        }
        for listener in self.resources.listeners.iter().filter(|it| !it.is_unix()) {
            let result = if is_small { rcvbuf::narrow(listener) } else { rcvbuf::widen(listener) };
            if let Err(error) = result {
                log::debug!("the system does not bound what held clients send: {error}");
            }
        }
    }

    pub(super) fn accept(&mut self, now: Instant) {
        if matches!(self.accepting, Accepting::RetryAt(until) if until <= now) {
            self.accepting = Accepting::Ready;
        }
        // `admit` puts a client back only after it has set a time to retry, so a deadline brings the worker back here.
        while !matches!(self.accepting, Accepting::RetryAt(_))
            && let Some(connection) = self.unregistered.pop_front()
        {
            self.admit(connection, now);
        }
        for _client in 0..TURN_ACCEPTS_MAX {
            if self.accepting != Accepting::Ready || !self.accept_one(now) {
                return;
            }
        }
    }

    /// Accepts a client from the next listener. Returns false when no listener has a queued client.
    fn accept_one(&mut self, now: Instant) -> bool {
        let next = self.queued.front().and_then(|&index| self.resources.listeners.get(index));
        let Some(listener) = next else { return false };
        let Ok(hold_permit) = self.resources.shared.try_reserve() else {
            self.accepting = Accepting::Full;
            if let Some(more) =
                self.resources.shared.admission.accept_troubles.too_many_held.allow(now)
            {
                log::warn!(
                    "as many clients are held as hold.max allows{more}: further ones wait in the backlog"
                );
            }
            return true;
        };
        let Some(permit) = self.resources.shared.admission.clients.take() else {
            self.accepting = Accepting::Full;
            if let Some(more) =
                self.resources.shared.admission.accept_troubles.too_many_clients.allow(now)
            {
                // An upstream address that has become tcpause's own leads back here, and its loop takes all permits.
                self.resources.shared.upstream.ask();
                let max = self.resources.shared.admission.clients.max();
                log::warn!(
                    "all places are taken ({max} in all){more}: new clients wait in the backlog; raise proxy.max-connections, if it is set, or the limit of open files"
                );
            }
            return true;
        };
        let is_shared = listener.is_shared();
        match listener.accept() {
            Ok((client, address)) => {
                self.queued.rotate_left(1);
                let accepted = Accepted { client, address, permit, hold_permit };
                self.assign_worker(accepted, is_shared, now);
            }
            // An event reports the next client.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.queued.pop_front();
            }
            // This client has gone already; another may be queued behind it.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => self.back_off(&error, now),
        }
        true
    }

    /// Takes in a client.
    pub(super) fn admit(&mut self, mut connection: Connection, now: Instant) {
        let key = self.connections.vacant();
        if let Err(error) = connection.register(self.resources.poll.registry(), client_token(key)) {
            self.unregistered.push_back(connection);
            return self.back_off(&error, now);
        }
        let counters = self.resources.shared.workers.counters(self.resources.index);
        counters.accept();
        connection.admitted(self.resources.shared.workers.next_id(self.resources.index), now);
        #[cfg(test)]
        counters.panic_if_due();
        let owes_header = connection.owes_header(&self.resources.shared.proxy_headers);
        self.connections.insert(connection);
        if owes_header {
            let is_paused = self.resources.shared.pauses.gate.is_paused();
            self.act(key, now, |connection, _context| connection.await_header(is_paused));
        } else {
            self.place(key, now);
        }
    }

    /// Serves, holds or rejects a client.
    pub(super) fn place(&mut self, key: Key, now: Instant) {
        // Clients that came earlier go first.
        let shared = &self.resources.shared;
        let queue = &shared.admission.queue;
        let is_first = self.first_waiting().is_none() && !queue.is_anyone_waiting();
        let start = if is_first { shared.try_start_alone() } else { None };
        // If every waiting client has made a failed attempt, this one's would have failed, too. So its patience begins now.
        let begins_patience = start.is_none()
            && shared.upstream.breaker().is_open()
            && !shared.pauses.gate.is_paused()
            && self.first_held().is_none();
        self.act(key, now, |connection, context| match start {
            Some((pass, ticket)) => connection.connect(pass, ticket, context),
            None if begins_patience => connection.begin_patience(context),
            None => Verdict::Hold,
        });
    }

    /// Pauses accepting after `error`, most likely a shortage of the system, whose end no event reports.
    pub(super) fn back_off(&mut self, error: &io::Error, now: Instant) {
        self.accepting = Accepting::RetryAt(now + ACCEPT_RETRY_INTERVAL);
        self.resources.shared.workers.counters(self.resources.index).accept_failed(error);
        if let Some(more) = self.resources.shared.admission.accept_troubles.shortage.allow(now) {
            log::warn!("cannot accept clients now{more}, they wait: {error}");
        }
    }

    /// Keeps a client, or sends it to a worker with fewer clients, if its listener is shared. `SO_REUSEPORT` multiplies neither
    /// UNIX nor inherited listeners, so one worker accepts for all.
    fn assign_worker(&mut self, accepted: Accepted, is_shared: bool, now: Instant) {
        let shared = Arc::clone(&self.resources.shared);
        let own = self.connections.len() as u64;
        if is_shared
            && let Some((index, load)) = shared.workers.least_loaded(self.resources.index)
            && load < own
            && shared.phase() == Phase::Running
        {
            if let Err(accepted) = shared.workers.send(index, accepted) {
                self.admit(accepted.into_connection(now), now);
            }
            return;
        }
        self.admit(accepted.into_connection(now), now);
    }

    /// Accepts all queued clients and closes the listeners. Closing a listener resets the clients in its queue, so it
    /// stays open while permits or descriptors for them are missing.
    pub(super) fn stop_listening(&mut self, now: Instant) {
        if self.resources.listeners.iter().any(Listener::is_inherited) {
            // Its queue is not lost: a successor serves it.
            return self.close_listeners();
        }
        // Without its file, and refusing more, a UNIX listener gets no new clients, so its queue comes to an end.
        self.resources.shared.socket_files.remove_of_proxy();
        self.resources.listeners.iter().for_each(Listener::refuse_more);
        self.queued = (0..self.resources.listeners.len()).collect();
        for _client in 0..STOP_ACCEPTS_MAX {
            if self.accepting != Accepting::Ready || !self.accept_one(now) {
                break;
            }
        }
        if self.accepting == Accepting::Ready {
            self.close_listeners();
        } else {
            self.resources.listeners.iter().for_each(Listener::cut_backlog);
        }
    }

    pub(super) fn close_listeners(&mut self) {
        if !self.resources.listeners.is_empty() {
            self.resources.listeners.clear();
            self.queued.clear();
            self.accepting = Accepting::Ready;
            self.resources.shared.workers.stopped_listening();
        }
    }
}

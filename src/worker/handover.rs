//! Hand-over of a worker: it stands still at the end of a turn and describes its connections, or adopts those of another
//! process before its first turn.

use std::time::Instant;

use mio::Token;
use serde::{Deserialize, Serialize};

use super::{
    WAKER, Worker, WorkerResources,
    accept::Accepting,
    table::{client_token, upstream_token},
    timers::Key,
};
use crate::{
    connection::{
        Connection,
        deadline::{DIALLED, Deadline, REJECTED, RELAYED, WAITING},
        words::{ConnectionWords, RebuildContext},
    },
    handover::{
        channel::{DESCRIPTORS_MAX, Outbox},
        fault,
        parcel::{Incoming, Misfit, Moment, Outgoing},
    },
    listing::KillMode,
    sys::{self, Listener, ListenerWords},
    worker_pool::Mail,
};

/// Most descriptors of one connection: two sockets and two pipes.
const CONNECTION_DESCRIPTORS_MAX: usize = 6;
/// Most raw bytes of a batch, beyond which it is sent.
const BATCH_BYTES_MAX: usize = 1 << 20;

/// Listeners of one worker.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ListenersWords {
    /// Index of the worker.
    pub(crate) worker: usize,
    pub(crate) listeners: Vec<ListenerWords>,
    /// True if clients to come get a small receive buffer.
    pub(crate) is_small: bool,
}

/// Connections of one worker, as many as fit into one message.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct BatchWords {
    /// Index of the worker.
    pub(crate) worker: usize,
    connections: Vec<EntryWords>,
}

/// A connection with its place in the lists of its worker.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct EntryWords {
    connection: ConnectionWords,
    /// Deadline and its beginning; none for a client that waits to be registered.
    deadline: Option<(Deadline, Moment)>,
    /// True if it is to be driven without an event.
    is_ready: bool,
    /// Kill that an operator has ordered, and its time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    doom: Option<(KillMode, Moment)>,
}

/// Message of a worker, as the taker reads it among others.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
enum WorkerMessage {
    Listeners(ListenersWords),
    Connections(BatchWords),
}

/// Connections that a worker begins with.
pub(crate) type Inherited = Vec<(BatchWords, Incoming)>;

impl Worker<'_> {
    /// Adopts what it inherits, publishes it, and waits for the word to go on.
    pub(super) fn begin(&mut self) {
        let inherited = std::mem::take(&mut self.resources.inherited);
        if let Err(misfit) = self.adopt(inherited) {
            self.resources.shared.freeze.fail(self.resources.index, misfit.to_string());
        }
        self.publish();
        if self.resources.shared.freeze.asks_workers() {
            self.stand_still(sys::now());
            // From here on the listeners are this process's.
            self.resources.listeners.iter().for_each(Listener::own);
        }
    }

    /// Stands still while a hand-over is under way, and describes itself.
    pub(super) fn stand_still(&mut self, now: Instant) {
        let shared = std::sync::Arc::clone(&self.resources.shared);
        shared.freeze.stand_still(self.resources.index, |outbox| {
            self.take_in(now);
            let mut parcel = outbox.parcel();
            let listeners = self.describe_listeners(&mut parcel);
            send(outbox, &WorkerMessage::Listeners(listeners), parcel)?;
            self.describe(outbox.begin, |batch, parcel| {
                send(outbox, &WorkerMessage::Connections(batch), parcel)
            })
        });
    }

    /// Takes the clients out of the mailbox, which other workers fill no more.
    fn take_in(&mut self, now: Instant) {
        while let Ok(mail) = self.resources.mailbox.try_recv() {
            match mail {
                Mail::Client(accepted) => {
                    self.unregistered.push_back(accepted.into_connection(now));
                }
                Mail::Listen(listener) => self.listen(listener),
                // Its caller waits in the process that goes on.
                Mail::ListOldest(_) | Mail::Select(..) => {}
            }
        }
    }

    /// Listens by one more listener.
    pub(super) fn listen(&mut self, listener: Listener) {
        let index = self.resources.listeners.len();
        if let Err(error) =
            listener.register(self.resources.poll.registry(), Token(WAKER.0 - 1 - index))
        {
            log::warn!("proxy.addr: a listener of a thread cannot be watched: {error}");
            return;
        }
        self.resources.listeners.push(listener);
        self.queued.push_back(index);
        self.accepting = Accepting::Ready;
    }

    fn describe_listeners<'a>(&'a self, parcel: &mut Outgoing<'a>) -> ListenersWords {
        let WorkerResources { index, listeners, is_small, .. } = &*self.resources;
        let listeners = listeners.iter().map(|listener| {
            parcel.lend(listener.lend());
            listener.describe()
        });
        ListenersWords { worker: *index, listeners: listeners.collect(), is_small: *is_small }
    }

    /// Describes all connections, in batches.
    pub(crate) fn describe(
        &self,
        begin: Instant,
        mut send: impl FnMut(BatchWords, Outgoing<'_>) -> Result<(), Misfit>,
    ) -> Result<(), Misfit> {
        let worker = self.resources.index;
        // In the order of the lists, where many have begun at the same moment.
        let lists = WAITING.iter().chain(&DIALLED).chain(&RELAYED).chain(&REJECTED);
        let keys = lists.flat_map(|&deadline| self.timers.keys(deadline));
        let registered = keys.filter_map(|key| {
            let (connection, deadline) = (self.connections.get(key)?, self.timers.position(key));
            let doom = self.doomed.of(key, connection.id());
            Some((connection, deadline, self.ready.contains(key), doom))
        });
        let unregistered =
            self.unregistered.iter().map(|connection| (connection, None, false, None));
        let (mut connections, mut parcel) = (Vec::new(), Outgoing::new(begin));
        for (connection, deadline, is_ready, doom) in registered.chain(unregistered) {
            if parcel.descriptor_count() > DESCRIPTORS_MAX - CONNECTION_DESCRIPTORS_MAX
                || parcel.byte_count() > BATCH_BYTES_MAX
            {
                let full = std::mem::replace(&mut parcel, Outgoing::new(begin));
                send(BatchWords { worker, connections: std::mem::take(&mut connections) }, full)?;
            }
            if !connection.is_movable() {
                return Err(Misfit::new("a client to reject is in a TLS session; try again"));
            }
            connections.push(EntryWords {
                connection: connection.describe(&mut parcel),
                deadline: deadline.map(|(deadline, since)| (deadline, parcel.moment(since))),
                is_ready,
                doom: doom.map(|doom| (doom.how, parcel.moment(doom.at))),
            });
        }
        if connections.is_empty() {
            Ok(())
        } else {
            send(BatchWords { worker, connections }, parcel)
        }
    }

    /// Adopts the connections of another process, which may still be there. Nothing is read, written or closed.
    pub(super) fn adopt(&mut self, inherited: Inherited) -> Result<(), Misfit> {
        let mut listed = Vec::new();
        for (batch, mut parcel) in inherited {
            let giver = batch.worker;
            for EntryWords { connection, deadline, is_ready, doom } in batch.connections {
                let connection = self.rebuild(connection, &mut parcel, giver)?;
                let id = connection.id();
                let Some((deadline, since)) = deadline else {
                    self.unregistered.push_back(connection);
                    continue;
                };
                let key = self.insert(connection)?;
                listed.push((parcel.instant(since), deadline, key));
                if let Some((how, at)) = doom {
                    self.doomed.add(key, id, how, parcel.instant(at));
                }
                if is_ready {
                    self.ready.push(key);
                }
            }
            parcel.finish()?;
        }
        // A list is searched from its tail.
        listed.sort_by_key(|&(since, ..)| since);
        for (since, deadline, key) in listed {
            self.timers.enqueue(deadline, key, since);
        }
        Ok(())
    }

    fn rebuild(
        &self,
        words: ConnectionWords,
        parcel: &mut Incoming,
        giver: usize,
    ) -> Result<Connection, Misfit> {
        let shared = &self.resources.shared;
        let context = RebuildContext {
            admission: &shared.admission,
            gate: &shared.pauses.gate,
            pipes: &self.buffers.pipes,
            upstream: &shared.upstream,
            giver,
        };
        Connection::rebuild(words, parcel, &context)
    }

    /// Registers an adopted connection, by which events tell what is there already.
    fn insert(&mut self, mut connection: Connection) -> Result<Key, Misfit> {
        let key = self.connections.vacant();
        connection
            .adopt_registration(
                self.resources.poll.registry(),
                client_token(key),
                upstream_token(key),
            )
            .map_err(|error| Misfit::new(format!("a connection cannot be watched: {error}")))?;
        Ok(self.connections.insert(connection))
    }
}

/// Sends a message of a worker.
fn send(outbox: &Outbox, message: &WorkerMessage, parcel: Outgoing<'_>) -> Result<(), Misfit> {
    let word = match message {
        WorkerMessage::Listeners(_) => "listeners",
        WorkerMessage::Connections(_) => "connections",
    };
    fault::happen("giver", word);
    outbox.send(message, parcel).map_err(|error| Misfit::new(error.to_string()))
}

//! Ends of connections by order: of all for a pause or a stop, of loops, and of those that an operator has chosen.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Instant,
};

use super::{Worker, timers::Key};
use crate::{
    listing::{ConnectionId, KillMode},
    stats::cause::CloseCause,
};

/// Connections that are killed in one turn, at most.
const TURN_KILLS_MAX: usize = 64;

/// Connections that are to be killed. There is one entry at most for each key of the table.
#[derive(Debug, Default)]
pub(super) struct Doomed {
    by_key: HashMap<Key, Doom>,
    by_time: BTreeSet<(Instant, Key)>,
}

/// Kill of a connection that is to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Doom {
    pub(super) how: KillMode,
    pub(super) at: Instant,
    /// Connection that the key has meant: another one may have it now.
    id: ConnectionId,
}

impl Doomed {
    /// Adds a connection. Of two orders for it, the earlier one counts.
    pub(super) fn add(&mut self, key: Key, id: ConnectionId, how: KillMode, at: Instant) {
        if let Some(before) = self.by_key.get(&key) {
            if before.id == id && before.at <= at {
                return;
            }
            self.by_time.remove(&(before.at, key));
        }
        self.by_key.insert(key, Doom { how, at, id });
        self.by_time.insert((at, key));
    }

    /// Returns the kill that is to come for the connection `id` with this key.
    pub(super) fn of(&self, key: Key, id: ConnectionId) -> Option<Doom> {
        self.by_key.get(&key).copied().filter(|doom| doom.id == id)
    }

    /// Returns the time of the next kill.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.by_time.first().map(|&(at, _key)| at)
    }

    /// Removes and returns the next kill, if it is due.
    fn take_due(&mut self, now: Instant) -> Option<(Key, Doom)> {
        let &(at, key) = self.by_time.first()?;
        if now < at {
            return None;
        }
        self.by_time.pop_first();
        Some((key, self.by_key.remove(&key)?))
    }
}

impl Worker<'_> {
    /// Closes all connections if the proxy stops, and otherwise those with a pass.
    pub(super) fn close_all(&mut self, cause: CloseCause, now: Instant) {
        let stops = cause == CloseCause::Stopped;
        for key in 0..self.connections.end() {
            if stops || self.connections.get_mut(key).is_some_and(|it| it.is_served()) {
                self.close(key, cause, now);
            }
        }
        if stops {
            for connection in self.unregistered.drain(..) {
                connection.close(cause);
            }
        }
    }

    /// Closes the connections that lead back to tcpause itself. Their clients are connections of tcpause, too: they never
    /// end by themselves, and take each permit that becomes free.
    pub(super) fn close_loops(&mut self, now: Instant) {
        let addresses = Arc::clone(self.resources.shared.upstream.read(&mut self.cached));
        for key in 0..self.connections.end() {
            if self.connections.get_mut(key).is_some_and(|it| it.is_loop(addresses.own())) {
                self.close(key, CloseCause::Unreachable, now);
            }
        }
    }

    /// Kills connections whose time has come.
    pub(super) fn kill_due(&mut self, now: Instant) {
        for _connection in 0..TURN_KILLS_MAX {
            let Some((key, Doom { how, id, .. })) = self.doomed.take_due(now) else { return };
            if self.connections.get(key).is_some_and(|it| it.id() == id) {
                self.act(key, now, |connection, context| connection.kill(how, context));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_kill_is_due_once_at_its_earliest_time() {
        let (mut doomed, begin) = (Doomed::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        let id = |number| ConnectionId::new(0, number);
        doomed.add(1, id(1), KillMode::Reset, at(5));
        doomed.add(2, id(2), KillMode::Close, at(3));
        doomed.add(1, id(1), KillMode::Close, at(9));
        doomed.add(2, id(2), KillMode::Reset, at(2));
        assert_eq!(doomed.next_at(), Some(at(2)));
        assert_eq!(
            doomed.of(1, id(1)).map(|doom| (doom.how, doom.at)),
            Some((KillMode::Reset, at(5)))
        );
        assert_eq!(doomed.of(1, id(7)), None);
        // Another connection has the key by now.
        doomed.add(1, id(7), KillMode::Reset, at(6));
        assert_eq!(doomed.take_due(at(1)), None);
        let due = |doomed: &mut Doomed, now| doomed.take_due(now).map(|(key, doom)| (key, doom.id));
        assert_eq!(due(&mut doomed, at(9)), Some((2, id(2))));
        assert_eq!(due(&mut doomed, at(5)), None);
        assert_eq!(due(&mut doomed, at(6)), Some((1, id(7))));
        assert_eq!((doomed.next_at(), doomed.by_key.len()), (None, 0));
    }
}

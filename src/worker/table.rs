//! A worker's connections by key. Keys are small numbers, from which the tokens follow. The memory of a burst is given
//! back.

use mio::Token;
use slab::Slab;

use super::timers::Key;

/// Number of keys in a chunk. A single array would be copied as it grows, and would never give back the memory of the
/// largest burst.
const CHUNK_LEN: usize = 256;

/// Values by key, in chunks.
#[derive(Debug)]
pub(crate) struct Table<T> {
    /// The chunks. An empty one has no memory, except for the first.
    chunks: Vec<Slab<T>>,
    /// First chunk that may have a free key.
    open: usize,
    len: usize,
}

impl<T> Table<T> {
    /// Returns an empty table.
    pub(crate) fn new() -> Self {
        Self { chunks: Vec::new(), open: 0, len: 0 }
    }

    /// Returns true if the table has no value.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the number of values.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns a bound above all keys in use.
    pub(crate) fn end(&self) -> Key {
        key_at(self.chunks.len(), 0)
    }

    /// Returns the value of `key`.
    pub(crate) fn get(&self, key: Key) -> Option<&T> {
        let (chunk, index) = split(key);
        self.chunks.get(chunk)?.get(index)
    }

    /// Returns the value of `key` mutably.
    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let (chunk, index) = split(key);
        self.chunks.get_mut(chunk)?.get_mut(index)
    }

    /// Returns the key that the next [`Table::insert`] will use.
    pub(crate) fn vacant(&mut self) -> Key {
        while self.chunks.get(self.open).is_some_and(|chunk| chunk.len() == CHUNK_LEN) {
            self.open += 1;
        }
        key_at(self.open, self.chunks.get(self.open).map_or(0, Slab::vacant_key))
    }

    /// Inserts `value` at [`Table::vacant`]. Returns its key.
    pub(crate) fn insert(&mut self, value: T) -> Key {
        let (chunk, _index) = split(self.vacant());
        if chunk == self.chunks.len() {
            self.chunks.push(Slab::new());
        }
        let Some(values) = self.chunks.get_mut(chunk) else { return Key::MAX };
        if values.capacity() == 0 {
            values.reserve_exact(CHUNK_LEN);
        }
        self.len += 1;
        key_at(chunk, values.insert(value))
    }

    /// Removes and returns the value of `key`.
    pub(crate) fn remove(&mut self, key: Key) -> Option<T> {
        let (chunk, index) = split(key);
        let values = self.chunks.get_mut(chunk)?;
        let value = values.try_remove(index)?;
        if values.is_empty() && chunk > 0 {
            *values = Slab::new();
        }
        self.len -= 1;
        self.open = self.open.min(chunk);
        while self.chunks.len() > 1 && self.chunks.last().is_some_and(Slab::is_empty) {
            self.chunks.pop();
        }
        Some(value)
    }
}

/// Returns the token of the client of a connection.
pub(crate) fn client_token(key: Key) -> Token {
    Token(key as usize * 2)
}

/// Returns the token of the upstream of a connection.
pub(crate) fn upstream_token(key: Key) -> Token {
    Token(key as usize * 2 + 1)
}

/// Returns the key that `token` belongs to.
pub(crate) fn key_of(token: Token) -> Key {
    Key::try_from(token.0 / 2).unwrap_or(Key::MAX)
}

/// Splits a key into its chunk and the index there.
fn split(key: Key) -> (usize, usize) {
    (key as usize / CHUNK_LEN, key as usize % CHUNK_LEN)
}

fn key_at(chunk: usize, index: usize) -> Key {
    // A process has fewer descriptors than there are keys.
    Key::try_from(chunk * CHUNK_LEN + index).unwrap_or(Key::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANY: Key = 5 * 256;

    #[test]
    fn a_burst_gives_its_memory_back() {
        let mut table = Table::new();
        for number in 0..MANY {
            assert_eq!(table.vacant(), number);
            assert_eq!(table.insert(number), number);
        }
        assert_eq!((table.len(), table.end()), (MANY as usize, MANY));
        // One value in the third chunk stays.
        let stays = 2 * 256 + 7;
        for number in (0..MANY).filter(|&number| number != stays) {
            assert_eq!(table.remove(number), Some(number));
            assert_eq!(table.remove(number), None);
        }
        assert_eq!(table.get_mut(stays), Some(&mut { stays }));
        let with_memory: Vec<bool> = table.chunks.iter().map(|it| it.capacity() > 0).collect();
        assert_eq!(with_memory, [true, false, true]);
        assert_eq!(table.remove(stays), Some(stays));
        assert_eq!((table.len(), table.chunks.len()), (0, 1));
    }

    #[test]
    fn the_lowest_chunk_with_room_is_filled_first() {
        let mut table = Table::new();
        let last = (0..MANY).map(|number| table.insert(number)).last().unwrap();
        assert_eq!(table.remove(300), Some(300));
        assert_eq!(table.remove(last), Some(last));
        assert_eq!(table.insert(1), 300);
        assert_eq!(table.insert(2), last);
        assert_eq!(table.insert(3), MANY);
    }
}

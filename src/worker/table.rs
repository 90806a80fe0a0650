//! A worker's connections by slot: small numbers that serve as tokens, in memory that a burst gives back.

use mio::Token;
use slab::Slab;

use super::timers::Key;

/// How many slots a chunk has. One array would be copied as it grows, and keep for ever what the largest burst took.
const CHUNK_SLOTS: usize = 256;

/// What stands in the slots.
#[derive(Debug)]
pub(crate) struct Table<T> {
    /// The slots, a chunk each. One that is empty has no memory, but for the first.
    chunks: Vec<Slab<T>>,
    /// The first chunk that may have a free slot.
    open: usize,
    len: usize,
}

impl<T> Table<T> {
    /// An empty table.
    pub(crate) fn new() -> Self {
        Self { chunks: Vec::new(), open: 0, len: 0 }
    }

    /// Whether no slot is taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many slots are taken.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// All slots that are taken are below this one.
    pub(crate) fn end(&self) -> Key {
        slot(self.chunks.len(), 0)
    }

    /// What stands in a slot.
    pub(crate) fn get_mut(&mut self, slot: Key) -> Option<&mut T> {
        let (chunk, key) = split(slot);
        self.chunks.get_mut(chunk)?.get_mut(key)
    }

    /// The slot that the next insertion takes.
    pub(crate) fn vacant(&mut self) -> Key {
        while self.chunks.get(self.open).is_some_and(|chunk| chunk.len() == CHUNK_SLOTS) {
            self.open += 1;
        }
        slot(self.open, self.chunks.get(self.open).map_or(0, Slab::vacant_key))
    }

    /// Puts `value` into the vacant slot.
    pub(crate) fn insert(&mut self, value: T) -> Key {
        let (chunk, _key) = split(self.vacant());
        if chunk == self.chunks.len() {
            self.chunks.push(Slab::new());
        }
        let Some(slots) = self.chunks.get_mut(chunk) else { return Key::MAX };
        if slots.capacity() == 0 {
            slots.reserve_exact(CHUNK_SLOTS);
        }
        self.len += 1;
        slot(chunk, slots.insert(value))
    }

    /// Takes out what stands in a slot.
    pub(crate) fn remove(&mut self, slot: Key) -> Option<T> {
        let (chunk, key) = split(slot);
        let slots = self.chunks.get_mut(chunk)?;
        let value = slots.try_remove(key)?;
        if slots.is_empty() && chunk > 0 {
            *slots = Slab::new();
        }
        self.len -= 1;
        self.open = self.open.min(chunk);
        while self.chunks.len() > 1 && self.chunks.last().is_some_and(Slab::is_empty) {
            self.chunks.pop();
        }
        Some(value)
    }
}

/// The token of the client in `slot`.
pub(crate) fn client_token(slot: Key) -> Token {
    Token(slot as usize * 2)
}

/// The token of its upstream.
pub(crate) fn upstream_token(slot: Key) -> Token {
    Token(slot as usize * 2 + 1)
}

/// Which slot has `token`.
pub(crate) fn slot_of(token: Token) -> Key {
    Key::try_from(token.0 / 2).unwrap_or(Key::MAX)
}

/// The chunk of a slot, and its place there.
fn split(slot: Key) -> (usize, usize) {
    (slot as usize / CHUNK_SLOTS, slot as usize % CHUNK_SLOTS)
}

fn slot(chunk: usize, key: usize) -> Key {
    // There are fewer descriptors than this.
    Key::try_from(chunk * CHUNK_SLOTS + key).unwrap_or(Key::MAX)
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
        // One in the third chunk stays.
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

//! The bytes that peers write: each tells which stream it belongs to, and its place there.

use std::sync::LazyLock;

use crate::random::Random;

/// After how many bytes it repeats: a prime, so that no buffer's size divides it.
pub(crate) const PERIOD: usize = 65_521;

static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = Random::new(1);
    (0..PERIOD).map(|_| random.next().to_le_bytes()[0]).collect()
});

/// The bytes of stream `key` from `start` on.
pub(crate) fn fill(key: usize, start: usize, mut buffer: &mut [u8]) {
    let mut at = (key + start) % PERIOD;
    while !buffer.is_empty() {
        let bytes = buffer.len().min(PERIOD - at);
        let (head, tail) = buffer.split_at_mut(bytes);
        head.copy_from_slice(&PATTERN[at..at + bytes]);
        (buffer, at) = (tail, 0);
    }
}

/// Returns whether `bytes` are those of stream `key` from `start` on.
pub(crate) fn is(key: usize, start: usize, mut bytes: &[u8]) -> bool {
    let mut at = (key + start) % PERIOD;
    while !bytes.is_empty() {
        let (head, tail) = bytes.split_at(bytes.len().min(PERIOD - at));
        if head != &PATTERN[at..at + head.len()] {
            return false;
        }
        (bytes, at) = (tail, 0);
    }
    true
}

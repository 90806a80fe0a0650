//! Buffers that the relays of a worker share.

use std::time::{Duration, Instant};

use crate::connection::pipe::{PIPE_BYTES, PipePool};

/// Size of the buffer that a worker's flows share.
///
/// It is 45 segments of an Ethernet, the most that TCP sends in one packet (64 KiB with its headers). With a few bytes
/// more, each write would become one packet and a small remainder, which doubles the cost of a byte over the loopback.
const SCRATCH_BYTES: usize = 45 * 1448;

/// Bytes that a splice moves at most while other connections exchange small messages, which wait for it. Otherwise it
/// moves a whole pipe.
const SPLICED_BYTES_BESIDE_OTHERS_MAX: usize = 128 * 1024;

/// Time after a small message during which more are expected.
const OTHERS_EXPECTED_FOR: Duration = Duration::from_millis(10);

/// Buffers that a worker lends to the relay it drives.
#[derive(Debug)]
pub(crate) struct RelayBuffers {
    /// Buffer for bytes that are copied.
    pub(crate) scratch: Box<[u8]>,
    /// Pipes for bytes that are spliced.
    pub(crate) pipes: PipePool,
    /// Beginning of the turn.
    pub(crate) now: Instant,
    /// Time of the last small message on any connection of the worker.
    pub(super) small_at: Option<Instant>,
    /// Bytes that the flow at work has spliced to its sink in this turn.
    pub(super) spliced: u64,
    /// Set while the last bytes of each flow have to be known, which those that are spliced are not.
    pub(crate) copies_all: bool,
}

impl RelayBuffers {
    /// Returns buffers with at most `pipes_max` pipes.
    pub(crate) fn new(pipes_max: usize) -> Self {
        Self {
            scratch: vec![0; SCRATCH_BYTES].into(),
            pipes: PipePool::new(pipes_max),
            now: Instant::now(),
            small_at: None,
            spliced: 0,
            copies_all: false,
        }
    }

    /// Returns the number of bytes that a splice may move.
    pub(super) fn spliced_bytes_max(&self) -> usize {
        let others = self.small_at.is_some_and(|at| self.now < at + OTHERS_EXPECTED_FOR);
        if others { SPLICED_BYTES_BESIDE_OTHERS_MAX } else { PIPE_BYTES }
    }
}

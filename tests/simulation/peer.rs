//! The peer of a connection: everything that it can do at its end.

use rustix::io::Errno;

use crate::{
    link::{Ending, Link},
    random::Random,
};

/// The most that a peer writes at once.
const WRITE_BYTES_MAX: usize = 1 << 17;

impl Link {
    pub(crate) fn peer_is_gone(&self) -> bool {
        self.peer_closed || self.peer_reset
    }

    /// Returns whether there is a peer to do something.
    fn has_peer(&self) -> bool {
        !self.peer_is_gone() && self.is_connected && !self.is_queued
    }

    pub(crate) fn peer_writes(&mut self, random: &mut Random, is_bulk: bool, is_urgent: bool) {
        if !self.has_peer() || self.peer_shut || self.peer_is_dead {
            return;
        }
        let magnitude = if is_bulk { random.below(2) } else { random.below(17) };
        let said = self.peer_says(1 + random.below(WRITE_BYTES_MAX >> magnitude));
        if is_urgent && said > 0 && !self.is_unix {
            self.urgent = Some(self.said - 1);
        }
    }

    /// A peer that insists on writing first goes on. False when there is none, or no room.
    pub(crate) fn peer_insists(&mut self) -> bool {
        if self.peer_shut || self.peer_is_dead {
            self.insists = 0;
        }
        let said =
            if self.has_peer() && self.insists > 0 { self.peer_says(self.insists) } else { 0 };
        self.insists -= said;
        said > 0
    }

    /// Writes up to `bytes`, as many as there is room for.
    fn peer_says(&mut self, bytes: usize) -> usize {
        let room = (2 * self.receive_max + self.read).saturating_sub(self.said);
        let bytes = bytes.min(room);
        self.said += bytes;
        if self.is_unix && bytes > 0 && (self.is_open || self.is_waiting()) {
            self.arrived = self.said;
            self.wake_reader();
        }
        bytes
    }

    pub(crate) fn peer_reads(&mut self, random: &mut Random, is_eager: bool) -> bool {
        if !self.has_peer() || self.saw.is_some() || self.insists > 0 {
            return false;
        }
        let queued = self.acked - self.heard;
        if queued > 0 {
            self.heard += if is_eager { queued } else { 1 + random.below(queued) };
            if self.is_unix && self.is_open && self.mask().output {
                self.wake_writer();
            }
        } else if self.peer_is_dead {
            self.saw = Some(Ending::Aborted);
        } else if self.has_ended_here() && !self.is_waiting() {
            self.saw = Some(Ending::Orderly);
        } else {
            return false;
        }
        true
    }

    pub(crate) fn peer_shuts(&mut self) {
        if self.has_peer() && !self.peer_shut {
            self.peer_shut = true;
            if self.is_unix {
                self.is_ended = true;
                self.wake();
            }
        }
    }

    pub(crate) fn peer_closes(&mut self) {
        if !self.has_peer() {
            return;
        }
        let discards = self.acked > self.heard;
        if self.is_unix {
            self.peer_shuts();
            self.peer_closed = true;
            self.owed = self.arrived;
            if discards {
                self.error = Some(Errno::CONNRESET);
            }
            self.wake();
        } else if discards {
            self.peer_reset = true;
        } else {
            self.peer_shut = true;
            self.peer_closed = true;
        }
    }

    pub(crate) fn peer_resets(&mut self) {
        if self.is_unix {
            self.peer_closes();
        } else if self.has_peer() {
            self.peer_reset = true;
        }
    }
}

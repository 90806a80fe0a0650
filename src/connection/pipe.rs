//! Kernel pipes, through which bytes are spliced from socket to socket without entering user space.

use std::{cell::Cell, io, rc::Rc};

use crate::sys::{self, PipeEnds, Socket};

/// Requested size of a pipe. An unprivileged user has 64 MiB for all pipes together (pipe(7)), so the system may give
/// less.
///
/// Each batch wakes the sink's reader once, so sixteen times the default size halves the cost of a byte. A pipe may
/// hold fewer bytes than its size, as its slots count segments, or more, from a socket with large segments.
pub(crate) const PIPE_BYTES: usize = 1024 * 1024;

/// A pipe with the number of bytes in it.
#[derive(Debug)]
pub(crate) struct Pipe {
    ends: PipeEnds,
    len: usize,
    /// Number of living pipes of the pool. Dropping a pipe decrements it.
    alive: Rc<Cell<usize>>,
}

/// The empty pipes of one worker.
///
/// A pipe is taken only while bytes move, and returned as soon as it is empty. A pipe with bytes in it is destroyed and
/// never reused: its bytes would reach another connection.
#[derive(Debug)]
pub(crate) struct PipePool {
    pub(super) empty: Vec<Pipe>,
    pub(super) alive: Rc<Cell<usize>>,
    max: usize,
}

impl Pipe {
    /// Moves up to `len` bytes from `source` into the pipe. Returns 0 at the end of the stream.
    pub(crate) fn fill(&mut self, source: &Socket, len: usize) -> io::Result<usize> {
        let moved = self.ends.splice_from(source, len)?;
        self.len += moved;
        Ok(moved)
    }

    /// Moves the bytes in the pipe, or as many as fit, to `sink`.
    pub(crate) fn drain(&mut self, sink: &Socket) -> io::Result<usize> {
        let moved = self.ends.splice_to(sink, self.len)?;
        self.len -= moved;
        Ok(moved)
    }

    /// Returns its ends.
    pub(super) fn ends(&self) -> &PipeEnds {
        let Self { ends, len: _, alive: _ } = self;
        ends
    }

    /// Returns the number of bytes in the pipe.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.alive.set(self.alive.get() - 1);
    }
}

impl PipePool {
    /// Returns a pool of at most `max` pipes. With 0, every byte is copied.
    pub(crate) fn new(max: usize) -> Self {
        Self { empty: Vec::new(), alive: Rc::new(Cell::new(0)), max }
    }

    /// Returns the number of pipes with bytes in them.
    pub(crate) fn used(&self) -> u64 {
        (self.alive.get() - self.empty.len()) as u64
    }

    /// Returns the number of empty pipes.
    pub(crate) fn free(&self) -> u64 {
        self.empty.len() as u64
    }

    /// Takes an empty pipe. Returns `None` if all are in use or the system refuses another one.
    pub(crate) fn take(&mut self) -> Option<Pipe> {
        self.empty.pop().or_else(|| {
            if self.alive.get() >= self.max {
                return None;
            }
            let ends = sys::pipe(PIPE_BYTES)
                .inspect_err(|error| log::debug!("no pipe, bytes are copied: {error}"))
                .ok()?;
            Some(self.adopt(ends, 0))
        })
    }

    /// Returns a pipe from another process, with `len` bytes in it. It counts as one of the pool, also beyond the maximum.
    pub(crate) fn adopt(&self, ends: PipeEnds, len: usize) -> Pipe {
        self.alive.set(self.alive.get() + 1);
        Pipe { ends, len, alive: Rc::clone(&self.alive) }
    }

    /// Takes a pipe back if it is empty, and destroys it otherwise, or if it is one too many.
    pub(crate) fn put(&mut self, pipe: Pipe) {
        if pipe.len == 0 && self.alive.get() <= self.max {
            self.empty.push(pipe);
        }
    }

    /// Stops making pipes, because the system does not splice these sockets.
    pub(crate) fn disable(&mut self) {
        self.max = 0;
        self.empty.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_with_bytes_in_it_never_returns_to_the_pool() {
        let (source, peer) = sys::socket_pair().unwrap();
        let mut pool = PipePool::new(1);
        let mut pipe = pool.take().unwrap();
        assert!(pool.take().is_none(), "the pool is bounded");
        assert_eq!(peer.send(b"secret").unwrap(), 6);
        assert_eq!(pipe.fill(&source, PIPE_BYTES).unwrap(), 6);
        pool.put(pipe);
        assert_eq!(pool.alive.get(), 0, "destroyed");

        let pipe = pool.take().unwrap();
        pool.put(pipe);
        assert_eq!(pool.alive.get(), 1, "kept");
    }

    #[test]
    fn an_adopted_pipe_counts_and_goes_if_it_is_one_too_many() {
        let (source, peer) = sys::socket_pair().unwrap();
        let (sink, receiver) = sys::socket_pair().unwrap();
        let mut pool = PipePool::new(1);
        let own = pool.take().unwrap();
        peer.send(b"bytes").unwrap();
        let ends = sys::pipe(PIPE_BYTES).unwrap();
        assert_eq!(ends.splice_from(&source, PIPE_BYTES).unwrap(), 5);
        let mut adopted = pool.adopt(ends, 5);
        assert_eq!((pool.used(), pool.alive.get()), (2, 2));
        assert!(pool.take().is_none());
        assert_eq!(adopted.drain(&sink).unwrap(), 5);
        assert_eq!(receiver.recv(&mut [0; 8]).unwrap().bytes, 5);
        pool.put(adopted);
        assert_eq!((pool.used(), pool.free()), (1, 0), "one too many");
        pool.put(own);
        assert_eq!((pool.used(), pool.free()), (0, 1));
    }
}

//! The part of mio that the worker uses, on the simulated kernel. The crate is called `mio` inside itself, so the sources
//! find it.

use std::{io, time::Duration};

use crate::{drive, kernel::Mask, rival::RIVAL};

#[derive(Debug)]
pub(crate) struct Poll(pub(crate) Registry);

#[derive(Debug)]
pub(crate) struct Registry;

#[derive(Debug)]
/// That of a worker.
pub(crate) struct Waker(pub(crate) usize);

#[derive(Debug, Default)]
pub(crate) struct Events(Vec<Event>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token(pub(crate) usize);

/// An event of the kernel; its questions are answered as mio answers them on epoll.
#[derive(Debug, Clone, Copy)]
pub struct Event {
    pub(crate) token: Token,
    pub(crate) mask: Mask,
}

impl Poll {
    pub(crate) fn registry(&self) -> &Registry {
        &self.0
    }

    pub(crate) fn poll(
        &mut self,
        events: &mut Events,
        timeout: Option<Duration>,
    ) -> io::Result<()> {
        events.0.clear();
        drive::wait(&mut events.0, timeout)
    }
}

impl Waker {
    #[expect(clippy::unnecessary_wraps, reason = "as mio's")]
    pub(crate) fn wake(&self) -> io::Result<()> {
        crate::with(|kernel| match self.0 {
            0 => kernel.is_woken = true,
            RIVAL => kernel.is_rival_woken = true,
            _ => {}
        });
        Ok(())
    }
}

impl Events {
    pub(crate) fn with_capacity(_events: usize) -> Self {
        Self::default()
    }
}

impl<'a> IntoIterator for &'a Events {
    type Item = &'a Event;
    type IntoIter = std::slice::Iter<'a, Event>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl Event {
    pub(crate) fn token(&self) -> Token {
        self.token
    }

    pub(crate) fn is_readable(&self) -> bool {
        self.mask.input || self.mask.urgent
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.mask.output
    }

    pub(crate) fn is_priority(&self) -> bool {
        self.mask.urgent
    }

    pub(crate) fn is_error(&self) -> bool {
        self.mask.error
    }

    pub(crate) fn is_read_closed(&self) -> bool {
        self.mask.hung_up || self.mask.input && self.mask.input_ended
    }

    pub(crate) fn is_write_closed(&self) -> bool {
        let Mask { input, output, error, .. } = self.mask;
        self.mask.hung_up || error && (output || !input)
    }
}

/// For the real `sys.rs`, whose sockets are not used here.
pub(crate) mod unix {
    pub(crate) struct SourceFd<'a>(pub(crate) &'a i32);
}

/// The events that are told; never none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interest(u8);

impl Interest {
    pub(crate) const READABLE: Self = Self(1);
    pub(crate) const WRITABLE: Self = Self(2);
    pub(crate) const PRIORITY: Self = Self(4);

    pub(crate) const fn add(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn is_readable(self) -> bool {
        self.0 & Self::READABLE.0 > 0
    }

    pub(crate) const fn is_writable(self) -> bool {
        self.0 & Self::WRITABLE.0 > 0
    }

    pub(crate) const fn is_priority(self) -> bool {
        self.0 & Self::PRIORITY.0 > 0
    }
}

impl Registry {
    pub(crate) fn register(
        &self,
        _source: &mut unix::SourceFd<'_>,
        _token: Token,
        _interest: Interest,
    ) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn reregister(
        &self,
        _source: &mut unix::SourceFd<'_>,
        _token: Token,
        _interest: Interest,
    ) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn deregister(&self, _source: &mut unix::SourceFd<'_>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

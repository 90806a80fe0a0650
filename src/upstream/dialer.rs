//! `Dialer`: begins the dials of a worker, each from the next source address.

use std::{fmt, io, sync::OnceLock};

use super::Upstream;
use crate::sys::{Dialled, Socket, SocketAddress};

/// Number of dials of which one may explore. Without it, every client would explore where few come.
const EXPLORING_DIALS: usize = 16;

/// Dials of one worker.
#[derive(Debug, Default)]
pub(crate) struct Dialer {
    /// Number of dials, by which the next source address is chosen.
    pub(crate) dials: usize,
    /// Set when a dial of this worker has closed the circuit breaker, until the other workers are woken.
    has_ended_outage: bool,
}

/// Callback at each end of a dial of any worker, or of an attempt.
#[derive(Default)]
pub(super) struct DialWatcher(pub(super) OnceLock<Box<dyn Fn() + Send + Sync>>);

impl DialWatcher {
    pub(super) fn tell(&self) {
        self.0.get().into_iter().for_each(|watcher| watcher());
    }
}

impl fmt::Debug for DialWatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DialWatcher").field(&self.0.get().is_some()).finish()
    }
}

impl Dialer {
    /// Reports a successful dial.
    pub(crate) fn succeeded(&mut self, upstream: &Upstream) {
        self.has_ended_outage |= upstream.breaker().succeeded();
        upstream.dials.tell();
    }

    /// Returns true once if the upstream is back, and the other workers are to be woken.
    pub(crate) fn take_end_of_outage(&mut self) -> bool {
        std::mem::take(&mut self.has_ended_outage)
    }

    /// Returns true if the next dial may first try an address that was dead.
    pub(crate) fn may_explore(&self) -> bool {
        self.dials.is_multiple_of(EXPLORING_DIALS)
    }

    /// Begins to connect to `address` from the next of the upstream's source addresses, or from another if it has no port
    /// left.
    pub(crate) fn dial(
        &mut self,
        address: &SocketAddress,
        upstream: &Upstream,
    ) -> io::Result<(Socket, Dialled)> {
        let sources = upstream.sources(address);
        let first = self.dials % sources.len().max(1);
        self.dials = self.dials.wrapping_add(1);
        let mut result = Err(io::Error::other("upstream.source-addrs has none of its kind"));
        for &source in sources.iter().cycle().skip(first).take(sources.len()) {
            result = Socket::dial(address, source);
            if !matches!(&result, Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable) {
                break;
            }
        }
        result
    }
}

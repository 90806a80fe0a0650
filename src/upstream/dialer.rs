//! `Dialer`: the dials of a worker, each from the next source address.

use std::io;

use super::Upstream;
use crate::sys::{Dialled, Socket, SocketAddress};

/// One in so many of a worker's dials may explore, at most: where few clients come it would be each of them otherwise.
const EXPLORING_DIALS: usize = 16;

/// Dials of one worker.
#[derive(Debug, Default)]
pub(crate) struct Dialer {
    /// Number of dials that were begun: each has the next source address.
    pub(crate) dials: usize,
    /// Set when a dial of this worker has ended an outage, until the others are told.
    has_ended_outage: bool,
}

impl Dialer {
    /// Learns that a dial has got through.
    pub(crate) fn succeeded(&mut self, upstream: &Upstream) {
        self.has_ended_outage |= upstream.breaker().succeeded();
    }

    /// Returns true once if the other workers are to be told that the upstream is back.
    pub(crate) fn take_end_of_outage(&mut self) -> bool {
        std::mem::take(&mut self.has_ended_outage)
    }

    /// Returns true if the next dial may first try an address that was dead.
    pub(crate) fn may_explore(&self) -> bool {
        self.dials.is_multiple_of(EXPLORING_DIALS)
    }

    /// Begins to connect to `address`, from the next of the upstream's source addresses, or from another if that has no
    /// port left.
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

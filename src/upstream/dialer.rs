//! `Dialer`: how a worker begins its dials, and whether this host is short of something for them.

use std::{
    io,
    time::{Duration, Instant},
};

use super::Upstream;
use crate::sys::{Dialled, Socket, SocketAddress};

/// How long until a dial that was short of something of this host is tried again: it may be there any moment.
pub(crate) const REDIAL_INTERVAL: Duration = Duration::from_millis(10);

/// One in so many of a worker's dials may explore, at most: where few clients come it would be each of them otherwise.
const EXPLORING_DIALS: usize = 16;

/// How a worker's dials fare.
#[derive(Debug, Default)]
pub(crate) struct Dialer {
    /// Whether the last dial to end was short of something.
    is_short: bool,
    /// When one of those who wait for it has last tried.
    tried: Option<Instant>,
    /// How many dials were begun: each has the next source address.
    dials: usize,
    /// Whether a dial of this worker has ended an outage since the others were told.
    has_ended_outage: bool,
}

impl Dialer {
    /// Whether the last dial to end was short of something: then those who wait try one at a time.
    pub(crate) fn is_short(&self) -> bool {
        self.is_short
    }

    /// One has got through.
    pub(crate) fn succeeded(&mut self, upstream: &Upstream) {
        self.is_short = false;
        self.has_ended_outage |= upstream.outage().succeeded();
    }

    /// One was short of something.
    pub(crate) fn was_short(&mut self) {
        self.is_short = true;
    }

    /// Whether the other workers are to be told that the upstream is back, once.
    pub(crate) fn take_end_of_outage(&mut self) -> bool {
        std::mem::take(&mut self.has_ended_outage)
    }

    /// Whether one of those who wait may try now. That it may is remembered.
    pub(crate) fn may_retry(&mut self, now: Instant) -> bool {
        let is_due = self.tried.is_none_or(|tried| now.duration_since(tried) >= REDIAL_INTERVAL);
        if is_due {
            self.tried = Some(now);
        }
        is_due
    }

    /// Tells whether the next dial may first try an address that was dead.
    pub(crate) fn may_explore(&self) -> bool {
        self.dials.is_multiple_of(EXPLORING_DIALS)
    }

    #[cfg(test)]
    pub(crate) fn dials(&self) -> usize {
        self.dials
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

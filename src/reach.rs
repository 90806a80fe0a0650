//! `Reach`: what a worker has learnt of the upstream from its dials.
//!
//! Clients whose dial has failed wait to try again, and may be thousands: a restart takes longer than a dial. As long as
//! dials fail, only one of them in each interval tries; whoever gets through opens the way for all.

use std::{
    io,
    time::{Duration, Instant},
};

use crate::{
    sys::{Dialled, Socket, SocketAddress},
    upstream::Upstream,
};

/// How long until a dial that was short of something of this host is tried again: it may be there any moment.
pub(crate) const REDIAL_INTERVAL: Duration = Duration::from_millis(10);

/// How long until a dial that the upstream did not take is tried again: it is away, and comes back within seconds.
pub(crate) const REFUSED_INTERVAL: Duration = Duration::from_millis(100);

/// How a worker's dials fare.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    /// Whether the last dial to end has failed.
    is_failing: bool,
    /// When one of those who wait has last tried.
    probed: Option<Instant>,
    /// How many dials were begun: each has the next source address.
    dials: usize,
}

impl Reach {
    /// Whether the last dial to end has failed: then those who wait try one at a time.
    pub(crate) fn is_failing(&self) -> bool {
        self.is_failing
    }

    /// One has got through.
    pub(crate) fn succeeded(&mut self) {
        self.is_failing = false;
    }

    /// One has failed at all addresses.
    pub(crate) fn failed(&mut self) {
        self.is_failing = true;
    }

    /// Whether one of those who wait may try now; asked when `interval` has passed for it. That it may is remembered.
    pub(crate) fn may_probe(&mut self, interval: Duration, now: Instant) -> bool {
        let is_due = self.probed.is_none_or(|probed| now.duration_since(probed) >= interval);
        if is_due {
            self.probed = Some(now);
        }
        is_due
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

//! `BootTime`, the clock of a fleet, and `Timing`: the times that follow from a time to live.

use std::{
    ops::{Add, Sub},
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// Time since the start of a host, suspended times included (`sys::boot_time`).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub(crate) struct BootTime(pub(crate) Duration);

impl Add<Duration> for BootTime {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0.saturating_add(time))
    }
}

impl Sub for BootTime {
    type Output = Duration;

    /// Returns the time between both; none if `earlier` is later.
    fn sub(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// Times that follow from the time to live of a lease: with P + 3τ below it, one dead endpoint and an election cost
/// nobody a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timing {
    pub(crate) ttl: Duration,
}

/// Shortest time between two tries of what has failed.
pub(crate) const RETRY: Duration = Duration::from_millis(500);

impl Timing {
    pub(crate) fn new(ttl: Duration) -> Self {
        Self { ttl }
    }

    /// Returns P, the time between two rounds.
    pub(crate) fn period(self) -> Duration {
        self.ttl / 3
    }

    /// Returns τ, the time that a request may take.
    pub(crate) fn timeout(self) -> Duration {
        (self.ttl / 10).clamp(Duration::from_secs(1), Duration::from_secs(3))
    }

    /// Returns L: a record without a holder for so long is deleted. A coordinator that lives repairs it before.
    pub(crate) fn linger(self) -> Duration {
        self.period() + 3 * self.timeout()
    }
}

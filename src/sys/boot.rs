//! `boot_time`: the time since the start of this host, suspended times included.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Returns the time since the start of this host, also of that which it was suspended for. `Instant` stands still
/// meanwhile, so that deadlines which others rely on cannot go by it.
pub(crate) fn boot_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}

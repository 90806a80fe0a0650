//! Bounds of held clients: their number, their time, and the treatment of further ones.

use std::{sync::Arc, time::Duration};

use super::semaphore::{Permit, Semaphore};
use crate::{config, stats::cause::CloseCause};

pub(crate) use crate::config::Overflow;

/// Bounds of held clients.
#[derive(Debug)]
pub(crate) struct HoldLimits {
    timeout: Option<Duration>,
    overflow: Overflow,
    permits: Arc<Semaphore>,
}

/// Treatment of an accepted client that is to be held.
#[derive(Debug)]
pub(crate) enum HoldDecision {
    /// Hold it, with a permit to be held. It goes without one if it had already been accepted before it had to be held,
    /// and so cannot be left in the backlog.
    Hold(Option<Permit>),
    /// Answer it as a rejected client.
    Reject(CloseCause),
    /// End its stream without an answer.
    Close,
}

/// Error: no permit to be held is free.
#[derive(Debug)]
pub(crate) struct Full;

impl HoldLimits {
    /// Returns bounds by the settings.
    pub(crate) fn new(settings: &config::HoldConfig) -> Self {
        Self {
            timeout: settings.timeout,
            overflow: settings.overflow,
            permits: Arc::new(Semaphore::new(settings.max.map_or(usize::MAX, usize::from))),
        }
    }

    /// Returns the longest time that a client may be held during a pause; none without a limit.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    /// Returns the largest number of held clients.
    pub(crate) fn max(&self) -> usize {
        self.permits.max()
    }

    /// Returns the treatment of further clients.
    pub(crate) fn overflow(&self) -> Overflow {
        self.overflow
    }

    /// Reserves a permit before `accept` if further clients are to stay in the backlog. Reserving afterwards would let
    /// several workers exceed `hold.max` together. Without a free permit it registers a wish for one; see
    /// [`HoldLimits::take_wanted`].
    pub(crate) fn try_reserve(&self) -> Result<Option<Permit>, Full> {
        match self.overflow {
            Overflow::Backlog => self.permits.take().map(Some).ok_or(Full),
            Overflow::Reject | Overflow::Close => Ok(None),
        }
    }

    /// Decides about a client that was accepted without a permit.
    pub(crate) fn decide(&self) -> HoldDecision {
        match (self.permits.take(), self.overflow) {
            (Some(permit), _) => HoldDecision::Hold(Some(permit)),
            (None, Overflow::Backlog) => HoldDecision::Hold(None),
            (None, Overflow::Reject) => HoldDecision::Reject(CloseCause::HoldOverflow),
            (None, Overflow::Close) => HoldDecision::Close,
        }
    }

    /// Returns a permit for a client that had one in another process, also beyond the maximum.
    pub(crate) fn restore(&self) -> Permit {
        self.permits.take_beyond()
    }

    /// Returns true once if a worker waits for a permit and one is free.
    pub(crate) fn take_wanted(&self) -> bool {
        self.permits.take_wanted()
    }
}

//! How clients are held: how many, for how long, and what further ones get.

use std::{sync::Arc, time::Duration};

use super::semaphore::{Permit, Semaphore};
use crate::config;

pub(crate) use crate::config::Overflow;

/// What bounds the clients that are held.
#[derive(Debug)]
pub(crate) struct HoldLimits {
    timeout: Option<Duration>,
    overflow: Overflow,
    permits: Arc<Semaphore>,
}

/// What becomes of one that has been accepted and is to be held.
#[derive(Debug)]
pub(crate) enum HoldDecision {
    /// It is held. It has a place, unless nobody could have known when it was accepted that it would be held.
    Hold(Option<Permit>),
    /// It gets its refusal.
    Reject,
    /// It gets the end of the stream.
    Close,
}

/// No more can be held.
#[derive(Debug)]
pub(crate) struct Full;

impl HoldLimits {
    /// As the settings say.
    pub(crate) fn new(settings: &config::HoldConfig) -> Self {
        Self {
            timeout: settings.timeout,
            overflow: settings.overflow,
            permits: Arc::new(Semaphore::new(settings.max.map_or(usize::MAX, usize::from))),
        }
    }

    /// How long a client may be held.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    /// What further clients get.
    pub(crate) fn overflow(&self) -> Overflow {
        self.overflow
    }

    /// The place of one that is to be accepted, where further ones stay in the backlog: accepting first and looking then,
    /// workers would hold more than they may. If none is free, that is on record, and [`HoldLimits::take_wanted`] tells when it
    /// has changed.
    pub(crate) fn try_reserve(&self) -> Result<Option<Permit>, Full> {
        match self.overflow {
            Overflow::Backlog => self.permits.take().map(Some).ok_or(Full),
            Overflow::Reject | Overflow::Close => Ok(None),
        }
    }

    /// What becomes of one that has been accepted without a place.
    pub(crate) fn decide(&self) -> HoldDecision {
        match (self.permits.take(), self.overflow) {
            (Some(permit), _) => HoldDecision::Hold(Some(permit)),
            (None, Overflow::Backlog) => HoldDecision::Hold(None),
            (None, Overflow::Reject) => HoldDecision::Reject,
            (None, Overflow::Close) => HoldDecision::Close,
        }
    }

    /// Whether somebody waits for a place that is free, once.
    pub(crate) fn take_wanted(&self) -> bool {
        self.permits.take_wanted()
    }
}

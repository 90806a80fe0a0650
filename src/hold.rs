//! How clients are held: how many, for how long, and what further ones get.

use std::{sync::Arc, time::Duration};

use crate::{
    config,
    slots::{Slot, Slots},
};

pub(crate) use crate::config::Overflow;

/// What bounds the clients that are held.
#[derive(Debug)]
pub(crate) struct Hold {
    timeout: Option<Duration>,
    overflow: Overflow,
    places: Arc<Slots>,
}

/// What becomes of one that has been accepted and is to be held.
#[derive(Debug)]
pub(crate) enum Treatment {
    /// It is held. It has a place, unless it was accepted just before there were none.
    Hold(Option<Slot>),
    /// It gets its refusal.
    Reject,
    /// It gets the end of the stream.
    Close,
}

impl Hold {
    /// As the settings say.
    pub(crate) fn new(settings: &config::Hold) -> Self {
        Self {
            timeout: settings.timeout,
            overflow: settings.overflow,
            places: Arc::new(Slots::new(settings.max.map_or(usize::MAX, usize::from))),
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

    /// Whether another is to be accepted: as long as one more can be held, or gets an answer otherwise. If not, that is on
    /// record, and [`Hold::take_wanted`] tells when it has changed.
    pub(crate) fn takes_more(&self) -> bool {
        self.overflow != Overflow::Backlog || self.places.is_any_free_or_wish()
    }

    /// What becomes of one more.
    pub(crate) fn treat(&self) -> Treatment {
        match (self.places.take(), self.overflow) {
            (Some(place), _) => Treatment::Hold(Some(place)),
            (None, Overflow::Backlog) => Treatment::Hold(None),
            (None, Overflow::Reject) => Treatment::Reject,
            (None, Overflow::Close) => Treatment::Close,
        }
    }

    /// Whether somebody waits for a place that is free, once.
    pub(crate) fn take_wanted(&self) -> bool {
        self.places.take_wanted()
    }
}

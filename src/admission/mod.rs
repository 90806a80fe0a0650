//! Admission: the order of waiting clients, and the bounds of all clients, of held ones and of those under way.

pub(crate) mod hold;
pub(crate) mod pace;
pub(crate) mod queue;
pub(crate) mod semaphore;

use std::{sync::Arc, time::Instant};

use crate::{
    config::{HoldConfig, ResumeConfig},
    log_limit::LogLimit,
};
use hold::HoldLimits;
use queue::WaitQueue;
use semaphore::Semaphore;

/// Bounds of a proxy, and the queue of waiting clients.
#[derive(Debug)]
pub(crate) struct Admission {
    /// One permit for each client.
    pub(crate) clients: Arc<Semaphore>,
    pub(crate) hold: HoldLimits,
    pub(crate) queue: Arc<WaitQueue>,
    pub(crate) accept_troubles: AcceptTroubles,
}

/// Log limits for the reasons that keep clients in the backlog. Each has its own, or one would hide another.
#[derive(Debug, Default)]
pub(crate) struct AcceptTroubles {
    pub(crate) too_many_held: LogLimit,
    pub(crate) too_many_clients: LogLimit,
    pub(crate) shortage: LogLimit,
}

impl Admission {
    /// Returns bounds for `clients_max` clients, and an empty queue for `workers` workers of a proxy that started at `begin`.
    pub(crate) fn new(
        clients_max: usize,
        workers: usize,
        hold: &HoldConfig,
        resume: &ResumeConfig,
        begin: Instant,
    ) -> Self {
        Self {
            clients: Arc::new(Semaphore::new(clients_max)),
            hold: HoldLimits::new(hold),
            queue: Arc::new(WaitQueue::new(workers, resume, begin)),
            accept_troubles: AcceptTroubles::default(),
        }
    }

    /// Returns true once if a worker waits for a permit that has become free.
    pub(crate) fn take_wanted(&self) -> bool {
        self.clients.take_wanted() | self.hold.take_wanted() | self.queue.under_way().take_wanted()
    }
}

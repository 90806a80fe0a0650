//! The supervisor of a worker: it runs the worker on a thread, and again after a panic.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::{
    error::Error,
    stats::cause::CloseCause,
    worker::{End, WorkerResources},
};

/// Time that a worker rests after its poll has failed.
const RESTART_INTERVAL: Duration = Duration::from_millis(100);

/// Starts a worker on a thread of its own. A panic costs the connections of that worker and no others: the listener stays,
/// and with it the clients that are queued there.
pub(super) fn start_worker(mut resources: WorkerResources) -> Result<JoinHandle<End>, Error> {
    let name = format!("worker-{}", resources.index);
    let supervise = move || {
        loop {
            // A panic can leave none of the resources half-changed: they are sockets and types that are made for sharing.
            match catch_unwind(AssertUnwindSafe(|| resources.work())) {
                Ok(Ok(end)) => {
                    resources.shared.pauses.barrier.leave(resources.index);
                    resources.shared.freeze.leave(resources.index);
                    return end;
                }
                Ok(Err(error)) => {
                    log::error!("worker {} cannot poll and starts anew: {error}", resources.index);
                    thread::park_timeout(RESTART_INTERVAL);
                }
                Err(_panic) => {
                    let lost = resources.shared.workers.counters(resources.index).lose_all();
                    log::error!(
                        event = "panic", cause = CloseCause::Panic.word(), connections = lost;
                        "worker {} has panicked and starts anew: a defect of tcpause; connections reset: {lost}",
                        resources.index
                    );
                }
            }
            // The run that panicked may have consumed a notice of free permits, new clients or a pause without acting on it.
            resources.shared.workers.wake_all();
        }
    };
    thread::Builder::new()
        .name(name)
        .spawn(supervise)
        .map_err(|error| Error::no_thread("carries connections", &error))
}

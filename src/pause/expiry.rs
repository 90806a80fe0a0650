//! The thread that ends pauses when their time is up.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Weak},
    thread,
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::Pauses;
use crate::{error::Error, sys};

/// Time that the thread waits after a panic.
const PANIC_INTERVAL: Duration = Duration::from_secs(1);

/// Starts the thread, which ends when `pauses` is dropped.
pub(crate) fn start(pauses: &Arc<Pauses>, notifications: Receiver<()>) -> Result<(), Error> {
    let weak = Arc::downgrade(pauses);
    let run = move || run(&weak, &notifications);
    thread::Builder::new()
        .name("leases".into())
        .spawn(run)
        .map(drop)
        .map_err(|error| Error::no_thread("ends pauses", &error))
}

fn run(pauses: &Weak<Pauses>, notifications: &Receiver<()>) {
    let mut due = None;
    loop {
        let woken = match due {
            Some(due) => notifications.recv_deadline(due),
            None => notifications.recv().map_err(RecvTimeoutError::from),
        };
        match (woken, pauses.upgrade()) {
            (Err(RecvTimeoutError::Disconnected), _) | (_, None) => return,
            (_, Some(pauses)) => {
                // Without this thread no pause would end by itself, so it survives a panic.
                due = catch_unwind(AssertUnwindSafe(|| pauses.expire())).unwrap_or_else(|_| {
                    log::error!("a defect: the thread that ends pauses panicked; it goes on");
                    Some(sys::now() + PANIC_INTERVAL)
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_thread_ends_with_the_pauses() {
        let pauses = crate::tests::pauses();
        let weak = Arc::downgrade(&pauses);
        let (sender, notifications) = crossbeam_channel::bounded(1);
        let thread = thread::Builder::new().spawn(move || run(&weak, &notifications)).unwrap();
        sender.send(()).unwrap();
        drop((pauses, sender));
        let deadline = Instant::now() + Duration::from_secs(10);
        while !thread.is_finished() {
            assert!(Instant::now() < deadline, "it goes on");
            thread::yield_now();
        }
    }
}

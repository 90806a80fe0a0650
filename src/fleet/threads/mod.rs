//! The two threads of a fleet, and the ways to wake them. A third one watches.

mod coordinators;
mod member;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, bounded};

pub(super) use coordinators::CoordinatorThread;
pub(super) use member::{Logged, MemberThread};

use super::{clock::BootTime, keys::KeySpace};
use crate::sys::boot::boot_time;

/// Longest sleep, so that a machine that names a time far away costs no overflow.
const SLEEP_MAX: Duration = Duration::from_secs(60);

/// Facts of this member that do not change.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    pub(super) fleet: String,
    pub(super) host: String,
    pub(super) keys: KeySpace,
    pub(super) on_disconnect: &'static str,
    /// Begin of the ids of this process's pauses, unlike that of any other.
    pub(super) instance: String,
}

/// Way to wake one thread, and to tell it why.
#[derive(Debug)]
pub(super) struct Bell {
    wake: Sender<()>,
    wakes: Receiver<()>,
    /// Set while an idle proxy is news for the thread: else each short connection would wake it.
    heeds_idle: AtomicBool,
    /// Set if the watch has rung.
    rang: AtomicBool,
    /// Set if the host is to leave the fleet.
    leaves: AtomicBool,
    /// Set if the thread is to end at once.
    ends: AtomicBool,
}

impl Bell {
    pub(super) fn new() -> Self {
        // One notification is as good as several.
        let (wake, wakes) = bounded(1);
        let [heeds_idle, rang, leaves, ends] = [const { AtomicBool::new(false) }; 4];
        Self { wake, wakes, heeds_idle, rang, leaves, ends }
    }

    /// Wakes the thread.
    pub(super) fn wake(&self) {
        // If the channel is full, a notification waits already.
        self.wake.try_send(()).ok();
    }

    /// Tells that the proxy has become idle.
    pub(super) fn tell_idle(&self) {
        if self.heeds_idle.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Has the thread be woken by an idle proxy, or not. It looks at the proxy behind this.
    fn heed_idle(&self, heeds: bool) {
        self.heeds_idle.store(heeds, Ordering::SeqCst);
    }

    /// Tells that the watch has rung.
    pub(super) fn ring(&self) {
        self.rang.store(true, Ordering::Release);
        self.wake();
    }

    /// Tells that the host is to leave the fleet.
    pub(super) fn leave(&self) {
        self.leaves.store(true, Ordering::Release);
        self.wake();
    }

    /// Tells that the thread is to end at once.
    pub(super) fn end(&self) {
        self.ends.store(true, Ordering::Release);
        self.wake();
    }

    fn take_ring(&self) -> bool {
        self.rang.swap(false, Ordering::AcqRel)
    }

    fn leaves(&self) -> bool {
        self.leaves.load(Ordering::Acquire)
    }

    fn ends(&self) -> bool {
        self.ends.load(Ordering::Acquire)
    }

    /// Sleeps until somebody wakes, or until `at`.
    fn sleep(&self, at: BootTime) {
        // The bell holds both ends, so that there is no other error than the time.
        self.wakes.recv_timeout((at - now()).min(SLEEP_MAX)).ok();
    }
}

/// Tells of a panic of a thread of the fleet, as nobody joins it before the end.
struct Alarm<F: Fn(&str)>(F);

impl<F: Fn(&str)> Drop for Alarm<F> {
    fn drop(&mut self) {
        if thread::panicking() {
            let thread = thread::current().name().unwrap_or_default().to_owned();
            let text = format!(
                "a defect: the thread {thread} has panicked; restart tcpause, and report what the log has"
            );
            log::error!("{text}");
            (self.0)(&text);
        }
    }
}

fn now() -> BootTime {
    BootTime(boot_time())
}

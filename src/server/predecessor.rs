//! The process that everything was taken over from: its end, and the way back to it if its number is to stay.

use std::{os::fd::OwnedFd, process, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, retry_on_intr},
    process::{
        Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitOptions, getppid, kill_process,
        pidfd_open, waitid, waitpid,
    },
};

use super::give::{Given, Giver};
use crate::{
    handover::{
        channel::{Channel, ChannelError},
        fault,
        request::Upgraded,
    },
    shared::Shared,
    sys,
    timestamp::Rfc3339,
};

/// Longest wait for the end of the predecessor, whose copies of the sockets keep their ends from the peers.
/// It may wait for the service manager and for its log.
const END_TIMEOUT: Duration = Duration::from_secs(7);

/// Longest time between the end of the channel and that of the process.
const END_MOMENT: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

/// Process that everything was taken over from.
#[derive(Debug)]
pub struct Predecessor {
    pub(super) channel: Channel,
    pub(super) pid: u32,
    /// Set if it runs the program anew and takes everything back.
    pub(super) takes_back: bool,
    /// Time for which nothing has moved.
    pub(super) stall: Duration,
    pub(super) connections: u64,
}

/// Outcome of the wait for the end of a predecessor.
#[derive(Debug)]
pub enum Farewell {
    /// Everything stays here.
    Stays,
    /// The predecessor has taken everything back. The process has to end at once, and without running destructors.
    GivenBack(Given),
    /// The predecessor was to take everything back and has not, for this reason. Everything stays here.
    NotTakenBack(String),
    /// The same, and the predecessor has ended, so that a supervisor starts the service anew: this process is to stop.
    Orphaned(String),
}

impl Giver {
    /// Waits for the end of a predecessor, or hands everything back to it.
    pub fn see_off(&self, mut predecessor: Predecessor) -> Farewell {
        let word = predecessor.channel.await_word(sys::now() + END_TIMEOUT);
        if !predecessor.takes_back {
            predecessor.end(matches!(word, Err(ChannelError::TimedOut)));
            return Farewell::Stays;
        }
        let Predecessor { pid, stall, connections, .. } = predecessor;
        let end = pid_of(pid).map(|pid| pidfd_open(pid, PidfdFlags::empty()));
        let outcome = match word {
            Ok(()) => {
                fault::give_back(true);
                let outcome = self.give_back(predecessor);
                fault::give_back(false);
                outcome
            }
            Err(ChannelError::TimedOut) => Err("the old process hangs".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        match outcome {
            Ok(given) => Farewell::GivenBack(given),
            Err(why) if !has_ended(end) && getppid() == pid_of(pid) => {
                record_upgrade(&self.shared, stall, connections);
                Farewell::NotTakenBack(why)
            }
            Err(why) => {
                let why =
                    format!("the old process, which was to take everything back, has ended: {why}");
                self.shared.upgrades.failed(&why);
                self.shared.upgrade_requests.end_inherited(Err(why.clone()));
                Farewell::Orphaned(why)
            }
        }
    }
}

impl Predecessor {
    /// Returns its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns true if it runs the program anew, so that this process has to follow it.
    pub fn takes_back(&self) -> bool {
        self.takes_back
    }

    /// Ends it if it `hangs`, and waits for the end of a child.
    fn end(&self, hangs: bool) {
        let Some(pid) = pid_of(self.pid) else { return };
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let is_child = waitid(WaitId::Pid(pid), options).is_ok();
        // Another process may have its number by now, unless it is of the family.
        if hangs && (is_child || getppid() == Some(pid)) {
            log::warn!("the process {pid}, which has handed over, does not end and is killed");
            kill_process(pid, Signal::KILL).ok();
        }
        if is_child {
            waitpid(Some(pid), WaitOptions::empty()).ok();
        }
    }
}

/// Returns true if the process of a descriptor has ended, or does so in a moment: its channel ends before. A kernel or a sandbox
/// may refuse such descriptors.
fn has_ended(process: Option<rustix::io::Result<OwnedFd>>) -> bool {
    match process {
        Some(Ok(process)) => {
            let mut polled = [PollFd::new(&process, PollFlags::IN)];
            !matches!(retry_on_intr(|| poll(&mut polled, Some(&END_MOMENT))), Ok(0))
        }
        Some(Err(error)) => error == Errno::SRCH,
        None => true,
    }
}

fn pid_of(number: u32) -> Option<Pid> {
    number.try_into().ok().and_then(Pid::from_raw)
}

/// Records that this process has taken over: for the status, and for callers that wait for it.
pub(super) fn record_upgrade(shared: &Shared, stall: Duration, connections: u64) {
    shared.upgrades.succeeded(Rfc3339::now(), stall, connections);
    shared.upgrade_requests.end_inherited(Ok(Upgraded {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: process::id(),
        connections,
        stall_seconds: stall.as_secs_f64(),
    }));
}

//! The upgrade: the program at its place is started anew and takes over from this process.

mod inheritance;
mod program;

use std::{convert::Infallible, env, fs, os::unix::net::UnixStream, process, thread};

use crossbeam_channel::{Receiver, select};
use rustix::process::{Pid, Signal, getppid, kill_process};
use tcpause::{Error, Given, Giver};

pub(crate) use self::{inheritance::Inheritance, program::Program};
use crate::systemd::{self, Manager};

/// First argument of a process that takes over. It stands before all others, as there may be a `--` among them.
pub(crate) const TAKE_OVER: &str = "--take-over";

/// Supervisors that follow a process by its number: at its end they start it anew, or end themselves.
const FOLLOWERS: [&str; 9] = [
    "catatonit",
    "docker-init",
    "dumb-init",
    "runsv",
    "s6-supervise",
    "supervise",
    "supervise-daemo",
    "supervisord",
    "tini",
];

/// Means to carry out upgrades, which the thread "upgrade" owns.
pub(crate) struct Upgrades<F> {
    pub(crate) program: Result<Program, String>,
    pub(crate) giver: Giver,
    pub(crate) manager: Manager,
    /// Waits until the log is written.
    pub(crate) flush_log: F,
}

impl<F: Fn() + Send + 'static> Upgrades<F> {
    /// Starts the thread that carries out one upgrade at a time: by `signals`, and by requests of the control API.
    pub(crate) fn start(self, signals: Receiver<()>) -> Result<(), Error> {
        // From here on, the control API does not refuse them.
        let requests = self.giver.requests();
        thread::Builder::new()
            .name("upgrade".to_owned())
            .spawn(move || self.run(&signals, &requests))
            .map(drop)
            .map_err(|error| Error::no_thread("upgrades the program", &error))
    }

    fn run(&self, signals: &Receiver<()>, requests: &Receiver<()>) {
        loop {
            let request = select! {
                recv(signals) -> request => request,
                recv(requests) -> request => request,
            };
            // Nobody is left who could ask.
            let Ok(()) = request else { return };
            let Err(why) = self.upgrade(signals);
            log::error!(event = "not-upgraded", why = why.as_str(); "not upgraded: {why}");
            // A request that came meanwhile has this outcome, too.
            requests.try_recv().ok();
            self.giver.failed(&why);
        }
    }

    /// Hands everything over to a new process, and ends this one. Returns the reason if everything goes on here instead.
    fn upgrade(&self, signals: &Receiver<()>) -> Result<Infallible, String> {
        if self.giver.is_stopping() {
            return Err("tcpause is stopping".to_owned());
        }
        Surroundings::look(&self.manager).check()?;
        let program = self.program.as_ref().map_err(Clone::clone)?;
        let (channel, theirs) =
            UnixStream::pair().map_err(|error| format!("cannot make a socket pair: {error}"))?;
        let mut taker = program.start(theirs)?;
        match self.giver.give(channel, &mut || taker.kill()) {
            Ok(given) => self.leave(taker.pid(), given, signals),
            Err(why) => {
                taker.kill();
                Err(taker.explain(&why))
            }
        }
    }

    /// Ends this process, from which everything has been taken over. No destructor runs, as that would close and reset what
    /// the taker carries.
    fn leave(&self, taker: Pid, given: Given, signals: &Receiver<()>) -> ! {
        // Whatever happens from here on, this process has nothing left that it could go on with.
        let _end = ExitAtDrop;
        let has_stopped = self.pass_on(taker, signals, false);
        let Given { connections, stall } = given;
        let seconds = (stall.as_secs_f64() * 1e6).round() / 1e6;
        log::info!(
            event = "handed-over", pid = taker.as_raw_pid(), connections = connections, stall_seconds = seconds;
            "upgraded: pid {taker} has taken over, connections: {connections}, nothing moved for {:.1} ms",
            seconds * 1e3
        );
        self.manager.follow(taker);
        (self.flush_log)();
        self.pass_on(taker, signals, has_stopped);
        process::exit(0)
    }

    /// Passes signals on to the taker that came too late for this process. Returns true if a stop was among them.
    fn pass_on(&self, taker: Pid, signals: &Receiver<()>, has_stopped: bool) -> bool {
        // An error means that the taker has ended.
        if signals.try_recv().is_ok() {
            kill_process(taker, Signal::USR2).ok();
        }
        let stops = self.giver.is_stopping() && !has_stopped;
        if stops {
            kill_process(taker, Signal::TERM).ok();
        }
        stops
    }
}

/// End of the process, also by a panic.
struct ExitAtDrop;

impl Drop for ExitAtDrop {
    fn drop(&mut self) {
        process::exit(0);
    }
}

/// The process that has started this one, as far as it matters at its end.
struct Surroundings {
    pid: u32,
    /// Name of the parent.
    parent: String,
    /// Set if systemd has started this process, or an ancestor of it.
    is_unit: bool,
    /// Set if systemd has started another process, which has started this one.
    is_wrapped: bool,
    /// Set if a service manager can be told which process it is to follow.
    has_manager: bool,
}

impl Surroundings {
    fn look(manager: &Manager) -> Self {
        let parent = getppid().map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")));
        Self {
            pid: process::id(),
            parent: parent.and_then(Result::ok).unwrap_or_default().trim_end().to_owned(),
            is_unit: env::var_os("INVOCATION_ID").is_some(),
            is_wrapped: systemd::is_wrapped(),
            has_manager: manager.is_there(),
        }
    }

    /// Refuses an upgrade if the end of this process would end or restart the service.
    fn check(&self) -> Result<(), String> {
        let Self { pid, parent, is_unit, is_wrapped, has_manager } = self;
        if *pid == 1 {
            return Err(
                "tcpause is process 1, and its container would end with it; start a new container, or run tcpause by systemd"
                    .to_owned(),
            );
        }
        if FOLLOWERS.contains(&parent.as_str()) {
            return Err(format!(
                "{parent} follows the process that it has started, and would take the upgrade for the end of tcpause; restart the service instead, or run tcpause by systemd"
            ));
        }
        if *is_unit && *is_wrapped {
            return Err(
                "systemd follows another process, which has started this one, and would take its end for that of the service; let the unit start tcpause itself, or write exec before it in the script"
                    .to_owned(),
            );
        }
        if *is_unit && !has_manager {
            return Err(
                "systemd would restart the service, as it cannot be told of the new process; write Type=notify and NotifyAccess=main into the unit, as tcpause unit does, and restart the service once"
                    .to_owned(),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upgrade_is_refused_where_the_end_of_the_process_ends_the_service() {
        for (pid, parent, is_unit, is_wrapped, has_manager, refusal) in [
            (2, "bash", false, false, false, None),
            (2, "systemd", true, false, true, None),
            (2, "systemd", false, false, true, None),
            (2, "", false, false, false, None),
            // Variables of systemd without a service are those of a shell's ancestor.
            (2, "bash", false, true, false, None),
            (1, "", false, false, false, Some("is process 1")),
            (1, "", true, false, true, Some("is process 1")),
            (2, "systemd", true, false, false, Some("Type=notify")),
            (2, "sh", true, true, true, Some("write exec before")),
            (2, "tini", false, false, true, Some("tini follows")),
            (2, "runsv", false, false, false, Some("runsv follows")),
            (2, "supervise-daemo", false, false, false, Some("supervise-daemo follows")),
        ] {
            let parent = parent.to_owned();
            let result = Surroundings { pid, parent, is_unit, is_wrapped, has_manager }.check();
            match (result, refusal) {
                (Ok(()), None) => {}
                (Err(told), Some(part)) => {
                    assert!(told.contains(part) && told.contains("; "), "{told}");
                }
                (result, refusal) => panic!("{result:?}, {refusal:?}"),
            }
        }
    }
}

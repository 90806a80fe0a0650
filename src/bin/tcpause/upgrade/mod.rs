//! The upgrade: the program at its place is started anew and takes over from this process.

mod guard;
mod inheritance;
mod program;

use std::{
    convert::Infallible,
    fs,
    os::unix::net::UnixStream,
    process,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, bounded, select};
use rustix::process::{
    Pid, Signal, getpid, getppid, kill_process, set_parent_process_death_signal,
};
use tcpause::{Error, Farewell, Given, Giver, Predecessor, TakerProcess as _};

use self::program::remedy;
pub(crate) use self::{
    guard::{GUARD, become_guard, guard, process_of},
    inheritance::Inheritance,
    program::Program,
};
use crate::{
    EXIT_FAILURE,
    signals::SignalsEnd,
    systemd::{self, Manager},
};

use guard::is_guarded;

/// First argument of a process that takes over. It stands before all others, as there may be a `--` among them.
pub(crate) const TAKE_OVER: &str = "--take-over";
/// First argument of a process that takes everything back from a child; behind it stands the number of that.
pub(crate) const TAKE_BACK: &str = "--take-back";

/// Supervisors below another one that follow a process by its number: at its end they start it anew, or end themselves.
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

/// Longest wait for an attempt to end, once its new program is killed.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);

/// Means to carry out upgrades, which the thread "upgrade" owns.
pub(crate) struct Upgrades<F> {
    pub(crate) program: Result<Program, String>,
    pub(crate) giver: Giver,
    /// Process that everything was taken over from.
    pub(crate) predecessor: Option<Predecessor>,
    pub(crate) manager: Manager,
    pub(crate) signals_end: SignalsEnd,
    /// Waits until the log is written.
    pub(crate) flush_log: F,
}

/// The thread "upgrade", which waits for its work. It exists before this process takes over, as its start may fail.
pub(crate) struct UpgradeThread(Sender<Box<dyn FnOnce() + Send>>);

impl UpgradeThread {
    pub(crate) fn start() -> Result<Self, Error> {
        let (sender, work) = bounded::<Box<dyn FnOnce() + Send>>(1);
        thread::Builder::new()
            .name("upgrade".to_owned())
            // Without work, this process does not go on.
            .spawn(move || work.iter().for_each(|work| work()))
            .map(|_thread| Self(sender))
            .map_err(|error| Error::no_thread("upgrades the program", &error))
    }
}

/// Attempt to upgrade, as it is to be ended with this process.
#[derive(Clone, Default)]
pub(crate) struct Attempt(Arc<(Mutex<UnderWay>, Condvar)>);

/// State of an attempt.
#[derive(Default)]
struct UnderWay {
    /// Set until its outcome is logged.
    is_pending: bool,
    /// New program that has been started and has not taken over.
    started: Option<Pid>,
}

impl Attempt {
    /// Kills the new program, if there is one, and waits until the outcome is logged.
    pub(crate) fn end(&self) {
        let (_, changed) = &*self.0;
        let under_way = self.lock();
        if let Some(pid) = under_way.started {
            kill_process(pid, Signal::KILL).ok();
        }
        drop(changed.wait_timeout_while(under_way, ATTEMPT_TIMEOUT, |it| it.is_pending));
    }

    fn set_pending(&self, is_pending: bool) {
        self.lock().is_pending = is_pending;
        self.0.1.notify_all();
    }

    fn set_started(&self, started: Option<Pid>) {
        self.lock().started = started;
    }

    /// Locks the state. The number of the new program may not become that of another process meanwhile.
    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: Fn() + Send + 'static> Upgrades<F> {
    /// Has `thread` carry out one upgrade at a time: by `signals`, and by requests of the control API. Before, it sees the
    /// predecessor off.
    pub(crate) fn start(self, thread: &UpgradeThread, signals: Receiver<()>) -> Attempt {
        // From here on, the control API does not refuse them.
        let requests = self.giver.requests();
        let attempt = Attempt::default();
        let heard = attempt.clone();
        // An error would mean that the thread has ended, which only waits until here.
        thread.0.send(Box::new(move || self.run(&signals, &requests, &heard))).ok();
        attempt
    }

    fn run(mut self, signals: &Receiver<()>, requests: &Receiver<()>, attempt: &Attempt) {
        let predecessor = self.predecessor.take();
        if predecessor.as_ref().is_some_and(Predecessor::takes_back) || is_guarded() {
            // A supervisor takes the end of the parent for that of the service.
            set_parent_process_death_signal(Some(Signal::TERM)).ok();
        }
        let is_below = predecessor.is_some_and(|predecessor| self.see_off(predecessor, signals));
        loop {
            let request = select! {
                recv(signals) -> request => request,
                recv(requests) -> request => request,
            };
            // Nobody is left who could ask.
            let Ok(()) = request else { return };
            attempt.set_pending(true);
            let keeps_pid = is_below || is_guarded() || keeps_pid(&self.manager);
            let Err(why) = self.upgrade(keeps_pid, signals, attempt);
            log::error!(event = "not-upgraded", why = why.as_str(); "not upgraded: {why}");
            self.giver.failed(&why, requests);
            attempt.set_pending(false);
        }
    }

    /// Waits for the end of the process that everything was taken over from, or hands everything back to it. Returns true if
    /// that one was to take everything back and has not.
    fn see_off(&self, predecessor: Predecessor, signals: &Receiver<()>) -> bool {
        // It is the parent, so its number is one.
        let parent = predecessor.pid().try_into().ok().and_then(Pid::from_raw);
        match self.giver.see_off(predecessor) {
            Farewell::Stays => false,
            Farewell::GivenBack(given) => match parent {
                Some(parent) => self.leave(parent, given, signals),
                None => process::exit(EXIT_FAILURE.into()),
            },
            Farewell::NotTakenBack(why) => {
                let pid = getpid();
                log::error!(
                    event = "not-taken-back", why = why.as_str();
                    "upgraded, but the number changes: process {pid} has taken over, pid {pid}, and the one before it, which was to take everything back, only passes signals on: {why}"
                );
                true
            }
            Farewell::Orphaned(why) => {
                log::error!(event = "not-taken-back", why = why.as_str(); "stopping: {why}");
                kill_process(getpid(), Signal::TERM).ok();
                true
            }
        }
    }

    /// Hands everything over to a new process, and ends this one. Returns the reason if everything goes on here instead.
    fn upgrade(
        &self,
        keeps_pid: bool,
        signals: &Receiver<()>,
        attempt: &Attempt,
    ) -> Result<Infallible, String> {
        if self.giver.is_stopping() {
            return Err("tcpause is stopping".to_owned());
        }
        let program = self.program.as_ref().map_err(Clone::clone)?;
        let (channel, theirs) = UnixStream::pair()
            .map_err(|error| format!("cannot make a socket pair: {error}{}", remedy(&error)))?;
        let mut taker = program.start(theirs, attempt)?;
        match self.giver.give(channel, &mut taker, &|| self.manager.feed(), keeps_pid) {
            Ok(given) => self.leave(taker.number(), given, signals),
            Err(why) => {
                taker.kill();
                Err(taker.explain(&why))
            }
        }
    }

    /// Ends this process, from which everything has been taken over, or runs the program anew in it. No destructor runs, as
    /// that would close and reset what the taker carries.
    fn leave(&self, taker: Pid, given: Given, signals: &Receiver<()>) -> ! {
        // Whatever happens from here on, this process has nothing left that it could go on with.
        let _end = ExitAtDrop;
        if let Some(channel) = given.channel {
            self.signals_end.keep_signals();
            self.pass_on(taker, signals, false);
            (self.flush_log)();
            let words = [TAKE_BACK, &taker.to_string()];
            let error = Program::replace(self.program.as_ref().ok(), words, Some(channel));
            log::error!(
                "cannot run the program anew, so pid {taker}, which has everything, stops: {error}"
            );
            (self.flush_log)();
            process::exit(EXIT_FAILURE.into());
        }
        let has_stopped = self.pass_on(taker, signals, false);
        if !given.is_way_back {
            let Given { connections, stall, .. } = given;
            let seconds = (stall.as_secs_f64() * 1e6).round() / 1e6;
            log::info!(
                event = "handed-over", pid = taker.as_raw_pid(), connections = connections, stall_seconds = seconds;
                "upgraded: pid {taker} has taken over, connections: {connections}, nothing moved for {:.1} ms",
                seconds * 1e3
            );
            self.manager.follow(taker);
        }
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

/// Returns true if this process is to have everything in the end: nobody could be told to follow another one, or not by this
/// process, and its end would end the service.
fn keeps_pid(manager: &Manager) -> bool {
    !manager.is_there() || systemd::is_wrapped() || process::id() == 1 || {
        let parent = getppid().map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")));
        let parent = parent.and_then(Result::ok).unwrap_or_default();
        FOLLOWERS.contains(&parent.trim_end())
    }
}

//! Signals of the proxy: a stop in good order, a stop by force, and an upgrade.
//!
//! Only the thread "signals" lets them through; all others block them. So a process that runs another program can have
//! those that come meanwhile wait for that one.

use std::{
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::sys::signal::{SigSet, Signal as Masked};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2},
    iterator::{Handle, SignalsInfo, exfiltrator::origin::WithOrigin},
    low_level::{emulate_default_handler, siginfo::Origin, signal_name},
};
use tcpause::{Error, Stopper};

use crate::{client::heeded, systemd::Manager};

/// The signals that stop the proxy.
const STOP_SIGNALS: [i32; 3] = [SIGTERM, SIGINT, SIGQUIT];
/// The signals that upgrade the proxy. By default, each would end the program.
const UPGRADE_SIGNALS: [i32; 2] = [SIGUSR2, SIGHUP];
/// Age of a stop from which a further stop signal forces the end. A signal right after the first does not count, as
/// supervisors often signal both a process and its group.
const FORCE_AFTER: Duration = Duration::from_secs(1);
/// All that are caught.
pub(crate) const SIGNALS: [Masked; 6] = [
    Masked::SIGTERM,
    Masked::SIGINT,
    Masked::SIGQUIT,
    Masked::SIGUSR2,
    Masked::SIGHUP,
    Masked::SIGUSR1,
];
/// Longest wait for the thread "signals" to have obeyed those that have come.
const END_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait of a stop signal that the giver has passed on: it has heard already that this process goes on.
const PASSED_ON_TIMEOUT: Duration = Duration::from_secs(5);

/// Running proxy, as signals stop it.
pub(crate) struct Running {
    pub(crate) stopper: Stopper,
    pub(crate) manager: Manager,
    pub(crate) grace_period: Duration,
}

/// Process that everything is taken over from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    /// None: this process starts everything.
    Nobody,
    /// Its parent, which goes on as long as this process does not.
    Parent(Pid),
    /// Its child, to which this process has handed everything over before.
    Child(Pid),
}

/// Signals that are caught and not obeyed yet.
pub(crate) struct Signals {
    caught: SignalsInfo<WithOrigin>,
    ended: Sender<()>,
}

/// Means to end the thread "signals".
pub(crate) struct SignalsEnd {
    handle: Handle,
    ended: Receiver<()>,
}

impl SignalsEnd {
    /// Ends the thread once it has obeyed all signals so far. Those that come from here on wait for the next program of this
    /// process.
    pub(crate) fn keep_signals(&self) {
        self.handle.close();
        // It ends with the thread.
        self.ended.recv_timeout(END_TIMEOUT).ok();
    }
}

/// Keeps signals from this thread and from those that it starts.
pub(crate) fn block() {
    // It fails for wrong arguments only.
    SIGNALS.into_iter().collect::<SigSet>().thread_block().ok();
}

/// Lets signals through to this thread.
pub(crate) fn unblock() {
    SIGNALS.into_iter().collect::<SigSet>().thread_unblock().ok();
}

impl Signals {
    /// Begins to catch the signals that do not stop the proxy. An ignored one stays ignored, as `nohup` requires.
    pub(crate) fn catch() -> Result<(Self, SignalsEnd), Error> {
        let mut signals = heeded(&UPGRADE_SIGNALS);
        signals.push(SIGUSR1);
        let caught = SignalsInfo::new(signals).map_err(|error| cannot_listen(&error))?;
        let (handle, (sender, ended)) = (caught.handle(), bounded(0));
        Ok((Self { caught, ended: sender }, SignalsEnd { handle, ended }))
    }

    /// Begins to catch the signals that stop the proxy. Until here, such a signal just ends the program; from here on, all
    /// of them wait until they are obeyed.
    pub(crate) fn catch_stops(&self) -> Result<(), Error> {
        block();
        let mut signals = STOP_SIGNALS.into_iter();
        signals.try_for_each(|signal| self.caught.add_signal(signal)).map_err(|e| cannot_listen(&e))
    }

    /// Obeys the signals until they are to be [kept](SignalsEnd::keep_signals).
    pub(crate) fn obey(self, mut obedience: Obedience) {
        let Self { mut caught, ended } = self;
        unblock();
        caught.forever().for_each(|origin| obedience.obey(&origin));
        block();
        // Those that came right before.
        caught.pending().for_each(|origin| obedience.obey(&origin));
        drop(ended);
    }
}

/// Way to obey signals: asks for upgrades, stops gracefully at the first stop signal, and by force at a later one.
pub(crate) struct Obedience {
    pub(crate) upgrades: Sender<()>,
    pub(crate) started: Receiver<Running>,
    pub(crate) from: From,
    /// True once a process that takes over goes on.
    pub(crate) goes_on: Arc<AtomicBool>,
    /// True once the giver has passed a stop on. If it has come to both, as from a service manager, that is no second one,
    /// however late it comes.
    pub(crate) is_passed_on: bool,
    /// Stop that has begun, and its time.
    pub(crate) stop: Option<(Running, Instant)>,
}

impl Obedience {
    fn obey(&mut self, origin: &Origin) {
        let name = signal_name(origin.signal).unwrap_or("a signal");
        let is_copy = STOP_SIGNALS.contains(&origin.signal)
            && self.is_of_parent(origin)
            && !mem::replace(&mut self.is_passed_on, true);
        match (origin.signal, &self.stop) {
            (SIGUSR1, _) => log::info!(
                "{name} is ignored: the log goes to standard error, and there is no file to reopen"
            ),
            (signal, _) if UPGRADE_SIGNALS.contains(&signal) => {
                log::info!(event = "upgrade-requested", by = name; "{name} asks for an upgrade");
                // If the channel is full, an upgrade waits already.
                self.upgrades.try_send(()).ok();
            }
            (signal, None) => match self.await_start(origin) {
                Some(running) => {
                    begin_stop(name, &running);
                    self.stop = Some((running, Instant::now()));
                }
                // Another process has everything, and this one ends with it.
                None if matches!(self.from, From::Child(_)) => {}
                // This returns for a signal only that does not end a process by default.
                None => drop(emulate_default_handler(signal)),
            },
            (_, Some(_)) if is_copy => {
                log::info!("{name} is ignored: it is passed on, and this process stops already");
            }
            (_, Some((_, since))) if since.elapsed() < FORCE_AFTER => {
                log::info!("{name} is ignored: it came less than a second after the first");
            }
            (_, Some((running, _))) => {
                log::warn!("{name}: closing all connections now");
                running.stopper.abort();
            }
        }
    }

    /// Returns true for a signal of the process that has started this one to take over.
    fn is_of_parent(&self, origin: &Origin) -> bool {
        let sender = origin.process.as_ref().map(|process| process.pid);
        matches!(self.from, From::Parent(giver) if sender == Some(giver.as_raw_pid()))
    }

    /// Returns the running proxy. A process that is about to take over has none. One that its parent has started waits
    /// for it once it goes on, or if the signal is the giver's, which passes a stop on once it has heard of that; otherwise it
    /// ends, and its parent goes on. One that takes everything back has the giver stop, or stops itself if that has gone.
    fn await_start(&self, origin: &Origin) -> Option<Running> {
        let Self { started, .. } = self;
        let sender = origin.process.map(|process| process.pid);
        let is_from = |giver: Pid| sender == Some(giver.as_raw_pid());
        let goes_on = self.goes_on.load(Ordering::SeqCst);
        match self.from {
            // A start that fails ends the process by itself.
            From::Nobody => started.recv().ok(),
            From::Parent(giver) if goes_on || is_from(giver) => {
                started.recv_timeout(PASSED_ON_TIMEOUT).ok()
            }
            From::Parent(_) => started.try_recv().ok(),
            From::Child(giver) => {
                if !goes_on && !is_from(giver) {
                    pass_on(origin.signal, giver);
                }
                started.recv().ok()
            }
        }
    }
}

/// Passes a signal on to another process.
pub(crate) fn pass_on(signal: i32, to: Pid) {
    if let Some(signal) = Signal::from_named_raw(signal) {
        // An error means that it has ended.
        kill_process(to, signal).ok();
    }
}

fn begin_stop(name: &str, running: &Running) {
    log::info!(
        "{name}: stopping once connections have ended; another stop signal after a second or more closes them at once"
    );
    running.manager.stopping(running.grace_period);
    running.stopper.stop();
}

fn cannot_listen(error: &std::io::Error) -> Error {
    Error::System(format!("cannot listen to signals: {error}"))
}

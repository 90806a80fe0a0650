//! Signals of the proxy: a stop in good order, a stop by force, and an upgrade.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender};
use rustix::process::Pid;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2},
    iterator::{SignalsInfo, exfiltrator::origin::WithOrigin},
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
/// Longest wait of a stop signal that the giver has passed on: it has heard already that this process goes on.
const PASSED_ON_TIMEOUT: Duration = Duration::from_secs(5);

/// Running proxy, as signals stop it.
pub(crate) struct Running {
    pub(crate) stopper: Stopper,
    pub(crate) manager: Manager,
    pub(crate) grace_period: Duration,
}

/// Signals that are caught and not obeyed yet.
pub(crate) struct Signals(SignalsInfo<WithOrigin>);

impl Signals {
    /// Begins to catch the signals that do not stop the proxy. An ignored one stays ignored, as `nohup` requires.
    pub(crate) fn catch() -> Result<Self, Error> {
        let mut signals = heeded(&UPGRADE_SIGNALS);
        signals.push(SIGUSR1);
        SignalsInfo::new(signals).map(Self).map_err(|error| cannot_listen(&error))
    }

    /// Begins to catch the signals that stop the proxy. Until here, such a signal just ends the program.
    pub(crate) fn catch_stops(&self) -> Result<(), Error> {
        let mut signals = STOP_SIGNALS.into_iter();
        signals.try_for_each(|signal| self.0.add_signal(signal)).map_err(|e| cannot_listen(&e))
    }

    /// Obeys the signals: asks for upgrades, stops gracefully at the first stop signal, and by force at a later one. A proxy
    /// that has a `giver` and does not run yet ends at a stop signal, so that the giver goes on.
    pub(crate) fn obey(
        mut self,
        upgrades: &Sender<()>,
        started: &Receiver<Running>,
        giver: Option<Pid>,
        goes_on: &AtomicBool,
    ) {
        let mut stop: Option<(Running, Instant)> = None;
        for origin in self.0.forever() {
            let name = signal_name(origin.signal).unwrap_or("a signal");
            match (origin.signal, &stop) {
                (SIGUSR1, _) => log::info!(
                    "{name} is ignored: the log goes to standard error, and there is no file to reopen"
                ),
                (signal, _) if UPGRADE_SIGNALS.contains(&signal) => {
                    log::debug!("{name}: upgrading");
                    // If the channel is full, an upgrade waits already.
                    upgrades.try_send(()).ok();
                }
                (signal, None) => match await_start(started, giver, goes_on, &origin) {
                    Some(running) => {
                        begin_stop(name, &running);
                        stop = Some((running, Instant::now()));
                    }
                    // This returns for a signal only that does not end a process by default.
                    None => drop(emulate_default_handler(signal)),
                },
                (_, Some((_, since))) if since.elapsed() < FORCE_AFTER => {
                    log::info!("{name} is ignored: it came less than a second after the first");
                }
                (_, Some((running, _))) => {
                    log::warn!("{name}: closing all connections now");
                    running.stopper.abort();
                }
            }
        }
    }
}

/// Returns the running proxy. A process that is about to take over has none; it waits for it once it goes
/// on, or if the signal is the giver's, which passes a stop on once it has heard of that.
fn await_start(
    started: &Receiver<Running>,
    giver: Option<Pid>,
    goes_on: &AtomicBool,
    origin: &Origin,
) -> Option<Running> {
    let sender = origin.process.map(|process| process.pid);
    match giver {
        // A start that fails ends the process by itself.
        None => started.recv().ok(),
        Some(giver) if goes_on.load(Ordering::SeqCst) || sender == Some(giver.as_raw_pid()) => {
            started.recv_timeout(PASSED_ON_TIMEOUT).ok()
        }
        Some(_) => started.try_recv().ok(),
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

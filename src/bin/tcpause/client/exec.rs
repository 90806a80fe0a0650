//! `tcpause exec`: pauses, waits until idle, runs a command, and resumes.
//!
//! The pause depends on one connection, and on a short lease that is renewed over it. So the proxy serves again if this
//! process dies or hangs. One thread talks to the API, one listens to signals, and one waits for the command. They send
//! events to the main thread.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::process::ExitStatusExt as _,
    process::{Child, Command, ExitCode, ExitStatus},
    sync::Arc,
    thread::Builder,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use rustix::{
    io::retry_on_intr,
    process::{Pid, Signal, WaitId, WaitIdOptions, getpgid, getpgrp, kill_process, waitid},
};
use signal_hook::{
    consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM},
    flag,
    iterator::{SignalsInfo, exfiltrator::origin::WithOrigin},
    low_level::siginfo::{Cause, Origin},
};
use tcpause::{Error, boot_time, parse_duration};

use super::{
    Api, Failure, Idle, StillPaused, duration,
    http::{ANSWER_TIMEOUT, Connection, target},
    naming::{FLEET_REASON_BYTES_MAX, REASON_BYTES_MAX, own_name, reason_of},
    news::{End, Event, talk},
    parameters, pause_path, program,
};
use crate::{cli::Invocation, tell};

/// Time to live of a pause of a fleet, if the command line names none.
const FLEET_TTL_DEFAULT: &str = "15s";
/// Number of renewals within the time to live of a lease.
const RENEWALS_PER_TTL: u32 = 3;
/// Shortest time between two renewals.
const RENEWAL_MIN: Duration = Duration::from_millis(10);
/// Time for a proxy to tell of a loss itself, before its silence counts as one. No host resumes within it.
const SILENCE_MARGIN: Duration = Duration::from_millis(500);

/// Number of signals that make exec give up on its command if they come within [`SIGNALS_TIME`]. The time is bounded, as an
/// interactive command may get any number of Ctrl-C over hours.
const SIGNALS_MAX: usize = 3;
const SIGNALS_TIME: Duration = Duration::from_secs(10);
/// Time after a signal in which a further one is not counted, as supervisors often signal both a process and its group.
const SIGNALS_REST: Duration = Duration::from_millis(200);

/// Exit code of shells for a command that was ended by a signal, less the signal's number.
const EXIT_SIGNAL: i32 = 128;

/// Runs the command while the proxy is paused. The exit code is the command's.
pub(super) fn run(api: Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    // The look-up comes first, so that no client is held for a command that cannot run.
    program::find(&invocation.program)?;
    let mut exec = Exec::start(api, invocation)?;
    let idle = exec.wait_until_idle().map_err(not_run)?;
    let outcome = exec.run_command(&invocation.program);
    match (&outcome, exec.resume()) {
        (Ok(0), Err(failure)) => return Err(failure),
        (_, Err(failure)) => tell(failure.told().1),
        (Ok(code), Ok(())) => {
            let still = StillPaused::now(&exec.api).without(&exec.lease);
            let paused = exec.paused.as_secs_f64();
            tell(format!("paused for {paused:.1}s{idle}; the command ended with {code}{still}"));
        }
        (Err(_), Ok(())) => {}
    }
    outcome.map(ExitCode::from)
}

struct Exec {
    api: Api,
    /// Name of a lease that ends only a moment after the pause.
    lease: String,
    /// True if the command is ended once it is not certain that the pause holds.
    kills_if_lost: bool,
    renewal: Duration,
    /// Time of the next renewal.
    due: Instant,
    connection: Option<Arc<Connection>>,
    /// Time from which on the silence of a proxy counts as a loss. Only a fleet's proxy tells it, and none that is older.
    silent_at: Option<Duration>,
    is_silent: bool,
    sender: Sender<Event>,
    events: Receiver<Event>,
    end: Option<End>,
    /// Time of the request for the pause, and the length of the pause once it has ended.
    begun: Instant,
    paused: Duration,
}

impl Exec {
    /// Listens to signals and asks for the pause.
    fn start(api: Api, invocation: &Invocation) -> Result<Self, Failure> {
        const PARAMETERS: [&str; 6] =
            ["wait", "on-timeout", "mode", "drain", "half-closed", "without"];

        let (path, more) = pause_path(invocation)?;
        let is_of_fleet = invocation.is_of_fleet();
        // An inherited "ignore" of SIGCHLD would discard the command's exit code; a handler replaces it.
        flag::register(SIGCHLD, Arc::default()).map_err(|error| cannot_listen(&error))?;
        let (sender, events) = unbounded();
        let mut signals =
            SignalsInfo::<WithOrigin>::new(heeded(&[SIGINT, SIGTERM, SIGHUP, SIGQUIT]))
                .map_err(|error| cannot_listen(&error))?;
        let signalled = sender.clone();
        spawn("signals", "listens to signals", move || {
            for signal in signals.forever() {
                drop(signalled.send(Event::Signal(signal)));
            }
        })?;
        let name = invocation.asked("name").map_or_else(|| own_name(is_of_fleet), str::to_owned);
        let reason_max = if is_of_fleet { FLEET_REASON_BYTES_MAX } else { REASON_BYTES_MAX };
        let reason = invocation
            .asked("reason")
            .map_or_else(|| reason_of(&invocation.program, reason_max), str::to_owned);
        let ttl = match invocation.given("ttl") {
            None if is_of_fleet => FLEET_TTL_DEFAULT,
            _ => invocation.asked("ttl").unwrap_or_default(),
        };
        let renewal = (parse_duration(ttl).unwrap_or_default() / RENEWALS_PER_TTL).max(RENEWAL_MIN);
        let mut all =
            vec![("while", "connected"), ("name", &*name), ("reason", &*reason), ("ttl", ttl)];
        all.extend(parameters(invocation, &PARAMETERS));
        let request = target(path, &all);
        let wait = duration(invocation, "wait").map(|wait| wait.saturating_add(more));
        let (talking, sees) = (api.clone(), sender.clone());
        spawn("control", "asks the control API", move || talk(&talking, &request, wait, &sees))?;
        let begun = Instant::now();
        Ok(Self {
            api,
            lease: if is_of_fleet { format!("fleet/{name}") } else { String::new() },
            kills_if_lost: invocation.asked("if-lost") == Some("kill"),
            renewal,
            due: begun + renewal,
            connection: None,
            silent_at: None,
            is_silent: false,
            sender,
            events,
            end: None,
            begun,
            paused: Duration::ZERO,
        })
    }

    /// Returns the next event. Until it comes, the lease is renewed.
    fn next(&mut self) -> Event {
        loop {
            let left = self.silent_at.map(|at| at.saturating_sub(boot_time()));
            let silent = left.and_then(|left| Instant::now().checked_add(left));
            match self.events.recv_deadline(silent.map_or(self.due, |at| at.min(self.due))) {
                Ok(event) => return event,
                Err(_) if self.silent_at.is_some_and(|at| at <= boot_time()) => {
                    self.silent_at = None;
                    return Event::Silent;
                }
                Err(_) if Instant::now() < self.due => {}
                // The channel is never disconnected, as `self` has a sender too.
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    // An error shows in the `control` thread, which reads from this connection.
                    let _ = self.connection.as_ref().map(|connection| connection.send(b"\n"));
                    self.due = Instant::now() + self.renewal;
                }
            }
        }
    }

    /// Waits until the proxy is idle. An error undoes the pause, since its connection closes.
    fn wait_until_idle(&mut self) -> Result<Idle, Failure> {
        loop {
            match self.next() {
                Event::Connected(connection) => {
                    self.connection = Some(connection);
                    self.begun = Instant::now();
                }
                Event::Answered(answer) => {
                    let answer = answer?;
                    if answer.status != 201 {
                        return Err(Failure::refused(&self.api, &answer));
                    }
                    answer.check_idle()?;
                    return Ok(Idle::of(&answer));
                }
                Event::Signal(origin) => {
                    return Err(interrupted(
                        origin.signal,
                        "interrupted while waiting; the pause is undone and the command was not run",
                    ));
                }
                Event::Lost(_)
                | Event::Kept(_)
                | Event::Silent
                | Event::Forced(_)
                | Event::Resumed { .. }
                | Event::Ended(_)
                | Event::Exited => {}
            }
        }
    }

    /// Runs the command to its end. Returns the exit code that a shell would.
    fn run_command(&mut self, program: &[OsString]) -> Result<u8, Failure> {
        let Some((name, arguments)) = program.split_first() else { return Ok(0) };
        // The thread starts before the command: if it cannot, no command runs that nothing waits for.
        let (pid_sender, pids) = unbounded();
        let exited = self.sender.clone();
        spawn("command", "waits for the command", move || {
            if let Ok(pid) = pids.recv() {
                // This does not reap the command, whose pid thus stays its own while signals are passed on.
                let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
                let _ = retry_on_intr(|| waitid(WaitId::Pid(pid), options));
                drop(exited.send(Event::Exited));
            }
        })?;
        let spawned = Command::new(name).args(arguments).spawn();
        let mut child =
            spawned.map_err(|error| program::cannot_run(name, &error, "the pause is lifted"))?;
        let pid = Pid::from_child(&child);
        let _ = pid_sender.send(pid);
        self.look_after(pid)?;
        exit_code(&mut child)
    }

    /// Keeps the pause and passes signals on until the command ends. Returns an error after too many signals.
    fn look_after(&mut self, pid: Pid) -> Result<(), Failure> {
        // Signals that came before the command's start have not reached it through the terminal.
        let mut early = self.events.len();
        let mut insistence = Insistence::default();
        loop {
            let event = self.next();
            let is_early = early > 0;
            early = early.saturating_sub(1);
            match event {
                Event::Exited => return Ok(()),
                Event::Signal(origin) => {
                    if is_early || !has_reached(pid, &origin) {
                        pass_on(pid, origin.signal);
                    }
                    insistence.check(Instant::now(), origin.signal)?;
                }
                Event::Lost(_) | Event::Kept(_) | Event::Silent => self.note_certainty(pid, &event),
                Event::Forced(hosts) => {
                    let hosts = hosts.join(", ");
                    self.note_loss(
                        pid,
                        &format!("an operator has resumed hosts by force: {hosts}"),
                    );
                }
                Event::Ended(end) => {
                    self.note_end(end);
                    self.note_loss(pid, end.early());
                }
                Event::Connected(_) | Event::Answered(_) | Event::Resumed { .. } => {}
            }
        }
    }

    /// Notes that it is not certain any more that the pause holds, or is again.
    fn note_certainty(&mut self, pid: Pid, event: &Event) {
        let lost = "it is not certain any more that all hosts are paused, as the";
        match *event {
            Event::Kept(until) => {
                self.silent_at = Some(until.saturating_add(SILENCE_MARGIN));
                if std::mem::take(&mut self.is_silent) {
                    tell("all hosts are paused, as the proxy answers again");
                }
            }
            Event::Silent => {
                self.is_silent = true;
                self.note_loss(pid, &format!("{lost} proxy does not answer"));
            }
            Event::Lost(true) => {
                (self.silent_at, self.is_silent) = (None, false);
                self.note_loss(pid, &format!("{lost} pause cannot be renewed in etcd"));
            }
            Event::Lost(false) => {
                tell("all hosts are paused, as the pause is renewed in etcd again");
            }
            _ => {}
        }
    }

    /// Tells that the command may run without the pause, and ends it if that was asked for.
    fn note_loss(&self, pid: Pid, clause: &str) {
        if self.kills_if_lost {
            tell(format!("{clause}; the command is sent SIGTERM"));
            pass_on(pid, SIGTERM);
        } else {
            tell(format!("{clause}; the command goes on"));
        }
    }

    fn note_end(&mut self, end: End) {
        (self.end, self.silent_at) = (Some(end), None);
        self.paused = self.begun.elapsed();
    }

    /// Ends the pause by closing its connection, and waits until it has ended. A request by name could end a pause of the
    /// same name that another caller has.
    fn resume(&mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        self.connection.iter().for_each(|connection| connection.end());
        while self.end.is_none() {
            match self.events.recv_deadline(deadline) {
                Ok(Event::Ended(end)) => self.note_end(end),
                Ok(Event::Resumed { ended: false, .. }) => tell(
                    "etcd does not answer, so that the end of the pause is not certain; hosts resume once it does",
                ),
                Ok(Event::Resumed { ended: true, still_paused }) if !still_paused.is_empty() => {
                    tell(format!("hosts that have not resumed yet: {}", still_paused.join(", ")));
                }
                Ok(_) => {}
                Err(_) => return Err(self.api.silent("takes too long to end the pause")),
            }
        }
        match self.end {
            Some(End::ProxyGone) => Err(Failure::Unreachable(
                "the proxy went away while the command ran; see to it that it runs again"
                    .to_owned(),
            )),
            Some(End::Lifted) | None => Ok(()),
        }
    }
}

/// Times of the last signals, which the command has outlasted.
#[derive(Debug, Default)]
struct Insistence(Vec<Instant>);

impl Insistence {
    /// Counts a signal. The last but one prints a warning, and the last one returns an error, by which exec gives up.
    fn check(&mut self, now: Instant, signal: i32) -> Result<(), Failure> {
        let age = |at: &Instant| now.saturating_duration_since(*at);
        self.0.retain(|at| age(at) < SIGNALS_TIME);
        if self.0.last().is_some_and(|last| age(last) < SIGNALS_REST) {
            return Ok(());
        }
        self.0.push(now);
        match self.0.len() {
            SIGNALS_MAX.. => Err(interrupted(
                signal,
                "gave up on the command after three signals; the pause is lifted and the command goes on",
            )),
            2 => {
                tell(
                    "the command goes on; at a third signal soon, exec lifts the pause and leaves it",
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Returns true if the command has got the signal as well. A terminal sends Ctrl-C and Ctrl-\ to one process group, which a
/// command such as `timeout` leaves. A signal from another process has reached exec alone.
fn has_reached(pid: Pid, origin: &Origin) -> bool {
    let is_the_terminals =
        origin.cause == Cause::Kernel && matches!(origin.signal, SIGINT | SIGQUIT);
    is_the_terminals && getpgid(Some(pid)).is_ok_and(|group| group == getpgrp())
}

fn pass_on(pid: Pid, signal: i32) {
    if let Some(signal) = Signal::from_named_raw(signal) {
        // An error means that the command has just ended.
        let _ = kill_process(pid, signal);
    }
}

pub(super) fn cannot_listen(error: &io::Error) -> Failure {
    Failure::Other(format!("cannot listen to signals: {error}"))
}

fn not_run(failure: Failure) -> Failure {
    match failure {
        Failure::NotNow(text) => Failure::NotNow(format!("{text}; the command was not run")),
        other => other,
    }
}

fn interrupted(signal: i32, text: &str) -> Failure {
    let code = u8::try_from(EXIT_SIGNAL + signal).unwrap_or(u8::MAX);
    Failure::Program(code, text.to_owned())
}

fn exit_code(child: &mut Child) -> Result<u8, Failure> {
    let status = child.wait().map_err(|error| {
        Failure::Other(format!("cannot learn how the command has ended: {error}"))
    })?;
    let code = |status: ExitStatus| status.code().or_else(|| Some(EXIT_SIGNAL + status.signal()?));
    Ok(code(status).and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX))
}

/// Returns those of `signals` that are not ignored. An ignored signal stays ignored, here and for the command, as `nohup`
/// requires.
pub(crate) fn heeded(signals: &[i32]) -> Vec<i32> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    let is_heeded = |signal: &i32| ignored & (1 << (signal - 1)) == 0;
    signals.iter().copied().filter(is_heeded).collect()
}

/// Starts the thread `name`, whose purpose an error tells.
pub(super) fn spawn(
    name: &str,
    purpose: &str,
    run: impl FnOnce() + Send + 'static,
) -> Result<(), Failure> {
    let spawned = Builder::new().name(name.to_owned()).spawn(run).map(drop);
    spawned.map_err(|error| Error::no_thread(purpose, &error).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_signals_in_a_short_time_are_enough() {
        let begin = Instant::now();
        for (moments, given_up_at) in [
            (&[0, 1_000, 2_000][..], Some(2_000)),
            (&[0, 200, 400], Some(400)),
            // Two signals in quick succession count as one.
            (&[0, 5, 1_000, 1_005, 1_100], None),
            (&[0, 5, 1_000, 1_005, 1_200], Some(1_200)),
            // A key that is held down repeats the signal, which counts once every `SIGNALS_REST`.
            (&[0, 100, 200, 300, 400], Some(400)),
            (&[0, 5_000, 10_000, 15_000, 20_000], None),
            (&[0, 9_000, 9_999], Some(9_999)),
        ] {
            let mut insistence = Insistence::default();
            let mut checked = moments.iter().map(|&at| {
                (at, insistence.check(begin + Duration::from_millis(at), SIGINT).is_err())
            });
            let found = checked.find_map(|(at, is_over)| is_over.then_some(at));
            assert_eq!(found, given_up_at, "{moments:?}");
        }
    }
}

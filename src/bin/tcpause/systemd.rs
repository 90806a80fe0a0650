//! systemd: the sockets that it passes, and what it is told.

use std::{
    env,
    ffi::OsStr,
    io::{self, ErrorKind, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    process,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use listenfd::ListenFd;
use rustix::{
    cmsg_space,
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::Pid,
};
use tcpause::{Error, Handle, Heartbeat, Server, Sockets, Status};

use crate::logger::OneLine;

/// Most sockets that are taken over. A number of sockets is foreign input, and each costs memory.
const SOCKETS_MAX: usize = 64;

/// Takes over the sockets that were passed to this process, as `sd_listen_fds` has it. Must come before the first thread, as it
/// changes the environment.
pub(crate) fn sockets() -> Result<Sockets, Error> {
    let text = |name| env::var(name).unwrap_or_default();
    // Variables of another process come from a parent that did not clear them.
    if text("LISTEN_PID").parse() != Ok(process::id()) {
        return Ok(Sockets::default());
    }
    if text("LISTEN_FDS").parse().is_ok_and(|count: usize| count > SOCKETS_MAX) {
        return Err(Error::Config(format!("LISTEN_FDS: the most sockets are {SOCKETS_MAX}")));
    }
    let mut passed = ListenFd::from_env();
    let (names, count) = (text("LISTEN_FDNAMES"), passed.len());
    let mut names: Vec<&str> = names.split(':').collect();
    names.resize(count.max(names.len()), "");
    if names.len() > count.max(1) {
        return Err(Error::Config(format!(
            "LISTEN_FDNAMES: there are {} names and {count} sockets; pass a name for each",
            names.len()
        )));
    }
    let mut sockets = Sockets::default();
    for (index, name) in (0..count).zip(names) {
        let name = if count == 1 && is_nameless(name) { "proxy" } else { name };
        sockets.add(name, take(&mut passed, index, name)?)?;
    }
    Ok(sockets)
}

/// Returns true for the name of a socket whose unit gives it none: systemd takes that of the unit then.
fn is_nameless(name: &str) -> bool {
    name.is_empty() || name == "unknown" || name.ends_with(".socket")
}

fn take(passed: &mut ListenFd, index: usize, name: &str) -> Result<OwnedFd, Error> {
    if let Ok(Some(socket)) = passed.take_unix_listener(index) {
        return Ok(socket.into());
    }
    match passed.take_tcp_listener(index) {
        Ok(Some(socket)) => Ok(socket.into()),
        Ok(None) | Err(_) => Err(Error::Config(format!(
            "the passed socket {name:?} cannot be used: it is no stream socket, TCP or UNIX; pass one that listens for streams"
        ))),
    }
}

/// Least interval between two texts of the state.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// Time that the end of the program may take beyond the grace period.
const STOP_MARGIN: Duration = Duration::from_secs(5);
/// Longest wait for room at the manager's socket.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait until the manager has read what it was told.
const HEARD_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait for the end of a process that everything was taken over from. It may wait for the manager and for its log.
const GIVER_TIMEOUT: Duration = Duration::from_secs(8);
/// State in words that stays as it is until an event.
const RUNNING: &str = "running";

/// The service manager, as `sd_notify` has it; none, if nobody asks to be told.
#[derive(Clone)]
pub(crate) struct Manager(Option<Arc<Notifications>>);

struct Notifications {
    socket: UnixDatagram,
    address: SocketAddr,
    /// Wakes the thread that tells the state.
    wake: Sender<()>,
    events: Receiver<()>,
}

impl Manager {
    /// Finds the manager that `NOTIFY_SOCKET` names: by a path, or by an abstract name behind an `@`.
    pub(crate) fn find() -> Self {
        let Some(name) = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Self(None);
        };
        match Notifications::to(name.as_encoded_bytes()) {
            Ok(notifications) => Self(Some(Arc::new(notifications))),
            Err(error) => {
                log::warn!(
                    "NOTIFY_SOCKET: {} cannot be reached, so systemd is told nothing: {error}",
                    name.display()
                );
                Self(None)
            }
        }
    }

    /// Returns true if there is one that can be told.
    pub(crate) fn is_there(&self) -> bool {
        self.0.is_some()
    }

    /// Tells that the proxy serves, and from now on its state and that its threads go on. A process that has taken over tells
    /// nothing before `end_of_giver`, as the manager still follows the giver and would ignore it.
    pub(crate) fn ready(
        &self,
        server: &Server,
        end_of_giver: Option<OwnedFd>,
    ) -> Result<(), Error> {
        let Some(notifications) = &self.0 else { return Ok(()) };
        let wake = notifications.wake.clone();
        let handle = server.handle();
        // If the channel is full, a notification waits already.
        handle.watch(move || {
            wake.try_send(()).ok();
        });
        if end_of_giver.is_none() {
            notifications.tell("READY=1");
        }
        let reporter = Reporter {
            notifications: Arc::clone(notifications),
            handle,
            heartbeat: server.heartbeat(),
            interval: watchdog_interval(),
            end_of_giver,
            told: (String::new(), None),
        };
        thread::Builder::new()
            .name("systemd".to_owned())
            .spawn(move || reporter.run())
            .map(drop)
            .map_err(|error| Error::no_thread("tells systemd the state", &error))
    }

    /// Feeds the watchdog, if there is one, ahead of a time in which the threads do not go on.
    pub(crate) fn feed(&self) {
        if let Some(notifications) = &self.0
            && watchdog_interval().is_some()
        {
            notifications.tell("WATCHDOG=1");
        }
    }

    /// Tells that another process is the main one from here on, and waits until the manager has heard it: the end of this
    /// process would be that of the service before.
    pub(crate) fn follow(&self, pid: Pid) {
        let Some(notifications) = &self.0 else { return };
        // The other process has the whole time from here on.
        self.feed();
        notifications.tell(&format!("MAINPID={pid}"));
        if let Err(error) = notifications.await_heard() {
            log::warn!("systemd may not have heard that it is to follow pid {pid}: {error}");
        }
    }

    /// Tells that a stop has begun, and asks for the time that it may take.
    pub(crate) fn stopping(&self, grace_period: Duration) {
        if let Some(notifications) = &self.0 {
            let time = (grace_period + STOP_MARGIN).as_micros();
            notifications.tell(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={time}"));
            notifications.wake.try_send(()).ok();
        }
    }
}

impl Notifications {
    fn to(name: &[u8]) -> io::Result<Self> {
        let address = match name.strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(OsStr::from_bytes(name))?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        let (wake, events) = bounded(1);
        Ok(Self { socket, address, wake, events })
    }

    /// Waits until the manager has read all messages so far: it closes the descriptor behind them, as `sd_notify_barrier` has
    /// it.
    fn await_heard(&self) -> io::Result<()> {
        let (ours, theirs) = io::pipe()?;
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        socket.connect_addr(&self.address)?;
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [theirs.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        let text = [IoSlice::new(b"BARRIER=1")];
        sendmsg(&socket, &text, &mut control, SendFlags::empty())?;
        drop(theirs);
        await_event(&ours, PollFlags::empty(), HEARD_TIMEOUT)
    }

    fn tell(&self, text: &str) {
        if let Err(error) = self.socket.send_to_addr(text.as_bytes(), &self.address) {
            log::warn!("systemd cannot be told {text:?}: {error}");
        }
    }
}

/// Waits for an event of a descriptor; its end is always one.
fn await_event(descriptor: impl AsFd, event: PollFlags, timeout: Duration) -> io::Result<()> {
    let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
    let mut polled = [PollFd::new(&descriptor, event)];
    match retry_on_intr(|| poll(&mut polled, Some(&timeout)))? {
        0 => Err(ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// Returns the variables of passed sockets. A program that takes over gets its listeners otherwise.
pub(crate) fn of_sockets() -> impl Iterator<Item = &'static str> {
    ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"].into_iter()
}

/// Returns the variables that are meant for this process alone: another one is its own that the watchdog looks at.
pub(crate) fn own_variables() -> impl Iterator<Item = &'static str> {
    let of_number = ["WATCHDOG_PID", "SYSTEMD_EXEC_PID"].into_iter();
    of_sockets().chain(of_number.filter(|name| number_in(name) == Some(process::id().into())))
}

/// Returns true if systemd has started another process, of which this one is a child.
pub(crate) fn is_wrapped() -> bool {
    number_in("SYSTEMD_EXEC_PID").is_some_and(|pid| pid != u64::from(process::id()))
}

/// Returns the number in a variable.
fn number_in(variable: &str) -> Option<u64> {
    env::var(variable).ok()?.parse().ok()
}

/// Returns the interval of the watchdog's notifications, half of the time after which it ends the program.
fn watchdog_interval() -> Option<Duration> {
    if number_in("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(process::id())) {
        return None;
    }
    let interval = Duration::from_micros(number_in("WATCHDOG_USEC")? / 2);
    (!interval.is_zero()).then_some(interval)
}

/// Thread that tells the state, and that the other threads go on. It sleeps until an event or a deadline.
struct Reporter {
    notifications: Arc<Notifications>,
    handle: Handle,
    heartbeat: Heartbeat,
    /// Interval of the watchdog, if there is one.
    interval: Option<Duration>,
    /// Descriptor that can be read once the giver has ended, if this process has taken over.
    end_of_giver: Option<OwnedFd>,
    /// State told last, and its time.
    told: (String, Option<Instant>),
}

impl Reporter {
    fn run(mut self) {
        let mut beat_at = self.interval.map(|interval| Instant::now() + interval);
        if let Some(giver) = self.end_of_giver.take() {
            // A giver that does not end has told the manager all the same.
            let timeout = GIVER_TIMEOUT.min(self.interval.unwrap_or(GIVER_TIMEOUT));
            await_event(&giver, PollFlags::IN, timeout).ok();
            self.notifications.tell("READY=1");
            // The watchdog was last fed by the giver, before it waited for the manager and for its log.
            beat_at = self.interval.map(|_interval| Instant::now());
        }
        loop {
            if let Some(interval) = self.interval
                && beat_at.is_some_and(|at| at <= Instant::now())
                && self.heartbeat.wait(interval)
            {
                self.notifications.tell("WATCHDOG=1");
                beat_at = Some(Instant::now() + interval);
            }
            let status_at = self.tell_status(Instant::now());
            let events = &self.notifications.events;
            let woken = match beat_at.into_iter().chain(status_at).min() {
                Some(at) => events.recv_deadline(at),
                None => events.recv().map_err(RecvTimeoutError::from),
            };
            if woken == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    }

    /// Tells the state in words if it has changed. Returns the time of the next look; none, if the state stays as it is until an
    /// event.
    fn tell_status(&mut self, now: Instant) -> Option<Instant> {
        let state = words(&self.handle.status());
        let (told, told_at) = &mut self.told;
        let may_tell_at = told_at.map_or(now, |at| at + STATUS_INTERVAL);
        let is_new = state != *told;
        if is_new && may_tell_at > now {
            return Some(may_tell_at);
        }
        if is_new {
            self.notifications.tell(&format!("STATUS={}", OneLine(&state)));
            *told_at = Some(now);
        }
        let next = (state != RUNNING).then(|| now + STATUS_INTERVAL);
        *told = state;
        next
    }
}

/// Returns the state in words, and during a pause its name and the numbers of clients.
fn words(status: &Status) -> String {
    let Some(first) = status.leases.first() else { return status.state.clone() };
    let Status { state, leases, held, active, .. } = status;
    let more = match leases.len() {
        1 => String::new(),
        count => format!(" and {} more", count - 1),
    };
    format!("{state}; by {}{more}; {held} held, {active} active", first.name)
}

#[cfg(test)]
mod tests {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use tempfile::TempDir;

    use super::*;

    /// Time that is long enough for any machine; only a defect makes a test wait for it.
    const DEADLINE: Duration = Duration::from_secs(20);

    /// Socket of a manager, whose part the test plays, and the way to it.
    fn manager() -> (UnixDatagram, Manager, TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let notifications = Notifications::to(path.as_os_str().as_bytes()).unwrap();
        (socket, Manager(Some(Arc::new(notifications))), folder)
    }

    /// Returns the next message with its descriptors.
    fn receive(socket: &UnixDatagram) -> (String, Vec<OwnedFd>) {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut text = [0; 256];
        let mut parts = [io::IoSliceMut::new(&mut text)];
        let length = recvmsg(socket, &mut parts, &mut control, RecvFlags::empty()).unwrap().bytes;
        let descriptors = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
            _ => Vec::new(),
        });
        let descriptors = descriptors.collect();
        (String::from_utf8(text[..length].to_vec()).unwrap(), descriptors)
    }

    #[test]
    fn the_manager_is_told_of_the_new_process_and_has_heard_it() {
        let (socket, manager, _folder) = manager();
        let pid = rustix::process::getpid();
        let following = thread::Builder::new().spawn(move || manager.follow(pid)).unwrap();
        assert_eq!(receive(&socket).0, format!("MAINPID={pid}"));
        let (text, descriptors) = receive(&socket);
        assert_eq!((text.as_str(), descriptors.len()), ("BARRIER=1", 1));
        assert!(!following.is_finished(), "it waits until the manager has read that far");
        let closed = Instant::now();
        drop(descriptors);
        following.join().unwrap();
        assert!(closed.elapsed() < HEARD_TIMEOUT, "the wait ends with the descriptor");
    }

    #[test]
    fn a_process_that_has_taken_over_feeds_the_watchdog_before_its_first_interval_is_over() {
        const HOUR: Duration = Duration::from_secs(3600);

        let (socket, manager, folder) = manager();
        let mut config = tcpause::Config::default();
        for (key, name) in [("proxy.addr", "proxy"), ("control.addr", "control")] {
            let path = folder.path().join(name);
            config.set(key, &format!("unix://{}", path.display())).unwrap();
        }
        let server = Server::start(config).unwrap();
        let (of_ended, ended) = io::pipe().unwrap();
        drop(ended);
        let (of_present, _present) = io::pipe().unwrap();
        for (interval, end_of_giver) in [(HOUR, of_ended), (Duration::from_millis(100), of_present)]
        {
            let reporter = Reporter {
                notifications: Arc::clone(manager.0.as_ref().unwrap()),
                handle: server.handle(),
                heartbeat: server.heartbeat(),
                interval: Some(interval),
                end_of_giver: Some(end_of_giver.into()),
                told: (String::new(), None),
            };
            let begun = Instant::now();
            // The thread runs until the tests end.
            thread::Builder::new().spawn(move || reporter.run()).unwrap();
            for expected in ["READY=1", "WATCHDOG=1"] {
                let mut told = receive(&socket).0;
                while told.starts_with("STATUS=") {
                    told = receive(&socket).0;
                }
                assert_eq!(told, expected);
            }
            assert!(begun.elapsed() < GIVER_TIMEOUT);
        }
    }

    #[test]
    fn a_manager_that_does_not_read_keeps_nobody_for_long() {
        let (socket, manager, folder) = manager();
        let notifications = manager.0.as_ref().unwrap();
        let begun = Instant::now();
        let error = notifications.await_heard().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(begun.elapsed() >= HEARD_TIMEOUT);
        drop((socket, folder));
        assert_ne!(notifications.await_heard().unwrap_err().kind(), ErrorKind::TimedOut);
        // Without a manager there is nobody to wait for.
        Manager(None).follow(rustix::process::getpid());
    }
}

//! `Server`: binds everything, starts every thread, and ends them all.

mod listening;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crossbeam_channel::bounded;
use mio::{Poll, Waker};

use crate::{
    admission::Admission,
    config::{
        self, Config,
        address::{self, Address},
    },
    connection::reject::policy::RejectPolicy,
    control::{Control, HostPolicy},
    error::Error,
    handle::Handle,
    pause::{Pauses, expiry, gate::Mode},
    shared::{Phase, Shared, Shutdown},
    stats::Counters,
    sys::{self, Listener, SocketAddress, socket_file::SocketFile},
    upstream::{Upstream, loop_guard::LoopGuard},
    worker::{End, WAKER, WorkerResources},
    worker_pool::{WorkerHandle, WorkerPool},
};
use listening::listen_at_all;

/// How many clients may be on their way from the worker that accepts to another.
const MAILBOX_MAX: usize = 1024;

/// How many pipes all workers together have by default: half of what an unprivileged user may have of their size. One is
/// taken only while bytes wait in it; whoever finds none copies.
const PIPES_MAX: usize = 32;

/// Callers of the control API that are served at once, waiting ones included; fewer where descriptors are few.
const CALLERS_MAX: usize = 128;
const CALLERS_MIN: usize = 2;

/// The descriptors of what is there once: the control API and the request it has in hand, signals, the log, a look-up.
const FIXED_FILES: usize = 27;
/// The descriptors of a worker: its poll, its waker.
const WORKER_FILES: usize = 2;

/// How long a worker rests that the system does not let work.
const RESTART_INTERVAL: Duration = Duration::from_millis(100);

/// A running proxy: its listeners are bound and its threads run. Dropping it closes everything at once.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<End>>,
    /// Goes before the API does: a file that nobody listens on may be taken over at any moment.
    control_file: Option<SocketFile>,
    control: Option<Control>,
    proxy_addr: Address,
    control_addr: Address,
}

/// Stops a [`Server`] from another thread.
#[derive(Debug, Clone)]
pub struct Stopper(Arc<Shared>);

/// How a proxy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Every connection had ended by itself.
    Drained,
    /// The grace period was over; what was left was closed.
    DeadlineHit,
    /// [`Server::abort`] closed what was left.
    Aborted,
}

impl Server {
    /// Finds what a start would refuse before it opens a socket: settings that do not fit together, and files of
    /// the rejection that cannot be used.
    pub fn check(config: &Config) -> Result<(), Error> {
        load(config).map(drop)
    }

    /// Binds every listener and starts every thread, or leaves everything as it was.
    pub fn start(config: Config) -> Result<Self, Error> {
        let reject_policy = load(&config)?;
        let threads = config.proxy.threads.map_or_else(cores, usize::from);
        let files = sys::raise_open_files();
        for &ip in &config.upstream.source_addrs {
            sys::check_source(ip.to_canonical()).map_err(|error| {
                Error::System(format!(
                    "upstream.source-addrs: cannot connect from {ip}: {error}; write addresses of this host"
                ))
            })?;
        }

        let control = listen("control.addr", &config.control.addr, 1, Some(config.control.mode))?;
        let proxy = listen("proxy.addr", &config.proxy.addr, threads, config.proxy.mode)?;
        let listeners = control.listeners.iter().chain(&proxy.listeners).flatten().count();
        let limits = Limits::new(files, threads, listeners, &config.proxy);
        if let Some(max) = config.proxy.max_connections.filter(|max| max.get() > limits.clients) {
            let there_are = if limits.clients == 1 { "there is" } else { "there are" };
            log::warn!(
                "proxy.max-connections: {max} are more than {files} open files allow; {there_are} {}: raise the limit of open files",
                counted(limits.clients, "place")
            );
        }
        let mut guard = LoopGuard::default();
        proxy.add_to(&mut guard, "proxy.addr");
        control.add_to(&mut guard, "control.addr");
        let upstream = Arc::new(Upstream::new(config.upstream, guard)?);

        let mut workers = Vec::with_capacity(threads);
        let mut seats = Vec::with_capacity(threads);
        for _worker in 0..threads {
            let poll =
                Poll::new().map_err(|error| system("cannot make an epoll instance", &error))?;
            let waker = Waker::new(poll.registry(), WAKER)
                .map_err(|error| system("cannot make an eventfd", &error))?;
            let (sender, mailbox) = bounded(MAILBOX_MAX);
            workers.push(WorkerHandle { waker, mailbox: sender, counters: Counters::default() });
            seats.push((poll, mailbox));
        }
        let workers = Arc::new(WorkerPool::new(workers.into(), proxy.listeners.len()));
        let admission = Admission::new(limits.clients, threads, &config.hold, &config.resume);
        let (pauses, notifications) = Pauses::new(
            if config.proxy.reject_clients { Mode::Reject } else { Mode::Hold },
            config.pause.max_ttl,
            Arc::clone(&admission.queue),
            Arc::clone(&upstream),
            Arc::clone(&workers),
        );
        expiry::start(&pauses, notifications)?;
        let shared = Arc::new(Shared {
            pauses,
            admission,
            upstream,
            reject_policy,
            workers,
            shutdown: Shutdown::new(config.grace_period),
            pipes_per_worker: limits.pipes / threads,
            started: Instant::now(),
        });
        let weak = Arc::downgrade(&shared);
        shared.upstream.start(move || weak.upgrade().iter().for_each(|it| it.reset_loops()))?;
        let mut server = Self {
            shared: Arc::clone(&shared),
            workers: Vec::with_capacity(threads),
            control_file: control.file,
            control: None,
            proxy_addr: proxy.address,
            control_addr: control.address,
        };
        let mut listeners = proxy.listeners.into_iter();
        let mut socket_file = proxy.file;
        for (index, (poll, mailbox)) in seats.into_iter().enumerate() {
            let listeners = listeners.next().unwrap_or_default();
            let resources = WorkerResources {
                index,
                poll,
                listeners,
                socket_file: socket_file.take(),
                is_small: false,
                mailbox,
                shared: Arc::clone(&shared),
            };
            server.workers.push(start_worker(resources)?);
        }
        let policy = HostPolicy::new(&config.control);
        let listeners = control.listeners.into_iter().flatten().map(Into::into).collect();
        server.control = Some(Control::start(listeners, server.handle(), policy, limits.callers)?);
        server.announce(&proxy.addresses, &control.addresses, limits.clients);
        Ok(server)
    }

    /// A handle to pause, resume and observe the proxy.
    pub fn handle(&self) -> Handle {
        Handle::new(Arc::clone(&self.shared))
    }

    /// Stops the proxy from another thread, as [`Server::join`] takes this one.
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Returns the address that clients connect to, with the real port; of a name with several, the first.
    pub fn proxy_addr(&self) -> &Address {
        &self.proxy_addr
    }

    /// Returns the address of the control API, with the real port; of a name with several, the first.
    pub fn control_addr(&self) -> &Address {
        &self.control_addr
    }

    /// Begins a graceful stop and returns at once. Nobody new is accepted but who is queued already; connections have the
    /// grace period to end, and held clients are held for as long, in case of a resume.
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// Closes everything; returns at once.
    pub fn abort(&self) {
        self.shared.abort();
    }

    /// Waits until the proxy has ended. It ends by [`Server::stop`] or [`Server::abort`].
    pub fn join(mut self) -> Outcome {
        // A worker whose thread is gone has cut what it had.
        let ends: Vec<End> =
            self.workers.drain(..).map(|worker| worker.join().unwrap_or(End::Cut)).collect();
        drop(self.control_file.take());
        drop(self.control.take());
        if ends.iter().all(|&end| end == End::Drained) {
            Outcome::Drained
        } else if self.shared.phase() == Phase::Aborting {
            Outcome::Aborted
        } else {
            Outcome::DeadlineHit
        }
    }

    fn announce(&self, proxy: &[Address], control: &[Address], clients_max: usize) {
        let list = |addresses: &[Address]| {
            addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
        };
        log::info!(
            "proxy listens on {} with {}, for up to {}",
            list(proxy),
            counted(self.workers.len(), "thread"),
            counted(clients_max, "client")
        );
        log::info!("control listens on {}", list(control));
        let while_paused = match self.shared.pauses.default_mode {
            Mode::Hold => "held",
            Mode::Reject => self.shared.reject_policy.describe(),
        };
        log::info!(
            "upstream is {}; while paused, new clients are {while_paused}",
            self.shared.upstream.address()
        );
        let is_beyond_loopback = |address: &Address| match address {
            Address::Tcp { host, .. } => !host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()),
            Address::Unix(_) | Address::Abstract(_) => false,
        };
        if control.iter().any(is_beyond_loopback) {
            log::warn!(
                "control listens beyond loopback and has no login: whoever reaches it can pause the proxy"
            );
        }
        if let Address::Abstract(_) = &self.control_addr {
            log::warn!(
                "control listens on a socket without a file, which has no mode, and has no login: every user of this network namespace can pause the proxy"
            );
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.abort();
        // Whoever goes on from here, perhaps to the end of the program, finds nothing open and no socket file left.
        for worker in self.workers.drain(..) {
            worker.join().ok();
        }
    }
}

impl Stopper {
    /// As [`Server::stop`].
    pub fn stop(&self) {
        self.0.stop();
    }

    /// As [`Server::abort`].
    pub fn abort(&self) {
        self.0.abort();
    }
}

/// What the limit of open files and the settings allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    clients: usize,
    pipes: usize,
    callers: usize,
}

impl Limits {
    /// A client takes two descriptors, its own and its upstream's, also while it is held: it must be possible to serve it.
    fn new(files: u64, threads: usize, listeners: usize, settings: &config::ProxyConfig) -> Self {
        let files = usize::try_from(files).unwrap_or(usize::MAX);
        let fixed = FIXED_FILES + WORKER_FILES * threads + listeners;
        // A caller takes one.
        let callers = (files / 4).saturating_sub(fixed).clamp(CALLERS_MIN, CALLERS_MAX);
        // However many workers there are, none goes without where descriptors allow it.
        let share = (files / 16).min(PIPES_MAX.max(threads));
        let pipes = settings.pipes.map_or(share, |pipes| pipes * threads);
        let allowed = files.saturating_sub(fixed + callers + 2 * pipes) / 2;
        let wanted = settings.max_connections.map_or(usize::MAX, usize::from);
        Self { clients: allowed.min(wanted).max(1), pipes, callers }
    }
}

/// Checks the configuration; returns what the files of the rejection hold.
fn load(config: &Config) -> Result<RejectPolicy, Error> {
    config.validate()?;
    RejectPolicy::load(&config.proxy)
}

/// The sockets that listen by one setting.
struct Listening {
    /// For each thread that serves them, one at each address.
    listeners: Vec<Vec<Listener>>,
    file: Option<SocketFile>,
    /// The first of the addresses.
    address: Address,
    addresses: Vec<Address>,
}

impl Listening {
    fn tcp(found: &[SocketAddr], threads: usize) -> io::Result<Self> {
        let mut listeners: Vec<Vec<_>> = (0..threads).map(|_thread| Vec::new()).collect();
        let mut addresses = Vec::new();
        for at_address in listen_at_all(found, threads)? {
            if let Some(listener) = at_address.first() {
                let local = listener.local_inet()?;
                addresses.push(Address::tcp(local.ip().to_string(), local.port()));
            }
            for (of_thread, listener) in listeners.iter_mut().zip(at_address) {
                of_thread.push(listener);
            }
        }
        let address = addresses.first().cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(Self { listeners, file: None, address, addresses })
    }

    fn unix(listener: Listener, file: Option<SocketFile>, address: &Address) -> Self {
        let (address, addresses) = (address.clone(), vec![address.clone()]);
        Self { listeners: vec![vec![listener]], file, address, addresses }
    }
}

impl Listening {
    /// Adds each address that it listens on.
    fn add_to(&self, guard: &mut LoopGuard, setting: &'static str) {
        let file = self.file.as_ref().map(SocketFile::identity);
        match &self.address {
            Address::Unix(path) => guard.add(setting, SocketAddress::Unix(path.clone()), file),
            Address::Abstract(name) => {
                guard.add(setting, SocketAddress::Abstract(name.clone()), None);
            }
            Address::Tcp { .. } => {
                for address in self.listeners.iter().flatten().filter_map(|it| it.local_inet().ok())
                {
                    guard.add(setting, SocketAddress::Inet(address), None);
                }
            }
        }
    }
}

fn listen(
    setting: &str,
    address: &Address,
    count: usize,
    mode: Option<u32>,
) -> Result<Listening, Error> {
    let refuse = |error: io::Error| {
        let remedy = remedy(address, error.kind());
        Error::System(format!("{setting}: cannot listen on {address}: {error}; {remedy}"))
    };
    match address {
        Address::Unix(path) => {
            let (listener, file) = Listener::unix(path, mode).map_err(refuse)?;
            Ok(Listening::unix(listener, Some(file), address))
        }
        Address::Abstract(name) => {
            let listener = Listener::abstract_unix(name).map_err(refuse)?;
            Ok(Listening::unix(listener, None, address))
        }
        Address::Tcp { host, port } => {
            let found = look_up(host, *port).map_err(|error| {
                Error::System(format!(
                    "{setting}: cannot look up {host}: {error}; use a name or IP of this host"
                ))
            })?;
            Listening::tcp(&found, count).map_err(refuse)
        }
    }
}

/// Returns what can be done about an address that cannot be listened on.
fn remedy(address: &Address, error: io::ErrorKind) -> &'static str {
    use io::ErrorKind::{
        AddrInUse, AddrNotAvailable, AlreadyExists, NotFound, PermissionDenied, ResourceBusy,
    };
    match (address, error) {
        (Address::Tcp { .. }, AddrInUse) => {
            "something listens there already, or a connection has that port (`ss -tan` shows it); stop it or choose another address"
        }
        (Address::Tcp { .. }, PermissionDenied) => "ports below 1024 need privileges",
        (Address::Tcp { .. }, AddrNotAvailable) => "this host has no such address",
        (Address::Tcp { .. }, _) => "choose another address",
        (Address::Unix(_), AddrInUse) => {
            "something listens there already (`ss -xl` shows it); stop it or choose another path"
        }
        (Address::Unix(_), PermissionDenied) => {
            "let this user write to its directory, or choose another path"
        }
        (Address::Unix(_), NotFound) => "its directory does not exist",
        (Address::Unix(_), AlreadyExists) => "remove it or choose another path",
        (Address::Unix(_), ResourceBusy) => "wait until it is done or choose another directory",
        (Address::Unix(_), _) => "choose another path",
        (Address::Abstract(_), AddrInUse) => {
            "something listens there already (`ss -xl` shows it); stop it or choose another name"
        }
        (Address::Abstract(_), _) => "choose another name",
    }
}

/// Returns a number with what it counts: `1 client`, `2 clients`.
fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Finds the addresses to listen on, IPv4 before IPv6, as in the original. An empty host is one address, by which clients of
/// both come where the system knows IPv6.
fn look_up(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if host.is_empty() {
        let v6: IpAddr = Ipv6Addr::UNSPECIFIED.into();
        let knows_v6 = sys::check_source(v6).is_ok();
        let ip = if knows_v6 { v6 } else { Ipv4Addr::UNSPECIFIED.into() };
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let mut found = Vec::new();
    for address in address::look_up(host, port)? {
        if !found.contains(&address) {
            found.push(address);
        }
    }
    found.sort_by_key(SocketAddr::is_ipv6);
    Ok(found)
}

/// A worker and its supervisor: a panic costs the connections of that worker and no others. The listener stays, and with
/// it the clients that are queued there.
fn start_worker(mut resources: WorkerResources) -> Result<JoinHandle<End>, Error> {
    let name = format!("worker-{}", resources.index);
    let supervise = move || {
        loop {
            // The resources hold nothing that a panic could leave half-changed: sockets, and what is made for sharing.
            match catch_unwind(AssertUnwindSafe(|| resources.work())) {
                Ok(Ok(end)) => {
                    resources.shared.pauses.barrier.leave(resources.index);
                    return end;
                }
                Ok(Err(error)) => {
                    log::error!("worker {} cannot poll and starts anew: {error}", resources.index);
                    thread::park_timeout(RESTART_INTERVAL);
                }
                Err(_panic) => {
                    resources.shared.workers.counters(resources.index).panics.add(1);
                    log::error!(
                        "worker {} has panicked and starts anew: a defect of tcpause",
                        resources.index
                    );
                }
            }
            // What the last one had learnt and not yet done is lost: slots that are free, clients sent over, a pause.
            resources.shared.workers.wake_all();
        }
    };
    thread::Builder::new()
        .name(name)
        .spawn(supervise)
        .map_err(|error| system("cannot start a thread", &error))
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn system(what: &str, error: &io::Error) -> Error {
    Error::System(format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    #[test]
    fn descriptors_are_kept_for_the_control_api() {
        for (files, threads, max, clients, pipes, callers) in [
            (1_000_000, 2, 0, 499_887, 32, 128),
            (20_000, 2, 0, 9_887, 32, 128),
            (20_000, 2, 5, 5, 32, 128),
            (1_024, 2, 0, 399, 32, 128),
            (1_024, 2, 5_000, 399, 32, 128),
            (20_000, 64, 0, 9_762, 64, 128),
            (64, 2, 0, 10, 4, 2),
            (1, 2, 0, 1, 0, 2),
        ] {
            let max_connections = NonZeroUsize::new(max);
            assert_eq!(
                Limits::new(
                    files,
                    threads,
                    threads + 1,
                    &config::ProxyConfig { max_connections, ..Default::default() }
                ),
                Limits { clients, pipes, callers },
                "{files}"
            );
        }
    }
}

//! `Server`: binds everything, starts every thread, and ends them all.

mod heartbeat;
mod limits;
mod listen;
mod sockets;
mod supervisor;

use std::{
    io, iter,
    net::IpAddr,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Instant,
};

use crossbeam_channel::{Receiver, bounded};
use mio::{Poll, Waker};
use nix::unistd::Group;

pub use self::{heartbeat::Heartbeat, sockets::Sockets};
use self::{
    limits::{Limits, counted},
    listen::{Listeners, Listening, listen},
    supervisor::start_worker,
};
use crate::{
    admission::Admission,
    config::{Config, ControlConfig, GroupName, address::Address},
    connection::reject::policy::RejectPolicy,
    control::{Control, HostPolicy, Scope},
    error::Error,
    handle::Handle,
    pause::{Pauses, expiry, gate::Mode},
    shared::{Phase, Shared, Shutdown},
    stats::Counters,
    sys::{
        self, Listener,
        socket_file::{Access, SocketFile},
    },
    upstream::{Upstream, loop_guard::LoopGuard},
    worker::{End, WAKER, WorkerResources},
    worker_pool::{Mail, WorkerHandle, WorkerPool},
};

/// Most clients on their way from the accepting worker to another one.
const MAILBOX_MAX: usize = 1024;

/// A running proxy: its listeners are bound and its threads run. Dropping it closes everything at once.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<End>>,
    /// Socket files of the API. They are dropped before its listeners, as another process may take over a file without one.
    control_files: Vec<SocketFile>,
    control: Option<Control>,
    proxy_addr: Address,
    control_addr: Address,
    monitor_addr: Option<Address>,
}

/// Handle to stop a [`Server`] from another thread.
#[derive(Debug, Clone)]
pub struct Stopper(Arc<Shared>);

/// End of a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Every connection had ended by itself.
    Drained,
    /// The grace period was over; the remaining connections were closed.
    DeadlineHit,
    /// [`Server::abort`] closed the remaining connections.
    Aborted,
}

impl Server {
    /// Checks the configuration as a start does, without opening a socket: settings that contradict each other and unusable
    /// files of the rejection are errors.
    pub fn check(config: &Config) -> Result<(), Error> {
        load(config).map(drop)
    }

    /// Binds every listener and starts every thread, or leaves everything as it was.
    pub fn start(config: Config) -> Result<Self, Error> {
        Self::start_on(Sockets::default(), config)
    }

    /// Starts like [`Server::start`], but listens on these sockets in place of the addresses of the configuration.
    pub fn start_on(sockets: Sockets, mut config: Config) -> Result<Self, Error> {
        sockets.set_addresses(&mut config);
        let (reject_policy, control_access) = load(&config)?;
        let files = sys::raise_open_files();
        check_sources(&config.upstream.source_addrs)?;
        let threads = threads(&config);
        sockets.announce();
        let access = |mode| Access { mode, group: None };
        let Sockets { proxy, control, monitor } = sockets;
        let control = control
            .map_or_else(|| listen("control.addr", &config.control.addr, 1, control_access), Ok)?;
        let monitor = match (monitor, &config.monitor.addr) {
            (None, Some(addr)) => {
                Some(listen("monitor.addr", addr, 1, access(Some(config.monitor.mode)))?)
            }
            (passed, _) => passed,
        };
        let listen_there =
            || listen("proxy.addr", &config.proxy.addr, threads, access(config.proxy.mode));
        let proxy = proxy.map_or_else(listen_there, Ok)?;
        Self::serve(config, reject_policy, files, Listeners { proxy, control, monitor })
    }

    /// Starts every thread behind these listeners.
    fn serve(
        config: Config,
        reject_policy: RejectPolicy,
        files: u64,
        listeners: Listeners,
    ) -> Result<Self, Error> {
        let threads = threads(&config);
        let limits = Limits::new(files, threads, listeners.count(), &config.proxy);
        limits.warn(files, &config.proxy);
        let mut guard = LoopGuard::default();
        listeners.add_to(&mut guard);
        let Listeners { proxy, control, monitor } = listeners;
        let upstream = Arc::new(Upstream::new(config.upstream, guard)?);
        let (workers, ends) = make_workers(threads)?;
        let workers = Arc::new(WorkerPool::new(workers, proxy.listeners.len()));
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
            log: config.log,
            started: Instant::now(),
            listeners: proxy.addresses.as_slice().into(),
            control_addr: control.address.clone(),
            config_file: config.file,
        });
        let weak = Arc::downgrade(&shared);
        shared.upstream.start(move || weak.upgrade().iter().for_each(|it| it.reset_loops()))?;
        let mut server = Self {
            shared,
            workers: Vec::with_capacity(threads),
            control_files: Vec::new(),
            control: None,
            proxy_addr: proxy.address,
            control_addr: control.address.clone(),
            monitor_addr: monitor.as_ref().map(|it| it.address.clone()),
        };
        server.start_workers(ends, proxy.listeners, proxy.file)?;
        let control_addresses = control.addresses.clone();
        let monitor_addresses = monitor.as_ref().map(|it| it.addresses.clone());
        let listened_at = [&config.control.addr].into_iter().chain(&config.monitor.addr);
        let hosts = HostPolicy::new(listened_at, &config.control.hosts);
        server.start_control(control, monitor, hosts, limits.callers)?;
        server.announce(&proxy.addresses, &control_addresses, limits.clients);
        if let Some(addresses) = monitor_addresses {
            log::info!("monitor listens on {}", list(&addresses));
        }
        Ok(server)
    }

    /// Starts the thread of each worker with its listeners, if it has any. The first worker owns the socket file.
    fn start_workers(
        &mut self,
        ends: Vec<WorkerEnd>,
        listeners: Vec<Vec<Listener>>,
        mut socket_file: Option<SocketFile>,
    ) -> Result<(), Error> {
        let mut listeners = listeners.into_iter();
        for (index, (poll, mailbox)) in ends.into_iter().enumerate() {
            let resources = WorkerResources {
                index,
                poll,
                listeners: listeners.next().unwrap_or_default(),
                socket_file: socket_file.take(),
                is_small: false,
                mailbox,
                shared: Arc::clone(&self.shared),
            };
            self.workers.push(start_worker(resources)?);
        }
        Ok(())
    }

    /// Starts the API on the sockets of both of its listeners.
    fn start_control(
        &mut self,
        control: Listening,
        monitor: Option<Listening>,
        hosts: HostPolicy,
        callers_max: usize,
    ) -> Result<(), Error> {
        let mut sockets = Vec::new();
        let monitor = monitor.map(|listening| (listening, Scope::ReadOnly));
        for (listening, scope) in iter::once((control, Scope::Full)).chain(monitor) {
            self.control_files.extend(listening.file);
            let listeners = listening.listeners.into_iter().flatten();
            sockets.extend(listeners.map(|listener| (listener.into(), scope)));
        }
        self.control = Some(Control::start(sockets, self.handle(), hosts, callers_max)?);
        Ok(())
    }

    /// Returns a handle to pause, resume and observe the proxy.
    pub fn handle(&self) -> Handle {
        Handle::new(Arc::clone(&self.shared))
    }

    /// Returns the means to stop the proxy from another thread, while this one is in [`Server::join`].
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Returns the proof that the threads of the proxy go on, for a watchdog.
    pub fn heartbeat(&self) -> Heartbeat {
        Heartbeat::new(&self.shared, self.control.as_ref().map(Control::notifier))
    }

    /// Returns the address that clients connect to, with the real port; the first one, if the name has several.
    pub fn proxy_addr(&self) -> &Address {
        &self.proxy_addr
    }

    /// Returns the address of the control API, with the real port; the first one, if the name has several.
    pub fn control_addr(&self) -> &Address {
        &self.control_addr
    }

    /// Returns the address of the monitor, with the real port; the first one, if the name has several.
    pub fn monitor_addr(&self) -> Option<&Address> {
        self.monitor_addr.as_ref()
    }

    /// Begins a graceful stop and returns at once. Only clients that are queued already are accepted; connections have the
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
        // A worker whose thread is gone has cut its connections.
        let ends: Vec<End> =
            self.workers.drain(..).map(|worker| worker.join().unwrap_or(End::Cut)).collect();
        self.control_files.clear();
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
        // From here on nothing is open and no socket file is left, even if the program ends at once.
        for worker in self.workers.drain(..) {
            worker.join().ok();
        }
    }
}

impl Stopper {
    /// Stops as [`Server::stop`] does.
    pub fn stop(&self) {
        self.0.stop();
    }

    /// Aborts as [`Server::abort`] does.
    pub fn abort(&self) {
        self.0.abort();
    }
}

/// Lists addresses for the log.
fn list(addresses: &[Address]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
}

/// Checks the configuration, loads the files of the rejection, and looks the group of the control socket up.
fn load(config: &Config) -> Result<(RejectPolicy, Access), Error> {
    config.validate()?;
    Ok((RejectPolicy::load(&config.proxy)?, control_access(&config.control)?))
}

/// Returns the rights to the socket file of the API.
fn control_access(control: &ControlConfig) -> Result<Access, Error> {
    let Some(GroupName(name)) = &control.group else {
        return Ok(Access { mode: Some(control.mode), group: None });
    };
    let group = match Group::from_name(name) {
        Ok(Some(group)) => group.gid.as_raw(),
        Ok(None) => {
            return Err(Error::Config(format!(
                "control.group: there is no group {name:?}; write one of /etc/group, or make it with groupadd"
            )));
        }
        Err(error) => {
            return Err(Error::System(format!(
                "control.group: cannot look up the group {name:?}: {error}"
            )));
        }
    };
    // The default would keep the group out.
    let mode = if control.mode == ControlConfig::default().mode { 0o660 } else { control.mode };
    Ok(Access { mode: Some(mode), group: Some(group) })
}

/// Checks that this host can connect from each of `upstream.source-addrs`.
fn check_sources(sources: &[IpAddr]) -> Result<(), Error> {
    for &ip in sources {
        sys::check_source(ip.to_canonical()).map_err(|error| {
            Error::System(format!(
                "upstream.source-addrs: cannot connect from {ip}: {error}; write addresses of this host"
            ))
        })?;
    }
    Ok(())
}

/// Poll and mailbox of a worker, whose other ends are in its [`WorkerHandle`].
type WorkerEnd = (Poll, Receiver<Mail>);

/// Makes the handle of each worker, and the ends for the worker itself.
fn make_workers(threads: usize) -> Result<(Box<[WorkerHandle]>, Vec<WorkerEnd>), Error> {
    let mut handles = Vec::with_capacity(threads);
    let mut ends = Vec::with_capacity(threads);
    for _worker in 0..threads {
        let poll = Poll::new().map_err(|error| system("cannot make an epoll instance", &error))?;
        let waker = Waker::new(poll.registry(), WAKER)
            .map_err(|error| system("cannot make an eventfd", &error))?;
        let (sender, mailbox) = bounded(MAILBOX_MAX);
        handles.push(WorkerHandle { waker, mailbox: sender, counters: Counters::default() });
        ends.push((poll, mailbox));
    }
    Ok((handles.into(), ends))
}

/// Returns the number of workers: the setting, or the number of cores.
fn threads(config: &Config) -> usize {
    let cores = || thread::available_parallelism().map_or(1, usize::from);
    config.proxy.threads.map_or_else(cores, usize::from)
}

fn system(what: &str, error: &io::Error) -> Error {
    Error::System(format!("{what}: {error}"))
}

#[cfg(test)]
mod tests;

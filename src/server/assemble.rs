//! Assembling of a server: from a checked configuration by way of its sockets to threads that run, or that wait for the word
//! to go on where another process stopped.

use std::{
    io, iter,
    mem::ManuallyDrop,
    net::IpAddr,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, bounded};
use mio::{Poll, Waker};
use nix::unistd::Group;

use super::{
    Server, Sockets,
    announce::ListenedAt,
    limits::Limits,
    listen::{Listeners, Listening, listen},
    supervisor::start_worker,
    take::Rebuilding,
};
use crate::{
    admission::Admission,
    config::{Config, ControlConfig, GroupName, Steer},
    connection::reject::policy::RejectPolicy,
    control::{Control, ControlWords, HostPolicy, Scope},
    error::Error,
    fleet::{FleetThreads, Membership},
    fleet_view::FleetView,
    handover::{freeze::Freeze, parcel::Incoming, request::UpgradeRequests, upgrades::Upgrades},
    pause::{Pauses, expiry, gate::Mode},
    proxy_header::ProxyHeaders,
    shared::{Shared, Shutdown, SocketFiles},
    stats::Counters,
    steering::{self, Starter},
    sys::{self, Listener, SocketAddress, socket_file::Access},
    upstream::{self, Upstream, loop_guard::LoopGuard},
    worker::{WAKER, WorkerResources},
    worker_pool::{Mail, WorkerHandle, WorkerPool},
};

/// Most clients on their way from the accepting worker to another one.
const MAILBOX_MAX: usize = 1024;

/// Longest wait of a taker for the upstream's addresses; then those go on that are known.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(2);

/// Checked configuration, and what it was checked by. No socket is open yet.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) config: Config,
    reject_policy: RejectPolicy,
    /// Membership of a fleet, if there is one.
    membership: Option<Membership>,
    pub(super) control_access: Access,
    /// Limit of open files.
    pub(super) files: u64,
    /// Number of workers.
    pub(super) threads: usize,
    /// Addresses of the upstream, if its name was looked up already.
    found: Option<Box<[SocketAddress]>>,
    /// Addresses as they are written in the configuration; none for sockets that were passed.
    pub(super) written: Written,
    /// True if the giver's listener of the monitor is the one that this configuration wants.
    pub(super) keeps_monitor: bool,
}

/// Addresses of a configuration that a successor must have too.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Written {
    pub(super) proxy: Option<String>,
    pub(super) control: Option<String>,
    pub(super) monitor: Option<String>,
}

impl Plan {
    /// Checks a configuration, loads its files, and raises the limit of open files.
    pub(super) fn new(config: Config) -> Result<Self, Error> {
        let (reject_policy, control_access, membership) = load(&config)?;
        let files = sys::raise_open_files();
        check_sources(&config.upstream.source_addrs)?;
        let threads = threads(&config);
        let written = Written {
            proxy: Some(config.proxy.addr.to_string()),
            control: Some(config.control.addr.to_string()),
            monitor: config.monitor.addr.as_ref().map(ToString::to_string),
        };
        Ok(Self {
            config,
            reject_policy,
            membership,
            control_access,
            files,
            threads,
            found: None,
            written,
            keeps_monitor: false,
        })
    }

    /// Looks the upstream's name up. A failure, or a look-up that takes long, is left to the thread that does so all the time.
    pub(super) fn look_up_upstream(&mut self) {
        let (found, wait) = bounded(1);
        let address = self.config.upstream.addr.clone();
        let look_up = move || drop(found.send(upstream::look_up(&address)));
        let _look_up = thread::Builder::new().name("look-up".into()).spawn(look_up);
        self.found = wait.recv_timeout(LOOK_UP_TIMEOUT).ok().and_then(Result::ok);
    }

    /// Binds every listener, but for those that were passed.
    pub(super) fn listen(&mut self, sockets: Sockets) -> Result<Listeners, Error> {
        sockets.announce();
        let Sockets { proxy, control, monitor } = sockets;
        if proxy.is_some() {
            self.written.proxy = None;
        }
        if control.is_some() {
            self.written.control = None;
        }
        if monitor.is_some() {
            self.written.monitor = None;
        }
        let config = &self.config;
        let listen_for_control =
            || listen("control.addr", &config.control.addr, 1, self.control_access, false);
        let control = control.map_or_else(listen_for_control, Ok)?;
        let monitor = match monitor {
            None => self.listen_for_monitor()?,
            passed => passed,
        };
        let access = Access { mode: config.proxy.mode, group: None };
        let may_catch = config.upstream.steer != Steer::Off;
        let listen_there =
            || listen("proxy.addr", &config.proxy.addr, self.threads, access, may_catch);
        let proxy = proxy.map_or_else(listen_there, Ok)?;
        Ok(Listeners { proxy, control, monitor })
    }

    /// Binds the listener of the monitor, if there is to be one.
    pub(super) fn listen_for_monitor(&self) -> Result<Option<Listening>, Error> {
        let monitor = &self.config.monitor;
        let access = Access { mode: Some(monitor.mode), group: None };
        monitor.addr.as_ref().map(|addr| listen("monitor.addr", addr, 1, access, false)).transpose()
    }

    /// Starts every thread behind these listeners. With a state that is to be rebuilt, they rebuild it and stand still. Returns the
    /// server, and what it can [announce](Server::announce).
    pub(super) fn assemble(
        mut self,
        mut listeners: Listeners,
        mut rebuilding: Option<Rebuilding>,
    ) -> Result<(Server, ListenedAt), Error> {
        let is_taker = rebuilding.is_some();
        let limits = Limits::new(self.files, self.threads, listeners.count(), &self.config.proxy);
        limits.warn(self.files, &self.config.proxy);
        self.config.fleet.warnings().iter().for_each(|warning| log::warn!("{warning}"));
        let written = self.written.clone();
        // Where sockets were passed, the settings have no effect, and the sockets' own hosts are IP addresses.
        let named = [
            written.control.is_some().then_some(&self.config.control.addr),
            self.config.monitor.addr.as_ref().filter(|_addr| written.monitor.is_some()),
        ];
        let hosts = HostPolicy::new(named.into_iter().flatten(), &self.config.control.hosts);
        let membership = self.membership.take();
        let steering = Starter::new(
            &self.config,
            &listeners.proxy.caught,
            rebuilding.as_mut().and_then(Rebuilding::take_marks),
            listeners.proxy.listeners.iter().flatten(),
        );
        let (shared, ends) = self.share(&mut listeners, limits, rebuilding.as_ref())?;
        let Listeners { proxy, control, monitor } = listeners;
        let mut server = Server {
            shared,
            workers: Vec::with_capacity(ends.len()),
            control: None,
            proxy_addr: proxy.address,
            control_addr: control.address.clone(),
            monitor_addr: monitor.as_ref().map(|it| it.address.clone()),
            fleet: None,
            steering,
            written,
        };
        if let Some(membership) = &membership {
            membership.hold_clients(&server.handle(), is_taker);
        }
        let listened_at = ListenedAt {
            control: control.addresses.clone(),
            monitor: monitor.as_ref().map(|it| it.addresses.clone()),
        };
        let started = server.start_workers(ends, proxy.listeners, rebuilding.as_mut());
        let started = started.and_then(|()| {
            if !is_taker || server.steering.as_ref().is_some_and(Starter::is_needed) {
                server.start_steering()?;
            }
            server.fleet = membership.map(|it| it.start(server.handle())).transpose()?;
            let callers = rebuilding.map(Rebuilding::into_control);
            server.start_control((control, monitor), hosts, limits.callers, callers)
        });
        if let Err(error) = started {
            if is_taker {
                server.leave_as_it_is();
            }
            return Err(error);
        }
        if !is_taker {
            server.fleet.iter().for_each(FleetThreads::begin);
        }
        Ok((server, listened_at))
    }

    /// Makes what all threads share, and starts those that look names up and end pauses. Returns it with the workers' ends.
    fn share(
        self,
        listeners: &mut Listeners,
        limits: Limits,
        rebuilding: Option<&Rebuilding>,
    ) -> Result<(Arc<Shared>, Vec<WorkerEnd>), Error> {
        let Self { config, reject_policy, threads, found, .. } = self;
        let mut guard = LoopGuard::default();
        listeners.add_to(&mut guard);
        let started = rebuilding.map_or_else(Instant::now, Rebuilding::started);
        let proxy_headers =
            ProxyHeaders::new(&config.proxy.accept_proxy_from, config.upstream.send_proxy);
        let upstream = Arc::new(Upstream::new(config.upstream, guard, started)?);
        if let Some(found) = found {
            upstream.publish(found);
        }
        // A taker goes on with what is present.
        if rebuilding.is_none() {
            upstream.recall()?;
        }
        let (workers, ends) = make_workers(threads)?;
        let workers = Arc::new(WorkerPool::new(workers, listeners.proxy.listeners.len()));
        let admission =
            Admission::new(limits.clients, threads, &config.hold, &config.resume, started);
        let (pauses, notifications) = Pauses::new(
            if config.proxy.reject_clients { Mode::Reject } else { Mode::Hold },
            config.hold.half_closed,
            config.pause.max_ttl,
            Arc::clone(&admission.queue),
            Arc::clone(&upstream),
            Arc::clone(&workers),
        );
        let stands_still = rebuilding.is_some();
        let shared = Arc::new(Shared {
            pauses,
            admission,
            upstream,
            reject_policy,
            proxy_headers,
            workers,
            shutdown: Shutdown::new(config.grace_period),
            freeze: if stands_still { Freeze::from_start(threads) } else { Freeze::new(threads) },
            pipes_per_worker: limits.pipes / threads,
            log: config.log,
            started,
            listeners: listeners.proxy.addresses.as_slice().into(),
            socket_files: SocketFiles {
                proxy: Mutex::new(listeners.proxy.file.take()),
                ..SocketFiles::default()
            },
            control_addr: listeners.control.address.clone(),
            config_file: config.file,
            upgrade_requests: UpgradeRequests::default(),
            upgrades: Upgrades::default(),
            fleet: FleetView::default(),
        });
        // Before any connection is built, and before any thread could change a pause.
        if let Some(rebuilding) = rebuilding {
            rebuilding.restore(&shared);
        }
        expiry::start(&shared.pauses, notifications)?;
        let weak = Arc::downgrade(&shared);
        shared.upstream.start(move || weak.upgrade().iter().for_each(|it| it.reset_loops()))?;
        Ok((shared, ends))
    }
}

impl Server {
    /// Drops nothing of a taker that fails: its threads stand still for ever, and what they have is the giver's. Only a socket
    /// file of its own goes.
    pub(super) fn leave_as_it_is(self) {
        self.shared.socket_files.remove_of_control();
        let _server = ManuallyDrop::new(self);
    }

    /// Starts the thread of each worker with its listeners, if it has any, and with the connections that it is to rebuild.
    fn start_workers(
        &mut self,
        ends: Vec<WorkerEnd>,
        listeners: Vec<Vec<Listener>>,
        mut rebuilding: Option<&mut Rebuilding>,
    ) -> Result<(), Error> {
        let (workers, mut listeners) = (ends.len(), listeners.into_iter());
        for (index, (poll, mailbox)) in ends.into_iter().enumerate() {
            let is_small = rebuilding.as_ref().is_some_and(|it| it.is_small());
            let inherited = rebuilding.as_mut().map(|it| it.take_worker(index, workers));
            let resources = WorkerResources {
                index,
                poll,
                listeners: listeners.next().unwrap_or_default(),
                is_small,
                mailbox,
                inherited: inherited.unwrap_or_default(),
                shared: Arc::clone(&self.shared),
            };
            self.workers.push(start_worker(resources)?);
        }
        Ok(())
    }

    /// Starts the API on the sockets of both of its listeners.
    fn start_control(
        &mut self,
        (control, monitor): (Listening, Option<Listening>),
        hosts: HostPolicy,
        callers_max: usize,
        inherited: Option<(ControlWords, Incoming)>,
    ) -> Result<(), Error> {
        let mut sockets = Vec::new();
        let monitor = monitor.map(|listening| (listening, Scope::ReadOnly));
        for (listening, scope) in iter::once((control, Scope::Full)).chain(monitor) {
            listening.file.into_iter().for_each(|it| self.shared.socket_files.add_of_control(it));
            let listeners = listening.listeners.into_iter().flatten();
            sockets.extend(listeners.map(|listener| (listener.into(), scope)));
        }
        let fleet = self.fleet.as_ref().map(FleetThreads::fleet);
        self.control =
            Some(Control::start(sockets, self.handle(), fleet, hosts, callers_max, inherited)?);
        Ok(())
    }

    /// Lets the steering begin, if there is to be one.
    pub(super) fn start_steering(&mut self) -> Result<(), Error> {
        let starter = self.steering.take();
        starter.map_or(Ok(()), |starter| starter.start(&self.shared))
    }

    /// Makes listeners for workers that have none, as a TCP port may have one for each.
    pub(super) fn listen_on_all_workers(&self) {
        let shared = &self.shared;
        for worker in shared.workers.listening()..shared.workers.len() {
            for address in shared.joinable() {
                match Listener::join(address) {
                    Ok(listener) => {
                        shared.pauses.steer().into_iter().for_each(|it| it.mark(listener.lend()));
                        shared.workers.listen(worker, listener);
                    }
                    Err(error) => log::warn!(
                        "proxy.addr: no listener at {address} for a further thread, which gets no clients there: {error}"
                    ),
                }
            }
        }
    }
}

/// Checks the configuration, loads the files of the rejection, and looks the group of the control socket up.
pub(super) fn load(config: &Config) -> Result<(RejectPolicy, Access, Option<Membership>), Error> {
    config.validate()?;
    let reject_policy = RejectPolicy::load(&config.proxy)?;
    steering::check(config)?;
    Ok((reject_policy, control_access(&config.control)?, Membership::new(config)?))
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
                "control.group: there is no group {name:?}; write the name of one in /etc/group, or make it with groupadd"
            )));
        }
        Err(error) => {
            return Err(Error::System(format!(
                "control.group: cannot look up the group {name:?}: {error}"
            )));
        }
    };
    Ok(Access { mode: Some(control.effective_mode()), group: Some(group) })
}

/// Checks that this process may give its socket file the group.
pub(super) fn check_group(access: Access) -> Result<(), Error> {
    let Some(group) = access.group else { return Ok(()) };
    let groups = nix::unistd::getgroups().unwrap_or_default();
    let is_member = nix::unistd::getegid().as_raw() == group
        || groups.into_iter().any(|it| it.as_raw() == group);
    if is_member || may_give_files() {
        return Ok(());
    }
    Err(Error::System(
        "control.group: this user is no member of the group; run tcpause as a member (SupplementaryGroups= in its unit) or as root"
            .to_owned(),
    ))
}

/// Returns true if this process may give files to any group (`CAP_CHOWN`).
fn may_give_files() -> bool {
    rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::CHOWN))
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

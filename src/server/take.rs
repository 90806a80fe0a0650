//! The taker: prepares itself, receives everything from the giver, and goes on where that one stopped.
//!
//! Until it has said `Taken`, it reads, writes, dials, accepts and closes nothing that it has received.

use std::{
    io,
    os::unix::net::UnixStream,
    panic::{self, PanicHookInfo},
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    Server,
    announce::ListenedAt,
    assemble::Plan,
    listen::{Listeners, Listening, address_of},
    messages::{Begin, FORMAT, FORMATS, GiverHello, Message, READ_PROXY_HEADERS, TakerHello},
    predecessor::{Predecessor, record_upgrade},
    rest::{FilesWords, RestWords},
};
use crate::{
    config::{Config, address::Address},
    control::{ControlListenersWords, ControlWords, Scope},
    error::Error,
    fleet,
    handover::{
        channel::{Channel, ChannelError},
        fault,
        parcel::{Incoming, Misfit, Outgoing},
    },
    shared::Shared,
    steering,
    sys::{
        self, Descriptor, Listener,
        socket_file::{Access, SocketFile},
    },
    worker::handover::{BatchWords, Inherited, ListenersWords},
};

/// Longest wait for the demands of the giver.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the giver to stand still: longer than all of its own limits together.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for each of its messages from then on.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Descriptors that the taker needs beside those that it receives, until the giver has ended.
const SPARE_DESCRIPTORS: u64 = 32;
/// Descriptors that this process itself has beside those that it received, when it counts them for the way back.
const WAY_BACK_DESCRIPTORS: u64 = 8;

/// Everything that was received and is to be rebuilt.
#[derive(Debug)]
pub(super) struct Rebuilding {
    rest: RestWords,
    rest_parcel: Incoming,
    listeners: Vec<(ListenersWords, Incoming)>,
    connections: Vec<(BatchWords, Incoming)>,
    control_listeners: (ControlListenersWords, Incoming),
    control: (ControlWords, Incoming),
    stall: Stall,
}

/// Standstill so far: its length when the giver began to describe itself, and the moment at which this arrived.
#[derive(Debug, Clone, Copy)]
struct Stall(Duration, Instant);

/// Work for the time when this process goes on. None of it can stop it any more.
struct Later {
    giver: u32,
    /// Set if the giver takes everything back.
    is_halfway: bool,
    stall: Stall,
    files: FilesWords,
    proxy_access: Access,
    control_access: Access,
    monitor_access: Access,
}

impl Later {
    /// Adopts the socket files, with the rights that the configuration gives. Those that nobody listens at any more go.
    fn adopt_files(&self, server: &Server) {
        let Self { files, proxy_access, control_access, monitor_access, .. } = self;
        let set = |file: &SocketFile, access: &Access| {
            if let Err(error) = file.set_access(*access) {
                let path = file.path().display();
                log::warn!("{path} keeps its rights, as they cannot be changed: {error}");
            }
        };
        let is_at = |file: &SocketFile, address: &Address| match address {
            Address::Unix(path) => path == file.path(),
            Address::Tcp { .. } | Address::Abstract(_) => false,
        };
        let (proxy, control) = files.adopt();
        if let Some(file) = &proxy {
            set(file, proxy_access);
        }
        server.shared.socket_files.add_of_proxy(proxy);
        for file in control {
            if is_at(&file, &server.control_addr) {
                set(&file, control_access);
            } else if server.monitor_addr.as_ref().is_some_and(|address| is_at(&file, address)) {
                set(&file, monitor_access);
            } else {
                continue;
            }
            server.shared.socket_files.add_of_control(file);
        }
        if !self.is_halfway {
            server.warn_of_lost_files();
        }
    }
}

impl Stall {
    fn elapsed(self) -> Duration {
        self.0 + sys::now().saturating_duration_since(self.1)
    }
}

impl Rebuilding {
    /// Returns the start of the first process.
    pub(super) fn started(&self) -> Instant {
        self.rest.started(&self.rest_parcel)
    }

    /// Restores what a process has once.
    pub(super) fn restore(&self, shared: &Shared) {
        self.rest.restore(shared, &self.rest_parcel);
        shared.upgrade_requests.expect_program();
    }

    /// Takes the giver's map of marks, if it has steered.
    pub(super) fn take_marks(&mut self) -> Option<Descriptor> {
        self.rest.steering.as_ref().and_then(|_| self.rest_parcel.descriptor().ok())
    }

    /// Takes the connections of the worker `index` of so many.
    pub(super) fn take_worker(&mut self, index: usize, workers: usize) -> Inherited {
        self.connections
            .extract_if(.., |(batch, _parcel)| batch.worker % workers == index)
            .collect()
    }

    /// Returns true if clients to come get a small receive buffer.
    pub(super) fn is_small(&self) -> bool {
        self.listeners.iter().any(|(words, _parcel)| words.is_small)
    }

    /// Returns the callers of the control API.
    pub(super) fn into_control(self) -> (ControlWords, Incoming) {
        self.control
    }

    /// Takes the proxy's listeners, and deals those of each address out to so many workers, as the kernel deals clients out to
    /// the listeners. Workers that get none get one once this process goes on.
    fn take_listeners(&mut self, workers: usize) -> Result<Listening, Misfit> {
        let misfit = |error: io::Error| Misfit::new(format!("proxy.addr: {error}"));
        let mut by_address: Vec<(Address, Vec<Listener>)> = Vec::new();
        for (words, mut parcel) in std::mem::take(&mut self.listeners) {
            for listener in &words.listeners {
                let listener = Listener::adopt(parcel.descriptor()?, *listener);
                let address = address_of(&listener).map_err(misfit)?;
                match by_address.iter_mut().find(|(known, _)| *known == address) {
                    Some((_, listeners)) => listeners.push(listener),
                    None => by_address.push((address, vec![listener])),
                }
            }
            parcel.finish()?;
        }
        let mut taken: Vec<Vec<Listener>> = (0..workers).map(|_| Vec::new()).collect();
        for (_, listeners) in by_address {
            for (index, listener) in listeners.into_iter().enumerate() {
                if let Some(of_worker) = taken.get_mut(index % workers) {
                    of_worker.push(listener);
                }
            }
        }
        taken.retain(|listeners| !listeners.is_empty());
        if taken.len() < workers {
            // Nobody notices it before one joins.
            taken.iter().flatten().for_each(Listener::let_others_join);
        }
        Listening::adopted(taken).map_err(misfit)
    }

    /// Takes the listeners of the control API and of the monitor.
    fn take_control_listeners(&mut self) -> Result<(Listening, Option<Listening>), Misfit> {
        let (words, parcel) = &mut self.control_listeners;
        let (mut control, mut monitor) = (None::<Listening>, None::<Listening>);
        for scope in &words.scopes {
            let place = match scope {
                Scope::Full => &mut control,
                Scope::ReadOnly => &mut monitor,
            };
            let listener = Listener::inherit(parcel.descriptor()?);
            let added = listener.and_then(|listener| match place {
                Some(listening) => listening.inherit(listener),
                None => Listening::inherited(listener).map(|listening| *place = Some(listening)),
            });
            added.map_err(|error| Misfit::new(format!("control.addr: {error}")))?;
        }
        Ok((control.ok_or_else(|| Misfit::new("there is no control.addr"))?, monitor))
    }
}

/// Tells the giver at the other end of `channel` that this process cannot take over, for the reason `why`.
pub fn refuse(channel: UnixStream, why: &str) {
    let mut channel = Channel::new(channel);
    channel.set_deadline(Instant::now() + HELLO_TIMEOUT);
    let refusal = Message::Refuse { why: why.to_owned() };
    // A giver that does not listen any more has noticed the end itself.
    channel.send(&refusal, Outgoing::new(sys::now())).ok();
}

impl Server {
    /// Takes everything over from the process at the other end of `channel`, with this configuration. Returns once this
    /// process has gone on in its place; right before that it sets `goes_on`, and from then on it must not end for a signal. The
    /// other process is to be [seen off](super::Giver::see_off). On an error that one knows the reason and goes on, and this
    /// one has to end without running destructors.
    pub fn take_over(
        channel: UnixStream,
        config: Config,
        goes_on: &AtomicBool,
    ) -> Result<(Self, Predecessor), Error> {
        let mut channel = Channel::new(channel);
        let result = receive_all(&mut channel, config, goes_on);
        if let Err(error) = &result {
            channel.set_deadline(Instant::now() + MESSAGE_TIMEOUT);
            let refusal = Message::Refuse { why: error.to_string() };
            channel.send(&refusal, Outgoing::new(sys::now())).ok();
        }
        let (server, giver, (stall, connections)) = result?;
        let GiverHello { pid, takes_back, .. } = giver;
        Ok((server, Predecessor { channel, pid, takes_back, stall, connections }))
    }
}

/// Does all of it. Returns the server, the process that has handed it over, the time for which nothing has moved, and the
/// number of clients.
fn receive_all(
    channel: &mut Channel,
    config: Config,
    goes_on: &AtomicBool,
) -> Result<(Server, GiverHello, (Duration, u64)), Error> {
    channel.set_deadline(Instant::now() + HELLO_TIMEOUT);
    let mut plan = Plan::new(config)?;
    plan.look_up_upstream();
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let hello = Message::TakerHello(TakerHello {
        formats: FORMATS.to_vec(),
        version,
        pid: Some(process::id()),
        can_take_back: true,
    });
    send(channel, &hello)?;
    let Message::GiverHello(giver) = receive(channel, HELLO_TIMEOUT)? else {
        return Err(unexpected());
    };
    check(&giver, &mut plan)?;
    send(channel, &Message::Warm)?;
    let Message::Begin(begin) = receive(channel, BEGIN_TIMEOUT)? else { return Err(unexpected()) };
    let rebuilding = receive_description(channel, &begin)?;
    let hook = exit_at_panic();
    let later = Later {
        giver: giver.pid,
        is_halfway: giver.takes_back,
        stall: rebuilding.stall,
        files: rebuilding.rest.files.clone(),
        proxy_access: Access { mode: plan.config.proxy.mode, group: None },
        control_access: plan.control_access,
        monitor_access: Access { mode: Some(plan.config.monitor.mode), group: None },
    };
    let (mut server, listened_at) = plan.rebuild(rebuilding)?;
    let rebuilt = server.shared.freeze.await_rebuilt(Instant::now() + MESSAGE_TIMEOUT);
    let word = rebuilt.map_err(Error::System).and_then(|()| await_word(channel, goes_on));
    if let Err(error) = word {
        server.leave_as_it_is();
        return Err(error);
    }
    panic::set_hook(Box::new(move |info| hook(info)));
    let moved = server.go_on(&later, &listened_at);
    Ok((server, giver, moved))
}

/// Hook for panics, which several places may call.
type PanicHook = Arc<dyn Fn(&PanicHookInfo<'_>) + Send + Sync>;

/// Has a panic of any thread end this process: unwinding would reset connections, which the giver may still have. Returns the
/// hook that was there, which still comes first.
fn exit_at_panic() -> PanicHook {
    let hook: PanicHook = Arc::from(panic::take_hook());
    let first = Arc::clone(&hook);
    panic::set_hook(Box::new(move |info| {
        first(info);
        // Only tiny_http starts threads by a function that panics. It has no connection, and is replaced.
        if !info.to_string().contains("failed to spawn thread") {
            process::exit(1);
        }
    }));
    hook
}

/// Says that all is rebuilt, and waits for the word to go on.
fn await_word(channel: &mut Channel, goes_on: &AtomicBool) -> Result<(), Error> {
    // A giver that goes on may have closed its end. What it has said before is there all the same.
    let said = match say(channel, &Message::Ready) {
        Err(ChannelError::Ended) => Ok(()),
        said => said,
    };
    let word = said
        .and_then(|()| channel.receive(sys::now(), Instant::now() + MESSAGE_TIMEOUT))
        .and_then(|(word, _)| match word {
            Message::Go => {
                goes_on.store(true, Ordering::SeqCst);
                say(channel, &Message::Taken).map(|()| true)
            }
            _ => Ok(false),
        });
    match word {
        // A giver that has ended without a word has died, and nobody else has its connections.
        Ok(true) | Err(ChannelError::Ended) => Ok(()),
        Ok(false) => Err(unexpected()),
        Err(error) => Err(told(error)),
    }
}

impl Plan {
    /// Starts every thread with what was received. They stand still.
    fn rebuild(mut self, mut rebuilding: Rebuilding) -> Result<(Server, ListenedAt), Error> {
        let misfit = |misfit: Misfit| Error::System(misfit.to_string());
        let proxy = rebuilding.take_listeners(self.threads).map_err(misfit)?;
        let (control, monitor) = rebuilding.take_control_listeners().map_err(misfit)?;
        let Config {
            proxy: proxy_config, control: control_config, monitor: monitor_config, ..
        } = &self.config;
        let named = |listening: Listening, written: &Option<String>, address: &Address| {
            if written.is_some() { listening.named(address) } else { listening }
        };
        let proxy = named(proxy, &self.written.proxy, &proxy_config.addr);
        fleet::check_taker(&self.config, rebuilding.rest.fleet.as_ref())?;
        let steered = rebuilding.rest.steering.as_ref().map_or(0, |it| it.active);
        steering::check_taker(&self.config, steered, !proxy.caught.is_empty())?;
        let control = named(control, &self.written.control, &control_config.addr);
        let monitor = match (monitor, &monitor_config.addr) {
            (Some(monitor), Some(address)) if self.keeps_monitor => {
                Some(named(monitor, &self.written.monitor, address))
            }
            (Some(monitor), None) if self.keeps_monitor => Some(monitor),
            _ => {
                self.written.monitor = monitor_config.addr.as_ref().map(ToString::to_string);
                self.listen_for_monitor()?
            }
        };
        self.assemble(Listeners { proxy, control, monitor }, Some(rebuilding))
    }

    /// Checks that the addresses are those of the giver. Sockets that were passed to it have none in a configuration.
    fn match_addresses(&mut self, giver: &GiverHello) -> Result<(), Error> {
        let own = &mut self.written;
        self.keeps_monitor = giver.monitor_addr.is_none() || giver.monitor_addr == own.monitor;
        if giver.monitor_addr.is_none() {
            own.monitor = None;
        }
        for (name, theirs, own) in [
            ("proxy.addr", &giver.proxy_addr, &mut own.proxy),
            ("control.addr", &giver.control_addr, &mut own.control),
        ] {
            match theirs {
                Some(theirs) if own.as_ref() != Some(theirs) => {
                    return Err(Error::Config(format!(
                        "{name} is {} in the new configuration and {theirs} in the running one: it cannot change in an upgrade; write {theirs}, or stop and start",
                        own.as_deref().unwrap_or_default()
                    )));
                }
                Some(_) => {}
                None => *own = None,
            }
        }
        Ok(())
    }
}

/// Checks that this process can be what the giver demands.
fn check(giver: &GiverHello, plan: &mut Plan) -> Result<(), Error> {
    if giver.format != FORMAT {
        let text = format!("format {} of a hand-over is not known here", giver.format);
        return Err(Error::System(text));
    }
    if let Some(need) = giver.needs.iter().find(|&need| need != READ_PROXY_HEADERS) {
        return Err(Error::System(format!("this program cannot {need}, which is needed")));
    }
    plan.match_addresses(giver)?;
    let way_back = if giver.takes_back { WAY_BACK_DESCRIPTORS } else { 0 };
    let needed = giver.descriptors + SPARE_DESCRIPTORS + way_back;
    if plan.files < needed {
        return Err(Error::System(format!(
            "the new program may open {} files and needs {needed}; raise the limit of open files (ulimit -n, LimitNOFILE)",
            plan.files
        )));
    }
    Ok(())
}

fn receive_description(channel: &mut Channel, begin: &Begin) -> Result<Rebuilding, Error> {
    let arrived = sys::now();
    let deadline = arrived + MESSAGE_TIMEOUT;
    let (mut listeners, mut connections) = (Vec::new(), Vec::new());
    let (mut rest, mut control, mut control_listeners) = (None, None, None);
    let mut count = 0;
    loop {
        channel.set_deadline(deadline);
        let (message, parcel) = channel.receive(arrived, deadline).map_err(told)?;
        match message {
            Message::Listeners(words) => listeners.push((words, parcel)),
            Message::Connections(words) => connections.push((words, parcel)),
            Message::ControlListeners(words) => control_listeners = Some((words, parcel)),
            Message::Control(words) => control = Some((words, parcel)),
            Message::Rest(words) => rest = Some((*words, parcel)),
            Message::End(end) if end.messages == count => break,
            _ => return Err(unexpected()),
        }
        count += 1;
    }
    let (Some((rest, rest_parcel)), Some(control), Some(control_listeners)) =
        (rest, control, control_listeners)
    else {
        return Err(unexpected());
    };
    let stall = Stall(Duration::from_nanos(begin.frozen_nanos), arrived);
    Ok(Rebuilding { rest, rest_parcel, listeners, connections, control_listeners, control, stall })
}

impl Server {
    /// Lets all threads go on. What may fail comes behind that, and is logged. Returns the time for which nothing has moved, and the
    /// number of clients.
    fn go_on(&mut self, later: &Later, listened_at: &ListenedAt) -> (Duration, u64) {
        // What the giver has steered counts before anybody is told of an idle proxy.
        self.start_steering().unwrap_or_else(|error| log::error!("{error}"));
        let shared = &self.shared;
        shared.pauses.go_on();
        // As the giver has counted them, before any ends or joins.
        let connections = shared.clients();
        shared.freeze.thaw();
        shared.workers.wake_all();
        let stall = later.stall.elapsed();
        if !later.is_halfway {
            record_upgrade(shared, stall, connections);
            log::info!(
                event = "upgraded", connections = connections, stall_seconds = stall.as_secs_f64();
                "took over from process {}: connections {connections}, nothing moved for {:.1} ms",
                later.giver,
                stall.as_secs_f64() * 1e3
            );
            self.announce(listened_at);
        }
        later.adopt_files(self);
        shared.upstream.remember_present();
        match &self.fleet {
            Some(fleet) => fleet.begin(),
            None => fleet::abandon(&self.handle()),
        }
        // The manager's sockets are its own.
        if self.written.proxy.is_some() {
            self.listen_on_all_workers();
        }
        (stall, connections)
    }
}

fn send(channel: &mut Channel, message: &Message) -> Result<(), Error> {
    say(channel, message).map_err(told)
}

fn say(channel: &mut Channel, message: &Message) -> Result<(), ChannelError> {
    fault::happen("taker", message.word());
    channel.send(message, Outgoing::new(sys::now()))
}

/// Receives a message without descriptors.
fn receive(channel: &mut Channel, timeout: Duration) -> Result<Message, Error> {
    let received = channel.receive(sys::now(), Instant::now() + timeout);
    received.map(|(message, _parcel)| message).map_err(told)
}

#[expect(clippy::needless_pass_by_value, reason = "map_err passes it so")]
fn told(error: ChannelError) -> Error {
    Error::System(format!("the hand-over has failed: {error}"))
}

fn unexpected() -> Error {
    Error::System("the old program says something unexpected, or goes on itself".into())
}

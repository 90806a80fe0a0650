//! Steering: while nothing is paused, new connections lead straight to the server's own listener, and no byte of them passes
//! tcpause.
//!
//! `bpf` has the programs in the kernel, `count` tells the connections that were steered, and the thread raises and lowers
//! the steering. A pause stops it by way of [`Steer`].

#[cfg_attr(not(feature = "steering"), path = "no_bpf.rs")]
mod bpf;
mod count;
#[cfg_attr(not(feature = "steering"), allow(dead_code, reason = "nothing is searched"))]
mod found;
mod thread;

use std::{
    fmt, io,
    net::SocketAddr,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::{Sender, bounded};

use self::{bpf::Bpf, count::Counter, found::Unavailable, thread::SteeringThread};
use crate::{
    config::{self, Config},
    error::Error,
    log_limit::LogLimit,
    pause::steer::{Steer, SteeringStatus},
    shared::Shared,
    sys::{
        Listener,
        tcp_table::{self, Row},
    },
};

/// Reason of a proxy that is paused, which the log does not repeat.
const PAUSED: &str = "it is paused";

/// Steering of one proxy.
struct Steering {
    /// Addresses of the proxy, which have one port.
    own: Vec<SocketAddr>,
    /// True if the listeners of the proxy are at another port.
    catches: bool,
    /// Programs in the kernel, once they are loaded.
    bpf: OnceLock<Bpf>,
    /// Map of marks of the process before, whose connections bear its marks.
    inherited: Option<OwnedFd>,
    /// Listeners that are to be marked as soon as the programs are loaded; none from then on.
    unmarked: Mutex<Option<Vec<OwnedFd>>>,
    state: Mutex<State>,
    counting: Mutex<Counting>,
    /// Number of passes that the thread holds.
    passes: AtomicU64,
    /// Set while somebody waits for an idle proxy though nothing is paused.
    is_awaited: AtomicBool,
    failures: LogLimit,
    /// Set from a stop, and from the start, until the steered connections are counted behind it.
    is_unsettled: AtomicBool,
    /// Set while the end of a dial is news: the server may listen again, or no more.
    heeds_dials: AtomicBool,
    has_dialled: AtomicBool,
    wake: Sender<()>,
}

#[derive(Debug)]
struct State {
    standing: Standing,
    is_suspended: bool,
    /// Time since the start of the host from which on nobody is steered.
    fence: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    Steering,
    /// All connections are relayed, for this reason.
    Relaying(String),
    /// None will ever be steered, for this reason.
    Unavailable(String),
}

/// Count of the steered connections, and the time at which it was made.
#[derive(Debug)]
struct Counting {
    counter: Counter,
    active: u64,
    next_look: Instant,
}

/// Look at the table of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// While connections are steered.
    Open,
    /// First one behind a stop.
    First,
    Later,
}

/// Refuses a start with `on` where nothing can be steered.
pub(crate) fn check(config: &Config) -> Result<(), Error> {
    if config.upstream.steer != config::Steer::On {
        return Ok(());
    }
    Bpf::load(&[], None).map(drop).map_err(|Unavailable { why }| {
        Error::System(format!("upstream.steer: on, but connections cannot be steered: {why}"))
    })
}

/// Refuses an upgrade that ends the steering while `steered` connections are there, or while clients come by it alone.
pub(crate) fn check_taker(config: &Config, steered: u64, catches: bool) -> Result<(), Error> {
    let ends = config.upstream.steer == config::Steer::Off || config.steering_conflict().is_some();
    if ends && (steered > 0 || catches) {
        return Err(Error::Config(format!(
            "upstream.steer: an upgrade cannot end the steering while steered connections are there ({steered}), as nobody would count them; pause with a wait first, or write auto"
        )));
    }
    Ok(())
}

/// Means to begin the steering of a proxy whose threads run.
#[derive(Debug)]
pub(crate) struct Starter {
    conflict: Option<String>,
    listeners: Vec<OwnedFd>,
    inherited: Option<OwnedFd>,
    own: Vec<SocketAddr>,
    /// True if the listeners are not bound to `own`, so that clients come by the steering alone.
    catches: bool,
}

impl Starter {
    /// Keeps what is needed of these listeners, which are to get the clients of the addresses `caught`, if there are any, in
    /// place of their own. `inherited` is the map of marks of the process before. Returns none if nothing is to be steered.
    pub(crate) fn new<'a>(
        config: &Config,
        caught: &[SocketAddr],
        inherited: Option<OwnedFd>,
        listeners: impl Iterator<Item = &'a Listener>,
    ) -> Option<Self> {
        if config.upstream.steer == config::Steer::Off {
            return None;
        }
        let conflict = config.steering_conflict().map(|(key, why)| format!("{key} is set: {why}"));
        let catches = !caught.is_empty();
        let (kept, own) = (Vec::new(), caught.into());
        let mut starter = Self { conflict, listeners: kept, inherited, own, catches };
        for listener in listeners {
            let Ok(address) = listener.local_inet() else { continue };
            if !catches && !starter.own.contains(&address) {
                starter.own.push(address);
            }
            starter.listeners.extend(listener.lend().try_clone_to_owned());
        }
        if starter.own.iter().any(|it| Some(it.port()) != starter.own.first().map(SocketAddr::port))
        {
            let why = "the sockets that were passed have several ports, and steering takes one";
            starter.conflict.get_or_insert(why.to_owned());
        }
        Some(starter)
    }

    /// Returns true if no client comes without the steering.
    pub(crate) fn is_needed(&self) -> bool {
        self.catches
    }

    /// Lets the thread begin. What an earlier process has steered counts from now on.
    pub(crate) fn start(self, shared: &Arc<Shared>) -> Result<(), Error> {
        let Self { conflict, listeners, inherited, own, catches } = self;
        let (wake, wakes) = bounded(1);
        let standing = match conflict {
            Some(why) => Standing::Unavailable(why),
            None => Standing::Relaying("it begins".to_owned()),
        };
        let steering = Arc::new(Steering {
            bpf: OnceLock::new(),
            inherited,
            passes: AtomicU64::new(0),
            is_awaited: AtomicBool::new(false),
            failures: LogLimit::default(),
            unmarked: Mutex::new(Some(listeners)),
            state: Mutex::new(State {
                standing: standing.clone(),
                is_suspended: false,
                fence: shared.pauses.gate.fence(),
            }),
            counting: Mutex::new(Counting {
                counter: Counter::new(own.iter().map(SocketAddr::ip)),
                active: 0,
                next_look: Instant::now(),
            }),
            is_unsettled: AtomicBool::new(true),
            heeds_dials: AtomicBool::new(false),
            has_dialled: AtomicBool::new(false),
            wake,
            own,
            catches,
        });
        shared.pauses.steer_by(Box::new(Way(Arc::clone(&steering))));
        if catches && let Err(Unavailable { why }) = steering.load() {
            return Err(Error::System(format!(
                "proxy.addr: steered connections of the server have the port, and clients cannot be led past them: {why}; or wait until they have ended"
            )));
        }
        if let Standing::Unavailable(why) = standing {
            log::warn!("upstream.steer: connections are relayed: {why}");
            return Ok(());
        }
        let (pauses, dials) = (Arc::clone(&steering), Arc::clone(&steering));
        shared.pauses.watch(move || pauses.wake());
        shared.upstream.watch_dials(move || dials.tell_dial());
        SteeringThread::new(steering, Arc::clone(shared), wakes)
            .start()
            .map_err(|error| Error::no_thread("steers connections", &error))
    }
}

impl Steering {
    fn wake(&self) {
        // If the channel is full, a notification waits already.
        self.wake.try_send(()).ok();
    }

    /// Tells of the end of a dial, if that is news.
    fn tell_dial(&self) {
        if self.heeds_dials.load(Ordering::Relaxed)
            && self.heeds_dials.swap(false, Ordering::AcqRel)
        {
            self.has_dialled.store(true, Ordering::Release);
            self.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_counting(&self) -> MutexGuard<'_, Counting> {
        self.counting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and tells the kernel how long to steer. Returns true if that has stopped the steering.
    fn change(&self, change: impl FnOnce(&mut State)) -> bool {
        let mut state = self.lock();
        let was_steering = state.standing == Standing::Steering;
        change(&mut state);
        let is_steering = state.standing == Standing::Steering;
        if let Some(bpf) = self.bpf.get().filter(|_| was_steering || is_steering) {
            let fence = state.fence.map(|at| u64::try_from(at.as_nanos()).unwrap_or(u64::MAX));
            let until = if is_steering { fence.unwrap_or(u64::MAX) } else { 0 };
            if let Err(error) = bpf.steer_until(until) {
                log::error!("a defect: the kernel keeps the steering of connections: {error}");
            }
        }
        // Under the lock, as the thread looks at both.
        if was_steering && !is_steering {
            self.is_unsettled.store(true, Ordering::Release);
        }
        was_steering && !is_steering
    }

    /// Relays from now on, for this reason, unless it never steers.
    fn relay(&self, why: &str) -> bool {
        let stopped = self.change(|state| {
            if !matches!(state.standing, Standing::Unavailable(_)) {
                state.standing = Standing::Relaying(why.to_owned());
            }
        });
        if stopped {
            self.wake();
        }
        stopped
    }

    fn is_steering(&self) -> bool {
        self.lock().standing == Standing::Steering
    }

    /// Loads and attaches the programs, unless that was done, and marks all listeners.
    fn load(&self) -> Result<(), Unavailable> {
        if self.bpf.get().is_some() {
            return Ok(());
        }
        let marks = self.inherited.as_ref().map(OwnedFd::try_clone).transpose();
        let marks = marks.map_err(|error| Unavailable { why: error.to_string() })?;
        let mut bpf = Bpf::load(&self.own, marks)?;
        let mut unmarked = self.unmarked.lock().unwrap_or_else(PoisonError::into_inner);
        for listener in unmarked.take().into_iter().flatten() {
            let catch = || if self.catches { bpf.catch(listener.as_fd()) } else { Ok(()) };
            let known = bpf.mark(listener.as_fd()).and_then(|()| catch());
            known.map_err(|error| Unavailable {
                why: format!("the kernel does not take a listener: {error}"),
            })?;
        }
        bpf.attach()?;
        // The programs are loaded once.
        self.bpf.set(bpf).ok();
        Ok(())
    }

    /// Lists what is connected to the port of the proxy.
    fn table(&self, bpf: &Bpf) -> io::Result<Vec<Row>> {
        let port = self.own.first().map_or(0, SocketAddr::port);
        tcp_table::dump(port, Some(bpf.marks()))
    }

    /// Looks at the table of connections. Returns the number of the steered ones; none if it is too early for another look,
    /// or the kernel does not answer.
    fn count(&self, look: Look) -> Option<u64> {
        let mut counting = self.lock_counting();
        let began = Instant::now();
        // The first look behind a stop is the one that no earlier look may stand for.
        let is_due = look == Look::First || began >= counting.next_look;
        let bpf = self.bpf.get().filter(|_| is_due)?;
        let rows = self.table(bpf);
        counting.next_look = Instant::now() + count::rest_after(began.elapsed());
        match rows {
            Ok(rows) => {
                let counter = &mut counting.counter;
                let given_up =
                    if look == Look::Later { counter.given_up(&rows) } else { Vec::new() };
                if look == Look::First {
                    counter.begin_anew();
                }
                let active = match look {
                    Look::Open | Look::First => counter.count_all(&rows),
                    Look::Later => counter.count_known(&rows),
                };
                counting.active = active;
                drop(counting);
                self.destroy(given_up);
                Some(active)
            }
            Err(error) => {
                if let Some(more) = self.failures.allow(Instant::now()) {
                    log::warn!("cannot count the steered connections{more}: {error}");
                }
                None
            }
        }
    }

    fn destroy(&self, rows: impl IntoIterator<Item = Row>) {
        for row in rows {
            if let Err(error) = tcp_table::destroy(&row)
                && let Some(more) = self.failures.allow(Instant::now())
            {
                log::error!("cannot reset a steered connection{more}: {error}");
            }
        }
    }
}

/// Steering, as the pauses know it.
#[derive(Debug)]
struct Way(Arc<Steering>);

impl Steer for Way {
    fn stop(&self) {
        self.0.relay(PAUSED);
    }

    fn settle(&self) {
        // The thread clears this only behind a wait of its own.
        if self.0.bpf.get().is_some()
            && self.0.is_unsettled.load(Ordering::Acquire)
            && let Err(Unavailable { why }) = Bpf::settle()
        {
            log::error!("connections that were steered a moment ago may still come: {why}");
        }
    }

    fn suspend(&self) {
        self.0.lock().is_suspended = true;
        self.0.relay("it hands over or stops");
        self.0.wake();
        self.settle();
    }

    fn go_on(&self) {
        self.0.lock().is_suspended = false;
        self.0.wake();
    }

    fn fence_at(&self, deadline: Option<Duration>) {
        self.0.change(|state| state.fence = deadline);
    }

    fn mark(&self, listener: BorrowedFd<'_>) {
        let mut unmarked = self.0.unmarked.lock().unwrap_or_else(PoisonError::into_inner);
        let marked = match (&mut *unmarked, self.0.bpf.get()) {
            (Some(unmarked), _) => listener.try_clone_to_owned().map(|it| unmarked.push(it)),
            (None, Some(bpf)) => bpf.mark(listener),
            (None, None) => Ok(()),
        };
        if let Err(error) = marked {
            log::warn!("relayed clients of a further listener count as steered: {error}");
        }
    }

    fn reset(&self) {
        let Some(bpf) = self.0.bpf.get() else { return };
        let rows = match self.0.table(bpf) {
            Ok(rows) => rows,
            Err(error) => return log::error!("cannot reset the steered connections: {error}"),
        };
        let steered: Vec<Row> = self.0.lock_counting().counter.steered(rows).collect();
        self.0.destroy(steered);
    }

    fn await_idle(&self, passes: u64) -> bool {
        let is_alone = passes == self.0.passes.load(Ordering::Acquire) && self.0.is_steering();
        if is_alone && self.0.count(Look::Open) == Some(0) {
            return true;
        }
        self.0.is_awaited.store(true, Ordering::Release);
        self.0.wake();
        false
    }

    fn marks(&self) -> Option<BorrowedFd<'_>> {
        self.0.bpf.get().map(Bpf::marks).or(self.0.inherited.as_ref().map(OwnedFd::as_fd))
    }

    fn status(&self) -> SteeringStatus {
        let standing = self.0.lock().standing.clone();
        let is_steering = standing == Standing::Steering;
        // Before the count: one of before a stop must not look like idle.
        let is_unsettled = self.0.is_unsettled.load(Ordering::Acquire);
        let counted = if is_steering { self.0.count(Look::Open) } else { None };
        let active = counted.unwrap_or_else(|| self.0.lock_counting().active);
        let (state, why, active) = match standing {
            Standing::Steering => ("steering", None, active),
            Standing::Relaying(why) => ("relaying", Some(why), active.max(is_unsettled.into())),
            Standing::Unavailable(why) => ("unavailable", Some(why), active),
        };
        let total = self.0.bpf.get().map_or(0, Bpf::assigned);
        SteeringStatus { state: state.to_owned(), why, active, total }
    }
}

impl fmt::Debug for Steering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steering").field("state", &self.state).finish_non_exhaustive()
    }
}

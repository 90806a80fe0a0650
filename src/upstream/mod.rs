//! The upstream: its addresses, looked up on a thread of their own because workers must never block, and its state.

pub(crate) mod addresses;
pub(crate) mod breaker;
pub(crate) mod dialer;
pub(crate) mod loop_guard;
mod names;
pub(crate) mod state_file;
mod switch;
pub(crate) mod targets;
pub(crate) mod words;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicI32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::Sender;

use crate::{
    config::{self, address::Address},
    error::Error,
    log_limit::LogLimit,
    sys::{SocketAddress, is_port_shortage},
};
use addresses::Addresses;
use addresses::Route;
use breaker::CircuitBreaker;
use dialer::DialWatcher;
use loop_guard::{LoopGuard, Own};
pub(crate) use names::look_up;
use names::{Request, is_name};
use state_file::StateFile;
use targets::{Target, Targets};

/// Number for a dial that was given up after its time.
const TIMED_OUT: i32 = -1;
/// Number for an attempt that had no address to dial.
const NO_ADDRESS: i32 = -2;

/// The upstream as all workers see it: its addresses, its state, and the limits of its log lines.
#[derive(Debug)]
pub(crate) struct Upstream {
    configured: Address,
    connect_timeout: Duration,
    retry_for: Duration,
    breaker: CircuitBreaker,
    /// Error number of the last failed attempt; [`TIMED_OUT`] or [`NO_ADDRESS`] where the system gave none.
    last_error: AtomicI32,
    /// Look-ups of the name that have succeeded, and that have failed.
    pub(crate) look_ups: [AtomicU64; 2],
    sources: Sources,
    /// Limit of log lines about clients that wait for another attempt.
    delays: LogLimit,
    /// Limit of log lines about clients that are given up.
    losses: LogLimit,
    /// Limit of log lines about a move to another address.
    moves: LogLimit,
    present: Mutex<Present>,
    /// Number of changes of `present`: while it stays the same, no worker takes the lock.
    changes: AtomicU64,
    /// The present upstream, and those of connections that have begun before a switch.
    targets: Targets,
    /// Switches that were done, and that were refused.
    pub(crate) switches: [AtomicU64; 2],
    /// File that remembers a switch, if there is one.
    state_file: Option<StateFile>,
    /// Lock of a switch, with its write to the state file.
    switching: Mutex<()>,
    guard: LoopGuard,
    dials: DialWatcher,
    /// Sender to the look-up thread; empty before [`Upstream::start`].
    look_up: OnceLock<Sender<Request>>,
}

/// The upstream that new connections lead to, with its addresses.
#[derive(Debug, Clone)]
pub(crate) struct Present {
    pub(crate) target: Arc<Target>,
    pub(crate) addresses: Arc<Addresses>,
}

/// A worker's copy of the present upstream, with the number of its change; none before its first look.
#[derive(Debug, Default)]
pub(crate) struct Cached(Option<(u64, Present)>);

/// Source addresses, used in turn. `None` leaves the choice to the system.
#[derive(Debug)]
struct Sources {
    v4: Box<[Option<IpAddr>]>,
    v6: Box<[Option<IpAddr>]>,
}

/// Plan for a client whose attempt has failed, for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RetryPlan {
    /// The dial is tried again.
    TriedAgain,
    /// The client's time is up.
    GivenUp,
}

impl Upstream {
    /// Returns an upstream of a proxy that started at `begin`. A name has no addresses yet, as nothing is looked up before
    /// [`Upstream::start`].
    pub(crate) fn new(
        settings: config::UpstreamConfig,
        guard: LoopGuard,
        begin: Instant,
    ) -> Result<Self, Error> {
        let address = settings.addr;
        let targets = Targets::default();
        let target = targets.add_beyond(address.clone());
        let known = if is_name(&address) { Ok([].into()) } else { look_up(&address) };
        let known: Box<[SocketAddress]> = known.unwrap_or_default();
        if let Some(own) = known.iter().find_map(|known| guard.find(known)) {
            return Err(Error::Config(format!(
                "upstream.addr: {address} leads back to {own}; write where the server behind the proxy listens"
            )));
        }
        target.is_at(&known);
        Ok(Self {
            configured: address,
            connect_timeout: settings.connect_timeout,
            retry_for: settings.retry_for,
            breaker: CircuitBreaker::new(begin, target.probe()),
            last_error: AtomicI32::new(NO_ADDRESS),
            look_ups: Default::default(),
            sources: Sources::new(&settings.source_addrs),
            delays: LogLimit::default(),
            losses: LogLimit::default(),
            moves: LogLimit::default(),
            present: Mutex::new(Present { target, addresses: Arc::new(Addresses::new(known)) }),
            changes: AtomicU64::new(0),
            targets,
            switches: Default::default(),
            state_file: settings.state_file.map(StateFile::new),
            switching: Mutex::new(()),
            guard,
            dials: DialWatcher::default(),
            look_up: OnceLock::new(),
        })
    }

    /// Registers the callback for each successful dial and each failed attempt. It runs on a worker, and must not wait. There is one.
    pub(crate) fn watch_dials(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.dials.0.get_or_init(|| Box::new(watcher));
    }

    /// Returns the address as configured.
    pub(crate) fn configured(&self) -> &Address {
        &self.configured
    }

    /// Returns the longest time that an attempt may take for all addresses.
    pub(crate) fn connect_timeout(&self) -> Duration {
        self.connect_timeout
    }

    /// Returns the longest time that a client waits for an upstream that is away.
    pub(crate) fn patience(&self) -> Duration {
        self.retry_for.max(self.connect_timeout)
    }

    /// Returns the circuit breaker, which is open while the upstream is away.
    pub(crate) fn breaker(&self) -> &CircuitBreaker {
        &self.breaker
    }

    /// Returns the source addresses for `address`, to be used in turn. It is empty if source addresses are configured
    /// but none of its family.
    pub(crate) fn sources(&self, address: &SocketAddress) -> &[Option<IpAddr>] {
        match address {
            SocketAddress::Inet(SocketAddr::V4(_)) => &self.sources.v4,
            SocketAddress::Inet(SocketAddr::V6(_)) => &self.sources.v6,
            SocketAddress::Unix(_) | SocketAddress::Abstract(_) => &[None],
        }
    }

    /// Remembers the error of a failed attempt for the status.
    pub(crate) fn remember_error(&self, error: &io::Error) {
        let timed_out = error.kind() == io::ErrorKind::TimedOut;
        let special = if timed_out { TIMED_OUT } else { NO_ADDRESS };
        self.last_error.store(error.raw_os_error().unwrap_or(special), Ordering::Relaxed);
        self.dials.tell();
    }

    /// Returns the error of the last failed attempt.
    pub(crate) fn last_error(&self) -> io::Error {
        match self.last_error.load(Ordering::Relaxed) {
            TIMED_OUT => io::ErrorKind::TimedOut.into(),
            NO_ADDRESS => io::Error::other(self.known().lack()),
            number => io::Error::from_raw_os_error(number),
        }
    }

    /// Returns the error of the last failed attempt in words; none while the upstream is not known to be away.
    pub(crate) fn error(&self) -> Option<String> {
        self.breaker.away_since()?;
        let text = self.last_error().to_string();
        // The number tells an operator nothing.
        Some(text.split(" (os error").next().unwrap_or_default().to_owned())
    }

    /// Returns the addresses that are known now.
    pub(crate) fn known(&self) -> Arc<Addresses> {
        Arc::clone(&self.lock().addresses)
    }

    /// Logs the end of an outage, once. `waiting` clients have waited for it.
    pub(crate) fn log_return(&self, waiting: u64) {
        if let Some(outage) = self.breaker.take_last_outage() {
            let (target, seconds) = (self.target(), outage.as_secs_f64());
            let address = target.address();
            log::info!(
                event = "upstream-back", seconds = (seconds * 1e3).round() / 1e3, waiting = waiting;
                "upstream {address} is back after {seconds:.1} s; clients that waited: {waiting}"
            );
        }
    }

    /// Logs a failed dial, at most one line a second for each `plan`.
    pub(crate) fn log_failure(&self, error: &io::Error, plan: RetryPlan, now: Instant) {
        let (limit, outcome) = match plan {
            RetryPlan::TriedAgain => (&self.delays, "trying again"),
            RetryPlan::GivenUp => (&self.losses, "a client is reset"),
        };
        let Some(more) = limit.allow(now) else { return };
        let target = self.target();
        let address = target.address();
        if is_port_shortage(error) {
            log::warn!(
                "no local port is free to reach the upstream {address}{more}; {outcome}; add addresses to upstream.source-addrs"
            );
        } else {
            log::warn!("cannot reach the upstream {address}{more}: {error}; {outcome}");
        }
    }

    /// Updates `cached` and returns its content. Takes the lock only after a change.
    pub(crate) fn present<'a>(&self, cached: &'a mut Cached) -> &'a Present {
        let changes = self.changes.load(Ordering::Acquire);
        if cached.0.as_ref().is_some_and(|&(seen, _)| seen != changes) {
            cached.0 = None;
        }
        &cached.0.get_or_insert_with(|| (changes, self.lock().clone())).1
    }

    /// Updates `cached` and returns the addresses in it.
    pub(crate) fn read<'a>(&self, cached: &'a mut Cached) -> &'a Arc<Addresses> {
        &self.present(cached).addresses
    }

    /// Makes later attempts begin at the address that `route` has reached.
    pub(crate) fn reached(&self, cached: &mut Cached, route: &Route, now: Instant) {
        let Present { target, addresses } = self.present(cached);
        if addresses.reached(route, now)
            && let Some(address) = addresses.get(route)
            && let Some(more) = self.moves.allow(now)
        {
            let name = target.address();
            log::info!("upstream {name} is reached at {address} from now on{more}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the addresses of the present upstream by `found`; see [`Upstream::publish_for`].
    pub(crate) fn publish(&self, found: Box<[SocketAddress]>) -> bool {
        self.publish_for(&self.target(), found)
    }

    /// Replaces the addresses by `found`, without tcpause's own, unless another upstream than `target` is present by now.
    /// Returns true if one of tcpause's own was dialled until now.
    fn publish_for(&self, target: &Arc<Target>, found: Box<[SocketAddress]>) -> bool {
        let (list, own, listeners) = self.without_own(found);
        let mut present = self.lock();
        // Name servers shuffle their answers, so only another set of addresses is a change.
        let is_known = |found: &[SocketAddress], known: &[SocketAddress]| {
            known.len() == found.len() && found.iter().all(|address| known.contains(address))
        };
        let has_moved = !is_known(&list, present.addresses.list());
        if !Arc::ptr_eq(target, &present.target)
            || !has_moved && is_known(&own, present.addresses.own())
        {
            return false;
        }
        let name = target.address();
        let is_loop = own.iter().any(|address| present.addresses.list().contains(address));
        for (address, listener) in own.iter().zip(listeners) {
            log::error!(
                "upstream.addr: {name} leads back to {listener} at {address}, which is not dialled; write where the server behind the proxy listens"
            );
        }
        if has_moved && !list.is_empty() {
            let list = list.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            log::info!("upstream {name} is at {list}");
        }
        target.is_at(&list);
        present.addresses = Arc::new(present.addresses.replaced_by(list.into(), own.into()));
        self.changes.fetch_add(1, Ordering::Release);
        is_loop
    }

    /// Returns `found` in two lists, the latter with tcpause's own addresses, and the listeners behind these.
    fn without_own(
        &self,
        found: Box<[SocketAddress]>,
    ) -> (Vec<SocketAddress>, Vec<SocketAddress>, Vec<&Own>) {
        let (mut list, mut own, mut listeners) = (Vec::new(), Vec::new(), Vec::new());
        for address in found {
            match self.guard.find(&address) {
                Some(listener) => {
                    own.push(address);
                    listeners.push(listener);
                }
                None => list.push(address),
            }
        }
        (list, own, listeners)
    }
}

impl Sources {
    fn new(ips: &[IpAddr]) -> Self {
        let of_family = |is_ipv4| {
            let canonical = ips.iter().map(IpAddr::to_canonical);
            let of_family = canonical.filter(|ip| ip.is_ipv4() == is_ipv4).map(Some);
            if ips.is_empty() { [None].into() } else { of_family.collect() }
        };
        Self { v4: of_family(true), v6: of_family(false) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    fn upstream(addr: Address) -> Upstream {
        let settings = config::UpstreamConfig { addr, ..config::UpstreamConfig::default() };
        Upstream::new(settings, LoopGuard::default(), Instant::now()).unwrap()
    }

    #[test]
    fn literal_addresses_are_known_at_once() {
        for (address, expected) in [
            ("127.0.0.1:80", "tcp://127.0.0.1:80"),
            ("[::1]:80", "tcp://[::1]:80"),
            ("unix:///run/app.sock", "unix:///run/app.sock"),
            ("unix://@app", "unix://@app"),
        ] {
            let upstream = upstream(address.parse().unwrap());
            let mut cached = Cached::default();
            let list = upstream.read(&mut cached).list();
            let list: Vec<_> = list.iter().map(ToString::to_string).collect();
            assert_eq!(list, [expected]);
        }
    }

    #[test]
    fn a_name_is_looked_up_by_the_time_a_refresh_returns() {
        let upstream = Arc::new(upstream(Address::tcp("localhost", 80)));
        upstream.start(|| {}).unwrap();
        upstream.refresh(DEADLINE);
        let mut cached = Cached::default();
        assert!(!upstream.read(&mut cached).list().is_empty());
    }

    #[test]
    fn a_change_reaches_the_copies_and_another_order_is_none() {
        let upstream = upstream(Address::tcp("127.0.0.1", 80));
        let [one, other] =
            ["127.0.0.2:80", "127.0.0.3:80"].map(|text| SocketAddress::Inet(text.parse().unwrap()));
        let mut cached = Cached::default();
        upstream.publish([one.clone(), other.clone()].into());
        assert_eq!(upstream.read(&mut cached).list(), [one.clone(), other.clone()]);
        upstream.publish([other.clone(), one.clone()].into());
        assert_eq!(upstream.read(&mut cached).list(), [one, other]);
    }

    #[test]
    fn its_own_addresses_are_not_dialled() {
        let address = |text: &str| SocketAddress::Inet(text.parse().unwrap());
        let [own, other] = ["127.0.0.1:80", "127.0.0.2:80"].map(address);
        let start = |text: &str| {
            let mut guard = LoopGuard::default();
            guard.add("proxy.addr", own.clone(), None);
            let addr = text.parse().unwrap();
            Upstream::new(
                config::UpstreamConfig { addr, ..config::UpstreamConfig::default() },
                guard,
                Instant::now(),
            )
        };
        let error = start("127.0.0.1:80").unwrap_err().to_string();
        assert!(error.contains("leads back to proxy.addr (tcp://127.0.0.1:80)"), "{error}");
        let (upstream, mut cached) = (start("a.name:80").unwrap(), Cached::default());
        assert_eq!(upstream.read(&mut cached).lack(), "its name is not known");
        for found in [vec![own.clone(), other.clone()], vec![other.clone()]] {
            assert!(!upstream.publish(found.into()), "it was not dialled before");
            assert_eq!(upstream.read(&mut cached).list(), std::slice::from_ref(&other));
        }
        assert!(!upstream.publish([own.clone()].into()));
        let addresses = upstream.read(&mut cached);
        assert_eq!((addresses.list(), addresses.lack()), (&[][..], "it is tcpause itself"));
    }
}

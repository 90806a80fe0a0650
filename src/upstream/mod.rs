//! The addresses of the upstream: looked up away from the workers, which must never block.

pub(crate) mod addresses;
pub(crate) mod breaker;
pub(crate) mod dialer;
pub(crate) mod loop_guard;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::{
    config::{
        self,
        address::{self, Address},
    },
    error::Error,
    log_limit::LogLimit,
    sys::{SocketAddress, is_port_shortage},
};
use addresses::Addresses;
use addresses::Route;
use breaker::CircuitBreaker;
use loop_guard::LoopGuard;

/// How often a name is looked up without being asked to.
const LOOK_UP_INTERVAL: Duration = Duration::from_secs(30);

/// How often at most it is looked up for connections that fail: they may be many.
const ASKED_INTERVAL: Duration = Duration::from_secs(1);

/// How many requests to look up may wait; one more asks for nothing new.
const REQUESTS_MAX: usize = 16;

/// What the upstream's address stands for now. Shared by all workers.
#[derive(Debug)]
pub(crate) struct Upstream {
    address: Address,
    connect_timeout: Duration,
    retry_for: Duration,
    outage: CircuitBreaker,
    sources: Sources,
    /// Lets through what is said of dials that are tried again, of those that are given up, and of addresses that are used
    /// instead of others.
    delays: LogLimit,
    losses: LogLimit,
    moves: LogLimit,
    addresses: Mutex<Arc<Addresses>>,
    /// Counts the changes of `addresses`: as long as it stays the same, no worker takes the lock.
    changes: AtomicU64,
    guard: LoopGuard,
    /// To the thread that looks the address up; none before it is started.
    look_up: OnceLock<Sender<Request>>,
}

/// A worker's own way to the addresses.
#[derive(Debug, Default)]
pub(crate) struct Cached {
    addresses: Arc<Addresses>,
    changes: u64,
}

/// Where to dial from: each in turn. `None` leaves it to the system.
#[derive(Debug)]
struct Sources {
    v4: Box<[Option<IpAddr>]>,
    v6: Box<[Option<IpAddr>]>,
}

/// What comes of a dial that has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RetryPlan {
    /// It is tried again.
    TriedAgain,
    /// Its time is up.
    GivenUp,
}

/// Asks to look up; dropped when that is done.
type Request = Option<Sender<()>>;

impl Upstream {
    /// Returns an upstream whose address is known, unless it is a name: nothing is looked up before [`Upstream::start`].
    pub(crate) fn new(settings: config::UpstreamConfig, guard: LoopGuard) -> Result<Self, Error> {
        let address = settings.addr;
        let known = if is_name(&address) { Ok([].into()) } else { look_up(&address) };
        let known: Box<[SocketAddress]> = known.unwrap_or_default();
        if let Some(own) = known.iter().find_map(|known| guard.find(known)) {
            return Err(Error::Config(format!(
                "upstream.addr: {address} leads back to {own}; write where the server behind the proxy listens"
            )));
        }
        Ok(Self {
            address,
            connect_timeout: settings.connect_timeout,
            retry_for: settings.retry_for,
            outage: CircuitBreaker::new(),
            sources: Sources::new(&settings.source_addrs),
            delays: LogLimit::default(),
            losses: LogLimit::default(),
            moves: LogLimit::default(),
            addresses: Mutex::new(Arc::new(Addresses::new(known))),
            changes: AtomicU64::new(1),
            guard,
            look_up: OnceLock::new(),
        })
    }

    /// Starts the thread that looks the address up: a name for its addresses, and each of them for whether it is tcpause's
    /// own, which can change too. It calls `on_loop` when such an address was dialled before that was known. It ends when
    /// this is dropped.
    pub(crate) fn start(
        self: &Arc<Self>,
        on_loop: impl Fn() + Send + 'static,
    ) -> Result<(), Error> {
        let (requests, receiver) = bounded(REQUESTS_MAX);
        self.look_up.get_or_init(|| requests);
        let (address, weak) = (self.address.clone(), Arc::downgrade(self));
        let publish = move |found| {
            if weak.upgrade().is_some_and(|upstream| upstream.publish(found)) {
                on_loop();
            }
        };
        let run = move || run(&receiver, &address, publish);
        thread::Builder::new().name("names".into()).spawn(run).map(drop).map_err(|error| {
            Error::System(format!("cannot start the thread that looks names up: {error}"))
        })
    }

    /// The address as configured.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// How long an attempt at all addresses may take.
    pub(crate) fn connect_timeout(&self) -> Duration {
        self.connect_timeout
    }

    /// How long a client waits for it.
    pub(crate) fn patience(&self) -> Duration {
        self.retry_for.max(self.connect_timeout)
    }

    /// Whether it is away.
    pub(crate) fn outage(&self) -> &CircuitBreaker {
        &self.outage
    }

    /// What to dial `address` from, in turn; nothing if there are source addresses, but none of its kind.
    pub(crate) fn sources(&self, address: &SocketAddress) -> &[Option<IpAddr>] {
        match address {
            SocketAddress::Inet(SocketAddr::V4(_)) => &self.sources.v4,
            SocketAddress::Inet(SocketAddr::V6(_)) => &self.sources.v6,
            SocketAddress::Unix(_) | SocketAddress::Abstract(_) => &[None],
        }
    }

    /// Logs why it was not reached, unless that has just been said.
    pub(crate) fn log_failure(&self, error: &io::Error, outlook: RetryPlan, now: Instant) {
        let (throttle, outlook) = match outlook {
            RetryPlan::TriedAgain => (&self.delays, "trying again"),
            RetryPlan::GivenUp => (&self.losses, "a client is reset"),
        };
        let Some(more) = throttle.allow(now) else { return };
        let address = &self.address;
        if is_port_shortage(error) {
            log::warn!(
                "no local port is free to reach the upstream {address}{more}; {outlook}; add addresses to upstream.source-addrs"
            );
        } else {
            log::warn!("cannot reach the upstream {address}{more}: {error}; {outlook}");
        }
    }

    /// Brings `cached` up to date. Takes a lock only after a change.
    pub(crate) fn read<'a>(&self, cached: &'a mut Cached) -> &'a Arc<Addresses> {
        let changes = self.changes.load(Ordering::Acquire);
        if changes != cached.changes {
            let addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
            *cached = Cached { addresses: Arc::clone(&addresses), changes };
        }
        &cached.addresses
    }

    /// Has attempts begin at the address that `route` has reached.
    pub(crate) fn reached(&self, cached: &mut Cached, route: &Route, now: Instant) {
        let addresses = self.read(cached);
        if addresses.reached(route, now)
            && let Some(address) = addresses.get(route)
            && let Some(more) = self.moves.allow(now)
        {
            log::info!("upstream {} is reached at {address} from now on{more}", self.address);
        }
    }

    /// Asks for a look-up, and does not wait for it.
    pub(crate) fn ask(&self) {
        if let Some(look_up) = self.look_up.get() {
            // A full queue means that one is due anyway.
            look_up.try_send(None).ok();
        }
    }

    /// Looks the name up anew; gives up waiting after `timeout`, and what was known before stands.
    pub(crate) fn refresh(&self, timeout: Duration) {
        if let Some(look_up) = self.look_up.get() {
            let (done, wait) = bounded(0);
            if look_up.try_send(Some(done)).is_err()
                || wait.recv_timeout(timeout) == Err(RecvTimeoutError::Timeout)
            {
                log::warn!("looking up {} takes long; going on with what is known", self.address);
            }
        }
    }

    /// Takes `found` for the addresses from now on, but for those that are tcpause's own. Returns true if one of those was
    /// dialled until now.
    pub(crate) fn publish(&self, found: Box<[SocketAddress]>) -> bool {
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
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        // Name servers shuffle their answers; only another set of addresses is a change.
        let is_known = |found: &[SocketAddress], known: &[SocketAddress]| {
            known.len() == found.len() && found.iter().all(|address| known.contains(address))
        };
        let has_moved = !is_known(&list, addresses.list());
        if !has_moved && is_known(&own, addresses.own()) {
            return false;
        }
        let is_loop = own.iter().any(|address| addresses.list().contains(address));
        for (address, listener) in own.iter().zip(listeners) {
            log::error!(
                "upstream.addr: {} leads back to {listener} at {address}, which is not dialled; write where the server behind the proxy listens",
                self.address
            );
        }
        if has_moved && !list.is_empty() {
            let list = list.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            log::info!("upstream {} is at {list}", self.address);
        }
        *addresses = Arc::new(addresses.replaced_by(list.into(), own.into()));
        self.changes.fetch_add(1, Ordering::Release);
        is_loop
    }
}

impl Sources {
    fn new(ips: &[IpAddr]) -> Self {
        let of_kind = |is_ipv4| {
            let canonical = ips.iter().map(IpAddr::to_canonical);
            let of_kind = canonical.filter(|ip| ip.is_ipv4() == is_ipv4).map(Some);
            if ips.is_empty() { [None].into() } else { of_kind.collect() }
        };
        Self { v4: of_kind(true), v6: of_kind(false) }
    }
}

/// Tells whether an address has to be looked up.
fn is_name(address: &Address) -> bool {
    matches!(address, Address::Tcp { host, .. } if host.parse::<IpAddr>().is_err())
}

fn look_up(to: &Address) -> io::Result<Box<[SocketAddress]>> {
    Ok(match to {
        Address::Tcp { host, port } => {
            address::look_up(host, *port)?.into_iter().map(SocketAddress::Inet).collect()
        }
        Address::Unix(path) => [SocketAddress::Unix(path.clone())].into(),
        Address::Abstract(name) => [SocketAddress::Abstract(name.clone())].into(),
    })
}

/// Looks `address` up at once, when asked to, and every now and then, until nobody can ask any more.
fn run(requests: &Receiver<Request>, address: &Address, publish: impl Fn(Box<[SocketAddress]>)) {
    let mut asked = Vec::new();
    loop {
        let begun = Instant::now();
        match look_up(address) {
            Ok(found) => publish(found),
            Err(error) => {
                log::warn!("cannot look up {address} of upstream.addr: {error}; trying again");
            }
        }
        // Who asked hears of it by this; whoever asks from now on gets a look-up that begins later.
        drop(asked);
        match wait(requests, begun) {
            Some(others) => asked = others,
            None => return,
        }
    }
}

/// Waits until the next look-up is due: at once where somebody waits for it, soon where somebody has asked. Returns those who
/// wait; none when nobody can ask any more.
fn wait(requests: &Receiver<Request>, begun: Instant) -> Option<Vec<Sender<()>>> {
    let mut due = begun + LOOK_UP_INTERVAL;
    loop {
        match requests.recv_deadline(due) {
            Ok(Some(done)) => {
                let others = requests.try_iter().take(REQUESTS_MAX).flatten();
                return Some(std::iter::once(done).chain(others).collect());
            }
            Ok(None) => {
                due = begun + ASKED_INTERVAL;
                if due <= Instant::now() {
                    return Some(Vec::new());
                }
            }
            Err(RecvTimeoutError::Timeout) => return Some(Vec::new()),
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}

#[cfg(test)]
impl Upstream {
    /// Returns an upstream that nothing dials.
    pub(crate) fn for_tests() -> Arc<Self> {
        let settings =
            config::UpstreamConfig { addr: Address::tcp("127.0.0.1", 9), ..Default::default() };
        Arc::new(Self::new(settings, LoopGuard::default()).expect("another address"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    fn upstream(addr: Address) -> Upstream {
        let settings = config::UpstreamConfig { addr, ..config::UpstreamConfig::default() };
        Upstream::new(settings, LoopGuard::default()).unwrap()
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

    #[test]
    fn a_crowd_that_asks_does_not_get_a_look_up_each() {
        let (requests, receiver) = bounded(REQUESTS_MAX);
        let looked_up = Arc::new(AtomicU64::new(0));
        let begun = Instant::now();
        let thread = thread::Builder::new().spawn({
            let looked_up = Arc::clone(&looked_up);
            let count = move |_found| {
                looked_up.fetch_add(1, Ordering::Relaxed);
            };
            move || run(&receiver, &Address::tcp("127.0.0.1", 80), count)
        });
        for _client in 0..1000 {
            requests.send(None).unwrap();
        }
        // One that is waited for comes at once all the same.
        let (done, wait) = bounded(0);
        requests.send(Some(done)).unwrap();
        assert_eq!(wait.recv_timeout(DEADLINE), Err(RecvTimeoutError::Disconnected));
        drop(requests);
        thread.unwrap().join().unwrap();
        let (count, most) = (looked_up.load(Ordering::Relaxed), 2 + begun.elapsed().as_secs());
        assert!((2..=most).contains(&count), "{count} look-ups, {most} expected at most");
    }
}

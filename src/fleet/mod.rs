//! The fleet: many hosts that pause as one, by records in etcd (<https://etcd.io/docs/v3.5/learning/api/>).
//!
//! [`member`] and [`coordinator`] are plain state machines: moments and answers go in, requests and orders come out. Two
//! [`threads`] ask the [`store`] and carry the orders out. A third one [watches](etcd::Watch) and wakes them. Callers of the control API leave their wishes at the [`desk`].

mod clock;
mod coordinator;
mod desk;
mod errand;
#[cfg_attr(not(feature = "fleet"), path = "no_etcd.rs")]
mod etcd;
mod facade;
mod keys;
mod member;
mod proxy;
mod snapshot;
mod step;
#[cfg_attr(not(feature = "fleet"), allow(dead_code, reason = "no client makes answers"))]
mod store;
mod table;
mod terms;
mod threads;

use std::{
    collections::BTreeMap,
    fs,
    hash::{BuildHasher as _, RandomState},
    io,
    sync::Arc,
    thread::{Builder, JoinHandle},
};

pub(crate) use clock::BootTime;
use clock::Timing;
pub(crate) use coordinator::{WaitingFor, Wanted};
use crossbeam_channel::{Sender, bounded};
use desk::Desk;
use etcd::{Etcd, WatchStopper};
pub(crate) use facade::{Fleet, Fleets, Refusal, RefusalKind};
use keys::{KeySpace, MemberRecord};
use member::{
    Member, MemberConfig,
    parcel::{MemberWords, Stranded},
};
use proxy::Proxy;
use serde::Deserialize as _;
use serde_json::Value;
use store::StoreSettings;
#[cfg(test)]
pub(crate) use table::Table;
pub(crate) use terms::parse_quiet;
use threads::{Bell, CoordinatorThread, Identity, Logged, MemberThread};

use crate::{
    config::{Config, FleetConfig, OnDisconnect},
    error::Error,
    handle::Handle,
    sys::boot::boot_time,
};

/// File with an id of the machine's last start.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Membership of a fleet whose threads do not run yet: its files are read, and nothing is connected.
#[derive(Debug)]
pub(crate) struct Membership {
    etcd: Etcd,
    config: FleetConfig,
    host: String,
    record: MemberRecord,
}

/// Threads of a member.
#[derive(Debug)]
pub(crate) struct FleetThreads {
    desk: Arc<Desk>,
    /// Bells of the coordinators and of the member.
    bells: [Arc<Bell>; 2],
    watch: WatchStopper,
    begin: Sender<()>,
    /// Threads of the coordinators, of the member and of the watch, until they are joined.
    threads: Option<[JoinHandle<()>; 3]>,
}

impl Membership {
    /// Checks the settings of a fleet and reads its files. Returns none without `fleet.endpoints`.
    pub(crate) fn new(config: &Config) -> Result<Option<Self>, Error> {
        let fleet = &config.fleet;
        if fleet.endpoints.is_empty() {
            return Ok(None);
        }
        let settings = StoreSettings {
            endpoints: fleet.endpoints.iter().map(ToString::to_string).collect(),
            ca_cert: fleet.tls.ca_cert.clone(),
            cert: fleet.tls.cert.clone(),
            key: fleet.tls.key.clone(),
            username: fleet.username.as_ref().map(|it| it.0.clone()),
            password_file: fleet.password_file.clone(),
        };
        let record = MemberRecord {
            identity: format!("{} {}", machine_id(), config.proxy.addr),
            boot: read_id(BOOT_ID).unwrap_or_default(),
            on_disconnect: fleet.on_disconnect,
            fence: fleet.ttl,
            grace: config.grace_period,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let host = fleet.host().map_err(Error::Config)?.0;
        let etcd = Etcd::new(&settings)?;
        Ok(Some(Self { etcd, config: fleet.clone(), host, record }))
    }

    /// Has clients wait for the first contact at a start, before any worker runs. A taker that serves without contact holds
    /// nobody, and no taker does where the process before has joined.
    pub(crate) fn hold_clients(&self, handle: &Handle, is_taker: bool) {
        let wait = match self.config.on_disconnect {
            OnDisconnect::Serve if is_taker => return,
            OnDisconnect::Serve => Some(self.config.start_wait),
            OnDisconnect::Hold => None,
        };
        if !words(handle).has_joined() {
            handle.pauses().begin_starting(wait);
        }
    }

    /// Starts the threads of a member, which do nothing before they [begin](FleetThreads::begin).
    pub(crate) fn start(self, handle: Handle) -> Result<FleetThreads, Error> {
        self.spawn(handle)
            .map_err(|error| Error::no_thread("keeps the contact with the fleet", &error))
    }

    fn spawn(self, handle: Handle) -> io::Result<FleetThreads> {
        let Self { etcd, config, host, record } = self;
        let keys = KeySpace::new(&config.prefix.0, &config.name.0);
        let instance = format!("{:016x}", RandomState::new().hash_one(boot_time()));
        let timing = Timing::new(config.ttl);
        let bells = [Arc::new(Bell::new()), Arc::new(Bell::new())];
        let [of_coordinators, of_member] = bells.clone();
        let (desk, errands) = Desk::new(Arc::clone(&of_coordinators));
        let desk = Arc::new(desk);
        let watch = etcd.watch();
        let stopper = watch.stopper();
        let member = MemberConfig {
            keys: keys.clone(),
            host: host.clone(),
            instance: instance.clone(),
            record,
            start_wait: config.start_wait,
        };
        wake_by_pauses(&of_member, &handle);
        let prefix = keys.pauses();
        let identity = Identity {
            fleet: config.name.0,
            host,
            keys,
            on_disconnect: config.on_disconnect.word(),
            instance,
        };
        let coordinators = CoordinatorThread {
            identity: identity.clone(),
            store: etcd.another(),
            handle: handle.clone(),
            coordinators: BTreeMap::new(),
            watch: stopper.clone(),
            bell: of_coordinators,
            desk: Arc::clone(&desk),
            errands,
            news: table::News::default(),
            census_due: BootTime::default(),
            pauses_begun: 0,
            leaving_since: None,
            leave_timeout: 3 * timing.timeout(),
        };
        let member = MemberThread {
            identity,
            store: etcd,
            proxy: Proxy { handle, keep_paused_for: config.keep_paused_for },
            member: Member::new(member, BootTime(boot_time())),
            bell: of_member,
            desk: Arc::clone(&desk),
            late_after: timing.period() + timing.timeout(),
            logged: Logged::default(),
        };
        let woken = bells.clone();
        let ring = move || woken.iter().for_each(|bell| bell.ring());
        let (begin, word) = bounded(1);
        let spawn = |name: &str| Builder::new().name(name.into());
        let threads = [
            spawn("fleet-pauses").spawn(move || coordinators.run())?,
            spawn("fleet").spawn(move || member.run(&word))?,
            spawn("fleet-watch").spawn(move || watch.run(&prefix, 2 * timing.period(), ring))?,
        ];
        Ok(FleetThreads { desk, bells, watch: stopper, begin, threads: Some(threads) })
    }
}

impl FleetThreads {
    /// Returns the fleet for the control API.
    pub(crate) fn fleet(&self) -> Fleet {
        let desk: Arc<dyn Fleets> = Arc::<Desk>::clone(&self.desk);
        Fleet::new(desk)
    }

    /// Lets the threads go.
    pub(crate) fn begin(&self) {
        // It is said once, and there is room for it.
        self.begin.try_send(()).ok();
    }

    /// Leaves the fleet, for a few seconds at most: the proxy carries nothing any more. The member goes behind the ends of the
    /// pauses that were asked for here.
    pub(crate) fn leave(mut self) {
        self.watch.stop();
        let [of_coordinators, of_member] = &self.bells;
        let Some([coordinators, member, watch]) = self.threads.take() else { return };
        of_coordinators.leave();
        join(coordinators);
        of_member.leave();
        join(member);
        join(watch);
    }
}

impl Drop for FleetThreads {
    /// Ends the threads without leaving: the host counts as lost.
    fn drop(&mut self) {
        self.bells.iter().for_each(|bell| bell.end());
        self.watch.stop();
    }
}

/// Has the member be woken by each change of the pauses of its proxy.
fn wake_by_pauses(of_member: &Arc<Bell>, handle: &Handle) {
    let (idle, change) = (Arc::clone(of_member), Arc::clone(of_member));
    handle.pauses().watch_idle(move || idle.tell_idle());
    handle.pauses().watch(move || change.wake());
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        log::error!("a defect: a thread of the fleet panicked");
    }
}

/// Refuses an upgrade that takes a host with `hold` out of its fleet: pauses there would take it for quiet.
pub(crate) fn check_taker(config: &Config, parcel: Option<&Value>) -> Result<(), Error> {
    let fleet = &config.fleet;
    let keys = KeySpace::new(&fleet.prefix.0, &fleet.name.0);
    let keys = Some(&keys).filter(|_| !fleet.endpoints.is_empty());
    let words = parcel.and_then(|it| MemberWords::deserialize(it).ok());
    if words.is_some_and(|words| words.holds_outside(keys)) {
        return Err(Error::Config(
            "fleet: an upgrade cannot take a host with fleet.on-disconnect hold out of its fleet, whose pauses would take it for quiet while it serves; keep fleet.name, fleet.prefix and fleet.endpoints, or stop and start".to_owned(),
        ));
    }
    Ok(())
}

/// Forgets the fleet of the process before, as this one is in none.
pub(crate) fn abandon(handle: &Handle) {
    words(handle).stranded().iter().for_each(warn_of_stranded);
    handle.fleet().put_parcel(None);
    handle.pauses().leave_fleet();
}

fn warn_of_stranded(Stranded { host, key }: &Stranded) {
    log::warn!(
        event = "fleet-stranded", host = host.as_str();
        "the member {host} that this host was before stays in etcd as lost, as {key}, and pauses of its fleet wait for it; on another host of that fleet, tcpause fleet forget {host} takes it out"
    );
}

/// Returns the words of the process before, if there was one in a fleet.
fn words(handle: &Handle) -> MemberWords {
    let Some(parcel) = handle.fleet().parcel() else { return MemberWords::default() };
    serde_json::from_value(parcel).unwrap_or_else(|error| {
        log::error!("what the old process told of its fleet cannot be read: {error}");
        MemberWords::default()
    })
}

/// Returns the id of this machine, or of its last start where it has none.
fn machine_id() -> String {
    read_id("/etc/machine-id").or_else(|| read_id(BOOT_ID)).unwrap_or_default()
}

fn read_id(file: &str) -> Option<String> {
    let id = fs::read_to_string(file).ok()?.trim().to_owned();
    (!id.is_empty()).then_some(id)
}

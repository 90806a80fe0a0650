//! The fleet: many hosts that pause as one, by records in etcd (<https://etcd.io/docs/v3.5/learning/api/>).
//!
//! [`member`] and [`coordinator`] are plain state machines: moments and answers go in, requests and orders come out. The
//! [`thread`] of the fleet asks the [`store`] and carries the orders out. A second one [watches](etcd::Watch) and wakes it.
//! Callers of the control API leave their wishes at the [`desk`].

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
mod thread;

use std::{
    collections::BTreeMap,
    fs,
    hash::{BuildHasher as _, RandomState},
    io,
    sync::{Arc, atomic::Ordering},
    thread::{Builder, JoinHandle},
    time::Duration,
};

use clock::{BootTime, Timing};
pub(crate) use coordinator::{WaitingFor, Wanted};
use crossbeam_channel::{Sender, bounded};
use desk::Desk;
use etcd::{Etcd, WatchStopper};
pub(crate) use facade::{Fleet, Fleets, Refusal, RefusalKind};
use keys::{KeySpace, MemberRecord};
use member::{Member, MemberConfig};
use proxy::Proxy;
use store::StoreSettings;
#[cfg(test)]
pub(crate) use table::Table;
pub(crate) use terms::parse_quiet;
use thread::{FleetThread, Identity, Signals};

use crate::{
    config::{Config, FleetConfig, OnDisconnect},
    error::Error,
    handle::Handle,
    sys::boot::boot_time,
};

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
    signals: Arc<Signals>,
    watch: WatchStopper,
    begin: Sender<Option<BootTime>>,
    threads: Vec<JoinHandle<()>>,
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
            on_disconnect: fleet.on_disconnect,
            fence: fleet.ttl,
            grace: config.grace_period,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let host = fleet.host().map_err(Error::Config)?.0;
        let etcd = Etcd::new(&settings)?;
        Ok(Some(Self { etcd, config: fleet.clone(), host, record }))
    }

    /// Returns the longest time for which clients wait at a start for the first contact; none for ever.
    pub(crate) fn start_wait(&self) -> Option<Duration> {
        match self.config.on_disconnect {
            OnDisconnect::Serve => Some(self.config.start_wait),
            OnDisconnect::Hold => None,
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
        let (desk, ends) = Desk::new();
        let (desk, signals) = (Arc::new(desk), Arc::new(Signals::default()));
        let watch = etcd.watch();
        let stopper = watch.stopper();
        let now = BootTime(boot_time());
        let member = MemberConfig {
            keys: keys.clone(),
            host: host.clone(),
            instance: instance.clone(),
            record,
            start_wait: config.start_wait,
        };
        let (idle, change) = (Arc::clone(&desk), Arc::clone(&desk));
        handle.pauses().watch_idle(move || idle.wake());
        handle.pauses().watch(move || change.wake());
        let prefix = keys.pauses();
        let thread = FleetThread {
            identity: Identity {
                fleet: config.name.0,
                host,
                keys,
                on_disconnect: config.on_disconnect.word(),
                instance,
            },
            store: etcd,
            proxy: Proxy { handle, keep_paused_for: config.keep_paused_for },
            member: Member::new(member, now),
            coordinators: BTreeMap::new(),
            watch: stopper.clone(),
            desk: Arc::clone(&desk),
            ends,
            signals: Arc::clone(&signals),
            news: table::News::default(),
            census: thread::Census::default(),
            contact: thread::Contact::Never,
            restores: 0,
            late_after: timing.period() + timing.timeout(),
            pauses_begun: 0,
            leaving_since: None,
            leave_timeout: 3 * timing.timeout(),
        };
        let (rings, woken) = (Arc::clone(&signals), Arc::clone(&desk));
        let ring = move || {
            rings.rang.store(true, Ordering::Release);
            woken.wake();
        };
        let (begin, word) = bounded(1);
        let silence = 2 * timing.period();
        let threads = vec![
            Builder::new().name("fleet".into()).spawn(move || thread.run(&word))?,
            Builder::new()
                .name("fleet-watch".into())
                .spawn(move || watch.run(&prefix, silence, ring))?,
        ];
        Ok(FleetThreads { desk, signals, watch: stopper, begin, threads })
    }
}

impl FleetThreads {
    /// Returns the fleet for the control API.
    pub(crate) fn fleet(&self) -> Fleet {
        let desk: Arc<dyn Fleets> = Arc::<Desk>::clone(&self.desk);
        Fleet::new(desk)
    }

    /// Lets the threads go. Those of a process that goes on in place of another one know of its last `contact`.
    pub(crate) fn begin(&self, contact: Option<Duration>) {
        // It is said once, and there is room for it.
        self.begin.try_send(contact.map(BootTime)).ok();
    }

    /// Leaves the fleet, for a few seconds at most: the proxy carries nothing any more.
    pub(crate) fn leave(mut self) {
        self.signals.leaves.store(true, Ordering::Release);
        self.desk.wake();
        self.watch.stop();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a defect: a thread of the fleet panicked");
            }
        }
    }
}

impl Drop for FleetThreads {
    /// Ends the threads without leaving: the host counts as lost.
    fn drop(&mut self) {
        self.signals.ends.store(true, Ordering::Release);
        self.desk.wake();
        self.watch.stop();
    }
}

/// Returns the id of this machine, or of its last start where it has none.
fn machine_id() -> String {
    let files = ["/etc/machine-id", "/proc/sys/kernel/random/boot_id"];
    let mut found = files.iter().filter_map(|file| fs::read_to_string(file).ok());
    found.find(|id| !id.trim().is_empty()).unwrap_or_default().trim().to_owned()
}

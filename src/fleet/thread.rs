//! The thread of a fleet, which drives the machines: it asks the store, carries out what a machine orders, and sleeps until
//! the next is due or somebody wakes it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crossbeam_channel::Receiver;
use log::{info, warn};

use super::{
    clock::BootTime,
    coordinator::{Coordinator, CoordinatorConfig, Margins, Phase},
    desk::{Case, Desk, DeskEnds, Wishes},
    errand,
    etcd::WatchStopper,
    facade::{Fleets as _, Refusal},
    keys::KeySpace,
    member::Member,
    proxy::Proxy,
    step::Step,
    store::Store,
    table::{HostState, News},
};
use crate::{
    fleet_view::FleetStatus,
    pause::fleet::{LOST, STARTING},
    sys::boot::boot_time,
    timestamp::Rfc3339,
};

/// Begin of the sentence about a store that is not the one of before.
const RESTORED: &str = "etcd is another one than before, or was restored from a backup";

/// Longest sleep, so that a machine that names a time far away costs no overflow.
const SLEEP_MAX: Duration = Duration::from_secs(60);

/// Shortest time between two counts of the hosts, and the time for each host, as all is read for it.
const CENSUS_INTERVAL_MIN: Duration = Duration::from_secs(60);
const CENSUS_INTERVAL_PER_HOST: Duration = Duration::from_millis(600);

/// Facts of this member that do not change.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    pub(super) fleet: String,
    pub(super) host: String,
    pub(super) keys: KeySpace,
    pub(super) on_disconnect: &'static str,
    /// Begin of the ids of this process's pauses, unlike that of any other.
    pub(super) instance: String,
}

/// Signals to the thread from others.
#[derive(Debug, Default)]
pub(super) struct Signals {
    /// Set if the watch has rung.
    pub(super) rang: AtomicBool,
    /// Set if the host is to leave the fleet.
    pub(super) leaves: AtomicBool,
    /// Set if the thread is to end at once.
    pub(super) ends: AtomicBool,
}

/// Thread that drives the machines of one host.
pub(super) struct FleetThread<S> {
    pub(super) identity: Identity,
    pub(super) store: S,
    pub(super) proxy: Proxy,
    pub(super) member: Member,
    pub(super) coordinators: BTreeMap<u64, Coordinator>,
    pub(super) watch: WatchStopper,
    pub(super) desk: Arc<Desk>,
    pub(super) ends: DeskEnds,
    pub(super) signals: Arc<Signals>,
    pub(super) news: News,
    pub(super) census: Census,
    pub(super) contact: Contact,
    /// Restores of the store that were logged.
    pub(super) restores: u64,
    /// Age of the last contact from which on it counts as lost.
    pub(super) late_after: Duration,
    pub(super) pauses_begun: u64,
    /// Time of the order to leave the fleet.
    pub(super) leaving_since: Option<BootTime>,
    /// Longest wait for the ends of the pauses that were asked for here.
    pub(super) leave_timeout: Duration,
}

/// Numbers of hosts, by a read of all of them now and then.
#[derive(Debug, Default)]
pub(super) struct Census {
    members: u64,
    lost: u64,
    /// Time of the next one.
    due: BootTime,
}

/// State of the contact with the store, as it was logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contact {
    Never,
    Here,
    Lost,
}

impl<S: Store> FleetThread<S> {
    /// Runs from the word to begin until the host has left the fleet.
    pub(super) fn run(mut self, begun: &Receiver<Option<BootTime>>) {
        let Ok(contact) = begun.recv() else { return };
        // The contact of a process that was there for a moment only is not known, though it has left pauses.
        let mut paused = self.proxy.view().holding;
        paused.remove(STARTING);
        let is_lost = paused.remove(LOST);
        self.member.go_on(contact, paused, is_lost);
        while !self.signals.ends.load(Ordering::Acquire) {
            self.take_signals();
            self.take_wishes();
            let (is_over, mut next) = self.drive_member();
            if is_over {
                break;
            }
            next = next.min(self.drive_coordinators());
            next = next.min(self.take_census());
            self.publish();
            if self.do_errand() {
                continue;
            }
            // The desk lives as long as this thread, so that there is no other error than the time.
            self.ends.wakes.recv_timeout((next - now()).min(SLEEP_MAX)).ok();
        }
    }

    fn take_signals(&mut self) {
        if self.signals.rang.swap(false, Ordering::AcqRel) {
            self.member.woken();
            self.coordinators.values_mut().for_each(Coordinator::woken);
        }
        if self.signals.leaves.load(Ordering::Acquire) {
            let now = now();
            let since = *self.leaving_since.get_or_insert(now);
            self.coordinators.values_mut().for_each(|it| it.end(now));
            // Behind the ends of the pauses that were asked for here. Those that etcd does not take end without a holder.
            if self.coordinators.is_empty() || now >= since + self.leave_timeout {
                self.coordinators.clear();
                self.member.stop();
            }
        }
    }

    /// Makes coordinators of new cases, and passes wishes on.
    fn take_wishes(&mut self) {
        let now = now();
        self.desk.forget_ended(now);
        if let Some(trouble) = self.member.trouble().filter(|_| self.member.is_nameless()) {
            let refusal = Refusal::denied(&trouble.to_string());
            self.desk.refuse_new(|id| !self.coordinators.contains_key(&id), &refusal);
        }
        let had_none = self.coordinators.is_empty();
        for (&request_id, case) in self.desk.cases().iter_mut() {
            if case.outcome.ended.is_some() {
                continue;
            }
            if !self.coordinators.contains_key(&request_id) {
                self.pauses_begun += 1;
                let id = format!("{}-{}", self.identity.instance, self.pauses_begun);
                let coordinator = begin(&self.identity, id, case, now);
                self.coordinators.insert(request_id, coordinator);
                if had_none {
                    // The states of all hosts, too.
                    self.watch.look_at(self.identity.keys.all());
                }
            }
            let Some(coordinator) = self.coordinators.get_mut(&request_id) else { continue };
            let Wishes { kills, is_renewed, end } = std::mem::take(&mut case.wishes);
            (0..kills).for_each(|_| coordinator.kill());
            if is_renewed {
                coordinator.renew(now);
            }
            if let Some(because) = end {
                info!("the pause {} of the fleet ends: {because}", coordinator.name());
                coordinator.end(now);
            }
        }
    }

    /// Drives the member by one step. Returns true once it has left, and the time of its next step.
    fn drive_member(&mut self) -> (bool, BootTime) {
        let began = now();
        match self.member.poll(began, &self.proxy.view()) {
            Step::Ask(request, timeout) => {
                let sent = now();
                let result = self.store.ask(&request, self.until_loss(timeout, sent));
                self.member.answered(sent, now(), result);
            }
            Step::Do(doing) => {
                self.proxy.carry_out(&doing);
                self.member.done(now());
            }
            Step::Wait(until) => return (false, until),
            Step::Over => return (true, began),
        }
        (false, began)
    }

    /// Drives each coordinator by one step. Returns the time of the next one.
    fn drive_coordinators(&mut self) -> BootTime {
        let mut next = now() + SLEEP_MAX;
        let ids: Vec<u64> = self.coordinators.keys().copied().collect();
        for id in ids {
            let polled = now();
            let until_loss = self.until_loss(SLEEP_MAX, polled);
            let Some(coordinator) = self.coordinators.get_mut(&id) else { continue };
            // A loss is told before the store is asked again, which may take its time.
            self.desk.settle(id, coordinator, polled);
            match coordinator.poll(polled) {
                Step::Ask(request, timeout) => {
                    let sent = now();
                    let result = self.store.ask(&request, timeout.min(until_loss));
                    coordinator.answered(sent, now(), result);
                    next = sent;
                }
                Step::Wait(until) => next = next.min(until),
                Step::Do(_) | Step::Over => {
                    log_end(coordinator);
                    self.desk.settle(id, coordinator, now());
                    self.coordinators.remove(&id);
                    if self.coordinators.is_empty() {
                        self.watch.look_at(&self.identity.keys.pauses());
                    }
                    continue;
                }
            }
            if let Some(at) = self.desk.settle(id, coordinator, now()) {
                next = next.min(at);
            }
        }
        next
    }

    /// Returns the time that a request may take: a caller is told of the loss of its pause in time, whoever asks.
    fn until_loss(&self, timeout: Duration, now: BootTime) -> Duration {
        let losses = self.coordinators.values().map(Coordinator::lost_at);
        losses.filter(|at| *at > now).map(|at| at - now).fold(timeout, Duration::min)
    }

    /// Counts the hosts if that is due, more seldom the more there are. Returns the time of the next count.
    fn take_census(&mut self) -> BootTime {
        let now = now();
        if now >= self.census.due && self.member.has_session() {
            self.census.due = now + CENSUS_INTERVAL_MIN;
            if let Ok(table) = errand::table(&mut self.store, &self.identity, &mut self.news) {
                let lost = table.hosts.iter().filter(|host| host.state == HostState::Lost).count();
                (self.census.members, self.census.lost) = (table.hosts.len() as u64, lost as u64);
                let hosts = u32::try_from(table.hosts.len()).unwrap_or(u32::MAX);
                let interval = CENSUS_INTERVAL_PER_HOST.saturating_mul(hosts);
                self.census.due = now + interval.max(CENSUS_INTERVAL_MIN);
            }
        }
        // Without a session, none is due.
        self.census.due.max(now + CENSUS_INTERVAL_MIN)
    }

    /// Does one errand, if there is one.
    fn do_errand(&mut self) -> bool {
        let Ok(errand) = self.ends.errands.try_recv() else { return false };
        errand::run(errand, &mut self.store, &self.identity, &mut self.news);
        true
    }

    /// Shows the state of the member to the status and the metrics, and logs each change of the contact once.
    fn publish(&mut self) {
        let age = self.member.present().map(|at| now() - at);
        let trouble = self.member.trouble().map(ToString::to_string);
        let doubt = doubt(&self.member.doubted());
        let is_late = age.is_none_or(|age| age > self.late_after);
        match (&trouble, self.contact) {
            (Some(why), Contact::Never | Contact::Here) if is_late => {
                warn!(
                    event = "fleet-lost", fleet = self.identity.fleet;
                    "the fleet {} is out of reach: {why}; its pauses stay as they are", self.identity.fleet
                );
                self.contact = Contact::Lost;
            }
            (None, Contact::Never | Contact::Lost) if !is_late => {
                info!(
                    event = "fleet-joined", fleet = self.identity.fleet;
                    "is a member of the fleet {} as {}", self.identity.fleet, self.identity.host
                );
                self.contact = Contact::Here;
            }
            _ => {}
        }
        if self.restores != self.member.restores() {
            self.restores = self.member.restores();
            let what = doubt.clone().unwrap_or_else(|| format!("{RESTORED}; no pause holds here"));
            warn!(event = "fleet-restored", fleet = self.identity.fleet; "the fleet {}: {what}", self.identity.fleet);
        }
        self.proxy.handle.fleet().publish(FleetStatus {
            name: self.identity.fleet.clone(),
            host: self.identity.host.clone(),
            connected: self.contact == Contact::Here,
            last_contact: self.member.contact().map(|at| at.0),
            on_disconnect: self.identity.on_disconnect.to_owned(),
            rounds_failed: self.member.rounds_failed(),
            coordinating: self.desk.coordinating(),
            trouble: trouble.or(doubt),
            members: self.census.members,
            lost: self.census.lost,
        });
    }
}

/// Tells of pauses that hold here though a restored store does not have them, if there are any.
fn doubt(pauses: &[&str]) -> Option<String> {
    let end = "fleet.keep-paused-for is over, or tcpause resume --force ends it";
    (!pauses.is_empty())
        .then(|| format!("{RESTORED}; {} holds here until {end}", pauses.join(", ")))
}

/// Logs the end of a pause.
fn log_end(coordinator: &Coordinator) {
    let Phase::Ended { by, still_paused } = coordinator.phase() else { return };
    let (name, by) = (coordinator.name(), by.clause());
    info!(event = "fleet-ended", name = name, by = by; "the pause {name} of the fleet has ended, by {by}");
    if !still_paused.is_empty() {
        warn!(
            "these hosts have not told in time that they have resumed: {}",
            still_paused.join(", ")
        );
    }
}

/// Makes the coordinator of a case.
fn begin(identity: &Identity, id: String, case: &Case, now: BootTime) -> Coordinator {
    let config = CoordinatorConfig {
        keys: identity.keys.clone(),
        host: identity.host.clone(),
        id,
        began: Rfc3339::now().unix_time().as_secs(),
        is_bound: case.is_bound,
        margins: Margins::default(),
    };
    let mut wanted = case.wanted.clone();
    wanted.by = format!("{} on {}", wanted.by, identity.host);
    Coordinator::new(config, wanted, now)
}

fn now() -> BootTime {
    BootTime(boot_time())
}

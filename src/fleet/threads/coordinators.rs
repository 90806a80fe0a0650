//! The thread of the coordinators: it drives those of the pauses that were asked for here, does errands, and counts the hosts.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crossbeam_channel::Receiver;
use log::{info, warn};

use super::{Alarm, Bell, Identity, SLEEP_MAX, now};
use crate::{
    fleet::{
        clock::BootTime,
        coordinator::{Coordinator, CoordinatorConfig, Margins, Phase},
        desk::{Case, Desk, Errand, Standing, Wishes},
        errand,
        etcd::WatchStopper,
        facade::{Fleets as _, Refusal},
        step::Step,
        store::Store,
        table::{HostState, News},
    },
    handle::Handle,
    timestamp::Rfc3339,
};

/// Shortest time between two counts of the hosts, and the time for each host, as all is read for it.
const CENSUS_INTERVAL_MIN: Duration = Duration::from_secs(60);
const CENSUS_INTERVAL_PER_HOST: Duration = Duration::from_millis(600);

/// Thread that drives the coordinators of one host.
pub(in crate::fleet) struct CoordinatorThread<S> {
    pub(in crate::fleet) identity: Identity,
    pub(in crate::fleet) store: S,
    pub(in crate::fleet) handle: Handle,
    pub(in crate::fleet) coordinators: BTreeMap<u64, Coordinator>,
    pub(in crate::fleet) watch: WatchStopper,
    pub(in crate::fleet) bell: Arc<Bell>,
    pub(in crate::fleet) desk: Arc<Desk>,
    pub(in crate::fleet) errands: Receiver<Errand>,
    pub(in crate::fleet) news: News,
    /// Time of the next count of the hosts.
    pub(in crate::fleet) census_due: BootTime,
    pub(in crate::fleet) pauses_begun: u64,
    /// Time of the order to leave the fleet.
    pub(in crate::fleet) leaving_since: Option<BootTime>,
    /// Longest wait for the ends of the pauses that were asked for here.
    pub(in crate::fleet) leave_timeout: Duration,
}

impl<S: Store> CoordinatorThread<S> {
    /// Runs until all pauses that were asked for here have ended behind the order to leave.
    pub(in crate::fleet) fn run(mut self) {
        let desk = Arc::clone(&self.desk);
        let _alarm = Alarm(|why: &str| desk.abandon(&Refusal::denied(why)));
        while !self.bell.ends() && !self.has_left() {
            if self.bell.take_ring() {
                self.coordinators.values_mut().for_each(Coordinator::woken);
            }
            self.take_wishes();
            let next = self.drive().min(self.take_census());
            self.handle.fleet().update(|status| status.coordinating = self.desk.coordinating());
            if !self.do_errand() {
                self.bell.sleep(next);
            }
        }
    }

    /// Ends all pauses if the host leaves. Returns true behind the last one: those that etcd does not take end without a holder.
    fn has_left(&mut self) -> bool {
        if !self.bell.leaves() {
            return false;
        }
        let now = now();
        let since = *self.leaving_since.get_or_insert(now);
        self.coordinators.values_mut().for_each(|it| it.end(now));
        self.coordinators.is_empty() || now >= since + self.leave_timeout
    }

    /// Makes coordinators of new cases, and passes wishes on.
    fn take_wishes(&mut self) {
        let now = now();
        self.desk.forget_ended(now, |id| !self.coordinators.contains_key(&id));
        let standing = self.desk.standing();
        if let Standing::Nameless(refusal) = &standing {
            self.desk.refuse_new(|id| !self.coordinators.contains_key(&id), refusal);
        }
        let had_none = self.coordinators.is_empty();
        for (&request_id, case) in self.desk.cases().iter_mut() {
            if case.outcome.ended.is_some() {
                continue;
            }
            // The first answer of the store tells whether this host may have a coordinator.
            if !self.coordinators.contains_key(&request_id) && standing != Standing::Unknown {
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

    /// Drives each coordinator by one step. Returns the time of the next one.
    fn drive(&mut self) -> BootTime {
        let mut next = now() + SLEEP_MAX;
        let ids: Vec<u64> = self.coordinators.keys().copied().collect();
        for id in ids {
            let polled = now();
            // A stop does not wait for each of many pauses that etcd does not take.
            let leaves_at = self.leaving_since.map(|since| since + self.leave_timeout);
            if leaves_at.is_some_and(|at| polled >= at) {
                break;
            }
            let left = leaves_at.map_or(SLEEP_MAX, |at| at - polled);
            let until_loss = self.until_loss(left, polled);
            let Some(coordinator) = self.coordinators.get_mut(&id) else { continue };
            match coordinator.poll(polled) {
                Step::Ask(request, timeout) => {
                    let sent = now();
                    let result = self.store.ask(&request, timeout.min(until_loss));
                    let known = coordinator.forced().len();
                    coordinator.answered(sent, now(), result);
                    log_forced(coordinator, known);
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

    /// Tells the callers of all pauses that are lost by now, and returns the time that a request may take: each of the others
    /// is told in time, too, whichever pause asks.
    fn until_loss(&self, timeout: Duration, now: BootTime) -> Duration {
        self.coordinators.iter().fold(timeout, |timeout, (&id, coordinator)| {
            let lost_at = coordinator.lost_at();
            if lost_at > now {
                return timeout.min(lost_at - now);
            }
            self.desk.settle(id, coordinator, now);
            timeout
        })
    }

    /// Counts the hosts if that is due, more seldom the more there are. Returns the time of the next count.
    fn take_census(&mut self) -> BootTime {
        let began = now();
        if began >= self.census_due && self.desk.standing() == Standing::Member {
            self.census_due = began + CENSUS_INTERVAL_MIN;
            let timeout = self.until_loss(errand::TIMEOUT, began);
            let table = errand::table(&mut self.store, &self.identity, &mut self.news, timeout);
            if let Ok(table) = table {
                let lost = table.hosts.iter().filter(|host| host.state == HostState::Lost).count();
                self.handle.fleet().update(|status| {
                    (status.members, status.lost) = (table.hosts.len() as u64, lost as u64);
                });
                let hosts = u32::try_from(table.hosts.len()).unwrap_or(u32::MAX);
                let interval = CENSUS_INTERVAL_PER_HOST.saturating_mul(hosts);
                self.census_due = began + interval.max(CENSUS_INTERVAL_MIN);
            }
        }
        // Without a session, none is due.
        self.census_due.max(began + CENSUS_INTERVAL_MIN)
    }

    /// Does one errand, if there is one.
    fn do_errand(&mut self) -> bool {
        let Ok(errand) = self.errands.try_recv() else { return false };
        let timeout = self.until_loss(errand::TIMEOUT, now());
        errand::run(errand, &mut self.store, &self.identity, &mut self.news, timeout);
        true
    }
}

/// Logs the hosts that an operator has resumed in the middle, beyond those that were known.
fn log_forced(coordinator: &Coordinator, known: usize) {
    let name = coordinator.name();
    for host in coordinator.forced().iter().skip(known) {
        warn!(
            event = "fleet-forced", name = name, host = host.as_str();
            "an operator has resumed the host {host} in the middle of the pause {name} of the fleet"
        );
    }
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

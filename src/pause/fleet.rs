//! Leases of the fleet. Their names begin with [`FLEET_PREFIX`]: no caller of the API begins them, and none ends them but by
//! force, on this host alone.

use std::{collections::BTreeSet, time::Duration};

use serde::Serialize;

use super::{
    EndReason, Pauses,
    leases::{FLEET, FLEET_PREFIX, Full, Lease, Lifetime, PROGRAM, Terms},
};
use crate::sys;

/// Name of the lease that holds clients until a proxy that starts has joined its fleet.
pub(crate) const STARTING: &str = "starting";
/// Name of the lease that holds clients while a proxy has lost its fleet.
pub(crate) const LOST: &str = "lost";

/// State of the ledger for the fleet's thread, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FleetLedger {
    /// True if no connection is relayed or connecting, and none is about to be.
    pub(crate) is_idle: bool,
    /// Names of the fleet's leases that hold, without their prefix.
    pub(crate) holding: BTreeSet<String>,
    /// Names of those that an operator has lifted here alone, likewise.
    pub(crate) forced: BTreeSet<String>,
}

/// Lease of the fleet that `Pauses::lift` leaves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Protected {
    pub(crate) name: String,
    pub(crate) by: String,
}

impl Pauses {
    /// Begins a pause of the fleet, or changes its terms, also after an operator has lifted the one before by force. The
    /// name in the terms begins with [`FLEET_PREFIX`]. Once this has returned, nobody is admitted, as with [`Pauses::put`].
    pub(crate) fn put_fleet(&self, terms: Terms) -> Result<(), Full> {
        self.begin_fleet(terms, FLEET)?;
        self.await_workers();
        Ok(())
    }

    /// Holds clients until the fleet lifts [`STARTING`], or for this time at most, unless an operator of the process
    /// before has lifted it by force. No worker runs yet.
    pub(crate) fn begin_starting(&self, ttl: Option<Duration>) {
        if self.fleet_ledger().forced.contains(STARTING) {
            return;
        }
        // The program always has room.
        self.begin_fleet(self.own_terms(STARTING, "it joins its fleet", ttl), PROGRAM).ok();
    }

    /// Holds clients until the fleet lifts [`LOST`]. Once this has returned, nobody is admitted.
    pub(crate) fn put_lost(&self) {
        self.begin_fleet(self.own_terms(LOST, "it has lost its fleet", None), PROGRAM).ok();
        self.await_workers();
    }

    /// Admits nobody from this time since the start of the host on, unless it is moved before; none takes it back. Released
    /// clients go through all the same.
    pub(crate) fn fence_at(&self, deadline: Option<Duration>) {
        if let Some(steer) = self.steer() {
            // Those who wait behind the fence go first.
            if self.gate.is_fenced() {
                steer.stop();
            }
            steer.fence_at(deadline);
        }
        if self.gate.fence_at(deadline) {
            self.workers.wake_all();
        }
    }

    /// Restarts the time to live of the fleet's lease of this name, if it holds.
    pub(crate) fn renew_fleet(&self, name: &str) {
        self.lock().renew(|lease| is_fleet(lease, name), sys::now());
    }

    /// Ends the fleet's lease of this name, and forgets that an operator has lifted it by force.
    pub(crate) fn lift_fleet(&self, name: &str, by: &str) {
        self.lock().forget_forced(&lease_name(name));
        self.end(EndReason::Lifted { by }, |lease| is_fleet(lease, name));
    }

    /// Forgets the fleet of the process before, as this one is in none: nobody would end the leases that have no time, or move
    /// the fence. The pauses of the fleet hold until their time is up.
    pub(crate) fn leave_fleet(&self) {
        self.fence_at(None);
        let has_no_end = |lease: &Lease| lease.is_of_fleet() && lease.ends.is_none();
        self.end(EndReason::Lifted { by: "the program" }, has_no_end);
    }

    /// Ends the pause of that name, or all pauses, those of the fleet by force: on this host alone. Returns true if the proxy
    /// has resumed.
    pub(crate) fn force(&self, name: Option<&str>, by: &str) -> bool {
        let is_meant = |lease: &Lease| name.is_none_or(|name| lease.terms.name == name);
        let has_resumed =
            self.end(EndReason::Forced { by }, |lease| lease.is_of_fleet() && is_meant(lease));
        if self.gate.is_fenced() && name.is_none_or(|name| name == lease_name(LOST)) {
            log::warn!(
                event = "forced", by = by;
                "{by} has this host alone let clients in, though it has lost its fleet: pauses of the fleet take it for quiet, unless they leave it out (--without)"
            );
            self.fence_at(None);
        }
        self.lift(name, by) || has_resumed
    }

    /// Returns the leases of the fleet that a [lift](Pauses::lift) of that name, or of all, leaves.
    pub(crate) fn protected(&self, name: Option<&str>) -> Vec<Protected> {
        let leases = self.lock();
        let meant = leases.iter().filter(|lease| {
            lease.is_of_fleet() && name.is_none_or(|name| lease.terms.name == name)
        });
        let protected = |Terms { name, by, .. }: Terms| Protected { name, by };
        meant.map(|lease| protected(lease.terms.clone())).collect()
    }

    /// Returns the state of the ledger for the fleet's thread.
    pub(crate) fn fleet_ledger(&self) -> FleetLedger {
        let leases = self.lock();
        let short = |name: &str| name.strip_prefix(FLEET_PREFIX).map(str::to_owned);
        FleetLedger {
            is_idle: self.is_idle(),
            holding: leases.iter().filter_map(|lease| short(&lease.terms.name)).collect(),
            forced: leases.forced().filter_map(short).collect(),
        }
    }

    fn begin_fleet(&self, terms: Terms, request_id: u64) -> Result<(), Full> {
        self.lock().forget_forced(&terms.name);
        self.begin(terms, Lifetime::Committed, request_id).map(drop)
    }

    /// Returns the terms of a lease that the proxy puts by itself.
    fn own_terms(&self, name: &str, reason: &str, ttl: Option<Duration>) -> Terms {
        Terms {
            name: lease_name(name),
            reason: Some(reason.to_owned()),
            by: "the fleet".to_owned(),
            mode: self.default_mode,
            ttl,
            quiet: None,
            half_closed: self.default_half_closed,
        }
    }
}

fn lease_name(name: &str) -> String {
    [FLEET_PREFIX, name].concat()
}

fn is_fleet(lease: &Lease, name: &str) -> bool {
    lease.terms.name.strip_prefix(FLEET_PREFIX) == Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::HalfClosed, pause::gate::Mode};

    fn terms(name: &str, ttl: Option<Duration>) -> Terms {
        let (name, by) = (name.to_owned(), "root on a".to_owned());
        let half_closed = HalfClosed::Serve;
        Terms { name, by, reason: None, mode: Mode::Hold, ttl, quiet: None, half_closed }
    }

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn only_the_fleet_or_force_ends_what_the_fleet_has_begun() {
        let pauses = crate::tests::pauses();
        pauses.put(terms("mine", None), Lifetime::Committed, 1).unwrap();
        pauses.put_fleet(terms("fleet/deploy", None)).unwrap();
        pauses.put_lost();
        let staying = |name| pauses.protected(name).into_iter().map(|it| (it.name, it.by));
        assert!(!pauses.lift(None, "a test") && !pauses.lift(Some("fleet/lost"), "a test"));
        assert_eq!(
            staying(None).collect::<Vec<_>>(),
            [("fleet/deploy", "root on a"), ("fleet/lost", "the fleet")]
                .map(|(name, by)| (name.to_owned(), by.to_owned()))
        );
        assert_eq!((staying(Some("mine")).len(), staying(Some("fleet/lost")).len()), (0, 1));
        assert!(!pauses.lock().holds_name("mine"));
        let ledger = pauses.fleet_ledger();
        assert_eq!((ledger.holding, ledger.forced), (names(&["deploy", "lost"]), names(&[])));

        assert!(!pauses.force(Some("fleet/deploy"), "a test") && pauses.gate.is_paused());
        assert_eq!(pauses.fleet_ledger().forced, names(&["deploy"]));
        assert!(pauses.force(None, "a test") && !pauses.gate.is_paused());
        let ledger = pauses.fleet_ledger();
        assert_eq!((ledger.holding, ledger.forced), (names(&[]), names(&["deploy", "lost"])));
        pauses.lift_fleet("lost", "the fleet");
        pauses.put_fleet(terms("fleet/deploy", None)).unwrap();
        let ledger = pauses.fleet_ledger();
        assert_eq!((ledger.holding, ledger.forced), (names(&["deploy"]), names(&[])));
        pauses.lift_fleet("deploy", "the fleet");
        assert!(!pauses.gate.is_paused());
    }

    #[test]
    fn the_time_of_a_lease_of_the_fleet_is_an_ordinary_one_and_begins_anew() {
        let pauses = crate::tests::pauses();
        let minute = Some(Duration::from_secs(60));
        pauses.begin_starting(minute);
        pauses.put_fleet(terms("fleet/a", minute)).unwrap();
        pauses.put_fleet(terms("fleet/b", Some(Duration::ZERO))).unwrap();
        let ends = || pauses.lock().iter().map(|lease| lease.ends.unwrap()).collect::<Vec<_>>();
        let before = ends();
        pauses.renew_fleet("a");
        pauses.renew_fleet("unknown");
        let after = ends();
        assert_eq!((before[0], before[2]), (after[0], after[2]));
        assert!(before[1] < after[1]);
        pauses.expire();
        assert_eq!(pauses.fleet_ledger().holding, names(&["a", "starting"]));
    }

    #[test]
    fn a_process_that_is_in_no_fleet_keeps_only_what_ends_by_itself() {
        let pauses = crate::tests::pauses();
        pauses.begin_starting(None);
        pauses.put_lost();
        pauses.put_fleet(terms("fleet/a", Some(Duration::from_secs(60)))).unwrap();
        pauses.put(terms("mine", None), Lifetime::Committed, 1).unwrap();
        pauses.fence_at(Some(Duration::ZERO));
        pauses.leave_fleet();
        assert!(pauses.gate.fence().is_none() && pauses.lock().holds_name("mine"));
        assert_eq!(pauses.fleet_ledger().holding, names(&["a"]));
    }

    #[test]
    fn idle_is_told_with_the_leases() {
        let pauses = crate::tests::pauses();
        let pass = pauses.gate.enter();
        pauses.put_fleet(terms("fleet/a", None)).unwrap();
        assert!(!pauses.fleet_ledger().is_idle);
        drop(pass);
        assert!(pauses.fleet_ledger().is_idle);
    }

    #[test]
    fn what_is_full_still_takes_the_pauses_of_the_fleet() {
        let pauses = crate::tests::pauses();
        for request_id in 1..=crate::pause::leases::LEASES_MAX as u64 {
            let terms = terms(&format!("n{request_id}"), None);
            pauses.put(terms, Lifetime::Committed, request_id).unwrap();
        }
        assert_eq!(pauses.put_fleet(terms("fleet/a", None)), Ok(()));
        pauses.put_lost();
        assert_eq!(pauses.fleet_ledger().holding, names(&["a", "lost"]));
    }
}

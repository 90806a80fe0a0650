//! A model of the proxy of one host: its ledger, its gate with the fence, and connections.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    fleet::{
        clock::BootTime,
        step::{Doing, ProxyView},
    },
    world::Micros,
};

/// Proxy of one process.
#[derive(Debug, Default)]
pub(crate) struct Proxy {
    /// Ends of the fleet's leases, by name.
    pub(crate) leases: BTreeMap<String, BootTime>,
    pub(crate) forced: BTreeSet<String>,
    pub(crate) is_starting: bool,
    pub(crate) is_lost: bool,
    /// True while it ends: nobody is admitted any more.
    pub(crate) is_draining: bool,
    pub(crate) fence: Option<BootTime>,
    /// Connections, by number.
    pub(crate) carried: BTreeSet<u64>,
    /// Ends of turns that have admitted a client, which is not counted before.
    pub(crate) turns: Vec<Micros>,
    /// Time for which the next client stays at least.
    pub(crate) stays: Micros,
}

impl Proxy {
    pub(crate) fn starting() -> Self {
        Self { is_starting: true, ..Self::default() }
    }

    pub(crate) fn admits(&self, now: BootTime) -> bool {
        let is_open = !self.is_starting && !self.is_lost && !self.is_draining;
        is_open && self.leases.is_empty() && self.fence.is_none_or(|fence| now < fence)
    }

    pub(crate) fn view(&self) -> ProxyView {
        ProxyView {
            is_idle: self.carried.is_empty(),
            held: 1,
            active: self.carried.len() as u64,
            connecting: 0,
            oldest: (!self.carried.is_empty()).then_some(Duration::from_secs(1)),
            is_starting: self.is_starting,
            is_lost: self.is_lost,
            holding: self.leases.keys().cloned().collect(),
            forced: self.forced.clone(),
        }
    }

    /// Ends the leases whose time is over; returns their names.
    pub(crate) fn expire(&mut self, now: BootTime) -> Vec<String> {
        let over = self.leases.iter().filter(|&(_, &at)| at <= now);
        let over: Vec<_> = over.map(|(name, _)| name.clone()).collect();
        over.iter().for_each(|name| _ = self.leases.remove(name));
        over
    }

    /// Carries out a deed. Its end comes behind the barrier where it stops admitting.
    pub(crate) fn carry_out(&mut self, doing: &Doing, now: BootTime, keep_for: Duration) {
        match doing {
            Doing::Pause { name, .. } => {
                self.forced.remove(name);
                self.leases.insert(name.clone(), now + keep_for);
            }
            Doing::Renew { name } => {
                self.leases.entry(name.clone()).and_modify(|at| *at = now + keep_for);
            }
            Doing::Resume { name } => {
                self.forced.remove(name);
                self.leases.remove(name);
            }
            Doing::Kill { .. } | Doing::Cut => self.carried.clear(),
            Doing::Start => self.is_starting = false,
            Doing::FenceAt(at) => self.fence = *at,
            Doing::Lose => self.is_lost = true,
            Doing::Find => self.is_lost = false,
        }
    }
}

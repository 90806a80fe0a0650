//! `Proxy`: the proxy of this host, as the fleet sees it and orders it about.

use std::time::Duration;

use super::{
    keys::Record,
    step::{Doing, ProxyView},
    terms::terms,
};
use crate::{
    handle::Handle,
    pause::fleet::{FleetLedger, LOST, STARTING},
};

/// Caller of what the fleet does by itself.
const FLEET: &str = "the fleet";

/// Proxy of this host.
#[derive(Debug)]
pub(super) struct Proxy {
    pub(super) handle: Handle,
    pub(super) keep_paused_for: Duration,
}

impl Proxy {
    /// Looks at the proxy. Leases and idleness are those of one moment.
    pub(super) fn view(&self) -> ProxyView {
        let ledger = self.handle.pauses().fleet_ledger();
        let FleetLedger { is_idle, mut holding, mut forced } = ledger;
        let mut take = |name| holding.remove(name) | forced.remove(name);
        let (is_starting, is_lost) = (take(STARTING), take(LOST));
        let balance = self.handle.balance();
        let steered = self.handle.pauses().steer().map_or(0, |steer| steer.status().active);
        ProxyView {
            is_idle,
            held: balance.held,
            active: balance.active + steered,
            connecting: balance.connecting,
            oldest: self.handle.oldest(),
            is_starting,
            is_lost,
            holding,
            forced,
        }
    }

    /// Carries an order out.
    pub(super) fn carry_out(&self, doing: &Doing) {
        let pauses = self.handle.pauses();
        match doing {
            Doing::Pause { name, record } => self.pause(name, record),
            Doing::Renew { name } => pauses.renew_fleet(name),
            Doing::Resume { name } => pauses.lift_fleet(name, FLEET),
            Doing::Kill { name } => drop(pauses.kill(&format!("the pause {name} of the fleet"))),
            Doing::Start => pauses.lift_fleet(STARTING, FLEET),
            Doing::FenceAt(at) => pauses.fence_at(at.map(|at| at.0)),
            Doing::Lose => pauses.put_lost(),
            Doing::Find => pauses.lift_fleet(LOST, FLEET),
            Doing::Cut => drop(pauses.kill("the fleet, which is out of reach,")),
        }
    }

    fn pause(&self, name: &str, record: &Record) {
        let pauses = self.handle.pauses();
        let defaults = (pauses.default_mode, pauses.default_half_closed);
        let terms = terms(name, record, self.keep_paused_for, defaults);
        if pauses.put_fleet(terms).is_err() {
            log::error!(
                "the pause {name} of the fleet cannot be kept, as there are as many pauses as may be; end some"
            );
        }
    }
}

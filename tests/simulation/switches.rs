//! Switches of the upstream at any time: between two groups of addresses, of which one is present.

use crate::{config::address::Address, drive::Course, kernel::Kernel, sys::SocketAddress};

/// The groups of addresses, and where dials may lead.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Switches {
    /// The group that is present.
    pub(crate) present: usize,
    /// The group before a switch in this turn, at which dials may still begin.
    before: Option<usize>,
}

impl Switches {
    /// A turn begins: from now on, all dials lead to what is present.
    pub(crate) fn begin_turn(&mut self) {
        self.before = None;
    }
}

/// Returns the addresses of a group.
pub(crate) fn addresses(group: usize, sites: usize) -> Box<[SocketAddress]> {
    let address = |site| SocketAddress::Inet(([127, 0, 0, 1], site).into());
    let sites = group * sites..(group + 1) * sites;
    sites.map(|site| address(u16::try_from(site).unwrap())).collect()
}

impl Kernel {
    /// Returns the group of an address that is dialled.
    pub(crate) fn group_of(&self, site: usize) -> usize {
        if !self.rules.switches {
            return 0;
        }
        let group = site / (self.rules.sites / 2);
        let Switches { present, before } = self.switches;
        assert!(group == present || Some(group) == before, "an earlier upstream is dialled");
        group
    }
}

impl Course {
    /// Switches the upstream. There is one switch in a turn, as each waits for the end of the turn in which it was made.
    pub(crate) fn switch(&mut self) {
        let Switches { present, before } = crate::with(|kernel| kernel.switches);
        if !self.rules.switches || before.is_some() {
            return;
        }
        let group = 1 - present;
        let upstream = &self.shared.upstream;
        let other = Address::tcp("other", 1);
        let address = if group == 0 { upstream.configured() } else { &other };
        let target = upstream.prepare(address).expect("there are two");
        upstream.switch_to(&target, addresses(group, self.rules.sites / 2));
        self.shared.workers.wake_all();
        (self.away_since, self.rests_in_outage) = (None, false);
        crate::with(|kernel| {
            kernel.switches = Switches { present: group, before: Some(present) };
            kernel.tally.switches += 1;
            // The probe of the earlier upstream is none of this one.
            kernel.links.iter_mut().for_each(|link| link.story.is_probe = false);
        });
    }

    /// Checks as a turn ends that each dial and each relay counts as a connection to an upstream.
    pub(crate) fn look_at_targets(&self) {
        let targets = self.shared.upstream.targets().list();
        let counted: u64 = targets.iter().map(|target| target.connections()).sum();
        let counters = self.shared.workers.counters(0);
        let used = counters.connecting.get() + counters.active.get();
        assert_eq!(counted, used, "connections are not counted as what they lead to");
        assert!(targets.len() <= 2, "there are two upstreams");
    }
}

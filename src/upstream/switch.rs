//! The switch to another upstream while the proxy runs. New connections lead to it, and those that are there stay.

use std::{
    io,
    sync::{Arc, MutexGuard, PoisonError, TryLockError, atomic::Ordering},
};

use super::{
    Cached, Present, Upstream,
    names::{is_name, look_up},
    targets::{Target, TargetUse, Targets, TooMany, UpstreamId},
};
use crate::{config::address::Address, error::Error, sys::SocketAddress};

impl Upstream {
    /// Returns the present upstream, which new connections lead to.
    pub(crate) fn target(&self) -> Arc<Target> {
        Arc::clone(&self.lock().target)
    }

    /// Returns all upstreams that may have connections.
    pub(crate) fn targets(&self) -> &Targets {
        &self.targets
    }

    /// Returns the number of connections to `address`, also by other spellings of it, as far as this needs no look-up.
    pub(crate) fn connections_to(&self, address: &Address) -> u64 {
        self.targets.connections_to(address, &known(address))
    }

    /// Returns the upstreams with connections if `address` is a name of none of them. It would have to be looked up to tell
    /// if it is one of them by another name.
    pub(crate) fn upstreams_beside(&self, address: &Address) -> Vec<String> {
        if !is_name(address) || self.targets.find(address).is_some() {
            return Vec::new();
        }
        let used = self.targets.list().into_iter().filter(|target| target.connections() > 0);
        used.map(|target| target.address().to_string()).collect()
    }

    /// Returns true if new connections lead to `target`, by what a worker knows in this turn.
    pub(crate) fn is_present(&self, cached: &mut Cached, target: &Arc<Target>) -> bool {
        Arc::ptr_eq(&self.present(cached).target, target)
    }

    /// Returns true if `address` is the present upstream, or one of its socket addresses that connections are not counted for.
    pub(crate) fn leads_to(&self, address: &Address) -> bool {
        if let Some(target) = self.targets.find(address) {
            return Arc::ptr_eq(&target, &self.target());
        }
        known(address).iter().any(|it| self.known().list().contains(it))
    }

    /// Counts a connection that was described in another process as one to the upstream `id`.
    pub(crate) fn restore_use(&self, id: UpstreamId) -> TargetUse {
        self.targets.get(id).unwrap_or_else(|| self.target()).begin_use()
    }

    /// Names the listener of tcpause that one of these addresses leads to, if there is one.
    pub(crate) fn find_own(&self, found: &[SocketAddress]) -> Option<String> {
        found.iter().find_map(|address| self.guard.find(address)).map(ToString::to_string)
    }

    /// Makes room for `address` among the upstreams that connections lead to.
    pub(crate) fn prepare(&self, address: &Address) -> Result<Arc<Target>, TooMany> {
        self.targets.add(address, &self.target())
    }

    /// Excludes other switches. Otherwise the state file could remember them in another order than the workers.
    pub(crate) fn lock_switches(&self) -> MutexGuard<'_, ()> {
        self.switching.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Excludes switches, unless one is being made, perhaps for a caller that was given up.
    pub(crate) fn try_lock_switches(&self) -> Option<MutexGuard<'_, ()>> {
        match self.switching.try_lock() {
            Ok(order) => Some(order),
            Err(TryLockError::Poisoned(poison)) => Some(poison.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Remembers `address` in the state file. Returns false if there is none.
    pub(crate) fn remember(&self, address: &Address) -> io::Result<bool> {
        match &self.state_file {
            Some(file) => file.write(&self.configured, address).map(|()| true),
            None => Ok(false),
        }
    }

    /// Remembers the present upstream, as the state file may be another one, or written against another configuration.
    pub(crate) fn remember_present(&self) {
        let _order = self.lock_switches();
        if let Err(error) = self.remember(self.target().address()) {
            log::error!(
                "upstream.state-file cannot be written: {error}; a restart may forget the switch of the upstream"
            );
        }
    }

    /// Counts a switch that was done, or one that was refused.
    pub(crate) fn count_switch(&self, was_done: bool) {
        let [done, refused] = &self.switches;
        if was_done { done } else { refused }.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns true if a switch outlives this process.
    pub(crate) fn is_persistent(&self) -> bool {
        self.state_file.is_some()
    }

    /// Leads new connections to `target`, which was `found` at these addresses. Returns the upstream before. A dial may begin
    /// at that until the end of each worker's turn.
    pub(crate) fn switch_to(
        &self,
        target: &Arc<Target>,
        found: Box<[SocketAddress]>,
    ) -> Arc<Target> {
        let (list, own, _listeners) = self.without_own(found);
        target.is_at(&list);
        let mut present = self.lock();
        let addresses = present.addresses.replaced_by(list.into(), own.into());
        let next = Present { target: Arc::clone(target), addresses: Arc::new(addresses) };
        let before = std::mem::replace(&mut *present, next);
        self.changes.fetch_add(1, Ordering::Release);
        // Behind the change: a dial of the earlier upstream that fails from now on is not reported. The failure of one that a
        // worker judges at this moment may open the breaker again, and the first probe closes it.
        self.breaker.begin_anew(target.probe());
        before.target
    }

    /// Leads connections to the address that the state file remembers, if it was written against this configuration.
    pub(crate) fn recall(&self) -> Result<(), Error> {
        let Some(file) = &self.state_file else { return Ok(()) };
        let Some(address) = file.recall(&self.configured)? else { return Ok(()) };
        let found = known(&address);
        if let Some(own) = self.find_own(&found) {
            return Err(Error::Config(format!(
                "{file} remembers {address}, which leads back to {own}; remove the file if upstream.addr is the right one"
            )));
        }
        if address != self.configured {
            let target = self.targets.add_beyond(address);
            self.switch_to(&target, found);
        }
        Ok(())
    }
}

/// Returns the socket addresses of an upstream that needs no look-up. A name has none yet.
pub(crate) fn known(address: &Address) -> Box<[SocketAddress]> {
    if is_name(address) { [].into() } else { look_up(address).unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::breaker::Cause;

    #[test]
    fn probes_of_earlier_upstreams_keep_no_later_one_from_being_probed() {
        let upstream = crate::tests::upstream();
        let mut probes = vec![upstream.breaker().take_probe().unwrap()];
        for port in [1, 2, 3] {
            let target = upstream.prepare(&Address::tcp("127.0.0.1", port)).unwrap();
            upstream.switch_to(&target, [].into());
            upstream.breaker().failed(Cause::Away, false, std::time::Instant::now());
            probes.push(upstream.breaker().take_probe().expect("a permit of its own"));
            assert!(upstream.breaker().take_probe().is_none());
        }
    }

    #[test]
    fn a_switch_replaces_the_addresses_and_ends_an_outage() {
        let upstream = crate::tests::upstream();
        let mut cached = Cached::default();
        let before = Arc::clone(&upstream.present(&mut cached).target);
        let old = before.begin_use();
        upstream.breaker().failed(Cause::Away, false, std::time::Instant::now());
        let address = Address::tcp("127.0.0.2", 9);
        let target = upstream.prepare(&address).unwrap();
        assert!(upstream.is_present(&mut cached, &before), "it is only prepared");
        let earlier = upstream.switch_to(&target, known(&address));
        assert!(Arc::ptr_eq(&earlier, &before) && !upstream.breaker().is_open());
        assert!(!upstream.is_present(&mut cached, old.target()));
        assert!(upstream.leads_to(&address));
        assert!(!upstream.leads_to(before.address()) && !upstream.leads_to(&Address::tcp("a", 9)));
        let Present { target, addresses } = upstream.present(&mut cached);
        assert_eq!(target.address(), &address);
        assert_eq!(addresses.list().len(), 1);
        assert_eq!(addresses.list()[0].to_string(), "tcp://127.0.0.2:9");
        assert_eq!((before.connections(), target.connections()), (1, 0));
        // A look-up of the earlier name that ends now is of no interest.
        assert!(!upstream.publish_for(&before, known(before.address())));
        assert_eq!(upstream.read(&mut cached).list()[0].to_string(), "tcp://127.0.0.2:9");
    }
}

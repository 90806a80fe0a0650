//! `Targets`: the upstreams that connections lead to. One is present and gets all new connections. Those before it keep the
//! connections that they have.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};

use crate::{
    admission::semaphore::{Permit, Semaphore},
    config::address::Address,
    sys::SocketAddress,
};

/// Most earlier upstreams that still have connections.
const EARLIER_MAX: usize = 8;

/// Number of an upstream among those that connections lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct UpstreamId(u8);

/// An upstream that connections lead to.
#[derive(Debug)]
pub(crate) struct Target {
    id: UpstreamId,
    address: Address,
    /// Its socket addresses, as they were last known.
    sockets: Mutex<Box<[SocketAddress]>>,
    /// Number of dials and of relayed connections.
    connections: AtomicU64,
    /// The permit to probe it while it is away. A probe of another upstream, however long it takes, does not count.
    probe: Arc<Semaphore>,
    watcher: Arc<Watcher>,
}

/// The use of an upstream by one connection, which counts as long as this lives. It is dropped after the socket.
#[derive(Debug)]
pub(crate) struct TargetUse(Arc<Target>);

/// All upstreams that may have connections, in the order in which they were first used.
#[derive(Debug, Default)]
pub(crate) struct Targets {
    list: Mutex<Vec<Arc<Target>>>,
    watcher: Arc<Watcher>,
}

/// Callback at each moment at which an upstream has lost its last connection.
#[derive(Default)]
struct Watcher(OnceLock<Box<dyn Fn() + Send + Sync>>);

/// Refusal of one more upstream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooMany;

/// Words of an upstream that connections lead to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TargetWords {
    id: UpstreamId,
    address: String,
    #[serde(default, skip_serializing_if = "<[_]>::is_empty")]
    sockets: Box<[SocketAddress]>,
}

impl UpstreamId {
    /// Returns true for the upstream of connections that were described without one.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Target {
    /// Returns its number, by which the connections of another process name it.
    pub(crate) fn id(&self) -> UpstreamId {
        self.id
    }

    /// Returns its address as it was configured or asked for.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// Returns the number of connections that lead to it, with those that are being dialled.
    pub(crate) fn connections(&self) -> u64 {
        // Sequentially consistent, as a waiter first asks to be told of the last one.
        self.connections.load(Ordering::SeqCst)
    }

    /// Remembers its socket addresses. A failed look-up tells none, and takes none away.
    pub(super) fn is_at(&self, sockets: &[SocketAddress]) {
        if !sockets.is_empty() {
            *self.lock_sockets() = sockets.into();
        }
    }

    fn lock_sockets(&self) -> MutexGuard<'_, Box<[SocketAddress]>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the permit to probe it.
    pub(super) fn probe(&self) -> &Arc<Semaphore> {
        &self.probe
    }

    /// Returns a permit for a probe that was under way in another process.
    pub(crate) fn restore_probe(&self) -> Permit {
        self.probe.take_beyond()
    }

    /// Counts a connection.
    pub(crate) fn begin_use(self: &Arc<Self>) -> TargetUse {
        self.connections.fetch_add(1, Ordering::SeqCst);
        TargetUse(Arc::clone(self))
    }
}

impl TargetUse {
    /// Returns the upstream that the connection leads to.
    pub(crate) fn target(&self) -> &Arc<Target> {
        &self.0
    }
}

impl Drop for TargetUse {
    fn drop(&mut self) {
        if self.0.connections.fetch_sub(1, Ordering::SeqCst) == 1
            && let Some(watcher) = self.0.watcher.0.get()
        {
            watcher();
        }
    }
}

impl Targets {
    /// Registers the callback for each moment at which an upstream has lost its last connection. It runs on the thread that
    /// has closed it. There is one callback.
    pub(crate) fn watch(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.watcher.0.get_or_init(|| Box::new(watcher));
    }

    /// Returns all that may have connections.
    pub(crate) fn list(&self) -> Vec<Arc<Target>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the upstream at `address`, if it is among them.
    pub(crate) fn find(&self, address: &Address) -> Option<Arc<Target>> {
        self.list().into_iter().find(|target| target.address == *address)
    }

    /// Returns the number of connections to `address`, also to those of its `sockets` that lead there by another name.
    pub(super) fn connections_to(&self, address: &Address, sockets: &[SocketAddress]) -> u64 {
        let is_meant = |target: &&Arc<Target>| {
            let has_socket = || sockets.iter().any(|it| target.lock_sockets().contains(it));
            target.address == *address || has_socket()
        };
        self.list().iter().filter(is_meant).map(|target| target.connections()).sum()
    }

    /// Returns the upstream at `address`, which is added if it is none of them, beside the `present` one. Those without
    /// connections are forgotten.
    pub(super) fn add(
        &self,
        address: &Address,
        present: &Arc<Target>,
    ) -> Result<Arc<Target>, TooMany> {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|it| it.connections() > 0 || Arc::ptr_eq(it, present));
        if let Some(known) = list.iter().find(|target| target.address == *address) {
            return Ok(Arc::clone(known));
        }
        let earlier = list.iter().filter(|target| target.connections() > 0).count();
        if earlier > EARLIER_MAX {
            return Err(TooMany);
        }
        Ok(self.insert(&mut list, None, address.clone()))
    }

    /// Adds an upstream, whatever their number.
    pub(super) fn add_beyond(&self, address: Address) -> Arc<Target> {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        self.insert(&mut list, None, address)
    }

    /// Returns the upstream with this number, if it is among them.
    pub(super) fn get(&self, id: UpstreamId) -> Option<Arc<Target>> {
        self.list().into_iter().find(|target| target.id == id)
    }

    /// Describes them for a hand-over.
    pub(super) fn describe(&self) -> Vec<TargetWords> {
        let words = |target: &Arc<Target>| {
            let Target { id, address, sockets: _, connections: _, probe: _, watcher: _ } =
                &**target;
            let sockets = target.lock_sockets().clone();
            TargetWords { id: *id, address: address.to_string(), sockets }
        };
        self.list().iter().map(words).collect()
    }

    /// Replaces them by those that were described. No connection leads to any of them yet.
    pub(super) fn restore(&self, words: &[TargetWords]) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.clear();
        for TargetWords { id, address, sockets } in words {
            if let Ok(address) = address.parse() {
                self.insert(&mut list, Some(*id), address).is_at(sockets);
            }
        }
    }

    fn insert(
        &self,
        list: &mut Vec<Arc<Target>>,
        id: Option<UpstreamId>,
        address: Address,
    ) -> Arc<Target> {
        let is_free = |id: &UpstreamId| list.iter().all(|target| target.id != *id);
        let free = || (0..=u8::MAX).map(UpstreamId).find(is_free).unwrap_or_default();
        let id = id.unwrap_or_else(free);
        let watcher = Arc::clone(&self.watcher);
        let (connections, probe) = (AtomicU64::new(0), Arc::new(Semaphore::new(1)));
        let target = Target { id, address, sockets: Mutex::default(), connections, probe, watcher };
        let target = Arc::new(target);
        list.push(Arc::clone(&target));
        target
    }
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watcher")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn address(port: usize) -> Address {
        Address::tcp("127.0.0.1", u16::try_from(port).unwrap())
    }

    #[test]
    fn the_last_connection_of_an_upstream_is_told() {
        let (targets, told) = (Targets::default(), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&told);
        targets.watch(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let first = targets.add_beyond(address(1));
        let uses = [first.begin_use(), first.begin_use()];
        let second = targets.add(&address(2), &first).unwrap();
        let other = second.begin_use();
        assert_eq!((first.connections(), second.connections()), (2, 1));
        let [one, two] = uses;
        drop(one);
        assert_eq!(told.load(Ordering::SeqCst), 0);
        drop(two);
        assert_eq!((told.load(Ordering::SeqCst), first.connections()), (1, 0));
        drop(other);
        assert_eq!(told.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn eight_earlier_ones_may_have_connections() {
        let targets = Targets::default();
        let mut present = targets.add_beyond(address(0));
        let mut uses = vec![present.begin_use()];
        for port in 1..=EARLIER_MAX {
            present = targets.add(&address(port), &present).unwrap();
            uses.push(present.begin_use());
        }
        assert_eq!(targets.add(&address(9), &present).unwrap_err(), TooMany);
        let back = targets.add(&address(3), &present).unwrap();
        assert_eq!(back.connections(), 1, "it is one of them, and keeps its connections");
        uses.remove(5);
        let new = targets.add(&address(9), &present).unwrap();
        assert_eq!((new.id(), targets.find(&address(5)).is_none()), (UpstreamId(5), true));
        assert_eq!(targets.list().len(), EARLIER_MAX + 1);
    }

    #[test]
    fn connections_count_for_every_spelling_of_their_upstream() {
        let (targets, taker) = (Targets::default(), Targets::default());
        let [here, there] = [1, 2]
            .map(|port| SocketAddress::Inet(std::net::SocketAddr::from(([127, 0, 0, 1], port))));
        let named = targets.add_beyond("LocalHost:1".parse().unwrap());
        named.is_at(std::slice::from_ref(&here));
        named.is_at(&[]);
        let count = |targets: &Targets, text: &str, socket: Option<&SocketAddress>| {
            targets.connections_to(&text.parse().unwrap(), socket.map_or(&[], std::slice::from_ref))
        };
        let _use = named.begin_use();
        assert_eq!(count(&targets, "LOCALHOST:1", None), 1);
        assert_eq!(count(&targets, "127.0.0.1:1", Some(&here)), 1);
        assert_eq!(count(&targets, "127.0.0.1:2", Some(&there)), 0);
        taker.restore(&targets.describe());
        let _restored = taker.get(UpstreamId(0)).unwrap().begin_use();
        assert_eq!(count(&taker, "127.0.0.1:1", Some(&here)), 1);
    }

    #[test]
    fn they_are_handed_over_with_their_numbers() {
        let [giver, taker] = [(); 2].map(|()| Targets::default());
        let present = giver.add_beyond(address(1));
        let _use = present.begin_use();
        giver.add(&address(2), &present).unwrap();
        taker.add_beyond(address(7));
        let words = giver.describe();
        taker.restore(&words);
        assert_eq!(taker.describe(), words);
        assert_eq!(taker.get(UpstreamId(1)).unwrap().address(), &address(2));
    }
}

//! `Addresses`: the upstream's addresses, and the one at which attempts begin.
//!
//! Attempts begin at the address that was reached last. Those before it may be dead, and each of them would cost every
//! client 300 ms. An attempt that runs out of time leaves the remaining addresses to the next one.
//!
//! Workers share this without a lock. An attempt moves the start only from the address at which it began itself, and
//! only if no attempt has reached that address since. So one lost SYN does not send the other clients elsewhere.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    config::duration::nanos,
    sys::{self, SocketAddress},
};

/// Interval at which one client tries an address before the start. Only that client waits for it.
const EXPLORE_INTERVAL: Duration = Duration::from_secs(10);

/// The upstream's addresses in the resolver's order.
#[derive(Debug)]
pub(crate) struct Addresses {
    list: Box<[SocketAddress]>,
    /// Addresses of the upstream that are tcpause's own, and are not dialled.
    own: Box<[SocketAddress]>,
    /// Number that tells this list from earlier ones.
    number: usize,
    /// Index at which attempts begin.
    start: AtomicUsize,
    /// Set if the last attempt at the start has reached it.
    is_start_good: AtomicBool,
    begin: Instant,
    /// Time at which an address before the start is tried again, in nanoseconds after `begin`.
    explore_at: AtomicU64,
    /// Number of such tries so far, which selects a different address each time.
    explored: AtomicUsize,
}

/// Path of one attempt through the addresses.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Route {
    /// Number of the list that it was made for.
    number: usize,
    /// Index of the start when the attempt began.
    origin: usize,
    /// Index of the address that is tried now.
    at: usize,
    /// Number of addresses that follow.
    left: usize,
    /// Set while the present address is one before the origin, which follows.
    explores: bool,
    /// Set if the origin did not answer in time and is tried once more at the end.
    returns: bool,
}

/// Words of a route. The number of its list means nothing in another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RouteWords {
    origin: usize,
    at: usize,
    left: usize,
    explores: bool,
    returns: bool,
}

/// Number that no list has.
const FOREIGN: usize = usize::MAX;

impl Addresses {
    /// Returns a list whose attempts begin at its first address.
    pub(crate) fn new(list: Box<[SocketAddress]>) -> Self {
        Self {
            list,
            own: [].into(),
            number: 0,
            start: AtomicUsize::new(0),
            is_start_good: AtomicBool::new(false),
            begin: sys::now(),
            explore_at: AtomicU64::new(0),
            explored: AtomicUsize::new(0),
        }
    }

    /// Returns the list that replaces this one. The start stays at its address if the new list has it, and if an
    /// attempt has chosen it: the first address may be the start by default alone.
    pub(crate) fn replaced_by(
        &self,
        list: Box<[SocketAddress]>,
        own: Box<[SocketAddress]>,
    ) -> Self {
        let start = self.start.load(Relaxed);
        let is_chosen = start > 0 || self.is_start_good.load(Relaxed);
        let chosen = self.list.get(start).filter(|_| is_chosen);
        let start = list.iter().position(|address| Some(address) == chosen).unwrap_or_default();
        let number = self.number.wrapping_add(1);
        Self { own, number, start: AtomicUsize::new(start), ..Self::new(list) }
    }

    /// Returns all addresses, in order.
    pub(crate) fn list(&self) -> &[SocketAddress] {
        &self.list
    }

    /// Returns the addresses of the upstream that are tcpause's own.
    pub(crate) fn own(&self) -> &[SocketAddress] {
        &self.own
    }

    /// Explains, for the log, why there is nothing to dial.
    pub(crate) fn lack(&self) -> &'static str {
        if self.own.is_empty() { "its name is not known" } else { "it is tcpause itself" }
    }

    /// Begins an attempt. If it may explore, at the time `explores_at`, and that is due, an address before the start
    /// comes first.
    pub(crate) fn route(&self, explores_at: Option<Instant>) -> Route {
        let origin = self.start.load(Relaxed);
        let explored = explores_at.and_then(|now| self.explore(origin, now));
        let others = self.list.len().saturating_sub(1);
        Route {
            number: self.number,
            origin,
            at: explored.unwrap_or(origin),
            left: others + usize::from(explored.is_some()),
            explores: explored.is_some(),
            returns: false,
        }
    }

    /// Chooses an address before `start` to be tried again, if that is due and no other client has taken this turn.
    fn explore(&self, start: usize, now: Instant) -> Option<usize> {
        let due = self.explore_at.load(Relaxed);
        let next = self.nanos(now + EXPLORE_INTERVAL);
        let is_due = start > 0 && due <= self.nanos(now);
        let is_mine = || self.explore_at.compare_exchange(due, next, Relaxed, Relaxed).is_ok();
        (is_due && is_mine()).then(|| self.explored.fetch_add(1, Relaxed) % start)
    }

    /// Returns the present address of a route. A route through an older list continues in this one.
    pub(crate) fn get(&self, route: &Route) -> Option<&SocketAddress> {
        self.list.get(route.at.checked_rem(self.list.len())?)
    }

    /// Moves a route from its present address, which has failed, to the next one. Returns false if there is none.
    ///
    /// An origin that has `timed_out` is tried again behind all others, for the remaining time: its SYN may have been
    /// lost.
    pub(crate) fn advance(&self, route: &mut Route, timed_out: bool) -> bool {
        let is_origin = !route.explores && route.at == route.origin;
        let is_lost = timed_out && is_origin && !route.returns && self.list.len() > 1;
        let returns = route.returns || is_lost;
        let Some(left) = (route.left + usize::from(is_lost)).checked_sub(1) else { return false };
        self.take_good_start(route);
        let behind = (route.at + 1).checked_rem(self.list.len()).unwrap_or_default();
        let at = if route.explores || returns && left == 0 { route.origin } else { behind };
        *route = Route { at, left, explores: false, returns, ..*route };
        true
    }

    /// Records that the present address of a route was reached. Returns true if this moves the start there.
    pub(crate) fn reached(&self, route: &Route, now: Instant) -> bool {
        let has_moved = self.move_start(route, route.at, now);
        // The flag is written only on a change, as all workers read it.
        if (has_moved || self.is_at_start(route)) && !self.is_start_good.load(Relaxed) {
            self.is_start_good.store(true, Relaxed);
        }
        has_moved
    }

    /// Records that an attempt has run out of time. The next one begins at the address that was under way, or behind it
    /// if that address had all of the time.
    pub(crate) fn ran_out(&self, route: &Route, now: Instant) {
        let had_all = self.is_at_start(route);
        let next = (route.at + usize::from(had_all)).checked_rem(self.list.len());
        if !route.explores && !self.take_good_start(route) {
            self.move_start(route, next.unwrap_or_default(), now);
        }
    }

    /// Clears the mark of a good start if the route has failed there. Returns true if it was set.
    fn take_good_start(&self, route: &Route) -> bool {
        self.is_at_start(route) && self.is_start_good.swap(false, Relaxed)
    }

    /// Returns true if the present address of a route is the one at which it began, and attempts still begin there. The mark
    /// of a good start says nothing about an earlier start.
    fn is_at_start(&self, route: &Route) -> bool {
        let is_at_origin = route.number == self.number && route.at == route.origin;
        is_at_origin && self.start.load(Relaxed) == route.origin
    }

    fn move_start(&self, route: &Route, to: usize, now: Instant) -> bool {
        let is_needless = !route.explores && self.is_start_good.load(Relaxed);
        if is_needless || route.number != self.number || route.origin == to {
            return false;
        }
        // This comes first, or another client would explore at once.
        self.explore_at.store(self.nanos(now + EXPLORE_INTERVAL), Relaxed);
        self.start.compare_exchange(route.origin, to, Relaxed, Relaxed).is_ok()
    }

    fn nanos(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.begin))
    }
}

impl Default for Addresses {
    fn default() -> Self {
        Self::new([].into())
    }
}

impl Route {
    /// Returns its words.
    pub(crate) fn describe(&self) -> RouteWords {
        let Self { number: _, origin, at, left, explores, returns } = *self;
        RouteWords { origin, at, left, explores, returns }
    }

    /// Returns the route of `words`. It continues in the present list, and moves no start there.
    pub(crate) fn rebuild(words: RouteWords) -> Self {
        let RouteWords { origin, at, left, explores, returns } = words;
        Self { number: FOREIGN, origin, at, left, explores, returns }
    }

    /// Returns true if no other address follows.
    pub(crate) fn is_last(&self) -> bool {
        self.left == 0
    }

    /// Returns true if the present address is one before the start, tried out of turn.
    pub(crate) fn explores(&self) -> bool {
        self.explores
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(count: u16) -> Addresses {
        let address = |port| SocketAddress::Inet(([127, 0, 0, 1], port).into());
        Addresses::new((0..count).map(address).collect())
    }

    /// Returns the order in which an attempt tries the addresses.
    fn order(addresses: &Addresses, mut route: Route) -> Vec<usize> {
        let mut order = vec![route.at];
        while addresses.advance(&mut route, false) {
            order.push(route.at);
        }
        assert!(route.is_last());
        order
    }

    /// Makes an attempt that has advanced `steps` times.
    fn go(addresses: &Addresses, steps: usize) -> Route {
        let mut route = addresses.route(None);
        (0..steps).for_each(|_| assert!(addresses.advance(&mut route, false)));
        route
    }

    #[test]
    fn attempts_begin_where_one_has_got_through_and_reach_all() {
        let addresses = addresses(4);
        assert_eq!(order(&addresses, addresses.route(None)), [0, 1, 2, 3]);
        let (now, slow) = (addresses.begin, go(&addresses, 1));
        assert!(addresses.reached(&go(&addresses, 2), now));
        assert_eq!(order(&addresses, addresses.route(None)), [2, 3, 0, 1]);
        assert!(!addresses.reached(&slow, now), "it has begun before");
        addresses.ran_out(&slow, now);
        assert_eq!(addresses.route(None).at, 2);
        assert!(!addresses.reached(&addresses.route(None), now), "nothing is new");
    }

    #[test]
    fn an_attempt_that_runs_out_of_time_leaves_the_rest_to_the_next() {
        let addresses = addresses(5);
        let now = addresses.begin;
        for (steps, start) in [(3, 3), (2, 0), (0, 1), (0, 2), (4, 1)] {
            addresses.ran_out(&go(&addresses, steps), now);
            assert_eq!(addresses.route(None).at, start);
        }
    }

    #[test]
    fn one_that_fails_where_others_get_through_moves_nothing() {
        let addresses = addresses(3);
        let now = addresses.begin;
        let reach = || assert!(!addresses.reached(&go(&addresses, 0), now));
        let start = || addresses.route(None).at;
        reach();
        let (slow, unlucky) = (go(&addresses, 1), go(&addresses, 0));
        reach();
        addresses.ran_out(&slow, now);
        assert!(!addresses.reached(&slow, now));
        addresses.ran_out(&unlucky, now);
        assert_eq!(start(), 0, "it may have been a SYN that was lost");
        addresses.ran_out(&go(&addresses, 0), now);
        assert_eq!(start(), 1, "it was not");
    }

    #[test]
    fn one_that_fails_where_none_begins_any_more_says_nothing_about_the_start() {
        let addresses = addresses(3);
        let now = addresses.begin;
        let (mut early, late) = (go(&addresses, 0), go(&addresses, 0));
        assert!(addresses.reached(&go(&addresses, 2), now));
        assert!(addresses.advance(&mut early, true));
        let start = || addresses.route(None).at;
        addresses.ran_out(&go(&addresses, 0), now);
        assert_eq!(start(), 2, "it may have been a SYN that was lost");
        addresses.reached(&late, now);
        addresses.ran_out(&go(&addresses, 0), now);
        assert_eq!(start(), 0, "it was not");
    }

    #[test]
    fn an_origin_that_has_not_answered_is_tried_again_behind_the_others() {
        let addresses = addresses(3);
        let mut route = addresses.route(None);
        let mut steps = vec![route.at];
        while addresses.advance(&mut route, true) {
            steps.push(route.at);
        }
        assert_eq!(steps, [0, 1, 2, 0]);
        // After a refusal, the origin is not tried again.
        let mut route = addresses.route(None);
        assert!(addresses.advance(&mut route, false));
        assert!(addresses.advance(&mut route, true));
        assert!(route.is_last());
    }

    #[test]
    fn a_route_from_another_process_goes_on_and_moves_no_start() {
        let addresses = addresses(3);
        let route = Route::rebuild(go(&addresses, 1).describe());
        assert_eq!(order(&addresses, route), [1, 2]);
        assert!(!addresses.reached(&route, addresses.begin));
        addresses.ran_out(&route, addresses.begin);
        assert_eq!(addresses.route(None).at, 0);
    }

    #[test]
    fn one_client_at_a_time_tries_an_address_before_the_start() {
        let addresses = addresses(4);
        let at = |seconds| addresses.begin + Duration::from_secs(seconds);
        let explores = |seconds| addresses.route(Some(at(seconds))).explores();
        assert!(!explores(100), "none is before it");
        assert!(addresses.reached(&go(&addresses, 2), at(100)));
        assert!(!explores(100) && !explores(109));
        assert_eq!(order(&addresses, addresses.route(Some(at(110)))), [0, 2, 3, 0, 1]);
        assert!(!explores(110) && !explores(119));
        let route = addresses.route(Some(at(120)));
        assert_eq!((route.at, addresses.route(Some(at(120))).at), (1, 2));
        // The address in use answers all the while.
        addresses.reached(&addresses.route(None), at(120));
        assert!(addresses.reached(&route, at(120)));
        assert_eq!(addresses.route(None).at, 1);
        assert!(explores(130));
    }

    #[test]
    fn another_list_keeps_the_address_that_is_in_use() {
        let before = addresses(3);
        let reversed = || before.list().iter().rev().cloned().collect();
        assert_eq!(before.replaced_by(reversed(), [].into()).route(None).at, 0, "none is in use");
        let old = go(&before, 1);
        assert!(before.reached(&go(&before, 2), before.begin));
        let after = before.replaced_by(reversed(), [].into());
        assert_eq!(after.get(&after.route(None)), before.list().last());
        assert!(!after.reached(&old, after.begin), "it has gone through another list");
        after.ran_out(&old, after.begin);
        assert_eq!(after.route(None).at, 0);
        let shorter = after.replaced_by(before.list()[..1].into(), [].into());
        let (mut route, address) = (go(&after, 2), before.list().first());
        assert_eq!((shorter.get(&route), after.get(&route)), (address, address));
        assert!(!shorter.advance(&mut route, false));
        assert_eq!(Addresses::default().get(&Route::default()), None);
    }
}

//! The pace of a crowd: how many of it are under way at a time, found as TCP finds its congestion window (RFC 5681).
//!
//! What is full here is the upstream's backlog. It begins with few; each that gets through lets one more go, and a loss halves
//! their number. A SYN that finds no room is dropped, and the kernel repeats it after a second, then ever more slowly. Where an
//! answer is known to take no time, one that is not answered is given up much sooner, and its client goes again when the
//! window lets it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::semaphore::{Permit, Semaphore};
use crate::{
    config::duration::nanos,
    sys::{self, Socket},
};

/// How many are under way at first: a backlog of 5, the smallest in wide use, takes 6.
const WINDOW_INITIAL: usize = 4;
/// After how long without news the window begins anew: the upstream may be another one by then.
const IDLE_MAX: Duration = Duration::from_secs(1);
/// How long a SYN may be without an answer however near the upstream is: its host may be busy.
pub(crate) const SYN_TIMEOUT_MIN: Duration = Duration::from_millis(20);
/// Where it may be so for as long as this, the kernel's own timer decides.
const SYN_TIMEOUT_MAX: Duration = Duration::from_millis(300);
/// How many round trips an answer may take.
const ROUND_TRIPS_MAX: u32 = 4;

/// The window, and what it is made out by. All workers share it.
#[derive(Debug)]
pub(crate) struct Pace {
    begin: Instant,
    max: usize,
    /// The places of those under way: as many as there may be now.
    window: Arc<Semaphore>,
    /// Below it the window grows with each that gets through, and from it on with each window of them (`ssthresh`).
    threshold: AtomicUsize,
    /// How many of such a window have got through.
    credit: AtomicUsize,
    /// How many were under way at most.
    used: AtomicUsize,
    /// How long a SYN may be without an answer, in nanoseconds (`RTO`).
    syn_timeout: AtomicU64,
    /// When the window was halved, in nanoseconds after `begin`.
    halved: AtomicU64,
    /// When one has got through, or was lost.
    last_news: AtomicU64,
}

/// One of a crowd that is under way: from the dial until the upstream says something, or could have for a while.
#[derive(Debug)]
pub(crate) struct UnderWay {
    pace: Arc<Pace>,
    /// When the present attempt began.
    dialled: Instant,
    /// How long its SYN may be without an answer, unless the kernel's timer decides.
    syn_timeout: Option<Duration>,
    _permit: Permit,
}

/// The state of a SYN that has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Syn {
    /// It may be answered yet.
    Young,
    /// It is lost.
    Lost,
    /// It is the kernel's business.
    Left,
}

impl Pace {
    /// Makes a pace of `max` under way at most.
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            begin: sys::now(),
            max,
            window: Arc::new(Semaphore::new(WINDOW_INITIAL.min(max))),
            threshold: AtomicUsize::new(max),
            credit: AtomicUsize::new(0),
            used: AtomicUsize::new(0),
            syn_timeout: AtomicU64::new(u64::MAX),
            halved: AtomicU64::new(0),
            last_news: AtomicU64::new(0),
        })
    }

    /// Returns the places of those under way.
    pub(crate) fn window(&self) -> &Arc<Semaphore> {
        &self.window
    }

    /// Takes a place for one that is dialled for at `now`, if there is one.
    pub(crate) fn take(self: &Arc<Self>, now: Instant) -> Option<Box<UnderWay>> {
        let last_news = self.begin + Duration::from_nanos(self.last_news.load(Ordering::Relaxed));
        if now.saturating_duration_since(last_news) > IDLE_MAX && self.window.taken() == 0 {
            self.threshold.store(self.max, Ordering::Relaxed);
            self.used.store(0, Ordering::Relaxed);
            self.window.resize(|_window| Some(WINDOW_INITIAL.min(self.max)));
        }
        let permit = self.window.take()?;
        self.used.fetch_max(self.window.taken(), Ordering::Relaxed);
        // It would be the largest part of every connection.
        Some(Box::new(UnderWay {
            pace: Arc::clone(self),
            dialled: now,
            syn_timeout: None,
            _permit: permit,
        }))
    }

    /// Lets one more go, as one has got through. A window of which half was never in use has not been tried (RFC 7661).
    fn grow(&self, now: Instant) {
        self.last_news.store(self.nanos(now), Ordering::Relaxed);
        let max = self.max.min(2 * self.used.load(Ordering::Relaxed));
        let threshold = self.threshold.load(Ordering::Relaxed);
        let credit = self.credit.fetch_add(1, Ordering::Relaxed) + 1;
        let more = |window| {
            let is_due = window < threshold || credit >= window;
            (is_due && window < max).then_some(window + 1)
        };
        if self.window.resize(more) {
            self.credit.store(0, Ordering::Relaxed);
        }
    }

    /// Halves the window, as one that was dialled for at `dialled` was lost. Others that were dialled for before the window
    /// was last halved have met with the same loss.
    fn shrink(&self, dialled: Instant, now: Instant) {
        let (dialled, now) = (self.nanos(dialled), self.nanos(now));
        self.last_news.store(now, Ordering::Relaxed);
        let is_news = |halved| (halved < dialled).then_some(now);
        if self.halved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, is_news).is_err() {
            return;
        }
        self.window.resize(|window| {
            let half = (window / 2).max(1);
            self.threshold.store(half, Ordering::Relaxed);
            Some(half)
        });
        self.credit.store(0, Ordering::Relaxed);
        // Perhaps the way has become longer.
        let longer = |timeout: u64| Some(timeout.saturating_mul(2));
        self.syn_timeout.fetch_update(Ordering::Relaxed, Ordering::Relaxed, longer).ok();
    }

    /// Learns how long an answer takes.
    fn learn(&self, round_trip: Duration) {
        let timeout = (round_trip * ROUND_TRIPS_MAX).max(SYN_TIMEOUT_MIN);
        self.syn_timeout.store(nanos(timeout), Ordering::Relaxed);
    }

    /// Returns how long a SYN may be without an answer, unless the kernel's timer decides.
    fn syn_timeout(&self) -> Option<Duration> {
        let timeout = Duration::from_nanos(self.syn_timeout.load(Ordering::Relaxed));
        (timeout < SYN_TIMEOUT_MAX).then_some(timeout)
    }

    fn nanos(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.begin))
    }
}

impl UnderWay {
    /// Begins an attempt at an address. Returns whether its SYN may be lost before the kernel repeats it.
    pub(crate) fn dialled(&mut self, now: Instant) -> bool {
        (self.dialled, self.syn_timeout) = (now, self.pace.syn_timeout());
        self.syn_timeout.is_some()
    }

    /// Looks after a SYN that has no answer, as far as events have told.
    pub(crate) fn unanswered(&self, socket: &Socket, now: Instant) -> Syn {
        let Some(timeout) = self.syn_timeout else {
            if socket.tcp_info().is_some_and(|info| info.has_repeated) {
                self.lost(now);
            }
            return Syn::Left;
        };
        let is_over = now.saturating_duration_since(self.dialled) >= timeout;
        // The event of an answer may be on its way.
        let is_lost = is_over && socket.tcp_info().is_some_and(|info| info.is_dialled);
        if is_lost { Syn::Lost } else { Syn::Young }
    }

    /// Learns how near the upstream is from the answer to its SYN; or that it has found room only when that was repeated.
    pub(crate) fn answered(&self, socket: &Socket, now: Instant) {
        match socket.tcp_info() {
            Some(info) if info.has_repeated => self.lost(now),
            Some(info) => self.pace.learn(info.round_trip),
            None => {}
        }
    }

    /// Learns that it has found no room.
    pub(crate) fn lost(&self, now: Instant) {
        self.pace.shrink(self.dialled, now);
    }

    /// Learns that the upstream has said something: the way is over.
    pub(crate) fn heard(&self, now: Instant) {
        self.pace.grow(now);
    }

    /// Looks after one whose upstream could have said something for a while. Returns whether the way is over: not if nothing
    /// that was sent is acknowledged. A backlog that becomes full drops the last step of a handshake too, and whatever comes
    /// behind it, until that is repeated.
    pub(crate) fn unheard(&self, socket: &Socket, now: Instant) -> bool {
        match socket.tcp_info() {
            Some(info) if info.has_repeated => self.lost(now),
            Some(info) if info.is_unacknowledged => return false,
            Some(_) | None => self.heard(now),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{Listener, SocketAddress};

    const MAX: usize = 128;

    fn after(pace: &Pace, millis: u64) -> Instant {
        pace.begin + Duration::from_millis(millis)
    }

    /// As many as may be under way.
    fn fill(pace: &Arc<Pace>, now: Instant) -> Vec<UnderWay> {
        std::iter::from_fn(|| pace.take(now)).map(|one| *one).collect()
    }

    /// As many as may be under way get through, each for another. Returns how many.
    fn pass(pace: &Arc<Pace>, now: Instant) -> usize {
        let under_way = fill(pace, now);
        let count = under_way.len();
        for one in under_way {
            one.heard(now);
        }
        count
    }

    #[test]
    fn it_begins_with_few_and_each_that_gets_through_lets_one_more_go_up_to_the_maximum() {
        for (max, windows) in
            [(MAX, &[4, 8, 16, 32, 64, 128, 128][..]), (20, &[4, 8, 16, 20, 20]), (1, &[1, 1])]
        {
            let pace = Pace::new(max);
            for &window in windows {
                assert_eq!(pass(&pace, after(&pace, 5)), window, "of {max}");
            }
        }
    }

    #[test]
    fn a_loss_halves_the_window_once_and_from_there_on_it_grows_by_one_at_a_time() {
        let pace = Pace::new(MAX);
        pass(&pace, after(&pace, 5));
        let under_way = fill(&pace, after(&pace, 10));
        assert_eq!(under_way.len(), 8);
        for one in &under_way[2..] {
            one.lost(after(&pace, 30));
        }
        assert!(pace.take(after(&pace, 30)).is_none(), "more are under way than the window takes");
        drop(under_way);
        for window in [4, 5, 6] {
            assert_eq!(pass(&pace, after(&pace, 31)), window);
        }
        // The last one may always go.
        for (round, window) in (1..).zip([3, 1, 1, 1]) {
            for one in fill(&pace, after(&pace, 100 * round)) {
                one.lost(after(&pace, 100 * round + 20));
            }
            assert_eq!(pace.window.max(), window);
        }
    }

    #[test]
    fn a_window_that_nobody_needs_does_not_grow() {
        let pace = Pace::new(MAX);
        let now = after(&pace, 5);
        for _one in 0..100 {
            pace.take(now).unwrap().heard(now);
        }
        assert_eq!(fill(&pace, now).len(), 4);
    }

    #[test]
    fn after_a_while_without_news_it_begins_anew() {
        let pace = Pace::new(MAX);
        for window in [4, 8, 16] {
            assert_eq!(pass(&pace, after(&pace, 5)), window);
        }
        assert_eq!(fill(&pace, after(&pace, 1005)).len(), 32);
        let one = pace.take(after(&pace, 1005)).unwrap();
        assert_eq!(fill(&pace, after(&pace, 1006)).len(), 31, "somebody is under way");
        one.lost(after(&pace, 1007));
        drop(one);
        assert_eq!(fill(&pace, after(&pace, 2007)).len(), 16);
        assert_eq!(fill(&pace, after(&pace, 2008)).len(), 4);
        // It is not known any more where it was lost.
        for window in [4, 8, 16, 32] {
            assert_eq!(pass(&pace, after(&pace, 2008)), window);
        }
    }

    /// A listener whose backlog is full, who is in it, and one who finds no room.
    fn full() -> (Listener, Socket, Socket) {
        let listener = Listener::tcp("127.0.0.1:0".parse().unwrap(), 1).unwrap().pop().unwrap();
        listener.cut_backlog();
        let address = SocketAddress::Inet(listener.local_inet().unwrap());
        let dial = || Socket::dial(&address, None).unwrap().0;
        let first = dial();
        let deadline = Instant::now() + Duration::from_secs(10);
        while first.tcp_info().unwrap().is_dialled {
            assert!(Instant::now() < deadline, "a backlog of 0 takes one");
            std::thread::yield_now();
        }
        (listener, first, dial())
    }

    #[test]
    fn a_syn_is_lost_once_an_answer_is_known_to_come_sooner_and_ever_later() {
        let (_listener, answered, lost) = full();
        let pace = Pace::new(MAX);
        let mut one = pace.take(after(&pace, 0)).unwrap();
        assert!(!one.dialled(after(&pace, 0)));
        assert_eq!(one.unanswered(&lost, after(&pace, 299)), Syn::Left, "nothing is known");
        one.answered(&answered, after(&pace, 0));
        let mut now = 0;
        for timeout in [20, 40, 80, 160] {
            now += 1;
            assert!(one.dialled(after(&pace, now)));
            assert_eq!(one.unanswered(&lost, after(&pace, now + timeout - 1)), Syn::Young);
            now += timeout;
            assert_eq!(one.unanswered(&answered, after(&pace, now)), Syn::Young, "answered");
            assert_eq!(one.unanswered(&lost, after(&pace, now)), Syn::Lost);
            one.lost(after(&pace, now));
        }
        assert!(!one.dialled(after(&pace, now)), "the kernel goes on");
        one.answered(&answered, after(&pace, now));
        assert!(one.dialled(after(&pace, now)), "an answer has come at once");
    }

    #[test]
    fn where_an_answer_takes_long_the_kernel_decides() {
        let pace = Pace::new(MAX);
        let timeouts = [(1, Some(20)), (50, Some(200)), (74, Some(296)), (75, None), (500, None)];
        for (round_trip, timeout) in timeouts {
            pace.learn(Duration::from_millis(round_trip));
            assert_eq!(pace.syn_timeout(), timeout.map(Duration::from_millis), "{round_trip} ms");
        }
    }

    #[test]
    fn a_unix_upstream_is_heard_and_never_asked() {
        let (socket, _peer) = crate::sys::socket_pair().unwrap();
        let pace = Pace::new(MAX);
        let now = after(&pace, 5);
        let under_way = fill(&pace, now);
        for one in under_way {
            one.answered(&socket, now);
            assert!(one.unheard(&socket, now));
        }
        assert_eq!((pace.syn_timeout(), fill(&pace, now).len()), (None, 8));
    }
}

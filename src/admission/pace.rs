//! The pace of waiting clients: a window bounds those under way, and grows and shrinks like TCP's congestion window
//! (RFC 5681).
//!
//! The scarce resource is room in the upstream's backlog. The window starts small, grows by one with each client that
//! gets through, and halves with a loss. A loss is a SYN that a full backlog dropped. The kernel repeats it after a
//! second, and then ever more slowly. Where the upstream is known to answer fast, an unanswered SYN is given up much
//! sooner, and its client waits for the window again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::semaphore::{Permit, Semaphore};
use crate::{
    config::duration::nanos,
    handover::parcel::{Incoming, Moment, Outgoing},
    sys::Socket,
};

/// First size of the window. A backlog of 5, the smallest in wide use, takes 6 connections.
const WINDOW_INITIAL: usize = 4;
/// Time without successes or losses after which the window starts anew, as the upstream may be another one by then.
const IDLE_MAX: Duration = Duration::from_secs(1);
/// Least time that a SYN may be unanswered. Even the host of a near upstream may be busy.
pub(crate) const SYN_TIMEOUT_MIN: Duration = Duration::from_millis(20);
/// Time from which on the kernel's retransmission timer replaces the limit for unanswered SYNs.
const SYN_TIMEOUT_MAX: Duration = Duration::from_millis(300);
/// Round trips that an answer to a SYN may take.
const ROUND_TRIPS_MAX: u32 = 4;

/// The window, and the observations that set its size. All workers share it.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Start of the proxy, before which nothing was dialled.
    begin: Instant,
    max: usize,
    /// One permit for each client that may be under way now.
    window: Arc<Semaphore>,
    /// TCP's `ssthresh`: below it the window grows with each success, and from it on once for a whole window of them.
    threshold: AtomicUsize,
    /// Successes since the window last grew.
    credit: AtomicUsize,
    /// Largest number of clients that were under way together.
    used: AtomicUsize,
    /// Time that a SYN may be unanswered, in nanoseconds (TCP's `RTO`).
    syn_timeout: AtomicU64,
    /// Time of the last halving, in nanoseconds after `begin`.
    halved: AtomicU64,
    /// Time of the last success or loss, in nanoseconds after `begin`.
    last_news: AtomicU64,
}

/// A client's share of the window: held from the dial until the upstream sends a byte, or could have for a while.
#[derive(Debug)]
pub(crate) struct UnderWay {
    pace: Arc<Pace>,
    /// Time of the last dial.
    dialled: Instant,
    /// Time that its SYN may be unanswered; `None` leaves that to the kernel's retransmission timer.
    syn_timeout: Option<Duration>,
    _permit: Permit,
}

/// Words of a share of the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UnderWayWords {
    dialled: Moment,
    syn_timeout: Option<Duration>,
}

/// State of the pace in a hand-over. The shares of the window go along with their clients.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PaceWords {
    window: usize,
    /// None, if the maximum is the only one.
    threshold: Option<usize>,
    credit: usize,
    used: usize,
    /// Nanoseconds.
    syn_timeout: u64,
    halved: Moment,
    last_news: Moment,
}

/// State of an unanswered SYN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Syn {
    /// Its time is not over.
    Young,
    /// It was dropped.
    Lost,
    /// It is left to the kernel, which repeats it.
    Left,
}

impl Pace {
    /// Returns a pace whose window grows up to `max`, of a proxy that started at `begin`.
    pub(crate) fn new(max: usize, begin: Instant) -> Arc<Self> {
        Arc::new(Self {
            begin,
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

    /// Returns the window: its permits are the shares of clients under way.
    pub(crate) fn window(&self) -> &Arc<Semaphore> {
        &self.window
    }

    /// Takes a share of the window for a dial at `now`, if one is free.
    pub(crate) fn take(self: &Arc<Self>, now: Instant) -> Option<Box<UnderWay>> {
        let last_news = self.begin + Duration::from_nanos(self.last_news.load(Ordering::Relaxed));
        if now.saturating_duration_since(last_news) > IDLE_MAX && self.window.taken() == 0 {
            self.threshold.store(self.max, Ordering::Relaxed);
            self.used.store(0, Ordering::Relaxed);
            self.window.resize(|_window| Some(WINDOW_INITIAL.min(self.max)));
        }
        let permit = self.window.take()?;
        // Boxed, as it would be the largest part of a connection, and most never have one.
        Some(Box::new(self.under_way(now, None, permit)))
    }

    /// Describes the pace for a hand-over.
    pub(crate) fn describe(&self, parcel: &Outgoing<'_>) -> PaceWords {
        let Self { begin, max, window, threshold, credit, used, syn_timeout, halved, last_news } =
            self;
        let moment = |after: &AtomicU64| {
            parcel.moment(*begin + Duration::from_nanos(after.load(Ordering::Relaxed)))
        };
        PaceWords {
            window: window.max(),
            threshold: Some(threshold.load(Ordering::Relaxed)).filter(|at| at < max),
            credit: credit.load(Ordering::Relaxed),
            used: used.load(Ordering::Relaxed),
            syn_timeout: syn_timeout.load(Ordering::Relaxed),
            halved: moment(halved),
            last_news: moment(last_news),
        }
    }

    /// Takes over a pace that was described, with a window up to the present maximum.
    pub(crate) fn restore(&self, words: &PaceWords, parcel: &Incoming) {
        let PaceWords { window, threshold, credit, used, syn_timeout, halved, last_news } = *words;
        self.window.resize(|_window| Some(window.clamp(1, self.max)));
        self.threshold.store(threshold.unwrap_or(self.max), Ordering::Relaxed);
        self.credit.store(credit, Ordering::Relaxed);
        self.used.store(used, Ordering::Relaxed);
        self.syn_timeout.store(syn_timeout, Ordering::Relaxed);
        self.halved.store(self.nanos(parcel.instant(halved)), Ordering::Relaxed);
        self.last_news.store(self.nanos(parcel.instant(last_news)), Ordering::Relaxed);
    }

    /// Returns the share of the window of `words`, which counts also beyond the window.
    pub(crate) fn restore_share(
        self: &Arc<Self>,
        words: UnderWayWords,
        parcel: &Incoming,
    ) -> UnderWay {
        let UnderWayWords { dialled, syn_timeout } = words;
        self.under_way(parcel.instant(dialled), syn_timeout, self.window.take_beyond())
    }

    fn under_way(
        self: &Arc<Self>,
        dialled: Instant,
        syn_timeout: Option<Duration>,
        permit: Permit,
    ) -> UnderWay {
        self.used.fetch_max(self.window.taken(), Ordering::Relaxed);
        UnderWay { pace: Arc::clone(self), dialled, syn_timeout, _permit: permit }
    }

    /// Grows the window after a success. It grows up to twice its largest use, as a window that was never used tells
    /// nothing about the backlog (RFC 7661).
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

    /// Halves the window after the loss of a SYN sent at `dialled`. A SYN sent before the last halving changes nothing,
    /// as it met with the same full backlog.
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
        // The round trip may have become longer, so the next SYNs get twice the time.
        let longer = |timeout: u64| Some(timeout.saturating_mul(2));
        self.syn_timeout.fetch_update(Ordering::Relaxed, Ordering::Relaxed, longer).ok();
    }

    /// Sets the limit for unanswered SYNs by a measured round trip.
    fn learn(&self, round_trip: Duration) {
        let timeout = (round_trip * ROUND_TRIPS_MAX).max(SYN_TIMEOUT_MIN);
        self.syn_timeout.store(nanos(timeout), Ordering::Relaxed);
    }

    /// Returns the time that a SYN may be unanswered, or `None` to leave that to the kernel's retransmission timer.
    fn syn_timeout(&self) -> Option<Duration> {
        let timeout = Duration::from_nanos(self.syn_timeout.load(Ordering::Relaxed));
        (timeout < SYN_TIMEOUT_MAX).then_some(timeout)
    }

    fn nanos(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.begin))
    }
}

impl UnderWay {
    /// Returns its words.
    pub(crate) fn describe(&self, parcel: &Outgoing<'_>) -> UnderWayWords {
        let Self { pace: _, dialled, syn_timeout, _permit: _ } = *self;
        UnderWayWords { dialled: parcel.moment(dialled), syn_timeout }
    }

    /// Notes the dial of an address. Returns true if its SYN may count as lost before the kernel repeats it.
    pub(crate) fn dialled(&mut self, now: Instant) -> bool {
        (self.dialled, self.syn_timeout) = (now, self.pace.syn_timeout());
        self.syn_timeout.is_some()
    }

    /// Returns the state of a SYN for whose answer no event has come. One that the kernel has repeated is a loss.
    pub(crate) fn unanswered(&self, socket: &Socket, now: Instant) -> Syn {
        let Some(timeout) = self.syn_timeout else {
            if socket.tcp_info().is_some_and(|info| info.has_repeated) {
                self.lost(now);
            }
            return Syn::Left;
        };
        let is_over = now.saturating_duration_since(self.dialled) >= timeout;
        // The answer may have come without its event, so the kernel is asked.
        let is_lost = is_over && socket.tcp_info().is_some_and(|info| info.is_dialled);
        if is_lost { Syn::Lost } else { Syn::Young }
    }

    /// Measures the round trip by the answer to the SYN. An answer to a repeated SYN is a loss instead.
    pub(crate) fn answered(&self, socket: &Socket, now: Instant) {
        match socket.tcp_info() {
            Some(info) if info.has_repeated => self.lost(now),
            Some(info) => self.pace.learn(info.round_trip),
            None => {}
        }
    }

    /// Reports a loss: the SYN found no room in the backlog.
    pub(crate) fn lost(&self, now: Instant) {
        self.pace.shrink(self.dialled, now);
    }

    /// Reports a success: the upstream has sent a byte.
    pub(crate) fn heard(&self, now: Instant) {
        self.pace.grow(now);
    }

    /// Reports an upstream that has sent nothing for a while. Returns true if the connection is no longer under way. It
    /// still is while nothing sent to the upstream is acknowledged: a full backlog drops the last ACK of the handshake
    /// and all data after it, until they are repeated.
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

    /// Takes all free shares of the window.
    fn fill(pace: &Arc<Pace>, now: Instant) -> Vec<UnderWay> {
        std::iter::from_fn(|| pace.take(now)).map(|one| *one).collect()
    }

    /// Lets a whole window of clients succeed. Returns their number.
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
            let pace = Pace::new(max, Instant::now());
            for &window in windows {
                assert_eq!(pass(&pace, after(&pace, 5)), window, "of {max}");
            }
        }
    }

    #[test]
    fn a_loss_halves_the_window_once_and_from_there_on_it_grows_by_one_at_a_time() {
        let pace = Pace::new(MAX, Instant::now());
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
        // The window never falls below 1.
        for (round, window) in (1..).zip([3, 1, 1, 1]) {
            for one in fill(&pace, after(&pace, 100 * round)) {
                one.lost(after(&pace, 100 * round + 20));
            }
            assert_eq!(pace.window.max(), window);
        }
    }

    #[test]
    fn a_window_that_is_not_used_does_not_grow() {
        let pace = Pace::new(MAX, Instant::now());
        let now = after(&pace, 5);
        for _one in 0..100 {
            pace.take(now).unwrap().heard(now);
        }
        assert_eq!(fill(&pace, now).len(), 4);
    }

    #[test]
    fn after_a_while_without_news_it_begins_anew() {
        let pace = Pace::new(MAX, Instant::now());
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
        // The threshold of the last loss is forgotten, too.
        for window in [4, 8, 16, 32] {
            assert_eq!(pass(&pace, after(&pace, 2008)), window);
        }
    }

    /// Returns a listener with a full backlog, the connection in it, and a dial that finds no room.
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
        let pace = Pace::new(MAX, Instant::now());
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
    fn a_pace_goes_on_in_another_process_up_to_its_maximum() {
        let giver = Pace::new(MAX, Instant::now());
        for window in [4, 8, 16, 32] {
            assert_eq!(pass(&giver, after(&giver, 5)), window);
        }
        giver.learn(Duration::from_millis(20));
        let lost = fill(&giver, after(&giver, 10));
        lost.last().unwrap().lost(after(&giver, 30));
        drop(lost);
        let words = giver.describe(&Outgoing::new(after(&giver, 40)));
        let text = serde_json::to_string(&words).unwrap();
        // The taker's clock is another one.
        let shift = Duration::from_secs(1_000);
        for (max, window) in [(MAX, 32), (1_000, 32), (20, 20), (1, 1)] {
            let taker = Pace::new(max, giver.begin + shift);
            let arrived = after(&taker, 40);
            let parcel = Incoming::new(arrived, Vec::new(), Vec::new());
            taker.restore(&serde_json::from_str(&text).unwrap(), &parcel);
            assert_eq!(taker.syn_timeout(), Some(Duration::from_millis(160)));
            if max == MAX {
                assert_eq!(taker.describe(&Outgoing::new(arrived)), words);
            }
            // A SYN from before the loss is no news, and the window grows by one at a time.
            taker.shrink(after(&taker, 29), after(&taker, 41));
            assert_eq!(pass(&taker, after(&taker, 42)), window);
            assert_eq!(pass(&taker, after(&taker, 43)), max.min(window + 1));
            // Without news, it begins anew as ever.
            assert_eq!(fill(&taker, after(&taker, 1_044)).len(), 4.min(max));
        }
    }

    #[test]
    fn where_an_answer_takes_long_the_kernel_decides() {
        let pace = Pace::new(MAX, Instant::now());
        let timeouts = [(1, Some(20)), (50, Some(200)), (74, Some(296)), (75, None), (500, None)];
        for (round_trip, timeout) in timeouts {
            pace.learn(Duration::from_millis(round_trip));
            assert_eq!(pace.syn_timeout(), timeout.map(Duration::from_millis), "{round_trip} ms");
        }
    }

    #[test]
    fn a_unix_upstream_is_heard_and_never_asked() {
        let (socket, _peer) = crate::sys::socket_pair().unwrap();
        let pace = Pace::new(MAX, Instant::now());
        let now = after(&pace, 5);
        let under_way = fill(&pace, now);
        for one in under_way {
            one.answered(&socket, now);
            assert!(one.unheard(&socket, now));
        }
        assert_eq!((pace.syn_timeout(), fill(&pace, now).len()), (None, 8));
    }
}

//! The loop over seeds of both simulations: one seed is one schedule.
//!
//! A failure prints its seed. `TCPAUSE_SEED=n` replays one, `TCPAUSE_SEEDS=n` sets how many are tried.

use std::{
    env, fmt,
    ops::{AddAssign, Range},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

/// Schedules that are tried, unless `TCPAUSE_SEEDS` says otherwise.
const SEEDS: u64 = 20_000;

/// Runs one seed that is to be replayed, or many, in two threads, until one has failed. Returns the number of those many,
/// and the sum of what was seen.
pub(crate) fn try_all<T>(run: impl Fn(u64, bool) -> T + Sync) -> Option<(u64, T)>
where
    T: AddAssign + Default + fmt::Debug + Send,
{
    let number = |name| env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    if let Some(seed) = number("TCPAUSE_SEED") {
        println!("{:?}", run(seed, true));
        return None;
    }
    let seeds = number("TCPAUSE_SEEDS").unwrap_or(SEEDS);
    let has_failed = AtomicBool::new(false);
    let try_some = |seeds: Range<u64>| {
        let mut sum = T::default();
        for seed in seeds.take_while(|_| !has_failed.load(Relaxed)) {
            let _guard = Guard { seed, has_failed: &has_failed };
            sum += run(seed, false);
        }
        sum
    };
    let tally = thread::scope(|scope| {
        let halves = [0..seeds / 2, seeds / 2..seeds].map(|seeds| scope.spawn(|| try_some(seeds)));
        let mut sum = T::default();
        halves.into_iter().for_each(|half| sum += half.join().expect("all seeds hold"));
        sum
    });
    println!("{seeds} seeds: {tally:?}");
    Some((seeds, tally))
}

/// Tells, when something does not hold, how to see it again, and stops the other thread.
struct Guard<'a> {
    seed: u64,
    has_failed: &'a AtomicBool,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.has_failed.store(true, Relaxed);
            eprintln!("replay with TCPAUSE_SEED={}", self.seed);
        }
    }
}

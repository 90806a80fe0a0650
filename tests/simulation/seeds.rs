//! Seeds: the worker and its machines on a simulated kernel (`tests/simulation`), one schedule a seed.
//!
//! A failure prints its seed. `TCPAUSE_SEED=n` replays one, `TCPAUSE_SEEDS=n` sets how many are tried.

use std::{
    env,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use tcpause_simulation::{Tally, run};

/// Schedules that are tried, unless `TCPAUSE_SEEDS` says otherwise.
const SEEDS: u64 = 20_000;

#[test]
fn seeds() {
    let number = |name| env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    if let Some(seed) = number("TCPAUSE_SEED") {
        println!("{:?}", run(seed));
        return;
    }
    let seeds = number("TCPAUSE_SEEDS").unwrap_or(SEEDS);
    let tally = thread::scope(|scope| {
        let halves = [0..seeds / 2, seeds / 2..seeds].map(|seeds| scope.spawn(|| try_all(seeds)));
        let mut sum = Tally::default();
        halves.into_iter().for_each(|half| sum += half.join().expect("all seeds hold"));
        sum
    });
    println!("{seeds} seeds: {tally:?}");
}

/// Says that a seed has failed, so that the other thread stops, too: a mutant is dead by then.
static HAS_FAILED: AtomicBool = AtomicBool::new(false);

/// Notes the panic that passes through it.
struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        HAS_FAILED.fetch_or(thread::panicking(), Relaxed);
    }
}

/// Tries each seed, until one has failed; returns what was seen in all of them.
fn try_all(seeds: Range<u64>) -> Tally {
    let _guard = Guard;
    let mut sum = Tally::default();
    seeds.take_while(|_| !HAS_FAILED.load(Relaxed)).for_each(|seed| sum += run(seed));
    sum
}

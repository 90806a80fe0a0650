//! The state machines of a fleet against a model of etcd: one seed is one schedule.
//!
//! A failure prints its seed. `TCPAUSE_SEED=n` replays one, with all that happens; `TCPAUSE_SEEDS=n` sets how many are
//! tried. `etcd.rs` and `proxy.rs` are the models, `world.rs` is the course of events, `threads.rs` drives the machines as
//! the fleet's thread does, `commands.rs` is the operator, `faults.rs` what goes wrong, and `judge.rs` says what must hold.

#![allow(dead_code, reason = "the sources serve more than the simulation")]

mod commands;
/// The words of the setting, which the machines read as plain data.
mod config {
    use serde::{Deserialize, Serialize};

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    pub(crate) enum OnDisconnect {
        #[default]
        Serve,
        Hold,
    }
}
mod etcd;
mod faults;
#[path = "sources.rs"]
mod fleet;
mod judge;
mod proxy;
#[path = "../../common/random.rs"]
mod random;
mod scenarios;
mod threads;
mod world;

use std::{
    env,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use world::{Tally, World};

/// Schedules that are tried, unless `TCPAUSE_SEEDS` says otherwise.
const SEEDS: u64 = 20_000;

#[test]
fn seeds() {
    let number = |name| env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    if let Some(seed) = number("TCPAUSE_SEED") {
        println!("{:?}", run(seed, true));
        return;
    }
    let seeds = number("TCPAUSE_SEEDS").unwrap_or(SEEDS);
    let tally = thread::scope(|scope| {
        let halves = [0..seeds / 2, seeds / 2..seeds].map(|seeds| scope.spawn(|| try_all(seeds)));
        let mut sum = Tally::default();
        halves.into_iter().for_each(|half| sum.add(&half.join().expect("all seeds hold")));
        sum
    });
    println!("{seeds} seeds: {tally:?}");
    // A simulation in which nothing happens finds nothing.
    assert!(tally.commands > seeds / 2, "few commands: {tally:?}");
}

/// Says that a seed has failed, so that the other thread stops, too.
static HAS_FAILED: AtomicBool = AtomicBool::new(false);

/// Tells, when something does not hold, how to see it again.
struct Replay(u64);

impl Drop for Replay {
    fn drop(&mut self) {
        if thread::panicking() {
            HAS_FAILED.store(true, Relaxed);
            eprintln!("replay with TCPAUSE_SEED={}", self.0);
        }
    }
}

/// Tries each seed, until one has failed; returns what was seen in all of them.
fn try_all(seeds: Range<u64>) -> Tally {
    let mut sum = Tally::default();
    seeds.take_while(|_| !HAS_FAILED.load(Relaxed)).for_each(|seed| sum.add(&run(seed, false)));
    sum
}

/// Runs the schedule of `seed` to its end. Panics when something does not hold.
fn run(seed: u64, tells: bool) -> Tally {
    let _replay = Replay(seed);
    World::new(seed, tells).run()
}

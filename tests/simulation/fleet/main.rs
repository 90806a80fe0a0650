//! The state machines of a fleet against a model of etcd: one seed is one schedule.
//!
//! `TCPAUSE_SEED=n` replays one, with all that happens (`tests/simulation/schedules.rs`). `etcd.rs` and `proxy.rs` are the
//! models, `world.rs` is the course of events, `threads.rs` drives the machines as the fleet's threads do, `commands.rs` is
//! the operator, `faults.rs` what goes wrong, and `judge.rs` says what must hold.

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
#[path = "../schedules.rs"]
mod schedules;
mod threads;
mod world;

use world::World;

#[test]
fn seeds() {
    let tried = schedules::try_all(|seed, tells| World::new(seed, tells).run());
    // A simulation in which nothing happens finds nothing.
    assert!(tried.is_none_or(|(seeds, tally)| tally.commands > seeds / 2), "few commands");
}

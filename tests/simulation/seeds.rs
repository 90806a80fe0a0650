//! Seeds: the worker and its machines on a simulated kernel (`tests/simulation`), one schedule a seed.

mod schedules;

#[test]
fn seeds() {
    schedules::try_all(|seed, _| tcpause_simulation::run(seed));
}

//! Busy clients, of which some keep their connections for a while.

use std::{
    io::{self, Read as _, Write as _},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::server::greeting;
use crate::harness::{Addr, Received, spawn, wait_until};

const MESSAGE: &[u8; 32] = b"thirty-two bytes come back again";

/// Requests of a client that keeps its connection, and the rest before each.
const REQUESTS: usize = 10;
const REST: Duration = Duration::from_millis(1);

/// Clients, each with one connection after the other. Every second one keeps its connection for some requests.
pub(super) struct Clients {
    is_over: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<Tally>>,
}

/// Fate of some connections.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) steered: usize,
    pub(super) relayed: usize,
    pub(super) failures: Vec<Failure>,
}

#[derive(Debug)]
pub(super) struct Failure {
    /// Time at which the client began to connect.
    pub(super) began: Instant,
    #[allow(dead_code, reason = "a failed test shows it")]
    error: io::Error,
}

impl Clients {
    pub(super) fn start(count: usize, addr: &Addr) -> Self {
        let (is_over, served) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let client = |number: usize| {
            let (is_over, served, addr) = (Arc::clone(&is_over), Arc::clone(&served), addr.clone());
            let requests = if number.is_multiple_of(2) { 1 } else { REQUESTS };
            spawn(move || {
                let mut tally = Tally::default();
                while !is_over.load(Ordering::SeqCst) {
                    tally.talk(&addr, requests);
                    served.fetch_add(1, Ordering::SeqCst);
                }
                tally
            })
        };
        let threads = (0..count).map(client).collect();
        Self { is_over, served, threads }
    }

    /// Waits until so many more connections have ended.
    #[track_caller]
    pub(super) fn wait_served(&self, count: usize) {
        let before = self.served.load(Ordering::SeqCst);
        wait_until("clients are served", || self.served.load(Ordering::SeqCst) >= before + count);
    }

    /// Ends them.
    #[track_caller]
    pub(super) fn end(mut self) -> Tally {
        self.is_over.store(true, Ordering::SeqCst);
        let tallies = self.threads.drain(..).map(|thread| thread.join().expect("no panic"));
        tallies.fold(Tally::default(), |mut sum, tally| {
            sum.steered += tally.steered;
            sum.relayed += tally.relayed;
            sum.failures.extend(tally.failures);
            sum
        })
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
    }
}

impl Tally {
    /// Plays one client.
    fn talk(&mut self, addr: &Addr, requests: usize) {
        let began = Instant::now();
        match talk(addr, requests) {
            Ok(true) => self.steered += 1,
            Ok(false) => self.relayed += 1,
            Err(error) => self.failures.push(Failure { began, error }),
        }
    }

    /// Returns the number of all.
    pub(super) fn count(&self) -> usize {
        self.steered + self.relayed + self.failures.len()
    }
}

/// Connects, makes some requests, and ends in good order. Returns true if it was steered.
fn talk(addr: &Addr, requests: usize) -> io::Result<bool> {
    let mut stream = addr.try_connect()?;
    let (is_steered, _place) = greeting(&mut stream)?;
    for number in 0..requests {
        if number > 0 {
            thread::sleep(REST);
        }
        let mut answer = [0; MESSAGE.len()];
        stream.write_all(MESSAGE)?;
        stream.read_exact(&mut answer)?;
        if answer != *MESSAGE {
            return Err(io::Error::other(format!("the answer was {answer:?}")));
        }
    }
    stream.finish();
    match stream.receive_all() {
        rest if rest == Received::ended(b"") => Ok(is_steered),
        rest => Err(io::Error::other(format!("the end was {rest:?}"))),
    }
}

//! The harness: the real binary, an upstream, clients and the control API, all on free ports of the loopback.
//!
//! Nothing here waits without a deadline: sockets have [`PATIENCE`] as their timeout, events are awaited with
//! [`wait_until`] or on a condition variable, and a proxy dies with the test that started it.

mod control;
mod namespace;
mod net;
mod program;
mod proxy;
mod tls;
mod upstream;

use std::{
    env,
    sync::Once,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

pub(crate) use control::{Control, Response, Status};
pub(crate) use namespace::{FIGURE, in_namespace};
pub(crate) use net::{Addr, End, Family, Listener, Received, Reserved, Stream, reserve};
pub(crate) use program::{Finished, Program, binary, program};
pub(crate) use proxy::{Builder, CPU_PERCENT_MAX, Proxy};
pub(crate) use tls::{Authority, TlsClient};
pub(crate) use upstream::{Upstream, echo, record};

/// How long anything that must happen may take. A passing test never waits this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How often a condition is looked at that no event announces.
const GLANCE: Duration = Duration::from_millis(3);

/// The stack of a helper thread: small, as there may be thousands.
const STACK_BYTES: usize = 256 << 10;

/// Waits until `condition` holds; `what` says in words what was awaited.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: waited {PATIENCE:?} until {what}");
        thread::sleep(GLANCE);
    }
}

/// Starts a helper thread.
pub(crate) fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    thread::Builder::new().stack_size(STACK_BYTES).spawn(work).expect("a helper thread")
}

/// `length` bytes that look random, differ from seed to seed and are the same in each run.
pub(crate) fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Compares without printing megabytes.
#[track_caller]
pub(crate) fn assert_same(got: &[u8], wanted: &[u8]) {
    let differs = got.iter().zip(wanted).position(|(got, wanted)| got != wanted);
    assert!(
        got.len() == wanted.len() && differs.is_none(),
        "{} bytes came, {} were wanted; the first difference is at {differs:?}",
        got.len(),
        wanted.len(),
    );
}

/// Raises the test process's limit of open files as far as it goes: each test brings hundreds of sockets.
pub(crate) fn raise_descriptor_limit() {
    static RAISED: Once = Once::new();
    RAISED.call_once(|| {
        let maximum = getrlimit(Resource::Nofile).maximum;
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
            .expect("the limit of open files");
    });
}

/// How much of something a test does: what the environment says, as `make soak` does, or what suits `make test`.
pub(crate) fn amount(name: &str, default: usize) -> usize {
    env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// Random numbers, the same for each seed.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// From 0 to `limit - 1`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)) % limit
    }

    /// From 1 to `most`, each order of magnitude as likely as the next.
    pub(crate) fn spread(&mut self, most: u64) -> u64 {
        let magnitude = self.below(u64::from(most.ilog2()) + 1);
        (1 + self.below(2 << magnitude)).min(most)
    }
}

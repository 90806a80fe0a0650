//! The harness: the real binary, an upstream, clients and the control API, all on free ports of the loopback.
//!
//! Nothing here waits without a deadline: sockets have [`PATIENCE`] as their timeout, events are awaited with
//! [`wait_until`] or on a condition variable, and a proxy dies with the test that started it.

mod browser;
mod control;
#[allow(dead_code, unused_imports, reason = "the library's tests of its client use the rest")]
pub(crate) mod etcd;
mod namespace;
mod net;
mod program;
mod proxy;
#[path = "../../common/random.rs"]
mod random;
mod scale;
#[path = "../../common/stream.rs"]
mod stream;
mod tls;
mod upstream;

use std::{
    sync::Once,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

pub(crate) use browser::Browser;
pub(crate) use control::{Control, Response, Status};
pub(crate) use namespace::{FIGURE, as_another_user, in_namespace};
pub(crate) use net::{Addr, End, Family, Listener, Received, Reserved, reserve};
pub(crate) use program::{Finished, Program, binary, program};
pub(crate) use proxy::{Builder, CPU_PERCENT_MAX, Proxy, child_pids_of, state_of};
pub(crate) use random::Random;
pub(crate) use scale::amount;
pub(crate) use stream::Stream;
pub(crate) use tls::{Authority, TlsClient};
pub(crate) use upstream::{Session, Upstream, echo, record};

/// Longest wait for anything that must happen. A passing test never waits this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Commands that talk to a running proxy.
pub(crate) const COMMANDS: [&str; 11] = [
    "pause",
    "resume",
    "status",
    "wait",
    "exec",
    "connections",
    "kill",
    "switch",
    "fleet",
    "upgrade",
    "reload",
];

/// Interval between two checks of a condition that no event announces.
pub(crate) const GLANCE: Duration = Duration::from_millis(3);

/// Stack of a helper thread, which is small, as there may be thousands.
const STACK_BYTES: usize = 256 << 10;

/// Waits until `condition` holds. `what` names the condition in the failure.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: waited {PATIENCE:?} until {what}");
        thread::sleep(GLANCE);
    }
}

/// Returns the signal that asks for an upgrade: `SIGHUP`, unless it is ignored here, as below `nohup`, and so in each program.
pub(crate) fn hangup() -> Signal {
    let status = std::fs::read_to_string("/proc/self/status").expect("a process");
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("a line");
    let ignored = u64::from_str_radix(ignored.trim(), 16).expect("a mask");
    if ignored & 1 == 0 { Signal::HUP } else { Signal::USR2 }
}

/// Starts a helper thread.
pub(crate) fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    thread::Builder::new().stack_size(STACK_BYTES).spawn(work).expect("a helper thread")
}

/// Returns `length` bytes that look random, differ from seed to seed and are the same in each run.
pub(crate) fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Compares bytes without printing megabytes.
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

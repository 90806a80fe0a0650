//! The worker and the machines that it drives, on a simulated kernel: one seed is one schedule.
//!
//! The sources of tcpause are compiled here as they are. Only `sys.rs` and mio are replaced: `sys.rs` and `mio.rs` of this
//! folder lead to `kernel.rs`, where `link.rs` is one connection and `peer.rs` its other end. `setup.rs` draws a schedule;
//! `drive.rs` lets things happen whenever the worker waits, and between any two of its calls, as do `operator.rs` and
//! `rival.rs`, another worker. `judge.rs` says what must hold, `patience.rs` what for those who wait, and `crowd.rs` how
//! fast they go.

#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "the sources serve more than the simulation"
)]

// `use mio::…` in the sources finds what is below.
extern crate self as mio;

/// The files of `src` that are simulated. A macro, so that rustfmt does not follow it into their unit tests.
macro_rules! sources {
    ($($name:ident = $path:literal,)*) => { $(#[path = $path] mod $name;)* };
}

sources! {
    admission = "../../src/admission/mod.rs",
    connection = "../../src/connection/mod.rs",
    error = "../../src/error.rs",
    fleet_view = "../../src/fleet_view.rs",
    listing = "../../src/listing.rs",
    log_limit = "../../src/log_limit.rs",
    pause = "../../src/pause/mod.rs",
    proxy_header = "../../src/proxy_header/mod.rs",
    real_sys = "../../src/sys/mod.rs",
    rest = "../../src/server/rest.rs",
    shared = "../../src/shared.rs",
    stats = "../../src/stats/mod.rs",
    timestamp = "../../src/timestamp.rs",
    upstream = "../../src/upstream/mod.rs",
    worker = "../../src/worker/mod.rs",
    worker_pool = "../../src/worker_pool.rs",
}

mod config;
mod copies;
mod crowd;
mod dead;
mod drive;
mod fence;
mod handover;
mod judge;
mod kernel;
mod link;
#[path = "mio.rs"]
mod mio_shim;
mod operator;
mod passage;
mod patience;
mod pattern;
mod peer;
mod pipes;
#[path = "../common/random.rs"]
mod random;
mod rival;
mod settle;
mod setup;
mod stream;
mod switches;
mod sys;
mod tally;
mod weather;

use std::{
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::LazyLock,
    time::{Duration, Instant},
};

pub(crate) use mio_shim::{Events, Interest, Poll, Registry, Token, Waker, unix};

/// The module of mio with the type of events.
pub(crate) mod event {
    pub(crate) use crate::mio_shim::Event;
}

pub use tally::Tally;

use kernel::Kernel;

thread_local! {
    static KERNEL: RefCell<Option<Kernel>> = const { RefCell::new(None) };
}

/// The moment at which every schedule begins.
static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The payload of an injected panic.
struct Injected;

/// Runs the schedule of `seed` to its end. Panics when something does not hold.
pub fn run(seed: u64) -> Tally {
    let mut schedule = drive::Schedule::new(seed);
    loop {
        // As server/supervisor.rs does.
        match catch_unwind(AssertUnwindSafe(|| schedule.work())) {
            Ok(true) => break,
            Ok(false) => {}
            Err(payload) if payload.is::<Injected>() => schedule.judge_panic(),
            Err(payload) if payload.is::<passage::Exit>() => schedule.change_process(),
            Err(payload) => resume_unwind(payload),
        }
    }
    schedule.judge()
}

fn instant(elapsed: Duration) -> Instant {
    *BEGIN + elapsed
}

/// The kernel, for whoever looks at it.
fn with<T>(act: impl FnOnce(&mut Kernel) -> T) -> T {
    KERNEL.with(|kernel| act(kernel.borrow_mut().as_mut().expect("a schedule runs")))
}

/// A call of the kernel: anything may have happened right before it.
fn call<T>(act: impl FnOnce(&mut Kernel) -> T) -> T {
    drive::with_course(|course| {
        course.operate_in_between();
        judge::balance(course);
    });
    with(|kernel| {
        kernel.tick();
        act(kernel)
    })
}

//! The cost of a piece of work: the CPU time of the program under test, and that of the whole system.
//!
//! The whole system's is the time for which no processor was idle, less what other processes ran meanwhile. So it holds what
//! is done elsewhere for the program: by clients and server, by kernel threads, and by interrupts on a processor that runs
//! nothing, such as the timers of a congestion control that paces. Counting the time of the tasks would miss the last.
//!
//! The kernel tells idle time in hundredths of a second, so a piece of work has to take a second for a hundredth of
//! precision. What others do is subtracted, but it costs caches too, and kernel threads work for others as well: how much
//! others did is told beside the figures.

use std::{
    collections::HashSet,
    fs,
    time::{Duration, Instant},
};

use super::program::{self, Process, Running};

/// The cost of a piece of work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    /// CPU time of the program under test.
    pub(crate) proxy: Duration,
    /// CPU time of the whole system, other processes excepted.
    pub(crate) total: Duration,
    /// The share of all processors that other processes had.
    pub(crate) noise: f64,
}

/// The state of the clocks before a piece of work.
pub(crate) struct Meter<'a> {
    running: &'a Running,
    others: Duration,
    proxy: Duration,
    unused: Duration,
    began: Instant,
}

impl<'a> Meter<'a> {
    /// Begins to measure what `running` is used for. What takes long to read is read first, and last at the end.
    pub(crate) fn start(running: &'a Running) -> Self {
        let others = others(running);
        let proxy = running.cpu();
        Self { running, others, proxy, unused: unused(), began: Instant::now() }
    }

    /// Tells what was taken since.
    pub(crate) fn stop(self) -> Taken {
        let (elapsed, unused) = (self.began.elapsed(), unused());
        let available = elapsed * processors();
        let busy = available.saturating_sub(unused.saturating_sub(self.unused));
        let proxy = self.running.cpu().saturating_sub(self.proxy);
        let others = others(self.running).saturating_sub(self.others);
        let noise = others.as_secs_f64() / available.as_secs_f64();
        Taken { proxy, total: busy.saturating_sub(others), noise }
    }
}

/// Returns the number of processors, whichever of them this process may use.
fn processors() -> u32 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let is_one = |line: &&str| {
        line.strip_prefix("cpu")
            .is_some_and(|rest| rest.starts_with(|it: char| it.is_ascii_digit()))
    };
    u32::try_from(text.lines().filter(is_one).count()).unwrap_or(1)
}

/// The time, over all processors, for which they were idle, waited for a disk, or were not there as the host had them do
/// something else (`proc_uptime(5)`, `proc_stat(5)`).
fn unused() -> Duration {
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let idle = uptime.split_whitespace().nth(1).and_then(|it| it.parse().ok()).unwrap_or(0.0);
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<u32> =
        stat.lines().next().unwrap_or_default().split(' ').flat_map(str::parse).collect();
    let (waited, stolen) = (fields.get(4), fields.get(7));
    let ticks: u32 = [waited, stolen].into_iter().flatten().sum();
    Duration::from_secs_f64(idle) + program::TICK * ticks
}

/// Returns the CPU time of all processes that have nothing to do with the work: neither of the program, nor this one, nor a
/// thread of the kernel. Those that end meanwhile are counted with who has waited for them.
fn others(running: &Running) -> Duration {
    const KERNEL_THREADS: u32 = 2;
    let ours: HashSet<u32> = running.processes().iter().map(|process| process.pid).collect();
    let is_other = |process: &Process| {
        !ours.contains(&process.pid)
            && process.pid != std::process::id()
            && ![process.pid, process.parent].contains(&KERNEL_THREADS)
    };
    let ticks = |process: Process| process.ticks + process.ticks_of_dead_children;
    program::TICK * program::processes().into_iter().filter(is_other).map(ticks).sum::<u32>()
}

//! The cost of a piece of work: the CPU time of the program under test, and that of the whole system.
//!
//! The CPU time of the whole system is the time for which processors were not idle, less the time of other processes. So it
//! includes work that is done elsewhere for the program: by clients and server, by kernel threads, and by interrupts on an
//! idle processor, such as the timers of a congestion control that paces. A sum over all tasks would miss these interrupts.
//!
//! The kernel tells idle time in hundredths of a second, so a piece of work has to take a second for a precision of one
//! percent. Other processes are subtracted, but they also disturb caches, and kernel threads work for them, too. Their share is
//! therefore printed beside the figures.

use std::{
    collections::HashSet,
    fs,
    time::{Duration, Instant},
};

use super::program::{self, Process, Running};

/// Cost of a piece of work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    /// CPU time of the program under test.
    pub(crate) proxy: Duration,
    /// CPU time of the whole system, other processes excepted.
    pub(crate) total: Duration,
    /// Share of all processors that other processes had.
    pub(crate) noise: f64,
}

/// Clocks before a piece of work.
pub(crate) struct Meter<'a> {
    running: &'a Running,
    others: Duration,
    proxy: Duration,
    unused: Duration,
    began: Instant,
}

impl<'a> Meter<'a> {
    /// Begins to measure the work of `running`. Slow clocks are read first here and last at the end, outside the measured time.
    pub(crate) fn start(running: &'a Running) -> Self {
        let others = others(running);
        let proxy = running.cpu();
        Self { running, others, proxy, unused: unused(), began: Instant::now() }
    }

    /// Returns the cost since the start.
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

/// Returns the number of processors of the machine, including those that this process may not use.
fn processors() -> u32 {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let is_one = |line: &&str| {
        line.strip_prefix("cpu")
            .is_some_and(|rest| rest.starts_with(|it: char| it.is_ascii_digit()))
    };
    u32::try_from(text.lines().filter(is_one).count()).unwrap_or(1)
}

/// Returns the time, over all processors, in which they were idle, waited for a disk, or were taken away by the host
/// (`proc_uptime(5)`, `proc_stat(5)`).
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

/// Returns the CPU time of all other processes: not of the program, this process and the kernel's threads. A process that has
/// ended is counted with its parent.
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

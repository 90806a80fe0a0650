//! Figures of the process, under the names that Prometheus' own clients give them.

use std::{fs, path::Path, time::Duration};

use rustix::{
    param::{clock_ticks_per_second, page_size},
    process::{Resource, getrlimit},
};

/// Folder of the open descriptors. Its size is their number, from Linux 6.2 on.
const DESCRIPTORS: &str = "/proc/self/fd";
/// Most descriptors that an older kernel has to list one by one, as thousands take milliseconds.
const LISTED_MAX: usize = 1_000;

/// Figures of this process at one moment.
pub(super) struct Process {
    pub(super) cpu_seconds: f64,
    pub(super) virtual_bytes: u64,
    pub(super) resident_bytes: u64,
    /// Time from the start of the system to that of the process.
    pub(super) started: Duration,
    pub(super) open_files: Option<u64>,
    pub(super) max_files: Option<u64>,
}

impl Process {
    /// Asks the kernel for the figures. Returns none where `/proc` does not show them.
    pub(super) fn look() -> Option<Self> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // The name stands in brackets, and may hold anything.
        let fields = stat.rsplit_once(')')?.1;
        let fields: Vec<u64> =
            fields.split_whitespace().skip(1).map(|field| field.parse().unwrap_or(0)).collect();
        // The first of them is the fourth in proc(5).
        let field = |number: usize| fields.get(number - 4).copied();
        let seconds = |ticks: u64| Duration::from_millis(ticks * 1_000 / clock_ticks_per_second());
        Some(Self {
            cpu_seconds: seconds(field(14)? + field(15)?).as_secs_f64(),
            started: seconds(field(22)?),
            virtual_bytes: field(23)?,
            resident_bytes: field(24)? * page_size() as u64,
            open_files: open_files(),
            max_files: getrlimit(Resource::Nofile).current,
        })
    }
}

/// Counts the open descriptors, unless that takes too long.
fn open_files() -> Option<u64> {
    match fs::metadata(DESCRIPTORS).ok()?.len() {
        0 => listed(DESCRIPTORS),
        size => Some(size),
    }
}

/// Counts the entries of a folder of descriptors, without that of the reader.
fn listed(folder: impl AsRef<Path>) -> Option<u64> {
    let entries = fs::read_dir(folder).ok()?.take(LISTED_MAX + 2).count();
    (entries <= LISTED_MAX + 1).then_some((entries as u64).saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_those_of_this_process() {
        let _held: Vec<_> = (0..100).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let before = Process::look().unwrap();
        assert!(before.open_files.is_none_or(|open| open > 100), "{:?}", before.open_files);
        assert!(before.max_files.is_none_or(|max| Some(max) > before.open_files));
        assert!(before.resident_bytes > 1 << 20 && before.virtual_bytes > before.resident_bytes);
        let spent = (0..30_000_000_u64).fold(0, |sum, number| std::hint::black_box(sum ^ number));
        let after = Process::look().unwrap();
        assert!(after.cpu_seconds > before.cpu_seconds, "{spent}");
        assert_eq!(after.started, before.started);
    }

    #[test]
    fn descriptors_are_listed_up_to_a_bound() {
        let folder = tempfile::tempdir().unwrap();
        let mut made = 0;
        for (entries, expected) in
            [(1, Some(0)), (101, Some(100)), (1_001, Some(1_000)), (1_002, None)]
        {
            while made < entries {
                fs::write(folder.path().join(made.to_string()), "").unwrap();
                made += 1;
            }
            assert_eq!(listed(folder.path()), expected, "{entries}");
        }
    }
}

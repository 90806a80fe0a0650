//! The limit of open files, shared out among clients, pipes and callers of the control API.

use crate::config::ProxyConfig;

/// Default number of pipes of all workers together: half of the pipe memory of an unprivileged user. A pipe is taken only while
/// bytes wait in it; without a free pipe, a connection copies.
const PIPES_MAX: usize = 32;

/// Most callers of the control API at a time, waiting ones included; fewer where descriptors are few.
const CALLERS_MAX: usize = 128;
const CALLERS_MIN: usize = 2;

/// Descriptors that the process needs once: for the control API and its present request, signals, the log and a look-up.
const FIXED_FILES: usize = 27;
/// Descriptors of a worker: its poll and its waker.
const WORKER_FILES: usize = 2;

/// Numbers of clients, pipes and callers that the limit of open files and the settings allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) clients: usize,
    pub(super) pipes: usize,
    pub(super) callers: usize,
}

impl Limits {
    /// Shares out `files` descriptors. A client counts as two, its own and its upstream's, even while it is held, so that a
    /// resume can serve it.
    pub(super) fn new(files: u64, threads: usize, listeners: usize, proxy: &ProxyConfig) -> Self {
        let files = usize::try_from(files).unwrap_or(usize::MAX);
        let fixed = FIXED_FILES + WORKER_FILES * threads + listeners;
        // A caller takes one descriptor.
        let callers = (files / 4).saturating_sub(fixed).clamp(CALLERS_MIN, CALLERS_MAX);
        // Each worker gets a pipe at least, if descriptors allow it.
        let share = (files / 16).min(PIPES_MAX.max(threads));
        let pipes = proxy.pipes.map_or(share, |pipes| pipes * threads);
        let allowed = files.saturating_sub(fixed + callers + 2 * pipes) / 2;
        let wanted = proxy.max_connections.map_or(usize::MAX, usize::from);
        Self { clients: allowed.min(wanted).max(1), pipes, callers }
    }

    /// Warns if `proxy.max-connections` is more than `files` descriptors allow.
    pub(super) fn warn(&self, files: u64, proxy: &ProxyConfig) {
        if let Some(max) = proxy.max_connections.filter(|max| max.get() > self.clients) {
            let there_are = if self.clients == 1 { "there is" } else { "there are" };
            log::warn!(
                "proxy.max-connections: {max} are more than {files} open files allow; {there_are} {}: raise the limit of open files",
                counted(self.clients, "place")
            );
        }
    }
}

/// Returns a number with its noun: `1 client`, `2 clients`.
pub(super) fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    #[test]
    fn descriptors_are_kept_for_the_control_api() {
        for (files, threads, max, clients, pipes, callers) in [
            (1_000_000, 2, 0, 499_887, 32, 128),
            (20_000, 2, 0, 9_887, 32, 128),
            (20_000, 2, 5, 5, 32, 128),
            (1_024, 2, 0, 399, 32, 128),
            (1_024, 2, 5_000, 399, 32, 128),
            (20_000, 64, 0, 9_762, 64, 128),
            (64, 2, 0, 10, 4, 2),
            (1, 2, 0, 1, 0, 2),
        ] {
            let max_connections = NonZeroUsize::new(max);
            assert_eq!(
                Limits::new(
                    files,
                    threads,
                    threads + 1,
                    &ProxyConfig { max_connections, ..Default::default() }
                ),
                Limits { clients, pipes, callers },
                "{files}"
            );
        }
    }
}

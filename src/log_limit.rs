//! `LogLimit`: keeps messages that may repeat quickly from filling the log. And the number of lines that were dropped.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Least interval between two messages about one problem.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Number of lines that the program's logger has dropped since its start. The log is one for the whole process, and so is
/// its count.
pub static LOG_LINES_DROPPED: AtomicU64 = AtomicU64::new(0);

/// A limit of one message in each [`LOG_INTERVAL`], which also counts the suppressed ones. Threads share it, so a
/// problem that all of them have is logged once.
#[derive(Debug)]
pub(crate) struct LogLimit {
    begin: Instant,
    /// End of the present interval, in milliseconds after `begin`.
    until: AtomicU64,
    suppressed: AtomicU64,
}

impl LogLimit {
    /// Returns `None` if a message is to be suppressed now. Otherwise returns its suffix, which tells the number of
    /// messages suppressed since the last one.
    pub(crate) fn allow(&self, now: Instant) -> Option<String> {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let now = millis(now.saturating_duration_since(self.begin));
        let next = now.saturating_add(millis(LOG_INTERVAL));
        let advance = |until| (until <= now).then_some(next);
        // Of threads that come at the same time, one succeeds and the others are suppressed.
        if self.until.fetch_update(Ordering::Relaxed, Ordering::Relaxed, advance).is_err() {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(match self.suppressed.swap(0, Ordering::Relaxed) {
            0 => String::new(),
            suppressed => format!(" ({suppressed} more since the last such line)"),
        })
    }
}

impl Default for LogLimit {
    fn default() -> Self {
        Self { begin: Instant::now(), until: AtomicU64::new(0), suppressed: AtomicU64::new(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_message_in_each_interval_tells_of_the_others() {
        let (limit, begin) = (LogLimit::default(), Instant::now());
        assert_eq!(limit.allow(begin), Some(String::new()));
        assert_eq!(limit.allow(begin), None);
        assert_eq!(limit.allow(begin + LOG_INTERVAL / 2), None);
        let later = limit.allow(begin + LOG_INTERVAL).unwrap();
        assert_eq!(later, " (2 more since the last such line)");
        assert_eq!(limit.allow(begin + 2 * LOG_INTERVAL), Some(String::new()));
    }
}

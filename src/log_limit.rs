//! `LogLimit`: keeps what may repeat quickly from filling the log.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// A trouble is logged about at most this often.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Lets one message through in each [`LOG_INTERVAL`], with the number of those that it held back. Threads share it: the
/// trouble that all of them have is told once.
#[derive(Debug)]
pub(crate) struct LogLimit {
    begin: Instant,
    /// Milliseconds after `begin`: until then, messages are held back.
    until: AtomicU64,
    held_back: AtomicU64,
}

impl LogLimit {
    /// Whether a message may be logged now; if so, what to say of those held back since the last one.
    pub(crate) fn allow(&self, now: Instant) -> Option<String> {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let now = millis(now.saturating_duration_since(self.begin));
        let next = now.saturating_add(millis(LOG_INTERVAL));
        let advance = |until| (until <= now).then_some(next);
        // Of threads that come at the same time one goes first, and the others are held back.
        if self.until.fetch_update(Ordering::Relaxed, Ordering::Relaxed, advance).is_err() {
            self.held_back.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(match self.held_back.swap(0, Ordering::Relaxed) {
            0 => String::new(),
            held_back => format!(" ({held_back} more since the last such line)"),
        })
    }
}

impl Default for LogLimit {
    fn default() -> Self {
        Self { begin: Instant::now(), until: AtomicU64::new(0), held_back: AtomicU64::new(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_message_in_each_interval_tells_of_the_others() {
        let (throttle, begin) = (LogLimit::default(), Instant::now());
        assert_eq!(throttle.allow(begin), Some(String::new()));
        assert_eq!(throttle.allow(begin), None);
        assert_eq!(throttle.allow(begin + LOG_INTERVAL / 2), None);
        let later = throttle.allow(begin + LOG_INTERVAL).unwrap();
        assert_eq!(later, " (2 more since the last such line)");
        assert_eq!(throttle.allow(begin + 2 * LOG_INTERVAL), Some(String::new()));
    }
}

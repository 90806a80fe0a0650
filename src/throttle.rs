//! `Throttle`: keeps what may repeat quickly from filling the log.

use std::time::{Duration, Instant};

/// A trouble is logged about at most this often.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Lets one message through in each [`LOG_INTERVAL`], with the number of those that it held back.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    last: Option<Instant>,
    held_back: u64,
}

impl Throttle {
    /// Whether a message may be logged now; if so, what to say of those held back since the last one.
    pub(crate) fn let_through(&mut self, now: Instant) -> Option<String> {
        if self.last.is_some_and(|last| now.duration_since(last) < LOG_INTERVAL) {
            self.held_back += 1;
            return None;
        }
        self.last = Some(now);
        let held_back = std::mem::take(&mut self.held_back);
        Some(if held_back == 0 {
            String::new()
        } else {
            format!(" ({held_back} more times since the last such line)")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_message_in_each_interval_tells_of_the_others() {
        let (mut throttle, begin) = (Throttle::default(), Instant::now());
        assert_eq!(throttle.let_through(begin), Some(String::new()));
        assert_eq!(throttle.let_through(begin), None);
        assert_eq!(throttle.let_through(begin + LOG_INTERVAL / 2), None);
        let later = throttle.let_through(begin + LOG_INTERVAL).unwrap();
        assert_eq!(later, " (2 more times since the last such line)");
        assert_eq!(throttle.let_through(begin + 2 * LOG_INTERVAL), Some(String::new()));
    }
}

//! Bound of the log lines about ended connections. Each worker has its share of `log.connections-rate`, and the rest is
//! counted by cause and told once a second.

use std::{
    fmt::Write,
    time::{Duration, Instant},
};

use log::{Level, Record, kv::Value};

use crate::{
    config::{ConnectionLog, LogConfig},
    stats::cause::CloseCause,
};

/// Time for which a share of lines counts, and after which the suppressed ones are told.
const INTERVAL: Duration = Duration::from_secs(1);

/// Limit of a worker's lines about connections.
#[derive(Debug)]
pub(super) struct ConnectionLogLimit {
    mode: ConnectionLog,
    /// Lines of one interval, at most. A tenth is left to failures.
    share: u32,
    /// Lines of the present interval so far.
    lines: u32,
    /// End of the present interval.
    until: Option<Instant>,
    /// Connections that were not logged in the present interval, by cause.
    suppressed: [u32; CloseCause::ALL.len()],
}

impl ConnectionLogLimit {
    /// Returns the limit of one of `workers` workers.
    pub(super) fn new(settings: LogConfig, workers: usize) -> Self {
        let workers = u32::try_from(workers).unwrap_or(u32::MAX);
        Self {
            mode: settings.connections,
            share: settings.connections_rate.get().div_ceil(workers.max(1)),
            lines: 0,
            until: None,
            suppressed: [0; CloseCause::ALL.len()],
        }
    }

    /// Returns true if the end of a connection by `cause` is to be logged. Otherwise counts it.
    pub(super) fn allow(&mut self, cause: CloseCause, now: Instant) -> bool {
        let is_wanted = match self.mode {
            ConnectionLog::Off => false,
            ConnectionLog::Failures => cause.is_failure(),
            ConnectionLog::All => true,
        };
        if !is_wanted {
            return false;
        }
        self.tell(now);
        self.until.get_or_insert(now + INTERVAL);
        let share = if cause.is_failure() { self.share } else { self.share - self.share / 10 };
        let is_allowed = self.lines < share;
        if is_allowed {
            self.lines += 1;
        } else if let Some(suppressed) = self.suppressed.get_mut(cause as usize) {
            *suppressed += 1;
        }
        is_allowed
    }

    /// Returns the time at which suppressed lines are to be told; none without any.
    pub(super) fn tell_at(&self) -> Option<Instant> {
        self.until.filter(|_until| self.suppressed.iter().any(|&suppressed| suppressed > 0))
    }

    /// Ends the interval if its time is over, and tells of the connections that were not logged.
    pub(super) fn tell(&mut self, now: Instant) {
        if self.until.is_some_and(|until| until <= now) {
            self.tell_all();
        }
    }

    /// Ends the interval, and tells of the connections that were not logged.
    pub(super) fn tell_all(&mut self) {
        let (mut told, mut level) = (String::new(), Level::Info);
        let mut fields = vec![("event", Value::from("connections-not-logged"))];
        for (cause, suppressed) in CloseCause::ALL.iter().zip(std::mem::take(&mut self.suppressed))
        {
            if suppressed > 0 {
                let comma = if told.is_empty() { "" } else { "," };
                // Writing to a String cannot fail.
                write!(told, "{comma} {suppressed} {}", cause.word()).ok();
                level = level.min(cause.level());
                fields.push((cause.word(), suppressed.into()));
            }
        }
        if !told.is_empty() {
            let mut record = Record::builder();
            record.level(level).target(module_path!()).key_values(&fields);
            log::logger().log(&record.args(format_args!("connections not logged:{told}")).build());
        }
        (self.lines, self.until) = (0, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_logs_its_share_and_counts_the_rest() {
        let settings = LogConfig {
            connections: ConnectionLog::Failures,
            connections_rate: 3.try_into().unwrap(),
            ..LogConfig::default()
        };
        let (mut limit, begin) = (ConnectionLogLimit::new(settings, 2), Instant::now());
        assert!(!limit.allow(CloseCause::Ended, begin), "no failure");
        let allowed = |limit: &mut ConnectionLogLimit, now| limit.allow(CloseCause::Stopped, now);
        assert_eq!([(); 3].map(|()| allowed(&mut limit, begin)), [true, true, false]);
        assert_eq!(limit.tell_at(), Some(begin + INTERVAL));
        assert_eq!(limit.suppressed[CloseCause::Stopped as usize], 1);
        limit.tell(begin + INTERVAL / 2);
        assert!(limit.tell_at().is_some(), "not yet");
        assert!(allowed(&mut limit, begin + INTERVAL), "a new interval");
        assert_eq!((limit.tell_at(), limit.suppressed), (None, [0; CloseCause::ALL.len()]));
    }
}

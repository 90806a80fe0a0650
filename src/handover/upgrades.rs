//! `Upgrades`: the upgrades of a proxy over all of its processes, for the status.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::timestamp::Rfc3339;

/// The last upgrade of a proxy, or the last attempt at one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastUpgrade {
    /// Time of its end, in RFC 3339.
    pub at: String,
    /// Seconds for which no byte moved; null if it has failed.
    pub stall_seconds: Option<f64>,
    /// Connections that were taken over; null if it has failed.
    pub connections: Option<u64>,
    /// Reason of its failure; null if it has succeeded.
    pub error: Option<String>,
}

/// Upgrades so far, which each process tells the next.
#[derive(Debug, Default)]
pub(crate) struct Upgrades(Mutex<UpgradesWords>);

/// Upgrades as they are kept, and as they travel in a hand-over.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct UpgradesWords {
    /// Number of those that have succeeded.
    pub(crate) count: u64,
    /// Number of those that have failed.
    pub(crate) failed: u64,
    pub(crate) last: Option<LastUpgrade>,
}

impl Upgrades {
    /// Takes over upgrades that were described.
    pub(crate) fn restore(&self, words: UpgradesWords) {
        *self.lock() = words;
    }

    /// Returns the upgrades so far.
    pub(crate) fn describe(&self) -> UpgradesWords {
        self.lock().clone()
    }

    /// Records an upgrade, which has taken over `connections` connections and has stalled them for `stall`.
    pub(crate) fn succeeded(&self, at: Rfc3339, stall: Duration, connections: u64) {
        let mut upgrades = self.lock();
        upgrades.count += 1;
        upgrades.last = Some(LastUpgrade {
            at: at.to_string(),
            // No more digits than a microsecond's.
            stall_seconds: Some((stall.as_secs_f64() * 1e6).round() / 1e6),
            connections: Some(connections),
            error: None,
        });
    }

    /// Records an upgrade that has failed.
    pub(crate) fn failed(&self, why: &str) {
        let mut upgrades = self.lock();
        upgrades.failed += 1;
        upgrades.last = Some(LastUpgrade {
            at: Rfc3339::now().to_string(),
            stall_seconds: None,
            connections: None,
            error: Some(why.to_owned()),
        });
    }

    /// Locks the record. It ignores poison, as no panic can leave the record half-changed.
    fn lock(&self) -> MutexGuard<'_, UpgradesWords> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upgrades_are_counted_over_processes_and_the_last_one_is_told() {
        let upgrades = Upgrades::default();
        assert_eq!(upgrades.describe(), UpgradesWords::default());
        let at = Rfc3339::now();
        upgrades.succeeded(at, Duration::from_nanos(35_123_456), 9_000);
        let text = serde_json::to_string(&upgrades.describe()).unwrap();
        let next = Upgrades::default();
        next.restore(serde_json::from_str(&text).unwrap());
        let last = LastUpgrade {
            at: at.to_string(),
            stall_seconds: Some(0.035_123),
            connections: Some(9_000),
            error: None,
        };
        assert_eq!(next.describe(), UpgradesWords { count: 1, failed: 0, last: Some(last) });
        next.failed("the program is missing");
        let UpgradesWords { count, failed, last } = next.describe();
        let last = last.unwrap();
        assert_eq!((count, failed, last.error.as_deref()), (1, 1, Some("the program is missing")));
        assert!(last.stall_seconds.is_none() && last.connections.is_none());
        upgrades.restore(next.describe());
        upgrades.succeeded(at, Duration::ZERO, 0);
        let UpgradesWords { count, failed, .. } = upgrades.describe();
        assert_eq!((count, failed), (2, 1));
    }
}

//! Leases as they travel in a hand-over.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Lease, Leases, Lifetime, Terms, Timestamp};
use crate::{
    handover::parcel::{Incoming, Moment, Outgoing},
    pause::gate::Mode,
    timestamp::Rfc3339,
};

/// All leases in a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeasesWords {
    /// In the order of the list, the hidden ones too.
    list: Vec<LeaseWords>,
    paused_since: Option<TimestampWords>,
    /// Names of the fleet's leases that an operator has lifted here alone.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    forced: BTreeSet<String>,
}

/// One pause in a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct LeaseWords {
    terms: Terms,
    lifetime: Lifetime,
    request_id: u64,
    since: TimestampWords,
    ends: Option<Moment>,
}

/// One point in time by two clocks in a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct TimestampWords {
    at: Moment,
    /// Time since 1970.
    shown: std::time::Duration,
}

/// Words for a mode, whose file stands alone.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Mode", rename_all = "kebab-case")]
pub(super) enum ModeWords {
    Hold,
    Reject,
}

impl Leases {
    /// Describes the leases for a hand-over.
    pub(crate) fn describe(&self, parcel: &Outgoing<'_>) -> LeasesWords {
        let Self { list, paused_since, forced } = self;
        LeasesWords {
            list: list.iter().map(|lease| lease.describe(parcel)).collect(),
            paused_since: paused_since.map(|since| since.describe(parcel)),
            forced: forced.clone(),
        }
    }

    /// Returns leases that were described. Their ends have not moved.
    pub(crate) fn rebuild(words: &LeasesWords, parcel: &Incoming) -> Self {
        let LeasesWords { list, paused_since, forced } = words;
        Self {
            list: list.iter().map(|lease| Lease::rebuild(lease, parcel)).collect(),
            paused_since: paused_since.as_ref().map(|since| Timestamp::rebuild(since, parcel)),
            forced: forced.clone(),
        }
    }
}

impl Lease {
    fn describe(&self, parcel: &Outgoing<'_>) -> LeaseWords {
        let Self { terms, lifetime, request_id, since, ends } = self;
        LeaseWords {
            terms: terms.clone(),
            lifetime: *lifetime,
            request_id: *request_id,
            since: since.describe(parcel),
            ends: ends.map(|end| parcel.moment(end)),
        }
    }

    fn rebuild(words: &LeaseWords, parcel: &Incoming) -> Self {
        let LeaseWords { terms, lifetime, request_id, since, ends } = words;
        Self {
            terms: terms.clone(),
            lifetime: *lifetime,
            request_id: *request_id,
            since: Timestamp::rebuild(since, parcel),
            ends: ends.map(|end| parcel.instant(end)),
        }
    }
}

impl Timestamp {
    fn describe(&self, parcel: &Outgoing<'_>) -> TimestampWords {
        let Self { at, shown } = self;
        TimestampWords { at: parcel.moment(*at), shown: shown.unix_time() }
    }

    fn rebuild(words: &TimestampWords, parcel: &Incoming) -> Self {
        let TimestampWords { at, shown } = words;
        Self { at: parcel.instant(*at), shown: Rfc3339::of_unix_time(*shown) }
    }
}

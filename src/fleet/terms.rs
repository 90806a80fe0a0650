//! Terms of a fleet's pause at one host: the words of its record, read.

use std::time::Duration;

use super::{clock::Timing, keys::Record};
use crate::{
    config::{HalfClosed, duration::parse_duration, suggest::nearest},
    pause::{
        gate::Mode,
        leases::{FLEET_PREFIX, Quiet, Terms, mode_name},
    },
};

/// Shortest silence of a quiet connection: below, it may wait for its answer.
const QUIET_MIN: Duration = Duration::from_millis(100);

/// Returns the terms of the lease for a record. Without a renewal it lasts for `keep_paused_for`, or for twice the time in which
/// the pause ends without its coordinator, if that is longer: this host does not resume before the others. What a later version
/// has written, and this one cannot read, is the default.
pub(crate) fn terms(
    name: &str,
    record: &Record,
    keep_paused_for: Duration,
    (mode, half_closed): (Mode, HalfClosed),
) -> Terms {
    let modes = [Mode::Hold, Mode::Reject];
    let found = modes.into_iter().find(|mode| record.mode.as_deref() == Some(mode_name(*mode)));
    let ends_alone = record.ttl.saturating_add(Timing::new(record.ttl).linger());
    let word = |treatment: &HalfClosed| record.half_closed.as_deref() == Some(treatment.word());
    Terms {
        name: format!("{FLEET_PREFIX}{name}"),
        reason: record.reason.clone(),
        by: record.by.clone(),
        mode: found.unwrap_or(mode),
        ttl: Some(keep_paused_for.max(ends_alone.saturating_mul(2))),
        quiet: record.drain.as_deref().and_then(|drain| parse_quiet(drain).ok()),
        half_closed: HalfClosed::ALL.into_iter().find(word).unwrap_or(half_closed),
    }
}

/// Reads `quiet:2s` or `quiet:2s,postgres`. The error is a clause for the operator.
pub(crate) fn parse_quiet(value: &str) -> Result<Quiet, String> {
    let Some(quiet) = value.strip_prefix("quiet:") else {
        return Err(format!("{value:?} is not known; write quiet: and a time, as in quiet:2s"));
    };
    let (time, protocol) =
        quiet.split_once(',').map_or((quiet, None), |(time, it)| (time, Some(it)));
    let time = parse_duration(time)?;
    if time < QUIET_MIN {
        return Err(format!("{value:?} is too short: at least quiet:100ms, or it cuts answers"));
    }
    match protocol {
        None => Ok(Quiet::Any(time)),
        Some("postgres") => Ok(Quiet::Postgres(time)),
        Some(other) => {
            let hint = nearest(other, ["postgres"]).map_or("", |_| " (did you mean postgres?)");
            Err(format!("{other:?} is not known; write postgres, as in quiet:2s,postgres{hint}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_kept_for_twice_its_own_end_if_that_is_longer() {
        let minutes = |count: u64| Duration::from_secs(60 * count);
        for (keep, ttl, kept) in [
            (minutes(10), Duration::from_secs(15), minutes(10)),
            // 2 (ttl + ttl / 3 + 3 τ)
            (minutes(10), minutes(9), minutes(24) + Duration::from_secs(18)),
            (minutes(10), Duration::MAX, Duration::MAX),
        ] {
            let record = Record { ttl, ..record() };
            let terms = terms("deploy", &record, keep, (Mode::Hold, HalfClosed::Drop));
            assert_eq!(terms.ttl, Some(kept), "{ttl:?}");
        }
    }

    fn record() -> Record {
        serde_json::from_str(r#"{"id": "1", "by": "a", "ttl": {"secs": 15, "nanos": 0}}"#).unwrap()
    }

    #[test]
    fn a_record_gives_the_terms_of_a_lease() {
        let minute = Duration::from_secs(60);
        let terms = |text: &str| {
            let record: Record = serde_json::from_str(text).unwrap();
            terms("deploy", &record, minute, (Mode::Reject, HalfClosed::Drop))
        };
        let ttl = r#""ttl": {"secs": 15, "nanos": 0}"#;
        let all = format!(
            r#"{{"id": "1", "by": "uid 0 on a", "reason": "v2", "mode": "hold", "drain": "quiet:2s,postgres", "half-closed": "serve", {ttl}}}"#
        );
        let expected = Terms {
            name: "fleet/deploy".to_owned(),
            reason: Some("v2".to_owned()),
            by: "uid 0 on a".to_owned(),
            mode: Mode::Hold,
            ttl: Some(minute),
            quiet: Some(Quiet::Postgres(Duration::from_secs(2))),
            half_closed: HalfClosed::Serve,
        };
        assert_eq!(terms(&all), expected);
        let defaults = Terms {
            reason: None,
            mode: Mode::Reject,
            quiet: None,
            half_closed: HalfClosed::Drop,
            ..expected
        };
        for later in ["", r#""mode": "queue", "drain": "loud", "half-closed": "keep","#] {
            assert_eq!(
                terms(&format!(r#"{{"id": "1", "by": "uid 0 on a", {later} {ttl}}}"#)),
                defaults
            );
        }
    }
}

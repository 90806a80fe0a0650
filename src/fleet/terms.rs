//! Terms of a fleet's pause at one host: the words of its record, read.

use std::time::Duration;

use super::keys::Record;
use crate::{
    config::{HalfClosed, duration::parse_duration, suggest::nearest},
    pause::{
        gate::Mode,
        leases::{FLEET_PREFIX, Quiet, Terms, mode_name},
    },
};

/// Shortest silence of a quiet connection: below, it may wait for its answer.
const QUIET_MIN: Duration = Duration::from_millis(100);

/// Returns the terms of the lease for a record. It lasts for `ttl` without a renewal. What a later version has written, and
/// this one cannot read, is the default.
pub(crate) fn terms(
    name: &str,
    record: &Record,
    ttl: Duration,
    (mode, half_closed): (Mode, HalfClosed),
) -> Terms {
    let modes = [Mode::Hold, Mode::Reject];
    let found = modes.into_iter().find(|mode| record.mode.as_deref() == Some(mode_name(*mode)));
    let word = |treatment: &HalfClosed| record.half_closed.as_deref() == Some(treatment.word());
    Terms {
        name: format!("{FLEET_PREFIX}{name}"),
        reason: record.reason.clone(),
        by: record.by.clone(),
        mode: found.unwrap_or(mode),
        ttl: Some(ttl),
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

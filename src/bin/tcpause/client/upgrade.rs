//! `tcpause upgrade`, also as `tcpause reload`: has a running proxy start its program anew.

use std::{process::ExitCode, time::Duration};

use serde_json::Value;
use tcpause::format_duration;

use super::{Api, Failure};
use crate::{cli::Invocation, logger::OneLine, print};

/// Longest time that the API takes for an upgrade.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(60);

/// Asks for an upgrade, and prints its outcome.
pub(super) fn run(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    let answer = api.ask("POST", "/upgrade", Some(UPGRADE_TIMEOUT)).map_err(|failure| {
        match failure {
            // The file is about to be read anew, so it may tell an address that nobody has yet.
            Failure::Unreachable(text) if invocation.setting("control.addr").is_none() => {
                Failure::Unreachable(format!(
                    "{text}; where control.addr has changed since the start, --control-addr takes the old one"
                ))
            }
            failure => failure,
        }
    })?;
    match answer.status {
        200 => Ok(print(&line(&answer.json()))?),
        // The proxy goes on, and the same request again would fail alike.
        409 => Err(Failure::Other(Failure::refused(api, &answer).told().1.to_owned())),
        _ => Err(Failure::refused(api, &answer)),
    }
}

/// Returns the outcome in one line.
fn line(body: &Value) -> String {
    let version = body.get("version").and_then(Value::as_str).unwrap_or("an unknown version");
    let number = |name| body.get(name).and_then(Value::as_u64).unwrap_or_default();
    let seconds = body.get("stall_seconds").and_then(Value::as_f64).unwrap_or_default();
    let (pid, moved) = (number("pid"), number("connections"));
    let connections = if moved == 1 { "connection" } else { "connections" };
    format!(
        "upgraded to {}, pid {pid}: {moved} {connections} moved, stalled for {}\n",
        OneLine(version),
        stall(seconds)
    )
}

/// Returns the length of a standstill, which is told to a tenth of a millisecond if it is short.
pub(super) fn stall(seconds: f64) -> String {
    let stall = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    if stall < Duration::from_millis(100) {
        return format!("{:.1}ms", stall.as_secs_f64() * 1e3);
    }
    let rounded = (stall + Duration::from_micros(500)).as_millis();
    format_duration(Duration::from_millis(u64::try_from(rounded).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_standstill_is_told_in_tenths_of_a_millisecond() {
        for (seconds, expected) in [
            (0.001_8, "1.8ms"),
            (0.000_04, "0.0ms"),
            (0.035_46, "35.5ms"),
            (0.123_6, "124ms"),
            (2.0, "2s"),
            (-1.0, "0.0ms"),
        ] {
            assert_eq!(stall(seconds), expected);
        }
    }

    #[test]
    fn the_outcome_is_one_line() {
        for (body, expected) in [
            (
                r#"{"version": "0.1.0", "pid": 1234, "connections": 9000, "stall_seconds": 0.035}"#,
                "upgraded to 0.1.0, pid 1234: 9000 connections moved, stalled for 35.0ms\n",
            ),
            (
                r#"{"version": "0.2.0\n", "pid": 7, "connections": 1, "stall_seconds": 1.25}"#,
                "upgraded to 0.2.0\\n, pid 7: 1 connection moved, stalled for 1s250ms\n",
            ),
        ] {
            assert_eq!(line(&serde_json::from_str(body).unwrap()), expected);
        }
    }
}

//! `tcpause status`: the status of a running proxy, as a table.

use std::{
    fmt,
    io::{self, ErrorKind, IsTerminal, Write as _},
    process::ExitCode,
    time::Duration,
};

use tcpause::{LeaseStatus, Status, format_duration};

use super::{Answer, Api, Failure};
use crate::{cli::Invocation, logger::OneLine};

/// Time between two requests of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Shows the status, once or repeatedly.
pub(super) fn show(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    let is_raw = invocation.asked("json").is_some();
    if invocation.asked("watch").is_none() {
        write(&look(api, is_raw)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let in_place = io::stdout().is_terminal();
    let mut due = crossbeam_channel::after(Duration::ZERO);
    // The loop ends with Ctrl-C, or when the reader of the output has gone.
    while due.recv().is_ok() {
        let text = look(api, is_raw)
            .unwrap_or_else(|failure| format!("{}\n", OneLine(failure.told().1)).into_bytes());
        if !write(&if in_place { over(&text) } else { text })? {
            break;
        }
        due = crossbeam_channel::after(WATCH_INTERVAL);
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the remaining time of the pause with this name; `None` if it has no end, or if the proxy does not answer.
pub(super) fn time_left(api: &Api, name: &str) -> Option<String> {
    let status = read(&ask(api).ok()?).ok()?;
    let lease = status.leases.iter().find(|lease| lease.name == name)?;
    lease.expires_in_seconds.map(|seconds| age(seconds.round()))
}

/// Returns the names of the pauses that hold.
pub(super) fn pauses(api: &Api) -> Result<Vec<String>, Failure> {
    Ok(read(&ask(api)?)?.leases.into_iter().map(|lease| lease.name).collect())
}

fn look(api: &Api, is_raw: bool) -> Result<Vec<u8>, Failure> {
    let answer = ask(api)?;
    Ok(if is_raw { answer.body } else { table(&read(&answer)?).into_bytes() })
}

fn ask(api: &Api) -> Result<Answer, Failure> {
    let answer = api.ask("GET", "/status", None)?;
    match answer.status {
        200 if answer.json().is_object() => Ok(answer),
        _ => Err(Failure::refused(api, &answer)),
    }
}

fn read(answer: &Answer) -> Result<Status, Failure> {
    serde_json::from_slice(&answer.body).map_err(|error| {
        Failure::Other(format!("the status cannot be read: {error}; --json shows it as it is"))
    })
}

/// Writes all at once, so that a terminal never shows half of it. Returns false if the reader has gone.
fn write(text: &[u8]) -> Result<bool, Failure> {
    let mut output = io::stdout().lock();
    match output.write_all(text).and_then(|()| output.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::Other(format!("cannot write to standard output: {error}"))),
    }
}

/// Returns the text with escapes by which it replaces the terminal's screen. Each line clears the rest of its row, and the
/// last line clears all rows below.
fn over(text: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(text).replace('\n', "\x1b[K\n");
    format!("\x1b[H{text}\x1b[J").into_bytes()
}

fn table(status: &Status) -> String {
    let state = match &status.paused_since {
        Some(since) if status.paused => format!("paused since {since}"),
        _ if status.paused => "paused".to_owned(),
        _ if status.held > 0 => format!("running, {} still to be let go", status.held),
        _ => "running".to_owned(),
    };
    let oldest = match status.oldest_seconds {
        Some(seconds) => format!(", the oldest for {}", age(seconds)),
        None => String::new(),
    };
    let now = [
        ("state", state),
        ("held", status.held.to_string()),
        ("connecting", status.connecting.to_string()),
        ("active", format!("{}{oldest}", status.active)),
        ("rejecting", status.rejecting.to_string()),
    ];
    // These counts are usually zero, and shown only if they are not.
    let seldom = [
        ("rejected", status.rejected),
        ("failed", status.failed),
        ("left", status.left),
        ("drained", status.drained),
        ("killed", status.killed),
        ("panics", status.worker_panics),
    ];
    let seldom = seldom.into_iter().filter(|(_, count)| *count > 0);
    let rest = [
        (
            "bytes",
            format!(
                "{} to the upstream, {} to clients",
                Bytes(status.bytes_to_upstream),
                Bytes(status.bytes_to_client)
            ),
        ),
        ("upstream", OneLine(&status.upstream).to_string()),
        ("tcpause", format!("{}, up for {}", OneLine(&status.version), age(status.uptime_seconds))),
    ];
    let pauses = status.leases.iter().map(|lease| ("pause", OneLine(Pause(lease)).to_string()));
    let seldom = seldom.map(|(name, count)| (name, count.to_string()));
    let rows = now.into_iter().chain(seldom).chain(rest).chain(pauses);
    let lines: Vec<String> = rows.map(|(name, value)| format!("{name:12}{value}\n")).collect();
    lines.concat()
}

/// Pause as a line of the table:
/// `deploy (new version) by uid 0, pid 12 since 2026-11-24T11:45:35.666Z: hold, ends in 1m30s`.
struct Pause<'a>(&'a LeaseStatus);

impl fmt::Display for Pause<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(lease) = self;
        f.write_str(&lease.name)?;
        if let Some(reason) = &lease.reason {
            write!(f, " ({reason})")?;
        }
        if let Some(by) = &lease.by {
            write!(f, " by {by}")?;
        }
        write!(f, " since {}: {}", lease.since, lease.mode)?;
        if let Some(seconds) = lease.expires_in_seconds {
            write!(f, ", ends in {}", age(seconds))?;
        }
        if let Some(seconds) = lease.drain_quiet_seconds {
            write!(f, ", drains what is quiet for {}", age(seconds))?;
        }
        Ok(())
    }
}

/// Formats a time in whole seconds, or in milliseconds below one second.
pub(super) fn age(seconds: f64) -> String {
    let duration = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let shown = if millis < 1_000 { millis } else { millis / 1_000 * 1_000 };
    format_duration(Duration::from_millis(shown))
}

/// Number of bytes, shown in the largest unit that keeps it at one or more.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];

        // Tenths of the unit, computed in whole numbers.
        let (mut tenths, mut unit) = (u128::from(self.0) * 10, "B");
        for next in UNITS {
            if tenths < 10_240 {
                break;
            }
            (tenths, unit) = (tenths / 1_024, next);
        }
        match unit {
            "B" => write!(f, "{} B", self.0),
            _ => write!(f, "{}.{} {unit}", tenths / 10, tenths % 10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_ages_have_the_unit_that_suits_them() {
        for (bytes, shown) in [
            (0, "0 B"),
            (1_023, "1023 B"),
            (1_024, "1.0 KiB"),
            (1_600, "1.5 KiB"),
            (1 << 20, "1.0 MiB"),
            ((1 << 30) - 1, "1023.9 MiB"),
            (3 << 40, "3.0 TiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), shown);
        }
        for (seconds, shown) in [
            (0.0, "0s"),
            (0.25, "250ms"),
            (1.9, "1s"),
            (90.5, "1m30s"),
            (-1.0, "0s"),
            (1e300, "0s"),
        ] {
            assert_eq!(age(seconds), shown);
        }
    }

    #[test]
    fn a_terminal_is_written_over() {
        assert_eq!(over(b"a\nb\n"), b"\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
    }
}

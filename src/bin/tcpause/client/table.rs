//! The status of a proxy as a table for people.

use std::{fmt, time::Duration};

use tcpause::{LeaseStatus, MemberStatus, Status, SteeringStatus, format_duration};

use super::upgrade::stall;
use crate::logger::OneLine;

/// Returns the table. With an earlier status of the same proxy, totals have their rates a second beside them.
///
/// Each row but those of the pauses, which come last, is always there, so that a watcher finds it in the same place.
pub(super) fn table(status: &Status, before: Option<&Status>) -> String {
    let rates = Rates::new(status, before);
    let total = |total: fn(&Status) -> u64| format!("{}{}", total(status), rates.of(total, Plain));
    let with_oldest = |count: u64, seconds: Option<f64>| match seconds {
        Some(seconds) => format!("{count}, the oldest for {}", age(seconds)),
        None => count.to_string(),
    };
    let bytes = format!(
        "{} to the upstream{}, {} to clients{}",
        Bytes(status.bytes_to_upstream),
        rates.of(|status| status.bytes_to_upstream, Bytes),
        Bytes(status.bytes_to_client),
        rates.of(|status| status.bytes_to_client, Bytes),
    );
    let closed = |status: &Status| status.closed.values().sum();
    let mut rows = vec![
        ("state", state(status)),
        ("held", with_oldest(status.held, status.oldest_held_seconds)),
        ("connecting", with_oldest(status.connecting, status.oldest_connecting_seconds)),
        ("active", with_oldest(status.active, status.oldest_seconds)),
        ("rejecting", status.rejecting.to_string()),
        ("accepted", total(|status| status.accepted)),
        ("rejected", total(|status| status.rejected)),
        ("failed", total(|status| status.failed)),
        ("left", total(|status| status.left)),
        ("drained", total(|status| status.drained)),
        ("killed", total(|status| status.killed)),
        ("panics", status.worker_panics.to_string()),
        ("bytes", bytes),
        ("upstream", upstream(status)),
    ];
    // An older proxy tells none of these.
    if status.pid > 0 {
        let file = status.config_file.as_deref();
        let file = file.map_or_else(|| "no configuration file".to_owned(), str::to_owned);
        rows.extend([
            ("addresses", status.upstream_addresses.join(", ")),
            ("closed", format!("{}{}", total(closed), Causes(status))),
            ("limits", limits(status)),
            ("listens", status.listeners.join(", ")),
            ("process", format!("{}, {file}", status.pid)),
            ("upgrades", upgrades(status)),
        ]);
        rows.extend(status.steering.as_ref().map(|it| ("steering", steering(it))));
        rows.extend(status.fleet.as_ref().map(|fleet| ("fleet", member(fleet))));
    }
    rows.push(("tcpause", format!("{}, up for {}", status.version, age(status.uptime_seconds))));
    rows.extend(status.leases.iter().map(|lease| ("pause", Pause(lease).to_string())));
    let lines = rows.into_iter().map(|(name, value)| format!("{name:12}{}\n", OneLine(value)));
    lines.collect()
}

fn state(status: &Status) -> String {
    match &status.paused_since {
        _ if !status.state.is_empty() => status.state.clone(),
        Some(since) if status.paused => format!("paused since {since}"),
        _ if status.paused => "paused".to_owned(),
        _ => "running".to_owned(),
    }
}

fn upstream(status: &Status) -> String {
    let (configured, until) = (&status.upstream_configured, ", until the next start");
    let until = if status.upstream_persistent { "" } else { until };
    let switch = if status.is_switched() {
        format!(" (switched; configured is {configured}{until})")
    } else {
        String::new()
    };
    let address = format!("{}{switch}", status.upstream);
    let Some(since) = &status.upstream_since else {
        // An older proxy tells no state, and so not whether it has been tried.
        let untried = if status.state.is_empty() { "" } else { ", not tried yet" };
        return format!("{address}{untried}");
    };
    if status.upstream_up {
        return format!("{address}, up since {since}");
    }
    let error = status.upstream_error.as_deref().unwrap_or("not reached");
    let waiting = status.awaiting_upstream;
    format!("{address}, away since {since}: {error}; clients that wait: {waiting}")
}

fn limits(status: &Status) -> String {
    let clients = format!("{} clients", status.connections_max);
    match status.hold_max.filter(|held| *held < status.connections_max) {
        Some(held) => format!("{clients}, {held} of them held"),
        None => clients,
    }
}

fn upgrades(status: &Status) -> String {
    let count = status.upgrades;
    let Some(last) = &status.last_upgrade else { return count.to_string() };
    if let Some(error) = &last.error {
        return format!("{count}; one has failed at {}: {error}", last.at);
    }
    let connections = match last.connections.unwrap_or_default() {
        1 => "1 connection".to_owned(),
        many => format!("{many} connections"),
    };
    let stall = stall(last.stall_seconds.unwrap_or_default());
    format!("{count}, the last at {}: {connections}, stalled for {stall}", last.at)
}

/// Returns the steering as a line: `yes, 12 connections`, or why not.
fn steering(steering: &SteeringStatus) -> String {
    let connections = match steering.active {
        1 => "1 connection".to_owned(),
        many => format!("{many} connections"),
    };
    let why = steering.why.as_deref().unwrap_or_default();
    match (&*steering.state, steering.active) {
        ("steering", _) => format!("yes, {connections}"),
        ("relaying", 0) => format!("no: {why}"),
        ("relaying", _) => format!("no, {connections} left: {why}"),
        (state, _) => format!("{state}: {why}"),
    }
}

/// Returns the fleet as a line, from the view of this host.
fn member(fleet: &MemberStatus) -> String {
    let contact = match fleet.last_contact_seconds {
        Some(seconds) => format!("{} ago", age(seconds)),
        None => "never".to_owned(),
    };
    let etcd = if fleet.connected { "reached" } else { "NOT reached, last" };
    let coordinating = match fleet.coordinating.as_slice() {
        [] => String::new(),
        names => format!("; looks after {}", names.join(", ")),
    };
    let error = fleet.error.as_ref().map(|error| format!("; {error}")).unwrap_or_default();
    format!(
        "{} as {}, etcd {etcd} {contact}, without it: {}; {} hosts, {} lost{coordinating}{error}",
        fleet.name, fleet.host, fleet.policy, fleet.members, fleet.lost
    )
}

/// Rates a second between two statuses.
#[derive(Clone, Copy)]
struct Rates<'a> {
    status: &'a Status,
    before: Option<&'a Status>,
}

impl<'a> Rates<'a> {
    fn new(status: &'a Status, before: Option<&'a Status>) -> Self {
        // Another process counts from zero, unless it has taken over.
        let is_same = |before: &&Status| {
            (before.pid == status.pid || before.upgrades < status.upgrades)
                && before.uptime_seconds < status.uptime_seconds
        };
        Self { status, before: before.filter(is_same) }
    }

    /// Returns the rate in brackets; nothing for a total that is zero, or without an earlier status.
    fn of<T: fmt::Display>(&self, total: fn(&Status) -> u64, shown: fn(u64) -> T) -> String {
        let now = total(self.status);
        let Some(before) = self.before.filter(|_| now > 0) else { return String::new() };
        let spent = Duration::try_from_secs_f64(self.status.uptime_seconds - before.uptime_seconds);
        let millis = spent.unwrap_or_default().as_millis().max(1);
        let more = u128::from(now.saturating_sub(total(before)));
        // Rounded, so that a second and a few milliseconds do not make 99 of 100.
        let rate = (more * 1_000 + millis / 2) / millis;
        format!(" ({}/s)", shown(u64::try_from(rate).unwrap_or(u64::MAX)))
    }
}

/// Number that is shown as it is.
struct Plain(u64);

impl fmt::Display for Plain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Causes by which connections have ended, as the rest of a line: `: 12 ended, 1 client-reset`.
struct Causes<'a>(&'a Status);

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut seen: Vec<_> = self.0.closed.iter().filter(|(_, count)| **count > 0).collect();
        seen.sort_by_key(|(_, count)| u64::MAX - **count);
        for (index, (cause, count)) in seen.into_iter().enumerate() {
            write!(f, "{} {count} {cause}", if index == 0 { ":" } else { "," })?;
        }
        Ok(())
    }
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
            let what = if lease.drain_postgres {
                "sessions of PostgreSQL that are idle"
            } else {
                "what is quiet"
            };
            write!(f, ", drains {what} for {}", age(seconds))?;
        }
        if lease.half_closed == "drop" {
            f.write_str(", drops half-closed clients")?;
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
pub(super) struct Bytes(pub(super) u64);

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

    fn status(uptime_seconds: f64, accepted: u64, bytes: u64) -> Status {
        let value = serde_json::json!({
            "version": "1", "uptime_seconds": uptime_seconds, "paused": false, "held": 0, "connecting": 0, "active": 0,
            "rejecting": 0, "accepted": accepted, "bytes_to_upstream": bytes, "bytes_to_client": 0, "upstream": "u",
        });
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn totals_have_their_rates_beside_them() {
        let (first, second) = (status(10.0, 5, 0), status(12.004, 205, 8 << 10));
        let text = table(&second, Some(&first));
        assert!(text.contains("\naccepted    205 (100/s)\nrejected    0\n"), "{text}");
        assert!(
            text.contains("\nbytes       8.0 KiB to the upstream (3.9 KiB/s), 0 B to clients\n")
        );
        // The totals go on in a process that has taken over.
        let other = |upgrades| Status { pid: 2, upgrades, ..second.clone() };
        assert!(table(&other(1), Some(&first)).contains("\naccepted    205 (100/s)\n"));
        assert!(table(&other(0), Some(&first)).contains("\naccepted    205\n"));
        // The first look has no rate, and neither has one at a proxy that was started anew.
        for before in [None, Some(&second)] {
            assert!(table(&first, before).contains("\naccepted    5\n"));
        }
    }

    #[test]
    fn the_last_upgrade_is_told_with_its_outcome() {
        let row = |last: serde_json::Value| {
            let last_upgrade = serde_json::from_value(last).unwrap();
            let status = Status { pid: 1, upgrades: 2, last_upgrade, ..status(1.0, 0, 0) };
            let text = table(&status, None);
            text.lines().find_map(|line| line.strip_prefix("upgrades    ")).unwrap().to_owned()
        };
        assert_eq!(row(serde_json::Value::Null), "2");
        assert_eq!(
            row(serde_json::json!({"at": "then", "stall_seconds": 0.035_4, "connections": 9_000})),
            "2, the last at then: 9000 connections, stalled for 35.4ms"
        );
        let one = row(serde_json::json!({"at": "then", "stall_seconds": 0.0, "connections": 1}));
        assert!(one.contains(": 1 connection, "), "{one}");
        assert_eq!(
            row(serde_json::json!({"at": "then", "error": "it is too old"})),
            "2; one has failed at then: it is too old"
        );
    }

    #[test]
    fn the_fleet_is_told_by_one_of_its_hosts() {
        let row = |fleet: serde_json::Value| {
            let fleet = serde_json::from_value(fleet).unwrap();
            let text = table(&Status { pid: 1, fleet, ..status(1.0, 0, 0) }, None);
            text.lines().find_map(|line| line.strip_prefix("fleet       ")).map(str::to_owned)
        };
        assert_eq!(row(serde_json::Value::Null), None);
        let fleet = |connected: bool, contact: Option<f64>, coordinating: &[&str]| {
            serde_json::json!({
                "name": "shop", "host": "web-1", "connected": connected, "last_contact_seconds": contact,
                "policy": "serve", "members": 24, "lost": 1, "rounds_failed": 3, "coordinating": coordinating,
                "error": (!connected).then_some("no answer"),
            })
        };
        assert_eq!(
            row(fleet(true, Some(2.1), &["a", "b"])).unwrap(),
            "shop as web-1, etcd reached 2s ago, without it: serve; 24 hosts, 1 lost; looks after a, b"
        );
        assert_eq!(
            row(fleet(false, None, &[])).unwrap(),
            "shop as web-1, etcd NOT reached, last never, without it: serve; 24 hosts, 1 lost; no answer"
        );
    }

    #[test]
    fn the_steering_is_told_with_its_connections_or_the_reason() {
        let row = |state: &str, why: Option<&str>, active: u64| {
            let (state, why) = (state.to_owned(), why.map(str::to_owned));
            let steering = Some(SteeringStatus { state, why, active, total: 0 });
            let text = table(&Status { pid: 1, steering, ..status(1.0, 0, 0) }, None);
            text.lines().find_map(|line| line.strip_prefix("steering    ")).unwrap().to_owned()
        };
        assert_eq!(row("steering", None, 12), "yes, 12 connections");
        assert_eq!(row("relaying", Some("it is paused"), 1), "no, 1 connection left: it is paused");
        assert_eq!(row("relaying", Some("it is paused"), 0), "no: it is paused");
        assert_eq!(row("unavailable", Some("a reason"), 0), "unavailable: a reason");
        let off = table(&Status { pid: 1, ..status(1.0, 0, 0) }, None);
        assert!(!off.contains("steering"), "{off}");
    }

    #[test]
    fn a_switch_is_told_beside_the_upstream() {
        let row = |upstream_persistent| {
            let upstream_configured = "old".to_owned();
            let status = Status { upstream_configured, upstream_persistent, ..status(1.0, 0, 0) };
            let text = table(&status, None);
            text.lines().find_map(|line| line.strip_prefix("upstream    ")).unwrap().to_owned()
        };
        assert_eq!(row(true), "u (switched; configured is old)");
        assert_eq!(row(false), "u (switched; configured is old, until the next start)");
    }

    #[test]
    fn each_row_stays_in_its_place_whatever_happens() {
        let names = |status: &Status| -> Vec<String> {
            table(status, None).lines().map(|line| line.chars().take(12).collect()).collect()
        };
        let quiet = Status { pid: 1, ..status(1.0, 0, 0) };
        let busy = Status {
            held: 1,
            oldest_held_seconds: Some(1.0),
            failed: 2,
            worker_panics: 3,
            upstream_up: false,
            upstream_since: Some("then".to_owned()),
            upstream_error: Some("two\nlines".to_owned()),
            closed: [("ended".to_owned(), 4)].into(),
            upgrades: 5,
            ..quiet.clone()
        };
        assert_eq!(names(&quiet), names(&busy));
    }
}

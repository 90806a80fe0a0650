//! `Status`: a snapshot of the proxy for its operators.

use std::{
    collections::BTreeMap,
    process,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    config::duration::format_duration,
    fleet_view::FleetStatus,
    handover::upgrades::{LastUpgrade, UpgradesWords},
    pause::{
        gate::Mode,
        leases::{FLEET_PREFIX, Lease, Quiet, mode_name},
        steer::{Steer, SteeringStatus},
    },
    shared::{Phase, Shared},
    stats::{Count, Counters, cause::CloseCause},
    sys,
};

/// A snapshot of the proxy, as `GET /status` shows it.
///
/// Fields that an older proxy does not show are zero when they are read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The version of tcpause.
    pub version: String,
    /// Seconds since the proxy started.
    pub uptime_seconds: f64,
    /// True while new clients are held or rejected.
    pub paused: bool,
    /// Time at which the pause began, in RFC 3339; null while the proxy is not paused.
    pub paused_since: Option<String>,
    /// Pauses that hold now.
    #[serde(default)]
    pub leases: Vec<LeaseStatus>,
    /// Clients that wait for the resume, for their turn, or for an upstream that is away.
    pub held: u64,
    /// Clients whose upstream is being dialled.
    pub connecting: u64,
    /// Connections that are relayed.
    pub active: u64,
    /// Age of the oldest relayed connection, in seconds; null without one.
    pub oldest_seconds: Option<f64>,
    /// Clients that are being rejected, or closed in good order, such as quiet ones.
    pub rejecting: u64,
    /// Clients accepted since the start.
    #[serde(default)]
    pub accepted: u64,
    /// Clients rejected since the start, with any answer.
    #[serde(default)]
    pub rejected: u64,
    /// Connections whose upstream could not be reached since the start.
    #[serde(default)]
    pub failed: u64,
    /// Clients that left before they were served since the start.
    #[serde(default)]
    pub left: u64,
    /// Connections that a pause or a stop has closed as quiet since the start.
    #[serde(default)]
    pub drained: u64,
    /// Connections that were reset as they had not ended in time for a pause since the start.
    #[serde(default)]
    pub killed: u64,
    /// Bytes carried from clients to the upstream.
    pub bytes_to_upstream: u64,
    /// Bytes carried from the upstream to clients.
    pub bytes_to_client: u64,
    /// The upstream as configured, or as switched to.
    pub upstream: String,
    /// The number of worker threads.
    #[serde(default)]
    pub threads: usize,
    /// Panics of workers since the start. Each one costs that worker's connections, and is a defect of tcpause.
    #[serde(default)]
    pub worker_panics: u64,
    /// The state in words.
    #[serde(default)]
    pub state: String,
    /// Time for which the oldest of the held clients has waited, in seconds; null without one.
    #[serde(default)]
    pub oldest_held_seconds: Option<f64>,
    /// Age of the oldest client whose upstream is being dialled, in seconds; null without one.
    #[serde(default)]
    pub oldest_connecting_seconds: Option<f64>,
    /// False while the upstream is away, as attempts to connect have shown.
    #[serde(default = "up")]
    pub upstream_up: bool,
    /// Time since which the upstream is up or away, in RFC 3339; null until a client has needed it.
    #[serde(default)]
    pub upstream_since: Option<String>,
    /// Error of the last attempt while the upstream is away; null otherwise.
    #[serde(default)]
    pub upstream_error: Option<String>,
    /// Addresses of the upstream that are known now.
    #[serde(default)]
    pub upstream_addresses: Vec<String>,
    /// Clients that wait for an upstream that is away. They are among the held ones.
    #[serde(default)]
    pub awaiting_upstream: u64,
    /// Most clients at a time.
    #[serde(default)]
    pub connections_max: u64,
    /// Most held clients at a time.
    #[serde(default)]
    pub hold_max: Option<u64>,
    /// Addresses that clients connect to.
    #[serde(default)]
    pub listeners: Vec<String>,
    /// Number of the process.
    #[serde(default)]
    pub pid: u32,
    /// Configuration file; null without one.
    #[serde(default)]
    pub config_file: Option<String>,
    /// Ended connections by their cause since the start.
    #[serde(default)]
    pub closed: BTreeMap<String, u64>,
    /// Upgrades since the start: the processes that have gone on where another one stopped.
    #[serde(default)]
    pub upgrades: u64,
    /// Last upgrade, or last attempt at one; null before.
    #[serde(default)]
    pub last_upgrade: Option<LastUpgrade>,
    /// The fleet, as this proxy knows it; null without one.
    #[serde(default)]
    pub fleet: Option<MemberStatus>,
    /// The steering of new connections straight to the server; null where all are relayed.
    #[serde(default)]
    pub steering: Option<SteeringStatus>,
    /// The upstream in the configuration, which `upstream` differs from while a switch is in force.
    #[serde(default)]
    pub upstream_configured: String,
    /// True if a switch outlives a restart.
    #[serde(default)]
    pub upstream_persistent: bool,
}

/// The fleet as one of its members knows it, as `GET /status` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Name of the fleet.
    pub name: String,
    /// Name of this host in it.
    pub host: String,
    /// True while etcd answers, and has this host as a member.
    pub connected: bool,
    /// Seconds since the last answer of etcd; null before the first one.
    pub last_contact_seconds: Option<f64>,
    /// Treatment of clients while etcd cannot be reached: `serve` or `hold`.
    pub policy: String,
    /// Hosts of the fleet, as far as they are known.
    pub members: u64,
    /// Those without a session, which may carry all the same.
    pub lost: u64,
    /// Rounds that have failed since the start.
    pub rounds_failed: u64,
    /// Reason of the last failure, until a round has succeeded; null otherwise.
    #[serde(default)]
    pub error: Option<String>,
    /// Names of the pauses that this host looks after.
    pub coordinating: Vec<String>,
}

/// One of the pauses that hold, as `GET /status` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeaseStatus {
    /// Name of the pause.
    pub name: String,
    /// Reason given by the caller; null without one, and at `monitor.addr`.
    pub reason: Option<String>,
    /// Caller that paused: an address, or the user and the process of a UNIX caller; null at `monitor.addr`.
    pub by: Option<String>,
    /// Treatment of new clients: `hold` or `reject`.
    pub mode: String,
    /// Time since which a pause of this name holds, in RFC 3339.
    pub since: String,
    /// Seconds until it ends by itself; null for never.
    pub expires_in_seconds: Option<f64>,
    /// Seconds for which a connection may be silent before it is closed; null for ever.
    pub drain_quiet_seconds: Option<f64>,
    /// True if only sessions of PostgreSQL that are known to be outside transactions are closed.
    #[serde(default)]
    pub drain_postgres: bool,
    /// Treatment of held clients that have ended their stream: `serve` or `drop`.
    #[serde(default)]
    pub half_closed: String,
    /// True for a pause of the fleet.
    #[serde(default)]
    pub fleet: bool,
}

impl Status {
    /// Takes a snapshot.
    pub(super) fn new(shared: &Shared) -> Self {
        let Shared { pauses, admission, workers, upstream, started, .. } = shared;
        let now = sys::now();
        let (paused_since, leases) = {
            let leases = pauses.lock();
            let shown = leases.iter().map(|lease| LeaseStatus::new(lease, now)).collect();
            (leases.paused_since(), shown)
        };
        let sum = |count: fn(&Counters) -> &Count| workers.sum(count);
        let age = |oldest| shared.age_of_oldest(oldest).map(seconds);
        let balance = workers.balance();
        let closed = |cause: CloseCause| balance.closed.get(cause as usize).copied().unwrap_or(0);
        let connections_max = admission.clients.max() as u64;
        let breaker = upstream.breaker();
        let UpgradesWords { count: upgrades, failed: _, last: last_upgrade } =
            shared.upgrades.describe();
        let steering = pauses.steer().map(Steer::status);
        let mut status = Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: seconds(started.elapsed()),
            paused: paused_since.is_some(),
            paused_since: paused_since.map(|since| since.shown.to_string()),
            leases,
            held: balance.held,
            connecting: balance.connecting,
            active: balance.active + steering.as_ref().map_or(0, |it| it.active),
            oldest_seconds: age(|counters| &counters.oldest),
            rejecting: balance.rejecting,
            accepted: balance.accepted,
            rejected: sum(|counters| &counters.rejected),
            failed: closed(CloseCause::Unreachable),
            left: closed(CloseCause::LeftHeld) + closed(CloseCause::LeftConnecting),
            drained: sum(|counters| &counters.drained),
            killed: closed(CloseCause::KilledPause),
            bytes_to_upstream: sum(|counters| &counters.bytes_to_upstream),
            bytes_to_client: sum(|counters| &counters.bytes_to_client),
            upstream: upstream.target().address().to_string(),
            threads: workers.len(),
            worker_panics: sum(|counters| &counters.panics),
            state: String::new(),
            oldest_held_seconds: age(|counters| &counters.oldest_held),
            oldest_connecting_seconds: age(|counters| &counters.oldest_connecting),
            upstream_up: !breaker.is_away(),
            upstream_since: breaker.changed_at().map(|at| at.to_string()),
            upstream_error: upstream.error(),
            upstream_addresses: upstream.known().list().iter().map(ToString::to_string).collect(),
            awaiting_upstream: sum(|counters| &counters.awaiting_upstream),
            connections_max,
            hold_max: Some(connections_max.min(admission.hold.max() as u64)),
            listeners: shared.listeners.iter().map(ToString::to_string).collect(),
            pid: process::id(),
            config_file: shared.config_file.as_ref().map(|file| file.display().to_string()),
            closed: CloseCause::ALL.map(|cause| (cause.word().to_owned(), closed(cause))).into(),
            upgrades,
            last_upgrade,
            fleet: shared.fleet.read().map(MemberStatus::new),
            steering,
            upstream_configured: upstream.configured().to_string(),
            upstream_persistent: upstream.is_persistent(),
        };
        status.state = status.describe(shared, paused_since.map(|since| since.at), now);
        status
    }

    /// Returns true while new connections lead to another upstream than the one in the configuration.
    pub fn is_switched(&self) -> bool {
        // An older proxy does not tell.
        !self.upstream_configured.is_empty() && self.upstream != self.upstream_configured
    }

    /// Describes the state in words.
    fn describe(&self, shared: &Shared, paused_since: Option<Instant>, now: Instant) -> String {
        let for_ = |since| whole_seconds(now.saturating_duration_since(since));
        if shared.phase() != Phase::Running {
            let left = self.held + self.connecting + self.active + self.rejecting;
            return format!("stopping, {} left", plural(left, "connection is", "connections are"));
        }
        if let Some(since) = paused_since {
            let clients = match (shared.pauses.gate.mode(), self.oldest_held_seconds) {
                (Some(Mode::Reject), _) => "new clients are rejected".to_owned(),
                (_, Some(oldest)) => {
                    let oldest = whole_seconds(Duration::from_secs_f64(oldest));
                    format!("the oldest client waits for {oldest}")
                }
                (_, None) => "no client waits".to_owned(),
            };
            let away = if self.upstream_up { "" } else { "; the upstream is away" };
            return format!("paused for {}, {clients}{away}", for_(since));
        }
        match (shared.upstream.breaker().away_since(), &self.upstream_error) {
            (Some(since), Some(error)) => format!(
                "running, but the upstream is away for {}: {error}; {}{}",
                for_(since),
                plural(self.awaiting_upstream, "client waits", "clients wait"),
                last_tried(shared.upstream.breaker().failed_ago())
            ),
            // Waiting clients of an upstream that is up are those of an earlier pause.
            _ if self.held > 0 => {
                let waiting = plural(self.held, "client waits for its", "clients wait for their");
                format!("running, {waiting} turn")
            }
            _ => "running".to_owned(),
        }
    }
}

impl MemberStatus {
    fn new(status: FleetStatus) -> Self {
        let FleetStatus {
            name,
            host,
            connected,
            last_contact,
            on_disconnect: policy,
            members,
            lost,
            rounds_failed,
            trouble: error,
            coordinating,
        } = status;
        let age = |at: Duration| seconds(sys::boot::boot_time().saturating_sub(at));
        let last_contact_seconds = last_contact.map(age);
        Self {
            name,
            host,
            connected,
            last_contact_seconds,
            policy,
            members,
            lost,
            rounds_failed,
            error,
            coordinating,
        }
    }
}

impl LeaseStatus {
    fn new(lease: &Lease, now: Instant) -> Self {
        let (terms, ends) = (&lease.terms, lease.ends);
        Self {
            name: terms.name.clone(),
            reason: terms.reason.clone(),
            by: Some(terms.by.clone()),
            mode: mode_name(terms.mode).to_owned(),
            since: lease.since.shown.to_string(),
            expires_in_seconds: ends.map(|end| seconds(end.saturating_duration_since(now))),
            drain_quiet_seconds: terms.quiet.map(|quiet| seconds(quiet.time())),
            drain_postgres: terms.quiet.is_some_and(Quiet::is_postgres),
            half_closed: terms.half_closed.word().to_owned(),
            fleet: terms.name.starts_with(FLEET_PREFIX),
        }
    }
}

/// Rounds a time to milliseconds, so that JSON shows no more digits.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1_000.0).round() / 1_000.0
}

/// Tells that no attempt was made for a while: without clients nothing tries the upstream, which may be back.
fn last_tried(ago: Duration) -> String {
    match ago.as_secs() {
        0..5 => String::new(),
        _ => format!(", last tried {} ago", whole_seconds(ago)),
    }
}

fn plural(number: u64, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

fn whole_seconds(duration: Duration) -> String {
    format_duration(Duration::from_secs(duration.as_secs()))
}

/// Returns the state of the upstream of a proxy that is too old to tell it.
fn up() -> bool {
    true
}

//! The table of all metrics. The page `help/monitoring.md` shows it, too, as a test sees.

use std::{fmt, time::Duration};

use super::{Family, Samples, Snapshot};
use crate::handle::{MemberStatus, SteeringStatus};

type Write = fn(&Snapshot, &mut Samples<'_>) -> fmt::Result;

const fn gauge(name: &'static str, help: &'static str, write: Write) -> Family {
    Family { name, kind: "gauge", help, write }
}

const fn counter(name: &'static str, help: &'static str, write: Write) -> Family {
    Family { name, kind: "counter", help, write }
}

const fn histogram(name: &'static str, help: &'static str, write: Write) -> Family {
    Family { name, kind: "histogram", help, write }
}

/// Returns the fleet, if there is one.
fn fleet(snapshot: &Snapshot) -> Option<&MemberStatus> {
    snapshot.metrics.status.fleet.as_ref()
}

/// Returns the steering, if there is one.
fn steering(snapshot: &Snapshot) -> Option<&SteeringStatus> {
    snapshot.metrics.status.steering.as_ref()
}

/// Every metric, in the order of the answer.
pub(super) static FAMILIES: &[Family] = &[
    gauge("tcpause_build_info", "The version of tcpause as a label; always 1.", |it, out| {
        out.by("version", [(&it.metrics.status.version, 1)])
    }),
    gauge("tcpause_paused", "1 while new clients are held or rejected, else 0.", |it, out| {
        out.value(u8::from(it.metrics.paused_since.is_some()))
    }),
    gauge(
        "tcpause_paused_since_timestamp_seconds",
        "Begin of the present pause in Unix time; absent while not paused.",
        |it, out| out.optional(it.metrics.paused_since),
    ),
    gauge(
        "tcpause_pauses",
        "Pauses that hold: open ones, and those that expire by themselves.",
        |it, out| {
            let leases = &it.metrics.status.leases;
            let open = leases.iter().filter(|lease| lease.expires_in_seconds.is_none()).count();
            out.by("end", [("open", open), ("expires", leases.len() - open)])
        },
    ),
    gauge(
        "tcpause_resume_expected_timestamp_seconds",
        "Unix time at which the last pause expires; absent while not paused or while a pause is open.",
        |it, out| out.optional(it.metrics.resume_expected),
    ),
    counter("tcpause_pauses_total", "Pauses that began.", |it, out| out.value(it.metrics.pauses)),
    counter("tcpause_pauses_ended_total", "Pauses that ended.", |it, out| {
        out.by("how", it.metrics.pauses_ended)
    }),
    gauge("tcpause_connections", "Clients at this moment.", |it, out| {
        let status = &it.metrics.status;
        out.by(
            "state",
            [
                ("held", status.held),
                ("connecting", status.connecting),
                ("active", status.active),
                ("rejecting", status.rejecting),
            ],
        )
    }),
    gauge("tcpause_connections_max", "Most clients at a time.", |it, out| {
        out.value(it.metrics.status.connections_max)
    }),
    gauge("tcpause_hold_max", "Most held clients at a time.", |it, out| {
        let status = &it.metrics.status;
        out.value(status.hold_max.unwrap_or(status.connections_max))
    }),
    gauge(
        "tcpause_oldest_age_seconds",
        "Time for which the oldest client has been in its state; 0 without one.",
        |it, out| {
            let status = &it.metrics.status;
            let ages = [
                ("held", status.oldest_held_seconds),
                ("connecting", status.oldest_connecting_seconds),
                ("active", status.oldest_seconds),
            ];
            out.by("state", ages.map(|(state, age)| (state, age.unwrap_or_default())))
        },
    ),
    counter("tcpause_accepted_total", "Clients that were accepted.", |it, out| {
        out.value(it.metrics.status.accepted)
    }),
    counter(
        "tcpause_accept_errors_total",
        "Attempts to accept a client that failed.",
        |it, out| out.by("reason", it.metrics.accept_errors),
    ),
    counter("tcpause_closed_total", "Clients that have ended, by their cause.", |it, out| {
        out.by("cause", &it.metrics.status.closed)
    }),
    counter("tcpause_carried_bytes_total", "Bytes that were carried.", |it, out| {
        let status = &it.metrics.status;
        out.by("to", [("upstream", status.bytes_to_upstream), ("client", status.bytes_to_client)])
    }),
    counter("tcpause_spliced_bytes_total", "Carried bytes that were never copied.", |it, out| {
        let (to_upstream, to_client) = it.metrics.spliced;
        out.by("to", [("upstream", to_upstream), ("client", to_client)])
    }),
    histogram(
        "tcpause_hold_duration_seconds",
        "Time for which clients were held by a pause.",
        |it, out| out.by_outcome(&it.metrics.hold),
    ),
    histogram(
        "tcpause_connect_duration_seconds",
        "Time of successful attempts to reach the upstream.",
        |it, out| out.histogram("", &it.metrics.connect),
    ),
    histogram(
        "tcpause_outage_wait_seconds",
        "Time for which clients waited for an upstream that was away.",
        |it, out| out.by_outcome(&it.metrics.outage),
    ),
    histogram(
        "tcpause_connection_duration_seconds",
        "Time from the accepting of clients to their end.",
        |it, out| out.histogram("", &it.metrics.life),
    ),
    counter("tcpause_connect_attempts_total", "Attempts to reach the upstream.", |it, out| {
        out.by("result", it.metrics.connect_attempts)
    }),
    gauge(
        "tcpause_upstream_up",
        "0 once attempts to reach the upstream have failed, until one succeeds; else 1.",
        |it, out| out.value(u8::from(it.metrics.status.upstream_up)),
    ),
    counter(
        "tcpause_upstream_down_seconds_total",
        "Time for which the upstream was away.",
        |it, out| out.value(it.metrics.upstream_down.as_secs_f64()),
    ),
    counter("tcpause_upstream_lookups_total", "Look-ups of the upstream's name.", |it, out| {
        let (ok, failed) = it.metrics.look_ups;
        out.by("result", [("ok", ok), ("failed", failed)])
    }),
    gauge(
        "tcpause_upstream_switched",
        "1 while new connections lead to another upstream than the configured one, else 0.",
        |it, out| out.value(u8::from(it.metrics.status.is_switched())),
    ),
    counter("tcpause_upstream_switches_total", "Switches to another upstream.", |it, out| {
        let (done, refused) = it.metrics.switches;
        out.by("result", [("done", done), ("refused", refused)])
    }),
    counter(
        "tcpause_worker_busy_seconds_total",
        "Time that a worker thread did not wait for events.",
        |it, out| {
            let busy = it.metrics.busy.iter().map(Duration::as_secs_f64);
            out.by("worker", busy.enumerate())
        },
    ),
    counter(
        "tcpause_worker_panics_total",
        "Panics of worker threads, each of which is a defect of tcpause.",
        |it, out| out.value(it.metrics.status.worker_panics),
    ),
    counter(
        "tcpause_log_lines_dropped_total",
        "Lines that the log did not take in time.",
        |it, out| out.value(it.metrics.log_lines_dropped),
    ),
    counter("tcpause_upgrades_total", "Attempts to upgrade tcpause.", |it, out| {
        let (succeeded, failed) = it.metrics.upgrades;
        out.by("result", [("succeeded", succeeded), ("failed", failed)])
    }),
    gauge(
        "tcpause_steering",
        "1 while new connections are steered straight to the server, else 0; absent where upstream.steer is off, as all of the steering are.",
        |it, out| out.optional(steering(it).map(|it| u8::from(it.state == "steering"))),
    ),
    gauge(
        "tcpause_steered_connections",
        "Connections that were steered. They are among the active ones.",
        |it, out| out.optional(steering(it).map(|it| it.active)),
    ),
    counter(
        "tcpause_steered_syns_total",
        "SYN packets that were steered, with repeated ones; anew from 0 after an upgrade.",
        |it, out| out.optional(steering(it).map(|it| it.total)),
    ),
    gauge(
        "tcpause_fleet_connected",
        "1 while etcd answers and has this host as a member, else 0; absent without a fleet, as all of the fleet are.",
        |it, out| out.optional(fleet(it).map(|fleet| u8::from(fleet.connected))),
    ),
    gauge("tcpause_fleet_contact_age_seconds", "Time since the last answer of etcd.", |it, out| {
        out.optional(fleet(it).and_then(|fleet| fleet.last_contact_seconds))
    }),
    gauge("tcpause_fleet_members", "Hosts of the fleet.", |it, out| {
        out.optional(fleet(it).map(|fleet| fleet.members))
    }),
    gauge("tcpause_fleet_members_lost", "Hosts of the fleet without a session.", |it, out| {
        out.optional(fleet(it).map(|fleet| fleet.lost))
    }),
    gauge(
        "tcpause_fleet_coordinated_pauses",
        "Pauses of the fleet that this host looks after.",
        |it, out| out.optional(fleet(it).map(|fleet| fleet.coordinating.len())),
    ),
    counter(
        "tcpause_fleet_rounds_failed_total",
        "Rounds of this host that etcd has not answered.",
        |it, out| out.optional(fleet(it).map(|fleet| fleet.rounds_failed)),
    ),
    gauge("tcpause_pipes", "Pipes that bytes are spliced through.", |it, out| {
        let (used, free, _) = it.metrics.pipes;
        out.by("state", [("free", free), ("used", used)])
    }),
    gauge("tcpause_pipes_max", "Most pipes of all worker threads.", |it, out| {
        out.value(it.metrics.pipes.2)
    }),
    counter(
        "tcpause_control_requests_total",
        "Requests that the control API and the monitor have answered.",
        |it, out| out.by("class", it.answers),
    ),
    counter("process_cpu_seconds_total", "CPU time of the process.", |it, out| {
        out.optional(it.process.as_ref().map(|it| it.cpu_seconds))
    }),
    gauge("process_resident_memory_bytes", "Resident memory of the process.", |it, out| {
        out.optional(it.process.as_ref().map(|it| it.resident_bytes))
    }),
    gauge("process_virtual_memory_bytes", "Virtual memory of the process.", |it, out| {
        out.optional(it.process.as_ref().map(|it| it.virtual_bytes))
    }),
    gauge(
        "process_open_fds",
        "Open file descriptors; absent for more than 1,000 where Linux is older than 6.2.",
        |it, out| out.optional(it.process.as_ref().and_then(|it| it.open_files)),
    ),
    gauge("process_max_fds", "Limit of open file descriptors.", |it, out| {
        out.optional(it.process.as_ref().and_then(|it| it.max_files))
    }),
    gauge("process_start_time_seconds", "Start of the process in Unix time.", |it, out| {
        out.optional(it.process_start)
    }),
];

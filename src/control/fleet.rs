//! Requests about the fleet: pauses of all hosts, their table, and the end of a host's membership.

use std::time::Duration;

use super::{
    command::{Awaited, Caller},
    index::Scope,
    query::{PAUSE, Pause, Query, wrong},
    response::Response,
};
use crate::{
    config::{FleetName, duration::format_duration},
    fleet::{Fleet, Refusal, RefusalKind, WaitingFor, Wanted},
    pause::{
        fleet::{LOST, STARTING},
        leases::mode_name,
    },
};

/// Begin of the paths of these requests.
pub(super) const PATH: &str = "/fleet/";

/// Parameter of `PUT /fleet/paused` that `PUT /paused` does not have.
const WITHOUT: &str = "without";
/// Most hosts that one pause leaves out.
const WITHOUT_MAX: usize = 64;
/// Longest name of a pause: it is that of a lease, which has a prefix there.
const NAME_BYTES_MAX: usize = 58;
/// Longest reason. With the caller's name, which has some 130 bytes at most, it is kept in each record of a pause.
const REASON_BYTES_MAX: usize = 100;
/// Longest order to close quiet connections, which is kept there as it was written.
const DRAIN_BYTES_MAX: usize = 40;

/// Shortest time of a pause.
const TTL_MIN: Duration = Duration::from_secs(5);
/// Time of a pause that ends with its caller's connection, if it names none.
const TTL_BOUND: Duration = Duration::from_secs(15);
/// Time of any other pause, if it names none and `pause.max-ttl` is longer or not set.
const TTL_COMMITTED: Duration = Duration::from_secs(10 * 60);

/// Parsed request about the fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FleetRequest {
    /// `PUT /fleet/paused`.
    Pause {
        pause: Pause,
        /// Order to close quiet connections, as it was written.
        drain: Option<String>,
        without: Vec<String>,
    },
    /// `DELETE /fleet/paused`.
    Resume { name: String },
    /// `GET /fleet/status`, with reasons and callers of pauses if the scope is full.
    GetStatus { scope: Scope },
    /// `DELETE /fleet/hosts`.
    Forget { host: String },
}

impl FleetRequest {
    /// Parses a request below [`PATH`] with a method that it knows. An error is a sentence for the caller.
    pub(super) fn parse(
        method: &str,
        path: &str,
        query: &str,
        scope: Scope,
    ) -> Result<Self, String> {
        match (method, path) {
            ("PUT", _) => Self::parse_pause(query),
            ("DELETE", "/fleet/paused") => {
                let name = Query::parse(query, &["name"])?.name()?;
                name.map(|name| Self::Resume { name }).ok_or_else(|| {
                    wrong("name", "it is missing; GET /fleet/status lists the names")
                })
            }
            ("DELETE", _) => {
                let query = Query::parse(query, &["host"])?;
                let host = query.get("host").ok_or_else(|| {
                    wrong("host", "it is missing; GET /fleet/status lists the hosts")
                })?;
                Ok(Self::Forget { host: host_name("host", host)? })
            }
            _ => Query::parse(query, &[]).map(|_| Self::GetStatus { scope }),
        }
    }

    fn parse_pause(query: &str) -> Result<Self, String> {
        let query = Query::parse(query, &[PAUSE, &[WITHOUT]].concat())?;
        let pause = Pause::read(&query)?;
        for (parameter, text, most) in [
            ("name", Some(&*pause.name), NAME_BYTES_MAX),
            ("reason", pause.reason.as_deref(), REASON_BYTES_MAX),
            ("drain", query.get("drain"), DRAIN_BYTES_MAX),
        ] {
            if let Some(bytes) = text.map(str::len).filter(|bytes| *bytes > most) {
                let text = format!("it has {bytes} bytes; a fleet takes {most} at most");
                return Err(wrong(parameter, &text));
            }
        }
        if [STARTING, LOST].contains(&pause.name.as_str()) {
            let text = format!("{:?} is a pause of a host by itself; choose another", pause.name);
            return Err(wrong("name", &text));
        }
        if pause.ttl.is_some_and(|ttl| ttl < TTL_MIN) {
            let text = "a pause of a fleet lasts for 5s at least, as etcd has to keep up with it";
            return Err(wrong("ttl", text));
        }
        let drain = query.get("drain").map(str::to_owned);
        let without = match query.get(WITHOUT).filter(|hosts| !hosts.is_empty()) {
            Some(hosts) => hosts.split(',').map(|host| host_name(WITHOUT, host)).collect(),
            None => Ok(Vec::new()),
        };
        let without = without?;
        if without.len() > WITHOUT_MAX {
            let text =
                format!("{} hosts are too many; at most {WITHOUT_MAX} are taken", without.len());
            return Err(wrong(WITHOUT, &text));
        }
        Ok(Self::Pause { pause, drain, without })
    }

    /// Returns the event that the answer waits for, if it is not due at once.
    pub(super) fn awaited(&self) -> Option<Awaited> {
        match *self {
            Self::Pause { pause: Pause { wait, is_bound, .. }, .. }
                if is_bound || wait.is_some() =>
            {
                Some(Awaited::Pause { wait, is_bound })
            }
            _ => None,
        }
    }

    /// Returns true if it changes something.
    pub(super) fn is_change(&self) -> bool {
        !matches!(self, Self::GetStatus { .. })
    }

    /// Carries the request out, which blocks while etcd is asked. Returns the answer, or none if a pause has begun.
    pub(super) fn execute(
        self,
        caller: &Caller,
        fleet: Option<&Fleet>,
        max_ttl: Option<Duration>,
    ) -> Option<Response> {
        let Some(fleet) = fleet else {
            let text = "This proxy is in no fleet: fleet.endpoints makes it a member of one.";
            return Some(Response::error(404, text));
        };
        let done = match self {
            Self::Pause { pause, drain, without } => {
                let is_bound = pause.is_bound;
                let wanted = match wanted(pause, drain, without, caller, max_ttl) {
                    Ok(wanted) => wanted,
                    Err(text) => return Some(Response::error(400, &text)),
                };
                match fleet.pause(wanted, caller.request_id, is_bound) {
                    Ok(()) => return None,
                    Err(refusal) => Err(refusal),
                }
            }
            Self::Resume { name } => {
                fleet.resume(&name, &caller.name).map(|()| Response::empty(204))
            }
            Self::Forget { host } => {
                fleet.forget(&host, &caller.name).map(|()| Response::empty(204))
            }
            Self::GetStatus { scope } => fleet.table().map(|table| {
                let is_full = scope == Scope::Full;
                super::command::json(&if is_full { table } else { table.without_callers() })
            }),
        };
        Some(done.unwrap_or_else(|refusal| refuse(&refusal)))
    }
}

/// Completes the terms of a pause, or returns the sentence about a time that is too long.
fn wanted(
    pause: Pause,
    drain: Option<String>,
    without: Vec<String>,
    caller: &Caller,
    max_ttl: Option<Duration>,
) -> Result<Wanted, String> {
    if let Some((ttl, max)) = pause.ttl.zip(max_ttl).filter(|(ttl, max)| ttl > max) {
        let (ttl, max) = (format_duration(ttl), format_duration(max));
        let text = format!("{ttl} is more than pause.max-ttl allows; write {max} at most");
        return Err(wrong("ttl", &text));
    }
    let default = if pause.is_bound { TTL_BOUND } else { TTL_COMMITTED };
    Ok(Wanted {
        name: pause.name,
        reason: pause.reason,
        by: caller.name.clone(),
        mode: pause.mode.map(|mode| mode_name(mode).to_owned()),
        drain,
        half_closed: pause.half_closed.map(|treatment| treatment.word().to_owned()),
        ttl: pause.ttl.unwrap_or_else(|| max_ttl.map_or(default, |max| default.min(max))),
        without,
    })
}

fn host_name(parameter: &str, text: &str) -> Result<String, String> {
    FleetName::check(text).map(|name| name.0).map_err(|error| wrong(parameter, &error))
}

/// Returns the answer to a request that the fleet refuses. Its kind is for programs.
fn refuse(refusal: &Refusal) -> Response {
    let Refusal { kind, text } = refusal;
    let status = match kind {
        RefusalKind::Taken | RefusalKind::HasSession => 409,
        RefusalKind::Unreachable | RefusalKind::Full => 503,
        RefusalKind::Denied => 502,
        RefusalKind::Unknown => 404,
    };
    let body = serde_json::json!({"error": text, "status": status, "kind": kind});
    Response { status, ..Response::json(format!("{body}\n")) }
}

/// Returns the answer to a caller whose pause was not idle in time, with the hosts that it has waited for.
pub(super) fn not_idle_in_time(waiting_for: &[WaitingFor], is_kept: bool) -> Response {
    let fate = if is_kept { "They stay paused." } else { "The pause is undone." };
    let text = format!("The time is up: not all hosts are idle. {fate}");
    let body = serde_json::json!({
        "error": text, "status": 504, "paused": is_kept, "waiting_for": waiting_for,
    });
    Response { status: 504, ..Response::json(format!("{body}\n")) }
}

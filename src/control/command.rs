//! `Command`: a request in the words of the proxy, and its execution.

use std::time::Duration;

use serde::Serialize;

use super::{
    connections::{self, Choice},
    fleet::{self, FleetRequest},
    index::{self, Scope},
    lift::resume,
    metrics::Source,
    page::page,
    query::{
        Pause, Resume, Switch, Wait, parse_none, parse_ready, parse_wait, parse_wait_upstream,
    },
    request::Request,
    response::Response,
};
use crate::{
    config::{address::Address, duration::format_duration},
    fleet::Fleet,
    handle::{Handle, switch::SwitchError},
    pause::leases::{FLEET_PREFIX, Full, LEASES_MAX, Lifetime, Terms},
    sys::SocketAddress,
};

/// Sender of one request.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    /// Its address or process, for the log and the status.
    pub(super) name: String,
    /// Number of this request alone, by which its pause is known.
    pub(super) request_id: u64,
}

/// Request of the API that is in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// `PUT /paused`.
    Pause(Pause),
    /// `DELETE /paused`.
    Resume(Resume),
    /// `GET /`, from a browser if `html` is true.
    GetIndex { html: bool, scope: Scope },
    /// `GET /paused`.
    GetPaused,
    /// `GET /status`, with reasons and callers of pauses if the scope is full.
    GetStatus { scope: Scope },
    /// `GET /metrics`.
    GetMetrics,
    /// `GET /ready`.
    GetReady { paused_is_ready: bool },
    /// `GET /paused/block-until-idle`.
    WaitIdle { timeout: Option<Duration> },
    /// `POST /upgrade`.
    Upgrade,
    /// `GET` and `DELETE` of `/connections`, and of a single one.
    Connections(Choice),
    /// Those below `/fleet/`.
    Fleet(FleetRequest),
    /// `GET /upstream`.
    GetUpstream,
    /// `PUT /upstream` and `DELETE /upstream`, with the addresses that its examination has found, if there was one.
    Switch { wanted: Switch, found: Option<Box<[SocketAddress]>> },
    /// `GET /upstream/block-until-idle`.
    WaitUpstream { address: Address, timeout: Option<Duration> },
}

/// Event that an answer waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Awaited {
    /// The proxy is idle, within this time if there is one.
    Idle { timeout: Option<Duration> },
    /// The pause that has begun is idle, if it waits for that. If connection-bound, it ends with its caller's.
    Pause { wait: Option<Wait>, is_bound: bool },
    /// The upgrade has succeeded or failed.
    Upgrade,
    /// The upstream of a switch was examined.
    Examination(Switch),
    /// No connection to this upstream is left, within this time if there is one.
    UpstreamIdle { address: Address, timeout: Option<Duration> },
}

impl Command {
    /// Parses a request to a listener of this scope, or returns the answer that refuses it.
    pub(super) fn parse(request: &Request, scope: Scope) -> Result<Self, Response> {
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        let method = request.method.as_str();
        let allow = match index::methods(path, scope) {
            Some(allow) => allow,
            None if scope == Scope::ReadOnly && !matches!(method, "GET" | "HEAD") => {
                "GET, HEAD".to_owned()
            }
            None => {
                let text = "There is nothing here: GET / lists the requests.";
                return Err(Response::error(404, text));
            }
        };
        if !allow.split(", ").any(|allowed| allowed == method) {
            // That nothing can be changed here is told on every path, also on those of the control API.
            let text = match scope {
                Scope::ReadOnly => {
                    "This listener only reads: send it to the control API (control.addr)."
                        .to_owned()
                }
                Scope::Full => format!("This path does not know the method: it knows {allow}."),
            };
            return Err(Response::error(405, &text).with_header("Allow", allow));
        }
        match (method, path) {
            (_, path) if path.starts_with(connections::PATH) => {
                Choice::parse(method, path, query).map(Self::Connections)
            }
            (method, path) if path.starts_with(fleet::PATH) => {
                FleetRequest::parse(method, path, query, scope).map(Self::Fleet)
            }
            ("PUT", "/upstream") => Switch::parse(query).map(Self::switch),
            ("DELETE", "/upstream") => Switch::parse_back(query).map(Self::switch),
            (_, "/upstream") => parse_none(query).map(|()| Self::GetUpstream),
            (_, "/upstream/block-until-idle") => parse_wait_upstream(query)
                .map(|(address, timeout)| Self::WaitUpstream { address, timeout }),
            ("PUT", _) => Pause::parse(query).map(Self::Pause),
            ("DELETE", _) => Resume::parse(query).map(Self::Resume),
            (_, "/") => {
                parse_none(query).map(|()| Self::GetIndex { html: request.accepts_html, scope })
            }
            ("POST", _) => parse_none(query).map(|()| Self::Upgrade),
            (_, "/paused") => parse_none(query).map(|()| Self::GetPaused),
            (_, "/status") => parse_none(query).map(|()| Self::GetStatus { scope }),
            (_, "/metrics") => parse_none(query).map(|()| Self::GetMetrics),
            (_, "/ready") => {
                parse_ready(query).map(|paused_is_ready| Self::GetReady { paused_is_ready })
            }
            _ => parse_wait(query).map(|timeout| Self::WaitIdle { timeout }),
        }
        .map_err(|text| Response::error(400, &text))
    }

    fn switch(wanted: Switch) -> Self {
        Self::Switch { wanted, found: None }
    }

    /// Returns the event that the answer waits for, if it is not due at once.
    pub(super) fn awaited(&self) -> Option<Awaited> {
        match *self {
            Self::Switch { ref wanted, .. } => Some(Awaited::Examination(wanted.clone())),
            Self::WaitUpstream { ref address, timeout } => {
                Some(Awaited::UpstreamIdle { address: address.clone(), timeout })
            }
            Self::WaitIdle { timeout } => Some(Awaited::Idle { timeout }),
            Self::Pause(Pause { wait, is_bound, .. }) if is_bound || wait.is_some() => {
                Some(Awaited::Pause { wait, is_bound })
            }
            Self::Fleet(ref request) => request.awaited(),
            Self::Upgrade => Some(Awaited::Upgrade),
            _ => None,
        }
    }

    /// Returns true if it changes something, and so is logged with its caller.
    pub(super) fn is_change(&self) -> bool {
        match self {
            Self::Pause(_) | Self::Resume(_) | Self::Upgrade | Self::Switch { .. } => true,
            Self::Connections(choice) => choice.is_change(),
            Self::Fleet(request) => request.is_change(),
            _ => false,
        }
    }

    /// Carries the command out. Returns the answer, or none if a pause has begun, which depends on its request. This may
    /// block: a pause or a list waits for the workers, a resume for the look-up of a name, each for a second at most; the
    /// fleet for etcd, and a switch for the disk, for longer.
    pub(super) fn execute(
        self,
        caller: &Caller,
        handle: &Handle,
        fleet: Option<&Fleet>,
        metrics: &Source,
    ) -> Option<Response> {
        Some(match self {
            Self::Pause(wanted) => return pause(wanted, caller, handle),
            Self::Resume(wanted) => resume(&wanted, caller, handle),
            Self::GetIndex { html: true, scope } => page(scope, handle.control_addr()),
            Self::GetIndex { html: false, scope } => index::list(scope, handle.control_addr()),
            Self::GetPaused => Response::json(format!(r#"{{"paused": {}}}"#, handle.is_paused())),
            Self::GetStatus { scope } => status(handle, scope),
            Self::GetMetrics => metrics.scrape(handle),
            Self::GetReady { paused_is_ready } => ready(handle, paused_is_ready),
            Self::Connections(choice) => choice.execute(caller, handle),
            Self::Fleet(request) => {
                return request.execute(caller, fleet, handle.pauses().max_ttl);
            }
            Self::GetUpstream => json(&handle.upstream()),
            Self::Switch { wanted, found } => switch(wanted, found, caller, handle),
            // The front waits for these itself.
            Self::WaitIdle { .. } | Self::WaitUpstream { .. } | Self::Upgrade => {
                Response::empty(204)
            }
        })
    }
}

/// Begins a pause that depends on its request until it is committed, or returns the answer that refuses it.
fn pause(wanted: Pause, caller: &Caller, handle: &Handle) -> Option<Response> {
    if wanted.name.starts_with(FLEET_PREFIX) {
        let text = format!(
            "The parameter \"name\": names that begin with {FLEET_PREFIX} are those of the fleet; write another, or pause all hosts with PUT /fleet/paused (--fleet)."
        );
        return Some(Response::error(400, &text));
    }
    let max_ttl = handle.pauses().max_ttl;
    if let Some((ttl, max)) = wanted.ttl.zip(max_ttl).filter(|(ttl, max)| ttl > max) {
        let (ttl, max) = (format_duration(ttl), format_duration(max));
        let text = format!(
            "The parameter \"ttl\": {ttl} is more than pause.max-ttl allows; write {max} at most, and renew it."
        );
        return Some(Response::error(400, &text));
    }
    let terms = Terms {
        name: wanted.name,
        reason: wanted.reason,
        by: caller.name.clone(),
        mode: wanted.mode.unwrap_or(handle.pauses().default_mode),
        ttl: wanted.ttl.or(max_ttl),
        quiet: wanted.quiet,
        half_closed: wanted.half_closed.unwrap_or(handle.pauses().default_half_closed),
    };
    let lifetime = if wanted.is_bound { Lifetime::ConnectionBound } else { Lifetime::Pending };
    if let Err(Full) = handle.pauses().put(terms, lifetime, caller.request_id) {
        let text = format!(
            "There are {LEASES_MAX} pauses already, each with a name of its own: lift some, or use one of their names."
        );
        return Some(Response::error(409, &text));
    }
    None
}

/// Tells balancers if new clients are served, or will be.
fn ready(handle: &Handle, paused_is_ready: bool) -> Response {
    let because = if handle.is_stopping() {
        "It is stopping"
    } else if handle.is_paused() && !paused_is_ready {
        "It is paused"
    } else {
        return Response::json("{\"ready\": true}\n".to_owned());
    };
    let body = format!("{{\"ready\": false, \"error\": \"{because}.\", \"status\": 503}}\n");
    Response { status: 503, ..Response::json(body) }
}

fn status(handle: &Handle, scope: Scope) -> Response {
    let mut status = handle.status();
    if scope == Scope::ReadOnly {
        // A reason may be the command line of `exec`.
        status.leases.iter_mut().for_each(|lease| (lease.reason, lease.by) = (None, None));
    }
    json(&status)
}

/// Leads new connections to another upstream.
fn switch(
    wanted: Switch,
    found: Option<Box<[SocketAddress]>>,
    caller: &Caller,
    handle: &Handle,
) -> Response {
    let is_back = wanted.to.is_none();
    let address = wanted.to.unwrap_or_else(|| handle.configured_upstream().clone());
    match handle.switch(&address, found, wanted.check, &caller.name) {
        Ok(()) if is_back => Response::empty(204),
        Ok(()) => json(&handle.upstream()),
        Err(error) => {
            handle.refuse_switch(&address, &error, &caller.name);
            refuse_switch(&error)
        }
    }
}

/// Returns the answer to a switch that is refused.
pub(super) fn refuse_switch(error: &SwitchError) -> Response {
    let text = error.to_string();
    let (status, text) = match error {
        SwitchError::LeadsBack(_) => (400, format!("The parameter \"addr\": {text}.")),
        SwitchError::Unreachable(_) => {
            (502, format!("The upstream {text}. Nothing has changed. Start it, or add check=none."))
        }
        SwitchError::TooMany => (409, format!("Nothing has changed: {text}.")),
        SwitchError::NotRemembered(_) => {
            (500, format!("Nothing has changed: {text}. Free it, or repair it, and switch again."))
        }
        SwitchError::Stopping => (503, "tcpause is stopping.".to_owned()),
    };
    Response::error(status, &text)
}

/// Returns a value as an answer.
pub(super) fn json(value: &impl Serialize) -> Response {
    match serde_json::to_string(value) {
        // The line ends for readers at a terminal.
        Ok(body) => Response::json(body + "\n"),
        Err(error) => {
            Response::error(500, &format!("The status cannot be written as JSON: {error}."))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::query::OnTimeout, *};

    fn parse(method: &str, target: &str) -> Result<Command, Response> {
        parse_at(Scope::Full, method, target)
    }

    fn parse_at(scope: Scope, method: &str, target: &str) -> Result<Command, Response> {
        let request =
            Request { method: method.to_owned(), target: target.to_owned(), accepts_html: false };
        Command::parse(&request, scope)
    }

    #[test]
    fn commands_are_answered_by_the_table() {
        let handle = super::super::tests::handle();
        let caller = Caller { name: "a test".to_owned(), request_id: 1 };
        let table = [
            ("GET", "/paused", 200, r#"{"paused": false}"#),
            ("PUT", "/paused?x=1", 400, ""),
            ("GET", "/paused", 200, r#"{"paused": false}"#),
            ("PUT", "/paused", 201, ""),
            ("PUT", "/paused?", 201, ""),
            ("GET", "/paused", 200, r#"{"paused": true}"#),
            ("HEAD", "/paused", 200, r#"{"paused": true}"#),
            ("DELETE", "/paused", 204, ""),
            ("DELETE", "/paused", 204, ""),
            ("GET", "/paused", 200, r#"{"paused": false}"#),
            ("PUT", "/", 405, ""),
            ("GET", "/?a", 400, ""),
            ("PUT", "/metrics", 405, ""),
            ("GET", "/metrics?name[]=tcpause_paused", 400, ""),
            ("GET", "/ready", 200, "{\"ready\": true}\n"),
            ("PUT", "/ready", 405, ""),
            ("GET", "/ready?paused=200", 400, ""),
            ("OPTIONS", "/status", 405, ""),
            ("POST", "/paused", 405, ""),
            ("PUT", "/paused/block-until-idle", 405, ""),
            ("DELETE", "/status", 405, ""),
            ("GET", "/upgrade", 405, ""),
            ("PUT", "/upgrade", 405, ""),
            ("GET", "/upstream?addr=localhost:1", 400, ""),
            ("PUT", "/upstream", 400, ""),
            ("DELETE", "/upstream?addr=localhost:1", 400, ""),
            ("POST", "/upstream", 405, ""),
            ("PUT", "/upstream/block-until-idle?addr=localhost:1", 405, ""),
            ("GET", "/upstream/block-until-idle", 400, ""),
            ("POST", "/upgrade?path=x", 400, ""),
            ("GET", "/paused/", 404, ""),
            ("POST", "*", 404, ""),
            ("GET", "/status?a", 400, ""),
            ("GET", "/paused/block-until-idle?timeout=x", 400, ""),
            ("GET", "/paused/block-until-idle?timeout", 400, ""),
            ("GET", "/paused/block-until-idle?timeout=1s&timeout=1s", 400, ""),
            ("GET", "/paused/block-until-idle?Timeout=1s", 400, ""),
            ("GET", "/paused/block-until-idle?timeout=%3", 400, ""),
            ("GET", "/paused/block-until-idle?timeout=%ff", 400, ""),
        ];
        for (method, target, status, body) in table {
            let executed = parse(method, target).map_or_else(Some, |command| {
                command.execute(&caller, &handle, None, &Source::new())
            });
            let answer = executed.unwrap_or(Response::empty(201));
            assert_eq!(answer.status, status, "{method} {target}");
            assert!(answer.body == body || status >= 400, "{method} {target}: {}", answer.body);
            assert_eq!(!answer.headers.is_empty(), status == 405, "{method} {target}");
        }
    }

    #[test]
    fn a_monitor_changes_nothing_and_tells_no_reason() {
        let handle = super::super::tests::handle();
        let caller = Caller { name: "a test".to_owned(), request_id: 1 };
        let pause = parse("PUT", "/paused?reason=secret").unwrap();
        assert_eq!(pause.execute(&caller, &handle, None, &Source::new()), None);
        for (method, target, status) in [
            ("GET", "/", 200),
            ("HEAD", "/", 200),
            ("GET", "/status", 200),
            ("GET", "/status?a", 400),
            ("GET", "/metrics", 200),
            ("GET", "/paused", 404),
            ("GET", "/paused/block-until-idle", 404),
            ("GET", "/nothing", 404),
            ("PUT", "/paused", 405),
            ("DELETE", "/paused?name=x", 405),
            ("POST", "/status", 405),
            ("POST", "/upgrade", 405),
            ("GET", "/upgrade", 404),
            ("GET", "/upstream", 404),
            ("PUT", "/upstream?addr=localhost:1", 405),
            ("DELETE", "/nothing", 405),
        ] {
            let executed = parse_at(Scope::ReadOnly, method, target).map_or_else(Some, |command| {
                command.execute(&caller, &handle, None, &Source::new())
            });
            let answer = executed.unwrap();
            assert_eq!(answer.status, status, "{method} {target}");
            let allow = answer.headers.iter().find(|(name, _)| *name == "Allow");
            let allow = allow.map(|(_, value)| value.as_str());
            assert_eq!(allow, (status == 405).then_some("GET, HEAD"), "{method} {target}");
            assert!(!answer.body.contains("secret") && !answer.body.contains("a test"));
            assert!(!answer.body.contains("PUT"), "{}", answer.body);
            let sentence = "This listener only reads: send it to the control API (control.addr).";
            assert_eq!(answer.body.contains(sentence), status == 405, "{}", answer.body);
        }
        assert!(status(&handle, Scope::Full).body.contains("secret"));
    }

    #[test]
    fn waits_take_a_timeout() {
        for (query, expected) in [
            ("", None),
            ("?", None),
            ("?timeout=30s", Some(30)),
            ("?&%74imeout=%33%30s&", Some(30)),
        ] {
            let command = parse("GET", &format!("/paused/block-until-idle{query}")).unwrap();
            let timeout = expected.map(Duration::from_secs);
            assert_eq!(command, Command::WaitIdle { timeout }, "{query}");
            assert_eq!(command.awaited(), Some(Awaited::Idle { timeout }), "{query}");
        }
    }

    #[test]
    fn a_pause_is_answered_at_once_unless_it_waits_or_is_bound() {
        let second = Duration::from_secs(1);
        let wait = Some(Wait { time: second, on_timeout: OnTimeout::Kill });
        for (query, expected) in [
            ("name=a", None),
            ("wait=1s&on-timeout=kill", Some(Awaited::Pause { wait, is_bound: false })),
            ("while=connected", Some(Awaited::Pause { wait: None, is_bound: true })),
            (
                "while=connected&wait=1s&on-timeout=kill",
                Some(Awaited::Pause { wait, is_bound: true }),
            ),
        ] {
            let command = parse("PUT", &format!("/paused?{query}")).unwrap();
            assert_eq!(command.awaited(), expected, "{query}");
        }
    }
}

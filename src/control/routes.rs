//! The routes of the control API: what each request asks of the `Handle`.

use super::{
    query::{Pause, Resume, parse_none, parse_wait},
    response::Response,
};
use crate::{
    config::duration::format_duration,
    handle::Handle,
    pause::leases::{LEASES_MAX, Lifetime, Refused, Terms},
};

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caller<'a> {
    /// For the log and the status.
    pub(super) name: &'a str,
    /// Of this request alone; it stays the same when the request is made again.
    pub(super) request_id: u64,
}

/// Does what `method` and `target` ask for.
pub(super) fn route(method: &str, target: &str, asker: Caller<'_>, handle: &Handle) -> Response {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let allow = match path {
        "/paused" => "GET, HEAD, PUT, DELETE",
        "/paused/block-until-idle" | "/status" => "GET, HEAD",
        _ => {
            return Response::error(
                404,
                "There is nothing here: try /paused, /paused/block-until-idle or /status.",
            );
        }
    };
    if !allow.split(", ").any(|allowed| allowed == method) {
        let text = format!("This path does not know the method: it knows {allow}.");
        return Response::error(405, &text).with_header("Allow", allow.to_owned());
    }
    let answer = match (method, path) {
        ("PUT", _) => Pause::parse(query).and_then(|wanted| pause(wanted, asker, handle)),
        ("DELETE", _) => Resume::parse(query).map(|wanted| resume(&wanted, asker, handle)),
        (_, "/paused") => parse_none(query)
            .map(|()| Response::json(format!(r#"{{"paused": {}}}"#, handle.is_paused()))),
        (_, "/status") => parse_none(query).map(|()| status(handle)),
        _ => parse_wait(query).map(|timeout| Response::empty(204).when_idle(timeout)),
    };
    answer.unwrap_or_else(|text| Response::error(400, &text))
}

fn pause(wanted: Pause, asker: Caller<'_>, handle: &Handle) -> Result<Response, String> {
    let max_ttl = handle.pauses().max_ttl;
    if let Some((ttl, max)) = wanted.ttl.zip(max_ttl).filter(|(ttl, max)| ttl > max) {
        let (ttl, max) = (format_duration(ttl), format_duration(max));
        return Err(format!(
            "The parameter \"ttl\": {ttl} is more than pause.max-ttl allows; write {max} at most, and renew it."
        ));
    }
    let terms = Terms {
        name: wanted.name,
        reason: wanted.reason,
        by: asker.name.to_owned(),
        mode: wanted.mode.unwrap_or(handle.pauses().default_mode),
        ttl: wanted.ttl.or(max_ttl),
        quiet: wanted.quiet,
    };
    // It stands for itself once the front has the answer.
    let standing = if wanted.is_tied { Lifetime::ConnectionBound } else { Lifetime::Pending };
    Ok(match handle.pauses().put(terms, standing, asker.request_id) {
        Ok(()) if wanted.is_tied || wanted.wait.is_some() => {
            Response::empty(201).for_pause(wanted.wait, wanted.is_tied)
        }
        Ok(()) => Response::empty(201),
        Err(Refused::Full) => {
            let text = format!(
                "There are {LEASES_MAX} pauses already, each with a name of its own: lift some, or use one of their names."
            );
            Response::error(409, &text)
        }
        Err(Refused::Undone) => Response::error(409, "The request was given up meanwhile."),
    })
}

fn resume(wanted: &Resume, asker: Caller<'_>, handle: &Handle) -> Response {
    let name = match wanted {
        Resume::All => None,
        Resume::Named(name) => Some(name.as_str()),
        Resume::Release(count) => {
            return match handle.pauses().release(*count, asker.name, asker.request_id) {
                Some(released) => Response::json(format!("{{\"released\": {released}}}\n")),
                None => Response::error(409, "It is not paused: there is nobody to let through."),
            };
        }
    };
    handle.pauses().lift(name, asker.name);
    Response::empty(204)
}

fn status(handle: &Handle) -> Response {
    match serde_json::to_string(&handle.status()) {
        // The end of the line is for those who read it on a terminal.
        Ok(body) => Response::json(body + "\n"),
        Err(error) => {
            Response::error(500, &format!("The status cannot be written as JSON: {error}."))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ASKER: Caller<'_> = Caller { name: "a test", request_id: 1 };

    #[test]
    fn routes_answer_by_the_table() {
        let handle = super::super::tests::handle();
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
            ("OPTIONS", "/status", 405, ""),
            ("POST", "/paused", 405, ""),
            ("PUT", "/paused/block-until-idle", 405, ""),
            ("DELETE", "/status", 405, ""),
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
            let answer = route(method, target, ASKER, &handle);
            assert_eq!(answer.status, status, "{method} {target}");
            assert!(answer.body == body || status >= 400, "{method} {target}: {}", answer.body);
            assert_eq!(answer.header.is_some(), status == 405, "{method} {target}");
        }
    }

    #[test]
    fn waits_take_a_timeout() {
        let handle = super::super::tests::handle();
        for (query, expected) in [
            ("", None),
            ("?", None),
            ("?timeout=30s", Some(30)),
            ("?&%74imeout=%33%30s&", Some(30)),
        ] {
            let answer = route("GET", &format!("/paused/block-until-idle{query}"), ASKER, &handle);
            let expected = expected.map(Duration::from_secs);
            assert_eq!(answer, Response::empty(204).when_idle(expected), "{query}");
        }
    }
}

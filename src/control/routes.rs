//! The routes of the control API: what each request asks of the `Handle`.

use std::time::Duration;

use log::{debug, info};
use tiny_http::Method;

use super::answer::Answer;
use crate::{Handle, parse_duration};

/// Does what `method` and `target` ask for. `caller` is who asked, for the log.
pub(super) fn route(method: &Method, target: &str, caller: &str, handle: &Handle) -> Answer {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let (allow, takes_timeout) = match path {
        "/paused" => ("GET, HEAD, PUT, DELETE", false),
        "/paused/block-until-idle" => ("GET, HEAD", true),
        "/status" => ("GET, HEAD", false),
        _ => {
            return Answer::error(
                404,
                "There is nothing here: try /paused, /paused/block-until-idle or /status.",
            );
        }
    };
    if !allow.split(", ").any(|allowed| allowed == method.as_str()) {
        let text = format!("This path does not know the method: it knows {allow}.");
        return Answer::error(405, &text).with_header("Allow", allow.to_owned());
    }
    let timeout = match parse_query(query, takes_timeout) {
        Ok(timeout) => timeout,
        Err(text) => return Answer::error(400, &text),
    };
    match (method, path) {
        (Method::Put, _) => pause(caller, handle),
        (Method::Delete, _) => resume(caller, handle),
        (_, "/paused") => Answer::json(format!(r#"{{"paused": {}}}"#, handle.is_paused())),
        (_, "/status") => status(handle),
        _ => Answer::empty(204).when_idle(timeout),
    }
}

fn pause(caller: &str, handle: &Handle) -> Answer {
    if handle.pause() {
        let status = handle.status();
        info!("paused by {caller}; {} connections run", status.connecting + status.active);
    } else {
        debug!("asked to pause by {caller}: it was paused already");
    }
    Answer::empty(201)
}

fn resume(caller: &str, handle: &Handle) -> Answer {
    let before = handle.status();
    if handle.resume() {
        let since = before.paused_since.as_deref().unwrap_or("a moment ago");
        info!("resumed by {caller}, paused since {since}; {} clients are held", before.held);
    } else {
        debug!("asked to resume by {caller}: it was not paused");
    }
    Answer::empty(204)
}

fn status(handle: &Handle) -> Answer {
    match serde_json::to_string(&handle.status()) {
        // The end of the line is for those who read it on a terminal.
        Ok(body) => Answer::json(body + "\n"),
        Err(error) => {
            Answer::error(500, &format!("The status cannot be written as JSON: {error}."))
        }
    }
}

/// Reads a query, in which `timeout` is the only parameter there is.
pub(super) fn parse_query(query: &str, takes_timeout: bool) -> Result<Option<Duration>, String> {
    let mut timeout = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (name, value) = (decode(name)?, decode(value)?);
        if name != "timeout" || !takes_timeout {
            let taken = if takes_timeout { "timeout" } else { "none" };
            return Err(format!("The parameter {name:?} is not known: this path takes {taken}."));
        }
        if timeout.replace(parse_duration(&value)?).is_some() {
            return Err(format!("The parameter {name:?} is given more than once."));
        }
    }
    Ok(timeout)
}

/// Undoes the percent-encoding of a query's name or value.
fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
                let value =
                    digit().zip(digit()).and_then(|(high, low)| u8::try_from(high * 16 + low).ok());
                value.ok_or("The query holds a % that two hexadecimal digits do not follow.")?
            }
            _ => byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| "The query is not UTF-8.".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_answer_by_the_table() {
        use Method::{Delete, Get, Head, Options, Post, Put};
        let handle = super::super::tests::handle();
        let table = [
            (Get, "/paused", 200, r#"{"paused": false}"#),
            (Put, "/paused?x=1", 400, ""),
            (Get, "/paused", 200, r#"{"paused": false}"#),
            (Put, "/paused", 201, ""),
            (Put, "/paused?", 201, ""),
            (Get, "/paused", 200, r#"{"paused": true}"#),
            (Head, "/paused", 200, r#"{"paused": true}"#),
            (Delete, "/paused", 204, ""),
            (Delete, "/paused", 204, ""),
            (Get, "/paused", 200, r#"{"paused": false}"#),
            (Options, "/status", 405, ""),
            (Post, "/paused", 405, ""),
            (Put, "/paused/block-until-idle", 405, ""),
            (Delete, "/status", 405, ""),
            (Get, "/paused/", 404, ""),
            (Post, "*", 404, ""),
            (Get, "/status?a", 400, ""),
            (Get, "/paused/block-until-idle?timeout=x", 400, ""),
            (Get, "/paused/block-until-idle?timeout", 400, ""),
            (Get, "/paused/block-until-idle?timeout=1s&timeout=1s", 400, ""),
            (Get, "/paused/block-until-idle?Timeout=1s", 400, ""),
            (Get, "/paused/block-until-idle?timeout=%3", 400, ""),
            (Get, "/paused/block-until-idle?timeout=%ff", 400, ""),
        ];
        for (method, target, status, body) in table {
            let answer = route(&method, target, "a test", &handle);
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
            let answer =
                route(&Method::Get, &format!("/paused/block-until-idle{query}"), "a test", &handle);
            let expected = expected.map(Duration::from_secs);
            assert_eq!(answer, Answer::empty(204).when_idle(expected), "{query}");
        }
    }
}

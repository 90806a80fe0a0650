//! The fuzz target of the control API: what `check` lets through, it lets through whole, and nothing else.

#![allow(clippy::missing_panics_doc, reason = "a panic is how a target tells what it has found")]

use super::{
    answer::Answer,
    private::request_of,
    query::{Pause, Resume, parse_none, parse_wait},
    request::{BODY_BYTES_MAX, HEAD_BYTES_MAX, HostPolicy, Progress, check},
    routes::Asker,
};
use crate::{Address, config};

/// Up to this length every beginning of a request is tried, beyond it a few.
const WHOLE_BYTES_MAX: usize = 64;

/// One request, or what comes in place of one, as the front reads it: piece by piece.
pub fn control_request(bytes: &[u8]) {
    let hosts = HostPolicy::new(&config::Control {
        mode: 0o600,
        addr: Address::tcp("control.example", 3001),
        hosts: Vec::new(),
    });
    let all = check(bytes, &hosts);
    let step = (bytes.len() / WHOLE_BYTES_MAX).max(1);
    for end in (0..bytes.len()).step_by(step) {
        let begun = check(bytes.get(..end).unwrap_or_default(), &hosts);
        match (&begun, &all) {
            // Bytes behind a request are ignored.
            (Ok(Progress::Whole { .. }), _) => assert_eq!(begun, all, "{end}"),
            // What is to come is the body, and nothing but its length can matter; what is refused stays so.
            (Ok(Progress::More), _)
            | (Ok(Progress::Continue), Ok(Progress::Continue | Progress::Whole { .. }))
            | (Err(_), Err(_)) => {}
            _ => unreachable!("after {end} bytes {begun:?}, after all {all:?}"),
        }
    }
    match all {
        Ok(Progress::More | Progress::Continue) => {
            assert!(bytes.len() < HEAD_BYTES_MAX + BODY_BYTES_MAX, "it never has enough");
        }
        Ok(Progress::Whole { method, target }) => {
            assert_harmless(bytes, &method, &target);
            let query = target.split_once('?').map_or("", |(_, query)| query);
            let errors = [
                Pause::parse(query).err(),
                Resume::parse(query).err(),
                parse_wait(query).err(),
                parse_none(query).err(),
            ];
            for text in errors.into_iter().flatten() {
                let answer = Answer::error(400, &text);
                let line = answer.body.trim_end_matches('\n');
                assert!(line.bytes().all(|byte| byte >= b' '), "{answer:?}");
            }
        }
        Err((status, text)) => assert!((400..600).contains(&status) && text.len() > 10),
    }
}

/// What the private server is asked is one request, and no web page has sent it.
fn assert_harmless(bytes: &[u8], method: &str, target: &str) {
    let asked = request_of(Asker { name: "a fuzzer", ticket: 7 }, method, target);
    let asked = str::from_utf8(&asked).unwrap_or_default();
    let mut lines = asked.split("\r\n");
    let line = format!("{method} {target} HTTP/1.1");
    assert_eq!(lines.next(), Some(line.as_str()));
    assert_eq!(lines.count(), 6, "{asked:?}");
    assert!(
        !method.is_empty() && method.bytes().all(|byte| byte.is_ascii_uppercase()),
        "{method:?}"
    );
    assert!(target.bytes().all(|byte| byte.is_ascii_graphic()), "{target:?}");
    let head = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap_or_default();
    let head = String::from_utf8_lossy(bytes.get(..head).unwrap_or_default()).to_lowercase();
    for name in ["\r\norigin:", "\r\ntransfer-encoding:", "\r\nsec-fetch-site: c", "\0"] {
        assert!(!head.contains(name), "{name:?} in {head:?}");
    }
}

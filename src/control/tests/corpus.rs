//! Fuzz target of the control API: only a whole request is let through, in whatever pieces it comes.

use super::super::{
    body::BODY_BYTES_MAX,
    command::Command,
    hosts::HostPolicy,
    index::Scope,
    query::{Pause, Resume, parse_none, parse_ready, parse_wait},
    request::{HEAD_BYTES_MAX, Incoming, Progress, Request},
    response::Response,
};
use crate::config::address::Address;

/// Longest request of which every beginning is tried; of longer ones, a few are.
const WHOLE_BYTES_MAX: usize = 64;

/// Checks one request, or other bytes in place of one, as the front reads it: piece by piece.
pub(crate) fn control_request(bytes: &[u8]) {
    let hosts = HostPolicy::new(&[Address::tcp("control.example", 3001)], &[]);
    let all = Incoming::default().take(bytes, &hosts);
    let step = (bytes.len() / WHOLE_BYTES_MAX).max(1);
    for split in (0..bytes.len()).step_by(step) {
        let (first, rest) = bytes.split_at(split);
        let mut incoming = Incoming::default();
        let begun = incoming.take(first, &hosts);
        match (&begun, &all) {
            // Bytes behind a request are ignored.
            (Ok(Progress::Whole(_)), _) => assert_eq!(begun, all, "{split}"),
            // A refusal is final.
            (Err(_), Err(_)) => {}
            (Ok(Progress::More | Progress::Continue), _) => {
                let ended = incoming.take(rest, &hosts);
                // `Continue` is told once, when the head is whole.
                let was_told = begun == Ok(Progress::Continue) && all == Ok(Progress::Continue);
                let expected = if was_told { &Ok(Progress::More) } else { &all };
                assert_eq!(&ended, expected, "{split}");
            }
            _ => unreachable!("after {split} bytes {begun:?}, after all {all:?}"),
        }
    }
    match all {
        Ok(Progress::More | Progress::Continue) => {
            assert!(bytes.len() <= HEAD_BYTES_MAX + BODY_BYTES_MAX, "it never has enough");
        }
        Ok(Progress::Whole(request)) => {
            assert_harmless(bytes, &request);
            let target = &request.target;
            let query = target.split_once('?').map_or("", |(_, query)| query);
            let errors = [
                Pause::parse(query).err(),
                Resume::parse(query).err(),
                parse_wait(query).err(),
                parse_none(query).err(),
                parse_ready(query).err(),
            ];
            let answers = errors.into_iter().flatten().map(|text| Response::error(400, &text));
            let refused = [Scope::Full, Scope::ReadOnly]
                .into_iter()
                .filter_map(|scope| Command::parse(&request, scope).err());
            for answer in answers.chain(refused) {
                let line = answer.body.trim_end_matches('\n');
                assert!(line.bytes().all(|byte| byte >= b' '), "{answer:?}");
            }
        }
        Err((status, text)) => assert!((400..600).contains(&status) && text.len() > 10),
    }
}

/// Asserts that method and target fit into one line, and that no web page has sent the request.
fn assert_harmless(bytes: &[u8], request: &Request) {
    let Request { method, target, .. } = request;
    assert!(
        !method.is_empty() && method.bytes().all(|byte| byte.is_ascii_uppercase()),
        "{method:?}"
    );
    assert!(target.bytes().all(|byte| byte.is_ascii_graphic()), "{target:?}");
    let head = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap_or_default();
    let head = String::from_utf8_lossy(bytes.get(..head).unwrap_or_default()).to_lowercase();
    for name in ["\r\norigin:", "\r\nsec-fetch-site: c", "\0"] {
        assert!(!head.contains(name), "{name:?} in {head:?}");
    }
    // A body is framed in one way.
    let framings = ["\r\ncontent-length:", "\r\ntransfer-encoding:"];
    let count: usize = framings.iter().map(|name| head.matches(name).count()).sum();
    assert!(count <= 1, "{head:?}");
}

#[test]
fn the_corpus_of_the_fuzz_target_is_replayed() {
    crate::tests::replay("control_request", control_request);
}

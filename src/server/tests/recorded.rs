//! A recorded hand-over of an earlier program, which every later one has to read.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::server::messages::Message;

/// Messages of format 1, as they were first written. This file is never changed, only joined by others when the format rises.
const FORMAT_1: &str = include_str!("../../../tests/handover/format-1.jsonl");

/// Words of all messages, as they stand in the channel.
const KINDS: [&str; 15] = [
    "abort",
    "begin",
    "connections",
    "control",
    "control-listeners",
    "end",
    "giver-hello",
    "go",
    "listeners",
    "ready",
    "refuse",
    "rest",
    "taken",
    "taker-hello",
    "warm",
];

/// Checks that all of `recorded` is in `written`, which may have further fields.
#[track_caller]
fn assert_kept(recorded: &Value, written: &Value, line: usize) {
    match (recorded, written) {
        (Value::Object(recorded), Value::Object(written)) => {
            for (name, recorded) in recorded {
                let written = written.get(name);
                let written = written.unwrap_or_else(|| panic!("line {line}: {name} is lost"));
                assert_kept(recorded, written, line);
            }
        }
        (Value::Array(recorded), Value::Array(written)) => {
            assert_eq!(recorded.len(), written.len(), "line {line}");
            for (recorded, written) in recorded.iter().zip(written) {
                assert_kept(recorded, written, line);
            }
        }
        _ => assert_eq!(recorded, written, "line {line}"),
    }
}

#[test]
fn a_recorded_hand_over_of_format_1_is_read_and_nothing_of_it_is_lost() {
    let mut kinds = BTreeSet::new();
    for (line, json) in (1..).zip(FORMAT_1.lines()) {
        let message: Message =
            serde_json::from_str(json).unwrap_or_else(|error| panic!("line {line}: {error}"));
        let recorded: Value = serde_json::from_str(json).unwrap();
        let kind = match &recorded {
            Value::Object(message) => message.keys().next().cloned(),
            word => word.as_str().map(str::to_owned),
        };
        kinds.insert(kind.unwrap());
        assert_kept(&recorded, &serde_json::to_value(&message).unwrap(), line);
    }
    assert!(kinds.iter().eq(KINDS), "{kinds:?}");
}

#[test]
fn a_contact_is_all_that_an_earlier_program_tells_of_its_fleet() {
    let rest = FORMAT_1.lines().find(|line| line.starts_with("{\"rest\"")).unwrap();
    let mut message: Value = serde_json::from_str(rest).unwrap();
    let told = |message: &Value| {
        let message: Message = serde_json::from_value(message.clone()).unwrap();
        let Message::Rest(rest) = message else { panic!("{message:?}") };
        rest.member()
    };
    assert_eq!(told(&message), None);
    let contact = json!({ "secs": 5, "nanos": 0 });
    message["rest"]["fleet_contact"] = contact.clone();
    assert_eq!(told(&message), Some(json!({ "contact": contact, "present": contact })));
    message["rest"]["fleet"] = json!({ "is_cut": true });
    assert_eq!(told(&message), Some(json!({ "is_cut": true })));
}

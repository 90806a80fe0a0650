//! Callers that switch the upstream while an earlier switch waits for the disk.

use super::*;
use crate::config::address::Address;

fn put(port: u16, check: &str) -> String {
    format!("PUT /upstream?addr=127.0.0.1:{port}&check={check} HTTP/1.0\r\n\r\n")
}

fn leads_to(api: &Api, port: u16) -> bool {
    api.handle.is_upstream(&Address::tcp("127.0.0.1", port))
}

#[test]
fn a_switch_that_waits_for_the_disk_keeps_no_other_request_waiting() {
    let api = Api::start();
    let slow = api.handle.lock_switches();
    let text = answer(&mut api.send(&put(1, "none")));
    assert_eq!(status(&text), 504);
    assert!(text.contains("see GET /upstream"), "{text}");
    api.assert_answers("a switch that takes long");
    assert_eq!(api.status("DELETE /connections?upstream=127.0.0.1:1 HTTP/1.0\r\n\r\n"), 503);
    api.handle.pause();
    assert_eq!(api.status("DELETE /paused HTTP/1.0\r\n\r\n"), 204);
    assert!(leads_to(&api, 9));
    drop(slow);
    let deadline = Instant::now() + WAIT_MAX;
    while !leads_to(&api, 1) {
        assert!(Instant::now() < deadline, "it is done late, and not forgotten");
        thread::yield_now();
    }
}

#[test]
fn a_switch_to_the_present_one_is_checked_if_another_comes_between() {
    let api = Api::start();
    for (check, expected, port) in [("connect", 502, 1), ("none", 200, 9)] {
        assert_eq!(api.status(&put(9, "none")), 200);
        let slow = api.handle.lock_switches();
        assert_eq!(api.status(&put(1, "none")), 504, "the executor has it");
        let mut back = api.send(&put(9, check));
        // Answered behind it, so that it waits by now.
        api.assert_answers("the switch back");
        drop(slow);
        let text = answer(&mut back);
        assert_eq!(status(&text), expected, "{text}");
        assert!(leads_to(&api, port));
        assert_eq!(text.contains("127.0.0.1:9\"]"), check == "none", "it has addresses: {text}");
    }
}

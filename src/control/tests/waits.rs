//! Callers that wait for idle: their places, their time, and their answers.

use std::os::fd::BorrowedFd;

use super::*;
use crate::{handle::SteeringStatus, pause::steer::Steer};

#[test]
fn waiters_that_leave_are_forgotten() {
    let api = Api::start();
    let _busy = Busy::new(&api.handle);
    for _ in 0..3 {
        drop(full_house(&api));
        assert_house_empties(&api);
    }
}

/// Until a whole house of other callers finds room.
pub(super) fn assert_house_empties(api: &Api) {
    let brief = "GET /paused/block-until-idle?timeout=100ms HTTP/1.0\r\n\r\n";
    let deadline = Instant::now() + WAIT_MAX;
    loop {
        let callers = (0..CALLERS_MAX / 2).map(|_| api.send(brief)).collect::<Vec<_>>();
        // While the front is full of callers that have just left, it refuses and may reset.
        let status_or_reset = |mut caller: TcpStream| {
            let mut text = String::new();
            caller.read_to_string(&mut text).map_or(503, |_| status(&text))
        };
        let statuses = callers.into_iter().map(status_or_reset).collect::<Vec<_>>();
        if statuses.iter().all(|status| *status == 504) {
            return;
        }
        assert!(Instant::now() < deadline, "waiters that left are still there: {statuses:?}");
    }
}

/// As many callers as may wait, all of them known to the front: one more is refused.
fn full_house(api: &Api) -> Vec<TcpStream> {
    let mut waiters = (0..CALLERS_MAX / 2).map(|_| api.send(WAIT)).collect::<Vec<_>>();
    let deadline = Instant::now() + WAIT_MAX;
    while api.status("GET /paused/block-until-idle?timeout=0s HTTP/1.0\r\n\r\n") != 503 {
        assert!(Instant::now() < deadline, "there is room for more waiters than there may be");
        // The question itself takes a place for a moment: whoever was refused for that comes again.
        for waiter in &mut waiters {
            waiter.set_nonblocking(true).unwrap();
            if waiter.peek(&mut [0]).is_ok() {
                *waiter = api.send(WAIT);
            }
            waiter.set_nonblocking(false).unwrap();
        }
    }
    waiters
}

#[test]
fn who_finds_no_room_to_wait_has_paused_nothing() {
    let api = Api::start();
    let _busy = Busy::new(&api.handle);
    let waiters = full_house(&api);
    for query in ["wait=1h", "while=connected"] {
        assert_eq!(api.status(&format!("PUT /paused?{query} HTTP/1.0\r\n\r\n")), 503);
        assert!(!api.handle.is_paused(), "{query}");
    }
    drop(waiters);
}

#[test]
fn every_waiter_sees_a_short_idle_moment() {
    let api = Api::start();
    for _ in 0..20 {
        let busy = Busy::new(&api.handle);
        let waiters = full_house(&api);
        api.assert_answers("too many waiters");
        drop(busy);
        let _busy_again = Busy::new(&api.handle);
        for mut waiter in waiters {
            assert_eq!(status(&answer(&mut waiter)), 204);
        }
    }
}

#[test]
fn a_wait_ends_with_its_time() {
    let api = Api::start();
    let _busy = Busy::new(&api.handle);
    let begin = Instant::now();
    assert_eq!(api.status("GET /paused/block-until-idle?timeout=200ms HTTP/1.0\r\n\r\n"), 504);
    assert!(begin.elapsed() >= Duration::from_millis(200));
    let wait = "GET /paused/block-until-idle?timeout=0s HTTP/1.0\r\n\r\n";
    let text = answer(&mut api.send(wait));
    assert_eq!(status(&text), 504);
    let (_, body) = text.split_once("\r\n\r\n").unwrap();
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!((&body["active"], body["oldest"].is_array()), (&1.into(), true), "{body}");
    // Nothing was paused or undone.
    assert_eq!(body.get("paused"), None);
    let head = answer(&mut api.send(&wait.replace("GET", "HEAD")));
    assert!(status(&head) == 504 && head.ends_with("\r\n\r\n"), "{head}");
}

/// Way past the workers with three connections that never end.
#[derive(Debug)]
struct Three;

impl Steer for Three {
    fn stop(&self) {}
    fn settle(&self) {}
    fn suspend(&self) {}
    fn go_on(&self) {}
    fn fence_at(&self, _: Option<Duration>) {}
    fn await_idle(&self, _: u64) -> bool {
        false
    }

    fn marks(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn mark(&self, _: BorrowedFd<'_>) {}
    fn reset(&self) {}

    fn status(&self) -> SteeringStatus {
        SteeringStatus { state: "steering".to_owned(), why: None, active: 3, total: 3 }
    }
}

#[test]
fn a_wait_in_vain_and_a_list_tell_the_number_of_the_steered() {
    let api = Api::start();
    let body = |request: &str| -> serde_json::Value {
        let text = answer(&mut api.send(request));
        serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap()
    };
    let (list, wait) = (
        "GET /connections HTTP/1.0\r\n\r\n",
        "GET /paused/block-until-idle?timeout=0s HTTP/1.0\r\n\r\n",
    );
    let _busy = Busy::new(&api.handle);
    for request in [list, wait] {
        assert_eq!(body(request).get("steered"), None, "{request}");
    }
    api.handle.pauses().steer_by(Box::new(Three));
    for request in [list, wait] {
        assert_eq!(body(request)["steered"], 3, "{request}");
    }
    let status = body("GET /status HTTP/1.0\r\n\r\n");
    assert_eq!((&status["steering"]["active"], &status["active"]), (&3.into(), &3.into()));
}

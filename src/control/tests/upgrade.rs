//! Callers that ask for an upgrade.

use super::*;

pub(super) const UPGRADE: &str = "POST /upgrade HTTP/1.1\r\nHost: localhost\r\n\r\n";

fn body(text: &str) -> serde_json::Value {
    serde_json::from_str(parts(text).1).unwrap()
}

#[test]
fn a_program_that_cannot_upgrade_itself_says_so() {
    let api = Api::start();
    let text = answer(&mut api.send(UPGRADE));
    assert_eq!(status(&text), 409);
    assert_eq!(body(&text)["error"], "This program cannot upgrade itself.");
    let no_program = api.handle.upgrade_requests().receiver();
    assert!(api.handle.upgrade());
    drop(no_program);
    assert!(!Api::start().handle.upgrade());
}

#[test]
fn all_callers_of_one_upgrade_are_told_its_failure() {
    let api = Api::start();
    let program = api.handle.upgrade_requests().receiver();
    for why in ["It has the wrong version: install another.", "It is too slow."] {
        let mut first = api.send(UPGRADE);
        program.recv_timeout(WAIT_MAX).unwrap();
        let mut others = (0..3).map(|_| api.send(UPGRADE)).collect::<Vec<_>>();
        // Answered behind them, so that they wait by now; and nothing needs the executor or a further request.
        api.assert_answers("requests for an upgrade");
        assert!(program.is_empty(), "it is asked for once");
        api.handle.upgrade_requests().fail(why, &program);
        for caller in std::iter::once(&mut first).chain(&mut others) {
            let text = answer(caller);
            assert_eq!((status(&text), &body(&text)["error"]), (409, &why.into()), "{text}");
        }
    }
}

#[test]
fn callers_that_leave_give_their_permits_back() {
    let api = Api::start();
    let _program = api.handle.upgrade_requests().receiver();
    let _busy = Busy::new(&api.handle);
    for _ in 0..3 {
        drop((0..CALLERS_MAX / 2).map(|_| api.send(UPGRADE)).collect::<Vec<_>>());
        waits::assert_house_empties(&api);
    }
}

#[test]
fn a_stop_ends_the_wait_for_an_upgrade() {
    let api = Api::start();
    let program = api.handle.upgrade_requests().receiver();
    let mut caller = api.send(UPGRADE);
    program.recv_timeout(WAIT_MAX).unwrap();
    drop(api.control);
    assert_eq!(status(&answer(&mut caller)), 503);
}

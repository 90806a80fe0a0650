//! Losses and lack of the private server.

use std::sync::atomic::AtomicUsize;

use super::*;

#[test]
fn a_missing_private_server_is_noticed_by_nobody() {
    let (with, without) = (Api::start(), Api::start_without_a_server());
    for line in [
        "HEAD /nothing",
        "POST /paused",
        "HEAD /status?x",
        "PUT /paused?x=1",
        "DELETE /paused?release=1",
        "GET /paused/block-until-idle?timeout=1s",
        "PUT /paused?name=a&ttl=1h",
        "DELETE /paused?release=1",
        "DELETE /paused?name=a",
        "GET /paused",
    ] {
        let [first, second] =
            [&with, &without].map(|api| answer(&mut api.send(&format!("{line} HTTP/1.0\r\n\r\n"))));
        assert_eq!(parts(&first), parts(&second), "{line}");
    }
    let _busy = Busy::new(&without.handle);
    assert_eq!(without.status("PUT /paused?wait=10ms HTTP/1.0\r\n\r\n"), 504);
    assert_eq!(without.status("PUT /paused?wait=10ms&on-timeout=keep HTTP/1.0\r\n\r\n"), 504);
    assert!(without.handle.resume());
}

/// The private server accepts no more.
#[test]
fn a_lost_private_server_is_replaced() {
    let (api, ours) = Api::start_before_ours(TIMEOUTS_SHORT);
    let busy = Busy::new(&api.handle);
    let (waiter, first) = (api.send(WAIT), api.send(GET));
    let (private, _) = ours.accept().unwrap();
    let second = api.send(GET);
    drop((private, ours));
    for mut caller in [first, second] {
        assert_eq!(status(&answer(&mut caller)), 200);
    }
    api.assert_answers("the loss of the private server");
    drop(busy);
    assert_eq!(status(&answer(&mut { waiter })), 204, "who waits is not forgotten");
}

/// The private server takes a request and dies with it, once without a word and once in the middle of its answer.
#[test]
fn a_lost_answer_is_written_without_the_server() {
    for last_words in ["", "HTTP/1.1 201 Created\r\nContent-"] {
        let (api, dying) = Api::start_before_ours(TIMEOUTS_SHORT);
        let mut caller = api.send("PUT /paused HTTP/1.0\r\n\r\n");
        let (mut private, _) = dying.accept().unwrap();
        private.write_all(last_words.as_bytes()).unwrap();
        drop((private, dying));
        assert_eq!(status(&answer(&mut caller)), 201);
        assert!(api.handle.resume());
    }
}

/// Lists the callers whose pauses hold.
fn callers(handle: &Handle) -> Vec<String> {
    handle.status().leases.into_iter().filter_map(|lease| lease.by).collect()
}

/// Its answer is lost and written without the server: by then, others have changed what it has done.
#[test]
fn a_command_whose_answer_is_lost_is_carried_out_once() {
    let (api, dying) = Api::start_before_ours(TIMEOUTS_SHORT);
    api.handle.pause();
    let mut caller = api.send("DELETE /paused HTTP/1.0\r\n\r\n");
    let (private, _) = dying.accept().unwrap();
    assert!(!api.handle.is_paused());
    api.handle.pause();
    drop((private, dying));
    assert_eq!(status(&answer(&mut caller)), 204);
    assert!(api.handle.is_paused(), "a newer pause is lifted");

    let (api, dying) = Api::start_before_ours(TIMEOUTS_SHORT);
    let mut caller = api.send("PUT /paused HTTP/1.0\r\n\r\n");
    let (private, _) = dying.accept().unwrap();
    assert!(api.handle.resume());
    drop((private, dying));
    assert_eq!(status(&answer(&mut caller)), 201);
    assert!(!api.handle.is_paused(), "a pause that was lifted is back");
}

/// The private server is asked and says nothing.
#[test]
fn a_silent_private_server_costs_no_answer() {
    let (api, _silent) = Api::start_before_ours(TIMEOUTS_SHORT);
    api.handle.pause();
    for (line, expected) in [("GET /status", 200), ("DELETE /paused", 204)] {
        assert_eq!(api.status(&format!("{line} HTTP/1.0\r\n\r\n")), expected, "{line}");
    }
    assert!(!api.handle.is_paused());
}

/// The pause has begun, and no answer comes in time: its caller is told to try again.
#[test]
fn a_pause_that_is_not_answered_does_not_stand() {
    for held_before in [false, true] {
        let late = Timeouts { silence: 2 * TIMEOUTS_SHORT.outcome, ..TIMEOUTS_SHORT };
        let (api, ours) = Api::start_before_ours(late);
        if held_before {
            api.handle.pause();
        }
        let mut caller = api.send("PUT /paused HTTP/1.0\r\n\r\n");
        let _silent = ours.accept().unwrap();
        assert!(callers(&api.handle).iter().any(|by| by.starts_with("127.0.0.1:")));
        assert_eq!(status(&answer(&mut caller)), 503);
        let expected = if held_before { vec!["the program"] } else { vec![] };
        assert_eq!(callers(&api.handle), expected);
        assert_eq!(api.handle.is_paused(), held_before);
    }
}

/// Their answers are the front's own.
#[test]
fn a_pause_that_waits_or_is_bound_needs_no_private_server() {
    for query in ["wait=1h", "while=connected", "while=connected&wait=1h"] {
        let (api, _silent) = Api::start_before_ours(TIMEOUTS_SHORT);
        let mut caller = api.send(&format!("PUT /paused?{query} HTTP/1.0\r\n\r\n"));
        let mut begin = [0; 12];
        caller.read_exact(&mut begin).unwrap();
        assert_eq!(&begin, b"HTTP/1.1 201", "{query}");
        assert!(api.handle.resume(), "{query}");
    }
}

/// Its callers go, and each of their pauses panics as it ends.
#[test]
fn a_panic_of_the_front_costs_no_later_caller() {
    let api = Api::start();
    let panics = Arc::new(AtomicUsize::new(0));
    let left = Arc::clone(&panics);
    api.handle.pauses().watch(move || {
        let taken = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |it| it.checked_sub(1));
        assert!(taken.is_err(), "a change panics");
    });
    let callers = ["a", "b"].map(|name| {
        let target = format!("/paused?while=connected&name={name}");
        let mut caller = api.send(&format!("PUT {target} HTTP/1.0\r\n\r\n"));
        caller.read_exact(&mut [0; 12]).unwrap();
        caller
    });
    panics.store(callers.len(), Ordering::SeqCst);
    let [first, mut second] = callers;
    drop(first);
    answer(&mut second);
    api.assert_answers("a panic of the front");
    assert_eq!(panics.load(Ordering::SeqCst), 0, "panics that did not come");
}

/// The executor is busy with an answer that its server does not give.
#[test]
fn a_wait_and_a_refusal_need_no_executor() {
    let late = Timeouts { silence: 2 * TIMEOUTS_SHORT.outcome, ..TIMEOUTS_SHORT };
    let (api, ours) = Api::start_before_ours(late);
    let mut busy = api.send(GET);
    let _silent = ours.accept().unwrap();
    for (line, expected) in [
        ("HEAD /paused/block-until-idle", 204),
        ("GET /paused/block-until-idle?timeout=1h", 204),
        ("PUT /paused?x=1", 400),
        ("GET /nothing", 404),
        ("DELETE /status", 405),
    ] {
        let text = answer(&mut api.send(&format!("{line} HTTP/1.0\r\n\r\n")));
        assert_eq!(status(&text), expected, "{line}");
        assert!(text.contains("\r\nDate: "), "as the server writes it: {text}");
    }
    assert_eq!(status(&answer(&mut busy)), 503);
}

//! The private server, lost or missing.

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

/// Row 10, as the front sees it: the private server accepts no more.
#[test]
fn a_lost_private_server_is_replaced() {
    let (api, ours) = Api::start_before_ours();
    let busy = Busy::new(&api.handle);
    let waiter = api.send(WAIT);
    let (mut private, _) = ours.accept().unwrap();
    private
        .write_all(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\nX-Hold: 1000000000000\r\n\r\n")
        .unwrap();
    drop(private);
    let in_the_backlog = api.send(GET);
    drop(ours);
    assert_eq!(status(&answer(&mut { in_the_backlog })), 200);
    api.assert_answers("the loss of the private server");
    drop(busy);
    assert_eq!(status(&answer(&mut { waiter })), 204, "who waits is not forgotten");
}

/// Row 11: the private server takes a request and dies with it, once without a word and once in the middle of its answer.
#[test]
fn a_lost_answer_is_asked_for_again() {
    for last_words in ["", "HTTP/1.1 201 Created\r\nContent-"] {
        let (api, dying) = Api::start_before_ours();
        let mut caller = api.send("PUT /paused HTTP/1.0\r\n\r\n");
        let (mut private, _) = dying.accept().unwrap();
        private.write_all(last_words.as_bytes()).unwrap();
        drop((private, dying));
        assert_eq!(status(&answer(&mut caller)), 201);
        assert!(api.handle.resume());
    }
}

/// Takes a request for a pause from the front, in place of the private server. Returns the connection, the target and the
/// request number.
fn take(ours: &UnixListener) -> (UnixStream, String, u64) {
    let (mut private, _) = ours.accept().unwrap();
    let mut request = [0; 1000];
    let length = private.read(&mut request).unwrap();
    let request = String::from_utf8_lossy(&request[..length]).into_owned();
    let target = request.split(' ').nth(1).unwrap().to_owned();
    let request_id = request.split_once("X-Ticket: ").unwrap().1.split_once("\r\n").unwrap().0;
    (private, target, request_id.parse().unwrap())
}

fn put(target: &str, request_id: u64, handle: &Handle) -> response::Response {
    routes::route("PUT", target, routes::Caller { name: "the lost one", request_id }, handle)
}

/// Carries out a request for a pause in place of the private server. The answer is lost with the connection that this
/// returns.
fn carry_out(ours: &UnixListener, handle: &Handle) -> UnixStream {
    let (private, target, request_id) = take(ours);
    put(&target, request_id, handle);
    private
}

/// Lists the callers whose pauses hold.
fn askers(handle: &Handle) -> Vec<String> {
    handle.status().leases.into_iter().map(|lease| lease.by).collect()
}

/// The pause has begun, and then its answer is lost.
#[test]
fn a_pause_that_is_asked_for_twice_is_one() {
    for query in ["?wait=1h", ""] {
        let (api, dying) = Api::start_before_ours();
        let busy = Busy::new(&api.handle);
        let mut caller = api.send(&format!("PUT /paused{query} HTTP/1.0\r\n\r\n"));
        drop((carry_out(&dying, &api.handle), dying));
        let deadline = Instant::now() + WAIT_MAX;
        while askers(&api.handle).contains(&"the lost one".to_owned()) {
            assert!(Instant::now() < deadline, "it is not asked for again");
            thread::yield_now();
        }
        assert_eq!(api.handle.status().leases.len(), 1);
        drop(busy);
        assert_eq!(status(&answer(&mut caller)), 201);
        assert!(api.handle.resume());
    }
}

/// The server is slow, and the request is asked for anew. The first one is carried out when all is over.
#[test]
fn a_copy_of_a_request_that_comes_late_pauses_nothing() {
    for (query, is_tied) in [("", false), ("?wait=1h", false), ("?while=connected", true)] {
        let (api, ours) = Api::start_before_ours();
        let mut caller = api.send(&format!("PUT /paused{query} HTTP/1.0\r\n\r\n"));
        let (private, target, request_id) = take(&ours);
        drop((private, ours));
        if is_tied {
            caller.read_exact(&mut [0]).unwrap();
            drop(caller);
        } else {
            assert_eq!(status(&answer(&mut caller)), 201);
            assert!(api.handle.resume());
        }
        let deadline = Instant::now() + WAIT_MAX;
        while api.handle.is_paused() {
            assert!(Instant::now() < deadline, "{query}: it stays paused");
            thread::yield_now();
        }
        assert_eq!(put(&target, request_id, &api.handle).status, 409, "{query}");
        assert!(!api.handle.is_paused(), "{query}");
    }
}

/// The pause has begun, and no answer ever comes: its caller is told to try again.
#[test]
fn a_pause_that_is_not_answered_does_not_stand() {
    let ask = |query: &str, held_before: bool| {
        let (api, ours) = Api::start_before_ours();
        if held_before {
            api.handle.pause();
        }
        let mut caller = api.send(&format!("PUT /paused{query} HTTP/1.0\r\n\r\n"));
        let _silent = carry_out(&ours, &api.handle);
        assert!(askers(&api.handle).contains(&"the lost one".to_owned()));
        assert_eq!(status(&answer(&mut caller)), 503);
        let expected = if held_before { vec!["the program"] } else { vec![] };
        assert_eq!(askers(&api.handle), expected, "{query}");
        assert_eq!(api.handle.is_paused(), held_before);
    };
    // All at once, as each lasts as long as the silence of a server may.
    thread::scope(|scope| {
        for query in ["", "?wait=1h", "?while=connected"] {
            for held_before in [false, true] {
                scope.spawn(move || ask(query, held_before));
            }
        }
    });
}

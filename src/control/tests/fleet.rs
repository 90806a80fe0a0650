//! Requests about the fleet, before one that is played by the test.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    sync::{Mutex, MutexGuard},
};

use serde_json::{Value, json};

use super::*;
use crate::{
    fleet::{BootTime, Fleets, Refusal, RefusalKind, Table, WaitingFor, Wanted},
    pause::WaitState,
    sys::boot::boot_time,
};

type Watcher = Box<dyn Fn() + Send + Sync>;

/// A fleet of which the test tells each state.
#[derive(Clone, Default)]
struct Played(Arc<Mutex<Play>>);

#[derive(Default)]
struct Play {
    /// Answer to all requests.
    refusal: Option<Refusal>,
    waits: BTreeMap<u64, WaitState>,
    is_lost: bool,
    kept_until: Option<BootTime>,
    forced: Vec<String>,
    /// True if the end of a pause takes its time.
    ends_late: bool,
    /// State of a pause that begins.
    begins: Option<WaitState>,
    /// Requests in words, in their order.
    done: Vec<String>,
    wanted: Vec<Wanted>,
    watchers: Vec<Arc<Watcher>>,
}

impl std::fmt::Debug for Played {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Played")
    }
}

impl Played {
    fn lock(&self) -> MutexGuard<'_, Play> {
        self.0.lock().unwrap()
    }

    fn note(&self, done: String) -> Result<(), Refusal> {
        let mut play = self.lock();
        play.done.push(done);
        play.refusal.clone().map_or(Ok(()), Err)
    }

    /// Changes what the fleet tells, and rings.
    fn change(&self, change: impl FnOnce(&mut Play)) {
        change(&mut self.lock());
        let watchers = self.lock().watchers.clone();
        for watcher in watchers {
            watcher();
        }
    }

    fn set_waits(&self, state: WaitState) {
        self.change(|play| play.waits.values_mut().for_each(|it| *it = state));
    }

    /// Waits until this was done.
    fn await_done(&self, done: &str) {
        let deadline = Instant::now() + WAIT_MAX;
        while !self.lock().done.iter().any(|it| it == done) {
            assert!(Instant::now() < deadline, "{done}: {:?}", self.lock().done);
            thread::yield_now();
        }
    }
}

impl Fleets for Played {
    fn pause(&self, wanted: Wanted, request_id: u64, is_bound: bool) -> Result<(), Refusal> {
        let mut play = self.lock();
        let begins = play.begins.unwrap_or(WaitState::Idle);
        play.done.push(format!("pause {} {is_bound}", wanted.name));
        play.wanted.push(wanted);
        if let Some(refusal) = &play.refusal {
            return Err(refusal.clone());
        }
        play.waits.insert(request_id, begins);
        Ok(())
    }

    fn wait_state(&self, request_id: u64) -> WaitState {
        self.lock().waits.get(&request_id).copied().unwrap_or(WaitState::Ended)
    }

    fn waiting_for(&self, _: u64) -> Vec<WaitingFor> {
        let (host, why) = ("web-17".to_owned(), "lost for 40 s".to_owned());
        vec![WaitingFor { host, why }]
    }

    fn is_lost(&self, _: u64) -> bool {
        self.lock().is_lost
    }

    fn kept_until(&self, _: u64) -> Option<BootTime> {
        self.lock().kept_until
    }

    fn forced(&self, _: u64) -> Vec<String> {
        self.lock().forced.clone()
    }

    fn kill(&self, _: u64) {
        self.note("kill".to_owned()).unwrap();
        self.set_waits(WaitState::Idle);
    }

    fn renew(&self, _: u64) {
        self.note("renew".to_owned()).unwrap();
    }

    fn end(&self, request_id: u64, because: &str) {
        let mut play = self.lock();
        let is_known = play.waits.contains_key(&request_id);
        if is_known && !play.ends_late {
            play.waits.remove(&request_id);
        }
        if is_known {
            play.done.push(format!("end: {because}"));
        }
    }

    fn resume(&self, name: &str, _: &str) -> Result<(), Refusal> {
        self.note(format!("resume {name}"))
    }

    fn table(&self) -> Result<Table, Refusal> {
        self.note("table".to_owned())?;
        Ok(Table::new("shop".to_owned(), Vec::new(), Vec::new()))
    }

    fn forget(&self, host: &str, _: &str) -> Result<(), Refusal> {
        self.note(format!("forget {host}"))
    }

    fn coordinating(&self) -> Vec<String> {
        Vec::new()
    }

    fn watch(&self, watcher: Watcher) {
        self.lock().watchers.push(Arc::new(watcher));
    }
}

fn start_with(played: &Played) -> Api {
    let handle = handle();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let addr = listener.local_addr().unwrap();
    let (hosts, listeners) = (HostPolicy::new([], &[]), vec![(listener.into(), Scope::Full)]);
    let subject = (handle.clone(), Some(Fleet::new(Arc::new(played.clone()))));
    let backend = Backend::start().unwrap();
    let parts = assemble(listeners, subject, hosts, CALLERS_MAX, backend, TIMEOUTS_SHORT).unwrap();
    Api { control: Control::start_with(parts, None).unwrap(), handle, addr }
}

fn ask(api: &Api, line: &str) -> (u16, Value) {
    let text = answer(&mut api.send(&format!("{line} HTTP/1.0\r\n\r\n")));
    let (_, body) = text.split_once("\r\n\r\n").unwrap();
    (status(&text), serde_json::from_str(body).unwrap_or_default())
}

#[test]
fn a_proxy_without_a_fleet_says_so() {
    let api = Api::start();
    for line in [
        "PUT /fleet/paused",
        "PUT /fleet/paused?wait=1s&while=connected",
        "DELETE /fleet/paused?name=a",
        "GET /fleet/status",
        "DELETE /fleet/hosts?host=a",
    ] {
        let (status, body) = ask(&api, line);
        assert_eq!(status, 404, "{line}");
        let error = "This proxy is in no fleet: fleet.endpoints makes it a member of one.";
        assert_eq!(body["error"], error, "{line}");
    }
    api.assert_answers("no fleet");
}

#[test]
fn the_fleet_is_asked_by_the_table() {
    let played = Played::default();
    let api = start_with(&played);
    for (line, status, done) in [
        ("PUT /fleet/paused?name=a&ttl=30s&without=web-1,web-2", 201, "pause a false"),
        ("DELETE /fleet/paused?name=a", 204, "resume a"),
        ("DELETE /fleet/hosts?host=web-1", 204, "forget web-1"),
        ("GET /fleet/status", 200, "table"),
        ("HEAD /fleet/status", 200, "table"),
        ("GET /fleet/status?x", 400, ""),
        ("GET /fleet/paused", 405, ""),
        ("PUT /fleet/status", 405, ""),
        ("GET /fleet/hosts", 405, ""),
        ("GET /fleet/", 404, ""),
        ("GET /fleet", 404, ""),
    ] {
        played.lock().done.clear();
        assert_eq!(ask(&api, line).0, status, "{line}");
        if !done.is_empty() {
            played.await_done(done);
        }
    }
    let wanted = played.lock().wanted.remove(0);
    assert_eq!(wanted.ttl, Duration::from_secs(30));
    assert_eq!(wanted.without, ["web-1", "web-2"]);
    assert!(wanted.by.starts_with("127.0.0.1:"), "{}", wanted.by);
    assert_eq!(
        ask(&api, "GET /fleet/status").1,
        json!({"name": "shop", "pauses": [], "hosts": []})
    );
    assert!(!api.handle.is_paused());
}

#[test]
fn what_is_wrong_is_told_before_anybody_is_asked() {
    let played = Played::default();
    let api = start_with(&played);
    let long = format!("PUT /fleet/paused?name={}", "x".repeat(59));
    let drain = format!("PUT /fleet/paused?drain=quiet:{}2s", "0".repeat(33));
    let reason = format!("PUT /fleet/paused?reason={}", "x".repeat(101));
    for (line, part) in [
        ("PUT /fleet/paused?withot=a", "did you mean without?"),
        ("PUT /fleet/paused?without=a%20b", "The parameter \"without\": \"a b\" is not a name"),
        ("PUT /fleet/paused?name=lost", "is a pause of a host by itself; choose another"),
        ("PUT /fleet/paused?ttl=4s", "lasts for 5s at least"),
        ("PUT /fleet/paused?wait=1s&on-timeout=keep&while=connected", "use resume or kill"),
        ("PUT /fleet/paused?drain=2s", "quiet:2s"),
        (&long, "it has 59 bytes; a fleet takes 58 at most"),
        (&drain, "The parameter \"drain\": it has 41 bytes; a fleet takes 40 at most"),
        (&reason, "it has 101 bytes; a fleet takes 100 at most"),
        ("DELETE /fleet/paused", "The parameter \"name\": it is missing"),
        ("DELETE /fleet/paused?nme=a", "did you mean name?"),
        ("DELETE /fleet/hosts", "The parameter \"host\": it is missing"),
        ("DELETE /fleet/hosts?host=", "is not a name"),
    ] {
        let (status, body) = ask(&api, line);
        assert_eq!(status, 400, "{line}");
        let error = body["error"].as_str().unwrap();
        assert!(error.contains(part), "{line}: {error}");
    }
    assert_eq!(played.lock().done, Vec::<String>::new());
}

#[test]
fn a_refusal_has_a_status_a_kind_and_a_sentence() {
    let played = Played::default();
    let api = start_with(&played);
    for (kind, status, word) in [
        (RefusalKind::Taken, 409, "taken"),
        (RefusalKind::HasSession, 409, "has-session"),
        (RefusalKind::Unreachable, 503, "unreachable"),
        (RefusalKind::Full, 503, "full"),
        (RefusalKind::Denied, 502, "denied"),
        (RefusalKind::Unknown, 404, "unknown"),
    ] {
        let text = "It is so.".to_owned();
        played.lock().refusal = Some(Refusal { kind, text });
        for line in ["PUT /fleet/paused?while=connected", "DELETE /fleet/paused?name=a"] {
            let expected = json!({"error": "It is so.", "status": status, "kind": word});
            assert_eq!(ask(&api, line), (status, expected), "{line}");
        }
    }
    assert!(played.lock().waits.is_empty());
}

#[test]
fn a_wait_ends_as_its_caller_has_asked() {
    let played = Played::default();
    let api = start_with(&played);
    played.lock().begins = Some(WaitState::Busy);
    let hosts = json!([{"host": "web-17", "why": "lost for 40 s"}]);
    for (query, status, paused, done) in [
        ("wait=0s", 504, false, "end: it was not idle in time"),
        ("wait=0s&on-timeout=keep", 504, true, "pause default false"),
    ] {
        played.lock().done.clear();
        let (answered, body) = ask(&api, &format!("PUT /fleet/paused?{query}"));
        assert_eq!(answered, status, "{query}");
        assert_eq!((&body["waiting_for"], &body["paused"]), (&hosts, &json!(paused)), "{query}");
        played.await_done(done);
        let is_undone = played.lock().done.iter().any(|done| done.starts_with("end"));
        assert_eq!(is_undone, !paused, "{query}");
    }
    let (status, body) = ask(&api, "PUT /fleet/paused?wait=0s&on-timeout=kill");
    assert_eq!((status, &body["idle"]), (201, &json!(true)), "{body}");
    played.await_done("kill");
    // A pause that ends while it waits.
    let mut caller = api.send("PUT /fleet/paused?wait=1h HTTP/1.0\r\n\r\n");
    played.lock().done.clear();
    played.await_done("pause default false");
    played.set_waits(WaitState::Ended);
    assert_eq!(self::status(&answer(&mut caller)), 409);
}

#[test]
fn a_bound_pause_lasts_as_long_as_its_caller() {
    let played = Played::default();
    let api = start_with(&played);
    played.lock().begins = Some(WaitState::Busy);
    let request = "PUT /fleet/paused?while=connected&wait=1h HTTP/1.0\r\n\r\n";
    // It is ended with a caller that goes while it waits.
    drop(api.send(request));
    played.await_done("end: its caller has gone");
    played.lock().done.clear();

    let mut caller = api.send(request);
    played.await_done("pause default true");
    assert_eq!(played.lock().wanted.last().unwrap().ttl, Duration::from_secs(15));
    played.set_waits(WaitState::Idle);
    let mut lines = BufReader::new(caller.try_clone().unwrap()).lines().map(Result::unwrap);
    assert_eq!(lines.next().unwrap(), "HTTP/1.1 201 Created");
    let body = lines.by_ref().find(|line| line.starts_with('{')).unwrap();
    assert!(body.contains("\"idle\": true"), "{body}");
    caller.write_all(b"\n").unwrap();
    played.await_done("renew");
    for is_lost in [true, false, true] {
        played.change(|play| play.is_lost = is_lost);
        assert_eq!(lines.next().unwrap(), format!("{{\"lost\": {is_lost}}}"));
    }
    for (forced, told) in [(&["a"][..], "[\"a\"]"), (&["a", "c", "b"], "[\"c\",\"b\"]")] {
        played.change(|play| play.forced = forced.iter().map(ToString::to_string).collect());
        assert_eq!(lines.next().unwrap(), format!("{{\"forced\":{told}}}"));
    }
    // One that is over by now is not told.
    for seconds in [100.0, 0.0, 200.0] {
        let until = BootTime(boot_time() + Duration::from_secs_f64(seconds));
        played.change(|play| play.kept_until = Some(until));
        if seconds > 0.0 {
            let line: Value = serde_json::from_str(&lines.next().unwrap()).unwrap();
            let left = seconds - line["kept_seconds"].as_f64().unwrap();
            assert!((0.0..50.0).contains(&left), "{line}");
        }
    }
    caller.shutdown(Shutdown::Write).unwrap();
    played.await_done("end: its caller has gone");
    assert_eq!(lines.next().unwrap(), "{\"ended\":true,\"still_paused\":[\"web-17\"]}");
    assert_eq!(lines.next(), None);
}

#[test]
fn the_end_of_a_bound_pause_is_awaited() {
    let played = Played::default();
    let api = start_with(&played);
    played.lock().ends_late = true;
    let caller = api.send("PUT /fleet/paused?while=connected HTTP/1.0\r\n\r\n");
    let mut lines = BufReader::new(caller.try_clone().unwrap()).lines().map(Result::unwrap);
    assert!(lines.by_ref().any(|line| line.starts_with("{\"paused\": true")));
    caller.shutdown(Shutdown::Write).unwrap();
    played.await_done("end: its caller has gone");
    // Another caller is answered meanwhile, and this one once it is over.
    api.assert_answers("the end of a pause");
    played.set_waits(WaitState::Ended);
    assert!(lines.next().unwrap().starts_with("{\"ended\":true,"));
}

#[test]
fn a_bound_pause_ends_with_the_api() {
    let played = Played::default();
    let api = start_with(&played);
    let mut caller = api.send("PUT /fleet/paused?while=connected HTTP/1.0\r\n\r\n");
    caller.read_exact(&mut [0; 12]).unwrap();
    drop(api);
    played.await_done("end: tcpause is stopping");
}

#[test]
fn a_silent_fleet_keeps_nobody_from_a_pause_of_this_host() {
    let played = Played::default();
    let api = start_with(&played);
    // Whoever holds the lock plays an etcd that does not answer.
    let silent = played.lock();
    let mut caller = api.send("GET /fleet/status HTTP/1.0\r\n\r\n");
    for (line, expected) in [("PUT /paused", 201), ("GET /status", 200), ("DELETE /paused", 204)] {
        assert_eq!(ask(&api, line).0, expected, "{line}");
    }
    drop(silent);
    assert_eq!(status(&answer(&mut caller)), 200);
}

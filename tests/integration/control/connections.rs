//! The list of connections, and their end by an operator.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::monitor::monitor;
use crate::harness::{
    Addr, Control, End, Family, Proxy, Response, Stream, Upstream, echo, program, wait_until,
};

/// Clients of a list of many pages.
const CLIENTS: usize = 900;
/// Entries of a page of it.
const PAGE: usize = 10;

/// Sends a request whose answer is JSON.
#[track_caller]
fn json(response: &Response) -> Value {
    assert_eq!(response.status, 200, "{response}");
    serde_json::from_slice(&response.body).unwrap()
}

#[track_caller]
fn list(control: &Control, query: &str) -> Vec<Value> {
    let page = json(&control.get(&format!("/connections?{query}")));
    assert_eq!(page["next"], Value::Null, "{page}");
    page["connections"].as_array().unwrap().clone()
}

/// Returns the entry of a TCP client.
#[track_caller]
fn entry(proxy: &Proxy, client: &Stream) -> Value {
    let Stream::Tcp(tcp) = client else { panic!("no TCP client") };
    let name = format!("tcp://{}", tcp.local_addr().unwrap());
    let all = list(proxy.control(), "");
    let found = all.iter().find(|entry| entry["client"] == *name);
    found.unwrap_or_else(|| panic!("no {name} in {all:?}")).clone()
}

#[track_caller]
fn id(entry: &Value) -> String {
    entry["id"].as_str().unwrap().to_owned()
}

/// Connects so many clients, each of which is served.
#[track_caller]
fn served(proxy: &Proxy, count: usize) -> Vec<Stream> {
    let connect = || {
        let mut client = proxy.connect();
        client.assert_echo(b"hello");
        client
    };
    std::iter::repeat_with(connect).take(count).collect()
}

#[track_caller]
fn assert_reset(client: &mut Stream) {
    let begin = Instant::now();
    assert_eq!(client.receive_all().end, End::Reset);
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_connection_is_listed_with_all_that_is_known_of_it() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut active = proxy.connect();
    active.assert_echo(b"hello");
    proxy.control().pause();
    let held = proxy.connect_held();
    let entry_of_active = entry(&proxy, &active);
    let keys: Vec<&str> = entry_of_active.as_object().unwrap().keys().map(String::as_str).collect();
    let expected = [
        "age_seconds",
        "bytes_to_client",
        "bytes_to_upstream",
        "client",
        "half_closed",
        "held_seconds",
        "id",
        "idle_seconds",
        "owes",
        "state",
        "upstream",
    ];
    assert_eq!(keys, expected);
    assert_eq!(entry_of_active["state"], "active");
    assert_eq!(entry_of_active["upstream"], upstream.addr().to_string());
    assert_eq!(
        (&entry_of_active["bytes_to_upstream"], &entry_of_active["bytes_to_client"]),
        (&5.into(), &5.into())
    );
    assert_eq!(
        (&entry_of_active["half_closed"], &entry_of_active["held_seconds"]),
        (&false.into(), &Value::Null)
    );
    assert!(entry_of_active["idle_seconds"].as_f64() <= entry_of_active["age_seconds"].as_f64());
    let entry_of_held = entry(&proxy, &held);
    assert_eq!(
        (&entry_of_held["state"], &entry_of_held["upstream"]),
        (&"held".into(), &Value::Null)
    );
    assert!(entry_of_held["held_seconds"].is_number() && entry_of_held["idle_seconds"].is_null());
}

#[test]
fn unix_clients_are_named_by_their_process_and_unix_upstreams_by_their_path() {
    for family in [Family::Unix, Family::Abstract] {
        let upstream = Upstream::start(family, echo);
        let proxy = Proxy::builder().listen(family).upstream(&upstream).start();
        let mut client = proxy.connect();
        client.assert_echo(b"hello");
        let all = list(proxy.control(), &format!("upstream={}", upstream.addr()));
        let expected =
            format!("uid {}, pid {}", rustix::process::getuid().as_raw(), std::process::id());
        assert_eq!((all.len(), &all[0]["client"]), (1, &expected.into()));
        assert_eq!(all[0]["upstream"], upstream.addr().to_string());
        assert!(list(proxy.control(), "client=0.0.0.0/0").is_empty());
        assert!(list(proxy.control(), "upstream=unix:///no/such.sock").is_empty());
    }
}

/// Walks over all pages of so many entries. Returns the ids in their order, and calls `between` with each `next`.
#[track_caller]
fn walk(control: &Control, limit: usize, mut between: impl FnMut(&str)) -> Vec<String> {
    let (mut ids, mut after) = (Vec::new(), String::new());
    loop {
        let page = json(&control.get(&format!("/connections?limit={limit}{after}")));
        ids.extend(page["connections"].as_array().unwrap().iter().map(id));
        let Some(next) = page["next"].as_str() else { return ids };
        assert_eq!(ids.last().map(String::as_str), Some(next));
        between(next);
        after = format!("&after={next}");
    }
}

#[test]
fn pages_show_each_connection_once() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).args(["--proxy-threads", "3"]).start();
    let control = proxy.control();
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| proxy.connect()).collect();
    control.wait_counts(|status| status.active, CLIENTS as u64);
    let before = walk(control, 200, |_next| {});
    assert_eq!(before.len(), CLIENTS);
    let mut pages = 0;
    let shown = walk(control, PAGE, |next| {
        pages += 1;
        // Some come and go meanwhile, also the one behind which the next page begins.
        if pages % 9 == 0 {
            assert_eq!(control.delete(&format!("/connections/{next}")).status, 204);
            clients.push(proxy.connect());
        }
    });
    let set: BTreeSet<&String> = shown.iter().collect();
    assert_eq!(set.len(), shown.len(), "one is shown twice");
    assert!(before.iter().all(|id| set.contains(id)), "one is missed");
    assert!(shown.starts_with(&before), "not in one order");
    let page = json(&control.get("/connections?limit=200"));
    assert_eq!(page["total"].as_u64(), Some(CLIENTS as u64));
    let entries = page["connections"].as_array().unwrap();
    let ages: Vec<f64> = entries.iter().map(|it| it["age_seconds"].as_f64().unwrap()).collect();
    // A worker may have begun its turn a moment before another.
    assert!(ages.windows(2).all(|pair| pair[1] <= pair[0] + 0.5), "not oldest first: {ages:?}");
}

#[test]
fn a_kill_resets_one_and_leaves_the_others() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let (mut one, mut other) = (proxy.connect(), proxy.connect());
    one.assert_echo(b"one");
    other.assert_echo(b"other");
    let id = id(&entry(&proxy, &one));
    let path = format!("/connections/{id}");
    let begin = Instant::now();
    assert_eq!(proxy.control().delete(&path).status, 204);
    assert_reset(&mut one);
    println!("reset after {:?}", begin.elapsed());
    other.assert_echo(b"goes on");
    let gone = proxy.control().delete(&path).assert_error(404);
    assert!(gone.contains(&id), "{gone}");
    let status = proxy.control().status();
    assert_eq!((status.active, status.closed["killed-operator"], status.killed), (1, 1, 0));
    let metrics = proxy.control().get("/metrics");
    let line = r#"tcpause_closed_total{cause="killed-operator"} 1"#;
    assert!(metrics.text().contains(line), "{metrics}");
    let line = proxy.wait_for_log("cause=killed-operator");
    assert!(line.contains(&format!("connection {id} ")), "{line}");
    proxy.wait_for_log("has connections reset: 1");
}

#[test]
fn filters_choose_those_that_are_to_be_killed() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let control = proxy.control();
    let mut clients = served(&proxy, 3);
    for query in
        ["older=1h", "idle=1h", "state=held", "client=192.0.2.0/24", "upstream=localhost:1"]
    {
        let answer = control.delete(&format!("/connections?{query}"));
        assert_eq!((answer.status, answer.text()), (200, "{\"closed\": 0}\n"), "{query}");
        assert_eq!(json(&control.get(&format!("/connections?{query}")))["total"], 0);
    }
    for query in ["older=0s", "idle=0s", "state=active", "client=127.0.0.0/8"] {
        assert_eq!(list(control, query).len(), 3, "{query}");
    }
    let address = upstream.addr().to_string();
    assert_eq!(list(control, &format!("upstream={address}&state=active")).len(), 3);
    let refused = control.delete(&format!("/connections?upstream={address}&older=0s"));
    assert!(refused.assert_error(409).contains("nothing was ended"), "{refused}");
    assert_eq!(control.put("/upstream?addr=localhost:1&check=none").status, 200);
    let answer = control.delete(&format!("/connections?upstream={address}"));
    assert_eq!((answer.status, answer.text()), (200, "{\"closed\": 3}\n"));
    clients.iter_mut().for_each(assert_reset);
    control.wait_idle();
}

#[test]
fn held_clients_leave_the_line_and_a_pause_sees_idle() {
    for how in ["reset", "close"] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::to(&upstream);
        let mut active = proxy.connect();
        active.assert_echo(b"hello");
        thread::scope(|scope| {
            let pause = scope.spawn(|| proxy.control().put("/paused?wait=10s"));
            proxy.control().wait_status("it is paused", |status| status.paused);
            let mut held = proxy.connect_held();
            let killed = proxy.control().delete(&format!("/connections?state=held&how={how}"));
            assert_eq!(killed.text(), "{\"closed\": 1}\n");
            let expected = if how == "reset" { End::Reset } else { End::Eof };
            assert_eq!(held.receive_all().end, expected);
            proxy.control().wait_counts(|status| status.held, 0);
            let killed = proxy.control().delete(&format!("/connections?state=active&how={how}"));
            assert_eq!(killed.text(), "{\"closed\": 1}\n");
            assert_eq!(active.receive_all().end, expected);
            assert_eq!(pause.join().unwrap().status, 201);
        });
        drop(active);
        let closed = |status: &crate::harness::Status| status.closed["killed-operator"];
        proxy.control().wait_counts(closed, 2);
    }
}

#[test]
fn a_close_in_order_spares_no_stream_that_would_look_whole() {
    /// More than buffers hold.
    const BYTES: usize = 64 << 20;
    let upstream = Upstream::tcp(|mut stream: Stream| {
        drop(std::io::Write::write_all(&mut stream, &vec![7; BYTES]));
        stream.receive_all()
    });
    let proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    client.receive(1);
    proxy
        .control()
        .wait_status("bytes are on their way", |status| status.bytes_to_client > 1 << 16);
    let id = id(&entry(&proxy, &client));
    assert_eq!(proxy.control().delete(&format!("/connections/{id}?how=close")).status, 204);
    let received = client.receive_all();
    assert!(received.bytes.len() < BYTES && received.end == End::Reset, "{}", received.bytes.len());
}

#[test]
fn a_spread_takes_its_time_and_goes_on_behind_an_upgrade() {
    const SPREAD: Duration = Duration::from_secs(6);
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).args(["--proxy-threads", "2"]).start();
    let control = proxy.control();
    let mut clients = served(&proxy, 40);
    let begin = Instant::now();
    let answer = control.delete("/connections?state=active&spread=6s");
    assert_eq!(answer.text(), "{\"closed\": 40}\n");
    let mut late = proxy.connect();
    late.assert_echo(b"comes later");
    let in_midst = control.wait_status("some have ended", |status| status.active < 38);
    assert!(in_midst.active > 1, "all have ended at once");
    proxy.upgrade();
    control.wait_counts(|status| status.active, 1);
    // The last of them is due shortly before the end.
    assert!(begin.elapsed() > SPREAD / 2, "{:?}", begin.elapsed());
    clients.iter_mut().for_each(assert_reset);
    late.assert_echo(b"goes on");
}

#[test]
fn ids_never_repeat_over_upgrades() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).args(["--proxy-threads", "2"]).start();
    let mut seen = BTreeSet::new();
    let mut lasting = Vec::new();
    for _round in 0..3 {
        for _client in 0..10 {
            let mut client = proxy.connect();
            client.assert_echo(b"hello");
            lasting.push(client);
        }
        let ids: BTreeSet<String> = list(proxy.control(), "").iter().map(id).collect();
        assert_eq!(ids.len(), lasting.len());
        // Those of the rounds before are the same as before.
        assert!(ids.is_superset(&seen), "{seen:?} {ids:?}");
        seen = ids;
        proxy.upgrade();
    }
    let ids: BTreeSet<String> = list(proxy.control(), "").iter().map(id).collect();
    assert_eq!(ids, seen);
}

#[test]
fn what_is_wrong_is_named_with_the_remedy() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    let control = proxy.control();
    for (method, target, status, sentence) in [
        (
            "GET",
            "?client=10.0.0/8",
            400,
            r#"The parameter "client": "10.0.0/8" is no network; write 10.0.0.0/8."#,
        ),
        (
            "GET",
            "?older=5",
            400,
            r#"The parameter "older": "5" ends without a unit; did you mean `5s`?"#,
        ),
        (
            "GET",
            "?limit=201",
            400,
            r#"The parameter "limit": "201" is no size of a page; write a number from 1 to 200."#,
        ),
        (
            "GET",
            "?after=7",
            400,
            r#"The parameter "after": "7" is no id of a connection; write one such as 1.48213."#,
        ),
        ("DELETE", "", 400, "Say which: add a filter, or all=true."),
        (
            "DELETE",
            "?older=5",
            400,
            r#"The parameter "older": "5" ends without a unit; did you mean `5s`?"#,
        ),
        (
            "DELETE",
            "/7",
            400,
            r#""7" is no id of a connection; write one such as 1.48213, as GET /connections shows it."#,
        ),
        ("DELETE", "/9.999", 404, "There is no connection 9.999 (any more)."),
        ("PUT", "", 405, "This path does not know the method: it knows GET, HEAD, DELETE."),
        ("GET", "/1.1", 405, "This path does not know the method: it knows DELETE."),
    ] {
        let answer = control.request(method, &format!("/connections{target}"), &[]);
        assert_eq!(answer.assert_error(status), sentence, "{method} {target}");
    }
    client.assert_echo(b"is still there");
}

#[test]
fn the_monitor_shows_and_ends_no_connection() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).arg("--monitor-addr=127.0.0.1:0").start();
    let monitor = monitor(&proxy);
    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    monitor.get("/connections").assert_error(404);
    monitor.delete("/connections?all=true").assert_error(405);
    monitor.delete("/connections/0.1").assert_error(405);
    client.assert_echo(b"is still there");
}

#[test]
fn lists_under_load_cost_no_client() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).args(["--proxy-threads", "2"]).start();
    let control = proxy.control();
    let lasting: Vec<_> = (0..300).map(|_| proxy.connect()).collect();
    control.wait_counts(|status| status.active, 300);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    proxy.connect().assert_echo(b"short");
                }
            });
        }
        for _ in 0..50 {
            let page = json(&control.get("/connections?limit=200&older=0s"));
            assert_eq!(page["connections"].as_array().unwrap().len(), 200);
        }
    });
    drop(lasting);
    assert_eq!(control.status().failed, 0);
}

#[test]
fn a_stop_still_lists_and_kills() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).grace_period(Some("1m")).start();
    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    proxy.terminate();
    proxy.wait_for_log("stopping");
    assert_eq!(list(proxy.control(), "").len(), 1);
    assert_eq!(proxy.control().delete("/connections?all=true").text(), "{\"closed\": 1}\n");
    assert_reset(&mut client);
    assert_eq!(proxy.finish().code, 0);
}

#[test]
fn the_commands_list_and_kill() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let run = |arguments: &[&str]| {
        let addr: &Addr = proxy.control().addr();
        program().args(arguments).arg("--control-addr").arg(addr.to_string()).run()
    };
    let clients = served(&proxy, 5);
    let listed = run(&["connections", "--state", "active", "--client", "127.0.0.0/8", "--limit=3"]);
    let lines: Vec<&str> = listed.stdout.lines().collect();
    assert!(lines[0].starts_with("ID ") && lines.len() == 5 && lines[4] == "3 of 5", "{listed:?}");
    let page: Value = serde_json::from_str(&run(&["connections", "--json"]).stdout).unwrap();
    let ids: Vec<String> = page["connections"].as_array().unwrap().iter().map(id).collect();
    assert_eq!(ids.len(), 5);
    let killed = run(&["kill", &ids[0], &ids[1]]);
    assert_eq!((killed.code, &*killed.stdout), (0, "killed: 2\n"), "{killed:?}");
    let again = run(&["kill", &ids[0], "--how=close"]);
    assert_eq!(
        (again.code, &*again.stderr),
        (75, "tcpause: there is no such connection"),
        "{again:?}"
    );
    let none = run(&["kill", "--older=1h"]);
    assert_eq!(
        (none.code, &*none.stderr),
        (75, "tcpause: there is no such connection"),
        "{none:?}"
    );
    for (arguments, told) in [
        (
            &["kill"][..],
            "kill: say which: add ids, an option such as --client or --older, or --all",
        ),
        (&["kill", "x"], "\"x\" is no id of a connection; write one such as 1.48213"),
        (
            &["kill", "1.1", "--all"],
            "kill: ids go with --how alone; leave out either the ids or the other options",
        ),
        (&["kill", "--client=10.0.0/8"], "--client: \"10.0.0/8\" is no network; write 10.0.0.0/8"),
        (&["kill", "--older=5"], "--older: \"5\" ends without a unit; did you mean `5s`?"),
        (
            &["connections", "--state=hold"],
            "--state: \"hold\" is not known; write held, connecting, active or rejecting; did you mean held?",
        ),
    ] {
        let refused = run(arguments);
        assert_eq!(
            (refused.code, &*refused.stderr),
            (2, &*format!("tcpause: {told}")),
            "{arguments:?}"
        );
    }
    let killed = run(&["kill", "--all", "--how=close"]);
    assert_eq!((killed.code, &*killed.stdout), (0, "killed: 3\n"), "{killed:?}");
    wait_until("they have gone", || run(&["connections"]).stdout.lines().count() == 1);
    drop(clients);
}

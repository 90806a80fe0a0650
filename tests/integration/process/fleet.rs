//! The commands for a fleet: before a proxy that is in none, and before an API that is played by the test.

use serde_json::json;

use super::client::{answering, assert_done, assert_failed, proxy, run};
use crate::{
    harness::{Addr, Control, End, Finished, Proxy, Received, Stream, Upstream, echo, program},
    process::exec::Exec,
};

/// Returns an answer of the API with this body.
fn answer(status: &str, body: &serde_json::Value) -> &'static str {
    let body = format!("{body}\n");
    format!("HTTP/1.1 {status} x\r\nContent-Length: {}\r\n\r\n{body}", body.len()).leak()
}

#[test]
fn a_proxy_without_endpoints_is_in_no_fleet() {
    let (_upstream, proxy) = proxy();
    let addr = proxy.control().addr();
    let told = "this proxy is in no fleet: fleet.endpoints makes it a member of one";
    for arguments in [
        &["pause", "--fleet"][..],
        &["resume", "--fleet", "deploy"],
        &["status", "--fleet"],
        &["fleet", "forget", "web-17"],
        &["exec", "--fleet", "--", "echo", "ran"],
    ] {
        assert_failed(&run_before(addr, arguments), 2, told);
    }
    for (method, target) in [
        ("PUT", "/fleet/paused"),
        ("DELETE", "/fleet/paused?name=a"),
        ("GET", "/fleet/status"),
        ("DELETE", "/fleet/hosts?host=a"),
    ] {
        assert_eq!(proxy.control().request(method, target, &[]).status, 404, "{target}");
    }
    assert!(!proxy.control().is_paused());
    assert!(proxy.threads_named("control-fleet").is_empty(), "a thread of no use");
}

#[test]
fn settings_of_a_fleet_without_endpoints_are_warned_of() {
    let upstream = Upstream::tcp(echo);
    let builder = Proxy::builder().upstream(&upstream);
    let proxy = builder.arg("--fleet-name=shop").start();
    let line = proxy.wait_for_log("fleet.endpoints is not set, so that no other setting of fleet");
    assert!(line.contains("WARN"), "{line}");
    proxy.connect().assert_echo(b"served");
    assert_eq!(proxy.control().get("/fleet/status").status, 404);
}

/// Runs a command whose arguments end with the program of `exec`.
#[track_caller]
fn run_before(addr: &Addr, arguments: &[&str]) -> Finished {
    let (word, rest) = arguments.split_first().unwrap();
    let control = format!("--control-addr={addr}");
    program().arg(word).arg(control).args(rest).run()
}

#[test]
fn options_of_a_fleet_go_together() {
    let (_upstream, proxy) = proxy();
    let addr = proxy.control().addr();
    for (arguments, told) in [
        (
            &["pause", "--without", "a"][..],
            "--without: it leaves out hosts of a fleet: add --fleet",
        ),
        (&["exec", "--without", "a", "true"], "--without: it leaves out hosts of a fleet"),
        (&["resume", "--fleet"], "resume: name the pause, as status --fleet shows it"),
        (&["resume", "--fleet", "a", "--name", "a"], "resume: the name is given twice"),
        (&["resume", "--fleet", "a", "--release", "1"], "--release: it lets clients of one host"),
    ] {
        assert_failed(&run_before(addr, arguments), 2, told);
    }
    assert!(!proxy.control().is_paused());
}

#[test]
fn a_refusal_ends_with_the_code_of_its_kind() {
    let body =
        |status: u16, kind: &str| json!({"error": "It is so.", "status": status, "kind": kind});
    for (status, kind, code) in [
        ("503", "unreachable", 69),
        ("409", "taken", 75),
        ("503", "full", 75),
        ("409", "has-session", 75),
        ("404", "unknown", 75),
        ("502", "denied", 1),
    ] {
        let api = answering(answer(status, &body(status.parse().unwrap(), kind)));
        for arguments in
            [&["pause", "--fleet"][..], &["fleet", "forget", "a"], &["status", "--fleet"]]
        {
            assert_failed(&run_before(api.addr(), arguments), code, "it is so");
        }
        let exec = run_before(api.addr(), &["exec", "--fleet", "--", "echo", "ran"]);
        assert_failed(&exec, code, "it is so");
    }
}

#[test]
fn hosts_that_are_not_idle_are_named() {
    let body = json!({
        "error": "The time is up: not all hosts are idle. The pause is undone.", "status": 504, "paused": false,
        "waiting_for": [
            {"host": "web-17", "why": "lost for 40 s"},
            {"host": "web-3", "why": "carries 3, the oldest for 12 s"},
        ],
    });
    let api = answering(answer("504", &body));
    let told = "not idle in time, hosts left: 2 (web-17: lost for 40 s; web-3: carries 3, the oldest for 12 s); the pause is undone; see --wait, --on-timeout kill, --without and fleet forget";
    let pause = ["pause", "--fleet", "--wait=1s", "--name=a", "--without=b,c"];
    assert_failed(&run(api.addr(), &pause), 75, told);
    let asked = String::from_utf8(api.received().bytes).unwrap();
    assert!(
        asked.starts_with("PUT /fleet/paused?name=a&wait=1s&without=b%2Cc HTTP/1.1\r\n"),
        "{asked}"
    );
    let exec = run_before(api.addr(), &["exec", "--fleet", "--", "echo", "ran"]);
    assert_failed(&exec, 75, &format!("{told}; the command was not run"));
}

#[test]
fn the_hosts_are_a_table() {
    let body = json!({
        "name": "shop", "pauses": [{"name": "deploy", "by": "uid 0 on web-1", "has_holder": true}],
        "hosts": [
            {"host": "web-17", "state": "lost", "why": "lost for 40 s", "age_seconds": 40.0},
            {"host": "web-1", "state": "idle", "held": 7, "active": 0, "on_disconnect": "serve"},
        ],
    });
    let api = answering(answer("200", &body));
    let table = "\
fleet   shop
pause   deploy by uid 0 on web-1
hosts   2, those that block a pause are marked: 1

  HOST    STATE  HELD  ACTIVE  OLDEST  NEWS  POLICY  VERSION
! web-17  lost   -     -       -       40s   -       -
  web-1   idle   7     0       -       -     serve   -
";
    assert_done(api.addr(), &["status", "--fleet"], table);
    let raw = run(api.addr(), &["status", "--fleet", "--json"]);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&raw.stdout).unwrap(), body);
    let told = "there is no pause \"other\" of the fleet; these hold: deploy";
    assert_failed(&run(api.addr(), &["resume", "--fleet", "other"]), 75, told);
}

#[test]
fn done_is_told_in_one_line() {
    let idle = json!({"paused": true, "idle": true, "waited_seconds": 0.25, "reset": 0});
    let api = answering(answer("201", &idle));
    let told = "paused: a on all hosts, for 5m, idle after 0.2s\n";
    assert_done(api.addr(), &["pause", "--fleet", "--name=a", "--ttl=5m", "--wait=1s"], told);
    assert_done(
        api.addr(),
        &["pause", "--fleet"],
        "paused: default on all hosts, for 10m at most, idle after 0.2s\n",
    );
    let api = answering("HTTP/1.1 204 No Content\r\n\r\n");
    assert_done(api.addr(), &["fleet", "forget", "web-17"], "forgotten: web-17\n");
    let asked = String::from_utf8(api.received().bytes).unwrap();
    assert!(asked.starts_with("DELETE /fleet/hosts?host=web-17 HTTP/1.1\r\n"), "{asked}");
}

/// Plays an API whose pause of the fleet begins, has a piece of news at each renewal, and lasts to the end of its caller.
fn losing(lines: &'static [&'static str]) -> Upstream {
    Upstream::tcp(move |mut stream: Stream| {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.extend(stream.receive(1));
        }
        if request.starts_with(b"PUT") {
            stream.send(b"HTTP/1.1 201 Created\r\n\r\n{\"paused\": true, \"idle\": true, \"waited_seconds\": 0.1, \"reset\": 0}\n");
            for line in lines {
                // A renewal.
                stream.receive(1);
                stream.send(line.as_bytes());
            }
            stream.receive_all();
            stream.send(b"{\"ended\":true,\"still_paused\":[\"web-3\"]}\n");
        } else {
            stream.send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
        }
        Received { bytes: request, end: End::Eof }
    })
}

#[test]
fn a_command_goes_on_when_its_pause_is_lost_unless_it_is_to_be_killed() {
    const LOST: &[&str] = &["{\"lost\": tr", "ue}\n{\"lost\": false}\n"];
    let told = "it is not certain any more that all hosts are paused, as the pause cannot be renewed in etcd; the command";
    let begin = |choice: &str, api: &Upstream| {
        let control = Control::new(api.addr().clone());
        let command = ["--", "sh", "-c", "echo started; read ended; exit 7"];
        let mut exec =
            Exec::start(&control, [&["--fleet", "--ttl=5s", choice][..], &command].concat());
        exec.wait_started();
        exec
    };
    let api = losing(LOST);
    let mut kept = begin("--if-lost=keep", &api);
    kept.wait_told(&format!("{told} goes on"));
    kept.wait_told("all hosts are paused, as the pause is renewed in etcd again");
    kept.end();
    assert_eq!(kept.code(), 7);
    kept.wait_told("hosts that have not resumed yet: web-3");

    let forced: &[&str] = &["{\"forced\":[\"web-3\",\"web-4\"]}\n"];
    let mut forced = begin("--if-lost=kill", &losing(forced));
    forced.wait_told(
        "an operator has resumed hosts by force: web-3, web-4; the command is sent SIGTERM",
    );
    assert_eq!(forced.code(), 128 + 15);

    let mut silent = begin(
        "--if-lost=keep",
        &losing(&["{\"kept_seconds\": 0.1}\n", "{\"kept_seconds\": 60}\n"]),
    );
    silent.wait_told("it is not certain any more that all hosts are paused, as the proxy does not answer; the command goes on");
    silent.wait_told("all hosts are paused, as the proxy answers again");
    silent.end();
    assert_eq!(silent.code(), 7);

    let api = losing(LOST);
    let mut killed = begin("--if-lost=kill", &api);
    killed.wait_told(&format!("{told} is sent SIGTERM"));
    assert_eq!(killed.code(), 128 + 15);
    let asked = String::from_utf8(api.received().bytes).unwrap();
    assert!(asked.starts_with("PUT /fleet/paused?while=connected&name=exec-"), "{asked}");
    assert!(asked.contains("&ttl=5s&"), "{asked}");
}

#[test]
fn a_command_of_one_host_is_killed_with_its_pause_if_that_was_asked_for() {
    let (_upstream, proxy) = proxy();
    let mut exec = Exec::running(proxy.control(), &["--if-lost=kill"]);
    assert_eq!(proxy.control().delete("/paused").status, 204);
    exec.wait_told("the pause has ended before the command: it was lifted, or not renewed in time; the command is sent SIGTERM");
    assert_eq!(exec.code(), 128 + 15);
}

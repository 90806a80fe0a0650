//! The commands that ask a running proxy: what they do, print and end with.

use serde_json::json;

use crate::harness::{
    Addr, COMMANDS, End, Family, Finished, Proxy, Received, Upstream, echo, program, reserve,
};

/// Runs a command against the API at `control`.
#[track_caller]
pub(super) fn run(control: &Addr, arguments: &[&str]) -> Finished {
    program().args(arguments).arg("--control-addr").arg(control.to_string()).run()
}

#[track_caller]
pub(super) fn assert_done(control: &Addr, arguments: &[&str], printed: &str) {
    let finished = run(control, arguments);
    assert_eq!((finished.code, &*finished.stderr), (0, ""), "{arguments:?}");
    assert_eq!(finished.stdout, printed, "{arguments:?}");
}

/// Nothing on standard output, and one line with `told` in it on standard error.
#[track_caller]
pub(super) fn assert_failed(finished: &Finished, code: i32, told: &str) {
    assert_eq!((finished.code, &*finished.stdout), (code, ""), "{finished:?}");
    let line = finished.stderr.strip_prefix("tcpause: ");
    assert!(line.is_some_and(|line| !line.starts_with(char::is_uppercase)), "{finished:?}");
    assert!(!finished.stderr.contains(". ") && !finished.stderr.ends_with('.'), "{finished:?}");
    assert!(finished.stderr.contains(told), "no {told:?} in {finished:?}");
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
}

pub(super) fn proxy() -> (Upstream, Proxy) {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    (upstream, proxy)
}

/// An API that gives this answer to each request.
pub(super) fn answering(answer: &'static str) -> Upstream {
    Upstream::tcp(move |mut stream| {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.extend(stream.receive(1));
        }
        stream.send(answer.as_bytes());
        Received { bytes: request, end: End::Eof }
    })
}

#[test]
fn pause_wait_and_resume_work_on_every_kind_of_address() {
    for family in [Family::Tcp4, Family::Tcp6, Family::Unix, Family::Abstract] {
        if !family.is_available() {
            println!("skipped: there is no IPv6 on this machine");
            continue;
        }
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().upstream(&upstream).control(family).start();
        let addr = proxy.control().addr();
        assert_done(addr, &["pause"], "paused: default, until a resume\n");
        assert!(proxy.control().is_paused());
        let mut held = proxy.connect_held();
        assert_done(addr, &["wait"], "idle\n");
        assert_done(addr, &["resume"], "resumed\n");
        assert!(!proxy.control().is_paused());
        held.assert_echo(b"served");
    }
}

#[test]
fn pause_hands_on_what_it_is_given() {
    let (_upstream, proxy) = proxy();
    let addr = proxy.control().addr();
    let pause = [
        "pause",
        "--name",
        "ä & b=1",
        "--reason",
        "100% \"new\" +1",
        "--ttl",
        "1h",
        "--mode",
        "reject",
        "--drain",
        "quiet:1h",
        "--half-closed",
        "drop",
    ];
    assert_done(addr, &pause, "paused: ä & b=1, for 1h\n");
    let status: serde_json::Value =
        serde_json::from_slice(&proxy.control().get("/status").body).unwrap();
    let lease = &status["leases"][0];
    assert_eq!(
        [&lease["name"], &lease["reason"], &lease["mode"], &lease["drain_quiet_seconds"]],
        [&json!("ä & b=1"), &json!("100% \"new\" +1"), &json!("reject"), &json!(3600.0)]
    );
    assert_eq!(lease["half_closed"], json!("drop"));
    let shown = run(addr, &["status"]);
    for part in [
        "state       paused ",
        "ä & b=1 (100% \"new\" +1) by 127.0.0.1:",
        ": reject, ends in 59m59s, drains what is quiet for 1h, drops half-closed clients\n",
    ] {
        assert!(shown.stdout.contains(part), "no {part:?} in {}", shown.stdout);
    }
    assert_done(addr, &["pause", "--name", "b"], "paused: b, until a resume\n");
    assert_done(addr, &["resume", "--name", "ä & b=1"], "lifted: ä & b=1; still paused by b\n");
    assert!(proxy.control().is_paused());
    assert_done(addr, &["resume", "--name", "b"], "lifted: b\n");
    assert!(!proxy.control().is_paused());
}

#[test]
fn a_pause_that_does_not_hold_is_not_lifted() {
    let (_upstream, proxy) = proxy();
    let addr = proxy.control().addr();
    let wrong = ["resume", "--name", "deploi"];
    assert_failed(&run(addr, &wrong), 75, "there is no pause \"deploi\"; it is not paused");
    for name in ["deploy", "backup"] {
        assert_eq!(proxy.control().put(&format!("/paused?name={name}")).status, 201);
    }
    let told = "there is no pause \"deploi\"; these hold: deploy, backup";
    assert_failed(&run(addr, &wrong), 75, told);
    assert_eq!(proxy.control().status().leases.len(), 2);
    assert_done(addr, &["resume", "--force"], "resumed\n");
    assert!(!proxy.control().is_paused());
}

#[test]
fn a_pause_tells_when_the_proxy_ends_it() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).arg("--pause-max-ttl=1h").start();
    assert_done(proxy.control().addr(), &["pause"], "paused: default, for 1h\n");
}

#[test]
fn a_wait_in_vain_is_75() {
    let (_upstream, proxy) = proxy();
    let addr = proxy.control().addr();
    let mut client = proxy.connect();
    client.assert_echo(b"carried");
    let wait = run(addr, &["wait", "--timeout=50ms"]);
    assert_failed(&wait, 75, "not idle in time, connections left: 1 (tcp://127.0.0.1:");
    assert!(wait.stderr.ends_with(')'), "{wait:?}");
    let undone = run(addr, &["pause", "--wait=50ms"]);
    assert_failed(&undone, 75, "; the pause is undone; see --wait, --drain and --on-timeout kill");
    assert_failed(&undone, 75, "not idle in time, connections left: 1 (tcp://127.0.0.1:");
    assert!(!proxy.control().is_paused());
    let keep = run(addr, &["pause", "--wait=50ms", "--on-timeout=keep"]);
    assert_failed(&keep, 75, "; it stays paused; see --wait");
    assert!(proxy.control().is_paused());
    client.assert_echo(b"still carried");
    let killed = run(addr, &["pause", "--wait=50ms", "--on-timeout=kill"]);
    assert_eq!(killed.code, 0, "{killed:?}");
    assert!(
        killed.stdout.starts_with("paused: default, until a resume, idle after 0."),
        "{killed:?}"
    );
    assert!(killed.stdout.ends_with("s, connections reset: 1\n"), "{killed:?}");
    assert_eq!(client.receive_all().end, End::Reset);
}

#[test]
fn a_wait_in_vain_names_the_oldest_connections() {
    const BODY: &str = r#"{"error": "The time is up: connections are still carried or dialled for. The pause is undone.", "status": 504, "active": 9, "oldest_seconds": 31.2, "paused": false, "oldest": ["tcp://10.0.0.7:51544 for 31s, idle 4s", "tcp://10.0.0.8:1 for 2s, idle 0s"]}
"#;

    let answer = format!("HTTP/1.1 504 T\r\nContent-Length: {}\r\n\r\n{BODY}", BODY.len());
    let api = answering(answer.leak());
    let told = "tcpause: not idle in time, connections left: 9 (the oldest: tcp://10.0.0.7:51544 for 31s, idle 4s; \
                tcp://10.0.0.8:1 for 2s, idle 0s); the pause is undone; see --wait, --drain and --on-timeout kill";
    let pause = run(api.addr(), &["pause", "--wait=1s"]);
    assert_eq!((pause.code, &*pause.stdout, &*pause.stderr), (75, "", told));
    let exec = program().args(["exec", "--wait=1s", "--control-addr"]).arg(api.addr().to_string());
    let exec = exec.args(["--", "true"]).run();
    let told = format!("{told}; the command was not run");
    assert_eq!((exec.code, &*exec.stdout, &*exec.stderr), (75, "", &*told));
}

#[test]
fn an_upgrade_is_told_in_one_line() {
    const DONE: &str = "HTTP/1.1 200 OK\r\nContent-Length: 79\r\n\r\n{\"version\": \"0.1.0\", \"pid\": 1234, \"connections\": 9000, \"stall_seconds\": 0.035}\n";
    const FAILED: &str = "HTTP/1.1 409 Conflict\r\n\r\n{\"error\": \"The new process has died: see its log.\", \"status\": 409}\n";
    const STOPPING: &str =
        "HTTP/1.1 503 No\r\n\r\n{\"error\": \"tcpause is stopping.\", \"status\": 503}\n";

    for command in ["upgrade", "reload"] {
        let done = answering(DONE);
        let told = "upgraded to 0.1.0, pid 1234: 9000 connections moved, stalled for 35.0ms\n";
        assert_done(done.addr(), &[command], told);
        assert!(done.received().bytes.starts_with(b"POST /upgrade HTTP/1.1\r\n"));
        let (failed, stopping) = (answering(FAILED), answering(STOPPING));
        let told = "the new process has died: see its log";
        assert_failed(&run(failed.addr(), &[command]), 1, told);
        assert_failed(&run(stopping.addr(), &[command]), 75, "tcpause is stopping");
    }
}

#[test]
fn resume_releases_so_many() {
    let (_upstream, proxy) = proxy();
    let addr = proxy.control().addr();
    let told = "tcpause: it is not paused: there is nobody to let through";
    assert_failed(&run(addr, &["resume", "--release", "1"]), 75, told);
    proxy.control().pause();
    let mut held: Vec<_> = (0..3).map(|_| proxy.connect_held()).collect();
    assert_done(addr, &["resume", "--release", "2"], "released: 2\n");
    held[0].assert_echo(b"served");
    held[1].assert_echo(b"served");
    assert_eq!((proxy.control().status().held, proxy.control().is_paused()), (1, true));
}

#[test]
fn what_the_api_refuses_is_2_and_names_the_option() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).arg("--pause-max-ttl=1h").start();
    let addr = proxy.control().addr();
    let long = "n".repeat(65);
    for (arguments, told) in [
        (&["pause", "--name", &long][..], "--name: it has 65 bytes; at most 64 are taken"),
        (&["pause", "--drain", "2s"], "--drain: \"2s\" is not known; write quiet: and a time"),
        (
            &["pause", "--drain", "quiet:2"],
            "--drain: \"2\" ends without a unit; did you mean `2s`?",
        ),
        (&["pause", "--on-timeout", "keep"], "--on-timeout: it says how --wait ends: add one"),
        (&["pause", "--ttl", "0s"], "--ttl: a pause lasts for more than 0s"),
        (
            &["pause", "--ttl", "2h"],
            "--ttl: 2h is more than pause.max-ttl allows; write 1h at most",
        ),
        (&["resume", "--name", "a", "--release", "1"], "--release: it lets clients through"),
        (&["resume", "--force", "--release", "1"], "--release: it lets clients through"),
        (&["pause", "--name", "fleet/a"], "--name: names that begin with fleet/ are"),
        (&["exec", "--drain", "2s", "--", "true"], "--drain: \"2s\" is not known"),
    ] {
        let mut arguments = arguments.to_vec();
        let addr = format!("--control-addr={addr}");
        arguments.insert(1, &addr);
        assert_failed(&program().args(arguments).run(), 2, &format!("tcpause: {told}"));
    }
    assert!(!proxy.control().is_paused());
}

#[test]
fn an_api_that_cannot_be_reached_is_69() {
    let reserved = reserve();
    let nowhere = program().path("control.sock");
    for (addr, told) in [
        (reserved.addr(), "Connection refused"),
        (Addr::Unix(nowhere), "No such file"),
        (Addr::Abstract("tcpause-tests-nobody".to_owned()), "Connection refused"),
    ] {
        for arguments in [&["pause"][..], &["resume"], &["status"], &["wait"]] {
            let finished = run(&addr, arguments);
            assert_failed(&finished, 69, told);
            assert!(finished.stderr.contains(&format!("cannot reach the control API at {addr}")));
            assert!(finished.stderr.contains("name its address with --control-addr"));
        }
    }
}

/// The file is about to be read anew, and the proxy still listens where it did.
#[test]
fn an_upgrade_in_vain_tells_how_to_name_the_old_address() {
    const REMEDY: &str =
        "where control.addr has changed since the start, --control-addr takes the old one";

    let reserved = reserve();
    let text = format!("control: {{addr: '{}'}}", reserved.addr());
    let finished = program().file("tcpause.yml", text).args(["upgrade"]).run();
    assert_failed(&finished, 69, REMEDY);
    let finished = run(&reserved.addr(), &["upgrade"]);
    assert_failed(&finished, 69, "Connection refused");
    assert!(!finished.stderr.contains(REMEDY), "{finished:?}");
}

#[test]
fn what_is_no_api_is_told() {
    const ODD: &str = "(it answered 404); is it the proxy's own address?";

    for (answer, code, told) in [
        (
            "",
            69,
            "gives no answer; see whether the proxy still runs, or whether this is its address",
        ),
        (
            "SSH-2.0-OpenSSH_9.2\r\n",
            69,
            "(it sent what is no HTTP); is it the proxy's own address?",
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", 69, "(it sent an answer that is cut)"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", 69, "(it answered 200); is it"),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
            1,
            "the status cannot be read: missing field",
        ),
        ("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", 69, ODD),
        ("HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\n<p/>", 69, ODD),
        (
            "HTTP/1.1 500 No\r\nContent-Length: 17\r\n\r\n{\"error\": \"\x1b[1m\"}",
            69,
            "answered 500",
        ),
    ] {
        let api = answering(answer);
        assert_failed(&run(api.addr(), &["status"]), code, told);
    }
    let api = answering("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    let whole = format!("{} is not the control API of a tcpause {ODD}", api.addr());
    for arguments in [&["pause"][..], &["resume"], &["resume", "--name=a"], &["wait"]] {
        assert_failed(&run(api.addr(), arguments), 69, &whole);
    }
    // That of the proxy, whose server echoes what it is asked.
    let (_upstream, proxy) = proxy();
    assert_failed(&run(proxy.addr(), &["status"]), 69, "is it the proxy's own address?");
}

/// The original pauses whatever the parameters say. What needs its server idle must not begin.
#[test]
fn a_pause_that_has_not_waited_is_told() {
    let api = answering("HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n");
    let control = format!("--control-addr={}", api.addr());
    for arguments in [&["pause", &control, "--wait=1s"][..], &["exec", &control, "echo", "ran"]] {
        let finished = program().args(arguments).run();
        assert_failed(&finished, 1, "lift that with tcpause resume");
    }
}

#[test]
fn the_api_is_that_of_the_option_or_of_the_file() {
    let (_upstream, proxy) = proxy();
    let addr = proxy.control().addr();
    // What a proxy would refuse to start with is of no interest to those who ask it.
    let file = format!(
        "unknown: 1\nproxy: {{addr: nowhere, tls: {{cert: /nonexistent}}}}\ncontrol: {{addr: '{addr}', mode: 1}}\n"
    );
    let done = program().file("tcpause.yml", &file).arg("pause").run();
    assert_eq!((done.code, &*done.stderr), (0, ""));
    let named = program().file("other.yml", &file).args(["-c", "other.yml", "resume"]).run();
    assert_eq!((named.code, &*named.stdout), (0, "resumed\n"));
    // The option beats the file, whatever state that is in.
    let option = format!("--control-addr={addr}");
    let beaten = program().file("tcpause.yml", "{").args(["wait", &option]).run();
    assert_eq!((beaten.code, &*beaten.stdout), (0, "idle\n"));
    for (file, told) in [
        ("{", "tcpause.yml: "),
        ("control: {addr: 3001}", "tcpause.yml: control.addr: \"3001\" is only a number"),
        ("control: {addr: [a]}", "tcpause.yml: control.addr is not an address"),
        ("control: {addr: 'localhost:0'}", "has port 0; write the port that the proxy has logged"),
    ] {
        assert_failed(&program().file("tcpause.yml", file).arg("wait").run(), 2, told);
    }
    let missing = program().args(["-c", "nowhere.yml", "wait"]).run();
    assert_failed(&missing, 2, "nowhere.yml: cannot read the configuration: No such file");
    let wrong = program().args(["wait", "--control-addr=localhost"]).run();
    assert_failed(&wrong, 2, "--control-addr: \"localhost\" lacks a port");
}

#[test]
fn each_command_has_a_help_of_its_own() {
    for (command, usage) in [("demo", "demo"), ("man", "man"), ("completion", "completion SHELL")] {
        let help = program().args(["help", command]).run();
        assert_eq!((help.code, help.stdout.lines().count()), (0, 2), "{help:?}");
        assert!(help.stdout.ends_with(&format!("Usage: tcpause {usage}\n")), "{help:?}");
        assert_eq!(program().args([command, "--help"]).run().stdout, help.stdout);
    }
    for command in COMMANDS {
        let help = program().args(["help", command]).run();
        assert_eq!((help.code, &*help.stderr), (0, ""));
        assert!(help.stdout.contains(&format!("Usage: tcpause {command} [OPTIONS]")), "{help:?}");
        assert!(!help.stdout.contains("--proxy-addr"), "{help:?}");
        let same = program().args([command, "--help"]).run();
        assert_eq!(same.stdout, help.stdout);
    }
}

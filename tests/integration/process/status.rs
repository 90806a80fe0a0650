//! `tcpause status`: the table, and `--watch` at a terminal, in a pipe and as JSON.

use std::{
    fs,
    io::{BufRead, BufReader, Write as _},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
};

use rustix::process::{Pid, Signal, kill_process};

use super::client::{answering, assert_done, proxy, run};
use crate::{
    harness::{Control, Family, PATIENCE, Proxy, Upstream, binary, echo, spawn, wait_until},
    process::exec::Exec,
};

/// Returns the answer of an API to `GET /status`.
fn answer(body: &str) -> &'static str {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).leak()
}

/// The status of an older proxy, which tells neither the state in words nor what follows it.
#[test]
fn status_shows_what_the_api_tells() {
    const BODY: &str = r#"{"version":"0.1.0","uptime_seconds":90.5,"paused":true,"paused_since":"2026-11-24T11:45:35.666Z","leases":[{"name":"deploy","reason":null,"by":"uid 0, pid 12","mode":"hold","since":"2026-11-24T11:45:35.666Z","expires_in_seconds":null,"drain_quiet_seconds":null}],"held":3,"connecting":0,"active":2,"oldest_seconds":61.9,"rejecting":0,"accepted":9,"rejected":0,"failed":0,"bytes_to_upstream":1536,"bytes_to_client":12,"upstream":"tcp://localhost:3002","threads":2,"worker_panics":0,  "odd": 1}
"#;
    let api = answering(answer(BODY));
    assert_done(api.addr(), &["status", "--json"], BODY);
    let request = api.received().bytes;
    let expected = format!(
        "GET /status HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nConnection: close\r\n\r\n",
        api.addr().port()
    );
    assert_eq!(String::from_utf8_lossy(&request), expected);
    assert_done(
        api.addr(),
        &["status"],
        "\
state       paused since 2026-11-24T11:45:35.666Z
held        3
connecting  0
active      2, the oldest for 1m1s
rejecting   0
accepted    9
rejected    0
failed      0
left        0
drained     0
killed      0
panics      0
bytes       1.5 KiB to the upstream, 12 B to clients
upstream    tcp://localhost:3002
tcpause     0.1.0, up for 1m30s
pause       deploy by uid 0, pid 12 since 2026-11-24T11:45:35.666Z: hold
",
    );
    let (_upstream, proxy) = proxy();
    assert!(run(proxy.control().addr(), &["status"]).stdout.starts_with("state       running\n"));
}

#[test]
fn status_shows_an_older_proxy() {
    const BODY: &str = r#"{"version":"0.1.0","uptime_seconds":1,"paused":false,"paused_since":null,"leases":[],"held":7,"connecting":0,"active":0,"oldest_seconds":null,"rejecting":0,"accepted":9,"rejected":1,"failed":2,"left":3,"drained":4,"killed":5,"bytes_to_upstream":0,"bytes_to_client":0,"upstream":"u","threads":2,"worker_panics":6}"#;

    assert_done(
        answering(answer(BODY)).addr(),
        &["status"],
        "\
state       running
held        7
connecting  0
active      0
rejecting   0
accepted    9
rejected    1
failed      2
left        3
drained     4
killed      5
panics      6
bytes       0 B to the upstream, 0 B to clients
upstream    u
tcpause     0.1.0, up for 1s
",
    );
}

#[test]
fn status_shows_an_upstream_that_is_away_and_who_waits_for_it() {
    const BODY: &str = r#"{"version":"0.1.0","uptime_seconds":1,"paused":false,"paused_since":null,"leases":[],"held":7,"connecting":1,"active":0,"oldest_seconds":null,"rejecting":0,"accepted":9,"rejected":0,"failed":1,"left":0,"drained":0,"killed":0,"bytes_to_upstream":0,"bytes_to_client":0,"upstream":"tcp://db:1","threads":2,"worker_panics":0,"state":"running, but the upstream is away for 12s: Connection refused; 7 clients wait","oldest_held_seconds":11.5,"oldest_connecting_seconds":0.012,"upstream_up":false,"upstream_since":"2026-11-24T11:45:35.666Z","upstream_error":"Connection refused","upstream_addresses":["10.0.0.1:1","10.0.0.2:1"],"awaiting_upstream":7,"connections_max":9000,"hold_max":500,"listeners":["tcp://0.0.0.0:80"],"pid":12,"config_file":"/etc/tcpause/tcpause.yml","closed":{"ended":0,"left-held":2,"unreachable":1},"upgrades":1,"last_upgrade":{"at":"2026-11-24T11:45:35.666Z","stall_seconds":0.0354,"connections":7,"error":null}}"#;

    let shown = "\
state       running, but the upstream is away for 12s: Connection refused; 7 clients wait
held        7, the oldest for 11s
connecting  1, the oldest for 12ms
active      0
rejecting   0
accepted    9
rejected    0
failed      1
left        0
drained     0
killed      0
panics      0
bytes       0 B to the upstream, 0 B to clients
upstream    tcp://db:1, away since 2026-11-24T11:45:35.666Z: Connection refused; clients that wait: 7
addresses   10.0.0.1:1, 10.0.0.2:1
closed      3: 2 left-held, 1 unreachable
limits      9000 clients, 500 of them held
listens     tcp://0.0.0.0:80
process     12, /etc/tcpause/tcpause.yml
upgrades    1, the last at 2026-11-24T11:45:35.666Z: 7 connections, stalled for 35.4ms
tcpause     0.1.0, up for 1s
";
    assert_done(answering(answer(BODY)).addr(), &["status"], shown);
    let up = BODY
        .replace(r#""upstream_up":false"#, r#""upstream_up":true"#)
        .replace("/etc/tcpause/tcpause.yml", "")
        .replace(r#""config_file":"""#, r#""config_file":null"#);
    let shown = run(answering(answer(&up)).addr(), &["status"]).stdout;
    assert!(shown.contains("\nupstream    tcp://db:1, up since 2026-11-24T11:45:35.666Z\n"));
    assert!(shown.contains("\nprocess     12, no configuration file\n"), "{shown}");
}

/// A command that does not end by itself; it dies with its owner.
struct Watch {
    child: Child,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
}

impl Watch {
    fn start(control: &Control, options: &[&str]) -> Self {
        let mut command = Command::new(binary());
        command.args(["status", "--watch"]).args(options);
        command.arg("--control-addr").arg(control.addr().to_string());
        let pipes = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = pipes.spawn().unwrap();
        let stdout = lines(child.stdout.take().unwrap());
        let stderr = lines(child.stderr.take().unwrap());
        Self { child, stdout, stderr }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // An error says that it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn lines(source: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    drop(spawn(move || {
        for line in BufReader::new(source).lines().map_while(Result::ok) {
            drop(sender.send(line));
        }
    }));
    lines
}

/// Waits for a line with this begin, and returns it.
#[track_caller]
fn wait_line(lines: &Receiver<String>, begin: &str) -> String {
    let mut line = String::new();
    wait_until(begin, || {
        line = lines.recv_timeout(PATIENCE).expect("a line");
        line.starts_with(begin)
    });
    line
}

#[test]
fn watch_shows_it_again_with_times_and_rates_and_survives_the_proxy() {
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::builder().upstream(&upstream).control(Family::Unix).start();
    let mut watch = Watch::start(proxy.control(), &[]);
    let time = watch.stdout.recv_timeout(PATIENCE).unwrap();
    assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
    assert_eq!(watch.stdout.recv_timeout(PATIENCE).unwrap(), "state       running");
    assert_eq!(wait_line(&watch.stdout, "accepted"), "accepted    0");
    wait_line(&watch.stdout, "tcpause     ");
    assert_eq!(watch.stdout.recv_timeout(PATIENCE).unwrap(), "");
    let time = watch.stdout.recv_timeout(PATIENCE).unwrap();
    assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
    let mut client = proxy.connect();
    client.assert_echo(b"carried");
    wait_until("a rate is shown", || wait_line(&watch.stdout, "accepted").ends_with("1 (1/s)"));
    proxy.control().pause();
    wait_line(&watch.stdout, "state       paused ");
    drop(client);
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
    wait_line(&watch.stderr, "tcpause: cannot reach the control API");
    let again = proxy.sibling().upstream(&upstream).control(Family::Unix).start();
    wait_line(&watch.stdout, "state       running");
    assert!(!watch.stdout.try_iter().any(|line| line.contains("cannot reach")));
    assert!(watch.child.try_wait().unwrap().is_none());
    drop(again);
}

#[test]
fn watch_as_json_is_a_line_a_second() {
    let (_upstream, proxy) = proxy();
    let watch = Watch::start(proxy.control(), &["--json"]);
    let mut before = 0.0;
    for _ in 0..3 {
        let line = watch.stdout.recv_timeout(PATIENCE).unwrap();
        let status: serde_json::Value = serde_json::from_str(&line).unwrap();
        let uptime = status["uptime_seconds"].as_f64().unwrap();
        assert!(uptime - before > if before > 0.0 { 0.9 } else { 0.0 }, "{before} {uptime}");
        before = uptime;
    }
}

/// Escapes that switch to the terminal's other screen and hide the cursor, and that undo both.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// Starts a watch at a terminal of its own. Returns it with its process, once it shows a table.
#[track_caller]
fn watch_at_terminal(control: &Control) -> (Exec, Pid) {
    let (program, addr) = (binary(), control.addr());
    let program = program.display();
    let script =
        format!("echo pid $$; ulimit -c 0; exec '{program}' status --watch --control-addr={addr}");
    let watch = Exec::spawn(Command::new("script").args(["-qefc", &script, "/dev/null"]));
    let pid = wait_line(&watch.stdout, "pid ");
    let pid = pid.trim_start_matches("pid ").trim_end().parse().unwrap();
    let shown = wait_shown(&watch, "state       running");
    assert!(shown.contains(&format!("{ENTER}\x1b[H20")), "{shown:?}");
    (watch, Pid::from_raw(pid).unwrap())
}

/// Waits until a terminal shows `text`, and returns all lines until then.
#[track_caller]
fn wait_shown(watch: &Exec, text: &str) -> String {
    let mut shown = String::new();
    wait_until(text, || {
        shown += &watch.stdout.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{shown:?}"));
        shown.contains(text)
    });
    shown
}

#[test]
fn a_watched_terminal_is_restored_whatever_ends_it() {
    let (_upstream, proxy) = proxy();
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT] {
        let (mut watch, pid) = watch_at_terminal(proxy.control());
        match signal {
            // By the terminal.
            Signal::INT => watch.stdin.as_mut().unwrap().write_all(b"\x03").unwrap(),
            _ => kill_process(pid, signal).unwrap(),
        }
        assert_eq!(watch.code(), 128 + signal.as_raw());
        let rest: String = watch.stdout.iter().collect();
        let (_, behind) = rest.rsplit_once(LEAVE).unwrap_or_else(|| panic!("{signal:?}: {rest:?}"));
        assert!(!behind.contains('\x1b') && !behind.contains("state"), "{rest:?}");
    }
}

#[test]
fn a_watch_that_is_stopped_gives_the_terminal_back_until_it_goes_on() {
    let (_upstream, proxy) = proxy();
    let (watch, pid) = watch_at_terminal(proxy.control());
    kill_process(pid, Signal::TSTP).unwrap();
    let stat = format!("/proc/{}/stat", pid.as_raw_nonzero());
    wait_until("it is stopped", || {
        let stat = fs::read_to_string(&stat).unwrap();
        stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('T'))
    });
    let mut shown = String::new();
    wait_until("it goes on", || {
        // `script` stops as well, a moment later.
        watch.signal(Signal::CONT);
        kill_process(pid, Signal::CONT).unwrap();
        shown.extend(watch.stdout.try_iter());
        shown.contains(&format!("{LEAVE}{ENTER}"))
    });
    wait_shown(&watch, "state       running");
}

#[test]
fn a_watched_terminal_shows_that_the_proxy_is_gone() {
    let (_upstream, mut proxy) = proxy();
    let (mut watch, _pid) = watch_at_terminal(proxy.control());
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
    let mut shown = String::new();
    wait_until("the error is shown", || {
        // The terminal's echo ends the line that shows it.
        watch.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        shown.extend(watch.stdout.try_iter());
        shown.contains("\x1b[Htcpause: cannot reach the control API")
    });
}

//! The formats of the log: JSON, and the levels of the journal. And a log that nobody reads.

use std::{fs::File, io};

use serde_json::Value;

use crate::harness::{Authority, Family, Proxy, Upstream, echo, spawn, wait_until};

/// Sets the variable to device and inode of the process's own standard error, as systemd does.
const IS_JOURNAL: &str = "export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2)";

/// Ends the proxy and returns the lines of its log.
#[track_caller]
fn lines(mut proxy: Proxy) -> Vec<String> {
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
    proxy.log_so_far().lines().map(str::to_owned).collect()
}

/// Reads a line of JSON, with what each has.
#[track_caller]
fn object(line: &str) -> Value {
    let object: Value =
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    let text = |key: &str| object[key].as_str().unwrap_or_else(|| panic!("no {key}: {line}"));
    assert!(text("time").len() == 24 && text("time").ends_with('Z'), "{line}");
    assert!(["debug", "info", "warn", "error"].contains(&text("level")), "{line}");
    assert!(text("event") == "connection" || !text("message").is_empty(), "{line}");
    assert!(!line.contains(char::is_control), "{line:?}");
    object
}

#[test]
fn each_line_of_json_is_an_object() {
    let authority = Authority::new("ours");
    let files = tempfile::tempdir().unwrap();
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder()
        .listen(Family::Unix)
        .upstream(&upstream)
        .args(authority.write_files(files.path()).options())
        .args(["--log-format", "json", "--log-connections", "all"])
        .start();
    let control = proxy.control();
    proxy.connect().assert_echo(b"hello");
    for byte in (0..=255_u8).step_by(9) {
        control.raw(&[b"GE", &[byte][..], b"T / HTTP/1.1\r\n\r\n"].concat());
    }
    let reason = "it's%20%22v2%22%5C";
    assert_eq!(control.put(&format!("/paused?name=a%22&reason={reason}&ttl=90s")).status, 201);
    assert_eq!(control.put("/paused?name=b&mode=reject").status, 201);
    let mut rejected = proxy.connect();
    rejected.send(&[0x16, 3, 1, 0, 4, 1, 0x1b, b'[', b'm']);
    rejected.finish();
    drop(rejected.receive_all());
    assert_eq!(control.put("/paused?name=b&mode=hold").status, 201);
    let held = proxy.connect_held();
    assert_eq!(control.delete("/paused?name=b").status, 204);
    control.resume();
    drop(held);

    let objects: Vec<Value> = lines(proxy).iter().map(|line| object(line)).collect();
    let of = |event: &str| objects.iter().find(|object| object["event"] == event).unwrap().clone();
    let first = of("connection");
    assert!(first["id"].is_string() && first["message"].is_null(), "{first}");
    assert!(first["client"].as_str().unwrap().starts_with("uid "), "{first}");
    assert!(first["upstream"].as_str().unwrap().starts_with("tcp://127.0.0.1:"), "{first}");
    // It was not held.
    assert!(first["held_seconds"].is_null(), "{first}");
    let times = ["connect_seconds", "duration_seconds"];
    assert!(times.iter().all(|time| first[time].as_f64().is_some_and(|it| it >= 0.0)), "{first}");
    assert_eq!((&first["bytes_to_upstream"], &first["bytes_to_client"]), (&5.into(), &5.into()));
    assert_eq!((&first["cause"], &first["error"]), (&"ended".into(), &Value::Null));
    let (paused, lifted, resumed) = (of("paused"), of("lifted"), of("resumed"));
    assert_eq!((&paused["pause"], &paused["mode"]), (&"a\"".into(), &"hold".into()));
    assert_eq!((&paused["reason"], &paused["ttl_seconds"]), (&"it's \"v2\"\\".into(), &90.into()));
    assert_eq!(of("renewed")["pause"], "b");
    assert_eq!((&lifted["pause"], &lifted["reason"]), (&"b".into(), &Value::Null));
    assert_eq!((&lifted["state"], &resumed["state"]), (&"paused".into(), &"running".into()));
    assert_eq!((&resumed["pause"], &resumed["held"]), (&"a\"".into(), &1.into()));
    assert!(resumed["by"].as_str().unwrap().starts_with("127.0.0.1:"), "{resumed}");
    assert!(resumed["lifted_by"].as_str().unwrap().starts_with("127.0.0.1:"), "{resumed}");
    assert!(
        resumed["paused_seconds"].as_f64().unwrap() >= lifted["paused_seconds"].as_f64().unwrap()
    );
}

#[test]
fn ends_of_pauses_that_nobody_has_planned_are_warnings() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).args(["--log-format", "json"]).start();
    let control = proxy.control();
    let mut client = proxy.connect();
    client.assert_echo(b"busy");
    control.put("/paused?name=waits&wait=1ms").assert_error(504);
    drop(control.send("PUT", "/paused?name=goes&while=connected", &[]));
    proxy.wait_for_log("caller-gone");
    assert_eq!(control.put("/paused?name=expires&ttl=1ms").status, 201);
    proxy.wait_for_log("pause expired");
    drop(client);
    let objects: Vec<Value> = lines(proxy).iter().map(|line| object(line)).collect();
    for (event, pause, level) in [
        ("undone", "waits", "warn"),
        ("caller-gone", "goes", "info"),
        ("expired", "expires", "warn"),
    ] {
        let found: Vec<_> = objects.iter().filter(|object| object["event"] == event).collect();
        let [it] = found[..] else { panic!("{event}: {found:?}") };
        assert_eq!((&it["pause"], &it["level"]), (&pause.into(), &level.into()), "{it}");
        assert_eq!((&it["state"], &it["lifted_by"]), (&"running".into(), &Value::Null), "{it}");
    }
}

#[test]
fn in_the_journal_each_line_begins_with_its_level() {
    let upstream = Upstream::tcp(echo);
    for format in ["auto", "json", "text"] {
        let args = ["--log-format", format];
        let proxy = Proxy::builder().upstream(&upstream).args(args).before(IS_JOURNAL).start();
        assert_eq!(proxy.control().put("/paused?ttl=1ms").status, 201);
        proxy.wait_for_log("pause expired");
        for line in lines(proxy) {
            let Some((number, rest)) = line.strip_prefix('<').and_then(|it| it.split_once('>'))
            else {
                assert!(format == "text" && line.starts_with("20"), "{format}: {line}");
                continue;
            };
            let level = match format {
                "json" => object(rest)["level"].as_str().unwrap().to_uppercase(),
                _ => rest.split(' ').next().unwrap().to_owned(),
            };
            let expected = match &*level {
                "WARN" => "4",
                "INFO" => "6",
                "DEBUG" => "7",
                _ => panic!("{line}"),
            };
            assert_eq!((number, format == "text"), (expected, false), "{line}");
        }
    }
}

#[test]
fn a_journal_that_is_not_standard_error_changes_nothing() {
    let upstream = Upstream::tcp(echo);
    let inode_of_another = "export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/1)";
    for before in ["export JOURNAL_STREAM=1:2", "export JOURNAL_STREAM=", inode_of_another] {
        let proxy = Proxy::builder().upstream(&upstream).before(before).start();
        for line in lines(proxy) {
            assert!(line.starts_with("20") && line.contains("Z "), "{before}: {line}");
        }
    }
}

#[test]
fn a_wrong_start_is_an_error_in_the_journal() {
    let finished = Proxy::builder().arg("--log-format=jsn").before(IS_JOURNAL).fail();
    assert_eq!(finished.code, 2);
    assert!(finished.stderr.starts_with("<3>tcpause: --log-format: "), "{}", finished.stderr);
}

/// A reader that has stopped, such as a full disk behind a pipe, costs lines and neither traffic nor memory.
#[test]
fn a_log_that_nobody_reads_costs_lines_that_are_counted() {
    const REFUSED: usize = 6_000;

    let upstream = Upstream::tcp(echo);
    // Their addresses are known without the log. Lines of the control API alone are logged, so that all can be counted.
    let mut proxy = Proxy::builder()
        .listen(Family::Unix)
        .control(Family::Unix)
        .upstream(&upstream)
        .env("RUST_LOG", "tcpause::control=debug")
        .before("mkfifo log && exec 2<>log")
        .launch();
    let control = proxy.control();
    wait_until("it serves", || control.probe() == Some(200));
    for _request in 0..REFUSED {
        assert!(!control.raw(b"\r\x1b\n\r\n").is_empty());
    }
    proxy.connect().assert_echo(b"carried all the same");
    let metrics = control.get("/metrics");
    let metric = |line: &str| line.strip_prefix("tcpause_log_lines_dropped_total ")?.parse().ok();
    let counted: Option<usize> = metrics.text().lines().find_map(metric);
    let log = File::open(proxy.dir().join("log")).unwrap();
    let reader = spawn(move || io::read_to_string(log).unwrap());
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
    let log = reader.join().unwrap();
    let refused = log.lines().filter(|line| line.contains(" refused: 400 ")).count();
    let dropped = log.lines().filter_map(|line| line.split_once("WARN log lines dropped: "));
    let dropped: usize = dropped.map(|(_, count)| count.parse::<usize>().unwrap()).sum();
    assert!(dropped > 0, "{refused} lines, and none was dropped");
    assert_eq!((refused + dropped, counted), (REFUSED, Some(dropped)));
}

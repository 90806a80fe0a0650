//! The configuration: what is refused and how, and what beats what.

use std::{fs, path::Path};

use crate::harness::{Authority, Finished, Program, Proxy, Upstream, echo, program};

/// A line longer than this is not read any more.
const LINE_LENGTH_MAX: usize = 400;

/// Returns the fault of a refusal that should have exit code 2 and one line with all of `words`.
fn fault(finished: &Finished, words: &[&str]) -> Option<String> {
    let line = finished.stderr.trim_end();
    if (finished.code, &*finished.stdout) != (2, "") {
        return Some(format!("{finished:?}"));
    }
    if line.contains('\n') || line.len() > LINE_LENGTH_MAX {
        return Some(format!("not one line: {line}"));
    }
    let missing = words.iter().find(|word| !line.contains(**word))?;
    Some(format!("no {missing:?} in: {line}"))
}

#[track_caller]
fn assert_refused(finished: &Finished, words: &[&str]) {
    assert_eq!(fault(finished, words), None);
}

/// Shows all faults of a table at once.
#[track_caller]
fn assert_no_faults(faults: impl IntoIterator<Item = Option<String>>) {
    let faults: Vec<String> = faults.into_iter().flatten().collect();
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn a_wrong_command_line_is_refused() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["--no-such-option"], &["--no-such-option"]),
        (&["--proxy-adr=localhost:1"], &["--proxy-adr", "--proxy-addr"]),
        (&["--grace-perod", "3s"], &["--grace-perod", "--grace-period"]),
        (&["-x"], &["-x"]),
        (&["--proxy-addr"], &["--proxy-addr"]),
        (&["-g"], &["grace-period"]),
        (&["--proxy-addr="], &["--proxy-addr"]),
        (&["--proxy-addr", "nonsense"], &["--proxy-addr", "nonsense", "host:port"]),
        (&["--proxy-addr", "localhost:99999"], &["--proxy-addr", "99999"]),
        (&["--proxy-addr", "http://localhost:80"], &["--proxy-addr", "http://localhost:80"]),
        (&["--control-addr", "localhost"], &["--control-addr", "host:port"]),
        (&["--upstream-addr", "unix://relative/path"], &["--upstream-addr", "unix:///"]),
        (&["--upstream-addr", "unix://"], &["--upstream-addr", "unix:///"]),
        (&["--upstream-addr", "localhost:0"], &["upstream", "port"]),
        (&["--grace-period", "10"], &["--grace-period", "10s"]),
        (&["--grace-period", "soon"], &["--grace-period", "soon"]),
        (&["--grace-period=-1s"], &["--grace-period"]),
        (&["--proxy-retry-after-interval", "3"], &["--proxy-retry-after-interval", "3s"]),
        (&["--proxy-block-poll-interval", "often"], &["--proxy-block-poll-interval"]),
        (&["--proxy-close-poll-interval", "100"], &["--proxy-close-poll-interval", "100"]),
        (&["--proxy-threads", "0"], &["--proxy-threads"]),
        (&["--proxy-threads", "-1"], &["--proxy-threads"]),
        (&["--proxy-threads", "many"], &["--proxy-threads", "many"]),
        (&["--pause-max-ttl", "0s"], &["--pause-max-ttl", "10m"]),
        (&["--hold-timeout", "30"], &["--hold-timeout", "30s"]),
        (&["--hold-timeout", "0s"], &["--hold-timeout", "leave it away"]),
        (&["--hold-max", "0"], &["--hold-max", "1 or more"]),
        (&["--hold-overflow", "rejct"], &["--hold-overflow", "rejct", "`reject`"]),
        (&["--resume-max-connecting", "0"], &["--resume-max-connecting", "1 or more"]),
        (&["--resume-rate", "0"], &["--resume-rate", "1 or more"]),
        (&["--upstream-retry-for", "30"], &["--upstream-retry-for", "30s"]),
        (&["--log-level", "loud"], &["--log-level", "loud", "info"]),
        (&["--log-format", "jsn"], &["--log-format", "jsn", "`json`"]),
        (&["--log-format="], &["--log-format"]),
        (&["frobnicate"], &["frobnicate"]),
        (&["hlep"], &["hlep", "help"]),
        (&["completion"], &["bash"]),
        (&["completion", "tcsh"], &["tcsh", "bash"]),
        (&["--config", "missing.yml"], &["missing.yml"]),
        (&["--config", "/"], &["/"]),
    ];
    assert_no_faults(cases.iter().map(|(args, words)| fault(&program().args(*args).run(), words)));
}

#[test]
fn a_wrong_file_is_refused_with_the_place() {
    let cases: &[(&str, &[&str])] = &[
        ("grace-perod: 3s\n", &["bad.yml", "1", "grace-perod", "grace-period"]),
        ("grace-period: 3s\nproxy:\n  adr: localhost:1\n", &["bad.yml", "3", "adr", "addr"]),
        ("proxy:\n  tls:\n    certificate: x.pem\n", &["bad.yml", "3", "certificate", "cert"]),
        ("upstreams:\n  addr: localhost:1\n", &["bad.yml", "upstreams", "upstream"]),
        ("\nproxy:\n  threads: many\n", &["bad.yml", "3", "threads"]),
        ("proxy:\n  threads: 0\n", &["bad.yml", "2", "threads"]),
        ("proxy:\n  threads: -1\n", &["bad.yml", "2", "threads"]),
        ("proxy:\n  reject-clients: maybe\n", &["bad.yml", "2", "reject-clients"]),
        ("\nproxy: 5\n", &["bad.yml", "2", "proxy"]),
        ("proxy:\n  - addr\n", &["bad.yml", "proxy"]),
        ("control:\n  hosts: 5\n", &["bad.yml", "2", "hosts"]),
        ("\npause:\n  max-ttl: never\n", &["bad.yml", "3", "pause.max-ttl", "never"]),
        ("pause:\n  max-ttl: 0s\n", &["pause.max-ttl", "10m"]),
        ("hold:\n  timeout: 0s\n", &["hold.timeout", "leave it away"]),
        ("hold:\n  max: none\n", &["bad.yml", "2", "hold.max", "1 or more"]),
        ("hold:\n  overflow: queue\n", &["bad.yml", "2", "hold.overflow", "backlog"]),
        ("resume:\n  max-conecting: 1\n", &["bad.yml", "2", "max-conecting", "max-connecting"]),
        ("resume:\n  rate: 0\n", &["bad.yml", "2", "resume.rate", "1 or more"]),
        ("upstream:\n  retry-for: 30\n", &["bad.yml", "2", "retry-for", "30s"]),
        ("\ngrace-period: 10\n", &["bad.yml", "2", "grace-period", "10s"]),
        ("\ngrace-period: soon\n", &["bad.yml", "2", "grace-period", "soon"]),
        ("\ngrace-period: -1s\n", &["bad.yml", "2", "grace-period"]),
        ("proxy:\n  retry-after-interval: 3\n", &["bad.yml", "2", "retry-after-interval", "3s"]),
        ("proxy:\n  addr: nonsense\n", &["bad.yml", "2", "addr", "host:port"]),
        ("control:\n  addr: localhost:99999\n", &["bad.yml", "2", "addr"]),
        ("upstream:\n  addr: unix://relative\n", &["bad.yml", "2", "addr", "unix:///"]),
        ("\nlog-level: loud\n", &["bad.yml", "2", "log-level", "loud"]),
        ("grace-period: 1s\ngrace-period: 2s\n", &["bad.yml", "grace-period"]),
        ("proxy: [\n", &["bad.yml"]),
        ("\tproxy:\n", &["bad.yml"]),
        ("just a sentence\n", &["bad.yml"]),
        ("a: 1\n---\nb: 2\n", &["bad.yml"]),
    ];
    for check in [&[][..], &["--check-config"]] {
        assert_no_faults(cases.iter().map(|(content, words)| {
            let program = program().file("bad.yml", content).args(["--config", "bad.yml"]);
            fault(&program.args(check).run(), words)
        }));
    }
}

#[test]
fn a_file_that_is_no_text_or_far_too_large_is_refused() {
    assert_refused(
        &program().file("bad.yml", b"proxy:\n  addr: \xff\xfe\n").args(["-c", "bad.yml"]).run(),
        &["bad.yml"],
    );
    assert_refused(
        &program().file("bad.yml", "#\n".repeat(2 << 20)).args(["-c", "bad.yml"]).run(),
        &["bad.yml"],
    );
}

#[test]
fn a_wrong_certificate_is_refused_with_its_file() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (files, foreign) = (ours.write_files(dir.path()), theirs.write_files(other.path()));
    let missing = dir.path().join("missing.pem");
    let nothing = dir.path().join("nothing.pem");
    std::fs::write(&nothing, "no certificate in here\n").unwrap();
    let broken = dir.path().join("broken.pem");
    std::fs::write(&broken, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .unwrap();

    let run = |ca: Option<&Path>, cert: Option<&Path>, key: Option<&Path>| {
        let mut program =
            program().args(["--proxy-addr=127.0.0.1:0", "--control-addr=127.0.0.1:0"]);
        for (option, file) in
            [("--proxy-tls-ca-cert", ca), ("--proxy-tls-cert", cert), ("--proxy-tls-key", key)]
        {
            if let Some(file) = file {
                program = program.arg(option).arg(file);
            }
        }
        program.run()
    };
    let (cert, key) = (Some(&*files.cert), Some(&*files.key));
    let name = |path: &Path| path.display().to_string();

    assert_no_faults([
        fault(&run(None, cert, None), &["tls", "key"]),
        fault(&run(None, None, key), &["tls", "cert"]),
        fault(&run(None, Some(&missing), key), &[&name(&missing)]),
        fault(&run(None, cert, Some(&missing)), &[&name(&missing)]),
        fault(&run(Some(&missing), cert, key), &[&name(&missing)]),
        fault(&run(None, Some(&nothing), key), &[&name(&nothing)]),
        fault(&run(None, cert, Some(&nothing)), &[&name(&nothing)]),
        fault(&run(Some(&nothing), cert, key), &[&name(&nothing)]),
        fault(&run(None, Some(&broken), key), &[&name(&broken)]),
        fault(&run(Some(&broken), cert, key), &[&name(&broken)]),
        fault(&run(None, key, key), &[&name(&files.key)]),
        fault(&run(None, cert, cert), &[&name(&files.cert)]),
        fault(&run(None, cert, Some(&foreign.key)), &[&name(&files.cert), &name(&foreign.key)]),
    ]);
}

/// Checks a configuration, and gives all that the check says.
#[track_caller]
fn checked(program: Program) -> String {
    let finished = program.arg("--check-config").run();
    assert_eq!(finished.code, 0, "{finished:?}");
    format!("{}\n{}", finished.stdout, finished.stderr)
}

#[test]
fn a_flag_beats_the_file_and_the_file_beats_the_default() {
    let file = "upstream:\n  addr: localhost:4002\nproxy:\n  addr: localhost:4000\n";
    let said = checked(program().file("a.yml", file).args([
        "--config",
        "a.yml",
        "--upstream-addr",
        "localhost:5002",
    ]));
    for (word, there) in [("5002", true), ("4002", false), ("3002", false)] {
        assert_eq!(said.contains(word), there, "upstream {word}: {said}");
    }
    for (word, there) in [("4000", true), ("3000", false), ("3001", true)] {
        assert_eq!(said.contains(word), there, "proxy and control {word}: {said}");
    }
}

#[test]
fn each_way_to_name_the_file_works() {
    for args in [
        &["-c", "a.yml"][..],
        &["-ca.yml"],
        &["-c=a.yml"],
        &["--config", "a.yml"],
        &["--config=a.yml"],
    ] {
        let said =
            checked(program().file("a.yml", "upstream:\n  addr: localhost:4002\n").args(args));
        assert!(said.contains("4002"), "{args:?}: {said}");
    }
}

#[test]
fn the_file_in_the_working_directory_is_found() {
    let file = "upstream:\n  addr: localhost:4002\n";
    assert!(checked(program().file("tcpause.yml", file)).contains("4002"));
    // A named file is read instead of it, not besides it.
    let said = checked(
        program().file("tcpause.yml", file).file("a.yml", "# all defaults\n").args(["-c", "a.yml"]),
    );
    assert!(said.contains("3002") && !said.contains("4002"), "{said}");
    assert_refused(
        &program().file("tcpause.yml", "nonsense: 1\n").run(),
        &["tcpause.yml", "nonsense"],
    );
}

#[test]
fn the_defaults_are_complete() {
    let said = checked(program());
    for word in ["localhost:3000", "localhost:3001", "localhost:3002"] {
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn an_empty_file_means_the_defaults() {
    for content in ["", "# nothing\n", "proxy:\n", "proxy: {}\n", "\u{feff}grace-period: 1s\r\n"] {
        let said = checked(program().file("a.yml", content).args(["-c", "a.yml"]));
        assert!(said.contains("localhost:3002"), "{content:?}: {said}");
    }
}

#[test]
fn the_sample_is_good() {
    let sample = include_str!("../../../tcpause.yml");
    let said = checked(program().file("sample.yml", sample).args(["--config", "sample.yml"]));
    assert!(said.contains("localhost:3002"), "{said}");
}

#[test]
fn a_file_with_every_key_runs() {
    let authority = Authority::new("ours");
    let dir = tempfile::tempdir().unwrap();
    let files = authority.write_files(dir.path());
    let upstream = Upstream::tcp(echo);
    let content = format!(
        "grace-period: 1m30s\nlog-level: trace\nproxy:\n  addr: 127.0.0.1:0\n  reject-clients: true\n  \
         reject-with: http\n  retry-after-interval: 7s\n  block-poll-interval: 50ms\n  close-poll-interval: 1.5h\n  threads: 1\n  tls:\n    \
         ca-cert: {}\n    cert: {}\n    key: {}\npause:\n  max-ttl: 1h\nhold:\n  timeout: 1h\n  max: 9\n  overflow: close\n\
         resume:\n  max-connecting: 3\n  rate: 1000\ncontrol:\n  addr: 127.0.0.1:0\n  hosts: [proxy.internal]\nupstream:\n  \
         addr: {}\n  connect-timeout: 4s\n  retry-for: 30s\n",
        files.ca_cert.display(),
        files.cert.display(),
        files.key.display(),
        upstream.addr(),
    );
    let builder = Proxy::builder()
        .file("all.yml", content)
        .args(["-c", "all.yml"])
        .log_level(None)
        .grace_period(None);
    let proxy = builder.start();
    proxy.connect().assert_echo(b"hello");
    assert_eq!(proxy.control().status().threads, 1);
    let response = proxy.control().request("PUT", "/paused", &["Host: proxy.internal"]);
    assert_eq!(response.status, 201);
    let mut client = proxy.connect();
    client.send(b"GET / HTTP/1.1\r\n\r\n");
    assert_eq!(crate::harness::Response::read(&mut client).header("Retry-After"), Some("7"));
    proxy.wait_for_log("block-poll-interval");
}

#[test]
fn go_durations_are_understood() {
    for duration in ["0s", "100ms", "1m30s", "1.5h", "1h2m3s", "500us", "250µs", "10ns", ".5s"] {
        checked(program().args(["--grace-period", duration]));
    }
}

#[test]
fn each_form_of_an_address_is_understood() {
    for addr in [
        "localhost:1",
        "tcp://localhost:1",
        "127.0.0.1:1",
        "[::1]:1",
        "tcp://[::1]:1",
        "unix:///tmp/x.sock",
        ":1",
        "a-b.c:1",
    ] {
        checked(program().args(["--proxy-addr", addr]));
    }
    for addr in ["localhost:1", "tcp://[::1]:1", "unix:///tmp/x.sock"] {
        checked(program().args(["--upstream-addr", addr, "--control-addr", "127.0.0.1:2"]));
    }
}

#[test]
fn a_check_of_the_configuration_opens_nothing() {
    let (proxy, control) = (Upstream::tcp(echo), Upstream::tcp(echo));
    let (proxy_addr, control_addr) = (proxy.addr().to_string(), control.addr().to_string());
    checked(program().args(["--proxy-addr", &proxy_addr, "--control-addr", &control_addr]));
    assert_eq!((proxy.accepted(), control.accepted()), (0, 0));
}

/// As a start does.
#[test]
fn a_check_of_the_configuration_reads_the_state_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.json");
    let check =
        |path: &str| program().args(["--check-config", "--upstream-state-file", path]).run();
    let path = file.display().to_string();
    assert_eq!(check(&path).code, 0, "it need not be there");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    for text in ["", "{"] {
        fs::write(&file, text).unwrap();
        let wrong = check(&path);
        assert!(wrong.code == 1 && wrong.stderr.contains("correct it, or remove it"), "{wrong:?}");
    }
    let nowhere = check("/no/such/state.json");
    assert!(nowhere.code == 1 && nowhere.stderr.contains("make the folder"), "{nowhere:?}");
    let relative = check("state.json");
    assert!(relative.code == 2 && relative.stderr.contains("an absolute path"), "{relative:?}");
}

#[test]
fn a_check_of_the_configuration_shows_the_mode_that_the_group_has() {
    let args = ["--control-addr=unix:///run/c", "--control-group=root", "--check-config"];
    let checked = program().args(args).run();
    // Others than root may not give the file to that group.
    let is_root = checked.code == 0;
    assert!(checked.stdout.contains("mode: '0660'") == is_root, "{checked:?}");
    assert!(is_root || checked.stderr.contains("no member of the group"), "{checked:?}");
}

#[test]
fn two_listeners_at_one_address_are_refused() {
    let args = ["--proxy-addr", "localhost:4000", "--control-addr", "localhost:4000"];
    assert_refused(&program().args(args).run(), &["proxy", "control", "4000"]);
}

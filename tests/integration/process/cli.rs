//! The command line: what it prints, and what it logs.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use crate::harness::{Addr, Family, Proxy, Upstream, binary, echo, program, wait_until};

/// Every long option.
const OPTIONS: [&str; 19] = [
    "--check-config",
    "--config",
    "--control-addr",
    "--grace-period",
    "--help",
    "--log-level",
    "--proxy-addr",
    "--proxy-block-poll-interval",
    "--proxy-close-poll-interval",
    "--proxy-reject-clients",
    "--proxy-reject-with",
    "--proxy-retry-after-interval",
    "--proxy-threads",
    "--proxy-tls-ca-cert",
    "--proxy-tls-cert",
    "--proxy-tls-key",
    "--upstream-addr",
    "--version",
    "-g",
];

/// Returns the standard output of a successful call, which must print nothing else.
#[track_caller]
fn printed(args: &[&str]) -> String {
    let finished = program().args(args).run();
    assert_eq!((finished.code, &*finished.stderr), (0, ""), "{args:?}");
    assert!(finished.stdout.ends_with('\n'), "{args:?}");
    finished.stdout
}

#[test]
fn the_help_shows_every_option() {
    let help = printed(&["--help"]);
    for option in OPTIONS {
        assert!(help.contains(option), "no {option} in:\n{help}");
    }
    for default in
        ["10s", "3s", "100ms", "localhost:3000", "localhost:3001", "localhost:3002", "info"]
    {
        assert!(help.contains(default), "no {default} in:\n{help}");
    }
    for line in help.lines() {
        assert!(line.chars().count() <= 100 && line.trim_end() == line, "{line:?}");
    }
    assert_eq!(printed(&["-h"]), help);
    assert_eq!(printed(&["help"]), help);
}

#[test]
fn the_version_is_that_of_the_package() {
    for args in [["-V"], ["--version"]] {
        assert_eq!(printed(&args), format!("tcpause {}\n", env!("CARGO_PKG_VERSION")));
    }
}

#[test]
fn the_completions_know_every_option() {
    for shell in ["bash", "zsh", "fish"] {
        let script = printed(&["completion", shell]);
        for option in OPTIONS {
            // fish writes options without their dashes.
            assert!(script.contains(option.trim_start_matches('-')), "no {option} for {shell}");
        }
        // The shell itself is asked where it is installed.
        let Ok(mut child) = Command::new(shell)
            .arg("-n")
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
        else {
            println!("skipped: there is no {shell} on this machine");
            continue;
        };
        child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{shell}: {output:?}");
    }
}

/// The words are those that bash makes of the line; the last one is at the cursor.
#[test]
fn bash_offers_what_fits_without_any_package() {
    const SCRIPT: &str = r#"
compopt() { :; }
eval "$1"
shift
COMP_WORDS=(tcpause "$@")
COMP_CWORD=$#
_tcpause
printf '%s\n' "${COMPREPLY[@]}"
"#;

    let script = printed(&["completion", "bash"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tcpause-file");
    std::fs::write(&file, "").unwrap();
    let begin = folder.path().join("tcpause-f").to_str().unwrap().to_owned();
    let (file, begin) = (file.to_str().unwrap(), begin.as_str());
    for (words, offer) in [
        (&["exec", "mkfif"][..], "mkfifo"),
        (&["exec", "--", "mkfif"], "mkfifo"),
        (&["exec", "--wait", "1s", "mkfif"], "mkfifo"),
        (&["exec", "--wait", "=", "1s", "--drain", "quiet", ":", "1s", "mkfif"], "mkfifo"),
        (&["exec", "--help", "mkfif"], "mkfifo"),
        (&["exec", begin], file),
        (&["exec", "--", "ls", begin], file),
        (&["exec", "ls", "-l", begin], file),
        (&["exec", "--wa"], "--wait"),
        (&["exec", "--mode", "ho"], "hold"),
        (&["exec", "--mode", "=", "ho"], "hold"),
        (&["exec", "--config", begin], file),
        (&["pause", "--mode", "rej"], "reject"),
        (&["pau"], "pause"),
        (&["--proxy-reject-with", "htt"], "http"),
        (&["--proxy-reject-with", "file", ":", begin], file),
        (&["--proxy-reject-with", "=", "file", ":", begin], file),
        (&["help", "exe"], "exec"),
        (&["help", "drain"], "draining"),
    ] {
        let Ok(output) =
            Command::new("bash").args(["-c", SCRIPT, "bash", &script]).args(words).output()
        else {
            println!("skipped: there is no bash on this machine");
            return;
        };
        let offered = String::from_utf8_lossy(&output.stdout);
        let offered: std::collections::BTreeSet<&str> = offered.lines().collect();
        assert_eq!(offered, [offer].into(), "{words:?}: {output:?}");
    }
}

#[test]
fn the_manual_page_shows_every_option() {
    let page = printed(&["man"]);
    assert!(page.lines().any(|line| line.starts_with(".TH ")), "{page}");
    let plain = page.replace("\\-", "-");
    for option in OPTIONS {
        assert!(plain.contains(option), "no {option}");
    }
}

#[test]
fn the_log_names_the_real_addresses() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).log_level(None).start();
    assert_ne!((proxy.addr().port(), proxy.control().addr().port()), (0, 0));
    proxy.connect().assert_echo(b"the port is real");
    assert!(!proxy.control().is_paused());
}

#[test]
fn the_environment_beats_the_option_for_the_log_level() {
    let upstream = Upstream::tcp(echo);
    // The start needs the lines of level info.
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .log_level(Some("error"))
        .env("RUST_LOG", "info")
        .start();
    drop(proxy);
    for (level, variable) in [("trace", Some("error")), ("error", None)] {
        let mut builder = Proxy::builder()
            .listen(Family::Unix)
            .control(Family::Unix)
            .upstream(&upstream)
            .log_level(Some(level));
        if let Some(value) = variable {
            builder = builder.env("RUST_LOG", value);
        }
        let mut quiet = builder.launch();
        wait_until("it serves", || quiet.control().probe() == Some(200));
        quiet.connect().assert_echo(b"hello");
        quiet.terminate();
        assert_eq!(quiet.exit_code(), 0);
        assert_eq!(quiet.log_so_far(), "");
    }
}

#[test]
fn an_event_is_one_line_and_foreign_bytes_are_escaped() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).log_level(Some("trace")).start();
    proxy.control().raw(b"GET /\x1b[31mred\r\nforged: line HTTP/1.1\r\nHost: a\x07b\r\n\r\n");
    proxy.connect().assert_echo(b"\x1b[31m\n\x07");
    proxy.control().wait_idle();
    let log = proxy.log_so_far();
    assert!(log.lines().count() > 1, "{log}");
    assert!(!log.contains(|char: char| char.is_control() && char != '\n'), "{log:?}");
}

#[test]
fn a_reader_of_the_log_that_stalls_does_not_stall_the_proxy() {
    let upstream = Upstream::tcp(echo);
    let dir = tempfile::tempdir().unwrap();
    let socket = |name: &str| Addr::Unix(dir.path().join(name));
    let (proxy, control) = (socket("proxy.sock"), socket("control.sock"));
    // Nobody ever reads from this pipe, and it is full after some hundred lines.
    let (_unread, full) = std::io::pipe().unwrap();
    let mut child = Command::new(binary())
        .args([
            "--log-level",
            "trace",
            "--proxy-addr",
            &proxy.to_string(),
            "--control-addr",
            &control.to_string(),
        ])
        .args(["--upstream-addr", &upstream.addr().to_string()])
        .current_dir(dir.path())
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stderr(full)
        .spawn()
        .unwrap();
    let served = std::panic::catch_unwind(|| {
        wait_until("it serves", || proxy.try_connect().is_ok());
        for _ in 0..2_000 {
            proxy.connect().assert_echo(b"hello");
        }
        assert!(!crate::harness::Control::new(control).is_paused());
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(served.is_ok());
}

#[test]
fn the_demo_shows_the_main_job_and_nothing_fails() {
    let finished = program().arg("demo").run();
    assert_eq!(finished.code, 0, "{finished:?}");
    let told = format!("{}\n{}", finished.stdout, finished.stderr);
    let summary = told.to_lowercase();
    for word in ["pause", "resume", "upgrade", "longest", "failed: 0"] {
        assert!(summary.contains(word), "no {word:?} in:\n{told}");
    }
}

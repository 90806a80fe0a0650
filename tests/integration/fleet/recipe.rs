//! The script of README.md that pauses several hosts without etcd, as it is printed there, with a shell in ssh's place.

use std::{
    env,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

use crate::harness::{Proxy, Upstream, binary, echo, wait_until};

const README: &str = include_str!("../../../README.md");

const HOSTS: usize = 6;

/// Several proxies, and the script with its list of them.
struct Fleet {
    _upstream: Upstream,
    proxies: Vec<Proxy>,
    dir: TempDir,
}

impl Fleet {
    fn start() -> Self {
        let upstream = Upstream::tcp(echo);
        let start = |_| Proxy::builder().upstream(&upstream).start();
        let proxies: Vec<Proxy> = (0..HOSTS).map(start).collect();
        let dir = tempfile::tempdir().expect("a directory");
        let begin = README.find("#!/usr/bin/env bash").expect("a script");
        let script = README[begin..].split_once("```").expect("its end").0;
        program(&dir.path().join("fleet-exec"), script);
        // It knows a host by the address of its control API, and every other host is dead.
        let ssh = "#!/bin/sh\nwhile [ \"$1\" = -o ]; do shift 2; done\nhost=$1; shift\n\
            case $host in (tcp://*) ;; (*) echo no such host >&2; exit 255;; esac\n\
            cd \"${0%/*}\" && export HOST_CONTROL=\"$host\" && exec sh -c \"$*\"\n";
        program(&dir.path().join("ssh"), ssh);
        let tcpause = format!(
            "#!/bin/sh\nword=$1; shift\nexec {} \"$word\" --control-addr \"$HOST_CONTROL\" \"$@\"\n",
            PathBuf::from(binary()).display()
        );
        program(&dir.path().join("tcpause"), &tcpause);
        let fleet = Self { _upstream: upstream, proxies, dir };
        fleet.list(&[]);
        fleet
    }

    /// Lists all hosts, and `more`.
    fn list(&self, more: &[&str]) {
        let hosts = self.proxies.iter().map(|proxy| proxy.control().addr().to_string());
        let hosts: Vec<String> = hosts.chain(more.iter().map(|&host| host.to_owned())).collect();
        fs::write(self.dir.path().join("hosts"), hosts.join("\n") + "\n").expect("a file");
    }

    /// Returns a call of the script.
    fn call(&self, command: &[&str]) -> Command {
        let path = format!("{}:{}", self.dir.path().display(), env::var("PATH").expect("a path"));
        let mut call = Command::new("bash");
        call.args(["fleet-exec", "hosts"])
            .args(command)
            .current_dir(self.dir.path())
            .env("PATH", path);
        call.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        call
    }

    fn run(&self, command: &[&str]) -> Output {
        self.call(command).output().expect("bash")
    }

    fn count_paused(&self) -> usize {
        self.proxies.iter().filter(|proxy| proxy.control().is_paused()).count()
    }
}

fn program(path: &Path, text: &str) {
    fs::write(path, text).expect("a file");
    fs::set_permissions(path, Permissions::from_mode(0o755)).expect("a mode");
}

#[test]
fn the_recipe_without_etcd_runs_as_printed() {
    let fleet = Fleet::start();

    let told = "for host in $(cat hosts); do HOST_CONTROL=$host tcpause status; done | grep -c '^state  *paused'; exit 7";
    let output = fleet.run(&["sh", "-c", told]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{stderr}");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), HOSTS.to_string(), "{stderr}");
    assert_eq!(fleet.count_paused(), 0, "{stderr}");

    let mut call = fleet.call(&["sh", "-c", "echo $$ > pid; exec sleep 60"]).spawn().expect("bash");
    let pid = fleet.dir.path().join("pid");
    let number = || fs::read_to_string(&pid).ok().and_then(|it| it.trim().parse::<i32>().ok());
    wait_until("the command runs", || number().is_some());
    assert_eq!(fleet.count_paused(), HOSTS);
    call.kill().expect("a process of ours");
    call.wait().expect("a child");
    wait_until("all have resumed", || fleet.count_paused() == 0);
    let command = number().and_then(rustix::process::Pid::from_raw).expect("a number");
    rustix::process::kill_process(command, rustix::process::Signal::KILL).expect("it goes on");

    fleet.list(&["dead"]);
    let output = fleet.run(&["touch", "ran"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{stderr}");
    assert!(stderr.contains("dead has ended: not all hosts are idle"), "{stderr}");
    assert!(!fleet.dir.path().join("ran").exists(), "{stderr}");
    assert_eq!(fleet.count_paused(), 0, "{stderr}");
}

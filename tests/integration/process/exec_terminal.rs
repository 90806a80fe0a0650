//! `tcpause exec` at a terminal, whose Ctrl-C reaches one process group.

use std::{io::Write as _, process::Command, thread, time::Duration};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    harness::{Control, PATIENCE, binary},
    process::exec::{Exec, proxy},
};

const CTRL_C: &[u8] = b"\x03";

/// The rest after which another signal counts.
const REST: Duration = Duration::from_millis(300);

/// Starts exec with a command line of a shell, at a terminal of its own.
fn start(control: &Control, command: &str) -> Exec {
    let (program, addr) = (binary(), control.addr());
    let exec = format!("exec '{}' exec --control-addr={addr} -- {command}", program.display());
    Exec::spawn(Command::new("script").args(["-qefc", &exec, "/dev/null"]))
}

/// Waits until the terminal shows `text`, and returns the line.
#[track_caller]
fn wait_shown(exec: &Exec, text: &str) -> String {
    let mut shown = Vec::new();
    loop {
        let line = exec.stdout.recv_timeout(PATIENCE);
        shown.push(line.unwrap_or_else(|_| panic!("no {text:?} in {shown:?}")));
        if shown.last().unwrap().contains(text) {
            return shown.pop().unwrap();
        }
    }
}

fn press(exec: &mut Exec, key: &[u8]) {
    exec.stdin.as_mut().unwrap().write_all(key).unwrap();
}

#[test]
fn ctrl_c_reaches_a_command_in_another_process_group() {
    let (_upstream, proxy) = proxy();
    for command in [
        "timeout 60 sh -c 'echo started; exec sleep 50'",
        "setsid -w sh -c 'echo started; exec sleep 50'",
        "sh -c 'echo started; exec sleep 50'",
    ] {
        let mut exec = start(proxy.control(), command);
        wait_shown(&exec, "started");
        let mut held = proxy.connect_held();
        press(&mut exec, CTRL_C);
        wait_shown(&exec, "the command ended with 130");
        assert_eq!(exec.code(), 130, "{command}");
        held.assert_echo(b"served");
    }
}

#[test]
fn ctrl_c_reaches_a_command_once() {
    let (_upstream, proxy) = proxy();
    let script = "trap \"let count+=1; echo got \\$count\" INT; echo started; read ended; exit 7";
    let mut exec = start(proxy.control(), &format!("bash -c '{script}'"));
    wait_shown(&exec, "started");
    press(&mut exec, CTRL_C);
    wait_shown(&exec, "got 1");
    thread::sleep(REST);
    press(&mut exec, CTRL_C);
    wait_shown(&exec, "got 2");
    press(&mut exec, b"\n");
    assert_eq!(exec.code(), 7);
    // One too many would have been counted before the second was.
    let rest: Vec<String> = exec.stdout.iter().collect();
    assert!(!rest.iter().any(|line| line.contains("got")), "{rest:?}");
}

#[test]
fn a_third_ctrl_c_gives_up_on_a_command_that_outlasts_two() {
    let (_upstream, proxy) = proxy();
    // As where a command waits for a grandchild that has a group of its own.
    let command = "sh -c 'trap \"\" INT HUP; echo started $$; exec sleep 50'";
    let mut exec = start(proxy.control(), command);
    let line = wait_shown(&exec, "started");
    let mut held = proxy.connect_held();
    press(&mut exec, CTRL_C);
    thread::sleep(REST);
    press(&mut exec, CTRL_C);
    wait_shown(&exec, "at a third signal soon");
    assert!(proxy.control().is_paused());
    thread::sleep(REST);
    press(&mut exec, CTRL_C);
    wait_shown(&exec, "gave up on the command after three signals");
    assert_eq!(exec.code(), 130);
    held.assert_echo(b"served");
    assert!(!proxy.control().is_paused());
    let pid = line.trim_end().rsplit(' ').next().unwrap().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).expect("the command goes on");
}

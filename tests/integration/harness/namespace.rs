//! Tests that run once more, elsewhere: in namespaces with a network and an `/etc` of their own, or as another user.

use std::{
    env,
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
};

/// Variable that is set for the test program inside.
const INSIDE: &str = "TCPAUSE_INSIDE_NAMESPACE";

/// Command before the test: it brings the loopback up, and makes `/etc` empty and writable for this process and its children.
const PREPARE: &str = "ip link set lo up && mount -t tmpfs none /etc && exec \"$0\" \"$@\"";

/// Runs `test`, whose full name is `name`, where changes to addresses, ports and `/etc` stay invisible outside. On a host that
/// refuses namespaces the test prints a line and is skipped.
#[track_caller]
pub(crate) fn in_namespace(name: &str, test: impl FnOnce()) {
    run_inside(name, test, &unshare, "there are no namespaces");
}

/// Runs `test`, whose full name is `name`, as a user who has no other process: the kernel bounds what the processes of a user
/// have together. Where this user cannot be another one, the test prints a line and is skipped.
#[track_caller]
pub(crate) fn as_another_user(name: &str, test: impl FnOnce()) {
    static USERS: AtomicU32 = AtomicU32::new(0);
    let user = 10_000_000 + 4 * process::id() + USERS.fetch_add(1, Ordering::Relaxed);
    run_inside(name, test, &|program| setpriv(user, program), "this user cannot be another one");
}

/// Runs a test inside, by a command that makes a program run there.
#[track_caller]
fn run_inside(name: &str, test: impl FnOnce(), inside: &dyn Fn(&str) -> Command, hindrance: &str) {
    if env::var_os(INSIDE).is_some() {
        return test();
    }
    match inside("true").output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr);
            return println!("skipped: {hindrance}: {}", why.trim());
        }
        Err(error) => return println!("skipped: {hindrance}: {error}"),
    }
    let program = env::current_exe().expect("the test program");
    let output = inside(program.to_str().expect("a path in UTF-8"))
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .output()
        .expect("the program, as before");
    let [shown, errors] = [&output.stdout, &output.stderr].map(|it| String::from_utf8_lossy(it));
    assert!(output.status.success(), "inside:\n{shown}\n{errors}");
    assert!(shown.contains("1 passed"), "there is no test {name}:\n{shown}");
    // The name of the test may precede the mark in its line.
    let figures = shown.lines().filter_map(|line| Some(line.split_once(FIGURE)?.1));
    let skips = shown.lines().filter_map(|line| line.get(line.find("skipped: ")?..));
    figures.chain(skips).for_each(|line| println!("{line}"));
}

/// Mark of a line that is shown outside, too.
pub(crate) const FIGURE: &str = "figure: ";

fn unshare(program: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", "--mount", "/bin/sh", "-c", PREPARE]);
    command.arg(program);
    command
}

/// Returns a command without privileges, but that it may enter every folder, as the programs may be anywhere.
fn setpriv(user: u32, program: &str) -> Command {
    const RIGHTS: [&str; 3] =
        ["--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"];
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={user}"), format!("--regid={user}")]);
    command.args(RIGHTS).arg(program);
    command
}

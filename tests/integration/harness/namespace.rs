//! Namespaces, for tests that need a network and an `/etc` of their own. Such a test runs once more, inside.

use std::{env, process::Command};

/// Variable that is set for the test program inside the namespaces.
const INSIDE: &str = "TCPAUSE_INSIDE_NAMESPACE";

/// Command before the test: it brings the loopback up, and makes `/etc` empty and writable for this process and its children.
const PREPARE: &str = "ip link set lo up && mount -t tmpfs none /etc && exec \"$0\" \"$@\"";

/// Runs `test`, whose full name is `name`, where changes to addresses, ports and `/etc` stay invisible outside. On a host that
/// refuses namespaces the test prints a line and is skipped.
#[track_caller]
pub(crate) fn in_namespace(name: &str, test: impl FnOnce()) {
    if env::var_os(INSIDE).is_some() {
        return test();
    }
    let trial = unshare("true").output();
    match trial {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr);
            return println!("skipped: no namespaces here: {}", why.trim());
        }
        Err(error) => return println!("skipped: no namespaces here: unshare: {error}"),
    }
    let program = env::current_exe().expect("the test program");
    let output = unshare(program.to_str().expect("a path in UTF-8"))
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare, as before");
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

//! Programs at the place of tcpause that cannot take over: each is told in one sentence, and nobody else notices.

use std::{fs, os::unix::fs::symlink, process::Command, time::Instant};

use super::{Scene, refusal};
use crate::harness::{PATIENCE, Proxy, Upstream, echo, program};

/// Starts a proxy by the name `./tcpause`, a symlink in its working directory, and sets the scene.
fn scene(upstream: &Upstream) -> Scene {
    let by_symlink = r#"ln -s "$0" tcpause && exec ./tcpause "$@""#;
    Scene::set(Proxy::builder().upstream(upstream).before(by_symlink).start())
}

/// Puts a script for the shell in the program's place. Another process writes it: a child that another test starts meanwhile
/// would keep a file of ours open, and an open file cannot be run.
fn replace_by_script(scene: &Scene, text: &str) {
    let place = scene.proxy.dir().join("tcpause");
    let write = r#"printf '%s\n' "$1" > "$0.new" && chmod 755 "$0.new" && mv "$0.new" "$0""#;
    let mut shell = Command::new("/bin/sh");
    assert!(shell.arg("-c").arg(write).arg(place).arg(text).status().unwrap().success());
}

/// Runs `tcpause upgrade`, and checks that it fails with one sentence, which ends with `told` of the program in its place.
#[track_caller]
fn assert_refused(scene: &Scene, told: &str) {
    let addr = scene.proxy.control().addr().to_string();
    let finished = program().args(["upgrade", "--control-addr", &addr]).run();
    assert_eq!((finished.code, &*finished.stdout), (1, ""), "{finished:?}");
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
    assert!(
        finished.stderr.starts_with("tcpause: ") && finished.stderr.contains(told),
        "{finished:?}"
    );
}

/// Checks that the proxy has gone on all the time, and that it can be upgraded as soon as its program is back.
#[track_caller]
fn finish(scene: Scene, pid: u32) {
    let status = scene.proxy.control().status();
    assert_eq!((status.pid, status.upgrades), (pid, 0));
    let place = scene.proxy.dir().join("tcpause");
    fs::remove_file(&place).unwrap();
    symlink(crate::harness::binary(), &place).unwrap();
    scene.proxy.upgrade();
    scene.finish();
}

#[test]
fn a_foreign_program_is_told_to_each_caller_and_nobody_notices() {
    let upstream = Upstream::tcp(echo);
    let scene = scene(&upstream);
    let pid = scene.proxy.pid();
    let place = scene.proxy.dir().join("tcpause");
    let text = scene.proxy.dir().join("text");
    fs::write(&text, "no program").unwrap();
    let check = |told: &str| {
        let expected = format!("the new program {} {told}", place.display());
        assert_refused(&scene, &expected);
        let why = refusal(&scene.proxy).expect("it cannot take over");
        assert!(why.starts_with(&expected), "{why}");
        assert_eq!(scene.proxy.control().status().last_upgrade.unwrap().error, Some(why));
    };
    for (target, told) in [
        ("/nonexistent", "cannot be run: No such file or directory"),
        (text.to_str().unwrap(), "cannot be run: Permission denied"),
        ("/bin/false", "ended with exit code 1 before it took over"),
        ("/bin/sleep", "ended with exit code 1 before it took over"),
    ] {
        fs::remove_file(&place).unwrap();
        symlink(target, &place).unwrap();
        check(told);
    }
    for (script, told) in [
        // Neither a script nor a binary.
        ("\u{7f}garbage", "cannot be run: Exec format error"),
        ("#!/bin/sh\nkill -SEGV $$", "was ended by SIGSEGV before it took over"),
        ("#!/bin/sh\nexec sleep 60 <&-", "has ended before it took over"),
        ("#!/bin/sh\necho Hello, world >&0; exec sleep 60", "broke the protocol: "),
    ] {
        replace_by_script(&scene, script);
        check(told);
    }
    finish(scene, pid);
}

#[test]
fn a_program_that_hangs_is_given_up() {
    let upstream = Upstream::tcp(echo);
    let scene = scene(&upstream);
    let pid = scene.proxy.pid();
    replace_by_script(&scene, "#!/bin/sh\nexec sleep 60");
    let begun = Instant::now();
    let why = refusal(&scene.proxy).expect("it does nothing");
    assert!(why.ends_with(" takes too long") && begun.elapsed() < PATIENCE, "{why}");
    assert!(scene.proxy.children().is_empty(), "it is killed");
    finish(scene, pid);
}

/// A program of another time: one that speaks no format that this one writes, and one that cannot take everything back.
#[test]
fn a_program_that_is_too_old_is_refused_before_anything_stands_still() {
    let upstream = Upstream::tcp(echo);
    let scene = scene(&upstream);
    let pid = scene.proxy.pid();
    for (formats, told) in [
        ("[0]", "reads the formats [0] of a hand-over, and this one writes [1]"),
        ("[1]", "is too old for an upgrade in which the number of the process stays"),
    ] {
        let hello = format!(r#"{{"taker-hello":{{"formats":{formats},"version":"0.0.1"}}}}"#);
        // The header has three numbers of four bytes: those of JSON, of raw bytes, and of descriptors.
        let header = format!(r"\{:o}\0\0\0\0\0\0\0\0\0\0\0", hello.len());
        let speak =
            format!("#!/bin/sh\n: >heard; printf '{header}{hello}' >&0; exec cat <&0 >>heard");
        replace_by_script(&scene, &speak);
        assert_refused(&scene, told);
        let why = refusal(&scene.proxy).expect("it is too old");
        assert!(why.ends_with("; stop and start it instead"), "{why}");
        let heard = fs::read(scene.proxy.dir().join("heard")).unwrap();
        assert_eq!(heard, b"", "nothing is told to it");
    }
    finish(scene, pid);
}

//! Needs of a new process that are not met: files, processes, room for files, descriptors under way. Each costs the upgrade
//! at most.

use std::{
    env, fs,
    io::{ErrorKind, IoSlice},
    mem::MaybeUninit,
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    process::Command,
};

use rustix::{
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit},
};

use super::{Scene, crash::FAULT, refusal};
use crate::harness::{
    Family, Proxy, Response, Upstream, as_another_user, binary, echo, hangup, in_namespace,
    wait_until,
};

/// Lowers both limits of open files of a process.
fn lower_limit(pid: u32, files: u64) {
    let (pid, files) = (Pid::from_raw(pid.cast_signed()), Some(files));
    prlimit(pid, Resource::Nofile, Rlimit { current: files, maximum: files }).unwrap();
}

/// A new process has to open all that the old one has, and some more until that one has ended.
#[test]
fn a_taker_that_may_open_too_few_files_says_so_at_once() {
    const SPARE: u64 = 5;

    for is_followed in [true, false] {
        let upstream = Upstream::tcp(echo);
        let builder = Proxy::builder().upstream(&upstream);
        let builder = if is_followed { builder.followed() } else { builder };
        let scene = Scene::set(builder.start());
        let mut others: Vec<_> = (0..40).map(|_| scene.proxy.connect_held()).collect();
        let files = scene.proxy.descriptors() as u64 + SPARE;
        lower_limit(scene.proxy.pid(), files);
        let pid = scene.proxy.pid();
        let mut refusals = 0;
        while let Some(why) = refusal(&scene.proxy) {
            let told = format!(" may open {files} files and needs ");
            assert!(
                why.contains(&told) && why.contains("; raise the limit of open files"),
                "{why}"
            );
            refusals += 1;
            drop(others.pop());
            let left = others.len() as u64 + 1;
            scene.proxy.control().wait_counts(|status| status.held, left);
        }
        // As soon as a taker says that it has room, it has, and so has the one that takes everything back.
        assert!(refusals > 20, "{refusals}");
        assert_eq!(scene.proxy.pid() != pid, is_followed);
        drop(others);
        scene.proxy.control().wait_counts(|status| status.held, 1);
        scene.finish();
    }
}

/// A taker whose limit falls when it has counted loses descriptors on their way, or cannot build what it has received.
#[test]
fn descriptors_that_do_not_arrive_end_the_upgrade() {
    let upstream = Upstream::tcp(echo);
    let builder = Proxy::builder().upstream(&upstream).followed();
    let scene = Scene::set(builder.env(FAULT, "taker:warm:stop").start());
    let mut whys = Vec::new();
    for spare in (0..100).step_by(3) {
        let mut caller = scene.proxy.control().send("POST", "/upgrade", &[]);
        wait_until("the taker is stopped", || scene.proxy.children() == ['T']);
        let taker = scene.proxy.child_pids().pop().unwrap();
        let open = fs::read_dir(format!("/proc/{taker}/fd")).unwrap().count() as u64;
        lower_limit(taker, open + spare);
        kill_process(Pid::from_raw(taker.cast_signed()).unwrap(), Signal::CONT).unwrap();
        let answer = Response::read(&mut caller);
        if answer.status == 200 {
            break;
        }
        whys.push(answer.assert_error(409));
    }
    assert!(whys[0].contains("a higher limit of open files may help"), "{whys:?}");
    assert!(whys.iter().all(|why| why.contains("open files")), "{whys:?}");
    assert_eq!(scene.finish().heirs().len(), 1, "with more, it goes on");
}

#[test]
fn a_giver_without_descriptors_says_so_and_upgrades_later() {
    let upstream = Upstream::tcp(echo);
    let scene = Scene::set(Proxy::to(&upstream));
    // Answered behind the caller that waits, which has its descriptor by now. A channel takes two.
    scene.proxy.control().status();
    scene.proxy.leave_descriptors(0);
    scene.proxy.signal(hangup());
    scene.proxy.wait_for_log(
        "Too many open files (os error 24); raise the limit of open files (ulimit -n, ",
    );
    scene.proxy.limit(Resource::Nofile, None);
    assert_eq!(refusal(&scene.proxy), None);
    scene.finish();
}

/// Each number of threads is too small for another part of the way.
#[test]
fn a_taker_without_threads_is_refused_until_it_has_enough() {
    as_another_user(
        "upgrade::limits::a_taker_without_threads_is_refused_until_it_has_enough",
        || {
            let upstream = Upstream::tcp(echo);
            for is_followed in [true, false] {
                let builder = Proxy::builder().upstream(&upstream).args(["--proxy-threads", "1"]);
                let builder = if is_followed { builder.followed() } else { builder };
                take_threads_away(Scene::set(builder.start()));
            }
        },
    );
}

/// Tries an upgrade with more and more threads until there are enough.
fn take_threads_away(scene: Scene) {
    let pid = scene.proxy.pid();
    let own = || fs::read_dir("/proc/self/task").unwrap().count();
    let mut whys = Vec::new();
    loop {
        let there = own() + scene.proxy.threads() + whys.len();
        scene.proxy.limit(Resource::Nproc, Some(there as u64));
        let Some(why) = refusal(&scene.proxy) else { break };
        assert!(why.contains("raise the limit of processes ("), "{why}");
        assert_eq!(scene.proxy.pid(), pid);
        whys.push(why);
        assert!(whys.len() < 40, "{whys:?}");
    }
    assert!(whys.len() > 5, "{whys:?}");
    assert_eq!(scene.proxy.log_count("a defect"), 0);
    let proxy = scene.finish();
    proxy.limit(Resource::Nproc, None);
    assert_eq!(refusal(&proxy), None, "what went on can be upgraded, too");
}

/// Files of sockets need an inode each. Everything that a process keeps has one already.
#[test]
fn an_upgrade_needs_no_room_for_files() {
    in_namespace("upgrade::limits::an_upgrade_needs_no_room_for_files", || {
        // The binary may lie below one of the folders.
        fs::copy(binary(), "/etc/program").unwrap();
        let folders = ["/run", "/dev/shm", "/tmp"];
        for folder in folders {
            let mount = ["-t", "tmpfs", "-o", "nr_inodes=64", "none", folder];
            assert!(Command::new("mount").args(mount).status().unwrap().success());
        }
        let temporary = env::temp_dir();
        fs::create_dir_all(&temporary).unwrap();
        let upstream = Upstream::tcp(echo);
        let builder = Proxy::builder().listen(Family::Unix).control(Family::Unix);
        let builder = builder.upstream(&upstream).env("TMPDIR", temporary.to_str().unwrap());
        let scene = Scene::set(builder.before(r#"exec /etc/program "$@""#).start());
        let lacks = "writes its answers without tiny_http's server";
        assert_eq!(scene.proxy.log_count(lacks), 0);
        for folder in folders {
            let fill = |number: usize| fs::create_dir(Path::new(folder).join(number.to_string()));
            let error = (0..64).find_map(|number| fill(number).err()).unwrap();
            assert_eq!(error.kind(), ErrorKind::StorageFull);
        }
        scene.proxy.upgrade();
        assert_eq!(scene.proxy.log_count(lacks), 1, "they are full");
        scene.finish();
    });
}

/// The kernel bounds the descriptors that all processes of a user have sent and nobody has received.
#[test]
fn descriptors_that_others_have_under_way_delay_an_upgrade() {
    const FILES: u32 = 160;

    as_another_user(
        "upgrade::limits::descriptors_that_others_have_under_way_delay_an_upgrade",
        || {
            let upstream = Upstream::tcp(echo);
            let scene = Scene::set(Proxy::builder().upstream(&upstream).descriptors(FILES).start());
            let (sender, receiver) = UnixStream::pair().unwrap();
            let null = fs::File::open("/dev/null").unwrap();
            let descriptors = [null.as_fd(); FILES as usize + 1];
            let mut space = [MaybeUninit::uninit(); 1024];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
            let bytes = [IoSlice::new(b"x")];
            sendmsg(&sender, &bytes, &mut control, SendFlags::empty()).unwrap();
            let why = refusal(&scene.proxy).expect("no room");
            assert!(why.contains("descriptors under way"), "{why}");
            drop((sender, receiver));
            assert_eq!(refusal(&scene.proxy), None);
            scene.finish();
        },
    );
}

//! Listening: rivals for an address, the state in which a socket file appears, and the traces of a killed proxy.

use std::{
    fs::{self, Permissions},
    io::ErrorKind,
    net::{Ipv4Addr, TcpListener},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::Path,
    time::Instant,
};

use rustix::process::Signal;

use crate::{
    harness::{
        Addr, Builder, Family, Finished, Listener, PATIENCE, Proxy, Upstream, echo, program,
        wait_until,
    },
    process::stop::assert_gave_up,
};

/// Repetitions of a start whose outcome is a matter of microseconds.
const STARTS: usize = 20;

/// A mode that neither a default nor a umask gives.
const WATCHED_MODE: u32 = 0o620;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn socket_files_have_the_modes_of_the_settings() {
    let upstream = Upstream::tcp(echo);
    for (umask, args, wanted) in [
        (0o022, &[][..], (0o755, 0o600)),
        (0o000, &[], (0o777, 0o600)),
        (0o177, &[], (0o600, 0o600)),
        (0o177, &["--proxy-mode=0666", "--control-mode=0660"], (0o666, 0o660)),
        (0o000, &["--proxy-mode=600", "--control-mode=0o640"], (0o600, 0o640)),
    ] {
        let proxy = Proxy::builder()
            .listen(Family::Unix)
            .control(Family::Unix)
            .upstream(&upstream)
            .umask(umask)
            .args(args)
            .start();
        assert_eq!((mode(proxy.addr().path()), mode(proxy.control().addr().path())), wanted);
    }
}

#[test]
fn the_control_socket_has_the_group_of_its_setting() {
    // Only root may give a file to any group; others have one at least, their own.
    let own = rustix::process::getgid().as_raw();
    let is_root = rustix::process::geteuid().is_root();
    let groups = fs::read_to_string("/etc/group").unwrap();
    let mut groups = groups.lines().filter_map(|line| {
        let mut fields = line.split(':');
        Some((fields.next()?, fields.nth(1)?.parse::<u32>().ok()?))
    });
    let (name, number) = groups.find(|&(_, number)| (number == own) != is_root).unwrap();
    let upstream = Upstream::tcp(echo);
    for (args, wanted) in [(&[][..], 0o660), (&["--control-mode=0620"], 0o620)] {
        let proxy = Proxy::builder()
            .control(Family::Unix)
            .upstream(&upstream)
            .arg(format!("--control-group={name}"))
            .args(args)
            .start();
        let file = proxy.control().addr().path();
        assert_eq!((mode(file), fs::metadata(file).unwrap().gid()), (wanted, number));
    }
}

#[test]
fn a_group_that_does_not_exist_is_refused() {
    for (group, told) in [
        ("no-such", "--control-group: there is no group \"no-such\""),
        ("a:b", "--control-group: \"a:b\" is not the name of a group"),
    ] {
        let finished =
            program().args(["--control-addr=unix:///c", &format!("--control-group={group}")]).run();
        assert_eq!(finished.code, 2, "{finished:?}");
        assert!(finished.stderr.contains(told), "{finished:?}");
    }
}

#[test]
fn a_mode_that_shuts_the_group_out_is_refused() {
    let args = ["--control-addr=unix:///c", "--control-group=root", "--control-mode=0644"];
    let finished = program().args(args).run();
    assert_eq!(finished.code, 2, "{finished:?}");
    let told = "--control-group: control.mode (0644) does not let the group connect; write `0660`";
    assert!(finished.stderr.contains(told), "{finished:?}");
}

#[test]
fn the_file_sets_the_mode_quoted_or_not() {
    for (text, shown) in [("0660", "'0660'"), ("\"0660\"", "'0660'"), ("660", "'0660'")] {
        let file = format!(
            "proxy: {{addr: 'unix:///run/a', mode: {text}}}\ncontrol: {{addr: 'unix:///run/b', mode: {text}}}\n"
        );
        let finished = program().file("tcpause.yml", file).arg("--check-config").run();
        assert_eq!(finished.code, 0, "{finished:?}");
        assert_eq!(finished.stdout.matches(&format!("mode: {shown}")).count(), 2, "{finished:?}");
    }
}

/// The sights of a watcher that looked at a path all the time while a proxy started on it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    /// Starts whose socket file was seen.
    files: usize,
    /// Files that had another mode than wanted.
    wrong_modes: usize,
    /// Attempts to connect to a new file that were refused.
    refused: usize,
    /// Moments without any file, where there was one to take over.
    gaps: usize,
}

impl Seen {
    /// Connects until it succeeds. Nothing was there, so any file is the new one.
    fn by_connecting(&mut self, path: &Path) {
        let addr = Addr::Unix(path.to_owned());
        wait_tightly(|| match addr.try_connect() {
            Ok(_) => true,
            Err(error) => {
                self.refused += usize::from(error.kind() != ErrorKind::NotFound);
                false
            }
        });
        self.note(path);
    }

    /// Looks until the file that was left behind, the inode `before`, has made room.
    fn by_looking(&mut self, path: &Path, before: u64) {
        wait_tightly(|| {
            let inode = fs::metadata(path).map(|metadata| metadata.ino());
            self.gaps += usize::from(inode.is_err());
            inode.is_ok_and(|inode| inode != before)
        });
        self.note(path);
        self.refused += usize::from(Addr::Unix(path.to_owned()).try_connect().is_err());
    }

    fn note(&mut self, path: &Path) {
        self.files += 1;
        self.wrong_modes += usize::from(mode(path) != WATCHED_MODE);
    }
}

/// Waits for what is over within microseconds, and so without a rest.
fn wait_tightly(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "it does not come");
    }
}

#[test]
fn a_socket_file_appears_with_its_mode_and_listening() {
    let upstream = Upstream::tcp(echo);
    let mut seen = Seen::default();
    for start in 0..STARTS {
        let option = format!("--proxy-mode={WATCHED_MODE:o}");
        let builder = Proxy::builder().umask(0).listen(Family::Unix).arg(option);
        let path = builder.path("proxy.sock");
        let left_behind = (start % 2 == 1).then(|| {
            drop(Listener::bind(&Addr::Unix(path.clone())));
            fs::metadata(&path).unwrap().ino()
        });
        let proxy = builder.upstream(&upstream).launch();
        match left_behind {
            Some(before) => seen.by_looking(&path, before),
            None => seen.by_connecting(&path),
        }
        proxy.connect().assert_echo(b"hello");
    }
    println!("{STARTS} starts, watched: {seen:?}");
    assert_eq!(seen, Seen { files: STARTS, ..Seen::default() });
}

#[test]
fn a_killed_proxy_can_be_started_again_at_once() {
    const KILLS: usize = 10;
    for family in [Family::Tcp4, Family::Unix, Family::Abstract] {
        let upstream = Upstream::tcp(echo);
        let mut proxy = Proxy::builder().listen(family).control(family).upstream(&upstream).start();
        let (addr, control) = (proxy.addr().clone(), proxy.control().addr().clone());
        for _ in 0..KILLS {
            // It dies with connections that are carried and others that are queued.
            let mut clients = vec![proxy.connect()];
            clients[0].assert_echo(b"carried");
            proxy.signal(Signal::STOP);
            clients.extend((0..5).map(|_| proxy.connect()));
            proxy.signal(Signal::KILL);
            assert_eq!(proxy.exit_code(), 128 + 9);
            assert_eq!(family == Family::Unix, is_socket(&addr) && is_socket(&control));
            let builder = proxy.sibling().listen_at(&addr).control_at(&control);
            proxy = builder.upstream(&upstream).start();
            proxy.connect().assert_echo(b"the next one serves");
            assert!(!proxy.control().is_paused());
        }
        println!("{family:?}: {KILLS} of {KILLS} starts after a SIGKILL serve");
    }
}

fn is_socket(addr: &Addr) -> bool {
    match addr {
        Addr::Unix(path) => fs::metadata(path).is_ok_and(|it| it.file_type().is_socket()),
        Addr::Tcp(_) | Addr::Abstract(_) => false,
    }
}

/// The address that two proxies share which start at once.
#[derive(Debug, Clone, Copy)]
enum Shared {
    Proxy,
    Control,
}

#[test]
fn of_two_that_start_at_once_one_serves_and_one_gives_up() {
    for family in [Family::Tcp4, Family::Unix, Family::Abstract] {
        for shared in [Shared::Proxy, Shared::Control] {
            let upstream = Upstream::tcp(echo);
            let mut first = 0;
            for start in 0..STARTS {
                first += usize::from(race(family, shared, start % 2 == 1, &upstream) == 0);
            }
            println!(
                "{family:?}, same {shared:?} address: {STARTS} of {STARTS} pairs have one owner, {first} times the first"
            );
        }
    }
}

/// Starts two proxies at once; returns which one serves.
fn race(family: Family, shared: Shared, stale: bool, upstream: &Upstream) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let addr = match family {
        // An address of this test alone, where no other takes a port that is free for a moment.
        Family::Tcp4 | Family::Tcp6 => {
            let socket = TcpListener::bind((Ipv4Addr::new(127, 7, 7, 7), 0)).unwrap();
            Addr::Tcp(socket.local_addr().unwrap())
        }
        Family::Unix | Family::Abstract => Addr::free(family, dir.path(), "shared.sock"),
    };
    if stale && family == Family::Unix {
        drop(Listener::bind(&addr));
    }
    let builder = || {
        let builder = Proxy::builder().upstream(upstream).args(["--proxy-threads", "2"]);
        match shared {
            Shared::Proxy => builder.listen_at(&addr).control(Family::Unix),
            Shared::Control => builder.listen(Family::Unix).control_at(&addr),
        }
    };
    let mut pair: Vec<Proxy> = (0..2).map(|_| builder()).map(Builder::launch).collect();
    wait_until("one of the two has given up", || pair.iter_mut().any(Proxy::has_ended));
    let loser = pair.iter_mut().position(Proxy::has_ended).unwrap();
    let given_up: Finished = pair.remove(loser).finish();
    assert_gave_up(&given_up, &[&addr.to_string(), "in use"]);

    let winner = pair.remove(0);
    winner.wait_for_log("control listens on");
    for _ in 0..8 {
        winner.connect().assert_echo(b"served");
    }
    assert!(!winner.control().is_paused());
    1 - loser
}

#[test]
fn names_without_a_file_work_everywhere() {
    let upstream = Upstream::start(Family::Abstract, echo);
    let mut proxy = Proxy::builder()
        .listen(Family::Abstract)
        .control(Family::Abstract)
        .upstream(&upstream)
        .start();
    proxy.wait_for_log("every user of this network namespace can pause the proxy");
    proxy.connect().assert_echo(b"carried");
    proxy.control().pause();
    let mut client = proxy.connect_held();
    proxy.control().resume();
    client.assert_echo(b"resumed");
    assert_eq!(proxy.control().status().upstream, upstream.addr().to_string());
    drop(client);
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
    assert!(proxy.addr().try_connect().is_err() && proxy.control().addr().try_connect().is_err());
    assert_eq!(fs::read_dir(proxy.dir()).unwrap().count(), 0);
}

#[test]
fn a_path_of_107_bytes_works_and_one_of_108_is_refused() {
    let upstream = Upstream::tcp(echo);
    let dir = tempfile::tempdir().unwrap();
    let path = |length: usize, letter: &str| {
        let used = dir.path().as_os_str().len() + 1;
        Addr::Unix(dir.path().join(letter.repeat(length - used)))
    };
    let builder = || Proxy::builder().upstream(&upstream).log_level(Some("info"));
    let proxy = builder().listen_at(&path(107, "p")).control_at(&path(107, "c")).start();
    proxy.connect().assert_echo(b"carried");
    assert!(!proxy.control().is_paused());
    for (builder, option) in [
        (builder().listen_at(&path(108, "p")), "--proxy-addr"),
        (builder().control_at(&path(108, "c")), "--control-addr"),
        (builder().upstream_at(&path(108, "u")), "--upstream-addr"),
    ] {
        let finished = builder.fail();
        assert_eq!(finished.code, 2, "{finished:?}");
        for part in [option, "has a path of 108 bytes; the system allows 107"] {
            assert!(finished.stderr.contains(part), "no {part:?} in {finished:?}");
        }
    }
}

#[test]
fn a_socket_that_is_not_ours_to_connect_to_is_left_alone() {
    if rustix::process::geteuid().is_root() {
        println!("skipped: root may connect to everything");
        return;
    }
    let upstream = Upstream::tcp(echo);
    let owner = Upstream::start(Family::Unix, echo);
    let path = owner.addr().path();
    fs::set_permissions(path, Permissions::from_mode(0o000)).unwrap();
    let finished =
        Proxy::builder().listen_at(owner.addr()).upstream(&upstream).log_level(None).fail();
    assert_gave_up(&finished, &[&path.display().to_string(), "Permission denied"]);
    fs::set_permissions(path, Permissions::from_mode(0o700)).unwrap();
    owner.addr().connect().assert_echo(b"still there");
}

#[test]
fn a_directory_that_stays_locked_is_named() {
    let upstream = Upstream::tcp(echo);
    let builder = Proxy::builder().listen(Family::Unix).upstream(&upstream).log_level(None);
    let path = builder.path("proxy.sock");
    let locked = fs::File::open(path.parent().unwrap()).unwrap();
    locked.lock().unwrap();
    assert_gave_up(&builder.fail(), &[&path.display().to_string(), "keeps its directory locked"]);
    assert!(!path.exists());
}

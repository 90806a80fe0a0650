//! Running out of descriptors and threads.

use std::time::{Duration, Instant};

use rustix::process::Resource;

use crate::harness::{Builder, CPU_PERCENT_MAX, Proxy, Upstream, binary, echo, wait_until};

/// The limit of open files of these proxies: room for a few clients.
const DESCRIPTORS: u32 = 64;

#[test]
fn more_clients_than_descriptors_wait_for_their_turn() {
    const COUNT: usize = 150;
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .descriptors(DESCRIPTORS)
        .args(["--proxy-threads", "1"])
        .start();
    let mut clients: Vec<_> = (0..COUNT).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(b"hello");
    }
    for _ in 0..20 {
        let status = proxy.control().status();
        assert!(status.accepted < COUNT as u64 && status.failed == 0, "{status:?}");
        assert!(!proxy.control().is_paused());
    }
    // They are served in the order of their coming, each when an earlier one has left.
    for mut client in clients {
        assert_eq!(client.receive(5), b"hello");
    }
    proxy.control().wait_idle();
    proxy.control().wait_counts(|status| (status.accepted, status.failed), (COUNT as u64, 0));
    proxy.connect().assert_echo(b"all is as before");
}

/// One limit of lines for all troubles hid the second one behind the first, and mixed their counts.
#[test]
fn a_shortage_is_told_right_behind_a_full_hold() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .args(["--proxy-threads", "1", "--hold-max", "1", "--hold-overflow", "backlog"])
        .start();
    proxy.control().pause();
    let mut clients = [proxy.connect_held(), proxy.connect()];
    proxy.wait_for_log("as many clients are held as hold.max allows");
    proxy.control().resume();
    for client in &mut clients {
        client.assert_echo(b"hello");
    }
    proxy.limit(Resource::Nofile, Some(0));
    let _waits = proxy.connect();
    let line = proxy.wait_for_log("cannot accept clients now");
    assert!(!line.contains("more since"), "{line}");
}

#[test]
fn held_clients_beyond_the_descriptors_are_served_too() {
    const COUNT: usize = 150;
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .descriptors(DESCRIPTORS)
        .args(["--proxy-threads", "1"])
        .start();
    proxy.control().pause();
    let mut clients: Vec<_> = (0..COUNT).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(b"hello");
    }
    proxy.control().wait_status("some are held", |status| status.held > 0);
    proxy.control().resume();
    for mut client in clients {
        assert_eq!(client.receive(5), b"hello");
    }
    let status = proxy.control().wait_status("all have left", |status| status.active == 0);
    assert_eq!((status.accepted, status.failed), (COUNT as u64, 0));
}

#[test]
fn bulk_goes_on_without_descriptors_for_pipes() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .descriptors(DESCRIPTORS)
        .args(["--proxy-threads", "1"])
        .start();
    let clients: Vec<_> = (0..20)
        .map(|number| {
            let mut client = proxy.connect();
            crate::harness::spawn(move || {
                let bytes = crate::harness::pattern(number, 1 << 20);
                crate::harness::assert_same(&client.round_trip(&bytes), &bytes);
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    assert_eq!(proxy.control().status().failed, 0);
}

#[test]
fn a_crowd_at_the_control_api_costs_the_clients_nothing() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).descriptors(DESCRIPTORS).start();
    let crowd: Vec<_> = (0..200).map(|_| proxy.control().addr().connect()).collect();
    let mut client = proxy.connect();
    // Less than the time that a silent caller may take: the client must not have to wait for one to be thrown out.
    client.read_timeout(Duration::from_secs(3));
    client.assert_echo(b"carried all the same");
    drop(crowd);
    wait_until("the API answers", || proxy.control().probe() == Some(200));
    proxy.connect().assert_echo(b"all is as before");
}

#[test]
fn more_clients_than_connections_are_allowed_wait_for_others_to_leave() {
    wait_for_room(|builder| {
        builder.args(["--proxy-threads", "2", "--proxy-max-connections", "20"])
    });
}

#[test]
fn more_clients_than_descriptors_allow_wait_for_others_to_leave() {
    // This limit leaves room for 20, beside what is kept for the control API and for pipes.
    wait_for_room(|builder| {
        builder.descriptors(84).args(["--proxy-threads", "2", "--proxy-pipes", "2"])
    });
}

/// With room for 20, 60 come, 20 of them leave, and then the next 20.
fn wait_for_room(limit: impl Fn(Builder) -> Builder) {
    const ROOM: usize = 20;
    const COUNT: usize = 60;
    let upstream = Upstream::tcp(echo);
    let proxy = limit(Proxy::builder().upstream(&upstream)).start();
    proxy.wait_for_log(&format!("for up to {ROOM} clients"));
    let begin = Instant::now();
    let mut clients: Vec<_> = (0..COUNT).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(b"hello");
    }
    for served in [ROOM, 2 * ROOM, COUNT] {
        let (count, bytes) = (served as u64, 5 * served as u64);
        proxy.control().wait_counts(
            |status| (status.accepted, status.failed, status.bytes_to_client),
            (count, 0, bytes),
        );
        if served == ROOM {
            let percent = proxy.cpu_percent();
            assert_eq!(proxy.control().status().accepted, ROOM as u64);
            println!("{} clients wait for a place, at {percent} % of a core", COUNT - ROOM);
            assert!(percent < CPU_PERCENT_MAX, "{percent} % of a core");
        }
        // Which of those who wait come first is the kernel's to say: each worker has a queue of its own.
        let mut left = ROOM;
        clients.retain_mut(|client| {
            // Whoever is served has its answer already.
            client.read_timeout(Duration::from_millis(1));
            let is_served = left > 0 && is_echoed(client);
            left -= usize::from(is_served);
            !is_served
        });
        assert_eq!(left, 0, "{left} of {ROOM} were not answered");
        assert!(!proxy.control().is_paused());
    }
    let lines = proxy.log_count("places are taken");
    let seconds = begin.elapsed().as_secs() + 1;
    assert!((1..=seconds).contains(&(lines as u64)), "{lines} lines in {seconds} s");
    proxy.control().wait_idle();
}

/// Returns whether the answer to what was sent has come.
fn is_echoed(client: &mut crate::harness::Stream) -> bool {
    match std::io::Read::read(client, &mut [0; 5]) {
        Ok(bytes) => bytes == 5,
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "closed");
            false
        }
    }
}

/// Each number of threads is too small for another part of the start.
#[test]
fn a_start_without_threads_is_no_defect() {
    // The user has no other process. It is not root, whose threads nothing limits.
    let user = 100_000 + std::process::id();
    let other = format!(
        "setpriv --reuid={user} --regid={user} --clear-groups --inh-caps=+dac_override --ambient-caps=+dac_override"
    );
    let can_be_another = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("{other} prlimit --nproc=1 true"))
        .status()
        .is_ok_and(|status| status.success());
    if !can_be_another {
        println!("skipped: this user cannot be another one");
        return;
    }
    let upstream = Upstream::tcp(echo);
    let (mut refused, mut warned) = (0, 0);
    for threads in 1..=14 {
        let mut proxy = Proxy::builder()
            .upstream(&upstream)
            .args(["--proxy-threads", "1"])
            .before(&format!("exec {other} prlimit --nproc={threads} \"$0\" \"$@\""))
            .launch();
        wait_until("it has started, or given up", || {
            proxy.has_ended() || proxy.log_count(" started, pid ") == 1
        });
        if !proxy.has_ended() {
            proxy.terminate();
        }
        let finished = proxy.finish();
        let log = &finished.stderr;
        assert!(!log.contains("defect") && !log.contains("panicked"), "{threads}: {log}");
        if finished.code != 0 {
            assert_eq!(finished.code, 1, "{threads}: {log}");
            let is_told = log.lines().last().is_some_and(|line| line.starts_with("tcpause: "));
            assert!(is_told && log.contains("TasksMax"), "{threads}: {log}");
            refused += 1;
        }
        warned += usize::from(log.contains("no thread can be had for the control API; raise"));
    }
    println!("{refused} starts failed, {warned} warned of the control API");
    assert!((1..14).contains(&refused) && warned > 0);

    let exec = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("exec {other} prlimit --nproc=1 \"$0\" exec --control-addr :1 -- true"))
        .arg(binary())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&exec.stderr);
    assert_eq!(exec.status.code(), Some(1), "{error}");
    assert!(error.contains("cannot start the thread") && error.contains("TasksMax"), "{error}");
}

#[test]
fn more_connections_than_the_descriptors_allow_are_cut_down_with_a_warning() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .descriptors(DESCRIPTORS)
        .args(["--proxy-threads", "1", "--proxy-pipes", "0", "--proxy-max-connections", "5000"])
        .start();
    proxy.wait_for_log(
        "proxy.max-connections: 5000 are more than 64 open files allow; there are 15 places",
    );
    proxy.wait_for_log("for up to 15 clients");
}

//! Stopping, socket files, and starting again.

use std::{fs, os::unix::fs::FileTypeExt as _, thread, time::Duration};

use rustix::process::Signal;

use crate::harness::{
    Addr, End, Family, Finished, Proxy, Received, Response, Upstream, assert_same, echo, pattern,
};

#[test]
fn an_idle_proxy_stops_at_once() {
    for signal in [Signal::TERM, Signal::INT] {
        let upstream = Upstream::tcp(echo);
        let mut proxy = Proxy::to(&upstream);
        proxy.connect().assert_echo(b"hello");
        proxy.control().wait_idle();
        proxy.signal(signal);
        assert_eq!(proxy.exit_code(), 0);
    }
}

#[test]
fn live_transfers_finish() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let mut proxy = Proxy::builder().listen(family).upstream(&upstream).start();
        let mut clients: Vec<_> = (0..20).map(|_| proxy.connect()).collect();
        for client in &mut clients {
            client.assert_echo(b"before");
        }
        proxy.terminate();
        proxy.wait_refused();
        let megabyte = pattern(1, 1 << 20);
        for client in &mut clients {
            assert_same(&client.round_trip(&megabyte), &megabyte);
            client.finish();
            assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Eof });
        }
        assert_eq!(proxy.exit_code(), 0);
    }
}

/// The server has ended its idle stream, and the client keeps the rest of the connection for its next use.
#[test]
fn a_stop_does_not_wait_for_connections_whose_server_has_ended_its_stream() {
    let upstream = Upstream::tcp(|mut stream| {
        let bytes = stream.receive(8);
        stream.send(b"answer");
        stream.finish();
        Received { bytes, end: stream.receive_all().end }
    });
    let mut proxy = Proxy::builder().upstream(&upstream).grace_period(Some("1h")).start();
    let mut client = proxy.connect();
    client.send(b"question");
    assert_eq!(client.receive_all(), Received { bytes: b"answer".into(), end: End::Eof });
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
    assert_eq!(upstream.received().end, End::Eof);
}

/// A client that has ended its stream waits for its answer, however long the server thinks in the middle of it.
#[test]
fn a_stop_waits_for_the_rest_of_an_answer_to_a_client_that_has_ended_its_stream() {
    /// Longer than a stop waits for a connection whose server has ended its stream.
    const THOUGHT: Duration = Duration::from_secs(3);
    let upstream = Upstream::tcp(|mut stream| {
        let received = stream.receive_all();
        stream.send(b"begin");
        thread::sleep(THOUGHT);
        stream.send(b"end");
        received
    });
    let mut proxy = Proxy::builder().upstream(&upstream).grace_period(Some("1h")).start();
    let mut client = proxy.connect();
    client.send(b"question");
    client.finish();
    assert_eq!(client.receive(5), b"begin");
    proxy.terminate();
    assert_eq!(client.receive_all(), Received { bytes: b"end".into(), end: End::Eof });
    assert_eq!(proxy.exit_code(), 0);
}

#[test]
fn the_control_api_answers_during_a_stop() {
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    proxy.terminate();
    proxy.wait_refused();
    proxy.control().wait_counts(|status| status.active, 1);
    let mut waiter = proxy.control().send("GET", "/paused/block-until-idle", &[]);
    assert!(!proxy.control().is_paused());
    drop(client);
    assert_eq!(proxy.exit_code(), 0);
    // It may be told that the proxy stops, but it is never left without an answer.
    let response = Response::read(&mut waiter);
    assert!(response.status == 204 || response.status == 503, "{response}");
}

#[test]
fn a_connection_that_does_not_end_is_closed_after_the_grace_period() {
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::builder()
        .listen(Family::Unix)
        .control(Family::Unix)
        .upstream(&upstream)
        .grace_period(Some("300ms"))
        .start();
    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    proxy.terminate();
    assert!(matches!(client.receive_all().end, End::Eof | End::Reset));
    assert_eq!(proxy.exit_code(), 3);
    assert!(!proxy.addr().path().exists());
    assert!(!proxy.control().addr().path().exists());
}

#[test]
fn a_transfer_that_is_cut_by_the_grace_period_does_not_look_complete() {
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::builder().upstream(&upstream).grace_period(Some("200ms")).start();
    let mut client = proxy.connect();
    client.assert_echo(b"half an answer");
    proxy.terminate();
    assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Reset });
    assert_eq!(upstream.received().end, End::Reset);
    assert_eq!(proxy.exit_code(), 3);
}

#[test]
fn queued_connections_are_served() {
    const COUNT: usize = 60;
    for (family, threads) in
        [(Family::Tcp4, "1"), (Family::Tcp4, "4"), (Family::Unix, "2"), (Family::Abstract, "2")]
    {
        let upstream = Upstream::tcp(echo);
        let mut proxy = Proxy::builder()
            .listen(family)
            .upstream(&upstream)
            .args(["--proxy-threads", threads])
            .start();
        // A process that is stopped accepts nobody: all of these wait in the listeners when the signal comes.
        proxy.signal(Signal::STOP);
        let mut clients: Vec<_> = (0..COUNT).map(|_| proxy.connect()).collect();
        proxy.terminate();
        proxy.signal(Signal::CONT);
        for client in &mut clients {
            client.assert_echo(b"served");
        }
        assert_eq!(upstream.accepted(), COUNT);
        drop(clients);
        assert_eq!(proxy.exit_code(), 0);
    }
}

#[test]
fn queued_connections_beyond_the_descriptors_are_served_as_others_leave() {
    const COUNT: usize = 60;
    for family in [Family::Tcp4, Family::Unix, Family::Abstract] {
        let upstream = Upstream::tcp(echo);
        let mut proxy = Proxy::builder()
            .listen(family)
            .upstream(&upstream)
            .descriptors(64)
            .args(["--proxy-threads", "1"])
            .start();
        let mut clients: Vec<_> = (0..COUNT).map(|_| proxy.connect()).collect();
        clients.first_mut().unwrap().assert_echo(b"the first are carried");
        proxy.terminate();
        // On TCP they are not let into the queue, and try again.
        if !family.is_tcp() {
            proxy.wait_refused();
        }
        for mut client in clients {
            client.assert_echo(b"served");
        }
        assert_eq!(proxy.exit_code(), 0);
        // Whoever looked whether new clients are refused may be among them.
        assert!(upstream.accepted() >= COUNT);
    }
}

#[test]
fn held_clients_are_served_by_a_resume_during_the_stop() {
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::to(&upstream);
    proxy.control().pause();
    let mut clients: Vec<_> = (0..3).map(|_| proxy.connect_held()).collect();
    proxy.terminate();
    proxy.wait_refused();
    proxy
        .control()
        .wait_status("they are still held", |status| status.held == 3 && status.active == 0);
    assert_eq!(upstream.accepted(), 0);
    proxy.control().resume();
    for client in &mut clients {
        client.assert_echo(b"served");
    }
    drop(clients);
    assert_eq!(proxy.exit_code(), 0);
}

#[test]
fn held_clients_are_closed_after_the_grace_period() {
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::builder().upstream(&upstream).grace_period(Some("200ms")).start();
    proxy.control().pause();
    let mut client = proxy.connect_held();
    proxy.terminate();
    assert!(matches!(client.receive_all().end, End::Eof | End::Reset));
    assert_eq!(proxy.exit_code(), 3);
    assert_eq!(upstream.accepted(), 0);
}

#[test]
fn a_second_signal_ends_it_at_once() {
    for second in [Signal::TERM, Signal::INT, Signal::QUIT] {
        let upstream = Upstream::tcp(echo);
        let mut proxy =
            Proxy::builder().listen(Family::Unix).control(Family::Unix).upstream(&upstream).start();
        let mut client = proxy.connect();
        client.assert_echo(b"hello");
        proxy.terminate();
        proxy.wait_refused();
        client.assert_echo(b"still carried");
        proxy.signal_a_second_later(second);
        assert_eq!(proxy.exit_code(), 1);
        assert!(!proxy.addr().path().exists());
        assert!(!proxy.control().addr().path().exists());
    }
}

#[test]
fn socket_files_are_removed_at_a_clean_stop() {
    let upstream = Upstream::tcp(echo);
    let mut proxy =
        Proxy::builder().listen(Family::Unix).control(Family::Unix).upstream(&upstream).start();
    let files = [proxy.addr().path().to_owned(), proxy.control().addr().path().to_owned()];
    for file in &files {
        assert!(fs::metadata(file).unwrap().file_type().is_socket());
    }
    proxy.connect().assert_echo(b"hello");
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
    let left: Vec<_> =
        fs::read_dir(proxy.dir()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_stale_socket_file_does_not_block_the_start() {
    let upstream = Upstream::tcp(echo);
    let mut killed =
        Proxy::builder().listen(Family::Unix).control(Family::Unix).upstream(&upstream).start();
    killed.signal(Signal::KILL);
    assert_eq!(killed.exit_code(), 128 + 9);
    assert!(killed.addr().path().exists() && killed.control().addr().path().exists());

    let next =
        killed.sibling().listen(Family::Unix).control(Family::Unix).upstream(&upstream).start();
    assert_eq!(next.addr(), killed.addr());
    next.connect().assert_echo(b"the next one serves");
    assert!(!next.control().is_paused());
}

/// Returns whether it gave up with exit code 1 and one line that has all of `words`.
#[track_caller]
pub(crate) fn assert_gave_up(finished: &Finished, words: &[&str]) {
    assert_eq!(finished.code, 1, "{finished:?}");
    assert_eq!(finished.stderr.lines().count(), 1, "{}", finished.stderr);
    for word in words {
        assert!(finished.stderr.contains(word), "no {word:?} in {:?}", finished.stderr);
    }
}

#[test]
fn a_second_instance_gives_up_and_the_first_goes_on() {
    for family in [Family::Tcp4, Family::Tcp6, Family::Unix, Family::Abstract] {
        if !family.is_available() {
            println!("skipped: there is no IPv6 on this machine");
            continue;
        }
        let upstream = Upstream::tcp(echo);
        let first = Proxy::builder().listen(family).control(family).upstream(&upstream).start();
        let (proxy, control) = (first.addr().clone(), first.control().addr().clone());
        let word = |addr: &Addr| match addr {
            Addr::Tcp(addr) => addr.port().to_string(),
            Addr::Unix(_) | Addr::Abstract(_) => addr.to_string(),
        };

        let second = first.sibling().listen_at(&proxy).upstream(&upstream).log_level(None).fail();
        assert_gave_up(&second, &[&word(&proxy), "in use"]);
        let second =
            first.sibling().control_at(&control).upstream(&upstream).log_level(None).fail();
        assert_gave_up(&second, &[&word(&control), "in use"]);

        for _ in 0..10 {
            first.connect().assert_echo(b"the first goes on");
        }
        assert!(!first.control().is_paused());
    }
}

#[test]
fn a_port_of_another_program_is_not_taken() {
    let other = Upstream::tcp(echo);
    let upstream = Upstream::tcp(echo);
    let finished =
        Proxy::builder().listen_at(other.addr()).upstream(&upstream).log_level(None).fail();
    assert_gave_up(&finished, &[&other.addr().port().to_string(), "in use"]);
    let finished =
        Proxy::builder().control_at(other.addr()).upstream(&upstream).log_level(None).fail();
    assert_gave_up(&finished, &[&other.addr().port().to_string(), "in use"]);
}

#[test]
fn a_socket_of_another_program_is_not_taken() {
    let other = Upstream::start(Family::Unix, echo);
    let upstream = Upstream::tcp(echo);
    let finished =
        Proxy::builder().listen_at(other.addr()).upstream(&upstream).log_level(None).fail();
    assert_gave_up(&finished, &[&other.addr().path().display().to_string(), "in use"]);
    other.addr().connect().assert_echo(b"still there");
}

#[test]
fn a_regular_file_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let precious = dir.path().join("precious");
    fs::write(&precious, "data").unwrap();
    let addr = Addr::Unix(precious.clone());
    for control in [false, true] {
        let upstream = Upstream::tcp(echo);
        let builder = Proxy::builder().upstream(&upstream).log_level(None);
        let builder = if control { builder.control_at(&addr) } else { builder.listen_at(&addr) };
        assert_gave_up(&builder.fail(), &[&precious.display().to_string()]);
        assert_eq!(fs::read(&precious).unwrap(), b"data");
    }
}

#[test]
fn a_missing_directory_is_named() {
    let upstream = Upstream::tcp(echo);
    let builder = Proxy::builder().upstream(&upstream).log_level(None);
    let path = builder.path("missing").join("proxy.sock");
    assert_gave_up(
        &builder.listen_at(&Addr::Unix(path.clone())).fail(),
        &[&path.display().to_string()],
    );
}

#[test]
fn an_address_without_a_port_fails_without_a_word_of_ports() {
    let upstream = Upstream::tcp(echo);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "data").unwrap();
    let path = |name: &str| Addr::Unix(dir.path().join(name));
    let live = [Family::Unix, Family::Abstract].map(|family| Upstream::start(family, echo));
    let addrs = [path("missing/a"), path("file"), path("file/a")];
    let mut texts: Vec<String> = Vec::new();
    for addr in addrs.iter().chain(live.iter().map(Upstream::addr)) {
        let finished = Proxy::builder().upstream(&upstream).log_level(None).listen_at(addr).fail();
        assert_gave_up(&finished, &[&addr.to_string()]);
        texts.push(finished.stderr.replace(&addr.to_string(), ""));
    }
    for word in ["port", "ss -tan", "address;", "another address", "privileges"] {
        assert!(!texts.iter().any(|text| text.contains(word)), "{word:?} in {texts:?}");
    }
    // Where there is a port, it may be a connection's.
    let taken = Upstream::tcp(echo);
    let finished =
        Proxy::builder().upstream(&upstream).log_level(None).listen_at(taken.addr()).fail();
    assert_gave_up(&finished, &["ss -tan", "another address"]);
}

#[test]
fn a_failed_start_leaves_no_socket_file() {
    let other = Upstream::tcp(echo);
    let upstream = Upstream::tcp(echo);
    let dir = tempfile::tempdir().unwrap();
    let addr = Addr::Unix(dir.path().join("proxy.sock"));
    let builder = Proxy::builder()
        .listen_at(&addr)
        .control_at(other.addr())
        .upstream(&upstream)
        .log_level(None);
    assert_gave_up(&builder.fail(), &["in use"]);
    assert!(!addr.path().exists());
}

#[test]
fn a_port_can_be_used_again_at_once() {
    let upstream = Upstream::tcp(echo);
    let mut first = Proxy::to(&upstream);
    let mut client = first.connect();
    client.assert_echo(b"hello");
    // The proxy closes first here, so that its port lies in TIME_WAIT.
    first.signal(Signal::KILL);
    first.exit_code();
    client.read_timeout(Duration::from_secs(10));
    client.receive_all();
    let next = first
        .sibling()
        .listen_at(first.addr())
        .control_at(first.control().addr())
        .upstream(&upstream)
        .start();
    next.connect().assert_echo(b"the next one serves");
}

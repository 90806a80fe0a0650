//! The control API: the original's calls to the byte, and what is new.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
};

use crate::{
    harness::{Addr, Control, Family, Proxy, Response, Upstream, echo, in_namespace},
    pause::wait::curl,
};

const WAIT: &str = "/paused/block-until-idle";

#[track_caller]
fn assert_answer(response: &Response, status: u16, reason: &str, body: &str) {
    assert_eq!(
        (response.status, response.reason.as_str(), response.text()),
        (status, reason, body),
        "{response}"
    );
}

#[test]
fn the_calls_of_the_original() {
    for family in [Family::Tcp4, Family::Tcp6, Family::Unix] {
        if !family.is_available() {
            println!("skipped: there is no IPv6 on this machine");
            continue;
        }
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().control(family).upstream(&upstream).start();
        let control = proxy.control();
        let state = |paused: bool| {
            let response = control.get("/paused");
            assert_answer(&response, 200, "OK", &format!("{{\"paused\": {paused}}}"));
            assert_eq!(response.header("Content-Type"), Some("application/json"));
            assert_eq!(response.header("Content-Length"), Some(&*response.body.len().to_string()));
        };
        state(false);
        assert_answer(&control.delete("/paused"), 204, "No Content", "");
        state(false);
        assert_answer(&control.put("/paused"), 201, "Created", "");
        state(true);
        assert_answer(&control.put("/paused"), 201, "Created", "");
        state(true);
        assert_answer(&control.get(WAIT), 204, "No Content", "");
        state(true);
        assert_answer(&control.delete("/paused"), 204, "No Content", "");
        state(false);
        assert_answer(&control.get(WAIT), 204, "No Content", "");
    }
}

#[test]
fn the_status_tells_all() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).args(["--proxy-threads", "3"]).start();
    let status = proxy.control().status();
    assert_eq!(status.version, env!("CARGO_PKG_VERSION"));
    assert_eq!(status.upstream, upstream.addr().to_string());
    assert_eq!(status.threads, 3);
    assert!(!status.paused && status.paused_since.is_none());
    assert_eq!((status.held, status.connecting, status.active, status.accepted), (0, 0, 0, 0));
    assert_eq!(status.worker_panics, 0);
    assert!(status.leases.is_empty() && status.oldest_seconds.is_none());
    assert_eq!(status.state, "running");
    assert!(status.oldest_held_seconds.is_none() && status.oldest_connecting_seconds.is_none());
    assert!(
        status.upstream_up && status.upstream_error.is_none() && status.upstream_since.is_none()
    );
    assert_eq!(status.upstream_addresses, std::slice::from_ref(&status.upstream));
    assert_eq!(status.listeners, [proxy.addr().to_string()]);
    assert_eq!((status.pid, status.config_file), (proxy.pid(), None));
    assert_eq!(status.hold_max, Some(status.connections_max));
    assert_eq!((status.left, status.drained, status.killed), (0, 0, 0));
    assert_eq!(
        (status.rejected, status.failed, status.bytes_to_upstream, status.bytes_to_client),
        (0, 0, 0, 0)
    );

    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    assert!(proxy.control().status().upstream_since.is_some(), "it has been reached");
    proxy.control().pause();
    let held = proxy.connect_held();
    let later =
        proxy.control().wait_status("the bytes are counted", |status| status.bytes_to_client == 5);
    assert_eq!((later.held, later.active, later.accepted, later.bytes_to_upstream), (1, 1, 2, 5));
    assert!(later.uptime_seconds > status.uptime_seconds);
    assert!(later.oldest_seconds.is_some_and(|age| (0.0..later.uptime_seconds).contains(&age)));
    assert!(
        later.oldest_held_seconds.is_some_and(|age| (0.0..later.uptime_seconds).contains(&age))
    );
    assert!(later.state.contains("s, the oldest client waits for "), "{later:?}");
    drop(held);
    proxy.control().wait_counts(|status| (status.held, status.left), (0, 1));
    // RFC 3339 in UTC: 2026-11-23T17:18:48Z, perhaps with a fraction.
    let since = later.paused_since.unwrap();
    assert!(
        later.paused && since.len() >= 20 && since.as_bytes()[10] == b'T' && since.ends_with('Z'),
        "{since}"
    );
    let response = proxy.control().get("/status");
    assert_eq!(response.header("Content-Type"), Some("application/json"));
}

#[test]
fn the_status_shows_times_to_the_millisecond() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let mut client = proxy.connect();
    client.assert_echo(b"hello");
    assert_eq!(proxy.control().put("/paused?ttl=1h&drain=quiet:123456789ns").status, 201);
    // Hardly one of ten thousand times has no more digits by itself.
    for _ in 0..5 {
        let response = proxy.control().get("/status");
        let (mut times, mut rest) = (0, response.text());
        while let Some((_, after)) = rest.split_once("_seconds\":") {
            let time = after.split([',', '}']).next().unwrap();
            rest = after;
            if time == "null" {
                continue;
            }
            let digits = time.split_once('.').expect(time).1;
            assert!(digits.len() <= 3 && time.parse::<f64>().is_ok(), "{time} in {response}");
            times += 1;
        }
        assert_eq!(times, 4, "{response}");
    }
}

#[test]
fn the_byte_counts_are_exact_for_bulk_too() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let bytes = vec![1; 3 << 20];
    proxy.connect().round_trip(&bytes);
    proxy.control().wait_idle();
    proxy.control().wait_counts(
        |status| (status.bytes_to_upstream, status.bytes_to_client),
        (3 << 20, 3 << 20),
    );
}

#[test]
fn head_works_where_get_does() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    for (target, status) in [("/paused", 200), ("/status", 200), (WAIT, 204), ("/nothing", 404)] {
        let response = proxy.control().request("HEAD", target, &[]);
        assert_eq!((response.status, response.text()), (status, ""), "{target}");
    }
    let response = proxy.control().request("HEAD", "/paused", &[]);
    assert_eq!(response.header("Content-Type"), Some("application/json"));
}

#[test]
fn another_method_is_refused_with_the_list() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let cases: [(&str, &[&str], &[&str]); 3] = [
        ("/paused", &["GET", "HEAD", "PUT", "DELETE"], &["POST", "PATCH"]),
        (WAIT, &["GET", "HEAD"], &["PUT", "DELETE", "POST"]),
        ("/status", &["GET", "HEAD"], &["PUT", "DELETE", "POST"]),
    ];
    for (target, allowed, refused) in cases {
        for method in refused {
            let response = proxy.control().request(method, target, &[]);
            response.assert_error(405);
            let list: Vec<_> =
                response.header("Allow").expect("Allow").split(',').map(str::trim).collect();
            assert!(
                allowed.iter().all(|method| list.contains(method)),
                "{method} {target}: {list:?}"
            );
            assert!(
                !refused.iter().any(|method| list.contains(method)),
                "{method} {target}: {list:?}"
            );
        }
    }
    // HTTP has a code of its own for a method that no server knows.
    let unknown = proxy.control().request("BREW", "/paused", &[]);
    assert!(unknown.status == 405 || unknown.status == 501, "{unknown}");
    assert!(!proxy.control().is_paused());
}

#[test]
fn another_path_is_not_found() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    for target in ["/pause", "/nothing", "/paused/nothing", "/PAUSED", "/pausedd", "/%70aused"] {
        for method in ["GET", "PUT", "DELETE"] {
            proxy.control().request(method, target, &[]).assert_error(404);
        }
    }
    assert!(!proxy.control().is_paused());
}

#[test]
fn a_wrong_parameter_is_a_bad_request() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    for target in ["/paused?verbose=1", "/status?x", "/paused/block-until-idle?wait=1s"] {
        proxy.control().get(target).assert_error(400);
    }
    for timeout in ["ten", "30", "", "-1s", "1s&timeout=2s", "1 s", "1s&x=1", "99999999999h"] {
        let sentence = proxy
            .control()
            .get(&format!("{WAIT}?timeout={timeout}").replace(' ', "%20"))
            .assert_error(400);
        assert!(!sentence.contains('\n'), "{sentence}");
    }
    let sentence = proxy.control().get(&format!("{WAIT}?timeout=30")).assert_error(400);
    assert!(sentence.contains("30s"), "it shows the right form: {sentence}");
    proxy.control().put("/paused?now").assert_error(400);
    assert!(!proxy.control().is_paused());
}

/// Returns whether each call is refused with 403 and changes nothing.
#[track_caller]
fn assert_forbidden(control: &Control, header: &str) {
    let paused = control.is_paused();
    for (method, target) in [
        ("GET", "/paused"),
        ("PUT", "/paused"),
        ("DELETE", "/paused"),
        ("GET", "/status"),
        ("GET", WAIT),
    ] {
        control.request(method, target, &[header]).assert_error(403);
    }
    assert_eq!(control.is_paused(), paused, "{header}");
}

#[test]
fn a_web_page_can_do_nothing() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::tcp(echo);
        let proxy = Proxy::builder().control(family).upstream(&upstream).start();
        for pause in [false, true] {
            if pause {
                proxy.control().pause();
            }
            let own = format!("Origin: http://{}", proxy.control().host());
            for header in [
                "Origin: http://evil.example",
                "Origin: null",
                "origin: http://evil.example",
                &own,
                "Sec-Fetch-Site: cross-site",
                "sec-fetch-site: same-site",
                "Sec-Fetch-Site: Cross-Site",
            ] {
                assert_forbidden(proxy.control(), header);
            }
            // An address that the operator has typed, into a browser that tells so.
            for site in ["none", "same-origin"] {
                let header = format!("Sec-Fetch-Site: {site}");
                assert_eq!(proxy.control().request("GET", "/paused", &[&header]).status, 200);
            }
        }
    }
}

#[test]
fn a_foreign_host_is_refused() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    for host in [
        "evil.example",
        "evil.example:3001",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.example.localhost.example",
    ] {
        assert_forbidden(proxy.control(), &format!("Host: {host}"));
    }
    proxy.control().pause();
    assert_forbidden(proxy.control(), "Host: evil.example");
}

#[test]
fn a_host_of_ours_is_accepted() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .file("tcpause.yml", "control:\n  hosts:\n    - proxy.internal\n    - other.internal\n")
        .start();
    let own = fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_owned();
    for host in [
        "127.0.0.1",
        "127.0.0.1:3001",
        "192.0.2.7",
        "[::1]",
        "[::1]:3001",
        "localhost",
        "LOCALHOST:3001",
        "proxy.internal",
        "other.internal:3001",
        &own,
    ] {
        let response = proxy.control().request("GET", "/paused", &[&format!("Host: {host}")]);
        assert_eq!(response.status, 200, "{host}: {response}");
    }
    assert_forbidden(proxy.control(), "Host: foreign.internal");
}

#[test]
fn the_socket_file_is_for_its_owner() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().control(Family::Unix).upstream(&upstream).start();
    let mode = fs::metadata(proxy.control().addr().path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
}

#[test]
fn listening_beyond_loopback_is_warned_of() {
    let upstream = Upstream::tcp(echo);
    let everywhere = Addr::Tcp("0.0.0.0:0".parse().unwrap());
    let proxy = Proxy::builder()
        .control_at(&everywhere)
        .upstream(&upstream)
        .log_level(Some("warn"))
        .launch();
    let warning = proxy.wait_for_log("control");
    assert!(warning.contains("WARN"), "{warning}");
    // On loopback there is nothing to warn of.
    let mut quiet =
        Proxy::builder().control(Family::Unix).upstream(&upstream).log_level(Some("warn")).launch();
    crate::harness::wait_until("it serves", || quiet.control().probe() == Some(200));
    quiet.terminate();
    assert_eq!(quiet.exit_code(), 0);
    assert_eq!(quiet.log_so_far(), "");
}

#[test]
fn a_connection_may_be_kept_or_not_and_the_body_is_ignored() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    for request in [
        "PUT /paused HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello",
        "PUT /paused HTTP/1.0\r\nHost: localhost\r\n\r\n",
    ] {
        proxy.control().resume();
        let mut stream = proxy.control().addr().connect();
        stream.send(request.as_bytes());
        let response = Response::read(&mut stream);
        assert_eq!(response.status, 201, "{response}");
        assert!(proxy.control().is_paused());
    }
}

/// As `fetch` with a stream, Node's `write()`, Python's generators and `curl -T -` send it.
#[test]
fn a_body_in_chunks_is_read_and_ignored() {
    const CHUNKS: &[&str] = &["4;a=\"b\"\r\nhell", "\r\n1\r", "\no\r\n0\r\nTrailer: x\r\n", "\r\n"];
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let control = proxy.control();
    let begin = |more: &str| {
        control.resume();
        let mut caller = control.addr().connect();
        let head = "PUT /paused HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n";
        caller.send(format!("{head}{more}\r\n").as_bytes());
        caller
    };
    let mut caller = begin("");
    for chunk in CHUNKS {
        assert!(!control.is_paused(), "before {chunk:?}");
        caller.send(chunk.as_bytes());
    }
    assert_eq!(Response::read(&mut caller).status, 201);
    assert!(control.is_paused());

    let mut caller = begin("Expect: 100-continue\r\n");
    let told = "HTTP/1.1 100 Continue\r\n\r\n";
    assert_eq!(caller.receive(told.len()), told.as_bytes());
    caller.send(CHUNKS.concat().as_bytes());
    assert_eq!(Response::read(&mut caller).status, 201);

    // What is behind the last chunk is no request.
    let mut caller = begin("");
    let resume = "DELETE /paused HTTP/1.1\r\nHost: localhost\r\n\r\n";
    caller.send(format!("{}{resume}", CHUNKS.concat()).as_bytes());
    let response = Response::read(&mut caller);
    assert_eq!((response.status, response.text()), (201, ""));
    assert!(control.is_paused());

    let (Some(curl), Addr::Tcp(addr)) = (curl(), control.addr()) else {
        println!("not tried with curl, which is not on this machine");
        return;
    };
    for (bytes, status) in [(0, "201"), (10_000, "201"), (20_000, "413")] {
        control.resume();
        let mut caller = Command::new(curl)
            .args(["-sS", "-o", "/dev/null", "-w", "%{http_code}", "-T", "-"])
            .arg(format!("http://{addr}/paused"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It may be refused before it has sent all.
        drop(caller.stdin.take().unwrap().write_all(&vec![b'x'; bytes]));
        let output = caller.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), status, "{bytes} bytes");
        assert_eq!(control.is_paused(), status == "201");
    }
}

/// As in a container with a read-only root, in an image without directories for files that come and go, and on a full disk.
#[test]
fn it_needs_no_directory_that_can_be_written_to() {
    const WITHOUT: &str = "writes its answers without tiny_http's server";
    const READ_ONLY: &str = "for place in /run /dev/shm /tmp; do mount --bind $place $place && mount -o remount,bind,ro $place || exit; done";
    in_namespace("control::api::it_needs_no_directory_that_can_be_written_to", || {
        let upstream = Upstream::tcp(echo);
        for (then, has_place) in [
            ("mount -t tmpfs none /dev/shm", true),
            ("true", false),
            ("mount -t tmpfs -o nr_inodes=1 none /dev/shm", false),
            // Nor does it need /proc, by which a socket is reached whose file is gone.
            ("mount -t tmpfs none /dev/shm && mount -t tmpfs none /proc", false),
        ] {
            let line = format!("{READ_ONLY} && {then} && exec \"$0\" \"$@\"");
            let mut proxy = Proxy::builder()
                .upstream(&upstream)
                .under(format!("unshare --mount sh -c '{line}'"))
                .env("RUNTIME_DIRECTORY", "/nowhere:/proc")
                .env("TMPDIR", "/proc")
                .start();
            let mut client = proxy.connect();
            client.assert_echo(b"carried");
            let control = proxy.control();
            control.put("/paused?wait=10ms").assert_error(504);
            control.pause();
            let mut held = proxy.connect_held();
            drop(client);
            control.wait_idle();
            assert_eq!(control.put("/paused?wait=10s").status, 201);
            control.resume();
            held.assert_echo(b"resumed");
            assert_eq!(proxy.log_count(WITHOUT) == 0, has_place, "{}", proxy.log_so_far());
            drop(held);
            proxy.terminate();
            assert_eq!(proxy.exit_code(), 0);
        }
    });
}

//! The way to etcd: TLS, users and rights, and each reason for which a host has no place in its fleet. A wrong one is told in
//! the log and to callers of the API, and what was paused stays paused.

use std::path::Path;

use crate::harness::{
    Builder, End, Family, Proxy, Received, Upstream, echo,
    etcd::{Cluster, Transport},
    wait_until,
};

/// Returns a proxy that is to be the host of this name.
fn host(upstream: &Upstream, endpoint: &str, name: &str) -> Builder {
    host_with(upstream, endpoint, name, "5s")
}

fn host_with(upstream: &Upstream, endpoint: &str, name: &str, ttl: &str) -> Builder {
    let builder = Proxy::builder().upstream(upstream).args(["--fleet-ttl", ttl]);
    builder.args(["--fleet-endpoints", endpoint, "--fleet-host", name, "--fleet-start-wait", "1s"])
}

/// Starts a host, and waits until it is a member.
#[track_caller]
fn member(builder: Builder) -> Proxy {
    let proxy = builder.start();
    proxy.wait_for_log("is a member of the fleet");
    proxy
}

/// Asserts that a host that the store keeps out tells `why` in one line, and to each caller that asks for a pause.
#[track_caller]
fn assert_told(proxy: &Proxy, status: u16, kind: &str, why: &str) {
    let line = proxy.wait_for_log("is out of reach: ");
    assert!(line.contains("WARN") && line.contains(why), "{line}");
    assert_refused(proxy, status, kind, why);
    assert_eq!(proxy.log_count("is out of reach: "), 1, "{}", proxy.log_so_far());
}

#[track_caller]
fn assert_refused(proxy: &Proxy, status: u16, kind: &str, why: &str) {
    let answer = proxy.control().put("/fleet/paused?name=more");
    let body = String::from_utf8_lossy(&answer.body);
    assert_eq!(answer.status, status, "{body}");
    assert!(body.contains(&format!("\"kind\":\"{kind}\"")) && body.contains(why), "{body}");
}

#[track_caller]
fn pause(proxy: &Proxy) {
    let answer = proxy.control().put("/fleet/paused?name=first&ttl=60s&wait=10s");
    assert_eq!(answer.status, 201, "{}", String::from_utf8_lossy(&answer.body));
}

#[track_caller]
fn assert_resumes(proxy: &Proxy) {
    assert!(proxy.control().is_paused(), "{}", proxy.log_so_far());
    let answer = proxy.control().delete("/fleet/paused?name=first");
    assert_eq!(answer.status, 204, "{}", String::from_utf8_lossy(&answer.body));
    wait_until("the host has resumed", || !proxy.control().is_paused());
}

/// Gives each user its own name as its password, and switches authentication on. The keys are those of the fleet `default`.
fn enable_users(cluster: &Cluster) {
    let ask = |path: &str, body: String| {
        let answer = cluster.ask(0, &format!("/v3/auth/{path}"), &body);
        assert!(answer.contains("header"), "{path} {body}: {answer}");
    };
    for user in ["root", "tcpause", "guest", "nobody"] {
        ask("user/add", format!("{{\"name\":\"{user}\",\"password\":\"{user}\"}}"));
        ask("role/add", format!("{{\"name\":\"{user}\"}}"));
        ask("user/grant", format!("{{\"user\":\"{user}\",\"role\":\"{user}\"}}"));
    }
    // In base64: from /tcpause/default/ to /tcpause/default0, and the same of member/ and state/ below it.
    let all = ("L3RjcGF1c2UvZGVmYXVsdC8=", "L3RjcGF1c2UvZGVmYXVsdDA=");
    let member = ("L3RjcGF1c2UvZGVmYXVsdC9tZW1iZXIv", "L3RjcGF1c2UvZGVmYXVsdC9tZW1iZXIw");
    let state = ("L3RjcGF1c2UvZGVmYXVsdC9zdGF0ZS8=", "L3RjcGF1c2UvZGVmYXVsdC9zdGF0ZTA=");
    for (role, right, (from, to)) in [
        ("tcpause", "READWRITE", all),
        ("guest", "READ", all),
        ("guest", "READWRITE", member),
        ("guest", "READWRITE", state),
    ] {
        ask(
            "role/grant",
            format!(
                r#"{{"name":"{role}","perm":{{"permType":"{right}","key":"{from}","range_end":"{to}"}}}}"#
            ),
        );
    }
    ask("enable", "{}".to_owned());
}

fn with_ca(builder: Builder, ca_cert: &Path) -> Builder {
    builder.arg("--fleet-tls-ca-cert").arg(ca_cert)
}

fn with_cert(builder: Builder, cert: &Path, key: &Path) -> Builder {
    builder.arg("--fleet-tls-cert").arg(cert).arg("--fleet-tls-key").arg(key)
}

fn with_user(builder: Builder, user: &str, password: &str) -> Builder {
    let builder = builder.file("password", format!("{password}\n"));
    let path = builder.path("password");
    builder.args(["--fleet-username", user, "--fleet-password-file"]).arg(path)
}

#[test]
fn certificates_users_and_rights_let_a_host_in_or_it_tells_why_not() {
    let Some(cluster) = Cluster::start_with(1, Transport::MutualTls, &[]) else { return };
    enable_users(&cluster);
    let (upstream, certs, url) = (Upstream::tcp(echo), &cluster.certs, &cluster.urls()[0]);
    // A request has 3 s then: etcd takes its time for each password.
    let host = |name| host_with(&upstream, url, name, "30s");
    let bare = |name| with_ca(host(name), &certs.ca_cert);
    let known = |name| with_cert(bare(name), &certs.client_cert, &certs.client_key);

    let first = member(with_user(known("first"), "tcpause", "tcpause"));
    let guest = member(with_user(known("guest"), "guest", "guest"));
    pause(&first);
    assert!(guest.control().is_paused(), "{}", guest.log_so_far());
    assert_refused(&guest, 502, "denied", "denies the fleet's keys to this user");
    let table = guest.control().get("/fleet/status");
    assert_eq!(table.status, 200, "{}", String::from_utf8_lossy(&table.body));

    let named = with_cert(bare("named"), &certs.named_cert, &certs.named_key);
    let stranger = with_cert(bare("stranger"), &certs.stranger_cert, &certs.stranger_key);
    let other_ca = with_ca(host("other-ca"), &certs.other_ca_cert);
    let kept_out: Vec<(Proxy, &str)> = [
        (with_user(named, "tcpause", "tcpause"), "no certificate with a CommonName"),
        (stranger, "refuses the certificate of fleet.tls.cert"),
        (other_ca, "is not signed by any authority of fleet.tls.ca-cert"),
        (bare("without"), "asks for a certificate; set fleet.tls.cert and fleet.tls.key"),
        (known("anybody"), "asks for a user; set fleet.username and fleet.password-file"),
        (with_user(known("wrong"), "tcpause", "wrong"), "knows no user tcpause with this password"),
        (with_user(known("nobody"), "nobody", "nobody"), "denies the fleet's keys to this user"),
    ]
    .map(|(builder, why)| (builder.start(), why))
    .into();
    for (proxy, why) in &kept_out {
        assert_told(proxy, 502, "denied", why);
    }
    let wrong_key = with_cert(bare("wrong-key"), &certs.client_cert, &certs.named_key).fail();
    assert!(wrong_key.stderr.contains("does not belong to the certificate"), "{wrong_key:?}");

    assert!(guest.control().is_paused(), "{}", guest.log_so_far());
    assert_resumes(&first);
    wait_until("the guest has resumed", || !guest.control().is_paused());
}

#[test]
fn an_etcd_that_is_away_or_too_old_is_told() {
    let version = r#"{"etcdserver":"3.3.27","etcdcluster":"3.3.0"}"#;
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{version}", version.len());
    let old = Upstream::tcp(move |mut stream| {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.extend(stream.receive(1));
        }
        stream.send(answer.as_bytes());
        Received { bytes: request, end: End::Eof }
    });
    let upstream = Upstream::tcp(echo);
    let url = old.addr().to_string().replace("tcp://", "http://");
    let proxy = host(&upstream, &url, "old").start();
    assert_told(&proxy, 502, "denied", "is of version 3.3.27, which is too old");

    // Nothing listens at the port of discard.
    let proxy = host(&upstream, "http://127.0.0.1:9", "alone").start();
    assert_told(&proxy, 503, "unreachable", "Connection refused");
    wait_until("it serves without etcd", || !proxy.control().is_paused());
}

#[test]
fn a_second_host_of_a_name_is_paused_too_and_pauses_nobody() {
    let Some(cluster) = Cluster::start(1) else { return };
    let (upstream, url) = (Upstream::tcp(echo), &cluster.urls()[0]);
    // Hosts are told apart by their addresses, too.
    let first = member(host(&upstream, url, "twin").listen(Family::Unix));
    let second = host(&upstream, url, "twin").listen(Family::Unix).start();
    assert_told(&second, 502, "denied", "another host of this name has a session");
    wait_until("the second host serves", || !second.control().is_paused());
    pause(&first);
    // It cannot confirm that, but it obeys.
    wait_until("the second host is paused", || second.control().is_paused());
    assert_refused(&second, 502, "denied", "set fleet.host to a name of its own");
    assert_resumes(&first);
    wait_until("the second host has resumed", || !second.control().is_paused());
}

#[test]
fn a_full_etcd_begins_no_pause_and_ends_the_one_that_holds() {
    let quota = &["--quota-backend-bytes=2000000"];
    let Some(cluster) = Cluster::start_with(1, Transport::Plain, quota) else { return };
    let (upstream, url) = (Upstream::tcp(echo), &cluster.urls()[0]);
    let first = member(host(&upstream, url, "first"));
    pause(&first);
    let put = format!(r#"{{"key":"anVuaw==","value":"{}"}}"#, "A".repeat(400_000));
    let mut puts = (0..20).map(|_| cluster.ask(0, "/v3/kv/put", &put));
    assert!(puts.any(|answer| answer.contains("space exceeded")), "etcd takes all");
    let why = "compact and defragment it, then etcdctl alarm disarm";
    assert_refused(&first, 503, "full", why);
    // A newcomer is paused, too, though it cannot join.
    let newcomer = host(&upstream, url, "newcomer").start();
    assert_told(&newcomer, 503, "full", why);
    assert!(newcomer.control().is_paused(), "{}", newcomer.log_so_far());
    assert_resumes(&first);
}

#[test]
fn a_restored_etcd_ends_no_pause_and_is_told() {
    let Some(mut cluster) = Cluster::start(1) else { return };
    let (upstream, url) = (Upstream::tcp(echo), &cluster.urls()[0]);
    let proxy = member(host(&upstream, url, "first"));
    pause(&proxy);
    cluster.restore();
    let why =
        "etcd is another one than before, or was restored from a backup; first holds here until";
    let line = proxy.wait_for_log(why);
    assert!(line.contains("WARN") && proxy.control().is_paused(), "{line}");
    wait_until("the status tells it, too", || {
        let status = proxy.control().get("/status");
        String::from_utf8_lossy(&status.body).contains(why)
    });
    // It is a member of the restored one, whose table shows it as paused.
    wait_until("it has joined again", || {
        let table = proxy.control().get("/fleet/status");
        String::from_utf8_lossy(&table.body).contains(r#""state":"idle""#)
    });
    // The same name once more makes the pause certain, so that it can be lifted.
    pause(&proxy);
    assert_resumes(&proxy);
}

//! Users, passwords and tokens, on a real etcd with its authentication on.

use std::{fs, path::PathBuf, time::Duration};

use tempfile::TempDir;

use super::{
    super::Etcd,
    SHORT, TIMEOUT,
    fake::{Fake, as_etcd, http},
    fixture::{Cluster, Transport},
    found, only, put, range, read, transact,
};
use crate::fleet::store::{Request, Store as _, StoreError, StoreSettings};

/// Sets the user `fleet` up, with the password `secret`, and the rights to `/f/`; then switches authentication on.
pub(super) fn enable(cluster: &Cluster) {
    let (from, to) = ("L2Yv", "L2Yw");
    for (path, body) in [
        ("user/add", r#"{"name":"root","password":"of-root"}"#.to_owned()),
        ("role/add", r#"{"name":"root"}"#.to_owned()),
        ("user/grant", r#"{"user":"root","role":"root"}"#.to_owned()),
        ("user/add", r#"{"name":"fleet","password":"secret"}"#.to_owned()),
        ("role/add", r#"{"name":"member"}"#.to_owned()),
        (
            "role/grant",
            format!(
                r#"{{"name":"member","perm":{{"permType":"READWRITE","key":"{from}","range_end":"{to}"}}}}"#
            ),
        ),
        ("user/grant", r#"{"user":"fleet","role":"member"}"#.to_owned()),
        ("enable", "{}".to_owned()),
    ] {
        let answer = cluster.ask(0, &format!("/v3/auth/{path}"), &body);
        assert!(answer.contains("header"), "{path}: {answer}");
    }
}

pub(super) fn password(text: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("password");
    fs::write(&path, text).unwrap();
    (dir, path)
}

fn settings(cluster: &Cluster, user: &str, path: PathBuf) -> StoreSettings {
    StoreSettings {
        endpoints: cluster.urls(),
        username: Some(user.to_owned()),
        password_file: Some(path),
        ..StoreSettings::default()
    }
}

#[track_caller]
fn denied(settings: &StoreSettings) -> String {
    match read(&mut Etcd::new(settings).unwrap(), TIMEOUT) {
        Err(StoreError::Denied(text)) => {
            assert!(text.contains(&settings.endpoints[0]) && !text.contains('\n'), "{text}");
            text
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn users_and_their_rights() {
    let Some(cluster) = Cluster::start(1) else { return };
    let (_dir, path) = password("secret\n");
    // A password for a store without authentication: it may come later.
    let mut etcd = Etcd::new(&settings(&cluster, "fleet", path.clone())).unwrap();
    transact(&mut etcd, only(vec![put("/f/a", "1", None)])).unwrap();
    enable(&cluster);
    assert_eq!(found(read(&mut etcd, TIMEOUT).unwrap()).len(), 1);

    // Elsewhere it has no rights, and those below `/f/` are not lost with that.
    let elsewhere = Request::Transact(only(vec![range("/g/")]));
    let error = etcd.ask(&elsewhere, TIMEOUT).unwrap_err();
    let StoreError::Denied(text) = error else { panic!("{error:?}") };
    assert!(text.contains("permission denied") && text.contains("fleet.prefix"), "{text}");
    read(&mut etcd, TIMEOUT).unwrap();

    let nobody = StoreSettings { endpoints: cluster.urls(), ..StoreSettings::default() };
    assert!(denied(&nobody).contains("set fleet.username"), "{}", denied(&nobody));
    let text = denied(&settings(&cluster, "flee", path));
    assert!(text.contains("no user flee with this password"), "{text}");
    let (_dir, path) = password("wrong");
    let text = denied(&settings(&cluster, "fleet", path));
    assert!(text.contains("no user fleet with this password"), "{text}");
}

#[test]
fn a_token_that_has_ended_is_replaced() {
    let ttl = ["--auth-token-ttl", "1"];
    let Some(cluster) = Cluster::start_with(1, Transport::Plain, &ttl) else { return };
    enable(&cluster);
    let (_dir, path) = password("secret");
    let mut etcd = Etcd::new(&settings(&cluster, "fleet", path)).unwrap();
    read(&mut etcd, TIMEOUT).unwrap();
    let first = etcd.shared.token();
    Cluster::await_token_end(Duration::from_secs(1));
    read(&mut etcd, TIMEOUT).unwrap();
    assert_ne!(etcd.shared.token(), first);
}

/// Returns a server that denies all tokens but the second one.
fn denying(status: &'static str, problem: &'static str) -> Fake {
    let logins = std::sync::atomic::AtomicUsize::new(0);
    Fake::start(as_etcd(move |head, _| {
        if head.starts_with("POST /v3/auth/authenticate ") {
            let number = logins.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
            return http("200 OK", &format!(r#"{{"token":"token.{number}"}}"#));
        }
        if head.contains("authorization: token.2\r\n") {
            let header = r#""header":{"cluster_id":"1","member_id":"2","revision":"3"}"#;
            return http(
                "200 OK",
                &format!(
                    "{{{header},\"succeeded\":true,\"responses\":[{{\"response_range\":{{}}}}]}}"
                ),
            );
        }
        http(status, problem)
    }))
}

#[test]
fn each_denial_is_tried_once_more_with_a_new_token() {
    for (status, problem) in [
        ("401 Unauthorized", r#"{"message":"etcdserver: invalid auth token","code":16}"#),
        ("403 Forbidden", r#"{"message":"etcdserver: permission denied","code":7}"#),
        ("400 Bad Request", r#"{"message":"etcdserver: revision of auth store is old","code":3}"#),
        ("400 Bad Request", r#"{"message":"etcdserver: user name is empty","code":3}"#),
    ] {
        let (_dir, path) = password("secret");
        let fake = denying(status, problem);
        let settings = StoreSettings {
            endpoints: vec![fake.url()],
            username: Some("fleet".to_owned()),
            password_file: Some(path),
            ..StoreSettings::default()
        };
        let mut etcd = Etcd::new(&settings).unwrap();
        read(&mut etcd, SHORT).unwrap();
        // A third token would be denied, and is not asked for.
        read(&mut etcd, SHORT).unwrap();
        // A second denial in one request is told.
        etcd.shared.set_token("token.3".to_owned());
        let error = read(&mut etcd, SHORT).unwrap_err();
        assert!(matches!(error, StoreError::Denied(_)), "{error:?}");
    }
}

#[test]
fn user_and_password_are_checked_at_the_start() {
    let (_dir, empty) = password("\n");
    let (_other, good) = password("secret");
    let base = StoreSettings {
        endpoints: vec!["http://127.0.0.1:1".to_owned()],
        ..StoreSettings::default()
    };
    let user = || Some("fleet".to_owned());
    for (username, password_file, problem) in [
        (user(), None, "fleet.username: it needs fleet.password-file"),
        (None, Some(good), "fleet.password-file: it needs fleet.username"),
        (user(), Some(empty), "it is empty"),
        (user(), Some("/none/such".into()), "/none/such: cannot read it"),
    ] {
        let settings = StoreSettings { username, password_file, ..base.clone() };
        let error = Etcd::new(&settings).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
    }
}

#[test]
fn a_password_is_not_shown() {
    let (_dir, path) = password("secret");
    let settings = StoreSettings {
        endpoints: vec!["http://127.0.0.1:1".to_owned()],
        username: Some("fleet".to_owned()),
        password_file: Some(path),
        ..StoreSettings::default()
    };
    assert!(!format!("{:?}", Etcd::new(&settings).unwrap()).contains("secret"));
}

/// Etcd's gateway refuses certificates that name a user where its authentication is on.
#[test]
fn a_certificate_with_a_common_name_is_explained() {
    let Some(cluster) = Cluster::start_with(1, Transport::MutualTls, &[]) else { return };
    enable(&cluster);
    let (_dir, path) = password("secret");
    let certs = &cluster.certs;
    let unnamed = StoreSettings {
        ca_cert: Some(certs.ca_cert.clone()),
        cert: Some(certs.client_cert.clone()),
        key: Some(certs.client_key.clone()),
        ..settings(&cluster, "fleet", path)
    };
    read(&mut Etcd::new(&unnamed).unwrap(), TIMEOUT).unwrap();
    let named = StoreSettings {
        cert: Some(certs.named_cert.clone()),
        key: Some(certs.named_key.clone()),
        ..unnamed
    };
    let text = denied(&named);
    assert!(text.contains("CommonName") && text.contains("use one without"), "{text}");
}

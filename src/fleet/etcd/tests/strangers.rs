//! Endpoints that are no etcd, or none that can be used, and words that differ from version to version.

use std::{
    net::{Ipv4Addr, TcpListener},
    sync::atomic::{AtomicUsize, Ordering},
};

use super::{
    super::{
        answer::{self, HttpAnswer},
        failure,
        words::{self, WatchLine},
    },
    SHORT, TIMEOUT, client,
    fake::{Fake, as_etcd, http},
    read,
};
use crate::fleet::store::{Answer, LeaseId, Request, Store as _, StoreError};

/// Asks a server, and returns its error and the text of that. The text must be one line that names the endpoint.
#[track_caller]
fn refused(fake: &Fake) -> (StoreError, String) {
    let error = read(&mut client(&[fake.url()]), SHORT).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&fake.url()) && !text.contains('\n') && text.len() < 500, "{text}");
    (error, text)
}

#[test]
fn an_old_etcd_is_refused_with_its_version() {
    let version =
        |_: &str, _: &str| http("200 OK", r#"{"etcdserver":"3.3.25","etcdcluster":"3.3.0"}"#);
    let (error, text) = refused(&Fake::start(version));
    assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
    assert!(text.contains("3.3.25") && text.contains("3.4 or later"), "{text}");
}

#[test]
fn versions_are_compared_as_numbers() {
    for (version, is_taken) in [
        ("2.3.8", false),
        ("3.3.25", false),
        ("3.4.0", true),
        ("3.10.1", true),
        ("4.0.0", true),
        ("3.6.0-rc.3", true),
        ("3.7.0-alpha.0", true),
        ("three", false),
        ("", false),
    ] {
        let body = format!("{{\"etcdserver\":\"{version}\"}}");
        let answer =
            HttpAnswer { status: 200, location: None, body: body.into_bytes(), connection: None };
        let checked = words::check_version("http://a:1", &answer);
        assert_eq!(checked.is_ok(), is_taken, "{version}: {checked:?}");
    }
}

#[test]
fn a_web_server_is_no_etcd() {
    for answer in [
        http("200 OK", "<html>\n<b>Welcome</b></html>"),
        http("404 Not Found", "nothing here"),
        http("200 OK", "{}"),
        http("200 OK", "[]"),
        http("503 Service Unavailable", "later"),
    ] {
        let fake = Fake::start(move |_, _| answer.clone());
        let (error, text) = refused(&fake);
        assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
        assert!(text.contains("is no etcd"), "{text}");
    }
}

#[test]
fn a_redirect_is_not_followed() {
    let target = "http://192.0.2.1/version";
    let answer = format!("HTTP/1.1 301 Moved\r\nlocation: {target}\r\ncontent-length: 0\r\n\r\n");
    let fake = Fake::start(move |_, _| answer.clone().into_bytes());
    let (error, text) = refused(&fake);
    assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
    assert!(text.contains("leads elsewhere") && text.contains(target), "{text}");
}

#[test]
fn a_server_of_another_protocol_is_named() {
    let fake = Fake::start(|_, _| b"SSH-2.0-OpenSSH_9.2\r\n\r\n".to_vec());
    let (_, text) = refused(&fake);
    assert!(text.contains("does not speak HTTP"), "{text}");
}

#[test]
fn a_silent_server_is_unreachable_before_and_a_timeout_behind_its_version() {
    let (error, text) = refused(&Fake::start(|_, _| Vec::new()));
    assert!(matches!(error, StoreError::Unreachable(_)), "{error:?}");
    assert!(text.contains("no answer in time"), "{text}");
    let (error, text) = refused(&Fake::start(as_etcd(|_, _| Vec::new())));
    assert!(matches!(error, StoreError::TimedOut(_)), "{error:?}");
    assert!(text.contains("no answer in time"), "{text}");
}

#[test]
fn unreachable_endpoints_are_all_named() {
    // Bound and closed again: nobody listens there.
    let free = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let urls = [format!("http://{}", free()), format!("http://{}", free())];
    let error = read(&mut client(&urls), TIMEOUT).unwrap_err();
    let StoreError::Unreachable(text) = error else { panic!("{error:?}") };
    assert!(urls.iter().all(|url| text.contains(url)) && text.contains("refused"), "{text}");
    let none = ["http://no-such-host.invalid:2379".to_owned()];
    let error = read(&mut client(&none), TIMEOUT).unwrap_err();
    let StoreError::Unreachable(text) = error else { panic!("{error:?}") };
    assert!(text.contains("no such host"), "{text}");
}

#[test]
fn corrupt_answers_may_have_been_carried_out() {
    let header = r#""header":{"cluster_id":"1","member_id":"2","revision":"3"}"#;
    for body in [
        "{}".to_owned(),
        "<html>".to_owned(),
        String::new(),
        r#"{"header":{"revision":"3"},"succeeded":true,"responses":[{"response_range":{}}]}"#
            .to_owned(),
        format!("{{{header},\"succeeded\":true}}"),
        format!("{{{header},\"succeeded\":true,\"responses\":[{{}}]}}"),
        format!(
            "{{{header},\"succeeded\":true,\"responses\":[{{\"response_range\":{{\"kvs\":[{{\"key\":\"%\"}}]}}}}]}}"
        ),
    ] {
        let answer = http("200 OK", &body);
        let fake = Fake::start(as_etcd(move |_, _| answer.clone()));
        let (error, text) = refused(&fake);
        assert!(matches!(error, StoreError::TimedOut(_)), "{body}: {error:?}");
        assert!(text.contains("cannot be read"), "{text}");
    }
}

#[test]
fn answers_are_bounded() {
    let fake = Fake::start(as_etcd(|_, _| http("200 OK", &" ".repeat((2 << 20) + 1))));
    let (error, text) = refused(&fake);
    assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
    assert!(text.contains("more than 2 MiB"), "{text}");
}

#[test]
fn a_member_that_stops_is_left_for_the_next() {
    let stopping = Fake::start(as_etcd(|_, _| http("503 Service Unavailable", "stopping")));
    let unavailable =
        r#"{"error":"etcdserver: no leader","message":"etcdserver: no leader","code":14}"#;
    let leaderless = Fake::start(as_etcd(|_, _| http("503 Service Unavailable", unavailable)));
    let sound = Fake::start(as_etcd(|_, _| {
        http(
            "200 OK",
            r#"{"header":{"cluster_id":1,"member_id":"2","revision":"3"},"ID":9,"TTL":"5"}"#,
        )
    }));
    let mut etcd = client(&[stopping.url(), leaderless.url(), sound.url()]);
    let reply = etcd.ask(&Request::Grant { ttl: SHORT * 5 }, TIMEOUT).unwrap();
    assert_eq!(reply.answer, Answer::Granted { lease: LeaseId(9), ttl: SHORT * 5 });
    let (error, text) = refused(&leaderless);
    assert!(matches!(error, StoreError::TimedOut(_)) && text.contains("no leader"), "{error:?}");
}

/// One misconfigured endpoint is passed over while another one answers, and told if none does.
#[test]
fn a_refusal_goes_before_a_failure() {
    let web = Fake::start(|_, _| http("200 OK", "hello"));
    let none = "http://127.0.0.1:9".to_owned();
    let error = read(&mut client(&[none, web.url()]), TIMEOUT).unwrap_err();
    assert!(
        matches!(&error, StoreError::Refused(text) if text.contains("is no etcd")),
        "{error:?}"
    );
}

/// A refusal must not hide that an attempt before it may have been carried out.
#[test]
fn failures_are_summed_up() {
    let unreachable = |text: &str| StoreError::Unreachable(text.to_owned());
    let timed_out = |text: &str| StoreError::TimedOut(text.to_owned());
    let full = || StoreError::Full("c".to_owned());
    for (failures, sum) in [
        (vec![unreachable("a"), unreachable("a")], unreachable("a")),
        (vec![unreachable("a"), unreachable("b")], unreachable("a; b")),
        (vec![unreachable("a"), timed_out("b")], timed_out("a; b")),
        (vec![unreachable("a"), full()], full()),
        (vec![timed_out("a"), full()], timed_out("a; c")),
    ] {
        assert_eq!(failure::sum(&failures), sum);
    }
}

/// A balancer may spread the requests of one connection over members.
#[test]
fn another_member_behind_one_connection_has_another_number() {
    let count = AtomicUsize::new(0);
    let fake = Fake::start(as_etcd(move |_, _| {
        let member = count.fetch_add(1, Ordering::SeqCst) / 2;
        let header =
            format!(r#""header":{{"cluster_id":"1","member_id":"{member}","revision":"3"}}"#);
        http(
            "200 OK",
            &format!("{{{header},\"succeeded\":true,\"responses\":[{{\"response_range\":{{}}}}]}}"),
        )
    }));
    let mut etcd = client(&[fake.url()]);
    let mut number = || read(&mut etcd, TIMEOUT).unwrap().connection;
    let numbers = [number(), number(), number(), number()];
    assert_eq!((numbers[0], numbers[2]), (numbers[1], numbers[3]));
    assert_ne!(numbers[0], numbers[2]);
}

#[test]
fn problems_are_read_in_the_words_of_all_versions() {
    for body in [
        r#"{"error":"no","message":"no","code":5}"#,
        r#"{"code":5,"message":"no","details":[]}"#,
        r#"{"error":{"grpc_code":5,"http_code":404,"message":"no"}}"#,
        r#"{"error":{"code":5,"message":"no","details":[]}}"#,
    ] {
        assert_eq!(answer::decode_problem(body.as_bytes()), Some((5, "no".to_owned())), "{body}");
    }
    assert_eq!(answer::decode_problem(b"{}"), None);
    assert_eq!(answer::decode_problem(b"gone"), None);
}

#[test]
fn lines_of_a_watch() {
    let ended = |text: &str| WatchLine::Ended(text.to_owned());
    for (line, meaning) in [
        (r#"{"result":{"header":{},"created":true}}"#, WatchLine::Created),
        (r#"{"result":{"header":{},"events":[{"kv":{"key":"YQ=="}}]}}"#, WatchLine::Changed),
        (r#"{"result":{"header":{}}}"#, WatchLine::Other),
        (r#"{"result":{"created":true,"canceled":true,"cancel_reason":"no"}}"#, ended("no")),
        (r#"{"result":{"canceled":true,"events":[{}]}}"#, ended("")),
        (r#"{"error":{"grpc_code":14,"message":"no leader"}}"#, ended("no leader")),
    ] {
        assert_eq!(words::decode_watch(line.as_bytes()), meaning, "{line}");
    }
    assert!(matches!(words::decode_watch(b"<html>"), WatchLine::Ended(_)));
}

#[test]
fn ttls_are_rounded_up() {
    let ttl = std::time::Duration::from_millis(5_001);
    assert_eq!(words::encode(&Request::Grant { ttl }).1, r#"{"TTL":"6"}"#);
}

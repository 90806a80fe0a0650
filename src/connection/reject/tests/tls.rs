//! Rejection inside TLS: alerts, handshakes and their permits.

use super::*;

#[test]
fn a_tls_client_gets_an_alert_where_no_certificate_is() {
    let mut scene = Scene::new(None);
    scene.send(&[TLS_HANDSHAKE, 3, 1]);
    assert_eq!(scene.drive(), Next::Answered);
    scene.assert_received(&[0x15, 3, 3, 0, 2, 2, 40]);
}

#[test]
fn a_tls_client_gets_the_answer_inside() {
    let authority = Authority::new();
    let mut scene = Scene::new(Some(server_config(&authority)));
    let mut tls = tls_client(&authority, None);
    tls.writer().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let results = converse(&mut scene, &mut tls).unwrap();
    assert_eq!(results.last(), Some(&Next::Answered));
    assert_eq!(plain_text(&mut tls).unwrap(), ANSWER, "closed by close_notify");
    assert!(matches!(scene.reject, Reject::Lingering { .. }));
}

#[test]
fn a_tls_client_that_asks_for_nothing_is_answered_when_its_time_is_up() {
    let authority = Authority::new();
    let mut scene = Scene::new(Some(server_config(&authority)));
    let mut tls = tls_client(&authority, None);
    let results = converse(&mut scene, &mut tls).unwrap();
    assert!(!tls.is_handshaking());
    assert!(results.contains(&Next::WaitIn(Deadline::AwaitingRequest)), "{results:?}");
    assert!(plain_text(&mut tls).is_err(), "nothing yet");
    assert_eq!(scene.expire(), Next::Answered);
    converse(&mut scene, &mut tls).unwrap();
    assert_eq!(plain_text(&mut tls).unwrap(), ANSWER);
}

#[test]
fn a_client_certificate_is_welcome_but_must_be_right() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    for (own, is_right) in [(None, true), (Some(&authority), true), (Some(&stranger), false)] {
        let mut scene = Scene::new(Some(server_config(&authority)));
        let mut tls = tls_client(&authority, own);
        tls.writer().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let result = converse(&mut scene, &mut tls);
        if is_right {
            result.unwrap();
            assert_eq!(plain_text(&mut tls).unwrap(), ANSWER);
        } else {
            let error = result.unwrap_err();
            assert!(matches!(error, rustls::Error::AlertReceived(_)), "{error:?}");
            assert!(matches!(scene.reject, Reject::Lingering { .. }));
        }
    }
}

#[test]
fn rubbish_that_looks_like_tls_gets_an_alert() {
    let mut scene = Scene::new(Some(server_config(&Authority::new())));
    scene.send(&[TLS_HANDSHAKE]);
    scene.begin_handshake();
    scene.send(b" GET / HTTP/1.1\r\n\r\n");
    assert_eq!(scene.drive(), Next::Answered);
    let (bytes, ended) = scene.received();
    assert!(bytes.starts_with(&[0x15, 3]) && bytes.len() == 7, "{bytes:?}");
    assert!(ended);
}

#[test]
fn a_tls_client_that_talks_without_asking_is_closed() {
    let authority = Authority::new();
    let mut scene = Scene::new(Some(server_config(&authority)));
    let mut tls = tls_client(&authority, None);
    converse(&mut scene, &mut tls).unwrap();
    let Reject::Tls { received, .. } = &mut scene.reject else {
        panic!("it waits for the request")
    };
    *received = UNASKED_BYTES_MAX;
    // A record without content.
    tls.refresh_traffic_keys().unwrap();
    let mut out = Vec::new();
    tls.write_tls(&mut out).unwrap();
    scene.send(&out);
    assert_eq!(scene.drive_on(), Next::Close);
}

#[test]
fn a_handshake_that_stops_halfway_is_given_up() {
    let authority = Authority::new();
    let mut scene = Scene::new(Some(server_config(&authority)));
    let mut hello = Vec::new();
    tls_client(&authority, None).write_tls(&mut hello).unwrap();
    scene.send(&hello[..hello.len() / 2]);
    scene.begin_handshake();
    assert_eq!(scene.drive_on(), Next::Wait);
    assert_eq!(scene.expire(), Next::Close);
    assert_eq!(scene.received(), (vec![], false), "no plain text inside a TLS stream");
}

#[test]
fn a_client_that_leaves_in_its_handshake_is_closed() {
    let mut scene = Scene::new(Some(server_config(&Authority::new())));
    scene.send(&[TLS_HANDSHAKE]);
    scene.begin_handshake();
    scene.peer().shut_down_write().unwrap();
    assert_eq!(scene.drive_on(), Next::Close);
}

#[test]
fn a_tls_client_without_a_permit_waits_until_its_time_is_up() {
    let authority = Authority::new();
    let mut scene = Scene::new(Some(server_config(&authority)));
    let mut hello = Vec::new();
    tls_client(&authority, None).write_tls(&mut hello).unwrap();
    scene.send(&hello);
    assert_eq!(scene.drive(), Next::WaitIn(Deadline::AwaitingHandshake));
    assert_eq!(scene.drive(), Next::Wait);
    assert_eq!(scene.client.peek(&mut [0; 1024]), Received::Bytes(hello.len()), "untouched");
    assert_eq!(scene.expire(), Next::Answered);
    scene.assert_received(&TLS_REFUSAL);
}

#[test]
fn a_handshake_takes_a_step_at_a_time_as_far_as_the_turn_allows() {
    let authority = Authority::new();
    let mut scene = Scene::new(Some(server_config(&authority)));
    let mut hello = Vec::new();
    tls_client(&authority, None).write_tls(&mut hello).unwrap();
    // One byte in each record.
    let fragments: Vec<u8> = hello[5..].iter().flat_map(|&byte| [0x16, 3, 1, 0, 1, byte]).collect();
    scene.send(&fragments);
    scene.begin_handshake();
    scene.steps = 0;
    assert_eq!(scene.drive(), Next::Again);
    assert_eq!(scene.client.peek(&mut [0; 4096]), Received::Bytes(fragments.len()), "untouched");
    scene.steps = 2;
    let mut steps = scene.steps;
    let next = scene.reject.drive(&mut scene.client, &scene.reject_policy, &mut [], &mut steps);
    assert_eq!((next, steps), (Next::Wait, 1), "nothing more was there");
    assert!(!scene.received().0.is_empty(), "the server's part of the handshake");
}

#[test]
fn a_handshake_is_free_again_when_its_client_has_gone() {
    let semaphore = Arc::new(Semaphore::new(1));
    let mut scene = Scene::new(Some(server_config(&Authority::new())));
    scene.send(&[TLS_HANDSHAKE]);
    assert_eq!(scene.drive(), Next::WaitIn(Deadline::AwaitingHandshake));
    scene.reject.begin_handshake(
        &mut scene.client,
        semaphore.take().unwrap(),
        &scene.reject_policy,
    );
    assert!(semaphore.take().is_none());
    scene.send(b"rubbish that ends the handshake");
    assert_eq!(scene.drive_on(), Next::Answered);
    assert!(semaphore.take().is_some());
}

#[test]
fn a_client_that_says_goodbye_in_its_handshake_is_let_go() {
    let mut scene = Scene::new(Some(server_config(&Authority::new())));
    // The alert close_notify, behind half a hello or in its place.
    scene.send(b"\x16\x03\x01\0\x01\x01\x15\x03\x03\0\x02\x01\0");
    scene.begin_handshake();
    assert_eq!(scene.drive_on(), Next::Answered);
    let (bytes, ended) = scene.received();
    assert!(bytes.len() <= 7 && ended, "an alert at most: {bytes:?}");
}

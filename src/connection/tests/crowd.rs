//! Clients with a share of the window whose SYN finds no room in the upstream's backlog.

use super::*;

/// Starts a client at an upstream that is known to answer at once, but whose backlog is full now.
fn serve_lost(bench: &mut Bench) -> (Socket, Connection) {
    let (listener, address) = tcp_listener();
    let (near, _) = Socket::dial(&address, None).unwrap();
    accept(&listener);
    bench.pace.take(bench.now).unwrap().answered(&near, bench.now);
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.now += Duration::from_millis(1);
    let verdict = bench.serve(&mut connection);
    assert!(matches!(verdict, Verdict::Wait(Deadline::Unanswered)), "{verdict:?}");
    (client, connection)
}

#[test]
fn a_client_whose_syn_is_lost_waits_for_the_window_again() {
    let (full, listener) = full_tcp_listener();
    let mut bench = Bench::new(&full);
    let (_client, mut connection) = serve_lost(&mut bench);
    bench.now += Duration::from_millis(19);
    let verdict = bench.act(|context| connection.expire(context));
    assert!(matches!(verdict, Verdict::Wait(Deadline::Unanswered)), "{verdict:?}");
    bench.now += Duration::from_millis(1);
    let verdict = bench.act(|context| connection.expire(context));
    assert!(matches!(verdict, Verdict::Hold), "{verdict:?}");
    connection.hold(None);
    assert_eq!((bench.gate.passes(), bench.pace.window().max()), (0, 1));
    // Now the backlog has room.
    listen(&listener.0, 16).unwrap();
    bench.serve(&mut connection);
    bench.until_relaying(&mut connection);
}

#[test]
fn a_client_whose_syn_is_lost_goes_on_to_the_next_address() {
    let (full, _listener) = full_tcp_listener();
    let (listener, address) = tcp_listener();
    let mut bench = Bench::nowhere();
    bench.upstream.publish([full, address].into());
    let (_client, mut connection) = serve_lost(&mut bench);
    bench.now += Duration::from_millis(20);
    bench.act(|context| connection.expire(context));
    bench.until_relaying(&mut connection);
    accept(&listener);
    assert_eq!(
        bench.pace.window().max(),
        2,
        "the window is not halved, as another address has room"
    );
}

#[test]
fn the_kernel_repeats_the_syn_of_a_client_that_bypasses_a_pause() {
    let (full, listener) = full_tcp_listener();
    let mut bench = Bench::new(&full);
    let (_client, mut connection) = serve_lost(&mut bench);
    bench.gate.pause(Mode::Hold);
    bench.now += Duration::from_millis(20);
    let verdict = bench.act(|context| connection.expire(context));
    assert!(matches!(verdict, Verdict::WaitSince(Deadline::ConnectingLast, _)), "{verdict:?}");
    listen(&listener.0, 16).unwrap();
    bench.until_relaying(&mut connection);
}

#[test]
fn an_attempt_without_time_left_opens_the_breaker() {
    let (full, _listener) = full_tcp_listener();
    let mut bench = Bench::new(&full);
    let (_client, mut connection) = serve_lost(&mut bench);
    bench.now += bench.upstream.connect_timeout();
    let verdict = bench.act(|context| connection.expire(context));
    let Verdict::Close(cause @ CloseCause::Unreachable) = verdict else { panic!("{verdict:?}") };
    assert!(bench.upstream.breaker().is_open());
    bench.close(connection, cause);
}

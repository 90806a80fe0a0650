//! Clients whose upstream is away.

use rustix::io::Errno;

use super::*;

#[test]
fn a_refused_client_is_reset_in_the_end_and_gives_its_pass_back() {
    let mut bench = Bench::nowhere();
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve_refused(&mut connection);
    bench.now += bench.upstream.connect_timeout();
    let verdict = bench.act(|context| connection.expire(context));
    let Verdict::Close(cause @ CloseCause::Unreachable) = verdict else { panic!("{verdict:?}") };
    let error = connection.take_error(&bench.upstream).map(|error| error.kind());
    assert_eq!(error, Some(io::ErrorKind::ConnectionRefused));
    bench.close(connection, cause);
    assert_eq!(read(&client).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn a_refused_client_is_served_once_the_upstream_is_there() {
    let mut bench = Bench::nowhere();
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve_refused(&mut connection);
    let (listener, address) = tcp_listener();
    bench.upstream.publish([address].into());
    let permit = bench.upstream.breaker().take_probe().unwrap();
    let ticket = ConnectTicket::Probe { _permit: permit, under_way: None };
    bench.release(&mut connection, ticket);
    bench.until_relaying(&mut connection);
    assert!(!bench.upstream.breaker().is_open() && bench.dialer.take_end_of_outage());
    assert!(bench.upstream.breaker().take_probe().is_some(), "the permit is given back");
    accept(&listener);
}

#[test]
fn a_client_that_comes_during_an_outage_waits_without_a_dial() {
    let mut bench = Bench::nowhere();
    bench.upstream.breaker().failed(Cause::Away, false, bench.now);
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.now += Duration::from_secs(1);
    let verdict = bench.act(|context| connection.begin_patience(context));
    assert!(
        matches!(verdict, Verdict::WaitSince(Deadline::AwaitingUpstream, since) if since == bench.now),
        "{verdict:?}"
    );
    assert_eq!((bench.dialer.dials, bench.gate.passes()), (0, 0));
    let verdict = bench.act(|context| connection.end_patience(context));
    assert!(matches!(verdict, Verdict::Hold), "{verdict:?}");
    // Its reason is that of the client that has dialled meanwhile, and not the time that it has waited.
    bench.upstream.remember_error(&Errno::CONNREFUSED.into());
    let error = connection.take_error(&bench.upstream).map(|error| error.kind());
    assert_eq!(error, Some(io::ErrorKind::ConnectionRefused));
}

#[test]
fn a_client_that_bypasses_a_pause_and_is_refused_is_held_again() {
    let mut bench = Bench::nowhere();
    bench.gate.pause(Mode::Hold);
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    let pass = bench.gate.enter_bypassing();
    bench.now += Duration::from_secs(1);
    let mut verdict =
        bench.act(|context| connection.start_attempt(pass, ConnectTicket::Alone, context));
    if matches!(verdict, Verdict::WaitSince(Deadline::ConnectingLast, _)) {
        verdict = bench.until(&mut connection, |_, verdict| !matches!(verdict, Verdict::Stay));
    }
    assert!(matches!(verdict, Verdict::Hold), "{verdict:?}");
    assert_eq!(bench.gate.passes(), 0);
}

#[test]
fn the_upstream_is_not_dialled_again_for_a_refused_client_that_leaves() {
    let mut bench = Bench::nowhere();
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve_refused(&mut connection);
    drop(client);
    let cause = bench.cause(&mut connection);
    assert_eq!(cause, CloseCause::LeftConnecting);
    bench.close(connection, cause);
}

#[test]
fn a_refused_client_is_held_when_a_pause_comes() {
    let mut bench = Bench::nowhere();
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve_refused(&mut connection);
    assert_eq!(bench.gate.passes(), 0, "it does not delay the pause");
    let verdict = bench.act(|context| connection.end_patience(context));
    assert!(matches!(verdict, Verdict::Hold), "{verdict:?}");
}

/// Once the client waits, no event reports again that it has left.
#[test]
fn a_client_that_has_left_while_connecting_does_not_wait() {
    let (silent, _full) = full_tcp_listener();
    let mut bench = Bench::new(&silent);
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve(&mut connection);
    drop(client);
    bench.until(&mut connection, |it, verdict| {
        assert!(matches!(verdict, Verdict::Stay), "{verdict:?}");
        it.client.is_read_closed()
    });
    let timeout = io::ErrorKind::TimedOut.into();
    let verdict = bench.act(|context| connection.give_up_attempt(timeout, context));
    assert!(matches!(verdict, Verdict::Close(CloseCause::LeftConnecting)), "{verdict:?}");
}

#[test]
fn a_bypass_of_an_earlier_pause_does_not_hold_in_another() {
    let mut bench = Bench::nowhere();
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.gate.pause(Mode::Hold);
    let pass = bench.gate.enter_bypassing();
    bench.act(|context| connection.start_attempt(pass, ConnectTicket::Alone, context));
    bench.gate.resume();
    let refused = io::ErrorKind::ConnectionRefused.into();
    let verdict = bench.act(|context| connection.give_up_attempt(refused, context));
    assert!(matches!(verdict, Verdict::WaitSince(Deadline::AwaitingUpstream, _)), "{verdict:?}");
    assert_eq!(bench.gate.passes(), 0);
    let dials = bench.dialer.dials;
    bench.gate.pause(Mode::Hold);
    let verdict = bench.act(|context| connection.end_patience(context));
    assert!(matches!(verdict, Verdict::Hold), "{verdict:?}");
    assert_eq!(bench.dialer.dials, dials);
}

#[test]
fn a_full_unix_backlog_is_tried_again_until_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("upstream.sock");
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let socket = socket.unwrap();
    bind(&socket, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&socket, 0).unwrap();
    let listener = UnixListener::from(socket);
    let address = SocketAddress::Unix(path);
    let mut waiting = Vec::new();
    while let Ok((socket, _)) = Socket::dial(&address, None) {
        waiting.push(socket);
    }
    assert!((1..10).contains(&waiting.len()), "the backlog is full");

    let mut bench = Bench::new(&address);
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    let since = bench.now;
    for window in [1, 1] {
        let verdict = bench.serve(&mut connection);
        assert!(
            matches!(verdict, Verdict::WaitSince(Deadline::AwaitingUpstream, at) if at == since),
            "{verdict:?}"
        );
        assert_eq!((bench.gate.passes(), bench.pace.window().max()), (0, window));
        bench.now += Duration::from_millis(10);
        assert_eq!(bench.upstream.breaker().probe_at(), Some(since + Duration::from_millis(1)));
    }
    listener.accept().unwrap();
    let verdict = bench.release(&mut connection, ConnectTicket::Alone);
    assert!(matches!(verdict, Verdict::Enter(Deadline::NoKeepaliveYet)), "{verdict:?}");
}

#[test]
fn a_name_that_stays_unknown_is_given_up_in_time() {
    let (client, accepted) = tcp_pair();
    let mut bench = Bench::nowhere();
    bench.upstream.publish([].into());
    let mut connection = bench.connection(accepted);
    let verdict = bench.serve(&mut connection);
    assert!(
        matches!(verdict, Verdict::WaitSince(Deadline::AwaitingUpstream, _)),
        "the name is unknown: {verdict:?}"
    );
    bench.now += bench.upstream.connect_timeout();
    let verdict = bench.act(|context| connection.expire(context));
    let Verdict::Close(cause @ CloseCause::Unreachable) = verdict else { panic!("{verdict:?}") };
    bench.close(connection, cause);
    assert_eq!(read(&client).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

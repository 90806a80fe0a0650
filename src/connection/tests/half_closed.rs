//! Clients that have sent something and ended their stream while they wait.

use rustix::net::sockopt;

use super::*;
use crate::{config::HalfClosed, stats::histogram::Histogram};

/// Returns a held client that has sent a request and ended its stream, once that is known.
fn half_closed(bench: &mut Bench, pair: (Socket, Socket)) -> (Socket, Connection) {
    let (client, accepted) = pair;
    let mut connection = bench.connection(accepted);
    client.send(b"request").unwrap();
    client.shut_down_write().unwrap();
    bench.until(&mut connection, |it, _| it.client.is_read_closed());
    (client, connection)
}

/// Returns idle time, interval and number of the probes of a connection's client.
fn keepalive(connection: &Connection) -> (Duration, Duration, u32) {
    let socket = connection.client.socket();
    (
        sockopt::tcp_keepidle(socket).unwrap(),
        sockopt::tcp_keepintvl(socket).unwrap(),
        sockopt::tcp_keepcnt(socket).unwrap(),
    )
}

#[test]
fn a_half_closed_client_is_probed_often_until_it_is_served() {
    let (listener, address) = tcp_listener();
    let mut bench = Bench::new(&address);
    let (client, accepted) = tcp_pair();
    sockopt::set_tcp_keepcnt(&accepted, 7).unwrap();
    let usual = Duration::from_secs(15);
    let (_client, mut connection) = half_closed(&mut bench, (client, accepted));
    let often = Duration::from_secs(3);
    assert_eq!(keepalive(&connection), (often, often, 49));
    // It is known by now, and what was usual before is not forgotten.
    bench.act(|context| connection.drive(context));
    assert_eq!(keepalive(&connection), (often, often, 49));

    bench.serve(&mut connection);
    bench.until_relaying(&mut connection);
    assert_eq!(keepalive(&connection), (usual, usual, 7));
    accept(&listener);
}

#[test]
fn a_held_client_that_is_there_is_probed_as_usual() {
    let mut bench = Bench::nowhere();
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    let usual = keepalive(&connection);
    client.send(b"request").unwrap();
    bench.until(&mut connection, |it, _| it.client.is_readable());
    assert_eq!(keepalive(&connection), usual);
}

#[test]
fn a_held_unix_client_leaves_by_closing_and_stays_by_half_closing() {
    let mut bench = Bench::nowhere();
    let (client, accepted) = crate::sys::socket_pair().unwrap();
    let mut connection = bench.connection(accepted);
    client.shut_down_write().unwrap();
    bench.until(&mut connection, |it, verdict| {
        assert!(matches!(verdict, Verdict::Stay), "{verdict:?}");
        it.client.is_read_closed()
    });
    drop(client);
    let cause = bench.cause(&mut connection);
    assert_eq!(cause, CloseCause::LeftHeld);
    bench.close(connection, cause);
}

/// Their number is that of the causes.
#[test]
fn a_held_client_that_has_gone_at_once_counts_as_held() {
    let bench = Bench::nowhere();
    for (is_held, expected) in [(false, 0), (true, 1)] {
        let (_client, accepted) = crate::sys::socket_pair().unwrap();
        let mut connection = bench.newcomer(accepted);
        if is_held {
            connection.hold(None);
        }
        connection.observe_end(CloseCause::LeftHeld, &bench.counters, connection.accepted());
        assert_eq!(Histogram::sum([&bench.counters.hold.left].into_iter()).count, expected);
    }
}

#[test]
fn a_held_unix_client_that_has_sent_something_and_closed_is_served() {
    let (listener, address) = tcp_listener();
    let mut bench = Bench::new(&address);
    let (client, accepted) = crate::sys::socket_pair().unwrap();
    let mut connection = bench.connection(accepted);
    client.send(b"a line").unwrap();
    drop(client);
    bench.until(&mut connection, |it, verdict| {
        assert!(matches!(verdict, Verdict::Stay), "{verdict:?}");
        it.client.is_read_closed()
    });
    bench.serve(&mut connection);
    bench.until_relaying(&mut connection);
    let server = accept(&listener);
    server.shut_down_write().unwrap();
    let cause = bench.cause(&mut connection);
    assert_eq!(cause, CloseCause::Ended);
    bench.close(connection, cause);
    assert_eq!(read(&server).unwrap(), b"a line");
}

#[test]
fn a_pause_that_drops_half_closed_clients_closes_them_in_good_order() {
    for is_unix in [false, true] {
        let pair = if is_unix { crate::sys::socket_pair().unwrap() } else { tcp_pair() };
        let mut bench = Bench::nowhere();
        bench.orders.treat_half_closed(HalfClosed::Drop);
        let (client, accepted) = pair;
        let mut connection = bench.connection(accepted);
        client.send(b"request").unwrap();
        client.shut_down_write().unwrap();
        let cause = bench.cause(&mut connection);
        assert_eq!(cause, CloseCause::LeftHeld);
        bench.close(connection, cause);
        assert_eq!(read(&client).unwrap(), b"", "it gets the end of the stream and no reset");
        assert_eq!(bench.counters.rejected.get(), 0);
    }
}

#[test]
fn a_half_closed_client_of_an_absent_upstream_is_dropped_when_a_pause_says_so() {
    let mut bench = Bench::nowhere();
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve_refused(&mut connection);
    client.send(b"request").unwrap();
    client.shut_down_write().unwrap();
    bench.until(&mut connection, |it, verdict| {
        assert!(matches!(verdict, Verdict::Stay), "{verdict:?}");
        it.client.is_read_closed()
    });
    bench.orders.treat_half_closed(HalfClosed::Drop);
    let verdict = bench.act(|context| connection.end_patience(context));
    assert!(matches!(verdict, Verdict::Enter(Deadline::Lingering)), "{verdict:?}");
    let cause = bench.cause(&mut connection);
    assert_eq!(cause, CloseCause::LeftHeld);
    bench.close(connection, cause);
}

#[test]
fn a_half_closed_client_stays_when_the_order_is_taken_back() {
    let mut bench = Bench::nowhere();
    bench.orders.treat_half_closed(HalfClosed::Drop);
    bench.orders.treat_half_closed(HalfClosed::Drop);
    bench.orders.treat_half_closed(HalfClosed::Serve);
    assert_eq!(bench.orders.half_closed_changes(), 2);
    let (_client, connection) = half_closed(&mut bench, tcp_pair());
    assert!(matches!(connection.state, State::Waiting { .. }));
}

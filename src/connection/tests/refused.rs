//! Clients whose upstream is away.

use super::*;

#[test]
fn a_refused_client_is_reset_in_the_end_and_gives_its_pass_back() {
    let mut bench = Bench::nowhere();
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve_refused(&mut connection);
    bench.now += bench.upstream.connect_timeout();
    let verdict = bench.act(|context| connection.expire(context));
    let Verdict::Close(reason) = verdict else { panic!("{verdict:?}") };
    let Reason::Unreachable(error) = &reason else { panic!("{reason:?}") };
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    bench.close(connection, &reason);
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
    bench.now += REFUSED_INTERVAL;
    bench.act(|context| connection.expire(context));
    bench.until_relaying(&mut connection);
    assert!(!bench.reach.is_failing());
    accept(&listener);
}

#[test]
fn of_those_who_were_refused_one_tries_in_each_interval() {
    let mut bench = Bench::nowhere();
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve_refused(&mut connection);
    assert!(bench.reach.may_probe(REFUSED_INTERVAL, bench.now), "another is the first");
    let dialled = |connection: &Connection| match &connection.state {
        State::Connecting(dial) => dial.upstream.is_some() || dial.failed == 0,
        state => panic!("{state:?}"),
    };
    let verdict = bench.act(|context| connection.expire(context));
    assert!(matches!(verdict, Verdict::Wait(Queue::Refused)), "{verdict:?}");
    assert!(!dialled(&connection) && bench.reach.is_failing());
}

#[test]
fn a_refused_client_that_leaves_is_not_dialled_for_again() {
    let mut bench = Bench::nowhere();
    let (client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve_refused(&mut connection);
    drop(client);
    let reason = bench.reason(&mut connection);
    assert!(matches!(reason, Reason::Left), "{reason:?}");
    bench.close(connection, &reason);
}

#[test]
fn a_refused_client_is_held_when_a_pause_comes() {
    let mut bench = Bench::nowhere();
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve_refused(&mut connection);
    bench.gate.pause(crate::gate::Mode::Hold);
    let verdict = bench.act(|context| connection.expire(context));
    assert!(matches!(verdict, Verdict::Hold), "{verdict:?}");
    assert_eq!(bench.gate.passes(), 0, "nobody has to wait for it");
}

//! Attempts to reach an upstream that has several addresses, or takes its time.

use super::*;

#[test]
fn the_next_address_is_tried_when_one_refuses() {
    let (listener, address) = tcp_listener();
    let mut bench = Bench::nowhere();
    bench.upstream.publish([refusing(), address].into());
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve(&mut connection);
    bench.until_relaying(&mut connection);
    accept(&listener);
}

#[test]
fn an_attempt_that_takes_long_makes_room_for_the_next_address() {
    let (silent, _full) = full_tcp_listener();
    let (listener, address) = tcp_listener();
    let mut bench = Bench::nowhere();
    bench.upstream.publish([silent, address].into());
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    let verdict = bench.serve(&mut connection);
    assert!(matches!(verdict, Verdict::Wait(Deadline::Connecting)), "{verdict:?}");
    bench.act(|context| connection.expire(context));
    bench.until_relaying(&mut connection);
    accept(&listener);
}

#[test]
fn a_slow_address_is_tried_again_after_another_has_refused() {
    let (silent, full) = full_tcp_listener();
    let mut bench = Bench::nowhere();
    bench.upstream.publish([silent, refusing()].into());
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    bench.serve(&mut connection);
    let mut verdict = bench.act(|context| connection.expire(context));
    if matches!(verdict, Verdict::Wait(Deadline::Connecting)) {
        verdict = bench.until(&mut connection, |_, verdict| !matches!(verdict, Verdict::Stay));
    }
    // The SYN to the slow address may have been lost, so that address has the rest of the time.
    assert!(matches!(verdict, Verdict::WaitSince(Deadline::ConnectingLast, _)), "{verdict:?}");
    listen(&full.0, 16).unwrap();
    bench.until_relaying(&mut connection);
}

#[test]
fn the_last_address_has_all_the_time_there_is_and_no_more() {
    let (silent, _full) = full_tcp_listener();
    let mut bench = Bench::new(&silent);
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    let verdict = bench.serve(&mut connection);
    let Verdict::WaitSince(Deadline::ConnectingLast, since) = verdict else {
        panic!("{verdict:?}")
    };
    assert_eq!(since, bench.now);
    bench.now += bench.upstream.connect_timeout();
    let verdict = bench.act(|context| connection.expire(context));
    let Verdict::Close(cause @ CloseCause::Unreachable) = verdict else { panic!("{verdict:?}") };
    bench.close(connection, cause);
}

#[test]
fn an_attempt_ends_with_the_patience_of_its_client() {
    const LEFT: Duration = Duration::from_millis(50);
    let (silent, _full) = full_tcp_listener();
    let mut bench = Bench::new(&silent);
    bench.upstream.publish([silent.clone(), silent].into());
    let (_client, accepted) = tcp_pair();
    let mut connection = bench.connection(accepted);
    let came = bench.now;
    bench.serve(&mut connection);
    let refused = io::ErrorKind::ConnectionRefused.into();
    bench.act(|context| connection.give_up_attempt(refused, context));
    bench.now = came + bench.upstream.patience().saturating_sub(LEFT);
    let verdict = bench.release(&mut connection, ConnectTicket::Alone);
    // There is no time for the second address.
    let Verdict::WaitSince(Deadline::ConnectingLast, since) = verdict else {
        panic!("{verdict:?}")
    };
    assert_eq!(since + bench.upstream.connect_timeout(), bench.now + LEFT);
}

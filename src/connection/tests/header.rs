//! Clients that begin with a header of the PROXY protocol.

use rustix::net::sockopt;

use super::*;

const HEADER: &[u8] = b"PROXY TCP4 203.0.113.7 198.51.100.1 51544 443\r\n";

/// Header of version 2 that names no client, as of a health check.
const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

/// Returns a client that owes its header, and has sent `bytes`, once that is known.
fn owing(bench: &mut Bench, bytes: &[u8]) -> (Socket, Connection) {
    let (client, accepted) = tcp_pair();
    let mut connection = bench.newcomer(accepted);
    let verdict = connection.await_header(false);
    assert!(matches!(verdict, Verdict::Wait(Deadline::AwaitingHeader)), "{verdict:?}");
    client.send(bytes).unwrap();
    while !connection.client.is_readable() {
        bench.mark(&mut connection);
    }
    (client, connection)
}

fn drive(bench: &mut Bench, connection: &mut Connection) -> Verdict {
    bench.act(|context| connection.drive(context))
}

#[test]
fn a_client_that_was_not_held_leaves_without_having_been_held() {
    for bytes in [HEADER, LOCAL] {
        let mut bench = Bench::nowhere();
        let (client, mut connection) = owing(&mut bench, bytes);
        client.reset_on_close();
        drop(client);
        while !connection.client.is_reset() {
            bench.mark(&mut connection);
        }
        assert_eq!(bench.cause(&mut connection), CloseCause::LeftConnecting);
    }
}

#[test]
fn a_client_that_is_held_for_its_header_leaves_as_held() {
    let mut bench = Bench::nowhere();
    let (client, accepted) = tcp_pair();
    let mut connection = bench.newcomer(accepted);
    connection.await_header(true);
    drop(client);
    assert_eq!(bench.cause(&mut connection), CloseCause::LeftHeld);
}

#[test]
fn a_header_that_is_lost_with_its_client_behind_the_dial_is_no_end_of_a_held_client() {
    let (listener, address) = tcp_listener();
    let mut bench = Bench::new(&address);
    let (client, mut connection) = owing(&mut bench, HEADER);
    let verdict = drive(&mut bench, &mut connection);
    assert!(matches!(verdict, Verdict::Admit), "{verdict:?}");
    connection.hold(None);
    bench.serve(&mut connection);
    // The client's bytes are gone by the time that they are read.
    connection.client.socket().recv(&mut [0; HEADER.len()]).unwrap();
    client.reset_on_close();
    drop(client);
    let cause = loop {
        match drive(&mut bench, &mut connection) {
            Verdict::Close(cause) => break cause,
            _ => bench.mark(&mut connection),
        }
    };
    assert_eq!(cause, CloseCause::LeftConnecting);
    bench.close(connection, cause);
    drop(listener);
}

#[test]
fn a_client_that_resets_within_its_header_has_left_and_one_that_ends_there_is_refused() {
    for (resets, expected) in
        [(true, CloseCause::LeftConnecting), (false, CloseCause::BadProxyHeader)]
    {
        let mut bench = Bench::nowhere();
        let (client, mut connection) = owing(&mut bench, &HEADER[..20]);
        let verdict = drive(&mut bench, &mut connection);
        assert!(matches!(verdict, Verdict::Stay), "{verdict:?}");
        if resets {
            client.reset_on_close();
        }
        drop(client);
        assert_eq!(bench.cause(&mut connection), expected);
    }
}

#[test]
fn a_header_that_names_no_client_waits_for_a_byte_for_a_moment() {
    let mut bench = Bench::nowhere();
    let waits = |bench: &mut Bench| {
        let (client, mut connection) = owing(bench, LOCAL);
        let verdict = drive(bench, &mut connection);
        assert!(matches!(verdict, Verdict::Wait(Deadline::AwaitingByte)), "{verdict:?}");
        (client, connection)
    };
    let (_client, mut connection) = waits(&mut bench);
    let verdict = bench.act(|context| connection.expire(context));
    assert!(matches!(verdict, Verdict::Admit), "{verdict:?}");
    drop(connection);

    let (client, mut connection) = waits(&mut bench);
    client.send(b"x").unwrap();
    bench.mark(&mut connection);
    let verdict = drive(&mut bench, &mut connection);
    assert!(matches!(verdict, Verdict::Admit), "{verdict:?}");
    drop(connection);

    let (client, mut connection) = waits(&mut bench);
    drop(client);
    bench.mark(&mut connection);
    let verdict = drive(&mut bench, &mut connection);
    assert!(matches!(verdict, Verdict::Close(CloseCause::LeftConnecting)), "{verdict:?}");
}

#[test]
fn a_header_that_is_not_whole_in_time_is_refused() {
    for bytes in [HEADER, LOCAL] {
        let mut bench = Bench::nowhere();
        let (_client, mut connection) = owing(&mut bench, &bytes[..bytes.len() - 1]);
        let verdict = bench.act(|context| connection.expire(context));
        assert!(matches!(verdict, Verdict::Close(CloseCause::BadProxyHeader)), "{verdict:?}");
    }
}

/// All of it may come in one event, which is used up by the header.
#[test]
fn a_half_closed_client_of_an_absent_upstream_is_probed_often() {
    let mut bench = Bench::nowhere();
    let (client, mut connection) = owing(&mut bench, &[HEADER, b"request"].concat());
    client.shut_down_write().unwrap();
    while !connection.client.is_read_closed() {
        bench.mark(&mut connection);
    }
    let verdict = drive(&mut bench, &mut connection);
    assert!(matches!(verdict, Verdict::Admit), "{verdict:?}");
    bench.act(|context| connection.begin_patience(context));
    let idle = sockopt::tcp_keepidle(connection.client.socket()).unwrap();
    assert_eq!(idle, Duration::from_secs(3));
}

//! The table of connections: answers of made-up bytes, and real sockets.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream},
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{libc, setsockopt_impl, sockopt_impl, sys::socket::setsockopt};
use rustix::net::listen;

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

sockopt_impl!(
    /// `TCP_DEFER_ACCEPT`: the handshake lasts until the client sends bytes.
    DeferAccept,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_DEFER_ACCEPT,
    i32
);

fn padded(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = message([kind, flags], body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn attribute_of(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap();
    let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Returns a row of 10.0.0.1:80 whose client is 10.0.0.2:258.
fn body(state: u8, attributes: &[u8]) -> Vec<u8> {
    let mut bytes = vec![2, state, 0, 3];
    bytes.extend([0, 80, 1, 2, 10, 0, 0, 1]);
    bytes.extend([0; 12]);
    bytes.extend([10, 0, 0, 2]);
    bytes.extend([0; 16]);
    bytes.extend(7_u64.to_ne_bytes());
    bytes.extend([0; 16]);
    bytes.extend(9_u32.to_ne_bytes());
    assert_eq!(bytes.len(), ROW_BYTES);
    bytes.extend(attributes);
    bytes
}

fn rows_of(bytes: &[u8]) -> io::Result<(Vec<Row>, Progress)> {
    let mut rows = Vec::new();
    read(bytes, &mut rows).map(|progress| (rows, progress))
}

#[test]
fn a_row_tells_all_of_a_connection() {
    let other = attribute_of(8, &[3]);
    for (attributes, is_marked) in [
        (vec![], false),
        (other.clone(), false),
        ([other.clone(), attribute_of(STORAGES, &[])].concat(), false),
        (attribute_of(STORAGES, &other), false),
        ([other.clone(), attribute_of(STORAGES, &attribute_of(1, &[0; 8]))].concat(), true),
        (attribute_of(0x8000 | STORAGES, &attribute_of(0x8001, &[])), true),
        (attribute_of(STORAGES + 1, &attribute_of(STORAGE, &[])), false),
    ] {
        let bytes = padded(LIST, 2, &body(8, &attributes));
        let (rows, progress) = rows_of(&bytes).unwrap();
        assert_eq!((rows.len(), progress), (1, Progress::More));
        let row = &rows[0];
        assert_eq!(row.local().to_string(), "10.0.0.1:80");
        assert_eq!(row.peer().to_string(), "10.0.0.2:258");
        assert_eq!((row.state, row.repeats), (State::CloseWait, 3));
        assert_eq!((row.inode, row.cookie(), row.is_marked), (9, 7, is_marked), "{attributes:?}");
    }
}

#[test]
fn an_ipv4_client_of_an_ipv6_listener_is_shown_as_ipv4() {
    let mut row = rows_of(&padded(LIST, 0, &body(1, &[]))).unwrap().0.remove(0);
    row.is_ipv6 = true;
    row.id[4..20].copy_from_slice(&Ipv4Addr::new(1, 2, 3, 4).to_ipv6_mapped().octets());
    row.id[20..36].copy_from_slice(&Ipv6Addr::LOCALHOST.octets());
    assert_eq!(row.local().to_string(), "1.2.3.4:80");
    assert_eq!(row.peer().to_string(), "[::1]:258");
}

#[test]
fn an_answer_has_several_messages_and_an_end() {
    let row = padded(LIST, 2, &body(1, &attribute_of(8, &[3])));
    let done = padded(DONE, 2, &[0; 4]);
    assert_eq!(rows_of(&[]).unwrap(), (vec![], Progress::More));
    let (rows, progress) = rows_of(&[row.clone(), row.clone()].concat()).unwrap();
    assert_eq!((rows.len(), progress), (2, Progress::More));
    let noop = padded(1, 0, &[]);
    let (rows, progress) = rows_of(&[noop, row.clone(), done.clone()].concat()).unwrap();
    assert_eq!((rows.len(), progress), (1, Progress::Done));
    // A socket that was closed, and one in TIME_WAIT.
    for state in [7, 6, 0, 255] {
        let (rows, _) = rows_of(&padded(LIST, 2, &body(state, &[]))).unwrap();
        assert_eq!(rows, [], "{state}");
    }
    let changed = padded(DONE, CHANGED | 2, &[0; 4]);
    assert_eq!(rows_of(&[row, changed].concat()).unwrap().1, Progress::Changed);
}

#[test]
fn an_error_is_the_kernels() {
    for kind in [ERROR, DONE] {
        let refused = padded(kind, 0, &[&(-1_i32).to_ne_bytes()[..], &[0; 72]].concat());
        let error = rows_of(&refused).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        let worst = padded(kind, 0, &i32::MIN.to_ne_bytes());
        rows_of(&worst).unwrap_err();
        let fine = padded(kind, 0, &[0; 4]);
        assert_eq!(rows_of(&fine).unwrap(), (vec![], Progress::Done));
        let short = padded(kind, 0, &[]);
        assert_eq!(rows_of(&short).unwrap_err().kind(), ErrorKind::InvalidData);
    }
}

#[test]
fn a_cut_answer_is_an_error_and_never_a_missing_row() {
    let whole = padded(LIST, 2, &body(1, &attribute_of(8, &[0; 4])));
    for length in 1..whole.len() {
        let error = rows_of(&whole[..length]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{length}");
    }
    let short_row = padded(LIST, 2, &body(1, &[])[..ROW_BYTES - 4]);
    assert_eq!(rows_of(&short_row).unwrap_err().kind(), ErrorKind::InvalidData);
}

#[test]
fn no_bytes_make_it_panic_or_run_on() {
    let attributes = attribute_of(STORAGES, &attribute_of(STORAGE, &[0; 8]));
    let answer = [padded(LIST, 2, &body(1, &attributes)), padded(DONE, 2, &[0; 4])].concat();
    for place in 0..answer.len() {
        for byte in 0..=u8::MAX {
            let mut answer = answer.clone();
            answer[place] = byte;
            rows_of(&answer).ok();
            rows_of(&answer[place..]).ok();
        }
    }
    let mut state = 1_u64;
    for length in 0..2_000 {
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // Many small numbers, as lengths are.
            let [.., low, high] = state.to_le_bytes();
            if high > 127 { low } else { low & 0x1f }
        })
        .take(length % 300)
        .collect();
        rows_of(&bytes).ok();
        attribute(&bytes, STORAGES);
    }
}

#[test]
fn a_question_names_the_port_and_the_storage() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for map in [None, Some(listener.as_fd())] {
        let question = dump_question(&State::CONNECTED, 258, map);
        assert_eq!(question[..4], u32::try_from(question.len()).unwrap().to_ne_bytes());
        assert_eq!(question[16..24], [0, 0, 0, 0, 1, 2, 0, 0]);
        let states = u32::from_ne_bytes(question[68..72].try_into().unwrap());
        assert_eq!(states, 0b1011_0011_1010, "neither TIME_WAIT (6) nor LISTEN (10)");
        let storages = attribute(&question[76..], WANTED_STORAGES);
        let named = storages.and_then(|storages| attribute(storages, WANTED_MAP));
        assert_eq!(named, map.map(|map| map.as_raw_fd().to_ne_bytes()).as_ref().map(|it| &it[..]));
    }
}

/// Returns the rows of a listener's port; none if the system refuses.
fn rows(port: u16) -> Option<Vec<Row>> {
    match dump(port, None) {
        Ok(rows) => Some(rows),
        Err(error) => {
            println!("skipped: the system refuses sock_diag: {error}");
            None
        }
    }
}

/// Waits until the rows of a port are as `expected`, which no event tells.
#[track_caller]
fn await_rows(port: u16, expected: impl Fn(&[Row]) -> bool) -> Vec<Row> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let rows = dump(port, None).unwrap();
        if expected(&rows) {
            return rows;
        }
        assert!(Instant::now() < deadline, "{rows:?}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

fn listeners() -> Vec<TcpListener> {
    let addresses = ["127.0.0.1:0", "[::1]:0", "[::]:0"];
    addresses.into_iter().filter_map(|address| TcpListener::bind(address).ok()).collect()
}

#[test]
fn connections_of_the_port_are_rows_and_listeners_are_not() {
    for listener in listeners() {
        let own = listener.local_addr().unwrap();
        let port = own.port();
        let Some(none) = rows(port) else { return };
        assert_eq!(none, [], "{own}: only a listener");
        // Those of another port, and the callers themselves, have other local ports.
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let _elsewhere = TcpStream::connect(other.local_addr().unwrap()).unwrap();
        let callers = if own.ip().is_unspecified() {
            vec![(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()]
        } else {
            vec![own]
        };
        for address in callers {
            let address: SocketAddr = address;
            let Ok(caller) = TcpStream::connect(address) else {
                println!("skipped: there is no way to {address}");
                continue;
            };
            let queued = rows(port).unwrap();
            assert_eq!(queued.len(), 1, "{queued:?}");
            let row = &queued[0];
            assert_eq!((row.local(), row.peer()), (address, caller.local_addr().unwrap()));
            assert_eq!((row.state, row.inode), (State::Established, 0), "not accepted yet");
            assert!(!row.is_marked);
            // A listener for both families has all its clients in one.
            assert_eq!(row.is_ipv6, own.is_ipv6());

            let accepted = listener.accept().unwrap().0;
            let open = rows(port).unwrap();
            assert!(open[0].inode > 0, "{open:?}");
            assert_eq!(open[0].cookie(), row.cookie());
            drop(caller);
            let left = await_rows(port, |rows| rows[0].state == State::CloseWait);
            assert!(left[0].inode > 0, "{left:?}");
            drop(accepted);
            await_rows(port, <[Row]>::is_empty);
        }
    }
}

#[test]
fn a_connection_that_its_process_has_closed_has_no_inode() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let Some(_) = rows(address.port()) else { return };
    let _caller = TcpStream::connect(address).unwrap();
    let accepted = listener.accept().unwrap().0;
    accepted.shutdown(Shutdown::Write).unwrap();
    let half = await_rows(address.port(), |rows| rows[0].state == State::FinWait2);
    assert!(half[0].inode > 0, "{half:?}");
    drop(accepted);
    let closed = await_rows(address.port(), |rows| rows[0].inode == 0);
    assert_eq!(closed[0].state, State::FinWait2);
}

#[test]
fn a_handshake_keeps_its_cookie_and_counts_its_repeats() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let port = address.port();
    let Some(_) = rows(port) else { return };
    setsockopt(&listener, DeferAccept, &5).unwrap();
    let mut first = TcpStream::connect(address).unwrap();
    let second = TcpStream::connect(address).unwrap();
    let half = rows(port).unwrap();
    assert_eq!(half.len(), 2, "{half:?}");
    assert!(half.iter().all(|row| row.state == State::SynRecv && row.inode == 0), "{half:?}");
    assert_ne!(half[0].cookie(), half[1].cookie());
    let cookie = |rows: &[Row], of: &TcpStream| {
        let peer = of.local_addr().unwrap();
        rows.iter().find(|row| row.peer() == peer).unwrap().cookie()
    };
    // The queue is full with the first, so the ACKs of the second are in vain until there is room.
    listen(&listener, 0).unwrap();
    first.write_all(b"!").unwrap();
    let one = await_rows(port, |rows| rows.iter().any(|row| row.state == State::Established));
    assert_eq!(cookie(&one, &first), cookie(&half, &first));
    setsockopt(&listener, DeferAccept, &0).unwrap();
    let repeated = await_rows(port, |rows| rows.iter().any(|row| row.repeats > 0));
    let row = repeated.iter().find(|row| row.repeats > 0).unwrap();
    assert_eq!((row.state, row.repeats), (State::SynRecv, 1));
    assert_eq!(row.cookie(), cookie(&half, &second));
    let _accepted = listener.accept().unwrap();
    let both = await_rows(port, |rows| rows.iter().all(|row| row.state == State::Established));
    assert_eq!(cookie(&both, &second), row.cookie());
}

#[test]
fn a_long_list_comes_in_several_messages() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listen(&listener, 1_000).unwrap();
    let address = listener.local_addr().unwrap();
    let Some(_) = rows(address.port()) else { return };
    let callers: Vec<_> = (0..400).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut rows = await_rows(address.port(), |rows| rows.len() >= callers.len());
    rows.sort_by_key(Row::cookie);
    rows.dedup();
    assert_eq!(rows.len(), callers.len());
    // A buffer that is too small grows, and the question is asked once more.
    let question = dump_question(&State::CONNECTED, address.port(), None);
    let mut buffer = vec![0; 256];
    assert_eq!(list(&question, &mut buffer).unwrap(), None);
    assert!(buffer.len() > 256);
    let mut attempts = (0..ATTEMPTS).map(|_| list(&question, &mut buffer));
    let found = attempts.find_map(Result::transpose).unwrap().unwrap();
    assert_eq!(found.len(), callers.len());
}

#[test]
fn a_destroyed_connection_is_reset_for_both_sides() {
    for listener in listeners() {
        let address = listener.local_addr().unwrap();
        let port = address.port();
        let Some(_) = rows(port) else { return };
        let address = if address.ip().is_unspecified() {
            (Ipv4Addr::LOCALHOST, port).into()
        } else {
            address
        };
        let mut caller = TcpStream::connect(address).unwrap();
        let mut accepted = listener.accept().unwrap().0;
        let row = rows(port).unwrap().remove(0);
        // Another with its addresses has another cookie.
        let mut other = row.clone();
        other.id[40] ^= 1;
        if let Err(error) = destroy(&other) {
            assert!(
                matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported),
                "{error}"
            );
            return println!("skipped: the system refuses to reset a connection: {error}");
        }
        assert_eq!(rows(port).unwrap(), std::slice::from_ref(&row));
        match destroy(&row) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                return println!("skipped: the user may not reset a connection");
            }
            result => result.unwrap(),
        }
        caller.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut buffer = [0; 1];
        assert_eq!(caller.read(&mut buffer).unwrap_err().kind(), ErrorKind::ConnectionReset);
        let error = accepted.read(&mut buffer).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
        assert_eq!(rows(port).unwrap(), []);
        destroy(&row).unwrap();
        // The listener, which now answers to these addresses, has stayed.
        TcpStream::connect(address).unwrap();
    }
}

#[test]
fn a_storage_that_is_none_is_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let Some(_) = rows(port) else { return };
    let none = OwnedFd::from(listener);
    dump(port, Some(none.as_fd())).unwrap_err();
}

//! The count of steered connections: made-up rows, and real ones.

use std::{
    io::Write,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    time::Instant,
};

use nix::sys::socket::setsockopt;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, listen, socket_with};

use super::{super::bpf::Bpf, *};
use crate::sys::tcp_table::{dump, tests::DeferAccept};

fn row(state: State, inode: u32, number: u8) -> Row {
    let mut id = [0; 48];
    id[4..8].copy_from_slice(&[10, 0, 0, 1]);
    id[47] = number;
    Row { id, is_ipv6: false, state, repeats: 0, inode, is_marked: false }
}

fn counter() -> Counter {
    Counter::new(["0.0.0.0".parse().unwrap()])
}

#[test]
fn a_connection_counts_until_the_server_has_closed_it() {
    use State::*;
    for state in [Established, CloseWait] {
        // One that waits to be accepted has no inode.
        assert_eq!(counter().count_known(&[row(state, 0, 1), row(state, 7, 2)]), 2);
    }
    for state in [FinWait1, FinWait2, LastAck, Closing] {
        assert_eq!(counter().count_known(&[row(state, 0, 1)]), 0, "{state:?}");
        assert_eq!(counter().count_known(&[row(state, 7, 1)]), 1, "{state:?}");
    }
}

#[test]
fn the_proxys_own_do_not_count() {
    let marked = Row { is_marked: true, ..row(State::Established, 7, 1) };
    let half = Row { state: State::SynRecv, ..marked.clone() };
    assert_eq!(counter().count_all(&[marked, half]), 0);
}

#[test]
fn a_service_at_another_address_of_the_port_does_not_count() {
    let at = |own: &str| {
        let mut counter = Counter::new([own.parse().unwrap()]);
        counter.count_all(&[row(State::Established, 7, 1)])
    };
    assert_eq!(["10.0.0.1", "0.0.0.0", "::", "::ffff:10.0.0.1"].map(at), [1; 4]);
    assert_eq!(["10.0.0.2", "127.0.0.1", "::1"].map(at), [0; 3]);
    let mut ipv6 = Row { is_ipv6: true, ..row(State::Established, 7, 1) };
    ipv6.id[4..20].copy_from_slice(&std::net::Ipv6Addr::LOCALHOST.octets());
    for (own, count) in [("::1", 1), ("::", 1), ("0.0.0.0", 0), ("::2", 0)] {
        let mut counter = Counter::new([own.parse().unwrap()]);
        assert_eq!(counter.count_known(std::slice::from_ref(&ipv6)), count, "{own}");
    }
}

#[test]
fn only_handshakes_of_before_the_barrier_count_and_not_for_ever() {
    let half = |number, repeats| Row { repeats, ..row(State::SynRecv, 0, number) };
    let mut counter = counter();
    assert_eq!(counter.count_all(&[half(1, 0), half(2, 1), half(3, 2)]), 2);
    assert_eq!(counter.count_known(&[half(1, 1), half(2, 1), half(3, 2), half(4, 0)]), 2);
    // One completes, and one is repeated a second time.
    assert_eq!(counter.count_known(&[row(State::Established, 0, 1), half(2, 2)]), 1);
    // A reset must not meet the handshakes of the proxy's own clients.
    let rows = vec![half(1, 0), row(State::Established, 0, 4), row(State::FinWait2, 0, 5)];
    let steered: Vec<u64> = counter.steered(rows.clone()).map(|row| row.cookie()).collect();
    assert_eq!(steered, [rows[1].cookie()]);
    // A client that begins anew meets the proxy.
    assert_eq!(counter.count_known(&[half(1, 0), half(2, 0)]), 0);
}

#[test]
fn an_accepted_fast_open_counts_at_any_time() {
    let repeats = REPEATS_MAX;
    let early = Row { repeats, ..row(State::SynRecv, 7, 1) };
    assert_eq!(counter().count_known(&[early]), 1);
}

#[test]
fn a_row_that_comes_twice_is_one_handshake() {
    let half = row(State::SynRecv, 0, 1);
    assert_eq!(counter().count_all(&[half.clone(), half]), 1);
}

#[test]
fn none_of_a_long_list_is_believed_the_second_time() {
    let mut held = vec![row(State::Established, 7, 1); SURE_BELOW];
    for row in &mut held {
        row.is_marked = true;
    }
    let mut counter = counter();
    assert_eq!([&held[1..], &held, &held].map(|rows| counter.count_known(rows)), [0; 3]);
    held[3].is_marked = false;
    assert_eq!(counter.count_known(&held), 1);
    held[3].is_marked = true;
    assert_eq!([&held, &held].map(|rows| counter.count_known(rows)), [1, 0]);
    held[3].is_marked = false;
    assert_eq!(counter.count_known(&held), 1);
    held[3].is_marked = true;
    assert_eq!(counter.count_known(&held[1..]), 0, "short, and so complete");
}

#[test]
fn dumps_cost_a_tenth_of_the_time_at_most() {
    let milliseconds = |dump| rest_after(Duration::from_millis(dump)).as_millis();
    assert_eq!([0, 1, 5, 26].map(milliseconds), [10, 10, 50, 260]);
    assert_eq!(rest_after(Duration::MAX), Duration::MAX);
}

#[test]
fn the_marks_of_our_own_tell_them_from_the_steered() {
    let flags = SocketFlags::CLOEXEC;
    let own = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
    bind(&own, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = SocketAddr::try_from(getsockname(&own).unwrap()).unwrap();
    let bpf = match Bpf::load(&[address], None) {
        Ok(bpf) => bpf,
        Err(error) => return println!("skipped: {error}"),
    };
    let rows = || dump(address.port(), Some(bpf.marks())).unwrap();
    bpf.mark(own.as_fd()).unwrap();
    listen(&own, 16).unwrap();
    let own = TcpListener::from(own);
    let _held = TcpStream::connect(address).unwrap();
    let queued = rows();
    assert_eq!((queued.len(), queued[0].inode, queued[0].is_marked), (1, 0, true));
    let (_accepted, _) = own.accept().unwrap();
    let accepted = rows();
    assert!(accepted[0].inode > 0 && accepted[0].is_marked, "{accepted:?}");
    let mut counter = Counter::new([address.ip()]);
    assert_eq!(counter.count_all(&accepted), 0);
    let unmarked = dump(address.port(), None).unwrap();
    assert_eq!(counter.count_all(&unmarked), 1, "without the marks");
}

#[test]
fn steered_connections_and_their_handshakes_count_until_they_end() {
    let own = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = own.local_addr().unwrap();
    let mut bpf = match Bpf::load(&[address], None) {
        Ok(bpf) => bpf,
        Err(error) => return println!("skipped: {error}"),
    };
    bpf.mark(own.as_fd()).unwrap();
    bpf.attach().unwrap();
    bpf.find(&[server.local_addr().unwrap()]).unwrap();
    bpf.steer_until(u64::MAX).unwrap();
    let rows = || dump(address.port(), Some(bpf.marks())).unwrap();
    let mut counter = Counter::new([address.ip()]);
    assert_eq!(counter.count_all(&rows()), 0);
    let steered = TcpStream::connect(address).unwrap();
    // Its handshake lasts.
    setsockopt(&server, DeferAccept, &5).unwrap();
    let half = TcpStream::connect(address).unwrap();
    bpf.steer_until(0).unwrap();
    Bpf::settle().unwrap();
    assert_eq!(counter.count_all(&rows()), 2);
    setsockopt(&own, DeferAccept, &5).unwrap();
    let _held = TcpStream::connect(address).unwrap();
    let known = rows();
    let states = known.iter().filter(|row| row.state == State::SynRecv);
    assert_eq!((known.len(), states.count()), (3, 2), "{known:?}");
    assert_eq!(counter.count_known(&known), 2);
    (&half).write_all(b"!").unwrap();
    assert_eq!(counter.count_known(&rows()), 2, "it has gone to the server");
    drop((server.accept().unwrap(), server.accept().unwrap()));
    let deadline = Instant::now() + Duration::from_secs(20);
    while counter.count_known(&rows()) > 0 {
        assert!(Instant::now() < deadline, "{:?}", rows());
        std::thread::park_timeout(rest_after(Duration::ZERO));
    }
    drop((steered, half));
}

#[test]
fn what_was_tcpauses_own_before_the_marks_does_not_count() {
    let (mine, queued) = (row(State::Established, 7, 1), row(State::Established, 0, 2));
    let (steered, accepted) = (row(State::Established, 8, 3), row(State::Established, 9, 2));
    let own = HashSet::from([7]);
    let mut first = counter();
    first.spare(&[mine.clone(), queued.clone()], &own);
    assert_eq!(first.count_all(&[mine.clone(), queued.clone()]), 0);
    assert_eq!(first.count_all(&[mine.clone(), accepted, steered.clone()]), 1, "by its cookie");
    // Beside what an earlier process has steered, nobody knows in which queue it waits.
    let mut second = counter();
    second.spare(&[mine.clone(), queued.clone(), steered.clone()], &own);
    assert_eq!(second.count_all(&[mine, queued, steered]), 2);
}

#[test]
fn a_handshake_that_is_given_up_is_to_go() {
    let half = |repeats, number| Row { repeats, ..row(State::SynRecv, 0, number) };
    let mut counter = counter();
    assert_eq!(counter.count_all(&[half(0, 1), half(1, 2)]), 2);
    assert_eq!(counter.given_up(&[half(1, 1), half(1, 2)]), []);
    // A later one is the proxy's own.
    assert_eq!(counter.given_up(&[half(1, 1), half(2, 2), half(5, 3)]), [half(2, 2)]);
    assert_eq!(counter.count_known(&[half(1, 1), half(2, 2)]), 1);
}

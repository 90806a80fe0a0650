//! Tests of the programs in the running kernel, with no rights but the two that steering needs. Where the system refuses BPF,
//! they say that they are skipped.

use std::{
    io::{BufRead as _, BufReader},
    net::TcpStream,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with, sockopt},
    thread::{
        CapabilitySet, CapabilitySets, LinkNameSpaceType, move_into_link_name_space,
        set_capabilities,
    },
};

use super::*;
use crate::sys::boot::boot_time;

/// Longest wait for a client. A passing test never waits this long.
const PATIENCE: Duration = Duration::from_secs(20);
const LOOP: &str = "127.0.0.1:0";
const RIGHTS: CapabilitySet = CapabilitySet::BPF.union(CapabilitySet::NET_ADMIN);

/// Runs `test` on a thread that has these rights alone, or no test where it cannot have them.
fn with_rights(rights: CapabilitySet, test: impl FnOnce() + Send) {
    let limited = || {
        let inheritable = CapabilitySet::empty();
        let sets = CapabilitySets { effective: rights, permitted: rights, inheritable };
        match set_capabilities(None, sets) {
            Ok(()) => test(),
            Err(error) => println!("skipped: this user has no right to BPF: {error}"),
        }
    };
    thread::scope(|scope| scope.spawn(limited).join().unwrap());
}

/// Returns what steers for a proxy at `own`, if the system has BPF.
fn attached(own: &[SocketAddr]) -> Option<Bpf> {
    match Bpf::load(own, None).and_then(|mut bpf| bpf.attach().map(|()| bpf)) {
        Ok(bpf) => Some(bpf),
        Err(error) if ["CAP_BPF", "membarrier"].iter().any(|it| error.why.contains(it)) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Runs `test` with a proxy's listener at `own`, a server's at `server`, and what steers from the one to the other.
fn steering(
    own: &str,
    server: &str,
    test: impl FnOnce(&TestListener, TestListener, &mut Bpf) + Send,
) {
    let (own, server) = (listen(own), listen(server));
    with_rights(RIGHTS, || {
        let Some(mut bpf) = attached(&[own.address]) else { return };
        assert_eq!(bpf.find(&[server.address]), Ok(Found::Listener));
        bpf.steer_until(u64::MAX).unwrap();
        test(&own, server, &mut bpf);
    });
}

/// Listener, blocking.
struct TestListener {
    fd: OwnedFd,
    address: SocketAddr,
}

/// Makes a socket that is bound but does not listen, as a member of a group.
fn bound(
    address: SocketAddr,
    protocol: Option<rustix::net::Protocol>,
) -> rustix::io::Result<TestListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let fd = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, protocol)?;
    sockopt::set_socket_reuseport(&fd, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&fd, !address.ip().is_unspecified())?;
    }
    rustix::net::bind(&fd, &address)?;
    let address = rustix::net::getsockname(&fd)?.try_into()?;
    Ok(TestListener { fd, address })
}

fn listen(address: &str) -> TestListener {
    let listener = bound(address.parse().unwrap(), None).unwrap();
    rustix::net::listen(&listener.fd, 128).unwrap();
    listener
}

impl TestListener {
    /// Returns the address at another host address.
    fn at(&self, ip: &str) -> SocketAddr {
        SocketAddr::new(ip.parse().unwrap(), self.address.port())
    }

    fn accept(&self) -> TcpStream {
        TcpStream::from(rustix::net::accept(&self.fd).unwrap())
    }
}

/// Connects to `address`, and returns the place of the listener that gets the connection, with that.
#[track_caller]
fn dial(address: SocketAddr, listeners: &[&TestListener]) -> (usize, TcpStream) {
    let client = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
    let mut ready: Vec<PollFd<'_>> =
        listeners.iter().map(|it| PollFd::new(&it.fd, PollFlags::IN)).collect();
    poll(&mut ready, Some(&Timespec::try_from(PATIENCE).unwrap())).unwrap();
    let place =
        ready.iter().position(|it| !it.revents().is_empty()).expect("a listener that has it");
    let accepted = listeners[place].accept();
    let canonical = |it: SocketAddr| (it.ip().to_canonical(), it.port());
    let from = accepted.peer_addr().unwrap();
    assert_eq!(
        canonical(from),
        canonical(client.local_addr().unwrap()),
        "the client's own address"
    );
    assert_eq!(canonical(accepted.local_addr().unwrap()), canonical(address));
    (place, accepted)
}

#[test]
fn clients_are_steered_until_the_deadline() {
    steering(LOOP, LOOP, |own, server, bpf| {
        let place = || dial(own.address, &[own, &server]).0;
        assert_eq!((place(), bpf.assigned()), (1, 1), "without end");
        let now = || u64::try_from(boot_time().as_nanos()).unwrap();
        for (until, expected) in [(0, 0), (now() - 1, 0), (now() + 60_000_000_000, 1), (1, 0)] {
            bpf.steer_until(until).unwrap();
            Bpf::settle().unwrap();
            assert_eq!(place(), expected, "{until}");
        }
        bpf.steer_until(u64::MAX).unwrap();
        assert_eq!((place(), bpf.assigned(), bpf.taken()), (1, 3, 0));
    });
}

#[test]
fn a_server_that_is_gone_gets_no_clients_and_the_next_one_is_found() {
    steering(LOOP, LOOP, |own, server, bpf| {
        let address = server.address;
        assert_eq!(dial(own.address, &[own, &server]).0, 1);
        drop(server);
        assert_eq!(dial(own.address, &[own]).0, 0);
        assert_eq!(bpf.find(&[address]), Ok(Found::Nobody));
        let server = listen(&address.to_string());
        assert_eq!(dial(own.address, &[own, &server]).0, 0, "not found yet");
        assert_eq!(bpf.find(&[address]), Ok(Found::Listener));
        assert_eq!(dial(own.address, &[own, &server]).0, 1);
        // Another server, or none, takes its place.
        let other = listen(LOOP);
        assert_eq!(bpf.find(&[other.address]), Ok(Found::Listener));
        assert_eq!(dial(own.address, &[own, &server, &other]).0, 2);
        let silent = bound(LOOP.parse().unwrap(), None).unwrap();
        let nowhere = [
            (silent.address, Found::Nobody),
            (own.address, Found::Own),
            (own.at("198.51.100.1"), Found::Elsewhere),
        ];
        for (nowhere, why) in nowhere {
            assert_eq!(bpf.find(&[nowhere]), Ok(why));
            assert_eq!(dial(own.address, &[own, &server, &other]).0, 0, "{why}");
            assert_eq!(bpf.find(&[other.address]), Ok(Found::Listener));
        }
    });
}

#[test]
fn each_member_of_a_group_gets_clients() {
    steering(LOOP, LOOP, |own, server, bpf| {
        let address = server.address;
        let more = [(); 2].map(|()| listen(&address.to_string()));
        let [second, third] = &more;
        let mut counts = [0; 4];
        for _client in 0..100 {
            counts[dial(own.address, &[own, &server, second, third]).0] += 1;
        }
        assert!(counts[0] == 0 && counts[1..].iter().all(|count| *count > 0), "{counts:?}");
        drop(more);
        assert_eq!(bpf.find(&[address]), Ok(Found::Listener));
        assert_eq!(dial(own.address, &[own, &server]).0, 1);
    });
}

/// Asserts that clients of each address reach the server if that is expected, and the proxy otherwise.
#[track_caller]
fn assert_steered(own: &str, server: &str, expected: &[(&str, bool)]) {
    let names = format!("from {own} to {server}");
    steering(own, server, |own, server, _bpf| {
        for (ip, is_steered) in expected {
            let place = dial(own.at(ip), &[own, &server]).0;
            assert_eq!(place == 1, *is_steered, "{names}: {ip}");
        }
    });
}

#[test]
fn families_and_wildcards() {
    assert_steered("0.0.0.0:0", "127.0.0.1:0", &[("127.0.0.1", true), ("127.0.0.2", true)]);
    assert_steered("127.0.0.1:0", "0.0.0.0:0", &[("127.0.0.1", true)]);
    if bound("[::1]:0".parse().unwrap(), None).is_err() {
        return println!("skipped: there is no IPv6 on this machine");
    }
    let both = |v4, v6| [("127.0.0.1", v4), ("127.0.0.2", v4), ("::1", v6)];
    assert_steered("[::]:0", "[::]:0", &both(true, true));
    assert_steered("[::]:0", "127.0.0.1:0", &both(true, false));
    assert_steered("[::]:0", "0.0.0.0:0", &both(true, false));
    assert_steered("[::]:0", "[::1]:0", &both(false, true));
    assert_steered("[::1]:0", "[::]:0", &[("::1", true)]);
    assert_steered("[::1]:0", "[::1]:0", &[("::1", true)]);
}

#[test]
fn several_addresses_on_both_sides() {
    let servers = ["127.0.0.1:0", "[::1]:0"].map(|it| bound(it.parse().unwrap(), None));
    let [Ok(first), Ok(second)] = servers else {
        return println!("skipped: there is no IPv6 on this machine");
    };
    rustix::net::listen(&first.fd, 8).unwrap();
    rustix::net::listen(&second.fd, 8).unwrap();
    // Nobody is bound there, so each client that is not steered is refused.
    let port = listen(LOOP).address.port();
    let mut own: Vec<SocketAddr> =
        (1..8).map(|last| SocketAddr::from(([127, 0, 0, last], port))).collect();
    own.push((Ipv6Addr::LOCALHOST, port).into());
    with_rights(RIGHTS, || {
        let Some(bpf) = attached(&own) else { return };
        assert_eq!(bpf.find(&[first.address, second.address]), Ok(Found::Listener));
        bpf.steer_until(u64::MAX).unwrap();
        for address in &own {
            assert_eq!(dial(*address, &[&first, &second]).0 == 1, address.is_ipv6(), "{address}");
        }
        TcpStream::connect(("127.0.0.8", port)).unwrap_err();
        TcpStream::connect(("127.0.0.1", first.address.port())).unwrap();
        own.push(([127, 0, 0, 8], port).into());
        let error = Bpf::load(&own, None).map(drop).unwrap_err();
        assert!(error.why.contains("9 addresses"), "{error}");
    });
}

#[test]
fn listeners_that_cannot_be_steered_to_are_named() {
    let own = listen("0.0.0.0:0");
    let server = bound(LOOP.parse().unwrap(), Some(ipproto::MPTCP));
    let group = listen(LOOP);
    with_rights(RIGHTS, || {
        let Some(bpf) = attached(&[own.address]) else { return };
        assert_eq!(bpf.find(&[]), Ok(Found::Elsewhere));
        assert_eq!(bpf.find(&[own.at("127.0.0.9")]), Ok(Found::Own));
        assert_eq!(bpf.find(&[group.at("0.0.0.0")]), Ok(Found::Listener), "by the loopback");
        assert_eq!(bpf.find(&[group.at("::ffff:127.0.0.1")]), Ok(Found::Listener));
        let Ok(server) = server else { return println!("skipped: there is no MPTCP") };
        assert_eq!(bpf.find(&[server.address]), Ok(Found::Nobody), "it does not listen yet");
        rustix::net::listen(&server.fd, 8).unwrap();
        assert_eq!(bpf.find(&[server.address]), Ok(Found::Mptcp));
        assert_eq!(bpf.find(&[server.address, group.address]), Ok(Found::Listener));
    });
}

#[test]
fn another_program_that_chose_first_is_noticed() {
    steering(LOOP, LOOP, |own, server, first| {
        let Some(second) = attached(&[own.address]) else { return };
        let other = listen(LOOP);
        assert_eq!(second.find(&[other.address]), Ok(Found::Listener));
        second.steer_until(u64::MAX).unwrap();
        let place = || dial(own.address, &[own, &server, &other]).0;
        assert_eq!((place(), second.taken(), second.assigned()), (1, 1, 0));
        first.steer_until(0).unwrap();
        assert_eq!((place(), second.taken(), second.assigned()), (2, 1, 1));
    });
}

#[test]
fn marks_are_inherited_across_instances() {
    let (own, server) = (bound(LOOP.parse().unwrap(), None).unwrap(), listen(LOOP));
    with_rights(RIGHTS, || {
        let Some(first) = attached(&[own.address]) else { return };
        first.mark(own.fd.as_fd()).unwrap();
        rustix::net::listen(&own.fd, 8).unwrap();
        let _waiting = TcpStream::connect(own.address).unwrap();
        let marks = first.marks().try_clone_to_owned().unwrap();
        drop(first);
        let mut second = Bpf::load(&[own.address], Some(marks)).unwrap();
        second.attach().unwrap();
        let marks = MapData::from_fd(second.marks().try_clone_to_owned().unwrap()).unwrap();
        let marks = SkStorage::<_, u32>::try_from(Map::SkStorage(marks)).unwrap();
        let is_marked = |socket: &TcpStream| marks.get(socket, 0).is_ok();
        assert!(is_marked(&own.accept()), "it was in the queue of the listener");
        assert!(is_marked(&dial(own.address, &[&own]).1), "the listener's mark stays");
        assert_eq!(second.find(&[server.address]), Ok(Found::Listener));
        second.steer_until(u64::MAX).unwrap();
        let (_place, steered) = dial(own.address, &[&server]);
        assert!(!is_marked(&steered));
        second.mark(steered.as_fd()).unwrap();
        assert!(is_marked(&steered), "one that is adopted");
        let error =
            Bpf::load(&[own.address], Some(own.fd.try_clone().unwrap())).map(drop).unwrap_err();
        assert!(error.why.contains("map"), "{error}");
    });
}

#[test]
fn listeners_elsewhere_catch_what_is_not_steered() {
    let server = listen(LOOP);
    let port = listen(LOOP).address.port();
    let own = SocketAddr::from(([127, 0, 0, 1], port));
    with_rights(RIGHTS, || {
        let Some(bpf) = attached(&[own, (Ipv6Addr::LOCALHOST, port).into()]) else { return };
        TcpStream::connect(own).unwrap_err();
        let catcher = listen(LOOP);
        bpf.catch(catcher.fd.as_fd()).unwrap();
        assert_eq!(bpf.find(&[server.address]), Ok(Found::Listener));
        let place = || dial(own, &[&catcher, &server]).0;
        assert_eq!(place(), 0);
        bpf.steer_until(u64::MAX).unwrap();
        assert_eq!(place(), 1);
        bpf.steer_until(0).unwrap();
        assert_eq!((place(), bpf.assigned()), (0, 1));
        if let Ok(other) = bound("[::]:0".parse().unwrap(), None) {
            rustix::net::listen(&other.fd, 8).unwrap();
            bpf.catch(other.fd.as_fd()).unwrap();
            let own_too = (Ipv6Addr::LOCALHOST, port).into();
            assert_eq!(dial(own_too, &[&catcher, &other]).0, 1);
            assert_eq!(dial(own, &[&catcher, &other]).0, 0, "that of its family comes first");
            drop(catcher);
            assert_eq!(dial(own, &[&other]).0, 0);
        } else {
            drop(catcher);
        }
        TcpStream::connect(own).unwrap_err();
    });
}

#[test]
fn missing_rights_are_named() {
    let own = listen(LOOP).address;
    // What the kernel can is found out once for the whole process, and must be with all rights.
    with_rights(RIGHTS, || drop(attached(&[own])));
    for rights in [CapabilitySet::empty(), CapabilitySet::BPF, CapabilitySet::NET_ADMIN] {
        with_rights(rights, || {
            let error = Bpf::load(&[own], None).and_then(|mut bpf| bpf.attach()).unwrap_err();
            let names = ["CAP_BPF", "CAP_NET_ADMIN"].iter().all(|it| error.why.contains(it));
            assert!(names && error.why.lines().count() == 1, "{rights:?}: {error}");
        });
    }
}

/// Process in a network namespace of its own, which ends with this value.
struct Namespace(Child);

impl Namespace {
    /// Makes one with a loopback, if this user may.
    fn new() -> Option<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "ip link set lo up && echo ready && read line"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut namespace = Self(command.spawn().ok()?);
        let mut line = String::new();
        BufReader::new(namespace.0.stdout.take()?).read_line(&mut line).ok()?;
        (line == "ready\n").then_some(namespace)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

#[test]
fn the_namespace_of_the_thread_counts_and_takes_64_programs() {
    let Some(namespace) = Namespace::new() else {
        return println!("skipped: this user cannot make a network namespace");
    };
    let inside = || {
        let file = File::open(format!("/proc/{}/ns/net", namespace.0.id())).unwrap();
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        let (own, server) = (listen(LOOP), listen(LOOP));
        let Some(mut bpf) = attached(&[own.address]) else { return };
        assert_eq!(bpf.find(&[server.address]), Ok(Found::Listener));
        bpf.steer_until(u64::MAX).unwrap();
        assert_eq!(dial(own.address, &[&own, &server]).0, 1);
        for _more in 1..64 {
            bpf.attach_to(&file).map(drop).unwrap();
        }
        let mut more = Bpf::load(&[own.address], None).unwrap();
        let error = more.attach().unwrap_err();
        assert!(error.why.contains("64 programs"), "{error}");
    };
    thread::scope(|scope| scope.spawn(inside).join().unwrap());
}

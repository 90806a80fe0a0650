//! The upstream's name: a resolver that hangs, fails or changes its mind, and an address that is dead.
//!
//! Each test has a network and a name server of its own, and the proxy asks it by the system's resolver.

use std::{
    fs,
    net::{Ipv4Addr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::harness::{
    Addr, End, FIGURE, Listener, Proxy, Received, Stream, Upstream, echo, in_namespace, spawn,
    wait_until,
};

/// The upstream's name and port.
const NAME: &str = "server.test";
const PORT: u16 = 4000;

pub(crate) const ONE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const OTHER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);

/// The time for which the proxy tries an address before the next has its turn.
const ATTEMPT: Duration = Duration::from_millis(300);

/// The reaction of the name server to a question.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Addresses(Vec<Ipv4Addr>),
    /// It says that it cannot tell.
    Failure,
    /// It says nothing.
    Silence,
}

/// A name server that gives one answer to every question.
pub(crate) struct NameServer {
    answer: Arc<Mutex<Answer>>,
    asked: Arc<AtomicUsize>,
}

impl NameServer {
    /// Starts where the system's resolver looks. A silent one is waited for longer than any test lasts.
    pub(crate) fn start(answer: Answer) -> Self {
        fs::write("/etc/nsswitch.conf", "hosts: dns\n").unwrap();
        fs::write("/etc/resolv.conf", "nameserver 127.0.0.1\noptions timeout:30 attempts:2\n")
            .unwrap();
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 53)).unwrap();
        let answer = Arc::new(Mutex::new(answer));
        let asked = Arc::new(AtomicUsize::new(0));
        let (current, counter) = (answer.clone(), asked.clone());
        drop(spawn(move || {
            let mut question = [0; 512];
            while let Ok((length, peer)) = socket.recv_from(&mut question) {
                counter.fetch_add(1, Ordering::SeqCst);
                let answer = current.lock().unwrap().clone();
                if let Some(bytes) = reply(&question[..length], &answer) {
                    socket.send_to(&bytes, peer).unwrap();
                }
            }
        }));
        Self { answer, asked }
    }

    pub(crate) fn set(&self, answer: Answer) {
        *self.answer.lock().unwrap() = answer;
    }

    /// Returns the number of questions so far.
    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

/// The message that answers `question` (RFC 1035, 4.1), if there is one.
fn reply(question: &[u8], answer: &Answer) -> Option<Vec<u8>> {
    const HEAD: usize = 12;
    const TYPE_A: [u8; 2] = [0, 1];
    let name = question[HEAD..].iter().position(|&byte| byte == 0)? + 1;
    let asked = &question[HEAD..HEAD + name + 4];
    let (code, addresses) = match answer {
        // There are no addresses of IPv6.
        Answer::Addresses(addresses) if asked[name..name + 2] == TYPE_A => (0, &addresses[..]),
        Answer::Addresses(_) => (0, &[][..]),
        Answer::Failure => (2, &[][..]),
        Answer::Silence => return None,
    };
    let mut bytes = question[..2].to_vec();
    // An answer, recursion asked for and available; one question, and so many answers.
    bytes.extend([0x81, 0x80 | code, 0, 1, 0, u8::try_from(addresses.len()).ok()?, 0, 0, 0, 0]);
    bytes.extend(asked);
    for address in addresses {
        // The name of the question; A, IN; to be kept for 0 s; 4 bytes.
        bytes.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        bytes.extend(address.octets());
    }
    Some(bytes)
}

fn addr(ip: Ipv4Addr) -> Addr {
    Addr::Tcp((ip, PORT).into())
}

pub(crate) fn upstream(ip: Ipv4Addr) -> Upstream {
    Upstream::on(Listener::bind(&addr(ip)), echo)
}

/// An upstream that sends one letter and closes, so that a client can tell who served it.
fn sign(ip: Ipv4Addr, letter: u8) -> Upstream {
    Upstream::on(Listener::bind(&addr(ip)), move |mut stream| {
        stream.send(&[letter]);
        Received { bytes: Vec::new(), end: End::Eof }
    })
}

pub(crate) fn proxy() -> Proxy {
    Proxy::builder().upstream_at(&format!("{NAME}:{PORT}")).start()
}

/// Pauses and resumes, which looks the name up; returns a client that was held.
fn resume_with_one_held(proxy: &Proxy) -> Stream {
    proxy.control().pause();
    let client = proxy.connect_held();
    proxy.control().resume();
    client
}

#[test]
fn a_resolver_that_hangs_holds_up_nobody() {
    in_namespace("upstream::names::a_resolver_that_hangs_holds_up_nobody", || {
        const CLIENTS: usize = 20;
        let names = NameServer::start(Answer::Addresses(vec![ONE]));
        let upstream = upstream(ONE);
        let mut proxy = proxy();
        proxy.connect().assert_echo(b"found");
        names.set(Answer::Silence);
        let begun = Instant::now();
        resume_with_one_held(&proxy).assert_echo(b"held");
        let resumed = begun.elapsed();
        proxy.wait_for_log("takes long; going on with what is known");
        for _ in 0..CLIENTS {
            proxy.connect().assert_echo(b"served meanwhile");
        }
        assert!(!proxy.control().is_paused());
        proxy.control().wait_counts(|status| (status.active, status.failed), (0, 0));
        proxy.terminate();
        assert_eq!(proxy.exit_code(), 0);
        println!(
            "{FIGURE}while the resolver hangs: resumed after {resumed:?}, {} clients served, stopped",
            upstream.accepted() - 1
        );
    });
}

#[test]
fn a_resolver_that_hangs_from_the_start_does_not_keep_it_from_starting() {
    in_namespace(
        "upstream::names::a_resolver_that_hangs_from_the_start_does_not_keep_it_from_starting",
        || {
            let _names = NameServer::start(Answer::Silence);
            let mut proxy = proxy();
            let client = proxy.connect();
            proxy.control().wait_counts(|status| (status.held, status.active), (1, 0));
            client.reset();
            proxy.control().wait_idle();
            proxy.terminate();
            assert_eq!(proxy.exit_code(), 0);
        },
    );
}

#[test]
fn a_name_that_is_known_only_later_costs_no_client_its_connection() {
    in_namespace(
        "upstream::names::a_name_that_is_known_only_later_costs_no_client_its_connection",
        || {
            let server = NameServer::start(Answer::Failure);
            let upstream = upstream(ONE);
            let proxy = Proxy::builder()
                .upstream_at(&format!("{NAME}:{PORT}"))
                .args(["--upstream-connect-timeout", "300ms", "--upstream-retry-for", "20s"])
                .start();
            let clients: Vec<_> = (0..20).map(|_| proxy.connect()).collect();
            proxy.control().wait_counts(|status| status.held, 20);
            proxy.wait_for_log("its name is not known; trying again");
            server.set(Answer::Addresses(vec![ONE]));
            for mut client in clients {
                client.assert_echo(b"served");
            }
            assert_eq!((upstream.accepted(), proxy.control().status().failed), (20, 0));
        },
    );
}

#[test]
fn a_resolver_that_fails_takes_nothing_away() {
    in_namespace("upstream::names::a_resolver_that_fails_takes_nothing_away", || {
        let names = NameServer::start(Answer::Failure);
        let upstream = upstream(ONE);
        let proxy = proxy();
        proxy.wait_for_log("cannot look up");
        // One that came too early is served as soon as the name is known.
        let mut early = proxy.connect();
        early.send(b"early");
        proxy.control().wait_counts(|status| status.held, 1);
        names.set(Answer::Addresses(vec![ONE]));
        assert_eq!(early.receive(5), b"early");
        names.set(Answer::Failure);
        for _ in 0..3 {
            resume_with_one_held(&proxy).assert_echo(b"still known");
        }
        // An answer without addresses is a failure, too.
        names.set(Answer::Addresses(Vec::new()));
        resume_with_one_held(&proxy).assert_echo(b"still known");
        assert_eq!(proxy.control().status().failed, 0);
        println!(
            "{FIGURE}{} clients served by a resolver that fails, 0 failed",
            upstream.accepted()
        );
    });
}

#[test]
fn a_name_that_moves_is_followed() {
    in_namespace("upstream::names::a_name_that_moves_is_followed", || {
        const MOVES: usize = 10;
        let names = NameServer::start(Answer::Addresses(vec![ONE]));
        let upstreams = [(ONE, sign(ONE, b'1')), (OTHER, sign(OTHER, b'2'))];
        let proxy = proxy();
        assert_eq!(proxy.connect().receive_all().bytes, b"1");
        // A resume knows it at once.
        for (ip, letter) in [(OTHER, b"2"), (ONE, b"1")].into_iter().cycle().take(MOVES) {
            names.set(Answer::Addresses(vec![ip]));
            assert_eq!(resume_with_one_held(&proxy).receive_all().bytes, letter);
            assert_eq!(proxy.connect().receive_all().bytes, letter);
        }
        // So does a pause that ends by itself, or with its caller.
        for (query, ip, letter) in
            [("ttl=100ms", OTHER, b"2"), ("while=connected", ONE, b"1"), ("ttl=100ms", OTHER, b"2")]
        {
            let mut caller = proxy.control().send("PUT", &format!("/paused?{query}"), &[]);
            assert!(caller.receive(12).ends_with(b"201"));
            let mut client = proxy.connect();
            names.set(Answer::Addresses(vec![ip]));
            drop(caller);
            assert_eq!(client.receive_all().bytes, letter, "{query}");
        }
        names.set(Answer::Addresses(vec![ONE]));
        assert_eq!(resume_with_one_held(&proxy).receive_all().bytes, b"1");
        // Without one, those who find nobody have it looked up.
        let [(_, one), (_, _other)] = upstreams;
        drop(one);
        names.set(Answer::Addresses(vec![OTHER]));
        wait_until("the name is looked up anew", || {
            // Until then they are reset, perhaps before they know that they were connected.
            proxy.addr().try_connect().is_ok_and(|mut client| client.receive_all().bytes == b"2")
        });
        println!("{FIGURE}{MOVES} of {MOVES} moves followed by the resume");
    });
}

#[test]
fn the_name_of_a_switch_is_followed_and_no_longer_the_one_before() {
    in_namespace(
        "upstream::names::the_name_of_a_switch_is_followed_and_no_longer_the_one_before",
        || {
            let names = NameServer::start(Answer::Addresses(vec![ONE]));
            let _signs = [sign(ONE, b'1'), sign(OTHER, b'2')];
            let first = Ipv4Addr::new(127, 0, 0, 4);
            let _first = sign(first, b'0');
            let proxy = Proxy::builder().upstream_at(&format!("{first}:{PORT}")).start();
            assert_eq!(proxy.connect().receive_all().bytes, b"0");
            let to_name = format!("/upstream?addr={NAME}:{PORT}");
            assert_eq!(proxy.control().put(&to_name).status, 200);
            assert_eq!(proxy.connect().receive_all().bytes, b"1");
            names.set(Answer::Addresses(vec![OTHER]));
            assert_eq!(resume_with_one_held(&proxy).receive_all().bytes, b"2");
            proxy.upgrade();
            assert_eq!(proxy.connect().receive_all().bytes, b"2");
            names.set(Answer::Addresses(vec![ONE]));
            assert_eq!(resume_with_one_held(&proxy).receive_all().bytes, b"1");
            assert_eq!(proxy.control().delete("/upstream").status, 204);
            names.set(Answer::Addresses(vec![OTHER]));
            assert_eq!(resume_with_one_held(&proxy).receive_all().bytes, b"0");
            names.set(Answer::Failure);
            let answer = proxy.control().put(&to_name);
            assert!(answer.assert_error(502).contains(NAME), "{answer}");
            assert_eq!(proxy.connect().receive_all().bytes, b"0");
        },
    );
}

#[test]
fn a_dead_address_makes_room_for_the_next_in_time() {
    in_namespace("upstream::names::a_dead_address_makes_room_for_the_next_in_time", || {
        let _names = NameServer::start(Answer::Addresses(vec![ONE, OTHER]));
        let proxy = proxy();
        // The resolver may have an order of its own.
        let line = proxy.wait_for_log("is at ");
        let [one, other] = [ONE, OTHER].map(|ip| line.find(&ip.to_string()).unwrap());
        let (first, second) = if one < other { (ONE, OTHER) } else { (OTHER, ONE) };
        let dead = Listener::bind(&addr(first));
        dead.backlog(0);
        let filled = dead.fill();
        let _upstream = upstream(second);
        let begun = Instant::now();
        proxy.connect().assert_echo(b"served by the second");
        let elapsed = begun.elapsed();
        println!(
            "{FIGURE}a dead first address, with {filled} in its queue: served after {elapsed:?}"
        );
        // A second would be TCP's own next try.
        assert!((ATTEMPT..Duration::from_secs(1)).contains(&elapsed), "{elapsed:?}");
        assert_eq!(proxy.control().status().failed, 0);
    });
}

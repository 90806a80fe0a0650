//! An upstream with several addresses, some of which are dead: whoever comes is served by one that is not.

use std::{
    fs,
    time::{Duration, Instant},
};

use crate::harness::{
    Addr, Builder, End, FIGURE, Listener, Proxy, Received, Upstream, echo, in_namespace, wait_until,
};

/// The upstream's name and port.
const NAME: &str = "server.test";
const PORT: u16 = 4000;

/// The time for which the proxy tries an address before the next has its turn.
const ATTEMPT: Duration = Duration::from_millis(300);

/// Gives the upstream's name so many addresses; to be called in a namespace.
fn proxy(addresses: u8) -> Builder {
    let lines = (1..=addresses).map(|last| format!("127.0.1.{last} {NAME}\n"));
    fs::write("/etc/hosts", lines.collect::<String>()).unwrap();
    fs::write("/etc/host.conf", "multi on\n").unwrap();
    fs::write("/etc/nsswitch.conf", "hosts: files\n").unwrap();
    Proxy::builder().upstream_at(&format!("{NAME}:{PORT}"))
}

/// Returns the addresses in the order that the resolver has given them.
fn order(proxy: &Proxy) -> Vec<Addr> {
    let line = proxy.wait_for_log("is at ");
    let (_, list) = line.split_once("is at ").unwrap();
    list.split(", ").map(|address| Addr::parse(address).unwrap()).collect()
}

/// Listens at an address so that it swallows each dial.
fn dead(addr: &Addr) -> Listener {
    let listener = Listener::bind(addr);
    listener.backlog(0);
    // It stays in the queue, which has room for no other.
    drop(addr.connect());
    listener
}

/// Sends one letter and closes, so that a client can tell who has served it.
fn sign(listener: Listener, letter: u8) -> Upstream {
    Upstream::on(listener, move |mut stream| {
        stream.send(&[letter]);
        Received { bytes: Vec::new(), end: End::Eof }
    })
}

/// Counts the dials that dead addresses of this network have swallowed.
fn swallowed() -> u64 {
    let counts = fs::read_to_string("/proc/net/netstat").unwrap();
    let mut lines = counts.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, numbers) = (lines.next().unwrap(), lines.next().unwrap());
    let place = names.split(' ').position(|name| name == "ListenOverflows").unwrap();
    numbers.split(' ').nth(place).unwrap().parse().unwrap()
}

#[test]
fn a_good_address_behind_five_dead_ones_is_reached_within_a_connect_timeout_of_a_second() {
    in_namespace(
        "upstream::dead_addresses::a_good_address_behind_five_dead_ones_is_reached_within_a_connect_timeout_of_a_second",
        || {
            let proxy = proxy(6)
                .args(["--upstream-connect-timeout", "1s", "--upstream-retry-for", "15s"])
                .start();
            let mut addresses = order(&proxy);
            let good = addresses.pop().unwrap();
            let _dead: Vec<_> = addresses.iter().map(dead).collect();
            let _upstream = Upstream::on(Listener::bind(&good), echo);
            let begin = Instant::now();
            proxy.connect().assert_echo(b"first");
            let first = begin.elapsed();
            let before = swallowed();
            let shortest = (0..5).map(|_| {
                let begin = Instant::now();
                proxy.connect().assert_echo(b"next");
                begin.elapsed()
            });
            let shortest = shortest.min().unwrap();
            println!(
                "{FIGURE}behind 5 dead addresses: the first is served after {first:?}, the next after {shortest:?}"
            );
            assert_eq!(swallowed(), before, "dead addresses are dialled again");
            assert!(shortest < ATTEMPT, "{shortest:?}");
            assert_eq!(proxy.control().status().failed, 0);
        },
    );
}

#[test]
fn a_good_address_behind_eighteen_dead_ones_is_reached_at_the_default() {
    in_namespace(
        "upstream::dead_addresses::a_good_address_behind_eighteen_dead_ones_is_reached_at_the_default",
        || {
            let proxy = proxy(19).start();
            let mut addresses = order(&proxy);
            let good = addresses.pop().unwrap();
            let _dead: Vec<_> = addresses.iter().map(dead).collect();
            let _upstream = Upstream::on(Listener::bind(&good), echo);
            // One has no time for so many, and the next goes on.
            assert_eq!(proxy.connect().receive_all().end, End::Reset);
            let begin = Instant::now();
            proxy.connect().assert_echo(b"second");
            let second = begin.elapsed();
            let before = swallowed();
            proxy.connect().assert_echo(b"third");
            println!("{FIGURE}behind 18 dead addresses: the second is served after {second:?}");
            assert_eq!(swallowed(), before, "dead addresses are dialled again");
            assert_eq!(proxy.control().status().failed, 1);
        },
    );
}

#[test]
fn a_dead_first_address_that_comes_alive_is_used_again() {
    in_namespace(
        "upstream::dead_addresses::a_dead_first_address_that_comes_alive_is_used_again",
        || {
            const CLIENTS: usize = 200;
            let proxy = proxy(2).args(["--proxy-threads", "2"]).start();
            let addresses = order(&proxy);
            let first = dead(&addresses[0]);
            let _second = sign(Listener::bind(&addresses[1]), b'2');
            let served = || proxy.connect().receive_all().bytes;
            assert_eq!(served(), b"2");
            let (before, begin) = (swallowed(), Instant::now());
            for _client in 0..CLIENTS {
                assert_eq!(served(), b"2");
            }
            let (tried, elapsed) = (swallowed() - before, begin.elapsed());
            assert!(
                tried <= elapsed.as_secs() / 10 + 1,
                "it was tried {tried} times in {elapsed:?}"
            );
            first.backlog(4096);
            let _first = sign(first, b'1');
            let begin = Instant::now();
            wait_until("the first address is used again", || {
                let letter = served();
                assert!([b"1", b"2"].iter().any(|known| letter == *known), "{letter:?}");
                letter == b"1"
            });
            println!(
                "{FIGURE}a first address that is alive again is used after {:?}",
                begin.elapsed()
            );
            for _client in 0..CLIENTS {
                assert_eq!(served(), b"1");
            }
            assert_eq!(proxy.control().status().failed, 0);
        },
    );
}

//! Running out of descriptors.

use std::time::Duration;

use crate::harness::{Proxy, Upstream, echo, wait_until};

/// The limit of open files of these proxies: room for a few clients.
const DESCRIPTORS: u32 = 64;

#[test]
fn more_clients_than_descriptors_wait_for_their_turn() {
    const COUNT: usize = 150;
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .descriptors(DESCRIPTORS)
        .args(["--proxy-threads", "1"])
        .start();
    let mut clients: Vec<_> = (0..COUNT).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(b"hello");
    }
    for _ in 0..20 {
        let status = proxy.control().status();
        assert!(status.accepted < COUNT as u64 && status.failed == 0, "{status:?}");
        assert!(!proxy.control().is_paused());
    }
    // They are served in the order of their coming, each when an earlier one has left.
    for mut client in clients {
        assert_eq!(client.receive(5), b"hello");
    }
    proxy.control().wait_idle();
    proxy.control().wait_counts(|status| (status.accepted, status.failed), (COUNT as u64, 0));
    proxy.connect().assert_echo(b"all is as before");
}

#[test]
fn held_clients_beyond_the_descriptors_are_served_too() {
    const COUNT: usize = 150;
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .descriptors(DESCRIPTORS)
        .args(["--proxy-threads", "1"])
        .start();
    proxy.control().pause();
    let mut clients: Vec<_> = (0..COUNT).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(b"hello");
    }
    proxy.control().wait_status("some are held", |status| status.held > 0);
    proxy.control().resume();
    for mut client in clients {
        assert_eq!(client.receive(5), b"hello");
    }
    let status = proxy.control().wait_status("all have left", |status| status.active == 0);
    assert_eq!((status.accepted, status.failed), (COUNT as u64, 0));
}

#[test]
fn bulk_goes_on_without_descriptors_for_pipes() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder()
        .upstream(&upstream)
        .descriptors(DESCRIPTORS)
        .args(["--proxy-threads", "1"])
        .start();
    let clients: Vec<_> = (0..20)
        .map(|number| {
            let mut client = proxy.connect();
            crate::harness::spawn(move || {
                let bytes = crate::harness::pattern(number, 1 << 20);
                crate::harness::assert_same(&client.round_trip(&bytes), &bytes);
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    assert_eq!(proxy.control().status().failed, 0);
}

#[test]
fn a_crowd_at_the_control_api_costs_the_clients_nothing() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().upstream(&upstream).descriptors(DESCRIPTORS).start();
    let crowd: Vec<_> = (0..200).map(|_| proxy.control().addr().connect()).collect();
    let mut client = proxy.connect();
    // Less than the time that a silent caller may take: the client must not have to wait for one to be thrown out.
    client.read_timeout(Duration::from_secs(3));
    client.assert_echo(b"carried all the same");
    drop(crowd);
    wait_until("the API answers", || proxy.control().probe() == Some(200));
    proxy.connect().assert_echo(b"all is as before");
}

//! Traffic of all kinds over several upgrades: not one failure.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use super::SetAtDrop;
use crate::harness::{Proxy, Received, Upstream, amount, echo, pattern, wait_until};

/// Bytes of each transfer.
const TRANSFER_BYTES: usize = 4 << 20;

const KEPT: u8 = 20;
/// Interval between two requests on a kept connection.
const KEPT_INTERVAL: Duration = Duration::from_millis(50);
/// Most requests on a kept connection, so that it ends even if the test fails.
const KEPT_REQUESTS_MAX: u32 = 2_000;

#[test]
fn requests_and_transfers_go_through_twenty_upgrades() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let stops = AtomicBool::new(false);
    thread::scope(|scope| {
        let end = SetAtDrop(&stops);
        let requests: Vec<_> = (0..4)
            .map(|seed| {
                let (proxy, stops) = (&proxy, &stops);
                scope.spawn(move || {
                    let mut count = 0;
                    while !stops.load(Ordering::Relaxed) {
                        let bytes = pattern(seed + count, 700);
                        let mut client = proxy.connect();
                        client.assert_echo(&bytes);
                        client.finish();
                        assert_eq!(client.receive_all(), Received::ended(b""));
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        for seed in 0..6 {
            let (proxy, stops) = (&proxy, &stops);
            scope.spawn(move || {
                let mut round = 0;
                while round < 2 || !stops.load(Ordering::Relaxed) {
                    let bytes = pattern(100 * seed + round, TRANSFER_BYTES);
                    let mut client = proxy.connect();
                    let mut sender = client.try_clone();
                    let received = thread::scope(|scope| {
                        scope.spawn(|| {
                            sender.send(&bytes);
                            sender.finish();
                        });
                        client.receive_all()
                    });
                    assert!(received == Received::ended(&bytes), "a transfer differs");
                    round += 1;
                }
            });
        }
        for _upgrade in 0..amount(20, 200) {
            proxy.upgrade();
        }
        drop(end);
        let count: u64 = requests.into_iter().map(|thread| thread.join().unwrap()).sum();
        println!("{count} requests over {} upgrades", proxy.heirs().len());
    });
    let status = proxy.control().status();
    assert_eq!(status.failed, 0);
    assert_eq!(status.upgrades, amount(20, 200) as u64);
}

#[test]
fn kept_connections_go_through_five_upgrades() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let stops = AtomicBool::new(false);
    thread::scope(|scope| {
        let end = SetAtDrop(&stops);
        for seed in 0..KEPT {
            let (proxy, stops) = (&proxy, &stops);
            scope.spawn(move || {
                let mut client = proxy.connect();
                let begin = Instant::now();
                for number in (0..KEPT_REQUESTS_MAX).take_while(|_| !stops.load(Ordering::Relaxed))
                {
                    let due = begin + KEPT_INTERVAL * number;
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    client.assert_echo(&pattern(u64::from(seed) << 32 | u64::from(number), 700));
                }
                client.finish();
                assert_eq!(client.receive_all(), Received::ended(b""));
            });
        }
        wait_until("all are connected", || upstream.accepted() == usize::from(KEPT));
        for _upgrade in 0..amount(5, 50) {
            proxy.upgrade();
        }
        drop(end);
    });
    let status = proxy.control().status();
    assert_eq!(
        (status.accepted, status.failed, status.active),
        (u64::from(KEPT), 0, 0),
        "{status:?}"
    );
    assert_eq!(status.upgrades, amount(5, 50) as u64);
}

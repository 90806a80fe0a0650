//! Clients that take nothing of what is under way to them while their server dies, or a pause drains.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::process::Resource;

use crate::harness::{
    CPU_PERCENT_MAX, End, Proxy, Received, Stream, Upstream, assert_same, pattern, wait_until,
};

/// An answer that fits into what the kernel keeps for a client, and is far more than the client has room for.
const ANSWER_BYTES: usize = 400_000;

/// Long enough for a proxy that does not wait to have cut the answer.
const LONG: Duration = Duration::from_millis(500);

/// A server that answers each of `clients`, and then dies with all of its connections at once.
struct Mortal {
    upstream: Upstream,
    dies: Arc<AtomicBool>,
}

impl Mortal {
    fn start() -> Self {
        let dies = Arc::new(AtomicBool::new(false));
        let upstream = Upstream::tcp({
            let dies = Arc::clone(&dies);
            move |mut stream: Stream| {
                let bytes = stream.receive(8);
                stream.send(&pattern(7, ANSWER_BYTES));
                wait_until("the server is to die", || dies.load(Ordering::SeqCst));
                stream.reset();
                Received { bytes, end: End::Eof }
            }
        });
        Self { upstream, dies }
    }

    /// Clients that have asked, and have everything of their answers in the kernel.
    fn clients(proxy: &Proxy, count: usize) -> Vec<Stream> {
        let mut clients: Vec<_> = (0..count).map(|_| proxy.connect()).collect();
        for client in &mut clients {
            client.send(b"question");
        }
        let all = (count * ANSWER_BYTES) as u64;
        proxy.control().wait_counts(|status| status.bytes_to_client, all);
        clients
    }

    fn die(&self, count: usize) {
        self.dies.store(true, Ordering::SeqCst);
        for _ in 0..count {
            self.upstream.session();
        }
    }
}

/// The question "what is not acknowledged yet" used to need a socket of its own, and no answer counted as "nothing".
#[test]
fn a_reset_discards_nothing_where_no_descriptor_is_left() {
    let mortal = Mortal::start();
    let proxy = Proxy::to(&mortal.upstream);
    let mut client = Mortal::clients(&proxy, 1).pop().unwrap();
    proxy.limit(Resource::Nofile, Some(0));
    mortal.die(1);
    thread::sleep(LONG);
    let received = client.receive_all();
    assert_same(&received.bytes, &pattern(7, ANSWER_BYTES));
    assert_eq!(received.end, End::Reset);
}

/// Every connection used to be asked about each 10 ms.
#[test]
fn a_dead_server_with_clients_that_stall_costs_next_to_nothing() {
    const STALLED: usize = 300;
    let mortal = Mortal::start();
    let proxy = Proxy::to(&mortal.upstream);
    let clients = Mortal::clients(&proxy, STALLED);
    mortal.die(STALLED);
    let percent = proxy.cpu_percent();
    println!("{STALLED} stalled clients cost {percent} % of a core");
    assert!(percent <= CPU_PERCENT_MAX, "{percent} % of a core");
    proxy.control().wait_counts(|status| status.active, STALLED as u64);
    // They are waited for 30 s: time for a few of them on a slow machine.
    let mut clients = clients.into_iter();
    for mut client in clients.by_ref().take(5) {
        let received = client.receive_all();
        assert_same(&received.bytes, &pattern(7, ANSWER_BYTES));
        assert_eq!(received.end, End::Reset);
    }
    drop(clients);
    proxy.control().wait_counts(|status| status.active, 0);
}

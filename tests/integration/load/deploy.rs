//! The main job: the upstream is stopped and started again under load, and no client notices.

use std::{
    io::{self, Read, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use crate::harness::{Addr, Listener, Proxy, Upstream, echo, spawn, wait_until};

/// Clients that connect, ask and leave, over and over.
struct Load {
    goes_on: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(addr: &Addr, clients: usize) -> Self {
        let (goes_on, done) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
        let threads = (0..clients)
            .map(|number| {
                let (addr, goes_on, done) = (addr.clone(), goes_on.clone(), done.clone());
                spawn(move || {
                    while goes_on.load(Ordering::SeqCst) {
                        ask(&addr, number)
                            .unwrap_or_else(|error| panic!("an operation failed: {error}"));
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        Self { goes_on, done, threads }
    }

    /// Waits until some more operations are done.
    fn wait_progress(&self) {
        let before = self.done.load(Ordering::SeqCst);
        wait_until("operations go on", || self.done.load(Ordering::SeqCst) > before + 20);
    }

    fn stop(self) -> usize {
        self.goes_on.store(false, Ordering::SeqCst);
        for thread in self.threads {
            thread.join().unwrap();
        }
        self.done.load(Ordering::SeqCst)
    }
}

/// One operation: a connection, two questions, two answers, a clean end.
fn ask(addr: &Addr, number: usize) -> io::Result<()> {
    let mut stream = addr.try_connect()?;
    for question in [format!("question of {number}"), format!("{number} asks again")] {
        stream.write_all(question.as_bytes())?;
        let mut answer = vec![0; question.len()];
        stream.read_exact(&mut answer)?;
        assert_eq!(answer, question.as_bytes());
    }
    stream.finish();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest)?;
    assert!(rest.is_empty());
    Ok(())
}

#[test]
fn an_upstream_is_restarted_under_load_and_nothing_fails() {
    const CLIENTS: usize = 16;
    let dir = tempfile::tempdir().unwrap();
    let addr = Addr::Unix(dir.path().join("upstream.sock"));
    let mut upstream = Upstream::on(Listener::bind(&addr), echo);
    let proxy = Proxy::to(&upstream);
    let load = Load::start(proxy.addr(), CLIENTS);
    for _ in 0..10 {
        load.wait_progress();
        proxy.control().pause();
        proxy.control().wait_idle();
        let accepted = upstream.accepted();
        proxy.control().wait_counts(
            |status| (status.held, status.active, status.connecting),
            (CLIENTS as u64, 0, 0),
        );
        assert_eq!(upstream.accepted(), accepted, "nobody is dialled for while paused");
        drop(upstream);
        upstream = Upstream::on(Listener::bind(&addr), echo);
        assert_eq!(upstream.accepted(), 0);
        proxy.control().resume();
    }
    load.wait_progress();
    let done = load.stop();
    proxy.control().wait_idle();
    proxy.control().wait_counts(|status| (status.failed, status.accepted), (0, done as u64));
}

#[test]
fn after_the_answer_to_a_pause_no_connection_reaches_the_upstream() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let load = Load::start(proxy.addr(), 8);
    for _ in 0..30 {
        load.wait_progress();
        proxy.control().pause();
        proxy.control().wait_idle();
        // What the proxy has connected is accepted at once: the upstream does nothing else.
        let status =
            proxy.control().wait_status("all clients are held, and nothing else", |status| {
                (status.held, status.active, status.connecting) == (8, 0, 0)
            });
        wait_until("the upstream has seen all that was carried", || {
            upstream.accepted() as u64 == status.accepted - status.held
        });
        proxy.control().resume();
    }
    load.stop();
    assert_eq!(proxy.control().status().failed, 0);
}

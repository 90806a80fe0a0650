//! A fleet of a thousand hosts without proxies: their machines, on a real store.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::{client, fixture::Cluster, only, transact};
use crate::{
    config::OnDisconnect,
    fleet::{
        clock::BootTime,
        coordinator::{Coordinator, CoordinatorConfig, Margins, Phase, Wanted},
        etcd::{Etcd, WatchStopper},
        keys::{KeySpace, MemberRecord, State},
        member::{Member, MemberConfig},
        snapshot::{Seen, Snapshot},
        step::{Doing, ProxyView, Step},
        store::{Keys, Operation, Store as _},
    },
    sys::boot::boot_time,
};

const HOSTS: usize = 1_000;
/// Threads that drive the members, each over a connection of its own.
const THREADS: usize = 4;
const TTL: Duration = Duration::from_secs(15);
/// Bound of each part, far beyond what it takes.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_thousand_hosts_acknowledge_a_pause() {
    let Some(cluster) = Cluster::start(3) else { return };
    let keys = KeySpace::new("/t", "many");
    let is_over = Arc::new(AtomicBool::new(false));
    let mut urls = cluster.urls();
    let mut bells = Vec::new();
    let mut threads = Vec::new();
    for index in 0..THREADS {
        urls.rotate_left(1);
        let (bell, rung) = bounded(1);
        bells.push(bell);
        let hosts = (index * HOSTS / THREADS..(index + 1) * HOSTS / THREADS).map(host).collect();
        let (etcd, keys, is_over) = (client(&urls), keys.clone(), Arc::clone(&is_over));
        threads.push(spawn(move || drive(etcd, hosts, &keys, &rung, &is_over)));
    }
    let (bell, rung) = bounded(1);
    let mut looker = Looker { etcd: client(&urls), rung };
    let watched =
        [(client(&urls), keys.pauses(), bells), (client(&urls), keys.all().to_owned(), vec![bell])];
    let mut stoppers = Vec::new();
    for (etcd, prefix, bells) in watched {
        let watch = etcd.watch();
        stoppers.push(watch.stopper());
        threads.push(spawn(move || watch.run(&prefix, TTL, || ring(&bells))));
    }

    let began = Instant::now();
    looker.await_state(&keys, |snapshot| snapshot.hosts.len() == HOSTS);
    println!("{HOSTS} hosts have joined after {:?}", began.elapsed());
    let (paused, resumed) = pause_and_resume(&mut looker, &keys);
    println!(
        "all have acknowledged {paused:?} after the commit, and all have resumed after {resumed:?}"
    );

    is_over.store(true, Ordering::Release);
    stoppers.iter().for_each(WatchStopper::stop);
    for thread in threads {
        thread.join().unwrap();
    }
}

fn host(number: usize) -> String {
    format!("h{number:04}")
}

fn spawn(run: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    Builder::new().spawn(run).unwrap()
}

fn ring(bells: &[Sender<()>]) {
    // If a channel is full, a ring waits there already.
    let _full = bells.iter().filter(|bell| bell.try_send(()).is_err()).count();
}

fn now() -> BootTime {
    BootTime(boot_time())
}

/// Drives members whose proxies carry nothing, until it is over.
fn drive(
    mut etcd: Etcd,
    hosts: Vec<String>,
    keys: &KeySpace,
    rung: &Receiver<()>,
    is_over: &AtomicBool,
) {
    let idle = ProxyView { is_idle: true, ..ProxyView::default() };
    let mut members: Vec<_> = hosts
        .into_iter()
        .map(|host| (Member::new(config(host, keys), now()), idle.clone()))
        .collect();
    while !is_over.load(Ordering::Acquire) {
        let mut next = now() + TTL;
        for (member, view) in &mut members {
            next = next.min(drive_one(member, view, &mut etcd));
        }
        if rung.recv_timeout(next - now()).is_ok() {
            for (member, _) in &mut members {
                member.woken();
            }
        }
    }
}

/// Drives a member until it waits. Returns the time of its next step.
fn drive_one(member: &mut Member, view: &mut ProxyView, etcd: &mut Etcd) -> BootTime {
    loop {
        match member.poll(now(), view) {
            Step::Ask(request, timeout) => {
                let sent = now();
                let result = etcd.ask(&request, timeout);
                member.answered(sent, now(), result);
            }
            Step::Do(doing) => {
                match doing {
                    Doing::Pause { name, .. } => drop(view.holding.insert(name)),
                    Doing::Resume { name } => drop(view.holding.remove(&name)),
                    _ => {}
                }
                member.done(now());
            }
            Step::Wait(until) => return until,
            Step::Over => return now() + TTL,
        }
    }
}

fn config(host: String, keys: &KeySpace) -> MemberConfig {
    let record = MemberRecord {
        identity: host.clone(),
        boot: "b".to_owned(),
        on_disconnect: OnDisconnect::Serve,
        fence: TTL,
        grace: TTL,
        version: "1".to_owned(),
    };
    MemberConfig { keys: keys.clone(), instance: host.clone(), host, record, start_wait: TTL }
}

/// Client that looks at everything whenever something has changed.
struct Looker {
    etcd: Etcd,
    rung: Receiver<()>,
}

impl Looker {
    /// Reads all keys until they are as they are to be.
    fn await_state(&mut self, keys: &KeySpace, is_reached: impl Fn(&Snapshot) -> bool) {
        let range = Operation::Range { keys: Keys::Prefix(keys.all().to_owned()) };
        loop {
            let reply = transact(&mut self.etcd, only(vec![range.clone()])).unwrap();
            if is_reached(&Snapshot::parse(keys, &reply)) {
                return;
            }
            self.rung.recv_timeout(PATIENCE).unwrap();
        }
    }

    /// Drives the coordinator until its phase is the one that is waited for.
    fn run(&mut self, coordinator: &mut Coordinator, is_reached: impl Fn(&Phase) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_reached(coordinator.phase()) {
            assert!(Instant::now() < deadline, "{:?}", coordinator.phase());
            match coordinator.poll(now()) {
                Step::Ask(request, timeout) => {
                    let sent = now();
                    let result = self.etcd.ask(&request, timeout);
                    coordinator.answered(sent, now(), result);
                }
                Step::Wait(until) if self.rung.recv_timeout(until - now()).is_ok() => {
                    coordinator.woken();
                }
                Step::Wait(_) | Step::Do(_) | Step::Over => {}
            }
        }
    }
}

/// Pauses all hosts and ends the pause. Returns the times from the commit until all have acknowledged, and from the end until
/// all have resumed.
fn pause_and_resume(looker: &mut Looker, keys: &KeySpace) -> (Duration, Duration) {
    let config = CoordinatorConfig {
        keys: keys.clone(),
        host: host(0),
        id: "1".to_owned(),
        began: 0,
        is_bound: false,
        margins: Margins::default(),
    };
    let name = "deploy".to_owned();
    let wanted = Wanted { name, by: "a test".to_owned(), ttl: PATIENCE, ..Wanted::default() };
    let mut coordinator = Coordinator::new(config, wanted, now());
    looker.run(&mut coordinator, |phase| matches!(phase, Phase::Waiting(_) | Phase::Idle));
    let committed = Instant::now();
    looker.run(&mut coordinator, |phase| *phase == Phase::Idle);
    let paused = committed.elapsed();
    coordinator.end(now());
    let ended = Instant::now();
    let has_acked = |state: &Seen<State>| state.value.as_ref().is_none_or(|it| !it.acks.is_empty());
    looker.run(&mut coordinator, |phase| matches!(phase, Phase::Ended { .. }));
    looker.await_state(keys, |snapshot| {
        !snapshot.hosts.values().any(|host| host.state.iter().any(has_acked))
    });
    (paused, ended.elapsed())
}

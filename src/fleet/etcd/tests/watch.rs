//! The watch, on real etcd.

use std::{
    sync::mpsc::{self, Receiver},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    super::{Etcd, Watch, WatchStopper},
    SHORT, TIMEOUT, client,
    fake::{Fake, http},
    fixture::{Cluster, Relay, Transport},
    only, put, range, read,
    rights::{enable, password},
    transact, url,
};
use crate::fleet::store::StoreSettings;

/// Watch that runs in a thread of its own.
struct Running {
    wakes: Receiver<Instant>,
    stopper: WatchStopper,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts a watch of `/f/` and waits until it has begun.
    fn start(etcd: &Etcd, silence: Duration) -> Self {
        let watch = etcd.watch();
        let (stopper, (sender, wakes)) = (watch.stopper(), mpsc::channel());
        let run = move || watch.run("/f/", silence, || sender.send(Instant::now()).unwrap());
        let thread = thread::Builder::new().spawn(run).unwrap();
        let running = Self { wakes, stopper, thread: Some(thread) };
        running.await_wake();
        running
    }

    fn await_wake(&self) -> Instant {
        self.wakes.recv_timeout(Duration::from_secs(20)).expect("a wake")
    }

    /// Stops the watch, and returns the time that it has taken.
    fn stop(mut self) -> Duration {
        let began = Instant::now();
        self.stopper.stop();
        self.thread.take().unwrap().join().unwrap();
        began.elapsed()
    }
}

fn write(etcd: &mut Etcd, key: &str) -> Instant {
    let began = Instant::now();
    transact(etcd, only(vec![put(key, "1", None), range("/f/")])).unwrap();
    began
}

#[test]
fn a_change_wakes_and_others_do_not() {
    let Some(cluster) = Cluster::start(1) else { return };
    let mut etcd = client(&cluster.urls());
    let running = Running::start(&etcd, TIMEOUT * 6);
    for _ in 0..3 {
        let began = write(&mut etcd, "/f/a");
        let woken = running.await_wake();
        println!("woken {:?} after the request", woken.saturating_duration_since(began));
    }
    // The next wake is that of the second write: the first one concerns other keys.
    write(&mut etcd, "/g/a");
    let began = write(&mut etcd, "/f/b");
    assert!(running.await_wake() >= began);
    assert!(running.wakes.try_recv().is_err());
    let took = running.stop();
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn a_dead_watch_ends_in_silence_and_begins_anew() {
    let Some(cluster) = Cluster::start(1) else { return };
    let relay = Relay::start(cluster.addr(0));
    let etcd = client(&[url(relay.addr())]);
    let mut writer = client(&cluster.urls());
    let running = Running::start(&etcd, SHORT);
    relay.cut();
    write(&mut writer, "/f/a");
    // The stream ends after its silence, and the next ones find nobody. None is told of the cut.
    relay.await_accepted(relay.accepted() + 2);
    while running.wakes.try_recv().is_ok() {}
    relay.heal();
    // The begin of the next one wakes, as nobody has told of what was changed meanwhile.
    running.await_wake();
    running.stop();
}

/// Follows one stream to its end, and returns the reason.
fn follow(watch: &Watch, silence: Duration) -> String {
    watch.stopper().look_at("/f/");
    watch.follow(&watch.begin().unwrap(), silence, &mut || {})
}

#[test]
fn a_watch_ends_when_the_leader_is_lost() {
    let Some(mut cluster) = Cluster::start(3) else { return };
    let etcd = client(&cluster.urls());
    let (sender, created) = mpsc::channel();
    let watch = etcd.watch();
    let follow = move || {
        let silence = Duration::from_secs(60);
        let mut wake = || sender.send(()).unwrap();
        watch.stopper().look_at("/f/");
        watch.follow(&watch.begin().unwrap(), silence, &mut wake)
    };
    let stream = thread::Builder::new().spawn(follow).unwrap();
    created.recv_timeout(TIMEOUT).unwrap();
    let began = Instant::now();
    cluster.kill(1);
    cluster.kill(2);
    let reason = stream.join().unwrap();
    println!("{reason}, {:?} after the majority was lost", began.elapsed());
    assert!(reason.contains("no leader"), "{reason}");
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_watch_follows_the_requests_to_the_next_endpoint() {
    let Some(cluster) = Cluster::start(3) else { return };
    let mut etcd = client(&cluster.urls());
    read(&mut etcd, TIMEOUT).unwrap();
    let running = Running::start(&etcd, TIMEOUT * 6);
    cluster.stop(0);
    read(&mut etcd, SHORT).unwrap_err();
    // The stream at the stopped member has ended, and the next one has begun.
    running.await_wake();
    let mut writer = client(&cluster.urls()[1..]);
    let began = write(&mut writer, "/f/a");
    assert!(running.await_wake() >= began);
    cluster.go_on(0);
    running.stop();
}

#[test]
fn a_watch_has_certificate_and_token_of_the_requests() {
    let Some(cluster) = Cluster::start_with(1, Transport::MutualTls, &[]) else { return };
    enable(&cluster);
    let (_dir, path) = password("secret");
    let settings = StoreSettings {
        endpoints: cluster.urls(),
        ca_cert: Some(cluster.certs.ca_cert.clone()),
        cert: Some(cluster.certs.client_cert.clone()),
        key: Some(cluster.certs.client_key.clone()),
        username: Some("fleet".to_owned()),
        password_file: Some(path),
    };
    let mut etcd = Etcd::new(&settings).unwrap();
    // Before the first request there is no token.
    let ended = follow(&etcd.watch(), SHORT);
    assert!(ended.contains("logged in"), "{ended}");
    read(&mut etcd, TIMEOUT).unwrap();
    let running = Running::start(&etcd, TIMEOUT * 6);
    let began = write(&mut etcd, "/f/a");
    assert!(running.await_wake() >= began);
    running.stop();
}

#[test]
fn whatever_is_canceled_or_no_watch_ends() {
    let canceled =
        r#"{"result":{"header":{},"created":true,"canceled":true,"cancel_reason":"compacted"}}"#;
    for (answer, reason) in [
        (http("200 OK", canceled), "compacted"),
        (http("200 OK", ""), "closed"),
        (http("200 OK", "<html>"), "no JSON"),
        (http("403 Forbidden", r#"{"error":"no","message":"no","code":7}"#), "403"),
    ] {
        let fake = Fake::start(move |_, _| answer.clone());
        let ended = follow(&client(&[fake.url()]).watch(), SHORT);
        assert!(ended.contains(reason), "{ended}");
    }
}

#[test]
fn a_silent_server_ends_a_watch_in_time() {
    let began = Instant::now();
    let fake = Fake::start(|_, _| Vec::new());
    let ended = follow(&client(&[fake.url()]).watch(), SHORT);
    assert!(ended.contains("timeout"), "{ended}");
    assert!(began.elapsed() >= SHORT && began.elapsed() < SHORT * 8, "{:?}", began.elapsed());
}

//! Callers of one front that go on at another one.

use std::sync::Mutex;

use mio::Events;

use super::{upgrade::UPGRADE, *};
use crate::handover::{
    channel::{Channel, Outbox},
    request::Upgraded,
};

const TIMEOUTS_LONG: Timeouts =
    Timeouts { outcome: WAIT_MAX, exchange: WAIT_MAX, ..TIMEOUTS_SHORT };

/// A front that is driven by hand, and its executor.
struct Giver {
    front: ControlListener,
    notifier: Arc<Notifier>,
    handle: Handle,
    listeners: [TcpListener; 2],
    events: Events,
}

impl Giver {
    fn start() -> Self {
        let handle = handle();
        let listeners = [(); 2].map(|()| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        });
        let (backend, hosts) = (Backend::without(), HostPolicy::new([], &[]));
        let sockets = sockets(&listeners);
        let subject = (handle.clone(), None);
        let parts = assemble(sockets, subject, hosts, CALLERS_MAX, backend, TIMEOUTS_LONG).unwrap();
        let Parts { notifier, front, executors } = parts;
        for (_, executor) in executors {
            Builder::new().spawn(move || executor.run()).unwrap();
        }
        Self { front, notifier, handle, listeners, events: Events::with_capacity(16) }
    }

    fn send(&self, request: &str) -> TcpStream {
        let mut caller = connect(self.listeners[0].local_addr().unwrap());
        caller.write_all(request.as_bytes()).unwrap();
        caller
    }

    fn words(&self) -> serde_json::Value {
        serde_json::to_value(self.front.describe(&mut Outgoing::new(Instant::now()))).unwrap()
    }

    /// Drives it until its callers are in these states, which are sorted.
    fn drive_to(&mut self, states: &[&str]) {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            let words = self.words();
            let found = words["callers"].as_array().unwrap().iter().map(|caller| {
                let state = &caller["state"];
                let named = state.as_object().and_then(|state| state.keys().next().cloned());
                named.unwrap_or_else(|| state.as_str().unwrap().to_owned())
            });
            let mut found = found.collect::<Vec<_>>();
            found.sort();
            if found == states {
                return;
            }
            assert!(Instant::now() < deadline, "{words:#}");
            self.notifier.notify();
            self.front.turn(&mut self.events);
        }
    }

    /// Hands over to another front, and ends. A connection is carried there if `is_busy`.
    fn hand_over(self, is_busy: bool) -> (Api, Option<Busy>) {
        let handle = handle();
        let busy = is_busy.then(|| Busy::new(&handle));
        let (here, there) = (Instant::now(), Instant::now());
        let pauses = self.handle.pauses().freeze().describe(&Outgoing::new(here));
        let mut parcel = Outgoing::new(here);
        let text = serde_json::to_string(&self.front.describe(&mut parcel)).unwrap();
        let parcel = parcel_of(parcel, there);
        drop(self.front);
        let empty = Incoming::new(there, Vec::new(), Vec::new());
        handle.pauses().restore(&pauses, &empty);
        let inherited = Some((serde_json::from_str(&text).unwrap(), parcel));
        handle.freeze().ask_all();
        let control = start_with(sockets(&self.listeners), inherited, &handle);
        handle.freeze().await_rebuilt(Instant::now() + WAIT_MAX).unwrap();
        handle.freeze().thaw();
        handle.pauses().go_on();
        let addr = self.listeners[0].local_addr().unwrap();
        (Api { control: control.unwrap(), handle, addr }, busy)
    }
}

fn start_with(
    listeners: Vec<(OwnedFd, Scope)>,
    inherited: Option<Inherited>,
    handle: &Handle,
) -> io::Result<Control> {
    let (backend, hosts) = (Backend::start().unwrap(), HostPolicy::new([], &[]));
    let (callers_max, timeouts) = (CALLERS_MAX, TIMEOUTS_LONG);
    let subject = (handle.clone(), None);
    let parts = assemble(listeners, subject, hosts, callers_max, backend, timeouts)?;
    Control::start_with(parts, inherited)
}

/// Lets a front go on at the end of a test, also of one that fails.
struct Thaw(Handle);

impl Drop for Thaw {
    fn drop(&mut self) {
        self.0.freeze().thaw();
    }
}

/// Returns copies of the listeners: of the API and of the monitor.
fn sockets(listeners: &[TcpListener; 2]) -> Vec<(OwnedFd, Scope)> {
    let copies = listeners.each_ref().map(|listener| listener.try_clone().unwrap().into());
    copies.into_iter().zip([Scope::Full, Scope::ReadOnly]).collect()
}

#[test]
fn callers_are_answered_by_the_taker() {
    let mut giver = Giver::start();
    let _program = giver.handle.upgrade_requests().receiver();
    let busy = Busy::new(&giver.handle);
    let brief = "GET /paused/block-until-idle?timeout=3s HTTP/1.0\r\n\r\n";
    let mut half = giver.send("GET /paused HTTP/1.1\r\nHo");
    let mut wait = giver.send(WAIT);
    let mut brief = giver.send(brief);
    let mut upgrade = giver.send(UPGRADE);
    let mut monitor = connect(giver.listeners[1].local_addr().unwrap());
    monitor.write_all(b"DELETE /paused").unwrap();
    giver.drive_to(&["reading", "reading", "upgrading", "waiting", "waiting"]);
    let (api, busy_there) = giver.hand_over(true);
    half.write_all(b"st: localhost\r\n\r\n").unwrap();
    assert_eq!(status(&answer(&mut half)), 200);
    monitor.write_all(b" HTTP/1.0\r\n\r\n").unwrap();
    assert_eq!(status(&answer(&mut monitor)), 405, "its scope is kept");
    assert_eq!(status(&answer(&mut brief)), 504);
    let upgraded = Upgraded {
        version: "0.2.0".to_owned(),
        pid: 7,
        connections: 9,
        stall_seconds: 0.001_812_345,
    };
    api.handle.upgrade_requests().end_inherited(Ok(upgraded));
    let text = answer(&mut upgrade);
    assert_eq!(status(&text), 200);
    let body =
        "{\"version\": \"0.2.0\", \"pid\": 7, \"connections\": 9, \"stall_seconds\": 0.001812}\n";
    assert_eq!(parts(&text).1, body);
    drop(busy);
    drop(busy_there);
    assert_eq!(status(&answer(&mut wait)), 204);
    api.assert_answers("a hand-over");
}

#[test]
fn pauses_depend_on_their_callers_as_before() {
    let mut giver = Giver::start();
    let _busy = Busy::new(&giver.handle);
    let put = |query: &str| format!("PUT /paused?{query} HTTP/1.0\r\n\r\n");
    let mut waiting = giver.send(&put("name=waiting&wait=1h"));
    let mut short = giver.send(&put("name=short&wait=3s"));
    let gone = giver.send(&put("name=gone&wait=1h"));
    let bound = giver.send(&put("name=bound&while=connected&wait=1h"));
    let mut tied = giver.send(&put("name=tied&while=connected"));
    let states = ["connection-bound", "pausing", "pausing", "pausing", "pausing"];
    giver.drive_to(&states);
    tied.read_exact(&mut [0; 12]).unwrap();
    let (api, busy) = giver.hand_over(true);
    let names = |handle: &Handle| {
        let leases = handle.status().leases;
        leases.into_iter().map(|lease| lease.name).collect::<Vec<_>>()
    };
    let wait_for = |expected: &[&str]| {
        let deadline = Instant::now() + WAIT_MAX;
        while names(&api.handle) != expected {
            assert!(Instant::now() < deadline, "{:?}", names(&api.handle));
            thread::yield_now();
        }
    };
    assert!(names(&api.handle).len() >= 4);
    drop(gone);
    assert_eq!(status(&answer(&mut short)), 504);
    wait_for(&["waiting", "bound", "tied"]);
    drop(tied);
    wait_for(&["waiting", "bound"]);
    // A request of the taker has a number of its own.
    assert_eq!(api.status(&put("name=new")), 201);
    drop(busy);
    assert_eq!(status(&answer(&mut waiting)), 201);
    let mut bound = bound;
    bound.read_exact(&mut [0; 12]).unwrap();
    wait_for(&["waiting", "bound", "new"]);
    drop(bound);
    wait_for(&["waiting", "new"]);
}

#[test]
fn words_that_do_not_fit_are_refused_and_undo_nothing() {
    let giver = Giver::start();
    let handle = handle();
    put_pending(&handle, 7);
    let mut words = giver.words();
    words["callers"] = serde_json::json!([{
        "state": "reading", "name": "a", "arrived": 0, "deadline": null, "scope": "full",
        "peer": "open", "request": {"bytes": 0, "parts": null}, "has_permit": false,
        "pause": {"name": "a", "request_id": 7, "begun": 0, "reset": 0},
    }]);
    let now = Instant::now();
    let (_peer, socket) = UnixStream::pair().unwrap();
    let two = [&socket, &socket].map(|it| OwnedFd::from(it.try_clone().unwrap()));
    for descriptors in [Vec::new(), Vec::from(two)] {
        let parcel = Incoming::new(now, descriptors, Vec::new());
        let words = serde_json::from_value(words.clone()).unwrap();
        let refused = start_with(sockets(&giver.listeners), Some((words, parcel)), &handle);
        assert!(refused.unwrap_err().to_string().contains("descriptor"));
        assert!(handle.is_paused());
    }
}

#[test]
fn a_front_stands_still_once_no_request_is_executed() {
    let late = Timeouts { silence: Duration::from_secs(3), ..TIMEOUTS_LONG };
    let (api, ours) = Api::start_before_ours(late);
    let _thaw = Thaw(api.handle.clone());
    let mut half = api.send("GET /paused HTTP/1.1\r\nHo");
    let mut executed = api.send(GET);
    let (private, _) = ours.accept().unwrap();
    let freeze = api.handle.freeze();
    freeze.ask_front();
    api.control.notifier().notify();
    half.write_all(b"st: localhost\r\n\r\n").unwrap();
    let mut newcomer = api.send(GET);
    assert!(!freeze.await_standing(Instant::now() + Duration::from_millis(50)));
    drop((private, ours));
    assert!(freeze.await_standing(Instant::now() + WAIT_MAX));
    assert_eq!(status(&answer(&mut executed)), 200);
    for caller in [&half, &newcomer] {
        caller.set_nonblocking(true).unwrap();
        let error = caller.peek(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "it is answered");
        caller.set_nonblocking(false).unwrap();
    }
    freeze.thaw();
    for caller in [&mut half, &mut newcomer] {
        assert_eq!(status(&answer(caller)), 200);
    }
}

#[test]
fn a_front_that_is_described_and_goes_on_has_changed_nothing() {
    let api = Api::start();
    let _thaw = Thaw(api.handle.clone());
    let busy = Busy::new(&api.handle);
    let mut waiter = api.send(WAIT);
    let mut paused = api.send("PUT /paused?wait=1h HTTP/1.0\r\n\r\n");
    let deadline = Instant::now() + WAIT_MAX;
    while !api.handle.is_paused() {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
    let freeze = api.handle.freeze();
    let mut told = Vec::new();
    for _ in 0..2 {
        freeze.ask_all();
        api.control.notifier().notify();
        assert!(freeze.await_standing(deadline));
        let (here, there) = UnixStream::pair().unwrap();
        let outbox =
            Outbox { begin: Instant::now(), channel: Arc::new(Mutex::new(Channel::new(here))) };
        let words = thread::scope(|scope| {
            let read = || {
                let mut channel = Channel::new(there);
                [(); 2].map(|()| {
                    let (words, mut parcel) =
                        channel.receive::<serde_json::Value>(Instant::now(), deadline).unwrap();
                    let count = std::iter::from_fn(|| parcel.descriptor().ok()).count();
                    (words, count)
                })
            };
            let words = Builder::new().spawn_scoped(scope, read).unwrap();
            freeze.describe(Arc::new(outbox), deadline).unwrap();
            words.join().unwrap()
        });
        freeze.thaw();
        assert!(api.control.notifier().await_turn(WAIT_MAX));
        let [(listeners, listening), (control, callers)] = words;
        assert_eq!(listeners["control-listeners"]["scopes"], serde_json::json!(["full"]));
        assert_eq!((listening, callers), (1, 2), "{control:#}");
        let callers = control["control"]["callers"].as_array().unwrap().clone();
        told.push(callers.into_iter().map(|caller| caller["state"].clone()).collect::<Vec<_>>());
    }
    assert_eq!(told[0], told[1]);
    drop(busy);
    assert_eq!(status(&answer(&mut waiter)), 204);
    assert_eq!(status(&answer(&mut paused)), 201);
}

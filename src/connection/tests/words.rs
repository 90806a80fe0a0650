//! Connections that go to another process: each state over real sockets, described, rebuilt and described again.

mod altered;

use rustls::{ServerConfig, server::ResolvesServerCertUsingSni};

use super::*;
use crate::{
    admission::{Admission, hold::HoldDecision},
    connection::words::{ConnectionWords, RebuildContext},
    handover::parcel::{Incoming, Outgoing},
    sys::Descriptor,
};

/// All kinds of states that travel.
const KINDS: [&str; 14] = [
    "held",
    "held with a permit",
    "awaiting the upstream",
    "awaiting it with an error",
    "connecting alone",
    "connecting in the window",
    "probing",
    "probing in the window",
    "relaying",
    "relaying with a share of the window",
    "sniffing",
    "awaiting a handshake",
    "lingering with a rest",
    "lingering",
];

/// A connection with all that keeps its state.
struct Scene {
    bench: Bench,
    connection: Connection,
    client: Socket,
    upstream: Option<Socket>,
    _kept: Option<(OwnedFd, Vec<Socket>)>,
}

/// Another process, which pauses, has no pipes and allows no clients.
struct Taker {
    bench: Bench,
    admission: Admission,
    begin: Instant,
}

impl Scene {
    /// Returns a client that waits in front of an upstream that is not there.
    fn waiting() -> Self {
        let bench = Bench::nowhere();
        let (client, accepted) = tcp_pair();
        let connection = bench.connection(accepted);
        Self { bench, connection, client, upstream: None, _kept: None }
    }

    /// Returns a client whose upstream does not answer.
    fn connecting(ticket: impl FnOnce(&Bench) -> ConnectTicket) -> Self {
        let (silent, full) = full_tcp_listener();
        let mut bench = Bench::new(&silent);
        let (client, accepted) = tcp_pair();
        let mut connection = bench.connection(accepted);
        let ticket = ticket(&bench);
        bench.release(&mut connection, ticket);
        Self { bench, connection, client, upstream: None, _kept: Some(full) }
    }

    fn relaying(pipes: usize) -> Self {
        let (listener, address) = tcp_listener();
        let mut bench = Bench::new(&address);
        bench.buffers = RelayBuffers::new(pipes);
        let (client, accepted) = tcp_pair();
        let mut connection = bench.connection(accepted);
        bench.serve(&mut connection);
        bench.until_relaying(&mut connection);
        Self { bench, connection, client, upstream: Some(accept(&listener)), _kept: None }
    }

    fn rejecting(policy: RejectPolicy) -> Self {
        let mut scene = Self::waiting();
        scene.bench.reject_policy = policy;
        scene.bench.act(|context| scene.connection.reject(CloseCause::Rejected, context));
        scene
    }

    fn upstream(&self) -> &Socket {
        self.upstream.as_ref().unwrap()
    }

    /// Has one side send the pattern until the words say that some of it is `buffered`. Returns the number of bytes.
    fn flood(&mut self, by_client: bool, buffered: &str) -> usize {
        let deadline = Instant::now() + DEADLINE;
        let mut sent = 0;
        while !self.json().contains(buffered) {
            assert!(Instant::now() < deadline, "nothing is {buffered}: {}", self.json());
            let source = if by_client { &self.client } else { self.upstream() };
            sent += source.send(&pattern(sent, 64 * 1024)).unwrap_or_default();
            self.bench.until(&mut self.connection, |_, _| true);
            self.poll();
        }
        sent
    }

    /// Marks the events that are there.
    fn poll(&mut self) {
        let mut events = Events::with_capacity(8);
        self.bench.poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
        for event in &events {
            match event.token() {
                CLIENT => self.connection.mark_client(event),
                _ => self.connection.mark_upstream(event),
            }
        }
    }

    fn json(&self) -> String {
        let mut parcel = Outgoing::new(self.bench.now);
        serde_json::to_string(&self.connection.describe(&mut parcel)).unwrap()
    }
}

impl Taker {
    fn new() -> Self {
        let mut bench = Bench::nowhere();
        bench.buffers = RelayBuffers::new(0);
        bench.gate.pause(Mode::Hold);
        let (hold, resume) = (config::HoldConfig::default(), config::ResumeConfig::default());
        let begin = bench.now + Duration::from_secs(3);
        Self { bench, admission: Admission::new(0, 1, &hold, &resume, begin), begin }
    }

    /// Rebuilds a connection, as it arrives over a socket. Returns it with what it was built of.
    fn take(&self, connection: &Connection) -> (Connection, ConnectionWords, Vec<u8>) {
        let (words, descriptors, bytes) = parcel(connection, self.bench.now);
        let json = serde_json::to_string(&words).unwrap();
        (
            self.rebuild(serde_json::from_str(&json).unwrap(), descriptors, bytes.clone()),
            words,
            bytes,
        )
    }

    fn rebuild(
        &self,
        words: ConnectionWords,
        descriptors: Vec<Descriptor>,
        bytes: Vec<u8>,
    ) -> Connection {
        let mut parcel = Incoming::new(self.begin, descriptors, bytes);
        let context = RebuildContext {
            admission: &self.admission,
            gate: &self.bench.gate,
            pipes: &self.bench.buffers.pipes,
            upstream: &self.bench.upstream,
            giver: 0,
        };
        let rebuilt = Connection::rebuild(words, &mut parcel, &context);
        parcel.finish().unwrap();
        rebuilt.unwrap()
    }

    /// Returns the numbers of permits of clients, of held ones, of the window and of probes, of passes and of pipes.
    fn counts(&self) -> [usize; 5] {
        [
            self.admission.clients.taken(),
            self.admission.queue.under_way().taken(),
            usize::from(self.bench.upstream.breaker().take_probe().is_none()),
            usize::try_from(self.bench.gate.passes()).unwrap(),
            self.bench.buffers.pipes.alive.get(),
        ]
    }
}

/// Describes a connection, and copies its descriptors as a message between processes does.
fn parcel(connection: &Connection, begin: Instant) -> (ConnectionWords, Vec<Descriptor>, Vec<u8>) {
    let mut parcel = Outgoing::new(begin);
    let words = connection.describe(&mut parcel);
    let (lent, bytes) = parcel.into_parts();
    (words, lent.iter().map(|it| it.try_clone_to_owned().unwrap()).collect(), bytes)
}

/// Returns a part of an endless stream.
fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

/// A new state does not compile until it stands here, and then in [`KINDS`].
fn kind(connection: &Connection) -> &'static str {
    match &connection.state {
        State::Waiting { hold_permit: None, patience: None } => "held",
        State::Waiting { hold_permit: Some(_), patience: None } => "held with a permit",
        State::Waiting { patience: Some(Patience { error: None, .. }), .. } => {
            "awaiting the upstream"
        }
        State::Waiting { patience: Some(Patience { error: Some(_), .. }), .. } => {
            "awaiting it with an error"
        }
        State::Connecting(dial) => match &dial.attempt.ticket {
            ConnectTicket::Alone => "connecting alone",
            ConnectTicket::Window(_) => "connecting in the window",
            ConnectTicket::Probe { under_way: None, .. } => "probing",
            ConnectTicket::Probe { under_way: Some(_), .. } => "probing in the window",
        },
        State::Relaying(Session { under_way: None, .. }) => "relaying",
        State::Relaying(Session { under_way: Some(_), .. }) => {
            "relaying with a share of the window"
        }
        State::Rejecting(Rejection { reject, .. }) => match reject {
            Reject::Sniffing => "sniffing",
            Reject::AwaitingHandshake => "awaiting a handshake",
            Reject::Tls { .. } => "in a TLS session, which does not travel",
            Reject::Lingering { rest: Some(_), .. } => "lingering with a rest",
            Reject::Lingering { rest: None, .. } => "lingering",
        },
    }
}

fn scenes() -> impl Iterator<Item = Scene> {
    let scenes = [held_scenes(), connecting_scenes(), relaying_scenes(), rejecting_scenes()];
    scenes.into_iter().flatten()
}

fn held_scenes() -> Vec<Scene> {
    let mut with_permit = Scene::waiting();
    let HoldDecision::Hold(permit @ Some(_)) = with_permit.bench.hold.decide() else {
        panic!("no permit")
    };
    with_permit.connection.hold(permit);
    let mut queued = Scene::waiting();
    queued.bench.upstream.breaker().failed(Cause::Away, false, queued.bench.now);
    queued.bench.act(|context| queued.connection.begin_patience(context));
    let mut refused = Scene::waiting();
    refused.bench.serve_refused(&mut refused.connection);
    let mut without_address = Scene::waiting();
    without_address.bench.upstream.publish([].into());
    without_address.bench.serve(&mut without_address.connection);
    vec![Scene::waiting(), with_permit, queued, refused, without_address]
}

fn connecting_scenes() -> Vec<Scene> {
    let share = |bench: &Bench| bench.pace.take(bench.now).unwrap();
    let probe = |bench: &Bench| bench.upstream.breaker().take_probe().unwrap();
    vec![
        Scene::connecting(|_| ConnectTicket::Alone),
        Scene::connecting(|bench| ConnectTicket::Window(share(bench))),
        Scene::connecting(|bench| ConnectTicket::Probe { _permit: probe(bench), under_way: None }),
        Scene::connecting(|bench| ConnectTicket::Probe {
            _permit: probe(bench),
            under_way: Some(share(bench)),
        }),
    ]
}

fn relaying_scenes() -> Vec<Scene> {
    let mut copied = Scene::relaying(0);
    copied.flood(true, "bytes");
    let mut spliced = Scene::relaying(1);
    spliced.flood(false, "pipe");
    let mut half_closed = Scene::relaying(0);
    half_closed.client.shut_down_write().unwrap();
    half_closed.bench.until(&mut half_closed.connection, |it, _| it.client.is_read_closed());
    half_closed.bench.act(|context| half_closed.connection.drive(context));
    assert!(half_closed.json().contains("ended"), "{}", half_closed.json());
    let mut settling = Scene::relaying(0);
    settling.flood(true, "bytes");
    settling.client.reset_on_close();
    settling.client = tcp_pair().0;
    settling.bench.until(&mut settling.connection, |it, _| it.client.is_reset());
    settling.bench.act(|context| settling.connection.drive(context));
    assert!(settling.json().contains("settling"), "{}", settling.json());
    vec![Scene::relaying(0), copied, spliced, half_closed, settling]
}

fn rejecting_scenes() -> Vec<Scene> {
    let file = |bytes: usize| RejectResponse::File(pattern(0, bytes).into());
    let sniffing = Scene::rejecting(RejectPolicy::new(file(1), None));
    let mut long = Scene::rejecting(RejectPolicy::new(file(16 << 20), None));
    long.client.send(b"GET / HTTP/1.1").unwrap();
    long.bench.until(&mut long.connection, |it, _| !it.client.is_writable());
    let close = Scene::rejecting(RejectPolicy::new(RejectResponse::Close, None));
    vec![sniffing, awaiting_handshake(), long, close]
}

fn awaiting_handshake() -> Scene {
    let tls = ServerConfig::builder()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(ResolvesServerCertUsingSni::new()));
    let policy = RejectPolicy::new(RejectResponse::http(Duration::ZERO), Some(Arc::new(tls)));
    let mut scene = Scene::rejecting(policy);
    scene.client.send(b"\x16\x03\x01").unwrap();
    scene.bench.until(&mut scene.connection, |it, _| kind(it) == "awaiting a handshake");
    scene
}

#[test]
fn each_state_arrives_as_it_was_and_counts_beyond_all_bounds() {
    let mut seen = Vec::new();
    for mut scene in scenes() {
        let (kind, json) = (kind(&scene.connection), scene.json());
        seen.push(kind);
        assert!(scene.connection.is_movable());
        assert_eq!(json, scene.json(), "describing changes nothing");
        let taker = Taker::new();
        let (rebuilt, words, bytes) = taker.take(&scene.connection);
        let (again, descriptors, bytes_again) = parcel(&rebuilt, taker.begin);
        assert_eq!(again, words);
        assert!(bytes_again == bytes, "other bytes: {json}");
        assert_eq!(self::kind(&rebuilt), kind);

        let [has_pass, has_upstream] = [rebuilt.is_served(); 2].map(usize::from);
        let pipes = json.matches("pipe").count();
        assert_eq!(descriptors.len(), 1 + has_upstream + 2 * pipes, "{json}");
        let has_share = usize::from(json.contains("dialled"));
        let probes = usize::from(json.contains("probe"));
        assert_eq!(taker.counts(), [1, has_share, probes, has_pass, pipes], "{json}");
        drop(rebuilt);
        assert_eq!(taker.counts(), [0; 5], "{json}");
        // The giver goes on.
        scene.poll();
        scene.bench.act(|context| scene.connection.drive(context));
    }
    for kind in KINDS {
        assert!(seen.contains(&kind), "no scene is {kind}");
    }
}

#[test]
fn what_was_in_flight_arrives_once_and_in_order() {
    let mut scene = Scene::relaying(1);
    let (up, down) = (scene.flood(true, "pipe"), scene.flood(false, "bytes"));
    assert!(scene.json().contains("pipe"), "{}", scene.json());
    let mut taker = Taker::new();
    let (mut connection, _words, bytes) = taker.take(&scene.connection);
    assert!(!bytes.is_empty());
    connection.adopt_registration(taker.bench.poll.registry(), CLIENT, UPSTREAM).unwrap();
    let Scene { connection: given, client, upstream, .. } = scene;
    drop(given);
    let upstream = upstream.unwrap();

    let (mut got_up, mut got_down) = (Vec::new(), Vec::new());
    while (got_up.len(), got_down.len()) != (up, down) {
        taker.bench.mark(&mut connection);
        taker.bench.until(&mut connection, |_, _| true);
        for (got, peer) in [(&mut got_up, &upstream), (&mut got_down, &client)] {
            while let Some(more) = ready(peer) {
                got.extend(more);
            }
        }
    }
    assert!(got_up == pattern(0, up) && got_down == pattern(0, down), "other bytes");
    assert_eq!(taker.bench.buffers.pipes.alive.get(), 0, "no pipe is allowed here");

    client.shut_down_write().unwrap();
    upstream.send(b"last").unwrap();
    upstream.shut_down_write().unwrap();
    assert_eq!(taker.bench.cause(&mut connection), CloseCause::Ended);
    let State::Relaying(session) = &connection.state else { panic!("{connection:?}") };
    assert_eq!(session.relay.delivered(), (up as u64, down as u64 + 4));
    connection.close(CloseCause::Ended);
    assert_eq!((read(&client).unwrap(), read(&client).unwrap()), (b"last".to_vec(), vec![]));
    assert_eq!(read(&upstream).unwrap(), b"");
    assert_eq!(taker.counts(), [0; 5]);
}

/// Returns the bytes that are there; none if there are none.
fn ready(socket: &Socket) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 256 * 1024];
    let bytes = socket.recv(&mut buffer).ok()?.bytes;
    buffer.truncate(bytes);
    (bytes > 0).then_some(buffer)
}

#[test]
fn a_relay_at_rest_arrives_without_an_event_and_is_woken_by_the_next_byte() {
    let scene = Scene::relaying(0);
    let mut taker = Taker::new();
    let (mut connection, ..) = taker.take(&scene.connection);
    connection.adopt_registration(taker.bench.poll.registry(), CLIENT, UPSTREAM).unwrap();
    let mut events = Events::with_capacity(8);
    taker.bench.poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
    assert!(events.is_empty(), "{events:?}");
    scene.client.send(b"next").unwrap();
    taker.bench.mark(&mut connection);
    taker.bench.until(&mut connection, |_, _| true);
    assert_eq!(read(scene.upstream()).unwrap(), b"next");
}

#[test]
fn a_dial_under_way_ends_in_the_other_process() {
    let scene = Scene::connecting(|_| ConnectTicket::Alone);
    let mut taker = Taker::new();
    let (mut connection, ..) = taker.take(&scene.connection);
    connection.adopt_registration(taker.bench.poll.registry(), CLIENT, UPSTREAM).unwrap();
    let Scene { connection: given, _kept: full, .. } = scene;
    drop(given);
    listen(&full.as_ref().unwrap().0, 16).unwrap();
    taker.bench.until_relaying(&mut connection);
}

#[test]
fn a_rest_of_an_answer_is_sent_by_the_other_process() {
    const ANSWER: usize = 8 << 20;
    let file = RejectResponse::File(pattern(0, ANSWER).into());
    let mut scene = Scene::rejecting(RejectPolicy::new(file, None));
    scene.client.send(b"GET / HTTP/1.1").unwrap();
    scene.bench.until(&mut scene.connection, |it, _| !it.client.is_writable());
    let mut taker = Taker::new();
    let (mut connection, ..) = taker.take(&scene.connection);
    connection.adopt_registration(taker.bench.poll.registry(), CLIENT, UPSTREAM).unwrap();
    let Scene { connection: given, client, .. } = scene;
    drop(given);
    let mut got = Vec::new();
    while got.len() < ANSWER {
        while let Some(more) = ready(&client) {
            got.extend(more);
        }
        taker.bench.mark(&mut connection);
        taker.bench.until(&mut connection, |_, _| true);
    }
    assert!(got == pattern(0, ANSWER), "other bytes");
    assert_eq!(read(&client).unwrap(), b"", "the end of the stream");
}

#[test]
fn a_tls_session_does_not_travel_and_its_wait_may_end_with_an_alert() {
    let mut scene = awaiting_handshake();
    let mut taker = Taker::new();
    let (mut connection, ..) = taker.take(&scene.connection);
    let permit = |bench: &Bench| bench.reject_policy.handshakes().take().unwrap();
    let granted = permit(&scene.bench);
    scene.bench.act(|context| scene.connection.begin_handshake(granted, context));
    assert!(!scene.connection.is_movable());

    // No certificate is configured there.
    let granted = permit(&taker.bench);
    taker.bench.act(|context| connection.begin_handshake(granted, context));
    assert_eq!(read(&scene.client).unwrap(), [0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 0x28]);
}

#[test]
fn a_probe_of_an_earlier_upstream_does_not_count_for_the_present_one() {
    let taker = Taker::new();
    let upstream = &taker.bench.upstream;
    let earlier = upstream.target();
    let target = upstream.prepare(&config::address::Address::tcp("127.0.0.1", 9)).unwrap();
    upstream.switch_to(&target, [].into());
    let probes =
        connecting_scenes().into_iter().filter(|it| kind(&it.connection).contains("probing"));
    for Scene { connection, .. } in probes {
        let (rebuilt, ..) = taker.take(&connection);
        assert_eq!((earlier.connections(), target.connections()), (1, 0));
        assert_eq!(taker.counts()[2], 0, "the present one can be probed");
        drop(rebuilt);
    }
}

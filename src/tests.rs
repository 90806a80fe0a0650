//! A proxy without workers for unit tests, and the fuzz targets of `tests/fuzz`, one function each. `make test` replays
//! their corpus by the same functions.

use std::{
    fs,
    io::{IoSlice, Read, Write},
    iter,
    mem::MaybeUninit,
    net,
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::Receiver;
use mio::{Events, Poll, Token};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustls::{ServerConfig, crypto::ring, pki_types::PrivatePkcs8KeyDer};
use serde::Deserialize;

use crate::{
    admission::{Admission, queue::WaitQueue},
    config::{
        Config, HalfClosed, HoldConfig, LogConfig, ResumeConfig, UpstreamConfig,
        address::Address,
        duration::{format_duration, parse_duration},
    },
    connection::{
        Connection,
        deadline::Deadline,
        endpoint::Endpoint,
        pipe::PipePool,
        reject::{
            Next, Reject,
            policy::{RejectPolicy, RejectResponse},
        },
        words::{ConnectionWords, RebuildContext},
    },
    fleet_view::FleetView,
    handle::Handle,
    handover::{
        channel::{Channel, ChannelError},
        freeze::Freeze,
        parcel::{Incoming, Outgoing},
        request::UpgradeRequests,
        upgrades::Upgrades,
    },
    pause::{
        Pauses,
        gate::{Gate, Mode},
    },
    proxy_header::{HEADER_BYTES_MAX, Parsed, ProxyHeaders, parse},
    shared::{Shared, Shutdown, SocketFiles},
    sys::{Listener, Socket, SocketAddress},
    upstream::{Upstream, loop_guard::LoopGuard},
    worker_pool::{WorkerHandle, WorkerPool},
};

/// The bound of an answer, far more than there is.
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// The number of steps of a handshake in a turn.
const TURN_STEPS_MAX: usize = 4;
/// The most turns that a client of the targets can need.
const TURNS_MAX: usize = 1_000;
/// The number of places at which the bytes of a hand-over are cut.
const CUTS: usize = 16;
/// The most descriptors of a connection: both ends, and a pipe in each direction.
const DESCRIPTORS: usize = 6;

/// Checks that a configuration is written so that it reads the same, and validated without a panic.
pub(crate) fn configuration(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match Config::parse(text, "fuzz.yml") {
        Ok(config) => {
            assert_eq!(Config::parse(&config.to_string(), "again").as_ref(), Ok(&config));
            for key in Config::keys() {
                let mut again = config.clone();
                let value = config.get(key);
                assert_eq!(value.map_or(Ok(()), |value| again.set(key, &value)), Ok(()), "{key}");
                assert_eq!(again, config, "{key}");
            }
            drop(config.validate());
        }
        Err(error) => assert!(error.to_string().starts_with("fuzz.yml:"), "{error}"),
    }
}

/// Checks that an address is written so that it reads the same. An error is one line that shows the text.
pub(crate) fn address(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match text.parse::<Address>() {
        Ok(address) => assert_eq!(address.to_string().parse().as_ref(), Ok(&address)),
        Err(error) => assert_one_line(&error),
    }
}

/// Checks that a duration is written so that it reads the same. An error is one line.
pub(crate) fn duration(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match parse_duration(text) {
        Ok(duration) => assert_eq!(parse_duration(&format_duration(duration)), Ok(duration)),
        Err(error) => assert_one_line(&error),
    }
}

/// Checks that a header of the PROXY protocol is bounded, and is read the same wherever its bytes are cut.
pub(crate) fn proxy_header(bytes: &[u8]) {
    let whole = parse(bytes);
    if let Parsed::Header { bytes: length, .. } = whole {
        assert!(length <= HEADER_BYTES_MAX.min(bytes.len()), "{length}");
    }
    let mut is_decided = false;
    for end in 0..=bytes.len() {
        let parsed = parse(&bytes[..end]);
        is_decided |= parsed != Parsed::Partial;
        assert!(parsed == if is_decided { whole } else { Parsed::Partial }, "{end}: {parsed:?}");
        assert!(is_decided || end < HEADER_BYTES_MAX, "{end}");
    }
}

/// Checks that a rejected client that sends these bytes, the first of them alone, and ends its stream is done with in a
/// bounded number of turns and of bytes.
pub(crate) fn rejected_client(bytes: &[u8], tls: Option<Arc<ServerConfig>>) {
    let (peer, socket) = socket_pair();
    let mut poll = Poll::new().unwrap();
    socket.register(poll.registry(), Token(0)).unwrap();
    let mut events = Events::with_capacity(8);
    let mut client = Endpoint::connected(socket);
    let reject_policy = RejectPolicy::new(RejectResponse::http(Duration::from_secs(3)), tls);
    let (mut reject, mut next) = Reject::new(&mut client, &reject_policy);
    let mut scratch = vec![0; 16 << 10];
    let mut received = 0;
    // The socket's buffer takes as many bytes as a fuzzer sends at once.
    let parts =
        [bytes.get(..1), bytes.get(1..)].into_iter().flatten().filter(|part| !part.is_empty());
    for part in parts.map(Some).chain([None]) {
        match part {
            Some(part) => drop(peer.send(part)),
            None => drop(peer.shut_down_write()),
        }
        poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
        events.iter().for_each(|event| client.mark(event));
        let mut turns = 0;
        while next != Next::Close {
            next = reject.drive(&mut client, &reject_policy, &mut scratch, &mut { TURN_STEPS_MAX });
            received += peer.recv(&mut scratch).map_or(0, |read| read.bytes);
            match next {
                Next::WaitIn(Deadline::AwaitingHandshake) => {
                    let permit = reject_policy.handshakes().take().unwrap();
                    next = reject.begin_handshake(&mut client, permit, &reject_policy);
                }
                Next::Wait | Next::WaitIn(_) => break,
                _ => {}
            }
            turns += 1;
            assert!(turns < TURNS_MAX, "it goes on for ever");
        }
    }
    // A client that says nothing more has ended its stream, or is sent away when its time is up.
    if next != Next::Close {
        reject.expire(&mut client, &reject_policy);
    }
    received += peer.recv(&mut scratch).map_or(0, |read| read.bytes);
    assert!(received < ANSWER_BYTES_MAX, "{received} bytes of answer");
}

/// Checks that the bytes of a hand-over give the same messages and the same failure wherever they are cut.
pub(crate) fn handover(bytes: &[u8]) {
    let all = messages(bytes, &[]);
    for cut in (1..bytes.len()).step_by(bytes.len() / CUTS + 1) {
        let (first, rest) = bytes.split_at(cut);
        assert_eq!(messages(first, rest), all, "{cut}");
    }
}

/// Message with its raw bytes and the number of its descriptors.
type Message = (serde_json::Value, Vec<u8>, usize);

/// Returns what a channel reads from bytes that come in two pieces: the messages, and the failure behind them. The first
/// byte has as many descriptors along as the header tells, up to a few.
fn messages(first: &[u8], rest: &[u8]) -> (Vec<Message>, String) {
    let (here, mut there) = UnixStream::pair().unwrap();
    there.set_nonblocking(true).unwrap();
    let (mut channel, mut found) = (Channel::new(here), Vec::new());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let count = first.iter().chain(rest).nth(8).map_or(0, |&count| usize::from(count));
    let lent = vec![there.as_fd(); count.min(DESCRIPTORS)];
    if !lent.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&lent)));
    }
    // The socket's buffer takes as many bytes as a fuzzer sends at once.
    sendmsg(&there, &[IoSlice::new(first)], &mut control, SendFlags::empty()).unwrap();
    let begun = drain(&mut channel, &mut found);
    there.write_all(rest).unwrap();
    there.shutdown(net::Shutdown::Write).unwrap();
    let failure = match begun {
        ChannelError::TimedOut => drain(&mut channel, &mut found),
        failure => failure,
    };
    assert_one_line(&failure.to_string());
    let mut acknowledgements = Vec::new();
    there.read_to_end(&mut acknowledgements).ok();
    let is_acknowledged = |message: &&Message| !message.1.is_empty() || message.2 > 0;
    let count = found.iter().filter(is_acknowledged).count();
    // A frame is acknowledged before its JSON is read, which may fail.
    assert!((count..=count + 1).contains(&acknowledgements.len()), "{acknowledgements:?}");
    assert!(acknowledgements.iter().all(|&byte| byte == 0));
    (found, failure.to_string())
}

/// Rebuilds the connection that was received last, if the message is one.
fn rebuild(found: &[Message], mut parcel: Incoming) {
    let words = found.last().map(|(message, ..)| ConnectionWords::deserialize(message));
    let Some(Ok(words)) = words else { return };
    let (hold, resume) = (HoldConfig::default(), ResumeConfig::default());
    let context = RebuildContext {
        admission: &Admission::new(0, 1, &hold, &resume, Instant::now()),
        gate: &Arc::new(Gate::new()),
        pipes: &PipePool::new(0),
        upstream: &upstream(),
        giver: 0,
    };
    if let Ok(connection) = Connection::rebuild(words, &mut parcel, &context) {
        assert!(connection.is_movable());
        connection.describe(&mut Outgoing::new(Instant::now()));
    }
}

/// Receives all messages that have come whole.
fn drain(channel: &mut Channel, found: &mut Vec<Message>) -> ChannelError {
    let now = Instant::now();
    loop {
        match channel.receive(now, now) {
            Ok((message, mut incoming)) => {
                let raw: Vec<u8> = iter::from_fn(|| Some(incoming.bytes(1).ok()?[0])).collect();
                let descriptors: Vec<_> = iter::from_fn(|| incoming.descriptor().ok()).collect();
                found.push((message, raw.clone(), descriptors.len()));
                rebuild(found, Incoming::new(now, descriptors, raw));
            }
            Err(error) => return error,
        }
    }
}

#[track_caller]
fn assert_one_line(error: &str) {
    assert!(!error.is_empty() && !error.contains(['\n', '\r', '\0']), "{error:?}");
}

/// Connects a UNIX socket to another one.
fn socket_pair() -> (Socket, Socket) {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("tcpause-corpus-{}-{count}", std::process::id());
    let listener = Listener::abstract_unix(&name).unwrap();
    let (peer, _) = Socket::dial(&SocketAddress::Abstract(name), None).unwrap();
    (peer, listener.accept().unwrap().0)
}

/// Feeds every file of a target's corpus to its function.
pub(crate) fn replay(target: &str, function: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let files = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    let mut count = 0;
    for file in files {
        let path = file.unwrap().path();
        println!("{}", path.display());
        function(&fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 0, "{folder:?} is empty");
}

#[test]
fn the_corpus_of_each_fuzz_target_is_replayed() {
    replay("configuration", configuration);
    replay("address", address);
    replay("duration", duration);
    replay("handover", handover);
    replay("proxy_header", proxy_header);
    let tls = certificate();
    replay("rejected_client", |bytes| {
        rejected_client(bytes, None);
        rejected_client(bytes, Some(Arc::clone(&tls)));
    });
}

/// Makes a certificate to answer rejected clients with.
pub(crate) fn certificate() -> Arc<ServerConfig> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap()
        .into()
}

/// Returns an upstream that nothing dials.
pub(crate) fn upstream() -> Arc<Upstream> {
    let settings = UpstreamConfig { addr: Address::tcp("127.0.0.1", 9), ..Default::default() };
    Arc::new(Upstream::new(settings, LoopGuard::default(), Instant::now()).unwrap())
}

/// Returns the pauses of a proxy without workers.
pub(crate) fn pauses() -> Arc<Pauses> {
    new_pauses().0
}

/// Returns such pauses with the notifications for the thread that ends expired leases.
pub(crate) fn new_pauses() -> (Arc<Pauses>, Receiver<()>) {
    pauses_of(Arc::new(WorkerPool::new([].into(), 0)))
}

fn pauses_of(workers: Arc<WorkerPool>) -> (Arc<Pauses>, Receiver<()>) {
    let queue = Arc::new(WaitQueue::new(0, &ResumeConfig::default(), Instant::now()));
    Pauses::new(Mode::Hold, HalfClosed::Serve, None, queue, upstream(), workers)
}

/// Returns a handle to a proxy without workers.
pub(crate) fn handle() -> Handle {
    handle_of([].into())
}

/// Returns a handle to a proxy with workers that the test plays.
pub(crate) fn handle_of(workers: Box<[WorkerHandle]>) -> Handle {
    let workers = Arc::new(WorkerPool::new(workers, 0));
    Handle::new(Arc::new(Shared {
        pauses: pauses_of(Arc::clone(&workers)).0,
        admission: {
            let (hold, resume) = (HoldConfig::default(), ResumeConfig::default());
            Admission::new(1, 0, &hold, &resume, Instant::now())
        },
        upstream: upstream(),
        reject_policy: RejectPolicy::new(RejectResponse::Close, None),
        proxy_headers: ProxyHeaders::default(),
        workers,
        shutdown: Shutdown::new(Duration::ZERO),
        freeze: Freeze::new(0),
        pipes_per_worker: 0,
        log: LogConfig::default(),
        started: Instant::now(),
        listeners: [].into(),
        socket_files: SocketFiles::default(),
        control_addr: Address::tcp("localhost", 3001),
        config_file: None,
        upgrade_requests: UpgradeRequests::default(),
        upgrades: Upgrades::default(),
        fleet: FleetView::default(),
    }))
}

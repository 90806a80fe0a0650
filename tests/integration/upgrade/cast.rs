//! The cast of an upgrade: a client in each state, a caller in each wait, and what must become of all of them.

use std::{
    io::{self, Read as _, Write as _},
    time::{Duration, Instant},
};

use rustix::net::{
    RecvFlags,
    sockopt::{self, Timeout},
};
use rustls::{ClientConnection, StreamOwned};

use crate::{
    harness::{
        Addr, Authority, Builder, End, Family, GLANCE, Listener, PATIENCE, Proxy, Received,
        Response, Stream, TlsClient, Upstream, assert_same, echo, pattern, spawn, wait_until,
    },
    process::exec::{COMMAND, Exec},
    reject::tls::is_alert,
};

/// Backlog of an upstream that has room.
const BACKLOG: i32 = 4096;

/// Bytes that the kernel takes in for an upstream that does not read: few, so that what a client that resets has sent stays
/// unacknowledged.
const RECEIVE_BUFFER: usize = 4 << 10;

/// Bytes that the kernel takes in for a rejected client that does not read: less than its answer.
const ANSWER_BUFFER: usize = 16 << 10;

/// Bytes of the client that resets: more than the upstream's kernel takes in, and less than the proxy's kernel sends.
const ABORTED_BYTES: usize = 64 << 10;

/// Bytes of the download that its client does not read: more than the kernel takes in for it, so that some are in the proxy.
const FLOOD_BYTES: usize = 4 << 20;

/// Bytes of the answer to rejected clients, the most that there may be.
const ANSWER_BYTES: usize = 64 << 10;

/// Time after which a client whose handshake has not begun gets an alert, and after which a silent one is answered.
const KNOCK_PATIENCE: Duration = Duration::from_secs(1);

/// Time after which a handshake that has begun is given up, as one may have on a machine too busy to answer it at once.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(3);

/// Time for which a rejected client is heard.
const LINGER: Duration = Duration::from_secs(5);

/// Time within which a handshake is answered that is not held back.
const HELLO_ANSWER: Duration = Duration::from_millis(50);

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\n\r\n";

/// Exit code of an exec whose proxy stops before it is idle.
const EX_TEMPFAIL: i32 = 75;

/// Both ends of a connection through the proxy.
pub(super) struct Pair {
    pub(super) client: Stream,
    pub(super) server: Stream,
}

impl Pair {
    /// Connects. The upstream accepts one connection at a time, so these two ends belong together.
    fn new(proxy: &Proxy, upstream: &Listener) -> Self {
        Self { client: proxy.connect(), server: upstream.accept().unwrap() }
    }

    #[track_caller]
    pub(super) fn assert_carries(&mut self, bytes: &[u8]) {
        self.client.send(bytes);
        assert_eq!(self.server.receive(bytes.len()), bytes);
        self.server.send(bytes);
        assert_eq!(self.client.receive(bytes.len()), bytes);
    }

    /// Ends both streams in good order.
    #[track_caller]
    pub(super) fn end(mut self) {
        self.client.finish();
        assert_eq!(self.server.receive_all(), Received::ended(b""));
        drop(self.server);
        assert_eq!(self.client.receive_all(), Received::ended(b""));
    }
}

/// Clients that a pause rejects, for the few seconds that this takes.
struct Rejected {
    authority: Authority,
    answer: Vec<u8>,
    /// Moment from which the last of them lingers.
    begun: Instant,
    /// Moment at which the last of them has knocked.
    knocked: Instant,
    /// Client that has said nothing.
    sniffing: Stream,
    /// Client that has read one byte of its answer.
    lingering: Stream,
    /// Client in a TLS handshake, which the upgrade awaits.
    handshaking: Option<Stream>,
    /// Client whose TLS handshake does not begin.
    knocking: Option<StreamOwned<ClientConnection, Stream>>,
}

/// A client in each state, a caller in each wait, and what must become of them.
pub(super) struct Cast {
    pub(super) proxy: Proxy,
    upstream: Listener,
    /// Relay in both directions.
    pub(super) relayed: Pair,
    /// Relay whose client has ended its stream and waits for the answer to come.
    asked: Pair,
    /// Relay whose upstream has ended its stream.
    answered: Option<Pair>,
    /// Client of a long download, of which it has read nothing.
    flooded: Stream,
    /// Upstream that has read nothing of a client that has reset.
    aborted: Option<Stream>,
    /// Client that is dialled for.
    connecting: Option<Stream>,
    /// Connection that fills the upstream's queue, so that no further one is made.
    queued: Option<Stream>,
    /// Client that a pause holds, with its first bytes sent.
    pub(super) held: Stream,
    /// Caller that waits until the proxy is idle.
    pub(super) waiting: Stream,
    /// Command that is to run once the proxy is idle.
    pub(super) exec: Exec,
    rejected: Option<Rejected>,
}

impl Cast {
    /// Brings all of it about, in front of a TCP upstream.
    pub(super) fn set(builder: Builder) -> Self {
        Self::before(Family::Tcp4, builder)
    }

    /// Brings about all that there is on this route: only TCP knows resets and dials that take long.
    pub(super) fn before(family: Family, builder: Builder) -> Self {
        let upstream = Listener::bind(&Addr::free(family, &builder.path(""), "upstream.sock"));
        sockopt::set_socket_recv_buffer_size(&upstream, RECEIVE_BUFFER).unwrap();
        sockopt::set_socket_timeout(&upstream, Timeout::Recv, Some(PATIENCE)).unwrap();
        let authority = Authority::new("ours");
        let files = authority.write_files(&builder.path(""));
        let answer = pattern(2, ANSWER_BYTES);
        let proxy = builder
            .upstream_at(&upstream.addr())
            .args(["--upstream-connect-timeout", "20s", "--proxy-reject-with", "file:answer"])
            .args(files.options())
            .file("answer", &answer)
            .start();

        let mut relayed = Pair::new(&proxy, &upstream);
        relayed.assert_carries(b"before");
        let mut asked = Pair::new(&proxy, &upstream);
        asked.client.send(b"question");
        asked.client.finish();
        assert_eq!(asked.server.receive_all(), Received::ended(b"question"));
        let mut answered = Pair::new(&proxy, &upstream);
        answered.server.send(b"greeting");
        answered.server.finish();
        assert_eq!(answered.client.receive_all(), Received::ended(b"greeting"));
        let Pair { client, mut server } = Pair::new(&proxy, &upstream);
        let flooded = client;
        // An error means that the test has ended.
        drop(spawn(move || server.write_all(&pattern(1, FLOOD_BYTES))));
        let knows_resets = family.is_tcp() && matches!(proxy.addr(), Addr::Tcp(_));
        let aborted = knows_resets.then(|| abort(&proxy, &upstream));
        let (mut connecting, mut queued) = (None, None);
        if family.is_tcp() {
            // The queue takes one beyond its length.
            upstream.backlog(0);
            queued = Some(upstream.addr().connect());
            let mut client = proxy.connect();
            client.send(b"dialled for");
            proxy.control().wait_counts(|status| status.connecting, 1);
            connecting = Some(client);
        }

        let exec = Exec::start(proxy.control(), ["--ttl=1h", "--", "sh", "-c", COMMAND]);
        wait_until("exec has paused", || proxy.control().is_paused());
        proxy.control().pause();
        let mut held = proxy.connect_held();
        held.send(b"from a held client");
        let waiting = proxy.control().send("GET", "/paused/block-until-idle", &[]);
        let rejected = Some(Rejected::set(&proxy, authority, answer));
        Self {
            proxy,
            upstream,
            relayed,
            asked,
            answered: Some(answered),
            flooded,
            aborted,
            connecting,
            queued,
            held,
            waiting,
            exec,
            rejected,
        }
    }

    /// Lets the clients go whose time is over before a long wait is.
    pub(super) fn without_rejected(mut self) -> Self {
        self.rejected = None;
        self
    }

    /// Asks for an upgrade. Returns the caller, who has no answer yet.
    #[track_caller]
    pub(super) fn ask(&mut self) -> Stream {
        let caller = self.proxy.control().send("POST", "/upgrade", &[]);
        caller.read_timeout(GLANCE);
        self.knock(|_proxy| is_answered(&caller));
        caller.read_timeout(PATIENCE);
        caller
    }

    /// Has a client come whose TLS handshake is held back as an upgrade awaits those that have begun, unless it `is_over` by
    /// then.
    #[track_caller]
    pub(super) fn knock(&mut self, is_over: impl Fn(&Proxy) -> bool) {
        let Some(rejected) = &mut self.rejected else { return };
        let deadline = Instant::now() + PATIENCE;
        while rejected.knocking.is_none() && !is_over(&self.proxy) {
            assert!(Instant::now() < deadline, "no upgrade holds a handshake back");
            let mut tls = TlsClient::new(&rejected.authority).over(self.proxy.connect());
            tls.conn.write_tls(&mut tls.sock).unwrap();
            tls.sock.read_timeout(HELLO_ANSWER);
            rejected.knocked = Instant::now();
            rejected.knocking = (!is_answered(&tls.sock)).then_some(tls);
        }
        rejected.handshaking = None;
    }

    /// Checks that all of it is as it was, and ends it in good order. Returns the proxy and its upstream, which echoes.
    #[track_caller]
    pub(super) fn finish(mut self) -> (Proxy, Upstream) {
        self.serve();
        let Self { proxy, upstream, relayed, mut held, mut waiting, mut exec, .. } = self;
        assert!(proxy.control().is_paused());
        proxy.control().wait_counts(|it| (it.held, it.connecting, it.active), (1, 0, 1));
        relayed.end();
        assert_eq!(Response::read(&mut waiting).status, 204);
        exec.wait_started();
        exec.end();
        assert_eq!(exec.code(), 7);
        assert_eq!(proxy.control().status().held, 1, "two other pauses go on");
        proxy.control().resume();
        resumed(&mut held, &upstream);
        (proxy, Upstream::on(upstream, echo))
    }
    /// Checks that each of them gets what a stop promises, and that the proxy ends behind the last one.
    #[track_caller]
    pub(super) fn finish_stopping(mut self) -> Proxy {
        self.serve();
        let Self { proxy, upstream, relayed, mut held, mut waiting, mut exec, .. } = self;
        proxy.wait_refused();
        relayed.end();
        assert_eq!(Response::read(&mut waiting).status, 204);
        // A proxy that stops is nothing to begin a restart behind.
        assert_eq!(exec.code(), EX_TEMPFAIL);
        assert_eq!(exec.stdout.recv_timeout(PATIENCE).ok(), None, "the command has run");
        proxy.control().wait_counts(|it| (it.held, it.active), (1, 0));
        // The last client may be gone before the API has answered.
        let mut resume = proxy.control().send("DELETE", "/paused", &[]);
        resumed(&mut held, &upstream);
        assert_eq!(Response::read(&mut resume).status, 204);
        proxy
    }

    /// Ends the relay whose upstream has ended its stream, as a stop would soon.
    #[track_caller]
    pub(super) fn end_answered(&mut self) {
        let Some(Pair { mut client, mut server }) = self.answered.take() else { return };
        client.send(b"farewell");
        client.finish();
        assert_eq!(server.receive_all(), Received::ended(b"farewell"));
    }

    /// Checks that rejected clients have their answers.
    #[track_caller]
    pub(super) fn answer_rejected(&mut self) {
        if let Some(rejected) = self.rejected.take() {
            rejected.finish();
        }
    }

    /// Checks that each client is served as its state demands, but for those that wait for others to leave or for a resume.
    #[track_caller]
    fn serve(&mut self) {
        self.answer_rejected();
        self.relayed.assert_carries(b"after");
        self.asked.server.send(b"answer");
        self.asked.server.finish();
        assert_eq!(self.asked.client.receive_all(), Received::ended(b"answer"));
        self.end_answered();
        let download = self.flooded.receive_all();
        assert_eq!(download.end, End::Eof);
        assert_same(&download.bytes, &pattern(1, FLOOD_BYTES));
        self.flooded.finish();
        if let Some(mut server) = self.aborted.take() {
            let upload = server.receive_all();
            assert_eq!(upload.end, End::Reset);
            assert_same(&upload.bytes, &pattern(3, ABORTED_BYTES));
        }
        if let Some(client) = self.connecting.take() {
            self.upstream.backlog(BACKLOG);
            drop((self.upstream.accept().unwrap(), self.queued.take()));
            let mut dialled = Pair { client, server: self.upstream.accept().unwrap() };
            assert_eq!(dialled.server.receive(11), b"dialled for");
            dialled.assert_carries(b"and reached");
            dialled.end();
        }
    }
}

/// Returns the upstream's end of a connection whose client has sent much and has reset, behind all that others have sent. The
/// upstream reads nothing of it.
fn abort(proxy: &Proxy, upstream: &Listener) -> Stream {
    let Pair { mut client, server } = Pair::new(proxy, upstream);
    client.send(&pattern(3, ABORTED_BYTES));
    let carried = (b"before".len() + b"question".len() + ABORTED_BYTES) as u64;
    proxy.control().wait_counts(|status| status.bytes_to_upstream, carried);
    client.reset();
    server
}

/// Checks that a held client is dialled for and served.
#[track_caller]
fn resumed(held: &mut Stream, upstream: &Listener) {
    let mut server = upstream.accept().unwrap();
    assert_eq!(server.receive(18), b"from a held client");
    server.send(b"served");
    server.finish();
    assert_eq!(held.receive_all(), Received::ended(b"served"));
    held.finish();
}

/// Returns true if a stream has bytes to read, within its timeout.
fn is_answered(stream: &Stream) -> bool {
    rustix::net::recv(stream, &mut [0; 1][..], RecvFlags::PEEK).is_ok()
}

impl Rejected {
    /// Has clients come that are rejected, as a further pause wants it.
    fn set(proxy: &Proxy, authority: Authority, answer: Vec<u8>) -> Self {
        let rejecting = |count| proxy.control().wait_counts(|status| status.rejecting, count);
        assert_eq!(proxy.control().put("/paused?name=rejects&mode=reject").status, 201);
        let mut handshaking = proxy.connect();
        let hello = TlsClient::new(&authority).hello();
        handshaking.send(&hello[..hello.len() / 2]);
        rejecting(1);
        let sniffing = proxy.connect();
        rejecting(2);
        let mut lingering = proxy.connect();
        sockopt::set_socket_recv_buffer_size(&lingering, ANSWER_BUFFER).unwrap();
        let begun = Instant::now();
        lingering.send(REQUEST);
        assert_eq!(lingering.receive(1), answer[..1]);
        let handshaking = Some(handshaking);
        Self {
            authority,
            answer,
            begun,
            knocked: begun,
            sniffing,
            lingering,
            handshaking,
            knocking: None,
        }
    }

    /// Checks that each has its answer and a clean end, unless this machine has let them wait for longer than they may.
    #[track_caller]
    fn finish(mut self) {
        // From now on no handshake is held back.
        let waited = self.knocked.elapsed();
        if self.begun.elapsed() > LINGER {
            return println!("too busy a machine: {:?} have passed", self.begun.elapsed());
        }
        self.lingering.send(b"more");
        assert_eq!(self.lingering.receive_all(), Received::ended(&self.answer[1..]));
        self.sniffing.send(REQUEST);
        assert_eq!(self.sniffing.receive_all(), Received::ended(&self.answer));
        let Some(mut tls) = self.knocking else { return };
        tls.sock.read_timeout(PATIENCE);
        let exchange = |tls: &mut StreamOwned<ClientConnection, Stream>| {
            let mut answer = Vec::new();
            tls.write_all(REQUEST)?;
            tls.read_to_end(&mut answer)?;
            Ok::<_, io::Error>(answer)
        };
        match exchange(&mut tls) {
            Ok(answer) => assert_same(&answer, &self.answer),
            Err(error) => {
                let is_right = waited > KNOCK_PATIENCE && is_alert(&error);
                assert!(is_right || waited > HANDSHAKE_PATIENCE, "{error:?} after {waited:?}");
            }
        }
    }
}

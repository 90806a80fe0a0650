//! The relay under seeded schedules, on real sockets with small buffers.
//!
//! A schedule is a random sequence of steps. A peer writes, reads, ends its stream or resets; the worker takes events
//! from the kernel or drives a turn. A failure prints its seed and steps; `TCPAUSE_SEED=n` replays one schedule, and
//! `TCPAUSE_SCHEDULES=n` sets the number that each test runs.

mod cases;
mod peer;

use std::time::{Duration, Instant};

use mio::{Events, Poll, Token};
use rustix::net::{SendFlags, sockopt};

use self::peer::{DEADLINE, Ending, Left, PERIOD, Peer, Port, Random, WRITE_BYTES_MAX};
use super::*;
use crate::sys::Socket;

/// Schedules that each test runs.
const SCHEDULES: u64 = 150;
/// Receive buffer of peers with small ones. With less, TCP waits 200 ms for a window that is worth a segment.
const RECEIVE_BUFFER_BYTES: usize = 20_000;
/// Buffer of the flows: small, so that the peers' small buffers fill it and flows turn to splicing.
const SMALL_SCRATCH_BYTES: usize = 16 * 1024;
/// Turns in a row that may move nothing and yet ask for another.
const IDLE_TURNS_MAX: usize = 3;

/// Sides of a connection, and indices of its peers.
const CLIENT: usize = 0;
const UPSTREAM: usize = 1;

#[derive(Debug, Clone, Copy)]
enum Step {
    Write { side: usize, bytes: usize },
    Read { side: usize, bytes: usize },
    Urgent { side: usize },
    Shut { side: usize },
    Close { side: usize },
    Reset { side: usize },
    Events,
    Turn,
}

/// A connection under test: two peers, and the worker's endpoint and relay between them.
struct Connection {
    peers: [Peer; 2],
    /// `None` after the close.
    carried: Option<(Endpoint, Relay)>,
    /// Index among the worker's connections.
    index: usize,
    /// Set if an event has come since the last turn.
    ready: bool,
    next: Next,
    delivered: (u64, u64),
    /// Turns in a row that have moved nothing and yet asked for another.
    idle_turns: usize,
}

/// Parts that the connections of one schedule share, like those of one worker.
struct Worker {
    poll: Poll,
    events: Events,
    buffers: RelayBuffers,
}

/// Prints, when a test fails, the seed that replays it.
struct Replay {
    seed: u64,
    steps: Vec<(usize, Step)>,
}

#[test]
fn tcp_to_tcp() {
    simulate(&Port::tcp(), &Port::tcp());
}

#[test]
fn tcp_to_unix() {
    simulate(&Port::tcp(), &Port::unix());
}

#[test]
fn unix_to_tcp() {
    simulate(&Port::unix(), &Port::tcp());
}

#[test]
fn unix_to_unix() {
    simulate(&Port::unix(), &Port::unix());
}

fn simulate(client: &Port, upstream: &Port) {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    if let Some(seed) = number("TCPAUSE_SEED") {
        return run(seed, client, upstream);
    }
    for seed in 1..=number("TCPAUSE_SCHEDULES").unwrap_or(SCHEDULES) {
        run(seed, client, upstream);
    }
}

/// Runs the schedule of `seed` and brings it to its end.
fn run(seed: u64, client: &Port, upstream: &Port) {
    let mut replay = Replay { seed, steps: Vec::new() };
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    for _warm_up in 0..8 {
        random.next();
    }
    let mut worker = Worker::new([0, 1, 100][random.below(3)]);
    let buffers = [None, Some(1), Some(20_000)][random.below(3)];
    let mut connections: Vec<_> = (0..=random.below(3))
        .map(|index| {
            let mut connection = Connection::new(client, upstream, index, &worker);
            connection.peers.iter_mut().for_each(|peer| peer.key = random.below(PERIOD));
            if let Some(bytes) = buffers {
                connection.shrink_buffers(bytes);
            }
            connection
        })
        .collect();
    // Sizes of all orders of magnitude alike, or large ones alone.
    let magnitudes = [17, 2][random.below(2)];
    let (may_abort, may_be_urgent) = (random.below(2) == 0, random.below(4) == 0);

    for _step in 0..10 + random.below(150) {
        let index = random.below(connections.len());
        let step = Step::random(&mut random, may_abort, may_be_urgent, magnitudes);
        replay.steps.push((index, step));
        match step {
            Step::Events => worker.mark(&mut connections, Duration::ZERO),
            Step::Turn => connections[index].drive(&mut worker),
            step => connections[index].act(step),
        }
        worker.check(&mut connections);
    }
    worker.finish(&mut connections, random.below(2));
    connections.iter().for_each(Connection::judge);
    drop(connections);
    assert_eq!(
        worker.buffers.pipes.alive.get(),
        worker.buffers.pipes.empty.len(),
        "no pipe is lost"
    );
}

impl Worker {
    fn new(pipes_max: usize) -> Self {
        Self {
            poll: Poll::new().unwrap(),
            events: Events::with_capacity(16),
            buffers: RelayBuffers {
                scratch: vec![0; SMALL_SCRATCH_BYTES].into(),
                ..RelayBuffers::new(pipes_max)
            },
        }
    }

    /// Marks the events that the kernel reports.
    fn mark(&mut self, connections: &mut [Connection], timeout: Duration) {
        self.poll.poll(&mut self.events, Some(timeout)).unwrap();
        for event in &self.events {
            let connection = &mut connections[event.token().0 / 2];
            let Some((client, relay)) = &mut connection.carried else { continue };
            match event.token().0 % 2 {
                CLIENT => client.mark(event),
                _ => relay.upstream_mut().mark(event),
            }
            connection.ready = true;
        }
    }

    /// Asserts what must hold after each step.
    fn check(&self, connections: &mut [Connection]) {
        let mut in_use = 0;
        for connection in connections {
            in_use += connection.check();
        }
        assert_eq!(
            self.buffers.pipes.alive.get(),
            self.buffers.pipes.empty.len() + in_use,
            "no pipe is lost"
        );
    }

    /// Brings the connections to their end. All bytes must arrive without further steps. Then `first` ends its stream,
    /// and the other side must see the end before it ends its own.
    fn finish(&mut self, connections: &mut [Connection], first: usize) {
        self.work_until(connections, Connection::has_arrived);
        for connection in connections.iter_mut() {
            connection.act(Step::Shut { side: first });
        }
        self.work_until(connections, |it| it.has_left() || it.peers[1 - first].seen.is_some());
        for connection in connections.iter_mut() {
            connection.act(Step::Shut { side: CLIENT });
            connection.act(Step::Shut { side: UPSTREAM });
        }
        self.work_until(connections, Connection::is_over);
    }

    /// Lets peers read and the worker drive turns until all connections satisfy `is_done`.
    fn work_until(
        &mut self,
        connections: &mut [Connection],
        is_done: impl Fn(&Connection) -> bool,
    ) {
        let deadline = Instant::now() + DEADLINE;
        while let Some(waiting) = connections.iter().find(|it| !is_done(it)) {
            assert!(Instant::now() < deadline, "it stalls: {:#?}, {waiting}", waiting.carried);
            for connection in connections.iter_mut() {
                connection.act(Step::Read { side: CLIENT, bytes: WRITE_BYTES_MAX });
                connection.act(Step::Read { side: UPSTREAM, bytes: WRITE_BYTES_MAX });
                connection.drive(self);
            }
            self.check(connections);
            self.mark(connections, Duration::from_millis(1));
        }
    }
}

impl Connection {
    fn new(client: &Port, upstream: &Port, index: usize, worker: &Worker) -> Self {
        let (client_peer, client) = client.connect();
        let (upstream, upstream_peer) = upstream.connect();
        client.register(worker.poll.registry(), token(index, CLIENT)).unwrap();
        upstream.register(worker.poll.registry(), token(index, UPSTREAM)).unwrap();
        Self {
            peers: [Peer::new(client_peer), Peer::new(upstream_peer)],
            carried: Some((
                Endpoint::connected(client),
                Relay::new(Endpoint::connected(upstream), None),
            )),
            index,
            ready: true,
            next: Next::Wait,
            delivered: (0, 0),
            idle_turns: 0,
        }
    }

    fn shrink_buffers(&self, bytes: usize) {
        let (client, relay) = self.carried.as_ref().unwrap();
        for socket in [client.socket(), relay.upstream().socket()] {
            sockopt::set_socket_send_buffer_size(socket, bytes).unwrap();
        }
        for socket in self.peers.iter().filter_map(|peer| peer.socket.as_ref()) {
            sockopt::set_socket_send_buffer_size(socket, bytes).unwrap();
            sockopt::set_socket_recv_buffer_size(socket, RECEIVE_BUFFER_BYTES).unwrap();
        }
    }

    /// Takes a peer's step.
    fn act(&mut self, step: Step) {
        match step {
            Step::Write { side, bytes } => self.peers[side].write(bytes, SendFlags::NOSIGNAL),
            Step::Urgent { side } => {
                self.peers[side].write(1, SendFlags::NOSIGNAL | SendFlags::OOB);
            }
            Step::Read { side, bytes } => {
                let key = self.peers[1 - side].key;
                self.peers[side].read(bytes, key);
            }
            Step::Shut { side } => self.peers[side].shut(),
            Step::Close { side } => self.leave(side, Left::Closed),
            Step::Reset { side } => self.leave(side, Left::Reset),
            Step::Events | Step::Turn => unreachable!("the worker's"),
        }
    }

    fn leave(&mut self, side: usize, how: Left) {
        let relay_has = self.taken(side) + self.queued_in_kernel(side);
        let peer = &mut self.peers[side];
        let Some(socket) = peer.socket.take() else { return };
        peer.owed = relay_has;
        peer.left = Some(how);
        peer.left_in_order = peer.is_unix && queued(&socket) == 0;
        if how == Left::Reset {
            socket.reset_on_close();
        }
    }

    /// Drives a turn, if the worker would.
    fn drive(&mut self, worker: &mut Worker) {
        if !self.ready && !matches!(self.next, Next::Again | Next::Settle { .. }) {
            return;
        }
        self.ready = false;
        let before = self.taken(CLIENT) + self.taken(UPSTREAM);
        let Some((client, relay)) = &mut self.carried else { return };
        let registration = Registration {
            registry: worker.poll.registry(),
            client: token(self.index, CLIENT),
            upstream: token(self.index, UPSTREAM),
        };
        let turn = relay.drive(client, &mut worker.buffers, &registration);
        self.next = turn.next;
        self.delivered.0 += turn.to_upstream;
        self.delivered.1 += turn.to_client;
        assert_eq!(self.delivered, relay.delivered(), "the turn tells what it delivered");
        let delivered = turn.to_upstream + turn.to_client;
        let is_closing = matches!(turn.next, Next::Close | Next::Reset(_));
        if matches!(turn.next, Next::Reset(_)) {
            client.socket().reset_on_close();
            relay.upstream().socket().reset_on_close();
        }
        if is_closing {
            self.carried = None;
        }
        let moved = delivered > 0 || self.taken(CLIENT) + self.taken(UPSTREAM) != before;
        self.idle_turns = if moved || turn.next != Next::Again { 0 } else { self.idle_turns + 1 };
        assert!(self.idle_turns < IDLE_TURNS_MAX, "it turns in idle circles");
    }

    /// Returns the number of `side`'s bytes that the relay has taken from the kernel.
    fn taken(&self, side: usize) -> usize {
        let (delivered, flow) = match side {
            CLIENT => (self.delivered.0, self.carried.as_ref().map(|(_, it)| &it.to_upstream)),
            _ => (self.delivered.1, self.carried.as_ref().map(|(_, it)| &it.to_client)),
        };
        let buffered = flow.map_or(0, |flow| match &flow.buffered {
            Buffered::Nothing => 0,
            Buffered::Bytes(bytes, written) | Buffered::Header(bytes, written) => {
                bytes.len() - written
            }
            Buffered::Pipe(pipe) => pipe.len(),
        });
        usize::try_from(delivered).unwrap() + buffered
    }

    /// Returns the number of `side`'s bytes that wait in the kernel.
    fn queued_in_kernel(&self, side: usize) -> usize {
        let Some((client, relay)) = &self.carried else { return 0 };
        let socket = if side == CLIENT { client.socket() } else { relay.upstream().socket() };
        queued(socket)
    }

    /// Asserts what must hold after each step. Returns the number of pipes in use.
    fn check(&mut self) -> usize {
        for (side, delivered) in [(CLIENT, self.delivered.0), (UPSTREAM, self.delivered.1)] {
            let (source, sink) = (&self.peers[side], &self.peers[1 - side]);
            let delivered = usize::try_from(delivered).unwrap();
            let taken = self.taken(side);
            assert!(sink.received <= delivered, "more was received than delivered");
            assert!(taken <= source.sent, "more was taken than sent");
            // Bytes sent on a UNIX socket are in the peer's queue at once, so all of them can be accounted for.
            let broken = self.carried.as_ref().is_none_or(|(_, relay)| {
                let flow = if side == CLIENT { &relay.to_upstream } else { &relay.to_client };
                flow.stage == Stage::Broken
            });
            if source.is_unix && !broken {
                assert_eq!(source.sent, taken + self.queued_in_kernel(side), "bytes are lost");
            }
            if let Some(socket) = &sink.socket
                && sink.is_unix
            {
                assert_eq!(delivered, sink.received + queued(socket), "bytes are lost");
            }
        }
        let flows = self.carried.iter().flat_map(|(_, it)| [&it.to_upstream, &it.to_client]);
        flows.filter(|flow| matches!(flow.buffered, Buffered::Pipe(_))).count()
    }

    fn has_left(&self) -> bool {
        self.peers.iter().any(|peer| peer.left.is_some())
    }

    /// Returns true if all bytes were received, or a peer has left.
    fn has_arrived(&self) -> bool {
        let [client, upstream] = &self.peers;
        self.has_left() || client.received == upstream.sent && upstream.received == client.sent
    }

    fn is_over(&self) -> bool {
        let is_done = |peer: &Peer| peer.socket.is_none() || peer.seen.is_some();
        self.carried.is_none() && self.peers.iter().all(is_done)
    }

    /// Asserts what must hold in the end.
    fn judge(&self) {
        for side in [CLIENT, UPSTREAM] {
            let (source, sink) = (&self.peers[side], &self.peers[1 - side]);
            if sink.left.is_some() {
                continue;
            }
            match source.left {
                None => {
                    assert_eq!(sink.received, source.sent, "all arrives: {self}");
                    assert_eq!(sink.seen, Some(Ending::Orderly), "and so does the end: {self}");
                }
                Some(left) => {
                    assert!(sink.received >= source.owed, "what came before arrives: {self}");
                    // UNIX sockets know no reset.
                    let was_ended = source.shut || left == Left::Closed || source.is_unix;
                    assert!(
                        sink.seen == Some(Ending::Aborted)
                            || sink.is_unix
                            || was_ended && sink.received == source.sent,
                        "an aborted stream does not look whole: {self}"
                    );
                    if source.left_in_order && !sink.is_unix {
                        assert_eq!(sink.received, source.sent, "all arrives: {self}");
                        let ending = Some(Ending::Orderly);
                        assert!(sink.seen == ending || sink.broken, "and so does the end: {self}");
                    }
                    assert!(
                        was_ended || matches!(self.next, Next::Reset(_)),
                        "a reset is passed on: {self}"
                    );
                }
            }
        }
        if self.peers.iter().all(|peer| peer.left.is_none()) {
            assert_eq!(self.next, Next::Close);
        }
    }
}

impl std::fmt::Display for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}, {:#?}", self.next, self.peers)
    }
}

impl Step {
    fn random(
        random: &mut Random,
        may_abort: bool,
        may_be_urgent: bool,
        magnitudes: usize,
    ) -> Self {
        let side = random.below(2);
        let magnitude = random.below(magnitudes);
        let bytes = 1 + random.below(WRITE_BYTES_MAX >> magnitude);
        match random.below(100) {
            0..25 => Self::Write { side, bytes },
            25..45 => Self::Read { side, bytes },
            45..50 if may_be_urgent => Self::Urgent { side },
            50..52 => Self::Shut { side },
            52 if may_abort => Self::Close { side },
            53 if may_abort => Self::Reset { side },
            54..75 => Self::Events,
            _ => Self::Turn,
        }
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay with TCPAUSE_SEED={}\nsteps: {:?}", self.seed, self.steps);
        }
    }
}

fn token(index: usize, side: usize) -> Token {
    Token(index * 2 + side)
}

/// Returns the number of bytes that can be read from `socket` now.
fn queued(socket: &Socket) -> usize {
    usize::try_from(rustix::io::ioctl_fionread(socket).unwrap_or(0)).unwrap()
}

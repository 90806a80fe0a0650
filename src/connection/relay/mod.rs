//! The relay: carries bytes both ways between a client and its upstream, and their ends with them.
//!
//! A relay is two *flows*, one a direction. A flow first drains what it has buffered, and only then fills from its
//! source. So nothing to fill with means "source empty" and never "pipe full", an end of stream is seen only when
//! nothing is left to deliver before it, and `Buffered` is the only place where bytes live between turns.

use std::time::{Duration, Instant};

use crate::connection::{
    endpoint::{Awaited, Endpoint, Received, Registration, Sent},
    pipe::{PIPE_BYTES, Pipe, PipePool},
};

/// The size of the buffer that a worker's flows share.
///
/// It is 45 segments of an Ethernet, the most that TCP sends in one packet (64 KiB with its headers). A few bytes more would
/// make each write a packet and a small rest: over the loopback, that doubles what a byte costs.
pub(crate) const SCRATCH_BYTES: usize = 45 * 1448;

/// A read that yields as much turns a flow to splicing, and a splice that moves less back to copying. Messages of this size
/// cost a tenth less by splice.
const BULK_BYTES_MIN: usize = 16 * 1024;

/// What a flow may move before others have their turn. The last splice of a turn may move a whole pipe on top of it.
const TURN_BYTES_MAX: usize = 64 * 1024;

/// How much a splice moves while others exchange small messages: they wait for it. Alone, it moves a whole pipe.
const SPLICED_BYTES_BESIDE_OTHERS_MAX: usize = 128 * 1024;

/// For how long after a small message others are expected.
const OTHERS_EXPECTED_FOR: Duration = Duration::from_millis(10);

/// What a worker lends to the relay it drives.
#[derive(Debug)]
pub(crate) struct RelayBuffers {
    /// Where small amounts of bytes pass through.
    pub(crate) scratch: Box<[u8]>,
    /// What large amounts pass through.
    pub(crate) pipes: PipePool,
    /// When the turn began.
    pub(crate) now: Instant,
    /// When a small message last passed.
    small_at: Option<Instant>,
}

/// The upstream of a client, and the bytes on their way between the two.
#[derive(Debug)]
pub(crate) struct Relay {
    upstream: Endpoint,
    to_upstream: Flow,
    to_client: Flow,
}

/// What a relay did in its turn and what it waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Bytes delivered to the upstream.
    pub(crate) to_upstream: u64,
    /// Bytes delivered to the client.
    pub(crate) to_client: u64,
    /// What comes next.
    pub(crate) next: Next,
}

/// What comes after a relay's turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// An event.
    Wait,
    /// Another turn: it has used up this one.
    Again,
    /// One side was aborted, and the other has yet to take what came before; so many bytes of it are on their way.
    Settle(u32),
    /// Both streams have ended: close.
    Close,
    /// One side was aborted, and the other has taken all that came before: reset it, and close.
    Reset,
}

/// One direction.
#[derive(Debug)]
struct Flow {
    stage: Stage,
    buffered: Buffered,
    /// Whether its source has much to say: then bytes are spliced.
    bulk: bool,
    /// Bytes delivered since the connection began.
    delivered: u64,
}

/// How far a flow has come. Only an open one has bytes buffered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Bytes may come.
    Open,
    /// The source has ended its stream, and the sink knows.
    Ended,
    /// The source was aborted, and the sink has been sent all that came before.
    Cut,
    /// The sink takes nothing any more.
    Broken,
}

/// Bytes taken from the source that the sink has not taken yet.
#[derive(Debug)]
enum Buffered {
    Nothing,
    /// A short write's leftover, and how much of it has been written since.
    Bytes(Box<[u8]>, usize),
    /// A pipe with bytes in it.
    Pipe(Pipe),
}

impl RelayBuffers {
    /// Buffers with at most `pipes_max` pipes.
    pub(crate) fn new(pipes_max: usize) -> Self {
        Self {
            scratch: vec![0; SCRATCH_BYTES].into(),
            pipes: PipePool::new(pipes_max),
            now: Instant::now(),
            small_at: None,
        }
    }

    /// How much a splice may move.
    fn spliced_bytes_max(&self) -> usize {
        let others = self.small_at.is_some_and(|at| self.now < at + OTHERS_EXPECTED_FOR);
        if others { SPLICED_BYTES_BESIDE_OTHERS_MAX } else { PIPE_BYTES }
    }
}

impl Relay {
    /// The relay to a connected `upstream`.
    pub(crate) fn new(upstream: Endpoint) -> Self {
        Self { upstream, to_upstream: Flow::new(), to_client: Flow::new() }
    }

    /// The upstream's side.
    pub(crate) fn upstream(&self) -> &Endpoint {
        &self.upstream
    }

    /// The upstream's side, to be marked.
    pub(crate) fn upstream_mut(&mut self) -> &mut Endpoint {
        &mut self.upstream
    }

    /// Bytes delivered to the upstream and to the client, since the connection began.
    pub(crate) fn delivered(&self) -> (u64, u64) {
        (self.to_upstream.delivered, self.to_client.delivered)
    }

    /// Returns true if nothing is known to be on its way: no bytes, no end of a stream, no reset.
    pub(crate) fn is_at_rest(&self, client: &Endpoint) -> bool {
        self.to_upstream.is_at_rest(client) && self.to_client.is_at_rest(&self.upstream)
    }

    /// Returns true if one of the two streams has ended.
    pub(crate) fn is_half_closed(&self) -> bool {
        !self.to_upstream.is_open() || !self.to_client.is_open()
    }

    /// Returns true if the upstream can still answer.
    pub(crate) fn can_answer(&self) -> bool {
        self.to_client.is_open()
    }

    /// Asks the kernel too: returns true if nothing has come that was not read, and the peers' kernels have all that was sent.
    pub(crate) fn is_silent(&mut self, client: &mut Endpoint) -> bool {
        let sides = [(client, &self.to_upstream), (&mut self.upstream, &self.to_client)];
        sides.into_iter().all(|(side, flow)| {
            // In this order: a reset discards what is not acknowledged, and only reading shows that there was one.
            let is_taken = unacknowledged(side) == 0;
            let is_read = match side.peek(&mut [0]) {
                // Behind a sink that takes nothing any more, the source may still be open.
                Received::Nothing => true,
                Received::End => !flow.is_open(),
                Received::Bytes(_) | Received::Reset | Received::Unsupported => false,
            };
            is_taken && is_read
        })
    }

    /// Treats a side that [`Socket::has_vanished`](crate::sys::Socket::has_vanished) as one that was reset. Returns true if one has.
    pub(crate) fn give_up_vanished(&mut self, client: &mut Endpoint) -> bool {
        [client, &mut self.upstream].into_iter().any(Endpoint::give_up_vanished)
    }

    /// Moves bytes both ways until neither can move or each has had its share. Then the kernel is to tell of what is waited
    /// for.
    pub(crate) fn drive(
        &mut self,
        client: &mut Endpoint,
        buffers: &mut RelayBuffers,
        registration: &Registration<'_>,
    ) -> Progress {
        let before = self.delivered();
        let is_last = self.to_client.stage == Stage::Ended;
        let more_up = self.to_upstream.pump(client, &mut self.upstream, buffers, is_last);
        let is_last = self.to_upstream.stage == Stage::Ended;
        let more_down = self.to_client.pump(&mut self.upstream, client, buffers, is_last);
        // Writing in one direction may have shown that there is an end to read in the other.
        let more_up = more_up || self.to_upstream.can_move(client, &self.upstream);
        // Once a side was aborted, only what it had sent is worth another turn.
        let more = match (client.is_reset(), self.upstream.is_reset()) {
            (true, _) => more_up,
            (false, true) => more_down,
            (false, false) => more_up || more_down,
        };
        // Bytes that nobody takes keep no relay alive.
        let is_over = !self.to_upstream.is_open() && !self.to_client.is_open();
        let next = if more && !is_over { Next::Again } else { self.next(client) };
        let delivered = self.delivered();
        let is_in_vain = next == Next::Wait && delivered == before;
        let is_awaited = self.await_events(client, is_in_vain, registration);
        let next = if next == Next::Wait && !is_awaited { Next::Again } else { next };
        Progress { to_upstream: delivered.0 - before.0, to_client: delivered.1 - before.1, next }
    }

    /// Has the kernel tell of what the relay waits for, and of nothing that woke it in vain: a source that goes on sending
    /// while its sink is full would do so at every segment.
    fn await_events(
        &mut self,
        client: &mut Endpoint,
        was_in_vain: bool,
        registration: &Registration<'_>,
    ) -> bool {
        let (up, down) = (self.to_upstream.has_buffered(), self.to_client.has_buffered());
        let Registration { registry, client: token, upstream } = *registration;
        let awaited = Awaited { readable: !up, writable: down };
        let is_awaited = client.await_events(awaited, was_in_vain, registry, token);
        let awaited = Awaited { readable: !down, writable: up };
        is_awaited & self.upstream.await_events(awaited, was_in_vain, registry, upstream)
    }

    fn next(&self, client: &Endpoint) -> Next {
        // Whoever was aborted takes no more; what it sent before is delivered first. That done, the other is reset.
        for (aborted, its_flow, other) in
            [(client, &self.to_upstream, &self.upstream), (&self.upstream, &self.to_client, client)]
        {
            if aborted.is_reset() {
                let under_way = if other.is_reset() { 0 } else { unacknowledged(other) };
                let settled = !its_flow.is_open() && under_way == 0;
                return if settled { Next::Reset } else { Next::Settle(under_way) };
            }
        }
        if self.to_upstream.is_open() || self.to_client.is_open() {
            return Next::Wait;
        }
        // A flow that broke may have left bytes unread, and closing a socket with bytes unread is a reset too.
        for (flow, source) in [(&self.to_upstream, client), (&self.to_client, &self.upstream)] {
            if flow.stage == Stage::Broken {
                let under_way = unacknowledged(source);
                if under_way > 0 {
                    return Next::Settle(under_way);
                }
            }
        }
        Next::Close
    }
}

impl Flow {
    fn new() -> Self {
        Self { stage: Stage::Open, buffered: Buffered::Nothing, bulk: false, delivered: 0 }
    }

    fn is_open(&self) -> bool {
        self.stage == Stage::Open
    }

    /// Returns true if nothing is known to be on its way from `source`.
    fn is_at_rest(&self, source: &Endpoint) -> bool {
        let is_over = !self.is_open() && self.stage != Stage::Cut;
        !source.is_reset() && (is_over || !self.has_buffered() && !source.is_read_closed())
    }

    /// Whether bytes wait for the sink.
    fn has_buffered(&self) -> bool {
        !matches!(self.buffered, Buffered::Nothing)
    }

    /// Whether pumping would get anywhere.
    fn can_move(&self, source: &Endpoint, sink: &Endpoint) -> bool {
        let unblocked = match self.buffered {
            Buffered::Nothing => source.is_readable(),
            Buffered::Bytes(..) | Buffered::Pipe(_) => sink.is_writable(),
        };
        self.is_open() && unblocked
    }

    /// Drains, fills, and drains again, until one of the two sockets has to be waited for (false), the flow is over
    /// (false), or its share of the turn is used up (true). `is_last` says that the other flow has ended: then the close
    /// that follows passes on the end of this one, and no call of its own is needed.
    fn pump(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        buffers: &mut RelayBuffers,
        is_last: bool,
    ) -> bool {
        let mut share = TURN_BYTES_MAX;
        while self.is_open() && self.drain(sink, buffers) && source.is_readable() {
            if share == 0 {
                return true;
            }
            let received = self.fill(source, sink, buffers);
            match received {
                Received::Bytes(bytes) => share = share.saturating_sub(bytes),
                Received::Nothing => break,
                Received::End if is_last => self.stage = Stage::Ended,
                Received::End => {
                    self.stage = match sink.shut_down_write() {
                        Sent::Broken => Stage::Broken,
                        Sent::Bytes(_) | Sent::Nothing => Stage::Ended,
                    }
                }
                Received::Reset => self.stage = Stage::Cut,
                Received::Unsupported => buffers.pipes.disable(),
            }
        }
        self.stage == Stage::Broken && Self::discard(source, buffers)
    }

    /// Reads what nobody is there to take. The source may be blocked in writing it, and would never come to read what the
    /// side that is gone had sent before. True when there may be more: no event would tell.
    fn discard(source: &mut Endpoint, buffers: &mut RelayBuffers) -> bool {
        let mut share = TURN_BYTES_MAX;
        while source.is_readable() && share > 0 {
            match source.recv(&mut buffers.scratch) {
                Received::Bytes(bytes) => share = share.saturating_sub(bytes),
                Received::Nothing => {}
                Received::End | Received::Reset | Received::Unsupported => return false,
            }
        }
        source.is_readable()
    }

    /// Writes what is buffered. True when nothing is left and the sink would take more.
    fn drain(&mut self, sink: &mut Endpoint, buffers: &mut RelayBuffers) -> bool {
        loop {
            let sent = match &mut self.buffered {
                Buffered::Nothing => return true,
                _ if !sink.is_writable() => return false,
                Buffered::Bytes(bytes, written) => {
                    sink.send(bytes.get(*written..).unwrap_or_default())
                }
                Buffered::Pipe(pipe) => sink.splice_out_of(pipe),
            };
            match sent {
                Sent::Bytes(bytes) => self.written(bytes, buffers),
                Sent::Nothing => return false,
                Sent::Broken => {
                    self.broken();
                    return false;
                }
            }
        }
    }

    /// Counts `bytes` of what was buffered as delivered, and lets go of an emptied buffer at once.
    fn written(&mut self, bytes: usize, buffers: &mut RelayBuffers) {
        self.delivered += bytes as u64;
        let left = match &mut self.buffered {
            Buffered::Nothing => 0,
            Buffered::Bytes(all, written) => {
                *written += bytes;
                all.len() - *written
            }
            Buffered::Pipe(pipe) => pipe.len(),
        };
        if left == 0
            && let Buffered::Pipe(pipe) = std::mem::replace(&mut self.buffered, Buffered::Nothing)
        {
            buffers.pipes.put(pipe);
        }
    }

    /// Takes bytes from the source; nothing is buffered when it is called.
    fn fill(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        buffers: &mut RelayBuffers,
    ) -> Received {
        if self.bulk
            && source.is_worth_splicing_to(sink)
            && let Some(pipe) = buffers.pipes.take()
        {
            let received = self.fill_pipe(pipe, source, buffers);
            // A splice stops before an urgent byte and tells of what is behind it: only a read finds the true end.
            if !matches!(received, Received::End | Received::Reset) {
                return received;
            }
        }
        let received = source.recv(&mut buffers.scratch);
        if let Received::Bytes(bytes) = received {
            self.bulk = bytes >= BULK_BYTES_MIN;
            if bytes < BULK_BYTES_MIN {
                buffers.small_at = Some(buffers.now);
            }
            self.pass_on(buffers.scratch.get(..bytes).unwrap_or_default(), sink);
        }
        received
    }

    fn fill_pipe(
        &mut self,
        mut pipe: Pipe,
        source: &mut Endpoint,
        buffers: &mut RelayBuffers,
    ) -> Received {
        let received = source.splice_into(&mut pipe, buffers.spliced_bytes_max());
        match received {
            Received::Bytes(bytes) => {
                self.bulk = bytes >= BULK_BYTES_MIN;
                self.buffered = Buffered::Pipe(pipe);
            }
            _ => buffers.pipes.put(pipe),
        }
        received
    }

    /// Writes `bytes`, which nothing is buffered before, and keeps what does not fit.
    fn pass_on(&mut self, bytes: &[u8], sink: &mut Endpoint) {
        let sent = if sink.is_writable() { sink.send(bytes) } else { Sent::Nothing };
        let written = match sent {
            Sent::Bytes(written) => written,
            Sent::Nothing => 0,
            Sent::Broken => return self.broken(),
        };
        self.delivered += written as u64;
        let left = bytes.get(written..).unwrap_or_default();
        if !left.is_empty() {
            self.buffered = Buffered::Bytes(left.into(), 0);
        }
    }

    /// The sink is gone: what was meant for it has nowhere to go. A pipe with bytes in it is destroyed.
    fn broken(&mut self) {
        self.stage = Stage::Broken;
        self.buffered = Buffered::Nothing;
    }
}

/// Returns the memory of what the peer's kernel has not got yet: a reset would discard it. A kernel that does not tell leaves
/// it unknown, which is not 0: the connection then waits as for a peer that takes nothing.
fn unacknowledged(endpoint: &Endpoint) -> u32 {
    endpoint.socket().unacknowledged().unwrap_or(u32::MAX)
}

#[cfg(test)]
mod simulation;

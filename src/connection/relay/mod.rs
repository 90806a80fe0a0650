//! The relay: carries bytes in both directions between a client and its upstream, and then the ends of their streams.
//!
//! A relay is two *flows*, one for each direction. A flow first drains its buffered bytes, and only then fills from its
//! source. So EAGAIN while filling means "source empty" and never "pipe full". An end of stream is seen only when all
//! bytes before it are delivered, and `Buffered` is the only place where bytes live between turns.

mod buffers;
mod progress;
mod words;

pub(crate) use buffers::RelayBuffers;
pub(crate) use progress::{Next, Progress, Side};
use serde::{Deserialize, Serialize};
pub(super) use words::RelayWords;

use crate::{
    connection::{
        endpoint::{Awaited, Endpoint, Received, Registration, Sent},
        pipe::Pipe,
        quiet::POSTGRES_IDLE,
    },
    stats::cause::CloseCause,
};

/// Size of a read that turns a flow to splicing. A splice that moves less turns it back to copying. Messages of this
/// size cost a tenth less by splice.
const BULK_BYTES_MIN: usize = 16 * 1024;

/// Bytes that a flow may move in a turn before other connections have theirs. The last splice of a turn may exceed it
/// by a whole pipe.
const TURN_BYTES_MAX: usize = 64 * 1024;

/// The upstream of a client, and the bytes in flight between the two.
#[derive(Debug)]
pub(crate) struct Relay {
    upstream: Endpoint,
    to_upstream: Flow,
    to_client: Flow,
}

/// One direction of a relay.
#[derive(Debug)]
struct Flow {
    stage: Stage,
    buffered: Buffered,
    /// Set while the source sends large amounts: then bytes are spliced.
    bulk: bool,
    /// Set if the last bytes of the source were copied and are [`POSTGRES_IDLE`].
    postgres_idle: bool,
    /// Bytes delivered since the connection began.
    delivered: u64,
}

/// Progress of a flow. Only an open flow has buffered bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Stage {
    /// More bytes may come.
    Open,
    /// The source has ended its stream, and the end was passed on to the sink.
    Ended,
    /// The source was reset, and all bytes before the reset were sent to the sink.
    Cut,
    /// The sink takes no more bytes.
    Broken,
}

/// Bytes taken from the source and not yet accepted by the sink.
#[derive(Debug)]
enum Buffered {
    Nothing,
    /// The remainder of a short write, and the number of its bytes written since.
    Bytes(Box<[u8]>, usize),
    /// A header of our own, and the number of its bytes written since. They count as no bytes of the client.
    Header(Box<[u8]>, usize),
    /// A pipe with bytes in it.
    Pipe(Pipe),
}

impl Relay {
    /// Returns a relay to a connected `upstream`, which gets the `header` before the client's first byte.
    pub(crate) fn new(upstream: Endpoint, header: Option<Box<[u8]>>) -> Self {
        let buffered = header.map_or(Buffered::Nothing, |bytes| Buffered::Header(bytes, 0));
        let to_upstream = Flow { buffered, ..Flow::new() };
        Self { upstream, to_upstream, to_client: Flow::new() }
    }

    /// Returns the upstream's endpoint.
    pub(crate) fn upstream(&self) -> &Endpoint {
        &self.upstream
    }

    /// Returns the upstream's endpoint, for marking events.
    pub(crate) fn upstream_mut(&mut self) -> &mut Endpoint {
        &mut self.upstream
    }

    /// Returns the bytes delivered to the upstream and to the client since the connection began.
    pub(crate) fn delivered(&self) -> (u64, u64) {
        (self.to_upstream.delivered, self.to_client.delivered)
    }

    /// Returns true if neither bytes nor an end nor a reset is known to be in flight. Asks the kernel nothing.
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

    /// Returns true if the upstream's last bytes are known to end an answer of PostgreSQL outside transactions.
    pub(crate) fn is_postgres_idle(&self) -> bool {
        self.to_client.postgres_idle
    }

    /// Returns true if the kernel too has nothing in flight: neither side has unread bytes, and the peers' kernels have
    /// acknowledged everything.
    pub(crate) fn is_silent(&mut self, client: &mut Endpoint) -> bool {
        let sides = [(client, &self.to_upstream), (&mut self.upstream, &self.to_client)];
        sides.into_iter().all(|(side, flow)| {
            // The order matters: a reset discards unacknowledged bytes, and only the read behind it shows that there
            // was a reset.
            let is_taken = unacknowledged(side) == 0;
            let is_read = match side.peek(&mut [0]) {
                // The source of a broken flow may still be open.
                Received::Nothing => true,
                Received::End => !flow.is_open(),
                Received::Bytes(_) | Received::Reset | Received::Unsupported => false,
            };
            is_taken && is_read
        })
    }

    /// Returns true if bytes of one side were not yet handed to the kernel of this host for the other.
    pub(crate) fn has_undelivered(&mut self, client: &mut Endpoint) -> bool {
        let sides = [(client, &self.to_upstream), (&mut self.upstream, &self.to_client)];
        sides.into_iter().any(|(source, flow)| {
            flow.has_buffered()
                || flow.is_open()
                    && matches!(source.peek(&mut [0]), Received::Bytes(_) | Received::Reset)
        })
    }

    /// Treats a side that [`Socket::has_vanished`](crate::sys::Socket::has_vanished) as reset. Returns true if a side
    /// has vanished.
    pub(crate) fn give_up_vanished(&mut self, client: &mut Endpoint) -> bool {
        [client, &mut self.upstream].into_iter().any(Endpoint::give_up_vanished)
    }

    /// Returns the cause of an end by a reset of `side`.
    pub(crate) fn reset_cause(&self, side: Side, client: &Endpoint) -> CloseCause {
        match side {
            Side::Client if client.has_vanished() => CloseCause::ClientVanished,
            Side::Client => CloseCause::ClientReset,
            Side::Upstream if self.upstream.has_vanished() => CloseCause::UpstreamVanished,
            Side::Upstream => CloseCause::UpstreamReset,
        }
    }

    /// Moves bytes in both directions until neither can move or each has used up its share. Then sets the epoll
    /// interest to what the relay waits for.
    pub(crate) fn drive(
        &mut self,
        client: &mut Endpoint,
        buffers: &mut RelayBuffers,
        registration: &Registration<'_>,
    ) -> Progress {
        let before = self.delivered();
        let is_last = self.to_client.stage == Stage::Ended;
        let more_up = self.to_upstream.pump(client, &mut self.upstream, buffers, is_last);
        let spliced_to_upstream = std::mem::take(&mut buffers.spliced);
        let is_last = self.to_upstream.stage == Stage::Ended;
        let more_down = self.to_client.pump(&mut self.upstream, client, buffers, is_last);
        let spliced_to_client = std::mem::take(&mut buffers.spliced);
        // A failed write of the second flow may have made the client readable for the first.
        let more_up = more_up || self.to_upstream.can_move(client, &self.upstream);
        // Once a side was reset, only its own bytes are worth another turn.
        let more = match (client.is_reset(), self.upstream.is_reset()) {
            (true, _) => more_up,
            (false, true) => more_down,
            (false, false) => more_up || more_down,
        };
        // Once both flows are over, bytes that are still readable have no receiver.
        let is_over = !self.to_upstream.is_open() && !self.to_client.is_open();
        let next = if more && !is_over { Next::Again } else { self.next(client) };
        let delivered = self.delivered();
        let is_in_vain = next == Next::Wait && delivered == before;
        let is_awaited = self.await_events(client, is_in_vain, registration);
        let next = if next == Next::Wait && !is_awaited { Next::Again } else { next };
        Progress {
            to_upstream: delivered.0 - before.0,
            to_client: delivered.1 - before.1,
            spliced_to_upstream,
            spliced_to_client,
            next,
        }
    }

    /// Sets the epoll interest to the events that the relay waits for. It drops interest that woke it in vain: a source
    /// that goes on sending while its sink is full would do so at every segment.
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
        // A side that was reset takes no more bytes. Its own earlier bytes are delivered first, and then the other side
        // is reset.
        for (side, aborted, its_flow, other) in [
            (Side::Client, client, &self.to_upstream, &self.upstream),
            (Side::Upstream, &self.upstream, &self.to_client, client),
        ] {
            if aborted.is_reset() {
                let unacknowledged = if other.is_reset() { 0 } else { unacknowledged(other) };
                let is_settled = !its_flow.is_open() && unacknowledged == 0;
                let aborted = Some(side);
                return if is_settled {
                    Next::Reset(side)
                } else {
                    Next::Settle { unacknowledged, aborted }
                };
            }
        }
        if self.to_upstream.is_open() || self.to_client.is_open() {
            return Next::Wait;
        }
        // A broken flow may have left bytes unread, and closing a socket with unread bytes resets it. So its source
        // first has to acknowledge all that was sent to it.
        for (flow, source) in [(&self.to_upstream, client), (&self.to_client, &self.upstream)] {
            if flow.stage == Stage::Broken {
                let unacknowledged = unacknowledged(source);
                if unacknowledged > 0 {
                    return Next::Settle { unacknowledged, aborted: None };
                }
            }
        }
        Next::Close
    }
}

impl Flow {
    fn new() -> Self {
        Self {
            stage: Stage::Open,
            buffered: Buffered::Nothing,
            bulk: false,
            postgres_idle: false,
            delivered: 0,
        }
    }

    fn is_open(&self) -> bool {
        self.stage == Stage::Open
    }

    /// Returns true if neither bytes nor an end nor a reset is known to be in flight from `source`.
    fn is_at_rest(&self, source: &Endpoint) -> bool {
        let is_over = !self.is_open() && self.stage != Stage::Cut;
        !source.is_reset() && (is_over || !self.has_buffered() && !source.is_read_closed())
    }

    /// Returns true if bytes wait for the sink.
    fn has_buffered(&self) -> bool {
        !matches!(self.buffered, Buffered::Nothing)
    }

    /// Returns true if pumping would make progress.
    fn can_move(&self, source: &Endpoint, sink: &Endpoint) -> bool {
        let unblocked = match self.buffered {
            Buffered::Nothing => source.is_readable(),
            Buffered::Bytes(..) | Buffered::Header(..) | Buffered::Pipe(_) => sink.is_writable(),
        };
        self.is_open() && unblocked
    }

    /// Drains, fills and drains again. Returns true when its share of the turn is used up or a broken flow has more to
    /// discard. Returns false when it has to wait for a socket or the flow is over.
    ///
    /// `is_last` says that the other flow has ended. Then the close that follows passes on the end of this one, and
    /// saves a `shutdown`.
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

    /// Reads and discards bytes of a broken flow. A source that is blocked in writing them would never come to read the
    /// bytes that the other side had sent before it went. Returns true if more may be readable, for which no event
    /// would come.
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

    /// Writes the buffered bytes. Returns true if none is left and the sink may take more.
    fn drain(&mut self, sink: &mut Endpoint, buffers: &mut RelayBuffers) -> bool {
        loop {
            let sent = match &mut self.buffered {
                Buffered::Nothing => return true,
                _ if !sink.is_writable() => return false,
                Buffered::Bytes(bytes, written) | Buffered::Header(bytes, written) => {
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

    /// Counts `bytes` of the buffered ones as delivered, and releases an emptied buffer at once.
    fn written(&mut self, bytes: usize, buffers: &mut RelayBuffers) {
        if !matches!(self.buffered, Buffered::Header(..)) {
            self.delivered += bytes as u64;
        }
        let left = match &mut self.buffered {
            Buffered::Nothing => 0,
            Buffered::Bytes(all, written) | Buffered::Header(all, written) => {
                *written += bytes;
                all.len() - *written
            }
            Buffered::Pipe(pipe) => {
                buffers.spliced += bytes as u64;
                pipe.len()
            }
        };
        if left == 0
            && let Buffered::Pipe(pipe) = std::mem::replace(&mut self.buffered, Buffered::Nothing)
        {
            buffers.pipes.put(pipe);
        }
    }

    /// Takes bytes from the source. Called only while nothing is buffered.
    fn fill(
        &mut self,
        source: &mut Endpoint,
        sink: &mut Endpoint,
        buffers: &mut RelayBuffers,
    ) -> Received {
        if self.bulk
            && !buffers.copies_all
            && source.is_worth_splicing_to(sink)
            && let Some(pipe) = buffers.pipes.take()
        {
            let received = self.fill_pipe(pipe, source, buffers);
            // A splice stops before an urgent byte and returns the result that is due behind it. Only a read finds the
            // true end.
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
            let bytes = buffers.scratch.get(..bytes).unwrap_or_default();
            self.postgres_idle = bytes.ends_with(POSTGRES_IDLE);
            self.pass_on(bytes, sink);
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
                (self.bulk, self.postgres_idle) = (bytes >= BULK_BYTES_MIN, false);
                self.buffered = Buffered::Pipe(pipe);
            }
            _ => buffers.pipes.put(pipe),
        }
        received
    }

    /// Writes `bytes` and buffers the part that does not fit. Called only while nothing is buffered.
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

    /// Drops the buffered bytes, as the sink is gone. A pipe with bytes in it is destroyed.
    fn broken(&mut self) {
        self.stage = Stage::Broken;
        self.buffered = Buffered::Nothing;
    }
}

/// Returns the memory of bytes that the peer's kernel has not acknowledged: a reset would discard them. Where the
/// kernel does not tell, it returns a maximum rather than 0, and the connection waits as for a peer that takes nothing.
fn unacknowledged(endpoint: &Endpoint) -> u32 {
    endpoint.socket().unacknowledged().unwrap_or(u32::MAX)
}

#[cfg(test)]
mod simulation;

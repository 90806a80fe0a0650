//! Rejection of clients that a pause does not hold: newcomers, clients whose attempt has failed since, and clients whose
//! `hold.timeout` is over. The answer goes inside TLS if the client speaks TLS, and it arrives before the close. A quiet
//! connection lingers here, too, after its close in good order.
//!
//! `Sniffing → (AwaitingHandshake → Tls →) Lingering`. Nothing is read until the first bytes show the client's
//! protocol, or its time is up. So a resume can still serve a silent client, or a client that waits for a handshake.
//! From the answer on, further bytes of the client are read and discarded for a while: closing with bytes unread would
//! reset the connection and lose the answer.

pub(crate) mod policy;
pub(crate) mod protocol;
pub(crate) mod tls;
mod words;

use std::{
    io::{self, Read, Write},
    sync::Arc,
};

use rustls::ServerConnection;

use crate::{
    admission::semaphore::Permit,
    connection::{
        deadline::Deadline,
        endpoint::{Endpoint, Received, Sent},
    },
};
use policy::RejectPolicy;
use policy::RejectResponse;
use protocol::OPENING_BYTES_MAX;
use protocol::Protocol;
use protocol::detect;
pub(super) use words::RejectWords;

/// Answer to a TLS client where no certificate is configured or no handshake permit is free: a fatal
/// `handshake_failure` alert (RFC 8446, 6.2).
const TLS_REFUSAL: [u8; 7] = [0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 0x28];

/// Empty answer: only the FIN is sent.
const NOTHING: [u8; 0] = [];

/// Bytes that a TLS client may send before its first request: far more than a handshake with certificates.
const UNASKED_BYTES_MAX: usize = 256 * 1024;

/// Bytes that a rejected client may still send before it is closed all the same.
const DISCARDED_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Bytes that are discarded in one turn.
const TURN_BYTES_MAX: usize = 256 * 1024;

/// A client that is being rejected.
#[derive(Debug)]
pub(crate) enum Reject {
    /// Waiting for the first bytes that show the protocol. Nothing was read.
    Sniffing,
    /// Waiting for a TLS handshake permit. Nothing was read.
    AwaitingHandshake,
    /// In a TLS session, before the first request.
    Tls {
        /// Server side of the session.
        session: Box<ServerConnection>,
        /// Number of bytes that the client has sent.
        received: usize,
        /// Permit that counts it among the handshakes.
        permit: Permit,
    },
    /// Sending the answer and the end of the stream, and discarding the client's bytes.
    Lingering {
        /// Remainder of the answer; `None` once our stream has ended.
        rest: Option<Rest>,
        /// Number of bytes discarded so far.
        discarded: usize,
    },
}

/// An answer, and the number of its bytes already written.
#[derive(Debug)]
pub(crate) struct Rest {
    bytes: Arc<[u8]>,
    written: usize,
    /// Bounds the number of encrypted answers, each of which is a copy for one client.
    _permit: Option<Permit>,
}

/// Next step for a client that is being rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Wait for an event; keep the deadline.
    Wait,
    /// Start this deadline, drive once, and wait for an event.
    WaitIn(Deadline),
    /// Drive again in the next turn.
    Again,
    /// The answer is on its way: linger from now on.
    Answered,
    /// The client is rejected by a reset: close.
    Reset,
    /// The rejection is over: close.
    Close,
}

impl Reject {
    /// Begins to reject a client that nothing was read from.
    pub(crate) fn new(client: &mut Endpoint, reject_policy: &RejectPolicy) -> (Self, Next) {
        match reject_policy.answer() {
            RejectResponse::Http(_) | RejectResponse::File(_) => {
                (Self::Sniffing, Next::WaitIn(Deadline::Sniffing))
            }
            RejectResponse::Close => Self::close_gracefully(client),
            RejectResponse::Reset => (Self::Sniffing, Next::Reset),
        }
    }

    /// Ends the stream to a client without an answer, and lingers.
    pub(crate) fn close_gracefully(client: &mut Endpoint) -> (Self, Next) {
        let mut reject = Self::Sniffing;
        let next = reject.answer(client, NOTHING);
        (reject, next)
    }

    /// Lingers behind the end of the stream, which the client has already.
    pub(crate) fn behind_end() -> Self {
        Self::Lingering { rest: None, discarded: 0 }
    }

    /// Returns true if the answer is on its way, or there.
    pub(crate) fn is_lingering(&self) -> bool {
        matches!(self, Self::Lingering { .. })
    }

    /// Advances as far as the client's bytes allow. A TLS step decrements `steps`, and none is taken at 0.
    pub(crate) fn drive(
        &mut self,
        client: &mut Endpoint,
        reject_policy: &RejectPolicy,
        scratch: &mut [u8],
        steps: &mut usize,
    ) -> Next {
        match self {
            Self::Sniffing => self.sniff(client, reject_policy, false),
            Self::AwaitingHandshake if client.is_reset() => Next::Close,
            Self::AwaitingHandshake => Next::Wait,
            Self::Tls { .. } => self.shake_hands(client, reject_policy, steps),
            Self::Lingering { rest, discarded } => linger(rest, discarded, client, scratch),
        }
    }

    /// Begins the handshake of a client that waited for `permit`.
    pub(crate) fn begin_handshake(
        &mut self,
        client: &mut Endpoint,
        permit: Permit,
        reject_policy: &RejectPolicy,
    ) -> Next {
        match reject_policy.tls().cloned().map(ServerConnection::new) {
            Some(Ok(session)) => {
                *self = Self::Tls { session: session.into(), received: 0, permit };
                Next::WaitIn(Deadline::Handshaking)
            }
            Some(Err(_)) => Next::Close,
            // Another process, whose certificate is no longer configured, has let it wait.
            None => self.answer(client, TLS_REFUSAL),
        }
    }

    /// Reacts to the end of the client's present deadline.
    pub(crate) fn expire(&mut self, client: &mut Endpoint, reject_policy: &RejectPolicy) -> Next {
        match self {
            Self::Sniffing => self.sniff(client, reject_policy, true),
            Self::AwaitingHandshake => self.answer(client, TLS_REFUSAL),
            Self::Tls { session, .. } if !session.is_handshaking() => {
                self.answer_in_tls(client, &reject_policy.answer_to(Protocol::Other))
            }
            Self::Tls { .. } | Self::Lingering { .. } => Next::Close,
        }
    }

    fn sniff(
        &mut self,
        client: &mut Endpoint,
        reject_policy: &RejectPolicy,
        is_time_up: bool,
    ) -> Next {
        let mut first = [0; OPENING_BYTES_MAX];
        let received =
            if client.is_readable() { client.peek(&mut first) } else { Received::Nothing };
        let protocol = match received {
            Received::Bytes(bytes) => detect(first.get(..bytes).unwrap_or_default()),
            Received::End | Received::Nothing => None,
            Received::Reset | Received::Unsupported => return Next::Close,
        };
        match protocol {
            Some(Protocol::Tls) if reject_policy.tls().is_some() => {
                *self = Self::AwaitingHandshake;
                Next::WaitIn(Deadline::AwaitingHandshake)
            }
            Some(Protocol::Tls) => self.answer(client, TLS_REFUSAL),
            // A client that has ended its stream sends no more bytes, and may wait for an answer.
            None if !is_time_up && !client.is_read_closed() => Next::Wait,
            None => self.answer(client, reject_policy.answer_to(Protocol::Other)),
            Some(protocol) => self.answer(client, reject_policy.answer_to(protocol)),
        }
    }

    /// Takes one step of the TLS session: towards the end of the handshake, then towards the client's request.
    fn shake_hands(
        &mut self,
        client: &mut Endpoint,
        reject_policy: &RejectPolicy,
        steps: &mut usize,
    ) -> Next {
        let Self::Tls { session, received, .. } = self else { return Next::Close };
        let was_handshaking = session.is_handshaking();
        if client.is_readable() {
            if *steps == 0 {
                return Next::Again;
            }
            *steps -= 1;
            match session.read_tls(&mut Raw(client)) {
                // Records without content must not keep the session reading for ever.
                Ok(bytes) if bytes == 0 || *received + bytes > UNASKED_BYTES_MAX => {
                    return Next::Close;
                }
                Ok(bytes) => *received += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Next::Close,
            }
            match session.process_new_packets() {
                Ok(state) if state.plaintext_bytes_to_read() > 0 || state.peer_has_closed() => {
                    let mut first = [0; OPENING_BYTES_MAX];
                    let bytes = session.reader().read(&mut first).unwrap_or_default();
                    let protocol = detect(first.get(..bytes).unwrap_or_default());
                    let answer = reject_policy.answer_to(protocol.unwrap_or(Protocol::Other));
                    return self.answer_in_tls(client, &answer);
                }
                Ok(_) => {}
                Err(error) => {
                    log::debug!("TLS handshake with a client to reject failed: {error}");
                    // The session has only its alert left to write.
                    return self.hand_over(client);
                }
            }
        }
        while session.wants_write() && client.is_writable() {
            match session.write_tls(&mut Raw(client)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Next::Close,
            }
        }
        match (was_handshaking, session.is_handshaking()) {
            // A client that stays silent after the handshake is answered when this deadline ends.
            (true, false) => Next::WaitIn(Deadline::AwaitingRequest),
            _ if client.is_readable() => Next::Again,
            _ => Next::Wait,
        }
    }

    /// Sends `bytes` and `close_notify` inside the TLS session.
    fn answer_in_tls(&mut self, client: &mut Endpoint, bytes: &[u8]) -> Next {
        if let Self::Tls { session, .. } = self {
            // The answer is bounded by its own limit.
            session.set_buffer_limit(None);
            // rustls buffers without a limit, so this cannot fail.
            session.writer().write_all(bytes).ok();
            session.send_close_notify();
        }
        self.hand_over(client)
    }

    /// Drops the TLS session and sends its pending output, as no more input matters.
    fn hand_over(&mut self, client: &mut Endpoint) -> Next {
        let Self::Tls { mut session, permit, .. } = std::mem::replace(self, Self::Sniffing) else {
            return Next::Close;
        };
        let mut bytes = Vec::new();
        // Writing to a Vec cannot fail.
        while session.wants_write() && session.write_tls(&mut bytes).is_ok() {}
        self.finish(client, Rest { bytes: bytes.into(), written: 0, _permit: Some(permit) })
    }

    fn answer(&mut self, client: &mut Endpoint, bytes: impl Into<Arc<[u8]>>) -> Next {
        self.finish(client, Rest { bytes: bytes.into(), written: 0, _permit: None })
    }

    /// Begins to write the answer and to linger.
    fn finish(&mut self, client: &mut Endpoint, answer: Rest) -> Next {
        let mut rest = Some(answer);
        let sent = write_on(&mut rest, client);
        *self = Self::Lingering { rest, discarded: 0 };
        if sent == Sent::Broken { Next::Close } else { Next::Answered }
    }
}

/// Writes as much of the answer as fits, and ends our stream behind its last byte.
fn write_on(rest: &mut Option<Rest>, client: &mut Endpoint) -> Sent {
    while let Some(Rest { bytes, written, .. }) = rest {
        match bytes.get(*written..) {
            Some(left @ [_, ..]) if client.is_writable() => match client.send(left) {
                Sent::Bytes(bytes) => *written += bytes,
                other => return other,
            },
            Some([_, ..]) => return Sent::Nothing,
            _ => {
                *rest = None;
                return client.shut_down_write();
            }
        }
    }
    Sent::Nothing
}

/// Continues to write the answer, and discards the client's bytes meanwhile. A client that sends all before it reads
/// would otherwise wait for us while we wait for it.
fn linger(
    rest: &mut Option<Rest>,
    discarded: &mut usize,
    client: &mut Endpoint,
    scratch: &mut [u8],
) -> Next {
    if write_on(rest, client) == Sent::Broken {
        return Next::Close;
    }
    let turn_ends = *discarded + TURN_BYTES_MAX;
    while client.is_readable() {
        match client.recv(scratch) {
            Received::Bytes(bytes) => *discarded += bytes,
            Received::Nothing => break,
            // The client may have ended its stream and still read.
            Received::End if rest.is_some() => break,
            Received::End | Received::Reset | Received::Unsupported => return Next::Close,
        }
        if *discarded > DISCARDED_BYTES_MAX {
            return Next::Close;
        }
        if *discarded > turn_ends {
            return Next::Again;
        }
    }
    Next::Wait
}

/// Adapter through which rustls reads and writes the client's socket.
struct Raw<'a>(&'a mut Endpoint);

impl Read for Raw<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.recv(buffer) {
            Received::Bytes(bytes) => Ok(bytes),
            Received::End => Ok(0),
            Received::Nothing => Err(io::ErrorKind::WouldBlock.into()),
            Received::Reset | Received::Unsupported => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.send(bytes) {
            Sent::Bytes(bytes) => Ok(bytes),
            Sent::Nothing => Err(io::ErrorKind::WouldBlock.into()),
            Sent::Broken => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;

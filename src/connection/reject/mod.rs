//! Rejecting: a client that comes while the proxy is paused gets its answer, in TLS if it speaks TLS, and gets it for sure.
//!
//! `Sniffing → (AwaitingHandshake → Tls →) Lingering`. Nothing is read until the client has said enough to know what it speaks, or
//! its time is up: a silent client can still be served when the proxy resumes, and so can one that waits for a handshake.
//! With the answer, and behind it, what the client still sends is read and discarded for a while: closing with bytes
//! unread would reset the connection, and the answer would be lost on its way.

pub(crate) mod policy;
pub(crate) mod protocol;
pub(crate) mod tls;

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

/// What a TLS client gets where no certificate is configured, or no handshake is free: a fatal `handshake_failure` alert
/// (RFC 8446, 6.2).
const TLS_REFUSAL: [u8; 7] = [0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 0x28];

/// The answer that is none: but for the end of the stream.
const NOTHING: [u8; 0] = [];

/// What a TLS client may send before it has asked for something: far more than a handshake with certificates.
const UNASKED_BYTES_MAX: usize = 256 * 1024;

/// What a rejected client may still send before it is closed all the same.
const DISCARDED_BYTES_MAX: usize = 256 * 1024 * 1024;

/// What is discarded in one turn.
const TURN_BYTES_MAX: usize = 256 * 1024;

/// A client that is being rejected.
#[derive(Debug)]
pub(crate) enum Reject {
    /// It has not said enough to know what it speaks. Nothing of it was read.
    Sniffing,
    /// It speaks TLS and waits until a handshake is free. Nothing of it was read.
    AwaitingHandshake,
    /// It speaks TLS, and has not asked for anything yet.
    Tls {
        /// The server's end.
        session: Box<ServerConnection>,
        /// How many bytes it has sent.
        received: usize,
        /// Its place among the handshakes.
        permit: Permit,
    },
    /// It gets its answer and the end of our stream; what it still sends is discarded.
    Lingering {
        /// What is still to be written; nothing once our stream has ended.
        rest: Option<Rest>,
        /// How many bytes have been discarded.
        discarded: usize,
    },
}

/// What is still to be written of an answer.
#[derive(Debug)]
pub(crate) struct Rest {
    bytes: Arc<[u8]>,
    written: usize,
    /// What is encrypted is a copy for this client alone: their number stays bounded.
    _permit: Option<Permit>,
}

/// What comes next for a client that is being rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// An event.
    Wait,
    /// What is there already or an event, until the deadline of this queue.
    WaitIn(Deadline),
    /// Another turn.
    Again,
    /// It gets its answer, and lingers from now on.
    Answered,
    /// It is rejected by a reset: close.
    Reset,
    /// It is done: close.
    Close,
}

impl Reject {
    /// A client that was just accepted.
    pub(crate) fn new(client: &mut Endpoint, reject_policy: &RejectPolicy) -> (Self, Next) {
        match reject_policy.answer() {
            RejectResponse::Http(_) | RejectResponse::File(_) => {
                (Self::Sniffing, Next::WaitIn(Deadline::Sniffing))
            }
            RejectResponse::Close => Self::close_gracefully(client),
            RejectResponse::Reset => (Self::Sniffing, Next::Reset),
        }
    }

    /// A client that gets nothing but the end of our stream.
    pub(crate) fn close_gracefully(client: &mut Endpoint) -> (Self, Next) {
        let mut reject = Self::Sniffing;
        let next = reject.answer(client, NOTHING);
        (reject, next)
    }

    /// Goes as far as the client's bytes allow, in TLS as far as `steps` does: each step counts it down.
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

    /// A handshake is free for a client that knocks.
    pub(crate) fn begin_handshake(&mut self, permit: Permit, reject_policy: &RejectPolicy) -> Next {
        match reject_policy.tls().cloned().map(ServerConnection::new) {
            Some(Ok(session)) => {
                *self = Self::Tls { session: session.into(), received: 0, permit };
                Next::WaitIn(Deadline::Handshaking)
            }
            Some(Err(_)) | None => Next::Close,
        }
    }

    /// The time of the client's present queue is up.
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
        let opening = match received {
            Received::Bytes(bytes) => detect(first.get(..bytes).unwrap_or_default()),
            Received::End | Received::Nothing => None,
            Received::Reset | Received::Unsupported => return Next::Close,
        };
        match opening {
            Some(Protocol::Tls) if reject_policy.tls().is_some() => {
                *self = Self::AwaitingHandshake;
                Next::WaitIn(Deadline::AwaitingHandshake)
            }
            Some(Protocol::Tls) => self.answer(client, TLS_REFUSAL),
            // One that has ended its stream says no more, and may wait for an answer.
            None if !is_time_up && !client.is_read_closed() => Next::Wait,
            None => self.answer(client, reject_policy.answer_to(Protocol::Other)),
            Some(opening) => self.answer(client, reject_policy.answer_to(opening)),
        }
    }

    /// Takes one step of the TLS connection: towards the end of the handshake, then to the client's request.
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
                // Records without content are no reason to go on reading for ever.
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
                    let opening = detect(first.get(..bytes).unwrap_or_default());
                    let answer = reject_policy.answer_to(opening.unwrap_or(Protocol::Other));
                    return self.answer_in_tls(client, &answer);
                }
                Ok(_) => {}
                Err(error) => {
                    log::debug!("TLS handshake with a client to reject failed: {error}");
                    // What is left to write is the alert.
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
            // A client that then says nothing is answered as any silent one.
            (true, false) => Next::WaitIn(Deadline::AwaitingRequest),
            _ if client.is_readable() => Next::Again,
            _ => Next::Wait,
        }
    }

    /// Puts `bytes` and the end of our stream inside the TLS connection.
    fn answer_in_tls(&mut self, client: &mut Endpoint, bytes: &[u8]) -> Next {
        if let Self::Tls { session, .. } = self {
            // The answer has a bound of its own.
            session.set_buffer_limit(None);
            // rustls buffers it; there is nothing to fail.
            session.writer().write_all(bytes).ok();
            session.send_close_notify();
        }
        self.hand_over(client)
    }

    /// Takes out of the TLS connection what it has to say, as it has nothing to hear any more.
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

/// Writes what fits of the answer, and behind its last byte ends our stream.
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

/// Writes on, and discards what comes: a client that sends before it reads must not wait for us, as we do for it.
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
            // It may have ended its stream and still read.
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

/// The client's raw bytes, for rustls.
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

//! Rejecting: a client that comes while the proxy is paused gets a 503, in TLS if it speaks TLS, and gets it for sure.
//!
//! `Sniffing → (Tls →) Lingering`. Nothing is read until the client has spoken or its time is up: a silent client can
//! still be served when the proxy resumes. After the answer, what the client still sends is read and discarded for a
//! while: closing with bytes unread would reset the connection, and the answer would be lost on its way.

use std::{
    fmt::Write as _,
    io::{self, Read, Write},
    sync::Arc,
    time::Duration,
};

use rustls::{ServerConfig, ServerConnection};

use crate::{
    endpoint::{Endpoint, Received, Sent},
    queues::Queue,
};

/// The first byte of a TLS connection: a handshake record (RFC 8446, 5.1).
const TLS_HANDSHAKE: u8 = 0x16;

/// What a TLS client gets where no certificate is configured: a fatal `handshake_failure` alert (RFC 8446, 6.2).
const TLS_REFUSAL: [u8; 7] = [0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 0x28];

/// What a TLS client may send before it has asked for something: far more than a handshake with certificates.
const UNASKED_BYTES_MAX: usize = 256 * 1024;

/// What a rejected client may still send before it is closed all the same.
const DISCARDED_BYTES_MAX: usize = 256 * 1024 * 1024;

/// What is discarded in one turn.
const TURN_BYTES_MAX: usize = 256 * 1024;

/// How rejected clients are answered.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// The whole answer.
    http: Box<[u8]>,
    tls: Option<Arc<ServerConfig>>,
}

/// A client that is being rejected.
#[derive(Debug)]
pub(crate) enum Reject {
    /// It has not said anything.
    Sniffing,
    /// It speaks TLS.
    Tls {
        /// The server's end.
        session: Box<ServerConnection>,
        /// Whether it was answered.
        answer: Answer,
        /// How many bytes it has sent without having asked for anything.
        received: usize,
    },
    /// It has its answer and the end of our stream; what it still sends is discarded.
    Lingering {
        /// How many bytes have been.
        discarded: usize,
    },
}

/// Whether the answer inside TLS has been given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// In the handshake, or waiting for the request.
    Pending,
    /// Given; it may still have to be written.
    Given,
}

/// What comes next for a client that is being rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// An event.
    Wait,
    /// An event, until the deadline of this queue.
    WaitIn(Queue),
    /// Another turn.
    Again,
    /// It has its answer, and lingers from now on.
    Answered,
    /// It is done: close.
    Close,
}

impl Refusal {
    /// A 503 that asks to come back after `retry_after`, rounded up to whole seconds; zero asks for nothing.
    pub(crate) fn new(retry_after: Duration, tls: Option<Arc<ServerConfig>>) -> Self {
        let seconds = retry_after.as_secs() + u64::from(retry_after.subsec_nanos() > 0);
        let mut http = String::from("HTTP/1.1 503 Service Unavailable\r\n");
        if seconds > 0 {
            // Writing to a String cannot fail.
            write!(http, "Retry-After: {seconds}\r\n").ok();
        }
        http.push_str("Connection: close\r\nContent-Length: 0\r\n\r\n");
        Self { http: http.into_bytes().into(), tls }
    }

    /// Whether clients that speak TLS get the answer.
    pub(crate) fn has_certificate(&self) -> bool {
        self.tls.is_some()
    }
}

impl Next {
    /// Where nothing but an event is waited for, the deadline of `queue` begins.
    fn or_wait_in(self, queue: Queue) -> Self {
        if self == Self::Wait { Self::WaitIn(queue) } else { self }
    }
}

impl Reject {
    /// Goes as far as the client's bytes allow.
    pub(crate) fn drive(
        &mut self,
        client: &mut Endpoint,
        refusal: &Refusal,
        scratch: &mut [u8],
    ) -> Next {
        match self {
            Self::Sniffing => self.sniff(client, refusal, scratch),
            Self::Tls { .. } => self.shake_hands(client, refusal),
            Self::Lingering { discarded } => linger(discarded, client, scratch),
        }
    }

    /// The time of the client's present queue is up.
    pub(crate) fn expire(&mut self, client: &mut Endpoint, refusal: &Refusal) -> Next {
        match self {
            Self::Sniffing => self.answer(client, &refusal.http),
            Self::Tls { session, answer: answer @ Answer::Pending, .. }
                if !session.is_handshaking() =>
            {
                give(session, answer, refusal);
                self.shake_hands(client, refusal).or_wait_in(Queue::Handshaking)
            }
            Self::Tls { .. } | Self::Lingering { .. } => Next::Close,
        }
    }

    fn sniff(&mut self, client: &mut Endpoint, refusal: &Refusal, scratch: &mut [u8]) -> Next {
        if !client.is_readable() {
            return Next::Wait;
        }
        match client.peek(scratch.get_mut(..1).unwrap_or_default()) {
            Received::Bytes(_) if scratch.first() != Some(&TLS_HANDSHAKE) => {
                self.answer(client, &refusal.http)
            }
            Received::Bytes(_) => match refusal.tls.clone().map(ServerConnection::new) {
                Some(Ok(session)) => {
                    *self =
                        Self::Tls { session: session.into(), answer: Answer::Pending, received: 0 };
                    self.shake_hands(client, refusal).or_wait_in(Queue::Handshaking)
                }
                Some(Err(_)) | None => self.answer(client, &TLS_REFUSAL),
            },
            // It has ended its stream without a word, and may wait for an answer.
            Received::End => self.answer(client, &refusal.http),
            Received::Nothing => Next::Wait,
            Received::Reset | Received::Unsupported => Next::Close,
        }
    }

    /// Writes `bytes`, ends our stream and goes on to linger.
    fn answer(&mut self, client: &mut Endpoint, bytes: &[u8]) -> Next {
        // Nothing was written before, so the send buffer takes it whole, or the client is gone.
        if client.send(bytes) != Sent::Bytes(bytes.len())
            || client.shut_down_write() == Sent::Broken
        {
            return Next::Close;
        }
        self.begin_to_linger()
    }

    fn begin_to_linger(&mut self) -> Next {
        *self = Self::Lingering { discarded: 0 };
        Next::Answered
    }

    /// Moves the TLS connection on: the handshake, then the client's request, then our answer.
    fn shake_hands(&mut self, client: &mut Endpoint, refusal: &Refusal) -> Next {
        let Self::Tls { session, answer, received } = self else { return Next::Close };
        let was_handshaking = session.is_handshaking();
        while *answer == Answer::Pending && client.is_readable() {
            match session.read_tls(&mut Raw(client)) {
                // Records without content are no reason to go on reading for ever.
                Ok(0) => return Next::Close,
                Ok(bytes) if *received + bytes > UNASKED_BYTES_MAX => return Next::Close,
                Ok(bytes) => *received += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Next::Close,
            }
            let asked = match session.process_new_packets() {
                Ok(state) => state.plaintext_bytes_to_read() > 0 || state.peer_has_closed(),
                Err(error) => {
                    log::debug!("TLS handshake with a client to reject failed: {error}");
                    // What is left to write is the alert.
                    *answer = Answer::Given;
                    false
                }
            };
            if asked {
                give(session, answer, refusal);
            }
        }
        while session.wants_write() && client.is_writable() {
            match session.write_tls(&mut Raw(client)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return Next::Close,
            }
        }
        if *answer == Answer::Given && !session.wants_write() {
            return if client.shut_down_write() == Sent::Broken {
                Next::Close
            } else {
                self.begin_to_linger()
            };
        }
        // The handshake is done; a client that then says nothing is answered as any silent one.
        if was_handshaking && !session.is_handshaking() {
            Next::WaitIn(Queue::Asking)
        } else {
            Next::Wait
        }
    }
}

/// Puts the answer and the end of our stream inside the TLS connection.
fn give(session: &mut ServerConnection, answer: &mut Answer, refusal: &Refusal) {
    // rustls buffers it; there is nothing to fail.
    session.writer().write_all(&refusal.http).ok();
    session.send_close_notify();
    *answer = Answer::Given;
}

fn linger(discarded: &mut usize, client: &mut Endpoint, scratch: &mut [u8]) -> Next {
    let turn_ends = *discarded + TURN_BYTES_MAX;
    while client.is_readable() {
        match client.recv(scratch) {
            Received::Bytes(bytes) => *discarded += bytes,
            Received::Nothing => break,
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

//! The channel between giver and taker: messages over a UNIX socket, each with a parcel.
//!
//! A message is one frame: the length of its JSON, the number of its raw bytes and that of its descriptors (32 bits each, little
//! endian), then the JSON, then the raw bytes. The descriptors go with the first byte.
//!
//! A frame with a parcel is acknowledged by one byte, as the kernel bounds the descriptors under way of all processes of a
//! user together (`RLIMIT_NOFILE`). That byte is zero, and no frame begins with a zero, so a process that awaits an
//! acknowledgement recognises a message, such as the reason of a failure.

use std::{
    fmt,
    io::{self, IoSlice, IoSliceMut},
    mem::{self, MaybeUninit},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::{
    cmsg_space,
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
    },
};
use serde::{Serialize, de::DeserializeOwned};

use super::parcel::{Incoming, Outgoing};
use crate::sys::{Descriptor, Lent, now};

/// Largest number of descriptors of a frame; the kernel takes no more at once (`SCM_MAX_FD`).
pub(crate) const DESCRIPTORS_MAX: usize = 253;

const JSON_BYTES_MAX: usize = 16 << 20;
const RAW_BYTES_MAX: usize = 64 << 20;

const HEADER_BYTES: usize = 12;
/// Largest number of bytes of a read. A length that is a lie costs no more memory than this.
const READ_BYTES: usize = 64 << 10;
/// Time that sending may take as long as no deadline is set.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

const ACKNOWLEDGEMENT: u8 = 0;

/// One end of the channel.
#[derive(Debug)]
pub(crate) struct Channel {
    stream: UnixStream,
    /// Deadline of sending.
    deadline: Instant,
    inbox: Inbox,
    /// Number of acknowledgements that are still to come.
    awaited: usize,
    /// Number of messages sent.
    pub(crate) sent: u64,
    /// Set if a part of a frame was sent. Nothing may follow it but its rest.
    is_cut: bool,
}

/// Channel of a giver's threads, each of which sends frames of its own.
#[derive(Debug)]
pub(crate) struct Outbox {
    pub(crate) begin: Instant,
    pub(crate) channel: Arc<Mutex<Channel>>,
}

/// Failure of the channel.
#[derive(Debug)]
pub(crate) enum ChannelError {
    /// The other process has ended or closed its end. All that it had sent whole is read.
    Ended,
    /// The deadline has passed. A frame that has come in part is kept: the next call goes on with it.
    TimedOut,
    /// Descriptors were lost.
    Truncated,
    /// The other process has sent something that no tcpause sends.
    Malformed(String),
    /// A system call failed.
    System(io::Error),
}

/// The frame that is being received.
#[derive(Debug, Default)]
struct Inbox {
    bytes: Vec<u8>,
    descriptors: Vec<Descriptor>,
}

/// First bytes of a frame.
#[derive(Debug, Clone, Copy)]
struct Header {
    json: usize,
    raw: usize,
    descriptors: usize,
}

impl Channel {
    /// Returns the end of a channel.
    pub(crate) fn new(stream: UnixStream) -> Self {
        let deadline = now() + SEND_TIMEOUT;
        Self { stream, deadline, inbox: Inbox::default(), awaited: 0, sent: 0, is_cut: false }
    }

    /// Sets the time until which sending, the acknowledgement included, may take.
    pub(crate) fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    /// Sends a message with its parcel. Waits for the acknowledgement unless the parcel is empty.
    pub(crate) fn send(
        &mut self,
        message: &impl Serialize,
        outgoing: Outgoing<'_>,
    ) -> Result<(), ChannelError> {
        let (descriptors, raw) = outgoing.into_parts();
        let mut json = serde_json::to_vec(message)
            .map_err(|error| ChannelError::System(io::Error::other(error)))?;
        if json.len() % 256 == usize::from(ACKNOWLEDGEMENT) {
            json.push(b' ');
        }
        let header = Header { json: json.len(), raw: raw.len(), descriptors: descriptors.len() };
        let head = header.to_bytes().map_err(ChannelError::System)?;
        self.write([IoSlice::new(&head), IoSlice::new(&json), IoSlice::new(&raw)], &descriptors)?;
        self.sent += 1;
        if header.has_parcel() {
            self.awaited += 1;
            self.await_acknowledgements()?;
        }
        Ok(())
    }

    /// Receives a message with its parcel, of a hand-over that began at `begin`, and acknowledges it.
    pub(crate) fn receive<M: DeserializeOwned>(
        &mut self,
        begin: Instant,
        deadline: Instant,
    ) -> Result<(M, Incoming), ChannelError> {
        let header = loop {
            while self.awaited > 0 && self.inbox.take_acknowledgement() {
                self.awaited -= 1;
            }
            match self.inbox.header()? {
                Some(header) if self.inbox.bytes.len() == header.frame_bytes() => break header,
                Some(header) => {
                    self.read(header.frame_bytes() - self.inbox.bytes.len(), deadline)?;
                }
                None => self.read(HEADER_BYTES - self.inbox.bytes.len(), deadline)?,
            }
        };
        if self.inbox.descriptors.len() != header.descriptors {
            return Err(ChannelError::Truncated);
        }
        if header.has_parcel() {
            self.acknowledge(deadline)?;
        }
        let Inbox { mut bytes, descriptors } = mem::take(&mut self.inbox);
        let raw = bytes.split_off(HEADER_BYTES + header.json);
        let message = serde_json::from_slice(bytes.get(HEADER_BYTES..).unwrap_or_default())
            .map_err(|error| ChannelError::Malformed(error.to_string()))?;
        Ok((message, Incoming::new(begin, descriptors, raw)))
    }

    /// Returns a further descriptor of the socket, for the next program of this process. Nothing may be under way then.
    pub(crate) fn stream(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// Waits until the other process says something, and keeps it for [`Channel::receive`].
    pub(crate) fn await_word(&mut self, deadline: Instant) -> Result<(), ChannelError> {
        self.read(1, deadline)
    }

    /// Waits for the end of the other process, for as long as `span`. It is an error if that one ends or says anything.
    pub(crate) fn await_end(&mut self, span: Duration) -> Result<(), ChannelError> {
        match self.await_word(now() + span) {
            Err(ChannelError::TimedOut) => Ok(()),
            Err(error) => Err(error),
            Ok(()) => Err(ChannelError::Malformed("it speaks out of turn".into())),
        }
    }

    /// Writes a frame.
    fn write(
        &mut self,
        mut parts: [IoSlice<'_>; 3],
        descriptors: &[Lent<'_>],
    ) -> Result<(), ChannelError> {
        if self.is_cut {
            return Err(ChannelError::System(io::Error::other("an earlier message was cut")));
        }
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            // The header has checked that they fit.
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let mut rest = &mut parts[..];
        while !rest.is_empty() {
            let write = || sendmsg(&self.stream, rest, &mut control, flags);
            let bytes = retry(&self.stream, PollFlags::OUT, self.deadline, write)?;
            control.clear();
            IoSlice::advance_slices(&mut rest, bytes);
            self.is_cut = !rest.is_empty();
        }
        Ok(())
    }

    /// Waits for the acknowledgements of all frames so far. A message that comes instead is kept for [`Channel::receive`].
    fn await_acknowledgements(&mut self) -> Result<(), ChannelError> {
        while self.awaited > 0 {
            if self.inbox.bytes.is_empty() {
                self.read(1, self.deadline)?;
            }
            if !self.inbox.take_acknowledgement() {
                let why = "a message has come in place of an acknowledgement";
                return Err(ChannelError::Malformed(why.into()));
            }
            self.awaited -= 1;
        }
        Ok(())
    }

    /// Acknowledges a frame. If the other process has gone, that does not matter: the next read tells.
    fn acknowledge(&self, deadline: Instant) -> Result<(), ChannelError> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let write = || send(&self.stream, &[ACKNOWLEDGEMENT], flags);
        match retry(&self.stream, PollFlags::OUT, deadline, write) {
            Ok(_) | Err(ChannelError::Ended) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Reads at least one of the next `count` bytes into the inbox.
    fn read(&mut self, count: usize, deadline: Instant) -> Result<(), ChannelError> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let read = || self.inbox.read(&self.stream, count, &mut space);
        let (bytes, is_truncated) = retry(&self.stream, PollFlags::IN, deadline, read)?;
        match bytes {
            _ if is_truncated => Err(ChannelError::Truncated),
            0 => Err(ChannelError::Ended),
            _ => Ok(()),
        }
    }
}

impl Inbox {
    /// Reads some of the next `count` bytes, and the descriptors that come with them, for which there is `space`. Returns the
    /// number of bytes, and whether descriptors were lost.
    fn read(
        &mut self,
        stream: &UnixStream,
        count: usize,
        space: &mut [MaybeUninit<u8>],
    ) -> Result<(usize, bool), Errno> {
        let old = self.bytes.len();
        self.bytes.resize(old + count.min(READ_BYTES), 0);
        let mut into = [IoSliceMut::new(self.bytes.get_mut(old..).unwrap_or_default())];
        let mut control = RecvAncillaryBuffer::new(space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let result = recvmsg(stream, &mut into, &mut control, flags);
        self.bytes.truncate(old + result.as_ref().map_or(0, |read| read.bytes));
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        let is_over = self.descriptors.len() > DESCRIPTORS_MAX;
        result.map(|read| (read.bytes, is_over || read.flags.contains(ReturnFlags::CTRUNC)))
    }

    /// Returns the header of the frame once it has come.
    fn header(&self) -> Result<Option<Header>, ChannelError> {
        self.bytes.first_chunk().map(Header::parse).transpose()
    }

    /// Takes an acknowledgement, which comes between two frames. Returns false if none has come.
    fn take_acknowledgement(&mut self) -> bool {
        let has_come = self.bytes.first() == Some(&ACKNOWLEDGEMENT);
        if has_come {
            self.bytes.remove(0);
        }
        has_come
    }
}

impl Header {
    /// Reads a header. Refuses what exceeds a bound, so that nothing is allocated for it.
    fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, ChannelError> {
        let (numbers, _) = bytes.as_chunks::<4>();
        let number = |index: usize| {
            numbers.get(index).map_or(usize::MAX, |bytes| u32::from_le_bytes(*bytes) as usize)
        };
        let header = Self { json: number(0), raw: number(1), descriptors: number(2) };
        header.check().map_err(ChannelError::Malformed)?;
        if bytes.first() == Some(&ACKNOWLEDGEMENT) {
            return Err(ChannelError::Malformed("it has acknowledged nothing".into()));
        }
        Ok(header)
    }

    /// Returns its bytes, or an error if the frame exceeds a bound.
    fn to_bytes(self) -> io::Result<[u8; HEADER_BYTES]> {
        self.check().map_err(|why| io::Error::new(io::ErrorKind::InvalidInput, why))?;
        let mut bytes = [0; HEADER_BYTES];
        for (into, number) in bytes.chunks_exact_mut(4).zip([self.json, self.raw, self.descriptors])
        {
            into.copy_from_slice(&u32::try_from(number).map_err(io::Error::other)?.to_le_bytes());
        }
        Ok(bytes)
    }

    /// Returns an error if a number exceeds its bound.
    fn check(self) -> Result<(), String> {
        for (name, number, max) in [
            ("bytes of JSON", self.json, JSON_BYTES_MAX),
            ("raw bytes", self.raw, RAW_BYTES_MAX),
            ("descriptors", self.descriptors, DESCRIPTORS_MAX),
        ] {
            if number > max {
                return Err(format!("a message has {number} {name}, and {max} are the most"));
            }
        }
        Ok(())
    }

    /// Returns the number of bytes of the frame.
    fn frame_bytes(self) -> usize {
        HEADER_BYTES + self.json + self.raw
    }

    /// Returns true if the frame has a parcel, which is acknowledged.
    fn has_parcel(self) -> bool {
        self.raw > 0 || self.descriptors > 0
    }
}

impl Outbox {
    /// Returns an empty parcel.
    pub(crate) fn parcel<'a>(&self) -> Outgoing<'a> {
        Outgoing::new(self.begin)
    }

    /// Sends a message with its parcel, while other threads wait.
    pub(crate) fn send(
        &self,
        message: &impl Serialize,
        outgoing: Outgoing<'_>,
    ) -> Result<(), ChannelError> {
        // The channel itself knows if a panic has cut a frame.
        self.channel.lock().unwrap_or_else(PoisonError::into_inner).send(message, outgoing)
    }
}

impl fmt::Display for ChannelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended => f.write_str("the other process has closed the channel"),
            Self::TimedOut => f.write_str("the other process did not answer in time"),
            Self::Truncated => f.write_str(
                "descriptors were lost on their way: a higher limit of open files may help",
            ),
            Self::Malformed(why) => write!(f, "the other process broke the protocol: {why}"),
            Self::System(error) if Errno::from_io_error(error) == Some(Errno::TOOMANYREFS) => f.write_str(
                "processes of this user have too many descriptors under way: try again, or raise the limit of open files",
            ),
            Self::System(error) => write!(f, "the channel failed: {error}"),
        }
    }
}

impl std::error::Error for ChannelError {}

impl From<ChannelError> for io::Error {
    fn from(error: ChannelError) -> Self {
        let kind = match &error {
            ChannelError::Ended => io::ErrorKind::BrokenPipe,
            ChannelError::TimedOut => io::ErrorKind::TimedOut,
            ChannelError::Truncated | ChannelError::Malformed(_) => io::ErrorKind::InvalidData,
            ChannelError::System(error) => error.kind(),
        };
        Self::new(kind, error.to_string())
    }
}

/// Repeats `step` while it would block, until the deadline. What needs no waiting is done even after it.
fn retry<T>(
    stream: &UnixStream,
    event: PollFlags,
    deadline: Instant,
    mut step: impl FnMut() -> Result<T, Errno>,
) -> Result<T, ChannelError> {
    loop {
        match step() {
            Err(Errno::AGAIN) => {}
            Err(Errno::INTR) => continue,
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(ChannelError::Ended),
            result => return result.map_err(ChannelError::from),
        }
        let left = deadline.saturating_duration_since(now());
        if left.is_zero() {
            return Err(ChannelError::TimedOut);
        }
        let left = Timespec::try_from(left).map_err(|_| ChannelError::from(Errno::INVAL))?;
        match poll(&mut [PollFd::new(stream, event)], Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

impl From<Errno> for ChannelError {
    fn from(error: Errno) -> Self {
        Self::System(error.into())
    }
}

#[cfg(test)]
mod tests;

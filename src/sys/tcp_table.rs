//! The TCP connections of a local port, from the kernel's table: `sock_diag(7)` lists them, and resets one.
//!
//! The kernel picks the rows by port and state, so a table full of others costs its walk only. A socket may bear a mark:
//! a value in a socket storage of BPF, which the kernel shows to a holder of `CAP_BPF`.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, BorrowedFd},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, recv},
};

use super::sock_diag::{HEADER_BYTES, Id, REQUEST, message, question_body, send};

/// `TCPDIAG_GETSOCK`: the type of a list, and of its rows. Its successor walks through the table once for each family.
const LIST: u16 = 18;
/// `SOCK_DESTROY`: the type of a request to reset a connection.
const DESTROY: u16 = 21;
/// `NLM_F_ACK`: success is answered too.
const ACKNOWLEDGE: u16 = 4;
/// `NLM_F_DUMP`.
const DUMP: u16 = 0x300;
/// `NLM_F_DUMP_INTR`: the table has changed so that the list may be wrong.
const CHANGED: u16 = 0x10;
/// `NLMSG_ERROR`, with the code 0 if it is an acknowledgement.
const ERROR: u16 = 2;
/// `NLMSG_DONE`.
const DONE: u16 = 3;
/// Length of `inet_diag_msg`. Attributes follow.
const ROW_BYTES: usize = 72;
/// `NLA_TYPE_MASK`: bits of an attribute's type without its flags.
const ATTRIBUTE_TYPE: u16 = 0x3fff;
/// `INET_DIAG_REQ_SK_BPF_STORAGES` of a question, and in it `SK_DIAG_BPF_STORAGE_REQ_MAP_FD`.
const WANTED_STORAGES: u16 = 2;
const WANTED_MAP: u16 = 1;
/// `INET_DIAG_SK_BPF_STORAGES` of an answer, and in it `SK_DIAG_BPF_STORAGE`.
const STORAGES: u16 = 20;
const STORAGE: u16 = 1;
/// The kernel's messages have at most that many bytes, unless a single row is longer.
const BUFFER_BYTES: usize = 32 * 1024;
/// A list of that many rows, or more, may lack one: the kernel stops for a while within a bucket of its table and counts from
/// the bucket's begin when it goes on, and meanwhile an earlier row may have gone. With fewer it never stops (`SKARR_SZ`).
pub(crate) const SURE_BELOW: usize = 16;
/// Number of lists that may be in vain, each as the table changed or as the buffer was too small.
const ATTEMPTS: usize = 4;

/// State of a connection that is in use, with the kernel's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Established = 1,
    /// The handshake lacks the client's ACK.
    SynRecv = 3,
    FinWait1 = 4,
    FinWait2 = 5,
    CloseWait = 8,
    LastAck = 9,
    /// A listener, which is no connection.
    Listen = 10,
    Closing = 11,
}

impl State {
    const CONNECTED: [Self; 7] = [
        Self::Established,
        Self::SynRecv,
        Self::FinWait1,
        Self::FinWait2,
        Self::CloseWait,
        Self::LastAck,
        Self::Closing,
    ];
}

/// A connection, or a handshake that is to become one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) id: Id,
    pub(crate) is_ipv6: bool,
    pub(crate) state: State,
    /// Repeats of what has not been acknowledged: for a handshake, of its SYN-ACK.
    pub(crate) repeats: u8,
    /// 0 for a handshake, for a connection that waits to be accepted, and for one that its process has closed.
    pub(crate) inode: u32,
    pub(crate) is_marked: bool,
}

impl Row {
    /// Returns its address on this host: that of IPv4 also if its listener is one for both families.
    pub(crate) fn local(&self) -> SocketAddr {
        self.address(0, 4)
    }

    /// Returns the address of its client, in the same form.
    #[cfg(test)]
    pub(crate) fn peer(&self) -> SocketAddr {
        self.address(2, 20)
    }

    /// Returns the kernel's number for it, which no other has. A connection has that of its handshake.
    pub(crate) fn cookie(&self) -> u64 {
        u64::from_ne_bytes(self.id.last_chunk().copied().unwrap_or_default())
    }

    fn address(&self, port: usize, ip: usize) -> SocketAddr {
        let port = u16::from_be_bytes(field(&self.id, port).unwrap_or_default());
        let ip: [u8; 16] = field(&self.id, ip).unwrap_or_default();
        let [a, b, c, d, ..] = ip;
        let ip = if self.is_ipv6 { IpAddr::from(ip).to_canonical() } else { [a, b, c, d].into() };
        SocketAddr::new(ip, port)
    }

    /// Reads `inet_diag_msg` and its attributes. None is a socket that has been closed since the kernel picked it.
    fn read(message: &[u8]) -> io::Result<Option<Self>> {
        let (row, attributes) = message.split_first_chunk::<ROW_BYTES>().ok_or_else(malformed)?;
        let [family, state, _timer, repeats, ..] = *row;
        let mut states = State::CONNECTED.into_iter().chain([State::Listen]);
        let state = states.find(|it| *it as u8 == state);
        let storages = attribute(attributes, STORAGES).unwrap_or_default();
        Ok(state.map(|state| Self {
            id: field(row, 4).unwrap_or([0; 48]),
            is_ipv6: u16::from(family) == AddressFamily::INET6.as_raw(),
            state,
            repeats,
            inode: u32::from_ne_bytes(field(row, 68).unwrap_or_default()),
            is_marked: attribute(storages, STORAGE).is_some(),
        }))
    }
}

/// Lists the connections of `port`, of both families. Marked are those with a value in the storage `marks`; without it, none.
/// A list of less than [`SURE_BELOW`] rows is complete.
pub(crate) fn dump(port: u16, marks: Option<BorrowedFd<'_>>) -> io::Result<Vec<Row>> {
    list_states(&State::CONNECTED, port, marks)
}

/// Returns true if a socket listens on `port`, at whichever address.
pub(crate) fn is_listened(port: u16) -> io::Result<bool> {
    list_states(&[State::Listen], port, None).map(|rows| !rows.is_empty())
}

fn list_states(states: &[State], port: u16, marks: Option<BorrowedFd<'_>>) -> io::Result<Vec<Row>> {
    let question = dump_question(states, port, marks);
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut attempts = (0..ATTEMPTS).map(|_| list(&question, &mut buffer));
    attempts.find_map(Result::transpose).unwrap_or_else(|| {
        Err(io::Error::other("the kernel's table of connections changes while it is read"))
    })
}

/// Resets a connection, for both sides. Whatever else has its addresses by now stays as it is. Needs `CAP_NET_ADMIN`.
pub(crate) fn destroy(row: &Row) -> io::Result<()> {
    let family = if row.is_ipv6 { AddressFamily::INET6 } else { AddressFamily::INET };
    let question = message([DESTROY, REQUEST | ACKNOWLEDGE], &question_body(family, &row.id));
    let mut answer = [0; 512];
    let (length, _) = recv(send(&question)?, &mut answer, RecvFlags::empty())?;
    match read(answer.get(..length).unwrap_or_default(), &mut Vec::new()) {
        // It has ended by itself.
        Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => Ok(()),
        answer => answer.map(drop),
    }
}

/// Returns the question for a list: `inet_diag_req` and the map of marks.
fn dump_question(states: &[State], port: u16, marks: Option<BorrowedFd<'_>>) -> Vec<u8> {
    // It has neither a family nor prefixes nor extensions, and of the id the ports only; 0 stands for every port.
    let mut body = vec![0; 4];
    body.extend(port.to_be_bytes());
    body.resize(4 + size_of::<Id>(), 0);
    let states = states.iter().fold(0, |states, state| states | 1_u32 << *state as u32);
    body.extend(states.to_ne_bytes());
    // A place that the kernel does not look at.
    body.extend([0; 4]);
    if let Some(map) = marks {
        // Two headers, one in the other, and the descriptor.
        body.extend([12, WANTED_STORAGES, 8, WANTED_MAP].map(u16::to_ne_bytes).concat());
        body.extend(map.as_raw_fd().to_ne_bytes());
    }
    message([LIST, REQUEST | DUMP], &body)
}

/// Returns the rows of an answer; none if it has to be asked for once more.
fn list(question: &[u8], buffer: &mut Vec<u8>) -> io::Result<Option<Vec<Row>>> {
    let netlink = send(question)?;
    let mut rows = Vec::new();
    loop {
        // The kernel makes the next message as the one before is taken.
        let (_, length) = recv(&netlink, &mut buffer[..], RecvFlags::TRUNC)?;
        let Some(messages) = buffer.get(..length) else {
            buffer.resize(length, 0);
            return Ok(None);
        };
        match read(messages, &mut rows)? {
            Progress::More => {}
            Progress::Done => return Ok(Some(rows)),
            Progress::Changed => return Ok(None),
        }
    }
}

/// State of an answer that comes in several datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    More,
    Done,
    Changed,
}

/// Reads the messages of one datagram. An error may be one that the kernel answers.
fn read(mut messages: &[u8], rows: &mut Vec<Row>) -> io::Result<Progress> {
    while !messages.is_empty() {
        let length = u32::from_ne_bytes(field(messages, 0).ok_or_else(malformed)?);
        let length = usize::try_from(length).map_err(|_| malformed())?;
        let message = messages.get(..length).ok_or_else(malformed)?;
        let (header, body) = message.split_first_chunk::<HEADER_BYTES>().ok_or_else(malformed)?;
        let [_, _, _, _, type_low, type_high, flags_low, flags_high, ..] = *header;
        if u16::from_ne_bytes([flags_low, flags_high]) & CHANGED != 0 {
            return Ok(Progress::Changed);
        }
        match u16::from_ne_bytes([type_low, type_high]) {
            LIST => rows.extend(Row::read(body)?),
            ERROR | DONE => {
                let code = i32::from_ne_bytes(field(body, 0).ok_or_else(malformed)?);
                return match code {
                    0.. => Ok(Progress::Done),
                    _ => Err(io::Error::from_raw_os_error(code.saturating_neg())),
                };
            }
            _ => {}
        }
        messages = messages.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Progress::More)
}

/// Returns the value of an attribute.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(field(attributes, 0)?));
        let (header, value) = attributes.get(..length)?.split_first_chunk::<4>()?;
        if u16::from_ne_bytes(field(header, 2)?) & ATTRIBUTE_TYPE == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

/// Returns the bytes at a place.
fn field<const LENGTH: usize>(bytes: &[u8], place: usize) -> Option<[u8; LENGTH]> {
    bytes.get(place..)?.first_chunk().copied()
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is malformed")
}

#[cfg(test)]
pub(crate) mod tests;

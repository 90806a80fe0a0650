//! Talks: both ends of a connection play a random script, and compare each byte that comes.

#![allow(clippy::cast_possible_truncation, reason = "lengths here are far below 4 GiB")]

use std::{
    io::{self, ErrorKind, Read, Write},
    sync::LazyLock,
    thread,
    time::Duration,
};

use crate::harness::{End, Family, Random, Stream, pattern};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Client,
    Upstream,
}

/// The parts of both ends of one connection; each end derives them from the number.
#[derive(Debug)]
pub(super) struct Script {
    pub(super) number: u64,
    client: Part,
    upstream: Part,
    /// The end that resets the connection in the middle, if any does.
    resetter: Option<Role>,
}

/// The part of one end.
#[derive(Debug, Clone, Copy)]
struct Part {
    /// The place in the pattern where its bytes begin.
    start: u64,
    length: u64,
    /// True if its kernel takes little at a time for it to send.
    is_tight: bool,
    writes_slowly: bool,
    reads_slowly: bool,
}

impl Script {
    pub(super) fn new(number: u64, family: Family) -> Self {
        let mut random = Random::new(number);
        let (mut client, mut upstream) = (Part::new(&mut random), Part::new(&mut random));
        // A UNIX socket knows no reset of its own.
        let resetter = match random.below(8) {
            0 if family.is_tcp() => Some(Role::Client),
            1 if family.is_tcp() => Some(Role::Upstream),
            _ => None,
        };
        // A resetter reads a part of what comes, and writes little before.
        match resetter {
            Some(Role::Client) => (client.length, upstream.length) = (100, upstream.length + 1000),
            Some(Role::Upstream) => (client.length, upstream.length) = (client.length + 1000, 100),
            None => {}
        }
        Self { number, client, upstream, resetter }
    }

    /// Plays one part to its end; returns how many bytes came, all of them exact.
    pub(super) fn play(&self, stream: Stream, role: Role) -> Result<u64, String> {
        let (mine, theirs) = match role {
            Role::Client => (self.client, self.upstream),
            Role::Upstream => (self.upstream, self.client),
        };
        if mine.is_tight {
            // The kernel takes its least.
            rustix::net::sockopt::set_socket_send_buffer_size(&stream, 1).unwrap();
        }
        let played = match self.resetter {
            Some(resetter) if resetter == role => reset_midway(stream, mine, theirs),
            resetter => talk(stream, mine, theirs).and_then(|(heard, said)| {
                // A socket tells of its reset once: to who reads or to who writes.
                let was_reset = heard.end == End::Reset || said.as_ref().is_err_and(is_reset);
                let is_whole = heard.bytes == theirs.length && heard.end == End::Eof;
                let is_right =
                    if resetter.is_some() { was_reset } else { is_whole && said.is_ok() };
                if is_right { Ok(heard.bytes) } else { Err(format!("{heard:?}, {said:?}")) }
            }),
        };
        played.map_err(|error| format!("{role:?} of {self:?}: {error}"))
    }
}

fn is_reset(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), ConnectionReset | BrokenPipe | NotConnected)
}

impl Part {
    fn new(random: &mut Random) -> Self {
        // TCP is slow with a buffer of a few segments: what it sends is less.
        let is_tight = random.below(8) == 0;
        let length_max = if is_tight { 64 << 10 } else { 16 << 20 };
        Self {
            start: random.below(PERIOD),
            // A stream in eight has no bytes: its end comes first.
            length: if random.below(8) == 0 { 0 } else { random.spread(length_max) },
            is_tight,
            writes_slowly: random.below(4) == 0,
            reads_slowly: random.below(4) == 0,
        }
    }
}

/// The number of bytes that came, all of them exact, and the end.
#[derive(Debug)]
struct Heard {
    bytes: u64,
    end: End,
}

/// Writes and reads at the same time, both to the end.
fn talk(mut stream: Stream, mine: Part, theirs: Part) -> Result<(Heard, io::Result<()>), String> {
    let mut writer = stream.try_clone();
    thread::scope(|scope| {
        let writing = scope.spawn(move || {
            write(&mut writer, mine)?;
            Ok(rustix::net::shutdown(&writer, rustix::net::Shutdown::Write)?)
        });
        let heard = read(&mut stream, theirs, u64::MAX);
        Ok((heard?, writing.join().unwrap()))
    })
}

/// Writes all, reads a part, and resets.
fn reset_midway(mut stream: Stream, mine: Part, theirs: Part) -> Result<u64, String> {
    write(&mut stream, mine).map_err(|error| format!("cannot write: {error}"))?;
    // At least one byte, which shows that the other end has been reached.
    let enough = 1 + theirs.length / 4;
    let heard = read(&mut stream, theirs, enough)?;
    stream.reset();
    if heard.bytes < enough { Err(format!("too early: {heard:?}")) } else { Ok(heard.bytes) }
}

fn write(stream: &mut Stream, part: Part) -> io::Result<()> {
    let mut random = Random::new(part.start);
    let mut sent = 0;
    let mut pace = Pace::new(part.writes_slowly);
    while sent < part.length {
        let piece = random.spread(pace.piece_max()).min(part.length - sent);
        stream.write_all(text(part.start + sent, piece))?;
        sent += piece;
        pace.step();
    }
    Ok(())
}

/// Reads and compares, up to the end or until enough bytes have come.
fn read(stream: &mut Stream, part: Part, enough: u64) -> Result<Heard, String> {
    let mut pace = Pace::new(part.reads_slowly);
    let mut buffer = vec![0; pace.piece_max() as usize];
    let mut received = 0;
    while received < enough {
        let bytes = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(bytes) => bytes,
            Err(error) => return Ok(Heard { bytes: received, end: error.into() }),
        };
        if received + bytes as u64 > part.length
            || buffer[..bytes] != *text(part.start + received, bytes as u64)
        {
            return Err(format!("after {received} bytes came others than were sent"));
        }
        received += bytes as u64;
        pace.step();
    }
    Ok(Heard { bytes: received, end: End::Eof })
}

/// The most that is written or read at once.
const PIECE_MAX: u64 = 1 << 20;

/// The period of what is sent: a prime, so that nothing shifted by a buffer's size looks the same.
pub(super) const PERIOD: u64 = 1_048_573;

/// A piece of the endless text that every stream is a part of.
pub(super) fn text(position: u64, length: u64) -> &'static [u8] {
    static TEXT: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let once = pattern(1, PERIOD as usize);
        once.repeat(3)
    });
    let start = (position % PERIOD) as usize;
    &TEXT[start..start + length as usize]
}

/// The speed of an end: a slow one takes small pieces and rests.
struct Pace {
    slow: bool,
    steps: u32,
}

impl Pace {
    fn new(slow: bool) -> Self {
        Self { slow, steps: 0 }
    }

    fn piece_max(&self) -> u64 {
        if self.slow { 4 << 10 } else { PIECE_MAX }
    }

    fn step(&mut self) {
        self.steps += 1;
        if self.slow && self.steps.is_multiple_of(8) {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

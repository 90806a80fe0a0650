//! Traffic over upgrades, and what fails of it: short requests, kept connections and transfers.
//!
//! Each lane is a thread that acts at deadlines and sleeps in between. After a stall it catches up.

use std::{
    fmt,
    io::{self, Read, Write},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use ring::digest::{Context, Digest, SHA256};
use rustix::net::{Shutdown, shutdown};

use super::{
    load::{self, Address, ECHO},
    random::Random,
    stream::Stream,
};

/// Duration of the traffic without stalls.
const DURATION: Duration = Duration::from_secs(11);
/// Time after which the rest counts as failed.
const TIMEOUT: Duration = Duration::from_secs(60);

const REQUESTS_PER_SECOND: u32 = 1500;
const REQUEST_LANES: u32 = 30;
const KEPT: u32 = 20;
const KEPT_INTERVAL: Duration = Duration::from_millis(50);
const TRANSFERS: u32 = 50;
const TRANSFER_INTERVAL: Duration = Duration::from_millis(125);
/// Bytes that a transfer sends at each deadline: 1 MiB in a second.
const CHUNK_BYTES: usize = 128 * 1024;
const MESSAGE_BYTES: usize = 64;

/// Outcome of a kind of traffic.
#[derive(Debug)]
pub(crate) struct Tally {
    name: &'static str,
    /// Requests or transfers that succeeded.
    succeeded: u32,
    /// Those that failed, and those that were not made because of that.
    failed: u32,
    /// Longest time of a request; none for transfers, which last as long as the traffic.
    longest: Option<Duration>,
    /// First failure of all.
    why: Option<io::Error>,
}

/// Traffic under way.
pub(crate) struct Traffic {
    lanes: Vec<JoinHandle<Tally>>,
}

impl Traffic {
    /// Begins traffic to an echoing upstream behind `address`.
    pub(crate) fn begin(address: &Address) -> io::Result<Self> {
        let mut lanes = Vec::new();
        let mut spawn = |count: u32, interval: Duration, lane: fn(&Address, Pace) -> Tally| {
            for number in 0..count {
                let begin = Instant::now() + interval * number / count;
                let pace = Pace { begin, interval, seed: u64::from(number) };
                let address = address.clone();
                lanes.push(thread::Builder::new().spawn(move || lane(&address, pace))?);
            }
            Ok::<_, io::Error>(())
        };
        let interval = Duration::from_secs(1) * REQUEST_LANES / REQUESTS_PER_SECOND;
        spawn(REQUEST_LANES, interval, short_requests)?;
        spawn(KEPT, KEPT_INTERVAL, kept_connection)?;
        spawn(TRANSFERS, TRANSFER_INTERVAL, transfer)?;
        Ok(Self { lanes })
    }

    /// Returns the moments of `count` upgrades, spread over the traffic that begins now.
    pub(crate) fn moments(count: u32) -> impl Iterator<Item = Instant> {
        let begin = Instant::now();
        (1..=count).map(move |number| begin + DURATION * number / (count + 1))
    }

    /// Waits for the end of all lanes. Returns a sum for each kind.
    pub(crate) fn end(self) -> Vec<Tally> {
        let mut sums: Vec<Tally> = Vec::new();
        for lane in self.lanes {
            let tally = lane.join().unwrap_or_else(|_| Tally {
                failed: 1,
                why: Some(io::ErrorKind::Other.into()),
                ..Tally::new("panics")
            });
            match sums.iter_mut().find(|sum| sum.name == tally.name) {
                Some(sum) => sum.add(tally),
                None => sums.push(tally),
            }
        }
        sums
    }
}

impl Tally {
    fn new(name: &'static str) -> Self {
        Self { name, succeeded: 0, failed: 0, longest: None, why: None }
    }

    /// Counts a request that began at `began` and has ended now.
    fn count_timed(&mut self, began: Instant, result: io::Result<()>) {
        self.longest = self.longest.max(Some(began.elapsed()));
        self.count(result);
    }

    fn count(&mut self, result: io::Result<()>) {
        match result {
            Ok(()) => self.succeeded += 1,
            Err(error) => {
                self.failed += 1;
                self.why.get_or_insert(error);
            }
        }
    }

    fn add(&mut self, more: Self) {
        self.succeeded += more.succeeded;
        self.failed += more.failed;
        self.longest = self.longest.max(more.longest);
        self.why = self.why.take().or(more.why);
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed > 0
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, succeeded, failed, longest, why } = self;
        write!(f, "{name:>20} {succeeded:>10} {failed:>10}")?;
        if let Some(longest) = longest {
            write!(f, " {:>12.1}", 1e3 * longest.as_secs_f64())?;
        }
        why.as_ref().map_or(Ok(()), |error| write!(f, "  {error}"))
    }
}

/// Deadlines of a lane.
#[derive(Debug, Clone, Copy)]
struct Pace {
    begin: Instant,
    interval: Duration,
    /// Seed of the lane's bytes.
    seed: u64,
}

impl Pace {
    /// Returns the number of deadlines.
    fn count(&self) -> u32 {
        u32::try_from(DURATION.as_nanos() / self.interval.as_nanos()).unwrap_or(u32::MAX)
    }

    /// Sleeps until deadline `number`. Fails if the lane has had its time.
    fn wait(&self, number: u32) -> io::Result<()> {
        if self.begin.elapsed() > TIMEOUT {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let due = self.begin + self.interval * number;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        Ok(())
    }
}

/// Opens a connection at each deadline, which ends after one request.
fn short_requests(address: &Address, pace: Pace) -> Tally {
    let mut tally = Tally::new("short requests");
    let mut random = Random::new(pace.seed);
    for number in 0..pace.count() {
        let waited = pace.wait(number);
        let began = Instant::now();
        let mut request = || {
            let mut stream = open(address)?;
            round_trip(&mut stream, &mut random)?;
            finish(&mut stream)
        };
        tally.count_timed(began, waited.and_then(|()| request()));
    }
    tally
}

/// Makes a request at each deadline, all of them on one connection. A connection that breaks costs all requests that are left.
fn kept_connection(address: &Address, pace: Pace) -> Tally {
    let mut tally = Tally::new("requests on kept");
    let mut random = Random::new(pace.seed);
    let mut stream = match open(address) {
        Ok(stream) => stream,
        Err(error) => return Tally { failed: pace.count(), why: Some(error), ..tally },
    };
    for number in 0..pace.count() {
        let waited = pace.wait(number);
        let began = Instant::now();
        let mut result = waited.and_then(|()| round_trip(&mut stream, &mut random));
        if number + 1 == pace.count() {
            result = result.and_then(|()| finish(&mut stream));
        }
        let is_broken = result.is_err();
        tally.count_timed(began, result);
        if is_broken {
            tally.failed += pace.count() - number - 1;
            break;
        }
    }
    tally
}

/// Sends a chunk at each deadline, and reads the echo meanwhile. Both streams must have the same hash.
fn transfer(address: &Address, pace: Pace) -> Tally {
    let mut tally = Tally::new("transfers");
    let result = open(address).and_then(|stream| {
        thread::scope(|scope| {
            let sent = scope.spawn(|| send_chunks(&stream, pace));
            let received = receive_to_end(&stream)?;
            let sent = sent.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
            let is_same = received.as_ref() == sent.as_ref();
            is_same.then_some(()).ok_or_else(|| io::Error::other("a transfer differs"))
        })
    });
    tally.count(result);
    tally
}

/// Sends random bytes and then ends the stream. Returns their hash.
fn send_chunks(stream: &Stream, pace: Pace) -> io::Result<Digest> {
    let mut random = Random::new(pace.seed);
    let mut hash = Context::new(&SHA256);
    let mut chunk = vec![0; CHUNK_BYTES];
    for number in 0..pace.count() {
        pace.wait(number)?;
        fill(&mut chunk, &mut random);
        hash.update(&chunk);
        let mut left = &chunk[..];
        while !left.is_empty() {
            left = &left[rustix::io::write(stream, left)?..];
        }
    }
    shutdown(stream, Shutdown::Write)?;
    Ok(hash.finish())
}

/// Reads until the stream ends. Returns the hash of its bytes.
fn receive_to_end(stream: &Stream) -> io::Result<Digest> {
    let mut hash = Context::new(&SHA256);
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match rustix::io::read(stream, &mut buffer[..])? {
            0 => return Ok(hash.finish()),
            bytes => hash.update(&buffer[..bytes]),
        }
    }
}

/// Opens a connection whose upstream echoes all that follows.
fn open(address: &Address) -> io::Result<Stream> {
    let mut stream = load::connect(address)?;
    stream.write_all(&[ECHO])?;
    Ok(stream)
}

/// Sends random bytes and awaits the same.
fn round_trip(stream: &mut Stream, random: &mut Random) -> io::Result<()> {
    let (mut message, mut answer) = ([0; MESSAGE_BYTES], [0; MESSAGE_BYTES]);
    fill(&mut message, random);
    stream.write_all(&message)?;
    stream.read_exact(&mut answer)?;
    (answer == message).then_some(()).ok_or_else(|| io::Error::other("an answer differs"))
}

/// Ends our stream, and awaits the end of the other.
fn finish(stream: &mut Stream) -> io::Result<()> {
    shutdown(&*stream, Shutdown::Write)?;
    match stream.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(io::Error::other("a byte follows the answer")),
    }
}

fn fill(bytes: &mut [u8], random: &mut Random) {
    for word in bytes.chunks_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes()[..word.len()]);
    }
}

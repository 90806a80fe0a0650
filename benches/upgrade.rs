//! An upgrade of the running program: for how long no byte moves, with many idle pairs of connections, and with some busy ones;
//! and that nothing of the traffic over several upgrades fails.
//!
//! `make bench-upgrade`, or `cargo bench --bench upgrade -- [number of pairs]`. Each row shows two figures: the stall that the
//! program tells, and the longest 64-byte round trip of the clients meanwhile. Beside it stands their longest one without an
//! upgrade, as clients and upstream share the processors with the program. Then short requests, requests on kept connections and
//! transfers go on beside the pairs during further upgrades. A failure of any of them is an error. At the end each pair makes a
//! round trip, as none may have broken. Other load on the machine multiplies all figures; `chrt -r 1` before the command keeps
//! it away.

#![allow(
    clippy::print_stdout,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a bench prints, and may fail loudly"
)]

#[allow(dead_code, reason = "the rest of the load is for the comparison with other programs")]
mod peers {
    pub(crate) mod load;
    #[path = "../../tests/common/random.rs"]
    mod random;
    #[path = "../../tests/common/stream.rs"]
    pub(crate) mod stream;
    pub(crate) mod traffic;
}

use std::{
    env, fs,
    io::{self, Read, Write},
    net::TcpListener,
    os::unix::net::{UnixDatagram, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use peers::{
    load::{self, Address, RoundTrips},
    traffic::{Tally, Traffic},
};
use rustix::process::{
    Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit, test_kill_process,
};
use serde_json::Value;

/// Number of pairs, unless the limit of open files allows fewer.
const PAIRS: usize = 9000;
/// Descriptors of this process that are no connections. It has both ends, the clients' and the upstream's.
const OTHER_FILES: usize = 500;

const UPGRADES: u32 = 5;
const MESSAGE_BYTES: usize = 64;
/// Number of busy connections of each series. With a single one the rest is idle.
const BUSY: [usize; 2] = [1, 64];

/// Time of round trips without an upgrade, and after each.
const CALM: Duration = Duration::from_millis(500);
/// Longest time that the program may take for its start or for its end.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest time that the API may take for an upgrade.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(60);
const GLANCE: Duration = Duration::from_millis(10);

/// The running program, whichever process that is; it ends when this is dropped.
struct Proxy {
    child: Child,
    /// Process that has taken over last.
    successor: Option<Pid>,
    front: Address,
    control: PathBuf,
}

fn main() -> io::Result<()> {
    let files = raise_open_files();
    let wanted = env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(PAIRS);
    let busiest = BUSY.into_iter().max().unwrap_or_default();
    let pairs = wanted.min(files.saturating_sub(OTHER_FILES) / 2).max(busiest);
    let dir = tempfile::tempdir()?;
    let (upstream, _) = load::serve(&dir.path().join("upstream.sock"))?;
    let mut proxy = Proxy::start(&upstream, dir.path())?;
    let mut trips = RoundTrips::open(&proxy.front, pairs, MESSAGE_BYTES)?;
    println!("{pairs} pairs of connections, limit of open files {files}; milliseconds");
    println!("{:>6} {:>8} {:>12} {:>12} {:>12}", "busy", "upgrade", "told", "seen", "without");
    for busy in BUSY {
        let mut all = Vec::new();
        for upgrade in 1..=UPGRADES {
            let (told, seen, without) = measure(&mut proxy, &mut trips, busy)?;
            println!(
                "{busy:>6} {upgrade:>8} {:>12.1} {:>12.1} {:>12.1}",
                1e3 * told,
                milliseconds(seen),
                milliseconds(without)
            );
            all.push((told, seen));
        }
        let longest = all.iter().map(|(told, _)| *told).fold(0.0, f64::max);
        let seen = all.iter().map(|(_, seen)| *seen).max().unwrap_or_default();
        println!(
            "{busy:>6} {:>8} {:>12.1} {:>12.1}\n",
            "longest",
            1e3 * longest,
            milliseconds(seen)
        );
    }
    let has_failed = carry_traffic(&mut proxy)?;
    let made = trips.run(pairs, pairs)?.len();
    assert_eq!(made, pairs, "each pair makes a round trip");
    println!("none of {pairs} pairs has broken");
    if has_failed { Err(io::Error::other("some of the traffic has failed")) } else { Ok(()) }
}

/// Upgrades during traffic. Returns true if any of it has failed.
fn carry_traffic(proxy: &mut Proxy) -> io::Result<bool> {
    println!("traffic over {UPGRADES} upgrades beside the pairs; milliseconds");
    println!("{:>20} {:>10} {:>10} {:>12}", "", "succeeded", "failed", "longest");
    let traffic = Traffic::begin(&proxy.front)?;
    let mut longest = 0.0;
    for moment in Traffic::moments(UPGRADES) {
        thread::sleep(moment.saturating_duration_since(Instant::now()));
        longest = ask_for_upgrade(&proxy.control).and_then(|it| proxy.note(&it))?.max(longest);
    }
    let tallies = traffic.end();
    for tally in &tallies {
        println!("{tally}");
    }
    println!("{:>20} {:>34.1}\n", "longest stall told", 1e3 * longest);
    Ok(tallies.iter().any(Tally::has_failed))
}

/// Upgrades once while `busy` connections make round trips. Returns the stall in seconds that the program tells, and the longest
/// round trip meanwhile and before.
fn measure(
    proxy: &mut Proxy,
    trips: &mut RoundTrips,
    busy: usize,
) -> io::Result<(f64, Duration, Duration)> {
    let calm = |begin: Instant| move || begin.elapsed() >= CALM;
    let without = longest_trip(trips, busy, calm(Instant::now()))?;
    let control = proxy.control.clone();
    let asking = thread::Builder::new().spawn(move || ask_for_upgrade(&control))?;
    let meanwhile = longest_trip(trips, busy, || asking.is_finished())?;
    let answer = asking.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
    let told = proxy.note(&answer)?;
    let after = longest_trip(trips, busy, calm(Instant::now()))?;
    Ok((told, meanwhile.max(after), without))
}

/// Makes round trips until `is_over`. Returns the time of the longest.
fn longest_trip(
    trips: &mut RoundTrips,
    busy: usize,
    is_over: impl Fn() -> bool,
) -> io::Result<Duration> {
    let mut longest = Duration::ZERO;
    while !is_over() {
        let times = trips.run(busy, busy * 10)?;
        longest = times.last().copied().unwrap_or_default().max(longest);
    }
    Ok(longest)
}

/// Asks the API for an upgrade. Returns the answer of the process that has taken over.
fn ask_for_upgrade(control: &Path) -> io::Result<Value> {
    let mut stream = UnixStream::connect(control)?;
    stream.set_read_timeout(Some(UPGRADE_TIMEOUT))?;
    stream.write_all(
        b"POST /upgrade HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200 ") => Ok(serde_json::from_str(body)?),
        _ => Err(io::Error::other(format!("POST /upgrade: {answer:?}"))),
    }
}

impl Proxy {
    /// Starts the program in front of `upstream`, with its files in `dir`.
    fn start(upstream: &Address, dir: &Path) -> io::Result<Self> {
        let Address::Tcp(upstream) = upstream else { unreachable!("the upstream is TCP") };
        let config = dir.join("tcpause.yml");
        fs::write(&config, "")?;
        let control = dir.join("control.sock");
        let front = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        // With a manager that follows, one standstill is measured. Without, there would be a second one on the way back.
        let notify = dir.join("notify");
        let manager = UnixDatagram::bind(&notify)?;
        let hear = move || while manager.recv(&mut [0; 4096]).is_ok() {};
        thread::Builder::new().spawn(hear)?;
        let child = Command::new(env!("CARGO_BIN_EXE_tcpause"))
            .arg("--config")
            .arg(&config)
            .args(["--proxy-addr", &front.to_string(), "--upstream-addr", &upstream.to_string()])
            .arg("--control-addr")
            .arg(format!("unix://{}", control.display()))
            .args(["--log-level", "warn"])
            .env("NOTIFY_SOCKET", &notify)
            .stdin(Stdio::null())
            .spawn()?;
        let proxy = Self { child, successor: None, front: Address::Tcp(front), control };
        let deadline = Instant::now() + PATIENCE;
        while load::idle(&proxy.front, 1).is_err() {
            if Instant::now() > deadline {
                return Err(io::Error::other("tcpause does not start"));
            }
            thread::sleep(GLANCE);
        }
        Ok(proxy)
    }

    /// Notes the process that has taken over, from its `answer`. Returns the stall in seconds that it tells.
    fn note(&mut self, answer: &Value) -> io::Result<f64> {
        let pid = answer.get("pid").and_then(Value::as_i64);
        let pid = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        self.successor = Some(pid.ok_or_else(|| io::Error::other(format!("no pid in {answer}")))?);
        self.child.wait()?;
        let told = answer.get("stall_seconds").and_then(Value::as_f64);
        told.ok_or_else(|| io::Error::other(format!("no stall in {answer}")))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        match self.successor {
            Some(pid) => {
                kill_process(pid, Signal::KILL).ok();
                let deadline = Instant::now() + PATIENCE;
                while test_kill_process(pid).is_ok() && Instant::now() < deadline {
                    thread::sleep(GLANCE);
                }
            }
            None => {
                self.child.kill().ok();
            }
        }
        self.child.wait().ok();
    }
}

fn milliseconds(time: Duration) -> f64 {
    1e3 * time.as_secs_f64()
}

/// Raises the limit of open files as far as it goes, and returns it.
fn raise_open_files() -> usize {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).ok();
    let current = getrlimit(Resource::Nofile).current;
    current.and_then(|files| usize::try_from(files).ok()).unwrap_or(usize::MAX)
}

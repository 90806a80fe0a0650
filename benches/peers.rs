//! tcpause beside its peers: CPU time per unit of work, of the proxy and of the whole system, and memory per idle connection.
//!
//! `make bench-peers`, or `cargo bench --bench peers -- [rows whose name contains this [programs, by name]]`. With
//! `TCPAUSE_BASELINE=FILE` another build of tcpause is measured as well. CPU time is measured, as wall-clock figures mislead on
//! shared machines. The proxy's CPU time leaves out the work that it causes elsewhere; the whole system's includes it (see
//! `peers/meter.rs`). *Direct* is the load without any proxy, and *steered* is tcpause
//! with `upstream.steer`, which needs root or the two rights.
//!
//! All programs run in turn in each round (A B A B ...), one worker each, and the figure is the median of the rounds. The load
//! has one processor and the programs the other. Rows with a single connection use one processor for both: over two, a round
//! trip costs up to twice as much if the other processor has fallen asleep meanwhile. Peers that are not installed are named
//! and skipped. At the end come the figures of the page on cost, as one table. The congestion control is the host's:
//! `unshare --net` with another `net.ipv4.tcp_congestion_control` changes it for a run.

#![allow(
    clippy::print_stdout,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    reason = "a bench prints, and may fail loudly"
)]

mod peers {
    pub(crate) mod load;
    pub(crate) mod meter;
    pub(crate) mod program;
    #[path = "../../tests/common/stream.rs"]
    pub(crate) mod stream;
    pub(crate) mod table;
}

use std::{
    env, fs, io,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use peers::{
    load::{self, Address, RoundTrips, Way},
    meter::{Meter, Taken},
    program::{self, Kind, Program, Running},
    table::Table,
};

/// Measurements of each row.
const ROUNDS: usize = 3;
/// Approximate time for which each piece of work is measured.
const MEASURED_FOR: Duration = Duration::from_secs(1);
/// Connections of the idle row.
const IDLE_CONNECTIONS: usize = 2000;

/// Share of the processors from which other processes make the figures doubtful.
const NOISE_MAX: f64 = 0.05;

/// Row of the table: a name with its unit, and the work.
struct Row {
    name: String,
    front: Kind,
    back: Kind,
    work: Work,
    /// Processor of the load.
    load: &'static str,
}

enum Work {
    /// Milliseconds of CPU per GiB over four connections.
    Bulk(Way),
    /// Microseconds of CPU per round trip.
    RoundTrips { open: usize, busy: usize, size: usize },
    /// Milliseconds of the clock until 99 % of round trips are over, beside a connection that moves bytes as fast as it can.
    BesideBulk,
    /// Microseconds of CPU per connection.
    Short,
    /// KiB per connection.
    Idle,
}

/// Cost of a row for a program.
#[derive(Clone, Copy, Default)]
pub(crate) struct Figure {
    /// CPU time of the program itself.
    pub(crate) cost: f64,
    /// CPU time of the whole system, for rows that have it.
    pub(crate) total: Option<f64>,
    /// The 99th percentile of the round trips' times, in microseconds of the clock.
    tail: Option<f64>,
    /// Share of the processors that other processes had meanwhile.
    noise: f64,
}

fn main() -> io::Result<()> {
    let mut arguments = env::args().skip(1).filter(|argument| !argument.starts_with('-'));
    let wanted = arguments.next().unwrap_or_default();
    let names: Vec<String> = arguments.collect();
    raise_open_files();
    program::pin_load(program::LOAD);
    let dir = tempfile::tempdir()?;
    let (tcp, unix) = load::serve(&dir.path().join("upstream.sock"))?;
    let mut programs = Vec::new();
    let is_wanted =
        |program: &Program| names.is_empty() || names.iter().any(|name| name == program.name());
    for program in Program::ALL.into_iter().filter(is_wanted) {
        match program.version() {
            Some(version) => {
                println!("{:<17} {version}", program.name());
                programs.push(program);
            }
            None => println!("{:<17} not installed, skipped", program.name()),
        }
    }
    let told = |path: &str| fs::read_to_string(path).unwrap_or_default();
    println!("{}", told("/proc/version").trim());
    let congestion = told("/proc/sys/net/ipv4/tcp_congestion_control");
    println!("congestion control: {}", congestion.trim());
    println!("median of {ROUNDS} rounds; in brackets the ratio of tcpause to that program\n");

    let (mut table, mut noise) = (Table::new(&programs), 0.0_f64);
    for row in rows().iter().filter(|row| row.name.contains(&wanted)) {
        let upstream = if row.back == Kind::Tcp { &tcp } else { &unix };
        let figures = measure(row, &programs, upstream, dir.path());
        show(row, &figures);
        noise = noise.max(median(figures.iter().map(|(_, figure)| figure.noise).collect()));
        table.add(&row.name, &figures);
    }
    println!("\n{table}\n");
    println!("others had up to {:.0} % of the processors in a row's median", noise * 100.0);
    if noise > NOISE_MAX {
        println!("that is too much for the figures to be trusted");
    }
    Ok(())
}

fn rows() -> Vec<Row> {
    let row = |name: String, (front, back), work| {
        let load = match work {
            Work::RoundTrips { open: 1, .. } => program::PROGRAMS,
            _ => program::LOAD,
        };
        Row { name, front, back, work, load }
    };
    let (tcp, to_unix) = ((Kind::Tcp, Kind::Tcp), (Kind::Tcp, Kind::Unix));
    let mut rows = Vec::new();
    for way in [tcp, to_unix, (Kind::Unix, Kind::Tcp), (Kind::Unix, Kind::Unix)] {
        for (direction, to) in [(Way::Up, "server"), (Way::Down, "client")] {
            let name = format!("ms per GiB to the {to}, {} to {}", way.0, way.1);
            rows.push(row(name, way, Work::Bulk(direction)));
        }
    }
    for (size, name) in [(64, "64 B"), (16 * 1024, "16 KiB")] {
        for (busy, many) in
            [(1, "1 connection, one processor"), (16, "16 connections"), (256, "256 connections")]
        {
            let name = format!("µs per {name} round trip, {many}");
            rows.push(row(name, tcp, Work::RoundTrips { open: busy, busy, size }));
        }
    }
    for open in [64, 4000] {
        let name = format!("µs per 64 B round trip, 64 busy connections of {open}");
        rows.push(row(name, tcp, Work::RoundTrips { open, busy: 64, size: 64 }));
    }
    let name = "ms until 99 % of 64 B round trips beside a bulk transfer are over".into();
    rows.push(row(name, tcp, Work::BesideBulk));
    for way in [tcp, to_unix] {
        let name = format!("µs per short connection, 64 at a time, {} to {}", way.0, way.1);
        rows.push(row(name, way, Work::Short));
    }
    rows.push(row("KiB per idle connection, kernel's included".into(), tcp, Work::Idle));
    rows
}

/// Measures a row. Programs that fail are named and left out.
fn measure(
    row: &Row,
    programs: &[Program],
    upstream: &Address,
    dir: &Path,
) -> Vec<(Program, Figure)> {
    program::pin_load(row.load);
    let measured = programs.iter().filter(|program| program.is_for(row.front, row.back));
    let mut figures: Vec<(Program, Vec<Figure>)> =
        measured.map(|&program| (program, Vec::new())).collect();
    for _round in 0..ROUNDS {
        for (program, figures) in &mut figures {
            let done =
                program.start(row.front, upstream, dir).and_then(|running| row.work.run(&running));
            match done {
                Ok(figure) => figures.push(figure),
                Err(error) => println!("{}: {}: {error}", row.name, program.name()),
            }
        }
    }
    figures
        .into_iter()
        .filter(|(_, figures)| !figures.is_empty())
        .map(|(program, figures)| (program, Figure::median(&figures)))
        .collect()
}

/// Prints a row, with the ratios of tcpause to all others.
fn show(row: &Row, figures: &[(Program, Figure)]) {
    let ours = figures.iter().find(|(program, _)| *program == Program::Tcpause);
    let ours = ours.map(|(_, figure)| *figure).unwrap_or_default();
    let cell = |ours: f64, cost: f64| {
        let ratio = if cost > 0.0 { format!("[{:.2}]", ours / cost) } else { String::new() };
        format!("{cost:>12.1} {ratio:>7}")
    };
    println!("{:<68} {:>6} {:>23}", row.name, "proxy", "whole system");
    for (program, figure) in figures {
        let total = match (ours.total, figure.total) {
            (Some(ours), Some(total)) => cell(ours, total),
            _ => String::new(),
        };
        let tail = figure.tail.map(|tail| format!(", p99 {tail:.0} us")).unwrap_or_default();
        println!("    {:<50} {} {total}{tail}", program.name(), cell(ours.cost, figure.cost));
    }
}

impl Work {
    fn run(&self, running: &Running) -> io::Result<Figure> {
        match *self {
            Self::Bulk(way) => {
                let bulk = |mebibytes: usize| {
                    let each = u32::try_from(mebibytes / 4).map_err(io::Error::other)?;
                    load::bulk(&running.front, way, 4, each)
                };
                let mebibytes = warm_up(64, 8 * 1024, bulk)?;
                let meter = Meter::start(running);
                bulk(mebibytes)?;
                Ok(Figure::new(meter.stop(), 1e3 * 1024.0 / mebibytes as f64))
            }
            Self::RoundTrips { open, busy, size } => {
                let mut trips = RoundTrips::open(&running.front, open, size)?;
                let count = warm_up(2_000, 200_000, |count| trips.run(busy, count).map(drop))?;
                let meter = Meter::start(running);
                let times = trips.run(busy, count)?;
                Ok(Figure { tail: tail(&times), ..Figure::new(meter.stop(), each(count)) })
            }
            Self::BesideBulk => {
                let mut trips = RoundTrips::open(&running.front, 1, 64)?;
                let front = running.front.clone();
                let bulk = thread::Builder::new()
                    .spawn(move || load::bulk(&front, Way::Up, 1, 3 * 1024))?;
                let meter = Meter::start(running);
                let mut times = Vec::new();
                while !bulk.is_finished() {
                    times.extend(trips.run(1, 100)?);
                }
                let noise = meter.stop().noise;
                times.sort_unstable();
                bulk.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
                let cost = tail(&times).unwrap_or_default() / 1e3;
                Ok(Figure { cost, noise, ..Figure::default() })
            }
            Self::Short => {
                let short = |count| load::short(&running.front, count, 64);
                // Further connections would use up the local ports.
                let count = warm_up(500, 12_000, short)?;
                let meter = Meter::start(running);
                short(count)?;
                Ok(Figure::new(meter.stop(), each(count)))
            }
            Self::Idle => {
                let before = running.resident() + kernel_memory();
                let connections = load::idle(&running.front, IDLE_CONNECTIONS)?;
                let after = running.resident() + kernel_memory();
                drop(connections);
                let cost = (after as f64 - before as f64) / IDLE_CONNECTIONS as f64;
                Ok(Figure { cost, ..Figure::default() })
            }
        }
    }
}

impl Figure {
    /// Returns the figure for the time `taken`, in a unit of which a second has `units`.
    fn new(taken: Taken, units: f64) -> Self {
        let Taken { proxy, total, noise } = taken;
        let cost = proxy.as_secs_f64() * units;
        Self { cost, total: Some(total.as_secs_f64() * units), tail: None, noise }
    }

    /// Returns the median of each value by itself, as an outlier of one value may be normal in another.
    fn median(all: &[Self]) -> Self {
        let of = |value: fn(&Self) -> Option<f64>| median(all.iter().filter_map(value).collect());
        let some = |value: fn(&Self) -> Option<f64>| all.iter().find_map(value).map(|_| of(value));
        Self {
            cost: of(|it| Some(it.cost)),
            total: some(|it| it.total),
            tail: some(|it| it.tail),
            noise: of(|it| Some(it.noise)),
        }
    }
}

/// Does the work `count` times. Returns the number of times that fits into [`MEASURED_FOR`], `most` at most.
fn warm_up(
    count: usize,
    most: usize,
    work: impl FnOnce(usize) -> io::Result<()>,
) -> io::Result<usize> {
    let began = Instant::now();
    work(count)?;
    let rate = count as f64 / began.elapsed().as_secs_f64();
    let fitting = (1..)
        .map(|times| times * count)
        .take_while(|&many| many as f64 <= rate * MEASURED_FOR.as_secs_f64() && many <= most);
    Ok(fitting.last().unwrap_or(count))
}

/// Returns the factor that turns seconds into microseconds per item, for `count` items.
fn each(count: usize) -> f64 {
    1e6 / count as f64
}

/// Returns the 99th percentile of sorted `times`, in microseconds.
fn tail(times: &[Duration]) -> Option<f64> {
    times.get(times.len() * 99 / 100).map(|time| time.as_secs_f64() * 1e6)
}

/// Returns the kernel's memory for sockets and their buffers, in KiB. It includes the load's own, which the row of the direct
/// connection shows.
fn kernel_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let value = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
    ["Slab:", "KernelStack:", "PageTables:"]
        .iter()
        .filter_map(|name| text.lines().find(|line| line.starts_with(name)).and_then(value))
        .sum()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).ok();
}

//! tcpause beside its peers: CPU time of the proxy per unit of work, and memory per idle connection.
//!
//! `make bench-peers`, or `cargo bench --bench peers -- [rows whose name contains this [programs, by name]]`. With
//! `TCPAUSE_BASELINE=FILE` another build of tcpause is measured as well. Wall-clock figures mislead on
//! shared machines; the proxy's own CPU time holds. All programs run in turn in each round (A B A B ...), one worker each;
//! the load has one processor and they the other, and the figure is the median of the rounds. Peers that are not installed are named and skipped.

#![allow(
    clippy::print_stdout,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    reason = "a bench prints, and may fail loudly"
)]

mod peers {
    pub(crate) mod load;
    pub(crate) mod program;
}

use std::{env, fs, io, thread, time::Duration};

use peers::{
    load::{self, Address, RoundTrips, Way},
    program::{self, Kind, Program, Running},
};

/// How often each row is measured.
const ROUNDS: usize = 3;
/// Connections of the idle row.
const IDLE_CONNECTIONS: usize = 2000;

/// One row of the table: a name, a unit, and what is done.
struct Row {
    name: String,
    unit: &'static str,
    front: Kind,
    back: Kind,
    work: Work,
}

enum Work {
    /// Milliseconds of CPU per GiB over four connections.
    Bulk(Way),
    /// Microseconds of CPU per round trip.
    RoundTrips { open: usize, busy: usize, size: usize, count: usize },
    /// The same beside a connection that moves bytes as fast as it can; the tail is the point.
    BesideBulk { count: usize },
    /// Microseconds of CPU per connection.
    Short { count: usize },
    /// KiB per connection.
    Idle,
}

/// What a program took for a row.
#[derive(Clone, Copy)]
struct Figure {
    cost: f64,
    /// The 99th percentile of the round trips' times, in microseconds of the clock.
    tail: Option<f64>,
}

fn main() -> io::Result<()> {
    let mut arguments = env::args().skip(1).filter(|argument| !argument.starts_with('-'));
    let wanted = arguments.next().unwrap_or_default();
    let names: Vec<String> = arguments.collect();
    raise_open_files();
    program::pin_load();
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
    println!("{}", fs::read_to_string("/proc/version").unwrap_or_default().trim());
    println!("median of {ROUNDS} rounds; in brackets the ratio of tcpause to that program\n");

    for row in rows().iter().filter(|row| row.name.contains(&wanted)) {
        let upstream = if row.back == Kind::Tcp { &tcp } else { &unix };
        measure(row, &programs, upstream, dir.path());
    }
    Ok(())
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (front, back) in [
        (Kind::Tcp, Kind::Tcp),
        (Kind::Tcp, Kind::Unix),
        (Kind::Unix, Kind::Tcp),
        (Kind::Unix, Kind::Unix),
    ] {
        for (way, direction) in [(Way::Up, "to upstream"), (Way::Down, "to client")] {
            let name = format!("bulk {direction}, {front:?} to {back:?}");
            rows.push(Row { name, unit: "ms per GiB", front, back, work: Work::Bulk(way) });
        }
    }
    for (size, name) in [(64, "64 B"), (16 * 1024, "16 KiB")] {
        for (busy, count) in [(1, 8_000), (16, 16_000), (256, 30_000)] {
            let name = format!("round trip of {name}, {busy} connections");
            let work = Work::RoundTrips { open: busy, busy, size, count };
            rows.push(Row { name, unit: "us each", front: Kind::Tcp, back: Kind::Tcp, work });
        }
    }
    for open in [64, 4000] {
        let name = format!("round trip of 64 B, 64 busy of {open}");
        let work = Work::RoundTrips { open, busy: 64, size: 64, count: 20_000 };
        rows.push(Row { name, unit: "us each", front: Kind::Tcp, back: Kind::Tcp, work });
    }
    let tcp = |name: &str, unit, work| Row {
        name: name.into(),
        unit,
        front: Kind::Tcp,
        back: Kind::Tcp,
        work,
    };
    rows.push(tcp(
        "round trip of 64 B beside one bulk connection",
        "us each, bulk included",
        Work::BesideBulk { count: 20_000 },
    ));
    rows.push(tcp("short connections, 64 at a time", "us each", Work::Short { count: 6_000 }));
    rows.push(tcp("idle connections", "KiB each", Work::Idle));
    rows
}

fn measure(row: &Row, programs: &[Program], upstream: &Address, dir: &std::path::Path) {
    let mut figures: Vec<(Program, Vec<Figure>)> =
        programs.iter().map(|&program| (program, Vec::new())).collect();
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
    let medians: Vec<(Program, Figure)> = figures
        .into_iter()
        .filter_map(|(program, figures)| Some((program, median(figures)?)))
        .collect();
    let ours =
        medians.iter().find(|(program, _)| *program == Program::Tcpause).map(|(_, figure)| *figure);
    println!("{} ({})", row.name, row.unit);
    for (program, figure) in medians {
        let tail = figure.tail.map(|tail| format!(", p99 {tail:.0} us")).unwrap_or_default();
        let ratio = match ours {
            Some(ours) if figure.cost > 0.0 => format!("[{:.2}]", ours.cost / figure.cost),
            _ => String::new(),
        };
        println!("    {:<17} {:>8.1} {ratio:>7}{tail}", program.name(), figure.cost);
    }
}

impl Work {
    fn run(&self, running: &Running) -> io::Result<Figure> {
        match *self {
            Self::Bulk(way) => {
                load::bulk(&running.front, way, 4, 16)?;
                let before = running.cpu();
                load::bulk(&running.front, way, 4, 256)?;
                Ok(Figure {
                    cost: running.cpu().saturating_sub(before).as_secs_f64() * 1e3,
                    tail: None,
                })
            }
            Self::RoundTrips { open, busy, size, count } => {
                let mut trips = RoundTrips::open(&running.front, open, size)?;
                trips.run(busy, count / 10)?;
                let before = running.cpu();
                let times = trips.run(busy, count)?;
                let cost = each(running.cpu().saturating_sub(before), count);
                Ok(Figure {
                    cost,
                    tail: times.get(count * 99 / 100).map(|time| time.as_secs_f64() * 1e6),
                })
            }
            Self::BesideBulk { count } => {
                let mut trips = RoundTrips::open(&running.front, 1, 64)?;
                let front = running.front.clone();
                let bulk = thread::Builder::new()
                    .spawn(move || load::bulk(&front, Way::Up, 1, 3 * 1024))?;
                let before = running.cpu();
                let mut times = Vec::new();
                while !bulk.is_finished() && times.len() < count {
                    times.extend(trips.run(1, 100)?);
                }
                let cost = each(running.cpu().saturating_sub(before), times.len());
                times.sort_unstable();
                let tail = times.get(times.len() * 99 / 100).map(|time| time.as_secs_f64() * 1e6);
                bulk.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
                Ok(Figure { cost, tail })
            }
            Self::Short { count } => {
                load::short(&running.front, count / 10, 64)?;
                let before = running.cpu();
                load::short(&running.front, count, 64)?;
                Ok(Figure { cost: each(running.cpu().saturating_sub(before), count), tail: None })
            }
            Self::Idle => {
                let before = running.resident() + kernel_memory();
                let connections = load::idle(&running.front, IDLE_CONNECTIONS)?;
                let after = running.resident() + kernel_memory();
                drop(connections);
                Ok(Figure {
                    cost: (after as f64 - before as f64) / IDLE_CONNECTIONS as f64,
                    tail: None,
                })
            }
        }
    }
}

/// Microseconds for each of `count`.
fn each(time: Duration, count: usize) -> f64 {
    time.as_secs_f64() * 1e6 / count as f64
}

/// The kernel's memory for sockets and all that hangs on them, in KiB. It includes the load's own: the row of the direct
/// connection says how much.
fn kernel_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let value = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
    ["Slab:", "KernelStack:", "PageTables:"]
        .iter()
        .filter_map(|name| text.lines().find(|line| line.starts_with(name)).and_then(value))
        .sum()
}

fn median(mut figures: Vec<Figure>) -> Option<Figure> {
    figures.sort_by(|left, right| left.cost.total_cmp(&right.cost));
    figures.get(figures.len() / 2).copied()
}

fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).ok();
}

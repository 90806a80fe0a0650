//! Fleets of real proxies over a real etcd: what happens in each row of the table of events, with its figure printed.
//!
//! Figures are asserted by bounds of seconds, as other tests run beside. That nothing is carried while a command runs is
//! asserted exactly.

mod access;
mod cut;
mod death;
mod lost;
mod members;
mod operate;
mod plain;
mod recipe;
mod scene;
mod upgrade;

use std::time::Duration;

use scene::{Clients, Server, clock};
use serde_json::Value;

use crate::{
    harness::{
        Addr, Builder, Control, PATIENCE, Proxy, Response, Stream, etcd::Cluster, spawn, wait_until,
    },
    process::exec::Exec,
};

/// Command that tells its begin, goes on until it is told to end or gets SIGTERM, and tells its end.
const COMMAND: &str = "trap 'date +%s%N; exit 143' TERM; date +%s%N; read ended; date +%s%N";

/// The shortest time to live, of sessions and of pauses.
const TTL: Duration = Duration::from_secs(5);

/// Time from the loss of a pause's holder until a member ends it: P + 3τ.
const LINGER: Duration = Duration::from_millis(4_667);

/// Hosts, each a process of its own, their etcd, and the server behind them.
struct Fleet {
    hosts: Vec<Option<Proxy>>,
    server: Server,
    cluster: Cluster,
}

/// Command of an exec for the whole fleet.
struct Run(Exec);

impl Fleet {
    /// Starts so many hosts over so many members of etcd. Returns `None` where there is no etcd.
    fn start(hosts: usize, members: usize) -> Option<Self> {
        let mut fleet = Self::empty(members)?;
        let builders: Vec<Builder> = (0..hosts).map(|host| fleet.builder(host)).collect();
        let start = |builder: Builder| spawn(move || builder.start());
        let threads: Vec<_> = builders.into_iter().map(start).collect();
        fleet.hosts = threads.into_iter().map(|thread| Some(thread.join().unwrap())).collect();
        fleet.each(|_host, proxy| drop(proxy.wait_for_log("is a member of the fleet")));
        Some(fleet)
    }

    /// Starts etcd and the server without any host.
    fn empty(members: usize) -> Option<Self> {
        let cluster = Cluster::start(members)?;
        Some(Self { hosts: Vec::new(), server: Server::start(), cluster })
    }

    /// Returns the builder of a host that knows all members of etcd. Each host begins with another one.
    fn builder(&self, host: usize) -> Builder {
        let mut urls = self.cluster.urls();
        let first = host % urls.len();
        urls.rotate_left(first);
        self.builder_at(host, &urls.join(","))
    }

    /// Returns the builder of a host that knows these members of etcd.
    fn builder_at(&self, host: usize, endpoints: &str) -> Builder {
        Proxy::builder().upstream_at(self.server.addr()).args([
            "--fleet-endpoints".to_owned(),
            endpoints.to_owned(),
            format!("--fleet-host={}", name(host)),
            format!("--fleet-ttl={}s", TTL.as_secs()),
        ])
    }

    /// Adds a host, and waits until it is a member.
    fn add(&mut self, builder: Builder) {
        let proxy = builder.start();
        proxy.wait_for_log("is a member of the fleet");
        self.hosts.push(Some(proxy));
    }

    #[track_caller]
    fn host(&self, host: usize) -> &Proxy {
        self.hosts[host].as_ref().expect("a host that runs")
    }

    fn control(&self, host: usize) -> &Control {
        self.host(host).control()
    }

    /// Calls this for each host that runs.
    fn each(&self, mut call: impl FnMut(usize, &Proxy)) {
        for (host, proxy) in self.hosts.iter().enumerate() {
            if let Some(proxy) = proxy {
                call(host, proxy);
            }
        }
    }

    /// Kills a host (SIGKILL).
    fn kill(&mut self, host: usize) {
        self.hosts[host] = None;
    }

    /// Has clients come to these hosts.
    fn clients(&self, hosts: impl IntoIterator<Item = usize>) -> Clients {
        let addr = |host: usize| (host, self.host(host).addr());
        let hosts: Vec<(usize, &Addr)> = hosts.into_iter().map(addr).collect();
        Clients::start(hosts.into_iter())
    }

    /// Connects a client that is served at a host until it ends.
    #[track_caller]
    fn busy(&self, host: usize) -> Stream {
        let mut stream = self.host(host).connect();
        stream.assert_echo(&[u8::try_from(host).unwrap()]);
        stream
    }

    /// Begins an exec of the name at a host.
    fn exec(&self, host: usize, name: &str, options: &[&str]) -> Exec {
        let name = format!("--name={name}");
        let all = [&["--fleet", "--ttl=5s", &*name][..], options, &["--", "sh", "-c", COMMAND]];
        Exec::start(self.control(host), all.concat())
    }

    /// Runs [`COMMAND`] in an exec. Returns the time of its begin.
    #[track_caller]
    fn run(&self, host: usize, name: &str, options: &[&str]) -> (Run, Duration) {
        let run = Run(self.exec(host, name, options));
        let began = run.told();
        (run, began)
    }

    /// Asks a host about the fleet until the answer is as wanted.
    #[track_caller]
    fn wait_table(&self, host: usize, what: &str, is_wanted: impl Fn(&Value) -> bool) -> Value {
        let mut table = Value::Null;
        wait_until(what, || {
            let answer = self.control(host).get("/fleet/status");
            table = json(&answer);
            answer.status == 200 && is_wanted(&table)
        });
        table
    }

    /// Returns the time at which a host has paused for the pause of this name.
    #[track_caller]
    fn paused_at(&self, host: usize, name: &str) -> Duration {
        time_of(&self.host(host).wait_for_log(&format!("as \"fleet/{name}\"")))
    }

    /// Waits until a host has ended the pause of this name, and returns the time of that.
    #[track_caller]
    fn resumed_at(&self, host: usize, name: &str) -> Duration {
        let mut ended = None;
        wait_until(&format!("{name} has ended at host {host}"), || {
            ended = self.end_of(host, name);
            ended.is_some()
        });
        ended.unwrap()
    }

    /// Returns the time at which a host has ended the pause of this name, if it has.
    fn end_of(&self, host: usize, name: &str) -> Option<Duration> {
        let mark = format!("as \"fleet/{name}\"");
        let log = self.host(host).log_so_far();
        let line = log.lines().find(|line| line.contains(&mark) && line.contains("; it was by "));
        line.map(time_of)
    }

    /// Waits until all hosts have ended the pause of this name. Returns the first and the last time.
    #[track_caller]
    fn all_resumed(&self, name: &str) -> (Duration, Duration) {
        let mut times = Vec::new();
        self.each(|host, _proxy| times.push(self.resumed_at(host, name)));
        (*times.iter().min().unwrap(), *times.iter().max().unwrap())
    }

    /// Checks that these hosts have carried nothing between two times.
    #[track_caller]
    fn assert_quiet(&self, from: Duration, to: Duration, is_meant: impl Fn(usize) -> bool) {
        let carried = self.server.carried(from, to, is_meant);
        assert_eq!(carried, [], "carried between {from:?} and {to:?}");
    }
}

impl Run {
    /// Returns the time that the command tells next.
    #[track_caller]
    fn told(&self) -> Duration {
        let line = self.0.stdout.recv_timeout(PATIENCE);
        let line =
            line.unwrap_or_else(|_| panic!("{:?}", self.0.stderr.try_iter().collect::<Vec<_>>()));
        Duration::from_nanos(line.parse().expect("a time"))
    }

    /// Lets the command end. Returns the time of its end, and the lines of exec.
    #[track_caller]
    fn end(mut self) -> (Duration, String) {
        self.0.end();
        let ended = self.told();
        let code = self.0.code();
        let lines = lines(&self.0);
        assert_eq!(code, 0, "{lines}");
        (ended, lines)
    }
}

/// Returns all lines of an exec that has ended.
fn lines(exec: &Exec) -> String {
    exec.stderr.iter().collect::<Vec<_>>().join("\n")
}

/// Waits for an exec whose command is not run. Returns its exit code and lines.
#[track_caller]
fn refused(mut exec: Exec) -> (i32, String) {
    let code = exec.code();
    let lines = lines(&exec);
    assert_eq!(exec.stdout.iter().next(), None, "the command ran: {lines}");
    (code, lines)
}

fn name(host: usize) -> String {
    format!("h{host:02}")
}

/// Returns the row of a host in a table.
fn row(table: &Value, host: usize) -> &Value {
    let rows = table["hosts"].as_array().unwrap();
    rows.iter().find(|row| row["host"] == *name(host)).unwrap_or(&Value::Null)
}

fn json(answer: &Response) -> Value {
    serde_json::from_slice(&answer.body).unwrap_or_else(|error| panic!("{error} in {answer}"))
}

/// Returns the time of a line in a log, which was written in the last hours.
fn time_of(line: &str) -> Duration {
    let (_day, rest) = line.split_once('T').expect("a time");
    let digits =
        rest.split([':', '.', 'Z']).take(4).map(|part| part.parse::<u64>().expect("digits"));
    let [hours, minutes, seconds, millis] = digits.collect::<Vec<_>>()[..] else {
        panic!("{line}")
    };
    let time = ((hours * 60 + minutes) * 60 + seconds) * 1_000 + millis;
    let now = u64::try_from(clock().as_millis()).expect("a time of today");
    let day = 24 * 60 * 60 * 1_000;
    // Before now, and by less than a day.
    Duration::from_millis(now - (now % day + day - time) % day)
}

/// Returns the time from one moment to a later one in milliseconds; 0 for an earlier one, as logs round down.
fn millis(from: Duration, to: Duration) -> u128 {
    to.saturating_sub(from).as_millis()
}

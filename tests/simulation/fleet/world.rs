//! The course of events: hosts with clocks of their own, one store, and what lies between.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::AddAssign,
    time::Duration,
};

use crate::{
    commands::{Command, Order},
    etcd::{EXPIRY_DELAY_MAX, Etcd},
    faults::{Blow, Weather},
    fleet::{
        clock::{BootTime, Timing},
        coordinator::Margins,
        keys::{KeySpace, MemberRecord, OnDisconnect},
        member::{Member, MemberConfig},
        store::{Reply, Request, StoreError},
    },
    proxy::Proxy,
    random::Random,
    threads::{Client, Thread, ThreadId},
};

/// Real time in microseconds.
pub(crate) type Micros = u64;

pub(crate) const MILLI: Micros = 1_000;
pub(crate) const SECOND: Micros = 1_000_000;

pub(crate) fn micros(time: Duration) -> Micros {
    u64::try_from(time.as_micros()).expect("a short time")
}

/// Most steps of a thread at one moment: more are a loop without a wait.
const STEPS_MAX: u32 = 60;

/// One event, with the host whose process must run for it.
#[derive(Debug)]
pub(crate) enum Event {
    /// A thread goes on, unless it has taken another step since.
    Poll(ThreadId, u64),
    Do(ThreadId, u64),
    Done(ThreadId, u64),
    Answer(ThreadId, u64, BootTime, Result<Reply, StoreError>),
    Wake(ThreadId),
    /// A request reaches the store; a copy of it is answered to nobody.
    Arrive(Box<Message>),
    Expire,
    Client(usize),
    Connect(usize, u64),
    Close(usize, u64, u64),
    LedgerExpiry(usize),
    CutDue(usize, u64, BootTime),
    Continue(usize),
    Start(usize),
    Drained(usize, u64),
    Forget(usize),
    Command(usize, Order),
    NewCommand,
    Fault,
    Blow(Blow),
    Heal,
}

/// Request on its way.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    pub(crate) thread: ThreadId,
    pub(crate) token: u64,
    pub(crate) sent: BootTime,
    pub(crate) asked_at: Micros,
    pub(crate) endpoint: usize,
    pub(crate) connection: u64,
    pub(crate) request: Request,
    pub(crate) is_copy: bool,
}

/// One host, with at most one process of the proxy.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) name: String,
    /// Millionths by which its clock is fast.
    rate: i64,
    offset: Micros,
    pub(crate) record: MemberRecord,
    pub(crate) start_wait: Duration,
    pub(crate) keep_for: Duration,
    /// Number of the process.
    pub(crate) generation: u64,
    pub(crate) member: Option<Member>,
    pub(crate) thread: Thread,
    pub(crate) proxy: Proxy,
    pub(crate) stopped_until: Micros,
    pub(crate) cut_until: Micros,
    pub(crate) deaf_until: Micros,
    pub(crate) is_denied: bool,
    /// Of its member and of its coordinators.
    pub(crate) clients: [Client; 2],
    /// Sending of the last read that this process has an answer to, and that has found its state in the store.
    pub(crate) contact: Option<BootTime>,
    /// Revision of the last answer, and the number of restores before it.
    pub(crate) known: Option<(u64, i64, u32)>,
    /// True if it serves without contact since its start: the one hole of the policy.
    pub(crate) is_hole: bool,
    /// True if the store does not know it, as a backup was restored.
    pub(crate) is_unknown: bool,
    /// Ids that an operator has lifted here.
    pub(crate) forced_ids: BTreeSet<String>,
    /// Ids of its pauses, by name.
    pub(crate) ids: BTreeMap<String, String>,
    /// True if a backup was restored that it cannot have noticed.
    pub(crate) is_blind: bool,
}

/// Everything that happened.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) commands: u64,
    pub(crate) runs: u64,
    pub(crate) with_lost: u64,
    pub(crate) reaped: u64,
    pub(crate) fenced: u64,
    pub(crate) restored: u64,
    pub(crate) steps: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, more: Self) {
        self.commands += more.commands;
        self.runs += more.runs;
        self.with_lost += more.with_lost;
        self.reaped += more.reaped;
        self.fenced += more.fenced;
        self.restored += more.restored;
        self.steps += more.steps;
    }
}

/// A schedule.
pub(crate) struct World {
    pub(crate) now: Micros,
    pub(crate) random: Random,
    /// By their time, and in the order in which they were made.
    events: BTreeMap<(Micros, u64), Event>,
    sequence: u64,
    pub(crate) etcd: Etcd,
    pub(crate) backup: Option<Etcd>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) commands: Vec<Command>,
    /// Ids of the pauses that an operator has ended while their command ran.
    pub(crate) ended: BTreeSet<String>,
    pub(crate) weather: Weather,
    pub(crate) margins: Margins,
    /// True if nothing takes time but requests.
    pub(crate) is_exact: bool,
    pub(crate) heals_at: Micros,
    pub(crate) ends_at: Micros,
    /// Next look whether nothing is left.
    looks_at: Micros,
    pub(crate) is_healed: bool,
    connections: u64,
    steps: (Micros, u32),
    expiry: Option<Micros>,
    pub(crate) tally: Tally,
    tells: bool,
}

impl World {
    pub(crate) fn new(seed: u64, tells: bool) -> Self {
        let mut random = Random::new(seed);
        let is_exact = random.below(3) == 0;
        let margins =
            if is_exact { Margins { rate: 0, slack: Duration::ZERO } } else { Margins::default() };
        let heals_at = random.below(20) * SECOND + 10 * SECOND;
        let mut world = Self {
            now: 0,
            events: BTreeMap::new(),
            sequence: 0,
            etcd: Etcd::new(),
            backup: None,
            hosts: Vec::new(),
            commands: Vec::new(),
            ended: BTreeSet::new(),
            weather: Weather::new(&mut random),
            margins,
            is_exact,
            heals_at,
            ends_at: heals_at + 110 * SECOND,
            looks_at: heals_at + 4 * SECOND,
            is_healed: false,
            connections: 0,
            steps: (0, 0),
            expiry: None,
            tally: Tally::default(),
            tells,
            random,
        };
        world.add_hosts();
        let first = world.random.below(4 * SECOND);
        world.after(first + SECOND, Event::NewCommand);
        world.after(first, Event::Fault);
        world.after(heals_at, Event::Heal);
        world
    }

    fn add_hosts(&mut self) {
        let ttl = 5 + self.random.below(3_u64);
        for number in 0..2 + self.random.below(4) {
            let random = &mut self.random;
            let holds = random.below(2) == 0;
            let record = MemberRecord {
                identity: format!("machine-{number}"),
                boot: "b".to_owned(),
                on_disconnect: if holds { OnDisconnect::Hold } else { OnDisconnect::Serve },
                fence: Duration::from_secs(ttl),
                grace: Duration::from_secs(random.below(9)),
                version: "1".to_owned(),
            };
            let rate = if self.is_exact { 0 } else { i64::from(random.below(2_001_u32)) - 1_000 };
            self.hosts.push(Host {
                name: format!("h{number}"),
                rate,
                offset: random.below(1_000 * SECOND),
                record,
                start_wait: Duration::from_secs(1 + random.below(30)),
                keep_for: Duration::from_secs(40 + random.below(20)),
                generation: 0,
                member: None,
                thread: Thread::default(),
                proxy: Proxy::default(),
                stopped_until: 0,
                cut_until: 0,
                deaf_until: 0,
                is_denied: number > 0 && random.below(20) == 0,
                clients: [Client::default(); 2],
                contact: None,
                known: None,
                is_hole: false,
                is_unknown: false,
                forced_ids: BTreeSet::new(),
                ids: BTreeMap::new(),
                is_blind: false,
            });
            // Some come in the middle.
            let at =
                if random.below(5) == 0 { random.below(30 * SECOND) } else { random.below(SECOND) };
            self.after(at, Event::Start(number));
            let first = self.random.below(SECOND);
            self.after(first, Event::Client(number));
        }
    }

    /// Runs to the end, and judges it.
    pub(crate) fn run(mut self) -> Tally {
        while let Some(((at, _), event)) = self.events.pop_first() {
            assert!(at < self.ends_at, "{}", self.leftover().unwrap_or_default());
            self.now = at;
            if at >= self.looks_at {
                self.looks_at = at + SECOND;
                if self.leftover().is_none() {
                    break;
                }
            }
            if let Some(host) = self.process_of(&event)
                && at < self.hosts[host].stopped_until
            {
                let stopped_until = self.hosts[host].stopped_until;
                self.after(stopped_until + 1 - at, event);
                continue;
            }
            self.handle(event);
            self.tell_changes();
        }
        self.tally
    }

    pub(crate) fn after(&mut self, time: Micros, event: Event) {
        self.sequence += 1;
        self.events.insert((self.now + time, self.sequence), event);
    }

    /// Writes down what happens, if somebody replays it.
    pub(crate) fn tell(&self, text: impl FnOnce() -> String) {
        if self.tells {
            println!("{:>10.3} {}", self.now as f64 / 1e6, text());
        }
    }

    /// Draws a time of an action that may take one.
    pub(crate) fn moment(&mut self, most: Micros) -> Micros {
        if self.is_exact { 0 } else { self.random.below(most + 1) }
    }

    /// Returns the host whose process an event happens in.
    fn process_of(&self, event: &Event) -> Option<usize> {
        match event {
            Event::Poll(thread, _)
            | Event::Do(thread, _)
            | Event::Done(thread, _)
            | Event::Answer(thread, ..)
            | Event::Wake(thread) => Some(self.host_of(*thread)),
            Event::Client(host)
            | Event::Connect(host, _)
            | Event::Close(host, ..)
            | Event::LedgerExpiry(host)
            | Event::CutDue(host, ..)
            | Event::Drained(host, _) => Some(*host),
            Event::Command(command, Order::Begin | Order::Renew | Order::Finish) => {
                Some(self.commands[*command].host)
            }
            _ => None,
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Poll(thread, token) => self.poll_thread(thread, token),
            Event::Do(thread, token) => self.carry_out(thread, token),
            Event::Done(thread, token) => self.thread_has_done(thread, token),
            Event::Answer(thread, token, sent, result) => {
                self.thread_is_answered(thread, token, sent, result);
            }
            Event::Wake(thread) => self.wake(thread),
            Event::Arrive(message) => self.arrive(message),
            Event::Expire => {
                self.expiry = None;
                self.etcd.expire(self.now);
            }
            Event::Client(host) => self.client_comes(host),
            Event::Connect(host, generation) => self.connect(host, generation),
            Event::Close(host, generation, number) => self.close(host, generation, number),
            Event::LedgerExpiry(host) => self.expire_ledger(host),
            Event::CutDue(host, generation, fence) => self.judge_cut(host, generation, fence),
            Event::Continue(host) => self.go_on(host),
            Event::Start(host) => self.start(host),
            Event::Drained(host, generation) => self.drained(host, generation),
            Event::Forget(host) => self.forget(host),
            Event::Command(command, order) => self.order(command, order),
            Event::NewCommand => self.new_command(),
            Event::Fault => self.fault(),
            Event::Blow(blow) => self.strike(blow),
            Event::Heal => self.heal(),
        }
    }

    /// Guards against steps without end at one moment.
    pub(crate) fn count_step(&mut self, id: ThreadId) {
        self.tally.steps += 1;
        self.steps =
            if self.steps.0 == self.now { (self.now, self.steps.1 + 1) } else { (self.now, 1) };
        assert!(self.steps.1 < STEPS_MAX * 5, "{id:?} takes steps without a wait");
    }

    /// Tells the watches of changed keys, and looks when the next lease ends.
    fn tell_changes(&mut self) {
        let changed = self.etcd.take_changed();
        if !changed.is_empty() {
            let of_pauses = changed.iter().any(|key| key.contains("/pause/"));
            for host in 0..self.hosts.len() {
                if of_pauses && self.hosts[host].member.is_some() {
                    self.ring(ThreadId::Member(host));
                }
            }
            for command in 0..self.commands.len() {
                if self.commands[command].coordinator.is_some() {
                    self.ring(ThreadId::Coordinator(command));
                }
            }
        }
        let Some(next) = self.etcd.next_expiry() else { return };
        if self.expiry.is_none_or(|at| at > next) {
            let delay = if self.is_exact { 0 } else { self.random.below(EXPIRY_DELAY_MAX) };
            self.expiry = Some(next);
            self.after((next + delay).saturating_sub(self.now), Event::Expire);
        }
    }

    fn ring(&mut self, thread: ThreadId) {
        let host = &self.hosts[self.host_of(thread)];
        let is_deaf = self.now < host.deaf_until.max(host.cut_until);
        if !is_deaf && self.random.below(100_u32) >= self.weather.deaf {
            let delay = self.random.below(15 * MILLI) + MILLI;
            self.after(delay, Event::Wake(thread));
        }
    }

    pub(crate) fn new_connection(&mut self) -> u64 {
        self.connections += 1;
        self.connections
    }

    /// Starts the process of a host.
    fn start(&mut self, number: usize) {
        if self.hosts[number].member.is_some() || self.is_healed && number > 0 {
            return;
        }
        let connections = [self.new_connection(), self.new_connection()];
        let now = self.hosts[number].local(self.now);
        let host = &mut self.hosts[number];
        host.generation += 1;
        let config = MemberConfig {
            keys: KeySpace::new("/t", "f"),
            host: host.name.clone(),
            instance: format!("{}-{}", host.name, host.generation),
            record: host.record.clone(),
            start_wait: host.start_wait,
        };
        host.member = Some(Member::new(config, now));
        host.proxy = Proxy::starting();
        host.clients = connections.map(|connection| Client { endpoint: 0, connection });
        (host.contact, host.known, host.is_hole, host.is_blind) = (None, None, false, false);
        host.forced_ids.clear();
        host.ids.clear();
        self.tell(|| format!("h{number} starts"));
        self.except_newcomer(number);
        self.go_to_poll(ThreadId::Member(number), 0);
    }
}

impl Host {
    /// Returns the time by the clock of this host.
    pub(crate) fn local(&self, now: Micros) -> BootTime {
        let fast = i128::from(now) * i128::from(self.rate) / 1_000_000;
        let local = i128::from(self.offset) + i128::from(now) + fast;
        BootTime(Duration::from_micros(u64::try_from(local).expect("a time")))
    }

    /// Returns the real time at which the clock of this host shows `local`, or some microseconds later.
    pub(crate) fn real(&self, local: BootTime) -> Micros {
        let since =
            i128::from(micros(local.0.min(Duration::from_secs(1 << 30)))) - i128::from(self.offset);
        let real = since * 1_000_000 / (1_000_000 + i128::from(self.rate));
        u64::try_from(real.max(0)).expect("a time") + 2
    }

    pub(crate) fn holds(&self) -> bool {
        self.record.on_disconnect == OnDisconnect::Hold
    }

    pub(crate) fn timing(&self) -> Timing {
        Timing::new(self.record.fence)
    }
}

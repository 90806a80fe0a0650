//! Faults: of the store, the network, processes and hosts, and the deeds of operators.

use std::collections::BTreeSet;

use crate::{
    proxy::Proxy,
    random::Random,
    threads::{Client, ThreadId},
    world::{Event, MILLI, Micros, SECOND, World},
};

/// Likelihood of what goes wrong by itself, and times until which it does.
#[derive(Debug)]
pub(crate) struct Weather {
    /// True if nothing goes wrong.
    pub(crate) is_calm: bool,
    /// True if the network loses, doubles or delays something at times.
    pub(crate) is_lossy: bool,
    /// Thousandths of the requests, and of the answers.
    pub(crate) lost: u32,
    pub(crate) doubled: u32,
    pub(crate) late: u32,
    /// Hundredths of the events that a watch does not tell.
    pub(crate) deaf: u32,
    /// Steps of two thousand after which a process stands still.
    pub(crate) stops: u32,
    interval: Micros,
    /// Members of the store that are cut off from the others.
    pub(crate) stalled_until: [Micros; 3],
    /// Connections over which one of them has renewed what it could not: its stall outlasts the transaction behind.
    pub(crate) stalled: BTreeSet<u64>,
    pub(crate) leaderless_until: Micros,
    pub(crate) full_until: Micros,
}

/// One thing that goes wrong.
#[derive(Debug)]
pub(crate) enum Blow {
    /// The network of a host.
    Cut(usize, Micros),
    /// The session of a host ends in the store.
    EndSession(usize),
    /// The holder of a command's pause ends in the store.
    EndHolder(usize),
    /// The endpoint that a host's coordinators ask.
    Stall(usize, Micros),
}

impl Weather {
    pub(crate) fn new(random: &mut Random) -> Self {
        let is_calm = random.below(10) == 0;
        let mut some =
            |most: u32| if is_calm || random.below(2) == 0 { 0 } else { random.below(most) };
        let (lost, doubled, late) = (some(40), some(60), some(40));
        // Some repeat as much as not.
        let doubled = if doubled > 52 { 500 } else { doubled };
        Self {
            is_calm,
            is_lossy: lost + doubled + late > 0,
            lost,
            doubled,
            late,
            deaf: some(120),
            stops: some(8),
            interval: SECOND + u64::from(some(8)) * SECOND,
            stalled_until: [0; 3],
            stalled: BTreeSet::new(),
            leaderless_until: 0,
            full_until: 0,
        }
    }
}

impl World {
    /// Has one thing go wrong, and a next one later.
    pub(crate) fn fault(&mut self) {
        if self.is_healed || self.weather.is_calm {
            return;
        }
        let next = self.random.below(2 * self.weather.interval) + MILLI;
        self.after(next, Event::Fault);
        let host = self.random.below(self.hosts.len());
        let time = self.random.spread(15_000) * MILLI;
        match self.random.below(40_u32) {
            0..=6 => {
                // Some are cut off for longer than they stay paused.
                let time = match self.random.below(10) {
                    0 => 5 * time,
                    1..5 => self.random.below(20 * SECOND),
                    _ => time,
                };
                self.strike(Blow::Cut(host, time));
            }
            7..=9 => self.hosts[host].deaf_until = self.now + time,
            10..=13 => self.stop_process(host),
            14..=17 => self.crash(host),
            18..=19 => self.leave(host),
            20..=22 => self.force(host),
            23 => {
                let name = self.random.one_of(["a", "b"]);
                self.tell(|| format!("an operator ends {name}"));
                if let Some(record) = self.etcd.record(name) {
                    self.etcd.resume(name);
                    let command = self.command_of(&record.id);
                    if command.is_some_and(|it| it.stage == crate::commands::Stage::Running) {
                        self.ended.insert(record.id);
                    }
                }
            }
            24..=29 => self.revoke_any(),
            30..=32 => {
                self.tell(|| "an election".to_owned());
                self.weather.leaderless_until = self.now + time.min(3 * SECOND);
                self.etcd.elect(self.now);
            }
            33 => self.weather.leaderless_until = self.now + time,
            34..=35 => {
                let endpoint = self.random.below(3_usize);
                self.weather.stalled_until[endpoint] = self.now + time;
            }
            36 => {
                self.weather.full_until = self.now + time;
                self.revoke_any();
            }
            37..=38 => self.backup = Some(self.etcd.clone()),
            _ => self.restore(),
        }
    }

    pub(crate) fn strike(&mut self, blow: Blow) {
        if self.is_healed {
            return;
        }
        self.tell(|| format!("{blow:?}"));
        let lease = match blow {
            Blow::Cut(host, time) => {
                self.hosts[host].cut_until = self.now + time;
                return;
            }
            Blow::Stall(host, time) => {
                let Client { endpoint, .. } = self.hosts[host].clients[1];
                self.weather.stalled_until[endpoint] = self.now + time;
                return;
            }
            Blow::EndSession(host) => {
                let key = format!("/t/f/state/{}", self.hosts[host].name);
                self.etcd.keys.get(&key).and_then(|state| state.lease)
            }
            Blow::EndHolder(command) => {
                self.etcd.holder(&self.commands[command].name).and_then(|holder| holder.lease)
            }
        };
        lease.into_iter().for_each(|lease| self.etcd.revoke(self.now, lease));
    }

    /// Has a command meet what by chance alone would be rare.
    pub(crate) fn beset(&mut self, command: usize) {
        let coordinator = self.commands[command].host;
        let begins = self.random.below(3 * SECOND);
        let gap = self.random.below(9 * SECOND);
        if self.random.below(3) == 0 {
            // Its holder must be put anew, and its new lease is counted as gone.
            self.after(begins, Event::Blow(Blow::EndHolder(command)));
            self.after(begins + gap / 6, Event::Blow(Blow::Stall(coordinator, 4 * SECOND)));
            return;
        }
        let victim = self.random.below(self.hosts.len());
        if victim == coordinator || !self.hosts[victim].holds() {
            return;
        }
        // A host that holds, and carries somebody, loses its session and all contact at once.
        self.hosts[victim].proxy.stays = self.random.below(30 * SECOND);
        self.client_tries(victim);
        self.after(begins, Event::Blow(Blow::EndSession(victim)));
        let mut ends = begins;
        if self.random.below(2) == 0 {
            // Before that it loses its session alone, and the coordinator does not see that it has another one.
            ends += gap;
            let unseen = gap.saturating_sub(300 * MILLI);
            self.after(begins + 300 * MILLI, Event::Blow(Blow::Cut(coordinator, unseen)));
            let ends = ends.saturating_sub(50 * MILLI);
            self.after(ends, Event::Blow(Blow::EndSession(victim)));
        }
        let ends = ends.saturating_sub(50 * MILLI);
        self.after(ends, Event::Blow(Blow::Cut(victim, 30 * SECOND)));
    }

    /// Has a process stand still for a while. Turns that have admitted a client end before.
    pub(crate) fn stop_process(&mut self, number: usize) {
        if self.hosts[number].member.is_none() || self.now < self.hosts[number].stopped_until {
            return;
        }
        let time = self.random.spread(30_000) * MILLI;
        self.tell(|| format!("h{number} stands still for {time} us"));
        let generation = self.hosts[number].generation;
        for _ in 0..self.hosts[number].proxy.turns.len() {
            self.connect(number, generation);
        }
        self.hosts[number].stopped_until = self.now + time;
        self.trouble_commands(number, self.now + time);
        self.after(time, Event::Continue(number));
    }

    /// Notes that a process, and with it its coordinators, does not go on as it should.
    fn trouble_commands(&mut self, number: usize, until: Micros) {
        let of_host = self.commands.iter_mut().filter(|command| command.host == number);
        of_host.for_each(|command| command.troubled_at = command.troubled_at.max(until));
    }

    /// Has a process go on. The worker looks at its fence before it carries a byte.
    pub(crate) fn go_on(&mut self, number: usize) {
        let host = &mut self.hosts[number];
        if self.now < host.stopped_until || host.member.is_none() {
            return;
        }
        let local = host.local(self.now);
        let grace = host.record.grace;
        if host.proxy.fence.is_some_and(|fence| local >= fence + grace) {
            host.proxy.carried.clear();
        }
        if !host.proxy.carried.is_empty() {
            self.judge_carrying(number);
        }
    }

    /// Ends a process without a word, or the host with all commands on it.
    fn crash(&mut self, number: usize) {
        if self.hosts[number].member.is_none() {
            return;
        }
        self.tell(|| format!("h{number} crashes"));
        self.end_process(number);
        if self.random.below(2) == 0 {
            let of_host = self.commands.iter_mut().filter(|command| command.host == number);
            of_host.for_each(|command| command.stage = crate::commands::Stage::Over);
        }
        let time = self.random.spread(20_000) * MILLI;
        match self.random.below(4_u32) {
            0 => self.after(time, Event::Forget(number)),
            _ => self.after(time, Event::Start(number)),
        }
    }

    pub(crate) fn forget(&mut self, number: usize) {
        if self.hosts[number].member.is_none() {
            self.tell(|| format!("an operator forgets h{number}"));
            let name = self.hosts[number].name.clone();
            self.etcd.forget(&name);
            if !self.is_healed && self.random.below(2) == 0 {
                let time = self.random.below(20 * SECOND);
                self.after(time, Event::Start(number));
            }
        }
    }

    /// Has a host leave in good order.
    fn leave(&mut self, number: usize) {
        let coordinates =
            self.commands.iter().any(|it| it.host == number && it.coordinator.is_some());
        let host = &mut self.hosts[number];
        if host.member.is_none() || coordinates || host.proxy.is_draining {
            return;
        }
        host.proxy.is_draining = true;
        let generation = host.generation;
        let time = self.random.below(2 * SECOND);
        self.tell(|| format!("h{number} drains"));
        self.after(time, Event::Drained(number, generation));
    }

    pub(crate) fn drained(&mut self, number: usize, generation: u64) {
        let host = &mut self.hosts[number];
        if host.generation != generation {
            return;
        }
        let Some(member) = &mut host.member else { return };
        host.proxy.carried.clear();
        host.proxy.turns.clear();
        member.stop();
        self.nudge(ThreadId::Member(number));
    }

    /// Has an operator lift all pauses of one host.
    fn force(&mut self, number: usize) {
        let host = &mut self.hosts[number];
        if host.member.is_none() || self.now < host.stopped_until {
            return;
        }
        let leases = std::mem::take(&mut host.proxy.leases);
        if leases.is_empty() {
            return;
        }
        for name in leases.into_keys() {
            let host = &mut self.hosts[number];
            host.proxy.forced.insert(name.clone());
            let Some(id) = host.ids.get(&name).cloned() else { continue };
            host.forced_ids.insert(id.clone());
            self.tell(|| format!("an operator forces {id} on h{number}"));
            if let Some(command) = self.command_of(&id) {
                command.exempt.insert(number);
            }
        }
        self.nudge(ThreadId::Member(number));
        self.client_tries(number);
    }

    fn restore(&mut self) {
        let Some(backup) = self.backup.take() else { return };
        let as_another = self.random.below(2) == 0;
        self.tell(|| format!("a backup of revision {} is restored", backup.revision));
        self.tally.restored += 1;
        self.etcd.restore(&backup, self.now, as_another);
        for host in &mut self.hosts {
            let key = format!("/t/f/member/{}", host.name);
            host.is_unknown |= host.member.is_some() && !self.etcd.keys.contains_key(&key);
        }
        for number in 0..self.hosts.len() {
            self.except_newcomer(number);
        }
        self.commands.iter_mut().for_each(|command| command.troubled_at = self.now + 5 * SECOND);
    }

    /// Ends all that goes wrong. Hosts that are down are forgotten.
    pub(crate) fn heal(&mut self) {
        self.tell(|| "all is well from now on".to_owned());
        self.is_healed = true;
        let weather = &mut self.weather;
        (weather.lost, weather.doubled, weather.late, weather.deaf, weather.stops) =
            (0, 0, 0, 0, 0);
        (weather.stalled_until, weather.leaderless_until, weather.full_until) = ([0; 3], 0, 0);
        for number in 0..self.hosts.len() {
            let host = &mut self.hosts[number];
            (host.cut_until, host.deaf_until) = (0, 0);
            if host.member.is_none() && number == 0 {
                // Somebody must be there to delete what others have left.
                self.after(0, Event::Start(0));
            } else if host.member.is_none() {
                host.proxy = Proxy { is_draining: true, ..Proxy::default() };
                self.after(15 * SECOND, Event::Forget(number));
            }
        }
    }
}

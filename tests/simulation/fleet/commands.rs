//! Commands that are to run while the fleet is paused, and their callers.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    fleet::{
        coordinator::{Coordinator, CoordinatorConfig, Phase, Wanted},
        keys::KeySpace,
    },
    threads::{Thread, ThreadId},
    world::{Event, MILLI, Micros, SECOND, World, micros},
};

/// Deed of a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Runs the command, as it has read that all hosts are idle.
    Begin,
    Renew,
    /// Has waited for long enough.
    WaitOver,
    /// The command has ended.
    End,
    /// Ends the pause behind the command.
    Finish,
    /// Looks whether all have resumed.
    Check,
}

/// State of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Waiting,
    /// All hosts were idle, and the caller will read that.
    Ready,
    Running,
    Over,
}

/// One command with its pause.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) host: usize,
    pub(crate) coordinator: Option<Coordinator>,
    pub(crate) thread: Thread,
    pub(crate) name: String,
    pub(crate) id: String,
    pub(crate) stage: Stage,
    pub(crate) ttl: Duration,
    pub(crate) is_bound: bool,
    /// Host that is left out by name.
    pub(crate) without: Option<usize>,
    /// Hosts that may carry: forced by an operator, or without contact for too long.
    pub(crate) exempt: BTreeSet<usize>,
    /// Last time at which a request failed, or its process stood still.
    pub(crate) troubled_at: Micros,
    kills: bool,
    is_caller_dead: bool,
    /// Wishes that its thread has not taken yet.
    wishes: Wishes,
}

/// Wishes of a caller.
#[derive(Debug, Default)]
struct Wishes {
    kills: bool,
    renews: bool,
    ends: bool,
}

impl World {
    pub(crate) fn new_command(&mut self) {
        if self.is_healed {
            return;
        }
        let next = self.random.below(12 * SECOND) + SECOND / 2;
        self.after(next, Event::NewCommand);
        let host = self.random.below(self.hosts.len());
        let is_up = self.hosts[host].member.as_ref().is_some_and(|member| member.has_session());
        if !is_up || self.hosts[host].proxy.is_draining || self.now < self.hosts[host].stopped_until
        {
            return;
        }
        let random = &mut self.random;
        let name = random.one_of(["a", "b"]).to_owned();
        let ttl = Duration::from_secs(5 + random.below(7));
        let is_bound = random.below(5) > 0;
        let wait = random.below(24 * SECOND) + SECOND;
        let left_out = (random.below(8) == 0).then(|| random.below(self.hosts.len()));
        let kills = random.below(4) == 0;
        let command = self.commands.len();
        let id = format!("id-{command}");
        let config = CoordinatorConfig {
            keys: KeySpace::new("/t", "f"),
            host: self.hosts[host].name.clone(),
            id: id.clone(),
            began: 0,
            is_bound,
            margins: self.margins,
        };
        let wanted = Wanted {
            name: name.clone(),
            by: format!("root on h{host}"),
            ttl,
            without: left_out.iter().map(|&host| self.hosts[host].name.clone()).collect(),
            ..Wanted::default()
        };
        let local = self.hosts[host].local(self.now);
        self.tell(|| format!("h{host} begins {id}, {name}, ttl {ttl:?}, without {left_out:?}"));
        self.commands.push(Command {
            host,
            coordinator: Some(Coordinator::new(config, wanted, local)),
            thread: Thread::default(),
            name,
            id,
            stage: Stage::Waiting,
            ttl,
            is_bound,
            without: left_out,
            exempt: BTreeSet::new(),
            troubled_at: 0,
            kills,
            is_caller_dead: false,
            wishes: Wishes::default(),
        });
        self.tally.commands += 1;
        self.go_to_poll(ThreadId::Coordinator(command), 0);
        self.after(wait, Event::Command(command, Order::WaitOver));
        self.after(micros(ttl) / 3, Event::Command(command, Order::Renew));
        if !self.weather.is_calm && self.random.below(3) == 0 {
            self.beset(command);
        }
    }

    /// Passes what a caller wishes on to its coordinator, before the next step.
    pub(crate) fn pass_wishes(&mut self, number: usize) {
        let local = self.hosts[self.commands[number].host].local(self.now);
        let command = &mut self.commands[number];
        let Wishes { kills, renews, ends } = std::mem::take(&mut command.wishes);
        let Some(coordinator) = &mut command.coordinator else { return };
        if kills {
            coordinator.kill();
        }
        if renews {
            coordinator.renew(local);
        }
        if ends {
            coordinator.end(local);
        }
    }

    /// Looks what a coordinator tells its caller.
    pub(crate) fn look_at_phase(&mut self, number: usize) {
        let command = &self.commands[number];
        self.judge_belief(command);
        let Some(coordinator) = &command.coordinator else { return };
        match (coordinator.phase(), command.stage) {
            (Phase::Idle, Stage::Waiting) => {
                self.tell(|| format!("{} is idle", self.commands[number].id));
                self.commands[number].stage = Stage::Ready;
                let delay = self.moment(20 * MILLI);
                self.after(delay, Event::Command(number, Order::Begin));
            }
            (Phase::Refused(_) | Phase::Ended { .. }, Stage::Waiting | Stage::Ready) => {
                self.tell(|| {
                    let command = &self.commands[number];
                    let phase = command.coordinator.as_ref().map(Coordinator::phase);
                    format!("{} is over: {phase:?}", command.id)
                });
                self.commands[number].stage = Stage::Over;
            }
            _ => {}
        }
    }

    pub(crate) fn order(&mut self, number: usize, order: Order) {
        let command = &mut self.commands[number];
        let has_coordinator = command.coordinator.is_some();
        match order {
            Order::Begin => self.begin(number),
            Order::Renew => {
                if has_coordinator && command.is_bound && !command.is_caller_dead {
                    command.wishes.renews = true;
                    let next = micros(command.ttl) / 3;
                    self.after(next, Event::Command(number, Order::Renew));
                    self.nudge(ThreadId::Coordinator(number));
                }
            }
            Order::WaitOver => {
                if command.stage != Stage::Waiting || !has_coordinator {
                    return;
                }
                if std::mem::take(&mut command.kills) {
                    command.wishes.kills = true;
                    self.after(2 * SECOND, Event::Command(number, Order::WaitOver));
                } else {
                    command.wishes.ends = true;
                    command.stage = Stage::Over;
                }
                self.nudge(ThreadId::Coordinator(number));
            }
            Order::End => {
                if command.stage == Stage::Running {
                    command.stage = Stage::Over;
                    self.tell(|| format!("the command of {} has ended", self.commands[number].id));
                    // Some callers die, and only their silence tells.
                    let dies = self.commands[number].is_bound && self.random.below(8) == 0;
                    self.commands[number].is_caller_dead = dies;
                    if !dies {
                        self.after(0, Event::Command(number, Order::Finish));
                    }
                }
            }
            Order::Finish => {
                if has_coordinator {
                    command.wishes.ends = true;
                    self.nudge(ThreadId::Coordinator(number));
                    self.after(SECOND / 2, Event::Command(number, Order::Check));
                }
            }
            Order::Check => self.judge_resumed(number),
        }
    }

    fn begin(&mut self, number: usize) {
        let command = &mut self.commands[number];
        let phase = command.coordinator.as_ref().map(Coordinator::phase);
        if command.stage != Stage::Ready || phase != Some(&Phase::Idle) {
            command.stage = Stage::Over;
            return;
        }
        command.stage = Stage::Running;
        self.tally.runs += 1;
        self.tell(|| format!("the command of {} begins", self.commands[number].id));
        let time = self.random.spread(20_000) * MILLI;
        self.after(time, Event::Command(number, Order::End));
        for host in 0..self.hosts.len() {
            if !self.hosts[host].proxy.carried.is_empty() {
                self.judge_carrying(host);
            }
            let key = format!("/t/f/state/{}", self.hosts[host].name);
            let is_lost = !self.etcd.keys.contains_key(&key);
            self.tally.with_lost += u64::from(is_lost && self.hosts[host].member.is_some());
        }
    }

    /// Returns the command of a pause.
    pub(crate) fn command_of(&mut self, id: &str) -> Option<&mut Command> {
        self.commands.iter_mut().find(|command| command.id == id)
    }

    /// Ends a lease without reason, as a leader that was stalled does: that of a holder as often as any other.
    pub(crate) fn revoke_any(&mut self) {
        let name = self.random.one_of(["a", "b"]);
        let of_holder = self.etcd.holder(name).and_then(|holder| holder.lease);
        let of_holder = of_holder.filter(|_| self.random.below(2) == 0);
        let number = self.random.below(16);
        if let Some(lease) = of_holder.or_else(|| self.etcd.any_lease(number)) {
            self.tell(|| format!("etcd revokes {lease:?}"));
            self.etcd.revoke(self.now, lease);
        }
    }
}

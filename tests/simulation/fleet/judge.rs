//! Judgement of a course: no host carries inside a command, a pause ends by its deletion alone and not too early, a host that
//! holds is fenced in time, and in the end nothing is left.

use crate::{
    commands::{Command, Stage},
    fleet::{
        clock::BootTime,
        coordinator::Phase,
        keys::State,
        step::Doing,
        store::{Answer, Operation, Reply, Request, Revision, StoreError},
    },
    threads::ThreadId,
    world::{Event, MILLI, Micros, SECOND, World, micros},
};

/// Time for a deed behind its deadline.
const DEED_TIME: Micros = 100 * MILLI;

impl World {
    /// A host carries: it must be no part of a command whose record is there.
    pub(crate) fn judge_carrying(&self, number: usize) {
        let host = &self.hosts[number];
        if host.is_hole || host.is_unknown || host.is_blind || self.now < host.stopped_until {
            return;
        }
        for command in &self.commands {
            let is_covered =
                command.stage == Stage::Running && !self.etcd.deleted.contains(&command.id);
            let is_left_out = command.without == Some(number) || command.exempt.contains(&number);
            let may_carry = !is_covered || is_left_out;
            assert!(may_carry, "h{number} carries inside the command of {}", command.id);
        }
    }

    /// A client of a host wants to be served, as there is always one.
    pub(crate) fn client_tries(&mut self, number: usize) {
        let host = &self.hosts[number];
        let local = host.local(self.now);
        if host.member.is_none() || self.now < host.stopped_until || !host.proxy.admits(local) {
            return;
        }
        if host.holds() {
            let is_heard = host.contact.is_some_and(|at| local < at + host.record.fence);
            assert!(is_heard, "h{number} admits a client without contact");
        }
        let generation = host.generation;
        let turn = self.moment(30 * MILLI);
        self.hosts[number].proxy.turns.push(self.now + turn);
        if turn == 0 {
            self.connect(number, generation);
        } else {
            self.after(turn, Event::Connect(number, generation));
        }
    }

    pub(crate) fn client_comes(&mut self, number: usize) {
        if !self.is_healed {
            let next = self.random.below(1_500 * MILLI) + 20 * MILLI;
            self.after(next, Event::Client(number));
            self.client_tries(number);
        }
    }

    /// A turn ends: the client that it has admitted is carried from now on.
    pub(crate) fn connect(&mut self, number: usize, generation: u64) {
        let host = &mut self.hosts[number];
        if host.generation != generation || host.proxy.turns.is_empty() {
            return;
        }
        let first = host.proxy.turns.iter().enumerate().min_by_key(|(_, at)| **at);
        let first = first.map_or(0, |(index, _)| index);
        host.proxy.turns.remove(first);
        let connection = self.new_connection();
        self.hosts[number].proxy.carried.insert(connection);
        self.judge_carrying(number);
        let is_long = self.random.below(10) == 0;
        let most = if is_long { self.random.below(15_000) + 1 } else { 1 };
        let time = self.random.spread(8_000).max(most) * MILLI;
        let time = time.max(std::mem::take(&mut self.hosts[number].proxy.stays));
        self.after(time, Event::Close(number, generation, connection));
    }

    pub(crate) fn close(&mut self, number: usize, generation: u64, connection: u64) {
        let host = &mut self.hosts[number];
        if host.generation == generation
            && host.proxy.carried.remove(&connection)
            && host.proxy.carried.is_empty()
            && !host.proxy.leases.is_empty()
        {
            self.nudge(ThreadId::Member(number));
        }
    }

    /// A deed is ordered: it must be right.
    pub(crate) fn judge_doing(&mut self, number: usize, doing: &Doing) {
        match doing {
            Doing::Pause { name, record } => {
                let was_forced = self.hosts[number].forced_ids.contains(&record.id);
                assert!(!was_forced, "h{number} pauses what an operator has lifted");
                let is_there = self.etcd.has_record(name, &record.id);
                let may_be = self.weather.is_lossy || self.etcd.restores > 0;
                let was_ended = self.ended.contains(&record.id) && !may_be;
                assert!(!is_there || !was_ended, "{} is there again", record.id);
            }
            Doing::Resume { name } => {
                let host = &self.hosts[number];
                let holds = host.proxy.leases.contains_key(name);
                let Some(id) = host.ids.get(name).filter(|_| holds).cloned() else { return };
                if self.etcd.deleted.contains(&id) || host.is_blind {
                    return;
                }
                assert!(host.is_denied, "h{number} resumes {id}, whose record is not deleted");
                let is_orphan = self.etcd.has_record(name, &id) && self.has_lingered(&id);
                assert!(is_orphan, "h{number} resumes {id}, though somebody looks after it");
                if let Some(command) = self.command_of(&id) {
                    command.exempt.insert(number);
                }
            }
            Doing::Start => {
                let host = &mut self.hosts[number];
                let has_session = host.member.as_ref().is_some_and(|member| member.has_session());
                assert!(has_session || !host.holds(), "h{number} starts without contact");
                host.is_hole = !has_session;
            }
            Doing::Lose => self.tally.fenced += 1,
            _ => {}
        }
    }

    /// A member asks for a write of its state: it must hold what it acknowledges.
    pub(crate) fn judge_request(&self, number: usize, request: &Request) {
        let Request::Transact(request) = request else { return };
        for operation in &request.then {
            let Operation::Put { key, value, .. } = operation else { continue };
            if !key.contains("/state/") {
                continue;
            }
            let state: State = serde_json::from_str(value).expect("a state");
            let leases = &self.hosts[number].proxy.leases;
            let holds = state.acks.keys().all(|name| leases.contains_key(name));
            assert!(holds, "h{number} acknowledges what it does not hold");
        }
    }

    /// A coordinator must not believe that its holder stays for longer than its lease does.
    pub(crate) fn judge_belief(&self, command: &Command) {
        let Some(coordinator) = &command.coordinator else { return };
        if !matches!(coordinator.phase(), Phase::Waiting(_) | Phase::Idle) || self.etcd.restores > 0
        {
            return;
        }
        let host = &self.hosts[command.host];
        let lease = self.etcd.holder(&command.name).and_then(|holder| holder.lease);
        let Some(expires) = lease.and_then(|lease| self.etcd.expires(lease)) else { return };
        if self.etcd.has_record(&command.name, &command.id) {
            let believed = host.real(coordinator.kept_until());
            let most = expires + micros(command.ttl) / 900 + MILLI;
            assert!(believed <= most, "{} believes in its lease for too long", command.id);
        }
    }

    /// A deed is carried out: remembers what it changes, and what comes of it.
    pub(crate) fn after_deed(&mut self, number: usize, doing: &Doing) {
        let host = &mut self.hosts[number];
        match doing {
            Doing::Pause { name, record } => {
                let before = host.ids.insert(name.clone(), record.id.clone());
                // A record that a backup did not have is replaced by another.
                let before = before.filter(|before| *before != record.id);
                before.iter().for_each(|before| _ = host.forced_ids.remove(before));
                if let Some(command) = before.and_then(|before| self.command_of(&before)) {
                    command.exempt.insert(number);
                }
                if let Some(command) = self.command_of(&record.id) {
                    command.exempt.retain(|&it| it != number || command.stage == Stage::Running);
                }
                self.watch_ledger(number);
            }
            Doing::Renew { .. } => self.watch_ledger(number),
            Doing::Resume { name } => {
                let id = host.ids.remove(name).unwrap_or_default();
                host.forced_ids.remove(&id);
            }
            Doing::FenceAt(Some(at)) => {
                let cut = host.real(*at + host.record.grace).max(self.now) + DEED_TIME;
                let event = Event::CutDue(number, host.generation, *at);
                self.after(cut.saturating_sub(self.now), event);
            }
            _ => {}
        }
    }

    fn watch_ledger(&mut self, number: usize) {
        let host = &self.hosts[number];
        let Some(at) = host.proxy.leases.values().min().map(|&at| host.real(at)) else { return };
        self.after(at.saturating_sub(self.now), Event::LedgerExpiry(number));
    }

    pub(crate) fn expire_ledger(&mut self, number: usize) {
        let host = &mut self.hosts[number];
        let local = host.local(self.now);
        for name in host.proxy.expire(local) {
            let Some(id) = self.hosts[number].ids.get(&name).cloned() else { continue };
            self.tell(|| format!("h{number} has kept {id} for long enough"));
            if let Some(command) = self.command_of(&id) {
                command.exempt.insert(number);
            }
        }
        self.watch_ledger(number);
        self.client_tries(number);
    }

    pub(crate) fn judge_cut(&self, number: usize, generation: u64, fence: BootTime) {
        let host = &self.hosts[number];
        if host.generation == generation && host.proxy.fence == Some(fence) {
            assert!(host.proxy.carried.is_empty(), "h{number} carries beyond its grace period");
        }
    }

    fn has_lingered(&self, id: &str) -> bool {
        let Some(command) = self.commands.iter().find(|command| command.id == id) else {
            return false;
        };
        // Not by the source, as that may be wrong.
        let ttl = micros(command.ttl);
        let linger = ttl / 3 + 3 * (ttl / 10).clamp(SECOND, 3 * SECOND);
        // By the fastest clock.
        let linger = linger - linger / 900;
        self.etcd.orphaned.get(id).is_some_and(|&at| self.now >= at + linger)
    }

    /// A record was deleted just now by this thread.
    pub(crate) fn judge_deletion(&mut self, thread: ThreadId) {
        let id = self.etcd.last_deleted.clone();
        let Some(command) = self.commands.iter().find(|command| command.id == id) else { return };
        match thread {
            ThreadId::Member(host) => {
                // A request by what was seen before may find the same in a backup.
                if self.etcd.restores > 0 {
                    return;
                }
                self.tally.reaped += 1;
                assert!(self.has_lingered(&id), "h{host} deletes {id} too early");
                let orphaned = self.etcd.orphaned[&id];
                let phase = command.coordinator.as_ref().map(|it| it.phase());
                let lives = matches!(phase, Some(Phase::Waiting(_) | Phase::Idle));
                let was_troubled = command.troubled_at + 5 * SECOND > orphaned
                    || self.now < self.weather.full_until + 5 * SECOND;
                assert!(!lives || was_troubled, "{id} ends though its coordinator lives");
            }
            ThreadId::Coordinator(_) => {
                let is_right = command.stage != Stage::Running || !command.is_bound;
                assert!(is_right, "the coordinator of {id} ends it in the middle");
            }
        }
    }

    /// Returns true if the store has a state that the process of this host has put.
    pub(crate) fn has_state(&self, number: usize) -> bool {
        let host = &self.hosts[number];
        let begin = format!("{{\"instance\":\"{}-{}-", host.name, host.generation);
        let state = self.etcd.keys.get(&format!("/t/f/state/{}", host.name));
        state.is_some_and(|state| state.value.starts_with(&begin))
    }

    /// An answer reaches a member.
    pub(crate) fn note_contact(
        &mut self,
        number: usize,
        sent: BootTime,
        result: &Result<Reply, StoreError>,
    ) {
        let restores = self.etcd.restores;
        let host = &mut self.hosts[number];
        let Ok(Reply { answer: Answer::Transacted { .. }, cluster, revision, .. }) = result else {
            return;
        };
        let Revision(revision) = *revision;
        if host.thread.has_state {
            host.contact = Some(sent);
        }
        // Nobody can tell a backup that has caught up from the store that it has replaced.
        host.is_blind |= host
            .known
            .is_some_and(|known| known.2 != restores && known.0 == *cluster && revision >= known.1);
        host.known = Some((*cluster, revision, restores));
    }

    /// A process has not heard of a pause, and the store does not know of it any more.
    pub(crate) fn except_newcomer(&mut self, number: usize) {
        for command in &mut self.commands {
            let is_there = self.etcd.has_record(&command.name, &command.id);
            let has_heard = self.hosts[number].ids.get(&command.name) == Some(&command.id);
            if command.stage != Stage::Over && !is_there && !has_heard {
                command.exempt.insert(number);
            }
        }
    }

    /// Half a second after an end without any fault: all hosts must have resumed.
    pub(crate) fn judge_resumed(&self, number: usize) {
        if !self.weather.is_calm {
            return;
        }
        let id = &self.commands[number].id;
        for host in &self.hosts {
            assert!(!host.ids.values().any(|it| it == id), "{} has not resumed", host.name);
        }
    }

    /// Returns what is left of pauses and faults. Long after the last fault there is nothing: all is open.
    pub(crate) fn leftover(&self) -> Option<String> {
        for command in &self.commands {
            if command.coordinator.is_some() || command.stage == Stage::Running {
                return Some(format!("{} goes on: {command:?}", command.id));
            }
        }
        if let Some(key) = self.etcd.keys.keys().find(|key| key.contains("/pause/")) {
            return Some(format!("{key} is left"));
        }
        for (number, host) in self.hosts.iter().enumerate() {
            let has_state = self.etcd.keys.contains_key(&format!("/t/f/state/{}", host.name));
            let Some(member) = &host.member else {
                if has_state {
                    return Some(format!("h{number} is gone, and has a state"));
                }
                continue;
            };
            if !member.has_session() || !has_state {
                return Some(format!("h{number} has no session: {member:?}"));
            }
            if !host.proxy.admits(host.local(self.now)) {
                return Some(format!("h{number} holds its clients: {:?}", host.proxy));
            }
        }
        None
    }
}

//! The requests of a coordinator, and what their answers mean.

use super::{
    Coordinator, EndedBy, LOOK_INTERVAL, LOOK_INTERVAL_MIN, PAUSES_MAX, Phase, RESUME_TIME_MAX,
    Refusal,
};
use crate::fleet::{
    clock::{BootTime, RETRY},
    keys::{Holder, Record},
    snapshot::{FleetPause, Snapshot},
    step::Step,
    store::{
        Answer, Compare, Keys, LeaseId, Operation, Reply, Request, Revision, StoreError,
        Transaction,
    },
};

/// Request under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    Grant,
    /// Puts record and holder.
    Begin,
    KeepAlive,
    /// Reads the whole fleet.
    Look,
    /// Puts record and holder anew, with the number of orders to reset.
    Repair(Record),
    Delete,
    Revoke,
}

impl Coordinator {
    /// Returns the next request of a pause that begins or holds.
    pub(super) fn next_request(&mut self, now: BootTime) -> Option<Request> {
        // What cannot be repaired may have ended.
        let is_told = self.committed.is_some() && self.is_woken;
        if is_told && self.unproven.is_none() && now >= self.look_due_at() {
            return Some(self.look());
        }
        let Some(lease) = self.lease else {
            return Some(self.ask(Asked::Grant, Request::Grant { ttl: self.record.ttl }));
        };
        if self.committed.is_none() {
            return Some(self.begin(lease));
        }
        if self.needs_repair || self.record.kill < self.kill_wanted {
            return Some(self.repair(lease));
        }
        if self.unproven.is_none() && now >= self.renewed + self.timing.period() {
            return Some(self.ask(Asked::KeepAlive, Request::KeepAlive { lease }));
        }
        if now < self.look_due_at() {
            return None;
        }
        Some(self.look())
    }

    fn ask(&mut self, asked: Asked, request: Request) -> Request {
        self.asked = Some(asked);
        request
    }

    fn look(&mut self) -> Request {
        self.is_woken = false;
        let keys = Keys::Prefix(self.config.keys.all().to_owned());
        let then = vec![Operation::Range { keys }];
        self.ask(Asked::Look, Request::Transact(Transaction { then, ..Transaction::default() }))
    }

    fn record_key(&self) -> String {
        self.config.keys.record(&self.name)
    }

    fn holder_key(&self) -> String {
        self.config.keys.holder(&self.name)
    }

    fn read_own(&self) -> Vec<Operation> {
        let keys = [self.record_key(), self.holder_key()].map(Keys::One);
        keys.into_iter().map(|keys| Operation::Range { keys }).collect()
    }

    fn puts(&self, record: &Record, lease: LeaseId) -> Vec<Operation> {
        let holder = Holder { id: self.config.id.clone() };
        let (key, value) = (self.record_key(), json(record));
        let record = Operation::Put { key, value, lease: None };
        let (key, value) = (self.holder_key(), json(&holder));
        vec![record, Operation::Put { key, value, lease: Some(lease) }]
    }

    /// Commits the record. A repetition finds the record of a first try whose answer was lost.
    fn begin(&mut self, lease: LeaseId) -> Request {
        let compares = vec![Compare::Absent { key: self.record_key() }];
        let pauses = Operation::Range { keys: Keys::Prefix(self.config.keys.pauses()) };
        let mut then = self.puts(&self.record, lease);
        then.push(pauses);
        let request = Transaction { compares, then, otherwise: self.read_own() };
        self.ask(Asked::Begin, Request::Transact(request))
    }

    /// Puts the holder anew, and the record with it. A member that deletes records without holder compares their revision,
    /// and so sees that there was one in between. A repair by the lease before, which is late, finds another revision, too:
    /// else the holder would hang on a lease that nobody renews.
    fn repair(&mut self, lease: LeaseId) -> Request {
        let record = Record { kill: self.kill_wanted, ..self.record.clone() };
        let then = self.puts(&record, lease);
        let request =
            Transaction { compares: self.unchanged().into(), then, otherwise: self.read_own() };
        self.ask(Asked::Repair(record), Request::Transact(request))
    }

    /// Compares the record with that of before. In a store that was restored, its revision may be that of another.
    fn unchanged(&self) -> [Compare; 2] {
        let (key, revision) = (self.record_key(), self.record_at);
        let value = Compare::Value { key: key.clone(), value: json(&self.record) };
        [Compare::ModifiedAt { key, revision }, value]
    }

    /// Returns the time of the next look.
    fn look_due_at(&self) -> BootTime {
        if self.unproven.is_some() {
            return BootTime::default();
        }
        if self.is_woken {
            return self.last_look + LOOK_INTERVAL_MIN;
        }
        match self.phase {
            Phase::Idle => self.renewed + self.timing.period(),
            _ => self.last_look + LOOK_INTERVAL,
        }
    }

    /// Returns the next time at which there is something to do without being woken.
    pub(super) fn wake_up_at(&self) -> BootTime {
        let renewal = self.renewed + self.timing.period();
        self.look_due_at().min(renewal).max(self.retry_at).min(self.caller_due())
    }

    /// Takes an answer.
    pub(super) fn was_answered(
        &mut self,
        asked: Asked,
        sent: BootTime,
        now: BootTime,
        reply: &Reply,
    ) {
        match (&reply.answer, asked) {
            (Answer::Granted { lease, .. }, Asked::Grant) => {
                self.lease = Some(*lease);
                self.unproven = Some((None, sent));
                self.needs_repair = self.committed.is_some();
            }
            (Answer::Renewed { ttl: Some(_) }, Asked::KeepAlive) => {
                self.unproven = Some((Some(reply.connection), sent));
            }
            (Answer::Renewed { ttl: None }, Asked::KeepAlive) => self.lose_lease(),
            (Answer::Revoked, Asked::Revoke) => self.was_revoked(),
            (Answer::Transacted { succeeded, .. }, asked) => {
                let is_older =
                    |(cluster, revision)| cluster != reply.cluster || reply.revision < revision;
                let was_replaced = self.known.is_some_and(is_older);
                self.known = Some((reply.cluster, reply.revision));
                let mut snapshot = Snapshot::parse(&self.config.keys, reply);
                if was_replaced && matches!(self.phase, Phase::Asking | Phase::Waiting(_)) {
                    return self.end_by(EndedBy::StoreReplaced, now);
                }
                if self.ending.is_some() {
                    return self.has_ended_by(&asked, *succeeded, now, &snapshot);
                }
                let own = snapshot.pauses.get(&self.name).cloned().unwrap_or_default();
                match asked {
                    Asked::Begin => {
                        self.has_begun(*succeeded, (sent, now), &own, snapshot.pauses.len());
                    }
                    Asked::Repair(record) if *succeeded => {
                        (self.record, self.record_at) = (record, reply.revision);
                        (self.needs_repair, self.is_woken) = (false, true);
                        self.intact = sent;
                    }
                    Asked::Repair(_) => self.find_record(&own, now),
                    Asked::Look => {
                        snapshot.pauses.clear();
                        self.has_looked(sent, now, reply.connection, &own, &snapshot);
                    }
                    _ => {}
                }
            }
            _ => {}
        }
    }

    fn has_begun(
        &mut self,
        succeeded: bool,
        (sent, now): (BootTime, BootTime),
        own: &FleetPause,
        pauses: usize,
    ) {
        let Some(seen) = &own.record else { return };
        let record = seen.value.as_ref();
        if record.is_none_or(|record| record.id != self.config.id) {
            let by = record.map(|record| record.by.clone()).unwrap_or_default();
            let began = record.map(|record| record.began).unwrap_or_default();
            return self.refuse(Refusal::Taken { by, began }, now);
        }
        self.record_at = seen.modified;
        if succeeded {
            self.intact = sent;
            if pauses > PAUSES_MAX {
                return self.refuse(Refusal::TooMany, now);
            }
        }
        self.committed = Some(now);
        self.caller_renewed = self.caller_renewed.max(now);
        self.phase = Phase::Waiting(Vec::new());
        self.is_woken = true;
    }

    /// Takes the record as it is: the answer to a write was lost, or somebody has deleted it.
    fn find_record(&mut self, own: &FleetPause, now: BootTime) {
        match self.own_record(own) {
            Some((record, modified)) => {
                self.kill_wanted = self.kill_wanted.max(record.kill);
                (self.record, self.record_at) = (record, modified);
            }
            None => self.end_by(EndedBy::Others, now),
        }
    }

    /// Returns the record and its revision, if it is the one of this pause.
    fn own_record(&self, own: &FleetPause) -> Option<(Record, Revision)> {
        let seen = own.record.as_ref()?;
        let record = seen.value.as_ref().filter(|record| record.id == self.config.id)?;
        Some((record.clone(), seen.modified))
    }

    fn has_looked(
        &mut self,
        sent: BootTime,
        now: BootTime,
        connection: u64,
        own: &FleetPause,
        snapshot: &Snapshot,
    ) {
        self.last_look = now;
        self.find_record(own, now);
        if self.ending.is_some() {
            return;
        }
        self.needs_repair = own.holder.is_none();
        if !self.needs_repair {
            self.intact = sent;
        }
        self.prove(connection, now);
        self.remember(snapshot, now);
        if let Phase::Waiting(_) = self.phase {
            let waiting_for = self.judge(snapshot, sent);
            // No command begins under a pause that may end before the next look.
            let is_sure = !self.needs_repair && now < self.lost_at();
            self.phase = if waiting_for.is_empty() && is_sure {
                Phase::Idle
            } else {
                Phase::Waiting(waiting_for)
            };
        } else {
            self.note_forced(snapshot);
        }
    }

    /// Counts the renewal, if the holder hangs on the lease and this look went over the connection of its answer.
    fn prove(&mut self, connection: u64, now: BootTime) {
        if self.needs_repair {
            return;
        }
        match self.unproven.take() {
            Some((by, sent)) if by.is_none_or(|by| by == connection) => self.renewed = sent,
            Some(_) => self.retry_at = now + RETRY,
            None => {}
        }
    }

    fn lose_lease(&mut self) {
        (self.lease, self.unproven) = (None, None);
        self.needs_repair = self.committed.is_some();
    }

    /// Takes the failure of a request.
    pub(super) fn was_refused(&mut self, asked: &Asked, now: BootTime, error: StoreError) {
        let has_waited = matches!(error, StoreError::TimedOut(_));
        self.retry_at = if has_waited { now } else { now + RETRY };
        if self.ending.is_some() {
            if *asked == Asked::Revoke && error == StoreError::NoSuchLease {
                self.was_revoked();
            }
            return;
        }
        match error {
            StoreError::NoSuchLease => {
                self.lose_lease();
                self.retry_at = now;
            }
            StoreError::Unreachable(why) | StoreError::TimedOut(why) => self.failure = Some(why),
            error if self.committed.is_none() => self.refuse(error.into(), now),
            _ => {}
        }
    }

    /// Returns the next step of the end: deletes the record, ends the lease, and waits for the acknowledgements to go.
    pub(super) fn next_of_end(&mut self, now: BootTime) -> Step {
        let Some(ending) = &self.ending else { return Step::Over };
        if matches!(self.phase, Phase::Ended { .. }) {
            return Step::Over;
        }
        if now < self.retry_at {
            return Step::Wait(self.retry_at);
        }
        let timeout = self.timing.timeout();
        let Some(deleted) = ending.deleted else {
            // Nobody renews the holder any more: members end the pause after so long.
            if now >= ending.since + self.record.ttl + self.timing.linger() {
                return self.over();
            }
            let then = vec![
                Operation::Delete { key: self.record_key() },
                Operation::Delete { key: self.holder_key() },
                self.read_own().swap_remove(0),
            ];
            let otherwise = self.read_own();
            self.asked = Some(Asked::Delete);
            let compares = self.unchanged().into();
            return Step::Ask(
                Request::Transact(Transaction { compares, then, otherwise }),
                timeout,
            );
        };
        // A commit that is carried out late fails without its lease. If that cannot be ended in time, such a commit is a pause that
        // nobody looks after: it ends a linger behind the lease's time.
        let may_revoke = !ending.is_revoked && now < deleted + RESUME_TIME_MAX;
        if let Some(lease) = self.lease.filter(|_| may_revoke) {
            self.asked = Some(Asked::Revoke);
            return Step::Ask(Request::Revoke { lease }, timeout);
        }
        if ending.is_refused || now >= deleted + RESUME_TIME_MAX || self.acknowledged.is_empty() {
            return self.over();
        }
        if now < self.look_due_at() {
            return Step::Wait(self.look_due_at().min(deleted + RESUME_TIME_MAX));
        }
        Step::Ask(self.look(), timeout)
    }

    fn over(&mut self) -> Step {
        if let Some(ending) = &self.ending
            && !ending.is_refused
        {
            let still_paused = std::mem::take(&mut self.acknowledged);
            self.phase = Phase::Ended { by: ending.by, still_paused };
        }
        Step::Over
    }

    fn was_revoked(&mut self) {
        if let Some(ending) = &mut self.ending {
            ending.is_revoked = true;
        }
    }

    fn has_ended_by(&mut self, asked: &Asked, succeeded: bool, now: BootTime, snapshot: &Snapshot) {
        if *asked == Asked::Look {
            self.last_look = now;
            self.acknowledged = self.acknowledgers(snapshot);
            return;
        }
        let own = snapshot.pauses.get(&self.name).filter(|_| !succeeded);
        let record = own.and_then(|own| self.own_record(own));
        let Some(ending) = self.ending.as_mut().filter(|_| *asked == Asked::Delete) else { return };
        match record {
            Some(record) => (self.record, self.record_at) = record,
            None => ending.deleted = Some(now),
        }
    }
}

fn json(value: &impl serde::Serialize) -> String {
    // Structs of strings and numbers always have a form.
    serde_json::to_string(value).unwrap_or_default()
}

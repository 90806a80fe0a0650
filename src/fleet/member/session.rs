//! The session of a host: its state in the store, and the requests that keep it.

use std::{collections::BTreeMap, time::Duration};

use super::{Member, Trouble, local::Standing, parcel::Place};
use crate::fleet::{
    clock::{BootTime, RETRY},
    keys::State,
    snapshot::{Host, Snapshot},
    step::{ProxyView, Step},
    store::{Answer, Compare, Keys, Operation, Reply, Request, Revision, StoreError, Transaction},
};

/// Time between two writes of counts alone, and after a write that the store has refused.
const COUNTS_INTERVAL: Duration = Duration::from_secs(5);

/// State in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Session {
    revision: Revision,
    written: Written,
    /// Time of the last write.
    at: BootTime,
}

/// Part of the state that is written at once when it changes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Written {
    acks: BTreeMap<String, String>,
    is_idle: bool,
    forced: Vec<String>,
}

/// Request under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    Grant,
    KeepAlive,
    Join(Written),
    /// With the state that it writes, if it writes one.
    Round(Option<Written>),
    /// A read of all pauses without a session.
    Read,
    Reap(String),
    /// The end of a member that a process before was.
    Forget,
    Leave,
    Revoke,
}

impl Member {
    /// Returns the next request, if one is due.
    pub(super) fn next_request(&mut self, now: BootTime, view: &ProxyView) -> Option<Request> {
        if now < self.retry_at {
            return None;
        }
        if let Some((name, _)) = self.reap_due().filter(|&(_, at)| now >= at) {
            let name = name.clone();
            return self.reap(name);
        }
        let may_write = now >= self.write_at;
        let is_due = now >= self.round_due_at(now, view);
        let Some(session) = &self.session else {
            // Pauses end as ever, also while the store takes no state.
            return if !is_due {
                None
            } else if !may_write {
                Some(self.ask(Asked::Read, self.reading(Vec::new(), Vec::new())))
            } else if self.lease.is_none() {
                let ttl = self.config.record.fence;
                self.asked = Some(Asked::Grant);
                Some(Request::Grant { ttl })
            } else {
                Some(self.join(view))
            };
        };
        if !is_due {
            return self.forget();
        }
        if let Some(lease) = self.lease.filter(|_| self.renewal_is_due(now)) {
            self.asked = Some(Asked::KeepAlive);
            return Some(Request::KeepAlive { lease });
        }
        let compare = Compare::ModifiedAt { key: self.state_key(), revision: session.revision };
        let written = (may_write && self.write_due_at(now, view) <= now).then(|| self.due(view));
        let puts = written.iter().map(|written| self.put_state(written, view)).collect();
        let request = self.reading(vec![compare], puts);
        Some(self.ask(Asked::Round(written), request))
    }

    fn ask(&mut self, asked: Asked, request: Transaction) -> Request {
        self.asked = Some(asked);
        Request::Transact(request)
    }

    fn state_key(&self) -> String {
        self.config.keys.state(&self.config.host)
    }

    fn member_key(&self) -> String {
        self.config.keys.member(&self.config.host)
    }

    fn own_keys(&self) -> [Operation; 2] {
        [self.member_key(), self.state_key()].map(|key| Operation::Range { keys: Keys::One(key) })
    }

    fn read_pauses(&self) -> Operation {
        Operation::Range { keys: Keys::Prefix(self.config.keys.pauses()) }
    }

    /// Returns a transaction that reads all pauses, and what is under the keys of this host where it does not `write`.
    fn reading(&self, compares: Vec<Compare>, writes: Vec<Operation>) -> Transaction {
        let then = writes.into_iter().chain([self.read_pauses()]).collect();
        let otherwise = self.own_keys().into_iter().chain([self.read_pauses()]).collect();
        Transaction { compares, then, otherwise }
    }

    /// Joins: puts member and state and reads all pauses at one revision. Else a pause in between would not count this
    /// host, which would not know of the pause.
    fn join(&mut self, view: &ProxyView) -> Request {
        let free = match self.left_behind {
            Some(revision) => Compare::ModifiedAt { key: self.state_key(), revision },
            None => Compare::Absent { key: self.state_key() },
        };
        let written = self.due(view);
        let value = json(&self.config.record);
        let put = Operation::Put { key: self.member_key(), value, lease: None };
        let request = self.reading(vec![free], vec![put, self.put_state(&written, view)]);
        self.ask(Asked::Join(written), request)
    }

    /// Deletes a record that has had no holder for the linger, unless one of both has changed.
    fn reap(&mut self, name: String) -> Option<Request> {
        let record = self.config.keys.record(&name);
        let modified = self.orphans.get(&name)?.modified;
        let compares = vec![
            Compare::ModifiedAt { key: record.clone(), revision: modified },
            Compare::Absent { key: self.config.keys.holder(&name) },
        ];
        let then = vec![Operation::Delete { key: record }, self.read_pauses()];
        let request = Transaction { compares, then, otherwise: vec![self.read_pauses()] };
        Some(self.ask(Asked::Reap(name), request))
    }

    /// Deletes a member that a process before was, unless another host has its name by now. This host counts under its own.
    fn forget(&mut self) -> Option<Request> {
        let Place { host, record } = self.former.last()?.clone();
        let [member, state] = [self.config.keys.member(&host), self.config.keys.state(&host)];
        let delete = [&state, &member].map(|key| Operation::Delete { key: key.clone() });
        let request = Transaction {
            compares: vec![Compare::Value { key: member, value: record }],
            then: delete.into_iter().chain([self.read_pauses()]).collect(),
            otherwise: vec![self.read_pauses()],
        };
        Some(self.ask(Asked::Forget, request))
    }

    /// Returns the state that should be in the store.
    fn due(&self, view: &ProxyView) -> Written {
        let of = |standing| self.pauses.iter().filter(move |(_, it)| it.standing == standing);
        let acks: BTreeMap<_, _> =
            of(Standing::Holds).map(|(name, it)| (name.clone(), it.id.clone())).collect();
        Written {
            is_idle: !acks.is_empty() && view.is_idle,
            acks,
            forced: of(Standing::Forced).map(|(_, it)| it.id.clone()).collect(),
        }
    }

    fn put_state(&self, written: &Written, view: &ProxyView) -> Operation {
        let state = State {
            instance: self.instance(),
            acks: written.acks.clone(),
            idle: written.is_idle,
            held: view.held,
            active: view.active,
            connecting: view.connecting,
            oldest: view.oldest.map(|age| age.as_secs()),
            forced: written.forced.clone(),
        };
        Operation::Put { key: self.state_key(), value: json(&state), lease: self.lease }
    }

    fn instance(&self) -> String {
        format!("{}-{}", self.config.instance, self.sessions)
    }

    /// Returns the time from which on a renewal is due.
    fn renewal_is_due(&self, now: BootTime) -> bool {
        self.unproven.is_none() && now >= self.renewed + self.timing.period()
    }

    /// Returns the time of the next write of the state. At rest there is none.
    fn write_due_at(&self, now: BootTime, view: &ProxyView) -> BootTime {
        let far = now + self.timing.ttl;
        let Some(session) = &self.session else { return far };
        let due = self.due(view);
        if due != session.written {
            now.max(self.write_at)
        } else if !due.acks.is_empty() && !due.is_idle {
            (session.at + COUNTS_INTERVAL).max(self.write_at)
        } else {
            far
        }
    }

    /// Returns the time of the next round, or of the next try to begin a session.
    pub(super) fn round_due_at(&self, now: BootTime, view: &ProxyView) -> BootTime {
        if self.session.is_none() {
            return self.next_round.min(self.write_at);
        }
        let renewal = self.renewed + self.timing.period();
        self.next_round.min(renewal).min(self.write_due_at(now, view))
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
                self.sessions += 1;
                (self.renewed, self.unproven) = (sent, None);
            }
            (Answer::Renewed { ttl: Some(_) }, Asked::KeepAlive) => {
                self.unproven = Some((reply.connection, sent));
            }
            (Answer::Renewed { ttl: None }, Asked::KeepAlive) => self.lose_session(),
            (Answer::Transacted { succeeded, .. }, asked) => {
                self.has_read(asked, sent, now, reply, *succeeded);
            }
            _ => self.is_over |= self.stopped.is_some(),
        }
    }

    fn has_read(
        &mut self,
        asked: Asked,
        sent: BootTime,
        now: BootTime,
        reply: &Reply,
        succeeded: bool,
    ) {
        let is_older = |(cluster, revision)| cluster != reply.cluster || reply.revision < revision;
        if self.known.is_some_and(|(cluster, _)| cluster != reply.cluster) && !self.has_joined {
            self.strand_former(&self.config.keys.clone());
        }
        if self.known.is_some_and(is_older) {
            self.distrust();
        }
        self.known = Some((reply.cluster, reply.revision));
        let mut snapshot = Snapshot::parse(&self.config.keys, reply);
        let own = snapshot.hosts.remove(&self.config.host).unwrap_or_default();
        let tells_of_session = matches!(asked, Asked::Join(_) | Asked::Round(_));
        match asked {
            Asked::Leave => {
                let had_session = self.session.is_some();
                self.find_own(&own, now);
                self.has_left = succeeded || !had_session;
            }
            Asked::Join(written) => {
                if succeeded {
                    self.has_written(reply.revision, written, now);
                } else if !self.find_rival(&own, now) {
                    return;
                }
            }
            Asked::Round(written) => {
                match (succeeded, written) {
                    (false, _) => self.find_own(&own, now),
                    (true, Some(written)) => self.has_written(reply.revision, written, now),
                    (true, None) => {}
                }
                self.prove(reply.connection, now);
            }
            Asked::Forget => drop(self.former.pop()),
            _ => {}
        }
        if self.stopped.is_none() {
            self.trouble = self.trouble.take().filter(|_| self.session.is_none());
            if tells_of_session && self.session.is_some() {
                self.present = Some(sent);
            }
            self.read(sent, now, snapshot);
        }
    }

    /// Counts the renewal, if this transaction went over the connection of its answer: a member of the store that has
    /// lost the others renews leases that have ended.
    fn prove(&mut self, connection: u64, now: BootTime) {
        match self.unproven.take() {
            Some((renewed_by, sent)) if renewed_by == connection => self.renewed = sent,
            Some(_) => self.retry_at = now + RETRY,
            None => {}
        }
    }

    fn has_written(&mut self, revision: Revision, written: Written, now: BootTime) {
        self.session = Some(Session { revision, written, at: now });
        (self.left_behind, self.promised, self.has_joined) = (None, None, true);
        self.former.retain(|place| place.host != self.config.host);
    }

    /// Goes on with the state that is there, if it was made here: the answer to its writing was lost. Else the session
    /// has ended.
    fn find_own(&mut self, own: &Host, now: BootTime) {
        self.session = None;
        let Some(seen) = own.state.as_ref().filter(|seen| seen.lease == self.lease) else { return };
        let Some(state) = seen.value.clone().filter(|it| it.instance == self.instance()) else {
            return;
        };
        let written = Written { acks: state.acks, is_idle: state.idle, forced: state.forced };
        self.has_written(seen.modified, written, now);
    }

    /// Looks at the state that was in the way of a join. Returns false if it was left behind here, and is to be replaced.
    /// A host whose name is taken obeys the pauses all the same.
    fn find_rival(&mut self, own: &Host, now: BootTime) -> bool {
        self.find_own(own, now);
        if self.session.is_some() {
            return true;
        }
        let was_behind = self.left_behind.take().is_some();
        let (mine, rival) = (&self.config.record, own.record());
        let is_same = rival.is_some_and(|rival| rival.identity == mine.identity);
        // Without a word about the start of one of them, the process has restarted.
        let is_of_other_start = rival.is_some_and(|rival| {
            rival.boot != mine.boot && !rival.boot.is_empty() && !mine.boot.is_empty()
        });
        if own.state.is_none() || is_same && !is_of_other_start {
            self.left_behind = own.state.as_ref().map(|seen| seen.modified);
            self.retry_at = if was_behind { now + RETRY } else { now };
            return false;
        }
        let mut identity = rival.map(|rival| rival.identity.clone()).unwrap_or_default();
        if is_same {
            identity.push_str(", a copy of this machine or this one before its last start");
        }
        self.trouble = Some(Trouble::NameTaken(identity));
        self.retry_at = now + self.timing.period();
        true
    }

    fn lose_session(&mut self) {
        (self.lease, self.session, self.unproven) = (None, None, None);
    }

    /// Takes the failure of a request.
    pub(super) fn was_refused(&mut self, asked: &Asked, now: BootTime, error: StoreError) {
        self.rounds_failed += 1;
        let is_denied = matches!(error, StoreError::Denied(_) | StoreError::Full(_));
        match (&error, asked) {
            _ if self.stopped.is_some() => {
                // Without its lease, a join that is carried out late fails: else it would leave a host that is lost.
                self.is_over |= *asked == Asked::Revoke && error == StoreError::NoSuchLease;
                self.retry_at = now + RETRY;
            }
            (StoreError::NoSuchLease, _) => self.lose_session(),
            (_, Asked::Reap(name)) if is_denied => {
                self.orphans.entry(name.clone()).and_modify(|orphan| orphan.is_denied = true);
                self.next_round = now;
            }
            (_, Asked::Forget) if is_denied => self.strand_former(&self.config.keys.clone()),
            (_, Asked::Grant | Asked::Join(_) | Asked::Round(Some(_))) if is_denied => {
                self.write_at = now + COUNTS_INTERVAL;
            }
            // The next endpoint is asked at once: time was lost already.
            (StoreError::TimedOut(_), _) => {}
            _ => self.retry_at = now + RETRY,
        }
        self.trouble = Some(Trouble::Store(error));
    }

    /// Returns the next step of a member that leaves: deletes its keys, then ends its lease.
    pub(super) fn leave(&mut self, now: BootTime, stopped: BootTime) -> Step {
        if self.is_over || now >= stopped + 3 * self.timing.timeout() {
            return Step::Over;
        }
        if now < self.retry_at {
            return Step::Wait(self.retry_at);
        }
        let request = if self.has_left {
            let Some(lease) = self.lease else { return Step::Over };
            self.asked = Some(Asked::Revoke);
            Request::Revoke { lease }
        } else {
            self.asked = Some(Asked::Leave);
            Request::Transact(self.leaving())
        };
        Step::Ask(request, self.timing.timeout())
    }

    /// Returns the transaction that deletes the keys of this host, unless another process has put them anew.
    fn leaving(&self) -> Transaction {
        let (state, member) = (self.state_key(), self.member_key());
        let compares = match &self.session {
            Some(Session { revision, .. }) => {
                vec![Compare::ModifiedAt { key: state.clone(), revision: *revision }]
            }
            None => vec![
                Compare::Absent { key: state.clone() },
                Compare::Value { key: member.clone(), value: json(&self.config.record) },
            ],
        };
        let then = vec![
            Operation::Delete { key: state },
            Operation::Delete { key: member },
            self.own_keys()[1].clone(),
        ];
        Transaction { compares, then, otherwise: self.own_keys().to_vec() }
    }
}

pub(super) fn json(value: &impl serde::Serialize) -> String {
    // Structs of strings and numbers always have a form.
    serde_json::to_string(value).unwrap_or_default()
}

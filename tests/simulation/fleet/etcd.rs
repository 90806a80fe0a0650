//! A model of etcd: keys, leases and transactions of one revision, as the real one has shown them.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    fleet::{
        keys::Record,
        store::{
            Answer, Compare, KeyValue, Keys, LeaseId, Operation, Reply, Request, Revision,
            StoreError, Transaction,
        },
    },
    world::{Micros, SECOND, micros},
};

/// The store, as all of its members agree on it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Etcd {
    pub(crate) cluster: u64,
    pub(crate) revision: i64,
    pub(crate) keys: BTreeMap<String, KeyValue>,
    leases: BTreeMap<LeaseId, Lease>,
    lease_last: i64,
    /// Keys that have changed since it was asked.
    changed: Vec<String>,
    /// Ids of the pauses whose records were deleted.
    pub(crate) deleted: BTreeSet<String>,
    pub(crate) last_deleted: String,
    /// Times at which holders went with their lease, by id of the pause.
    pub(crate) orphaned: BTreeMap<String, Micros>,
    pub(crate) restores: u32,
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    ttl: Micros,
    expires: Micros,
}

impl Etcd {
    pub(crate) fn new() -> Self {
        Self { cluster: 1, revision: 1, ..Self::default() }
    }

    /// Carries out a request at once.
    pub(crate) fn ask(
        &mut self,
        now: Micros,
        request: &Request,
        connection: u64,
    ) -> Result<Reply, StoreError> {
        let answer = match request {
            Request::Grant { ttl } => {
                self.lease_last += 1;
                let lease = LeaseId(self.lease_last);
                self.leases.insert(lease, Lease { ttl: micros(*ttl), expires: now + micros(*ttl) });
                Answer::Granted { lease, ttl: *ttl }
            }
            Request::KeepAlive { lease } => Answer::Renewed { ttl: self.renew(now, *lease) },
            Request::Revoke { lease } => {
                self.revoke(now, *lease);
                Answer::Revoked
            }
            Request::Transact(request) => self.transact(request)?,
        };
        Ok(self.reply(connection, answer))
    }

    pub(crate) fn reply(&self, connection: u64, answer: Answer) -> Reply {
        let revision = Revision(self.revision);
        Reply { cluster: self.cluster, revision, connection, answer }
    }

    fn renew(&mut self, now: Micros, lease: LeaseId) -> Option<std::time::Duration> {
        let lease = self.leases.get_mut(&lease)?;
        lease.expires = now + lease.ttl;
        Some(std::time::Duration::from_micros(lease.ttl))
    }

    /// Ends a lease, and the keys that hang on it.
    pub(crate) fn revoke(&mut self, now: Micros, lease: LeaseId) {
        self.leases.remove(&lease);
        let of_it = self.keys.values().filter(|pair| pair.lease == Some(lease));
        let gone: Vec<_> = of_it.map(|pair| pair.key.clone()).collect();
        self.revision += i64::from(!gone.is_empty());
        for key in gone {
            if let Some(name) = key.split("pause/holder/").nth(1) {
                let id = self.record(name).map(|record| record.id).unwrap_or_default();
                self.orphaned.insert(id, now);
            }
            self.delete(&key);
        }
    }

    /// Returns a lease that is there, by its order.
    pub(crate) fn any_lease(&self, number: usize) -> Option<LeaseId> {
        self.leases.keys().nth(number % self.leases.len().max(1)).copied()
    }

    /// Ends the leases whose time is over.
    pub(crate) fn expire(&mut self, now: Micros) {
        let over = self.leases.iter().filter(|(_, lease)| lease.expires <= now);
        let over: Vec<_> = over.map(|(&id, _)| id).collect();
        over.into_iter().for_each(|lease| self.revoke(now, lease));
    }

    /// Begins the time of every lease anew, as a new leader does.
    pub(crate) fn elect(&mut self, now: Micros) {
        self.leases.values_mut().for_each(|lease| lease.expires = now + lease.ttl);
    }

    pub(crate) fn expires(&self, lease: LeaseId) -> Option<Micros> {
        self.leases.get(&lease).map(|lease| lease.expires)
    }

    pub(crate) fn next_expiry(&self) -> Option<Micros> {
        self.leases.values().map(|lease| lease.expires).min()
    }

    /// Replaces everything by a backup: as another cluster, or as the same one with its revision of then.
    pub(crate) fn restore(&mut self, backup: &Self, now: Micros, as_another: bool) {
        let mut backup = backup.clone();
        backup.cluster = self.cluster + u64::from(as_another);
        backup.lease_last = self.lease_last + 1;
        backup.changed = backup.keys.keys().chain(self.keys.keys()).cloned().collect();
        backup.restores = self.restores + 1;
        backup.deleted = std::mem::take(&mut self.deleted);
        *self = backup;
        self.elect(now);
    }

    pub(crate) fn record(&self, name: &str) -> Option<Record> {
        let pair = self.keys.get(&format!("/t/f/pause/record/{name}"))?;
        serde_json::from_str(&pair.value).ok()
    }

    /// Returns true if the record of this pause is there. Asked so often that the rest of it is not read.
    pub(crate) fn has_record(&self, name: &str, id: &str) -> bool {
        let begin = format!("{{\"id\":\"{id}\"");
        let pair = self.keys.get(&format!("/t/f/pause/record/{name}"));
        pair.is_some_and(|pair| pair.value.starts_with(&begin))
    }

    pub(crate) fn holder(&self, name: &str) -> Option<&KeyValue> {
        self.keys.get(&format!("/t/f/pause/holder/{name}"))
    }

    pub(crate) fn take_changed(&mut self) -> Vec<String> {
        std::mem::take(&mut self.changed)
    }

    fn transact(&mut self, request: &Transaction) -> Result<Answer, StoreError> {
        let succeeded = request.compares.iter().all(|compare| self.holds(compare));
        let operations = if succeeded { &request.then } else { &request.otherwise };
        let is_dead = |lease: &LeaseId| !self.leases.contains_key(lease);
        for operation in operations {
            if let Operation::Put { lease: Some(lease), .. } = operation
                && is_dead(lease)
            {
                return Err(StoreError::NoSuchLease);
            }
        }
        let writes = operations.iter().any(|operation| match operation {
            Operation::Put { .. } => true,
            Operation::Delete { key } => self.keys.contains_key(key),
            Operation::Range { .. } => false,
        });
        self.revision += i64::from(writes);
        let mut found = Vec::new();
        for operation in operations {
            match operation {
                Operation::Put { key, value, lease } => {
                    let (key, value, lease) = (key.clone(), value.clone(), *lease);
                    if let Some(id) = key.contains("/holder/").then(|| value[7..].to_owned()) {
                        self.orphaned.remove(id.trim_end_matches("\"}"));
                    }
                    self.changed.push(key.clone());
                    let modified = Revision(self.revision);
                    self.keys.insert(key.clone(), KeyValue { key, value, modified, lease });
                }
                Operation::Delete { key } => self.delete(key),
                Operation::Range { keys: Keys::One(key) } => {
                    found.push(self.keys.get(key).cloned().into_iter().collect());
                }
                Operation::Range { keys: Keys::Prefix(begin) } => {
                    let from = self.keys.range(begin.clone()..);
                    let pairs = from.take_while(|(key, _)| key.starts_with(begin));
                    found.push(pairs.map(|(_, pair)| pair.clone()).collect());
                }
            }
        }
        Ok(Answer::Transacted { succeeded, found })
    }

    fn holds(&self, compare: &Compare) -> bool {
        match compare {
            Compare::Absent { key } => !self.keys.contains_key(key),
            Compare::Present { key } => self.keys.contains_key(key),
            Compare::ModifiedAt { key, revision } => {
                self.keys.get(key).map_or(Revision(0), |pair| pair.modified) == *revision
            }
            Compare::Value { key, value } => {
                self.keys.get(key).is_some_and(|pair| pair.value == *value)
            }
        }
    }

    fn delete(&mut self, key: &str) {
        let Some(pair) = self.keys.remove(key) else { return };
        if key.contains("/record/") {
            let record: Record = serde_json::from_str(&pair.value).expect("a record");
            self.last_deleted.clone_from(&record.id);
            self.deleted.insert(record.id);
        }
        self.changed.push(key.to_owned());
    }

    /// Carries out an operator's order: deletes a pause.
    pub(crate) fn resume(&mut self, name: &str) {
        self.revision += 1;
        self.delete(&format!("/t/f/pause/record/{name}"));
        self.delete(&format!("/t/f/pause/holder/{name}"));
    }

    /// Carries out an operator's order: forgets a host, unless it has a session.
    pub(crate) fn forget(&mut self, host: &str) {
        if !self.keys.contains_key(&format!("/t/f/state/{host}")) {
            self.revision += 1;
            self.delete(&format!("/t/f/member/{host}"));
        }
    }
}

/// Time by which a lease may outlast its end.
pub(crate) const EXPIRY_DELAY_MAX: Micros = SECOND / 2;

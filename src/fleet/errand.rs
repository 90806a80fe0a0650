//! Errands: single requests of callers to the store, which no machine drives.

use std::{collections::BTreeSet, time::Duration};

use super::{
    clock::BootTime,
    desk::Errand,
    facade::Refusal,
    keys::Record,
    snapshot::Snapshot,
    store::{Answer, Compare, KeyValue, Keys, Operation, Reply, Request, Store, Transaction},
    table::{HostRow, News, PauseRow, Table},
    threads::Identity,
};
use crate::sys::boot::boot_time;

/// Longest wait for the answer of the store; the caller may shorten it.
pub(super) const TIMEOUT: Duration = Duration::from_secs(2);

/// Most requests for the end of a pause: a look at its record, its deletion, and more if the record changes in between.
const RESUME_TRIES: usize = 4;

/// Does an errand, and answers its caller.
pub(super) fn run(
    errand: Errand,
    store: &mut impl Store,
    identity: &Identity,
    news: &mut News,
    timeout: Duration,
) {
    // A caller that has gone misses nothing.
    match errand {
        Errand::Table(answer) => {
            answer.send(table(store, identity, news, timeout)).ok();
        }
        Errand::Resume { name, by, answer } => {
            let result = resume(store, identity, &name, timeout);
            if result.is_ok() {
                log::info!(event = "fleet-resumed", by = by; "{by} ends the pause {name} of the fleet {}", identity.fleet);
            }
            answer.send(result).ok();
        }
        Errand::Forget { host, by, answer } => {
            let result = forget(store, identity, &host, timeout);
            if result.is_ok() {
                log::info!(event = "fleet-forgot", by = by; "{by} takes the host {host} out of the fleet {}", identity.fleet);
            }
            answer.send(result).ok();
        }
    }
}

pub(super) fn table(
    store: &mut impl Store,
    identity: &Identity,
    news: &mut News,
    timeout: Duration,
) -> Result<Table, Refusal> {
    let keys = Keys::Prefix(identity.keys.all().to_owned());
    let read = Transaction { then: vec![Operation::Range { keys }], ..Transaction::default() };
    let snapshot = Snapshot::parse(&identity.keys, &ask(store, read, timeout)?);
    let now = boot_time();
    let mut known = BTreeSet::new();
    let pauses = snapshot.pauses.iter().filter_map(|(name, pause)| {
        let record = pause.record.as_ref()?;
        Some((name.clone(), record.value.clone()?, pause.holder.is_some()))
    });
    let pauses: Vec<_> = pauses.collect();
    let records = pauses.iter().map(|(name, record, _)| (name.clone(), record.clone())).collect();
    let rows =
        pauses.iter().map(|(name, record, has_holder)| PauseRow::new(name, record, *has_holder));
    let rows = rows.collect();
    let hosts = snapshot.hosts.iter().map(|(name, host)| {
        known.insert(name.clone());
        let age = news.age(name, host.state.as_ref().map(|state| state.modified), now);
        let state = host.state.as_ref().and_then(|state| state.value.as_ref());
        HostRow::new(name, host.record(), state, &records, age)
    });
    let hosts = hosts.collect();
    news.retain(&known);
    Ok(Table::new(identity.fleet.clone(), rows, hosts))
}

/// Deletes the record of a pause that is there now, and its holder. A pause of the same name that begins meanwhile stays.
fn resume(
    store: &mut impl Store,
    identity: &Identity,
    name: &str,
    timeout: Duration,
) -> Result<(), Refusal> {
    let (record, holder) = (identity.keys.record(name), identity.keys.holder(name));
    let read = vec![Operation::Range { keys: Keys::One(record.clone()) }];
    let deadline = BootTime(boot_time()) + timeout;
    let mut request = Transaction { then: read.clone(), ..Transaction::default() };
    let mut id = None;
    for _ in 0..RESUME_TRIES {
        let reply = ask(store, request, deadline - BootTime(boot_time()))?;
        if id.is_some() && has_succeeded(&reply) {
            return Ok(());
        }
        let Answer::Transacted { mut found, .. } = reply.answer else { break };
        let Some(KeyValue { value, .. }) = found.pop().and_then(|mut pairs| pairs.pop()) else {
            // What was there has ended by itself.
            return if id.is_some() { Ok(()) } else { Err(Refusal::no_pause(name)) };
        };
        let present = serde_json::from_str::<Record>(&value).map(|it| it.id).unwrap_or_default();
        // The same pause may have been written anew, with the next order to reset what is left.
        if *id.get_or_insert_with(|| present.clone()) != present {
            return Ok(());
        }
        let (key, delete) = (record.clone(), |key: &String| Operation::Delete { key: key.clone() });
        request = Transaction {
            compares: vec![Compare::Value { key, value }],
            then: vec![delete(&record), delete(&holder)],
            otherwise: read.clone(),
        };
    }
    Err(Refusal::unreachable("the record of the pause changes all the time"))
}

/// Deletes a member that has no session.
fn forget(
    store: &mut impl Store,
    identity: &Identity,
    host: &str,
    timeout: Duration,
) -> Result<(), Refusal> {
    let (member, state) = (identity.keys.member(host), identity.keys.state(host));
    let read = Operation::Range { keys: Keys::One(state.clone()) };
    let delete = Transaction {
        compares: vec![Compare::Present { key: member.clone() }, Compare::Absent { key: state }],
        then: vec![Operation::Delete { key: member }],
        otherwise: vec![read],
    };
    let reply = ask(store, delete, timeout)?;
    if has_succeeded(&reply) {
        return Ok(());
    }
    let snapshot = Snapshot::parse(&identity.keys, &reply);
    let has_session = snapshot.hosts.contains_key(host);
    Err(if has_session { Refusal::has_session(host) } else { Refusal::unknown(host) })
}

fn ask(
    store: &mut impl Store,
    transaction: Transaction,
    timeout: Duration,
) -> Result<Reply, Refusal> {
    store.ask(&Request::Transact(transaction), timeout).map_err(Refusal::from)
}

fn has_succeeded(reply: &Reply) -> bool {
    matches!(reply.answer, Answer::Transacted { succeeded: true, .. })
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::fleet::{
        keys::KeySpace,
        store::{Answered, Revision},
    };

    /// Store with one record, which others put in place of it before each of the next requests.
    struct Played {
        record: Option<String>,
        next: VecDeque<Option<String>>,
    }

    impl Store for Played {
        fn ask(&mut self, request: &Request, _: Duration) -> Answered {
            let Request::Transact(request) = request else { panic!("{request:?}") };
            let is_same = |compare: &Compare| matches!(compare, Compare::Value { value, .. } if Some(value) == self.record.as_ref());
            let succeeded = request.compares.iter().all(is_same);
            let pair = self.record.clone().map(|value| KeyValue {
                key: "/t/f/pause/record/db".to_owned(),
                value,
                modified: Revision(1),
                lease: None,
            });
            let operations = if succeeded { &request.then } else { &request.otherwise };
            let reads = matches!(operations[0], Operation::Range { .. });
            let found = if reads { vec![pair.into_iter().collect()] } else { Vec::new() };
            if !reads {
                self.record = None;
            }
            self.record = self.next.pop_front().unwrap_or_else(|| self.record.clone());
            let answer = Answer::Transacted { succeeded, found };
            Ok(Reply { cluster: 1, revision: Revision(1), connection: 1, answer })
        }
    }

    #[test]
    fn a_resume_ends_the_pause_that_it_has_found_and_no_other() {
        let identity = Identity {
            fleet: "f".to_owned(),
            host: "a".to_owned(),
            keys: KeySpace::new("/t", "f"),
            on_disconnect: "serve",
            instance: "1".to_owned(),
        };
        let record = |id: &str, kill: u64| {
            let ttl = r#"{"secs": 15, "nanos": 0}"#;
            Some(format!(r#"{{"id": "{id}", "by": "a", "ttl": {ttl}, "kill": {kill}}}"#))
        };
        let unknown = || Err(Refusal::no_pause("db"));
        for (first, next, result, last) in [
            (None, vec![], unknown(), None),
            (record("1", 0), vec![], Ok(()), None),
            // Another order to reset, behind the first look.
            (record("1", 0), vec![record("1", 1)], Ok(()), None),
            // The next pause of the name, behind the first look, and behind the second one.
            (record("1", 0), vec![record("2", 0)], Ok(()), record("2", 0)),
            (record("1", 0), vec![record("1", 1), record("2", 0)], Ok(()), record("2", 0)),
            (record("1", 0), vec![None], Ok(()), None),
        ] {
            let mut store = Played { record: first, next: next.into() };
            assert_eq!(resume(&mut store, &identity, "db", TIMEOUT), result);
            assert_eq!(store.record, last);
        }
    }
}

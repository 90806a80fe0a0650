//! Errands: single requests of callers to the store, which no machine drives.

use std::{collections::BTreeSet, time::Duration};

use super::{
    desk::Errand,
    facade::{Refusal, RefusalKind},
    snapshot::Snapshot,
    store::{Answer, Compare, Keys, Operation, Reply, Request, Store, Transaction},
    table::{HostRow, News, PauseRow, Table},
    threads::Identity,
};
use crate::sys::boot::boot_time;

/// Longest wait for the answer of the store; the caller may shorten it.
pub(super) const TIMEOUT: Duration = Duration::from_secs(2);

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

/// Deletes the record of a pause, and its holder.
fn resume(
    store: &mut impl Store,
    identity: &Identity,
    name: &str,
    timeout: Duration,
) -> Result<(), Refusal> {
    let (record, holder) = (identity.keys.record(name), identity.keys.holder(name));
    let delete = Transaction {
        compares: vec![Compare::Present { key: record.clone() }],
        then: vec![Operation::Delete { key: record }, Operation::Delete { key: holder }],
        otherwise: Vec::new(),
    };
    if has_succeeded(&ask(store, delete, timeout)?) {
        return Ok(());
    }
    Err(Refusal {
        kind: RefusalKind::Unknown,
        text: format!(
            "The fleet has no pause of the name {name:?}; tcpause status --fleet lists them."
        ),
    })
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

//! `Snapshot`: the keys of a fleet at one revision.

use std::collections::BTreeMap;

use crate::fleet::{
    keys::{Holder, KeySpace, MemberRecord, Record, State},
    store::{Answer, KeyValue, LeaseId, Reply, Revision},
};

/// Keys that one reply tells of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Snapshot {
    /// Pauses by name.
    pub(crate) pauses: BTreeMap<String, FleetPause>,
    /// Members by host.
    pub(crate) hosts: BTreeMap<String, Host>,
}

/// One pause, and who looks after it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct FleetPause {
    /// `None` without a record.
    pub(crate) record: Option<Seen<Record>>,
    /// `None` without a holder.
    pub(crate) holder: Option<Seen<Holder>>,
}

/// One host, by its keys.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Host {
    pub(crate) member: Option<Seen<MemberRecord>>,
    /// `None` without a session.
    pub(crate) state: Option<Seen<State>>,
}

/// Value of a key that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen<T> {
    /// `None` if it cannot be read, as a later version has written it: that is not the same as no key.
    pub(crate) value: Option<T>,
    pub(crate) modified: Revision,
    pub(crate) lease: Option<LeaseId>,
}

impl Snapshot {
    /// Reads all keys of a transaction's answer; a key outside of the fleet is left out.
    pub(crate) fn parse(keys: &KeySpace, reply: &Reply) -> Self {
        let mut snapshot = Self::default();
        let Answer::Transacted { found, .. } = &reply.answer else { return snapshot };
        for pair in found.iter().flatten() {
            let Some((kind, name)) = keys.parse(&pair.key) else { continue };
            let name = name.to_owned();
            match kind {
                Kind::Record => snapshot.pause(name).record = Some(Seen::parse(pair)),
                Kind::Holder => snapshot.pause(name).holder = Some(Seen::parse(pair)),
                Kind::Member => snapshot.host(name).member = Some(Seen::parse(pair)),
                Kind::State => snapshot.host(name).state = Some(Seen::parse(pair)),
            }
        }
        snapshot
    }

    fn pause(&mut self, name: String) -> &mut FleetPause {
        self.pauses.entry(name).or_default()
    }

    fn host(&mut self, name: String) -> &mut Host {
        self.hosts.entry(name).or_default()
    }
}

impl Host {
    /// Returns true for a member without a session, which may carry all the same.
    pub(crate) fn is_lost(&self) -> bool {
        self.state.is_none()
    }

    /// Returns the member's record, if it is there and can be read.
    pub(crate) fn record(&self) -> Option<&MemberRecord> {
        self.member.as_ref()?.value.as_ref()
    }
}

impl<T: serde::de::DeserializeOwned> Seen<T> {
    fn parse(pair: &KeyValue) -> Self {
        let value = serde_json::from_str(&pair.value).ok();
        Self { value, modified: pair.modified, lease: pair.lease }
    }
}

/// Kind of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Record,
    Holder,
    Member,
    State,
}

impl KeySpace {
    /// Returns the kind of a key, and the pause or host that it belongs to.
    fn parse<'a>(&self, key: &'a str) -> Option<(Kind, &'a str)> {
        let rest = key.strip_prefix(self.all())?;
        let kinds = [
            ("pause/record/", Kind::Record),
            ("pause/holder/", Kind::Holder),
            ("member/", Kind::Member),
            ("state/", Kind::State),
        ];
        kinds.iter().find_map(|&(begin, kind)| Some((kind, rest.strip_prefix(begin)?)))
    }
}

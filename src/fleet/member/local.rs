//! The pauses of this proxy, and the deeds that news of the store bring about.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Member;
use crate::fleet::{
    clock::{BootTime, Timing},
    keys::Record,
    snapshot::{Seen, Snapshot},
    step::{Doing, ProxyView},
    store::Revision,
};

/// A pause of this proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Local {
    pub(super) id: String,
    pub(super) standing: Standing,
    /// Number of the record's last order to reset that was carried out.
    kill: u64,
    /// Sending of the round that has renewed it last.
    renewed: BootTime,
    /// False if the store is another one, or an older one, and does not have the record: its absence means nothing.
    pub(super) is_sure: bool,
}

/// Standing of a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Standing {
    /// Its lease is in the ledger, and the barrier behind it.
    Holds,
    /// An operator has lifted it here alone.
    Forced,
    /// It has ended without a holder, though the record is there, as this member may not delete it.
    Ending,
    /// The same, and its lease is lifted.
    Ended,
}

/// Records of one round.
#[derive(Debug)]
pub(super) struct News {
    /// Sending of its request.
    sent: BootTime,
    records: BTreeMap<String, Seen<Record>>,
}

/// A record without a holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Orphan {
    /// Changes with each repair: while it stays, there was no holder at any time.
    pub(super) modified: Revision,
    /// Answer that told of it first.
    since: BootTime,
    timing: Timing,
    /// True if the store does not allow to delete it.
    pub(super) is_denied: bool,
}

impl Orphan {
    fn due_at(&self) -> BootTime {
        self.since + self.timing.linger()
    }
}

impl Member {
    /// Takes note of leases that the ledger has ended by itself or by an operator.
    pub(super) fn compare_with(&mut self, view: &ProxyView) {
        self.pauses.retain(|name, pause| {
            if pause.standing != Standing::Holds || view.holding.contains(name) {
                return true;
            }
            // Without a word of an operator, its time is over: a record that still holds is as new.
            pause.standing = Standing::Forced;
            view.forced.contains(name)
        });
    }

    /// Takes the records of a round that was answered now.
    pub(super) fn read(&mut self, sent: BootTime, now: BootTime, snapshot: Snapshot) {
        self.contact = Some(sent);
        self.next_round = sent + self.timing.period();
        let mut orphans = BTreeMap::new();
        let mut records = BTreeMap::new();
        for (name, pause) in snapshot.pauses {
            let Some(record) = pause.record else { continue };
            if let Some(local) = self.pauses.get_mut(&name) {
                local.is_sure |= record.value.as_ref().is_none_or(|it| it.id == local.id);
            }
            if let (Some(value), None) = (&record.value, &pause.holder) {
                let before = self.orphans.remove(&name);
                let orphan = before.filter(|it| it.modified == record.modified).unwrap_or(Orphan {
                    modified: record.modified,
                    since: now,
                    timing: Timing::new(value.ttl),
                    is_denied: false,
                });
                if orphan.is_denied && sent >= orphan.due_at() {
                    self.end_alone(&name, value);
                }
                orphans.insert(name.clone(), orphan);
            }
            records.insert(name, record);
        }
        self.orphans = orphans;
        self.news = Some(News { sent, records });
    }

    /// Counts a pause without a holder as ended for this host, which may not delete it.
    fn end_alone(&mut self, name: &str, record: &Record) {
        let local = self.pauses.get_mut(name).filter(|local| local.id == record.id);
        if let Some(local) = local.filter(|local| local.standing == Standing::Holds) {
            local.standing = Standing::Ending;
        }
    }

    /// Has absences mean nothing, as the store is another one or an older one.
    pub(super) fn distrust(&mut self) {
        self.restores += 1;
        self.pauses.values_mut().for_each(|pause| pause.is_sure = false);
        self.orphans.clear();
        self.session = None;
    }

    /// Returns the pauses that hold here though the store does not have them, as it is another one or an older one.
    pub(crate) fn doubted(&self) -> Vec<&str> {
        let doubted = |it: &Local| it.standing == Standing::Holds && !it.is_sure;
        let doubted = self.pauses.iter().filter(|(_, it)| doubted(it));
        doubted.map(|(name, _)| name.as_str()).collect()
    }

    /// Returns the record without a holder whose time is over first, and when.
    pub(super) fn reap_due(&self) -> Option<(&String, BootTime)> {
        let mut due: Vec<_> = self.orphans.iter().filter(|(_, orphan)| !orphan.is_denied).collect();
        due.sort_by_key(|(_, orphan)| orphan.due_at());
        due.first().map(|(name, orphan)| (*name, orphan.due_at()))
    }

    /// Returns the next deed, if there is one.
    pub(super) fn next_doing(&mut self, now: BootTime) -> Option<Doing> {
        let is_late = !self.holds_when_lost() && now >= self.began + self.config.start_wait;
        if is_late {
            self.promised = None;
        }
        if let Some((lost_at, cut_at)) = self.deadlines() {
            if !self.is_lost && now >= lost_at {
                return Some(Doing::Lose);
            }
            if self.is_lost && !self.is_cut && now >= cut_at {
                return Some(Doing::Cut);
            }
        }
        if let Some(doing) = self.next_of_news() {
            return Some(doing);
        }
        // Only behind the pauses: else the worker could go on until then, though the store has told of them.
        let lost_at = self.lost_at();
        // A host that holds, and has no session yet, keeps the deadline of the process before.
        let is_known = lost_at.is_some() || !self.holds_when_lost();
        let order = Doing::FenceAt(lost_at);
        if is_known && self.fence.as_ref() != Some(&order) {
            return Some(order);
        }
        self.news = None;
        let has_contact =
            lost_at.map_or(self.session.is_some() || is_late, |lost_at| now < lost_at);
        if self.is_lost && has_contact {
            return Some(Doing::Find);
        }
        let may_start = self.session.is_some() && has_contact || is_late;
        (!self.is_started && may_start).then_some(Doing::Start)
    }

    /// Returns the next deed that the last round calls for.
    fn next_of_news(&self) -> Option<Doing> {
        let news = self.news.as_ref()?;
        let present = news.records.iter().find_map(|(name, record)| {
            let local = self.pauses.get(name);
            // A record that cannot be read is there all the same.
            let Some(record) = &record.value else {
                return local.and_then(|local| local.renew(name, news.sent));
            };
            let Some(local) = local.filter(|local| local.id == record.id) else {
                return Some(Doing::Pause { name: name.clone(), record: record.clone() });
            };
            if local.standing == Standing::Ending {
                return Some(Doing::Resume { name: name.clone() });
            }
            let kills = local.standing == Standing::Holds && record.kill > local.kill;
            kills
                .then(|| Doing::Kill { name: name.clone() })
                .or_else(|| local.renew(name, news.sent))
        });
        present.or_else(|| {
            let mut gone = self.pauses.iter().filter(|(name, _)| !news.records.contains_key(*name));
            let (name, _) = gone.find(|(_, local)| local.is_sure)?;
            Some(Doing::Resume { name: name.clone() })
        })
    }

    /// Takes the end of a deed.
    pub(super) fn was_done(&mut self, doing: Doing) {
        let sent = self.news.as_ref().map_or(BootTime::default(), |news| news.sent);
        match doing {
            Doing::Pause { name, record } => {
                let local = Local {
                    id: record.id,
                    standing: Standing::Holds,
                    kill: 0,
                    renewed: sent,
                    is_sure: true,
                };
                self.pauses.insert(name, local);
            }
            Doing::Renew { name } => {
                self.pauses.entry(name).and_modify(|local| local.renewed = sent);
            }
            Doing::Resume { name } => match self.pauses.get_mut(&name) {
                Some(local) if local.standing == Standing::Ending => {
                    local.standing = Standing::Ended;
                }
                _ => drop(self.pauses.remove(&name)),
            },
            Doing::Kill { name } => {
                let record = self.news.as_ref().and_then(|news| news.records.get(&name));
                let kill = record.and_then(|record| record.value.as_ref()).map(|it| it.kill);
                self.pauses.entry(name).and_modify(|local| local.kill = kill.unwrap_or(local.kill));
            }
            Doing::Start => self.is_started = true,
            order @ Doing::FenceAt(_) => self.fence = Some(order),
            Doing::Lose => self.is_lost = true,
            Doing::Find => (self.is_lost, self.is_cut) = (false, false),
            Doing::Cut => self.is_cut = true,
        }
    }
}

impl Local {
    /// Returns a pause of which another process of this host had not told yet when it stood still. No record has its id.
    pub(super) fn nameless() -> Self {
        Self {
            id: String::new(),
            standing: Standing::Holds,
            kill: 0,
            renewed: BootTime::default(),
            is_sure: true,
        }
    }

    /// Returns the order to begin its time anew, if the round sent then has not yet.
    fn renew(&self, name: &str, sent: BootTime) -> Option<Doing> {
        let is_due = self.standing == Standing::Holds && self.renewed < sent;
        is_due.then(|| Doing::Renew { name: name.to_owned() })
    }
}

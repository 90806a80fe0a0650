//! `Table`: pauses and hosts of a fleet, as operators see them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::Serialize;

use super::{
    keys::{MemberRecord, OnDisconnect, Record, State},
    store::Revision,
};
use crate::timestamp::Rfc3339;

/// Pauses and hosts of a fleet at one revision.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Table {
    /// Name of the fleet.
    pub(crate) name: String,
    pub(crate) pauses: Vec<PauseRow>,
    /// Hosts, those first that a pause waits for or would wait for.
    pub(crate) hosts: Vec<HostRow>,
}

/// One pause.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct PauseRow {
    pub(crate) name: String,
    /// Caller and its host; null at `monitor.addr`.
    pub(crate) by: Option<String>,
    /// Reason given by the caller; null without one, and at `monitor.addr`.
    pub(crate) reason: Option<String>,
    /// Time of day at its coordinator when it began, in RFC 3339.
    pub(crate) since: Option<String>,
    /// True if a host looks after it; without one it ends soon.
    pub(crate) has_holder: bool,
}

/// One host.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct HostRow {
    pub(crate) host: String,
    pub(crate) state: HostState,
    /// Clause that tells why a pause waits for it, or would; null if it does not.
    pub(crate) why: Option<String>,
    /// Clients that wait there; null for a lost host, as the following ones are.
    pub(crate) held: Option<u64>,
    pub(crate) active: Option<u64>,
    /// Age of the oldest connection there.
    pub(crate) oldest_seconds: Option<u64>,
    /// Time since its last news, or since it was lost, as far as the host that was asked knows.
    pub(crate) age_seconds: Option<f64>,
    pub(crate) version: Option<String>,
    pub(crate) on_disconnect: Option<OnDisconnect>,
}

/// State of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum HostState {
    /// It has no session, and may carry all the same.
    Lost,
    /// A pause holds there, and connections are left.
    Busy,
    /// An operator has lifted a pause there alone.
    Forced,
    /// No pause holds there.
    Serving,
    /// All pauses hold there, and nothing is carried.
    Idle,
}

/// Moments at which a host has heard of changes, for the ages in its table.
#[derive(Debug, Default)]
pub(crate) struct News(BTreeMap<String, (Option<Revision>, Duration)>);

impl News {
    /// Returns the age of a key's present revision, or of its absence, at `now` of one clock. The first look knows none.
    pub(crate) fn age(
        &mut self,
        key: &str,
        revision: Option<Revision>,
        now: Duration,
    ) -> Option<Duration> {
        let Some((known, since)) = self.0.get_mut(key) else {
            // Its age is unknown, so it counts from here.
            self.0.insert(key.to_owned(), (revision, now));
            return None;
        };
        if *known != revision {
            (*known, *since) = (revision, now);
        }
        Some(now.saturating_sub(*since))
    }

    /// Forgets all keys but these.
    pub(crate) fn retain(&mut self, keys: &BTreeSet<String>) {
        self.0.retain(|key, _| keys.contains(key));
    }
}

impl Table {
    /// Makes the table of rows in any order.
    pub(crate) fn new(name: String, pauses: Vec<PauseRow>, mut hosts: Vec<HostRow>) -> Self {
        hosts.sort_by(|left, right| left.rank().cmp(&right.rank()));
        Self { name, pauses, hosts }
    }

    /// Leaves out who has paused, and why.
    pub(crate) fn without_callers(mut self) -> Self {
        self.pauses.iter_mut().for_each(|pause| (pause.by, pause.reason) = (None, None));
        self
    }
}

impl PauseRow {
    /// Makes the row of a pause.
    pub(crate) fn new(name: &str, record: &Record, has_holder: bool) -> Self {
        Self {
            name: name.to_owned(),
            by: Some(record.by.clone()),
            reason: record.reason.clone(),
            since: (record.began > 0).then(|| time_of_day(record.began)),
            has_holder,
        }
    }
}

impl HostRow {
    /// Makes the row of a host of its keys, as far as they are there and can be read. `pauses` are the present ones by name.
    pub(crate) fn new(
        host: &str,
        member: Option<&MemberRecord>,
        state: Option<&State>,
        pauses: &BTreeMap<String, Record>,
        age: Option<Duration>,
    ) -> Self {
        let (kind, why) = judge(state, pauses, age);
        Self {
            host: host.to_owned(),
            state: kind,
            why,
            held: state.map(|state| state.held),
            active: state.map(|state| state.active),
            oldest_seconds: state.and_then(|state| state.oldest),
            age_seconds: age.map(seconds),
            version: member.map(|member| member.version.clone()),
            on_disconnect: member.map(|member| member.on_disconnect),
        }
    }

    /// Returns its place: lost hosts first, then those that a pause waits for.
    fn rank(&self) -> (bool, bool, HostState, &str) {
        (self.state != HostState::Lost, self.why.is_none(), self.state, &self.host)
    }
}

/// Returns the state of a host, and why pauses wait for it.
fn judge(
    state: Option<&State>,
    pauses: &BTreeMap<String, Record>,
    age: Option<Duration>,
) -> (HostState, Option<String>) {
    let Some(state) = state else {
        let lost =
            age.map_or_else(|| "lost".to_owned(), |age| format!("lost for {} s", age.as_secs()));
        return (HostState::Lost, Some(lost));
    };
    if pauses.values().any(|record| state.forced.contains(&record.id)) {
        return (HostState::Forced, Some("was resumed there".to_owned()));
    }
    let has_acked = |(name, record): (&String, &Record)| state.acks.get(name) == Some(&record.id);
    let acked = pauses.iter().filter(|pause| has_acked(*pause)).count();
    // Behind the end of a pause, a host is still paused for a moment; for long, if a restored store has lost the record.
    if acked == 0 && (state.acks.is_empty() || !pauses.is_empty()) {
        let why = (!pauses.is_empty()).then(|| "has not answered".to_owned());
        return (HostState::Serving, why);
    }
    if !state.idle {
        return (HostState::Busy, (acked > 0).then(|| carries(state)));
    }
    let why = (acked < pauses.len()).then(|| "has not answered".to_owned());
    (HostState::Idle, why)
}

/// Tells the connections that are left at a host.
pub(crate) fn carries(state: &State) -> String {
    let count = state.active + state.connecting;
    match state.oldest {
        Some(oldest) => format!("carries {count}, the oldest for {oldest} s"),
        None => format!("carries {count}"),
    }
}

/// Returns the time of day so many seconds after 1970 in RFC 3339.
pub(super) fn time_of_day(seconds: u64) -> String {
    Rfc3339::of_unix_time(Duration::from_secs(seconds)).to_string()
}

/// Rounds a time to milliseconds, so that JSON shows no more digits.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1_000.0).round() / 1_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> Record {
        Record {
            id: id.to_owned(),
            by: "uid 0, pid 12 on web-1".to_owned(),
            began: 1_709_164_800,
            reason: Some("fail over".to_owned()),
            mode: None,
            drain: None,
            half_closed: None,
            ttl: Duration::from_secs(15),
            kill: 0,
        }
    }

    fn member() -> MemberRecord {
        MemberRecord {
            identity: "m".to_owned(),
            boot: "b".to_owned(),
            on_disconnect: OnDisconnect::Hold,
            fence: Duration::from_secs(15),
            grace: Duration::from_secs(10),
            version: "1.2.3".to_owned(),
        }
    }

    fn state(acks: &[(&str, &str)], idle: bool) -> State {
        let acks = acks.iter().map(|(name, id)| ((*name).to_owned(), (*id).to_owned())).collect();
        let (active, oldest) = if idle { (0, None) } else { (2, Some(12)) };
        State { acks, idle, active, connecting: active / 2, oldest, held: 7, ..State::default() }
    }

    #[test]
    fn a_host_is_told_by_its_keys() {
        let pauses = BTreeMap::from([("a".to_owned(), record("1")), ("b".to_owned(), record("2"))]);
        let none = BTreeMap::new();
        let forced = State { forced: vec!["2".to_owned()], ..state(&[("a", "1")], false) };
        let other = State { forced: vec!["0".to_owned()], ..state(&[], false) };
        let age = Some(Duration::from_millis(40_900));
        for (state, pauses, age, expected, why) in [
            (None, &none, age, HostState::Lost, Some("lost for 40 s")),
            (None, &pauses, None, HostState::Lost, Some("lost")),
            (Some(state(&[], false)), &none, age, HostState::Serving, None),
            (Some(state(&[], true)), &none, age, HostState::Serving, None),
            (Some(other), &none, age, HostState::Serving, None),
            (Some(state(&[], true)), &pauses, age, HostState::Serving, Some("has not answered")),
            // An acknowledgement of an earlier pause of the name is none.
            (
                Some(state(&[("a", "0"), ("b", "1")], true)),
                &pauses,
                age,
                HostState::Serving,
                Some("has not answered"),
            ),
            (
                Some(state(&[("a", "1")], true)),
                &pauses,
                age,
                HostState::Idle,
                Some("has not answered"),
            ),
            (
                Some(state(&[("a", "1"), ("b", "2")], false)),
                &pauses,
                age,
                HostState::Busy,
                Some("carries 3, the oldest for 12 s"),
            ),
            (Some(state(&[("a", "1"), ("b", "2")], true)), &pauses, age, HostState::Idle, None),
            (Some(forced), &pauses, age, HostState::Forced, Some("was resumed there")),
        ] {
            let row = HostRow::new("web-1", Some(&member()), state.as_ref(), pauses, age);
            assert_eq!((row.state, row.why.as_deref()), (expected, why), "{state:?}");
            assert_eq!(row.held, state.as_ref().map(|_| 7));
            assert_eq!(row.on_disconnect, Some(OnDisconnect::Hold));
        }
    }

    #[test]
    fn hosts_that_block_come_first() {
        let pauses = BTreeMap::from([("a".to_owned(), record("1"))]);
        let rows = [
            ("e", Some(state(&[("a", "1")], true))),
            ("d", Some(state(&[("a", "1")], true))),
            ("c", Some(state(&[], true))),
            ("b", Some(state(&[("a", "1")], false))),
            ("z", None),
            ("a", Some(State { forced: vec!["1".to_owned()], ..state(&[], false) })),
            ("y", None),
        ];
        let rows =
            rows.map(|(host, state)| HostRow::new(host, None, state.as_ref(), &pauses, None));
        let pause = PauseRow::new("a", &record("1"), true);
        let table = Table::new("default".to_owned(), vec![pause], rows.into());
        let hosts: Vec<&str> = table.hosts.iter().map(|row| &*row.host).collect();
        assert_eq!(hosts, ["y", "z", "b", "a", "c", "d", "e"]);
        let json = serde_json::to_value(&table).unwrap();
        assert_eq!(json["pauses"][0]["since"], "2024-02-29T00:00:00.000Z");
        assert_eq!(json["hosts"][0]["state"], "lost");
        let json = serde_json::to_string(&table.without_callers()).unwrap();
        assert!(!json.contains("pid 12") && !json.contains("fail over"), "{json}");
    }

    #[test]
    fn news_have_an_age_from_the_second_look_on() {
        let (mut news, second) = (News::default(), Duration::from_secs(1));
        let at = |revision| Some(Revision(revision));
        assert_eq!(news.age("a", at(1), second), None);
        assert_eq!(news.age("a", at(1), 3 * second), Some(2 * second));
        assert_eq!(news.age("a", at(2), 4 * second), Some(Duration::ZERO));
        assert_eq!(news.age("a", at(2), 9 * second), Some(5 * second));
        assert_eq!(news.age("a", None, 9 * second), Some(Duration::ZERO));
        assert_eq!(news.age("a", None, 10 * second), Some(second));
        news.retain(&BTreeSet::from(["b".to_owned()]));
        assert_eq!(news.age("a", None, 10 * second), None);
    }
}

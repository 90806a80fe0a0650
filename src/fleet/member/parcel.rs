//! `MemberWords`: a member in a hand-over to another process of its host.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Member, local::Local, session::json};
use crate::fleet::{
    clock::BootTime,
    keys::{KeySpace, MemberRecord, OnDisconnect},
    step::{Doing, ProxyView},
    store::Revision,
};

/// All of a member that another process of its host goes on with. Its session stays behind: the other one joins anew.
/// Leases of the ledger tell that it holds clients until it has joined, or as it has lost the store.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct MemberWords {
    contact: Option<BootTime>,
    present: Option<BootTime>,
    known: Option<(u64, Revision)>,
    /// Fleet of the process before; earlier programs do not tell it.
    keys: Option<KeySpace>,
    /// Members that this host is in its fleet.
    places: Vec<Place>,
    /// Record of this host in the store, if it has joined.
    promised: Option<MemberRecord>,
    pauses: BTreeMap<String, Local>,
    is_cut: bool,
    /// Last order of a deadline.
    fence: Option<BootTime>,
    rounds_failed: u64,
}

/// Member that this host is or was in its fleet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    pub(super) host: String,
    /// Value of its key.
    pub(super) record: String,
}

/// Member that stays in a store as lost, as the process that goes on does not reach it or must not delete it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stranded {
    pub(crate) host: String,
    pub(crate) key: String,
}

impl MemberWords {
    /// Returns true if a coordinator may count on this host.
    pub(crate) fn has_joined(&self) -> bool {
        self.present.is_some()
    }

    /// Returns true if it has told a fleet that it holds without contact, and would not be in that one by `keys`.
    pub(crate) fn holds_outside(&self, keys: Option<&KeySpace>) -> bool {
        let holds = |it: &MemberRecord| it.on_disconnect == OnDisconnect::Hold;
        self.promised.as_ref().is_some_and(holds) && self.keys.as_ref() != keys
    }

    /// Returns the members that stay behind if the host leaves its fleet without a word.
    pub(crate) fn stranded(self) -> Vec<Stranded> {
        let Self { keys, places, .. } = self;
        let strand = |keys: KeySpace| places.into_iter().map(move |it| it.strand(&keys)).collect();
        keys.map(strand).unwrap_or_default()
    }
}

impl Place {
    fn strand(self, keys: &KeySpace) -> Stranded {
        Stranded { key: keys.member(&self.host), host: self.host }
    }
}

impl Member {
    /// Describes the member for a hand-over.
    pub(crate) fn describe(&self) -> MemberWords {
        // Without `..`, so that nothing new is forgotten.
        let Self {
            config,
            timing: _,
            began: _,
            lease: _,
            sessions: _,
            session: _,
            left_behind: _,
            known,
            contact,
            present,
            promised,
            has_joined,
            former,
            stranded: _,
            renewed: _,
            unproven: _,
            next_round: _,
            retry_at: _,
            write_at: _,
            asked: _,
            rounds_failed,
            restores: _,
            trouble: _,
            pauses,
            news: _,
            orphans: _,
            doing: _,
            is_started: _,
            is_lost: _,
            is_cut,
            fence,
            stopped: _,
            wants_stop: _,
            has_left: _,
            is_over: _,
        } = self;
        let own =
            has_joined.then(|| Place { host: config.host.clone(), record: json(&config.record) });
        MemberWords {
            contact: *contact,
            present: *present,
            known: *known,
            keys: Some(config.keys.clone()),
            places: former.iter().cloned().chain(own).collect(),
            promised: if *has_joined { Some(config.record.clone()) } else { promised.clone() },
            pauses: pauses.clone(),
            is_cut: *is_cut,
            fence: match fence {
                Some(Doing::FenceAt(at)) => *at,
                _ => None,
            },
            rounds_failed: *rounds_failed,
        }
    }

    /// Gives up the members that this host was before, with those keys: they stay in the store.
    pub(super) fn strand_former(&mut self, keys: &KeySpace) {
        self.stranded.extend(self.former.drain(..).map(|place| place.strand(keys)));
    }

    /// Goes on where another process of this host stood, if there was one. The ledger is that of its standstill, and the words
    /// may be those of a step before.
    pub(crate) fn go_on(&mut self, words: MemberWords, view: &ProxyView) {
        let MemberWords {
            contact,
            present,
            known,
            keys,
            places,
            promised,
            pauses,
            is_cut,
            fence,
            rounds_failed,
        } = words;
        (self.contact, self.present, self.known) = (contact, present, known);
        (self.former, self.promised, self.pauses) = (places, promised, pauses);
        if let Some(keys) = keys.filter(|keys| *keys != self.config.keys) {
            self.strand_former(&keys);
            // The pauses of another fleet are not to be found in this one.
            self.pauses.values_mut().for_each(|pause| pause.is_sure = false);
        }
        for name in &view.holding {
            self.pauses.entry(name.clone()).or_insert_with(Local::nameless);
        }
        (self.is_started, self.is_lost, self.is_cut) = (!view.is_starting, view.is_lost, is_cut);
        self.rounds_failed = rounds_failed;
        self.fence = fence.map(|at| Doing::FenceAt(Some(at)));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fleet::{
        member::{MemberConfig, local::Standing},
        step::Step,
    };

    const TTL: Duration = Duration::from_secs(15);
    const GRACE: Duration = Duration::from_secs(5);

    fn at(seconds: u64) -> BootTime {
        BootTime(Duration::from_secs(seconds))
    }

    fn record(on_disconnect: OnDisconnect) -> MemberRecord {
        let (identity, version) = ("machine".to_owned(), "1".to_owned());
        MemberRecord {
            identity,
            boot: String::new(),
            on_disconnect,
            fence: TTL,
            grace: GRACE,
            version,
        }
    }

    /// Returns a member that was made at 60 s.
    fn member(on_disconnect: OnDisconnect) -> Member {
        let config = MemberConfig {
            keys: KeySpace::new("/t", "f"),
            host: "web-1".to_owned(),
            instance: "taker".to_owned(),
            record: record(on_disconnect),
            start_wait: Duration::from_secs(30),
        };
        Member::new(config, at(60))
    }

    /// Returns the words of a host that was present last at 50 s.
    fn words(on_disconnect: OnDisconnect) -> MemberWords {
        let mut forced = Local::nameless();
        forced.standing = Standing::Forced;
        let (contact, present) = (Some(at(55)), Some(at(50)));
        let promised = Some(record(on_disconnect));
        let holds = on_disconnect == OnDisconnect::Hold;
        MemberWords {
            contact,
            present,
            known: Some((7, Revision(9))),
            keys: Some(KeySpace::new("/t", "f")),
            places: vec![Place { host: "web-1".to_owned(), record: json(&promised) }],
            promised,
            pauses: [("deploy", Local::nameless()), ("forced", forced)]
                .map(|(name, local)| (name.to_owned(), local))
                .into(),
            is_cut: false,
            fence: holds.then(|| at(65)),
            rounds_failed: 3,
        }
    }

    fn view(is_lost: bool) -> ProxyView {
        let [holding, forced] = ["deploy", "forced"].map(|name| [name.to_owned()].into());
        ProxyView { is_lost, holding, forced, ..ProxyView::default() }
    }

    /// Returns the next deed at this time, if it is not to ask or to wait.
    fn deed(member: &mut Member, now: BootTime, view: &ProxyView) -> Option<Doing> {
        let Step::Do(doing) = member.poll(now, view) else { return None };
        member.done(now);
        Some(doing)
    }

    #[test]
    fn a_host_that_holds_is_not_taken_out_of_its_fleet() {
        let (own, other) = (KeySpace::new("/t", "f"), KeySpace::new("/t", "g"));
        let outside = |policy, keys| words(policy).holds_outside(keys);
        assert!(!outside(OnDisconnect::Hold, Some(&own)));
        assert!(outside(OnDisconnect::Hold, Some(&other)) && outside(OnDisconnect::Hold, None));
        assert!(!outside(OnDisconnect::Serve, Some(&other)) && !outside(OnDisconnect::Serve, None));
        assert!(!MemberWords::default().holds_outside(None), "it was in none");
    }

    #[test]
    fn a_member_that_has_not_joined_passes_on_what_came() {
        let words = words(OnDisconnect::Hold);
        let mut taker = member(OnDisconnect::Hold);
        taker.go_on(words.clone(), &view(false));
        let text = serde_json::to_string(&taker.describe()).unwrap();
        assert_eq!(serde_json::from_str::<MemberWords>(&text).unwrap(), words);
        assert_eq!(serde_json::from_str::<MemberWords>("{}").unwrap(), MemberWords::default());
    }

    #[test]
    fn a_host_that_is_cut_off_is_held_and_reset_by_the_time_of_the_process_before() {
        let mut taker = member(OnDisconnect::Hold);
        taker.go_on(words(OnDisconnect::Hold), &view(false));
        assert_eq!(deed(&mut taker, at(64), &view(false)), None);
        assert_eq!(deed(&mut taker, at(65), &view(false)), Some(Doing::Lose));
        assert_eq!(deed(&mut taker, at(69), &view(true)), None);

        // One more process takes over, whose own grace period is longer.
        let lost = taker.describe();
        let mut taker = member(OnDisconnect::Hold);
        taker.config.record.grace = 4 * GRACE;
        taker.go_on(lost, &view(true));
        assert_eq!(deed(&mut taker, at(69), &view(true)), None);
        assert_eq!(deed(&mut taker, at(70), &view(true)), Some(Doing::Cut));
        let cut = taker.describe();
        let mut taker = member(OnDisconnect::Hold);
        taker.go_on(cut, &view(true));
        assert_eq!(deed(&mut taker, at(71), &view(true)), None);
    }

    #[test]
    fn a_fence_of_which_nothing_is_known_is_ordered_anew() {
        let earlier = serde_json::json!({ "contact": at(50), "present": at(50) });
        let mut taker = member(OnDisconnect::Hold);
        taker.go_on(serde_json::from_value(earlier).unwrap(), &view(false));
        // No word binds the taker but its own.
        let order = Doing::FenceAt(Some(at(75)));
        assert_eq!(deed(&mut taker, at(61), &view(false)), Some(order));
        assert_eq!(deed(&mut taker, at(62), &view(false)), None);
    }

    #[test]
    fn a_host_that_is_to_serve_keeps_the_word_of_the_process_before_for_a_while() {
        let mut taker = member(OnDisconnect::Serve);
        taker.go_on(words(OnDisconnect::Hold), &view(false));
        assert_eq!(deed(&mut taker, at(65), &view(false)), Some(Doing::Lose));
        assert_eq!(deed(&mut taker, at(70), &view(true)), Some(Doing::Cut));
        assert!(matches!(taker.poll(at(89), &view(true)), Step::Ask(..) | Step::Wait(_)));
        taker.asked = None;
        assert_eq!(deed(&mut taker, at(90), &view(true)), Some(Doing::FenceAt(None)));
        assert_eq!(deed(&mut taker, at(90), &view(true)), Some(Doing::Find));
    }

    #[test]
    fn a_host_that_is_to_hold_begins_to_count_itself() {
        let mut taker = member(OnDisconnect::Hold);
        taker.go_on(words(OnDisconnect::Serve), &view(false));
        let order = Doing::FenceAt(Some(at(75)));
        assert_eq!(deed(&mut taker, at(70), &view(false)), Some(order));
        assert_eq!(deed(&mut taker, at(75), &view(false)), Some(Doing::Lose));
    }

    #[test]
    fn clients_that_wait_for_a_first_contact_go_on_waiting() {
        let holding = ProxyView { is_starting: true, ..ProxyView::default() };
        let met = MemberWords { contact: Some(at(55)), ..MemberWords::default() };
        for (policy, starts) in
            [(OnDisconnect::Hold, None), (OnDisconnect::Serve, Some(Doing::Start))]
        {
            let mut taker = member(policy);
            taker.go_on(met.clone(), &holding);
            let _fence = deed(&mut taker, at(61), &holding);
            taker.asked = None;
            assert_eq!(deed(&mut taker, at(89), &holding), None);
            taker.asked = None;
            assert_eq!(deed(&mut taker, at(90), &holding), starts);
        }
    }
}

//! `Coordinator`: the state machine of one pause of a fleet, from its record to its end.
//!
//! `rounds.rs` asks and reads the answers, `judge.rs` decides by one snapshot when all hosts are idle.

mod judge;
mod rounds;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use rounds::Asked;
use serde::Serialize;

use crate::fleet::{
    clock::{BootTime, Timing},
    keys::{KeySpace, Record},
    snapshot::Snapshot,
    step::Step,
    store::{LeaseId, Reply, Revision, StoreError},
};

/// Time in which the record must be committed.
const BEGIN_TIME_MAX: Duration = Duration::from_secs(5);
/// Time between two looks without being woken.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Time between two looks at least.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(20);
/// Time for which acknowledgements may stay after the end.
const RESUME_TIME_MAX: Duration = Duration::from_secs(2);
/// Time from the loss of a pause, as its caller is told of it, until the holder may be gone.
const LOST_MARGIN: Duration = Duration::from_secs(1);
/// Most pauses of a fleet: as many as the ledger of a proxy takes.
const PAUSES_MAX: usize = 64;

/// Pause that is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Wanted {
    pub(crate) name: String,
    pub(crate) reason: Option<String>,
    /// User, process and host.
    pub(crate) by: String,
    pub(crate) mode: Option<String>,
    pub(crate) drain: Option<String>,
    pub(crate) half_closed: Option<String>,
    pub(crate) ttl: Duration,
    /// Hosts that are not waited for.
    pub(crate) without: Vec<String>,
}

/// Facts that a coordinator does not change.
#[derive(Debug, Clone)]
pub(crate) struct CoordinatorConfig {
    pub(crate) keys: KeySpace,
    /// The host of this proxy, which must be a member.
    pub(crate) host: String,
    /// Unique for each pause.
    pub(crate) id: String,
    /// Time of day in seconds since 1970, which is only shown.
    pub(crate) began: u64,
    /// True if the pause is of no use without its caller, who renews it.
    pub(crate) is_bound: bool,
    pub(crate) margins: Margins,
}

/// Differences between clocks and machines that the count of a lost host allows for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Margins {
    /// ρ: the most by which the rate of a clock differs from that of time, in millionths.
    pub(crate) rate: u32,
    /// δ, the time of a worker's turn, and a second on top.
    pub(crate) slack: Duration,
}

impl Default for Margins {
    fn default() -> Self {
        Self { rate: 1_000, slack: Duration::from_secs(2) }
    }
}

/// State of a pause, for its caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The record is not committed.
    Asking,
    /// There is no such pause, nor will there be.
    Refused(Refusal),
    /// The record is there, and these hosts are not idle.
    Waiting(Vec<WaitingFor>),
    /// All hosts are idle: the command may run.
    Idle,
    /// The record is being deleted.
    Ending,
    Ended {
        by: EndedBy,
        /// Hosts that have not told of their resumption in time.
        still_paused: Vec<String>,
    },
}

/// Host that is not idle, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct WaitingFor {
    pub(crate) host: String,
    /// Clause such as `carries 3, the oldest for 12 s`.
    pub(crate) why: String,
}

/// Reason of the end of a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndedBy {
    /// Its caller, by `end`.
    Caller,
    /// The caller has not renewed it.
    CallerGone,
    /// Its time is over.
    Ttl,
    /// Somebody has deleted the record: an operator, or a member after a time without contact of this host.
    Others,
    /// The store is another or an older one, so that its states prove nothing.
    StoreReplaced,
}

impl EndedBy {
    /// Returns the reason as a clause behind `by`.
    pub(crate) fn clause(self) -> &'static str {
        match self {
            Self::Caller => "its caller",
            Self::CallerGone => "the silence of its caller",
            Self::Ttl => "its time",
            Self::Others => "another host",
            Self::StoreReplaced => "a store that is not the one it began in",
        }
    }
}

/// Reason why there is no pause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// There is a pause of this name.
    Taken {
        by: String,
        /// Time of day in seconds since 1970.
        began: u64,
    },
    /// The fleet has as many pauses as its members can keep.
    TooMany,
    /// The store has not answered in time, for this reason.
    Unreachable(String),
    Denied(String),
    /// The store takes no more data.
    Full(String),
    Refused(String),
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unreachable(text) | StoreError::TimedOut(text) => Self::Unreachable(text),
            StoreError::NoSuchLease => Self::Unreachable(error.to_string()),
            StoreError::Denied(text) => Self::Denied(text),
            StoreError::Full(text) => Self::Full(text),
            StoreError::Refused(text) => Self::Refused(text),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Taken { by, .. } => write!(f, "the fleet has a pause of this name, by {by}"),
            Self::TooMany => write!(f, "the fleet has {PAUSES_MAX} pauses, and takes no more"),
            Self::Unreachable(text) => write!(f, "etcd cannot be reached: {text}"),
            Self::Denied(text) => write!(f, "etcd does not allow it: {text}"),
            Self::Full(text) => write!(f, "etcd takes no more data: {text}"),
            Self::Refused(text) => write!(f, "etcd has refused it: {text}"),
        }
    }
}

/// State machine of one pause.
#[derive(Debug)]
pub(crate) struct Coordinator {
    config: CoordinatorConfig,
    name: String,
    without: BTreeSet<String>,
    timing: Timing,
    phase: Phase,
    asked_for: BootTime,

    /// Record as it is in the store, and the revision that has put it there.
    record: Record,
    record_at: Revision,
    /// Number of orders to reset so far.
    kill_wanted: u64,
    lease: Option<LeaseId>,
    /// c: answer that told of the record.
    committed: Option<BootTime>,
    /// k: sending of the renewal of the last whole round.
    renewed: BootTime,
    /// Renewal without a proof yet: its connection, unless it has passed through consensus, and its sending.
    unproven: Option<(Option<u64>, BootTime)>,
    /// True if the holder is missing, or hangs on the lease before this one.
    needs_repair: bool,
    /// Sending of the last request that has put the holder, or has found it on the lease: no member has missed it before.
    intact: BootTime,
    /// Store that answered last, and its revision then.
    known: Option<(u64, Revision)>,
    /// Last renewal by the caller.
    caller_renewed: BootTime,
    last_poll: BootTime,

    asked: Option<Asked>,
    is_woken: bool,
    last_look: BootTime,
    /// Nothing is asked before.
    retry_at: BootTime,
    /// Last failure to reach the store.
    failure: Option<String>,
    /// First look at each host that has been without a session since, and its record then: a host that joins puts its
    /// record anew.
    lost_since: BTreeMap<String, (Option<Revision>, BootTime)>,
    /// Hosts that have acknowledged, by the last look.
    acknowledged: Vec<String>,
    /// Hosts that an operator has resumed since all were idle, in the order in which it was noticed.
    forced: Vec<String>,
    ending: Option<Ending>,
}

/// Course of the end.
#[derive(Debug)]
struct Ending {
    by: EndedBy,
    since: BootTime,
    /// Time from which on the record is gone.
    deleted: Option<BootTime>,
    is_revoked: bool,
    /// True if it never began, for its caller.
    is_refused: bool,
}

impl Coordinator {
    /// Returns the coordinator of a pause that is to begin.
    pub(crate) fn new(config: CoordinatorConfig, wanted: Wanted, now: BootTime) -> Self {
        let record = Record {
            id: config.id.clone(),
            by: wanted.by,
            began: config.began,
            reason: wanted.reason,
            mode: wanted.mode,
            drain: wanted.drain,
            half_closed: wanted.half_closed,
            ttl: wanted.ttl,
            kill: 0,
        };
        Self {
            config,
            name: wanted.name,
            without: wanted.without.into_iter().collect(),
            timing: Timing::new(wanted.ttl),
            phase: Phase::Asking,
            asked_for: now,
            record,
            record_at: Revision(0),
            kill_wanted: 0,
            lease: None,
            committed: None,
            renewed: now,
            unproven: None,
            needs_repair: false,
            intact: now,
            known: None,
            caller_renewed: now,
            last_poll: now,
            asked: None,
            is_woken: false,
            last_look: BootTime::default(),
            retry_at: now,
            failure: None,
            lost_since: BTreeMap::new(),
            acknowledged: Vec::new(),
            forced: Vec::new(),
            ending: None,
        }
    }

    /// Returns the next step. Not called while one is under way.
    pub(crate) fn poll(&mut self, now: BootTime) -> Step {
        self.look_at_clock(now);
        if self.ending.is_some() {
            return self.next_of_end(now);
        }
        if now < self.retry_at {
            return Step::Wait(self.retry_at.min(self.caller_due()));
        }
        match self.next_request(now) {
            Some(request) => Step::Ask(request, self.timing.timeout()),
            None => Step::Wait(self.wake_up_at()),
        }
    }

    /// Takes an answer, or its absence.
    pub(crate) fn answered(
        &mut self,
        sent: BootTime,
        now: BootTime,
        result: Result<Reply, StoreError>,
    ) {
        let Some(asked) = self.asked.take() else { return };
        match result {
            Ok(reply) => self.was_answered(asked, sent, now, &reply),
            Err(error) => self.was_refused(&asked, now, error),
        }
    }

    /// Makes a look due, as the watch has rung.
    pub(crate) fn woken(&mut self) {
        self.is_woken = true;
    }

    /// Has all hosts reset what is left.
    pub(crate) fn kill(&mut self) {
        self.kill_wanted += 1;
    }

    /// Begins the time of a pause anew: its caller has been heard.
    pub(crate) fn renew(&mut self, now: BootTime) {
        self.caller_renewed = now;
    }

    /// Ends the pause in good order.
    pub(crate) fn end(&mut self, now: BootTime) {
        self.end_by(EndedBy::Caller, now);
    }

    pub(crate) fn phase(&self) -> &Phase {
        &self.phase
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Returns the hosts that an operator has resumed since all were idle. Each stays in its place.
    pub(crate) fn forced(&self) -> &[String] {
        &self.forced
    }

    /// Returns the time at which the holder may be gone without another renewal: a linger later, hosts may resume.
    pub(crate) fn kept_until(&self) -> BootTime {
        self.renewed + self.record.ttl
    }

    /// Returns the time from which on a caller is told that the pause may not be kept. A holder that is missed is put anew within
    /// moments, unless the store takes none, as it is full: members end the pause a linger behind its loss.
    pub(crate) fn lost_at(&self) -> BootTime {
        let missed = self.needs_repair.then(|| self.intact + self.timing.linger());
        let until = missed.into_iter().fold(self.kept_until(), BootTime::min);
        BootTime(until - BootTime(LOST_MARGIN))
    }

    fn end_by(&mut self, by: EndedBy, now: BootTime) {
        if self.ending.is_some() {
            return;
        }
        let deleted = (by == EndedBy::Others).then_some(now);
        self.ending =
            Some(Ending { by, since: now, deleted, is_revoked: false, is_refused: false });
        self.phase = Phase::Ending;
        // Nothing waits for a proof any more.
        (self.unproven, self.retry_at) = (None, now);
    }

    /// Gives up a pause that has not begun. What was asked for may be carried out late, and is undone.
    fn refuse(&mut self, refusal: Refusal, now: BootTime) {
        let deleted = matches!(refusal, Refusal::Taken { .. }).then_some(now);
        self.end_by(EndedBy::Caller, now);
        if let Some(ending) = &mut self.ending {
            (ending.is_refused, ending.deleted) = (true, deleted);
        }
        self.phase = Phase::Refused(refusal);
    }

    fn caller_due(&self) -> BootTime {
        self.caller_renewed + self.record.ttl
    }

    /// Ends what is late: the commit of the record, or the caller's renewal.
    fn look_at_clock(&mut self, now: BootTime) {
        // While this process stood still, it has heard no caller.
        let gap = now - self.last_poll;
        if self.config.is_bound && gap > self.timing.period() + self.timing.timeout() {
            self.caller_renewed = self.caller_renewed + gap;
        }
        self.last_poll = now;
        if self.ending.is_some() {
            return;
        }
        if self.committed.is_none() && now >= self.asked_for + BEGIN_TIME_MAX {
            let why = self.failure.take();
            let why = why.unwrap_or_else(|| "etcd has not answered in time".to_owned());
            self.refuse(Refusal::Unreachable(why), now);
        } else if now >= self.caller_due() {
            let by = if self.config.is_bound { EndedBy::CallerGone } else { EndedBy::Ttl };
            self.end_by(by, now);
        }
    }

    /// Remembers how long hosts have been without a session, and which have acknowledged.
    fn remember(&mut self, snapshot: &Snapshot, now: BootTime) {
        let lost = snapshot.hosts.iter().filter(|(_, host)| host.is_lost());
        let since = lost.map(|(name, host)| {
            let joined = host.member.as_ref().map(|seen| seen.modified);
            let before = self.lost_since.get(name).filter(|(before, _)| *before == joined);
            (name.clone(), before.copied().unwrap_or((joined, now)))
        });
        self.lost_since = since.collect();
        self.acknowledged = self.acknowledgers(snapshot);
    }
}

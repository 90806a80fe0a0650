//! `Member`: the state machine of one host, which pauses and resumes its proxy as the records say.
//!
//! It asks in *rounds*: a renewal when it is due, then a transaction that compares its own state and reads all pauses.
//! `session.rs` asks and reads the answers, `local.rs` orders what they mean for the proxy.

mod local;
pub(crate) mod parcel;
mod session;

use std::{collections::BTreeMap, fmt, time::Duration};

use local::{Local, News, Orphan};
use parcel::{Place, Stranded};
use session::{Asked, Session};

use crate::fleet::{
    clock::{BootTime, Timing},
    keys::{KeySpace, MemberRecord, OnDisconnect},
    step::{Doing, ProxyView, Step},
    store::{LeaseId, Reply, Revision, StoreError},
};

/// A request is not begun if a deadline of the proxy is nearer than this.
const REQUEST_MIN: Duration = Duration::from_millis(50);

/// Facts that a member does not change.
#[derive(Debug, Clone)]
pub(crate) struct MemberConfig {
    pub(crate) keys: KeySpace,
    pub(crate) host: String,
    /// Begin of the names of this process's sessions, unlike that of any other process.
    pub(crate) instance: String,
    pub(crate) record: MemberRecord,
    /// For how long a member that serves without contact waits for its first one.
    pub(crate) start_wait: Duration,
}

/// Reason why a member has no session, or cannot write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Trouble {
    Store(StoreError),
    /// A host of this name has a session; its identity.
    NameTaken(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(error) => error.fmt(f),
            Self::NameTaken(identity) => write!(
                f,
                "another host of this name has a session ({identity}); set fleet.host to a name of its own"
            ),
        }
    }
}

/// State machine of one host.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "facts that do not depend on each other")]
pub(crate) struct Member {
    config: MemberConfig,
    timing: Timing,
    began: BootTime,

    /// Lease that the next state is put under.
    lease: Option<LeaseId>,
    /// Sessions that this process has begun.
    sessions: u64,
    /// State in the store, while it is the one that was made here.
    session: Option<Session>,
    /// Revision of the state that another process of this host has left.
    left_behind: Option<Revision>,
    /// Store that answered last, and its revision then.
    known: Option<(u64, Revision)>,

    /// Sending of the last read of all pauses that was answered.
    contact: Option<BootTime>,
    /// Sending of the last of them that found the state of this session in the store, too. From then on a coordinator
    /// that does not see it counts the time until this host is quiet.
    present: Option<BootTime>,
    /// Record in the store of the process before, by which coordinators count until this one has joined.
    promised: Option<MemberRecord>,
    /// True once this process has joined.
    has_joined: bool,
    /// Members that processes before were, which go once this one has joined.
    former: Vec<Place>,
    /// Those of them that stay, until somebody is told.
    stranded: Vec<Stranded>,
    /// Sending of the last renewal that is proven.
    renewed: BootTime,
    /// Renewal without a proof yet: its connection and its sending.
    unproven: Option<(u64, BootTime)>,
    next_round: BootTime,
    /// Nothing is asked before.
    retry_at: BootTime,
    /// Nothing is written before, as the store has refused it.
    write_at: BootTime,
    asked: Option<Asked>,
    rounds_failed: u64,
    restores: u64,
    trouble: Option<Trouble>,

    /// Pauses of this proxy by name.
    pauses: BTreeMap<String, Local>,
    /// Records of the last round, until all that follows from them is carried out.
    news: Option<News>,
    orphans: BTreeMap<String, Orphan>,
    doing: Option<Doing>,
    is_started: bool,
    /// True while `fleet/lost` holds.
    is_lost: bool,
    /// True if all was reset since.
    is_cut: bool,
    /// Last order of a deadline; `None` before the first order, as another process of this host may have set one.
    fence: Option<Doing>,

    /// Time of the order to leave the fleet.
    stopped: Option<BootTime>,
    wants_stop: bool,
    /// True if its keys are gone, or are not its own any more.
    has_left: bool,
    is_over: bool,
}

impl Member {
    /// Returns a member that has not joined. The proxy holds `fleet/starting`.
    pub(crate) fn new(config: MemberConfig, now: BootTime) -> Self {
        Self {
            timing: Timing::new(config.record.fence),
            config,
            began: now,
            lease: None,
            sessions: 0,
            session: None,
            left_behind: None,
            known: None,
            contact: None,
            present: None,
            promised: None,
            has_joined: false,
            former: Vec::new(),
            stranded: Vec::new(),
            renewed: now,
            unproven: None,
            next_round: now,
            retry_at: now,
            write_at: now,
            asked: None,
            rounds_failed: 0,
            restores: 0,
            trouble: None,
            pauses: BTreeMap::new(),
            news: None,
            orphans: BTreeMap::new(),
            doing: None,
            is_started: false,
            is_lost: false,
            is_cut: false,
            fence: None,
            stopped: None,
            wants_stop: false,
            has_left: false,
            is_over: false,
        }
    }

    /// Returns the next step. Not called while one is under way.
    pub(crate) fn poll(&mut self, now: BootTime, view: &ProxyView) -> Step {
        if self.wants_stop && self.stopped.is_none() {
            self.stopped = Some(now);
        }
        if let Some(stopped) = self.stopped {
            return self.leave(now, stopped);
        }
        self.compare_with(view);
        if let Some(doing) = self.next_doing(now) {
            self.doing = Some(doing.clone());
            return Step::Do(doing);
        }
        match self.deadline() {
            // An answer could come late for the deadline.
            Some(deadline) if deadline - now < REQUEST_MIN => Step::Wait(deadline),
            deadline => {
                let left = deadline.map_or(Duration::MAX, |deadline| deadline - now);
                match self.next_request(now, view) {
                    Some(request) => Step::Ask(request, self.timing.timeout().min(left)),
                    None => Step::Wait(self.wake_up_at(now, view)),
                }
            }
        }
    }

    /// Takes the end of a deed.
    pub(crate) fn done(&mut self, _now: BootTime) {
        if let Some(doing) = self.doing.take() {
            self.was_done(doing);
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

    /// Makes a round due, as the watch has rung or the proxy has changed.
    pub(crate) fn woken(&mut self) {
        self.next_round = BootTime::default();
    }

    /// Has the member leave the fleet. The proxy carries nothing any more.
    pub(crate) fn stop(&mut self) {
        self.wants_stop = true;
    }

    /// Returns the sending of the last read of all pauses that was answered.
    pub(crate) fn contact(&self) -> Option<BootTime> {
        self.contact
    }

    /// Returns the sending of the last read that found this host's session in the store, too.
    pub(crate) fn present(&self) -> Option<BootTime> {
        self.present
    }

    /// Returns true if this host is in no fleet, as another one has its name: a pause would not wait for it.
    pub(crate) fn is_nameless(&self) -> bool {
        self.session.is_none() && matches!(self.trouble, Some(Trouble::NameTaken(_)))
    }

    /// Returns the members that this host was before and that stay in the store, each once.
    pub(crate) fn take_stranded(&mut self) -> Vec<Stranded> {
        std::mem::take(&mut self.stranded)
    }

    /// Returns the number of times at which the store was another one than before, or an older one.
    pub(crate) fn restores(&self) -> u64 {
        self.restores
    }

    /// Returns true if the host has a session, as far as it knows.
    pub(crate) fn has_session(&self) -> bool {
        self.session.is_some()
    }

    /// Returns true while a pause of the fleet is known here.
    pub(crate) fn has_pauses(&self) -> bool {
        !self.pauses.is_empty()
    }

    pub(crate) fn rounds_failed(&self) -> u64 {
        self.rounds_failed
    }

    /// Returns the last failure, until a round has succeeded.
    pub(crate) fn trouble(&self) -> Option<&Trouble> {
        self.trouble.as_ref()
    }

    fn holds_when_lost(&self) -> bool {
        self.config.record.on_disconnect == OnDisconnect::Hold
    }

    /// Returns the time from which on nobody is admitted without another proof of the session, and the time at which what is
    /// left is reset then.
    fn deadlines(&self) -> Option<(BootTime, BootTime)> {
        let present = self.present?;
        // Its own word binds a host that has served without contact from now on.
        let own = (present.max(self.began), &self.config.record);
        let promised = self.promised.iter().map(|record| (present, record));
        let held = promised.chain([own]).filter(|(_, it)| it.on_disconnect == OnDisconnect::Hold);
        held.map(|(from, it)| (from + it.fence, from + it.fence + it.grace))
            .reduce(|a, b| (a.0.min(b.0), a.1.min(b.1)))
    }

    fn lost_at(&self) -> Option<BootTime> {
        self.deadlines().map(|(lost_at, _)| lost_at)
    }

    /// Returns the next time at which the proxy must be stopped without another contact.
    fn deadline(&self) -> Option<BootTime> {
        let (lost_at, cut_at) = self.deadlines()?;
        match (self.is_lost, self.is_cut) {
            (false, _) => Some(lost_at),
            (true, false) => Some(cut_at),
            (true, true) => None,
        }
    }

    /// Returns the next time at which there is something to do without being woken.
    fn wake_up_at(&self, now: BootTime, view: &ProxyView) -> BootTime {
        let asks = self.round_due_at(now, view).max(self.retry_at);
        let reaps = self.reap_due().map(|(_, at)| at.max(self.retry_at));
        let waits = !self.is_started || self.promised.is_some();
        let starts =
            (waits && !self.holds_when_lost()).then_some(self.began + self.config.start_wait);
        [reaps, starts, self.deadline()].into_iter().flatten().fold(asks, BootTime::min)
    }
}

//! A schedule: what clients, upstreams, the network and the operator do while the worker waits, and between its calls.

use std::{cell::RefCell, io, sync::Arc, time::Duration};

use crate::{
    admission::hold::HoldDecision,
    event::Event,
    fence::Fleet,
    judge,
    kernel::{Kernel, Site, Tally, Weather},
    link::{Link, Side},
    operator::Operator,
    passage::Passage,
    patience::Rules,
    rival::Rival,
    shared::{Phase, Shared},
    sys::{self, Socket},
    worker::{End, WorkerResources},
    worker_pool::Accepted,
};

/// Turns in a row that may ask for another at once and do nothing.
const IDLE_TURNS_MAX: u32 = 4;
/// Far more turns than any schedule needs.
const TURNS_MAX: u64 = 100_000;
/// The longest that a schedule may be without a deed of the peers: beyond every deadline of a connection.
pub(crate) const QUIET_MAX: Duration = Duration::from_secs(100);

/// The time until all quiet connections are closed.
const DRAIN_TIME: Duration = Duration::from_millis(1_500);
/// The time that an upstream takes to answer a dial, unless it is silent.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(10);

/// The course of a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Anything happens, so many more times.
    Chaos(usize),
    /// Everybody reads what there is; nobody writes.
    Reading,
    /// The proxy is paused, and closes what is quiet.
    Draining,
    /// One side of each connection ends its stream.
    HalfClosing,
    /// The other sides do too.
    Closing,
    /// The proxy stops.
    Stopping,
}

/// A worker's resources and what its surroundings are up to.
pub(crate) struct Schedule {
    pub(crate) resources: WorkerResources,
}

/// The course of this thread's schedule.
pub(crate) struct Course {
    pub(crate) shared: Arc<Shared>,
    /// Time of connections after a stop.
    pub(crate) grace_period: Duration,
    pub(crate) rules: Rules,
    pub(crate) operator: Operator,
    pub(crate) fleet: Fleet,
    pub(crate) rival: Rival,
    /// The most pipes that there may be: more than the worker may make, as long as it has some of its predecessor's.
    pub(crate) pipes_max: usize,
    /// The same of held clients.
    pub(crate) held_bound: u64,
    pub(crate) passage: Passage,
    pub(crate) stage: Stage,
    pub(crate) clients_left: usize,
    pub(crate) is_bulk: bool,
    pub(crate) may_abort: bool,
    /// Some bytes may be urgent.
    pub(crate) may_be_urgent: bool,
    /// The side whose peers may insist on writing before they read: if both did, none would ever read.
    pub(crate) insists: Option<Side>,
    /// Since when it is known that the upstream is away, without a pause.
    pub(crate) away_since: Option<Duration>,
    /// True if the worker sleeps in an outage, without a pause: all that wait do so for the upstream.
    pub(crate) rests_in_outage: bool,
    /// The clients that were being rejected when the last turn ended.
    pub(crate) rejecting: u64,
    pub(crate) progress: u64,
    pub(crate) idle_turns: u32,
    pub(crate) stage_began: Duration,
    /// Connections may have been cut off by a stop.
    pub(crate) was_cut: bool,
}

thread_local! {
    static COURSE: RefCell<Option<Course>> = const { RefCell::new(None) };
}

pub(crate) fn set_course(new: Course) {
    COURSE.with(|course| *course.borrow_mut() = Some(new));
}

/// The course of this thread's schedule, never while the kernel is at work.
pub(crate) fn with_course<T>(act: impl FnOnce(&mut Course) -> T) -> T {
    COURSE.with(|course| act(course.borrow_mut().as_mut().expect("a schedule runs")))
}

/// Returns whether these are the parts of the process that works.
pub(crate) fn is_at_work(shared: &Shared) -> bool {
    !crate::with(|kernel| kernel.is_handed_over())
        && COURSE.with(|course| {
            // The worker closes connections while the course looks at none.
            course.borrow().as_ref().is_some_and(|course| std::ptr::eq(&*course.shared, shared))
        })
}

impl Schedule {
    /// Works; false when the system did not let it.
    pub(crate) fn work(&mut self) -> bool {
        match self.resources.work() {
            Ok(end) => {
                if end == End::Cut {
                    with_course(|course| {
                        assert!(course.was_cut, "it cuts connections that may go on");
                    });
                }
                true
            }
            Err(_) => false,
        }
    }

    /// A panic costs the worker's connections and nothing else.
    pub(crate) fn judge_panic(&self) {
        let Shared { pauses, workers, .. } = &*self.resources.shared;
        assert_eq!(pauses.gate.passes(), 0, "passes are given back");
        workers.counters(0).lose_all();
        crate::with(|kernel| {
            for link in &mut kernel.links {
                let is_on_its_way = link.is_from_afar && link.token.is_none();
                assert!(!link.is_open || is_on_its_way, "a socket is left over");
                assert!(!link.was_cut_mildly, "what a panic cut off looks whole: {link:#?}");
                link.was_cut |= !link.is_open && !link.is_waiting();
            }
            // An attempt that was cut off does not tell the next one where to go on.
            kernel.probe = None;
            assert_eq!(kernel.open_pipes(), 0, "a pipe is left over");
            assert!(kernel.backlogs.iter().all(|it| it.is_open || it.queue.is_empty()));
        });
    }

    pub(crate) fn judge(self) -> Tally {
        let shared = Arc::clone(&self.resources.shared);
        drop(self);
        let taken: Vec<_> = std::iter::from_fn(|| shared.admission.clients.take()).collect();
        assert_eq!(taken.len(), shared.admission.clients.max(), "a permit is lost");
        assert_eq!(shared.pauses.gate.passes(), 0, "a pass is lost");
        let mut course = COURSE.with(|it| it.borrow_mut().take()).expect("a schedule runs");
        course.rival = Rival::default();
        assert_eq!(shared.admission.queue.under_way().taken(), 0, "a share is lost");
        assert!(shared.upstream.breaker().take_probe().is_some(), "the probe is lost");
        if let Some(max) = course.rules.hold_max {
            let decide = || match shared.admission.hold.decide() {
                HoldDecision::Hold(permit) => permit,
                HoldDecision::Reject(_) | HoldDecision::Close => None,
            };
            let permits: Vec<_> = std::iter::from_fn(decide).collect();
            assert_eq!(permits.len(), max, "a permit to be held is lost");
        }
        crate::with(|kernel| judge::judge(kernel, &course))
    }
}

/// A turn ends, and things happen until there are events, or `timeout` is over.
pub(crate) fn wait(events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<()> {
    judge::turn(timeout);
    let result = pass_time(events, timeout);
    with_course(Course::begin_turn);
    result
}

fn pass_time(events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<()> {
    if crate::with(|kernel| kernel.random.below(2) == 0) {
        with_course(Course::go_on_in_chaos);
    }
    let until = timeout.map(|timeout| crate::with(|kernel| kernel.now) + timeout);
    loop {
        let is_due = crate::with(|kernel| {
            if kernel.weather.interleaves && kernel.random.below(100) == 0 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            kernel.gather(events);
            Ok::<_, io::Error>(!events.is_empty() || until.is_some_and(|until| until <= kernel.now))
        })?;
        if is_due {
            return Ok(());
        }
        with_course(|course| course.go_on(until));
    }
}

impl Course {
    fn begin_turn(&mut self) {
        let is_away =
            self.shared.upstream.breaker().is_away() && !self.shared.pauses.gate.is_paused();
        self.rests_in_outage = false;
        crate::with(|kernel| {
            kernel.begin_turn();
            for link in &mut kernel.links {
                link.story.arrived_before = link.arrived;
            }
            // An outage may have ended in the last turn, and another begun.
            let since = self.away_since.filter(|&since| !kernel.has_reached_one_since(since));
            self.away_since = is_away.then(|| since.unwrap_or(kernel.now));
        });
        self.note_rivals_head();
        self.crowd_is_shown();
        self.orders_come();
    }

    /// Something may happen while the worker does not wait.
    fn go_on_in_chaos(&mut self) {
        if let Stage::Chaos(left @ 1..) = self.stage {
            self.stage = Stage::Chaos(left - 1);
            self.stir();
        }
    }

    /// The next thing that happens; nothing else would happen before `until`.
    fn go_on(&mut self, until: Option<Duration>) {
        match self.stage {
            Stage::Chaos(0) => self.calm_down(),
            Stage::Chaos(left) => {
                self.stage = Stage::Chaos(left - 1);
                self.stir();
                crate::with(|kernel| {
                    // Now and then, so much time passes that a deadline comes.
                    let most = kernel.random.one_of([1, 10, 1_000, 50_000, 400_000]);
                    let pause = Duration::from_micros(kernel.random.below(most) as u64);
                    if pause > ANSWER_TIME_MAX {
                        for id in 0..kernel.links.len() {
                            let has_room = kernel.has_room();
                            let link = &mut kernel.links[id];
                            link.answer_dial(&kernel.sites, has_room, kernel.now);
                        }
                        kernel.links.iter_mut().for_each(|link| link.is_queued = false);
                    }
                    kernel.now =
                        (kernel.now + pause).min(until.unwrap_or(Duration::MAX).max(kernel.now));
                });
            }
            stage if crate::with(|kernel| kernel.settle(stage)) => {}
            // The worker looks for more that is quiet as long as the pause lasts.
            Stage::Draining if until.is_none_or(|at| at > self.stage_began + DRAIN_TIME) => {
                self.next_stage();
            }
            // It looks for quiet half-closed connections as long as a stop lasts; all other deadlines are over.
            _ if sys::elapsed() > self.stage_began + QUIET_MAX
                && crate::with(|kernel| kernel.is_stopping) =>
            {
                self.next_stage();
            }
            // The end of a long grace period is nobody's concern.
            _ => match until.filter(|&until| until < sys::elapsed() + QUIET_MAX) {
                Some(until) => crate::with(|kernel| {
                    assert!(
                        until < self.stage_began + 2 * QUIET_MAX,
                        "it never ends: {:?}",
                        self.stage
                    );
                    // A SYN that was dropped comes again before.
                    let repeats = kernel.links.iter().filter_map(Link::syn_repeats_at);
                    let repeats = repeats.filter(|&at| at > kernel.now);
                    kernel.now = repeats.chain([until]).min().expect("one of them");
                }),
                None => self.next_stage(),
            },
        }
    }

    fn next_stage(&mut self) {
        self.stage_began = sys::elapsed();
        self.stage = match self.stage {
            Stage::Chaos(_) => Stage::Reading,
            Stage::Reading => {
                crate::with(|kernel| judge::arrived(kernel, self));
                if crate::with(|kernel| kernel.random.below(8) == 0) {
                    crate::with(Kernel::answer);
                    self.pause(true);
                    Stage::Draining
                } else {
                    crate::with(Kernel::half_close);
                    Stage::HalfClosing
                }
            }
            Stage::Draining => {
                crate::with(|kernel| judge::drained(kernel, self));
                self.resume();
                crate::with(Kernel::half_close);
                Stage::HalfClosing
            }
            Stage::HalfClosing => {
                crate::with(|kernel| judge::half_closed(kernel, self));
                Stage::Closing
            }
            Stage::Closing => {
                crate::with(|kernel| judge::closed(kernel));
                crate::with(|kernel| kernel.may_cut = true);
                self.shared.stop();
                Stage::Stopping
            }
            Stage::Stopping => panic!("it does not stop"),
        };
    }

    /// The end of all trouble.
    fn calm_down(&mut self) {
        crate::with(|kernel| {
            kernel.weather = Weather {
                shortage: 0,
                panic: 0,
                interleaves: false,
                tells_memory: true,
                ..kernel.weather
            };
            kernel.sites.fill(Site::Up);
            kernel.up_since.get_or_insert(kernel.now);
        });
        self.rival_leaves();
        self.fence_at(None);
        self.resume();
        self.next_stage();
    }

    /// Something happens.
    fn stir(&mut self) {
        let choice = crate::with(|kernel| kernel.random.below(100));
        match choice {
            0..7 => self.arrive(),
            7 => self.arrive_from_afar(),
            8..12 if self.operator.acts => self.operate(),
            12..14 if self.rules.changes_sites => crate::with(|kernel| {
                let (site, choices) = (
                    kernel.random.below(kernel.sites.len()),
                    [Site::Up, Site::Refusing, Site::Silent, Site::Full],
                );
                kernel.sites[site] = kernel.random.one_of(choices);
                let is_up = kernel.sites.iter().all(|&site| site == Site::Up);
                kernel.up_since = is_up.then(|| kernel.up_since.unwrap_or(kernel.now));
            }),
            58..60 => self.rival_acts(),
            60..63 if self.rules.switches => self.switch(),
            _ => self.stir_peer(choice),
        }
    }

    /// Something happens that needs no process of the proxy.
    pub(crate) fn stir_outside(&mut self) {
        match crate::with(|kernel| kernel.random.below(100)) {
            0..12 => self.arrive(),
            choice => self.stir_peer(choice),
        }
    }

    fn stir_peer(&mut self, choice: usize) {
        crate::with(|kernel| {
            if kernel.links.is_empty() {
                return;
            }
            let id = kernel.random.below(kernel.links.len());
            let (link, random) = (&mut kernel.links[id], &mut kernel.random);
            match choice {
                14..29 => {
                    let is_urgent = self.may_be_urgent && random.below(4) == 0;
                    link.peer_writes(random, self.is_bulk, is_urgent);
                }
                29 if self.insists == Some(link.side) => link.insists = 1 << random.below(21),
                30..50 => drop(link.peer_reads(random, false)),
                50..53 => link.peer_shuts(),
                53 if self.may_abort => link.peer_closes(),
                54 if self.may_abort => link.peer_resets(),
                // One that is new speaks and aborts.
                57 if self.may_abort => {
                    if let Some(link) = kernel.links.last_mut() {
                        link.peer_writes(random, self.is_bulk, false);
                        link.peer_resets();
                    }
                }
                // An event that tells nothing new.
                55..57 => link.has_edge |= link.token.is_some(),
                _ => kernel.happen(id),
            }
        });
    }

    /// A client comes.
    pub(crate) fn arrive(&mut self) {
        if self.clients_left == 0 {
            return;
        }
        crate::with(|kernel| {
            let backlog = kernel.random.below(kernel.backlogs.len());
            let backlog = &mut kernel.backlogs[backlog];
            if backlog.is_open && backlog.takes_more {
                self.clients_left -= 1;
                let link = Link::new(Side::Client, backlog.is_unix, &mut kernel.random);
                kernel.links.push(link);
                backlog.queue.push_back(kernel.links.len() - 1);
                backlog.has_edge = backlog.token.is_some();
            }
        });
    }

    /// Has a client come behind the last events, while the worker begins to stop.
    pub(crate) fn arrive_late(&mut self) {
        let is_chaos = matches!(self.stage, Stage::Chaos(_));
        if is_chaos && crate::with(|kernel| kernel.random.below(2)) == 0 {
            self.arrive();
        }
    }

    /// A client comes that another worker has accepted.
    pub(crate) fn arrive_from_afar(&mut self) {
        if self.clients_left == 0 || self.shared.phase() != Phase::Running {
            return;
        }
        if let (Some(permit), Ok(hold_permit)) =
            (self.shared.admission.clients.take(), self.shared.try_reserve())
        {
            self.clients_left -= 1;
            let (link, is_unix) = crate::with(Kernel::accept_afar);
            let client = Socket::of(link, is_unix);
            if let Err(accepted) =
                self.shared.workers.send(0, Accepted { client, address: None, permit, hold_permit })
            {
                crate::with(|kernel| kernel.link_mut(accepted.client.link()).was_cut = true);
            }
        }
    }

    /// A turn has ended that asks for another after `timeout`.
    pub(crate) fn look_at_turn(&mut self, timeout: Option<Duration>) {
        let (progress, turns) = crate::with(|kernel| {
            kernel.tally.turns += 1;
            kernel.links.iter_mut().for_each(|link| link.moved = 0);
            (kernel.progress, kernel.tally.turns)
        });
        assert!(turns < TURNS_MAX, "it never ends");
        let is_idle = progress == self.progress && timeout == Some(Duration::ZERO);
        self.idle_turns = if is_idle { self.idle_turns + 1 } else { 0 };
        assert!(self.idle_turns <= IDLE_TURNS_MAX, "it turns in idle circles");
        self.progress = progress;
        self.look_at_gate();
        self.look_at_rival();
        self.look_at_targets();
        self.look_at_rejected();
        let sleeps = timeout != Some(Duration::ZERO) && crate::with(|kernel| !kernel.is_woken);
        self.look_at_crowd(sleeps);
        if sleeps {
            self.look_at_those_who_wait(timeout);
            self.look_at_half_closed();
            let is_away = self.shared.upstream.breaker().is_away();
            self.rests_in_outage = is_away && !self.shared.pauses.gate.is_paused();
        }
        self.bounds_are_met();
    }
}

impl Drop for Schedule {
    fn drop(&mut self) {
        // Sockets that another worker has sent over.
        while self.resources.mailbox.try_recv().is_ok() {}
    }
}

/// A call of the worker's, which tells the course as well.
pub(crate) fn with_both(act: impl FnOnce(&mut Course, &mut Kernel)) {
    with_course(|course| crate::with(|kernel| act(course, kernel)));
}

//! The passage of everything from one process to the next, at the end of a turn: the worker stands still and is described.
//! Then it goes on as if nothing had been, or a new process takes over, with other bounds, and describes itself alike.
//!
//! A taker may also die before it goes on. A giver ends here before its taker goes on. In truth it does so a moment later, but
//! from its description on it does nothing anyway.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use mio::{Poll, Registry};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    drive::{Course, Schedule, Stage, with_course},
    handover::{
        channel::{Frame, Outbox},
        parcel::Outgoing,
    },
    kernel::Kernel,
    patience::Rules,
    random::Random,
    rest::RestWords,
    setup::{self, Bounds},
    shared::{Phase, Shared},
    sys::{self, Listener},
    worker::{
        WorkerResources,
        handover::{BatchWords, ListenersWords},
    },
};

/// The longest that everything stands still, in microseconds.
const STALL_MAX: usize = 20_000;

/// The payload with which a giver ends, or a taker that dies.
pub(crate) struct Exit;

/// The plans for hand-overs, and the state of the present one.
#[derive(Debug, Default)]
pub(crate) struct Passage {
    /// One look in so many finds that the worker is to stand still; 0 is never.
    chance: usize,
    stand: Stand,
    fate: Fate,
    /// The words of the giver. The taker's must be the same.
    words: Vec<Words>,
    taker: Option<Taker>,
    /// The reason why the taker cannot go on.
    failure: Option<String>,
}

/// The words of a message, and its raw bytes.
type Words = (String, Vec<u8>);

/// The progress of a hand-over.
#[derive(Debug, Clone, Copy, Default)]
enum Stand {
    /// There is none.
    #[default]
    None,
    /// The worker is to stand still at the end of its turn.
    Asked,
    /// The giver stands still since that moment.
    Still(Instant),
}

/// The end of a hand-over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Fate {
    /// The giver goes on, as there is no taker.
    #[default]
    Thaw,
    /// The giver goes on, as the taker has died.
    Vain,
    TakeOver,
}

/// A process that is to take over.
#[derive(Debug)]
struct Taker {
    /// Words that it was given beside those of its worker.
    rest: RestWords,
    shared: Arc<Shared>,
    resources: Option<WorkerResources>,
    rules: Rules,
    bounds: Bounds,
}

/// A message of a worker.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum WorkerMessage {
    Listeners(ListenersWords),
    Connections(BatchWords),
}

impl Passage {
    pub(crate) fn new(random: &mut Random) -> Self {
        let chance = if random.below(3) == 0 { random.one_of([4, 15, 50]) } else { 0 };
        Self { chance, ..Self::default() }
    }

    fn take_resources(&mut self) -> WorkerResources {
        self.taker.as_mut().and_then(|taker| taker.resources.take()).expect("a taker")
    }
}

/// Returns whether the worker is to stand still.
pub(crate) fn is_asked() -> bool {
    with_course(Course::asks_for_hand_over)
}

/// The worker stands still at the end of a turn, or before its first one. Returns when it goes on.
pub(crate) fn stand_still(describe: impl FnOnce(&Outbox)) {
    if let Stand::Still(begin) = with_course(|course| course.passage.stand) {
        return go_on(begin, describe);
    }
    let begin = with_course(Course::begin_hand_over);
    let outbox = Outbox::new(begin, true);
    describe(&outbox);
    let frames = outbox.frames.into_inner();
    let fate = with_course(|course| {
        course.passage.words = frames.iter().map(Frame::words).collect();
        course.wait_for_taker();
        if course.passage.fate != Fate::Thaw {
            course.passage.taker = Some(course.spawn(frames, begin));
        }
        course.passage.fate
    });
    match fate {
        Fate::Thaw => {}
        Fate::Vain => {
            let mut resources = with_course(|course| course.passage.take_resources());
            match catch_unwind(AssertUnwindSafe(|| resources.work())) {
                Ok(Err(_shortage)) => {}
                Err(payload) if payload.is::<Exit>() => {}
                Ok(Ok(end)) => panic!("a taker ends before it goes on: {end:?}"),
                Err(payload) => resume_unwind(payload),
            }
        }
        Fate::TakeOver => {
            crate::with(Kernel::end_giver);
            resume_unwind(Box::new(Exit));
        }
    }
    with_course(Course::thaw);
}

/// The taker's worker has everything: it describes itself, and goes on or dies.
fn go_on(begin: Instant, describe: impl FnOnce(&Outbox)) {
    let failure = with_course(|course| course.passage.failure.take());
    if let Some(why) = failure {
        let is_short = crate::with(|kernel| kernel.weather.shortage > 0);
        assert!(is_short, "a taker cannot go on: {why}");
        resume_unwind(Box::new(Exit));
    }
    let outbox = Outbox::new(begin, false);
    describe(&outbox);
    let words: Vec<_> = outbox.frames.borrow().iter().map(Frame::words).collect();
    with_course(|course| {
        assert_eq!(course.passage.words, words, "the taker has something else");
        let taker = course.passage.taker.as_ref().expect("a taker");
        let balance = |shared: &Shared| shared.workers.counters(0).balance();
        let (given, taken) = (balance(&course.shared), balance(&taker.shared));
        assert_eq!(given, taken, "the taker counts something else");
        // There are counters of each worker.
        if course.shared.workers.len() == taker.shared.workers.len() {
            let rest = expected_of(&taker.rest, taker.rules.max_connecting);
            let taken = serde_json::to_value(rest_of(&taker.shared, begin)).expect("words");
            assert_eq!(rest, taken, "the taker has something else");
        }
    });
    if with_course(|course| course.passage.fate == Fate::Vain) {
        resume_unwind(Box::new(Exit));
    }
    with_course(Course::take_over);
}

/// Returns the words of what a process has once.
fn rest_of(shared: &Shared, begin: Instant) -> RestWords {
    RestWords::describe(shared, &shared.pauses.freeze(), &mut Outgoing::new(begin))
}

/// Returns the words that a taker has to have where its window is at most so wide.
fn expected_of(rest: &RestWords, max_connecting: usize) -> Value {
    let mut rest = serde_json::to_value(rest).expect("words");
    let max_connecting = max_connecting as u64;
    let pace = &mut rest["pace"];
    pace["window"] = pace["window"].as_u64().map(|window| window.min(max_connecting)).into();
    let threshold = pace["threshold"].as_u64();
    pace["threshold"] = threshold.filter(|&threshold| threshold < max_connecting).into();
    rest
}

/// The taker cannot go on.
pub(crate) fn fail(why: String) {
    with_course(|course| course.passage.failure = Some(why));
}

impl Schedule {
    /// The giver has ended: the taker begins.
    pub(crate) fn change_process(&mut self) {
        self.resources = with_course(|course| course.passage.take_resources());
    }
}

impl Rules {
    /// Returns the same with other bounds, as those of a process that takes over.
    pub(crate) fn drawn_anew(self, random: &mut Random) -> Self {
        Self {
            hold_max: self.hold_max.map(|_max| 1 + random.below(4)),
            max_connecting: random.one_of([self.max_connecting, 1, 2, 128]),
            ..self
        }
    }
}

impl Course {
    /// Returns the most clients that may be held now.
    pub(crate) fn held_max_now(&self) -> u64 {
        self.rules.hold_max.map_or(u64::MAX, |max| self.held_bound.max(max as u64))
    }

    /// Lowers the numbers by which a taker may be beyond its bounds. They become less and never more.
    pub(crate) fn bounds_are_met(&mut self) {
        let pipes = crate::with(|kernel| kernel.open_pipes());
        self.pipes_max = self.shared.pipes_per_worker.max(self.pipes_max.min(pipes));
        self.held_bound = self.held_bound.min(crate::with(|kernel| kernel.waiting_at_most()));
    }

    fn asks_for_hand_over(&mut self) -> bool {
        // Seldom where deadlines of the schedule are waited for.
        let is_chaos = matches!(self.stage, Stage::Chaos(_));
        let chance = self.passage.chance * if is_chaos { 1 } else { 10 };
        let may_begin = chance > 0
            && matches!(self.passage.stand, Stand::None)
            && self.shared.phase() == Phase::Running
            && self.stage != Stage::Stopping
            && !self.operator.awaits_result();
        // A moment that is rare: a SYN is lost, and the worker will learn of it in another process.
        let is_tempted = may_begin
            && crate::with(|kernel| {
                let is_lost = kernel.links.iter().any(|link| link.syn_repeats_at().is_some());
                is_lost && kernel.random.below(8) == 0
            });
        if is_tempted || may_begin && crate::with(|kernel| kernel.random.below(chance)) == 0 {
            self.passage.stand = Stand::Asked;
            crate::with(|kernel| kernel.is_cut_short = true);
        }
        !matches!(self.passage.stand, Stand::None)
    }

    fn begin_hand_over(&mut self) -> Instant {
        let is_chaos = matches!(self.stage, Stage::Chaos(_));
        if is_chaos && crate::with(|kernel| kernel.random.below(4)) == 0 {
            // The last that another worker sends before it stands still, too.
            self.arrive_from_afar();
        }
        let begin = sys::now();
        self.passage.stand = Stand::Still(begin);
        // What the giver has learnt in this turn is not the taker's.
        self.look_at_crowd(false);
        let is_stopping = self.shared.phase() != Phase::Running;
        self.passage.fate = crate::with(|kernel| {
            kernel.tally.hand_overs += 1;
            kernel.begin_hand_over();
            let fate = kernel.random.one_of([Fate::Thaw, Fate::Vain, Fate::TakeOver]);
            if is_stopping { Fate::Thaw } else { fate }
        });
        begin
    }

    /// Peers go on while everything stands still, and time passes.
    fn wait_for_taker(&mut self) {
        let (deeds, stall) = crate::with(|kernel| {
            let most = kernel.random.one_of([1, STALL_MAX]);
            (kernel.random.below(6), Duration::from_micros(kernel.random.below(most) as u64))
        });
        if matches!(self.stage, Stage::Chaos(_)) {
            (0..deeds).for_each(|_deed| self.stir_outside());
        }
        crate::with(|kernel| kernel.now += stall);
    }

    /// Makes another process, and moves all into it.
    fn spawn(&mut self, frames: Vec<Frame>, begin: Instant) -> Taker {
        let giver = &self.shared;
        let frame = Frame::new(&rest_of(giver, begin), Outgoing::new(begin));
        let (rest, parcel) = frame.open::<RestWords>(begin);
        let (rules, bounds) = crate::with(|kernel| {
            let rules = self.rules.drawn_anew(&mut kernel.random);
            let clients = 1 + kernel.random.below(8);
            (rules, Bounds::draw(&mut kernel.random, clients))
        });
        let started = rest.started(&parcel);
        let (shared, mailbox) = setup::shared(&rules, bounds, self.grace_period, started);
        rest.restore(&shared, &parcel);
        let (mut listeners, mut inherited, mut is_narrow) = (Vec::new(), Vec::new(), false);
        for frame in frames {
            match frame.open(begin) {
                (WorkerMessage::Connections(batch), parcel) => inherited.push((batch, parcel)),
                (WorkerMessage::Listeners(words), mut parcel) => {
                    is_narrow |= words.is_small;
                    for words in words.listeners {
                        let descriptor = parcel.descriptor().expect("a listener");
                        listeners.push(Listener::adopt(descriptor, words));
                    }
                }
            }
        }
        let resources = WorkerResources {
            index: 0,
            poll: Poll(Registry),
            listeners,
            is_small: is_narrow,
            mailbox,
            inherited,
            shared: Arc::clone(&shared),
        };
        Taker { rest, shared, resources: Some(resources), rules, bounds }
    }

    /// The giver goes on.
    fn thaw(&mut self) {
        self.passage.stand = Stand::None;
        self.passage.taker = None;
        self.idle_turns = 0;
        crate::with(Kernel::thaw);
        self.shared.workers.wake_all();
    }

    /// The taker goes on.
    fn take_over(&mut self) {
        let held = self.held_max_now();
        let Taker { shared, rules, bounds, .. } = self.passage.taker.take().expect("a taker");
        self.shared = shared;
        self.passage.stand = Stand::None;
        self.held_bound = held.min(crate::with(|kernel| kernel.waiting_at_most()));
        (self.rules, self.idle_turns) = (rules, 0);
        crate::with(|kernel| {
            kernel.take_over();
            kernel.forget_upstream(rules);
            self.pipes_max = bounds.pipes.max(kernel.open_pipes());
        });
        self.rival_moves();
        self.shared.workers.wake_all();
    }
}

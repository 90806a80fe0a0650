//! A schedule: what clients, upstreams, the network and the operator do while the worker waits, and between its calls.

use std::{
    cell::RefCell,
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, AtomicUsize},
    },
    time::Duration,
};

use crossbeam_channel::bounded;
use mio::{Poll, Registry, Waker};

use crate::{
    Address,
    barrier::Barrier,
    config,
    counters::Counters,
    event::Event,
    gate::{Gate, Mode},
    handle::{Arrival, Desk, Handle, Phase, Shared},
    hold::Hold,
    judge,
    kernel::{Backlog, Kernel, Mask, Site, Tally, Weather},
    ledger::Ledger,
    line::Line,
    link::{Link, Side},
    orders::Orders,
    random::Random,
    refusal::{Answer, Refusal},
    slots::Slots,
    sys::{self, Listener, SocketAddress},
    throttle::Throttle,
    upstream::Upstream,
    worker::{End, Post, WAKER},
};

/// How many turns in a row may ask for another at once and do nothing.
const IDLE_TURNS_MAX: u32 = 4;
/// Far more turns than any schedule needs.
const TURNS_MAX: u64 = 100_000;
/// How long a schedule may be without the peers' doing anything: beyond every deadline of a connection.
const QUIET_MAX: Duration = Duration::from_secs(100);

/// How long an upstream takes to answer a dial, unless it is silent.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(10);

/// The course of a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Anything happens, so many more times.
    Chaos(usize),
    /// Everybody reads what there is; nobody writes.
    Reading,
    /// One side of each connection ends its stream.
    HalfClosing,
    /// The other sides do too.
    Closing,
    /// The proxy stops.
    Stopping,
}

/// A worker's post and what its surroundings are up to.
pub(crate) struct Schedule {
    post: Post,
}

/// What the schedule of this thread is up to.
pub(crate) struct Course {
    pub(crate) shared: Arc<Shared>,
    stage: Stage,
    clients_left: usize,
    is_bulk: bool,
    may_abort: bool,
    /// Whether all happens to all upstream addresses, and what they are when it no longer does.
    changes_sites: bool,
    /// Whose peers may insist on writing before they read: if both did, none would ever read.
    insists: Option<Side>,
    operates: bool,
    pub(crate) rejects: bool,
    /// How many passes there were when it was last looked at during this pause.
    passes: Option<u64>,
    progress: u64,
    idle_turns: u32,
    stage_began: Duration,
    /// Connections may have been cut off by a stop.
    pub(crate) was_cut: bool,
    /// Whether every dial succeeds at once, so that their order is the clients'.
    pub(crate) keeps_order: bool,
    /// Whether the upstream may have been out of reach for too long.
    pub(crate) may_be_unreachable: bool,
}

thread_local! {
    static COURSE: RefCell<Option<Course>> = const { RefCell::new(None) };
}

/// The course of this thread's schedule, never while the kernel is at work.
pub(crate) fn with_course<T>(act: impl FnOnce(&mut Course) -> T) -> T {
    COURSE.with(|course| act(course.borrow_mut().as_mut().expect("a schedule runs")))
}

impl Schedule {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let is_faulty = random.below(4) == 0;
        let (is_unix, is_upstream_unix) = (random.below(3) == 0, random.below(3) == 0);
        let sites = if is_upstream_unix { 1 } else { 1 + random.below(3) };
        let rejects = random.below(6) == 0;
        let clients_max = 1 + random.below(8);
        let changes_sites = random.below(4) == 0;
        let pipes = random.one_of([0, 1, 2, 100]);
        let kernel = Kernel {
            now: Duration::ZERO,
            links: Vec::new(),
            backlog: Backlog {
                queue: [].into(),
                is_unix,
                token: None,
                has_edge: false,
                is_open: true,
                takes_more: true,
            },
            pipes: Vec::new(),
            is_woken: false,
            weather: Weather {
                shortage: if is_faulty { 2 + random.below(30) } else { 0 },
                panic: if random.below(20) == 0 { 1 + random.below(300) } else { 0 },
                splices: random.below(50) > 0,
                interleaves: random.below(3) > 0,
            },
            sites: vec![Site::Up; sites],
            progress: 0,
            tally: Tally::default(),
            random: Random::new(seed ^ 0x5eed),
        };
        crate::KERNEL.with(|it| *it.borrow_mut() = Some(kernel));

        let upstream = Upstream::start(config::Upstream {
            addr: Address::tcp("127.0.0.1", 0),
            connect_timeout: Duration::from_millis(if changes_sites {
                random.one_of([100, 1_000, 5_000])
            } else {
                5_000
            }),
            retry_for: Duration::ZERO,
            source_addrs: Vec::new(),
        })
        .expect("nothing to look up");
        upstream.publish(if is_upstream_unix {
            [SocketAddress::Unix("/upstream".into())].into()
        } else {
            let address = |site| SocketAddress::Inet(([127, 0, 0, 1], site).into());
            (0..u16::try_from(sites).unwrap()).map(address).collect()
        });
        let (sender, mailbox) = bounded(4);
        let desk = Desk { waker: Waker, mailbox: sender, counters: Counters::default() };
        let is_short_stop = random.below(2) == 0;
        let mode = if rejects { Mode::Reject } else { Mode::Hold };
        let resume = config::Resume {
            max_connecting: random.one_of([1, 2, 128]).try_into().expect("not 0"),
            rate: None,
        };
        let shared = Arc::new(Shared {
            gate: Arc::new(Gate::new()),
            barrier: Barrier::new(1),
            slots: Arc::new(Slots::new(clients_max)),
            accept_trouble: Throttle::default(),
            upstream,
            refusal: Refusal::new(Answer::http(Duration::ZERO), None),
            default_mode: mode,
            orders: Orders::default(),
            hold: Hold::new(&config::Hold::default()),
            line: Line::new(1, &resume),
            pipes_per_worker: pipes,
            grace_period: Duration::from_secs(if is_short_stop { 1 } else { 3600 }),
            desks: [desk].into(),
            listening: AtomicUsize::new(1),
            started: sys::now(),
            ledger: Ledger::new(None).0,
            stop_level: AtomicU8::new(0),
            stop_deadline: OnceLock::new(),
        });
        let gate = Arc::downgrade(&shared);
        shared.gate.watch_idle(move || {
            if gate.upgrade().is_some() {
                judge::idle();
            }
        });
        let course = Course {
            shared: Arc::clone(&shared),
            stage: Stage::Chaos(20 + random.below(200)),
            clients_left: 1 + random.below(2 * clients_max),
            is_bulk: random.below(3) == 0,
            may_abort: random.below(2) == 0,
            changes_sites,
            insists: random.one_of([None, Some(Side::Client), Some(Side::Upstream)]),
            operates: random.below(2) == 0,
            rejects,
            passes: None,
            progress: 0,
            idle_turns: 0,
            stage_began: Duration::ZERO,
            was_cut: false,
            keeps_order: !rejects && !changes_sites && !is_faulty,
            may_be_unreachable: changes_sites,
        };
        COURSE.with(|it| *it.borrow_mut() = Some(course));
        let post = Post {
            index: 0,
            poll: Poll(Registry),
            listener: Some(Listener),
            socket_file: None,
            is_narrow: false,
            mailbox,
            shared,
        };
        Self { post }
    }

    /// Works; false when the system did not let it.
    pub(crate) fn work(&mut self) -> bool {
        match self.post.work() {
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
        assert_eq!(self.post.shared.gate.passes(), 0, "passes are given back");
        crate::with(|kernel| {
            for link in &mut kernel.links {
                let is_on_its_way = link.is_from_afar && link.token.is_none();
                assert!(!link.is_open || is_on_its_way, "a socket is left over");
                assert!(!link.was_cut_mildly, "what a panic cut off looks whole: {link:#?}");
                link.was_cut |= !link.is_open && !link.is_waiting();
            }
            assert_eq!(kernel.open_pipes(), 0, "a pipe is left over");
            assert!(kernel.backlog.is_open || kernel.backlog.queue.is_empty());
        });
    }

    pub(crate) fn judge(self) -> Tally {
        let shared = Arc::clone(&self.post.shared);
        drop(self);
        let taken: Vec<_> = std::iter::from_fn(|| shared.slots.take()).collect();
        assert_eq!(taken.len(), shared.slots.max(), "a slot is lost");
        assert_eq!(shared.gate.passes(), 0, "a pass is lost");
        let course = COURSE.with(|it| it.borrow_mut().take()).expect("a schedule runs");
        crate::with(|kernel| judge::judge(kernel, &course))
    }
}

/// Lets things happen until there are events, or `timeout` is over.
pub(crate) fn wait(events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<()> {
    judge::turn(timeout);
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

/// The operator acts at any moment, also between two calls of the worker.
pub(crate) fn operate_in_between() {
    if crate::with(|kernel| kernel.weather.interleaves && kernel.random.below(64) == 0) {
        with_course(Course::operate);
    }
    with_course(|course| course.look_at_gate());
}

impl Course {
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
                        for link in &mut kernel.links {
                            link.answer_dial(&kernel.sites);
                        }
                    }
                    kernel.now =
                        (kernel.now + pause).min(until.unwrap_or(Duration::MAX).max(kernel.now));
                });
            }
            stage if crate::with(|kernel| kernel.settle(stage)) => {}
            // The end of a long grace period is nobody's concern.
            _ => match until.filter(|&until| until < sys::elapsed() + QUIET_MAX) {
                Some(until) => crate::with(|kernel| {
                    assert!(
                        until < self.stage_began + 2 * QUIET_MAX,
                        "it never ends: {:?}",
                        self.stage
                    );
                    kernel.now = until;
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
                crate::with(Kernel::half_close);
                Stage::HalfClosing
            }
            Stage::HalfClosing => {
                crate::with(|kernel| judge::half_closed(kernel, self));
                Stage::Closing
            }
            Stage::Closing => {
                crate::with(|kernel| judge::closed(kernel));
                self.shared.stop();
                Stage::Stopping
            }
            Stage::Stopping => panic!("it does not stop"),
        };
    }

    /// The end of all trouble.
    fn calm_down(&mut self) {
        crate::with(|kernel| {
            kernel.weather =
                Weather { shortage: 0, panic: 0, interleaves: false, ..kernel.weather };
            kernel.sites.fill(Site::Up);
        });
        self.passes = None;
        Handle(Arc::clone(&self.shared)).resume();
        self.next_stage();
    }

    /// Something happens.
    fn stir(&mut self) {
        let choice = crate::with(|kernel| kernel.random.below(100));
        match choice {
            0..7 => self.arrive(),
            7 => self.arrive_from_afar(),
            8..12 if self.operates => self.operate(),
            12..14 if self.changes_sites => crate::with(|kernel| {
                let (site, choices) = (
                    kernel.random.below(kernel.sites.len()),
                    [Site::Up, Site::Refusing, Site::Silent, Site::Full],
                );
                kernel.sites[site] = kernel.random.one_of(choices);
            }),
            _ => crate::with(|kernel| {
                if kernel.links.is_empty() {
                    return;
                }
                let id = kernel.random.below(kernel.links.len());
                let (link, random) = (&mut kernel.links[id], &mut kernel.random);
                match choice {
                    14..29 => link.peer_writes(random, self.is_bulk),
                    29 if self.insists == Some(link.side) => link.insists = 1 << random.below(21),
                    30..50 => drop(link.peer_reads(random, false)),
                    50..53 => link.peer_shuts(),
                    53 if self.may_abort => link.peer_closes(),
                    54 if self.may_abort => link.peer_resets(),
                    // An event that tells nothing new.
                    55..58 => link.has_edge |= link.token.is_some(),
                    _ => kernel.happen(id),
                }
            }),
        }
    }

    /// A client comes.
    fn arrive(&mut self) {
        if self.clients_left == 0 {
            return;
        }
        crate::with(|kernel| {
            if kernel.backlog.is_open && kernel.backlog.takes_more {
                self.clients_left -= 1;
                let link = Link::new(Side::Client, kernel.backlog.is_unix, &mut kernel.random);
                kernel.links.push(link);
                kernel.backlog.queue.push_back(kernel.links.len() - 1);
                kernel.backlog.has_edge = kernel.backlog.token.is_some();
            }
        });
    }

    /// A client comes that another worker has accepted.
    fn arrive_from_afar(&mut self) {
        if self.clients_left == 0 || self.shared.phase() != Phase::Running {
            return;
        }
        if let (Some(slot), Ok(place)) = (self.shared.slots.take(), self.shared.reserve()) {
            self.clients_left -= 1;
            let client = crate::with(Kernel::accept_afar);
            if let Err(arrival) = self.shared.send(0, Arrival { client, slot, place }) {
                crate::with(|kernel| kernel.link_mut(arrival.client.link()).was_cut = true);
            }
        }
    }

    fn operate(&mut self) {
        if !self.operates {
            return;
        }
        let handle = Handle(Arc::clone(&self.shared));
        match crate::with(|kernel| kernel.random.below(40)) {
            0..20 => {
                // The handle would wait for the turn that this happens in.
                handle.close_gate();
            }
            20..38 => {
                self.passes = None;
                handle.resume();
            }
            38 => {
                self.was_cut |= self.shared.grace_period < QUIET_MAX;
                self.shared.stop();
            }
            _ => {
                self.was_cut = true;
                self.shared.abort();
            }
        }
    }

    /// While it is paused, nobody enters.
    fn look_at_gate(&mut self) {
        if self.shared.gate.is_paused() {
            let passes = self.shared.gate.passes();
            assert!(
                self.passes.is_none_or(|before| passes <= before),
                "a client enters a closed gate"
            );
            self.passes = Some(passes);
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
    }
}

impl Kernel {
    /// The events that are due, or a part of them.
    fn gather(&mut self, events: &mut Vec<Event>) {
        let takes_all = self.random.below(2) == 0;
        if std::mem::take(&mut self.is_woken) {
            events.push(Event { token: WAKER, mask: Mask { input: true, ..Mask::default() } });
        }
        if let Some(token) =
            self.backlog.token.filter(|_| std::mem::take(&mut self.backlog.has_edge))
        {
            events.push(Event { token, mask: Mask { input: true, ..Mask::default() } });
        }
        for link in &mut self.links {
            if link.has_edge && (takes_all || self.random.below(2) == 0) {
                link.has_edge = false;
                let mask = link.told();
                if let Some(token) = link.token.filter(|_| mask != Mask::default()) {
                    link.is_known = true;
                    events.push(Event { token, mask });
                }
            }
        }
    }

    /// Whatever is on its way arrives, and everybody reads. False when nothing is left to do.
    fn settle(&mut self, stage: Stage) -> bool {
        let is_eager = self.random.below(2) == 0;
        let mut is_done = true;
        for link in &mut self.links {
            if matches!(stage, Stage::Closing | Stage::Stopping) {
                link.peer_shuts();
            }
            let moved = link.answer_dial(&self.sites)
                | link.peer_insists()
                | link.travel(&mut self.random, is_eager)
                | link.peer_reads(&mut self.random, is_eager);
            is_done &= !moved;
        }
        // What is left of the edges comes too.
        !is_done || self.links.iter().any(|link| link.has_edge)
    }

    /// Whatever the worker has left behind arrives. False when nothing is left to do.
    pub(crate) fn flush(&mut self) -> bool {
        let mut moved = false;
        for link in &mut self.links {
            moved |= link.peer_insists()
                | link.travel(&mut self.random, true)
                | link.peer_reads(&mut self.random, true);
        }
        moved
    }

    /// One side of each connection ends its stream, the same of all.
    fn half_close(&mut self) {
        let side = self.random.one_of([Side::Client, Side::Upstream]);
        self.links.iter_mut().filter(|link| link.side == side).for_each(Link::peer_shuts);
    }
}

impl Drop for Schedule {
    fn drop(&mut self) {
        // Sockets that another worker has sent over.
        while self.post.mailbox.try_recv().is_ok() {}
    }
}

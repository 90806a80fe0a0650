//! The properties of a schedule: drawn before it begins.

use std::{
    num::{NonZeroU32, NonZeroUsize},
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, bounded};
use mio::{Poll, Registry, Waker};

use crate::{
    BEGIN,
    admission::Admission,
    config::{self, HalfClosed, LogConfig, Overflow, SendProxy, address::Address},
    connection::reject::policy::{RejectPolicy, RejectResponse},
    copies::Processes,
    crowd::Crowd,
    drive::{self, Course, Schedule, Stage, set_course, with_course},
    fence::Fleet,
    fleet_view::FleetView,
    handover::{freeze::Freeze, request::UpgradeRequests, upgrades::Upgrades},
    judge,
    kernel::{Backlog, Kernel},
    link::Side,
    operator::Operator,
    passage::Passage,
    patience::Rules,
    pause::{Pauses, gate::Mode},
    proxy_header::ProxyHeaders,
    random::Random,
    rival::Rival,
    shared::{Shared, Shutdown, SocketFiles},
    stats::Counters,
    switches::{Switches, addresses},
    sys::{self, Listener, SocketAddress},
    tally::Tally,
    upstream::{Upstream, loop_guard::LoopGuard},
    weather::{Site, Weather},
    worker::WorkerResources,
    worker_pool::{Mail, WorkerHandle, WorkerPool},
};

/// The bounds of a process besides its rules, which another one may have lower.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) clients: usize,
    pub(crate) pipes: usize,
    /// The workers with a place in the queue, of which one is simulated, and one is the rival.
    pub(crate) workers: usize,
}

impl Schedule {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let (is_unix, is_upstream_unix) = (random.below(3) == 0, random.below(3) == 0);
        // A crowd waits from the beginning on.
        let has_crowd = random.below(6) == 0;
        let clients_max = if has_crowd { 6 + random.below(12) } else { 1 + random.below(8) };
        let mut rules = rules(&mut random, is_upstream_unix, has_crowd);
        // Not drawn, so that schedules without a header stay what they are.
        rules.send_proxy =
            [SendProxy::Off, SendProxy::V1, SendProxy::V2, SendProxy::Off][seed as usize % 4];
        let listeners = if is_unix { 1 } else { 1 + random.below(3) };
        let kernel = kernel(&rules, is_unix, listeners, &mut random, seed);
        crate::KERNEL.with(|it| *it.borrow_mut() = Some(kernel));

        let bounds = Bounds::draw(&mut random, clients_max);
        let grace_period = Duration::from_secs(random.one_of([1, 3600]));
        let (shared, mailbox) = shared(&rules, bounds, grace_period, *BEGIN);
        set_course(Course {
            shared: Arc::clone(&shared),
            stage: Stage::Chaos(20 + random.below(200)),
            clients_left: 1 + random.below(2 * clients_max),
            is_bulk: random.below(3) == 0,
            may_abort: random.below(2) == 0,
            may_be_urgent: random.below(8) == 0,
            insists: random.one_of([None, Some(Side::Client), Some(Side::Upstream)]),
            operator: Operator::new(&mut random),
            fleet: Fleet::new(seed),
            grace_period,
            rival: Rival::default(),
            pipes_max: bounds.pipes,
            held_bound: 0,
            passage: Passage::new(&mut random),
            rules,
            rejecting: 0,
            progress: 0,
            idle_turns: 0,
            stage_began: Duration::ZERO,
            away_since: None,
            rests_in_outage: false,
            was_cut: false,
        });
        if has_crowd {
            with_course(|course| {
                course.pause(false);
                (0..clients_max).for_each(|_client| course.arrive());
            });
        }
        let resources = WorkerResources {
            index: 0,
            poll: Poll(Registry),
            listeners: (0..listeners).map(Listener::new).collect(),
            is_small: false,
            mailbox,
            inherited: Vec::new(),
            shared,
        };
        Self { resources }
    }
}

impl Bounds {
    pub(crate) fn draw(random: &mut Random, clients_max: usize) -> Self {
        let workers = 2 + random.below(3);
        Self { clients: clients_max, pipes: random.one_of([0, 1, 2, 100]), workers }
    }
}

/// Returns what the threads of a process share, and the worker's mailbox.
pub(crate) fn shared(
    rules: &Rules,
    bounds: Bounds,
    grace_period: Duration,
    started: Instant,
) -> (Arc<Shared>, Receiver<Mail>) {
    let upstream = upstream(rules, started);
    let (sender, mailbox) = bounded(4);
    let worker = WorkerHandle { waker: Waker(0), mailbox: sender, counters: Counters::default() };
    let others = (1..bounds.workers).map(Rival::worker);
    let workers = [worker].into_iter().chain(others).collect();
    let workers = Arc::new(WorkerPool::new(workers, 1));
    let admission = admission(rules, bounds, started);
    let (pauses, _notifications) = Pauses::new(
        if rules.rejects { Mode::Reject } else { Mode::Hold },
        HalfClosed::Serve,
        None,
        Arc::clone(&admission.queue),
        Arc::clone(&upstream),
        Arc::clone(&workers),
    );
    let shared = Arc::new(Shared {
        pauses,
        admission,
        upstream,
        reject_policy: RejectPolicy::new(RejectResponse::http(Duration::ZERO), None),
        proxy_headers: ProxyHeaders::new(&[], rules.send_proxy),
        workers,
        shutdown: Shutdown::new(grace_period),
        freeze: Freeze::new(1),
        pipes_per_worker: bounds.pipes,
        log: LogConfig::default(),
        started,
        listeners: [].into(),
        socket_files: SocketFiles::default(),
        control_addr: Address::tcp("localhost", 3001),
        config_file: None,
        upgrade_requests: UpgradeRequests::default(),
        upgrades: Upgrades::default(),
        fleet: FleetView::default(),
    });
    let gate = Arc::downgrade(&shared);
    shared.pauses.gate.watch_idle(move || {
        // The end of a process that is gone is nobody's concern.
        if gate.upgrade().is_some_and(|shared| drive::is_at_work(&shared)) {
            judge::idle();
        }
    });
    (shared, mailbox)
}

fn admission(rules: &Rules, bounds: Bounds, begin: Instant) -> Admission {
    let hold = config::HoldConfig {
        timeout: rules.hold_timeout,
        max: rules.hold_max.and_then(NonZeroUsize::new),
        overflow: rules.overflow,
    };
    let resume = config::ResumeConfig {
        max_connecting: rules.max_connecting.try_into().expect("not 0"),
        rate: rules.rate,
    };
    Admission::new(bounds.clients, bounds.workers, &hold, &resume, begin)
}

fn rules(random: &mut Random, is_upstream_unix: bool, has_crowd: bool) -> Rules {
    let changes_sites = random.below(4) == 0;
    let is_faulty = random.below(4) == 0;
    let has_dead = !changes_sites && !is_faulty && !is_upstream_unix && random.below(4) == 0;
    let dead = if has_dead { 1 + random.below(6) } else { 0 };
    let bounds_hold = random.below(4) == 0;
    let connect_timeout = Duration::from_millis(if changes_sites {
        random.one_of([100, 1_000, 5_000])
    } else if has_dead {
        random.one_of([100, 1_000])
    } else {
        5_000
    });
    let has_rival = random.below(3) == 0;
    // Not all of the rules can tell what an earlier upstream has taught.
    let switches =
        !has_dead && !is_upstream_unix && !has_crowd && !has_rival && random.below(2) == 0;
    let sites = 1 + random.below(3);
    let retry_for = Duration::from_secs(if has_dead { 100 } else { random.one_of([0, 0, 2, 30]) });
    Rules {
        rejects: random.below(6) == 0,
        hold_timeout: (random.below(8) == 0)
            .then(|| Duration::from_millis(random.one_of([5, 100, 2_000]))),
        hold_max: bounds_hold.then(|| 1 + random.below(4)),
        overflow: random.one_of([Overflow::Reject, Overflow::Close, Overflow::Backlog]),
        max_connecting: random.one_of(if has_crowd { [2, 128, 128, 128] } else { [1, 1, 2, 128] }),
        rate: if random.below(6) == 0 {
            NonZeroU32::new(random.one_of([20, 500, 10_000]))
        } else {
            None
        },
        connect_timeout,
        retry_for,
        changes_sites,
        sites: match (is_upstream_unix || has_crowd, switches) {
            (true, _) => 1,
            (false, true) => 2 * sites,
            (false, false) => dead + sites,
        },
        dead,
        backlog: (!is_upstream_unix && dead == 0 && (has_crowd || random.below(4) == 0))
            .then(|| 1 + random.below(3)),
        is_upstream_unix,
        is_faulty,
        send_proxy: SendProxy::Off,
        has_rival,
        switches,
    }
}

fn kernel(
    rules: &Rules,
    is_unix: bool,
    listeners: usize,
    random: &mut Random,
    seed: u64,
) -> Kernel {
    let backlog = |_listener| Backlog {
        queue: [].into(),
        is_unix,
        token: None,
        has_edge: false,
        copies: 0,
        next: None,
        is_open: true,
        takes_more: true,
    };
    Kernel {
        now: Duration::ZERO,
        turn_began: Duration::ZERO,
        is_cut_short: false,
        may_drop: false,
        links: Vec::new(),
        backlogs: (0..listeners).map(backlog).collect(),
        accepted: Vec::new(),
        pipes: Vec::new(),
        processes: Processes::default(),
        is_woken: false,
        is_rival_woken: false,
        weather: Weather {
            shortage: if rules.is_faulty { 2 + random.below(30) } else { 0 },
            panic: if random.below(20) == 0 { 1 + random.below(300) } else { 0 },
            splices: random.below(50) > 0,
            interleaves: random.below(3) > 0,
            tells_memory: random.below(30) > 0,
        },
        sites: (0..rules.sites)
            .map(|site| if site < rules.dead { Site::Silent } else { Site::Up })
            .collect(),
        probe: None,
        missed: Duration::ZERO,
        failed: Duration::ZERO,
        up_since: (rules.dead == 0).then_some(Duration::ZERO),
        rules: *rules,
        switches: Switches::default(),
        crowd: Crowd::default(),
        may_cut: false,
        was_paused: false,
        boot: Duration::ZERO,
        may_kill: false,
        may_end: false,
        may_drain: None,
        is_stopping: false,
        next_by_rate: Duration::ZERO,
        progress: 0,
        tally: Tally::default(),
        random: Random::new(seed ^ 0x5eed),
    }
}

fn upstream(rules: &Rules, begin: Instant) -> Arc<Upstream> {
    let settings = config::UpstreamConfig {
        addr: Address::tcp("127.0.0.1", 0),
        connect_timeout: rules.connect_timeout,
        retry_for: rules.retry_for,
        source_addrs: Vec::new(),
        send_proxy: SendProxy::Off,
        state_file: None,
    };
    let upstream = Upstream::new(settings, LoopGuard::default(), begin).expect("another address");
    upstream.publish(if rules.is_upstream_unix {
        [SocketAddress::Unix("/upstream".into())].into()
    } else {
        addresses(0, if rules.switches { rules.sites / 2 } else { rules.sites })
    });
    Arc::new(upstream)
}

//! The thread of the steering: it looks for the server's listener, raises the steering, and counts down behind a stop.

use std::{
    collections::HashSet,
    fs, io,
    mem::ManuallyDrop,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
    thread::Builder,
    time::{Duration, Instant},
};

use crossbeam_channel::Receiver;

use super::{
    Look, PAUSED, Standing, Steering,
    bpf::Bpf,
    found::{Found, Unavailable},
};
use crate::{
    pause::gate::Pass,
    shared::{Phase, Shared},
    sys::SocketAddress,
    upstream::targets::{Target, TargetUse},
};

/// Least time between two looks for the server's listener because of dials.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Thread that raises and lowers the steering of one proxy.
pub(super) struct SteeringThread {
    steering: Arc<Steering>,
    shared: Arc<Shared>,
    wakes: Receiver<()>,
    /// Steered connections, each as a use of the upstream and a pass of the gate. Before the steering begins and until the
    /// first count behind its end, there is at least one.
    held: Vec<(TargetUse, Pass)>,
    /// Time from which on the end of a dial is news again.
    heeds_dials_at: Instant,
    /// Last line of the log: connections are steered, or they are not, for this reason.
    logged: Option<Result<(), String>>,
    /// Number of SYNs that another program of the namespace has taken.
    taken: u64,
}

impl SteeringThread {
    pub(super) fn new(steering: Arc<Steering>, shared: Arc<Shared>, wakes: Receiver<()>) -> Self {
        let mut thread = Self {
            steering,
            shared,
            wakes,
            held: Vec::new(),
            heeds_dials_at: Instant::now(),
            logged: None,
            taken: 0,
        };
        // An earlier process may have steered.
        thread.hold(1, &thread.shared.upstream.target());
        thread
    }

    pub(super) fn start(mut self) -> io::Result<()> {
        Builder::new().name("steering".into()).spawn(move || match self.steering.load() {
            Ok(()) => {
                if catch_unwind(AssertUnwindSafe(|| self.run())).is_err() {
                    let why = "a defect: its thread has panicked; see the log".to_owned();
                    self.steering.change(|state| state.standing = Standing::Unavailable(why));
                    // Nobody counts any more, so that no pause may be told idle.
                    let _held = ManuallyDrop::new(self.held);
                }
            }
            Err(Unavailable { why }) => {
                log::warn!("upstream.steer: connections are relayed: {why}");
                self.steering.change(|state| state.standing = Standing::Unavailable(why));
            }
        })?;
        Ok(())
    }

    fn run(&mut self) {
        // Clients that came before the marks are accepted by now.
        self.shared.pauses.await_workers();
        if let Some(Ok(rows)) = self.steering.bpf.get().map(|bpf| self.steering.table(bpf)) {
            self.steering.lock_counting().counter.spare(&rows, &own_sockets());
        }
        log::info!(
            "upstream.steer: the server sees steered clients at their own addresses and relayed ones at this host's; steered connections have no byte counts, log lines, max-connections or drain; see `tcpause help steering`"
        );
        while self.shared.phase() == Phase::Running {
            let next = self.turn();
            let now = Instant::now();
            let heeds_dials = now >= self.heeds_dials_at;
            self.steering.heeds_dials.store(heeds_dials, Ordering::Release);
            let until = [next, (!heeds_dials).then_some(self.heeds_dials_at)];
            match until.into_iter().flatten().min() {
                Some(until) => drop(self.wakes.recv_deadline(until)),
                // The sender lives as long as the steering, so that there is no error.
                None => drop(self.wakes.recv()),
            }
        }
        if let Some(left) = self.steering.count(Look::First).filter(|left| *left > 0) {
            log::info!("steered connections go on without tcpause: {left}");
        }
    }

    /// Does what is to be done now. Returns the time of the next look at the table of connections, if there is to be one.
    fn turn(&mut self) -> Option<Instant> {
        let has_dialled = self.steering.has_dialled.swap(false, Ordering::AcqRel);
        if has_dialled {
            self.heeds_dials_at = Instant::now() + LOOK_INTERVAL;
        }
        self.warn_of_taken();
        if self.steering.is_steering() {
            // A client was relayed all the same: the server may have another listener by now, or none.
            match if has_dialled { self.look() } else { Ok(()) } {
                Ok(()) => return self.look_for_idle(),
                Err(why) => self.steering.relay(&why),
            };
        }
        let next_count = self.count_down();
        match self.raise() {
            Ok(()) => None,
            Err(why) => {
                self.steering.relay(&why);
                self.log(Err(&why));
                next_count
            }
        }
    }

    /// Makes an idle moment if somebody waits for one and nobody is steered. Returns the time of the next look, if there is to
    /// be one.
    fn look_for_idle(&mut self) -> Option<Instant> {
        if !self.steering.is_awaited.load(Ordering::Acquire) {
            return None;
        }
        if self.steering.count(Look::Open) == Some(0) {
            self.steering.is_awaited.store(false, Ordering::Release);
            let (steering, shared) = (Arc::clone(&self.steering), Arc::clone(&self.shared));
            // Under both locks: neither a pause nor another stop may come between the passes.
            shared.pauses.while_open(|| {
                let state = steering.lock();
                if state.standing == Standing::Steering
                    && let Some((target, _)) = self.held.first()
                {
                    let target = Arc::clone(target.target());
                    self.hold(0, &target);
                    self.hold(1, &target);
                }
            });
            return None;
        }
        Some(self.steering.lock_counting().next_look.max(Instant::now() + LOOK_INTERVAL))
    }

    /// Holds as many passes as there are steered connections. Returns the time of the next count, if there is to be one.
    fn count_down(&mut self) -> Option<Instant> {
        // Nobody but this thread raises the steering, so that no other stop comes meanwhile.
        let is_unsettled = {
            let _state = self.steering.lock();
            self.steering.is_unsettled.load(Ordering::Acquire)
        };
        let target = match self.held.first() {
            Some((target, _)) => Arc::clone(target.target()),
            None if is_unsettled => self.shared.upstream.target(),
            None => return None,
        };
        if is_unsettled && let Err(Unavailable { why }) = Bpf::settle() {
            log::error!("connections that were steered a moment ago may still come: {why}");
        }
        let look = if is_unsettled { Look::First } else { Look::Later };
        if let Some(count) = self.steering.count(look) {
            self.steering.is_unsettled.store(false, Ordering::Release);
            self.hold(count, &target);
        }
        (!self.held.is_empty()).then(|| self.steering.lock_counting().next_look)
    }

    fn hold(&mut self, count: u64, target: &Arc<Target>) {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        self.held.truncate(count);
        while self.held.len() < count {
            self.held.push((target.begin_use(), self.shared.pauses.gate.restore(true)));
        }
        self.steering.passes.store(self.held.len() as u64, Ordering::Release);
    }

    /// Steers from now on, unless there is a reason not to, which it returns.
    fn raise(&mut self) -> Result<(), String> {
        let Shared { pauses, upstream, workers, admission, .. } = &*self.shared;
        if self.steering.lock().is_suspended {
            return Err("it hands over or stops".into());
        }
        if pauses.gate.is_paused() || pauses.gate.is_fenced() {
            return Err(PAUSED.into());
        }
        self.look()?;
        // With as many clients as there may be, others wait to be accepted.
        if workers.held() > 0 || admission.clients.taken() >= admission.clients.max() {
            return Err("clients that have waited come first".into());
        }
        let target = upstream.target();
        if let Some((earlier, _)) = self.held.first()
            && !Arc::ptr_eq(earlier.target(), &target)
        {
            let address = earlier.target().address();
            return Err(format!("connections that were steered to {address} are still there"));
        }
        // Before the first one is steered.
        self.hold((self.held.len() as u64).max(1), &target);
        let Shared { pauses, upstream, .. } = &*self.shared;
        pauses.while_open(|| {
            self.steering.change(|state| {
                if !state.is_suspended && Arc::ptr_eq(&target, &upstream.target()) {
                    state.standing = Standing::Steering;
                }
            });
        });
        if !self.steering.is_steering() {
            return Err(PAUSED.into());
        }
        self.log(Ok(&target));
        Ok(())
    }

    /// Looks for the listener of the server.
    fn look(&self) -> Result<(), String> {
        let Some(bpf) = self.steering.bpf.get() else { return Err("it begins".into()) };
        let known = self.shared.upstream.known();
        let addresses: Vec<SocketAddr> = known.list().iter().filter_map(inet).collect();
        match bpf.find(&addresses) {
            Ok(Found::Listener) => Ok(()),
            Ok(other) => Err(other.to_string()),
            Err(Unavailable { why }) => Err(why),
        }
    }

    /// Logs each change once, but for pauses, which have lines of their own.
    fn log(&mut self, now: Result<&Arc<Target>, &str>) {
        let said = now.map(drop).map_err(str::to_owned);
        if now.err() == Some(PAUSED) || self.logged.as_ref() == Some(&said) {
            return;
        }
        match now {
            Ok(target) => log::info!(
                event = "steering";
                "new connections are steered straight to the server at {}", target.address()
            ),
            Err(why) => log::info!(event = "relaying"; "new connections are relayed: {why}"),
        }
        self.logged = Some(said);
    }

    /// Warns of another program of the network namespace that decides about clients first.
    fn warn_of_taken(&mut self) {
        let taken = self.steering.bpf.get().map_or(0, Bpf::taken);
        // Where the program gives our own listener its clients, that of a predecessor does so until it ends.
        if taken > self.taken && !self.steering.catches {
            log::warn!(
                "another BPF program of this network namespace has taken clients of the proxy, {taken} until now: it decides before tcpause, and no pause holds them; detach it (`bpftool net` and `bpftool link` show it)"
            );
        }
        self.taken = taken;
    }
}

/// Returns the inodes of all sockets of this process.
fn own_sockets() -> HashSet<u32> {
    let Ok(open) = fs::read_dir("/proc/self/fd") else { return HashSet::new() };
    let targets = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let inodes = targets.filter_map(|target| {
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    });
    inodes.collect()
}

fn inet(address: &SocketAddress) -> Option<SocketAddr> {
    match address {
        SocketAddress::Inet(address) => Some(*address),
        SocketAddress::Unix(_) | SocketAddress::Abstract(_) => None,
    }
}

//! The giver: hands everything over to a taker, or goes on as if nothing had been.
//!
//! Nothing is changed by a description, so taking back is going on. The last word before a byte moves is the taker's:
//! once it has said `Taken`, this process has to end without closing anything in order.

use std::{
    fs, io,
    os::unix::net::UnixStream,
    panic::{AssertUnwindSafe, catch_unwind},
    process,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crossbeam_channel::Receiver;

use super::{
    assemble::Written,
    messages::{Begin, End, FORMAT, FORMATS, GiverHello, Message},
    rest::RestWords,
};
use crate::{
    control::Notifier,
    handover::{
        channel::{Channel, ChannelError, Outbox},
        fault,
        parcel::Outgoing,
    },
    pause::words::FrozenPauses,
    shared::{Phase, Shared},
    sys,
};

/// Longest wait for the taker to be there and to have prepared itself.
const WARM_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for TLS handshakes that are under way.
const HANDSHAKES_TIMEOUT: Duration = Duration::from_secs(4);
/// Interval of looks at their number: their ends have no event of their own.
const HANDSHAKES_LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// Longest wait for the control API to have no request in its hands.
const FRONT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the workers to end their turns.
const WORKERS_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest standstill until the taker has to go on.
const READY_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for the reason of a taker that takes no more.
const REFUSAL_TIMEOUT: Duration = Duration::from_millis(100);
/// Longest wait for the taker to say that it goes on.
const TAKEN_TIMEOUT: Duration = Duration::from_secs(1);

/// Means to hand a running proxy over to another process.
#[derive(Debug, Clone)]
pub struct Giver {
    shared: Arc<Shared>,
    notifier: Option<Arc<Notifier>>,
    /// Addresses that the taker must have too.
    written: Written,
}

/// A hand-over that has succeeded. The process has to end at once, and without running destructors.
#[derive(Debug, Clone, Copy)]
pub struct Given {
    /// Number of clients that were handed over.
    pub connections: u64,
    /// Time for which nothing moved.
    pub stall: Duration,
}

/// A hand-over that has failed, as a sentence.
type Failure = String;

impl Giver {
    pub(super) fn new(
        shared: Arc<Shared>,
        notifier: Option<Arc<Notifier>>,
        written: Written,
    ) -> Self {
        Self { shared, notifier, written }
    }

    /// Returns true once a stop has begun. Then nothing is handed over any more, and behind a hand-over the stop is to be passed on
    /// to the taker.
    pub fn is_stopping(&self) -> bool {
        self.shared.phase() != Phase::Running
    }

    /// Returns the way on which requests of the control API come. With it, the API promises upgrades.
    pub fn requests(&self) -> Receiver<()> {
        self.shared.upgrade_requests.receiver()
    }

    /// Tells callers and the status that no upgrade has come about, for the reason `why`.
    pub fn failed(&self, why: &str) {
        self.shared.upgrades.failed(why);
        self.shared.upgrade_requests.fail(why);
    }

    /// Hands everything over to the process at the other end of `channel`. On failure it calls `kill`, which has to end that
    /// process and to wait for its end, and everything goes on.
    pub fn give(&self, channel: UnixStream, kill: &mut dyn FnMut()) -> Result<Given, String> {
        let handshakes = self.shared.reject_policy.handshakes();
        let permits = handshakes.max();
        // A panic must not leave everything frozen.
        let hand_over = AssertUnwindSafe(|| self.hand_over(Channel::new(channel), &mut *kill));
        let result = catch_unwind(hand_over)
            .unwrap_or_else(|_panic| Err("a defect: the hand-over panicked, see the log".into()));
        if result.is_err() {
            kill();
            handshakes.resize(|_| Some(permits));
            self.thaw();
        }
        result
    }

    /// Goes all the way. On failure everything stands still that has been asked to.
    fn hand_over(&self, mut channel: Channel, kill: &mut dyn FnMut()) -> Result<Given, Failure> {
        self.prepare(&mut channel)?;
        // Clients whose handshake has not begun wait untouched.
        let handshakes = self.shared.reject_policy.handshakes();
        handshakes.resize(|_| Some(0));
        let deadline = Instant::now() + HANDSHAKES_TIMEOUT;
        while handshakes.taken() > 0 && Instant::now() < deadline {
            channel.await_end(HANDSHAKES_LOOK_INTERVAL).map_err(told)?;
            self.check_running()?;
        }
        self.freeze_and_give(channel, kill)
    }

    /// Refuses once a stop has begun.
    fn check_running(&self) -> Result<(), Failure> {
        if self.is_stopping() { Err("it is stopping".into()) } else { Ok(()) }
    }

    /// Agrees with the taker on what will be said. Nothing stands still yet.
    fn prepare(&self, channel: &mut Channel) -> Result<(), Failure> {
        let deadline = Instant::now() + WARM_TIMEOUT;
        channel.set_deadline(deadline);
        let formats = match receive(channel, deadline)? {
            Message::TakerHello(hello) => hello.formats,
            Message::Refuse { why } => return Err(why),
            other => return Err(unexpected(&other)),
        };
        if !formats.contains(&FORMAT) {
            return Err(format!(
                "the new program reads the formats {formats:?} of a hand-over, and this one writes {FORMATS:?}; stop and start it instead"
            ));
        }
        let Written { proxy: proxy_addr, control: control_addr, monitor: monitor_addr } =
            self.written.clone();
        let hello = GiverHello {
            format: FORMAT,
            needs: Vec::new(),
            version: env!("CARGO_PKG_VERSION").into(),
            proxy_addr,
            control_addr,
            monitor_addr,
            pid: process::id(),
            descriptors: open_descriptors(),
        };
        send(channel, &Message::GiverHello(hello))?;
        match receive(channel, deadline)? {
            Message::Warm => Ok(()),
            Message::Refuse { why } => Err(why),
            other => Err(unexpected(&other)),
        }
    }

    /// Stops everything, describes it, and gives the word. On failure everything still stands still.
    fn freeze_and_give(&self, channel: Channel, kill: &mut dyn FnMut()) -> Result<Given, Failure> {
        let shared = &self.shared;
        self.check_running()?;
        shared.freeze.ask_front();
        self.wake_front();
        if !shared.freeze.await_standing(Instant::now() + FRONT_TIMEOUT) {
            return Err("the control API has a request that takes long; try again".into());
        }
        // From here on nothing changes the pauses: expiries and calls of the library wait for this lock.
        let pauses = shared.pauses.freeze();
        self.check_running()?;
        let began = Instant::now();
        shared.freeze.ask_all();
        shared.workers.wake_all();
        if !shared.freeze.await_standing(began + WORKERS_TIMEOUT) {
            return Err("a worker's turn takes long; try again".into());
        }
        let deadline = began + READY_TIMEOUT;
        let outbox = Arc::new(Outbox { begin: sys::now(), channel: Mutex::new(channel) });
        lock(&outbox).set_deadline(deadline);
        let frozen_nanos = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        send(&mut lock(&outbox), &Message::Begin(Begin { frozen_nanos }))?;
        let before = lock(&outbox).sent;
        if let Err(why) = self.describe(&outbox, &pauses, deadline) {
            // A taker that refuses has said why.
            let refusal = receive(&mut lock(&outbox), Instant::now() + REFUSAL_TIMEOUT);
            return Err(if let Ok(Message::Refuse { why }) = refusal { why } else { why });
        }
        let mut channel = lock(&outbox);
        let end = End { messages: channel.sent - before };
        send(&mut channel, &Message::End(end))?;
        match receive(&mut channel, deadline)? {
            Message::Ready => {}
            Message::Refuse { why } => return Err(why),
            other => return Err(unexpected(&other)),
        }
        if let Err(why) = self.check_running() {
            send(&mut channel, &Message::Abort).ok();
            return Err(why);
        }
        let connections = shared.clients();
        say_go(&mut channel, kill)?;
        let stall = began.elapsed();
        fault::happen("giver", "left");
        Ok(Given { connections, stall })
    }

    /// Has all threads describe themselves, and describes the rest.
    fn describe(
        &self,
        outbox: &Arc<Outbox>,
        pauses: &FrozenPauses<'_>,
        deadline: Instant,
    ) -> Result<(), Failure> {
        self.shared.freeze.describe(Arc::clone(outbox), deadline)?;
        let parcel = outbox.parcel();
        let rest = RestWords::describe(&self.shared, pauses, &parcel);
        fault::happen("giver", "rest");
        outbox.send(&Message::Rest(Box::new(rest)), parcel).map_err(told)
    }

    /// Lets everything go on.
    fn thaw(&self) {
        self.shared.freeze.thaw();
        self.shared.workers.wake_all();
        self.wake_front();
    }

    fn wake_front(&self) {
        self.notifier.iter().for_each(|notifier| notifier.notify());
    }
}

/// Gives the word to go on, behind which only the taker knows whether it has.
fn say_go(channel: &mut Channel, kill: &mut dyn FnMut()) -> Result<(), Failure> {
    let deadline = Instant::now() + TAKEN_TIMEOUT;
    channel.set_deadline(deadline);
    // A taker that has died has not gone on, and one that hangs is killed before the channel tells.
    let sent = send(channel, &Message::Go);
    let mut answer = sent.and_then(|()| receive(channel, deadline));
    if answer.is_err() {
        kill();
        answer = receive(channel, Instant::now() + TAKEN_TIMEOUT);
    }
    match answer? {
        Message::Taken => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn lock(outbox: &Outbox) -> MutexGuard<'_, Channel> {
    outbox.channel.lock().unwrap_or_else(PoisonError::into_inner)
}

fn send(channel: &mut Channel, message: &Message) -> Result<(), Failure> {
    fault::happen("giver", message.word());
    channel.send(message, Outgoing::new(sys::now())).map_err(told)
}

/// Receives a message without descriptors.
fn receive(channel: &mut Channel, deadline: Instant) -> Result<Message, Failure> {
    channel.receive(sys::now(), deadline).map(|(message, _parcel)| message).map_err(told)
}

fn told(error: ChannelError) -> Failure {
    match error {
        ChannelError::Ended => "the new program has ended before it took over".into(),
        ChannelError::TimedOut => "the new program takes too long".into(),
        other => other.to_string(),
    }
}

fn unexpected(message: &Message) -> Failure {
    format!("the new program says something unexpected: {message:.100?}")
}

/// Returns the number of descriptors that this process has open.
fn open_descriptors() -> u64 {
    let count = |entries: io::Result<fs::ReadDir>| entries.map(Iterator::count);
    count(fs::read_dir("/proc/self/fd")).map_or(0, |count| count as u64)
}

//! The giver: hands everything over to a taker, or goes on as if nothing had been.
//!
//! Nothing is changed by a description, so to go on is to do nothing. The last word before a byte moves is the taker's:
//! once it has said `Taken`, this process has to end without closing anything in order.

use std::{
    fs, io,
    mem::ManuallyDrop,
    os::unix::net::UnixStream,
    panic::{AssertUnwindSafe, catch_unwind},
    process,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::Receiver;

use super::{
    assemble::Written,
    messages::{Begin, End, FORMAT, FORMATS, GiverHello, Message, READ_PROXY_HEADERS, TakerHello},
    predecessor::Predecessor,
    rest::RestWords,
};
use crate::{
    control::Notifier,
    handover::{
        channel::{Channel, ChannelError, Outbox},
        fault,
        parcel::Outgoing,
    },
    pause::{steer::Steer, words::FrozenPauses},
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
/// Longest time for the word that everything goes on here.
const ABORT_TIMEOUT: Duration = Duration::from_millis(100);
/// Longest wait for the taker to say that it goes on.
const TAKEN_TIMEOUT: Duration = Duration::from_secs(1);

/// Means to hand a running proxy over to another process.
#[derive(Debug, Clone)]
pub struct Giver {
    pub(super) shared: Arc<Shared>,
    notifier: Option<Arc<Notifier>>,
    /// Addresses that the taker must have too.
    written: Written,
    /// Channel to a taker that could not be told that everything goes on here. Its end would tell that taker the contrary.
    unheard: Arc<Mutex<Option<Arc<Mutex<Channel>>>>>,
}

/// Process that takes over, which the giver has started.
pub trait TakerProcess {
    /// Returns its number.
    fn pid(&self) -> u32;
    /// Stops it. Returns once it stands still or has ended.
    fn stop(&mut self);
    /// Lets it go on.
    fn resume(&mut self);
    /// Kills it. Returns once it has ended.
    fn kill(&mut self);
}

/// Process that takes over, as far as the giver has power over it.
type Power<'a> = Option<&'a mut dyn TakerProcess>;

/// A hand-over that has succeeded. The process has to end at once, and without running destructors.
#[derive(Debug)]
pub struct Given {
    /// Number of clients that were handed over.
    pub connections: u64,
    /// Time for which nothing moved.
    pub stall: Duration,
    /// Channel for the program that takes everything back in this process.
    pub channel: Option<UnixStream>,
    /// Set if the process has everything back from which this one had it.
    pub is_way_back: bool,
}

/// A hand-over that has failed, as a sentence.
type Failure = String;

impl Giver {
    pub(super) fn new(
        shared: Arc<Shared>,
        notifier: Option<Arc<Notifier>>,
        written: Written,
    ) -> Self {
        Self { shared, notifier, written, unheard: Arc::default() }
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

    /// Tells callers and the status that no upgrade has come about, for the reason `why`. The callers whose request is still in
    /// `requests` are told, too.
    pub fn failed(&self, why: &str, requests: &Receiver<()>) {
        self.shared.upgrades.failed(why);
        self.shared.upgrade_requests.fail(why, requests);
    }

    /// Hands everything over to `taker`, which is at the other end of `channel`. It calls `halt` right before the workers
    /// stand still. On failure it kills that process, and everything goes on. If this process `takes_back` everything, the
    /// outcome has the channel for that.
    pub fn give(
        &self,
        channel: UnixStream,
        taker: &mut dyn TakerProcess,
        halt: &dyn Fn(),
        takes_back: bool,
    ) -> Result<Given, String> {
        let terms = Terms { taker: taker.pid(), takes_back, earlier_stall: None, halt };
        self.give_by(terms, Channel::new(channel), Some(taker))
    }

    /// Hands everything back to a predecessor, which is not to be killed, as its end would be that of the service.
    pub(super) fn give_back(&self, predecessor: Predecessor) -> Result<Given, String> {
        let terms = Terms {
            taker: predecessor.pid,
            takes_back: false,
            earlier_stall: Some(predecessor.stall),
            halt: &|| {},
        };
        self.give_by(terms, predecessor.channel, None)
    }

    fn give_by(
        &self,
        terms: Terms<'_>,
        channel: Channel,
        mut taker: Power<'_>,
    ) -> Result<Given, String> {
        let handshakes = self.shared.reject_policy.handshakes();
        let permits = handshakes.max();
        let channel = Arc::new(Mutex::new(channel));
        // A panic must not leave everything frozen.
        let hand_over = AssertUnwindSafe(|| self.hand_over(terms, &channel, &mut taker));
        let result = catch_unwind(hand_over)
            .unwrap_or_else(|_panic| Err("a defect: the hand-over panicked, see the log".into()));
        if result.is_err() {
            match taker {
                Some(taker) => taker.kill(),
                None => self.withdraw(&channel),
            }
            handshakes.resize(|_| Some(permits));
            self.thaw();
        }
        result
    }

    /// Tells a taker that everything goes on here.
    fn withdraw(&self, channel: &Arc<Mutex<Channel>>) {
        let mut locked = lock(channel);
        locked.set_deadline(Instant::now() + ABORT_TIMEOUT);
        if send(&mut locked, &Message::Abort).is_err() {
            let mut unheard = self.unheard.lock().unwrap_or_else(PoisonError::into_inner);
            *unheard = Some(Arc::clone(channel));
        }
    }

    /// Goes all the way. On failure everything stands still that has been asked to.
    fn hand_over(
        &self,
        terms: Terms<'_>,
        shared_channel: &Arc<Mutex<Channel>>,
        taker: &mut Power<'_>,
    ) -> Result<Given, Failure> {
        let mut channel = lock(shared_channel);
        self.prepare(terms, &mut channel)?;
        // Clients whose handshake has not begun wait untouched.
        let handshakes = self.shared.reject_policy.handshakes();
        handshakes.resize(|_| Some(0));
        let deadline = Instant::now() + HANDSHAKES_TIMEOUT;
        while handshakes.taken() > 0 && Instant::now() < deadline {
            channel.await_end(HANDSHAKES_LOOK_INTERVAL).map_err(told)?;
            self.check_running()?;
        }
        drop(channel);
        self.freeze_and_give(terms, shared_channel, taker)
    }

    /// Refuses once a stop has begun, and while all hosts of a fleet are paused from here: nobody else could end that.
    fn check_running(&self) -> Result<(), Failure> {
        if self.is_stopping() {
            return Err("it is stopping".into());
        }
        match self.shared.fleet.read().and_then(|fleet| fleet.coordinating.into_iter().next()) {
            Some(name) => Err(format!(
                "it looks after the pause {name:?} of the fleet; wait for its end, or end it"
            )),
            None => Ok(()),
        }
    }

    /// Agrees with the taker on what will be said. Nothing stands still yet.
    fn prepare(&self, terms: Terms<'_>, channel: &mut Channel) -> Result<(), Failure> {
        let deadline = Instant::now() + WARM_TIMEOUT;
        channel.set_deadline(deadline);
        match receive(channel, deadline)? {
            Message::TakerHello(hello) => terms.match_hello(hello)?,
            Message::Refuse { why } => return Err(why),
            other => return Err(unexpected(&other)),
        }
        let Written { proxy: proxy_addr, control: control_addr, monitor: monitor_addr } =
            self.written.clone();
        let hello = GiverHello {
            format: FORMAT,
            needs: if self.shared.proxy_headers.are_read() {
                vec![READ_PROXY_HEADERS.to_owned()]
            } else {
                Vec::new()
            },
            version: env!("CARGO_PKG_VERSION").into(),
            proxy_addr,
            control_addr,
            monitor_addr,
            pid: process::id(),
            descriptors: open_descriptors(),
            takes_back: terms.takes_back,
        };
        send(channel, &Message::GiverHello(hello))?;
        match receive(channel, deadline)? {
            Message::Warm => Ok(()),
            Message::Refuse { why } => Err(why),
            other => Err(unexpected(&other)),
        }
    }

    /// Stops everything, describes it, and gives the word. On failure everything still stands still.
    fn freeze_and_give(
        &self,
        terms: Terms<'_>,
        channel: &Arc<Mutex<Channel>>,
        taker: &mut Power<'_>,
    ) -> Result<Given, Failure> {
        let shared = &self.shared;
        self.check_running()?;
        // Before anything stands still, as it waits for the kernel.
        shared.pauses.steer().into_iter().for_each(Steer::suspend);
        shared.freeze.ask_front();
        self.wake_front();
        if !shared.freeze.await_standing(Instant::now() + FRONT_TIMEOUT) {
            return Err("the control API has a request that takes long; try again".into());
        }
        (terms.halt)();
        // From here on nothing changes the pauses: expiries and calls of the library wait for this lock.
        let pauses = shared.pauses.freeze();
        self.check_running()?;
        let began = Instant::now();
        shared.freeze.ask_all();
        shared.workers.wake_all();
        if !shared.freeze.await_standing(began + WORKERS_TIMEOUT) {
            return Err("a worker's turn takes long; try again".into());
        }
        // Workers that a stop has ended do not stand still.
        self.check_running()?;
        let deadline = began + READY_TIMEOUT;
        let outbox = Arc::new(Outbox { begin: sys::now(), channel: Arc::clone(channel) });
        lock(channel).set_deadline(deadline);
        let frozen = began.elapsed() + terms.earlier_stall.unwrap_or_default();
        let frozen_nanos = u64::try_from(frozen.as_nanos()).unwrap_or(u64::MAX);
        send(&mut lock(channel), &Message::Begin(Begin { frozen_nanos }))?;
        let before = lock(channel).sent;
        if let Err(why) = self.describe(&outbox, &pauses, deadline) {
            // A taker that refuses has said why.
            let refusal = receive(&mut lock(channel), Instant::now() + REFUSAL_TIMEOUT);
            return Err(if let Ok(Message::Refuse { why }) = refusal { why } else { why });
        }
        let mut channel = lock(channel);
        let end = End { messages: channel.sent - before };
        send(&mut channel, &Message::End(end))?;
        match receive(&mut channel, deadline)? {
            Message::Ready => {}
            Message::Refuse { why } => return Err(why),
            other => return Err(unexpected(&other)),
        }
        self.check_running()?;
        let connections = shared.clients();
        let for_return = terms.takes_back.then(|| channel.stream()).transpose();
        let for_return = for_return.map_err(|error| format!("no further descriptor: {error}"))?;
        say_go(&mut channel, taker)?;
        let _has_nothing = EndAtPanic;
        let stall = began.elapsed();
        // Locked for ever: the pauses are the taker's, and this process neither ends one nor logs the end.
        let _pauses = ManuallyDrop::new(pauses);
        fault::happen("giver", "left");
        let is_way_back = terms.earlier_stall.is_some();
        Ok(Given { connections, stall, channel: for_return, is_way_back })
    }

    /// Has all threads describe themselves, and describes the rest.
    fn describe(
        &self,
        outbox: &Arc<Outbox>,
        pauses: &FrozenPauses<'_>,
        deadline: Instant,
    ) -> Result<(), Failure> {
        self.shared.freeze.describe(Arc::clone(outbox), deadline)?;
        let mut parcel = outbox.parcel();
        let rest = RestWords::describe(&self.shared, pauses, &mut parcel);
        fault::happen("giver", "rest");
        outbox.send(&Message::Rest(Box::new(rest)), parcel).map_err(told)
    }

    /// Lets everything go on.
    fn thaw(&self) {
        self.shared.freeze.thaw();
        self.shared.workers.wake_all();
        self.shared.pauses.steer().into_iter().for_each(Steer::go_on);
        self.wake_front();
    }

    fn wake_front(&self) {
        self.notifier.iter().for_each(|notifier| notifier.notify());
    }
}

/// Agreement on a hand-over.
#[derive(Clone, Copy)]
struct Terms<'a> {
    /// Number of the process that takes over.
    taker: u32,
    /// Set if this process takes everything back.
    takes_back: bool,
    /// Standstill of the hand-over before, of which this one is the way back.
    earlier_stall: Option<Duration>,
    /// Called right before the workers stand still.
    halt: &'a dyn Fn(),
}

/// End of a process from which everything was taken over, by a panic.
struct EndAtPanic;

impl Drop for EndAtPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            process::exit(0);
        }
    }
}

impl Terms<'_> {
    /// Refuses a taker that cannot be what is needed.
    fn match_hello(self, hello: TakerHello) -> Result<(), Failure> {
        let TakerHello { formats, version: _, pid, can_take_back } = hello;
        if !formats.contains(&FORMAT) {
            return Err(format!(
                "the new program reads the formats {formats:?} of a hand-over, and this one writes {FORMATS:?}; stop and start it instead"
            ));
        }
        if self.takes_back && !can_take_back {
            return Err("the new program is too old for an upgrade in which the number of the process stays; stop and start it instead".into());
        }
        // Over another process, this one has no power, and nobody follows that one.
        if pid.is_some_and(|pid| pid != self.taker) {
            return Err("the new program runs tcpause in another process than the one that was started; write exec before the command in its script".into());
        }
        Ok(())
    }
}

/// Gives the word to go on, behind which only the taker knows whether it has.
fn say_go(channel: &mut Channel, taker: &mut Power<'_>) -> Result<(), Failure> {
    let deadline = Instant::now() + TAKEN_TIMEOUT;
    channel.set_deadline(deadline);
    send(channel, &Message::Go)?;
    let answer = match (channel.receive(sys::now(), deadline), taker) {
        (Err(ChannelError::TimedOut), Some(taker)) => {
            // Once it stands still, the channel tells whether it has gone on.
            taker.stop();
            let answer = receive(channel, Instant::now());
            if matches!(answer, Ok(Message::Taken)) {
                taker.resume();
            }
            answer
        }
        (Err(ChannelError::TimedOut), None) => await_word(channel),
        (answer, _) => answer.map(|(message, _parcel)| message).map_err(told),
    };
    match answer? {
        Message::Taken => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// Waits for a taker over which this process has no power, for as long as that one lives: only it knows whether it goes on.
fn await_word(channel: &mut Channel) -> Result<Message, Failure> {
    log::error!(
        "the process that is to take everything back does not answer; nothing moves until it does, or ends"
    );
    loop {
        match channel.receive(sys::now(), Instant::now() + TAKEN_TIMEOUT) {
            Err(ChannelError::TimedOut) => {}
            answer => return answer.map(|(message, _parcel)| message).map_err(told),
        }
    }
}

fn lock(channel: &Mutex<Channel>) -> MutexGuard<'_, Channel> {
    channel.lock().unwrap_or_else(PoisonError::into_inner)
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
        ChannelError::Malformed(why) => format!("the new program broke the protocol: {why}"),
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

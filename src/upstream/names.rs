//! The thread that looks the upstream's name up: at intervals, when failing connections ask for it, and before a resume. It
//! follows the upstream where that is switched.

use std::{
    io,
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::Upstream;
use crate::{
    config::address::{self, Address},
    error::Error,
    sys::SocketAddress,
};

/// Interval of look-ups while none is requested.
const LOOK_UP_INTERVAL: Duration = Duration::from_secs(30);

/// Least interval of look-ups requested by failing connections, which may be many.
const ASKED_INTERVAL: Duration = Duration::from_secs(1);

/// Length of the queue of requests for a look-up. Further ones would ask for nothing new.
const REQUESTS_MAX: usize = 16;

/// Request for a look-up. Its sender, if any, is dropped when the look-up is done.
pub(super) type Request = Option<Sender<()>>;

impl Upstream {
    /// Starts the look-up thread, which ends when the upstream is dropped. It looks the name up, and checks whether an
    /// address has become tcpause's own. It calls `on_loop` when that happens to an address that was dialled.
    pub(crate) fn start(
        self: &Arc<Self>,
        on_loop: impl Fn() + Send + 'static,
    ) -> Result<(), Error> {
        let (requests, receiver) = bounded(REQUESTS_MAX);
        self.look_up.get_or_init(|| requests);
        let weak = Arc::downgrade(self);
        let look_up = move || {
            let Some(target) = weak.upgrade().map(|upstream| upstream.target()) else { return };
            // Nobody waits for this thread when the upstream is dropped meanwhile.
            let result = look_up(target.address());
            let Some(upstream) = weak.upgrade() else { return };
            let [found, failed] = &upstream.look_ups;
            if result.is_ok() { found } else { failed }.fetch_add(1, Ordering::Relaxed);
            match result.map(|found| upstream.publish_for(&target, found)) {
                Ok(true) => on_loop(),
                Ok(false) => {}
                Err(error) => {
                    let address = target.address();
                    log::warn!("cannot look up {address} of upstream.addr: {error}; trying again");
                }
            }
        };
        let run = move || run(&receiver, look_up);
        thread::Builder::new()
            .name("names".into())
            .spawn(run)
            .map(drop)
            .map_err(|error| Error::no_thread("looks names up", &error))
    }

    /// Requests a look-up without waiting for it.
    pub(crate) fn ask(&self) {
        if let Some(look_up) = self.look_up.get() {
            // If the queue is full, a look-up is due anyway.
            look_up.try_send(None).ok();
        }
    }

    /// Looks the name up anew, and waits up to `timeout` for the result. Without one, the known addresses stay.
    pub(crate) fn refresh(&self, timeout: Duration) {
        if let Some(look_up) = self.look_up.get() {
            let (done, wait) = bounded(0);
            if look_up.try_send(Some(done)).is_err()
                || wait.recv_timeout(timeout) == Err(RecvTimeoutError::Timeout)
            {
                let target = self.target();
                let address = target.address();
                log::warn!("looking up {address} takes long; going on with what is known");
            }
        }
    }
}

/// Returns true if `address` has to be looked up.
pub(super) fn is_name(address: &Address) -> bool {
    matches!(address, Address::Tcp { host, .. } if host.parse::<IpAddr>().is_err())
}

/// Asks the system for the socket addresses of an upstream, which may take long.
pub(crate) fn look_up(to: &Address) -> io::Result<Box<[SocketAddress]>> {
    Ok(match to {
        Address::Tcp { host, port } => {
            address::look_up(host, *port)?.into_iter().map(SocketAddress::Inet).collect()
        }
        Address::Unix(path) => [SocketAddress::Unix(path.clone())].into(),
        Address::Abstract(name) => [SocketAddress::Abstract(name.clone())].into(),
    })
}

/// Calls `look_up` at once, on request and at intervals, until all senders are gone.
fn run(requests: &Receiver<Request>, look_up: impl Fn()) {
    let mut waiting = Vec::new();
    loop {
        let begun = Instant::now();
        look_up();
        // Dropping the senders wakes the waiting callers. A request that came during the look-up gets the next one.
        drop(waiting);
        match wait(requests, begun) {
            Some(callers) => waiting = callers,
            None => return,
        }
    }
}

/// Waits until the next look-up is due: at once if a caller waits for it, soon after a plain request. Returns the
/// senders of waiting callers, or `None` if all senders are gone.
fn wait(requests: &Receiver<Request>, begun: Instant) -> Option<Vec<Sender<()>>> {
    let mut due = begun + LOOK_UP_INTERVAL;
    loop {
        match requests.recv_deadline(due) {
            Ok(Some(done)) => {
                let others = requests.try_iter().take(REQUESTS_MAX).flatten();
                return Some(std::iter::once(done).chain(others).collect());
            }
            Ok(None) => {
                due = begun + ASKED_INTERVAL;
                if due <= Instant::now() {
                    return Some(Vec::new());
                }
            }
            Err(RecvTimeoutError::Timeout) => return Some(Vec::new()),
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    #[test]
    fn a_crowd_that_asks_does_not_get_a_look_up_each() {
        let (requests, receiver) = bounded(REQUESTS_MAX);
        let looked_up = Arc::new(AtomicU64::new(0));
        let begun = Instant::now();
        let thread = thread::Builder::new().spawn({
            let looked_up = Arc::clone(&looked_up);
            let count = move || {
                looked_up.fetch_add(1, Ordering::Relaxed);
            };
            move || run(&receiver, count)
        });
        for _client in 0..1000 {
            requests.send(None).unwrap();
        }
        // A look-up with a waiting caller comes at once all the same.
        let (done, wait) = bounded(0);
        requests.send(Some(done)).unwrap();
        assert_eq!(wait.recv_timeout(DEADLINE), Err(RecvTimeoutError::Disconnected));
        drop(requests);
        thread.unwrap().join().unwrap();
        let (count, most) = (looked_up.load(Ordering::Relaxed), 2 + begun.elapsed().as_secs());
        assert!((2..=most).contains(&count), "{count} look-ups, {most} expected at most");
    }
}

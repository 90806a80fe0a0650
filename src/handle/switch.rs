//! The switch to another upstream: looking whether it answers, and leading new connections there.

use std::{
    io,
    os::fd::OwnedFd,
    sync::MutexGuard,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::Handle;
use crate::{
    config::{address::Address, duration::format_duration},
    pause::steer::Steer,
    proxy_header::own_header,
    sys::{SocketAddress, reach::reach},
    upstream::{
        look_up,
        targets::{Target, TooMany},
    },
};

/// Look at an upstream before a switch to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Check {
    /// It has to accept a connection.
    Connect,
    /// None: it may come later.
    None,
}

/// Reason why a switch is refused. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SwitchError {
    /// The address leads back to a listener of tcpause, which is named.
    LeadsBack(String),
    /// It cannot be reached, for this reason.
    Unreachable(String),
    /// As many earlier upstreams as there may be still have connections.
    TooMany,
    /// The state file cannot be written, for this reason.
    NotRemembered(String),
    /// The proxy stops.
    Stopping,
}

/// The present upstream, and the connections to all of them.
#[derive(Debug, Serialize)]
pub(crate) struct UpstreamStatus {
    upstream: String,
    configured: String,
    persistent: bool,
    up: bool,
    addresses: Vec<String>,
    connections: Vec<UpstreamConnections>,
}

/// Number of connections to an upstream, with those that are being dialled.
#[derive(Debug, Serialize)]
struct UpstreamConnections {
    upstream: String,
    active: u64,
}

impl Handle {
    /// Returns the present upstream, and the connections to it and to those before it.
    pub(crate) fn upstream(&self) -> UpstreamStatus {
        let upstream = &self.0.upstream;
        let present = upstream.target();
        let addresses = upstream.known();
        let connections = upstream.targets().list().into_iter().filter_map(|target| {
            let (upstream, active) = (target.address().to_string(), target.connections());
            let is_shown = active > 0 || target.id() == present.id();
            is_shown.then_some(UpstreamConnections { upstream, active })
        });
        UpstreamStatus {
            upstream: present.address().to_string(),
            configured: upstream.configured().to_string(),
            persistent: upstream.is_persistent(),
            up: !upstream.breaker().is_away(),
            addresses: addresses.list().iter().map(ToString::to_string).collect(),
            connections: connections.collect(),
        }
    }

    /// Returns the address of the upstream in the configuration.
    pub(crate) fn configured_upstream(&self) -> &Address {
        self.0.upstream.configured()
    }

    /// Returns true if new connections lead to `address` already.
    pub(crate) fn is_upstream(&self, address: &Address) -> bool {
        self.0.upstream.target().address() == address
    }

    /// Returns true if `address` is the present upstream, or one of its socket addresses.
    pub(crate) fn leads_to(&self, address: &Address) -> bool {
        self.0.upstream.leads_to(address)
    }

    /// Returns the number of connections to `address`, which may have been an upstream before.
    pub(crate) fn connections_to(&self, address: &Address) -> u64 {
        self.0.upstream.connections_to(address)
    }

    /// Returns the upstreams with connections if `address` is a name that none of them has.
    pub(crate) fn upstreams_beside(&self, address: &Address) -> Vec<String> {
        self.0.upstream.upstreams_beside(address)
    }

    /// Registers the callback for each moment at which an upstream has lost its last connection.
    pub(crate) fn watch_upstreams(&self, watcher: impl Fn() + Send + Sync + 'static) {
        self.0.upstream.targets().watch(watcher);
    }

    /// Returns the longest time that [`Handle::examine`] is to take.
    pub(crate) fn examination_time(&self) -> Duration {
        self.0.upstream.connect_timeout()
    }

    /// Looks `address` up, and looks whether a server answers there. Returns what was found. This blocks, for as long as the
    /// look-up takes and at most `upstream.connect-timeout` more.
    pub(crate) fn examine(
        &self,
        address: &Address,
        check: Check,
    ) -> Result<Box<[SocketAddress]>, SwitchError> {
        let deadline = Instant::now() + self.examination_time();
        let found = match look_up(address) {
            Ok(found) => found,
            Err(error) if check == Check::None => {
                log::warn!("cannot look up {address}, which is to be the upstream: {error}");
                [].into()
            }
            Err(error) => return Err(self.unreachable(address, &error)),
        };
        if let Some(own) = self.0.upstream.find_own(&found) {
            return Err(SwitchError::LeadsBack(own));
        }
        if check == Check::Connect {
            self.reach_any(&found, deadline).map_err(|error| self.unreachable(address, &error))?;
        }
        Ok(found)
    }

    /// Connects to the first of `found` that answers. Each has an equal share of the time that is left.
    fn reach_any(&self, found: &[SocketAddress], deadline: Instant) -> io::Result<()> {
        let mut result = Err(io::Error::other("its name has no address"));
        for (address, others) in found.iter().zip((0..found.len()).rev()) {
            let left = deadline.saturating_duration_since(Instant::now());
            let share = u32::try_from(others + 1).map_or(left, |count| left / count);
            result = self.reach_from_any(address, share).map(drop);
            if result.is_ok() {
                break;
            }
        }
        result
    }

    /// Connects from the first source address that has a free port.
    fn reach_from_any(&self, address: &SocketAddress, timeout: Duration) -> io::Result<OwnedFd> {
        let version = self.0.proxy_headers.send;
        let mut result = Err(io::Error::other("upstream.source-addrs has none of its kind"));
        for &source in self.0.upstream.sources(address) {
            result = reach(address, source, |ends| own_header(version, ends), timeout);
            if !matches!(&result, Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable) {
                break;
            }
        }
        result
    }

    /// Returns the error for an upstream that cannot be reached.
    fn unreachable(&self, address: &Address, error: &io::Error) -> SwitchError {
        let time = format_duration(self.examination_time());
        let why = match error.kind() {
            io::ErrorKind::TimedOut => format!(" within {time}"),
            _ => format!(": {}", without_number(error)),
        };
        SwitchError::Unreachable(format!("{address} does not answer{why}"))
    }

    /// Keeps switches waiting. Returns none while one is made.
    pub(crate) fn try_lock_switches(&self) -> Option<MutexGuard<'_, ()>> {
        self.0.upstream.try_lock_switches()
    }

    /// Leads new connections to `address`. It was examined and `found`, unless it seemed to be the present upstream. Once this
    /// has returned, no dial of an earlier upstream begins, unless a worker's turn takes longer than a second, which is logged.
    /// Connections that are there go on. This blocks while the state file is written.
    pub(crate) fn switch(
        &self,
        address: &Address,
        found: Option<Box<[SocketAddress]>>,
        check: Check,
        by: &str,
    ) -> Result<(), SwitchError> {
        let (upstream, pauses) = (&self.0.upstream, &self.0.pauses);
        let found = match found {
            // Another switch has led away from it since.
            None if !self.is_upstream(address) => self.examine(address, check)?,
            found => found.unwrap_or_default(),
        };
        let _order = upstream.lock_switches();
        if self.is_stopping() {
            return Err(SwitchError::Stopping);
        }
        if self.is_upstream(address) {
            log::info!("{by} asks for the upstream {address}, which is there already");
            return Ok(());
        }
        let target = upstream.prepare(address).map_err(|TooMany| SwitchError::TooMany)?;
        // First: a switch that is forgotten would lead back to a server that was stopped.
        let remembered = upstream.remember(address);
        let is_remembered =
            remembered.map_err(|error| SwitchError::NotRemembered(without_number(&error)))?;
        let before = upstream.switch_to(&target, found);
        pauses.steer().into_iter().for_each(Steer::stop);
        // The name may have other addresses by now, or none was found.
        upstream.ask();
        pauses.await_workers();
        pauses.notify();
        self.0.upstream.count_switch(true);
        let listed = upstream.targets().list();
        let others = listed.iter().filter(|it| it.id() != target.id());
        let stay = others.map(|it| it.connections()).sum();
        log_switch(&before, &target, by, stay, self.0.workers.held());
        if !is_remembered && address != upstream.configured() {
            log::warn!(
                "the upstream is {address} until the next start: set upstream.state-file to remember it"
            );
        }
        Ok(())
    }

    /// Counts and logs a switch that is refused.
    pub(crate) fn refuse_switch(&self, address: &Address, error: &SwitchError, by: &str) {
        self.0.upstream.count_switch(false);
        let present = self.0.upstream.target();
        let (present, because) = (present.address(), error.to_string());
        log::warn!(
            event = "switch-refused", by = by, upstream = present.to_string(),
            refused = address.to_string(), because = because;
            "{by} asks for the upstream {address}, which is refused: {because}; it stays {present}"
        );
    }
}

/// Returns the text of an error without its number, which tells an operator nothing.
fn without_number(error: &io::Error) -> String {
    error.to_string().split(" (os error").next().unwrap_or_default().to_owned()
}

fn log_switch(before: &Target, target: &Target, by: &str, stay: u64, held: u64) {
    let (from, to) = (before.address(), target.address());
    log::info!(
        event = "switched", by = by, from = from.to_string(), upstream = to.to_string(),
        connections = stay, held = held;
        "{by} has switched the upstream from {from} to {to}; connections that stay at other servers: {stay}; clients held: {held}"
    );
}

impl std::fmt::Display for SwitchError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::LeadsBack(own) => {
                write!(f, "it leads back to {own}; write where the server behind the proxy listens")
            }
            Self::Unreachable(why) => f.write_str(why),
            Self::TooMany => f.write_str(
                "eight earlier upstreams still have connections; wait for their end, or end them by tcpause kill --upstream ADDRESS",
            ),
            Self::NotRemembered(why) => {
                write!(f, "the file of upstream.state-file cannot be written: {why}")
            }
            Self::Stopping => f.write_str("tcpause is stopping"),
        }
    }
}

#[cfg(test)]
impl Handle {
    /// Keeps switches waiting, as a slow disk does.
    pub(crate) fn lock_switches(&self) -> MutexGuard<'_, ()> {
        self.0.upstream.lock_switches()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use crossbeam_channel::bounded;
    use mio::{Events, Poll, Token, Waker};

    use super::*;
    use crate::{stats::Counters, worker_pool::WorkerHandle};

    const DEADLINE: Duration = Duration::from_secs(10);

    /// Returns a handle to a proxy with one worker, and the poll that wakes it.
    fn with_worker() -> (Handle, Poll) {
        let poll = Poll::new().unwrap();
        let waker = Waker::new(poll.registry(), Token(0)).unwrap();
        let worker = WorkerHandle { waker, mailbox: bounded(1).0, counters: Counters::default() };
        (crate::tests::handle_of([worker].into()), poll)
    }

    fn switch(handle: &Handle, port: u16) {
        let address = Address::tcp("127.0.0.1", port);
        handle.switch(&address, Some([].into()), Check::None, "a test").unwrap();
    }

    #[test]
    fn a_switch_waits_for_workers_in_their_turn() {
        let (handle, _poll) = with_worker();
        let begin = Instant::now();
        switch(&handle, 7);
        assert!(begin.elapsed() >= Duration::from_secs(1), "the worker has not ended its turn");
    }

    #[test]
    fn a_worker_that_is_asked_for_the_end_of_its_turn_knows_the_new_upstream() {
        let (handle, mut poll) = with_worker();
        let worker = thread::Builder::new()
            .spawn({
                let handle = handle.clone();
                move || {
                    let mut events = Events::with_capacity(1);
                    poll.poll(&mut events, Some(DEADLINE)).unwrap();
                    assert!(!events.is_empty());
                    let knows = handle.is_upstream(&Address::tcp("127.0.0.1", 7));
                    handle.pauses().barrier.leave(0);
                    knows
                }
            })
            .unwrap();
        switch(&handle, 7);
        assert!(worker.join().unwrap());
    }
}

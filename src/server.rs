//! `Server`: a running proxy.

use crate::{Address, Config, Error, Handle};

/// A running proxy: its listeners are bound and its threads run.
pub struct Server;

/// How a proxy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Every connection had ended by itself.
    Drained,
    /// The grace period was over; what was left was closed.
    DeadlineHit,
    /// [`Server::abort`] closed what was left.
    Aborted,
}

impl Server {
    /// Binds every listener and starts every thread, or changes nothing.
    pub fn start(config: Config) -> Result<Self, Error> {
        unimplemented!("{config:?}")
    }

    /// A handle to pause, resume and observe the proxy.
    pub fn handle(&self) -> Handle {
        unimplemented!()
    }

    /// Where clients connect to, with the real port.
    pub fn proxy_addr(&self) -> &Address {
        unimplemented!()
    }

    /// Where the control API listens, with the real port.
    pub fn control_addr(&self) -> &Address {
        unimplemented!()
    }

    /// Begins a graceful stop; returns at once. Connections have the grace period to end.
    pub fn stop(&self) {}

    /// Closes everything; returns at once.
    pub fn abort(&self) {}

    /// Waits until the proxy has ended.
    pub fn join(self) -> Outcome {
        unimplemented!()
    }
}

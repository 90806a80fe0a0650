//! `Server`: binds everything, starts every thread, and ends them all.

mod announce;
mod assemble;
mod give;
mod header_check;
mod heartbeat;
mod limits;
mod listen;
mod messages;
mod predecessor;
mod rest;
mod sockets;
mod supervisor;
mod take;

use std::{sync::Arc, thread::JoinHandle};

pub use self::{
    give::{Given, Giver, TakerProcess},
    heartbeat::Heartbeat,
    predecessor::{Farewell, Predecessor},
    sockets::Sockets,
    take::refuse,
};
use crate::{
    config::{Config, address::Address},
    control::Control,
    error::Error,
    fleet::FleetThreads,
    handle::Handle,
    shared::{Phase, Shared},
    steering::Starter,
    upstream::state_file::StateFile,
    worker::End,
};
use assemble::{Plan, Written};

/// A running proxy: its listeners are bound and its threads run. Dropping it closes everything at once.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<End>>,
    control: Option<Control>,
    proxy_addr: Address,
    control_addr: Address,
    monitor_addr: Option<Address>,
    fleet: Option<FleetThreads>,
    /// Means to steer, until it begins.
    steering: Option<Starter>,
    written: Written,
}

/// Handle to stop a [`Server`] from another thread.
#[derive(Debug, Clone)]
pub struct Stopper(Arc<Shared>);

/// End of a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Every connection had ended by itself.
    Drained,
    /// The grace period was over; the remaining connections were closed.
    DeadlineHit,
    /// [`Server::abort`] closed the remaining connections.
    Aborted,
}

impl Server {
    /// Checks the configuration as a start does, without opening a socket: settings that contradict each other, unusable
    /// files, and a group that this process may not give to a file are errors.
    pub fn check(config: &Config) -> Result<(), Error> {
        let (_policy, access, _fleet) = assemble::load(config)?;
        assemble::check_group(access)?;
        let file = config.upstream.state_file.clone().map(StateFile::new);
        file.map_or(Ok(()), |file| file.check(&config.upstream.addr))
    }

    /// Connects to the upstream, if PROXY headers are sent. Returns a question for the operator if it closes the connection at
    /// once.
    #[doc(hidden)]
    pub fn ask_about_header(config: &Config) -> Option<String> {
        header_check::ask(config)
    }

    /// Binds every listener and starts every thread, or leaves everything as it was.
    pub fn start(config: Config) -> Result<Self, Error> {
        Self::start_on(Sockets::default(), config)
    }

    /// Starts like [`Server::start`], but listens on these sockets in place of the addresses of the configuration.
    pub fn start_on(sockets: Sockets, mut config: Config) -> Result<Self, Error> {
        sockets.set_addresses(&mut config);
        let mut plan = Plan::new(config)?;
        let listeners = plan.listen(sockets)?;
        let (server, listened_at) = plan.assemble(listeners, None)?;
        server.announce(&listened_at);
        Ok(server)
    }

    /// Returns a handle to pause, resume and observe the proxy.
    pub fn handle(&self) -> Handle {
        Handle::new(Arc::clone(&self.shared))
    }

    /// Returns the means to stop the proxy from another thread, while this one is in [`Server::join`].
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Returns the proof that the threads of the proxy go on, for a watchdog.
    pub fn heartbeat(&self) -> Heartbeat {
        Heartbeat::new(&self.shared, self.control.as_ref().map(Control::notifier))
    }

    /// Returns the means to hand everything over to another process.
    pub fn giver(&self) -> Giver {
        let notifier = self.control.as_ref().map(Control::notifier);
        Giver::new(Arc::clone(&self.shared), notifier, self.written.clone())
    }

    /// Returns the address that clients connect to, with the real port; the first one, if the name has several.
    pub fn proxy_addr(&self) -> &Address {
        &self.proxy_addr
    }

    /// Returns the address of the control API, with the real port; the first one, if the name has several.
    pub fn control_addr(&self) -> &Address {
        &self.control_addr
    }

    /// Returns the address of the monitor, with the real port; the first one, if the name has several.
    pub fn monitor_addr(&self) -> Option<&Address> {
        self.monitor_addr.as_ref()
    }

    /// Begins a graceful stop and returns at once. Only clients that are queued already are accepted; connections have the
    /// grace period to end, and held clients are held for as long, in case of a resume.
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// Closes everything; returns at once.
    pub fn abort(&self) {
        self.shared.abort();
    }

    /// Waits until the proxy has ended. It ends by [`Server::stop`] or [`Server::abort`].
    pub fn join(mut self) -> Outcome {
        // A worker whose thread is gone has cut its connections.
        let ends: Vec<End> =
            self.workers.drain(..).map(|worker| worker.join().unwrap_or(End::Cut)).collect();
        // Before the listeners of the API, as another process may take over a file without one.
        self.shared.socket_files.remove_of_control();
        drop(self.control.take());
        self.fleet.take().into_iter().for_each(FleetThreads::leave);
        if ends.iter().all(|&end| end == End::Drained) {
            Outcome::Drained
        } else if self.shared.phase() == Phase::Aborting {
            Outcome::Aborted
        } else {
            Outcome::DeadlineHit
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.abort();
        // From here on nothing is open and no socket file is left, even if the program ends at once.
        for worker in self.workers.drain(..) {
            worker.join().ok();
        }
    }
}

impl Stopper {
    /// Stops as [`Server::stop`] does.
    pub fn stop(&self) {
        self.0.stop();
    }

    /// Aborts as [`Server::abort`] does.
    pub fn abort(&self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests;

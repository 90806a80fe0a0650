//! Zero downtime for the clients of a server that restarts.
//!
//! tcpause carries bytes between clients and an upstream. While it is paused, it holds new clients, so that the upstream can
//! be restarted. On resume it serves them, oldest first.
//!
//! ```
//! use std::{error::Error, time::Duration};
//! use tcpause::{Address, Config, Outcome, Server};
//!
//! fn main() -> Result<(), Box<dyn Error>> {
//!     let mut config = Config::default();
//!     config.proxy.addr = Address::tcp("127.0.0.1", 0); // port 0: the system chooses
//!     config.control.addr = Address::tcp("127.0.0.1", 0);
//!     config.upstream.addr = "127.0.0.1:5432".parse()?;
//!     let server = Server::start(config)?;
//!     println!("clients connect to {}", server.proxy_addr());
//!
//!     let handle = server.handle();
//!     handle.pause();
//!     if handle.wait_idle(Some(Duration::from_secs(30))) {
//!         // No connection is left: restart the server on port 5432.
//!     }
//!     handle.resume();
//!
//!     server.stop();
//!     assert_eq!(server.join(), Outcome::Drained);
//!     Ok(())
//! }
//! ```
//!
//! - [`Config`] has the settings of the configuration file; [`Config::default`] has their defaults.
//! - [`Server`] binds, starts the threads and ends them. [`Server::stop`] lets connections end within the grace period.
//! - [`Handle`] pauses, resumes, waits and tells the [`Status`], from any thread.
//!
//! The library installs no logger and no signal handler. It logs through the [`log`] facade.
//!
//! [`Server::start`] raises the process's limit of open files to its hard limit.
//!
//! Everything that can go wrong before traffic flows is an [`Error`] with one line of text. A failure of a connection ends that
//! connection and is logged.
//!
//! `README.md` at the top of the repository tells how to run the program, and `src/README.md` describes the architecture.

mod admission;
mod config;
mod connection;
mod control;
mod error;
mod fleet;
mod fleet_view;
mod handle;
mod handover;
mod listing;
mod log_limit;
mod pause;
mod proxy_header;
mod server;
mod shared;
mod stats;
mod steering;
mod sys;
#[cfg(test)]
mod tests;
mod timestamp;
mod upstream;
mod worker;
mod worker_pool;

pub use config::{
    Config, ConnectionLog, ControlConfig, Endpoint, FleetConfig, FleetName, FleetPrefix, GroupName,
    HalfClosed, HoldConfig, LogConfig, LogFormat, MonitorConfig, OnDisconnect, Overflow,
    PauseConfig, ProxyConfig, ProxySource, RejectWith, ResumeConfig, SendProxy, Steer, TlsConfig,
    UpstreamConfig, Username,
    address::Address,
    duration::{format_duration, parse_duration},
    network::Network,
};
#[doc(hidden)]
pub use config::{settings, suggest};
pub use error::Error;
pub use handle::{Handle, LeaseStatus, MemberStatus, Status, SteeringStatus};
pub use handover::upgrades::LastUpgrade;
#[doc(hidden)]
pub use log_limit::LOG_LINES_DROPPED;
pub use server::{
    Farewell, Given, Giver, Heartbeat, Outcome, Predecessor, Server, Sockets, Stopper,
    TakerProcess, refuse,
};
pub use timestamp::Rfc3339;

/// Returns the time since the start of the host, which goes on while the host is suspended.
#[doc(hidden)]
pub fn boot_time() -> std::time::Duration {
    sys::boot::boot_time()
}

//! Zero downtime for the clients of a server that restarts.
//!
#![doc = include_str!("README.md")]

mod address;
mod addresses;
mod barrier;
mod config;
mod connection;
mod control;
mod counters;
mod duration;
mod endpoint;
mod error;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod gate;
mod handle;
mod hold;
mod lease;
mod ledger;
mod line;
mod listening;
mod loop_guard;
mod nearest;
mod opening;
mod orders;
mod outage;
mod pace;
mod pacing;
mod pipe;
mod queues;
mod reach;
mod ready;
mod refusal;
mod reject;
mod relay;
mod server;
mod slots;
mod socket_file;
mod sys;
mod table;
mod tcp_info;
mod throttle;
mod timestamp;
mod tls;
mod upstream;
mod window;
mod worker;

pub use address::Address;
pub use config::{
    Config, Control, Hold, Overflow, Pause, Proxy, RejectWith, Resume, Tls, Upstream,
};
pub use duration::{format_duration, parse_duration};
pub use error::Error;
pub use handle::{Handle, LeaseStatus, Status};
pub use server::{Outcome, Server, Stopper};
pub use timestamp::Rfc3339;

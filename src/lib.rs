//! Zero downtime for the clients of a server that restarts.
//!
#![doc = include_str!("README.md")]

mod admission;
mod config;
mod connection;
mod control;
mod error;
mod handle;
mod log_limit;
mod pause;
mod server;
mod shared;
mod stats;
mod sys;
#[cfg(test)]
mod tests;
mod timestamp;
mod upstream;
mod worker;
mod worker_pool;

pub use config::{
    Config, ControlConfig, HoldConfig, Overflow, PauseConfig, ProxyConfig, RejectWith,
    ResumeConfig, TlsConfig, UpstreamConfig,
    address::Address,
    duration::{format_duration, parse_duration},
};
#[doc(hidden)]
pub use config::{settings, suggest};
pub use error::Error;
pub use handle::{Handle, LeaseStatus, Status};
pub use server::{Outcome, Server, Stopper};
pub use timestamp::Rfc3339;

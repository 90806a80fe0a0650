//! stub

mod address;
mod config;
mod control;
mod counters;
mod duration;
mod endpoint;
mod error;
mod gate;
mod handle;
mod nearest;
mod pipe;
mod queues;
mod reject;
mod relay;
mod server;
mod slots;
mod sock_diag;
mod sys;
mod timestamp;
mod tls;

pub use address::Address;
pub use config::{Config, Control, Proxy, Tls, Upstream};
pub use duration::{format_duration, parse_duration};
pub use error::Error;
pub use handle::{Handle, Status};
pub use server::{Outcome, Server};
pub use timestamp::Rfc3339;

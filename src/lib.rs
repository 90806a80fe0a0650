//! stub

mod address;
mod config;
mod control;
mod error;
mod handle;
mod server;

pub use address::Address;
pub use config::{Config, Control, Proxy, Tls, Upstream};
pub use error::Error;
pub use handle::{Handle, Status};
pub use server::{Outcome, Server};

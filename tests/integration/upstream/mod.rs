//! Reaching the upstream: addresses, names, ports and retries.

mod connect;
mod dead_addresses;
mod loops;
pub(crate) mod names;
mod ports;
mod retry;
mod switch;
mod switch_races;

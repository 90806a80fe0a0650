//! The program: command line, configuration, signals, start and stop.

mod activation;
mod addresses;
mod cli;
mod client;
mod config;
mod connection_lines;
mod connections;
pub(crate) mod exec;
mod exec_terminal;
mod fleet;
mod limits;
mod listen;
mod log;
mod log_format;
mod notify;
mod signals;
mod status;
pub(crate) mod stop;
mod switch;
mod units;
mod upgrade;

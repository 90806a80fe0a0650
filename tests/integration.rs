//! Black-box tests: the real binary on free ports, one file a topic.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::missing_panics_doc,
    reason = "clippy allows these in test functions, and here every function is part of a test"
)]

mod addresses;
mod carry;
mod chaos;
mod cli;
mod client;
mod config;
mod control;
mod control_abuse;
mod control_flood;
mod dead_addresses;
mod dependencies;
mod dial;
mod drain;
mod exec;
mod exec_terminal;
mod harness;
mod held_bounds;
mod held_kinds;
mod hold;
mod idle;
mod lease;
mod library;
mod limits;
mod listen;
mod load;
mod log_lines;
mod loops;
mod maintenance;
mod names;
mod pacing;
mod pause;
mod pause_wait;
mod ports;
mod quiet;
mod regression;
mod reject;
mod reject_storm;
mod reject_tls;
mod reject_with;
mod resume_pace;
mod retry;
mod signals;
mod soak;
mod stalled;
mod stop;
mod stop_under_load;
mod streams;
mod tidy;
mod vanished;

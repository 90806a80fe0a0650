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

mod control;
mod fleet;
mod harness;
mod library;
mod load;
mod meta;
mod pause;
mod process;
mod regression;
mod reject;
mod relay;
mod steering;
mod upgrade;
mod upstream;

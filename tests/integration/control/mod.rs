//! The control API: requests, abuse and floods.

mod abuse;
mod api;
mod connections;
mod flood;
mod metrics;
mod monitor;
mod page;
mod truth;

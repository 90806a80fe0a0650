//! The control API: requests, abuse and floods.

mod abuse;
mod api;
mod flood;
mod metrics;
mod monitor;
mod page;
mod truth;

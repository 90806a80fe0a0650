//! The control API: requests, abuse and floods.

mod abuse;
mod api;
mod flood;
mod monitor;
mod page;

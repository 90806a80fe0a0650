//! Fleets of real proxies, over real etcd.

mod access;
mod recipe;

//! The fleet: many hosts that pause as one, by records in etcd (<https://etcd.io/docs/v3.5/learning/api/>).
//!
//! [`member`] and [`coordinator`] are plain state machines: moments and answers go in, requests and orders come out. The
//! thread of [`Fleet`] asks the [`Store`](store::Store) and carries the orders out.

#![allow(dead_code, unused_imports, reason = "the machines, the client and the thread follow")]

mod clock;
mod coordinator;
#[cfg_attr(not(feature = "fleet"), path = "no_etcd.rs")]
mod etcd;
mod facade;
mod keys;
mod member;
mod snapshot;
mod step;
mod store;
mod table;
mod terms;

pub(crate) use facade::{Fleet, Fleets, Refusal, RefusalKind, WaitingFor, Wanted};
pub(crate) use table::Table;
pub(crate) use terms::parse_quiet;

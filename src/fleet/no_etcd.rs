//! `Etcd` of a program that was built without the feature `fleet`: there is none.

#![allow(clippy::unused_self, reason = "the interface is that of the client")]

use std::time::Duration;

use super::store::{Reply, Request, Store, StoreError, StoreSettings};
use crate::error::Error;

/// Client that nobody can have.
#[derive(Debug)]
pub(crate) struct Etcd(());

/// Watch that nothing wakes.
#[derive(Debug)]
pub(crate) struct Watch(());

/// Means to end such a watch.
#[derive(Debug, Clone)]
pub(crate) struct WatchStopper(());

impl Etcd {
    /// Refuses, as a setting that does nothing would be found out too late.
    pub(crate) fn new(_: &StoreSettings) -> Result<Self, Error> {
        Err(Error::Config(
            "fleet.endpoints: this tcpause was built without the feature `fleet`; build it with its default features".to_owned(),
        ))
    }

    pub(crate) fn another(&self) -> Self {
        Self(())
    }

    pub(crate) fn watch(&self) -> Watch {
        Watch(())
    }
}

impl Store for Etcd {
    fn ask(&mut self, _: &Request, _: Duration) -> Result<Reply, StoreError> {
        Err(StoreError::Refused("this tcpause was built without the feature `fleet`".to_owned()))
    }
}

impl Watch {
    pub(crate) fn stopper(&self) -> WatchStopper {
        WatchStopper(())
    }

    pub(crate) fn run(&self, _: &str, _: Duration, _: impl FnMut()) {}
}

impl WatchStopper {
    pub(crate) fn look_at(&self, _: &str) {}

    pub(crate) fn stop(&self) {}
}

//! `Etcd` of a program that was built without the feature `fleet`: there is none.

use std::time::Duration;

use super::store::{Reply, Request, Store, StoreError, StoreSettings};
use crate::error::Error;

#[derive(Debug)]
pub(crate) enum Etcd {}

#[derive(Debug)]
pub(crate) enum Watch {}

#[derive(Debug, Clone)]
pub(crate) enum WatchStopper {}

impl Etcd {
    /// Refuses, as a setting that does nothing would be found out too late.
    pub(crate) fn new(_: &StoreSettings) -> Result<Self, Error> {
        Err(Error::Config(
            "fleet.endpoints: this tcpause was built without the feature `fleet`; build it with its default features".to_owned(),
        ))
    }

    pub(crate) fn watch(&self) -> Watch {
        match *self {}
    }
}

impl Store for Etcd {
    fn ask(&mut self, _: &Request, _: Duration) -> Result<Reply, StoreError> {
        match *self {}
    }
}

impl Watch {
    pub(crate) fn stopper(&self) -> WatchStopper {
        match *self {}
    }

    pub(crate) fn run(&self, _: &str, _: Duration, _: impl FnMut()) {
        match *self {}
    }
}

impl WatchStopper {
    pub(crate) fn stop(&self) {
        match *self {}
    }
}

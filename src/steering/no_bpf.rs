//! `Bpf` of a program that was built without the feature `steering`: there is none.

#![allow(clippy::unused_self, reason = "the interface is that of the programs")]

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    os::fd::{BorrowedFd, OwnedFd},
};

use super::found::{Found, Unavailable};

/// Programs that nobody can have.
pub(super) struct Bpf(Infallible);

impl Bpf {
    /// Refuses.
    pub(super) fn load(_: &[SocketAddr], _: Option<OwnedFd>) -> Result<Self, Unavailable> {
        Err(unavailable())
    }

    pub(super) fn attach(&mut self) -> Result<(), Unavailable> {
        match self.0 {}
    }

    pub(super) fn find(&self, _: &[SocketAddr]) -> Result<Found, Unavailable> {
        match self.0 {}
    }

    pub(super) fn steer_until(&self, _: u64) -> io::Result<()> {
        match self.0 {}
    }

    pub(super) fn assigned(&self) -> u64 {
        match self.0 {}
    }

    pub(super) fn taken(&self) -> u64 {
        match self.0 {}
    }

    pub(super) fn mark(&self, _: BorrowedFd<'_>) -> io::Result<()> {
        match self.0 {}
    }

    pub(super) fn marks(&self) -> BorrowedFd<'_> {
        match self.0 {}
    }

    pub(super) fn catch(&self, _: BorrowedFd<'_>) -> io::Result<()> {
        match self.0 {}
    }

    pub(super) fn settle() -> Result<(), Unavailable> {
        Err(unavailable())
    }
}

fn unavailable() -> Unavailable {
    Unavailable {
        why: "this tcpause was built without the feature `steering`; build it with its default features".to_owned(),
    }
}

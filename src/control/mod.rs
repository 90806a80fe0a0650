//! The control API: its place in the server; the API itself comes next.

use std::os::fd::OwnedFd;

use crate::{Error, Handle, config};

#[derive(Debug)]
pub(crate) struct Control {
    _listener: OwnedFd,
    _handle: Handle,
}

pub(crate) struct HostPolicy;

impl HostPolicy {
    pub(crate) fn new(_config: &config::Control) -> Self {
        Self
    }
}

impl Control {
    #[expect(clippy::unnecessary_wraps, reason = "it will fail when there is something to fail")]
    pub(crate) fn start(
        listener: OwnedFd,
        _is_unix: bool,
        handle: Handle,
        _policy: HostPolicy,
    ) -> Result<Self, Error> {
        Ok(Self { _listener: listener, _handle: handle })
    }

    pub(crate) fn shut_down(self) {
        drop(self);
    }
}

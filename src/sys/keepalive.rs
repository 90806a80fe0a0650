//! Keepalive: probes of the kernel, by which it finds a peer that has vanished.

use std::{num::NonZeroU8, os::fd::OwnedFd, time::Duration};

use rustix::net::sockopt;

use super::Socket;

/// Silence after which the kernel sends a keepalive probe, and the interval between probes.
pub(crate) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// Silence before a keepalive probe, and the interval between probes, of a waiting client that has ended its stream.
const OFTEN_INTERVAL: Duration = Duration::from_secs(3);

/// Unanswered probes after which such a client is given up: as long after its last sign of life as any other one.
const OFTEN_PROBES: u32 = 49;

impl Socket {
    /// Turns keepalive on. Dialled sockets get it late, as it takes three calls and most connections end before it
    /// matters. Accepted ones inherit it.
    pub(crate) fn keep_alive(&self) {
        if !self.is_unix && keep_alive(&self.fd).is_err() {
            log::debug!("the system refused a keepalive");
        }
    }

    /// Has the kernel probe a peer soon and often that has ended its stream and may have gone. The peer's kernel answers
    /// for a half-closed peer. For a closed one it resets, once it has forgotten the connection.
    pub(crate) fn probe_often(&mut self) {
        if self.is_unix || self.usual_probes.is_some() {
            return;
        }
        let usual = sockopt::tcp_keepcnt(&self.fd).ok().and_then(|it| u8::try_from(it).ok());
        let Some(usual) = usual.and_then(NonZeroU8::new) else { return };
        self.usual_probes = Some(usual);
        set_probes(&self.fd, OFTEN_PROBES, OFTEN_INTERVAL);
    }

    /// Has the kernel probe the peer as often again as before [`Socket::probe_often`].
    pub(crate) fn probe_as_usual(&mut self) {
        if let Some(usual) = self.usual_probes.take() {
            set_probes(&self.fd, usual.get().into(), KEEPALIVE_INTERVAL);
        }
    }
}

/// Turns keepalive on. The idle time comes last: set on a socket that has been silent for longer, it makes the kernel
/// probe at once.
pub(super) fn keep_alive(socket: &OwnedFd) -> rustix::io::Result<()> {
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_INTERVAL)
}

/// Changes the keepalive of a socket. The idle time comes last, as in [`keep_alive`].
fn set_probes(socket: &OwnedFd, probes: u32, interval: Duration) {
    let result = sockopt::set_tcp_keepcnt(socket, probes)
        .and_then(|()| sockopt::set_tcp_keepintvl(socket, interval))
        .and_then(|()| sockopt::set_tcp_keepidle(socket, interval));
    if result.is_err() {
        log::debug!("the system refused a keepalive");
    }
}

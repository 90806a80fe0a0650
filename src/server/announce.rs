//! Log lines of a server that begins.

use std::net::IpAddr;

use super::{Server, limits::counted};
use crate::{config::address::Address, pause::gate::Mode};

/// Addresses of the API and of the monitor, for the log.
pub(super) struct ListenedAt {
    pub(super) control: Vec<Address>,
    pub(super) monitor: Option<Vec<Address>>,
}

impl Server {
    /// Warns of each socket file that is gone or has been replaced: its listener goes on, and no client finds it any more.
    pub(super) fn warn_of_lost_files(&self) {
        let Self { shared, written, proxy_addr, control_addr, monitor_addr, .. } = self;
        for (setting, is_written, address) in [
            ("proxy.addr", written.proxy.is_some(), Some(proxy_addr)),
            ("control.addr", written.control.is_some(), Some(control_addr)),
            ("monitor.addr", written.monitor.is_some(), monitor_addr.as_ref()),
        ] {
            // The file of a socket that was passed belongs to the manager.
            if is_written
                && let Some(Address::Unix(path)) = address
                && !shared.socket_files.has(path)
            {
                log::warn!(
                    "{setting}: the socket file {} is gone or is another one, so nobody can connect to tcpause by it; stop tcpause and start it again",
                    path.display()
                );
            }
        }
    }

    /// Logs what is in force from now on.
    pub(super) fn announce(&self, listened_at: &ListenedAt) {
        let ListenedAt { control, monitor } = listened_at;
        log::info!(
            "proxy listens on {} with {}, for up to {}",
            list(&self.shared.listeners),
            counted(self.workers.len(), "thread"),
            counted(self.shared.admission.clients.max(), "client")
        );
        log::info!("control listens on {}", list(control));
        let while_paused = match self.shared.pauses.default_mode {
            Mode::Hold => "held",
            Mode::Reject => self.shared.reject_policy.describe(),
        };
        log::info!(
            "upstream is {}; while paused, new clients are {while_paused}",
            self.shared.upstream.target().address()
        );
        let is_beyond_loopback = |address: &Address| match address {
            Address::Tcp { host, .. } => !host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()),
            Address::Unix(_) | Address::Abstract(_) => false,
        };
        if control.iter().any(is_beyond_loopback) {
            log::warn!(
                "control listens beyond loopback and has no login: whoever reaches it can pause the proxy"
            );
        }
        if let Address::Abstract(_) = &self.control_addr {
            log::warn!(
                "control listens on a socket without a file, which has no mode, and has no login: every user of this network namespace can pause the proxy"
            );
        }
        if let Some(monitor) = monitor {
            log::info!("monitor listens on {}", list(monitor));
        }
    }
}

/// Lists addresses for the log.
fn list(addresses: &[Address]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
}

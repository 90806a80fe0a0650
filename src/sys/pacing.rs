//! Congestion control of connections over the loopback.
//!
//! A congestion control that paces, such as BBR, spreads packets by a timer. The loopback does not need that, and it
//! nearly doubles the CPU time of bulk. If the host's default paces, sockets of the loopback get a control that does
//! not. It is set before they connect or listen, because the kernel goes on pacing a socket whose first control asked
//! for it.

use std::{net::SocketAddr, os::fd::OwnedFd, sync::OnceLock};

use rustix::net::sockopt;

/// Congestion controls that do not pace. Every kernel has the first.
const UNPACED: [&str; 2] = ["reno", "cubic"];

/// Replaces a pacing default of `socket` if `address`, where it will connect or listen, is one of the loopback.
/// Accepted sockets inherit the control of their listener. Returns true if the kernel paces the socket.
pub(crate) fn spare(socket: &OwnedFd, address: &SocketAddr) -> bool {
    static IS_DEFAULT: OnceLock<bool> = OnceLock::new();
    // A fresh socket shows the default without a file that a sandbox may hide.
    let is_default = *IS_DEFAULT
        .get_or_init(|| sockopt::tcp_congestion(socket).is_ok_and(|default| paces(&default)));
    // The system may allow neither.
    let set = || UNPACED.iter().any(|name| sockopt::set_tcp_congestion(socket, name).is_ok());
    is_default && !(address.ip().to_canonical().is_loopback() && set())
}

/// Returns true if the congestion control `name` paces. Later versions of BBR are called `bbr2` and the like.
fn paces(name: &str) -> bool {
    name.starts_with("bbr")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bbr_in_all_its_versions_paces() {
        for (name, expected) in
            [("bbr", true), ("bbr3", true), ("cubic", false), ("reno", false), ("", false)]
        {
            assert_eq!(paces(name), expected, "{name}");
        }
    }
}

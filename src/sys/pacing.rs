//! The congestion control of connections over the loopback.
//!
//! A congestion control that paces, such as BBR, has a timer spread what is sent. No link of the loopback needs that, and it
//! nearly doubles the CPU time of bulk. Where the host's default paces, sockets of the loopback get a control that does not.
//! It is set before they connect or listen: the kernel goes on pacing a socket whose first control has asked for it.

use std::{net::SocketAddr, os::fd::OwnedFd, sync::OnceLock};

use rustix::net::sockopt;

/// Congestion controls that do not pace. Every kernel has the first.
const UNPACED: [&str; 2] = ["reno", "cubic"];

/// Spares `socket` the pacing of the host's default congestion control, if `address` is one of the loopback. Returns whether
/// the kernel paces it.
///
/// `address` is the one that it is about to connect to or to listen on. Whatever a listener has, accepted sockets inherit.
pub(crate) fn spare(socket: &OwnedFd, address: &SocketAddr) -> bool {
    static IS_DEFAULT: OnceLock<bool> = OnceLock::new();
    // A socket that nothing was set on tells the default, without a file that a sandbox may hide.
    let is_default = *IS_DEFAULT
        .get_or_init(|| sockopt::tcp_congestion(socket).is_ok_and(|default| paces(&default)));
    // The system may allow none of them.
    let set = || UNPACED.iter().any(|name| sockopt::set_tcp_congestion(socket, name).is_ok());
    is_default && !(address.ip().to_canonical().is_loopback() && set())
}

/// Returns true if a congestion control of this name paces. Versions of BBR go by `bbr2` and the like.
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

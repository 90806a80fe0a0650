//! The congestion control of connections over the loopback.
//!
//! A congestion control that paces, such as BBR, has a timer spread what is sent. No link of the loopback needs that, and it
//! nearly doubles the CPU time of bulk. Where the host's default paces, sockets of the loopback get a control that does not.
//! It is set before they connect or listen: the kernel goes on pacing a socket whose first control has asked for it.

use std::{net::SocketAddr, os::fd::OwnedFd, sync::OnceLock};

use rustix::net::sockopt;

/// Congestion controls that do not pace. Every kernel has the first.
const UNPACED: [&str; 2] = ["reno", "cubic"];

/// The control that sockets of the loopback get in place of the host's default; none if that does not pace.
static SUBSTITUTE: OnceLock<Option<&str>> = OnceLock::new();

/// Spares `socket` the pacing of the host's default congestion control, if `address` is one of the loopback.
///
/// `address` is the one that it is about to connect to or to listen on. Whatever a listener has, accepted sockets inherit.
pub(crate) fn spare(socket: &OwnedFd, address: &SocketAddr) {
    if !address.ip().to_canonical().is_loopback() {
        return;
    }
    let set = |name: &str| sockopt::set_tcp_congestion(socket, name);
    // A socket that nothing was set on tells the default, without a file that a sandbox may hide.
    let substitute = SUBSTITUTE.get_or_init(|| {
        let default = sockopt::tcp_congestion(socket).unwrap_or_default();
        choose(&default, |name| set(name).is_ok())
    });
    if let Some(name) = substitute {
        // A refusal costs CPU time and no connection.
        set(name).ok();
    }
}

/// Chooses the substitute for `default`, among those that `is_allowed` lets this process use.
fn choose(default: &str, is_allowed: impl Fn(&str) -> bool) -> Option<&'static str> {
    // Versions of it go by `bbr2` and the like.
    let paces = default.starts_with("bbr");
    UNPACED.into_iter().find(|name| paces && is_allowed(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_default_that_paces_has_a_substitute_and_only_one_that_is_allowed() {
        for (default, allowed, expected) in [
            ("bbr", &["reno", "cubic"][..], Some("reno")),
            ("bbr", &["cubic"], Some("cubic")),
            ("bbr3", &["reno"], Some("reno")),
            ("bbr", &[], None),
            ("cubic", &["reno", "cubic"], None),
            ("reno", &["reno", "cubic"], None),
            // A kernel that does not tell.
            ("", &["reno", "cubic"], None),
        ] {
            let chosen = choose(default, |name| allowed.contains(&name));
            assert_eq!(chosen, expected, "instead of {default}, of {allowed:?}");
        }
    }
}

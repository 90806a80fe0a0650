//! systemd: the sockets that it passes, and what it is told.

use std::{env, os::fd::OwnedFd};

use listenfd::ListenFd;
use tcpause::{Error, Sockets};

/// Most sockets that are taken over. A number of sockets is foreign input, and each costs memory.
const SOCKETS_MAX: usize = 64;

/// Takes over the sockets that were passed to this process, as `sd_listen_fds` has it. Must come before the first thread, as it
/// changes the environment.
pub(crate) fn sockets() -> Result<Sockets, Error> {
    let text = |name| env::var(name).unwrap_or_default();
    if text("LISTEN_FDS").parse().is_ok_and(|count: usize| count > SOCKETS_MAX) {
        return Err(Error::Config(format!("LISTEN_FDS: the most sockets are {SOCKETS_MAX}")));
    }
    let mut passed = ListenFd::from_env();
    let (names, count) = (text("LISTEN_FDNAMES"), passed.len());
    let mut names: Vec<&str> = names.split(':').collect();
    names.resize(count.max(names.len()), "");
    if names.len() > count.max(1) {
        return Err(Error::Config(format!(
            "LISTEN_FDNAMES: there are {} names and {count} sockets; pass a name for each",
            names.len()
        )));
    }
    let mut sockets = Sockets::default();
    for (index, name) in (0..count).zip(names) {
        let name = if count == 1 && is_nameless(name) { "proxy" } else { name };
        sockets.add(name, take(&mut passed, index, name)?)?;
    }
    Ok(sockets)
}

/// Returns true for the name of a socket whose unit gives it none: systemd takes that of the unit then.
fn is_nameless(name: &str) -> bool {
    name.is_empty() || name == "unknown" || name.ends_with(".socket")
}

fn take(passed: &mut ListenFd, index: usize, name: &str) -> Result<OwnedFd, Error> {
    if let Ok(Some(socket)) = passed.take_unix_listener(index) {
        return Ok(socket.into());
    }
    match passed.take_tcp_listener(index) {
        Ok(Some(socket)) => Ok(socket.into()),
        Ok(None) | Err(_) => Err(Error::Config(format!(
            "the passed socket {name:?} cannot be used: it is no stream socket, TCP or UNIX; pass one that listens for streams"
        ))),
    }
}

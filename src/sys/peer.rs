//! The address at the other end of a socket, of whatever family.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

use rustix::net::{SocketAddrUnix, getpeername};

use super::{Socket, SocketAddress};

impl Socket {
    /// Returns the address that the peer is bound to. None if it has none, or if the socket is not connected any more.
    pub(crate) fn peer_address(&self) -> Option<SocketAddress> {
        let address = getpeername(self).ok()??;
        if !self.is_unix {
            return address.try_into().ok();
        }
        let address = SocketAddrUnix::try_from(address).ok()?;
        if let Some(path) = address.path() {
            // The longest path fills the kernel's structure, and the end that the kernel adds counts as a byte of it.
            let path = path.to_bytes().split(|&byte| byte == 0).next().unwrap_or_default();
            return Some(SocketAddress::Unix(OsStr::from_bytes(path).into()));
        }
        // A socket that is bound to nothing has an empty name.
        let name = address.abstract_name().filter(|name| !name.is_empty())?;
        Some(SocketAddress::Abstract(String::from_utf8_lossy(name).into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_longest_path_has_no_end_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let length = 107 - folder.path().as_os_str().len() - 1;
        let path = folder.path().join("a".repeat(length));
        let _listener = UnixListener::bind(&path).unwrap();
        let (socket, _) = Socket::dial(&SocketAddress::Unix(path.clone()), None).unwrap();
        assert_eq!(socket.peer_address(), Some(SocketAddress::Unix(path)));
    }

    #[test]
    fn a_unix_peer_has_a_path_a_name_or_none() {
        let folder = std::env::temp_dir().join(format!("tcpause-peer-{}", std::process::id()));
        let _listener = UnixListener::bind(&folder).unwrap();
        let address = SocketAddress::Unix(folder.clone());
        let (socket, _) = Socket::dial(&address, None).unwrap();
        std::fs::remove_file(&folder).unwrap();
        assert_eq!(socket.peer_address(), Some(address));
        let (one, _other) = super::super::socket_pair().unwrap();
        assert_eq!(one.peer_address(), None);
    }
}

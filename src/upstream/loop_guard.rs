//! `LoopGuard`: the addresses of tcpause itself, so that it never dials itself as its upstream.
//!
//! Each connection to itself makes another one, until a single client has taken all permits.

use std::{
    fmt, fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::unix::fs::MetadataExt,
};

use crate::sys::SocketAddress;

/// The addresses that tcpause listens on.
#[derive(Debug, Default)]
pub(crate) struct LoopGuard(Vec<Own>);

/// An address that tcpause listens on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Own {
    /// Setting that it comes from.
    setting: &'static str,
    address: SocketAddress,
    /// Device and inode of its socket file.
    file: Option<(u64, u64)>,
}

impl LoopGuard {
    /// Adds an address that tcpause listens on.
    pub(crate) fn add(
        &mut self,
        setting: &'static str,
        address: SocketAddress,
        file: Option<(u64, u64)>,
    ) {
        let own = Own { setting, address, file };
        // Workers share an address.
        if !self.0.contains(&own) {
            self.0.push(own);
        }
    }

    /// Finds the own address that a dial of `address` would reach now.
    pub(crate) fn find(&self, address: &SocketAddress) -> Option<&Own> {
        self.0.iter().find(|own| own.is_reached_by(address))
    }
}

impl Own {
    fn is_reached_by(&self, dialled: &SocketAddress) -> bool {
        match (&self.address, dialled) {
            (SocketAddress::Inet(own), SocketAddress::Inet(dialled)) => reaches(*dialled, *own),
            (SocketAddress::Unix(_), SocketAddress::Unix(path)) => {
                // Another path or a symbolic link may lead to the same file.
                let identity = fs::metadata(path).map(|file| (file.dev(), file.ino()));
                identity.is_ok_and(|identity| self.file == Some(identity))
            }
            (SocketAddress::Abstract(own), SocketAddress::Abstract(dialled)) => own == dialled,
            _ => false,
        }
    }
}

impl fmt::Display for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.setting, self.address)
    }
}

/// Returns true if a dial of `dialled` reaches a listener that is bound to `own`.
fn reaches(dialled: SocketAddr, own: SocketAddr) -> bool {
    let (dialled, own) = (as_dialled(dialled), as_bound(own));
    if dialled.port() != own.port() {
        return false;
    }
    match own.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => dialled.is_ipv4() && is_local(dialled),
        // Such a listener accepts clients of both families.
        IpAddr::V6(ip) if ip.is_unspecified() => is_local(dialled),
        ip => ip == dialled.ip() && zone(own) == zone(dialled),
    }
}

/// Returns an IPv4-mapped IPv6 address as the IPv4 address that it stands for, and others unchanged.
fn as_bound(address: SocketAddr) -> SocketAddr {
    let ip = address.ip().to_canonical();
    if ip == address.ip() { address } else { SocketAddr::new(ip, address.port()) }
}

/// Returns the address that the kernel dials for `address`: the unspecified one becomes the loopback.
fn as_dialled(address: SocketAddr) -> SocketAddr {
    let address = as_bound(address);
    let loopback: IpAddr = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        _ => return address,
    };
    SocketAddr::new(loopback, address.port())
}

/// Returns the scope of a link-local IPv6 address (its interface), or 0.
fn zone(address: SocketAddr) -> u32 {
    match address {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(address) => address.scope_id(),
    }
}

/// Returns true if `address` is one of this host. A connected UDP socket shows how the kernel would route packets
/// there; none is sent.
///
/// Neither a successful bind nor reachability from the loopback is proof alone. An address that can be bound may be
/// another host's (`ip_nonlocal_bind`), and so may an address that the loopback reaches (`route_localnet`).
fn is_local(address: SocketAddr) -> bool {
    let connect = |from: IpAddr| -> io::Result<IpAddr> {
        let socket = UdpSocket::bind((from, 0))?;
        socket.connect(address)?;
        Ok(socket.local_addr()?.ip())
    };
    match address.ip() {
        ip @ IpAddr::V4(_) => connect(ip).is_ok() && connect(Ipv4Addr::LOCALHOST.into()).is_ok(),
        ip @ IpAddr::V6(_) => connect(Ipv6Addr::UNSPECIFIED.into()).is_ok_and(|from| from == ip),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_its_own_if_a_dial_of_it_arrives() {
        for (own, dialled, expected) in [
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "127.0.0.1:81", false),
            ("127.0.0.1:80", "127.0.0.2:80", false),
            ("127.0.0.1:80", "[::ffff:127.0.0.1]:80", true),
            ("127.0.0.1:80", "0.0.0.0:80", true),
            ("127.0.0.1:80", "[::]:80", false),
            ("127.0.0.2:80", "0.0.0.0:80", false),
            ("[::1]:80", "[::1]:80", true),
            ("[::1]:80", "[::]:80", true),
            ("[::1]:80", "127.0.0.1:80", false),
            ("0.0.0.0:80", "127.0.0.9:80", true),
            ("0.0.0.0:80", "[::ffff:127.0.0.9]:80", true),
            ("0.0.0.0:80", "0.0.0.0:80", true),
            ("0.0.0.0:80", "[::1]:80", false),
            // Reserved for documentation (RFC 5737, RFC 3849), so not of this host.
            ("0.0.0.0:80", "192.0.2.1:80", false),
            ("[::]:80", "127.0.0.1:80", true),
            ("[::]:80", "192.0.2.1:80", false),
            ("[::]:80", "[2001:db8::1]:80", false),
            ("[fe80::1%2]:80", "[fe80::1%2]:80", true),
            ("[fe80::1%2]:80", "[fe80::1%3]:80", false),
        ] {
            let [from, to] = [own, dialled].map(|text| text.parse().unwrap());
            assert_eq!(reaches(to, from), expected, "{dialled} for {own}");
        }
    }

    #[test]
    fn a_socket_without_a_file_is_its_own_by_its_name() {
        let mut guard = LoopGuard::default();
        let address = |name: &str| SocketAddress::Abstract(name.to_owned());
        guard.add("proxy.addr", address("own"), None);
        guard.add("proxy.addr", address("own"), None);
        assert_eq!(guard.0.len(), 1);
        let found = guard.find(&address("own")).unwrap();
        assert_eq!(found.to_string(), "proxy.addr (unix://@own)");
        assert!(guard.find(&address("other")).is_none());
        assert!(guard.find(&SocketAddress::Unix("own".into())).is_none());
    }
}

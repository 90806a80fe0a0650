//! Listening for one setting: at all addresses of its name, with one port.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use rustix::io::Errno;

use crate::{
    config::address::{self, Address},
    error::Error,
    sys::{
        self, Listener, SocketAddress,
        socket_file::{self, Access, SocketFile},
        tcp_table,
    },
    upstream::loop_guard::LoopGuard,
};

/// Most ports tried with port 0: the port that the system chooses at one address may be taken at another.
const PORTS_MAX: usize = 16;

/// Sockets that listen for one setting.
#[derive(Debug)]
pub(super) struct Listening {
    /// Listeners of each thread, one per address.
    pub(super) listeners: Vec<Vec<Listener>>,
    pub(super) file: Option<SocketFile>,
    /// First of `addresses`, which the server tells as its own.
    pub(super) address: Address,
    pub(super) addresses: Vec<Address>,
    /// Addresses whose port cannot be bound, as connections that were steered have it. The listeners are at another port, and
    /// the steering leads clients there.
    pub(super) caught: Vec<SocketAddr>,
}

/// Sockets of the whole server.
pub(super) struct Listeners {
    pub(super) proxy: Listening,
    pub(super) control: Listening,
    pub(super) monitor: Option<Listening>,
}

impl Listeners {
    /// Returns the number of sockets.
    pub(super) fn count(&self) -> usize {
        self.named().map(|(_, it)| it.listeners.iter().flatten().count()).sum()
    }

    /// Adds each listening address to the guard, so that no upstream may lead back to it.
    pub(super) fn add_to(&self, guard: &mut LoopGuard) {
        self.named().for_each(|(setting, listening)| listening.add_to(guard, setting));
    }

    /// Lists them with their settings.
    fn named(&self) -> impl Iterator<Item = (&'static str, &Listening)> {
        let monitor = self.monitor.as_ref().map(|monitor| ("monitor.addr", monitor));
        [("proxy.addr", &self.proxy), ("control.addr", &self.control)].into_iter().chain(monitor)
    }
}

impl Listening {
    /// Listens at each address, with a listener for each thread.
    pub(super) fn tcp(found: &[SocketAddr], threads: usize) -> io::Result<Self> {
        let mut listeners: Vec<Vec<_>> = (0..threads).map(|_thread| Vec::new()).collect();
        let mut addresses = Vec::new();
        for at_address in listen_at_all(found, threads)? {
            if let Some(listener) = at_address.first() {
                addresses.push(address_of(listener)?);
            }
            for (of_thread, listener) in listeners.iter_mut().zip(at_address) {
                of_thread.push(listener);
            }
        }
        let address = addresses.first().cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(Self { listeners, file: None, address, addresses, caught: Vec::new() })
    }

    /// Listens at a free port of the loopback in place of `wanted`.
    fn catching(wanted: Vec<SocketAddr>, threads: usize) -> io::Result<Self> {
        let takes_ipv4 = wanted.iter().any(|it| it.is_ipv4() || it.ip().is_unspecified());
        let takes_ipv6 = wanted.iter().any(SocketAddr::is_ipv6);
        let ipv4 = takes_ipv4.then(|| SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let ipv6 = takes_ipv6.then(|| SocketAddr::from((Ipv6Addr::LOCALHOST, 0)));
        let found: Vec<SocketAddr> = ipv4.into_iter().chain(ipv6).collect();
        Ok(Self::tcp(&found, threads)?.instead_of(wanted))
    }

    fn instead_of(self, wanted: Vec<SocketAddr>) -> Self {
        let addresses: Vec<Address> =
            wanted.iter().map(|it| Address::tcp(it.ip().to_string(), it.port())).collect();
        let address = addresses.first().cloned().unwrap_or(self.address);
        Self { address, addresses, caught: wanted, ..self }
    }

    /// Returns what listens already.
    pub(super) fn inherited(listener: Listener) -> io::Result<Self> {
        let address = address_of(&listener)?;
        Ok(Self::unix(listener, None, &address))
    }

    /// Returns the listeners that another process has had, of each worker that has some.
    pub(super) fn adopted(listeners: Vec<Vec<Listener>>) -> io::Result<Self> {
        let mut addresses = Vec::new();
        for listener in listeners.iter().flatten() {
            let address = address_of(listener)?;
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        let address = addresses.first().cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(Self { listeners, file: None, address, addresses, caught: Vec::new() })
    }

    /// Returns the same at `address`, if that is a path, or another port: the kernel tells the name that a UNIX listener had
    /// before its file got its path, and the port of listeners that the steering leads clients to.
    pub(super) fn named(self, address: &Address) -> Self {
        match address {
            Address::Unix(_) => {
                Self { address: address.clone(), addresses: vec![address.clone()], ..self }
            }
            Address::Tcp { host, port } if *port != 0 => {
                let is_there = |it: &Listener| it.local_inet().is_ok_and(|it| it.port() == *port);
                if self.listeners.iter().flatten().all(is_there) {
                    return self;
                }
                self.instead_of(look_up(host, *port).unwrap_or_default())
            }
            Address::Tcp { .. } | Address::Abstract(_) => self,
        }
    }

    /// Adds a further listener that listens already.
    pub(super) fn inherit(&mut self, listener: Listener) -> io::Result<()> {
        self.addresses.push(address_of(&listener)?);
        if let [of_first_thread] = &mut *self.listeners {
            of_first_thread.push(listener);
        }
        Ok(())
    }

    fn unix(listener: Listener, file: Option<SocketFile>, address: &Address) -> Self {
        let (address, addresses) = (address.clone(), vec![address.clone()]);
        let listeners = vec![vec![listener]];
        Self { listeners, file, address, addresses, caught: Vec::new() }
    }

    fn add_to(&self, guard: &mut LoopGuard, setting: &'static str) {
        for address in &self.addresses {
            match address {
                Address::Unix(path) => {
                    let file = socket_file::identity(path).ok();
                    guard.add(setting, SocketAddress::Unix(path.clone()), file);
                }
                Address::Abstract(name) => {
                    guard.add(setting, SocketAddress::Abstract(name.clone()), None);
                }
                // The name of one that is link-local lacks its zone.
                Address::Tcp { .. } => {}
            }
        }
        for address in self.listeners.iter().flatten().filter_map(|it| it.local_inet().ok()) {
            guard.add(setting, SocketAddress::Inet(address), None);
        }
        for &address in &self.caught {
            guard.add(setting, SocketAddress::Inet(address), None);
        }
    }
}

/// Listens at `address`. TCP gets a listener for each of `count` threads, among which the kernel spreads the clients; a UNIX
/// socket has one listener. If `may_catch`, the listeners are at another port where connections without a listener have this
/// one: a steered connection has the port of the proxy, and the server may keep others from it (`SO_REUSEADDR`).
pub(super) fn listen(
    setting: &str,
    address: &Address,
    count: usize,
    access: Access,
    may_catch: bool,
) -> Result<Listening, Error> {
    let refuse = |error: io::Error| {
        let remedy = remedy(address, error.kind());
        Error::System(format!("{setting}: cannot listen on {address}: {error}; {remedy}"))
    };
    match address {
        Address::Unix(path) => {
            let (listener, file) = Listener::unix(path, access).map_err(refuse)?;
            Ok(Listening::unix(listener, Some(file), address))
        }
        Address::Abstract(name) => {
            let listener = Listener::abstract_unix(name).map_err(refuse)?;
            Ok(Listening::unix(listener, None, address))
        }
        Address::Tcp { host, port } => {
            let found = look_up(host, *port).map_err(|error| {
                Error::System(format!(
                    "{setting}: cannot look up {host}: {error}; use a name or IP of this host"
                ))
            })?;
            match Listening::tcp(&found, count) {
                Err(error)
                    if may_catch
                        && error.kind() == io::ErrorKind::AddrInUse
                        && tcp_table::is_listened(*port).is_ok_and(|is_listened| !is_listened) =>
                {
                    log::warn!(
                        "{setting}: steered connections of the server have the port of {address}, so it is not bound: the kernel leads new clients to tcpause at another one"
                    );
                    Listening::catching(found, count).map_err(refuse)
                }
                listening => listening.map_err(refuse),
            }
        }
    }
}

/// Returns the address of a listener, with the port that the system chose.
pub(super) fn address_of(listener: &Listener) -> io::Result<Address> {
    Ok(match listener.local_address()? {
        SocketAddress::Inet(local) => Address::tcp(local.ip().to_string(), local.port()),
        SocketAddress::Unix(path) => Address::Unix(path),
        SocketAddress::Abstract(name) => Address::Abstract(name),
    })
}

/// Returns the remedy for an address that cannot be listened on.
fn remedy(address: &Address, error: io::ErrorKind) -> &'static str {
    use io::ErrorKind::{
        AddrInUse, AddrNotAvailable, AlreadyExists, NotFound, PermissionDenied, ResourceBusy,
        Unsupported,
    };
    match (address, error) {
        (Address::Tcp { .. }, AddrInUse) => {
            "something listens there already, or a connection has that port (`ss -tan` shows it); stop it or choose another address"
        }
        (Address::Tcp { .. }, PermissionDenied) => "ports below 1024 need privileges",
        (Address::Tcp { .. }, AddrNotAvailable) => "this host has no such address",
        (Address::Tcp { .. }, _) => "choose another address",
        (Address::Unix(_), AddrInUse) => {
            "something listens there already (`ss -xl` shows it); stop it or choose another path"
        }
        (Address::Unix(_), PermissionDenied) => {
            "let this user write to its directory, or choose another path"
        }
        (Address::Unix(_), NotFound) => "its directory does not exist",
        (Address::Unix(_), AlreadyExists) => "remove it or choose another path",
        (Address::Unix(_), ResourceBusy) => "wait until it is done or choose another directory",
        (Address::Unix(_), Unsupported) => {
            "run tcpause as a member of the group (SupplementaryGroups= and SystemCallFilter=@chown in its unit) or as root"
        }
        (Address::Unix(_), _) => "choose another path",
        (Address::Abstract(_), AddrInUse) => {
            "something listens there already (`ss -xl` shows it); stop it or choose another name"
        }
        (Address::Abstract(_), _) => "choose another name",
    }
}

/// Finds the addresses to listen on, IPv4 before IPv6, as in the original. An empty host is one address: the IPv6 wildcard,
/// which takes IPv4 clients too, or the IPv4 wildcard where the system has no IPv6.
fn look_up(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if host.is_empty() {
        let v6: IpAddr = Ipv6Addr::UNSPECIFIED.into();
        let knows_v6 = sys::check_source(v6).is_ok();
        let ip = if knows_v6 { v6 } else { Ipv4Addr::UNSPECIFIED.into() };
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let mut found = Vec::new();
    for address in address::look_up(host, port)? {
        if !found.contains(&address) {
            found.push(address);
        }
    }
    found.sort_by_key(SocketAddr::is_ipv6);
    Ok(found)
}

/// Listens at all `addresses` with one port; port 0 stands for a port that is free at each of them. Returns `count` listeners
/// for each address.
fn listen_at_all(addresses: &[SocketAddr], count: usize) -> io::Result<Vec<Vec<Listener>>> {
    let is_chosen = addresses.iter().all(|address| address.port() == 0);
    // Failed attempts stay bound until the end, so that the system does not choose their ports again.
    let mut given_up = Vec::new();
    loop {
        let mut attempt = Attempt::default();
        match attempt.bind(addresses, count) {
            Ok(()) => return Ok(attempt.finish()),
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse
                    && is_chosen
                    && !attempt.listeners.is_empty()
                    && given_up.len() < PORTS_MAX =>
            {
                given_up.push(attempt);
            }
            Err(error) => return Err(error),
        }
    }
}

/// One try to listen at all addresses.
#[derive(Default)]
struct Attempt {
    listeners: Vec<Vec<Listener>>,
    /// Addresses whose family is switched off here.
    left_out: Vec<(SocketAddr, io::Error)>,
}

impl Attempt {
    fn bind(&mut self, addresses: &[SocketAddr], count: usize) -> io::Result<()> {
        for &(mut address) in addresses {
            if let Some(first) = self.listeners.iter().flatten().next() {
                address.set_port(first.local_inet()?.port());
            }
            match Listener::tcp(address, count) {
                Ok(listeners) => self.listeners.push(listeners),
                Err(error) if is_switched_off(address.ip(), &error) => {
                    self.left_out.push((address, error));
                }
                Err(error) if addresses.len() > 1 => {
                    return Err(io::Error::new(error.kind(), format!("{error} at {address}")));
                }
                Err(error) => return Err(error),
            }
        }
        match self.left_out.pop() {
            Some((_, error)) if self.listeners.is_empty() => Err(error),
            last => {
                self.left_out.extend(last);
                Ok(())
            }
        }
    }

    fn finish(self) -> Vec<Vec<Listener>> {
        for (address, error) in self.left_out {
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            log::info!("not listening on {address}, as {family} is switched off here: {error}");
        }
        self.listeners
    }
}

/// Returns true if `error` means that the address family is switched off: the kernel does not know it, or this host lacks
/// even its loopback address.
fn is_switched_off(ip: IpAddr, error: &io::Error) -> bool {
    let loopback: IpAddr =
        if ip.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::AFNOSUPPORT) => true,
        Some(Errno::ADDRNOTAVAIL) => sys::check_source(loopback).is_err(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(addresses: &[&str]) -> io::Result<Vec<SocketAddr>> {
        let addresses: Vec<SocketAddr> =
            addresses.iter().map(|address| address.parse().unwrap()).collect();
        let listeners = listen_at_all(&addresses, 2)?;
        assert!(listeners.iter().all(|of_address| of_address.len() == 2));
        listeners.iter().flatten().step_by(2).map(Listener::local_inet).collect()
    }

    #[test]
    fn all_addresses_have_one_port() {
        let found = at(&["127.7.7.1:0", "127.7.7.2:0", "127.7.7.3:0"]).unwrap();
        let ips: Vec<String> = found.iter().map(|address| address.ip().to_string()).collect();
        assert_eq!(ips, ["127.7.7.1", "127.7.7.2", "127.7.7.3"]);
        assert!(found.iter().all(|it| it.port() == found[0].port() && it.port() > 0), "{found:?}");
    }

    #[test]
    fn an_address_that_is_taken_is_named() {
        let taken = Listener::tcp("127.7.7.5:0".parse().unwrap(), 1).unwrap();
        let port = taken.first().unwrap().local_inet().unwrap().port();
        let addresses = ["127.7.7.4", "127.7.7.5"].map(|ip| format!("{ip}:{port}"));
        let error = at(&addresses.each_ref().map(String::as_str)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().ends_with(&format!(" at 127.7.7.5:{port}")), "{error}");
        // A foreign address does not mean that its family is switched off.
        let error = at(&["127.7.7.4:0", "192.0.2.1:0"]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
    }
}

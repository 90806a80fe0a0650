//! Listening at all addresses of a name, with one port.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use rustix::io::Errno;

use crate::sys::{self, Listener};

/// The number of ports that are tried where the system chooses one and another program has it at a further address.
const PORTS_MAX: usize = 16;

/// Listens at each of `addresses` with one port; if that is 0, with one that is free at all of them. Returns as many listeners
/// for each address as there are threads to serve them.
pub(crate) fn listen_at_all(
    addresses: &[SocketAddr],
    count: usize,
) -> io::Result<Vec<Vec<Listener>>> {
    let is_chosen = addresses.iter().all(|address| address.port() == 0);
    // Kept until the end, so that none of their ports is chosen again.
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

/// Tells whether `error` came of an address whose family is switched off: the kernel does not know it, or this host has not
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
        // One that this host does not have is no matter of its family.
        let error = at(&["127.7.7.4:0", "192.0.2.1:0"]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
    }
}

//! Writing of headers.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use super::{
    ProxiedAddresses,
    parse::{PREAMBLE_BYTES, SIGNATURE},
};
use crate::config::SendProxy;

/// Header of version 1 without addresses.
const UNKNOWN: &[u8] = b"PROXY UNKNOWN\r\n";

/// Header of version 2 without addresses: the command LOCAL.
const LOCAL: &[u8; PREAMBLE_BYTES] = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00";

/// Type of the field of version 2 with the id of a connection.
const UNIQUE_ID: u8 = 5;

/// Returns the header of a connection of the proxy's own, such as a check, between these addresses, if it has any. Version 1
/// tells them, as Postfix refuses a header without addresses; version 2 has a command for that.
pub(crate) fn own_header(
    version: SendProxy,
    ends: Option<(SocketAddr, SocketAddr)>,
) -> Cow<'static, [u8]> {
    match (version, ends) {
        (SendProxy::V1, Some((source, destination))) => {
            let addresses = ProxiedAddresses { source, destination };
            header_of(version, Some(addresses), "").into_vec().into()
        }
        _ => local_header(version).into(),
    }
}

/// Returns the header of a connection without addresses: the server goes by those of the socket. It is empty where no header
/// is sent.
pub(super) fn local_header(version: SendProxy) -> &'static [u8] {
    match version {
        SendProxy::Off => &[],
        SendProxy::V1 => UNKNOWN,
        SendProxy::V2 => LOCAL,
    }
}

/// Returns the header of a client's connection, which has this id. A client of a UNIX socket has no addresses.
pub(crate) fn header_of(
    version: SendProxy,
    addresses: Option<ProxiedAddresses>,
    id: &str,
) -> Box<[u8]> {
    let Some(ProxiedAddresses { source, destination }) = addresses else {
        return local_header(version).into();
    };
    let ips = one_family(source.ip(), destination.ip());
    let ports = [source.port(), destination.port()];
    match version {
        SendProxy::Off => [].into(),
        SendProxy::V1 => {
            let ([source, destination], [port, other]) = (ips, ports);
            let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
            format!("PROXY {family} {source} {destination} {port} {other}\r\n").into_bytes().into()
        }
        SendProxy::V2 => {
            let mut rest = Vec::with_capacity(64);
            for ip in ips {
                match ip {
                    IpAddr::V4(ip) => rest.extend(ip.octets()),
                    IpAddr::V6(ip) => rest.extend(ip.octets()),
                }
            }
            rest.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
            rest.push(UNIQUE_ID);
            rest.extend(length(id.as_bytes()));
            rest.extend(id.as_bytes());
            let family = if ips.iter().all(IpAddr::is_ipv4) { 0x11 } else { 0x21 };
            [&SIGNATURE[..], &[0x21, family], &length(&rest), &rest].concat().into()
        }
    }
}

/// Returns both addresses as IPv4, if they are or are mapped to it, or else both as IPv6: a header has one family.
fn one_family(source: IpAddr, destination: IpAddr) -> [IpAddr; 2] {
    let both = [source.to_canonical(), destination.to_canonical()];
    if both.iter().all(IpAddr::is_ipv4) { both } else { both.map(|ip| to_ipv6(ip).into()) }
}

fn to_ipv6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

/// Returns the length of `bytes`, of which there are far fewer than it could tell.
fn length(bytes: &[u8]) -> [u8; 2] {
    u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes()
}

//! PROXY protocol: the header before a client's own bytes by which a proxy tells a server the client's address
//! (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>).
//!
//! Version 1 is a line of text, version 2 binary. tcpause reads both and writes one.
//!
//! It does so itself, as none of the crates fits. The header is peeked while its client waits, so half a header has to be told
//! from a wrong one, at each byte and within the bounds of the protocol. Of `ppp`, `proxy-header` and `proxy-protocol`, one
//! takes wrong headers, and the others refuse right ones or cannot tell half a header.

mod parse;
mod policy;
mod write;

use std::net::SocketAddr;

pub(crate) use parse::{Defect, HEADER_BYTES_MAX, Parsed, parse};
pub(crate) use policy::{ProxyHeaders, question};
pub(crate) use write::{header_of, local_header};

/// Addresses of a client's connection, as a header tells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProxiedAddresses {
    /// Address of the client.
    pub(crate) source: SocketAddr,
    /// Address that the client has connected to.
    pub(crate) destination: SocketAddr,
}

#[cfg(test)]
mod tests;

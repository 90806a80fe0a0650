//! PROXY protocol: the header before a client's own bytes by which a proxy tells a server the client's address
//! (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>).
//!
//! Version 1 is a line of text, version 2 binary. tcpause reads both and writes one.
//!
//! It does so itself, as none of the crates fits. The header is peeked while its client waits, so half a header has to be told
//! from a wrong one, at each byte and within the bounds of the protocol. Tried with the headers of `tests.rs`:
//!
//! - `ppp` 2.3.0 refuses a line that is cut between its last two bytes, and checks with addresses that are to be ignored.
//! - `proxy-header` 0.1.3 takes wrong headers, such as `PROXY UNKNOWNx` and lines without a bound, and waits for more of others.
//! - `proxy-protocol` 0.5.0 cannot tell half a header from a wrong one, and panics at some.

mod parse;
mod policy;
mod write;

use std::net::SocketAddr;

pub(crate) use parse::{Defect, HEADER_BYTES_MAX, Parsed, parse};
pub(crate) use policy::{ProxyHeaders, question};
pub(crate) use write::{header_of, own_header};

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

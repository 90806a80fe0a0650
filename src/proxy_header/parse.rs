//! Reading of headers from the first bytes of a client, of which more may come.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::ProxiedAddresses;

/// Most bytes of a header: those that a receiver has to be able to take at once.
pub(crate) const HEADER_BYTES_MAX: usize = 536;

/// First bytes of version 2.
pub(super) const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Bytes of version 2 before the addresses.
pub(super) const PREAMBLE_BYTES: usize = SIGNATURE.len() + 4;

/// First bytes of version 1.
const WORD: &[u8] = b"PROXY ";

/// Most bytes of version 1, with the end of the line.
const LINE_BYTES_MAX: usize = 107;

/// Meaning of a client's first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// A header of this length. Without addresses, they are those of the socket.
    Header { bytes: usize, addresses: Option<ProxiedAddresses> },
    /// The beginning of a header.
    Partial,
    /// No header, and no beginning of one.
    Wrong(Defect),
}

/// Defect of what a client has sent in place of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Defect {
    /// The first bytes are those of something else.
    Missing,
    /// The header does not follow the protocol.
    Malformed,
    /// The header is longer than [`HEADER_BYTES_MAX`], or than a line may be.
    TooLong,
    /// The stream has ended within the header.
    Ended,
    /// The header was not complete in time.
    Late,
}

impl Parsed {
    /// Returns the meaning of a whole header of this length.
    fn of(bytes: usize, addresses: Result<Option<ProxiedAddresses>, Defect>) -> Self {
        addresses.map_or_else(Self::Wrong, |addresses| Self::Header { bytes, addresses })
    }
}

impl Defect {
    /// Returns what such a client has done, behind its name.
    pub(crate) fn told(self) -> &'static str {
        match self {
            Self::Missing => "has sent no PROXY header",
            Self::Malformed => "has sent a malformed PROXY header",
            Self::TooLong => "has sent a PROXY header that is too long",
            Self::Ended => "has ended its stream within the PROXY header",
            Self::Late => "has not sent a PROXY header in time",
        }
    }
}

/// Reads a header of either version.
pub(crate) fn parse(bytes: &[u8]) -> Parsed {
    if begins_with(bytes, &SIGNATURE) {
        parse_v2(bytes)
    } else if begins_with(bytes, WORD) {
        parse_v1(bytes)
    } else {
        Parsed::Wrong(Defect::Missing)
    }
}

/// Returns true if `bytes` begin with `expected`, as far as they go.
fn begins_with(bytes: &[u8], expected: &[u8]) -> bool {
    bytes.iter().zip(expected).all(|(byte, other)| byte == other)
}

fn parse_v1(bytes: &[u8]) -> Parsed {
    let line = bytes.get(..LINE_BYTES_MAX).unwrap_or(bytes);
    match line.windows(2).position(|pair| pair == b"\r\n") {
        None if bytes.len() >= LINE_BYTES_MAX => Parsed::Wrong(Defect::TooLong),
        None => Parsed::Partial,
        Some(end) => {
            let line = str::from_utf8(line.get(..end).unwrap_or_default());
            Parsed::of(end + 2, line.map_err(|_| Defect::Malformed).and_then(addresses_of_line))
        }
    }
}

/// Reads a line without its end.
fn addresses_of_line(line: &str) -> Result<Option<ProxiedAddresses>, Defect> {
    let mut words = line.split(' ').skip(1);
    let parse_ip: fn(&str) -> Option<IpAddr> = match words.next() {
        // What may follow is to be ignored.
        Some("UNKNOWN") => return Ok(None),
        Some("TCP4") => |word| Some(IpAddr::V4(word.parse().ok()?)),
        Some("TCP6") => |word| Some(IpAddr::V6(word.parse().ok()?)),
        _ => return Err(Defect::Malformed),
    };
    let mut next = || words.next().ok_or(Defect::Malformed);
    let (source, destination, port, other) = (next()?, next()?, next()?, next()?);
    let is_last = next().is_err();
    let address = |ip, port| Some(SocketAddr::new(parse_ip(ip)?, parse_port(port)?));
    let addresses = address(source, port).zip(address(destination, other)).filter(|_| is_last);
    let (source, destination) = addresses.ok_or(Defect::Malformed)?;
    Ok(Some(ProxiedAddresses { source, destination }))
}

/// Reads a port, which has neither a sign nor a zero in front.
fn parse_port(word: &str) -> Option<u16> {
    word.parse().ok().filter(|port: &u16| port.to_string() == word)
}

fn parse_v2(bytes: &[u8]) -> Parsed {
    let Some((preamble, rest)) = bytes.split_first_chunk::<PREAMBLE_BYTES>() else {
        return Parsed::Partial;
    };
    let [.., command, family, high, low] = *preamble;
    let length = usize::from(u16::from_be_bytes([high, low]));
    let is_local = match command {
        0x20 => true,
        0x21 => false,
        _ => return Parsed::Wrong(Defect::Malformed),
    };
    if PREAMBLE_BYTES + length > HEADER_BYTES_MAX {
        return Parsed::Wrong(Defect::TooLong);
    }
    let Some(rest) = rest.get(..length) else { return Parsed::Partial };
    let addresses = match family {
        // Whatever the rest of a check is, it is to be ignored.
        _ if is_local => Ok(None),
        // TCP over IPv4 and over IPv6.
        0x11 => addresses_of_bytes::<4>(rest, |ip| Ipv4Addr::from(ip).into()),
        0x21 => addresses_of_bytes::<16>(rest, |ip| Ipv6Addr::from(ip).into()),
        // Unspecified, UDP, or UNIX sockets, whose names say nothing here.
        0x00 | 0x12 | 0x22 | 0x31 | 0x32 => Ok(None),
        _ => Err(Defect::Malformed),
    };
    Parsed::of(PREAMBLE_BYTES + length, addresses)
}

/// Reads two addresses of `N` bytes, and behind them two ports. Further fields may follow, which are not read.
fn addresses_of_bytes<const N: usize>(
    bytes: &[u8],
    ip: fn([u8; N]) -> IpAddr,
) -> Result<Option<ProxiedAddresses>, Defect> {
    let read = || {
        let (&source, bytes) = bytes.split_first_chunk()?;
        let (&destination, bytes) = bytes.split_first_chunk()?;
        let &[source_high, source_low, high, low] = bytes.first_chunk()?;
        let address = |it, port| SocketAddr::new(ip(it), u16::from_be_bytes(port));
        Some(ProxiedAddresses {
            source: address(source, [source_high, source_low]),
            destination: address(destination, [high, low]),
        })
    };
    read().map(Some).ok_or(Defect::Malformed)
}

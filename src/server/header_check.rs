//! Check for a server that closes connections with a PROXY header, as it expects none.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::TcpStream,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixStream},
    },
    time::Duration,
};

use crate::{
    config::{Config, SendProxy},
    proxy_header::{own_header, question},
    sys::SocketAddress,
    upstream::look_up,
};

/// Most reads of an answer.
const READS_MAX: usize = 8;

/// Longest wait for a connection, and then for its end.
const CHECK_TIMEOUT: Duration = Duration::from_millis(500);

/// Returns a question for the operator if headers are sent, and the upstream closes a connection that begins with one. A
/// server that is away, or waits for more, gives no reason to ask. The header is that of a check.
pub(super) fn ask(config: &Config) -> Option<String> {
    let (upstream, version) = (&config.upstream.addr, config.upstream.send_proxy);
    if version == SendProxy::Off {
        return None;
    }
    let addresses = look_up(upstream).ok()?;
    let closes = closes_at_once(addresses.first()?, version).ok()?;
    closes.then(|| format!("upstream.addr: {upstream} closes at once: {}", question(version)))
}

fn closes_at_once(address: &SocketAddress, version: SendProxy) -> io::Result<bool> {
    let header = &own_header(version, None);
    match address {
        SocketAddress::Inet(address) => {
            let stream = TcpStream::connect_timeout(address, CHECK_TIMEOUT)?;
            stream.set_read_timeout(Some(CHECK_TIMEOUT))?;
            let ends = (stream.local_addr()?, *address);
            ends_behind(stream, &own_header(version, Some(ends)))
        }
        SocketAddress::Unix(path) => reach(&SocketAddr::from_pathname(path)?, header),
        SocketAddress::Abstract(name) => reach(&SocketAddr::from_abstract_name(name)?, header),
    }
}

fn reach(address: &SocketAddr, header: &[u8]) -> io::Result<bool> {
    let stream = UnixStream::connect_addr(address)?;
    stream.set_read_timeout(Some(CHECK_TIMEOUT))?;
    ends_behind(stream, header)
}

/// Returns true if the stream ends behind the header, perhaps with an answer, as that of a server which takes the header for
/// a request.
fn ends_behind(mut stream: impl Read + Write, header: &[u8]) -> io::Result<bool> {
    stream.write_all(header)?;
    for _read in 0..READS_MAX {
        match stream.read(&mut [0; 1024]) {
            Ok(0) => return Ok(true),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(true),
            read => read?,
        };
    }
    Ok(false)
}

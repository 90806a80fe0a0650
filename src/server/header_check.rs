//! Check for a server that closes connections with a PROXY header, as it expects none.

use std::{io, net::IpAddr, os::fd::OwnedFd, time::Duration};

use rustix::{
    io::{Errno, read, retry_on_intr},
    net::sockopt::{Timeout, set_socket_timeout},
};

use crate::{
    config::{Config, SendProxy},
    proxy_header::{own_header, question},
    sys::{SocketAddress, reach::reach},
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
    let socket = reach_any(&addresses, &config.upstream.source_addrs, version)?;
    let closes = ends_behind(&socket).unwrap_or_default();
    closes.then(|| format!("upstream.addr: {upstream} closes at once: {}", question(version)))
}

/// Returns a connection to the first address that answers, from the first source of its family, with a header sent.
fn reach_any(
    addresses: &[SocketAddress],
    sources: &[IpAddr],
    version: SendProxy,
) -> Option<OwnedFd> {
    addresses.iter().find_map(|address| {
        let source = match address {
            SocketAddress::Inet(to) if !sources.is_empty() => {
                let mut sources = sources.iter().map(IpAddr::to_canonical);
                Some(sources.find(|ip| ip.is_ipv4() == to.is_ipv4())?)
            }
            _ => None,
        };
        reach(address, source, |ends| own_header(version, ends), CHECK_TIMEOUT).ok()
    })
}

/// Returns true if the stream ends behind the header, perhaps with an answer, as that of a server which takes the header for
/// a request.
fn ends_behind(socket: &OwnedFd) -> io::Result<bool> {
    set_socket_timeout(socket, Timeout::Recv, Some(CHECK_TIMEOUT))?;
    for _read in 0..READS_MAX {
        match retry_on_intr(|| read(socket, &mut [0; 1024])) {
            Ok(0) | Err(Errno::CONNRESET) => return Ok(true),
            read => read?,
        };
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{SocketAddr, TcpListener},
        os::unix::net::{UnixListener, UnixStream},
        sync::mpsc::channel,
        thread,
    };

    use super::*;
    use crate::config::{UpstreamConfig, address::Address};

    const DEADLINE: Duration = Duration::from_secs(10);

    #[test]
    fn a_full_backlog_does_not_keep_the_check_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("full");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _first = UnixStream::connect(&path).unwrap();
        let upstream = UpstreamConfig {
            addr: Address::Unix(path),
            send_proxy: SendProxy::V2,
            ..UpstreamConfig::default()
        };
        let config = Config { upstream, ..Config::default() };
        let (sender, asked) = channel();
        let _asks = thread::Builder::new().spawn(move || sender.send(ask(&config))).unwrap();
        assert_eq!(asked.recv_timeout(DEADLINE).unwrap(), None);
    }

    #[test]
    fn the_first_address_that_answers_is_asked_from_the_source_of_its_family() {
        let address = |listener: &TcpListener| SocketAddress::Inet(listener.local_addr().unwrap());
        let gone = address(&TcpListener::bind("127.0.0.1:0").unwrap());
        let other = SocketAddress::Inet(SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], 9)));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addresses = [gone, other, address(&listener)];
        let source = IpAddr::from([127, 0, 0, 9]);
        let accept = move || listener.accept().unwrap().1.ip();
        let server = thread::Builder::new().spawn(accept).unwrap();
        let socket = reach_any(&addresses, &[source], SendProxy::V1).unwrap();
        assert!(ends_behind(&socket).unwrap());
        assert_eq!(server.join().unwrap(), source);
    }
}

//! One question to the kernel: how much of what was sent has not been acknowledged?
//!
//! `SIOCOUTQ` would tell, but no safe interface offers it, so we ask as ss(8) does: by a `SOCK_DIAG_BY_FAMILY` request
//! over netlink (`sock_diag(7)`), which any user may make for sockets of the own network namespace. It is asked only when
//! one side of a connection was reset, so it costs the way of a byte nothing.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, sendto,
        socket_with,
    },
};

/// `SOCK_DIAG_BY_FAMILY`: the request, and the type of its answer.
const BY_FAMILY: u16 = 20;
/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `NLMSG_ERROR`: the answer that holds an error number instead.
const ERROR: u16 = 2;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
/// The length of a `nlmsghdr` and an `inet_diag_req_v2`.
const REQUEST_BYTES: u32 = 16 + 56;
/// Where `idiag_wqueue` lies in the answer: behind the headers, the socket's identity, `expires` and `rqueue`.
const SEND_QUEUE_AT: usize = 16 + 4 + 48 + 4 + 4;
/// Where the error number lies in an error.
const ERRNO_AT: usize = 16;

/// The bytes in the send queue of the TCP socket between these addresses, sent or not, that are not acknowledged.
pub(crate) fn send_queue(local: SocketAddr, peer: SocketAddr) -> io::Result<u32> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let kernel =
        socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::SOCK_DIAG))?;
    sendto(
        &kernel,
        &request(local, peer),
        SendFlags::empty(),
        &netlink::SocketAddrNetlink::new(0, 0),
    )?;
    // The kernel answers within the send; there is nothing to wait for.
    let mut answer = [0; 512];
    let (_, len) = recv(&kernel, &mut answer[..], RecvFlags::empty())?;
    parse(answer.get(..len).unwrap_or(&answer))
}

fn request(local: SocketAddr, peer: SocketAddr) -> Vec<u8> {
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
    let mut bytes = Vec::with_capacity(REQUEST_BYTES as usize);
    bytes.extend(REQUEST_BYTES.to_ne_bytes());
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend(REQUEST.to_ne_bytes());
    bytes.extend([0; 8]); // sequence, port
    bytes.extend([family, IPPROTO_TCP, 0, 0]);
    bytes.extend(u32::MAX.to_ne_bytes()); // in any state
    bytes.extend(local.port().to_be_bytes());
    bytes.extend(peer.port().to_be_bytes());
    bytes.extend(address(local));
    bytes.extend(address(peer));
    // The interface: a link-local address belongs to one, and any other to any.
    let interface = if let SocketAddr::V6(peer) = peer { peer.scope_id() } else { 0 };
    bytes.extend(interface.to_ne_bytes());
    bytes.extend([0xff; 8]); // INET_DIAG_NOCOOKIE
    bytes
}

fn address(address: SocketAddr) -> [u8; 16] {
    match address.ip() {
        IpAddr::V6(ip) => ip.octets(),
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
    }
}

fn parse(answer: &[u8]) -> io::Result<u32> {
    let number = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?));
    let kind = answer.get(4..6).and_then(|bytes| Some(u16::from_ne_bytes(bytes.try_into().ok()?)));
    match kind {
        Some(BY_FAMILY) => number(SEND_QUEUE_AT),
        Some(ERROR) => {
            let errno =
                number(ERRNO_AT).map_or(0, |negated| negated.cast_signed().saturating_neg());
            return Err(Errno::from_raw_os_error(errno).into());
        }
        _ => None,
    }
    .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
    };

    #[test]
    fn bytes_leave_the_send_queue_as_the_peer_reads_them() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(host) else { continue };
            let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut reader, _) = listener.accept().unwrap();
            let queued = |sender: &TcpStream| {
                send_queue(sender.local_addr().unwrap(), sender.peer_addr().unwrap()).unwrap()
            };
            assert_eq!(queued(&sender), 0);

            sender.set_nonblocking(true).unwrap();
            let mut sent = 0;
            while let Ok(bytes) = sender.write(&[7; 8 * 1024]) {
                sent += bytes;
            }
            assert!(queued(&sender) > 0, "the reader's window is full");
            reader.read_exact(&mut vec![0; sent]).unwrap();
            assert_eq!(queued(&sender), 0);
        }
    }
}

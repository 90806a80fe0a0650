//! The user at the other end of a TCP connection over the loopback, which `sock_diag(7)` tells. It is shown, and decides nothing.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
};

use rustix::{
    io::Result,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, getpeername, getsockname,
        netlink::{SOCK_DIAG, SocketAddrNetlink},
        recv, sendto, socket_with,
    },
};

/// `SOCK_DIAG_BY_FAMILY`: the type of a question about one socket, and of its answer.
const BY_FAMILY: u16 = 20;
/// `NLM_F_REQUEST`.
pub(super) const REQUEST: u16 = 1;
/// `IPPROTO_TCP`.
const TCP: u8 = 6;
/// Length of `nlmsghdr`.
pub(super) const HEADER_BYTES: usize = 16;
/// Places in an answer, which is `nlmsghdr` and `inet_diag_msg`.
const TYPE: usize = 4;
const PORTS: usize = 20;
const UID: usize = 80;
const INODE: usize = 84;

/// Ports, addresses, interface and cookie of a connection, as the kernel writes them: `inet_diag_sockid`.
pub(super) type Id = [u8; 48];

/// Returns the user whose socket the peer is; none if it is on another host, has closed, or the system refuses to tell.
pub(crate) fn peer_uid(socket: &OwnedFd) -> Option<u32> {
    let canonical =
        |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let peer = canonical(getpeername(socket).ok()??.try_into().ok()?);
    let own = canonical(getsockname(socket).ok()?.try_into().ok()?);
    if !peer.ip().is_loopback() {
        return None;
    }
    uid(&ask(&question(peer, own)).ok()?, peer.port(), own.port())
}

/// Returns the kernel's answer.
fn ask(question: &[u8]) -> Result<Vec<u8>> {
    let mut answer = vec![0; 512];
    let (length, _) = recv(send(question)?, &mut answer[..], RecvFlags::empty())?;
    answer.truncate(length);
    Ok(answer)
}

/// Sends a question to the kernel, which answers before the call returns. Returns the socket that has the answer.
pub(super) fn send(question: &[u8]) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let netlink = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(SOCK_DIAG))?;
    sendto(&netlink, question, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    Ok(netlink)
}

/// Returns the question for the socket at `address` that is connected to `other`.
fn question(address: SocketAddr, other: SocketAddr) -> Vec<u8> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let mut id = [address.port().to_be_bytes(), other.port().to_be_bytes()].concat();
    for ip in [address.ip(), other.ip()] {
        let mut padded = [0; 16];
        match ip {
            IpAddr::V4(ip) => padded[..4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => padded = ip.octets(),
        }
        id.extend(padded);
    }
    // At any interface, and without a cookie.
    id.extend([0; 4]);
    id.extend([u8::MAX; 8]);
    message([BY_FAMILY, REQUEST], &question_body(family, &id))
}

/// Returns `inet_diag_req_v2`. `id` has the length of an [`Id`].
pub(super) fn question_body(family: AddressFamily, id: &[u8]) -> Vec<u8> {
    // In every state.
    let begin = [family.as_raw().to_le_bytes()[0], TCP, 0, 0, u8::MAX, u8::MAX, u8::MAX, u8::MAX];
    [&begin, id].concat()
}

/// Returns a message of a type and with flags of netlink, with neither a sequence number nor a port of netlink.
pub(super) fn message(type_and_flags: [u16; 2], body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
    let type_and_flags = type_and_flags.map(u16::to_ne_bytes).concat();
    [&length.to_ne_bytes()[..], &type_and_flags, &[0; 8], body].concat()
}

/// Takes the user out of an answer. Where no connection has these ports, the kernel tells of a listener; and a socket that
/// was closed, and so has no inode, counts as root's.
fn uid(answer: &[u8], port: u16, other: u16) -> Option<u32> {
    let word = |place: usize| Some(u32::from_ne_bytes(*answer.get(place..)?.first_chunk()?));
    let is_answer = answer.get(TYPE..)?.starts_with(&BY_FAMILY.to_ne_bytes());
    let ports = [port.to_be_bytes(), other.to_be_bytes()].concat();
    let is_open = answer.get(PORTS..)?.starts_with(&ports) && word(INODE)? > 0;
    (is_answer && is_open).then_some(word(UID)?)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_question_has_the_length_that_it_tells() {
        for ip in ["127.0.0.1", "::1"] {
            let address = SocketAddr::new(ip.parse().unwrap(), 80);
            let question = question(address, address);
            assert_eq!(question.len(), 72, "nlmsghdr and inet_diag_req_v2");
            assert_eq!(question[..4], 72_u32.to_ne_bytes());
        }
    }

    #[test]
    fn the_peer_on_the_loopback_has_a_user_while_it_is_open() {
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                println!("skipped: there is no IPv6 on this machine");
                continue;
            };
            let port = listener.local_addr().unwrap().port();
            // Also an IPv4 caller of a listener for both families, and the other way round.
            let callers = match address {
                "[::]:0" => vec![
                    SocketAddr::from(([127, 0, 0, 1], port)),
                    (Ipv6Addr::LOCALHOST, port).into(),
                ],
                _ => vec![listener.local_addr().unwrap()],
            };
            for address in callers {
                let caller = TcpStream::connect(address).unwrap();
                let accepted = OwnedFd::from(listener.accept().unwrap().0);
                if ask(&question(address, address)).is_err() {
                    return println!("skipped: the system refuses sock_diag");
                }
                let own = rustix::process::getuid().as_raw();
                assert_eq!(peer_uid(&accepted), Some(own), "{address}");
                drop(caller);
                assert_eq!(peer_uid(&accepted), None, "{address}: it has closed");
            }
        }
    }

    #[test]
    fn only_an_open_socket_of_these_ports_has_a_user() {
        let mut answer = vec![0; 88];
        answer[TYPE..][..2].copy_from_slice(&BY_FAMILY.to_ne_bytes());
        answer[PORTS..][..4].copy_from_slice(&[0, 80, 1, 0]);
        answer[UID..][..4].copy_from_slice(&7_u32.to_ne_bytes());
        answer[INODE..][..4].copy_from_slice(&9_u32.to_ne_bytes());
        assert_eq!(uid(&answer, 80, 256), Some(7));
        assert_eq!(uid(&answer, 80, 0), None, "a listener");
        for length in 0..answer.len() {
            assert_eq!(uid(&answer[..length], 80, 256), None, "{length}");
        }
        let mut closed = answer.clone();
        closed[INODE..].fill(0);
        assert_eq!(uid(&closed, 80, 256), None);
        answer[TYPE] = 2;
        assert_eq!(uid(&answer, 80, 256), None, "an error");
    }
}

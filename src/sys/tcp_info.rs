//! Facts about a TCP connection that the kernel tells only when asked, as no event reports them: memory of
//! unacknowledged bytes, an unanswered SYN, a vanished peer.
//!
//! All are socket options. They need neither a descriptor nor netlink, which hardened services and sandboxes refuse.
//! None is read on the way of a byte.

use std::{io, os::fd::AsFd, time::Duration};

use nix::{getsockopt_impl, libc, sockopt_impl, sys::socket::getsockopt};

/// Time after which a peer that acknowledges nothing counts as vanished. Keepalive gives a silent peer as long: ten
/// probes, 15 s apart.
const VANISHED_AFTER: Duration = Duration::from_secs(150);

/// Unanswered repetitions that have to come with it. Time alone is no proof: a peer with a closed window may be probed
/// only every 120 s (`TCP_RTO_MAX`), and answers each probe.
const VANISHED_REPEATS_MIN: u8 = 3;

/// Words of `SO_MEMINFO`, on every kernel that has it (Linux 4.12).
const MEMINFO_WORDS: usize = 9;

/// Words of `struct tcp_info` (`linux/tcp.h`) that are read. The struct has these since Linux 4.1, and only ever grows
/// at its end.
const WORDS: usize = 32;

// Indices of its fields, in words. The state, the retransmissions and the probes are bytes of word 0.
const UNACKED: usize = 6;
const LAST_ACK_RECV: usize = 14;
const RTT: usize = 17;
const TOTAL_RETRANS: usize = 25;
const BYTES_ACKED: usize = 30;

/// `TCP_SYN_SENT`.
const SYN_SENT: u8 = 2;

sockopt_impl!(
    /// `SO_MEMINFO`: the memory that a socket uses, as `SK_MEMINFO_*` of `linux/sock_diag.h`.
    MemInfo,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_MEMINFO,
    [u32; MEMINFO_WORDS]
);

sockopt_impl!(
    /// The first words of `TCP_INFO` (tcp(7)).
    Beginning,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    [u32; WORDS]
);

/// TCP state of a dialled connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TcpInfo {
    /// Set while its SYN is unanswered.
    pub(crate) is_dialled: bool,
    /// Set if a segment was retransmitted, perhaps the SYN.
    pub(crate) has_repeated: bool,
    /// Set if bytes were sent and none of them is acknowledged.
    pub(crate) is_unacknowledged: bool,
    /// Smoothed round-trip time.
    pub(crate) round_trip: Duration,
}

impl TcpInfo {
    /// Reads the state of a TCP socket.
    pub(crate) fn of(socket: impl AsFd) -> io::Result<Self> {
        let words = getsockopt(&socket, Beginning)?;
        // The number of acknowledged bytes has 64 bits, and counts the SYN as the first.
        let [.., low, high] = words;
        debug_assert_eq!(BYTES_ACKED + 2, WORDS);
        Ok(Self {
            is_dialled: words[0].to_ne_bytes()[0] == SYN_SENT,
            has_repeated: words[TOTAL_RETRANS] > 0,
            is_unacknowledged: words[UNACKED] > 0 && low.max(high) <= 1,
            round_trip: Duration::from_micros(words[RTT].into()),
        })
    }
}

/// Returns the memory of written bytes that the peer's kernel has not acknowledged. It is 0 exactly if all are
/// acknowledged. It includes the kernel's overhead, so it exceeds the number of bytes.
pub(crate) fn unacknowledged(socket: impl AsFd) -> io::Result<u32> {
    let [_rmem, _rcvbuf, _wmem, _sndbuf, _forward, queued, ..] = getsockopt(&socket, MemInfo)?;
    Ok(queued)
}

/// Returns true if repeated segments or window probes were unanswered for [`VANISHED_AFTER`].
///
/// `TCP_USER_TIMEOUT` would end such a connection by itself. But it also ends a connection whose living peer reads
/// nothing for as long (`tcp_probe_timer` of the kernel), such as a client stopped in a debugger, or a paused download.
pub(crate) fn has_peer_vanished(socket: impl AsFd) -> io::Result<bool> {
    let info = getsockopt(&socket, Beginning)?;
    let [_state, _congestion, retransmits, probes] = info[0].to_ne_bytes();
    Ok(is_vanished(retransmits.max(probes), Duration::from_millis(info[LAST_ACK_RECV].into())))
}

fn is_vanished(repeats: u8, since_last_ack: Duration) -> bool {
    repeats >= VANISHED_REPEATS_MIN && since_last_ack >= VANISHED_AFTER
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        time::Instant,
    };

    use super::*;
    use crate::sys::{Dialled, Listener, Socket, SocketAddress};

    #[test]
    fn memory_falls_to_zero_exactly_when_the_peer_has_everything() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(host) else { continue };
            let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut reader, _) = listener.accept().unwrap();
            assert_eq!(unacknowledged(&sender).unwrap(), 0);

            sender.set_nonblocking(true).unwrap();
            let mut sent = 0;
            while let Ok(bytes) = sender.write(&[7; 8 * 1024]) {
                sent += bytes;
            }
            assert!(unacknowledged(&sender).unwrap() > 0, "the reader's window is full");
            assert!(!has_peer_vanished(&sender).unwrap());
            reader.read_exact(&mut vec![0; sent]).unwrap();
            assert_eq!(unacknowledged(&sender).unwrap(), 0);
        }
    }

    #[test]
    fn silence_alone_or_a_few_repeats_alone_are_no_proof() {
        let long = VANISHED_AFTER;
        assert!(is_vanished(9, long));
        assert!(!is_vanished(0, 100 * long), "an idle peer owes no answer");
        assert!(!is_vanished(1, long), "a closed window is probed rarely, and answered");
        assert!(!is_vanished(15, long / 2));
    }

    #[test]
    fn what_is_acknowledged_is_known() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        client.write_all(&[7; 1000]).unwrap();
        accepted.read_exact(&mut [0; 1000]).unwrap();
        accepted.write_all(b"!").unwrap();
        client.read_exact(&mut [0]).unwrap();
        let info = TcpInfo::of(&client).unwrap();
        assert!(!info.is_dialled && !info.has_repeated && !info.is_unacknowledged, "{info:?}");
        assert!(info.round_trip > Duration::ZERO && info.round_trip < Duration::from_secs(1));
        let words = getsockopt(&client, Beginning).unwrap();
        assert_eq!(words[BYTES_ACKED].max(words[BYTES_ACKED + 1]), 1 + 1000, "the SYN counts");
    }

    #[test]
    fn a_syn_without_an_answer_is_known() {
        let listener = Listener::tcp("127.0.0.1:0".parse().unwrap(), 1).unwrap().pop().unwrap();
        listener.cut_backlog();
        let address = SocketAddress::Inet(listener.local_inet().unwrap());
        let dial = || Socket::dial(&address, None).unwrap();
        let info = |socket| TcpInfo::of(socket).unwrap();
        let (first, dialled) = dial();
        assert_eq!(dialled, Dialled::InProgress);
        let deadline = Instant::now() + Duration::from_secs(10);
        while info(&first).is_dialled {
            assert!(Instant::now() < deadline, "a backlog of 0 takes one");
            std::thread::yield_now();
        }
        let info = info(&dial().0);
        assert!(info.is_dialled && info.is_unacknowledged && !info.has_repeated, "{info:?}");
    }
}

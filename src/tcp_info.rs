//! Facts about a TCP connection that the kernel tells when asked: memory of unacknowledged bytes, and a peer that vanished.
//!
//! Both are socket options. They need neither a descriptor nor netlink, which hardened services and sandboxes refuse.
//! Neither is asked on the way of a byte.

use std::{io, os::fd::AsFd, time::Duration};

use nix::{getsockopt_impl, libc, sockopt_impl, sys::socket::getsockopt};

/// Time after which a peer that acknowledges nothing counts as vanished: keepalive allows a silent one as long, ten probes
/// every 15 s.
const VANISHED_AFTER: Duration = Duration::from_secs(150);

/// Repetitions without an answer that go along with it. Time alone is no proof: a peer that offers no window may be probed
/// only every 120 s (`TCP_RTO_MAX`), and answers each probe.
const VANISHED_REPEATS_MIN: u8 = 3;

/// Words of `SO_MEMINFO`: as many on every kernel that has it (Linux 4.12).
const MEMINFO_WORDS: usize = 9;

/// Words of `struct tcp_info` (`linux/tcp.h`) up to `tcpi_total_retrans`, which every kernel tells.
const TCP_INFO_WORDS: usize = 26;

sockopt_impl!(
    /// `SO_MEMINFO`: the memory that a socket uses, as `SK_MEMINFO_*` of `linux/sock_diag.h`.
    MemInfo,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_MEMINFO,
    [u32; MEMINFO_WORDS]
);

sockopt_impl!(
    /// `TCP_INFO` (tcp(7)).
    TcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    [u32; TCP_INFO_WORDS]
);

/// Returns the memory of all that was written and is not acknowledged by the peer's kernel, in bytes: 0 exactly if everything
/// is. It counts the kernel's own overhead, so it exceeds the bytes written.
pub(crate) fn unacknowledged(socket: impl AsFd) -> io::Result<u32> {
    let [_rmem, _rcvbuf, _wmem, _sndbuf, _forward, queued, ..] = getsockopt(&socket, MemInfo)?;
    Ok(queued)
}

/// Returns true if the peer has left repeated segments or window probes without an answer for [`VANISHED_AFTER`].
///
/// `TCP_USER_TIMEOUT` would end such a connection by itself, but also one whose living peer reads nothing for as long
/// (`tcp_probe_timer` of the kernel): a client stopped in a debugger, or a paused download.
pub(crate) fn has_peer_vanished(socket: impl AsFd) -> io::Result<bool> {
    let info = getsockopt(&socket, TcpInfo)?;
    let [_state, _congestion, retransmits, probes] = info[0].to_ne_bytes();
    Ok(is_vanished(retransmits.max(probes), Duration::from_millis(info[14].into())))
}

fn is_vanished(repeats: u8, since_last_ack: Duration) -> bool {
    repeats >= VANISHED_REPEATS_MIN && since_last_ack >= VANISHED_AFTER
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
    };

    use super::*;

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
}

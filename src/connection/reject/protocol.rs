//! Detection of a client's protocol by its first bytes.

/// Number of first bytes that decide in every case.
pub(crate) const OPENING_BYTES_MAX: usize = 8;

/// First byte of a TLS connection: a handshake record (RFC 8446, 5.1).
pub(crate) const TLS_HANDSHAKE: u8 = 0x16;

/// Beginning of an SSH client's banner (RFC 4253, 4.2).
const SSH: &[u8] = b"SSH-";

/// Lengths of a first PostgreSQL packet, the length field included. A server accepts no other.
const POSTGRES_BYTES: std::ops::RangeInclusive<u32> = 8..=10_000;

/// Codes behind the length that request a cancellation, TLS or GSSAPI.
const POSTGRES_REQUESTS: std::ops::RangeInclusive<u32> = 80_877_102..=80_877_104;

/// Major version of the PostgreSQL protocol since 2003, which may stand there instead.
const POSTGRES_MAJOR: u32 = 3;

/// Protocol of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// TLS.
    Tls,
    /// SSH.
    Ssh,
    /// PostgreSQL.
    Postgres,
    /// Most likely HTTP, or unknown.
    Other,
}

/// Detects the protocol by the first bytes. Returns `None` if more of them are needed.
pub(crate) fn detect(bytes: &[u8]) -> Option<Protocol> {
    match bytes {
        [] => None,
        [TLS_HANDSHAKE, ..] => Some(Protocol::Tls),
        _ if bytes.starts_with(SSH) => Some(Protocol::Ssh),
        _ if SSH.starts_with(bytes) => None,
        [0, 0, third, fourth, code @ ..] if code.len() >= 4 => {
            let length = u32::from_be_bytes([0, 0, *third, *fourth]);
            let code = code.iter().take(4).fold(0, |code, &byte| code << 8 | u32::from(byte));
            let is_ours = POSTGRES_REQUESTS.contains(&code) || code >> 16 == POSTGRES_MAJOR;
            let is_postgres = POSTGRES_BYTES.contains(&length) && is_ours;
            Some(if is_postgres { Protocol::Postgres } else { Protocol::Other })
        }
        [0] | [0, 0, ..] => None,
        _ => Some(Protocol::Other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_tell_what_a_client_speaks() {
        let table: [(&[u8], Protocol); 17] = [
            (b"\x16", Protocol::Tls),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Protocol::Ssh),
            (b"SSH-1.99-old", Protocol::Ssh),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", Protocol::Postgres),
            (b"\0\0\0\x08\x04\xd2\x16\x30", Protocol::Postgres),
            (b"\0\0\0\x10\x04\xd2\x16\x2e\0\0\0\x01\0\0\0\x02", Protocol::Postgres),
            (b"\0\0\0\x17\0\x03\0\0user\0", Protocol::Postgres),
            (b"\0\0\0\x17\0\x03\0\x02", Protocol::Postgres),
            (b"\0\0\0\x08\x04\xd2\x16\x2d", Protocol::Other),
            (b"\0\0\0\x07\x04\xd2\x16\x2f", Protocol::Other),
            (b"\0\0\x27\x11\0\x03\0\0", Protocol::Other),
            (b"\0\0\0\x85\xffSMB", Protocol::Other),
            (b"\0\x01", Protocol::Other),
            (b"G", Protocol::Other),
            (b"SEARCH /", Protocol::Other),
            (b"SSH ", Protocol::Other),
            (b"\x80\x2e", Protocol::Other),
        ];
        for (bytes, protocol) in table {
            assert_eq!(detect(bytes), Some(protocol), "{bytes:?}");
            // No prefix may be taken for another protocol.
            for length in 0..bytes.len() {
                let early = detect(&bytes[..length]);
                assert!(early.is_none() || early == Some(protocol), "{length} of {bytes:?}");
            }
        }
        for bytes in [&b""[..], b"S", b"SSH", b"\0", b"\0\0\0\x08\x04\xd2\x16"] {
            assert_eq!(detect(bytes), None, "{bytes:?}");
        }
    }
}

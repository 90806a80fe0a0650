//! Tests of headers: all forms, in parts, and wrong ones.

use std::net::SocketAddr;

use super::{parse::SIGNATURE, write::local_header, *};
use crate::config::{ProxySource, SendProxy};

fn addresses(source: &str, destination: &str) -> ProxiedAddresses {
    ProxiedAddresses { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
}

fn v2(rest: &[u8]) -> Vec<u8> {
    [&SIGNATURE, rest].concat()
}

/// Returns headers with what they tell.
fn headers() -> Vec<(Vec<u8>, Option<ProxiedAddresses>)> {
    let four = Some(addresses("1.2.3.4:258", "5.6.7.8:443"));
    let six = Some(addresses("[2001:db8::1]:258", "[::1]:443"));
    let four_bytes = b"\x01\x02\x03\x04\x05\x06\x07\x08\x01\x02\x01\xbb";
    let mut six_bytes = vec![0x20, 1, 0x0d, 0xb8];
    six_bytes.extend([0; 11]);
    six_bytes.push(1);
    six_bytes.extend([0; 15]);
    six_bytes.extend([1, 1, 2, 1, 0xbb]);
    let with_field = [&b"\x21\x11\x00\x14"[..], four_bytes, b"\x05\x00\x051.482"].concat();
    let largest = [&b"\x21\x11\x02\x08"[..], four_bytes, &[4; 508]].concat();
    vec![
        (b"PROXY TCP4 1.2.3.4 5.6.7.8 258 443\r\n".to_vec(), four),
        (b"PROXY TCP6 2001:db8::1 ::1 258 443\r\n".to_vec(), six),
        (
            b"PROXY TCP4 1.2.3.4 5.6.7.8 0 65535\r\n".to_vec(),
            Some(addresses("1.2.3.4:0", "5.6.7.8:65535")),
        ),
        (b"PROXY UNKNOWN\r\n".to_vec(), None),
        (b"PROXY UNKNOWN ffff::1 whatever 1 2\r\n".to_vec(), None),
        (v2(&[b"\x21\x11\x00\x0c", &four_bytes[..]].concat()), four),
        (v2(&[b"\x21\x21\x00\x24", &six_bytes[..]].concat()), six),
        (v2(&with_field), four),
        (v2(&largest), four),
        (v2(b"\x20\x00\x00\x00"), None),
        // What a check says of its addresses is ignored, however wrong.
        (v2(b"\x20\x11\x00\x00"), None),
        (v2(b"\x20\x77\x00\x03abc"), None),
        (v2(b"\x21\x00\x00\x00"), None),
        (v2(&[b"\x21\x12\x00\x0c", &four_bytes[..]].concat()), None),
        (v2(&[&b"\x21\x31\x00\xd8"[..], &[0; 216]].concat()), None),
    ]
}

#[test]
fn a_header_is_read_once_its_last_byte_is_there() {
    for (header, addresses) in headers() {
        for end in 0..header.len() {
            assert_eq!(parse(&header[..end]), Parsed::Partial, "{end} of {header:?}");
        }
        let expected = Parsed::Header { bytes: header.len(), addresses };
        assert_eq!(parse(&header), expected, "{header:?}");
        let followed = [&header[..], b"\r\nPROXY "].concat();
        assert_eq!(parse(&followed), expected, "{header:?}");
    }
}

#[test]
fn what_is_no_header_is_refused() {
    let malformed = [
        &b"PROXY \r\n"[..],
        b"PROXY UNKNOWNx\r\n",
        b"PROXY TCP5 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 \r\n",
        b"PROXY TCP4  1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 ::1 1 2\r\n",
        b"PROXY TCP6 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 01.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 +1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 01 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 65536\r\n",
        b"PROXY \xff\r\n",
    ];
    for bytes in malformed {
        assert_eq!(parse(bytes), Parsed::Wrong(Defect::Malformed), "{bytes:?}");
    }
    for rest in [
        // Another version, another command, another family, and addresses that are cut.
        &b"\x11\x11\x00\x00"[..],
        b"\x22\x00\x00\x00",
        b"\x21\x41\x00\x00",
        b"\x21\x11\x00\x0b\x01\x02\x03\x04\x05\x06\x07\x08\x00\x01\x00",
        b"\x21\x21\x00\x0c\x01\x02\x03\x04\x05\x06\x07\x08\x00\x01\x00\x02",
    ] {
        assert_eq!(parse(&v2(rest)), Parsed::Wrong(Defect::Malformed), "{rest:?}");
    }
    for bytes in [&b"GET / HTTP/1.1\r\n"[..], b"G", b"PROXYx", b"PR0", b"\r\n\r\nx", b"\x16\x03"] {
        assert_eq!(parse(bytes), Parsed::Wrong(Defect::Missing), "{bytes:?}");
    }
}

#[test]
fn a_header_without_an_end_is_refused_at_its_bound() {
    let line = [&b"PROXY UNKNOWN "[..], &[b'x'; 600]].concat();
    assert_eq!(parse(&line[..106]), Parsed::Partial);
    assert_eq!(parse(&line[..107]), Parsed::Wrong(Defect::TooLong));
    assert_eq!(parse(&line[..HEADER_BYTES_MAX]), Parsed::Wrong(Defect::TooLong));
    let longest = [&line[..105], b"\r\n"].concat();
    assert_eq!(parse(&longest), Parsed::Header { bytes: 107, addresses: None });
    // 520 bytes may follow, which is 0x208.
    assert_eq!(parse(&v2(b"\x21\x11\x02\x08")), Parsed::Partial);
    assert_eq!(parse(&v2(b"\x21\x11\x02\x09")), Parsed::Wrong(Defect::TooLong));
    assert_eq!(parse(&v2(b"\x20\x00\xff\xff")), Parsed::Wrong(Defect::TooLong));
}

#[test]
fn random_bytes_are_read_without_a_panic() {
    let mut state = 1_u64;
    for _round in 0..20_000 {
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize
        };
        let (headers, which) = (headers(), random());
        let mut bytes = headers[which % headers.len()].0.clone();
        let at = random() % bytes.len();
        bytes[at] = random().to_le_bytes()[0];
        bytes.truncate(1 + random() % bytes.len());
        if let Parsed::Header { bytes: length, .. } = parse(&bytes) {
            assert!(length <= bytes.len());
        }
    }
}

#[test]
fn what_is_written_reads_the_same() {
    for (source, destination, line) in [
        ("1.2.3.4:258", "5.6.7.8:443", "PROXY TCP4 1.2.3.4 5.6.7.8 258 443\r\n"),
        ("[2001:db8::1]:258", "[::1]:443", "PROXY TCP6 2001:db8::1 ::1 258 443\r\n"),
    ] {
        let addresses = Some(addresses(source, destination));
        let written = header_of(SendProxy::V1, addresses, "1.482");
        assert_eq!(str::from_utf8(&written), Ok(line));
        assert_eq!(parse(&written), Parsed::Header { bytes: line.len(), addresses });
        let written = header_of(SendProxy::V2, addresses, "1.482");
        assert_eq!(parse(&written), Parsed::Header { bytes: written.len(), addresses });
        assert_eq!(written[written.len() - 8..], *b"\x05\x00\x051.482");
        assert!(header_of(SendProxy::Off, addresses, "1.482").is_empty());
    }
    for version in [SendProxy::V1, SendProxy::V2] {
        let written = header_of(version, None, "1.482");
        assert_eq!(*written, *local_header(version));
        assert_eq!(parse(&written), Parsed::Header { bytes: written.len(), addresses: None });
    }
    assert!(local_header(SendProxy::Off).is_empty());
}

#[test]
fn a_header_of_our_own_tells_addresses_in_version_1_alone() {
    let ends = ("127.0.0.1:258".parse().unwrap(), "127.0.0.1:443".parse().unwrap());
    let own = |version, ends| own_header(version, ends).into_owned();
    assert_eq!(own(SendProxy::V1, Some(ends)), b"PROXY TCP4 127.0.0.1 127.0.0.1 258 443\r\n");
    for version in [SendProxy::Off, SendProxy::V1, SendProxy::V2] {
        assert_eq!(own(version, None), local_header(version));
    }
    assert_eq!(own(SendProxy::V2, Some(ends)), local_header(SendProxy::V2));
}

#[test]
fn a_header_has_one_family() {
    let mapped = addresses("[::ffff:1.2.3.4]:1", "[::ffff:5.6.7.8]:2");
    let mixed = addresses("1.2.3.4:1", "[2001:db8::1]:2");
    let text = |addresses| {
        String::from_utf8(header_of(SendProxy::V1, Some(addresses), "").into()).unwrap()
    };
    assert_eq!(text(mapped), "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n");
    assert_eq!(text(mixed), "PROXY TCP6 ::ffff:1.2.3.4 2001:db8::1 1 2\r\n");
    for (addresses, source) in [(mapped, "1.2.3.4:1"), (mixed, "[::ffff:1.2.3.4]:1")] {
        let Parsed::Header { addresses: Some(read), .. } =
            parse(&header_of(SendProxy::V2, Some(addresses), "0.1"))
        else {
            panic!("{addresses:?}");
        };
        assert_eq!(read.source, source.parse().unwrap());
    }
}

#[test]
fn a_header_is_due_by_address() {
    let address = |text: &str| Some(text.parse::<SocketAddr>().unwrap());
    let networks = ProxyHeaders::new(
        &["10.0.0.0/8", "fd00::/8"].map(|it| ProxySource::Network(it.parse().unwrap())),
        SendProxy::Off,
    );
    assert!(networks.are_sent_by(address("10.1.2.3:1")));
    assert!(networks.are_sent_by(address("[::ffff:10.1.2.3]:1")));
    assert!(networks.are_sent_by(address("[fd00::1]:1")));
    assert!(!networks.are_sent_by(address("11.1.2.3:1")));
    assert!(!networks.are_sent_by(None));
    let unix = ProxyHeaders::new(&[ProxySource::Unix], SendProxy::Off);
    assert!(unix.are_sent_by(None) && !unix.are_sent_by(address("127.0.0.1:1")));
    assert!(!ProxyHeaders::default().are_sent_by(None));
}

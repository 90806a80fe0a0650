//! Crowds of clients that begin with PROXY headers, each of which reaches the server with its own address.

use super::volume::{alone, crowd_size};
use crate::harness::{Proxy, Upstream, amount, record};

/// First bytes of version 2.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// Address that all clients have connected to.
const DESTINATION: [u8; 4] = [198, 51, 100, 1];

/// Returns the address of a client, which no other has.
fn source(number: u32) -> ([u8; 4], u16) {
    let [_, second, third, fourth] = number.to_be_bytes();
    ([10, second, third, fourth], 1024 + u16::try_from(number % 50_000).unwrap())
}

/// Returns the line of version 1 of a client.
fn line(number: u32) -> Vec<u8> {
    let ([a, b, c, d], port) = source(number);
    format!("PROXY TCP4 {a}.{b}.{c}.{d} 198.51.100.1 {port} 443\r\n").into_bytes()
}

/// Returns what stands for the addresses of a client in version 2.
fn addresses(number: u32) -> Vec<u8> {
    let (ip, port) = source(number);
    [&ip[..], &DESTINATION, &port.to_be_bytes(), &443_u16.to_be_bytes()].concat()
}

/// Returns the header of a client: of version 1 for each second one.
fn header(number: u32) -> Vec<u8> {
    if number.is_multiple_of(2) {
        line(number)
    } else {
        [SIGNATURE, b"\x21\x11\0\x0c", &addresses(number)].concat()
    }
}

/// Returns the number that a client has sent behind the header of `version`, which has to tell that client's address.
fn number_of(received: &[u8], version: &str) -> u32 {
    let (header, own) = received.split_last_chunk().expect("the number of a client");
    let number = u32::from_be_bytes(*own);
    if version == "v1" {
        assert_eq!(header, line(number));
    } else {
        let rest = header.strip_prefix(SIGNATURE).expect("a header of version 2");
        let (preamble, rest) = rest.split_first_chunk().unwrap();
        let [command, family, high, low] = *preamble;
        assert_eq!((command, family), (0x21, 0x11));
        assert_eq!(rest.len(), usize::from(u16::from_be_bytes([high, low])));
        assert_eq!(rest[..12], addresses(number));
    }
    number
}

#[test]
fn load_each_of_two_thousand_clients_keeps_its_address() {
    let _alone = alone();
    let count = u32::try_from(crowd_size(amount(2_000, 10_000))).unwrap();
    for version in ["v1", "v2"] {
        let upstream = Upstream::tcp(record);
        let proxy = Proxy::builder()
            .upstream(&upstream)
            .log_level(Some("info"))
            .args(["--proxy-accept-proxy-from", "127.0.0.0/8", "--upstream-send-proxy", version])
            .start();
        proxy.control().pause();
        let clients: Vec<_> = (0..count)
            .map(|number| {
                let mut client = proxy.connect();
                client.send(&[&header(number)[..], &number.to_be_bytes()].concat());
                client
            })
            .collect();
        proxy.control().wait_counts(|status| status.held, count.into());
        proxy.control().resume();
        for client in &clients {
            client.finish();
        }
        let mut numbers: Vec<_> =
            clients.iter().map(|_| number_of(&upstream.received().bytes, version)).collect();
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(0..count), "each client once");
        let status = proxy.control().status();
        assert_eq!((status.failed, status.rejected), (0, 0), "{version}");
    }
}

//! Networks of clients, in the notation of CIDR: `10.0.0.0/8`.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
};

/// A network, or a single address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// Its address, with zeros behind the prefix.
    ip: IpAddr,
    prefix: u32,
}

impl Network {
    /// Returns true if the network has this address. An IPv4 address in the notation of IPv6 counts as IPv4.
    pub(crate) fn contains(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip.is_ipv4() == self.ip.is_ipv4() && masked(ip, self.prefix) == self.ip
    }
}

impl FromStr for Network {
    type Err = String;

    /// Reads a network. The error names the text and shows the right form.
    fn from_str(text: &str) -> Result<Self, String> {
        let (ip, prefix) = text.split_once('/').map_or((text, None), |(ip, it)| (ip, Some(it)));
        let Ok(ip) = ip.parse::<IpAddr>() else { return Err(no_network(text, ip, prefix)) };
        let bits = width(ip);
        let prefix = match prefix {
            None => bits,
            Some(prefix) => {
                let is_number = !prefix.is_empty() && prefix.bytes().all(|it| it.is_ascii_digit());
                let number = prefix.parse::<u32>().ok().filter(|&it| is_number && it <= bits);
                number.ok_or_else(|| {
                    format!("{text:?} has the prefix {prefix:?}; write a number from 0 to {bits}")
                })?
            }
        };
        let network = Self { ip: masked(ip, prefix), prefix };
        if let (IpAddr::V4(ip), Some(prefix)) = (ip.to_canonical(), prefix.checked_sub(96))
            && bits > 32
        {
            let meant = Self { ip: masked(ip.into(), prefix), prefix };
            return Err(format!("{text:?} is a network of IPv4; write {meant}"));
        }
        if network.ip == ip {
            Ok(network)
        } else {
            Err(format!("{text:?} has bits behind its prefix; did you mean {network}?"))
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

/// Returns the error for a text whose address is none, with the network that is meant if an IPv4 address lacks its last parts.
fn no_network(text: &str, ip: &str, prefix: Option<&str>) -> String {
    let missing = 4_usize.saturating_sub(ip.split('.').count());
    let whole = format!("{ip}{}", ".0".repeat(missing)).parse::<Ipv4Addr>();
    let prefix = prefix.and_then(|prefix| prefix.parse::<u32>().ok()).filter(|&it| it <= 32);
    match (whole, prefix) {
        (Ok(ip), Some(prefix)) => {
            let network = Network { ip: masked(ip.into(), prefix), prefix };
            format!("{text:?} is no network; write {network}")
        }
        _ => format!("{text:?} is no network; write one such as 10.0.0.0/8, 10.0.0.7 or fd00::/8"),
    }
}

fn width(ip: IpAddr) -> u32 {
    if ip.is_ipv4() { 32 } else { 128 }
}

/// Returns an address with zeros behind the first `prefix` bits.
fn masked(ip: IpAddr, prefix: u32) -> IpAddr {
    // A shift by the whole width would be none.
    match ip {
        IpAddr::V4(ip) => IpAddr::V4(
            (ip.to_bits() & u32::MAX.checked_shl(32 - prefix).unwrap_or_default()).into(),
        ),
        IpAddr::V6(ip) => IpAddr::V6(
            (ip.to_bits() & u128::MAX.checked_shl(128 - prefix).unwrap_or_default()).into(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_has_the_addresses_of_its_prefix() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
            ("10.0.0.7", "10.0.0.7", "10.0.0.8"),
            ("10.0.0.6/31", "::ffff:10.0.0.7", "10.0.0.8"),
            ("0.0.0.0/0", "192.0.2.1", "::1"),
            ("::/0", "fd00::1", "192.0.2.1"),
            ("fd00::/8", "fdff::1", "fe80::1"),
            ("::1", "::1", "::2"),
            ("::1/128", "::1", "::"),
        ] {
            let parsed: Network = network.parse().unwrap();
            assert!(parsed.contains(inside.parse().unwrap()), "{network} {inside}");
            assert!(!parsed.contains(outside.parse().unwrap()), "{network} {outside}");
            assert_eq!(parsed.to_string().parse(), Ok(parsed));
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_the_right_form() {
        for (text, remedy) in [
            ("10.0.0/8", "write 10.0.0.0/8"),
            ("10.0/16", "write 10.0.0.0/16"),
            ("10/8", "write 10.0.0.0/8"),
            ("10.0.0.7/8", "did you mean 10.0.0.0/8?"),
            ("fd00::1/8", "did you mean fd00::/8?"),
            ("::ffff:10.0.0.0/104", "is a network of IPv4; write 10.0.0.0/8"),
            ("10.0.0.0/33", "from 0 to 32"),
            ("::/129", "from 0 to 128"),
            ("10.0.0.0/", "from 0 to 32"),
            ("10.0.0.0/+8", "from 0 to 32"),
            ("10.0.0.0/8/8", "from 0 to 32"),
            ("10.0.0.7:51544", "10.0.0.0/8, 10.0.0.7"),
            ("localhost", "10.0.0.0/8, 10.0.0.7"),
            ("", "10.0.0.0/8, 10.0.0.7"),
            ("/8", "10.0.0.0/8, 10.0.0.7"),
            ("10.0.0", "10.0.0.0/8, 10.0.0.7"),
        ] {
            let error = text.parse::<Network>().unwrap_err();
            assert!(error.contains(remedy), "{text}: {error}");
        }
    }
}

//! Connections as operators see and choose them: ids, filters, entries of the list, and selections by a filter.

use std::{
    fmt,
    net::SocketAddr,
    str::FromStr,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize, Serializer};

use crate::{
    config::{address::Address, duration::format_duration, network::Network},
    sys::SocketAddress,
};

/// Bits of an id that name the worker.
const WORKER_BITS: u32 = 16;

/// Id of a connection, written as `1.48213`: the worker that has accepted the client, and the client's number among those of
/// all workers. Ids are ordered by number, and so by arrival. None repeats, also over upgrades.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ConnectionId(u64);

/// State of a connection in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ConnectionState {
    /// It waits: for the resume, behind others, or for an upstream that is away.
    Held,
    /// Its upstream is dialled.
    Connecting,
    /// It is relayed.
    Active,
    /// It is rejected, or closed in good order.
    Rejecting,
}

/// Conditions on a connection, all of which must hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Filter {
    pub(crate) id: Option<ConnectionId>,
    pub(crate) state: Option<ConnectionState>,
    /// Network of a TCP client.
    pub(crate) client: Option<Network>,
    pub(crate) upstream: Option<UpstreamFilter>,
    /// Least age.
    pub(crate) older: Option<Duration>,
    /// Least time since a relayed connection has delivered bytes.
    pub(crate) idle: Option<Duration>,
}

/// Condition on the upstream of a relayed connection, of which one part has to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UpstreamFilter {
    /// The upstream as it was configured or switched to, whatever its addresses.
    pub(crate) name: Address,
    /// The address that the list shows. A name has none here.
    pub(crate) at: Option<SocketAddress>,
}

impl From<Address> for UpstreamFilter {
    fn from(name: Address) -> Self {
        let at = match &name {
            Address::Tcp { host, port } => {
                let ip = host.parse().ok();
                ip.map(|ip| SocketAddress::Inet(SocketAddr::new(ip, *port)))
            }
            Address::Unix(path) => Some(SocketAddress::Unix(path.clone())),
            Address::Abstract(name) => Some(SocketAddress::Abstract(name.clone())),
        };
        Self { name, at }
    }
}

/// Entry of a connection in the list.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Entry {
    pub(crate) id: ConnectionId,
    pub(crate) state: ConnectionState,
    pub(crate) client: String,
    /// Address of the upstream of a relayed connection.
    pub(crate) upstream: Option<String>,
    pub(crate) age_seconds: f64,
    /// Time since a relayed connection has delivered bytes.
    pub(crate) idle_seconds: Option<f64>,
    /// Time for which the client has waited; none if it has not.
    pub(crate) held_seconds: Option<f64>,
    pub(crate) bytes_to_upstream: u64,
    pub(crate) bytes_to_client: u64,
    pub(crate) half_closed: bool,
    /// Side that the other one may wait for: the upstream, if the client spoke last.
    pub(crate) owes: Option<&'static str>,
}

/// End of a connection by order of an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum KillMode {
    /// Both sides are reset.
    #[default]
    Reset,
    /// Both sides get the end of the stream.
    Close,
}

/// Choice of connections with its purpose, for all workers.
#[derive(Debug)]
pub(crate) struct Selection {
    pub(crate) filter: Filter,
    pub(crate) purpose: Purpose,
    /// Moment of the selection.
    pub(crate) begun: Instant,
    /// Moment from which nobody awaits the result.
    pub(crate) until: Instant,
}

/// Purpose of a selection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A page of the list: at most so many, the oldest behind an id.
    List { after: Option<ConnectionId>, limit: usize },
    /// The end of all that are chosen, spread over a time.
    Kill { how: KillMode, spread: Duration },
}

/// Result of a selection.
#[derive(Debug, Default)]
pub(crate) struct Selected {
    /// Number of connections that the filter chooses.
    pub(crate) total: u64,
    /// Number of those behind the id at which a page begins.
    pub(crate) behind: u64,
    /// First of those, in the order of their ids.
    pub(crate) entries: Vec<Entry>,
}

impl ConnectionId {
    /// Returns the id of a client that the worker `worker` has accepted.
    pub(crate) fn new(worker: usize, number: u64) -> Self {
        let mask = (1 << WORKER_BITS) - 1;
        Self(number << WORKER_BITS | (worker as u64 & mask))
    }

    /// Returns the worker and the number.
    pub(crate) fn parts(self) -> (u16, u64) {
        let [low, high, ..] = self.0.to_le_bytes();
        (u16::from_le_bytes([low, high]), self.0 >> WORKER_BITS)
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (worker, number) = self.parts();
        write!(f, "{worker}.{number}")
    }
}

impl FromStr for ConnectionId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (worker, number) = text.split_once('.')?;
            let id = Self::new(worker.parse::<u16>().ok()?.into(), number.parse().ok()?);
            // So that an id has one form.
            (id.to_string() == text).then_some(id)
        };
        parse()
            .ok_or_else(|| format!("{text:?} is no id of a connection; write one such as 1.48213"))
    }
}

impl Serialize for ConnectionId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Purpose {
    /// Returns the most entries that it needs.
    pub(crate) fn limit(self) -> usize {
        match self {
            Self::List { limit, .. } => limit,
            Self::Kill { .. } => 0,
        }
    }
}

impl ConnectionState {
    /// All states, each with its name in the API.
    pub(crate) const ALL: [(&str, Self); 4] = [
        ("held", Self::Held),
        ("connecting", Self::Connecting),
        ("active", Self::Active),
        ("rejecting", Self::Rejecting),
    ];
}

impl KillMode {
    /// All modes, each with its name in the API.
    pub(crate) const ALL: [(&str, Self); 2] = [("reset", Self::Reset), ("close", Self::Close)];
}

impl fmt::Display for Entry {
    /// Writes the entry as a part of a line: `tcp://10.0.0.7:51544 for 31s, idle 4s`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole_seconds = |seconds: f64| {
            let time = Duration::try_from_secs_f64(seconds).unwrap_or_default();
            format_duration(Duration::from_secs(time.as_secs()))
        };
        write!(f, "{} for {}", self.client, whole_seconds(self.age_seconds))?;
        match self.idle_seconds {
            Some(idle) => write!(f, ", idle {}", whole_seconds(idle)),
            None => write!(f, ", connecting"),
        }
    }
}

impl Selected {
    /// Adds what another worker has chosen, and keeps the first entries of both.
    pub(crate) fn merge(&mut self, other: Self, limit: usize) {
        self.total += other.total;
        self.behind += other.behind;
        self.entries.extend(other.entries);
        self.entries.sort_unstable_by_key(|entry| entry.id);
        self.entries.truncate(limit);
    }

    /// Returns the id behind which the next page begins; none if there is none.
    pub(crate) fn next(&self) -> Option<ConnectionId> {
        let is_last = self.behind <= self.entries.len() as u64;
        self.entries.last().map(|entry| entry.id).filter(|_| !is_last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_form() {
        for text in ["0.1", "1.48213", "65535.281474976710655"] {
            assert_eq!(text.parse::<ConnectionId>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "1",
            ".",
            "1.",
            ".1",
            "1.2.3",
            "01.2",
            "1.02",
            "+1.2",
            "65536.1",
            "-1.2",
            "1.2 ",
            "0.281474976710656",
            "a.b",
        ] {
            let error = text.parse::<ConnectionId>().unwrap_err();
            assert!(error.contains("write one such as 1.48213"), "{error}");
        }
    }

    #[test]
    fn ids_are_ordered_by_arrival() {
        let id = |text: &str| text.parse::<ConnectionId>().unwrap();
        assert!(id("7.1") < id("0.2") && id("0.2") < id("1.2"));
    }

    fn entry(number: u64) -> Entry {
        Entry {
            id: ConnectionId::new(0, number),
            state: ConnectionState::Active,
            client: "tcp://10.0.0.7:51544".to_owned(),
            upstream: None,
            age_seconds: 31.9,
            idle_seconds: Some(4.2),
            held_seconds: None,
            bytes_to_upstream: 1,
            bytes_to_client: 2,
            half_closed: false,
            owes: Some("upstream"),
        }
    }

    #[test]
    fn an_entry_is_a_part_of_a_line() {
        assert_eq!(entry(1).to_string(), "tcp://10.0.0.7:51544 for 31s, idle 4s");
        let dialled = Entry { idle_seconds: None, ..entry(1) };
        assert_eq!(dialled.to_string(), "tcp://10.0.0.7:51544 for 31s, connecting");
    }

    #[test]
    fn a_page_has_the_first_of_all_workers() {
        let of = |numbers: &[u64], behind| Selected {
            total: 9,
            behind,
            entries: numbers.iter().map(|&number| entry(number)).collect(),
        };
        let mut page = of(&[2, 5], 2);
        page.merge(of(&[1, 7], 4), 3);
        let ids = page.entries.iter().map(|it| it.id.parts().1).collect::<Vec<_>>();
        assert_eq!((page.total, ids), (18, vec![1, 2, 5]));
        assert_eq!(page.next(), Some(ConnectionId::new(0, 5)));
        let mut last = Selected::default();
        last.merge(of(&[1, 2], 2), 3);
        assert_eq!((last.entries.len(), last.next()), (2, None));
        assert_eq!(Selected::default().next(), None);
    }
}

//! Keys and values of a fleet: short JSON below `PREFIX/NAME/`.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

pub(crate) use crate::config::OnDisconnect;

/// Names of a fleet's keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KeySpace {
    /// `PREFIX/NAME/`.
    root: String,
}

/// `pause/record/NAME`, without a lease: a pause of all hosts, which holds while it is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Record {
    /// Unique for each pause.
    pub(crate) id: String,
    /// User, process and host that have asked for it.
    pub(crate) by: String,
    /// Time of day in seconds since 1970, which is only shown.
    #[serde(default)]
    pub(crate) began: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    /// Treatment of new clients, as in the API; the member's default without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mode: Option<String>,
    /// Closing of quiet connections, as in the API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) drain: Option<String>,
    /// Treatment of half-closed held clients, as in the API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) half_closed: Option<String>,
    /// Time to live of the coordinator's lease.
    pub(crate) ttl: Duration,
    /// Number that grows with each order to reset what is left.
    #[serde(default)]
    pub(crate) kill: u64,
}

/// `pause/holder/NAME`, with the coordinator's lease: somebody looks after the pause.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Holder {
    pub(crate) id: String,
}

/// `member/HOST`, without a lease: a host that counts, also without a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct MemberRecord {
    /// Machine and address of the proxy: the same over restarts.
    pub(crate) identity: String,
    /// Start of the machine: copies of one have the same identity, and are told apart by this. Empty if it is not known.
    #[serde(default)]
    pub(crate) boot: String,
    pub(crate) on_disconnect: OnDisconnect,
    /// T: without contact for so long, a member that holds admits nobody.
    pub(crate) fence: Duration,
    /// G: what is left then is reset after so long.
    pub(crate) grace: Duration,
    pub(crate) version: String,
}

/// `state/HOST`, with the member's lease: its session, and news of its proxy.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct State {
    /// Unique for each session.
    pub(crate) instance: String,
    /// Ids of the pauses that hold here, by name: nobody is admitted any more.
    #[serde(default)]
    pub(crate) acks: BTreeMap<String, String>,
    /// True if nothing is carried or dialled.
    pub(crate) idle: bool,
    pub(crate) held: u64,
    pub(crate) active: u64,
    pub(crate) connecting: u64,
    /// Age of the oldest connection, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) oldest: Option<u64>,
    /// Ids of the pauses that an operator has lifted here alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) forced: Vec<String>,
}

impl KeySpace {
    pub(crate) fn new(prefix: &str, name: &str) -> Self {
        Self { root: format!("{prefix}/{name}/") }
    }

    /// Returns the common begin of all keys.
    pub(crate) fn all(&self) -> &str {
        &self.root
    }

    /// Returns the common begin of records and holders.
    pub(crate) fn pauses(&self) -> String {
        format!("{}pause/", self.root)
    }

    pub(crate) fn record(&self, name: &str) -> String {
        format!("{}pause/record/{name}", self.root)
    }

    pub(crate) fn holder(&self, name: &str) -> String {
        format!("{}pause/holder/{name}", self.root)
    }

    pub(crate) fn member(&self, host: &str) -> String {
        format!("{}member/{host}", self.root)
    }

    pub(crate) fn state(&self, host: &str) -> String {
        format!("{}state/{host}", self.root)
    }
}

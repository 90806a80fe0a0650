//! `Store`: the few operations that a fleet needs of its engine, in the words of etcd v3.

use std::{fmt, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

/// Outcome of a request.
pub(crate) type Answered = Result<Reply, StoreError>;

/// Engine that keeps the records of a fleet. Each request blocks for its timeout at most.
pub(crate) trait Store {
    /// Carries out one request.
    fn ask(&mut self, request: &Request, timeout: Duration) -> Answered;
}

/// Settings of the store's client.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct StoreSettings {
    /// URLs of its members, `http://` or `https://`.
    pub(crate) endpoints: Vec<String>,
    /// PEM of the authorities that may sign for the store; `https` needs it.
    pub(crate) ca_cert: Option<PathBuf>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
    pub(crate) username: Option<String>,
    pub(crate) password_file: Option<PathBuf>,
}

/// Number of a lease, under which keys hold for as long as it is renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LeaseId(pub(crate) i64);

/// Number of a state of the whole store, which grows with each change.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
pub(crate) struct Revision(pub(crate) i64);

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// Makes a lease of this time to live, in whole seconds.
    Grant { ttl: Duration },
    /// Begins a lease's time anew.
    KeepAlive { lease: LeaseId },
    /// Ends a lease, and all keys with it.
    Revoke { lease: LeaseId },
    /// Reads and writes at one revision. With at least one range, the answer is linearizable.
    Transact(Transaction),
}

/// Operations of one revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Transaction {
    pub(crate) compares: Vec<Compare>,
    /// Operations if all comparisons hold.
    pub(crate) then: Vec<Operation>,
    /// Operations if one does not.
    pub(crate) otherwise: Vec<Operation>,
}

/// Condition of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Compare {
    /// There is no such key.
    Absent { key: String },
    /// There is such a key.
    Present { key: String },
    /// The key was changed last at this revision.
    ModifiedAt { key: String, revision: Revision },
    /// The key has this value.
    Value { key: String, value: String },
}

/// Step of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Operation {
    Put { key: String, value: String, lease: Option<LeaseId> },
    Delete { key: String },
    Range { keys: Keys },
}

/// Keys to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Keys {
    One(String),
    Prefix(String),
}

/// Answer to a request, and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    /// Store as a whole; another one after a restored backup.
    pub(crate) cluster: u64,
    pub(crate) revision: Revision,
    /// Connection to one member of the store: of two replies with the same number, the same member has answered.
    pub(crate) connection: u64,
    pub(crate) answer: Answer,
}

/// Answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Granted {
        lease: LeaseId,
        ttl: Duration,
    },
    /// Time to live from now on; `None` if there is no such lease.
    Renewed {
        ttl: Option<Duration>,
    },
    Revoked,
    /// Result of a transaction, with the pairs of each range of the branch that was taken.
    Transacted {
        succeeded: bool,
        found: Vec<Vec<KeyValue>>,
    },
}

/// Key with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyValue {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) modified: Revision,
    pub(crate) lease: Option<LeaseId>,
}

/// Failure of a request. But for the first two, the store has answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StoreError {
    /// No endpoint took the request, for this reason.
    Unreachable(String),
    /// No answer came in time, or none that can be read; the request may have been carried out.
    TimedOut(String),
    /// A key was to be put under a lease that has ended.
    NoSuchLease,
    /// User, password, certificate or rights do not suffice.
    Denied(String),
    /// The store takes no more data.
    Full(String),
    /// Anything else, such as a version that is too old.
    Refused(String),
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchLease => f.write_str("the session has ended"),
            Self::Unreachable(text)
            | Self::TimedOut(text)
            | Self::Denied(text)
            | Self::Full(text)
            | Self::Refused(text) => f.write_str(text),
        }
    }
}

//! Answers of the BPF side that are for people, too.

use std::fmt;

/// Result of a search for the server's listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// A listener, to which clients can be steered from now on.
    Listener,
    /// No listener: a dial would be refused.
    Nobody,
    /// An address of another host is among them.
    Elsewhere,
    /// One of our own addresses.
    Own,
    /// A listener that the kernel does not steer to.
    Mptcp,
    /// A listener that is bound to a device, by which alone it can answer.
    Device,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Listener => "the server listens",
            Self::Nobody => "nobody listens at upstream.addr in this network namespace",
            Self::Elsewhere => "upstream.addr is not, or not only, an address of this host and network namespace",
            Self::Own => "upstream.addr is an address of the proxy itself",
            Self::Device => {
                "the server's listener is bound to a device (SO_BINDTODEVICE), so that it could not answer steered clients of others"
            }
            Self::Mptcp => {
                "the server listens by MPTCP, which the kernel does not steer to; a server in Go needs GODEBUG=multipathtcp=0"
            }
        })
    }
}

/// Refusal to steer, in one sentence that names the remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unavailable {
    pub(super) why: String,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

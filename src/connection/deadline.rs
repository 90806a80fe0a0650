//! Deadlines of connections: their kinds and lengths. A kind also names the worker's list that a client stands in
//! (`worker/timers.rs`), so even relayed connections without a deadline have one.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{admission::pace::SYN_TIMEOUT_MIN, sys::KEEPALIVE_INTERVAL};

/// Kind of a connection's deadline, and so the worker's list that it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Deadline {
    /// Wait for the resume, or in the queue behind other clients. During a pause it is bounded by `hold.timeout`, after
    /// which the client is rejected or closed.
    Held,
    /// Wait for the PROXY header of a client, until the client is closed.
    AwaitingHeader,
    /// Wait for the first byte behind a header that names no client, as that of a health check, until the client is served.
    AwaitingByte,
    /// Dial of an address, until the attempt goes on to the next one.
    Connecting,
    /// Dial of the last address that the attempt has time for, until the attempt is given up.
    ConnectingLast,
    /// Dial with a share of the window, until its SYN may count as lost.
    Unanswered,
    /// Wait for an upstream that is away, until the client is given up. A pause moves the client to [`Deadline::Held`].
    AwaitingUpstream,
    /// Relay with a share of the window whose upstream has sent nothing, until the connection counts as out of the
    /// upstream's backlog.
    AwaitingFirstByte,
    /// Relay that is young, until it has lasted long enough to have the kernel's keepalive set.
    NoKeepaliveYet,
    /// Relay with keepalive; it has no deadline.
    Relaying,
    /// Relay with one side reset, until the next check for the other side's acknowledgements.
    AwaitingAcks,
    /// The same after many checks. The more connections are in this list, the more rarely each is checked.
    Stalled,
    /// Rejection of a client that has not sent anything, until it is answered all the same.
    Sniffing,
    /// Rejection of a client whose TLS handshake waits to begin, until it gets an alert.
    AwaitingHandshake,
    /// TLS handshake of a client to reject, until it is given up.
    Handshaking,
    /// Rejection of a client after its TLS handshake, until it is answered without its request.
    AwaitingRequest,
    /// Discarding of the bytes that a rejected client still sends, until it is closed.
    Lingering,
}

/// Lists of clients that wait without a pass.
pub(crate) const WAITING: [Deadline; 4] =
    [Deadline::Held, Deadline::AwaitingHeader, Deadline::AwaitingByte, Deadline::AwaitingUpstream];
/// Lists of clients whose upstream is dialled.
pub(crate) const DIALLED: [Deadline; 3] =
    [Deadline::Connecting, Deadline::ConnectingLast, Deadline::Unanswered];
/// Lists of connections that are relayed.
pub(crate) const RELAYED: [Deadline; 5] = [
    Deadline::AwaitingFirstByte,
    Deadline::NoKeepaliveYet,
    Deadline::Relaying,
    Deadline::AwaitingAcks,
    Deadline::Stalled,
];
/// Lists of clients that are rejected, or closed in good order.
pub(crate) const REJECTED: [Deadline; 5] = [
    Deadline::Sniffing,
    Deadline::AwaitingHandshake,
    Deadline::Handshaking,
    Deadline::AwaitingRequest,
    Deadline::Lingering,
];

/// Time in which a client's PROXY header has to be complete. It should come with the first segment.
const HEADER_TIMEOUT: Duration = Duration::from_secs(3);
/// Time in which a health check leaves behind its header. A client whose server speaks first waits for so long.
const CHECK_TIMEOUT: Duration = Duration::from_millis(100);
/// Time that the dial of an address may take before the next address is dialled.
pub(crate) const ADDRESS_TIMEOUT: Duration = Duration::from_millis(300);
/// Time that a connection counts as queued in the upstream's backlog while the upstream sends nothing. It may have
/// nothing to send.
const HEARING_TIMEOUT: Duration = Duration::from_millis(50);
/// Interval of checks for a peer's acknowledgements, which no event reports.
const SETTLE_INTERVAL: Duration = Duration::from_millis(10);
/// Least interval of these checks for a stalled peer.
const STALLED_INTERVAL_MIN: Duration = Duration::from_millis(20);
/// Time that a client to reject may be silent, or waits for its TLS handshake to begin.
const SNIFF_TIMEOUT: Duration = Duration::from_secs(1);
/// Time that the TLS handshake of a client to reject may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// Time that a rejected client may go on sending.
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);

/// Kinds of deadlines with a fixed length.
const DEADLINES: [(Deadline, Duration); 13] = [
    (Deadline::AwaitingHeader, HEADER_TIMEOUT),
    (Deadline::AwaitingByte, CHECK_TIMEOUT),
    (Deadline::Connecting, ADDRESS_TIMEOUT),
    (Deadline::Unanswered, SYN_TIMEOUT_MIN),
    (Deadline::AwaitingFirstByte, HEARING_TIMEOUT),
    (Deadline::NoKeepaliveYet, KEEPALIVE_INTERVAL),
    (Deadline::AwaitingAcks, SETTLE_INTERVAL),
    (Deadline::Stalled, STALLED_INTERVAL_MIN),
    (Deadline::Sniffing, SNIFF_TIMEOUT),
    (Deadline::AwaitingHandshake, SNIFF_TIMEOUT),
    (Deadline::Handshaking, HANDSHAKE_TIMEOUT),
    (Deadline::AwaitingRequest, SNIFF_TIMEOUT),
    (Deadline::Lingering, LINGER_TIMEOUT),
];

/// Returns all kinds of deadlines that have a length. `hold_timeout` bounds the time of held clients, `connect_timeout`
/// an attempt to reach the upstream, and `patience` the wait for an upstream that is away.
pub(crate) fn deadlines(
    hold_timeout: Option<Duration>,
    connect_timeout: Duration,
    patience: Duration,
) -> Box<[(Deadline, Duration)]> {
    let held = hold_timeout.map(|timeout| (Deadline::Held, timeout));
    let dials =
        [(Deadline::ConnectingLast, connect_timeout), (Deadline::AwaitingUpstream, patience)];
    DEADLINES.into_iter().chain(dials).chain(held).collect()
}

//! Deadlines of connections: what each waits for, and for how long.

use std::time::Duration;

use crate::{admission::pace::SYN_TIMEOUT_MIN, sys::KEEPALIVE_INTERVAL};

/// Which queue a connection stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deadline {
    /// Clients that wait for the resume or for their turn: during a pause, until they get what further ones get, if not for
    /// ever.
    Held,
    /// An upstream is being dialled: until the attempt goes on to its next address.
    Connecting,
    /// The same at the last address that the attempt has time for: until the attempt is given up.
    ConnectingLast,
    /// The upstream is dialled for one of a crowd: until its SYN may be lost.
    Unanswered,
    /// Clients that wait for an upstream that is away: until they are given up. A pause has them held.
    AwaitingUpstream,
    /// One of a crowd is carried, and the upstream has not said anything: until it is taken to be out of the backlog.
    AwaitingFirstByte,
    /// Both sides are carried, and have not been for long: until the connection is worth its keepalive.
    NoKeepaliveYet,
    /// Both sides are carried; no deadline.
    Relaying,
    /// One side is gone and the other has yet to take what is left: until the next look.
    AwaitingAcks,
    /// The same, if it takes long: until the next look, which comes more rarely the more stand here.
    Stalled,
    /// A client to reject that has not spoken yet: until it is answered unasked.
    Sniffing,
    /// A client to reject that waits for its TLS handshake to begin: until it gets an alert.
    AwaitingHandshake,
    /// A client to reject in its TLS handshake: until it is given up.
    Handshaking,
    /// A client to reject whose request inside TLS is awaited: until it is answered unasked.
    AwaitingRequest,
    /// A rejected client that may still be sending: until it is closed all the same.
    Lingering,
}

/// How long an address of the upstream is dialled before the next one has its turn.
pub(crate) const ADDRESS_TIMEOUT: Duration = Duration::from_millis(300);
/// How long one of a crowd counts as queued at an upstream that says nothing: it has no need to.
const HEARING_TIMEOUT: Duration = Duration::from_millis(50);
/// How often to look whether a peer has acknowledged everything: no event tells.
const SETTLE_INTERVAL: Duration = Duration::from_millis(10);
/// How often at most to look at a peer that takes long.
const STALLED_INTERVAL_MIN: Duration = Duration::from_millis(20);
/// How long a client to reject may be silent, or waits for its TLS handshake.
const SNIFF_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a client to reject may take for its TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a rejected client may go on sending.
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);

/// The queues whose deadline is not a setting, and its length.
const DEADLINES: [(Deadline, Duration); 11] = [
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

/// Returns the queues with a deadline, and its length: clients are held for `hold_timeout`, an attempt to reach the upstream
/// lasts for `connect_timeout`, and clients wait `patience` for an upstream that is away.
pub(crate) fn deadlines(
    hold_timeout: Option<Duration>,
    connect_timeout: Duration,
    patience: Duration,
) -> Box<[(Deadline, Duration)]> {
    let held = hold_timeout.map(|timeout| (Deadline::Held, timeout));
    let dialled =
        [(Deadline::ConnectingLast, connect_timeout), (Deadline::AwaitingUpstream, patience)];
    DEADLINES.into_iter().chain(dialled).chain(held).collect()
}

//! Record of a connection: facts for its line in the log and for the histograms.

use std::{
    borrow::Cow,
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{Connection, State, header::ClientHeader};
use crate::{
    config::address::Address,
    handover::parcel::{Incoming, Moment, Outgoing},
    listing::ConnectionId,
    stats::{
        Counters,
        cause::{CloseCause, ConnectResult},
    },
    upstream::targets::Target,
};

/// Target of the lines about connections, by which a logger tells them from others.
const TARGET: &str = "tcpause::connection";

/// Facts of a connection that its state does not keep.
#[derive(Debug)]
pub(super) struct Record {
    id: ConnectionId,
    accepted: Instant,
    /// Address of a TCP client. A socket that was reset knows it no more.
    client: Option<Tcp>,
    /// Address at which a TCP upstream was reached.
    upstream: Option<Tcp>,
    /// Time for which the client waited without a pass, for whatever reason, in milliseconds; none if it did not.
    held: Option<u32>,
    /// Time of the successful attempt to connect, in microseconds, plus one; none without one.
    connect: Option<NonZeroU32>,
    /// Header of the PROXY protocol that the client begins with.
    pub(super) header: ClientHeader,
}

/// Words of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecordWords {
    number: u64,
    /// Worker that has accepted the client; none from a process that did not tell.
    worker: Option<u16>,
    accepted: Moment,
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    upstream: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    held: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    connect: Option<u32>,
    #[serde(default, skip_serializing_if = "ClientHeader::is_absent")]
    header: ClientHeader,
}

impl Record {
    /// Returns its words.
    pub(super) fn describe(&self, parcel: &Outgoing<'_>) -> RecordWords {
        let Self { id, accepted, client, upstream, held, connect: _, header } = *self;
        let connect = self.connect_micros();
        let (client, upstream) = (client.map(Into::into), upstream.map(Into::into));
        let accepted = parcel.moment(accepted);
        let (worker, number) = id.parts();
        let worker = Some(worker);
        RecordWords { number, worker, accepted, client, upstream, held, connect, header }
    }

    /// Returns the record of `words` from the worker `giver`.
    pub(super) fn rebuild(words: RecordWords, parcel: &Incoming, giver: usize) -> Self {
        let RecordWords { number, worker, accepted, client, upstream, held, connect, header } =
            words;
        let (client, upstream) = (client.map(Tcp::from), upstream.map(Tcp::from));
        let id = ConnectionId::new(worker.map_or(giver, usize::from), number);
        let (accepted, connect) = (parcel.instant(accepted), connect.map(plus_one));
        Self { id, accepted, client, upstream, held, connect, header }
    }

    /// Returns the record of a client that was accepted from `client`.
    pub(super) fn new(client: Option<SocketAddr>, now: Instant) -> Self {
        let (client, id) = (client.map(Tcp::from), ConnectionId::new(0, 0));
        let header = ClientHeader::default();
        Self { id, accepted: now, client, upstream: None, held: None, connect: None, header }
    }

    /// Records the id of the client, and its arrival.
    pub(super) fn admitted(&mut self, id: ConnectionId, now: Instant) {
        (self.id, self.accepted) = (id, now);
    }

    /// Returns the beginning of the client's time.
    pub(super) fn accepted(&self) -> Instant {
        self.accepted
    }

    /// Returns the address of a TCP client.
    pub(super) fn client(&self) -> Option<SocketAddr> {
        self.client.map(Into::into)
    }

    /// Records the address that the client's header tells.
    pub(super) fn came_from(&mut self, client: SocketAddr) {
        self.client = Some(client.into());
    }

    /// Records that the client waits.
    pub(super) fn begin_wait(&mut self) {
        self.held.get_or_insert(0);
    }

    /// Records the end of a wait, if the client has waited.
    pub(super) fn waited_until(&mut self, now: Instant) {
        let held = now.saturating_duration_since(self.accepted).as_millis();
        self.held = self.held.map(|_before| u32::try_from(held).unwrap_or(u32::MAX));
    }

    /// Records the beginning of the relay to `upstream` after an attempt that took `connect`.
    pub(super) fn connected(
        &mut self,
        upstream: Option<SocketAddr>,
        connect: Duration,
        counters: &Counters,
    ) {
        self.upstream = upstream.map(Tcp::from);
        self.connect = Some(plus_one(u32::try_from(connect.as_micros()).unwrap_or(u32::MAX)));
        counters.connect.observe(connect);
    }

    /// Returns the time for which the client was held, by a pause or behind others. It ended at `end`, when it was released
    /// or its wait for the upstream began.
    pub(super) fn held_before(&self, end: Instant) -> Option<Duration> {
        let held = end.saturating_duration_since(self.accepted);
        (!held.is_zero()).then_some(held)
    }

    /// Returns the age of the client's connection to the upstream.
    pub(super) fn connected_for(&self, now: Instant) -> Duration {
        let connect = Duration::from_micros(self.connect_micros().unwrap_or_default().into());
        let before = self.held().unwrap_or_default() + connect;
        now.saturating_duration_since(self.accepted).saturating_sub(before)
    }

    fn connect_micros(&self) -> Option<u32> {
        self.connect.map(|plus_one| plus_one.get() - 1)
    }

    /// Returns the id of the client.
    pub(super) fn id(&self) -> ConnectionId {
        self.id
    }

    /// Returns the address at which a TCP upstream was reached.
    pub(super) fn upstream(&self) -> Option<SocketAddr> {
        self.upstream.map(SocketAddr::from)
    }

    /// Returns the time for which the client has waited; none if it has not.
    pub(super) fn held(&self) -> Option<Duration> {
        self.held.map(|millis| Duration::from_millis(millis.into()))
    }
}

impl Connection {
    /// Counts the times of a connection that ends by `cause`.
    pub(crate) fn observe_end(&mut self, cause: CloseCause, counters: &Counters, now: Instant) {
        let since = |begin| now.saturating_duration_since(begin);
        counters.life.observe(since(self.record.accepted));
        if self.record.header == ClientHeader::Awaited {
            // It was neither held nor served.
            return;
        }
        if let State::Waiting { .. } = self.state {
            self.record.waited_until(now);
        }
        let (hold_ended, outage_began) = match &self.state {
            // Its waits were counted when it was served.
            State::Relaying(_) => return,
            State::Rejecting(_) if self.record.connect.is_some() => return,
            State::Waiting { patience: None, .. } => {
                // Also one that has gone at once.
                if self.record.held.is_some() {
                    counters.hold.end(cause, since(self.record.accepted));
                }
                return;
            }
            State::Waiting { patience: Some(patience), .. } => {
                (patience.since, Some(patience.since))
            }
            State::Connecting(dial) => (dial.attempt.since(), dial.attempt.outage_began()),
            State::Rejecting(_) => {
                let held = self.record.held().unwrap_or_default();
                (self.record.accepted + held, None)
            }
        };
        if let Some(began) = outage_began {
            counters.outage.end(cause, since(began));
        }
        if let Some(held) = self.record.held_before(hold_ended) {
            counters.hold.end(cause, held);
        }
    }

    /// Returns the address of the client, or the user and the process of a UNIX client.
    pub(super) fn client_name(&self) -> String {
        self.record
            .client
            .map_or_else(|| self.client.socket().peer(), |address| address.to_string())
    }

    /// Returns the upstream that it leads to, or that is dialled for it.
    pub(crate) fn target(&self) -> Option<&Target> {
        match &self.state {
            State::Connecting(dial) => Some(dial.target.target()),
            State::Relaying(session) => Some(session.target.target()),
            State::Waiting { .. } | State::Rejecting(_) => None,
        }
    }

    /// Logs the end of the connection. `error` is the result of its last dial.
    pub(crate) fn log_end(
        &self,
        cause: CloseCause,
        error: Option<ConnectResult>,
        upstream: &Address,
        now: Instant,
    ) {
        let record = &self.record;
        let (to_upstream, to_client) = match &self.state {
            State::Relaying(session) => session.relay.delivered(),
            State::Rejecting(rejection) => rejection.delivered,
            State::Waiting { .. } | State::Connecting(_) => (0, 0),
        };
        let id = record.id.to_string();
        let client = self.client_name();
        let upstream = record.upstream.map_or_else(|| upstream.to_string(), |it| it.to_string());
        let held = record.held().map(|held| millis(held.as_secs_f64()));
        let connect = record.connect_micros().map(|micros| f64::from(micros) / 1e6);
        let shown =
            |value: Option<f64>, unit| value.map_or("-".into(), |it| format!("{it:.3}{unit}"));
        let (held_text, connect_text) = (shown(held, "s"), shown(connect.map(|it| it * 1e3), "ms"));
        let took = now.saturating_duration_since(record.accepted).as_secs_f64();
        let (cause_word, error) = (cause.word(), error.map(ConnectResult::word));
        let told = error.map_or_else(String::new, |error| format!(" error={error}"));
        log::log!(
            target: TARGET, cause.level(),
            event = "connection", id = id.as_str(), client = client.as_str(), upstream = upstream.as_str(),
            held_seconds = held, connect_seconds = connect, duration_seconds = millis(took),
            bytes_to_upstream = to_upstream, bytes_to_client = to_client, cause = cause_word, error = error;
            "connection {id} client={} upstream={} held={held_text} connect={connect_text} took={took:.3}s \
             to_upstream={to_upstream} to_client={to_client} cause={cause_word}{told}",
            word(&client), word(&upstream)
        );
    }
}

/// TCP address in fewer bytes than a `SocketAddr`.
#[derive(Debug, Clone, Copy)]
struct Tcp {
    /// IPv6 address, or an IPv4 address mapped to one.
    ip: [u8; 16],
    port: u16,
}

impl From<SocketAddr> for Tcp {
    fn from(address: SocketAddr) -> Self {
        let ip = match address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        Self { ip: ip.octets(), port: address.port() }
    }
}

impl From<Tcp> for SocketAddr {
    fn from(address: Tcp) -> Self {
        Self::new(Ipv6Addr::from(address.ip).to_canonical(), address.port)
    }
}

impl fmt::Display for Tcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tcp://{}", SocketAddr::from(*self))
    }
}

/// Returns a number as it is kept, in a form that needs no room to tell that there is none.
fn plus_one(number: u32) -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(number)
}

/// Returns a text as one word, in quotes if it has a space.
fn word(text: &str) -> Cow<'_, str> {
    if text.contains(' ') { format!("{text:?}").into() } else { text.into() }
}

/// Rounds seconds to milliseconds, so that JSON shows no more digits.
pub(super) fn millis(seconds: f64) -> f64 {
    (seconds * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_keeps_its_worker_in_a_hand_over() {
        let begin = Instant::now();
        let incoming = Incoming::new(begin, Vec::new(), Vec::new());
        let mut record = Record::new(None, begin);
        record.admitted(ConnectionId::new(3, 48_213), begin);
        let words = serde_json::to_string(&record.describe(&Outgoing::new(begin))).unwrap();
        let rebuild = |words| Record::rebuild(serde_json::from_str(words).unwrap(), &incoming, 1);
        assert_eq!(rebuild(&words).id(), record.id());
        // A process that does not tell the worker has shown that of the present one.
        assert_eq!(rebuild(r#"{"number":7,"accepted":0}"#).id().to_string(), "1.7");
    }
}

//! Leases: the pauses that hold, each with its caller, its terms and its end. The proxy is paused while there is any lease.
//!
//! This is plain data behind the lock of [`Pauses`](super::Pauses): nothing here waits, and the caller passes in the time.

pub(crate) mod words;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use self::words::ModeWords;
use crate::{config::HalfClosed, pause::gate::Mode, timestamp::Rfc3339};

/// Name of a pause that is requested without one.
pub(crate) const NAME_DEFAULT: &str = "default";

/// Most leases at a time.
pub(crate) const LEASES_MAX: usize = 64;

/// Request number of the program itself, for which there is always room. Requests of the control API count from 1.
pub(crate) const PROGRAM: u64 = 0;

/// Request number of the pauses of the fleet, which are known by their names.
pub(crate) const FLEET: u64 = 1 << 63;

/// Begin of the names of leases that the fleet keeps, and no caller of the API.
pub(crate) const FLEET_PREFIX: &str = "fleet/";

/// All leases that hold.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    /// Leases, oldest first. A pending lease hides the earlier ones of its name until it is committed or undone.
    list: Vec<Lease>,
    /// Begin of the present pause, which outlasts the lease that began it; `None` while there is no lease.
    paused_since: Option<Timestamp>,
    /// Names of the fleet's leases that an operator has lifted here alone.
    forced: BTreeSet<String>,
}

/// One pause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) terms: Terms,
    pub(crate) lifetime: Lifetime,
    /// Number of the request that created it.
    pub(crate) request_id: u64,
    /// Time from which its name has held without a gap.
    pub(crate) since: Timestamp,
    /// Time at which it expires; `None` for never.
    pub(crate) ends: Option<Instant>,
}

/// Terms that a pause was requested with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Terms {
    pub(crate) name: String,
    pub(crate) reason: Option<String>,
    /// Caller: its address, or its user and process.
    pub(crate) by: String,
    #[serde(with = "ModeWords")]
    pub(crate) mode: Mode,
    /// Time to live without a renewal.
    pub(crate) ttl: Option<Duration>,
    /// Silence after which connections are closed.
    pub(crate) quiet: Option<Quiet>,
    /// Treatment of held clients that have ended their stream.
    #[serde(default)]
    pub(crate) half_closed: HalfClosed,
}

/// Time for which connections may be silent before they are closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Quiet {
    /// Only sessions of PostgreSQL that are known to be outside transactions are closed.
    Postgres(Duration),
    /// All are. Its words are those of the time alone.
    #[serde(untagged)]
    Any(Duration),
}

/// Condition for a lease to hold on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Lifetime {
    /// None. A name has one committed lease at most.
    Committed,
    /// Success of its request; it is undone otherwise. The leases that held before under its name stay until then.
    Pending,
    /// Connection of its caller. It neither replaces another lease of its name nor is replaced.
    ConnectionBound,
}

/// One point in time by two clocks: the monotonic one for decisions, and the wall clock for logs and the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timestamp {
    pub(crate) at: Instant,
    pub(crate) shown: Rfc3339,
}

/// Refusal of a lease, because there are [`LEASES_MAX`] already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

/// Leases that have ended, and the pause with them if none is left.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) leases: Vec<Lease>,
    /// Begin of the pause, if it has ended.
    pub(crate) paused_since: Option<Timestamp>,
}

impl Leases {
    /// Adds a lease. A committed lease replaces the committed one of its name.
    pub(crate) fn put(
        &mut self,
        terms: Terms,
        lifetime: Lifetime,
        request_id: u64,
        now: Timestamp,
    ) -> Result<(), Full> {
        let since = match lifetime {
            Lifetime::ConnectionBound => None,
            Lifetime::Committed | Lifetime::Pending => {
                self.unbound(&terms.name).map(|old| old.since)
            }
        };
        if lifetime == Lifetime::Committed {
            self.remove_committed(&terms.name);
        }
        // The fleet bounds its pauses by itself.
        let has_room = matches!(request_id, PROGRAM | FLEET);
        // A lease under a name that holds replaces another, now or when it is committed, so it needs no room.
        if since.is_none() && self.list.len() >= LEASES_MAX && !has_room {
            return Err(Full);
        }
        let ends = terms.end(now.at);
        let lease = Lease { terms, lifetime, request_id, since: since.unwrap_or(now), ends };
        let place = self.list.len();
        match lifetime {
            Lifetime::Committed => self.insert_committed(place, lease),
            Lifetime::Pending | Lifetime::ConnectionBound => self.list.insert(place, lease),
        }
        self.paused_since.get_or_insert(now);
        Ok(())
    }

    /// Commits the pending lease of a request: it replaces the committed one of its name, and is not undone any more.
    pub(crate) fn commit(&mut self, request_id: u64) {
        let of_request = |lease: &&Lease| lease.request_id == request_id;
        let Some(lease) = self.list.iter().find(of_request).cloned() else { return };
        if lease.lifetime == Lifetime::Pending {
            self.remove_committed(&lease.terms.name);
            let place = self.list.iter().position(|lease| lease.request_id == request_id);
            self.list.retain(|lease| lease.request_id != request_id);
            let lease = Lease { lifetime: Lifetime::Committed, ..lease };
            self.insert_committed(place.unwrap_or_default(), lease);
        }
    }

    /// Inserts a committed lease at `place`, but below all pending leases of its name, which take over its terms and its end.
    /// If those are undone, this one remains.
    fn insert_committed(&mut self, mut place: usize, lease: Lease) {
        for (index, old) in self.list.iter_mut().enumerate().take(place).rev() {
            if old.terms.name == lease.terms.name && old.lifetime == Lifetime::Pending {
                (old.terms, old.ends, place) = (lease.terms.clone(), lease.ends, index);
            }
        }
        self.list.insert(place, lease);
    }

    /// Removes the committed lease of a name.
    fn remove_committed(&mut self, name: &str) {
        self.list.retain(|old| old.lifetime != Lifetime::Committed || old.terms.name != name);
    }

    /// Removes the leases for which `is_over` returns true.
    pub(crate) fn remove(&mut self, is_over: impl Fn(&Lease) -> bool) -> Ended {
        let (leases, left) = std::mem::take(&mut self.list).into_iter().partition(is_over);
        self.list = left;
        let paused_since = if self.list.is_empty() { self.paused_since.take() } else { None };
        Ended { leases, paused_since }
    }

    /// Returns true if removing the leases for which `is_over` returns true would end the pause.
    pub(crate) fn would_resume(&self, is_over: impl Fn(&Lease) -> bool) -> bool {
        !self.list.is_empty() && self.list.iter().all(is_over)
    }

    /// Restarts the time to live of the first lease for which `is_meant` returns true. Returns false if there is none.
    pub(crate) fn renew(&mut self, is_meant: impl Fn(&Lease) -> bool, now: Instant) -> bool {
        let meant = self.list.iter_mut().find(|lease| is_meant(lease));
        meant.map(|lease| lease.ends = lease.terms.end(now)).is_some()
    }

    /// Remembers that an operator has lifted the fleet's lease of this name here alone, until the fleet lets it go.
    pub(crate) fn force(&mut self, name: &str) {
        self.forced.insert(name.to_owned());
    }

    /// Forgets that an operator has lifted the fleet's lease of this name.
    pub(crate) fn forget_forced(&mut self, name: &str) {
        self.forced.remove(name);
    }

    /// Returns the names of the fleet's leases that an operator has lifted here alone.
    pub(crate) fn forced(&self) -> impl Iterator<Item = &str> {
        self.forced.iter().map(String::as_str)
    }

    /// Returns true if the lease of this request holds.
    pub(crate) fn holds(&self, request_id: u64) -> bool {
        self.list.iter().any(|lease| lease.request_id == request_id)
    }

    /// Returns true if there is a lease of this name.
    pub(crate) fn holds_name(&self, name: &str) -> bool {
        self.list.iter().any(|lease| lease.terms.name == name)
    }

    /// Returns the treatment of new clients: they are rejected if any lease says so. `None` without leases.
    pub(crate) fn mode(&self) -> Option<Mode> {
        let rejects = self.list.iter().any(|lease| lease.terms.mode == Mode::Reject);
        (!self.list.is_empty()).then_some(if rejects { Mode::Reject } else { Mode::Hold })
    }

    /// Returns the time for which any connection may be silent: the shortest of all leases.
    pub(crate) fn quiet(&self) -> Option<Duration> {
        let times = self.list.iter().map(|lease| match lease.terms.quiet? {
            Quiet::Any(time) => Some(time),
            Quiet::Postgres(_) => None,
        });
        times.flatten().min()
    }

    /// Returns the time for which an idle session of PostgreSQL may be silent, by the leases that close no others.
    pub(crate) fn postgres_quiet(&self) -> Option<Duration> {
        let times = self.list.iter().map(|lease| match lease.terms.quiet? {
            Quiet::Postgres(time) => Some(time),
            Quiet::Any(_) => None,
        });
        times.flatten().min()
    }

    /// Returns the treatment of held clients that have ended their stream: the strictest of all leases.
    pub(crate) fn half_closed(&self) -> HalfClosed {
        self.list.iter().map(|lease| lease.terms.half_closed).max().unwrap_or_default()
    }

    /// Returns the time at which the next lease expires.
    pub(crate) fn next_end(&self) -> Option<Instant> {
        self.list.iter().filter_map(|lease| lease.ends).min()
    }

    /// Returns the begin of the present pause.
    pub(crate) fn paused_since(&self) -> Option<Timestamp> {
        self.paused_since
    }

    /// Returns the visible leases: of each name the latest one, and all that are bound to a connection.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Lease> {
        self.list.iter().enumerate().filter_map(|(index, lease)| {
            let is_below = |above: &Lease| {
                above.terms.name == lease.terms.name && above.lifetime != Lifetime::ConnectionBound
            };
            let above = self.list.get(index + 1..).unwrap_or_default();
            (lease.lifetime == Lifetime::ConnectionBound || !above.iter().any(is_below))
                .then_some(lease)
        })
    }

    /// Finds a lease of this name that is not bound to a connection.
    fn unbound(&self, name: &str) -> Option<&Lease> {
        self.list
            .iter()
            .find(|lease| lease.terms.name == name && lease.lifetime != Lifetime::ConnectionBound)
    }
}

impl Quiet {
    /// Returns the time.
    pub(crate) fn time(self) -> Duration {
        match self {
            Self::Any(time) | Self::Postgres(time) => time,
        }
    }

    /// Returns true if only idle sessions of PostgreSQL are closed.
    pub(crate) fn is_postgres(self) -> bool {
        matches!(self, Self::Postgres(_))
    }
}

impl Lease {
    /// Returns true if only the fleet ends it, or an operator by force.
    pub(crate) fn is_of_fleet(&self) -> bool {
        self.terms.name.starts_with(FLEET_PREFIX)
    }

    /// Returns true if its time is up.
    pub(crate) fn has_expired(&self, now: Instant) -> bool {
        self.ends.is_some_and(|end| end <= now)
    }

    /// Returns true if it ends when this request is given up.
    pub(crate) fn is_undone_with(&self, request_id: u64) -> bool {
        self.request_id == request_id && self.lifetime != Lifetime::Committed
    }
}

impl Terms {
    /// Returns the end of a lease that begins now; `None` also for an end beyond the range of the clock.
    fn end(&self, now: Instant) -> Option<Instant> {
        self.ttl.and_then(|ttl| now.checked_add(ttl))
    }
}

/// Returns the name of a mode in the API and the status.
pub(crate) fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Hold => "hold",
        Mode::Reject => "reject",
    }
}

#[cfg(test)]
mod tests;

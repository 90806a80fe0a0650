//! Leases: who has paused the proxy, on what terms and until when. It is paused while any of them is there.
//!
//! Plain data behind one lock (`Pauses`): nothing here waits, and whoever calls says what time it is.

use std::time::{Duration, Instant};

use crate::{pause::gate::Mode, timestamp::Rfc3339};

/// The name of a pause that is asked for without one.
pub(crate) const NAME_DEFAULT: &str = "default";

/// How many leases there may be.
pub(crate) const LEASES_MAX: usize = 64;

/// The request number of the program itself, for which there is always room. Callers of the control API count from 1.
pub(crate) const PROGRAM: u64 = 0;

/// All leases that hold.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    /// Of those with one name, each stands on the ones before it.
    list: Vec<Lease>,
    /// When the first of an unbroken row came.
    paused_since: Option<Timestamp>,
}

/// One pause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) terms: Terms,
    pub(crate) standing: Lifetime,
    /// Which request has asked for it.
    pub(crate) request_id: u64,
    /// Since when its name holds.
    pub(crate) since: Timestamp,
    /// When it ends by itself.
    pub(crate) ends: Option<Instant>,
}

/// What a pause was asked for with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) name: String,
    pub(crate) reason: Option<String>,
    /// Who has asked.
    pub(crate) by: String,
    pub(crate) mode: Mode,
    /// How long it lasts unless it is renewed.
    pub(crate) ttl: Option<Duration>,
    /// For how long a connection may be silent.
    pub(crate) quiet: Option<Duration>,
}

/// What a lease depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lifetime {
    /// On nothing: it is the one of its name.
    Committed,
    /// On the success of its request: it is undone otherwise. What held before under its name is still there.
    Pending,
    /// On its caller's connection. It neither replaces another of its name nor is replaced.
    ConnectionBound,
}

/// One point in time by both clocks: the one that decides, and the one that is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timestamp {
    pub(crate) at: Instant,
    pub(crate) shown: Rfc3339,
}

/// Refusal of a lease: there are as many as there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

/// What has ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) leases: Vec<Lease>,
    /// Since when it was paused, if none is left.
    pub(crate) paused_since: Option<Timestamp>,
}

impl Leases {
    /// Adds a lease; one that is firm replaces what holds under its name.
    pub(crate) fn put(
        &mut self,
        terms: Terms,
        standing: Lifetime,
        request_id: u64,
        now: Timestamp,
    ) -> Result<(), Full> {
        let since = match standing {
            Lifetime::ConnectionBound => None,
            Lifetime::Committed | Lifetime::Pending => {
                self.untied(&terms.name).map(|old| old.since)
            }
        };
        if standing == Lifetime::Committed {
            self.remove_firm(&terms.name);
        }
        // Under a name that holds, it takes the place of another, now or in the end.
        if since.is_none() && self.list.len() >= LEASES_MAX && request_id != PROGRAM {
            return Err(Full);
        }
        let ends = terms.end(now.at);
        let lease = Lease { terms, standing, request_id, since: since.unwrap_or(now), ends };
        let place = self.list.len();
        match standing {
            Lifetime::Committed => self.insert_firm(place, lease),
            Lifetime::Pending | Lifetime::ConnectionBound => self.list.insert(place, lease),
        }
        self.paused_since.get_or_insert(now);
        Ok(())
    }

    /// Lets the lease of a request stand for itself: it replaces the firm one of its name, and is not undone any more.
    pub(crate) fn settle(&mut self, request_id: u64) {
        let of_request = |lease: &&Lease| lease.request_id == request_id;
        let Some(lease) = self.list.iter().find(of_request).cloned() else { return };
        if lease.standing == Lifetime::Pending {
            self.remove_firm(&lease.terms.name);
            let place = self.list.iter().position(|lease| lease.request_id == request_id);
            self.list.retain(|lease| lease.request_id != request_id);
            let lease = Lease { standing: Lifetime::Committed, ..lease };
            self.insert_firm(place.unwrap_or_default(), lease);
        }
    }

    /// Inserts a firm lease before `place` and before those of its name that stand there and wait: they go on under its
    /// terms, and if they are undone, it holds.
    fn insert_firm(&mut self, mut place: usize, lease: Lease) {
        for (index, old) in self.list.iter_mut().enumerate().take(place).rev() {
            if old.terms.name == lease.terms.name && old.standing == Lifetime::Pending {
                (old.terms, old.ends, place) = (lease.terms.clone(), lease.ends, index);
            }
        }
        self.list.insert(place, lease);
    }

    fn remove_firm(&mut self, name: &str) {
        self.list.retain(|old| old.standing != Lifetime::Committed || old.terms.name != name);
    }

    /// Removes those for which `is_over` holds.
    pub(crate) fn remove(&mut self, is_over: impl Fn(&Lease) -> bool) -> Ended {
        let (leases, left) = std::mem::take(&mut self.list).into_iter().partition(is_over);
        self.list = left;
        let paused_since = if self.list.is_empty() { self.paused_since.take() } else { None };
        Ended { leases, paused_since }
    }

    /// Whether it would be paused no more without those for which `is_over` holds.
    pub(crate) fn would_resume(&self, is_over: impl Fn(&Lease) -> bool) -> bool {
        !self.list.is_empty() && self.list.iter().all(is_over)
    }

    /// Has the time of a request's lease begin anew; false if it holds no more.
    pub(crate) fn renew(&mut self, request_id: u64, now: Instant) -> bool {
        let mut of_request = self.list.iter_mut().filter(|lease| lease.request_id == request_id);
        of_request.next().map(|lease| lease.ends = lease.terms.end(now)).is_some()
    }

    /// Whether the lease of a request holds.
    pub(crate) fn holds(&self, request_id: u64) -> bool {
        self.list.iter().any(|lease| lease.request_id == request_id)
    }

    /// Whether a name holds.
    pub(crate) fn holds_name(&self, name: &str) -> bool {
        self.list.iter().any(|lease| lease.terms.name == name)
    }

    /// What is done with new clients, if it is paused: to reject them wins.
    pub(crate) fn mode(&self) -> Option<Mode> {
        let rejects = self.list.iter().any(|lease| lease.terms.mode == Mode::Reject);
        (!self.list.is_empty()).then_some(if rejects { Mode::Reject } else { Mode::Hold })
    }

    /// For how long a connection may be silent: the shortest time wins.
    pub(crate) fn quiet(&self) -> Option<Duration> {
        self.list.iter().filter_map(|lease| lease.terms.quiet).min()
    }

    /// When the next one ends by itself.
    pub(crate) fn next_end(&self) -> Option<Instant> {
        self.list.iter().filter_map(|lease| lease.ends).min()
    }

    /// Since when it is paused, if it is.
    pub(crate) fn paused_since(&self) -> Option<Timestamp> {
        self.paused_since
    }

    /// All but those on which another of their name stands.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Lease> {
        self.list.iter().enumerate().filter_map(|(index, lease)| {
            let is_below = |above: &Lease| {
                above.terms.name == lease.terms.name && above.standing != Lifetime::ConnectionBound
            };
            let above = self.list.get(index + 1..).unwrap_or_default();
            (lease.standing == Lifetime::ConnectionBound || !above.iter().any(is_below))
                .then_some(lease)
        })
    }

    fn untied(&self, name: &str) -> Option<&Lease> {
        self.list
            .iter()
            .find(|lease| lease.terms.name == name && lease.standing != Lifetime::ConnectionBound)
    }
}

impl Lease {
    /// Whether its time is up.
    pub(crate) fn has_expired(&self, now: Instant) -> bool {
        self.ends.is_some_and(|end| end <= now)
    }

    /// Whether it goes when the request with this request number is given up.
    pub(crate) fn is_undone_with(&self, request_id: u64) -> bool {
        self.request_id == request_id && self.standing != Lifetime::Committed
    }
}

impl Terms {
    /// An end beyond the clock's range is none.
    fn end(&self, now: Instant) -> Option<Instant> {
        self.ttl.and_then(|ttl| now.checked_add(ttl))
    }
}

/// As operators write it.
pub(crate) fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Hold => "hold",
        Mode::Reject => "reject",
    }
}

#[cfg(test)]
mod tests;

//! Parcels: words of a struct with the descriptors and raw bytes that go along.
//!
//! Words are written in the order in which [`Outgoing`] takes descriptors and bytes, and read in the same order.

use std::{
    fmt,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::sys::{Descriptor, Lent};

/// Moment in nanoseconds after the beginning of the hand-over; before it, the number is negative. So no clock is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Moment(i64);

/// Parcel of the giver, which keeps what it lends.
#[derive(Debug)]
pub(crate) struct Outgoing<'a> {
    begin: Instant,
    descriptors: Vec<Lent<'a>>,
    bytes: Vec<u8>,
}

/// Parcel of the taker.
#[derive(Debug)]
pub(crate) struct Incoming {
    begin: Instant,
    /// In the order of their use, reversed.
    descriptors: Vec<Descriptor>,
    bytes: Vec<u8>,
    /// Number of the bytes that were taken out.
    taken: usize,
}

/// Refusal of a parcel that does not fit its words.
#[derive(Debug)]
pub(crate) struct Misfit(String);

impl Moment {
    /// Returns the moment `at` of a hand-over that began at `begin`.
    fn of(at: Instant, begin: Instant) -> Self {
        let nanos = |span: Duration| i64::try_from(span.as_nanos()).unwrap_or(i64::MAX);
        Self(match at.checked_duration_since(begin) {
            Some(after) => nanos(after),
            None => -nanos(begin.duration_since(at)),
        })
    }

    /// Returns it on the clock of the process in which the hand-over began at `begin`. What the clock cannot express is `begin`.
    fn on(self, begin: Instant) -> Instant {
        let span = Duration::from_nanos(self.0.unsigned_abs());
        let at = if self.0 < 0 { begin.checked_sub(span) } else { begin.checked_add(span) };
        at.unwrap_or(begin)
    }
}

impl<'a> Outgoing<'a> {
    /// Returns an empty parcel of a hand-over that began at `begin`.
    pub(crate) fn new(begin: Instant) -> Self {
        Self { begin, descriptors: Vec::new(), bytes: Vec::new() }
    }

    /// Returns `at` as it travels.
    pub(crate) fn moment(&self, at: Instant) -> Moment {
        Moment::of(at, self.begin)
    }

    /// Adds a descriptor.
    pub(crate) fn lend(&mut self, descriptor: Lent<'a>) {
        self.descriptors.push(descriptor);
    }

    /// Adds raw bytes. Returns their number, which belongs into the words.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> usize {
        self.bytes.extend_from_slice(bytes);
        bytes.len()
    }

    /// Returns the number of descriptors.
    pub(crate) fn descriptor_count(&self) -> usize {
        self.descriptors.len()
    }

    /// Returns the number of raw bytes.
    pub(crate) fn byte_count(&self) -> usize {
        self.bytes.len()
    }

    /// Returns its descriptors and bytes.
    pub(crate) fn into_parts(self) -> (Vec<Lent<'a>>, Vec<u8>) {
        (self.descriptors, self.bytes)
    }
}

impl Incoming {
    /// Returns a parcel with these contents, of a hand-over that began at `begin`.
    pub(crate) fn new(begin: Instant, mut descriptors: Vec<Descriptor>, bytes: Vec<u8>) -> Self {
        descriptors.reverse();
        Self { begin, descriptors, bytes, taken: 0 }
    }

    /// Returns a moment that travelled.
    pub(crate) fn instant(&self, moment: Moment) -> Instant {
        moment.on(self.begin)
    }

    /// Takes the next descriptor.
    pub(crate) fn descriptor(&mut self) -> Result<Descriptor, Misfit> {
        self.descriptors.pop().ok_or_else(|| Misfit::new("a descriptor is missing"))
    }

    /// Takes the next `count` raw bytes.
    pub(crate) fn bytes(&mut self, count: usize) -> Result<&[u8], Misfit> {
        let end = self.taken.checked_add(count);
        let bytes = end.and_then(|end| self.bytes.get(self.taken..end));
        self.taken = self.taken.saturating_add(count);
        bytes.ok_or_else(|| Misfit::new("raw bytes are missing"))
    }

    /// Checks that all of it was taken out.
    pub(crate) fn finish(self) -> Result<(), Misfit> {
        if !self.descriptors.is_empty() {
            return Err(Misfit::new("there are more descriptors than the words name"));
        }
        if self.taken != self.bytes.len() {
            return Err(Misfit::new("there are more raw bytes than the words name"));
        }
        Ok(())
    }
}

impl Misfit {
    /// Returns the refusal with this reason.
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Misfit {}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::socket_pair;

    #[test]
    fn a_moment_arrives_on_both_sides_of_the_beginning() {
        let (here, there) = (Instant::now(), Instant::now() + Duration::from_secs(5));
        let earlier = |at: Instant| at.checked_sub(Duration::from_millis(3)).unwrap();
        for (at, expected) in [
            (here, there),
            (here + Duration::from_nanos(7), there + Duration::from_nanos(7)),
            (earlier(here), earlier(there)),
        ] {
            assert_eq!(Moment::of(at, here).on(there), expected);
        }
    }

    #[test]
    fn contents_come_out_in_order_and_none_may_be_left() {
        let now = Instant::now();
        let (one, two) = socket_pair().unwrap();
        let mut outgoing = Outgoing::new(now);
        outgoing.lend(one.as_fd());
        outgoing.lend(two.as_fd());
        assert_eq!((outgoing.append(b"ab"), outgoing.append(b"c")), (2, 1));
        assert_eq!((outgoing.descriptor_count(), outgoing.byte_count()), (2, 3));
        let (lent, bytes) = outgoing.into_parts();
        let copies = || lent.iter().map(|it| it.try_clone_to_owned().unwrap()).collect::<Vec<_>>();
        let mut incoming = Incoming::new(now, copies(), bytes.clone());
        assert_eq!(incoming.bytes(2).unwrap(), b"ab");
        assert_eq!(incoming.bytes(1).unwrap(), b"c");
        incoming.descriptor().unwrap();
        incoming.descriptor().unwrap();
        incoming.finish().unwrap();
        for (descriptors, bytes) in [(Vec::new(), bytes), (copies(), Vec::new())] {
            assert!(Incoming::new(now, descriptors, bytes).finish().is_err());
        }
        let mut empty = Incoming::new(now, Vec::new(), Vec::new());
        assert!(empty.descriptor().is_err() && empty.bytes(1).is_err());
    }
}

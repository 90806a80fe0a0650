//! The state of the upstream as it travels in a hand-over. Its addresses are looked up anew; those known so far go along in
//! case that this fails.

use std::sync::{PoisonError, atomic::Ordering};

use serde::{Deserialize, Serialize};

use super::{NO_ADDRESS, TIMED_OUT, Upstream, breaker::BreakerWords};
use crate::{
    handover::parcel::{Incoming, Outgoing},
    sys::SocketAddress,
};

/// State of the upstream in a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UpstreamWords {
    breaker: BreakerWords,
    last_error: LastError,
    look_ups: [u64; 2],
    #[serde(default)]
    address: String,
    #[serde(default)]
    addresses: Vec<SocketAddress>,
}

/// Error of the last failed attempt, in a hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum LastError {
    TimedOut,
    NoAddress,
    Number(i32),
}

impl UpstreamWords {
    /// Returns true if they tell of an upstream with the address of this one.
    pub(crate) fn is_of(&self, upstream: &Upstream) -> bool {
        self.address == upstream.address.to_string()
    }
}

impl Upstream {
    /// Describes the state of the upstream for a hand-over.
    pub(crate) fn describe(&self, parcel: &Outgoing<'_>) -> UpstreamWords {
        let Self {
            address,
            connect_timeout: _,
            retry_for: _,
            breaker,
            last_error,
            look_ups,
            sources: _,
            delays: _,
            losses: _,
            moves: _,
            addresses,
            changes: _,
            guard: _,
            look_up: _,
        } = self;
        UpstreamWords {
            breaker: breaker.describe(parcel),
            last_error: match last_error.load(Ordering::Relaxed) {
                TIMED_OUT => LastError::TimedOut,
                NO_ADDRESS => LastError::NoAddress,
                number => LastError::Number(number),
            },
            look_ups: look_ups.each_ref().map(|count| count.load(Ordering::Relaxed)),
            address: address.to_string(),
            addresses: addresses.lock().unwrap_or_else(PoisonError::into_inner).list().to_vec(),
        }
    }

    /// Takes over the state of an upstream that was described.
    pub(crate) fn restore(&self, words: &UpstreamWords, parcel: &Incoming) {
        let UpstreamWords { breaker, last_error, look_ups, address, addresses } = words;
        if self.known().list().is_empty() && words.is_of(self) {
            self.publish(addresses.as_slice().into());
        }
        let number = match *last_error {
            LastError::TimedOut => TIMED_OUT,
            LastError::NoAddress => NO_ADDRESS,
            LastError::Number(number) => number,
        };
        self.last_error.store(number, Ordering::Relaxed);
        // The name has been looked up here already.
        for (count, more) in self.look_ups.iter().zip(look_ups) {
            count.fetch_add(*more, Ordering::Relaxed);
        }
        self.breaker.restore(breaker, parcel);
        // An older program does not tell its address.
        if !address.is_empty() && !words.is_of(self) {
            self.breaker.begin_anew();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::upstream::breaker::Cause;

    #[test]
    fn the_last_error_is_handed_over() {
        let [giver, taker] = [(); 2].map(|()| crate::tests::upstream());
        giver.look_ups[0].store(3, Ordering::Relaxed);
        let now = Instant::now();
        for error in [
            io::Error::from_raw_os_error(111),
            io::ErrorKind::TimedOut.into(),
            io::Error::other("no address"),
        ] {
            giver.remember_error(&error);
            giver.breaker.failed(Cause::Away, false, now);
            let words = giver.describe(&Outgoing::new(now));
            let text = serde_json::to_string(&words).unwrap();
            taker.look_ups[0].store(0, Ordering::Relaxed);
            let incoming = Incoming::new(now, Vec::new(), Vec::new());
            taker.restore(&serde_json::from_str(&text).unwrap(), &incoming);
            assert_eq!(taker.error(), giver.error());
            assert_eq!(taker.describe(&Outgoing::new(now)).last_error, words.last_error);
            assert_eq!(taker.look_ups[0].load(Ordering::Relaxed), 3);
        }
    }

    #[test]
    fn an_outage_stays_with_the_address_that_was_away() {
        let [giver, same, other] = [(); 3].map(|()| crate::tests::upstream());
        let now = Instant::now();
        giver.remember_error(&io::Error::from_raw_os_error(111));
        giver.breaker.failed(Cause::Away, false, now);
        let outgoing = Outgoing::new(now);
        let mut words = giver.describe(&outgoing);
        let incoming = Incoming::new(now, Vec::new(), Vec::new());
        same.restore(&words, &incoming);
        assert!(same.breaker.is_away() && same.error().is_some());
        words.address = "tcp://another:1".to_owned();
        other.restore(&words, &incoming);
        assert!(!other.breaker.is_open() && other.error().is_none());
        assert!(other.breaker.changed_at().is_none(), "no client has needed it");
        assert!(other.breaker.take_last_outage().is_none(), "it is not back");
        assert!(other.breaker.time_away() > Duration::ZERO, "the time of all outages never falls");
    }
}

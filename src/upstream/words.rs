//! The state of the upstream as it travels in a hand-over. Its addresses are looked up anew; those known so far go along in
//! case that this fails.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{
    NO_ADDRESS, Present, TIMED_OUT, Upstream, breaker::BreakerWords, switch::known,
    targets::TargetWords,
};
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
    /// The address in the configuration; empty for a program that knows no other.
    #[serde(default)]
    configured: String,
    /// All upstreams that connections lead to.
    #[serde(default)]
    targets: Vec<TargetWords>,
    /// Switches that were done, and that were refused.
    #[serde(default)]
    switches: [u64; 2],
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
        self.address == upstream.target().address().to_string()
    }
}

impl Upstream {
    /// Describes the state of the upstream for a hand-over.
    pub(crate) fn describe(&self, parcel: &Outgoing<'_>) -> UpstreamWords {
        let Self {
            configured,
            connect_timeout: _,
            dials: _,
            retry_for: _,
            breaker,
            last_error,
            look_ups,
            sources: _,
            delays: _,
            losses: _,
            moves: _,
            present: _,
            changes: _,
            targets,
            switches,
            state_file: _,
            switching: _,
            guard: _,
            look_up: _,
        } = self;
        let Present { target, addresses } = self.lock().clone();
        UpstreamWords {
            breaker: breaker.describe(parcel),
            last_error: match last_error.load(Ordering::Relaxed) {
                TIMED_OUT => LastError::TimedOut,
                NO_ADDRESS => LastError::NoAddress,
                number => LastError::Number(number),
            },
            look_ups: look_ups.each_ref().map(|count| count.load(Ordering::Relaxed)),
            address: target.address().to_string(),
            addresses: addresses.list().to_vec(),
            configured: configured.to_string(),
            targets: targets.describe(),
            switches: switches.each_ref().map(|count| count.load(Ordering::Relaxed)),
        }
    }

    /// Takes over the state of an upstream that was described. A switch goes on to hold, unless the configuration names another
    /// upstream than the one that was switched from.
    pub(crate) fn restore(&self, words: &UpstreamWords, parcel: &Incoming) {
        let UpstreamWords {
            breaker,
            last_error,
            look_ups,
            address,
            addresses,
            configured,
            targets,
            switches,
        } = words;
        self.restore_targets(targets, address, configured);
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
        let counts = self.look_ups.iter().zip(look_ups);
        for (count, more) in counts.chain(self.switches.iter().zip(switches)) {
            count.fetch_add(*more, Ordering::Relaxed);
        }
        self.breaker.restore(breaker, parcel);
        // An older program does not tell its address.
        if !address.is_empty() && !words.is_of(self) {
            self.breaker.begin_anew(self.target().probe());
        }
    }

    /// Takes over the upstreams of connections, and the present one. `address` was present, and `was_configured`.
    fn restore_targets(&self, targets: &[TargetWords], address: &str, was_configured: &str) {
        // An older program knows of no switch.
        if targets.is_empty() {
            return;
        }
        let is_edited = was_configured != self.configured.to_string();
        // Else the configuration has followed the switch, or there was none.
        if is_edited && address != was_configured && address != self.configured.to_string() {
            log::warn!(
                "the upstream is {}, as configured: {address}, which was switched to, was so when {was_configured} was configured",
                self.configured
            );
        }
        let present = if is_edited { None } else { address.parse().ok() };
        let present = present.unwrap_or_else(|| self.configured.clone());
        let found =
            if present == self.configured { self.known().list().into() } else { known(&present) };
        self.targets.restore(targets);
        let target = self.targets.find(&present);
        let target = target.unwrap_or_else(|| self.targets.add_beyond(present));
        self.switch_to(&target, found);
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
        words.configured.clone_from(&words.address);
        other.restore(&words, &incoming);
        assert!(!other.breaker.is_open() && other.error().is_none());
        assert!(other.breaker.changed_at().is_none(), "no client has needed it");
        assert!(other.breaker.take_last_outage().is_none(), "it is not back");
        assert!(other.breaker.time_away() > Duration::ZERO, "the time of all outages never falls");
    }
}

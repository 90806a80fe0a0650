//! Counters of a worker as they travel in a hand-over: all that counts up. Present numbers and ages do not travel, as
//! each worker counts them anew from its connections.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    Count, Counters, Waits,
    cause::{CloseCause, ConnectResult},
    histogram::HistogramWords,
};

/// Counters of a worker in a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct CountersWords {
    accepted: u64,
    closed: BTreeMap<CloseCause, u64>,
    rejected: u64,
    drained: u64,
    panics: u64,
    bytes_to_upstream: u64,
    bytes_to_client: u64,
    spliced_to_upstream: u64,
    spliced_to_client: u64,
    dials: BTreeMap<ConnectResult, u64>,
    accept_errors: [u64; 3],
    busy_nanos: u64,
    hold: WaitsWords,
    outage: WaitsWords,
    connect: HistogramWords,
    life: HistogramWords,
}

/// Waits of clients in a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
struct WaitsWords {
    served: HistogramWords,
    left: HistogramWords,
    refused: HistogramWords,
}

impl Counters {
    /// Describes the counters for a hand-over.
    pub(crate) fn describe(&self) -> CountersWords {
        let Self {
            version: _,
            accepted,
            closed,
            held: _,
            connecting: _,
            active: _,
            rejecting: _,
            awaiting_upstream: _,
            oldest_held: _,
            oldest_connecting: _,
            oldest: _,
            rejected,
            drained,
            panics,
            bytes_to_upstream,
            bytes_to_client,
            spliced_to_upstream,
            spliced_to_client,
            dials,
            accept_errors,
            busy_nanos,
            pipes: _,
            hold,
            outage,
            connect,
            life,
            #[cfg(test)]
                panic_at: _,
        } = self;
        CountersWords {
            accepted: accepted.get(),
            closed: by_word(CloseCause::ALL, closed),
            rejected: rejected.get(),
            drained: drained.get(),
            panics: panics.get(),
            bytes_to_upstream: bytes_to_upstream.get(),
            bytes_to_client: bytes_to_client.get(),
            spliced_to_upstream: spliced_to_upstream.get(),
            spliced_to_client: spliced_to_client.get(),
            dials: by_word(ConnectResult::ALL, dials),
            accept_errors: accept_errors.each_ref().map(Count::get),
            busy_nanos: busy_nanos.get(),
            hold: hold.describe(),
            outage: outage.describe(),
            connect: connect.describe(),
            life: life.describe(),
        }
    }

    /// Adds the counters of a worker of the process before. The accepted clients that have not ended come to the workers
    /// of this one, so the balance is even once these have published them. Only the one writer may call it.
    pub(crate) fn adopt(&self, words: &CountersWords) {
        let CountersWords {
            accepted,
            closed,
            rejected,
            drained,
            panics,
            bytes_to_upstream,
            bytes_to_client,
            spliced_to_upstream,
            spliced_to_client,
            dials,
            accept_errors,
            busy_nanos,
            hold,
            outage,
            connect,
            life,
        } = words;
        self.change(|| {
            self.accepted.add(*accepted);
            for (&cause, &more) in closed {
                self.closed.get(cause as usize).into_iter().for_each(|it| it.add(more));
            }
        });
        for (count, more) in [
            (&self.rejected, rejected),
            (&self.drained, drained),
            (&self.panics, panics),
            (&self.bytes_to_upstream, bytes_to_upstream),
            (&self.bytes_to_client, bytes_to_client),
            (&self.spliced_to_upstream, spliced_to_upstream),
            (&self.spliced_to_client, spliced_to_client),
            (&self.busy_nanos, busy_nanos),
        ] {
            count.add(*more);
        }
        for (&result, &more) in dials {
            self.dials.get(result as usize).into_iter().for_each(|it| it.add(more));
        }
        for (count, more) in self.accept_errors.iter().zip(accept_errors) {
            count.add(*more);
        }
        self.hold.adopt(hold);
        self.outage.adopt(outage);
        self.connect.adopt(connect);
        self.life.adopt(life);
    }
}

impl Waits {
    fn describe(&self) -> WaitsWords {
        let Self { served, left, refused } = self;
        WaitsWords { served: served.describe(), left: left.describe(), refused: refused.describe() }
    }

    fn adopt(&self, words: &WaitsWords) {
        let WaitsWords { served, left, refused } = words;
        self.served.adopt(served);
        self.left.adopt(left);
        self.refused.adopt(refused);
    }
}

/// Lists counts by their words. Zeros are left out, so that an older process may read what it has no word for.
fn by_word<K: Ord, const N: usize>(words: [K; N], counts: &[Count; N]) -> BTreeMap<K, u64> {
    words.into_iter().zip(counts.iter().map(Count::get)).filter(|(_, count)| *count > 0).collect()
}

#[cfg(test)]
mod tests {
    use std::{io, time::Duration};

    use super::*;

    /// Returns counters in which every count differs from zero and, as far as it matters, from the others.
    fn counters() -> Counters {
        let counters = Counters::default();
        let millis = |count: u64| Duration::from_millis(count);
        for (count, cause) in (1..).zip(CloseCause::ALL) {
            for _client in 0..=count {
                counters.accept();
                counters.close(cause, || counters.held.set(counters.held.get() - 1));
            }
            counters.life.observe(millis(count));
            counters.hold.end(cause, millis(count * 7));
            counters.outage.end(cause, millis(count * 11));
        }
        for result in ConnectResult::ALL {
            counters.dialled(result);
            counters.connect.observe(millis(result as u64));
        }
        counters.hold.served.observe(Duration::from_secs(1_000));
        counters.outage.served.observe(Duration::from_secs(20));
        for (number, count) in (100..).zip([
            &counters.rejected,
            &counters.drained,
            &counters.panics,
            &counters.bytes_to_upstream,
            &counters.bytes_to_client,
            &counters.spliced_to_upstream,
            &counters.spliced_to_client,
            &counters.busy_nanos,
        ]) {
            count.set(number);
        }
        for error in [rustix::io::Errno::MFILE, rustix::io::Errno::NOMEM, rustix::io::Errno::IO] {
            counters.accept_failed(&io::Error::from(error));
        }
        counters
    }

    fn over_json(words: &CountersWords) -> CountersWords {
        serde_json::from_str(&serde_json::to_string(words).unwrap()).unwrap()
    }

    #[test]
    fn counters_are_handed_over_and_add_up() {
        let words = counters().describe();
        let text = serde_json::to_value(&words).unwrap();
        let is_zero = |value: &serde_json::Value| *value == 0 || value.to_string().len() < 3;
        let object = text.as_object().unwrap();
        let zeros: Vec<_> = object.iter().filter(|(_, value)| is_zero(value)).collect();
        assert!(zeros.is_empty(), "not tried: {zeros:?}");
        let taker = Counters::default();
        taker.adopt(&over_json(&words));
        assert_eq!(taker.describe(), words);
        assert_eq!(taker.balance(), counters().balance());
        taker.adopt(&words);
        let doubled = taker.describe();
        assert_eq!((doubled.accepted, doubled.rejected), (2 * words.accepted, 200));
        assert_eq!(doubled.closed[&CloseCause::Panic], 2 * words.closed[&CloseCause::Panic]);
    }

    #[test]
    fn the_balance_is_even_once_present_clients_are_published() {
        let giver = counters();
        giver.accept();
        giver.accept();
        let taker = Counters::default();
        taker.adopt(&giver.describe());
        taker.change(|| taker.active.set(2));
        let balance = taker.balance();
        assert_eq!(balance.accepted, balance.closed.iter().sum::<u64>() + balance.active);
        assert_eq!((balance.held, taker.clients()), (0, 2));
    }

    #[test]
    fn words_are_those_of_the_log() {
        for cause in CloseCause::ALL {
            assert_eq!(serde_json::to_value(cause).unwrap(), cause.word());
        }
        for result in ConnectResult::ALL {
            assert_eq!(serde_json::to_value(result).unwrap(), result.word());
        }
        serde_json::from_str::<CountersWords>(r#"{"closed": {"by-magic": 1}}"#).unwrap_err();
        let empty = serde_json::from_str::<CountersWords>("{}").unwrap();
        assert_eq!(empty, Counters::default().describe());
    }
}

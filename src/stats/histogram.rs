//! Histogram of durations with one writer.

use std::{collections::BTreeMap, marker::PhantomData, time::Duration};

use serde::{Deserialize, Serialize};

use super::Count;

/// Room for the buckets of any histogram.
const BUCKETS_MAX: usize = 16;

/// Upper bounds of a histogram's buckets but the last, ascending, in microseconds.
pub(crate) trait Bounds {
    const MICROS: &'static [u64];
}

/// Bounds for waits of clients, from 10 ms to 5 min.
#[derive(Debug)]
pub(crate) struct WaitBounds;

impl Bounds for WaitBounds {
    const MICROS: &'static [u64] = &[
        10_000,
        50_000,
        100_000,
        250_000,
        500_000,
        1_000_000,
        2_500_000,
        5_000_000,
        10_000_000,
        30_000_000,
        60_000_000,
        120_000_000,
        300_000_000,
    ];
}

/// Bounds for attempts to connect, from 100 µs to 5 s.
#[derive(Debug)]
pub(crate) struct ConnectBounds;

impl Bounds for ConnectBounds {
    const MICROS: &'static [u64] = &[
        100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
        1_000_000, 2_500_000, 5_000_000,
    ];
}

/// Bounds for whole connections, from 10 ms to a day.
#[derive(Debug)]
pub(crate) struct LifeBounds;

impl Bounds for LifeBounds {
    const MICROS: &'static [u64] = &[
        10_000,
        100_000,
        1_000_000,
        10_000_000,
        60_000_000,
        600_000_000,
        3_600_000_000,
        86_400_000_000,
    ];
}

/// Histogram of durations: a count for each bucket, and the sum.
#[derive(Debug)]
pub(crate) struct Histogram<B> {
    counts: [Count; BUCKETS_MAX],
    /// Sum in microseconds. In nanoseconds, the lives of 9,000 connections would overflow it in 24 days.
    sum: Count,
    bounds: PhantomData<B>,
}

/// Numbers of a histogram in a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct HistogramWords {
    /// Durations by the bound of their bucket in microseconds, without empty buckets.
    counts: BTreeMap<u64, u64>,
    sum: u64,
}

/// Numbers of histograms with the same bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HistogramSnapshot {
    /// Bounds in microseconds.
    pub(crate) bounds: &'static [u64],
    /// Number of durations up to each bound.
    pub(crate) cumulative: Vec<u64>,
    /// Number of all durations.
    pub(crate) count: u64,
    /// Sum of all durations in microseconds.
    pub(crate) sum: u64,
}

impl<B: Bounds> Histogram<B> {
    /// Counts a duration. Only the one writer may call it.
    pub(crate) fn observe(&self, duration: Duration) {
        let micros = micros(duration);
        self.count(micros, 1);
        self.sum.add(micros);
    }

    fn count(&self, micros: u64, more: u64) {
        let bucket = B::MICROS.partition_point(|&bound| bound < micros);
        if let Some(count) = self.counts.get(bucket) {
            count.add(more);
        }
    }

    /// Describes the histogram for a hand-over.
    pub(super) fn describe(&self) -> HistogramWords {
        let Self { counts, sum, bounds: PhantomData } = self;
        let bounds = B::MICROS.iter().copied().chain([u64::MAX]);
        let counts = bounds.zip(counts.iter().map(Count::get));
        HistogramWords { counts: counts.filter(|(_, count)| *count > 0).collect(), sum: sum.get() }
    }

    /// Adds the numbers of a histogram that was described, perhaps with other bounds. Only the one writer may call it.
    pub(super) fn adopt(&self, words: &HistogramWords) {
        let HistogramWords { counts, sum } = words;
        for (&bound, &more) in counts {
            self.count(bound, more);
        }
        self.sum.add(*sum);
    }

    /// Returns the sum of `histograms`.
    pub(crate) fn sum<'a>(histograms: impl Iterator<Item = &'a Self>) -> HistogramSnapshot
    where
        B: 'a,
    {
        let mut total = [0; BUCKETS_MAX];
        let mut sum = 0_u64;
        for histogram in histograms {
            sum = sum.wrapping_add(histogram.sum.get());
            for (total, count) in total.iter_mut().zip(&histogram.counts) {
                *total += count.get();
            }
        }
        let mut count = 0;
        let cumulative = total.map(|bucket| {
            count += bucket;
            count
        });
        let cumulative = cumulative.into_iter().take(B::MICROS.len()).collect();
        HistogramSnapshot { bounds: B::MICROS, cumulative, count, sum }
    }
}

impl<B> Default for Histogram<B> {
    fn default() -> Self {
        Self { counts: Default::default(), sum: Count::default(), bounds: PhantomData }
    }
}

/// Returns a duration in microseconds.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_counts_in_each_bucket_from_its_bound_on() {
        let histogram = Histogram::<LifeBounds>::default();
        for micros in [0, 10_000, 10_001, 86_400_000_000, 86_400_000_001] {
            histogram.observe(Duration::from_micros(micros));
        }
        let total = Histogram::sum([&histogram, &histogram].into_iter());
        assert_eq!((total.cumulative.as_slice(), total.count), (&[4, 6, 6, 6, 6, 6, 6, 8][..], 10));
        assert_eq!(total.sum, 2 * 172_800_020_002);
    }

    #[test]
    fn bounds_ascend_and_leave_room_for_what_is_above() {
        for bounds in [WaitBounds::MICROS, ConnectBounds::MICROS, LifeBounds::MICROS] {
            assert!(bounds.is_sorted() && bounds.len() < BUCKETS_MAX, "{bounds:?}");
        }
    }
}

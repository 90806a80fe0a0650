//! Selections of connections for an operator: pages of the list, kills, and the oldest ones of a pause that is not idle in time.
//!
//! A selection walks over the table a few slots in a turn, so that no connection waits for it.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use crossbeam_channel::Sender;

use super::{Worker, timers::Key};
use crate::{
    connection::deadline::{DIALLED, RELAYED},
    listing::{ConnectionId, Entry, Purpose, Selected, Selection},
    worker_pool::LISTED_MAX,
};

/// Slots of the table that a selection looks at in a turn, at most.
const TURN_SLOTS_MAX: Key = 256;

/// Walk of a selection over the table of connections.
#[derive(Debug)]
pub(super) struct Walk {
    selection: Arc<Selection>,
    reply: Sender<Selected>,
    /// Key to be looked at next.
    next: Key,
    total: u64,
    behind: u64,
    /// First chosen connections behind the id at which the page begins.
    first: BTreeMap<ConnectionId, Entry>,
}

impl Walk {
    pub(super) fn new(selection: Arc<Selection>, reply: Sender<Selected>) -> Self {
        Self { selection, reply, next: 0, total: 0, behind: 0, first: BTreeMap::new() }
    }

    /// Tells the result.
    fn finish(self) {
        let entries = self.first.into_values().collect();
        let selected = Selected { total: self.total, behind: self.behind, entries };
        // The caller may have waited too long already.
        self.reply.try_send(selected).ok();
    }
}

impl Worker<'_> {
    /// Returns the oldest connections with a pass. In each list the oldest come first, or nearly so.
    pub(super) fn oldest_served(&self, now: Instant) -> Vec<Entry> {
        let lists = DIALLED.iter().chain(&RELAYED);
        let keys = lists.flat_map(|&deadline| self.timers.keys(deadline).take(LISTED_MAX));
        keys.filter_map(|key| self.connections.get(key))
            .map(|connection| connection.entry(now))
            .collect()
    }

    /// Goes on with the selection that is under way, and then with the kills that are due.
    pub(super) fn select(&mut self, now: Instant) {
        let walk = self.walk.take().filter(|walk| now < walk.selection.until);
        let walk = walk.map(|mut walk| {
            self.look_at_slots(&mut walk, now);
            walk
        });
        // Before the result: a caller that lists next does not find a few that were to be killed.
        self.kill_due(now);
        match walk {
            Some(walk) if walk.next >= self.connections.end() => walk.finish(),
            unfinished => self.walk = unfinished,
        }
    }

    fn look_at_slots(&mut self, walk: &mut Walk, now: Instant) {
        let Walk { selection, next, total, behind, first, .. } = walk;
        let end = next.saturating_add(TURN_SLOTS_MAX).min(self.connections.end());
        for key in *next..end {
            let Some(connection) = self.connections.get(key) else { continue };
            if !connection.is_chosen_by(&selection.filter, now) {
                continue;
            }
            let id = connection.id();
            match selection.purpose {
                Purpose::Kill { how, spread } => {
                    let workers = self.resources.shared.workers.len() as u64;
                    let nth = *total * workers + self.resources.index as u64;
                    let at = selection.begun + spread.mul_f64(place(nth));
                    self.doomed.add(key, id, how, at);
                }
                Purpose::List { after, limit } if after.is_none_or(|after| after < id) => {
                    *behind += 1;
                    let is_early = first.last_key_value().is_none_or(|(last, _)| id < *last);
                    if first.len() < limit || is_early {
                        first.insert(id, connection.entry(now));
                    }
                    if first.len() > limit {
                        first.pop_last();
                    }
                }
                Purpose::List { .. } => {}
            }
            *total += 1;
        }
        *next = end;
    }
}

/// Returns the place of the `nth` of any number of kills in their time, from 0 to 1. Multiples of the golden ratio spread
/// evenly, however many there are: their number is not known before the last is found.
fn place(nth: u64) -> f64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let [.., a, b, c, d] = nth.wrapping_mul(GOLDEN).to_le_bytes();
    f64::from(u32::from_le_bytes([a, b, c, d])) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_spread_evenly() {
        for count in [1, 2, 3, 10, 1_000] {
            let mut places: Vec<f64> = (0..count).map(place).collect();
            assert!(places[0] < 1e-9, "the first is due at once");
            places.sort_by(f64::total_cmp);
            let gaps = places
                .windows(2)
                .map(|pair| pair[1] - pair[0])
                .chain([1.0 - places[places.len() - 1]]);
            let longest = gaps.fold(0.0, f64::max);
            #[expect(clippy::cast_precision_loss, reason = "small numbers")]
            let even = 1.0 / count as f64;
            assert!(longest <= 2.0 * even, "{count}: {longest}");
        }
    }
}

//! Counts the steered connections in the kernel's table, and tells when to look again.

use std::{collections::HashSet, net::IpAddr, time::Duration};

use crate::sys::tcp_table::{Row, SURE_BELOW, State};

/// Least time between two dumps.
const LEAST_REST: Duration = Duration::from_millis(10);
/// Rest after a dump, as a multiple of its time: so all dumps cost a tenth of a core at most.
const REST_PER_DUMP: u32 = 10;
/// Repeats of a SYN-ACK, after 3 s, behind which its handshake is given up: the client has gone, or the server's queue is full.
const REPEATS_MAX: u8 = 2;

/// The memory of a count from one dump to the next.
#[derive(Debug)]
pub(super) struct Counter {
    /// The proxy's own addresses. Another service may use the same port at others.
    local: Vec<IpAddr>,
    /// Cookies of the handshakes that counted in the last dump.
    handshakes: HashSet<u64>,
    /// Set while the last dump has shown no steered connection.
    was_none: bool,
    /// Cookies of tcpause's own connections that were there before a mark could be.
    spared: HashSet<u64>,
}

impl Counter {
    /// Makes one for the addresses that the proxy listens on.
    pub(super) fn new(local: impl IntoIterator<Item = IpAddr>) -> Self {
        let local = local.into_iter().map(|ip| ip.to_canonical()).collect();
        Self { local, handshakes: HashSet::new(), was_none: false, spared: HashSet::new() }
    }

    /// Counts none of those that are tcpause's own by their inodes. Those in the queue of a listener have none yet: they are
    /// its own unless the dump shows connections that an earlier process has steered.
    pub(super) fn spare(&mut self, rows: &[Row], own: &HashSet<u32>) {
        let unmarked = || rows.iter().filter(|row| !row.is_marked && row.state != State::SynRecv);
        let has_steered = unmarked().any(|row| {
            row.inode != 0 && !own.contains(&row.inode) && self.is_ours(row.local().ip())
        });
        let is_own = |row: &&Row| own.contains(&row.inode) || row.inode == 0 && !has_steered;
        self.spared = unmarked().filter(is_own).map(Row::cookie).collect();
    }

    /// Has the next count be the first one behind a stop: no earlier one may stand for it.
    pub(super) fn begin_anew(&mut self) {
        self.was_none = false;
    }

    /// Returns the handshakes that are given up by now. A client whose ACK was lost, or a server whose queue is full, could
    /// still complete them, so they have to go.
    pub(super) fn given_up(&self, rows: &[Row]) -> Vec<Row> {
        let is_given_up = |row: &&Row| {
            row.state == State::SynRecv
                && row.inode == 0
                && row.repeats >= REPEATS_MAX
                && self.handshakes.contains(&row.cookie())
        };
        rows.iter().filter(is_given_up).cloned().collect()
    }

    /// Returns the steered connections among those of a dump that follows a count. A handshake that has begun since is
    /// not among them: it may be a held client's.
    pub(super) fn steered(&self, rows: Vec<Row>) -> impl Iterator<Item = Row> {
        rows.into_iter().filter(|row| self.is_steered(row))
    }

    fn is_steered(&self, row: &Row) -> bool {
        let is_own = row.is_marked || self.spared.contains(&row.cookie());
        let is_in_use = match row.state {
            State::Established | State::CloseWait => true,
            // By TCP Fast Open, the server may have accepted it before the handshake ends.
            State::SynRecv if row.inode == 0 => {
                row.repeats < REPEATS_MAX && self.handshakes.contains(&row.cookie())
            }
            // The server owes nothing to a client that it has closed.
            _ => row.inode != 0,
        };
        is_in_use && !is_own && self.is_ours(row.local().ip())
    }

    /// Counts the steered connections of a dump while SYNs are steered, and of the first one behind the barrier. Every
    /// handshake may be the server's, so all count.
    pub(super) fn count_all(&mut self, rows: &[Row]) -> u64 {
        let handshakes = rows.iter().filter(|row| row.state == State::SynRecv);
        self.handshakes.extend(handshakes.map(Row::cookie));
        self.count_known(rows)
    }

    /// Counts the steered connections of a later dump. A handshake that has begun since the one before is not the server's.
    pub(super) fn count_known(&mut self, rows: &[Row]) -> u64 {
        let (mut handshakes, mut count) = (HashSet::new(), 0);
        for row in rows.iter().filter(|row| self.is_steered(row)) {
            let is_handshake = row.state == State::SynRecv && row.inode == 0;
            // A row may come twice.
            count += u64::from(!is_handshake || handshakes.insert(row.cookie()));
        }
        self.handshakes = handshakes;
        let is_sure = rows.len() < SURE_BELOW || self.was_none;
        self.was_none = count == 0;
        // One dump may lack a row, two in turn hardly the same one.
        count.max(u64::from(!is_sure))
    }

    fn is_ours(&self, local: IpAddr) -> bool {
        self.local.iter().any(|own| match own {
            IpAddr::V6(own) if own.is_unspecified() => true,
            IpAddr::V4(own) if own.is_unspecified() => local.is_ipv4(),
            own => *own == local,
        })
    }
}

/// Returns the time to rest after a dump that took `dump`.
pub(super) fn rest_after(dump: Duration) -> Duration {
    dump.saturating_mul(REST_PER_DUMP).max(LEAST_REST)
}

#[cfg(test)]
mod tests;

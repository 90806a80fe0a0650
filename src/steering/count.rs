//! Counts the steered connections in the kernel's table, and tells when to look again.

use std::{collections::HashSet, net::IpAddr, time::Duration};

use crate::sys::tcp_table::{Row, SURE_BELOW, State};

/// Least time between two dumps.
const LEAST_REST: Duration = Duration::from_millis(10);
/// Rest after a dump, as a multiple of its time: so all dumps cost a tenth of a core at most.
const REST_PER_DUMP: u32 = 10;
/// Repeats of a SYN-ACK, after 3 s, behind which its handshake is given up: the client is gone, or would have answered.
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
    /// Inodes of tcpause's own connections that were there before a mark could be.
    spared: HashSet<u32>,
}

impl Counter {
    /// Makes one for the addresses that the proxy listens on.
    pub(super) fn new(local: impl IntoIterator<Item = IpAddr>) -> Self {
        let local = local.into_iter().map(|ip| ip.to_canonical()).collect();
        Self { local, handshakes: HashSet::new(), was_none: false, spared: HashSet::new() }
    }

    /// Counts no connection with one of these inodes.
    pub(super) fn spare(&mut self, inodes: HashSet<u32>) {
        self.spared = inodes;
    }

    /// Returns the steered connections among those of a dump.
    pub(super) fn steered(&self, rows: Vec<Row>) -> impl Iterator<Item = Row> {
        rows.into_iter().filter(|row| self.is_steered(row))
    }

    fn is_steered(&self, row: &Row) -> bool {
        !row.is_marked && !self.spared.contains(&row.inode) && self.is_ours(row.local().ip())
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
            let counts = match row.state {
                State::Established | State::CloseWait => true,
                // By TCP Fast Open, the server may have accepted it before the handshake ends.
                State::SynRecv if row.inode == 0 => {
                    let counts =
                        row.repeats < REPEATS_MAX && self.handshakes.contains(&row.cookie());
                    counts && handshakes.insert(row.cookie())
                }
                // The server owes nothing to a client that it has closed.
                _ => row.inode != 0,
            };
            count += u64::from(counts);
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
mod tests {
    use super::*;

    fn row(state: State, inode: u32, number: u8) -> Row {
        let mut id = [0; 48];
        id[4..8].copy_from_slice(&[10, 0, 0, 1]);
        id[47] = number;
        Row { id, is_ipv6: false, state, repeats: 0, inode, is_marked: false }
    }

    fn counter() -> Counter {
        Counter::new(["0.0.0.0".parse().unwrap()])
    }

    #[test]
    fn a_connection_counts_until_the_server_has_closed_it() {
        use State::*;
        for state in [Established, CloseWait] {
            // One that waits to be accepted has no inode.
            assert_eq!(counter().count_known(&[row(state, 0, 1), row(state, 7, 2)]), 2);
        }
        for state in [FinWait1, FinWait2, LastAck, Closing] {
            assert_eq!(counter().count_known(&[row(state, 0, 1)]), 0, "{state:?}");
            assert_eq!(counter().count_known(&[row(state, 7, 1)]), 1, "{state:?}");
        }
    }

    #[test]
    fn the_proxys_own_do_not_count() {
        let marked = Row { is_marked: true, ..row(State::Established, 7, 1) };
        let half = Row { state: State::SynRecv, ..marked.clone() };
        assert_eq!(counter().count_all(&[marked, half]), 0);
    }

    #[test]
    fn a_service_at_another_address_of_the_port_does_not_count() {
        let at = |own: &str| {
            let mut counter = Counter::new([own.parse().unwrap()]);
            counter.count_all(&[row(State::Established, 7, 1)])
        };
        assert_eq!(["10.0.0.1", "0.0.0.0", "::", "::ffff:10.0.0.1"].map(at), [1; 4]);
        assert_eq!(["10.0.0.2", "127.0.0.1", "::1"].map(at), [0; 3]);
        let mut ipv6 = Row { is_ipv6: true, ..row(State::Established, 7, 1) };
        ipv6.id[4..20].copy_from_slice(&std::net::Ipv6Addr::LOCALHOST.octets());
        for (own, count) in [("::1", 1), ("::", 1), ("0.0.0.0", 0), ("::2", 0)] {
            let mut counter = Counter::new([own.parse().unwrap()]);
            assert_eq!(counter.count_known(std::slice::from_ref(&ipv6)), count, "{own}");
        }
    }

    #[test]
    fn only_handshakes_of_before_the_barrier_count_and_not_for_ever() {
        let half = |number, repeats| Row { repeats, ..row(State::SynRecv, 0, number) };
        let mut counter = counter();
        assert_eq!(counter.count_all(&[half(1, 0), half(2, 1), half(3, 2)]), 2);
        assert_eq!(counter.count_known(&[half(1, 1), half(2, 1), half(3, 2), half(4, 0)]), 2);
        // One completes, and one is repeated a second time.
        assert_eq!(counter.count_known(&[row(State::Established, 0, 1), half(2, 2)]), 1);
        // A client that begins anew meets the proxy.
        assert_eq!(counter.count_known(&[half(1, 0), half(2, 0)]), 0);
    }

    #[test]
    fn an_accepted_fast_open_counts_at_any_time() {
        let repeats = REPEATS_MAX;
        let early = Row { repeats, ..row(State::SynRecv, 7, 1) };
        assert_eq!(counter().count_known(&[early]), 1);
    }

    #[test]
    fn a_row_that_comes_twice_is_one_handshake() {
        let half = row(State::SynRecv, 0, 1);
        assert_eq!(counter().count_all(&[half.clone(), half]), 1);
    }

    #[test]
    fn none_of_a_long_list_is_believed_the_second_time() {
        let mut held = vec![row(State::Established, 7, 1); SURE_BELOW];
        for row in &mut held {
            row.is_marked = true;
        }
        let mut counter = counter();
        assert_eq!([&held[1..], &held, &held].map(|rows| counter.count_known(rows)), [0; 3]);
        held[3].is_marked = false;
        assert_eq!(counter.count_known(&held), 1);
        held[3].is_marked = true;
        assert_eq!([&held, &held].map(|rows| counter.count_known(rows)), [1, 0]);
        held[3].is_marked = false;
        assert_eq!(counter.count_known(&held), 1);
        held[3].is_marked = true;
        assert_eq!(counter.count_known(&held[1..]), 0, "short, and so complete");
    }

    #[test]
    fn dumps_cost_a_tenth_of_the_time_at_most() {
        let milliseconds = |dump| rest_after(Duration::from_millis(dump)).as_millis();
        assert_eq!([0, 1, 5, 26].map(milliseconds), [10, 10, 50, 260]);
        assert_eq!(rest_after(Duration::MAX), Duration::MAX);
    }
}

//! The judgement of a snapshot: the command may run, or these hosts are waited for.

use std::time::Duration;

use super::{Coordinator, Margins, WaitingFor};
use crate::fleet::{
    clock::BootTime,
    keys::{MemberRecord, OnDisconnect, State},
    snapshot::{Host, Snapshot},
};

impl Margins {
    /// Returns the time from the first look at a member without a session until it is quiet for sure: (T + G)(1 + 2ρ) + slack.
    ///
    /// The member admits nobody from s + T by its clock, and has reset all by s + T + G + δ; s is the sending of the last
    /// read that found its own state. The first look was answered at c, without that state. A later read finds one only
    /// behind another join, which puts the member's record anew, and so begins the count anew. Thus s ≤ c in real time. A
    /// join behind the last look reads the pause, and is fenced behind it. By clocks that differ from time by ρ each, T + G
    /// of the member end within (T + G)(1 + ρ) / (1 − ρ) of the coordinator's: 2ρ is short by 2ρ², which the slack covers
    /// beside δ. No clock of etcd takes part, nor the wall clock.
    fn quiet_after(self, member: &MemberRecord) -> Duration {
        let time = member.fence + member.grace;
        time + time * 2 * self.rate / 1_000_000 + self.slack
    }
}

impl Coordinator {
    /// Returns the hosts that are not idle, by one snapshot that was asked for at `sent`.
    pub(super) fn judge(&self, snapshot: &Snapshot, sent: BootTime) -> Vec<WaitingFor> {
        let own = &self.config.host;
        let mut found: Vec<_> = snapshot
            .hosts
            .iter()
            .filter(|(name, _)| !self.without.contains(*name))
            .filter_map(|(name, host)| {
                let why = self.why_not(name, host, sent)?;
                Some(WaitingFor { host: name.clone(), why })
            })
            .collect();
        // An empty fleet is a wrong name, and no fleet that is idle.
        if !snapshot.hosts.contains_key(own) && !self.without.contains(own) {
            found.push(WaitingFor { host: own.clone(), why: "has not joined".to_owned() });
        }
        found
    }

    /// Returns why the command may not run as far as a host is concerned.
    fn why_not(&self, name: &str, host: &Host, sent: BootTime) -> Option<String> {
        let Some(seen) = &host.state else {
            let since = self.lost_since.get(name).map_or(sent, |&(_, since)| since);
            let is_quiet = self.quiet_at(host, since).is_some_and(|at| sent >= at);
            return (!is_quiet).then(|| format!("lost for {} s", (sent - since).as_secs()));
        };
        let Some(state) = &seen.value else { return Some("has not answered".to_owned()) };
        let id = &self.config.id;
        if state.forced.contains(id) {
            return Some("was resumed by an operator".to_owned());
        }
        if state.acks.get(&self.name) != Some(id) {
            return Some("has not answered".to_owned());
        }
        (!state.idle).then(|| carries(state))
    }

    /// Returns the time from which on a host that has had no session `since` counts as quiet. All looks are behind the
    /// commit.
    fn quiet_at(&self, host: &Host, since: BootTime) -> Option<BootTime> {
        let member = host.record().filter(|it| it.on_disconnect == OnDisconnect::Hold)?;
        Some(since + self.config.margins.quiet_after(member))
    }

    /// Notes the hosts that an operator has resumed since the command may run.
    pub(super) fn note_forced(&mut self, snapshot: &Snapshot) {
        for (name, host) in &snapshot.hosts {
            let state = host.state.as_ref().and_then(|seen| seen.value.as_ref());
            let is_forced = state.is_some_and(|state| state.forced.contains(&self.config.id));
            if is_forced && !self.without.contains(name) && !self.forced.contains(name) {
                self.forced.push(name.clone());
            }
        }
    }

    /// Returns the hosts that have acknowledged.
    pub(super) fn acknowledgers(&self, snapshot: &Snapshot) -> Vec<String> {
        let has_acknowledged = |host: &Host| {
            let state = host.state.as_ref().and_then(|seen| seen.value.as_ref());
            state.is_some_and(|state| state.acks.get(&self.name) == Some(&self.config.id))
        };
        let hosts = snapshot.hosts.iter().filter(|(_, host)| has_acknowledged(host));
        hosts.map(|(name, _)| name.clone()).collect()
    }
}

fn carries(state: &State) -> String {
    let count = state.active + state.connecting;
    match state.oldest {
        Some(oldest) => format!("carries {count}, the oldest for {oldest} s"),
        None => format!("carries {count}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// δ: the time of a worker's turn, and of the barrier.
    const TURN: Duration = Duration::from_secs(1);

    #[test]
    fn a_lost_host_is_quiet_before_it_counts_as_quiet() {
        let margins = Margins::default();
        let rho = f64::from(margins.rate) / 1e6;
        for seconds in [0, 1, 5, 15, 600, 24 * 3600] {
            for grace in [0, 5, 3600] {
                let (fence, grace) = (Duration::from_secs(seconds), Duration::from_secs(grace));
                let member = MemberRecord {
                    identity: String::new(),
                    boot: String::new(),
                    on_disconnect: OnDisconnect::Hold,
                    fence,
                    grace,
                    version: String::new(),
                };
                // The clock of the member is slow, that of the coordinator is fast.
                let real = (fence + grace).as_secs_f64() / (1.0 - rho) + TURN.as_secs_f64();
                let counted = margins.quiet_after(&member).as_secs_f64();
                assert!(counted >= real * (1.0 + rho), "{fence:?} and {grace:?}: {counted}");
            }
        }
    }
}

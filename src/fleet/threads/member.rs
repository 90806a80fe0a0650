//! The thread of a member: it asks the store, carries out what the machine orders, and sleeps until the next is due. It has a
//! client of the store of its own, as what it is late with lets clients in.

use std::{
    mem::{Discriminant, discriminant},
    sync::Arc,
    time::Duration,
};

use crossbeam_channel::Receiver;
use log::{info, warn};

use super::{Alarm, Bell, Identity, now};
use crate::fleet::{
    clock::BootTime,
    desk::{Desk, Standing},
    facade::Refusal,
    member::{Member, Trouble},
    proxy::Proxy,
    step::Step,
    store::{Store, StoreError},
    warn_of_stranded, words,
};

/// Begin of the sentence about a store that is not the one of before.
const RESTORED: &str = "etcd is another one than before, or was restored from a backup";

/// Thread that drives the member of one host.
pub(in crate::fleet) struct MemberThread<S> {
    pub(in crate::fleet) identity: Identity,
    pub(in crate::fleet) store: S,
    pub(in crate::fleet) proxy: Proxy,
    pub(in crate::fleet) member: Member,
    pub(in crate::fleet) bell: Arc<Bell>,
    pub(in crate::fleet) desk: Arc<Desk>,
    /// Age of the last contact from which on it counts as lost.
    pub(in crate::fleet) late_after: Duration,
    pub(in crate::fleet) logged: Logged,
}

/// State of the contact with the store, as it was logged.
#[derive(Debug, Default)]
pub(in crate::fleet) struct Logged {
    contact: Contact,
    /// Reasons of the present loss that were told, by their kind; none for a host of the same name.
    reasons: Vec<Option<Discriminant<StoreError>>>,
    /// Restores of the store.
    restores: u64,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Contact {
    #[default]
    Never,
    Here,
    Lost,
}

impl Logged {
    /// Notes a loss of the contact. Returns true if its reason is to be logged: once for each kind until the contact is back.
    fn is_news(&mut self, why: &Trouble) -> bool {
        let kind = match why {
            Trouble::Store(error) => Some(discriminant(error)),
            Trouble::NameTaken(_) => None,
        };
        let is_new = !self.reasons.contains(&kind);
        self.contact = Contact::Lost;
        self.reasons.extend(is_new.then_some(kind));
        is_new
    }
}

impl<S: Store> MemberThread<S> {
    /// Runs from the word to begin until the host has left the fleet.
    pub(in crate::fleet) fn run(mut self, begun: &Receiver<()>) {
        let Ok(()) = begun.recv() else { return };
        let handle = self.proxy.handle.clone();
        let _alarm = Alarm(|why: &str| handle.fleet().tell_trouble(why));
        self.member.go_on(words(&self.proxy.handle), &self.proxy.view());
        while !self.bell.ends() {
            if self.bell.take_ring() {
                self.member.woken();
            }
            if self.bell.leaves() {
                self.member.stop();
            }
            let Some(next) = self.drive() else { return };
            self.publish();
            self.bell.sleep(next);
        }
    }

    /// Drives the member by one step. Returns the time of its next step; none once it has left.
    fn drive(&mut self) -> Option<BootTime> {
        let began = now();
        self.bell.heed_idle(self.member.has_pauses());
        match self.member.poll(began, &self.proxy.view()) {
            Step::Ask(request, timeout) => {
                let sent = now();
                let result = self.store.ask(&request, timeout);
                self.member.answered(sent, now(), result);
            }
            Step::Do(doing) => {
                self.proxy.carry_out(&doing);
                self.member.done(now());
            }
            Step::Wait(until) => return Some(until),
            Step::Over => return None,
        }
        Some(began)
    }

    /// Shows the state of the member to the status and the metrics, and logs each change of the contact, and each new reason of a
    /// loss, once.
    fn publish(&mut self) {
        let age = self.member.present().map(|at| now() - at);
        self.desk.set_standing(match self.member.trouble() {
            Some(trouble) if self.member.is_nameless() => {
                Standing::Nameless(Refusal::denied(&trouble.to_string()))
            }
            Some(_) => Standing::Alone,
            None if self.member.has_session() => Standing::Member,
            None => Standing::Unknown,
        });
        let trouble = self.member.trouble().map(ToString::to_string);
        let doubt = doubt(&self.member.doubted());
        let is_late = age.is_none_or(|age| age > self.late_after);
        match self.member.trouble() {
            Some(why) if is_late && self.logged.is_news(why) => {
                warn!(
                    event = "fleet-lost", fleet = self.identity.fleet;
                    "the fleet {} is out of reach: {why}; its pauses stay as they are", self.identity.fleet
                );
            }
            None if !is_late
                && self.logged.contact != Contact::Here
                && self.member.has_session() =>
            {
                info!(
                    event = "fleet-joined", fleet = self.identity.fleet;
                    "is a member of the fleet {} as {}", self.identity.fleet, self.identity.host
                );
                (self.logged.contact, self.logged.reasons) = (Contact::Here, Vec::new());
            }
            _ => {}
        }
        if self.logged.restores != self.member.restores() {
            self.logged.restores = self.member.restores();
            let what = doubt.clone().unwrap_or_else(|| format!("{RESTORED}; no pause holds here"));
            warn!(event = "fleet-restored", fleet = self.identity.fleet; "the fleet {}: {what}", self.identity.fleet);
        }
        self.member.take_stranded().iter().for_each(warn_of_stranded);
        let parcel = serde_json::to_value(self.member.describe());
        self.proxy.handle.fleet().put_parcel(parcel.ok());
        self.proxy.handle.fleet().update(|status| {
            status.name.clone_from(&self.identity.fleet);
            status.host.clone_from(&self.identity.host);
            status.connected = self.logged.contact == Contact::Here;
            status.last_contact = self.member.contact().map(|at| at.0);
            self.identity.on_disconnect.clone_into(&mut status.on_disconnect);
            status.rounds_failed = self.member.rounds_failed();
            status.trouble = trouble.or(doubt);
        });
    }
}

/// Tells of pauses that hold here though a restored store does not have them, if there are any.
fn doubt(pauses: &[&str]) -> Option<String> {
    let end = "fleet.keep-paused-for is over, or tcpause resume --force ends it";
    (!pauses.is_empty())
        .then(|| format!("{RESTORED}; {} holds here until {end}", pauses.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_reason_is_news_once() {
        let store = |error: fn(String) -> StoreError, why: &str| Trouble::Store(error(why.into()));
        let mut logged = Logged::default();
        for (why, is_news) in [
            (store(StoreError::TimedOut, "a"), true),
            (store(StoreError::TimedOut, "b"), false),
            (store(StoreError::Denied, "a"), true),
            (Trouble::NameTaken("a".to_owned()), true),
            (store(StoreError::TimedOut, "a"), false),
            (Trouble::NameTaken("b".to_owned()), false),
        ] {
            assert_eq!(logged.is_news(&why), is_news, "{why:?}");
            assert_eq!(logged.contact, Contact::Lost);
        }
    }
}

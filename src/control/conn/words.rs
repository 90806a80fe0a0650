//! Callers as they travel in a hand-over. Each of their states is plain data, but for a request that is executed.

use std::{os::fd::AsFd, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{ControlConn, ControlContext, Peer, State, Then};
use crate::{
    config::address::Address,
    control::{
        index::Scope,
        pending::{PendingPause, PendingWords},
        query::{OnTimeout, Switch},
        request::{self, IncomingWords},
    },
    handle::switch::Check,
    handover::{
        parcel::{Incoming, Misfit, Moment, Outgoing},
        request::INHERITED,
    },
};

/// Caller in a hand-over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::control) struct CallerWords {
    state: StateWords,
    name: String,
    arrived: Moment,
    deadline: Option<Moment>,
    scope: Scope,
    peer: Peer,
    request: IncomingWords,
    pause: Option<PendingWords>,
    has_permit: bool,
}

/// State of a caller in a hand-over. Numbers of bytes are those of the parcel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum StateWords {
    Reading,
    Waiting { idle_moments: u64, until: Option<Moment> },
    Pausing { on_timeout: OnTimeout, is_bound: bool },
    Upgrading,
    Switching { to: Option<String>, is_checked: bool },
    AwaitingUpstream { address: String, until: Option<Moment> },
    Answering { bytes: usize, sent: usize, then: Then },
    ConnectionBound,
    Lingering { discarded: usize },
}

impl ControlConn {
    /// Describes the caller for a hand-over; `None` while it [must stay](Self::must_stay).
    pub(in crate::control) fn describe<'a>(
        &'a self,
        parcel: &mut Outgoing<'a>,
    ) -> Option<CallerWords> {
        let Self {
            deadline,
            ready: _,
            socket,
            name,
            arrived,
            scope,
            timeouts: _,
            peer,
            request,
            pause,
            permit,
            state,
        } = self;
        let pause = match pause {
            Some(pause) => Some(pause.describe(parcel)?),
            None => None,
        };
        let state = state.describe(parcel)?;
        parcel.lend(socket.as_fd());
        Some(CallerWords {
            state,
            name: name.clone(),
            arrived: parcel.moment(*arrived),
            deadline: deadline.map(|deadline| parcel.moment(deadline)),
            scope: *scope,
            peer: *peer,
            request: request.describe(parcel),
            pause,
            has_permit: permit.is_some(),
        })
    }

    /// Makes a caller of its words. It is not registered yet, and does not [own](Self::own_pause) its pause.
    pub(in crate::control) fn rebuild(
        words: CallerWords,
        parcel: &mut Incoming,
        context: &ControlContext,
    ) -> Result<Self, Misfit> {
        let CallerWords { state, name, arrived, deadline, scope, peer, request, pause, has_permit } =
            words;
        let state = State::rebuild(&state, parcel)?;
        Ok(Self {
            deadline: deadline.map(|deadline| parcel.instant(deadline)),
            ready: true,
            socket: parcel.descriptor()?,
            name,
            arrived: parcel.instant(arrived),
            scope,
            timeouts: context.timeouts,
            peer,
            request: request::Incoming::rebuild(request, parcel)?,
            pause: pause.map(|pause| PendingPause::rebuild(pause, parcel, context.handle.clone())),
            permit: has_permit.then(|| Arc::clone(&context.permit)),
            state,
        })
    }

    /// Owns its pause from now on.
    pub(in crate::control) fn own_pause(&mut self) {
        self.pause.iter_mut().for_each(PendingPause::own);
    }
}

impl State {
    fn describe(&self, parcel: &mut Outgoing<'_>) -> Option<StateWords> {
        Some(match self {
            Self::Reading => StateWords::Reading,
            Self::Waiting { idle_moments, until } => StateWords::Waiting {
                idle_moments: *idle_moments,
                until: until.map(|until| parcel.moment(until)),
            },
            Self::Executing { reply: _, is_change: _, late: _ } | Self::Ending => return None,
            Self::Pausing { on_timeout, is_bound } => {
                StateWords::Pausing { on_timeout: *on_timeout, is_bound: *is_bound }
            }
            // Its number is of no meaning elsewhere: the taker answers for this one upgrade.
            Self::Upgrading { attempt: _ } => StateWords::Upgrading,
            // The taker examines the upstream anew.
            Self::Switching { wanted: Switch { to, check }, examination: _ } => {
                StateWords::Switching {
                    to: to.as_ref().map(ToString::to_string),
                    is_checked: *check == Check::Connect,
                }
            }
            Self::AwaitingUpstream { address, until } => StateWords::AwaitingUpstream {
                address: address.to_string(),
                until: until.map(|until| parcel.moment(until)),
            },
            Self::Answering { bytes, sent, then } => {
                StateWords::Answering { bytes: parcel.append(bytes), sent: *sent, then: *then }
            }
            // Only pauses of the fleet can be lost, and they stay.
            Self::ConnectionBound { told_lost: _, told_forced: _, told_kept: _ } => {
                StateWords::ConnectionBound
            }
            Self::Lingering { discarded } => StateWords::Lingering { discarded: *discarded },
        })
    }

    fn rebuild(words: &StateWords, parcel: &mut Incoming) -> Result<Self, Misfit> {
        Ok(match *words {
            StateWords::Reading => Self::Reading,
            StateWords::Waiting { idle_moments, until } => {
                Self::Waiting { idle_moments, until: until.map(|until| parcel.instant(until)) }
            }
            StateWords::Pausing { on_timeout, is_bound } => Self::Pausing { on_timeout, is_bound },
            StateWords::Upgrading => Self::Upgrading { attempt: INHERITED },
            StateWords::Switching { ref to, is_checked } => {
                let to = to.as_deref().map(address).transpose()?;
                let check = if is_checked { Check::Connect } else { Check::None };
                Self::Switching { wanted: Switch { to, check }, examination: None }
            }
            StateWords::AwaitingUpstream { ref address, until } => Self::AwaitingUpstream {
                address: self::address(address)?,
                until: until.map(|until| parcel.instant(until)),
            },
            StateWords::Answering { bytes, sent, then } => {
                Self::Answering { bytes: parcel.bytes(bytes)?.to_vec(), sent, then }
            }
            StateWords::ConnectionBound => {
                Self::ConnectionBound { told_lost: false, told_forced: 0, told_kept: None }
            }
            StateWords::Lingering { discarded } => Self::Lingering { discarded },
        })
    }
}

fn address(text: &str) -> Result<Address, Misfit> {
    text.parse().map_err(|error: String| Misfit::new(error))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        os::unix::net::UnixStream,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::control::{
        command::Caller,
        executor::Reply,
        hosts::HostPolicy,
        pending::Pauser,
        tests::{context, parcel_of},
    };

    /// Counts the states, so that a new one does not compile without its row.
    fn number(state: &State) -> usize {
        match state {
            State::Reading => 0,
            State::Waiting { .. } => 1,
            State::Pausing { .. } => 2,
            State::Upgrading { .. } => 3,
            State::Answering { .. } => 4,
            State::ConnectionBound { .. } => 5,
            State::Lingering { .. } => 6,
            State::Switching { .. } => 7,
            State::AwaitingUpstream { .. } => 8,
            State::Executing { .. } => 9,
            State::Ending => 10,
        }
    }

    fn states() -> Vec<State> {
        let until = Instant::now().checked_add(Duration::from_secs(30));
        let address = Address::tcp("localhost", 3003);
        let answer = |sent, then| State::Answering { bytes: b"HTTP/1.1 200".to_vec(), sent, then };
        let mut states = vec![
            State::Reading,
            State::Waiting { idle_moments: 3, until },
            State::Waiting { idle_moments: 0, until: None },
            State::Upgrading { attempt: 4 },
            State::AwaitingUpstream { address: address.clone(), until },
            State::Switching {
                wanted: Switch { to: Some(address), check: Check::None },
                examination: None,
            },
            State::Switching {
                wanted: Switch { to: None, check: Check::Connect },
                examination: None,
            },
            answer(0, Then::Linger),
            answer(12, Then::ConnectionBound),
            State::ConnectionBound { told_lost: false, told_forced: 0, told_kept: None },
            State::Lingering { discarded: 5 },
        ];
        for (_, on_timeout) in OnTimeout::ALL {
            states.push(State::Pausing { on_timeout, is_bound: on_timeout == OnTimeout::Kill });
        }
        let found = states.iter().map(number).collect::<std::collections::BTreeSet<_>>();
        assert_eq!(found, (0..9).collect(), "all but one that is executed");
        states
    }

    #[test]
    fn every_state_is_the_same_behind_a_hand_over() {
        let (giver, taker) = (context(), context());
        for (index, state) in states().into_iter().enumerate() {
            let (mut peer, socket) = UnixStream::pair().unwrap();
            let scope = [Scope::Full, Scope::ReadOnly][index % 2];
            let mut caller = ControlConn::new(socket.into(), scope, giver.timeouts);
            caller.peer = [Peer::Open, Peer::HalfClosed, Peer::Gone][index % 3];
            caller.deadline = caller.deadline.filter(|_| index % 2 == 0);
            caller.permit = (index % 2 == 1).then(|| Arc::clone(&giver.permit));
            let heads: [&[u8]; 3] = [
                b"PUT /pau",
                b"PUT /paused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc",
                b"PUT / HTTP/1.1\r\nHost:\r\nTransfer-Encoding: chunked\r\n\r\n12;x",
            ];
            caller.request.take(heads[index % 3], &giver.hosts).unwrap();
            let by = Caller { name: "a test".to_owned(), request_id: 7 };
            caller.pause = (index % 2 == 0)
                .then(|| PendingPause::new(Pauser::Proxy(giver.handle.clone()), by));
            caller.state = state;

            let begin = Instant::now();
            let mut parcel = Outgoing::new(begin);
            let words = caller.describe(&mut parcel).unwrap();
            let mut incoming = parcel_of(parcel, begin);
            let text = serde_json::to_string(&words).unwrap();
            let told = serde_json::from_str(&text).unwrap();
            assert_eq!(told, words, "{text}");
            let rebuilt = ControlConn::rebuild(told, &mut incoming, &taker).unwrap();
            incoming.finish().unwrap();
            assert_eq!(rebuilt.permit.is_some(), Arc::strong_count(&taker.permit) == 2);
            assert!(rebuilt.ready);
            let mut again = Outgoing::new(begin);
            assert_eq!(rebuilt.describe(&mut again).as_ref(), Some(&words), "{text}");
            let mut once_more = Outgoing::new(begin);
            caller.describe(&mut once_more).unwrap();
            assert_eq!(again.into_parts().1, once_more.into_parts().1, "{text}");
            peer.write_all(b"x").unwrap();
            assert_eq!(rustix::io::read(&rebuilt.socket, &mut [0; 2]), Ok(1));
        }
    }

    #[test]
    fn a_request_goes_on_where_it_was() {
        let hosts = HostPolicy::new([], &[]);
        let whole = b"PUT /paused HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        let begin = Instant::now();
        let expected = request::Incoming::default().take(whole, &hosts).unwrap();
        assert!(matches!(expected, request::Progress::Whole(_)));
        for split in 0..whole.len() {
            let (first, rest) = whole.split_at(split);
            let mut given = request::Incoming::default();
            given.take(first, &hosts).unwrap();
            let mut parcel = Outgoing::new(begin);
            let words = given.describe(&mut parcel);
            let text = serde_json::to_string(&words).unwrap();
            let mut incoming = parcel_of(parcel, begin);
            let words = serde_json::from_str(&text).unwrap();
            let mut taken = request::Incoming::rebuild(words, &mut incoming).unwrap();
            assert_eq!(taken.take(rest, &hosts).unwrap(), expected, "{split}");
        }
    }

    #[test]
    fn a_request_that_is_executed_does_not_travel() {
        let context = context();
        let (_peer, socket) = UnixStream::pair().unwrap();
        let mut caller = ControlConn::new(socket.into(), Scope::Full, context.timeouts);
        caller.state = State::Executing {
            reply: Reply::default(),
            is_change: true,
            late: super::super::STARVED,
        };
        let mut parcel = Outgoing::new(Instant::now());
        assert!(caller.must_stay() && caller.describe(&mut parcel).is_none());
        assert_eq!((parcel.descriptor_count(), parcel.byte_count()), (0, 0));
    }

    #[test]
    fn an_unknown_state_is_refused() {
        for (text, is_known) in [(r#""upgrading""#, true), (r#""dreaming""#, false)] {
            assert_eq!(serde_json::from_str::<StateWords>(text).is_ok(), is_known, "{text}");
        }
    }

    #[test]
    fn a_pause_is_undone_by_its_owner_alone() {
        let context = context();
        let begin = Instant::now();
        for owns in [false, true] {
            let by = Caller { name: "a test".to_owned(), request_id: 7 };
            let pause = PendingPause::new(Pauser::Proxy(context.handle.clone()), by);
            let words = pause.describe(&Outgoing::new(begin)).unwrap();
            pause.forget();
            crate::control::tests::put_pending(&context.handle, 7);
            let parcel = Incoming::new(begin, Vec::new(), Vec::new());
            let mut pause = PendingPause::rebuild(words, &parcel, context.handle.clone());
            if owns {
                pause.own();
            }
            drop(pause);
            assert_eq!(context.handle.is_paused(), !owns);
        }
    }
}

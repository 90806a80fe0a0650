//! Words of a connection: all of it that travels to another process, in each of its states.

use std::{io, sync::Arc};

use mio::{Registry, Token};
use serde::{Deserialize, Serialize};

use super::{
    AwaitingAcks, Connection, Patience, Rejection, Session, State,
    connect::{Dial, DialWords},
    endpoint::{Endpoint, EndpointWords},
    pipe::PipePool,
    record::{Record, RecordWords},
    reject::{Reject, RejectWords},
    relay::{Relay, RelayWords, Side},
};
use crate::{
    admission::{Admission, pace::UnderWayWords},
    handover::parcel::{Incoming, Misfit, Moment, Outgoing},
    pause::gate::Gate,
    stats::cause::{CloseCause, ConnectResult},
    upstream::{Upstream, targets::UpstreamId},
};

/// Words of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConnectionWords {
    client: EndpointWords,
    state: StateWords,
    record: RecordWords,
}

/// Words of a state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum StateWords {
    Waiting { has_hold_permit: bool, patience: Option<PatienceWords> },
    Connecting(DialWords),
    Relaying(SessionWords),
    Rejecting(RejectionWords),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PatienceWords {
    since: Moment,
    error: Option<ErrorWords>,
}

/// Words of an error: its number, or if the system gave none, its kind and its text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ErrorWords {
    Number(i32),
    Text(ConnectResult, String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct SessionWords {
    relay: RelayWords,
    #[serde(skip_serializing_if = "Option::is_none")]
    under_way: Option<UnderWayWords>,
    moved: Moment,
    asks: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    settling: Option<AcksWords>,
    /// Upstream that it leads to.
    #[serde(default, skip_serializing_if = "UpstreamId::is_default")]
    target: UpstreamId,
    /// Set if its pass was given in spite of a pause.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    bypasses: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct AcksWords {
    aborted: Option<Side>,
    unacknowledged: u32,
    looks: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct RejectionWords {
    reject: RejectWords,
    cause: CloseCause,
    delivered: (u64, u64),
}

/// Parts of a process in which connections from another one are counted.
#[derive(Debug)]
pub(crate) struct RebuildContext<'a> {
    pub(crate) admission: &'a Admission,
    pub(crate) gate: &'a Arc<Gate>,
    /// Pipes of the worker that gets the connection.
    pub(crate) pipes: &'a PipePool,
    pub(crate) upstream: &'a Upstream,
    /// Index of the worker that gives the connection.
    pub(crate) giver: usize,
}

impl Connection {
    /// Returns true unless it is in a TLS session, which cannot travel.
    pub(crate) fn is_movable(&self) -> bool {
        match &self.state {
            State::Waiting { .. } | State::Connecting(_) | State::Relaying(_) => true,
            State::Rejecting(Rejection { reject, .. }) => reject.is_movable(),
        }
    }

    /// Returns its words, and puts its descriptors and bytes into `parcel`. Nothing changes: the connection may go on. It must
    /// be movable.
    pub(crate) fn describe<'a>(&'a self, parcel: &mut Outgoing<'a>) -> ConnectionWords {
        let Self { client, state, record, _permit: _ } = self;
        ConnectionWords {
            client: client.describe(parcel),
            state: state.describe(parcel),
            record: record.describe(parcel),
        }
    }

    /// Returns the connection of `words`, with a permit and a pass as it had, beyond all bounds. No peer notices. It is not
    /// registered yet.
    pub(crate) fn rebuild(
        words: ConnectionWords,
        parcel: &mut Incoming,
        context: &RebuildContext<'_>,
    ) -> Result<Self, Misfit> {
        let ConnectionWords { client, state, record } = words;
        Ok(Self {
            client: Endpoint::rebuild(client, parcel)?,
            state: State::rebuild(state, parcel, context)?,
            record: Record::rebuild(record, parcel, context.giver),
            _permit: context.admission.clients.take_beyond(),
        })
    }

    /// Registers the sockets of a connection from another process. All that is ready is reported once more.
    pub(crate) fn adopt_registration(
        &mut self,
        registry: &Registry,
        client: Token,
        upstream: Token,
    ) -> io::Result<()> {
        let Self { client: endpoint, state, .. } = self;
        match state {
            State::Relaying(session) => {
                endpoint.adopt_registration(true, registry, client)?;
                session.relay.upstream_mut().adopt_registration(true, registry, upstream)
            }
            State::Connecting(dial) => {
                endpoint.adopt_registration(false, registry, client)?;
                dial.upstream.adopt_registration(false, registry, upstream)
            }
            State::Waiting { .. } | State::Rejecting(_) => {
                endpoint.adopt_registration(false, registry, client)
            }
        }
    }
}

impl State {
    fn describe<'a>(&'a self, parcel: &mut Outgoing<'a>) -> StateWords {
        match self {
            Self::Waiting { hold_permit, patience } => StateWords::Waiting {
                has_hold_permit: hold_permit.is_some(),
                patience: patience.as_ref().map(|patience| patience.describe(parcel)),
            },
            Self::Connecting(dial) => StateWords::Connecting(dial.describe(parcel)),
            Self::Relaying(session) => StateWords::Relaying(session.describe(parcel)),
            Self::Rejecting(rejection) => StateWords::Rejecting(rejection.describe(parcel)),
        }
    }

    fn rebuild(
        words: StateWords,
        parcel: &mut Incoming,
        context: &RebuildContext<'_>,
    ) -> Result<Self, Misfit> {
        Ok(match words {
            StateWords::Waiting { has_hold_permit, patience } => Self::Waiting {
                hold_permit: has_hold_permit.then(|| context.admission.hold.restore()),
                patience: patience.map(|words| Patience::rebuild(words, parcel)),
            },
            StateWords::Connecting(words) => {
                Self::Connecting(Dial::rebuild(words, parcel, context)?)
            }
            StateWords::Relaying(words) => {
                Self::Relaying(Session::rebuild(words, parcel, context)?)
            }
            StateWords::Rejecting(words) => Self::Rejecting(Rejection::rebuild(words, parcel)?),
        })
    }
}

impl Patience {
    fn describe(&self, parcel: &Outgoing<'_>) -> PatienceWords {
        let Self { since, error } = self;
        PatienceWords { since: parcel.moment(*since), error: error.as_ref().map(ErrorWords::of) }
    }

    fn rebuild(words: PatienceWords, parcel: &Incoming) -> Self {
        let PatienceWords { since, error } = words;
        Self { since: parcel.instant(since), error: error.map(ErrorWords::error) }
    }
}

impl ErrorWords {
    fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(number) => Self::Number(number),
            None => Self::Text(ConnectResult::from(error), error.to_string()),
        }
    }

    fn error(self) -> io::Error {
        match self {
            Self::Number(number) => io::Error::from_raw_os_error(number),
            Self::Text(result, text) => io::Error::new(result.kind(), text),
        }
    }
}

impl Session {
    fn describe<'a>(&'a self, parcel: &mut Outgoing<'a>) -> SessionWords {
        let Self { relay, under_way, moved, asks, settling, target, pass } = self;
        SessionWords {
            relay: relay.describe(parcel),
            under_way: under_way.as_ref().map(|under_way| under_way.describe(parcel)),
            moved: parcel.moment(*moved),
            asks: *asks,
            settling: settling.map(|AwaitingAcks { aborted, unacknowledged, looks }| AcksWords {
                aborted,
                unacknowledged,
                looks,
            }),
            target: target.target().id(),
            bypasses: pass.bypasses(),
        }
    }

    fn rebuild(
        words: SessionWords,
        parcel: &mut Incoming,
        context: &RebuildContext<'_>,
    ) -> Result<Self, Misfit> {
        let SessionWords { relay, under_way, moved, asks, settling, target, bypasses } = words;
        Ok(Self {
            relay: Relay::rebuild(relay, parcel, context.pipes)?,
            under_way: under_way
                .map(|words| Box::new(context.admission.queue.pace().restore_share(words, parcel))),
            moved: parcel.instant(moved),
            asks,
            settling: settling.map(|AcksWords { aborted, unacknowledged, looks }| AwaitingAcks {
                aborted,
                unacknowledged,
                looks,
            }),
            target: context.upstream.restore_use(target),
            pass: context.gate.restore(bypasses),
        })
    }
}

impl Rejection {
    fn describe(&self, parcel: &mut Outgoing<'_>) -> RejectionWords {
        let Self { reject, cause, delivered } = self;
        let reject = reject.describe(parcel);
        RejectionWords { reject, cause: *cause, delivered: *delivered }
    }

    fn rebuild(words: RejectionWords, parcel: &mut Incoming) -> Result<Self, Misfit> {
        let RejectionWords { reject, cause, delivered } = words;
        Ok(Self { reject: Reject::rebuild(reject, parcel)?, cause, delivered })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_without_a_number_keeps_its_kind_and_its_text() {
        for result in ConnectResult::ALL {
            let error = io::Error::new(result.kind(), "its text");
            let expected = if result == ConnectResult::Ok { ConnectResult::Other } else { result };
            let arrived = ErrorWords::of(&error).error();
            assert_eq!(ConnectResult::from(&arrived), expected);
            assert_eq!(arrived.to_string(), "its text");
        }
        let arrived = ErrorWords::of(&io::Error::from_raw_os_error(111)).error();
        assert_eq!(arrived.raw_os_error(), Some(111));
    }
}

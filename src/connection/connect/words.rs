//! Words of a dial that is under way, and of the attempt that it belongs to.

use serde::{Deserialize, Serialize};

use super::{Attempt, ConnectTicket, Dial};
use crate::{
    admission::pace::UnderWayWords,
    connection::{
        endpoint::{Endpoint, EndpointWords},
        words::RebuildContext,
    },
    handover::parcel::{Incoming, Misfit, Moment, Outgoing},
    upstream::{
        addresses::{Route, RouteWords},
        targets::{TargetUse, UpstreamId},
    },
};

/// Words of a dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::connection) struct DialWords {
    upstream: EndpointWords,
    /// Upstream that is dialled.
    #[serde(default, skip_serializing_if = "UpstreamId::is_default")]
    target: UpstreamId,
    attempt: AttemptWords,
}

/// Words of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct AttemptWords {
    ticket: TicketWords,
    route: RouteWords,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    is_short: bool,
    since: Moment,
    begun: Moment,
    /// Set if its pass was given in spite of a pause.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    bypasses: bool,
}

/// Words of a ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum TicketWords {
    Alone,
    Window(UnderWayWords),
    Probe { under_way: Option<UnderWayWords> },
}

impl Dial {
    /// Returns its words.
    pub(in crate::connection) fn describe<'a>(&'a self, parcel: &mut Outgoing<'a>) -> DialWords {
        let Self { upstream, target, attempt } = self;
        DialWords {
            upstream: upstream.describe(parcel),
            target: target.target().id(),
            attempt: attempt.describe(parcel),
        }
    }

    /// Returns the dial of `words`. Its end is reported to this process.
    pub(in crate::connection) fn rebuild(
        words: DialWords,
        parcel: &mut Incoming,
        context: &RebuildContext<'_>,
    ) -> Result<Self, Misfit> {
        let DialWords { upstream, target, attempt } = words;
        let target = context.upstream.restore_use(target);
        Ok(Self {
            upstream: Endpoint::rebuild(upstream, parcel)?,
            attempt: Attempt::rebuild(attempt, parcel, context, &target),
            target,
        })
    }
}

impl Attempt {
    fn describe(&self, parcel: &Outgoing<'_>) -> AttemptWords {
        let Self { ticket, route, is_short, since, begun, pass } = self;
        AttemptWords {
            ticket: ticket.describe(parcel),
            route: route.describe(),
            is_short: *is_short,
            since: parcel.moment(*since),
            begun: parcel.moment(*begun),
            bypasses: pass.bypasses(),
        }
    }

    fn rebuild(
        words: AttemptWords,
        parcel: &Incoming,
        context: &RebuildContext<'_>,
        target: &TargetUse,
    ) -> Self {
        let AttemptWords { ticket, route, is_short, since, begun, bypasses } = words;
        Self {
            ticket: ConnectTicket::rebuild(ticket, parcel, context, target),
            route: Route::rebuild(route),
            is_short,
            since: parcel.instant(since),
            begun: parcel.instant(begun),
            pass: context.gate.restore(bypasses),
        }
    }
}

impl ConnectTicket {
    fn describe(&self, parcel: &Outgoing<'_>) -> TicketWords {
        match self {
            Self::Alone => TicketWords::Alone,
            Self::Window(under_way) => TicketWords::Window(under_way.describe(parcel)),
            Self::Probe { _permit: _, under_way } => TicketWords::Probe {
                under_way: under_way.as_ref().map(|under_way| under_way.describe(parcel)),
            },
        }
    }

    /// Returns the ticket of `words` for a dial of `target`.
    fn rebuild(
        words: TicketWords,
        parcel: &Incoming,
        context: &RebuildContext<'_>,
        target: &TargetUse,
    ) -> Self {
        let under_way =
            |words| Box::new(context.admission.queue.pace().restore_share(words, parcel));
        match words {
            TicketWords::Alone => Self::Alone,
            TicketWords::Window(words) => Self::Window(under_way(words)),
            TicketWords::Probe { under_way: words } => Self::Probe {
                _permit: target.target().restore_probe(),
                under_way: words.map(under_way),
            },
        }
    }
}

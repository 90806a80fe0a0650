//! Words of a client that is being rejected.

use serde::{Deserialize, Serialize};

use super::{Reject, Rest};
use crate::handover::parcel::{Incoming, Misfit, Outgoing};

/// Words of a rejection. A TLS session cannot travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::connection) enum RejectWords {
    Sniffing,
    AwaitingHandshake,
    Lingering {
        /// Number of the answer's bytes that are left, which are among the raw bytes; none once our stream has ended.
        unsent: Option<usize>,
        discarded: usize,
    },
}

impl Reject {
    /// Returns true unless it is a TLS session.
    pub(in crate::connection) fn is_movable(&self) -> bool {
        match self {
            Self::Sniffing | Self::AwaitingHandshake | Self::Lingering { .. } => true,
            Self::Tls { .. } => false,
        }
    }

    /// Returns its words. Describing a TLS session is a defect of the caller: its client would get the end of the stream.
    pub(in crate::connection) fn describe(&self, parcel: &mut Outgoing<'_>) -> RejectWords {
        debug_assert!(self.is_movable(), "a TLS session is described");
        match self {
            Self::Sniffing => RejectWords::Sniffing,
            Self::AwaitingHandshake => RejectWords::AwaitingHandshake,
            Self::Tls { .. } => RejectWords::Lingering { unsent: Some(0), discarded: 0 },
            Self::Lingering { rest, discarded } => {
                let unsent = rest.as_ref().map(|Rest { bytes, written, _permit: _ }| {
                    parcel.append(bytes.get(*written..).unwrap_or_default())
                });
                RejectWords::Lingering { unsent, discarded: *discarded }
            }
        }
    }

    /// Returns the rejection of `words`. An encrypted rest goes without its permit, which bounds handshakes to come.
    pub(in crate::connection) fn rebuild(
        words: RejectWords,
        parcel: &mut Incoming,
    ) -> Result<Self, Misfit> {
        Ok(match words {
            RejectWords::Sniffing => Self::Sniffing,
            RejectWords::AwaitingHandshake => Self::AwaitingHandshake,
            RejectWords::Lingering { unsent, discarded } => {
                let rest = match unsent {
                    Some(count) => {
                        let bytes = parcel.bytes(count)?.into();
                        Some(Rest { bytes, written: 0, _permit: None })
                    }
                    None => None,
                };
                Self::Lingering { rest, discarded }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn of_an_answer_the_part_travels_that_is_not_written_yet() {
        let now = Instant::now();
        let rest = Rest { bytes: (*b"written, left").into(), written: 9, _permit: None };
        let mut parcel = Outgoing::new(now);
        let words = Reject::Lingering { rest: Some(rest), discarded: 5 }.describe(&mut parcel);
        let mut parcel = Incoming::new(now, Vec::new(), parcel.into_parts().1);
        match Reject::rebuild(words, &mut parcel).unwrap() {
            Reject::Lingering {
                rest: Some(Rest { bytes, written: 0, _permit: None }),
                discarded,
            } => {
                assert_eq!((&*bytes, discarded), (&b"left"[..], 5));
            }
            other => panic!("{other:?}"),
        }
    }
}

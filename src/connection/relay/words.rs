//! Words of a relay: its upstream, and the bytes in flight in both directions.

use serde::{Deserialize, Serialize};

use super::{Buffered, Flow, Relay, Stage};
use crate::{
    connection::{
        endpoint::{Endpoint, EndpointWords},
        pipe::PipePool,
    },
    handover::parcel::{Incoming, Misfit, Outgoing},
    sys::PipeEnds,
};

/// Words of a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::connection) struct RelayWords {
    upstream: EndpointWords,
    to_upstream: FlowWords,
    to_client: FlowWords,
}

/// Words of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct FlowWords {
    stage: Stage,
    buffered: BufferedWords,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    bulk: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    postgres_idle: bool,
    delivered: u64,
}

/// Place of the buffered bytes, and their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum BufferedWords {
    Nothing,
    /// Among the raw bytes of the parcel.
    Bytes(usize),
    /// The same, of a header of our own.
    Header(usize),
    /// In a pipe, whose two ends are in the parcel.
    Pipe(usize),
}

impl Relay {
    /// Returns its words.
    pub(in crate::connection) fn describe<'a>(&'a self, parcel: &mut Outgoing<'a>) -> RelayWords {
        let Self { upstream, to_upstream, to_client } = self;
        RelayWords {
            upstream: upstream.describe(parcel),
            to_upstream: to_upstream.describe(parcel),
            to_client: to_client.describe(parcel),
        }
    }

    /// Returns the relay of `words`.
    pub(in crate::connection) fn rebuild(
        words: RelayWords,
        parcel: &mut Incoming,
        pipes: &PipePool,
    ) -> Result<Self, Misfit> {
        let RelayWords { upstream, to_upstream, to_client } = words;
        Ok(Self {
            upstream: Endpoint::rebuild(upstream, parcel)?,
            to_upstream: Flow::rebuild(to_upstream, parcel, pipes)?,
            to_client: Flow::rebuild(to_client, parcel, pipes)?,
        })
    }
}

impl Flow {
    fn describe<'a>(&'a self, parcel: &mut Outgoing<'a>) -> FlowWords {
        let Self { stage, ref buffered, bulk, postgres_idle, delivered } = *self;
        let buffered = match buffered {
            Buffered::Nothing => BufferedWords::Nothing,
            Buffered::Bytes(bytes, written) => {
                BufferedWords::Bytes(parcel.append(bytes.get(*written..).unwrap_or_default()))
            }
            Buffered::Header(bytes, written) => {
                BufferedWords::Header(parcel.append(bytes.get(*written..).unwrap_or_default()))
            }
            Buffered::Pipe(pipe) => {
                pipe.ends().lend().into_iter().for_each(|end| parcel.lend(end));
                BufferedWords::Pipe(pipe.len())
            }
        };
        FlowWords { stage, buffered, bulk, postgres_idle, delivered }
    }

    fn rebuild(words: FlowWords, parcel: &mut Incoming, pipes: &PipePool) -> Result<Self, Misfit> {
        let FlowWords { stage, buffered, bulk, postgres_idle, delivered } = words;
        let buffered = match buffered {
            BufferedWords::Nothing => Buffered::Nothing,
            BufferedWords::Bytes(count) => Buffered::Bytes(parcel.bytes(count)?.into(), 0),
            BufferedWords::Header(count) => Buffered::Header(parcel.bytes(count)?.into(), 0),
            BufferedWords::Pipe(len) => {
                let ends = PipeEnds::adopt([parcel.descriptor()?, parcel.descriptor()?]);
                Buffered::Pipe(pipes.adopt(ends, len))
            }
        };
        Ok(Self { stage, buffered, bulk, postgres_idle, delivered })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn of_copied_bytes_those_travel_that_are_not_written_yet() {
        let now = Instant::now();
        let flow = Flow { buffered: Buffered::Bytes((*b"written, left").into(), 9), ..Flow::new() };
        let mut parcel = Outgoing::new(now);
        let words = flow.describe(&mut parcel);
        let mut parcel = Incoming::new(now, Vec::new(), parcel.into_parts().1);
        let flow = Flow::rebuild(words, &mut parcel, &PipePool::new(0)).unwrap();
        let Buffered::Bytes(bytes, written) = flow.buffered else { panic!("{flow:?}") };
        assert_eq!((&*bytes, written), (&b"left"[..], 0));
    }
}

//! `src/handover` without a second process: what a giver sends is kept for its taker, and a standstill is `passage.rs`.

#[path = "../../src/handover/fault.rs"]
pub(crate) mod fault;
#[path = "../../src/handover/parcel.rs"]
pub(crate) mod parcel;
#[path = "../../src/handover/request.rs"]
pub(crate) mod request;
#[path = "../../src/handover/upgrades.rs"]
pub(crate) mod upgrades;

/// The way from the giver to the taker.
pub(crate) mod channel {
    use std::{cell::RefCell, convert::Infallible, time::Instant};

    use serde::{Serialize, de::DeserializeOwned};

    use super::parcel::{Incoming, Outgoing};
    use crate::copies::Descriptor;

    /// So few that several batches are sent.
    pub(crate) const DESCRIPTORS_MAX: usize = 12;

    pub(crate) struct Outbox {
        pub(crate) begin: Instant,
        /// False if what is sent goes nowhere, and only its words count.
        has_taker: bool,
        pub(crate) frames: RefCell<Vec<Frame>>,
    }

    /// A message.
    #[derive(Debug)]
    pub(crate) struct Frame {
        words: String,
        descriptors: Vec<Descriptor>,
        bytes: Vec<u8>,
    }

    impl Outbox {
        pub(crate) fn new(begin: Instant, has_taker: bool) -> Self {
            Self { begin, has_taker, frames: RefCell::default() }
        }

        pub(crate) fn parcel<'a>(&self) -> Outgoing<'a> {
            Outgoing::new(self.begin)
        }

        pub(crate) fn send(
            &self,
            message: &impl Serialize,
            outgoing: Outgoing<'_>,
        ) -> Result<(), Infallible> {
            assert!(outgoing.descriptor_count() <= DESCRIPTORS_MAX, "more than a message takes");
            let (mut lent, bytes) = outgoing.into_parts();
            lent.retain(|_lent| self.has_taker);
            let words = serde_json::to_string(message).expect("words");
            let descriptors = lent.into_iter().map(Descriptor::send).collect();
            self.frames.borrow_mut().push(Frame { words, descriptors, bytes });
            Ok(())
        }
    }

    impl Frame {
        /// Returns a message without descriptors.
        pub(crate) fn new(message: &impl Serialize, outgoing: Outgoing<'_>) -> Self {
            let outbox = Outbox::new(Instant::now(), false);
            let Ok(()) = outbox.send(message, outgoing);
            outbox.frames.into_inner().remove(0)
        }

        /// Returns its words and raw bytes.
        pub(crate) fn words(&self) -> (String, Vec<u8>) {
            (self.words.clone(), self.bytes.clone())
        }

        /// Returns what has come in a hand-over that began at `begin`.
        pub(crate) fn open<M: DeserializeOwned>(self, begin: Instant) -> (M, Incoming) {
            let message = serde_json::from_str(&self.words).expect("words");
            (message, Incoming::new(begin, self.descriptors, self.bytes))
        }
    }
}

pub(crate) mod freeze {
    use std::fmt::Display;

    use super::channel::Outbox;
    use crate::passage;

    /// The standstill of a process.
    #[derive(Debug)]
    pub(crate) struct Freeze;

    impl Freeze {
        pub(crate) fn new(_workers: usize) -> Self {
            Self
        }

        pub(crate) fn asks_workers(&self) -> bool {
            passage::is_asked()
        }

        pub(crate) fn stand_still<E: Display>(
            &self,
            _index: usize,
            describe: impl FnOnce(&Outbox) -> Result<(), E>,
        ) {
            passage::stand_still(|outbox| {
                if let Err(error) = describe(outbox) {
                    panic!("a worker cannot be described: {error}");
                }
            });
        }

        pub(crate) fn fail(&self, _index: usize, why: String) {
            passage::fail(why);
        }
    }
}

//! The part of the hand-over that needs no second process.

#[path = "../../src/handover/fault.rs"]
pub(crate) mod fault;
#[path = "../../src/handover/freeze.rs"]
pub(crate) mod freeze;
#[path = "../../src/handover/parcel.rs"]
pub(crate) mod parcel;
#[path = "../../src/handover/request.rs"]
pub(crate) mod request;
#[path = "../../src/handover/upgrades.rs"]
pub(crate) mod upgrades;

/// Stands for the channel, which no schedule uses: a worker is described into the memory of the same process.
pub(crate) mod channel {
    use std::{io, time::Instant};

    use serde::Serialize;

    use super::parcel::Outgoing;

    pub(crate) const DESCRIPTORS_MAX: usize = 253;

    #[derive(Debug)]
    pub(crate) struct Outbox {
        pub(crate) begin: Instant,
    }

    impl Outbox {
        pub(crate) fn parcel<'a>(&self) -> Outgoing<'a> {
            Outgoing::new(self.begin)
        }

        pub(crate) fn send(
            &self,
            _message: &impl Serialize,
            _parcel: Outgoing<'_>,
        ) -> Result<(), io::Error> {
            Err(io::Error::other("there is no channel"))
        }
    }
}

//! The part of the hand-over that needs no second process.

#[path = "../../src/handover/parcel.rs"]
pub(crate) mod parcel;
#[path = "../../src/handover/request.rs"]
pub(crate) mod request;

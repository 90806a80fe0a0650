//! The hand-over: a new process takes over everything from the running one, and goes on where that one stopped.
//!
//! The *giver* describes its state and changes nothing in it, so that it can go on at any moment before the *taker* has said
//! that it goes on itself. Each struct says next to its definition what of it travels: its *words*, which serde writes,
//! and the descriptors and raw bytes that go along in a *parcel*.

pub(crate) mod channel;
pub(crate) mod fault;
pub(crate) mod freeze;
pub(crate) mod parcel;
pub(crate) mod request;
pub(crate) mod upgrades;

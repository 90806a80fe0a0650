//! Bytes and ends: what is carried, and how streams end.

mod carry;
mod pacing;
mod stalled;
mod streams;
mod vanished;

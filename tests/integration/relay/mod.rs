//! Bytes and ends: what is carried, and how streams end.

mod carry;
mod pacing;
mod proxy_header;
mod stalled;
mod streams;
mod vanished;

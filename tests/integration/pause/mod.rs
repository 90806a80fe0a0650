//! Pausing: who is held, for how long, in which order, and when it is idle.

mod bounds;
mod drain;
mod exact;
mod half_closed;
mod hold;
mod idle;
mod lease;
pub(crate) mod pace;
mod postgres;
pub(crate) mod wait;

//! Pauses: leases and their terms, the gate that admits connections, and orders of a pause to the workers.

pub(crate) mod barrier;
pub(crate) mod drain;
pub(crate) mod gate;
pub(crate) mod leases;

//! Admission: the order of clients that wait, and bounds on how many are held or under way.

pub(crate) mod hold;
pub(crate) mod pace;
pub(crate) mod queue;
pub(crate) mod semaphore;

//! The weather of a schedule: how much goes wrong, and how the upstream answers.

/// The odds of faults.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weather {
    /// One call in so many finds the system short of something; 0 is none.
    pub(crate) shortage: usize,
    /// One call in so many panics; 0 is none.
    pub(crate) panic: usize,
    /// True if sockets can be spliced.
    pub(crate) splices: bool,
    /// True if something happens between two calls.
    pub(crate) interleaves: bool,
    /// True if it tells how much of what was sent is not acknowledged.
    pub(crate) tells_memory: bool,
}

/// The answer of an address of the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Site {
    Up,
    Refusing,
    /// No answer comes.
    Silent,
    /// Its backlog is full: UNIX tells at once, TCP takes its time.
    Full,
}

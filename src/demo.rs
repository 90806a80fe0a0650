//! `tcpause demo`: not there yet.

use std::process::ExitCode;

/// Shows the main job.
pub(crate) fn run() -> ExitCode {
    crate::fail(1, "demo: not there yet")
}

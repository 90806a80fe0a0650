//! The scale of the load tests: one variable for all of them.

use std::env;

/// Sets how much work the load tests do: `1` by default; a greater number multiplies it; `soak` takes the long forms of
/// `make soak`.
const SCALE: &str = "TCPAUSE_SCALE";

/// Returns how much of something a test does: `usual` times the scale, or `soak`.
pub(crate) fn amount(usual: usize, soak: usize) -> usize {
    match env::var(SCALE).ok().as_deref() {
        None => usual,
        Some("soak") => soak,
        Some(factor) => {
            usual * factor.parse::<usize>().expect("TCPAUSE_SCALE is a number or `soak`")
        }
    }
}

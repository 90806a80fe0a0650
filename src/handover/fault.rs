//! Faults that tests of a debug build ask for: `TCPAUSE_HANDOVER_AT=taker:ready:kill` ends the taker right before it says that
//! it is ready. The third word is `kill`, `stop`, `exit` or `panic`. On the way back to a process whose number stays, the sides
//! are `back-giver` and `back-taker`. A fault happens once, as several threads say some messages.

#[cfg(debug_assertions)]
use std::{
    env,
    sync::atomic::{AtomicBool, Ordering},
};

/// Environment variable that names a fault.
#[cfg(debug_assertions)]
const VARIABLE: &str = "TCPAUSE_HANDOVER_AT";

/// Set while this process gives everything back.
#[cfg(debug_assertions)]
static GIVES_BACK: AtomicBool = AtomicBool::new(false);

/// First argument of a process that takes everything back.
#[cfg(debug_assertions)]
const TAKE_BACK: &str = "--take-back";

/// Set once the fault has happened.
#[cfg(debug_assertions)]
static HAS_HAPPENED: AtomicBool = AtomicBool::new(false);

/// Milliseconds of this thread's own time until a signal has reached it. Those while the process is stopped do not count.
#[cfg(debug_assertions)]
const DELIVERY_MILLIS: usize = 50;

/// Records whether this process gives everything back.
pub(crate) fn give_back(begins: bool) {
    #[cfg(debug_assertions)]
    GIVES_BACK.store(begins, Ordering::Relaxed);
    #[cfg(not(debug_assertions))]
    let _ = begins;
}

/// Has the fault happen that was asked for at this message of this side.
#[cfg(debug_assertions)]
#[expect(clippy::panic, reason = "a test asks for it")]
pub(crate) fn happen(side: &str, message: &str) {
    let is_back = match side {
        "giver" => GIVES_BACK.load(Ordering::Relaxed),
        _ => env::args().nth(1).as_deref() == Some(TAKE_BACK),
    };
    let back = if is_back { "back-" } else { "" };
    if let Ok(fault) = env::var(VARIABLE)
        && let Some(action) = fault.strip_prefix(&format!("{back}{side}:{message}:"))
        && !HAS_HAPPENED.swap(true, Ordering::Relaxed)
    {
        use rustix::process::{Signal, getpid, kill_process};

        match action {
            "kill" | "stop" => {
                let signal = if action == "kill" { Signal::KILL } else { Signal::STOP };
                kill_process(getpid(), signal).ok();
                // It reaches the first thread at once, and this one a moment later.
                for _millisecond in 0..DELIVERY_MILLIS {
                    std::thread::park_timeout(std::time::Duration::from_millis(1));
                }
            }
            "exit" => std::process::exit(3),
            "panic" => panic!("{fault}"),
            _ => log::error!("{VARIABLE}: {action} is no fault"),
        }
    }
}

/// Does nothing: a release build has no faults.
#[cfg(not(debug_assertions))]
pub(crate) fn happen(_side: &str, _message: &str) {}

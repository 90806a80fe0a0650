//! The lines of the log about pauses, each with its fields.

use std::fmt;

use log::Level;

use super::{
    EndReason,
    leases::{Ended, Lease, Terms, Timestamp, mode_name},
};
use crate::{
    config::{HalfClosed, duration::format_duration},
    sys,
};

/// Logs the begin of a pause, or the renewal of one, while that many connections run, some of them steered.
pub(super) fn log_begin(terms: &Terms, is_renewed: bool, connections: u64, steered: Option<u64>) {
    let (event, verb) =
        if is_renewed { ("renewed", "pause renewed") } else { ("paused", "paused") };
    log::info!(
        event = event, pause = terms.name, by = terms.by, reason = terms.reason,
        mode = mode_name(terms.mode), ttl_seconds = terms.ttl.map(|ttl| ttl.as_secs_f64()),
        connections = connections, steered = steered;
        "{verb} by {terms}; connections that run: {connections}{}", of_steered(steered, terms)
    );
}

/// Returns the words about the steered connections among those that run.
fn of_steered(steered: Option<u64>, terms: &Terms) -> String {
    match (steered, terms.quiet) {
        (None | Some(0), _) => String::new(),
        (Some(steered), None) => format!(", steered: {steered}"),
        (Some(steered), Some(_)) => format!(", steered, which cannot be drained: {steered}"),
    }
}

/// Logs the end of each of these pauses. If the proxy resumes with them, the last line tells it.
pub(super) fn log_end(ended: &Ended, reason: EndReason<'_>, held: u64) {
    let Some((last, others)) = ended.leases.split_last() else {
        if let EndReason::Lifted { by } = reason {
            log::debug!("asked to resume by {by}: there was nothing to lift");
        }
        return;
    };
    let lines = others.iter().map(|lease| (lease, None)).chain([(last, ended.paused_since)]);
    for (lease, paused_since) in lines {
        log_lease_end(lease, reason, paused_since, held);
    }
}

/// Logs the end of a pause. If the proxy resumes with it, the line tells the time since `paused_since`, in which others may
/// have held it.
fn log_lease_end(lease: &Lease, reason: EndReason<'_>, paused_since: Option<Timestamp>, held: u64) {
    let Terms { name, by, reason: why, .. } = &lease.terms;
    let has_resumed = paused_since.is_some();
    let since = paused_since.unwrap_or(lease.since).at;
    let seconds = sys::now().saturating_duration_since(since).as_secs_f64();
    let (level, event) = match reason {
        EndReason::Lifted { .. } if has_resumed => (Level::Info, "resumed"),
        EndReason::Lifted { .. } => (Level::Info, "lifted"),
        EndReason::Closed => (Level::Info, "caller-gone"),
        // The other hosts stay paused, and the command that it was for may run.
        EndReason::Forced { .. } => (Level::Warn, "forced"),
        // A script that has died, or a wait in vain: no caller has ended the pause as planned.
        EndReason::Expired => (Level::Warn, "expired"),
        EndReason::Undone { .. } => (Level::Warn, "undone"),
    };
    let lifted_by = match reason {
        EndReason::Lifted { by } | EndReason::Forced { by } => Some(by),
        EndReason::Expired | EndReason::Closed | EndReason::Undone { .. } => None,
    };
    let because = Because(why.as_deref());
    let (state, text) = if has_resumed {
        (
            "running",
            format!(
                "resumed after {seconds:.3} s: pause {reason}; it was by {by} as {name:?}{because}; clients held: {held}"
            ),
        )
    } else {
        (
            "paused",
            format!(
                "pause {reason}, after {seconds:.3} s; it was by {by} as {name:?}{because}; it stays paused"
            ),
        )
    };
    log::log!(
        level,
        event = event, pause = name, by = by, reason = why, lifted_by = lifted_by,
        // Whole milliseconds are short in JSON.
        paused_seconds = (seconds * 1e3).round() / 1e3,
        held = held, state = state;
        "{text}"
    );
}

impl fmt::Display for Terms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, reason, by, mode, ttl, quiet, half_closed } = self;
        write!(f, "{by} as {name:?}{}", Because(reason.as_deref()))?;
        if let Some(ttl) = ttl {
            write!(f, " for {}", format_duration(*ttl))?;
        }
        if let Some(quiet) = quiet {
            let what = if quiet.is_postgres() {
                "sessions of PostgreSQL that are idle"
            } else {
                "what is quiet"
            };
            write!(f, ", closing {what} for {}", format_duration(quiet.time()))?;
        }
        if *half_closed == HalfClosed::Drop {
            f.write_str(", dropping held clients that end their stream")?;
        }
        write!(f, ", mode {}", mode_name(*mode))
    }
}

/// Reason of a pause, if it has one, behind the words that lead to it.
struct Because<'a>(Option<&'a str>);

impl fmt::Display for Because<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |reason| write!(f, " because {reason:?}"))
    }
}

impl fmt::Display for EndReason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lifted { by } => write!(f, "lifted by {by}"),
            Self::Forced { by } => write!(f, "lifted by force on this host alone by {by}"),
            Self::Expired => f.write_str("expired"),
            Self::Closed => f.write_str("ended with its connection"),
            Self::Undone { because } => write!(f, "undone: {because}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::pause::{gate::Mode, leases::Quiet};

    #[test]
    fn the_begin_of_a_pause_tells_the_steered_and_that_no_drain_closes_them() {
        let (name, by) = ("a".to_owned(), "a test".to_owned());
        let half_closed = HalfClosed::Serve;
        let plain =
            Terms { name, by, reason: None, mode: Mode::Hold, ttl: None, quiet: None, half_closed };
        let drain = Terms { quiet: Some(Quiet::Any(Duration::ZERO)), ..plain.clone() };
        for steered in [None, Some(0)] {
            assert_eq!(of_steered(steered, &drain), "");
        }
        assert_eq!(of_steered(Some(3), &plain), ", steered: 3");
        assert_eq!(of_steered(Some(3), &drain), ", steered, which cannot be drained: 3");
    }
}

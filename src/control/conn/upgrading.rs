//! Callers that wait for the outcome of an upgrade.

use std::time::{Duration, Instant};

use log::info;

use super::{ControlConn, ControlContext, Halt, HttpError, Peer, STOPPING, State};
use crate::{control::response::Response, handover::request::Upgraded};

/// Longest wait for an outcome, for a program that gives none. The limits of all steps of an upgrade add up to less.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(60);

const NO_UPGRADES: HttpError = (409, "This program cannot upgrade itself.");
/// Answer to a caller whose upgrade has no outcome in time.
pub(super) const NO_OUTCOME: HttpError =
    (504, "The upgrade takes too long: GET /status tells its outcome later, as last_upgrade.");

impl ControlConn {
    /// Asks the program for an upgrade, and begins to wait for its outcome.
    pub(super) fn begin_upgrade(&mut self, context: &ControlContext) -> Result<(), Halt> {
        if context.handle.is_stopping() {
            return Err(Halt::Refused(STOPPING));
        }
        let attempt = context.handle.upgrade_requests().ask().ok_or(NO_UPGRADES)?;
        let by = self.name_with_user();
        info!(event = "upgrade-requested", by = by; "{by} asks for an upgrade");
        self.deadline = Some(Instant::now() + UPGRADE_TIMEOUT);
        self.state = State::Upgrading { attempt };
        Ok(())
    }

    /// Waits for the outcome of the upgrade. A success is told by the process that has taken over.
    pub(super) fn await_upgrade(&mut self, context: &ControlContext) -> Result<(), Halt> {
        let State::Upgrading { attempt } = self.state else { return Ok(()) };
        if self.peer == Peer::Gone {
            return Err(Halt::Done);
        }
        let response = match context.handle.upgrade_requests().outcome(attempt) {
            Some(Ok(upgraded)) => success(&upgraded),
            _ if context.stops_at.is_some() || context.handle.is_stopping() => {
                return Err(Halt::Refused(STOPPING));
            }
            Some(Err(why)) => Response::error(409, &why),
            None => return Err(self.block()),
        };
        self.answer(response.to_bytes(false));
        Ok(())
    }
}

fn success(upgraded: &Upgraded) -> Response {
    let Upgraded { version, pid, connections, stall_seconds } = upgraded;
    let version = serde_json::Value::from(version.as_str());
    // No more digits than a microsecond's.
    let stall_seconds = (stall_seconds * 1e6).round() / 1e6;
    Response::json(format!(
        "{{\"version\": {version}, \"pid\": {pid}, \"connections\": {connections}, \"stall_seconds\": {stall_seconds}}}\n"
    ))
}

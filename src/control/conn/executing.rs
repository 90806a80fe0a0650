//! Callers whose command the executor has.

use std::time::Instant;

use super::{ControlConn, ControlContext, Halt, STARVED, State, Then, switching};
use crate::{
    control::{
        command::{Caller, Command},
        executor::{Answer, Job, Reply},
        pending::PendingPause,
    },
    pause::WaitState,
    sys::sock_diag::peer_uid,
};

impl ControlConn {
    /// Returns true while it cannot move to another process: the executor has its request, or it has paused the fleet.
    pub(in crate::control) fn must_stay(&self) -> bool {
        let is_of_fleet = self.pause.as_ref().is_some_and(PendingPause::is_of_fleet);
        matches!(self.state, State::Executing { .. }) || is_of_fleet
    }

    /// Hands a command to the executor.
    pub(super) fn submit(
        &mut self,
        command: Command,
        context: &mut ControlContext,
    ) -> Result<(), Halt> {
        context.last_request_id += 1;
        let is_change = command.is_change();
        let name = if is_change { self.name_with_user() } else { self.name.clone() };
        let caller = Caller { name, request_id: context.last_request_id };
        let (is_head, reply) = (self.request.is_head(), Reply::default());
        let jobs = match &command {
            Command::Fleet(_) => context.fleet_jobs.as_ref().unwrap_or(&context.jobs),
            Command::Switch { .. } => &context.switch_jobs,
            _ => &context.jobs,
        };
        let late = match &command {
            Command::Switch { .. } => switching::NO_OUTCOME,
            _ => STARVED,
        };
        let job = Job { caller, command, is_head, reply: reply.clone() };
        // It is full only of jobs that were given up and await their turn to be skipped.
        jobs.try_send(job).map_err(|_| STARVED)?;
        self.state = State::Executing { reply, is_change, late };
        self.deadline = Some(Instant::now() + self.timeouts.outcome);
        Ok(())
    }

    /// Names the caller of a change for the log: a port is gone with its caller, and a user stays.
    pub(super) fn name_with_user(&self) -> String {
        let user = peer_uid(&self.socket).map_or_else(String::new, |uid| format!(", uid {uid}"));
        format!("{}{user}", self.name)
    }

    /// Takes the outcome of its request, if it is there.
    pub(super) fn take_outcome(&mut self) -> Result<(), Halt> {
        let State::Executing { reply, .. } = &self.state else { return Ok(()) };
        let (answer, pause) = {
            let mut outcome = reply.lock();
            let answer = outcome.answer.take().ok_or(Halt::Blocked)?;
            (answer, outcome.pause.take())
        };
        match answer {
            Answer::Begun { pause, wait: Some(wait), is_bound } => {
                self.deadline = Instant::now().checked_add(wait.time);
                self.state = State::Pausing { on_timeout: wait.on_timeout, is_bound };
                self.pause = Some(pause);
            }
            Answer::Begun { pause, wait: None, .. } => {
                let is_idle = pause.wait_state() == WaitState::Idle;
                self.begin_answer(pause.success(is_idle).to_endless_bytes(), Then::ConnectionBound);
                self.pause = Some(pause);
            }
            Answer::Written(answer) => {
                // The caller has not asked for more, and its pause is committed even if it has gone.
                pause.into_iter().for_each(PendingPause::commit);
                self.answer(answer);
            }
        }
        Ok(())
    }

    /// Takes the pause that it would lose, also from the executor.
    pub(super) fn take_pause(&mut self) -> Option<PendingPause> {
        match &self.state {
            State::Executing { reply, .. } => reply.take_pause(),
            _ => self.pause.take(),
        }
    }
}

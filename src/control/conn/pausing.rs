//! A caller whose pause waits for idle, or lasts as long as its connection.

use std::{sync::Arc, time::Instant};

use rustix::io::Errno;

use super::{ControlConn, ControlContext, Halt, HttpError, STOPPING, State, Then, read};
use crate::{
    control::{
        pending::{KILL_TIMEOUT, PendingPause},
        query::OnTimeout,
        response::Response,
    },
    pause::WaitState,
};

const HALF_CLOSED: HttpError = (
    400,
    "A caller that closes its sending side counts as gone, and its pause is undone: keep it open.",
);
const ENDED: HttpError =
    (409, "The pause has ended while it waited: it has expired, or was lifted.");

impl ControlConn {
    /// Waits until the pause is idle.
    pub(super) fn pause(&mut self, means: &mut ControlContext) -> Result<(), Halt> {
        let State::Pausing { is_tied, .. } = self.state else { return Ok(()) };
        if self.gone {
            return Err(Halt::Done);
        }
        // Over TCP this may be all that is ever heard of a caller that has been killed.
        if self.half_closed {
            // For the log, it is gone.
            drop(self.claim.take());
            return Err(Halt::Refused(HALF_CLOSED));
        }
        if is_tied {
            self.hear(means)?;
        }
        // A proxy that stops is idle in the end, and nothing to begin a restart behind.
        if means.stops_at.is_some() || means.handle.is_stopping() {
            return Err(Halt::Refused(STOPPING));
        }
        // Before the look, lest a moment between them be missed.
        means.bell.await_idle();
        if self.conclude() {
            return Ok(());
        }
        Err(Halt::Blocked)
    }

    /// Answers if the wait of the pause is over.
    fn conclude(&mut self) -> bool {
        let State::Pausing { is_tied, ref seat, .. } = self.state else { return false };
        let Some(claim) = &self.claim else { return false };
        match claim.look() {
            WaitState::Busy => return false,
            WaitState::Ended => {
                self.forget_claim();
                let (status, text) = ENDED;
                self.answer(Response::error(status, text).to_bytes(false));
            }
            WaitState::Idle if is_tied => {
                let (bytes, seat) = (claim.success(true).to_endless_bytes(), Arc::clone(seat));
                self.begin_answer(bytes, Then::Attach(seat));
            }
            WaitState::Idle => self.answer(claim.success(true).to_bytes(false)),
        }
        true
    }

    /// The pause is not idle in time.
    pub(super) fn time_out(&mut self) -> Result<(), Halt> {
        if self.gone || self.half_closed {
            return Err(Halt::Done);
        }
        if self.conclude() {
            return Ok(());
        }
        let State::Pausing { on_timeout, .. } = &mut self.state else { return Ok(()) };
        let Some(mut claim) = self.claim.take() else { return Err(Halt::Done) };
        let handle = claim.handle().clone();
        match on_timeout {
            OnTimeout::Resume => claim.undo("it was not idle in time"),
            OnTimeout::Keep => claim.keep(),
            OnTimeout::Kill => {
                // If that does not help, nothing will.
                *on_timeout = OnTimeout::Resume;
                claim.kill();
                self.claim = Some(claim);
                self.deadline = Some(Instant::now() + KILL_TIMEOUT);
                return Ok(());
            }
        }
        self.answer(PendingPause::failure(&handle).to_bytes(false));
        Ok(())
    }

    /// The pause lasts until the caller's end of stream, or until it ends otherwise.
    pub(super) fn attend(&mut self, means: &mut ControlContext) -> Result<(), Halt> {
        if let Err(halt) = self.hear(means) {
            self.claim.take().into_iter().for_each(PendingPause::close);
            return Err(halt);
        }
        if means.stops_at.is_none() && self.claim.as_ref().is_some_and(PendingPause::holds) {
            return Err(Halt::Blocked);
        }
        self.forget_claim();
        self.end_answer()
    }

    /// Takes what the caller sends to renew its pause: so much in a turn that others have theirs.
    fn hear(&mut self, means: &mut ControlContext) -> Result<(), Halt> {
        match read(&self.socket, &mut means.scratch) {
            Ok(0) => Err(Halt::Done),
            Ok(_) => {
                self.ready = true;
                if let Some(claim) = &self.claim {
                    claim.renew();
                }
                Ok(())
            }
            Err(Errno::AGAIN) => Ok(()),
            Err(_) => Err(Halt::Done),
        }
    }

    /// There is nothing that could be undone.
    pub(super) fn forget_claim(&mut self) {
        if let Some(claim) = self.claim.take() {
            claim.forget();
        }
    }
}

//! Callers whose pause waits for idle, or lasts as long as their connection.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    io::{Errno, retry_on_intr},
    net::{SendFlags, send},
};

use super::{ControlConn, ControlContext, Halt, HttpError, Peer, STOPPING, State, Then, read};
use crate::{
    control::{
        pending::{KILL_TIMEOUT, PendingPause},
        query::OnTimeout,
        response::Response,
    },
    fleet::BootTime,
    handle::Handle,
    pause::WaitState,
    sys::boot::boot_time,
};

/// Longest wait for the end of a pause of the fleet: a request to etcd, and the hosts' resume.
const END_TIMEOUT: Duration = Duration::from_secs(5);

const HALF_CLOSED: HttpError = (
    400,
    "A caller that closes its sending side counts as gone, and its pause is undone: keep it open.",
);
const ENDED: HttpError =
    (409, "The pause has ended while it waited: it has expired, or was lifted.");

impl ControlConn {
    /// Waits until the pause is idle.
    pub(super) fn pause(&mut self, context: &mut ControlContext) -> Result<(), Halt> {
        let State::Pausing { is_bound, .. } = self.state else { return Ok(()) };
        match self.peer {
            Peer::Open => {}
            // Over TCP this may be all that is ever heard of a caller that has been killed. For the log, it is gone.
            Peer::HalfClosed => {
                drop(self.pause.take());
                return Err(Halt::Refused(HALF_CLOSED));
            }
            Peer::Gone => return Err(Halt::Done),
        }
        if is_bound {
            self.hear(context)?;
        }
        // A proxy that stops is idle in the end, and nothing to begin a restart behind.
        if context.stops_at.is_some() || context.handle.is_stopping() {
            return Err(Halt::Refused(STOPPING));
        }
        // Before the look, lest a moment between them be missed.
        context.notifier.await_idle();
        if self.conclude() {
            return Ok(());
        }
        Err(Halt::Blocked)
    }

    /// Answers if the wait of the pause is over.
    fn conclude(&mut self) -> bool {
        let State::Pausing { is_bound, .. } = self.state else { return false };
        let Some(pause) = &self.pause else { return false };
        match pause.wait_state() {
            WaitState::Busy => return false,
            WaitState::Ended => {
                self.forget_pause();
                let (status, text) = ENDED;
                self.answer(Response::error(status, text).to_bytes(false));
            }
            WaitState::Idle if is_bound => {
                self.begin_answer(pause.success(true).to_endless_bytes(), Then::ConnectionBound);
            }
            WaitState::Idle => self.answer(pause.success(true).to_bytes(false)),
        }
        true
    }

    /// Ends a wait that has lasted too long.
    pub(super) fn time_out(&mut self, handle: &Handle) -> Result<(), Halt> {
        if self.peer != Peer::Open {
            return Err(Halt::Done);
        }
        if self.conclude() {
            return Ok(());
        }
        let State::Pausing { on_timeout, .. } = &mut self.state else { return Ok(()) };
        let Some(mut pause) = self.pause.take() else { return Err(Halt::Done) };
        let is_kept = *on_timeout == OnTimeout::Keep;
        let left = match on_timeout {
            OnTimeout::Resume => {
                let left = pause.left();
                pause.undo("it was not idle in time");
                left
            }
            OnTimeout::Keep => {
                let left = pause.left();
                pause.keep();
                left
            }
            OnTimeout::Kill => {
                // If that does not help, nothing will.
                *on_timeout = OnTimeout::Resume;
                pause.kill();
                self.pause = Some(pause);
                self.deadline = Some(Instant::now() + KILL_TIMEOUT);
                return Ok(());
            }
        };
        self.answer(left.answer(handle, is_kept).to_bytes(false));
        Ok(())
    }

    /// Keeps the pause until the caller's end of stream, or until it ends otherwise.
    pub(super) fn attend(&mut self, context: &mut ControlContext) -> Result<(), Halt> {
        if let Err(halt) = self.hear(context).and_then(|()| self.tell_news()) {
            if self.pause.as_mut().is_some_and(PendingPause::begin_end) {
                self.state = State::Ending;
                self.deadline = Some(Instant::now() + END_TIMEOUT);
                return Ok(());
            }
            self.pause.take().into_iter().for_each(PendingPause::close);
            return Err(halt);
        }
        if context.stops_at.is_none()
            && self.pause.as_ref().is_some_and(|it| it.wait_state() != WaitState::Ended)
        {
            return Err(Halt::Blocked);
        }
        self.pause.take().into_iter().for_each(PendingPause::let_go);
        self.end_answer()
    }

    /// Waits until a pause of the fleet has ended on all hosts.
    pub(super) fn await_end(&mut self, context: &ControlContext) -> Result<(), Halt> {
        if self.peer == Peer::Gone {
            return Err(Halt::Done);
        }
        let is_over =
            self.pause.as_ref().is_none_or(|pause| pause.wait_state() == WaitState::Ended);
        if is_over || context.stops_at.is_some() { self.finish_end() } else { Err(Halt::Blocked) }
    }

    /// Tells the caller in a line how its pause of the fleet has ended.
    pub(super) fn finish_end(&mut self) -> Result<(), Halt> {
        let Some(pause) = self.pause.take() else { return Err(Halt::Done) };
        let is_over = pause.wait_state() == WaitState::Ended;
        let hosts: Vec<String> = pause.waiting_for().into_iter().map(|it| it.host).collect();
        let line = serde_json::json!({"ended": is_over, "still_paused": hosts});
        // A caller that does not take it, or has gone, does not want to know.
        send(&self.socket, format!("{line}\n").as_bytes(), SendFlags::NOSIGNAL).ok();
        pause.forget();
        self.end_answer()
    }

    /// Tells the caller in a line when it cannot be proven any more that its pause holds, and when it can be again; which hosts an
    /// operator has resumed; and behind each proof, for how long it holds. A caller that hears nothing for so long knows that
    /// this process stands still, while other hosts may resume.
    fn tell_news(&mut self) -> Result<(), Halt> {
        let State::ConnectionBound { told_lost, told_forced, told_kept } = &mut self.state else {
            return Ok(());
        };
        let Some(pause) = &self.pause else { return Ok(()) };
        let is_lost = pause.is_lost();
        if is_lost != *told_lost && send_line(&self.socket, &format!("{{\"lost\": {is_lost}}}\n"))?
        {
            *told_lost = is_lost;
        }
        let forced = pause.forced();
        let new = forced.get(*told_forced..).unwrap_or_default();
        if !new.is_empty() {
            let line = serde_json::json!({"forced": new});
            if send_line(&self.socket, &format!("{line}\n"))? {
                *told_forced = forced.len();
            }
        }
        // By the time of now: a process that has stood still until now tells of no proof that is too old.
        let now = BootTime(boot_time());
        let kept = pause.kept_until().filter(|until| *until > now && Some(*until) != *told_kept);
        if let Some(until) = kept {
            let seconds = (until - now).as_secs_f64();
            if send_line(&self.socket, &format!("{{\"kept_seconds\": {seconds:.3}}}\n"))? {
                *told_kept = kept;
            }
        }
        Ok(())
    }

    /// Renews the pause by the bytes that the caller sends, one read a turn, so that others have theirs.
    fn hear(&mut self, context: &mut ControlContext) -> Result<(), Halt> {
        match read(&self.socket, &mut context.scratch) {
            Ok(0) => Err(Halt::Done),
            Ok(_) => {
                self.ready = true;
                self.pause.iter().for_each(PendingPause::renew);
                Ok(())
            }
            Err(Errno::AGAIN) => Ok(()),
            Err(_) => Err(Halt::Done),
        }
    }

    /// Lets go of a pause that has ended.
    fn forget_pause(&mut self) {
        self.pause.take().into_iter().for_each(PendingPause::forget);
    }
}

/// Sends a line. Returns false if there is no room for it now.
fn send_line(socket: &OwnedFd, line: &str) -> Result<bool, Halt> {
    match retry_on_intr(|| send(socket, line.as_bytes(), SendFlags::NOSIGNAL)) {
        Ok(count) if count == line.len() => Ok(true),
        Err(Errno::AGAIN) => Ok(false),
        Ok(_) | Err(_) => Err(Halt::Done),
    }
}

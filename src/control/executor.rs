//! `Executor`: a thread that executes commands, each once, and writes their answers, by the backend if it can.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crossbeam_channel::Receiver;
use log::error;

use super::{
    backend::{Backend, unserved},
    command::{Caller, Command},
    listener::Notifier,
    pending::PendingPause,
    response::Response,
};
use crate::{handle::Handle, log_limit::LogLimit};

/// Request on its way from the front to the executor.
pub(super) struct Job {
    pub(super) caller: Caller,
    pub(super) command: Command,
    /// True if the answer is to have no body.
    pub(super) is_head: bool,
    pub(super) reply: Reply,
}

/// Place of an outcome, shared by the job and the connection that awaits it. It goes with the last of them: a pause that
/// is still in it then, as its caller was given up, is undone.
#[derive(Clone, Default)]
pub(super) struct Reply(Arc<Mutex<Outcome>>);

/// Results of a job so far.
#[derive(Default)]
pub(super) struct Outcome {
    /// The pause that has begun.
    pub(super) pause: Option<PendingPause>,
    /// The answer; empty if the front writes it once the pause is idle.
    pub(super) answer: Option<Vec<u8>>,
}

impl Reply {
    /// Locks the outcome.
    pub(super) fn lock(&self) -> MutexGuard<'_, Outcome> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the pause out, so that the lock is free while it is undone.
    pub(super) fn take_pause(&self) -> Option<PendingPause> {
        self.lock().pause.take()
    }

    /// Returns true while another holder is left.
    fn is_awaited(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

/// Thread that executes commands, before it runs.
pub(super) struct Executor {
    pub(super) jobs: Receiver<Job>,
    pub(super) handle: Handle,
    pub(super) backend: Backend,
    pub(super) notifier: Arc<Notifier>,
    /// Longest wait for the backend to do its part of one answer.
    pub(super) silence: Duration,
    pub(super) log_limit: LogLimit,
}

impl Executor {
    /// Carries out jobs until the front has gone, except for those that were given up before their turn.
    pub(super) fn run(mut self) {
        while let Ok(job) = self.jobs.recv() {
            if job.reply.is_awaited() {
                self.carry_out(job);
                self.notifier.notify();
            }
        }
    }

    /// Carries out one job. A panic costs the answer and nothing else: a pause stands only behind a 201.
    fn carry_out(&mut self, job: Job) {
        let Job { caller, command, is_head, reply } = job;
        let answer =
            catch_unwind(AssertUnwindSafe(|| self.answer(command, &caller, is_head, &reply)))
                .unwrap_or_else(|_| {
                    error!("a defect: the control API panicked at a request of {}", caller.name);
                    drop(reply.take_pause());
                    let text = "The control API has a defect: the log says more.";
                    Some(unserved(&Response::error(500, text), is_head))
                });
        reply.lock().answer = answer;
    }

    fn answer(
        &mut self,
        command: Command,
        caller: &Caller,
        is_head: bool,
        reply: &Reply,
    ) -> Option<Vec<u8>> {
        let is_written_by_front = command.awaited().is_some();
        let response = self.execute(command, caller, reply);
        if is_written_by_front && reply.lock().pause.is_some() {
            return Some(Vec::new());
        }
        Some(self.write(&response, is_head))
    }

    /// Executes a command.
    fn execute(&self, command: Command, caller: &Caller, reply: &Reply) -> Response {
        let is_pause = matches!(command, Command::Pause(_));
        let pause = is_pause.then(|| PendingPause::new(self.handle.clone(), caller.clone()));
        let response = command.execute(caller, &self.handle);
        match pause {
            Some(pause) if response.status == 201 => reply.lock().pause = Some(pause),
            Some(pause) => pause.undo("its request has failed"),
            None => {}
        }
        response
    }

    /// Has the backend write an answer. Where it cannot, the command is not executed again, and later ones do not wait.
    fn write(&mut self, response: &Response, is_head: bool) -> Vec<u8> {
        self.backend.write(response, is_head, self.silence).unwrap_or_else(|error| {
            if let Some(more) = self.log_limit.allow(Instant::now()) {
                error!(
                    "the control API cannot get an answer: {error}; it is written without tiny_http{more}"
                );
            }
            unserved(response, is_head)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use crossbeam_channel::bounded;
    use mio::Poll;

    use super::{super::request::Request, *};

    /// Has jobs executed, all of them sent before the first is. Returns the replies of those that are awaited.
    fn execute(handle: &Handle, requests: &[(&str, &str, bool)]) -> Vec<Reply> {
        let (sender, jobs) = bounded(requests.len());
        let mut replies = Vec::new();
        for (request_id, (method, target, is_awaited)) in (1..).zip(requests) {
            let request = Request { method: (*method).into(), target: (*target).into() };
            let (caller, reply) = (Caller { name: "a test".into(), request_id }, Reply::default());
            let command = Command::parse(&request).unwrap();
            replies.extend(is_awaited.then(|| reply.clone()));
            sender.send(Job { caller, command, is_head: false, reply }).ok().unwrap();
        }
        drop(sender);
        let executor = Executor {
            jobs,
            handle: handle.clone(),
            backend: Backend::without(),
            notifier: Arc::new(Notifier::new(&Poll::new().unwrap()).unwrap()),
            silence: Duration::ZERO,
            log_limit: LogLimit::default(),
        };
        executor.run();
        replies
    }

    #[test]
    fn a_command_that_was_given_up_before_its_turn_is_not_executed() {
        let handle = super::super::tests::handle();
        handle.pause();
        execute(&handle, &[("DELETE", "/paused", false)]);
        assert!(handle.is_paused());
        execute(&handle, &[("DELETE", "/paused", true), ("PUT", "/paused", false)]);
        assert!(!handle.is_paused());
    }

    #[test]
    fn a_pause_whose_answer_nobody_takes_is_undone() {
        for target in ["/paused", "/paused?wait=1h", "/paused?while=connected"] {
            let handle = super::super::tests::handle();
            let replies = execute(&handle, &[("PUT", target, true)]);
            assert!(handle.is_paused(), "{target}");
            drop(replies);
            assert!(!handle.is_paused(), "{target}");
        }
    }

    #[test]
    fn a_pause_that_panics_behind_its_lease_is_undone() {
        let handle = super::super::tests::handle();
        let changes = AtomicUsize::new(0);
        handle.pauses().watch(move || {
            let change = changes.fetch_add(1, Ordering::SeqCst);
            assert!(change >= 2, "the first pause panics, and so does its undoing");
        });
        for (expected, is_paused) in [("500", false), ("201", true)] {
            let replies = execute(&handle, &[("PUT", "/paused", true)]);
            let answer = replies[0].lock().answer.take().unwrap();
            assert_eq!(&String::from_utf8(answer).unwrap()[9..12], expected);
            assert_eq!(handle.is_paused(), is_paused, "{expected}");
        }
    }
}

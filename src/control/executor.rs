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
    command::{Awaited, Caller, Command},
    listener::Notifier,
    metrics::Source,
    pending::{Pauser, PendingPause},
    query::Wait,
    response::Response,
};
use crate::{fleet::Fleet, handle::Handle, log_limit::LogLimit};

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
    /// The pause that has begun and whose answer is written here.
    pub(super) pause: Option<PendingPause>,
    /// The answer, once it is there.
    pub(super) answer: Option<Answer>,
}

/// Answer of the executor to the front.
pub(super) enum Answer {
    /// The answer to the caller.
    Written(Vec<u8>),
    /// A pause has begun. The front writes the answer: at once, or when the wait is over.
    Begun { pause: PendingPause, wait: Option<Wait>, is_bound: bool },
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
    /// Fleet of the executor that carries its requests out.
    pub(super) fleet: Option<Fleet>,
    pub(super) backend: Backend,
    pub(super) metrics: Arc<Source>,
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
                self.carry_out(&job);
                self.notifier.notify();
            }
        }
    }

    /// Carries out one job. A panic costs the answer and nothing else: a pause is committed only behind a 201.
    fn carry_out(&mut self, job: &Job) {
        let answer = catch_unwind(AssertUnwindSafe(|| self.answer(job))).unwrap_or_else(|_| {
            error!("a defect: the control API panicked at a request of {}", job.caller.name);
            if let Some(pause) = job.reply.take_pause() {
                pause.undo("its request has failed");
            }
            let text = "The control API has a defect: the log says more.";
            Answer::Written(unserved(&Response::error(500, text), job.is_head))
        });
        job.reply.lock().answer = Some(answer);
    }

    fn answer(&mut self, job: &Job) -> Answer {
        let Job { caller, command, is_head, reply } = job;
        // Made first: a pause whose command panics is undone.
        let pauser = match &self.fleet {
            Some(fleet) => Pauser::Fleet(fleet.clone()),
            None => Pauser::Proxy(self.handle.clone()),
        };
        let pause = PendingPause::new(pauser, caller.clone());
        let executed =
            command.clone().execute(caller, &self.handle, self.fleet.as_ref(), &self.metrics);
        let response = match (executed, command.awaited()) {
            (None, Some(Awaited::Pause { wait, is_bound })) => {
                return Answer::Begun { pause, wait, is_bound };
            }
            (None, _) => {
                reply.lock().pause = Some(pause);
                Response::empty(201)
            }
            (Some(response), _) => {
                pause.forget();
                response
            }
        };
        // An answer that nobody awaits any more must not keep others waiting, nor its pause from being undone.
        if !reply.is_awaited() {
            return Answer::Written(Vec::new());
        }
        Answer::Written(self.write(&response, *is_head))
    }

    /// Has the backend write an answer. Where it cannot, the command is not executed again, and later ones do not wait.
    fn write(&mut self, response: &Response, is_head: bool) -> Vec<u8> {
        self.backend.write(response, is_head, self.silence).unwrap_or_else(|error| {
            if let Some(more) = self.log_limit.allow(Instant::now()) {
                error!(
                    "the control API cannot get an answer: {error}; it is written without the server{more}"
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

    use super::{
        super::{index::Scope, request::Request},
        *,
    };

    /// Has jobs executed, all of them sent before the first is. Returns the replies of those that are awaited.
    fn execute(handle: &Handle, requests: &[(&str, &str, bool)]) -> Vec<Reply> {
        let (sender, jobs) = bounded(requests.len());
        let mut replies = Vec::new();
        for (request_id, (method, target, is_awaited)) in (1..).zip(requests) {
            let request =
                Request { method: (*method).into(), target: (*target).into(), accepts_html: false };
            let (caller, reply) = (Caller { name: "a test".into(), request_id }, Reply::default());
            let command = Command::parse(&request, Scope::Full).unwrap();
            replies.extend(is_awaited.then(|| reply.clone()));
            sender.send(Job { caller, command, is_head: false, reply }).ok().unwrap();
        }
        drop(sender);
        let executor = Executor {
            jobs,
            handle: handle.clone(),
            fleet: None,
            backend: Backend::without(),
            metrics: Arc::new(Source::new()),
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
            let Some(Answer::Written(answer)) = replies[0].lock().answer.take() else { panic!() };
            assert_eq!(&String::from_utf8(answer).unwrap()[9..12], expected);
            assert_eq!(handle.is_paused(), is_paused, "{expected}");
        }
    }
}

//! Callers that switch the upstream, whose look at it takes a while, and those that wait for the end of its connections.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, TryRecvError, bounded};

use super::{
    ControlConn, ControlContext, Halt, HttpError, Peer, STARVED, STOPPING, State, unserved,
};
use crate::{
    config::address::Address,
    control::{
        command::{Command, refuse_switch},
        query::Switch,
        response::Response,
    },
    handle::switch::SwitchError,
    sys::SocketAddress,
};

/// Time beyond `upstream.connect-timeout` for a look-up whose resolver does not answer.
const LOOK_UP_SPARE: Duration = Duration::from_secs(1);

/// Answer to a caller whose switch is still under way, as the disk does not take the state file.
pub(super) const NO_OUTCOME: HttpError =
    (504, "The switch takes too long, and may be done later: see GET /upstream.");

/// The way to what an examination of an upstream has found.
pub(super) type Examination = Receiver<Result<Box<[SocketAddress]>, SwitchError>>;

impl ControlConn {
    /// Begins to wait for the examination of an upstream.
    pub(super) fn begin_switch(
        &mut self,
        wanted: Switch,
        context: &mut ControlContext,
    ) -> Result<(), Halt> {
        if context.handle.is_stopping() {
            return Err(Halt::Refused(STOPPING));
        }
        if context.handle.is_upstream(address(&wanted, context)) {
            return self.submit(Command::Switch { wanted, found: None }, context);
        }
        self.deadline = None;
        self.state = State::Switching { wanted, examination: None };
        Ok(())
    }

    /// Waits for the examination, which begins here, and then has the switch executed.
    pub(super) fn await_examination(&mut self, context: &mut ControlContext) -> Result<(), Halt> {
        if self.peer == Peer::Gone {
            return Err(Halt::Done);
        }
        if context.stops_at.is_some() || context.handle.is_stopping() {
            return Err(Halt::Refused(STOPPING));
        }
        let State::Switching { wanted, examination } = &mut self.state else { return Ok(()) };
        let found = match examination.as_ref().map(Receiver::try_recv) {
            None => {
                let time = context.handle.examination_time();
                *examination = Some(examine(wanted, self.permit.as_ref(), context)?);
                self.deadline = Instant::now().checked_add(time + LOOK_UP_SPARE);
                return Err(Halt::Blocked);
            }
            Some(Err(TryRecvError::Empty)) => return Err(Halt::Blocked),
            // Its thread has ended by a panic.
            Some(Err(TryRecvError::Disconnected)) => return Err(Halt::Refused(STARVED)),
            Some(Ok(found)) => found,
        };
        let wanted = wanted.clone();
        match found {
            Ok(found) => self.submit(Command::Switch { wanted, found: Some(found) }, context),
            Err(error) => {
                self.refuse_switch(&error, context);
                Ok(())
            }
        }
    }

    /// Refuses a switch whose examination takes too long, as the resolver does not answer.
    pub(super) fn end_examination(&mut self, context: &ControlContext) {
        if let State::Switching { wanted, .. } = &self.state {
            let address = address(wanted, context);
            let why = format!("{address} does not answer: its name is looked up for too long");
            self.refuse_switch(&SwitchError::Unreachable(why), context);
        }
    }

    fn refuse_switch(&mut self, error: &SwitchError, context: &ControlContext) {
        if let State::Switching { wanted, .. } = &self.state {
            let by = self.name_with_user();
            context.handle.refuse_switch(address(wanted, context), error, &by);
            self.answer(unserved(&refuse_switch(error), false));
        }
    }

    /// Begins to wait for the end of the connections to an upstream. A name that none is known by may be another one's.
    pub(super) fn begin_wait(
        &mut self,
        address: Address,
        timeout: Option<Duration>,
        context: &ControlContext,
    ) {
        let others = context.handle.upstreams_beside(&address).join(", ");
        if !others.is_empty() {
            let text = format!(
                "No upstream in use is called {address}. Write one of {others}, or the number of its address."
            );
            self.answer(unserved(&Response::error(404, &text), self.request.is_head()));
            return;
        }
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.deadline = until;
        self.state = State::AwaitingUpstream { address, until };
    }

    /// Waits until no connection to an upstream is left.
    pub(super) fn await_upstream(&mut self, context: &ControlContext) -> Result<(), Halt> {
        let State::AwaitingUpstream { address, .. } = &self.state else { return Ok(()) };
        if self.peer == Peer::Gone {
            return Err(Halt::Done);
        }
        // A switch that leads back would end the wait while new connections come.
        if context.handle.leads_to(address) {
            self.answer(unserved(&upstream_is_present(address), self.request.is_head()));
            return Ok(());
        }
        // Before the look, lest a moment between them be missed.
        context.notifier.await_idle();
        if context.handle.connections_to(address) == 0 {
            self.answer(unserved(&Response::empty(204), self.request.is_head()));
            return Ok(());
        }
        if context.stops_at.is_some() {
            return Err(Halt::Refused(STOPPING));
        }
        Err(self.block())
    }
}

/// Returns the answer to a caller that has waited in vain for the last connection to an upstream.
pub(super) fn upstream_in_use(address: &Address, connections: u64) -> Response {
    let sentence = format!(
        "The time is up: connections to {address} are still there. GET /upstream counts them."
    );
    let text = serde_json::Value::from(sentence);
    let body = format!("{{\"error\": {text}, \"status\": 504, \"active\": {connections}}}\n");
    Response { status: 504, ..Response::json(body) }
}

/// Returns the answer to a caller that waits for the last connection to the present upstream.
fn upstream_is_present(address: &Address) -> Response {
    let sentence = format!(
        "New connections lead to {address}: switch to another upstream before. GET /upstream shows the present one."
    );
    Response::error(409, &sentence)
}

fn address<'a>(wanted: &'a Switch, context: &'a ControlContext) -> &'a Address {
    wanted.to.as_ref().unwrap_or_else(|| context.handle.configured_upstream())
}

/// Starts the examination on a thread of its own, as it blocks. The thread holds the caller's permit to wait, so that there
/// are not more of them than callers may wait.
fn examine(
    wanted: &Switch,
    permit: Option<&Arc<()>>,
    context: &ControlContext,
) -> Result<Examination, Halt> {
    let (sender, examination) = bounded(1);
    let (handle, notifier) = (context.handle.clone(), Arc::clone(&context.notifier));
    let (address, check, permit) =
        (address(wanted, context).clone(), wanted.check, permit.map(Arc::clone));
    let examine = move || {
        let found = handle.examine(&address, check);
        // A caller that has gone does not want to know.
        sender.send(found).ok();
        drop(permit);
        notifier.notify();
    };
    let thread = thread::Builder::new().name("switch".to_owned()).spawn(examine);
    thread.map(|_thread| examination).map_err(|_error| Halt::Refused(STARVED))
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream};

    use super::*;
    use crate::control::{index::Scope, tests::context};

    #[test]
    fn a_wait_that_ends_with_the_last_connection_is_no_wait_in_vain() {
        let mut context = context();
        let (mut peer, socket) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut caller = ControlConn::new(socket.into(), Scope::Full, context.timeouts);
        let until = Some(Instant::now());
        caller.deadline = until;
        caller.state = State::AwaitingUpstream { address: Address::tcp("127.0.0.1", 9), until };
        assert!(caller.drive(&mut context));
        let mut line = [0; 12];
        peer.read_exact(&mut line).unwrap();
        assert_eq!(line, *b"HTTP/1.1 204");
    }
}

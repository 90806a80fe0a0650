//! Clients that are not served: their way into a rejection, and the steps of it.

use super::{
    Connection, Context, Rejection, State, Verdict,
    deadline::Deadline,
    endpoint::Registration,
    reject::{self, Reject},
};
use crate::{admission::semaphore::Permit, stats::cause::CloseCause};

impl Connection {
    /// Begins to reject a waiting client.
    pub(crate) fn reject(&mut self, cause: CloseCause, context: &mut Context<'_>) -> Verdict {
        if let Err(cause) = self.take_header(self.left()) {
            return Verdict::Close(cause);
        }
        let (reject, next) = Reject::new(&mut self.client, context.reject_policy);
        self.replace_state(State::Rejecting(Rejection { reject, cause, delivered: (0, 0) }));
        self.rejecting(next, context)
    }

    /// Ends the stream to a client that is not served, without an answer, and discards what it still sends.
    pub(crate) fn close_gracefully(
        &mut self,
        cause: CloseCause,
        context: &mut Context<'_>,
    ) -> Verdict {
        let (reject, next) = Reject::close_gracefully(&mut self.client);
        self.replace_state(State::Rejecting(Rejection { reject, cause, delivered: (0, 0) }));
        self.rejecting(next, context)
    }

    /// Begins the TLS handshake of a client to reject.
    pub(crate) fn begin_handshake(&mut self, permit: Permit, context: &mut Context<'_>) -> Verdict {
        let State::Rejecting(it) = &mut self.state else { return Verdict::Stay };
        let next = it.reject.begin_handshake(&mut self.client, permit, context.reject_policy);
        self.rejecting(next, context)
    }

    /// Carries out the next step of a rejection.
    pub(super) fn rejecting(&mut self, next: reject::Next, context: &Context<'_>) -> Verdict {
        if matches!(next, reject::Next::Answered | reject::Next::Reset) {
            context.counters.rejected.add(1);
        }
        let Registration { registry, client: token, .. } = context.registration;
        let State::Rejecting(Rejection { cause, .. }) = self.state else { return Verdict::Stay };
        match next {
            reject::Next::Wait if self.client.await_room(registry, token) => Verdict::Stay,
            reject::Next::Wait | reject::Next::Again => Verdict::Again,
            reject::Next::WaitIn(deadline) => Verdict::Enter(deadline),
            reject::Next::Answered => Verdict::Enter(Deadline::Lingering),
            reject::Next::Reset => {
                self.client.socket().reset_on_close();
                Verdict::Close(cause)
            }
            reject::Next::Close => Verdict::Close(cause),
        }
    }
}

//! Copies of descriptors, and the processes that have them: during a hand-over two have one of each.
//!
//! The giver calls nothing on what it has lent from the beginning on, nor does the taker on what it got but to register
//! it, until one of them goes on. A process that is gone leaves without a word: a socket ends with its last copy.

use std::time::Duration;

use mio::{Interest, Token};
use rustix::io::Errno;

use crate::{
    kernel::{Backlog, Kernel, LinkId, PipeId},
    link::{Link, Mask},
};

/// A descriptor of one process.
#[derive(Debug)]
pub(crate) struct Descriptor {
    object: Object,
    process: usize,
}

/// The kernel's object behind a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Object {
    Socket(LinkId),
    /// The reading end of a pipe, and its writing end.
    Source(PipeId),
    Sink(PipeId),
    Listener(usize),
}

/// The number of no process.
const NOBODY: usize = usize::MAX;

/// The processes of a schedule, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Processes {
    /// The process that works, or is to give everything to the taker.
    worker: usize,
    /// The time from which it works.
    pub(crate) began: Duration,
    /// The process that is to take over, from the beginning of a hand-over until one of the two goes on.
    taker: Option<usize>,
    /// The number of processes so far, apart from the first.
    last: usize,
    /// True while the giver ends, as the taker has everything.
    is_ending: bool,
}

/// The registration of a socket or a listener with the taker's epoll instance.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Watch {
    pub(crate) token: Token,
    pub(crate) interest: Interest,
    pub(crate) has_edge: bool,
}

impl Descriptor {
    /// Returns the first copy, in the process that works.
    pub(crate) fn new(object: Object) -> Self {
        crate::with(|kernel| {
            let process = kernel.processes.worker;
            *kernel.copies(object) += 1;
            Self { object, process }
        })
    }

    /// Returns a copy in the process that is to take over, as SCM_RIGHTS makes it.
    pub(crate) fn send(&self) -> Self {
        crate::with(|kernel| {
            let Processes { worker, taker, .. } = kernel.processes;
            assert_eq!(self.process, worker, "a descriptor of another process is given");
            *kernel.copies(self.object) += 1;
            Self { object: self.object, process: taker.expect("a hand-over") }
        })
    }

    /// Returns the copy of an object that is there, in the process that is to take over.
    pub(crate) fn sent(object: Object) -> Self {
        crate::with(|kernel| {
            *kernel.copies(object) += 1;
            Self { object, process: kernel.processes.taker.expect("a hand-over") }
        })
    }

    pub(crate) fn object(&self) -> Object {
        self.object
    }

    /// Checks that its process may make a call that others notice.
    pub(crate) fn may_act(&self) {
        crate::with(|kernel| {
            let Processes { worker, taker, .. } = kernel.processes;
            assert!(taker.is_none(), "a call during the hand-over: {self:?}");
            assert_eq!(self.process, worker, "a call of a process that is gone: {self:?}");
        });
    }

    /// Returns whether its process works.
    pub(crate) fn is_at_work(&self) -> bool {
        crate::with(|kernel| {
            self.process == kernel.processes.worker && kernel.processes.taker.is_none()
        })
    }

    /// Returns whether it is the taker's, and that is not at work yet.
    pub(crate) fn is_parked(&self) -> bool {
        crate::with(|kernel| kernel.processes.taker == Some(self.process))
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        crate::with(|kernel| kernel.close_copy(self));
    }
}

impl Kernel {
    /// A turn begins. What the last one has left is only learnt now.
    pub(crate) fn begin_turn(&mut self) {
        let (before, now) = (self.turn_began, self.now);
        if std::mem::take(&mut self.is_cut_short) {
            for link in self.links.iter_mut().filter(|link| link.story.learnt >= before) {
                link.story.learnt = now;
            }
        }
        self.turn_began = now;
        self.switches.begin_turn();
    }

    /// A hand-over begins.
    pub(crate) fn begin_hand_over(&mut self) {
        assert!(self.processes.taker.is_none(), "two hand-overs at once");
        self.processes.last += 1;
        self.processes.taker = Some(self.processes.last);
    }

    pub(crate) fn is_handed_over(&self) -> bool {
        self.processes.taker.is_some()
    }

    /// The taker is dead, and its epoll instance with it; the giver goes on.
    pub(crate) fn thaw(&mut self) {
        self.processes.taker = None;
        self.links.iter_mut().for_each(|link| link.next = None);
        self.backlogs.iter_mut().for_each(|backlog| backlog.next = None);
    }

    /// The giver ends without a word, as the taker has everything.
    pub(crate) fn end_giver(&mut self) {
        (self.processes.worker, self.processes.is_ending) = (NOBODY, true);
    }

    /// The taker goes on. The giver's epoll instance tells nobody anything any more.
    pub(crate) fn take_over(&mut self) {
        self.processes.worker = self.processes.taker.take().expect("a hand-over");
        (self.processes.began, self.processes.is_ending) = (self.now, false);
        for link in &mut self.links {
            let next = link.next.take();
            link.token = next.map(|watch| watch.token);
            link.has_edge = next.is_some_and(|watch| watch.has_edge);
            link.interest = next.map_or(link.interest, |watch| watch.interest);
        }
        for backlog in &mut self.backlogs {
            let next = backlog.next.take();
            backlog.token = next.map(|watch| watch.token);
            backlog.has_edge = next.is_some_and(|watch| watch.has_edge);
        }
    }

    /// The taker registers a socket that the giver has registered, too.
    pub(crate) fn watch(
        &mut self,
        id: LinkId,
        token: Token,
        interest: Interest,
    ) -> Result<(), Errno> {
        self.be_short_before_end()?;
        let clashes = |link: &Link| link.next.is_some_and(|watch| watch.token == token);
        assert!(!self.links.iter().any(clashes), "two sockets have the token {token:?}");
        let link = self.link_mut(id);
        assert!(link.next.is_none(), "a socket is registered twice");
        let has_edge = link.told_to(interest) != Mask::default();
        link.next = Some(Watch { token, interest, has_edge });
        Ok(())
    }

    /// The taker registers a listener.
    pub(crate) fn watch_listener(&mut self, listener: usize, token: Token) -> Result<(), Errno> {
        self.be_short_before_end()?;
        let clashes = |other: &Backlog| other.next.is_some_and(|watch| watch.token == token);
        assert!(!self.backlogs.iter().any(clashes), "two listeners have the token {token:?}");
        let backlog = &mut self.backlogs[listener];
        let has_edge = !backlog.queue.is_empty();
        backlog.next = Some(Watch { token, interest: Interest::READABLE, has_edge });
        Ok(())
    }

    /// Is short now and then, while the giver could still go on instead.
    fn be_short_before_end(&mut self) -> Result<(), Errno> {
        if self.processes.worker == NOBODY {
            return Ok(());
        }
        self.be_short().and_then(|()| self.be_short_of_watches())
    }

    fn copies(&mut self, object: Object) -> &mut usize {
        match object {
            Object::Socket(id) => &mut self.links[id].copies,
            Object::Source(id) => &mut self.pipes[id].sources,
            Object::Sink(id) => &mut self.pipes[id].sinks,
            Object::Listener(id) => &mut self.backlogs[id].copies,
        }
    }

    /// A process closes a descriptor, or has ended.
    fn close_copy(&mut self, descriptor: &Descriptor) {
        let object = descriptor.object;
        let copies = self.copies(object);
        *copies -= 1;
        let is_last = *copies == 0;
        let Processes { worker, taker, .. } = self.processes;
        let is_gone = descriptor.process != worker && taker != Some(descriptor.process);
        // A process that ends takes with it what it has not given: empty pipes.
        let is_pipe = matches!(object, Object::Source(_) | Object::Sink(_));
        let may_end = is_pipe || !is_gone || !self.processes.is_ending;
        assert!(!is_last || may_end, "{object:?} ends with its process, as nobody has taken it");
        assert!(
            is_gone || is_last || taker.is_some() || std::thread::panicking(),
            "a close that nobody sees"
        );
        match object {
            Object::Socket(id) if is_last => self.close(id),
            Object::Listener(id) if is_last => self.close_listener(id),
            _ => {}
        }
    }
}

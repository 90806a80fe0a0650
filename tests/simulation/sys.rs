//! `sys.rs` on the simulated kernel: the same names, the same promises. What needs no kernel is the real one's.

#[path = "rcvbuf.rs"]
pub(crate) mod rcvbuf;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use mio::{Interest, Registry, Token};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::{
    call,
    copies::Object,
    drive::{Course, with_both, with_course},
    kernel::{Kernel, LinkId, PipeId},
    pause::gate::Mode,
    sys::tcp_info::TcpInfo,
};

pub(crate) use crate::copies::Descriptor;
pub(crate) use crate::real_sys::{
    Dialled, EVERYTHING, KEEPALIVE_INTERVAL, READABLE, Read, SocketAddress, is_port_shortage,
    is_shortage, socket_file, tcp_info,
};

/// Longer than any schedule: no host of the simulation vanishes.
pub(crate) const SWEEP_TIME: Duration = Duration::from_secs(24 * 60 * 60);

pub(crate) type Lent<'a> = &'a Descriptor;

/// The words of a socket, which are checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SocketWords {
    is_unix: bool,
    is_probed: bool,
}

/// The words of a listener, which are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ListenerWords {
    index: usize,
}

#[derive(Debug)]
pub(crate) struct Socket {
    descriptor: Descriptor,
    link: LinkId,
    is_unix: bool,
    /// True if the peer is probed often.
    is_probed: bool,
}

/// One of the worker's listeners.
#[derive(Debug)]
pub(crate) struct Listener {
    descriptor: Descriptor,
    index: usize,
}

/// The two ends of a pipe.
#[derive(Debug)]
pub(crate) struct PipeEnds {
    source: Descriptor,
    sink: Descriptor,
    pipe: PipeId,
}

pub(crate) fn now() -> Instant {
    crate::instant(crate::with(|kernel| kernel.now))
}

/// The clock of the fence, which goes on where the other one stands still.
pub(crate) mod boot {
    pub(crate) fn boot_time() -> std::time::Duration {
        crate::with(|kernel| kernel.boot)
    }
}

pub(crate) fn pipe(_bytes: usize) -> io::Result<PipeEnds> {
    ask(Kernel::pipe).map(PipeEnds::of)
}

impl Socket {
    pub(crate) fn of(link: LinkId, is_unix: bool) -> Self {
        let descriptor = Descriptor::new(Object::Socket(link));
        Self { descriptor, link, is_unix, is_probed: false }
    }

    pub(crate) fn describe(&self) -> SocketWords {
        SocketWords { is_unix: self.is_unix, is_probed: self.is_probed }
    }

    pub(crate) fn lend(&self) -> Lent<'_> {
        &self.descriptor
    }

    pub(crate) fn adopt(descriptor: Descriptor, words: SocketWords) -> Self {
        let Object::Socket(link) = descriptor.object() else { panic!("no socket: {descriptor:?}") };
        let (is_unix, is_probed) = crate::with(|kernel| {
            let link = &kernel.links[link];
            (link.is_unix, link.is_probed)
        });
        let words = (words.is_unix, words.is_probed);
        assert_eq!(words, (is_unix, is_probed), "another socket's words");
        Self { descriptor, link, is_unix, is_probed }
    }

    pub(crate) fn link(&self) -> LinkId {
        self.link
    }

    /// The link for a call that others notice.
    fn acts(&self) -> LinkId {
        self.descriptor.may_act();
        self.link
    }

    pub(crate) fn dial(
        address: &SocketAddress,
        _source: Option<IpAddr>,
    ) -> io::Result<(Self, Dialled)> {
        let (link, is_unix, dialled) = ask(|kernel| kernel.dial(address))?;
        Ok((Self::of(link, is_unix), dialled))
    }

    pub(crate) fn take_dial_error(&self) -> Option<io::Error> {
        let link = self.acts();
        call(|kernel| kernel.take_dial_error(link)).map(io::Error::from)
    }

    pub(crate) fn keep_alive(&self) {}

    pub(crate) fn probe_often(&mut self) {
        if !self.is_unix && !self.is_probed {
            self.is_probed = true;
            self.set_probed();
        }
    }

    pub(crate) fn probe_as_usual(&mut self) {
        if std::mem::take(&mut self.is_probed) {
            self.set_probed();
        }
    }

    fn set_probed(&self) {
        let link = self.acts();
        let is_probed = self.is_probed;
        call(|kernel| kernel.link_mut(link).is_probed = is_probed);
    }

    pub(crate) fn first_interest(&self) -> Interest {
        if self.is_unix { READABLE } else { EVERYTHING }
    }

    pub(crate) fn register(&self, _registry: &Registry, token: Token) -> io::Result<()> {
        let link = self.acts();
        ask(|kernel| kernel.register(link, token, self.first_interest()))?;
        with_both(|course, kernel| {
            if let Some(client) = kernel.links[link].partner {
                kernel.is_dialled(link, client, course);
            }
        });
        Ok(())
    }

    /// A giver has ended before its taker goes on, so a close ends a registration here.
    pub(crate) fn deregister(&self, _registry: &Registry) {}

    pub(crate) fn register_for(
        &self,
        _registry: &Registry,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        assert!(self.descriptor.is_parked(), "only a taker registers what it did not make");
        Ok(crate::with(|kernel| kernel.watch(self.link, token, interest))?)
    }

    pub(crate) fn reregister(
        &self,
        _registry: &Registry,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        let link = self.acts();
        call(|kernel| kernel.reregister(link, token, interest));
        Ok(())
    }

    pub(crate) fn recv(&self, buffer: &mut [u8]) -> io::Result<Read> {
        let link = self.acts();
        ask(|kernel| kernel.recv(link, buffer, false))
    }

    pub(crate) fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let link = self.acts();
        Ok(ask(|kernel| kernel.recv(link, buffer, true))?.bytes)
    }

    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let link = self.acts();
        ask(|kernel| kernel.send(link, bytes))
    }

    pub(crate) fn shut_down_write(&self) -> io::Result<()> {
        let link = self.acts();
        ask(|kernel| kernel.shut_down_write(link))
    }

    pub(crate) fn reset_on_close(&self) {
        // A process that ends runs no destructor.
        if std::thread::panicking() && !self.descriptor.is_at_work() {
            return;
        }
        let link = self.acts();
        call(|kernel| kernel.link_mut(link).resets_on_close = true);
    }

    pub(crate) fn has_gone(&self, _header: u64) -> bool {
        let link = self.acts();
        with_course(|course| course.look_at_entrant(link));
        call(|kernel| kernel.has_gone(link))
    }

    pub(crate) fn peer(&self) -> String {
        self.link.to_string()
    }

    pub(crate) fn peer_address(&self) -> Option<SocketAddress> {
        None
    }

    pub(crate) fn local_inet(&self) -> Option<SocketAddr> {
        None
    }

    pub(crate) fn is_unix(&self) -> bool {
        self.is_unix
    }

    /// Some are, and some are not.
    pub(crate) fn is_paced(&self) -> bool {
        !self.is_unix && self.link.is_multiple_of(2)
    }

    pub(crate) fn is_self_connected(&self) -> bool {
        false
    }

    pub(crate) fn is_loop(&self, _own: &[SocketAddress]) -> bool {
        false
    }

    pub(crate) fn tcp_info(&self) -> Option<TcpInfo> {
        let link = self.acts();
        call(|kernel| kernel.tcp_info(link))
    }

    pub(crate) fn unacknowledged(&self) -> io::Result<u32> {
        let link = self.acts();
        ask(|kernel| kernel.unacknowledged(link))
    }

    pub(crate) fn has_vanished(&self) -> bool {
        false
    }

    pub(crate) fn shut_down_read(&self) {}
}

impl Listener {
    pub(crate) fn new(index: usize) -> Self {
        Self { descriptor: Descriptor::new(Object::Listener(index)), index }
    }

    /// Returns the listener in a process that is to take over.
    pub(crate) fn sent(index: usize) -> Self {
        Self { descriptor: Descriptor::sent(Object::Listener(index)), index }
    }

    pub(crate) fn describe(&self) -> ListenerWords {
        ListenerWords { index: self.index }
    }

    pub(crate) fn lend(&self) -> Lent<'_> {
        &self.descriptor
    }

    /// Does nothing: the owner of a listener is told of UNIX listeners only, and no schedule asks.
    pub(crate) fn own(&self) {}

    pub(crate) fn adopt(descriptor: Descriptor, words: ListenerWords) -> Self {
        assert_eq!(descriptor.object(), Object::Listener(words.index), "another one's words");
        Self { descriptor, index: words.index }
    }

    /// Its index for a call that others notice.
    fn acts(&self) -> usize {
        self.descriptor.may_act();
        self.index
    }

    pub(crate) fn accept(&self) -> io::Result<(Socket, Option<SocketAddr>)> {
        let holds = || with_course(|course| course.shared.pauses.gate.mode() == Some(Mode::Hold));
        let index = self.acts();
        let held_before = holds();
        let (link, is_unix) = ask(|kernel| kernel.accept(index))?;
        if held_before && holds() {
            let bound = with_course(|course| course.held_bound) as usize;
            crate::with(|kernel| kernel.is_held(link, bound));
        }
        Ok((Socket::of(link, is_unix), None))
    }

    pub(crate) fn is_unix(&self) -> bool {
        crate::with(|kernel| kernel.backlogs[self.index].is_unix)
    }

    pub(crate) fn is_shared(&self) -> bool {
        self.is_unix()
    }

    /// Returns false: the simulation ends with its sockets.
    pub(crate) fn is_inherited(&self) -> bool {
        false
    }

    pub(crate) fn refuse_more(&self) {
        let index = self.acts();
        with_course(Course::arrive_late);
        call(|kernel| {
            let backlog = &mut kernel.backlogs[index];
            backlog.takes_more &= !backlog.is_unix;
        });
    }

    pub(crate) fn cut_backlog(&self) {
        let index = self.acts();
        call(|kernel| kernel.backlogs[index].takes_more = false);
    }

    pub(crate) fn register(&self, _registry: &Registry, token: Token) -> io::Result<()> {
        if self.descriptor.is_parked() {
            return Ok(crate::with(|kernel| kernel.watch_listener(self.index, token))?);
        }
        let index = self.acts();
        ask(|kernel| kernel.register_listener(index, token))
    }

    pub(crate) fn deregister(&self, _registry: &Registry) {
        // A taker's has not been registered before.
        if !self.descriptor.is_parked() {
            let index = self.acts();
            call(|kernel| kernel.backlogs[index].token = None);
        }
    }
}

impl PipeEnds {
    fn of(pipe: PipeId) -> Self {
        let (source, sink) = (Object::Source(pipe), Object::Sink(pipe));
        Self { source: Descriptor::new(source), sink: Descriptor::new(sink), pipe }
    }

    pub(crate) fn lend(&self) -> [Lent<'_>; 2] {
        [&self.source, &self.sink]
    }

    pub(crate) fn adopt([source, sink]: [Descriptor; 2]) -> Self {
        let Object::Source(pipe) = source.object() else { panic!("no source: {source:?}") };
        assert_eq!(sink.object(), Object::Sink(pipe), "the ends of two pipes");
        Self { source, sink, pipe }
    }

    pub(crate) fn splice_from(&self, source: &Socket, len: usize) -> io::Result<usize> {
        self.sink.may_act();
        let link = source.acts();
        ask(|kernel| kernel.splice_from(self.pipe, link, len))
    }

    pub(crate) fn splice_to(&self, sink: &Socket, len: usize) -> io::Result<usize> {
        self.source.may_act();
        let link = sink.acts();
        ask(|kernel| kernel.splice_to(self.pipe, link, len))
    }
}

fn ask<T>(act: impl FnOnce(&mut Kernel) -> Result<T, Errno>) -> io::Result<T> {
    call(act).map_err(io::Error::from)
}

/// The time since the schedule began.
pub(crate) fn elapsed() -> Duration {
    crate::with(|kernel| kernel.now)
}

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

use crate::{
    call,
    drive::{Course, with_course},
    kernel::{Kernel, LinkId, PipeId},
    patience::with_both,
    pause::gate::Mode,
    sys::tcp_info::TcpInfo,
};

pub(crate) use crate::real_sys::{
    Dialled, EVERYTHING, KEEPALIVE_INTERVAL, READABLE, Read, SocketAddress, is_port_shortage,
    is_shortage, socket_file, tcp_info,
};

/// Longer than any schedule: no host of the simulation vanishes.
pub(crate) const SWEEP_TIME: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Debug)]
pub(crate) struct Socket {
    link: LinkId,
    is_unix: bool,
}

/// One of the worker's listeners.
#[derive(Debug)]
pub(crate) struct Listener(pub(crate) usize);

#[derive(Debug)]
pub(crate) struct PipeEnds(PipeId);

pub(crate) fn now() -> Instant {
    crate::instant(crate::with(|kernel| kernel.now))
}

pub(crate) fn pipe(_bytes: usize) -> io::Result<PipeEnds> {
    ask(Kernel::pipe).map(PipeEnds)
}

impl Socket {
    pub(crate) fn of(link: LinkId, is_unix: bool) -> Self {
        Self { link, is_unix }
    }

    pub(crate) fn link(&self) -> LinkId {
        self.link
    }

    pub(crate) fn dial(
        address: &SocketAddress,
        _source: Option<IpAddr>,
    ) -> io::Result<(Self, Dialled)> {
        let (link, is_unix, dialled) = ask(|kernel| kernel.dial(address))?;
        Ok((Self { link, is_unix }, dialled))
    }

    pub(crate) fn take_dial_error(&self) -> Option<io::Error> {
        call(|kernel| kernel.take_dial_error(self.link)).map(io::Error::from)
    }

    pub(crate) fn keep_alive(&self) {}

    pub(crate) fn first_interest(&self) -> Interest {
        if self.is_unix { READABLE } else { EVERYTHING }
    }

    pub(crate) fn register(&self, _registry: &Registry, token: Token) -> io::Result<()> {
        ask(|kernel| kernel.register(self.link, token, self.first_interest()))?;
        with_both(|course, kernel| {
            if let Some(client) = kernel.links[self.link].partner {
                kernel.is_dialled(self.link, client, course);
            }
        });
        Ok(())
    }

    pub(crate) fn reregister(
        &self,
        _registry: &Registry,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        call(|kernel| kernel.reregister(self.link, token, interest));
        Ok(())
    }

    pub(crate) fn recv(&self, buffer: &mut [u8]) -> io::Result<Read> {
        ask(|kernel| kernel.recv(self.link, buffer, false))
    }

    pub(crate) fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(ask(|kernel| kernel.recv(self.link, buffer, true))?.bytes)
    }

    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        ask(|kernel| kernel.send(self.link, bytes))
    }

    pub(crate) fn shut_down_write(&self) -> io::Result<()> {
        ask(|kernel| kernel.shut_down_write(self.link))
    }

    pub(crate) fn reset_on_close(&self) {
        call(|kernel| kernel.link_mut(self.link).resets_on_close = true);
    }

    pub(crate) fn has_gone(&self) -> bool {
        with_course(|course| course.look_at_entrant(self.link));
        call(|kernel| kernel.has_gone(self.link))
    }

    pub(crate) fn peer(&self) -> String {
        self.link.to_string()
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
        call(|kernel| kernel.tcp_info(self.link))
    }

    pub(crate) fn unacknowledged(&self) -> io::Result<u32> {
        ask(|kernel| kernel.unacknowledged(self.link))
    }

    pub(crate) fn has_vanished(&self) -> bool {
        false
    }

    pub(crate) fn shut_down_read(&self) {}
}

impl Drop for Socket {
    fn drop(&mut self) {
        crate::with(|kernel| kernel.close(self.link));
    }
}

impl Listener {
    pub(crate) fn accept(&self) -> io::Result<(Socket, Option<SocketAddr>)> {
        let holds = || with_course(|course| course.shared.pauses.gate.mode() == Some(Mode::Hold));
        let held_before = holds();
        let (link, is_unix) = ask(|kernel| kernel.accept(self.0))?;
        if held_before && holds() {
            crate::with(|kernel| kernel.is_held(link));
        }
        Ok((Socket { link, is_unix }, None))
    }

    pub(crate) fn is_unix(&self) -> bool {
        crate::with(|kernel| kernel.backlogs[self.0].is_unix)
    }

    pub(crate) fn is_shared(&self) -> bool {
        self.is_unix()
    }

    /// Returns false: the simulation ends with its sockets.
    pub(crate) fn is_inherited(&self) -> bool {
        false
    }

    pub(crate) fn refuse_more(&self) {
        with_course(Course::arrive_late);
        call(|kernel| {
            let backlog = &mut kernel.backlogs[self.0];
            backlog.takes_more &= !backlog.is_unix;
        });
    }

    pub(crate) fn cut_backlog(&self) {
        call(|kernel| kernel.backlogs[self.0].takes_more = false);
    }

    pub(crate) fn register(&self, _registry: &Registry, token: Token) -> io::Result<()> {
        ask(|kernel| kernel.register_listener(self.0, token))
    }

    pub(crate) fn deregister(&self, _registry: &Registry) {
        call(|kernel| kernel.backlogs[self.0].token = None);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        crate::with(|kernel| kernel.close_listener(self.0));
    }
}

impl PipeEnds {
    pub(crate) fn splice_from(&self, source: &Socket, len: usize) -> io::Result<usize> {
        ask(|kernel| kernel.splice_from(self.0, source.link, len))
    }

    pub(crate) fn splice_to(&self, sink: &Socket, len: usize) -> io::Result<usize> {
        ask(|kernel| kernel.splice_to(self.0, sink.link, len))
    }
}

impl Drop for PipeEnds {
    fn drop(&mut self) {
        crate::with(|kernel| kernel.close_pipe(self.0));
    }
}

fn ask<T>(act: impl FnOnce(&mut Kernel) -> Result<T, Errno>) -> io::Result<T> {
    call(act).map_err(io::Error::from)
}

/// The time since the schedule began.
pub(crate) fn elapsed() -> Duration {
    crate::with(|kernel| kernel.now)
}

//! A connection between the worker and a peer, both ends of it: the worker's socket, what is on its way, and the peer.

use std::time::Duration;

use mio::{Interest, Token};
use rustix::io::Errno;

use crate::{
    copies::Watch,
    kernel::{Kernel, LinkId, SYN_INTERVAL, Site},
    patience::Story,
    pattern::PERIOD,
    random::Random,
    sys::EVERYTHING,
};

/// The bits of `epoll_wait`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(clippy::struct_excessive_bools, reason = "the kernel's bits")]
pub(crate) struct Mask {
    /// `EPOLLIN`
    pub(crate) input: bool,
    /// `EPOLLOUT`
    pub(crate) output: bool,
    /// `EPOLLRDHUP`
    pub(crate) input_ended: bool,
    /// `EPOLLHUP`
    pub(crate) hung_up: bool,
    /// `EPOLLERR`
    pub(crate) error: bool,
    /// `EPOLLPRI`
    pub(crate) urgent: bool,
}

/// The role of the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Upstream,
}

/// The end of a stream as its peer saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Orderly,
    Aborted,
}

#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Link {
    pub(crate) side: Side,
    pub(crate) story: Story,
    pub(crate) is_unix: bool,
    /// The link that it is relayed to.
    pub(crate) partner: Option<LinkId>,
    /// The group of addresses that its own is of.
    pub(crate) group: usize,
    /// The first upstream that was dialled for it.
    pub(crate) dialled: Option<LinkId>,
    /// The place in the pattern where the peer's stream begins.
    pub(crate) key: usize,
    /// True if it has left the listener's queue.
    pub(crate) was_accepted: bool,
    /// True if it was accepted by another worker.
    pub(crate) is_from_afar: bool,
    /// An address that has not answered yet.
    pub(crate) dials: Option<usize>,
    /// The beginning of its dial, and its answer or end.
    pub(crate) dialled_at: Duration,
    pub(crate) dial_ended: Option<Duration>,
    /// True if its SYN was dropped, so that the kernel repeats it.
    was_dropped: bool,
    /// True if the upstream has yet to take it out of its backlog.
    pub(crate) is_queued: bool,
    /// True if there is somebody at the other end.
    pub(crate) is_connected: bool,
    /// True if the worker knows; its time may be up before it does.
    pub(crate) is_known: bool,

    // The worker's socket.
    pub(crate) is_open: bool,
    pub(crate) token: Option<Token>,
    pub(crate) interest: Interest,
    pub(crate) has_edge: bool,
    /// The copies of its descriptor, and its registration with a process that is to take over.
    pub(crate) copies: usize,
    pub(crate) next: Option<Watch>,
    /// True if something has changed since a call last said "nothing now".
    pub(crate) is_news: bool,
    /// `sk_err`: told once.
    pub(crate) error: Option<Errno>,
    /// The peer has ended its stream.
    pub(crate) is_ended: bool,
    /// Reset, or refused: nothing goes in or out.
    pub(crate) is_dead: bool,
    /// We have ended ours.
    pub(crate) is_shut: bool,
    pub(crate) resets_on_close: bool,
    /// Keepalive probes come often.
    pub(crate) is_probed: bool,
    /// `SOCK_NOSPACE`: a write has found no room.
    pub(crate) is_starved: bool,
    pub(crate) send_max: usize,
    pub(crate) receive_max: usize,
    /// Bytes moved in this turn.
    pub(crate) moved: usize,
    /// It got an answer without an upstream.
    pub(crate) answered: bool,
    /// True if it was in the queue of a closed listener.
    pub(crate) was_refused: bool,
    /// True if a read or a write has failed for want of memory.
    pub(crate) was_hurt: bool,
    /// True if the worker was made to drop it: by a panic or the end of the grace period.
    pub(crate) was_cut: bool,
    /// True if a panic has closed it without a reset.
    pub(crate) was_cut_mildly: bool,
    /// True if the peer's kernel has reset it, and how many bytes had come by then.
    pub(crate) was_reset: bool,
    pub(crate) owed: usize,

    // The peer's stream: written ≥ arrived ≥ read.
    pub(crate) said: usize,
    /// The place of its last urgent byte.
    pub(crate) urgent: Option<usize>,
    pub(crate) arrived: usize,
    pub(crate) read: usize,
    /// Rest of the PROXY header, which comes before ours.
    pub(crate) header_left: &'static [u8],
    // Ours: written ≥ acknowledged ≥ heard.
    pub(crate) written: usize,
    pub(crate) acked: usize,
    pub(crate) heard: usize,

    // The peer.
    /// The bytes that it writes before it reads on: it may be blocked in that.
    pub(crate) insists: usize,
    pub(crate) peer_shut: bool,
    pub(crate) peer_closed: bool,
    pub(crate) peer_reset: bool,
    /// A reset of ours has come to it.
    pub(crate) peer_is_dead: bool,
    pub(crate) saw: Option<Ending>,
}

impl Link {
    pub(crate) fn new(side: Side, is_unix: bool, random: &mut Random) -> Self {
        let buffer = |random: &mut Random| random.one_of([600, 5_000, 40_000, 300_000]);
        Self {
            side,
            story: Story::default(),
            is_unix,
            partner: None,
            group: 0,
            dialled: None,
            key: random.below(PERIOD),
            was_accepted: false,
            is_from_afar: false,
            dials: None,
            dialled_at: Duration::ZERO,
            dial_ended: None,
            was_dropped: false,
            is_queued: false,
            is_connected: side == Side::Client,
            is_known: side == Side::Client,
            is_open: false,
            token: None,
            interest: EVERYTHING,
            has_edge: false,
            copies: 0,
            next: None,
            is_news: false,
            error: None,
            is_ended: false,
            is_dead: false,
            is_shut: false,
            resets_on_close: false,
            is_probed: false,
            is_starved: false,
            send_max: buffer(random),
            receive_max: buffer(random),
            moved: 0,
            answered: false,
            was_refused: false,
            was_hurt: false,
            was_cut: false,
            was_cut_mildly: false,
            was_reset: false,
            owed: 0,
            said: 0,
            urgent: None,
            arrived: 0,
            read: 0,
            written: 0,
            acked: 0,
            heard: 0,
            header_left: &[],
            insists: 0,
            peer_shut: false,
            peer_closed: false,
            peer_reset: false,
            peer_is_dead: false,
            saw: None,
        }
    }

    /// Returns the bits that `epoll_wait` would tell: `tcp_poll` and `unix_poll`.
    pub(crate) fn mask(&self) -> Mask {
        if self.dials.is_some() {
            return Mask::default();
        }
        let used = self.unsent();
        let has_room =
            if self.is_unix { used * 4 <= self.send_max } else { used * 3 <= self.send_max * 2 };
        let is_over = self.is_ended || self.is_dead;
        Mask {
            input: self.arrived > self.read || is_over,
            output: has_room || !self.is_unix && (self.is_shut || self.is_dead),
            input_ended: is_over,
            hung_up: self.is_dead
                || self.is_ended && (self.is_shut || self.is_unix && self.peer_closed),
            error: self.error.is_some(),
            urgent: self.until_urgent().is_some(),
        }
    }

    /// The part of it that is asked for; a hang-up and an error are told to everybody.
    pub(crate) fn told(&self) -> Mask {
        self.told_to(self.interest)
    }

    /// The part of it that `interest` asks for.
    pub(crate) fn told_to(&self, interest: Interest) -> Mask {
        let all = self.mask();
        let (readable, writable) = (interest.is_readable(), interest.is_writable());
        Mask {
            input: all.input && readable,
            output: all.output && writable,
            input_ended: all.input_ended && readable,
            hung_up: all.hung_up,
            error: all.error,
            urgent: all.urgent && interest.is_priority(),
        }
    }

    /// An edge, if the socket is registered: something about it has changed.
    pub(crate) fn wake(&mut self) {
        self.wake_those(|_interest| true);
    }

    /// Bytes have come: no edge for whoever does not ask for them.
    pub(crate) fn wake_reader(&mut self) {
        self.wake_those(Interest::is_readable);
    }

    /// There is room: no edge for whoever does not ask for it.
    pub(crate) fn wake_writer(&mut self) {
        self.wake_those(Interest::is_writable);
    }

    fn wake_those(&mut self, ask: impl Fn(Interest) -> bool) {
        self.is_news = true;
        self.has_edge |= self.token.is_some() && ask(self.interest);
        if let Some(next) = &mut self.next {
            next.has_edge |= ask(next.interest);
        }
    }

    /// Returns the bytes that occupy the send buffer: until the peer's kernel has it, or on UNIX until the peer has read it.
    pub(crate) fn unsent(&self) -> usize {
        self.written - if self.is_unix { self.heard } else { self.acked }
    }

    /// Returns the number of bytes that can be read before an urgent one, if that has come and was not read.
    pub(crate) fn until_urgent(&self) -> Option<usize> {
        self.urgent.filter(|&at| at < self.arrived)?.checked_sub(self.read)
    }

    /// Returns the result of a read from an empty queue. A reset is told once, to whichever call comes first.
    pub(crate) fn end_of_read(&mut self) -> Result<usize, Errno> {
        if self.is_ended && !self.is_unix {
            return Ok(0);
        }
        match self.error.take() {
            Some(error) => Err(error),
            None if self.is_ended || self.is_dead => Ok(0),
            None => Err(Errno::AGAIN),
        }
    }

    pub(crate) fn may_write(&mut self) -> Result<(), Errno> {
        if self.is_unix && self.peer_closed {
            return Err(Errno::PIPE);
        }
        if self.is_dead || self.error.is_some() {
            return Err(self.error.take().unwrap_or(Errno::PIPE));
        }
        Ok(())
    }

    pub(crate) fn write(&mut self, bytes: usize) {
        self.written += bytes;
        if self.is_unix {
            self.acked = self.written;
        }
    }

    /// The worker closes its socket.
    pub(crate) fn close(&mut self) {
        // What a panic cuts off must not look like an end.
        let would_look_whole = match self.side {
            Side::Client => true,
            Side::Upstream => self.token.is_some() && self.written + self.read > 0,
        };
        self.was_cut_mildly |=
            std::thread::panicking() && would_look_whole && !self.resets_on_close;
        self.is_open = false;
        self.is_connected &= self.is_known;
        self.token = None;
        self.has_edge = false;
        let discards = self.arrived > self.read;
        if self.is_unix {
            self.peer_is_dead |= discards;
        } else if self.dials.take().is_none() && (self.resets_on_close || discards) {
            self.abort();
        }
    }

    /// Our reset: what the peer's kernel has not got is discarded.
    fn abort(&mut self) {
        self.written = self.acked;
        self.peer_is_dead = true;
        self.is_dead = true;
    }

    /// Returns whether the end of our stream has come to the peer.
    pub(crate) fn has_ended_here(&self) -> bool {
        (self.is_shut || !self.is_open) && self.acked == self.written
    }

    /// Returns whether a client that was taken in has nobody at the other end, and nothing of the proxy's either.
    pub(crate) fn waits(&self) -> bool {
        let was_treated = self.partner.is_some() || self.is_left();
        self.side == Side::Client && self.is_open && !was_treated
    }

    /// Returns whether a client is done with, and only goes on sending.
    pub(crate) fn is_left(&self) -> bool {
        self.answered || self.story.drained.is_some()
    }

    /// Returns whether a client was taken out of the queue, and no event can tell of it yet.
    pub(crate) fn is_unregistered(&self) -> bool {
        self.side == Side::Client && self.is_open && self.token.is_none()
    }

    /// Returns whether a dial of the worker's has come to a good end, and goes on.
    pub(crate) fn is_carried(&self) -> bool {
        let is_connected = self.is_connected && self.is_known && self.dials.is_none();
        self.side == Side::Upstream && self.is_open && is_connected && !self.is_dead
    }

    /// Returns whether the peer neither leaves nor was made to.
    pub(crate) fn peer_stays(&self) -> bool {
        !self.peer_is_gone() && !self.peer_shut && !self.story.was_killed
    }

    /// Something may happen on its way. Returns whether anything did.
    pub(crate) fn travel(&mut self, random: &mut Random, is_eager: bool) -> bool {
        let part = |random: &mut Random, all: usize| {
            if is_eager || random.below(2) == 0 { all } else { 1 + random.below(all) }
        };
        if self.is_unix || self.is_dead || self.dials.is_some() {
            return false;
        }
        let window = (self.receive_max + self.read).saturating_sub(self.arrived);
        let incoming = (self.said - self.arrived).min(window);
        let outgoing = (self.written - self.acked)
            .min((self.receive_max + self.heard).saturating_sub(self.acked));
        if self.peer_reset {
            // What it had sent may have been faster, or not.
            self.arrived += if incoming > 0 && !is_eager { random.below(incoming + 1) } else { 0 };
            self.die();
        } else if incoming > 0 && (self.is_open || self.is_waiting()) {
            self.arrived += part(random, incoming);
            self.wake_reader();
        } else if incoming > 0 {
            // Nobody reads here any more: the answer is a reset.
            self.abort();
        } else if self.peer_shut && self.arrived == self.said && !self.is_ended {
            self.is_ended = true;
            self.wake();
        } else if outgoing > 0 && self.peer_closed {
            self.die();
        } else if outgoing > 0 {
            self.acked += part(random, outgoing);
            if self.is_starved && self.mask().output {
                self.is_starved = false;
                self.wake_writer();
            }
        } else {
            return false;
        }
        true
    }

    /// The peer's reset comes: `tcp_reset`.
    fn die(&mut self) {
        self.error = Some(if self.is_ended { Errno::PIPE } else { Errno::CONNRESET });
        self.is_dead = true;
        self.was_reset = true;
        self.owed = self.arrived;
        self.written = self.acked;
        self.wake();
    }

    /// Returns the moment at which the kernel repeats a SYN that was dropped.
    pub(crate) fn syn_repeats_at(&self) -> Option<Duration> {
        let is_dropped = self.is_open && self.dials.is_some() && self.was_dropped;
        is_dropped.then(|| self.dialled_at + SYN_INTERVAL)
    }

    /// The upstream answers a dial, if its backlog has room. Once it was full, the next SYN comes later, and finds some.
    pub(crate) fn answer_dial(&mut self, sites: &[Site], has_room: bool, now: Duration) -> bool {
        match self.dials.map(|site| sites[site]) {
            Some(Site::Up) if self.was_dropped && now < self.dialled_at + SYN_INTERVAL => {
                return false;
            }
            Some(Site::Up) if !self.was_dropped && !has_room => {
                self.was_dropped = true;
                return false;
            }
            Some(Site::Up) => (self.is_connected, self.is_queued) = (true, true),
            Some(Site::Refusing) => {
                self.is_dead = true;
                self.error = Some(Errno::CONNREFUSED);
            }
            Some(Site::Silent | Site::Full) | None => return false,
        }
        self.dials = None;
        self.dial_ended = Some(now);
        self.wake();
        true
    }

    /// Returns the time until the dial was answered or given up, or until `now`.
    pub(crate) fn round_trip(&self, now: Duration) -> Duration {
        self.dial_ended.unwrap_or(now) - self.dialled_at
    }

    /// Returns whether it waits in the listener's queue.
    pub(crate) fn is_waiting(&self) -> bool {
        let has_left = self.was_accepted || self.is_from_afar || self.was_refused;
        self.side == Side::Client && !has_left
    }
}

impl Kernel {
    /// Returns whether the upstream's backlog takes one more.
    pub(crate) fn has_room(&self) -> bool {
        let queued = self.links.iter().filter(|link| link.is_queued && link.is_open).count();
        self.rules.backlog.is_none_or(|max| queued < max)
    }

    /// Something may happen to a connection or to its peer, as far as the network alone has a say.
    pub(crate) fn happen(&mut self, id: LinkId) {
        let has_room = self.has_room();
        let link = &mut self.links[id];
        if link.answer_dial(&self.sites, has_room, self.now) {
            return;
        }
        link.is_queued &= self.random.below(4) > 0;
        link.travel(&mut self.random, false);
    }
}

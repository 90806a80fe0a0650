//! The simulated kernel: what a worker can ask of it, and what it promises.
//!
//! Stream sockets with bounded buffers, edge-triggered events, ends and resets, after the rules of Linux (`tcp_poll`,
//! `tcp_recvmsg`, `tcp_reset`, `unix_poll`, ...). No byte is stored: a stream is a pattern, a queue is a pair of numbers,
//! and what is written somewhere is compared at once with what was read on the other side.

use std::{borrow::Cow, collections::VecDeque, time::Duration};

use mio::{Interest, Token};
use rustix::io::Errno;

use crate::{
    copies::{Processes, Watch},
    crowd::Crowd,
    dead::Probe,
    link::{Link, Side},
    patience::Rules,
    pipes::Pipe,
    proxy_header::own_header,
    random::Random,
    switches::Switches,
    sys::{Dialled, SocketAddress, tcp_info::TcpInfo},
};

pub(crate) use crate::{
    link::Mask,
    tally::Tally,
    weather::{Site, Weather},
};

/// The errors of a shortage.
const SHORTAGES: [Errno; 4] = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];

/// After how long a SYN without an answer is repeated.
pub(crate) const SYN_INTERVAL: Duration = Duration::from_secs(1);

/// The duration of a call.
const CALL_TIME: Duration = Duration::from_micros(2);

pub(crate) type LinkId = usize;
pub(crate) type PipeId = usize;

#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Kernel {
    pub(crate) random: Random,
    /// The time since the schedule began.
    pub(crate) now: Duration,
    /// The beginning of the worker's turn.
    pub(crate) turn_began: Duration,
    /// True if the worker may have left some of what it was told of in this turn to the next one.
    pub(crate) is_cut_short: bool,
    pub(crate) links: Vec<Link>,
    /// One for each listener of the worker.
    pub(crate) backlogs: Vec<Backlog>,
    /// The clients that the worker has taken out of them, in that order.
    pub(crate) accepted: Vec<LinkId>,
    pub(crate) pipes: Vec<Pipe>,
    pub(crate) processes: Processes,
    pub(crate) is_woken: bool,
    pub(crate) is_rival_woken: bool,
    pub(crate) weather: Weather,
    /// The answers of the upstream's addresses.
    pub(crate) sites: Vec<Site>,
    pub(crate) probe: Option<Probe>,
    /// The last time that an address which answers was given up before it did.
    pub(crate) missed: Duration,
    /// The last time that a dial failed.
    pub(crate) failed: Duration,
    /// Since when all of them are there.
    pub(crate) up_since: Option<Duration>,
    pub(crate) rules: Rules,
    pub(crate) switches: Switches,
    pub(crate) crowd: Crowd,
    /// True if the worker may close everything, as the proxy stops.
    pub(crate) may_cut: bool,
    /// True if there was a pause since the turn began.
    pub(crate) was_paused: bool,
    /// Time since the start of the host: moved by the fleet alone, and never while the worker is between two calls.
    pub(crate) boot: Duration,
    /// True if it may reset whoever is served.
    pub(crate) may_kill: bool,
    /// True if it may end whoever it takes in, by order of the operator.
    pub(crate) may_end: bool,
    /// For how long a connection is silent that it may close.
    pub(crate) may_drain: Option<Duration>,
    /// True if it may drop held clients that have ended their stream.
    pub(crate) may_drop: bool,
    /// True if the proxy stops, and may do so with half-closed ones.
    pub(crate) is_stopping: bool,
    /// The earliest dial for the next client that has waited.
    pub(crate) next_by_rate: Duration,
    /// The number of events; a turn without any was in vain.
    pub(crate) progress: u64,
    pub(crate) tally: Tally,
}

/// A listener and who waits there.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Backlog {
    pub(crate) queue: VecDeque<LinkId>,
    pub(crate) is_unix: bool,
    pub(crate) token: Option<Token>,
    pub(crate) has_edge: bool,
    pub(crate) copies: usize,
    pub(crate) next: Option<Watch>,
    pub(crate) is_open: bool,
    pub(crate) takes_more: bool,
}

impl Kernel {
    /// Begins every call.
    pub(crate) fn tick(&mut self) {
        self.now += CALL_TIME;
        if self.weather.panic > 0 && self.random.below(self.weather.panic) == 0 {
            self.weather.panic = 0;
            self.tally.panics += 1;
            std::panic::resume_unwind(Box::new(crate::Injected));
        }
        if self.weather.interleaves && !self.links.is_empty() && self.random.below(4) == 0 {
            let link = self.random.below(self.links.len());
            self.happen(link);
        }
    }

    pub(crate) fn link_mut(&mut self, id: LinkId) -> &mut Link {
        &mut self.links[id]
    }

    /// Fails now and then.
    pub(crate) fn be_short(&mut self) -> Result<(), Errno> {
        if self.weather.shortage > 0 && self.random.below(self.weather.shortage) == 0 {
            self.tally.shortages += 1;
            return Err(SHORTAGES[self.random.below(SHORTAGES.len())]);
        }
        Ok(())
    }

    /// Is short of memory for bytes, which costs a connection: that must look like a reset.
    pub(crate) fn hurt(&mut self, id: LinkId) -> Result<(), Errno> {
        if self.weather.shortage > 0 && self.random.below(20) == 0 {
            self.be_short().inspect_err(|_| {
                self.links[id].was_hurt = true;
                self.progress += 1;
            })?;
        }
        Ok(())
    }

    pub(crate) fn accept(&mut self, listener: usize) -> Result<(LinkId, bool), Errno> {
        assert!(self.backlogs[listener].is_open, "accept of a closed listener");
        self.be_short()?;
        if self.weather.shortage > 0 && self.random.below(self.weather.shortage) == 0 {
            self.progress += 1;
            return Err(Errno::CONNABORTED);
        }
        let id = self.backlogs[listener].queue.pop_front().ok_or(Errno::AGAIN)?;
        self.progress += 1;
        self.tally.clients += 1;
        self.accepted.push(id);
        let link = self.link_mut(id);
        (link.is_open, link.was_accepted) = (true, true);
        Ok((id, link.is_unix))
    }

    /// Another worker accepts a client.
    pub(crate) fn accept_afar(&mut self) -> (LinkId, bool) {
        let is_unix = self.backlogs[0].is_unix;
        let mut link = Link::new(Side::Client, is_unix, &mut self.random);
        self.tally.clients += 1;
        (link.is_open, link.is_from_afar) = (true, true);
        self.links.push(link);
        (self.links.len() - 1, is_unix)
    }

    pub(crate) fn register_listener(&mut self, listener: usize, token: Token) -> Result<(), Errno> {
        self.be_short()?;
        let is_taken = self.backlogs.iter().any(|other| other.token == Some(token));
        assert!(!is_taken, "two listeners have the token {token:?}");
        let backlog = &mut self.backlogs[listener];
        backlog.token = Some(token);
        backlog.has_edge = !backlog.queue.is_empty();
        Ok(())
    }

    pub(crate) fn close_listener(&mut self, listener: usize) {
        let backlog = &mut self.backlogs[listener];
        backlog.is_open = false;
        backlog.token = None;
        for id in std::mem::take(&mut backlog.queue) {
            let link = self.link_mut(id);
            link.was_refused = true;
            link.resets_on_close = true;
            link.close();
        }
    }

    pub(crate) fn dial(
        &mut self,
        address: &SocketAddress,
    ) -> Result<(LinkId, bool, Dialled), Errno> {
        self.try_to_dial(address).inspect_err(|_| self.failed = self.now)
    }

    fn try_to_dial(&mut self, address: &SocketAddress) -> Result<(LinkId, bool, Dialled), Errno> {
        self.be_short()?;
        let is_unix = matches!(address, SocketAddress::Unix(_));
        let site = match address {
            SocketAddress::Inet(address) => usize::from(address.port()),
            SocketAddress::Unix(_) | SocketAddress::Abstract(_) => 0,
        };
        if !is_unix
            && self.weather.shortage > 0
            && self.random.below(2 * self.weather.shortage) == 0
        {
            return Err(Errno::ADDRNOTAVAIL);
        }
        self.progress += 1;
        let at_once = is_unix || self.random.below(3) == 0 && self.has_room();
        let group = self.group_of(site);
        let mut link = Link::new(Side::Upstream, is_unix, &mut self.random);
        (link.is_open, link.group) = (true, group);
        link.dialled_at = self.now;
        // It is the same one for all, as they have no addresses.
        let Cow::Borrowed(header) = own_header(self.rules.send_proxy, None) else {
            panic!("a header without addresses")
        };
        link.header_left = header;
        let dialled = match (self.sites[site], at_once) {
            (Site::Up, true) => {
                (link.is_connected, link.is_known) = (true, true);
                link.dial_ended = Some(self.now);
                Dialled::Connected
            }
            (Site::Refusing, true) => return Err(Errno::CONNREFUSED),
            (Site::Full | Site::Silent, true) if is_unix => return Err(Errno::AGAIN),
            _ => {
                link.dials = Some(site);
                Dialled::InProgress
            }
        };
        self.links.push(link);
        Ok((self.links.len() - 1, is_unix, dialled))
    }

    pub(crate) fn be_short_of_watches(&mut self) -> Result<(), Errno> {
        if self.weather.shortage > 0 && self.random.below(self.weather.shortage) == 0 {
            self.tally.shortages += 1;
            return Err(Errno::NOSPC);
        }
        Ok(())
    }

    pub(crate) fn register(
        &mut self,
        id: LinkId,
        token: Token,
        interest: Interest,
    ) -> Result<(), Errno> {
        let side = self.links[id].side;
        if let Err(errno) = self.be_short().and_then(|()| self.be_short_of_watches()) {
            if side == Side::Upstream {
                self.failed = self.now;
            }
            return Err(errno);
        }
        let clash = self.links.iter().any(|other| other.is_open && other.token == Some(token));
        assert!(!clash, "two sockets have the token {token:?}");
        // The tokens of a connection's two sockets differ in the last bit.
        let partner = self
            .links
            .iter()
            .position(|other| other.is_open && other.token == Some(Token(token.0 ^ 1)));
        let (turn_began, may_end) = (self.turn_began, self.may_end);
        let link = self.link_mut(id);
        link.token = Some(token);
        link.story.may_be_ended |= may_end;
        link.story.came.get_or_insert(turn_began);
        link.interest = interest;
        link.has_edge = link.told() != Mask::default();
        if side == Side::Upstream {
            let partner = partner.expect("an upstream is dialled for a client");
            link.partner = Some(partner);
            let client = self.link_mut(partner);
            assert_eq!((client.read, client.written), (0, 0), "a client waits untouched");
            client.partner = Some(id);
            client.dialled.get_or_insert(id);
            client.answered = false;
        }
        Ok(())
    }

    /// `EPOLL_CTL_MOD`: what is ready is told at once.
    pub(crate) fn reregister(&mut self, id: LinkId, token: Token, interest: Interest) {
        let link = self.link_mut(id);
        assert_eq!(link.token, Some(token), "a socket that is registered");
        link.interest = interest;
        link.has_edge = link.told() != Mask::default();
    }

    pub(crate) fn take_dial_error(&mut self, id: LinkId) -> Option<Errno> {
        let link = self.link_mut(id);
        assert!(link.read + link.written == 0, "SO_ERROR is asked for once bytes flow");
        link.error.take()
    }

    pub(crate) fn has_gone(&mut self, id: LinkId) -> bool {
        let link = self.link_mut(id);
        let mask = link.mask();
        let ended = if link.is_unix { mask.hung_up } else { mask.input_ended };
        let is_reset = mask.error || mask.hung_up && !link.is_unix;
        is_reset || ended && link.arrived == link.read
    }

    /// Returns the kernel's facts of a dialled TCP socket.
    pub(crate) fn tcp_info(&mut self, id: LinkId) -> Option<TcpInfo> {
        let (now, turn_began) = (self.now, self.turn_began);
        let link = self.link_mut(id);
        if link.is_unix {
            return None;
        }
        let taken = link.round_trip(now);
        let info = TcpInfo {
            is_dialled: link.dials.is_some(),
            has_repeated: taken >= SYN_INTERVAL,
            is_unacknowledged: link.written > 0 && link.acked == 0,
            round_trip: taken,
        };
        // It is on its way for longer, unless it is known to be lost.
        if info.is_unacknowledged && !info.has_repeated {
            link.story.unacknowledged = turn_began;
        }
        Some(info)
    }

    pub(crate) fn unacknowledged(&mut self, id: LinkId) -> Result<u32, Errno> {
        if !self.weather.tells_memory {
            return Err(Errno::NOPROTOOPT);
        }
        let link = self.link_mut(id);
        Ok(if link.is_unix { 0 } else { u32::try_from(link.written - link.acked).unwrap() })
    }

    pub(crate) fn close(&mut self, id: LinkId) {
        self.progress += 1;
        if !std::thread::panicking() && self.links[id].side == Side::Client {
            self.is_closed(id);
        }
        self.may_be_drained(id);
        let now = self.now;
        let link = self.link_mut(id);
        assert!(link.is_open || std::thread::panicking(), "closed twice");
        link.dial_ended.get_or_insert(now);
        let (side, was_carried) = (link.side, link.is_carried());
        let (is_known, is_answered) = (self.links[id].is_known, self.links[id].is_connected);
        self.may_have_missed(id);
        self.link_mut(id).close();
        if side == Side::Upstream && !was_carried {
            self.failed = self.now;
        }
        let link = &self.links[id];
        // A client that goes on without it: the attempt has failed. It may be held again, or answered without an upstream.
        if link.side == Side::Upstream
            && let Some(client) = link.partner
            && self.links[client].is_open
            && self.links[client].partner == Some(id)
        {
            let turn_began = self.turn_began;
            let client = &mut self.links[client];
            if client.is_shut || client.is_dead && was_carried {
                // It was closed as quiet, and one of the peers has ended its stream just then.
                client.story.drained.get_or_insert(id);
            }
            client.story.left = turn_began;
            client.partner = None;
            (client.story.is_condemned, client.story.is_doomed) = (false, false);
            // A client that is told to go has not lost its attempt.
            let is_dismissed = client.is_shut;
            if !is_known && !is_dismissed && !std::thread::panicking() {
                self.is_given_up(id, is_answered);
            }
        }
    }
}

//! Bytes of the simulated kernel: what is read of a socket, and what is written to it, and the end of a stream.

use rustix::io::Errno;

use crate::{
    kernel::{Kernel, LinkId},
    link::Side,
    sys::Read,
};

/// The bytes that a connection may move before others have their turn; the excess of a last call hardly counts.
const SHARE: usize = 64 * 1024;
/// One turn may come to a connection in three ways: it is released, driven, and its deadline expires. One more for last calls.
const TURN_BYTES_MAX: usize = 4 * SHARE;

impl Kernel {
    pub(crate) fn recv(
        &mut self,
        id: LinkId,
        buffer: &mut [u8],
        is_peek: bool,
    ) -> Result<Read, Errno> {
        let is_unix = self.links[id].is_unix;
        // UNIX sockets stop at each message with descriptors.
        let stop = if is_unix && self.random.below(4) == 0 {
            self.random.below(3000) + 1
        } else {
            usize::MAX
        };
        // A TCP read stops before an urgent byte, unless it begins with that.
        let urgent = self.links[id].until_urgent().filter(|&bytes| bytes > 0);
        let len = buffer.len().min(stop).min(urgent.unwrap_or(usize::MAX));
        let bytes = self.take(id, len, is_peek)?;
        let link = &self.links[id];
        let start = if is_peek { link.read } else { link.read - bytes };
        crate::pattern::fill(link.key, start, &mut buffer[..bytes]);
        Ok(Read { bytes, was_stopped: bytes == stop })
    }

    /// Takes bytes out of the receive queue.
    pub(crate) fn take(&mut self, id: LinkId, len: usize, is_peek: bool) -> Result<usize, Errno> {
        let link = &mut self.links[id];
        assert!(link.is_open && link.dials.is_none(), "a read of a socket that is not connected");
        self.hurt(id)?;
        let link = &mut self.links[id];
        let bytes = len.min(link.arrived - link.read);
        if bytes == 0 {
            let had_edge = std::mem::take(&mut link.is_news);
            self.progress += u64::from(had_edge);
            return link.end_of_read();
        }
        if !is_peek {
            assert!(
                link.side == Side::Upstream || link.partner.is_some() || link.is_left(),
                "a client is read before it is served"
            );
            assert!(link.partner.is_none() || !link.is_probed, "a served client is probed often");
            // A rejected client has another share.
            let share = if link.is_left() { 2 * TURN_BYTES_MAX } else { TURN_BYTES_MAX };
            assert!(link.moved < share, "more than its share in one turn");
            link.moved += bytes.min(SHARE);
            link.read += bytes;
            self.progress += 1;
            self.tally.bytes += bytes as u64;
        }
        Ok(bytes)
    }

    pub(crate) fn send(&mut self, id: LinkId, bytes: &[u8]) -> Result<usize, Errno> {
        let room = self.room(id)?;
        let fits = room.min(bytes.len());
        let link = &self.links[id];
        if !link.header_left.is_empty() {
            assert!(link.header_left == bytes, "something else than the header comes first");
            return Ok(self.put_header(id, fits));
        }
        match link.partner {
            Some(partner) => {
                let source = &self.links[partner];
                assert!(link.written + bytes.len() <= source.read, "more is sent than was read");
                assert!(
                    crate::pattern::is(source.key, link.written, bytes),
                    "other bytes, or in another order"
                );
            }
            None => self.links[id].answered = true,
        }
        self.put(id, fits);
        if fits < bytes.len() {
            self.links[id].is_starved = true;
        }
        Ok(fits)
    }

    /// Returns the bytes that the send buffer takes now, at least one.
    pub(crate) fn room(&mut self, id: LinkId) -> Result<usize, Errno> {
        let link = &mut self.links[id];
        assert!(link.is_open && link.dials.is_none(), "a write to a socket that is not connected");
        assert!(!link.is_shut, "a write behind the end of the stream");
        self.hurt(id)?;
        let link = &mut self.links[id];
        link.may_write()?;
        let room = link.send_max.saturating_sub(link.unsent());
        if room == 0 {
            link.is_starved = true;
            let had_edge = std::mem::take(&mut link.is_news);
            self.progress += u64::from(had_edge);
            return Err(Errno::AGAIN);
        }
        Ok(room)
    }

    /// Takes bytes of the header, as many as fit or fewer. The peer's stream begins behind it.
    fn put_header(&mut self, id: LinkId, fits: usize) -> usize {
        let taken = 1 + self.random.below(fits);
        self.progress += 1;
        let link = &mut self.links[id];
        link.header_left = &link.header_left[taken..];
        taken
    }

    pub(crate) fn put(&mut self, id: LinkId, bytes: usize) {
        assert!(self.links[id].header_left.is_empty(), "the header is not the first");
        self.progress += 1;
        self.links[id].write(bytes);
        self.has_moved(id);
    }

    pub(crate) fn shut_down_write(&mut self, id: LinkId) -> Result<(), Errno> {
        let may_drop = self.may_drop;
        let link = self.link_mut(id);
        assert!(link.is_open && !link.is_shut, "a second end of one stream");
        assert!(link.is_dead || link.header_left.is_empty(), "an end before the header");
        link.answered |= link.partner.is_none();
        if link.is_dead {
            return Err(Errno::NOTCONN);
        }
        link.story.was_dropped |= may_drop && link.partner.is_none() && link.is_ended;
        link.is_shut = true;
        link.wake();
        match (link.partner, link.side) {
            (None, _) => {}
            (Some(partner), Side::Client)
                if self.links[id].story.may_be_ended || !self.has_all(id, partner) =>
            {
                self.is_drained(id, partner);
            }
            (Some(partner), _) => {
                let source = &self.links[partner];
                assert!(source.is_ended, "an end that nobody has sent");
                let written = self.links[id].written;
                assert_eq!(written, source.said, "an end before the last byte");
            }
        }
        self.progress += 1;
        Ok(())
    }

    /// Returns whether it is an end of the source's that the sink gets now. Where quiet connections are closed, the source
    /// may have ended its stream just then.
    fn has_all(&self, sink: LinkId, source: LinkId) -> bool {
        let (sink, source) = (&self.links[sink], &self.links[source]);
        source.is_ended && (self.may_drain.is_none() || sink.written == source.said)
    }
}

//! Pipes of the simulated kernel, and what is spliced through them.

use std::collections::VecDeque;

use rustix::io::Errno;

use crate::kernel::{Kernel, LinkId, PipeId};

#[derive(Debug)]
pub(crate) struct Pipe {
    /// The copies of its reading end, and of its writing end.
    pub(crate) sources: usize,
    pub(crate) sinks: usize,
    bytes_max: usize,
    /// Bytes of a stream: the stream, their place in it, and their number.
    parts: VecDeque<(LinkId, usize, usize)>,
}

impl Kernel {
    pub(crate) fn pipe(&mut self) -> Result<PipeId, Errno> {
        self.be_short()?;
        let bytes_max = 1 << (12 + self.random.below(9));
        self.pipes.push(Pipe { sources: 0, sinks: 0, bytes_max, parts: VecDeque::new() });
        Ok(self.pipes.len() - 1)
    }

    /// Returns the number of open pipes.
    pub(crate) fn open_pipes(&self) -> usize {
        self.pipes.iter().filter(|pipe| pipe.sources + pipe.sinks > 0).count()
    }

    pub(crate) fn splice_from(
        &mut self,
        pipe: PipeId,
        id: LinkId,
        len: usize,
    ) -> Result<usize, Errno> {
        if !self.weather.splices {
            return Err(Errno::INVAL);
        }
        let room = self.pipes[pipe].bytes_max.saturating_sub(self.pipes[pipe].len());
        if room == 0 {
            return Err(Errno::AGAIN);
        }
        // Its slots may be used up sooner than its bytes.
        let len = if self.random.below(4) == 0 { 1 + self.random.below(len) } else { len };
        let start = self.links[id].read;
        // It never gets past an urgent byte, and returns what is due behind the last one.
        let len = len.min(room).min(self.links[id].until_urgent().unwrap_or(usize::MAX));
        let bytes = self.take(id, len, false)?;
        if bytes > 0 {
            self.tally.spliced += bytes as u64;
            self.pipes[pipe].parts.push_back((id, start, bytes));
        }
        Ok(bytes)
    }

    pub(crate) fn splice_to(
        &mut self,
        pipe: PipeId,
        id: LinkId,
        len: usize,
    ) -> Result<usize, Errno> {
        let room = self.room(id)?;
        let mut left = room.min(len);
        let before = left;
        while left > 0 {
            let (written, partner) = (self.links[id].written, self.links[id].partner);
            let part = self.pipes[pipe].parts.front_mut().expect("bytes in the pipe");
            assert_eq!(Some(part.0), partner, "another connection's bytes");
            assert_eq!(part.1, written, "bytes are lost or in another order");
            let bytes = part.2.min(left);
            (part.1, part.2) = (part.1 + bytes, part.2 - bytes);
            if part.2 == 0 {
                self.pipes[pipe].parts.pop_front();
            }
            left -= bytes;
            self.put(id, bytes);
        }
        if before < len {
            self.links[id].is_starved = true;
        }
        Ok(before)
    }
}

impl Pipe {
    fn len(&self) -> usize {
        self.parts.iter().map(|part| part.2).sum()
    }
}

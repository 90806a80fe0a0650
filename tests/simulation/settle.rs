//! Delivery of all that is on its way: events to the worker, and everything to everybody once nothing else is to happen.

use crate::{
    drive::Stage,
    event::Event,
    kernel::{Kernel, Mask},
    link::{Link, Side},
    worker::WAKER,
};

impl Kernel {
    /// The events that are due, or a part of them.
    pub(crate) fn gather(&mut self, events: &mut Vec<Event>) {
        let takes_all = self.random.below(2) == 0;
        if std::mem::take(&mut self.is_woken) {
            events.push(Event { token: WAKER, mask: Mask { input: true, ..Mask::default() } });
        }
        for backlog in &mut self.backlogs {
            if let Some(token) = backlog.token.filter(|_| std::mem::take(&mut backlog.has_edge)) {
                events.push(Event { token, mask: Mask { input: true, ..Mask::default() } });
            }
        }
        for link in &mut self.links {
            if link.has_edge && (takes_all || self.random.below(2) == 0) {
                link.has_edge = false;
                let mask = link.told();
                if let Some(token) = link.token.filter(|_| mask != Mask::default()) {
                    if !link.is_known {
                        (link.story.known, link.story.learnt) = (self.now, self.now);
                    }
                    link.is_known = true;
                    events.push(Event { token, mask });
                }
            }
        }
    }

    /// Whatever is on its way arrives, and everybody reads. False when nothing is left to do.
    pub(crate) fn settle(&mut self, stage: Stage) -> bool {
        let is_eager = self.random.below(2) == 0;
        let mut is_done = true;
        for id in 0..self.links.len() {
            let has_room = self.has_room();
            let link = &mut self.links[id];
            if matches!(stage, Stage::Closing | Stage::Stopping) {
                link.peer_shuts();
            }
            let moved = link.answer_dial(&self.sites, has_room, self.now)
                | std::mem::take(&mut link.is_queued)
                | link.peer_insists()
                | link.travel(&mut self.random, is_eager)
                | link.peer_reads(&mut self.random, is_eager);
            is_done &= !moved;
        }
        // What is left of the edges comes too.
        !is_done || self.links.iter().any(|link| link.has_edge)
    }

    /// Whatever the worker has left behind arrives. False when nothing is left to do.
    pub(crate) fn flush(&mut self) -> bool {
        let mut moved = false;
        for link in &mut self.links {
            moved |= link.peer_insists()
                | link.travel(&mut self.random, true)
                | link.peer_reads(&mut self.random, true);
        }
        moved
    }

    /// Upstreams say something more.
    pub(crate) fn answer(&mut self) {
        for link in self.links.iter_mut().filter(|link| link.side == Side::Upstream) {
            link.peer_writes(&mut self.random, false, false);
        }
    }

    /// One side of each connection ends its stream, the same of all.
    pub(crate) fn half_close(&mut self) {
        let side = self.random.one_of([Side::Client, Side::Upstream]);
        self.links.iter_mut().filter(|link| link.side == side).for_each(Link::peer_shuts);
    }
}

//! The rules: after each turn, at each idle moment, at the end of each stage, and in the end.
//!
//! That bytes are those that were sent, each once and in order, is looked at in `kernel.rs`, whenever some are written; so
//! is that no client is read before it is served, that no stream is ended twice, or before its last byte.

use std::time::Duration;

use crate::{
    drive::{Course, with_course},
    kernel::{Kernel, Tally},
    link::{Ending, Link, Side},
    patience::is_quiet,
};

/// After each turn, which asks for another after `timeout`.
pub(crate) fn turn(timeout: Option<Duration>) {
    with_course(|course| {
        course.look_at_turn(timeout);
        let shared = &course.shared;
        let counters = shared.workers.counters(0);
        let served = counters.connecting.get() + counters.active.get();
        assert_eq!(
            shared.pauses.gate.passes(),
            served,
            "who is served is counted, and nobody else"
        );
        crate::with(|kernel| {
            let open = |side| {
                let links = kernel.links.iter();
                links.filter(|link| link.token.is_some() && link.side == side).count() as u64
            };
            assert_eq!(open(Side::Client), counters.clients(), "the gauges tell what there is");
            let places = shared.admission.clients.taken();
            assert_eq!(
                kernel.clients_counted(),
                places,
                "each client has a place, and nobody else"
            );
            assert!(open(Side::Upstream) <= served, "an upstream without a pass");
            assert!(kernel.open_pipes() <= course.pipes_max, "too many pipes");
            let doomed = kernel.links.iter().find(|link| link.story.is_doomed && link.is_open);
            assert!(doomed.is_none(), "one is not reset that was to be: {doomed:#?}");
        });
    });
}

/// At each moment, clients that were accepted have ended or are there.
pub(crate) fn balance(course: &Course) {
    let balance = course.shared.workers.counters(0).balance();
    let present = balance.held + balance.connecting + balance.active + balance.rejecting;
    let ended = balance.closed.iter().sum::<u64>();
    assert_eq!(balance.accepted, ended + present, "{balance:?}");
}

/// Whoever is told that the proxy is idle finds no connection.
pub(crate) fn idle() {
    crate::with(|kernel| {
        for link in &kernel.links {
            let is_served = link.side == Side::Upstream || link.partner.is_some();
            assert!(!link.is_open || !is_served, "idle, and a connection is open: {link:#?}");
        }
    });
}

/// Once everybody has read what there was.
pub(crate) fn arrived(kernel: &Kernel, course: &Course) {
    let open = kernel.links.iter().filter(|link| link.is_open && link.side == Side::Client);
    let is_full = open.count() >= course.shared.admission.clients.max();
    assert!(is_full || is_nobody_queued(kernel), "a client is stranded in the backlog");
    for link in kernel.links.iter().filter(|link| !link.was_cut) {
        if let Some(other) = pair(kernel, link)
            && !course.was_cut
            && [link, other].iter().all(|link| is_there(link))
        {
            assert_eq!(other.heard, link.said, "bytes do not arrive: {link:#?}, {other:#?}");
        }
    }
}

fn is_nobody_queued(kernel: &Kernel) -> bool {
    kernel.backlogs.iter().all(|backlog| backlog.queue.is_empty())
}

/// Once all that is quiet was closed.
pub(crate) fn drained(kernel: &Kernel, course: &Course) {
    for link in kernel.links.iter().filter(|link| link.side == Side::Client) {
        if let Some(other) = pair(kernel, link)
            && [link, other].iter().all(|link| is_there(link))
            && link.is_open
        {
            let is_owed = !is_quiet(link) && !other.peer_shut;
            assert!(is_owed, "a quiet connection stays: {link:#?}, {other:#?}");
        }
    }
    let is_left = course.shared.pauses.drain.quiet().is_none();
    assert!(!is_left, "the order is lost");
}

/// Once one side of each connection has ended its stream.
pub(crate) fn half_closed(kernel: &Kernel, course: &Course) {
    for link in kernel.links.iter().filter(|link| link.peer_shut && !link.was_cut) {
        if let Some(other) = pair(kernel, link)
            && !course.was_cut
            && [link, other].iter().all(|link| is_there(link))
        {
            let end = Some(Ending::Orderly);
            assert_eq!(other.saw, end, "an end does not arrive: {link:#?}, {other:#?}");
        }
    }
}

/// Once all have ended their streams.
pub(crate) fn closed(kernel: &Kernel) {
    assert!(is_nobody_queued(kernel), "a client is stranded in the backlog");
    for link in &kernel.links {
        let other = link.partner.map(|partner| &kernel.links[partner]);
        assert!(!link.is_open, "a connection does not end: {link:#?}, {other:#?}");
    }
}

/// In the end.
pub(crate) fn judge(kernel: &mut Kernel, course: &Course) -> Tally {
    assert_eq!(kernel.open_pipes(), 0, "a pipe is left over");
    // What the worker has sent as its last is still on its way.
    for link in &mut kernel.links {
        link.is_queued = false;
        link.peer_shuts();
    }
    while kernel.flush() {}
    closed(kernel);
    judge_order(kernel, course);
    let mut carried = 0;
    let resets =
        kernel.links.iter().filter(|link| link.saw == Some(Ending::Aborted)).count() as u64;
    for link in kernel.links.iter().filter(|link| link.side == Side::Client && !link.was_cut) {
        match pair(kernel, link) {
            _ if course.was_cut => {}
            Some(other) if link.story.was_killed || other.story.was_killed => {
                judge_killed(link, other);
                judge_killed(other, link);
            }
            Some(other) => {
                carried += 1;
                judge_flow(link, other);
                judge_flow(other, link);
            }
            None => match link.story.drained {
                // It was reset while it lingered.
                Some(_) if link.story.was_killed => {}
                Some(upstream) if !kernel.links[upstream].is_connected => judge_dismissed(link),
                Some(upstream) => judge_drained(link, &kernel.links[upstream]),
                None => judge_unserved(link, course),
            },
        }
    }
    Tally { carried, resets, ..kernel.tally }
}

/// Checks that clients are served in the order in which the worker has accepted them.
fn judge_order(kernel: &Kernel, course: &Course) {
    if course.was_cut || !course.rules.keep_order() {
        return;
    }
    let mut last = None;
    for link in kernel.accepted.iter().map(|&id| &kernel.links[id]).filter(|link| !link.was_cut) {
        let is_killed = |other: &Link| link.story.was_killed || other.story.was_killed;
        if pair(kernel, link).is_some_and(|other| !is_killed(other)) {
            assert!(last < link.dialled, "one is served before its turn: {link:#?}");
            last = link.dialled;
        }
    }
}

/// Judges the bytes that the upstream got of its client's stream, or the client of its upstream's.
fn judge_flow(source: &Link, sink: &Link) {
    if sink.peer_closed || sink.peer_reset {
        return;
    }
    let all = sink.heard == source.said;
    let tells = || format!("{source:#?}, {sink:#?}");
    assert!(sink.saw.is_some(), "no end is seen: {}", tells());
    if source.was_hurt || sink.was_hurt {
        let looks_whole = sink.saw == Some(Ending::Orderly) && !sink.is_unix;
        assert!(!looks_whole || all, "a stream that was cut looks whole: {}", tells());
        return;
    }
    if !source.peer_closed && !source.peer_reset {
        assert!(all && sink.saw == Some(Ending::Orderly), "a stream is cut: {}", tells());
    } else if source.peer_reset && source.side == Side::Client && source.read == 0 {
        // It left before its upstream was there.
    } else if source.was_reset || source.peer_reset || source.is_unix {
        assert!(sink.heard >= source.owed, "what came before is lost: {}", tells());
        let looks_whole = sink.saw == Some(Ending::Orderly) && !sink.is_unix;
        let was_whole = all && (source.peer_shut || source.is_unix);
        assert!(!looks_whole || was_whole, "an aborted stream looks whole: {}", tells());
    } else {
        assert!(all, "what came before is lost: {}", tells());
    }
}

/// Judges the ends that both sides saw of a connection that was reset.
fn judge_killed(source: &Link, sink: &Link) {
    let is_whole = source.peer_shut && sink.heard == source.said;
    let is_told = sink.is_unix || sink.saw == Some(Ending::Aborted) || is_whole;
    let is_gone = sink.peer_closed || sink.peer_reset;
    // An upstream that was still dialled for is only closed.
    let is_told = is_told || sink.side == Side::Upstream && !sink.resets_on_close;
    assert!(is_gone || is_told, "a reset is not told: {source:#?}, {sink:#?}");
}

/// Judges the end that a client saw whose upstream was still dialled for, and that was closed in order.
fn judge_dismissed(client: &Link) {
    if is_there(client) {
        let is_orderly = client.saw == Some(Ending::Orderly) || client.said > client.read;
        assert!(is_orderly, "a client is dismissed by a reset: {client:#?}");
    }
}

/// Judges the bytes that both sides got of a connection that was closed as it was quiet.
fn judge_drained(client: &Link, upstream: &Link) {
    for link in [client, upstream].into_iter().filter(|link| is_there(link)) {
        assert_eq!(link.heard, link.written, "what came before is lost: {link:#?}");
        // One that goes on sending is reset in the end.
        let is_orderly = link.saw == Some(Ending::Orderly) || link.said > link.read;
        assert!(is_orderly, "a quiet connection ends in a reset: {link:#?}");
    }
}

/// A client that was never connected to its upstream.
fn judge_unserved(link: &Link, course: &Course) {
    if link.peer_closed || link.peer_reset || link.peer_shut && link.said == 0 {
        return;
    }
    let may_dismiss = course.rules.may_dismiss() || link.story.may_be_ended;
    let is_right = if link.was_hurt {
        true
    } else if link.story.was_dropped {
        link.saw == Some(Ending::Orderly)
    } else if link.answered {
        // One that goes on sending is closed in the end, whether it has its answer or not.
        let is_told = link.heard > 0 && course.rules.may_answer()
            || link.saw == Some(Ending::Orderly) && may_dismiss;
        is_told
            || link.said > link.read && (may_dismiss || course.rules.may_turn_away())
            || link.story.was_killed
    } else {
        // A UNIX socket knows no reset.
        let may_be_reset = course.rules.may_be_unreachable() || link.story.was_killed;
        may_be_reset && (link.saw == Some(Ending::Aborted) || link.is_unix)
    };
    assert!(is_right, "a client is stranded: {link:#?}");
}

/// Returns the link that the worker has connected it with.
fn pair<'a>(kernel: &'a Kernel, link: &Link) -> Option<&'a Link> {
    let other = &kernel.links[link.partner?];
    // An attempt that was given up is no pair, nor is what was closed as quiet.
    let was_drained = [link, other].iter().any(|link| link.story.drained.is_some());
    let is_pair = std::ptr::eq(&raw const kernel.links[other.partner?], link) && !was_drained;
    (is_pair && other.is_connected && link.is_connected).then_some(other)
}

fn is_there(link: &Link) -> bool {
    !link.peer_closed && !link.peer_reset && !link.was_hurt && !link.story.was_killed
}

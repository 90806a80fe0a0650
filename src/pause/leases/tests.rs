//! Every transition of the leases.

use super::*;

/// Returns the time that many seconds after the begin of the tests.
fn at(seconds: u64) -> Timestamp {
    use std::sync::LazyLock;
    static BEGIN: LazyLock<Timestamp> =
        LazyLock::new(|| Timestamp { at: Instant::now(), shown: Rfc3339::now() });
    Timestamp { at: BEGIN.at + Duration::from_secs(seconds), ..*BEGIN }
}

fn terms(name: &str) -> Terms {
    Terms {
        name: name.to_owned(),
        reason: None,
        by: "a test".to_owned(),
        mode: Mode::Hold,
        ttl: None,
        quiet: None,
        half_closed: HalfClosed::Serve,
    }
}

fn for_seconds(name: &str, seconds: u64) -> Terms {
    Terms { ttl: Some(Duration::from_secs(seconds)), ..terms(name) }
}

/// Returns the leases in order: name, lifetime, request number.
fn list(leases: &Leases) -> Vec<(&str, Lifetime, u64)> {
    let of = |lease: &'_ Lease| (lease.lifetime, lease.request_id);
    leases.list.iter().map(|lease| (lease.terms.name.as_str(), of(lease).0, of(lease).1)).collect()
}

fn of_request(request_id: u64) -> impl Fn(&Lease) -> bool {
    move |lease| lease.request_id == request_id
}

fn undo(leases: &mut Leases, request_id: u64) -> Ended {
    leases.remove(|lease| lease.is_undone_with(request_id))
}

use Lifetime::{Committed, ConnectionBound, Pending};

#[test]
fn it_is_paused_while_any_lease_is_there() {
    let mut leases = Leases::default();
    assert_eq!((leases.mode(), leases.paused_since(), leases.next_end()), (None, None, None));
    assert!(!leases.would_resume(|_lease| true), "it is not paused");
    leases.put(terms("a"), Committed, 1, at(1)).unwrap();
    leases.put(terms("b"), Committed, 2, at(2)).unwrap();
    assert_eq!(leases.mode(), Some(Mode::Hold));
    let is_a = |lease: &Lease| lease.terms.name == "a";
    assert!(!leases.would_resume(is_a));
    let ended = leases.remove(is_a);
    assert_eq!((ended.leases.len(), ended.paused_since), (1, None));
    // The pause began with the first lease, although that one has ended.
    assert_eq!(leases.paused_since(), Some(at(1)));
    assert_eq!(leases.remove(is_a), Ended::default());
    assert!(leases.would_resume(|_lease| true));
    let ended = leases.remove(|_lease| true);
    assert_eq!((ended.leases.len(), ended.paused_since), (1, Some(at(1))));
    assert_eq!((leases.mode(), leases.paused_since()), (None, None));
    assert_eq!(leases.remove(|_lease| true), Ended::default(), "nothing ends twice");
}

#[test]
fn a_lease_of_the_same_name_is_replaced_and_its_name_holds_on() {
    let mut leases = Leases::default();
    leases.put(for_seconds("a", 10), Committed, 1, at(0)).unwrap();
    assert_eq!(leases.next_end(), Some(at(10).at));
    leases.put(for_seconds("a", 10), Committed, 2, at(5)).unwrap();
    assert_eq!(list(&leases), [("a", Committed, 2)]);
    assert_eq!(leases.next_end(), Some(at(15).at));
    assert_eq!(leases.list[0].since, at(0));
    assert!(!leases.list[0].has_expired(at(14).at) && leases.list[0].has_expired(at(15).at));
    leases.put(terms("a"), Committed, 3, at(6)).unwrap();
    assert_eq!(leases.next_end(), None, "the new terms know no end");
    assert!(!leases.list[0].has_expired(at(1_000_000).at));
}

#[test]
fn the_strictest_terms_win() {
    let mut leases = Leases::default();
    let time = |seconds| Some(Duration::from_secs(seconds));
    let quiet = |seconds| time(seconds).map(Quiet::Any);
    leases.put(Terms { quiet: quiet(5), ..for_seconds("a", 9) }, Committed, 1, at(0)).unwrap();
    let half_closed = HalfClosed::Drop;
    let strict = Terms { mode: Mode::Reject, quiet: quiet(3), half_closed, ..for_seconds("b", 4) };
    leases.put(strict, Committed, 2, at(0)).unwrap();
    let postgres = Terms { quiet: time(1).map(Quiet::Postgres), ..terms("c") };
    leases.put(postgres, Committed, 3, at(0)).unwrap();
    assert_eq!((leases.mode(), leases.quiet()), (Some(Mode::Reject), time(3)));
    assert_eq!(leases.postgres_quiet(), time(1), "it shortens no other's");
    assert_eq!(leases.half_closed(), HalfClosed::Drop);
    assert_eq!(leases.next_end(), Some(at(4).at));
    leases.remove(|lease| lease.has_expired(at(4).at));
    assert_eq!((leases.mode(), leases.quiet()), (Some(Mode::Hold), time(5)));
    assert_eq!(leases.half_closed(), HalfClosed::Serve);
    assert_eq!(leases.next_end(), Some(at(9).at));
}

#[test]
fn what_is_undone_leaves_what_held_before() {
    let mut leases = Leases::default();
    leases.put(for_seconds("a", 10), Committed, 1, at(0)).unwrap();
    let reject = Terms { mode: Mode::Reject, ..terms("a") };
    leases.put(reject, Pending, 2, at(1)).unwrap();
    assert_eq!(leases.mode(), Some(Mode::Reject));
    // Only the pending lease is visible; its name has held since the first one.
    let shown: Vec<_> = leases.iter().map(|lease| (lease.request_id, lease.since)).collect();
    assert_eq!(shown, [(2, at(0))]);
    assert_eq!(undo(&mut leases, 2).leases.len(), 1);
    assert_eq!(list(&leases), [("a", Committed, 1)]);
    assert_eq!((leases.mode(), leases.next_end()), (Some(Mode::Hold), Some(at(10).at)));
    assert_eq!(undo(&mut leases, 1), Ended::default(), "a committed lease is not undone");
}

#[test]
fn what_is_committed_replaces_what_held_before() {
    let mut leases = Leases::default();
    leases.put(terms("a"), Committed, 1, at(0)).unwrap();
    leases.put(terms("b"), Committed, 2, at(0)).unwrap();
    leases.put(terms("a"), ConnectionBound, 3, at(0)).unwrap();
    leases.put(terms("a"), Pending, 4, at(1)).unwrap();
    leases.put(terms("a"), Pending, 5, at(1)).unwrap();
    leases.commit(4);
    let left =
        [("b", Committed, 2), ("a", ConnectionBound, 3), ("a", Committed, 4), ("a", Pending, 5)];
    assert_eq!(list(&leases), left);
    for request_id in [2, 3, 4, 6] {
        leases.commit(request_id);
    }
    assert_eq!(list(&leases), left, "only a pending one is committed");
    assert_eq!(undo(&mut leases, 4), Ended::default());
    undo(&mut leases, 5);
    assert_eq!(list(&leases), left[..3]);
}

/// Several requests wait under one name, and each learns the result of its own wait.
#[test]
fn what_is_committed_ends_no_other_wait() {
    let mut leases = Leases::default();
    leases.put(for_seconds("a", 5), Committed, 1, at(0)).unwrap();
    leases.put(for_seconds("a", 6), Pending, 2, at(0)).unwrap();
    leases.put(for_seconds("a", 7), Pending, 3, at(0)).unwrap();
    leases.put(for_seconds("a", 8), Pending, 4, at(0)).unwrap();
    leases.commit(3);
    assert_eq!(list(&leases), [("a", Committed, 3), ("a", Pending, 2), ("a", Pending, 4)]);
    let ends: Vec<_> = leases.list.iter().map(|lease| lease.ends.unwrap()).collect();
    assert_eq!(ends, [at(7).at, at(7).at, at(8).at], "the older one goes on under its terms");
    leases.commit(4);
    leases.commit(2);
    assert_eq!(list(&leases), [("a", Committed, 2)]);
    assert_eq!(leases.next_end(), Some(at(8).at));
}

#[test]
fn a_renewal_by_another_reaches_those_who_wait() {
    let mut leases = Leases::default();
    leases.put(for_seconds("a", 5), Pending, 1, at(0)).unwrap();
    leases.put(for_seconds("b", 5), Pending, 2, at(0)).unwrap();
    let renewed = Terms { mode: Mode::Reject, ..for_seconds("a", 5) };
    leases.put(renewed, Committed, 3, at(4)).unwrap();
    assert_eq!(list(&leases), [("a", Committed, 3), ("a", Pending, 1), ("b", Pending, 2)]);
    leases.remove(|lease| lease.has_expired(at(5).at));
    assert_eq!(list(&leases), [("a", Committed, 3), ("a", Pending, 1)]);
    assert_eq!(leases.list[1].terms.mode, Mode::Reject);
    // If the pending lease is undone, the other one remains; if it is committed, it replaces the other.
    let mut undone = Leases { list: leases.list.clone(), ..Leases::default() };
    undo(&mut undone, 1);
    assert_eq!(list(&undone), [("a", Committed, 3)]);
    leases.commit(1);
    assert_eq!(list(&leases), [("a", Committed, 1)]);
    assert_eq!(leases.next_end(), Some(at(9).at));
}

#[test]
fn a_lease_bound_to_a_connection_stands_beside_its_name() {
    let mut leases = Leases::default();
    leases.put(for_seconds("a", 5), ConnectionBound, 1, at(0)).unwrap();
    leases.put(terms("a"), Committed, 2, at(1)).unwrap();
    leases.put(for_seconds("a", 5), ConnectionBound, 3, at(2)).unwrap();
    assert_eq!(
        list(&leases),
        [("a", ConnectionBound, 1), ("a", Committed, 2), ("a", ConnectionBound, 3)]
    );
    assert_eq!(leases.iter().count(), 3, "each is shown");
    let since: Vec<_> = leases.iter().map(|lease| lease.since).collect();
    assert_eq!(since, [at(0), at(1), at(2)]);
    leases.put(for_seconds("a", 60), Committed, 4, at(3)).unwrap();
    assert_eq!(
        list(&leases),
        [("a", ConnectionBound, 1), ("a", ConnectionBound, 3), ("a", Committed, 4)]
    );
    assert_eq!(leases.next_end(), Some(at(5).at), "its terms are its own");
    undo(&mut leases, 1);
    undo(&mut leases, 3);
    assert_eq!(list(&leases), [("a", Committed, 4)]);
}

#[test]
fn a_renewal_restarts_the_time_to_live() {
    let mut leases = Leases::default();
    leases.put(for_seconds("a", 5), ConnectionBound, 1, at(0)).unwrap();
    leases.put(terms("a"), ConnectionBound, 2, at(0)).unwrap();
    assert!(leases.renew(of_request(1), at(4).at));
    assert_eq!(leases.next_end(), Some(at(9).at));
    assert!(
        leases.renew(of_request(2), at(4).at),
        "one without an end has nothing to renew, and holds"
    );
    assert_eq!(leases.next_end(), Some(at(9).at));
    assert!(leases.holds(1));
    leases.remove(|lease| lease.has_expired(at(9).at));
    assert!(!leases.holds(1) && leases.holds(2) && leases.holds_name("a"));
    assert!(!leases.renew(of_request(1), at(9).at), "nothing comes back");
}

#[test]
fn there_are_only_so_many() {
    let mut leases = Leases::default();
    for request_id in 1..=LEASES_MAX as u64 {
        leases.put(terms(&format!("n{request_id}")), Committed, request_id, at(0)).unwrap();
    }
    let full = list(&leases).len();
    assert_eq!(full, LEASES_MAX);
    for lifetime in [Committed, Pending, ConnectionBound] {
        assert_eq!(leases.put(terms("more"), lifetime, 1000, at(0)), Err(Full));
    }
    assert_eq!(leases.put(terms("n1"), ConnectionBound, 1000, at(0)), Err(Full));
    assert_eq!(list(&leases).len(), full, "what is refused changes nothing");
    leases.put(for_seconds("n1", 9), Committed, 1001, at(0)).unwrap();
    assert_eq!(list(&leases).len(), full, "a renewal needs no room");
    leases.put(terms("n1"), Pending, 1002, at(0)).unwrap();
    assert_eq!(leases.put(terms("more"), Pending, 1003, at(0)), Err(Full));
    leases.commit(1002);
    assert_eq!(list(&leases).len(), full, "nor does one that depends on its request");
    leases.put(terms(NAME_DEFAULT), Committed, PROGRAM, at(0)).unwrap();
    assert!(leases.holds_name(NAME_DEFAULT), "the program always has room");
}

#[test]
fn an_end_beyond_the_clock_is_none() {
    let mut leases = Leases::default();
    let terms = Terms { ttl: Some(Duration::MAX), ..terms("a") };
    leases.put(terms, Committed, 1, at(0)).unwrap();
    assert_eq!(leases.next_end(), None);
}

//! Requests, and endpoints that fail, on real etcd.

use std::time::Instant;

use super::{
    SHORT, TIMEOUT, client,
    fixture::{Cluster, Relay},
    found, grant, only, put, range, read, transact, url,
};
use crate::fleet::store::{
    Answer, Compare, Keys, LeaseId, Operation, Request, Revision, Store as _, StoreError,
    Transaction,
};

#[test]
fn leases_and_transactions() {
    let Some(cluster) = Cluster::start(1) else { return };
    let mut etcd = client(&cluster.urls());
    let lease = grant(&mut etcd, 5);
    let renewed = etcd.ask(&Request::KeepAlive { lease }, TIMEOUT).unwrap();
    assert_eq!(renewed.answer, Answer::Renewed { ttl: Some(std::time::Duration::from_secs(5)) });
    let unknown = etcd.ask(&Request::KeepAlive { lease: LeaseId(77) }, TIMEOUT).unwrap();
    assert_eq!(unknown.answer, Answer::Renewed { ttl: None });
    let transaction = Transaction {
        compares: vec![Compare::Absent { key: "/f/a".to_owned() }],
        then: vec![put("/f/a", "1", Some(lease)), range("/f/")],
        otherwise: vec![range("/f/"), range("/none/")],
    };
    let first = transact(&mut etcd, transaction.clone()).unwrap();
    let (cluster_id, connection, revision) = (first.cluster, first.connection, first.revision);
    // A renewal counts only if the same member has answered a transaction behind it.
    assert_eq!((renewed.connection, unknown.connection), (connection, connection));
    let pairs = found(first);
    assert_eq!(pairs.len(), 1);
    assert_eq!((pairs[0].key.as_str(), pairs[0].value.as_str()), ("/f/a", "1"));
    assert_eq!((pairs[0].lease, pairs[0].modified), (Some(lease), revision));
    let second = transact(&mut etcd, transaction).unwrap();
    assert_eq!((second.cluster, second.connection), (cluster_id, connection));
    let Answer::Transacted { succeeded: false, found: pairs } = second.answer else {
        panic!("{second:?}")
    };
    assert_eq!(pairs.iter().map(Vec::len).collect::<Vec<_>>(), [1, 0]);
    let dead = only(vec![put("/f/b", "2", Some(LeaseId(77)))]);
    assert_eq!(transact(&mut etcd, dead), Err(StoreError::NoSuchLease));
    let revoked = etcd.ask(&Request::Revoke { lease }, TIMEOUT).unwrap();
    assert_eq!(revoked.answer, Answer::Revoked);
    assert_eq!(etcd.ask(&Request::Revoke { lease }, TIMEOUT), Err(StoreError::NoSuchLease));
    assert_eq!(found(read(&mut etcd, TIMEOUT).unwrap()), []);
}

#[test]
fn conditions_and_single_keys() {
    let Some(cluster) = Cluster::start(1) else { return };
    let mut etcd = client(&cluster.urls());
    let key = || "/f/a".to_owned();
    let at = transact(&mut etcd, only(vec![put("/f/a", "é", None), put("/f/ab", "", None)]))
        .unwrap()
        .revision;
    let mut holds = |compare| {
        let transaction = Transaction { compares: vec![compare], ..only(vec![]) };
        let answer = transact(&mut etcd, transaction).unwrap().answer;
        match answer {
            Answer::Transacted { succeeded, found } if found.is_empty() => succeeded,
            other => panic!("{other:?}"),
        }
    };
    let before = Revision(at.0 - 1);
    assert!(holds(Compare::Present { key: key() }));
    assert!(!holds(Compare::Absent { key: key() }));
    assert!(holds(Compare::Absent { key: "/f".to_owned() }));
    assert!(holds(Compare::ModifiedAt { key: key(), revision: at }));
    assert!(!holds(Compare::ModifiedAt { key: key(), revision: before }));
    assert!(holds(Compare::Value { key: key(), value: "é".to_owned() }));
    assert!(!holds(Compare::Value { key: key(), value: String::new() }));
    assert!(holds(Compare::Value { key: "/f/ab".to_owned(), value: String::new() }));
    let one = Operation::Range { keys: Keys::One(key()) };
    let transaction = only(vec![one, Operation::Delete { key: key() }, range("/f/")]);
    let reply = transact(&mut etcd, transaction).unwrap();
    let Answer::Transacted { succeeded: true, found } = reply.answer else { panic!("{reply:?}") };
    assert_eq!(found[0].len(), 1);
    assert_eq!((found[0][0].value.as_str(), found[0][0].lease), ("é", None));
    let left: Vec<&str> = found[1].iter().map(|pair| pair.key.as_str()).collect();
    assert_eq!(left, ["/f/ab"]);
}

#[test]
fn a_new_connection_has_a_new_number() {
    let Some(cluster) = Cluster::start(1) else { return };
    let relay = Relay::start(cluster.addr(0));
    let mut etcd = client(&[url(relay.addr())]);
    let mut number = || read(&mut etcd, TIMEOUT).unwrap().connection;
    let first = number();
    assert_eq!([number(), number()], [first; 2]);
    assert_eq!(relay.accepted(), 1);
    relay.close();
    let second = number();
    assert_ne!(second, first);
    assert_eq!(number(), second);
    assert_eq!(relay.accepted(), 2);
}

/// A member that is killed costs no request, and a stopped one costs the time of one.
#[test]
fn requests_move_on_to_the_next_endpoint() {
    let Some(mut cluster) = Cluster::start(3) else { return };
    let leader = cluster.leader();
    let mut urls = cluster.urls();
    urls.rotate_left(leader);
    let mut etcd = client(&urls);
    let before = transact(&mut etcd, only(vec![put("/f/a", "1", None), range("/f/")])).unwrap();
    cluster.kill(leader);
    let began = Instant::now();
    let after = read(&mut etcd, TIMEOUT).unwrap();
    println!("answered {:?} after the leader was killed", began.elapsed());
    assert_eq!(after.cluster, before.cluster);
    assert_ne!(after.connection, before.connection);
    assert_eq!(found(after), found(before));
    cluster.restart(leader);

    // The member that has answered is stopped.
    cluster.leader();
    let stopped = cluster.urls().iter().position(|url| *url == etcd.endpoint.url).unwrap();
    assert_ne!(stopped, leader);
    cluster.stop(stopped);
    let began = Instant::now();
    let error = read(&mut etcd, SHORT).unwrap_err();
    assert!(
        matches!(&error, StoreError::TimedOut(text) if text.contains(&cluster.urls()[stopped])),
        "{error:?}"
    );
    assert!(began.elapsed() >= SHORT, "{:?}", began.elapsed());
    let began = Instant::now();
    read(&mut etcd, TIMEOUT).unwrap();
    println!("answered {:?} by the next member", began.elapsed());
    cluster.go_on(stopped);
}

#[test]
fn without_a_majority_requests_end_by_their_own_time() {
    let Some(mut cluster) = Cluster::start(3) else { return };
    let mut etcd = client(&cluster.urls());
    let cluster_id = read(&mut etcd, TIMEOUT).unwrap().cluster;
    cluster.kill(1);
    cluster.kill(2);
    // Serializable reads would answer here.
    let began = Instant::now();
    let error = read(&mut etcd, SHORT).unwrap_err();
    assert!(matches!(error, StoreError::TimedOut(_)), "{error:?}");
    assert!(began.elapsed() < SHORT * 3, "{:?}", began.elapsed());
    cluster.restart_all(&[1, 2]);
    assert_eq!(read(&mut etcd, TIMEOUT).unwrap().cluster, cluster_id);
}

#[test]
fn a_cut_is_a_timeout_and_heals() {
    let Some(cluster) = Cluster::start(1) else { return };
    let relay = Relay::start(cluster.addr(0));
    let mut etcd = client(&[url(relay.addr())]);
    let before = read(&mut etcd, TIMEOUT).unwrap();
    relay.cut();
    let error = read(&mut etcd, SHORT).unwrap_err();
    assert!(matches!(error, StoreError::TimedOut(_)), "{error:?}");
    // The next one does not come as far as to be sent.
    let error = read(&mut etcd, SHORT).unwrap_err();
    assert!(matches!(error, StoreError::Unreachable(_)), "{error:?}");
    relay.heal();
    let after = read(&mut etcd, TIMEOUT).unwrap();
    assert_ne!(after.connection, before.connection);
}

#[test]
fn a_full_store_says_so_and_can_be_read() {
    let quota = ["--quota-backend-bytes", "1048576"];
    let Some(cluster) = Cluster::start_with(1, super::fixture::Transport::Plain, &quota) else {
        return;
    };
    let mut etcd = client(&cluster.urls());
    let value = "x".repeat(100 << 10);
    let full = (0..40).find_map(|index| {
        let write = only(vec![put(&format!("/f/{index}"), &value, None)]);
        transact(&mut etcd, write).err()
    });
    let text = match full {
        Some(StoreError::Full(text)) => text,
        other => panic!("{other:?}"),
    };
    assert!(text.contains(&cluster.urls()[0]) && text.contains("alarm disarm"), "{text}");
    assert!(!found(read(&mut etcd, TIMEOUT).unwrap()).is_empty());
}

//! Tests of the client against real etcd, and against servers that only look like one.

#[path = "../../../tests/integration/harness/etcd/mod.rs"]
#[allow(dead_code, unused_imports, reason = "tests of whole fleets use the rest")]
mod fixture;

use std::time::Duration;

use super::Etcd;
use crate::fleet::store::{
    Answer, Compare, Keys, LeaseId, Operation, Reply, Request, Store as _, StoreError,
    StoreSettings, Transaction,
};
use fixture::Cluster;

/// Time of a request. A passing test waits for it only where it says so.
const TIMEOUT: Duration = Duration::from_secs(10);

fn client(urls: &[String]) -> Etcd {
    Etcd::new(&StoreSettings { endpoints: urls.to_vec(), ..StoreSettings::default() }).unwrap()
}

fn grant(etcd: &mut Etcd, seconds: u64) -> LeaseId {
    let reply = etcd.ask(&Request::Grant { ttl: Duration::from_secs(seconds) }, TIMEOUT).unwrap();
    match reply.answer {
        Answer::Granted { lease, ttl } => {
            assert_eq!(ttl.as_secs(), seconds);
            lease
        }
        other => panic!("{other:?}"),
    }
}

fn put(key: &str, value: &str, lease: Option<LeaseId>) -> Operation {
    Operation::Put { key: key.to_owned(), value: value.to_owned(), lease }
}

fn range(prefix: &str) -> Operation {
    Operation::Range { keys: Keys::Prefix(prefix.to_owned()) }
}

fn transact(etcd: &mut Etcd, transaction: Transaction) -> Result<Reply, StoreError> {
    etcd.ask(&Request::Transact(transaction), TIMEOUT)
}

#[test]
fn leases_and_transactions() {
    let Some(cluster) = Cluster::start(1) else { return };
    let mut etcd = client(&cluster.urls());
    let lease = grant(&mut etcd, 5);
    let renewed = etcd.ask(&Request::KeepAlive { lease }, TIMEOUT).unwrap();
    assert_eq!(renewed.answer, Answer::Renewed { ttl: Some(Duration::from_secs(5)) });
    let unknown = etcd.ask(&Request::KeepAlive { lease: LeaseId(77) }, TIMEOUT).unwrap();
    assert_eq!(unknown.answer, Answer::Renewed { ttl: None });
    let absent = Compare::Absent { key: "/f/a".to_owned() };
    let transaction = Transaction {
        compares: vec![absent],
        then: vec![put("/f/a", "1", Some(lease)), range("/f/")],
        otherwise: vec![range("/f/"), range("/none/")],
    };
    let first = transact(&mut etcd, transaction.clone()).unwrap();
    let Answer::Transacted { succeeded: true, found } = first.answer else { panic!("{first:?}") };
    assert_eq!(found.len(), 1);
    let pair = &found[0][0];
    assert_eq!((pair.key.as_str(), pair.value.as_str(), pair.lease), ("/f/a", "1", Some(lease)));
    assert_eq!(pair.modified, first.revision);
    let second = transact(&mut etcd, transaction).unwrap();
    let Answer::Transacted { succeeded: false, found } = second.answer else {
        panic!("{second:?}")
    };
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [1, 0]);
    assert_eq!((first.cluster, first.connection), (second.cluster, second.connection));
    let dead =
        Transaction { then: vec![put("/f/b", "2", Some(LeaseId(77)))], ..Transaction::default() };
    assert_eq!(transact(&mut etcd, dead), Err(StoreError::NoSuchLease));
    let revoked = etcd.ask(&Request::Revoke { lease }, TIMEOUT).unwrap();
    assert_eq!(revoked.answer, Answer::Revoked);
    let all = Transaction { then: vec![range("/f/")], ..Transaction::default() };
    let left = transact(&mut etcd, all).unwrap();
    assert_eq!(left.answer, Answer::Transacted { succeeded: true, found: vec![Vec::new()] });
}

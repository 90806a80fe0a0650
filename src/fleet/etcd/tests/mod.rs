//! Tests of the client against real etcd, and against servers that only look like one.

mod fake;
#[path = "../../../../tests/integration/harness/etcd/mod.rs"]
#[allow(dead_code, unused_imports, reason = "tests of whole fleets use the rest")]
mod fixture;
mod many;
mod rights;
mod store;
mod strangers;
mod tls;
mod watch;

use std::{net::SocketAddr, time::Duration};

use super::Etcd;
use crate::fleet::store::{
    Answer, KeyValue, Keys, LeaseId, Operation, Reply, Request, Store as _, StoreError,
    StoreSettings, Transaction,
};

/// Time of a request. A passing test waits for it only where it says so.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Time of a request that is to be in vain.
const SHORT: Duration = Duration::from_secs(1);

fn client(urls: &[String]) -> Etcd {
    Etcd::new(&StoreSettings { endpoints: urls.to_vec(), ..StoreSettings::default() }).unwrap()
}

fn url(addr: SocketAddr) -> String {
    format!("http://{addr}")
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

/// Returns a transaction without conditions.
fn only(then: Vec<Operation>) -> Transaction {
    Transaction { then, ..Transaction::default() }
}

fn transact(etcd: &mut Etcd, transaction: Transaction) -> Result<Reply, StoreError> {
    etcd.ask(&Request::Transact(transaction), TIMEOUT)
}

fn read(etcd: &mut Etcd, timeout: Duration) -> Result<Reply, StoreError> {
    etcd.ask(&Request::Transact(only(vec![range("/f/")])), timeout)
}

/// Returns the pairs of the only range of a transaction that has succeeded.
fn found(reply: Reply) -> Vec<KeyValue> {
    match reply.answer {
        Answer::Transacted { succeeded: true, mut found } if found.len() == 1 => found.remove(0),
        other => panic!("{other:?}"),
    }
}

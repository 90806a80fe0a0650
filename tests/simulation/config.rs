//! What the sources read of the configuration. The real one needs files, and nothing of it is under test here.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use crate::Address;

#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) addr: Address,
    pub(crate) connect_timeout: Duration,
    pub(crate) retry_for: Duration,
    pub(crate) source_addrs: Vec<IpAddr>,
}

#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) reject_with: RejectWith,
    pub(crate) retry_after_interval: Duration,
    pub(crate) tls: Tls,
}

#[derive(Debug)]
pub(crate) enum RejectWith {
    Http,
    Close,
    Reset,
    File(PathBuf),
}

#[derive(Debug)]
pub(crate) struct Tls {
    pub(crate) ca_cert: Option<PathBuf>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
}

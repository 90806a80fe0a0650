//! The settings of a proxy about headers, and the lines of the log about wrong ones.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use super::Defect;
use crate::{
    config::{ProxySource, SendProxy, address::Address},
    log_limit::LogLimit,
};

/// Settings about headers.
#[derive(Debug, Default)]
pub(crate) struct ProxyHeaders {
    sources: Box<[ProxySource]>,
    /// Version of the headers for the upstream.
    pub(crate) send: SendProxy,
    wrong: LogLimit,
    /// Set once the log has asked about the upstream's headers.
    has_asked: AtomicBool,
}

impl ProxyHeaders {
    /// Returns the settings: the clients that begin with a header, and the version of those for the upstream.
    pub(crate) fn new(sources: &[ProxySource], send: SendProxy) -> Self {
        Self { sources: sources.into(), send, ..Self::default() }
    }

    /// Returns true if any clients begin with one.
    pub(crate) fn are_read(&self) -> bool {
        !self.sources.is_empty()
    }

    /// Returns true if a client begins with a header. A client without an address is one of a UNIX socket.
    pub(crate) fn are_sent_by(&self, client: Option<SocketAddr>) -> bool {
        self.sources.iter().any(|source| match (source, client) {
            (ProxySource::Unix, None) => true,
            (ProxySource::Network(network), Some(client)) => network.contains(client.ip()),
            (ProxySource::Unix, Some(_)) | (ProxySource::Network(_), None) => false,
        })
    }

    /// Logs that a client from which a header is due has sent none, once a second.
    pub(crate) fn log_wrong(&self, client: &str, defect: Defect, now: Instant) {
        if let Some(more) = self.wrong.allow(now) {
            log::warn!(
                "client {client} {}{more}: does the proxy in front of tcpause send one? proxy.accept-proxy-from names its address",
                defect.told()
            );
        }
    }

    /// Asks once, in the log, if the upstream expects headers as they are sent.
    pub(crate) fn ask(&self, upstream: &Address) {
        if !self.has_asked.swap(true, Ordering::Relaxed) {
            log::warn!(
                "upstream {upstream} has closed a connection at once, without a byte: {}",
                question(self.send)
            );
        }
    }
}

/// Returns the question for an operator whose upstream closes connections without a byte.
pub(crate) fn question(send: SendProxy) -> &'static str {
    match send {
        SendProxy::Off => "does the server expect a PROXY header? upstream.send-proxy is off",
        SendProxy::V1 => "does the server expect a PROXY header? upstream.send-proxy is v1",
        SendProxy::V2 => "does the server expect a PROXY header? upstream.send-proxy is v2",
    }
}

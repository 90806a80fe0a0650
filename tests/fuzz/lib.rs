//! The parsers of tcpause and the functions that fuzz them. The sources are compiled here as they are, since no parser is
//! public.

#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "the sources serve more than the targets"
)]

/// The files of `src` that the targets reach. A macro, so that rustfmt does not follow it.
macro_rules! sources {
    ($($name:ident = $path:literal,)*) => { $(#[path = $path] mod $name;)* };
}

sources! {
    admission = "../../src/admission/mod.rs",
    config = "../../src/config/mod.rs",
    connection = "../../src/connection/mod.rs",
    error = "../../src/error.rs",
    fleet = "../../src/fleet/mod.rs",
    fleet_view = "../../src/fleet_view.rs",
    handle = "../../src/handle/mod.rs",
    handover = "../../src/handover/mod.rs",
    listing = "../../src/listing.rs",
    log_limit = "../../src/log_limit.rs",
    pause = "../../src/pause/mod.rs",
    proxy_header = "../../src/proxy_header/mod.rs",
    shared = "../../src/shared.rs",
    stats = "../../src/stats/mod.rs",
    sys = "../../src/sys/mod.rs",
    tests = "../../src/tests.rs",
    timestamp = "../../src/timestamp.rs",
    upstream = "../../src/upstream/mod.rs",
    worker_pool = "../../src/worker_pool.rs",
}

/// The part of the control API that reads requests.
#[path = "../../src/control"]
mod control {
    mod body;
    mod command;
    mod connections;
    mod fleet;
    mod hosts;
    mod index;
    mod lift;
    mod metrics;
    mod page;
    mod query;
    mod request;
    mod response;

    #[path = "tests"]
    pub(crate) mod tests {
        pub(crate) mod corpus;
    }
}

use std::sync::{Arc, LazyLock};

use rustls::ServerConfig;

static TLS: LazyLock<Arc<ServerConfig>> = LazyLock::new(tests::certificate);

/// Fuzzes addresses as operators write them.
pub fn address(bytes: &[u8]) {
    tests::address(bytes);
}

/// Fuzzes the configuration file.
pub fn configuration(bytes: &[u8]) {
    tests::configuration(bytes);
}

/// Fuzzes requests to the control API.
pub fn control_request(bytes: &[u8]) {
    control::tests::corpus::control_request(bytes);
}

/// Fuzzes durations as operators write them.
pub fn duration(bytes: &[u8]) {
    tests::duration(bytes);
}

/// Fuzzes the messages of a hand-over.
pub fn handover(bytes: &[u8]) {
    tests::handover(bytes);
}

/// Fuzzes headers of the PROXY protocol.
pub fn proxy_header(bytes: &[u8]) {
    tests::proxy_header(bytes);
}

/// Fuzzes the first bytes of a client that is rejected, without a certificate and with one.
pub fn rejected_client(bytes: &[u8]) {
    tests::rejected_client(bytes, None);
    tests::rejected_client(bytes, Some(Arc::clone(&TLS)));
}

//! Fuzzes the first bytes of a client that is rejected, without a certificate and with one.

#![no_main]

use std::sync::{Arc, LazyLock};

use rustls::{ServerConfig, crypto::ring, pki_types::PrivatePkcs8KeyDer};

static TLS: LazyLock<Arc<ServerConfig>> = LazyLock::new(|| {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions of the provider")
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .expect("a key that belongs to its certificate")
        .into()
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    tcpause::fuzz::rejected_client(bytes, None);
    tcpause::fuzz::rejected_client(bytes, Some(Arc::clone(&TLS)));
});

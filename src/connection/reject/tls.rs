//! Certificate and key with which rejected TLS clients are answered.

use std::{path::Path, sync::Arc};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};

use crate::{config::TlsConfig, error::Error};

/// Loads the files that `tls` names. Returns `None` if it names none.
pub(crate) fn load(tls: &TlsConfig) -> Result<Option<Arc<ServerConfig>>, Error> {
    // `Config::validate` refuses one without the other.
    let (Some(cert), Some(key)) = (&tls.cert, &tls.key) else { return Ok(None) };
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| refuse("proxy.tls", &error.to_string()))?;
    let builder = match &tls.ca_cert {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for root in certificates("proxy.tls.ca-cert", path)? {
                roots
                    .add(root)
                    .map_err(|error| bad_file("proxy.tls.ca-cert", path, &error.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
                // As in the original program, a client may present no certificate, but not a wrong one.
                .allow_unauthenticated()
                .build()
                .map_err(|error| bad_file("proxy.tls.ca-cert", path, &error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder
        .with_single_cert(certificates("proxy.tls.cert", cert)?, private_key(key)?)
        .map_err(|error| refuse_pair(&error, cert, key))?;
    // The only answer inside is a refusal, so no session is worth resuming and no protocol is negotiated. With a list
    // of protocols, a client that offers none of them would get an alert instead of the 503.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Some(Arc::new(config)))
}

fn certificates(setting: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(setting, path)?).collect();
    let found = found.map_err(|error| bad_file(setting, path, &pem_problem(&error)))?;
    if found.is_empty() {
        return Err(bad_file(
            setting,
            path,
            "no certificate in it; it must be PEM: -----BEGIN CERTIFICATE-----",
        ));
    }
    Ok(found)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    PrivateKeyDer::from_pem_slice(&read("proxy.tls.key", path)?).map_err(|error| {
        let problem = match error {
            pem::Error::NoItemsFound => {
                "no usable private key in it; it must be unencrypted PEM".into()
            }
            error => pem_problem(&error),
        };
        bad_file("proxy.tls.key", path, &problem)
    })
}

fn read(setting: &str, path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path)
        .map_err(|error| bad_file(setting, path, &format!("cannot read it: {error}")))
}

fn refuse_pair(error: &rustls::Error, cert: &Path, key: &Path) -> Error {
    match error {
        rustls::Error::InconsistentKeys(_) => {
            let problem = format!("it does not belong to the certificate in {}", cert.display());
            bad_file("proxy.tls.key", key, &problem)
        }
        rustls::Error::InvalidCertificate(error) => {
            let problem = format!("not a certificate of X.509 version 3 that can be used: {error}");
            bad_file("proxy.tls.cert", cert, &problem)
        }
        error => {
            let kinds = "RSA of 2048 bits or more, ECDSA P-256 and P-384, and Ed25519";
            bad_file(
                "proxy.tls.key",
                key,
                &format!("it cannot be used: {error}; keys that can are {kinds}"),
            )
        }
    }
}

fn pem_problem(error: &pem::Error) -> String {
    format!("not valid PEM: {error}")
}

fn bad_file(setting: &str, path: &Path, problem: &str) -> Error {
    refuse(setting, &format!("{}: {problem}", path.display()))
}

fn refuse(setting: &str, problem: &str) -> Error {
    Error::Config(format!("{setting}: {problem}"))
}

//! Endpoints, certificates and the password that the settings name, checked before anything is asked.

use std::{fs, path::Path, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use ureq::{
    http::Uri,
    tls::{Certificate, ClientCert, PrivateKey, TlsConfig},
};

use crate::{error::Error, fleet::store::StoreSettings};

const CA_CERT: &str = "fleet.tls.ca-cert";
const CERT: &str = "fleet.tls.cert";
const KEY: &str = "fleet.tls.key";

/// User and password.
#[derive(Clone)]
pub(super) struct Login {
    pub(super) username: String,
    pub(super) password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("username", &self.username).finish_non_exhaustive()
    }
}

/// Returns the URLs of the endpoints without a slash at their ends.
pub(super) fn endpoints(settings: &StoreSettings) -> Result<Vec<String>, Error> {
    settings.endpoints.iter().map(|url| endpoint(url, settings)).collect()
}

fn endpoint(url: &str, settings: &StoreSettings) -> Result<String, Error> {
    let refuse = |problem: &str| refuse("fleet.endpoints", &format!("{url}: {problem}"));
    let wrong = || refuse("not a URL such as https://etcd1:2379");
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let authority = uri.authority().ok_or_else(wrong)?;
    if uri.path().len() > 1 || uri.query().is_some() || authority.as_str().contains('@') {
        return Err(wrong());
    }
    match uri.scheme_str() {
        Some("https") if settings.ca_cert.is_none() => {
            return Err(refuse("https needs fleet.tls.ca-cert, as there are no built-in roots"));
        }
        // The configuration has warned of what goes over a network in plain.
        Some("https" | "http") => {}
        _ => return Err(wrong()),
    }
    // The default port of the scheme would be that of a web server.
    let port = if authority.port().is_none() { ":2379" } else { "" };
    Ok(format!("{}{port}", url.trim_end_matches('/')))
}

/// Reads user and password.
pub(super) fn login(settings: &StoreSettings) -> Result<Option<Login>, Error> {
    let (username, path) = match (&settings.username, &settings.password_file) {
        (None, None) => return Ok(None),
        (Some(username), Some(path)) => (username.clone(), path),
        (Some(_), None) => return Err(refuse("fleet.username", "it needs fleet.password-file")),
        (None, Some(_)) => return Err(refuse("fleet.password-file", "it needs fleet.username")),
    };
    let setting = "fleet.password-file";
    let text = String::from_utf8(read(setting, path)?)
        .map_err(|_| bad_file(setting, path, "it is not text"))?;
    let password = text.trim_end_matches(['\r', '\n']).to_owned();
    if password.is_empty() {
        return Err(bad_file(setting, path, "it is empty"));
    }
    Ok(Some(Login { username, password }))
}

/// Reads all certificates. None are trusted but those of `fleet.tls.ca-cert`.
pub(super) fn tls(settings: &StoreSettings) -> Result<TlsConfig, Error> {
    let provider = Arc::new(ring::default_provider());
    let roots = match &settings.ca_cert {
        None => Vec::new(),
        Some(path) => certificates(CA_CERT, path)?,
    };
    let pair = match (&settings.cert, &settings.key) {
        (None, None) => None,
        (Some(cert), Some(key)) => Some((certificates(CERT, cert)?, read(KEY, key)?)),
        (Some(_), None) => return Err(refuse(CERT, "it needs fleet.tls.key")),
        (None, Some(_)) => return Err(refuse(KEY, "it needs fleet.tls.cert")),
    };
    check(settings, &provider, &roots, pair.as_ref())?;
    let owned =
        |certificate: &CertificateDer<'static>| Certificate::from_der(certificate).to_owned();
    let client = match &pair {
        None => None,
        Some((chain, key)) => {
            let chain: Vec<_> = chain.iter().map(owned).collect();
            let key = PrivateKey::from_pem(key).map_err(|error| refuse(KEY, &error.to_string()))?;
            Some(ClientCert::new_with_certs(&chain, key))
        }
    };
    Ok(TlsConfig::builder()
        .root_certs(roots.iter().map(owned).collect::<Vec<_>>().into())
        .client_cert(client)
        .unversioned_rustls_crypto_provider(provider)
        .build())
}

/// Tries what the HTTP client does with the same files, as it panics where they do not fit.
fn check(
    settings: &StoreSettings,
    provider: &Arc<CryptoProvider>,
    roots: &[CertificateDer<'static>],
    pair: Option<&(Vec<CertificateDer<'static>>, Vec<u8>)>,
) -> Result<(), Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        let path = settings.ca_cert.as_deref().unwrap_or(Path::new(""));
        store.add(root.clone()).map_err(|error| bad_file(CA_CERT, path, &error.to_string()))?;
    }
    let (Some((chain, key)), Some(cert_path), Some(key_path)) =
        (pair, &settings.cert, &settings.key)
    else {
        return Ok(());
    };
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| {
        bad_file(KEY, key_path, "no usable private key in it; it must be unencrypted PEM")
    })?;
    let built = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| refuse("fleet.tls", &error.to_string()))?
        .with_root_certificates(store)
        .with_client_auth_cert(chain.clone(), key);
    built.map(drop).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            let problem =
                format!("it does not belong to the certificate in {}", cert_path.display());
            bad_file(KEY, key_path, &problem)
        }
        error => bad_file(KEY, key_path, &format!("it cannot be used: {error}")),
    })
}

fn certificates(setting: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(setting, path)?).collect();
    let found =
        found.map_err(|error| bad_file(setting, path, &format!("not valid PEM: {error}")))?;
    if found.is_empty() {
        let problem = "no certificate in it; it must be PEM: -----BEGIN CERTIFICATE-----";
        return Err(bad_file(setting, path, problem));
    }
    Ok(found)
}

fn read(setting: &str, path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|error| bad_file(setting, path, &format!("cannot read it: {error}")))
}

fn bad_file(setting: &str, path: &Path, problem: &str) -> Error {
    refuse(setting, &format!("{}: {problem}", path.display()))
}

pub(super) fn refuse(setting: &str, problem: &str) -> Error {
    Error::Config(format!("{setting}: {problem}"))
}

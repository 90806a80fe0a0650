//! Certificates and a TLS client.

use std::{
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};

/// A certificate authority of a test.
pub(crate) struct Authority {
    certificate: rcgen::Certificate,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its key.
pub(crate) struct Identity {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

/// The three PEM files that the proxy is given.
pub(crate) struct TlsFiles {
    pub(crate) ca_cert: PathBuf,
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn server(&self) -> Identity {
        self.issue("localhost", ExtendedKeyUsagePurpose::ServerAuth)
    }

    pub(crate) fn client(&self) -> Identity {
        self.issue("a client", ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn issue(&self, name: &str, usage: ExtendedKeyUsagePurpose) -> Identity {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        Identity { certificate, key }
    }

    /// Writes this authority's certificate and a server's identity into `dir`.
    pub(crate) fn write_files(&self, dir: &Path) -> TlsFiles {
        let server = self.server();
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text).expect("a file");
            path
        };
        TlsFiles {
            ca_cert: write("ca.pem", self.certificate.pem()),
            cert: write("cert.pem", server.certificate.pem()),
            key: write("key.pem", server.key.serialize_pem()),
        }
    }
}

impl TlsFiles {
    /// Returns the options for the certificate and its key.
    pub(crate) fn options(&self) -> [String; 2] {
        [
            format!("--proxy-tls-cert={}", self.cert.display()),
            format!("--proxy-tls-key={}", self.key.display()),
        ]
    }

    pub(crate) fn ca_option(&self) -> String {
        format!("--proxy-tls-ca-cert={}", self.ca_cert.display())
    }
}

/// A TLS client with its certificates and versions.
pub(crate) struct TlsClient {
    roots: RootCertStore,
    identity: Option<Identity>,
    versions: Vec<&'static SupportedProtocolVersion>,
}

impl TlsClient {
    /// Returns a client that trusts `authority` and has no certificate.
    pub(crate) fn new(authority: &Authority) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(authority.certificate.der().clone()).expect("a certificate");
        Self { roots, identity: None, versions: rustls::ALL_VERSIONS.to_vec() }
    }

    pub(crate) fn with_identity(self, identity: Identity) -> Self {
        Self { identity: Some(identity), ..self }
    }

    pub(crate) fn with_version(self, version: &'static SupportedProtocolVersion) -> Self {
        Self { versions: vec![version], ..self }
    }

    /// Sends `request` and reads to the end, which must be announced (`close_notify`).
    pub(crate) fn exchange(self, stream: impl Read + Write, request: &[u8]) -> io::Result<Vec<u8>> {
        let mut tls = self.over(stream);
        tls.write_all(request)?;
        tls.flush()?;
        let mut answer = Vec::new();
        tls.read_to_end(&mut answer)?;
        Ok(answer)
    }

    /// Returns the client's end of a TLS connection over `stream`.
    pub(crate) fn over<S: Read + Write>(self, stream: S) -> StreamOwned<ClientConnection, S> {
        StreamOwned::new(self.connection(), stream)
    }

    /// Returns the client's first flight, for a test that sends it by hand.
    pub(crate) fn hello(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.connection().write_tls(&mut bytes).expect("a hello");
        bytes
    }

    fn connection(self) -> ClientConnection {
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&self.versions)
            .expect("versions of the provider")
            .with_root_certificates(self.roots);
        let config = match self.identity {
            None => builder.with_no_client_auth(),
            Some(identity) => {
                let chain: Vec<CertificateDer<'static>> = vec![identity.certificate.der().clone()];
                let key =
                    PrivateKeyDer::from(PrivatePkcs8KeyDer::from(identity.key.serialize_der()));
                builder
                    .with_client_auth_cert(chain, key)
                    .expect("a key that belongs to its certificate")
            }
        };
        ClientConnection::new(Arc::new(config), "localhost".try_into().expect("a name"))
            .expect("a connection")
    }
}

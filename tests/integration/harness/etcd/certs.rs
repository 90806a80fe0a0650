//! Certificates of a cluster of etcd and of its clients.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};

/// Certificates of a cluster and its clients.
pub(crate) struct Certs {
    pub(crate) ca_cert: PathBuf,
    pub(super) server_cert: PathBuf,
    pub(super) server_key: PathBuf,
    /// Certificate without a `CommonName`.
    pub(crate) client_cert: PathBuf,
    pub(crate) client_key: PathBuf,
    /// Certificate with `tcpause` as its `CommonName`.
    pub(crate) named_cert: PathBuf,
    pub(crate) named_key: PathBuf,
    /// Authority that has signed nothing, and a certificate of yet another one.
    pub(crate) other_ca_cert: PathBuf,
    pub(crate) stranger_cert: PathBuf,
    pub(crate) stranger_key: PathBuf,
}

impl Certs {
    pub(super) fn write(dir: &Path) -> Self {
        let (ca, ca_cert) = authority("the cluster's");
        let (other, other_ca_cert) = authority("another");
        let write = |name: &str, text: &str| {
            let path = dir.join(name);
            fs::write(&path, text).expect("a file");
            path
        };
        let pair = |name: &str, issuer, common_name, usages: &[_]| {
            let (cert, key) = issue(issuer, common_name, usages);
            (write(&format!("{name}.pem"), &cert), write(&format!("{name}-key.pem"), &key))
        };
        let client = ExtendedKeyUsagePurpose::ClientAuth;
        // The gateway is a client of its own member.
        let both = [ExtendedKeyUsagePurpose::ServerAuth, client.clone()];
        let (server_cert, server_key) = pair("server", &ca, None, &both);
        let (client_cert, client_key) = pair("client", &ca, None, std::slice::from_ref(&client));
        let (named_cert, named_key) =
            pair("named", &ca, Some("tcpause"), std::slice::from_ref(&client));
        let (stranger_cert, stranger_key) = pair("stranger", &other, None, &[client]);
        Self {
            ca_cert: write("ca.pem", &ca_cert),
            server_cert,
            server_key,
            client_cert,
            client_key,
            named_cert,
            named_key,
            other_ca_cert: write("other-ca.pem", &other_ca_cert),
            stranger_cert,
            stranger_key,
        }
    }
}

fn authority(name: &str) -> (Issuer<'static, KeyPair>, String) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let key = KeyPair::generate().expect("a key");
    let certificate = params.self_signed(&key).expect("a certificate").pem();
    (Issuer::new(params, key), certificate)
}

fn issue(
    issuer: &Issuer<'static, KeyPair>,
    common_name: Option<&str>,
    usages: &[ExtendedKeyUsagePurpose],
) -> (String, String) {
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let mut params = CertificateParams::new(names).expect("names");
    params.distinguished_name = DistinguishedName::new();
    match common_name {
        Some(name) => params.distinguished_name.push(DnType::CommonName, name),
        None => params.distinguished_name.push(DnType::OrganizationName, "tcpause"),
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = usages.to_vec();
    let key = KeyPair::generate().expect("a key");
    (params.signed_by(&key, issuer).expect("a certificate").pem(), key.serialize_pem())
}

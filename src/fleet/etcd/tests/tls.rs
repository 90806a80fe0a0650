//! Certificates, on a real etcd.

use std::{
    fs,
    io::Write as _,
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    thread,
};

use super::{
    super::Etcd,
    TIMEOUT,
    fixture::{Cluster, Transport},
    read,
};
use crate::fleet::store::{StoreError, StoreSettings};

fn settings(cluster: &Cluster) -> StoreSettings {
    StoreSettings {
        endpoints: cluster.urls(),
        ca_cert: Some(cluster.certs.ca_cert.clone()),
        ..StoreSettings::default()
    }
}

#[track_caller]
fn refused(settings: &StoreSettings) -> String {
    let error = read(&mut Etcd::new(settings).unwrap(), TIMEOUT).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, StoreError::Denied(_) | StoreError::Unreachable(_)), "{error:?}");
    assert!(text.contains(&settings.endpoints[0]) && !text.contains('\n'), "{text}");
    text
}

#[test]
fn only_the_own_authority_is_trusted() {
    let Some(cluster) = Cluster::start_with(1, Transport::Tls, &[]) else { return };
    let mut etcd = Etcd::new(&settings(&cluster)).unwrap();
    let first = read(&mut etcd, TIMEOUT).unwrap();
    assert_eq!(read(&mut etcd, TIMEOUT).unwrap().connection, first.connection);

    let other = Some(cluster.certs.other_ca_cert.clone());
    let text = refused(&StoreSettings { ca_cert: other, ..settings(&cluster) });
    assert!(text.contains("not signed by any authority of fleet.tls.ca-cert"), "{text}");
    let plain = cluster.urls()[0].replace("https", "http");
    let text = refused(&StoreSettings { endpoints: vec![plain], ..settings(&cluster) });
    assert!(text.contains("give it as https://"), "{text}");
}

#[test]
fn plain_etcd_does_not_speak_tls() {
    let Some(cluster) = Cluster::start(1) else { return };
    let secure = cluster.urls()[0].replace("http", "https");
    let text = refused(&StoreSettings { endpoints: vec![secure], ..settings(&cluster) });
    assert!(text.contains("give it as http://"), "{text}");
}

/// Many servers answer the beginning of TLS in plain.
#[test]
fn a_plain_server_does_not_speak_tls() {
    let Some(cluster) = Cluster::start_with(1, Transport::Tls, &[]) else { return };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let answer = move || {
        for mut stream in listener.incoming().map_while(Result::ok).take(2) {
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        }
    };
    let server = thread::Builder::new().spawn(answer).unwrap();
    let endpoints = vec![format!("https://{addr}")];
    let text = refused(&StoreSettings { endpoints, ..settings(&cluster) });
    assert!(text.contains("does not speak TLS"), "{text}");
    server.join().unwrap();
}

#[test]
fn clients_have_certificates_too() {
    let Some(cluster) = Cluster::start_with(1, Transport::MutualTls, &[]) else { return };
    let certs = &cluster.certs;
    let with = |cert: &PathBuf, key: &PathBuf| StoreSettings {
        cert: Some(cert.clone()),
        key: Some(key.clone()),
        ..settings(&cluster)
    };
    read(&mut Etcd::new(&with(&certs.client_cert, &certs.client_key)).unwrap(), TIMEOUT).unwrap();
    read(&mut Etcd::new(&with(&certs.named_cert, &certs.named_key)).unwrap(), TIMEOUT).unwrap();
    let text = refused(&settings(&cluster));
    assert!(text.contains("set fleet.tls.cert and fleet.tls.key"), "{text}");
    let text = refused(&with(&certs.stranger_cert, &certs.stranger_key));
    assert!(text.contains("refuses the certificate of fleet.tls.cert"), "{text}");

    let swapped = with(&certs.client_cert, &certs.named_key);
    let text = Etcd::new(&swapped).unwrap_err().to_string();
    assert!(text.contains("fleet.tls.key") && text.contains("does not belong"), "{text}");
}

#[test]
fn files_and_urls_are_checked_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let junk = dir.path().join("junk.pem");
    fs::write(&junk, "no PEM").unwrap();
    let (none, secure) = (PathBuf::from("/none/such"), "https://a:1");
    for (url, ca_cert, cert, key, problem) in [
        (secure, None, None, None, "https needs fleet.tls.ca-cert"),
        (secure, Some(&none), None, None, "fleet.tls.ca-cert: /none/such: cannot read it"),
        (secure, Some(&junk), None, None, "no certificate in it"),
        ("http://a", None, Some(&junk), None, "fleet.tls.cert: it needs fleet.tls.key"),
        ("http://a", None, None, Some(&junk), "fleet.tls.key: it needs fleet.tls.cert"),
        ("etcd1:2379", None, None, None, "not a URL"),
        ("ftp://a:1", None, None, None, "not a URL"),
        ("http://", None, None, None, "not a URL"),
        ("http://a:1/v3", None, None, None, "not a URL"),
        ("http://u:p@a:1", None, None, None, "not a URL"),
    ] {
        let settings = StoreSettings {
            endpoints: vec![url.to_owned()],
            ca_cert: ca_cert.cloned(),
            cert: cert.cloned(),
            key: key.cloned(),
            ..StoreSettings::default()
        };
        let text = Etcd::new(&settings).unwrap_err().to_string();
        assert!(text.contains(problem), "{url}: {text}");
    }
    let text = Etcd::new(&StoreSettings::default()).unwrap_err().to_string();
    assert_eq!(text, "fleet.endpoints: is empty");
    for (url, whole) in
        [("http://localhost/", "http://localhost:2379"), ("http://[::1]:1", "http://[::1]:1")]
    {
        let settings =
            StoreSettings { endpoints: vec![url.to_owned()], ..StoreSettings::default() };
        assert_eq!(Etcd::new(&settings).unwrap().endpoint.url, whole);
    }
}

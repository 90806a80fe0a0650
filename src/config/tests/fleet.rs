//! The settings of a fleet.

use std::time::Duration;

use super::{assert_fit, check_error, *};

#[test]
fn every_key_of_a_fleet_is_read() {
    let text = "\
fleet:
  endpoints: ['https://etcd1:2379', 'http://[::1]:2379/']
  name: shop
  prefix: /ops/tcpause
  host: web-1
  ttl: 30s
  on-disconnect: hold
  start-wait: 1m
  keep-paused-for: 1h
  tls: {ca-cert: ca.pem, cert: cert.pem, key: key.pem}
  username: tcpause
  password-file: /etc/tcpause/password
";
    let endpoint = |is_tls, host: &str| Endpoint { is_tls, host: host.to_owned(), port: 2379 };
    let expected = FleetConfig {
        endpoints: vec![endpoint(true, "etcd1"), endpoint(false, "::1")],
        name: FleetName("shop".to_owned()),
        prefix: FleetPrefix("/ops/tcpause".to_owned()),
        host: Some(FleetName("web-1".to_owned())),
        ttl: Duration::from_secs(30),
        on_disconnect: OnDisconnect::Hold,
        start_wait: Duration::from_secs(60),
        keep_paused_for: Duration::from_secs(3_600),
        tls: TlsConfig {
            ca_cert: Some("ca.pem".into()),
            cert: Some("cert.pem".into()),
            key: Some("key.pem".into()),
        },
        username: Some(Username("tcpause".to_owned())),
        password_file: Some("/etc/tcpause/password".into()),
    };
    let config = Config::parse(text, "t.yml").unwrap();
    assert_eq!(config.fleet, expected);
    assert_eq!(config.validate(), Ok(()));
    assert_eq!(Config::parse(&config.to_string(), "t.yml"), Ok(config));
}

#[test]
fn what_no_key_of_etcd_can_have_is_refused() {
    let long = format!("fleet: {{host: {}}}", "x".repeat(65));
    for (text, expected) in [
        (
            "fleet: {endpoints: [etcd1]}",
            "\"etcd1\" lacks http:// or https://; write it as in `https",
        ),
        ("fleet: {endpoints: ['grpc://a:1']}", "has the scheme \"grpc\", which is not spoken"),
        ("fleet: {endpoints: ['http://a']}", "is not the address of an etcd; write it as in"),
        ("fleet: {endpoints: ['http://a:0']}", "is not the address of an etcd"),
        ("fleet: {endpoints: ['http://a:1/v3']}", "is not the address of an etcd"),
        ("fleet: {endpoints: ['http://u@a:1']}", "is not the address of an etcd"),
        ("fleet: {endpoints: ['http://:1']}", "is not the address of an etcd"),
        ("fleet: {endpoints: ['http://::1:1']}", "is not the address of an etcd"),
        ("fleet: {endpoints: ['http://[a]:1']}", "is not the address of an etcd"),
        ("fleet: {name: a/b}", "\"a/b\" is not a name; write letters, digits, dots"),
        ("fleet: {host: 'a b'}", "is not a name"),
        (&long, "at most 64"),
        ("fleet: {prefix: tcpause}", "\"tcpause\" is not the begin of keys; write names behind"),
        ("fleet: {prefix: /}", "is not the begin of keys"),
        ("fleet: {prefix: /a/}", "is not the begin of keys"),
        ("fleet: {prefix: /a//b}", "is not the begin of keys"),
        ("fleet: {on-disconnect: hodl}", "write serve, hold; did you mean `hold`?"),
        ("fleet: {username: \"a\\tb\"}", "is not the name of a user of etcd"),
        ("fleet: {endpoint: x}", "unknown key `endpoint`; did you mean `endpoints`?"),
    ] {
        check_error(text, expected);
    }
}

#[test]
fn settings_of_a_fleet_must_fit_together() {
    let http = "endpoints: ['http://a:1'], host: a";
    let https = "endpoints: ['http://a:1', 'https://a:1'], host: a";
    let of = |rest: &str| format!("fleet: {{{rest}}}");
    let cases = [
        (of("ttl: 5s"), None),
        (of("ttl: 10m"), None),
        (of("ttl: 4.9s"), Some("fleet.ttl: 4s900ms is out of bounds; write 5s at least and 10m")),
        (of("ttl: 601s"), Some("fleet.ttl: 10m1s is out of bounds")),
        (of("tls: {cert: a, key: b}"), None),
        (of("tls: {cert: a}"), Some("fleet.tls.key is missing")),
        (of("tls: {key: a}"), Some("fleet.tls.cert is missing")),
        (of("username: a"), Some("fleet.password-file is missing")),
        (of("password-file: a"), Some("fleet.username is missing")),
        (of("username: a, password-file: b"), None),
        (of(http), None),
        (of(https), Some("fleet.tls.ca-cert is missing: https://a:1 needs the PEM bundle")),
        (of(&format!("{https}, tls: {{ca-cert: a}}")), None),
        (
            of(&format!("{http}, tls: {{ca-cert: a}}")),
            Some("fleet.tls.ca-cert: no endpoint is spoken to in TLS"),
        ),
        (
            of(&format!("{http}, tls: {{cert: a, key: b}}")),
            Some("fleet.tls.cert: no endpoint is spoken to in TLS"),
        ),
        // 2 (15 s + 5 s + 3 · 1.5 s)
        (of(&format!("{http}, keep-paused-for: 49s")), None),
        (
            of(&format!("{http}, keep-paused-for: 48.9s")),
            Some(
                "fleet.keep-paused-for: 48s900ms is too short for fleet.ttl, as hosts would resume before the end of a pause is certain; write 49s at least",
            ),
        ),
        (of("keep-paused-for: 1s"), None),
        (format!("pause: {{max-ttl: 10m}}\n{}", of(http)), None),
        (
            format!("pause: {{max-ttl: 5m}}\n{}", of(http)),
            Some("fleet.keep-paused-for: 10m is more than pause.max-ttl allows; write 5m at most"),
        ),
        ("pause: {max-ttl: 5m}".to_owned(), None),
    ];
    let cases = cases.each_ref().map(|(text, expected)| (text.as_str(), *expected));
    assert_fit(&cases);
}

#[test]
fn a_host_has_the_name_of_its_system() {
    let named = FleetConfig { host: Some(FleetName("a".to_owned())), ..FleetConfig::default() };
    assert_eq!(named.host(), Ok(FleetName("a".to_owned())));
    let own = rustix::system::uname().nodename().to_string_lossy().into_owned();
    match FleetConfig::default().host() {
        Ok(FleetName(name)) => assert_eq!(name, own),
        Err(error) => assert!(error.ends_with("set fleet.host"), "{error}"),
    }
}

#[test]
fn what_has_no_effect_or_can_be_read_is_warned_of() {
    for (text, expected) in [
        ("{}", None),
        ("fleet: {name: default}", None),
        ("fleet: {name: shop}", Some("fleet.endpoints is not set, so that no other setting")),
        (
            "fleet: {endpoints: ['http://127.0.0.1:1', 'http://[::1]:1', 'http://localhost:1']}",
            None,
        ),
        ("fleet: {endpoints: ['https://etcd1:1']}", None),
        (
            "fleet: {endpoints: ['https://etcd1:1', 'http://etcd2:1']}",
            Some("fleet.endpoints: http://etcd2:1 is not encrypted"),
        ),
    ] {
        let warnings = Config::parse(text, "t.yml").unwrap().fleet.warnings();
        let is_it = match expected {
            Some(part) => warnings.len() == 1 && warnings[0].contains(part),
            None => warnings.is_empty(),
        };
        assert!(is_it, "{text}: {warnings:?}");
    }
}

//! Tests of the configuration: values that are read, written and refused.

mod fleet;
mod sample;
mod wrong;

use std::{
    fs,
    io::Write,
    num::{NonZeroU32, NonZeroUsize},
    time::Duration,
};

use super::{address::Address, *};

fn error(text: &str) -> String {
    Config::parse(text, "t.yml").expect_err(text).to_string()
}

fn check_error(text: &str, expected: &str) {
    let error = error(text);
    assert!(error.contains(expected), "{text:?} gives {error}");
    assert!(error.starts_with("t.yml:"), "{error}");
    assert!(!error.contains(char::is_control), "{error:?}");
}

#[test]
fn an_empty_file_is_the_default() {
    for text in [
        "",
        "\n",
        "# nothing\n",
        "\u{feff}",
        "---\n",
        "{}",
        "~",
        "proxy:\n",
        "proxy:\n  tls:\n",
        "proxy:\n  addr:\n",
    ] {
        assert_eq!(Config::parse(text, "t.yml"), Ok(Config::default()), "{text:?}");
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "there is a line for each key")]
fn reads_every_key() {
    let text = "\
grace-period: 1m30s
log-level: off
log:
  format: json
  connections: all
  connections-rate: 7
proxy:
  addr: unix:///run/a.sock
  mode: 0660
  reject-clients: true
  reject-with: file:/etc/sorry
  retry-after-interval: 0
  block-poll-interval: 1ms
  close-poll-interval: 2ms
  tls: {ca-cert: ca.pem, cert: \"cert.pem\", key: 'key.pem'}
  threads: 3
  pipes: 0
  max-connections: 7
  accept-proxy-from: [unix]
pause:
  max-ttl: 10m
hold:
  timeout: 45s
  max: 5000
  overflow: close
  half-closed: drop
resume:
  max-connecting: 16
  rate: 50
control:
  addr: \":3001\"
  mode: 0o640
  hosts: [a.example, b.example]
monitor:
  addr: 10.0.0.1:9100
  mode: 0o640
upstream:
  addr: '[::1]:80'
  connect-timeout: 1s
  retry-for: 2m
  source-addrs: ['::1', 127.0.0.2]
  send-proxy: v2
  steer: auto
  state-file: /var/lib/a.json
fleet: {name: shop}
";
    let expected = Config {
        grace_period: Duration::from_secs(90),
        log_level: log::LevelFilter::Off,
        log: LogConfig {
            format: LogFormat::Json,
            connections: ConnectionLog::All,
            connections_rate: NonZeroU32::new(7).unwrap(),
        },
        proxy: ProxyConfig {
            addr: Address::Unix("/run/a.sock".into()),
            mode: Some(0o660),
            reject_clients: true,
            reject_with: RejectWith::File("/etc/sorry".into()),
            retry_after_interval: Duration::ZERO,
            block_poll_interval: Duration::from_millis(1),
            close_poll_interval: Duration::from_millis(2),
            tls: TlsConfig {
                ca_cert: Some("ca.pem".into()),
                cert: Some("cert.pem".into()),
                key: Some("key.pem".into()),
            },
            threads: NonZeroUsize::new(3),
            pipes: Some(0),
            max_connections: NonZeroUsize::new(7),
            accept_proxy_from: vec![ProxySource::Unix],
        },
        pause: PauseConfig { max_ttl: Some(Duration::from_secs(600)) },
        hold: HoldConfig {
            timeout: Some(Duration::from_secs(45)),
            max: NonZeroUsize::new(5_000),
            overflow: Overflow::Close,
            half_closed: HalfClosed::Drop,
        },
        resume: ResumeConfig {
            max_connecting: NonZeroUsize::new(16).unwrap(),
            rate: NonZeroU32::new(50),
        },
        control: ControlConfig {
            addr: Address::tcp("", 3001),
            mode: 0o640,
            group: None,
            hosts: vec!["a.example".into(), "b.example".into()],
        },
        monitor: MonitorConfig { addr: Some(Address::tcp("10.0.0.1", 9100)), mode: 0o640 },
        upstream: UpstreamConfig {
            addr: Address::tcp("::1", 80),
            connect_timeout: Duration::from_secs(1),
            retry_for: Duration::from_secs(120),
            source_addrs: ["::1", "127.0.0.2"].map(|ip| ip.parse().unwrap()).into(),
            send_proxy: SendProxy::V2,
            steer: Steer::Auto,
            state_file: Some("/var/lib/a.json".into()),
        },
        fleet: FleetConfig { name: FleetName("shop".to_owned()), ..FleetConfig::default() },
        file: None,
    };
    assert_eq!(Config::parse(text, "t.yml"), Ok(expected.clone()));
    assert_eq!(Config::parse(&text.replace('\n', "\r\n"), "t.yml"), Ok(expected.clone()));
    assert_eq!(Config::parse(&format!("\u{feff}{text}"), "t.yml"), Ok(expected.clone()));
    assert_eq!(Config::parse(&expected.to_string(), "t.yml"), Ok(expected));
}

#[test]
fn what_is_written_reads_the_same() {
    assert_eq!(Config::parse(&Config::default().to_string(), "t.yml"), Ok(Config::default()));
    // YAML would take these paths for something else without quotes.
    for path in [
        "~", "null", "true", "12", "0x10", "1e3", "- a", "a: b", "a #b", "'a'", "\"", "*a", "&a",
        "!a", " a ", "%", "ä", "{", "{a}",
    ] {
        let mut config = Config::default();
        config.proxy.tls.cert = Some(path.into());
        config.proxy.addr = Address::Unix(format!("/run/{path}x").into());
        assert_eq!(Config::parse(&config.to_string(), "t.yml"), Ok(config), "{path}");
    }
}

#[test]
fn every_key_can_be_got_and_set() {
    let text = "{proxy: {mode: '0666', threads: 2, pipes: 3, max-connections: 4, accept-proxy-from: ['::1', unix], tls: {ca-cert: a, cert: b, key: c}}, pause: {max-ttl: 5s}, hold: {timeout: 6s, max: 7, overflow: reject}, resume: {max-connecting: 8, rate: 9}, control: {group: a, hosts: [a, b]}, monitor: {addr: 'a:1'}, upstream: {retry-for: 10s, source-addrs: [127.0.0.1], state-file: /d}, fleet: {endpoints: ['http://a:1', 'https://[::1]:2379'], host: e, tls: {ca-cert: a, cert: b, key: c}, username: f, password-file: g}}";
    let full = Config::parse(text, "t.yml").unwrap();
    let mut config = Config::default();
    for key in Config::keys() {
        let value = full.get(key).expect(key);
        config.set(key, &value).expect(key);
        assert!(config.set(key, "").is_err(), "{key} must not be empty");
    }
    assert_eq!(config, full);
    assert_eq!(Config::default().get("proxy.threads"), None);
    assert_eq!(Config::default().get("grace-period").as_deref(), Some("10s"));
    assert_eq!(config.get("proxy"), None);
    assert!(config.set("proxy", "x").is_err());
}

#[test]
fn deep_and_huge_input_is_refused() {
    assert!(error(&"[".repeat(100_000)).starts_with("t.yml:"));
    assert!(error(&format!("proxy: {}", "{a: ".repeat(1_000))).contains("unknown key `a`"));
    assert!(error(&" ".repeat(FILE_BYTES_MAX + 1)).contains("is larger than 1048576 bytes"));
    assert_eq!(Config::parse(&"\n".repeat(FILE_BYTES_MAX), "t.yml"), Ok(Config::default()));
}

#[test]
fn unreadable_files_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let load = |content: Option<&[u8]>| {
        let path = folder.path().join("t.yml");
        if let Some(content) = content {
            fs::File::create(&path).unwrap().write_all(content).unwrap();
        }
        Config::load(&path)
            .map_err(|error| error.to_string().split_once("t.yml").unwrap().1.to_owned())
    };
    assert_eq!(
        load(None).unwrap_err(),
        ": cannot read the configuration: No such file or directory (os error 2); check the path"
    );
    assert_eq!(load(Some(b"grace-period: 1s")).unwrap().grace_period, Duration::from_secs(1));
    assert_eq!(
        load(Some(b"grace-period: 30")).unwrap_err(),
        ":1:15: grace-period: \"30\" ends without a unit; did you mean `30s`?"
    );
    assert_eq!(
        load(Some(b"# \xc3\xa4\n# a\xff")).unwrap_err(),
        ":2:4: this is not UTF-8; save the file as UTF-8"
    );
    assert!(load(Some(&vec![b'\n'; FILE_BYTES_MAX + 1])).unwrap_err().contains("is larger than"));
    assert!(load(Some(&vec![0xff; FILE_BYTES_MAX + 1])).unwrap_err().contains("is larger than"));
    let error = Config::load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("Is a directory") && error.ends_with("; name a file"), "{error}");
}

#[test]
fn settings_must_fit_together() {
    assert_fit(&[
        ("{}", None),
        ("proxy: {tls: {cert: a, key: b}}", None),
        ("proxy: {tls: {cert: a, key: b, ca-cert: c}}", None),
        ("proxy: {tls: {cert: a}}", Some("proxy.tls.key is missing")),
        ("proxy: {tls: {cert: a, ca-cert: c}}", Some("proxy.tls.key is missing")),
        ("proxy: {tls: {key: a}}", Some("proxy.tls.cert is missing")),
        ("proxy: {tls: {ca-cert: a}}", Some("proxy.tls.ca-cert needs proxy.tls.cert")),
        ("proxy: {pipes: 1024}", None),
        ("proxy: {addr: 'unix:///a', mode: 0660}\ncontrol: {addr: 'unix:///b', mode: 660}", None),
        ("control: {mode: 0600}", None),
        ("proxy: {mode: 0660}", Some("proxy.mode: proxy.addr (tcp://localhost:3000) has no file")),
        (
            "control: {addr: 'unix://@a', mode: 0660}",
            Some("control.mode: control.addr (unix://@a)"),
        ),
        ("monitor: {addr: 'unix:///a', mode: 0666}", None),
        ("monitor: {addr: ':9100', mode: 0666}", Some("monitor.mode: monitor.addr (tcp://:9100)")),
        ("monitor: {mode: 0666}", Some("monitor.mode: monitor.addr (not set) has no file")),
        ("control: {addr: 'unix:///a', group: deploy}", None),
        (
            "control: {addr: 'unix:///a', group: deploy, mode: 0644}",
            Some("control.group: control.mode (0644) does not let the group connect; write `0660`"),
        ),
        ("control: {addr: 'unix:///a', group: deploy, mode: 0620}", None),
        ("control: {group: a}", Some("control.group: control.addr (tcp://localhost:3001) has no")),
        ("proxy: {addr: 'unix://@a'}\ncontrol: {addr: 'unix:///a'}", None),
        ("proxy: {addr: 'unix://@a'}\ncontrol: {addr: 'unix://@a'}", Some("is taken")),
        ("proxy: {addr: 'unix://@a'}\nupstream: {addr: 'unix://@a'}", Some("leads back")),
        ("proxy: {pipes: 1025}", Some("proxy.pipes: the most are 1024")),
        ("proxy: {threads: 1024}", None),
        ("proxy: {threads: 1025}", Some("proxy.threads: the most are 1024")),
        ("upstream: {addr: 'localhost:0'}", Some("upstream.addr: tcp://localhost:0 has port 0")),
        ("upstream: {addr: ':80'}", Some("did you mean `localhost:80`?")),
        ("upstream: {connect-timeout: 0s}", Some("upstream.connect-timeout: 0s leaves no time")),
        ("upstream: {retry-for: 0s}", None),
        ("pause: {max-ttl: 1ns}\nhold: {timeout: 1ns}", None),
        ("pause: {max-ttl: 0s}", Some("pause.max-ttl: 0s would end each pause at once; write how")),
        ("hold: {timeout: 0}", Some("hold.timeout: 0s would hold nobody; write how long")),
        ("upstream: {source-addrs: [127.0.0.1]}", None),
        ("upstream: {addr: '127.0.0.1:80', source-addrs: ['::1', 127.0.0.1]}", None),
        (
            "upstream: {addr: '127.0.0.1:80', source-addrs: ['::1']}",
            Some("upstream.source-addrs: none of them is IPv4, as upstream.addr"),
        ),
        (
            "upstream: {addr: '[::1]:80', source-addrs: [127.0.0.1]}",
            Some("upstream.source-addrs: none of them is IPv6"),
        ),
        (
            "upstream: {addr: 'unix:///a', source-addrs: [127.0.0.1]}",
            Some("upstream.source-addrs: unix:///a is a UNIX socket"),
        ),
        ("proxy: {addr: 'localhost:0'}\ncontrol: {addr: 'localhost:0'}", None),
        (
            "proxy: {addr: 'localhost:3001'}",
            Some("control.addr: tcp://localhost:3001 is taken by proxy.addr"),
        ),
        ("monitor: {addr: ':9100'}", None),
    ]);
}

#[test]
fn addresses_must_not_meet() {
    assert_fit(&[
        (
            "monitor: {addr: 'localhost:3000'}",
            Some(
                "monitor.addr: tcp://localhost:3000 is taken by proxy.addr (tcp://localhost:3000)",
            ),
        ),
        (
            "monitor: {addr: ':3001'}",
            Some("monitor.addr: tcp://:3001 is taken by control.addr (tcp://localhost:3001)"),
        ),
        ("monitor: {addr: 'unix:///a'}\ncontrol: {addr: 'unix:///a'}", Some("is taken by control")),
        ("monitor: {addr: 'localhost:3002'}", Some("leads back to monitor.addr")),
        ("proxy: {addr: 'LOCALHOST:3001'}", Some("is taken")),
        ("proxy: {addr: '127.0.0.1:3001'}", Some("is taken")),
        ("proxy: {addr: ':3001'}", Some("is taken")),
        ("proxy: {addr: '0.0.0.0:3001'}", Some("is taken")),
        ("proxy: {addr: '127.0.0.2:3001'}", None),
        ("proxy: {addr: '[::1]:3001'}", None),
        ("proxy: {addr: '[::]:3001'}\ncontrol: {addr: '[::1]:3001'}", Some("is taken")),
        ("proxy: {addr: 'unix:///a'}\ncontrol: {addr: 'unix:///a'}", Some("is taken")),
        ("proxy: {addr: 'unix:///a'}\ncontrol: {addr: 'unix:///b'}", None),
        (
            "upstream: {addr: 'localhost:3000'}",
            Some("upstream.addr: tcp://localhost:3000 leads back to proxy.addr"),
        ),
        ("upstream: {addr: '127.0.0.1:3000'}", Some("leads back")),
        ("upstream: {addr: '0.0.0.0:3000'}", Some("leads back")),
        ("upstream: {addr: 'localhost:3001'}", Some("leads back to control.addr")),
        ("proxy: {addr: ':3002'}", Some("leads back")),
        ("proxy: {addr: 'db.example:80'}\nupstream: {addr: 'DB.example:80'}", Some("leads back")),
        ("proxy: {addr: ':80'}\nupstream: {addr: 'db.example:80'}", None),
        ("proxy: {addr: '0.0.0.0:80'}\nupstream: {addr: '10.0.0.5:80'}", None),
        ("proxy: {addr: '127.0.0.1:80'}\nupstream: {addr: '127.0.0.2:80'}", None),
        ("proxy: {addr: '[::1]:80'}\nupstream: {addr: '127.0.0.1:80'}", None),
        ("proxy: {addr: 'unix:///a'}\nupstream: {addr: 'unix:///a'}", Some("leads back")),
    ]);
}

/// Asserts that each text is accepted, or refused with these words.
#[track_caller]
fn assert_fit(cases: &[(&str, Option<&str>)]) {
    for &(text, expected) in cases {
        let config = Config::parse(text, "t.yml").expect(text);
        match (config.validate(), expected) {
            (Ok(()), None) => {}
            (Err(Error::Config(error)), Some(part)) => {
                assert!(error.contains(part), "{text}: {error}");
            }
            (result, _) => panic!("{text}: {result:?}"),
        }
    }
}

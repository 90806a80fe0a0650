//! The configuration: what is read, what is refused, and with which words.

use std::{fs, io::Write};

use super::*;

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
fn reads_every_key() {
    let text = "\
grace-period: 1m30s
log-level: off
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
pause:
  max-ttl: 10m
hold:
  timeout: 45s
  max: 5000
  overflow: close
resume:
  max-connecting: 16
  rate: 50
control:
  addr: \":3001\"
  mode: 0o640
  hosts: [a.example, b.example]
upstream:
  addr: '[::1]:80'
  connect-timeout: 1s
  retry-for: 2m
  source-addrs: ['::1', 127.0.0.2]
";
    let expected = Config {
        grace_period: Duration::from_secs(90),
        log_level: log::LevelFilter::Off,
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
        },
        pause: PauseConfig { max_ttl: Some(Duration::from_secs(600)) },
        hold: HoldConfig {
            timeout: Some(Duration::from_secs(45)),
            max: NonZeroUsize::new(5_000),
            overflow: Overflow::Close,
        },
        resume: ResumeConfig {
            max_connecting: NonZeroUsize::new(16).unwrap(),
            rate: NonZeroU32::new(50),
        },
        control: ControlConfig {
            addr: Address::tcp("", 3001),
            mode: 0o640,
            hosts: vec!["a.example".into(), "b.example".into()],
        },
        upstream: UpstreamConfig {
            addr: Address::tcp("::1", 80),
            connect_timeout: Duration::from_secs(1),
            retry_for: Duration::from_secs(120),
            source_addrs: ["::1", "127.0.0.2"].map(|ip| ip.parse().unwrap()).into(),
        },
    };
    assert_eq!(Config::parse(text, "t.yml"), Ok(expected.clone()));
    assert_eq!(Config::parse(&text.replace('\n', "\r\n"), "t.yml"), Ok(expected.clone()));
    assert_eq!(Config::parse(&format!("\u{feff}{text}"), "t.yml"), Ok(expected.clone()));
    assert_eq!(Config::parse(&expected.to_string(), "t.yml"), Ok(expected));
}

#[test]
fn what_is_written_reads_the_same() {
    assert_eq!(Config::parse(&Config::default().to_string(), "t.yml"), Ok(Config::default()));
    // Paths that YAML would take for something else, were they not quoted.
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
    let text = "{proxy: {mode: '0666', threads: 2, pipes: 3, max-connections: 4, tls: {ca-cert: a, cert: b, key: c}}, pause: {max-ttl: 5s}, hold: {timeout: 6s, max: 7, overflow: reject}, resume: {max-connecting: 8, rate: 9}, control: {hosts: [a, b]}, upstream: {retry-for: 10s, source-addrs: [127.0.0.1]}}";
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
fn wrong_keys_are_told_with_their_place_and_the_remedy() {
    for (text, expected) in [
        ("prxy:\n  addr: :80", "t.yml:1:1: unknown key `prxy`; did you mean `proxy`?"),
        ("\nproxy:\n  adr: :80", "t.yml:3:3: proxy: unknown key `adr`; did you mean `addr`?"),
        (
            "proxy:\n  tls:\n    crt: x",
            "t.yml:3:5: proxy.tls: unknown key `crt`; did you mean `cert`?",
        ),
        (
            "proxy:\n  reject_clients: true",
            "t.yml:2:3: proxy: unknown key `reject_clients`; did you mean `reject-clients`?",
        ),
        ("threads: 3", "t.yml:1:1: unknown key `threads`; did you mean `proxy.threads`?"),
        (
            "addr: :3",
            "t.yml:1:1: unknown key `addr`; did you mean `proxy.addr`, `control.addr`, `upstream.addr`?",
        ),
        (
            "proxy:\n  x: 3",
            "t.yml:2:3: proxy: unknown key `x`; known here: `addr`, `mode`, `reject-clients`,",
        ),
        (
            "proxy.addr: :3",
            "t.yml:1:1: unknown key `proxy.addr`; write the part before each dot on a line of its own, `proxy:`",
        ),
        ("\"a\\nb\": 3", "t.yml:1:1: unknown key `a\\nb`; known here:"),
        ("<<: {grace-period: 1s}", "t.yml:1:1: unknown key `<<`"),
        ("3: 3", "t.yml:1:1: unknown key `3`"),
        ("? [a]\n: 3", "t.yml:1:3: invalid type: sequence, expected a key"),
        (
            "grace-period: 1s\ngrace-period: 2s",
            "t.yml:2:1: the key `grace-period` is here for the second time; remove one",
        ),
        ("proxy: {}\nproxy: {}", "t.yml:2:1: the key `proxy` is here for the second time"),
        (
            "proxy:\n  addr: :1\n  addr: :1",
            "t.yml:3:3: proxy: the key `addr` is here for the second time",
        ),
    ] {
        check_error(text, expected);
    }
}

#[test]
fn wrong_values_are_told_with_their_place_and_the_remedy() {
    for (text, expected) in [
        (
            "grace-period: 30",
            "t.yml:1:15: grace-period: \"30\" ends without a unit; did you mean `30s`?",
        ),
        (
            "grace-period: 1.5",
            "t.yml:1:15: grace-period: \"1.5\" ends without a unit; did you mean `1.5s`?",
        ),
        ("grace-period: -3s", "t.yml:1:15: grace-period: \"-3s\" has a sign"),
        ("grace-period: 1d", "t.yml:1:15: grace-period: \"1d\" has the unknown unit \"d\""),
        ("grace-period: ''", "t.yml:1:15: grace-period: a duration is missing"),
        (
            "grace-period: [1s]",
            "t.yml:1:15: grace-period: invalid type: sequence, expected one value, such as `10s`",
        ),
        (
            "grace-period: {a: 1s}",
            "t.yml:1:15: grace-period: invalid type: map, expected one value, such as `10s`",
        ),
        (
            "proxy: 3000",
            "t.yml:1:8: proxy: invalid type: integer `3000`, expected the keys `addr`, `mode`, `reject-clients`,",
        ),
        ("proxy: [a]", "t.yml:1:8: proxy: invalid type: sequence, expected the keys `addr`,"),
        ("- a", "t.yml:1:1: invalid type: sequence, expected the keys `grace-period`,"),
        ("tcpause", "t.yml:1:1: invalid type: string \"tcpause\", expected the keys"),
        (
            "proxy:\n  addr: 3000",
            "t.yml:2:9: proxy.addr: \"3000\" is only a number; did you mean `:3000`?",
        ),
        ("proxy:\n  addr: localhost", "t.yml:2:9: proxy.addr: \"localhost\" lacks a port;"),
        (
            "upstream:\n  addr: unix://x",
            "t.yml:2:9: upstream.addr: \"unix://x\" has a relative path; did you mean",
        ),
        (
            "proxy:\n  reject-clients: yes",
            "t.yml:2:19: proxy.reject-clients: \"yes\" is not a boolean; write true or false",
        ),
        ("proxy:\n  reject-clients: on", "write true or false"),
        ("proxy:\n  reject-clients: 1", "write true or false"),
        (
            "proxy:\n  reject-clients: [true]",
            "invalid type: sequence, expected one value, such as `false`",
        ),
        (
            "proxy:\n  threads: 0",
            "t.yml:2:12: proxy.threads: \"0\" is not a number of threads; write 1 or more",
        ),
        ("proxy:\n  pipes: -1", "write 0 or more"),
        ("proxy:\n  max-connections: 0", "\"0\" is not a number of connections; write 1 or more"),
        (
            "upstream:\n  source-addrs: [127.0.0.1:80]",
            "upstream.source-addrs: \"127.0.0.1:80\" is not an IP address; write addresses of this host",
        ),
        ("upstream:\n  source-addrs: [lo]", "\"lo\" is not an IP address"),
        ("proxy:\n  threads: -1", "write 1 or more"),
        ("proxy:\n  threads: 1.5", "write 1 or more"),
        ("proxy:\n  threads: many", "write 1 or more"),
        ("proxy:\n  threads: 99999999999999999999999", "write 1 or more"),
        ("proxy:\n  tls:\n    cert: ''", "t.yml:3:11: proxy.tls.cert: a path is missing"),
        ("proxy:\n  tls:\n    cert: \"a\\0\"", "has a control character"),
        (
            "log-level: loud",
            "t.yml:1:12: log-level: \"loud\" is not a level; the levels are off, error, warn, info, debug, trace",
        ),
        ("log-level: inf", "did you mean `info`?"),
        (
            "control:\n  hosts: a.example",
            "t.yml:2:10: control.hosts: invalid type: string \"a.example\", expected a list, such as",
        ),
        ("control:\n  hosts: [a:80]", "t.yml:2:10: control.hosts: \"a:80\" is not a host name"),
        ("control:\n  hosts: ['']", "a host name is missing"),
        ("control:\n  hosts: [[a]]", "invalid type: sequence, expected a string"),
        (
            "proxy:\n\taddr: :3",
            "t.yml:2:1: found character that cannot start any token, while scanning for the next token; indent with spaces",
        ),
        ("proxy: {", "t.yml:2:1: "),
        ("log-level: *b", "unknown anchor"),
        (
            "grace-period: 1s\n---\ngrace-period: 1s",
            "t.yml: deserializing from YAML containing more than one document",
        ),
        ("proxy:\n  addr: \"a\\nb\"", "\"a\\nb\" has white space or a control character"),
    ] {
        check_error(text, expected);
    }
}

#[test]
fn wrong_bounds_are_told_with_their_place_and_the_remedy() {
    for (text, expected) in [
        ("pause:\n  max-ttl: 10", "t.yml:2:12: pause.max-ttl: \"10\" ends without a unit"),
        ("hold:\n  timeout: soon", "t.yml:2:12: hold.timeout: \"soon\""),
        (
            "hold:\n  max: 0",
            "t.yml:2:8: hold.max: \"0\" is not a number of held clients; write 1 or more, or leave it away for no bound",
        ),
        (
            "hold:\n  overflow: drop",
            "t.yml:2:13: hold.overflow: \"drop\" is nothing that can be done with a client; write reject, close, backlog",
        ),
        ("hold:\n  overflow: rejct", "write reject, close, backlog; did you mean `reject`?"),
        ("hold:\n  overflow: back-log", "did you mean `backlog`?"),
        (
            "resume:\n  max-connecting: 0",
            "t.yml:2:19: resume.max-connecting: \"0\" is not a number of connections; write 1 or more, or leave it away for 128",
        ),
        (
            "resume:\n  rate: 0",
            "t.yml:2:9: resume.rate: \"0\" is not a number of clients in a second; write 1 or more, or leave it away",
        ),
        ("resume:\n  rate: 0.5", "\"0.5\" is not a number of clients in a second"),
        ("resume:\n  rate: 4294967296", "is not a number of clients in a second"),
        ("upstream:\n  retry-for: 30", "upstream.retry-for: \"30\" ends without a unit; did you"),
    ] {
        check_error(text, expected);
    }
}

#[test]
fn wrong_modes_are_told_with_their_place_and_the_remedy() {
    for (text, expected) in [
        (
            "proxy:\n  mode: 666x",
            "t.yml:2:9: proxy.mode: \"666x\" is not the mode of a socket; write three octal digits behind a 0, as in `0660`",
        ),
        ("proxy:\n  mode: ''", "is not the mode of a socket"),
        ("proxy:\n  mode: 6", "is not the mode of a socket"),
        ("proxy:\n  mode: 0o", "is not the mode of a socket"),
        ("proxy:\n  mode: +660", "is not the mode of a socket"),
        ("proxy:\n  mode: -660", "is not the mode of a socket"),
        ("proxy:\n  mode: 01777", "is not the mode of a socket"),
        ("proxy:\n  mode: rw-rw----", "is not the mode of a socket"),
        ("proxy:\n  mode: 77777777777777777777", "is not the mode of a socket"),
        ("proxy:\n  mode: 0066", "keeps the socket's own user out"),
        // What a tool that reads YAML and writes it again makes of 0660, 0600 and 0777.
        (
            "control:\n  mode: 432",
            "t.yml:2:9: control.mode: \"432\" keeps the socket's own user out",
        ),
        ("control:\n  mode: 384", "is not the mode of a socket"),
        ("control:\n  mode: 511", "keeps the socket's own user out"),
    ] {
        check_error(text, expected);
    }
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
    for (text, expected) in [
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
    ] {
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

#[test]
fn the_sample_is_the_default_but_for_retry_for_and_shows_every_key() {
    let sample = include_str!("../../tcpause.yml");
    let mut expected = Config::default();
    // The default is that of the original; whoever begins with the sample gets what serves him best.
    expected.upstream.retry_for = Duration::from_secs(30);
    assert_eq!(Config::parse(sample, "tcpause.yml"), Ok(expected));
    let sample: serde_yaml::Value = serde_yaml::from_str(sample).unwrap();
    for key in Config::keys() {
        let shown = key.split('.').try_fold(&sample, |section, name| section.get(name));
        assert!(shown.is_some(), "{key} is missing");
    }
}

#[test]
fn a_damaged_file_is_an_error_or_a_configuration_but_no_panic() {
    let sample = include_str!("../../tcpause.yml")
        .replace("cert:", "cert: /a b")
        .replace("hosts: []", "hosts: [a.b]");
    let letters: Vec<char> = sample.chars().collect();
    let seed = 0x7463_7061_7573_6532;
    let mut state: u64 = seed;
    let mut next = |bound: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % bound
    };
    for round in 0..1_000 {
        let mut damaged = letters.clone();
        for _ in 0..=next(3) {
            let place = next(damaged.len());
            match next(3) {
                0 => drop(damaged.remove(place)),
                1 => damaged.insert(place, ['\t', ':', '"', '[', '\0', '&', '-', '\n'][next(8)]),
                _ => damaged.swap(place, next(letters.len() - 3)),
            }
        }
        let damaged: String = damaged.into_iter().collect();
        match Config::parse(&damaged, "t.yml") {
            Ok(config) => {
                assert_eq!(
                    Config::parse(&config.to_string(), "t.yml"),
                    Ok(config),
                    "seed {seed}, round {round}"
                );
            }
            Err(error) => {
                let error = error.to_string();
                assert!(!error.contains(char::is_control), "{error:?}, seed {seed}, round {round}");
            }
        }
    }
}

//! The command line, from arguments to configuration and generated pages.

use std::{collections::BTreeSet, fs, os::unix::ffi::OsStringExt};

use tcpause::settings::Completion;

mod corpus;

use super::*;

fn read(line: &str) -> Result<Invocation, String> {
    parse(line.split_whitespace().map(OsString::from))
}

fn configured(line: &str) -> Config {
    without_files(&read(line).expect(line)).read().expect(line).0
}

/// Returns the defaults with the options applied, independent of the files on this machine.
fn apply(invocation: &Invocation) -> Result<Config, String> {
    let configured = without_files(invocation).configure();
    configured.map(|(config, _)| config).map_err(|error| error.to_string())
}

fn without_files(invocation: &Invocation) -> Invocation {
    Invocation { config_file: Some("/dev/null".into()), ..invocation.clone() }
}

#[test]
fn options_are_the_keys_of_the_file_with_dashes() {
    let expected: BTreeSet<String> = Config::keys().map(|key| key.replace('.', "-")).collect();
    let mut found = BTreeSet::new();
    for opt in OPTIONS.iter() {
        if let Action::Set(key) = opt.action {
            assert_eq!(opt.long, key.replace('.', "-"));
            assert!(found.insert(opt.long.to_owned()), "{} is there twice", opt.long);
        }
    }
    assert_eq!(found, expected);
    let names: BTreeSet<&str> = OPTIONS.iter().map(|opt| opt.long).collect();
    assert_eq!(names.len(), OPTIONS.len());
    let letters: BTreeSet<char> = OPTIONS.iter().filter_map(|opt| opt.short).collect();
    assert_eq!(letters, BTreeSet::from(['c', 'g', 'h', 'V']));
}

#[test]
fn the_choices_are_valid() {
    for opt in OPTIONS.iter() {
        if let (Action::Set(key), Completion::Choices(values)) = (opt.action, &opt.completion) {
            for value in *values {
                assert_eq!(Config::default().set(key, value), Ok(()), "{key} {value}");
            }
        }
    }
}

#[test]
fn reads_commands() {
    for (line, command) in [
        ("", Command::Run),
        ("--proxy-addr :1", Command::Run),
        ("--check-config", Command::CheckConfig),
        ("-h", Command::Help(None)),
        ("--help", Command::Help(None)),
        ("--help=x", Command::Help(None)),
        ("help", Command::Help(None)),
        ("help exec", Command::Help(Some("exec"))),
        ("help exit-codes", Command::Help(Some("exit-codes"))),
        ("exec --wait 1s --help", Command::Help(Some("exec"))),
        ("pause", Command::Client(Client::Pause)),
        ("--ttl 1s pause", Command::Client(Client::Pause)),
        ("resume --name a", Command::Client(Client::Resume)),
        ("--json status", Command::Client(Client::Status)),
        ("wait --timeout 1s", Command::Client(Client::Wait)),
        ("exec --ttl 1s -- ls --help", Command::Client(Client::Exec)),
        ("upgrade --control-addr :1", Command::Client(Client::Upgrade)),
        ("reload", Command::Client(Client::Upgrade)),
        ("exec ls --proxy-addr", Command::Client(Client::Exec)),
        ("--proxy-addr nonsense --help --unknown", Command::Help(None)),
        ("-V", Command::Version),
        ("--version", Command::Version),
        ("man", Command::Man),
        ("demo", Command::Demo),
        ("unit", Command::Unit(UNITS[0].1)),
        ("unit socket", Command::Unit(UNITS[1].1)),
        ("unit template", Command::Unit(UNITS[2].1)),
        ("unit steering", Command::Unit(UNITS[3].1)),
        ("completion bash", Command::Completion(Shell::Bash)),
        ("completion zsh", Command::Completion(Shell::Zsh)),
        ("completion fish", Command::Completion(Shell::Fish)),
        ("-g 1s completion fish", Command::Completion(Shell::Fish)),
        ("-- man", Command::Man),
    ] {
        assert_eq!(read(line).map(|invocation| invocation.command), Ok(command), "{line}");
    }
}

#[test]
fn every_option_sets_its_key() {
    for (line, key, value) in [
        ("--grace-period 1m", "grace-period", "1m"),
        ("-g 1m", "grace-period", "1m"),
        ("-g1m", "grace-period", "1m"),
        ("-g=1m", "grace-period", "1m"),
        ("--grace-period=1m", "grace-period", "1m"),
        ("-g 1s -g 2s", "grace-period", "2s"),
        ("--log-level debug", "log-level", "debug"),
        ("--proxy-addr :1", "proxy.addr", "tcp://:1"),
        ("--proxy-reject-clients", "proxy.reject-clients", "true"),
        ("--proxy-reject-clients=true", "proxy.reject-clients", "true"),
        ("--proxy-reject-clients --proxy-reject-clients=false", "proxy.reject-clients", "false"),
        ("--proxy-reject-with close", "proxy.reject-with", "close"),
        ("--proxy-retry-after-interval 0", "proxy.retry-after-interval", "0s"),
        ("--proxy-block-poll-interval 1s", "proxy.block-poll-interval", "1s"),
        ("--proxy-close-poll-interval 1s", "proxy.close-poll-interval", "1s"),
        ("--proxy-tls-cert=a --proxy-tls-key b --proxy-tls-ca-cert c", "proxy.tls.ca-cert", "c"),
        ("--proxy-tls-cert=a --proxy-tls-key b", "proxy.tls.cert", "a"),
        ("--proxy-tls-cert=a --proxy-tls-key b", "proxy.tls.key", "b"),
        ("--proxy-threads 2", "proxy.threads", "2"),
        ("--proxy-pipes 0", "proxy.pipes", "0"),
        ("--proxy-max-connections 9", "proxy.max-connections", "9"),
        ("--pause-max-ttl 10m", "pause.max-ttl", "10m"),
        ("--hold-timeout 45s", "hold.timeout", "45s"),
        ("--hold-max 5000", "hold.max", "5000"),
        ("--hold-overflow close", "hold.overflow", "close"),
        ("--resume-max-connecting 16", "resume.max-connecting", "16"),
        ("--resume-rate 50", "resume.rate", "50"),
        ("--control-addr unix:///c", "control.addr", "unix:///c"),
        ("--control-group deploy", "control.group", "deploy"),
        ("--control-hosts a,b", "control.hosts", "a,b"),
        ("--upstream-addr u:1", "upstream.addr", "tcp://u:1"),
        ("--upstream-connect-timeout 1s", "upstream.connect-timeout", "1s"),
        ("--upstream-retry-for 30s", "upstream.retry-for", "30s"),
        ("--upstream-source-addrs ::1,127.0.0.1", "upstream.source-addrs", "::1,127.0.0.1"),
    ] {
        assert_eq!(configured(line).get(key).as_deref(), Some(value), "{line}");
    }
}

#[test]
fn wrong_arguments_are_told_with_the_remedy() {
    for (line, expected) in [
        ("--proxy-adr :1", "unknown option --proxy-adr; did you mean --proxy-addr?"),
        ("--nonsense", "unknown option --nonsense; tcpause --help lists all"),
        ("--conf x", "unknown option --conf; tcpause --help lists all"),
        ("-x", "unknown option -x; tcpause --help lists all"),
        ("-config x", "unknown option -config; write it with two dashes: --config"),
        ("-config=x", "unknown option -config; write it with two dashes: --config"),
        ("-proxy-addr :1", "unknown option -proxy-addr; write it with two dashes: --proxy-addr"),
        ("-proxy-adr :1", "unknown option -proxy-adr; did you mean --proxy-addr?"),
        (
            "-grace-period=1s",
            "unknown option -grace-period; write it with two dashes: --grace-period",
        ),
        ("--proxy-addr", "--proxy-addr needs a value: --proxy-addr ADDRESS"),
        ("--proxy-addr=", "--proxy-addr needs a value: --proxy-addr ADDRESS"),
        ("-c", "--config needs a value: --config FILE"),
        (
            "--proxy-reject-clients=",
            "--proxy-reject-clients needs a value: --proxy-reject-clients=true",
        ),
        (
            "--proxy-reject-clients=yes",
            "--proxy-reject-clients: \"yes\" is not a boolean; write true or false",
        ),
        ("--proxy-reject-clients true", "a switch takes its value behind an equals sign"),
        ("--proxy-addr --help", "--proxy-addr needs a value, but \"--help\" follows"),
        ("--check-config=x", "unexpected argument for option '--check-config': \"x\""),
        (
            "start",
            "unknown command \"start\"; the commands are pause, resume, status, wait, exec, connections, kill, switch, fleet, upgrade, reload, demo, help, completion, unit, man",
        ),
        ("dmo", "unknown command \"dmo\"; did you mean demo?"),
        ("pause --tll 1s", "unknown option --tll; did you mean --ttl?"),
        ("pause --nonsense", "unknown option --nonsense; tcpause pause --help lists all"),
        ("pause --release 1", "unknown option --release; it belongs to tcpause resume"),
        ("--release 1", "unknown option --release; it belongs to tcpause resume"),
        ("status --proxy-addr :1", "unknown option --proxy-addr; tcpause status --help lists all"),
        ("status -g 1s", "unknown option --grace-period; tcpause status --help lists all"),
        ("status -x", "unknown option -x; tcpause status --help lists all"),
        ("pause -ttl 1s", "unknown option -ttl; write it with two dashes: --ttl"),
        ("pause now", "unexpected argument \"now\"; remove it"),
        ("pause --ttl 90", "--ttl: \"90\" ends without a unit; did you mean `90s`?"),
        ("pause --mode drop", "--mode: \"drop\" is not known; write hold or reject"),
        (
            "pause --mode rejct",
            "--mode: \"rejct\" is not known; write hold or reject; did you mean reject?",
        ),
        (
            "pause --on-timeout what",
            "--on-timeout: \"what\" is not known; write resume, keep or kill",
        ),
        ("exec --on-timeout keep x", "--on-timeout: \"keep\" is not known; write resume or kill"),
        ("resume --release 0", "--release: \"0\" is too few; write 1 or more"),
        ("resume --release x", "--release: \"x\" is not a number; write 1 or more"),
        ("status --json=no", "--json: \"no\" is too much; write the option alone"),
        ("exec", "exec: name a command to run: tcpause exec -- "),
        ("exec --wait 1s --", "exec: name a command to run: tcpause exec -- "),
        ("help x", "unknown command or topic \"x\"; `tcpause help` lists them"),
        ("help drainig", "; did you mean draining? `tcpause help` lists them"),
        ("help exec x", "unexpected argument \"x\"; remove it"),
        ("man x", "unexpected argument \"x\"; remove it"),
        ("completion", "completion: name a shell: bash, zsh, fish"),
        ("completion tcsh", "completion: unknown shell \"tcsh\"; there are bash, zsh, fish"),
        ("completion bash x", "unexpected argument \"x\""),
        ("-g 30", "--grace-period: \"30\" ends without a unit; did you mean `30s`?"),
        ("-g -3s", "--grace-period: \"-3s\" has a sign"),
        ("--log-level loud", "--log-level: \"loud\" is not a level"),
        ("--proxy-addr localhost", "--proxy-addr: \"localhost\" lacks a port"),
        (
            "--upstream-addr unix://a",
            "--upstream-addr: \"unix://a\" has a relative path; did you mean `unix:///a`?",
        ),
        ("--proxy-threads 0", "--proxy-threads: \"0\" is not a number of threads"),
        ("--proxy-threads 4096", "--proxy-threads: the most are 1024"),
        ("--pause-max-ttl 0s", "--pause-max-ttl: 0s would end each pause at once"),
        ("--hold-timeout 0s", "--hold-timeout: 0s would hold nobody"),
        ("--hold-max 0", "--hold-max: \"0\" is not a number of held clients"),
        ("--proxy-reject-with htp", "file:PATH; did you mean `http`?"),
        ("--hold-overflow rejects", "did you mean `reject`?"),
        ("--resume-max-connecting 0", "--resume-max-connecting: \"0\" is not a number of"),
        ("--resume-rate fast", "--resume-rate: \"fast\" is not a number of clients in a second"),
        ("--upstream-retry-for=-1s", "--upstream-retry-for: \"-1s\" has a sign"),
        ("--control-hosts a,,b", "--control-hosts: a host name is missing"),
        ("--upstream-source-addrs eth0", "--upstream-source-addrs: \"eth0\" is not an IP address"),
        ("--proxy-tls-cert a", "proxy.tls.key is missing"),
        ("--upstream-addr localhost:3000", "leads back to proxy.addr"),
        ("--upstream-addr localhost:0", "--upstream-addr: tcp://localhost:0 has port 0"),
        ("--proxy-addr :3002", "upstream.addr: tcp://localhost:3002 leads back to proxy.addr"),
        ("--config /nowhere/x.yml", "/nowhere/x.yml: cannot read the configuration: No such file"),
    ] {
        let outcome = read(line).and_then(|invocation| match invocation.config_file {
            Some(_) => {
                invocation.configure().map(|(config, _)| config).map_err(|error| error.to_string())
            }
            None => apply(&invocation),
        });
        let error = outcome.expect_err(line);
        assert!(error.contains(expected), "{line}: {error}");
        assert!(!error.contains(char::is_control), "{error:?}");
    }
}

#[test]
fn the_fleet_has_words_of_its_own() {
    for (line, client, arguments) in [
        ("resume --fleet deploy", Client::Resume, &["deploy"][..]),
        ("resume --fleet --name deploy", Client::Resume, &[]),
        ("fleet forget web-17", Client::Fleet, &["forget", "web-17"]),
        ("status --fleet --json", Client::Status, &[]),
        ("pause --fleet --without a,b", Client::Pause, &[]),
    ] {
        let invocation = read(line).expect(line);
        assert_eq!(invocation.command, Command::Client(client), "{line}");
        assert_eq!(invocation.arguments, arguments, "{line}");
        assert_eq!(invocation.is_of_fleet(), line.contains("--fleet"), "{line}");
    }
    for (line, expected) in [
        ("resume deploy", "unexpected argument \"deploy\"; remove it"),
        ("resume --fleet a b", "unexpected argument \"b\"; remove it"),
        ("fleet", "fleet: name what to do: tcpause fleet forget HOST"),
        ("fleet forget", "fleet forget: name a host"),
        ("fleet forget a b", "unexpected argument \"b\"; remove it"),
        (
            "fleet status",
            "fleet: \"status\" is not known; write fleet forget HOST, or status --fleet",
        ),
        ("exec --if-lost stop x", "--if-lost: \"stop\" is not known; write keep or kill"),
        ("exec --without", "--without needs a value: --without HOSTS"),
    ] {
        let error = read(line).expect_err(line);
        assert!(error.contains(expected), "{line}: {error}");
    }
    let exec = |line: &str| read(line).unwrap().given("ttl").map(str::to_owned);
    assert_eq!((exec("exec x"), exec("exec --ttl 10s x")), (None, Some("10s".to_owned())));
}

#[test]
fn a_command_has_its_options_and_defaults() {
    let exec = read("--name a exec --wait 1s --wait 2s -c f -- ls -l -- --wait 3s").unwrap();
    assert_eq!(exec.program, ["ls", "-l", "--", "--wait", "3s"]);
    for (long, value) in [
        ("name", Some("a")),
        ("wait", Some("2s")),
        ("ttl", Some("10s")),
        ("on-timeout", Some("resume")),
        ("reason", None),
    ] {
        assert_eq!(exec.asked(long), value, "{long}");
    }
    assert_eq!(exec.file(), Ok(Some("f".into())));
    let pause = read("--control-addr :1 pause").unwrap();
    assert_eq!((pause.asked("wait"), pause.setting("control.addr")), (None, Some(":1")));
}

/// Options of the same name agree on taking a value, as an option is read before its command is known.
#[test]
fn namesakes_take_a_value_alike() {
    let all = || OPTIONS.iter().chain(COMMANDS.iter().flat_map(|word| word.options).copied());
    for opt in all() {
        let namesakes = all().filter(|other| other.long == opt.long);
        for other in namesakes {
            assert_eq!(
                (other.short, other.value.is_some()),
                (opt.short, opt.value.is_some()),
                "{}",
                opt.long
            );
        }
    }
}

#[test]
fn arguments_that_are_not_utf8_or_empty_are_told() {
    let bad = OsString::from_vec(b"a\xff\n".to_vec());
    let error = parse(["--proxy-addr".into(), bad.clone()]).unwrap_err();
    assert_eq!(error, "--proxy-addr: \"a\u{fffd}\\n\" is not UTF-8");
    assert_eq!(parse(["-c".into(), bad.clone()]).unwrap().config_file, Some(bad.into()));
    assert_eq!(
        parse(["-c".into(), "".into()]).unwrap_err(),
        "--config needs a value: --config FILE"
    );
    assert!(parse(["".into()]).unwrap_err().starts_with("unknown command \"\""));
    assert_eq!(
        parse(["--a\nb".into()]).unwrap_err(),
        "unknown option --a\\nb; tcpause --help lists all"
    );
}

#[test]
fn an_option_beats_the_file_and_the_file_the_default() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("t.yml");
    fs::write(&file, "grace-period: 1s\nproxy: {addr: ':1', reject-clients: true}").unwrap();
    let arguments = [
        "-c".into(),
        file.clone().into(),
        "-g".into(),
        "2s".into(),
        "--proxy-reject-clients=false".into(),
    ];
    let (config, from) = parse(arguments).unwrap().configure().unwrap();
    assert_eq!(from, Some(file));
    assert_eq!(config.get("grace-period").as_deref(), Some("2s"));
    assert_eq!(config.get("proxy.addr").as_deref(), Some("tcp://:1"));
    assert!(!config.proxy.reject_clients);
    assert_eq!(config.upstream, Config::default().upstream);
}

#[test]
fn the_first_file_that_exists_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("a.yml"), folder.path().join("b.yml"));
    let find = || find_config([first.as_path(), second.as_path()]).unwrap();
    assert_eq!(find(), None);
    fs::write(&second, "").unwrap();
    assert_eq!(find(), Some(second.clone()));
    fs::write(&first, "").unwrap();
    assert_eq!(find(), Some(first.clone()));
    // A name that is too long for the system makes the look-up fail, so the file neither exists nor is absent.
    let long = PathBuf::from("x".repeat(5_000));
    let error = find_config([long.as_path()]).unwrap_err().to_string();
    assert!(error.contains("cannot look for the configuration"), "{error}");
}

#[test]
fn the_corpus_of_the_fuzz_target_is_replayed() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/corpus/command_line");
    let files: Vec<_> = fs::read_dir(folder).unwrap().collect();
    assert!(!files.is_empty());
    for file in files {
        let path = file.unwrap().path();
        println!("{}", path.display());
        corpus::command_line(&fs::read(path).unwrap());
    }
}

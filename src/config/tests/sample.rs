//! The sample file, which follows from the table of settings.

use std::{env, fmt::Write, fs, time::Duration};

use super::super::{Config, settings::SECTIONS};

const HEAD: &str = "\
# tcpause reads this file as ./tcpause.yml or /etc/tcpause/tcpause.yml, or where --config says.
# It shows every key with its default, but for upstream.retry-for; what is left out keeps it. An option of the command line
# beats the file: --proxy-addr beats proxy.addr. Check a change with: tcpause --check-config
#
# Addresses:  host:port   :port (all interfaces)   [ipv6]:port   unix:///absolute/path   unix://@name
# Durations:  as in Go, with a unit: 100ms, 30s, 1m30s, 1.5h
# Modes:      octal, and quoted, so that no other program makes a decimal of them: \"0660\"
";
/// Width of a comment, as of the head.
const COLUMNS_MAX: usize = 124;

/// Returns the configuration that the sample shows: the defaults, except that a new installation should wait for an absent
/// upstream. The default does not, as in the original.
fn shown() -> Config {
    let mut config = Config::default();
    config.upstream.retry_for = Duration::from_secs(30);
    config
}

/// Prints the sample from the rows of the table.
fn sample() -> String {
    let (shown, default) = (shown(), Config::default());
    let mut text = HEAD.to_owned();
    let mut above: Vec<&str> = Vec::new();
    for setting in Config::settings() {
        let mut path: Vec<&str> = setting.key.split('.').collect();
        let name = path.pop().unwrap();
        text.push('\n');
        // After a subsection, the section goes on without a second head.
        if !above.starts_with(&path) {
            let depth = path.len() - 1;
            if let Some((_, title)) = SECTIONS.iter().find(|(section, _)| path == [*section]) {
                comment(&mut text, depth, &format!("{title}."));
            }
            writeln!(text, "{:1$}{2}:", "", depth * 2, path[depth]).unwrap();
        }
        above.clone_from(&path);
        // The long text of a switch is left out, as it tells the syntax of the option.
        let more = if setting.value.is_some() { setting.more } else { "" };
        let mut meaning = format!("{}. {more}", setting.help);
        for key in Config::keys() {
            meaning = meaning.replace(&format!("--{}", key.replace('.', "-")), key);
        }
        let (value, kept) = (setting.get(&shown), default.get(setting.key));
        if shown.get(setting.key) != kept {
            write!(meaning, " The default is {}.", kept.unwrap()).unwrap();
        }
        comment(&mut text, path.len(), &meaning);
        let value = match value {
            serde_yaml::Value::Null => String::new(),
            value => format!(" {}", serde_yaml::to_string(&value).unwrap().trim()),
        };
        let value = value.replace("tcp://", "").replace('\'', "\"");
        writeln!(text, "{:1$}{name}:{value}", "", path.len() * 2).unwrap();
    }
    text
}

/// Adds a comment, broken into lines of [`COLUMNS_MAX`].
fn comment(text: &mut String, depth: usize, words: &str) {
    let start = format!("{:1$}#", "", depth * 2);
    let mut line = start.clone();
    for word in words.split_whitespace() {
        if line.len() + 1 + word.len() > COLUMNS_MAX {
            *text += &line;
            text.push('\n');
            line.clone_from(&start);
        }
        line.push(' ');
        line += word;
    }
    *text += &line;
    text.push('\n');
}

/// `TCPAUSE_BLESS=1 cargo test --lib the_sample` writes the file anew.
#[test]
fn the_sample_follows_from_the_table() {
    let (path, expected) = (concat!(env!("CARGO_MANIFEST_DIR"), "/tcpause.yml"), sample());
    if env::var_os("TCPAUSE_BLESS").is_some() {
        fs::write(path, &expected).unwrap();
    }
    assert!(
        fs::read_to_string(path).unwrap() == expected,
        "write tcpause.yml anew with: TCPAUSE_BLESS=1 cargo test --lib the_sample"
    );
}

#[test]
fn the_sample_is_the_default_but_for_retry_for_and_shows_every_key() {
    let sample = include_str!("../../../tcpause.yml");
    assert_eq!(Config::parse(sample, "tcpause.yml"), Ok(shown()));
    let sample: serde_yaml::Value = serde_yaml::from_str(sample).unwrap();
    for key in Config::keys() {
        let shown = key.split('.').try_fold(&sample, |section, name| section.get(name));
        assert!(shown.is_some(), "{key} is missing");
    }
}

#[test]
fn a_damaged_file_is_an_error_or_a_configuration_but_no_panic() {
    let sample = include_str!("../../../tcpause.yml")
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

//! The text of the metrics, and the page that shows their table.

use std::{collections::BTreeSet, env, fs};

use super::*;
use crate::handle::{MemberStatus, SteeringStatus};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/bin/tcpause/help/monitoring.md");
const ALERTS: &str = include_str!("../../bin/tcpause/alerts.yml");

/// Returns the metrics of a proxy that steers, is paused and in a fleet, so that no family is absent.
fn text() -> String {
    let handle = crate::control::tests::handle();
    handle.pause();
    let source = Source::new();
    let mut snapshot = source.look(&handle);
    snapshot.metrics.resume_expected = Some(2e9);
    snapshot.metrics.status.fleet = Some(member());
    snapshot.metrics.status.steering = Some(SteeringStatus::default());
    snapshot.metrics.busy = vec![Duration::from_millis(1); 2];
    snapshot.to_text().unwrap()
}

fn member() -> MemberStatus {
    MemberStatus {
        name: "shop".to_owned(),
        host: "web-1".to_owned(),
        connected: true,
        last_contact_seconds: Some(1.25),
        policy: "serve".to_owned(),
        members: 24,
        lost: 2,
        rounds_failed: 3,
        error: None,
        coordinating: vec!["deploy".to_owned()],
    }
}

/// Returns the sample lines of a family.
fn samples<'a>(text: &'a str, family: &Family) -> Vec<&'a str> {
    let head = format!("# HELP {} {}\n# TYPE {0} {}\n", family.name, family.help, family.kind);
    let (_, rest) = text.split_once(&head).unwrap_or_else(|| panic!("no {head}"));
    let samples: Vec<_> = rest.lines().take_while(|line| !line.starts_with('#')).collect();
    assert!(!samples.is_empty(), "{}", family.name);
    samples
}

/// Returns the labels of a family with their words, but for those whose words depend on the proxy.
fn labels(samples: &[&str]) -> String {
    let mut found: Vec<(&str, Vec<&str>)> = Vec::new();
    let sets = samples.iter().filter_map(|line| Some(line.split_once('{')?.1.split_once('}')?.0));
    for (label, word) in sets.flat_map(|set| set.split(',')).filter_map(|it| it.split_once('=')) {
        let word = word.trim_matches('"');
        match found.iter_mut().find(|(other, _)| *other == label) {
            Some((_, words)) if !words.contains(&word) => words.push(word),
            Some(_) => {}
            None => found.push((label, vec![word])),
        }
    }
    let shown = found.iter().filter(|(label, _)| *label != "le").map(|(label, words)| {
        let words = match *label {
            "version" | "worker" => String::new(),
            _ => format!(": {}", words.join(", ")),
        };
        format!(" By `{label}`{words}.")
    });
    shown.collect::<Vec<_>>().concat()
}

#[test]
fn each_family_has_its_head_and_its_samples() {
    let text = text();
    assert!(text.ends_with('\n'));
    let names: BTreeSet<&str> = FAMILIES.iter().map(|family| family.name).collect();
    assert_eq!(names.len(), FAMILIES.len());
    let mut series = BTreeSet::new();
    for family in FAMILIES {
        assert_eq!(family.kind == "counter", family.name.ends_with("_total"), "{}", family.name);
        assert!(family.help.ends_with('.') && !family.help.contains(['\\', '\n', '|']));
        for sample in samples(&text, family) {
            let (name, value) = sample.rsplit_once(' ').unwrap();
            assert!(series.insert(name.to_owned()), "twice: {name}");
            assert!(value.parse::<f64>().is_ok_and(f64::is_finite), "{sample}");
            let bare = name.split('{').next().unwrap();
            let suffix = bare.strip_prefix(family.name).unwrap_or_else(|| panic!("{sample}"));
            let suffixes = match family.kind {
                "histogram" => &["_bucket", "_sum", "_count"][..],
                _ => &[""],
            };
            assert!(suffixes.contains(&suffix), "{sample}");
        }
    }
    let lines = text.lines().filter(|line| !line.starts_with('#')).count();
    assert_eq!(lines, series.len(), "a line of no family");
}

#[test]
fn a_histogram_is_cumulative_and_ends_with_its_sum() {
    let histogram = HistogramSnapshot {
        bounds: &[100, 250_000, 10_000_000],
        cumulative: vec![0, 2, 5],
        count: 7,
        sum: 61_250_000,
    };
    let family = FAMILIES.iter().find(|family| family.kind == "histogram").unwrap();
    for (labels, expected) in [
        (
            "",
            "_bucket{le=\"0.0001\"} 0\n_bucket{le=\"0.25\"} 2\n_bucket{le=\"10\"} 5\n_bucket{le=\"+Inf\"} 7\n_sum 61.25\n_count 7\n",
        ),
        (
            "outcome=\"left\",",
            "_bucket{outcome=\"left\",le=\"0.0001\"} 0\n_bucket{outcome=\"left\",le=\"0.25\"} 2\n_bucket{outcome=\"left\",le=\"10\"} 5\n_bucket{outcome=\"left\",le=\"+Inf\"} 7\n_sum{outcome=\"left\"} 61.25\n_count{outcome=\"left\"} 7\n",
        ),
    ] {
        let mut text = String::new();
        Samples { text: &mut text, family }.histogram(labels, &histogram).unwrap();
        assert_eq!(text.replace(family.name, ""), expected);
    }
}

#[test]
fn what_does_not_hold_now_is_absent() {
    let handle = crate::control::tests::handle();
    let text = |handle: &Handle| Source::new().look(handle).to_text().unwrap();
    let timestamps = ["tcpause_paused_since_timestamp", "tcpause_resume_expected_timestamp"];
    let running = text(&handle);
    assert!(running.contains("\ntcpause_paused 0\n"));
    assert!(!timestamps.iter().any(|name| running.contains(name)), "{running}");
    assert!(!running.contains("tcpause_fleet_"), "it is in none: {running}");
    assert!(!running.contains("tcpause_steer"), "it is off: {running}");
    handle.pause();
    let paused = text(&handle);
    assert!(paused.contains("\ntcpause_paused 1\n"));
    assert!(paused.contains("\ntcpause_pauses{end=\"open\"} 1\n"));
    assert!(paused.contains(timestamps[0]), "{paused}");
    assert!(!paused.contains(timestamps[1]), "it is open-ended: {paused}");
}

#[test]
fn the_steering_is_told_in_three_families() {
    let mut snapshot = Source::new().look(&crate::control::tests::handle());
    for (state, number) in [("steering", 1), ("relaying", 0), ("unavailable", 0)] {
        let (state, why) = (state.to_owned(), None);
        snapshot.metrics.status.steering =
            Some(SteeringStatus { state, why, active: 12, total: 48 });
        let text = snapshot.to_text().unwrap();
        for line in [
            &format!("\ntcpause_steering {number}\n"),
            "\ntcpause_steered_connections 12\n",
            "\ntcpause_steered_syns_total 48\n",
        ] {
            assert!(text.contains(line), "no {line} in {text}");
        }
    }
}

#[test]
fn answers_are_counted_by_class() {
    let source = Source::new();
    for answer in ["HTTP/1.1 200 OK", "HTTP/1.1 204 No Content", "HTTP/1.1 503 a", "HTTP/1.1", ""] {
        source.count(answer.as_bytes());
    }
    let handle = crate::control::tests::handle();
    assert_eq!(source.look(&handle).answers, [("2xx", 2), ("4xx", 0), ("5xx", 1)]);
}

/// `TCPAUSE_BLESS=1 cargo test --lib the_page_shows_the_table` writes the table anew.
#[test]
fn the_page_shows_the_table() {
    let text = text();
    let rows = FAMILIES.iter().map(|family| {
        let (help, labels) = (family.help, labels(&samples(&text, family)));
        format!("| `{}` | {} | {help}{labels} |\n", family.name, family.kind)
    });
    let head = "| metric | type | meaning |\n|---|---|---|\n".to_owned();
    let table: String = [head].into_iter().chain(rows).collect();
    let [begin, end] = ["<!-- metrics -->\n", "<!-- /metrics -->"];
    let page = fs::read_to_string(PAGE).unwrap();
    let (before, rest) = page.split_once(begin).unwrap();
    let (shown, after) = rest.split_once(end).unwrap();
    if env::var_os("TCPAUSE_BLESS").is_some() {
        fs::write(PAGE, [before, begin, &table, end, after].concat()).unwrap();
    }
    assert!(
        shown == table,
        "write the table of monitoring.md anew with: TCPAUSE_BLESS=1 cargo test --lib the_page_shows_the_table"
    );
}

#[test]
fn the_page_shows_the_alerts() {
    let page = fs::read_to_string(PAGE).unwrap();
    assert!(
        page.contains(&format!("```yaml\n{ALERTS}```\n")),
        "monitoring.md must show alerts.yml"
    );
    for word in ALERTS.split(|char: char| !char.is_ascii_lowercase() && char != '_') {
        let is_metric = word.starts_with("tcpause_");
        assert!(!is_metric || FAMILIES.iter().any(|family| family.name == word), "{word}");
    }
}

//! The sample file.

use std::time::Duration;

use super::super::Config;

#[test]
fn the_sample_is_the_default_but_for_retry_for_and_shows_every_key() {
    let sample = include_str!("../../../tcpause.yml");
    let mut expected = Config::default();
    // The default is that of the original, which does not wait for an absent upstream; a new installation should.
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

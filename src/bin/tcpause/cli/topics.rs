//! The pages of the manual, which are compiled into the program.

use super::commands::COMMANDS;
use tcpause::suggest::nearest;

/// A page of the manual, in Markdown.
pub(crate) struct Topic {
    /// The word behind `tcpause help`.
    pub(crate) name: &'static str,
    /// Text: the title in a line, one sentence, and the rest.
    pub(crate) text: &'static str,
}

/// The page with the key of each setting.
const SETTINGS_PAGE: &str = include_str!("../help/settings.md");

macro_rules! topics {
    ($($name:literal),+) => {
        [$(Topic { name: $name, text: include_str!(concat!("../help/", $name, ".md")) }),+]
    };
}

/// Every page, in the order of the help and of the man page.
pub(crate) static TOPICS: [Topic; 24] = topics![
    "maintenance",
    "many-hosts",
    "holding",
    "draining",
    "listing",
    "rejecting",
    "upstream",
    "steering",
    "settings",
    "commands",
    "signals",
    "upgrading",
    "systemd",
    "exit-codes",
    "api",
    "status-fields",
    "monitoring",
    "logs",
    "streams",
    "limits",
    "security",
    "cost",
    "troubles",
    "original"
];

impl Topic {
    /// Returns the sentence behind the title.
    pub(crate) fn summary(&self) -> &'static str {
        self.text.lines().nth(2).unwrap_or_default()
    }
}

/// Returns the names of all topics.
pub(crate) fn topic_names() -> impl Iterator<Item = &'static str> {
    TOPICS.iter().map(|topic| topic.name)
}

/// Returns the names that `tcpause help` knows, commands first.
pub(crate) fn help_names() -> impl Iterator<Item = &'static str> {
    COMMANDS.iter().map(|word| word.name).chain(topic_names())
}

/// Returns the error for a name that `tcpause help` does not know.
pub(super) fn unknown_topic(unknown: &str) -> String {
    let begins = || help_names().find(|name| !unknown.is_empty() && name.starts_with(unknown));
    // Page and table of the settings have the same keys, as a test sees.
    let has_setting = || unknown.contains('.') && SETTINGS_PAGE.contains(&format!("`{unknown}`"));
    let setting = || has_setting().then_some("settings");
    let hint = match nearest(unknown, help_names()).or_else(begins).or_else(setting) {
        Some(name) => format!("did you mean {name}? "),
        None => String::new(),
    };
    format!("unknown command or topic {unknown:?}; {hint}`tcpause help` lists them")
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    use super::*;

    #[test]
    fn every_page_is_a_topic() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/bin/tcpause/help");
        let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name());
        let pages: BTreeSet<String> = files
            .map(|name| name.to_str().unwrap().strip_suffix(".md").unwrap().to_owned())
            .collect();
        let topics: BTreeSet<String> = topic_names().map(str::to_owned).collect();
        assert_eq!(topics, pages);
        let names: BTreeSet<&str> = help_names().collect();
        assert_eq!(names.len(), help_names().count(), "a topic has the name of a command");
    }

    #[test]
    fn every_page_begins_with_its_title_and_a_sentence() {
        for topic in &TOPICS {
            let mut lines = topic.text.lines();
            let title = lines.next().and_then(|line| line.strip_prefix("# "));
            assert!(title.is_some_and(|title| !title.is_empty()), "{}", topic.name);
            assert_eq!((lines.next(), lines.nth(1)), (Some(""), Some("")), "{}", topic.name);
            let summary = topic.summary();
            assert_eq!(summary.find(['.', '?', '!']), Some(summary.len() - 1), "{summary}");
        }
    }

    #[test]
    fn an_unknown_topic_is_told_with_the_nearest() {
        for (unknown, hint) in [
            ("secrity", "; did you mean security? `tcpause help` lists them"),
            ("exit", "; did you mean exit-codes? `tcpause help` lists them"),
            ("paus", "; did you mean pause? `tcpause help` lists them"),
            ("control.addr", "; did you mean settings? `tcpause help` lists them"),
            ("control.adr", "; `tcpause help` lists them"),
            ("x", "; `tcpause help` lists them"),
            ("", "; `tcpause help` lists them"),
        ] {
            let error = unknown_topic(unknown);
            assert!(error.contains(&format!("{unknown:?}{hint}")), "{error}");
        }
    }
}

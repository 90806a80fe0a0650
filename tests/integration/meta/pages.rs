//! The README and the pages of the manual: their length, their links, and their way into the program.

use std::{
    collections::BTreeSet,
    io::Write as _,
    process::{Command, Stdio},
};

use super::tidy::{pages, read, root, sources};
use crate::harness::{COMMANDS, program};

/// Ten minutes of reading.
const README_WORDS_MAX: usize = 3_000;

/// Returns the targets of the links in a text.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0))
}

/// Returns the name of each page, which is its topic.
fn topics() -> Vec<(String, String)> {
    let topics = pages().into_iter().map(|(path, text)| {
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
        (name.strip_suffix(".md").expect("a page in Markdown").to_owned(), text)
    });
    topics.collect()
}

/// Returns what a call prints that succeeds.
#[track_caller]
fn printed(args: &[&str]) -> String {
    let finished = program().args(args).run();
    assert_eq!((finished.code, &*finished.stderr), (0, ""), "{args:?}");
    finished.stdout
}

#[test]
fn the_readme_is_read_in_ten_minutes() {
    let words = read("README.md").split_whitespace().count();
    assert!(words <= README_WORDS_MAX, "README.md has {words} words");
}

#[test]
fn the_readme_links_to_every_page() {
    let readme = read("README.md");
    let linked: BTreeSet<&str> = links(&readme).collect();
    for (topic, _) in topics() {
        let page = format!("src/bin/tcpause/help/{topic}.md");
        assert!(linked.contains(&*page), "README.md does not link to {page}");
    }
}

#[test]
fn every_link_leads_somewhere() {
    let readme = (root().join("README.md"), read("README.md"));
    for (path, text) in pages().into_iter().chain([readme]) {
        for link in links(&text) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target =
                if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: {link}", path.display());
            let anchor =
                |line: &str| line.trim_start_matches(['#', ' ']).to_lowercase().replace(' ', "-");
            let has_it = text.lines().any(|line| line.starts_with('#') && anchor(line) == heading);
            assert!(heading.is_empty() || has_it, "{}: {link}", path.display());
        }
    }
}

#[test]
fn the_help_shows_every_topic() {
    let help = printed(&["help"]);
    let man = printed(&["man"]);
    for (topic, text) in topics() {
        let page = printed(&["help", &topic]);
        let title = text.lines().next().and_then(|line| line.strip_prefix("# ")).unwrap();
        let summary = text.lines().nth(2).unwrap();
        assert!(page.starts_with(&format!("{title}\n\n{summary}\n")), "{topic}:\n{page}");
        assert!(!page.contains(['`', '\u{1b}']), "{topic}:\n{page}");
        let listed = |line: &str| line.trim_start().starts_with(&format!("{topic} "));
        assert!(help.lines().any(|line| listed(line) && line.ends_with(summary)), "{help}");
        let heading = format!(".SH \"{}\"", title.to_uppercase().replace('-', "\\-"));
        assert!(man.lines().any(|line| line == heading), "no {heading} in the man page");
    }
    // Words of a page are words of what is shown, whatever its layout.
    let shown = printed(&["help", "draining"]);
    for word in ["transaction", "--drain", "quiet:500ms", "http.client"] {
        assert!(shown.contains(word), "no {word} in:\n{shown}");
    }
}

#[test]
fn an_unknown_topic_is_an_error_with_the_nearest_and_the_way_to_the_list() {
    let finished = program().args(["help", "secrity"]).run();
    assert_eq!((finished.code, &*finished.stdout), (2, ""));
    let error = finished.stderr;
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.contains("\"secrity\"; did you mean security?"), "{error}");
    assert!(error.len() <= 100 && error.contains("`tcpause help` lists them"), "{error}");
    let list = printed(&["help"]);
    for (topic, _) in topics() {
        assert!(list.contains(&topic), "no {topic} in {list}");
    }
}

/// Options that are named and do not exist mislead at the worst moment.
#[test]
fn the_readme_and_the_pages_name_no_option_that_does_not_exist() {
    let mut known = printed(&["help"]);
    for command in COMMANDS {
        known += &printed(&["help", command]);
    }
    let is_option = |char: char| char.is_ascii_lowercase() || char == '-';
    let known: BTreeSet<&str> =
        known.split(|char| !is_option(char)).filter(|word| word.starts_with("--")).collect();
    // Of other programs, and of a new process alone, as ps shows them.
    let foreign = [
        "--",
        "--fail-with-body",
        "--unix-socket",
        "--now",
        "--open",
        "--take-over",
        "--take-back",
        "--reuid",
        "--regid",
        "--clear-groups",
        "--inh-caps",
        "--ambient-caps",
    ];
    let readme = ("README".to_owned(), read("README.md"));
    for (name, text) in topics().into_iter().chain([readme]) {
        for word in text.split(|char| !is_option(char)).filter(|word| word.starts_with("--")) {
            let is_rule = word.bytes().all(|byte| byte == b'-');
            let is_known = is_rule || known.contains(word) || foreign.contains(&word);
            assert!(is_known, "{name} names {word}");
        }
    }
}

/// An operator searches the page for the line that the log or the status shows.
#[test]
fn the_lines_and_reasons_of_the_pages_are_those_of_the_program() {
    let texts = sources(&["src"]);
    for (page, heading) in [("troubles", "## Log lines\n"), ("steering", "## States and reasons\n")]
    {
        let page = read(&format!("src/bin/tcpause/help/{page}.md"));
        let (_, table) = page.split_once(heading).expect(heading);
        let mut lines = 0;
        for row in table.lines().filter(|line| line.starts_with("| `")) {
            let cell = row.split(" | ").next().unwrap();
            for line in cell.split('`').skip(1).step_by(2) {
                for part in line.split("...").map(str::trim) {
                    let is_there = texts.iter().any(|(_, text)| text.contains(part));
                    assert!(is_there, "nothing in the program says {part:?}");
                }
                lines += 1;
            }
        }
        assert!(lines > 5);
    }
}

/// A rule that reads the log goes by these words.
#[test]
fn the_words_of_the_page_on_logs_are_those_of_the_program() {
    let page = read("src/bin/tcpause/help/logs.md");
    let texts = sources(&["src"]);
    for (heading, least) in [("| event |", 8), ("| cause |", 16)] {
        let (_, table) = page.split_once(heading).expect(heading);
        let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
        let words: Vec<&str> = rows
            .flat_map(|row| row.split(" | ").next().unwrap().split('`').skip(1).step_by(2))
            .collect();
        for word in &words {
            let quoted = format!("\"{word}\"");
            assert!(texts.iter().any(|(_, text)| text.contains(&quoted)), "nothing is {word}");
        }
        assert!(words.len() >= least, "{heading} {words:?}");
    }
}

#[test]
fn every_example_for_a_shell_can_be_read_by_one() {
    let readme = ("README".to_owned(), read("README.md"));
    let mut examples = 0;
    for (name, text) in topics().into_iter().chain([readme]) {
        for example in text.split("```sh\n").skip(1) {
            let example = example.split("```").next().expect("an end");
            let shell = Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn();
            let Ok(mut shell) = shell else {
                return println!("skipped: there is no bash on this machine");
            };
            shell.stdin.take().unwrap().write_all(example.as_bytes()).unwrap();
            assert!(shell.wait().unwrap().success(), "{name}:\n{example}");
            examples += 1;
        }
    }
    assert!(examples > 0);
}

/// The program that reads the sample of the README is the judge of it.
#[test]
fn the_configuration_of_the_readme_is_valid() {
    let readme = read("README.md");
    let sample = readme.split_once("```yaml\n").and_then(|(_, rest)| rest.split_once("```"));
    let sample = sample.expect("a sample in the README").0;
    let finished =
        program().file("readme.yml", sample).args(["--check-config", "-c", "readme.yml"]).run();
    assert_eq!(finished.code, 0, "{finished:?}");
    assert!(finished.stdout.contains("unix:///run/tcpause/control.sock"), "{finished:?}");
}

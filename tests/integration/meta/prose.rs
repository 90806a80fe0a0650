//! The prose of the source, as tests: comments name things and deeds, and cite what there is.

use std::path::Path;

use super::tidy::{assert_none, offences, sources};

/// The most doc comments below each folder that may begin with a question word, in a thousand: such a comment names neither
/// the thing nor the deed.
const QUESTIONS_MAX: [(&str, usize); 3] = [("src", 30), ("tests", 30), ("benches", 30)];

const QUESTION_WORDS: [&str; 9] =
    ["What", "Whether", "How", "Who", "Whom", "Whose", "When", "Where", "Which"];

#[test]
fn doc_comments_state() {
    for (folder, permille_max) in QUESTIONS_MAX {
        let (mut total, mut questions) = (0, Vec::new());
        for (path, text) in sources(&[folder]) {
            let is_doc = |line: &str| line.starts_with("///") || line.starts_with("//!");
            let mut before = "";
            for line in text.lines().map(str::trim_start) {
                if is_doc(line) && !is_doc(before) {
                    total += 1;
                    let first = line[3..].split_whitespace().next().unwrap_or_default();
                    if QUESTION_WORDS.contains(&first) {
                        questions.push(format!("{}: {line}", path.display()));
                    }
                }
                before = line;
            }
        }
        println!(
            "{folder}: {} of {total} doc comments begin with a question word",
            questions.len()
        );
        assert!(
            questions.len() * 1000 <= permille_max * total,
            "{folder}:\n{}",
            questions.join("\n")
        );
    }
}

#[test]
fn every_file_that_a_comment_of_a_test_cites_exists() {
    let files = sources(&["src", "tests", "benches"]);
    let is_source = |word: &str| Path::new(word).extension().is_some_and(|it| it == "rs");
    let found = offences(&sources(&["tests", "benches"]), |line| {
        let mut cited = line.split('`').skip(1).step_by(2).filter(|word| is_source(word));
        let is_missing = |name| !files.iter().any(|(path, _)| path.ends_with(name));
        line.trim_start().starts_with("//") && cited.any(is_missing)
    });
    assert_none(&found, "a comment that cites a file which is not there");
}

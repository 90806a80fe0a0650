//! The hygiene of the source, as tests: rules that reviewers would have to repeat.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

/// The longest file.
const LINES_MAX: usize = 500;

/// The longest function of the product, and its most blocks within each other.
const FUNCTION_LINES_MAX: usize = 70;
const DEPTH_MAX: usize = 5;

/// The most lines of code of the product. A new feature pays for its lines elsewhere, or raises this with a reason.
/// The hand-over has some 2,300, as each struct that travels says what of it does, the fleet some 5,500 with the client of its
/// store, and the steering some 1,500.
const CODE_LINES_MAX: usize = 31_900;

pub(super) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub(super) fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Returns all Rust files below `folders` with their texts.
pub(super) fn sources(folders: &[&str]) -> Vec<(PathBuf, String)> {
    let mut open: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).collect();
    let mut found = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in
            fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        {
            let path = entry.unwrap().path();
            if path.is_dir() {
                // The fuzz targets build into a folder of their own.
                if path.file_name().is_none_or(|name| name != "target") {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    assert!(!found.is_empty());
    found
}

/// Returns the pages of the manual with their texts.
pub(super) fn pages() -> Vec<(PathBuf, String)> {
    let folder = fs::read_dir(root().join("src/bin/tcpause/help")).expect("the pages");
    let pages = folder.map(|page| page.expect("a page").path());
    pages.map(|path| (path.clone(), fs::read_to_string(&path).expect("text"))).collect()
}

/// Returns whether `line` has `word` as a whole word.
fn has_word(line: &str, word: &str) -> bool {
    line.split(|char: char| !char.is_alphanumeric() && char != '_').any(|part| part == word)
}

/// The line without a comment at its end; good enough, as no string of ours has two slashes and a forbidden word.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

#[track_caller]
pub(super) fn assert_none(found: &[String], rule: &str) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

/// Each line of each file for which `breaks` holds, with its place.
pub(super) fn offences(files: &[(PathBuf, String)], breaks: impl Fn(&str) -> bool) -> Vec<String> {
    files
        .iter()
        .flat_map(|(path, text)| {
            text.lines().enumerate().map(move |(number, line)| (path, number + 1, line))
        })
        .filter(|(_, _, line)| breaks(line))
        .map(|(path, number, line)| format!("{}:{number}: {line}", path.display()))
        .collect()
}

#[test]
fn no_unsafe_code() {
    let word = concat!("un", "safe");
    assert_none(
        &offences(&sources(&["src", "tests", "benches"]), |line| has_word(code(line), word)),
        word,
    );
}

#[test]
fn no_unfinished_work() {
    let words =
        [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("HA", "CK")];
    let calls = [concat!("db", "g!("), concat!("to", "do!("), concat!("unimple", "mented!(")];
    let files = sources(&["src", "tests", "benches"]);
    let found = offences(&files, |line| {
        words.iter().any(|word| has_word(line, word))
            || calls.iter().any(|call| line.contains(call))
    });
    assert_none(&found, "unfinished work");
}

#[test]
fn no_sleep_in_the_proxy() {
    // The demonstration tells a story at a human pace; nothing else may wait for luck.
    let mut files = sources(&["src"]);
    files.retain(|(path, _)| !path.ends_with("demo.rs"));
    let found = offences(&files, |line| code(line).contains("thread::sleep("));
    assert_none(&found, "a sleep where an event exists");
}

#[test]
fn the_wall_clock_is_only_shown() {
    // It may jump: lines of the log and the status tell the time of day, and nothing else asks for it. The time since the
    // start of the host is another clock, which does not jump.
    const SHOW_IT: [&str; 3] = ["bin/tcpause/logger/format.rs", "timestamp.rs", "sys/boot.rs"];
    let clocks = [concat!("System", "Time"), concat!("UNIX_", "EPOCH"), concat!("Clock", "Id")];
    let mut files = sources(&["src"]);
    files.retain(|(path, _)| {
        !SHOW_IT.iter().any(|name| path.ends_with(Path::new("src").join(name)))
    });
    let found = offences(&files, |line| clocks.iter().any(|clock| has_word(code(line), clock)));
    assert_none(&found, "the time of day where a deadline may depend on it");
}

/// The rooms of the library, each with those it may import from: the house is read from the bottom up, without a circle.
const ROOMS: [(&str, &[&str]); 22] = [
    (
        "server",
        &[
            "control",
            "fleet",
            "steering",
            "worker",
            "handle",
            "shared",
            "connection",
            "pause",
            "proxy_header",
            "upstream",
            "worker_pool",
            "admission",
        ],
    ),
    ("control", &["fleet", "handle", "pause"]),
    ("fleet", &["handle", "pause"]),
    ("steering", &["shared", "pause", "upstream"]),
    ("worker", &["shared", "connection", "pause", "upstream", "worker_pool", "admission"]),
    ("handle", &["shared", "pause", "proxy_header", "upstream"]),
    ("shared", &["connection", "pause", "proxy_header", "upstream", "worker_pool", "admission"]),
    ("connection", &["pause", "proxy_header", "upstream", "worker_pool", "admission"]),
    ("pause", &["upstream", "worker_pool", "admission"]),
    ("upstream", &["admission"]),
    ("worker_pool", &["admission"]),
    ("admission", &[]),
    ("proxy_header", &[]),
    ("handover", &["sys", "timestamp"]),
    ("listing", &["config", "sys"]),
    ("config", &[]),
    ("sys", &[]),
    ("error", &[]),
    ("fleet_view", &[]),
    ("log_limit", &[]),
    ("stats", &[]),
    ("timestamp", &[]),
];

/// Rooms that all above them may import from.
const GROUND: [&str; 9] = [
    "handover",
    "listing",
    "config",
    "sys",
    "error",
    "fleet_view",
    "log_limit",
    "stats",
    "timestamp",
];

#[test]
fn imports_lead_down() {
    for (room, below) in ROOMS {
        let on_ground = GROUND.contains(&room);
        let may = |other: &str| {
            other == room || below.contains(&other) || !on_ground && GROUND.contains(&other)
        };
        // Configuration errors are errors of the library, too.
        let may = |other: &str| may(other) || room == "config" && other == "error";
        let (file, folder) = (format!("src/{room}.rs"), format!("src/{room}"));
        let files = if root().join(&file).exists() {
            vec![(root().join(&file), read(&file))]
        } else {
            sources(&[&folder])
        };
        for (path, text) in files {
            let name = path.to_string_lossy();
            if ["tests", "simulation"].iter().any(|part| name.contains(part)) {
                continue;
            }
            let product = text.split("#[cfg(test)]").next().unwrap_or_default();
            for other in rooms_named_in(product) {
                assert!(may(&other), "{name}: {room} imports from {other}");
            }
        }
    }
}

/// Finds the rooms that a file names behind `crate::`, in a list too.
fn rooms_named_in(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for part in text.split("crate::").skip(1) {
        let Some(list) = part.strip_prefix('{') else {
            found.extend(part.split(|it: char| !it.is_alphanumeric() && it != '_').next());
            continue;
        };
        let (mut depth, mut is_first) = (0, true);
        for word in list.split_inclusive(|it: char| !it.is_alphanumeric() && it != '_') {
            let name = word.trim_end_matches(|it: char| !it.is_alphanumeric() && it != '_');
            if depth == 0 && is_first && !name.is_empty() {
                found.push(name);
                is_first = false;
            }
            match word.chars().last() {
                Some('{') => depth += 1,
                Some('}') if depth == 0 => break,
                Some('}') => depth -= 1,
                Some(',') if depth == 0 => is_first = true,
                _ => {}
            }
        }
    }
    found.into_iter().map(str::to_owned).collect()
}

#[test]
fn no_ignored_tests() {
    let mark = concat!("#[ig", "nore");
    assert_none(
        &offences(&sources(&["src", "tests"]), |line| line.contains(mark)),
        "a test that is not run",
    );
}

#[test]
fn no_tabs_and_no_trailing_spaces() {
    let mut files = sources(&["src", "tests", "benches"]);
    for name in ["Cargo.toml", "README.md", "CHANGELOG.md", "src/README.md", "tcpause.yml"] {
        files.push((root().join(name), read(name)));
    }
    files.extend(pages());
    assert_none(&offences(&files, |line| line.contains('\t')), "a tab");
    files.push((root().join("Makefile"), read("Makefile")));
    assert_none(&offences(&files, |line| line.trim_end() != line), "spaces at the end of a line");
    for (path, text) in &files {
        assert!(
            text.ends_with('\n') && !text.ends_with("\n\n"),
            "{}: its end is not one newline",
            path.display()
        );
        assert!(!text.contains('\r'), "{}: a carriage return", path.display());
    }
}

#[test]
fn every_file_says_what_it_is() {
    let mut found = Vec::new();
    for (path, text) in sources(&["src", "tests", "benches"]) {
        let path = path.display();
        match text.lines().next().and_then(|line| line.strip_prefix("//! ")) {
            Some(head) if head.len() >= 10 => {}
            _ => found.push(format!("{path}: it does not begin with what it is")),
        }
    }
    assert_none(&found, "a file without a head");
}

#[test]
fn every_file_is_short() {
    let long: Vec<String> = sources(&["src", "tests", "benches"])
        .into_iter()
        .map(|(path, text)| (text.lines().count(), path))
        .filter(|&(lines, _)| lines > LINES_MAX)
        .map(|(lines, path)| format!("{}: {lines} lines", path.display()))
        .collect();
    assert_none(&long, "a file too long to be read at one sitting");
}

#[test]
fn the_product_is_small() {
    let count: usize = product().iter().map(|(_, text)| product_lines(text).len()).sum();
    println!("{count} lines of code");
    assert!(count <= CODE_LINES_MAX, "{count} lines of code, of {CODE_LINES_MAX} at most");
    assert!(count > CODE_LINES_MAX / 2, "only {count} lines of code are counted");
}

#[test]
fn every_function_is_short_and_flat() {
    let mut found = Vec::new();
    let mut count = 0;
    for (path, text) in product() {
        let path = path.display();
        for function in functions(&product_lines(&text)) {
            count += 1;
            let Function { name, lines, depth } = function;
            if lines > FUNCTION_LINES_MAX || depth > DEPTH_MAX {
                found.push(format!("{path}: {name} has {lines} lines, and a depth of {depth}"));
            }
        }
    }
    println!("{count} functions");
    assert_none(&found, "a function too long or too deep");
}

/// Returns the sources of the product: all but those that only tests contain.
fn product() -> Vec<(PathBuf, String)> {
    let mut files = sources(&["src"]);
    files.retain(|(path, _)| {
        let path = path.strip_prefix(root()).unwrap();
        let is_of_tests = |part: &OsStr| part == "tests" || part == "simulation";
        !path.ends_with("tests.rs") && !path.iter().any(is_of_tests)
    });
    files
}

/// A line of code, with its number in the file.
type Line<'a> = (usize, &'a str);

/// Returns the lines of code: without blanks, comments and items under `cfg(test)`.
fn product_lines(text: &str) -> Vec<Line<'_>> {
    let mut found = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let code = line.trim_start();
        let is_test = code.starts_with("#[cfg(") && has_word(code, "test");
        if is_test && !code.contains("not(test") {
            let mut item = lines.by_ref().skip_while(|(_, it)| it.trim_start().starts_with("#["));
            let is_one_line = item.next().is_some_and(|(_, it)| it.ends_with(['}', ';', ',']));
            // A longer item ends at the brace of its own indentation.
            let is_end = |it: &str| indent(it) == indent(line) && it.trim_start().starts_with('}');
            if !is_one_line {
                lines.any(|(_, it)| is_end(it));
            }
        } else if !code.is_empty() && !code.starts_with("//") {
            found.push((number, line));
        }
    }
    found
}

/// Returns the depth of a line by its indentation: rustfmt indents each block by four columns.
fn indent(line: &str) -> usize {
    (line.len() - line.trim_start().len()) / 4
}

/// A function, with its lines and the most blocks within each other, its own included.
struct Function<'a> {
    name: &'a str,
    lines: usize,
    depth: usize,
}

/// Finds the functions that are in none. One ends at the brace of its own indentation.
fn functions<'a>(lines: &[Line<'a>]) -> Vec<Function<'a>> {
    let mut found = Vec::new();
    let mut rest = lines.iter();
    while let Some(&(first, line)) = rest.next() {
        let Some((before, name)) = line.trim_start().split_once("fn ") else { continue };
        let is_function = before.is_empty() || before.starts_with("pub") || before == "const ";
        if !is_function || line.ends_with([';', '}']) {
            continue;
        }
        let mut depth = 1;
        let end = rest.by_ref().find(|(_, it)| {
            if it.ends_with('{') {
                depth = depth.max(indent(it) + 1 - indent(line));
            }
            indent(it) == indent(line) && it.trim_start().starts_with('}')
        });
        let lines = end.map_or(0, |(last, _)| last - first + 1);
        let name = name.split(['(', '<']).next().unwrap_or_default();
        found.push(Function { name, lines, depth });
    }
    found
}

#[test]
fn functions_are_measured() {
    let text = [
        "pub(crate) fn long(",
        "    number: u8,",
        ") -> u8 {",
        "    if number > 0 {",
        "        match number {",
        "        }",
        "    }",
        "}",
        "#[cfg(test)]",
        "mod tests {",
        "    const TEXT: &str = \"a,",
        "no end,\";",
        "}",
        "// A comment, and a blank line.",
        "",
        "fn short() {",
        "}",
    ]
    .join("\n");
    let lines = product_lines(&text);
    assert_eq!(lines.len(), 10);
    let found: Vec<_> =
        functions(&lines).into_iter().map(|it| (it.name, it.lines, it.depth)).collect();
    assert_eq!(found, [("long", 8, 3), ("short", 2, 1)]);
}

#[test]
fn the_gate_imports_nothing_of_the_crate() {
    let gate = [(root().join("src/pause/gate.rs"), read("src/pause/gate.rs"))];
    assert_none(
        &offences(&gate, |line| code(line).contains("crate::") && !line.contains("loom")),
        "an import",
    );
}

#[test]
fn the_page_on_settings_shows_every_key() {
    let page = "src/bin/tcpause/help/settings.md";
    let settings = read(page);
    for key in tcpause::Config::keys() {
        assert!(settings.contains(key), "{page} does not show {key}");
    }
}

#[test]
fn the_top_level_is_small() {
    let expected = [
        "CHANGELOG.md",
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "Makefile",
        "README.md",
        "benches",
        "src",
        "target",
        "tcpause.yml",
        "tests",
    ];
    let found: Vec<String> = fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.') && !expected.contains(&name.as_str()))
        .collect();
    assert_none(&found, "something new at the top level");
}

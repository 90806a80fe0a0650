//! The part of Markdown that the pages use, and its layout in a terminal.
#![expect(
    clippy::format_push_string,
    reason = "a page is made once; what counts is that its code reads like it"
)]

/// Widest line, in columns, which any terminal has room for.
const COLUMNS_MAX: usize = 80;
/// Widest line of a table of four columns or more, which is hard to read when narrower.
const TABLE_COLUMNS_MAX: usize = 100;
/// The mark before and behind each word in bold; it takes no room.
const BOLD: char = '\u{1}';
/// A space at which no line breaks.
const FIXED_SPACE: char = '\u{2}';

/// A part of a page.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Block<'a> {
    Title(&'a str),
    Heading(&'a str),
    Paragraph(String),
    /// Mark of the item, and its text.
    Item(&'a str, String),
    Code(Vec<&'a str>),
    /// The rows, the head first.
    Table(Vec<Vec<&'a str>>),
}

/// Splits a page into its parts.
pub(super) fn parse(page: &str) -> Vec<Block<'_>> {
    let mut blocks = Vec::new();
    let (mut is_open, mut is_code) = (false, false);
    for line in page.lines() {
        if line.starts_with("```") {
            is_code = !is_code;
            if is_code {
                blocks.push(Block::Code(Vec::new()));
            }
            is_open = false;
        } else if let (true, Some(Block::Code(lines))) = (is_code, blocks.last_mut()) {
            lines.push(line);
        } else if line.is_empty() || line.starts_with("<!--") {
            is_open = false;
        } else if !is_open || !blocks.last_mut().is_some_and(|block| block.continues(line)) {
            blocks.push(begin(line));
            is_open = true;
        }
    }
    blocks
}

impl<'a> Block<'a> {
    /// Adds a line to this part. Returns false if the line begins another part.
    fn continues(&mut self, line: &'a str) -> bool {
        match self {
            Self::Table(rows) => {
                if !line.starts_with("|---") {
                    rows.push(cells(line));
                }
                true
            }
            Self::Paragraph(text) | Self::Item(_, text) if item(line).is_none() => {
                text.push(' ');
                text.push_str(line.trim_start());
                true
            }
            _ => false,
        }
    }
}

/// Returns the part that a line begins.
fn begin(line: &str) -> Block<'_> {
    if let Some(text) = line.strip_prefix("# ") {
        Block::Title(text)
    } else if let Some(text) = line.strip_prefix("## ") {
        Block::Heading(text)
    } else if line.starts_with('|') {
        Block::Table(vec![cells(line)])
    } else if let Some((mark, text)) = item(line) {
        Block::Item(mark, text.to_owned())
    } else {
        Block::Paragraph(line.to_owned())
    }
}

/// Splits `- text` or `1. text`.
fn item(line: &str) -> Option<(&str, &str)> {
    line.split_once(' ').filter(|(mark, _)| {
        let number = mark.strip_suffix('.').unwrap_or_default();
        *mark == "-" || !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

/// Returns the cells of a row.
fn cells(line: &str) -> Vec<&str> {
    line.trim_matches('|').split('|').map(str::trim).collect()
}

/// Replaces links by their texts, and marks code and words between asterisks as bold.
pub(super) fn inline(text: &str) -> String {
    let (mut plain, mut rest) = (String::new(), text);
    while let Some((before, behind)) = rest.split_once('[') {
        plain += before;
        let link = behind.split_once("](").filter(|(label, _)| !label.contains(['[', ']']));
        let link = link.and_then(|(label, target)| Some((label, target.split_once(')')?)));
        rest = if let Some((label, (target, behind))) = link {
            plain += &reference(label, target);
            behind
        } else {
            plain.push('[');
            behind
        };
    }
    plain += rest;
    alternate(&plain, "`", |text| alternate(text, "**", str::to_owned, bold), bold)
}

/// Returns the text of a link; for a link to another page, the command that shows the page.
fn reference(label: &str, target: &str) -> String {
    match target.strip_suffix(".md").filter(|name| !name.contains('/')) {
        Some(name) if label.replace(' ', "-").eq_ignore_ascii_case(name) => {
            format!("`tcpause help {name}`")
        }
        Some(name) => format!("{label} (`tcpause help {name}`)"),
        None => label.to_owned(),
    }
}

/// Joins the parts between marks, every other one changed by `inside`.
fn alternate(
    text: &str,
    mark: &str,
    outside: impl Fn(&str) -> String,
    inside: impl Fn(&str) -> String,
) -> String {
    let parts = text.split(mark).enumerate();
    parts.map(|(at, part)| if at % 2 == 0 { outside(part) } else { inside(part) }).collect()
}

/// Marks each word as bold.
fn bold(text: &str) -> String {
    text.split(' ').map(|word| format!("{BOLD}{word}{BOLD}")).collect::<Vec<_>>().join(" ")
}

/// Writes `on` before and `off` behind each word in bold.
pub(super) fn paint(text: &str, on: &str, off: &str) -> String {
    alternate(text, &BOLD.to_string(), str::to_owned, |word| format!("{on}{word}{off}"))
}

/// Returns the number of columns that a text takes.
fn width(text: &str) -> usize {
    text.chars().filter(|char| *char != BOLD).count()
}

/// Breaks a text into lines of `columns` at most, unless a word is longer.
pub(super) fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if width(line) + 1 + width(word) <= columns => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Lays a table out in aligned columns, at most `columns_max` wide unless a word is longer.
pub(super) fn layout(rows: &[Vec<&str>], columns_max: usize) -> Vec<String> {
    const GAP: usize = 2;
    let mut rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| inline(cell)).collect()).collect();
    // Where there is room, the first column is not broken within code: a path stays beside its method.
    for cell in rows.iter_mut().filter(|row| row.len() == 2).filter_map(|row| row.first_mut()) {
        *cell = cell.replace(&format!("{BOLD} {BOLD}"), &format!("{BOLD}{FIXED_SPACE}{BOLD}"));
    }
    let widest = |measure: fn(&str) -> usize, column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| measure(cell)).max().unwrap_or(0)
    };
    let longest_word = |cell: &str| cell.split_whitespace().map(width).max().unwrap_or(0);
    let count = rows.first().map_or(0, Vec::len);
    let least: Vec<usize> = (0..count).map(|column| widest(longest_word, column)).collect();
    let mut widths: Vec<usize> = (0..count).map(|column| widest(width, column)).collect();
    while widths.iter().map(|width| width + GAP).sum::<usize>() > columns_max + GAP {
        let shrinkable = widths.iter_mut().zip(&least).filter(|(width, least)| **width > **least);
        match shrinkable.max_by_key(|(width, _)| **width) {
            Some((width, _)) => *width -= 1,
            None => break,
        }
    }
    if let Some(head) = rows.first_mut() {
        for cell in head.iter_mut().filter(|cell| !cell.is_empty()) {
            *cell = bold(&cell.replace(BOLD, ""));
        }
        rows.insert(1, widths.iter().map(|width| "-".repeat(*width)).collect());
    }
    rows.iter().flat_map(|row| row_lines(row, &widths, GAP)).collect()
}

/// Returns the lines of a row, whose cells are wrapped.
fn row_lines(row: &[String], widths: &[usize], gap: usize) -> Vec<String> {
    let cells: Vec<Vec<String>> =
        row.iter().zip(widths).map(|(cell, width)| wrap(cell, *width)).collect();
    let height = cells.iter().map(Vec::len).max().unwrap_or(0);
    let line = |at: usize| {
        let mut line = String::new();
        for (cell, columns) in cells.iter().zip(widths) {
            let text = cell.get(at).map_or("", String::as_str);
            line += &format!("{text}{:1$}", "", columns.saturating_sub(width(text)) + gap);
        }
        line.trim_end().replace(FIXED_SPACE, " ")
    };
    (0..height).map(line).collect()
}

/// Shows a page in a terminal, or as plain text.
pub(super) fn show(page: &str, is_terminal: bool) -> String {
    let mut text = String::new();
    let mut was_item = false;
    for block in parse(page) {
        let is_item = matches!(block, Block::Item(..));
        let is_next_item = is_item && was_item;
        if !is_next_item && !text.is_empty() {
            text.push('\n');
        }
        was_item = is_item;
        for line in lines(&block) {
            text += &format!("{line}\n");
        }
    }
    if is_terminal { paint(&text, "\u{1b}[1m", "\u{1b}[0m") } else { paint(&text, "", "") }
}

/// Returns the lines of a part.
fn lines(block: &Block<'_>) -> Vec<String> {
    match block {
        Block::Title(text) | Block::Heading(text) => vec![bold(text)],
        Block::Paragraph(text) => wrap(&inline(text), COLUMNS_MAX),
        Block::Item(mark, text) => {
            let indent = mark.len() + 1;
            let lines = wrap(&inline(text), COLUMNS_MAX - indent).into_iter().enumerate();
            let mark = |at| if at == 0 { mark } else { "" };
            lines.map(|(at, line)| format!("{:indent$}{line}", mark(at))).collect()
        }
        Block::Code(lines) => lines.iter().map(|line| format!("    {line}")).collect(),
        Block::Table(rows) => {
            let is_wide = rows.first().is_some_and(|head| head.len() > 3);
            layout(rows, if is_wide { TABLE_COLUMNS_MAX } else { COLUMNS_MAX })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "\
# Title

A **bold move** to `a b`, see [draining](draining.md), [the
bounds](limits.md) and [a file](../x.md), [not] (a link).

- one
  goes on
- two

1. first

```sh
# a comment | as it is
```

<!-- mark -->
| a | b |
|---|---|
| `x y` | |
<!-- /mark -->
";

    #[test]
    fn a_page_is_shown_without_its_marks() {
        let expected = "\
Title

A bold move to a b, see tcpause help draining, the bounds (tcpause help limits)
and a file, [not] (a link).

- one goes on
- two
1. first

    # a comment | as it is

a    b
---  -
x y
";
        assert_eq!(show(PAGE, false), expected);
        let bold = show(PAGE, true);
        assert!(bold.starts_with("\u{1b}[1mTitle\u{1b}[0m\n"), "{bold}");
        assert!(bold.contains(" to \u{1b}[1ma\u{1b}[0m \u{1b}[1mb\u{1b}[0m, see "), "{bold}");
        assert_eq!(bold.replace("\u{1b}[1m", "").replace("\u{1b}[0m", ""), expected);
    }

    #[test]
    fn a_wide_table_is_wrapped_in_its_columns() {
        let rows = [vec!["a", "long"], vec!["`word`", "one two three"]];
        assert_eq!(
            layout(&rows, 14).iter().map(|line| paint(line, "", "")).collect::<Vec<_>>(),
            ["a     long", "----  --------", "word  one two", "      three"]
        );
        let rows = [vec!["a", "b"], vec!["`GET /x`, `GET /y`", "one two three"]];
        assert_eq!(
            layout(&rows, 14).iter().map(|line| paint(line, "", "")).collect::<Vec<_>>(),
            ["a        b", "-------  -----", "GET /x,  one", "GET /y   two", "         three"]
        );
    }

    #[test]
    fn every_page_is_shown_without_marks_and_fits() {
        for topic in &super::super::topics::TOPICS {
            let text = show(topic.text, false);
            for line in text.lines() {
                assert!(width(line) <= TABLE_COLUMNS_MAX, "{}: {line}", topic.name);
                if line.starts_with("    ") {
                    continue;
                }
                let marks = ["`", "**", "](", "<!--", "```", "| "];
                assert!(!marks.iter().any(|mark| line.contains(mark)), "{}: {line}", topic.name);
            }
        }
    }
}

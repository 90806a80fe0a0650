//! The help and the man page.
#![expect(
    clippy::format_push_string,
    reason = "a page is made once; what counts is that its code reads like it"
)]

use tcpause::settings::SECTIONS;

use super::{
    commands::{CLIENT_EXIT_CODES, COMMANDS, SIGNALS, Word},
    markdown::{self, Block, inline, layout, paint, wrap},
    options::{OPTIONS, Opt},
    topics::TOPICS,
};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// One sentence about the program.
const SUMMARY: &str = "\
A zero-downtime proxy for TCP and UNIX sockets:
pause it, restart the server behind it, resume; no client notices.";

const EXAMPLE: &str = "\
tcpause --proxy-addr :6432 --upstream-addr localhost:5432 &
tcpause exec --wait 30s -- systemctl restart postgresql";

/// The meaning of the words in capitals.
const VALUES: &str = "
ADDRESS is host:port, [ipv6]:port, unix:///absolute/path or unix://@name; to listen on, also :port
(all interfaces).
DURATION is a number with a unit, as in 100ms, 30s or 1m30s.
";

/// Returns the help of the program, or of the command or topic with this name.
pub(crate) fn help(name: Option<&str>, is_terminal: bool) -> String {
    if let Some(topic) = TOPICS.iter().find(|topic| Some(topic.name) == name) {
        return markdown::show(topic.text, is_terminal);
    }
    let word = COMMANDS.iter().find(|word| Some(word.name) == name);
    match word.filter(|word| word.client.is_some()) {
        Some(word) => command_help(word),
        None => word.filter(|word| word.name != "help").map_or_else(whole_help, short_help),
    }
}

/// Returns the help of a command without options.
fn short_help(word: &Word) -> String {
    let usage = format!("tcpause {} {}", word.name, word.argument);
    let lines = wrapped(word.more, 0).into_iter().map(|line| line + "\n");
    format!("{}.\n{}Usage: {}\n", word.help, lines.collect::<String>(), usage.trim_end())
}

/// Returns the help of a command that has options.
fn command_help(word: &Word) -> String {
    let mut text = format!("{}.\n", word.help);
    for line in wrapped(word.more, 0) {
        text += &format!("{line}\n");
    }
    text += &format!("\nUsage: {}\n\nOptions:\n", usage(word));
    for opt in word.options {
        text += &entry(opt);
    }
    text += VALUES;
    text += "\nExit codes:\n";
    for (code, meaning) in CLIENT_EXIT_CODES {
        let lines = wrapped(meaning, 6).join("\n");
        text += &format!("  {code:4}{}\n", lines.trim_start());
    }
    text
}

/// Returns `tcpause exec [OPTIONS] -- COMMAND`.
fn usage(word: &Word) -> String {
    let argument = match word.argument {
        "" => String::new(),
        argument if word.runs_program() => format!(" -- {argument} [ARGUMENTS]"),
        // The only one that has to be there.
        "ADDRESS" => " ADDRESS".to_owned(),
        argument => format!(" [{argument}]"),
    };
    format!("tcpause {} [OPTIONS]{argument}", word.name)
}

/// Breaks a text into lines that fit a terminal, each with `indent` spaces in front.
fn wrapped(text: &str, indent: usize) -> Vec<String> {
    const COLUMNS_MAX: usize = 96;

    let lines = wrap(text, COLUMNS_MAX - indent).into_iter();
    lines.map(|line| format!("{:indent$}{line}", "")).collect()
}

/// Returns the lines of one option.
fn entry(opt: &Opt) -> String {
    let default =
        opt.default().map_or_else(String::new, |default| format!(" [default: {default}]"));
    let indent = if opt.short.is_some() { "  " } else { "      " };
    format!("{indent}{}\n          {}{default}\n", synopsis(opt), opt.help)
}

/// Returns the help of the program.
fn whole_help() -> String {
    let mut text = format!(
        "
  >  >  >   || ||
  >  >  >   || ||   tcpause {VERSION}
  >  >  >   || ||   hold the clients, restart the server, resume

{SUMMARY}

Usage: tcpause [OPTIONS] [COMMAND]

Commands:
"
    );
    for command in &COMMANDS {
        let left = format!("{} {}", command.name, command.argument);
        text += &format!("  {left:18}{}\n", command.help);
    }
    text += "\nTopics, which tcpause help TOPIC shows:\n";
    for topic in &TOPICS {
        text += &format!("  {:18}{}\n", topic.name, topic.summary());
    }
    for (section, title) in SECTIONS {
        text += &format!("\n{title}:\n");
        for opt in OPTIONS.iter().filter(|opt| opt.section == section) {
            text += &entry(opt);
        }
    }
    text += VALUES;
    text += "\nSignals:\n";
    for (signal, effect) in SIGNALS {
        text += &format!("  {signal}\n");
        for line in wrapped(effect, 10) {
            text += &format!("{line}\n");
        }
    }
    text += "\nExample:\n";
    for line in EXAMPLE.lines() {
        text += &format!("  {line}\n");
    }
    text
}

/// Returns the man page in roff.
pub(crate) fn man() -> String {
    let mut page = Roff(String::new());
    page.0 += &format!(".TH TCPAUSE 1 \"\" \"tcpause {VERSION}\" \"User Commands\"\n");
    page.section("NAME", &["tcpause - pause the connections to a server while it restarts"]);
    page.section("SYNOPSIS", &["tcpause [OPTIONS] [COMMAND]"]);
    page.section("DESCRIPTION", &[
        SUMMARY,
        "While it is paused, new clients are held (or rejected with a 503) and running connections go on; once all of them have ended, \
         the server can be restarted, and on resume the held clients are served, oldest first.",
        "An ADDRESS is host:port, [ipv6]:port, unix:///absolute/path or unix://@name; to listen on, also :port (all interfaces). A DURATION is a number with a unit \
         (ns, us, ms, s, m, h), as in 100ms, 30s or 1m30s.",
    ]);
    for (section, title) in SECTIONS {
        page.section(&title.to_uppercase(), &[]);
        for opt in OPTIONS.iter().filter(|opt| opt.section == section) {
            page.option(opt);
        }
    }
    page.section("COMMANDS", &["Commands that ask a running proxy have options of their own:"]);
    for command in &COMMANDS {
        let sentences = [format!("{}.", command.help), command.more.to_owned()];
        page.entry(
            &format!("{} {}", command.name, command.argument),
            sentences.join(" ").trim_end(),
        );
        if !command.options.is_empty() {
            page.0 += ".RS\n";
            for opt in command.options {
                page.option(opt);
            }
            page.0 += ".RE\n";
        }
    }
    for topic in &TOPICS {
        page.page(topic.text);
    }
    page.section("ENVIRONMENT", &[]);
    page.entry("RUST_LOG", "What is logged, as in debug or tcpause=trace; it beats --log-level.");
    page.section("FILES", &["./tcpause.yml, /etc/tcpause/tcpause.yml"]);
    page.section("EXAMPLE", &[]);
    page.as_it_is(EXAMPLE.lines());
    page.0
}

/// Returns `-c, --config FILE`.
fn synopsis(opt: &Opt) -> String {
    let short = opt.short.map_or_else(String::new, |short| format!("-{short}, "));
    let value = opt.value.map_or_else(String::new, |value| format!(" {value}"));
    format!("{short}--{}{value}", opt.long)
}

/// A page of roff that grows; all text is escaped.
struct Roff(String);

impl Roff {
    /// Begins a section.
    fn section(&mut self, title: &str, paragraphs: &[&str]) {
        self.0 += &format!(".SH \"{}\"\n", escape(title));
        for paragraph in paragraphs {
            self.0 += ".PP\n";
            self.line(paragraph);
        }
    }

    /// Writes an option with its meaning and its default.
    fn option(&mut self, opt: &Opt) {
        let default = opt.default().map(|default| format!("The default is {default}."));
        let sentences = [Some(format!("{}.", opt.help)), Some(opt.more.to_owned()), default];
        let sentences: Vec<String> =
            sentences.into_iter().flatten().filter(|text| !text.is_empty()).collect();
        self.entry(&synopsis(opt), &sentences.join(" "));
    }

    /// Writes a term with its meaning below.
    fn entry(&mut self, term: &str, text: &str) {
        self.0 += &format!(".TP\n\\fB{}\\fR\n", escape(&paint(term.trim_end(), "", "")));
        self.line(text);
    }

    /// Writes a page of the manual, without the tables of options and commands, which the man page has elsewhere.
    fn page(&mut self, text: &str) {
        for block in markdown::parse(text) {
            match block {
                Block::Title(text) => self.section(&text.to_uppercase(), &[]),
                Block::Heading(text) => self.0 += &format!(".SS \"{}\"\n", escape(text)),
                Block::Paragraph(text) => {
                    self.0 += ".PP\n";
                    self.line(&inline(&text));
                }
                Block::Item(mark, text) => {
                    let mark = if mark == "-" { "\\(bu" } else { mark };
                    self.0 += &format!(".IP {mark} 4\n");
                    self.line(&inline(&text));
                }
                Block::Code(lines) => self.as_it_is(lines),
                Block::Table(rows) => self.table(&rows),
            }
        }
    }

    /// Writes a table of two columns as terms with their meanings, and a wider one as it is laid out.
    fn table(&mut self, rows: &[Vec<&str>]) {
        const COLUMNS_MAX: usize = 72;
        match rows {
            [head, ..] if ["option", "command"].contains(head.first().unwrap_or(&"")) => {}
            [head, rows @ ..] if head.len() == 2 => {
                for row in rows {
                    let [term, text] = [0, 1].map(|at| row.get(at).copied().unwrap_or_default());
                    self.entry(&inline(term), &inline(text));
                }
            }
            _ => self.as_it_is(layout(rows, COLUMNS_MAX)),
        }
    }

    /// Writes lines that are not to be filled.
    fn as_it_is(&mut self, lines: impl IntoIterator<Item = impl AsRef<str>>) {
        self.0 += ".PP\n.nf\n";
        for line in lines {
            self.line(line.as_ref());
        }
        self.0 += ".fi\n";
    }

    /// Writes a line of text. The `\&` before a leading dot or quote keeps roff from reading a command.
    fn line(&mut self, text: &str) {
        let text = paint(&escape(text), "\\fB", "\\fR").replace('\n', " ");
        self.0 += &format!("\\&{text}\n");
    }
}

/// Escapes the characters with a meaning in roff, and the only character of the help that is not ASCII.
fn escape(text: &str) -> String {
    text.replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('\'', "\\(aq")
        .replace('µ', "\\(mc")
        .replace('|', "\\(ba")
}

#[cfg(test)]
mod tests {
    use super::super::options::Action;
    use super::*;

    /// Returns the table of the page on settings, between its markers.
    fn markdown() -> String {
        let mut text = "| option | key | default | meaning |\n|---|---|---|---|\n".to_owned();
        for opt in OPTIONS.iter() {
            let key =
                if let Action::Set(key) = opt.action { format!("`{key}`") } else { String::new() };
            let default = match (opt.default(), opt.action) {
                (Some(default), _) => format!("`{default}`"),
                (None, Action::Set("proxy.reject-clients")) => "`false`".to_owned(),
                _ => String::new(),
            };
            text += &format!("| `{}` | {key} | {default} | {} |\n", synopsis(opt), opt.help);
        }
        text
    }

    /// Returns the table of the page on commands, between its markers, without the options that all have.
    fn markdown_of_commands() -> String {
        let mut text = "| command | what it does | its options |\n|---|---|---|\n".to_owned();
        for word in COMMANDS.iter().filter(|word| word.client.is_some()) {
            let own = word.options.iter().filter(|opt| matches!(opt.action, Action::Ask(_)));
            let options: Vec<String> = own.map(|opt| format!("`{}`", synopsis(opt))).collect();
            let name = format!("{} {}", word.name, word.argument);
            text += &format!(
                "| `tcpause {}` | {} | {} |\n",
                name.trim_end(),
                word.help,
                options.join(", ")
            );
        }
        text
    }

    /// Returns the table of the page on signals, between its markers.
    fn markdown_of_signals() -> String {
        let rows = SIGNALS.map(|(signal, effect)| format!("| {signal} | {effect} |\n"));
        format!("| signal | effect |\n|---|---|\n{}", rows.concat())
    }

    #[test]
    fn the_help_shows_every_option_with_its_default() {
        let help = help(None, false);
        for opt in OPTIONS.iter() {
            assert!(help.contains(&synopsis(opt)), "{}", opt.long);
        }
        for default in ["10s", "info", "localhost:3000", "3s", "100ms", "localhost:3001"] {
            assert!(help.contains(&format!("[default: {default}]")), "{default}");
        }
        for topic in &TOPICS {
            assert!(help.contains(&format!("  {:18}{}\n", topic.name, topic.summary())), "{help}");
        }
        let names = COMMANDS.iter().map(|word| Some(word.name)).chain([None]);
        for line in names.flat_map(|name| {
            super::help(name, false).lines().map(str::to_owned).collect::<Vec<_>>()
        }) {
            assert!(line.len() <= 100 && line.is_ascii(), "{line}");
        }
    }

    #[test]
    fn the_man_page_escapes_its_text() {
        let man = man();
        for opt in OPTIONS.iter() {
            assert!(man.contains(&escape(&synopsis(opt))), "{}", opt.long);
        }
        let commands = [".TH ", ".SH ", ".SS ", ".PP", ".TP", ".IP ", ".RS", ".RE", ".nf", ".fi"];
        for line in man.lines().filter(|line| line.starts_with(['.', '\''])) {
            assert!(commands.iter().any(|command| line.starts_with(command)), "{line}");
        }
        assert!(man.is_ascii() && !man.contains(['`', '|', '\u{1}']), "{man}");
        for topic in &TOPICS {
            let title = topic.text.lines().next().unwrap().trim_start_matches("# ").to_uppercase();
            assert!(man.contains(&format!(".SH \"{}\"\n", escape(&title))), "{title}");
        }
        assert_eq!(escape("a-b 'c' \\"), "a\\-b \\(aqc\\(aq \\e");
    }

    #[test]
    fn the_pages_show_every_option_command_and_signal() {
        for (topic, name, expected) in [
            ("settings", "options", markdown()),
            ("commands", "commands", markdown_of_commands()),
            ("signals", "signals", markdown_of_signals()),
        ] {
            let page = TOPICS.iter().find(|page| page.name == topic).unwrap();
            let block = page
                .text
                .split_once(&format!("<!-- {name} -->\n"))
                .and_then(|(_, rest)| rest.split_once(&format!("<!-- /{name} -->")))
                .map(|(block, _)| block.trim());
            assert_eq!(
                block,
                Some(expected.trim()),
                "{topic}.md must have this between its markers:\n{expected}"
            );
        }
        let commands = TOPICS.iter().find(|page| page.name == "commands").unwrap().text;
        for Word { name, .. } in &COMMANDS {
            let is_named =
                ["`tcpause ", "`"].iter().any(|it| commands.contains(&format!("{it}{name}")));
            assert!(is_named, "commands.md leaves out {name}");
        }
    }
}

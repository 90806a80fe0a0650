//! The help and the man page.
#![expect(
    clippy::format_push_string,
    reason = "a page is made once; what counts is that its code reads like it"
)]

use super::options::{COMMANDS, OPTIONS, Opt, Section};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What the program is, in one sentence.
const SUMMARY: &str = "\
A zero-downtime proxy for TCP and UNIX sockets:
pause it, restart the server behind it, resume; no client notices.";

const EXAMPLE: &str = "\
tcpause --proxy-addr :6432 --upstream-addr unix:///run/postgresql/.s.PGSQL.5432 &
curl -X PUT localhost:3001/paused      # new clients are held
curl -f 'localhost:3001/paused/block-until-idle?timeout=30s' &&
systemctl restart postgresql
curl -X DELETE localhost:3001/paused   # held clients are served";

/// The text of `--help`.
pub(crate) fn help() -> String {
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
    for (section, title) in Section::ALL {
        text += &format!("\n{title}:\n");
        for opt in OPTIONS.iter().filter(|opt| opt.section == section) {
            let default =
                opt.default().map_or_else(String::new, |default| format!(" [default: {default}]"));
            let indent = if opt.short.is_some() { "  " } else { "      " };
            text += &format!("{indent}{}\n          {}{default}\n", synopsis(opt), opt.help);
        }
    }
    text += "
ADDRESS is host:port, :port (all interfaces), [ipv6]:port, unix:///absolute/path or unix://@name.
DURATION is a number with a unit, as in 100ms, 30s or 1m30s.

Example:
";
    for line in EXAMPLE.lines() {
        text += &format!("  {line}\n");
    }
    text
}

/// The man page in roff.
pub(crate) fn man() -> String {
    let mut page = Roff(String::new());
    page.0 += &format!(".TH TCPAUSE 1 \"\" \"tcpause {VERSION}\" \"User Commands\"\n");
    page.section("NAME", &["tcpause - pause the connections to a server while it restarts"]);
    page.section("SYNOPSIS", &["tcpause [OPTIONS] [COMMAND]"]);
    page.section("DESCRIPTION", &[
        SUMMARY,
        "While it is paused, new clients are held (or rejected with a 503) and running connections go on; once all of them have ended, \
         the server can be restarted, and on resume the held clients are served, oldest first.",
        "An ADDRESS is host:port, :port (all interfaces), [ipv6]:port, unix:///absolute/path or unix://@name. A DURATION is a number with a unit \
         (ns, us, ms, s, m, h), as in 100ms, 30s or 1m30s.",
    ]);
    for (section, title) in Section::ALL {
        page.section(&title.to_uppercase(), &[]);
        for opt in OPTIONS.iter().filter(|opt| opt.section == section) {
            let default = opt.default().map(|default| format!("The default is {default}."));
            let sentences = [Some(format!("{}.", opt.help)), Some(opt.more.to_owned()), default];
            let sentences: Vec<String> =
                sentences.into_iter().flatten().filter(|text| !text.is_empty()).collect();
            page.entry(&synopsis(opt), &sentences.join(" "));
        }
    }
    page.section("COMMANDS", &[]);
    for command in &COMMANDS {
        page.entry(
            &format!("{} {}", command.name, command.argument),
            &format!("{}.", command.help),
        );
    }
    page.section("CONTROL API", &[]);
    page.entry("GET /paused", "Whether it is paused: {\"paused\": true} or {\"paused\": false}.");
    page.entry("PUT /paused", "Pauses. Answers 201 once no further client is let through.");
    page.entry("DELETE /paused", "Resumes. Answers 204.");
    page.entry(
        "GET /paused/block-until-idle?timeout=30s",
        "Answers 204 once no connection is carried, or 504 when the time is up. Without a timeout it waits for ever.",
    );
    page.entry(
        "GET /status",
        "The counts of held, connecting and active connections, and more, as JSON.",
    );
    page.section("SIGNALS", &[]);
    page.entry("SIGTERM, SIGINT", "The first stops accepting and lets connections end within the grace period; the second closes them at once.");
    page.entry("SIGHUP", "Is ignored; the configuration is read at start only.");
    page.section("EXIT STATUS", &[]);
    page.entry("0", "Every connection had ended by itself.");
    page.entry("1", "The system refused something, or a second signal forced the end.");
    page.entry("2", "The command line or the configuration is wrong.");
    page.entry("3", "The grace period was over; what was left was closed.");
    page.section("ENVIRONMENT", &[]);
    page.entry("RUST_LOG", "What is logged, as in debug or tcpause=trace; it beats --log-level.");
    page.section("FILES", &["./tcpause.yml, /etc/tcpause/tcpause.yml"]);
    page.section("EXAMPLE", &[]);
    page.0 += ".nf\n";
    for line in EXAMPLE.lines() {
        page.line(line);
    }
    page.0 += ".fi\n";
    page.0
}

/// The table of the README, between its markers.
#[cfg(test)]
fn markdown() -> String {
    use super::options::Action;

    let mut text = "| option | key | default | meaning |\n|---|---|---|---|\n".to_owned();
    for opt in &OPTIONS {
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

/// `-c, --config FILE`
fn synopsis(opt: &Opt) -> String {
    let short = opt.short.map_or_else(String::new, |short| format!("-{short}, "));
    let value = opt.value.map_or_else(String::new, |value| format!(" {value}"));
    format!("{short}--{}{value}", opt.long)
}

/// A page of roff that grows; all text is escaped.
struct Roff(String);

impl Roff {
    fn section(&mut self, title: &str, paragraphs: &[&str]) {
        self.0 += &format!(".SH \"{}\"\n", escape(title));
        for paragraph in paragraphs {
            self.0 += ".PP\n";
            self.line(paragraph);
        }
    }

    fn entry(&mut self, term: &str, text: &str) {
        self.0 += &format!(".TP\n\\fB{}\\fR\n", escape(term.trim_end()));
        self.line(text);
    }

    /// A line of text; `\&` keeps a dot or a quote in front from being a command.
    fn line(&mut self, text: &str) {
        self.0 += &format!("\\&{}\n", escape(text).replace('\n', " "));
    }
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_shows_every_option_with_its_default() {
        let help = help();
        for opt in &OPTIONS {
            assert!(help.contains(&synopsis(opt)), "{}", opt.long);
        }
        for default in ["10s", "info", "localhost:3000", "3s", "100ms", "localhost:3001"] {
            assert!(help.contains(&format!("[default: {default}]")), "{default}");
        }
        assert!(help.is_ascii());
        for line in help.lines() {
            assert!(line.len() <= 100, "{line}");
        }
    }

    #[test]
    fn the_man_page_escapes_its_text() {
        let man = man();
        for opt in &OPTIONS {
            assert!(man.contains(&escape(&synopsis(opt))), "{}", opt.long);
        }
        let commands = [".TH ", ".SH ", ".PP", ".TP", ".nf", ".fi"];
        for line in man.lines().filter(|line| line.starts_with(['.', '\''])) {
            assert!(commands.iter().any(|command| line.starts_with(command)), "{line}");
        }
        assert_eq!(escape("a-b 'c' \\"), "a\\-b \\(aqc\\(aq \\e");
    }

    #[test]
    fn the_readme_shows_every_option() {
        let readme = include_str!("../../README.md");
        let block = readme
            .split_once("<!-- options -->\n")
            .and_then(|(_, rest)| rest.split_once("<!-- /options -->"))
            .map(|(block, _)| block.trim());
        let expected = markdown();
        assert_eq!(
            block,
            Some(expected.trim()),
            "README.md must have this between its markers:\n{expected}"
        );
    }
}

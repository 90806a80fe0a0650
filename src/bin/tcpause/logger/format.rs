//! Lines of the log, as text or as JSON. A character that could turn, break or hide a line is escaped in both.

use std::{
    fmt::{self, Write},
    time::SystemTime,
};

use log::{
    Level, Record,
    kv::{self, Key, Value, VisitSource, VisitValue},
};
use tcpause::{LogFormat, Rfc3339};

/// Most bytes of text in a line. The bound keeps long texts of a peer from growing the queue.
pub(super) const TEXT_BYTES_MAX: usize = 4096;

/// Event of the lines about connections. In JSON their fields tell all, so that they have no message.
const CONNECTION: &str = "connection";
/// Key of a record that names its event.
const EVENT: &str = "event";
/// Event of a record that names none.
const EVENT_DEFAULT: &str = "log";

/// Format of all lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    is_json: bool,
    /// Set if a line begins with the journal's number of its level. Text then has no time, as the journal adds its own.
    has_level_number: bool,
}

impl Format {
    /// Returns the format for a setting, and for standard error, which is the journal or not.
    pub(super) const fn new(setting: LogFormat, is_journal: bool) -> Self {
        Self {
            is_json: matches!(setting, LogFormat::Json),
            has_level_number: is_journal && !matches!(setting, LogFormat::Text),
        }
    }

    /// Returns the line of a record, with its end.
    pub(super) fn line(self, record: &Record<'_>) -> Vec<u8> {
        format!("{}\n", Line(self, record)).into_bytes()
    }
}

/// A line without its end: `2026-11-23T17:14:22.123Z INFO message`, or `<6>INFO message` in the journal, or an object of JSON.
struct Line<'a>(Format, &'a Record<'a>);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(format, record) = self;
        if format.has_level_number {
            write!(f, "<{}>", journal_level(record.level()))?;
        }
        if format.is_json {
            return write_json(f, record);
        }
        if !format.has_level_number {
            write!(f, "{} ", Rfc3339(SystemTime::now()))?;
        }
        write!(f, "{} {}", record.level(), OneLine(record.args()))
    }
}

/// Returns the level's number in the journal, by `sd-daemon(3)`.
fn journal_level(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

fn write_json(f: &mut fmt::Formatter<'_>, record: &Record<'_>) -> fmt::Result {
    let level = record.level().as_str().to_ascii_lowercase();
    write!(f, "{{\"time\":\"{}\",\"level\":\"{level}\"", Rfc3339(SystemTime::now()))?;
    let mut fields = Fields(Escape { output: f, bytes: 0, is_json: true });
    let event = record.key_values().get(Key::from(EVENT));
    let event = event.unwrap_or_else(|| EVENT_DEFAULT.into());
    fields.field(EVENT, &event)?;
    if event.to_borrowed_str() != Some(CONNECTION) {
        fields.field("message", &Value::from_display(record.args()))?;
    }
    record.key_values().visit(&mut fields).map_err(|_| fmt::Error)?;
    f.write_char('}')
}

/// Writer of the fields of an object, each with a comma before it.
struct Fields<'a, 'b>(Escape<'a, 'b>);

impl Fields<'_, '_> {
    fn field(&mut self, key: &str, value: &Value<'_>) -> fmt::Result {
        write!(self.0.output, ",\"{key}\":")?;
        value.visit(&mut *self).map_err(|_| fmt::Error)
    }
}

impl<'kvs> VisitSource<'kvs> for Fields<'_, '_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        match key.as_str() {
            EVENT => Ok(()),
            key => Ok(self.field(key, &value)?),
        }
    }
}

impl VisitValue<'_> for Fields<'_, '_> {
    fn visit_any(&mut self, value: Value<'_>) -> Result<(), kv::Error> {
        self.0.output.write_char('"')?;
        write!(self.0, "{value}")?;
        Ok(self.0.output.write_char('"')?)
    }

    fn visit_null(&mut self) -> Result<(), kv::Error> {
        Ok(self.0.output.write_str("null")?)
    }

    fn visit_u64(&mut self, value: u64) -> Result<(), kv::Error> {
        Ok(write!(self.0.output, "{value}")?)
    }

    fn visit_i64(&mut self, value: i64) -> Result<(), kv::Error> {
        Ok(write!(self.0.output, "{value}")?)
    }

    fn visit_f64(&mut self, value: f64) -> Result<(), kv::Error> {
        // JSON has no other numbers.
        if value.is_finite() { Ok(write!(self.0.output, "{value}")?) } else { self.visit_null() }
    }
}

/// Text shown on one line. Characters that turn or break a line on a terminal are escaped, and an overlong text is cut.
pub(crate) struct OneLine<T>(pub(crate) T);

impl<T: fmt::Display> fmt::Display for OneLine<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escape { output: f, bytes: 0, is_json: false }, "{}", self.0)
    }
}

/// Writer that escapes its text, and cuts it beyond [`TEXT_BYTES_MAX`].
struct Escape<'a, 'b> {
    output: &'a mut fmt::Formatter<'b>,
    /// Length of the text so far.
    bytes: usize,
    is_json: bool,
}

impl Write for Escape<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for letter in text.chars() {
            if self.bytes > TEXT_BYTES_MAX {
                return Ok(());
            }
            self.bytes += letter.len_utf8();
            if self.bytes > TEXT_BYTES_MAX {
                self.output.write_str("...")?;
            } else if !self.is_json && (letter.is_control() || is_invisible(letter)) {
                write!(self.output, "{}", letter.escape_default())?;
            } else if letter.is_control() || is_invisible(letter) {
                // All of these letters have four digits at most.
                write!(self.output, "\\u{:04x}", u32::from(letter))?;
            } else {
                if self.is_json && matches!(letter, '"' | '\\') {
                    self.output.write_char('\\')?;
                }
                self.output.write_char(letter)?;
            }
        }
        Ok(())
    }
}

/// Returns true for a character that turns, breaks or hides text on a terminal although it is no control character.
fn is_invisible(letter: char) -> bool {
    matches!(letter, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: Format = Format::new(LogFormat::Text, false);
    const JSON: Format = Format::new(LogFormat::Json, false);

    /// Returns the line of a record without its end.
    fn line(format: Format, record: &Record<'_>) -> String {
        let line = String::from_utf8(format.line(record)).unwrap();
        assert_eq!(line.matches('\n').count(), 1, "{line:?}");
        line.strip_suffix('\n').unwrap().to_owned()
    }

    fn object(line: &str) -> serde_json::Value {
        let mut object: serde_json::Value = serde_json::from_str(line).unwrap();
        let time = object.as_object_mut().unwrap().remove("time").unwrap();
        assert_eq!(time.as_str().unwrap().len(), 24, "{line}");
        object
    }

    #[test]
    fn one_event_is_one_line() {
        for (message, shown) in [
            ("plain: ä 'b' \"c\" \\", "plain: ä 'b' \"c\" \\"),
            ("a\r\nb\tc", "a\\r\\nb\\tc"),
            ("\x1b[31m\0\x7f", "\\u{1b}[31m\\u{0}\\u{7f}"),
            ("\u{85}\u{9b}\u{2028}\u{202e}\u{2066}", "\\u{85}\\u{9b}\\u{2028}\\u{202e}\\u{2066}"),
            ("\u{200b}\u{200f}\u{61c}\u{feff}", "\\u{200b}\\u{200f}\\u{61c}\\u{feff}"),
        ] {
            assert_eq!(OneLine(message).to_string(), shown);
            let line = line(JSON, &Record::builder().args(format_args!("{message}")).build());
            let is_harmful = |letter: char| letter.is_control() || is_invisible(letter);
            assert!(!line.contains(is_harmful), "{line:?}");
            assert_eq!(object(&line)["message"], message);
        }
        let long = "ä".repeat(TEXT_BYTES_MAX);
        let shown = OneLine(&long).to_string();
        assert_eq!(shown, format!("{}...", "ä".repeat(TEXT_BYTES_MAX / 2)));
        assert_eq!(OneLine(format_args!("{long}{long}")).to_string(), shown);
    }

    #[test]
    fn text_has_time_level_and_message() {
        let fields = [("event", "paused")];
        let args = format_args!("a\nb");
        let record = Record::builder().level(Level::Info).args(args).key_values(&fields).build();
        let line = line(TEXT, &record);
        let (time, rest) = line.split_once(' ').unwrap();
        assert_eq!((time.len(), rest), (24, "INFO a\\nb"));
    }

    #[test]
    fn json_has_the_fields_of_the_record() {
        let fields = [
            ("pause", Value::from("a\"\\\u{202e}")),
            ("event", Value::from("paused")),
            ("reason", Value::null()),
            ("held", Value::from(u64::MAX)),
            ("below", Value::from(-3_i64)),
            ("paused_seconds", Value::from(0.0003)),
            ("whole", Value::from(12.0)),
            ("endless", Value::from(f64::INFINITY)),
            ("state", Value::from('a')),
        ];
        let mut builder = Record::builder();
        builder.level(Level::Warn).key_values(&fields).target("tcpause::pause");
        let line = line(JSON, &builder.args(format_args!("paused \"a\"")).build());
        let begin = "\",\"level\":\"warn\",\"event\":\"paused\",\"message\":\"paused \\\"a\\\"\",";
        assert!(line.contains(begin), "{line}");
        let expected = serde_json::json!({
            "level": "warn", "event": "paused", "message": "paused \"a\"",
            "pause": "a\"\\\u{202e}", "reason": null, "held": u64::MAX, "below": -3,
            "paused_seconds": 0.0003, "whole": 12, "endless": null, "state": "a",
        });
        assert_eq!(object(&line), expected);
    }

    #[test]
    fn the_fields_of_a_connection_replace_its_message() {
        let fields = [("event", "connection"), ("cause", "ended")];
        let mut record = Record::builder();
        record.key_values(&fields);
        let line = line(JSON, &record.args(format_args!("text")).build());
        let expected = "\",\"level\":\"info\",\"event\":\"connection\",\"cause\":\"ended\"}";
        assert!(line.ends_with(expected), "{line}");
    }

    #[test]
    fn a_record_without_an_event_gets_one_and_long_texts_are_cut() {
        let long = "\u{1}".repeat(TEXT_BYTES_MAX);
        let (fields, args) = ([("by", &*long), ("reason", &*long)], format_args!("text"));
        let line = line(JSON, &Record::builder().key_values(&fields).args(args).build());
        let object = object(&line);
        assert_eq!(
            (object["event"].as_str(), object["message"].as_str()),
            (Some("log"), Some("text"))
        );
        let cut = object["by"].as_str().unwrap();
        assert!(cut.ends_with("\u{1}...") && cut.len() < TEXT_BYTES_MAX, "{cut:?}");
        assert_eq!(object["reason"], "", "there is no room left");
    }

    #[test]
    fn the_journal_gets_the_level_as_a_number() {
        let of = |setting, is_journal, level| {
            let args = format_args!("m");
            let format = Format::new(setting, is_journal);
            line(format, &Record::builder().level(level).args(args).build())
        };
        for (level, number) in [
            (Level::Error, "<3>"),
            (Level::Warn, "<4>"),
            (Level::Info, "<6>"),
            (Level::Debug, "<7>"),
            (Level::Trace, "<7>"),
        ] {
            assert_eq!(of(LogFormat::Auto, true, level), format!("{number}{level} m"));
            let json = of(LogFormat::Json, true, level);
            assert_eq!(object(json.strip_prefix(number).unwrap())["message"], "m");
            object(&of(LogFormat::Json, false, level));
            for (setting, is_journal) in [(LogFormat::Text, true), (LogFormat::Auto, false)] {
                let text = of(setting, is_journal, level);
                assert!(
                    text.starts_with("20") && text.ends_with(&format!("Z {level} m")),
                    "{text}"
                );
            }
        }
    }
}

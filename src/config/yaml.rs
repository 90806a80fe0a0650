//! The configuration as YAML. Its keys are those of the table of settings, so that file and command line always agree.

use std::{collections::BTreeSet, fmt};

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_yaml::{Mapping, Value};

use super::{
    settings::{Config, SETTINGS, Setting, find},
    suggest::nearest,
};

/// Reads a configuration. The caller puts the name of the file and a colon before the error.
pub(super) fn parse(text: &str) -> Result<Config, String> {
    let mut config = Config::default();
    let mut seen = BTreeSet::new();
    let section = Section { prefix: String::new(), config: &mut config, seen: &mut seen };
    // A byte order mark alone is an empty file to us, but not to the parser.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    match section.deserialize(serde_yaml::Deserializer::from_str(text)) {
        Ok(()) => Ok(config),
        Err(error) => Err(explain(&error)),
    }
}

/// Writes a configuration that [`parse`] reads as the same.
pub(super) fn format(config: &Config) -> Result<String, serde_yaml::Error> {
    let mut root = Mapping::new();
    for setting in SETTINGS {
        insert(&mut root, setting.key, setting.get(config));
    }
    serde_yaml::to_string(&root)
}

/// Returns a value as the text that the command line takes; `None` when it is not set.
pub(super) fn to_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::Sequence(items) if !items.is_empty() => {
            Some(items.iter().filter_map(to_text).collect::<Vec<_>>().join(","))
        }
        _ => None,
    }
}

fn insert(mapping: &mut Mapping, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            mapping.insert(key.into(), value);
        }
        Some((section, rest)) => {
            let inner = mapping.entry(section.into()).or_insert_with(|| Mapping::new().into());
            if let Value::Mapping(inner) = inner {
                insert(inner, rest, value);
            }
        }
    }
}

/// Makes an error one line that begins with the place: `4:3: proxy: unknown key ...`.
fn explain(error: &serde_yaml::Error) -> String {
    let text = error.to_string();
    match error.location() {
        None => format!(" {text}"),
        Some(place) => {
            let (line, column) = (place.line(), place.column());
            let text = text.replacen(&format!(" at line {line} column {column}"), "", 1);
            // The parser says this of a tab, and of a value such as `@here`.
            let bare = text.contains("cannot start any token");
            let remedy = if bare {
                "; indent with spaces, not tabs, and quote a value that is more than a word"
            } else {
                ""
            };
            format!("{line}:{column}: {text}{remedy}")
        }
    }
}

/// Mapping of the file. Errors are raised while the parser is at the key or the value, so that they get its line and column.
struct Section<'a> {
    /// The keys above, each followed by a dot.
    prefix: String,
    config: &'a mut Config,
    /// Full keys so far in the file, of values and sections alike, by which a second one is found.
    seen: &'a mut BTreeSet<String>,
}

impl<'de> DeserializeSeed<'de> for Section<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for Section<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the keys {}, each with a colon and its value", list(&children(&self.prefix)))
    }

    /// Keeps the defaults of a section whose keys are all commented out.
    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { prefix, config, seen } = self;
        while let Some(key) = map.next_key_seed(Key { prefix: &prefix, seen })? {
            match find(&key) {
                Some(setting) => map.next_value_seed(Scalar { setting, config })?,
                None => map.next_value_seed(Section { prefix: key + ".", config, seen })?,
            }
        }
        Ok(())
    }
}

/// Key of a section, which is read as the full key of a setting or of a section.
struct Key<'a> {
    prefix: &'a str,
    seen: &'a mut BTreeSet<String>,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<String, E> {
        if !children(self.prefix).contains(&name) {
            return Err(E::custom(unknown(self.prefix, name)));
        }
        let key = format!("{}{name}", self.prefix);
        if !self.seen.insert(key.clone()) {
            return Err(E::custom(format!(
                "the key `{name}` is here for the second time; remove one of the two"
            )));
        }
        Ok(key)
    }
}

/// Value of a setting. It is read as text even where YAML has a type for it, so that a setting has one syntax.
struct Scalar<'a> {
    setting: &'static Setting,
    config: &'a mut Config,
}

impl Scalar<'_> {
    fn is_list(&self) -> bool {
        matches!(self.setting.get(self.config), Value::Sequence(_))
    }
}

impl<'de> DeserializeSeed<'de> for Scalar<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for Scalar<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match to_text(&self.setting.get(&Config::default())) {
            _ if self.is_list() => f.write_str("a list, such as `[one, another]`"),
            Some(example) => write!(f, "one value, such as `{example}`"),
            None => f.write_str("one value"),
        }
    }

    /// Keeps the default of a key without a value.
    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        if self.is_list() {
            deserializer.deserialize_seq(self)
        } else {
            deserializer.deserialize_str(self)
        }
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<(), E> {
        self.setting.set(self.config, text).map_err(E::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let mut texts = Vec::new();
        while let Some(text) = items.next_element::<String>()? {
            texts.push(text);
        }
        if texts.is_empty() {
            return Ok(());
        }
        self.setting.set(self.config, &texts.join(",")).map_err(A::Error::custom)
    }
}

/// Returns the names that a section knows, in the order of the file.
fn children(prefix: &str) -> Vec<&'static str> {
    let mut names: Vec<&str> = SETTINGS
        .iter()
        .filter_map(|setting| setting.key.strip_prefix(prefix)?.split('.').next())
        .collect();
    names.dedup();
    names
}

/// Returns the error of an unknown key, with the key that was probably meant.
fn unknown(prefix: &str, name: &str) -> String {
    let known = children(prefix);
    let elsewhere: Vec<&str> = SETTINGS
        .iter()
        .map(|setting| setting.key)
        .filter(|key| key.ends_with(&format!(".{name}")))
        .collect();
    let remedy = if let Some(found) = nearest(name, known.iter().copied()) {
        format!("did you mean `{found}`?")
    } else if find(&format!("{prefix}{name}")).is_some() {
        format!(
            "write the part before each dot on a line of its own, `{}:`, and the rest indented below it",
            name.split('.').next().unwrap_or_default()
        )
    } else if !elsewhere.is_empty() {
        format!("did you mean {}?", list(&elsewhere))
    } else {
        format!("known here: {}", list(&known))
    };
    format!("unknown key `{}`; {remedy}", name.escape_debug())
}

fn list(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

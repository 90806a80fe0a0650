//! The options of the proxy: the settings of the library, and four more. Parsing, help, man page and completions come from
//! them and from the table of commands.

use std::{
    num::{IntErrorKind, NonZeroUsize},
    sync::LazyLock,
};

use tcpause::{
    Config, parse_duration,
    settings::{Completion, Setting},
    suggest::{choice, nearest},
};

/// One option of the command line.
pub(crate) struct Opt {
    /// Name after two dashes. For a setting it is the key of the file with its dots turned to dashes.
    pub(crate) long: &'static str,
    /// Letter after one dash.
    pub(crate) short: Option<char>,
    /// Word that stands for the value in the help; `None` for a switch.
    pub(crate) value: Option<&'static str>,
    /// Meaning in one line for the help, without a full stop.
    pub(crate) help: &'static str,
    /// Whole sentences that the man page adds.
    pub(crate) more: &'static str,
    /// Heading in the help, one of [`tcpause::settings::SECTIONS`].
    pub(crate) section: &'static str,
    /// Words that a shell offers for the value.
    pub(crate) completion: Completion,
    /// Effect.
    pub(crate) action: Action,
}

/// Effect of an option.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Sets this key of the configuration.
    Set(&'static str),
    ConfigFile,
    CheckConfig,
    Help,
    Version,
    /// Is handed to its command.
    Ask(Kind),
}

/// Kind of value that an option of a command takes, with the default.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    Duration(Option<&'static str>),
    Count,
    /// One of the words that a shell offers.
    Choice(Option<&'static str>),
    Switch,
}

/// Every option of the proxy, in the order of the help.
pub(crate) static OPTIONS: LazyLock<Vec<Opt>> = LazyLock::new(|| {
    let settings = Config::settings().iter().map(Opt::from);
    let (general, others): (Vec<_>, Vec<_>) = settings.partition(|opt| opt.section.is_empty());
    let first = [CONFIG, CHECK_CONFIG].into_iter().chain(general);
    first.chain([HELP, VERSION]).chain(others).collect()
});

const CONFIG: Opt = Opt {
    short: Some('c'),
    value: Some("FILE"),
    help: "Read this YAML file; otherwise ./tcpause.yml or /etc/tcpause/tcpause.yml, if there",
    more: "An option beats the file, the file beats the default, and no file is needed.",
    completion: Completion::File,
    ..Opt::switch("config", Action::ConfigFile)
};

const CHECK_CONFIG: Opt = Opt {
    help: "Print the error of the configuration, or the configuration itself, and exit",
    more: "A valid configuration is printed as YAML, with the options applied.",
    ..Opt::switch("check-config", Action::CheckConfig)
};

/// Option that every command has too.
pub(super) const HELP: Opt =
    Opt { short: Some('h'), help: "Show this help", ..Opt::switch("help", Action::Help) };

const VERSION: Opt =
    Opt { short: Some('V'), help: "Show the version", ..Opt::switch("version", Action::Version) };

impl From<&'static Setting> for Opt {
    fn from(setting: &'static Setting) -> Self {
        Self {
            // The leak is harmless, as the table lives as long as the program.
            long: setting.key.replace('.', "-").leak(),
            short: setting.short,
            value: setting.value,
            help: setting.help,
            more: setting.more,
            section: setting.section(),
            completion: setting.completion,
            action: Action::Set(setting.key),
        }
    }
}

impl Opt {
    /// Returns an option that takes no value and has no help yet.
    pub(super) const fn switch(long: &'static str, action: Action) -> Self {
        Self {
            long,
            short: None,
            value: None,
            help: "",
            more: "",
            section: "",
            completion: Completion::None,
            action,
        }
    }

    /// Returns the default as the help shows it; `None` for a switch, or without a default.
    pub(crate) fn default(&self) -> Option<String> {
        match self.action {
            Action::Set(key) if self.value.is_some() => Config::default()
                .get(key)
                .map(|value| value.trim_start_matches("tcp://").to_owned()),
            Action::Ask(Kind::Duration(default) | Kind::Choice(default)) => {
                default.map(str::to_owned)
            }
            _ => None,
        }
    }

    /// Checks a value that is not part of the configuration. The error does not name the option.
    pub(crate) fn check(&self, text: &str) -> Result<(), String> {
        match (self.action, &self.completion) {
            (Action::Ask(Kind::Duration(_)), _) => parse_duration(text).map(drop),
            (Action::Ask(Kind::Count), _) => match text.parse::<NonZeroUsize>() {
                Ok(_) => Ok(()),
                Err(error) if *error.kind() == IntErrorKind::Zero => {
                    Err(format!("{text:?} is too few; write 1 or more"))
                }
                Err(_) => Err(format!("{text:?} is not a number; write 1 or more")),
            },
            (Action::Ask(Kind::Choice(_)), Completion::Choices(words))
                if !words.contains(&text) =>
            {
                let hint = nearest(text, words.iter().copied())
                    .map_or_else(String::new, |word| format!("; did you mean {word}?"));
                Err(format!("{text:?} is not known; write {}{hint}", choice(words)))
            }
            (Action::Ask(Kind::Switch), _) if text != "true" => {
                Err(format!("{text:?} is too much; write the option alone"))
            }
            _ => Ok(()),
        }
    }
}

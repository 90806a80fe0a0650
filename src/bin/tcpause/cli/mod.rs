//! The command line: the requested command, and the configuration with its options applied.

mod commands;
mod completion;
mod markdown;
mod options;
mod own_options;
mod pages;
mod topics;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use lexopt::{Arg, Parser};
use tcpause::{Config, Error, Server};

use self::{
    commands::{COMMANDS, SHELLS, UNITS, Word, unit_names},
    options::{Action, OPTIONS, Opt},
    topics::{help_names, unknown_topic},
};
pub(crate) use self::{
    completion::{bash, fish, zsh},
    pages::{help, man},
};
use tcpause::suggest::nearest;

/// Configuration files to look for, in this order, when the command line names none.
const CONFIG_FILES: [&str; 2] = ["tcpause.yml", "/etc/tcpause/tcpause.yml"];

/// Parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Invocation {
    /// Command to carry out.
    pub(crate) command: Command,
    /// The command that `exec` runs, and its arguments.
    pub(crate) program: Vec<OsString>,
    /// Words behind a command that takes some.
    pub(crate) arguments: Vec<String>,
    /// The file that `--config` names.
    pub(crate) config_file: Option<PathBuf>,
    /// Settings in their order, each as option, key and value; the last one wins.
    settings: Vec<(&'static str, &'static str, String)>,
    /// Other options of a command and their values, defaults first; the last one wins.
    asked: Vec<(&'static str, String)>,
    /// Number of the defaults among them.
    defaults: usize,
}

/// Command of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    /// Proxy that carries connections until a signal.
    Run,
    /// Check of the configuration, which is then printed.
    CheckConfig,
    /// Help of the program, or of the command or topic with this name.
    Help(Option<&'static str>),
    Version,
    Man,
    Completion(Shell),
    /// Unit of systemd with this text.
    Unit(&'static str),
    Demo,
    /// Request to a running proxy.
    Client(Client),
}

/// Command that asks a running proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Client {
    Pause,
    Resume,
    Status,
    Wait,
    /// Pause, wait, command and resume in one.
    Exec,
    Upgrade,
    Connections,
    Kill,
    /// Switch to the server of the argument.
    Switch,
    /// End of the membership of the host of the second argument.
    Fleet,
}

/// Shell with completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Reads the arguments, without the name of the program. The error is one line with the remedy.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Invocation, String> {
    let mut parser = Parser::from_args(arguments);
    let mut invocation = Invocation::new(Command::Run);
    let (mut words, mut given) = (Vec::new(), Vec::new());
    loop {
        let word = words.first().and_then(|name: &String| find_word(name));
        refuse_single_dash(&mut parser, word)?;
        let opt = match parser.next().map_err(|error| error.to_string())? {
            None => break,
            Some(Arg::Value(first))
                if word.is_some_and(|word| word.client == Some(Client::Exec)) =>
            {
                invocation.program.push(first);
                let rest = parser.raw_args().map_err(|error| error.to_string())?;
                invocation.program.extend(rest);
                break;
            }
            Some(Arg::Value(word)) => {
                words.push(word.to_string_lossy().into_owned());
                continue;
            }
            Some(Arg::Long(name)) => {
                known(word, |opt| opt.long == name).ok_or_else(|| unknown("--", name, word))?
            }
            Some(Arg::Short(letter)) => known(word, |opt| opt.short == Some(letter))
                .ok_or_else(|| unknown("-", &letter.to_string(), word))?,
        };
        match opt.action {
            Action::Help => return Ok(Invocation::new(Command::Help(word.map(|word| word.name)))),
            Action::Version => return Ok(Invocation::new(Command::Version)),
            Action::CheckConfig => given.push((opt, OsString::new())),
            _ => given.push((opt, value(opt, &mut parser)?)),
        }
    }
    invocation.command = command(&words)?;
    if invocation.command == Command::Client(Client::Exec) && invocation.program.is_empty() {
        return Err(
            "exec: name a command to run: tcpause exec -- systemctl restart my-server".to_owned()
        );
    }
    let word = words.first().and_then(|name| find_word(name));
    if let Command::Client(Client::Kill | Client::Switch | Client::Fleet | Client::Resume) =
        invocation.command
    {
        invocation.arguments = words.iter().skip(1).cloned().collect();
    }
    invocation.take_defaults(word);
    for (opt, value) in given {
        // Two commands may have an option of the same name, so options are looked up once the command is known.
        invocation.take(own(opt.long, word)?, value)?;
    }
    if let (Command::Client(Client::Resume), [extra, ..], false) =
        (invocation.command, invocation.arguments.as_slice(), invocation.is_of_fleet())
    {
        return Err(unexpected(extra));
    }
    Ok(invocation)
}

impl Invocation {
    fn new(command: Command) -> Self {
        Self {
            command,
            program: Vec::new(),
            arguments: Vec::new(),
            config_file: None,
            settings: Vec::new(),
            asked: Vec::new(),
            defaults: 0,
        }
    }

    fn take_defaults(&mut self, word: Option<&Word>) {
        for opt in word.into_iter().flat_map(|word| word.options) {
            if let (Action::Ask(_), Some(default)) = (opt.action, opt.default()) {
                self.asked.push((opt.long, default));
            }
        }
        self.defaults = self.asked.len();
    }

    /// Applies an option.
    fn take(&mut self, opt: &'static Opt, value: OsString) -> Result<(), String> {
        let text = |value: OsString| {
            let not_text = |value| format!("--{}: {} is not UTF-8", opt.long, quoted(&value));
            value.into_string().map_err(not_text)
        };
        match opt.action {
            Action::ConfigFile => self.config_file = Some(value.into()),
            Action::Set(key) => self.settings.push((opt.long, key, text(value)?)),
            Action::Ask(_) => {
                let text = text(value)?;
                opt.check(&text).map_err(|error| format!("--{}: {error}", opt.long))?;
                self.asked.push((opt.long, text));
            }
            Action::CheckConfig if self.command == Command::Run => {
                self.command = Command::CheckConfig;
            }
            Action::CheckConfig | Action::Help | Action::Version => {}
        }
        Ok(())
    }

    /// Returns the value of a command's own option, given or by default.
    pub(crate) fn asked(&self, long: &str) -> Option<&str> {
        let asked = self.asked.iter().rev().find(|(name, _)| *name == long);
        asked.map(|(_, text)| text.as_str())
    }

    /// Returns the value of a command's own option if the command line gives it.
    pub(crate) fn given(&self, long: &str) -> Option<&str> {
        let given = self.asked.iter().skip(self.defaults).rev().find(|(name, _)| *name == long);
        given.map(|(_, text)| text.as_str())
    }

    /// Returns true if the command is meant for all hosts of the fleet.
    pub(crate) fn is_of_fleet(&self) -> bool {
        self.asked("fleet").is_some()
    }

    /// Returns the value that the command line gives to a key of the configuration.
    pub(crate) fn setting(&self, key: &str) -> Option<&str> {
        let setting = self.settings.iter().rev().find(|(_, name, _)| *name == key);
        setting.map(|(_, _, text)| text.as_str())
    }

    /// Returns the configuration file, if there is one.
    pub(crate) fn file(&self) -> Result<Option<PathBuf>, Error> {
        match &self.config_file {
            Some(file) => Ok(Some(file.clone())),
            None => find_config(CONFIG_FILES.map(Path::new)),
        }
    }

    /// Returns the configuration and its file, checked as far as is possible without opening a socket.
    pub(crate) fn configure(&self) -> Result<(Config, Option<PathBuf>), Error> {
        let (config, file) = self.read()?;
        self.check(&config)?;
        Ok((config, file))
    }

    /// Checks a configuration as far as is possible without opening a socket.
    pub(crate) fn check(&self, config: &Config) -> Result<(), Error> {
        Server::check(config).map_err(|error| self.name_option(error))
    }

    /// Reads the configuration and returns it with its file. An option beats the file, the file beats the default.
    pub(crate) fn read(&self) -> Result<(Config, Option<PathBuf>), Error> {
        let file = self.file()?;
        let mut config = file.as_ref().map_or_else(|| Ok(Config::default()), Config::load)?;
        for (long, key, text) in &self.settings {
            config.set(key, text).map_err(|error| Error::Config(format!("--{long}: {error}")))?;
        }
        Ok((config, file))
    }

    /// Puts the option in place of the key at the beginning of an error, if the setting comes from the command line.
    pub(crate) fn name_option(&self, error: Error) -> Error {
        let Error::Config(text) = &error else { return error };
        let named = self.settings.iter().find_map(|(long, key, _)| {
            text.strip_prefix(key).map(|rest| Error::Config(format!("--{long}{rest}")))
        });
        named.unwrap_or(error)
    }
}

/// Returns the first of the files that exists. An inaccessible file is an error, as it could be the configuration in use.
fn find_config<'a>(files: impl IntoIterator<Item = &'a Path>) -> Result<Option<PathBuf>, Error> {
    for file in files {
        match file.try_exists() {
            Ok(false) => {}
            Ok(true) => return Ok(Some(file.to_owned())),
            Err(error) => {
                let name = file.display();
                let text = format!(
                    "{name}: cannot look for the configuration: {error}; let this user read it or name another with --config"
                );
                return Err(Error::Config(text));
            }
        }
    }
    Ok(None)
}

fn command(words: &[String]) -> Result<Command, String> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] => Ok(Command::Run),
        ["help"] => Ok(Command::Help(None)),
        ["help", name] => match help_names().find(|known| known == name) {
            Some(known) => Ok(Command::Help(Some(known))),
            None => Err(unknown_topic(name)),
        },
        ["man"] => Ok(Command::Man),
        ["demo"] => Ok(Command::Demo),
        ["completion", "bash"] => Ok(Command::Completion(Shell::Bash)),
        ["completion", "zsh"] => Ok(Command::Completion(Shell::Zsh)),
        ["completion", "fish"] => Ok(Command::Completion(Shell::Fish)),
        ["completion"] => Err(format!("completion: name a shell: {}", SHELLS.join(", "))),
        ["completion", shell] => {
            Err(format!("completion: unknown shell {shell:?}; there are {}", SHELLS.join(", ")))
        }
        ["unit", rest @ ..] => unit(rest),
        ["true" | "false", ..] => {
            Err("a switch takes its value behind an equals sign: --proxy-reject-clients=true"
                .to_owned())
        }
        ["completion" | "help", _, extra, ..] | ["man" | "demo", extra, ..] => {
            Err(unexpected(extra))
        }
        [name, rest @ ..] => match (find_word(name).and_then(|word| word.client), rest) {
            (Some(Client::Fleet), words) => fleet(words),
            (Some(client), []) => Ok(Command::Client(client)),
            (Some(Client::Resume), [_name]) => Ok(Command::Client(Client::Resume)),
            (Some(Client::Kill), _ids) => Ok(Command::Client(Client::Kill)),
            (Some(Client::Switch), [_address]) => Ok(Command::Client(Client::Switch)),
            (Some(Client::Switch | Client::Resume), [_, extra, ..]) | (Some(_), [extra, ..]) => {
                Err(unexpected(extra))
            }
            (None, _) => Err(unknown_command(name)),
        },
    }
}

/// Returns the command that prints a unit: the one named, or the first.
fn unit(words: &[&str]) -> Result<Command, String> {
    let name = match words {
        [] => None,
        [name] => Some(*name),
        [_, extra, ..] => return Err(unexpected(extra)),
    };
    let found = UNITS.iter().find(|(unit, _)| name.is_none_or(|name| name == *unit));
    found.map(|&(_, text)| Command::Unit(text)).ok_or_else(|| {
        let unknown = name.unwrap_or_default();
        format!("unit: unknown unit {unknown:?}; there are {}", unit_names(", "))
    })
}

/// Checks the words behind `fleet`, of which there are some.
fn fleet(words: &[&str]) -> Result<Command, String> {
    match words {
        ["forget", _host] => Ok(Command::Client(Client::Fleet)),
        ["forget"] => Err(
            "fleet forget: name a host, as tcpause status --fleet shows it: tcpause fleet forget web-17"
                .to_owned(),
        ),
        ["forget", _, extra, ..] => Err(unexpected(extra)),
        [unknown, ..] => {
            Err(format!("fleet: {unknown:?} is not known; write fleet forget HOST, or status --fleet"))
        }
        [] => Err("fleet: name what to do: tcpause fleet forget HOST; tcpause status --fleet lists the hosts".to_owned()),
    }
}

fn unexpected(extra: &str) -> String {
    format!("unexpected argument {extra:?}; remove it")
}

fn find_word(name: &str) -> Option<&'static Word> {
    COMMANDS.iter().find(|word| word.name == name)
}

fn unknown_command(unknown: &str) -> String {
    let names = COMMANDS.each_ref().map(|command| command.name);
    let remedy = match nearest(unknown, names) {
        Some(name) => format!("did you mean {name}?"),
        None => format!("the commands are {}", names.join(", ")),
    };
    format!("unknown command {unknown:?}; {remedy}")
}

/// Reads the value of an option. A switch is `true`, unless a value is attached to it.
fn value(opt: &Opt, parser: &mut Parser) -> Result<OsString, String> {
    let value = match opt.value {
        Some(_) => parser.value().unwrap_or_default(),
        None => parser.optional_value().unwrap_or_else(|| "true".into()),
    };
    let long = opt.long;
    let example =
        opt.value.map_or_else(|| format!("--{long}=true"), |value| format!("--{long} {value}"));
    if value.is_empty() {
        return Err(format!("--{long} needs a value: {example}"));
    }
    // If the value is forgotten, the next option would be taken for it.
    if value.as_encoded_bytes().starts_with(b"--") {
        return Err(format!("--{long} needs a value, but {} follows: {example}", quoted(&value)));
    }
    Ok(value)
}

/// Returns the options of a command. A command that asks no proxy accepts the proxy's options and ignores them.
fn options(word: Option<&Word>) -> Vec<&'static Opt> {
    match word {
        Some(Word { client: Some(_), options, .. }) => options.to_vec(),
        _ => OPTIONS.iter().collect(),
    }
}

/// Finds an option before its command is known. This is enough to read its value, as options of the same name agree on
/// taking one.
fn known(word: Option<&Word>, is_it: impl Fn(&Opt) -> bool) -> Option<&'static Opt> {
    let others = COMMANDS.iter().flat_map(|command| command.options).copied();
    options(word).into_iter().chain(OPTIONS.iter()).chain(others).find(|opt| is_it(opt))
}

fn own(long: &str, word: Option<&Word>) -> Result<&'static Opt, String> {
    let opt = options(word).into_iter().find(|opt| opt.long == long);
    opt.ok_or_else(|| unknown("--", long, word))
}

fn unknown(dashes: &str, name: &str, word: Option<&Word>) -> String {
    let name_of = |word: &Word| format!("tcpause {}", word.name);
    let program = word.map_or_else(|| "tcpause".to_owned(), name_of);
    let has_it = |word: &&Word| word.options.iter().any(|opt| opt.long == name);
    let owners: Vec<String> = COMMANDS.iter().filter(has_it).map(name_of).collect();
    let remedy = match nearest(name, options(word).into_iter().map(|opt| opt.long)) {
        Some(known) => format!("did you mean --{known}?"),
        None if dashes == "--" && !owners.is_empty() => {
            format!("it belongs to {}", owners.join(", "))
        }
        None => format!("{program} --help lists all"),
    };
    format!("unknown option {dashes}{}; {remedy}", name.escape_debug())
}

/// Refuses `-config x`, as Go's flags allow it: it would otherwise be taken for `-c onfig`.
fn refuse_single_dash(parser: &mut Parser, word: Option<&Word>) -> Result<(), String> {
    let Some(arguments) = parser.try_raw_args() else { return Ok(()) };
    let Some(argument) = arguments.peek().and_then(|argument| argument.to_str()) else {
        return Ok(());
    };
    let Some(name) = argument.strip_prefix('-').filter(|name| !name.starts_with('-')) else {
        return Ok(());
    };
    let name = name.split('=').next().unwrap_or(name);
    if known(word, |opt| opt.long == name).is_some() {
        return Err(format!("unknown option -{name}; write it with two dashes: --{name}"));
    }
    let is_letter = |letter| known(word, |opt| opt.short == Some(letter)).is_some();
    if name.chars().nth(1).is_some() && !name.chars().next().is_some_and(is_letter) {
        return Err(unknown("-", name, word));
    }
    Ok(())
}

fn quoted(text: &OsString) -> String {
    format!("{:?}", text.to_string_lossy())
}

#[cfg(test)]
mod tests;

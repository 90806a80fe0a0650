//! The command line: what the operator asked for, and the configuration that follows from it.

mod completion;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod options;
mod pages;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use lexopt::{Arg, Parser};
use tcpause::{Config, Error, Server};

use self::options::{Action, COMMANDS, OPTIONS, Opt, SHELLS};
pub(crate) use self::{
    completion::{bash, fish, zsh},
    pages::{help, man},
};
use crate::nearest::nearest;

/// Where a configuration is looked for when the command line names none.
const CONFIG_FILES: [&str; 2] = ["tcpause.yml", "/etc/tcpause/tcpause.yml"];

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Invocation {
    /// What to do.
    pub(crate) command: Command,
    /// The file that `--config` names.
    config_file: Option<PathBuf>,
    /// The settings in their order, each with the option and the key it sets; the last one wins.
    settings: Vec<(&'static str, &'static str, String)>,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    /// Carry connections until a signal.
    Run,
    /// Read and check the configuration, and show what would run.
    CheckConfig,
    Help,
    Version,
    Man,
    Completion(Shell),
    Demo,
}

/// A shell that there are completions for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Reads the arguments, without the name of the program. The error is one line with the remedy.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Invocation, String> {
    let mut parser = Parser::from_args(arguments);
    let mut invocation =
        Invocation { command: Command::Run, config_file: None, settings: Vec::new() };
    let mut check = false;
    let mut words = Vec::new();
    loop {
        refuse_single_dash(&mut parser)?;
        let opt = match parser.next().map_err(|error| error.to_string())? {
            None => break,
            Some(Arg::Value(word)) => {
                words.push(word.to_string_lossy().into_owned());
                continue;
            }
            Some(Arg::Long(name)) => by_name(name)?,
            Some(Arg::Short(letter)) => by_letter(letter)?,
        };
        match opt.action {
            Action::Help => return Ok(Invocation { command: Command::Help, ..invocation }),
            Action::Version => return Ok(Invocation { command: Command::Version, ..invocation }),
            Action::CheckConfig => check = true,
            Action::ConfigFile => invocation.config_file = Some(value(opt, &mut parser)?.into()),
            Action::Set(key) => {
                let text = value(opt, &mut parser)?.into_string();
                let text =
                    text.map_err(|text| format!("--{}: {} is not UTF-8", opt.long, quoted(&text)))?;
                invocation.settings.push((opt.long, key, text));
            }
        }
    }
    invocation.command = match command(&words)? {
        Command::Run if check => Command::CheckConfig,
        command => command,
    };
    Ok(invocation)
}

impl Invocation {
    /// The configuration and the file it came from, checked as far as that goes without opening a socket.
    pub(crate) fn configure(&self) -> Result<(Config, Option<PathBuf>), Error> {
        let (config, file) = self.read()?;
        Server::check(&config).map_err(|error| self.name_option(error))?;
        Ok((config, file))
    }

    /// An option beats the file, the file beats the default.
    fn read(&self) -> Result<(Config, Option<PathBuf>), Error> {
        let file = match &self.config_file {
            Some(file) => Some(file.clone()),
            None => find_config(CONFIG_FILES.map(Path::new))?,
        };
        let mut config = file.as_ref().map_or_else(|| Ok(Config::default()), Config::load)?;
        for (long, key, text) in &self.settings {
            config.set(key, text).map_err(|error| Error::Config(format!("--{long}: {error}")))?;
        }
        Ok((config, file))
    }

    /// An error that begins with a key begins with the option instead, if that is where the setting is from.
    fn name_option(&self, error: Error) -> Error {
        let Error::Config(text) = &error else { return error };
        let named = self.settings.iter().find_map(|(long, key, _)| {
            text.strip_prefix(key).map(|rest| Error::Config(format!("--{long}{rest}")))
        });
        named.unwrap_or(error)
    }
}

/// The first of the files that exists. One that cannot be seen is an error: it could be the one that was meant.
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
        ["help"] => Ok(Command::Help),
        ["man"] => Ok(Command::Man),
        ["demo"] => Ok(Command::Demo),
        ["completion", "bash"] => Ok(Command::Completion(Shell::Bash)),
        ["completion", "zsh"] => Ok(Command::Completion(Shell::Zsh)),
        ["completion", "fish"] => Ok(Command::Completion(Shell::Fish)),
        ["completion"] => Err(format!("completion: name a shell: {}", SHELLS.join(", "))),
        ["completion", shell] => {
            Err(format!("completion: unknown shell {shell:?}; there are {}", SHELLS.join(", ")))
        }
        ["true" | "false", ..] => {
            Err("a switch takes its value behind an equals sign: --proxy-reject-clients=true"
                .to_owned())
        }
        ["completion", _, extra, ..] | ["help" | "man" | "demo", extra, ..] => {
            Err(format!("unexpected argument {extra:?}; remove it"))
        }
        [unknown, ..] => {
            let names = COMMANDS.each_ref().map(|command| command.name);
            let remedy = match nearest(unknown, names) {
                Some(name) => format!("did you mean {name}?"),
                None => format!("the commands are {}", names.join(", ")),
            };
            Err(format!("unknown command {unknown:?}; {remedy}"))
        }
    }
}

/// The value of an option. A switch that sets something is `true`, unless a value is attached to it.
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
    // A forgotten value makes the next option look like one.
    if value.as_encoded_bytes().starts_with(b"--") {
        return Err(format!("--{long} needs a value, but {} follows: {example}", quoted(&value)));
    }
    Ok(value)
}

fn by_name(name: &str) -> Result<&'static Opt, String> {
    OPTIONS.iter().find(|opt| opt.long == name).ok_or_else(|| unknown("--", name))
}

fn by_letter(letter: char) -> Result<&'static Opt, String> {
    OPTIONS
        .iter()
        .find(|opt| opt.short == Some(letter))
        .ok_or_else(|| unknown("-", &letter.to_string()))
}

fn unknown(dashes: &str, name: &str) -> String {
    let remedy = match nearest(name, OPTIONS.iter().map(|opt| opt.long)) {
        Some(known) => format!("did you mean --{known}?"),
        None => "tcpause --help lists all".to_owned(),
    };
    format!("unknown option {dashes}{}; {remedy}", name.escape_debug())
}

/// Refuses `-config x`, as Go's flags allow it: it would otherwise be taken for `-c onfig`.
fn refuse_single_dash(parser: &mut Parser) -> Result<(), String> {
    let Some(arguments) = parser.try_raw_args() else { return Ok(()) };
    let Some(argument) = arguments.peek().and_then(|argument| argument.to_str()) else {
        return Ok(());
    };
    let Some(name) = argument.strip_prefix('-').filter(|name| !name.starts_with('-')) else {
        return Ok(());
    };
    let name = name.split('=').next().unwrap_or(name);
    if OPTIONS.iter().any(|opt| opt.long == name) {
        return Err(format!("unknown option -{name}; write it with two dashes: --{name}"));
    }
    let is_letter = |letter| OPTIONS.iter().any(|opt| opt.short == Some(letter));
    if name.chars().nth(1).is_some() && !name.chars().next().is_some_and(is_letter) {
        return Err(unknown("-", name));
    }
    Ok(())
}

fn quoted(text: &OsString) -> String {
    format!("{:?}", text.to_string_lossy())
}

#[cfg(test)]
mod tests;

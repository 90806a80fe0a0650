//! The commands that ask a running proxy, over its control API.

mod connections;
mod exec;
mod fleet;
mod http;
mod naming;
mod news;
mod program;
mod screen;
mod status;
mod switch;
mod table;
mod upgrade;

use std::{fs, path::Path, process::ExitCode, time::Duration};

use serde_json::Value;
use tcpause::{Address, Config, Error, parse_duration};

pub(crate) use self::{
    exec::heeded,
    http::{Answer, Api},
    program::look_up,
};
use crate::{
    cli::{Client, Invocation},
    logger::OneLine,
    print,
};

/// Runs the command that the command line names.
pub(crate) fn run(client: Client, invocation: &Invocation) -> Result<ExitCode, Failure> {
    let api = Api::new(address(invocation)?);
    match client {
        Client::Pause => pause(&api, invocation),
        Client::Resume if invocation.is_of_fleet() => fleet::resume(&api, invocation),
        Client::Resume => resume(&api, invocation),
        Client::Status if invocation.is_of_fleet() => fleet::show(&api, invocation),
        Client::Status => status::show(&api, invocation),
        Client::Fleet => fleet::forget(&api, invocation),
        Client::Wait => wait(&api, invocation),
        Client::Exec => exec::run(api, invocation),
        Client::Upgrade => upgrade::run(&api, invocation),
        Client::Connections => connections::list(&api, invocation),
        Client::Kill => connections::kill(&api, invocation),
        Client::Switch => switch::run(&api, invocation),
    }
}

/// Exit codes, as in sysexits.h where it has one: 69 for an unavailable service, 75 for a failure that a retry may cure.
const EXIT_OTHER: u8 = 1;
const EXIT_USAGE: u8 = 2;
/// Exit code of a switch that is done and has left connections, like that of the proxy whose grace period was over.
const EXIT_LEFT: u8 = 3;
const EXIT_UNREACHABLE: u8 = 69;
const EXIT_NOT_NOW: u8 = 75;

/// The remedy for a pause that is not idle in time.
const NOT_IDLE_REMEDY: &str = "see --wait, --drain and --on-timeout kill";
/// The same for one of the fleet.
const HOSTS_LEFT_REMEDY: &str = "see --wait, --on-timeout kill, --without and fleet forget";

/// Time beyond all others that a fleet has for an answer, as etcd is asked for it.
const FLEET_TIMEOUT: Duration = Duration::from_secs(10);

/// Failure of a command, as one line with the remedy.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line is wrong, or the proxy refuses the request.
    Usage(String),
    /// The control API cannot be reached.
    Unreachable(String),
    /// The proxy was not idle in time, or its state forbids the request.
    NotNow(String),
    /// The switch is done, and connections to other servers are left.
    Left(String),
    /// A program cannot be run; the exit code is that of shells.
    Program(u8, String),
    /// Any other failure.
    Other(String),
}

impl Failure {
    /// Returns the exit code and the line.
    pub(crate) fn told(&self) -> (u8, &str) {
        match self {
            Self::Other(text) => (EXIT_OTHER, text),
            Self::Usage(text) => (EXIT_USAGE, text),
            Self::Unreachable(text) => (EXIT_UNREACHABLE, text),
            Self::NotNow(text) => (EXIT_NOT_NOW, text),
            Self::Left(text) => (EXIT_LEFT, text),
            Self::Program(code, text) => (*code, text),
        }
    }

    /// Returns the failure for an answer with an unexpected status. The API's own sentence tells the remedy.
    fn refused(api: &Api, answer: &Answer) -> Self {
        let body = answer.json();
        let Some(sentence) = body.get("error").and_then(Value::as_str) else {
            return api.stranger(&format!("answered {}", answer.status));
        };
        // After a wait in vain, the answer counts the connections that were left.
        let sentence = not_idle(&body).unwrap_or_else(|| for_operators(sentence));
        // Refusals of a fleet have a kind.
        match body.get("kind").and_then(Value::as_str) {
            Some("unreachable") => return Self::Unreachable(sentence),
            Some("denied") => return Self::Other(sentence),
            Some("unknown") => return Self::NotNow(sentence),
            _ => {}
        }
        match answer.status {
            409 | 502..=504 => Self::NotNow(sentence),
            400..=499 => Self::Usage(sentence),
            _ => Self::Other(sentence),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Config(text) => Self::Usage(text),
            Error::System(text) => Self::Other(text),
        }
    }
}

/// Returns the line about a wait for idle that was in vain; `None` if the answer is of another kind.
fn not_idle(body: &Value) -> Option<String> {
    if let Some(left) = fleet::hosts_left(body) {
        let is_kept = body.get("paused") == Some(&Value::Bool(true));
        let fate = if is_kept { "they stay paused" } else { "the pause is undone" };
        return Some(format!("not idle in time, {left}; {fate}; {HOSTS_LEFT_REMEDY}"));
    }
    let active = body.get("active")?;
    let steered = body.get("steered").and_then(Value::as_u64).unwrap_or_default();
    let oldest = body.get("oldest_seconds").and_then(Value::as_f64);
    let listed: Vec<&str> = body
        .get("oldest")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let left = match (listed.as_slice(), oldest) {
        ([], None) => String::new(),
        ([], Some(oldest)) => format!(", the oldest for {}", table::age(oldest)),
        (listed, _) => {
            let more = active.as_u64() > Some(listed.len() as u64 + steered);
            let oldest = if more { "the oldest: " } else { "" };
            format!(" ({oldest}{})", listed.join("; "))
        }
    };
    let rest = match body.get("paused") {
        Some(Value::Bool(true)) => format!("; it stays paused; {NOT_IDLE_REMEDY}"),
        Some(_) => format!("; the pause is undone; {NOT_IDLE_REMEDY}"),
        // It was a wait without a pause.
        None => String::new(),
    };
    let steered = match steered {
        0 => String::new(),
        steered => format!(", steered: {steered}"),
    };
    Some(format!("not idle in time, connections left: {active}{steered}{left}{rest}"))
}

/// Turns the API's sentences into the text of a command's error: its parameters are options there, no clause begins with a
/// capital, and none ends with a full stop.
fn for_operators(sentences: &str) -> String {
    let sentences = sentences.trim_end_matches('.');
    let named = sentences.strip_prefix("The parameter \"").and_then(|rest| rest.split_once("\": "));
    if let Some((name, text)) = named {
        return format!("--{name}: {text}");
    }
    let clauses: Vec<String> = sentences.split(". ").map(uncapitalised).collect();
    clauses.join("; ")
}

/// Makes the first letter a small one, unless the first word is written in capitals.
fn uncapitalised(text: &str) -> String {
    let mut letters = text.chars();
    match (letters.next(), text.chars().nth(1)) {
        (Some(first), Some(second)) if !second.is_uppercase() => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => text.to_owned(),
    }
}

/// Returns the address of the API: the option, else the file, else the default. The rest of the file is not checked, as the
/// proxy may be of another version, and its files may belong to another user.
fn address(invocation: &Invocation) -> Result<Address, Failure> {
    let (from, text) = if let Some(text) = invocation.setting("control.addr") {
        ("--control-addr".to_owned(), Some(text.to_owned()))
    } else if let Some(file) = invocation.file()? {
        (format!("{}: control.addr", file.display()), address_in(&file).map_err(Failure::Usage)?)
    } else {
        ("control.addr".to_owned(), None)
    };
    let address = match text {
        Some(text) => text.parse().map_err(|error| Failure::Usage(format!("{from}: {error}")))?,
        None => Config::default().control.addr,
    };
    match address {
        Address::Tcp { port: 0, .. } => Err(Failure::Usage(format!(
            "{from}: {address} has port 0; write the port that the proxy has logged: --control-addr ADDRESS"
        ))),
        _ => Ok(address),
    }
}

fn address_in(file: &Path) -> Result<Option<String>, String> {
    let name = file.display();
    let text = fs::read_to_string(file).map_err(|error| {
        format!("{name}: cannot read the configuration: {error}; name the API with --control-addr")
    })?;
    // A byte order mark alone is an empty file, as it is for the proxy.
    let text = text.trim_start_matches('\u{feff}');
    let root: serde_yaml::Value = serde_yaml::from_str(text).map_err(|error| {
        format!("{name}: {error}; correct it, or name the API with --control-addr")
    })?;
    match root.get("control").and_then(|control| control.get("addr")) {
        None | Some(serde_yaml::Value::Null) => Ok(None),
        Some(serde_yaml::Value::String(text)) => Ok(Some(text.clone())),
        Some(serde_yaml::Value::Number(number)) => Ok(Some(number.to_string())),
        Some(_) => {
            Err(format!("{name}: control.addr is not an address; write one as in `localhost:3001`"))
        }
    }
}

/// Returns the parameters of a request that the command line gives.
fn parameters<'a>(
    invocation: &'a Invocation,
    names: &[&'static str],
) -> Vec<(&'static str, &'a str)> {
    names.iter().filter_map(|&name| Some((name, invocation.asked(name)?))).collect()
}

/// Returns a duration of the command line, which has been checked there.
fn duration(invocation: &Invocation, name: &str) -> Option<Duration> {
    invocation.asked(name).and_then(|text| parse_duration(text).ok())
}

fn pause(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    const PARAMETERS: [&str; 9] =
        ["name", "reason", "ttl", "mode", "wait", "on-timeout", "drain", "half-closed", "without"];

    if invocation.asked("on-timeout").is_some() && invocation.asked("wait").is_none() {
        let text = "--on-timeout: it says how --wait ends: add one such as --wait 30s";
        return Err(Failure::Usage(text.to_owned()));
    }
    let wait = duration(invocation, "wait").unwrap_or_default();
    let (path, more) = pause_path(invocation)?;
    let target = http::target(path, &parameters(invocation, &PARAMETERS));
    let answer = api.ask("PUT", &target, Some(wait.saturating_add(more)))?;
    if answer.status != 201 {
        return Err(Failure::refused(api, &answer));
    }
    if invocation.asked("wait").is_some() {
        answer.check_idle()?;
    }
    let name = invocation.asked("name").unwrap_or("default");
    if invocation.is_of_fleet() {
        let ttl = invocation.asked("ttl").unwrap_or("10m at most");
        return Ok(print(&format!(
            "paused: {name} on all hosts, for {ttl}{}\n",
            Idle::of(&answer)
        ))?);
    }
    // Without --ttl, the proxy may have set pause.max-ttl as the end.
    let ttl = invocation.asked("ttl").map(str::to_owned).or_else(|| status::time_left(api, name));
    let lasts = ttl.map_or_else(|| "until a resume".to_owned(), |ttl| format!("for {ttl}"));
    Ok(print(&format!("paused: {name}, {lasts}{}\n", Idle::of(&answer)))?)
}

/// Returns the path of a pause, and the time beyond its wait that an answer may take.
fn pause_path(invocation: &Invocation) -> Result<(&'static str, Duration), Failure> {
    match (invocation.is_of_fleet(), invocation.asked("without")) {
        (true, _) => Ok(("/fleet/paused", FLEET_TIMEOUT)),
        (false, None) => Ok(("/paused", Duration::ZERO)),
        (false, Some(_)) => {
            let text = "--without: it leaves out hosts of a fleet: add --fleet";
            Err(Failure::Usage(text.to_owned()))
        }
    }
}

/// Result of a pause with a wait, as the end of a line.
struct Idle {
    waited_seconds: Option<f64>,
    reset: u64,
}

impl Idle {
    fn of(answer: &Answer) -> Self {
        let body = answer.json();
        let number = |name: &str| body.get(name).cloned().unwrap_or_default();
        let is_idle = number("idle") == Value::Bool(true);
        Self {
            waited_seconds: number("waited_seconds").as_f64().filter(|_| is_idle),
            reset: number("reset").as_u64().unwrap_or_default(),
        }
    }
}

impl std::fmt::Display for Idle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(seconds) = self.waited_seconds {
            write!(f, ", idle after {seconds:.1}s")?;
        }
        if self.reset > 0 {
            write!(f, ", connections reset: {}", self.reset)?;
        }
        Ok(())
    }
}

fn resume(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    let name = invocation.asked("name");
    // The API refuses a name together with a release.
    if let Some(name) = name.filter(|_| invocation.asked("release").is_none()) {
        let pauses = status::pauses(api)?;
        if !pauses.iter().any(|pause| pause == name) {
            let what = match pauses.as_slice() {
                [] => "it is not paused".to_owned(),
                _ => format!("these hold: {}", pauses.join(", ")),
            };
            return Err(Failure::NotNow(format!("there is no pause {name:?}; {what}")));
        }
    }
    let mut parameters = parameters(invocation, &["name", "release"]);
    parameters.extend(invocation.asked("force").map(|_switch| ("force", "yes")));
    let answer = api.ask("DELETE", &http::target("/paused", &parameters), None)?;
    let line = match (answer.status, answer.json().get("released"), name) {
        (200, Some(released), _) => format!("released: {released}\n"),
        (204, _, Some(name)) => format!("lifted: {name}{}\n", StillPaused::now(api)),
        (204, _, None) => "resumed\n".to_owned(),
        _ => return Err(Failure::refused(api, &answer)),
    };
    Ok(print(&line)?)
}

/// Pauses that still hold, as the end of a line. It is empty if they cannot be learned, which does not fail the command.
struct StillPaused(Vec<String>);

impl StillPaused {
    fn now(api: &Api) -> Self {
        Self(status::pauses(api).unwrap_or_default())
    }

    /// Leaves out a pause that ends at this moment.
    fn without(mut self, name: &str) -> Self {
        self.0.retain(|pause| pause != name);
        self
    }
}

impl std::fmt::Display for StillPaused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.as_slice() {
            [] => Ok(()),
            names => write!(f, "; still paused by {}", OneLine(names.join(", "))),
        }
    }
}

fn wait(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    let target = http::target("/paused/block-until-idle", &parameters(invocation, &["timeout"]));
    // Without a timeout the command waits for ever, as requested.
    let wait = duration(invocation, "timeout").unwrap_or(Duration::MAX);
    let answer = api.ask("GET", &target, Some(wait))?;
    if answer.status != 204 {
        return Err(Failure::refused(api, &answer));
    }
    Ok(print("idle\n")?)
}

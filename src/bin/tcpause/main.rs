//! The program: options, configuration, logger, server, signals, exit code.

mod cli;
mod client;
mod demo;
mod logger;
mod systemd;

use std::{
    env,
    fmt::Display,
    io::{self, ErrorKind, IsTerminal, Write},
    path::{self, Path},
    process::{self, ExitCode},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGXFSZ},
    flag,
    iterator::Signals,
    low_level::signal_name,
};
use tcpause::{Config, Error, Outcome, Server, Stopper, format_duration};

use crate::{
    cli::{Command, Invocation, Shell},
    logger::{Logger, OneLine, journal},
    systemd::Manager,
};

/// Exit code if every connection had ended by itself.
const EXIT_DRAINED: u8 = 0;
/// Exit code if the system refused something, or if a second signal forced the end.
const EXIT_FAILURE: u8 = 1;
/// Exit code for a wrong command line or configuration.
const EXIT_USAGE: u8 = 2;
/// Exit code if the grace period was over and the remaining connections were closed.
const EXIT_DEADLINE_HIT: u8 = 3;

/// The signals that stop the proxy.
const STOP_SIGNALS: [i32; 3] = [SIGTERM, SIGINT, SIGQUIT];
/// Signals without effect, each with the reason. They are handled because by default each would end the program.
const IDLE_SIGNALS: [(i32, &str); 3] = [
    (SIGHUP, "the configuration is read at start only"),
    (SIGUSR1, "the log goes to standard error, and there is no file to reopen"),
    (SIGUSR2, "it has no meaning"),
];
/// Age of a stop from which a further stop signal forces the end. A signal right after the first does not count, as
/// supervisors often signal both a process and its group.
const FORCE_AFTER: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    // With a handler, writing to a file at RLIMIT_FSIZE fails like any other write, and does not end the process.
    if let Err(error) = flag::register(SIGXFSZ, Arc::default()) {
        return fail(EXIT_FAILURE, format_args!("cannot handle SIGXFSZ: {error}"));
    }
    let invocation = match cli::parse(env::args_os().skip(1)) {
        Ok(invocation) => invocation,
        Err(error) => return fail(EXIT_USAGE, error),
    };
    let result = match invocation.command {
        Command::Run => run(&invocation),
        Command::CheckConfig => check_config(&invocation),
        Command::Demo => return demo::run(),
        Command::Client(client) => {
            return client::run(client, &invocation).unwrap_or_else(|failure| {
                let (code, text) = failure.told();
                fail(code, text)
            });
        }
        Command::Help(name) => print(&cli::help(name, io::stdout().is_terminal())),
        Command::Version => print(concat!("tcpause ", env!("CARGO_PKG_VERSION"), "\n")),
        Command::Man => print(&cli::man()),
        Command::Unit(text) => print(text),
        Command::Completion(Shell::Bash) => print(&cli::bash()),
        Command::Completion(Shell::Zsh) => print(&cli::zsh()),
        Command::Completion(Shell::Fish) => print(&cli::fish()),
    };
    match result {
        Ok(code) => code,
        Err(Error::Config(text)) => fail(EXIT_USAGE, text),
        Err(Error::System(text)) => fail(EXIT_FAILURE, text),
    }
}

/// Runs the proxy until a signal ends it.
fn run(invocation: &Invocation) -> Result<ExitCode, Error> {
    let sockets = systemd::sockets()?;
    let (mut config, file) = invocation.read()?;
    sockets.set_addresses(&mut config);
    invocation.check(&config)?;
    // Absolute, as the status is read elsewhere.
    config.file = file.as_deref().and_then(|file| path::absolute(file).ok());
    // Signals are handled before anything opens that has to be closed in order. Until here a signal just ends the program.
    let signals =
        Signals::new(STOP_SIGNALS.into_iter().chain(IDLE_SIGNALS.map(|(signal, _)| signal)))
            .map_err(|error| Error::System(format!("cannot listen to signals: {error}")))?;
    // The logger is declared first, so that it is dropped last, when all has been logged.
    let _logger = Logger::start(config.log_level, config.log.format)?;
    let manager = Manager::find();
    let server = Server::start_on(sockets, config.clone())?;
    // This comes after the start, so that a failing start shows its one line and nothing else.
    announce(&config, file.as_deref());
    manager.ready(&server)?;
    let (stopper, grace_period) = (server.stopper(), config.grace_period);
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || obey(signals, &stopper, || manager.stopping(grace_period)))
        .map_err(|error| Error::no_thread("listens to signals", &error))?;
    let code = match server.join() {
        Outcome::Drained => {
            log::info!("stopped: every connection had ended, exit code {EXIT_DRAINED}");
            EXIT_DRAINED
        }
        Outcome::DeadlineHit => {
            let grace_period = format_duration(config.grace_period);
            log::warn!(
                "stopped: the grace period of {grace_period} was over and connections were closed, exit code {EXIT_DEADLINE_HIT}"
            );
            EXIT_DEADLINE_HIT
        }
        Outcome::Aborted => {
            log::warn!(
                "stopped: a second signal forced it and connections were closed, exit code {EXIT_FAILURE}"
            );
            EXIT_FAILURE
        }
    };
    Ok(code.into())
}

/// Checks the configuration and prints it with the options applied.
fn check_config(invocation: &Invocation) -> Result<ExitCode, Error> {
    let (config, file) = invocation.configure()?;
    print(&format!("# {}\n{config}", OneLine(origin(file.as_deref()))))
}

/// Logs the version and the configuration file, and the settings without effect.
fn announce(config: &Config, file: Option<&Path>) {
    let (version, pid) = (env!("CARGO_PKG_VERSION"), process::id());
    log::info!("tcpause {version} started, pid {pid}, {}", origin(file));
    let default = Config::default();
    let mut idle = vec!["proxy.block-poll-interval", "proxy.close-poll-interval"];
    idle.retain(|key| config.get(key) != default.get(key));
    if !idle.is_empty() {
        log::info!("without effect, as nothing polls here: {}", idle.join(", "));
    }
}

fn origin(file: Option<&Path>) -> String {
    file.map_or_else(
        || "no configuration file".to_owned(),
        |file| format!("configuration file {}", file.display()),
    )
}

/// Stops gracefully at the first stop signal, and by force at a later one.
fn obey(mut signals: Signals, stopper: &Stopper, at_stop: impl Fn()) {
    let mut stopping_since: Option<Instant> = None;
    for signal in signals.forever() {
        let name = signal_name(signal).unwrap_or("a signal");
        if let Some((_, reason)) = IDLE_SIGNALS.iter().find(|(idle, _)| *idle == signal) {
            log::info!("{name} is ignored: {reason}");
            continue;
        }
        match stopping_since.map(|since| since.elapsed()) {
            None => {
                log::info!(
                    "{name}: stopping once connections have ended; another stop signal after a second or more closes them at once"
                );
                stopping_since = Some(Instant::now());
                at_stop();
                stopper.stop();
            }
            Some(age) if age < FORCE_AFTER => {
                log::info!("{name} is ignored: it came less than a second after the first");
            }
            Some(_) => {
                log::warn!("{name}: closing all connections now");
                stopper.abort();
            }
        }
    }
}

/// Writes to standard output. A reader that leaves early is no failure.
fn print(text: &str) -> Result<ExitCode, Error> {
    let mut output = io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::System(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Prints the failure in one line on standard error, if that is still open. In the journal it is an error.
fn fail(code: u8, text: impl Display) -> ExitCode {
    let level = if journal::is_stderr() { "<3>" } else { "" };
    drop(writeln!(io::stderr(), "{level}tcpause: {}", OneLine(text)));
    code.into()
}

fn tell(text: impl Display) {
    drop(writeln!(io::stderr(), "tcpause: {}", OneLine(text)));
}

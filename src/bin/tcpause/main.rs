//! The program: options, configuration, logger, server, signals, exit code.

mod cli;
mod client;
mod demo;
mod logger;
mod signals;
mod systemd;
mod upgrade;

use std::{
    env::{self, ArgsOs},
    fmt::Display,
    io::{self, ErrorKind, IsTerminal, Write},
    iter::{Peekable, Skip},
    mem,
    os::fd::OwnedFd,
    panic,
    path::{self, Path, PathBuf},
    process::{self, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::process::{Pid, getppid};
use signal_hook::{
    consts::{SIGUSR2, SIGXFSZ},
    flag,
};
use tcpause::{Config, Error, Outcome, Predecessor, Server, Sockets, format_duration};

use crate::{
    cli::{Command, Invocation, Shell},
    logger::{Logger, OneLine, journal},
    signals::{From, Obedience, Running, Signals, SignalsEnd},
    systemd::Manager,
    upgrade::{
        GUARD, Inheritance, Program, TAKE_BACK, TAKE_OVER, UpgradeThread, Upgrades, become_guard,
        guard, process_of,
    },
};

/// Exit code if every connection had ended by itself, or if another process has taken over.
const EXIT_DRAINED: u8 = 0;
/// Exit code if the system refused something, or if a second signal forced the end.
const EXIT_FAILURE: u8 = 1;
/// Exit code for a wrong command line or configuration.
const EXIT_USAGE: u8 = 2;
/// Exit code if the grace period was over and the remaining connections were closed.
const EXIT_DEADLINE_HIT: u8 = 3;
/// Exit code of a process that cannot take over, and has told the giver why.
const EXIT_REFUSED: u8 = 4;

fn main() -> ExitCode {
    // With a handler, writing to a file at RLIMIT_FSIZE fails like any other write, and does not end the process.
    if let Err(error) = flag::register(SIGXFSZ, Arc::default()) {
        return fail(EXIT_FAILURE, format_args!("cannot handle SIGXFSZ: {error}"));
    }
    let mut arguments = env::args_os().skip(1).peekable();
    for (word, begin) in [
        (TAKE_OVER, take_over as fn(_) -> _),
        (TAKE_BACK, take_back as fn(_) -> _),
        (GUARD, stand_guard as fn(_) -> _),
    ] {
        if arguments.next_if(|argument| argument == word).is_some() {
            return begin(arguments);
        }
    }
    let invocation = match cli::parse(arguments) {
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

/// Runs the proxy until a signal ends it, or until another process has taken over.
fn run(invocation: &Invocation) -> Result<ExitCode, Error> {
    let mut setup = Setup::new(invocation, From::Nobody)?;
    let sockets = mem::take(&mut setup.sockets);
    let server = Server::start_on(sockets, setup.config.clone())?;
    setup.serve(server, None)
}

/// Command line of this process, behind the program.
type Arguments = Peekable<Skip<ArgsOs>>;

/// Takes over from the running proxy that has started this process, and goes on as that did.
fn take_over(arguments: Arguments) -> ExitCode {
    let parent = getppid().ok_or_else(|| format!("{TAKE_OVER}: the parent has no number here"));
    let inherited = parent.and_then(|parent| Ok((parent, Inheritance::take(parent)?)));
    match inherited {
        Ok((parent, inheritance)) => inherit(arguments, From::Parent(parent), inheritance)
            // The giver is told the error, and logs it. No destructor closes what belongs to it.
            .unwrap_or_else(|_setup| process::exit(EXIT_REFUSED.into())),
        Err(error) => fail(EXIT_USAGE, error),
    }
}

/// Takes everything back from the child to which this process has handed it over, as another program or another start of it.
fn take_back(mut arguments: Arguments) -> ExitCode {
    let child = process_of(arguments.next());
    let inherited = child.and_then(|child| Ok((child, Inheritance::take(child)?)));
    let (child, inheritance) = match inherited {
        Ok(inherited) => inherited,
        Err(error) => return fail(EXIT_USAGE, format_args!("{TAKE_BACK}: {error}")),
    };
    guard_at_panic(child);
    inherit(arguments, From::Child(child), inheritance).unwrap_or_else(|setup| {
        if let Some(setup) = setup {
            let Setup { started, signals_end, upgrades, .. } = *setup;
            // The thread "signals" may wait for a start.
            drop(started);
            signals_end.keep_signals();
            upgrades.try_iter().for_each(|()| signals::pass_on(SIGUSR2, child));
        }
        become_guard(child)
    })
}

/// True in a process that has not taken everything back yet.
static TAKES_BACK: AtomicBool = AtomicBool::new(false);

/// Has a panic make this process the guard of its child, as long as that one has everything: the end of the process would be that
/// of the service.
fn guard_at_panic(child: Pid) {
    TAKES_BACK.store(true, Ordering::SeqCst);
    let hook = panic::take_hook();
    let main = thread::current().id();
    panic::set_hook(Box::new(move |info| {
        hook(info);
        while TAKES_BACK.load(Ordering::SeqCst) {
            if thread::current().id() == main {
                become_guard(child);
                process::exit(EXIT_FAILURE.into());
            }
            // The main thread waits for this one in vain, and refuses.
            thread::park();
        }
    }));
}

/// Guards the child that has everything.
fn stand_guard(mut arguments: Arguments) -> ExitCode {
    match process_of(arguments.next()) {
        Ok(child) => guard(child),
        Err(error) => fail(EXIT_USAGE, format_args!("{GUARD}: {error}")),
    }
}

/// Takes everything over, and runs the proxy until its end. If the giver goes on instead, returns what was set up until then.
fn inherit(
    arguments: Arguments,
    from: From,
    inheritance: Inheritance,
) -> Result<ExitCode, Option<Box<Setup>>> {
    let Inheritance { channel, end_of_giver } = inheritance;
    let setup =
        cli::parse(arguments).map_err(Error::Config).and_then(|invocation| {
            match invocation.command {
                Command::Run => Setup::new(&invocation, from),
                _ => Err(Error::Config(format!("{TAKE_OVER} takes no command"))),
            }
        });
    let setup = match setup {
        Ok(setup) => setup,
        Err(error) => {
            tcpause::refuse(channel, &error.to_string());
            return Err(None);
        }
    };
    if let From::Child(child) = from {
        // The log has its own way with panics.
        guard_at_panic(child);
    }
    match Server::take_over(channel, setup.config.clone(), &setup.goes_on) {
        Ok((server, predecessor)) => {
            TAKES_BACK.store(false, Ordering::SeqCst);
            let code = setup.serve(server, Some((predecessor, end_of_giver)));
            Ok(code.unwrap_or_else(|error| fail(EXIT_FAILURE, error)))
        }
        Err(_) => Err(Some(Box::new(setup))),
    }
}

/// Everything around the server, ready before it.
struct Setup {
    config: Config,
    file: Option<PathBuf>,
    sockets: Sockets,
    program: Result<Program, String>,
    /// True once a process that takes over goes on, and stops like any other.
    goes_on: Arc<AtomicBool>,
    /// Signals that ask for an upgrade.
    upgrades: Receiver<()>,
    /// Thread that is to obey them.
    upgrade_thread: UpgradeThread,
    /// Way to tell the thread "signals" of the server.
    started: Sender<Running>,
    signals_end: SignalsEnd,
    manager: Manager,
    /// Logger, which is dropped last, when all has been logged.
    logger: Logger,
}

impl Setup {
    /// Reads the configuration, and starts the log and the thread that obeys signals.
    fn new(invocation: &Invocation, from: From) -> Result<Self, Error> {
        // By default, each of these would end the program.
        let (signals, signals_end) = Signals::catch()?;
        let program = Program::remember();
        let sockets = systemd::sockets()?;
        let (mut config, file) = invocation.read()?;
        // A process that takes over gets listeners in place of the addresses, so its configuration is checked with them.
        if from == From::Nobody {
            let mut config = config.clone();
            sockets.set_addresses(&mut config);
            invocation.check(&config)?;
        }
        // Absolute, as the status is read elsewhere.
        config.file = file.as_deref().and_then(|file| path::absolute(file).ok());
        // Before anything opens that has to be closed in order.
        signals.catch_stops()?;
        let logger = Logger::start(config.log_level, config.log.format)?;
        let goes_on = Arc::new(AtomicBool::new(false));
        let (signalled, upgrades) = bounded(1);
        let (started, running) = bounded(1);
        let obedience = Obedience {
            upgrades: signalled,
            started: running,
            from,
            goes_on: Arc::clone(&goes_on),
            is_passed_on: false,
            stop: None,
        };
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || signals.obey(obedience))
            .map_err(|error| Error::no_thread("listens to signals", &error))?;
        let upgrade_thread = UpgradeThread::start()?;
        let manager = Manager::find();
        Ok(Self {
            config,
            file,
            sockets,
            program,
            goes_on,
            upgrades,
            upgrade_thread,
            started,
            signals_end,
            manager,
            logger,
        })
    }

    /// Runs the threads around a server that has started, and waits for its end.
    fn serve(
        self,
        server: Server,
        predecessor: Option<(Predecessor, OwnedFd)>,
    ) -> Result<ExitCode, Error> {
        let Self { config, manager, .. } = self;
        let (predecessor, end_of_giver) = predecessor.unzip();
        let running = Running {
            stopper: server.stopper(),
            manager: manager.clone(),
            grace_period: config.grace_period,
        };
        // An error means that a stop signal ends this process already.
        self.started.send(running).ok();
        // A failing start shows its one line and nothing else.
        let is_heir = end_of_giver.is_some();
        let deed = if is_heir { "has taken over" } else { "started" };
        // One that hands everything back is a passage.
        if !predecessor.as_ref().is_some_and(Predecessor::takes_back) {
            announce(&config, self.file.as_deref(), deed);
        }
        let upgrades = Upgrades {
            program: self.program,
            giver: server.giver(),
            predecessor,
            manager: manager.clone(),
            signals_end: self.signals_end,
            flush_log: self.logger.flusher(),
        };
        // From here on, the API promises upgrades.
        let attempt = upgrades.start(&self.upgrade_thread, self.upgrades);
        match manager.ready(&server, end_of_giver) {
            // The connections that were taken over are worth more than a thread.
            Err(error) if is_heir => log::error!("{error}"),
            ready => ready?,
        }
        let outcome = server.join();
        attempt.end();
        Ok(told(outcome, &config).into())
    }
}

/// Logs the end of the proxy, and returns its exit code.
fn told(outcome: Outcome, config: &Config) -> u8 {
    match outcome {
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
    }
}

/// Checks the configuration and prints it with the options applied.
fn check_config(invocation: &Invocation) -> Result<ExitCode, Error> {
    let (mut config, file) = invocation.configure()?;
    config.control.mode = config.control.effective_mode();
    Server::ask_about_header(&config).iter().for_each(tell);
    print(&format!("# {}\n{config}", OneLine(origin(file.as_deref()))))
}

/// Logs the version and the configuration file, and the settings without effect.
fn announce(config: &Config, file: Option<&Path>, deed: &str) {
    let (version, pid) = (env!("CARGO_PKG_VERSION"), process::id());
    log::info!("tcpause {version} {deed}, pid {pid}, {}", origin(file));
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

//! The table of commands, each with its options.

use tcpause::settings::Completion;

use super::{
    Client,
    options::{Action, HELP, Kind, Opt},
};

/// A command of the program.
pub(crate) struct Word {
    /// The word itself.
    pub(crate) name: &'static str,
    /// Word for its argument in the help; empty without one.
    pub(crate) argument: &'static str,
    /// One line for the help, without a full stop.
    pub(crate) help: &'static str,
    /// Whole sentences that the man page and the command's own help add.
    pub(crate) more: &'static str,
    /// Its request to the control API; `None` for a command that needs no running proxy.
    pub(crate) client: Option<Client>,
    /// Its own options, in the order of the help.
    pub(crate) options: &'static [&'static Opt],
}

impl Word {
    /// Returns true if the words behind it are a program and its arguments.
    pub(crate) fn runs_program(&self) -> bool {
        self.client == Some(Client::Exec)
    }
}

/// Shells with completions.
pub(crate) const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];

/// Units of systemd, each with its text.
pub(crate) const UNITS: [(&str, &str); 3] = [
    ("service", include_str!("../units/tcpause.service")),
    ("socket", include_str!("../units/tcpause.socket")),
    ("template", include_str!("../units/tcpause@.service")),
];

/// Returns the names of the units.
pub(crate) fn unit_names(separator: &str) -> String {
    UNITS.map(|(name, _)| name).join(separator)
}

/// Explanation of `upgrade` and of `reload`.
const UPGRADE_MORE: &str = "The running proxy starts the program at its place, with the same options. The new process reads the configuration and takes over listeners, connections and pauses. The number of the process stays, unless systemd follows the new one. All settings may change but proxy.addr and control.addr; where control.addr has changed in the file, --control-addr takes the old one. If the new process cannot take over, the old one goes on, the line on standard error tells the reason, and the exit code is 1.";

/// Every command, in the order of the help.
pub(crate) static COMMANDS: [Word; 15] = [
    Word {
        name: "pause",
        argument: "",
        help: "Hold new clients from now on; with --wait, wait until the others have left",
        more: "The pause lasts until a resume, or as long as --ttl says; the same call again renews it. Pauses with different names add up: clients are served when all have ended.",
        client: Some(Client::Pause),
        options: &[
            &NAME,
            &REASON,
            &TTL,
            &MODE,
            &WAIT,
            &ON_TIMEOUT,
            &DRAIN,
            &HALF_CLOSED,
            &CONTROL,
            &CONFIG,
            &HELP,
        ],
    },
    Word {
        name: "resume",
        argument: "",
        help: "Serve the held clients, and the new ones",
        more: "Without --name it lifts every pause.",
        client: Some(Client::Resume),
        options: &[&NAME_LIFTED, &FORCE, &RELEASE, &CONTROL, &CONFIG, &HELP],
    },
    Word {
        name: "status",
        argument: "",
        help: "Show the pauses with their callers, and the numbers of clients",
        more: "",
        client: Some(Client::Status),
        options: &[&JSON, &WATCH, &CONTROL, &CONFIG, &HELP],
    },
    Word {
        name: "wait",
        argument: "",
        help: "Wait until no connection is carried",
        more: "Without a pause, the next client may come a moment later.",
        client: Some(Client::Wait),
        options: &[&TIMEOUT, &CONTROL, &CONFIG, &HELP],
    },
    Word {
        name: "exec",
        argument: "COMMAND",
        help: "Pause, wait until idle, run a command such as a restart, and resume",
        more: "The words behind the options are the command and its arguments. The exit code is the command's; as in shells, it is 127 if there is no such command, and 126 if it cannot be run. The pause ends with exec: even if exec is killed, the proxy serves again at once. Ctrl-C and the signals TERM, HUP and QUIT reach the command; the third within 10 s ends exec and the pause, and leaves the command running. Signals less than 200 ms apart count as one.",
        client: Some(Client::Exec),
        options: &[
            &EXEC_WAIT,
            &EXEC_ON_TIMEOUT,
            &EXEC_TTL,
            &EXEC_NAME,
            &EXEC_REASON,
            &MODE,
            &DRAIN,
            &HALF_CLOSED,
            &CONTROL,
            &CONFIG,
            &HELP,
        ],
    },
    Word {
        name: "connections",
        argument: "",
        help: "List the connections, oldest first",
        more: "Each line has the id, by which kill and the log know the connection.",
        client: Some(Client::Connections),
        options: &[
            &STATE,
            &CLIENT,
            &UPSTREAM,
            &OLDER,
            &IDLE,
            &LIMIT,
            &JSON,
            &WATCH_LIST,
            &CONTROL,
            &CONFIG,
            &HELP,
        ],
    },
    Word {
        name: "kill",
        argument: "ID...",
        help: "End the connections with these ids, or those that the options choose",
        more: "It prints the number of connections. The exit code is 75 if there is none. A client that waits leaves the line.",
        client: Some(Client::Kill),
        options: &[
            &STATE, &CLIENT, &UPSTREAM, &OLDER, &IDLE, &ALL, &HOW, &SPREAD, &CONTROL, &CONFIG,
            &HELP,
        ],
    },
    Word {
        name: "switch",
        argument: "ADDRESS",
        help: "Lead new connections to another server, if it answers; running ones stay",
        more: "Nothing changes unless the server accepts a connection within upstream.connect-timeout. Once the command has ended, no connection to the old server begins. Clients that a pause holds are served by the new one. With upstream.state-file, the switch outlives a restart.",
        client: Some(Client::Switch),
        options: &[&CHECK, &SWITCH_WAIT, &SWITCH_ON_TIMEOUT, &CONTROL, &CONFIG, &HELP],
    },
    Word {
        name: "upgrade",
        argument: "",
        help: "Start the program anew, with its configuration; it goes on with all connections",
        more: UPGRADE_MORE,
        client: Some(Client::Upgrade),
        options: &[&CONTROL, &CONFIG, &HELP],
    },
    Word {
        name: "reload",
        argument: "",
        help: "The same as upgrade",
        more: UPGRADE_MORE,
        client: Some(Client::Upgrade),
        options: &[&CONTROL, &CONFIG, &HELP],
    },
    Word {
        name: "demo",
        argument: "",
        help: "Show a restart behind the proxy and its own upgrade, under load; takes 10 s",
        more: "",
        client: None,
        options: &[],
    },
    Word {
        name: "help",
        argument: "TOPIC",
        help: "Show this help, or the page of a command or topic",
        more: "",
        client: None,
        options: &[],
    },
    Word {
        name: "completion",
        argument: "SHELL",
        help: "Print the completions for bash, zsh or fish",
        more: "",
        client: None,
        options: &[],
    },
    Word {
        name: "unit",
        argument: "KIND",
        help: "Print a unit for systemd: service, which is the default, socket or template",
        more: "The service runs one tcpause, with /etc/tcpause/tcpause.yml. The template runs several: tcpause@web reads /etc/tcpause/web.yml. The socket keeps the port of the proxy open while the service restarts. They belong into /etc/systemd/system, as tcpause.service, tcpause@.service and tcpause.socket; then run: systemctl daemon-reload.",
        client: None,
        options: &[],
    },
    Word {
        name: "man",
        argument: "",
        help: "Print the man page",
        more: "",
        client: None,
        options: &[],
    },
];

/// The signals that the proxy heeds or ignores, for the help and the page on signals.
pub(crate) const SIGNALS: [(&str, &str); 5] = [
    (
        "SIGTERM, SIGINT, SIGQUIT",
        "Refuse new clients, serve the clients in the queue, and let connections end within the grace period. Held clients are held for as long, and a resume serves them.",
    ),
    (
        "a second stop signal",
        "Closes everything at once if it comes a second or more after the first. Sooner, it is ignored, as supervisors often signal both a process and its group.",
    ),
    (
        "SIGUSR2, SIGHUP",
        "Start the program at its place anew; the new process reads the configuration and takes over everything. The number of the process stays, unless systemd follows the new one. If that one cannot take over, the log says why, and nothing changes. A SIGHUP that is ignored at start, as by nohup, stays ignored.",
    ),
    (
        "SIGUSR1",
        "Is ignored: the log goes to standard error, and no file is reopened. The log says so.",
    ),
    (
        "SIGXFSZ, SIGPIPE",
        "Are ignored: a log that takes no more lines loses them, and tells later how many.",
    ),
];

/// The exit codes of the commands that ask a running proxy, for their help.
pub(crate) const CLIENT_EXIT_CODES: [(&str, &str); 5] = [
    ("0", "It is done."),
    ("1", "Something else went wrong; the line on standard error tells the reason."),
    ("2", "The command line is wrong, or the proxy refused the request."),
    ("69", "The control API cannot be reached, or something else answers at its address."),
    (
        "75",
        "Not now: connections were left when the time was up, or no such pause or connection is there.",
    ),
];

static NAME: Opt = ask(
    "name",
    Some("NAME"),
    "Name of the pause, which --name of resume lifts; \"default\" if not set",
    Kind::Text,
);
static REASON: Opt = ask("reason", Some("TEXT"), "Reason, for the status and the log", Kind::Text);
static TTL: Opt = ask(
    "ttl",
    Some("DURATION"),
    "Longest time that the pause lasts without a renewal",
    Kind::Duration(None),
);
static MODE: Opt = choice(
    "mode",
    "HOW",
    "Treatment of new clients: hold or reject; as --proxy-reject-clients says if not set",
    &["hold", "reject"],
    None,
);
static WAIT: Opt = ask(
    "wait",
    Some("DURATION"),
    "Longest time to wait until no connection is carried; no wait if not set",
    Kind::Duration(None),
);
static ON_TIMEOUT: Opt = choice(
    "on-timeout",
    "WHAT",
    "If connections are left after --wait: resume, keep the pause, or kill them",
    &["resume", "keep", "kill"],
    None,
);
static DRAIN: Opt = ask(
    "drain",
    Some("HOW"),
    "Close connections after a time of silence, as in quiet:2s or quiet:2s,postgres",
    Kind::Text,
);
static HALF_CLOSED: Opt = choice(
    "half-closed",
    "WHAT",
    "Held clients that end their stream: serve or drop; as --hold-half-closed if not set",
    &["serve", "drop"],
    None,
);

static NAME_LIFTED: Opt =
    ask("name", Some("NAME"), "Lift the pause of this name alone", Kind::Text);
static FORCE: Opt =
    ask("force", None, "Lift the fleet's pauses too, on this host alone", Kind::Switch);
static RELEASE: Opt =
    ask("release", Some("N"), "Serve only the N oldest held clients, and stay paused", Kind::Count);

static JSON: Opt = ask("json", None, "Show the API's answer as it is", Kind::Switch);
static WATCH: Opt =
    ask("watch", None, "Show the status again every second, until Ctrl-C", Kind::Switch);

static WATCH_LIST: Opt =
    ask("watch", None, "Show the list again every second, until Ctrl-C", Kind::Switch);
static STATE: Opt = choice(
    "state",
    "STATE",
    "Only those in this state: held, connecting, active or rejecting",
    &["held", "connecting", "active", "rejecting"],
    None,
);
static CLIENT: Opt = ask(
    "client",
    Some("CIDR"),
    "Only those of clients with an address in this network, as in 10.0.0.0/8",
    Kind::Text,
);
static UPSTREAM: Opt = ask("upstream", Some("ADDRESS"), "Only those of this upstream", Kind::Text);
static OLDER: Opt =
    ask("older", Some("DURATION"), "Only those that are at least so old", Kind::Duration(None));
static IDLE: Opt = ask(
    "idle",
    Some("DURATION"),
    "Only those that are relayed and have been silent for so long",
    Kind::Duration(None),
);
static LIMIT: Opt = ask("limit", Some("N"), "Show at most N of them; 100 if not set", Kind::Count);
static ALL: Opt = ask("all", None, "End all connections", Kind::Switch);
static HOW: Opt = choice(
    "how",
    "HOW",
    "End them by a reset of both sides, or close them in order: reset or close",
    &["reset", "close"],
    Some("reset"),
);
static SPREAD: Opt = ask(
    "spread",
    Some("DURATION"),
    "End them one after the other within this time; at once if not set",
    Kind::Duration(None),
);
static CHECK: Opt = choice(
    "check",
    "HOW",
    "Look at the server before: connect to it, or none",
    &["connect", "none"],
    Some("connect"),
);
static SWITCH_WAIT: Opt = ask(
    "wait",
    Some("DURATION"),
    "Longest time to wait for the end of connections to other servers; no wait if not set",
    Kind::Duration(None),
);
static SWITCH_ON_TIMEOUT: Opt = choice(
    "on-timeout",
    "WHAT",
    "If connections to other servers are left after --wait: keep them, or kill them",
    &["keep", "kill"],
    None,
);

static TIMEOUT: Opt = ask(
    "timeout",
    Some("DURATION"),
    "Longest time to wait; no limit if not set",
    Kind::Duration(None),
);

static EXEC_WAIT: Opt = ask(
    "wait",
    Some("DURATION"),
    "Longest time to wait until no connection is carried",
    Kind::Duration(Some("30s")),
);
static EXEC_ON_TIMEOUT: Opt = choice(
    "on-timeout",
    "WHAT",
    "If connections are left: resume and run nothing, or kill them",
    &["resume", "kill"],
    Some("resume"),
);
static EXEC_TTL: Opt = ask(
    "ttl",
    Some("DURATION"),
    "Time that the pause goes on when a hung exec no longer renews it",
    Kind::Duration(Some("10s")),
);
static EXEC_NAME: Opt = ask(
    "name",
    Some("NAME"),
    "Name of the pause; exec- and the process's number if not set",
    Kind::Text,
);
static EXEC_REASON: Opt = ask(
    "reason",
    Some("TEXT"),
    "Reason, for the status and the log; the whole command line, passwords included, if not set",
    Kind::Text,
);

static CONTROL: Opt = Opt {
    value: Some("ADDRESS"),
    help: "Address of the proxy's API; it beats the configuration",
    ..Opt::switch("control-addr", Action::Set("control.addr"))
};
static CONFIG: Opt = Opt {
    short: Some('c'),
    value: Some("FILE"),
    help: "Take control.addr from here; otherwise ./tcpause.yml or /etc/tcpause/tcpause.yml, if there",
    completion: Completion::File,
    ..Opt::switch("config", Action::ConfigFile)
};

const fn ask(
    long: &'static str,
    value: Option<&'static str>,
    help: &'static str,
    kind: Kind,
) -> Opt {
    Opt { value, help, ..Opt::switch(long, Action::Ask(kind)) }
}

const fn choice(
    long: &'static str,
    value: &'static str,
    help: &'static str,
    words: &'static [&'static str],
    default: Option<&'static str>,
) -> Opt {
    Opt {
        completion: Completion::Choices(words),
        ..ask(long, Some(value), help, Kind::Choice(default))
    }
}

//! The table of commands, each with its options.

use super::{
    Client,
    options::{HELP, Opt},
    own_options::{
        ALL, CHECK, CLIENT, CONFIG, CONFIGURED, CONTROL, DRAIN, EXEC_NAME, EXEC_ON_TIMEOUT,
        EXEC_REASON, EXEC_TTL, EXEC_WAIT, FLEET_PAUSE, FLEET_RESUME, FLEET_STATUS, FORCE,
        HALF_CLOSED, HOW, IDLE, IF_LOST, JSON, LIMIT, MODE, NAME, NAME_LIFTED, OLDER, ON_TIMEOUT,
        REASON, RELEASE, SPREAD, STATE, SWITCH_ON_TIMEOUT, SWITCH_WAIT, TIMEOUT, TTL, UPSTREAM,
        WAIT, WATCH, WATCH_LIST, WITHOUT,
    },
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
pub(crate) const UNITS: [(&str, &str); 4] = [
    ("service", include_str!("../units/tcpause.service")),
    ("socket", include_str!("../units/tcpause.socket")),
    ("template", include_str!("../units/tcpause@.service")),
    ("steering", include_str!("../units/steering.conf")),
];

/// Returns the names of the units.
pub(crate) fn unit_names(separator: &str) -> String {
    UNITS.map(|(name, _)| name).join(separator)
}

/// Explanation of `upgrade` and of `reload`.
const UPGRADE_MORE: &str = "The running proxy starts the program at its place, with the same options. The new process reads the configuration and takes over listeners, connections and pauses. The number of the process stays, unless systemd follows the new one. All settings may change but proxy.addr and control.addr; where control.addr has changed in the file, --control-addr takes the old one. If the new process cannot take over, the old one goes on, the line on standard error tells the reason, and the exit code is 1.";

/// Every command, in the order of the help.
pub(crate) static COMMANDS: [Word; 16] = [
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
            &FLEET_PAUSE,
            &WITHOUT,
            &CONTROL,
            &CONFIG,
            &HELP,
        ],
    },
    Word {
        name: "resume",
        argument: "",
        help: "Serve the held clients, and the new ones",
        more: "Without --name it lifts every pause, but for those of the fleet, which tcpause resume --fleet NAME lifts on all hosts.",
        client: Some(Client::Resume),
        options: &[&NAME_LIFTED, &FORCE, &RELEASE, &FLEET_RESUME, &CONTROL, &CONFIG, &HELP],
    },
    Word {
        name: "status",
        argument: "",
        help: "Show the pauses with their callers, and the numbers of clients",
        more: "With --fleet, hosts come first that have no session or that a pause waits for, and each of them has a mark.",
        client: Some(Client::Status),
        options: &[&JSON, &WATCH, &FLEET_STATUS, &CONTROL, &CONFIG, &HELP],
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
            &FLEET_PAUSE,
            &WITHOUT,
            &IF_LOST,
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
        options: &[&CONFIGURED, &CHECK, &SWITCH_WAIT, &SWITCH_ON_TIMEOUT, &CONTROL, &CONFIG, &HELP],
    },
    Word {
        name: "fleet",
        argument: "forget HOST",
        help: "Forget a host of the fleet that is lost for good, so that no pause waits for it",
        more: "It is refused while the host has a session. A host that was forgotten and starts again is a member again. The page many-hosts tells more.",
        client: Some(Client::Fleet),
        options: &[&CONTROL, &CONFIG, &HELP],
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
        help: "Print a unit for systemd: service (the default), socket, template or steering",
        more: "The service runs one tcpause, with /etc/tcpause/tcpause.yml. The template runs several: tcpause@web reads /etc/tcpause/web.yml. The socket keeps the port of the proxy open while the service restarts. Steering is no unit but a file of rights for upstream.steer, which belongs into tcpause.service.d, or tcpause@.service.d, as steering.conf. The units belong into /etc/systemd/system, as tcpause.service, tcpause@.service and tcpause.socket; then run: systemctl daemon-reload.",
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
pub(crate) const CLIENT_EXIT_CODES: [(&str, &str); 6] = [
    ("0", "It is done."),
    ("1", "Something else went wrong; the line on standard error tells the reason."),
    ("2", "The command line is wrong, or the proxy refused the request."),
    (
        "3",
        "Of switch: it is done, and connections to other servers were left when the time was up.",
    ),
    ("69", "The control API cannot be reached, or something else answers at its address."),
    (
        "75",
        "Not now: connections were left when the time was up, or no such pause or connection is there. Of switch: nothing has changed, as the server does not answer, or as eight earlier ones have connections; or another switch has come during the wait.",
    ),
];

//! The options of the commands that ask a running proxy.

use tcpause::settings::Completion;

use super::options::{Action, Kind, Opt};

pub(super) static NAME: Opt = ask(
    "name",
    Some("NAME"),
    "Name of the pause, which --name of resume lifts; \"default\" if not set",
    Kind::Text,
);
pub(super) static REASON: Opt =
    ask("reason", Some("TEXT"), "Reason, for the status and the log", Kind::Text);
pub(super) static TTL: Opt = ask(
    "ttl",
    Some("DURATION"),
    "Longest time that the pause lasts without a renewal",
    Kind::Duration(None),
);
pub(super) static MODE: Opt = choice(
    "mode",
    "HOW",
    "Treatment of new clients: hold or reject; as --proxy-reject-clients says if not set",
    &["hold", "reject"],
    None,
);
pub(super) static WAIT: Opt = ask(
    "wait",
    Some("DURATION"),
    "Longest time to wait until no connection is carried; no wait if not set",
    Kind::Duration(None),
);
pub(super) static ON_TIMEOUT: Opt = choice(
    "on-timeout",
    "WHAT",
    "If connections are left after --wait: resume, keep the pause, or kill them",
    &["resume", "keep", "kill"],
    None,
);
pub(super) static DRAIN: Opt = Opt {
    completion: Completion::Choices(&["quiet:2s", "quiet:2s,postgres"]),
    ..ask(
        "drain",
        Some("HOW"),
        "Close connections after a time of silence, as in quiet:2s or quiet:2s,postgres",
        Kind::Text,
    )
};
pub(super) static HALF_CLOSED: Opt = choice(
    "half-closed",
    "WHAT",
    "Held clients that end their stream: serve or drop; as --hold-half-closed if not set",
    &["serve", "drop"],
    None,
);

pub(super) static FLEET_PAUSE: Opt =
    ask("fleet", None, "Pause all hosts of the fleet as one", Kind::Switch);
pub(super) static FLEET_RESUME: Opt =
    ask("fleet", None, "Lift the pause that is named, on all hosts of the fleet", Kind::Switch);
pub(super) static FLEET_STATUS: Opt =
    ask("fleet", None, "Show the hosts of the fleet, those first that block a pause", Kind::Switch);
pub(super) static WITHOUT: Opt = ask(
    "without",
    Some("HOSTS"),
    "Hosts of the fleet, with commas between them, that are not waited for",
    Kind::Text,
);

pub(super) static NAME_LIFTED: Opt =
    ask("name", Some("NAME"), "Lift the pause of this name alone", Kind::Text);
pub(super) static FORCE: Opt =
    ask("force", None, "Lift the fleet's pauses too, on this host alone", Kind::Switch);
pub(super) static RELEASE: Opt =
    ask("release", Some("N"), "Serve only the N oldest held clients, and stay paused", Kind::Count);

pub(super) static JSON: Opt = ask("json", None, "Show the API's answer as it is", Kind::Switch);
pub(super) static WATCH: Opt =
    ask("watch", None, "Show the status again every second, until Ctrl-C", Kind::Switch);

pub(super) static WATCH_LIST: Opt =
    ask("watch", None, "Show the list again every second, until Ctrl-C", Kind::Switch);
pub(super) static STATE: Opt = choice(
    "state",
    "STATE",
    "Only connections in this state: held, connecting, active or rejecting",
    &["held", "connecting", "active", "rejecting"],
    None,
);
pub(super) static CLIENT: Opt = ask(
    "client",
    Some("CIDR"),
    "Only connections of clients in this network, as in 10.0.0.0/8",
    Kind::Text,
);
pub(super) static UPSTREAM: Opt =
    ask("upstream", Some("ADDRESS"), "Only connections to this upstream", Kind::Text);
pub(super) static OLDER: Opt =
    ask("older", Some("DURATION"), "Only connections of at least this age", Kind::Duration(None));
pub(super) static IDLE: Opt = ask(
    "idle",
    Some("DURATION"),
    "Only relayed connections that have been silent for so long",
    Kind::Duration(None),
);
pub(super) static LIMIT: Opt =
    ask("limit", Some("N"), "Show at most N of them; 100 if not set", Kind::Count);
pub(super) static ALL: Opt = ask("all", None, "End all connections", Kind::Switch);
pub(super) static HOW: Opt = choice(
    "how",
    "HOW",
    "End them by a reset of both sides, or close them in order: reset or close",
    &["reset", "close"],
    Some("reset"),
);
pub(super) static SPREAD: Opt = ask(
    "spread",
    Some("DURATION"),
    "End them one after the other within this time; at once if not set",
    Kind::Duration(None),
);
pub(super) static CONFIGURED: Opt =
    ask("configured", None, "Lead them back to the server in the configuration", Kind::Switch);
pub(super) static CHECK: Opt = choice(
    "check",
    "HOW",
    "Look at the server before: connect to it, or none",
    &["connect", "none"],
    Some("connect"),
);
pub(super) static SWITCH_WAIT: Opt = ask(
    "wait",
    Some("DURATION"),
    "Longest time to wait for the end of connections to other servers; no wait if not set",
    Kind::Duration(None),
);
pub(super) static SWITCH_ON_TIMEOUT: Opt = choice(
    "on-timeout",
    "WHAT",
    "If connections to other servers are left after --wait: keep them, or kill them",
    &["keep", "kill"],
    None,
);

pub(super) static TIMEOUT: Opt = ask(
    "timeout",
    Some("DURATION"),
    "Longest time to wait; no limit if not set",
    Kind::Duration(None),
);

pub(super) static EXEC_WAIT: Opt = ask(
    "wait",
    Some("DURATION"),
    "Longest time to wait until no connection is carried",
    Kind::Duration(Some("30s")),
);
pub(super) static EXEC_ON_TIMEOUT: Opt = choice(
    "on-timeout",
    "WHAT",
    "If connections are left: resume and run nothing, or kill them",
    &["resume", "kill"],
    Some("resume"),
);
pub(super) static EXEC_TTL: Opt = ask(
    "ttl",
    Some("DURATION"),
    "Time of the pause when a hung exec no longer renews it; 15s with --fleet",
    Kind::Duration(Some("10s")),
);
pub(super) static EXEC_NAME: Opt = ask(
    "name",
    Some("NAME"),
    "Name of the pause; exec- and the process's number if not set",
    Kind::Text,
);
pub(super) static EXEC_REASON: Opt = ask(
    "reason",
    Some("TEXT"),
    "Reason, for the status and the log; the whole command line, passwords included, if not set",
    Kind::Text,
);

pub(super) static IF_LOST: Opt = choice(
    "if-lost",
    "WHAT",
    "If the pause may have ended: keep the command, or kill it by SIGTERM",
    &["keep", "kill"],
    Some("keep"),
);

pub(super) static CONTROL: Opt = Opt {
    value: Some("ADDRESS"),
    help: "Address of the proxy's API; it beats the configuration",
    ..Opt::switch("control-addr", Action::Set("control.addr"))
};
pub(super) static CONFIG: Opt = Opt {
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

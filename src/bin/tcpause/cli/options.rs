//! The table of the options that the proxy runs with, and what an option is. Parsing, help, man page, completions and the
//! README come from it and from the table of commands beside it.

use std::num::{IntErrorKind, NonZeroUsize};

use tcpause::{Config, parse_duration};

use tcpause::suggest::{choice, nearest};

/// One option of the command line.
pub(crate) struct Opt {
    /// The name after two dashes. For a setting it is the key of the file with its dots turned to dashes.
    pub(crate) long: &'static str,
    /// The letter after one dash.
    pub(crate) short: Option<char>,
    /// What stands for the value in the help; `None` for a switch.
    pub(crate) value: Option<&'static str>,
    /// One line for the help, without a full stop.
    pub(crate) help: &'static str,
    /// Whole sentences that the man page adds.
    pub(crate) more: &'static str,
    /// The heading it stands under.
    pub(crate) section: Section,
    /// What a shell offers for the value.
    pub(crate) completion: Completion,
    /// What it does.
    pub(crate) action: Action,
}

/// The headings of the help, in their order.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Section {
    General,
    Proxy,
    Pause,
    Hold,
    Resume,
    Control,
    Upstream,
}

/// What a shell offers for a value.
pub(crate) enum Completion {
    None,
    File,
    Choices(&'static [&'static str]),
}

/// What an option does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Sets this key of the configuration.
    Set(&'static str),
    ConfigFile,
    CheckConfig,
    Help,
    Version,
    /// Is handed to the command whose option it is.
    Ask(Kind),
}

/// What a command takes for a value, and what it takes where none is given.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    Duration(Option<&'static str>),
    Count,
    /// One of the words that a shell offers.
    Choice(Option<&'static str>),
    Switch,
}

impl Section {
    /// Every heading with its title.
    pub(crate) const ALL: [(Self, &'static str); 7] = [
        (Self::General, "Options"),
        (Self::Proxy, "Proxy, the side of the clients"),
        (Self::Pause, "Pause, which holds the clients or rejects them"),
        (Self::Hold, "Hold, the clients that wait while it is paused"),
        (Self::Resume, "Resume, how those who have waited are let go"),
        (Self::Control, "Control, the HTTP API that pauses and resumes"),
        (Self::Upstream, "Upstream, the server behind the proxy"),
    ];
}

impl Opt {
    /// The default as the help shows it; `None` when it goes without saying.
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

/// The option that every command has too.
pub(super) const HELP: Opt = Opt {
    long: "help",
    short: Some('h'),
    value: None,
    help: "Show this help",
    more: "",
    section: Section::General,
    completion: Completion::None,
    action: Action::Help,
};

/// Every option that the proxy runs with, in the order of the help.
pub(crate) static OPTIONS: [Opt; 32] = [
    Opt {
        long: "config",
        short: Some('c'),
        value: Some("FILE"),
        help: "Read this YAML file; otherwise ./tcpause.yml or /etc/tcpause/tcpause.yml, if there",
        more: "An option beats the file, the file beats the default, and no file is needed.",
        section: Section::General,
        completion: Completion::File,
        action: Action::ConfigFile,
    },
    Opt {
        long: "check-config",
        short: None,
        value: None,
        help: "Say what is wrong with the configuration or show what would run, and exit",
        more: "Prints the effective configuration, options included, as YAML.",
        section: Section::General,
        completion: Completion::None,
        action: Action::CheckConfig,
    },
    Opt {
        long: "grace-period",
        short: Some('g'),
        value: Some("DURATION"),
        help: "How long running connections may go on after SIGTERM, SIGINT or SIGQUIT",
        more: "What is left then is closed.",
        section: Section::General,
        completion: Completion::None,
        action: Action::Set("grace-period"),
    },
    Opt {
        long: "log-level",
        short: None,
        value: Some("LEVEL"),
        help: "Log this level and above: off, error, warn, info, debug or trace",
        more: "The environment variable RUST_LOG beats it.",
        section: Section::General,
        completion: Completion::Choices(&["off", "error", "warn", "info", "debug", "trace"]),
        action: Action::Set("log-level"),
    },
    HELP,
    Opt {
        long: "version",
        short: Some('V'),
        value: None,
        help: "Show the version",
        more: "",
        section: Section::General,
        completion: Completion::None,
        action: Action::Version,
    },
    Opt {
        long: "proxy-addr",
        short: None,
        value: Some("ADDRESS"),
        help: "Where clients connect to",
        more: "",
        section: Section::Proxy,
        completion: Completion::None,
        action: Action::Set("proxy.addr"),
    },
    Opt {
        long: "proxy-mode",
        short: None,
        value: Some("MODE"),
        help: "Mode of the socket file of --proxy-addr, as in 0660; what the umask leaves if not set",
        more: "Whoever is to connect needs the right to write.",
        section: Section::Proxy,
        completion: Completion::None,
        action: Action::Set("proxy.mode"),
    },
    Opt {
        long: "proxy-reject-clients",
        short: None,
        value: None,
        help: "While paused, reject new clients instead of holding them",
        more: "It also takes a value behind an equals sign: --proxy-reject-clients=false.",
        section: Section::Proxy,
        completion: Completion::None,
        action: Action::Set("proxy.reject-clients"),
    },
    Opt {
        long: "proxy-reject-with",
        short: None,
        value: Some("HOW"),
        help: "What rejected clients get: http (a 503), close, reset or file:PATH",
        more: "The bytes of a file, 64 KiB at most, are the whole answer; it is read at start. With http, clients of SSH and PostgreSQL are closed without an answer.",
        section: Section::Proxy,
        completion: Completion::Choices(&["http", "close", "reset"]),
        action: Action::Set("proxy.reject-with"),
    },
    Opt {
        long: "proxy-retry-after-interval",
        short: None,
        value: Some("DURATION"),
        help: "The Retry-After of the 503; 0s leaves the header out",
        more: "It is rounded up to whole seconds.",
        section: Section::Proxy,
        completion: Completion::None,
        action: Action::Set("proxy.retry-after-interval"),
    },
    Opt {
        long: "proxy-block-poll-interval",
        short: None,
        value: Some("DURATION"),
        help: "Has no effect; known for compatibility",
        more: "Nothing polls here.",
        section: Section::Proxy,
        completion: Completion::None,
        action: Action::Set("proxy.block-poll-interval"),
    },
    Opt {
        long: "proxy-close-poll-interval",
        short: None,
        value: Some("DURATION"),
        help: "Has no effect; known for compatibility",
        more: "Nothing polls here.",
        section: Section::Proxy,
        completion: Completion::None,
        action: Action::Set("proxy.close-poll-interval"),
    },
    Opt {
        long: "proxy-tls-ca-cert",
        short: None,
        value: Some("FILE"),
        help: "PEM bundle that a rejected client's certificate, if it sends one, is verified against",
        more: "It needs a certificate and a key.",
        section: Section::Proxy,
        completion: Completion::File,
        action: Action::Set("proxy.tls.ca-cert"),
    },
    Opt {
        long: "proxy-tls-cert",
        short: None,
        value: Some("FILE"),
        help: "PEM certificate chain for clients that open with TLS and are rejected",
        more: "It needs a key. Without them, such a client is closed and reads no 503.",
        section: Section::Proxy,
        completion: Completion::File,
        action: Action::Set("proxy.tls.cert"),
    },
    Opt {
        long: "proxy-tls-key",
        short: None,
        value: Some("FILE"),
        help: "PEM private key that belongs to the certificate",
        more: "",
        section: Section::Proxy,
        completion: Completion::File,
        action: Action::Set("proxy.tls.key"),
    },
    Opt {
        long: "proxy-threads",
        short: None,
        value: Some("N"),
        help: "How many worker threads; one a core if not set",
        more: "",
        section: Section::Proxy,
        completion: Completion::None,
        action: Action::Set("proxy.threads"),
    },
    Opt {
        long: "proxy-pipes",
        short: None,
        value: Some("N"),
        help: "How many pipes each thread may splice bulk data through; 0 copies all",
        more: "Large transfers pass through kernel pipes without being copied. By default all threads together take a share of the open files.",
        section: Section::Proxy,
        completion: Completion::None,
        action: Action::Set("proxy.pipes"),
    },
    Opt {
        long: "proxy-max-connections",
        short: None,
        value: Some("N"),
        help: "How many clients there may be at a time; as many as the open files allow if not set",
        more: "Held and rejected ones count too. Further clients wait in the kernel's backlog and are not refused.",
        section: Section::Proxy,
        completion: Completion::None,
        action: Action::Set("proxy.max-connections"),
    },
    Opt {
        long: "pause-max-ttl",
        short: None,
        value: Some("DURATION"),
        help: "The longest that a pause lasts; for ever if not set",
        more: "A pause that is asked for without a time to live gets this one; one that asks for more is refused.",
        section: Section::Pause,
        completion: Completion::None,
        action: Action::Set("pause.max-ttl"),
    },
    Opt {
        long: "hold-timeout",
        short: None,
        value: Some("DURATION"),
        help: "How long a client is held; as long as the pause lasts if not set",
        more: "One that is held for longer gets what --hold-overflow says; with backlog, it is rejected.",
        section: Section::Hold,
        completion: Completion::None,
        action: Action::Set("hold.timeout"),
    },
    Opt {
        long: "hold-max",
        short: None,
        value: Some("N"),
        help: "How many clients are held at a time; as many as there may be if not set",
        more: "",
        section: Section::Hold,
        completion: Completion::None,
        action: Action::Set("hold.max"),
    },
    Opt {
        long: "hold-overflow",
        short: None,
        value: Some("WHAT"),
        help: "What clients beyond --hold-max get: reject, close or backlog",
        more: "With reject, they are rejected as if --proxy-reject-clients were given; with close, they get the end of the stream; with backlog, they wait in the kernel's backlog, unaccepted, until there is room.",
        section: Section::Hold,
        completion: Completion::Choices(&["reject", "close", "backlog"]),
        action: Action::Set("hold.overflow"),
    },
    Opt {
        long: "resume-max-connecting",
        short: None,
        value: Some("N"),
        help: "Most connections under way at a time for clients that have waited",
        more: "It is for all threads together. It begins with 4, and finds out how many the backlog of the server takes.",
        section: Section::Resume,
        completion: Completion::None,
        action: Action::Set("resume.max-connecting"),
    },
    Opt {
        long: "resume-rate",
        short: None,
        value: Some("N"),
        help: "How many clients who have waited are let go in a second; no bound if not set",
        more: "It spares a server whose caches are cold.",
        section: Section::Resume,
        completion: Completion::None,
        action: Action::Set("resume.rate"),
    },
    Opt {
        long: "control-addr",
        short: None,
        value: Some("ADDRESS"),
        help: "Where the API listens; it has no login",
        more: "Keep it on the loopback or on a UNIX socket.",
        section: Section::Control,
        completion: Completion::None,
        action: Action::Set("control.addr"),
    },
    Opt {
        long: "control-mode",
        short: None,
        value: Some("MODE"),
        help: "Mode of the socket file of --control-addr, as in 0660",
        more: "Whoever may write to it can pause the proxy.",
        section: Section::Control,
        completion: Completion::None,
        action: Action::Set("control.mode"),
    },
    Opt {
        long: "control-hosts",
        short: None,
        value: Some("NAMES"),
        help: "Further host names that requests to the API may carry, with commas between them",
        more: "IP addresses, localhost and this host's own name are always allowed; other names are refused, so that no web page can pause a service.",
        section: Section::Control,
        completion: Completion::None,
        action: Action::Set("control.hosts"),
    },
    Opt {
        long: "upstream-addr",
        short: None,
        value: Some("ADDRESS"),
        help: "Where the server listens",
        more: "A name is looked up again while the proxy runs; all its addresses are tried.",
        section: Section::Upstream,
        completion: Completion::None,
        action: Action::Set("upstream.addr"),
    },
    Opt {
        long: "upstream-connect-timeout",
        short: None,
        value: Some("DURATION"),
        help: "How long one attempt to reach the server may take",
        more: "A server that refuses, or is away, is tried again until this or --upstream-retry-for is over, whichever is longer.",
        section: Section::Upstream,
        completion: Completion::None,
        action: Action::Set("upstream.connect-timeout"),
    },
    Opt {
        long: "upstream-retry-for",
        short: None,
        value: Some("DURATION"),
        help: "How long to wait for an absent server, at least --upstream-connect-timeout",
        more: "It waits as long as --upstream-connect-timeout anyway. Then it is reset.",
        section: Section::Upstream,
        completion: Completion::None,
        action: Action::Set("upstream.retry-for"),
    },
    Opt {
        long: "upstream-source-addrs",
        short: None,
        value: Some("IPS"),
        help: "Addresses of this host, with commas between them, to reach the server from in turn",
        more: "Each has ports of its own: about 28,000 connections to one address and port of a server. By default the system chooses one address.",
        section: Section::Upstream,
        completion: Completion::None,
        action: Action::Set("upstream.source-addrs"),
    },
];

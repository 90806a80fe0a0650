//! Parameters of the control API: their names, their values, and the checks of both.

use std::{num::NonZeroU64, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    config::{
        HalfClosed,
        address::Address,
        duration::parse_duration,
        suggest::{choice, nearest},
    },
    fleet::parse_quiet,
    handle::switch::Check,
    pause::{
        gate::Mode,
        leases::{NAME_DEFAULT, Quiet, mode_name},
    },
};

/// Parameters of `PUT /paused`.
pub(super) const PAUSE: &[&str] =
    &["name", "reason", "ttl", "mode", "wait", "on-timeout", "drain", "half-closed", "while"];
/// Parameters of `DELETE /paused`.
pub(super) const RESUME: &[&str] = &["name", "force", "release"];
/// Parameters of `GET /paused/block-until-idle`.
pub(super) const WAIT: &[&str] = &["timeout"];

/// Parameters of `PUT /upstream`, of which `DELETE /upstream` takes the last one.
const SWITCH: &[&str] = &["addr", "check"];
/// Parameters of `GET /upstream/block-until-idle`.
const WAIT_UPSTREAM: &[&str] = &["addr", "timeout"];

/// Parameters of `GET /ready`.
const READY: &[&str] = &["paused"];

const NAME_BYTES_MAX: usize = 64;
const REASON_BYTES_MAX: usize = 200;

/// Parsed parameters of `PUT /paused`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pause {
    pub(super) name: String,
    pub(super) reason: Option<String>,
    pub(super) ttl: Option<Duration>,
    pub(super) mode: Option<Mode>,
    pub(super) quiet: Option<Quiet>,
    pub(super) half_closed: Option<HalfClosed>,
    pub(super) wait: Option<Wait>,
    /// True if it lasts as long as the connection of its request.
    pub(super) is_bound: bool,
}

/// Wait of a pause for idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wait {
    pub(super) time: Duration,
    pub(super) on_timeout: OnTimeout,
}

/// Fate of a pause that is not idle in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum OnTimeout {
    /// It is undone.
    Resume,
    /// It goes on.
    Keep,
    /// The connections that are left are reset, and then it is idle.
    Kill,
}

impl OnTimeout {
    /// All outcomes, each with its name in the API.
    pub(super) const ALL: [(&str, Self); 3] =
        [("resume", Self::Resume), ("keep", Self::Keep), ("kill", Self::Kill)];
}

/// Parsed parameters of `DELETE /paused`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Resume {
    /// The end of the pause with this name, or of all; by force, those of the fleet end too, on this host alone.
    Lift { name: Option<String>, force: bool },
    /// The release of this number of held clients.
    Release(u64),
}

impl Pause {
    /// Parses a query. An error is a sentence for the caller.
    pub(super) fn parse(query: &str) -> Result<Self, String> {
        Self::read(&Query::parse(query, PAUSE)?)
    }

    /// Reads the parameters of [`PAUSE`]. An error is a sentence for the caller.
    pub(super) fn read(query: &Query) -> Result<Self, String> {
        let wait = query.duration("wait")?;
        let on_timeout = query.one_of("on-timeout", &OnTimeout::ALL)?;
        let modes = [Mode::Hold, Mode::Reject].map(|mode| (mode_name(mode), mode));
        let half_closed = HalfClosed::ALL.map(|treatment| (treatment.word(), treatment));
        let pause = Self {
            name: query.name()?.unwrap_or_else(|| NAME_DEFAULT.to_owned()),
            reason: query.reason()?,
            ttl: query.duration("ttl")?,
            mode: query.one_of("mode", &modes)?,
            quiet: query.quiet()?,
            half_closed: query.one_of("half-closed", &half_closed)?,
            wait: wait.map(|time| {
                let on_timeout = on_timeout.unwrap_or(OnTimeout::Resume);
                Wait { time, on_timeout }
            }),
            is_bound: query.one_of("while", &[("connected", ())])?.is_some(),
        };
        if pause.ttl.is_some_and(|ttl| ttl.is_zero()) {
            return Err(wrong("ttl", "a pause lasts for more than 0s; write one such as 90s"));
        }
        if on_timeout.is_some() && pause.wait.is_none() {
            return Err(wrong("on-timeout", "it says how a wait ends: add one such as wait=30s"));
        }
        if on_timeout == Some(OnTimeout::Keep) && pause.is_bound {
            let text = "keep does not go with while=connected, which ends with the answer: use resume or kill";
            return Err(wrong("on-timeout", text));
        }
        Ok(pause)
    }
}

impl Resume {
    /// Parses a query. An error is a sentence for the caller.
    pub(super) fn parse(query: &str) -> Result<Self, String> {
        let query = Query::parse(query, RESUME)?;
        let force = query.one_of("force", &[("yes", ())])?.is_some();
        match (query.name()?, query.get("release")) {
            (name, None) => Ok(Self::Lift { name, force }),
            (None, Some(count)) if !force => count.parse().map_or_else(
                |_| {
                    let text = format!("{count:?} is no number of clients; write one such as 3");
                    Err(wrong("release", &text))
                },
                |count: NonZeroU64| Ok(Self::Release(count.get())),
            ),
            (_, Some(_)) => Err(wrong(
                "release",
                "it lets clients through and ends no pause: leave out either release, or name and force",
            )),
        }
    }
}

/// Parsed parameters of `PUT /upstream` and of `DELETE /upstream`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Switch {
    /// Upstream to switch to; the configured one if absent.
    pub(super) to: Option<Address>,
    pub(super) check: Check,
}

impl Switch {
    /// Parses the query of a switch to another upstream.
    pub(super) fn parse(query: &str) -> Result<Self, String> {
        let query = Query::parse(query, SWITCH)?;
        Ok(Self { to: Some(query.upstream()?), check: query.check()? })
    }

    /// Parses the query of a switch back to the configured upstream.
    pub(super) fn parse_back(query: &str) -> Result<Self, String> {
        let query = Query::parse(query, &["check"])?;
        Ok(Self { to: None, check: query.check()? })
    }
}

/// Parses the query of a wait for an upstream: its address and the timeout.
pub(super) fn parse_wait_upstream(query: &str) -> Result<(Address, Option<Duration>), String> {
    let query = Query::parse(query, WAIT_UPSTREAM)?;
    Ok((query.upstream()?, query.duration("timeout")?))
}

/// Parses the query of a wait, whose only parameter is its timeout.
pub(super) fn parse_wait(query: &str) -> Result<Option<Duration>, String> {
    Query::parse(query, WAIT)?.duration("timeout")
}

/// Parses the query of `GET /ready`. Returns true if a paused proxy counts as ready.
pub(super) fn parse_ready(query: &str) -> Result<bool, String> {
    let unready = Query::parse(query, READY)?.one_of("paused", &[("503", ())])?;
    Ok(unready.is_none())
}

/// Parses the query of a call without parameters.
pub(super) fn parse_none(query: &str) -> Result<(), String> {
    Query::parse(query, &[]).map(drop)
}

/// Decoded query: names and values, each name once.
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// Decodes a query that may have the parameters `known`. An error is a sentence for the caller.
    pub(super) fn parse(query: &str, known: &[&str]) -> Result<Self, String> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, value) = (decode(name)?, decode(value)?);
            if !known.contains(&name.as_str()) {
                return Err(unknown(&name, known));
            }
            if pairs.iter().any(|(other, _)| *other == name) {
                return Err(format!("The parameter {name:?} is given more than once."));
            }
            pairs.push((name, value));
        }
        Ok(Self(pairs))
    }

    /// Returns the value of a parameter.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    /// Returns the value of a parameter that is a duration.
    pub(super) fn duration(&self, name: &str) -> Result<Option<Duration>, String> {
        let duration = self.get(name).map(parse_duration).transpose();
        duration.map_err(|error| wrong(name, &error))
    }

    /// Returns the meaning of a parameter that is one of some words.
    pub(super) fn one_of<T: Copy>(
        &self,
        name: &str,
        allowed: &[(&str, T)],
    ) -> Result<Option<T>, String> {
        let Some(value) = self.get(name) else { return Ok(None) };
        if let Some((_, found)) = allowed.iter().find(|(word, _)| *word == value) {
            return Ok(Some(*found));
        }
        let words: Vec<&str> = allowed.iter().map(|(word, _)| *word).collect();
        let meant = did_you_mean(value, &words);
        Err(wrong(name, &format!("{value:?} is not known; write {}{meant}", choice(&words))))
    }

    /// Returns the address of an upstream, which has to be there.
    fn upstream(&self) -> Result<Address, String> {
        let Some(text) = self.get("addr") else {
            return Err(wrong("addr", "it is missing; write one such as addr=localhost:3003"));
        };
        Address::of_server(text).map_err(|error| wrong("addr", &error))
    }

    fn check(&self) -> Result<Check, String> {
        let words = [("connect", Check::Connect), ("none", Check::None)];
        Ok(self.one_of("check", &words)?.unwrap_or(Check::Connect))
    }

    /// Returns the name of a pause.
    pub(super) fn name(&self) -> Result<Option<String>, String> {
        let Some(name) = self.get("name") else { return Ok(None) };
        if name.is_empty() {
            return Err(wrong("name", "it is empty; write one such as deploy, or leave it out"));
        }
        text("name", name, NAME_BYTES_MAX).map(Some)
    }

    /// Returns the reason, if there is one that is not empty.
    fn reason(&self) -> Result<Option<String>, String> {
        let reason = self.get("reason").filter(|reason| !reason.is_empty());
        reason.map(|reason| text("reason", reason, REASON_BYTES_MAX)).transpose()
    }

    fn quiet(&self) -> Result<Option<Quiet>, String> {
        let quiet = self.get("drain").map(parse_quiet).transpose();
        quiet.map_err(|error| wrong("drain", &error))
    }
}

/// Returns the sentence about a parameter that is wrong.
pub(super) fn wrong(name: &str, text: &str) -> String {
    sentence(format!("The parameter {name:?}: {text}"))
}

fn unknown(name: &str, known: &[&str]) -> String {
    let taken = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    let meant = did_you_mean(name, known);
    sentence(format!("The parameter {name:?} is not known: this call takes {taken}{meant}"))
}

/// Ends a text with a full stop, unless a question mark ends it.
fn sentence(text: String) -> String {
    if text.ends_with('?') { text } else { text + "." }
}

fn did_you_mean(word: &str, known: &[&str]) -> String {
    nearest(word, known.iter().copied())
        .map(|known| format!(" (did you mean {known}?)"))
        .unwrap_or_default()
}

/// Checks a text that operators are shown as it is.
fn text(parameter: &str, text: &str, bytes_max: usize) -> Result<String, String> {
    if text.len() > bytes_max {
        let text = format!("it has {} bytes; at most {bytes_max} are taken", text.len());
        return Err(wrong(parameter, &text));
    }
    // A character that the standard library escapes does not print as it is, but for quotes.
    let unquoted = text.replace(['"', '\'', '\\'], "_");
    if !unquoted.escape_debug().eq(unquoted.chars()) {
        return Err(wrong(parameter, &format!("{text:?} holds characters that do not print")));
    }
    Ok(text.to_owned())
}

/// Undoes the percent-encoding of a query's name or value.
fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
                let value =
                    digit().zip(digit()).and_then(|(high, low)| u8::try_from(high * 16 + low).ok());
                value.ok_or("The query holds a % that two hexadecimal digits do not follow.")?
            }
            _ => byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| "The query is not UTF-8.".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_read_by_the_table() {
        let bare = Pause {
            name: "default".into(),
            reason: None,
            ttl: None,
            mode: None,
            quiet: None,
            half_closed: None,
            wait: None,
            is_bound: false,
        };
        assert_eq!(Pause::parse("").unwrap(), bare);
        let second = Duration::from_secs(1);
        let all = "name=a+b%C3%A9&reason=it's%20%22v2%22&ttl=90s&mode=reject&wait=0s&on-timeout=kill&drain=quiet:1s&half-closed=drop&while=connected";
        let wait = |on_timeout| Some(Wait { time: Duration::ZERO, on_timeout });
        let expected = Pause {
            name: "a bé".into(),
            reason: Some("it's \"v2\"".into()),
            ttl: Some(90 * second),
            mode: Some(Mode::Reject),
            quiet: Some(Quiet::Any(second)),
            half_closed: Some(HalfClosed::Drop),
            wait: wait(OnTimeout::Kill),
            is_bound: true,
        };
        assert_eq!(Pause::parse(all).unwrap(), expected);
        let expected = Pause { wait: wait(OnTimeout::Resume), mode: Some(Mode::Hold), ..bare };
        assert_eq!(Pause::parse("wait=0s&mode=hold&reason=").unwrap(), expected);
        let postgres = Pause::parse("drain=quiet:1s,postgres").unwrap();
        assert_eq!(postgres.quiet, Some(Quiet::Postgres(second)));
    }

    #[test]
    fn what_is_wrong_is_named_with_the_remedy() {
        let long = |name: &str, length| format!("{name}={}", "x".repeat(length));
        let (long_name, long_reason) = (long("name", 65), long("reason", 201));
        for (query, parts) in [
            ("tll=1s", ["tll", "while (did you mean ttl?)."]),
            ("ttl", ["ttl", "30s"]),
            ("ttl=0s", ["ttl", "90s"]),
            ("ttl=5", ["ttl", "5s"]),
            ("ttl=1s&ttl=1s", ["ttl", "more than once"]),
            ("mode=rejct", ["mode", "write hold or reject (did you mean reject?)."]),
            ("mode=", ["mode", "hold or reject"]),
            ("wait=x", ["wait", "30s"]),
            ("on-timeout=keep", ["on-timeout", "wait=30s"]),
            ("wait=1s&on-timeout=stop", ["on-timeout", "resume, keep or kill."]),
            ("wait=1s&on-timeout=keep&while=connected", ["on-timeout", "use resume or kill"]),
            ("while=conected", ["while", "connected"]),
            ("drain=2s", ["drain", "quiet:2s"]),
            ("half-closed=close", ["half-closed", "write serve or drop."]),
            ("half-close=drop", ["half-close", "did you mean half-closed?"]),
            ("drain=quiet:99ms", ["drain", "quiet:100ms"]),
            ("drain=quiet:", ["drain", "30s"]),
            ("drain=quiet:2s,", ["drain", "quiet:2s,postgres"]),
            ("drain=quiet:2s,postgre", ["drain", "(did you mean postgres?)."]),
            ("drain=quiet:99ms,postgres", ["drain", "quiet:100ms"]),
            ("name=", ["name", "deploy"]),
            ("name=a%00", ["name", "do not print"]),
            ("name=a%0A", ["name", "do not print"]),
            ("reason=%E2%80%AEa", ["reason", "do not print"]),
            (&long_name, ["name", "64"]),
            (&long_reason, ["reason", "200"]),
        ] {
            let error = Pause::parse(query).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{query}: {error}");
            assert!(!error.contains("?.") && !error.contains("?:"), "{query}: {error}");
            assert!(error.ends_with(['.', '?']), "{query}: {error}");
        }
        assert!(
            Pause::parse(&long("name", 64)).is_ok() && Pause::parse(&long("reason", 200)).is_ok()
        );
    }

    #[test]
    fn a_resume_is_of_all_of_one_or_of_a_few_clients() {
        let lift =
            |name: Option<&str>, force| Ok(Resume::Lift { name: name.map(str::to_owned), force });
        assert_eq!(Resume::parse(""), lift(None, false));
        assert_eq!(Resume::parse("name=a"), lift(Some("a"), false));
        assert_eq!(Resume::parse("force=yes"), lift(None, true));
        assert_eq!(Resume::parse("force=yes&name=fleet/a"), lift(Some("fleet/a"), true));
        assert_eq!(Resume::parse("release=3"), Ok(Resume::Release(3)));
        for query in [
            "name=",
            "force=no",
            "force",
            "release=",
            "release=0",
            "release=-1",
            "release=x",
            "name=a&release=1",
            "force=yes&release=1",
        ] {
            assert!(Resume::parse(query).unwrap_err().contains("The parameter"), "{query}");
        }
    }

    #[test]
    fn a_switch_names_an_upstream_and_its_check() {
        let to = |port| Address::tcp("localhost", port);
        let switch = |to, check| Ok(Switch { to, check });
        for (query, port, check) in [
            ("addr=localhost:3003", 3003, Check::Connect),
            ("addr=tcp%3A%2F%2Flocalhost:3003&check=connect", 3003, Check::Connect),
            ("check=none&addr=localhost:1", 1, Check::None),
        ] {
            assert_eq!(Switch::parse(query), switch(Some(to(port)), check));
        }
        assert_eq!(Switch::parse_back(""), switch(None, Check::Connect));
        assert_eq!(Switch::parse_back("check=none"), switch(None, Check::None));
        let second = Some(Duration::from_secs(1));
        assert_eq!(parse_wait_upstream("addr=localhost:2&timeout=1s"), Ok((to(2), second)));
        assert_eq!(parse_wait_upstream("addr=localhost:2"), Ok((to(2), None)));
        for (query, part) in [
            ("", "addr=localhost:3003"),
            ("addr=", "an address is missing"),
            ("addr=localhost", "lacks a port"),
            ("addr=localhost:0", "has port 0"),
            ("addr=:80", "did you mean `localhost:80`?"),
            ("adr=localhost:1", "did you mean addr?"),
            ("addr=localhost:1&check=connet", "write connect or none (did you mean connect?)"),
        ] {
            let error = Switch::parse(query).unwrap_err();
            assert!(error.contains(part) && error.ends_with(['.', '?']), "{query}: {error}");
        }
        assert!(Switch::parse_back("addr=localhost:1").unwrap_err().contains("takes check."));
        assert!(parse_wait_upstream("timeout=1s").unwrap_err().contains("it is missing"));
    }

    #[test]
    fn a_wait_takes_a_timeout() {
        let seconds = |seconds| Ok(Some(Duration::from_secs(seconds)));
        assert_eq!(parse_wait(""), Ok(None));
        assert_eq!(parse_wait("?timeout=30s").map_err(drop), Err(()));
        assert_eq!(parse_wait("&%74imeout=%33%30s&"), seconds(30));
        assert_eq!((parse_ready(""), parse_ready("paused=503")), (Ok(true), Ok(false)));
        for (query, part) in
            [("paused=200", "write 503"), ("paused", "503"), ("pausd=503", "paused")]
        {
            assert!(parse_ready(query).unwrap_err().contains(part), "{query}");
        }
        assert!(parse_none("").is_ok() && parse_none("a").unwrap_err().contains("none"));
    }
}

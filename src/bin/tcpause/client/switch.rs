//! `tcpause switch`: leads new connections to another server, and waits for the end of those to others.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use serde_json::Value;
use tcpause::{Address, format_duration};

use super::{Api, Failure, duration, http};
use crate::{cli::Invocation, logger::OneLine, print};

/// Longest time of a switch beyond that of an answer, for an `upstream.connect-timeout` that is far longer than usual.
const SWITCH_TIMEOUT: Duration = Duration::from_secs(120);

/// Longest time that connections that were reset may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Switches, and prints where connections lead from now on.
pub(super) fn run(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    if invocation.asked("on-timeout").is_some() && invocation.asked("wait").is_none() {
        let text = "--on-timeout: it says how --wait ends: add one such as --wait 5m";
        return Err(Failure::Usage(text.to_owned()));
    }
    let kills = invocation.asked("on-timeout") == Some("kill");
    let text = invocation.arguments.first().map_or("", String::as_str);
    // An address that is wrong is told before anything is asked.
    let address: Address =
        text.parse().map_err(|error| Failure::Usage(format!("switch: {error}")))?;
    let check = invocation.asked("check").unwrap_or("connect");
    let parameters = [("addr", address.to_string()), ("check", check.to_owned())];
    let parameters = parameters.each_ref().map(|(name, value)| (*name, value.as_str()));
    let target = http::target("/upstream", &parameters);
    let answer = api.ask("PUT", &target, Some(SWITCH_TIMEOUT))?;
    if answer.status != 200 {
        return Err(match Failure::refused(api, &answer) {
            // The address is an argument here, and no option.
            Failure::Usage(text) => Failure::Usage(text.replacen("--addr:", "switch:", 1)),
            other => other,
        });
    }
    let body = answer.json();
    let present = body.get("upstream").and_then(Value::as_str).unwrap_or(text);
    let lasts = match body.get("persistent") {
        Some(Value::Bool(true)) => "",
        _ => ", until the next start",
    };
    let others = others(&body, present);
    let Some(wait) = duration(invocation, "wait") else {
        let line = format!("switched to {present}{lasts}{}", left(&others));
        return Ok(print(&format!("{}\n", OneLine(line)))?);
    };
    let begin = Instant::now();
    for (upstream, _active) in &others {
        let left = wait.saturating_sub(begin.elapsed());
        match await_end(api, present, upstream, left) {
            Err(Failure::NotNow(_)) if kills => {
                kill(api, upstream)?;
                await_end(api, present, upstream, KILL_TIMEOUT)?;
            }
            ended => ended?,
        }
    }
    let waited = begin.elapsed().as_secs_f64();
    let line = format!("switched to {present}{lasts}, the only one after {waited:.1}s");
    Ok(print(&format!("{}\n", OneLine(line)))?)
}

/// Returns the other servers that have connections, each with their number.
fn others(body: &Value, present: &str) -> Vec<(String, u64)> {
    let listed = body.get("connections").and_then(Value::as_array).into_iter().flatten();
    let all = listed.filter_map(|it| {
        Some((it.get("upstream")?.as_str()?.to_owned(), it.get("active")?.as_u64()?))
    });
    all.filter(|(upstream, active)| upstream != present && *active > 0).collect()
}

/// Tells the connections that are left, as the end of a line.
fn left(others: &[(String, u64)]) -> String {
    let left = others.iter().map(|(upstream, active)| format!("{active} at {upstream}"));
    let left: Vec<String> = left.collect();
    if left.is_empty() { String::new() } else { format!("; connections left: {}", left.join(", ")) }
}

/// Has all connections to `upstream` reset.
fn kill(api: &Api, upstream: &str) -> Result<(), Failure> {
    let target = http::target("/connections", &[("upstream", upstream), ("how", "reset")]);
    let answer = api.ask("DELETE", &target, None)?;
    if answer.status == 200 { Ok(()) } else { Err(Failure::refused(api, &answer)) }
}

/// Waits until no connection to `upstream` is left.
fn await_end(api: &Api, present: &str, upstream: &str, wait: Duration) -> Result<(), Failure> {
    let timeout = format_duration(wait);
    let parameters = [("addr", upstream), ("timeout", timeout.as_str())];
    let target = http::target("/upstream/block-until-idle", &parameters);
    let answer = api.ask("GET", &target, Some(wait))?;
    match answer.status {
        204 => Ok(()),
        504 => {
            let active = answer.json().get("active").and_then(Value::as_u64).unwrap_or_default();
            Err(Failure::NotNow(format!(
                "switched to {present}, but the time is up, connections left: {active} at {upstream}"
            )))
        }
        _ => Err(Failure::refused(api, &answer)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_to_other_servers_are_told() {
        let body = r#"{"connections": [
            {"upstream": "tcp://a:1", "active": 2}, {"upstream": "tcp://b:1", "active": 3},
            {"upstream": "tcp://c:1", "active": 0}, {"upstream": "tcp://d:1", "active": 1}
        ]}"#;
        let others = others(&serde_json::from_str(body).unwrap(), "tcp://b:1");
        assert_eq!(left(&others), "; connections left: 2 at tcp://a:1, 1 at tcp://d:1");
        assert_eq!(left(&[]), "");
    }
}

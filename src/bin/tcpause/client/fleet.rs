//! The fleet of a running proxy: the table of its hosts, the end of a pause, and the end of a host's membership.

use std::process::ExitCode;

use serde_json::Value;
use tcpause::Rfc3339;

use super::{
    Answer, Api, Failure, http,
    screen::{watch, write},
    table::age,
};
use crate::{cli::Invocation, logger::OneLine, print};

/// Width of a terminal, which the table does not exceed.
const COLUMNS: usize = 80;
/// Longest name of a host that is shown whole.
const HOST_CHARS_MAX: usize = 22;
/// Most hosts that an error names.
const HOSTS_NAMED_MAX: usize = 8;

/// Shows the table, once or repeatedly.
pub(super) fn show(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    let is_raw = invocation.asked("json").is_some();
    let look = || -> Result<String, Failure> {
        let answer = ask(api)?;
        let raw = || String::from_utf8_lossy(&answer.body).into_owned();
        Ok(if is_raw { raw() } else { table(&answer.json()) })
    };
    if invocation.asked("watch").is_none() {
        write(look()?.as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut gap = "";
    watch(is_raw, || match look()? {
        text if is_raw => Ok(text),
        text => Ok(format!("{}{}\n{text}", std::mem::replace(&mut gap, "\n"), Rfc3339::now())),
    })
}

/// Ends the pause that the command line names, on all hosts.
pub(super) fn resume(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    if invocation.asked("release").is_some() {
        let text = "--release: it lets clients of one host through; leave out either it or --fleet";
        return Err(Failure::Usage(text.to_owned()));
    }
    let argument = invocation.arguments.first().map(String::as_str);
    let name = match (argument, invocation.asked("name")) {
        (Some(name), None) | (None, Some(name)) => name,
        (Some(_), Some(_)) => {
            let text = "resume: the name is given twice; leave out --name";
            return Err(Failure::Usage(text.to_owned()));
        }
        (None, None) => {
            let text =
                "resume: name the pause, as status --fleet shows it: tcpause resume --fleet deploy";
            return Err(Failure::Usage(text.to_owned()));
        }
    };
    let table = ask(api)?.json();
    let pauses = rows(&table, "pauses").iter().map(|pause| text(pause, "name"));
    let pauses: Vec<String> = pauses.collect();
    if !pauses.iter().any(|pause| pause == name) {
        let what = match pauses.as_slice() {
            [] => "the fleet is not paused".to_owned(),
            _ => format!("these hold: {}", pauses.join(", ")),
        };
        return Err(Failure::NotNow(format!("there is no pause {name:?} of the fleet; {what}")));
    }
    let answer = api.ask("DELETE", &http::target("/fleet/paused", &[("name", name)]), None)?;
    if answer.status != 204 {
        return Err(Failure::refused(api, &answer));
    }
    Ok(print(&format!("lifted: {} on all hosts\n", OneLine(name)))?)
}

/// Carries out the word behind `fleet`, of which there is one.
pub(super) fn forget(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    let host = invocation.arguments.get(1).map_or("", String::as_str);
    let answer = api.ask("DELETE", &http::target("/fleet/hosts", &[("host", host)]), None)?;
    match answer.status {
        204 => Ok(print(&format!("forgotten: {}\n", OneLine(host)))?),
        _ => Err(match Failure::refused(api, &answer) {
            // The host is an argument here, and no option.
            Failure::Usage(text) => Failure::Usage(text.replacen("--host:", "fleet forget:", 1)),
            other => other,
        }),
    }
}

/// Returns the hosts that a pause has waited for in vain, as the end of a line; `None` if the answer tells none.
pub(super) fn hosts_left(body: &Value) -> Option<String> {
    body.get("waiting_for")?;
    let hosts = rows(body, "waiting_for");
    let named = hosts
        .iter()
        .take(HOSTS_NAMED_MAX)
        .map(|host| format!("{}: {}", text(host, "host"), text(host, "why")));
    let named: Vec<String> = named.collect();
    let more = match hosts.len() - named.len() {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    Some(format!("hosts left: {} ({}{more})", hosts.len(), named.join("; ")))
}

fn ask(api: &Api) -> Result<Answer, Failure> {
    let answer = api.ask("GET", "/fleet/status", None)?;
    match answer.status {
        200 if answer.json().get("hosts").is_some_and(Value::is_array) => Ok(answer),
        _ => Err(Failure::refused(api, &answer)),
    }
}

fn rows<'a>(body: &'a Value, name: &str) -> &'a [Value] {
    body.get(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn text(row: &Value, name: &str) -> String {
    match row.get(name) {
        Some(Value::String(text)) => OneLine(text).to_string(),
        _ => "-".to_owned(),
    }
}

/// Returns the pauses and hosts as lines. A mark stands before each host that a pause waits for, or would wait for.
fn table(body: &Value) -> String {
    const HEAD: [&str; 8] =
        ["  HOST", "STATE", "HELD", "ACTIVE", "OLDEST", "NEWS", "POLICY", "VERSION"];

    let hosts = rows(body, "hosts");
    let blocking = hosts.iter().filter(|host| is_blocking(host)).count();
    let mut head = vec![("fleet", text(body, "name"))];
    for pause in rows(body, "pauses") {
        head.push(("pause", paused(pause)));
        if pause.get("reason").is_some_and(Value::is_string) {
            head.push(("", text(pause, "reason")));
        }
    }
    let count = match blocking {
        0 => format!("{}, none of them blocks a pause", hosts.len()),
        _ => format!("{}, those that block a pause are marked: {blocking}", hosts.len()),
    };
    head.push(("hosts", count));
    let mut lines: Vec<String> =
        head.into_iter().map(|(name, value)| cut(&format!("{name:8}{value}"), COLUMNS)).collect();
    lines.push(String::new());
    let mut cells = vec![HEAD.map(str::to_owned)];
    cells.extend(hosts.iter().map(host));
    let mut widths = [0; HEAD.len()];
    for line in &cells {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    lines.extend(cells.iter().map(|line| {
        let cells = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cut(cells.collect::<Vec<_>>().join("  ").trim_end(), COLUMNS)
    }));
    lines.join("\n") + "\n"
}

fn is_blocking(host: &Value) -> bool {
    host.get("why").is_some_and(Value::is_string)
}

/// Returns a pause as a line: its name, its caller, its begin, and the fact that nobody looks after it.
fn paused(pause: &Value) -> String {
    let by = match text(pause, "by").as_str() {
        "-" => String::new(),
        by => format!(" by {by}"),
    };
    let since = match text(pause, "since").as_str() {
        "-" => String::new(),
        since => format!(" since {since}"),
    };
    let is_alone = pause.get("has_holder") == Some(&Value::Bool(false));
    let alone = if is_alone { ", ends soon: its host is gone" } else { "" };
    format!("{}{by}{since}{alone}", text(pause, "name"))
}

/// Returns the cells of a host's line.
fn host(row: &Value) -> [String; 8] {
    let mark = if is_blocking(row) { "! " } else { "  " };
    let count = |name: &str| {
        row.get(name).and_then(Value::as_u64).map_or("-".to_owned(), |count| count.to_string())
    };
    let time = |name: &str| row.get(name).and_then(Value::as_f64).map_or("-".to_owned(), age);
    [
        mark.to_owned() + &cut(&text(row, "host"), HOST_CHARS_MAX),
        text(row, "state"),
        count("held"),
        count("active"),
        time("oldest_seconds"),
        time("age_seconds"),
        text(row, "on_disconnect"),
        text(row, "version"),
    ]
}

/// Cuts a text to so many letters.
fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn hosts_that_block_are_seen_at_a_glance() {
        let body = json!({
            "name": "shop",
            "pauses": [
                {
                    "name": "deploy", "by": "uid 0, pid 4711 on web-1", "reason": "fail over now",
                    "since": "2026-11-24T11:45:35.000Z", "has_holder": true,
                },
                {"name": "old", "by": null, "reason": null, "since": null, "has_holder": false},
            ],
            "hosts": [
                {
                    "host": "web-17", "state": "lost", "why": "lost for 40 s", "held": null, "active": null,
                    "oldest_seconds": null, "age_seconds": 40.2, "version": "0.1.0", "on_disconnect": "serve",
                },
                {
                    "host": "web-3", "state": "busy", "why": "carries 3", "held": 12, "active": 3,
                    "oldest_seconds": 12, "age_seconds": 0.25, "version": "0.1.0", "on_disconnect": "hold",
                },
                {
                    "host": "web-1", "state": "idle", "why": null, "held": 7, "active": 0,
                    "oldest_seconds": null, "age_seconds": null, "version": null, "on_disconnect": null,
                },
            ],
        });
        let expected = "\
fleet   shop
pause   deploy by uid 0, pid 4711 on web-1 since 2026-11-24T11:45:35.000Z
        fail over now
pause   old, ends soon: its host is gone
hosts   3, those that block a pause are marked: 2

  HOST    STATE  HELD  ACTIVE  OLDEST  NEWS   POLICY  VERSION
! web-17  lost   -     -       -       40s    serve   0.1.0
! web-3   busy   12    3       12s     250ms  hold    0.1.0
  web-1   idle   7     0       -       -      -       -
";
        assert_eq!(table(&body), expected);
    }

    #[test]
    fn the_table_fits_a_terminal() {
        let host = json!({
            "host": "x".repeat(64), "state": "serving", "why": "has not answered", "held": 100_000,
            "active": 100_000, "oldest_seconds": 86_399, "age_seconds": 86_399.0,
            "version": "10.20.30-rc.1", "on_disconnect": "serve",
        });
        let pause =
            json!({"name": "n".repeat(58), "by": "b".repeat(100), "reason": "r".repeat(100)});
        let text = table(&json!({"name": "f".repeat(64), "pauses": [pause], "hosts": [host]}));
        assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
        assert!(text.contains("\n! xxxxxxxxxxxxxxxxxxxxx…  serving"), "{text}");
        let none = table(&json!({"name": "f", "pauses": [], "hosts": []}));
        assert!(none.contains("hosts   0, none of them blocks a pause\n"), "{none}");
    }

    #[test]
    fn hosts_that_are_left_are_named() {
        let host = |number| json!({"host": format!("web-{number}"), "why": "has not answered"});
        let body = |hosts: Vec<Value>| json!({"waiting_for": hosts});
        let two = hosts_left(&body(vec![host(1), host(2)])).unwrap();
        assert_eq!(two, "hosts left: 2 (web-1: has not answered; web-2: has not answered)");
        let many = hosts_left(&body((0..20).map(host).collect())).unwrap();
        assert!(many.contains("20 (web-0:") && many.ends_with("; and 12 more)"), "{many}");
        assert_eq!(hosts_left(&json!({"active": 3})), None);
    }
}

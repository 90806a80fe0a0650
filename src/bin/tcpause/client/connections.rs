//! `tcpause connections` and `tcpause kill`: the connections of a running proxy, and the end of some.

use std::process::ExitCode;

use serde_json::Value;
use tcpause::Rfc3339;

use super::{
    Answer, Api, Failure, http, parameters,
    screen::{watch, write},
    table::{Bytes, age},
};
use crate::{cli::Invocation, logger::OneLine, print};

/// Options by which connections are chosen, as the API calls them.
const FILTERS: [&str; 5] = ["state", "client", "upstream", "older", "idle"];
/// Connections that are shown, if the command line names no number.
const LIMIT_DEFAULT: usize = 100;
/// Most connections of a page.
const PAGE_MAX: usize = 200;

/// Shows the list, once or repeatedly.
pub(super) fn list(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    let is_raw = invocation.asked("json").is_some();
    if invocation.asked("watch").is_none() {
        write(look(api, invocation, is_raw)?.as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut gap = "";
    watch(is_raw, || {
        let text = look(api, invocation, is_raw)?;
        if is_raw {
            return Ok(text);
        }
        Ok(format!("{}{}\n{text}", std::mem::replace(&mut gap, "\n"), Rfc3339::now()))
    })
}

/// Asks for as many pages as are to be shown. Returns them as they are, or as a table.
fn look(api: &Api, invocation: &Invocation, is_raw: bool) -> Result<String, Failure> {
    let limit = invocation.asked("limit").and_then(|limit| limit.parse().ok());
    let mut left = limit.unwrap_or(LIMIT_DEFAULT);
    let (mut pages, mut raw, mut after) = (Vec::new(), String::new(), None);
    while left > 0 {
        let page = left.min(PAGE_MAX).to_string();
        let mut asked = parameters(invocation, &FILTERS);
        asked.push(("limit", &page));
        asked.extend(after.as_deref().map(|after| ("after", after)));
        let answer = api.ask("GET", &http::target("/connections", &asked), None)?;
        let body = read(api, &answer)?;
        raw.push_str(&String::from_utf8_lossy(&answer.body));
        left -= rows(&body).len().clamp(1, left);
        after = body.get("next").and_then(Value::as_str).map(str::to_owned);
        pages.push(body);
        if after.is_none() {
            break;
        }
    }
    Ok(if is_raw { raw } else { table(&pages) })
}

fn read(api: &Api, answer: &Answer) -> Result<Value, Failure> {
    let body = answer.json();
    match answer.status {
        200 if body.get("connections").is_some_and(Value::is_array) => Ok(body),
        _ => Err(Failure::refused(api, answer)),
    }
}

fn rows(page: &Value) -> &[Value] {
    page.get("connections").and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Returns the pages as one table, each column as wide as its widest cell.
fn table(pages: &[Value]) -> String {
    const HEAD: [&str; 9] =
        ["ID", "STATE", "CLIENT", "UPSTREAM", "AGE", "IDLE", "HELD", "TO UPSTREAM", "TO CLIENT"];

    let mut lines = vec![HEAD.map(str::to_owned)];
    lines.extend(pages.iter().flat_map(rows).map(cells));
    let (shown, total) =
        (lines.len() - 1, pages.last().and_then(|page| page.get("total")?.as_u64()));
    let mut widths = [0; HEAD.len()];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for line in lines {
        let cells = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    if let Some(total) = total.filter(|total| *total > shown as u64) {
        text.extend([format!("{shown} of {total}\n")]);
    }
    let steered = pages.last().and_then(|page| page.get("steered")?.as_u64());
    if let Some(steered) = steered.filter(|steered| *steered > 0) {
        text.extend([format!("steered, and not listed: {steered}\n")]);
    }
    text
}

/// Returns the cells of a connection's line.
fn cells(row: &Value) -> [String; 9] {
    let field = |name: &str| row.get(name).cloned().unwrap_or_default();
    let text = |name| match field(name) {
        Value::String(text) => OneLine(text).to_string(),
        _ => "-".to_owned(),
    };
    let time = |name| field(name).as_f64().map_or("-".to_owned(), age);
    let bytes = |name| Bytes(field(name).as_u64().unwrap_or_default()).to_string();
    let half_closed = if field("half_closed") == true { ", half-closed" } else { "" };
    [
        text("id"),
        text("state") + half_closed,
        text("client"),
        text("upstream"),
        time("age_seconds"),
        time("idle_seconds"),
        time("held_seconds"),
        bytes("bytes_to_upstream"),
        bytes("bytes_to_client"),
    ]
}

/// Ends connections, and prints their number.
pub(super) fn kill(api: &Api, invocation: &Invocation) -> Result<ExitCode, Failure> {
    let is_given = |name: &&str| invocation.asked(name).is_some();
    let killed = match invocation.arguments.as_slice() {
        [] => kill_chosen(api, invocation)?,
        _ if FILTERS.iter().chain(&["all", "spread"]).any(is_given) => {
            let text =
                "kill: ids go with --how alone; leave out either the ids or the other options";
            return Err(Failure::Usage(text.to_owned()));
        }
        ids => {
            let mut killed = 0;
            for id in ids {
                killed += kill_one(api, invocation, id)?;
            }
            killed
        }
    };
    if killed == 0 {
        return Err(Failure::NotNow("there is no such connection".to_owned()));
    }
    Ok(print(&format!("killed: {killed}\n"))?)
}

fn kill_chosen(api: &Api, invocation: &Invocation) -> Result<u64, Failure> {
    let mut asked = parameters(invocation, &FILTERS);
    if asked.is_empty() && invocation.asked("all").is_none() {
        let text = "kill: say which: add ids, an option such as --client or --older, or --all";
        return Err(Failure::Usage(text.to_owned()));
    }
    asked.extend(parameters(invocation, &["all", "how", "spread"]));
    let answer = api.ask("DELETE", &http::target("/connections", &asked), None)?;
    match (answer.status, answer.json().get("closed").and_then(Value::as_u64)) {
        (200, Some(closed)) => Ok(closed),
        _ => Err(Failure::refused(api, &answer)),
    }
}

/// Ends one connection. Returns their number, which is 0 if it has ended already.
fn kill_one(api: &Api, invocation: &Invocation, id: &str) -> Result<u64, Failure> {
    if !id.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        let text = format!("{id:?} is no id of a connection; write one such as 1.48213");
        return Err(Failure::Usage(text));
    }
    let asked = parameters(invocation, &["how"]);
    let answer = api.ask("DELETE", &http::target(&format!("/connections/{id}"), &asked), None)?;
    match answer.status {
        204 => Ok(1),
        404 if answer.json().get("error").is_some() => Ok(0),
        _ => Err(Failure::refused(api, &answer)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_a_table() {
        let page = serde_json::json!({
            "total": 9, "next": "0.48213", "steered": 12,
            "connections": [
                {
                    "id": "1.7", "state": "active", "client": "tcp://10.0.0.7:51544",
                    "upstream": "tcp://127.0.0.1:3002", "age_seconds": 31.2, "idle_seconds": 4.0, "held_seconds": 1.2,
                    "bytes_to_upstream": 5120, "bytes_to_client": 88213, "half_closed": true, "owes": "upstream",
                },
                {
                    "id": "0.48213", "state": "held", "client": "uid 33, pid 812", "upstream": null,
                    "age_seconds": 0.25, "idle_seconds": null, "held_seconds": 0.25,
                    "bytes_to_upstream": 0, "bytes_to_client": 0, "half_closed": false, "owes": null,
                },
            ],
        });
        let expected = "\
ID       STATE                CLIENT                UPSTREAM              AGE    IDLE  HELD   TO UPSTREAM  TO CLIENT
1.7      active, half-closed  tcp://10.0.0.7:51544  tcp://127.0.0.1:3002  31s    4s    1s     5.0 KiB      86.1 KiB
0.48213  held                 uid 33, pid 812       -                     250ms  -     250ms  0 B          0 B
2 of 9
steered, and not listed: 12
";
        assert_eq!(table(&[page]), expected);
    }
}

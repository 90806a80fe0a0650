//! Requests about single connections: the list of them, and kills.

use std::time::Duration;

use serde::Serialize;

use super::{
    command::Caller,
    query::{Query, wrong},
    response::Response,
};
use crate::{
    config::{address::Address, duration::format_duration},
    handle::Handle,
    listing::{ConnectionId, ConnectionState, Entry, Filter, KillMode, Purpose},
};

/// Path of the list. Behind it and a slash stands an id.
pub(super) const PATH: &str = "/connections";

/// Parameters of `GET /connections`.
const LIST: &[&str] = &["state", "client", "upstream", "older", "idle", "limit", "after"];
/// Parameters of `DELETE /connections`.
const KILL: &[&str] = &["state", "client", "upstream", "older", "idle", "all", "how", "spread"];
/// Parameters of `DELETE /connections/ID`.
const KILL_ONE: &[&str] = &["how"];

/// Entries of a page, if the request names no number.
const LIMIT_DEFAULT: usize = 100;
/// Most entries of a page. One has up to 300 bytes, or some more with the longest paths. The backend takes an answer of 64 KiB,
/// and a longer one is written without it.
const LIMIT_MAX: usize = 200;
/// Longest time over which kills are spread.
const SPREAD_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Parsed parameters of the requests that choose connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Choice {
    /// Conditions, but for that on the upstream.
    filter: Filter,
    upstream: Option<Address>,
    purpose: Purpose,
}

/// Page of the list.
#[derive(Debug, Serialize)]
struct Page {
    total: u64,
    connections: Vec<Entry>,
    next: Option<ConnectionId>,
    /// Connections that were steered, which no list has; none where all are relayed.
    #[serde(skip_serializing_if = "Option::is_none")]
    steered: Option<u64>,
}

impl Choice {
    /// Parses a request below [`PATH`] with a method that it knows. An error is a sentence for the caller.
    pub(super) fn parse(method: &str, path: &str, query: &str) -> Result<Self, String> {
        let id = path.strip_prefix(PATH).and_then(|rest| rest.strip_prefix('/'));
        match (method, id) {
            ("DELETE", Some(id)) => Self::parse_kill_one(id, query),
            ("DELETE", None) => Self::parse_kill(query),
            _ => Self::parse_list(query),
        }
    }

    /// Parses the query of a list.
    fn parse_list(query: &str) -> Result<Self, String> {
        let query = Query::parse(query, LIST)?;
        let after = query.get("after").map(str::parse).transpose();
        let after = after.map_err(|error: String| wrong("after", &error))?;
        let limit = query.get("limit").map_or(Ok(LIMIT_DEFAULT), |text| {
            let limit = text.parse().ok().filter(|limit| (1..=LIMIT_MAX).contains(limit));
            let error =
                format!("{text:?} is no size of a page; write a number from 1 to {LIMIT_MAX}");
            limit.ok_or_else(|| wrong("limit", &error))
        })?;
        Self::with_filter(&query, Purpose::List { after, limit })
    }

    /// Parses the query of a kill.
    fn parse_kill(query: &str) -> Result<Self, String> {
        let query = Query::parse(query, KILL)?;
        let spread = query.duration("spread")?.unwrap_or_default();
        if spread > SPREAD_MAX {
            let text = format!("{} is too long; write 24h at most", format_duration(spread));
            return Err(wrong("spread", &text));
        }
        let how = query.one_of("how", &KillMode::ALL)?.unwrap_or_default();
        let is_all = query.one_of("all", &[("true", ())])?.is_some();
        let choice = Self::with_filter(&query, Purpose::Kill { how, spread })?;
        let has_filter = choice.upstream.is_some() || choice.filter != Filter::default();
        match (has_filter, is_all) {
            (false, false) => Err("Say which: add a filter, or all=true.".to_owned()),
            (true, true) => {
                Err(wrong("all", "it does not go with a filter: leave out one of them"))
            }
            _ => Ok(choice),
        }
    }

    /// Parses the id and the query of a kill of one connection.
    fn parse_kill_one(id: &str, query: &str) -> Result<Self, String> {
        let how = Query::parse(query, KILL_ONE)?.one_of("how", &KillMode::ALL)?.unwrap_or_default();
        let filter = Filter { id: Some(parse_id(id)?), ..Filter::default() };
        let purpose = Purpose::Kill { how, spread: Duration::ZERO };
        Ok(Self { filter, upstream: None, purpose })
    }

    fn with_filter(query: &Query, purpose: Purpose) -> Result<Self, String> {
        let client = query.get("client").map(str::parse).transpose();
        let upstream = query.get("upstream").map(Address::of_server).transpose();
        let filter = Filter {
            id: None,
            state: query.one_of("state", &ConnectionState::ALL)?,
            client: client.map_err(|error: String| wrong("client", &error))?,
            upstream: None,
            older: query.duration("older")?,
            idle: query.duration("idle")?,
        };
        let upstream = upstream.map_err(|error: String| wrong("upstream", &error))?;
        Ok(Self { filter, upstream, purpose })
    }

    /// Returns true if it changes something.
    pub(super) fn is_change(&self) -> bool {
        matches!(self.purpose, Purpose::Kill { .. })
    }

    /// Selects the connections. Blocks for a second at most.
    pub(super) fn execute(self, caller: &Caller, handle: &Handle) -> Response {
        let is_change = self.is_change();
        let Self { mut filter, upstream, purpose } = self;
        let order = (is_change && upstream.is_some()).then(|| handle.try_lock_switches());
        if matches!(order, Some(None)) {
            return Response::error(503, "The upstream is being switched: try again.");
        }
        // A script that ends what is left at an old upstream may come behind a switch back. Switches wait for this one.
        if let Some(present) = upstream.as_ref().filter(|it| is_change && handle.is_upstream(it)) {
            let text = format!(
                "New connections lead to {present}: nothing was ended. Switch to another upstream before, or choose without the parameter \"upstream\"."
            );
            return Response::error(409, &text);
        }
        filter.upstream = upstream.map(Into::into);
        let id = filter.id;
        let Some(selected) = handle.select(filter, purpose) else {
            let mut text = "A worker has not answered within a second: try again.".to_owned();
            if is_change {
                let by = &caller.name;
                log::warn!(
                    "{by} has connections ended, but a worker has not answered within a second: some may have ended, and are not counted"
                );
                text += " Some connections may have been ended.";
            }
            return Response::error(503, &text);
        };
        let Purpose::Kill { how, spread } = purpose else {
            let (total, next) = (selected.total, selected.next());
            let steered = handle.pauses().steered();
            return page(&Page { total, connections: selected.entries, next, steered });
        };
        let killed = selected.total;
        if killed > 0 {
            log_kill(&caller.name, killed, how, spread);
        }
        match id {
            None => Response::json(format!("{{\"closed\": {killed}}}\n")),
            Some(_) if killed > 0 => Response::empty(204),
            Some(id) => Response::error(404, &format!("There is no connection {id} (any more).")),
        }
    }
}

fn parse_id(id: &str) -> Result<ConnectionId, String> {
    id.parse().map_err(|error| format!("{error}, as GET {PATH} shows it."))
}

fn page(page: &Page) -> Response {
    match serde_json::to_string(page) {
        // The line ends for readers at a terminal.
        Ok(body) => Response::json(body + "\n"),
        Err(error) => {
            Response::error(500, &format!("The list cannot be written as JSON: {error}."))
        }
    }
}

fn log_kill(by: &str, connections: u64, how: KillMode, spread: Duration) {
    let how = match how {
        KillMode::Reset => "reset",
        KillMode::Close => "closed",
    };
    let over = match spread {
        Duration::ZERO => String::new(),
        spread => format!(" within {}", format_duration(spread)),
    };
    log::info!(
        event = "killed", by = by, connections = connections;
        "{by} has connections {how}{over}: {connections}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_by_the_table() {
        let bare = Choice::parse_list("").unwrap();
        assert_eq!(bare.purpose, Purpose::List { after: None, limit: 100 });
        assert_eq!((bare.filter, bare.upstream), (Filter::default(), None));
        let all = "state=held&client=10.0.0.0/8&upstream=localhost:3002&older=30s&idle=5m&limit=200&after=1.48213";
        let all = Choice::parse_list(all).unwrap();
        let after = Some(ConnectionId::new(1, 48_213));
        assert_eq!(all.purpose, Purpose::List { after, limit: 200 });
        assert_eq!(all.upstream, Some(Address::tcp("localhost", 3002)));
        let expected = Filter {
            state: Some(ConnectionState::Held),
            client: Some("10.0.0.0/8".parse().unwrap()),
            older: Some(Duration::from_secs(30)),
            idle: Some(Duration::from_secs(300)),
            ..Filter::default()
        };
        assert_eq!(all.filter, expected);
        assert!(!all.is_change());
    }

    #[test]
    fn a_kill_is_read_by_the_table() {
        let kill = |how, seconds| Purpose::Kill { how, spread: Duration::from_secs(seconds) };
        for (query, purpose) in [
            ("all=true", kill(KillMode::Reset, 0)),
            ("idle=1m&how=close&spread=10s", kill(KillMode::Close, 10)),
            ("upstream=unix:///run/a.sock&how=reset", kill(KillMode::Reset, 0)),
        ] {
            let choice = Choice::parse_kill(query).unwrap();
            assert!(choice.is_change() && choice.purpose == purpose, "{query}");
        }
        let one = Choice::parse_kill_one("1.48213", "how=close").unwrap();
        assert_eq!(one.filter.id, Some(ConnectionId::new(1, 48_213)));
        assert_eq!(one.purpose, kill(KillMode::Close, 0));
    }

    #[test]
    fn what_is_wrong_is_named_with_the_remedy() {
        for (query, parts) in [
            ("stat=held", ["stat", "did you mean state?"]),
            (
                "state=hold",
                ["state", "write held, connecting, active or rejecting (did you mean held?)."],
            ),
            ("client=10.0.0/8", ["client", "\"10.0.0/8\" is no network; write 10.0.0.0/8."]),
            ("client=10.0.0.1/8", ["client", "did you mean 10.0.0.0/8?"]),
            ("upstream=3002", ["upstream", "did you mean `localhost:3002`?"]),
            ("older=5", ["older", "did you mean `5s`?"]),
            ("idle=x", ["idle", "30s"]),
            ("limit=0", ["limit", "from 1 to 200."]),
            ("limit=201", ["limit", "from 1 to 200."]),
            ("limit=", ["limit", "from 1 to 200."]),
            ("after=7", ["after", "write one such as 1.48213."]),
            ("older=1s&older=1s", ["older", "more than once"]),
        ] {
            assert_wrong(query, Choice::parse_list(query), &parts);
        }
        for (query, parts) in [
            ("", ["Say which:", "all=true."]),
            ("how=close", ["Say which:", "all=true."]),
            ("all", ["all", "write true"]),
            ("all=false", ["all", "write true"]),
            ("all=true&idle=1s", ["all", "leave out one"]),
            ("all=true&how=clos", ["how", "write reset or close (did you mean close?)."]),
            ("all=true&spread=10", ["spread", "did you mean `10s`?"]),
            ("all=true&spread=25h", ["spread", "write 24h at most."]),
            ("all=true&limit=5", ["limit", "this call takes"]),
        ] {
            assert_wrong(query, Choice::parse_kill(query), &parts);
        }
        for (id, query, parts) in [
            ("x", "", ["\"x\" is no id", "1.48213"]),
            ("", "", ["is no id", "GET /connections"]),
            ("1.2", "spread=1s", ["spread", "this call takes how"]),
        ] {
            assert_wrong(id, Choice::parse_kill_one(id, query), &parts);
        }
    }

    #[track_caller]
    fn assert_wrong(query: &str, parsed: Result<Choice, String>, parts: &[&str]) {
        let error = parsed.unwrap_err();
        assert!(parts.iter().all(|part| error.contains(part)), "{query}: {error}");
        assert!(error.ends_with(['.', '?']) && !error.contains("?."), "{query}: {error}");
    }
}

//! Table of the requests that the API answers, by which they are routed and listed.

use serde::{Deserialize, Serialize};

use super::response::{Response, TEXT};
use crate::config::address::Address;

/// Kind of request that the API answers.
struct Kind {
    method: &'static str,
    /// Path, with parameters that are often of use.
    target: &'static str,
    /// Meaning in one line.
    meaning: &'static str,
    /// Least scope of a listener that answers it.
    scope: Scope,
}

/// Requests that a listener is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Scope {
    /// Those that change nothing, at `monitor.addr`.
    ReadOnly,
    /// All, at `control.addr`.
    Full,
}

const fn look(target: &'static str, meaning: &'static str) -> Kind {
    Kind { method: "GET", target, meaning, scope: Scope::ReadOnly }
}

const fn act(method: &'static str, target: &'static str, meaning: &'static str) -> Kind {
    Kind { method, target, meaning, scope: Scope::Full }
}

/// All requests, in the order in which they are listed.
const KINDS: &[Kind] = &[
    look("/", "this list; in a browser, a page"),
    look("/status", "state, pauses and counts as JSON"),
    look("/metrics", "metrics for Prometheus"),
    look("/ready?paused=503", "200, or 503 while it stops or is paused"),
    act("GET", "/paused", "paused or not, as JSON"),
    act("PUT", "/paused?name=deploy&wait=30s", "pause, and wait until no connection is left"),
    act("DELETE", "/paused?name=deploy", "end this pause; without a name, end all"),
    act("DELETE", "/paused?release=3", "serve the three oldest held clients while paused"),
    act("GET", "/paused/block-until-idle?timeout=30s", "wait until no connection is left"),
    act("GET", "/connections?state=held&older=30s", "connections as JSON, oldest first, in pages"),
    act("DELETE", "/connections?idle=5m&spread=10s", "end the connections that a filter chooses"),
    act("DELETE", "/connections/ID", "end one connection"),
    act("GET", "/upstream", "the upstream and its connections, as JSON"),
    act("PUT", "/upstream?addr=localhost:3003", "lead new connections there, if it answers"),
    act("DELETE", "/upstream", "lead them to the configured upstream again"),
    act(
        "GET",
        "/upstream/block-until-idle?addr=localhost:3002&timeout=5m",
        "wait until it has no connection",
    ),
    look("/fleet/status", "pauses and hosts of the fleet as JSON, hosts that block first"),
    act(
        "PUT",
        "/fleet/paused?name=deploy&wait=30s",
        "pause all hosts, and wait until all are idle",
    ),
    act("DELETE", "/fleet/paused?name=deploy", "end this pause on all hosts"),
    act("DELETE", "/fleet/hosts?host=web-17", "forget a host that is lost for good"),
    act("POST", "/upgrade", "start the program anew, which goes on with all connections"),
];

impl Kind {
    /// Returns true if it is a request to `path`. One connection is named by any id.
    fn has_path(&self, path: &str) -> bool {
        let own = self.target.split('?').next().unwrap_or_default();
        match own.strip_suffix("ID") {
            Some(folder) => path.starts_with(folder),
            None => path == own,
        }
    }
}

/// Returns the methods that `path` knows, as the header `Allow` lists them; none if there is nothing.
pub(super) fn methods(path: &str, scope: Scope) -> Option<String> {
    let mut methods = Vec::new();
    for kind in KINDS.iter().filter(|kind| kind.has_path(path) && kind.scope <= scope) {
        let names = if kind.method == "GET" { &["GET", "HEAD"][..] } else { &[kind.method] };
        methods.extend(names.iter().filter(|name| !methods.contains(*name)).collect::<Vec<_>>());
    }
    (!methods.is_empty()).then(|| methods.join(", "))
}

/// Returns the list of requests, as text for a terminal. The control API listens at `control`.
pub(super) fn list(scope: Scope, control: &Address) -> Response {
    let version = env!("CARGO_PKG_VERSION");
    let example = match scope {
        Scope::ReadOnly => String::new(),
        Scope::Full => format!(", as in: curl {}/paused?name=deploy'", curl(control)),
    };
    let head = format!("tcpause {version} answers these requests{example}\n");
    let lines = KINDS
        .iter()
        .filter(|kind| kind.scope <= scope)
        .map(|Kind { method, target, meaning, .. }| format!("{method:6} {target:38} {meaning}"));
    let text = [head].into_iter().chain(lines).collect::<Vec<_>>().join("\n");
    Response::new(TEXT, text + "\n\nAll parameters: tcpause help api\n")
}

/// Returns the options and the beginning of the URL by which curl reaches an address, behind a quote.
fn curl(control: &Address) -> String {
    match control {
        Address::Unix(path) => {
            format!("-X PUT --unix-socket {} 'http://localhost", path.display())
        }
        Address::Abstract(name) => {
            format!("-X PUT --abstract-unix-socket {name} 'http://localhost")
        }
        Address::Tcp { .. } => {
            let url = control.to_string().replacen("tcp://", "http://", 1);
            format!("-X PUT '{}", url.replacen("//:", "//localhost:", 1))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_knows_its_methods() {
        let look = Some("GET, HEAD");
        for (path, read_only, full) in [
            ("/", look, look),
            ("/status", look, look),
            ("/paused", None, Some("GET, HEAD, PUT, DELETE")),
            ("/upgrade", None, Some("POST")),
            ("/fleet/status", look, look),
            ("/fleet/paused", None, Some("PUT, DELETE")),
            ("/fleet/hosts", None, Some("DELETE")),
            ("/fleet", None, None),
            ("/connections", None, Some("GET, HEAD, DELETE")),
            ("/connections/1.2", None, Some("DELETE")),
            ("/connections/", None, Some("DELETE")),
            ("/connectionsx", None, None),
            ("/upstream", None, Some("GET, HEAD, PUT, DELETE")),
            ("/upstream/block-until-idle", None, look),
            ("/paused/", None, None),
            ("", None, None),
        ] {
            assert_eq!(methods(path, Scope::ReadOnly).as_deref(), read_only, "{path}");
            assert_eq!(methods(path, Scope::Full).as_deref(), full, "{path}");
        }
    }

    #[test]
    fn the_list_fits_a_terminal() {
        for scope in [Scope::ReadOnly, Scope::Full] {
            let text = list(scope, &Address::tcp("", 3001)).body;
            assert!(
                text.lines().all(|line| line.len() <= 110 && line.trim_end() == line),
                "{text}"
            );
        }
        let list = |control: &str| list(Scope::Full, &control.parse().unwrap()).body;
        assert_eq!(list(":3001").lines().count(), 4 + KINDS.len());
        for (control, told) in [
            (":1", ": curl -X PUT 'http://localhost:1/paused?name=deploy'\n"),
            ("[::1]:1", ": curl -X PUT 'http://[::1]:1/paused"),
            ("unix:///c", ": curl -X PUT --unix-socket /c 'http://localhost/paused"),
            ("unix://@c", ": curl -X PUT --abstract-unix-socket c 'http://localhost/paused"),
        ] {
            assert!(list(control).contains(told), "{}", list(control));
        }
    }
}

//! Table of the requests that the API answers, by which they are routed and listed.

use super::response::{Response, TEXT};

/// Kind of request that the API answers.
struct Kind {
    method: &'static str,
    /// Path, with parameters that are often of use.
    target: &'static str,
    /// Meaning in one line.
    meaning: &'static str,
}

const fn kind(method: &'static str, target: &'static str, meaning: &'static str) -> Kind {
    Kind { method, target, meaning }
}

/// All requests, in the order in which they are listed.
const KINDS: &[Kind] = &[
    kind("GET", "/", "this list; in a browser, a page"),
    kind("GET", "/status", "state, pauses and counts as JSON"),
    kind("GET", "/paused", "paused or not, as JSON"),
    kind("PUT", "/paused?name=deploy&wait=30s", "pause, and wait until no connection is left"),
    kind("DELETE", "/paused?name=deploy", "end this pause; without a name, end all"),
    kind("DELETE", "/paused?release=3", "serve the three oldest held clients while paused"),
    kind("GET", "/paused/block-until-idle?timeout=30s", "wait until no connection is left"),
];

impl Kind {
    fn path(&self) -> &'static str {
        self.target.split('?').next().unwrap_or_default()
    }
}

/// Returns the methods that `path` knows, as the header `Allow` lists them; none if there is nothing.
pub(super) fn methods(path: &str) -> Option<String> {
    let mut methods = Vec::new();
    for kind in KINDS.iter().filter(|kind| kind.path() == path) {
        let names = if kind.method == "GET" { &["GET", "HEAD"][..] } else { &[kind.method] };
        methods.extend(names.iter().filter(|name| !methods.contains(*name)).collect::<Vec<_>>());
    }
    (!methods.is_empty()).then(|| methods.join(", "))
}

/// Returns the list of requests, as text for a terminal.
pub(super) fn list() -> Response {
    let version = env!("CARGO_PKG_VERSION");
    let head = format!(
        "tcpause {version} answers these requests, as in: curl -X PUT 'http://localhost:3001/paused?name=deploy'\n"
    );
    let lines = KINDS
        .iter()
        .map(|Kind { method, target, meaning }| format!("{method:6} {target:38} {meaning}"));
    let text = [head].into_iter().chain(lines).collect::<Vec<_>>().join("\n") + "\n";
    Response::new(TEXT, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_knows_its_methods() {
        for (path, methods) in [
            ("/", Some("GET, HEAD")),
            ("/status", Some("GET, HEAD")),
            ("/paused", Some("GET, HEAD, PUT, DELETE")),
            ("/paused/", None),
            ("", None),
        ] {
            assert_eq!(super::methods(path).as_deref(), methods, "{path}");
        }
    }

    #[test]
    fn the_list_fits_a_terminal() {
        let text = list().body;
        assert_eq!(text.lines().count(), 2 + KINDS.len());
        assert!(text.lines().all(|line| line.len() <= 110 && line.trim_end() == line), "{text}");
    }
}

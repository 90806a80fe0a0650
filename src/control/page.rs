//! The status page: one file without any asset from elsewhere, for a browser that asks for `/`.

use super::{index::Scope, response::Response};
use crate::config::address::Address;

const HTML: &str = include_str!("page.html");
const TYPE: &str = "text/html; charset=utf-8";
/// Policy by which the page runs its own style and script alone, and asks this proxy alone. A test compares the hashes with
/// the file.
const POLICY: &str = "default-src 'none'; \
    style-src 'sha256-yliztjusez4VbsJ7WIG+prHsrUhAtY2MxJB3M8E+HGw='; \
    script-src 'sha256-z6Slan3FbDf0Lw0OLotyTuRc29yB1if0oDcszEIo1H0='; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Place for the address of the control API, where the page was not reached by it.
const CONTROL: &str = r#"name="control" content="""#;

/// Returns the page. At a listener for those that only look, it names the control API, which lifts pauses.
pub(super) fn page(scope: Scope, control: &Address) -> Response {
    let html = match scope {
        Scope::Full => HTML.to_owned(),
        Scope::ReadOnly => {
            let control = control.to_string().replace('&', "&amp;").replace('"', "&quot;");
            HTML.replacen(CONTROL, &format!(r#"name="control" content="{control}""#), 1)
        }
    };
    Response::new(TYPE, html)
        .with_header("Content-Security-Policy", POLICY)
        .with_header("X-Content-Type-Options", "nosniff")
        .with_header("Referrer-Policy", "no-referrer")
        .with_header("Cache-Control", "no-store")
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    use ring::digest::{SHA256, digest};

    use super::*;

    const BYTES_MAX: usize = 24 << 10;

    /// Returns the source of the page's only element of this name, as the policy has it.
    fn source(element: &str) -> String {
        let (open, close) = (format!("<{element}>"), format!("</{element}>"));
        let parts: Vec<&str> = HTML.split(&open).collect();
        let [_, rest] = parts[..] else { panic!("not one {open}") };
        let text = rest.split(&close).next().unwrap();
        format!(
            "{element}-src 'sha256-{}'; ",
            BASE64_STANDARD.encode(digest(&SHA256, text.as_bytes()))
        )
    }

    #[test]
    fn the_policy_allows_what_the_page_holds_and_nothing_else() {
        for element in ["style", "script"] {
            let source = source(element);
            assert!(POLICY.contains(&source), "no {source} in {POLICY}");
        }
        assert_eq!(POLICY.matches("sha256-").count(), 2);
        // The policy would refuse attributes for style or events, and elements with attributes would go unhashed.
        for absent in
            [" style=", "<style ", "<script ", " src=", "=\"http", "@import", "url(", "innerHTML"]
        {
            assert!(!HTML.contains(absent), "{absent} is in the page");
        }
        let is_event = |word: &str| word.starts_with("on") && word.contains('=');
        assert!(!HTML.split_whitespace().any(is_event));
    }

    #[test]
    fn the_page_of_a_monitor_names_the_control_api() {
        let control = |scope| {
            let page = page(scope, &"unix:///run/a\"&b".parse().unwrap()).body;
            let (_, rest) = page.split_once("<meta name=\"control\" content=\"").unwrap();
            rest.split_once('>').unwrap().0.to_owned()
        };
        assert_eq!(control(Scope::ReadOnly), "unix:///run/a&quot;&amp;b\"");
        assert_eq!(control(Scope::Full), "\"");
    }

    #[test]
    fn the_page_is_small() {
        assert!(HTML.len() <= BYTES_MAX, "{} bytes", HTML.len());
    }
}

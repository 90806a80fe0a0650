//! The status page, in a real browser where there is one.

use std::process::Command;

use serde_json::Value;

use super::monitor::monitor;
use crate::harness::{Browser, Control, Family, Proxy, Upstream, echo, reserve};

const HTML: &[&str] = &["Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"];

/// Texts of the elements that a selector finds.
fn texts(selector: &str) -> String {
    format!(
        "[...document.querySelectorAll({selector:?})].map(node => node.textContent).join('\\n')"
    )
}

/// Runs a command that the page shows, which lifts a pause; without curl, lifts all pauses.
#[track_caller]
fn follow(command: &str, control: &Control) {
    match Command::new("sh").args(["-c", command]).output() {
        Ok(output) if output.status.success() => {}
        _ if Command::new("curl").arg("--version").output().is_err() => control.resume(),
        output => panic!("{command}: {output:?}"),
    }
}

#[test]
fn a_browser_gets_a_page_and_curl_a_list() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let list = proxy.control().request("GET", "/", &["Accept: */*"]);
    assert_eq!(list.header("Content-Type"), Some("text/plain; charset=utf-8"), "{list}");
    assert!(list.text().contains("\nGET    /status "), "{list}");
    let page = proxy.control().request("GET", "/", HTML);
    assert_eq!(page.status, 200, "{page}");
    for (name, value) in [
        ("Content-Type", "text/html; charset=utf-8"),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cache-Control", "no-store"),
    ] {
        assert_eq!(page.header(name), Some(value), "{page}");
    }
    let policy = page.header("Content-Security-Policy").unwrap_or_default();
    assert!(policy.starts_with("default-src 'none'; style-src 'sha256-"), "{policy}");
    let end = "; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    assert!(policy.ends_with(end), "{policy}");
    assert!(page.text().starts_with("<!doctype html>") && page.text().ends_with("</html>\n"));
    let head = proxy.control().request("HEAD", "/", HTML);
    assert_eq!(head.header("Content-Length"), Some(&*page.body.len().to_string()));
    assert!(head.body.is_empty());
}

#[test]
fn the_page_shows_pauses_as_text_and_how_to_lift_them() {
    const REASON: &str = "<img src=x onerror=document.title='owned'>";

    let Some(mut browser) = Browser::start() else { return };
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let control = proxy.control();
    let url = format!("http://{}/", control.host());
    browser.view(1_200, false);
    browser.open(&url);
    browser.wait_for(&texts("h1"), |text| text == "running");
    browser.wait_for(&texts("[aria-live]"), |text| text == "Running");
    let mut active = proxy.connect();
    active.assert_echo(b"carried");
    let reason = "%3Cimg%20src%3Dx%20onerror%3Ddocument.title%3D%27owned%27%3E";
    for query in ["name=deploy&ttl=1h", &format!("name=it%27s%20%26%20%24HOME&reason={reason}")] {
        assert_eq!(control.put(&format!("/paused?{query}")).status, 201);
    }
    let _held = proxy.connect_held();
    let title = format!("PAUSED deploy +1 \u{b7} 1 held \u{b7} {}", control.host());
    browser.wait_for("document.title", |text| *text == title);
    let state = browser.evaluate(&texts("h1"));
    assert!(state.as_str().is_some_and(|state| state.starts_with("paused ")), "{state}");
    assert_eq!(browser.evaluate(&texts("[aria-live]")), "Paused");
    assert_eq!(browser.evaluate(&texts("li h3")), "deploy\nit's & $HOME");
    let shown = browser.evaluate(&texts("li"));
    assert!(shown.as_str().is_some_and(|shown| shown.contains("mode hold")), "{shown}");
    assert!(shown.as_str().is_some_and(|shown| shown.contains(REASON)), "{shown}");
    assert_eq!(browser.evaluate("document.querySelectorAll('img').length"), 0);
    assert_eq!(browser.evaluate(&texts("#clients tr:nth-child(1) td:nth-child(2)")), "1");
    let figure = browser.evaluate(&texts("#active-text"));
    assert_eq!(figure, "active: 1 now, at most 1 since this page was opened");

    // The page changes nothing itself, and the command that it shows does.
    for method in ["PUT", "POST", "DELETE"] {
        let request = format!("fetch('/paused', {{method: '{method}'}}).then(it => it.status)");
        assert_eq!(browser.evaluate(&request), 403, "{method}");
    }
    assert_eq!(control.status().leases.len(), 2);
    let commands = browser.evaluate(&texts("code"));
    let commands = commands.as_str().expect("text");
    assert_eq!(commands.lines().count(), 2, "{commands}");
    for command in commands.lines() {
        let begin = format!("curl -X DELETE '{url}paused?name=");
        assert!(command.starts_with(&begin), "{command}");
        follow(command, control);
    }
    assert!(!control.is_paused());
    browser.wait_for(&texts("h1"), |text| text == "running");
    assert_eq!(browser.evaluate("document.querySelector('#pauses').hidden"), true);
    let refused = "status of 403";
    let complaints: Vec<_> = browser.complaints();
    let is_ours = |complaint: &&&Value| complaint.to_string().contains(refused);
    assert_eq!(complaints.iter().filter(is_ours).count(), complaints.len(), "{complaints:?}");
}

#[test]
fn the_page_fits_a_telephone_with_64_pauses_and_asks_for_the_status_alone() {
    let Some(mut browser) = Browser::start() else { return };
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let url = format!("http://{}/", proxy.control().host());
    let long = "w".repeat(200);
    for name in 0..64 {
        let target = format!("/paused?name={name}-{}&reason={long}", "n".repeat(60));
        assert_eq!(proxy.control().put(&target).status, 201);
    }
    for (width, is_dark) in [(320, true), (320, false), (1_200, true)] {
        browser.view(width, is_dark);
        browser.open(&url);
        browser.wait_for("document.querySelectorAll('li').length", |count| *count == 64);
        assert_eq!(browser.evaluate("innerWidth"), width);
        let scrolled = browser.evaluate("document.documentElement.scrollWidth");
        assert!(scrolled.as_u64().is_some_and(|scrolled| scrolled <= width.into()), "{scrolled}");
        let colour = browser.evaluate("getComputedStyle(document.body).backgroundColor");
        assert_eq!(colour == "rgb(18, 21, 27)", is_dark, "{colour}");
    }
    // An answer leaves alone what has not changed, so that a selection stays.
    browser.evaluate("getSelection().selectAllChildren(document.querySelector('code'))");
    let asked = browser.requested().len();
    browser.wait_for("performance.now() > 4000", |later| *later == true);
    let selected = browser.evaluate("getSelection().toString()");
    assert!(selected.as_str().is_some_and(|text| text.starts_with("curl -X DELETE")), "{selected}");
    // A hidden page asks for nothing, and says so in its title alone.
    browser
        .evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})");
    let hidden = browser.evaluate("performance.now()").as_f64().expect("a time");
    let stale = "document.title.startsWith('STALE')";
    browser.wait_for(stale, |is_stale| *is_stale == true);
    assert!(
        browser.evaluate("performance.now()").as_f64().is_some_and(|now| now > hidden + 1_900.0)
    );
    assert_eq!(browser.evaluate("document.querySelector('#stale').hidden"), true);
    browser
        .evaluate("delete document.hidden, document.dispatchEvent(new Event('visibilitychange'))");
    browser.wait_for(stale, |is_stale| *is_stale == false);
    let requested = browser.requested();
    assert!(requested.len() > asked, "{requested:?}");
    let status = format!("{url}status");
    assert!(requested.iter().all(|asked| *asked == url || *asked == status), "{requested:?}");
    assert!(browser.complaints().is_empty(), "{:?}", browser.complaints());
}

#[test]
fn the_page_says_that_no_answer_comes_and_goes_on_when_one_does() {
    let Some(mut browser) = Browser::start() else { return };
    let upstream = Upstream::tcp(echo);
    let mut proxy = Proxy::builder().upstream(&upstream).control(Family::Tcp4).start();
    let url = format!("http://{}/", proxy.control().host());
    browser.open(&url);
    browser.wait_for(&texts("h1"), |text| text == "running");
    assert_eq!(browser.evaluate("document.querySelector('#stale').hidden"), true);
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
    let (begin, end) = ("no answer for ", "s: the proxy cannot be reached");
    browser.wait_for(&texts("h1"), |text| {
        text.as_str().is_some_and(|told| told.starts_with(begin) && told.ends_with(end))
    });
    let old = "What you see is that old. The state was: running.";
    assert_eq!(browser.evaluate(&texts("#stale")), old);
    assert_eq!(browser.evaluate("document.querySelector('#stale').hidden"), false);
    assert_eq!(browser.evaluate(&texts("[aria-live]")), "No answer");
    browser.wait_for("document.title", |text| {
        text.as_str().is_some_and(|title| title.starts_with("STALE \u{b7} Running"))
    });
    let control = proxy.control().addr().clone();
    let again = proxy.sibling().upstream(&upstream).control_at(&control).start();
    browser.wait_for("document.querySelector('#stale').hidden", |hidden| *hidden == true);
    assert_eq!(browser.evaluate(&texts("[aria-live]")), "Running");
    assert_eq!(browser.evaluate(&texts("h1")), "running");
    drop(again);
}

#[test]
fn the_page_of_a_monitor_names_the_control_api_and_no_reason() {
    let Some(mut browser) = Browser::start() else { return };
    let upstream = Upstream::tcp(echo);
    for family in [Family::Tcp4, Family::Unix, Family::Abstract] {
        let builder = Proxy::builder().upstream(&upstream).control(family);
        let proxy = builder.arg("--monitor-addr=127.0.0.1:0").start();
        assert_eq!(proxy.control().put("/paused?name=deploy&reason=secret").status, 201);
        browser.open(&format!("http://{}/", monitor(&proxy).host()));
        browser.wait_for(&texts("li h3"), |text| text == "deploy");
        let shown = browser.evaluate(&texts("body"));
        assert!(!shown.as_str().unwrap().contains("secret"), "{shown}");
        assert_eq!(browser.evaluate("document.querySelector('#nameless').hidden"), false);
        let command = browser.evaluate(&texts("code"));
        follow(command.as_str().unwrap(), proxy.control());
        assert!(!proxy.control().is_paused(), "{command}");
    }
}

#[test]
fn the_page_shows_an_upstream_that_is_away_and_that_it_is_back() {
    let Some(mut browser) = Browser::start() else { return };
    let port = reserve();
    let proxy =
        Proxy::builder().upstream_at(&port.addr()).args(["--upstream-retry-for", "20s"]).start();
    browser.open(&format!("http://{}/", proxy.control().host()));
    browser.wait_for(&texts("[aria-live]"), |text| text == "Running");
    let shown = browser.evaluate(&texts("#upstream dd"));
    assert!(shown.as_str().is_some_and(|text| text.ends_with("\nnot tried yet")), "{shown}");
    let mut client = proxy.connect();
    browser.wait_for(&texts("[aria-live]"), |text| text == "Upstream away");
    browser.wait_for(&texts("h1"), |text| {
        let text = text.as_str().unwrap_or_default();
        text.starts_with("running, but the upstream is away for ")
            && text.contains("Connection refused")
    });
    proxy.control().wait_counts(|status| status.awaiting_upstream, 1);
    let shown = browser.evaluate(&texts("#upstream dd"));
    assert!(shown.as_str().is_some_and(|text| text.contains("away since 20")), "{shown}");
    let _upstream = Upstream::on(port.listen(), echo);
    client.assert_echo(b"served");
    browser.wait_for(&texts("h1"), |text| text == "running");
    assert_eq!(browser.evaluate(&texts("[aria-live]")), "Running");
}

#[test]
fn the_page_shows_upgrades() {
    let Some(mut browser) = Browser::start() else { return };
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::builder().followed().upstream(&upstream).start();
    proxy.upgrade();
    browser.open(&format!("http://{}/", proxy.control().host()));
    browser.wait_for(&texts("#proxy dd"), |text| {
        let text = text.as_str().unwrap_or_default();
        text.contains("\n1, the last at 20") && text.contains(" UTC: 0 connections, stalled for ")
    });
}

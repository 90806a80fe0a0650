//! A real browser, Chromium without a window, driven over its `DevTools` protocol.

use std::{
    io::{BufRead, BufReader, Write as _},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{GLANCE, PATIENCE, spawn};

/// Names under which it may be installed.
const PROGRAMS: [&str; 3] = ["chromium", "google-chrome", "chromium-browser"];

/// Options for a browser that shows one page of ours and asks nobody else for anything.
const OPTIONS: [&str; 10] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
];

/// Rest between two looks at a page, each of which takes time from the browser.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Browser with one page, which ends with this.
pub(crate) struct Browser {
    child: Child,
    requests: ChildStdin,
    messages: Receiver<Value>,
    /// Messages that are no answers.
    events: Vec<Value>,
    last_id: u64,
    session: Option<String>,
    _profile: TempDir,
}

impl Browser {
    /// Starts it. Returns `None`, and says so, where it is not installed.
    pub(crate) fn start() -> Option<Self> {
        let is_installed = |program: &&str| {
            let found = Command::new("sh").args(["-c", "command -v \"$0\"", program]).output();
            found.is_ok_and(|output| output.status.success())
        };
        let Some(program) = PROGRAMS.into_iter().find(is_installed) else {
            println!("skipped: there is no Chromium on this machine");
            return None;
        };
        let profile = tempfile::tempdir().expect("a directory");
        let mut command = Command::new("sh");
        // It reads from descriptor 3 and writes to 4, which only a shell can give it without unsafe code.
        command.args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1", program]);
        command.args(OPTIONS).arg(format!("--user-data-dir={}", profile.path().display()));
        let mut child = command
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        let (sender, messages) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        drop(spawn(move || {
            for message in stdout.split(0).map_while(Result::ok) {
                let message = serde_json::from_slice(&message).expect("a message in JSON");
                if sender.send(message).is_err() {
                    break;
                }
            }
        }));
        let requests = child.stdin.take().expect("a pipe");
        let mut browser = Self {
            child,
            requests,
            messages,
            events: Vec::new(),
            last_id: 0,
            session: None,
            _profile: profile,
        };
        let created = browser.call("Target.createTarget", &json!({"url": "about:blank"}));
        let attach = json!({"targetId": created["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", &attach);
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), &json!({}));
        }
        Some(browser)
    }

    /// Opens an address.
    pub(crate) fn open(&mut self, url: &str) {
        let opened = self.call("Page.navigate", &json!({"url": url}));
        assert!(opened["errorText"].is_null(), "{url}: {opened}");
    }

    /// Makes the page as wide as a telephone or a screen, with light or dark colours.
    pub(crate) fn view(&mut self, width: u32, is_dark: bool) {
        let size =
            json!({"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500});
        self.call("Emulation.setDeviceMetricsOverride", &size);
        let scheme = if is_dark { "dark" } else { "light" };
        let scheme = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", &scheme);
    }

    /// Returns the value of a JavaScript expression, or of its promise.
    #[track_caller]
    pub(crate) fn evaluate(&mut self, expression: &str) -> Value {
        let wanted = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let result = self.call("Runtime.evaluate", &wanted);
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    /// Waits until an expression, such as the text of an element, has this value.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, expression: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = self.evaluate(expression);
            if wanted(&value) {
                return value;
            }
            assert!(Instant::now() < deadline, "in vain: {expression} is {value}");
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Returns the addresses that the page has asked for.
    pub(crate) fn requested(&self) -> Vec<&str> {
        let requests = self.events_of("Network.requestWillBeSent");
        requests.filter_map(|event| event["request"]["url"].as_str()).collect()
    }

    /// Returns the lines of the console, and the exceptions of the page's script.
    pub(crate) fn complaints(&self) -> Vec<&Value> {
        ["Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"]
            .into_iter()
            .flat_map(|name| self.events_of(name))
            .collect()
    }

    fn events_of(&self, name: &'static str) -> impl Iterator<Item = &Value> {
        let events = self.events.iter().filter(move |event| event["method"] == name);
        events.map(|event| &event["params"])
    }

    /// Makes a request of the protocol, to the page once there is one, and returns its result.
    #[track_caller]
    fn call(&mut self, method: &str, params: &Value) -> Value {
        self.last_id += 1;
        let mut request = json!({"id": self.last_id, "method": method, "params": params});
        if let Some(session) = &self.session {
            request["sessionId"] = session.as_str().into();
        }
        self.requests.write_all(format!("{request}\0").as_bytes()).expect("a browser that runs");
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut message = self.messages.recv_timeout(left).expect("an answer of the browser");
            if message["id"] == self.last_id {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].take();
            }
            self.events.push(message);
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // In order, as its processes write to the profile while they run. An error means that it has ended already.
        let close = json!({"id": 0, "method": "Browser.close"});
        drop(self.requests.write_all(format!("{close}\0").as_bytes()));
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            if Instant::now() > deadline {
                drop(self.child.kill());
            }
            std::thread::sleep(GLANCE);
        }
    }
}

//! Steering: the real binary and the kernel, of which the server's sight of its clients tells what was steered.
//!
//! Each test says that it is skipped where the system refuses BPF. With `TCPAUSE_NEEDS_BPF` set, it fails there.

mod addresses;
mod clients;
mod crash;
mod exact;
mod fence;
mod refuse;
mod restart;
mod server;
mod switch;
mod terms;
mod upgrade;

use std::{env, thread, time::Duration};

use serde_json::Value;
use server::{Server, greeting};

use crate::harness::{Builder, Control, Proxy, Received, Stream, wait_until};

/// Variable by which a machine says that it has BPF.
const NEEDS_BPF: &str = "TCPAUSE_NEEDS_BPF";

/// Server with a proxy that steers to it.
struct Scene {
    proxy: Proxy,
    server: Server,
}

/// Client of which the server has told how it has come.
struct Client {
    stream: Stream,
    is_steered: bool,
    /// Place in the order in which the server has accepted.
    place: usize,
}

impl Scene {
    /// Starts both. Returns `None` where the system refuses BPF.
    fn start() -> Option<Self> {
        Self::with(Server::start(), |builder| builder)
    }

    /// Starts a proxy before this server.
    fn with(server: Server, options: impl FnOnce(Builder) -> Builder) -> Option<Self> {
        let proxy = options(builder(&server)).start();
        let scene = Self { proxy, server };
        scene.has_bpf().then_some(scene)
    }

    fn has_bpf(&self) -> bool {
        let mut state = Value::Null;
        wait_until("the programs are loaded or refused", || {
            state = steering(self.control());
            state["why"] != "it begins"
        });
        let is_refused =
            state["state"] == "unavailable" && state["why"].to_string().contains("BPF");
        if is_refused {
            assert!(env::var_os(NEEDS_BPF).is_none(), "{state}");
            println!("skipped: {}", state["why"]);
        }
        !is_refused
    }

    fn control(&self) -> &Control {
        self.proxy.control()
    }

    /// Waits until newcomers are steered.
    #[track_caller]
    fn wait_steering(&self) {
        wait_steering(self.control());
    }

    /// Pauses for so long, and resumes. Returns the number of connections that have reached the server meanwhile.
    #[track_caller]
    fn late_in_a_pause(&self, hold: Duration) -> usize {
        self.control().pause();
        let before = self.server.accepted();
        thread::sleep(hold);
        let late = self.server.accepted() - before;
        self.control().resume();
        late
    }

    /// Connects a client and has it served.
    #[track_caller]
    fn connect(&self) -> Client {
        Client::greeted(self.proxy.connect())
    }

    /// Connects a client, which must be steered.
    #[track_caller]
    fn connect_steered(&self) -> Client {
        let client = self.connect();
        assert!(client.is_steered, "relayed: {}", steering(self.control()));
        client
    }
}

impl Client {
    /// Waits until it is served.
    #[track_caller]
    fn greeted(mut stream: Stream) -> Self {
        let (is_steered, place) = greeting(&mut stream).expect("a greeting");
        Self { stream, is_steered, place }
    }

    /// Checks that it is served.
    #[track_caller]
    fn assert_served(&mut self) {
        self.stream.assert_echo(b"served");
    }

    /// Ends it in good order.
    #[track_caller]
    fn end(mut self) {
        self.stream.finish();
        assert_eq!(self.stream.receive_all(), Received::ended(b""));
    }
}

/// Returns the builder of a proxy that steers to the server where it can.
fn builder(server: &Server) -> Builder {
    Proxy::builder().upstream_at(&server.url()).arg("--upstream-steer=auto")
}

/// Returns the status of the steering.
#[track_caller]
fn steering(control: &Control) -> Value {
    status(control)["steering"].take()
}

#[track_caller]
fn status(control: &Control) -> Value {
    let answer = control.get("/status");
    serde_json::from_slice(&answer.body).unwrap_or_else(|error| panic!("{error} in {answer}"))
}

#[track_caller]
fn wait_steering(control: &Control) {
    let mut state = Value::Null;
    wait_until("newcomers are steered", || {
        state = steering(control);
        state["state"] == "steering"
    });
}

//! The switch to another upstream: new clients go there, those that are served stay, and none notices.

use std::{
    fs,
    io::{self, Read, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harness::{
    Addr, Family, Listener, Proxy, Received, Response, Stream, Upstream, echo, reserve, spawn,
    wait_until,
};

/// Upstream that sends one letter first, by which a client knows it, and then echoes.
pub(super) fn lettered(letter: u8) -> Upstream {
    Upstream::tcp(move |mut stream| {
        if stream.write_all(&[letter]).is_err() {
            return stream.receive_all();
        }
        echo(stream)
    })
}

/// Returns the letter that a client is served with.
pub(super) fn letter(client: &mut Stream) -> u8 {
    client.receive(1)[0]
}

#[track_caller]
pub(super) fn switch(proxy: &Proxy, upstream: &Upstream) -> Value {
    json_of(&proxy.control().put(&format!("/upstream?addr={}", upstream.addr())))
}

#[track_caller]
pub(super) fn shown(proxy: &Proxy) -> Value {
    json_of(&proxy.control().get("/upstream"))
}

#[track_caller]
pub(super) fn json_of(response: &Response) -> Value {
    assert_eq!(response.status, 200, "{response}");
    serde_json::from_slice(&response.body).unwrap()
}

fn wait_target(upstream: &Upstream, timeout: &str) -> String {
    format!("/upstream/block-until-idle?addr={}&timeout={timeout}", upstream.addr())
}

fn count(upstream: &Upstream, active: u64) -> Value {
    json!({"upstream": upstream.addr().to_string(), "active": active})
}

/// One short connection with a question and its answer.
fn ask(addr: &Addr) -> io::Result<()> {
    let mut stream = addr.try_connect()?;
    stream.write_all(b"question")?;
    let mut answer = [0; 9];
    stream.read_exact(&mut answer)?;
    assert_eq!(answer[1..], *b"question");
    stream.finish();
    assert_eq!(stream.read(&mut [0])?, 0);
    Ok(())
}

#[test]
fn under_load_nothing_fails_and_the_old_one_accepts_nothing_more() {
    const SWITCHES: usize = 100;
    const CLIENTS: usize = 8;

    let upstreams = [lettered(b'a'), lettered(b'b')];
    let proxy = Proxy::to(&upstreams[0]);
    let (goes_on, done) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_client| {
            let (addr, goes_on, done) = (proxy.addr().clone(), goes_on.clone(), done.clone());
            spawn(move || {
                while goes_on.load(Ordering::SeqCst) {
                    ask(&addr).unwrap_or_else(|error| panic!("a client notices: {error}"));
                    done.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    for round in 0..SWITCHES {
        let (old, new) = (&upstreams[round % 2], &upstreams[(round + 1) % 2]);
        switch(&proxy, new);
        let idle = proxy.control().get(&wait_target(old, "30s"));
        assert_eq!(idle.status, 204, "{idle}");
        // All that led to it has ended, so that it has accepted all.
        let accepted = old.accepted();
        let before = done.load(Ordering::SeqCst);
        wait_until("clients go on", || done.load(Ordering::SeqCst) > before + CLIENTS);
        assert_eq!(old.accepted(), accepted, "the old one accepts more behind the answer");
    }
    goes_on.store(false, Ordering::SeqCst);
    for client in clients {
        client.join().unwrap();
    }
    assert_eq!(proxy.control().status().failed, 0);
    let metrics = proxy.control().get("/metrics");
    let done = format!("tcpause_upstream_switches_total{{result=\"done\"}} {SWITCHES}\n");
    assert!(metrics.text().contains(&done), "{}", metrics.text());
}

#[test]
fn held_clients_go_to_the_new_one_and_served_ones_stay() {
    const HELD: usize = 200;

    let (old, new) = (lettered(b'a'), lettered(b'b'));
    let proxy = Proxy::to(&old);
    let mut served = proxy.connect();
    assert_eq!(letter(&mut served), b'a');
    proxy.control().pause();
    // One by one, as the order of a burst over several workers is not sure.
    let mut first: Vec<_> = (0..3).map(|_client| proxy.connect_held()).collect();
    let mut held: Vec<_> = (3..HELD).map(|_client| proxy.connect()).collect();
    proxy.control().wait_counts(|status| status.held, HELD as u64);
    let answer = switch(&proxy, &new);
    assert_eq!(answer["upstream"], new.addr().to_string());
    assert_eq!(answer["configured"], old.addr().to_string());
    assert_eq!(answer["connections"], json!([count(&old, 1), count(&new, 0)]));
    assert!(proxy.control().is_paused());
    // The smoke test of the new one.
    assert_eq!(proxy.control().delete("/paused?release=3").status, 200);
    for client in &mut first {
        assert_eq!(letter(client), b'b');
    }
    assert!(proxy.control().is_paused());
    proxy.control().resume();
    for client in &mut held {
        assert_eq!(letter(client), b'b');
        client.assert_echo(b"served");
    }
    served.assert_echo(b"stays where it is");
    assert_eq!(shown(&proxy)["connections"], json!([count(&old, 1), count(&new, HELD as u64)]));
    let status = proxy.control().status();
    assert_eq!(status.upstream, new.addr().to_string());
    let shown = proxy.control().get("/status").text().to_owned();
    assert!(shown.contains(&format!("\"upstream_configured\":\"{}\"", old.addr())), "{shown}");
    let gauge = |value: u8| format!("tcpause_upstream_switched {value}\n");
    assert!(proxy.control().get("/metrics").text().contains(&gauge(1)));
    assert_eq!((old.accepted(), proxy.control().status().failed), (1, 0));
}

#[test]
fn one_that_does_not_answer_changes_nothing() {
    let old = lettered(b'a');
    let proxy = Proxy::builder().upstream(&old).args(["--upstream-connect-timeout", "300ms"]);
    let proxy = proxy.start();
    let mut served = proxy.connect();
    assert_eq!(letter(&mut served), b'a');
    let before = (shown(&proxy), proxy.control().status().closed);
    let nobody = reserve();
    let full = Listener::bind(&Addr::free(Family::Tcp4, proxy.dir(), ""));
    full.backlog(0);
    full.fill();
    for (address, why) in [
        (nobody.addr(), "does not answer: Connection refused"),
        (full.addr(), "does not answer within 300ms"),
        (Addr::Unix(proxy.dir().join("nothing")), "No such file"),
        (Addr::Abstract("tcpause-nobody".to_owned()), "Connection refused"),
    ] {
        let answer = proxy.control().put(&format!("/upstream?addr={address}"));
        let sentence = answer.assert_error(502);
        assert!(sentence.contains(why) && sentence.contains(&address.to_string()), "{sentence}");
    }
    let unknown = proxy.control().put("/upstream?addr=nobody.invalid:1");
    assert!(unknown.assert_error(502).contains("nobody.invalid:1"));
    assert_eq!((shown(&proxy), proxy.control().status().closed), before);
    assert_eq!(letter(&mut proxy.connect()), b'a');
    served.assert_echo(b"goes on");
    proxy.wait_for_log("which is refused: ");
    let refused = "tcpause_upstream_switches_total{result=\"refused\"} 5\n";
    assert!(proxy.control().get("/metrics").text().contains(refused));
}

#[test]
fn without_a_check_it_may_come_later() {
    let (old, new) = (lettered(b'a'), reserve());
    let proxy = Proxy::builder().upstream(&old).args(["--upstream-retry-for", "1h"]).start();
    let answer = proxy.control().put(&format!("/upstream?check=none&addr={}", new.addr()));
    json_of(&answer);
    let mut client = proxy.connect();
    proxy.control().wait_status("the upstream is away", |status| !status.upstream_up);
    let _new = Upstream::on(new.listen(), echo);
    client.assert_echo(b"it has come");
    assert_eq!(old.accepted(), 0);
}

#[test]
fn an_outage_ends_with_the_switch() {
    let (gone, new) = (reserve(), lettered(b'b'));
    let proxy = Proxy::builder().upstream_at(&gone.addr()).args(["--upstream-retry-for", "1h"]);
    let proxy = proxy.start();
    let mut clients: Vec<_> = (0..20).map(|_client| proxy.connect()).collect();
    proxy
        .control()
        .wait_counts(|status| (status.upstream_up, status.awaiting_upstream), (false, 20));
    assert_eq!(switch(&proxy, &new)["up"], true);
    for client in &mut clients {
        assert_eq!(letter(client), b'b');
    }
    let status = proxy.control().status();
    assert_eq!((status.upstream_up, status.failed, status.upstream_error), (true, 0, None));
}

#[test]
fn a_client_whose_dial_of_the_old_one_is_in_vain_is_served_by_the_new_one() {
    let full = Listener::bind(&Addr::free(Family::Tcp4, std::path::Path::new("/"), ""));
    full.backlog(0);
    full.fill();
    let new = lettered(b'b');
    let proxy = Proxy::builder().upstream_at(&full.addr());
    let proxy = proxy.args(["--upstream-connect-timeout", "1s"]).start();
    let mut client = proxy.connect();
    proxy.control().wait_counts(|status| status.connecting, 1);
    let answer = switch(&proxy, &new);
    assert_eq!(answer["connections"][0], json!({"upstream": full.addr().to_string(), "active": 1}));
    assert_eq!(letter(&mut client), b'b');
    assert_eq!(shown(&proxy)["connections"], json!([count(&new, 1)]));
    assert_eq!(proxy.control().status().failed, 0);
}

#[test]
fn an_address_of_its_own_is_refused() {
    let upstream = lettered(b'a');
    let proxy = Proxy::builder().upstream(&upstream).control(Family::Unix);
    let proxy = proxy.args(["--monitor-addr", "127.0.0.1:0"]).start();
    let port = proxy.addr().port();
    let line = proxy.wait_for_log("monitor listens on ");
    let monitor = line.split_once("monitor listens on ").unwrap().1;
    for (address, setting) in [
        (proxy.addr().to_string(), "proxy.addr"),
        (format!("localhost:{port}"), "proxy.addr"),
        (format!("0.0.0.0:{port}"), "proxy.addr"),
        (monitor.to_owned(), "monitor.addr"),
        (proxy.control().addr().to_string(), "control.addr"),
    ] {
        for check in ["connect", "none"] {
            let target = format!("/upstream?addr={address}&check={check}");
            let sentence = proxy.control().put(&target).assert_error(400);
            assert!(sentence.contains(&format!("leads back to {setting}")), "{sentence}");
        }
    }
    assert_eq!(letter(&mut proxy.connect()), b'a');
}

#[test]
fn the_end_of_connections_to_one_upstream_is_waited_for() {
    let (old, new) = (lettered(b'a'), Upstream::start(Family::Unix, echo));
    let proxy = Proxy::to(&old);
    let mut staying = proxy.connect();
    assert_eq!(letter(&mut staying), b'a');
    switch(&proxy, &new);
    let mut other = proxy.connect();
    other.assert_echo(b"over the new one");
    let in_vain = proxy.control().get(&wait_target(&old, "50ms"));
    assert!(in_vain.assert_error(504).contains(&old.addr().to_string()), "{in_vain}");
    assert_eq!(serde_json::from_slice::<Value>(&in_vain.body).unwrap()["active"], 1);
    let mut waiting = proxy.control().send("GET", &wait_target(&old, "1h"), &[]);
    proxy.upgrade();
    staying.assert_echo(b"still there");
    assert_eq!(shown(&proxy)["connections"], json!([count(&old, 1), count(&new, 1)]));
    let port = new.addr().to_string();
    let refused = proxy.control().get(&wait_target(&new, "1h"));
    assert!(refused.assert_error(409).contains(&port), "{refused}");
    staying.finish();
    assert_eq!(staying.receive_all(), Received::ended(b""));
    assert_eq!(Response::read(&mut waiting).status, 204);
    assert_eq!(proxy.control().get(&wait_target(&old, "1h")).status, 204, "it is idle already");
    assert_eq!(shown(&proxy)["connections"], json!([count(&new, 1)]));
    assert_eq!(proxy.control().delete("/upstream").status, 204);
    other.assert_echo(b"stays");
    assert_eq!(shown(&proxy)["connections"], json!([count(&new, 1), count(&old, 0)]));
    assert_eq!(letter(&mut proxy.connect()), b'a');
    let gauge = "tcpause_upstream_switched 0\n";
    assert!(proxy.control().get("/metrics").text().contains(gauge));
}

#[test]
fn the_present_one_is_neither_waited_for_nor_cleared() {
    let (old, new) = (lettered(b'a'), lettered(b'b'));
    let name = format!("localhost:{}", old.addr().port());
    let proxy = Proxy::builder().upstream_at(&name).start();
    let mut first = proxy.connect();
    assert_eq!(letter(&mut first), b'a');
    let kill = |address: &str| proxy.control().delete(&format!("/connections?upstream={address}"));
    kill(&name).assert_error(409);
    proxy.control().get(&format!("/upstream/block-until-idle?addr={name}")).assert_error(409);
    // An address of its name would never have a connection.
    proxy.control().get(&wait_target(&old, "1h")).assert_error(409);
    switch(&proxy, &new);
    let waiting = format!("/upstream/block-until-idle?addr={name}");
    let mut waiting = proxy.control().send("GET", &waiting, &[]);
    let back = proxy.control().put(&format!("/upstream?addr={name}"));
    assert_eq!(json_of(&back)["upstream"], format!("tcp://{name}"));
    assert_eq!(Response::read(&mut waiting).status, 409);
    kill(&name).assert_error(409);
    first.assert_echo(b"was not reset");
    switch(&proxy, &new);
    assert_eq!(kill(&name).text(), "{\"closed\": 1}\n");
}

#[test]
fn eight_earlier_ones_may_have_connections() {
    let upstreams: Vec<_> = (0..10).map(|number| lettered(b'a' + number)).collect();
    let proxy = Proxy::to(&upstreams[0]);
    let mut clients = Vec::new();
    for upstream in &upstreams[..9] {
        switch(&proxy, upstream);
        let mut client = proxy.connect();
        letter(&mut client);
        clients.push(client);
    }
    let refused = proxy.control().put(&format!("/upstream?addr={}", upstreams[9].addr()));
    assert!(refused.assert_error(409).contains("ight earlier upstreams"));
    clients.remove(4).finish();
    assert_eq!(proxy.control().get(&wait_target(&upstreams[4], "30s")).status, 204);
    switch(&proxy, &upstreams[9]);
    assert_eq!(letter(&mut proxy.connect()), b'j');
    for client in &mut clients {
        client.assert_echo(b"each stays");
    }
}

#[test]
fn a_switch_outlives_a_crash_if_it_has_a_file() {
    for has_file in [true, false] {
        let (old, new) = (lettered(b'a'), lettered(b'b'));
        let file = |proxy: &Proxy| proxy.dir().join("state.json");
        let first = Proxy::builder();
        let path = first.path("state.json").display().to_string();
        let option = if has_file { vec!["--upstream-state-file", &path] } else { vec![] };
        let mut proxy = first.upstream(&old).args(&option).start();
        assert_eq!(shown(&proxy)["persistent"], has_file);
        assert_eq!(letter(&mut proxy.connect()), b'a');
        switch(&proxy, &new);
        if !has_file {
            proxy.wait_for_log("until the next start");
        }
        proxy.signal(Signal::KILL);
        proxy.exit_code();
        assert_eq!(file(&proxy).exists(), has_file);
        let again = proxy.sibling().upstream(&old).args(&option).start();
        let expected = if has_file { b'b' } else { b'a' };
        assert_eq!(letter(&mut again.connect()), expected);
        if has_file {
            again.wait_for_log(&format!("the upstream is {}, as upstream.state-file", new.addr()));
        }
    }
}

#[test]
fn an_edited_configuration_wins_over_a_switch() {
    let [first, switched, edited] = [b'a', b'b', b'c'].map(lettered);
    for upgrades in [false, true] {
        let builder = Proxy::builder();
        let (file, state) = (builder.path("tcpause.yml"), builder.path("state.json"));
        let write = |upstream: &Upstream| {
            let state = state.display();
            let text = format!("upstream:\n  addr: {}\n  state-file: {state}\n", upstream.addr());
            fs::write(&file, text).unwrap();
        };
        let restart = |mut proxy: Proxy| {
            if upgrades {
                proxy.upgrade();
                return proxy;
            }
            proxy.terminate();
            assert_eq!(proxy.exit_code(), 0);
            proxy.sibling().arg("--config").arg(&file).start()
        };
        write(&first);
        let mut proxy = builder.arg("--config").arg(&file).start();
        switch(&proxy, &switched);
        for (configured, expected) in
            [(&first, b'b'), (&first, b'b'), (&edited, b'c'), (&edited, b'c'), (&first, b'a')]
        {
            write(configured);
            proxy = restart(proxy);
            let mut client = proxy.connect();
            assert_eq!(letter(&mut client), expected, "{upgrades}");
            client.finish();
            client.receive_all();
            assert_eq!(shown(&proxy)["configured"], configured.addr().to_string());
        }
    }
}

#[test]
fn a_state_file_that_cannot_be_used_is_no_switch() {
    let (old, new) = (lettered(b'a'), lettered(b'b'));
    let builder = Proxy::builder().file("state.json", "{");
    let path = builder.path("state.json").display().to_string();
    let failed = builder.upstream(&old).args(["--upstream-state-file", &path]).fail();
    assert_eq!(failed.code, 1);
    assert!(failed.stderr.contains("upstream.state-file"), "{}", failed.stderr);
    let builder = Proxy::builder();
    let path = builder.path("state.json").display().to_string();
    let proxy = builder.upstream(&old).args(["--upstream-state-file", &path]).start();
    // The name beside it, under which it is written, is taken.
    fs::create_dir(proxy.dir().join(".state.json.new")).unwrap();
    let answer = proxy.control().put(&format!("/upstream?addr={}", new.addr()));
    let told = answer.assert_error(500);
    assert!(told.starts_with("Nothing has changed: the file of upstream.state-file cannot be"));
    assert_eq!(letter(&mut proxy.connect()), b'a', "nothing has changed");
}

#[test]
fn one_that_is_there_already_and_a_stop_change_nothing() {
    let (old, new) = (lettered(b'a'), lettered(b'b'));
    let proxy = Proxy::to(&old);
    let accepted = old.accepted();
    assert_eq!(switch(&proxy, &old)["upstream"], old.addr().to_string());
    assert_eq!(old.accepted(), accepted, "it is not even looked at");
    assert_eq!(proxy.control().delete("/upstream").status, 204);
    let mut client = proxy.connect();
    assert_eq!(letter(&mut client), b'a');
    proxy.terminate();
    proxy.wait_refused();
    let answer = proxy.control().put(&format!("/upstream?addr={}", new.addr()));
    assert_eq!(answer.assert_error(503), "tcpause is stopping.");
}

#[test]
fn of_two_at_once_the_later_one_wins_and_both_are_logged() {
    let upstreams = [lettered(b'a'), lettered(b'b'), lettered(b'c')];
    let proxy = Proxy::to(&upstreams[0]);
    let targets = [1, 2].map(|index| format!("/upstream?addr={}", upstreams[index].addr()));
    let callers = targets.each_ref().map(|target| proxy.control().send("PUT", target, &[]));
    for mut caller in callers {
        assert_eq!(Response::read(&mut caller).status, 200);
    }
    wait_until("both are logged", || proxy.log_count(" has switched the upstream from ") == 2);
    let log = proxy.log_so_far();
    let last = log.lines().rfind(|line| line.contains(" has switched the upstream")).unwrap();
    let letter = letter(&mut proxy.connect());
    let winner = &upstreams[usize::from(letter - b'a')];
    assert!(last.contains(&format!(" to {};", winner.addr())), "{last}");
}

#[test]
fn a_switch_that_is_examined_goes_on_in_an_upgrade() {
    let old = lettered(b'a');
    let slow = Listener::bind(&Addr::free(Family::Tcp4, std::path::Path::new("/"), ""));
    slow.backlog(0);
    slow.fill();
    let proxy = Proxy::to(&old);
    let target = format!("/upstream?addr={}", slow.addr());
    let mut caller = proxy.control().send("PUT", &target, &[]);
    wait_until("it is examined", || !proxy.threads_named("switch").is_empty());
    proxy.upgrade();
    wait_until("it is examined anew", || !proxy.threads_named("switch").is_empty());
    let _new = Upstream::on(slow, echo);
    assert_eq!(Response::read(&mut caller).status, 200);
    proxy.connect().assert_echo(b"to the new one");
}

/// A server that expects a header of the PROXY protocol gets one from the check, too. It names the check's own addresses over
/// TCP, since servers refuse a header without any.
#[test]
fn a_check_tells_a_server_that_it_is_no_client() {
    let old = lettered(b'a');
    let proxy = Proxy::builder().upstream(&old).args(["--upstream-send-proxy", "v1"]).start();
    for family in [Family::Tcp4, Family::Unix] {
        let addr = Addr::free(family, proxy.dir(), "new");
        let new = Upstream::on(Listener::bind(&addr), |mut stream| stream.receive_all());
        switch(&proxy, &new);
        let told = String::from_utf8(new.received().bytes).unwrap();
        if let Addr::Tcp(addr) = new.addr() {
            assert!(told.starts_with("PROXY TCP4 127.0.0.1 127.0.0.1 "), "{told}");
            assert!(told.ends_with(&format!(" {}\r\n", addr.port())), "{told}");
        } else {
            assert_eq!(told, "PROXY UNKNOWN\r\n");
        }
    }
}

//! `tcpause switch`: what it prints and ends with, and the two recipes of the README.

use serde_json::Value;

use super::client::{assert_done, run};
use crate::harness::{End, Proxy, Upstream, echo, program, reserve, spawn, wait_until};

#[test]
fn a_switch_tells_where_connections_lead() {
    let [old, new] = [echo, echo].map(Upstream::tcp);
    let proxy = Proxy::to(&old);
    let control = proxy.control().addr();
    let mut served = proxy.connect();
    served.assert_echo(b"by the old one");
    let (from, to) = (old.addr().to_string(), new.addr().to_string());
    let printed =
        format!("switched to {to}, until the next start; connections left: 1 at {from}\n");
    assert_done(control, &["switch", &to], &printed);
    let in_vain = run(control, &["switch", &to, "--wait", "50ms"]);
    let done = format!("tcpause: switched to {to}, until the next start; waiting for up to ");
    let told = format!(
        "{done}50ms; connections left: 1 at {from}\ntcpause: switched to {to}, but the time is up; connections left: 1 at {from}; end them by tcpause kill --upstream ADDRESS"
    );
    assert_eq!((in_vain.code, &*in_vain.stdout, &*in_vain.stderr), (3, "", &*told));
    let waiting = spawn({
        let (control, to) = (control.clone(), to.clone());
        move || run(&control, &["switch", "--wait=1h", &to])
    });
    served.assert_echo(b"goes on");
    served.finish();
    let waited = waiting.join().unwrap();
    let told = format!("{done}1h; connections left: 1 at {from}");
    // It may have begun behind the end of the connection.
    assert!(waited.stderr.is_empty() || waited.stderr == told, "{waited:?}");
    assert_eq!(waited.code, 0);
    let expected = format!("switched to {to}, until the next start, the only one after ");
    assert!(waited.stdout.starts_with(&expected), "{waited:?}");
}

#[test]
fn connections_that_do_not_end_in_time_are_killed_if_told_so() {
    let [old, new] = [echo, echo].map(Upstream::tcp);
    let proxy = Proxy::to(&old);
    let control = proxy.control().addr();
    let mut stubborn = proxy.connect();
    stubborn.assert_echo(b"by the old one");
    let to = new.addr().to_string();
    let alone = run(control, &["switch", &to, "--on-timeout=kill"]);
    assert_eq!(alone.code, 2);
    let killed = run(control, &["switch", &to, "--wait=50ms", "--on-timeout=kill"]);
    assert_eq!((killed.code, killed.stderr.lines().count()), (0, 1), "{killed:?}");
    assert!(killed.stdout.contains("the only one after "), "{killed:?}");
    assert_eq!(stubborn.receive_all().end, End::Reset);
    proxy.connect().assert_echo(b"by the new one");
}

#[test]
fn a_switch_back_ends_the_wait_and_saves_the_connections() {
    for options in [&["--wait=1h"][..], &["--wait=1s", "--on-timeout=kill"]] {
        let [old, new] = [echo, echo].map(Upstream::tcp);
        let proxy = Proxy::to(&old);
        let control = proxy.control().addr();
        let (from, to) = (old.addr().to_string(), new.addr().to_string());
        let mut clients = vec![proxy.connect()];
        clients[0].assert_echo(b"by the old one");
        let waiting = spawn({
            let (control, to) = (control.clone(), to.clone());
            move || run(&control, &[&["switch", &to][..], options].concat())
        });
        proxy.wait_for_log(&format!(" to {to}; connections that stay at other servers: 1;"));
        assert_eq!(run(control, &["switch", &from]).code, 0);
        clients.push(proxy.connect());
        let waited = waiting.join().unwrap();
        let told = format!(
            "switched to {to}, but another switch leads to {from} since; no connection was reset"
        );
        assert_eq!((waited.code, &*waited.stdout), (75, ""), "{waited:?}");
        assert!(waited.stderr.ends_with(&told), "{waited:?}");
        for client in &mut clients {
            client.assert_echo(b"is there");
        }
    }
}

#[test]
fn each_server_with_connections_is_told_and_waited_for() {
    let upstreams = [echo, echo, echo].map(Upstream::tcp);
    let names = upstreams.each_ref().map(|upstream| upstream.addr().to_string());
    let proxy = Proxy::to(&upstreams[0]);
    let control = proxy.control().addr();
    let mut clients = Vec::new();
    for (index, name) in names.iter().enumerate() {
        assert_eq!(run(control, &["switch", name]).code, 0);
        clients.push(proxy.connect());
        clients[index].assert_echo(b"served");
    }
    proxy.wait_for_log(&format!(" to {}; connections that stay at other servers: 2;", names[2]));
    let in_vain = run(control, &["switch", &names[2], "--wait=0s"]);
    let left = format!("connections left: 1 at {}, 1 at {}; end them by", names[0], names[1]);
    assert!(in_vain.code == 3 && in_vain.stderr.contains(&left), "{in_vain:?}");
    let killed = run(control, &["switch", &names[2], "--wait=0s", "--on-timeout=kill"]);
    assert_eq!(killed.code, 0, "{killed:?}");
    clients.pop().unwrap().assert_echo(b"by the present one");
    for mut client in clients {
        assert_eq!(client.receive_all().end, End::Reset);
    }
}

#[test]
fn a_switch_leads_back_to_the_configured_server() {
    let [old, new] = [echo, echo].map(Upstream::tcp);
    let proxy = Proxy::to(&old);
    let control = proxy.control().addr();
    let (from, to) = (old.addr().to_string(), new.addr().to_string());
    assert_eq!(run(control, &["switch", &to]).code, 0);
    let printed = format!("switched to {from}, until the next start\n");
    assert_done(control, &["switch", "--configured"], &printed);
    proxy.connect().assert_echo(b"by the old one");
    assert_eq!((old.accepted(), new.accepted()), (2, 1), "each was looked at, and one served");
    let both = run(control, &["switch", &to, "--configured"]);
    assert!(both.code == 2 && both.stderr.contains("leave out either"), "{both:?}");
}

#[test]
fn what_is_wrong_is_told_and_nothing_changes() {
    let upstream = Upstream::tcp(echo);
    let proxy = Proxy::to(&upstream);
    let (control, nobody) = (proxy.control().addr(), reserve().addr().to_string());
    let own = proxy.addr().to_string();
    for (arguments, code, told) in [
        (&["switch"][..], 2, "switch: name a server: tcpause switch localhost:3003"),
        (&["switch", "localhost"], 2, "switch: \"localhost\" lacks a port"),
        (
            &["switch", "3003"],
            2,
            "switch: \"3003\" is only a number; did you mean `localhost:3003`?",
        ),
        (&["switch", "a:1", "b:1"], 2, "unexpected argument \"b:1\"; remove it"),
        (&["switch", "a:1", "--check=nothing"], 2, "write connect or none"),
        (&["switch", "localhost:0"], 2, "switch: tcp://localhost:0 has port 0"),
        (&["switch", &own], 2, "leads back to proxy.addr"),
        (
            &["switch", &nobody],
            75,
            "does not answer: Connection refused; nothing has changed; start it, or add --check none",
        ),
    ] {
        let finished = run(control, arguments);
        assert_eq!((finished.code, &*finished.stdout), (code, ""), "{finished:?}");
        assert!(finished.stderr.contains(told), "no {told:?} in {finished:?}");
        assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
    }
    proxy.connect().assert_echo(b"as before");
    let printed = format!("switched to {nobody}, until the next start\n");
    assert_done(control, &["switch", &nobody, "--check", "none"], &printed);
    let help = program().args(["switch", "--help"]).run();
    assert!(help.stdout.contains("Usage: tcpause switch [OPTIONS] ADDRESS"), "{}", help.stdout);
}

/// The recipe "One database at a time": neither server sees a client while the other one runs.
#[test]
fn exclusive_servers_are_exchanged_behind_a_pause() {
    let old = Upstream::tcp(echo);
    let next = reserve();
    let builder = Proxy::builder().upstream(&old);
    let state = builder.path("state.json").display().to_string();
    let proxy = builder.args(["--upstream-state-file", &state]).start();
    let control = proxy.control().addr();
    proxy.connect().assert_echo(b"by the old one");
    assert_eq!(run(control, &["pause", "--name=move", "--wait=30s"]).code, 0);
    let mut held: Vec<_> = (0..20).map(|_client| proxy.connect_held()).collect();
    drop(old);
    let to = next.addr().to_string();
    assert_eq!(run(control, &["switch", &to]).code, 75, "it does not listen yet");
    let new = Upstream::on(next.listen(), echo);
    assert_done(control, &["switch", &to], &format!("switched to {to}\n"));
    assert_done(control, &["resume", "--name=move"], "lifted: move\n");
    for client in &mut held {
        client.assert_echo(b"by the new one");
    }
    wait_until("the new one has served all", || new.accepted() == 1 + held.len());
    let shown: Value = serde_json::from_slice(&proxy.control().get("/upstream").body).unwrap();
    assert_eq!((&shown["persistent"], &shown["upstream"]), (&true.into(), &to.into()));
    assert_eq!(proxy.control().status().failed, 0);
}

//! Switches at the same time as other changes.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use serde_json::Value;

use super::switch::{json_of, letter, lettered, shown, switch};
use crate::harness::Proxy;

#[test]
fn the_state_file_names_the_present_one_whichever_upgrade_comes_between() {
    const UPGRADES: usize = 6;

    let upstreams = [lettered(b'a'), lettered(b'b')];
    let targets = upstreams.each_ref().map(|it| format!("/upstream?check=none&addr={}", it.addr()));
    let builder = Proxy::builder();
    let path = builder.path("state.json");
    let proxy = builder.upstream(&upstreams[0]).arg("--upstream-state-file").arg(&path).start();
    for _upgrade in 0..UPGRADES {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for target in targets.iter().rev().cycle() {
                    json_of(&proxy.control().put(target));
                    if is_over.load(Ordering::SeqCst) {
                        break;
                    }
                }
            });
            proxy.upgrade();
            is_over.store(true, Ordering::SeqCst);
        });
        let file: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(file["upstream"], shown(&proxy)["upstream"]);
    }
}

#[test]
fn another_spelling_of_an_upstream_in_use_is_no_idle_one() {
    let (old, new) = (lettered(b'a'), lettered(b'b'));
    let port = old.addr().port();
    let proxy = Proxy::builder().upstream_at(&format!("localhost:{port}")).start();
    let mut staying = proxy.connect();
    assert_eq!(letter(&mut staying), b'a');
    switch(&proxy, &new);
    proxy.upgrade();
    let wait = |host: &str, timeout: &str| {
        let target = format!("/upstream/block-until-idle?addr={host}:{port}&timeout={timeout}");
        proxy.control().get(&target)
    };
    for host in ["localhost", "LOCALHOST", "127.0.0.1"] {
        wait(host, "10ms").assert_error(504);
    }
    let unknown = wait("localhost.localdomain", "10ms").assert_error(404);
    assert!(unknown.contains(&format!("tcp://localhost:{port}")), "{unknown}");
    assert_eq!(wait("127.0.0.2", "10ms").status, 204);
    staying.finish();
    for host in ["localhost", "127.0.0.1", "another.name"] {
        assert_eq!(wait(host, "30s").status, 204);
    }
}

#[test]
fn connections_are_chosen_by_the_name_and_by_the_address_of_their_upstream() {
    let upstream = lettered(b'a');
    let [name, address] =
        ["localhost", "127.0.0.1"].map(|host| format!("{host}:{}", upstream.addr().port()));
    let proxy = Proxy::builder().upstream_at(&name).start();
    let mut clients = vec![proxy.connect()];
    letter(&mut clients[0]);
    json_of(&proxy.control().put(&format!("/upstream?addr={address}")));
    clients.push(proxy.connect());
    letter(&mut clients[1]);
    for (upstream, expected) in [(&name, 1), (&address, 2)] {
        let list = json_of(&proxy.control().get(&format!("/connections?upstream={upstream}")));
        assert_eq!(list["total"], expected, "{upstream}");
    }
}

#[test]
fn a_configuration_that_follows_the_switch_is_no_surprise() {
    let (old, new) = (lettered(b'a'), lettered(b'b'));
    let builder = Proxy::builder();
    let path = builder.path("state.json");
    let mut proxy = builder.upstream(&old).arg("--upstream-state-file").arg(&path).start();
    switch(&proxy, &new);
    proxy.terminate();
    assert_eq!(proxy.exit_code(), 0);
    let again = proxy.sibling().upstream(&new).arg("--upstream-state-file").arg(&path).start();
    assert_eq!(letter(&mut again.connect()), b'b');
    assert!(!again.log_so_far().contains("remembered"), "{}", again.log_so_far());
}

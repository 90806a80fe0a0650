//! A switch of the upstream is exact for steered clients, too.

use super::{Scene, clients::Clients, server::Server, steering};
use crate::harness::{amount, wait_until};

const BUSY_CLIENTS: usize = 12;

#[test]
fn nothing_reaches_the_old_server_behind_the_answer_to_a_switch() {
    let Some(scene) = Scene::start() else { return };
    scene.wait_steering();
    let (control, other) = (scene.control(), Server::start());
    let clients = Clients::start(BUSY_CLIENTS, scene.proxy.addr());
    let (switches, mut late, mut left) = (amount(20, 400), 0, 0);
    for switch in 0..switches {
        let (old, new) =
            if switch % 2 == 0 { (&scene.server, &other) } else { (&other, &scene.server) };
        clients.wait_served(BUSY_CLIENTS);
        let answer = control.put(&format!("/upstream?addr={}", new.url()));
        assert_eq!(answer.status, 200, "{answer}");
        let before = old.accepted();
        let answer =
            control.get(&format!("/upstream/block-until-idle?addr={}&timeout=20s", old.url()));
        assert_eq!(answer.status, 204, "{answer}");
        left += old.open();
        clients.wait_served(BUSY_CLIENTS);
        late += old.accepted() - before;
        scene.wait_steering();
    }
    let tally = clients.end();
    println!(
        "{switches} switches: {late} connections reached the old server behind the answer, and {left} were left behind a \
         wait; {} clients were steered, {} relayed, {} failed",
        tally.steered,
        tally.relayed,
        tally.failures.len(),
    );
    assert_eq!((late, left), (0, 0));
    assert!(tally.failures.is_empty(), "{:?}", tally.failures);
    assert!(tally.steered > switches);
}

#[test]
fn a_wait_for_the_old_server_counts_the_steered() {
    let Some(scene) = Scene::start() else { return };
    scene.wait_steering();
    let (control, other) = (scene.control(), Server::start());
    let mut kept = [scene.connect_steered(), scene.connect_steered()];
    assert_eq!(control.put(&format!("/upstream?addr={}", other.url())).status, 200);
    let wait = format!("/upstream/block-until-idle?addr={}&timeout=", scene.server.url());
    wait_until("both are counted", || {
        let answer = control.get(&format!("{wait}50ms"));
        assert_eq!(answer.status, 504, "{answer}");
        answer.text().contains("\"active\": 2")
    });
    let why = steering(control)["why"].to_string();
    assert!(why.contains(&scene.server.url().to_string()), "{why}");
    let (accepted, of_other) = (scene.server.accepted(), other.accepted());
    // Newcomers are served all the same.
    scene.connect().end();
    assert_eq!((scene.server.accepted(), other.accepted()), (accepted, of_other + 1));
    for client in &mut kept {
        client.assert_served();
    }
    kept.into_iter().for_each(super::Client::end);
    assert_eq!(control.get(&format!("{wait}20s")).status, 204);
    assert_eq!(scene.server.open(), 0);
    wait_until("newcomers are steered", || scene.connect().is_steered);
    assert_eq!(scene.server.accepted(), accepted);
}

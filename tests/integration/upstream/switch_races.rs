//! Switches at the same time as other changes.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use serde_json::Value;

use super::switch::{json_of, lettered, shown};
use crate::harness::Proxy;

#[test]
fn the_state_file_names_the_present_one_whichever_upgrade_comes_between() {
    const UPGRADES: usize = 6;

    let upstreams = [lettered(b'a'), lettered(b'b')];
    let builder = Proxy::builder();
    let path = builder.path("state.json");
    let proxy = builder.upstream(&upstreams[0]).arg("--upstream-state-file").arg(&path).start();
    for _upgrade in 0..UPGRADES {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for upstream in upstreams.iter().rev().cycle() {
                    let target = format!("/upstream?check=none&addr={}", upstream.addr());
                    json_of(&proxy.control().put(&target));
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

//! The sources of the fleet that are simulated: all but the client of the store and the thread.

// A macro, so that rustfmt does not follow it into their unit tests.
macro_rules! sources {
    ($($name:ident = $path:literal,)*) => { $(#[path = $path] pub(crate) mod $name;)* };
}

sources! {
    clock = "../../../src/fleet/clock.rs",
    coordinator = "../../../src/fleet/coordinator/mod.rs",
    keys = "../../../src/fleet/keys.rs",
    member = "../../../src/fleet/member/mod.rs",
    snapshot = "../../../src/fleet/snapshot.rs",
    step = "../../../src/fleet/step.rs",
    store = "../../../src/fleet/store.rs",
}

//! Load and faults: the main job under traffic, in short forms; `make soak` has the long ones.

mod chaos;
mod deploy;
mod headers;
mod kinds;
mod maintenance;
mod soak;
mod stop;
mod talk;
mod volume;

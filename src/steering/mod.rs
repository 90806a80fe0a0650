//! Steering: a BPF program sends new clients straight to the server's own listener, so that no byte passes this process.
//!
//! While it does not, because of a pause or as nobody listens, clients reach our own listener and are relayed as always.

#![allow(dead_code, reason = "nothing steers yet")]

#[cfg_attr(not(feature = "steering"), path = "no_bpf.rs")]
mod bpf;
mod count;
mod found;
#[cfg(test)]
mod tests;

//! Fuzzes requests to the control API.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tcpause_fuzz::control_request(bytes));

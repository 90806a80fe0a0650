//! Fuzzes what a caller of the control API sends.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tcpause::fuzz::control_request(bytes));

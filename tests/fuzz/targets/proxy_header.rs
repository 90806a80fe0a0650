//! Fuzzes headers of the PROXY protocol.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tcpause_fuzz::proxy_header(bytes));

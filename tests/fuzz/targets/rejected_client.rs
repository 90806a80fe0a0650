//! Fuzzes the first bytes of a client that is rejected, without a certificate and with one.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tcpause_fuzz::rejected_client(bytes));

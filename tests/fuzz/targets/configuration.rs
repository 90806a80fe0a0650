//! Fuzzes the configuration file.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tcpause_fuzz::configuration(bytes));

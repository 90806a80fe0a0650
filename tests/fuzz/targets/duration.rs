//! Fuzzes durations as operators write them.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tcpause_fuzz::duration(bytes));

//! Fuzzes the messages of a hand-over.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tcpause_fuzz::handover(bytes));

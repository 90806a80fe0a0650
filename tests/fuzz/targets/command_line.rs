//! Fuzzes the command line, which is a part of the program and so included here.

#![no_main]
#![allow(dead_code, unused_imports, reason = "the pages and completions are no part of this")]

#[path = "../../../src/bin/tcpause"]
mod program {
    pub(crate) mod cli;
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| program::cli::fuzz::command_line(bytes));

//! Fuzzes the command line, which is a part of the program and so included here.

#![no_main]
#![allow(dead_code, unused_imports, reason = "the pages and completions are no part of this")]

#[path = "../../../src/bin/tcpause/cli"]
mod program {
    #[path = "mod.rs"]
    pub(crate) mod cli;
    #[path = "tests/corpus.rs"]
    pub(crate) mod corpus;

    use cli::parse;
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| program::corpus::command_line(bytes));

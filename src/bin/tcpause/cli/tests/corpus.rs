//! The fuzz target of the command line. `make test` replays its corpus by the same function.

use std::{ffi::OsString, os::unix::ffi::OsStringExt};

use tcpause::Config;

use super::parse;

/// Checks arguments with NUL bytes between them: each command line that is understood makes a configuration that can be
/// shown and read again.
pub(crate) fn command_line(bytes: &[u8]) {
    let arguments = bytes.split(|&byte| byte == 0).map(|part| OsString::from_vec(part.to_vec()));
    let mut invocation = match parse(arguments) {
        Ok(invocation) => invocation,
        Err(error) => return assert!(!error.is_empty()),
    };
    // No file of this machine is read, whatever the arguments name.
    invocation.config_file = Some("/dev/null".into());
    match invocation.read() {
        Ok((config, _)) => {
            assert_eq!(Config::parse(&config.to_string(), "again").as_ref(), Ok(&config));
            if let Err(error) = config.validate() {
                drop(invocation.name_option(error));
            }
        }
        Err(error) => assert!(error.to_string().starts_with("--"), "{error}"),
    }
}

//! The journal of systemd, if standard error leads to it.

use std::{env, ffi::OsStr, io, os::fd::AsFd};

use rustix::fs::fstat;

/// Variable with device and inode of the stream that systemd has connected to the journal.
const VARIABLE: &str = "JOURNAL_STREAM";

/// Returns true if standard error is the journal. The variable alone does not show that: a child inherits it, and its
/// standard error may lead elsewhere.
pub(crate) fn is_stderr() -> bool {
    env::var_os(VARIABLE).is_some_and(|name| is_named(&name, io::stderr()))
}

fn is_named(name: &OsStr, stream: impl AsFd) -> bool {
    fstat(stream).is_ok_and(|stat| name == OsStr::new(&format!("{}:{}", stat.st_dev, stat.st_ino)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_stream_is_named_by_its_device_and_its_inode() {
        let file = tempfile::tempfile().unwrap();
        let (device, inode) = file.metadata().map(|it| (it.dev(), it.ino())).unwrap();
        for (name, expected) in [
            (format!("{device}:{inode}"), true),
            (format!("{}:{inode}", device + 1), false),
            (format!("{device}:{}", inode + 1), false),
            (format!("{inode}:{device}"), inode == device),
            (format!("{device}:{inode}:"), false),
            (device.to_string(), false),
            (String::new(), false),
        ] {
            assert_eq!(is_named(OsStr::new(&name), &file), expected, "{name:?}");
        }
    }
}

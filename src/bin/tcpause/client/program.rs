//! The look-up of the program that `exec` runs, before it pauses anything.

use std::{
    env,
    ffi::{OsStr, OsString},
    io::{self, ErrorKind},
    path::PathBuf,
};

use rustix::{
    fs::{Access, access},
    io::Errno,
};

use super::Failure;

/// Default of C libraries for an unset PATH.
const PATH_DEFAULT: &str = "/usr/local/bin:/bin:/usr/bin";

/// Exit codes of shells: for a program that cannot be run, and for a missing one.
const EXIT_NOT_RUN: u8 = 126;
const EXIT_NOT_FOUND: u8 = 127;

/// Looks for the program as a shell would.
pub(super) fn find(program: &[OsString]) -> Result<(), Failure> {
    let Some(name) = program.first() else { return Ok(()) };
    let path = env::var_os("PATH").unwrap_or_else(|| PATH_DEFAULT.into());
    let found = look_up(name, &path).map(drop);
    found.map_err(|error| cannot_run(name, &error, "nothing was paused"))
}

/// Returns the failure of a program that cannot be run, with its `result`.
pub(super) fn cannot_run(name: &OsStr, error: &io::Error, result: &str) -> Failure {
    let code = if error.kind() == ErrorKind::NotFound { EXIT_NOT_FOUND } else { EXIT_NOT_RUN };
    let name = name.to_string_lossy();
    Failure::Program(code, format!("cannot run {name:?}: {error}; {result}"))
}

/// Looks for a program as a shell would, and returns its path.
pub(crate) fn look_up(name: &OsStr, path: &OsStr) -> io::Result<PathBuf> {
    if name.as_encoded_bytes().contains(&b'/') {
        return check(name.into());
    }
    let not_found = Err(io::Error::new(ErrorKind::NotFound, "it is not in PATH"));
    // A folder that this user may not search counts as empty, and the search goes on with the next folder.
    env::split_paths(path)
        .map(|folder| folder.join(name))
        .filter(|file| !name.is_empty() && file.exists())
        .fold(not_found, |found, file| found.or_else(|_error| check(file)))
}

fn check(file: PathBuf) -> io::Result<PathBuf> {
    access(&file, Access::EXEC_OK)?;
    // The permission to execute a folder means to enter it, so a folder is no program.
    if file.is_dir() { Err(Errno::ACCESS.into()) } else { Ok(file) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_program_is_looked_for_as_shells_do() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        fs::create_dir(place("folder")).unwrap();
        fs::write(place("text"), "").unwrap();
        let path =
            OsString::from(format!("/nonexistent:{}:/bin:/usr/bin", folder.path().display()));
        let kind = |name: &OsStr| look_up(name, &path).map(drop).map_err(|error| error.kind());
        for (name, expected) in [
            ("sh", Ok(())),
            ("/bin/sh", Ok(())),
            ("nosuch", Err(ErrorKind::NotFound)),
            ("", Err(ErrorKind::NotFound)),
            ("./nosuch", Err(ErrorKind::NotFound)),
            ("text", Err(ErrorKind::PermissionDenied)),
            ("folder", Err(ErrorKind::PermissionDenied)),
            ("/", Err(ErrorKind::PermissionDenied)),
        ] {
            assert_eq!(kind(name.as_ref()), expected, "{name:?}");
        }
        assert_eq!(kind(place("text").as_os_str()), Err(ErrorKind::PermissionDenied));
        // A file that cannot be run does not hide a program in a later folder.
        fs::write(place("sh"), "").unwrap();
        assert_eq!(kind("sh".as_ref()), Ok(()));
        assert!(look_up("sh".as_ref(), "".as_ref()).is_err());
    }
}

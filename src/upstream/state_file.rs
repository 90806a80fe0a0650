//! `StateFile`: the file that remembers a switch of the upstream over restarts and crashes.
//!
//! It is written under another name, brought to the disk, and renamed. So a reader finds the last switch or the one before,
//! and never half of one.

use std::{
    ffi::OsString,
    fmt,
    fs::{self, File},
    io::{self, ErrorKind, Read, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{config::address::Address, error::Error};

/// Length of the largest file that is read: far more than two addresses have.
const BYTES_MAX: u64 = 64 << 10;

/// File that remembers a switch.
#[derive(Debug)]
pub(crate) struct StateFile(PathBuf);

/// Content of the file. Further fields are those of a later program.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    /// Address in the configuration at the time of the switch.
    configured: String,
    /// Address that was switched to.
    upstream: String,
}

impl StateFile {
    /// Returns the file at `path`, which need not be there yet.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Returns the address that was switched to, if the file is there and was written against the address `configured`.
    /// Otherwise the configuration holds. The log says which.
    pub(crate) fn recall(&self, configured: &Address) -> Result<Option<Address>, Error> {
        self.check_folder()?;
        let Some(text) = self.read()? else {
            log::info!("{self} is not there: the upstream is {configured}, as configured");
            return Ok(None);
        };
        let Remembered { configured: before, upstream } =
            serde_json::from_str(&text).map_err(|error| self.unusable(&error))?;
        if before != configured.to_string() {
            if upstream != before {
                log::warn!(
                    "the upstream is {configured}, as configured: {self} remembered {upstream}, which was switched to when {before} was configured"
                );
            }
            // Else the switch would come back with an earlier configuration.
            return fs::remove_file(&self.0).map(|()| None).map_err(|error| self.unusable(&error));
        }
        let address = upstream.parse().map_err(|error: String| self.unusable(&error))?;
        log::info!("the upstream is {address}, as {self} remembers; configured is {configured}");
        Ok(Some(address))
    }

    /// Remembers the address `upstream`, which the present configuration does not have.
    pub(crate) fn write(&self, configured: &Address, upstream: &Address) -> io::Result<()> {
        let remembered =
            Remembered { configured: configured.to_string(), upstream: upstream.to_string() };
        let text = serde_json::to_string(&remembered)? + "\n";
        let beside = self.beside();
        let written = File::create(&beside).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&beside, &self.0)?;
            // Without this, a crash of the host could bring the earlier file back.
            File::open(self.folder())?.sync_all()
        });
        written.inspect_err(|_error| drop(fs::remove_file(&beside)))
    }

    fn read(&self) -> Result<Option<String>, Error> {
        let mut text = String::new();
        let read = File::open(&self.0)
            .and_then(|file| file.take(BYTES_MAX).read_to_string(&mut text).map(drop));
        match read {
            Ok(()) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.unusable(&error)),
        }
    }

    /// Checks that there is a folder to write to, as the first switch would be too late to learn it.
    fn check_folder(&self) -> Result<(), Error> {
        let folder = self.folder();
        let access = rustix::fs::access(folder, rustix::fs::Access::WRITE_OK);
        access.map_err(|error| {
            let error = io::Error::from(error);
            Error::System(format!(
                "{self} cannot be written, as its folder {} is not usable: {error}; make the folder, and let this user write to it",
                folder.display()
            ))
        })
    }

    /// Returns the error of a file that cannot be read. To go on without it could lead clients to a server that was stopped.
    fn unusable(&self, error: &dyn fmt::Display) -> Error {
        Error::System(format!(
            "{self} cannot be read: {error}; correct it, or remove it if upstream.addr is the right one"
        ))
    }

    fn folder(&self) -> &Path {
        match self.0.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        }
    }

    fn beside(&self) -> PathBuf {
        let mut name = OsString::from(".");
        name.push(self.0.file_name().unwrap_or_default());
        name.push(".new");
        self.0.with_file_name(name)
    }
}

impl fmt::Display for StateFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "upstream.state-file {}", self.0.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Address {
        Address::tcp("localhost", port)
    }

    #[test]
    fn the_last_switch_is_recalled_while_the_configuration_stays() {
        let folder = tempfile::tempdir().unwrap();
        let file = StateFile::new(folder.path().join("upstream.json"));
        assert_eq!(file.recall(&address(1)), Ok(None));
        for port in [2, 3] {
            file.write(&address(1), &address(port)).unwrap();
            assert_eq!(file.recall(&address(1)), Ok(Some(address(port))));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
        assert_eq!(file.recall(&address(4)), Ok(None), "it was edited");
        assert_eq!(file.recall(&address(1)), Ok(None), "it was edited back");
    }

    #[test]
    fn a_file_that_cannot_be_used_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = StateFile::new(folder.path().join("upstream.json"));
        for text in ["", "{", "{\"configured\": \"tcp://localhost:1\"}", "\u{0}"] {
            fs::write(&file.0, text).unwrap();
            let error = file.recall(&address(1)).unwrap_err().to_string();
            assert!(error.contains("correct it, or remove it"), "{error}");
        }
        let wrong = r#"{"configured": "tcp://localhost:1", "upstream": "nowhere"}"#;
        fs::write(&file.0, wrong).unwrap();
        assert!(file.recall(&address(1)).is_err());
        let later = r#"{"configured": "tcp://localhost:1", "upstream": ":7", "more": 1}"#;
        fs::write(&file.0, later).unwrap();
        assert_eq!(file.recall(&address(1)), Ok(Some(Address::tcp("", 7))));
        let nowhere = StateFile::new(folder.path().join("no/upstream.json"));
        assert!(nowhere.recall(&address(1)).unwrap_err().to_string().contains("make the folder"));
        assert!(nowhere.write(&address(1), &address(2)).is_err());
    }

    #[test]
    fn a_failed_write_leaves_the_file_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let file = StateFile::new(folder.path().join("upstream.json"));
        file.write(&address(1), &address(2)).unwrap();
        fs::create_dir(file.beside()).unwrap();
        assert!(file.write(&address(1), &address(3)).is_err());
        assert_eq!(file.recall(&address(1)), Ok(Some(address(2))));
    }
}

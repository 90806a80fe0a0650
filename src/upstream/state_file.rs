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
    process,
};

use rustix::fs::{Mode, OFlags};
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
        let writable = self.check_folder();
        let Some(Remembered { configured: before, upstream }) = self.read()? else {
            writable?;
            log::info!("{self} is not there: the upstream is {configured}, as configured");
            return Ok(None);
        };
        if before != configured.to_string() {
            // Else the configuration has followed the switch, or there was none.
            if upstream != before && upstream != configured.to_string() {
                log::warn!(
                    "the upstream is {configured}, as configured: {self} remembered {upstream}, which was switched to when {before} was configured"
                );
            }
            // Else the switch would come back with an earlier configuration.
            return fs::remove_file(&self.0).map(|()| None).map_err(|error| self.unusable(&error));
        }
        let address = self.parse(&upstream)?;
        // The switch is known, so that a disk that cannot be written any more is no reason to serve nobody.
        if let Err(error) = writable {
            log::warn!("{error}; until then, every other switch is refused");
        }
        log::info!("the upstream is {address}, as {self} remembers; configured is {configured}");
        Ok(Some(address))
    }

    /// Checks that a start could use the file, and changes nothing.
    pub(crate) fn check(&self, configured: &Address) -> Result<(), Error> {
        let writable = self.check_folder();
        match self.read()? {
            Some(Remembered { configured: before, upstream })
                if before == configured.to_string() =>
            {
                self.parse(&upstream).map(drop)
            }
            _ => writable,
        }
    }

    /// Remembers the address `upstream`, which the present configuration does not have.
    pub(crate) fn write(&self, configured: &Address, upstream: &Address) -> io::Result<()> {
        self.write_and(configured, upstream, File::sync_all)
    }

    /// Writes the file, and then has `sync` bring its folder to the disk.
    fn write_and(
        &self,
        configured: &Address,
        upstream: &Address,
        sync: impl FnOnce(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        let remembered =
            Remembered { configured: configured.to_string(), upstream: upstream.to_string() };
        let text = serde_json::to_string(&remembered)? + "\n";
        // Opened first: behind the rename, a start would find the new address, so that nothing may fail any more.
        let folder = File::open(self.folder())?;
        let beside = self.beside("new");
        // A process that was killed may have left it. Anything else of that name is not opened: a FIFO would block.
        fs::remove_file(&beside).ok();
        let written = File::create_new(&beside).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&beside, &self.0)
        });
        written.inspect_err(|_error| drop(fs::remove_file(&beside)))?;
        if let Err(error) = sync(&folder) {
            log::warn!(
                "{self} is written, but a crash of this host may bring its earlier content back: {error}"
            );
        }
        Ok(())
    }

    fn read(&self) -> Result<Option<Remembered>, Error> {
        let text = match self.read_text() {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.unusable(&error)),
        };
        serde_json::from_str(&text).map(Some).map_err(|error| self.unusable(&error))
    }

    fn read_text(&self) -> io::Result<String> {
        // A FIFO without a writer would block.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(&self.0, flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        let mut text = String::new();
        file.take(BYTES_MAX).read_to_string(&mut text)?;
        Ok(text)
    }

    fn parse(&self, upstream: &str) -> Result<Address, Error> {
        Address::of_server(upstream).map_err(|error| self.unusable(&error))
    }

    /// Checks that the folder takes a file, as the first switch would be too late to learn it.
    fn check_folder(&self) -> Result<(), Error> {
        let (folder, probe) = (self.folder(), self.beside(&process::id().to_string()));
        let made = File::create_new(&probe).and_then(|_file| fs::remove_file(&probe));
        made.map_err(|error| {
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

    fn beside(&self, ending: &str) -> PathBuf {
        let mut name = OsString::from(".");
        name.push(self.0.file_name().unwrap_or_default());
        name.push(".");
        name.push(ending);
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
            let error = file.recall(&address(1)).unwrap_err();
            assert_eq!(file.check(&address(1)).unwrap_err(), error);
            assert!(error.to_string().contains("correct it, or remove it"), "{error}");
        }
        for wrong in ["nowhere", ":7", "tcp://:0"] {
            let wrong = format!(r#"{{"configured": "tcp://localhost:1", "upstream": "{wrong}"}}"#);
            fs::write(&file.0, wrong).unwrap();
            assert!(file.recall(&address(1)).is_err());
        }
        assert!(file.check(&address(1)).is_err());
        assert_eq!(
            file.check(&address(2)),
            Ok(()),
            "the configuration wins, and nothing is removed"
        );
        assert!(file.0.exists());
        fs::remove_file(&file.0).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &file.0, fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let error = file.recall(&address(1)).unwrap_err().to_string();
        assert!(error.contains("it is no regular file"), "{error}");
        fs::remove_file(&file.0).unwrap();
        let later = r#"{"configured": "tcp://localhost:1", "upstream": "a:7", "more": 1}"#;
        fs::write(&file.0, later).unwrap();
        assert_eq!(file.recall(&address(1)), Ok(Some(Address::tcp("a", 7))));
        // Root may write to this folder, and cannot make a file in it.
        let proc = StateFile::new("/proc/state".into());
        assert!(proc.check(&address(1)).unwrap_err().to_string().contains("make the folder"));
        let nowhere = StateFile::new(folder.path().join("no/upstream.json"));
        assert!(nowhere.recall(&address(1)).unwrap_err().to_string().contains("make the folder"));
        assert!(nowhere.write(&address(1), &address(2)).is_err());
    }

    #[test]
    fn a_switch_that_is_remembered_holds_even_if_no_other_can_be() {
        let folder = tempfile::tempdir().unwrap();
        // The name is so long that no other file can be made beside it.
        let file = StateFile::new(folder.path().join("a".repeat(255)));
        let error = file.recall(&address(1)).unwrap_err().to_string();
        assert!(error.contains("make the folder"), "{error}");
        assert!(file.check(&address(1)).is_err());
        let text = r#"{"configured": "tcp://localhost:1", "upstream": "tcp://localhost:2"}"#;
        fs::write(&file.0, text).unwrap();
        assert_eq!(file.recall(&address(1)), Ok(Some(address(2))));
        assert_eq!(file.check(&address(1)), Ok(()));
    }

    #[test]
    fn behind_the_rename_nothing_fails_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let file = StateFile::new(folder.path().join("upstream.json"));
        let fails = |folder: &File| {
            assert!(folder.metadata().unwrap().is_dir());
            Err(io::Error::from_raw_os_error(5))
        };
        assert!(file.write_and(&address(1), &address(2), fails).is_ok());
        assert_eq!(file.recall(&address(1)), Ok(Some(address(2))));
    }

    #[test]
    fn a_failed_write_leaves_the_file_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let file = StateFile::new(folder.path().join("upstream.json"));
        file.write(&address(1), &address(2)).unwrap();
        fs::create_dir(file.beside("new")).unwrap();
        assert!(file.write(&address(1), &address(3)).is_err());
        assert_eq!(file.recall(&address(1)), Ok(Some(address(2))));
    }
}

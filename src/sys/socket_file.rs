//! The file of a UNIX listener. It appears with its mode and listening, and never replaces a living listener.
//!
//! The socket is bound under another name beside its path, gets its mode, listens, and is renamed to the path. Until
//! then, the path shows the file that was there before. A lock on the directory orders processes that start at the same
//! moment. The lock ends with its process, so a killed process leaves nothing but files that the next start takes over.

use std::{
    fs::{self, Permissions},
    io::{self, ErrorKind},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown},
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, open},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, socket_with},
};
use serde::{Deserialize, Serialize};

/// Interval and number of the attempts to lock the directory: 2 s in all, where an owner needs less than a millisecond.
const LOCK_RETRY_INTERVAL: Duration = Duration::from_millis(10);
const LOCK_TRIES_MAX: usize = 200;

/// Temporary name where the path with a suffix would be too long for a socket.
const SHORT_NAME: &str = ".tcpause.new";

/// The file of a UNIX listener. Dropping it removes the file, unless another socket has replaced it.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode, which are not reused while the socket is open.
    identity: (u64, u64),
}

/// File of a UNIX listener in a hand-over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SocketFileWords {
    path: PathBuf,
    identity: (u64, u64),
}

/// Rights to a socket file.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Access {
    /// Its mode; left to the umask if absent.
    pub(crate) mode: Option<u32>,
    /// Number of its group; that of the process if absent.
    pub(crate) group: Option<u32>,
}

impl SocketFile {
    /// Makes `socket` listen at `path`, and replaces a file on which no process listens.
    pub(crate) fn listen(
        socket: &OwnedFd,
        path: &Path,
        access: Access,
        backlog: i32,
    ) -> io::Result<Self> {
        let directory = path.parent().ok_or(ErrorKind::InvalidInput)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(directory, flags, Mode::empty())?;
        lock(&directory)?;
        check_free(path)?;

        let mut file = Self::listen_beside(socket, path, &directory, access, backlog)?;
        fs::rename(&file.path, path)?;
        file.path = path.into();
        Ok(file)
    }

    /// Makes `socket` listen under a temporary name, with its final group and mode.
    fn listen_beside(
        socket: &OwnedFd,
        path: &Path,
        directory: &OwnedFd,
        access: Access,
        backlog: i32,
    ) -> io::Result<Self> {
        let (beside, address) = other_name(path, directory)?;
        // A process that was killed during its start has left this file.
        if is_socket(&beside)? {
            fs::remove_file(&beside)?;
        }
        bind(socket, &address)?;
        let file = Self { identity: identity(&beside)?, path: beside };
        // The group comes first, so that the mode never serves another one.
        if access.group.is_some() {
            chown(&file.path, None, access.group).map_err(|error| {
                let text = format!("its file cannot have the group of control.group: {error}");
                io::Error::new(ErrorKind::Unsupported, text)
            })?;
        }
        if let Some(mode) = access.mode {
            fs::set_permissions(&file.path, Permissions::from_mode(mode))?;
        }
        rustix::net::listen(socket, backlog)?;
        Ok(file)
    }
}

impl SocketFile {
    /// Describes the file for a hand-over.
    pub(crate) fn describe(&self) -> SocketFileWords {
        let Self { path, identity } = self;
        SocketFileWords { path: path.clone(), identity: *identity }
    }

    /// Returns a file that another process has made, if it is still that one.
    pub(crate) fn adopt(words: &SocketFileWords) -> Option<Self> {
        let SocketFileWords { path, identity: expected } = words;
        let is_same = identity(path).is_ok_and(|now| now == *expected);
        is_same.then(|| Self { path: path.clone(), identity: *expected })
    }

    /// Returns its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Sets its group and mode. The group comes first, so that the mode never serves another one.
    pub(crate) fn set_access(&self, access: Access) -> io::Result<()> {
        if access.group.is_some() {
            chown(&self.path, None, access.group)?;
        }
        let set = |mode| fs::set_permissions(&self.path, Permissions::from_mode(mode));
        access.mode.map_or(Ok(()), set)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A socket that has replaced this one keeps its file.
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            fs::remove_file(&self.path).ok();
        }
    }
}

/// Locks the directory, for as long as `directory` is open.
fn lock(directory: &OwnedFd) -> io::Result<()> {
    for _try in 0..LOCK_TRIES_MAX {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK | Errno::INTR) => thread::park_timeout(LOCK_RETRY_INTERVAL),
            // A file system without locks cannot order two starts, but that is no reason to refuse one.
            Ok(()) | Err(_) => return Ok(()),
        }
    }
    Err(io::Error::new(ErrorKind::ResourceBusy, "another process keeps its directory locked"))
}

/// Checks that no process listens at `path`: the path is free, or its socket refuses to connect.
fn check_free(path: &Path) -> io::Result<()> {
    let address = SocketAddrUnix::new(path)?;
    if !is_socket(path)? {
        return Ok(());
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&probe, &address) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(()),
        Err(Errno::ACCESS) => Err(Errno::ACCESS.into()),
        Ok(()) | Err(_) => Err(Errno::ADDRINUSE.into()),
    }
}

/// Returns true for a socket at `path`, and false if the path is free. Any other file is an error.
fn is_socket(path: &Path) -> io::Result<bool> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.file_type().is_socket() => Ok(true),
        Ok(_) => Err(io::Error::new(ErrorKind::AlreadyExists, "the file there is not a socket")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Returns the name to bind, in the same directory. Tools will show it for the socket, so it resembles the path as far
/// as the length allows.
fn other_name(path: &Path, directory: &OwnedFd) -> io::Result<(PathBuf, SocketAddrUnix)> {
    let name = path.file_name().ok_or(ErrorKind::InvalidInput)?;
    let mut beside = std::ffi::OsString::from(".");
    beside.push(name);
    beside.push(".new");
    let beside = path.with_file_name(beside);
    if let Ok(address) = SocketAddrUnix::new(&beside) {
        return Ok((beside, address));
    }
    let short = PathBuf::from(format!("/proc/self/fd/{}/{SHORT_NAME}", directory.as_raw_fd()));
    let address = SocketAddrUnix::new(&short)?;
    Ok((short, address))
}

/// Returns the device and inode of a file.
pub(crate) fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = path.symlink_metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn start(path: &Path, mode: Option<u32>) -> io::Result<(OwnedFd, SocketFile)> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let file = SocketFile::listen(&socket, path, Access { mode, group: None }, 16)?;
        Ok((socket, file))
    }

    fn names(directory: &Path) -> Vec<String> {
        let names = fs::read_dir(directory).unwrap();
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_has_its_mode_and_goes_with_its_listener() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let (_socket, file) = start(&path, Some(0o620)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o620);
        UnixStream::connect(&path).unwrap();
        assert_eq!(names(directory.path()), ["a.sock"]);
        drop(file);
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn a_file_is_complete_before_it_has_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let directory = open(folder.path(), OFlags::RDONLY, Mode::empty()).unwrap();
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        let access = Access { mode: Some(0o620), group: None };
        let file = SocketFile::listen_beside(&socket, &path, &directory, access, 16).unwrap();
        assert_eq!(names(folder.path()), [".a.sock.new"]);
        assert_eq!(fs::metadata(&file.path).unwrap().permissions().mode() & 0o7777, 0o620);
        UnixStream::connect(&file.path).unwrap();
        // A start that fails now leaves nothing behind.
        drop(file);
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn what_a_killed_process_has_left_is_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a.sock", ".a.sock.new"] {
            drop(UnixListener::bind(directory.path().join(name)).unwrap());
        }
        let path = directory.path().join("a.sock");
        let (_socket, _file) = start(&path, None).unwrap();
        UnixStream::connect(&path).unwrap();
        assert_eq!(names(directory.path()), ["a.sock"]);
    }

    #[test]
    fn whoever_listens_keeps_the_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let owner = UnixListener::bind(&path).unwrap();
        let before = identity(&path).unwrap();
        assert_eq!(start(&path, None).unwrap_err().kind(), ErrorKind::AddrInUse);
        // A listener with a full queue is alive too.
        rustix::net::listen(&owner, 0).unwrap();
        owner.set_nonblocking(true).unwrap();
        while owner.accept().is_ok() {}
        let _waiting = UnixStream::connect(&path).unwrap();
        assert_eq!(start(&path, None).unwrap_err().kind(), ErrorKind::AddrInUse);
        assert_eq!(identity(&path).unwrap(), before);
        assert_eq!(names(directory.path()), ["a.sock"]);
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a.sock", ".b.sock.new"] {
            fs::write(directory.path().join(name), "precious").unwrap();
        }
        std::os::unix::fs::symlink("/dev/null", directory.path().join("c.sock")).unwrap();
        fs::create_dir(directory.path().join("d.sock")).unwrap();
        for name in ["a.sock", "b.sock", "c.sock", "d.sock"] {
            let error = start(&directory.path().join(name), None).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{name}");
        }
        for name in ["a.sock", ".b.sock.new"] {
            assert_eq!(fs::read(directory.path().join(name)).unwrap(), b"precious");
        }
    }

    #[test]
    fn a_successor_keeps_its_file_when_its_predecessor_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let (socket, file) = start(&path, None).unwrap();
        rustix::net::shutdown(&socket, rustix::net::Shutdown::Read).unwrap();
        let (_socket, _file) = start(&path, None).unwrap();
        drop((file, socket));
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_lock_is_waited_for_and_not_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let locked = fs::File::open(directory.path()).unwrap();
        locked.lock().unwrap();
        assert_eq!(start(&path, None).unwrap_err().kind(), ErrorKind::ResourceBusy);
        let waiting = thread::Builder::new().spawn({
            let path = path.clone();
            move || start(&path, None)
        });
        locked.unlock().unwrap();
        let (_socket, _file) = waiting.unwrap().join().unwrap().unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn the_longest_path_has_room_for_the_other_name() {
        let directory = tempfile::tempdir().unwrap();
        let length = |length: usize| {
            let used = directory.path().as_os_str().len() + 1;
            directory.path().join("a".repeat(length - used))
        };
        // A long path may have a short last part, shorter than the temporary name.
        let deep = length(105);
        fs::create_dir(&deep).unwrap();
        for path in [length(107), deep.join("s")] {
            assert_eq!(path.as_os_str().len(), 107);
            let (_socket, _file) = start(&path, None).unwrap();
            UnixStream::connect(&path).unwrap();
            let expected = if path.parent() == Some(directory.path()) { 2 } else { 1 };
            assert_eq!(names(path.parent().unwrap()).len(), expected);
        }
    }
}

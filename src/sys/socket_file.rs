//! The file of a UNIX listener: it appears with its mode and listening, and whoever listens already keeps it.
//!
//! The socket is bound under another name beside its path, gets its mode, listens, and takes the path in one step. Until
//! then, others find what was there before. A lock on the directory orders those who start at the same moment; it ends with
//! its process, so one that is killed leaves nothing behind but names that the next start takes over.

use std::{
    fs::{self, Permissions},
    io::{self, ErrorKind},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
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

/// How often, and how many times, the lock on the directory is tried: 2 s, where an owner needs less than a millisecond.
const LOCK_RETRY_INTERVAL: Duration = Duration::from_millis(10);
const LOCK_TRIES_MAX: usize = 200;

/// The other name where the path with a suffix would be too long for a socket.
const SHORT_NAME: &str = ".tcpause.new";

/// The file of a UNIX listener; dropping it removes the file, if it is still the one that was made.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// The device and inode; neither is used again as long as the socket is open.
    identity: (u64, u64),
}

impl SocketFile {
    /// Has `socket` listen at `path`, in the place of a file that nobody listens on any more. Without a mode, the file has
    /// what the umask leaves.
    pub(crate) fn listen(
        socket: &OwnedFd,
        path: &Path,
        mode: Option<u32>,
        backlog: i32,
    ) -> io::Result<Self> {
        let directory = path.parent().ok_or(ErrorKind::InvalidInput)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(directory, flags, Mode::empty())?;
        lock(&directory)?;
        check_free(path)?;

        let mut file = Self::listen_beside(socket, path, &directory, mode, backlog)?;
        fs::rename(&file.path, path)?;
        file.path = path.into();
        Ok(file)
    }

    /// Returns the device and inode.
    pub(crate) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Has `socket` listen under another name, complete in all but the name.
    fn listen_beside(
        socket: &OwnedFd,
        path: &Path,
        directory: &OwnedFd,
        mode: Option<u32>,
        backlog: i32,
    ) -> io::Result<Self> {
        let (beside, address) = other_name(path, directory)?;
        // A start that was killed at the wrong moment has left it.
        if is_socket(&beside)? {
            fs::remove_file(&beside)?;
        }
        bind(socket, &address)?;
        let file = Self { identity: identity(&beside)?, path: beside };
        if let Some(mode) = mode {
            fs::set_permissions(&file.path, Permissions::from_mode(mode))?;
        }
        rustix::net::listen(socket, backlog)?;
        Ok(file)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Whoever has taken the path over since keeps it.
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            fs::remove_file(&self.path).ok();
        }
    }
}

/// Waits for the directory, which is locked for as long as `directory` is open.
fn lock(directory: &OwnedFd) -> io::Result<()> {
    for _try in 0..LOCK_TRIES_MAX {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK | Errno::INTR) => thread::park_timeout(LOCK_RETRY_INTERVAL),
            // A file system without locks does not order two starts, and is no reason to refuse one.
            Ok(()) | Err(_) => return Ok(()),
        }
    }
    Err(io::Error::new(ErrorKind::ResourceBusy, "another process keeps its directory locked"))
}

/// Whether nobody listens at `path`: nothing is there, or a socket that refuses to connect.
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

/// Whether there is a socket at `path`, rather than nothing; anything else is an error.
fn is_socket(path: &Path) -> io::Result<bool> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.file_type().is_socket() => Ok(true),
        Ok(_) => Err(io::Error::new(ErrorKind::AlreadyExists, "the file there is not a socket")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The name to bind, in the same directory. It is the one that tools will show for the socket, so it resembles the path
/// where the length allows it.
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

/// The device and inode of a file.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
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
        let file = SocketFile::listen(&socket, path, mode, 16)?;
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
        let file = SocketFile::listen_beside(&socket, &path, &directory, Some(0o620), 16).unwrap();
        assert_eq!(names(folder.path()), [".a.sock.new"]);
        assert_eq!(fs::metadata(&file.path).unwrap().permissions().mode() & 0o7777, 0o620);
        UnixStream::connect(&file.path).unwrap();
        // One that fails now leaves nothing behind.
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
        // One whose queue is full is still there.
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
        // In the middle of a path, too: the name may be shorter than the one beside it.
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

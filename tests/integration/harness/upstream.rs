//! The server behind the proxy.

use std::{
    io::{Read, Write},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, Receiver},
    },
};

use tempfile::TempDir;

use super::{Addr, End, Family, Listener, PATIENCE, Received, Stream, spawn};

/// Upstream that runs one behaviour on each connection, on a thread of its own.
pub(crate) struct Upstream {
    listener: Arc<Listener>,
    addr: Addr,
    accepted: Arc<AtomicUsize>,
    sessions: Receiver<Session>,
    /// Folder of the socket file, kept until the upstream is dropped.
    dir: Option<TempDir>,
}

/// Connection that has ended.
#[derive(Debug)]
pub(crate) struct Session {
    /// Position in the order of acceptance, from 0.
    pub(crate) number: usize,
    pub(crate) received: Received,
}

impl Upstream {
    /// Listens at a free address.
    pub(crate) fn start(
        family: Family,
        behaviour: impl Fn(Stream) -> Received + Send + Sync + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = Listener::bind(&Addr::free(family, dir.path(), "upstream.sock"));
        let mut upstream = Self::on(listener, behaviour);
        upstream.dir = Some(dir);
        upstream
    }

    pub(crate) fn tcp(behaviour: impl Fn(Stream) -> Received + Send + Sync + 'static) -> Self {
        Self::start(Family::Tcp4, behaviour)
    }

    /// Serves `listener`.
    pub(crate) fn on(
        listener: Listener,
        behaviour: impl Fn(Stream) -> Received + Send + Sync + 'static,
    ) -> Self {
        let listener = Arc::new(listener);
        let addr = listener.addr();
        let accepted = Arc::new(AtomicUsize::new(0));
        let (sender, sessions) = mpsc::channel();
        let behaviour = Arc::new(behaviour);
        let (counter, socket) = (accepted.clone(), listener.clone());
        drop(spawn(move || {
            while let Ok(stream) = socket.accept() {
                let number = counter.fetch_add(1, Ordering::SeqCst);
                let (behaviour, sender) = (behaviour.clone(), sender.clone());
                // An error means that the test has ended and needs the session no more.
                drop(spawn(move || sender.send(Session { number, received: behaviour(stream) })));
            }
        }));
        Self { listener, addr, accepted, sessions, dir: None }
    }

    pub(crate) fn addr(&self) -> &Addr {
        &self.addr
    }

    /// Returns the number of connections that were accepted so far.
    pub(crate) fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Waits for the next connection that ends, and returns it.
    #[track_caller]
    pub(crate) fn session(&self) -> Session {
        self.sessions.recv_timeout(PATIENCE).expect("a connection of the upstream that ends")
    }

    /// Returns the bytes and the end that the only connection received.
    #[track_caller]
    pub(crate) fn received(&self) -> Received {
        self.session().received
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.listener.close();
    }
}

/// Echoes all bytes until the client ends its stream, then closes.
pub(crate) fn echo(mut stream: Stream) -> Received {
    let mut received = Received { bytes: Vec::new(), end: End::Eof };
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return received,
            Ok(length) => {
                received.bytes.extend_from_slice(&buffer[..length]);
                if let Err(error) = stream.write_all(&buffer[..length]) {
                    return Received { end: error.into(), ..received };
                }
            }
            Err(error) => return Received { end: error.into(), ..received },
        }
    }
}

/// Collects all bytes until the client ends its stream, then closes.
pub(crate) fn record(mut stream: Stream) -> Received {
    stream.receive_all()
}

//! Relay that cuts a client off from a member of etcd.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
};

use super::PATIENCE;

/// Relay between clients and a member that can swallow all bytes: a cut, of which neither side is told.
pub(crate) struct Relay {
    addr: SocketAddr,
    listener: TcpListener,
    shared: Arc<RelayState>,
}

#[derive(Default)]
struct RelayState {
    is_cut: AtomicBool,
    /// Connections up to this one are cut for ever.
    silent: AtomicU32,
    has_ended: AtomicBool,
    accepted: Mutex<u32>,
    grown: Condvar,
    /// Both ends of all connections.
    streams: Mutex<Vec<TcpStream>>,
}

impl Relay {
    pub(crate) fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let shared = Arc::new(RelayState::default());
        let relay = Self {
            addr: listener.local_addr().expect("a bound socket"),
            listener: listener.try_clone().expect("a descriptor"),
            shared: Arc::clone(&shared),
        };
        let accept = move || {
            for client in listener.incoming().map_while(Result::ok) {
                if shared.has_ended.load(Ordering::SeqCst) {
                    break;
                }
                let mut accepted = shared.accepted.lock().expect("a count");
                *accepted += 1;
                let number = *accepted;
                drop(accepted);
                shared.grown.notify_all();
                shared.relay(client, target, number);
            }
        };
        drop(thread::Builder::new().spawn(accept).expect("a thread"));
        relay
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Returns the number of connections so far.
    pub(crate) fn accepted(&self) -> u32 {
        *self.shared.accepted.lock().expect("a count")
    }

    /// Waits until there were so many connections.
    #[track_caller]
    pub(crate) fn await_accepted(&self, count: u32) {
        let accepted = self.shared.accepted.lock().expect("a count");
        let waits = |accepted: &mut u32| *accepted < count;
        let waited = self.shared.grown.wait_timeout_while(accepted, PATIENCE, waits);
        let result = waited.expect("a count").1;
        assert!(!result.timed_out(), "in vain: waited for connection {count}");
    }

    /// Swallows all bytes from now on. Connections stay, and new ones are taken.
    pub(crate) fn cut(&self) {
        self.shared.is_cut.store(true, Ordering::SeqCst);
    }

    /// Swallows all bytes of the present connections, and none of later ones.
    pub(crate) fn silence(&self) {
        self.shared.silent.store(self.accepted(), Ordering::SeqCst);
    }

    /// Ends the cut. Connections that have lost bytes are closed, as all are.
    pub(crate) fn heal(&self) {
        self.close();
        self.shared.is_cut.store(false, Ordering::SeqCst);
    }

    /// Closes all connections.
    pub(crate) fn close(&self) {
        for stream in self.shared.streams.lock().expect("streams").drain(..) {
            // An error means that it has ended already.
            drop(stream.shutdown(Shutdown::Both));
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.has_ended.store(true, Ordering::SeqCst);
        self.close();
        // A thread that waits in `accept` gets an error.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

impl RelayState {
    /// Carries the bytes of one client in two threads. A client whose server cannot be reached is closed, unless it is cut off.
    fn relay(self: &Arc<Self>, client: TcpStream, target: SocketAddr, number: u32) {
        let clone = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
        let mut streams = self.streams.lock().expect("streams");
        let Ok(server) = TcpStream::connect(target) else {
            if self.is_cut.load(Ordering::SeqCst) {
                streams.push(client);
            }
            return;
        };
        streams.extend([clone(&client), clone(&server)]);
        drop(streams);
        for (from, to) in [(clone(&client), clone(&server)), (server, client)] {
            let state = Arc::clone(self);
            let carry = move || state.carry(from, to, number);
            drop(thread::Builder::new().spawn(carry).expect("a thread"));
        }
    }

    fn carry(&self, mut from: TcpStream, mut to: TcpStream, number: u32) {
        let mut bytes = vec![0; 16 << 10];
        loop {
            let length = from.read(&mut bytes).unwrap_or(0);
            // An end is not told either while it is cut.
            let is_silent = number <= self.silent.load(Ordering::SeqCst);
            if is_silent || self.is_cut.load(Ordering::SeqCst) {
                if length == 0 {
                    return;
                }
                continue;
            }
            if length == 0 || to.write_all(&bytes[..length]).is_err() {
                drop(to.shutdown(Shutdown::Both));
                return;
            }
        }
    }
}

//! Sockets and pipes that go to another process, and those that come from one.

use std::{
    io,
    num::NonZeroU8,
    os::fd::{AsFd, AsRawFd},
};

use mio::{Interest, Registry, Token, unix::SourceFd};
use serde::{Deserialize, Serialize};

use super::{Descriptor, Lent, PipeEnds, Socket, register};

/// Facts of a socket that its descriptor does not tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct SocketWords {
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    is_unix: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    is_paced: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    usual_probes: Option<NonZeroU8>,
}

impl Socket {
    /// Returns its words.
    pub(crate) fn describe(&self) -> SocketWords {
        let Self { fd: _, is_unix, is_paced, usual_probes } = *self;
        SocketWords { is_unix, is_paced, usual_probes }
    }

    /// Lends its descriptor.
    pub(crate) fn lend(&self) -> Lent<'_> {
        self.fd.as_fd()
    }

    /// Returns the socket of a descriptor that has come with `words`. Changes nothing in it, as its giver may go on.
    pub(crate) fn adopt(fd: Descriptor, words: SocketWords) -> Self {
        let SocketWords { is_unix, is_paced, usual_probes } = words;
        Self { fd, is_unix, is_paced, usual_probes }
    }

    /// Ends its registration.
    pub(crate) fn deregister(&self, registry: &Registry) {
        // An error means that it has none.
        registry.deregister(&mut SourceFd(&self.fd.as_raw_fd())).ok();
    }

    /// Registers for `interest`, edge-triggered. Present readiness is reported at the next poll.
    pub(crate) fn register_for(
        &self,
        registry: &Registry,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        register(self, registry, token, interest)
    }
}

impl PipeEnds {
    /// Lends the descriptors of its two ends.
    pub(crate) fn lend(&self) -> [Lent<'_>; 2] {
        let Self { read, write } = self;
        [read.as_fd(), write.as_fd()]
    }

    /// Returns the pipe of two descriptors, in the order in which they were lent.
    pub(crate) fn adopt([read, write]: [Descriptor; 2]) -> Self {
        Self { read, write }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Listener, SocketAddress, pipe, socket_pair};
    use super::*;

    fn copy(lent: Lent<'_>) -> Descriptor {
        lent.try_clone_to_owned().unwrap()
    }

    fn over_json<T: Serialize + for<'de> Deserialize<'de>>(words: T) -> T {
        serde_json::from_str(&serde_json::to_string(&words).unwrap()).unwrap()
    }

    #[test]
    fn an_adopted_socket_is_the_same_connection() {
        let (lent, peer) = socket_pair().unwrap();
        let adopted = Socket::adopt(copy(lent.lend()), over_json(lent.describe()));
        assert_eq!(adopted.describe(), lent.describe());
        assert!(adopted.is_unix());
        drop(lent);
        adopted.send(b"on").unwrap();
        let mut buffer = [0; 8];
        assert_eq!(peer.recv(&mut buffer).unwrap().bytes, 2);
    }

    #[test]
    fn each_fact_of_a_socket_arrives_by_itself() {
        let (lent, _peer) = socket_pair().unwrap();
        let probes = NonZeroU8::new(9);
        for (is_unix, is_paced, usual_probes) in
            [(false, false, None), (false, true, None), (true, false, None), (false, false, probes)]
        {
            let words = SocketWords { is_unix, is_paced, usual_probes };
            let adopted = Socket::adopt(copy(lent.lend()), over_json(words));
            assert_eq!((adopted.describe(), adopted.is_paced()), (words, is_paced));
        }
    }

    #[test]
    fn an_adopted_pipe_has_the_bytes_in_it() {
        let (source, from) = socket_pair().unwrap();
        let (sink, to) = socket_pair().unwrap();
        let lent = pipe(4096).unwrap();
        from.send(b"bytes").unwrap();
        assert_eq!(lent.splice_from(&source, 64).unwrap(), 5);
        let adopted = PipeEnds::adopt(lent.lend().map(copy));
        drop(lent);
        assert_eq!(adopted.splice_to(&sink, 64).unwrap(), 5);
        let mut buffer = [0; 8];
        assert_eq!(to.recv(&mut buffer).unwrap().bytes, 5);
        assert_eq!(&buffer[..5], b"bytes");
    }

    #[test]
    fn an_adopted_listener_has_the_queue() {
        let lent = Listener::tcp("127.0.0.1:0".parse().unwrap(), 1).unwrap().pop().unwrap();
        let address = SocketAddress::Inet(lent.local_inet().unwrap());
        let (client, _) = Socket::dial(&address, None).unwrap();
        let adopted = Listener::adopt(copy(lent.lend()), over_json(lent.describe()));
        assert_eq!(adopted.describe(), lent.describe());
        drop(lent);
        let deadline = super::super::now() + std::time::Duration::from_secs(10);
        let accepted = loop {
            match adopted.accept() {
                Ok((socket, _address)) => break socket,
                Err(error) => assert!(super::super::now() < deadline, "nobody comes: {error}"),
            }
            std::thread::yield_now();
        };
        assert_eq!(accepted.peer(), format!("tcp://{}", client.local_inet().unwrap()));
    }
}

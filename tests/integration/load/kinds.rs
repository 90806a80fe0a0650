//! Held clients of every kind, many of each at once: who waits is served with exact bytes and ends, and nobody who has gone
//! reaches the upstream.

use std::{
    io::{self, Read, Write},
    thread,
};

use crate::harness::{End, Family, Proxy, Received, Stream, Upstream, amount, pattern, wait_until};

const MESSAGE_BYTES: usize = 64;
/// The message that a dribbling client sends while it is held, a byte at a time.
const DRIBBLED_BYTES: usize = 5;

/// The behaviour of a client while it is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Sends its message.
    Asks,
    /// Sends its message and ends its stream.
    AsksAndEnds,
    /// Sends a byte now and then.
    Dribbles,
    /// Says nothing.
    Waits,
    /// Ends its stream without a word: on TCP that looks like one that has gone.
    Ends,
    /// Closes without a word.
    Closes,
    /// Sends its message and resets.
    AsksAndResets,
    /// Resets without a word.
    Resets,
}

#[test]
fn held_tcp_clients_of_every_kind() {
    use Kind::{Asks, AsksAndEnds, AsksAndResets, Closes, Dribbles, Ends, Resets, Waits};
    hold(
        Family::Tcp4,
        &[Asks, AsksAndEnds, Dribbles, Waits],
        &[Ends, Closes, Resets, AsksAndResets],
    );
}

/// UNIX sockets tell a close from an end, and know no reset.
#[test]
fn held_unix_clients_of_every_kind() {
    use Kind::{Asks, AsksAndEnds, Closes, Dribbles, Waits};
    hold(Family::Unix, &[Asks, AsksAndEnds, Dribbles, Waits], &[Closes]);
}

fn hold(family: Family, alive: &[Kind], gone: &[Kind]) {
    let each = amount(100, 1000);
    let upstream = Upstream::start(family, serve);
    let proxy =
        Proxy::builder().listen(family).args(["--proxy-threads", "2"]).upstream(&upstream).start();
    let control = proxy.control();
    control.pause();
    let mut clients = Vec::new();
    for number in 0..each {
        for &kind in gone {
            leave(kind, proxy.connect(), &message(number));
        }
        for (index, &kind) in alive.iter().enumerate() {
            let message = message(number * alive.len() + index);
            clients.push((kind, begin(kind, proxy.connect(), &message), message));
        }
    }
    for at in 0..DRIBBLED_BYTES {
        for (_, client, message) in clients.iter_mut().filter(|(kind, ..)| *kind == Kind::Dribbles)
        {
            client.send(&message[at..=at]);
        }
    }
    let count = clients.len();
    control.wait_counts(|status| status.held, count as u64);
    assert_eq!(upstream.accepted(), 0, "nobody is dialled for while paused");
    control.resume();
    thread::scope(|scope| {
        for (kind, client, message) in clients {
            scope.spawn(move || finish(kind, client, &message));
        }
    });
    for _ in 0..count {
        assert_eq!(upstream.session().received.end, End::Eof);
    }
    wait_until("all have ended", || control.status().active == 0);
    println!(
        "{family:?}: {count} clients held and served, {} gone while held, {} reached the upstream",
        gone.len() * each,
        upstream.accepted() - count
    );
    assert_eq!(upstream.accepted(), count, "one that had gone reaches the upstream");
}

fn message(number: usize) -> Vec<u8> {
    pattern(number as u64, MESSAGE_BYTES)
}

/// Whoever goes, with or without a word.
fn leave(kind: Kind, mut client: Stream, message: &[u8]) {
    match kind {
        // What it holds is never closed: the end of its stream alone makes it one that has gone.
        Kind::Ends => {
            client.finish();
            assert_eq!(client.receive_all().bytes, b"");
        }
        Kind::Closes => drop(client),
        Kind::Resets => client.reset(),
        Kind::AsksAndResets => {
            client.send(message);
            client.reset();
        }
        Kind::Asks | Kind::AsksAndEnds | Kind::Dribbles | Kind::Waits => unreachable!("they stay"),
    }
}

/// Whoever stays does its part.
fn begin(kind: Kind, mut client: Stream, message: &[u8]) -> Stream {
    if matches!(kind, Kind::Asks | Kind::AsksAndEnds) {
        client.send(message);
    }
    if kind == Kind::AsksAndEnds {
        client.finish();
    }
    client
}

/// After the resume: the rest of the message, its answer, and the end.
fn finish(kind: Kind, mut client: Stream, message: &[u8]) {
    match kind {
        Kind::Waits => client.send(message),
        Kind::Dribbles => client.send(&message[DRIBBLED_BYTES..]),
        _ => {}
    }
    let mut answer = vec![0; MESSAGE_BYTES];
    client.read_exact(&mut answer).unwrap_or_else(|error| panic!("{kind:?}: {error}"));
    assert_eq!(answer, message, "{kind:?}");
    if kind != Kind::AsksAndEnds {
        client.finish();
    }
    let rest = client.receive_all();
    assert_eq!((rest.bytes.as_slice(), rest.end), (b"bye".as_slice(), End::Eof), "{kind:?}");
}

/// Answers a message with itself, and the end of the stream with a word.
fn serve(mut stream: Stream) -> Received {
    let mut talk = || -> io::Result<Vec<u8>> {
        let mut message = vec![0; MESSAGE_BYTES];
        stream.read_exact(&mut message)?;
        stream.write_all(&message)?;
        stream.read_to_end(&mut message)?;
        stream.write_all(b"bye")?;
        Ok(message)
    };
    match talk() {
        Ok(bytes) if bytes.len() == MESSAGE_BYTES => Received { bytes, end: End::Eof },
        Ok(bytes) => panic!("{} bytes come behind a message", bytes.len() - MESSAGE_BYTES),
        Err(error) => Received { bytes: Vec::new(), end: error.into() },
    }
}

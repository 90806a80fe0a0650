//! Tests of the channel: whole, cut and wrong frames, ends, deadlines.

use std::{
    env,
    io::{Read, Write},
    net::Shutdown,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    process::{Command, Stdio},
    thread,
};

use rustix::{
    fs::fstat,
    io::{FdFlags, fcntl_getfd},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use serde_json::{Value, json};

use super::*;

/// Deadline that is never reached unless something is wrong.
fn soon() -> Instant {
    now() + Duration::from_secs(20)
}

/// Returns a channel and the bare socket of the other side, which waits no longer than [`soon`].
fn pair() -> (Channel, UnixStream) {
    let (here, there) = UnixStream::pair().unwrap();
    there.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    there.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    (Channel::new(here), there)
}

fn channels() -> (Channel, Channel) {
    let (here, there) = pair();
    (here, Channel::new(there))
}

/// Returns a frame as the format says, with these three numbers.
fn frame_of(numbers: [usize; 3], json: &str, raw: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in numbers {
        bytes.extend_from_slice(&u32::try_from(number).unwrap().to_le_bytes());
    }
    bytes.extend_from_slice(json.as_bytes());
    bytes.extend_from_slice(raw);
    bytes
}

fn frame(json: &str, raw: &[u8], descriptors: usize) -> Vec<u8> {
    frame_of([json.len(), raw.len(), descriptors], json, raw)
}

/// Sends bytes as another program might, with descriptors at the first one.
fn send_raw(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    let parts = [IoSlice::new(bytes)];
    assert_eq!(sendmsg(stream, &parts, &mut control, SendFlags::NOSIGNAL).unwrap(), bytes.len());
}

fn receive(channel: &mut Channel, deadline: Instant) -> Result<(Value, Incoming), ChannelError> {
    channel.receive(now(), deadline)
}

/// Returns a parcel of three raw bytes.
fn raw_parcel<'a>() -> Outgoing<'a> {
    let mut outgoing = Outgoing::new(now());
    assert_eq!(outgoing.append(b"raw"), 3);
    outgoing
}

fn assert_idle(stream: &UnixStream) {
    stream.set_nonblocking(true).unwrap();
    let error = (&mut &*stream).read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    stream.set_nonblocking(false).unwrap();
}

/// Returns the inode, which tells descriptors apart.
fn identity(descriptor: impl AsFd) -> (u64, u64) {
    let stat = fstat(descriptor).unwrap();
    (stat.st_dev, stat.st_ino)
}

fn sockets(count: usize) -> Vec<OwnedFd> {
    (0..count.div_ceil(2))
        .flat_map(|_| {
            let (one, two) = UnixStream::pair().unwrap();
            [one.into(), two.into()]
        })
        .take(count)
        .collect()
}

#[test]
fn descriptors_arrive_in_order_and_close_on_exec() {
    for count in [0, 1, 2, DESCRIPTORS_MAX] {
        let (mut here, mut there) = channels();
        let all = sockets(7);
        let lent: Vec<_> = all.iter().cycle().take(count).map(AsFd::as_fd).collect();
        thread::scope(|scope| {
            let receiver = scope.spawn(|| receive(&mut there, soon()).unwrap());
            let mut outgoing = Outgoing::new(now());
            for &descriptor in &lent {
                outgoing.lend(descriptor);
            }
            here.send(&json!({ "count": count }), outgoing).unwrap();
            let (message, mut incoming) = receiver.join().unwrap();
            assert_eq!(message, json!({ "count": count }));
            for sent in &lent {
                let got = incoming.descriptor().unwrap();
                assert_eq!(identity(&got), identity(sent));
                assert!(fcntl_getfd(&got).unwrap().contains(FdFlags::CLOEXEC));
            }
            incoming.finish().unwrap();
        });
    }
}

#[test]
fn a_message_beyond_a_bound_is_refused_before_anything_is_sent() {
    let (mut here, there) = pair();
    let one = sockets(1);
    let mut many = Outgoing::new(now());
    (0..=DESCRIPTORS_MAX).for_each(|_| many.lend(one[0].as_fd()));
    let mut long = Outgoing::new(now());
    long.append(&vec![0; RAW_BYTES_MAX + 1]);
    for (outgoing, told) in [(many, "254 descriptors"), (long, "67108865 raw bytes")] {
        let error = here.send(&json!(1), outgoing).map_err(io::Error::from).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(error.to_string().contains(told), "{error}");
    }
    let words = |json| Header { json, raw: 0, descriptors: 0 }.to_bytes().map(drop);
    assert!(words(JSON_BYTES_MAX).is_ok() && words(JSON_BYTES_MAX + 1).is_err());
    assert_idle(&there);
    here.send(&json!(2), Outgoing::new(now())).unwrap();
    assert_eq!(receive(&mut Channel::new(there), now()).unwrap().0, json!(2));
}

#[test]
fn no_frame_begins_like_an_acknowledgement() {
    for length in (252..260).chain(510..514) {
        let (mut here, there) = pair();
        let text = json!("y".repeat(length));
        here.send(&text, Outgoing::new(now())).unwrap();
        let mut first = [0];
        rustix::net::recv(&there, &mut first, RecvFlags::PEEK).unwrap();
        assert_ne!(first[0], ACKNOWLEDGEMENT, "{length}");
        assert_eq!(receive(&mut Channel::new(there), now()).unwrap().0, text);
    }
}

#[test]
fn raw_bytes_of_any_number_arrive() {
    for count in [0, 1, READ_BYTES, (5 << 20) + 3] {
        let (mut here, mut there) = channels();
        let raw: Vec<u8> = (0..=250).cycle().take(count).collect();
        let one = sockets(1);
        thread::scope(|scope| {
            let receiver = scope.spawn(|| receive(&mut there, soon()).unwrap());
            let mut outgoing = Outgoing::new(now());
            assert_eq!(outgoing.append(&raw), count);
            outgoing.lend(one[0].as_fd());
            here.send(&Value::Null, outgoing).unwrap();
            let (_, mut incoming) = receiver.join().unwrap();
            assert!(incoming.bytes(count).unwrap() == raw);
            assert_eq!(identity(incoming.descriptor().unwrap()), identity(&one[0]));
            incoming.finish().unwrap();
        });
    }
}

#[test]
fn moments_of_a_message_are_those_of_its_hand_over() {
    let (here, mut there) = channels();
    let (begin, later) = (now(), now() + Duration::from_secs(9));
    let outbox = Outbox { begin, channel: Arc::new(Mutex::new(here)) };
    let parcel = outbox.parcel();
    outbox.send(&parcel.moment(begin + Duration::from_millis(5)), parcel).unwrap();
    let (moment, incoming) = there.receive(later, soon()).unwrap();
    assert_eq!(incoming.instant(moment), later + Duration::from_millis(5));
}

#[test]
fn a_cut_frame_is_whole_once_its_rest_has_come() {
    for (raw, count) in [(b"".as_slice(), 0), (b"raw", 0), (b"raw", 2), (b"", 1)] {
        let bytes = frame("[1,2]", raw, count);
        let all = sockets(count);
        let lent: Vec<_> = all.iter().map(AsFd::as_fd).collect();
        for cut in 0..bytes.len() {
            let (mut here, mut there) = pair();
            let (first, rest) = bytes.split_at(cut);
            if !first.is_empty() {
                send_raw(&there, first, &lent);
            }
            assert!(matches!(receive(&mut here, now()), Err(ChannelError::TimedOut)), "{cut}");
            assert_idle(&there);
            send_raw(&there, rest, if cut == 0 { &lent } else { &[] });
            let (message, mut incoming) = receive(&mut here, now()).unwrap();
            assert_eq!(message, json!([1, 2]));
            assert_eq!(incoming.bytes(raw.len()).unwrap(), raw);
            for sent in &all {
                assert_eq!(identity(incoming.descriptor().unwrap()), identity(sent));
            }
            incoming.finish().unwrap();
            if count > 0 || !raw.is_empty() {
                let mut byte = [1];
                there.read_exact(&mut byte).unwrap();
                assert_eq!(byte, [ACKNOWLEDGEMENT]);
            }
            assert_idle(&there);
        }
    }
}

#[test]
fn the_end_and_a_reset_are_told_behind_all_that_came_before() {
    let bytes = frame("7", b"raw", 0);
    for is_reset in [false, true] {
        for cut in 0..bytes.len() {
            let (mut here, mut there) = pair();
            if is_reset {
                // Bytes that the other side has not read turn its close into a reset.
                here.send(&json!("unread"), Outgoing::new(now())).unwrap();
            }
            there.write_all(&frame("6", b"", 0)).unwrap();
            there.write_all(&bytes[..cut]).unwrap();
            drop(there);
            assert_eq!(receive(&mut here, now()).unwrap().0, json!(6));
            for _ in 0..3 {
                let result = receive(&mut here, soon());
                assert!(matches!(result, Err(ChannelError::Ended)), "{cut}: {result:?}");
            }
            let error =
                here.send(&json!(1), Outgoing::new(now())).map_err(io::Error::from).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        }
    }
}

#[test]
fn a_frame_of_a_process_that_has_gone_needs_no_acknowledgement() {
    let (mut here, mut there) = pair();
    there.write_all(&frame("7", b"raw", 0)).unwrap();
    drop(there);
    let (message, mut incoming) = receive(&mut here, now()).unwrap();
    assert_eq!((message, incoming.bytes(3).unwrap()), (json!(7), b"raw".as_slice()));
    assert!(matches!(receive(&mut here, now()), Err(ChannelError::Ended)));
}

#[test]
fn another_number_of_descriptors_than_announced_is_refused() {
    let all = sockets(3);
    for (announced, sent) in [(0, 1), (1, 0), (1, 2), (2, 1), (3, 2), (DESCRIPTORS_MAX, 3)] {
        let (mut here, there) = pair();
        let lent: Vec<_> = all.iter().take(sent).map(AsFd::as_fd).collect();
        send_raw(&there, &frame("1", b"", announced), &lent);
        for _ in 0..2 {
            let result = receive(&mut here, now());
            assert!(matches!(result, Err(ChannelError::Truncated)), "{announced} {sent}");
        }
        assert_idle(&there);
    }
    // More than the most are refused before the frame is whole.
    let (mut here, there) = pair();
    let bytes = frame("1", b"", DESCRIPTORS_MAX);
    send_raw(&there, &bytes[..1], &vec![all[0].as_fd(); DESCRIPTORS_MAX]);
    send_raw(&there, &bytes[1..2], &[all[0].as_fd()]);
    assert!(matches!(receive(&mut here, now()), Err(ChannelError::Truncated)));
}

#[test]
fn descriptors_without_room_are_told_as_lost() {
    let all = sockets(9);
    let lent: Vec<_> = all.iter().map(AsFd::as_fd).collect();
    for (room, is_lost) in [(cmsg_space!(ScmRights(1)), true), (cmsg_space!(ScmRights(9)), false)] {
        let (here, there) = pair();
        send_raw(&there, b"x", &lent);
        let mut inbox = Inbox::default();
        let mut space = vec![MaybeUninit::uninit(); room];
        assert_eq!(inbox.read(&here.stream, 1, &mut space), Ok((1, is_lost)));
        assert_eq!(inbox.descriptors.len() == 9, !is_lost);
    }
}

/// The test runs itself as a child, whose standard input is the channel.
#[test]
fn a_process_at_its_limit_of_open_files_is_told() {
    const NAME: &str = "handover::channel::tests::a_process_at_its_limit_of_open_files_is_told";
    const CHILD: &str = "TCPAUSE_TEST_CHILD";
    if env::var_os(CHILD).is_some() {
        let maximum = getrlimit(Resource::Nofile).maximum;
        setrlimit(Resource::Nofile, Rlimit { current: Some(40), maximum }).unwrap();
        let stream = io::stdin().as_fd().try_clone_to_owned().unwrap().into();
        let result = receive(&mut Channel::new(stream), soon());
        assert!(matches!(result, Err(ChannelError::Truncated)), "{result:?}");
        return;
    }
    let (mut here, there) = pair();
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", NAME])
        .env(CHILD, "1")
        .stdin(OwnedFd::from(there))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let one = sockets(1);
    let mut outgoing = Outgoing::new(now());
    (0..100).for_each(|_| outgoing.lend(one[0].as_fd()));
    here.set_deadline(soon());
    let error = here.send(&json!(1), outgoing).map_err(io::Error::from).unwrap_err();
    assert!(child.wait().unwrap().success());
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe, "{error}");
}

#[test]
fn a_length_that_is_a_lie_allocates_nothing() {
    let over = [
        [JSON_BYTES_MAX + 1, 0, 0],
        [1, RAW_BYTES_MAX + 1, 0],
        [1, 0, DESCRIPTORS_MAX + 1],
        [u32::MAX as usize; 3],
    ];
    for numbers in over {
        let (mut here, mut there) = pair();
        there.write_all(&frame_of(numbers, "1", b"")).unwrap();
        for _ in 0..2 {
            let result = receive(&mut here, now());
            assert!(matches!(result, Err(ChannelError::Malformed(_))), "{numbers:?}");
        }
        assert!(here.inbox.bytes.capacity() < 100, "{numbers:?}");
        assert_idle(&there);
    }
    let (mut here, mut there) = pair();
    there.write_all(&frame_of([JSON_BYTES_MAX - 1, RAW_BYTES_MAX, 0], "1", b"")).unwrap();
    assert!(matches!(receive(&mut here, now()), Err(ChannelError::TimedOut)));
    assert!(here.inbox.bytes.capacity() < 4 * READ_BYTES);
}

#[test]
fn wrong_lengths_and_words_are_refused_and_the_next_frame_is_read() {
    for json in ["nonsense", "{", "1 2", "\"", "\u{0}", &"[".repeat(10_000)] {
        let (mut here, mut there) = pair();
        there.write_all(&frame(json, b"raw", 0)).unwrap();
        there.write_all(&frame("true", b"", 0)).unwrap();
        let result = receive(&mut here, now());
        assert!(matches!(result, Err(ChannelError::Malformed(_))), "{json}");
        assert_eq!(receive(&mut here, now()).unwrap().0, json!(true));
    }
    // Lengths that are shorter or longer than what follows.
    for numbers in [[4, 0, 0], [1, 1, 0], [0, 2, 0]] {
        let (mut here, mut there) = pair();
        there.write_all(&frame_of(numbers, "12", b"")).unwrap();
        there.shutdown(Shutdown::Write).unwrap();
        let is_refused =
            |result| matches!(result, Err(ChannelError::Malformed(_) | ChannelError::Ended));
        assert!((0..2).any(|_| is_refused(receive(&mut here, soon()))), "{numbers:?}");
    }
    let (mut here, mut there) = pair();
    there.write_all(&frame("\"text\"", b"", 0)).unwrap();
    assert!(matches!(here.receive::<u32>(now(), now()), Err(ChannelError::Malformed(_))));
}

#[test]
fn a_missing_acknowledgement_ends_at_the_deadline_and_may_come_late() {
    let (mut here, mut there) = pair();
    let limit = Duration::from_millis(60);
    let begin = now();
    here.set_deadline(begin + limit);
    let error = here.send(&json!(1), raw_parcel()).map_err(io::Error::from).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(begin.elapsed() >= limit);
    there.write_all(&[ACKNOWLEDGEMENT]).unwrap();
    there.write_all(&frame("2", b"", 0)).unwrap();
    assert_eq!(receive(&mut here, now()).unwrap().0, json!(2));
}

#[test]
fn a_late_acknowledgement_does_not_stand_for_the_next() {
    let (mut here, mut there) = pair();
    for _ in 0..2 {
        here.set_deadline(now());
        let result = here.send(&json!(1), raw_parcel());
        assert!(matches!(result, Err(ChannelError::TimedOut)), "{result:?}");
        there.write_all(&[ACKNOWLEDGEMENT]).unwrap();
    }
    here.await_acknowledgements().unwrap();
    there.write_all(&[ACKNOWLEDGEMENT]).unwrap();
    there.write_all(&frame("2", b"", 0)).unwrap();
    let result = receive(&mut here, now());
    assert!(matches!(result, Err(ChannelError::Malformed(_))), "{result:?}");
}

#[test]
fn a_message_in_place_of_an_acknowledgement_is_read_afterwards() {
    let (mut here, mut there) = pair();
    there.write_all(&frame("\"no room\"", b"", 0)).unwrap();
    let error = here.send(&json!(1), raw_parcel()).map_err(io::Error::from).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(error.to_string().contains("in place of an acknowledgement"), "{error}");
    assert_eq!(receive(&mut here, now()).unwrap().0, json!("no room"));
}

#[test]
fn the_end_in_place_of_an_acknowledgement_is_told() {
    for is_reset in [false, true] {
        let (mut here, mut there) = pair();
        thread::scope(|scope| {
            let peer = scope.spawn(move || {
                let mut bytes = [0; 16];
                there.read_exact(&mut bytes[usize::from(is_reset)..]).unwrap();
            });
            here.set_deadline(soon());
            let error = here.send(&json!(1), raw_parcel()).map_err(io::Error::from).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
            peer.join().unwrap();
        });
        assert!(matches!(receive(&mut here, soon()), Err(ChannelError::Ended)));
    }
}

#[test]
fn half_a_message_ends_at_the_deadline() {
    let (mut here, mut there) = pair();
    there.write_all(&frame("true", b"raw", 0)[..9]).unwrap();
    let (begin, limit) = (now(), Duration::from_millis(60));
    let result = receive(&mut here, begin + limit);
    assert!(matches!(result, Err(ChannelError::TimedOut)));
    assert!(begin.elapsed() >= limit);
}

#[test]
fn nothing_follows_a_frame_that_the_other_side_does_not_read_whole() {
    let (mut here, mut there) = pair();
    let begin = now();
    here.set_deadline(begin + Duration::from_millis(60));
    let mut outgoing = Outgoing::new(begin);
    outgoing.append(&vec![b'r'; 8 << 20]);
    let error = here.send(&json!(1), outgoing).map_err(io::Error::from).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    here.set_deadline(soon());
    let error = here.send(&json!(2), Outgoing::new(begin)).map_err(io::Error::from).unwrap_err();
    assert!(error.to_string().contains("an earlier message was cut"), "{error}");
    // The answer of a process that reads no more is received all the same.
    there.write_all(&frame("3", b"", 0)).unwrap();
    assert_eq!(receive(&mut here, now()).unwrap().0, json!(3));
}

#[test]
fn frames_of_several_threads_stay_whole() {
    const THREADS: usize = 4;
    const FRAMES: usize = 50;
    let (here, mut there) = channels();
    let outbox = Outbox { begin: now(), channel: Arc::new(Mutex::new(here)) };
    let all = sockets(THREADS);
    thread::scope(|scope| {
        for (thread, socket) in all.iter().enumerate() {
            let outbox = &outbox;
            scope.spawn(move || {
                for frame in 0..FRAMES {
                    let mut parcel = outbox.parcel();
                    parcel.append(&vec![u8::try_from(thread).unwrap(); 1000 * frame]);
                    parcel.lend(socket.as_fd());
                    outbox.send(&(thread, frame), parcel).unwrap();
                }
            });
        }
        let mut next = [0; THREADS];
        for _ in 0..THREADS * FRAMES {
            let ((thread, frame), mut incoming) =
                there.receive::<(usize, usize)>(now(), soon()).unwrap();
            assert_eq!(frame, next[thread]);
            next[thread] += 1;
            let raw = incoming.bytes(1000 * frame).unwrap();
            assert!(raw.iter().all(|&byte| usize::from(byte) == thread));
            assert_eq!(identity(incoming.descriptor().unwrap()), identity(&all[thread]));
            incoming.finish().unwrap();
        }
    });
}

#[test]
fn each_failure_is_one_sentence() {
    let errors = [
        (ChannelError::Ended, io::ErrorKind::BrokenPipe),
        (ChannelError::TimedOut, io::ErrorKind::TimedOut),
        (ChannelError::Truncated, io::ErrorKind::InvalidData),
        (ChannelError::Malformed("why".into()), io::ErrorKind::InvalidData),
        (Errno::NOMEM.into(), io::ErrorKind::OutOfMemory),
    ];
    for (error, kind) in errors {
        let told = error.to_string();
        assert!(told.len() > 20 && !told.contains(['\n', '.']), "{told}");
        assert_eq!(io::Error::from(error).kind(), kind, "{told}");
    }
}

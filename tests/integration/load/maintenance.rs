//! The main job: an upstream is taken away and comes back, and then meets a crowd of held clients.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use crate::harness::{
    Addr, End, Family, Listener, PATIENCE, Proxy, Received, Stream, Upstream, amount, pattern,
    spawn,
};

/// Asks for its own bytes back.
const ASK: u8 = b'a';
/// Asks for a transfer.
const TRANSFER: u8 = b't';

const MESSAGE_BYTES: usize = 64;
/// The transfers that run when a pause begins, and of what each consists.
const TRANSFERS: usize = 20;
const PIECES: usize = 40;
const PIECE_BYTES: usize = 16 * 1024;
/// Threads that the load of short connections comes from.
const LOAD_THREADS: usize = 8;
/// Short connections that are begun each second.
const REQUESTS_PER_SECOND: u32 = 500;

/// The outcomes of clients: the number of each kind.
#[derive(Default)]
struct Outcomes(Mutex<BTreeMap<String, usize>>);

impl Outcomes {
    /// Notes what became of one: the bytes it wanted, other or too few ones, or an error.
    fn note(&self, result: io::Result<Vec<u8>>, wanted: &[u8]) {
        let outcome = match result {
            Ok(bytes) if bytes == wanted => "served".to_owned(),
            Ok(bytes) if bytes.len() < wanted.len() => "short".to_owned(),
            Ok(_) => "wrong bytes".to_owned(),
            Err(error) => format!("{:?}", error.kind()),
        };
        *self.0.lock().unwrap().entry(outcome).or_default() += 1;
    }

    /// Returns the number of clients that were served; no other outcome is allowed.
    #[track_caller]
    fn all_served(&self) -> usize {
        let outcomes = self.0.lock().unwrap();
        let served = outcomes.get("served").copied().unwrap_or_default();
        assert_eq!(outcomes.values().sum::<usize>(), served, "{outcomes:?}");
        served
    }
}

/// The connections that an upstream has open, and when the last one ended.
#[derive(Default)]
struct Open {
    count: AtomicUsize,
    emptied: Mutex<Option<Instant>>,
}

/// Answers until its drop; `piece` is how long a piece of a transfer takes.
fn serve(listener: Listener, open: &Arc<Open>, piece: Duration) -> Upstream {
    let open = open.clone();
    Upstream::on(listener, move |mut stream| {
        open.count.fetch_add(1, SeqCst);
        answer(&mut stream, piece).ok();
        // The client's side ends behind this, and so does the proxy's.
        if open.count.fetch_sub(1, SeqCst) == 1 {
            *open.emptied.lock().unwrap() = Some(Instant::now());
        }
        Received { bytes: Vec::new(), end: End::Eof }
    })
}

fn answer(stream: &mut Stream, piece: Duration) -> io::Result<()> {
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    if kind[0] == TRANSFER {
        let begin = Instant::now();
        for (number, bytes) in (1..).zip(transfer().chunks(PIECE_BYTES)) {
            stream.write_all(bytes)?;
            thread::sleep((begin + piece * number).saturating_duration_since(Instant::now()));
        }
        return Ok(());
    }
    let mut message = [0; MESSAGE_BYTES];
    stream.read_exact(&mut message)?;
    stream.write_all(&message)?;
    // It closes first.
    stream.read_to_end(&mut Vec::new()).map(drop)
}

fn transfer() -> Vec<u8> {
    pattern(1, PIECES * PIECE_BYTES)
}

fn request(number: usize) -> Vec<u8> {
    pattern(number as u64, MESSAGE_BYTES)
}

/// One short connection.
fn ask(addr: &Addr, message: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = addr.try_connect()?;
    stream.write_all(&[&[ASK], message].concat())?;
    let mut answer = vec![0; MESSAGE_BYTES];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

/// A transfer that has begun.
fn begin_transfer(addr: &Addr) -> io::Result<(Stream, Vec<u8>)> {
    let mut stream = addr.try_connect()?;
    stream.write_all(&[TRANSFER])?;
    let mut first = vec![0; 1];
    stream.read_exact(&mut first)?;
    Ok((stream, first))
}

#[expect(clippy::cast_possible_truncation, reason = "numbers here are far below 2^32")]
#[test]
fn maintenance_fails_nobody() {
    let rounds = amount(2, 20);
    let away = Duration::from_millis(amount(500, 2000) as u64);
    let piece = away / PIECES as u32;
    let open = Arc::new(Open::default());
    let listener = Listener::bind(&Addr::Tcp(([127, 0, 0, 1], 0).into()));
    let addr = listener.addr();
    let mut upstream = Some(serve(listener, &open, piece));
    let proxy = Proxy::builder().args(["--proxy-threads", "2"]).upstream_at(&addr).start();
    let (control, front) = (proxy.control(), proxy.addr());
    let (shorts, transfers) = (Outcomes::default(), Arc::new(Outcomes::default()));
    let (over, numbers) = (AtomicBool::new(false), AtomicUsize::new(0));
    // Held clients keep their thread; each request has its own place in the schedule, and is not made up for.
    let begin = Instant::now();
    let load = || {
        while !over.load(SeqCst) {
            let number = numbers.fetch_add(1, SeqCst);
            let due = begin + Duration::from_secs(1) * number as u32 / REQUESTS_PER_SECOND;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let message = request(number);
            shorts.note(ask(front, &message), &message);
        }
    };
    let mut slowest = Duration::ZERO;
    thread::scope(|scope| {
        for _thread in 0..LOAD_THREADS {
            scope.spawn(load);
        }
        for _round in 0..rounds {
            let running: Vec<_> = (0..TRANSFERS)
                .map(|_| {
                    let (mut stream, mut bytes) = begin_transfer(front).unwrap();
                    let transfers = transfers.clone();
                    spawn(move || {
                        let result = stream.read_to_end(&mut bytes).map(|_| bytes);
                        transfers.note(result, &transfer());
                    })
                })
                .collect();
            control.pause();
            control.wait_idle();
            let idle = Instant::now();
            assert_eq!(open.count.load(SeqCst), 0, "the wait is over before the last connection");
            let emptied = open.emptied.lock().unwrap().expect("connections that have ended");
            slowest = slowest.max(idle.duration_since(emptied));
            drop(upstream.take());
            for transfer in running {
                transfer.join().unwrap();
            }
            thread::sleep(away);
            upstream = Some(serve(Listener::bind(&addr), &open, piece));
            control.resume();
        }
        over.store(true, SeqCst);
    });
    println!(
        "{rounds} times maintenance: {} short connections and {} transfers, 0 failed; idle told within {slowest:?}",
        shorts.all_served(),
        transfers.all_served(),
    );
    assert_eq!(transfers.all_served(), rounds * TRANSFERS);
    assert!(shorts.all_served() > rounds * LOAD_THREADS);
    assert!(slowest < PATIENCE / 4, "idle is told {slowest:?} after the last connection has ended");
}

/// Connections that may wait at the upstream that a crowd meets, and those that it takes in a second.
const BACKLOG: i32 = 128;
const ACCEPTED_PER_SECOND: u32 = 5000;

#[test]
fn a_crowd_of_held_clients_does_not_flood_a_tcp_upstream() {
    release_a_crowd(Family::Tcp4);
}

/// A full backlog of a UNIX socket refuses at once.
#[test]
fn a_crowd_of_held_clients_does_not_flood_a_unix_upstream() {
    release_a_crowd(Family::Unix);
}

#[expect(clippy::cast_possible_truncation, reason = "a crowd is far below 2^32")]
fn release_a_crowd(family: Family) {
    const NEWCOMERS: usize = 50;
    let count = amount(1000, 9000);
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind(&Addr::free(family, dir.path(), "upstream.sock"));
    listener.backlog(BACKLOG);
    let addr = listener.addr();
    let over = Arc::new(AtomicBool::new(false));
    let acceptor = spawn({
        let over = over.clone();
        move || accept_at_a_pace(&listener, &over)
    });
    let proxy = Proxy::builder().args(["--proxy-threads", "2"]).upstream_at(&addr).start();
    let (control, front) = (proxy.control(), proxy.addr());
    control.pause();
    let mut held: Vec<Stream> = (0..count).map(|_| front.connect()).collect();
    for (client, number) in held.iter_mut().zip(0..) {
        client.send(&[&[ASK], request(number).as_slice()].concat());
    }
    control.wait_counts(|status| status.held, count as u64);
    let (outcomes, begin) = (Outcomes::default(), Instant::now());
    control.resume();
    let slowest_newcomer = thread::scope(|scope| {
        let newcomers = scope.spawn(|| {
            let serve = |number: usize| {
                let (message, begin) = (request(count + number), Instant::now());
                outcomes.note(ask(front, &message), &message);
                begin.elapsed()
            };
            (0..NEWCOMERS).map(serve).max().unwrap()
        });
        for (mut client, number) in held.into_iter().zip(0..) {
            let mut answer = vec![0; MESSAGE_BYTES];
            let result = client.read_exact(&mut answer).map(|()| answer);
            outcomes.note(result, &request(number));
        }
        newcomers.join().unwrap()
    });
    let taken = begin.elapsed();
    let wanted =
        Duration::from_secs(3) * count as u32 / (2 * ACCEPTED_PER_SECOND) + Duration::from_secs(1);
    println!(
        "{family:?}: {count} held clients, the last served after {taken:?} ({wanted:?} wanted); {NEWCOMERS} who came \
         meanwhile, the slowest within {slowest_newcomer:?}; 0 failed"
    );
    assert_eq!(outcomes.all_served(), count + NEWCOMERS);
    assert!(taken < 4 * wanted, "{taken:?}");
    over.store(true, SeqCst);
    // The last connection ends the acceptor's wait.
    drop(addr.try_connect());
    acceptor.join().unwrap();
}

/// Takes a connection whenever one is due.
fn accept_at_a_pace(listener: &Listener, over: &AtomicBool) {
    let mut due = Instant::now();
    while let Ok(mut stream) = listener.accept() {
        if over.load(SeqCst) {
            return;
        }
        drop(spawn(move || answer(&mut stream, Duration::ZERO)));
        // What was not used up is lost.
        due = due.max(Instant::now()) + Duration::from_secs(1) / ACCEPTED_PER_SECOND;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

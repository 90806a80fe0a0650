//! Closing of idle sessions of PostgreSQL during a pause: `drain=quiet:300ms,postgres`.

use std::{
    env, fs,
    io::Read,
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, getuid, kill_process};
use tempfile::TempDir;

use crate::harness::{
    End, Family, Proxy, Received, Stream, Upstream, assert_same, pattern, wait_until,
};

/// Long enough for whatever is quiet to be closed.
const LONG: Duration = Duration::from_millis(2500);

/// Ends of answers: outside a transaction, inside one, and inside one that has failed.
const IDLE: &[u8] = b"Z\0\0\0\x05I";
const BEGUN: &[u8] = b"Z\0\0\0\x05T";
const FAILED: &[u8] = b"Z\0\0\0\x05E";

/// User that runs PostgreSQL, which refuses to run as root: nobody.
const NOBODY: u32 = 65_534;

const QUERY: &str = "/paused?drain=quiet:300ms,postgres";

#[track_caller]
fn assert_ends_in_order(client: &mut Stream) {
    assert_eq!(client.receive_all(), Received { bytes: Vec::new(), end: End::Eof });
}

/// Serves clients that send the length of the answer in one byte, and then the answer.
fn obey(mut stream: Stream) -> Received {
    loop {
        let mut length = [0];
        match stream.read(&mut length) {
            Ok(1) => {
                let answer = stream.receive(length[0].into());
                stream.send(&answer);
            }
            _ => return Received { bytes: Vec::new(), end: End::Eof },
        }
    }
}

/// Has the server send `answer`.
fn ask(client: &mut Stream, answer: &[u8]) {
    client.send(&[&[u8::try_from(answer.len()).unwrap()], answer].concat());
    assert_eq!(client.receive(answer.len()), answer);
}

#[test]
fn only_sessions_outside_transactions_are_closed() {
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = Upstream::start(family, obey);
        let proxy = Proxy::builder().listen(family).upstream(&upstream).start();
        let answered = |answer: &[u8]| {
            let mut client = proxy.connect();
            ask(&mut client, answer);
            client
        };
        let row = b"D\0\0\0\x0a\0\x01\0\0\0\0";
        let mut idle = answered(&[row, IDLE].concat());
        let mut others = [
            answered(&[row, BEGUN].concat()),
            answered(FAILED),
            // A notification, or what TLS makes of the bytes.
            answered(&[IDLE, b"A"].concat()),
            answered(&IDLE[1..]),
        ];
        // One that has not been spoken on.
        let mut silent = proxy.connect();
        proxy.control().wait_counts(|status| status.active, 6);
        assert_eq!(proxy.control().put(QUERY).status, 201);
        assert_ends_in_order(&mut idle);
        thread::sleep(LONG);
        assert_eq!((proxy.control().status().active, proxy.control().status().drained), (5, 1));
        for client in others.iter_mut().chain([&mut silent]) {
            ask(client, BEGUN);
            ask(client, IDLE);
            assert_ends_in_order(client);
        }
        proxy.control().wait_counts(|status| (status.drained, status.active), (6, 0));
    }
}

/// Returns an idle session, and one in a transaction.
fn sessions(proxy: &Proxy) -> [Stream; 2] {
    [IDLE, BEGUN].map(|answer| {
        let mut client = proxy.connect();
        ask(&mut client, answer);
        client
    })
}

#[test]
fn the_order_of_one_pause_does_not_widen_that_of_another() {
    let upstream = Upstream::tcp(obey);
    let proxy = Proxy::to(&upstream);
    let [mut idle, mut begun] = sessions(&proxy);
    assert_eq!(proxy.control().put("/paused?name=other&drain=quiet:1h").status, 201);
    let response = proxy.control().put(QUERY);
    assert_eq!(response.status, 201, "{response}");
    let leases = proxy.control().status().leases;
    let drains = leases.iter().map(|it| (it.drain_quiet_seconds, it.drain_postgres));
    assert!(drains.eq([(Some(3600.0), false), (Some(0.3), true)]), "{leases:?}");
    assert_ends_in_order(&mut idle);
    assert_eq!(proxy.control().put("/paused?name=other&drain=quiet:300ms").status, 201);
    assert_ends_in_order(&mut begun);
}

/// While the order holds, even what would have been spliced is looked at.
#[test]
fn a_session_is_closed_behind_a_large_answer() {
    const BYTES: usize = 4 << 20;
    for family in [Family::Tcp4, Family::Unix] {
        let has_rows = Arc::new(AtomicBool::new(false));
        let upstream = Upstream::start(family, {
            let has_rows = Arc::clone(&has_rows);
            move |mut stream| {
                let request = stream.receive(8);
                stream.send(&pattern(6, BYTES));
                wait_until("the client has the rows", || has_rows.load(Ordering::SeqCst));
                stream.send(IDLE);
                Received { bytes: request, end: stream.receive_all().end }
            }
        });
        let proxy = Proxy::builder().listen(family).upstream(&upstream).start();
        let mut client = proxy.connect();
        client.send(b"question");
        assert_eq!(client.receive(1), pattern(6, BYTES)[..1]);
        assert_eq!(proxy.control().put(QUERY).status, 201);
        assert_same(&client.receive(BYTES - 1), &pattern(6, BYTES)[1..]);
        has_rows.store(true, Ordering::SeqCst);
        assert_eq!(client.receive(IDLE.len()), IDLE);
        assert_ends_in_order(&mut client);
        proxy.control().wait_counts(|status| (status.drained, status.active), (1, 0));
    }
}

/// The next process knows which sessions were idle.
#[test]
fn an_upgrade_forgets_neither_the_order_nor_the_sessions() {
    let upstream = Upstream::tcp(obey);
    let proxy = Proxy::to(&upstream);
    let [mut idle, mut begun] = sessions(&proxy);
    assert_eq!(proxy.control().put("/paused?drain=quiet:3s,postgres").status, 201);
    let response = proxy.upgrade();
    assert_eq!(response.status, 200, "{response}");
    assert_eq!(proxy.control().status().drained, 0);
    assert_ends_in_order(&mut idle);
    thread::sleep(LONG);
    ask(&mut begun, FAILED);
    assert_eq!(proxy.control().status().drained, 1);
}

/// A server of PostgreSQL with a database of its own.
struct Postgres {
    server: Child,
    dir: TempDir,
}

impl Postgres {
    /// Starts a server that listens at a UNIX socket. Returns none if this machine has none.
    fn start() -> Option<Self> {
        let bin = programs()?;
        let dir = tempfile::tempdir().unwrap();
        if getuid().is_root() {
            chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let command = |program: &str| {
            let mut command = Command::new(bin.join(program));
            if getuid().is_root() {
                command.uid(NOBODY).gid(NOBODY);
            }
            command.current_dir(dir.path()).stdout(Stdio::null()).stderr(Stdio::null());
            command
        };
        let done = command("initdb")
            .args(["-D", "data", "-U", "anna", "-A", "trust", "--no-sync", "--no-locale"])
            .status();
        assert!(done.unwrap().success());
        let server = command("postgres")
            .args(["-D", "data", "-h", "", "-F", "-k"])
            .arg(dir.path())
            .spawn()
            .unwrap();
        let postgres = Self { server, dir };
        // It listens before that, and refuses everyone.
        wait_until("PostgreSQL is ready", || {
            let told = fs::read_to_string(postgres.dir.path().join("data/postmaster.pid"));
            told.is_ok_and(|lines| lines.lines().any(|line| line.trim() == "ready"))
        });
        Some(postgres)
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join(".s.PGSQL.5432")
    }
}

impl Drop for Postgres {
    /// Ends the server and its sessions at once.
    fn drop(&mut self) {
        let pid = Pid::from_child(&self.server);
        kill_process(pid, Signal::QUIT).ok();
        self.server.wait().ok();
    }
}

/// Returns the folder of PostgreSQL's programs.
fn programs() -> Option<PathBuf> {
    let packaged = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let packaged = packaged.map(|version| version.path().join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let has_both = |bin: &Path| bin.join("initdb").exists() && bin.join("postgres").exists();
    env::split_paths(&path).chain(packaged).find(|bin| has_both(bin))
}

/// Returns a session that may be queried.
fn session(proxy: &Proxy) -> Stream {
    let mut client = proxy.connect();
    let startup = b"\0\x03\0\0user\0anna\0database\0postgres\0\0";
    let length = u32::try_from(startup.len() + 4).unwrap();
    client.send(&[&length.to_be_bytes(), &startup[..]].concat());
    assert_eq!(until_ready(&mut client), b'I');
    client
}

/// Runs a query. Returns the status of the session behind it.
fn query(client: &mut Stream, text: &str) -> u8 {
    begin_query(client, text);
    until_ready(client)
}

fn begin_query(client: &mut Stream, text: &str) {
    let length = u32::try_from(text.len() + 5).unwrap();
    client.send(&[b"Q", &length.to_be_bytes()[..], text.as_bytes(), b"\0"].concat());
}

/// Reads messages up to `ReadyForQuery`. Returns its status.
fn until_ready(client: &mut Stream) -> u8 {
    read_answer(client).1
}

/// Reads messages up to `ReadyForQuery`. Returns the bodies of the others, and its status.
fn read_answer(client: &mut Stream) -> (Vec<u8>, u8) {
    let mut bodies = Vec::new();
    loop {
        let head = client.receive(5);
        let length = u32::from_be_bytes(head[1..].try_into().unwrap());
        let body = client.receive(length as usize - 4);
        if head[0] == b'Z' {
            return (bodies, body[0]);
        }
        bodies.extend(body);
    }
}

#[test]
fn a_real_server_s_transactions_live_on() {
    let Some(postgres) = Postgres::start() else {
        println!("skipped: there is no PostgreSQL on this machine");
        return;
    };
    for family in [Family::Tcp4, Family::Unix] {
        let upstream = format!("unix://{}", postgres.socket().display());
        let proxy = Proxy::builder().listen(family).upstream_at(&upstream).start();
        let [mut fresh, mut idle, mut begun, mut failed, mut large, mut asleep] =
            [(); 6].map(|()| session(&proxy));
        assert_eq!(query(&mut idle, "SELECT 1"), b'I');
        assert_eq!(query(&mut begun, "BEGIN"), b'T');
        assert_eq!((query(&mut failed, "BEGIN"), query(&mut failed, "SELECT 1/0")), (b'T', b'E'));
        assert_eq!(query(&mut large, "BEGIN"), b'T');
        begin_query(&mut asleep, "SELECT pg_sleep(4)");
        assert_eq!(proxy.control().put(QUERY).status, 201);
        for client in [&mut fresh, &mut idle] {
            assert_ends_in_order(client);
        }
        thread::sleep(LONG);
        assert_eq!(proxy.control().status().drained, 2);
        assert_eq!(until_ready(&mut asleep), b'I');
        let rows = "SELECT repeat('x', 1000) FROM generate_series(1, 5000)";
        assert_eq!((query(&mut large, rows), query(&mut large, "COMMIT")), (b'T', b'I'));
        assert_eq!(query(&mut begun, "SELECT 1"), b'T', "it is the same transaction");
        assert_eq!((query(&mut begun, rows), query(&mut begun, "COMMIT")), (b'T', b'I'));
        assert_eq!(query(&mut failed, "ROLLBACK"), b'I');
        for client in [&mut begun, &mut failed, &mut large, &mut asleep] {
            assert_ends_in_order(client);
        }
        proxy.control().wait_counts(|status| (status.drained, status.active), (6, 0));
    }
}

/// `psql` does not end the stream of its cancel request, so it is held and not dropped.
#[test]
fn a_cancel_request_of_psql_is_held_and_comes_with_the_resume() {
    let Some(postgres) = Postgres::start() else {
        println!("skipped: there is no PostgreSQL on this machine");
        return;
    };
    let upstream = format!("unix://{}", postgres.socket().display());
    let proxy = Proxy::builder()
        .upstream_at(&upstream)
        .args(["--hold-half-closed", "drop", "--hold-timeout", "1h"])
        .start();
    let query = "SELECT pg_sleep(3600)";
    let psql = Command::new("psql")
        .args(["-X", "-h", "127.0.0.1", "-p", &proxy.addr().port().to_string()])
        .args(["-U", "anna", "-d", "postgres", "-c", query])
        .env("PGSSLMODE", "disable")
        .env("PGGSSENCMODE", "disable")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(psql) = psql else {
        println!("skipped: there is no psql on this machine");
        return;
    };
    // Once its query runs, the server has got it and the proxy has told the bytes.
    let mut observer = session(&proxy);
    wait_until("the query runs", || {
        begin_query(&mut observer, "SELECT query FROM pg_stat_activity WHERE state = 'active'");
        let (rows, _status) = read_answer(&mut observer);
        rows.windows(query.len()).any(|bytes| bytes == query.as_bytes())
    });
    proxy.control().pause();
    kill_process(Pid::from_child(&psql), Signal::INT).unwrap();
    proxy.control().wait_counts(|status| status.held, 1);
    let status = proxy.control().status();
    assert_eq!((status.closed["left-held"], status.active), (0, 2), "its query runs on");
    proxy.control().resume();
    let output = psql.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("canceling statement due to user request"), "{text}");
}

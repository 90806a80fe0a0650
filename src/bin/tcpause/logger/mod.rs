//! Logging to standard error that never blocks: one writer thread behind a bounded queue.

mod format;
pub(crate) mod journal;

use std::{
    env,
    io::{self, ErrorKind, Write},
    panic,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use log::{Level, LevelFilter, Record, kv::Value};
use tcpause::{Error, LOG_LINES_DROPPED, LogFormat, suggest::nearest};

use format::Format;
pub(crate) use format::OneLine;

/// Most lines that wait for the writer; further ones are dropped and counted.
const LINES_MAX: usize = 4096;
/// Time that the end of the program waits for the last lines.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Running logger. Its drop waits, for a bounded time, until the lines so far are written.
pub(crate) struct Logger(Queue);

impl Logger {
    /// Starts the writer thread and installs the logger. `RUST_LOG`, if it is set, beats the level. Panics are logged too:
    /// the default hook writes several lines, and waits until standard error takes them.
    pub(crate) fn start(level: LevelFilter, format: LogFormat) -> Result<Self, Error> {
        let format = Format::new(format, journal::is_stderr());
        let (queue, lines) = Queue::new(&LOG_LINES_DROPPED);
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(&lines, &LOG_LINES_DROPPED, format, io::stderr()))
            .map_err(|error| Error::no_thread("writes the log", &error))?;
        let variable = env::var_os("RUST_LOG").unwrap_or_default();
        let (filter, warning) = filter(level, &variable.to_string_lossy());
        env_logger::Builder::new()
            .parse_filters(&filter)
            .format(
                move |line, record| {
                    if is_noise(record) { Ok(()) } else { line.write_all(&format.line(record)) }
                },
            )
            .target(env_logger::Target::Pipe(Box::new(queue.clone())))
            .try_init()
            .map_err(|error| Error::System(format!("cannot start the log: {error}")))?;
        panic::set_hook(Box::new(|panic| {
            let text = panic.to_string().replace('\n', " ");
            // This panic is that of the standard library's `spawn`. Only the server behind the control API uses it, and
            // the control plane replaces that server.
            if text.contains("failed to spawn thread") {
                log::warn!(
                    "no thread can be had for the control API; raise the limit of processes (ulimit -u, TasksMax)"
                );
                return;
            }
            let name = thread::current().name().unwrap_or("without a name").to_owned();
            log::error!("a defect in thread {name}: {text}");
        }));
        if let Some(warning) = warning {
            // The warning bypasses the filter, which might drop it.
            let mut record = Record::builder();
            record.level(Level::Warn);
            queue.push(format.line(&record.args(format_args!("{warning}")).build()));
        }
        Ok(Self(queue))
    }

    /// Returns a function that waits, for a bounded time, until the lines so far are written.
    pub(crate) fn flusher(&self) -> impl Fn() + Send + 'static {
        let queue = self.0.clone();
        move || {
            queue.flush(FLUSH_TIMEOUT);
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        self.0.flush(FLUSH_TIMEOUT);
    }
}

/// A message to the writer thread.
enum Message {
    /// A whole line with its end.
    Line(Vec<u8>),
    /// Request for an answer once all lines before it are written.
    Flush(Sender<()>),
}

/// Queue of lines to the writer thread.
#[derive(Clone)]
struct Queue {
    messages: Sender<Message>,
    /// Number of lines that were lost.
    dropped: &'static AtomicU64,
}

impl Queue {
    fn new(dropped: &'static AtomicU64) -> (Self, Receiver<Message>) {
        let (messages, receiver) = bounded(LINES_MAX);
        (Self { messages, dropped }, receiver)
    }

    fn push(&self, line: Vec<u8>) {
        if let Err(TrySendError::Full(_)) = self.messages.try_send(Message::Line(line)) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until all lines so far are written. Returns false if that takes too long.
    fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let (done, written) = bounded(1);
        self.messages.send_deadline(Message::Flush(done), deadline).is_ok()
            && written.recv_deadline(deadline).is_ok()
    }
}

/// Sink of `env_logger`, which writes each line with one call.
impl Write for Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns true for a line of `tiny_http` about its own threads, which tells an operator nothing, and for all lines of the
/// client of etcd, of TLS and of the loader of BPF: clients that are rejected could write into the log at will.
fn is_noise(record: &Record<'_>) -> bool {
    match record.target().split("::").next() {
        Some("tiny_http") => record.level() > Level::Error,
        Some("rustls" | "ureq" | "ureq_proto" | "aya" | "aya_obj") => true,
        _ => false,
    }
}

/// Runs the writer thread. It goes on if standard error is closed or full, as there is no place to report that.
fn write_lines(
    messages: &Receiver<Message>,
    dropped: &AtomicU64,
    format: Format,
    output: impl Write,
) {
    let mut output = Output { inner: output, is_torn: false };
    // Number of lost lines that the log has told.
    let mut told = 0;
    for message in messages {
        let lost = dropped.load(Ordering::Relaxed);
        // If the report cannot be written now, the next one includes it.
        if lost > told && output.write_line(&report(lost - told, format)).is_ok() {
            told = lost;
        }
        match message {
            Message::Line(line) => {
                if output.write_line(&line).is_err() {
                    dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
            // An error means that the waiting thread has given up.
            Message::Flush(done) => drop(done.try_send(())),
        }
    }
}

/// Returns the line that tells of lost lines.
fn report(lost: u64, format: Format) -> Vec<u8> {
    let fields = [("event", Value::from("lines-dropped")), ("lines", Value::from(lost))];
    let mut record = Record::builder();
    record.level(Level::Warn).key_values(&fields);
    format.line(&record.args(format_args!("log lines dropped: {lost}")).build())
}

/// Output that remembers a torn last line. A disk that fills up, or a file at its limit, takes a part of a line and refuses
/// the rest.
struct Output<W> {
    inner: W,
    is_torn: bool,
}

impl<W: Write> Output<W> {
    /// Writes a line; after a torn one, it begins on a new line.
    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.is_torn {
            self.inner.write_all(b"\n")?;
            self.is_torn = false;
        }
        let mut rest = line;
        while !rest.is_empty() {
            match self.inner.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => {
                    rest = rest.get(written..).unwrap_or_default();
                    self.is_torn = !rest.is_empty();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Returns the filter for `env_logger`, and a warning if the variable is ignored. The check is needed because `env_logger`
/// takes a mistyped level for a module, and then logs nothing.
fn filter(level: LevelFilter, variable: &str) -> (String, Option<String>) {
    // The text behind a slash is a pattern that a message must contain to be logged.
    let (directives, pattern) = variable.split_once('/').unwrap_or((variable, ""));
    let mut parts = directives.split(',').map(str::trim).filter(|part| !part.is_empty());
    let default = level.as_str();
    if pattern.contains('/') || !parts.clone().all(is_directive) {
        let warning = format!(
            "RUST_LOG={variable:?} is ignored; write a level (off, error, warn, info, debug, trace) or module=level, with commas between several, and one slash at most"
        );
        return (default.to_owned(), Some(warning));
    }
    match parts.next() {
        Some(_) => (variable.to_owned(), None),
        None => (format!("{default}{variable}"), None),
    }
}

fn is_directive(part: &str) -> bool {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let is_level = |text: &str| text.trim().parse::<LevelFilter>().is_ok();
    let is_module = |text: &str| {
        text.starts_with(|letter: char| letter.is_alphabetic() || letter == '_')
            && text.chars().all(|letter| letter.is_alphanumeric() || "_:-".contains(letter))
    };
    match part.split_once('=') {
        Some((module, level)) => is_module(module) && is_level(level),
        None => is_level(part) || (is_module(part) && nearest(part, LEVELS).is_none()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Time that is long enough for any machine; only a defect makes a test wait for it.
    const DEADLINE: Duration = Duration::from_secs(20);

    const TEXT: Format = Format::new(LogFormat::Text, false);

    /// Output that sends its bytes to a channel until the receiver is dropped.
    struct Reader(Sender<Vec<u8>>);

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn text(message: Message) -> String {
        match message {
            Message::Line(line) => String::from_utf8(line).unwrap(),
            Message::Flush(_) => panic!("no line"),
        }
    }

    #[test]
    fn a_full_queue_drops_counts_and_never_blocks() {
        static DROPPED: AtomicU64 = AtomicU64::new(0);
        let (queue, messages) = Queue::new(&DROPPED);
        for number in 0..LINES_MAX + 3 {
            queue.push(format!("{number}\n").into_bytes());
        }
        assert!(!queue.flush(Duration::from_millis(1)), "nobody writes");
        // The queue has room for one line again.
        assert_eq!(text(messages.recv().unwrap()), "0\n");
        let mut output = Vec::new();
        drop(queue);
        write_lines(&messages, &DROPPED, TEXT, &mut output);
        let output = String::from_utf8(output).unwrap();
        let lines: Vec<&str> = output.lines().collect();
        assert!(lines[0].ends_with(" WARN log lines dropped: 3"), "{}", lines[0]);
        assert_eq!(lines.len(), LINES_MAX);
        assert_eq!(lines.last().unwrap().to_owned(), (LINES_MAX - 1).to_string());
        assert_eq!(DROPPED.load(Ordering::Relaxed), 3, "the count goes on after it is told");
    }

    /// File with room for that many bytes.
    struct File {
        room: usize,
        bytes: Vec<u8>,
    }

    impl Write for File {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(self.room - self.bytes.len());
            if count == 0 {
                return Err(ErrorKind::FileTooLarge.into());
            }
            self.bytes.extend_from_slice(&bytes[..count]);
            Ok(count)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_behind_a_torn_one_is_a_line_of_its_own() {
        let inner = File { room: 6, bytes: Vec::new() };
        let mut output = Output { inner, is_torn: false };
        assert!(output.write_line(b"one\n").is_ok());
        assert!(output.write_line(b"two\n").is_err());
        assert!(output.write_line(b"three\n").is_err());
        output.inner.room = 20;
        assert!(output.write_line(b"four\n").is_ok());
        assert!(output.write_line(b"five\n").is_ok());
        assert_eq!(String::from_utf8(output.inner.bytes).unwrap(), "one\ntw\nfour\nfive\n");
        // A line without any room has left nothing torn.
        let inner = File { room: 4, bytes: Vec::new() };
        let mut output = Output { inner, is_torn: false };
        assert!(output.write_line(b"one\n").is_ok());
        assert!(output.write_line(b"two\n").is_err());
        output.inner.room = 20;
        assert!(output.write_line(b"four\n").is_ok());
        assert_eq!(output.inner.bytes, b"one\nfour\n");
    }

    #[test]
    fn lost_lines_are_told_until_the_report_is_written() {
        static DROPPED: AtomicU64 = AtomicU64::new(2);
        let (queue, messages) = Queue::new(&DROPPED);
        queue.push(b"too long\n".to_vec());
        queue.push(b"lost\n".to_vec());
        drop(queue);
        let mut output = File { room: 3, bytes: Vec::new() };
        write_lines(&messages, &DROPPED, TEXT, &mut output);
        assert_eq!(DROPPED.load(Ordering::Relaxed), 4);
        let (queue, messages) = Queue::new(&DROPPED);
        queue.push(b"{}\n".to_vec());
        drop(queue);
        let mut output = Vec::new();
        write_lines(&messages, &DROPPED, Format::new(LogFormat::Json, false), &mut output);
        let lines = String::from_utf8(output).unwrap();
        let (report, rest) = lines.split_once('\n').unwrap();
        let fields =
            "\"event\":\"lines-dropped\",\"message\":\"log lines dropped: 4\",\"lines\":4}";
        assert!(report.ends_with(fields) && rest == "{}\n", "{lines}");
    }

    #[test]
    fn a_flush_waits_for_the_lines_before_it() {
        static DROPPED: AtomicU64 = AtomicU64::new(0);
        let (queue, messages) = Queue::new(&DROPPED);
        let (sender, written) = bounded(10);
        let writer = thread::Builder::new()
            .spawn(move || write_lines(&messages, &DROPPED, TEXT, Reader(sender)))
            .unwrap();
        queue.push(b"1\n".to_vec());
        queue.push(b"2\n".to_vec());
        assert!(queue.flush(DEADLINE));
        assert_eq!(written.try_iter().collect::<Vec<_>>(), [b"1\n", b"2\n"]);
        // A closed output neither stops the writer nor a flush.
        drop(written);
        queue.push(b"3\n".to_vec());
        assert!(queue.flush(DEADLINE));
        assert_eq!(DROPPED.load(Ordering::Relaxed), 1);
        drop(queue);
        writer.join().unwrap();
    }

    #[test]
    fn lines_of_packages_are_left_out_but_for_errors_of_tiny_http() {
        for (target, level, expected) in [
            ("tiny_http", Level::Debug, true),
            ("tiny_http::util", Level::Trace, true),
            ("tiny_http", Level::Error, false),
            ("rustls::common_state", Level::Error, true),
            ("ureq::run", Level::Debug, true),
            ("ureq_proto::util", Level::Debug, true),
            ("aya_obj::relocation", Level::Debug, true),
            ("tcpause::control", Level::Debug, false),
        ] {
            let record = Record::builder().target(target).level(level).build();
            assert_eq!(is_noise(&record), expected, "{target} {level}");
        }
    }

    #[test]
    fn the_variable_beats_the_level_unless_it_is_wrong() {
        for (variable, expected, is_ignored) in [
            ("", "INFO", false),
            ("debug", "debug", false),
            ("DEBUG", "DEBUG", false),
            ("tcpause=trace, warn", "tcpause=trace, warn", false),
            ("tcpause::worker=debug", "tcpause::worker=debug", false),
            ("tcpause", "tcpause", false),
            ("debug/held", "debug/held", false),
            ("/held", "INFO/held", false),
            ("debgu", "INFO", true),
            ("tcpause=loud", "INFO", true),
            ("tcpause=", "INFO", true),
            ("a=b=c", "INFO", true),
            ("5", "INFO", true),
            ("debug\u{fffd}", "INFO", true),
            ("!,warn", "INFO", true),
            ("warn/a/b", "INFO", true),
        ] {
            let (filter, warning) = filter(LevelFilter::Info, variable);
            assert_eq!(
                (filter.as_str(), warning.is_some()),
                (expected, is_ignored),
                "{variable:?}"
            );
        }
    }
}

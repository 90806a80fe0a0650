//! Screen of a terminal that a command has for itself, and the way to standard output.

use std::{
    io::{self, ErrorKind, IsTerminal as _, Write as _},
    process::ExitCode,
    time::Duration,
};

use rustix::termios::tcgetwinsize;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP},
    iterator::Signals,
    low_level::emulate_default_handler,
};

use super::{
    Failure,
    exec::{cannot_listen, heeded, spawn},
};
use crate::{logger::OneLine, tell};

/// Time between two requests of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Escapes that switch to the terminal's other screen and hide the cursor, and that undo both.
const ENTER: &[u8] = b"\x1b[?1049h\x1b[?25l";
const LEAVE: &[u8] = b"\x1b[?25h\x1b[?1049l";

/// Writes all at once, so that a terminal never shows half of it. Returns false if the reader has gone.
pub(super) fn write(text: &[u8]) -> Result<bool, Failure> {
    let mut output = io::stdout().lock();
    match output.write_all(text).and_then(|()| output.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::Other(format!("cannot write to standard output: {error}"))),
    }
}

/// The terminal's other screen, which this leaves when it is dropped and when a signal ends or stops the program.
struct Screen;

impl Screen {
    fn enter() -> Result<Self, Failure> {
        let heeded = heeded(&[SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP]);
        let mut signals = Signals::new(heeded).map_err(|error| cannot_listen(&error))?;
        // A thread of its own, as the other one may wait for an answer.
        spawn("signals", "listens to signals", move || {
            for signal in signals.forever() {
                // Under the lock, nothing is written to the screen that comes back.
                let mut output = io::stdout().lock();
                drop(output.write_all(LEAVE).and_then(|()| output.flush()));
                // It returns only after a stop, once the program goes on.
                drop(emulate_default_handler(signal));
                drop(output.write_all(ENTER).and_then(|()| output.flush()));
            }
        })?;
        write(ENTER)?;
        Ok(Self)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        drop(write(LEAVE));
    }
}

/// Shows what `look` finds each second, until a signal ends the program or the reader of the output has gone.
pub(super) fn watch(
    is_raw: bool,
    mut look: impl FnMut() -> Result<String, Failure>,
) -> Result<ExitCode, Failure> {
    let on_screen = io::stdout().is_terminal() && !is_raw;
    let _screen = on_screen.then(Screen::enter).transpose()?;
    let mut due = crossbeam_channel::after(Duration::ZERO);
    while due.recv().is_ok() {
        let text = match look() {
            Ok(text) if on_screen => frame(&text),
            Ok(text) => text,
            Err(failure) => {
                let line = failure.told().1;
                // On a terminal that shows both outputs, the line would be written over the frame.
                if !on_screen || !io::stderr().is_terminal() {
                    tell(line);
                }
                if on_screen {
                    frame(&format!("tcpause: {}", OneLine(line)))
                } else {
                    String::new()
                }
            }
        };
        if !write(text.as_bytes())? {
            break;
        }
        due = crossbeam_channel::after(WATCH_INTERVAL);
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the text with the escapes by which it replaces the one on the screen.
fn frame(text: &str) -> String {
    // Without a size the text is shown whole.
    let (rows, columns) = match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row.into(), size.ws_col.into()),
        _ => (usize::MAX, usize::MAX),
    };
    fit(text.trim(), rows, columns)
}

/// Cuts the text to the size of a screen, as its first lines would be scrolled away otherwise. Each line clears the rest of
/// its row, and the last line clears all rows below.
fn fit(text: &str, rows: usize, columns: usize) -> String {
    let width = |line: &str| line.chars().count();
    let height = |line: &str| width(line).div_ceil(columns).max(1);
    let mut lines: Vec<&str> = text.lines().collect();
    let rest;
    if lines.iter().map(|line| height(line)).sum::<usize>() > rows {
        let mut used = 1; // a row for the line that counts the others
        let fits = |line: &&&str| {
            used += height(line);
            used <= rows
        };
        let shown = lines.iter().take_while(fits).count();
        rest = format!("lines that do not fit: {}", lines.len() - shown);
        lines.truncate(shown);
        lines.push(&rest);
    }
    let lines = lines.into_iter().map(|line| {
        // Behind a full row, the cursor still stands on its last letter.
        let is_full = !line.is_empty() && width(line).is_multiple_of(columns);
        format!("{line}{}", if is_full { "" } else { "\x1b[K" })
    });
    format!("\x1b[H{}\x1b[J", lines.collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_fits_its_screen() {
        for (text, rows, columns, frame) in [
            ("a\nb", 2, 80, "\x1b[Ha\x1b[K\nb\x1b[K\x1b[J"),
            ("a\nb\nc", 2, 80, "\x1b[Ha\x1b[K\nlines that do not fit: 2\x1b[K\x1b[J"),
            // A line that goes on in the next row takes two.
            ("abc\nd", 2, 2, "\x1b[Hlines that do not fit: 2\x1b[J"),
            ("abc\nd", 3, 2, "\x1b[Habc\x1b[K\nd\x1b[K\x1b[J"),
            ("ab\n\nd", 3, 2, "\x1b[Hab\n\x1b[K\nd\x1b[K\x1b[J"),
            ("a\nb", usize::MAX, usize::MAX, "\x1b[Ha\x1b[K\nb\x1b[K\x1b[J"),
        ] {
            assert_eq!(fit(text, rows, columns), frame, "{text:?} {rows} {columns}");
        }
    }
}

//! Events of `tcpause exec`, and its talk to the control API, which tells most of them.

use std::{sync::Arc, time::Duration};

use crossbeam_channel::Sender;
use serde_json::Value;
use signal_hook::low_level::siginfo::Origin;
use tcpause::boot_time;

use super::{
    Answer, Api, Failure,
    http::{Connection, Ending},
};

/// An event of the pause, of the command or of this process.
pub(super) enum Event {
    /// The connection that the pause depends on is established.
    Connected(Arc<Connection>),
    /// The API has answered, or cannot be asked.
    Answered(Result<Answer, Failure>),
    /// It is not certain any more that the pause holds, or it is again.
    Lost(bool),
    /// It is proven that the pause holds up to this time of [`boot_time`], and nothing is known of later.
    Kept(Duration),
    /// That time has come without another proof.
    Silent,
    /// An operator has resumed these hosts.
    Forced(Vec<String>),
    /// The pause of a fleet has ended, or is going to, but for these hosts.
    Resumed { ended: bool, still_paused: Vec<String> },
    /// The pause has ended.
    Ended(End),
    /// This process was sent a signal.
    Signal(Origin),
    /// The command has ended.
    Exited,
}

/// The end of the pause, as seen from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// It was lifted, or not renewed in time.
    Lifted,
    /// The proxy is gone.
    ProxyGone,
}

impl End {
    /// Returns the clause about an end that comes before the command's.
    pub(super) fn early(self) -> &'static str {
        match self {
            Self::Lifted => {
                "the pause has ended before the command: it was lifted, or not renewed in time"
            }
            Self::ProxyGone => "the proxy has gone away",
        }
    }
}

/// Asks for the pause, and then waits for its end.
pub(super) fn talk(api: &Api, request: &str, wait: Option<Duration>, events: &Sender<Event>) {
    let answer = api.connect().and_then(|connection| {
        let connection = Arc::new(connection);
        api.send(&connection, "PUT", request)?;
        // The main thread renews from here on, and a renewal must not come before the request.
        drop(events.send(Event::Connected(Arc::clone(&connection))));
        let mut answer = api.answer(&connection, wait, Ending::Line)?;
        let rest = std::mem::take(&mut answer.rest);
        Ok((connection, rest, answer))
    });
    let (connection, answer) = match answer {
        Ok((connection, rest, answer)) => {
            (Some((connection, rest)).filter(|_| answer.status == 201), Ok(answer))
        }
        Err(failure) => (None, Err(failure)),
    };
    drop(events.send(Event::Answered(answer)));
    // Without a pause, there is no end to wait for.
    let Some((connection, rest)) = connection else { return };
    connection.lines_to_end(rest, |line| {
        let line = serde_json::from_slice::<Value>(line).unwrap_or_default();
        let flag = |name| line.get(name).and_then(Value::as_bool);
        let hosts = |name| -> Vec<String> {
            let hosts = line.get(name).and_then(Value::as_array).into_iter().flatten();
            hosts.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let (forced, still_paused) = (hosts("forced"), hosts("still_paused"));
        if !forced.is_empty() {
            drop(events.send(Event::Forced(forced)));
        }
        let kept = line.get("kept_seconds").and_then(Value::as_f64);
        if let Some(kept) = kept.and_then(|kept| Duration::try_from_secs_f64(kept).ok()) {
            drop(events.send(Event::Kept(boot_time().saturating_add(kept))));
        }
        match (flag("lost"), flag("ended")) {
            (Some(is_lost), _) => drop(events.send(Event::Lost(is_lost))),
            (None, Some(ended)) => drop(events.send(Event::Resumed { ended, still_paused })),
            (None, None) => {}
        }
    });
    let is_there = api.ask("GET", "/paused", None).is_ok();
    drop(events.send(Event::Ended(if is_there { End::Lifted } else { End::ProxyGone })));
}

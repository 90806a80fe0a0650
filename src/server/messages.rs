//! Messages of a hand-over, in the order in which they are sent.

use serde::{Deserialize, Serialize};

use super::rest::RestWords;
use crate::{
    control::{ControlListenersWords, ControlWords},
    worker::handover::{BatchWords, ListenersWords},
};

/// Format that this program writes. It is raised with each change that an older program would misread.
pub(super) const FORMAT: u32 = 1;

/// Formats that this program reads.
pub(super) const FORMATS: [u32; 1] = [FORMAT];

/// Demand of a giver whose clients begin with PROXY headers: an older program would take these for the clients' own bytes.
pub(super) const READ_PROXY_HEADERS: &str = "read PROXY headers";

/// Message of either side.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Message {
    /// The taker is there.
    TakerHello(TakerHello),
    /// The giver says for what it asks.
    GiverHello(GiverHello),
    /// The taker is ready to receive. Nobody has noticed anything yet.
    Warm,
    /// The taker cannot take over, for this reason. It is sent in place of `Warm` or `Ready`.
    Refuse { why: String },
    /// The giver stands still. Moments count from here.
    Begin(Begin),
    /// Listeners of a worker.
    Listeners(ListenersWords),
    /// Connections of a worker.
    Connections(BatchWords),
    /// Listeners of the control API and of the monitor.
    ControlListeners(ControlListenersWords),
    /// Callers of the control API.
    Control(ControlWords),
    /// Everything that the process has once.
    Rest(Box<RestWords>),
    /// The giver has sent everything.
    End(End),
    /// The taker has rebuilt everything. Nothing that can fail is left.
    Ready,
    /// The taker is to go on.
    Go,
    /// The giver goes on itself.
    Abort,
    /// The taker goes on.
    Taken,
}

impl Message {
    /// Returns the word of the message, by which tests name it.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::TakerHello(_) | Self::GiverHello(_) => "hello",
            Self::Warm => "warm",
            Self::Refuse { .. } => "refuse",
            Self::Begin(_) => "begin",
            Self::Listeners(_) => "listeners",
            Self::Connections(_) => "connections",
            Self::ControlListeners(_) => "control-listeners",
            Self::Control(_) => "control",
            Self::Rest(_) => "rest",
            Self::End(_) => "end",
            Self::Ready => "ready",
            Self::Go => "go",
            Self::Abort => "abort",
            Self::Taken => "taken",
        }
    }
}

/// Abilities of the taker.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct TakerHello {
    pub(super) formats: Vec<u32>,
    pub(super) version: String,
    /// Number of its process, which has to be the one that the giver has started.
    #[serde(default)]
    pub(super) pid: Option<u32>,
    /// Set if its program can also be run in the process of the giver, to take everything back.
    #[serde(default)]
    pub(super) can_take_back: bool,
}

/// Demands of the giver.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct GiverHello {
    pub(super) format: u32,
    /// Words for what a taker must not ignore. A taker that does not know one of them refuses.
    pub(super) needs: Vec<String>,
    pub(super) version: String,
    /// Addresses that must be the same in the taker's configuration, as they are written.
    /// None stands for sockets that the service manager has passed.
    pub(super) proxy_addr: Option<String>,
    pub(super) control_addr: Option<String>,
    /// Address of the monitor, which may change.
    pub(super) monitor_addr: Option<String>,
    pub(super) pid: u32,
    /// Number of descriptors that the giver has open.
    pub(super) descriptors: u64,
    /// Set if the giver's process runs the program anew behind `Taken`, and then takes everything back, so that its number
    /// stays. It says `TakerHello` on the same channel then.
    #[serde(default)]
    pub(super) takes_back: bool,
}

/// Beginning of the description.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Begin {
    /// Time for which the first thread has stood still, in nanoseconds.
    pub(super) frozen_nanos: u64,
}

/// Numbers by which the taker checks that it has everything.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct End {
    /// Messages since `Begin`.
    pub(super) messages: u64,
}

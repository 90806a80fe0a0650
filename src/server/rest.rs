//! Words of what a process has once: its start, counters, pauses, queue, upstream, upgrades and socket files.

use std::{
    sync::{PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    admission::{pace::PaceWords, queue::QueueWords},
    handover::{
        parcel::{Incoming, Moment, Outgoing},
        upgrades::UpgradesWords,
    },
    log_limit::LOG_LINES_DROPPED,
    pause::{
        steer::Steer,
        words::{FrozenPauses, PausesWords},
    },
    shared::Shared,
    stats::{Counters, words::CountersWords},
    sys::socket_file::{SocketFile, SocketFileWords},
    upstream::words::UpstreamWords,
};

/// Everything that a process has once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct RestWords {
    /// Start of the first process.
    started: Moment,
    /// Counters of each worker.
    counters: Vec<CountersWords>,
    /// Largest number of a client, after which the numbers go on.
    last_number: u64,
    log_lines_dropped: u64,
    pauses: PausesWords,
    queue: QueueWords,
    /// Giver's pace towards its upstream. Earlier programs do not tell it.
    #[serde(default)]
    pace: Option<PaceWords>,
    upstream: UpstreamWords,
    upgrades: UpgradesWords,
    /// Member of a fleet, in words of the fleet's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) fleet: Option<Value>,
    /// Last contact with the fleet, since the start of the host: all that earlier programs tell of it.
    #[serde(default, skip_serializing)]
    fleet_contact: Option<Duration>,
    pub(super) files: FilesWords,
    /// Steering of the giver, if there is one. Its map of marks is the parcel's one descriptor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) steering: Option<SteeringWords>,
}

/// Steering, as a taker has to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SteeringWords {
    /// Connections that were steered and are there.
    pub(super) active: u64,
}

/// Files of UNIX listeners.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct FilesWords {
    proxy: Option<SocketFileWords>,
    /// Those of the control API and of the monitor.
    control: Vec<SocketFileWords>,
}

impl RestWords {
    /// Describes it while all stands still.
    pub(super) fn describe<'a>(
        shared: &'a Shared,
        pauses: &FrozenPauses<'_>,
        parcel: &mut Outgoing<'a>,
    ) -> Self {
        // Without `..`, so that nothing new is forgotten.
        let Shared {
            pauses: all_pauses,
            admission,
            upstream,
            reject_policy: _,
            proxy_headers: _,
            workers,
            log: _,
            shutdown: _,
            freeze: _,
            pipes_per_worker: _,
            started,
            listeners: _,
            socket_files,
            control_addr: _,
            config_file: _,
            upgrade_requests: _,
            upgrades,
            fleet,
        } = shared;
        let steer = all_pauses.steer();
        let marks = steer.and_then(Steer::marks);
        if let Some(marks) = marks {
            parcel.lend(marks);
        }
        let steering = steer.filter(|_| marks.is_some()).map(Steer::status);
        let proxy = socket_files.proxy.lock().unwrap_or_else(PoisonError::into_inner);
        let control = socket_files.control.lock().unwrap_or_else(PoisonError::into_inner);
        Self {
            started: parcel.moment(*started),
            counters: workers.each().map(Counters::describe).collect(),
            last_number: workers.last_number(),
            log_lines_dropped: LOG_LINES_DROPPED.load(Ordering::Relaxed),
            pauses: pauses.describe(parcel),
            queue: admission.queue.describe(parcel),
            pace: Some(admission.queue.pace().describe(parcel)),
            upstream: upstream.describe(parcel),
            upgrades: upgrades.describe(),
            fleet: fleet.parcel(),
            fleet_contact: None,
            files: FilesWords {
                proxy: proxy.as_ref().map(SocketFile::describe),
                control: control.iter().map(SocketFile::describe).collect(),
            },
            steering: steering.map(|status| SteeringWords { active: status.active }),
        }
    }

    /// Returns the start of the first process.
    pub(super) fn started(&self, parcel: &Incoming) -> Instant {
        parcel.instant(self.started)
    }

    /// Restores all but the start and the files, before any worker runs. No pause expires before `Pauses::go_on`.
    pub(super) fn restore(&self, shared: &Shared, parcel: &Incoming) {
        let Self {
            started: _,
            counters,
            last_number,
            log_lines_dropped,
            pauses,
            queue,
            pace,
            upstream,
            upgrades,
            fleet: _,
            fleet_contact: _,
            files: _,
            steering: _,
        } = self;
        let workers = &shared.workers;
        for (index, words) in counters.iter().enumerate() {
            workers.counters(index % workers.len()).adopt(words);
        }
        workers.number_after(*last_number);
        LOG_LINES_DROPPED.fetch_add(*log_lines_dropped, Ordering::Relaxed);
        shared.pauses.restore(pauses, parcel);
        // Behind the pauses: without one, these withdraw all bypasses.
        shared.admission.queue.restore(queue, parcel);
        shared.upstream.restore(upstream, parcel);
        // Another upstream may be slower, and have less room.
        if let Some(pace) = pace.as_ref().filter(|_pace| upstream.is_of(&shared.upstream)) {
            shared.admission.queue.pace().restore(pace, parcel);
        }
        shared.upgrades.restore(upgrades.clone());
        shared.fleet.put_parcel(self.member());
    }

    /// Returns the member of a fleet that the giver was.
    pub(super) fn member(&self) -> Option<Value> {
        // An earlier program has had a session at its last contact, unless the store has refused one.
        let earlier =
            || Some(json!({ "contact": self.fleet_contact?, "present": self.fleet_contact? }));
        self.fleet.clone().or_else(earlier)
    }
}

impl FilesWords {
    /// Adopts the files of the proxy, and of the control API and the monitor. They go with this process from now on.
    pub(super) fn adopt(&self) -> (Option<SocketFile>, impl Iterator<Item = SocketFile>) {
        let proxy = self.proxy.as_ref().and_then(SocketFile::adopt);
        (proxy, self.control.iter().filter_map(SocketFile::adopt))
    }
}

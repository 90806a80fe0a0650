//! `GET /metrics`: counters and states as Prometheus reads them, written by hand from one table.

mod process;
mod table;

use std::{
    fmt::{self, Display, Write as _},
    time::Duration,
};

use self::{process::Process, table::FAMILIES};
use super::response::Response;
use crate::{
    handle::{Handle, Metrics},
    stats::{Count, histogram::HistogramSnapshot},
    timestamp::Rfc3339,
};

/// Media type of the text format. Exemplars and the like would belong to another one.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Classes of answers, by the first digit of their status.
const CLASSES: [(&str, u8); 3] = [("2xx", b'2'), ("4xx", b'4'), ("5xx", b'5')];

/// Part of the metrics that the control API has itself. The front alone counts.
#[derive(Debug)]
pub(super) struct Source {
    answers: [Count; CLASSES.len()],
    /// Start of the process in seconds of Unix time. Taken once, as a clock that is set must not look like a new start.
    process_start: Option<f64>,
}

/// All values at one moment.
struct Snapshot {
    metrics: Metrics,
    answers: [(&'static str, u64); CLASSES.len()],
    process: Option<Process>,
    process_start: Option<f64>,
}

/// Metric with all its label values.
struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    write: fn(&Snapshot, &mut Samples<'_>) -> fmt::Result,
}

/// Lines of one family.
struct Samples<'a> {
    text: &'a mut String,
    family: &'static Family,
}

impl Source {
    /// Begins to count.
    pub(super) fn new() -> Self {
        let process_start =
            Process::look().map(|process| Rfc3339::of_uptime(process.started).unix_seconds());
        Self { answers: Default::default(), process_start }
    }

    /// Counts an answer that was written, by the first digit of its status.
    pub(super) fn count(&self, answer: &[u8]) {
        // It stands behind `HTTP/1.1 `.
        let digit = answer.get(9);
        let place = CLASSES.iter().position(|(_, class)| Some(class) == digit);
        place.and_then(|place| self.answers.get(place)).into_iter().for_each(|count| count.add(1));
    }

    /// Returns the numbers of answers, in the order of their classes.
    pub(super) fn answers(&self) -> Vec<u64> {
        self.answers.iter().map(Count::get).collect()
    }

    /// Adds numbers of answers that another process has given.
    pub(super) fn add_answers(&self, answers: &[u64]) {
        self.answers.iter().zip(answers).for_each(|(count, more)| count.add(*more));
    }

    /// Returns the answer to `GET /metrics`.
    pub(super) fn scrape(&self, handle: &Handle) -> Response {
        let snapshot = self.look(handle);
        match snapshot.to_text() {
            Ok(text) => Response::new(TEXT_FORMAT, text),
            Err(fmt::Error) => Response::error(500, "The metrics cannot be written."),
        }
    }

    fn look(&self, handle: &Handle) -> Snapshot {
        let mut answers = CLASSES.map(|(class, _)| (class, 0));
        for ((_, number), count) in answers.iter_mut().zip(&self.answers) {
            *number = count.get();
        }
        Snapshot {
            metrics: handle.metrics(),
            answers,
            process: Process::look(),
            process_start: self.process_start,
        }
    }
}

impl Snapshot {
    fn to_text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        for family in FAMILIES {
            let begin = text.len();
            let Family { name, kind, help, write } = family;
            writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}")?;
            let head_end = text.len();
            write(self, &mut Samples { text: &mut text, family })?;
            if text.len() == head_end {
                text.truncate(begin);
            }
        }
        Ok(text)
    }
}

impl Samples<'_> {
    /// Writes the one sample of a family without labels.
    fn value(&mut self, value: impl Display) -> fmt::Result {
        writeln!(self.text, "{} {value}", self.family.name)
    }

    /// Writes the sample if there is one.
    fn optional(&mut self, value: Option<impl Display>) -> fmt::Result {
        value.map_or(Ok(()), |value| self.value(value))
    }

    /// Writes a sample for each word of a label.
    fn by<V: Display>(
        &mut self,
        label: &str,
        values: impl IntoIterator<Item = (impl Display, V)>,
    ) -> fmt::Result {
        for (word, value) in values {
            writeln!(self.text, "{}{{{label}=\"{word}\"}} {value}", self.family.name)?;
        }
        Ok(())
    }

    /// Writes the samples of a histogram. `labels` is empty, or ends with a comma.
    fn histogram(&mut self, labels: &str, histogram: &HistogramSnapshot) -> fmt::Result {
        let name = self.family.name;
        let HistogramSnapshot { bounds, cumulative, count, sum } = histogram;
        let seconds = |micros: u64| Duration::from_micros(micros).as_secs_f64();
        for (bound, below) in bounds.iter().zip(cumulative) {
            let bound = seconds(*bound);
            writeln!(self.text, "{name}_bucket{{{labels}le=\"{bound}\"}} {below}")?;
        }
        writeln!(self.text, "{name}_bucket{{{labels}le=\"+Inf\"}} {count}")?;
        let labels = match labels.trim_end_matches(',') {
            "" => String::new(),
            labels => format!("{{{labels}}}"),
        };
        writeln!(self.text, "{name}_sum{labels} {}\n{name}_count{labels} {count}", seconds(*sum))
    }

    /// Writes a histogram for each outcome.
    fn by_outcome(&mut self, histograms: &[(&'static str, HistogramSnapshot)]) -> fmt::Result {
        for (outcome, histogram) in histograms {
            self.histogram(&format!("outcome=\"{outcome}\","), histogram)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

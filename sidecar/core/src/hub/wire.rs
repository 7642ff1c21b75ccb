//! The lines of a wrapper's journal.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::metric::{Cell, Histogram, Kind, Meters, Metric, Unit};
use crate::report::Sums;
use crate::tokens::Usd;

/// A journal of another version is not read.
pub const VERSION: u32 = 1;

/// The first line: who writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    pub hub: u32,
    /// Names the wrapper, and is never used again.
    pub run: String,
    pub pid: u32,
    /// When it started, in seconds since the Unix epoch.
    pub started: f64,
    /// The container that it runs in, for whoever finds the journal later in another; empty where that makes no difference.
    #[serde(default)]
    pub world: String,
    /// For whom it works: `tenant`, `team`, `cost_center`.
    #[serde(default)]
    pub labels: Vec<(String, String)>,
}

/// Every other line: what changed, as it is now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Line {
    pub unix: f64,
    /// Metrics whose series are no more, but for those below.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cleared: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub series: Vec<(String, Vec<String>, Number)>,
    /// The live sessions, as `/status` shows them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sessions: Vec<serde_json::Value>,
    #[serde(default)]
    pub totals: Sums,
    /// Whether the agent can still be ended, and takes work.
    pub live: bool,
    pub ready: bool,
    /// The wrapper's monitor failed: it relays, and these are the last numbers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub blind: bool,
}

/// A cell, exactly: floats of sums travel as bits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Number {
    #[serde(rename = "n")]
    Count(u64),
    #[serde(rename = "pusd")]
    Pico(u64),
    #[serde(rename = "ns")]
    Nanos(u64),
    #[serde(rename = "g")]
    Gauge(f64),
    /// Observations by bucket, and the bits of their sum.
    #[serde(rename = "h")]
    Histogram(Vec<u64>, u64),
}

impl Number {
    fn of(cell: &Cell) -> Option<Number> {
        Some(match cell {
            Cell::Count(n) => Number::Count(*n),
            Cell::Usd(usd) => Number::Pico(usd.pico()),
            Cell::Time(time) => Number::Nanos(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)),
            // JSON has no word for the others.
            Cell::Gauge(value) if value.is_finite() => Number::Gauge(*value),
            Cell::Gauge(_) => return None,
            Cell::Histogram(h) => Number::Histogram(h.counts.clone(), h.sum.to_bits()),
        })
    }

    /// The cell, if it is one that the metric can have.
    pub fn cell(self, metric: &Metric) -> Option<Cell> {
        Some(match (self, metric.kind, metric.unit) {
            (Number::Pico(pico), Kind::Counter, Unit::Usd) => Cell::Usd(Usd::from_pico(pico)),
            (Number::Nanos(nanos), Kind::Counter, Unit::Seconds) => Cell::Time(Duration::from_nanos(nanos)),
            (Number::Count(n), Kind::Counter, unit) if !matches!(unit, Unit::Usd | Unit::Seconds) => Cell::Count(n),
            (Number::Gauge(value), Kind::Gauge | Kind::Info, _) => Cell::Gauge(value),
            (Number::Histogram(counts, bits), Kind::Histogram, _) if counts.len() == metric.buckets.len() + 1 => {
                let count = counts.iter().fold(0, |sum: u64, n| sum.saturating_add(*n));
                let sum = Some(f64::from_bits(bits)).filter(|sum| sum.is_finite())?;
                Cell::Histogram(Histogram { counts, count, sum, exponential: None })
            }
            _ => return None,
        })
    }
}

/// What changed in the meters since a mark, and the next mark. At zero: everything.
pub fn changes(meters: &mut Meters, since: u64, line: &mut Line) -> u64 {
    line.cleared = if since > 0 { meters.cleared(since).map(|metric| metric.name.to_owned()).collect() } else { Vec::new() };
    line.series = series(meters.changed(since));
    meters.mark()
}

/// As they are written. Who reads them has the zeros that every store begins with.
pub(super) fn series<'a>(
    all: impl Iterator<Item = (&'static Metric, &'a crate::metric::Series)>,
) -> Vec<(String, Vec<String>, Number)> {
    all.filter(|(metric, series)| !(is_zero(&series.cell) && metric.zero.iter().any(|values| *values == series.values)))
        .filter_map(|(metric, series)| Some((metric.name.to_owned(), series.values.clone(), Number::of(&series.cell)?)))
        .collect()
}

fn is_zero(cell: &Cell) -> bool {
    match cell {
        Cell::Count(n) => *n == 0,
        Cell::Usd(usd) => usd.is_zero(),
        Cell::Time(time) => time.is_zero(),
        // A zero takes back what was said before.
        Cell::Gauge(_) => false,
        Cell::Histogram(h) => h.count == 0,
    }
}

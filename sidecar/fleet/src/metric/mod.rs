//! What the fleet tells of itself: every instrument, and where its numbers are kept. A new metric is a line in [`CATALOG`] and a call of
//! [`Metrics::add`], [`Metrics::set`] or [`Metrics::observe`].
//!
//! Labels are the configuration's names and our own words; nothing that callers choose becomes one.

mod catalog;
mod counted;
mod now;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agent_sidecar_core::metric::{Kind, Merge, Unit};

pub use catalog::*;
pub use counted::Counted;
pub use now::{now, refused};

use crate::config::Config;
use crate::lifecycle::Phase;
use crate::session::Session;

/// An instrument.
#[derive(Debug)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    pub unit: Unit,
    pub labels: &'static [&'static str],
    /// Upper bounds of a histogram's buckets.
    pub buckets: &'static [f64],
    /// What the numbers of several fleets with one store make together.
    pub merge: Merge,
    pub help: &'static str,
}

/// Tenants that the configuration does not name.
const OTHER: &str = "other";
const ACTIONS: &[&str] =
    &["hooks", "create", "look", "start", "ask", "hydrate", "keep_alive", "pause", "persist", "resume", "stop", "delete"];

#[derive(Clone, Debug)]
enum Cell {
    Number(f64),
    Histogram { counts: Vec<u64>, sum: f64 },
}

type Series = BTreeMap<(&'static str, Vec<String>), Cell>;

/// The numbers. Those that the store has are read when they are asked for.
#[derive(Debug, Default)]
pub struct Metrics {
    tenants: BTreeSet<String>,
    series: Mutex<Series>,
}

impl Metrics {
    /// With what the names of a configuration make at zero: a counter that first appears at seven has no increase.
    pub fn new<'a>(
        providers: impl IntoIterator<Item = &'a str>,
        tenants: impl IntoIterator<Item = &'a str>,
        hooks: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let tenants = tenants.into_iter().map(str::to_owned).collect();
        let metrics = Self { tenants, series: Mutex::default() };
        let tenants: Vec<&str> = metrics.tenants.iter().map(String::as_str).chain([OTHER]).collect();
        metrics.set(&BUILD_INFO, &[env!("CARGO_PKG_VERSION")], 1.0);
        for provider in providers {
            for phase in Phase::ALL {
                metrics.add(&PHASES_ENTERED, &[phase.as_str(), provider], 0.0);
                metrics.touch(&PHASE_DURATION, &[phase.as_str(), provider]);
            }
            for action in ACTIONS {
                metrics.touch(&ACTION_DURATION, &[action, provider]);
                for outcome in ["ok", "busy", "failed", "refused", "unsure"] {
                    metrics.add(&ACTIONS_DONE, &[action, provider, outcome], 0.0);
                }
            }
            for outcome in ["ok", "failed"] {
                metrics.add(&RECONCILES, &[provider, outcome], 0.0);
            }
            metrics.add(&ORPHANS_REMOVED, &[provider], 0.0);
            metrics.add(&DISRUPTIONS, &[provider], 0.0);
            metrics.touch(&READY, &[provider]);
            for tenant in &tenants {
                for metric in [&AGENT_COST, &CONTAINER_COST, &CONTAINER_SECONDS] {
                    metrics.add(metric, &[provider, tenant], 0.0);
                }
            }
        }
        for tenant in &tenants {
            for reason in ["budget", "drained", "full", "unable"] {
                metrics.add(&REFUSALS, &[reason, tenant], 0.0);
            }
        }
        for hook in hooks {
            metrics.touch(&HOOK_DURATION, &[hook]);
            for outcome in ["ok", "veto", "failed", "timeout", "dead-letter"] {
                metrics.add(&HOOK_RUNS, &[hook, outcome], 0.0);
            }
        }
        metrics.add(&CLAIMS, &[], 0.0);
        for outcome in ["taken", "missed"] {
            metrics.add(&POOL_CLAIMS, &[outcome], 0.0);
        }
        for outcome in ["sent", "failed", "dropped"] {
            metrics.add(&SPANS, &[outcome], 0.0);
        }
        for operation in counted::OPERATIONS {
            metrics.add(&STORE_ERRORS, &[operation], 0.0);
        }
        metrics
    }

    pub fn of(config: &Config) -> Self {
        let hooks: BTreeSet<&str> = config.hooks.iter().map(|hook| hook.name.as_str()).collect();
        let metrics = Self::new(config.providers.keys().map(String::as_str), config.tenants.keys().map(String::as_str), hooks);
        for template in config.templates.values().filter(|template| template.pool.is_some()) {
            metrics.add(&POOL_FAILURES, &[&template.name], 0.0);
        }
        metrics
    }

    /// Only what the configuration names is a label: what else there is goes together.
    pub fn tenant<'a>(&self, tenant: &'a str) -> &'a str {
        if self.tenants.contains(tenant) { tenant } else { OTHER }
    }

    fn series(&self) -> MutexGuard<'_, Series> {
        // Whole in every state.
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, metric: &Metric, labels: &[&str], n: f64) {
        debug_assert!(metric.kind == Kind::Counter && n >= 0.0, "{} grows", metric.name);
        add(&mut self.series(), metric, labels, n);
    }

    pub fn set(&self, metric: &Metric, labels: &[&str], n: f64) {
        debug_assert!(matches!(metric.kind, Kind::Gauge | Kind::Info), "{} is set", metric.name);
        self.series().insert(key(metric, labels), Cell::Number(n));
    }

    pub fn observe(&self, metric: &Metric, labels: &[&str], took: Duration) {
        let seconds = took.as_secs_f64();
        let mut series = self.series();
        let Cell::Histogram { counts, sum } = histogram(&mut series, metric, labels) else { return };
        if let Some(n) = metric.buckets.iter().position(|bound| seconds <= *bound).or(Some(metric.buckets.len())) {
            counts[n] += 1;
        }
        *sum += seconds;
    }

    /// Begins a histogram.
    fn touch(&self, metric: &Metric, labels: &[&str]) {
        histogram(&mut self.series(), metric, labels);
    }

    /// A session has come from one phase into another.
    pub fn entered(&self, before: &Session, after: &Session) {
        let provider = after.provider.as_str();
        let between = |from, to: jiff::Timestamp| Duration::try_from(to.duration_since(from)).unwrap_or_default();
        self.add(&PHASES_ENTERED, &[after.phase.as_str(), provider], 1.0);
        self.observe(&PHASE_DURATION, &[before.phase.as_str(), provider], between(before.since, after.since));
        // For the first time: who wakes was there before.
        if after.phase == Phase::Ready
            // Or those before it were taken away.
            && after.generation == 1 + before.lost
            && before.report.is_none()
            && after.pool.is_none()
            && after.places.is_none()
        {
            self.observe(&READY, &[provider], between(after.created, after.since));
        }
    }

    /// What a session has cost from one version of it to the next. Each is written once, by whichever fleet, so that the sum of all fleets is right.
    pub fn spent(&self, before: &Session, after: &Session) {
        // It is their container's.
        if after.place.is_some() {
            return;
        }
        let labels = [after.provider.as_str(), self.tenant(&after.tenant)];
        let mut series = self.series();
        for (metric, more) in [
            (&AGENT_COST, after.cost_usd() - before.cost_usd()),
            (&CONTAINER_COST, after.container_usd - before.container_usd),
            (&CONTAINER_SECONDS, after.container_seconds - before.container_seconds),
        ] {
            add(&mut series, metric, &labels, more.max(0.0));
        }
    }

    /// As Prometheus reads it: each metric of the catalogue, with what was asked of the store now.
    pub fn exposition(&self, now: impl IntoIterator<Item = (&'static Metric, Vec<String>, f64)>) -> String {
        let mut series = self.series().clone();
        for (metric, labels, n) in now {
            debug_assert_eq!(metric.labels.len(), labels.len(), "{}", metric.name);
            series.insert((metric.name, labels), Cell::Number(n));
        }
        let mut out = String::new();
        for metric in CATALOG {
            // Prometheus has no type for what is always one.
            let kind = if metric.kind == Kind::Info { Kind::Gauge } else { metric.kind };
            // A String takes everything.
            writeln!(out, "# HELP {0} {1}\n# TYPE {0} {2}", metric.name, metric.help, kind.as_str()).ok();
            for ((_, values), cell) in series.range((metric.name, vec![])..).take_while(|((name, _), _)| *name == metric.name) {
                write(&mut out, metric, values, cell);
            }
        }
        out
    }
}

fn key(metric: &Metric, labels: &[&str]) -> (&'static str, Vec<String>) {
    debug_assert_eq!(metric.labels.len(), labels.len(), "{}", metric.name);
    (metric.name, labels.iter().map(|label| (*label).to_owned()).collect())
}

fn add(series: &mut Series, metric: &Metric, labels: &[&str], more: f64) {
    if let Cell::Number(n) = series.entry(key(metric, labels)).or_insert(Cell::Number(0.0)) {
        *n += more;
    }
}

fn histogram<'a>(series: &'a mut Series, metric: &Metric, labels: &[&str]) -> &'a mut Cell {
    let none = || Cell::Histogram { counts: vec![0; metric.buckets.len() + 1], sum: 0.0 };
    series.entry(key(metric, labels)).or_insert_with(none)
}

fn write(out: &mut String, metric: &Metric, values: &[String], cell: &Cell) {
    let quoted = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let mut pairs: Vec<String> =
        metric.labels.iter().zip(values).map(|(label, value)| format!("{label}=\"{}\"", quoted(value))).collect();
    let braces = |pairs: &[String]| if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) };
    let name = metric.name;
    match cell {
        Cell::Number(n) => writeln!(out, "{name}{} {n}", braces(&pairs)).ok(),
        Cell::Histogram { counts, sum } => {
            let plain = braces(&pairs);
            let mut all = 0;
            for (n, count) in counts.iter().enumerate() {
                all += count;
                let bound = metric.buckets.get(n).map_or_else(|| String::from("+Inf"), f64::to_string);
                pairs.push(format!("le=\"{bound}\""));
                writeln!(out, "{name}_bucket{} {all}", braces(&pairs)).ok();
                pairs.pop();
            }
            writeln!(out, "{name}_sum{plain} {sum}\n{name}_count{plain} {all}").ok()
        }
    };
}

/// The catalogue, as the contract that dashboards and alerts are checked against.
pub fn json() -> serde_json::Value {
    let metrics = CATALOG.iter().map(|metric| {
        serde_json::json!({
            "name": metric.name,
            "type": metric.kind.as_str(),
            "unit": metric.unit.as_str(),
            "labels": metric.labels,
            "merge": metric.merge.as_str(),
            "help": metric.help,
            "buckets": metric.buckets,
        })
    });
    metrics.collect()
}

/// The same as a page.
pub fn page() -> String {
    let mut out = String::from(
        "# Metrics of the fleet\n\nMade by `make docs` from the catalogue in `sidecar/fleet/src/metric/catalog.rs`. Agents' own are [another page's](metrics.md).\n\n\
         Labels are names of the configuration and words of ours; tenants that it does not name are `other`. `together` says what the series of\n\
         several fleets with one store make: the sum, or, where all of them read the same store, the largest.\n\n\
         | metric | type | labels | together | meaning |\n|---|---|---|---|---|\n",
    );
    for Metric { name, kind, labels, merge, help, .. } in CATALOG {
        let labels = if labels.is_empty() { String::from("–") } else { labels.join(", ") };
        writeln!(out, "| `{name}` | {} | {labels} | {} | {help} |", kind.as_str(), merge.as_str()).ok();
    }
    out
}

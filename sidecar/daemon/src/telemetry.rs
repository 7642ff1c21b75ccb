//! What `run` tells others of the agent while it runs: which of it is wanted, by whom, and the way there.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::sync::Arc;

use agent_sidecar_core::content::Gates;
use agent_sidecar_core::metric::{self, Meters};
use agent_sidecar_core::span::{Semconv, TraceSettings};
use agent_sidecar_core::telemetry::{Context, Value};
use agent_sidecar_core::who::Who;

use crate::config::Config;
use crate::export::otlp::encode::Origin;
use crate::export::otlp::environment::{self, Histograms, Own};
use crate::export::otlp::metrics::MetricsOptions;
use crate::export::otlp::pipeline::{Identity, Pipeline};
use crate::export::otlp::{Counts, Flushed, OtlpConfig, Signal, resource, turns};
use crate::http::visit_blocking;
use crate::supervise::{Handle, random};

/// The variable by which a process hands its span to another.
const TRACEPARENT: &str = "TRACEPARENT";
/// What belongs to it, and means nothing without it.
const TRACESTATE: &str = "TRACESTATE";

/// What was asked for.
pub(crate) struct Telemetry {
    config: OtlpConfig,
    semconv: Semconv,
    gates: Gates,
    /// The last turns of sessions, as others before us told them.
    turns: BTreeMap<String, Context>,
    agent_name: String,
    parent: Option<Context>,
    seed: u64,
    native_traces: bool,
    who: Who,
    instance: String,
    pub(crate) counts: Arc<Counts>,
}

impl Telemetry {
    /// Reads the configuration and the environment. What is wrong with the variables is said, and left out. Who asks no model
    /// spends nothing, and does not wait for a collector to tell its version.
    pub(crate) fn plan(config: &Config, asks_model: bool, instance: &str, who: Who) -> Telemetry {
        let own = if asks_model { config.otlp() } else { Own { off: true, ..Own::default() } };
        let (otlp, mistakes) = environment::read(&own, variable);
        for mistake in mistakes {
            tracing::warn!("{mistake}");
        }
        let parent = variable(TRACEPARENT).and_then(|text| {
            let parent = Context::from_traceparent(text.trim());
            if parent.is_none() {
                tracing::warn!("TRACEPARENT is not one of W3C Trace Context: each turn gets a trace of its own");
            }
            parent
        });
        let texts = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        let gates = config.gates(otlp.value_limit, environment::secrets(&otlp, texts));
        let traced = otlp.exported()[Signal::Traces as usize];
        let turns = otlp.queue_dir.as_deref().filter(|_| traced).map(turns::read).unwrap_or_default();
        Telemetry {
            gates,
            turns,
            config: otlp,
            semconv: config.semconv(),
            agent_name: config.agent_name(),
            parent,
            seed: random(),
            native_traces: native_traces(),
            who,
            instance: instance.to_owned(),
            counts: Arc::default(),
        }
    }

    fn exports(&self, signal: Signal) -> bool {
        self.config.exported()[signal as usize]
    }

    /// What the core is to know of it.
    pub(crate) fn trace_settings(&self) -> TraceSettings {
        TraceSettings {
            on: self.exports(Signal::Traces),
            seed: self.seed,
            parent: self.parent,
            semconv: self.semconv,
            agent_name: self.agent_name.clone(),
            native_traces: self.native_traces,
            sampler: self.config.sampler,
            gates: self.gates.clone(),
            turns: self.turns.clone(),
        }
    }

    /// Whether anybody wants log events, a file aside.
    pub(crate) fn wants_events(&self) -> bool {
        self.exports(Signal::Logs)
    }

    /// What the CLI is to find in its environment.
    pub(crate) fn variables(&self) -> Vec<(OsString, OsString)> {
        // What the app gave is in the environment already.
        let ours = if self.parent.is_none() { self.trace_settings().child_context() } else { None };
        ours.map(|context| (TRACEPARENT.into(), context.to_traceparent().into())).into_iter().collect()
    }

    fn options(&self) -> MetricsOptions {
        MetricsOptions {
            temporality: self.config.metrics.temporality,
            exponential: self.config.metrics.histograms == Histograms::Exponential,
            semconv: self.semconv,
            exemplars: self.exports(Signal::Traces),
        }
    }

    /// Has the meters keep what only this way out needs: before anything happens.
    pub(crate) fn prepare(&self, meters: &mut Meters) {
        if self.exports(Signal::Metrics) {
            meters.keep(self.options().detail());
        }
    }

    /// Starts sending.
    pub(crate) fn start(self, handle: &Handle) -> Option<Pipeline> {
        let found = resource::detect(&resource::Surroundings {
            lookup: &variable,
            file: &|path| std::fs::read_to_string(path).ok(),
            pid: std::process::id(),
            instance: &self.instance,
        });
        let mut attributes: Vec<(String, Value)> =
            found.into_iter().map(|(key, value)| (key.clone(), resource::value(&key, value))).collect();
        let labels = self.who.labels();
        attributes.extend(labels.iter().map(|(key, value)| (format!("claude_agent.{key}"), Value::Str(value.clone()))));
        let origin = Origin::new(attributes.iter().map(|(key, value)| (key.as_str(), value)));
        let trace_state = self.parent.and_then(|_| variable(TRACESTATE)).unwrap_or_default();
        let identity = Identity { origin: origin.within(&trace_state), options: self.options(), labels };
        match Pipeline::start(self.config, self.counts, identity, handle.clone()) {
            Ok(pipeline) => pipeline,
            Err(error) => {
                tracing::warn!(%error, "nothing is exported by OTLP");
                handle.visit(|monitor, _| monitor.meters_mut().set(&metric::DEGRADED, &["otlp"], 1.0));
                None
            }
        }
    }
}

/// Hands over the last of it, and says what became of it.
pub(crate) fn end(pipeline: &Pipeline, counts: &Arc<Counts>, handle: &Handle) {
    let Flushed { sent, left_on_disk, lost } = pipeline.end();
    let outcome = if left_on_disk + lost == 0 { "pushed" } else { "timed_out" };
    if left_on_disk > 0 {
        tracing::warn!(
            left_on_disk,
            sent,
            "the collector did not take all in time: the next start with this queue sends the rest"
        );
    }
    if lost > 0 {
        tracing::warn!(lost, sent, "some of the last was refused, or could not be sent and has no disk to wait on: it is lost");
    }
    let counts = Arc::clone(counts);
    // Nobody there: then nobody reads it either.
    visit_blocking(handle, move |monitor, _| {
        counts.fill(monitor.meters_mut());
        monitor.meters_mut().add(&metric::FINAL_FLUSH, &[outcome], 1);
    });
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Whether the CLI was told to export spans of its own.
fn native_traces() -> bool {
    let is_on = |name| variable(name).is_some_and(|value| matches!(value.trim(), "1" | "true" | "yes" | "on"));
    is_on("CLAUDE_CODE_ENABLE_TELEMETRY")
        && is_on("CLAUDE_CODE_ENHANCED_TELEMETRY_BETA")
        && variable("OTEL_TRACES_EXPORTER").is_some_and(|exporters| exporters.split(',').any(|one| one.trim() == "otlp"))
}

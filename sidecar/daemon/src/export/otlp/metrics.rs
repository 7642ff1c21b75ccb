//! The meters as an OTLP message: the numbers that `/metrics` shows, one data point for each of its series.
//!
//! **Names** are those of the Prometheus catalogue, letter for letter, `_total` and unit included. OpenTelemetry would rather have
//! them without, for a translator to add; but whether one does is its user's choice (Prometheus has four ways, the Collector two), and
//! names that are complete come out the same of all of them, so that dashboards and alerts hold for both ways in. Units are chosen to
//! be in the name already (`s`, `By`, `1`), or are annotations in braces, of which no translator makes a suffix.
//!
//! The instruments of the GenAI conventions go by their own names, in scopes of their own.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use agent_sidecar_core::metric::{Cell, Detail, Family, Histogram, Kind, Meters, Metric, Series, Unit, gen_ai};
use agent_sidecar_core::span::Semconv;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::metrics::v1 as proto;
use proto::exponential_histogram_data_point::Buckets;
use proto::{AggregationTemporality, ExponentialHistogramDataPoint, HistogramDataPoint, NumberDataPoint};
use proto::{exemplar, metric::Data, number_data_point};

use super::encode::{Origin, RESOURCE_SCHEMA, nanos, text};

/// Since when a point counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Temporality {
    /// Since the start of the process: a message that is lost loses nothing. What Prometheus takes.
    #[default]
    Cumulative,
    /// Since the message before: for Datadog, Dynatrace, New Relic.
    Delta,
    /// As delta, but for counters whose totals are kept elsewhere, by the kernel for one.
    LowMemory,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Edition {
    V1_36,
    GenAi0_1,
}

impl Edition {
    /// Those that are spoken.
    fn of(semconv: Semconv) -> &'static [Edition] {
        match semconv {
            Semconv::V136 => &[Edition::V1_36],
            Semconv::GenAi01 => &[Edition::GenAi0_1],
            Semconv::Both => &[Edition::V1_36, Edition::GenAi0_1],
        }
    }

    /// Where its names are explained. That of 0.1 is published nowhere.
    fn schema(self) -> &'static str {
        match self {
            Edition::V1_36 => "https://opentelemetry.io/schemas/1.36.0",
            Edition::GenAi0_1 => "",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MetricsOptions {
    pub(crate) temporality: Temporality,
    /// Histograms are exponential, not of the catalogue's buckets.
    pub(crate) exponential: bool,
    pub(crate) semconv: Semconv,
    pub(crate) exemplars: bool,
}

impl MetricsOptions {
    /// What the meters have to keep for it: for [`Meters::keep`], before anything happens.
    pub(crate) fn detail(&self) -> Detail {
        Detail { exponential: self.exponential, exemplars: self.exemplars, gen_ai: true }
    }
}

/// Makes messages of meters. It remembers what it said, if it is to say what came since.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    options: MetricsOptions,
    /// Said on every series of the agent, as in the text exposition.
    constant: Vec<KeyValue>,
    start: Duration,
    /// When it last said anything.
    last: Duration,
    /// What had been said by then, by metric and series; nothing while all is cumulative.
    said: BTreeMap<&'static str, BTreeMap<String, Cell>>,
    /// When totals were first said that had been kept before by others.
    met: BTreeMap<&'static str, Duration>,
}

/// A series, and what is to be said of it.
#[derive(Debug)]
struct Row<'a> {
    series: &'a Series,
    cell: Cow<'a, Cell>,
}

/// The time that points are about.
#[derive(Clone, Copy, Debug)]
struct Window {
    start: Duration,
    end: Duration,
    /// Exemplars from before it have been said.
    fresh: Duration,
    temporality: AggregationTemporality,
}

impl Metrics {
    /// `start` is when the process began to count, since the Unix epoch; `constant` is what the text exposition is told, too.
    pub(crate) fn new(options: MetricsOptions, constant: &[(&'static str, String)], start: Duration) -> Metrics {
        let constant = constant.iter().map(|(key, value)| text(key, value)).collect();
        Metrics { options, constant, start, last: start, said: BTreeMap::new(), met: BTreeMap::new() }
    }

    /// For whom it is counted is known better than before.
    pub(crate) fn works_for(&mut self, labels: &[(&'static str, String)]) {
        self.constant = labels.iter().map(|(key, value)| text(key, value)).collect();
    }

    /// What the meters say now. A delta is said once: a message has to be kept until somebody took it.
    pub(crate) fn request(&mut self, meters: &Meters, origin: &Origin, now: Duration) -> ExportMetricsServiceRequest {
        let now = now.max(self.last);
        let mut scopes = vec![scope(origin, "", meters.families().filter_map(|family| self.ours(family, now)).collect())];
        let foreign: Vec<_> =
            meters.gen_ai().map(|family| (family.metric, self.window(family, now), self.rows(family))).collect();
        for edition in Edition::of(self.options.semconv) {
            let names = NAMES.iter().filter(|name| name.edition == *edition);
            let metrics = names.filter_map(|name| {
                let (metric, window, rows) = foreign.iter().find(|(metric, ..)| std::ptr::eq(*metric, name.of))?;
                let rows = rows.iter().filter(|row| name.only.is_none_or(|only| row.series.values.iter().any(|v| v == only)));
                let data = self.data(metric, rows, *window, |row| name.attributes(&row.series.values, &self.constant))?;
                Some(described(name.name, metric.help, name.unit, data))
            });
            scopes.push(scope(origin, edition.schema(), metrics.collect()));
        }
        scopes.retain(|scope| !scope.metrics.is_empty());
        self.last = now;
        let resource = proto::ResourceMetrics {
            resource: Some(origin.resource.clone()),
            scope_metrics: scopes,
            schema_url: RESOURCE_SCHEMA.to_owned(),
        };
        ExportMetricsServiceRequest { resource_metrics: vec![resource] }
    }

    /// A family of our catalogue.
    fn ours(&mut self, family: &Family, now: Duration) -> Option<proto::Metric> {
        let metric = family.metric;
        let window = self.window(family, now);
        let rows = self.rows(family);
        let constant: &[KeyValue] = if metric.name.starts_with("claude_agent_") { &self.constant } else { &[] };
        let attributes = |row: &Row<'_>| {
            let labels = metric.labels.iter().zip(&row.series.values).map(|(key, value)| text(key, value));
            labels.chain(constant.iter().cloned()).collect()
        };
        let data = self.data(metric, &rows, window, attributes)?;
        Some(described(metric.name, metric.help, unit(metric), data))
    }

    /// Whether what is said of a family is what came since the message before.
    fn is_delta(&self, family: &Family) -> bool {
        let counts = matches!(family.metric.kind, Kind::Counter | Kind::Histogram);
        counts
            && match self.options.temporality {
                Temporality::Cumulative => false,
                Temporality::Delta => true,
                Temporality::LowMemory => !family.raised,
            }
    }

    fn window(&mut self, family: &Family, now: Duration) -> Window {
        let delta = self.is_delta(family);
        // Since when the kernel has counted nobody says. That it is not known is said by a first point that begins when it ends.
        let start = if delta {
            self.last
        } else if family.metric.begins_anywhere() && family.series().next().is_some() {
            *self.met.entry(family.metric.name).or_insert(now)
        } else {
            self.start
        };
        Window {
            start,
            end: now,
            fresh: if self.options.temporality == Temporality::Cumulative { Duration::ZERO } else { self.last },
            temporality: if delta { AggregationTemporality::Delta } else { AggregationTemporality::Cumulative },
        }
    }

    /// What is to be said of each series: all of it, or what came since and is said herewith.
    fn rows<'a>(&mut self, family: &'a Family) -> Vec<Row<'a>> {
        if !self.is_delta(family) {
            return family.series().map(|series| Row { series, cell: Cow::Borrowed(&series.cell) }).collect();
        }
        let said = self.said.entry(family.metric.name).or_default();
        let rows = family.keyed().filter_map(|(key, series)| {
            let before = said.get_mut(key);
            if before.is_none() && family.metric.begins_anywhere() {
                said.insert(key.to_owned(), series.cell.clone());
                return None;
            }
            let cell = since(&series.cell, before.as_deref())?;
            match before {
                Some(before) => before.clone_from(&series.cell),
                None => drop(said.insert(key.to_owned(), series.cell.clone())),
            }
            Some(Row { series, cell: Cow::Owned(cell) })
        });
        rows.collect()
    }

    /// The points of some series of a metric, if there are any.
    fn data<'r, 'a: 'r>(
        &self,
        metric: &Metric,
        rows: impl IntoIterator<Item = &'r Row<'a>>,
        window: Window,
        attributes: impl Fn(&Row<'_>) -> Vec<KeyValue>,
    ) -> Option<Data> {
        let rows: Vec<&Row<'_>> = rows.into_iter().collect();
        if rows.is_empty() {
            return None;
        }
        let histograms =
            || rows.iter().filter_map(|row| if let Cell::Histogram(h) = &*row.cell { Some((*row, h)) } else { None });
        let numbers = || rows.iter().map(|row| number(row, window, attributes(row))).collect();
        let aggregation_temporality = window.temporality.into();
        Some(match metric.kind {
            Kind::Gauge | Kind::Info => Data::Gauge(proto::Gauge { data_points: numbers() }),
            Kind::Counter => Data::Sum(proto::Sum { data_points: numbers(), aggregation_temporality, is_monotonic: true }),
            // One kind for all series: none may have begun without.
            Kind::Histogram if self.options.exponential && histograms().all(|(_, h)| h.exponential.is_some()) => {
                let data_points = histograms().filter_map(|(row, h)| exponential(row, h, window, attributes(row))).collect();
                Data::ExponentialHistogram(proto::ExponentialHistogram { data_points, aggregation_temporality })
            }
            Kind::Histogram => {
                let data_points = histograms().map(|(row, h)| explicit(metric, row, h, window, attributes(row))).collect();
                Data::Histogram(proto::Histogram { data_points, aggregation_temporality })
            }
        })
    }
}

/// What a cell gained since it was `before`; nothing if it gained nothing.
fn since(cell: &Cell, before: Option<&Cell>) -> Option<Cell> {
    let gained = match (cell, before) {
        (Cell::Count(0), None) => return None,
        (Cell::Usd(usd), None) if usd.is_zero() => return None,
        (Cell::Time(Duration::ZERO), None) => return None,
        (Cell::Histogram(h), None) if h.count == 0 => return None,
        (cell, None) => cell.clone(),
        (cell, Some(before)) if cell == before => return None,
        (Cell::Count(now), Some(Cell::Count(before))) => Cell::Count(now.saturating_sub(*before)),
        (Cell::Usd(now), Some(Cell::Usd(before))) => Cell::Usd(now.saturating_sub(*before)),
        (Cell::Time(now), Some(Cell::Time(before))) => Cell::Time(now.saturating_sub(*before)),
        (Cell::Histogram(now), Some(Cell::Histogram(before))) => Cell::Histogram(Histogram {
            counts: now.counts.iter().zip(&before.counts).map(|(now, before)| now.saturating_sub(*before)).collect(),
            count: now.count.saturating_sub(before.count),
            sum: now.sum - before.sum,
            exponential: now
                .exponential
                .as_ref()
                .zip(before.exponential.as_ref())
                .map(|(now, before)| Box::new(now.since(before))),
        }),
        // A series keeps its kind, and gauges are never asked for.
        (cell, Some(_)) => cell.clone(),
    };
    Some(gained)
}

fn number(row: &Row<'_>, window: Window, attributes: Vec<KeyValue>) -> NumberDataPoint {
    let counts = !matches!(*row.cell, Cell::Gauge(_));
    NumberDataPoint {
        attributes,
        // A gauge says what is, not what came since.
        start_time_unix_nano: if counts { nanos(window.start) } else { 0 },
        time_unix_nano: nanos(window.end),
        exemplars: exemplars(row, window),
        flags: 0,
        value: Some(match &*row.cell {
            Cell::Count(n) => number_data_point::Value::AsInt(i64::try_from(*n).unwrap_or(i64::MAX)),
            cell => number_data_point::Value::AsDouble(cell.to_f64()),
        }),
    }
}

fn explicit(metric: &Metric, row: &Row<'_>, h: &Histogram, window: Window, attributes: Vec<KeyValue>) -> HistogramDataPoint {
    HistogramDataPoint {
        attributes,
        start_time_unix_nano: nanos(window.start),
        time_unix_nano: nanos(window.end),
        count: h.count,
        sum: Some(h.sum),
        bucket_counts: h.counts.clone(),
        explicit_bounds: metric.buckets.to_vec(),
        exemplars: exemplars(row, window),
        ..HistogramDataPoint::default()
    }
}

fn exponential(row: &Row<'_>, h: &Histogram, window: Window, attributes: Vec<KeyValue>) -> Option<ExponentialHistogramDataPoint> {
    let buckets = h.exponential.as_ref()?;
    Some(ExponentialHistogramDataPoint {
        attributes,
        start_time_unix_nano: nanos(window.start),
        time_unix_nano: nanos(window.end),
        count: h.count,
        sum: Some(h.sum),
        scale: buckets.scale(),
        zero_count: buckets.zero(),
        positive: Some(Buckets { offset: buckets.offset(), bucket_counts: buckets.counts().to_vec() }),
        exemplars: exemplars(row, window),
        ..ExponentialHistogramDataPoint::default()
    })
}

fn exemplars(row: &Row<'_>, window: Window) -> Vec<proto::Exemplar> {
    let fresh = row.series.exemplars.iter().flatten().filter(|exemplar| exemplar.unix >= window.fresh);
    let whole = matches!(*row.cell, Cell::Count(_));
    fresh
        .map(|exemplar| proto::Exemplar {
            filtered_attributes: Vec::new(),
            time_unix_nano: nanos(exemplar.unix),
            span_id: exemplar.context.span.0.to_vec(),
            trace_id: exemplar.context.trace.0.to_vec(),
            #[expect(clippy::cast_possible_truncation, reason = "what a count rose by was a whole number")]
            value: Some(if whole {
                exemplar::Value::AsInt(exemplar.value as i64)
            } else {
                exemplar::Value::AsDouble(exemplar.value)
            }),
        })
        .collect()
}

/// In UCUM, and such that no translator adds it to the name: the name has it, or it is an annotation.
fn unit(metric: &Metric) -> &'static str {
    let name = metric.name.strip_suffix("_total").unwrap_or(metric.name);
    let said = name.ends_with(metric.unit.as_str());
    match metric.unit {
        // Not `1`: of that a translator makes a ratio.
        Unit::None => "",
        Unit::Usd => "{USD}",
        Unit::Tokens => "{token}",
        Unit::Seconds if said => "s",
        Unit::Seconds => "{second}",
        Unit::Bytes if said => "By",
        Unit::Bytes => "{byte}",
        Unit::Ratio if said && metric.kind == Kind::Gauge => "1",
        Unit::Ratio => "{ratio}",
    }
}

fn described(name: &str, help: &str, unit: &str, data: Data) -> proto::Metric {
    proto::Metric {
        name: name.to_owned(),
        description: help.to_owned(),
        unit: unit.to_owned(),
        metadata: Vec::new(),
        data: Some(data),
    }
}

fn scope(origin: &Origin, schema: &str, metrics: Vec<proto::Metric>) -> proto::ScopeMetrics {
    proto::ScopeMetrics { scope: Some(origin.scope.clone()), metrics, schema_url: schema.to_owned() }
}

/// What an edition of the conventions calls an instrument.
struct Name {
    of: &'static Metric,
    edition: Edition,
    name: &'static str,
    unit: &'static str,
    /// Said on every point.
    always: &'static [(&'static str, &'static str)],
    /// Only the series with this label value, which then is not said: it is in the name.
    only: Option<&'static str>,
}

const CHAT_1_36: &[(&str, &str)] = &[("gen_ai.operation.name", "chat"), ("gen_ai.system", gen_ai::PROVIDER)];
const CHAT: &[(&str, &str)] = &[("gen_ai.operation.name", "chat"), ("gen_ai.provider.name", gen_ai::PROVIDER)];
/// Nobody says what the tokens stand for.
const USAGE: &[(&str, &str)] = &[CHAT[0], CHAT[1], ("gen_ai.token.modality", "unknown")];
const TOOL: &[(&str, &str)] = &[("gen_ai.operation.name", "execute_tool")];
const AGENT: &[(&str, &str)] = &[("gen_ai.operation.name", "invoke_agent")];

#[rustfmt::skip]
static NAMES: &[Name] = &[
    v1_36(&gen_ai::TOKEN_USAGE, "gen_ai.client.token.usage", "{token}"),
    v1_36(&gen_ai::OPERATION_DURATION, "gen_ai.client.operation.duration", "s"),
    v1_36(&gen_ai::TIME_TO_FIRST_CHUNK, "gen_ai.client.operation.time_to_first_chunk", "s"),
    v0_1(&gen_ai::USAGE_INPUT, "gen_ai.client.inference.usage.input_tokens", "{token}", USAGE),
    v0_1(&gen_ai::USAGE_OUTPUT, "gen_ai.client.inference.usage.output_tokens", "{token}", USAGE),
    v0_1(&gen_ai::USAGE_CACHE_READ, "gen_ai.client.inference.usage.cache_read.input_tokens", "{token}", USAGE),
    v0_1(&gen_ai::USAGE_CACHE_WRITE, "gen_ai.client.inference.usage.cache_write.input_tokens", "{token}", USAGE),
    Name { only: Some("input"), ..v0_1(&gen_ai::TOKEN_USAGE, "gen_ai.client.inference.operation.input_tokens", "{token}", CHAT) },
    Name { only: Some("output"), ..v0_1(&gen_ai::TOKEN_USAGE, "gen_ai.client.inference.operation.output_tokens", "{token}", CHAT) },
    v0_1(&gen_ai::OPERATION_DURATION, "gen_ai.client.inference.duration", "s", CHAT),
    v0_1(&gen_ai::TIME_TO_FIRST_CHUNK, "gen_ai.client.inference.time_to_first_chunk", "s", CHAT),
    v0_1(&gen_ai::EXECUTE_TOOL_DURATION, "gen_ai.execute_tool.duration", "s", TOOL),
    v0_1(&gen_ai::INVOKE_AGENT_DURATION, "gen_ai.invoke_agent.duration", "s", AGENT),
    v0_1(&gen_ai::INVOKE_AGENT_INFERENCE_CALLS, "gen_ai.invoke_agent.inference_calls", "{inference_call}", AGENT),
];

const fn v1_36(of: &'static Metric, name: &'static str, unit: &'static str) -> Name {
    Name { of, edition: Edition::V1_36, name, unit, always: CHAT_1_36, only: None }
}

const fn v0_1(of: &'static Metric, name: &'static str, unit: &'static str, always: &'static [(&str, &str)]) -> Name {
    Name { of, edition: Edition::GenAi0_1, name, unit, always, only: None }
}

impl Name {
    fn attributes(&self, values: &[String], constant: &[KeyValue]) -> Vec<KeyValue> {
        let mut all: Vec<KeyValue> = self.always.iter().map(|(key, value)| text(key, value)).collect();
        for (label, value) in self.of.labels.iter().zip(values).filter(|(_, value)| !value.is_empty()) {
            match *label {
                // The CLI asks for the model that answers; whom it asked before a fallback it does not say.
                "model" => all.extend([text("gen_ai.request.model", value), text("gen_ai.response.model", value)]),
                "type" if self.only.is_none() => all.push(text("gen_ai.token.type", value)),
                "type" => {}
                "tool" => all.push(text("gen_ai.tool.name", value)),
                "error_type" => all.push(text("error.type", value)),
                other => debug_assert!(false, "{} has an attribute for {other}", self.name),
            }
        }
        all.extend(constant.iter().cloned());
        all
    }
}

#[cfg(test)]
mod tests;

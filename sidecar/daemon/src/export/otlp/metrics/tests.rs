//! What the message says is what `/metrics` says, after the rules by which Prometheus and the Collector translate it.

use std::collections::{BTreeMap, BTreeSet};

use agent_sidecar_core::metric::{self, CATALOG};
use agent_sidecar_core::telemetry::{Context, SpanId, TraceId};
use agent_sidecar_core::{Exit, Input, Monitor, Now, Settings};
use opentelemetry_proto::tonic::common::v1::any_value;
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::export::prometheus;

const START: Duration = Duration::from_secs(1_795_392_000);
const LABELS: [(&str, &str); 2] = [("tenant", "a \"b\"\\\n"), ("team", "ä")];

fn both() -> MetricsOptions {
    MetricsOptions { semconv: Semconv::Both, ..MetricsOptions::default() }
}

fn labels() -> Vec<(&'static str, String)> {
    LABELS.map(|(key, value)| (key, value.to_owned())).to_vec()
}

fn origin() -> Origin {
    Origin::new([])
}

fn sent(metrics: &mut Metrics, meters: &Meters, now: Duration) -> ExportMetricsServiceRequest {
    let request = metrics.request(meters, &origin(), now);
    let decoded = ExportMetricsServiceRequest::decode(&*request.encode_to_vec()).unwrap();
    assert_eq!(decoded, request, "nothing is lost on the wire");
    decoded
}

fn once(meters: &Meters, options: MetricsOptions) -> ExportMetricsServiceRequest {
    sent(&mut Metrics::new(options, &labels(), START), meters, START + Duration::from_secs(60))
}

fn all(request: &ExportMetricsServiceRequest) -> impl Iterator<Item = &proto::Metric> {
    request.resource_metrics.iter().flat_map(|resource| &resource.scope_metrics).flat_map(|scope| &scope.metrics)
}

fn find<'a>(request: &'a ExportMetricsServiceRequest, name: &str) -> &'a Data {
    let found: Vec<_> = all(request).filter(|metric| metric.name == name).collect();
    assert_eq!(found.len(), 1, "{name}");
    found[0].data.as_ref().unwrap()
}

fn said(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let said: BTreeMap<_, _> = attributes
        .iter()
        .map(|one| match one.value.clone().and_then(|value| value.value) {
            Some(any_value::Value::StringValue(value)) => (one.key.clone(), value),
            other => panic!("{}: {other:?}", one.key),
        })
        .collect();
    assert_eq!(said.len(), attributes.len(), "no key twice");
    said
}

/// How a Prometheus with `--web.enable-otlp-receiver` is configured to name things: its `translation_strategy`. The Collector's
/// exporters know the first two.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Naming {
    UnderscoreEscapingWithSuffixes,
    UnderscoreEscapingWithoutSuffixes,
    NoUtf8EscapingWithSuffixes,
    NoTranslation,
}
use Naming::*;

/// The rules of prometheus/otlptranslator, for units without a `/`.
fn translated(metric: &proto::Metric, strategy: Naming) -> String {
    let (counter, gauge) = match metric.data.as_ref().unwrap() {
        Data::Sum(sum) => (sum.is_monotonic, false),
        Data::Gauge(_) => (false, true),
        _ => (false, false),
    };
    assert!(!metric.unit.contains('/'));
    let unit = match metric.unit.as_str() {
        unit if unit.contains(['{', '}']) => "",
        "s" => "seconds",
        "By" => "bytes",
        "1" => "",
        other => other,
    };
    let ratio = gauge && metric.unit == "1";
    match strategy {
        NoTranslation => metric.name.clone(),
        UnderscoreEscapingWithoutSuffixes => metric.name.replace(|c: char| !c.is_ascii_alphanumeric() && c != ':', "_"),
        UnderscoreEscapingWithSuffixes => {
            let mut parts: Vec<&str> =
                metric.name.split(|c: char| !c.is_ascii_alphanumeric() && c != ':').filter(|part| !part.is_empty()).collect();
            if !unit.is_empty() && !parts.contains(&unit) {
                parts.push(unit);
            }
            for (applies, suffix) in [(counter, "total"), (ratio, "ratio")] {
                if applies {
                    parts.retain(|part| *part != suffix);
                    parts.push(suffix);
                }
            }
            parts.join("_")
        }
        NoUtf8EscapingWithSuffixes => {
            let mut name = metric.name.clone();
            let suffixes = [(ratio, "_ratio"), (counter, "_total")].map(|(applies, suffix)| if applies { suffix } else { "" });
            for suffix in suffixes {
                name = name.strip_suffix(suffix).unwrap_or(&name).to_owned();
            }
            if !unit.is_empty() && !name.ends_with(unit) {
                name = format!("{name}_{unit}");
            }
            format!("{name}{}{}", suffixes[1], suffixes[0])
        }
    }
}

/// A series' name with its labels, sorted.
type Named = (String, BTreeMap<String, String>);

/// What Prometheus stores of a message.
fn stored(request: &ExportMetricsServiceRequest, strategy: Naming, ours: bool) -> BTreeMap<Named, f64> {
    let mut stored = BTreeMap::new();
    for metric in all(request).filter(|metric| metric.name.starts_with("gen_ai.") != ours) {
        let name = translated(metric, strategy);
        let mut put = |suffix: &str, mut labels: BTreeMap<String, String>, le: Option<String>, value: f64| {
            labels.extend(le.map(|le| (String::from("le"), le)));
            assert_eq!(stored.insert((format!("{name}{suffix}"), labels), value), None, "{name}{suffix} is there once");
        };
        match metric.data.as_ref().unwrap() {
            Data::Gauge(proto::Gauge { data_points }) | Data::Sum(proto::Sum { data_points, .. }) => {
                for point in data_points {
                    put("", said(&point.attributes), None, value(point));
                }
            }
            Data::Histogram(histogram) => {
                for point in &histogram.data_points {
                    let labels = said(&point.attributes);
                    assert_eq!(point.bucket_counts.len(), point.explicit_bounds.len() + 1);
                    let bounds = point.explicit_bounds.iter().map(f64::to_string).chain([String::from("+Inf")]);
                    let mut below = 0;
                    for (le, count) in bounds.zip(&point.bucket_counts) {
                        below += count;
                        put("_bucket", labels.clone(), Some(le), below as f64);
                    }
                    put("_count", labels.clone(), None, point.count as f64);
                    put("_sum", labels, None, point.sum.unwrap());
                }
            }
            Data::ExponentialHistogram(histogram) => {
                for point in &histogram.data_points {
                    let positive: u64 = point.positive.as_ref().unwrap().bucket_counts.iter().sum();
                    assert_eq!(positive + point.zero_count, point.count);
                    put("_count", said(&point.attributes), None, point.count as f64);
                    put("_sum", said(&point.attributes), None, point.sum.unwrap());
                }
            }
            Data::Summary(_) => panic!("{name}"),
        }
    }
    stored
}

fn value(point: &NumberDataPoint) -> f64 {
    match point.value.unwrap() {
        number_data_point::Value::AsDouble(x) => x,
        number_data_point::Value::AsInt(n) => n as f64,
    }
}

/// What Prometheus stores of the text exposition.
fn scraped(meters: &Meters) -> BTreeMap<Named, f64> {
    let text = prometheus::text(meters, &labels());
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let series: Vec<(Named, f64)> = lines
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, rest) = series.split_once('{').unwrap_or((series, ""));
            let mut labels = BTreeMap::new();
            let mut rest = rest;
            while let Some((key, quoted)) = rest.split_once("=\"") {
                let mut value = String::new();
                let mut chars = quoted.char_indices();
                let end = loop {
                    match chars.next().unwrap() {
                        (end, '"') => break end,
                        (_, '\\') => value.push(match chars.next().unwrap().1 {
                            'n' => '\n',
                            escaped => escaped,
                        }),
                        (_, c) => value.push(c),
                    }
                };
                labels.insert(key.trim_start_matches(',').to_owned(), value);
                rest = &quoted[end + 1..];
            }
            ((name.to_owned(), labels), value.parse().unwrap())
        })
        .collect();
    let n = series.len();
    let series: BTreeMap<_, _> = series.into_iter().collect();
    assert_eq!(series.len(), n, "no series twice");
    series
}

fn assert_same(left: &BTreeMap<Named, f64>, right: &BTreeMap<Named, f64>) {
    for (named, value) in left {
        assert_eq!(right.get(named), Some(value), "{named:?}");
    }
    for named in right.keys() {
        assert!(left.contains_key(named), "{named:?}");
    }
}

fn agree(meters: &Meters) {
    let scraped = scraped(meters);
    for strategy in [UnderscoreEscapingWithSuffixes, UnderscoreEscapingWithoutSuffixes, NoUtf8EscapingWithSuffixes, NoTranslation]
    {
        assert_same(&stored(&once(meters, both()), strategy, true), &scraped);
    }
    let exponential = MetricsOptions { exponential: true, ..both() };
    let without: BTreeMap<_, _> = scraped.into_iter().filter(|((name, _), _)| !name.ends_with("_bucket")).collect();
    let buckets = |((name, _), _): &(Named, f64)| !name.ends_with("_bucket");
    let stored: BTreeMap<_, _> =
        stored(&once(meters, exponential), NoTranslation, true).into_iter().filter(|one| buckets(one)).collect();
    assert_same(&stored, &without);
}

/// A recorded session, in which time passes.
fn replayed(path: &std::path::Path, options: MetricsOptions) -> Monitor {
    let step = Duration::from_millis(37);
    let mut now = Now { mono: Duration::ZERO, unix: START };
    let mut monitor = Monitor::new(Settings::default(), true, now);
    monitor.meters_mut().keep(options.detail());
    monitor.handle(now, Input::Spawned { pid: 1 });
    for chunk in std::fs::read(path).unwrap().chunks(700) {
        now = Now { mono: now.mono + step, unix: now.unix + step };
        monitor.handle(now, Input::Stdout(chunk));
        while monitor.poll_output().is_some() {}
    }
    monitor.handle(now, Input::StdoutEnd);
    monitor.handle(now, Input::Exited(Exit::Code(0)));
    monitor
}

fn recordings() -> Vec<std::path::PathBuf> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../core/tests/data");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let recordings: Vec<_> = files.filter(|path| path.extension().is_some_and(|end| end == "jsonl")).collect();
    assert!(recordings.len() > 50);
    recordings
}

fn sum(data: &Data, which: impl Fn(&BTreeMap<String, String>) -> bool) -> f64 {
    match data {
        Data::Sum(sum) => sum.data_points.iter().filter(|point| which(&said(&point.attributes))).map(value).sum(),
        Data::Histogram(h) => h.data_points.iter().filter(|point| which(&said(&point.attributes))).map(|p| p.sum.unwrap()).sum(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_recorded_session_is_exported_as_it_is_scraped_and_sums_to_the_ledger() {
    for path in recordings() {
        let monitor = replayed(&path, both());
        agree(monitor.meters());
        agree(replayed(&path, MetricsOptions { exponential: true, ..both() }).meters());

        let request = once(monitor.meters(), both());
        let totals = monitor.report().totals();
        let name = path.display();
        let (tokens, cost) =
            (find_or_none(&request, "claude_agent_tokens_total"), find_or_none(&request, "claude_agent_cost_usd_total"));
        let (Some(tokens), Some(cost)) = (tokens, cost) else {
            assert_eq!((totals.tokens.total(), totals.cost_usd.pico()), (0, 0), "{name}");
            continue;
        };
        for (kind, n) in agent_sidecar_core::tokens::TOKEN_KINDS.iter().zip(totals.tokens.by_kind()) {
            assert_eq!(sum(tokens, |said| said["type"] == *kind), n as f64, "{name} {kind}");
        }
        assert!((sum(cost, |_| true) - totals.cost_usd.to_f64()).abs() < 1e-12, "{name}");
        // By both editions of the conventions, and input is all that was sent.
        let is =
            |kind: &'static str| move |said: &BTreeMap<String, String>| said.get("gen_ai.token.type").is_none_or(|t| t == kind);
        let (prompt, output, tokens) = (totals.tokens.prompt(), totals.tokens.output, &totals.tokens);
        for (metric, kind, n) in [
            ("gen_ai.client.token.usage", "input", prompt),
            ("gen_ai.client.token.usage", "output", output),
            ("gen_ai.client.inference.operation.input_tokens", "", prompt),
            ("gen_ai.client.inference.operation.output_tokens", "", output),
            ("gen_ai.client.inference.usage.input_tokens", "", prompt),
            ("gen_ai.client.inference.usage.output_tokens", "", output),
            ("gen_ai.client.inference.usage.cache_read.input_tokens", "", tokens.cache_read),
            ("gen_ai.client.inference.usage.cache_write.input_tokens", "", tokens.cache_write_5m + tokens.cache_write_1h),
        ] {
            // A histogram of nothing is not there.
            let found = find_or_none(&request, metric).map_or(0.0, |data| sum(data, is(kind)));
            assert_eq!(found, n as f64, "{name} {metric} {kind}");
        }
    }
}

/// How many observations all series of a metric have, and their sum.
fn observed(request: &ExportMetricsServiceRequest, name: &str) -> (u64, f64) {
    match find_or_none(request, name) {
        Some(Data::Histogram(h)) => {
            (h.data_points.iter().map(|p| p.count).sum(), h.data_points.iter().map(|p| p.sum.unwrap()).sum())
        }
        None => (0, 0.0),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_others_call_by_another_name_is_what_we_measured() {
    let same = [
        ("claude_agent_request_duration_seconds", "gen_ai.client.operation.duration"),
        ("claude_agent_request_duration_seconds", "gen_ai.client.inference.duration"),
        ("claude_agent_time_to_first_token_seconds", "gen_ai.client.operation.time_to_first_chunk"),
        ("claude_agent_time_to_first_token_seconds", "gen_ai.client.inference.time_to_first_chunk"),
        ("claude_agent_tool_duration_seconds", "gen_ai.execute_tool.duration"),
        ("claude_agent_turn_duration_seconds", "gen_ai.invoke_agent.duration"),
        ("claude_agent_turn_model_requests", "gen_ai.invoke_agent.inference_calls"),
    ];
    let mut seen = [0; 7];
    for path in recordings() {
        let request = once(replayed(&path, both()).meters(), both());
        for ((ours, theirs), seen) in same.iter().zip(&mut seen) {
            let (a, b) = (observed(&request, ours), observed(&request, theirs));
            assert_eq!(a.0, b.0, "{theirs} in {}", path.display());
            assert!((a.1 - b.1).abs() < 1e-9, "{theirs} in {}: {a:?} {b:?}", path.display());
            *seen += b.0;
        }
    }
    assert!(seen.iter().all(|n| *n > 0), "each is in some recording: {seen:?}");
}

fn find_or_none<'a>(request: &'a ExportMetricsServiceRequest, name: &str) -> Option<&'a Data> {
    all(request).find(|metric| metric.name == name).and_then(|metric| metric.data.as_ref())
}

/// Something that moves a metric of the catalogue.
#[derive(Clone, Debug)]
struct Move {
    metric: usize,
    values: [String; 4],
    amount: f64,
    raise: bool,
}

impl Move {
    fn perform(&self, meters: &mut Meters) {
        let of_ours: Vec<&'static Metric> = CATALOG.iter().chain(gen_ai::CATALOG).copied().collect();
        let metric = of_ours[self.metric % of_ours.len()];
        let values: Vec<&str> = self.values.iter().map(String::as_str).take(metric.labels.len()).collect();
        let pico = agent_sidecar_core::tokens::Usd::from_f64(self.amount);
        match (metric.kind, metric.unit) {
            (Kind::Counter, Unit::Usd) => meters.add_usd(metric, &values, pico),
            (Kind::Counter, _) if self.raise => meters.raise(metric, &values, self.amount),
            (Kind::Counter, Unit::Seconds) => meters.add_time(metric, &values, Duration::from_secs_f64(self.amount)),
            (Kind::Counter, _) => meters.add(metric, &values, self.amount as u64),
            (Kind::Gauge | Kind::Info, _) => meters.set(metric, &values, self.amount),
            (Kind::Histogram, _) => meters.observe(metric, &values, self.amount),
        }
    }
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let label = prop_oneof!["[a-c]", "[a-c\"\\\\\n{}=, é]{0,6}"];
    let amount = prop_oneof![0.0..2.0, 0.0..1e7, (0..1_000_u32).prop_map(f64::from)];
    let one = (any::<usize>(), [label.clone(), label.clone(), label.clone(), label], amount, any::<bool>());
    prop::collection::vec(one.prop_map(|(metric, values, amount, raise)| Move { metric, values, amount, raise }), 0..200)
}

fn kept(options: MetricsOptions) -> Meters {
    let mut meters = Meters::default();
    meters.keep(options.detail());
    meters
}

/// Adds the points of a delta to what was added up before.
fn accumulate(sums: &mut BTreeMap<Named, f64>, request: &ExportMetricsServiceRequest, which: fn(&str) -> bool) {
    for ((name, labels), value) in stored(request, NoTranslation, true).into_iter().chain(stored(request, NoTranslation, false)) {
        let series = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
        if which(series) {
            *sums.entry((name, labels)).or_default() += value;
        }
    }
}

fn is_counter(name: &str) -> bool {
    CATALOG.iter().all(|metric| metric.name != name || matches!(metric.kind, Kind::Counter | Kind::Histogram))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_meters_are_exported_as_they_are_scraped(moves in moves(), exponential: bool) {
        let mut meters = kept(MetricsOptions { exponential, ..both() });
        moves.iter().for_each(|one| one.perform(&mut meters));
        agree(&meters);
    }

    #[test]
    fn deltas_add_up_to_the_totals(rounds in prop::collection::vec(moves(), 1..4)) {
        let options = MetricsOptions { temporality: Temporality::Delta, ..both() };
        let mut meters = kept(options);
        let mut delta = Metrics::new(options, &labels(), START);
        let mut sums = BTreeMap::new();
        let mut now = START;
        for moves in rounds {
            moves.iter().for_each(|one| one.perform(&mut meters));
            let start = now;
            now += Duration::from_secs(60);
            let request = sent(&mut delta, &meters, now);
            for data in all(&request).filter_map(|metric| metric.data.as_ref()) {
                if let Data::Sum(sum) = data {
                    prop_assert_eq!(sum.aggregation_temporality, AggregationTemporality::Delta as i32);
                    for point in &sum.data_points {
                        prop_assert_eq!((point.start_time_unix_nano, point.time_unix_nano), (nanos(start), nanos(now)));
                    }
                }
            }
            accumulate(&mut sums, &request, is_counter);
        }
        let mut totals = BTreeMap::new();
        accumulate(&mut totals, &once(&meters, both()), is_counter);
        // What the kernel had counted before came in no message.
        let ours = |(name, _): &Named| CATALOG.iter().all(|metric| metric.name != name || !metric.begins_anywhere());
        totals.retain(|named, _| ours(named));
        sums.retain(|named, _| ours(named));
        // What never moved was never said.
        totals.retain(|(name, labels), value| *value != 0.0 || sums.contains_key(&(name.clone(), labels.clone())));
        prop_assert_eq!(totals.keys().collect::<Vec<_>>(), sums.keys().collect::<Vec<_>>());
        for (named, total) in totals {
            prop_assert!((sums[&named] - total).abs() <= total.abs() * 1e-9, "{:?}: {} {}", named, sums[&named], total);
        }
        // Nothing happened: nothing but gauges is said.
        let quiet = sent(&mut delta, &meters, now + Duration::from_secs(60));
        prop_assert!(all(&quiet).all(|metric| matches!(metric.data, Some(Data::Gauge(_)))));
    }

    #[test]
    fn exponential_deltas_add_up_too(a in prop::collection::vec(0.0..1e6, 1..50), b in prop::collection::vec(1e-6..1e3, 1..50)) {
        let options = MetricsOptions { temporality: Temporality::Delta, exponential: true, ..both() };
        let mut meters = kept(options);
        let mut delta = Metrics::new(options, &[], START);
        for (values, at) in [(&a, 1), (&b, 2)] {
            values.iter().for_each(|value| meters.observe(&metric::STARTUP, &[], *value));
            let request = sent(&mut delta, &meters, START + Duration::from_secs(at));
            let Data::ExponentialHistogram(h) = find(&request, "claude_agent_startup_seconds") else { panic!("not exponential") };
            let point = &h.data_points[0];
            let counted: u64 = point.positive.as_ref().unwrap().bucket_counts.iter().sum();
            prop_assert_eq!(point.count as usize, values.len());
            prop_assert_eq!(counted + point.zero_count, point.count);
            prop_assert!(point.positive.as_ref().unwrap().bucket_counts.len() <= 160);
        }
    }
}

#[test]
fn low_memory_leaves_what_others_total_as_it_is() {
    let options = MetricsOptions { temporality: Temporality::LowMemory, ..both() };
    let mut meters = kept(options);
    meters.raise(&metric::SIDECAR_CPU, &[], 2.5);
    meters.add(&metric::PROCESS_STARTS, &[], 1);
    let mut metrics = Metrics::new(options, &[], START);
    sent(&mut metrics, &meters, START + Duration::from_secs(1));
    meters.add(&metric::PROCESS_STARTS, &[], 2);
    let request = sent(&mut metrics, &meters, START + Duration::from_secs(2));
    let point = |name: &str| match find(&request, name) {
        Data::Sum(sum) => (sum.aggregation_temporality, sum.data_points[0].start_time_unix_nano, value(&sum.data_points[0])),
        other => panic!("{other:?}"),
    };
    let (delta, cumulative) = (AggregationTemporality::Delta as i32, AggregationTemporality::Cumulative as i32);
    assert_eq!(point("agent_sidecar_cpu_seconds_total"), (cumulative, nanos(START), 2.5));
    assert_eq!(point("claude_agent_process_starts_total"), (delta, nanos(START + Duration::from_secs(1)), 2.0));
}

#[test]
fn what_the_kernel_had_counted_before_is_no_growth() {
    for (temporality, said) in [
        (Temporality::Cumulative, [Some((1, 1, 5_000.0)), Some((1, 2, 5_002.0))]),
        (Temporality::LowMemory, [Some((1, 1, 5_000.0)), Some((1, 2, 5_002.0))]),
        (Temporality::Delta, [None, Some((1, 2, 2.0))]),
    ] {
        let options = MetricsOptions { temporality, ..both() };
        let (mut meters, mut metrics) = (kept(options), Metrics::new(options, &[], START));
        for (at, total, expected) in [(1, 5_000.0, said[0]), (2, 5_002.0, said[1])] {
            meters.raise(&metric::CONTAINER_CPU, &[], total);
            let request = sent(&mut metrics, &meters, START + Duration::from_secs(at));
            let found = all(&request).find(|metric| metric.name == "claude_agent_container_cpu_seconds_total");
            let point = found.map(|metric| match &metric.data {
                Some(Data::Sum(sum)) => {
                    let point = &sum.data_points[0];
                    (point.start_time_unix_nano, point.time_unix_nano, value(point))
                }
                other => panic!("{other:?}"),
            });
            let at = |seconds| nanos(START + Duration::from_secs(seconds));
            assert_eq!(point, expected.map(|(from, to, value)| (at(from), at(to), value)), "{temporality:?}");
        }
    }
}

#[test]
fn a_clock_that_was_set_back_makes_no_point_that_ends_before_it_starts() {
    let options = MetricsOptions { temporality: Temporality::Delta, ..both() };
    let mut meters = kept(options);
    let mut metrics = Metrics::new(options, &[], START);
    for now in [START + Duration::from_secs(60), START - Duration::from_secs(3_600)] {
        meters.add(&metric::PROCESS_STARTS, &[], 1);
        let request = sent(&mut metrics, &meters, now);
        let Data::Sum(sum) = find(&request, "claude_agent_process_starts_total") else { panic!("no sum") };
        assert!(sum.data_points[0].start_time_unix_nano <= sum.data_points[0].time_unix_nano);
    }
}

#[test]
fn an_exemplar_says_which_trace_it_is_of_and_is_said_once_where_deltas_are() {
    let context = Context { trace: TraceId([1; 16]), span: SpanId([2; 8]), sampled: true };
    for (temporality, again) in [(Temporality::Cumulative, 1), (Temporality::Delta, 0)] {
        let options = MetricsOptions { temporality, exemplars: true, ..both() };
        let mut meters = kept(options);
        let mut metrics = Metrics::new(options, &[], START);
        meters.set_context(Some(context));
        meters.set_time(START + Duration::from_secs(1));
        meters.observe(&metric::TURN_COST, &[], 0.02);
        meters.add(&metric::TOKENS, &["m", "input", "main"], 7);
        meters.add_usd(&metric::COST, &["m", "main"], agent_sidecar_core::tokens::Usd::from_f64(0.5));
        let request = sent(&mut metrics, &meters, START + Duration::from_secs(2));
        let exemplars = |request: &ExportMetricsServiceRequest, name: &str| match find(request, name) {
            Data::Histogram(h) => h.data_points[0].exemplars.clone(),
            Data::Sum(sum) => sum.data_points[0].exemplars.clone(),
            other => panic!("{other:?}"),
        };
        let expected = |value| {
            vec![proto::Exemplar {
                filtered_attributes: Vec::new(),
                time_unix_nano: nanos(START + Duration::from_secs(1)),
                trace_id: vec![1; 16],
                span_id: vec![2; 8],
                value: Some(value),
            }]
        };
        assert_eq!(exemplars(&request, "claude_agent_turn_cost_usd"), expected(exemplar::Value::AsDouble(0.02)));
        assert_eq!(exemplars(&request, "claude_agent_tokens_total"), expected(exemplar::Value::AsInt(7)));
        assert_eq!(exemplars(&request, "claude_agent_cost_usd_total"), expected(exemplar::Value::AsDouble(0.5)));
        meters.set_context(None);
        meters.observe(&metric::TURN_COST, &[], 0.02);
        let request = sent(&mut metrics, &meters, START + Duration::from_secs(3));
        assert_eq!(exemplars(&request, "claude_agent_turn_cost_usd").len(), again, "{temporality:?}");
    }
}

#[test]
fn each_edition_of_the_conventions_is_spoken_as_it_is_written() {
    let mut meters = kept(both());
    meters.observe(&gen_ai::TOKEN_USAGE, &["claude-sonnet-5", "input"], 100.0);
    meters.observe(&gen_ai::TOKEN_USAGE, &["claude-sonnet-5", "output"], 10.0);
    meters.add(&gen_ai::USAGE_INPUT, &["claude-sonnet-5"], 100);
    meters.observe(&gen_ai::OPERATION_DURATION, &["claude-sonnet-5"], 1.0);
    meters.observe(&gen_ai::TIME_TO_FIRST_CHUNK, &["claude-sonnet-5"], 0.5);
    meters.observe(&gen_ai::EXECUTE_TOOL_DURATION, &["Bash", ""], 0.5);
    meters.observe(&gen_ai::EXECUTE_TOOL_DURATION, &["Bash", "denied"], 0.5);
    meters.observe(&gen_ai::INVOKE_AGENT_DURATION, &["crashed"], 0.5);
    meters.observe(&gen_ai::INVOKE_AGENT_INFERENCE_CALLS, &[], 3.0);
    let lines = |semconv| {
        let request =
            sent(&mut Metrics::new(MetricsOptions { semconv, ..both() }, &[("team", "t".into())], START), &meters, START);
        let mut lines = Vec::new();
        for metric in all(&request).filter(|metric| metric.name.starts_with("gen_ai.")) {
            let attributes: Vec<_> = match metric.data.as_ref().unwrap() {
                Data::Histogram(h) => h.data_points.iter().map(|point| said(&point.attributes)).collect(),
                Data::Sum(sum) => sum.data_points.iter().map(|point| said(&point.attributes)).collect(),
                other => panic!("{other:?}"),
            };
            for said in attributes {
                let said: Vec<String> =
                    said.iter().map(|(key, value)| format!("{}={value}", key.trim_start_matches("gen_ai."))).collect();
                lines.push(format!("{} {} {}", metric.name.trim_start_matches("gen_ai."), metric.unit, said.join(" ")));
            }
        }
        lines
    };
    let old = [
        "client.token.usage {token} operation.name=chat request.model=claude-sonnet-5 response.model=claude-sonnet-5 system=anthropic token.type=input team=t",
        "client.token.usage {token} operation.name=chat request.model=claude-sonnet-5 response.model=claude-sonnet-5 system=anthropic token.type=output team=t",
        "client.operation.duration s operation.name=chat request.model=claude-sonnet-5 response.model=claude-sonnet-5 system=anthropic team=t",
        "client.operation.time_to_first_chunk s operation.name=chat request.model=claude-sonnet-5 response.model=claude-sonnet-5 system=anthropic team=t",
    ];
    let new = [
        "client.inference.usage.input_tokens {token} operation.name=chat provider.name=anthropic request.model=claude-sonnet-5 response.model=claude-sonnet-5 token.modality=unknown team=t",
        "client.inference.operation.input_tokens {token} operation.name=chat provider.name=anthropic request.model=claude-sonnet-5 response.model=claude-sonnet-5 team=t",
        "client.inference.operation.output_tokens {token} operation.name=chat provider.name=anthropic request.model=claude-sonnet-5 response.model=claude-sonnet-5 team=t",
        "client.inference.duration s operation.name=chat provider.name=anthropic request.model=claude-sonnet-5 response.model=claude-sonnet-5 team=t",
        "client.inference.time_to_first_chunk s operation.name=chat provider.name=anthropic request.model=claude-sonnet-5 response.model=claude-sonnet-5 team=t",
        "execute_tool.duration s operation.name=execute_tool tool.name=Bash team=t",
        "execute_tool.duration s error.type=denied operation.name=execute_tool tool.name=Bash team=t",
        "invoke_agent.duration s error.type=crashed operation.name=invoke_agent team=t",
        "invoke_agent.inference_calls {inference_call} operation.name=invoke_agent team=t",
    ];
    assert_eq!(lines(Semconv::V136), old);
    assert_eq!(lines(Semconv::GenAi01), new);
    assert_eq!(lines(Semconv::Both), [&old[..], &new[..]].concat());
}

#[test]
fn every_metric_has_a_name_and_every_translator_leaves_it_alone() {
    for metric in CATALOG {
        let data = match metric.kind {
            Kind::Counter => Data::Sum(proto::Sum { is_monotonic: true, ..proto::Sum::default() }),
            Kind::Gauge | Kind::Info => Data::Gauge(proto::Gauge::default()),
            Kind::Histogram => Data::Histogram(proto::Histogram::default()),
        };
        let said = described(metric.name, metric.help, unit(metric), data);
        for strategy in
            [UnderscoreEscapingWithSuffixes, UnderscoreEscapingWithoutSuffixes, NoUtf8EscapingWithSuffixes, NoTranslation]
        {
            assert_eq!(translated(&said, strategy), metric.name, "{strategy:?} with unit {}", said.unit);
        }
    }
    for metric in gen_ai::CATALOG {
        assert!(NAMES.iter().any(|name| std::ptr::eq(name.of, *metric)), "{} is said by nobody", metric.name);
    }
}

#[test]
fn a_full_container_is_said_whole() {
    let mut meters = kept(MetricsOptions { exponential: true, ..both() });
    for i in 0.. {
        let (model, tool) = (format!("claude-model-{}", i % 8), format!("Tool{}", i % 24));
        meters.add(&metric::TOOL_CALLS, &[&tool, ["ok", "error", "denied", "lost"][i % 4]], 1);
        meters.observe(&metric::REQUEST_DURATION, &[&model], i as f64 / 7.0);
        meters.observe(&metric::TIME_TO_FIRST_TOKEN, &[&model], 1.0);
        meters.observe(&gen_ai::OPERATION_DURATION, &[&model], i as f64 / 7.0);
        meters.add(&metric::ENFORCEMENTS, &[&format!("limit{i}"), "turn", "warn", "shadow"], 1);
        if meters.get(&metric::SERIES_LIMIT_HITS, &[metric::ENFORCEMENTS.name]).is_some() {
            break;
        }
    }
    let origin = origin();
    for temporality in [Temporality::Cumulative, Temporality::Delta] {
        let mut metrics = Metrics::new(MetricsOptions { temporality, ..both() }, &labels(), START);
        for i in 1..=2 {
            meters.add(&metric::PROCESS_STARTS, &[], 1);
            let bytes = metrics.request(&meters, &origin, START + Duration::from_secs(i)).encode_to_vec();
            // The second of a delta has what changed alone.
            assert_eq!(
                bytes.len() > 50_000,
                i == 1 || temporality == Temporality::Cumulative,
                "{temporality:?} {i}: {}",
                bytes.len()
            );
        }
    }
}

#[test]
fn whom_it_is_counted_for_may_be_learnt_late() {
    let mut meters = Meters::default();
    meters.add(&metric::TURNS, &["success"], 1);
    let mut metrics = Metrics::new(MetricsOptions::default(), &[], START);
    let whose = |request: &ExportMetricsServiceRequest| -> BTreeSet<Option<String>> {
        let Data::Sum(sum) = find(request, "claude_agent_turns_total") else { panic!("a counter") };
        sum.data_points.iter().map(|point| said(&point.attributes).remove("tenant")).collect()
    };
    assert_eq!(whose(&sent(&mut metrics, &meters, START + Duration::from_secs(60))), BTreeSet::from([None]));
    metrics.works_for(&[("tenant", String::from("acme"))]);
    let known = sent(&mut metrics, &meters, START + Duration::from_secs(120));
    assert_eq!(whose(&known), BTreeSet::from([Some(String::from("acme"))]));
}

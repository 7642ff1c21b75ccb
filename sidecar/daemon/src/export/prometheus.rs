//! The text exposition: the catalogue's families as the `prometheus` crate writes them.

use agent_sidecar_core::metric::{Cell, Family, Kind, Meters};
use prometheus::proto;
use prometheus::{Encoder, TextEncoder};

/// What the format is called over HTTP.
pub(crate) const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// All series that exist, in the catalogue's order. `labels` are constant: every series of the agent says them.
pub(crate) fn text(meters: &Meters, labels: &[(&'static str, String)]) -> String {
    write(meters.families().map(|one| family(one, labels)))
}

fn write(families: impl Iterator<Item = proto::MetricFamily>) -> String {
    let families: Vec<proto::MetricFamily> = families.filter(|family| !family.get_metric().is_empty()).collect();
    let mut text = Vec::with_capacity(64 * 1024);
    TextEncoder::new()
        .encode(&families, &mut text)
        .expect("writing to memory does not fail, and families without series are left out");
    String::from_utf8(text).expect("labels and help are text")
}

/// What a hub exposes: the agents' series by the labels of those they work for, and the sidecars' own. All of it under the labels of
/// whose it is, where several users' are served.
pub(crate) struct Exposed {
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) groups: Vec<(Vec<(String, String)>, Meters)>,
    pub(crate) house: Meters,
}

pub(crate) fn hub_text(all: &[Exposed]) -> String {
    let Some(first) = all.first() else { return String::new() };
    write(first.house.families().enumerate().map(|(i, own)| {
        let mut whole = family::<String>(own, &[]);
        let agents = own.metric.name.starts_with("claude_agent_");
        let of = |one: &Exposed| -> Vec<proto::Metric> {
            let labelled = |meters: &Meters, more: &[(String, String)]| {
                let labels: Vec<(String, String)> = more.iter().chain(&one.labels).cloned().collect();
                meters.families().nth(i).map(|found| with(found, &labels)).unwrap_or_default()
            };
            if agents {
                one.groups.iter().flat_map(|(labels, meters)| labelled(meters, labels)).collect()
            } else {
                labelled(&one.house, &[])
            }
        };
        whole.set_metric(all.iter().flat_map(of).collect());
        whole
    }))
}

/// A family's series, with these labels.
fn with(found: &Family, labels: &[(String, String)]) -> Vec<proto::Metric> {
    let mut series = family::<String>(found, &[]).take_metric();
    for one in &mut series {
        let more = labels.iter().map(|(name, value)| {
            let mut label = proto::LabelPair::default();
            label.set_name(name.clone());
            label.set_value(value.clone());
            label
        });
        let mut all = one.take_label();
        all.extend(more);
        one.set_label(all);
    }
    series
}

fn family<L: AsRef<str>>(family: &Family, constant: &[(L, String)]) -> proto::MetricFamily {
    let metric = family.metric;
    let constant = if metric.name.starts_with("claude_agent_") { constant } else { &[] };
    let mut out = proto::MetricFamily::default();
    out.set_name(metric.name.to_owned());
    out.set_help(metric.help.to_owned());
    out.set_field_type(match metric.kind {
        Kind::Counter => proto::MetricType::COUNTER,
        Kind::Gauge | Kind::Info => proto::MetricType::GAUGE,
        Kind::Histogram => proto::MetricType::HISTOGRAM,
    });
    let series = family.series().map(|series| {
        let mut one = proto::Metric::default();
        let constant = constant.iter().map(|(name, value)| (name.as_ref(), value));
        let labels = metric.labels.iter().copied().zip(&series.values).chain(constant).map(|(name, value)| {
            let mut label = proto::LabelPair::default();
            label.set_name(name.to_owned());
            label.set_value(value.clone());
            label
        });
        one.set_label(labels.collect());
        match &series.cell {
            Cell::Histogram(observed) => {
                let mut histogram = proto::Histogram::default();
                let mut below = 0;
                let buckets = metric.buckets.iter().zip(&observed.counts).map(|(bound, count)| {
                    below += count;
                    let mut bucket = proto::Bucket::default();
                    bucket.set_upper_bound(*bound);
                    bucket.set_cumulative_count(below);
                    bucket
                });
                histogram.set_bucket(buckets.collect());
                histogram.set_sample_count(observed.count);
                histogram.set_sample_sum(observed.sum);
                one.set_histogram(histogram);
            }
            cell if metric.kind == Kind::Counter => {
                let mut counter = proto::Counter::default();
                counter.set_value(cell.to_f64());
                one.set_counter(counter);
            }
            cell => {
                let mut gauge = proto::Gauge::default();
                gauge.set_value(cell.to_f64());
                one.set_gauge(gauge);
            }
        }
        one
    });
    out.set_metric(series.collect());
    out
}

#[cfg(test)]
mod tests {
    use agent_sidecar_core::metric;

    use super::*;

    #[test]
    fn an_exposition_says_what_the_cells_hold() {
        let mut meters = Meters::default();
        meters.add(&metric::TOKENS, &["a\"b\\c", "input", "main"], 3);
        meters.observe(&metric::TURN_COST, &[], 0.02);
        let text = text(&meters, &[("tenant", String::from("a \"b\""))]);
        for line in [
            r#"claude_agent_tokens_total{model="a\"b\\c",source="main",type="input",tenant="a \"b\""} 3"#,
            r#"claude_agent_turn_cost_usd_bucket{le="0.01",tenant="a \"b\""} 0"#,
            r#"claude_agent_turn_cost_usd_bucket{le="0.05",tenant="a \"b\""} 1"#,
            r#"claude_agent_turn_cost_usd_bucket{le="+Inf",tenant="a \"b\""} 1"#,
            r#"claude_agent_turn_cost_usd_sum{tenant="a \"b\""} 0.02"#,
            "agent_sidecar_lost_bytes_total 0",
            "# TYPE claude_agent_turns_total counter",
        ] {
            let sorted = |line: &str| {
                let mut parts: Vec<String> = line.split(['{', '}', ',']).map(str::to_owned).collect();
                parts.sort();
                parts
            };
            assert!(text.lines().any(|written| sorted(written) == sorted(line)), "{line}\n{text}");
        }
    }

    #[test]
    fn a_full_container_is_written_whole() {
        let mut meters = Meters::default();
        for i in 0.. {
            let (model, tool) = (format!("claude-model-{}", i % 8), format!("Tool{}", i % 24));
            meters.add(&metric::TOOL_CALLS, &[&tool, ["ok", "error", "denied", "lost"][i % 4]], 1);
            meters.observe(&metric::REQUEST_DURATION, &[&model], 1.0);
            meters.observe(&metric::TIME_TO_FIRST_TOKEN, &[&model], 1.0);
            meters.add(&metric::ENFORCEMENTS, &[&format!("limit{i}"), "turn", "warn", "shadow"], 1);
            if meters.get(&metric::SERIES_LIMIT_HITS, &[metric::ENFORCEMENTS.name]).is_some() {
                break;
            }
        }
        assert!(text(&meters, &[]).lines().count() > 1_500);
    }
}

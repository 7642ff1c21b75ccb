//! The instruments of OpenTelemetry's GenAI conventions, for backends that know these and nothing of us. They say over again, in
//! names that belong to others, what our own catalogue says; so they are kept only for an exporter that asks for them, and no
//! Prometheus series is made of them.
//!
//! Which name an instrument goes by, and with which attributes, is the exporter's to choose: the conventions renamed most of them.
//! The names here are those of 1.36, where it has one. A label that is empty does not apply.

use super::*;

/// The company that is asked: `gen_ai.provider.name`.
pub const PROVIDER: &str = "anthropic";

/// As recommended.
const TOKENS_USED: &[f64] = &[
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1_024.0,
    4_096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];

/// As recommended, up to 81.92 seconds, and then on for as long as agents and their tools take: three hours.
const DURATION: &[f64] = &[
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68, 655.36, 1_310.72,
    2_621.44, 5_242.88, 10_485.76,
];

/// As many as the conventions recommend for counts of calls: none; so ours.
const CALLS: &[f64] = DEPTH;

#[rustfmt::skip]
catalog! { after super::CATALOG_LEN;
    TOKEN_USAGE = histogram("gen_ai.client.token.usage", Unit::Tokens, &["model", "type"], TOKENS_USED, "Number of input and output tokens used.");
    USAGE_INPUT = counter("gen_ai.client.inference.usage.input_tokens", Unit::Tokens, &["model"], "Input tokens used, including cached tokens.");
    USAGE_OUTPUT = counter("gen_ai.client.inference.usage.output_tokens", Unit::Tokens, &["model"], "Output tokens used, including reasoning tokens.");
    USAGE_CACHE_READ = counter("gen_ai.client.inference.usage.cache_read.input_tokens", Unit::Tokens, &["model"], "Input tokens served from the provider's cache.");
    USAGE_CACHE_WRITE = counter("gen_ai.client.inference.usage.cache_write.input_tokens", Unit::Tokens, &["model"], "Input tokens written to the provider's cache.");
    OPERATION_DURATION = histogram("gen_ai.client.operation.duration", Unit::Seconds, &["model"], DURATION, "GenAI operation duration.");
    TIME_TO_FIRST_CHUNK = histogram("gen_ai.client.operation.time_to_first_chunk", Unit::Seconds, &["model"], DURATION, "Time to receive the first chunk.");
    EXECUTE_TOOL_DURATION = histogram("gen_ai.execute_tool.duration", Unit::Seconds, &["tool", "error_type"], DURATION, "Duration of a tool execution.");
    INVOKE_AGENT_DURATION = histogram("gen_ai.invoke_agent.duration", Unit::Seconds, &["error_type"], DURATION, "Duration of an agent invocation.");
    INVOKE_AGENT_INFERENCE_CALLS = histogram("gen_ai.invoke_agent.inference_calls", Unit::None, &[], CALLS, "Inference calls of an agent invocation.");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{SpanId, TraceId};

    fn kept(detail: Detail) -> Meters {
        let mut meters = Meters::default();
        meters.keep(detail);
        meters
    }

    #[test]
    fn the_two_catalogues_share_the_rules_and_no_name() {
        for (i, metric) in CATALOG.iter().enumerate() {
            assert_eq!(metric.index, super::super::CATALOG.len() + i, "{} knows its place", metric.name);
            assert!(metric.name.starts_with("gen_ai."), "{}", metric.name);
            assert_eq!(!metric.buckets.is_empty(), metric.kind == Kind::Histogram, "{}", metric.name);
            assert!(metric.buckets.windows(2).all(|pair| pair[0] < pair[1]), "{}", metric.name);
        }
    }

    #[test]
    fn what_nobody_asked_for_is_not_kept() {
        let mut meters = Meters::default();
        let before = meters.series_count();
        meters.observe(&OPERATION_DURATION, &["m"], 1.0);
        assert_eq!((meters.gen_ai().count(), meters.get(&OPERATION_DURATION, &["m"])), (0, None));
        let mut meters = kept(Detail { gen_ai: true, ..Detail::default() });
        meters.observe(&OPERATION_DURATION, &["m"], 1.0);
        assert_eq!(meters.gen_ai().flat_map(Family::series).count(), 1);
        assert_eq!(meters.families().filter(|family| family.metric.name.starts_with("gen_ai")).count(), 0);
        assert_eq!(meters.series_count(), before, "ours keep their room");
    }

    #[test]
    fn others_have_a_bound_of_their_own() {
        let mut meters = Meters::new(300);
        meters.keep(Detail { gen_ai: true, ..Detail::default() });
        let before = meters.series_count();
        for i in 0..50 {
            meters.observe(&INVOKE_AGENT_DURATION, &[&format!("error{i}")], 1.0);
        }
        let room = 300 / weight(&INVOKE_AGENT_DURATION);
        assert_eq!(meters.gen_ai().flat_map(Family::series).count(), room);
        assert_eq!(meters.get(&SERIES_LIMIT_HITS, &[INVOKE_AGENT_DURATION.name]), Some(&Cell::Count(50 - room as u64)));
        assert_eq!(meters.series_count(), before + 1);
    }

    #[test]
    fn exponential_buckets_count_what_the_plain_ones_count_from_the_first_on() {
        let mut meters = Meters::default();
        meters.observe(&STARTUP, &[], 1.0);
        meters.keep(Detail { exponential: true, ..Detail::default() });
        for value in [0.0, 0.5, 2.0, f64::NAN, f64::INFINITY] {
            meters.observe(&STARTUP, &[], value);
            meters.observe(&TURN_COST, &[], value);
            meters.observe(&REQUEST_DURATION, &["m"], value);
        }
        for (metric, values) in [(&TURN_COST, &[][..]), (&REQUEST_DURATION, &["m"])] {
            let Some(Cell::Histogram(h)) = meters.get(metric, values) else { panic!("{}", metric.name) };
            let exponential = h.exponential.as_ref().expect("it was asked for");
            assert_eq!((h.count, h.sum), (3, 2.5));
            assert_eq!(exponential.zero() + exponential.counts().iter().sum::<u64>(), h.count);
        }
        let Some(Cell::Histogram(h)) = meters.get(&STARTUP, &[]) else { panic!("it starts at zero") };
        assert_eq!((h.count, h.exponential.is_none()), (4, true), "it had begun without");
    }

    #[test]
    fn an_exemplar_is_the_last_of_its_bucket_and_only_of_a_trace_that_is_kept() {
        let context = |n: u8, sampled| Some(Context { trace: TraceId([n; 16]), span: SpanId([n; 8]), sampled });
        let mut meters = kept(Detail { exemplars: true, ..Detail::default() });
        let series = |meters: &Meters, metric| meters.family(metric).unwrap().series().next().unwrap().exemplars.clone();
        meters.observe(&TURN_COST, &[], 0.02);
        meters.set_context(context(1, false));
        meters.observe(&TURN_COST, &[], 0.02);
        assert!(series(&meters, &TURN_COST).is_empty());
        for (n, value) in [(2, 0.02), (3, 0.03), (4, 1_000.0)] {
            meters.set_context(context(n, true));
            meters.set_time(Duration::from_secs(n.into()));
            meters.observe(&TURN_COST, &[], value);
        }
        let found: Vec<_> = series(&meters, &TURN_COST).into_iter().flatten().collect();
        let expected = |n: u8, value| Exemplar { value, unix: Duration::from_secs(n.into()), context: context(n, true).unwrap() };
        assert_eq!(found, [expected(3, 0.03), expected(4, 1_000.0)]);
        assert_eq!(series(&meters, &TURN_COST).len(), TURN_COST.buckets.len() + 1);

        meters.add(&TOKENS, &["m", "input", "main"], 7);
        meters.add(&TOKENS, &["m", "input", "main"], 0);
        meters.add_usd(&COST, &["m", "main"], Usd::from_pico(500_000_000_000));
        meters.add(&PROCESS_STARTS, &[], 1);
        assert_eq!(series(&meters, &TOKENS), [Some(expected(4, 7.0))]);
        assert_eq!(series(&meters, &COST), [Some(expected(4, 0.5))]);
        assert!(series(&meters, &PROCESS_STARTS).is_empty());
    }
}

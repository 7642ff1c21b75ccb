//! What a backend reads is what was said.

use std::collections::BTreeSet;

use agent_sidecar_core::telemetry::{Attributes, SpanEvent, Status as Outcome};
use proptest::prelude::*;
use prost::Message;

use super::*;

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<String>().prop_map(Value::Str),
        any::<i64>().prop_map(Value::Int),
        any::<f64>().prop_filter("comparable", |x| !x.is_nan()).prop_map(Value::Float),
        any::<bool>().prop_map(Value::Bool),
        prop::collection::vec(any::<String>(), 0..3).prop_map(Value::List),
    ]
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let key = prop::sample::select(vec!["gen_ai.request.model", "gen_ai.tool.name", "error.type", "claude_agent.slot", "é"]);
    prop::collection::vec((key, value()), 0..6)
}

/// Sometimes of nothing but zeros.
fn context() -> impl Strategy<Value = Context> {
    let trace = prop_oneof![4 => any::<[u8; 16]>(), 1 => Just([0; 16])];
    let span = prop_oneof![4 => any::<[u8; 8]>(), 1 => Just([0; 8])];
    (trace, span, any::<bool>()).prop_map(|(trace, span, sampled)| Context { trace: TraceId(trace), span: SpanId(span), sampled })
}

fn time() -> impl Strategy<Value = Duration> {
    (0..u64::MAX).prop_map(Duration::from_nanos)
}

prop_compose! {
    fn a_span()(
        context in context(),
        parent in prop::option::of(any::<[u8; 8]>().prop_map(SpanId)),
        name in any::<String>(),
        client in any::<bool>(),
        (start, end) in (time(), time()),
        attributes in attributes(),
        events in prop::collection::vec(
            (time(), attributes()).prop_map(|(time, attributes)| SpanEvent { time, name: "retry", attributes }), 0..3),
        links in prop::collection::vec(
            (context(), attributes()).prop_map(|(to, attributes)| telemetry::Link { to, attributes }), 0..3),
        status in prop_oneof![Just(Outcome::Unset), "[a-z_]{1,9}".prop_map(Outcome::Error)],
    ) -> telemetry::Span {
        let kind = if client { SpanKind::Client } else { SpanKind::Internal };
        telemetry::Span { context, parent, name, kind, start, end, attributes, events, links, status }
    }
}

prop_compose! {
    fn a_log()(
        time in time(),
        severity in prop::sample::select(vec![Severity::Info, Severity::Warn, Severity::Error]),
        sequence in any::<u64>(),
        context in prop::option::of(context()),
        attributes in attributes(),
    ) -> LogEvent {
        LogEvent { time, name: "turn.ended", severity, sequence, context, attributes }
    }
}

/// What was said, read back: the last of what was said twice.
fn assert_said(encoded: &[KeyValue], said: &Attributes) {
    let keys: BTreeSet<&str> = encoded.iter().map(|one| one.key.as_str()).collect();
    assert_eq!(keys.len(), encoded.len(), "no key twice");
    assert_eq!(keys, said.iter().map(|(key, _)| *key).collect());
    for one in encoded {
        let expected = &said.iter().rfind(|(key, _)| *key == one.key).unwrap().1;
        let found = match one.value.clone().unwrap().value.unwrap() {
            any_value::Value::StringValue(text) => Value::Str(text),
            any_value::Value::IntValue(n) => Value::Int(n),
            any_value::Value::DoubleValue(x) => Value::Float(x),
            any_value::Value::BoolValue(yes) => Value::Bool(yes),
            any_value::Value::ArrayValue(all) => Value::List(
                all.values
                    .into_iter()
                    .map(|one| match one.value {
                        Some(any_value::Value::StringValue(text)) => text,
                        other => panic!("{other:?}"),
                    })
                    .collect(),
            ),
            other => panic!("{other:?}"),
        };
        assert_eq!(&found, expected, "{}", one.key);
    }
}

fn decoded<M: Message + Default + PartialEq + std::fmt::Debug>(message: &M) -> M {
    let decoded = M::decode(&*message.encode_to_vec()).unwrap();
    assert_eq!(&decoded, message);
    decoded
}

proptest! {
    #[test]
    fn a_span_is_read_back_as_it_was(given in prop::collection::vec(a_span(), 0..4)) {
        let name = Value::Str(String::from("agent"));
        let request = decoded(&spans(&given, &Origin::new([("service.name", &name)])));
        let [resource] = &request.resource_spans[..] else { panic!("one resource") };
        prop_assert_eq!(&resource.resource.as_ref().unwrap().attributes, &vec![text("service.name", "agent")]);
        let [scope] = &resource.scope_spans[..] else { panic!("one scope") };
        prop_assert_eq!(&scope.scope.as_ref().unwrap().name, "agent-sidecar");
        let kept: Vec<_> = given.iter().filter(|span| span.context.sampled && is_valid(&span.context)).collect();
        prop_assert_eq!(scope.spans.len(), kept.len());
        for (span, given) in scope.spans.iter().zip(kept) {
            prop_assert_eq!((&span.trace_id[..], &span.span_id[..]), (&given.context.trace.0[..], &given.context.span.0[..]));
            prop_assert!(span.trace_id.iter().any(|byte| *byte != 0) && span.span_id.iter().any(|byte| *byte != 0));
            prop_assert!(span.parent_span_id.is_empty() || span.parent_span_id == given.parent.unwrap().0);
            prop_assert_eq!(span.flags, SAMPLED);
            prop_assert_eq!(&span.name, &given.name);
            prop_assert_eq!(span.kind == span::SpanKind::Client as i32, given.kind == SpanKind::Client);
            prop_assert_eq!(Duration::from_nanos(span.start_time_unix_nano), given.start);
            prop_assert_eq!(Duration::from_nanos(span.end_time_unix_nano), given.end.max(given.start));
            assert_said(&span.attributes, &given.attributes);
            prop_assert_eq!(span.events.len(), given.events.len());
            for (event, given) in span.events.iter().zip(&given.events) {
                prop_assert_eq!((Duration::from_nanos(event.time_unix_nano), event.name.as_str()), (given.time, given.name));
                assert_said(&event.attributes, &given.attributes);
            }
            prop_assert_eq!(span.links.len() + span.dropped_links_count as usize, given.links.len());
            for (link, given) in span.links.iter().zip(given.links.iter().filter(|link| is_valid(&link.to))) {
                prop_assert_eq!((&link.trace_id[..], &link.span_id[..]), (&given.to.trace.0[..], &given.to.span.0[..]));
                prop_assert_eq!(link.flags, u32::from(given.to.sampled));
                assert_said(&link.attributes, &given.attributes);
            }
            let status = span.status.as_ref().map(|status| (status.code(), status.message.as_str()));
            prop_assert_eq!(status, match &given.status {
                Outcome::Unset => None,
                Outcome::Error(what) => Some((StatusCode::Error, what.as_str())),
            });
        }
    }

    #[test]
    fn an_event_is_read_back_as_it_was(given in prop::collection::vec(a_log(), 0..4)) {
        let request = decoded(&logs(&given, &Origin::new([])));
        let records = &request.resource_logs[0].scope_logs[0].log_records;
        prop_assert_eq!(records.len(), given.len());
        for (record, given) in records.iter().zip(&given) {
            prop_assert_eq!(Duration::from_nanos(record.time_unix_nano), given.time);
            prop_assert_eq!(record.observed_time_unix_nano, record.time_unix_nano);
            prop_assert_eq!(record.event_name.as_str(), given.name);
            let severity = (record.severity_number(), record.severity_text.as_str());
            prop_assert_eq!(severity, match given.severity {
                Severity::Info => (SeverityNumber::Info, "INFO"),
                Severity::Warn => (SeverityNumber::Warn, "WARN"),
                Severity::Error => (SeverityNumber::Error, "ERROR"),
            });
            // Either a whole context or none.
            let context = given.context.filter(is_valid);
            prop_assert_eq!(&record.trace_id[..], context.as_ref().map_or(&[][..], |context| &context.trace.0));
            prop_assert_eq!(&record.span_id[..], context.as_ref().map_or(&[][..], |context| &context.span.0));
            prop_assert_eq!(record.flags, context.map_or(0, |context| u32::from(context.sampled)));
            let sequence = Value::Int(i64::try_from(given.sequence).unwrap_or(i64::MAX));
            let mut said = given.attributes.clone();
            said.push((SEQUENCE, sequence));
            assert_said(&record.attributes, &said);
        }
    }
}

#[test]
fn a_resource_says_each_key_once_and_the_last_word_holds() {
    let (a, b) = (Value::Str(String::from("a")), Value::Str(String::from("b")));
    let origin = Origin::new([("service.name", &a), ("host.name", &a), ("service.name", &b)]);
    assert_eq!(origin.resource.attributes, [text("service.name", "b"), text("host.name", "a")]);
}

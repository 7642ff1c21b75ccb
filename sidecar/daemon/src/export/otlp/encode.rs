//! Spans and events as OTLP messages. Nothing is sent here, and nothing is left to chance: the same data makes the same bytes.

use std::time::Duration;

use agent_sidecar_core::telemetry::{self, Context, LogEvent, Severity, SpanId, SpanKind, TraceId, Value};
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, ArrayValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::logs::v1::{LogRecord, ResourceLogs, ScopeLogs, SeverityNumber};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::{self, Event, Link};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span, Status};

/// The version of the conventions that the resource's attributes (`service.*`, `host.*`, `k8s.*`, ...) follow.
pub(crate) const RESOURCE_SCHEMA: &str = "https://opentelemetry.io/schemas/1.45.0";

/// The bit of a `traceparent` that says that a trace is kept.
const SAMPLED: u32 = 1;

/// Who speaks: the same in every message.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Origin {
    pub(super) resource: Resource,
    pub(super) scope: InstrumentationScope,
    /// What came with the app's own span, and belongs to its whole trace.
    trace_state: String,
}

impl Origin {
    /// `attributes` describe the process and where it runs; a key that is said again replaces what it said before.
    pub(crate) fn new<'a>(attributes: impl IntoIterator<Item = (&'a str, &'a Value)>) -> Origin {
        let scope = InstrumentationScope {
            name: env!("CARGO_PKG_NAME").to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..InstrumentationScope::default()
        };
        Origin {
            resource: Resource { attributes: key_values(attributes), ..Resource::default() },
            scope,
            trace_state: String::new(),
        }
    }
}

impl Origin {
    /// Of a trace that the app began: all spans here are of that one then. What is none by the looks of it is left out.
    pub(crate) fn within(mut self, trace_state: &str) -> Origin {
        let is_one = trace_state.len() <= 512 && trace_state.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        self.trace_state = if is_one { trace_state.trim().to_owned() } else { String::new() };
        self
    }
}

/// The spans of one batch, without those that are of no trace or of one that is not kept. No schema is named for their attributes:
/// those of the GenAI conventions are in development, and may be of two versions at once.
pub(crate) fn spans(spans: &[telemetry::Span], origin: &Origin) -> ExportTraceServiceRequest {
    let kept = spans.iter().filter(|span| span.context.sampled && is_valid(&span.context));
    let scope_spans = ScopeSpans {
        scope: Some(origin.scope.clone()),
        spans: kept.map(|one| span(one, origin)).collect(),
        schema_url: String::new(),
    };
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(origin.resource.clone()),
            scope_spans: vec![scope_spans],
            schema_url: RESOURCE_SCHEMA.to_owned(),
        }],
    }
}

/// The events of one batch.
pub(crate) fn logs(events: &[LogEvent], origin: &Origin) -> ExportLogsServiceRequest {
    let scope_logs = ScopeLogs {
        scope: Some(origin.scope.clone()),
        log_records: events.iter().map(log_record).collect(),
        schema_url: String::new(),
    };
    ExportLogsServiceRequest {
        resource_logs: vec![ResourceLogs {
            resource: Some(origin.resource.clone()),
            scope_logs: vec![scope_logs],
            schema_url: RESOURCE_SCHEMA.to_owned(),
        }],
    }
}

fn span(span: &telemetry::Span, origin: &Origin) -> Span {
    let links: Vec<Link> = span.links.iter().filter(|link| is_valid(&link.to)).map(link).collect();
    Span {
        trace_id: span.context.trace.0.to_vec(),
        span_id: span.context.span.0.to_vec(),
        parent_span_id: span.parent.filter(|id| *id != SpanId([0; 8])).map_or_else(Vec::new, |id| id.0.to_vec()),
        trace_state: origin.trace_state.clone(),
        // Whether the parent is remote is not known here, and then neither bit about it may be set.
        flags: flags(&span.context),
        name: span.name.clone(),
        kind: match span.kind {
            SpanKind::Internal => span::SpanKind::Internal,
            SpanKind::Client => span::SpanKind::Client,
        }
        .into(),
        start_time_unix_nano: nanos(span.start),
        // The wall clock may have been set back in between.
        end_time_unix_nano: nanos(span.end.max(span.start)),
        attributes: attributes(&span.attributes),
        dropped_attributes_count: 0,
        events: span.events.iter().map(event).collect(),
        dropped_events_count: 0,
        dropped_links_count: u32::try_from(span.links.len() - links.len()).unwrap_or(u32::MAX),
        links,
        status: match &span.status {
            telemetry::Status::Unset => None,
            telemetry::Status::Error(what) => Some(Status { code: StatusCode::Error.into(), message: what.clone() }),
        },
    }
}

fn event(event: &telemetry::SpanEvent) -> Event {
    Event {
        time_unix_nano: nanos(event.time),
        name: event.name.to_owned(),
        attributes: attributes(&event.attributes),
        dropped_attributes_count: 0,
    }
}

fn link(link: &telemetry::Link) -> Link {
    Link {
        trace_id: link.to.trace.0.to_vec(),
        span_id: link.to.span.0.to_vec(),
        trace_state: String::new(),
        attributes: attributes(&link.attributes),
        dropped_attributes_count: 0,
        flags: flags(&link.to),
    }
}

fn log_record(event: &LogEvent) -> LogRecord {
    let (number, text) = match event.severity {
        Severity::Info => (SeverityNumber::Info, "INFO"),
        Severity::Warn => (SeverityNumber::Warn, "WARN"),
        Severity::Error => (SeverityNumber::Error, "ERROR"),
    };
    let context = event.context.filter(is_valid);
    let sequence = Value::Int(i64::try_from(event.sequence).unwrap_or(i64::MAX));
    let said = event.attributes.iter().map(|(key, value)| (*key, value));
    LogRecord {
        time_unix_nano: nanos(event.time),
        // Who observed it is who made it.
        observed_time_unix_nano: nanos(event.time),
        severity_number: number.into(),
        severity_text: text.to_owned(),
        // For backends that show nothing but the body.
        body: Some(worded(&Value::Str(event.name.to_owned()))),
        attributes: key_values(said.chain([(SEQUENCE, &sequence)])),
        dropped_attributes_count: 0,
        flags: context.as_ref().map_or(0, flags),
        trace_id: context.map_or_else(Vec::new, |context| context.trace.0.to_vec()),
        span_id: context.map_or_else(Vec::new, |context| context.span.0.to_vec()),
        event_name: event.name.to_owned(),
    }
}

/// The attribute that says [`LogEvent::sequence`]: a gap in it is an event that was lost.
pub(crate) const SEQUENCE: &str = "claude_agent.sequence";

/// Ids of nothing but zeros name nothing.
fn is_valid(context: &Context) -> bool {
    context.trace != TraceId([0; 16]) && context.span != SpanId([0; 8])
}

fn flags(context: &Context) -> u32 {
    if context.sampled { SAMPLED } else { 0 }
}

/// Good until the year 2554.
pub(super) fn nanos(unix: Duration) -> u64 {
    u64::try_from(unix.as_nanos()).unwrap_or(u64::MAX)
}

fn attributes(attributes: &telemetry::Attributes) -> Vec<KeyValue> {
    key_values(attributes.iter().map(|(key, value)| (*key, value)))
}

fn key_values<'a>(attributes: impl IntoIterator<Item = (&'a str, &'a Value)>) -> Vec<KeyValue> {
    let mut all: Vec<KeyValue> = Vec::new();
    for (key, value) in attributes {
        let value = Some(worded(value));
        // No key twice: what a backend makes of that is anybody's guess.
        match all.iter_mut().find(|before| before.key == key) {
            Some(before) => before.value = value,
            None => all.push(KeyValue { key: key.to_owned(), value, ..KeyValue::default() }),
        }
    }
    all
}

fn worded(value: &Value) -> AnyValue {
    let text = |text: &String| any_value::Value::StringValue(text.clone());
    let value = match value {
        Value::Str(one) => text(one),
        Value::Int(n) => any_value::Value::IntValue(*n),
        Value::Float(x) => any_value::Value::DoubleValue(*x),
        Value::Bool(yes) => any_value::Value::BoolValue(*yes),
        Value::List(all) => any_value::Value::ArrayValue(ArrayValue {
            values: all.iter().map(|one| AnyValue { value: Some(text(one)) }).collect(),
        }),
    };
    AnyValue { value: Some(value) }
}

/// An attribute that is a text.
pub(super) fn text(key: &str, value: &str) -> KeyValue {
    let value = AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) };
    KeyValue { key: key.to_owned(), value: Some(value), ..KeyValue::default() }
}

#[cfg(test)]
mod tests;

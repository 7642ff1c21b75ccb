//! What sessions go through, as traces over OTLP: a trace for each session, a span for each phase that it has left, and below it what was done there. Off
//! unless somebody says where to.
//!
//! Names of traces and spans are made of the session's, so that all fleets that drive it, one after the other, write the same trace; and what its container
//! is given as `TRACEPARENT` is the session's span, so that its agents' turns are below that. Nothing waits for any of it: what finds no room is dropped.

use std::sync::Arc;
use std::time::Duration;

use agent_sidecar_core::telemetry::{Context, SpanId, TraceId};
use jiff::Timestamp;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span, Status};
use prost::Message;
use tokio::sync::{mpsc, watch};

use crate::lifecycle::Phase;
use crate::metric::{Metrics, SPANS};
use crate::plan::{Action, Outcome};
use crate::session::Session;

/// What waits to be sent: a thousand sessions that are created at once have fewer in the second until that.
const WAITING: usize = 8_192;
const BATCH: usize = 512;
const EVERY: Duration = Duration::from_secs(1);
/// For a batch, twice: what a collector does not take then is lost.
const WITHIN: Duration = Duration::from_secs(10);
const TRIES: u32 = 2;
pub const VARIABLE: &str = "TRACEPARENT";

/// Where spans go.
#[derive(Debug)]
pub struct Traces {
    fleet: String,
    spans: mpsc::Sender<Span>,
    metrics: Arc<Metrics>,
}

/// Sends what [`Traces`] is told, until that is gone.
pub struct Sender {
    client: reqwest::Client,
    url: String,
    fleet: String,
    spans: mpsc::Receiver<Span>,
    metrics: Arc<Metrics>,
}

/// To `endpoint`, as OTLP over HTTP has it.
pub fn to(endpoint: &str, fleet: &str, client: reqwest::Client, metrics: &Arc<Metrics>) -> (Traces, Sender) {
    let (sender, spans) = mpsc::channel(WAITING);
    let url = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
    let traces = Traces { fleet: fleet.to_owned(), spans: sender, metrics: Arc::clone(metrics) };
    (traces, Sender { client, url, fleet: fleet.to_owned(), spans, metrics: Arc::clone(metrics) })
}

impl Traces {
    /// The session's own span, and the trace that it begins.
    pub fn context(&self, session: &Session) -> Context {
        let bytes = digest(&[&self.fleet, session.id.as_str(), &session.created.as_nanosecond().to_string()]);
        let trace = TraceId(std::array::from_fn(|n| bytes[n]));
        Context { trace, span: SpanId(std::array::from_fn(|n| bytes[16 + n])), sampled: true }
    }

    /// It has left a phase, and perhaps come to its end.
    pub fn entered(&self, before: &Session, after: &Session) {
        let context = self.context(after);
        let mut span = span(context.trace, phase(context, before), before.phase.as_str(), before.since, after.since);
        span.parent_span_id = context.span.0.to_vec();
        span.attributes = attributes(after);
        span.attributes.push(text("agent_fleet.phase.next", after.phase.as_str()));
        self.tell(span);
        if after.phase.is_last() {
            let mut session = self::span(context.trace, context.span, "session", after.created, after.since);
            session.attributes = attributes(after);
            if after.phase == Phase::Failed {
                session.status = Some(wrong("failed"));
            }
            self.tell(session);
        }
    }

    /// Something was done for it, in the phase that it was in.
    pub fn done(&self, session: &Session, action: &Action, outcome: &Outcome, began: Timestamp, end: Timestamp) {
        let passing = matches!(action, Action::Look | Action::Ask | Action::KeepAlive(_));
        // What is asked every few seconds for as long as it lives is told where it goes wrong.
        if passing && !matches!(outcome, Outcome::Failed(_)) {
            return;
        }
        let context = self.context(session);
        let parent = phase(context, session);
        let own = digest(&[&parent.to_string(), action.name(), &began.as_nanosecond().to_string()]);
        let mut span = span(context.trace, SpanId(std::array::from_fn(|n| own[n])), action.name(), began, end);
        span.parent_span_id = parent.0.to_vec();
        span.kind = SpanKind::Client.into();
        span.attributes = vec![text("agent_fleet.provider", &session.provider), text("agent_fleet.outcome", outcome.name())];
        if matches!(outcome, Outcome::Failed(_) | Outcome::Vetoed(_)) {
            span.status = Some(wrong(outcome.name()));
        }
        self.tell(span);
    }

    fn tell(&self, span: Span) {
        if self.spans.try_send(span).is_err() {
            self.metrics.add(&SPANS, &["dropped"], 1.0);
        }
    }
}

impl Sender {
    /// Until there is nobody to tell of anything, or it ends: what waits then is sent.
    pub async fn run(mut self, mut ended: watch::Receiver<bool>) {
        let mut batch = Vec::new();
        loop {
            let got = tokio::select! {
                got = self.spans.recv_many(&mut batch, BATCH) => got,
                _ = ended.wait_for(|ended| *ended) => 0,
            };
            if got == 0 {
                break;
            }
            // What comes soon goes with it.
            tokio::time::sleep(EVERY).await;
            while batch.len() < BATCH
                && let Ok(span) = self.spans.try_recv()
            {
                batch.push(span);
            }
            self.send(std::mem::take(&mut batch)).await;
        }
        while let Ok(span) = self.spans.try_recv() {
            batch.push(span);
        }
        if !batch.is_empty() {
            self.send(batch).await;
        }
    }

    async fn send(&self, spans: Vec<Span>) {
        let count = spans.len() as f64;
        let scope = InstrumentationScope {
            name: String::from("agent-fleet"),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        };
        let attributes = vec![text("service.name", "agent-fleet"), text("service.namespace", &self.fleet)];
        let resource_spans = vec![ResourceSpans {
            resource: Some(Resource { attributes, ..Resource::default() }),
            scope_spans: vec![ScopeSpans { scope: Some(scope), spans, ..ScopeSpans::default() }],
            ..ResourceSpans::default()
        }];
        let body = ExportTraceServiceRequest { resource_spans }.encode_to_vec();
        for n in 1..=TRIES {
            let request =
                self.client.post(&self.url).header("content-type", "application/x-protobuf").timeout(WITHIN).body(body.clone());
            let why = match request.send().await.map(|answer| answer.status()) {
                Ok(status) if status.is_success() => return self.metrics.add(&SPANS, &["sent"], count),
                Ok(status) => status.to_string(),
                Err(error) => error.without_url().to_string(),
            };
            if n == TRIES {
                tracing::warn!(spans = count, why, "spans are lost");
            }
        }
        self.metrics.add(&SPANS, &["failed"], count);
    }
}

/// The span of the phase that it is in.
fn phase(context: Context, session: &Session) -> SpanId {
    let own = digest(&[&context.trace.to_string(), session.phase.as_str(), &session.since.as_nanosecond().to_string()]);
    SpanId(std::array::from_fn(|n| own[n]))
}

/// Thirty-two bytes. That some are all zeros, which would be no name, happens to nobody.
fn digest(parts: &[&str]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, parts.join("\n").as_bytes());
    std::array::from_fn(|n| digest.as_ref().get(n).copied().unwrap_or_default())
}

fn span(trace: TraceId, own: SpanId, name: &str, start: Timestamp, end: Timestamp) -> Span {
    Span {
        trace_id: trace.0.to_vec(),
        span_id: own.0.to_vec(),
        name: name.to_owned(),
        kind: SpanKind::Internal.into(),
        // Sampled.
        flags: 1,
        start_time_unix_nano: nanos(start),
        // Clocks of two fleets differ.
        end_time_unix_nano: nanos(end.max(start)),
        ..Span::default()
    }
}

fn attributes(session: &Session) -> Vec<KeyValue> {
    vec![
        text("agent_fleet.session", session.id.as_str()),
        text("agent_fleet.tenant", &session.tenant),
        text("agent_fleet.provider", &session.provider),
        text("agent_fleet.container", &session.key()),
    ]
}

/// In a word of ours: what a provider or a hook has said may be anything.
fn wrong(what: &str) -> Status {
    Status { code: StatusCode::Error.into(), message: what.to_owned() }
}

fn text(key: &str, value: &str) -> KeyValue {
    let value = AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) };
    KeyValue { key: key.to_owned(), value: Some(value), ..KeyValue::default() }
}

fn nanos(at: Timestamp) -> u64 {
    u64::try_from(at.as_nanosecond()).unwrap_or_default()
}

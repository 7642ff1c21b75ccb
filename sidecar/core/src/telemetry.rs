//! What a tracing or logging backend is handed, as plain data: made by folds over [`crate::update::Update`], encoded by an
//! exporter. Times are since the Unix epoch. Names of attributes follow the GenAI semantic conventions, or begin with `claude_agent.`.

use std::time::Duration;

use serde::ser::{Serialize, SerializeMap, Serializer};

/// Names one trace: a user turn and all that was done for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TraceId(pub [u8; 16]);

/// Names one span of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpanId(pub [u8; 8]);

/// Where something belongs: what a `traceparent` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    pub trace: TraceId,
    pub span: SpanId,
    pub sampled: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Str(String),
    Int(i64),
    Float(f64),
    Bool(bool),
    List(Vec<String>),
}

/// In the order in which they were said; no key twice.
pub type Attributes = Vec<(&'static str, Value)>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    Internal,
    /// A request to somebody else: the model.
    Client,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Status {
    Unset,
    /// What went wrong, as a word of a bounded vocabulary.
    Error(String),
}

/// Something with a beginning and an end, both real.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    pub context: Context,
    pub parent: Option<SpanId>,
    pub name: String,
    pub kind: SpanKind,
    pub start: Duration,
    pub end: Duration,
    pub attributes: Attributes,
    pub events: Vec<SpanEvent>,
    pub links: Vec<Link>,
    pub status: Status,
}

/// A moment within a span.
#[derive(Clone, Debug, PartialEq)]
pub struct SpanEvent {
    pub time: Duration,
    pub name: &'static str,
    pub attributes: Attributes,
}

/// A span elsewhere that this one follows from.
#[derive(Clone, Debug, PartialEq)]
pub struct Link {
    pub to: Context,
    pub attributes: Attributes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    Info,
    Warn,
    Error,
}

/// Something that happened: one of a fixed list of names.
#[derive(Clone, Debug, PartialEq)]
pub struct LogEvent {
    pub time: Duration,
    pub name: &'static str,
    pub severity: Severity,
    /// Numbers the events of a run without a gap.
    pub sequence: u64,
    pub context: Option<Context>,
    pub attributes: Attributes,
}

impl Severity {
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warn => "warn",
            Severity::Error => "error",
        }
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Value::Str(text) => s.serialize_str(text),
            Value::Int(n) => s.serialize_i64(*n),
            Value::Float(n) => s.serialize_f64(*n),
            Value::Bool(b) => s.serialize_bool(*b),
            Value::List(texts) => texts.serialize(s),
        }
    }
}

/// As a line of the file of events: one flat object.
impl Serialize for LogEvent {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(None)?;
        map.serialize_entry("time", &self.time.as_secs_f64())?;
        map.serialize_entry("event", self.name)?;
        map.serialize_entry("severity", self.severity.as_str())?;
        map.serialize_entry("sequence", &self.sequence)?;
        if let Some(context) = &self.context {
            map.serialize_entry("trace_id", &context.trace.to_string())?;
            map.serialize_entry("span_id", &context.span.to_string())?;
        }
        for (key, value) in &self.attributes {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

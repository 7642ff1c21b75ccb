//! The spans that are open, each under the key of what it is about. Bounded: what does not fit is counted, and its children belong to
//! whatever is open above it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::semconv::put;
use crate::telemetry::{Attributes, Context, Span, SpanEvent, SpanId, SpanKind, Status};

/// Open at once. The session itself keeps track of more calls than this, but nobody reads such a trace.
const OPEN: usize = 1_024;
/// Of one span.
const EVENTS: usize = 128;

/// What a span is about. Order is the order in which the last ones are closed: leaves before what they may hang from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    /// By the thread that is answered.
    Chat(String),
    Permission(String),
    Mcp(String),
    Hook(String),
    Compact,
    Tool(String),
    Subagent(String),
    Turn,
    Background,
    Shutdown,
    Process,
}

#[derive(Clone, Debug)]
pub(super) struct Open {
    pub(super) span: Span,
    /// What it hangs from, if that is open, too.
    pub(super) under: Option<Key>,
    /// When a subagent's model was asked last, as far as can be told.
    pub(super) asked: Option<Duration>,
    pub(super) streamed: bool,
    /// What was said in it, where that may be told.
    pub(super) said: String,
    dropped: u64,
}

impl Open {
    pub(super) fn event(&mut self, time: Duration, name: &'static str, attributes: Attributes) {
        if self.span.events.len() < EVENTS {
            self.span.events.push(SpanEvent { time, name, attributes });
        } else {
            self.dropped += 1;
        }
    }
}

/// Where a span hangs.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) parent: Context,
    pub(super) under: Option<Key>,
}

/// Of which nothing is known but that it has begun.
pub(super) fn blank(context: Context, parent: Option<SpanId>, name: String, kind: SpanKind, start: Duration) -> Span {
    Span {
        context,
        parent,
        name,
        kind,
        start,
        end: start,
        attributes: Attributes::new(),
        events: Vec::new(),
        links: Vec::new(),
        status: Status::Unset,
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Tree {
    open: BTreeMap<Key, Open>,
    pub(super) done: Vec<Span>,
    pub(super) dropped: u64,
}

impl Tree {
    /// Nothing is open whose beginning and end have to be told by one clock.
    pub(super) fn is_idle(&self) -> bool {
        self.open.keys().all(|key| *key == Key::Process)
    }

    pub(super) fn has(&self, key: &Key) -> bool {
        self.open.contains_key(key)
    }

    pub(super) fn get(&mut self, key: &Key) -> Option<&mut Open> {
        self.open.get_mut(key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Key, &Open)> {
        self.open.iter()
    }

    pub(super) fn place(&self, key: Key) -> Option<Place> {
        self.open.get(&key).map(|open| Place { parent: open.span.context, under: Some(key) })
    }

    pub(super) fn start(&mut self, key: Key, under: Option<Key>, span: Span) -> Option<&mut Open> {
        if self.open.len() >= OPEN && !matches!(key, Key::Turn | Key::Shutdown) {
            self.dropped += 1;
            return None;
        }
        let open = Open { span, under, asked: None, streamed: false, said: String::new(), dropped: 0 };
        Some(self.open.entry(key).insert_entry(open).into_mut())
    }

    /// Takes it out, to be finished.
    pub(super) fn take(&mut self, key: &Key) -> Option<Open> {
        self.open.remove(key)
    }

    pub(super) fn finish(&mut self, mut open: Open, end: Duration) -> Context {
        if open.dropped > 0 {
            self.dropped += open.dropped;
            put(&mut open.span.attributes, "claude_agent.events_dropped", open.dropped);
        }
        open.span.end = end.max(open.span.start);
        let context = open.span.context;
        self.done.push(open.span);
        context
    }

    pub(super) fn keys(&self, which: impl Fn(&Key, &Open) -> bool) -> Vec<Key> {
        self.open.iter().filter(|(key, open)| which(key, open)).map(|(key, _)| key.clone()).collect()
    }
}

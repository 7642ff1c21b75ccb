//! What the CLI's own telemetry means: its OTLP export, taken apart by an edge and handed in here as plain names and numbers.
//!
//! ```text
//!   a POST ─► Report ─┬─ points (token.usage, cost.usage) ─► Book ─► increments of spending, each counted once
//!                     └─ events (api_request, user_prompt …) ─► what happened; how cache writes split
//! ```
//!
//! Money and tokens are summed from the metrics alone: they equal the CLI's own totals in every run, aborted and cut answers included.
//! Events tell the same calls again, and some not at all (an interrupted one, the one that broke a budget): they are never summed. They
//! only tell what metrics cannot: a turn, a duration, and which of the cache writes were for an hour.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use crate::metric::bounded;
use crate::tokens::{Tokens, Usd};
use crate::update::Source;

/// What was counted is remembered so long. The CLI repeats a POST whose answer was lost within ten seconds; it has at most some dozens
/// of points in each, and one of them a second.
const SEEN: usize = 16_384;
/// Running totals that are followed: each is a model, a source and a kind. One more is not counted, rather than twice.
const TOTALS: usize = 4_096;
/// Models and sessions whose cache writes wait for a word on their split.
const HELD: usize = 256;
/// A name that others choose is kept this long.
const NAME: usize = 96;

/// What one POST of the CLI said.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    pub points: Vec<Point>,
    pub events: Vec<Event>,
}

impl Report {
    /// Until when all that was spent is told, if any of it is.
    pub fn priced_until(&self) -> Option<Duration> {
        let costs = self.points.iter().filter(|point| matches!(point.amount, Amount::Cost(pico) if pico > 0));
        costs.map(|point| point.span.end).max()
    }
}

/// A value of an attribute, as far as any of them matters here.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Text(String),
    Int(i64),
    Float(f64),
    Bool(bool),
}

/// The attributes of a point or an event.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attributes(BTreeMap<String, Value>);

impl FromIterator<(String, Value)> for Attributes {
    fn from_iter<T: IntoIterator<Item = (String, Value)>>(all: T) -> Attributes {
        Attributes(all.into_iter().collect())
    }
}

impl Attributes {
    fn text(&self, key: &str) -> Option<&str> {
        match self.0.get(key)? {
            Value::Text(text) => Some(bounded(text, NAME)),
            Value::Int(_) | Value::Float(_) | Value::Bool(_) => None,
        }
    }

    /// A number; the CLI writes some of them as text.
    fn number(&self, key: &str) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "no count of a call comes near to where it would matter")]
        match self.0.get(key)? {
            Value::Int(n) => Some(*n as f64),
            Value::Float(n) => Some(*n),
            Value::Text(text) => text.parse().ok(),
            Value::Bool(_) => None,
        }
    }

    fn count(&self, key: &str) -> Option<u64> {
        self.number(key).map(whole)
    }

    fn millis(&self, key: &str) -> Option<Duration> {
        self.count(key).map(Duration::from_millis)
    }

    fn is_true(&self, key: &str) -> bool {
        matches!(self.0.get(key), Some(Value::Bool(true))) || self.text(key) == Some("true")
    }

    fn fingerprint(&self, metric: &str) -> u64 {
        // The same in every process: the same series has the same print.
        let mut hasher = DefaultHasher::new();
        metric.hash(&mut hasher);
        for (key, value) in &self.0 {
            key.hash(&mut hasher);
            match value {
                Value::Text(text) => text.hash(&mut hasher),
                Value::Int(n) => n.hash(&mut hasher),
                Value::Float(n) => n.to_bits().hash(&mut hasher),
                Value::Bool(b) => b.hash(&mut hasher),
            }
        }
        hasher.finish()
    }
}

/// What is no count is none.
fn whole(n: f64) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, and maps NaN to zero")]
    let n = n.round() as u64;
    n
}

/// What time a point covers, and how: since the last export, or since the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// Both since the Unix epoch.
    pub start: Duration,
    pub end: Duration,
    pub cumulative: bool,
}

/// An amount of one series over a span of time.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Tells series apart: by metric and all attributes, those included that mean nothing here.
    series: u64,
    span: Span,
    session: String,
    model: String,
    source: Source,
    amount: Amount,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Amount {
    /// In picodollars, as [`Usd`] counts them.
    Cost(u64),
    Input(u64),
    Output(u64),
    CacheRead(u64),
    /// Of either duration.
    CacheWrite(u64),
}

impl Point {
    /// `None` for what says nothing about money: the CLI counts lines of code, too.
    pub fn of(metric: &str, attributes: &Attributes, span: Span, value: f64) -> Option<Point> {
        let amount = match (metric, attributes.text("type")) {
            ("claude_code.cost.usage", _) => Amount::Cost(Usd::from_f64(value).pico()),
            ("claude_code.token.usage", Some("input")) => Amount::Input(whole(value)),
            ("claude_code.token.usage", Some("output")) => Amount::Output(whole(value)),
            ("claude_code.token.usage", Some("cacheRead")) => Amount::CacheRead(whole(value)),
            ("claude_code.token.usage", Some("cacheCreation")) => Amount::CacheWrite(whole(value)),
            _ => return None,
        };
        let source = match attributes.text("query_source") {
            Some("main") => Source::Main,
            Some("subagent") => Source::Subagent,
            // Compaction, web search and whatever else the CLI asks on its own account.
            _ => Source::Unattributed,
        };
        Some(Point {
            series: attributes.fingerprint(metric),
            span,
            session: attributes.text("session.id").unwrap_or_default().to_owned(),
            model: model(attributes),
            source,
            amount,
        })
    }
}

fn model(attributes: &Attributes) -> String {
    crate::price::canonical(attributes.text("model").unwrap_or("unknown")).into_owned()
}

/// Something that happened in the CLI.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub session: String,
    /// Numbers the events of a process.
    sequence: Option<u64>,
    time: Duration,
    pub what: What,
}

#[derive(Clone, Debug, PartialEq)]
pub enum What {
    /// The user said something: a turn begins.
    Prompt,
    /// The model answered.
    Answer(Answer),
    /// A request failed for good.
    Failed {
        error: String,
    },
    Tool {
        call: String,
        tool: String,
        ok: bool,
        duration: Duration,
    },
    Subagent {
        kind: String,
        duration: Duration,
    },
    Compacted {
        trigger: String,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The request's, where the API gave one.
    pub id: String,
    pub model: String,
    pub source: Source,
    pub duration: Option<Duration>,
    pub first_token: Option<Duration>,
    /// What was written to the cache for five minutes, and for an hour.
    writes: (u64, u64),
    /// As far as this event tells: sums are made of points.
    pub tokens: Tokens,
}

impl Answer {
    fn of(attributes: &Attributes) -> Answer {
        let count = |key| attributes.count(key).unwrap_or_default();
        let writes = match (attributes.count("cache_creation_5m_tokens"), attributes.count("cache_creation_1h_tokens")) {
            // An older CLI does not tell them apart, and prices all of them at five minutes.
            (None, None) => (count("cache_creation_tokens"), 0),
            (five, hour) => (five.unwrap_or_default(), hour.unwrap_or_default()),
        };
        Answer {
            id: attributes.text("request_id").unwrap_or_default().to_owned(),
            model: model(attributes),
            source: asker(attributes),
            duration: attributes.millis("duration_ms"),
            first_token: attributes.millis("ttft_ms"),
            writes,
            tokens: Tokens {
                input: count("input_tokens"),
                output: count("output_tokens"),
                cache_read: count("cache_read_tokens"),
                cache_write_5m: writes.0,
                cache_write_1h: writes.1,
            },
        }
    }
}

impl Event {
    /// `None` for what means nothing here. `name` is the event's own, with or without its prefix.
    pub fn of(name: &str, attributes: &Attributes, time: Duration) -> Option<Event> {
        let text = |key: &str, or: &str| attributes.text(key).unwrap_or(or).to_owned();
        let what = match name.strip_prefix("claude_code.").unwrap_or(name) {
            "user_prompt" => What::Prompt,
            "api_request" => What::Answer(Answer::of(attributes)),
            "api_error" => What::Failed { error: error(attributes.count("status_code")).to_owned() },
            "tool_result" => What::Tool {
                call: text("tool_use_id", ""),
                tool: text("tool_name", "unknown"),
                ok: attributes.is_true("success"),
                duration: attributes.millis("duration_ms").unwrap_or_default(),
            },
            "subagent_completed" => What::Subagent {
                kind: text("agent_type", "unknown"),
                duration: attributes.millis("duration_ms").unwrap_or_default(),
            },
            "compaction" => What::Compacted { trigger: text("trigger", "unknown") },
            _ => return None,
        };
        let session = attributes.text("session.id").unwrap_or_default().to_owned();
        Some(Event { session, sequence: attributes.count("event.sequence"), time, what })
    }
}

fn asker(attributes: &Attributes) -> Source {
    match attributes.text("query_source").unwrap_or_default() {
        "sdk" => Source::Main,
        source if source.starts_with("repl_main_thread") => Source::Main,
        source if source.starts_with("agent:") || attributes.text("agent.name").is_some() => Source::Subagent,
        _ => Source::Unattributed,
    }
}

/// The category that the stream gives such a failure.
fn error(status: Option<u64>) -> &'static str {
    match status {
        Some(401 | 403) => "authentication_failed",
        Some(429) => "rate_limit",
        Some(529) => "overloaded",
        Some(400..=499) => "invalid_request",
        Some(500..=599) => "server_error",
        _ => "unknown",
    }
}

/// Spending that was not counted before.
#[derive(Clone, Debug, PartialEq)]
pub struct Increment {
    pub session: String,
    pub model: String,
    pub source: Source,
    pub tokens: Tokens,
    /// In the CLI's own figures.
    pub usd: Usd,
}

/// What was seen lately.
#[derive(Clone, Debug)]
struct Seen<T> {
    all: BTreeSet<T>,
    order: VecDeque<T>,
}

impl<T> Default for Seen<T> {
    fn default() -> Seen<T> {
        Seen { all: BTreeSet::new(), order: VecDeque::new() }
    }
}

impl<T: Ord + Clone> Seen<T> {
    /// Whether it is new.
    fn add(&mut self, one: T) -> bool {
        if !self.all.insert(one.clone()) {
            return false;
        }
        self.order.push_back(one);
        if self.order.len() > SEEN
            && let Some(oldest) = self.order.pop_front()
        {
            self.all.remove(&oldest);
        }
        true
    }
}

/// Who spent: in which session, on which model, on whose behalf.
type Spender = (String, String, Source);

/// Turns what comes, in whatever order and number, into increments that add up to what the CLI counted.
///
/// A delta is known by its series and the time that it covers: the same again is a repetition, another one is more, whenever it comes. A
/// running total is known by its series and beginning: only what it is above the highest so far is new.
#[derive(Clone, Debug, Default)]
pub struct Book {
    deltas: Seen<(u64, Duration, Duration)>,
    totals: BTreeMap<(u64, Duration), u64>,
    events: Seen<(String, u64, Duration)>,
    /// Cache writes that were counted nowhere yet: nobody has told for how long they are.
    held: BTreeMap<Spender, u64>,
    /// What events told of the writes of a model, as far as it was not taken up: for five minutes, for an hour.
    told: BTreeMap<String, (u64, u64)>,
}

impl Book {
    /// What a report says that was not said before.
    pub fn take<'a>(&mut self, report: &'a Report) -> (Vec<Increment>, Vec<&'a Event>) {
        let mut news = BTreeMap::<Spender, (Tokens, Usd)>::new();
        for point in &report.points {
            let new = self.new_of(point);
            let spender = (point.session.clone(), point.model.clone(), point.source);
            if let Amount::CacheWrite(_) = point.amount {
                self.hold(spender, new, &mut news);
                continue;
            }
            if new == 0 {
                continue;
            }
            let (tokens, usd) = news.entry(spender).or_default();
            match point.amount {
                Amount::Cost(_) => *usd += Usd::from_pico(new),
                Amount::Input(_) => *tokens += Tokens { input: new, ..Tokens::default() },
                Amount::Output(_) => *tokens += Tokens { output: new, ..Tokens::default() },
                Amount::CacheRead(_) => *tokens += Tokens { cache_read: new, ..Tokens::default() },
                Amount::CacheWrite(_) => {}
            }
        }
        let mut events = Vec::new();
        for event in &report.events {
            let new = event.sequence.is_none_or(|n| self.events.add((event.session.clone(), n, event.time)));
            if !new {
                continue;
            }
            if let What::Answer(answer) = &event.what
                && (self.told.len() < HELD || self.told.contains_key(&answer.model))
            {
                let (five, hour) = self.told.entry(answer.model.clone()).or_default();
                *five = five.saturating_add(answer.writes.0);
                *hour = hour.saturating_add(answer.writes.1);
            }
            events.push(event);
        }
        self.split(&mut news);
        (increments(news), events)
    }

    /// Nothing more will be told: what is held was written for five minutes, as the CLI prices what it does not know.
    pub fn close(&mut self) -> Vec<Increment> {
        let rest = std::mem::take(&mut self.held).into_iter();
        increments(rest.map(|(spender, n)| (spender, (five_minutes(n), Usd::ZERO))).collect())
    }

    fn new_of(&mut self, point: &Point) -> u64 {
        let amount = match point.amount {
            Amount::Cost(n) | Amount::Input(n) | Amount::Output(n) | Amount::CacheRead(n) | Amount::CacheWrite(n) => n,
        };
        if !point.span.cumulative {
            return if self.deltas.add((point.series, point.span.start, point.span.end)) { amount } else { 0 };
        }
        let key = (point.series, point.span.start);
        if self.totals.len() >= TOTALS && !self.totals.contains_key(&key) {
            return 0;
        }
        let highest = self.totals.entry(key).or_default();
        let new = amount.saturating_sub(*highest);
        *highest = amount.max(*highest);
        new
    }

    fn hold(&mut self, spender: Spender, n: u64, news: &mut BTreeMap<Spender, (Tokens, Usd)>) {
        if n == 0 {
            return;
        }
        if self.held.len() >= HELD && !self.held.contains_key(&spender) {
            let (tokens, _) = news.entry(spender).or_default();
            *tokens += five_minutes(n);
            return;
        }
        let held = self.held.entry(spender).or_default();
        *held = held.saturating_add(n);
    }

    /// Counts the held writes whose split was told.
    fn split(&mut self, news: &mut BTreeMap<Spender, (Tokens, Usd)>) {
        for (spender, held) in &mut self.held {
            let Some((five, hour)) = self.told.get_mut(&spender.1) else { continue };
            let for_hour = (*held).min(*hour);
            let for_five = (*held - for_hour).min(*five);
            if for_hour + for_five == 0 {
                continue;
            }
            *hour -= for_hour;
            *five -= for_five;
            *held -= for_hour + for_five;
            let (tokens, _) = news.entry(spender.clone()).or_default();
            *tokens += Tokens { cache_write_5m: for_five, cache_write_1h: for_hour, ..Tokens::default() };
        }
        self.held.retain(|_, held| *held > 0);
        self.told.retain(|_, (five, hour)| *five > 0 || *hour > 0);
    }
}

fn five_minutes(n: u64) -> Tokens {
    Tokens { cache_write_5m: n, ..Tokens::default() }
}

fn increments(news: BTreeMap<Spender, (Tokens, Usd)>) -> Vec<Increment> {
    let increment =
        |((session, model, source), (tokens, usd)): (Spender, (Tokens, Usd))| Increment { session, model, source, tokens, usd };
    news.into_iter().map(increment).filter(|new| !new.tokens.is_zero() || !new.usd.is_zero()).collect()
}

#[cfg(test)]
mod tests;

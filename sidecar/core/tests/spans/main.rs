//! Traces and log events: of every recording, of one that is cut anywhere, and as timelines.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod recordings;
mod timelines;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use agent_sidecar_core::limit::Rule;
use agent_sidecar_core::log::LEDGER;
use agent_sidecar_core::span::TraceSettings;
use agent_sidecar_core::telemetry::{LogEvent, Span, Status, Value};
use agent_sidecar_core::{Action, Exit, Input, Monitor, Now, Output, Settings};

const DAY: Duration = Duration::from_secs(1_795_392_000);
const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// A run with its spans and log events.
struct Run {
    monitor: Monitor,
    now: Duration,
    /// What the wall clock said at the beginning.
    day: Duration,
    spans: Vec<Span>,
    logs: Vec<LogEvent>,
    records: Vec<serde_json::Value>,
    /// What came out before the end.
    before_exit: usize,
    /// Of questions that the sidecar asked.
    asked: Vec<String>,
}

impl Run {
    fn new(settings: Settings, replaying: bool) -> Run {
        let monitor = Monitor::new(settings, replaying, Now { mono: Duration::ZERO, unix: DAY });
        let mut run = Run {
            monitor,
            now: Duration::ZERO,
            day: DAY,
            spans: Vec::new(),
            logs: Vec::new(),
            records: Vec::new(),
            before_exit: 0,
            asked: Vec::new(),
        };
        run.put(Input::Spawned { pid: 7 });
        run
    }

    fn live(trace: TraceSettings, rules: &[Rule]) -> Run {
        Run::new(Settings { trace, events: true, rules: rules.to_vec(), ..Settings::default() }, false)
    }

    fn put(&mut self, input: Input<'_>) -> &mut Run {
        self.monitor.handle(Now { mono: self.now, unix: self.day + self.now }, input);
        while let Some(output) = self.monitor.poll_output() {
            match output {
                Output::Span(span) => self.spans.push(span),
                Output::Log(event) => self.logs.push(event),
                Output::Record(record) => self.records.push(serde_json::to_value(record).unwrap()),
                Output::Action(Action::Inject { line, .. }) => self.asked.push(line),
                Output::Action(_) | Output::Decided(_) | Output::Known => {}
            }
        }
        self
    }

    fn at(&mut self, seconds: f64) -> &mut Run {
        let until = Duration::from_secs_f64(seconds);
        while let Some(due) = self.monitor.poll_timeout().filter(|due| *due < until) {
            self.now = due;
            self.put(Input::Timeout);
        }
        self.now = until;
        self.put(Input::Timeout)
    }

    fn cli(&mut self, line: &str) -> &mut Run {
        self.put(Input::Stdout(format!("{line}\n").as_bytes()))
    }

    fn app(&mut self, line: &str) -> &mut Run {
        self.put(Input::Stdin(format!("{line}\n").as_bytes()))
    }

    fn ask(&mut self) -> &mut Run {
        self.app(r#"{"type":"user","message":{"role":"user","content":"do it"}}"#)
    }

    fn init(&mut self, session: &str) -> &mut Run {
        self.cli(&format!(
            r#"{{"type":"system","subtype":"init","session_id":"{session}","model":"claude-opus-5-5","claude_code_version":"2.1.330"}}"#
        ))
    }

    /// Of the main loop, or of the subagent of a call.
    fn answer(&mut self, id: u64, parent: Option<&str>, tool: Option<(&str, &str)>) -> &mut Run {
        let block = match tool {
            Some((call, tool)) => format!(r#"{{"type":"tool_use","id":"{call}","name":"{tool}","input":{{"secret":1}}}}"#),
            None => String::from(r#"{"type":"text","text":"done"}"#),
        };
        let parent = parent.map_or_else(|| String::from("null"), |call| format!("\"{call}\""));
        self.cli(&format!(
            r#"{{"type":"assistant","session_id":"s","parent_tool_use_id":{parent},"message":{{"id":"msg_{id}","model":"claude-opus-5-5","usage":{{"input_tokens":10,"cache_read_input_tokens":5,"output_tokens":1}},"content":[{block}]}}}}"#
        ))
    }

    fn tool_result(&mut self, call: &str, parent: Option<&str>, error: bool) -> &mut Run {
        let parent = parent.map_or_else(|| String::from("null"), |call| format!("\"{call}\""));
        self.cli(&format!(
            r#"{{"type":"user","session_id":"s","parent_tool_use_id":{parent},"message":{{"role":"user","content":[{{"type":"tool_result","tool_use_id":"{call}","is_error":{error},"content":"no"}}]}}}}"#
        ))
    }

    fn result(&mut self, session: &str, subtype: &str, reason: &str) -> &mut Run {
        self.cli(&format!(
            r#"{{"type":"result","session_id":"{session}","subtype":"{subtype}","is_error":{},"terminal_reason":"{reason}","num_turns":2,"modelUsage":{{"claude-opus-5-5":{{"inputTokens":10,"outputTokens":7,"costUSD":0.5}}}}}}"#,
            subtype != "success",
        ))
    }

    fn exit(&mut self, exit: Exit) -> &mut Run {
        self.put(Input::StdoutEnd);
        self.before_exit = self.spans.len();
        self.put(Input::Exited(exit))
    }

    fn named(&self, name: &str) -> Vec<&Span> {
        self.spans.iter().filter(|span| span.name == name).collect()
    }

    fn one(&self, name: &str) -> &Span {
        match self.named(name).as_slice() {
            [span] => span,
            spans => panic!("{} spans are named {name}:\n{}", spans.len(), self.tree()),
        }
    }

    /// What happened when, indented by what belongs to what.
    fn tree(&self) -> String {
        let known: BTreeSet<_> = self.spans.iter().map(|span| span.context.span).collect();
        let mut text = String::new();
        let mut todo: Vec<(usize, &Span)> =
            self.spans.iter().filter(|span| span.parent.is_none_or(|parent| !known.contains(&parent))).map(|s| (0, s)).collect();
        todo.sort_by_key(|(_, span)| std::cmp::Reverse((span.start, span.end, span.name.clone())));
        while let Some((depth, span)) = todo.pop() {
            let (start, end) = ((span.start - DAY).as_secs_f64(), (span.end - DAY).as_secs_f64());
            write!(text, "{:depth$}{} {start}-{end}", "", span.name, depth = depth * 2).unwrap();
            for key in ["outcome", "decision", "trigger", "limit", "reason", "timing", "closed_by"] {
                if let Some(Value::Str(value)) = get(span, &format!("claude_agent.{key}")) {
                    write!(text, " {key}={value}").unwrap();
                }
            }
            if let Status::Error(error) = &span.status {
                write!(text, " !{error}").unwrap();
            }
            for event in &span.events {
                write!(text, " [{}]", event.name).unwrap();
            }
            text.push('\n');
            let mut children: Vec<_> = self.spans.iter().filter(|child| child.parent == Some(span.context.span)).collect();
            children.sort_by_key(|child| std::cmp::Reverse((child.start, child.end, child.name.clone())));
            todo.extend(children.into_iter().map(|child| (depth + 1, child)));
        }
        text.trim_end().to_owned()
    }
}

fn trace() -> TraceSettings {
    TraceSettings { on: true, seed: 42, ..TraceSettings::default() }
}

fn get<'a>(span: &'a Span, key: &str) -> Option<&'a Value> {
    span.attributes.iter().find(|(known, _)| *known == key).map(|(_, value)| value)
}

fn text<'a>(span: &'a Span, key: &str) -> &'a str {
    match get(span, key) {
        Some(Value::Str(text)) => text,
        other => panic!("{}: {key} is {other:?}", span.name),
    }
}

fn int(span: &Span, key: &str) -> Option<i64> {
    match get(span, key) {
        Some(Value::Int(n)) => Some(*n),
        None => None,
        other => panic!("{}: {key} is {other:?}", span.name),
    }
}

fn is_turn(span: &Span) -> bool {
    get(span, "claude_agent.turn").is_some()
}

/// The ledger file and the log tell the same facts in the same order with the same words.
fn told_alike(run: &Run) -> usize {
    let facts: BTreeSet<&str> = LEDGER.iter().flat_map(|(_, facts)| facts.iter().copied()).collect();
    let fact = |record: &serde_json::Value| record["event"].as_str().unwrap().to_owned();
    // Whoever stops it from outside enforces no limit.
    let limited = run.logs.iter().any(|event| event.name == "limit.enforced");
    let records = run.records.iter().filter(|r| facts.contains(&*fact(r)) && (limited || fact(r) != "limit_enforced"));
    let names = |event: &LogEvent| LEDGER.iter().find(|(name, _)| *name == event.name).unwrap().1;
    let events: Vec<_> = run.logs.iter().filter(|event| !names(event).is_empty()).collect();
    let mut told = 0;
    for (n, record) in records.enumerate() {
        let event = events[n];
        assert!(names(event).contains(&&*fact(record)), "{record} is told as {event:?}");
        for (field, value) in record.as_object().unwrap() {
            let key = match field.as_str() {
                // The frame of a line, and sums that no attribute can hold.
                "time" | "run" | "seq" | "event" | "tokens" => continue,
                "session_id" if value == "" => continue,
                "session_id" => String::from("gen_ai.conversation.id"),
                field => format!("claude_agent.{field}"),
            };
            let said = event.attributes.iter().find(|(known, _)| *known == key).map(|(_, value)| value);
            let same = match (value, said) {
                (serde_json::Value::Null, None) => true,
                (serde_json::Value::String(a), Some(Value::Str(b))) => a == b,
                (serde_json::Value::Bool(a), Some(Value::Bool(b))) => a == b,
                (serde_json::Value::Number(a), Some(Value::Float(b))) => (a.as_f64().unwrap() - b).abs() < 1e-9,
                (serde_json::Value::Number(a), Some(Value::Int(b))) => a.as_i64() == Some(*b),
                _ => false,
            };
            assert!(same, "{record}: {field} is told as {said:?}");
        }
        told += 1;
    }
    assert_eq!(told, events.len());
    told
}

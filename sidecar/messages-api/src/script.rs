//! What the server will say: rules tried in order, the first that fits answers. Read from JSON, every mistake named with its place.
//!
//! ```json
//! {
//!   "defaults": {"usage": {"input_tokens": 12, "output_tokens": 80}, "pace": {"chunk": 16, "chunk_delay_ms": 20}},
//!   "rules": [
//!     {"when": {"agent": "main", "results": 0}, "reply": {"blocks": ["Looking.", {"tool": "Bash", "input": {"command": "echo hi"}}]}},
//!     {"when": {"attempt": 1}, "times": 1, "reply": {"status": 529}}
//!   ],
//!   "otherwise": {"blocks": ["Done."]}
//! }
//! ```

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::request::{Agent, Request};

/// Rules, and what to say when none of them fits.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    #[serde(rename = "about")]
    _about: Option<String>,
    #[serde(default)]
    pub(crate) defaults: Defaults,
    #[serde(default)]
    pub(crate) rules: Vec<Rule>,
    #[serde(default)]
    pub(crate) otherwise: Reply,
}

/// Why a script was refused.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// Not JSON, or not of this shape.
    #[error("the script does not have the shape of a script; the built-in demo script shows every part")]
    Shape(#[source] serde_json::Error),
    /// Of the right shape, and still without a meaning.
    #[error("{place}: {what}")]
    Meaning {
        /// Where, as a path into the JSON.
        place: String,
        /// What is wrong and what to write instead.
        what: &'static str,
    },
}

/// What replies leave out.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Defaults {
    #[serde(default)]
    pub(crate) usage: Usage,
    #[serde(default)]
    pub(crate) pace: Pace,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rule {
    /// For the reader, and for the log.
    pub(crate) about: Option<String>,
    #[serde(default)]
    pub(crate) when: When,
    /// How often this rule may answer, over the life of the server.
    pub(crate) times: Option<u32>,
    pub(crate) reply: Reply,
}

/// All that is given must hold.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct When {
    agent: Option<Agent>,
    /// The n-th request of its conversation, from 1; a retry keeps its number.
    nth: Option<u32>,
    /// The n-th try of that request, from 1.
    attempt: Option<u32>,
    /// The n-th user message of the conversation, from 1.
    turn: Option<u32>,
    /// How many tool results came back since that user message.
    results: Option<u32>,
    /// In the last user message.
    prompt_contains: Option<String>,
    /// In anything the client added after the model's last answer.
    last_contains: Option<String>,
    /// In the name of the requested model.
    model: Option<String>,
    stream: Option<bool>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Reply {
    #[serde(default)]
    pub(crate) blocks: Vec<Block>,
    /// `tool_use` when there is a tool among the blocks, else `end_turn`.
    pub(crate) stop_reason: Option<String>,
    pub(crate) usage: Option<Usage>,
    /// The model that the answer names; the requested one if not given.
    pub(crate) model: Option<String>,
    #[serde(default)]
    pub(crate) pace: Pace,
    /// Rate limits, `retry-after` and the like.
    #[serde(default)]
    pub(crate) headers: BTreeMap<String, String>,

    /// An HTTP error instead of an answer.
    pub(crate) status: Option<u16>,
    /// Its type, or that of the SSE `error` event; by default what the API says for that status.
    pub(crate) error: Option<String>,
    /// No headers, ever.
    #[serde(default)]
    pub(crate) hang: bool,
    /// The connection ends without the end of the answer.
    pub(crate) cut: Option<Cut>,
    pub(crate) cut_after_events: Option<usize>,
    /// Where the cut is, or before the headers if there is none: a TCP reset instead of a close.
    #[serde(default)]
    pub(crate) reset: bool,
    /// An SSE `error` event where the cut is (or instead of the end), then a proper end.
    #[serde(default)]
    pub(crate) sse_error: bool,
    /// Nothing more after so many events, the connection stays open.
    pub(crate) stall_after_events: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Cut {
    BeforeAny,
    InText,
    AfterBlock,
    AfterTool,
    AfterDelta,
}

/// A string is a text.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "Value")]
pub(crate) enum Block {
    Text(String),
    Thinking(String),
    ToolUse {
        name: String,
        input: Map<String, Value>,
    },
    /// What the server itself searched: a `server_tool_use` and its result.
    WebSearch(String),
}

/// Field by field, with the reply's own before the defaults.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pace {
    first_byte_delay_ms: Option<u64>,
    /// Characters per delta.
    chunk: Option<usize>,
    chunk_delay_ms: Option<u64>,
}

/// What an answer says it used, in the API's own names.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Usage {
    #[serde(default)]
    pub(crate) input_tokens: u64,
    #[serde(default)]
    pub(crate) output_tokens: u64,
    #[serde(default)]
    pub(crate) cache_read_input_tokens: u64,
    /// Only to be given where the answer has no breakdown; else it is the sum of that.
    #[serde(default)]
    pub(crate) cache_creation_input_tokens: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cache_creation: Option<CacheCreation>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) server_tool_use: Option<ServerToolUse>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) inference_geo: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) service_tier: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) speed: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CacheCreation {
    pub(crate) ephemeral_5m_input_tokens: u64,
    pub(crate) ephemeral_1h_input_tokens: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ServerToolUse {
    pub(crate) web_search_requests: u64,
    pub(crate) web_fetch_requests: u64,
}

/// Where a request stands among those of its conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) nth: u32,
    pub(crate) attempt: u32,
}

impl Script {
    /// Reads a script.
    pub fn parse(json: &str) -> Result<Self, ScriptError> {
        let mut script: Self = serde_json::from_str(json).map_err(ScriptError::Shape)?;
        complete(&mut script.defaults.usage, "defaults")?;
        check_pace(script.defaults.pace, "defaults")?;
        for (at, rule) in script.rules.iter_mut().enumerate() {
            if rule.times == Some(0) {
                return Err(meaning(
                    &format!("rules[{at}].times"),
                    "a rule that may never answer; leave it out or give at least 1",
                ));
            }
            check(&mut rule.reply, &format!("rules[{at}].reply"))?;
        }
        check(&mut script.otherwise, "otherwise")?;
        Ok(script)
    }

    /// The rule that answers, and its reply; counts it in `used`, which has one place per rule.
    pub(crate) fn choose(&self, request: &Request, at: Position, used: &mut [u32]) -> (Option<usize>, &Reply) {
        let fits = |(rule, used): (&Rule, &u32)| rule.times.is_none_or(|times| *used < times) && rule.when.fits(request, at);
        match self.rules.iter().zip(&*used).position(fits) {
            Some(rule) => {
                used[rule] += 1;
                (Some(rule), &self.rules[rule].reply)
            }
            None => (None, &self.otherwise),
        }
    }
}

impl When {
    fn fits(&self, request: &Request, at: Position) -> bool {
        let is = |wanted: Option<u32>, n: u32| wanted.is_none_or(|wanted| wanted == n);
        let has = |wanted: &Option<String>, text: &str| wanted.as_ref().is_none_or(|wanted| text.contains(wanted.as_str()));
        self.agent.is_none_or(|agent| agent == request.agent)
            && self.stream.is_none_or(|stream| stream == request.stream)
            && is(self.nth, at.nth)
            && is(self.attempt, at.attempt)
            && is(self.turn, request.turn)
            && is(self.results, request.results)
            && has(&self.prompt_contains, &request.prompt)
            && has(&self.last_contains, &request.last)
            && has(&self.model, &request.model)
    }
}

impl Reply {
    /// Whether the client will ask the same again.
    pub(crate) fn fails(&self) -> bool {
        self.status.is_some()
            || self.hang
            || self.reset
            || self.sse_error
            || self.cut.is_some()
            || self.cut_after_events.is_some()
            || self.stall_after_events.is_some()
    }
}

impl Pace {
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            first_byte_delay_ms: self.first_byte_delay_ms.or(other.first_byte_delay_ms),
            chunk: self.chunk.or(other.chunk),
            chunk_delay_ms: self.chunk_delay_ms.or(other.chunk_delay_ms),
        }
    }

    pub(crate) fn first_byte_delay(self) -> std::time::Duration {
        std::time::Duration::from_millis(self.first_byte_delay_ms.unwrap_or(0))
    }

    pub(crate) fn chunk_delay(self) -> std::time::Duration {
        std::time::Duration::from_millis(self.chunk_delay_ms.unwrap_or(0))
    }

    pub(crate) fn chunk(self) -> usize {
        self.chunk.unwrap_or(usize::MAX)
    }
}

impl Block {
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::Thinking(_) => "thinking",
            Self::ToolUse { .. } => "tool_use",
            Self::WebSearch(_) => "web_search",
        }
    }
}

/// The shapes a block may be written in; each has one key that says which it is.
impl TryFrom<Value> for Block {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Tool {
            tool: String,
            input: Map<String, Value>,
        }
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Subagent {
            subagent: String,
            #[serde(default = "general_purpose")]
            r#type: String,
            #[serde(default)]
            background: bool,
            model: Option<String>,
        }
        fn general_purpose() -> String {
            "general-purpose".to_owned()
        }

        let whole = value.to_string();
        let bad = |error: serde_json::Error| format!("in block {whole}: {error}");
        let only = |value: &Value| value.as_object().is_some_and(|object| object.len() == 1);
        match value {
            Value::String(text) => Ok(Self::Text(text)),
            Value::Object(ref object) if object.contains_key("tool") => {
                let Tool { tool, input } = serde_json::from_value(value).map_err(bad)?;
                Ok(Self::ToolUse { name: tool, input })
            }
            Value::Object(ref object) if object.contains_key("subagent") => {
                let subagent: Subagent = serde_json::from_value(value).map_err(bad)?;
                let mut input = Map::new();
                input.insert("description".into(), subagent.subagent.chars().take(24).collect::<String>().into());
                input.insert("prompt".into(), subagent.subagent.into());
                input.insert("subagent_type".into(), subagent.r#type.into());
                // Said either way: versions differ in what they take silence for.
                input.insert("run_in_background".into(), subagent.background.into());
                if let Some(model) = subagent.model {
                    input.insert("model".into(), model.into());
                }
                Ok(Self::ToolUse { name: "Agent".to_owned(), input })
            }
            ref one if only(one) && one["text"].is_string() => Ok(Self::Text(string(&one["text"]))),
            ref one if only(one) && one["thinking"].is_string() => Ok(Self::Thinking(string(&one["thinking"]))),
            ref one if only(one) && one["web_search"].is_string() => Ok(Self::WebSearch(string(&one["web_search"]))),
            _ => Err(format!(
                "{whole} is no block; write a string, or an object with `text`, `thinking`, `web_search`, \
                 `tool` and `input`, or `subagent` (with `type`, `background`, `model`)"
            )),
        }
    }
}

fn string(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn meaning(place: &str, what: &'static str) -> ScriptError {
    ScriptError::Meaning { place: place.to_owned(), what }
}

/// What the type of a reply does not say of itself.
fn check(reply: &mut Reply, place: &str) -> Result<(), ScriptError> {
    if let Some(usage) = &mut reply.usage {
        complete(usage, place)?;
    }
    check_pace(reply.pace, place)?;
    let cuts = reply.cut.is_some() || reply.cut_after_events.is_some();
    let answers = !reply.blocks.is_empty() || cuts || reply.sse_error || reply.stall_after_events.is_some();
    let what = if reply.status.is_some() && answers {
        "an HTTP error has no blocks, cut, stall or SSE error; give `status` alone"
    } else if reply.status.is_some_and(|status| !(400..=599).contains(&status)) {
        "`status` is for errors; give 400 to 599 or leave it out"
    } else if reply.hang && (answers || reply.status.is_some() || reply.reset) {
        "`hang` answers nothing; give it alone"
    } else if reply.cut.is_some() && reply.cut_after_events.is_some() {
        "two cuts; give either `cut` or `cut_after_events`"
    } else if reply.reset && reply.sse_error {
        "an answer ends with a reset or with an SSE error, not both"
    } else if reply.error.is_some() && reply.status.is_none() && !reply.sse_error {
        "`error` without an error; add `status` or `sse_error`"
    } else {
        return Ok(());
    };
    Err(meaning(place, what))
}

fn check_pace(pace: Pace, place: &str) -> Result<(), ScriptError> {
    match pace.chunk {
        Some(0) => Err(meaning(&format!("{place}.pace.chunk"), "no characters per delta; give at least 1")),
        Some(_) | None => Ok(()),
    }
}

/// The sum of the cache writes, which nobody should have to write out.
fn complete(usage: &mut Usage, place: &str) -> Result<(), ScriptError> {
    if let Some(written) = usage.cache_creation {
        let sum = written.ephemeral_5m_input_tokens + written.ephemeral_1h_input_tokens;
        if ![0, sum].contains(&usage.cache_creation_input_tokens) {
            return Err(meaning(
                &format!("{place}.usage.cache_creation_input_tokens"),
                "is not the sum of `cache_creation`; leave it out",
            ));
        }
        usage.cache_creation_input_tokens = sum;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The error with its causes, as a program would print it.
    fn refusal(json: &str) -> String {
        let error = Script::parse(json).unwrap_err();
        let mut chain = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            chain += &format!(": {error}");
            cause = error.source();
        }
        chain
    }

    #[test]
    fn every_script_that_comes_with_the_crate_can_be_read() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts");
        let mut read = 0;
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if let Err(error) = Script::parse(&std::fs::read_to_string(&path).unwrap()) {
                panic!("{}: {error:?}", path.display());
            }
            read += 1;
        }
        assert!(read > 0, "no script in {directory}");
    }

    #[test]
    fn a_block_may_be_written_short() {
        let script = Script::parse(
            r#"{"otherwise": {"blocks": ["a", {"text": "b"}, {"thinking": "c"}, {"subagent": "go", "background": true, "model": "sonnet"}]}}"#,
        )
        .unwrap();
        let kinds: Vec<_> = script.otherwise.blocks.iter().map(Block::kind).collect();
        assert_eq!(kinds, ["text", "text", "thinking", "tool_use"]);
        let Block::ToolUse { name, input } = &script.otherwise.blocks[3] else { panic!("not a tool") };
        assert_eq!(
            (name.as_str(), Value::Object(input.clone())),
            (
                "Agent",
                serde_json::json!({"description": "go", "prompt": "go", "subagent_type": "general-purpose", "run_in_background": true, "model": "sonnet"})
            )
        );
    }

    #[test]
    fn a_mistake_is_told_with_its_place_and_its_remedy() {
        for (json, told) in [
            (r#"{"rules": ["#, "EOF while parsing a list at line 1 column 11"),
            (
                r#"{"rulez": []}"#,
                "unknown field `rulez`, expected one of `about`, `defaults`, `rules`, `otherwise` at line 1 column 8",
            ),
            (
                r#"{"rules": [{"when": {"agent": "boss"}, "reply": {}}]}"#,
                "unknown variant `boss`, expected one of `main`, `subagent`, `other`",
            ),
            (r#"{"rules": [{"times": 0, "reply": {}}]}"#, "rules[0].times: a rule that may never answer"),
            (r#"{"otherwise": {"blocks": [{"tool": "Bash"}]}}"#, r#"in block {"tool":"Bash"}: missing field `input`"#),
            (r#"{"otherwise": {"blocks": [7]}}"#, "7 is no block; write a string, or"),
            (r#"{"otherwise": {"status": 529, "blocks": ["a"]}}"#, "otherwise: an HTTP error has no blocks"),
            (r#"{"otherwise": {"status": 200}}"#, "give 400 to 599"),
            (r#"{"otherwise": {"cut": "in_text", "cut_after_events": 3}}"#, "two cuts"),
            (r#"{"defaults": {"pace": {"chunk": 0}}}"#, "defaults.pace.chunk: no characters per delta"),
            (
                r#"{"defaults": {"usage": {"cache_creation_input_tokens": 3, "cache_creation": {"ephemeral_5m_input_tokens": 2}}}}"#,
                "is not the sum",
            ),
        ] {
            let refusal = refusal(json);
            assert!(refusal.contains(told), "{json}\n  says {refusal}\n  not {told}");
        }
    }

    #[test]
    fn a_rule_used_up_falls_through_to_the_next() {
        let script = Script::parse(
            r#"{"rules": [{"times": 2, "reply": {"blocks": ["a"]}}, {"when": {"agent": "subagent"}, "reply": {"blocks": ["b"]}}]}"#,
        )
        .unwrap();
        let (main, subagent) = (Request::default(), Request { agent: Agent::Subagent, ..Request::default() });
        let at = Position { nth: 1, attempt: 1 };
        let mut used = vec![0; 2];
        let chosen: Vec<_> =
            [&main, &subagent, &main, &subagent].into_iter().map(|request| script.choose(request, at, &mut used).0).collect();
        assert_eq!(chosen, [Some(0), Some(0), None, Some(1)]);
    }
}

//! A reply as the API words it: a list of server-sent events, or one JSON message. No I/O, no clock.

use serde_json::{Map, Value, json};

use crate::script::{Block, Cut, Reply, Usage};

/// One event on its way to a client.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Event {
    pub(crate) data: Value,
    /// Part of a longer text: the pace of chunks applies.
    pub(crate) paced: bool,
    /// What the client has been told, once this is sent.
    pub(crate) usage: Option<Usage>,
}

/// Unique for a server: what the ids of an answer are made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ids {
    pub(crate) server: u64,
    pub(crate) n: u64,
}

impl Ids {
    pub(crate) fn message(self) -> String {
        format!("msg_01{:012x}{:08}", self.server, self.n)
    }

    pub(crate) fn request(self) -> String {
        format!("req_01{:012x}{:08}", self.server, self.n)
    }

    fn tool(self, server_side: bool, block: usize) -> String {
        let prefix = if server_side { "srvtoolu" } else { "toolu" };
        format!("{prefix}_01{:012x}{:06}{block:02}", self.server, self.n)
    }
}

/// What `reply` says to a request for `model`.
pub(crate) struct Answer<'a> {
    pub(crate) reply: &'a Reply,
    pub(crate) usage: &'a Usage,
    pub(crate) model: &'a str,
    /// The user's words that it answers.
    pub(crate) prompt: &'a str,
    pub(crate) ids: Ids,
}

impl Answer<'_> {
    pub(crate) fn stop_reason(&self) -> &str {
        let tool = || self.reply.blocks.iter().any(|block| matches!(block, Block::ToolUse { .. }));
        match &self.reply.stop_reason {
            Some(reason) => reason,
            None if tool() => "tool_use",
            None => "end_turn",
        }
    }

    /// The answer to `stream: false`.
    pub(crate) fn message(&self) -> Value {
        let mut message = self.head();
        message["content"] = self.blocks().into_iter().map(|block| block.whole).collect();
        message["stop_reason"] = self.stop_reason().into();
        message["usage"] = json!(self.usage);
        message
    }

    /// The answer to `stream: true`, with texts and tool inputs in deltas of `chunk` characters.
    pub(crate) fn events(&self, chunk: usize) -> Vec<Event> {
        let plain = |data| Event { data, paced: false, usage: None };
        // The API counts the first token when it starts, and says the rest at the end.
        let start = Usage { output_tokens: self.usage.output_tokens.min(1), server_tool_use: None, ..self.usage.clone() };
        let mut message = self.head();
        message["usage"] = json!(start);
        let mut events = vec![
            Event { usage: Some(start), ..plain(json!({"type": "message_start", "message": message})) },
            plain(json!({"type": "ping"})),
        ];
        for (index, block) in self.blocks().into_iter().enumerate() {
            events.push(plain(json!({"type": "content_block_start", "index": index, "content_block": block.start})));
            for part in chunks(&block.text, chunk) {
                let delta = json!({"type": block.delta, block.field: part});
                events
                    .push(Event { paced: true, ..plain(json!({"type": "content_block_delta", "index": index, "delta": delta})) });
            }
            if block.delta == "thinking_delta" {
                let delta = json!({"type": "signature_delta", "signature": "c2lnbmVk"});
                events.push(plain(json!({"type": "content_block_delta", "index": index, "delta": delta})));
            }
            events.push(plain(json!({"type": "content_block_stop", "index": index})));
        }
        let delta = json!({"stop_reason": self.stop_reason(), "stop_sequence": null});
        let mut end = json!({"type": "message_delta", "delta": delta, "usage": self.usage});
        // Prices of a place, a tier or a speed are said once, at the start.
        for once in ["inference_geo", "service_tier", "speed", "cache_creation"] {
            end["usage"].as_object_mut().expect("usage is an object").remove(once);
        }
        events.push(Event { usage: Some(self.usage.clone()), ..plain(end) });
        events.push(plain(json!({"type": "message_stop"})));
        events
    }

    fn head(&self) -> Value {
        let model = self.reply.model.as_deref().unwrap_or(self.model);
        json!({"id": self.ids.message(), "type": "message", "role": "assistant", "model": model, "content": [],
               "stop_reason": null, "stop_sequence": null})
    }

    fn blocks(&self) -> Vec<Wire> {
        let mut wires = Vec::new();
        for (n, block) in self.reply.blocks.iter().enumerate() {
            match block {
                Block::Text(text) => wires.push(Wire {
                    whole: json!({"type": "text", "text": text}),
                    start: json!({"type": "text", "text": ""}),
                    delta: "text_delta",
                    field: "text",
                    text: text.clone(),
                }),
                Block::Thinking(text) => wires.push(Wire {
                    whole: json!({"type": "thinking", "thinking": text, "signature": "c2lnbmVk"}),
                    start: json!({"type": "thinking", "thinking": "", "signature": ""}),
                    delta: "thinking_delta",
                    field: "thinking",
                    text: text.clone(),
                }),
                Block::ToolUse { name, input } => {
                    let input = input.iter().map(|(key, value)| (key.clone(), filled(value, self.prompt))).collect();
                    wires.push(tool("tool_use", &self.ids.tool(false, n), name, &input));
                }
                Block::WebSearch(query) => {
                    let id = self.ids.tool(true, n);
                    let input = Map::from_iter([("query".to_owned(), Value::from(query.as_str()))]);
                    wires.push(tool("server_tool_use", &id, "web_search", &input));
                    let page = json!({"type": "web_search_result", "title": "A page", "url": "https://example.com/", "encrypted_content": "eA==", "page_age": null});
                    let found = json!({"type": "web_search_tool_result", "tool_use_id": id, "content": [page]});
                    wires.push(Wire { whole: found.clone(), start: found, delta: "", field: "", text: String::new() });
                }
            }
        }
        wires
    }
}

/// A block as it goes over the wire: whole, or a start and the text of its deltas.
struct Wire {
    whole: Value,
    start: Value,
    delta: &'static str,
    field: &'static str,
    text: String,
}

fn tool(kind: &str, id: &str, name: &str, input: &Map<String, Value>) -> Wire {
    Wire {
        whole: json!({"type": kind, "id": id, "name": name, "input": input}),
        start: json!({"type": kind, "id": id, "name": name, "input": {}}),
        delta: "input_json_delta",
        field: "partial_json",
        text: Value::Object(input.clone()).to_string(),
    }
}

/// `{{word after TEXT}}` in a tool's input is what a user asks for: the word that follows TEXT in the prompt, or nothing.
fn filled(value: &Value, prompt: &str) -> Value {
    match value {
        Value::String(text) => {
            let mut pieces = text.split("{{word after ");
            let mut whole = pieces.next().unwrap_or_default().to_owned();
            for piece in pieces {
                let (before, rest) = piece.split_once("}}").unwrap_or((piece, ""));
                let word = prompt.split_once(before).and_then(|(_, after)| after.split_whitespace().next());
                whole.push_str(word.unwrap_or_default());
                whole.push_str(rest);
            }
            whole.into()
        }
        Value::Array(values) => values.iter().map(|value| filled(value, prompt)).collect(),
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| (key.clone(), filled(value, prompt))).collect::<Map<_, _>>().into()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}

fn chunks(text: &str, size: usize) -> Vec<String> {
    let mut chunks = Vec::new();
    let mut rest = text.chars().peekable();
    while rest.peek().is_some() {
        chunks.push(rest.by_ref().take(size).collect());
    }
    chunks
}

/// How many of the events are sent before the cut that `reply` asks for, if any.
pub(crate) fn cut_at(reply: &Reply, events: &[Event]) -> Option<usize> {
    let kind = |event: &Event| event.data["type"].as_str().unwrap_or_default().to_owned();
    let after = |wanted: &str| events.iter().position(|event| kind(event) == wanted).map_or(events.len(), |at| at + 1);
    let cut = match reply.cut {
        Some(cut) => cut,
        None => return reply.cut_after_events,
    };
    Some(match cut {
        Cut::BeforeAny => 0,
        Cut::InText => after("content_block_delta"),
        Cut::AfterBlock => after("content_block_stop"),
        Cut::AfterTool => {
            let tool = events.iter().position(|event| event.data["content_block"]["type"] == "tool_use");
            let rest = tool.unwrap_or(events.len());
            events[rest..].iter().position(|event| kind(event) == "content_block_stop").map_or(events.len(), |at| rest + at + 1)
        }
        Cut::AfterDelta => after("message_delta"),
    })
}

/// What the API calls the error of a status.
pub(crate) fn error_type(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        529 => "overloaded_error",
        _ => "api_error",
    }
}

/// The body, or the event, that tells of an error.
pub(crate) fn error(kind: &str, request_id: &str) -> Value {
    json!({"type": "error", "error": {"type": kind, "message": "as the script says"}, "request_id": request_id})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Script;

    fn events(otherwise: &str) -> (Reply, Vec<Event>) {
        let script = Script::parse(&format!(r#"{{"otherwise": {otherwise}}}"#)).unwrap();
        let reply = script.otherwise;
        let usage = reply.usage.clone().unwrap_or_default();
        let answer =
            Answer { reply: &reply, usage: &usage, model: "m", prompt: "create a.txt now", ids: Ids { server: 1, n: 2 } };
        let events = answer.events(4);
        (reply, events)
    }

    fn outline(events: &[Event]) -> Vec<String> {
        let brief = |data: &Value| match data["type"].as_str().unwrap() {
            "content_block_delta" => format!("{} {}", data["index"], data["delta"]),
            "content_block_start" => format!("{} {}", data["index"], data["content_block"]["type"]),
            "message_delta" => format!("{} {}", data["delta"]["stop_reason"], data["usage"]),
            other => other.to_owned(),
        };
        events.iter().map(|event| brief(&event.data)).collect()
    }

    #[test]
    fn an_answer_is_told_in_the_events_of_the_api() {
        let (_, events) = events(
            r#"{"blocks": [{"thinking": "hm"}, "hellö there", {"tool": "Bash", "input": {"a": 1}}],
                "usage": {"input_tokens": 3, "output_tokens": 9, "cache_creation": {"ephemeral_1h_input_tokens": 5}, "service_tier": "standard"}}"#,
        );
        assert_eq!(
            outline(&events),
            [
                "message_start",
                "ping",
                r#"0 "thinking""#,
                r#"0 {"thinking":"hm","type":"thinking_delta"}"#,
                r#"0 {"signature":"c2lnbmVk","type":"signature_delta"}"#,
                "content_block_stop",
                r#"1 "text""#,
                r#"1 {"text":"hell","type":"text_delta"}"#,
                r#"1 {"text":"ö th","type":"text_delta"}"#,
                r#"1 {"text":"ere","type":"text_delta"}"#,
                "content_block_stop",
                r#"2 "tool_use""#,
                r#"2 {"partial_json":"{\"a\"","type":"input_json_delta"}"#,
                r#"2 {"partial_json":":1}","type":"input_json_delta"}"#,
                "content_block_stop",
                r#""tool_use" {"cache_creation_input_tokens":5,"cache_read_input_tokens":0,"input_tokens":3,"output_tokens":9}"#,
                "message_stop",
            ]
        );
        let usage = &events[0].data["message"]["usage"];
        assert_eq!((&usage["output_tokens"], &usage["cache_creation"]["ephemeral_1h_input_tokens"]), (&json!(1), &json!(5)));
    }

    #[test]
    fn a_tool_is_given_what_the_prompt_names() {
        for (value, expected) in [
            (json!("touch {{word after create }} && ls"), json!("touch a.txt && ls")),
            (json!([{"path": "{{word after create }}{{word after a.txt }}"}, 1]), json!([{"path": "a.txtnow"}, 1])),
            (json!("{{word after delete }}"), json!("")),
            (json!("${HOME} {{x}}"), json!("${HOME} {{x}}")),
        ] {
            assert_eq!(filled(&value, "create a.txt now"), expected);
        }
        let (_, events) = events(r#"{"blocks": [{"tool": "Write", "input": {"file_path": "{{word after create }}"}}]}"#);
        let parts = events.iter().filter_map(|event| event.data["delta"]["partial_json"].as_str()).collect::<String>();
        assert_eq!(parts, r#"{"file_path":"a.txt"}"#);
    }

    #[test]
    fn a_cut_comes_where_the_script_says() {
        for (cut, left) in [
            (r#""cut": "before_any""#, None),
            (r#""cut": "in_text""#, Some("content_block_delta")),
            (r#""cut": "after_block""#, Some("content_block_stop")),
            (r#""cut": "after_tool""#, Some("content_block_stop")),
            (r#""cut": "after_delta""#, Some("message_delta")),
            (r#""cut_after_events": 2"#, Some("ping")),
        ] {
            let (reply, events) = events(&format!(r#"{{"blocks": ["abcdefgh", {{"tool": "Bash", "input": {{}}}}], {cut}}}"#));
            let at = cut_at(&reply, &events).unwrap();
            let last = at.checked_sub(1).map(|last| events[last].data["type"].as_str().unwrap());
            assert_eq!(last, left, "{cut}");
            if cut.contains("after_tool") {
                assert_eq!(events[at - 1].data["index"], 1, "the block of the tool, not the first one");
            }
        }
    }
}

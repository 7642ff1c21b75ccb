//! What a client asked: the little of a `POST /v1/messages` that rules and the log need.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Who of a session asks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Agent {
    /// The main loop.
    #[default]
    Main,
    /// An agent that the main loop, or another one, started.
    Subagent,
    /// A call inside a tool (a web search), or a client that names no session.
    Other,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Request {
    pub(crate) model: String,
    pub(crate) stream: bool,
    pub(crate) agent: Agent,
    pub(crate) session: String,
    /// Session and agent: what counts requests of its own.
    pub(crate) conversation: String,
    pub(crate) messages: u32,
    pub(crate) tools: u32,
    /// User messages so far.
    pub(crate) turn: u32,
    /// Tool results since the last of them.
    pub(crate) results: u32,
    /// The last user message.
    pub(crate) prompt: String,
    /// All that came after the last answer of the model.
    pub(crate) last: String,
}

impl Request {
    /// `header` looks up a header by its name in lower case.
    pub(crate) fn read(body: &Value, header: impl Fn(&str) -> Option<String>) -> Self {
        let list = |key: &str| body[key].as_array().map_or(&[][..], Vec::as_slice);
        let session = header("x-claude-code-session-id").or_else(|| session_in(&body["metadata"]["user_id"]));
        let agent_id = header("x-claude-code-agent-id");
        let marked =
            list("system").iter().any(|block| block["text"].as_str().is_some_and(|text| text.contains("cc_is_subagent=true")));
        let searches = list("tools").iter().any(|tool| tool["type"].as_str().is_some_and(|kind| kind.starts_with("web_search")));
        let agent = match &session {
            _ if searches => Agent::Other,
            None => Agent::Other,
            Some(_) if marked || agent_id.is_some() => Agent::Subagent,
            Some(_) => Agent::Main,
        };
        let session = session.unwrap_or_default();
        let mut request = Self {
            model: body["model"].as_str().unwrap_or_default().to_owned(),
            stream: body["stream"].as_bool().unwrap_or(false),
            agent,
            conversation: format!("{session}/{agent:?}/{}", agent_id.unwrap_or_default()),
            session,
            messages: count(list("messages").len()),
            tools: count(list("tools").len()),
            ..Self::default()
        };
        for message in list("messages") {
            request.add(message);
        }
        request
    }

    fn add(&mut self, message: &Value) {
        if message["role"] == "assistant" {
            self.last.clear();
            return;
        }
        let from_user = message["role"] == "user";
        let mut prompt = None;
        let mut results = 0;
        each_text(&message["content"], &mut |kind, text| {
            self.last.push_str(text);
            self.last.push('\n');
            match kind {
                "tool_result" => results += 1,
                "text" if from_user && is_prompt(text) => prompt = Some(text.to_owned()),
                _ => {}
            }
        });
        if let Some(prompt) = prompt {
            self.turn += 1;
            self.prompt = prompt;
            self.results = 0;
        }
        self.results += results;
    }
}

/// Clients put reminders, notices and the output of their own commands among the user's words, mostly in angle brackets.
fn is_prompt(text: &str) -> bool {
    !text.starts_with('<') && !text.starts_with("[Request interrupted")
}

/// Calls `f` with each block's type and text; what a tool result holds counts as one text.
fn each_text(content: &Value, f: &mut dyn FnMut(&str, &str)) {
    match content {
        Value::String(text) => f("text", text),
        Value::Array(blocks) => {
            for block in blocks {
                match block["type"].as_str() {
                    Some("tool_result") => {
                        let mut inner = String::new();
                        each_text(&block["content"], &mut |_, text| inner.push_str(text));
                        f("tool_result", &inner);
                    }
                    Some(kind) => f(kind, block["text"].as_str().unwrap_or_default()),
                    None => {}
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => {}
    }
}

/// `metadata.user_id` is a JSON text with a session in it, or, of older clients, ends in `_session_ID`.
fn session_in(user_id: &Value) -> Option<String> {
    let user_id = user_id.as_str()?;
    match serde_json::from_str::<Value>(user_id) {
        Ok(json) => json["session_id"].as_str().map(str::to_owned),
        Err(_) => user_id.rsplit_once("_session_").map(|(_, session)| session.to_owned()),
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn user_id() -> Value {
        json!({"user_id": r#"{"device_id":"d","session_id":"s1"}"#})
    }

    #[test]
    fn turns_and_results_are_counted_from_the_users_words() {
        let body = json!({"model": "claude-opus-5-5", "stream": true, "metadata": user_id(), "messages": [
            {"role": "user", "content": [{"type": "text", "text": "<system-reminder>x"}, {"type": "text", "text": "first"}]},
            {"role": "system", "content": "# Environment"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "Bash", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "out"}]},
            {"role": "assistant", "content": "done"},
            {"role": "user", "content": "second"},
            {"role": "assistant", "content": []},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "u", "content": [{"type": "text", "text": "one"}]},
                {"type": "tool_result", "tool_use_id": "v", "content": "two"},
                {"type": "text", "text": "<system-reminder>y"}]},
        ]});
        let request = Request::read(&body, |_| None);
        assert_eq!((request.turn, request.results, request.prompt.as_str()), (2, 2, "second"));
        assert_eq!(request.last, "one\ntwo\n<system-reminder>y\n");
        assert_eq!((request.agent, request.session.as_str(), request.messages), (Agent::Main, "s1", 8));
    }

    #[test]
    fn a_subagent_is_known_by_its_header_and_a_search_by_its_tool() {
        let header = |name: &str| (name == "x-claude-code-agent-id").then(|| "a1".to_owned());
        let body = json!({"metadata": user_id(), "messages": []});
        assert_eq!(Request::read(&body, header).agent, Agent::Subagent);
        let marked = json!({"metadata": user_id(), "system": [{"type": "text", "text": "cc_version=2; cc_is_subagent=true;"}]});
        assert_eq!(Request::read(&marked, |_| None).agent, Agent::Subagent);
        let search = json!({"metadata": user_id(), "tools": [{"type": "web_search_20250305", "name": "web_search"}]});
        assert_eq!(Request::read(&search, header).agent, Agent::Other);
        assert_eq!(Request::read(&json!({}), |_| None).agent, Agent::Other);
    }
}

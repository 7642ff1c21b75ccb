//! What a client is told: server-sent events, with messages in the form of the SDK or as the CLI says them.

use hyper::body::Bytes;
use serde_json::{Map, Value, json};

/// How messages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// As the Python SDK names and flattens them: what the hosting cookbook's server sends.
    Sdk,
    /// The CLI's own line, byte for byte: the TypeScript SDK's messages.
    Cli,
}

/// An event; `data` has no line feed in it.
pub(super) fn event(name: &str, data: &[u8]) -> Bytes {
    [b"event: ", name.as_bytes(), b"\ndata: ", data, b"\n\n"].concat().into()
}

pub(super) fn done() -> Bytes {
    event("done", b"")
}

pub(super) fn error(message: &str) -> Bytes {
    event("error", json!({"message": message}).to_string().as_bytes())
}

/// Nothing, for whoever would close a connection on which nothing is said.
pub(super) fn nothing() -> Bytes {
    Bytes::from_static(b": keep-alive\n\n")
}

/// What a line is told as, if it is told at all: control requests and what no SDK knows are not.
pub(super) fn message(form: Form, line: &[u8], value: &Value) -> Option<Bytes> {
    let kind = value["type"].as_str()?;
    if kind.starts_with("control_") || kind == "keep_alive" || kind == "transcript_mirror" {
        return None;
    }
    match form {
        Form::Cli => Some(event("message", line)),
        Form::Sdk => Some(event("message", sdk(kind, value)?.to_string().as_bytes())),
    }
}

/// The dataclass of the SDK, by its name. Fields that it does not know stay; those that it always has are there.
fn sdk(kind: &str, value: &Value) -> Option<Value> {
    let of = |name: &str, mut fields: Map<String, Value>, always: &[&str]| {
        for field in always {
            fields.entry(*field).or_insert(Value::Null);
        }
        fields.insert(String::from("type"), name.into());
        Value::Object(fields)
    };
    let mut fields = value.as_object()?.clone();
    Some(match kind {
        "system" => json!({"type": "SystemMessage", "subtype": value["subtype"], "data": value}),
        "assistant" => {
            let message = fields.remove("message")?;
            for (field, from) in [
                ("content", "content"),
                ("model", "model"),
                ("usage", "usage"),
                ("message_id", "id"),
                ("stop_reason", "stop_reason"),
            ] {
                fields.insert(field.to_owned(), message[from].clone());
            }
            of("AssistantMessage", fields, &["parent_tool_use_id", "error", "session_id", "uuid"])
        }
        "user" => {
            let content = fields.remove("message")?["content"].take();
            fields.insert(String::from("content"), content);
            of("UserMessage", fields, &["uuid", "parent_tool_use_id", "tool_use_result"])
        }
        "result" => {
            let models = fields.remove("modelUsage").unwrap_or_default();
            fields.insert(String::from("model_usage"), models);
            let always =
                ["stop_reason", "total_cost_usd", "usage", "result", "structured_output", "permission_denials", "errors", "uuid"];
            of("ResultMessage", fields, &always)
        }
        "stream_event" => of("StreamEvent", fields, &["parent_tool_use_id"]),
        "rate_limit_event" => of("RateLimitEvent", fields, &[]),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(form: Form, value: &Value) -> Option<String> {
        let line = value.to_string();
        Some(String::from_utf8(message(form, line.as_bytes(), value)?.to_vec()).unwrap())
    }

    #[test]
    fn messages_have_the_names_and_fields_of_the_sdk() {
        let parsed = |value: Value| -> Value {
            let text = told(Form::Sdk, &value).unwrap();
            serde_json::from_str(text.strip_prefix("event: message\ndata: ").unwrap()).unwrap()
        };
        let init = json!({"type": "system", "subtype": "init", "session_id": "s"});
        assert_eq!(parsed(init.clone()), json!({"type": "SystemMessage", "subtype": "init", "data": init}));
        let content = json!([{"type": "text", "text": "hi"}]);
        let answer = json!({"type": "assistant", "message": {"id": "m", "model": "o", "content": content, "usage": {"input_tokens": 1}},
            "session_id": "s"});
        let expected = json!({"type": "AssistantMessage", "content": content, "model": "o", "usage": {"input_tokens": 1}, "message_id": "m",
            "stop_reason": null, "parent_tool_use_id": null, "error": null, "session_id": "s", "uuid": null});
        assert_eq!(parsed(answer), expected);
        let user = json!({"type": "user", "message": {"role": "user", "content": "x"}, "uuid": "u"});
        let expected =
            json!({"type": "UserMessage", "content": "x", "uuid": "u", "parent_tool_use_id": null, "tool_use_result": null});
        assert_eq!(parsed(user), expected);
        let result =
            parsed(json!({"type": "result", "subtype": "success", "result": "r", "modelUsage": {"o": {}}, "num_turns": 1}));
        assert_eq!(
            (&result["type"], &result["model_usage"], &result["result"], &result["errors"]),
            (&json!("ResultMessage"), &json!({"o": {}}), &json!("r"), &Value::Null)
        );
    }

    #[test]
    fn what_is_between_the_cli_and_its_host_is_told_to_nobody() {
        for kind in ["control_request", "control_response", "control_cancel_request", "keep_alive"] {
            assert_eq!(told(Form::Cli, &json!({"type": kind})), None);
            assert_eq!(told(Form::Sdk, &json!({"type": kind})), None);
        }
        assert_eq!(told(Form::Sdk, &json!({"type": "of_tomorrow"})), None);
        assert_eq!(
            told(Form::Cli, &json!({"type": "of_tomorrow"})).unwrap(),
            "event: message\ndata: {\"type\":\"of_tomorrow\"}\n\n"
        );
        assert_eq!(&done()[..], b"event: done\ndata: \n\n");
    }
}

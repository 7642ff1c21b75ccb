//! A server and a client over a real socket.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::{Log, Script, Server, Tokens};

/// Runs `client` against a server with `script`; what it returns, and what was served.
fn with<T>(script: &str, client: impl AsyncFnOnce(SocketAddr) -> T) -> (T, Log) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let server = Server::bind(([127, 0, 0, 1], 0).into(), Script::parse(script).unwrap()).await.unwrap();
        let (at, log) = (server.local_addr(), server.log());
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = tokio::spawn(server.run(async { drop(stopped.await) }));
        let result = client(at).await;
        stop.send(()).unwrap();
        server.await.unwrap();
        (result, log)
    })
}

fn question(stream: bool) -> Value {
    json!({"model": "claude-opus-5-5", "stream": stream, "max_tokens": 9, "metadata": {"user_id": "{\"session_id\":\"s\"}"},
           "messages": [{"role": "user", "content": "hi"}]})
}

/// The whole answer, and the error that ended it, if any.
async fn ask(at: SocketAddr, method: &str, path: &str, body: &Value) -> (String, Option<std::io::ErrorKind>) {
    let body = body.to_string();
    let mut stream = TcpStream::connect(at).await.unwrap();
    let request =
        format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let end = stream.read_to_end(&mut answer).await.err().map(|error| error.kind());
    (String::from_utf8(answer).unwrap(), end)
}

const USAGE: &str = r#"{"input_tokens": 3, "output_tokens": 7, "cache_read_input_tokens": 5,
    "cache_creation": {"ephemeral_5m_input_tokens": 1, "ephemeral_1h_input_tokens": 2}, "server_tool_use": {"web_search_requests": 4}}"#;

#[test]
fn what_is_served_is_counted_streamed_or_not() {
    let script = format!(r#"{{"otherwise": {{"blocks": ["hello"], "usage": {USAGE}}}}}"#);
    let ((streamed, whole), log) = with(&script, async |at| {
        let streamed = ask(at, "POST", "/v1/messages?beta=true", &question(true)).await.0;
        (streamed, ask(at, "POST", "/v1/messages", &question(false)).await.0)
    });
    assert!(streamed.contains("\r\nrequest-id: req_"), "{streamed}");
    assert!(streamed.contains("event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"), "{streamed}");
    let message: Value = serde_json::from_str(whole.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(message["content"], json!([{"type": "text", "text": "hello"}]));
    let twice = Tokens { input: 6, output: 14, cache_read: 10, cache_write_5m: 2, cache_write_1h: 4, web_search_requests: 8 };
    assert_eq!(log.served(), [("claude-opus-5-5".to_owned(), twice)].into());
}

#[test]
fn a_fault_is_over_when_its_times_are() {
    let script = r#"{"rules": [{"times": 1, "reply": {"status": 529, "headers": {"retry-after": "1"}}}], "otherwise": {"blocks": ["ok"]}}"#;
    let ((first, second), log) = with(script, async |at| {
        let first = ask(at, "POST", "/v1/messages", &question(true)).await.0;
        (first, ask(at, "POST", "/v1/messages", &question(true)).await.0)
    });
    assert!(
        first.starts_with("HTTP/1.1 529") && first.contains("retry-after: 1") && first.contains("overloaded_error"),
        "{first}"
    );
    assert!(second.starts_with("HTTP/1.1 200"), "{second}");
    assert_eq!((log.asked(), log.served().len()), (2, 1));
}

#[test]
fn a_cut_answer_is_counted_as_far_as_it_was_told() {
    let script = format!(r#"{{"otherwise": {{"blocks": ["hello"], "cut": "in_text", "usage": {USAGE}}}}}"#);
    let ((answer, _), log) = with(&script, async |at| ask(at, "POST", "/v1/messages", &question(true)).await);
    assert!(answer.contains("text_delta") && !answer.contains("message_delta"), "{answer}");
    assert!(!answer.ends_with("0\r\n\r\n"), "the end of the body must be missing: {answer}");
    assert_eq!(log.served()["claude-opus-5-5"].output, 1);
}

#[test]
fn a_reset_is_a_reset() {
    for script in [r#"{"otherwise": {"reset": true}}"#, r#"{"otherwise": {"blocks": ["a"], "cut": "in_text", "reset": true}}"#] {
        let ((_, end), _) = with(script, async |at| ask(at, "POST", "/v1/messages", &question(true)).await);
        assert_eq!(end, Some(std::io::ErrorKind::ConnectionReset), "{script}");
    }
}

#[test]
fn every_request_leaves_a_line_also_when_the_client_did_not_wait() {
    let path = std::env::temp_dir().join(format!("messages-api-{}.jsonl", std::process::id()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let script = r#"{"rules": [{"about": "never", "times": 1, "reply": {"hang": true}}], "otherwise": {"blocks": ["a"]}}"#;
        let server = Server::bind(([127, 0, 0, 1], 0).into(), Script::parse(script).unwrap()).await.unwrap();
        let at = server.local_addr();
        let client = async {
            let hung = tokio::time::timeout(Duration::from_millis(200), ask(at, "POST", "/v1/messages", &question(true))).await;
            assert!(hung.is_err(), "the script says to hang");
            ask(at, "POST", "/v1/messages", &question(true)).await;
            ask(at, "HEAD", "/", &Value::Null).await;
        };
        server.with_log(Log::to_file(&path).unwrap()).run(client).await;
    });
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<_> = lines
        .iter()
        .map(|line| json!([line["n"], line["action"]["kind"], line["about"], line["client_gone"], line["status"]]))
        .collect();
    assert_eq!(told, [json!([1, "hang", "never", true, null]), json!([2, "answer", null, false, 200])]);
}

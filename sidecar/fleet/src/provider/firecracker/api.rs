//! One Firecracker process, as its socket answers: one request a connection, each with a bound.

use std::path::Path;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use hyper::client::conn::http1;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

/// It answers with its own words, which are few.
const ANSWER_MOST: usize = 1 << 20;
const SAID_MOST: usize = 400;

/// Why there is no answer, or not the one that was wanted.
#[derive(Debug)]
pub(super) enum Fault {
    /// Nobody has heard it.
    Unreached(String),
    /// It was heard, and nothing came back.
    Lost(String),
    /// It was refused, in Firecracker's words.
    Said(u16, String),
}

/// Asks, and has the answer: nothing for `204`.
pub(super) async fn call(
    socket: &Path,
    method: Method,
    path: &str,
    body: Option<&Value>,
    most: Duration,
) -> Result<Value, Fault> {
    let late = || Fault::Lost(format!("{path}: no answer within {} s", most.as_secs()));
    match tokio::time::timeout(most, asked(socket, method, path, body)).await {
        Ok(answered) => answered,
        Err(_) => Err(late()),
    }
}

async fn asked(socket: &Path, method: Method, path: &str, body: Option<&Value>) -> Result<Value, Fault> {
    let unreached = |error: &dyn std::fmt::Display| Fault::Unreached(format!("{path}: {error}"));
    let lost = |error: &dyn std::fmt::Display| Fault::Lost(format!("{path}: {error}"));
    let stream = UnixStream::connect(socket).await.map_err(|error| unreached(&error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreached(&error))?;
    // It ends with us.
    let mut driver = tokio::task::JoinSet::new();
    driver.spawn(connection);
    let request = Request::builder().method(method).uri(path).header(header::HOST, "localhost");
    let request = request.header(header::ACCEPT, "application/json");
    let request = match body {
        Some(body) => request.header(header::CONTENT_TYPE, "application/json").body(Body::from(body.to_string())),
        None => request.body(Body::empty()),
    };
    let request = request.map_err(|error| unreached(&error))?;
    let answer = sender.send_request(request).await.map_err(|error| lost(&error))?;
    let status = answer.status();
    let body = to_bytes(Body::new(answer.into_body()), ANSWER_MOST).await.map_err(|error| lost(&error))?;
    if status.is_success() {
        return match body.is_empty() {
            true => Ok(Value::Null),
            false => serde_json::from_slice(&body).map_err(|error| lost(&error)),
        };
    }
    let said = serde_json::from_slice::<Value>(&body).ok();
    let said = said.as_ref().and_then(|said| said["fault_message"].as_str()).unwrap_or("it does not say why");
    Err(Fault::Said(status.as_u16(), format!("{path}: {}", cut(said))))
}

pub(super) fn cut(text: &str) -> String {
    let text = text.trim();
    match text.char_indices().nth(SAID_MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

//! The same over a WebSocket: a message is a text frame, each event is one, and messages that come while a turn is under way wait for their own.
//!
//! ```text
//!   {"prompt": "…"} ──► waiting (QUEUE at most) ──► the session's turn ──► {"event": "message", "data": {…}} … {"event": "done"}
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use hyper::body::{Bytes, Incoming};
use hyper::header::{
    CONNECTION, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE as UPGRADES,
};
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, StatusCode, Version};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use super::House;
use super::pages::{CLIENT, MESSAGE, OF_SESSION, Refused, prompt_of, refuse};
use crate::http::{Answer, reply};

/// Messages that wait for the turns before theirs.
const QUEUE: usize = 16;
/// Less than any proxy waits for a word; who has not said anything after so many of ours is gone.
const PING: Duration = Duration::from_secs(15);
const PINGS: u32 = 4;
/// What is still on its way from somebody who was told that this is the end is read, so far and so long: else they would see a reset.
const LATE: u64 = 16 << 20;
const LATE_FOR: Duration = Duration::from_secs(2);
/// What a key is answered with is made with this, by RFC 6455.
const MAGIC: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// One that was asked for, and whose session it is of.
pub(super) struct Asked {
    upgrade: OnUpgrade,
    id: String,
    /// Somebody passes it on who takes the answer to a ping for somebody's word, and would keep the container awake for it.
    passed_on: bool,
}

/// Whether a request is for a WebSocket: then what it is answered, and what comes of it.
pub(super) fn asked(request: &mut Request<Incoming>, id: &str) -> Result<(Answer, Asked), Refused> {
    let headers = request.headers();
    let connection = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let upgrades = connection.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case("upgrade"))
        && headers.get(UPGRADES).is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"));
    if request.method() != Method::GET || request.version() != Version::HTTP_11 || !upgrades {
        return Err(refuse(StatusCode::UPGRADE_REQUIRED, "this is for WebSockets").with(UPGRADES, "websocket"));
    }
    if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        let what = "WebSockets are spoken in version 13 alone";
        return Err(refuse(StatusCode::UPGRADE_REQUIRED, what).with(SEC_WEBSOCKET_VERSION, "13"));
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).map_or(&b""[..], |key| key.as_bytes());
    if key.len() != 24 || !key.ends_with(b"==") {
        return Err(refuse(StatusCode::BAD_REQUEST, "`Sec-WebSocket-Key` has 16 bytes in base64"));
    }
    let mut answer = reply(StatusCode::SWITCHING_PROTOCOLS, "application/json", Vec::new());
    let accept = HeaderValue::from_str(&accept(key)).expect("base64 is text");
    answer.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, accept);
    answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.headers_mut().insert(UPGRADES, HeaderValue::from_static("websocket"));
    Ok((
        answer,
        Asked { passed_on: request.headers().contains_key(OF_SESSION), upgrade: hyper::upgrade::on(request), id: id.to_owned() },
    ))
}

fn accept(key: &[u8]) -> String {
    let mut context = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(key);
    context.update(MAGIC);
    base64(context.finish().as_ref())
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let three = |chunk: &[u8]| {
        let n = chunk.iter().fold(0, |n, byte| n << 8 | usize::from(*byte)) << (8 * (3 - chunk.len()));
        let letter = |at: usize| if at <= chunk.len() { char::from(LETTERS[n >> (18 - 6 * at) & 63]) } else { '=' };
        [letter(0), letter(1), letter(2), letter(3)]
    };
    bytes.chunks(3).flat_map(three).collect()
}

impl Asked {
    /// To its end.
    pub(super) async fn serve(self, house: &Arc<House>) {
        let Ok(upgraded) = self.upgrade.await else { return };
        let config = WebSocketConfig::default()
            .read_buffer_size(4 << 10)
            .write_buffer_size(0)
            .max_message_size(Some(MESSAGE))
            .max_frame_size(Some(MESSAGE));
        let stream = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await;
        let mut socket = Socket { stream, waiting: VecDeque::new(), turn: None, passed_on: self.passed_on };
        let end = socket.talk(house, &self.id).await;
        socket.close(end).await;
    }
}

/// Why it ends.
enum End {
    /// They have said so, or are gone.
    Theirs,
    Ours(CloseCode, &'static str),
}

struct Socket<S> {
    stream: WebSocketStream<S>,
    waiting: VecDeque<String>,
    /// What is heard of the turn that is under way.
    turn: Option<mpsc::Receiver<Bytes>>,
    passed_on: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Socket<S> {
    async fn talk(&mut self, house: &Arc<House>, id: &str) -> End {
        let mut ping = tokio::time::interval_at(tokio::time::Instant::now() + PING, PING);
        let mut closing = house.closing.clone();
        let mut unheard = 0;
        loop {
            if self.turn.is_none() {
                if *closing.borrow() {
                    return End::Ours(CloseCode::Away, "this server ends");
                }
                if let Some(prompt) = self.waiting.pop_front() {
                    match house.begin(id, prompt) {
                        Ok(turn) => self.turn = Some(turn),
                        Err(refused) => match self.tell(refusal(&refused)).await {
                            Some(end) => return end,
                            None => continue,
                        },
                    }
                }
            }
            let works = self.turn.is_some();
            let turn = async {
                match &mut self.turn {
                    Some(turn) => turn.recv().await,
                    None => std::future::pending().await,
                }
            };
            let end = tokio::select! {
                heard = self.stream.next() => {
                    unheard = 0;
                    match self.hear(heard) {
                        Ok(None) => None,
                        Ok(Some(refused)) => self.tell(refused).await,
                        Err(end) => Some(end),
                    }
                }
                event = turn => match event {
                    Some(event) => self.tell(shown(&event)).await,
                    None => {
                        self.turn = None;
                        None
                    }
                },
                _ = ping.tick(), if works || !self.passed_on => {
                    unheard += 1;
                    if unheard > PINGS { Some(End::Theirs) } else { self.tell(Message::Ping(Bytes::new())).await }
                }
                _ = closing.changed(), if !works => None,
            };
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// What was said: nothing to answer, something, or the end.
    fn hear(&mut self, heard: Option<Result<Message, Error>>) -> Result<Option<Message>, End> {
        let said = match heard {
            Some(Ok(Message::Text(said))) => said,
            Some(Ok(Message::Binary(_))) => return Err(End::Ours(CloseCode::Unsupported, "a message is a text frame")),
            // A ping is answered by whoever reads.
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => return Ok(None),
            Some(Err(Error::Capacity(_))) => return Err(End::Ours(CloseCode::Size, "a message has a megabyte at most")),
            Some(Err(Error::Utf8(_))) => return Err(End::Ours(CloseCode::Invalid, "a text frame is UTF-8")),
            Some(Err(Error::Protocol(_))) => return Err(End::Ours(CloseCode::Protocol, "this is no WebSocket's frame")),
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(End::Theirs),
        };
        match prompt_of(said.as_bytes()) {
            Ok(_) if self.waiting.len() >= QUEUE => Err(End::Ours(CloseCode::Policy, "too many messages wait for their turn")),
            Ok(prompt) => {
                self.waiting.push_back(prompt);
                Ok(None)
            }
            Err(refused) => Ok(Some(refusal(&refused))),
        }
    }

    async fn tell(&mut self, what: Message) -> Option<End> {
        match timeout(CLIENT, self.stream.send(what)).await {
            Ok(Ok(())) => None,
            // One that takes nothing for too long, or has hung up.
            Ok(Err(_)) | Err(_) => Some(End::Theirs),
        }
    }

    async fn close(mut self, end: End) {
        // Nobody listens to the turn any more.
        self.turn = None;
        let closed = async {
            match end {
                // What they said is answered in kind: that is written already, but may not have left.
                End::Theirs => SinkExt::close(&mut self.stream).await,
                End::Ours(code, why) => self.stream.close(Some(CloseFrame { code, reason: Utf8Bytes::from_static(why) })).await,
            }
        };
        drop(timeout(CLIENT, closed).await);
        let mut late = self.stream.get_mut().take(LATE);
        drop(timeout(LATE_FOR, tokio::io::copy(&mut late, &mut tokio::io::sink())).await);
    }
}

/// An event as a frame: what is said in it is not touched.
fn shown(event: &Bytes) -> Message {
    let text = std::str::from_utf8(event).unwrap_or_default();
    let said = text.strip_prefix("event: ").and_then(|rest| rest.split_once("\ndata: "));
    match said.map(|(name, data)| (name, data.trim_end_matches('\n'))) {
        Some((name, "")) => Message::text(format!("{{\"event\":\"{name}\"}}")),
        Some((name, data)) => Message::text(format!("{{\"event\":\"{name}\",\"data\":{data}}}")),
        // Only there so that something is said.
        None => Message::Ping(Bytes::new()),
    }
}

fn refusal(refused: &Refused) -> Message {
    let data: Value = json!({"message": refused.message, "status": refused.status.as_u16()});
    Message::text(json!({"event": "error", "data": data}).to_string())
}

#[cfg(test)]
mod tests {
    use super::super::shape;
    use super::*;

    #[test]
    fn a_key_is_answered_as_the_rfc_says() {
        assert_eq!(accept(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(["", "f", "fo", "foo", "foob"].map(|text| base64(text.as_bytes())), ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg=="]);
    }

    #[test]
    fn what_is_said_is_the_same_in_a_frame() {
        let line = r#"{"type":"a",  "n":1.0}"#;
        assert_eq!(
            shown(&shape::event("message", line.as_bytes())),
            Message::text(format!(r#"{{"event":"message","data":{line}}}"#))
        );
        assert_eq!(shown(&shape::done()), Message::text(r#"{"event":"done"}"#));
        assert_eq!(shown(&shape::nothing()), Message::Ping(Bytes::new()));
    }
}

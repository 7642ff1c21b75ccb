//! What is asked over HTTP, by the contract of the hosting cookbook: `POST /sessions/{id}/messages`, `/health`, and what of them there is.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, AUTHORIZATION, HeaderName, HeaderValue, ORIGIN, RETRY_AFTER, WWW_AUTHENTICATE};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use serde_json::{Value, json};
use subtle::ConstantTimeEq;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::talk::State;
use super::{House, Refusal, socket};
use crate::http::{Answer, Body, reply};
use crate::hub::gate::{Peer, Token};
use crate::page;

/// Connections at once: each turn is one, and who waits for its answer is another.
const CONNECTIONS: usize = 512;
/// Of them, those that last, whoever says something on them.
const SOCKETS: usize = CONNECTIONS / 2;
/// What a fleet calls the session that it passes something on for.
pub(super) const OF_SESSION: &str = "agent-session";
/// A message is a text that somebody wrote, or pasted.
pub(super) const MESSAGE: usize = 1024 * 1024;
/// A client has this long to say what it wants, and to take something of the answer.
pub(super) const CLIENT: Duration = Duration::from_secs(30);

pub(super) async fn serve(listener: TcpListener, house: Arc<House>) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "sessions cannot be served"),
    };
    let mut open = Connections { open: VecDeque::new(), sockets: Arc::new(Semaphore::new(SOCKETS)) };
    loop {
        match listener.accept().await {
            Ok((stream, _)) => open.serve(stream, &house),
            // Out of descriptors, most likely the agents' doing.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Those that are open, oldest first.
struct Connections {
    open: VecDeque<Connection>,
    sockets: Arc<Semaphore>,
}

struct Connection {
    task: tokio::task::AbortHandle,
    /// A turn's events are sent on it, or it is a WebSocket.
    turn: Arc<AtomicBool>,
}

/// The WebSocket that a connection becomes, with its place among them.
type Next = Mutex<Option<(socket::Asked, OwnedSemaphorePermit)>>;

impl Connections {
    /// Where there are too many, the oldest without a turn has to go: a crowd that says nothing must not keep a probe out.
    fn serve(&mut self, stream: tokio::net::TcpStream, house: &Arc<House>) {
        self.open.retain(|connection| !connection.task.is_finished());
        if self.open.len() >= CONNECTIONS {
            let Some(oldest) = self.open.iter().position(|connection| !connection.turn.load(Relaxed)) else { return };
            self.open.remove(oldest).inspect(|connection| connection.task.abort());
        }
        // Of whoever takes nothing of what was sent, the kernel says that it has hung up.
        let within = u32::try_from(CLIENT.as_millis()).unwrap_or(u32::MAX);
        rustix::net::sockopt::set_tcp_user_timeout(&stream, within).ok();
        let Ok(from) = stream.peer_addr() else { return };
        let (house, turn) = (Arc::clone(house), Arc::new(AtomicBool::new(false)));
        let streams = Arc::clone(&turn);
        let room = Arc::clone(&self.sockets);
        let task = tokio::spawn(async move {
            let next = Mutex::new(None);
            let service = hyper::service::service_fn(|request: Request<Incoming>| {
                let (house, streams, room, next) = (Arc::clone(&house), Arc::clone(&streams), Arc::clone(&room), &next);
                async move {
                    let (line, peer) = ((&room, next), Peer::Tcp(from.ip()));
                    streams.store(house.is_moved_by(&request), Relaxed);
                    let mut answer = house.answer(request, line, peer).await.unwrap_or_else(Refused::answer);
                    let lasts = answer.status() == StatusCode::SWITCHING_PROTOCOLS;
                    streams.store(lasts || !matches!(answer.body(), Body::Whole(_)), Relaxed);
                    page::harden(&mut answer);
                    Ok::<_, Infallible>(answer)
                }
            });
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(CLIENT).max_buf_size(16 * 1024);
            // Whoever hangs up has hung up.
            builder.serve_connection(TokioIo::new(stream), service).with_upgrades().await.ok();
            let socket = next.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some((socket, _place)) = socket {
                socket.serve(&house).await;
            }
        });
        self.open.push_back(Connection { task: task.abort_handle(), turn });
    }
}

/// What is said to a session. What else stands there is nobody's.
#[derive(Deserialize)]
struct Message {
    prompt: String,
}

fn say(status: StatusCode, value: &Value) -> Answer {
    reply(status, "application/json", value.to_string().into_bytes())
}

/// Why something is not done.
pub(super) struct Refused {
    pub(super) status: StatusCode,
    pub(super) message: String,
    header: Option<(HeaderName, &'static str)>,
}

impl Refused {
    pub(super) fn with(self, name: HeaderName, value: &'static str) -> Refused {
        Refused { header: Some((name, value)), ..self }
    }

    fn answer(self) -> Answer {
        let mut answer = say(self.status, &json!({"message": self.message}));
        if let Some((name, value)) = self.header {
            answer.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        answer
    }
}

pub(super) fn refuse(status: StatusCode, message: &str) -> Refused {
    Refused { status, message: message.to_owned(), header: None }
}

/// 1 to 64 letters, digits, `-` and `_`, the first a letter or digit.
fn is_session(id: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric();
    id.len() <= 64 && id.starts_with(letter) && id.chars().all(|c| letter(c) || matches!(c, '-' | '_'))
}

fn word(state: State) -> &'static str {
    match state {
        State { busy: true, .. } => "working",
        State { runs: true, .. } => "waiting",
        State { .. } => "resting",
    }
}

fn about(id: &str, state: State, conversation: Option<&str>) -> Value {
    json!({"id": id, "state": word(state), "conversation": conversation, "cost_usd": state.cost.usd()})
}

impl House {
    async fn answer(
        self: &Arc<Self>,
        mut request: Request<Incoming>,
        (room, next): (&Arc<Semaphore>, &Next),
        peer: Peer,
    ) -> Result<Answer, Refused> {
        let path = request.uri().path().to_owned();
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        // A probe has no token.
        if segments == ["health"] {
            allowed(&request, "GET, HEAD")?;
            return Ok(say(StatusCode::OK, &json!({"status": "ok"})));
        }
        let named = |id: &str| {
            let what = "a session id has 1 to 64 letters, digits, `-` or `_`, and begins with a letter or digit";
            if is_session(id) { Ok(()) } else { Err(refuse(StatusCode::BAD_REQUEST, what)) }
        };
        // Another token opens it than all that follows.
        if let (Some(away), ["sessions", id, "conversation"]) = (&self.away, segments.as_slice()) {
            named(id)?;
            return Ok(self.converse(away, id, request, peer).await);
        }
        self.judge(&request)?;
        match segments.as_slice() {
            ["sessions"] => {
                allowed(&request, "GET, HEAD")?;
                Ok(say(StatusCode::OK, &json!({"sessions": self.list()})))
            }
            ["sessions", id] => {
                allowed(&request, "GET, HEAD, DELETE")?;
                named(id)?;
                if request.method() == Method::DELETE { self.end(id) } else { self.show(id) }
            }
            ["sessions", id, "messages"] => {
                allowed(&request, "POST")?;
                named(id)?;
                let message = read(request).await?;
                self.message(id, message)
            }
            ["sessions", id, "ws"] => {
                named(id)?;
                socket(&mut request, id, room, next)
            }
            ["ws"] => {
                let id = request.headers().get(OF_SESSION).and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
                named(&id)?;
                socket(&mut request, &id, room, next)
            }
            _ => {
                let what = "there are /health, /sessions, /sessions/ID, /sessions/ID/messages and /sessions/ID/ws";
                Err(refuse(StatusCode::NOT_FOUND, what))
            }
        }
    }

    /// Whether what a session has goes by this, which takes a while.
    fn is_moved_by(&self, request: &Request<Incoming>) -> bool {
        self.away.is_some() && request.uri().path().ends_with("/conversation")
    }

    fn judge(&self, request: &Request<Incoming>) -> Result<(), Refused> {
        let token = match &self.options.token {
            Token::Is(token) => token.as_slice(),
            // Whoever reaches loopback may talk, but no page that somebody has open in a browser there.
            Token::None if self.options.open => {
                let site = request.headers().get("sec-fetch-site").is_some_and(|site| site != "none");
                if site || request.headers().contains_key(ORIGIN) {
                    return Err(refuse(StatusCode::FORBIDDEN, "not from a page in a browser"));
                }
                let strange = page::misdirected(request, self.options.page_host.as_deref()).is_some();
                let what = "not under this name: use an address or localhost, or say --page-host NAME";
                return if strange { Err(refuse(StatusCode::MISDIRECTED_REQUEST, what)) } else { Ok(()) };
            }
            Token::None | Token::Lost => &[],
        };
        let said = request.headers().get(AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
        let said = match said.split_at_checked(7) {
            Some((scheme, word)) if scheme.eq_ignore_ascii_case(b"bearer ") => word.trim_ascii(),
            _ => b"",
        };
        if !token.is_empty() && bool::from(said.ct_eq(token)) {
            return Ok(());
        }
        Err(refuse(StatusCode::UNAUTHORIZED, "say the token: Authorization: Bearer …").with(WWW_AUTHENTICATE, "Bearer"))
    }

    /// What is heard of a turn that begins now.
    pub(super) fn begin(self: &Arc<Self>, id: &str, message: String) -> Result<mpsc::Receiver<Bytes>, Refused> {
        let later = |status, what: &str| refuse(status, what).with(RETRY_AFTER, "5");
        let talk = self.admit(id).map_err(|refusal| match refusal {
            Refusal::Busy => later(StatusCode::CONFLICT, "its turn before is not over"),
            Refusal::Moving => later(StatusCode::CONFLICT, "its conversation is brought or removed just now"),
            Refusal::Full => later(StatusCode::SERVICE_UNAVAILABLE, "as many agents work as may"),
            Refusal::Closing => later(StatusCode::SERVICE_UNAVAILABLE, "this server ends"),
        })?;
        Ok(talk.say(message))
    }

    fn message(self: &Arc<Self>, id: &str, message: String) -> Result<Answer, Refused> {
        let events = self.begin(id, message)?;
        let mut answer = reply(StatusCode::OK, "text/event-stream", Vec::new());
        *answer.body_mut() = Body::Stream(events);
        // Of proxies that would wait for more to pass it on.
        answer.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
        Ok(answer)
    }

    fn list(&self) -> Vec<Value> {
        let book = self.book();
        let mut all: std::collections::BTreeMap<String, Option<String>> =
            book.all().map(|(id, conversation)| (id.to_owned(), Some(conversation.to_owned()))).collect();
        drop(book);
        let talks = self.talks.lock().unwrap_or_else(PoisonError::into_inner);
        for (id, _) in talks.iter().filter(|(_, talk)| !talk.is_over()) {
            all.entry(id.clone()).or_default();
        }
        let state = |id: &str| talks.get(id).filter(|talk| !talk.is_over()).map(|talk| talk.state()).unwrap_or_default();
        all.iter().map(|(id, conversation)| about(id, state(id), conversation.as_deref())).collect()
    }

    fn show(&self, id: &str) -> Result<Answer, Refused> {
        let (talk, conversation) = (self.talk(id), self.conversation(id));
        if talk.is_none() && conversation.is_none() {
            return Err(refuse(StatusCode::NOT_FOUND, "there is no such session"));
        }
        let state = talk.map(|talk| talk.state()).unwrap_or_default();
        Ok(say(StatusCode::OK, &about(id, state, conversation.as_deref())))
    }

    /// Its agent ends, and its conversation is not gone on with.
    fn end(&self, id: &str) -> Result<Answer, Refused> {
        let talk = self.talk(id);
        if let Some(talk) = &talk {
            talk.drop_it();
        }
        if !self.forget(id) && talk.is_none() {
            return Err(refuse(StatusCode::NOT_FOUND, "there is no such session"));
        }
        Ok(reply(StatusCode::NO_CONTENT, "application/json", Vec::new()))
    }
}

fn socket(request: &mut Request<Incoming>, id: &str, room: &Arc<Semaphore>, next: &Next) -> Result<Answer, Refused> {
    let (answer, asked) = socket::asked(request, id)?;
    let full = refuse(StatusCode::SERVICE_UNAVAILABLE, "as many WebSockets are open as may").with(RETRY_AFTER, "5");
    let place = Arc::clone(room).try_acquire_owned().map_err(|_| full)?;
    *next.lock().unwrap_or_else(PoisonError::into_inner) = Some((asked, place));
    Ok(answer)
}

fn allowed(request: &Request<Incoming>, methods: &'static str) -> Result<(), Refused> {
    if methods.split(", ").any(|method| method == request.method().as_str()) {
        return Ok(());
    }
    Err(refuse(StatusCode::METHOD_NOT_ALLOWED, "not with this method").with(ALLOW, methods))
}

async fn read(request: Request<Incoming>) -> Result<String, Refused> {
    let bytes = match tokio::time::timeout(CLIENT, Limited::new(request.into_body(), MESSAGE).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            return Err(refuse(StatusCode::PAYLOAD_TOO_LARGE, "a message has a megabyte at most"));
        }
        Ok(Err(_)) => Bytes::new(),
        Err(_) => return Err(refuse(StatusCode::REQUEST_TIMEOUT, "the message does not come")),
    };
    prompt_of(&bytes)
}

pub(super) fn prompt_of(message: &[u8]) -> Result<String, Refused> {
    match serde_json::from_slice::<Message>(message) {
        Ok(Message { prompt }) if !prompt.trim().is_empty() => Ok(prompt),
        Ok(_) => Err(refuse(StatusCode::BAD_REQUEST, "`prompt` is empty")),
        Err(error) => Err(refuse(StatusCode::BAD_REQUEST, &format!("a message is {{\"prompt\": \"…\"}}: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_named_as_the_contract_says() {
        for right in ["a", "0", "A_1-b", &"x".repeat(64)] {
            assert!(is_session(right), "{right}");
        }
        for wrong in ["", "-a", "_a", "a.b", "a%20b", "é", "..", &"x".repeat(65)] {
            assert!(!is_session(wrong), "{wrong}");
        }
    }
}

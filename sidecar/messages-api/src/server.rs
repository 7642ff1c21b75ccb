//! The world's side of it: connections, pace and the ways an answer can fail.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustix::net::sockopt::set_socket_linger;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::answer::{Answer, Event, Ids, cut_at, error, error_type};
use crate::log::{Entry, Log};
use crate::request::Request;
use crate::script::{Position, Reply, Script};

/// What was sent must have left before the connection is broken, or the cut would come earlier than scripted.
const BEFORE_CUT: Duration = Duration::from_millis(20);
/// Events on their way to a client: few, so that a client that is gone is noticed soon.
const EVENTS_AHEAD: usize = 1;

/// A scripted Messages API, bound and not yet running.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    local_addr: SocketAddr,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    script: Script,
    log: Log,
    /// Makes the ids of this server differ from those of another.
    id: u64,
    progress: Mutex<Progress>,
}

/// What the next request is judged by, beside its own words.
#[derive(Debug)]
struct Progress {
    /// How often each rule has answered.
    used: Vec<u32>,
    conversations: HashMap<String, Position>,
}

impl Server {
    /// Binds to `addr`; port 0 picks one.
    pub async fn bind(addr: SocketAddr, script: Script) -> io::Result<Self> {
        Self::new(TcpListener::bind(addr).await?, script)
    }

    /// Takes over a listener that is bound already.
    pub fn new(listener: TcpListener, script: Script) -> io::Result<Self> {
        let local_addr = listener.local_addr()?;
        let progress = Progress { used: vec![0; script.rules.len()], conversations: HashMap::new() };
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Microseconds and the port: enough for servers on one machine.
        let id =
            (u64::try_from(since_1970.as_micros()).unwrap_or_default() << 8 ^ u64::from(local_addr.port())) & 0xffff_ffff_ffff;
        let state = State { script, log: Log::default(), id, progress: Mutex::new(progress) };
        Ok(Self { listener, local_addr, state: Arc::new(state) })
    }

    /// Writes to `log` instead of to memory alone.
    #[must_use]
    pub fn with_log(mut self, log: Log) -> Self {
        Arc::get_mut(&mut self.state).expect("nobody shares it before it runs").log = log;
        self
    }

    /// Where clients find it.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// What was served so far, and will be.
    pub fn log(&self) -> Log {
        self.state.log.clone()
    }

    /// Serves until `shutdown` is over; then every connection is closed at once.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let mut connections = JoinSet::new();
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                Some(_) = connections.join_next() => {}
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        connections.spawn(connection(stream, Arc::clone(&self.state)));
                    }
                    // Out of descriptors, most likely: they come back.
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                },
            }
        }
        connections.shutdown().await;
    }
}

async fn connection(stream: tokio::net::TcpStream, state: Arc<State>) {
    let Ok(stream) = stream.into_std() else { return };
    // A second handle, for a reset. It lives as long as this task, so it keeps nothing open.
    let Ok(handle) = stream.try_clone() else { return };
    let Ok(stream) = tokio::net::TcpStream::from_std(stream) else { return };
    // An event is one small packet, and wanted now.
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let handle = Arc::new(OwnedFd::from(handle));
    let service = service_fn(|request| {
        let (state, handle) = (Arc::clone(&state), Arc::clone(&handle));
        async move { answer(request, &state, handle).await }
    });
    // An error here is a client that left, or a cut of our own.
    drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
}

/// An error breaks the connection.
async fn answer(request: hyper::Request<Incoming>, state: &State, handle: Arc<OwnedFd>) -> io::Result<Response<Reader>> {
    let (head, body) = request.into_parts();
    match (&head.method, head.uri.path()) {
        (&Method::POST, "/v1/messages") => {}
        (&Method::POST, "/v1/messages/count_tokens") => {
            let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
            // About what a tokenizer would find, and no more is wanted.
            return Ok(json_response(StatusCode::OK, &json!({"input_tokens": body.len() / 4})));
        }
        (&Method::GET | &Method::HEAD, "/") => return Ok(json_response(StatusCode::OK, &json!({"service": "messages-api"}))),
        _ => return Ok(json_response(StatusCode::NOT_FOUND, &error("not_found_error", "req_none"))),
    }
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let Ok(body) = serde_json::from_slice::<Value>(&body) else {
        return Ok(json_response(StatusCode::BAD_REQUEST, &error("invalid_request_error", "req_none")));
    };
    let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let request = Request::read(&body, header);

    let n = state.log.number();
    let ids = Ids { server: state.id, n };
    let (at, rule, reply) = state.choose(&request);
    let mut entry = Entry::new(state.log.clone(), n, &request, at);
    entry.line.rule = rule;
    entry.line.about = rule.and_then(|rule| state.script.rules[rule].about.clone());
    entry.line.action.kind = kind(reply);

    let pace = reply.pace.or(state.script.defaults.pace);
    tokio::time::sleep(pace.first_byte_delay()).await;
    if reply.hang {
        std::future::pending::<()>().await;
    }
    if reply.reset && reply.cut.is_none() && reply.cut_after_events.is_none() {
        entry.cut();
        return Err(reset(&handle));
    }
    let mut response = if let Some(status) = reply.status {
        entry.line.status = Some(status);
        entry.over();
        let status = StatusCode::from_u16(status).expect("checked when the script was read");
        let kind = reply.error.as_deref().unwrap_or(error_type(status.as_u16()));
        json_response(status, &error(kind, &ids.request()))
    } else {
        let usage = reply.usage.as_ref().unwrap_or(&state.script.defaults.usage);
        let answer = Answer { reply, usage, model: &request.model, prompt: &request.prompt, ids };
        entry.line.status = Some(200);
        entry.line.message_id = Some(ids.message());
        entry.line.action.blocks = reply.blocks.iter().map(crate::script::Block::kind).collect();
        entry.line.action.stop_reason = Some(answer.stop_reason().to_owned());
        if request.stream {
            stream(&answer, pace, entry, handle)
        } else {
            entry.line.usage = Some(usage.clone());
            entry.over();
            json_response(StatusCode::OK, &answer.message())
        }
    };
    let headers = response.headers_mut();
    headers.insert("request-id", HeaderValue::from_str(&ids.request()).expect("letters and digits"));
    for (name, value) in &reply.headers {
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value)) {
            headers.insert(name, value);
        }
    }
    Ok(response)
}

impl State {
    fn choose(&self, request: &Request) -> (Position, Option<usize>, &Reply) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let Progress { used, conversations } = &mut *progress;
        let next = conversations.entry(request.conversation.clone()).or_insert(Position { nth: 1, attempt: 1 });
        let at = *next;
        let (rule, reply) = self.script.choose(request, at, used);
        *next = if reply.fails() { Position { attempt: at.attempt + 1, ..at } } else { Position { nth: at.nth + 1, attempt: 1 } };
        (at, rule, reply)
    }
}

/// One word for what the script does to a request.
fn kind(reply: &Reply) -> &'static str {
    if reply.status.is_some() {
        "error"
    } else if reply.hang {
        "hang"
    } else if reply.stall_after_events.is_some() {
        "stall"
    } else if reply.sse_error {
        "sse_error"
    } else if reply.reset {
        "reset"
    } else if reply.cut.is_some() || reply.cut_after_events.is_some() {
        "cut"
    } else {
        "answer"
    }
}

fn stream(answer: &Answer<'_>, pace: crate::script::Pace, mut entry: Entry, handle: Arc<OwnedFd>) -> Response<Reader> {
    let mut events = answer.events(pace.chunk());
    let reply = answer.reply;
    let cut = cut_at(reply, &events).map(|at| at.min(events.len()));
    if reply.sse_error {
        // In place of the end, if the script names no other place.
        let at = cut.unwrap_or(events.len() - 2);
        let kind = reply.error.as_deref().unwrap_or("overloaded_error");
        events.truncate(at);
        events.push(Event { data: error(kind, &answer.ids.request()), paced: false, usage: None });
        entry.line.cut = true;
    } else if let Some(at) = cut {
        events.truncate(at);
    }
    let breaks = cut.is_some() && !reply.sse_error;
    let (stall, resets) = (reply.stall_after_events, reply.reset);
    let (to, from) = mpsc::channel(EVENTS_AHEAD);
    tokio::spawn(async move {
        for (sent, event) in events.into_iter().enumerate() {
            if stall == Some(sent) {
                to.closed().await;
                return;
            }
            if event.paced {
                tokio::select! {
                    () = to.closed() => return,
                    () = tokio::time::sleep(pace.chunk_delay()) => {}
                }
            }
            let text = format!("event: {}\ndata: {}\n\n", event.data["type"].as_str().unwrap_or_default(), event.data);
            if to.send(Ok(Frame::data(Bytes::from(text)))).await.is_err() {
                return;
            }
            if event.usage.is_some() {
                entry.line.usage = event.usage;
            }
        }
        if breaks {
            tokio::time::sleep(BEFORE_CUT).await;
            let error = if resets { reset(&handle) } else { io::Error::other("cut by the script") };
            entry.cut();
            if to.send(Err(error)).await.is_err() {
                return;
            }
        }
        entry.over();
    });
    let mut response = Response::new(Reader::Events(from));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    response
}

/// Makes the coming end of the connection a reset.
fn reset(handle: &OwnedFd) -> io::Error {
    match set_socket_linger(handle, Some(Duration::ZERO)) {
        Ok(()) => io::Error::from(io::ErrorKind::ConnectionReset),
        Err(error) => error.into(),
    }
}

fn json_response(status: StatusCode, body: &Value) -> Response<Reader> {
    let mut response = Response::new(Reader::Whole(Some(Bytes::from(body.to_string()))));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The body of an answer: at once, or event by event, with an error for a broken connection.
enum Reader {
    Whole(Option<Bytes>),
    Events(mpsc::Receiver<io::Result<Frame<Bytes>>>),
}

impl Body for Reader {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Events(events) => events.poll_recv(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Events(_) => SizeHint::default(),
        }
    }
}

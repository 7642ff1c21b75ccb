//! `/metrics`, `/livez`, `/readyz`, `/status`, `/busy`, `/events` and the page: on a thread and a runtime of their own, read-only, and in nobody's way.
//!
//! A wrapper alone makes an answer by a visit to the monitor on its own thread; a hub makes it of all wrappers' journals. A scraper
//! that stalls holds a connection and nothing else. Who may change something, [`crate::hub::gate`] says.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_sidecar_core::hub::Health;
use agent_sidecar_core::metric::{self, Meters};
use agent_sidecar_core::{Monitor, Now};
use http_body_util::Full;
use hyper::body::{Bytes, Frame, Incoming, SizeHint};
use hyper::header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;

use crate::busy::Word;
use crate::control;
use crate::conversation::{self, Conversation, Work, Works};
use crate::export::{otlp, prometheus};
use crate::feed::Feed;
use crate::hub::gate::{Judged, Peer};
use crate::hub::{Desk, Sees};
use crate::page;
use crate::supervise::{Counts, Handle};

/// A monitor that does not answer a visit for so long is not alive.
const ALIVE: Duration = Duration::from_secs(2);
/// Connections at once: a few scrapers and probes. One more, and the oldest has to go: who came first has had its time, and a crowd
/// of slow clients must not keep a probe out until the platform kills the agent.
const CONNECTIONS: usize = 32;
const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";
/// A client has this long to say what it wants, and to take the answer.
const CLIENT: Duration = Duration::from_secs(10);

/// A listener that is bound but not served yet.
pub(crate) struct Bound {
    listener: TcpListener,
    pub(crate) address: SocketAddr,
}

impl Bound {
    pub(crate) fn into_listener(self) -> TcpListener {
        self.listener
    }
}

pub(crate) fn bind(address: SocketAddr) -> std::io::Result<Bound> {
    let listener = TcpListener::bind(address).or_else(|error| match address {
        // Every address means both families, where there are both.
        SocketAddr::V6(v6) if v6.ip().is_unspecified() && error.kind() != std::io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, v6.port()))
        }
        _ => Err(error),
    })?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok(Bound { listener, address })
}

/// Who read the metrics, for the end that waits for one more reader.
#[derive(Debug, Default)]
pub(crate) struct Scrapes {
    last_unix_ms: AtomicU64,
    /// The numbers change no more: an answer from now on has the last ones.
    lingering: AtomicBool,
    /// Such an answer has left, to its last byte.
    read: Mutex<bool>,
    done: Condvar,
}

impl Scrapes {
    /// Waits until somebody has read the metrics that are the last, or for so long; says whether somebody did.
    pub(crate) fn wait(&self, timeout: Duration) -> bool {
        self.lingering.store(true, Relaxed);
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let (read, _) = self.done.wait_timeout_while(read, timeout, |read| !*read).unwrap_or_else(PoisonError::into_inner);
        *read
    }

    fn asked(&self) {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_unix_ms.store(u64::try_from(unix.as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    fn read_to_the_end(&self) {
        *self.read.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.done.notify_all();
    }
}

/// Marks an answer that somebody may wait for to be read: its connection ends with it, and with the connection the wait. When it
/// began to be made.
#[derive(Clone, Copy)]
struct Last(u128);

/// What is sent: whole, or as it comes.
pub(crate) enum Body {
    Whole(Full<Bytes>),
    Stream(tokio::sync::mpsc::Receiver<Bytes>),
    /// Of something that has an end, and may break off before it: then the client sees that.
    Parts(tokio::sync::mpsc::Receiver<std::io::Result<Bytes>>),
}

pub(crate) type Answer = Response<Body>;

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        match &mut *self {
            Body::Whole(whole) => Pin::new(whole).poll_frame(cx).map_err(|never| match never {}),
            Body::Stream(stream) => stream.poll_recv(cx).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes)))),
            Body::Parts(parts) => parts.poll_recv(cx).map(|part| part.map(|part| part.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Whole(whole) => whole.is_end_stream(),
            Body::Stream(_) | Body::Parts(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Whole(whole) => whole.size_hint(),
            Body::Stream(_) | Body::Parts(_) => SizeHint::default(),
        }
    }
}

/// A connection, to whoever answers on it: one that streams lasts, until it is cut.
#[derive(Clone, Default)]
pub(crate) struct Line {
    streams: Arc<AtomicBool>,
    cut: Arc<Notify>,
}

impl Line {
    /// It goes on for so long, however slow that is.
    pub(crate) fn lasts_for(&self, most: Duration) {
        self.streams.store(true, Relaxed);
        let cut = Arc::clone(&self.cut);
        tokio::spawn(async move {
            tokio::time::sleep(most).await;
            cut.notify_one();
        });
    }

    /// Its time is up.
    async fn end(&self) {
        if tokio::time::timeout(CLIENT * 6, self.cut.notified()).await.is_err() && self.streams.load(Relaxed) {
            self.cut.notified().await;
        }
    }
}

/// `/events`, for as long as the client takes them.
fn stream(feed: &Feed, request: &Request<Incoming>) -> Answer {
    let Some(line) = request.extensions().get::<Line>().filter(|_| request.method() == Method::GET) else {
        return reply(StatusCode::OK, EVENTS, Vec::new());
    };
    let last = request.headers().get("last-event-id").and_then(|id| id.to_str().ok());
    let Some(events) = feed.join(last, Arc::clone(&line.cut)) else {
        return text(StatusCode::SERVICE_UNAVAILABLE, "as many watch as may\n");
    };
    line.streams.store(true, Relaxed);
    let mut answer = reply(StatusCode::OK, EVENTS, Vec::new());
    *answer.body_mut() = Body::Stream(events);
    // Of proxies that would wait for more to pass it on.
    answer.headers_mut().insert("x-accel-buffering", hyper::header::HeaderValue::from_static("no"));
    answer
}

/// Who answers.
trait Pages: Send + Sync + 'static {
    fn answer(&self, request: &Request<Incoming>) -> impl Future<Output = Answer> + Send;
    /// An answer has left, to its last byte.
    fn left(&self, last: Last);
    /// What is served of a conversation, if it is.
    fn conversation(&self) -> Option<&Conversation>;
    fn works(&self) -> impl Future<Output = Works> + Send;
}

/// A conversation that is taken or brought: on a line that lasts.
async fn converse<P: Pages>(pages: &Arc<P>, request: Request<Incoming>, peer: Peer) -> Result<Answer, Request<Incoming>> {
    let line = request.extensions().get::<Line>().cloned().unwrap_or_default();
    match pages.conversation().filter(|_| request.uri().path() == conversation::PATH) {
        Some(conversation) => {
            let asked = Arc::clone(pages);
            let works = move || {
                let asked = Arc::clone(&asked);
                async move { asked.works().await }
            };
            Ok(conversation.answer(request, peer, &line, works).await)
        }
        None => Err(request),
    }
}

/// What the answers are made of.
pub(crate) struct Site {
    pub(crate) handle: Handle,
    pub(crate) scrapes: Arc<Scrapes>,
    /// What became of what was to be exported.
    pub(crate) exports: Arc<otlp::Counts>,
    /// For how long `/busy` may be believed.
    pub(crate) lease: Duration,
    pub(crate) feed: Feed,
    /// A name under which the page is asked for.
    pub(crate) page_host: Option<String>,
    pub(crate) conversation: Option<Conversation>,
}

/// Serves until the process ends.
pub(crate) fn serve(bound: Bound, site: Site) -> std::io::Result<()> {
    std::thread::Builder::new().name(String::from("http")).stack_size(256 * 1024).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let site = Arc::new(site);
        let served = runtime.and_then(|runtime| {
            let told = Arc::clone(&site);
            runtime.spawn(async move { told.feed.tell(|| told.status()).await });
            runtime.block_on(accept(bound.listener, site))
        });
        if let Err(error) = served {
            tracing::error!(%error, "metrics are no longer served; the agent goes on");
        }
    })?;
    Ok(())
}

async fn accept<P: Pages>(listener: TcpListener, pages: Arc<P>) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let mut open = Connections::default();
    loop {
        match listener.accept().await {
            Ok((stream, from)) => open.serve(stream, &pages, Peer::Tcp(from.ip())),
            // Out of descriptors, most likely the agent's doing: others need them more.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Serves what all wrappers of the container have counted.
pub(crate) async fn serve_hub(bound: Bound, desk: Arc<Desk>) -> std::io::Result<()> {
    accept(bound.listener, Arc::new(Hub { desk })).await
}

/// The same at the hub's socket, for this user's processes and root's.
pub(crate) async fn serve_socket(listener: UnixListener, desk: Arc<Desk>) -> std::io::Result<()> {
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let us = rustix::process::geteuid();
    let pages = Arc::new(Hub { desk });
    let mut open = Connections::default();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let peer = rustix::net::sockopt::socket_peercred(&stream);
                match peer.map(|peer| peer.uid) {
                    Ok(uid) if uid == us || uid.is_root() => open.serve(stream, &pages, Peer::Socket),
                    Ok(uid) if pages.desk.knows(uid.as_raw()) => open.serve(stream, &pages, Peer::User(uid.as_raw())),
                    _ => {}
                }
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Those that are open, oldest first.
#[derive(Default)]
struct Connections {
    open: VecDeque<tokio::task::AbortHandle>,
}

impl Connections {
    fn serve<P: Pages>(&mut self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, pages: &Arc<P>, peer: Peer) {
        self.open.retain(|connection| !connection.is_finished());
        if self.open.len() >= CONNECTIONS {
            self.open.pop_front().inspect(tokio::task::AbortHandle::abort);
        }
        let pages = Arc::clone(pages);
        let connection = tokio::task::spawn(async move {
            let (last, line) = (Mutex::new(None), Line::default());
            let service = hyper::service::service_fn(|mut request: Request<Incoming>| {
                let (pages, last) = (&pages, &last);
                request.extensions_mut().insert(line.clone());
                request.extensions_mut().insert(peer);
                async move {
                    let mut response = match converse(pages, request, peer).await {
                        Ok(response) => response,
                        Err(request) => pages.answer(&request).await,
                    };
                    page::harden(&mut response);
                    *last.lock().unwrap_or_else(PoisonError::into_inner) = response.extensions().get::<Last>().copied();
                    Ok::<_, Infallible>(response)
                }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(CLIENT)
                .max_buf_size(16 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            // Whoever is slower than that is cut off; whoever hangs up has hung up.
            let served = tokio::select! {
                served = connection => served.is_ok(),
                () = line.end() => false,
            };
            let last = last.into_inner().unwrap_or_else(PoisonError::into_inner);
            if let Some(last) = last.filter(|_| served) {
                pages.left(last);
            }
        });
        self.open.push_back(connection.abort_handle());
    }
}

/// What is no GET is answered with this.
fn refused(request: &Request<Incoming>) -> Option<Answer> {
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return None;
    }
    let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD: nothing can be changed here\n");
    refused.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
    Some(refused)
}

fn mark_last(response: &mut Answer, began: u128) {
    response.headers_mut().insert(CONNECTION, hyper::header::HeaderValue::from_static("close"));
    response.extensions_mut().insert(Last(began));
}

impl Pages for Site {
    async fn answer(&self, request: &Request<Incoming>) -> Answer {
        let site = self;
        if let Some(refused) = refused(request).or_else(|| page::misdirected(request, site.page_host.as_deref())) {
            return refused;
        }
        let handle = &site.handle;
        match request.uri().path() {
            "/metrics" => {
                // Asked before the answer is made: what is said then is the last.
                let last = site.scrapes.lingering.load(Relaxed) && request.method() == Method::GET;
                let mut response = metrics(site).await;
                if last && response.status() == StatusCode::OK {
                    mark_last(&mut response, 0);
                }
                response
            }
            "/livez" => match visit(handle, |monitor, _| monitor.live()).await {
                Visit::Answer(true) => text(StatusCode::OK, "ok\n"),
                Visit::Answer(false) => text(StatusCode::SERVICE_UNAVAILABLE, "the agent survives every attempt to end it\n"),
                Visit::Silent => text(StatusCode::SERVICE_UNAVAILABLE, "the sidecar's own loop does not answer\n"),
                // The agent works on, uncounted: no reason to have the platform kill it.
                Visit::Gone => text(StatusCode::OK, "degraded: the monitor failed, the agent is relayed without it\n"),
            },
            "/readyz" => match visit(handle, |monitor, _| monitor.ready()).await {
                Visit::Answer(true) => text(StatusCode::OK, "ok\n"),
                Visit::Answer(false) => text(StatusCode::SERVICE_UNAVAILABLE, "the agent is not up, or on its way out\n"),
                Visit::Silent | Visit::Gone => text(StatusCode::SERVICE_UNAVAILABLE, "the sidecar's own loop does not answer\n"),
            },
            "/status" | "/sessions" => match site.status().await {
                Some(status) => json(&status),
                None => text(StatusCode::SERVICE_UNAVAILABLE, "the sidecar's own loop does not answer\n"),
            },
            "/events" => stream(&site.feed, request),
            path if timeline_of(path).is_some() => {
                let key = timeline_of(path).unwrap_or_default().to_owned();
                let after = after(request);
                let told = visit(handle, move |monitor, _| {
                    let named = monitor.report().sessions().iter().any(|session| session.session_id.as_deref() == Some(&key));
                    let ours = named || key == std::process::id().to_string();
                    let entries: Vec<Value> =
                        monitor.timeline().after(after).filter_map(|e| serde_json::to_value(e).ok()).collect();
                    ours.then_some(entries)
                });
                match told.await {
                    Visit::Answer(Some(entries)) => json(&json!({"pid": std::process::id(), "entries": entries})),
                    Visit::Answer(None) => text(StatusCode::NOT_FOUND, NO_SESSION),
                    Visit::Silent | Visit::Gone => {
                        text(StatusCode::SERVICE_UNAVAILABLE, "the sidecar's own loop does not answer\n")
                    }
                }
            }
            "/busy" => {
                let lease = site.lease;
                match visit(handle, move |monitor, now| Word::of(monitor, now, lease)).await {
                    Visit::Answer(word) => reply(StatusCode::OK, JSON, word.json()),
                    Visit::Silent | Visit::Gone => {
                        text(StatusCode::SERVICE_UNAVAILABLE, "the sidecar's own loop does not answer\n")
                    }
                }
            }
            _ => page::answer(request),
        }
    }

    fn left(&self, _: Last) {
        self.scrapes.read_to_the_end();
    }

    fn conversation(&self) -> Option<&Conversation> {
        self.conversation.as_ref()
    }

    async fn works(&self) -> Works {
        let lease = self.lease;
        let ask = move |monitor: &mut Monitor, now| {
            let status = serde_json::to_value(monitor.status()).unwrap_or_default();
            Work::new(Word::of(monitor, now, lease).busy, &status)
        };
        match visit(&self.handle, ask).await {
            Visit::Answer(work) => Some(work),
            Visit::Silent | Visit::Gone => None,
        }
    }
}

impl Pages for Desk {
    async fn answer(&self, request: &Request<Incoming>) -> Answer {
        if let Some(refused) = refused(request).or_else(|| page::misdirected(request, self.page_host())) {
            return refused;
        }
        let sees = self.sees(peer_of(request));
        match request.uri().path() {
            "/metrics" => {
                let (body, began) = self.metrics();
                let mut response = reply(StatusCode::OK, prometheus::CONTENT_TYPE, body.into_bytes());
                if request.method() == Method::GET {
                    mark_last(&mut response, began);
                }
                response
            }
            // A restart would end all agents: one that is lost is no reason, if others work.
            "/livez" => match self.health() {
                Health { wrappers, live: 0, .. } if wrappers > 0 => {
                    text(StatusCode::SERVICE_UNAVAILABLE, "no agent of this container answers, or can be ended\n")
                }
                _ => text(StatusCode::OK, "ok\n"),
            },
            // Who serves without an agent waits for some.
            "/readyz" => match self.health() {
                Health { wrappers, ready: 0, .. } if wrappers > 0 => {
                    text(StatusCode::SERVICE_UNAVAILABLE, "no agent of this container is up, but on its way in or out\n")
                }
                _ => text(StatusCode::OK, "ok\n"),
            },
            _ if sees != Sees::All && is_of_sessions(request.uri().path(), sees) => text(StatusCode::FORBIDDEN, ASK_THERE),
            "/status" | "/sessions" => json(&self.status(sees)),
            "/events" => stream(self.feed(), request),
            path if timeline_of(path).is_some() => {
                match self.timeline(sees, timeline_of(path).unwrap_or_default(), after(request)) {
                    Some(timeline) => reply(StatusCode::OK, JSON, timeline),
                    None => text(StatusCode::NOT_FOUND, NO_SESSION),
                }
            }
            "/busy" => reply(StatusCode::OK, JSON, self.busy().json()),
            _ => page::answer(request),
        }
    }

    fn left(&self, Last(began): Last) {
        self.read(began);
    }

    fn conversation(&self) -> Option<&Conversation> {
        Desk::conversation(self)
    }

    async fn works(&self) -> Works {
        let status = self.status(Sees::All);
        Some(Work::new(self.busy_of(&status).busy, &status))
    }
}

impl Site {
    /// What a hub would say of this one.
    async fn status(&self) -> Option<Value> {
        let told = visit(&self.handle, |monitor, _| serde_json::to_value(monitor.status()).ok());
        let Visit::Answer(Some(mut status)) = told.await else { return None };
        for session in status["sessions"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
            session.insert(String::from("pid"), json!(std::process::id()));
            session.insert(String::from("stale"), json!(false));
        }
        Some(status)
    }
}

/// Who asks.
fn peer_of(request: &Request<Incoming>) -> Peer {
    request.extensions().get::<Peer>().copied().unwrap_or(Peer::Tcp(Ipv4Addr::UNSPECIFIED.into()))
}

/// Whether a page says anything of sessions that is not for whoever sees only these.
fn is_of_sessions(path: &str, sees: Sees) -> bool {
    let own = matches!(path, "/status" | "/sessions") || timeline_of(path).is_some();
    path == "/events" || path == "/" || own && sees == Sees::Nothing
}

const ASK_THERE: &str = "this hub serves several users: sessions are shown at its socket, to each user its own\n";

const NO_SESSION: &str = "no session of this id or pid runs here\n";

/// Of `/sessions/ID/timeline`.
fn timeline_of(path: &str) -> Option<&str> {
    path.strip_prefix("/sessions/")?.strip_suffix("/timeline").filter(|key| !key.is_empty())
}

/// Of `?after=17`.
fn after(request: &Request<Incoming>) -> u64 {
    let query = request.uri().query().unwrap_or_default();
    query.split('&').find_map(|pair| pair.strip_prefix("after=")).and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn json(value: &Value) -> Answer {
    reply(StatusCode::OK, JSON, value.to_string().into_bytes())
}

async fn metrics(Site { handle, scrapes, exports, .. }: &Site) -> Answer {
    // The scrape itself counts, so that the last one says that it was.
    let last = scrapes.last_unix_ms.load(Relaxed);
    let (counts, exports) = (handle.clone(), Arc::clone(exports));
    let copy = visit(handle, move |monitor, _| {
        relayed(monitor.meters_mut(), counts.counts());
        exports.fill(monitor.meters_mut());
        if last > 0 {
            #[expect(clippy::cast_precision_loss, reason = "a timestamp")]
            monitor.meters_mut().set(&metric::LAST_SCRAPE, &[], last as f64 / 1e3);
        }
        (monitor.meters().clone(), monitor.who().labels())
    });
    match copy.await {
        Visit::Answer((meters, labels)) => {
            let body = prometheus::text(&meters, &labels);
            scrapes.asked();
            reply(StatusCode::OK, prometheus::CONTENT_TYPE, body.into_bytes())
        }
        Visit::Silent | Visit::Gone => text(StatusCode::SERVICE_UNAVAILABLE, "the sidecar's own loop does not answer\n"),
    }
}

/// What the relay and init counted.
#[expect(clippy::cast_precision_loss, reason = "an exposition speaks in floats")]
pub(crate) fn relayed(meters: &mut Meters, counts: &Counts) {
    let n = |counter: &AtomicU64| counter.load(Relaxed) as f64;
    meters.raise(&metric::FORWARDED_BYTES, &["stdout"], n(&counts.delivered_bytes));
    meters.raise(&metric::FORWARDED_BYTES, &["stdin"], n(&counts.stdin_bytes));
    meters.raise(&metric::BACKPRESSURE, &[], n(&counts.back_pressure));
    meters.raise(&metric::SPILLED_BYTES, &[], n(&counts.spilled_bytes));
    meters.raise(&metric::ORPHANS_TERMINATED, &[], n(&counts.orphans_terminated));
    meters.raise(&metric::ZOMBIES_REAPED, &[], n(&counts.zombies_reaped));
    meters.set(&metric::BACKLOG_BYTES, &[], n(&counts.waiting_bytes));
}

/// The hub's pages, and what can be changed there, for whom the gate lets in.
struct Hub {
    desk: Arc<Desk>,
}

impl Pages for Hub {
    async fn answer(&self, request: &Request<Incoming>) -> Answer {
        let uri = request.uri();
        if request.method() == Method::POST && uri.path().starts_with("/v1/") {
            let peer = peer_of(request);
            match self.desk.judge(peer, request.headers()) {
                // As everything else there.
                Judged::Closed if peer != Peer::Socket => return self.desk.answer(request).await,
                judged => {
                    if let Some((status, why)) = judged.refusal() {
                        return text(status, why);
                    }
                }
            }
        }
        if request.method() != Method::POST
            && uri.path().starts_with("/v1/")
            && let Some(refused) = page::misdirected(request, self.desk.page_host())
        {
            return refused;
        }
        match control::answer(&self.desk, request.method(), uri.path(), uri.query()).await {
            Some(Ok(told)) => json(&told),
            Some(Err((status, what))) => reply(status, "text/plain; charset=utf-8", format!("{what}\n").into_bytes()),
            None => self.desk.answer(request).await,
        }
    }

    fn left(&self, last: Last) {
        self.desk.left(last);
    }

    fn conversation(&self) -> Option<&Conversation> {
        Pages::conversation(&*self.desk)
    }

    fn works(&self) -> impl Future<Output = Works> + Send {
        Pages::works(&*self.desk)
    }
}

enum Visit<T> {
    Answer(T),
    /// It did not answer in time.
    Silent,
    /// There is no monitor any more.
    Gone,
}

async fn visit<T: Send + 'static>(handle: &Handle, ask: impl FnOnce(&mut Monitor, Now) -> T + Send + 'static) -> Visit<T> {
    let (say, hear) = tokio::sync::oneshot::channel();
    let there = handle.visit(move |monitor, now| {
        // Who asked may have hung up.
        drop(say.send(ask(monitor, now)));
    });
    if !there {
        return Visit::Gone;
    }
    if handle.waits() {
        return Visit::Silent;
    }
    match tokio::time::timeout(ALIVE, hear).await {
        Ok(Ok(answer)) => Visit::Answer(answer),
        Ok(Err(_)) => Visit::Gone,
        Err(_) => Visit::Silent,
    }
}

/// The same for a thread without a runtime. `None` when nobody answers in time.
pub(crate) fn visit_blocking<T: Send + 'static>(
    handle: &Handle,
    ask: impl FnOnce(&mut Monitor, Now) -> T + Send + 'static,
) -> Option<T> {
    let (say, hear) = mpsc::channel();
    let there = handle.visit(move |monitor, now| drop(say.send(ask(monitor, now))));
    if there && !handle.waits() { hear.recv_timeout(ALIVE).ok() } else { None }
}

pub(crate) fn text(status: StatusCode, body: impl Into<Cow<'static, str>>) -> Answer {
    reply(status, "text/plain; charset=utf-8", body.into().into_owned().into_bytes())
}

pub(crate) fn reply(status: StatusCode, content_type: &'static str, body: Vec<u8>) -> Answer {
    let mut response = Response::new(Body::Whole(Full::new(Bytes::from(body))));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, hyper::header::HeaderValue::from_static("no-store"));
    response
}

//! Talking to a session: what a caller sends is passed on to the app in its container, which is woken for it.
//!
//! ```text
//!   caller ──bearer──► is it theirs? ──► wanted ──► up ──► provider's endpoint of `app_port` ──app's own token──► app
//!          ◄──────────────── as it comes, byte for byte, and wanted again while it flows ◄──────────────────────┘
//! ```
//!
//! Neither side sees the other's token. A session has one container, so the same id is always the same agent.

use std::collections::BTreeMap;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Extension, FromRequestParts, Request, State};
use axum::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use axum::http::{Method, StatusCode};
use axum::response::Response;
use axum::routing::{any, get, post};
use axum::{Router, http};
use futures_util::{Stream, StreamExt};
use http_body_util::BodyExt;
use hyper::body::Body as _;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use utoipa::ToSchema;

use crate::api::{Answer, Api, Asked, Failure, Named, NewSession, Who, Wrong, no_session};
use crate::config::{TEMPLATE_LABEL, Template};
use crate::lifecycle::Phase;
use crate::provider::Endpoint;
use crate::serve::Stays;
use crate::service::moved;
use crate::session::{Session, SessionId, Wanted};
use crate::websocket::{Frames, close};

/// Streams at once: each holds two connections.
const STREAMS: usize = 1000;
/// However many callers there are, one may have a part of that: an equal one, but no less than this.
const PARTS: usize = 4;
/// A tunnel through which nothing flows for so long has a dead end.
const QUIET: Duration = Duration::from_secs(3600);
/// A message is a text that somebody wrote, or pasted; apps may be sent a file.
const MESSAGE_MOST: usize = 1 << 20;
const BODY_MOST: usize = 16 << 20;
/// Of all bodies that are on their way, whoever sends them: each is held until its app has it. In pieces, of which one is the least.
const BODIES_MOST: usize = 256 << 20;
const PIECE: usize = 4 << 10;
/// How long an app may think before it says anything at all.
const HEADERS: Duration = Duration::from_secs(300);
/// How long an app may take to listen, after its sidecar has spoken.
const LISTENS: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(100);
/// How long a caller may take to hear that its socket is closed.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long events that are on their way may go on when the fleet ends: the end of a turn is near, mostly. The fleet itself has a little longer.
const ENDS_ITSELF: Duration = Duration::from_secs(15);
const EVENTS: &[u8] = b"text/event-stream";
/// After that, to who listens to a message's answer.
const LAST_WORDS: &str = "event: error\ndata: {\"message\": \"the fleet ends here: the agent works on, ask again\"}\n\n";
/// How soon an app is tried again that does not listen yet: it is about to.
const LISTENS_SOON: Duration = Duration::from_millis(5);
/// What a wake-up may take beside the container's own start.
const WAKES: Duration = Duration::from_secs(60);
/// How often what flows is told to the session, so that it is not idle: less, where it would be idle sooner.
const TOLD: Duration = Duration::from_secs(10);
/// Which session an app is talked to for: it may have several.
const WHOSE: HeaderName = HeaderName::from_static("agent-session");
/// What is between two neighbours alone, and not passed on.
const HOPS: [HeaderName; 7] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// What all streams share.
pub(crate) struct Proxy {
    client: Option<reqwest::Client>,
    room: Arc<Semaphore>,
    bodies: Arc<Semaphore>,
    /// Each caller's part, by the caller's name: no more of them than are configured.
    parts: Mutex<BTreeMap<String, Arc<Semaphore>>>,
}

/// For one stream: of all, and of its caller's.
struct Place {
    _room: OwnedSemaphorePermit,
    _part: OwnedSemaphorePermit,
}

/// A place for the stream that a request asks for, before anything of its body is read.
impl FromRequestParts<Api> for Place {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut http::request::Parts, api: &Api) -> Answer<Self> {
        let token = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let caller = token.and_then(|value| api.config.caller(value.split_once(' ')?.1.trim()));
        let proxy = parts.extensions.get::<Arc<Proxy>>();
        let (Some(caller), Some(proxy)) = (caller, proxy) else {
            // Who they are is asked before this.
            return Err(Failure(StatusCode::UNAUTHORIZED, String::from("a bearer token is needed")));
        };
        proxy.place(&caller.name, api.config.callers.len())
    }
}

/// What is said to a session.
#[derive(Debug, Deserialize, ToSchema)]
#[expect(dead_code, reason = "it is passed on as it is: this is its description")]
pub(crate) struct Message {
    #[schema(min_length = 1)]
    prompt: String,
}

/// Who is made for a message, where there is nobody of that id yet.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct OnDemand {
    /// Create the session from this template, if there is none of that id.
    #[param(min_length = 1)]
    template: Option<String>,
    /// Who pays for it then.
    #[param(pattern = r"^[^\x00-\x1f\x7f-\x9f]{1,64}$")]
    tenant: Option<String>,
}

pub(crate) fn routes() -> Router<Api> {
    let proxy = Proxy::new(client());
    Router::new()
        .route("/v1/sessions/{id}/messages", post(messages))
        .route("/v1/sessions/{id}/ws", get(websocket))
        .route("/v1/sessions/{id}/ws/{*path}", get(websocket))
        .route("/v1/sessions/{id}/app/{*path}", any(app))
        .layer(Extension(Arc::new(proxy)))
}

fn client() -> Option<reqwest::Client> {
    crate::build::client().inspect_err(|error| tracing::error!(%error, "sessions cannot be talked to")).ok()
}

/// Says something to a session, and streams what its agent answers.
///
/// Server-sent events: `message` for each message of the agent's, then `done`, or `error` with a `message`. A session that sleeps is woken first.
#[utoipa::path(post, path = "/v1/sessions/{id}/messages", params(("id" = String, Path), OnDemand), request_body = Message,
    security(("token" = [])),
    responses(
        (status = 200, description = "What the agent says, as it says it.", content_type = "text/event-stream", body = String),
        (status = 400, body = Wrong), (status = 401, body = Wrong), (status = 403, body = Wrong), (status = 404, body = Wrong),
        (status = 408, description = "The message does not come.", body = Wrong), (status = 409, description = "It is over, or its turn before is not.", body = Wrong), (status = 413, body = Wrong),
        (status = 422, description = "Its template names no `app_port`.", body = Wrong), (status = 429, body = Wrong),
        (status = 502, description = "Its app does not answer.", body = Wrong), (status = 503, body = Wrong),
        (status = 504, description = "It is not ready in time.", body = Wrong)))]
async fn messages(
    State(api): State<Api>,
    Extension(proxy): Extension<Arc<Proxy>>,
    who: Who,
    place: Place,
    Named(id): Named,
    Asked(on_demand): Asked<OnDemand>,
    request: Request,
) -> Answer<Response> {
    // Before anybody is woken or made for it.
    let (parts, body) = request.into_parts();
    let body = proxy.whole(body, MESSAGE_MOST).await?;
    if !serde_json::from_slice::<serde_json::Value>(&body.bytes).is_ok_and(|message| message["prompt"].is_string()) {
        return Err(Failure(StatusCode::BAD_REQUEST, String::from("a message is {\"prompt\": \"…\"}")));
    }
    well_formed(&id)?;
    let session = match (api.session(&who, &id).await, on_demand.template) {
        (Err(Failure(StatusCode::NOT_FOUND, _)), Some(template)) => {
            // One that could not be talked to would be made, would work, and would cost.
            if api.config.templates.get(&template).is_some_and(|template| template.app_port.is_none()) {
                return Err(no_app(&format!("template `{template}`"), "it"));
            }
            let new = NewSession { template, id: Some(id), tenant: on_demand.tenant };
            api.make(&who, new).await?.1
        }
        (found, _) => found?,
    };
    let path = format!("/sessions/{}/messages", session.id);
    proxy.pass(&api, &session, parts, &path, (body, Flows::Both), place).await
}

/// A WebSocket to the session's app, at `/ws` and below it.
async fn websocket(
    State(api): State<Api>,
    Extension(proxy): Extension<Arc<Proxy>>,
    who: Who,
    place: Place,
    request: Request,
) -> Answer<Response> {
    let (id, path) = split(&request)?;
    well_formed(&id)?;
    let session = api.session(&who, &id).await?;
    if !upgrades(request.headers()) {
        return Err(Failure(StatusCode::UPGRADE_REQUIRED, String::from("this is for WebSockets: Connection: Upgrade")));
    }
    proxy.tunnel(&api, &session, request, &path, place).await
}

/// Whatever else the session's app answers, below its `/`.
async fn app(
    State(api): State<Api>,
    Extension(proxy): Extension<Arc<Proxy>>,
    who: Who,
    place: Place,
    request: Request,
) -> Answer<Response> {
    let (id, path) = split(&request)?;
    well_formed(&id)?;
    let session = api.session(&who, &id).await?;
    let path = path.strip_prefix("/app").unwrap_or(&path).to_owned();
    if upgrades(request.headers()) {
        return proxy.tunnel(&api, &session, request, &path, place).await;
    }
    let (parts, body) = request.into_parts();
    let body = proxy.whole(body, BODY_MOST).await?;
    proxy.pass(&api, &session, parts, &path, (body, Flows::Once), place).await
}

/// As the cookbook has it: what is no id is a mistake of who asks, and not somebody who is not there.
fn well_formed(id: &str) -> Answer<()> {
    id.parse::<SessionId>().map(drop).map_err(|what| Failure(StatusCode::BAD_REQUEST, what))
}

fn no_app(of: &str, whose: &str) -> Failure {
    Failure(StatusCode::UNPROCESSABLE_ENTITY, format!("{of} has no app to talk to: {whose} names no `app_port`"))
}

/// The session's id, and the rest of the path with the query, as they were written.
fn split(request: &Request) -> Answer<(String, String)> {
    let rest = request.uri().path_and_query().map_or("", |all| all.as_str()).strip_prefix("/v1/sessions/").unwrap_or_default();
    let (id, path) = rest.split_once('/').ok_or_else(|| no_session(rest))?;
    Ok((id.to_owned(), format!("/{path}")))
}

fn upgrades(headers: &HeaderMap) -> bool {
    let connection = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let asked = connection.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case("upgrade"));
    asked && headers.get(header::UPGRADE).is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// Read whole: it may have to be sent again to an app that does not listen yet. It has its part of what all may have.
#[derive(Default)]
struct Whole {
    bytes: axum::body::Bytes,
    _part: Option<OwnedSemaphorePermit>,
}

/// What keeps a session from being idle.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flows {
    /// The request alone.
    Once,
    /// All that is heard of it, too.
    Both,
}

/// Wants a session for as long as it lives, whenever something has flowed.
struct Touch {
    flowed: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
    _place: Place,
}

impl Touch {
    fn begin(api: &Api, session: &Session, template: &Template, place: Place) -> Self {
        let every = template.idle_after.map_or(TOLD, |idle| (idle / 3).min(TOLD));
        let flowed = Arc::new(AtomicBool::new(false));
        let (api, id, flows) = (api.clone(), session.id.clone(), Arc::clone(&flowed));
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(every).await;
                if flows.swap(false, Ordering::Relaxed) {
                    api.touch(&id).await;
                }
            }
        });
        Self { flowed, task, _place: place }
    }

    fn flows(&self) {
        self.flowed.store(true, Ordering::Relaxed);
    }
}

impl Drop for Touch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Api {
    /// It is in use. What somebody else wants of it meanwhile is not undone.
    async fn touch(&self, id: &SessionId) {
        let known = self.fleet.store().get(id).await;
        let up = known.is_ok_and(|session| session.is_some_and(|one| one.wanted == Wanted::Running && one.phase.is_up()));
        if up && let Err(error) = self.fleet.want(id, Wanted::Running, "it is talked to").await {
            tracing::warn!(session = %id, %error, "that a session is in use cannot be said");
        }
    }

    fn template_of(&self, session: &Session) -> Answer<(&Template, u16)> {
        if session.places.is_some() {
            let what = format!("session `{}` is a container that several are in: talk to one of them", session.id);
            return Err(Failure(StatusCode::UNPROCESSABLE_ENTITY, what));
        }
        let template = session.spec.labels.get(TEMPLATE_LABEL).and_then(|name| self.config.templates.get(name));
        let found = template.and_then(|template| Some((template, template.app_port?)));
        found.ok_or_else(|| no_app(&format!("session `{}`", session.id), "its template"))
    }

    /// Waits until it is up, and wakes it for that: where its app is reached.
    async fn wake(&self, session: &Session, template: &Template, port: u16) -> Answer<Endpoint> {
        let id = &session.id;
        let over = |session: &Session| {
            let why = session.reason.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
            Failure(StatusCode::CONFLICT, format!("session `{id}` is over, or is to end: it is {}{why}", session.phase))
        };
        if session.phase.is_last() || session.wanted == Wanted::Gone {
            return Err(over(session));
        }
        // Waited for, it would be in vain; and wanted, it would be woken when nobody waits any more.
        let asleep = |session: &Session| {
            let kept = session.phase == Phase::Paused && self.fleet.drained_until(&session.provider).is_some();
            let what =
                || format!("session `{id}` sleeps, and is not woken before the drain of provider `{}` is over", session.provider);
            kept.then(|| Failure(StatusCode::SERVICE_UNAVAILABLE, what()))
        };
        if let Some(asleep) = asleep(session) {
            return Err(asleep);
        }
        let missing = || no_session(id.as_str());
        let mut moves = self.fleet.moves();
        let mut last = self.fleet.want(id, Wanted::Running, "it is talked to").await?.ok_or_else(missing)?;
        let up = async {
            loop {
                if last.phase.is_last() || last.wanted == Wanted::Gone || matches!(last.phase, Phase::Stopping | Phase::Stopped) {
                    return Err(over(&last));
                }
                if let Some(native) = last.native.as_ref().filter(|_| last.phase.is_up() && last.holds) {
                    let provider = self.fleet.provider_of(&last)?;
                    return Ok(provider.endpoint(native, port).await?);
                }
                if let Some(asleep) = asleep(&last) {
                    return Err(asleep);
                }
                if last.phase == Phase::Paused && last.wanted == Wanted::Paused {
                    // It was being put to sleep when it was wanted.
                    self.fleet.want(id, Wanted::Running, "it is talked to").await?;
                }
                moved(&mut moves, id, LOOK).await;
                last = self.fleet.store().get(id).await?.ok_or_else(missing)?;
            }
        };
        match tokio::time::timeout(template.ready_within + WAKES, up).await {
            Ok(found) => found,
            Err(_) => Err(Failure(StatusCode::GATEWAY_TIMEOUT, format!("session `{id}` is not ready in time: ask again"))),
        }
    }
}

impl Proxy {
    fn new(client: Option<reqwest::Client>) -> Self {
        let (room, bodies) = (Semaphore::new(STREAMS), Semaphore::new(BODIES_MOST / PIECE));
        Self { client, room: Arc::new(room), bodies: Arc::new(bodies), parts: Mutex::default() }
    }

    /// For one that is one of so many callers.
    fn place(&self, caller: &str, callers: usize) -> Answer<Place> {
        let part = {
            let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
            let most = STREAMS / callers.clamp(1, PARTS);
            Arc::clone(parts.entry(caller.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(most))))
        };
        let many = |_| Failure(StatusCode::TOO_MANY_REQUESTS, String::from("you talk to as many sessions at once as you may"));
        let full = |_| Failure(StatusCode::SERVICE_UNAVAILABLE, String::from("as many talk to sessions as may: ask again"));
        let part = part.try_acquire_owned().map_err(many)?;
        Ok(Place { _room: Arc::clone(&self.room).try_acquire_owned().map_err(full)?, _part: part })
    }

    async fn whole(&self, body: Body, most: usize) -> Answer<Whole> {
        let read = tokio::time::timeout(LISTENS, self.read(body, most)).await;
        read.map_err(|_| Failure(StatusCode::REQUEST_TIMEOUT, String::from("the body does not come")))?
    }

    async fn read(&self, mut body: Body, most: usize) -> Answer<Whole> {
        let large = || Failure(StatusCode::PAYLOAD_TOO_LARGE, format!("a body has {most} bytes at most here"));
        let (mut bytes, mut part) = (Vec::new(), None::<OwnedSemaphorePermit>);
        // What is announced is set aside at once: it is better not begun than broken off.
        let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
        let mut needs = announced;
        loop {
            if needs > most {
                return Err(large());
            }
            let held = part.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
            let lacks = u32::try_from(needs.div_ceil(PIECE).saturating_sub(held)).unwrap_or(u32::MAX);
            let more = Arc::clone(&self.bodies).try_acquire_many_owned(lacks).map_err(|_| {
                Failure(StatusCode::SERVICE_UNAVAILABLE, String::from("as much is being sent to sessions as may: ask again"))
            })?;
            match &mut part {
                Some(part) => part.merge(more),
                None => part = Some(more),
            }
            let Some(frame) = body.frame().await else { break };
            let frame = frame.map_err(|_| Failure(StatusCode::BAD_REQUEST, String::from("the body breaks off")))?;
            if let Ok(data) = frame.into_data() {
                needs = needs.max(bytes.len() + data.len());
                if needs > most {
                    return Err(large());
                }
                bytes.extend_from_slice(&data);
            }
        }
        Ok(Whole { bytes: bytes.into(), _part: part })
    }

    /// Sends it as soon as the app listens. Once it has been heard, it is not sent again.
    async fn send(
        &self,
        at: &Endpoint,
        template: &Template,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
        body: Whole,
    ) -> Answer<reqwest::Response> {
        let unreached = |what: &str| Failure(StatusCode::BAD_GATEWAY, format!("the session's app {what}"));
        let client = self.client.as_ref().ok_or_else(|| unreached("cannot be asked from here"))?;
        let mut headers = headers.clone();
        for (name, _) in &at.headers {
            // Said by the provider alone.
            headers.remove(name.as_str());
        }
        let (began, mut pause) = (Instant::now(), LISTENS_SOON);
        loop {
            let mut request = client.request(method.clone(), format!("{}{path}", at.url)).headers(headers.clone());
            for (name, value) in &at.headers {
                request = request.header(name, value);
            }
            if let Some(token) = &template.app_token {
                request = request.bearer_auth(token.reveal());
            }
            let sent = tokio::time::timeout(HEADERS, request.body(body.bytes.clone()).send()).await;
            match sent {
                // The token is ours: who is told so would look for the mistake in theirs.
                Ok(Ok(answer)) if answer.status() == StatusCode::UNAUTHORIZED && template.app_token.is_some() => {
                    tracing::error!(template = template.name, "the app refuses `app_token`");
                    return Err(unreached("refuses the fleet's token"));
                }
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) if error.is_connect() && began.elapsed() < LISTENS => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LOOK);
                }
                Ok(Err(error)) if error.is_connect() => return Err(unreached("does not listen")),
                Ok(Err(_)) => return Err(unreached("breaks off")),
                Err(_) => return Err(unreached("does not answer")),
            }
        }
    }

    async fn pass(
        &self,
        api: &Api,
        session: &Session,
        parts: http::request::Parts,
        path: &str,
        (body, flows): (Whole, Flows),
        place: Place,
    ) -> Answer<Response> {
        let (template, port) = api.template_of(session)?;
        let at = api.wake(session, template, port).await?;
        let touch = Touch::begin(api, session, template, place);
        let headers = named(passed_on(&parts.headers), session);
        let answer = self.send(&at, template, &parts.method, path, &headers, body).await?;
        let mut response = Response::new(Body::empty());
        *response.status_mut() = answer.status();
        *response.headers_mut() = passed_back(answer.headers());
        let events = answer.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(EVENTS));
        let stream = answer.bytes_stream().inspect(move |_| {
            // And held until the stream is over.
            if flows == Flows::Both {
                touch.flows();
            } else {
                let _held = &touch;
            }
        });
        *response.body_mut() = if events {
            // An app's own events have words that nobody knows here.
            let last = if flows == Flows::Both { LAST_WORDS } else { "" };
            Body::from_stream(until_the_end(stream, api.fleet.ended(), last))
        } else {
            Body::from_stream(stream)
        };
        Ok(response)
    }

    async fn tunnel(&self, api: &Api, session: &Session, mut request: Request, path: &str, place: Place) -> Answer<Response> {
        let (template, port) = api.template_of(session)?;
        let at = api.wake(session, template, port).await?;
        // Of which container: it may have another later.
        let generation = api.fleet.store().get(&session.id).await?.map_or(session.generation, |now| now.generation);
        let touch = Touch::begin(api, session, template, place);
        let mut headers = named(passed_on(request.headers()), session);
        let to = HeaderValue::from_static("websocket");
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, to.clone());
        let theirs = hyper::upgrade::on(&mut request);
        // A fleet that ends waits for it as for an answer.
        let stays = request.extensions().get::<Stays>().cloned();
        let answer = self.send(&at, template, request.method(), path, &headers, Whole::default()).await?;
        let mut response = Response::new(Body::empty());
        *response.status_mut() = answer.status();
        *response.headers_mut() = passed_back(answer.headers());
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            *response.body_mut() = Body::from_stream(answer.bytes_stream());
            return Ok(response);
        }
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        response.headers_mut().insert(header::UPGRADE, to);
        let (api, session) = (api.clone(), session.id.clone());
        tokio::spawn(async move {
            let (Ok(theirs), Ok(app)) = (theirs.await, answer.upgrade().await) else { return };
            // What a caller says is work; that either says it is still there is none.
            let ended = api.fleet.ended();
            let ends = Ends { moves: api.fleet.moves(), api, session, generation };
            through(TokioIo::new(theirs), app, || touch.flows(), ends, ended).await;
            drop(stays);
        });
        Ok(response)
    }
}

/// Events as they come. When the fleet ends they may end by themselves for a while; then they are ended, in between two of them, with last words.
fn until_the_end<E: Send>(
    events: impl Stream<Item = Result<Bytes, E>> + Send,
    ended: watch::Receiver<bool>,
    last: &'static str,
) -> impl Stream<Item = Result<Bytes, E>> + Send {
    let over = async {
        going(ended).await;
        tokio::time::sleep(ENDS_ITSELF).await;
    };
    let ending = Ending { events: Box::pin(events), over: Some(Box::pin(over)), last, end: *b"\n\n", is_over: false };
    futures_util::stream::unfold(ending, |mut ending| async move {
        let piece = ending.next().await?;
        Some((piece, ending))
    })
}

struct Ending<S, F> {
    events: Pin<Box<S>>,
    /// Until it is.
    over: Option<Pin<Box<F>>>,
    last: &'static str,
    /// The last two letters, without carriage returns: an empty line is the end of an event.
    end: [u8; 2],
    is_over: bool,
}

impl<E, S: Stream<Item = Result<Bytes, E>>, F: Future<Output = ()>> Ending<S, F> {
    async fn next(&mut self) -> Option<Result<Bytes, E>> {
        loop {
            if self.is_over && self.end == *b"\n\n" {
                let last = std::mem::take(&mut self.last);
                return (!last.is_empty()).then(|| Ok(Bytes::from_static(last.as_bytes())));
            }
            let piece = match &mut self.over {
                Some(over) => tokio::select! {
                    piece = self.events.next() => piece,
                    () = over => {
                        (self.over, self.is_over) = (None, true);
                        continue;
                    }
                },
                None => self.events.next().await,
            };
            if let Some(Ok(piece)) = &piece {
                for byte in piece.iter().filter(|byte| **byte != b'\r') {
                    self.end = [self.end[1], *byte];
                }
            }
            return piece;
        }
    }
}

/// With whose it is, in the place of what the caller says.
fn named(mut headers: HeaderMap, session: &Session) -> HeaderMap {
    if let Ok(id) = HeaderValue::from_str(session.id.as_str()) {
        headers.insert(WHOSE, id);
    }
    headers
}

/// What a WebSocket is told whose fleet ends: its session goes on, and is reached through the next one.
const GOING: &str = "going away: the fleet ends here, connect again";

/// When a WebSocket's container is no longer there to talk to.
trait Ended: Send {
    /// Waits until it is so, and says why.
    async fn wait(&mut self) -> &'static str;
    /// Why, if it is so already: its end is heard before anybody says so.
    async fn now(&self) -> Option<&'static str>;
}

struct Ends {
    api: Api,
    moves: tokio::sync::broadcast::Receiver<SessionId>,
    session: SessionId,
    generation: u32,
}

impl Ended for Ends {
    async fn wait(&mut self) -> &'static str {
        loop {
            moved(&mut self.moves, &self.session, TOLD).await;
            let Ok(session) = self.api.fleet.store().get(&self.session).await else { continue };
            // Until it is put away, or has ended, its app may have something to say.
            if let Some(session) = &session
                && session.generation == self.generation
                && (session.phase.is_up() || matches!(session.phase, Phase::Pausing | Phase::Stopping))
            {
                continue;
            }
            return why(session.as_ref());
        }
    }

    async fn now(&self) -> Option<&'static str> {
        let session = self.api.fleet.store().get(&self.session).await.ok()?;
        let lives = session.as_ref().is_some_and(|session| session.generation == self.generation && session.phase.is_up());
        (!lives).then(|| why(session.as_ref()))
    }
}

async fn going(mut ended: watch::Receiver<bool>) -> &'static str {
    if ended.wait_for(|ended| *ended).await.is_err() {
        // Nobody is there who could end.
        std::future::pending::<()>().await;
    }
    GOING
}

fn why(session: Option<&Session>) -> &'static str {
    let over = |session: &Session| {
        session.wanted == Wanted::Gone || session.phase.is_last() || matches!(session.phase, Phase::Stopping | Phase::Stopped)
    };
    if session.is_none_or(over) { "the session has ended" } else { "the session sleeps: connect again, and it is woken" }
}

/// Until one of the two has had enough, or neither says anything any more, or the container is put away, or the fleet ends: then each that is not in
/// the middle of something is told why.
async fn through(
    caller: impl AsyncRead + AsyncWrite + Unpin,
    app: impl AsyncRead + AsyncWrite + Unpin,
    said: impl Fn(),
    mut ends: impl Ended,
    ended: watch::Receiver<bool>,
) {
    let (mut from_caller, mut to_caller) = tokio::io::split(caller);
    let (mut from_app, mut to_app) = tokio::io::split(app);
    let last = Mutex::new(Instant::now());
    let flowed = || *last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    let quiet = async {
        loop {
            let ends = *last.lock().unwrap_or_else(PoisonError::into_inner) + QUIET;
            if ends <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(ends).await;
        }
    };
    let (mut asked, mut answered) = (Frames::default(), Frames::default());
    let heard = |frames: &mut Frames, chunk: &[u8]| {
        flowed();
        if frames.read(chunk) {
            said();
        }
    };
    let answer = |frames: &mut Frames, chunk: &[u8]| {
        flowed();
        frames.read(chunk);
    };
    let why = {
        let over = async {
            tokio::select! {
                why = ends.wait() => why,
                why = going(ended.clone()) => why,
            }
        };
        let mut asks = pin!(pump(&mut from_caller, &mut to_app, (&mut asked, heard), going(ended.clone())));
        let mut answers = pin!(pump(&mut from_app, &mut to_caller, (&mut answered, answer), over));
        // Of a fleet that ends, what either is in the middle of saying is passed on.
        tokio::select! {
            why = &mut asks => match why {
                None => None,
                why => {
                    drop(tokio::time::timeout(FAREWELL, answers).await);
                    Some(why)
                }
            },
            why = &mut answers => {
                if why == Some(GOING) {
                    drop(tokio::time::timeout(FAREWELL, asks).await);
                }
                Some(why)
            }
            () = quiet => Some(Some("nothing was said for an hour")),
        }
    };
    let Some(why) = why else {
        // Its neighbour may be told that no more comes.
        to_app.shutdown().await.ok();
        return;
    };
    let why = match why {
        None => ends.now().await,
        why => why,
    };
    if why == Some(GOING) && asked.is_between() {
        let mask = uuid::Uuid::now_v7().into_bytes();
        to_app.write_all(&close(GOING, mask.last_chunk().copied())).await.ok();
        to_app.shutdown().await.ok();
    }
    if let Some(why) = why.filter(|_| answered.is_between()) {
        to_caller.write_all(&close(why, None)).await.ok();
    }
    to_caller.shutdown().await.ok();
    // What comes now would take away what it has not read yet.
    let mut rest = tokio::io::sink();
    drop(tokio::time::timeout(FAREWELL, tokio::io::copy(&mut from_caller, &mut rest)).await);
}

/// Until one of the two has had enough: `None`; or until then, and why: in between two frames, unless the rest of one is too long in coming.
async fn pump(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    (frames, flowed): (&mut Frames, impl Fn(&mut Frames, &[u8])),
    until: impl Future<Output = &'static str>,
) -> Option<&'static str> {
    let mut chunk = vec![0; 16 << 10];
    let mut until = pin!(until);
    let mut over: Option<(&'static str, Instant)> = None;
    loop {
        if let Some((why, by)) = over
            && (frames.is_between() || by <= Instant::now())
        {
            return Some(why);
        }
        let by = over.map_or_else(Instant::now, |(_, by)| by);
        let read = tokio::select! {
            read = from.read(&mut chunk) => read,
            why = &mut until, if over.is_none() => {
                over = Some((why, Instant::now() + FAREWELL));
                continue;
            }
            () = tokio::time::sleep_until(by), if over.is_some() => continue,
        };
        let Ok(n @ 1..) = read else { return None };
        flowed(frames, &chunk[..n]);
        if to.write_all(&chunk[..n]).await.is_err() || to.flush().await.is_err() {
            return None;
        }
    }
}

/// What of a caller's headers the app is told: not the token by which they are known here.
fn passed_on(headers: &HeaderMap) -> HeaderMap {
    let mut headers = without_hops(headers);
    for name in [header::AUTHORIZATION, header::HOST, header::CONTENT_LENGTH, header::EXPECT] {
        headers.remove(name);
    }
    headers
}

fn passed_back(headers: &HeaderMap) -> HeaderMap {
    let mut headers = without_hops(headers);
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers
}

fn without_hops(headers: &HeaderMap) -> HeaderMap {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(',').filter_map(|name| name.trim().parse().ok()))
        .collect();
    let mut headers = headers.clone();
    for name in HOPS.iter().chain(&named) {
        headers.remove(name);
    }
    headers.remove("keep-alive");
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_side_is_told_what_is_the_other_sides_alone() {
        let mut asked = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer of-the-caller"),
            ("connection", "keep-alive, X-Mine"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("host", "fleet"),
            ("content-length", "3"),
            ("content-type", "application/json"),
            ("last-event-id", "7"),
        ] {
            asked.insert(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        let passed = passed_on(&asked);
        let mut names: Vec<&str> = passed.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-type", "last-event-id"]);
    }

    #[test]
    fn one_caller_does_not_have_every_place() {
        let proxy = Proxy::new(None);
        let take = |caller| proxy.place(caller, 5);
        let refused = |caller| take(caller).err().map(|Failure(status, _)| status.as_u16());
        let mut taken: Vec<Place> = (0..STREAMS / PARTS).map(|_| take("a").unwrap()).collect();
        assert_eq!((refused("a"), refused("b")), (Some(429), None));
        for caller in ["b", "c", "d"] {
            taken.extend((0..STREAMS / PARTS).map(|_| take(caller).unwrap()));
        }
        assert_eq!(refused("e"), Some(503));
        taken.remove(0);
        assert_eq!((refused("b"), refused("e")), (Some(429), None));
        // Who is alone has all of them.
        let proxy = Proxy::new(None);
        let all: Vec<Place> = (0..STREAMS).map(|_| proxy.place("a", 1).unwrap()).collect();
        assert!(proxy.place("a", 1).is_err() && all.len() == STREAMS);
    }

    #[tokio::test]
    async fn of_all_bodies_so_much_is_held_at_once() {
        let proxy = Proxy::new(None);
        let refused = |whole: Answer<Whole>| whole.err().map(|Failure(status, _)| status.as_u16());
        let announced = |size: usize| Body::from(vec![0; size]);
        let pieces = |size: usize| {
            let pieces = futures_util::stream::iter((0..size / PIECE).map(|_| Ok::<_, std::io::Error>(vec![0; PIECE])));
            Body::from_stream(pieces)
        };
        for (body, most, status) in [
            (announced(BODY_MOST + 1), BODY_MOST, Some(413)),
            (pieces(BODY_MOST + PIECE), BODY_MOST, Some(413)),
            (announced(MESSAGE_MOST), MESSAGE_MOST, None),
            (pieces(2 * PIECE), MESSAGE_MOST, None),
        ] {
            assert_eq!(refused(proxy.whole(body, most).await), status);
        }
        assert_eq!(proxy.bodies.available_permits(), BODIES_MOST / PIECE, "what is gone takes no room");
        let mut held = Vec::new();
        while let Ok(whole) = proxy.whole(announced(BODY_MOST), BODY_MOST).await {
            held.push(whole);
        }
        assert_eq!(held.len(), BODIES_MOST / BODY_MOST);
        assert_eq!(refused(proxy.whole(pieces(PIECE), BODY_MOST).await), Some(503));
        assert_eq!(refused(proxy.whole(Body::empty(), BODY_MOST).await), None);
        held.pop();
        assert_eq!(refused(proxy.whole(pieces(BODY_MOST), BODY_MOST).await), None);
    }

    struct Never;

    impl Ended for Never {
        async fn wait(&mut self) -> &'static str {
            std::future::pending().await
        }

        async fn now(&self) -> Option<&'static str> {
            None
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_ends_when_nothing_has_flowed_either_way_for_long() {
        let ((mut caller, ours), (theirs, mut app)) = (tokio::io::duplex(64), tokio::io::duplex(64));
        let began = Instant::now();
        let tunnel = tokio::spawn(async move { through(ours, theirs, || {}, Never, watch::channel(false).1).await });
        let mut byte = [0];
        // Either keeps it.
        for _ in 0..3 {
            tokio::time::sleep(QUIET * 3 / 4).await;
            caller.write_all(b"1").await.unwrap();
            app.read_exact(&mut byte).await.unwrap();
            tokio::time::sleep(QUIET * 3 / 4).await;
            app.write_all(b"2").await.unwrap();
            caller.read_exact(&mut byte).await.unwrap();
        }
        tunnel.await.unwrap();
        let took = began.elapsed();
        assert!(took >= QUIET * 11 / 2 && took < QUIET * 6, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn events_end_by_themselves_or_after_a_while_in_between_two() {
        let began = Instant::now();
        let (end, ended) = watch::channel(false);
        // One every second, in two pieces; the fleet ends in the middle of the third.
        let pieces = futures_util::stream::unfold(0_u32, |n| async move {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let piece = if n.is_multiple_of(2) { "data: " } else { "x\r\n\r\n" };
            Some((Ok::<_, std::io::Error>(Bytes::from_static(piece.as_bytes())), n + 1))
        });
        let heard = tokio::spawn(until_the_end(pieces, ended.clone(), LAST_WORDS).map(Result::unwrap).collect::<Vec<Bytes>>());
        tokio::time::sleep(Duration::from_millis(2750)).await;
        end.send(true).unwrap();
        let heard = String::from_utf8(heard.await.unwrap().concat()).unwrap();
        let events = heard.strip_suffix(LAST_WORDS).unwrap();
        assert_eq!(events, "data: x\r\n\r\n".repeat(18), "the one that was begun is whole");
        assert_eq!(began.elapsed().as_secs(), 18);
        // One that ends before that has its own end.
        let short = futures_util::stream::iter(["data: x\n\n", "data: y\n\n"]);
        let short = short.map(|piece| Ok::<_, std::io::Error>(Bytes::from_static(piece.as_bytes())));
        let heard: Vec<Bytes> = until_the_end(short, ended, LAST_WORDS).map(Result::unwrap).collect().await;
        assert_eq!(heard.concat(), b"data: x\n\ndata: y\n\n");
    }

    #[test]
    fn only_a_websocket_is_an_upgrade() {
        let headers = |connection: &str, upgrade: &str| {
            HeaderMap::from_iter([(header::CONNECTION, connection.parse().unwrap()), (header::UPGRADE, upgrade.parse().unwrap())])
        };
        assert!(upgrades(&headers("keep-alive, Upgrade", "WebSocket")));
        assert!(!upgrades(&headers("keep-alive", "websocket")) && !upgrades(&headers("upgrade", "h2c")));
    }
}

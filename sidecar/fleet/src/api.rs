//! What callers ask for over HTTP. Each has a bearer token, and reaches its own sessions alone.

mod events;
mod letters;
mod page;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Path, Query, Request, State};
use axum::http::header::{AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi, ToSchema};

use crate::config::{Caller, Config, TEMPLATE_LABEL, nearest};
use crate::lifecycle::Phase;
use crate::metric;
use crate::place::Place;
use crate::provider;
use crate::proxy;
use crate::service::{self, Fleet, Lease, NotHeard, Told};
use crate::session::{Pattern, Session, SessionId, Wanted};
use crate::store::{self, Filter, HookRun, Inserted};

mod drain;

/// What is asked of us is small.
const BODY_MOST: usize = 64 << 10;
const BODY_WITHIN: Duration = Duration::from_secs(30);
const PAGE_MOST: usize = 500;
const LOGS_MOST: usize = 1 << 20;

#[derive(Clone)]
pub struct Api {
    pub fleet: Arc<Fleet>,
    pub config: Arc<Config>,
}

/// What is asked for.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewSession {
    /// One of the configuration's.
    #[schema(min_length = 1, example = "task")]
    pub template: String,
    /// 1 to 64 letters, digits, `-` and `_`. The same twice is one session. Left out: a new one.
    #[serde(default)]
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    pub id: Option<String>,
    /// Who pays. May be left out by who has one tenant alone.
    #[serde(default)]
    #[schema(pattern = r"^[^\x00-\x1f\x7f-\x9f]{1,64}$", example = "shop")]
    pub tenant: Option<String>,
}

/// A session, as its owner sees it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct View {
    pub id: String,
    pub template: Option<String>,
    pub tenant: String,
    pub owner: String,
    #[schema(value_type = String)]
    pub pattern: Pattern,
    pub provider: String,
    #[schema(value_type = String)]
    pub phase: Phase,
    #[schema(value_type = String)]
    pub wanted: Wanted,
    /// Why it is where it is.
    pub reason: Option<String>,
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
    /// When it is destroyed, whatever it does.
    #[schema(value_type = String, format = DateTime)]
    pub ends: Timestamp,
    /// The how-manieth container this is.
    pub generation: u32,
    /// What the provider calls the container.
    pub container: Option<String>,
    /// The node that it is on, where its provider has nodes.
    pub node: Option<String>,
    /// Until when its agents work, by the sidecar's word.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub busy_until: Option<Timestamp>,
    /// What its agents have cost, in USD.
    pub agent_usd: f64,
    /// What its containers have cost, in USD, by the provider's price.
    pub container_usd: f64,
    pub container_seconds: f64,
}

impl View {
    pub fn of(session: &Session) -> Self {
        Self {
            id: session.id.to_string(),
            template: session.spec.labels.get(TEMPLATE_LABEL).cloned(),
            tenant: session.tenant.clone(),
            owner: session.owner.clone(),
            pattern: session.pattern,
            provider: session.provider.clone(),
            phase: session.phase,
            wanted: session.wanted,
            reason: session.reason.clone(),
            since: session.since,
            created: session.created,
            ends: session.ends,
            generation: session.generation,
            container: session.native.clone(),
            node: session.node.clone(),
            busy_until: session.report.as_ref().and_then(|report| report.busy_until),
            agent_usd: session.cost_usd(),
            container_usd: session.container_usd,
            container_seconds: session.container_seconds,
        }
    }
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Views {
    pub sessions: Vec<View>,
    /// What `after` is for the next page, if there is one.
    pub next: Option<String>,
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Sessions of this phase alone.
    #[param(
        pattern = "^(requested|creating|starting|ready|active|idle|pausing|paused|resuming|stopping|stopped|destroyed|failed)$"
    )]
    phase: Option<String>,
    tenant: Option<String>,
    /// Those that are over, too.
    #[serde(default)]
    over: bool,
    /// The last id of the page before.
    #[param(pattern = "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    after: Option<String>,
    /// At most so many, 1 to 500.
    #[param(minimum = 1, maximum = 500)]
    limit: Option<usize>,
}

/// What was wrong.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Wrong {
    pub error: String,
}

#[derive(Debug)]
pub(crate) struct Failure(pub(crate) StatusCode, pub(crate) String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Failure(status, error) = self;
        let mut response = (status, axum::Json(Wrong { error })).into_response();
        if matches!(status, StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT) {
            // The rest of the body is not read: whoever asked for something else behind it would be cut off.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
        }
        response
    }
}

impl From<service::Error> for Failure {
    fn from(error: service::Error) -> Self {
        let status = match &error {
            service::Error::Unable { .. } | service::Error::NoProvider(_) | service::Error::NoNodes { .. } => {
                StatusCode::UNPROCESSABLE_ENTITY
            }
            service::Error::Full { .. } | service::Error::OverBudget(_) => StatusCode::TOO_MANY_REQUESTS,
            service::Error::Store(store::Error::Missing(_)) => StatusCode::NOT_FOUND,
            service::Error::Store(_) | service::Error::Circle(_) | service::Error::Drained { .. } => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        };
        Failure(status, error.to_string())
    }
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Self {
        service::Error::from(error).into()
    }
}

impl From<provider::Error> for Failure {
    fn from(error: provider::Error) -> Self {
        let status = match &error {
            provider::Error::Unsupported { .. } => StatusCode::NOT_IMPLEMENTED,
            provider::Error::Missing { .. } => StatusCode::NOT_FOUND,
            provider::Error::Busy { .. }
            | provider::Error::Unsure { .. }
            | provider::Error::Failed { .. }
            | provider::Error::Refused { .. } => StatusCode::BAD_GATEWAY,
        };
        Failure(status, error.to_string())
    }
}

pub(crate) type Answer<T> = Result<T, Failure>;

/// Whose token came with the request.
pub(crate) struct Who(Caller);

/// What was sent as one.
struct Bearer(String);

impl FromRequestParts<Api> for Bearer {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Answer<Self> {
        let token = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = token.and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let what = "the container's bearer token is needed";
        token.map(|(_, token)| Bearer(token.trim().to_owned())).ok_or_else(|| Failure(StatusCode::UNAUTHORIZED, what.to_owned()))
    }
}

impl FromRequestParts<Api> for Who {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Answer<Self> {
        let token = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = token.and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let caller = token.and_then(|(_, token)| api.config.caller(token.trim()));
        let what = "a bearer token of one of [callers] is needed";
        caller.cloned().map(Who).ok_or_else(|| Failure(StatusCode::UNAUTHORIZED, what.to_owned()))
    }
}

impl Who {
    fn reaches(&self, session: &Session) -> bool {
        self.0.admin || session.owner == self.0.name
    }
}

/// A body, with what is wrong with it in our own words.
struct Body<T>(T);

impl<T: DeserializeOwned> FromRequest<Api> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, api: &Api) -> Answer<Self> {
        let read = tokio::time::timeout(BODY_WITHIN, axum::Json::<T>::from_request(request, api)).await;
        let late = |_| Failure(StatusCode::REQUEST_TIMEOUT, String::from("the body does not come"));
        match read.map_err(late)? {
            Ok(axum::Json(body)) => Ok(Body(body)),
            Err(wrong) if wrong.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(Failure(wrong.status(), wrong.body_text())),
            Err(wrong) if wrong.status() == StatusCode::UNSUPPORTED_MEDIA_TYPE => Err(Failure(wrong.status(), wrong.body_text())),
            Err(wrong) => Err(Failure(StatusCode::BAD_REQUEST, wrong.body_text())),
        }
    }
}

/// Its query, likewise.
pub(crate) struct Asked<T>(pub(crate) T);

impl<T: DeserializeOwned + Send> FromRequestParts<Api> for Asked<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Answer<Self> {
        let asked = Query::<T>::from_request_parts(parts, api).await;
        asked.map(|Query(asked)| Asked(asked)).map_err(|wrong| Failure(StatusCode::BAD_REQUEST, wrong.body_text()))
    }
}

/// The id in its path. One that is no text names no session.
pub(crate) struct Named(pub(crate) String);

impl FromRequestParts<Api> for Named {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Answer<Self> {
        let named = Path::<String>::from_request_parts(parts, api).await;
        named.map(|Path(id)| Named(id)).map_err(|_| no_session("\u{fffd}"))
    }
}

pub(crate) fn no_session(id: &str) -> Failure {
    Failure(StatusCode::NOT_FOUND, format!("there is no session `{}` of yours", id.escape_debug()))
}

impl Api {
    /// What cannot be reached is not there.
    pub(crate) async fn session(&self, who: &Who, id: &str) -> Answer<Session> {
        let parsed = id.parse::<SessionId>().map_err(|_| no_session(id))?;
        let found = self.fleet.store().get(&parsed).await?;
        found.filter(|session| who.reaches(session)).ok_or_else(|| no_session(id))
    }

    async fn want(&self, who: &Who, id: &str, wanted: Wanted) -> Answer<Session> {
        let session = self.session(who, id).await?;
        if session.phase.is_last() && wanted != Wanted::Gone {
            return Err(Failure(StatusCode::CONFLICT, format!("session `{id}` is over: it is {}", session.phase)));
        }
        if session.wanted == Wanted::Gone && wanted != Wanted::Gone {
            return Err(Failure(StatusCode::CONFLICT, format!("session `{id}` is to end: it is {}", session.phase)));
        }
        if session.places.is_some() && wanted != Wanted::Gone {
            return Err(Failure(StatusCode::CONFLICT, format!("session `{id}` is a container that several are in")));
        }
        if session.pool.is_some() && wanted != Wanted::Gone {
            return Err(Failure(StatusCode::CONFLICT, format!("session `{id}` was made ahead, and waits to be somebody's")));
        }
        let why = format!("`{}` asked for it", who.0.name);
        self.fleet.want(&session.id, wanted, &why).await?.ok_or_else(|| no_session(id))
    }

    /// A new session, or the one that has this id.
    pub(crate) async fn make(&self, who: &Who, new: NewSession) -> Answer<(StatusCode, Session)> {
        let wrong = |what: String| Failure(StatusCode::BAD_REQUEST, what);
        let template = self.config.templates.get(&new.template);
        let template = template.ok_or_else(|| {
            let near = nearest(&new.template, self.config.templates.keys().map(String::as_str));
            wrong(format!("there is no template `{}`; {near}", new.template.escape_debug()))
        })?;
        let id = new.id.map_or_else(|| Ok(SessionId::fresh()), |id| id.parse()).map_err(wrong)?;
        let tenant = self.tenant(who, new.tenant)?;
        let spec = template.spec_for(&self.config.fleet.name, &id, &tenant, 1);
        let now = self.fleet.now();
        let mut session = Session::new(id, (&tenant, &who.0.name), template.pattern, &template.provider, spec, now);
        session.ends = now + template.max_age;
        session.place = template.shared.map(|share| Place::of(&session, share));
        let id = session.id.clone();
        let created = self.fleet.create(session.clone()).await.inspect_err(|error| metric::refused(&self.fleet, &tenant, error));
        match created? {
            Inserted::New => Ok((StatusCode::CREATED, session)),
            Inserted::Known(known) if !who.reaches(&known) => {
                Err(Failure(StatusCode::CONFLICT, format!("session `{id}` is somebody else's: choose another id")))
            }
            Inserted::Known(known) => match differs(&known, &session) {
                None => Ok((StatusCode::OK, *known)),
                Some(what) => Err(Failure(StatusCode::CONFLICT, format!("session `{id}` is there, {what}: choose another id"))),
            },
        }
    }

    fn tenant(&self, who: &Who, asked: Option<String>) -> Answer<String> {
        let tenant = match asked {
            Some(tenant) => tenant,
            None => match who.0.tenants.as_slice() {
                [one] => one.clone(),
                several => {
                    let which = if several.iter().any(|one| one == "*") { String::from("any") } else { several.join(", ") };
                    let what = format!("`tenant` is missing: who is to pay? `{}` may ask for {which}", who.0.name);
                    return Err(Failure(StatusCode::BAD_REQUEST, what));
                }
            },
        };
        let printable = !tenant.is_empty() && tenant.chars().count() <= 64 && !tenant.contains(|c: char| c.is_control());
        if !printable {
            return Err(Failure(StatusCode::BAD_REQUEST, String::from("a tenant has 1 to 64 printable characters")));
        }
        if !who.0.may_use(&tenant) {
            return Err(Failure(StatusCode::FORBIDDEN, format!("`{}` may not ask for tenant `{tenant}`", who.0.name)));
        }
        Ok(tenant)
    }
}

/// What the session of this id is that was not asked for now.
fn differs(known: &Session, asked: &Session) -> Option<String> {
    let template = |session: &Session| session.spec.labels.get(TEMPLATE_LABEL).cloned().unwrap_or_default();
    if template(known) != template(asked) {
        return Some(format!("made from template `{}`", template(known)));
    }
    (known.tenant != asked.tenant).then(|| format!("of tenant `{}`", known.tenant))
}

#[utoipa::path(post, path = "/v1/sessions", request_body = NewSession, security(("token" = [])),
    responses(
        (status = 201, body = View), (status = 200, description = "It was there already.", body = View), (status = 400, body = Wrong),
        (status = 401, body = Wrong), (status = 403, body = Wrong), (status = 409, description = "The id is somebody else's, or of another template or tenant.", body = Wrong),
        (status = 408, body = Wrong), (status = 413, body = Wrong), (status = 415, body = Wrong), (status = 422, description = "Its provider cannot do that.", body = Wrong),
        (status = 429, description = "Its tenant has nothing left.", body = Wrong), (status = 503, body = Wrong)))]
async fn create(State(api): State<Api>, who: Who, Body(new): Body<NewSession>) -> Answer<Response> {
    let (status, session) = api.make(&who, new).await?;
    let mut response = (status, axum::Json(View::of(&session))).into_response();
    if let Ok(location) = HeaderValue::from_str(&format!("/v1/sessions/{}", session.id)) {
        response.headers_mut().insert(LOCATION, location);
    }
    Ok(response)
}

#[utoipa::path(post, path = "/v1/containers/{key}/report", params(("key" = String, Path)), request_body = Told, security(("token" = [])),
    responses(
        (status = 200, body = Lease), (status = 400, body = Wrong), (status = 401, description = "Not this container's token.", body = Wrong),
        (status = 408, body = Wrong), (status = 413, body = Wrong), (status = 415, body = Wrong), (status = 503, body = Wrong)))]
async fn report(State(api): State<Api>, Named(key): Named, bearer: Bearer, Body(told): Body<Told>) -> Answer<axum::Json<Lease>> {
    let Bearer(token) = bearer;
    match api.fleet.reported(&key, &token, &told).await {
        Ok(lease) => Ok(axum::Json(lease)),
        Err(NotHeard::Failed(error)) => Err(error.into()),
        Err(NotHeard::Nonsense(what)) => Err(Failure(StatusCode::BAD_REQUEST, what.to_owned())),
        Err(stranger @ NotHeard::Stranger) => Err(Failure(StatusCode::UNAUTHORIZED, stranger.to_string())),
    }
}

#[utoipa::path(get, path = "/v1/sessions", params(Which), security(("token" = [])),
    responses((status = 200, body = Views), (status = 400, body = Wrong), (status = 401, body = Wrong), (status = 503, body = Wrong)))]
async fn list(State(api): State<Api>, who: Who, Asked(which): Asked<Which>) -> Answer<axum::Json<Views>> {
    let wrong = |what: String| Failure(StatusCode::BAD_REQUEST, what);
    let limit = which.limit.unwrap_or(100);
    if !(1..=PAGE_MOST).contains(&limit) {
        return Err(wrong(format!("`limit` is 1 to {PAGE_MOST}")));
    }
    let phase = which.phase.map(|name| {
        let found = Phase::ALL.into_iter().find(|phase| phase.as_str() == name);
        found.ok_or_else(|| {
            let near = nearest(&name, Phase::ALL.iter().map(|phase| phase.as_str()));
            wrong(format!("there is no phase `{}`; {near}", name.escape_debug()))
        })
    });
    let phases: Vec<Phase> = phase.transpose()?.into_iter().collect();
    let after =
        which.after.map(|after| after.parse::<SessionId>()).transpose().map_err(|what| wrong(format!("`after`: {what}")))?;
    let over = which.over || phases.iter().any(|phase| phase.is_last());
    let owner = (!who.0.admin).then(|| who.0.name.clone());
    let filter = Filter { owner, tenant: which.tenant, provider: None, phases, over };
    let found = api.fleet.store().list(&filter, after.as_ref(), limit).await?;
    let next = (found.len() == limit).then(|| found.last().map(|last| last.id.to_string())).flatten();
    Ok(axum::Json(Views { sessions: found.iter().map(View::of).collect(), next }))
}

#[utoipa::path(get, path = "/v1/sessions/{id}", params(("id" = String, Path)), security(("token" = [])),
    responses((status = 200, body = View), (status = 401, body = Wrong), (status = 404, body = Wrong), (status = 503, body = Wrong)))]
async fn show(State(api): State<Api>, who: Who, Named(id): Named) -> Answer<axum::Json<View>> {
    Ok(axum::Json(View::of(&api.session(&who, &id).await?)))
}

/// It ends: what it is, and what becomes of it, can be seen until it is forgotten.
#[utoipa::path(delete, path = "/v1/sessions/{id}", params(("id" = String, Path)), security(("token" = [])),
    responses((status = 202, body = View), (status = 401, body = Wrong), (status = 404, body = Wrong), (status = 503, body = Wrong)))]
async fn destroy(State(api): State<Api>, who: Who, Named(id): Named) -> Answer<Response> {
    let session = api.want(&who, &id, Wanted::Gone).await?;
    Ok((StatusCode::ACCEPTED, axum::Json(View::of(&session))).into_response())
}

#[utoipa::path(post, path = "/v1/sessions/{id}/pause", params(("id" = String, Path)), security(("token" = [])),
    responses((status = 202, body = View), (status = 401, body = Wrong), (status = 404, body = Wrong), (status = 409, body = Wrong),
        (status = 501, description = "Its provider cannot pause.", body = Wrong), (status = 503, body = Wrong)))]
async fn pause(State(api): State<Api>, who: Who, Named(id): Named) -> Answer<Response> {
    let session = api.session(&who, &id).await?;
    let provider = api.fleet.provider_of(&session)?;
    let template = session.spec.labels.get(TEMPLATE_LABEL).and_then(|name| api.config.templates.get(name));
    let archives = template.is_some_and(|template| template.archive);
    if !archives && provider.capabilities().pause == provider::Pause::No {
        return Err(
            provider::Error::Unsupported { provider: provider.name(), verb: "pause", hint: Some("stop it instead") }.into()
        );
    }
    let session = api.want(&who, &id, Wanted::Paused).await?;
    Ok((StatusCode::ACCEPTED, axum::Json(View::of(&session))).into_response())
}

#[utoipa::path(post, path = "/v1/sessions/{id}/resume", params(("id" = String, Path)), security(("token" = [])),
    responses((status = 202, body = View), (status = 401, body = Wrong), (status = 404, body = Wrong), (status = 409, body = Wrong),
        (status = 503, body = Wrong)))]
async fn resume(State(api): State<Api>, who: Who, Named(id): Named) -> Answer<Response> {
    let session = api.want(&who, &id, Wanted::Running).await?;
    Ok((StatusCode::ACCEPTED, axum::Json(View::of(&session))).into_response())
}

/// The last of what its container has printed.
#[utoipa::path(get, path = "/v1/sessions/{id}/logs", params(("id" = String, Path)), security(("token" = [])),
    responses((status = 200, content_type = "application/octet-stream"), (status = 401, body = Wrong), (status = 404, body = Wrong),
        (status = 409, description = "It has no container now.", body = Wrong),
        (status = 501, description = "Its provider keeps none.", body = Wrong), (status = 502, body = Wrong), (status = 503, body = Wrong)))]
async fn logs(State(api): State<Api>, who: Who, Named(id): Named) -> Answer<Response> {
    let session = api.session(&who, &id).await?;
    let Some(native) = session.native.as_ref().filter(|_| session.holds) else {
        return Err(Failure(StatusCode::CONFLICT, format!("session `{id}` has no container now: it is {}", session.phase)));
    };
    let said = api.fleet.provider_of(&session)?.logs(native, LOGS_MOST).await?;
    // Whatever an agent prints is never a page.
    Ok(([(CONTENT_TYPE, "application/octet-stream"), (CACHE_CONTROL, "no-store")], said).into_response())
}

/// What hooks have done for it, from the first to the last.
#[utoipa::path(get, path = "/v1/sessions/{id}/hooks", params(("id" = String, Path)), security(("token" = [])),
    responses((status = 200, body = Vec<Object>), (status = 401, body = Wrong), (status = 404, body = Wrong), (status = 503, body = Wrong)))]
async fn hooks(State(api): State<Api>, who: Who, Named(id): Named) -> Answer<axum::Json<Vec<HookRun>>> {
    let session = api.session(&who, &id).await?;
    Ok(axum::Json(api.fleet.store().hook_runs(&session.id).await?))
}

#[utoipa::path(get, path = "/livez", responses((status = 200, body = String)))]
async fn livez() -> &'static str {
    "ok\n"
}

/// Whether the store answers.
#[utoipa::path(get, path = "/readyz", responses((status = 200, body = String), (status = 503, body = Wrong)))]
async fn readyz(State(api): State<Api>) -> Answer<&'static str> {
    api.fleet.store().count().await?;
    Ok("ok\n")
}

#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String), (status = 503, body = Wrong)))]
async fn metrics(State(api): State<Api>) -> Answer<Response> {
    let text = metric::now(&api.fleet).await?;
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

struct Token;

impl Modify for Token {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    }
}

#[derive(OpenApi)]
#[openapi(
    info(title = "agent-fleet", description = "Containers for agents: created, watched, put to sleep, woken and destroyed."),
    paths(
        create, list, show, destroy, pause, resume, logs, hooks, proxy::messages, events::events, letters::list, letters::redeliver,
        report, drain::show, drain::begin, drain::end, drain::show_node, drain::begin_node, drain::end_node, livez, readyz, metrics
    ),
    components(schemas(
        NewSession, View, Views, Wrong, letters::Which, proxy::Message, Told, Lease, drain::Drain, drain::Drained
    )),
    modifiers(&Token)
)]
struct Document;

/// The document that describes all this, in JSON.
pub fn document() -> String {
    Document::openapi().to_pretty_json().unwrap_or_default()
}

async fn openapi() -> Response {
    ([(CONTENT_TYPE, "application/json")], document()).into_response()
}

async fn nothing() -> Failure {
    Failure(StatusCode::NOT_FOUND, String::from("there is nothing here: /openapi.json says what there is"))
}

async fn not_so() -> Failure {
    Failure(StatusCode::METHOD_NOT_ALLOWED, String::from("not with this method: /openapi.json says with which"))
}

pub fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/sessions", post(create).get(list))
        .route("/v1/sessions/{id}", get(show).delete(destroy))
        .route("/v1/sessions/{id}/pause", post(pause))
        .route("/v1/sessions/{id}/resume", post(resume))
        .route("/v1/sessions/{id}/logs", get(logs))
        .route("/v1/sessions/{id}/hooks", get(hooks))
        .merge(proxy::routes())
        .route("/v1/containers/{key}/report", post(report))
        .route("/v1/providers/{name}/drain", get(drain::show).post(drain::begin).delete(drain::end))
        .route("/v1/providers/{name}/nodes/{node}/drain", get(drain::show_node).post(drain::begin_node).delete(drain::end_node))
        .route("/v1/sessions/{id}/redeliver", post(letters::redeliver))
        .route("/v1/dead-letters", get(letters::list))
        .route("/v1/events", get(events::events))
        .merge(page::routes())
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi))
        .fallback(nothing)
        .method_not_allowed_fallback(not_so)
        .layer(DefaultBodyLimit::max(BODY_MOST))
        .with_state(api)
}

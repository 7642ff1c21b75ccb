//! A provider, or a node of one, is to be empty, and how far it is. For admins: it ends what others own.

use axum::extract::{FromRequestParts, Path, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Answer, Api, Body, Failure, Named, Who, Wrong};
use crate::drain::{Progress, Where, is_node};

/// The longest that what works may go on.
const MOST_SECONDS: u64 = 7 * 86_400;

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Drain {
    /// What works there may go on for so long, in seconds: at most a week.
    #[schema(minimum = 0, maximum = 604_800)]
    seconds: u64,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Drained {
    /// Until when what works there may go on; none: it is not being drained.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub(crate) until: Option<Timestamp>,
    /// Sessions that may still have a container there, and those of them that are asleep there until somebody wants them.
    pub(crate) left: usize,
    pub(crate) asleep: usize,
    /// Which ones are not asleep: a hundred at most.
    #[schema(max_items = 100)]
    pub(crate) sessions: Vec<String>,
}

impl From<Progress> for Drained {
    fn from(Progress { until, left, asleep, sessions }: Progress) -> Self {
        Self { until, left, asleep, sessions: sessions.into_iter().map(String::from).collect() }
    }
}

/// A node, as it is in the path.
pub(super) struct OfNode(Where);

impl FromRequestParts<Api> for OfNode {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Answer<Self> {
        let named = Path::<(String, String)>::from_request_parts(parts, api).await;
        // What is no text names none.
        let Path((provider, node)) = named.map_err(|_| no_provider("\u{fffd}"))?;
        if !is_node(&node) {
            return Err(Failure(StatusCode::BAD_REQUEST, format!("`{}` is no name of a node", node.escape_debug())));
        }
        Ok(Self(Where::node(&provider, &node)))
    }
}

fn no_provider(name: &str) -> Failure {
    Failure(StatusCode::NOT_FOUND, format!("there is no provider `{}`", name.escape_debug()))
}

fn may(api: &Api, who: &Who, at: Where) -> Answer<Where> {
    if !who.0.admin {
        return Err(Failure(StatusCode::FORBIDDEN, format!("`{}` is no admin, and others have sessions there", who.0.name)));
    }
    let known = api.config.providers.contains_key(&at.provider);
    if known { Ok(at) } else { Err(no_provider(&at.provider)) }
}

async fn begun(api: &Api, who: &Who, at: Where, asked: &Drain) -> Answer<Response> {
    let at = may(api, who, at)?;
    if asked.seconds > MOST_SECONDS {
        return Err(Failure(StatusCode::BAD_REQUEST, format!("`seconds` is 0 to {MOST_SECONDS}")));
    }
    let until = api.fleet.now() + std::time::Duration::from_secs(asked.seconds);
    let progress = api.fleet.drain(&at, Some(until)).await?;
    Ok((StatusCode::ACCEPTED, axum::Json(Drained::from(progress))).into_response())
}

async fn shown(api: &Api, who: &Who, at: Where) -> Answer<axum::Json<Drained>> {
    Ok(axum::Json(api.fleet.progress(&may(api, who, at)?).await?.into()))
}

async fn ended(api: &Api, who: &Who, at: Where) -> Answer<axum::Json<Drained>> {
    Ok(axum::Json(api.fleet.drain(&may(api, who, at)?, None).await?.into()))
}

/// Nothing new is made there from now on; what is idle goes at once, what works at the deadline.
#[utoipa::path(post, path = "/v1/providers/{name}/drain", params(("name" = String, Path)), request_body = Drain, security(("token" = [])),
    responses((status = 202, body = Drained), (status = 400, body = Wrong), (status = 401, body = Wrong), (status = 403, body = Wrong),
        (status = 404, body = Wrong), (status = 408, body = Wrong), (status = 413, body = Wrong), (status = 415, body = Wrong), (status = 503, body = Wrong)))]
pub(super) async fn begin(State(api): State<Api>, who: Who, Named(name): Named, Body(asked): Body<Drain>) -> Answer<Response> {
    begun(&api, &who, Where::all(&name), &asked).await
}

/// How far it is.
#[utoipa::path(get, path = "/v1/providers/{name}/drain", params(("name" = String, Path)), security(("token" = [])),
    responses((status = 200, body = Drained), (status = 401, body = Wrong), (status = 403, body = Wrong), (status = 404, body = Wrong),
        (status = 503, body = Wrong)))]
pub(super) async fn show(State(api): State<Api>, who: Who, Named(name): Named) -> Answer<axum::Json<Drained>> {
    shown(&api, &who, Where::all(&name)).await
}

/// It may be used again.
#[utoipa::path(delete, path = "/v1/providers/{name}/drain", params(("name" = String, Path)), security(("token" = [])),
    responses((status = 200, body = Drained), (status = 401, body = Wrong), (status = 403, body = Wrong), (status = 404, body = Wrong),
        (status = 503, body = Wrong)))]
pub(super) async fn end(State(api): State<Api>, who: Who, Named(name): Named) -> Answer<axum::Json<Drained>> {
    ended(&api, &who, Where::all(&name)).await
}

/// The same of one node of a provider: others are used instead.
#[utoipa::path(post, path = "/v1/providers/{name}/nodes/{node}/drain", params(("name" = String, Path), ("node" = String, Path)),
    request_body = Drain, security(("token" = [])),
    responses((status = 202, body = Drained), (status = 400, body = Wrong), (status = 401, body = Wrong), (status = 403, body = Wrong),
        (status = 404, body = Wrong), (status = 408, body = Wrong), (status = 413, body = Wrong), (status = 415, body = Wrong),
        (status = 422, description = "The provider has no nodes to choose from.", body = Wrong), (status = 503, body = Wrong)))]
pub(super) async fn begin_node(
    State(api): State<Api>,
    who: Who,
    OfNode(at): OfNode,
    Body(asked): Body<Drain>,
) -> Answer<Response> {
    begun(&api, &who, at, &asked).await
}

/// How far it is.
#[utoipa::path(get, path = "/v1/providers/{name}/nodes/{node}/drain", params(("name" = String, Path), ("node" = String, Path)),
    security(("token" = [])),
    responses((status = 200, body = Drained), (status = 400, body = Wrong), (status = 401, body = Wrong), (status = 403, body = Wrong),
        (status = 404, body = Wrong), (status = 422, body = Wrong), (status = 503, body = Wrong)))]
pub(super) async fn show_node(State(api): State<Api>, who: Who, OfNode(at): OfNode) -> Answer<axum::Json<Drained>> {
    shown(&api, &who, at).await
}

/// It may be used again.
#[utoipa::path(delete, path = "/v1/providers/{name}/nodes/{node}/drain", params(("name" = String, Path), ("node" = String, Path)),
    security(("token" = [])),
    responses((status = 200, body = Drained), (status = 400, body = Wrong), (status = 401, body = Wrong), (status = 403, body = Wrong),
        (status = 404, body = Wrong), (status = 422, body = Wrong), (status = 503, body = Wrong)))]
pub(super) async fn end_node(State(api): State<Api>, who: Who, OfNode(at): OfNode) -> Answer<axum::Json<Drained>> {
    ended(&api, &who, at).await
}

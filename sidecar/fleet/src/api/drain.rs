//! A provider is to be empty, and how far it is. For admins: it ends what others own.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Answer, Api, Body, Failure, Named, Who, Wrong};
use crate::drain::Progress;

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
}

impl From<Progress> for Drained {
    fn from(Progress { until, left, asleep }: Progress) -> Self {
        Self { until, left, asleep }
    }
}

fn provider<'a>(api: &Api, who: &Who, name: &'a str) -> Answer<&'a str> {
    if !who.0.admin {
        return Err(Failure(StatusCode::FORBIDDEN, format!("`{}` is no admin, and others have sessions there", who.0.name)));
    }
    let known = api.config.providers.contains_key(name);
    let what = || Failure(StatusCode::NOT_FOUND, format!("there is no provider `{}`", name.escape_debug()));
    known.then_some(name).ok_or_else(what)
}

/// Nothing new is made there from now on; what is idle goes at once, what works at the deadline.
#[utoipa::path(post, path = "/v1/providers/{name}/drain", params(("name" = String, Path)), request_body = Drain, security(("token" = [])),
    responses((status = 202, body = Drained), (status = 400, body = Wrong), (status = 401, body = Wrong), (status = 403, body = Wrong),
        (status = 404, body = Wrong), (status = 408, body = Wrong), (status = 413, body = Wrong), (status = 415, body = Wrong), (status = 503, body = Wrong)))]
pub(super) async fn begin(State(api): State<Api>, who: Who, Named(name): Named, Body(asked): Body<Drain>) -> Answer<Response> {
    let name = provider(&api, &who, &name)?;
    if asked.seconds > MOST_SECONDS {
        return Err(Failure(StatusCode::BAD_REQUEST, format!("`seconds` is 0 to {MOST_SECONDS}")));
    }
    let until = api.fleet.now() + std::time::Duration::from_secs(asked.seconds);
    let progress = api.fleet.drain(name, Some(until)).await?;
    Ok((StatusCode::ACCEPTED, axum::Json(Drained::from(progress))).into_response())
}

/// How far it is.
#[utoipa::path(get, path = "/v1/providers/{name}/drain", params(("name" = String, Path)), security(("token" = [])),
    responses((status = 200, body = Drained), (status = 401, body = Wrong), (status = 403, body = Wrong), (status = 404, body = Wrong),
        (status = 503, body = Wrong)))]
pub(super) async fn show(State(api): State<Api>, who: Who, Named(name): Named) -> Answer<axum::Json<Drained>> {
    let name = provider(&api, &who, &name)?;
    Ok(axum::Json(api.fleet.progress(name).await?.into()))
}

/// It may be used again.
#[utoipa::path(delete, path = "/v1/providers/{name}/drain", params(("name" = String, Path)), security(("token" = [])),
    responses((status = 200, body = Drained), (status = 401, body = Wrong), (status = 403, body = Wrong), (status = 404, body = Wrong),
        (status = 503, body = Wrong)))]
pub(super) async fn end(State(api): State<Api>, who: Who, Named(name): Named) -> Answer<axum::Json<Drained>> {
    let name = provider(&api, &who, &name)?;
    Ok(axum::Json(api.fleet.drain(name, None).await?.into()))
}

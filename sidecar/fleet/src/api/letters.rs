//! What hooks were told in vain, and telling it once more.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::ToSchema;

use super::{Answer, Api, Body, Failure, Named, Who, Wrong};
use crate::hook::dead_letters;
use crate::store::HookRun;

/// Sessions that are looked through at a time: who has more of them redelivers these first.
const SESSIONS_MOST: usize = 200;

/// Which of a session's.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Which {
    /// The `key` of a dead letter. Left out: all that the session has.
    #[serde(default)]
    key: Option<String>,
}

/// Calls of hooks that were given up, of the caller's sessions: at most two hundred sessions'.
#[utoipa::path(get, path = "/v1/dead-letters", security(("token" = [])),
    responses((status = 200, body = Vec<Object>), (status = 401, body = Wrong), (status = 503, body = Wrong)))]
pub(super) async fn list(State(api): State<Api>, who: Who) -> Answer<Json<Vec<HookRun>>> {
    let owner = (!who.0.admin).then_some(who.0.name.as_str());
    let mut letters = Vec::new();
    for id in api.fleet.store().with_dead_letters(owner, SESSIONS_MOST).await? {
        let runs = api.fleet.store().hook_runs(&id).await?;
        letters.extend(dead_letters(&runs).cloned());
    }
    Ok(Json(letters))
}

/// Tells them again, as they were, once. What came of each.
#[utoipa::path(post, path = "/v1/sessions/{id}/redeliver", params(("id" = String, Path)), request_body = Which, security(("token" = [])),
    responses((status = 200, body = Vec<Object>), (status = 400, body = Wrong), (status = 401, body = Wrong),
        (status = 404, description = "No such session, or no such dead letter.", body = Wrong), (status = 408, body = Wrong), (status = 413, body = Wrong), (status = 415, body = Wrong),
        (status = 503, body = Wrong)))]
pub(super) async fn redeliver(
    State(api): State<Api>,
    who: Who,
    Named(id): Named,
    Body(which): Body<Which>,
) -> Answer<Json<Vec<HookRun>>> {
    let session = api.session(&who, &id).await?;
    let runs = api.fleet.store().hook_runs(&session.id).await?;
    let mut told = Vec::new();
    for letter in dead_letters(&runs).filter(|letter| which.key.as_ref().is_none_or(|key| *key == letter.key)) {
        // Its hook may be in the configuration no more.
        told.extend(api.fleet.redeliver(&session, &letter.key).await?);
    }
    if told.is_empty() && which.key.is_some() {
        let what = format!("session `{}` has no such dead letter, or its hook is gone", session.id);
        return Err(Failure(StatusCode::NOT_FOUND, what));
    }
    Ok(Json(told))
}

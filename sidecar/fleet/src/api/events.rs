//! `/v1/events`: sessions as they change, for pages and scripts. They are told as they are and not what they went through: who changes twice between two
//! looks is told of once. Read from the store, so that it does not matter which fleet drives them.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::StatusCode;
use axum::http::header::CACHE_CONTROL;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};

use super::{Answer, Api, Failure, View, Who, Wrong};
use crate::lifecycle::Phase;
use crate::metric::LISTENERS;
use crate::service::Fleet;
use crate::session::{Session, SessionId, Wanted};
use crate::store;

/// Each asks the store once a second.
const LISTENERS_MOST: usize = 64;
static ROOM: Semaphore = Semaphore::const_new(LISTENERS_MOST);
const LOOK: Duration = Duration::from_secs(1);
/// A write may become visible after a later one, by so much.
const OVERLAP_MILLIS: i64 = 2_000;
const PAGE: usize = 500;
/// What waits for who listens; who does not read for so long is cut off.
const WAITING: usize = 64;
const READS_WITHIN: Duration = Duration::from_secs(30);
/// So that who listens, and what is between, knows that nobody has gone.
const BEAT: Duration = Duration::from_secs(10);

/// Sessions of the caller as they change, as server-sent events: `phase` where one came into a phase or something else is wanted of it, `session` where
/// something else changed. `id` is when, in milliseconds; who comes again with `Last-Event-ID` is told what has changed since then.
#[utoipa::path(get, path = "/v1/events", security(("token" = [])), params(("Last-Event-ID" = Option<i64>, Header)),
    responses((status = 200, content_type = "text/event-stream", body = String), (status = 400, body = Wrong), (status = 401, body = Wrong),
        (status = 429, description = "As many listen as may.", body = Wrong), (status = 503, body = Wrong)))]
pub(super) async fn events(State(api): State<Api>, who: Who, headers: HeaderMap) -> Answer<Response> {
    let wrong = || Failure(StatusCode::BAD_REQUEST, String::from("`Last-Event-ID` is a number that came with an event"));
    let last = headers.get("last-event-id").map(|id| id.to_str().ok().and_then(|id| id.parse::<i64>().ok()).ok_or_else(wrong));
    let last = last.transpose()?;
    let full = |_| Failure(StatusCode::TOO_MANY_REQUESTS, format!("{LISTENERS_MOST} listen already"));
    let permit = ROOM.try_acquire().map_err(full)?;
    let owner = (!who.0.admin).then(|| who.0.name.clone());
    let at = match last {
        Some(at) => at,
        None => api.fleet.store().changed(None, None, 1).await?.first().map_or(0, |(changed, _)| *changed),
    };
    let (tell, told) = mpsc::channel(WAITING);
    let feed = Feed { fleet: api.fleet, owner, at, resumed: last.is_some(), known: BTreeMap::new(), tell, cut: false };
    tokio::spawn(feed.run(permit));
    let stream = futures_util::stream::unfold(told, |mut told| async {
        told.recv().await.map(|event| (Ok::<_, Infallible>(event), told))
    });
    Ok(([(CACHE_CONTROL, "no-store")], Sse::new(stream).keep_alive(KeepAlive::new().interval(BEAT))).into_response())
}

/// A session as it was told last.
struct Known {
    changed: i64,
    version: i64,
    phase: Phase,
    wanted: Wanted,
}

/// What one who listens is told.
struct Feed {
    fleet: Arc<Fleet>,
    owner: Option<String>,
    /// Until when everything is told, but for the overlap.
    at: i64,
    resumed: bool,
    known: BTreeMap<SessionId, Known>,
    tell: mpsc::Sender<Event>,
    /// It does not read.
    cut: bool,
}

impl Feed {
    async fn run(mut self, permit: SemaphorePermit<'static>) {
        self.count();
        let mut ended = self.fleet.ended();
        // What was there before is known, unless somebody missed it.
        let since = self.at;
        loop {
            if let Err(error) = self.look(since).await {
                tracing::warn!(%error, "who listens to events is told nothing now");
            }
            if self.cut {
                break;
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = self.tell.closed() => break,
                _ = ended.wait_for(|ended| *ended) => break,
            }
        }
        drop(permit);
        self.count();
    }

    async fn look(&mut self, since: i64) -> store::Result<()> {
        let mut after = (self.at.saturating_sub(OVERLAP_MILLIS), String::new());
        loop {
            let page = self.fleet.store().changed(Some((after.0, &after.1)), self.owner.as_deref(), PAGE).await?;
            let more = page.len() == PAGE;
            for (changed, session) in page {
                after = (changed, session.id.to_string());
                self.at = self.at.max(changed);
                let event = self.event(changed, &session, since);
                let Some(event) = event else { continue };
                let told = tokio::time::timeout(READS_WITHIN, self.tell.send(event)).await;
                if !matches!(told, Ok(Ok(()))) {
                    self.cut = true;
                    return Ok(());
                }
            }
            if !more {
                // What is over is told no more, once it is out of the overlap.
                let past = self.at.saturating_sub(2 * OVERLAP_MILLIS);
                self.known.retain(|_, known| !known.phase.is_last() || known.changed > past);
                return Ok(());
            }
        }
    }

    /// `None`: it was told already.
    fn event(&mut self, changed: i64, session: &Session, since: i64) -> Option<Event> {
        let Session { version, phase, wanted, .. } = *session;
        let before = self.known.insert(session.id.clone(), Known { changed, version, phase, wanted });
        let entered = match before {
            Some(before) if before.version >= version => return None,
            Some(before) => (before.phase, before.wanted) != (phase, wanted),
            None if changed <= since && !self.resumed => return None,
            None => session.since.as_millisecond() > since.saturating_sub(OVERLAP_MILLIS),
        };
        let data = serde_json::to_string(&View::of(session)).ok()?;
        Some(Event::default().id(changed.to_string()).event(if entered { "phase" } else { "session" }).data(data))
    }

    fn count(&self) {
        let listening = LISTENERS_MOST.saturating_sub(ROOM.available_permits());
        self.fleet.metrics().set(&LISTENERS, &[], listening as f64);
    }
}

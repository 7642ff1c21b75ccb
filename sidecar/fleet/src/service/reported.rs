//! What sidecars tell the fleet by themselves: whether agents work, and what they have cost. Who is told does not have to ask, which keeps a
//! sandbox awake at some providers. The answer says how long the container may live.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Error, Fleet};
use crate::conversation::is_conversation;
use crate::inside::USD_MOST;
use crate::plan;
use crate::session::{Pushed, Report, Session, SessionId, Wanted};

/// Longer than that nobody's word holds.
const BUSY_MOST: f64 = 3600.0;
/// Reports that may be missing before the sidecar is asked.
const MISSING: u64 = 3;
const EVERY_MOST: u64 = 300;
/// Runs that are over and remembered: a report is not on its way for as long as so many take.
const OVER_MOST: usize = 16;

/// A sidecar's word.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct Told {
    /// The session that the container is for.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    pub session: String,
    /// Who speaks, and which word of its it is: a word that comes late, or twice, changes nothing.
    #[schema(max_length = 64)]
    pub run: String,
    pub seq: u64,
    pub busy: bool,
    /// How long that may be believed. No time of day: clocks differ.
    #[serde(default)]
    pub busy_seconds: f64,
    /// How often it speaks.
    #[serde(default)]
    pub every_seconds: u64,
    /// What all agents of this container have cost, in USD.
    pub cost_usd: f64,
    #[serde(default)]
    pub memory_bytes: f64,
    /// What the CLI calls its conversations, the last last.
    #[serde(default)]
    pub sessions: Vec<String>,
}

/// What it is told.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Lease {
    /// How long the container may live from now.
    pub lease_seconds: f64,
}

/// Why nothing is made of a word.
#[derive(Debug, thiserror::Error)]
pub enum NotHeard {
    /// Whether there is no such container or the token is another's is not said.
    #[error("there is no such container, or the token is not its own")]
    Stranger,
    #[error("{0}")]
    Nonsense(&'static str),
    #[error(transparent)]
    Failed(#[from] Error),
}

impl From<crate::store::Error> for NotHeard {
    fn from(error: crate::store::Error) -> Self {
        NotHeard::Failed(error.into())
    }
}

impl Fleet {
    /// A sidecar has said something, of the container that is called so.
    ///
    /// # Errors
    /// It is not who it says, or says what cannot be.
    pub async fn reported(&self, key: &str, token: &str, told: &Told) -> Result<Lease, NotHeard> {
        if !self.tokens.as_ref().is_some_and(|tokens| tokens.is_of(key, token)) {
            return Err(NotHeard::Stranger);
        }
        // It is kept as it is, and not every store keeps every character. Of the other texts only those are, that can be a conversation's name.
        let named = told.run.len() <= 64 && !told.run.chars().any(char::is_control);
        if !told.cost_usd.is_finite() || told.cost_usd < 0.0 || !named {
            let what = "`cost_usd` is an amount of dollars, and `run` has at most 64 bytes, none of them a control character";
            return Err(NotHeard::Nonsense(what));
        }
        let id: SessionId = told.session.parse().map_err(|_| NotHeard::Stranger)?;
        // A container that was made ahead says its first name.
        let session = self.holder(&id).await?.filter(|session| session.key() == key);
        let mut session = session.ok_or(NotHeard::Stranger)?;
        let now = self.now();
        if session.holds {
            let before = (session.report.as_ref().map(|report| report.busy_until.is_some()), session.cost_usd());
            if is_news(&session, told, now) {
                self.change(&mut session, |session| hear(session, told, now)).await?;
            }
            // What it says may be what is waited for.
            if (session.report.as_ref().map(|report| report.busy_until.is_some()), session.cost_usd()) != before {
                self.store.wake(&session.id).await?;
                self.due.notify_one();
            }
        }
        Ok(Lease { lease_seconds: lease(&session, now) })
    }
}

/// What the fleet was told lately enough not to ask.
pub(super) fn fresh(session: &Session, now: Timestamp) -> Option<Report> {
    let pushed = session.pushed.as_ref().filter(|pushed| pushed.generation == session.generation)?;
    // One that was told before it slept says nothing of what it does now.
    let late = session.phase == crate::lifecycle::Phase::Starting && pushed.at < session.since;
    let within = Duration::from_secs(pushed.every_seconds.clamp(1, EVERY_MOST) * MISSING);
    (!late && pushed.at + within > now).then(|| session.report.clone()).flatten()
}

/// Whether it is worth a write: an idle agent says the same again and again.
fn is_news(session: &Session, told: &Told, now: Timestamp) -> bool {
    let (Some(pushed), Some(report)) = (&session.pushed, &session.report) else { return true };
    if pushed.over.contains(&told.run) {
        return false;
    }
    let soon = pushed.at + Duration::from_secs(told.every_seconds.clamp(1, EVERY_MOST)) > now;
    let same = report.busy_until.is_some() == told.busy && !told.busy && report.cost_usd.to_bits() == told.cost_usd.to_bits();
    !(same && soon && pushed.run == told.run)
}

fn hear(session: &mut Session, told: &Told, now: Timestamp) {
    if !session.holds {
        return;
    }
    // Its sidecar has begun anew since: what this one had said was added up then, and would be once more.
    if session.pushed.as_ref().is_some_and(|pushed| pushed.over.contains(&told.run)) {
        return;
    }
    let before = session.pushed.as_ref().filter(|pushed| pushed.run == told.run && pushed.generation == session.generation);
    if before.is_some_and(|pushed| pushed.seq >= told.seq) {
        return;
    }
    let mut cost_usd = told.cost_usd.min(USD_MOST);
    // The same counter never goes back.
    if let (Some(_), Some(report)) = (before, &session.report) {
        cost_usd = cost_usd.max(report.cost_usd);
    }
    let busy = Duration::try_from_secs_f64(told.busy_seconds.clamp(0.0, BUSY_MOST)).unwrap_or_default();
    let conversation = told.sessions.last().filter(|name| is_conversation(name)).cloned();
    let at = session.report.as_ref().map_or(now, |report| report.at.max(now));
    let memory_bytes = crate::inside::bytes(told.memory_bytes).filter(|bytes| *bytes > 0);
    let report = Report { at, busy_until: told.busy.then(|| now + busy), cost_usd, conversation, memory_bytes };
    plan::heard(session, &report);
    let over = session.pushed.take().map_or_else(Vec::new, |last| over(last, &told.run));
    session.pushed = Some(Pushed {
        generation: session.generation,
        run: told.run.clone(),
        seq: told.seq,
        at: now,
        every_seconds: told.every_seconds,
        memory_bytes: told.memory_bytes.clamp(0.0, 1e18),
        over,
    });
}

/// Who is over, now that `run` speaks.
fn over(last: Pushed, run: &str) -> Vec<String> {
    let mut over = last.over;
    if last.run != run {
        over.push(last.run);
    }
    over.drain(..over.len().saturating_sub(OVER_MOST));
    over
}

/// What is left of the container's life: none, if the session is to be gone.
fn lease(session: &Session, now: Timestamp) -> f64 {
    if session.wanted == Wanted::Gone || session.phase.is_last() {
        return 0.0;
    }
    let made = session.made.map_or(session.ends, |made| made + session.spec.ttl);
    let ends = made.min(session.ends);
    now.until(ends).map_or(0.0, |left| left.total(jiff::Unit::Second).unwrap_or(0.0)).max(0.0)
}

//! What is remembered: sessions, who drives them, what tenants may still spend, and what hooks have done. The journal of every intent: a session is
//! written before the first call that it leads to.
//!
//! One interface, SQLite for one fleet and PostgreSQL for several. Nothing here knows what a phase means. An error other than [`Error::Conflict`] and
//! [`Error::Missing`] does not say that nothing was written: it may have been, and the answer was lost.

pub(crate) mod postgres;
mod sql;
mod sqlite;
mod together;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::lifecycle::Phase;
use crate::session::{Session, SessionId, Wanted};

/// How many runs of hooks are kept for a session, the last.
pub const HOOK_RUNS_MOST: i64 = 200;
/// How long after their sessions are forgotten amounts are kept: longer than the longest period.
pub const SPENT_KEPT: Duration = Duration::from_secs(400 * 24 * 60 * 60);
/// How long what other processes book may be missing in [`Store::book`]'s sums.
pub const SUMS_HOLD: Duration = Duration::from_secs(1);

/// Opens a store and brings its schema up to ours: `sqlite:PATH`, `sqlite::memory:` or `postgres://…`.
///
/// # Errors
/// If it cannot be reached, or is of a newer version than this. No message has the URL in it.
pub async fn open(url: &str) -> Result<Arc<dyn Store>> {
    check(url).map_err(Error::Store)?;
    match sqlite_path(url) {
        Some(":memory:") => memory().await,
        Some(path) => Ok(Arc::new(sqlite::file(Path::new(path)).await?)),
        None => Ok(Arc::new(postgres::connect(url).await?)),
    }
}

fn sqlite_path(url: &str) -> Option<&str> {
    url.strip_prefix("sqlite:").map(|path| path.strip_prefix("//").unwrap_or(path))
}

/// What can be said of it before it is opened.
///
/// # Errors
/// What is wrong with the URL, without the URL.
pub fn check(url: &str) -> std::result::Result<(), String> {
    match sqlite_path(url) {
        Some("") => Err(String::from("`sqlite:` wants a path after it")),
        Some(path) if path.contains('?') => Err(String::from("`sqlite:` takes a path and no parameters")),
        Some(_) => Ok(()),
        None if url.starts_with("postgres://") || url.starts_with("postgresql://") => postgres::options(url).map(drop),
        None => Err(String::from("a store is `sqlite:PATH`, `sqlite::memory:` or `postgres://…`")),
    }
}

/// One of its own, which is gone with its last user.
///
/// # Errors
/// If there is no memory for it.
pub async fn memory() -> Result<Arc<dyn Store>> {
    Ok(Arc::new(sqlite::memory().await?))
}

/// What came of asking for a session.
#[derive(Clone, Debug, PartialEq)]
pub enum Inserted {
    New,
    /// It was there already, like this.
    Known(Box<Session>),
}

/// What a new session needs room in.
#[derive(Clone, Copy, Debug)]
pub enum Within<'a> {
    /// Its tenant has fewer than so many that somebody has asked for and that are not at their end.
    Tenant(u64),
    /// There is none beside these that waits for sessions of the same kind ([`Session::spare`]).
    Beside(&'a [SessionId]),
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Filter {
    pub owner: Option<String>,
    pub tenant: Option<String>,
    pub provider: Option<String>,
    pub phases: Vec<Phase>,
    /// Those that are over, too.
    pub over: bool,
}

/// One try of one hook.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HookRun {
    pub session: SessionId,
    pub generation: u32,
    pub phase: Phase,
    /// Its name in the configuration.
    pub hook: String,
    pub at: Timestamp,
    pub seconds: f64,
    /// The how-manieth try, from 1.
    pub attempt: u32,
    /// `ok`, `veto`, `failed`, `timeout`, `dead-letter`.
    pub outcome: String,
    /// What it said, cut.
    pub said: String,
    /// The same for each try of one run: the event's id.
    #[serde(default)]
    pub key: String,
    /// When it is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub again: Option<Timestamp>,
    /// What it was told, as it was sent, where it may have to be told again: a failed try's event, or a dead letter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else has written since it was read: read it again.
    #[error("session {0} was changed by somebody else")]
    Conflict(SessionId),
    #[error("there is no session {0}")]
    Missing(SessionId),
    #[error("the store: {0}")]
    Store(String),
}

pub type Result<T> = std::result::Result<T, Error>;

#[async_trait]
pub trait Store: Send + Sync {
    /// Writes a new session; the one that is there is left as it is.
    async fn insert(&self, session: &Session) -> Result<Inserted>;
    /// The same, if there is room for it: decided in the one write, whoever else asks at the same time. `None`: there is not.
    async fn insert_within(&self, session: &Session, within: Within<'_>) -> Result<Option<Inserted>>;
    async fn get(&self, id: &SessionId) -> Result<Option<Session>>;
    /// Writes what was read and changed. On success `session.version` is the new one.
    ///
    /// # Errors
    /// [`Error::Conflict`] if it is not the version that was read.
    async fn update(&self, session: &mut Session) -> Result<()>;
    /// The same, for what would be found out again: it need not outlive a machine that loses its power, unless something later does.
    async fn note(&self, session: &mut Session) -> Result<()> {
        self.update(session).await
    }
    /// What somebody wants of one, in one write: nobody has to have read it, and who drives it all the time keeps nobody waiting. Why, where it is to be gone;
    /// one that is to run is not idle until now. Says whether that can still be wanted: not of one that is to be gone, is over, or is not there.
    async fn want(&self, id: &SessionId, wanted: Wanted, why: &str, now: Timestamp) -> Result<bool>;
    /// Writes two that were read and changed, or neither: what the one gives the other has.
    ///
    /// # Errors
    /// [`Error::Conflict`] of the first if one of them is not the version that was read.
    async fn update_both(&self, one: &mut Session, other: &mut Session) -> Result<()>;
    /// Some of those whose containers wait for a session of that kind, by chance: who asks at the same time is not to be given the same.
    async fn spares(&self, kind: &str, most: usize) -> Result<Vec<Session>>;
    /// In the order of their ids, from the one after.
    async fn list(&self, filter: &Filter, after: Option<&SessionId>, most: usize) -> Result<Vec<Session>>;
    /// How many there are in each phase, by provider and tenant.
    async fn count(&self) -> Result<Vec<(Phase, String, String, u64)>>;

    /// Takes sessions that nobody drives and that are due (`wake` at or before now), for so long. A session is driven by one fleet at a time: by the
    /// store's own clock, so that it does not matter whose is wrong. `fleet` is a name of this process alone: the one that it replaces may still hold some.
    async fn claim(&self, fleet: &str, lease: Duration, most: usize) -> Result<Vec<Session>>;
    /// Goes on holding what it has claimed here and not let go of. How many these are: what it has lost is not among them. What it does not know of is nobody's
    /// when the lease ends: a claim whose answer was lost, a release that has failed.
    async fn renew(&self, fleet: &str, lease: Duration) -> Result<u64>;
    /// Lets go of one, which is due again at `wake`, or at once if it was woken since it was claimed. `None`: nothing is due, until somebody wakes it. What
    /// it does not hold it does not let go of.
    async fn release(&self, fleet: &str, id: &SessionId, wake: Option<Timestamp>) -> Result<()>;
    /// Makes it due: something has happened. Does nothing to who drives it now, who sees it after.
    async fn wake(&self, id: &SessionId) -> Result<()>;

    /// Sets aside an amount in USD of what a tenant may spend in a period (`2026-11-26`, `2026-11`), for a session, if it fits below the limit with what all
    /// others have set aside. Once more for the same session and period replaces what it had. Says whether it fitted.
    async fn reserve(&self, tenant: &str, period: &str, session: &SessionId, usd: f64, limit_usd: f64) -> Result<bool>;
    /// What a session has spent in that period, in the place of what was set aside: nobody's leave is asked.
    async fn spend(&self, tenant: &str, period: &str, session: &SessionId, usd: f64) -> Result<()>;
    /// The same in several periods, and what is then set aside and spent in each: all that was written through this store, and all that others had written
    /// [`SUMS_HOLD`] before.
    async fn book(&self, tenant: &str, session: &SessionId, spent: &[(String, f64)]) -> Result<Vec<f64>> {
        let mut sums = Vec::new();
        for (period, usd) in spent {
            self.spend(tenant, period, session, *usd).await?;
            sums.push(self.spent(tenant, period).await?);
        }
        Ok(sums)
    }
    /// What is set aside and spent there.
    async fn spent(&self, tenant: &str, period: &str) -> Result<f64>;

    /// When there was nothing in it yet, by its own clock: what is older than that it cannot know.
    async fn born(&self) -> Result<Timestamp>;

    /// Takes upon it, or goes on with, what one fleet does for all, for so long. Whether it is its own now.
    async fn duty(&self, name: &str, fleet: &str, lease: Duration) -> Result<bool>;
    /// Nothing new is made at a provider, and what works there may go on until then. `None`: no longer so.
    async fn drain(&self, provider: &str, until: Option<Timestamp>) -> Result<()>;
    /// Where that is so.
    async fn drains(&self) -> Result<BTreeMap<String, Timestamp>>;

    async fn log_hook(&self, run: &HookRun) -> Result<()>;
    /// What hooks have done for it, from the first to the last, of which the last [`HOOK_RUNS_MOST`] are kept.
    async fn hook_runs(&self, id: &SessionId) -> Result<Vec<HookRun>>;
    /// Sessions of an owner, or of all, for which a hook has been given up at least once, in the order of their ids.
    async fn with_dead_letters(&self, owner: Option<&str>, most: usize) -> Result<Vec<SessionId>>;
    /// Sessions that were written after that one, each with when (milliseconds by the store's own clock), in that order. A write that began before may become
    /// visible after one that is told here. `None`: the last alone.
    async fn changed(&self, after: Option<(i64, &str)>, owner: Option<&str>, most: usize) -> Result<Vec<(i64, Session)>>;
    /// Forgets sessions that are over and were last changed before then, with their hooks' runs. How many. Amounts stay for [`SPENT_KEPT`] longer.
    async fn prune(&self, before: Timestamp) -> Result<u64>;
}

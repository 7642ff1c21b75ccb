//! A store, with what it is asked counted: how long it takes, what it cannot do, what becomes due, and what hooks do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use jiff::Timestamp;

use super::{CLAIMED_AT, CLAIMS, HOOK_DURATION, HOOK_RUNS, LEASES, Metrics, STORE_DURATION, STORE_ERRORS};
use crate::lifecycle::Phase;
use crate::session::{Session, SessionId, Wanted};
use crate::store::{Error, Filter, HookRun, Inserted, Result, Store, Within};

pub(super) const OPERATIONS: &[&str] = &[
    "insert",
    "get",
    "update",
    "note",
    "want",
    "update_both",
    "spares",
    "list",
    "count",
    "claim",
    "renew",
    "release",
    "wake",
    "reserve",
    "spend",
    "book",
    "spent",
    "born",
    "duty",
    "drain",
    "drains",
    "log_hook",
    "hook_runs",
    "with_dead_letters",
    "changed",
    "prune",
];

/// Everything is the store's own but the counting.
pub struct Counted {
    store: Arc<dyn Store>,
    metrics: Arc<Metrics>,
}

impl Counted {
    pub fn over(store: Arc<dyn Store>, metrics: &Arc<Metrics>) -> Arc<dyn Store> {
        Arc::new(Self { store, metrics: Arc::clone(metrics) })
    }

    async fn timed<T>(&self, operation: &'static str, work: impl Future<Output = Result<T>>) -> Result<T> {
        let began = Instant::now();
        let answer = work.await;
        self.metrics.observe(&STORE_DURATION, &[operation], began.elapsed());
        if let Err(Error::Store(_)) = &answer {
            self.metrics.add(&STORE_ERRORS, &[operation], 1.0);
        }
        answer
    }
}

#[async_trait]
impl Store for Counted {
    async fn insert(&self, session: &Session) -> Result<Inserted> {
        self.timed("insert", self.store.insert(session)).await
    }

    async fn insert_within(&self, session: &Session, within: Within<'_>) -> Result<Option<Inserted>> {
        self.timed("insert", self.store.insert_within(session, within)).await
    }

    async fn get(&self, id: &SessionId) -> Result<Option<Session>> {
        self.timed("get", self.store.get(id)).await
    }

    async fn update(&self, session: &mut Session) -> Result<()> {
        self.timed("update", self.store.update(session)).await
    }

    async fn note(&self, session: &mut Session) -> Result<()> {
        self.timed("note", self.store.note(session)).await
    }

    async fn want(&self, id: &SessionId, wanted: Wanted, why: &str, now: Timestamp) -> Result<bool> {
        self.timed("want", self.store.want(id, wanted, why, now)).await
    }

    async fn update_both(&self, one: &mut Session, other: &mut Session) -> Result<()> {
        self.timed("update_both", self.store.update_both(one, other)).await
    }

    async fn spares(&self, kind: &str, most: usize) -> Result<Vec<Session>> {
        self.timed("spares", self.store.spares(kind, most)).await
    }

    async fn list(&self, filter: &Filter, after: Option<&SessionId>, most: usize) -> Result<Vec<Session>> {
        self.timed("list", self.store.list(filter, after, most)).await
    }

    async fn count(&self) -> Result<Vec<(Phase, String, String, u64)>> {
        self.timed("count", self.store.count()).await
    }

    async fn claim(&self, fleet: &str, lease: Duration, most: usize) -> Result<Vec<Session>> {
        let claimed = self.timed("claim", self.store.claim(fleet, lease, most)).await?;
        self.metrics.add(&CLAIMS, &[], claimed.len() as f64);
        self.metrics.set(&CLAIMED_AT, &[], seconds(Timestamp::now()));
        Ok(claimed)
    }

    async fn renew(&self, fleet: &str, lease: Duration) -> Result<u64> {
        let held = self.timed("renew", self.store.renew(fleet, lease)).await?;
        self.metrics.set(&LEASES, &[], held as f64);
        Ok(held)
    }

    async fn release(&self, fleet: &str, id: &SessionId, wake: Option<Timestamp>) -> Result<()> {
        self.timed("release", self.store.release(fleet, id, wake)).await
    }

    async fn wake(&self, id: &SessionId) -> Result<()> {
        self.timed("wake", self.store.wake(id)).await
    }

    async fn reserve(&self, tenant: &str, period: &str, session: &SessionId, usd: f64, limit_usd: f64) -> Result<bool> {
        self.timed("reserve", self.store.reserve(tenant, period, session, usd, limit_usd)).await
    }

    async fn spend(&self, tenant: &str, period: &str, session: &SessionId, usd: f64) -> Result<()> {
        self.timed("spend", self.store.spend(tenant, period, session, usd)).await
    }

    async fn book(&self, tenant: &str, session: &SessionId, spent: &[(String, f64)]) -> Result<Vec<f64>> {
        self.timed("book", self.store.book(tenant, session, spent)).await
    }

    async fn spent(&self, tenant: &str, period: &str) -> Result<f64> {
        self.timed("spent", self.store.spent(tenant, period)).await
    }

    async fn born(&self) -> Result<Timestamp> {
        self.timed("born", self.store.born()).await
    }

    async fn duty(&self, name: &str, fleet: &str, lease: Duration) -> Result<bool> {
        self.timed("duty", self.store.duty(name, fleet, lease)).await
    }

    async fn drain(&self, provider: &str, until: Option<Timestamp>) -> Result<()> {
        self.timed("drain", self.store.drain(provider, until)).await
    }

    async fn drains(&self) -> Result<BTreeMap<String, Timestamp>> {
        self.timed("drains", self.store.drains()).await
    }

    async fn log_hook(&self, run: &HookRun) -> Result<()> {
        // It has run, also if that cannot be kept.
        self.metrics.add(&HOOK_RUNS, &[&run.hook, &run.outcome], 1.0);
        self.metrics.observe(&HOOK_DURATION, &[&run.hook], Duration::try_from_secs_f64(run.seconds).unwrap_or_default());
        self.timed("log_hook", self.store.log_hook(run)).await
    }

    async fn hook_runs(&self, id: &SessionId) -> Result<Vec<HookRun>> {
        self.timed("hook_runs", self.store.hook_runs(id)).await
    }

    async fn with_dead_letters(&self, owner: Option<&str>, most: usize) -> Result<Vec<SessionId>> {
        self.timed("with_dead_letters", self.store.with_dead_letters(owner, most)).await
    }

    async fn changed(&self, after: Option<(i64, &str)>, owner: Option<&str>, most: usize) -> Result<Vec<(i64, Session)>> {
        self.timed("changed", self.store.changed(after, owner, most)).await
    }

    async fn prune(&self, before: Timestamp) -> Result<u64> {
        self.timed("prune", self.store.prune(before)).await
    }
}

/// As Prometheus has times.
pub(super) fn seconds(at: Timestamp) -> f64 {
    at.as_millisecond() as f64 / 1e3
}

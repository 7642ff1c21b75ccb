//! What is asked of the store when somebody reads the metrics.

use std::collections::BTreeMap;

use super::{BUDGET_LIMIT, BUDGET_USED, DRAINS, Metric, PHASE_OLDEST, REFUSALS, SESSIONS};
use crate::lifecycle::Phase;
use crate::service::{self, Fleet};
use crate::session::SessionId;
use crate::store::{self, Filter};

/// Phases that nobody is to stay in, and that of those whose container is not gone yet.
const PASSING: [Phase; 8] = [
    Phase::Requested,
    Phase::Creating,
    Phase::Starting,
    Phase::Pausing,
    Phase::Resuming,
    Phase::Stopping,
    Phase::Stopped,
    Phase::Failed,
];
/// Who reads metrics is not to read a store of a million sessions: of so many in passing phases at most.
const LOOKED_AT: usize = 5_000;
const PAGE: usize = 500;

type Told = Vec<(&'static Metric, Vec<String>, f64)>;

/// All of it, as Prometheus reads it.
///
/// # Errors
/// The store's.
pub async fn now(fleet: &Fleet) -> store::Result<String> {
    let mut told = Told::new();
    sessions(fleet, &mut told).await?;
    oldest(fleet, &mut told).await?;
    budgets(fleet, &mut told).await?;
    drains(fleet, &mut told).await?;
    Ok(fleet.metrics().exposition(told))
}

async fn sessions(fleet: &Fleet, told: &mut Told) -> store::Result<()> {
    let mut sessions: BTreeMap<Vec<String>, u64> = BTreeMap::new();
    for (phase, provider, tenant, count) in fleet.store().count().await? {
        let labels = vec![phase.to_string(), provider, fleet.metrics().tenant(&tenant).to_owned()];
        *sessions.entry(labels).or_default() += count;
    }
    told.extend(sessions.into_iter().map(|(labels, count)| (&SESSIONS, labels, count as f64)));
    Ok(())
}

async fn oldest(fleet: &Fleet, told: &mut Told) -> store::Result<()> {
    let filter = Filter { phases: PASSING.to_vec(), ..Filter::default() };
    let mut oldest: BTreeMap<Vec<String>, f64> = BTreeMap::new();
    for provider in fleet.providers().keys() {
        for phase in PASSING {
            oldest.insert(vec![phase.to_string(), provider.clone()], 0.0);
        }
    }
    let mut after: Option<SessionId> = None;
    for _ in 0..LOOKED_AT / PAGE {
        let page = fleet.store().list(&filter, after.as_ref(), PAGE).await?;
        for session in &page {
            let age = fleet.now().duration_since(session.since).as_secs_f64();
            let most = oldest.entry(vec![session.phase.to_string(), session.provider.clone()]).or_default();
            *most = most.max(age);
        }
        match page.last() {
            Some(last) if page.len() == PAGE => after = Some(last.id.clone()),
            _ => break,
        }
    }
    told.extend(oldest.into_iter().map(|(labels, age)| (&PHASE_OLDEST, labels, age)));
    Ok(())
}

async fn drains(fleet: &Fleet, told: &mut Told) -> store::Result<()> {
    let drains = fleet.store().drains().await?;
    for (provider, scope) in fleet.providers().keys().flat_map(|name| [(name, "provider"), (name, "node")]) {
        let of = |key: &String| {
            key.strip_prefix(provider).is_some_and(|rest| if scope == "node" { rest.starts_with('/') } else { rest.is_empty() })
        };
        let count = drains.keys().filter(|key| of(key)).count();
        told.push((&DRAINS, vec![provider.clone(), scope.to_owned()], count as f64));
    }
    Ok(())
}

async fn budgets(fleet: &Fleet, told: &mut Told) -> store::Result<()> {
    // What is made ahead is nobody's, and has no bound.
    for tenant in fleet.budgets().tenants().values().filter(|tenant| !tenant.name.is_empty()) {
        for (period, limit) in tenant.periods(fleet.now()) {
            let length = if period.len() > "2026-11".len() { "day" } else { "month" };
            let labels = vec![tenant.name.clone(), length.to_owned()];
            told.push((&BUDGET_USED, labels.clone(), fleet.store().spent(&tenant.name, &period).await?));
            told.push((&BUDGET_LIMIT, labels, limit));
        }
    }
    Ok(())
}

/// Somebody asked for a session, and was told no.
pub fn refused(fleet: &Fleet, tenant: &str, error: &service::Error) {
    let reason = match error {
        service::Error::OverBudget(_) => "budget",
        service::Error::Drained { .. } => "drained",
        service::Error::Full { .. } => "full",
        service::Error::Unable { .. } => "unable",
        service::Error::Store(_) | service::Error::NoProvider(_) | service::Error::NoNodes { .. } | service::Error::Circle(_) => {
            return;
        }
    };
    fleet.metrics().add(&REFUSALS, &[reason, fleet.metrics().tenant(tenant)], 1.0);
}

//! What tenants may spend: set aside before a container is created, and held against what it has cost while it runs.
//!
//! A session that goes over midnight has spent some of its money yesterday: what it had cost when a period began is kept with it
//! ([`Session::cost_at`]), so that a day's budget is asked for that day's money alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::config::Tenant;
use crate::provider::Price;
use crate::session::Session;
use crate::store::{self, Store};

/// What its container itself costs in its whole life, in USD.
pub fn needs(session: &Session, price: &Price) -> f64 {
    life(session.spec.ttl, price)
}

/// What a container costs that runs for so long, in USD.
pub fn life(ttl: Duration, price: &Price) -> f64 {
    ttl.as_secs_f64() / 3600.0 * price.running
}

pub struct Budgets {
    store: Arc<dyn Store>,
    tenants: BTreeMap<String, Tenant>,
}

impl Budgets {
    pub fn new(store: Arc<dyn Store>, mut tenants: BTreeMap<String, Tenant>) -> Self {
        // What is nobody's is added up, too, and has no limit but the size of its pool.
        let budget_usd_per_month = Some(f64::INFINITY);
        let nobody = Tenant {
            name: String::new(),
            budget_usd_per_day: None,
            budget_usd_per_month,
            zone: TimeZone::UTC,
            max_sessions: None,
        };
        tenants.insert(String::new(), nobody);
        Self { store, tenants }
    }

    pub fn tenants(&self) -> &BTreeMap<String, Tenant> {
        &self.tenants
    }

    /// Sets aside what the container itself costs over its whole life, in every period. Why not, if it does not fit; then nothing is set aside.
    pub async fn admit(&self, session: &Session, price: &Price, now: Timestamp) -> store::Result<Result<(), String>> {
        let Some(tenant) = self.tenants.get(&session.tenant) else { return Ok(Ok(())) };
        let usd = needs(session, price);
        let mut set_aside: Vec<String> = Vec::new();
        for (period, limit) in tenant.periods(now) {
            if !self.store.reserve(&tenant.name, &period, &session.id, usd, limit).await? {
                for period in &set_aside {
                    self.store.spend(&tenant.name, period, &session.id, 0.0).await?;
                }
                let spent = self.store.spent(&tenant.name, &period).await?;
                return Ok(Err(format!(
                    "the budget of tenant `{}` for {period} is {limit} USD: {spent:.2} are spent or set aside, and this needs {usd:.2}",
                    tenant.name
                )));
            }
            set_aside.push(period);
        }
        Ok(Ok(()))
    }

    /// Takes back what was set aside for a session that came to nothing.
    pub async fn release(&self, session: &Session, now: Timestamp) -> store::Result<()> {
        let Some(tenant) = self.tenants.get(&session.tenant) else { return Ok(()) };
        for (period, _) in tenant.periods(now) {
            self.store.spend(&tenant.name, &period, &session.id, 0.0).await?;
        }
        Ok(())
    }

    /// Which periods there are for it now, each with what it had cost when that period began for it: to be kept with it.
    pub fn periods(&self, session: &Session, now: Timestamp) -> BTreeMap<String, f64> {
        let Some(tenant) = self.tenants.get(&session.tenant) else { return BTreeMap::new() };
        let total = session.total_usd();
        // The first that it has were there when it came: all it has cost is of them.
        let first = if session.cost_at.is_empty() { 0.0 } else { total };
        let periods = tenant.periods(now).into_iter().map(|(period, _)| {
            // Whose clock is behind does not begin again what is over.
            let newest = session.cost_at.keys().filter(|known| known.len() == period.len()).max();
            let period = newest.filter(|newest| **newest > period).cloned().unwrap_or(period);
            let at = session.cost_at.get(&period).copied().unwrap_or(first);
            (period, at)
        });
        periods.collect()
    }

    /// Books what it has cost in periods that are over: nobody asks for them again.
    pub async fn close(&self, session: &Session, now: &BTreeMap<String, f64>) -> store::Result<()> {
        for (period, at) in session.cost_at.iter().filter(|(period, _)| !now.contains_key(*period)) {
            self.store.spend(&session.tenant, period, &session.id, (session.total_usd() - at).max(0.0)).await?;
        }
        Ok(())
    }

    /// Books what it has cost. If its tenant has nothing left: why it has to end, and how much that is more than there is, with what is set aside.
    pub async fn charge(&self, session: &Session, now: Timestamp) -> store::Result<Option<(String, f64)>> {
        let Some(tenant) = self.tenants.get(&session.tenant) else { return Ok(None) };
        let total = session.total_usd();
        let periods = tenant.periods(now).into_iter().filter_map(|(period, limit)| {
            let at = session.cost_at.get(&period)?;
            Some(((period, (total - at).max(0.0)), limit))
        });
        let (spent, limits): (Vec<_>, Vec<f64>) = periods.unzip();
        let sums = self.store.book(&tenant.name, &session.id, &spent).await?;
        let mut over: Option<(String, f64)> = None;
        for (((period, _), limit), sum) in spent.iter().zip(limits).zip(sums) {
            let beyond = sum - limit;
            if beyond >= over.as_ref().map_or(0.0, |(_, most)| *most) {
                over = Some((format!("the budget of tenant `{}` for {period}, {limit} USD, is spent", tenant.name), beyond));
            }
        }
        Ok(over)
    }
}

//! What several wrappers spend from the same budgets: one book for all, in which each keeps its own line.
//!
//! A line holds totals, by day and month, so that writing it again changes nothing. Whoever asks the model reserves what the answer
//! may cost; a budget is used up for those who come when what is spent, and what was reserved before them, reach it. So of all that
//! run at once, together, at most one answer is above it, and what answers cost more than was reserved.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::limit::{SHARED, Scope, Shared};
use crate::tokens::Usd;

/// Of another version is not read.
pub const VERSION: u32 = 1;
/// Who works for nobody in particular.
const NOBODY: &str = "";
/// Tenants whose sums are kept.
const TENANTS: usize = 1_000;

/// The day and the month that it is, where bills are made, and when each of them ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Periods {
    day: String,
    month: String,
    day_ends: Duration,
    month_ends: Duration,
}

impl Periods {
    /// The one that a scope is about; nothing for what goes on for ever.
    fn of(&self, scope: Scope) -> &str {
        match scope {
            Scope::ContainerDay | Scope::TenantDay => &self.day,
            Scope::ContainerMonth | Scope::TenantMonth => &self.month,
            Scope::Container | Scope::Tenant | Scope::Turn | Scope::Session | Scope::Tool | Scope::Subagent => "",
        }
    }

    /// A day, like `2026-11-26`. Not all are of one length: when they end, only the caller knows.
    pub fn new(day: String, day_ends: Duration, month_ends: Duration) -> Periods {
        let month = day.get(..7).unwrap_or(&day).to_owned();
        Periods { day, month, day_ends, month_ends }
    }

    /// The day, when it ends, and when its month does.
    pub fn parts(&self) -> (&str, Duration, Duration) {
        (&self.day, self.day_ends, self.month_ends)
    }
}

/// Money by period: ever, in a day (`2026-11-26`), in a month (`2026-11`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    ever: u64,
    day: (String, u64),
    month: (String, u64),
}

impl Spent {
    fn turn(&mut self, periods: &Periods) {
        for ((of, sum), now) in [(&mut self.day, &periods.day), (&mut self.month, &periods.month)] {
            if of != now {
                of.clone_from(now);
                *sum = 0;
            }
        }
    }

    fn add(&mut self, usd: Usd, periods: &Periods) {
        self.turn(periods);
        for sum in [&mut self.ever, &mut self.day.1, &mut self.month.1] {
            *sum = sum.saturating_add(usd.pico());
        }
    }

    fn take_back(&mut self, usd: Usd) {
        for sum in [&mut self.ever, &mut self.day.1, &mut self.month.1] {
            *sum = sum.saturating_sub(usd.pico());
        }
    }

    /// Adds what another has spent in the same periods.
    fn merge(&mut self, other: &Spent) {
        self.ever = self.ever.saturating_add(other.ever);
        for (own, others) in [(&mut self.day, &other.day), (&mut self.month, &other.month)] {
            match own.0.cmp(&others.0) {
                std::cmp::Ordering::Equal => own.1 = own.1.saturating_add(others.1),
                std::cmp::Ordering::Less => own.clone_from(others),
                std::cmp::Ordering::Greater => {}
            }
        }
    }

    fn in_period(&self, periods: &Periods) -> [u64; 3] {
        let of = |(of, sum): &(String, u64), now: &String| if of == now { *sum } else { 0 };
        [self.ever, of(&self.day, &periods.day), of(&self.month, &periods.month)]
    }
}

/// What one wrapper has spent, and when.
#[derive(Clone, Debug, Default)]
pub struct Purse {
    total: Usd,
    spent: Spent,
}

impl Purse {
    /// Of what was spent up to here, somebody else has the account.
    pub fn since(total: Usd) -> Purse {
        Purse { total, spent: Spent::default() }
    }

    /// The process has spent so much by now.
    pub fn spent(&mut self, total: Usd, periods: &Periods) {
        self.spent.add(total.saturating_sub(self.total), periods);
        self.spent.take_back(self.total.saturating_sub(total));
        self.total = total;
    }
}

/// A wrapper's line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Entry {
    tenant: String,
    spent: Spent,
    /// What the answer may cost that it waits for, and who came first.
    #[serde(default)]
    reserved: u64,
    #[serde(default)]
    place: u64,
}

/// See the module's head.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Book {
    version: u32,
    runs: BTreeMap<String, Entry>,
    /// By tenant, of those that are gone.
    past: BTreeMap<String, Spent>,
    places: u64,
    /// What an answer has cost of late: a first reservation has nothing else to go by.
    typical: u64,
    /// Ceilings that were raised, by scope and tenant; of a day or a month, for that one alone.
    #[serde(default)]
    raised: BTreeMap<String, (String, u64)>,
}

impl Book {
    /// An empty one instead of one that cannot be understood.
    pub fn checked(self) -> Book {
        if self.version == VERSION { self } else { Book { version: VERSION, ..Book::default() } }
    }

    pub fn runs(&self) -> impl Iterator<Item = &str> {
        self.runs.keys().map(String::as_str)
    }

    /// From now on, and until its period is over, a budget is at least this large.
    pub fn raise(&mut self, scope: Scope, tenant: Option<&str>, usd: Usd, periods: &Periods) {
        if self.raised.len() < TENANTS {
            self.raised.insert(key(scope, tenant), (periods.of(scope).to_owned(), usd.pico()));
        }
    }

    fn raised(&self, scope: Scope, tenant: Option<&str>, periods: &Periods) -> Option<Usd> {
        let (period, pico) = self.raised.get(&key(scope, tenant))?;
        (period == periods.of(scope)).then(|| Usd::from_pico(*pico))
    }

    /// A wrapper is gone: nothing is reserved for it any more, and what it has spent stays spent.
    pub fn close(&mut self, run: &str) {
        let Some(entry) = self.runs.remove(run) else { return };
        let full = self.past.len() >= TENANTS && !self.past.contains_key(&entry.tenant);
        let tenant = if full { NOBODY.to_owned() } else { entry.tenant };
        self.past.entry(tenant).or_default().merge(&entry.spent);
    }

    /// Writes a wrapper's line, and says what is spoken for before it. `asks`: it waits for an answer that may cost so much.
    pub fn write(
        &mut self,
        run: &str,
        tenant: Option<&str>,
        purse: &Purse,
        asks: Option<Usd>,
        periods: &Periods,
    ) -> [Option<Shared>; SHARED] {
        let typical = self.typical;
        let entry = self.runs.entry(run.to_owned()).or_default();
        entry.tenant = tenant.unwrap_or(NOBODY).to_owned();
        entry.spent.clone_from(&purse.spent);
        match asks {
            Some(usd) => {
                if entry.place == 0 {
                    self.places += 1;
                    entry.place = self.places;
                }
                if !usd.is_zero() {
                    self.typical = usd.pico();
                }
                entry.reserved = if usd.is_zero() { typical } else { usd.pico() };
            }
            None => (entry.place, entry.reserved) = (0, 0),
        }
        let (place, mine) = (entry.place, entry.tenant.clone());
        // Who does not ask is not in the queue: what others have reserved, they may not need.
        let before = |entry: &Entry| entry.place > 0 && entry.place < place;
        let mut sums = [[0_u64; 3]; 2];
        let mut add = |tenant: &str, spent: [u64; 3], reserved: u64| {
            for (sums, counts) in sums.iter_mut().zip([true, tenant == mine]) {
                for (sum, spent) in sums.iter_mut().zip(spent).filter(|_| counts) {
                    *sum = sum.saturating_add(spent).saturating_add(reserved);
                }
            }
        };
        for (tenant, spent) in &self.past {
            add(tenant, spent.in_period(periods), 0);
        }
        for (name, entry) in &self.runs {
            let reserved = if name != run && before(entry) { entry.reserved } else { 0 };
            add(&entry.tenant, entry.spent.in_period(periods), reserved);
        }
        let shared = |scope: Scope, used: u64, ends: Duration| Shared {
            used: Usd::from_pico(used),
            when_spent: purse.total,
            ends,
            raised: self.raised(scope, tenant, periods),
        };
        let ends = [Duration::ZERO, periods.day_ends, periods.month_ends];
        let mut out = [None; SHARED];
        for &scope in Scope::ALL {
            let Some(at) = scope.shared() else { continue };
            // Who works for nobody has no tenant's budget.
            if at < 3 || tenant.is_some() {
                out[at] = Some(shared(scope, sums[at / 3][at % 3], ends[at % 3]));
            }
        }
        out
    }
}

fn key(scope: Scope, tenant: Option<&str>) -> String {
    match scope {
        Scope::Tenant | Scope::TenantDay | Scope::TenantMonth => format!("{} {}", scope.as_str(), tenant.unwrap_or(NOBODY)),
        _ => scope.as_str().to_owned(),
    }
}

#[cfg(test)]
mod tests;

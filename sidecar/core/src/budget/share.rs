//! Who may have how much of a shared budget, while others work, too.
//!
//! Max-min: whoever works is entitled to an equal part (of tenants: as they weigh), what nobody who works can use goes to the others,
//! and whoever has had more than its part already leaves the rest to those who have not. A budget of the container is shared out among
//! tenants, and what each of them gets among its agents. Nobody is asked to save: who stops working, for a while or for good, keeps
//! what it has spent and claims no more.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Amount, Book, Caps, Claim, Entry, NOBODY, Periods};
use crate::limit::Scope;
use crate::tokens::Usd;
use crate::update::labels;

/// Who works says so this often: it may be frozen.
const SAID: u64 = 10;
/// Whoever has not said so for so long does not work.
const UNHEARD: u64 = 30;

labels! {
    /// How budgets are shared out.
    How {
        /// Whoever asks first has it, whatever it has had already.
        FirstCome = "first-come",
        /// Among tenants; and among the agents of one, as they come.
        Tenants = "tenants",
        /// Among tenants, and among the agents of each.
        Fair = "fair",
    }
}

/// The same, and for how long what is somebody's is kept for who does not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sharing {
    pub how: How,
    pub kept: Duration,
}

impl Default for Sharing {
    fn default() -> Sharing {
        Sharing { how: How::FirstCome, kept: Duration::ZERO }
    }
}

/// What somebody has had, and may have: millionths of millionths of a dollar, or tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub had: u64,
    pub of: u64,
    /// It is its tenant's, all of whose agents have had that together.
    pub tenants: bool,
}

/// In each unit that is limited, where somebody else works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shares {
    pub usd: Option<Part>,
    pub tokens: Option<Part>,
}

/// Somebody with a claim.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Claimant {
    had: u64,
    weight: u64,
    works: bool,
}

impl Entry {
    pub(super) fn worked(&mut self, claim: &Claim<'_>, spent: bool) {
        let now = claim.now.as_secs();
        // Who cannot be watched at work has worked when it has spent something.
        if spent || claim.works != self.works || claim.works && self.worked.abs_diff(now) >= SAID {
            self.worked = now;
        }
        self.works = claim.works;
    }

    /// Whether anything is to be kept for it. A clock that was set back gives nobody a share for ever.
    fn claims(&self, kept: Duration, now: Duration) -> bool {
        let since = self.worked.abs_diff(now.as_secs());
        self.worked > 0 && (self.works && since < UNHEARD || since < kept.as_secs())
    }
}

impl Book {
    /// What a run may have of a budget that is so large, as if it worked.
    pub(super) fn shares(
        &self,
        run: &str,
        scope: Scope,
        caps: Caps,
        sharing: Sharing,
        now: Duration,
        periods: &Periods,
    ) -> Shares {
        let part = |cap: u64, unit: fn(Amount) -> u64| self.part(run, scope, cap, unit, sharing, now, periods);
        Shares {
            usd: caps.usd.and_then(|cap| part(cap.pico(), |amount| amount.usd.pico())),
            tokens: caps.tokens.and_then(|cap| part(cap, |amount| amount.tokens)),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "called once, with all of it")]
    fn part(
        &self,
        run: &str,
        scope: Scope,
        cap: u64,
        unit: fn(Amount) -> u64,
        sharing: Sharing,
        now: Duration,
        periods: &Periods,
    ) -> Option<Part> {
        let at = scope.shared()? % 3;
        let us = self.runs.get(run)?;
        // As for the budget itself: what others have asked for after us is not there yet.
        let had = |name: &str, entry: &Entry| {
            let before = name != run && entry.place > 0 && entry.place < us.place;
            unit(entry.spent.in_period(periods)[at] + if before { entry.reserved } else { Amount::NONE })
        };
        let claims = |name: &str, entry: &Entry| name == run || entry.claims(sharing.kept, now);
        let mut tenants: BTreeMap<&str, Claimant> = BTreeMap::new();
        for (tenant, spent) in &self.past {
            tenants.entry(tenant).or_default().had += unit(spent.in_period(periods)[at]);
        }
        for (name, entry) in &self.runs {
            let tenant = tenants.entry(&entry.tenant).or_default();
            tenant.had = tenant.had.saturating_add(had(name, entry));
            if claims(name, entry) {
                tenant.works = true;
                tenant.weight = tenant.weight.max(entry.weight);
            }
        }
        let own = *tenants.get(us.tenant.as_str())?;
        let of = if scope.of_tenant() { cap } else { own.of(cap, tenants.values()) };
        let others = !scope.of_tenant() && tenants.iter().any(|(tenant, one)| *tenant != us.tenant && one.works);
        let tenants_part = others.then_some(Part { had: own.had, of, tenants: us.tenant != NOBODY });
        if sharing.how != How::Fair || own.had >= of {
            return tenants_part;
        }
        let mut agents: Vec<Claimant> = Vec::new();
        for (name, entry) in self.runs.iter().filter(|(_, entry)| entry.tenant == us.tenant) {
            agents.push(Claimant { had: had(name, entry), weight: 1, works: claims(name, entry) });
        }
        if agents.iter().filter(|agent| agent.works).count() < 2 {
            return tenants_part;
        }
        let gone = self.past.get(&us.tenant).map_or(0, |spent| unit(spent.in_period(periods)[at]));
        agents.push(Claimant { had: gone, weight: 1, works: false });
        let one = Claimant { had: had(run, us), weight: 1, works: true };
        Some(Part { had: one.had, of: one.of(of, agents.iter()), tenants: false })
    }
}

impl Claimant {
    /// What is this one's, of so much for all of them.
    fn of<'a>(self, pot: u64, all: impl Iterator<Item = &'a Claimant>) -> u64 {
        let (mut under, idle): (Vec<&Claimant>, Vec<&Claimant>) = all.partition(|one| one.works);
        let had = |some: &[&Claimant]| some.iter().fold(0_u64, |sum, one| sum.saturating_add(one.had));
        let mut left = pot.saturating_sub(had(&idle));
        loop {
            let weights: u128 = under.iter().map(|one| u128::from(one.weight.max(1))).sum();
            let above = |one: &Claimant| u128::from(one.had) * weights > u128::from(left) * u128::from(one.weight.max(1));
            let (over, rest): (Vec<&Claimant>, Vec<&Claimant>) = under.into_iter().partition(|one| above(one));
            // Who is above is told of what. Without a rest all is spent.
            if above(&self) || over.is_empty() || rest.is_empty() {
                // Rounded up: what is left of a division is somebody's, too.
                let of = (u128::from(left) * u128::from(self.weight.max(1))).div_ceil(weights.max(1));
                return u64::try_from(of).unwrap_or(u64::MAX);
            }
            left = left.saturating_sub(had(&over));
            under = rest;
        }
    }
}

impl Part {
    /// What it has had of it is all that is its own.
    pub fn is_over(self) -> bool {
        self.had >= self.of
    }

    /// Both in dollars.
    pub fn usd(self) -> (f64, f64) {
        (Usd::from_pico(self.had).to_f64(), Usd::from_pico(self.of).to_f64())
    }
}

#[cfg(test)]
mod tests;

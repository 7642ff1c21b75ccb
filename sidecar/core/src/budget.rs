//! What several wrappers spend from the same budgets: one book for all, in which each keeps its own line.
//!
//! A line holds totals, by day and month, so that writing it again changes nothing. Whoever asks the model reserves what the answer
//! may cost; a budget is used up for those who come when what is spent, and what was reserved before them, reach it. So of all that
//! run at once, together, at most one answer is above it, and what answers cost more than was reserved. How much of it each may have
//! while others work, too, is [`share`]'s.

pub mod share;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Add;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::share::{Shares, Sharing};
use crate::limit::{SHARED, Scope, Shared};
use crate::tokens::Usd;

/// Of another version is not read.
pub const VERSION: u32 = 2;
/// Who works for nobody in particular.
const NOBODY: &str = "";
/// Tenants whose sums are kept, and budgets of which anything is.
const TENANTS: usize = 1_000;

/// What an answer may cost while nobody has had any: a large first request, at the dearest price of today. Whoever waits for such a
/// guess waits for a first price, and not for ever; nobody is refused for one.
pub const GUESS: Amount = Amount { usd: Usd::from_pico(500_000_000_000), tokens: 50_000 };

/// Money, and the tokens that it was spent on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct Amount {
    pub usd: Usd,
    pub tokens: u64,
}

impl Amount {
    pub const NONE: Amount = Amount { usd: Usd::ZERO, tokens: 0 };

    pub fn new(usd: Usd, tokens: u64) -> Amount {
        Amount { usd, tokens }
    }

    pub fn saturating_sub(self, other: Amount) -> Amount {
        Amount { usd: self.usd - other.usd, tokens: self.tokens.saturating_sub(other.tokens) }
    }

    pub fn is_zero(self) -> bool {
        self == Amount::NONE
    }

    /// The larger of each.
    pub fn max(self, other: Amount) -> Amount {
        Amount { usd: self.usd.max(other.usd), tokens: self.tokens.max(other.tokens) }
    }

    pub fn times(self, n: u64) -> Amount {
        Amount { usd: Usd::from_pico(self.usd.pico().saturating_mul(n)), tokens: self.tokens.saturating_mul(n) }
    }

    pub fn half(self) -> Amount {
        Amount { usd: Usd::from_pico(self.usd.pico() / 2), tokens: self.tokens / 2 }
    }
}

impl Add for Amount {
    type Output = Amount;
    fn add(self, other: Amount) -> Amount {
        Amount { usd: self.usd + other.usd, tokens: self.tokens.saturating_add(other.tokens) }
    }
}

impl From<(u64, u64)> for Amount {
    fn from((pico, tokens): (u64, u64)) -> Amount {
        Amount { usd: Usd::from_pico(pico), tokens }
    }
}

impl From<Amount> for (u64, u64) {
    fn from(amount: Amount) -> (u64, u64) {
        (amount.usd.pico(), amount.tokens)
    }
}

/// How much of each may be spent, where that is limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caps {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usd: Option<Usd>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
}

impl Caps {
    /// What another says goes before.
    fn with(self, other: Caps) -> Caps {
        Caps { usd: other.usd.or(self.usd), tokens: other.tokens.or(self.tokens) }
    }

    /// The larger of each.
    pub fn max(self, other: Caps) -> Caps {
        Caps { usd: self.usd.max(other.usd), tokens: self.tokens.max(other.tokens) }
    }
}

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

/// What was spent, by period: ever, in a day (`2026-11-26`), in a month (`2026-11`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    ever: Amount,
    day: (String, Amount),
    month: (String, Amount),
}

impl Spent {
    fn turn(&mut self, periods: &Periods) {
        for ((of, sum), now) in [(&mut self.day, &periods.day), (&mut self.month, &periods.month)] {
            if of != now {
                of.clone_from(now);
                *sum = Amount::NONE;
            }
        }
    }

    fn add(&mut self, amount: Amount, periods: &Periods) {
        self.turn(periods);
        for sum in [&mut self.ever, &mut self.day.1, &mut self.month.1] {
            *sum = *sum + amount;
        }
    }

    fn take_back(&mut self, amount: Amount) {
        for sum in [&mut self.ever, &mut self.day.1, &mut self.month.1] {
            *sum = sum.saturating_sub(amount);
        }
    }

    /// Adds what another has spent in the same periods.
    fn merge(&mut self, other: &Spent) {
        self.ever = self.ever + other.ever;
        for (own, others) in [(&mut self.day, &other.day), (&mut self.month, &other.month)] {
            match own.0.cmp(&others.0) {
                std::cmp::Ordering::Equal => own.1 = own.1 + others.1,
                std::cmp::Ordering::Less => own.clone_from(others),
                std::cmp::Ordering::Greater => {}
            }
        }
    }

    /// At least as much as another knows, of the same periods or later ones. Whether it was less.
    fn raise(&mut self, known: &Spent) -> bool {
        let before = self.clone();
        self.ever = self.ever.max(known.ever);
        for (own, known) in [(&mut self.day, &known.day), (&mut self.month, &known.month)] {
            match own.0.cmp(&known.0) {
                std::cmp::Ordering::Equal => own.1 = own.1.max(known.1),
                std::cmp::Ordering::Less => own.clone_from(known),
                std::cmp::Ordering::Greater => {}
            }
        }
        *self != before
    }

    fn in_period(&self, periods: &Periods) -> [Amount; 3] {
        let of = |(of, sum): &(String, Amount), now: &String| if of == now { *sum } else { Amount::NONE };
        [self.ever, of(&self.day, &periods.day), of(&self.month, &periods.month)]
    }
}

/// What one wrapper has spent, and when.
#[derive(Clone, Debug, Default)]
pub struct Purse {
    total: Amount,
    spent: Spent,
}

impl Purse {
    /// Of what was spent up to there, somebody else has the account: only the rest is ours to tell.
    pub fn since(total: Amount) -> Purse {
        Purse { total, spent: Spent::default() }
    }

    /// The process has spent so much by now.
    pub fn spent(&mut self, total: Amount, periods: &Periods) {
        self.spent.add(total.saturating_sub(self.total), periods);
        self.spent.take_back(self.total.saturating_sub(total));
        self.total = total;
    }
}

/// What a wrapper writes into its line.
#[derive(Clone, Copy, Debug, Default)]
pub struct Claim<'a> {
    pub tenant: Option<&'a str>,
    /// It waits for an answer that may cost so much; or for several at once, of which each may.
    pub asks: Option<Amount>,
    pub answers: u64,
    /// The most that an answer has cost it of late, if it has had any.
    pub answer: Amount,
    /// Another one for each request: who asks again comes after those who have asked meanwhile.
    pub request: u64,
    /// The budgets whose end it waits at.
    pub waits: &'a [Scope],
    /// How large its configuration says that each is.
    pub caps: [Caps; SHARED],
    /// How they are shared out, and what its tenant weighs then.
    pub sharing: Sharing,
    pub weight: u64,
    /// Its agent has work to do; and when that was so, since the Unix epoch.
    pub works: bool,
    pub now: Duration,
}

/// A wrapper's line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Entry {
    tenant: String,
    spent: Spent,
    /// What the answer may cost that it waits for, and who came first.
    #[serde(default)]
    reserved: Amount,
    #[serde(default)]
    place: u64,
    #[serde(default)]
    request: u64,
    #[serde(default)]
    waits: Vec<Scope>,
    #[serde(default)]
    weight: u64,
    /// Whether its agent has work to do, and when that was last said: seconds since the Unix epoch.
    #[serde(default)]
    works: bool,
    #[serde(default)]
    worked: u64,
}

/// See the module's head.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Book {
    version: u32,
    /// Another one than before, if it had to be begun anew: then nobody's account is in it.
    #[serde(default)]
    number: u64,
    runs: BTreeMap<String, Entry>,
    /// By tenant, of those that are gone.
    past: BTreeMap<String, Spent>,
    places: u64,
    /// What an answer has cost of late: a first reservation has nothing else to go by.
    typical: Amount,
    /// How large each budget is, by scope and tenant, as the last wrapper that began has said.
    #[serde(default)]
    caps: BTreeMap<String, Caps>,
    /// To what they were raised; of a day or a month, for that one alone.
    #[serde(default)]
    raised: BTreeMap<String, (String, Caps)>,
    /// How they are shared out, as the last wrapper that began has said.
    #[serde(default)]
    sharing: Sharing,
}

/// What a wrapper remembers of the book, so that nobody can take from it unseen: what those have spent that are gone, which only grows,
/// and its own line.
#[derive(Clone, Debug, Default)]
pub struct Witness {
    past: BTreeMap<String, Spent>,
    own: Option<(String, Spent)>,
}

impl Witness {
    /// Puts back what is missing of it. Whether something was; and whether our line was closed by somebody who took us for dead.
    pub fn mend(&self, book: &mut Book, run: &str) -> (bool, bool) {
        let mut changed = false;
        let before = book.past.clone();
        for (tenant, spent) in &self.past {
            // Of too many tenants, those that come later are kept as one.
            if book.past.len() < TENANTS || book.past.contains_key(tenant) {
                changed |= book.past.entry(tenant.clone()).or_default().raise(spent);
            }
        }
        let Some((tenant, own)) = &self.own else { return (changed, false) };
        match book.runs.get(run) {
            Some(entry) => (changed || entry.spent != *own || entry.tenant != *tenant, false),
            None => {
                let full = self.past.len() >= TENANTS && !self.past.contains_key(tenant);
                let tenant = if full { NOBODY } else { tenant };
                let ever = |past: &BTreeMap<String, Spent>| past.get(tenant).map(|spent| spent.ever).unwrap_or_default();
                // Whoever closed it has added it.
                let expected = ever(&self.past) + own.ever;
                let closed = !changed && ever(&before).max(expected) == ever(&before);
                (!closed, closed)
            }
        }
    }

    /// The book as it is now.
    pub fn remember(&mut self, book: &Book, run: &str) {
        self.past.clone_from(&book.past);
        self.own = book.runs.get(run).map(|entry| (entry.tenant.clone(), entry.spent.clone()));
    }
}

/// How a budget stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    pub scope: Scope,
    pub tenant: Option<String>,
    /// As it is configured, and as it was raised.
    pub caps: Caps,
    pub raised: Caps,
    pub spent: Amount,
    pub reserved: Amount,
    /// The day or the month that it is, and when that ends.
    pub period: Option<(String, Duration)>,
    /// Those who wait for there being more of it.
    pub waits: Vec<String>,
    /// What each of those that run has of it, and may have, where that is limited by others.
    pub shares: Vec<(String, Shares)>,
}

impl Book {
    /// An empty one, with a number that none had before.
    pub fn begun(number: u64) -> Book {
        Book { version: VERSION, number, ..Book::default() }
    }

    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether it can be understood.
    pub fn is_current(&self) -> bool {
        self.version == VERSION
    }

    pub fn runs(&self) -> impl Iterator<Item = &str> {
        self.runs.keys().map(String::as_str)
    }

    /// From now on, and until its period is over, a budget is at least this large. False if so many were raised that there is no room.
    pub fn raise(&mut self, scope: Scope, tenant: Option<&str>, caps: Caps, periods: &Periods) -> bool {
        self.raised.retain(|key, (period, _)| named(key).is_some_and(|(scope, _)| period == periods.of(scope)));
        let key = key(scope, tenant);
        if self.raised.len() >= TENANTS && !self.raised.contains_key(&key) {
            return false;
        }
        let raised = self.raised.entry(key).or_default();
        *raised = (periods.of(scope).to_owned(), raised.1.with(caps));
        true
    }

    fn raised(&self, scope: Scope, tenant: Option<&str>, periods: &Periods) -> Caps {
        let raised = self.raised.get(&key(scope, tenant)).filter(|(period, _)| period == periods.of(scope));
        raised.map(|(_, caps)| *caps).unwrap_or_default()
    }

    /// A wrapper is gone: nothing is reserved for it any more, and what it has spent stays spent.
    pub fn close(&mut self, run: &str) {
        let Some(entry) = self.runs.remove(run) else { return };
        let full = self.past.len() >= TENANTS && !self.past.contains_key(&entry.tenant);
        let tenant = if full { NOBODY.to_owned() } else { entry.tenant };
        self.past.entry(tenant).or_default().merge(&entry.spent);
    }

    /// Writes a wrapper's line, and says what is spoken for before it.
    pub fn write(&mut self, run: &str, purse: &Purse, claim: &Claim<'_>, periods: &Periods) -> [Option<Shared>; SHARED] {
        let tenant = claim.tenant;
        // The first message may tell for whom it works.
        if self.runs.get(run).is_none_or(|entry| entry.tenant != tenant.unwrap_or(NOBODY)) {
            self.begin(claim);
        }
        let before = self.runs.get(run).map(|entry| &entry.spent);
        if !claim.answer.is_zero() && before != Some(&purse.spent) {
            self.typical = claim.answer;
        }
        let typical = self.typical;
        let entry = self.runs.entry(run.to_owned()).or_default();
        entry.tenant = tenant.unwrap_or(NOBODY).to_owned();
        entry.worked(claim, entry.spent != purse.spent);
        entry.spent.clone_from(&purse.spent);
        entry.waits = claim.waits.to_vec();
        entry.weight = claim.weight;
        let mut own = Amount::NONE;
        match claim.asks {
            Some(amount) => {
                if entry.place == 0 || entry.request != claim.request {
                    self.places = self.places.saturating_add(1);
                    (entry.place, entry.request) = (self.places, claim.request);
                }
                if !amount.is_zero() {
                    self.typical = amount;
                }
                let each = if amount.is_zero() { typical } else { amount };
                entry.reserved = each.times(claim.answers.max(1));
                // Of several that it waits for itself, the others come before the last one.
                own = each.times(claim.answers.saturating_sub(1));
            }
            None => (entry.place, entry.reserved) = (0, Amount::NONE),
        }
        let place = entry.place;
        // Who does not ask is not in the queue: what others have reserved, they may not need.
        let before = |name: &str, entry: &Entry| name != run && entry.place > 0 && entry.place < place;
        let sums = [None, Some(tenant.unwrap_or(NOBODY))].map(|of| self.sums(of, before, periods));
        let ends = [Duration::ZERO, periods.day_ends, periods.month_ends];
        let typical = self.typical;
        let payers = |of: Option<&str>| self.runs.values().filter(|entry| of.is_none_or(|of| entry.tenant == of)).count() as u64;
        let payers = [None, Some(tenant.unwrap_or(NOBODY))].map(payers);
        let mut out = [None; SHARED];
        let run = Some(run).filter(|_| claim.sharing.how != share::How::FirstCome);
        for &scope in Scope::ALL {
            let Some(at) = scope.shared() else { continue };
            // Who works for nobody has no tenant's budget.
            if scope.of_tenant() && tenant.is_none() {
                continue;
            }
            let Sums { spent, reserved, before, guesses } = &sums[at / 3];
            let raised = self.raised(scope, tenant, periods);
            let caps = claim.caps[at].max(raised);
            let shares = run.map(|run| self.shares(run, scope, caps, claim.sharing, claim.now, periods));
            out[at] = Some(Shared {
                spent: spent[at % 3],
                reserved: *reserved,
                before: *before + own,
                guesses: *guesses,
                when_spent: purse.total,
                ends: ends[at % 3],
                raised,
                shares: shares.unwrap_or_default(),
                typical,
                payers: payers[at / 3],
            });
        }
        out
    }

    /// How all budgets stand that anybody has told of.
    pub fn standings(&self, periods: &Periods, now: Duration) -> Vec<Standing> {
        let keys: BTreeSet<&String> = self.caps.keys().chain(self.raised.keys()).collect();
        keys.into_iter()
            .filter_map(|key| {
                let (scope, tenant) = named(key)?;
                let at = scope.shared()? % 3;
                let sums = self.sums(tenant, |_, _| false, periods);
                let spend = self.runs.iter().filter(|(_, entry)| tenant.is_none_or(|tenant| entry.tenant == tenant));
                let waits = spend.clone().filter(|(_, entry)| entry.waits.contains(&scope));
                let (caps, raised) = (self.caps.get(key).copied().unwrap_or_default(), self.raised(scope, tenant, periods));
                let shares =
                    spend.map(|(run, _)| (run.clone(), self.shares(run, scope, caps.max(raised), self.sharing, now, periods)));
                let period = periods.of(scope).to_owned();
                let ends = [Duration::ZERO, periods.day_ends, periods.month_ends][at];
                Some(Standing {
                    scope,
                    tenant: tenant.map(str::to_owned),
                    caps,
                    raised,
                    spent: sums.spent[at],
                    reserved: sums.reserved,
                    period: (!period.is_empty()).then_some((period, ends)),
                    waits: waits.map(|(run, _)| run.clone()).collect(),
                    shares: shares.filter(|(_, shares)| *shares != Shares::default()).collect(),
                })
            })
            .collect()
    }

    fn begin(&mut self, claim: &Claim<'_>) {
        self.sharing = claim.sharing;
        for (scope, at) in Scope::ALL.iter().filter_map(|scope| Some((*scope, scope.shared()?))) {
            if scope.of_tenant() && claim.tenant.is_none() {
                continue;
            }
            let (caps, key) = (claim.caps[at], key(scope, claim.tenant));
            if caps != Caps::default() && (self.caps.len() < TENANTS || self.caps.contains_key(&key)) {
                self.caps.insert(key, caps);
            }
        }
    }

    /// Of one tenant, or of all.
    fn sums(&self, tenant: Option<&str>, before: impl Fn(&str, &Entry) -> bool, periods: &Periods) -> Sums {
        let mut sums = Sums::default();
        let counts = |of: &str| tenant.is_none_or(|tenant| tenant == of);
        let mut add = |spent: &Spent| {
            for (sum, spent) in sums.spent.iter_mut().zip(spent.in_period(periods)) {
                *sum = *sum + spent;
            }
        };
        self.past.iter().filter(|(of, _)| counts(of)).for_each(|(_, spent)| add(spent));
        self.runs.values().filter(|entry| counts(&entry.tenant)).for_each(|entry| add(&entry.spent));
        for (run, entry) in self.runs.iter().filter(|(_, entry)| counts(&entry.tenant)) {
            sums.reserved = sums.reserved + entry.reserved;
            if before(run, entry) {
                sums.before = sums.before + entry.reserved;
                sums.guesses += u64::from(entry.reserved.is_zero());
            }
        }
        sums
    }
}

#[derive(Default)]
struct Sums {
    spent: [Amount; 3],
    reserved: Amount,
    before: Amount,
    guesses: u64,
}

/// What a budget is called in the book.
fn key(scope: Scope, tenant: Option<&str>) -> String {
    if scope.of_tenant() { format!("{} {}", scope.as_str(), tenant.unwrap_or(NOBODY)) } else { scope.as_str().to_owned() }
}

fn named(key: &str) -> Option<(Scope, Option<&str>)> {
    let (name, tenant) = key.split_once(' ').map_or((key, None), |(name, tenant)| (name, Some(tenant)));
    let scope = Scope::ALL.iter().find(|scope| scope.as_str() == name)?;
    Some((*scope, tenant))
}

#[cfg(test)]
mod tests;

//! The ceilings: what may be spent, for how long, and when it is too much.
//!
//! A [`Rule`] is one ceiling with its mode; the [`Judge`] holds them against the facts. It only judges: what is done about it, and
//! in which order, is [`crate::ladder`]'s.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Now;
use crate::budget::share::{Part, Shares};
use crate::budget::{Amount, Caps, GUESS};
use crate::order::Raised;
use crate::session::Session;
use crate::tokens::Usd;
use crate::update::{Activity, Decision, Stall, Step, Update, labels};

labels! {
    /// What a rule does when its ceiling is reached.
    Mode {
        Off = "off",
        /// Says what it would have done.
        Shadow = "shadow",
        Enforce = "enforce",
    }
}

labels! {
    /// What is limited.
    Limit {
        Turns = "turns", CostUsd = "usd", Tokens = "tokens", Duration = "duration", Idle = "idle", Startup = "startup",
        Stall = "stall", Result = "result", Memory = "memory",
        MemoryForecast = "memory_forecast",
        IdenticalCalls = "identical_call", AlternatingCalls = "alternating", SameErrors = "error_repeat",
        Compactions = "compaction_thrash", FanOut = "fan_out", NoProgress = "no_progress",
    }
}

impl Limit {
    /// Whether it is a circle that an agent goes round in.
    pub fn is_loop(self) -> bool {
        match self {
            Limit::IdenticalCalls
            | Limit::AlternatingCalls
            | Limit::SameErrors
            | Limit::Compactions
            | Limit::FanOut
            | Limit::NoProgress => true,
            Limit::Turns
            | Limit::CostUsd
            | Limit::Tokens
            | Limit::Duration
            | Limit::Idle
            | Limit::Startup
            | Limit::Stall
            | Limit::Result
            | Limit::Memory
            | Limit::MemoryForecast => false,
        }
    }

    /// Whether time ran out: what the agent was about then says why.
    pub fn asks_why(self) -> bool {
        matches!(self, Limit::Idle | Limit::Startup | Limit::Stall | Limit::Result | Limit::Duration)
    }
}

labels! {
    /// Over what it is limited.
    Scope {
        Turn = "turn", Session = "session", Tool = "tool", Subagent = "subagent",
        // What all wrappers that meet spend together: see [`crate::budget`].
        Container = "container", ContainerDay = "container_day", ContainerMonth = "container_month",
        Tenant = "tenant", TenantDay = "tenant_day", TenantMonth = "tenant_month",
    }
}

impl Scope {
    /// Its place among those that several wrappers share.
    pub fn shared(self) -> Option<usize> {
        match self {
            Scope::Turn | Scope::Session | Scope::Tool | Scope::Subagent => None,
            Scope::Container => Some(0),
            Scope::ContainerDay => Some(1),
            Scope::ContainerMonth => Some(2),
            Scope::Tenant => Some(3),
            Scope::TenantDay => Some(4),
            Scope::TenantMonth => Some(5),
        }
    }
}

impl Scope {
    /// As people say it.
    pub fn in_words(self) -> &'static str {
        match self {
            Scope::ContainerDay => "container's day",
            Scope::ContainerMonth => "container's month",
            Scope::TenantDay => "tenant's day",
            Scope::TenantMonth => "tenant's month",
            Scope::Container | Scope::Tenant | Scope::Turn | Scope::Session | Scope::Tool | Scope::Subagent => self.as_str(),
        }
    }

    /// Whether those who work for the same tenant share it.
    pub fn of_tenant(self) -> bool {
        matches!(self, Scope::Tenant | Scope::TenantDay | Scope::TenantMonth)
    }
}

/// How many scopes are shared.
pub const SHARED: usize = 6;

/// How much is allowed: reaching it is too much.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ceiling {
    Count(u64),
    Usd(Usd),
    Time(Duration),
    Bytes(u64),
}

impl Ceiling {
    /// In the limit's own unit: turns, tokens, dollars, seconds, bytes.
    pub fn to_f64(self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "for people and ratios")]
        match self {
            Ceiling::Count(n) | Ceiling::Bytes(n) => n as f64,
            Ceiling::Usd(usd) => usd.to_f64(),
            Ceiling::Time(time) => time.as_secs_f64(),
        }
    }
}

/// One ceiling.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    pub limit: Limit,
    pub scope: Scope,
    pub ceiling: Ceiling,
    pub mode: Mode,
}

impl Rule {
    /// What is done first when the ceiling is reached.
    pub fn first_step(&self) -> Step {
        match (self.limit, self.scope) {
            // What ends with the turn leaves the session alive; what others have spent is no reason to end it.
            (
                _,
                Scope::Turn
                | Scope::Tool
                | Scope::Subagent
                | Scope::Container
                | Scope::ContainerDay
                | Scope::ContainerMonth
                | Scope::Tenant
                | Scope::TenantDay
                | Scope::TenantMonth,
            )
            | (Limit::Stall, Scope::Session) => Step::Interrupt,
            (limit, Scope::Session) if limit.is_loop() => Step::Interrupt,
            // It never said a word: there is nobody to ask.
            (Limit::Startup, Scope::Session) => Step::Terminate,
            (_, Scope::Session) => Step::End,
        }
    }

    /// Whether the session stays and takes no more work, where the CLI can be told so.
    pub fn refuses(&self) -> bool {
        self.is_shared() || self.scope == Scope::Session && matches!(self.limit, Limit::Turns | Limit::CostUsd | Limit::Tokens)
    }

    /// Whether others spend from it, too.
    pub fn is_shared(&self) -> bool {
        self.scope.shared().is_some()
    }

    /// Where people want to hear of it on the way there.
    fn warn_at(&self) -> &'static [f64] {
        match self.limit {
            Limit::Turns | Limit::CostUsd | Limit::Tokens | Limit::Duration | Limit::Memory => &WARN_AT,
            Limit::IdenticalCalls
            | Limit::AlternatingCalls
            | Limit::SameErrors
            | Limit::Compactions
            | Limit::FanOut
            | Limit::NoProgress
            | Limit::MemoryForecast => &WARN_AT[..1],
            Limit::Idle | Limit::Startup | Limit::Stall | Limit::Result => &[],
        }
    }

    /// How the silence is called that breaks this rule, if it is one.
    pub fn stall(&self) -> Option<Stall> {
        match (self.limit, self.scope) {
            (Limit::Startup, _) => Some(Stall::Startup),
            (Limit::Stall, _) => Some(Stall::NoEvent),
            (Limit::Result, _) => Some(Stall::NoResult),
            (Limit::Duration, Scope::Tool) => Some(Stall::Tool),
            _ => None,
        }
    }
}

/// Answers that one agent may have in the second in which the others hear nothing of it.
const SOON: u64 = 20;
/// Where people are told on the way to a ceiling.
const WARN_AT: [f64; 3] = [0.5, 0.8, 0.95];

/// What is known outside the session.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outside {
    /// When the CLI's input ended, if it has: its own end is due.
    pub input_over: Option<Duration>,
    pub memory_bytes: Option<u64>,
    /// When memory will reach its limit, as far as that can be foretold.
    pub memory_left: Option<Duration>,
    /// Since when the CLI is stopped or frozen, if it is.
    pub frozen_since: Option<Duration>,
    /// When the app first gave it something to do.
    pub fed_at: Option<Duration>,
    /// The CLI can be told to turn away what the app says.
    pub can_refuse: bool,
    /// What this process has spent, in all its sessions; and what one answer has cost of late.
    pub spent: Amount,
    pub answer: Amount,
    /// What is known of the budgets that others spend from, too.
    pub shared: [Option<Shared>; SHARED],
    /// It is about to ask, and can wait until those who came before need less than they might have.
    pub at_door: bool,
    /// It was let through, and what it asked for is reserved until it is known what that has cost: cut off, nobody would know.
    pub let_through: bool,
    /// To what somebody has raised the session's own limits.
    pub raised: Raised,
    /// It is to wait, whoever wants what of it; and when it was last let go on.
    pub paused: bool,
    pub resumed_at: Option<Duration>,
}

/// How much of a shared budget is spoken for, as it was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// Spent by all.
    pub spent: Amount,
    /// Reserved by all, and of that by those who came before us.
    pub reserved: Amount,
    pub before: Amount,
    /// Those of them who wait for an answer of which nobody knows what it may cost.
    pub guesses: u64,
    /// What this process had spent by then, in all.
    pub when_spent: Amount,
    /// When its day or month is over, since the Unix epoch; zero where it goes on for ever. A new one starts afresh.
    pub ends: Duration,
    /// Somebody has raised it to this.
    pub raised: Caps,
    /// What part of it is ours, while others work.
    pub shares: Shares,
    /// What an answer has cost somebody of late, and how many spend from it.
    pub typical: Amount,
    pub payers: u64,
}

impl Outside {
    /// How much a rule allows, in its own unit.
    pub fn ceiling(&self, rule: &Rule) -> f64 {
        let raised = rule.scope.shared().and_then(|at| self.shared[at]).map(|shared| shared.raised);
        #[expect(clippy::cast_precision_loss, reason = "for people and ratios")]
        let raised = raised.and_then(|raised| match rule.limit {
            Limit::CostUsd => raised.usd.map(Usd::to_f64),
            Limit::Tokens => raised.tokens.map(|tokens| tokens as f64),
            _ => None,
        });
        raised.or_else(|| self.raised.of(rule)).unwrap_or_default().max(rule.ceiling.to_f64())
    }

    /// The ceiling in money, if it is one.
    pub fn spending(&self, rule: &Rule) -> Option<Usd> {
        matches!(rule.ceiling, Ceiling::Usd(_)).then(|| Usd::from_f64(self.ceiling(rule)))
    }

    /// What all have spent together from a shared budget, as far as it is known here.
    pub fn spent_by_all(&self, scope: Scope) -> Option<Amount> {
        let shared = self.shared[scope.shared()?]?;
        Some(shared.spent + self.spent.saturating_sub(shared.when_spent))
    }

    /// What all who share a rule's budget may use of it before they see that of each other.
    #[expect(clippy::cast_precision_loss, reason = "a rough number")]
    fn soon(&self, rule: &Rule) -> f64 {
        let Some(shared) = rule.scope.shared().and_then(|at| self.shared[at]) else { return 0.0 };
        let one = self.answer.max(shared.typical);
        let all = one.times(SOON * shared.payers.max(1));
        if rule.limit == Limit::Tokens { all.tokens as f64 } else { all.usd.to_f64() }
    }

    /// Whether nobody knows yet what is left of a rule's budget, or what an answer costs, and a few of them might use it up.
    fn is_new(&self, rule: &Rule) -> bool {
        let Some(shared) = rule.scope.shared().and_then(|at| self.shared[at]) else { return true };
        let guess = GUESS.times(SOON * shared.payers.max(1));
        let known = !self.answer.max(shared.typical).is_zero();
        let spent = shared.spent + guess;
        #[expect(clippy::cast_precision_loss, reason = "a rough number")]
        let might = if rule.limit == Limit::Tokens { spent.tokens as f64 } else { spent.usd.to_f64() };
        !known && might >= self.ceiling(rule)
    }

    /// Whether a rule's budget would do for one more, but for what those who came before may need of it.
    fn waits_for_others(&self, rule: &Rule, in_flight: Amount) -> bool {
        let Some((shared, spent)) =
            rule.scope.shared().and_then(|at| self.shared[at]).zip(self.spent_by_all(rule.scope)).filter(|_| self.at_door)
        else {
            return false;
        };
        let (spent, ceiling) = (spent + in_flight, self.ceiling(rule));
        let claimed = spent + shared.before + GUESS.times(shared.guesses);
        #[expect(clippy::cast_precision_loss, reason = "as the ceiling is")]
        let of = |amount: Amount| if rule.limit == Limit::Tokens { amount.tokens as f64 } else { amount.usd.to_f64() };
        of(spent) < ceiling && of(claimed) >= ceiling
    }

    /// What part of a rule's budget is ours while others work, and how much of it we have had by now.
    pub fn part(&self, rule: &Rule, in_flight: Amount) -> Option<Part> {
        let shared = self.shared[rule.scope.shared()?]?;
        let more = self.spent.saturating_sub(shared.when_spent) + in_flight;
        let (part, more) = match rule.limit {
            Limit::Tokens => (shared.shares.tokens?, more.tokens),
            _ => (shared.shares.usd?, more.usd.pico()),
        };
        Some(Part { had: part.had.saturating_add(more), ..part })
    }
}

#[derive(Debug)]
struct Tracked {
    rule: Rule,
    /// Which turn, call or agent this is about: a new one starts afresh.
    instance: Duration,
    warned: usize,
    reached: bool,
    /// As it was last judged.
    ceiling: f64,
    /// Not the budget is used up, but our part of it.
    part: Option<Part>,
    /// The next answers may use it up; nobody knows yet whether they may; it waits for what others may need of it.
    near: bool,
    new: bool,
    waits: bool,
    /// What had been spent when the part was found to be used up while the model was asked: that answer may come.
    spares: Option<Amount>,
}

/// See the module's head.
#[derive(Debug)]
pub struct Judge {
    rules: Vec<Tracked>,
    began: Duration,
}

/// A ceiling that was just reached.
#[derive(Clone, Debug, PartialEq)]
pub struct Reached {
    pub rule: Rule,
    pub observed: f64,
}

/// How far a rule is used up.
#[derive(Clone, Debug, Serialize)]
pub struct Used {
    pub limit: Limit,
    pub scope: Scope,
    pub mode: Mode,
    pub used: f64,
    pub ceiling: f64,
    /// What share of it is used up.
    pub ratio: f64,
    /// Of a budget that others work with, too: what part is this one's, and what it has had of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<UsedShare>,
}

/// In the limit's own unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct UsedShare {
    pub used: f64,
    pub of: f64,
    /// It is its tenant's, of which its agents have used that together.
    pub tenant: bool,
}

impl UsedShare {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    fn new(rule: &Rule, part: Part) -> UsedShare {
        let (used, of) = if rule.limit == Limit::Tokens { (part.had as f64, part.of as f64) } else { part.usd() };
        UsedShare { used, of, tenant: part.tenants }
    }

    fn left(self) -> f64 {
        self.of - self.used
    }
}

/// A shared budget that this agent waits for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Held {
    pub limit: Limit,
    pub scope: Scope,
    /// There is more of it, but that is for others.
    pub share: Option<UsedShare>,
}

/// What a rule measures now, since when (on the clock), and of which instance of its scope.
struct Measure {
    observed: f64,
    instance: Duration,
    /// For what grows with the clock alone: when it started.
    runs_since: Option<Duration>,
    /// Counted, but not to be acted upon yet.
    hold: bool,
    /// It runs out: the less there is, the nearer is the end.
    falls: bool,
}

impl Measure {
    fn ratio(&self, ceiling: f64) -> f64 {
        let (part, whole) = if self.falls { (ceiling, self.observed) } else { (self.observed, ceiling) };
        if whole > 0.0 { part / whole } else { f64::INFINITY }
    }
}

impl Judge {
    pub fn new(rules: &[Rule], began: Duration) -> Judge {
        let rules = rules
            .iter()
            .filter(|rule| rule.mode != Mode::Off)
            .map(|&rule| Tracked {
                rule,
                instance: Duration::MAX,
                warned: 0,
                reached: false,
                ceiling: 0.0,
                part: None,
                near: false,
                new: true,
                waits: false,
                spares: None,
            })
            .collect();
        Judge { rules, began }
    }

    /// Holds every rule against the facts: what was newly reached, and what is to be told.
    pub fn judge(&mut self, session: &Session, outside: &Outside, now: Now, out: &mut Vec<Update>) -> Vec<Reached> {
        let mut reached = Vec::new();
        let in_flight = session.ledger.in_flight(now.unix);
        for tracked in &mut self.rules {
            let rule = tracked.rule;
            let Some(measure) = measure(&rule, self.began, session, outside, in_flight, now) else {
                if tracked.instance != Duration::MAX {
                    tracked.instance = Duration::MAX;
                    tracked.warned = 0;
                    if std::mem::take(&mut tracked.reached)
                        && let Some(kind) = rule.stall()
                    {
                        out.push(Update::Stalled { kind, on: false, why: None });
                    }
                    out.push(Update::LimitUsed { limit: rule.limit, scope: rule.scope, ratio: 0.0 });
                }
                continue;
            };
            if tracked.instance != measure.instance {
                tracked.instance = measure.instance;
                tracked.warned = 0;
                tracked.reached = false;
            }
            let ceiling = outside.ceiling(&rule);
            let ratio = measure.ratio(ceiling);
            out.push(Update::LimitUsed { limit: rule.limit, scope: rule.scope, ratio: ratio.min(1e9) });
            let ours = outside.part(&rule, Amount::new(in_flight.0, in_flight.1));
            let left = match ours {
                Some(part) => UsedShare::new(&rule, part).left().min(ceiling - measure.observed),
                None => ceiling - measure.observed,
            };
            tracked.near = rule.is_shared() && rule.mode == Mode::Enforce && left <= outside.soon(&rule);
            tracked.new = outside.is_new(&rule);
            tracked.waits = measure.hold && rule.is_shared() && outside.at_door;
            let part = tracked.not_spared(ours.filter(|part| ratio < 1.0 && part.is_over()), session, outside);
            tracked.part = part;
            let share = part.map(|part| UsedShare::new(&rule, part));
            let decision = |step, level| {
                Update::Decided(Decision {
                    session: session.id().to_owned(),
                    limit: rule.limit,
                    scope: rule.scope,
                    mode: rule.mode,
                    step,
                    observed: share.map_or(measure.observed, |share| share.used),
                    ceiling: share.map_or(ceiling, |share| share.of),
                    level,
                    why: None,
                    share: share.is_some(),
                })
            };
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it was a count")]
            let detected = |action| Update::LoopDetected { kind: rule.limit, streak: measure.observed as u64, action };
            let more = ceiling > tracked.ceiling && tracked.ceiling > 0.0;
            tracked.ceiling = ceiling;
            // Others may have reserved more than they needed; or somebody has raised it.
            if (rule.is_shared() || more) && ratio < 1.0 && part.is_none() {
                tracked.reached = false;
            }
            if more {
                tracked.warned = rule.warn_at().iter().filter(|level| ratio >= **level).count();
            }
            if !tracked.reached {
                let levels = rule.warn_at();
                let passed = levels.iter().filter(|level| ratio >= **level).count();
                if passed > tracked.warned {
                    tracked.warned = passed;
                    if ratio < 1.0 && part.is_none() {
                        out.extend(rule.limit.is_loop().then(|| detected(Step::Warn)));
                        out.push(decision(Step::Warn, levels[passed - 1]));
                    }
                }
            }
            if (ratio >= 1.0 || part.is_some()) && !measure.hold && !tracked.reached {
                tracked.reached = true;
                if let Some(kind) = rule.stall() {
                    out.push(Update::Stalled { kind, on: true, why: None });
                }
                let step = if rule.refuses() && outside.can_refuse { Step::Refuse } else { rule.first_step() };
                out.extend(rule.limit.is_loop().then(|| detected(step)));
                out.push(decision(step, 1.0));
                reached.push(Reached { rule, observed: measure.observed });
            }
        }
        reached
    }

    /// The shared budgets that are used up and are to be held to.
    pub fn holds(&self) -> impl Iterator<Item = Held> {
        let held = |tracked: &&Tracked| tracked.reached && tracked.rule.is_shared() && tracked.rule.mode == Mode::Enforce;
        self.rules.iter().filter(held).map(|Tracked { rule, part, .. }| Held {
            limit: rule.limit,
            scope: rule.scope,
            share: part.map(|part| UsedShare::new(rule, part)),
        })
    }

    /// Whether a shared budget that is to be held to may be used up soon.
    pub fn is_near(&self) -> bool {
        self.rules.iter().any(|tracked| tracked.near)
    }

    /// The same, or nobody knows yet.
    pub fn may_be_near(&self) -> bool {
        let may =
            |tracked: &Tracked| tracked.near || tracked.new && tracked.rule.is_shared() && tracked.rule.mode == Mode::Enforce;
        self.rules.iter().any(may)
    }

    /// Whether all that is in the way of a request is what others may need.
    pub fn waits_for_others(&self) -> bool {
        self.rules.iter().any(|tracked| tracked.waits && !tracked.reached && tracked.rule.mode == Mode::Enforce)
    }

    /// Whether a limit of the session's own is used up, which the CLI is to turn messages away for.
    pub fn refuses(&self) -> bool {
        let refuses = |rule: &Rule| rule.refuses() && !rule.is_shared() && rule.mode == Mode::Enforce;
        self.rules.iter().any(|tracked| tracked.reached && refuses(&tracked.rule))
    }

    /// When the clock alone will reach a ceiling, or a warning.
    pub fn deadline(&self, session: &Session, outside: &Outside, now: Now) -> Option<Duration> {
        self.rules
            .iter()
            .filter_map(|tracked| {
                let Ceiling::Time(ceiling) = tracked.rule.ceiling else { return None };
                let measure = measure(&tracked.rule, self.began, session, outside, (Usd::ZERO, 0), now)?;
                let since = measure.runs_since?;
                let same = tracked.instance == measure.instance;
                if same && tracked.reached {
                    return None;
                }
                let warned = if same { tracked.warned } else { 0 };
                match tracked.rule.warn_at().get(warned) {
                    Some(level) => Some(since + ceiling.mul_f64(*level)),
                    None => Some(since + ceiling),
                }
            })
            .min()
    }

    /// How far each rule is used up.
    pub fn used(&self, session: &Session, outside: &Outside, now: Now) -> Vec<Used> {
        let in_flight = session.ledger.in_flight(now.unix);
        self.rules
            .iter()
            .map(|Tracked { rule, .. }| {
                let measure = measure(rule, self.began, session, outside, in_flight, now);
                let ceiling = outside.ceiling(rule);
                Used {
                    limit: rule.limit,
                    scope: rule.scope,
                    mode: rule.mode,
                    used: measure.as_ref().map_or(0.0, |measure| measure.observed),
                    ceiling,
                    ratio: measure.map_or(0.0, |measure| measure.ratio(ceiling).min(1e9)),
                    share: outside.part(rule, Amount::new(in_flight.0, in_flight.1)).map(|part| UsedShare::new(rule, part)),
                }
            })
            .collect()
    }
}

impl Tracked {
    /// Somebody who comes makes the parts of others smaller: what they have asked for by then is still theirs.
    fn not_spared(&mut self, part: Option<Part>, session: &Session, outside: &Outside) -> Option<Part> {
        let asks = matches!(session.activity(), Activity::Model | Activity::RetryBackoff | Activity::Compacting);
        match part {
            Some(_) if self.reached => {}
            Some(_) if asks && self.spares.is_none_or(|spent| spent == outside.spent) => {
                self.spares = Some(outside.spent);
                return None;
            }
            _ => self.spares = None,
        }
        part
    }
}

fn measure(
    rule: &Rule,
    began: Duration,
    session: &Session,
    outside: &Outside,
    (usd, tokens): (Usd, u64),
    now: Now,
) -> Option<Measure> {
    let turn = session.turn();
    let streaks = || session.streaks();
    let count = |n: u64, instance| {
        #[expect(clippy::cast_precision_loss, reason = "for a ratio")]
        let observed = n as f64;
        Measure { observed, instance, runs_since: None, hold: false, falls: false }
    };
    let clock = |since: Duration| Measure {
        observed: now.mono.saturating_sub(since).as_secs_f64(),
        instance: since,
        runs_since: Some(since),
        hold: false,
        falls: false,
    };
    Some(match (rule.limit, rule.scope) {
        // The CLI itself stops at the ceiling, after that round's tools; we are there if it does not.
        (Limit::Turns, Scope::Turn) => {
            let turn = turn?;
            let over = matches!(rule.ceiling, Ceiling::Count(max) if turn.rounds > max);
            Measure { hold: !over, ..count(turn.rounds, turn.started) }
        }
        // A last answer may end its turn. Between two turns the next message would ask for one round more.
        (Limit::Turns, Scope::Session) => {
            let hold = if turn.is_some() { !session.goes_on() } else { !outside.can_refuse };
            Measure { hold, ..count(session.rounds(), began) }
        }
        (Limit::CostUsd, Scope::Turn) => {
            let turn = turn?;
            Measure { observed: (turn.cost + usd).to_f64(), ..count(0, turn.started) }
        }
        (Limit::CostUsd, Scope::Session) => Measure { observed: (session.cost() + usd).to_f64(), ..count(0, began) },
        (
            Limit::CostUsd | Limit::Tokens,
            Scope::Container
            | Scope::ContainerDay
            | Scope::ContainerMonth
            | Scope::Tenant
            | Scope::TenantDay
            | Scope::TenantMonth,
        ) => {
            let shared = outside.shared[rule.scope.shared()?]?;
            let used = outside.spent_by_all(rule.scope)? + shared.before + Amount::new(usd, tokens);
            let hold = outside.let_through || outside.waits_for_others(rule, Amount::new(usd, tokens));
            match rule.limit {
                Limit::Tokens => Measure { hold, ..count(used.tokens, shared.ends) },
                _ => Measure { observed: used.usd.to_f64(), hold, ..count(0, shared.ends) },
            }
        }
        (Limit::Tokens, Scope::Turn) => {
            let turn = turn?;
            count(turn.tokens.saturating_add(tokens), turn.started)
        }
        (Limit::Tokens, Scope::Session) => count(session.tokens().saturating_add(tokens), began),
        (Limit::Duration, Scope::Turn) => clock(turn?.started),
        (Limit::Duration, Scope::Session) => clock(began),
        (Limit::Duration, Scope::Tool) => clock(session.oldest_call()?.1),
        (Limit::Duration, Scope::Subagent) => clock(session.oldest_agent()?),
        // Who is made to wait is not idle.
        (Limit::Idle, _) if outside.paused => return None,
        (Limit::Idle, _) => clock(session.idle_since()?.max(outside.resumed_at.unwrap_or_default())),
        (Limit::Startup, _) if !session.spoke() => clock(outside.fed_at?),
        // Where nothing runs nothing gets on, whatever was being done.
        (Limit::Stall, _) if outside.frozen_since.is_some() && session.activity().is_work() => clock(outside.frozen_since?),
        (Limit::Stall, _) if matches!(session.activity(), Activity::Model | Activity::Compacting | Activity::Stuck) => {
            clock(session.last_active())
        }
        // No result though the last answer asks for nothing more; or no exit though there is nothing more to come.
        (Limit::Result, _) => match (turn, outside.input_over) {
            (Some(_), _) if session.spoke() && session.answered() && session.calls_in_flight() == 0 => {
                clock(session.last_active())
            }
            (None, Some(over)) if session.turns() > 0 => clock(over.max(session.activity_since())),
            _ => return None,
        },
        (Limit::Memory, _) => Measure { hold: turn.is_some(), ..count(outside.memory_bytes?, began) },
        (Limit::MemoryForecast, _) => {
            let observed = outside.memory_left?.as_secs_f64();
            Measure { observed, hold: turn.is_some(), falls: true, ..count(0, began) }
        }
        (Limit::IdenticalCalls, _) => count(streaks().identical, turn?.started),
        (Limit::AlternatingCalls, _) => count(streaks().alternating, turn?.started),
        (Limit::SameErrors, _) => count(streaks().same_error, turn?.started),
        (Limit::Compactions, _) => count(streaks().compactions, turn?.started),
        (Limit::FanOut, _) => count(streaks().subagents, turn?.started),
        (Limit::NoProgress, _) => count(streaks().stale, turn?.started),
        // The others have no meaning in that scope; the configuration cannot name them.
        (Limit::Startup | Limit::Stall | Limit::Turns | Limit::CostUsd | Limit::Tokens | Limit::Duration, _) => return None,
    })
}

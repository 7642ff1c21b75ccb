//! The fold from facts to what people and tools ask of a session: `/status`, `replay`, the bill.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::tokens::{Tokens, Usd};
use crate::update::{Basis, Outcome, ToolOutcome, Update};

/// Sessions that are reported one by one; what came before is in the totals. A conversation cleared more often than this within
/// one process is no conversation any more.
const SESSIONS: usize = 1_024;
/// Models and tools by name, in each session.
const NAMES: usize = 256;

/// Tokens and money of one model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spend {
    pub cost_usd: Usd,
    pub tokens: Tokens,
}

/// Calls of one tool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calls {
    pub ok: u64,
    /// Failed, denied, interrupted, or never answered.
    pub error: u64,
}

/// What a container costs by the hour, and for how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    #[serde(with = "seconds")]
    pub seconds: Duration,
    pub cost_usd: Usd,
}

impl Container {
    pub(crate) fn is_zero(&self) -> bool {
        *self == Container::default()
    }

    pub(crate) fn add(&mut self, time: Duration, cost: Usd) {
        self.seconds = self.seconds.saturating_add(time);
        self.cost_usd += cost;
    }
}

mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(time: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_f64(time.as_secs_f64())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        Ok(Duration::try_from_secs_f64(f64::deserialize(d)?).unwrap_or_default())
    }
}

/// The sums that sessions have, and all of them together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    pub turns: u64,
    pub cost_usd: Usd,
    /// Whether a part of the cost was confirmed by nobody.
    pub cost_estimated: bool,
    pub tokens: Tokens,
    pub models: BTreeMap<String, Spend>,
    pub tool_calls: BTreeMap<String, Calls>,
    pub subagents: u64,
    pub api_retries: u64,
    pub parse_errors: u64,
    pub unknown_events: u64,
    /// No part of `cost_usd`.
    #[serde(default, skip_serializing_if = "Container::is_zero")]
    pub container: Container,
}

impl Sums {
    /// Whatever the other says: it may be what another user has written.
    pub fn add(&mut self, other: &Sums) {
        let count = |sum: &mut u64, n: u64| *sum = sum.saturating_add(n);
        count(&mut self.turns, other.turns);
        self.cost_usd += other.cost_usd;
        self.cost_estimated |= other.cost_estimated;
        self.tokens += other.tokens;
        for (model, spend) in &other.models {
            let sum = entry(&mut self.models, model);
            sum.cost_usd += spend.cost_usd;
            sum.tokens += spend.tokens;
        }
        for (tool, calls) in &other.tool_calls {
            let sum = entry(&mut self.tool_calls, tool);
            count(&mut sum.ok, calls.ok);
            count(&mut sum.error, calls.error);
        }
        count(&mut self.subagents, other.subagents);
        count(&mut self.api_retries, other.api_retries);
        count(&mut self.parse_errors, other.parse_errors);
        count(&mut self.unknown_events, other.unknown_events);
        self.container.add(other.container.seconds, other.container.cost_usd);
    }
}

/// One session.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SessionReport {
    /// Absent where the CLI never said it.
    pub session_id: Option<String>,
    /// How its last turn ended; absent before the first has.
    pub outcome: Option<Outcome>,
    #[serde(flatten)]
    pub sums: Sums,
    #[serde(skip)]
    unconfirmed: Usd,
    #[serde(skip)]
    estimate_stays: bool,
}

/// All of it. Serialises to the object that `replay --format json` prints.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    sessions: Vec<SessionReport>,
    by_id: BTreeMap<String, usize>,
    current: Option<usize>,
    /// What was read before any session had a name, and sessions beyond the bound.
    loose: Sums,
    /// How the last turn of no session ended.
    loose_outcome: Option<Outcome>,
}

impl Report {
    pub fn sessions(&self) -> &[SessionReport] {
        &self.sessions
    }

    /// The session that money is spent on now.
    pub fn current(&self) -> Option<&SessionReport> {
        self.current.map(|at| &self.sessions[at])
    }

    pub fn totals(&self) -> Sums {
        let mut totals = self.loose.clone();
        for session in &self.sessions {
            totals.add(&session.sums);
        }
        totals
    }

    pub fn on(&mut self, update: &Update) {
        match update {
            Update::SessionStarted { session, .. } => self.open(session),
            Update::TurnEnded { session, outcome, confirmed, .. } => {
                if let Some(report) = self.session(session) {
                    report.outcome = Some(*outcome);
                    report.sums.turns += 1;
                    // A result confirms what was counted early; what one left out stays an estimate.
                    report.estimate_stays |= !*confirmed && !report.unconfirmed.is_zero();
                    report.unconfirmed = Usd::ZERO;
                    report.sums.cost_estimated = report.estimate_stays;
                } else {
                    self.loose.turns += 1;
                    self.loose_outcome = Some(*outcome);
                }
            }
            Update::Spent(spent) => {
                let estimated = spent.basis == Basis::Estimate;
                let sums = match self.session(&spent.session) {
                    Some(report) => {
                        if estimated {
                            report.unconfirmed += spent.cost;
                        }
                        &mut report.sums
                    }
                    None => &mut self.loose,
                };
                sums.cost_estimated |= estimated;
                sums.cost_usd += spent.cost;
                sums.tokens += spent.tokens;
                let model = entry(&mut sums.models, &spent.model);
                model.cost_usd += spent.cost;
                model.tokens += spent.tokens;
            }
            Update::Corrected { session, model, usd, tokens, .. } => {
                let sums = self.sums(session);
                sums.cost_usd = sums.cost_usd - *usd;
                sums.tokens = sums.tokens.saturating_sub(*tokens);
                let model = entry(&mut sums.models, model);
                model.cost_usd = model.cost_usd - *usd;
                model.tokens = model.tokens.saturating_sub(*tokens);
            }
            Update::ContainerUsed { session, time, cost } => self.sums(session).container.add(*time, *cost),
            Update::ToolEnded { session, tool, outcome, .. } => {
                let calls = entry(&mut self.sums(session).tool_calls, tool);
                match outcome {
                    ToolOutcome::Ok => calls.ok += 1,
                    ToolOutcome::Error | ToolOutcome::Denied | ToolOutcome::Interrupted | ToolOutcome::Lost => calls.error += 1,
                }
            }
            Update::SubagentStarted { session, .. } => self.sums(session).subagents += 1,
            Update::Retried { session, .. } => self.sums(session).api_retries += 1,
            Update::Unread { reason: "field", .. } => {}
            Update::Unread { count, .. } => self.now().parse_errors += count,
            Update::Unknown { .. } => self.now().unknown_events += 1,
            Update::ProcessStarted
            | Update::Spoke { .. }
            | Update::Identified { .. }
            | Update::ModelChosen { .. }
            | Update::TurnStarted { .. }
            | Update::Requested { .. }
            | Update::Answering { .. }
            | Update::Answered(_)
            | Update::FirstToken { .. }
            | Update::ContextUsed { .. }
            | Update::Unconfirmed { .. }
            | Update::CounterReset { .. }
            | Update::ToolStarted { .. }
            | Update::ToolProgressed { .. }
            | Update::PermissionAsked { .. }
            | Update::PermissionDecided { .. }
            | Update::PermissionDenied { .. }
            | Update::HookStarted { .. }
            | Update::HookAnswered { .. }
            | Update::HookEnded { .. }
            | Update::SubagentEnded { .. }
            | Update::Subagents { .. }
            | Update::BackgroundTasks { .. }
            | Update::Compacting
            | Update::Compacted { .. }
            | Update::ApiFailed { .. }
            | Update::RateLimit { .. }
            | Update::McpServer { .. }
            | Update::McpStarted { .. }
            | Update::McpCalled { .. }
            | Update::Was { .. }
            | Update::Stalled { .. }
            | Update::OomKilled { .. }
            | Update::TenantConflict { .. }
            | Update::Resumed { .. }
            | Update::Active { .. }
            | Update::Repeating { .. }
            | Update::LoopDetected { .. }
            | Update::LimitUsed { .. }
            | Update::Decided(_)
            | Update::Ordered { .. }
            | Update::Enforced { .. }
            | Update::IdleShutdown
            | Update::Stopping { .. }
            | Update::StepEnded { .. }
            | Update::Gone { .. }
            | Update::ResultMissing { .. }
            | Update::Exited { .. }
            | Update::SessionEnded { .. }
            | Update::Asked { .. }
            | Update::Heard { .. }
            | Update::LongestLine { .. }
            | Update::Lost { .. } => {}
        }
    }

    fn open(&mut self, id: &str) {
        if let Some(&at) = self.by_id.get(id) {
            self.current = Some(at);
            return;
        }
        if self.sessions.len() >= SESSIONS {
            self.current = None;
            return;
        }
        self.current = Some(self.sessions.len());
        self.by_id.insert(id.to_owned(), self.sessions.len());
        // What came before any name is the first one's.
        let first = self.sessions.is_empty();
        let (sums, outcome) =
            if first { (std::mem::take(&mut self.loose), self.loose_outcome.take()) } else { Default::default() };
        self.sessions.push(SessionReport {
            session_id: Some(id.to_owned()),
            outcome,
            sums,
            unconfirmed: Usd::ZERO,
            estimate_stays: false,
        });
    }

    fn session(&mut self, id: &str) -> Option<&mut SessionReport> {
        let at = *self.by_id.get(id)?;
        self.sessions.get_mut(at)
    }

    fn sums(&mut self, id: &str) -> &mut Sums {
        match self.by_id.get(id) {
            Some(&at) => &mut self.sessions[at].sums,
            None => &mut self.loose,
        }
    }

    fn now(&mut self) -> &mut Sums {
        match self.current {
            Some(at) => &mut self.sessions[at].sums,
            None => &mut self.loose,
        }
    }
}

impl Serialize for Report {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Object<'a> {
            sessions: &'a [SessionReport],
            totals: Sums,
        }
        // A CLI that never says its session's name has one all the same.
        let nameless = (self.sessions.is_empty() && self.loose.turns > 0).then(|| SessionReport {
            session_id: None,
            outcome: self.loose_outcome,
            sums: self.loose.clone(),
            unconfirmed: Usd::ZERO,
            estimate_stays: false,
        });
        let sessions = nameless.as_ref().map_or(&self.sessions[..], std::slice::from_ref);
        Object { sessions, totals: self.totals() }.serialize(s)
    }
}

fn entry<'a, V: Default>(map: &'a mut BTreeMap<String, V>, name: &str) -> &'a mut V {
    let name = if map.contains_key(name) || map.len() < NAMES { name } else { crate::metric::OTHER };
    map.entry(name.to_owned()).or_default()
}

//! The ledger file: one JSON line per accounting fact, append-only. What `replay --ledger` sums is what was written here, and what
//! `explain` tells is made of the same lines: the money, and beside it what it was spent on.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::monitor::Exit;
use crate::tokens::{Tokens, Usd};
use crate::update::{
    Activity, Answered, Basis, Decision, Direction, ExitReason, MissingCause, Outcome, Source, Start, ToolOutcome, Update, Wish,
};
use crate::who::{Guarded, Shared, Who};

/// A line of the ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Seconds since the Unix epoch.
    pub time: f64,
    /// The wrapper that wrote it: a line is known by this and its number.
    pub run: String,
    /// Numbers the lines of a run without a gap.
    pub seq: u64,
    /// For whom the agent works, as far as that was known.
    #[serde(flatten)]
    pub who: Who,
    #[serde(flatten)]
    pub fact: Fact,
}

/// What a line says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Fact {
    SessionStarted {
        session_id: String,
        start: Start,
        /// The session that it goes on from.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<String>,
    },
    /// Tokens and money, never written before.
    Spent {
        session_id: String,
        model: String,
        source: Source,
        basis: Basis,
        tokens: Tokens,
        cost_usd: Usd,
        /// At list prices, where that is another sum.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        list_usd: Option<Usd>,
        #[serde(default, skip_serializing_if = "is_zero")]
        web_searches: u64,
        #[serde(default, skip_serializing_if = "is_false")]
        unpriced: bool,
    },
    /// A confirmation took back a part of what had been written.
    Corrected {
        session_id: String,
        model: String,
        direction: Direction,
        cost_usd: Usd,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        list_usd: Option<Usd>,
        tokens: Tokens,
    },
    TurnStarted {
        session_id: String,
        turn: u64,
    },
    /// An answer of the model. Its tokens are what the API told of it: the money is in `spent`.
    RequestCompleted {
        session_id: String,
        model: String,
        source: Source,
        /// The call whose subagent was answered.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        parent: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stop_reason: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        duration_seconds: Option<f64>,
        tokens: Tokens,
        /// Whether the API told its end; if not, the output is unknown.
        settled: bool,
    },
    ToolCompleted {
        session_id: String,
        call: String,
        tool: String,
        outcome: ToolOutcome,
        duration_seconds: f64,
        /// The call whose subagent made it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        parent: Option<String>,
    },
    SubagentStarted {
        session_id: String,
        call: String,
        kind: String,
        background: bool,
    },
    SubagentEnded {
        session_id: String,
        call: String,
        outcome: String,
        duration_seconds: f64,
    },
    /// A request failed and was made again.
    RequestRetried {
        session_id: String,
        error: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        delay_seconds: Option<f64>,
    },
    /// A request failed for good.
    RequestFailed {
        session_id: String,
        error: String,
    },
    Compacted {
        session_id: String,
        trigger: String,
        pre_tokens: u64,
        post_tokens: u64,
    },
    /// How long the agent was in which state since the last such line.
    TimeSpent {
        session_id: String,
        seconds: BTreeMap<Activity, f64>,
    },
    TurnEnded {
        session_id: String,
        turn: u64,
        outcome: Outcome,
        cost_usd: Usd,
        duration_seconds: f64,
        confirmed: bool,
    },
    /// A limit was reached, or nearly, and this was decided.
    LimitDecided {
        session_id: String,
        limit: String,
        scope: String,
        mode: String,
        action: String,
        observed: f64,
        ceiling: f64,
        level: f64,
        /// What the agent was about, where time ran out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
        /// Of a shared budget it is this agent's fair share that is used up, and of that are the numbers.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        share: bool,
    },
    /// Somebody has asked this of the agent. What was raised, and to what.
    Ordered {
        session_id: String,
        order: Wish,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        scope: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ceiling: Option<f64>,
    },
    /// The agent is quiet after a decision.
    LimitEnforced {
        action: String,
        latency_seconds: f64,
        overshoot_usd: Option<Usd>,
    },
    /// The agent shares something with that of another tenant.
    TenantConflict {
        session_id: String,
        kind: Shared,
        owner: String,
        action: Guarded,
    },
    /// The container was there for so long since the last such line, on this agent's account. No part of what it spent.
    ContainerUsed {
        session_id: String,
        seconds: f64,
        cost_usd: Usd,
    },
    /// The kernel killed a process for memory.
    OomKilled {
        session_id: String,
        role: String,
        memory_bytes: u64,
    },
    ResultMissing {
        session_id: String,
        cause: MissingCause,
    },
    SessionEnded {
        session_id: String,
        cost_usd: Usd,
    },
    ProcessExited {
        session_id: String,
        reason: ExitReason,
        /// With what it ended: a code, or the signal that killed it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exit_code: Option<i32>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signal: Option<i32>,
    },
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

fn unlike(list: Usd, cost: Usd) -> Option<Usd> {
    (list != cost).then_some(list)
}

fn is_false(b: &bool) -> bool {
    !*b
}

impl Record {
    pub fn new(run: &str, seq: u64, unix: Duration, who: &Who, fact: Fact) -> Record {
        Record { time: unix.as_secs_f64(), run: run.to_owned(), seq, who: who.clone(), fact }
    }
}

/// Calls whose callers are remembered at a time: more than ever run at once.
const CALLS: usize = 1_024;

/// Writes the lines of one run.
#[derive(Debug)]
pub struct Recorder {
    /// What each line says, too.
    pub who: Who,
    run: String,
    seq: u64,
    session: String,
    /// Time in each state that no line has told yet.
    times: BTreeMap<Activity, Duration>,
    /// Open calls of subagents, by the call that started the subagent.
    parents: BTreeMap<String, String>,
}

impl Recorder {
    pub fn new(run: &str) -> Recorder {
        Recorder {
            who: Who::default(),
            run: run.to_owned(),
            seq: 0,
            session: String::new(),
            times: BTreeMap::new(),
            parents: BTreeMap::new(),
        }
    }

    /// The lines that a fact deserves: mostly one or none.
    pub fn on(&mut self, update: &Update, unix: Duration, mut write: impl FnMut(Record)) {
        match update {
            Update::SessionStarted { session, .. } if *session != self.session => {
                // What came before belongs to the session before; what came before any, to the first.
                if !self.session.is_empty() {
                    self.told(unix, &mut write);
                }
                self.session.clone_from(session);
            }
            Update::Was { state, lasted, .. } => *self.times.entry(*state).or_default() += *lasted,
            Update::ToolStarted { call, parent: Some(parent), .. } if self.parents.len() < CALLS => {
                self.parents.insert(call.clone(), parent.clone());
            }
            Update::Exited { .. } => self.told(unix, &mut write),
            _ => {}
        }
        if let Some(fact) = self.fact(update) {
            self.line(fact, unix, &mut write);
        }
        if let Update::TurnEnded { .. } = update {
            self.told(unix, &mut write);
        }
    }

    fn told(&mut self, unix: Duration, write: &mut impl FnMut(Record)) {
        if self.times.is_empty() {
            return;
        }
        let seconds = std::mem::take(&mut self.times).into_iter().map(|(state, time)| (state, time.as_secs_f64())).collect();
        self.line(Fact::TimeSpent { session_id: self.session.clone(), seconds }, unix, write);
    }

    fn line(&mut self, fact: Fact, unix: Duration, write: &mut impl FnMut(Record)) {
        write(Record::new(&self.run, self.seq, unix, &self.who, fact));
        self.seq += 1;
    }

    fn fact(&mut self, update: &Update) -> Option<Fact> {
        Some(match update.clone() {
            Update::SessionStarted { session, start, from } => Fact::SessionStarted { session_id: session, start, from },
            Update::Spent(spent) => Fact::Spent {
                session_id: spent.session,
                model: spent.model,
                source: spent.source,
                basis: spent.basis,
                tokens: spent.tokens,
                cost_usd: spent.cost,
                list_usd: unlike(spent.list, spent.cost),
                web_searches: spent.web_searches,
                unpriced: spent.unpriced,
            },
            Update::Corrected { session, model, direction, usd, list, tokens } => {
                Fact::Corrected { session_id: session, model, direction, cost_usd: usd, list_usd: unlike(list, usd), tokens }
            }
            Update::TurnStarted { session, turn } => Fact::TurnStarted { session_id: session, turn },
            Update::Answered(answered) => {
                let Answered { session, model, source, parent, stop_reason, duration, tokens, settled, .. } = *answered;
                let duration_seconds = duration.map(|d| d.as_secs_f64());
                Fact::RequestCompleted {
                    session_id: session,
                    model,
                    source,
                    parent,
                    stop_reason,
                    duration_seconds,
                    tokens,
                    settled,
                }
            }
            Update::ToolEnded { session, call, tool, outcome, duration } => Fact::ToolCompleted {
                session_id: session,
                parent: self.parents.remove(&call),
                call,
                tool,
                outcome,
                duration_seconds: duration.as_secs_f64(),
            },
            Update::SubagentStarted { session, kind, call, background, .. } => {
                Fact::SubagentStarted { session_id: session, call, kind, background }
            }
            Update::SubagentEnded { call, outcome, duration } => Fact::SubagentEnded {
                session_id: self.session.clone(),
                call,
                outcome: outcome.to_owned(),
                duration_seconds: duration.as_secs_f64(),
            },
            Update::Retried { session, error, delay, .. } => {
                Fact::RequestRetried { session_id: session, error, delay_seconds: delay.map(|d| d.as_secs_f64()) }
            }
            Update::ApiFailed { session, error, .. } => Fact::RequestFailed { session_id: session, error },
            Update::Compacted { trigger, pre_tokens, post_tokens, .. } => {
                Fact::Compacted { session_id: self.session.clone(), trigger, pre_tokens, post_tokens }
            }
            Update::TurnEnded { session, turn, outcome, duration, cost, confirmed, .. } => Fact::TurnEnded {
                session_id: session,
                turn,
                outcome,
                cost_usd: cost,
                duration_seconds: duration.as_secs_f64(),
                confirmed,
            },
            Update::Decided(Decision { session, limit, scope, mode, step, observed, ceiling, level, why, share }) => {
                Fact::LimitDecided {
                    session_id: session,
                    limit: limit.as_str().to_owned(),
                    scope: scope.as_str().to_owned(),
                    mode: mode.as_str().to_owned(),
                    action: step.as_str().to_owned(),
                    observed,
                    ceiling,
                    level,
                    why: why.map(|why| why.as_str().to_owned()),
                    share,
                }
            }
            Update::Ordered { session, order, limit, scope, ceiling } => Fact::Ordered {
                session_id: session,
                order,
                limit: limit.map(|limit| limit.as_str().to_owned()),
                scope: scope.map(|scope| scope.as_str().to_owned()),
                ceiling,
            },
            Update::Enforced { step, latency, overshoot, .. } => Fact::LimitEnforced {
                action: step.as_str().to_owned(),
                latency_seconds: latency.as_secs_f64(),
                overshoot_usd: overshoot,
            },
            Update::TenantConflict { kind, owner, action } => {
                Fact::TenantConflict { session_id: self.session.clone(), kind, owner, action }
            }
            Update::ContainerUsed { session, time, cost } => {
                Fact::ContainerUsed { session_id: session, seconds: time.as_secs_f64(), cost_usd: cost }
            }
            Update::OomKilled { role, memory_bytes } => {
                Fact::OomKilled { session_id: self.session.clone(), role: role.to_owned(), memory_bytes }
            }
            Update::ResultMissing { session, cause } => Fact::ResultMissing { session_id: session, cause },
            Update::SessionEnded { session, cost } => Fact::SessionEnded { session_id: session, cost_usd: cost },
            Update::Exited { reason, session, exit } => Fact::ProcessExited {
                session_id: session,
                reason,
                exit_code: exit.and_then(Exit::code),
                signal: exit.and_then(Exit::signal),
            },
            _ => return None,
        })
    }
}

impl Fact {
    /// The session that it is about.
    pub fn session_id(&self) -> Option<&str> {
        match self {
            Fact::SessionStarted { session_id, .. }
            | Fact::Spent { session_id, .. }
            | Fact::Corrected { session_id, .. }
            | Fact::TurnStarted { session_id, .. }
            | Fact::RequestCompleted { session_id, .. }
            | Fact::ToolCompleted { session_id, .. }
            | Fact::SubagentStarted { session_id, .. }
            | Fact::SubagentEnded { session_id, .. }
            | Fact::RequestRetried { session_id, .. }
            | Fact::RequestFailed { session_id, .. }
            | Fact::Compacted { session_id, .. }
            | Fact::TimeSpent { session_id, .. }
            | Fact::TurnEnded { session_id, .. }
            | Fact::LimitDecided { session_id, .. }
            | Fact::TenantConflict { session_id, .. }
            | Fact::Ordered { session_id, .. }
            | Fact::OomKilled { session_id, .. }
            | Fact::ContainerUsed { session_id, .. }
            | Fact::ResultMissing { session_id, .. }
            | Fact::SessionEnded { session_id, .. }
            | Fact::ProcessExited { session_id, .. } => Some(session_id),
            Fact::LimitEnforced { .. } => None,
        }
    }

    /// What it says, as far as it changes sums again.
    pub fn to_update(&self) -> Option<Update> {
        Some(match self.clone() {
            Fact::SessionStarted { session_id, start, from } => Update::SessionStarted { session: session_id, start, from },
            Fact::Spent { session_id, model, source, basis, tokens, cost_usd, list_usd, web_searches, unpriced } => {
                Update::Spent(crate::update::Spent {
                    session: session_id,
                    model,
                    source,
                    basis,
                    tokens,
                    cost: cost_usd,
                    list: list_usd.unwrap_or(cost_usd),
                    reported: cost_usd,
                    web_searches,
                    unpriced,
                })
            }
            Fact::Corrected { session_id, model, direction, cost_usd, list_usd, tokens } => Update::Corrected {
                session: session_id,
                model,
                direction,
                usd: cost_usd,
                list: list_usd.unwrap_or(cost_usd),
                tokens,
            },
            Fact::ContainerUsed { session_id, seconds, cost_usd } => Update::ContainerUsed {
                session: session_id,
                time: Duration::try_from_secs_f64(seconds).unwrap_or_default(),
                cost: cost_usd,
            },
            Fact::TurnEnded { session_id, turn, outcome, cost_usd, duration_seconds, confirmed } => Update::TurnEnded {
                session: session_id,
                turn,
                outcome,
                reason: None,
                duration: Duration::try_from_secs_f64(duration_seconds).unwrap_or_default(),
                answers: 0,
                num_turns: None,
                cost: cost_usd,
                tokens: Box::default(),
                confirmed,
            },
            Fact::ResultMissing { session_id, cause } => Update::ResultMissing { session: session_id, cause },
            Fact::SessionEnded { session_id, cost_usd } => Update::SessionEnded { session: session_id, cost: cost_usd },
            Fact::ProcessExited { session_id, reason, exit_code, signal } => {
                let exit = exit_code.map(Exit::Code).or(signal.map(Exit::Signal));
                Update::Exited { reason, session: session_id, exit }
            }
            Fact::ToolCompleted { session_id, call, tool, outcome, duration_seconds, .. } => Update::ToolEnded {
                session: session_id,
                call,
                tool,
                outcome,
                duration: Duration::try_from_secs_f64(duration_seconds).unwrap_or_default(),
            },
            Fact::SubagentStarted { session_id, call, kind, background } => {
                Update::SubagentStarted { session: session_id, kind, call, task: None, depth: 0, background }
            }
            Fact::RequestRetried { session_id, error, delay_seconds } => Update::Retried {
                session: session_id,
                error,
                parent: None,
                status: None,
                delay: delay_seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
            },
            Fact::TurnStarted { .. }
            | Fact::RequestCompleted { .. }
            | Fact::SubagentEnded { .. }
            | Fact::RequestFailed { .. }
            | Fact::Compacted { .. }
            | Fact::TimeSpent { .. }
            | Fact::OomKilled { .. }
            | Fact::TenantConflict { .. }
            | Fact::LimitDecided { .. }
            | Fact::Ordered { .. }
            | Fact::LimitEnforced { .. } => return None,
        })
    }
}

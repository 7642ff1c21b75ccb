//! The ledger file: one JSON line per accounting fact, append-only. What `replay --ledger` sums is what was written here.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::tokens::{Tokens, Usd};
use crate::update::{Basis, Decision, Direction, ExitReason, MissingCause, Outcome, Source, Start, Update};

/// A line of the ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Seconds since the Unix epoch.
    pub time: f64,
    /// The wrapper that wrote it: a line is known by this and its number.
    pub run: String,
    /// Numbers the lines of a run without a gap.
    pub seq: u64,
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
        tokens: Tokens,
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
    },
    /// The agent is quiet after a decision.
    LimitEnforced {
        action: String,
        latency_seconds: f64,
        overshoot_usd: Option<Usd>,
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
    },
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

fn is_false(b: &bool) -> bool {
    !*b
}

impl Record {
    pub fn new(run: &str, seq: u64, unix: Duration, fact: Fact) -> Record {
        Record { time: unix.as_secs_f64(), run: run.to_owned(), seq, fact }
    }
}

impl Fact {
    /// The line that a fact deserves, if any.
    pub fn of(update: &Update) -> Option<Fact> {
        Some(match update.clone() {
            Update::SessionStarted { session, start, from } => Fact::SessionStarted { session_id: session, start, from },
            Update::Spent(spent) => Fact::Spent {
                session_id: spent.session,
                model: spent.model,
                source: spent.source,
                basis: spent.basis,
                tokens: spent.tokens,
                cost_usd: spent.cost,
                web_searches: spent.web_searches,
                unpriced: spent.unpriced,
            },
            Update::Corrected { session, model, direction, usd, tokens } => {
                Fact::Corrected { session_id: session, model, direction, cost_usd: usd, tokens }
            }
            Update::TurnEnded { session, turn, outcome, duration, cost, confirmed, .. } => Fact::TurnEnded {
                session_id: session,
                turn,
                outcome,
                cost_usd: cost,
                duration_seconds: duration.as_secs_f64(),
                confirmed,
            },
            Update::Decided(Decision { session, limit, scope, mode, step, observed, ceiling, level }) => Fact::LimitDecided {
                session_id: session,
                limit: limit.as_str().to_owned(),
                scope: scope.as_str().to_owned(),
                mode: mode.as_str().to_owned(),
                action: step.as_str().to_owned(),
                observed,
                ceiling,
                level,
            },
            Update::Enforced { step, latency, overshoot, .. } => Fact::LimitEnforced {
                action: step.as_str().to_owned(),
                latency_seconds: latency.as_secs_f64(),
                overshoot_usd: overshoot,
            },
            Update::ResultMissing { session, cause } => Fact::ResultMissing { session_id: session, cause },
            Update::SessionEnded { session, cost } => Fact::SessionEnded { session_id: session, cost_usd: cost },
            Update::Exited { reason, session } => Fact::ProcessExited { session_id: session, reason },
            _ => return None,
        })
    }

    /// What it says, as far as it changes sums again.
    pub fn to_update(&self) -> Option<Update> {
        Some(match self.clone() {
            Fact::SessionStarted { session_id, start, from } => Update::SessionStarted { session: session_id, start, from },
            Fact::Spent { session_id, model, source, basis, tokens, cost_usd, web_searches, unpriced } => {
                Update::Spent(crate::update::Spent {
                    session: session_id,
                    model,
                    source,
                    basis,
                    tokens,
                    cost: cost_usd,
                    reported: cost_usd,
                    web_searches,
                    unpriced,
                })
            }
            Fact::Corrected { session_id, model, direction, cost_usd, tokens } => {
                Update::Corrected { session: session_id, model, direction, usd: cost_usd, tokens }
            }
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
            Fact::ProcessExited { session_id, reason } => Update::Exited { reason, session: session_id },
            Fact::LimitDecided { .. } | Fact::LimitEnforced { .. } => return None,
        })
    }
}

//! The fold from facts to what happened lately, for people who watch: when, what, how long, at what cost; never what was said.
//!
//! A ring: the oldest entries go. Each has a number, so that whoever has read some asks for those after it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::Serialize;

use crate::limit::{Limit, Scope};
use crate::metric::bounded;
use crate::price::PriceTable;
use crate::tokens::{Tokens, Usd};
use crate::update::{
    Answered, Decision, ExitReason, MissingCause, Outcome, Source, Stall, Start, Step, ToolOutcome, Update, Wish,
};
use crate::who::{Guarded, Shared};

/// A working day of a quiet agent, and the last minutes of a busy one.
pub const ENTRIES: usize = 500;
/// Names are the CLI's and the app's: with this, an entry stays below 512 bytes.
const NAME: usize = 96;
/// Calls and subagents that are remembered until they end: more than ever run at once.
const OPEN: usize = 1_024;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// One more than the one before.
    pub n: u64,
    /// When it was over, in seconds since the Unix epoch; it began `seconds` before, where it has any.
    pub at: f64,
    #[serde(flatten)]
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum What {
    Session {
        session_id: String,
        start: Start,
    },
    TurnStarted {
        turn: u64,
    },
    TurnEnded {
        turn: u64,
        outcome: Outcome,
        seconds: f64,
        cost_usd: Usd,
        /// The CLI says so.
        confirmed: bool,
    },
    /// An answer of the model.
    Request {
        model: String,
        source: Source,
        #[serde(skip_serializing_if = "Option::is_none")]
        seconds: Option<f64>,
        /// What was sent, of which `cached` was read from the cache.
        input: u64,
        cached: u64,
        /// Absent where the API did not tell the end.
        #[serde(skip_serializing_if = "Option::is_none")]
        output: Option<u64>,
        /// By the price list: what is billed is in the turn.
        #[serde(skip_serializing_if = "Option::is_none")]
        cost_usd: Option<Usd>,
    },
    Tool {
        tool: String,
        outcome: ToolOutcome,
        seconds: f64,
        source: Source,
    },
    Permission {
        tool: String,
        decision: &'static str,
        seconds: f64,
    },
    SubagentStarted {
        agent: String,
        background: bool,
    },
    SubagentEnded {
        agent: String,
        outcome: &'static str,
        seconds: f64,
    },
    Compacted {
        trigger: String,
        pre_tokens: u64,
        post_tokens: u64,
        seconds: f64,
    },
    Retried {
        error: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        status: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        delay_seconds: Option<f64>,
    },
    RequestFailed {
        error: String,
    },
    /// A limit was reached, or nearly.
    Limit {
        limit: &'static str,
        scope: &'static str,
        mode: &'static str,
        action: Step,
        observed: f64,
        ceiling: f64,
        level: f64,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        share: bool,
    },
    Loop {
        detector: &'static str,
        streak: u64,
        action: Step,
    },
    Stalled {
        stall: Stall,
        on: bool,
        #[serde(skip_serializing_if = "Option::is_none")]
        why: Option<&'static str>,
    },
    /// We go about ending a turn, or the agent.
    Stopping {
        action: Step,
    },
    Stopped {
        action: Step,
        seconds: f64,
        #[serde(skip_serializing_if = "Option::is_none")]
        overshoot_usd: Option<Usd>,
    },
    /// Somebody has asked this of the agent.
    Ordered {
        order: Wish,
        #[serde(skip_serializing_if = "Option::is_none")]
        limit: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        scope: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        ceiling: Option<f64>,
    },
    TenantConflict {
        shared: Shared,
        owner: String,
        action: Guarded,
    },
    OomKilled {
        role: &'static str,
        memory_bytes: u64,
    },
    ResultMissing {
        cause: MissingCause,
    },
    Exited {
        reason: ExitReason,
        #[serde(skip_serializing_if = "Option::is_none")]
        exit_code: Option<i32>,
        #[serde(skip_serializing_if = "Option::is_none")]
        signal: Option<i32>,
    },
}

/// What is known of something until it ends.
#[derive(Clone, Debug)]
enum Open {
    OfSubagent,
    Agent(String),
}

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    entries: VecDeque<Entry>,
    /// Of the last entry; zero before the first.
    last: u64,
    open: BTreeMap<String, Open>,
    /// The kind of the line that came last, and when.
    heard: Option<(&'static str, Duration)>,
}

impl Timeline {
    /// Those after this number, as far as they are still there.
    pub fn after(&self, n: u64) -> impl Iterator<Item = &Entry> {
        let known = usize::try_from(self.last.saturating_sub(n)).unwrap_or(usize::MAX).min(self.entries.len());
        self.entries.range(self.entries.len() - known..)
    }

    /// The number of the last entry.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// What the CLI said last, and when.
    pub fn heard(&self) -> Option<(&'static str, Duration)> {
        self.heard
    }

    pub fn on(&mut self, update: &Update, prices: &PriceTable, unix: Duration) {
        if let Update::Heard { kind } = update {
            // Mostly an answer to us, who ask now and then.
            if *kind != "control_response" {
                self.heard = Some((kind, unix));
            }
            return;
        }
        if let Some(what) = self.what(update, prices, unix) {
            if self.entries.len() >= ENTRIES {
                self.entries.pop_front();
            }
            self.last += 1;
            // Milliseconds: more digits say nothing.
            let at = (unix.as_secs_f64() * 1e3).round() / 1e3;
            self.entries.push_back(Entry { n: self.last, at, what });
        }
    }

    fn what(&mut self, update: &Update, prices: &PriceTable, unix: Duration) -> Option<What> {
        Some(match update {
            Update::SessionStarted { session, start, .. } => What::Session { session_id: name(session), start: *start },
            Update::TurnStarted { turn, .. } => What::TurnStarted { turn: *turn },
            Update::TurnEnded { turn, outcome, duration, cost, confirmed, .. } => What::TurnEnded {
                turn: *turn,
                outcome: *outcome,
                seconds: seconds(*duration),
                cost_usd: *cost,
                confirmed: *confirmed,
            },
            Update::Answered(answered) => {
                let Answered { model, source, duration, tokens, settled, .. } = &**answered;
                What::Request {
                    model: name(model),
                    source: *source,
                    seconds: duration.map(seconds),
                    input: tokens.prompt(),
                    cached: tokens.cache_read,
                    output: settled.then_some(tokens.output),
                    cost_usd: prices.answer(model, unix, &usage(*tokens)).filter(|_| *settled),
                }
            }
            Update::ToolStarted { call, parent: Some(_), .. } => {
                self.open(call, Open::OfSubagent);
                return None;
            }
            Update::ToolEnded { call, tool, outcome, duration, .. } => {
                let inside = matches!(self.open.get(call), Some(Open::OfSubagent));
                if inside {
                    self.open.remove(call);
                }
                What::Tool {
                    tool: name(tool),
                    outcome: *outcome,
                    seconds: seconds(*duration),
                    source: if inside { Source::Subagent } else { Source::Main },
                }
            }
            Update::PermissionDecided { tool, decision, wait, .. } => {
                What::Permission { tool: name(tool), decision, seconds: seconds(*wait) }
            }
            Update::SubagentStarted { kind, call, background, .. } => {
                self.open(call, Open::Agent(name(kind)));
                What::SubagentStarted { agent: name(kind), background: *background }
            }
            Update::SubagentEnded { call, outcome, duration } => {
                let agent = match self.open.remove(call) {
                    Some(Open::Agent(kind)) => kind,
                    Some(Open::OfSubagent) | None => String::from("unknown"),
                };
                What::SubagentEnded { agent, outcome, seconds: seconds(*duration) }
            }
            Update::Compacted { trigger, pre_tokens, post_tokens, duration } => What::Compacted {
                trigger: name(trigger),
                pre_tokens: *pre_tokens,
                post_tokens: *post_tokens,
                seconds: seconds(*duration),
            },
            Update::Retried { error, status, delay, .. } => {
                What::Retried { error: name(error), status: *status, delay_seconds: delay.map(seconds) }
            }
            Update::ApiFailed { error, .. } => What::RequestFailed { error: name(error) },
            Update::Decided(decision) => {
                let Decision { limit, scope, mode, step, observed, ceiling, level, share, .. } = decision;
                What::Limit {
                    limit: limit.as_str(),
                    scope: scope.as_str(),
                    mode: mode.as_str(),
                    action: *step,
                    observed: *observed,
                    ceiling: *ceiling,
                    level: *level,
                    share: *share,
                }
            }
            Update::LoopDetected { kind, streak, action } => {
                What::Loop { detector: kind.as_str(), streak: *streak, action: *action }
            }
            Update::Stalled { kind, on, why } => What::Stalled { stall: *kind, on: *on, why: why.map(|why| why.as_str()) },
            Update::Stopping { step } => What::Stopping { action: *step },
            Update::Enforced { step, latency, overshoot, .. } => {
                What::Stopped { action: *step, seconds: seconds(*latency), overshoot_usd: *overshoot }
            }
            Update::Ordered { order, limit, scope, ceiling, .. } => What::Ordered {
                order: *order,
                limit: limit.map(Limit::as_str),
                scope: scope.map(Scope::as_str),
                ceiling: *ceiling,
            },
            Update::TenantConflict { kind, owner, action } => {
                What::TenantConflict { shared: *kind, owner: name(owner), action: *action }
            }
            Update::OomKilled { role, memory_bytes } => What::OomKilled { role, memory_bytes: *memory_bytes },
            Update::ResultMissing { cause, .. } => What::ResultMissing { cause: *cause },
            Update::Exited { reason, exit, .. } => What::Exited {
                reason: *reason,
                exit_code: exit.and_then(crate::monitor::Exit::code),
                signal: exit.and_then(crate::monitor::Exit::signal),
            },
            Update::Heard { .. }
            | Update::ToolStarted { .. }
            | Update::ProcessStarted
            | Update::Spoke { .. }
            | Update::Identified { .. }
            | Update::ModelChosen { .. }
            | Update::Requested { .. }
            | Update::Answering { .. }
            | Update::FirstToken { .. }
            | Update::ContextUsed { .. }
            | Update::Spent(_)
            | Update::Corrected { .. }
            | Update::Unconfirmed { .. }
            | Update::CounterReset { .. }
            | Update::ToolProgressed { .. }
            | Update::PermissionAsked { .. }
            | Update::PermissionDenied { .. }
            | Update::HookStarted { .. }
            | Update::HookEnded { .. }
            | Update::HookAnswered { .. }
            | Update::Subagents { .. }
            | Update::BackgroundTasks { .. }
            | Update::Compacting
            | Update::RateLimit { .. }
            | Update::McpServer { .. }
            | Update::McpStarted { .. }
            | Update::McpCalled { .. }
            | Update::Was { .. }
            | Update::Resumed { .. }
            | Update::ContainerUsed { .. }
            | Update::Active { .. }
            | Update::Repeating { .. }
            | Update::LimitUsed { .. }
            | Update::IdleShutdown
            | Update::StepEnded { .. }
            | Update::Gone { .. }
            | Update::SessionEnded { .. }
            | Update::Asked { .. }
            | Update::Unknown { .. }
            | Update::Unread { .. }
            | Update::LongestLine { .. }
            | Update::Lost { .. } => return None,
        })
    }

    fn open(&mut self, call: &str, what: Open) {
        if self.open.len() < OPEN {
            self.open.insert(call.to_owned(), what);
        }
    }
}

fn name(name: &str) -> String {
    bounded(name, NAME).to_owned()
}

fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e3).round() / 1e3
}

fn usage(tokens: Tokens) -> crate::event::Usage {
    crate::event::Usage { tokens, ..crate::event::Usage::default() }
}

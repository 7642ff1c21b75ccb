//! The fold from facts to log events: what a person, or an alert, reads one by one. A fixed list of names; no content.
//!
//! The ledger file tells some of the same facts. Where both do, [`LEDGER`] says which events are which, and a field of the one is the
//! attribute of the other with `claude_agent.` before it; `session_id` is the conventions' `gen_ai.conversation.id`.

use std::collections::{BTreeMap, BTreeSet};

use crate::Now;
use crate::limit::Mode;
use crate::monitor::Exit;
use crate::span::put;
use crate::telemetry::{Attributes, Context, LogEvent, Severity, Value};
use crate::update::{Answered, Decision, ExitReason, MissingCause, Outcome, Step, ToolOutcome, Update};
use crate::who::Who;

/// Every event, and what the ledger calls it, where it tells it, too.
pub const LEDGER: &[(&str, &[&str])] = &[
    ("session.started", &["session_started"]),
    ("session.ended", &["session_ended"]),
    ("turn.started", &["turn_started"]),
    ("turn.ended", &["turn_ended"]),
    ("request.completed", &[]),
    ("tool.completed", &[]),
    ("permission.decided", &[]),
    ("limit.warned", &["limit_decided"]),
    ("limit.enforced", &["limit_decided", "limit_enforced"]),
    ("control.ordered", &["ordered"]),
    ("loop.detected", &[]),
    ("stall.detected", &[]),
    ("tenant.conflict", &["tenant_conflict"]),
    ("oom.killed", &["oom_killed"]),
    ("result.missing", &["result_missing"]),
    ("process.exited", &["process_exited"]),
    ("mcp.up", &[]),
    ("mcp.down", &[]),
    ("compaction", &["compacted"]),
    ("rate_limit", &[]),
    ("resume.failed", &[]),
    ("reconciliation.mismatch", &["corrected"]),
    ("price.unknown", &[]),
    ("event.unknown", &[]),
];

/// Names that are told once each: models without a price, types of events that nobody told us of, servers.
const NAMES: usize = 64;

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub struct Logs {
    /// What each event says, too.
    pub who: Who,
    session: String,
    sequence: u64,
    servers: BTreeMap<String, bool>,
    models: BTreeSet<String>,
    kinds: BTreeSet<String>,
    /// What is being enforced, to be told again when it has been.
    enforcing: Option<Decision>,
}

impl Logs {
    pub fn of(who: Who) -> Logs {
        Logs { who, ..Logs::default() }
    }

    /// Takes a fact, and the span that it is about.
    pub fn on(&mut self, update: &Update, now: Now, context: Option<Context>) -> Option<LogEvent> {
        if let Update::SessionStarted { session, .. } = update {
            self.session.clone_from(session);
        }
        let (name, severity, mut attributes) = self.event(update)?;
        if !self.session.is_empty() {
            attributes.insert(0, ("gen_ai.conversation.id", self.session.as_str().into()));
        }
        self.who.describe(&mut attributes);
        let sequence = self.sequence;
        self.sequence += 1;
        Some(LogEvent { time: now.unix, name, severity, sequence, context, attributes })
    }

    fn event(&mut self, update: &Update) -> Option<(&'static str, Severity, Attributes)> {
        use Severity::{Error, Info, Warn};
        let mut told: Attributes = Vec::new();
        let mut say = |key: &'static str, value: Value| put(&mut told, key, value);
        let (name, severity) = match update {
            Update::SessionStarted { start, from, .. } => {
                say("claude_agent.start", start.as_str().into());
                if let Some(from) = from {
                    say("claude_agent.from", from.as_str().into());
                }
                ("session.started", Info)
            }
            Update::SessionEnded { cost, .. } => {
                say("claude_agent.cost_usd", (*cost).into());
                ("session.ended", Info)
            }
            Update::TurnStarted { turn, .. } => {
                say("claude_agent.turn", (*turn).into());
                ("turn.started", Info)
            }
            Update::TurnEnded { turn, outcome, reason, duration, answers, num_turns, cost, confirmed, .. } => {
                say("claude_agent.turn", (*turn).into());
                say("claude_agent.outcome", outcome.as_str().into());
                if let Some(reason) = reason {
                    say("claude_agent.terminal_reason", reason.as_str().into());
                }
                say("claude_agent.cost_usd", (*cost).into());
                say("claude_agent.duration_seconds", (*duration).into());
                say("claude_agent.confirmed", (*confirmed).into());
                say("claude_agent.answers", (*answers).into());
                if let Some(num_turns) = num_turns {
                    say("claude_agent.num_turns", (*num_turns).into());
                }
                let severity = match outcome {
                    Outcome::Success | Outcome::Interrupted => Info,
                    Outcome::Crashed | Outcome::StuckKilled => Error,
                    Outcome::SuccessIsError
                    | Outcome::MaxTurns
                    | Outcome::DuringExecution
                    | Outcome::MaxBudget
                    | Outcome::StructuredOutput
                    | Outcome::NoResult
                    | Outcome::LimitStopped => Warn,
                };
                ("turn.ended", severity)
            }
            Update::Answered(answered) => {
                let Answered { answer, model, source, stop_reason, duration, tokens, settled, .. } = &**answered;
                say("gen_ai.response.id", answer.as_str().into());
                say("gen_ai.response.model", model.as_str().into());
                if let Some(reason) = stop_reason {
                    say("gen_ai.response.finish_reasons", Value::List(vec![reason.clone()]));
                }
                say("gen_ai.usage.input_tokens", tokens.prompt().into());
                if *settled {
                    say("gen_ai.usage.output_tokens", tokens.output.into());
                }
                say("claude_agent.source", source.as_str().into());
                if let Some(duration) = duration {
                    say("claude_agent.duration_seconds", (*duration).into());
                }
                ("request.completed", Info)
            }
            Update::ToolEnded { call, tool, outcome, duration, .. } => {
                say("gen_ai.tool.name", tool.as_str().into());
                say("gen_ai.tool.call.id", call.as_str().into());
                say("claude_agent.outcome", outcome.as_str().into());
                say("claude_agent.duration_seconds", (*duration).into());
                let severity = match outcome {
                    // Tools fail every day, and the model goes on.
                    ToolOutcome::Ok | ToolOutcome::Error | ToolOutcome::Denied | ToolOutcome::Interrupted => Info,
                    ToolOutcome::Lost => Warn,
                };
                ("tool.completed", severity)
            }
            Update::PermissionDecided { call, tool, decision, wait, .. } => {
                say("gen_ai.tool.name", tool.as_str().into());
                if let Some(call) = call {
                    say("gen_ai.tool.call.id", call.as_str().into());
                }
                say("claude_agent.decision", (*decision).into());
                say("claude_agent.wait_seconds", (*wait).into());
                ("permission.decided", Info)
            }
            Update::Decided(decision) => {
                decided(decision, &mut say);
                // A rule that is only tried out stops nothing.
                if decision.step == Step::Warn || decision.mode != Mode::Enforce {
                    ("limit.warned", Warn)
                } else {
                    say("claude_agent.phase", "decided".into());
                    self.enforcing = Some(decision.clone());
                    ("limit.enforced", Warn)
                }
            }
            Update::Enforced { step, latency, overshoot, .. } => {
                // A stop from outside enforces nothing.
                decided(&self.enforcing.take()?, &mut say);
                say("claude_agent.phase", "done".into());
                say("claude_agent.action", step.as_str().into());
                say("claude_agent.latency_seconds", (*latency).into());
                if let Some(usd) = overshoot {
                    say("claude_agent.overshoot_usd", (*usd).into());
                }
                ("limit.enforced", Warn)
            }
            Update::Ordered { order, limit, scope, ceiling, .. } => {
                say("claude_agent.order", order.as_str().into());
                if let Some(limit) = limit {
                    say("claude_agent.limit", limit.as_str().into());
                }
                if let Some(scope) = scope {
                    say("claude_agent.scope", scope.as_str().into());
                }
                if let Some(ceiling) = ceiling {
                    say("claude_agent.ceiling", (*ceiling).into());
                }
                ("control.ordered", Warn)
            }
            Update::LoopDetected { kind, streak, action } => {
                say("claude_agent.kind", kind.as_str().into());
                say("claude_agent.streak", (*streak).into());
                say("claude_agent.action", action.as_str().into());
                ("loop.detected", Warn)
            }
            Update::Stalled { kind, on: true, why } => {
                say("claude_agent.kind", kind.as_str().into());
                if let Some(why) = why {
                    say("claude_agent.why", why.as_str().into());
                }
                ("stall.detected", Warn)
            }
            Update::TenantConflict { kind, owner, action } => {
                say("claude_agent.kind", kind.as_str().into());
                say("claude_agent.owner", owner.as_str().into());
                say("claude_agent.action", action.as_str().into());
                ("tenant.conflict", Warn)
            }
            Update::OomKilled { role, memory_bytes } => {
                say("claude_agent.role", (*role).into());
                say("claude_agent.memory_bytes", (*memory_bytes).into());
                ("oom.killed", Error)
            }
            Update::ResultMissing { cause, .. } => {
                say("claude_agent.cause", cause.as_str().into());
                let severity = if matches!(cause, MissingCause::Crash | MissingCause::Oom) { Error } else { Warn };
                ("result.missing", severity)
            }
            Update::Exited { reason, exit, .. } => {
                say("claude_agent.reason", reason.as_str().into());
                match exit {
                    Some(Exit::Code(code)) => say("claude_agent.exit_code", Value::Int((*code).into())),
                    Some(Exit::Signal(signal)) => say("claude_agent.signal", Value::Int((*signal).into())),
                    None => {}
                }
                let severity = match reason {
                    ExitReason::Clean | ExitReason::Idle | ExitReason::Shutdown => Info,
                    ExitReason::Limit | ExitReason::Signal => Warn,
                    ExitReason::Error | ExitReason::Oom | ExitReason::InitFailed | ExitReason::Stuck => Error,
                };
                ("process.exited", severity)
            }
            Update::McpServer { server, up } => {
                if !self.servers.contains_key(server) && self.servers.len() >= NAMES {
                    return None;
                }
                // Each turn says it again.
                if self.servers.insert(server.clone(), *up) == Some(*up) {
                    return None;
                }
                say("claude_agent.server", server.as_str().into());
                if *up { ("mcp.up", Info) } else { ("mcp.down", Warn) }
            }
            Update::Compacted { trigger, pre_tokens, post_tokens, duration } => {
                say("claude_agent.trigger", trigger.as_str().into());
                say("claude_agent.pre_tokens", (*pre_tokens).into());
                say("claude_agent.post_tokens", (*post_tokens).into());
                say("claude_agent.duration_seconds", (*duration).into());
                ("compaction", Info)
            }
            Update::RateLimit { window, utilization, resets_at } => {
                say("claude_agent.window", window.as_str().into());
                if let Some(used) = utilization {
                    say("claude_agent.utilization", (*used).into());
                }
                if let Some(at) = resets_at {
                    say("claude_agent.resets_at", (*at).into());
                }
                ("rate_limit", Info)
            }
            Update::Resumed { outcome } if *outcome != "ok" => {
                say("claude_agent.outcome", (*outcome).into());
                ("resume.failed", Warn)
            }
            Update::Corrected { model, direction, usd, .. } => {
                say("claude_agent.model", model.as_str().into());
                say("claude_agent.direction", direction.as_str().into());
                say("claude_agent.cost_usd", (*usd).into());
                ("reconciliation.mismatch", Warn)
            }
            Update::Spent(spent) if spent.unpriced && once(&mut self.models, &spent.model) => {
                say("claude_agent.model", spent.model.as_str().into());
                ("price.unknown", Warn)
            }
            Update::Unknown { kind } if once(&mut self.kinds, word(kind)) => {
                say("claude_agent.kind", word(kind).into());
                ("event.unknown", Info)
            }
            Update::Spent(_)
            | Update::Unknown { .. }
            | Update::Resumed { .. }
            | Update::ContainerUsed { .. }
            | Update::Stalled { on: false, .. }
            | Update::ProcessStarted
            | Update::Spoke { .. }
            | Update::Identified { .. }
            | Update::ModelChosen { .. }
            | Update::Requested { .. }
            | Update::Answering { .. }
            | Update::FirstToken { .. }
            | Update::ContextUsed { .. }
            | Update::Unconfirmed { .. }
            | Update::CounterReset { .. }
            | Update::ToolStarted { .. }
            | Update::ToolProgressed { .. }
            | Update::PermissionAsked { .. }
            | Update::PermissionDenied { .. }
            | Update::HookStarted { .. }
            | Update::HookEnded { .. }
            | Update::HookAnswered { .. }
            | Update::SubagentStarted { .. }
            | Update::SubagentEnded { .. }
            | Update::Subagents { .. }
            | Update::BackgroundTasks { .. }
            | Update::Compacting
            | Update::Retried { .. }
            | Update::ApiFailed { .. }
            | Update::McpStarted { .. }
            | Update::McpCalled { .. }
            | Update::Was { .. }
            | Update::Active { .. }
            | Update::Repeating { .. }
            | Update::LimitUsed { .. }
            | Update::IdleShutdown
            | Update::Stopping { .. }
            | Update::StepEnded { .. }
            | Update::Gone { .. }
            | Update::Asked { .. }
            | Update::Heard { .. }
            | Update::Unread { .. }
            | Update::LongestLine { .. }
            | Update::Lost { .. } => return None,
        };
        Some((name, severity, told))
    }
}

fn decided(decision: &Decision, say: &mut impl FnMut(&'static str, Value)) {
    say("claude_agent.limit", decision.limit.as_str().into());
    say("claude_agent.scope", decision.scope.as_str().into());
    say("claude_agent.mode", decision.mode.as_str().into());
    say("claude_agent.action", decision.step.as_str().into());
    say("claude_agent.observed", decision.observed.into());
    say("claude_agent.ceiling", decision.ceiling.into());
    say("claude_agent.level", decision.level.into());
    if let Some(why) = decision.why {
        say("claude_agent.why", why.as_str().into());
    }
    if decision.share {
        say("claude_agent.share", true.into());
    }
}

/// A type's name; what does not look like one might be anything.
fn word(kind: &str) -> &str {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-./".contains(&b);
    if kind.bytes().all(plain) { kind } else { "other" }
}

fn once(names: &mut BTreeSet<String>, name: &str) -> bool {
    names.len() < NAMES && names.insert(name.to_owned())
}

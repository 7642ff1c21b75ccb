//! The fold from facts to numbers: what each [`Update`] moves in the catalogue.

use crate::limit::{Held, Limit, Mode, Outside, Rule};
use crate::metric::*;
use crate::price::PriceTable;
use crate::tokens::{TOKEN_KINDS, Tokens};
use crate::update::{Activity, Answered, ExitReason, Outcome, Spent, Stall, ToolClass, ToolOutcome, Update, Wish};

/// The place of this CLI among those of its container.
const SLOT: &str = "0";

/// Names are labels as they are for built-in tools, and by server for those of MCP.
pub fn tool_label(tool: &str) -> String {
    match mcp_server(tool) {
        Some(server) => format!("mcp:{server}"),
        None => tool.to_owned(),
    }
}

fn mcp_server(tool: &str) -> Option<&str> {
    let rest = tool.strip_prefix("mcp__")?;
    Some(rest.split_once("__").map_or(rest, |(server, _)| server))
}

/// What a tool does, by its name.
pub fn tool_class(tool: &str) -> ToolClass {
    match tool {
        "Read" | "Write" | "Edit" | "MultiEdit" | "NotebookEdit" | "NotebookRead" | "Glob" | "Grep" | "LS" => ToolClass::File,
        "Bash" | "BashOutput" | "KillShell" | "KillBash" | "Monitor" => ToolClass::Shell,
        "WebFetch" | "WebSearch" => ToolClass::Web,
        "Task" | "Agent" => ToolClass::Agent,
        _ if mcp_server(tool).is_some() => ToolClass::Mcp,
        _ => ToolClass::Other,
    }
}

/// Moves what one fact moves.
pub fn on(meters: &mut Meters, prices: &PriceTable, update: &Update, unix: std::time::Duration) {
    meters.set_time(unix);
    match update {
        Update::ProcessStarted => {
            meters.add(&PROCESS_STARTS, &[], 1);
            meters.set(&SESSIONS_ACTIVE, &[], 1.0);
            meters.set(&REPEAT_STREAK, &[SLOT], 0.0);
            meters.set(&PAUSED, &[SLOT], 0.0);
            for stall in Stall::ALL {
                meters.set(&STALLED, &[SLOT, stall.as_str()], 0.0);
            }
            state(meters, Activity::Starting);
        }
        Update::Spoke { after } => meters.observe(&STARTUP, &[], after.as_secs_f64()),
        Update::Identified { version, permission_mode, api_key_source } => {
            meters.clear(&AGENT_INFO);
            meters.set(&AGENT_INFO, &[version, permission_mode, api_key_source, gen_ai::PROVIDER], 1.0);
        }
        Update::SessionStarted { start, .. } => meters.add(&SESSIONS, &[start.as_str()], 1),
        Update::ModelChosen { .. } | Update::TurnStarted { .. } | Update::Requested { .. } | Update::Answering { .. } => {}
        Update::TurnEnded { outcome, reason, duration, answers, cost, .. } => {
            meters.add(&TURNS, &[outcome.as_str()], 1);
            if let Some(reason) = reason {
                meters.add(&TURN_TERMINATIONS, &[reason], 1);
            }
            meters.observe(&TURN_DURATION, &[outcome.class()], duration.as_secs_f64());
            #[expect(clippy::cast_precision_loss, reason = "a histogram speaks in floats")]
            meters.observe(&TURN_MODEL_REQUESTS, &[], *answers as f64);
            meters.observe(&TURN_COST, &[], cost.to_f64());
            meters.observe(&gen_ai::INVOKE_AGENT_DURATION, &[turn_error(*outcome)], duration.as_secs_f64());
            #[expect(clippy::cast_precision_loss, reason = "a histogram speaks in floats")]
            meters.observe(&gen_ai::INVOKE_AGENT_INFERENCE_CALLS, &[], *answers as f64);
        }
        Update::Answered(answered) => {
            let Answered { model, source, stop_reason, duration, .. } = &**answered;
            let reason = stop_reason.as_deref().unwrap_or("unknown");
            meters.add(&MODEL_REQUESTS, &[model, source.as_str(), reason], 1);
            if let Some(duration) = duration {
                meters.observe(&REQUEST_DURATION, &[model], duration.as_secs_f64());
                meters.observe(&gen_ai::OPERATION_DURATION, &[model], duration.as_secs_f64());
            }
        }
        Update::FirstToken { model, after } => {
            meters.observe(&TIME_TO_FIRST_TOKEN, &[model], after.as_secs_f64());
            meters.observe(&gen_ai::TIME_TO_FIRST_CHUNK, &[model], after.as_secs_f64());
        }
        Update::ContextUsed { ratio } => meters.set(&CONTEXT_USED, &[SLOT], *ratio),
        Update::Spent(spent) => self::spent(meters, prices, spent, unix),
        Update::Corrected { direction, usd, .. } => {
            meters.add_usd(&COST_RECONCILIATION_ERROR, &[direction.as_str()], *usd);
        }
        Update::Unconfirmed { usd, .. } => meters.add_usd(&COST_ESTIMATED, &[], *usd),
        Update::CounterReset { cause } => meters.add(&COUNTER_RESETS, &[cause.as_str()], 1),
        Update::ToolStarted { .. } | Update::ToolProgressed { .. } | Update::PermissionAsked { .. } => {}
        Update::ToolEnded { tool, outcome, duration, .. } => {
            meters.add(&TOOL_CALLS, &[&tool_label(tool), outcome.as_str()], 1);
            meters.observe(&TOOL_DURATION, &[tool_class(tool).as_str()], duration.as_secs_f64());
            let error = if *outcome == ToolOutcome::Ok { "" } else { outcome.as_str() };
            meters.observe(&gen_ai::EXECUTE_TOOL_DURATION, &[&tool_label(tool), error], duration.as_secs_f64());
        }
        Update::PermissionDecided { decision, wait, .. } => {
            meters.observe(&PERMISSION_WAIT, &[decision], wait.as_secs_f64());
        }
        Update::PermissionDenied { tool } => meters.add(&PERMISSION_DENIALS, &[&tool_label(tool)], 1),
        // The app's own answers would be counted twice where the CLI tells of its hooks.
        Update::HookStarted { .. }
        | Update::HookAnswered { .. }
        | Update::Compacting
        | Update::McpStarted { .. }
        | Update::Gone { .. } => {}
        Update::HookEnded { event, outcome, duration, .. } => {
            meters.add(&HOOK_EXECUTIONS, &[event, outcome], 1);
            meters.observe(&HOOK_DURATION, &[event], duration.as_secs_f64());
        }
        Update::SubagentStarted { kind, .. } => meters.add(&SUBAGENTS_STARTED, &[kind], 1),
        Update::SubagentEnded { outcome, duration, .. } => {
            meters.observe(&SUBAGENT_DURATION, &[outcome], duration.as_secs_f64());
        }
        #[expect(clippy::cast_precision_loss, reason = "a gauge speaks in floats")]
        Update::Subagents { active, depth } => {
            meters.set(&SUBAGENTS_ACTIVE, &[SLOT], *active as f64);
            meters.set(&SUBAGENT_DEPTH, &[SLOT], *depth as f64);
        }
        #[expect(clippy::cast_precision_loss, reason = "a gauge speaks in floats")]
        Update::BackgroundTasks { agents, shells, others } => {
            for (kind, n) in [("agent", agents), ("shell", shells), ("other", others)] {
                meters.set(&BACKGROUND_TASKS, &[SLOT, kind], *n as f64);
            }
        }
        Update::Compacted { trigger, .. } => meters.add(&COMPACTIONS, &[trigger], 1),
        Update::Retried { error, .. } => meters.add(&API_RETRIES, &[error], 1),
        Update::ApiFailed { error, .. } => meters.add(&API_ERRORS, &[error], 1),
        Update::RateLimit { window, utilization, resets_at } => {
            if let Some(used) = utilization {
                meters.set(&RATE_LIMIT_UTILIZATION, &[window], *used);
            }
            if let Some(at) = resets_at {
                meters.set(&RATE_LIMIT_RESET, &[window], *at);
            }
        }
        Update::McpServer { server, up } => meters.set(&MCP_SERVER_UP, &[server], f64::from(u8::from(*up))),
        Update::McpCalled { server, duration, .. } => {
            meters.observe(&MCP_TOOL_DURATION, &[server], duration.as_secs_f64());
        }
        Update::Was { state: was, lasted, now } => {
            meters.add_time(&TIME, &[was.as_str()], *lasted);
            if was != now {
                state(meters, *now);
            }
        }
        Update::Stalled { kind, on, .. } => meters.set(&STALLED, &[SLOT, kind.as_str()], f64::from(u8::from(*on))),
        Update::TenantConflict { kind, action, .. } => meters.add(&TENANT_CONFLICTS, &[kind.as_str(), action.as_str()], 1),
        Update::OomKilled { role, .. } => meters.add(&OOM_KILLS, &[role], 1),
        Update::ContainerUsed { time, cost, .. } => {
            meters.add_time(&CONTAINER_TIME, &[], *time);
            meters.add_usd(&CONTAINER_COST, &[], *cost);
        }
        Update::Resumed { outcome } => meters.add(&RESUMES, &[outcome], 1),
        Update::Active { unix } => meters.set(&LAST_ACTIVITY, &[SLOT], unix.as_secs_f64()),
        #[expect(clippy::cast_precision_loss, reason = "a gauge speaks in floats")]
        Update::Repeating { streak } => meters.set(&REPEAT_STREAK, &[SLOT], *streak as f64),
        Update::LoopDetected { kind, action, .. } => meters.add(&LOOP_DETECTIONS, &[kind.as_str(), action.as_str()], 1),
        Update::LimitUsed { limit, scope, ratio } => meters.set(&LIMIT_USED, &[limit.as_str(), scope.as_str()], *ratio),
        Update::Decided(decision) => meters.add(
            &ENFORCEMENTS,
            &[decision.limit.as_str(), decision.scope.as_str(), decision.step.as_str(), decision.mode.as_str()],
            1,
        ),
        Update::Ordered { order, .. } => {
            meters.add(&ORDERS, &[order.as_str()], 1);
            match order {
                Wish::Pause => meters.set(&PAUSED, &[SLOT], 1.0),
                Wish::Resume => meters.set(&PAUSED, &[SLOT], 0.0),
                Wish::Interrupt | Wish::Stop | Wish::Raise => {}
            }
        }
        Update::Enforced { scope, step, latency, overshoot } => {
            meters.observe(&ENFORCEMENT_LATENCY, &[step.as_str()], latency.as_secs_f64());
            if let Some(usd) = overshoot {
                meters.observe(&ENFORCEMENT_OVERSHOOT, &[scope.as_str()], usd.to_f64());
            }
        }
        Update::IdleShutdown => meters.add(&IDLE_SHUTDOWNS, &[], 1),
        Update::Stopping { .. } => {}
        Update::StepEnded { step, lasted } => meters.observe(&SHUTDOWN, &[step.as_str()], lasted.as_secs_f64()),
        Update::ResultMissing { cause, .. } => meters.add(&RESULTS_MISSING, &[cause.as_str()], 1),
        Update::Exited { reason, .. } => {
            meters.add(&PROCESS_EXITS, &[reason.as_str()], 1);
            meters.set(&SESSIONS_ACTIVE, &[], 0.0);
            state(meters, Activity::Draining);
            for stall in Stall::ALL {
                meters.set(&STALLED, &[SLOT, stall.as_str()], 0.0);
            }
        }
        Update::SessionEnded { cost, .. } => meters.observe(&SESSION_COST, &[], cost.to_f64()),
        Update::Asked { request, answered } => {
            let outcome = if *answered { "answered" } else { "unanswered" };
            meters.add(&OWN_REQUESTS, &[request.as_str(), outcome], 1);
        }
        Update::Heard { kind } => meters.add(&EVENTS, &[kind], 1),
        Update::Unknown { .. } => meters.add(&EVENTS, &["unknown"], 1),
        Update::Unread { reason, count } => meters.add(&PARSE_ERRORS, &[reason], *count),
        #[expect(clippy::cast_precision_loss, reason = "a gauge speaks in floats")]
        Update::LongestLine { bytes } => meters.set(&LINE_BYTES_MAX, &[], *bytes as f64),
        Update::Lost { bytes } => meters.add(&LOST_BYTES, &[], *bytes),
    }
}

/// How the budgets stand that agents share. All say the same of them, each as it was told last.
#[expect(clippy::cast_precision_loss, reason = "a gauge speaks in floats")]
pub fn budgets(meters: &mut Meters, rules: &[Rule], outside: &Outside) {
    for rule in rules.iter().filter(|rule| rule.mode != Mode::Off) {
        let Some(shared) = rule.scope.shared().and_then(|at| outside.shared[at]) else { continue };
        let (scope, ceiling) = (rule.scope.as_str(), outside.ceiling(rule));
        let (metrics, spent, reserved) = match rule.limit {
            Limit::Tokens => (
                [&BUDGET_LIMIT_TOKENS, &BUDGET_SPENT_TOKENS, &BUDGET_RESERVED_TOKENS],
                shared.spent.tokens as f64,
                shared.reserved.tokens as f64,
            ),
            _ => (
                [&BUDGET_LIMIT_USD, &BUDGET_SPENT_USD, &BUDGET_RESERVED_USD],
                shared.spent.usd.to_f64(),
                shared.reserved.usd.to_f64(),
            ),
        };
        for (metric, value) in metrics.into_iter().zip([ceiling, spent, reserved]) {
            meters.set(metric, &[scope], value);
        }
        meters.set(&BUDGET_REMAINING, &[rule.limit.as_str(), scope], (1.0 - spent / ceiling).max(0.0));
        if !shared.ends.is_zero() {
            meters.set(&BUDGET_WINDOW_END, &[scope], shared.ends.as_secs_f64());
        }
    }
}

/// Which of them this agent waits for, and whether others may still spend from it.
pub fn waiting(meters: &mut Meters, rules: &[Rule], holds: &[Held]) {
    for rule in rules.iter().filter(|rule| rule.mode == Mode::Enforce && rule.is_shared()) {
        for (cause, share) in [("budget", false), ("share", true)] {
            let waits = holds.iter().any(|held| held.scope == rule.scope && held.share.is_some() == share);
            meters.set(&BUDGET_WAITING, &[rule.scope.as_str(), cause], f64::from(u8::from(waits)));
        }
    }
}

/// What went wrong with a turn, as an `error.type`: nothing if it ended well, or as somebody wanted.
fn turn_error(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Success | Outcome::Interrupted => "",
        Outcome::SuccessIsError
        | Outcome::MaxTurns
        | Outcome::DuringExecution
        | Outcome::MaxBudget
        | Outcome::StructuredOutput
        | Outcome::NoResult
        | Outcome::StuckKilled
        | Outcome::LimitStopped
        | Outcome::Crashed => outcome.as_str(),
    }
}

fn state(meters: &mut Meters, now: Activity) {
    for activity in Activity::ALL {
        meters.set(&PROCESS_STATE, &[SLOT, activity.as_str()], f64::from(u8::from(*activity == now)));
    }
}

fn spent(meters: &mut Meters, prices: &PriceTable, spent: &Spent, unix: std::time::Duration) {
    let (model, source) = (spent.model.as_str(), spent.source.as_str());
    for (kind, n) in TOKEN_KINDS.iter().zip(spent.tokens.by_kind()) {
        meters.add(&TOKENS, &[model, kind, source], n);
        if spent.unpriced {
            meters.add(&UNPRICED_TOKENS, &[model, kind], n);
        }
    }
    gen_ai_tokens(meters, model, &spent.tokens);
    meters.add_usd(&COST, &[model, source], spent.cost);
    meters.add_usd(&COST_CLI_REPORTED, &[], spent.reported);
    if spent.web_searches > 0 {
        meters.add(&SERVER_TOOL_REQUESTS, &["web_search"], spent.web_searches);
    }
    let cost = |tokens: Tokens| {
        let usage = crate::event::Usage { tokens, ..Default::default() };
        prices.answer(model, unix, &usage).unwrap_or_default()
    };
    // Against sending the same tokens plain.
    let read = Tokens { cache_read: spent.tokens.cache_read, ..Tokens::default() };
    let plain = Tokens { input: read.cache_read, ..Tokens::default() };
    meters.add_usd(&CACHE_SAVED, &[model], cost(plain) - cost(read));
    let written =
        Tokens { cache_write_5m: spent.tokens.cache_write_5m, cache_write_1h: spent.tokens.cache_write_1h, ..Tokens::default() };
    let plain = Tokens { input: written.total(), ..Tokens::default() };
    meters.add_usd(&CACHE_PREMIUM, &[model], cost(written) - cost(plain));
}

/// Input is all that was sent, cached or not. What was confirmed for several answers at once is one observation: the sum is the
/// ledger's in any case.
fn gen_ai_tokens(meters: &mut Meters, model: &str, tokens: &Tokens) {
    let (input, output) = (tokens.prompt(), tokens.output);
    for (kind, n) in [("input", input), ("output", output)] {
        if n > 0 {
            #[expect(clippy::cast_precision_loss, reason = "a histogram speaks in floats")]
            meters.observe(&gen_ai::TOKEN_USAGE, &[model, kind], n as f64);
        }
    }
    for (metric, n) in [
        (&gen_ai::USAGE_INPUT, input),
        (&gen_ai::USAGE_OUTPUT, output),
        (&gen_ai::USAGE_CACHE_READ, tokens.cache_read),
        (&gen_ai::USAGE_CACHE_WRITE, tokens.cache_write_5m.saturating_add(tokens.cache_write_1h)),
    ] {
        meters.add(metric, &[model], n);
    }
}

/// What is true before anything happened.
pub fn at_start(meters: &mut Meters) {
    meters.set(&PRICE_TABLE_TIMESTAMP, &[], crate::price::as_of().as_secs_f64());
    meters.set(&PRICE_TABLE_INFO, &[crate::price::AS_OF, crate::price::SOURCE], 1.0);
    debug_assert_eq!(Outcome::ALL.len(), TURNS.zero.len());
    debug_assert_eq!(ExitReason::ALL.len(), PROCESS_EXITS.zero.len());
    debug_assert_eq!(2 * crate::detect::CEILINGS.len(), LOOP_DETECTIONS.zero.len());
}

//! Every instrument, and where its numbers are kept. A new metric is a line in the catalogue below and an arm in
//! [`crate::meter`]; no exporter changes.
//!
//! Cells hold whole numbers (counts, picodollars, nanoseconds) wherever the fact is one, so that an exposition agrees with the
//! ledger to the last digit; an exporter turns them into floats once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::exponential::Exponential;
use crate::telemetry::Context;
use crate::tokens::Usd;

/// An instrument: everything that an exporter, a reference page or a dashboard's check has to know.
#[derive(Debug)]
pub struct Metric {
    pub name: &'static str,
    pub help: &'static str,
    pub kind: Kind,
    pub unit: Unit,
    pub labels: &'static [&'static str],
    /// Label values that exist from the start, at zero: a counter that first appears at seven has no increase.
    pub zero: &'static [&'static [&'static str]],
    /// Upper bounds of a histogram's buckets.
    pub buckets: &'static [f64],
    /// What the numbers of several wrappers make together.
    pub merge: Merge,
    /// Its place in [`CATALOG`], after which come those of [`gen_ai::CATALOG`].
    index: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    /// A gauge that is always one; its labels are the message.
    Info,
    Histogram,
}

impl Metric {
    /// Whether its first number is no growth: a total that somebody else had kept before.
    pub fn begins_anywhere(&self) -> bool {
        self.kind == Kind::Counter && self.merge == Merge::Max
    }
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Info => "info",
            Kind::Histogram => "histogram",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    None,
    Usd,
    Seconds,
    Bytes,
    Ratio,
    Tokens,
}

impl Unit {
    pub fn as_str(self) -> &'static str {
        match self {
            Unit::None => "",
            Unit::Usd => "usd",
            Unit::Seconds => "seconds",
            Unit::Bytes => "bytes",
            Unit::Ratio => "ratio",
            Unit::Tokens => "tokens",
        }
    }
}

/// How a hub makes one series of those that several wrappers have under the same labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    Sum,
    Max,
    Min,
    /// All look at the same thing: who looked last has it right.
    Newest,
}

impl Merge {
    pub fn as_str(self) -> &'static str {
        match self {
            Merge::Sum => "sum",
            Merge::Max => "max",
            Merge::Min => "min",
            Merge::Newest => "newest",
        }
    }
}

type Labels = &'static [&'static str];
type Values = &'static [&'static [&'static str]];

const fn metric(kind: Kind, name: &'static str, unit: Unit, labels: Labels, help: &'static str) -> Metric {
    // Without labels there is one series, and it exists from the start; a gauge waits for its first value.
    let zero: Values = if labels.is_empty() && matches!(kind, Kind::Counter | Kind::Histogram) { &[&[]] } else { &[] };
    let merge = if matches!(kind, Kind::Info) { Merge::Max } else { Merge::Sum };
    Metric { name, help, kind, unit, labels, zero, buckets: &[], merge, index: 0 }
}

const fn counter(name: &'static str, unit: Unit, labels: Labels, help: &'static str) -> Metric {
    metric(Kind::Counter, name, unit, labels, help)
}

/// Of a gauge it has to be said what those of several wrappers make together.
const fn gauge(merge: Merge, name: &'static str, unit: Unit, labels: Labels, help: &'static str) -> Metric {
    merged(merge, metric(Kind::Gauge, name, unit, labels, help))
}

const fn info(name: &'static str, labels: Labels, help: &'static str) -> Metric {
    metric(Kind::Info, name, Unit::None, labels, help)
}

const fn histogram(name: &'static str, unit: Unit, labels: Labels, buckets: &'static [f64], help: &'static str) -> Metric {
    Metric { buckets, ..metric(Kind::Histogram, name, unit, labels, help) }
}

const fn merged(merge: Merge, metric: Metric) -> Metric {
    Metric { merge, ..metric }
}

const fn from_zero(metric: Metric, zero: Values) -> Metric {
    Metric { zero, ..metric }
}

/// A total of the whole container, which the kernel has kept since before we looked: all see the same, and none has a zero to begin at.
const fn kernels(metric: Metric) -> Metric {
    Metric { zero: &[], merge: Merge::Max, ..metric }
}

/// From one step to a working day.
const TURN_SECONDS: &[f64] = &[1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0, 14_400.0];
const REQUEST_SECONDS: &[f64] = &[0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0];
const TOOL_SECONDS: &[f64] = &[0.01, 0.05, 0.25, 1.0, 5.0, 30.0, 120.0, 600.0, 3_600.0];
const STOP_SECONDS: &[f64] = &[0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
const COST_USD: &[f64] = &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 50.0, 100.0];
const DEPTH: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Declares each metric as a `static` and lists them all, each with its place in the list; `after` are counted before the first.
macro_rules! catalog {
    (after $before:expr; $($id:ident = $metric:expr;)*) => {
        #[allow(non_camel_case_types, clippy::upper_case_acronyms, reason = "they only number the statics of the same name")]
        enum Place { $($id),* }
        $(pub static $id: Metric = Metric { index: $before + Place::$id as usize, ..$metric };)*
        /// Every metric there is.
        pub static CATALOG: &[&Metric] = &[$(&$id),*];
        #[allow(dead_code, reason = "the last list has none after it")]
        const CATALOG_LEN: usize = [$(Place::$id),*].len();
    };
}

pub mod gen_ai;

use Merge::{Max, Min, Newest, Sum};
use Unit::{Bytes, None as Plain, Ratio, Seconds, Tokens, Usd as Dollars};

#[rustfmt::skip]
catalog! { after 0;
    // Accounting: what did it cost, who, why; can it be trusted?
    TOKENS = counter("claude_agent_tokens_total", Tokens, &["model", "type", "source"], "Tokens by kind; input excludes what was cached.");
    COST = counter("claude_agent_cost_usd_total", Dollars, &["model", "source"], "Spend in US dollars, as the CLI confirmed it; unconfirmed answers by the price table.");
    COST_ESTIMATED = counter("claude_agent_cost_estimated_usd_total", Dollars, &[], "The part of the spend that nobody confirmed.");
    COST_CLI_REPORTED = counter("claude_agent_cost_cli_reported_usd_total", Dollars, &[], "Spend in the CLI's own figures, its resets taken out.");
    COST_RECONCILIATION_ERROR = from_zero(counter("claude_agent_cost_reconciliation_error_usd_total", Dollars, &["direction"], "What a later confirmation took back (over) or found missing (under) of what had been counted."), &[&["over"], &["under"]]);
    UNPRICED_TOKENS = counter("claude_agent_unpriced_tokens_total", Tokens, &["model", "type"], "Tokens of models that nobody prices.");
    PRICE_TABLE_TIMESTAMP = gauge(Max, "claude_agent_price_table_timestamp_seconds", Seconds, &[], "When the price table was last compared with its source.");
    PRICE_TABLE_INFO = info("claude_agent_price_table_info", &["version", "source"], "Which prices are used.");
    CONTAINER_COST = counter("claude_agent_container_cost_usd_total", Dollars, &[], "What the container costs by the hour, beside the spend and no part of it; what several agents use is divided among them.");
    CONTAINER_TIME = counter("claude_agent_container_seconds_total", Seconds, &[], "For how long: of each second that the container was there with several agents, each has its part.");
    CACHE_SAVED = counter("claude_agent_cache_saved_usd_total", Dollars, &["model"], "What reading from the cache cost less than sending the same tokens anew.");
    CACHE_PREMIUM = counter("claude_agent_cache_write_premium_usd_total", Dollars, &["model"], "What writing to the cache cost more than sending the same tokens plain.");
    MODEL_REQUESTS = counter("claude_agent_model_requests_total", Plain, &["model", "source", "stop_reason"], "Model answers that were seen.");
    SERVER_TOOL_REQUESTS = from_zero(counter("claude_agent_server_tool_requests_total", Plain, &["tool"], "Tool uses that the provider ran and billed."), &[&["web_search"]]);
    TURN_COST = histogram("claude_agent_turn_cost_usd", Dollars, &[], COST_USD, "Cost of a user turn.");
    SESSION_COST = histogram("claude_agent_session_cost_usd", Dollars, &[], COST_USD, "Cost of a session, when it ended.");
    COUNTER_RESETS = from_zero(counter("claude_agent_usage_resets_total", Plain, &["cause"], "How often the CLI's running totals started again."), &[&["clear"], &["restart"], &["decrease"]]);

    // Turns and tools: do agents work, and where does the time go?
    TURNS = from_zero(counter("claude_agent_turns_total", Plain, &["outcome"], "User turns by how they ended."), &[&["success"], &["success_is_error"], &["error_max_turns"], &["error_during_execution"], &["error_max_budget"], &["error_structured_output"], &["no_result"], &["stuck_killed"], &["limit_stopped"], &["crashed"], &["interrupted"]]);
    TURN_TERMINATIONS = counter("claude_agent_turn_terminations_total", Plain, &["reason"], "User turns by the reason that the CLI gave.");
    TURN_DURATION = histogram("claude_agent_turn_duration_seconds", Seconds, &["outcome_class"], TURN_SECONDS, "Duration of a user turn.");
    TURN_MODEL_REQUESTS = histogram("claude_agent_turn_model_requests", Plain, &[], DEPTH, "Model answers in a user turn.");
    REQUEST_DURATION = histogram("claude_agent_request_duration_seconds", Seconds, &["model"], REQUEST_SECONDS, "From asking the model to the end of its answer.");
    TIME_TO_FIRST_TOKEN = histogram("claude_agent_time_to_first_token_seconds", Seconds, &["model"], REQUEST_SECONDS, "From asking the model to its first token, as the CLI measured it.");
    TOOL_CALLS = counter("claude_agent_tool_calls_total", Plain, &["tool", "outcome"], "Tool calls by outcome.");
    TOOL_DURATION = histogram("claude_agent_tool_duration_seconds", Seconds, &["tool_class"], TOOL_SECONDS, "Duration of a tool call, the wait for its permission included.");
    PERMISSION_WAIT = histogram("claude_agent_permission_wait_seconds", Seconds, &["decision"], TOOL_SECONDS, "How long the agent waited for a permission.");
    PERMISSION_DENIALS = counter("claude_agent_permission_denials_total", Plain, &["tool"], "Tool calls that were not allowed.");
    HOOK_EXECUTIONS = counter("claude_agent_hook_executions_total", Plain, &["event", "outcome"], "Hooks of the CLI that ran.");
    HOOK_DURATION = histogram("claude_agent_hook_duration_seconds", Seconds, &["event"], TOOL_SECONDS, "Duration of a hook.");
    TIME = from_zero(counter("claude_agent_time_seconds_total", Seconds, &["state"], "Where the process's time went; sums to the wall clock."), &[&["starting"], &["model"], &["tool"], &["permission"], &["retry_backoff"], &["compacting"], &["waiting_input"], &["idle"], &["stuck"], &["draining"]]);
    SUBAGENTS_ACTIVE = gauge(Sum, "claude_agent_subagents_active", Plain, &["slot"], "Subagents at work.");
    SUBAGENT_DEPTH = gauge(Max, "claude_agent_subagent_depth", Plain, &["slot"], "How deep the deepest of them is nested.");
    SUBAGENTS_STARTED = counter("claude_agent_subagents_started_total", Plain, &["type"], "Subagents that were started.");
    SUBAGENT_DURATION = histogram("claude_agent_subagent_duration_seconds", Seconds, &["outcome"], TURN_SECONDS, "Duration of a subagent.");
    BACKGROUND_TASKS = gauge(Sum, "claude_agent_background_tasks", Plain, &["slot", "kind"], "Background tasks that keep the agent from being idle.");
    COMPACTIONS = from_zero(counter("claude_agent_compactions_total", Plain, &["trigger"], "Compactions of the context."), &[&["auto"], &["manual"]]);
    CONTEXT_USED = gauge(Max, "claude_agent_context_used_ratio", Ratio, &["slot"], "How full the model's window was at the last answer.");
    API_RETRIES = from_zero(counter("claude_agent_api_retries_total", Plain, &["error"], "Requests that the CLI had to repeat."), &[&["rate_limit"], &["overloaded"], &["server_error"], &["unknown"]]);
    API_ERRORS = from_zero(counter("claude_agent_api_errors_total", Plain, &["error"], "Requests that failed for good."), &[&["authentication_failed"], &["billing_error"], &["rate_limit"], &["overloaded"], &["invalid_request"], &["server_error"], &["unknown"]]);
    RATE_LIMIT_UTILIZATION = gauge(Newest, "claude_agent_rate_limit_utilization_ratio", Ratio, &["window"], "How much of a subscription's window is used.");
    RATE_LIMIT_RESET = gauge(Newest, "claude_agent_rate_limit_reset_timestamp_seconds", Seconds, &["window"], "When that window starts again.");
    MCP_SERVER_UP = gauge(Min, "claude_agent_mcp_server_up", Plain, &["server"], "Whether the CLI reports an MCP server as connected.");
    MCP_TOOL_DURATION = histogram("claude_agent_mcp_tool_duration_seconds", Seconds, &["server"], TOOL_SECONDS, "Duration of a call to an MCP server.");
    LOOP_DETECTIONS = from_zero(counter("claude_agent_loop_detections_total", Plain, &["kind", "action"], "Circles that the agent went round in, by what was done about them, or in shadow mode would have been."), &[&["identical_call", "warn"], &["identical_call", "interrupt"], &["alternating", "warn"], &["alternating", "interrupt"], &["error_repeat", "warn"], &["error_repeat", "interrupt"], &["compaction_thrash", "warn"], &["compaction_thrash", "interrupt"], &["fan_out", "warn"], &["fan_out", "interrupt"], &["no_progress", "warn"], &["no_progress", "interrupt"]]);
    REPEAT_STREAK = gauge(Max, "claude_agent_repeat_streak", Plain, &["slot"], "How often in a row the agent did the same, or failed alike.");

    // Limits: how close, and what was done about it?
    LIMIT_USED = gauge(Max, "claude_agent_limit_used_ratio", Ratio, &["limit", "scope"], "How much of a limit is used.");
    BUDGET_LIMIT_USD = gauge(Newest, "claude_agent_budget_limit_usd", Dollars, &["scope"], "How large a budget is that agents share, as it was raised; those of the container are the same for every tenant.");
    BUDGET_SPENT_USD = gauge(Newest, "claude_agent_budget_spent_usd", Dollars, &["scope"], "What all agents have spent from it, in its day or month.");
    BUDGET_RESERVED_USD = gauge(Newest, "claude_agent_budget_reserved_usd", Dollars, &["scope"], "What answers may cost that are waited for.");
    BUDGET_LIMIT_TOKENS = gauge(Newest, "claude_agent_budget_limit_tokens", Tokens, &["scope"], "How large a budget in tokens is that agents share, as it was raised.");
    BUDGET_SPENT_TOKENS = gauge(Newest, "claude_agent_budget_spent_tokens", Tokens, &["scope"], "What all agents have spent from it, in its day or month; cached ones included.");
    BUDGET_RESERVED_TOKENS = gauge(Newest, "claude_agent_budget_reserved_tokens", Tokens, &["scope"], "What answers may use that are waited for.");
    BUDGET_REMAINING = gauge(Newest, "claude_agent_budget_remaining_ratio", Ratio, &["limit", "scope"], "How much of a shared budget is not spent yet.");
    BUDGET_WAITING = gauge(Sum, "claude_agent_budget_waiting", Plain, &["scope", "cause"], "Agents that take no messages because a budget that they share is used up (cause budget), or what is fairly theirs of it (share).");
    BUDGET_WINDOW_END = gauge(Newest, "claude_agent_budget_window_end_timestamp_seconds", Seconds, &["scope"], "When its day or month ends and it starts afresh.");
    ORDERS = from_zero(counter("claude_agent_orders_total", Plain, &["order"], "What people have asked of running agents: of all at once, once for each of them."), &[&["pause"], &["resume"], &["interrupt"], &["stop"], &["raise"]]);
    PAUSED = gauge(Sum, "claude_agent_paused", Plain, &["slot"], "One while the agent takes no messages because somebody has paused it.");
    ENFORCEMENTS = counter("claude_agent_enforcements_total", Plain, &["limit", "scope", "action", "mode"], "What was done about a limit, or in shadow mode would have been.");
    ENFORCEMENT_LATENCY = histogram("claude_agent_enforcement_latency_seconds", Seconds, &["action"], STOP_SECONDS, "From the decision until the agent was quiet.");
    ENFORCEMENT_OVERSHOOT = histogram("claude_agent_enforcement_overshoot_usd", Dollars, &["scope"], COST_USD, "What was spent above a limit.");

    // Lifecycle, process, resources.
    SESSIONS = from_zero(counter("claude_agent_sessions_total", Plain, &["start"], "Sessions by how they started."), &[&["fresh"], &["resume"], &["continue"], &["fork"], &["clear"]]);
    SESSIONS_ACTIVE = gauge(Sum, "claude_agent_sessions_active", Plain, &[], "CLIs that run.");
    STARTUP = histogram("claude_agent_startup_seconds", Seconds, &[], STOP_SECONDS, "From the start of the CLI to its first word.");
    PROCESS_STATE = gauge(Sum, "claude_agent_process_state", Plain, &["slot", "state"], "What the agent is doing: one for the state it is in.");
    STALLED = gauge(Sum, "claude_agent_stalled", Plain, &["slot", "kind"], "One while the agent is past a time limit of this kind, or held up by what the kind names.");
    LAST_ACTIVITY = gauge(Max, "claude_agent_last_activity_timestamp_seconds", Seconds, &["slot"], "When the agent or its app last said anything.");
    IDLE_TIMEOUT = gauge(Max, "claude_agent_idle_timeout_seconds", Seconds, &[], "After this long without work the agent is ended; zero if never.");
    IDLE_SHUTDOWNS = counter("claude_agent_idle_shutdowns_total", Plain, &[], "Agents that were ended because they were idle.");
    RESULTS_MISSING = from_zero(counter("claude_agent_results_missing_total", Plain, &["cause"], "Turns that ended without a result."), &[&["crash"], &["signal"], &["oom"], &["truncated"], &["limit"], &["unknown"]]);
    PROCESS_STARTS = counter("claude_agent_process_starts_total", Plain, &[], "CLIs that were started.");
    PROCESS_EXITS = from_zero(counter("claude_agent_process_exits_total", Plain, &["reason"], "CLIs that ended, by reason."), &[&["clean"], &["error"], &["signal"], &["oom"], &["init_failed"], &["limit"], &["idle"], &["stuck"], &["shutdown"]]);
    SHUTDOWN = histogram("claude_agent_shutdown_seconds", Seconds, &["phase"], STOP_SECONDS, "How long each step of a stop took.");
    ORPHANS_TERMINATED = counter("claude_agent_orphans_terminated_total", Plain, &[], "Processes that outlived the CLI and were ended.");
    ZOMBIES_REAPED = counter("claude_agent_zombies_reaped_total", Plain, &[], "Dead processes that nobody else waited for.");
    CHILD_PROCESSES = gauge(Sum, "claude_agent_child_processes", Plain, &["role"], "Processes below the sidecar.");
    CPU = counter("claude_agent_cpu_seconds_total", Seconds, &["role"], "CPU time of the processes below the sidecar.");
    RESIDENT_MEMORY = gauge(Sum, "claude_agent_resident_memory_bytes", Bytes, &["role"], "Resident memory of the processes below the sidecar.");
    ORPHANS = gauge(Sum, "claude_agent_orphan_processes", Plain, &[], "Processes that outlived the tool call that started them, and still run.");
    OPEN_FDS = gauge(Sum, "claude_agent_open_fds", Plain, &["role"], "Descriptors that the processes below the sidecar have open.");
    CONTAINER_WORKING_SET = gauge(Newest, "claude_agent_container_memory_working_set_bytes", Bytes, &[], "Memory of the container that cannot be reclaimed.");
    MEMORY_EXHAUSTION = gauge(Min, "claude_agent_memory_exhaustion_timestamp_seconds", Seconds, &[], "When memory will reach its limit, if it grows on as in the last ten minutes; absent where it does not.");
    CONTAINER_LIMIT = gauge(Newest, "claude_agent_container_memory_limit_bytes", Bytes, &[], "Memory limit of the container.");
    CONTAINER_OOM_KILLS = kernels(counter("claude_agent_container_oom_kills_total", Plain, &[], "Processes of the container that the kernel killed for memory."));
    OOM_KILLS = from_zero(counter("claude_agent_oom_kills_total", Plain, &["role"], "Processes below the sidecar that the kernel killed for memory, by what they were."), &[&["cli"], &["mcp"], &["tool"]]);
    CONTAINER_CPU = kernels(counter("claude_agent_container_cpu_seconds_total", Seconds, &[], "CPU time of the container."));
    CONTAINER_THROTTLED = kernels(counter("claude_agent_container_cpu_throttled_seconds_total", Seconds, &[], "Time in which the container was kept from using the CPU, by its quota."));
    CONTAINER_PROCESSES = gauge(Newest, "claude_agent_container_processes", Plain, &[], "Processes and threads of the container, as its limit on them counts.");
    CONTAINER_PROCESSES_LIMIT = gauge(Newest, "claude_agent_container_processes_limit", Plain, &[], "How many the container may have.");
    CONTAINER_FORKS_REFUSED = kernels(counter("claude_agent_container_forks_refused_total", Plain, &[], "How often a process or a thread was not made because of that limit."));
    CONTAINER_PRESSURE = kernels(counter("claude_agent_container_pressure_seconds_total", Seconds, &["resource", "kind"], "Time in which tasks of the container waited for a resource."));
    DISK_USED = gauge(Max, "claude_agent_disk_used_bytes", Bytes, &["mount"], "Space used on the file system.");
    DISK_FREE = gauge(Min, "claude_agent_disk_free_bytes", Bytes, &["mount"], "Space left on the file system.");
    DISK_BYTES = gauge(Max, "claude_agent_disk_bytes", Bytes, &["slot", "dir"], "Space that the agent's working or config directory takes; at least so much where scans are cut.");
    DISK_FILES = gauge(Max, "claude_agent_disk_files", Plain, &["slot", "dir"], "Files in it.");
    DISK_SCANS_CUT = from_zero(counter("claude_agent_disk_scans_cut_total", Plain, &["dir"], "How often it was too large to be looked at in whole."), &[&["workspace"], &["config"]]);
    TRANSCRIPT_BYTES = gauge(Max, "claude_agent_transcript_bytes", Bytes, &["slot"], "Size of the session's transcript.");
    TENANT_CONFLICTS = from_zero(counter("claude_agent_tenant_conflicts_total", Plain, &["kind", "action"], "What agents of different tenants shared, or would have, and what was done about it."), &[&["config_dir", "flagged"], &["config_dir", "refused"], &["config_dir", "ended"], &["cwd", "flagged"], &["cwd", "refused"], &["cwd", "ended"], &["memory", "flagged"], &["memory", "refused"], &["memory", "ended"], &["session", "flagged"], &["session", "refused"], &["session", "ended"]]);
    RESUMES = from_zero(counter("claude_agent_resume_total", Plain, &["outcome"], "Resumed sessions by whether it worked."), &[&["ok"], &["not_found"], &["id_changed"]]);
    AGENT_INFO = info("claude_agent_info", &["cli_version", "permission_mode", "api_key_source", "provider"], "What runs.");

    // The sidecar itself.
    BUILD_INFO = info("agent_sidecar_build_info", &["version"], "Version of the sidecar.");
    CONFIG_INFO = info("agent_sidecar_config_info", &["hash"], "Fingerprint of the effective configuration.");
    EVENTS = counter("agent_sidecar_events_total", Plain, &["type"], "Lines that were understood; `unknown` are of types nobody told us of.");
    PARSE_ERRORS = from_zero(counter("agent_sidecar_parse_errors_total", Plain, &["reason"], "Lines that were not, or not wholly."), &[&["not_json"], &["not_object"], &["no_type"], &["truncated"], &["too_long"], &["field"]]);
    FORWARDED_BYTES = from_zero(counter("agent_sidecar_forwarded_bytes_total", Bytes, &["stream"], "Bytes that were relayed."), &[&["stdin"], &["stdout"]]);
    LINE_BYTES_MAX = gauge(Max, "agent_sidecar_line_bytes_max", Bytes, &[], "The longest line so far.");
    BACKPRESSURE = counter("agent_sidecar_backpressure_total", Plain, &[], "How often the CLI was held back because there was no room left for its output.");
    BACKLOG_BYTES = gauge(Sum, "agent_sidecar_backlog_bytes", Bytes, &[], "What the CLI wrote and the app has not read yet, in memory and spilled.");
    SPILLED_BYTES = counter("agent_sidecar_spilled_bytes_total", Bytes, &[], "Output that went through a file because the app did not read it.");
    LOST_BYTES = counter("agent_sidecar_lost_bytes_total", Bytes, &[], "Bytes that were relayed but could not be counted.");
    OWN_REQUESTS = from_zero(counter("agent_sidecar_own_requests_total", Plain, &["request", "outcome"], "Questions that the sidecar asked the CLI."), &[&["get_usage", "answered"], &["get_usage", "unanswered"], &["interrupt", "answered"], &["interrupt", "unanswered"], &["end_session", "answered"], &["end_session", "unanswered"], &["refuse", "answered"], &["refuse", "unanswered"], &["hold", "answered"], &["hold", "unanswered"]]);
    NATIVE_REPORTS = from_zero(counter("agent_sidecar_native_reports_total", Plain, &["signal", "outcome"], "Exports of the CLI's own telemetry that came in."), &[&["metrics", "taken"], &["metrics", "refused"], &["logs", "taken"], &["logs", "refused"]]);
    NATIVE_FORWARDS = from_zero(counter("agent_sidecar_native_forwards_total", Plain, &["outcome"], "What became of those that were to be forwarded."), &[&["sent"], &["failed"], &["dropped"]]);
    DEGRADED = from_zero(gauge(Max, "agent_sidecar_degraded", Plain, &["component"], "One while a part of the sidecar does not work; the relay goes on."), &[&["config"], &["http"], &["ledger"], &["events"], &["native"], &["otlp"], &["hub"], &["tenants"], &["shim"]]);
    LAST_SCRAPE = gauge(Max, "agent_sidecar_last_scrape_timestamp_seconds", Seconds, &[], "When the metrics were last read.");
    FINAL_FLUSH = from_zero(counter("agent_sidecar_final_flush_total", Plain, &["outcome"], "Whether the last numbers were read or taken after the agent's end."), &[&["scraped"], &["pushed"], &["timed_out"]]);
    EXPORT_ITEMS = from_zero(counter("agent_sidecar_export_items_total", Plain, &["signal", "outcome"], "Spans, data points and log records by what became of them: failed is the collector's doing, dropped ours."), &[&["traces", "sent"], &["traces", "failed"], &["traces", "dropped"], &["metrics", "sent"], &["metrics", "failed"], &["metrics", "dropped"], &["logs", "sent"], &["logs", "failed"], &["logs", "dropped"]]);
    EXPORT_LOST = counter("agent_sidecar_export_lost_items_total", Plain, &["signal", "cause"], "Those that failed or were dropped, by cause.");
    EXPORT_RETRIES = counter("agent_sidecar_export_retries_total", Plain, &["signal"], "Batches that have to be sent once more.");
    EXPORT_QUEUE_ITEMS = gauge(Sum, "agent_sidecar_export_queue_items", Plain, &["signal"], "What waits to be exported, in memory and on disk.");
    EXPORT_QUEUE_BYTES = gauge(Max, "agent_sidecar_export_queue_bytes", Bytes, &[], "How much of the queue is used.");
    EXPORT_QUEUE_CAPACITY = gauge(Max, "agent_sidecar_export_queue_capacity_bytes", Bytes, &[], "How much may wait before the oldest is dropped.");
    EXPORT_LAST_SUCCESS = gauge(Max, "agent_sidecar_export_last_success_timestamp_seconds", Seconds, &["signal"], "When the collector last took something.");
    HUB_WRAPPERS = gauge(Sum, "agent_sidecar_hub_wrappers", Plain, &["state"], "Wrappers that the hub speaks for: those that run, and those that have said nothing for too long.");
    HUB_RETIRED = counter("agent_sidecar_hub_retired_total", Plain, &[], "Wrappers that ended and whose totals the hub keeps.");
    HUB_REFUSED = from_zero(counter("agent_sidecar_hub_refused_total", Plain, &["reason"], "What wrappers told the hub and it could not take."), &[&["version"], &["shape"], &["room"], &["owner"]]);
    CONTROL_REQUESTS = from_zero(counter("agent_sidecar_control_requests_total", Plain, &["outcome"], "Requests that would change something, by whether they were let in."), &[&["allowed"], &["closed"], &["cross_site"], &["unauthorized"], &["limited"]]);
    UNWRAPPED = from_zero(gauge(Max, "agent_sidecar_unwrapped_processes", Plain, &[], "Claude CLIs in sight that run without a wrapper of their own: neither counted nor limited."), &[&[]]);
    TAMPERED = from_zero(counter("agent_sidecar_tampered_total", Plain, &["file"], "How often a file that only this sidecar, or others like it, should write to was changed, cut short or removed by somebody else."), &[&["ledger"], &["events"], &["journal"], &["budgets"]]);
    INFLUENCES = gauge(Max, "agent_sidecar_cli_influences", Plain, &["kind", "source"], "Variables of the CLI's environment, and entries of settings files that the agent can write, that have code run in the CLI or have it ask somebody else.");
    SERIES_LIMIT_HITS = counter("agent_sidecar_series_limit_hits_total", Plain, &["metric"], "Updates that found no room for another series.");
    EVENTS_FILE_ERRORS = counter("agent_sidecar_events_file_errors_total", Plain, &[], "Lines that could not be written to the file of events.");
    LEDGER_ERRORS = counter("agent_sidecar_ledger_errors_total", Plain, &[], "Lines that could not be written to the ledger file.");
    SIDECAR_CPU = counter("agent_sidecar_cpu_seconds_total", Seconds, &[], "CPU time of the sidecar itself.");
    SIDECAR_MEMORY = gauge(Sum, "agent_sidecar_resident_memory_bytes", Bytes, &[], "Resident memory of the sidecar itself.");
}

/// What there is always room for, whatever came before it: money, which nobody would miss until it is added up, and the counter of what was
/// refused. Few series: their labels are bounded.
fn has_room(metric: &Metric) -> bool {
    [&COST, &COST_ESTIMATED, &CONTAINER_COST, &TOKENS, &UNPRICED_TOKENS, &SERIES_LIMIT_HITS]
        .iter()
        .any(|one| std::ptr::eq(*one, metric))
}

/// How many values a label may take whose values are not ours to choose; what comes later is [`OTHER`].
const OPEN_LABELS: &[(&str, usize)] = &[
    ("model", 8),
    ("tool", 24),
    ("server", 16),
    // Kinds of subagents and of lines, by their own names.
    ("type", 40),
    ("event", 16),
    ("window", 8),
    ("stop_reason", 12),
    ("reason", 24),
    ("error", 16),
    ("cli_version", 8),
    ("permission_mode", 8),
    ("api_key_source", 8),
    ("mount", 4),
    ("hash", 8),
    ("version", 8),
];

/// What a label says when its value would be one too many.
pub const OTHER: &str = "other";

/// No label value is longer than this many bytes.
const MAX_LABEL: usize = 96;

/// A container stays under this many series, whatever the agent does.
pub const MAX_SERIES: usize = 1_500;

/// One number of one series.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    Count(u64),
    Usd(Usd),
    Time(Duration),
    Gauge(f64),
    Histogram(Histogram),
}

impl Cell {
    fn new(metric: &Metric, exponential: bool) -> Cell {
        match (metric.kind, metric.unit) {
            (Kind::Counter, Unit::Usd) => Cell::Usd(Usd::ZERO),
            (Kind::Counter, Unit::Seconds) => Cell::Time(Duration::ZERO),
            (Kind::Counter, _) => Cell::Count(0),
            (Kind::Gauge | Kind::Info, _) => Cell::Gauge(0.0),
            (Kind::Histogram, _) => {
                let exponential = exponential.then(Box::default);
                Cell::Histogram(Histogram { counts: vec![0; metric.buckets.len() + 1], exponential, ..Histogram::default() })
            }
        }
    }

    /// The number for an exposition; a histogram's is its count.
    pub fn to_f64(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "an exposition speaks in floats")]
        match self {
            Cell::Count(n) => *n as f64,
            Cell::Usd(usd) => usd.to_f64(),
            Cell::Time(time) => time.as_secs_f64(),
            Cell::Gauge(value) => *value,
            Cell::Histogram(h) => h.count as f64,
        }
    }
}

/// Observations by bucket, not cumulated; the last one is everything above the highest bound.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Histogram {
    pub counts: Vec<u64>,
    pub count: u64,
    pub sum: f64,
    /// The same observations in buckets of its own choice, if [`Detail::exponential`].
    pub exponential: Option<Box<Exponential>>,
}

/// What stands for a count: one thing that was counted, and where it happened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exemplar {
    /// What was observed, or by how much a counter rose.
    pub value: f64,
    pub unix: Duration,
    pub context: Context,
}

/// One series: its label values, in the order of the metric's labels, and its number.
#[derive(Clone, Debug)]
pub struct Series {
    pub values: Vec<String>,
    pub cell: Cell,
    /// The last of each bucket of a histogram, or of a counter. Empty until there is one.
    pub exemplars: Vec<Option<Exemplar>>,
    /// When it last changed: see [`Meters::changed`].
    epoch: u64,
}

impl Series {
    fn exemplify(&mut self, bucket: usize, buckets: usize, exemplar: Option<Exemplar>) {
        if exemplar.is_some() {
            self.exemplars.resize(buckets, None);
            self.exemplars[bucket] = exemplar;
        }
    }
}

/// The series of one metric, in the order of their label values.
#[derive(Clone, Debug)]
pub struct Family {
    pub metric: &'static Metric,
    /// A counter whose totals somebody else keeps: see [`Meters::raise`].
    pub raised: bool,
    series: BTreeMap<String, Series>,
    cleared: Option<u64>,
}

impl Family {
    fn new(metric: &'static Metric) -> Family {
        Family { metric, raised: false, series: BTreeMap::new(), cleared: None }
    }

    pub fn series(&self) -> impl Iterator<Item = &Series> {
        self.series.values()
    }

    /// The same, each with what names it within its family.
    pub fn keyed(&self) -> impl Iterator<Item = (&str, &Series)> {
        self.series.iter().map(|(key, series)| (key.as_str(), series))
    }
}

/// What is kept beside the plain numbers, for exporters that can say it. Costs memory, so nothing is unless asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Detail {
    /// Histograms also keep exponential buckets.
    pub exponential: bool,
    /// Histograms, tokens and costs keep exemplars, while there is a sampled context.
    pub exemplars: bool,
    /// The instruments of the GenAI conventions are kept too.
    pub gen_ai: bool,
}

/// Where the numbers are kept: a family for each metric of the catalogue, and the bounds.
#[derive(Clone, Debug)]
pub struct Meters {
    /// Those of [`CATALOG`], then those of [`gen_ai::CATALOG`], if they are kept.
    families: Vec<Family>,
    admitted: BTreeMap<&'static str, BTreeSet<String>>,
    count: usize,
    /// How many of the series are of the GenAI conventions; they have room of their own, so as not to take it from ours.
    gen_ai_count: usize,
    max_series: usize,
    detail: Detail,
    context: Option<Context>,
    unix: Duration,
    epoch: u64,
    key: String,
}

impl Default for Meters {
    fn default() -> Meters {
        Meters::new(MAX_SERIES)
    }
}

impl Meters {
    /// All families, those that start at zero filled.
    pub fn new(max_series: usize) -> Meters {
        let families = CATALOG.iter().copied().map(Family::new).collect();
        let mut meters = Meters {
            families,
            admitted: BTreeMap::new(),
            count: 0,
            gen_ai_count: 0,
            max_series,
            detail: Detail::default(),
            context: None,
            unix: Duration::ZERO,
            epoch: 0,
            key: String::new(),
        };
        for &metric in CATALOG {
            for values in metric.zero {
                meters.with(metric, values, |_| false);
            }
        }
        meters
    }

    /// Says what else to keep from now on: to be called before anything happened.
    pub fn keep(&mut self, detail: Detail) {
        self.detail = detail;
        self.families.truncate(CATALOG.len());
        self.gen_ai_count = 0;
        if detail.gen_ai {
            self.families.extend(gen_ai::CATALOG.iter().copied().map(Family::new));
        }
        for series in self.families.iter_mut().flat_map(|family| family.series.values_mut()) {
            match &mut series.cell {
                // One that counts already would not know what it has missed.
                Cell::Histogram(h) if h.count == 0 => h.exponential = detail.exponential.then(Box::default),
                _ => {}
            }
        }
    }

    /// Where what is counted from now on happens: what exemplars point to.
    pub fn set_context(&mut self, context: Option<Context>) {
        self.context = context;
    }

    /// When what is counted from now on happens.
    pub fn set_time(&mut self, unix: Duration) {
        self.unix = unix;
    }

    /// The families of [`CATALOG`].
    pub fn families(&self) -> impl Iterator<Item = &Family> {
        self.families.iter().take(CATALOG.len())
    }

    /// The families of [`gen_ai::CATALOG`], if they are kept.
    pub fn gen_ai(&self) -> impl Iterator<Item = &Family> {
        self.families.iter().skip(CATALOG.len())
    }

    /// The family of a metric.
    pub fn family(&self, metric: &'static Metric) -> Option<&Family> {
        self.families.get(metric.index)
    }

    /// How many series of [`CATALOG`] there are; a histogram's buckets, sum and count are one each.
    pub fn series_count(&self) -> usize {
        self.count
    }

    pub fn add(&mut self, metric: &'static Metric, values: &[&str], n: u64) {
        #[expect(clippy::cast_precision_loss, reason = "an exemplar speaks in floats")]
        let exemplar = self.exemplar(n as f64).filter(|_| metric.unit == Unit::Tokens && n > 0);
        self.with(metric, values, |series| match &mut series.cell {
            Cell::Count(count) => {
                *count = count.saturating_add(n);
                series.exemplify(0, 1, exemplar);
                n > 0
            }
            other => wrong(metric, other),
        });
    }

    pub fn add_usd(&mut self, metric: &'static Metric, values: &[&str], usd: Usd) {
        let exemplar = self.exemplar(usd.to_f64()).filter(|_| !usd.is_zero());
        self.with(metric, values, |series| match &mut series.cell {
            Cell::Usd(sum) => {
                *sum += usd;
                series.exemplify(0, 1, exemplar);
                !usd.is_zero()
            }
            other => wrong(metric, other),
        });
    }

    pub fn add_time(&mut self, metric: &'static Metric, values: &[&str], time: Duration) {
        self.with(metric, values, |series| match &mut series.cell {
            Cell::Time(sum) => {
                *sum = sum.saturating_add(time);
                !time.is_zero()
            }
            other => wrong(metric, other),
        });
    }

    /// Sets a counter to a total that somebody else keeps (the kernel's counters); it never falls.
    pub fn raise(&mut self, metric: &'static Metric, values: &[&str], total: f64) {
        if let Some(family) = self.families.get_mut(metric.index) {
            family.raised = true;
        }
        self.with(metric, values, |series| match &mut series.cell {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates at what no counter reaches")]
            Cell::Count(n) => raised(n, total as u64),
            Cell::Time(time) => raised(time, Duration::try_from_secs_f64(total).unwrap_or_default()),
            other => wrong(metric, other),
        });
    }

    pub fn set(&mut self, metric: &'static Metric, values: &[&str], value: f64) {
        self.with(metric, values, |series| match &mut series.cell {
            #[expect(clippy::float_cmp, reason = "what is set again is no news")]
            Cell::Gauge(gauge) => std::mem::replace(gauge, value) != value,
            other => wrong(metric, other),
        });
    }

    pub fn observe(&mut self, metric: &'static Metric, values: &[&str], value: f64) {
        // One that is not a number would be in the sum for ever.
        if !value.is_finite() {
            return;
        }
        let exemplar = self.exemplar(value);
        self.with(metric, values, |series| match &mut series.cell {
            Cell::Histogram(h) => {
                let bucket = metric.buckets.iter().position(|bound| value <= *bound).unwrap_or(metric.buckets.len());
                h.counts[bucket] = h.counts[bucket].saturating_add(1);
                h.count = h.count.saturating_add(1);
                h.sum += value;
                if let Some(exponential) = &mut h.exponential {
                    exponential.observe(value);
                }
                series.exemplify(bucket, metric.buckets.len() + 1, exemplar);
                true
            }
            other => wrong(metric, other),
        });
    }

    /// Takes a series away: an info that no longer holds.
    pub fn clear(&mut self, metric: &'static Metric) {
        let family = &mut self.families[metric.index];
        self.count -= family.series.len() * weight(metric);
        family.series.clear();
        family.cleared = Some(self.epoch);
    }

    /// The series of [`CATALOG`] that changed since [`Meters::mark`] gave this mark; at zero, all.
    pub fn changed(&self, since: u64) -> impl Iterator<Item = (&'static Metric, &Series)> {
        let series = |family: &'_ Family| family.metric;
        self.families().flat_map(move |family| {
            family.series.values().filter(move |one| one.epoch >= since).map(move |one| (series(family), one))
        })
    }

    /// The metrics whose series were taken away since then, and came back if they changed since.
    pub fn cleared(&self, since: u64) -> impl Iterator<Item = &'static Metric> {
        self.families().filter(move |family| family.cleared.is_some_and(|at| at >= since)).map(|family| family.metric)
    }

    /// From here on, changes are new ones.
    pub fn mark(&mut self) -> u64 {
        self.epoch += 1;
        self.epoch
    }

    /// Lets another store's number into the series of the same labels.
    pub fn merge(&mut self, metric: &'static Metric, values: &[&str], from: &Cell, how: Merge) {
        let fresh = self.get(metric, values).is_none();
        self.with(metric, values, |series| {
            match (&mut series.cell, from) {
                (Cell::Count(n), Cell::Count(other)) => merge(n, *other, how, u64::saturating_add),
                (Cell::Usd(n), Cell::Usd(other)) => merge(n, *other, how, |a, b| a + b),
                (Cell::Time(n), Cell::Time(other)) => merge(n, *other, how, Duration::saturating_add),
                // A gauge that was not there has no zero to be held against.
                (Cell::Gauge(n), Cell::Gauge(other)) if fresh => *n = *other,
                (Cell::Gauge(n), Cell::Gauge(other)) => merge(n, *other, how, |a, b| a + b),
                (Cell::Histogram(h), Cell::Histogram(other)) if h.counts.len() == other.counts.len() => {
                    for (n, other) in h.counts.iter_mut().zip(&other.counts) {
                        *n = n.saturating_add(*other);
                    }
                    h.count = h.count.saturating_add(other.count);
                    h.sum += other.sum;
                }
                (_, other) => return wrong(metric, other),
            }
            true
        });
    }

    /// Makes room for a series, at zero. The label values under which it is counted from then on, or nothing where there is no room.
    pub fn admit_series(&mut self, metric: &'static Metric, values: &[&str]) -> Option<Vec<String>> {
        let mut admitted = None;
        self.with(metric, values, |series| {
            admitted = Some(series.values.clone());
            false
        });
        admitted
    }

    /// The label values under which this would be counted.
    pub fn admit_values(&mut self, metric: &'static Metric, values: &[&str]) -> Vec<String> {
        metric.labels.iter().zip(values).map(|(label, value)| self.admit(label, value)).collect()
    }

    fn exemplar(&self, value: f64) -> Option<Exemplar> {
        let context = self.context.filter(|context| self.detail.exemplars && context.sampled)?;
        Some(Exemplar { value, unix: self.unix, context })
    }

    /// What a series says now, if it exists.
    pub fn get(&self, metric: &'static Metric, values: &[&str]) -> Option<&Cell> {
        self.family(metric)?.series.get(&values.join("\x1f")).map(|series| &series.cell)
    }

    fn with(&mut self, metric: &'static Metric, values: &[&str], change: impl FnOnce(&mut Series) -> bool) {
        debug_assert_eq!(metric.labels.len(), values.len(), "{}", metric.name);
        if metric.index >= self.families.len() {
            return;
        }
        self.key.clear();
        for (i, value) in values.iter().enumerate() {
            if i > 0 {
                self.key.push('\x1f');
            }
            self.key.push_str(value);
        }
        let epoch = self.epoch;
        let change = |series: &mut Series| {
            if change(series) {
                series.epoch = epoch;
            }
        };
        if let Some(series) = self.families[metric.index].series.get_mut(self.key.as_str()) {
            return change(series);
        }
        let values: Vec<String> = metric.labels.iter().zip(values).map(|(label, value)| self.admit(label, value)).collect();
        let key = values.join("\x1f");
        let ours = metric.index < CATALOG.len();
        let count = if ours { &mut self.count } else { &mut self.gen_ai_count };
        let full = *count + weight(metric) > self.max_series;
        let family = &mut self.families[metric.index];
        if let Some(series) = family.series.get_mut(&key) {
            return change(series);
        }
        if full && !has_room(metric) {
            return self.add(&SERIES_LIMIT_HITS, &[metric.name], 1);
        }
        *count += weight(metric);
        let mut series = Series { values, cell: Cell::new(metric, self.detail.exponential), exemplars: Vec::new(), epoch };
        change(&mut series);
        family.series.insert(key, series);
    }

    /// The value itself while there is room for it under its label, else [`OTHER`].
    fn admit(&mut self, label: &'static str, value: &str) -> String {
        let value = bounded(value, MAX_LABEL);
        let Some(&(_, room)) = OPEN_LABELS.iter().find(|(open, _)| *open == label) else {
            return value.to_owned();
        };
        let admitted = self.admitted.entry(label).or_default();
        // A wrapper's own rest takes nobody's room.
        if value == OTHER || admitted.contains(value) {
            return value.to_owned();
        }
        if admitted.len() >= room {
            return OTHER.to_owned();
        }
        admitted.insert(value.to_owned());
        value.to_owned()
    }
}

/// A number of another kind than the metric's: a slip of the fold, not of the agent.
fn wrong(metric: &Metric, cell: &Cell) -> bool {
    debug_assert!(false, "{} is not of the kind of {cell:?}", metric.name);
    false
}

fn raised<T: PartialOrd>(n: &mut T, total: T) -> bool {
    let risen = *n < total;
    if risen {
        *n = total;
    }
    risen
}

fn merge<T: PartialOrd + Copy>(n: &mut T, other: T, how: Merge, sum: impl Fn(T, T) -> T) {
    match how {
        Merge::Sum => *n = sum(*n, other),
        Merge::Max if *n < other => *n = other,
        Merge::Min if other < *n => *n = other,
        Merge::Max | Merge::Min => {}
        Merge::Newest => *n = other,
    }
}

/// The metric of this name.
pub fn named(name: &str) -> Option<&'static Metric> {
    static BY_NAME: std::sync::LazyLock<BTreeMap<&'static str, &'static Metric>> =
        std::sync::LazyLock::new(|| CATALOG.iter().map(|metric| (metric.name, *metric)).collect());
    BY_NAME.get(name).copied()
}

/// How many series an exposition makes of one of these.
fn weight(metric: &Metric) -> usize {
    match metric.kind {
        Kind::Counter | Kind::Gauge | Kind::Info => 1,
        Kind::Histogram => metric.buckets.len() + 3,
    }
}

/// At most `max` bytes of a text, cut between characters.
pub fn bounded(text: &str, max: usize) -> &str {
    if text.len() <= max {
        return text;
    }
    let end = (0..=max).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    &text[..end]
}

#[cfg(test)]
mod tests;

//! What may be set, where it was set, and every mistake in it at once.
//!
//! Defaults < the file < `AGENT_SIDECAR_*` < flags. [`SETTINGS`] is the one list: the file's keys, the environment's names, the flags,
//! `check --print` and the reference page are made from it. A setting has one text form wherever it comes from.

mod file;
mod value;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_sidecar_core::budget::Caps;
use agent_sidecar_core::budget::share::{How, Sharing};
use agent_sidecar_core::content::Gates;
use agent_sidecar_core::ladder::Patience;
use agent_sidecar_core::limit::{Ceiling, Limit, Mode, Rule, SHARED, Scope};
use agent_sidecar_core::price::PriceTable;
use agent_sidecar_core::span::Semconv;
use agent_sidecar_core::tokens::Usd;
use agent_sidecar_core::who::{self, Name, Who};
use agent_sidecar_core::written::near;

use crate::busy::{self, Lease};
use crate::conversation::{self, Root};
use crate::export::otlp::environment::{Headers, Own};
use crate::files;
use crate::fleet::{self, Voice};
use crate::hub::gate::{Keys, Token};
use crate::hub::users::{self, Member};
use crate::hub::{Meeting, Zone};
use crate::influence;
use crate::serve;
use crate::supervise::{NoUser, User};
use crate::tenants::{AgentDirs, Places, Workspace};

pub(crate) use value::{Kind, Value};

/// Read if it is there, when no `--config` names another.
pub(crate) const DEFAULT_FILE: &str = "/etc/agent-sidecar/config.toml";

/// Where a lease was unset: it cannot be none.
const BUSY_LEASE: Duration = Duration::from_secs(60);

/// Where these were unset.
const REPORT_EVERY: Duration = Duration::from_secs(10);
const LEASE_GRACE: Duration = Duration::from_secs(60);

/// One thing that can be set.
#[derive(Debug)]
pub(crate) struct Setting {
    /// Its place in the file: `table.key`.
    pub(crate) key: &'static str,
    /// `--flag`, and `AGENT_SIDECAR_FLAG`.
    pub(crate) flag: &'static str,
    pub(crate) kind: Kind,
    /// As it would be written; empty for unset.
    pub(crate) default: &'static str,
    pub(crate) help: &'static str,
}

const fn setting(key: &'static str, flag: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Setting {
    Setting { key, flag, kind, default, help }
}

/// Every setting there is. Limits are unset by default: a ceiling that nobody chose would stop somebody's work. Those on loops are set,
/// and only say what they would do.
#[rustfmt::skip]
pub(crate) static SETTINGS: &[Setting] = &[
    setting("limits.max_turns", "max-turns", Kind::Count, "", "model round trips of one user turn; also handed to the CLI as its own --max-turns"),
    setting("limits.session_max_turns", "session-max-turns", Kind::Count, "", "model round trips of the session"),
    setting("limits.max_cost_usd", "max-cost-usd", Kind::Money, "", "spend of the session, in dollars"),
    setting("limits.turn_max_cost_usd", "turn-max-cost-usd", Kind::Money, "", "spend of one user turn, in dollars"),
    setting("limits.max_tokens", "max-tokens", Kind::Count, "", "tokens of the session, cached ones included"),
    setting("limits.turn_max_tokens", "turn-max-tokens", Kind::Count, "", "tokens of one user turn, cached ones included"),
    setting("limits.max_duration", "max-duration", Kind::Time, "", "wall clock of the session"),
    setting("limits.turn_max_duration", "turn-max-duration", Kind::Time, "", "wall clock of one user turn"),
    setting("limits.tool_max_duration", "tool-max-duration", Kind::Time, "", "wall clock of one tool call, its permission aside"),
    setting("limits.subagent_max_duration", "subagent-max-duration", Kind::Time, "", "wall clock of one subagent"),
    setting("limits.idle_timeout", "idle-timeout", Kind::Time, "", "time without any work, judged by the agent's state and never by silence"),
    setting("limits.startup_timeout", "startup-timeout", Kind::Time, "", "time to the first word, from the first message"),
    setting("limits.stall_timeout", "stall-timeout", Kind::Time, "", "time without a sign of life while the model is asked; the CLI itself may be silent for six minutes"),
    setting("limits.result_timeout", "result-timeout", Kind::Time, "", "time to the result after the last answer, and to the exit after the last result"),
    setting("limits.max_memory", "max-memory", Kind::Size, "", "memory of the container; above it the agent is ended at the next turn boundary"),
    setting("limits.memory_horizon", "memory-horizon", Kind::Time, "", "end the agent at a turn boundary when its memory, growing as it does, reaches `max_memory` or the container's limit within this time"),
    setting("limits.max_identical_calls", "max-identical-calls", Kind::Count, "10", "the same call with the same result in a row; warned at half, like each of the next five (docs/detectors.md)"),
    setting("limits.max_alternations", "max-alternations", Kind::Count, "6", "the same two to four calls in turn, with the same results: how often"),
    setting("limits.max_same_errors", "max-same-errors", Kind::Count, "8", "different calls that fail with the same error, with no success in between"),
    setting("limits.max_compactions", "max-compactions", Kind::Count, "5", "compactions of the context in a row, each within eight answers of the one before"),
    setting("limits.max_subagents", "max-subagents", Kind::Count, "100", "subagents that one user turn starts"),
    setting("limits.max_stale_answers", "max-stale-answers", Kind::Count, "40", "answers in a row that bring no progress: no call that succeeded and was new, or had a new result; waits aside"),
    setting("limits.loop_mode", "loop-mode", Kind::Mode, "shadow", "what these six do, where `limits.mode` allows as much: off, shadow or enforce (interrupt the turn); `limits.modes.<limit>` sets one"),
    setting("limits.container_max_cost_usd", "container-max-cost-usd", Kind::Money, "", "spend of all agents of the container, in dollars, for as long as its state is kept"),
    setting("limits.container_day_max_cost_usd", "container-day-max-cost-usd", Kind::Money, "", "the same, of each day"),
    setting("limits.container_month_max_cost_usd", "container-month-max-cost-usd", Kind::Money, "", "the same, of each month"),
    setting("limits.tenant_max_cost_usd", "tenant-max-cost-usd", Kind::Money, "", "spend of all agents of the container that work for this tenant, in dollars"),
    setting("limits.tenant_day_max_cost_usd", "tenant-day-max-cost-usd", Kind::Money, "", "the same, of each day"),
    setting("limits.tenant_month_max_cost_usd", "tenant-month-max-cost-usd", Kind::Money, "", "the same, of each month"),
    setting("limits.container_max_tokens", "container-max-tokens", Kind::Count, "", "tokens of all agents of the container, cached ones included, for as long as its state is kept"),
    setting("limits.container_day_max_tokens", "container-day-max-tokens", Kind::Count, "", "the same, of each day"),
    setting("limits.container_month_max_tokens", "container-month-max-tokens", Kind::Count, "", "the same, of each month"),
    setting("limits.tenant_max_tokens", "tenant-max-tokens", Kind::Count, "", "tokens of all agents of the container that work for this tenant, cached ones included"),
    setting("limits.tenant_day_max_tokens", "tenant-day-max-tokens", Kind::Count, "", "the same, of each day"),
    setting("limits.tenant_month_max_tokens", "tenant-month-max-tokens", Kind::Count, "", "the same, of each month"),
    setting("limits.max_sessions", "max-sessions", Kind::Count, "", "agents of the container that may run at once; one more waits to be started"),
    setting("limits.tenant_weight", "tenant-weight", Kind::Count, "1", "what this tenant weighs when agents wait, and where budgets are shared: one that weighs two is given twice as many of the seats, and twice as much money"),
    setting("limits.queue_timeout", "queue-timeout", Kind::Pause, "30s", "how long it waits; then it is not started, and the exit code is 125"),
    setting("limits.budget_share", "budget-share", Kind::Choice(&["fair", "tenants", "first-come"]), "tenants", "how a shared budget is divided while several work: tenants (by weight; the agents of one as they come), fair (the agents of each alike, too), first-come (docs/hub.md)"),
    setting("limits.budget_hooks", "budget-hooks", Kind::Switch, "true", "where agents share a budget, start the CLI with hooks (--settings) that ask for what is left before it asks the model; false: it is interrupted afterwards (docs/hub.md)"),
    setting("limits.share_kept", "share-kept", Kind::Pause, "60s", "how long an agent's share is kept for it after its last work; then others may have it"),
    setting("limits.time_zone", "time-zone", Kind::Zone, "UTC", "where days and months of budgets begin, at midnight: a name like Europe/Berlin, or an offset from UTC like +05:30"),
    setting("limits.mode", "mode", Kind::Mode, "enforce", "what reaching a limit does: off, shadow (only says what it would do) or enforce; `limits.modes.<limit>` sets one"),
    setting("limits.exit_code", "limit-exit-code", Kind::Code, "", "exit with this code after a stop by a limit, instead of the CLI's own"),
    setting("stop.interrupt", "stop-interrupt", Kind::Time, "3s", "how long an interrupted turn has to end"),
    setting("stop.end", "stop-end", Kind::Time, "3s", "how long the CLI has to end after end_session (1.4 s seen, more on a busy machine)"),
    setting("stop.terminate", "stop-terminate", Kind::Time, "1500ms", "how long it has after SIGTERM, before everything is killed (0.5 s seen)"),
    setting("stop.platform_grace", "platform-grace", Kind::Time, "30s", "what the platform gives between SIGTERM and SIGKILL (Kubernetes: 30s, Docker: 10s); only checked"),
    setting("linger", "linger", Kind::Pause, "0s", "keep the metrics up after the agent's end until they were read once, this long at most"),
    setting("listen", "listen", Kind::Address, ":9477", "where /metrics, /livez, /readyz and /status are served; port 0 picks one, off serves nothing"),
    setting("patrol", "patrol", Kind::Switch, "true", "look every ten seconds for CLIs that run without a sidecar, count them and say so; false where some are meant to"),
    setting("page_host", "page-host", Kind::Label, "", "a public name under which the page at `/` is asked for, behind a proxy; addresses, localhost and private names need none"),
    setting("hub.mode", "hub", Kind::Choice(&["auto", "off"]), "auto", "whether the wrappers of a container that have the same `listen` are served as one, by one of them; off: each for itself"),
    setting("hub.socket", "socket", Kind::Path, "", "where that one is asked; who names the same socket belongs together, whatever its `listen`; unset, hub.sock (hub-PORT.sock for another port) in /run/agent-sidecar, or in agent-sidecar below $XDG_RUNTIME_DIR, or in /tmp/agent-sidecar-UID"),
    setting("hub.state_dir", "hub-state-dir", Kind::Path, "", "where the totals of those that ended are kept, and the journals of those that run; unset, beside the socket; name a volume to have counters outlive the container"),
    setting("hub.control", "hub-control", Kind::Switch, "false", "whether shared budgets can be raised at the socket, by this user and root: an agent that runs under the same user can, too"),
    setting("hub.control_token_file", "control-token-file", Kind::Path, "", "a file with a token (16 letters or more) that whoever changes something has to say, as `Authorization: Bearer …`; of this user or root, and readable by nobody else; by the group of a file of root's, where we are not root"),
    setting("hub.control_token", "control-token", Kind::Token, "", "the token itself; never shown; others can read a flag, so better in a file or the environment"),
    setting("hub.control_tcp", "control-tcp", Kind::Switch, "false", "whether who knows the token may change something over TCP, too"),
    setting("hub.slots", "hub-slots", Kind::Count, "8", "agents at once that have a `slot` of their own in the metrics; the others share `other`"),
    setting("hub.users", "hub-users", Kind::Users, "", "users whose wrappers `agent-sidecar hub`, started by root, serves together; `=tenant` behind one says for whom all its agents work (docs/hub.md)"),
    setting("hub.user", "hub-user", Kind::User, "", "who that hub becomes when root has made the directories of these users: a user with a group of its own"),
    setting("hub.users_dir", "hub-users-dir", Kind::Path, "/run/agent-sidecar-users", "where these directories are, and where wrappers look for one of theirs"),
    setting("ledger.path", "ledger", Kind::Path, "", "append one JSON line for each accounting fact to this file"),
    setting("events.path", "events", Kind::Path, "", "append one JSON line for each event (turns, requests, tools, limits, ends) to this file"),
    setting("otlp.endpoint", "otlp-endpoint", Kind::Url, "", "where spans, metrics and logs are sent, like http://collector:4318; unset, the OTEL_EXPORTER_OTLP_* variables say it, and without them nothing is sent; off sends nothing whatever they say"),
    setting("otlp.protocol", "otlp-protocol", Kind::Choice(&["http/protobuf", "http/json", "grpc"]), "", "how; unset, http/protobuf"),
    setting("otlp.headers", "otlp-headers", Kind::Headers, "", "headers of each request, as name=value,name=value, percent-encoded; never shown; others can read a flag, so better in the file or the environment"),
    setting("otlp.timeout", "otlp-timeout", Kind::Time, "", "how long one request may take; unset, 10s"),
    setting("otlp.compression", "otlp-compression", Kind::Choice(&["gzip", "none"]), "", "of each request; unset, none"),
    setting("otlp.certificate", "otlp-certificate", Kind::Path, "", "the only root certificate that is trusted, instead of those of the web"),
    setting("otlp.client_certificate", "otlp-client-certificate", Kind::Path, "", "our own certificate, for a collector that asks for one"),
    setting("otlp.client_key", "otlp-client-key", Kind::Path, "", "its key"),
    setting("otlp.traces", "otlp-traces", Kind::Switch, "", "whether spans are sent; unset, OTEL_TRACES_EXPORTER says it beside OTEL_EXPORTER_OTLP_*, and yes beside otlp.endpoint"),
    setting("otlp.metrics", "otlp-metrics", Kind::Switch, "", "the same for metrics"),
    setting("otlp.logs", "otlp-logs", Kind::Switch, "", "the same for logs"),
    setting("otlp.semconv", "semconv", Kind::Choice(&["v1.36", "genai-0.1", "both"]), "genai-0.1", "which edition of the GenAI conventions names spans' attributes and the gen_ai.* metrics"),
    setting("otlp.agent_name", "agent-name", Kind::Label, "claude-code", "gen_ai.agent.name of each turn"),
    setting("otlp.queue_dir", "otlp-queue-dir", Kind::Path, "", "where what is not sent yet waits, and outlives us: unset, agent-sidecar/otlp below $XDG_STATE_HOME, /var/lib for root or ~/.local/state; wrappers may share it; name a volume to outlive the container"),
    setting("otlp.queue_max", "otlp-queue-max", Kind::Size, "64MiB", "how much may wait there before the oldest is dropped"),
    setting("otlp.flush", "otlp-flush", Kind::Time, "3s", "how long the end waits for a collector that hangs; one that is down or asks for patience is not waited for"),
    setting("content.prompts", "content-prompts", Kind::Switch, "false", "tell in spans what the app says to the agent over stdin (gen_ai.input.messages of turns)"),
    setting("content.answers", "content-answers", Kind::Switch, "false", "tell in spans what the model writes (gen_ai.output.messages of chats)"),
    setting("content.tool_inputs", "content-tool-inputs", Kind::Switch, "false", "tell in spans what tools are called with (gen_ai.tool.call.arguments)"),
    setting("content.tool_outputs", "content-tool-outputs", Kind::Switch, "false", "tell in spans what tools answer (gen_ai.tool.call.result)"),
    setting("busy.lease", "busy-lease", Kind::Time, "60s", "how long a word that the agent is busy may be believed; it is said again after a third of that"),
    setting("busy.file", "busy-file", Kind::Path, "", "a file that says whether the agent is busy, replaced with each word"),
    setting("busy.webhook", "busy-webhook", Kind::Url, "", "where each such word is posted as JSON"),
    setting("busy.webhook_headers", "busy-webhook-headers", Kind::Headers, "", "headers of each post, as name=value,name=value, percent-encoded; never shown"),
    setting("log.format", "log-format", Kind::Choice(&["text", "json"]), "text", "format of the log on stderr"),
    setting("log.level", "log-level", Kind::Choice(&["error", "warn", "info", "debug"]), "warn", "what is logged"),
    setting("log.quiet", "quiet", Kind::Switch, "false", "log errors only"),
    setting("relay.spill_dir", "spill-dir", Kind::Path, "", "where output waits that the app does not read; before $TMPDIR, /tmp and /dev/shm"),
    setting("relay.spill_max", "spill-max", Kind::Size, "1GiB", "how much may wait there"),
    setting("run.user", "user", Kind::User, "", "start the CLI as this user, NAME or UID and `:GROUP` if it is to be that group alone; the sidecar stays who it is: then the agent can neither end nor change it (docs/security.md)"),
    setting("policy.environment", "environment-policy", Kind::Choice(&["report", "strip", "refuse"]), "report", "what is done about variables that load code into the CLI (LD_PRELOAD, BUN_OPTIONS, …) and, with `policy.base_urls`, about those that have it ask others: report tells, strip takes them from its environment, refuse starts nothing (exit code 125), also for what settings files say that the agent can write (docs/security.md)"),
    setting("policy.base_urls", "base-urls", Kind::Urls, "", "whom the CLI may be told to ask, in ANTHROPIC_BASE_URL and others like it, and below these; unset, the app may say anybody, and only what an agent can write is told"),
    setting("shim.cli", "shim-cli", Kind::Path, "", "the real CLI, for the binary under the name `claude`: unset, what `install` put beside it, or else the next `claude` on PATH"),
    setting("shim.strict", "shim-strict", Kind::Switch, "false", "whether a mistake in the configuration keeps `claude` from starting; if not, the agent runs without the settings that cannot be read"),
    setting("serve.listen", "serve-listen", Kind::Address, ":8000", "where `agent-sidecar serve` takes messages (docs/serve.md); the settings `serve.*` are for it alone"),
    setting("serve.token_file", "serve-token-file", Kind::Path, "", "a file with the token (16 letters or more) that whoever asks has to say, as `Authorization: Bearer …`; of this user or root, and readable by nobody else"),
    setting("serve.token", "serve-token", Kind::Token, "", "the token itself; never shown; others can read a flag, so better in a file or the environment; AGENT_AUTH_TOKEN says it, too"),
    setting("serve.open", "serve-open", Kind::Switch, "false", "ask for no token; at loopback alone"),
    setting("serve.state", "serve-state", Kind::Path, "", "the file that knows which conversation is whose; unset, agent-sidecar-sessions.json in the CLI's config directory"),
    setting("serve.max_agents", "serve-max-agents", Kind::Count, "8", "agents at once; for one more, the one ends that waits longest, and its conversation is resumed by its next message"),
    setting("serve.permissions", "serve-permissions", Kind::Choice(&["deny", "allow"]), "deny", "what is answered to tools that ask for permission"),
    setting("serve.messages", "serve-messages", Kind::Choice(&["sdk", "cli"]), "sdk", "how messages are written: sdk names and flattens them as the Python SDK does, cli passes on the CLI's lines"),
    setting("serve.interrupt_when_gone", "serve-interrupt-when-gone", Kind::Switch, "false", "interrupt a turn when nobody listens to it any more; unset, it goes on to its end"),
    setting("usage.poll", "usage-poll", Kind::Switch, "true", "ask the CLI for its running totals between its results"),
    setting("native.telemetry", "native-telemetry", Kind::Choice(&["auto", "on", "off"]), "auto", "have the CLI export its own telemetry to us too: auto where nothing else tells at once what is spent (text, terminals, and where agents share a budget), on also beside a stream that is read, to be held against it"),
    setting("metrics.max_series", "max-series", Kind::Count, "1500", "series in the exposition at most"),
    setting("labels.tenant", "tenant", Kind::Label, "", "who this container works for: the label `tenant` of each claude_agent_* series"),
    setting("labels.team", "team", Kind::Label, "", "the label `team` of each of them"),
    setting("labels.cost_center", "cost-center", Kind::Label, "", "the label `cost_center` of each of them"),
    setting("labels.user", "end-user", Kind::Label, "", "for which person it works: in spans, events, the ledger and /status; no label of a series"),
    setting("labels.tenant_from", "tenant-from", Kind::Sources, "", "where the tenant is read from, the first that says something: env:VARIABLE, pod:LABEL, annotation:NAME, arg:--FLAG, resource:ATTRIBUTE, message:FIELD.FIELD, cwd:/PATH/{}/ (docs/tenants.md); before `labels.tenant`"),
    setting("labels.team_from", "team-from", Kind::Sources, "", "the same of the team"),
    setting("labels.cost_center_from", "cost-center-from", Kind::Sources, "", "the same of the cost centre"),
    setting("labels.user_from", "end-user-from", Kind::Sources, "", "the same of the user"),
    setting("labels.pod_labels", "pod-labels", Kind::Path, "/etc/podinfo/labels", "the file of the pod's labels, as the downward API makes it"),
    setting("labels.pod_annotations", "pod-annotations", Kind::Path, "/etc/podinfo/annotations", "the same of its annotations"),
    setting("labels.user_hash", "end-user-hash", Kind::Switch, "false", "tell a hash of the user (HMAC-SHA-256, 16 bytes) instead of the user"),
    setting("labels.user_hash_key", "end-user-hash-key", Kind::Secret, "", "its key: without one, whoever guesses a user can prove it; never shown. `withheld` tells no user: so agents that tools start, who have no key"),
    setting("tenants.guard", "tenant-guard", Kind::Mode, "shadow", "what is done when agents of different tenants would share a config directory, a working directory, a memory file or a session: off, shadow (tells) or enforce (is not started: exit code 125)"),
    setting("tenants.agent_dirs", "agent-dirs", Kind::Path, "", "give each agent a directory of its own below this one: config (CLAUDE_CONFIG_DIR), tmp (TMPDIR), workspace (working directory); what the app has set stays"),
    setting("tenants.agent_from", "agent-from", Kind::Sources, "", "where the name of that directory is read from, as `labels.tenant_from`; unset, the lowest number that is free"),
    setting("tenants.agent_workspace", "agent-workspace", Kind::Choice(&["auto", "always", "never"]), "auto", "whether the agent works in it: auto where the app gave it no working directory but its own"),
    setting("tenants.agent_dirs_at_end", "agent-dirs-at-end", Kind::Choice(&["keep", "remove"]), "keep", "what becomes of the directory when the agent has ended"),
    setting("conversation.serve", "conversation-serve", Kind::Switch, "false", "whether who knows `fleet.token` may take the conversation at /v1/conversation, and bring one: the CLI's config directory and the workspace (docs/fleet-conversations.md)"),
    setting("conversation.config", "conversation-config", Kind::Path, "", "the CLI's config directory; unset, $CLAUDE_CONFIG_DIR or ~/.claude"),
    setting("conversation.workspace", "conversation-workspace", Kind::Path, "", "the workspace; unset, the working directory, if that is not `/`"),
    setting("conversation.exclude", "conversation-exclude", Kind::Names, ".credentials.json", "what is left out: names, wherever they are, or paths below either directory"),
    setting("conversation.max_size", "conversation-max-size", Kind::Size, "1GiB", "how large it may be, uncompressed; one that is larger is not put away"),
    setting("conversation.wait", "conversation-wait", Kind::Pause, "0s", "how long the start of the CLI waits for a conversation to be brought; then it is not started, and the exit code is 125"),
    setting("fleet.url", "fleet-url", Kind::Url, "", "the fleet that is told whether the agents work and what they spend, like http://fleet.internal:9490"),
    setting("fleet.container", "fleet-container", Kind::Label, "", "what the fleet calls this container"),
    setting("fleet.session", "fleet-session", Kind::Label, "", "the session that it is for"),
    setting("fleet.token", "fleet-token", Kind::Token, "", "this container's token, for both ways; never shown; others can read a flag, so better in a file or the environment"),
    setting("fleet.token_file", "fleet-token-file", Kind::Path, "", "the same in a file, as `hub.control_token_file`"),
    setting("fleet.report_every", "fleet-report-every", Kind::Time, "10s", "how often the fleet is told, besides when the agents begin or cease to work, and at the end"),
    setting("fleet.lease", "fleet-lease", Kind::Time, "", "how long the container may live, unless the fleet says otherwise; unset, until it says so"),
    setting("fleet.grace", "fleet-grace", Kind::Time, "60s", "how long after that the agents are ended"),
    setting("disk.interval", "disk-interval", Kind::Pause, "60s", "how often the sizes of the working and the config directory are measured; 0 for never"),
    setting("prices.container_usd_per_hour", "container-usd-per-hour", Kind::Price, "0.05", "what the container costs by the hour, metered beside what the agent spends and part of no limit; agents of one container share its hours; 0 counts none"),
    setting("prices.discount", "price-discount", Kind::Factor, "", "what is paid of the list price: 0.8 for twenty percent off"),
];

/// Which limit a key is.
const RULES: &[(&str, Limit, Scope)] = &[
    ("max_turns", Limit::Turns, Scope::Turn),
    ("session_max_turns", Limit::Turns, Scope::Session),
    ("max_cost_usd", Limit::CostUsd, Scope::Session),
    ("turn_max_cost_usd", Limit::CostUsd, Scope::Turn),
    ("max_tokens", Limit::Tokens, Scope::Session),
    ("turn_max_tokens", Limit::Tokens, Scope::Turn),
    ("max_duration", Limit::Duration, Scope::Session),
    ("turn_max_duration", Limit::Duration, Scope::Turn),
    ("tool_max_duration", Limit::Duration, Scope::Tool),
    ("subagent_max_duration", Limit::Duration, Scope::Subagent),
    ("idle_timeout", Limit::Idle, Scope::Session),
    ("startup_timeout", Limit::Startup, Scope::Session),
    ("stall_timeout", Limit::Stall, Scope::Session),
    ("result_timeout", Limit::Result, Scope::Session),
    ("max_memory", Limit::Memory, Scope::Session),
    ("memory_horizon", Limit::MemoryForecast, Scope::Session),
    ("max_identical_calls", Limit::IdenticalCalls, Scope::Turn),
    ("max_alternations", Limit::AlternatingCalls, Scope::Turn),
    ("max_same_errors", Limit::SameErrors, Scope::Turn),
    ("max_compactions", Limit::Compactions, Scope::Turn),
    ("max_subagents", Limit::FanOut, Scope::Turn),
    ("max_stale_answers", Limit::NoProgress, Scope::Turn),
    ("container_max_cost_usd", Limit::CostUsd, Scope::Container),
    ("container_day_max_cost_usd", Limit::CostUsd, Scope::ContainerDay),
    ("container_month_max_cost_usd", Limit::CostUsd, Scope::ContainerMonth),
    ("tenant_max_cost_usd", Limit::CostUsd, Scope::Tenant),
    ("tenant_day_max_cost_usd", Limit::CostUsd, Scope::TenantDay),
    ("tenant_month_max_cost_usd", Limit::CostUsd, Scope::TenantMonth),
    ("container_max_tokens", Limit::Tokens, Scope::Container),
    ("container_day_max_tokens", Limit::Tokens, Scope::ContainerDay),
    ("container_month_max_tokens", Limit::Tokens, Scope::ContainerMonth),
    ("tenant_max_tokens", Limit::Tokens, Scope::Tenant),
    ("tenant_day_max_tokens", Limit::Tokens, Scope::TenantDay),
    ("tenant_month_max_tokens", Limit::Tokens, Scope::TenantMonth),
];

fn is_limit(key: &str) -> bool {
    RULES.iter().any(|(name, ..)| key.strip_prefix("limits.") == Some(name))
}

/// Where a value came from, in the order in which they are read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Origin {
    Default,
    /// File, line and column, both from one.
    File {
        path: PathBuf,
        line: usize,
        column: usize,
    },
    Environment(String),
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Origin::Environment(name) => f.write_str(name),
            Origin::Flag(flag) => write!(f, "--{flag}"),
        }
    }
}

/// Something that is wrong, where, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mistake {
    pub(crate) origin: Origin,
    pub(crate) what: String,
    pub(crate) remedy: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.origin, self.what, self.remedy)
    }
}

/// All that is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) struct Mistakes(pub(crate) Vec<Mistake>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration has {} mistake{}", self.0.len(), if self.0.len() == 1 { "" } else { "s" })?;
        for mistake in &self.0 {
            write!(f, "\n  {mistake}")?;
        }
        Ok(())
    }
}

/// A value in force.
#[derive(Clone, Debug)]
pub(crate) struct Effective {
    /// As it was written.
    pub(crate) text: String,
    pub(crate) value: Option<Value>,
    pub(crate) origin: Origin,
}

/// Where settings are read from: handed in, so that a test has its own.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    /// The file and its text.
    pub(crate) file: Option<(PathBuf, String)>,
    /// The file that should be there and cannot be read: one more mistake, and no reason to be silent about the others.
    pub(crate) unreadable: Option<Mistake>,
    /// Variables by their whole names.
    pub(crate) environment: Vec<(String, String)>,
    /// Flags by their names, without dashes.
    pub(crate) flags: Vec<(&'static str, String)>,
}

impl Sources {
    /// The named file, or the default one if it is there, and this process's environment.
    pub(crate) fn system(config: Option<&Path>, flags: Vec<(&'static str, String)>) -> Sources {
        let (file, unreadable) = Sources::file(config, Path::new(DEFAULT_FILE));
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())))
            .filter(|(name, _)| name.starts_with(PREFIX))
            .collect();
        Sources { file, unreadable, environment, flags }
    }

    /// The file to read, or what is wrong with it. Where the usual one has settings that are final, no other is read instead.
    fn file(config: Option<&Path>, usual: &Path) -> (Option<(PathBuf, String)>, Option<Mistake>) {
        if let Some(other) = config.filter(|other| *other != usual)
            && let Ok(text) = std::fs::read_to_string(usual)
        {
            let known = Sources { file: Some((usual.to_owned(), text)), ..Sources::default() };
            if let Some((_, by)) = Config::read(&known).0.finals.first() {
                let origin = Origin::File { path: other.to_owned(), line: 1, column: 1 };
                let remedy = String::from("leave --config out, or have the settings changed in that file");
                let what = format!("this file is not read: another has settings that are final ({by})");
                return (known.file, Some(Mistake { origin, what, remedy }));
            }
        }
        let path = config.unwrap_or(usual);
        // One that somebody named may be a pipe; the usual one is a file, or somebody's trap.
        let read = config.map_or_else(|| files::read_linked(usual), std::fs::read_to_string);
        match read {
            Ok(text) => (Some((path.to_owned(), text)), None),
            Err(error) if config.is_none() && error.kind() == std::io::ErrorKind::NotFound => (None, None),
            Err(error) => {
                let origin = Origin::File { path: path.to_owned(), line: 1, column: 1 };
                let remedy = String::from("name a readable file with --config, or leave it out");
                (None, Some(Mistake { origin, what: format!("the file cannot be read: {error}"), remedy }))
            }
        }
    }
}

const PREFIX: &str = "AGENT_SIDECAR_";

/// The effective configuration.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    values: BTreeMap<&'static str, Effective>,
    modes: BTreeMap<&'static str, (Mode, Origin)>,
    pub(crate) prices: PriceTable,
    /// The file that was read.
    file: Option<PathBuf>,
    /// Settings, or tables of them (`limits.*`), that environment and flags cannot loosen, and where that is said.
    finals: Vec<(String, Origin)>,
    /// Variables under our prefix that are nobody's here.
    strangers: Vec<Mistake>,
}

impl Config {
    /// # Errors
    /// Every mistake of every source.
    pub(crate) fn load(sources: &Sources) -> Result<Config, Mistakes> {
        let (config, mistakes) = Config::read(sources);
        if mistakes.is_empty() { Ok(config) } else { Err(Mistakes(mistakes)) }
    }

    /// What can be read, and what is wrong with the rest. A setting with a mistake in it stays as an earlier source has it.
    pub(crate) fn read(sources: &Sources) -> (Config, Vec<Mistake>) {
        let mut mistakes: Vec<Mistake> = sources.unreadable.iter().cloned().collect();
        let mut values = BTreeMap::new();
        for setting in SETTINGS {
            let value = (!setting.default.is_empty())
                .then(|| setting.kind.parse(setting.default).expect("defaults are right: a test reads them all"));
            values.insert(setting.key, Effective { text: setting.default.to_owned(), value, origin: Origin::Default });
        }
        let mut config = Config {
            values,
            modes: BTreeMap::new(),
            prices: PriceTable::default(),
            file: None,
            finals: Vec::new(),
            strangers: Vec::new(),
        };
        if let Some((path, text)) = &sources.file {
            config.file = Some(path.clone());
            file::read(&mut config, path, text, &mut mistakes);
        }
        for (name, text) in &sources.environment {
            match SETTINGS.iter().find(|setting| variable(setting) == *name) {
                Some(setting) => config.set(setting, text, Origin::Environment(name.clone()), &mut mistakes),
                None if is_ours(name) || is_kubernetes(name, text) => {}
                None => match slip(name) {
                    Some(mistake) => mistakes.push(mistake),
                    None => config.strangers.push(stranger(name)),
                },
            }
        }
        for (flag, text) in &sources.flags {
            if let Some(setting) = SETTINGS.iter().find(|setting| setting.flag == *flag) {
                config.set(setting, text, Origin::Flag(setting.flag), &mut mistakes);
            }
        }
        if let Some(Value::Factor(factor)) = config.value("prices.discount") {
            config.prices = config.prices.clone().with_discount(None, *factor);
        }
        if let Some(Value::Money(usd)) = config.value("prices.container_usd_per_hour") {
            config.prices = config.prices.clone().with_container(Usd::from_f64(*usd));
        }
        config.contradictions(&mut mistakes);
        // What was not understood may have been the token: then no word is right, and not none asked for.
        if !mistakes.is_empty() && config.switch("hub.control") && !config.has_token() {
            config.values.get_mut("hub.control_token").expect("it is a setting").value = Some(Value::Token(Token::Lost));
        }
        mistakes.sort_by(|a, b| a.origin.cmp(&b.origin));
        (config, mistakes)
    }

    fn set(&mut self, setting: &'static Setting, text: &str, origin: Origin, mistakes: &mut Vec<Mistake>) {
        let text = text.trim();
        // What has no default can be unset again by a later source, and every limit.
        let unset = (setting.default.is_empty() || is_limit(setting.key)) && matches!(text, "" | "off" | "none");
        let value = match setting.kind.parse(text) {
            _ if unset => None,
            Ok(value) => Some(value),
            Err(wrong) => {
                mistakes.push(Mistake {
                    origin: origin.clone(),
                    what: format!("`{}` {wrong}", setting.key),
                    remedy: setting.kind.remedy(),
                });
                // A fence that is not understood is not left out: nobody is called so, and nothing is started.
                if setting.kind == Kind::User {
                    self.values.insert(setting.key, Effective { text: text.to_owned(), value: Some(Value::Text), origin });
                }
                return;
            }
        };
        if let Some(refused) = self.loosens(setting, value.as_ref(), text, &origin) {
            mistakes.push(refused);
            return;
        }
        // Keys are kept as values alone, which do not print: not in `check --print`, and not in the fingerprint.
        let hidden = matches!(value, Some(Value::Headers(_) | Value::Secret(_) | Value::Token(_)));
        let text = if hidden { "(hidden)" } else { text };
        self.values.insert(setting.key, Effective { text: text.to_owned(), value, origin });
    }

    /// What is wrong with a value that comes after the file, where the file is to have the last word: a ceiling may be lowered, a mode
    /// made stricter, and nothing else be changed.
    fn loosens(&self, setting: &Setting, value: Option<&Value>, text: &str, origin: &Origin) -> Option<Mistake> {
        if !matches!(origin, Origin::Environment(_) | Origin::Flag(_)) {
            return None;
        }
        let of = |name: &str| match name.strip_suffix('*') {
            Some(table) => setting.key.starts_with(table),
            None => setting.key == name,
        };
        let (_, by) = self.finals.iter().find(|(name, _)| of(name))?;
        let before = &self.values[setting.key];
        let lowers = (is_limit(setting.key) || setting.key == "limits.max_sessions") && setting.key != "limits.memory_horizon";
        let well = match (value, &before.value) {
            // A key has no business in a file that all can read, and control is less without than with.
            (Some(Value::Token(_)), None) => !self.has_token(),
            (Some(Value::Headers(_) | Value::Secret(_)), None) => true,
            (Some(Value::Switch(false)), _) if setting.key == "hub.control" => true,
            (Some(Value::Mode(new)), Some(Value::Mode(old))) => new >= old,
            (Some(new), Some(old)) if lowers => new.number() <= old.number(),
            (Some(_), None) if lowers => true,
            (new, old) => new == old.as_ref() && (text == before.text || !matches!(new, None | Some(Value::Text))),
        };
        let may = if lowers { "only be lowered" } else { "not be changed" };
        let is = if before.text.is_empty() { "unset" } else { &before.text };
        (!well).then(|| Mistake {
            origin: origin.clone(),
            what: format!("`{}` is {is}, and may {may} here: it is final ({by})", setting.key),
            remedy: String::from("leave it out, or have it changed in that file"),
        })
    }

    /// Settings that are each right and cannot all be meant.
    fn contradictions(&self, mistakes: &mut Vec<Mistake>) {
        for (inner, outer) in [
            ("limits.turn_max_cost_usd", "limits.max_cost_usd"),
            ("limits.turn_max_tokens", "limits.max_tokens"),
            ("limits.turn_max_duration", "limits.max_duration"),
            ("limits.tool_max_duration", "limits.max_duration"),
            ("limits.subagent_max_duration", "limits.max_duration"),
            ("limits.max_turns", "limits.session_max_turns"),
        ] {
            if let (Some(turn), Some(session)) = (self.value(inner), self.value(outer))
                && turn.number() > session.number()
            {
                mistakes.push(Mistake {
                    origin: self.values[inner].origin.clone(),
                    what: format!("`{inner}` ({}) is above `{outer}` ({})", self.text(inner), self.text(outer)),
                    remedy: String::from("lower it, or raise the other"),
                });
            }
        }
        // A signal skips the interrupt: what has to fit is the rest, and the reading of the last numbers.
        let flush = if self.value("otlp.endpoint").is_some() { self.time("otlp.flush") } else { None };
        let webhook = self.value("busy.webhook").map(|_| busy::ANSWER);
        let fleet = self.value("fleet.url").map(|_| busy::ANSWER);
        let after = self.linger() + flush.unwrap_or_default() + webhook.unwrap_or_default() + fleet.unwrap_or_default();
        let needed = self.patience().end + self.patience().terminate + after;
        let grace = self.time("stop.platform_grace").unwrap_or(Duration::MAX);
        if needed >= grace {
            mistakes.push(Mistake {
                origin: self.values["stop.platform_grace"].origin.clone(),
                what: format!(
                    "a stop may take {needed:?} (stop.end + stop.terminate + linger, and where they are used otlp.flush and 2s each for busy.webhook and fleet.url), and the platform kills after {grace:?}"
                ),
                remedy: String::from(
                    "raise the platform's grace period and `stop.platform_grace` with it, or shorten the others",
                ),
            });
        }
        for (one, other) in [("otlp.client_certificate", "otlp.client_key"), ("otlp.client_key", "otlp.client_certificate")] {
            if self.value(one).is_some() && self.value(other).is_none() {
                mistakes.push(Mistake {
                    origin: self.values[one].origin.clone(),
                    what: format!("`{one}` is of no use without `{other}`"),
                    remedy: String::from("set both, or none"),
                });
            }
        }
        let shared = RULES.iter().filter(|(_, _, scope)| scope.shared().is_some());
        for (name, _, scope) in shared {
            let key = format!("limits.{name}");
            let Some(effective) = self.values.get(key.as_str()).filter(|effective| effective.value.is_some()) else { continue };
            let of_tenant = scope.of_tenant();
            let (what, remedy) = if self.meeting().is_none() {
                ("and agents that do not meet share nothing", "set `listen` to an address with a port, or name `hub.socket`")
            } else if of_tenant && self.fixed_who().tenant.is_none() && self.sources_of(Name::Tenant).is_none() {
                ("and there is no tenant", "set `labels.tenant` or `labels.tenant_from`")
            } else {
                continue;
            };
            let what = format!("`{key}` is a budget that agents share, {what}");
            mistakes.push(Mistake { origin: effective.origin.clone(), what, remedy: remedy.to_owned() });
        }
        if self.guard() == Mode::Enforce && self.meeting().is_none() {
            mistakes.push(Mistake {
                origin: self.values["tenants.guard"].origin.clone(),
                what: String::from("`tenants.guard` knows what agents share that meet, and these do not"),
                remedy: String::from("set `listen` to an address with a port, or name `hub.socket`"),
            });
        }
        if self.sources("tenants.agent_from").is_some_and(who::Sources::is_late) {
            mistakes.push(Mistake {
                origin: self.values["tenants.agent_from"].origin.clone(),
                what: String::from("`tenants.agent_from` names a directory that has to be there before the app says anything"),
                remedy: String::from("leave message: out, and use env: or arg:"),
            });
        }
        if self.value("labels.user_hash_key").is_some() && !self.switch("labels.user_hash") {
            mistakes.push(Mistake {
                origin: self.values["labels.user_hash_key"].origin.clone(),
                what: String::from("`labels.user_hash_key` is of no use without `labels.user_hash`"),
                remedy: String::from("set `labels.user_hash`, or leave the key out"),
            });
        }
        if self.max_sessions().is_some() && self.meeting().is_none() {
            mistakes.push(Mistake {
                origin: self.values["limits.max_sessions"].origin.clone(),
                what: String::from("`limits.max_sessions` is for agents that meet, and these do not"),
                remedy: String::from("set `listen` to an address with a port, or name `hub.socket`"),
            });
        }
        let has_token = self.value("fleet.token").is_some() || self.value("fleet.token_file").is_some();
        for key in ["conversation.serve", "fleet.url"] {
            let wants = if key == "fleet.url" { self.value(key).is_some() } else { self.switch(key) };
            if wants && !has_token {
                mistakes.push(Mistake {
                    origin: self.values[key].origin.clone(),
                    what: format!("`{key}` is for who knows the container's token, and there is none"),
                    remedy: String::from("set `fleet.token` or `fleet.token_file`"),
                });
            }
        }
        if !self.conversation_wait().is_zero() && !self.switch("conversation.serve") {
            mistakes.push(Mistake {
                origin: self.values["conversation.wait"].origin.clone(),
                what: String::from("`conversation.wait` waits for what nobody can bring"),
                remedy: String::from("set `conversation.serve`, or leave it out"),
            });
        }
        if !self.linger().is_zero() && self.listen().is_none() {
            mistakes.push(Mistake {
                origin: self.values["linger"].origin.clone(),
                what: String::from("`linger` waits for somebody to read the metrics, and `listen` is off"),
                remedy: String::from("set `listen`, or leave `linger` out"),
            });
        }
    }

    /// Variables that look like settings and are none, so many of them at most as anybody reads.
    pub(crate) fn strangers(&self) -> &[Mistake] {
        &self.strangers[..self.strangers.len().min(10)]
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key).and_then(|effective| effective.value.as_ref())
    }

    fn text(&self, key: &str) -> &str {
        self.values.get(key).map_or("", |effective| effective.text.as_str())
    }

    fn time(&self, key: &str) -> Option<Duration> {
        match self.value(key) {
            Some(Value::Time(time)) => Some(*time),
            _ => None,
        }
    }

    fn count(&self, key: &str) -> Option<u64> {
        match self.value(key) {
            Some(Value::Count(n) | Value::Size(n)) => Some(*n),
            _ => None,
        }
    }

    fn switch(&self, key: &str) -> bool {
        matches!(self.value(key), Some(Value::Switch(true)))
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        self.value(key).map(|_| PathBuf::from(self.text(key)))
    }

    fn headers(&self, key: &str) -> Option<Headers> {
        match self.value(key) {
            Some(Value::Headers(headers)) => Some(headers.clone()),
            _ => None,
        }
    }

    // ---- what the rest of the program asks

    fn mode(&self, key: &str) -> Mode {
        match self.value(key) {
            Some(Value::Mode(mode)) => *mode,
            _ => Mode::Enforce,
        }
    }

    /// Every ceiling that is set, with its mode.
    pub(crate) fn rules(&self) -> Vec<Rule> {
        let common = self.mode("limits.mode");
        let loops = common.min(self.mode("limits.loop_mode"));
        RULES
            .iter()
            .filter_map(|&(name, limit, scope)| {
                let ceiling = match self.value(&format!("limits.{name}"))? {
                    Value::Count(n) => Ceiling::Count(*n),
                    Value::Size(n) => Ceiling::Bytes(*n),
                    Value::Money(usd) => Ceiling::Usd(Usd::from_f64(*usd)),
                    Value::Time(time) => Ceiling::Time(*time),
                    Value::Switch(_)
                    | Value::Mode(_)
                    | Value::Code(_)
                    | Value::Factor(_)
                    | Value::Text
                    | Value::Headers(_)
                    | Value::Sources(_)
                    | Value::Secret(_)
                    | Value::Token(_)
                    | Value::Zone(_)
                    | Value::Address(_) => return None,
                };
                let usual = if limit.is_loop() { loops } else { common };
                let mode = self.modes.get(name).map_or(usual, |(mode, _)| *mode);
                Some(Rule { limit, scope, ceiling, mode })
            })
            .collect()
    }

    /// How large the budgets are that agents share.
    pub(crate) fn caps(&self) -> [Caps; SHARED] {
        let mut caps = [Caps::default(); SHARED];
        for rule in self.rules().iter().filter(|rule| rule.mode != Mode::Off) {
            let Some(caps) = rule.scope.shared().and_then(|at| caps.get_mut(at)) else { continue };
            match rule.ceiling {
                Ceiling::Usd(usd) => caps.usd = Some(usd),
                Ceiling::Count(tokens) => caps.tokens = Some(tokens),
                Ceiling::Time(_) | Ceiling::Bytes(_) => {}
            }
        }
        caps
    }

    pub(crate) fn patience(&self) -> Patience {
        let usual = Patience::default();
        Patience {
            interrupt: self.time("stop.interrupt").unwrap_or(usual.interrupt),
            end: self.time("stop.end").unwrap_or(usual.end),
            terminate: self.time("stop.terminate").unwrap_or(usual.terminate),
        }
    }

    pub(crate) fn linger(&self) -> Duration {
        self.time("linger").unwrap_or_default()
    }

    pub(crate) fn listen(&self) -> Option<std::net::SocketAddr> {
        match self.value("listen") {
            Some(Value::Address(address)) => *address,
            _ => None,
        }
    }

    /// Where the wrappers of this container meet, if they are to.
    pub(crate) fn meeting(&self) -> Option<Meeting> {
        if self.text("hub.mode") != "auto" {
            return None;
        }
        let socket = self.path("hub.socket");
        // Nobody can know the port that will be picked: whoever asks for one asks for it alone.
        let port = self.listen().map(|address| address.port()).filter(|port| *port != 0);
        let (state_dir, users_dir) = (self.path("hub.state_dir"), self.path("hub.users_dir"));
        (socket.is_some() || port.is_some()).then_some(Meeting { socket, port, state_dir, users_dir })
    }

    pub(crate) fn hub_options(&self) -> crate::hub::Options {
        let slots = self.count("hub.slots").and_then(|n| usize::try_from(n).ok()).unwrap_or(8);
        crate::hub::Options {
            slots,
            max_series: self.max_series(),
            labels: self.fixed_who().labels(),
            keys: self.keys(),
            zone: self.zone(),
            lease: self.busy().length,
            page_host: self.page_host(),
            patrol: self.patrol(),
            members: Vec::new(),
            conversation: self.conversation(&Places::of(&[], None)),
            fleet: self.fleet(),
        }
    }

    /// The users that a hub serves, and who it is to become.
    ///
    /// # Errors
    /// One of them is not there, or is not kept apart from the hub.
    pub(crate) fn hub_users(&self) -> std::io::Result<Option<(Vec<Member>, Option<User>)>> {
        let Some(_) = self.value("hub.users") else { return Ok(None) };
        let hub = self.value("hub.user").map(|_| User::named(self.text("hub.user"))).transpose();
        let hub = hub.map_err(std::io::Error::other)?;
        Ok(Some((users::members(self.text("hub.users"), hub.as_ref())?, hub)))
    }

    pub(crate) fn patrol(&self) -> bool {
        self.switch("patrol")
    }

    pub(crate) fn page_host(&self) -> Option<String> {
        Some(self.text("page_host")).filter(|name| !name.is_empty()).map(str::to_owned)
    }

    /// Who may change something at the hub. A token that cannot be read opens to nobody.
    fn keys(&self) -> Keys {
        let control = self.switch("hub.control");
        let token = if control { self.token() } else { Ok(Token::None) };
        let token = token.unwrap_or_else(|error| {
            tracing::error!(%error, "the control token cannot be read: nothing can be changed at the hub");
            Token::Lost
        });
        Keys { control, tcp: self.switch("hub.control_tcp"), token }
    }

    fn has_token(&self) -> bool {
        self.value("hub.control_token").is_some() || self.value("hub.control_token_file").is_some()
    }

    /// # Errors
    /// There should be one, and it cannot be read.
    pub(crate) fn token(&self) -> Result<Token, String> {
        match (self.value("hub.control_token"), self.path("hub.control_token_file")) {
            (Some(Value::Token(token)), _) => Ok(token.clone()),
            (_, Some(path)) => Token::read(&path).map_err(|error| format!("{}: {error}", path.display())),
            _ => Ok(Token::None),
        }
    }

    /// How sessions are served over HTTP.
    ///
    /// # Errors
    /// There is no token where one is needed, or it cannot be read.
    pub(crate) fn serve(&self) -> Result<serve::Options, serve::Error> {
        let Some(Value::Address(Some(address))) = self.value("serve.listen") else { return Err(serve::Error::NoAddress) };
        let other = std::env::var(serve::OTHER_TOKEN).ok().filter(|token| !token.is_empty());
        let token = match (self.value("serve.token"), self.path("serve.token_file"), other) {
            (Some(Value::Token(token)), _, _) => Ok(token.clone()),
            (_, Some(path), _) => Token::read(&path).map_err(|error| format!("{}: {error}", path.display())),
            (_, _, Some(token)) => Token::of(&token).map_err(|error| format!("{}: {error}", serve::OTHER_TOKEN)),
            _ => Ok(Token::None),
        };
        let token = token.map_err(serve::Error::BadToken)?;
        let open = self.switch("serve.open");
        match token {
            Token::None if !open => return Err(serve::Error::NoToken),
            Token::None if !address.ip().is_loopback() => return Err(serve::Error::OpenToAll),
            Token::None | Token::Is(_) | Token::Lost => {}
        }
        Ok(serve::Options {
            address: *address,
            token,
            open,
            book: self.path("serve.state"),
            agents: self.count("serve.max_agents").and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX),
            allow: self.text("serve.permissions") == "allow",
            form: if self.text("serve.messages") == "cli" { serve::Form::Cli } else { serve::Form::Sdk },
            interrupt: self.switch("serve.interrupt_when_gone"),
            grace: self.time("stop.platform_grace"),
            page_host: self.page_host(),
        })
    }

    /// The container's token, which the fleet knows. One that cannot be read opens to nobody.
    fn fleet_token(&self) -> Token {
        let token = match (self.value("fleet.token"), self.path("fleet.token_file")) {
            (Some(Value::Token(token)), _) => return token.clone(),
            (_, Some(path)) => Token::read(&path).map_err(|error| format!("{}: {error}", path.display())),
            _ => return Token::None,
        };
        token.unwrap_or_else(|error| {
            tracing::error!(%error, "the fleet's token cannot be read: nothing is told to it, and nothing taken from it");
            Token::Lost
        })
    }

    /// What is served of a conversation whose CLI finds its directories there, if anything is.
    pub(crate) fn conversation(&self, places: &Places) -> Option<conversation::Options> {
        if !self.switch("conversation.serve") {
            return None;
        }
        let config = self.path("conversation.config").or_else(|| places.config.clone());
        let workspace = self.path("conversation.workspace").unwrap_or_else(|| places.cwd.clone());
        let roots = [("config", config), ("workspace", Some(workspace))];
        let roots = roots.into_iter().filter_map(|(name, path)| Some(Root { name, path: conversation::settled(&path?) }));
        // The whole of a container's files is no workspace.
        let roots = roots.filter(|root| root.path != Path::new("/")).collect();
        let exclude = self.value("conversation.exclude").map(|_| self.text("conversation.exclude"));
        Some(conversation::Options {
            token: self.fleet_token(),
            roots,
            exclude: exclude.into_iter().flat_map(|text| text.split(',')).map(|name| name.trim().to_owned()).collect(),
            max_size: self.count("conversation.max_size").unwrap_or(u64::MAX),
            container: self.text("fleet.container").to_owned(),
        })
    }

    /// Who tells the fleet, if there is one.
    pub(crate) fn fleet(&self) -> Option<Voice> {
        let url = self.value("fleet.url").map(|_| self.text("fleet.url").trim_end_matches('/'))?;
        let to = format!("{url}/v1/containers/{}/report", self.text("fleet.container"));
        let options = fleet::Options {
            to: to
                .parse()
                .inspect_err(|_| tracing::error!("`fleet.url` and `fleet.container` make no URL: the fleet is told nothing"))
                .ok()?,
            headers: fleet::bearer(self.fleet_token().word()?)?,
            session: self.text("fleet.session").to_owned(),
            every: self.time("fleet.report_every").unwrap_or(REPORT_EVERY),
            lease: self.time("fleet.lease"),
            grace: self.time("fleet.grace").unwrap_or(LEASE_GRACE),
        };
        Some(Voice::new(options))
    }

    /// How long a start waits for a conversation.
    pub(crate) fn conversation_wait(&self) -> Duration {
        self.time("conversation.wait").unwrap_or_default()
    }

    pub(crate) fn ledger(&self) -> Option<PathBuf> {
        self.path("ledger.path")
    }

    pub(crate) fn events(&self) -> Option<PathBuf> {
        self.path("events.path")
    }

    pub(crate) fn semconv(&self) -> Semconv {
        Semconv::of(self.text("otlp.semconv")).unwrap_or_default()
    }

    pub(crate) fn agent_name(&self) -> String {
        self.text("otlp.agent_name").to_owned()
    }

    /// The table `[otlp]`, for [`crate::export::otlp::environment::read`].
    pub(crate) fn otlp(&self) -> Own {
        let text = |key: &str| self.value(key).map(|_| self.text(key).to_owned());
        // `off` unsets what has no default, and here it is also what is meant.
        let switch = |key: &str| match self.value(key) {
            Some(Value::Switch(on)) => Some(*on),
            _ => matches!(self.text(key), "off" | "none").then_some(false),
        };
        Own {
            endpoint: text("otlp.endpoint"),
            off: matches!(self.text("otlp.endpoint"), "off" | "none"),
            protocol: text("otlp.protocol"),
            headers: self.headers("otlp.headers"),
            timeout: self.time("otlp.timeout"),
            compression: text("otlp.compression").or_else(|| (self.text("otlp.compression") == "none").then(|| "none".into())),
            certificate: self.path("otlp.certificate"),
            client_certificate: self.path("otlp.client_certificate"),
            client_key: self.path("otlp.client_key"),
            signals: ["otlp.traces", "otlp.metrics", "otlp.logs"].map(switch),
            queue_dir: self.path("otlp.queue_dir"),
            queue_max: self.count("otlp.queue_max"),
            flush: self.time("otlp.flush"),
        }
    }

    /// What may be told of content; nothing, unless somebody says so. `secrets` never.
    pub(crate) fn gates(&self, max: Option<usize>, secrets: Vec<String>) -> Gates {
        let shut = Gates::default();
        Gates {
            prompts: self.switch("content.prompts"),
            answers: self.switch("content.answers"),
            tool_inputs: self.switch("content.tool_inputs"),
            tool_outputs: self.switch("content.tool_outputs"),
            max: max.unwrap_or(shut.max),
            secrets,
        }
    }

    pub(crate) fn busy(&self) -> Lease {
        Lease {
            length: self.time("busy.lease").unwrap_or(BUSY_LEASE),
            file: self.path("busy.file"),
            webhook: self.value("busy.webhook").and_then(|_| self.text("busy.webhook").parse().ok()),
            headers: self.headers("busy.webhook_headers").unwrap_or_default(),
        }
    }

    pub(crate) fn json_log(&self) -> bool {
        self.text("log.format") == "json"
    }

    pub(crate) fn log_level(&self) -> tracing::Level {
        match self.text("log.level") {
            _ if self.switch("log.quiet") => tracing::Level::ERROR,
            "error" => tracing::Level::ERROR,
            "info" => tracing::Level::INFO,
            "debug" => tracing::Level::DEBUG,
            _ => tracing::Level::WARN,
        }
    }

    pub(crate) fn spill_dir(&self) -> Option<PathBuf> {
        self.path("relay.spill_dir")
    }

    pub(crate) fn spill_bytes(&self) -> u64 {
        self.count("relay.spill_max").unwrap_or(crate::supervise::SPILL_BYTES)
    }

    /// As whom the CLI is to run; as we do, if nobody says.
    ///
    /// # Errors
    /// There is no such user, or we may not start anything as somebody else.
    pub(crate) fn user(&self) -> Result<Option<User>, NoUser> {
        self.value("run.user").map(|_| User::find(self.text("run.user"))).transpose()
    }

    pub(crate) fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// What is named to be written to, by the settings that name it.
    pub(crate) fn own_paths(&self) -> Vec<(&'static str, PathBuf)> {
        let keys = ["ledger.path", "events.path", "busy.file", "otlp.queue_dir", "hub.state_dir", "hub.socket"];
        keys.into_iter().filter_map(|key| Some((key, self.path(key)?))).collect()
    }

    /// The variables of ours that hold keys: nobody below us needs them.
    pub(crate) fn secrets() -> impl Iterator<Item = String> {
        SETTINGS.iter().filter(|setting| matches!(setting.kind, Kind::Headers | Kind::Token | Kind::Secret)).map(variable)
    }

    /// What agents that tools start are to be told otherwise than we were: nobody there has the keys, and where we ask for one, no
    /// hub of theirs is to go without.
    pub(crate) fn for_those_below(&self) -> Vec<(String, String)> {
        let given = |key: &str| matches!(self.values[key].origin, Origin::Environment(_) | Origin::Flag(_));
        let mut told = Vec::new();
        let lost = matches!(self.value("hub.control_token"), Some(Value::Token(Token::Lost)));
        let flag = matches!(self.values["hub.control_token_file"].origin, Origin::Flag(_));
        if lost || given("hub.control_token") || flag {
            told.push((name_of("hub.control"), String::from("false")));
        }
        if self.switch("labels.user_hash") && given("labels.user_hash_key") {
            told.push((name_of("labels.user_hash_key"), String::from(WITHHELD)));
            // Not everybody inherits a flag.
            if matches!(self.values["labels.user_hash"].origin, Origin::Flag(_)) {
                told.push((name_of("labels.user_hash"), String::from("true")));
            }
        }
        told
    }

    /// What is done about what changes the CLI, and whom it may ask.
    pub(crate) fn influence(&self) -> (influence::Policy, influence::Expected) {
        let policy = match self.text("policy.environment") {
            "strip" => influence::Policy::Strip,
            "refuse" => influence::Policy::Refuse,
            _ => influence::Policy::Report,
        };
        (policy, self.value("policy.base_urls").and_then(|_| value::urls(self.text("policy.base_urls"))))
    }

    pub(crate) fn shim_cli(&self) -> Option<PathBuf> {
        self.path("shim.cli")
    }

    pub(crate) fn shim_strict(&self) -> bool {
        self.switch("shim.strict")
    }

    pub(crate) fn poll(&self) -> bool {
        self.switch("usage.poll")
    }

    pub(crate) fn native(&self) -> crate::receive::Choice {
        match self.text("native.telemetry") {
            "on" => crate::receive::Choice::On,
            "off" => crate::receive::Choice::Off,
            _ => crate::receive::Choice::Auto,
        }
    }

    pub(crate) fn max_series(&self) -> usize {
        self.count("metrics.max_series").and_then(|n| usize::try_from(n).ok()).unwrap_or(agent_sidecar_core::metric::MAX_SERIES)
    }

    pub(crate) fn limit_exit_code(&self) -> Option<u8> {
        match self.value("limits.exit_code") {
            Some(Value::Code(code)) => Some(*code),
            _ => None,
        }
    }

    /// For whom everything here works that nothing else is known of.
    pub(crate) fn fixed_who(&self) -> Who {
        let mut who = Who::default();
        for name in Name::ALL {
            let key = format!("labels.{}", name.as_str());
            if !(*name == Name::User && self.withholds_user()) && self.value(&key).is_some() {
                who.set(*name, self.text(&key).to_owned());
            }
        }
        who
    }

    /// Where else that is asked for, if anywhere.
    pub(crate) fn sources_of(&self, name: Name) -> Option<&who::Sources> {
        self.sources(&format!("labels.{}_from", name.as_str())).filter(|_| name != Name::User || !self.withholds_user())
    }

    /// Whether users are hashed, with a key that is not here: with another, or none, the hash would tell who they are, or of two.
    fn withholds_user(&self) -> bool {
        matches!(self.value("labels.user_hash_key"), Some(Value::Secret(key)) if key.0 == WITHHELD)
    }

    fn sources(&self, key: &str) -> Option<&who::Sources> {
        match self.value(key) {
            Some(Value::Sources(sources)) => Some(sources),
            _ => None,
        }
    }

    /// The files of the downward API: labels and annotations.
    pub(crate) fn pod_files(&self) -> [PathBuf; 2] {
        ["labels.pod_labels", "labels.pod_annotations"].map(|key| self.path(key).unwrap_or_default())
    }

    /// The key that users are hashed with, if they are.
    pub(crate) fn user_hash(&self) -> Option<Vec<u8>> {
        let key = match self.value("labels.user_hash_key") {
            Some(Value::Secret(key)) => key.0.clone().into_bytes(),
            _ => Vec::new(),
        };
        self.switch("labels.user_hash").then_some(key)
    }

    pub(crate) fn guard(&self) -> Mode {
        self.mode("tenants.guard")
    }

    /// Whether anything tells tenants apart here.
    pub(crate) fn has_tenants(&self) -> bool {
        self.value("labels.tenant").is_some() || self.sources_of(Name::Tenant).is_some()
    }

    pub(crate) fn agent_dirs(&self) -> Option<AgentDirs> {
        Some(AgentDirs {
            root: self.path("tenants.agent_dirs")?,
            name: self.sources("tenants.agent_from").cloned(),
            workspace: match self.text("tenants.agent_workspace") {
                "always" => Workspace::Always,
                "never" => Workspace::Never,
                _ => Workspace::Auto,
            },
            remove: self.text("tenants.agent_dirs_at_end") == "remove",
        })
    }

    /// How often directories are measured, if they are.
    pub(crate) fn disk_interval(&self) -> Option<Duration> {
        self.time("disk.interval").filter(|interval| !interval.is_zero())
    }

    /// How many agents may run at once, how long one more waits, and what becomes of it.
    pub(crate) fn max_sessions(&self) -> Option<(u64, Duration, Mode)> {
        let mode = self.mode("limits.mode");
        let seats = self.count("limits.max_sessions").filter(|_| mode != Mode::Off)?;
        Some((seats, self.time("limits.queue_timeout").unwrap_or_default(), mode))
    }

    pub(crate) fn tenant_weight(&self) -> u64 {
        self.count("limits.tenant_weight").unwrap_or(1)
    }

    /// How shared budgets are shared out.
    pub(crate) fn sharing(&self) -> Sharing {
        let chosen = How::ALL.iter().find(|how| how.as_str() == self.text("limits.budget_share"));
        Sharing { how: chosen.copied().unwrap_or(How::Tenants), kept: self.time("limits.share_kept").unwrap_or_default() }
    }

    /// Whether CLIs that share a budget are to ask before they ask the model.
    pub(crate) fn budget_hooks(&self) -> bool {
        self.switch("limits.budget_hooks")
    }

    /// Where days begin.
    pub(crate) fn zone(&self) -> Zone {
        match self.value("limits.time_zone") {
            Some(Value::Zone(zone)) => zone.clone(),
            _ => Zone::default(),
        }
    }

    pub(crate) fn idle_timeout(&self) -> Option<Duration> {
        self.time("limits.idle_timeout")
    }

    /// Each setting, in the order of [`SETTINGS`].
    pub(crate) fn effective(&self) -> impl Iterator<Item = (&'static Setting, &Effective)> {
        SETTINGS.iter().map(|setting| (setting, &self.values[setting.key]))
    }

    /// The modes of single limits, and where they were set.
    pub(crate) fn modes(&self) -> impl Iterator<Item = (&'static str, Mode, &Origin)> {
        self.modes.iter().map(|(name, (mode, origin))| (*name, *mode, origin))
    }

    /// Tells configurations apart: of what is in force, not of how it was written.
    pub(crate) fn fingerprint(&self) -> String {
        let mut text: String =
            self.effective().map(|(setting, effective)| format!("{}={}\n", setting.key, effective.text)).collect();
        text.extend(self.modes().map(|(limit, mode, _)| format!("{limit}={}\n", mode.as_str())));
        text += &format!("{:?}", self.prices);
        let hash =
            text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        format!("{hash:016x}")
    }
}

/// A setting's name in the environment.
pub(crate) fn variable(setting: &Setting) -> String {
    format!("{PREFIX}{}", setting.flag.replace('-', "_").to_uppercase())
}

/// Stands for a key that is not told.
const WITHHELD: &str = "withheld";

fn name_of(key: &str) -> String {
    SETTINGS.iter().find(|setting| setting.key == key).map(variable).expect("it is a setting")
}

/// What was called otherwise once, and what is set instead now.
const RENAMED: &[(&str, &str)] = &[("limits.utc_offset", "limits.time_zone")];

/// The setting that has taken another's place.
fn renamed(key: &str) -> Option<&'static Setting> {
    let (_, now) = RENAMED.iter().find(|(before, _)| *before == key)?;
    SETTINGS.iter().find(|setting| setting.key == *now)
}

/// What the project itself reads beside settings: the shim, and the tests.
const OURS: &[&str] =
    &["BIN", "SHIM_DEPTH", "SPAWNED", "TESTS_NO_DOCKER", "TEST_OTLP_CHILD", "TEST_OTLP_COST", "WRAPS", "WRITE_DOCS"];

fn is_ours(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|name| OURS.contains(&name))
}

/// What Kubernetes sets for a service that is called like us, or begins so; the first is an address, and no port that somebody chose.
fn is_kubernetes(name: &str, value: &str) -> bool {
    let name = format!("_{}", name.strip_prefix(PREFIX).unwrap_or(name));
    let numbered = |rest: &str| {
        let mut parts = rest.split('_');
        parts.next().is_some_and(|port| port.parse::<u16>().is_ok()) && matches!(parts.next(), Some("TCP" | "UDP" | "SCTP"))
    };
    name.ends_with("_PORT") && value.contains("://")
        || ["_SERVICE_HOST", "_SERVICE_PORT"].iter().any(|end| name.ends_with(end))
        || name.contains("_SERVICE_PORT_")
        || name.match_indices("_PORT_").any(|(at, port)| numbered(&name[at + port.len()..]))
}

/// A variable that means nothing, and may have been meant for something: it is said, and refuses nothing, since other programs of a
/// platform may share the prefix. Its name alone: the value may be a key.
fn stranger(name: &str) -> Mistake {
    let words = |name: &str| -> BTreeSet<String> { name.split('_').map(str::to_owned).collect() };
    let its = words(name.strip_prefix(PREFIX).unwrap_or(name));
    let shared = |setting: &Setting| words(&setting.flag.replace('-', "_").to_uppercase()).intersection(&its).count();
    // Of those that have as many words of it the shortest.
    let nearest = SETTINGS.iter().max_by_key(|setting| (shared(setting), std::cmp::Reverse(setting.flag.len())));
    let remedy = match nearest.filter(|setting| shared(setting) > 0) {
        Some(nearest) => format!("the nearest is {}", variable(nearest)),
        None => String::from("`agent-sidecar check --print` lists what there is"),
    };
    // A name may hold anything but `=`.
    let name = name.chars().take(100).flat_map(char::escape_default).collect();
    Mistake { origin: Origin::Environment(name), what: String::from("no setting is called so, and nothing reads it"), remedy }
}

/// A variable that means nothing and was meant for one of ours: a limit that nobody holds costs money.
fn slip(name: &str) -> Option<Mistake> {
    let before = RENAMED
        .iter()
        .find(|(before, _)| before.rsplit('.').next().map(str::to_uppercase).as_deref() == name.strip_prefix(PREFIX));
    if let Some(now) = before.and_then(|(before, _)| renamed(before)) {
        return Some(Mistake {
            origin: Origin::Environment(name.to_owned()),
            what: String::from("there is no such variable any more"),
            remedy: format!("set {} instead; it is {}", variable(now), now.help),
        });
    }
    if name == "AGENT_SIDECAR_CONFIG" {
        return Some(Mistake {
            origin: Origin::Environment(name.to_owned()),
            what: String::from("there is no such variable"),
            remedy: format!("the file is {DEFAULT_FILE}; only `--config` names another"),
        });
    }
    // The names that somebody would make of the keys are as near as can be.
    let meant = SETTINGS
        .iter()
        .find(|setting| *name == format!("{PREFIX}{}", setting.key.replace('.', "_").to_uppercase()))
        .map(variable)
        .or_else(|| {
            let known: Vec<String> = SETTINGS.iter().map(variable).collect();
            near(name, known.iter().map(String::as_str), |name| name.strip_prefix(PREFIX).unwrap_or(name)).map(str::to_owned)
        })?;
    Some(Mistake {
        origin: Origin::Environment(name.to_owned()),
        what: String::from("there is no such variable"),
        remedy: format!("did you mean {meant}?"),
    })
}

#[cfg(test)]
mod tests;

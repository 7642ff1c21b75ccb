//! What happened, each fact once: the vocabulary of every fold over a session.
//!
//! An [`crate::event::Event`] is what a CLI said, in its dialect, perhaps twice; an [`Update`] is what that meant. Folds match on it
//! without `_`, so that a new fact has to be thought about in each of them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::detect::why::Why;
use crate::limit::{Limit, Mode, Scope};
use crate::monitor::Exit;
use crate::tokens::{Tokens, Usd};
use crate::who::{Guarded, Shared};

/// Declares an enum whose variants are label values, with `as_str` and serde in step.
macro_rules! labels {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name { $($(#[$vdoc])* #[serde(rename = $text)] $variant),* }
        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$variant),*];
            /// The label's value.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),* }
            }
        }
    };
}
pub(crate) use labels;

labels! {
    /// Who used it.
    Source { Main = "main", Subagent = "subagent", Unattributed = "unattributed" }
}
labels! {
    /// Who says so.
    Basis {
        /// The CLI: a result, or its answer to `get_usage`.
        Confirmed = "confirmed",
        /// The stream and our price table.
        Estimate = "estimate",
    }
}
labels! { Direction { Over = "over", Under = "under" } }
labels! {
    /// Why the CLI's running totals started again.
    ResetCause { Clear = "clear", Restart = "restart", Decrease = "decrease" }
}
labels! {
    /// How a session began.
    Start { Fresh = "fresh", Resume = "resume", Continue = "continue", Fork = "fork", Clear = "clear" }
}
labels! {
    /// How a user turn ended.
    Outcome {
        Success = "success",
        /// The CLI calls API failures a success with an error.
        SuccessIsError = "success_is_error",
        MaxTurns = "error_max_turns",
        DuringExecution = "error_during_execution",
        MaxBudget = "error_max_budget",
        StructuredOutput = "error_structured_output",
        /// The process ended in good order without a result for it.
        NoResult = "no_result",
        StuckKilled = "stuck_killed",
        LimitStopped = "limit_stopped",
        Crashed = "crashed",
        Interrupted = "interrupted",
    }
}

impl Outcome {
    /// `good`, `bad`, or `stopped` on purpose.
    pub fn class(self) -> &'static str {
        match self {
            Outcome::Success => "good",
            Outcome::LimitStopped | Outcome::Interrupted | Outcome::MaxTurns | Outcome::MaxBudget => "stopped",
            Outcome::SuccessIsError
            | Outcome::DuringExecution
            | Outcome::StructuredOutput
            | Outcome::NoResult
            | Outcome::StuckKilled
            | Outcome::Crashed => "bad",
        }
    }
}

labels! {
    /// How a tool call ended.
    ToolOutcome {
        Ok = "ok", Error = "error", Denied = "denied", Interrupted = "interrupted",
        /// The process ended before its result.
        Lost = "lost",
    }
}
labels! {
    /// What the agent is doing. Its times add up to the wall clock.
    Activity {
        Starting = "starting", Model = "model", Tool = "tool", Permission = "permission", RetryBackoff = "retry_backoff",
        Compacting = "compacting",
        /// Before the first message.
        WaitingInput = "waiting_input",
        /// Between two turns, with nothing in the background.
        Idle = "idle",
        Stuck = "stuck",
        /// On its way out.
        Draining = "draining",
    }
}

impl Activity {
    /// Whether the agent works: then it is not idle, however silent it is.
    pub fn is_work(self) -> bool {
        match self {
            Activity::Starting
            | Activity::Model
            | Activity::Tool
            | Activity::Permission
            | Activity::RetryBackoff
            | Activity::Compacting
            | Activity::Stuck => true,
            Activity::WaitingInput | Activity::Idle | Activity::Draining => false,
        }
    }
}

labels! {
    /// What is done about a limit, gentlest first.
    Step { Warn = "warn", Refuse = "refuse", Interrupt = "interrupt", End = "stop", Terminate = "term", Kill = "kill" }
}
labels! {
    /// Why the process ended.
    ExitReason {
        Clean = "clean", Error = "error", Signal = "signal", Oom = "oom", InitFailed = "init_failed", Limit = "limit",
        Idle = "idle", Stuck = "stuck", Shutdown = "shutdown",
    }
}
labels! {
    /// Why a turn has no result.
    MissingCause {
        Crash = "crash", Signal = "signal", Oom = "oom", Truncated = "truncated", Limit = "limit", Unknown = "unknown",
    }
}
labels! {
    /// What a silence that lasts too long is called.
    Stall { Startup = "startup", NoEvent = "no_event", NoResult = "no_result", PostResult = "post_result", Tool = "tool",
        Frozen = "frozen", Uninterruptible = "uninterruptible", NetworkDead = "network_dead", Spinning = "spinning" }
}
labels! {
    /// What tools do.
    ToolClass { File = "file", Shell = "shell", Web = "web", Mcp = "mcp", Agent = "agent", Other = "other" }
}
labels! {
    /// What the sidecar asks the CLI itself.
    OwnRequest {
        GetUsage = "get_usage", Interrupt = "interrupt", EndSession = "end_session",
        /// Have the CLI turn away what the app says next.
        Refuse = "refuse",
        /// The same for as long as a shared budget is used up.
        Hold = "hold",
    }
}

labels! {
    /// What people have asked of an agent.
    Wish { Pause = "pause", Resume = "resume", Interrupt = "interrupt", Stop = "stop", Raise = "raise" }
}

/// An increment of spending: never counted before, never to be counted again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spent {
    pub session: String,
    pub model: String,
    pub source: Source,
    pub basis: Basis,
    pub tokens: Tokens,
    /// What is paid for it, in dollars.
    pub cost: Usd,
    /// What it is without discounts and prices of one's own.
    pub list: Usd,
    /// What the CLI says it costs.
    pub reported: Usd,
    pub web_searches: u64,
    /// Nobody prices the model: the cost is the CLI's guess, the configured fallback, or zero.
    pub unpriced: bool,
}

/// An answer of the model, whole. Boxed where it is a fact: there are few of these among thousands that are small.
#[derive(Clone, Debug, PartialEq)]
pub struct Answered {
    pub session: String,
    pub answer: String,
    pub model: String,
    pub source: Source,
    /// The call whose subagent is answered.
    pub parent: Option<String>,
    pub stop_reason: Option<String>,
    pub duration: Option<Duration>,
    /// How long ago its last frame came.
    pub since: Duration,
    /// As far as the API told; `settled`: it told the end of it.
    pub tokens: Tokens,
    pub settled: bool,
}

/// One decision about a limit, with its numbers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    pub session: String,
    pub limit: Limit,
    pub scope: Scope,
    pub mode: Mode,
    pub step: Step,
    /// In the limit's own unit: dollars, tokens, turns, seconds, bytes.
    pub observed: f64,
    pub ceiling: f64,
    /// What share of the ceiling was passed: 0.5, 0.8, 0.95, 1.
    pub level: f64,
    /// What the agent was about, where time ran out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<Why>,
    /// Not the budget, but this agent's fair share of it: of that are the numbers.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub share: bool,
}

/// A fact.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    ProcessStarted,
    /// The CLI said its first word.
    Spoke {
        after: Duration,
    },
    Identified {
        version: String,
        permission_mode: String,
        api_key_source: String,
    },
    /// The model that the main loop is to ask from here on.
    ModelChosen {
        model: String,
    },
    SessionStarted {
        session: String,
        start: Start,
        /// The session that it goes on from, where the CLI names them with ids.
        from: Option<String>,
    },
    /// The main loop is at it.
    TurnStarted {
        session: String,
        turn: u64,
    },
    TurnEnded {
        session: String,
        turn: u64,
        outcome: Outcome,
        reason: Option<String>,
        duration: Duration,
        answers: u64,
        /// As the CLI counts them, if it did.
        num_turns: Option<u64>,
        cost: Usd,
        /// Boxed for its size: facts are moved by the thousand.
        tokens: Box<Tokens>,
        /// The CLI sent a result for it.
        confirmed: bool,
    },
    /// The main loop asks the model.
    Requested {
        /// The CLI says so; else it must be doing so, having all that it waited for.
        said: bool,
    },
    /// The first frame of an answer.
    Answering {
        answer: String,
        model: String,
        /// The call whose subagent is answered.
        parent: Option<String>,
        /// Its frames are shown as they come.
        streamed: bool,
    },
    /// An answer of the model is complete.
    Answered(Box<Answered>),
    FirstToken {
        model: String,
        after: Duration,
    },
    ContextUsed {
        ratio: f64,
    },
    Spent(Spent),
    Corrected {
        session: String,
        model: String,
        direction: Direction,
        usd: Usd,
        /// The same at list prices.
        list: Usd,
        tokens: Tokens,
    },
    /// Of what was spent on a session, this much was never confirmed.
    Unconfirmed {
        session: String,
        usd: Usd,
    },
    CounterReset {
        cause: ResetCause,
    },
    ToolStarted {
        session: String,
        call: String,
        tool: String,
        /// The call whose subagent calls it.
        parent: Option<String>,
        /// Of its input.
        bytes: usize,
    },
    /// A sign of life of a long call.
    ToolProgressed {
        call: String,
        after: Duration,
    },
    ToolEnded {
        session: String,
        call: String,
        tool: String,
        outcome: ToolOutcome,
        duration: Duration,
    },
    /// Somebody is asked, about a call or about something else.
    PermissionAsked {
        request: String,
        call: Option<String>,
        tool: String,
    },
    PermissionDecided {
        request: String,
        call: Option<String>,
        tool: String,
        decision: &'static str,
        wait: Duration,
    },
    PermissionDenied {
        tool: String,
    },
    /// The CLI runs a hook, or has the app run one.
    HookStarted {
        hook: String,
        event: String,
    },
    HookEnded {
        hook: String,
        event: String,
        outcome: String,
        duration: Duration,
    },
    /// The app answered for a hook of its own.
    HookAnswered {
        hook: String,
        outcome: &'static str,
    },
    SubagentStarted {
        session: String,
        kind: String,
        /// The call that started it.
        call: String,
        task: Option<String>,
        depth: u64,
        background: bool,
    },
    SubagentEnded {
        call: String,
        outcome: &'static str,
        duration: Duration,
    },
    Subagents {
        active: usize,
        depth: u64,
    },
    BackgroundTasks {
        agents: usize,
        shells: usize,
        others: usize,
    },
    Compacting,
    Compacted {
        trigger: String,
        pre_tokens: u64,
        post_tokens: u64,
        duration: Duration,
    },
    /// A request failed and is made again.
    Retried {
        session: String,
        error: String,
        /// The call whose subagent's request it is.
        parent: Option<String>,
        /// Of HTTP, where there was an answer.
        status: Option<u64>,
        delay: Option<Duration>,
    },
    /// A request failed for good.
    ApiFailed {
        session: String,
        error: String,
        parent: Option<String>,
    },
    RateLimit {
        window: String,
        utilization: Option<f64>,
        resets_at: Option<f64>,
    },
    McpServer {
        server: String,
        up: bool,
    },
    /// A tool that lives in the app is called.
    McpStarted {
        request: String,
        server: String,
    },
    McpCalled {
        request: String,
        server: String,
        duration: Duration,
    },
    /// The agent was in a state for this long, and is now in another.
    Was {
        state: Activity,
        lasted: Duration,
        now: Activity,
    },
    Stalled {
        kind: Stall,
        on: bool,
        why: Option<Why>,
    },
    /// The agent shares something with that of another tenant.
    TenantConflict {
        kind: Shared,
        owner: String,
        action: Guarded,
    },
    /// The container was there for so long, on this agent's account, and costs so much.
    ContainerUsed {
        session: String,
        time: Duration,
        cost: Usd,
    },
    /// The kernel killed a process below us for memory.
    OomKilled {
        role: &'static str,
        memory_bytes: u64,
    },
    Resumed {
        outcome: &'static str,
    },
    Active {
        unix: Duration,
    },
    /// So often in a row the agent did the same, or failed alike.
    Repeating {
        streak: u64,
    },
    /// A circle that has come so far that it is told, and what is done about it, or would be.
    LoopDetected {
        kind: Limit,
        streak: u64,
        action: Step,
    },
    LimitUsed {
        limit: Limit,
        scope: Scope,
        ratio: f64,
    },
    Decided(Decision),
    /// Somebody has asked this of the agent. What was raised, and to what.
    Ordered {
        session: String,
        order: Wish,
        limit: Option<Limit>,
        scope: Option<Scope>,
        ceiling: Option<f64>,
    },
    /// The agent is quiet after a step was taken.
    Enforced {
        scope: Scope,
        step: Step,
        latency: Duration,
        overshoot: Option<Usd>,
    },
    IdleShutdown,
    Stopping {
        step: Step,
    },
    StepEnded {
        step: Step,
        lasted: Duration,
    },
    /// The process is gone: what was open ends with what follows, and with nobody's word but ours.
    Gone {
        cause: MissingCause,
    },
    ResultMissing {
        session: String,
        cause: MissingCause,
    },
    Exited {
        reason: ExitReason,
        session: String,
        /// With what it ended, where somebody saw it.
        exit: Option<Exit>,
    },
    SessionEnded {
        session: String,
        cost: Usd,
    },
    Asked {
        request: OwnRequest,
        answered: bool,
    },
    /// A line was understood.
    Heard {
        kind: &'static str,
    },
    /// A line of a type that nobody told us of.
    Unknown {
        kind: String,
    },
    /// A line, or this many fields of one, could not be read.
    Unread {
        reason: &'static str,
        count: u64,
    },
    LongestLine {
        bytes: usize,
    },
    Lost {
        bytes: u64,
    },
}

//! What a CLI can say, in words of ours. A dialect ([`claude_code`]) turns lines into these; the session turns these into facts.
//!
//! Events carry what accounting, limits, health and traces need, and nothing of the content: no prompt, no tool input, no tool
//! output, no path. An event may be partial or said twice; that is for the session to sort out.

pub mod claude_code;
mod json;

use crate::tokens::Tokens;

/// One line, understood.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Message {
    pub session_id: Option<String>,
    /// The tool call that this line belongs to: a subagent's lines carry the id of the call that started it.
    pub parent: Option<String>,
    pub event: Event,
    /// Known fields that did not have the type they promise; they were read as absent.
    pub misshapen: u32,
}

#[derive(Clone, Debug, PartialEq, Default)]
pub enum Event {
    Init(Init),
    Status {
        status: Status,
        permission_mode: Option<String>,
        compact_failed: bool,
    },
    Assistant(Assistant),
    User(User),
    Stream(Stream),
    Result(Box<TurnResult>),
    ApiRetry {
        /// The line's own name, by which one that comes twice is known.
        uuid: Option<String>,
        attempt: u64,
        delay_ms: u64,
        status: Option<u64>,
        error: Option<String>,
    },
    ToolProgress {
        uuid: Option<String>,
        tool: Option<String>,
        call: Option<String>,
        elapsed_s: f64,
        heartbeat: bool,
        retry_error: Option<String>,
    },
    TaskStarted(Task),
    TaskProgress {
        task: String,
    },
    TaskUpdated {
        task: String,
        status: Option<String>,
    },
    TaskEnded {
        task: String,
        status: Option<String>,
    },
    /// The live background tasks, all of them.
    BackgroundTasks {
        tasks: Vec<(String, Option<String>)>,
    },
    ThinkingTokens,
    Compacted {
        trigger: Option<String>,
        pre_tokens: u64,
        post_tokens: u64,
        duration_ms: u64,
    },
    ConversationReset,
    PermissionDenied {
        tool: Option<String>,
        call: Option<String>,
    },
    HookStarted {
        hook: String,
        event: Option<String>,
    },
    HookEnded {
        hook: String,
        event: Option<String>,
        outcome: Option<String>,
        exit_code: Option<i64>,
    },
    SessionState {
        state: SessionState,
    },
    ModelFallback {
        trigger: Option<String>,
        from: Option<String>,
        to: Option<String>,
    },
    RateLimit {
        status: Option<String>,
        windows: Vec<RateWindow>,
    },
    /// Entries of the CLI's own transcript, which carry an answer's final usage.
    Mirror {
        answers: Vec<MirroredAnswer>,
    },
    CommandLifecycle {
        state: Option<String>,
    },
    ControlRequest {
        id: String,
        request: Request,
    },
    ControlResponse {
        id: String,
        ok: bool,
        answer: Answer,
    },
    ControlCancel {
        id: String,
    },
    KeepAlive,
    /// Of a type that the CLI documents and that says nothing to us.
    #[default]
    Known,
    /// Of a type nobody told us of: `type` and `subtype`, cut to a bounded length.
    Unknown {
        kind: String,
        subtype: Option<String>,
    },
}

impl Event {
    /// The event's label.
    pub fn kind(&self) -> &'static str {
        match self {
            Event::Init(_) => "init",
            Event::Status { .. } => "status",
            Event::Assistant(_) => "assistant",
            Event::User(_) => "user",
            Event::Stream(_) => "stream_event",
            Event::Result(_) => "result",
            Event::ApiRetry { .. } => "api_retry",
            Event::ToolProgress { .. } => "tool_progress",
            Event::TaskStarted(_) | Event::TaskProgress { .. } | Event::TaskUpdated { .. } | Event::TaskEnded { .. } => "task",
            Event::BackgroundTasks { .. } => "background_tasks",
            Event::ThinkingTokens => "thinking_tokens",
            Event::Compacted { .. } => "compact_boundary",
            Event::ConversationReset => "conversation_reset",
            Event::PermissionDenied { .. } => "permission_denied",
            Event::HookStarted { .. } | Event::HookEnded { .. } => "hook",
            Event::SessionState { .. } => "session_state",
            Event::ModelFallback { .. } => "model_fallback",
            Event::RateLimit { .. } => "rate_limit",
            Event::Mirror { .. } => "transcript_mirror",
            Event::CommandLifecycle { .. } => "command_lifecycle",
            Event::ControlRequest { .. } => "control_request",
            Event::ControlResponse { .. } => "control_response",
            Event::ControlCancel { .. } => "control_cancel",
            Event::KeepAlive => "keep_alive",
            Event::Known => "known",
            Event::Unknown { .. } => "unknown",
        }
    }
}

impl Broken {
    /// The reason's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Broken::NotJson => "not_json",
            Broken::NotObject => "not_object",
            Broken::NoType => "no_type",
            Broken::Truncated => "truncated",
            Broken::TooLong => "too_long",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Default)]
pub struct Init {
    pub model: Option<String>,
    pub version: Option<String>,
    pub permission_mode: Option<String>,
    pub api_key_source: Option<String>,
    /// Name and status of each MCP server.
    pub mcp_servers: Vec<(String, String)>,
    /// The CLI's pid, where the name of its socket tells it: a new one is a new process.
    pub pid: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Status {
    Requesting,
    Compacting,
    #[default]
    None,
    Other,
}

/// One content block of an answer (the CLI writes a line per block, each repeating the answer's first usage).
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Assistant {
    pub id: Option<String>,
    pub model: Option<String>,
    pub usage: Option<Usage>,
    pub stop_reason: Option<String>,
    pub blocks: Vec<Block>,
    /// The category of an API failure (`rate_limit`, `overloaded`, …), on synthetic answers.
    pub error: Option<String>,
    pub aborted: bool,
    pub subagent_type: Option<String>,
}

/// The CLI's own messages (errors, local commands) name this as their model; they cost nothing.
pub const SYNTHETIC_MODEL: &str = "<synthetic>";

#[derive(Clone, Debug, PartialEq)]
pub enum Block {
    /// Text or thinking: its length in bytes of JSON, for estimates only.
    Text {
        bytes: usize,
    },
    Thinking {
        bytes: usize,
    },
    /// `input_hash` tells equal calls apart from different ones, whatever the order of their input's keys; the input itself stays
    /// where it is.
    ToolUse {
        call: String,
        tool: String,
        input_bytes: usize,
        input_hash: u64,
        aim: Aim,
    },
    Other,
}

/// What a call is there for, as far as its name and its command tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Aim {
    #[default]
    Work,
    /// To do one small thing that shows nowhere in what it says: a key that is pressed.
    Press,
    /// To see how something stands that moves by itself: a pipeline, a service, a log.
    Look,
    /// To let time pass: a command that sleeps or watches, a tool that polls.
    Wait,
}

#[derive(Clone, Debug, PartialEq, Default)]
pub struct User {
    pub results: Vec<ToolResult>,
    /// Text of a person or of the app (not a tool's result).
    pub prompt: bool,
    /// Made by the CLI itself: recovery prompts, the interrupt's marker.
    pub synthetic: bool,
    pub replay: bool,
    /// The app's own id for its message.
    pub uuid: Option<String>,
    /// `shouldQuery: false`: goes into the history without asking the model.
    pub silent: bool,
}

#[derive(Clone, Debug, PartialEq, Default)]
pub struct ToolResult {
    pub call: String,
    pub error: bool,
    /// Rejected by a rule, a callback or a person.
    pub denied: bool,
    /// Ended from outside while it ran.
    pub interrupted: bool,
    /// A command that was run, and failed.
    pub ran: bool,
    /// Of what it says, and how much that is.
    pub hash: u64,
    pub bytes: usize,
    /// Of an error's beginning, words with digits in them taken for the same: what went wrong, whichever line or file it was.
    pub error_hash: u64,
}

/// The API's own stream, passed through by the CLI (main thread, partial messages on).
#[derive(Clone, Debug, PartialEq)]
pub enum Stream {
    MessageStart {
        id: Option<String>,
        model: Option<String>,
        usage: Option<Usage>,
        ttft_ms: Option<u64>,
    },
    BlockStart {
        tool: Option<(String, String)>,
    },
    /// About this many bytes of text, thinking or tool input.
    Delta {
        bytes: usize,
    },
    BlockStop,
    MessageDelta {
        usage: Option<Usage>,
        stop_reason: Option<String>,
    },
    MessageStop,
    Other,
}

/// What one API answer used, as the API says it: `input` excludes what was cached.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Usage {
    pub tokens: Tokens,
    pub web_searches: u64,
    /// `us` costs a surcharge.
    pub inference_geo: Option<String>,
    pub speed: Option<String>,
    /// Fields that were present: an absent or zero input in a later frame must not undo an earlier one.
    pub has_input: bool,
}

/// One model's running totals as the CLI keeps them.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct ModelTotal {
    /// The key under which the CLI keeps it: the name that was asked for.
    pub model: String,
    pub canonical: Option<String>,
    pub tokens: Tokens,
    pub cost_usd: f64,
    pub web_searches: u64,
    /// Cache writes are told by how long they are kept; else all of them are taken for the shorter kind.
    pub told_apart: bool,
    /// `list`, `managed`, `unknown`.
    pub cost_basis: Option<String>,
    pub context_window: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Default)]
pub struct TurnResult {
    pub uuid: Option<String>,
    pub subtype: Option<String>,
    pub is_error: bool,
    pub terminal_reason: Option<String>,
    pub num_turns: u64,
    pub duration_ms: u64,
    pub duration_api_ms: u64,
    pub total_cost_usd: Option<f64>,
    /// Main loop, this turn: incomplete by design, kept for checks only.
    pub usage: Option<Usage>,
    /// Absent where it cannot be read.
    pub model_usage: Option<Vec<ModelTotal>>,
    /// The exact delta since the last result of this process, where the CLI offers it.
    pub since_last: Option<Vec<ModelTotal>>,
    pub index: Option<u64>,
    pub queued: u64,
    pub local_command: Option<String>,
    pub origin: Option<String>,
    pub api_error_status: Option<u64>,
    pub ttft_ms: Option<u64>,
    pub permission_denials: u64,
    pub startup_failure: Option<String>,
    pub subagents_spawned: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Default)]
pub struct Task {
    pub task: String,
    pub call: Option<String>,
    /// `local_agent`, `local_bash`, …
    pub kind: Option<String>,
    pub background: bool,
    pub subagent_type: Option<String>,
    pub depth: u64,
    pub parent_task: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SessionState {
    Idle,
    #[default]
    Running,
    RequiresAction,
}

#[derive(Clone, Debug, PartialEq, Default)]
pub struct RateWindow {
    pub window: String,
    pub utilization: Option<f64>,
    pub resets_at: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Default)]
pub struct MirroredAnswer {
    pub id: String,
    pub model: Option<String>,
    pub usage: Usage,
    pub stop_reason: Option<String>,
    /// Written by a subagent.
    pub sidechain: bool,
}

/// What one side asks the other on the control channel.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    Initialize,
    CanUseTool {
        tool: Option<String>,
        call: Option<String>,
    },
    HookCallback {
        event: Option<String>,
    },
    /// `id` is the JSON-RPC id, absent for notifications.
    McpMessage {
        server: Option<String>,
        method: Option<String>,
        id: bool,
    },
    Interrupt,
    EndSession,
    GetUsage,
    /// Anything else, by its subtype cut to a bounded length.
    Other(String),
}

/// What an answer on the control channel tells us.
#[derive(Clone, Debug, PartialEq, Default)]
pub enum Answer {
    /// Running totals, from `get_usage`.
    Usage {
        total_cost_usd: Option<f64>,
        models: Vec<ModelTotal>,
    },
    Initialized {
        pid: Option<u32>,
        version: Option<String>,
    },
    /// The app's word on a tool.
    Permission {
        allow: bool,
    },
    #[default]
    Other,
}

/// Why a line could not become a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Broken {
    /// Not JSON at all.
    NotJson,
    /// JSON, but not an object (nor a list of them, where the format allows one).
    NotObject,
    /// An object without a `type`.
    NoType,
    /// Cut off: the stream ended inside the line.
    Truncated,
    /// Longer than we keep, even with its long strings shortened.
    TooLong,
}

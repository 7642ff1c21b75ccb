//! Claude Code's stream-json, in both directions, and its `json` output.
//!
//! A line is walked over once, taking what its type makes interesting into an [`Event`] and checking the rest to be JSON. Key order is
//! not stable, so nothing is matched by its place, except in [`delta`], the short cut for the thousands of lines of a streamed answer,
//! which gives up unless it is certain.

use super::json::{ELEMENTS, Json, Str};
use super::{Broken, Event, Init, Message, MirroredAnswer, RateWindow, SessionState, Status, Stream, Task, TurnResult};

mod aim;
mod control;
mod message;
mod tool;
mod usage;

use control::{control_request, control_response};
use message::{Body, assistant, stream, user};
use usage::{totals, usage};

/// A line of the CLI's stdout.
///
/// # Errors
/// What kept it from being a message.
pub fn parse_stdout(line: &[u8]) -> Result<Message, Broken> {
    match delta(line) {
        Some(message) => Ok(message),
        None => parse(line),
    }
}

/// A line that the app wrote.
///
/// # Errors
/// What kept it from being a message.
pub fn parse_stdin(line: &[u8]) -> Result<Message, Broken> {
    parse(line)
}

/// A line that is a list of messages, as `--output-format json --verbose` writes it. Of one that breaks off, the messages before the
/// break count.
///
/// # Errors
/// What kept it from being a list; elements that are no messages are errors of their own.
pub fn parse_array(line: &[u8]) -> Result<Vec<Result<Message, Broken>>, Broken> {
    let (mut json, mut messages) = (Json::new(line), Vec::new());
    if json.peek() != b'[' {
        return Err(parse(line).err().unwrap_or(Broken::NotObject));
    }
    json.list(|json| {
        let start = json.at();
        json.skip();
        if json.intact() {
            messages.push(parse_stdout(json.since(start)));
        }
    });
    match json.end() {
        Err(broken) if messages.is_empty() => return Err(broken),
        Err(broken) => messages.push(Err(broken)),
        Ok(()) => {}
    }
    Ok(messages)
}

/// A line's own fields. Where its type comes first, they are read as they come; else they are found first and read when it is known.
#[derive(Default)]
struct Line<'a> {
    kind: Option<Str<'a>>,
    subtype: Option<Str<'a>>,
    session_id: Option<Str<'a>>,
    parent: Option<Str<'a>>,
    fields: Fields<'a>,
}

enum Fields<'a> {
    /// Behind this key the rest is still to come.
    Ahead(Option<Str<'a>>),
    /// Each key, and where its value begins.
    Found(Vec<(Str<'a>, usize)>),
}

impl Default for Fields<'_> {
    fn default() -> Self {
        Fields::Ahead(None)
    }
}

impl<'a> Line<'a> {
    /// Goes as far as it takes to know the type.
    fn find(json: &mut Json<'a>) -> Line<'a> {
        let mut line = Line::default();
        let mut next = json.first_key();
        while let Some(key) = next {
            if !line.own(key, json) {
                let certain = match line.kind {
                    // Only of this one is more to be known.
                    Some(kind) => !kind.escaped && (kind.raw != b"system" || line.subtype.is_some()),
                    None => false,
                };
                if certain {
                    break;
                }
                let mut found = Vec::with_capacity(40);
                while let Some(key) = next {
                    if !line.own(key, json) {
                        json.value(|json| {
                            found.push((key, json.at()));
                        });
                    }
                    next = json.next_key();
                }
                if json.end().is_ok() {
                    line.fields = Fields::Found(found);
                }
                return line;
            }
            next = json.next_key();
        }
        line.fields = Fields::Ahead(next);
        line
    }

    /// Reads a field that every line may have; whether it is one. What the line is, is settled when it is said first.
    #[inline]
    fn own(&mut self, key: Str<'a>, json: &mut Json<'a>) -> bool {
        match &*key.bytes() {
            b"type" => self.kind = self.kind.or(json.text()),
            b"subtype" => self.subtype = self.subtype.or(json.text()),
            b"session_id" => self.session_id = json.text(),
            b"parent_tool_use_id" => self.parent = json.text(),
            _ => return false,
        }
        true
    }

    /// Each other field in turn, of which `each` reads what it wants.
    #[inline]
    fn read(&mut self, json: &mut Json<'a>, mut each: impl FnMut(&[u8], &mut Json<'a>)) {
        match std::mem::take(&mut self.fields) {
            Fields::Found(fields) => {
                for (key, at) in fields {
                    json.seek(at);
                    each(&key.bytes(), json);
                }
            }
            Fields::Ahead(mut next) => {
                while let Some(key) = next {
                    if !self.own(key, json) {
                        json.value(|json| each(&key.bytes(), json));
                    }
                    next = json.next_key();
                }
            }
        }
    }

    fn subtype(&self) -> Option<String> {
        self.subtype.map(|subtype| subtype.cut(LABEL))
    }
}

/// Bytes of the name of something that nobody told us of.
const LABEL: usize = 64;

fn parse(text: &[u8]) -> Result<Message, Broken> {
    let mut json = Json::new(text);
    if json.peek() != b'{' {
        json.skip();
        json.end()?;
        return Err(Broken::NotObject);
    }
    let mut line = Line::find(&mut json);
    let Some(kind) = line.kind else {
        json.end()?;
        return Err(Broken::NoType);
    };
    let ahead = matches!(line.fields, Fields::Ahead(_));
    let event = event(&kind.bytes(), &mut line, &mut json);
    if ahead {
        // Whatever the type did not ask for is to be JSON, too.
        line.read(&mut json, |_, _| {});
        json.end()?;
    }
    Ok(Message {
        session_id: line.session_id.map(Str::name),
        // Of a sign of life this is the call itself, on the main thread, too: see `tool_progress`.
        parent: line.parent.map(Str::name).filter(|parent| match &event {
            Event::ToolProgress { call, .. } => call.as_ref() != Some(parent),
            _ => true,
        }),
        event,
        misshapen: json.misshapen,
    })
}

/// A streamed delta of the main thread, if the line is certainly one: text and tool input come in thousands of these.
///
/// Certain means: the exact opening that the CLI writes, one string, and the exact keys behind it, to the last byte. Whatever differs
/// goes the long way.
#[inline]
fn delta(line: &[u8]) -> Option<Message> {
    const HEAD: &[u8] = br#"{"type":"stream_event","event":{"type":"content_block_delta","index":"#;
    const DELTA: &[u8] = br#","delta":{"type":""#;
    const KINDS: [&[u8]; 3] =
        [br#"text_delta","text":"#, br#"input_json_delta","partial_json":"#, br#"thinking_delta","thinking":"#];
    const SESSION: &[u8] = br#"}},"session_id":"#;
    const UUID: &[u8] = br#","parent_tool_use_id":null,"uuid":"#;
    // Only beside thinking, and in this place.
    const DISPLAY: &[u8] = br#","thinking_display":"#;
    const API: &[u8] = br#","api_message_id":"#;
    let rest = line.strip_prefix(HEAD)?;
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if digits == 0 || digits > 1 && rest[0] == b'0' {
        return None;
    }
    let rest = rest[digits..].strip_prefix(DELTA)?;
    let (text, rest) = string(KINDS.iter().find_map(|kind| rest.strip_prefix(*kind))?)?;
    let (session_id, rest) = string(rest.strip_prefix(SESSION)?)?;
    let (_, mut rest) = string(rest.strip_prefix(UUID)?)?;
    for key in [DISPLAY, API] {
        if let Some(value) = rest.strip_prefix(key) {
            (_, rest) = string(value)?;
        }
    }
    (rest == b"}").then(|| Message {
        session_id: Some(session_id.name()),
        parent: None,
        event: Event::Stream(Stream::Delta { bytes: text.len() }),
        misshapen: 0,
    })
}

/// A string at the beginning of the bytes, and what follows it.
#[inline]
fn string(bytes: &[u8]) -> Option<(Str<'_>, &[u8])> {
    if bytes.first() != Some(&b'"') {
        return None;
    }
    let mut json = Json::new(bytes);
    let string = json.string();
    json.intact().then(|| (string, json.rest()))
}

fn event<'a>(kind: &[u8], line: &mut Line<'a>, json: &mut Json<'a>) -> Event {
    match kind {
        b"assistant" => Event::Assistant(assistant(line, json)),
        b"user" => Event::User(user(line, json)),
        b"stream_event" => Event::Stream(stream(line, json)),
        b"result" => Event::Result(Box::new(result(line, json))),
        b"system" => system(line, json),
        b"tool_progress" => tool_progress(line, json),
        b"control_request" => control_request(line, json),
        b"control_response" => control_response(line, json),
        b"control_cancel_request" => {
            let mut id = None;
            line.read(json, |key, json| {
                if key == b"request_id" {
                    id = json.name();
                }
            });
            Event::ControlCancel { id: id.unwrap_or_default() }
        }
        b"keep_alive" => Event::KeepAlive,
        b"conversation_reset" => Event::ConversationReset,
        b"command_lifecycle" => {
            let mut state = None;
            line.read(json, |key, json| {
                if key == b"state" {
                    state = json.name();
                }
            });
            Event::CommandLifecycle { state }
        }
        b"transcript_mirror" => mirror(line, json),
        b"rate_limit_event" => rate_limit(line, json),
        b"update_environment_variables" | b"streamlined_text" | b"streamlined_tool_use_summary" => Event::Known,
        kind if known(kind) => Event::Known,
        _ => Event::Unknown { kind: line.kind.map(|kind| kind.cut(LABEL)).unwrap_or_default(), subtype: line.subtype() },
    }
}

/// Messages that the CLI documents and that say nothing to us. Some are types of their own, some subtypes of `system`.
fn known(name: &[u8]) -> bool {
    matches!(
        name,
        b"active_goal"
            | b"auth_status"
            | b"commands_changed"
            | b"control_request_progress"
            | b"elicitation_complete"
            | b"files_persisted"
            | b"hook_progress"
            | b"informational"
            | b"local_command_output"
            | b"memory_recall"
            | b"mirror_error"
            | b"model_refusal_fallback"
            | b"model_refusal_no_fallback"
            | b"notification"
            | b"plugin_install"
            | b"prompt_suggestion"
            | b"session_writes_lost"
            | b"tool_use_summary"
            | b"vcs_state_changed"
            | b"worker_shutting_down"
    )
}

fn system<'a>(line: &mut Line<'a>, json: &mut Json<'a>) -> Event {
    let subtype = line.subtype.map(Str::bytes).unwrap_or_default();
    match &*subtype {
        b"init" => Event::Init(init(line, json)),
        b"status" => {
            let (mut status, mut permission_mode, mut compact_failed) = (Status::None, None, false);
            line.read(json, |key, json| match key {
                b"status" => {
                    status = match json.text().map(Str::bytes).as_deref() {
                        Some(b"requesting") => Status::Requesting,
                        Some(b"compacting") => Status::Compacting,
                        Some(_) => Status::Other,
                        None => Status::None,
                    }
                }
                b"permissionMode" => permission_mode = json.name(),
                b"compact_result" => compact_failed = json.text().is_some_and(|result| result.bytes() != &b"success"[..]),
                _ => {}
            });
            Event::Status { status, permission_mode, compact_failed }
        }
        b"api_retry" => {
            let (mut uuid, mut attempt, mut delay_ms, mut status, mut error) = (None, None, None, None, None);
            line.read(json, |key, json| match key {
                b"uuid" => uuid = json.name(),
                b"attempt" => attempt = json.count(),
                b"retry_delay_ms" => delay_ms = json.count(),
                b"error_status" => status = json.count(),
                b"error" => error = json.name(),
                _ => {}
            });
            Event::ApiRetry { uuid, attempt: attempt.unwrap_or_default(), delay_ms: delay_ms.unwrap_or_default(), status, error }
        }
        b"task_started" | b"task_progress" | b"task_updated" | b"task_notification" => task(&subtype, line, json),
        b"background_tasks_changed" => {
            let mut tasks = Vec::new();
            line.read(json, |key, json| {
                if key == b"tasks" {
                    tasks = background_tasks(json);
                }
            });
            Event::BackgroundTasks { tasks }
        }
        b"thinking_tokens" => Event::ThinkingTokens,
        b"compact_boundary" => {
            let (mut trigger, mut pre, mut post, mut duration) = (None, None, None, None);
            line.read(json, |key, json| {
                if key == b"compact_metadata" {
                    json.object(|key, json| match key {
                        b"trigger" => trigger = json.name(),
                        b"pre_tokens" => pre = json.count(),
                        b"post_tokens" => post = json.count(),
                        b"duration_ms" => duration = json.count(),
                        _ => {}
                    });
                }
            });
            Event::Compacted {
                trigger,
                pre_tokens: pre.unwrap_or_default(),
                post_tokens: post.unwrap_or_default(),
                duration_ms: duration.unwrap_or_default(),
            }
        }
        b"permission_denied" => {
            let (mut tool, mut call) = (None, None);
            line.read(json, |key, json| match key {
                b"tool_name" => tool = json.name(),
                b"tool_use_id" => call = json.name(),
                _ => {}
            });
            Event::PermissionDenied { tool, call }
        }
        b"hook_started" | b"hook_response" => {
            let (mut hook, mut event, mut outcome, mut exit_code) = (None, None, None, None);
            line.read(json, |key, json| match key {
                b"hook_id" => hook = json.name(),
                b"hook_event" => event = json.name(),
                b"outcome" => outcome = json.name(),
                b"exit_code" => exit_code = json.number(),
                _ => {}
            });
            let hook = hook.unwrap_or_default();
            #[expect(clippy::cast_possible_truncation, reason = "an exit code; saturates")]
            let exit_code = exit_code.map(|code| code as i64);
            if *subtype == *b"hook_started" {
                Event::HookStarted { hook, event }
            } else {
                Event::HookEnded { hook, event, outcome, exit_code }
            }
        }
        b"session_state_changed" => {
            let mut state = SessionState::default();
            line.read(json, |key, json| {
                if key == b"state" {
                    state = match json.text().map(Str::bytes).as_deref() {
                        Some(b"idle") => SessionState::Idle,
                        Some(b"requires_action") => SessionState::RequiresAction,
                        _ => SessionState::Running,
                    };
                }
            });
            Event::SessionState { state }
        }
        b"model_fallback" => {
            let (mut trigger, mut from, mut to) = (None, None, None);
            line.read(json, |key, json| match key {
                b"trigger" => trigger = json.name(),
                b"original_model" => from = json.name(),
                b"fallback_model" => to = json.name(),
                _ => {}
            });
            Event::ModelFallback { trigger, from, to }
        }
        subtype if known(subtype) => Event::Known,
        _ => Event::Unknown { kind: String::from("system"), subtype: line.subtype() },
    }
}

fn init<'a>(line: &mut Line<'a>, json: &mut Json<'a>) -> Init {
    let mut init = Init::default();
    line.read(json, |key, json| match key {
        b"model" => init.model = json.name(),
        b"claude_code_version" => init.version = json.name(),
        b"permissionMode" => init.permission_mode = json.name(),
        b"apiKeySource" => init.api_key_source = json.name(),
        b"mcp_servers" => {
            init.mcp_servers.clear();
            json.list(|json| {
                let (mut name, mut status) = (None, None);
                json.object(|key, json| match key {
                    b"name" => name = json.name(),
                    b"status" => status = json.name(),
                    _ => {}
                });
                if let Some(name) = name.filter(|_| init.mcp_servers.len() < ELEMENTS) {
                    init.mcp_servers.push((name, status.unwrap_or_default()));
                }
            });
        }
        b"messaging_socket_path" => {
            init.pid = json.text().and_then(|path| {
                let path = path.bytes();
                let name = path.rsplit(|byte| *byte == b'/').next()?.strip_suffix(b".sock")?;
                std::str::from_utf8(name).ok()?.parse().ok()
            });
        }
        _ => {}
    });
    init
}

fn task<'a>(subtype: &[u8], line: &mut Line<'a>, json: &mut Json<'a>) -> Event {
    let (mut task, mut status) = (Task::default(), None);
    line.read(json, |key, json| match key {
        b"task_id" => task.task = json.name().unwrap_or_default(),
        b"tool_use_id" => task.call = json.name(),
        b"task_type" => task.kind = json.name(),
        b"is_backgrounded" => task.background = json.flag().unwrap_or_default(),
        b"subagent_type" => task.subagent_type = json.name(),
        b"spawn_depth" => task.depth = json.count().unwrap_or_default(),
        b"parent_task_id" => task.parent_task = json.name(),
        b"status" if subtype == b"task_notification" => status = json.name(),
        b"patch" if subtype == b"task_updated" => {
            json.object(|key, json| {
                if key == b"status" {
                    status = json.name();
                }
            });
        }
        _ => {}
    });
    match subtype {
        b"task_started" => Event::TaskStarted(task),
        b"task_progress" => Event::TaskProgress { task: task.task },
        b"task_updated" => Event::TaskUpdated { task: task.task, status },
        _ => Event::TaskEnded { task: task.task, status },
    }
}

fn background_tasks(json: &mut Json<'_>) -> Vec<(String, Option<String>)> {
    let mut tasks = Vec::new();
    json.list(|json| {
        let (mut id, mut kind) = (None, None);
        let object = json.object(|key, json| match key {
            b"task_id" => id = json.name(),
            b"task_type" => kind = json.name(),
            b"id" if id.is_none() => id = json.name(),
            b"type" if kind.is_none() => kind = json.name(),
            _ => {}
        });
        if object && tasks.len() < ELEMENTS {
            tasks.push((id.unwrap_or_default(), kind));
        }
    });
    tasks
}

fn result<'a>(line: &mut Line<'a>, json: &mut Json<'a>) -> TurnResult {
    let mut result = TurnResult::default();
    line.read(json, |key, json| match key {
        b"uuid" => result.uuid = json.name(),
        b"is_error" => result.is_error = json.flag().unwrap_or_default(),
        b"terminal_reason" => result.terminal_reason = json.name(),
        b"num_turns" => result.num_turns = json.count().unwrap_or_default(),
        b"duration_ms" => result.duration_ms = json.count().unwrap_or_default(),
        b"duration_api_ms" => result.duration_api_ms = json.count().unwrap_or_default(),
        b"total_cost_usd" => result.total_cost_usd = json.amount(),
        b"usage" => result.usage = usage(json),
        b"modelUsage" => result.model_usage = totals(json),
        b"model_usage_since_last_result" => result.since_last = totals(json),
        b"result_index" => result.index = json.count(),
        b"queued_turn_count" => result.queued = json.count().unwrap_or_default(),
        b"local_command" => result.local_command = json.name(),
        b"origin" => {
            result.origin = None;
            json.object_if_any(|key, json| {
                if key == b"kind" {
                    result.origin = json.name();
                }
            });
        }
        b"api_error_status" => result.api_error_status = json.count(),
        b"ttft_ms" => result.ttft_ms = json.count(),
        b"permission_denials" => {
            result.permission_denials = 0;
            json.list(|_| {
                result.permission_denials += 1;
            });
        }
        b"startup_failure_reason" => result.startup_failure = json.name(),
        b"subagent_stats" => {
            json.object(|key, json| {
                if key == b"spawned" {
                    result.subagents_spawned = json.count();
                }
            });
        }
        _ => {}
    });
    result.subtype = line.subtype.map(Str::name);
    result
}

/// A tool's sign of life, or a retry inside a subagent. A sign of life has an id of its own (`<call>-heartbeat-<n>`) and names its call
/// as the parent, on the main thread, too.
fn tool_progress<'a>(line: &mut Line<'a>, json: &mut Json<'a>) -> Event {
    let (mut uuid, mut tool, mut call, mut elapsed, mut heartbeat, mut retry_error): (_, _, Option<String>, _, _, _) =
        (None, None, None, None, None, None);
    line.read(json, |key, json| match key {
        b"uuid" => uuid = json.name(),
        b"tool_name" => tool = json.name(),
        b"tool_use_id" => call = json.name(),
        b"elapsed_time_seconds" => elapsed = json.amount(),
        b"heartbeat" => heartbeat = json.flag(),
        b"subagent_retry" => {
            let mut error = None;
            let retry = json.object(|key, json| {
                if key == b"error_category" {
                    error = json.name();
                }
            });
            retry_error = retry.then(|| error.unwrap_or_else(|| String::from("unknown")));
        }
        _ => {}
    });
    if let Some((own, beat)) = call.as_deref().and_then(|call| call.rsplit_once("-heartbeat-"))
        && beat.bytes().all(|byte| byte.is_ascii_digit())
    {
        call = Some(own.to_owned());
    }
    Event::ToolProgress {
        uuid,
        tool,
        call,
        elapsed_s: elapsed.unwrap_or_default(),
        heartbeat: heartbeat.unwrap_or_default(),
        retry_error,
    }
}

fn rate_limit<'a>(line: &mut Line<'a>, json: &mut Json<'a>) -> Event {
    let (mut info, mut status, mut windows, mut current) = (false, None, Vec::new(), RateWindow::default());
    line.read(json, |key, json| {
        if key == b"rate_limit_info" {
            info = json.object(|key, json| match key {
                b"status" => status = json.name(),
                b"rateLimitType" => current.window = json.name().unwrap_or_default(),
                b"unifiedWindows" => windows = rate_windows(json),
                _ => window(&mut current, key, json),
            });
        }
    });
    if !info {
        return Event::Known;
    }
    if windows.is_empty() {
        if current.window.is_empty() {
            current.window = String::from("unknown");
        }
        windows.push(current);
    }
    Event::RateLimit { status, windows }
}

fn rate_windows(json: &mut Json<'_>) -> Vec<RateWindow> {
    let mut windows = Vec::new();
    json.object(|name, json| {
        let mut state = RateWindow::default();
        let object = json.object(|key, json| window(&mut state, key, json));
        if object && windows.len() < ELEMENTS {
            state.window = Str { raw: name, escaped: false }.name();
            windows.push(state);
        }
    });
    windows
}

fn window(state: &mut RateWindow, key: &[u8], json: &mut Json<'_>) {
    match key {
        b"utilization" => state.utilization = json.number(),
        b"resetsAt" => state.resets_at = json.number(),
        _ => {}
    }
}

fn mirror<'a>(line: &mut Line<'a>, json: &mut Json<'a>) -> Event {
    let mut answers = Vec::new();
    line.read(json, |key, json| {
        if key == b"entries" {
            json.list(|json| {
                let (mut answer, mut sidechain, mut body) = (false, None, Body::default());
                json.object(|key, json| {
                    match key {
                        b"type" => answer = json.is(b"assistant"),
                        b"isSidechain" => sidechain = json.flag(),
                        // Some entries carry other things under this name.
                        b"message" => {
                            json.object_if_any(|key, json| body.field(key, json));
                        }
                        _ => {}
                    }
                });
                if let (true, Some(id), Some(usage)) = (answer && answers.len() < ELEMENTS, body.id, body.usage) {
                    let (model, stop_reason) = (body.model, body.stop_reason);
                    answers.push(MirroredAnswer { id, model, usage, stop_reason, sidechain: sidechain == Some(true) });
                }
            });
        }
    });
    Event::Mirror { answers }
}

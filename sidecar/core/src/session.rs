//! One CLI process, as a state machine: what it says goes in, each fact comes out once.
//!
//! ```text
//!  spawn ─► Starting ─► WaitingInput ─► Model ⇄ Tool ⇄ Permission ⇄ RetryBackoff ─► Idle ─► … ─► exit
//!                           ▲                    └─ a turn ─┘   (result)             │
//!                           └──────── a message of the app ────────────────────────-─┘
//! ```
//!
//! States are derived from what is open (calls, permissions, retries, tasks), never from silence: six silent minutes are normal.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::Now;
use crate::detect::why::Doing;
use crate::detect::{Ended, Kind, Loops, Streaks};
use crate::event::{
    Answer, Assistant, Block, Event, Init, Message, Request, SYNTHETIC_MODEL, SessionState, Status, Stream, Task, ToolResult,
    TurnResult, User,
};
use crate::ledger::{Base, Began, Known, Ledger};
use crate::meter::tool_class;
use crate::metric::bounded;
use crate::monitor::Exit;
use crate::price::PriceTable;
use crate::tokens::{Tokens, Usd};
use crate::update::{
    Activity, Answered, ExitReason, MissingCause, Outcome, ResetCause, Source, Start, ToolClass, ToolOutcome, Update,
};

/// Open things of one kind that are kept track of; a CLI that opens more is counted right but timed no longer.
const OPEN: usize = 4_096;
/// Results that are remembered by name, so that one that comes again does not count again.
const RESULTS: usize = 64;
/// A name that others choose is kept this long.
const NAME: usize = 96;
/// Up to this version a CLI starts its totals at zero when it resumes; later ones start where the session ended.
const RESUMES_AT_ZERO: [u64; 3] = [2, 1, 197];
/// A state that goes on is accounted for at least this often.
const ACCOUNT: Duration = Duration::from_secs(1);

/// The thread of the main loop, where subagents' threads are named by the call that started them.
const MAIN: &str = "";

mod native;
pub use native::Reconciliation;

#[derive(Clone, Debug)]
struct Call {
    tool: String,
    started: Duration,
    thread: String,
    denied: bool,
    /// Of the tool and its input.
    signature: u64,
    waits: bool,
}

#[derive(Clone, Debug)]
struct Turn {
    number: u64,
    started: Duration,
    /// Answers of the main loop: what `max_turns` counts.
    rounds: u64,
    answers: u64,
    cost: Usd,
    tokens: Tokens,
    /// The main loop has joined in: a background agent that goes on between two turns is accounted for as one, too.
    announced: bool,
}

#[derive(Clone, Debug)]
struct Current {
    id: String,
    model: String,
    asked: Option<Duration>,
    /// When its last frame came.
    last: Duration,
    stop_reason: Option<String>,
    streamed: bool,
    wants_tool: bool,
}

#[derive(Clone, Debug)]
struct Agent {
    started: Duration,
    depth: u64,
    background: bool,
    task: Option<String>,
}

/// Somebody who was asked.
#[derive(Clone, Debug)]
struct Permission {
    call: Option<String>,
    tool: String,
    since: Duration,
}

/// What a session is to the limits: asked, never told.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TurnView {
    pub started: Duration,
    pub rounds: u64,
    pub cost: Usd,
    pub tokens: u64,
}

/// See the module's head.
#[derive(Clone, Debug)]
pub struct Session {
    pub ledger: Ledger,
    id: String,
    start: Start,
    asked_id: Option<String>,
    /// The session that the next one goes on from.
    from: Option<String>,
    model: Option<String>,
    version: Option<String>,
    began: Duration,
    spoke: bool,
    fed: bool,
    /// The app sends messages over stdin, and the CLI says nothing before the first.
    stdin_json: bool,
    blind: bool,
    live: bool,
    /// The session has another name, and its next result tells whether the process is another one, too.
    renamed: bool,
    /// What an interrupted turn is called, if it is a limit that interrupts it.
    stop_as: Option<Outcome>,
    turn: Option<Turn>,
    turns: u64,
    rounds: u64,
    session_cost: Usd,
    session_tokens: u64,
    calls: BTreeMap<String, Call>,
    permissions: BTreeMap<String, Permission>,
    mcp_calls: BTreeMap<String, (String, Duration)>,
    hooks: BTreeMap<String, (String, Duration)>,
    /// Hooks that the app was asked to run.
    callbacks: BTreeSet<String>,
    agents: BTreeMap<String, Agent>,
    shells: BTreeSet<String>,
    background: Vec<(String, Option<String>)>,
    threads: BTreeMap<String, Current>,
    asked_model: Option<Duration>,
    retry_until: Option<Duration>,
    compacting: bool,
    queued: u64,
    stopping: bool,
    stuck: bool,
    reset_seen: bool,
    pid: Option<u32>,
    result_index: Option<u64>,
    /// The last results by name, and whether nothing was heard since the last one: one that comes twice ends no other turn.
    results: VecDeque<String>,
    rested: bool,
    last_retry: Option<String>,
    /// Calls of this turn that are over.
    answered: BTreeSet<String>,
    api_ms: u64,
    window: Option<u64>,
    windows: BTreeMap<String, u64>,
    activity: Activity,
    since: Duration,
    accounted: Duration,
    last_active: Duration,
    idle_since: Option<Duration>,
    loops: Loops,
    repeats: u64,
    native: native::Native,
    out: Vec<Update>,
}

/// How the process was started, as far as its command line tells.
#[derive(Clone, Debug)]
pub struct Opening {
    pub start: Start,
    /// The id that was to be resumed.
    pub resume: Option<String>,
    pub base: Base,
    pub eager: bool,
    pub stdin_json: bool,
    /// Nothing of what it says can be read: only the clock and its end are known.
    pub blind: bool,
    /// One process, which we started ourselves: another name for the session is never another process.
    pub live: bool,
}

impl Session {
    pub fn new(opening: Opening, prices: PriceTable, now: Now) -> Session {
        Session {
            ledger: Ledger::new(prices, opening.base, opening.eager),
            id: String::new(),
            start: opening.start,
            from: opening.resume.clone().filter(|id| is_id(id)),
            asked_id: opening.resume,
            model: None,
            version: None,
            began: now.mono,
            spoke: false,
            fed: false,
            stdin_json: opening.stdin_json,
            blind: opening.blind,
            live: opening.live,
            renamed: false,
            stop_as: None,
            turn: None,
            turns: 0,
            rounds: 0,
            session_cost: Usd::ZERO,
            session_tokens: 0,
            calls: BTreeMap::new(),
            permissions: BTreeMap::new(),
            mcp_calls: BTreeMap::new(),
            hooks: BTreeMap::new(),
            callbacks: BTreeSet::new(),
            agents: BTreeMap::new(),
            shells: BTreeSet::new(),
            background: Vec::new(),
            threads: BTreeMap::new(),
            asked_model: None,
            retry_until: None,
            compacting: false,
            queued: 0,
            stopping: false,
            stuck: false,
            reset_seen: false,
            pid: None,
            result_index: None,
            results: VecDeque::new(),
            rested: false,
            last_retry: None,
            answered: BTreeSet::new(),
            api_ms: 0,
            window: None,
            windows: BTreeMap::new(),
            activity: Activity::Starting,
            since: now.mono,
            accounted: now.mono,
            last_active: now.mono,
            idle_since: None,
            loops: Loops::default(),
            repeats: 0,
            native: native::Native::default(),
            out: Vec::new(),
        }
    }

    // ---- what limits, health and the page ask

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn activity(&self) -> Activity {
        self.activity
    }

    /// Since when it is in that state.
    pub fn activity_since(&self) -> Duration {
        self.since
    }

    pub fn turn(&self) -> Option<TurnView> {
        self.turn.as_ref().map(|turn| TurnView {
            started: turn.started,
            rounds: turn.rounds,
            cost: turn.cost,
            tokens: turn.tokens.total(),
        })
    }

    pub fn turns(&self) -> u64 {
        self.turns
    }

    /// Answers of the main loop in all turns.
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Whether the last answer of the main loop asks for another round.
    pub fn goes_on(&self) -> bool {
        self.turn.is_some() && self.threads.get(MAIN).is_none_or(|current| current.wants_tool)
    }

    /// Whether the main loop's last answer is complete and asks for nothing more: a result is due.
    pub fn answered(&self) -> bool {
        self.agents.is_empty() && self.threads.get(MAIN).is_some_and(|current| current.id.is_empty() && !current.wants_tool)
    }

    pub fn cost(&self) -> Usd {
        self.session_cost
    }

    pub fn tokens(&self) -> u64 {
        self.session_tokens
    }

    pub fn spoke(&self) -> bool {
        self.spoke
    }

    pub fn fed(&self) -> bool {
        self.fed
    }

    /// When the agent or its app last said anything, on the monotonic clock.
    pub fn last_active(&self) -> Duration {
        self.last_active
    }

    /// Since when there has been no work at all, if there is none.
    pub fn idle_since(&self) -> Option<Duration> {
        self.idle_since
    }

    /// The oldest tool call in flight that is not waiting for a permission: its tool and when it started.
    pub fn oldest_call(&self) -> Option<(&str, Duration)> {
        let waiting: BTreeSet<&str> = self.permissions.values().filter_map(|permission| permission.call.as_deref()).collect();
        self.calls
            .iter()
            .filter(|(id, call)| !waiting.contains(id.as_str()) && !is_agent(&call.tool))
            .map(|(_, call)| (call.tool.as_str(), call.started))
            .min_by_key(|(_, started)| *started)
    }

    /// When the longest-running subagent started.
    pub fn oldest_agent(&self) -> Option<Duration> {
        self.agents.values().map(|agent| agent.started).min()
    }

    /// What it is about, whether or not it is past a time limit, for whoever asks why.
    pub fn doing(&self, input_over: Option<Duration>, now: Now) -> Doing {
        let since = |at: Duration| now.mono.saturating_sub(at);
        Doing {
            activity: if self.stopping { Activity::Draining } else { self.work(now) },
            unseen: self.blind,
            in_turn: self.turn.is_some(),
            turns: self.turns,
            silent: since(self.last_active),
            answering: self.threads.get(MAIN).is_some_and(|current| !current.id.is_empty()),
            answered: self.turn.is_some() && self.answered() && self.calls.is_empty(),
            call: self.oldest_call().map(|(_, started)| since(started)),
            subagents: self.agents.len(),
            input_over: input_over.map(|over| since(over.max(self.since))),
        }
    }

    pub fn calls_in_flight(&self) -> usize {
        self.calls.len()
    }

    pub fn subagents_active(&self) -> usize {
        self.agents.len()
    }

    pub fn background_tasks(&self) -> usize {
        self.background.len()
    }

    pub fn permissions_pending(&self) -> usize {
        self.permissions.len()
    }

    /// How far the agent has gone round in circles.
    pub fn streaks(&self) -> Streaks {
        self.loops.streaks()
    }

    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    pub fn drain(&mut self) -> Vec<Update> {
        std::mem::take(&mut self.out)
    }

    // ---- what happens

    /// A message of the CLI. Its answers to our own questions are no sign of life: they would keep an idle agent from being idle.
    pub fn hear(&mut self, message: Message, own: bool, now: Now) {
        if !self.spoke {
            self.spoke = true;
            let after = now.mono.saturating_sub(self.began);
            self.out.push(Update::Spoke { after });
        }
        let parent = message.parent.as_deref();
        if let Event::Init(init) = &message.event {
            self.note_pid(init.pid, now);
        }
        if let Some(id) = &message.session_id {
            self.note_session(id, &message.event, now);
        }
        match message.event {
            Event::Init(init) => self.init(init, now),
            Event::Status { status, .. } => self.status(status, now),
            Event::Assistant(assistant) => self.assistant(assistant, parent, now),
            Event::User(user) => self.user(&user, parent, now),
            Event::Stream(stream) => self.stream(stream, parent, now),
            Event::Result(result) => self.result(&result, now),
            Event::ApiRetry { uuid, delay_ms, error, status, .. } => {
                self.begin_turn(now);
                let delay = Duration::from_millis(delay_ms);
                self.retry_until = Some(now.mono + delay);
                self.retried(uuid, error, None, status, Some(delay));
            }
            Event::ToolProgress { uuid, call, elapsed_s, heartbeat, retry_error, .. } => {
                if let Some(error) = retry_error {
                    self.retried(uuid, Some(error), message.parent.clone(), None, None);
                } else if let (true, Some(call)) = (heartbeat, call) {
                    let after = Duration::try_from_secs_f64(elapsed_s).unwrap_or_default();
                    self.out.push(Update::ToolProgressed { call, after });
                }
            }
            Event::TaskStarted(task) => self.task_started(task, now),
            Event::TaskUpdated { task, status } => {
                if status.as_deref().is_some_and(|status| status != "running" && status != "pending") {
                    self.task_ended(&task, status.as_deref(), now);
                }
            }
            Event::TaskEnded { task, status } => self.task_ended(&task, status.as_deref(), now),
            Event::BackgroundTasks { tasks } => {
                self.background = tasks;
                self.background.truncate(OPEN);
                self.background_changed();
            }
            Event::Compacted { trigger, pre_tokens, post_tokens, duration_ms } => {
                self.compacting = false;
                self.ledger.unseen_call();
                let duration = Duration::from_millis(duration_ms);
                self.loops.compacted(trigger.as_deref() != Some("manual"));
                self.out.push(Update::Compacted { trigger: name(trigger, "unknown"), pre_tokens, post_tokens, duration });
            }
            Event::ConversationReset => {
                self.ledger.reset(ResetCause::Clear);
                self.flush();
                self.reset_seen = true;
            }
            Event::PermissionDenied { tool, call } => {
                if let Some(call) = call.and_then(|id| self.calls.get_mut(&id)) {
                    call.denied = true;
                }
                self.out.push(Update::PermissionDenied { tool: name(tool, "unknown") });
            }
            Event::HookStarted { hook, event } => {
                if self.hooks.len() < OPEN {
                    let event = name(event, "unknown");
                    self.out.push(Update::HookStarted { hook: hook.clone(), event: event.clone() });
                    self.hooks.insert(hook, (event, now.mono));
                }
            }
            Event::HookEnded { hook, event, outcome, .. } => {
                let started = self.hooks.remove(&hook);
                let duration = started.as_ref().map(|(_, at)| now.mono.saturating_sub(*at)).unwrap_or_default();
                let event = name(event, started.as_ref().map_or("unknown", |(event, _)| event.as_str()));
                self.out.push(Update::HookEnded { hook, event, outcome: name(outcome, "unknown"), duration });
            }
            Event::SessionState { state } => match state {
                // The CLI's own word that something waits for a person; what it is comes with a control request.
                SessionState::Running | SessionState::RequiresAction | SessionState::Idle => {}
            },
            Event::RateLimit { windows, .. } => {
                for w in windows {
                    let (utilization, resets_at) = (w.utilization, w.resets_at);
                    self.out.push(Update::RateLimit { window: name(Some(w.window), "unknown"), utilization, resets_at });
                }
            }
            Event::Mirror { answers } => {
                for answer in answers {
                    // Only what the stream has shown: a resumed transcript mirrors history, too.
                    self.ledger.final_usage(&answer.id, &answer.usage);
                }
            }
            Event::ControlRequest { id, request } => self.cli_asks(id, request, now),
            Event::ControlResponse { ok: true, answer, .. } => self.cli_answers(answer, now),
            Event::ControlCancel { id } => {
                self.mcp_calls.remove(&id);
                self.called_back(&id, "cancelled");
                self.decided(id, "cancelled", now);
            }
            Event::ModelFallback { to: Some(model), .. } => self.chosen(Some(model)),
            Event::ModelFallback { to: None, .. }
            | Event::TaskProgress { .. }
            | Event::ThinkingTokens
            | Event::CommandLifecycle { .. }
            | Event::ControlResponse { ok: false, .. }
            | Event::KeepAlive
            | Event::Known
            | Event::Unknown { .. } => {}
        }
        self.settle(now, !own);
    }

    /// A message of the app, after it was forwarded.
    pub fn overhear(&mut self, message: Message, now: Now) {
        match message.event {
            Event::User(user) if user.prompt && !user.silent => {
                self.fed = true;
                self.rested = false;
                if self.turn.is_some() {
                    self.queued += 1;
                } else {
                    self.begin_turn(now);
                }
            }
            Event::ControlResponse { id, ok, answer } => {
                self.called_back(&id, if ok { "success" } else { "error" });
                if let Some((server, since)) = self.mcp_calls.remove(&id) {
                    let duration = now.mono.saturating_sub(since);
                    self.out.push(Update::McpCalled { request: id.clone(), server, duration });
                }
                let decision = match answer {
                    Answer::Permission { allow: true } => "allow",
                    Answer::Permission { allow: false } => "deny",
                    _ => "error",
                };
                self.decided(id, decision, now);
            }
            _ => {}
        }
        self.settle(now, true);
    }

    fn called_back(&mut self, id: &str, outcome: &'static str) {
        if let Some(hook) = self.callbacks.take(id) {
            self.out.push(Update::HookAnswered { hook, outcome });
        }
    }

    fn decided(&mut self, request: String, decision: &'static str, now: Now) {
        if let Some(Permission { call, tool, since }) = self.permissions.remove(&request) {
            let wait = now.mono.saturating_sub(since);
            self.out.push(Update::PermissionDecided { request, call, tool, decision, wait });
        }
    }

    /// The app asked with its command line; there is a turn from the start.
    pub fn prompted(&mut self, now: Now) {
        self.fed = true;
        self.begin_turn(now);
        self.settle(now, false);
    }

    /// Time went by.
    pub fn tick(&mut self, now: Now) {
        self.settle(now, false);
    }

    /// Nobody ran for this long, we ourselves included: that silence was nobody's.
    pub fn slept(&mut self, gap: Duration) {
        self.last_active += gap;
        self.since += gap;
        self.idle_since = self.idle_since.map(|since| since + gap);
    }

    /// A stop has begun: what follows is the way out.
    pub fn stopping(&mut self, now: Now) {
        self.stopping = true;
        self.settle(now, false);
    }

    /// A limit ends the turn: it was not its own failure.
    pub fn stop_as(&mut self, outcome: Outcome) {
        self.stop_as = Some(outcome);
    }

    /// Whether the agent is past its time limits.
    pub fn stuck(&mut self, stuck: bool, now: Now) {
        if self.stuck != stuck {
            self.stuck = stuck;
            self.settle(now, false);
        }
    }

    /// The process is gone: everything open ends here.
    pub fn exited(&mut self, reason: ExitReason, exit: Exit, truncated: bool, now: Now) {
        self.settle(now, false);
        let lasted = now.mono.saturating_sub(self.accounted);
        if !lasted.is_zero() {
            // Nobody comes back for the rest.
            self.out.push(Update::Was { state: self.activity, lasted, now: self.activity });
            self.accounted = now.mono;
        }
        self.native_over(reason, now);
        self.abandon(reason, truncated, now);
        self.out.push(Update::Exited { reason, session: self.id.clone(), exit: Some(exit) });
        self.end_session();
    }

    fn abandon(&mut self, reason: ExitReason, truncated: bool, now: Now) {
        let (outcome, cause, tools) = match reason {
            ExitReason::Limit | ExitReason::Idle => (Outcome::LimitStopped, MissingCause::Limit, ToolOutcome::Interrupted),
            ExitReason::Stuck => (Outcome::StuckKilled, MissingCause::Limit, ToolOutcome::Interrupted),
            ExitReason::Shutdown => (Outcome::Interrupted, MissingCause::Signal, ToolOutcome::Interrupted),
            ExitReason::Signal => (Outcome::Crashed, MissingCause::Crash, ToolOutcome::Lost),
            ExitReason::Oom => (Outcome::Crashed, MissingCause::Oom, ToolOutcome::Lost),
            ExitReason::Clean if truncated => (Outcome::NoResult, MissingCause::Truncated, ToolOutcome::Lost),
            ExitReason::Clean => (Outcome::NoResult, MissingCause::Unknown, ToolOutcome::Lost),
            ExitReason::Error | ExitReason::InitFailed => (Outcome::Crashed, MissingCause::Crash, ToolOutcome::Lost),
        };
        self.out.push(Update::Gone { cause });
        self.complete_all(now);
        self.ledger.close(now.unix);
        self.flush();
        self.end_calls(|_| true, tools, now);
        for (call, agent) in std::mem::take(&mut self.agents) {
            let duration = now.mono.saturating_sub(agent.started);
            self.out.push(Update::SubagentEnded { call, outcome: "lost", duration });
        }
        self.background.clear();
        self.permissions.clear();
        self.mcp_calls.clear();
        self.hooks.clear();
        self.callbacks.clear();
        if self.turn.is_some() {
            self.out.push(Update::ResultMissing { session: self.id.clone(), cause });
            self.end_turn(outcome, None, None, false, now);
        }
    }

    // ---- the CLI's messages

    fn note_session(&mut self, id: &str, event: &Event, now: Now) {
        if id == self.id || matches!(event, Event::ConversationReset) {
            return;
        }
        let id = bounded(id, NAME).to_owned();
        if self.id.is_empty() {
            self.id = id;
            if let Some(asked) = self.asked_id.take() {
                let not_found = matches!(event, Event::Result(result) if result.is_error && result.model_usage.as_deref().is_none_or(<[_]>::is_empty));
                let outcome = match () {
                    () if not_found => "not_found",
                    () if asked == self.id || self.start == Start::Fork => "ok",
                    () => "id_changed",
                };
                self.out.push(Update::Resumed { outcome });
            }
        } else {
            // A cleared conversation goes on under another name, from a turn of its own on; an older CLI does not say so.
            if !self.live && !self.reset_seen && self.turn.as_ref().is_some_and(|turn| turn.announced || turn.answers > 0) {
                self.restart(now);
            } else {
                self.renamed = !self.live && !self.reset_seen;
                self.start = Start::Clear;
                self.from = Some(self.id.clone());
                self.end_session();
            }
            self.id = id;
        }
        self.reset_seen = false;
        self.ledger.set_session(&self.id);
        let from = self.from.take();
        self.out.push(Update::SessionStarted { session: self.id.clone(), start: self.start, from });
    }

    /// A recording goes on with another process.
    pub fn another(&mut self, now: Now) {
        if self.spoke {
            self.restart(now);
            self.id.clear();
        }
    }

    /// Another process speaks in the same recording.
    fn restart(&mut self, now: Now) {
        self.abandon(ExitReason::Clean, false, now);
        self.end_session();
        self.ledger.restart(Base::Unknown);
        self.threads.clear();
        self.shells.clear();
        self.results.clear();
        self.answered.clear();
        self.result_index = None;
        self.api_ms = 0;
        self.pid = None;
        self.queued = 0;
        self.start = Start::Fresh;
        self.out.push(Update::CounterReset { cause: ResetCause::Restart });
    }

    fn end_session(&mut self) {
        if !self.id.is_empty() {
            self.out.push(Update::SessionEnded { session: self.id.clone(), cost: self.session_cost });
        }
        self.session_cost = Usd::ZERO;
        self.session_tokens = 0;
    }

    /// Another process goes on with the same session.
    fn again(&mut self) {
        let session = self.id.clone();
        self.out.push(Update::SessionStarted { from: Some(session.clone()), session, start: Start::Resume });
    }

    /// Another pid is another process, even in the same session.
    fn note_pid(&mut self, pid: Option<u32>, now: Now) {
        if self.pid.is_some_and(|old| pid.is_some_and(|new| new != old)) {
            self.restart(now);
            self.again();
        }
        self.pid = pid.or(self.pid);
    }

    fn init(&mut self, init: Init, now: Now) {
        self.rested = false;
        for (server, status) in init.mcp_servers {
            self.out.push(Update::McpServer { server: name(Some(server), "unknown"), up: status == "connected" });
        }
        if self.version != init.version {
            self.out.push(Update::Identified {
                version: name(init.version.clone(), "unknown"),
                permission_mode: name(init.permission_mode, "unknown"),
                api_key_source: name(init.api_key_source, "unknown"),
            });
            self.version = init.version;
        }
        self.begin_turn(now);
        self.chosen(init.model);
    }

    fn chosen(&mut self, model: Option<String>) {
        if model.is_some() && model != self.model {
            self.out.push(Update::ModelChosen { model: name(model.clone(), "unknown") });
            self.model = model;
        }
    }

    fn status(&mut self, status: Status, now: Now) {
        match status {
            Status::Requesting => {
                self.begin_turn(now);
                self.retry_until = None;
                self.compacting = false;
                self.asked(true, now);
            }
            Status::Compacting => {
                self.begin_turn(now);
                if !std::mem::replace(&mut self.compacting, true) {
                    self.out.push(Update::Compacting);
                }
                self.ledger.unseen_call();
            }
            Status::None => self.compacting = false,
            Status::Other => {}
        }
    }

    /// The model is asked; what it answers is timed from here.
    fn asked(&mut self, said: bool, now: Now) {
        self.asked_model = Some(now.mono);
        self.out.push(Update::Requested { said });
    }

    fn assistant(&mut self, assistant: Assistant, parent: Option<&str>, now: Now) {
        self.rested = false;
        self.begin_turn_of(parent, now);
        if let Some(error) = &assistant.error {
            let (error, parent) = (bounded(error, NAME).to_owned(), parent.map(str::to_owned));
            self.out.push(Update::ApiFailed { session: self.id.clone(), error, parent });
        }
        let model = assistant.model.as_deref().unwrap_or_default();
        let Some(id) = assistant.id.as_deref().filter(|_| model != SYNTHETIC_MODEL) else { return };
        self.thread_says(id, model, parent, assistant.usage.as_ref(), false, now);
        if let (Some(reason), Some(usage)) = (&assistant.stop_reason, &assistant.usage) {
            // Only answers that came in one piece carry their final usage here.
            self.ledger.final_usage(id, usage);
            self.stop_reason(parent, reason);
        }
        let streamed = self.threads.get(thread(parent)).is_some_and(|current| current.streamed);
        for block in assistant.blocks {
            match block {
                Block::Text { bytes } | Block::Thinking { bytes } if !streamed => self.ledger.grow(id, bytes),
                Block::ToolUse { call, tool, input_bytes: bytes, input_hash, waits } => {
                    if !streamed {
                        self.ledger.grow(id, bytes);
                    }
                    if !streamed {
                        // Where the stream is not shown, a call is the sign that the answer is complete.
                        self.ledger.complete(id, now.unix);
                        self.flush();
                    }
                    let tool = bounded(&tool, NAME).to_owned();
                    let (started, thread) = (now.mono, thread(parent).to_owned());
                    let signature = crate::detect::signature(&tool, input_hash);
                    self.tool_started(call, Call { tool, started, thread, denied: false, signature, waits }, bytes);
                }
                Block::Text { .. } | Block::Thinking { .. } | Block::Other => {}
            }
        }
    }

    fn stream(&mut self, stream: Stream, parent: Option<&str>, now: Now) {
        let key = thread(parent);
        match stream {
            Stream::MessageStart { id, model, usage, ttft_ms } => {
                self.rested = false;
                self.begin_turn_of(parent, now);
                self.retry_until = None;
                let model = model.unwrap_or_default();
                if let Some(id) = id {
                    self.thread_says(&id, &model, parent, usage.as_ref(), true, now);
                }
                if let Some(ms) = ttft_ms {
                    let model = crate::price::canonical(&model).into_owned();
                    self.out.push(Update::FirstToken { model, after: Duration::from_millis(ms) });
                }
            }
            Stream::Delta { bytes } => {
                if let Some(current) = self.threads.get_mut(key) {
                    current.last = now.mono;
                    self.ledger.grow(&current.id, bytes);
                }
            }
            Stream::MessageDelta { usage, stop_reason } => {
                self.frame(key, now);
                if let (Some(current), Some(usage)) = (self.threads.get(key), &usage) {
                    self.ledger.final_usage(&current.id, usage);
                }
                if let Some(reason) = stop_reason {
                    self.stop_reason(parent, &reason);
                }
            }
            Stream::MessageStop => {
                self.frame(key, now);
                self.complete_thread(key, now);
            }
            Stream::BlockStart { tool } => {
                if let (Some(_), Some(current)) = (tool, self.threads.get_mut(key)) {
                    current.wants_tool = true;
                }
            }
            Stream::BlockStop | Stream::Other => {}
        }
    }

    fn frame(&mut self, key: &str, now: Now) {
        if let Some(current) = self.threads.get_mut(key) {
            current.last = now.mono;
        }
    }

    fn stop_reason(&mut self, parent: Option<&str>, reason: &str) {
        if let Some(current) = self.threads.get_mut(thread(parent)) {
            current.wants_tool = reason == "tool_use";
            current.stop_reason = Some(bounded(reason, NAME).to_owned());
        }
    }

    /// A frame of an answer in a thread: an answer before it is complete now.
    fn thread_says(
        &mut self,
        id: &str,
        model: &str,
        parent: Option<&str>,
        usage: Option<&crate::event::Usage>,
        streamed: bool,
        now: Now,
    ) {
        let key = thread(parent);
        let new = self.ledger.answer(id, model, parent, usage);
        let current = self.threads.get(key).is_some_and(|current| current.id == id);
        if current {
            self.frame(key, now);
        }
        if parent.is_some_and(|call| !self.agents.contains_key(call)) && new {
            // An older CLI announces no task.
            let call = parent.unwrap_or_default().to_owned();
            self.agent_started(call, None, None, false, 1, now);
        }
        if !current && new {
            self.complete_thread(key, now);
            self.loops.answer_began(key);
            let booked = crate::price::canonical(model).into_owned();
            self.out.push(Update::Answering {
                answer: id.to_owned(),
                model: booked.clone(),
                parent: parent.map(str::to_owned),
                streamed,
            });
            if parent.is_none() {
                self.rounds += 1;
            }
            if let Some(turn) = &mut self.turn {
                turn.answers += 1;
                turn.rounds += u64::from(parent.is_none());
            }
            if self.threads.len() < OPEN {
                self.threads.insert(
                    key.to_owned(),
                    Current {
                        id: id.to_owned(),
                        model: booked,
                        last: now.mono,
                        asked: if parent.is_none() { self.asked_model.take() } else { None },
                        stop_reason: None,
                        streamed,
                        wants_tool: false,
                    },
                );
            }
            if let (None, Some(usage)) = (parent, usage) {
                self.context_used(model, usage.tokens.prompt());
            }
        }
    }

    fn context_used(&mut self, model: &str, prompt: u64) {
        let window = self.windows.get(&*crate::price::canonical(model)).copied().or(self.window);
        if let Some(window) = window.filter(|window| *window > 0) {
            #[expect(clippy::cast_precision_loss, reason = "a ratio")]
            self.out.push(Update::ContextUsed { ratio: prompt as f64 / window as f64 });
        }
    }

    fn complete_thread(&mut self, key: &str, now: Now) {
        // The stream's stop comes before the assistant's last line is known to be the last: keep the thread, close the answer.
        let Some(current) = self.threads.get_mut(key) else { return };
        let id = std::mem::take(&mut current.id);
        if id.is_empty() {
            return;
        }
        let (tokens, settled) = self.ledger.used(&id).unwrap_or_default();
        // What the CLI itself puts behind a stream that was cut is no word of the API.
        let settled = settled && (current.stop_reason.is_some() || !current.streamed);
        let update = Update::Answered(Box::new(Answered {
            session: self.id.clone(),
            answer: id.clone(),
            model: current.model.clone(),
            source: if key == MAIN { Source::Main } else { Source::Subagent },
            parent: (key != MAIN).then(|| key.to_owned()),
            stop_reason: current.stop_reason.take(),
            duration: current.asked.take().map(|asked| current.last.saturating_sub(asked)),
            since: now.mono.saturating_sub(current.last),
            tokens,
            settled,
        }));
        self.ledger.complete(&id, now.unix);
        self.loops.answered(key == MAIN);
        self.out.push(update);
        self.flush();
    }

    fn complete_all(&mut self, now: Now) {
        let keys: Vec<String> = self.threads.keys().cloned().collect();
        for key in keys {
            self.complete_thread(&key, now);
        }
        self.threads.clear();
    }

    fn user(&mut self, user: &User, parent: Option<&str>, now: Now) {
        for result in &user.results {
            self.complete_thread(thread(parent), now);
            let Some(call) = self.calls.remove(&result.call) else { continue };
            if self.answered.len() < OPEN {
                self.answered.insert(result.call.clone());
            }
            let outcome = match () {
                () if call.denied || result.denied => ToolOutcome::Denied,
                () if result.interrupted => ToolOutcome::Interrupted,
                () if result.error => ToolOutcome::Error,
                () => ToolOutcome::Ok,
            };
            // One that was announced as a task says itself when it ends: its call may be answered as soon as it is launched.
            if let Some(agent) = self.agents.get(&result.call).filter(|agent| !agent.background && agent.task.is_none()) {
                let duration = now.mono.saturating_sub(agent.started);
                let outcome = if result.error { "failed" } else { "completed" };
                self.agents.remove(&result.call);
                self.agent_ended(result.call.clone(), outcome, duration, now);
            }
            self.permissions.retain(|_, permission| permission.call.as_deref() != Some(result.call.as_str()));
            self.looked_at(&call, result, outcome);
            self.tool_ended(&result.call, call, outcome, now);
        }
        if parent.is_none() && self.turn.is_some() && (!user.results.is_empty() || user.synthetic) {
            self.asked(false, now);
        }
    }

    fn tool_started(&mut self, id: String, call: Call, bytes: usize) {
        if let Some(current) = self.threads.get_mut(&call.thread) {
            current.wants_tool = true;
        }
        if self.calls.contains_key(&id) || self.answered.contains(&id) || self.calls.len() >= OPEN {
            return;
        }
        if call.tool == "WebSearch" {
            self.ledger.unseen_call();
        }
        self.loops.call_began(&call.thread);
        self.out.push(Update::ToolStarted {
            session: self.id.clone(),
            call: id.clone(),
            tool: call.tool.clone(),
            parent: (call.thread != MAIN).then(|| call.thread.clone()),
            bytes,
        });
        self.calls.insert(id, call);
    }

    /// What a call came to, for those who look for circles.
    fn looked_at(&mut self, call: &Call, result: &ToolResult, outcome: ToolOutcome) {
        let failed = match outcome {
            ToolOutcome::Ok => false,
            ToolOutcome::Error | ToolOutcome::Denied => true,
            // Somebody else ended it: that says nothing of the agent.
            ToolOutcome::Interrupted | ToolOutcome::Lost => return,
        };
        self.loops.call_ended(
            &call.thread,
            &Ended {
                call: call.signature,
                result: result.hash,
                bytes: result.bytes,
                error: failed.then_some(result.error_hash),
                kind: match tool_class(&call.tool) {
                    _ if call.waits => Kind::Wait,
                    _ if matches!(call.tool.as_str(), "TodoWrite" | "TaskCreate" | "TaskUpdate") => Kind::Note,
                    ToolClass::File | ToolClass::Shell | ToolClass::Web => Kind::Plain,
                    ToolClass::Agent | ToolClass::Mcp | ToolClass::Other => Kind::Opaque,
                },
            },
        );
        let streaks = self.loops.streaks();
        self.repeating(streaks.identical.max(streaks.alternating).max(streaks.same_error));
    }

    fn repeating(&mut self, repeats: u64) {
        if std::mem::replace(&mut self.repeats, repeats) != repeats {
            self.out.push(Update::Repeating { streak: repeats });
        }
    }

    fn tool_ended(&mut self, id: &str, call: Call, outcome: ToolOutcome, now: Now) {
        self.out.push(Update::ToolEnded {
            session: self.id.clone(),
            call: id.to_owned(),
            tool: call.tool,
            outcome,
            duration: now.mono.saturating_sub(call.started),
        });
    }

    fn end_calls(&mut self, which: impl Fn(&Call) -> bool, outcome: ToolOutcome, now: Now) {
        let ids: Vec<String> = self.calls.iter().filter(|(_, call)| which(call)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            if let Some(call) = self.calls.remove(&id) {
                self.tool_ended(&id, call, outcome, now);
            }
        }
    }

    fn task_started(&mut self, task: Task, now: Now) {
        match task.kind.as_deref() {
            Some("local_agent") | None => {
                let call = task.call.unwrap_or_else(|| task.task.clone());
                self.agent_started(call, Some(task.task), task.subagent_type, task.background, task.depth.max(1), now);
            }
            Some(_) => {
                if self.shells.len() < OPEN {
                    self.shells.insert(task.task);
                }
            }
        }
    }

    fn agent_started(
        &mut self,
        call: String,
        task: Option<String>,
        kind: Option<String>,
        background: bool,
        depth: u64,
        now: Now,
    ) {
        self.ledger.subagent_seen();
        if let Some(agent) = self.agents.get_mut(&call) {
            agent.task = task.or(agent.task.take());
            agent.background |= background;
            return;
        }
        if self.agents.len() >= OPEN {
            return;
        }
        self.out.push(Update::SubagentStarted {
            session: self.id.clone(),
            kind: name(kind, "unknown"),
            call: call.clone(),
            task: task.clone(),
            depth,
            background,
        });
        self.loops.subagent_began();
        self.agents.insert(call, Agent { started: now.mono, depth, background, task });
        self.agents_changed();
    }

    fn task_ended(&mut self, task: &str, status: Option<&str>, now: Now) {
        self.shells.remove(task);
        let found = self.agents.iter().find(|(_, agent)| agent.task.as_deref() == Some(task)).map(|(call, _)| call.clone());
        if let Some((call, agent)) = found.and_then(|call| self.agents.remove_entry(&call)) {
            let outcome = match status {
                Some("completed") => "completed",
                Some("failed") => "failed",
                Some("stopped" | "killed") => "stopped",
                _ => "other",
            };
            self.agent_ended(call, outcome, now.mono.saturating_sub(agent.started), now);
        }
    }

    fn agent_ended(&mut self, call: String, outcome: &'static str, duration: Duration, now: Now) {
        // What it said last is all that it said.
        self.complete_thread(&call, now);
        self.threads.remove(&call);
        self.loops.subagent_ended(&call);
        self.out.push(Update::SubagentEnded { call, outcome, duration });
        self.agents_changed();
    }

    fn agents_changed(&mut self) {
        let depth = self.agents.values().map(|agent| agent.depth).max().unwrap_or_default();
        self.out.push(Update::Subagents { active: self.agents.len(), depth });
        self.background_changed();
    }

    fn background_changed(&mut self) {
        let kind = |kind: &str| self.background.iter().filter(|(_, k)| k.as_deref() == Some(kind)).count();
        let (agents, shells) = (kind("local_agent"), kind("local_bash"));
        let others = self.background.len() - agents - shells;
        self.out.push(Update::BackgroundTasks { agents, shells, others });
    }

    fn retried(
        &mut self,
        uuid: Option<String>,
        error: Option<String>,
        parent: Option<String>,
        status: Option<u64>,
        delay: Option<Duration>,
    ) {
        // A line that comes twice tells of one retry.
        if uuid.is_some() && uuid == self.last_retry {
            return;
        }
        self.last_retry = uuid;
        let error = name(error, "unknown");
        self.out.push(Update::Retried { session: self.id.clone(), error, parent, status, delay });
    }

    fn cli_asks(&mut self, id: String, request: Request, now: Now) {
        if self.permissions.len() + self.mcp_calls.len() + self.callbacks.len() >= OPEN {
            return;
        }
        match request {
            Request::CanUseTool { tool, call } => self.asks(id, call, name(tool, "unknown"), now),
            Request::McpMessage { server, method, id: true } if method.as_deref() == Some("tools/call") => {
                let server = name(server, "unknown");
                self.out.push(Update::McpStarted { request: id.clone(), server: server.clone() });
                self.mcp_calls.insert(id, (server, now.mono));
            }
            // A person is asked something.
            Request::Other(kind) if kind == "elicitation" || kind == "request_user_dialog" => self.asks(id, None, kind, now),
            Request::HookCallback { event } => {
                self.out.push(Update::HookStarted { hook: id.clone(), event: name(event, "unknown") });
                self.callbacks.insert(id);
            }
            Request::Initialize
            | Request::McpMessage { .. }
            | Request::Interrupt
            | Request::EndSession
            | Request::GetUsage
            | Request::Other(_) => {}
        }
    }

    fn asks(&mut self, request: String, call: Option<String>, tool: String, now: Now) {
        self.out.push(Update::PermissionAsked { request: request.clone(), call: call.clone(), tool: tool.clone() });
        self.permissions.insert(request, Permission { call, tool, since: now.mono });
    }

    fn cli_answers(&mut self, answer: Answer, now: Now) {
        match answer {
            Answer::Usage { models, .. } => {
                self.ledger.totals(&models, self.live, now.unix);
                self.flush();
            }
            Answer::Initialized { pid, version } => {
                self.note_pid(pid, now);
                self.version = version.or(self.version.take());
            }
            Answer::Permission { .. } | Answer::Other => {}
        }
    }

    fn result(&mut self, result: &TurnResult, now: Now) {
        if let Some(uuid) = &result.uuid {
            if self.rested && self.results.contains(uuid) {
                return;
            }
            self.results.push_back(uuid.clone());
            if self.results.len() > RESULTS {
                self.results.pop_front();
            }
        }
        self.rested = true;
        // A process that counts its results from zero again, or its time, is another one.
        let again = match (self.result_index, result.index) {
            (Some(last), Some(index)) => index <= last,
            // A version that does not count them came before.
            (None, Some(0)) => self.results.len() > 1 && !self.live,
            (None, None) => result.duration_api_ms > 0 && result.duration_api_ms < self.api_ms && !self.reset_seen,
            _ => false,
        };
        if again {
            // What was heard since the last result is the new one's already.
            self.end_session();
            self.ledger.rebase();
            self.api_ms = 0;
            self.result_index = None;
            self.start = Start::Fresh;
            self.out.push(Update::CounterReset { cause: ResetCause::Restart });
            self.again();
        }
        if std::mem::take(&mut self.renamed)
            && !(result.index.is_none() && result.num_turns == 0 && result.duration_api_ms == self.api_ms)
        {
            // No `/clear`: a CLI that counts its results announces one, and another's asks no model and leaves the times as they were.
            // The totals are another process's.
            self.ledger.rebase();
        }
        let index = std::mem::replace(&mut self.result_index, result.index);
        if result.duration_api_ms > 0 {
            self.api_ms = result.duration_api_ms;
        }
        self.begin_turn(now);
        self.complete_thread(MAIN, now);
        for total in result.model_usage.iter().flatten() {
            if let Some(window) = total.context_window.filter(|_| self.windows.len() < OPEN) {
                let model = crate::price::canonical(total.canonical.as_deref().unwrap_or(&total.model)).into_owned();
                self.windows.insert(model, window);
                self.window = Some(window);
            }
        }
        let cut = result.terminal_reason.as_deref().is_some_and(|reason| reason.starts_with("aborted"));
        let confirmed = self.ledger.result(
            result,
            Known {
                model: self.model.as_deref(),
                start: self.known_start(result),
                cut,
                missed: result.index.is_some_and(|now| now > index.map_or(0, |last| last.saturating_add(1))),
                live: self.live,
            },
            now.unix,
        );
        self.flush();
        self.ledger.forget();
        self.retry_until = None;
        self.compacting = false;
        let interrupted = result.terminal_reason.as_deref().is_some_and(|reason| reason.starts_with("aborted"));
        let outcome = match (result.subtype.as_deref(), result.is_error) {
            (Some("success"), false) => Outcome::Success,
            (Some("success"), true) => Outcome::SuccessIsError,
            (Some("error_max_turns"), _) => Outcome::MaxTurns,
            (Some("error_max_budget_usd"), _) => Outcome::MaxBudget,
            (Some("error_max_structured_output_retries"), _) => Outcome::StructuredOutput,
            _ if interrupted => self.stop_as.unwrap_or(Outcome::Interrupted),
            _ => self.stop_as.unwrap_or(Outcome::DuringExecution),
        };
        // Calls of threads that go on in the background stay open.
        let alive: BTreeSet<String> = self.agents.keys().cloned().collect();
        let ended = if interrupted { ToolOutcome::Interrupted } else { ToolOutcome::Lost };
        self.end_calls(|call| !alive.contains(&call.thread), ended, now);
        self.permissions.clear();
        if interrupted {
            let gone: Vec<String> =
                self.agents.iter().filter(|(_, agent)| !agent.background).map(|(call, _)| call.clone()).collect();
            for call in gone {
                if let Some(agent) = self.agents.remove(&call) {
                    self.agent_ended(call, "stopped", now.mono.saturating_sub(agent.started), now);
                }
            }
        }
        self.end_turn(outcome, result.terminal_reason.clone(), Some(result.num_turns), confirmed, now);
        if result.queued > 0 {
            self.begin_turn(now);
        }
    }

    /// Where this CLI begins to count, as far as its version, its words and its command line tell.
    fn known_start(&self, result: &TurnResult) -> Began {
        // `json` says no version; one that counts its results restores its totals, too.
        let old =
            result.index.is_none() && self.version.as_deref().is_none_or(|version| parse_version(version) <= RESUMES_AT_ZERO);
        match self.start {
            _ if old => Began::Zero,
            Start::Resume | Start::Continue | Start::Fork => Began::Restored,
            Start::Fresh | Start::Clear => Began::Unknown,
        }
    }

    // ---- turns, money, time

    fn begin_turn(&mut self, now: Now) {
        self.begin_turn_of(None, now);
    }

    /// `parent`: it is a subagent that shows it, not the main loop.
    fn begin_turn_of(&mut self, parent: Option<&str>, now: Now) {
        if self.turn.is_none() {
            self.turns += 1;
            self.answered.clear();
            self.ledger.turn_started();
            self.loops.turn_began();
            let (number, started) = (self.turns, now.mono);
            self.turn = Some(Turn {
                number,
                started,
                rounds: 0,
                answers: 0,
                cost: Usd::ZERO,
                tokens: Tokens::default(),
                announced: false,
            });
            self.asked_model.get_or_insert(now.mono);
        }
        if let (None, Some(turn)) = (parent, &mut self.turn)
            && !std::mem::replace(&mut turn.announced, true)
        {
            let turn = turn.number;
            self.out.push(Update::TurnStarted { session: self.id.clone(), turn });
            self.out.push(Update::Requested { said: false });
        }
    }

    fn end_turn(&mut self, outcome: Outcome, reason: Option<String>, num_turns: Option<u64>, confirmed: bool, now: Now) {
        let Some(turn) = self.turn.take() else { return };
        self.repeating(0);
        self.stop_as = None;
        self.queued = 0;
        self.asked_model = None;
        self.threads.remove(MAIN);
        self.out.push(Update::TurnEnded {
            session: self.id.clone(),
            turn: turn.number,
            outcome,
            reason: reason.map(|reason| bounded(&reason, NAME).to_owned()),
            duration: now.mono.saturating_sub(turn.started),
            answers: turn.answers,
            num_turns,
            cost: turn.cost,
            tokens: Box::new(turn.tokens),
            confirmed,
        });
    }

    /// Takes over what the ledger found.
    fn flush(&mut self) {
        for update in self.ledger.drain() {
            match &update {
                Update::Spent(spent) => {
                    self.session_cost += spent.cost;
                    self.native.streamed += spent.cost;
                    self.session_tokens = self.session_tokens.saturating_add(spent.tokens.total());
                    if let Some(turn) = &mut self.turn {
                        turn.cost += spent.cost;
                        turn.tokens += spent.tokens;
                    }
                }
                Update::Corrected { usd, tokens, .. } => {
                    self.session_cost = self.session_cost - *usd;
                    self.native.streamed = self.native.streamed - *usd;
                    self.session_tokens = self.session_tokens.saturating_sub(tokens.total());
                    if let Some(turn) = &mut self.turn {
                        turn.cost = turn.cost - *usd;
                        turn.tokens = turn.tokens.saturating_sub(*tokens);
                    }
                }
                _ => {}
            }
            self.out.push(update);
        }
    }

    fn settle(&mut self, now: Now, active: bool) {
        if self.retry_until.is_some_and(|until| until <= now.mono) {
            self.retry_until = None;
        }
        if active {
            // Once a second is often enough for a timestamp.
            if now.mono.saturating_sub(self.last_active) >= ACCOUNT || self.last_active == self.began {
                self.out.push(Update::Active { unix: now.unix });
            }
            self.last_active = now.mono;
        }
        let activity = self.judge(now);
        let lasted = now.mono.saturating_sub(self.accounted);
        if activity != self.activity || lasted >= ACCOUNT {
            self.out.push(Update::Was { state: self.activity, lasted, now: activity });
            self.accounted = now.mono;
        }
        if activity != self.activity {
            self.activity = activity;
            self.since = now.mono;
        }
        self.idle_since = match (activity.is_work(), self.idle_since) {
            (true, _) => None,
            (false, Some(since)) if !active => Some(since),
            // Whoever speaks to the CLI, or makes it speak, is there.
            (false, _) => Some(now.mono),
        };
    }

    fn judge(&self, now: Now) -> Activity {
        if self.stopping {
            return Activity::Draining;
        }
        if self.stuck {
            return Activity::Stuck;
        }
        self.work(now)
    }

    fn work(&self, now: Now) -> Activity {
        if self.blind {
            return Activity::Model;
        }
        if !self.spoke && !self.stdin_json {
            return Activity::Starting;
        }
        if self.turn.is_some() {
            return match () {
                () if !self.permissions.is_empty() => Activity::Permission,
                () if self.compacting => Activity::Compacting,
                () if self.retry_until.is_some_and(|until| until > now.mono) => Activity::RetryBackoff,
                () if self.calls.values().any(|call| !is_agent(&call.tool)) || !self.hooks.is_empty() => Activity::Tool,
                () if !self.spoke => Activity::Starting,
                () => Activity::Model,
            };
        }
        match () {
            () if !self.agents.is_empty() => Activity::Model,
            () if !self.background.is_empty() => Activity::Tool,
            () if self.turns == 0 => Activity::WaitingInput,
            () => Activity::Idle,
        }
    }
}

/// The tools that start subagents, by their names over the versions.
pub fn is_agent(tool: &str) -> bool {
    matches!(tool, "Task" | "Agent")
}

fn thread(parent: Option<&str>) -> &str {
    parent.unwrap_or(MAIN)
}

/// Whether it is made as the CLI makes ids: a name or a path in its place is nobody's business.
fn is_id(text: &str) -> bool {
    text.len() == 36 && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

fn name(text: Option<String>, or: &str) -> String {
    text.map_or_else(|| or.to_owned(), |text| bounded(&text, NAME).to_owned())
}

/// The leading numbers of a version; missing ones are zero.
fn parse_version(version: &str) -> [u64; 3] {
    let mut numbers = version.split(['.', '-', '+']).map(|part| part.parse().unwrap_or(0));
    std::array::from_fn(|_| numbers.next().unwrap_or(0))
}

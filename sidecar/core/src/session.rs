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
use crate::detect::Loops;
use crate::event::{Aim, Answer, Event, Init, Message, SessionState, Status};
use crate::ledger::{Base, Ledger};
use crate::metric::bounded;
use crate::monitor::Exit;
use crate::price::PriceTable;
use crate::tokens::{Tokens, Usd};
use crate::update::{Activity, ExitReason, MissingCause, Outcome, ResetCause, Start, ToolOutcome, Update};

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

mod answers;
mod calls;
mod native;
mod turns;
mod views;
pub use native::Reconciliation;

#[derive(Clone, Debug)]
struct Call {
    tool: String,
    started: Duration,
    thread: String,
    denied: bool,
    /// Of the tool and its input.
    signature: u64,
    aim: Aim,
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
    pub number: u64,
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
    /// What the main loop has sent to the model last, in tokens, and which model's window it has to fit into.
    context: Option<(u64, String)>,
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
            context: None,
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
            self.note_process(init.pid, init.version.as_deref(), message.session_id.as_deref(), now);
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

    /// Another pid is another process, even in the same session; so is another version, where an older one tells no pid.
    fn note_process(&mut self, pid: Option<u32>, version: Option<&str>, session: Option<&str>, now: Now) {
        let other_pid = self.pid.is_some_and(|old| pid.is_some_and(|new| new != old));
        let other_version = self.version.as_deref().is_some_and(|old| version.is_some_and(|new| new != old));
        if other_pid || other_version && !self.live {
            self.restart(now);
            if session.is_none_or(|session| session == self.id) {
                self.again();
            } else {
                // It goes on with nothing.
                self.id.clear();
            }
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

    fn cli_answers(&mut self, answer: Answer, now: Now) {
        match answer {
            Answer::Usage { models, .. } => {
                self.ledger.totals(&models, self.live, now.unix);
                self.flush();
            }
            Answer::Initialized { pid, version } => {
                self.note_process(pid, version.as_deref(), None, now);
                self.version = version.or(self.version.take());
            }
            Answer::Permission { .. } | Answer::Other => {}
        }
    }

    // ---- time

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

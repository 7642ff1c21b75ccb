//! The fold from facts to spans.
//!
//! ```text
//!  invoke_agent claude-code            a user turn: a trace of its own, linked to the turn before
//!  ├─ chat MODEL                       a request, from the moment it was made to its answer's last frame
//!  ├─ execute_tool TOOL                from the call to its result
//!  │  ├─ permission TOOL               somebody is asked
//!  │  ├─ mcp SERVER                    a tool that lives in the app
//!  │  └─ invoke_agent TYPE             a subagent, with chats and tools of its own; in the background it outlives the turn
//!  ├─ hook EVENT, compact
//!  └─ shutdown                         from the first step of a stop to the exit
//! ```
//!
//! What goes on between turns hangs from the turn before; what comes before any, from `claude_agent.background`. What the process
//! leaves open when it goes, or a limit ends, is closed here and says so (`error.type`, `claude_agent.closed_by`). No content: names,
//! ids, sizes and classes only.
//!
//! Traces of others:
//! - A `traceparent` that the app gives is the parent of every turn, as it asked; the CLI gets it on, unchanged.
//! - Without one the CLI is given none: it reads it once, at its start, and a turn has a trace of its own.
//! - Unless the CLI's own traces are wanted ([`TraceSettings::native_traces`]): its spans can hang from one parent only, so the
//!   process becomes a span (`claude_agent.process`), given to the CLI and above all turns, in one trace. The CLI tells its requests
//!   and tools itself; ours are left out, or there would be two trees of the same.

mod id;
mod semconv;
mod tree;
mod turn;

use std::collections::BTreeMap;
use std::time::Duration;

use self::id::Ids;
pub use self::semconv::Semconv;
pub(crate) use self::semconv::put;
use self::semconv::{AGENT_PROVIDER, CACHE_READ, CACHE_WRITE, FIRST_CHUNK, PROVIDER};
use self::tree::{Key, Open, Place, Tree, blank};
use self::turn::class;
use crate::Now;
use crate::content::{Gates, Piece, cut};
use crate::limit::{Limit, Mode};
use crate::meter::tool_class;
use crate::telemetry::{Attributes, Context, Link, Span, SpanEvent, SpanKind, Status, TraceId, Value};
use crate::tokens::Tokens;
use crate::update::{Answered, ExitReason, MissingCause, Outcome, ResetCause, Start, Step, ToolClass, ToolOutcome, Update};
use crate::who::Who;

/// Anthropic's name in the conventions.
const ANTHROPIC: &str = "anthropic";
/// The thread of the main loop.
const MAIN: &str = "";
/// Retries of one request that are told one by one.
const RETRIES: usize = 128;

/// What tracing needs to know.
#[derive(Clone, Debug)]
pub struct TraceSettings {
    pub on: bool,
    /// Ids follow from it: random, so that no two runs share one.
    pub seed: u64,
    /// What the app gave as its own span.
    pub parent: Option<Context>,
    pub semconv: Semconv,
    pub agent_name: String,
    /// The CLI exports its own spans.
    pub native_traces: bool,
    pub sampler: Sampler,
    /// What may be told of content.
    pub gates: Gates,
    /// The last turn of each session that a process before us has told.
    pub turns: BTreeMap<String, Context>,
}

/// Which traces are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// Of those that it decides about.
    pub ratio: f64,
    /// What the app decided about its own trace holds.
    pub follow: bool,
}

impl Default for Sampler {
    fn default() -> Sampler {
        Sampler { ratio: 1.0, follow: true }
    }
}

impl Sampler {
    /// By the trace's id, so that whoever else is asked about it says the same.
    fn keeps(self, trace: TraceId) -> bool {
        let [.., a, b, c, d, e, f, g, h] = trace.0;
        #[expect(clippy::cast_precision_loss, reason = "a ratio needs no more")]
        let at = (u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 1) as f64 / (1_u64 << 63) as f64;
        self.ratio >= 1.0 || at < self.ratio
    }
}

impl Default for TraceSettings {
    fn default() -> TraceSettings {
        TraceSettings {
            on: false,
            seed: 0,
            parent: None,
            semconv: Semconv::default(),
            agent_name: String::from("claude-code"),
            native_traces: false,
            sampler: Sampler::default(),
            gates: Gates::default(),
            turns: BTreeMap::new(),
        }
    }
}

impl TraceSettings {
    /// What the CLI is to find as its `TRACEPARENT`; none: nothing of ours. See the module's head.
    pub fn child_context(&self) -> Option<Context> {
        self.parent.or_else(|| self.process())
    }

    /// The span of the whole process, where there is one: it has the first ids.
    fn process(&self) -> Option<Context> {
        let wanted = self.on && self.native_traces && self.parent.is_none();
        let mut ids = Ids::new(self.seed);
        wanted.then(|| {
            let trace = ids.trace();
            Context { trace, span: ids.span(), sampled: self.sampler.keeps(trace) }
        })
    }
}

/// How a span ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    /// As it was to end, or as somebody wanted it. That it was a success is for others to say: the conventions leave that to them.
    Well,
    Failed(&'static str),
    /// Nobody said that it has ended.
    Lost,
}

/// A request that is not answered yet.
#[derive(Clone, Debug)]
struct Request {
    start: Duration,
    said: bool,
    retries: Vec<SpanEvent>,
}

/// What is told of a turn when it ends.
#[derive(Clone, Debug, Default)]
struct Turn {
    failure: Option<&'static str>,
    missing: Option<MissingCause>,
    keep: bool,
}

/// See the module's head.
#[derive(Clone, Debug)]
pub struct Spans {
    /// For whom the agent works: said by each turn.
    pub(crate) who: Who,
    settings: TraceSettings,
    tree: Tree,
    ids: Ids,
    /// From the monotonic clock to the other: fixed while anything is open, so that nothing ends before it began.
    epoch: Duration,
    process: Option<Context>,
    session: String,
    /// How the session began, until its first turn has told it.
    opening: Option<(Start, Option<String>)>,
    model: Option<String>,
    turn: Turn,
    request: Option<Request>,
    /// The last turn, and the session that it belonged to.
    last: Option<(Context, String)>,
    /// What goes on between turns hangs from here.
    behind: Option<Context>,
    gone: Option<MissingCause>,
    limit: Option<Limit>,
    step: Option<Step>,
    exit: Option<ExitReason>,
}

impl Spans {
    pub fn new(mut settings: TraceSettings, who: Who) -> Spans {
        if let Some(parent) = settings.parent.as_mut().filter(|_| !settings.sampler.follow) {
            parent.sampled = settings.sampler.keeps(parent.trace);
        }
        let mut ids = Ids::new(settings.seed);
        let process = settings.process();
        if process.is_some() {
            // Those are taken.
            ids.trace();
            ids.span();
        }
        Spans {
            who,
            settings,
            tree: Tree::default(),
            ids,
            epoch: Duration::ZERO,
            process,
            session: String::new(),
            opening: None,
            model: None,
            turn: Turn::default(),
            request: None,
            last: None,
            behind: None,
            gone: None,
            limit: None,
            step: None,
            exit: None,
        }
    }

    /// The turn's span.
    pub fn context(&self) -> Option<Context> {
        self.tree.place(Key::Turn).map(|place| place.parent)
    }

    /// Spans and events that did not fit.
    pub fn dropped(&self) -> u64 {
        self.tree.dropped
    }

    /// What has ended, in the order of the ends.
    pub fn drain(&mut self) -> impl Iterator<Item = Span> + '_ {
        self.tree.done.drain(..)
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.request.is_none() && self.tree.is_idle()
    }

    /// Takes something that was said, for the span that it belongs to; what is said to nobody is not kept.
    pub(crate) fn say(&mut self, piece: Piece) {
        match piece {
            Piece::Prompt { text } => self.add(&Key::Turn, &text),
            Piece::Answer { parent, text } => self.add(&Key::Chat(parent.unwrap_or_default()), &text),
            Piece::Input { call, json } => self.put(&Key::Tool(call), "gen_ai.tool.call.arguments", json),
            Piece::Output { call, text } => self.put(&Key::Tool(call), "gen_ai.tool.call.result", text),
        }
    }

    fn put(&mut self, key: &Key, name: &'static str, text: String) {
        if let Some(open) = self.tree.get(key) {
            put(&mut open.span.attributes, name, text);
        }
    }

    /// It may come in pieces: told when the span ends.
    fn add(&mut self, key: &Key, text: &str) {
        let max = self.settings.gates.max;
        if let Some(open) = self.tree.get(key) {
            let so_far = std::mem::take(&mut open.said);
            open.said = cut(if so_far.is_empty() { text.to_owned() } else { format!("{so_far}\n{text}") }, max);
        }
    }

    /// Takes a fact. Returns the span that it is about.
    pub fn on(&mut self, update: &Update, now: Now) -> Option<Context> {
        let at = self.at(now);
        match update {
            Update::ProcessStarted => {
                (self.gone, self.behind) = (None, None);
                if let Some(context) = self.process {
                    let name = String::from("claude_agent.process");
                    self.tree.start(Key::Process, None, blank(context, None, name, SpanKind::Internal, at));
                }
                None
            }
            Update::SessionStarted { session, start, from } => {
                self.session.clone_from(session);
                self.opening = Some((*start, from.clone()));
                self.context()
            }
            Update::ModelChosen { model } => {
                self.model = Some(model.clone());
                None
            }
            Update::TurnStarted { turn, .. } => self.turn_started(*turn, at),
            Update::TurnEnded { .. } => self.turn_ended(update, at),
            Update::Requested { said } => {
                // A request that is made again is the same one: who waits for it has been waiting all along.
                let again = self.request.take().filter(|request| !request.retries.is_empty());
                let request = self.request.insert(again.unwrap_or(Request { start: at, said: false, retries: Vec::new() }));
                request.said |= said;
                None
            }
            Update::Answering { answer, model, parent, streamed } => {
                self.answering(answer, model, parent.as_deref(), *streamed, at)
            }
            Update::FirstToken { after, .. } => {
                let chat = self.tree.get(&Key::Chat(MAIN.to_owned()))?;
                self.settings.semconv.put(&mut chat.span.attributes, FIRST_CHUNK, *after);
                Some(chat.span.context)
            }
            Update::Answered(answered) => self.answered(answered, at),
            Update::Retried { error, parent, status, delay, .. } => {
                let mut retry = vec![("error.type", class(error).into())];
                if let Some(status) = status {
                    retry.push(("http.response.status_code", (*status).into()));
                }
                if let Some(delay) = delay {
                    retry.push(("claude_agent.delay_seconds", (*delay).into()));
                }
                match parent {
                    Some(call) => self.event(&Key::Subagent(call.clone()), at, "api_retry", retry),
                    None => {
                        let request = self.request.get_or_insert(Request { start: at, said: true, retries: Vec::new() });
                        if request.retries.len() < RETRIES {
                            request.retries.push(SpanEvent { time: at, name: "api_retry", attributes: retry.clone() });
                        }
                        self.event(&Key::Turn, at, "api_retry", retry)
                    }
                }
            }
            Update::ApiFailed { error, parent, .. } => self.api_failed(class(error), parent.as_deref(), at),
            Update::ToolStarted { call, tool, parent, bytes, .. } => {
                let place = self.home(parent.as_deref(), at);
                let open = self.start(Key::Tool(call.clone()), place, format!("execute_tool {tool}"), SpanKind::Internal, at)?;
                let class = tool_class(tool);
                // The conventions' word for what reaches out of the agent itself.
                let kind = if matches!(class, ToolClass::Web | ToolClass::Mcp) { "extension" } else { "function" };
                let attributes = &mut open.span.attributes;
                put(attributes, "gen_ai.operation.name", "execute_tool");
                put(attributes, "gen_ai.tool.name", tool.as_str());
                put(attributes, "gen_ai.tool.call.id", call.as_str());
                put(attributes, "gen_ai.tool.type", kind);
                put(attributes, "claude_agent.tool.class", class.as_str());
                put(attributes, "claude_agent.tool.input_bytes", u64::try_from(*bytes).unwrap_or(u64::MAX));
                Some(open.span.context)
            }
            Update::ToolProgressed { call, after } => {
                self.event(&Key::Tool(call.clone()), at, "heartbeat", vec![("claude_agent.duration_seconds", (*after).into())])
            }
            Update::ToolEnded { call, outcome, .. } => self.tool_ended(call, *outcome, at),
            Update::PermissionAsked { request, call, tool } => {
                let asked_for = call.as_ref().and_then(|call| self.tree.place(Key::Tool(call.clone())));
                let place = asked_for.or_else(|| self.home(None, at));
                let key = Key::Permission(request.clone());
                let open = self.start(key, place, format!("permission {tool}"), SpanKind::Internal, at)?;
                put(&mut open.span.attributes, "gen_ai.tool.name", tool.as_str());
                if let Some(call) = call {
                    put(&mut open.span.attributes, "gen_ai.tool.call.id", call.as_str());
                }
                Some(open.span.context)
            }
            Update::PermissionDecided { request, decision, .. } => {
                let key = Key::Permission(request.clone());
                put(&mut self.tree.get(&key)?.span.attributes, "claude_agent.decision", *decision);
                self.end(&key, at, if *decision == "error" { End::Failed("permission_error") } else { End::Well })
            }
            Update::McpStarted { request, server } => {
                let place = self.called(server).or_else(|| self.home(None, at));
                let key = Key::Mcp(request.clone());
                let open = self.start(key, place, format!("mcp {server}"), SpanKind::Client, at)?;
                put(&mut open.span.attributes, "mcp.method.name", "tools/call");
                put(&mut open.span.attributes, "claude_agent.server", server.as_str());
                Some(open.span.context)
            }
            Update::McpCalled { request, .. } => self.end(&Key::Mcp(request.clone()), at, End::Well),
            Update::SubagentStarted { kind, call, task, depth, background, .. } => {
                let place = self.tree.place(Key::Tool(call.clone())).or_else(|| self.home(None, at));
                let key = Key::Subagent(call.clone());
                let (semconv, name) = (self.settings.semconv, format!("invoke_agent {kind}"));
                let open = self.start(key, place, name, SpanKind::Internal, at)?;
                open.asked = Some(at);
                let attributes = &mut open.span.attributes;
                put(attributes, "gen_ai.operation.name", "invoke_agent");
                semconv.put(attributes, AGENT_PROVIDER, ANTHROPIC);
                put(attributes, "gen_ai.agent.name", kind.as_str());
                put(attributes, "gen_ai.tool.call.id", call.as_str());
                if let Some(task) = task {
                    put(attributes, "claude_agent.task", task.as_str());
                }
                put(attributes, "claude_agent.depth", *depth);
                put(attributes, "claude_agent.background", *background);
                Some(open.span.context)
            }
            Update::SubagentEnded { call, outcome, .. } => {
                let key = Key::Subagent(call.clone());
                put(&mut self.tree.get(&key)?.span.attributes, "claude_agent.outcome", *outcome);
                let end = match *outcome {
                    "completed" => End::Well,
                    "failed" => End::Failed("subagent_failed"),
                    "lost" => End::Lost,
                    _ => End::Well,
                };
                self.end(&key, at, end)
            }
            Update::HookStarted { hook, event } => {
                let place = self.home(None, at);
                let open = self.start(Key::Hook(hook.clone()), place, format!("hook {event}"), SpanKind::Internal, at)?;
                put(&mut open.span.attributes, "claude_agent.hook.event", event.as_str());
                Some(open.span.context)
            }
            Update::HookEnded { hook, outcome, .. } => self.hook_ended(hook, outcome, at),
            Update::HookAnswered { hook, outcome } => self.hook_ended(hook, outcome, at),
            Update::Compacting => {
                let place = self.home(None, at);
                self.start(Key::Compact, place, String::from("compact"), SpanKind::Internal, at).map(|open| open.span.context)
            }
            Update::Compacted { trigger, pre_tokens, post_tokens, duration } => {
                if !self.tree.has(&Key::Compact) {
                    let place = self.home(None, at);
                    let earliest = self.tree.get(&Key::Turn).map_or(at, |turn| turn.span.start);
                    let start = at.saturating_sub(*duration).max(earliest);
                    self.start(Key::Compact, place, String::from("compact"), SpanKind::Internal, start);
                }
                let attributes = &mut self.tree.get(&Key::Compact)?.span.attributes;
                put(attributes, "claude_agent.trigger", trigger.as_str());
                put(attributes, "claude_agent.pre_tokens", *pre_tokens);
                put(attributes, "claude_agent.post_tokens", *post_tokens);
                self.end(&Key::Compact, at, End::Well)
            }
            Update::RateLimit { window, utilization, .. } => {
                let mut limit = vec![("claude_agent.window", window.as_str().into())];
                limit.extend(utilization.map(|used| ("claude_agent.utilization", used.into())));
                self.event(&Key::Turn, at, "rate_limit", limit)
            }
            Update::LoopDetected { kind, streak, action } => {
                let circle = vec![
                    ("claude_agent.kind", kind.as_str().into()),
                    ("claude_agent.streak", (*streak).into()),
                    ("claude_agent.action", action.as_str().into()),
                ];
                self.event(&Key::Turn, at, "loop", circle)
            }
            Update::TenantConflict { kind, owner, action } => {
                let shared = vec![
                    ("claude_agent.kind", kind.as_str().into()),
                    ("claude_agent.owner", owner.as_str().into()),
                    ("claude_agent.action", action.as_str().into()),
                ];
                self.event(&Key::Turn, at, "tenant_conflict", shared)
            }
            Update::OomKilled { role, memory_bytes } => {
                let killed = vec![("claude_agent.role", (*role).into()), ("claude_agent.memory_bytes", (*memory_bytes).into())];
                self.event(&Key::Turn, at, "oom", killed)
            }
            Update::Stalled { kind, on: true, why } => {
                let mut stall = vec![("claude_agent.kind", kind.as_str().into())];
                stall.extend(why.map(|why| ("claude_agent.why", why.as_str().into())));
                self.event(&Key::Turn, at, "stall", stall)
            }
            Update::Decided(decision) => {
                if decision.mode == Mode::Enforce && decision.step != Step::Warn {
                    self.limit = Some(decision.limit);
                    self.turn.keep = true;
                }
                let mut decided = vec![
                    ("claude_agent.limit", decision.limit.as_str().into()),
                    ("claude_agent.scope", decision.scope.as_str().into()),
                    ("claude_agent.mode", decision.mode.as_str().into()),
                    ("claude_agent.action", decision.step.as_str().into()),
                    ("claude_agent.observed", decision.observed.into()),
                    ("claude_agent.ceiling", decision.ceiling.into()),
                    ("claude_agent.level", decision.level.into()),
                ];
                decided.extend(decision.why.map(|why| ("claude_agent.why", why.as_str().into())));
                decided.extend(decision.share.then(|| ("claude_agent.share", true.into())));
                self.stop_event(at, "limit", decided)
            }
            Update::Enforced { step, latency, overshoot, .. } => {
                let mut enforced =
                    vec![("claude_agent.action", step.as_str().into()), ("claude_agent.latency_seconds", (*latency).into())];
                enforced.extend(overshoot.map(|usd| ("claude_agent.overshoot_usd", usd.into())));
                self.stop_event(at, "enforced", enforced)
            }
            // A kill is repeated until it has its way.
            Update::Stopping { step } if self.step == Some(*step) => None,
            Update::Stopping { step } => {
                self.step = Some(*step);
                if matches!(step, Step::End | Step::Terminate | Step::Kill) && !self.tree.has(&Key::Shutdown) {
                    self.shutdown(at);
                }
                self.stop_event(at, "step", vec![("claude_agent.action", step.as_str().into())])
            }
            Update::Gone { cause } => {
                self.gone = Some(*cause);
                None
            }
            Update::ResultMissing { cause, .. } => {
                self.turn.missing = Some(*cause);
                self.context()
            }
            Update::CounterReset { cause: ResetCause::Restart } => {
                // Another process goes on; a turn that its result ends is still open.
                self.end_all(at, |key, _| !matches!(key, Key::Turn | Key::Shutdown | Key::Process));
                (self.gone, self.behind) = (None, None);
                self.context()
            }
            Update::Exited { reason, .. } => {
                self.exit = Some(*reason);
                self.tree.place(Key::Shutdown).map(|place| place.parent)
            }
            // Of these there is a log event at most.
            Update::Spent(_)
            | Update::Corrected { .. }
            | Update::McpServer { .. }
            | Update::Resumed { .. }
            | Update::ContainerUsed { .. }
            | Update::SessionEnded { .. }
            | Update::Unknown { .. }
            | Update::Ordered { .. } => self.context(),
            Update::CounterReset { cause: ResetCause::Clear | ResetCause::Decrease }
            | Update::Spoke { .. }
            | Update::Identified { .. }
            | Update::ContextUsed { .. }
            | Update::Unconfirmed { .. }
            | Update::PermissionDenied { .. }
            | Update::Subagents { .. }
            | Update::BackgroundTasks { .. }
            | Update::Was { .. }
            | Update::Stalled { on: false, .. }
            | Update::Active { .. }
            | Update::Repeating { .. }
            | Update::LimitUsed { .. }
            | Update::IdleShutdown
            | Update::StepEnded { .. }
            | Update::Asked { .. }
            | Update::Heard { .. }
            | Update::Unread { .. }
            | Update::LongestLine { .. }
            | Update::Lost { .. } => None,
        }
    }

    /// The process is gone, and everything has been said.
    pub fn finish(&mut self, now: Now) {
        let at = self.at(now);
        self.gone.get_or_insert(MissingCause::Unknown);
        self.end_all(at, |key, _| !matches!(key, Key::Shutdown | Key::Process));
        for key in [Key::Shutdown, Key::Process] {
            if let (Some(open), Some(reason)) = (self.tree.get(&key), self.exit) {
                put(&mut open.span.attributes, "claude_agent.reason", reason.as_str());
            }
            // It ends with the exit: that is what it is for.
            self.gone = None;
            self.end(&key, at, End::Well);
        }
    }

    fn at(&mut self, now: Now) -> Duration {
        if self.is_idle() {
            self.epoch = now.unix.saturating_sub(now.mono);
        }
        self.epoch + now.mono
    }
}

//! The fold from ledger lines to an answer: what a session cost and why, where its time went, and who stopped it. Its sums are the
//! ledger's own: what no turn explains stands beside the turns.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::record::{Fact, Record};
use crate::report::Container;
use crate::tokens::{Tokens, Usd};
use crate::update::{Activity, Basis, ExitReason, MissingCause, Outcome, Source, Start, ToolOutcome, Wish};

/// A prompt shorter than this is not cached by every model.
const CACHEABLE: u64 = 2_048;
/// How long the API keeps a prompt by default, and at most.
const SHORT_LIFE_SECONDS: f64 = 300.0;
const LONG_LIFE_SECONDS: f64 = 3_600.0;

/// Money and tokens, with what a confirmation took back.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spend {
    spent: Usd,
    taken_back: Usd,
    tokens: Tokens,
    tokens_taken_back: Tokens,
}

impl Spend {
    /// In dollars. Below zero where a part takes back what another part was charged with.
    pub fn cost_usd(&self) -> f64 {
        if self.taken_back <= self.spent {
            (self.spent - self.taken_back).to_f64()
        } else {
            -(self.taken_back - self.spent).to_f64()
        }
    }

    pub fn tokens(&self) -> Tokens {
        self.tokens.saturating_sub(self.tokens_taken_back)
    }

    fn add(&mut self, cost: Usd, tokens: Tokens) {
        self.spent += cost;
        self.tokens += tokens;
    }

    fn take_back(&mut self, cost: Usd, tokens: Tokens) {
        self.taken_back += cost;
        self.tokens_taken_back += tokens;
    }
}

impl Serialize for Spend {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Object {
            cost_usd: f64,
            tokens: Tokens,
        }
        Object { cost_usd: self.cost_usd(), tokens: self.tokens() }.serialize(s)
    }
}

/// One user turn.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Turn {
    pub turn: u64,
    /// Absent while it goes on.
    pub outcome: Option<Outcome>,
    #[serde(flatten)]
    pub spend: Spend,
    pub duration_seconds: f64,
    pub requests: u64,
    pub tool_calls: u64,
    pub retries: u64,
    pub cache_misses: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Model {
    #[serde(flatten)]
    pub spend: Spend,
    pub requests: u64,
    pub seconds: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Tool {
    pub ok: u64,
    /// Failed, denied, interrupted, or never answered.
    pub error: u64,
    pub seconds: f64,
    pub slowest_seconds: f64,
}

/// One subagent. Its money is known in sums only (see `sources`); its tokens are what the API told of its answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Subagent {
    pub call: String,
    pub kind: String,
    pub background: bool,
    /// Absent while it works.
    pub outcome: Option<String>,
    pub duration_seconds: f64,
    pub requests: u64,
    pub tool_calls: u64,
    pub tokens_seen: Tokens,
}

/// A prompt that could have been read from the cache and was sent anew.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Miss {
    pub time: f64,
    pub turn: Option<u64>,
    pub model: String,
    /// Tokens of the prompt before that were not read from the cache.
    pub tokens: u64,
    pub cause: &'static str,
}

/// What somebody has asked of the agent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Told {
    pub time: f64,
    pub order: Wish,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ceiling: Option<f64>,
}

/// A decision about a limit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Limit {
    pub time: f64,
    pub limit: String,
    pub scope: String,
    pub mode: String,
    pub action: String,
    pub observed: f64,
    pub ceiling: f64,
    /// What the agent was about, where time ran out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Of a shared budget it was this agent's fair share.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub share: bool,
    /// How long it took until the agent was quiet, where it was to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overshoot_usd: Option<Usd>,
}

/// A process that the kernel killed for memory.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OomKill {
    pub time: f64,
    pub role: String,
    pub memory_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compaction {
    pub time: f64,
    pub trigger: String,
    pub pre_tokens: u64,
    pub post_tokens: u64,
}

/// One session.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Session {
    pub session_id: String,
    pub start: Option<Start>,
    /// The session that it went on from.
    pub from: Option<String>,
    /// Of the first and the last line, in seconds since the Unix epoch.
    pub began: f64,
    pub last: f64,
    /// How its last turn ended.
    pub outcome: Option<Outcome>,
    /// How its process ended; absent while it runs, or where nobody lived to tell.
    pub exit: Option<ExitReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    #[serde(flatten)]
    pub spend: Spend,
    /// What of it was an estimate when it was written, whether or not a result confirmed it later.
    pub estimated_usd: Usd,
    pub unpriced: bool,
    pub web_searches: u64,
    /// No part of what was spent.
    #[serde(skip_serializing_if = "Container::is_zero")]
    pub container: Container,
    pub turns: Vec<Turn>,
    /// Spent while no turn was going on: background agents, suggestions.
    pub between_turns: Spend,
    pub models: BTreeMap<String, Model>,
    pub sources: BTreeMap<Source, Spend>,
    pub tools: BTreeMap<String, Tool>,
    pub subagents: Vec<Subagent>,
    /// Seconds in each state.
    pub time: BTreeMap<Activity, f64>,
    /// What part of all prompts was read from the cache; absent before the first.
    pub cache_hit_ratio: Option<f64>,
    pub cache_misses: Vec<Miss>,
    pub retries: BTreeMap<String, u64>,
    pub retry_seconds: f64,
    pub failed_requests: BTreeMap<String, u64>,
    pub compactions: Vec<Compaction>,
    pub limits: Vec<Limit>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub orders: Vec<Told>,
    pub oom_kills: Vec<OomKill>,
    pub results_missing: Vec<MissingCause>,
    #[serde(skip)]
    prompts: BTreeMap<Option<String>, Prompt>,
    #[serde(skip)]
    prompted: Tokens,
}

/// The last prompt of a conversation: the main one, or a subagent's.
#[derive(Clone, Debug, PartialEq)]
struct Prompt {
    model: String,
    tokens: u64,
    time: f64,
    compactions: usize,
}

/// See the module's head. Lines have to come in the order in which they were written.
#[derive(Debug, Default)]
pub struct Explainer {
    sessions: Vec<Session>,
    by_id: BTreeMap<String, usize>,
    /// The session of the last line, by run.
    current: BTreeMap<String, usize>,
    /// What a run wrote before it knew its session's name.
    nameless: BTreeMap<String, Vec<Record>>,
}

impl Explainer {
    pub fn sessions(&self) -> &[Session] {
        &self.sessions
    }

    pub fn on(&mut self, record: &Record) {
        let id = record.fact.session_id().filter(|id| !id.is_empty());
        let at = match (id, self.current.get(&record.run)) {
            (Some(id), _) => *self.by_id.entry(id.to_owned()).or_insert_with(|| {
                self.sessions.push(Session { session_id: id.to_owned(), began: record.time, ..Session::default() });
                self.sessions.len() - 1
            }),
            (None, Some(&at)) => at,
            (None, None) => return self.nameless.entry(record.run.clone()).or_default().push(record.clone()),
        };
        self.current.insert(record.run.clone(), at);
        for before in self.nameless.remove(&record.run).unwrap_or_default() {
            self.sessions[at].on(before.time, &before.fact);
        }
        self.sessions[at].on(record.time, &record.fact);
    }
}

impl Session {
    fn on(&mut self, time: f64, fact: &Fact) {
        self.began = self.began.min(time);
        self.last = self.last.max(time);
        match fact {
            Fact::SessionStarted { start, from, .. } => {
                self.start.get_or_insert(*start);
                self.from = self.from.take().or_else(|| from.clone());
            }
            Fact::TurnStarted { turn, .. } => self.turns.push(Turn { turn: *turn, ..Turn::default() }),
            Fact::TurnEnded { turn, outcome, duration_seconds, .. } => {
                self.outcome = Some(*outcome);
                // Ledgers of before did not tell the beginning.
                if self.turn().is_none() {
                    self.turns.push(Turn { turn: *turn, ..Turn::default() });
                }
                if let Some(open) = self.turn() {
                    open.outcome = Some(*outcome);
                    open.duration_seconds = *duration_seconds;
                }
            }
            Fact::Spent { model, source, basis, tokens, cost_usd, web_searches, unpriced, .. } => {
                for part in self.parts(model, Some(*source)) {
                    part.add(*cost_usd, *tokens);
                }
                if *basis == Basis::Estimate {
                    self.estimated_usd += *cost_usd;
                }
                self.web_searches += web_searches;
                self.unpriced |= unpriced;
            }
            Fact::Corrected { model, cost_usd, tokens, .. } => {
                for part in self.parts(model, None) {
                    part.take_back(*cost_usd, *tokens);
                }
            }
            Fact::RequestCompleted { model, parent, duration_seconds, tokens, .. } => {
                let model_part = self.models.entry(model.clone()).or_default();
                model_part.requests += 1;
                model_part.seconds += duration_seconds.unwrap_or_default();
                self.prompt(time - duration_seconds.unwrap_or_default(), model, parent.as_deref(), *tokens);
                if let Some(turn) = self.turn() {
                    turn.requests += 1;
                }
                if let Some(subagent) = self.subagent(parent.as_deref()) {
                    subagent.requests += 1;
                    subagent.tokens_seen += *tokens;
                }
            }
            Fact::ToolCompleted { tool, outcome, duration_seconds, parent, .. } => {
                let part = self.tools.entry(tool.clone()).or_default();
                match outcome {
                    ToolOutcome::Ok => part.ok += 1,
                    ToolOutcome::Error | ToolOutcome::Denied | ToolOutcome::Interrupted | ToolOutcome::Lost => part.error += 1,
                }
                part.seconds += duration_seconds;
                part.slowest_seconds = part.slowest_seconds.max(*duration_seconds);
                if let Some(turn) = self.turn() {
                    turn.tool_calls += 1;
                }
                if let Some(subagent) = self.subagent(parent.as_deref()) {
                    subagent.tool_calls += 1;
                }
            }
            Fact::SubagentStarted { call, kind, background, .. } => self.subagents.push(Subagent {
                call: call.clone(),
                kind: kind.clone(),
                background: *background,
                ..Subagent::default()
            }),
            Fact::SubagentEnded { call, outcome, duration_seconds, .. } => {
                if let Some(subagent) = self.subagent(Some(call)) {
                    subagent.outcome = Some(outcome.clone());
                    subagent.duration_seconds = *duration_seconds;
                }
            }
            Fact::RequestRetried { error, delay_seconds, .. } => {
                *self.retries.entry(error.clone()).or_default() += 1;
                self.retry_seconds += delay_seconds.unwrap_or_default();
                if let Some(turn) = self.turn() {
                    turn.retries += 1;
                }
            }
            Fact::RequestFailed { error, .. } => *self.failed_requests.entry(error.clone()).or_default() += 1,
            Fact::Compacted { trigger, pre_tokens, post_tokens, .. } => self.compactions.push(Compaction {
                time,
                trigger: trigger.clone(),
                pre_tokens: *pre_tokens,
                post_tokens: *post_tokens,
            }),
            Fact::TimeSpent { seconds, .. } => {
                for (state, seconds) in seconds {
                    *self.time.entry(*state).or_default() += seconds;
                }
            }
            Fact::ContainerUsed { seconds, cost_usd, .. } => {
                self.container.add(Duration::try_from_secs_f64(*seconds).unwrap_or_default(), *cost_usd);
            }
            Fact::LimitDecided { limit, scope, mode, action, observed, ceiling, why, share, .. } => self.limits.push(Limit {
                time,
                limit: limit.clone(),
                scope: scope.clone(),
                mode: mode.clone(),
                action: action.clone(),
                observed: *observed,
                ceiling: *ceiling,
                why: why.clone(),
                share: *share,
                latency_seconds: None,
                overshoot_usd: None,
            }),
            Fact::LimitEnforced { latency_seconds, overshoot_usd, .. } => {
                if let Some(limit) = self.limits.iter_mut().rev().find(|limit| limit.mode == "enforce" && limit.action != "warn")
                {
                    limit.latency_seconds = Some(*latency_seconds);
                    limit.overshoot_usd = *overshoot_usd;
                }
            }
            Fact::OomKilled { role, memory_bytes, .. } => {
                self.oom_kills.push(OomKill { time, role: role.clone(), memory_bytes: *memory_bytes });
            }
            Fact::ResultMissing { cause, .. } => self.results_missing.push(*cause),
            Fact::Ordered { order, limit, scope, ceiling, .. } => {
                self.orders.push(Told { time, order: *order, limit: limit.clone(), scope: scope.clone(), ceiling: *ceiling });
            }
            Fact::SessionEnded { .. } | Fact::TenantConflict { .. } => {}
            Fact::ProcessExited { reason, exit_code, signal, .. } => {
                (self.exit, self.exit_code, self.signal) = (Some(*reason), *exit_code, *signal);
            }
        }
    }

    /// The turn that is going on.
    fn turn(&mut self) -> Option<&mut Turn> {
        self.turns.last_mut().filter(|turn| turn.outcome.is_none())
    }

    /// The latest one of this call: a resumed agent starts again.
    fn subagent(&mut self, call: Option<&str>) -> Option<&mut Subagent> {
        self.subagents.iter_mut().rev().find(|subagent| Some(subagent.call.as_str()) == call)
    }

    /// Everything that an amount is a part of. What is taken back has no source: nobody says whose estimate was too high.
    fn parts(&mut self, model: &str, source: Option<Source>) -> Vec<&mut Spend> {
        let turn = self.turns.last_mut().filter(|turn| turn.outcome.is_none()).map(|turn| &mut turn.spend);
        let mut parts = vec![&mut self.spend, turn.unwrap_or(&mut self.between_turns)];
        parts.push(&mut self.models.entry(model.to_owned()).or_default().spend);
        parts.push(self.sources.entry(source.unwrap_or(Source::Unattributed)).or_default());
        parts
    }

    /// Compares a prompt with the one before it in the same conversation, which it should have begun with.
    fn prompt(&mut self, asked: f64, model: &str, parent: Option<&str>, tokens: Tokens) {
        self.prompted += tokens;
        let all = self.prompted.prompt();
        #[expect(clippy::cast_precision_loss, reason = "a ratio")]
        if all > 0 {
            self.cache_hit_ratio = Some(self.prompted.cache_read as f64 / all as f64);
        }
        let prompt =
            Prompt { model: model.to_owned(), tokens: tokens.prompt(), time: asked, compactions: self.compactions.len() };
        let Some(before) = self.prompts.insert(parent.map(str::to_owned), prompt) else { return };
        let missed = before.tokens.saturating_sub(tokens.cache_read);
        if before.tokens < CACHEABLE || missed <= before.tokens / 2 {
            return;
        }
        let gap = asked - before.time;
        let cause = if before.compactions != self.compactions.len() {
            "compaction"
        } else if before.model != model {
            "another model"
        } else if gap > LONG_LIFE_SECONDS {
            "expired after an hour"
        } else if gap > SHORT_LIFE_SECONDS {
            "expired after five minutes"
        } else {
            "the prompt changed, or was not cached"
        };
        let turn = self.turn().map(|turn| {
            turn.cache_misses += 1;
            turn.turn
        });
        self.cache_misses.push(Miss { time: asked, turn, model: model.to_owned(), tokens: missed, cause });
    }
}

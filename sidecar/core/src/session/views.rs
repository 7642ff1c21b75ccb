//! What limits, health and the page ask of a session.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{MAIN, Session, TurnView, is_agent};
use crate::Now;
use crate::detect::Streaks;
use crate::detect::why::Doing;
use crate::tokens::Usd;
use crate::update::Activity;

impl Session {
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
            number: turn.number,
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

    /// The tool call in flight that began first, whatever it waits for: its tool and when it started.
    pub fn call_in_flight(&self) -> Option<(&str, Duration)> {
        self.calls.values().map(|call| (call.tool.as_str(), call.started)).min_by_key(|(_, started)| *started)
    }

    /// The model that the main loop asks.
    pub fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    /// How much of the model's window the conversation takes, and how large that is, as far as the CLI told.
    pub fn context(&self) -> Option<(u64, Option<u64>)> {
        self.context.as_ref().map(|(tokens, model)| (*tokens, self.window_of(model)))
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
}

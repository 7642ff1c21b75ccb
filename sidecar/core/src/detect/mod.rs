//! Agents that go round in circles, by what they do and never by what it is about: of a call and its result there are only hashes.
//!
//! ```text
//!   round  the calls of one answer, with their results, whatever their order
//!   news   a call that is new in this turn and succeeded, or is known and has another result: the world moves
//!   wait   a call that lets time pass: a command that sleeps, a tool that polls. Neither it nor the round after it counts
//! ```
//!
//! One file for each detector; [`Loops`] tells them what happened, per thread of the agent where that matters. Everything starts afresh
//! with a turn, and everything is bounded. When in doubt (a memory that is full, a tool that hides its effect) there is no loop.

mod compaction;
mod cycle;
mod error;
pub mod memory;
mod progress;
pub mod why;

use std::collections::BTreeMap;

use crate::hash::{Hash, mix};
use crate::limit::Limit;
use compaction::Compactions;
use cycle::Cycles;
use error::SameError;
use progress::Progress;

/// Threads that are watched: the main loop, and this many subagents.
const THREADS: usize = 256;
/// A result of a tool that we do not know, up to this long, says nothing about what the call changed: *clicked*, *ok*.
const MUTE: usize = 256;

/// A call that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// The tool and its input.
    pub call: u64,
    pub result: u64,
    pub bytes: usize,
    /// What kind of error it was, if it was one; zero if it does not say.
    pub error: Option<u64>,
    pub kind: Kind,
}

/// What a call is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Plain,
    /// To let time pass, or to look whether something has come.
    Wait,
    /// Its effect may not show in its result: a tool that we do not know.
    Opaque,
    /// A key that is pressed: its effect shows in the next look, if at all.
    Press,
    /// How something stands that moves by itself: no circle, and no news as long as it says the same.
    Look,
    /// The agent's own notes, rewritten as a whole: no news, whatever they say.
    Note,
    /// One task of its list: news while it is new, and no part of a circle.
    Task,
}

/// How far each kind of circle has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streaks {
    /// Rounds in a row that were the same.
    pub identical: u64,
    /// How often two to four rounds came in the same order.
    pub alternating: u64,
    /// Rounds that failed alike, with no news in between.
    pub same_error: u64,
    /// Compactions in a row, each soon after the one before.
    pub compactions: u64,
    /// Subagents that were started in this turn.
    pub subagents: u64,
    /// Answers since the last news.
    pub stale: u64,
}

/// How many of each it may be, in the order of [`Limit`]'s: warned at half of it. Healthy agents stay far below; see docs/detectors.md.
pub const CEILINGS: [(Limit, u64); 6] = [
    (Limit::IdenticalCalls, 10),
    (Limit::AlternatingCalls, 6),
    (Limit::SameErrors, 8),
    (Limit::Compactions, 5),
    (Limit::FanOut, 100),
    (Limit::NoProgress, 40),
];

/// What tells a call apart from others.
pub fn signature(tool: &str, input: u64) -> u64 {
    mix(Hash::of(tool.as_bytes()), input)
}

/// What the calls of one answer come to.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    /// Calls and results, in no order.
    signature: u64,
    calls: u64,
    /// Zero if no call failed, or none says how.
    errors: u64,
    news: bool,
    /// It tells nothing: it waited, or what it did does not show.
    neutral: bool,
    waited: bool,
    looked: bool,
}

impl Round {
    fn add(&mut self, ended: &Ended, pair: u64) {
        let waits = ended.kind == Kind::Wait;
        let mute = match ended.kind {
            Kind::Opaque => ended.error.is_none() && ended.bytes <= MUTE,
            Kind::Press => true,
            Kind::Plain | Kind::Wait | Kind::Look | Kind::Note | Kind::Task => false,
        };
        self.signature = self.signature.wrapping_add(pair);
        self.calls = self.calls.wrapping_add(mix(ended.call, 0) | 1);
        if let Some(error) = ended.error.filter(|error| *error != 0) {
            self.errors = self.errors.wrapping_add(mix(error, 0) | 1);
        }
        self.waited |= waits;
        self.neutral |= waits || mute;
        self.looked |= ended.kind == Kind::Look;
    }
}

#[derive(Clone, Debug, Default)]
struct Thread {
    open: usize,
    round: Round,
    /// The round before was a wait.
    waited: bool,
    cycles: Cycles,
    errors: SameError,
}

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub struct Loops {
    threads: BTreeMap<String, Thread>,
    progress: Progress,
    compactions: Compactions,
    /// As of the last that happened: asked more often than changed.
    streaks: Streaks,
}

impl Loops {
    pub fn turn_began(&mut self) {
        *self = Loops::default();
    }

    /// What the thread called before was answered, or never will be: the API takes no answer else.
    pub fn answer_began(&mut self, thread: &str) {
        if let Some(thread) = self.threads.get_mut(thread)
            && std::mem::take(&mut thread.open) > 0
        {
            thread.round = Round::default();
        }
    }

    pub fn call_began(&mut self, thread: &str) {
        if let Some(thread) = self.thread(thread) {
            thread.open = thread.open.saturating_add(1);
        }
    }

    pub fn call_ended(&mut self, thread: &str, ended: &Ended) {
        // What another knows is news to who has not seen it: each subagent begins with nothing.
        let call = mix(ended.call, Hash::of(thread.as_bytes()));
        let pair = mix(mix(call, 0), ended.result);
        let succeeded = ended.error.is_none();
        let noted = matches!(ended.kind, Kind::Note | Kind::Task) && succeeded;
        let news = ended.kind != Kind::Note && self.progress.is_news(call, pair, succeeded);
        if thread.is_empty() {
            self.compactions.called(call);
        }
        let Some(thread) = self.thread(thread) else {
            // Who is not watched may bring news all the same.
            self.progress.round(&Round { news, neutral: true, ..Round::default() });
            return self.settle();
        };
        if !noted {
            thread.round.add(ended, pair);
        }
        thread.round.news |= news;
        thread.open = thread.open.saturating_sub(1);
        if thread.open > 0 {
            return;
        }
        let mut round = std::mem::take(&mut thread.round);
        if round.calls == 0 {
            if round.news {
                self.progress.round(&round);
                self.settle();
            }
            return;
        }
        round.neutral |= std::mem::replace(&mut thread.waited, round.waited);
        thread.cycles.round(&round);
        thread.errors.round(&round);
        self.progress.round(&round);
        self.settle();
    }

    /// An answer of the model is complete, whoever asked.
    pub fn answered(&mut self, main: bool) {
        self.progress.answered();
        if main {
            self.compactions.answered();
        }
        (self.streaks.stale, self.streaks.compactions) = (self.progress.stale(), self.compactions.streak());
    }

    /// The agent has forgotten what it saw: to look again is no circle.
    pub fn compacted(&mut self, automatic: bool) {
        self.threads.clear();
        self.progress.forget();
        if automatic {
            self.compactions.compacted();
        }
        self.settle();
    }

    pub fn subagent_began(&mut self) {
        self.streaks.subagents = self.streaks.subagents.saturating_add(1);
    }

    pub fn subagent_ended(&mut self, thread: &str) {
        self.threads.remove(thread);
        self.settle();
    }

    pub fn streaks(&self) -> Streaks {
        self.streaks
    }

    fn settle(&mut self) {
        let most = |of: fn(&Thread) -> u64| self.threads.values().map(of).max().unwrap_or_default();
        self.streaks = Streaks {
            identical: most(|thread| thread.cycles.identical()),
            alternating: most(|thread| thread.cycles.alternating()),
            same_error: most(|thread| thread.errors.streak()),
            compactions: self.compactions.streak(),
            subagents: self.streaks.subagents,
            stale: self.progress.stale(),
        };
    }

    fn thread(&mut self, name: &str) -> Option<&mut Thread> {
        if !self.threads.contains_key(name) {
            if self.threads.len() >= THREADS {
                return None;
            }
            self.threads.insert(name.to_owned(), Thread::default());
        }
        self.threads.get_mut(name)
    }
}

#[cfg(test)]
mod tests;

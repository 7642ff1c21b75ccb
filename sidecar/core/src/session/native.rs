//! A session of which only its CLI's telemetry can be read: text, or a terminal. Where the stream is read, too, the telemetry is only
//! held against it.

use std::time::Duration;

use super::{NAME, OPEN, Session};
use crate::Now;
use crate::budget::Amount;
use crate::metric::bounded;
use crate::native::{Answer, Book, Event, Increment, Report, What};
use crate::price::canonical;
use crate::tokens::Usd;
use crate::update::{Answered, ExitReason, Outcome, Source, Start, ToolOutcome, Update};

/// What the telemetry said so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Native {
    book: Book,
    /// It said anything at all.
    heard: bool,
    /// The process is gone: what comes now is late, and changes nothing but sums.
    over: bool,
    /// Sessions of this process that are over: what still comes of them opens none of them again.
    past: Vec<String>,
    /// A request of the turn failed for good, and none succeeded since.
    failed: bool,
    /// Subagents so far.
    subagents: u64,
    /// All that it told to be spent, and all that the stream did.
    told: Amount,
    pub(super) streamed: Usd,
}

/// What two witnesses said was spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reconciliation {
    pub stream: Usd,
    pub native: Usd,
}

impl Session {
    /// The CLI exported something.
    pub fn native(&mut self, report: &Report, now: Now) {
        self.native.heard = true;
        let (mut increments, mut events) = self.native.book.take(report);
        if self.native.over {
            increments.extend(self.native.book.close());
            events.clear();
        }
        if increments.is_empty() && events.is_empty() {
            return;
        }
        if !self.blind {
            self.native_told(&increments, now);
            return;
        }
        self.spoke = true;
        for event in events {
            self.native_event(event, now);
        }
        for new in increments {
            if !self.native.over {
                self.native_session(&new.session);
            }
            self.ledger.native(new, now.unix);
        }
        self.flush();
        self.settle(now, true);
    }

    fn native_told(&mut self, increments: &[Increment], now: Now) {
        let worth = increments.iter().map(|new| Amount::new(self.ledger.worth(new, now.unix), new.tokens.total()));
        self.native.told = worth.fold(self.native.told, |sum, one| sum + one);
    }

    /// What was spent by the telemetry, where the stream is read, too.
    pub fn told_natively(&self) -> Amount {
        self.native.told
    }

    pub fn native_heard(&self) -> bool {
        self.native.heard
    }

    /// What the stream and the telemetry said in the end; `None` where there is only one of them.
    pub fn reconciliation(&self) -> Option<Reconciliation> {
        let both = self.native.heard && !self.blind;
        both.then_some(Reconciliation { stream: self.native.streamed, native: self.native.told.usd })
    }

    /// Nothing more will be exported. The exit code tells how the last turn ended, where nobody else did.
    pub(super) fn native_over(&mut self, reason: ExitReason, now: Now) {
        self.native.over = true;
        let rest = self.native.book.close();
        if !self.blind {
            self.native_told(&rest, now);
            return;
        }
        for new in rest {
            self.ledger.native(new, now.unix);
        }
        self.flush();
        match reason {
            ExitReason::Clean => self.native_turn_ends(now),
            ExitReason::Error if self.native.failed => self.end_turn(Outcome::SuccessIsError, None, None, true, now),
            ExitReason::Error => self.end_turn(Outcome::DuringExecution, None, None, true, now),
            // Cut off: as without a result.
            ExitReason::Signal
            | ExitReason::Oom
            | ExitReason::InitFailed
            | ExitReason::Limit
            | ExitReason::Idle
            | ExitReason::Stuck
            | ExitReason::Shutdown => {}
        }
    }

    fn native_session(&mut self, id: &str) {
        if id.is_empty() || id == self.id || self.native.past.iter().any(|past| past == id) {
            return;
        }
        if self.id.is_empty() {
            if let Some(asked) = self.asked_id.take() {
                let outcome = if asked == id || self.start == Start::Fork { "ok" } else { "id_changed" };
                self.out.push(Update::Resumed { outcome });
            }
        } else {
            self.start = Start::Clear;
            self.end_session();
            if self.native.past.len() < OPEN {
                self.native.past.push(std::mem::take(&mut self.id));
            }
        }
        self.id = bounded(id, NAME).to_owned();
        self.ledger.set_session(&self.id);
        self.out.push(Update::SessionStarted { session: self.id.clone(), start: self.start, from: None });
    }

    fn native_event(&mut self, event: &Event, now: Now) {
        self.native_session(&event.session);
        match &event.what {
            What::Prompt => {
                self.native_turn_ends(now);
                self.fed = true;
                self.begin_turn(now);
            }
            What::Answer(answer) => self.native_answer(answer, now),
            What::Failed { error } => {
                self.native.failed = true;
                self.out.push(Update::ApiFailed { session: self.id.clone(), error: error.clone(), parent: None });
            }
            What::Tool { call, tool, ok, duration } => {
                self.out.push(Update::ToolStarted {
                    session: self.id.clone(),
                    call: call.clone(),
                    tool: tool.clone(),
                    parent: None,
                    bytes: 0,
                });
                self.out.push(Update::ToolEnded {
                    session: self.id.clone(),
                    call: call.clone(),
                    tool: tool.clone(),
                    outcome: if *ok { ToolOutcome::Ok } else { ToolOutcome::Error },
                    duration: *duration,
                });
            }
            What::Subagent { kind, duration } => {
                // Its call is not told: it is nobody's but its own.
                self.native.subagents += 1;
                let call = format!("native-{}", self.native.subagents);
                self.out.push(Update::SubagentStarted {
                    session: self.id.clone(),
                    kind: kind.clone(),
                    call: call.clone(),
                    task: None,
                    depth: 1,
                    background: false,
                });
                self.out.push(Update::SubagentEnded { call, outcome: "completed", duration: *duration });
            }
            What::Compacted { trigger } => self.out.push(Update::Compacted {
                trigger: trigger.clone(),
                pre_tokens: 0,
                post_tokens: 0,
                duration: Duration::ZERO,
            }),
        }
    }

    fn native_answer(&mut self, answer: &Answer, now: Now) {
        if answer.source != Source::Unattributed {
            // The CLI asks on its own account before anybody has said anything, too: for a title.
            self.begin_turn(now);
        }
        self.native.failed = false;
        let main = answer.source == Source::Main;
        self.rounds += u64::from(main);
        if let Some(turn) = &mut self.turn {
            turn.answers += 1;
            turn.rounds += u64::from(main);
        }
        if let Some(after) = answer.first_token {
            self.out.push(Update::FirstToken { model: canonical(&answer.model).into_owned(), after });
        }
        self.out.push(Update::Answered(Box::new(Answered {
            session: self.id.clone(),
            answer: answer.id.clone(),
            model: answer.model.clone(),
            source: answer.source,
            parent: None,
            stop_reason: None,
            duration: answer.duration.filter(|duration| *duration > Duration::ZERO),
            since: Duration::ZERO,
            tokens: answer.tokens,
            settled: true,
        })));
    }

    /// A turn is over when the next one begins; nobody says so before.
    fn native_turn_ends(&mut self, now: Now) {
        if self.turn.is_some() && self.native.heard {
            let outcome = if std::mem::take(&mut self.native.failed) { Outcome::SuccessIsError } else { Outcome::Success };
            self.end_turn(outcome, None, None, true, now);
        }
    }
}

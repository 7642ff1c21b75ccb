//! Turns and their results, and the money that they took.

use std::collections::BTreeSet;

use super::{MAIN, NAME, OPEN, RESULTS, RESUMES_AT_ZERO, Session, Turn, parse_version};
use crate::Now;
use crate::event::TurnResult;
use crate::ledger::{Began, Known};
use crate::metric::bounded;
use crate::tokens::{Tokens, Usd};
use crate::update::{Outcome, ResetCause, Start, ToolOutcome, Update};

impl Session {
    pub(super) fn result(&mut self, result: &TurnResult, now: Now) {
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
    pub(super) fn known_start(&self, result: &TurnResult) -> Began {
        // `json` says no version; one that counts its results restores its totals, too.
        let old =
            result.index.is_none() && self.version.as_deref().is_none_or(|version| parse_version(version) <= RESUMES_AT_ZERO);
        match self.start {
            _ if old => Began::Zero,
            Start::Resume | Start::Continue | Start::Fork => Began::Restored,
            Start::Fresh | Start::Clear => Began::Unknown,
        }
    }

    pub(super) fn begin_turn(&mut self, now: Now) {
        self.begin_turn_of(None, now);
    }

    /// `parent`: it is a subagent that shows it, not the main loop.
    pub(super) fn begin_turn_of(&mut self, parent: Option<&str>, now: Now) {
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

    pub(super) fn end_turn(
        &mut self,
        outcome: Outcome,
        reason: Option<String>,
        num_turns: Option<u64>,
        confirmed: bool,
        now: Now,
    ) {
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
    pub(super) fn flush(&mut self) {
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
}

//! What is done about limits: what the CLI is told, and how it is stopped.

use super::{Action, Monitor, Output, SIGCONT, SIGINT, SIGTERM, Signal, Told};
use crate::ladder::{Goal, Ladder};
use crate::limit::{Held, Limit, Mode, Reached, Rule, Scope};
use crate::meter;
use crate::tokens::Usd;
use crate::update::{ExitReason, Outcome, OwnRequest, Step, Update};

impl Monitor {
    /// Holds the limits against the facts, and does what that calls for.
    pub(super) fn judge(&mut self) {
        self.outside.let_through = !self.outside.at_door && self.requests.are_let_through();
        self.outside.can_refuse = self.can_inject();
        let mut told = Vec::new();
        let reached = self.judge.judge(&self.session, &self.outside, self.now, &mut told);
        for mut update in told {
            // Only now and then is there something to tell.
            match &mut update {
                Update::Decided(decision) if decision.limit.asks_why() => decision.why = Some(self.why()),
                Update::Stalled { why, on: true, .. } => *why = Some(self.why()),
                _ => {}
            }
            self.fold(update);
        }
        for reached in reached {
            self.reached(&reached);
        }
        // Somebody may have raised it.
        self.refusing &= self.judge.refuses();
        let holds: Vec<Held> = self.judge.holds().collect();
        if holds != self.holds {
            self.holds = holds;
            meter::waiting(&mut self.meters, &self.settings.rules, &self.holds);
        }
    }

    /// Has the CLI turn away what it should.
    pub(super) fn tell_refusal(&mut self) {
        let wanted = match self.told {
            _ if self.refusing => Told::All,
            Told::All => Told::WhileHeld,
            // In time for what is to stop it at a tool's end.
            Told::Nothing if self.held() || self.judge.is_near() => Told::WhileHeld,
            told => told,
        };
        if wanted != self.told && self.can_inject() {
            self.told = wanted;
            self.inject(if wanted == Told::All { OwnRequest::Refuse } else { OwnRequest::Hold });
        }
    }

    fn reached(&mut self, Reached { rule, .. }: &Reached) {
        if rule.mode != Mode::Enforce {
            return;
        }
        let reason = match rule.limit {
            Limit::Idle => ExitReason::Idle,
            Limit::Startup | Limit::Stall | Limit::Result => ExitReason::Stuck,
            Limit::Turns
            | Limit::CostUsd
            | Limit::Tokens
            | Limit::Duration
            | Limit::Memory
            | Limit::MemoryForecast
            | Limit::IdenticalCalls
            | Limit::AlternatingCalls
            | Limit::SameErrors
            | Limit::Compactions
            | Limit::FanOut
            | Limit::NoProgress => ExitReason::Limit,
        };
        if rule.stall().is_some() && reason == ExitReason::Stuck {
            self.session.stuck(true, self.now);
        }
        if rule.limit == Limit::Idle {
            self.fold(Update::IdleShutdown);
        }
        if rule.refuses() && self.can_inject() {
            self.refuse(rule, reason);
            return;
        }
        // Where nothing can be said to the CLI, its process is all that can be ended.
        let first = if self.settings.parse { rule.first_step() } else { rule.first_step().max(Step::End) };
        let goal = if first == Step::Interrupt { Goal::Turn } else { Goal::Process };
        self.begin(goal, rule.scope, reason, first, SIGTERM, self.outside.spending(rule));
    }

    /// A budget of the session is used up: the turn ends with a result, and the CLI turns away what the app says next, with one too.
    fn refuse(&mut self, rule: &Rule, reason: ExitReason) {
        self.refusing |= !rule.is_shared();
        self.tell_refusal();
        // It waits to have its message turned away: an interrupt would take the reason from it.
        if rule.is_shared() && self.requests.open > 0 && self.session.turn().is_some_and(|turn| turn.rounds == 0) {
            return;
        }
        self.begin(Goal::Turn, rule.scope, reason, Step::Interrupt, SIGTERM, self.outside.spending(rule));
    }

    pub(super) fn begin(
        &mut self,
        goal: Goal,
        scope: Scope,
        reason: ExitReason,
        first: Step,
        signal: Signal,
        ceiling: Option<Usd>,
    ) {
        // Who is already on the way out is not asked more gently.
        if self.ladder.as_ref().is_some_and(|ladder| ladder.step >= first && ladder.goal == Goal::Process) {
            return;
        }
        if goal == Goal::Turn && (self.session.turn().is_none() || self.ladder.is_some()) {
            return;
        }
        let mut ladder = Ladder::new(goal, scope, reason, first, signal, self.settings.patience, self.now.mono);
        ladder.ceiling = ceiling;
        if let Some(before) = &self.ladder {
            // The first reason is the reason.
            if before.reason != ExitReason::Shutdown {
                ladder.reason = before.reason;
            }
        }
        if reason != ExitReason::Shutdown {
            self.session.stop_as(if reason == ExitReason::Stuck { Outcome::StuckKilled } else { Outcome::LimitStopped });
        }
        if goal == Goal::Process {
            self.session.stopping(self.now);
        }
        self.ladder = Some(ladder);
        self.perform(first);
    }

    pub(super) fn perform(&mut self, step: Step) {
        self.fold(Update::Stopping { step });
        let Some(ladder) = &self.ladder else { return };
        let (signal, goal) = (ladder.signal, ladder.goal);
        if goal == Goal::Process {
            self.session.stopping(self.now);
        }
        // Who is stopped hears nothing else.
        if self.outside.frozen_since.is_some() && step != Step::Kill {
            self.signal(SIGCONT);
        }
        match step {
            Step::Warn | Step::Refuse => {}
            Step::Interrupt if self.can_inject() => self.inject(OwnRequest::Interrupt),
            // One-shot: an interrupt by signal gives a result in most states, and ends the process.
            Step::Interrupt => self.signal(SIGINT),
            Step::End if self.can_inject() => {
                // Both in one breath: the totals as they are, then the end.
                self.inject(OwnRequest::GetUsage);
                self.inject(OwnRequest::EndSession);
            }
            Step::End if self.settings.parse => self.signal(SIGINT),
            Step::End | Step::Terminate => {
                if let Some(ladder) = &mut self.ladder {
                    ladder.enter(Step::Terminate, self.now.mono);
                }
                self.signal(signal);
            }
            Step::Kill => self.out.push_back(Output::Action(Action::KillAll)),
        }
    }

    fn signal(&mut self, signal: Signal) {
        self.out.push_back(Output::Action(Action::Signal(signal)));
    }

    pub(super) fn inject(&mut self, request: OwnRequest) {
        let inject = self.asker.ask(request, self.now.mono);
        self.out.push_back(Output::Action(inject));
    }

    pub(super) fn can_inject(&self) -> bool {
        self.settings.stdin_json && self.settings.parse && !self.stdin_closed && self.asker.may_speak()
    }

    pub(super) fn can_ask(&self) -> bool {
        self.settings.poll && self.can_inject()
    }

    pub(super) fn enforced(&self, ladder: &Ladder) -> Update {
        let spent = match self.outside.spent_by_all(ladder.scope) {
            Some(all) => all.usd,
            None => self.session.cost().max(self.report.current().map_or(Usd::ZERO, |session| session.sums.cost_usd)),
        };
        Update::Enforced {
            scope: ladder.scope,
            step: ladder.step,
            latency: self.now.mono.saturating_sub(ladder.decided),
            overshoot: ladder.ceiling.map(|ceiling| spent.saturating_sub(ceiling)),
        }
    }
}

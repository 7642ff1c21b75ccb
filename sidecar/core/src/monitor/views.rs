//! What others may know of an agent, and of what it waits for.

use std::time::Duration;

use super::{Asked, Exit, HeldFor, Monitor, Now, Requests, SIDECAR_LOST, SIGKILL, SUCCESSOR, UNKILLABLE};
use crate::ask::{PAUSED_REASON, SHARED_REASON, share_reason};
use crate::budget::Amount;
use crate::detect::why::{Why, why};
use crate::ladder::Goal;
use crate::limit::{Limit, Scope, Used, UsedShare};
use crate::metric::Meters;
use crate::report::Report;
use crate::session::Reconciliation;
use crate::span::put;
use crate::telemetry::{self, Context, LogEvent, Span};
use crate::timeline::Timeline;
use crate::tokens::Usd;
use crate::update::{Activity, ExitReason, Step};
use crate::who::Who;

impl Monitor {
    pub fn meters(&self) -> &Meters {
        &self.meters
    }

    /// For what only the outside knows: bytes, scrapes, degraded parts.
    pub fn meters_mut(&mut self) -> &mut Meters {
        &mut self.meters
    }

    pub fn report(&self) -> &Report {
        &self.report
    }

    /// What would have to be told if we ended here, without a word: what is open, closed by whoever comes after us. Nothing if nothing
    /// is under way. What is kept of it must be replaced as things go on.
    pub fn last_words(&self, now: Now) -> (Vec<Span>, Vec<LogEvent>) {
        let at_rest = self.session.turn().is_none() && self.spans.as_ref().is_none_or(|spans| spans.is_idle());
        if self.exited || at_rest {
            return Default::default();
        }
        let mut spans = self.spans.clone();
        let now = Now { mono: now.mono.max(self.now.mono), unix: now.unix };
        let (mut session, mut logs, mut events) = (self.session.clone(), self.logs.clone(), Vec::new());
        // If we are killed, the CLI dies with us.
        session.exited(ExitReason::Signal, Exit::Signal(SIGKILL), false, now);
        for update in session.drain() {
            let context = spans.as_mut().and_then(|spans| spans.on(&update, now));
            events.extend(logs.as_mut().and_then(|logs| logs.on(&update, now, context)));
        }
        let mut open: Vec<Span> = Vec::new();
        if let Some(spans) = &mut spans {
            spans.finish(now);
            open.extend(spans.drain());
        }
        for span in &mut open {
            put(&mut span.attributes, "error.type", SIDECAR_LOST);
            put(&mut span.attributes, "claude_agent.closed_by", SUCCESSOR);
            span.status = telemetry::Status::Error(String::from(SIDECAR_LOST));
        }
        for event in &mut events {
            put(&mut event.attributes, "claude_agent.closed_by", SUCCESSOR);
        }
        (open, events)
    }

    /// The span of the turn that runs: what an exemplar points at.
    pub fn context(&self) -> Option<Context> {
        self.spans.as_ref().and_then(|spans| spans.context())
    }

    /// What the CLI is to find as its `TRACEPARENT`, if anything: see [`crate::span`].
    pub fn child_context(&self) -> Option<Context> {
        self.settings.trace.child_context()
    }

    /// Spans, and events of spans, that did not fit.
    pub fn spans_dropped(&self) -> u64 {
        self.spans.as_ref().map_or(0, |spans| spans.dropped())
    }

    /// For whom the agent works, as far as that is known by now.
    pub fn who(&self) -> &Who {
        &self.settings.who
    }

    pub fn activity(&self) -> Activity {
        self.session.activity()
    }

    /// What happened lately.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// A moment of the monotonic clock by the other one, to the millisecond.
    pub(super) fn unix_of(&self, mono: Duration) -> f64 {
        ((self.epoch + mono).as_secs_f64() * 1e3).round() / 1e3
    }

    /// What the agent is about, or held up by.
    pub fn why(&self) -> Why {
        why(&self.session.doing(self.outside.input_over, self.now), &self.vitals)
    }

    /// Whether the agent works: then it is worth while to look at its connections.
    pub fn works(&self) -> bool {
        self.settings.parse && self.session.activity().is_work()
    }

    /// How far each limit is used up.
    pub fn limits(&self) -> Vec<Used> {
        self.judge.used(&self.session, &self.outside, self.now)
    }

    /// What this run has cost so far, by confirmations and live totals.
    pub fn cost(&self) -> Usd {
        self.report.totals().cost_usd
    }

    /// Whether this agent has to wait: for a shared budget, or for people.
    pub fn held(&self) -> bool {
        self.held_for().is_some()
    }

    /// The same, and why: what the app is to hear.
    pub fn held_for(&self) -> Option<HeldFor> {
        let why = match self.exited {
            true => None,
            false if self.order.paused => Some(PAUSED_REASON.to_owned()),
            // A budget that is used up is so whoever shares it.
            false => self.judge.holds().min_by_key(|held| held.share.is_some()).map(|held| match held.share {
                None => SHARED_REASON.to_owned(),
                Some(UsedShare { used, of, tenant }) => {
                    let numbers = match held.limit {
                        Limit::Tokens => format!("{used} of {of} tokens"),
                        _ => format!("{used:.2} of {of:.2} USD"),
                    };
                    let whose = if tenant { ", with the tenant's other agents" } else { "" };
                    share_reason(held.scope.in_words(), &format!("{numbers}{whose}"))
                }
            }),
        };
        Some(HeldFor { why: why?, now: self.judge.holds().next().is_some() })
    }

    /// The budgets that it waits for, each once.
    pub fn waits(&self) -> Vec<Scope> {
        let mut waits: Vec<Scope> = self.judge.holds().filter(|_| !self.exited).map(|held| held.scope).collect();
        waits.sort_unstable();
        waits.dedup();
        waits
    }

    /// What this process has spent; and, while the model is asked or an answer's price is not known yet, what that may be.
    pub fn claim(&self) -> (Amount, Option<Asked>) {
        let Requests { told, open, unpriced, since, .. } = self.requests;
        let asks = self.asks_model();
        // What is being written is not priced yet. Whoever was let through asks, whatever is told to it then.
        let begins = open.max(u64::from(asks && unpriced == 0 && self.ladder.is_none()));
        let answers = if self.exited { 0 } else { begins + unpriced };
        // What is asked for keeps its place until it is priced, whatever comes after it.
        let request = if told > 0 { told } else { u64::try_from(since.as_nanos()).unwrap_or(u64::MAX) };
        (self.outside.spent, (answers > 0).then_some(Asked { each: self.answer, answers, request }))
    }

    pub(super) fn asks_model(&self) -> bool {
        self.session.turn().is_some()
            && matches!(self.session.activity(), Activity::Model | Activity::RetryBackoff | Activity::Compacting)
    }

    /// What an answer has cost of late, if there was any.
    pub fn answer(&self) -> Amount {
        self.answer
    }

    /// Whether the CLI still has to say what it has spent: it was asked, and answers at once.
    pub fn awaits_totals(&self) -> bool {
        !self.exited && self.asker.asks_usage()
    }

    /// The same of one that cannot be asked, and says it in its own time.
    pub fn awaits_telemetry(&self) -> bool {
        let Requests { passed, priced, .. } = self.requests;
        !self.exited && self.by_telemetry() && priced <= passed && !passed.is_zero()
    }

    /// Whether only the CLI's telemetry says at once what an answer has cost. It may have been told to be silent: who has said nothing
    /// by its second request will not; and who does not knock has nobody who waits for it.
    pub(super) fn by_telemetry(&self) -> bool {
        let may_yet = (1..=2).contains(&self.requests.told);
        self.settings.native && !self.can_ask() && (self.session.native_heard() || may_yet)
    }

    /// Whether the next answers may use up a shared budget, or nobody knows yet that they may not.
    pub fn may_be_near(&self) -> bool {
        !self.exited && self.judge.may_be_near()
    }

    /// Whether it waits at the door for what others may need of a shared budget.
    pub fn waits_for_others(&self) -> bool {
        !self.exited && self.judge.waits_for_others()
    }

    /// Whether what is its own of shared budgets is to be kept for it: it has something to do, and may do it.
    pub fn claims(&self) -> bool {
        !self.exited && !self.order.paused && self.session.turn().is_some() && self.session.activity().is_work()
    }

    /// Whether the CLI's telemetry said anything.
    pub fn native_heard(&self) -> bool {
        self.session.native_heard()
    }

    /// What the stream and the CLI's telemetry say was spent, where both are read: compare them when the CLI has ended.
    pub fn reconciliation(&self) -> Option<Reconciliation> {
        self.session.reconciliation()
    }

    /// Whether there is a CLI still.
    pub fn running(&self) -> bool {
        !self.exited
    }

    /// The CLI's pid, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.pid.filter(|_| !self.exited)
    }

    /// Whether the agent can still be recovered: not when even a kill did not end it.
    pub fn live(&self) -> bool {
        !self.ladder.as_ref().is_some_and(|ladder| {
            ladder.step == Step::Kill
                && self.now.mono.saturating_sub(ladder.decided) > self.settings.patience.whole() + UNKILLABLE
        })
    }

    /// Whether the agent takes work: it runs and is not on its way out.
    pub fn ready(&self) -> bool {
        !self.exited
            && (self.session.spoke() || self.settings.stdin_json || !self.settings.parse)
            && !self.ladder.as_ref().is_some_and(|ladder| ladder.goal == Goal::Process)
    }

    /// Whether a limit, rather than a signal or the agent itself, ended the process.
    pub fn stopped_by_limit(&self) -> bool {
        self.ladder.as_ref().is_some_and(|ladder| {
            matches!(ladder.reason, ExitReason::Limit | ExitReason::Idle | ExitReason::Stuck) && ladder.goal == Goal::Process
        })
    }
}

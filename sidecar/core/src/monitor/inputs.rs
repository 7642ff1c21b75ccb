//! What each [`super::Input`] does.

use std::time::Duration;

use super::{Action, Exit, Monitor, Output, SIGKILL, SIGTERM, Stop, is_own};
use crate::content::Piece;
use crate::detect::why::Why;
use crate::event::{Answer, Broken, Event, Message, claude_code};
use crate::ladder::Goal;
use crate::limit::{Ceiling, Limit, Mode, SHARED, Scope, Shared};
use crate::line::Line;
use crate::meter;
use crate::metric::{COST_RECONCILIATION_ERROR, MEMORY_EXHAUSTION};
use crate::native;
use crate::order::Order;
use crate::sample::Sample;
use crate::session::Reconciliation;
use crate::update::{ExitReason, OwnRequest, Step, Update, Wish};
use crate::who::{self, Guarded};

impl Monitor {
    pub(super) fn spawned(&mut self) {
        self.session.another(self.now);
        self.drain_session();
        self.fold(Update::ProcessStarted);
        if !self.settings.stdin_json {
            self.outside.input_over = Some(self.now.mono);
            self.outside.fed_at = Some(self.now.mono);
            if self.settings.parse {
                self.session.prompted(self.now);
            }
        }
    }

    /// Limits on silence start over where they were. Those on wall clocks go on: they are about the clock.
    pub(super) fn slept(&mut self, gap: Duration) {
        self.session.slept(gap);
        self.vitals.slept(gap);
        self.outside.frozen_since = self.vitals.frozen_since();
        for since in [&mut self.outside.input_over, &mut self.outside.fed_at, &mut self.outside.resumed_at].into_iter().flatten()
        {
            *since += gap;
        }
    }

    pub(super) fn stdout(&mut self, bytes: Option<&[u8]>) {
        let mut splitter = std::mem::take(&mut self.stdout);
        let mut take = |line: Line<'_>| self.line(line);
        match bytes {
            Some(bytes) => splitter.push(bytes, &mut take),
            None => splitter.finish(&mut take),
        }
        self.stdout = splitter;
    }

    fn line(&mut self, line: Line<'_>) {
        let (bytes, whole) = match line {
            Line::Whole(bytes) => (bytes, true),
            Line::Unterminated(bytes) => (bytes, false),
            Line::TooLong => return self.unread(Broken::TooLong),
        };
        if bytes.len() > self.longest {
            self.longest = bytes.len();
            self.fold(Update::LongestLine { bytes: bytes.len() });
        }
        let told = self.content(bytes);
        self.understand(bytes, whole);
        if let Some(spans) = &mut self.spans {
            told.into_iter().for_each(|piece| spans.say(piece));
        }
    }

    /// What may be told of a line's content. Of a call that ends with it, that is told now: then there is still a span for it.
    fn content(&mut self, line: &[u8]) -> Vec<Piece> {
        let (gates, Some(spans)) = (&self.settings.trace.gates, &mut self.spans) else { return Vec::new() };
        if !gates.any() {
            return Vec::new();
        }
        let (ends, rest): (Vec<Piece>, Vec<Piece>) =
            gates.of_cli(line).into_iter().partition(|piece| matches!(piece, Piece::Output { .. }));
        ends.into_iter().for_each(|piece| spans.say(piece));
        rest
    }

    fn understand(&mut self, bytes: &[u8], whole: bool) {
        // With `--output-format json --verbose` one line is a list of messages.
        if bytes.trim_ascii_start().first() == Some(&b'[') {
            match claude_code::parse_array(bytes) {
                Ok(messages) => {
                    self.truncated |= matches!(messages.last(), Some(Err(Broken::Truncated)));
                    messages.into_iter().for_each(|message| self.heard(message));
                }
                Err(broken) => self.broken(broken, whole),
            }
            return;
        }
        match claude_code::parse_stdout(bytes) {
            Ok(message) => self.heard(Ok(message)),
            Err(broken) => self.broken(broken, whole),
        }
    }

    fn broken(&mut self, broken: Broken, whole: bool) {
        if !whole {
            self.truncated = true;
        }
        self.unread(if whole { broken } else { Broken::Truncated });
    }

    fn unread(&mut self, broken: Broken) {
        self.fold(Update::Unread { reason: broken.as_str(), count: 1 });
    }

    fn heard(&mut self, message: Result<Message, Broken>) {
        let message = match message {
            Ok(message) => message,
            Err(broken) => return self.unread(broken),
        };
        let kind = message.event.kind();
        if message.misshapen > 0 {
            self.fold(Update::Unread { reason: "field", count: u64::from(message.misshapen) });
        }
        let mut own = false;
        if let Event::ControlResponse { id, answer, .. } = &message.event {
            own = is_own(id, &self.settings.nonce);
            if let Some(request) = self.asker.answered(id) {
                self.fold(Update::Asked { request, answered: true });
                if request == OwnRequest::GetUsage {
                    // One that knows no totals, or not this question, has no more to say than its answers.
                    self.session.ledger.set_eager(self.stdin_closed || !matches!(answer, Answer::Usage { .. }));
                }
            }
        }
        if !own && is_protocol(&message.event) {
            self.asker.cli_spoke();
        }
        let asks = asks_money(&message.event);
        if !own {
            self.session.stuck(false, self.now);
        }
        let unknown = match &message.event {
            Event::Unknown { kind, subtype } => {
                Some(subtype.as_ref().map_or_else(|| kind.clone(), |sub| format!("{kind}/{sub}")))
            }
            _ => None,
        };
        self.session.hear(message, own, self.now);
        self.drain_session();
        // A whole circle may come in one read.
        let streaks = self.session.streaks();
        if std::mem::replace(&mut self.streaks, streaks) != streaks {
            self.judge();
        }
        // After the session has its name, so that it is counted there.
        self.fold(unknown.map_or(Update::Heard { kind }, |kind| Update::Unknown { kind }));
        if asks {
            self.asker.want_usage();
        }
    }

    pub(super) fn stdin(&mut self, bytes: &[u8]) {
        let mut splitter = std::mem::take(&mut self.stdin);
        splitter.push(bytes, &mut |line| {
            let Line::Whole(bytes) = line else { return };
            if !self.asker.app_spoke() {
                // Totals before the first answer tell where a resumed session began.
                self.asker.first_line();
            }
            let message = claude_code::parse_stdin(bytes);
            // Before anything is spent on it.
            self.learn(bytes, message.as_ref().is_ok_and(|message| matches!(message.event, Event::User(_))));
            if let Ok(message) = message {
                if self.outside.fed_at.is_none() && matches!(message.event, Event::User(_)) {
                    self.outside.fed_at = Some(self.now.mono);
                }
                self.session.overhear(message, self.now);
                self.drain_session();
                if let Some(spans) = &mut self.spans
                    && let Some(piece) = self.settings.trace.gates.of_app(bytes)
                {
                    spans.say(piece);
                }
            }
        });
        self.stdin = splitter;
    }

    fn learn(&mut self, line: &[u8], is_message: bool) {
        if self.settings.learn.is_over() {
            return;
        }
        let over = self.settings.learn.read(line, is_message, &mut self.settings.who);
        self.learnt(over);
    }

    fn learnt(&mut self, over: bool) {
        let who = &self.settings.who;
        if *who != self.recorder.who {
            self.recorder.who.clone_from(who);
            if let Some(logs) = &mut self.logs {
                logs.who.clone_from(who);
            }
            if let Some(spans) = &mut self.spans {
                spans.who.clone_from(who);
            }
        }
        if over {
            self.out.push_back(Output::Known);
        }
    }

    pub(super) fn conflict(&mut self, kind: who::Shared, owner: &str, action: Guarded) {
        if !self.conflicts.contains(&kind) {
            self.conflicts.push(kind);
            self.fold(Update::TenantConflict { kind, owner: owner.to_owned(), action });
        }
    }

    pub(super) fn stdin_ended(&mut self) {
        let over = self.settings.learn.end();
        self.learnt(over);
        self.outside.input_over = Some(self.now.mono);
        // One more question while it can be asked; a stop under way keeps the line open for itself.
        if self.can_ask()
            && let Some(inject) = self.asker.last_usage(self.now.mono)
        {
            self.out.push_back(Output::Action(inject));
            return;
        }
        self.close_stdin();
    }

    pub(super) fn close_stdin(&mut self) {
        if !self.stdin_closed {
            self.stdin_closed = true;
            self.asker.eof_forwarded();
            self.session.ledger.set_eager(true);
            self.out.push_back(Output::Action(Action::CloseStdin));
        }
    }

    pub(super) fn not_injected(&mut self, id: &str) {
        self.stdin_closed = true;
        self.session.ledger.set_eager(true);
        if let Some(request) = self.asker.answered(id) {
            self.fold(Update::Asked { request, answered: false });
            let asked_to_stop = matches!(request, OwnRequest::Interrupt | OwnRequest::EndSession);
            if let Some(ladder) = self.ladder.as_mut().filter(|_| asked_to_stop) {
                ladder.enter(Step::Terminate, self.now.mono);
                self.perform(Step::Terminate);
            }
        }
    }

    pub(super) fn native(&mut self, report: &native::Report) {
        let before = self.session.told_natively();
        self.session.native(report, self.now);
        self.drain_session();
        let more = self.session.told_natively().saturating_sub(before);
        if !more.is_zero() && self.by_telemetry() {
            self.answer = more.max(self.answer.half());
        }
        if let Some(until) = report.priced_until().filter(|_| self.by_telemetry()) {
            self.requests.priced(until, self.outside.at_door);
        }
        self.spent();
    }

    /// The stream of a run that cannot be asked has only part of it before the end.
    pub(super) fn spent(&mut self) {
        self.outside.spent = self.heard.max(self.session.told_natively());
        self.outside.answer = self.answer;
    }

    pub(super) fn sampled(&mut self, sample: &Sample) {
        self.outside.memory_bytes = sample.working_set();
        self.out_of_memory |= sample.oom_unknown > 0;
        for victim in &sample.oom_victims {
            self.out_of_memory |= victim.role == "cli";
            self.fold(Update::OomKilled { role: victim.role, memory_bytes: victim.memory_bytes });
        }
        sample.measure(&mut self.meters);
        self.vitals.sampled(sample, self.now.mono);
        self.foresee(sample);
        self.outside.frozen_since = self.vitals.frozen_since();
        self.hold(Some(self.why()));
    }

    fn foresee(&mut self, sample: &Sample) {
        let chosen = self.settings.rules.iter().find_map(|rule| match (rule.limit, rule.ceiling) {
            (Limit::Memory, Ceiling::Bytes(bytes)) if rule.mode != Mode::Off => Some(bytes),
            _ => None,
        });
        let Some(bytes) = sample.working_set() else { return };
        let limit = [chosen, sample.container.limit_bytes].into_iter().flatten().min();
        self.growth.sampled(self.now.mono, bytes, limit);
        self.outside.memory_left = self.growth.left();
        match self.growth.left() {
            Some(left) => self.meters.set(&MEMORY_EXHAUSTION, &[], (self.now.unix + left).as_secs_f64()),
            None => self.meters.clear(&MEMORY_EXHAUSTION),
        }
    }

    pub(super) fn container_used(&mut self, time: Duration) {
        self.container.waits += time;
        // Who is still to say for whom it works shall pay for the beginning, too.
        if self.settings.learn.is_over() {
            self.book_container();
        }
    }

    fn book_container(&mut self) {
        let time = std::mem::take(&mut self.container.waits);
        if time.is_zero() {
            return;
        }
        // Of the whole, so that nothing is lost in the rounding.
        let before = self.settings.prices.container(self.container.booked);
        self.container.booked += time;
        let cost = self.settings.prices.container(self.container.booked) - before;
        self.fold(Update::ContainerUsed { session: self.session.id().to_owned(), time, cost });
    }

    pub(super) fn shared(&mut self, shared: &[Option<Shared>; SHARED]) {
        let before = std::mem::replace(&mut self.outside.shared, *shared);
        for rule in self.settings.rules.clone().iter().filter(|rule| rule.mode != Mode::Off) {
            let Some((at, old)) = rule.scope.shared().and_then(|at| Some((at, before[at]?))) else { continue };
            // What was raised before anybody told of it was not raised now.
            let raised = match rule.limit {
                Limit::Tokens => shared[at].is_some_and(|new| new.raised.tokens > old.raised.tokens),
                _ => shared[at].is_some_and(|new| new.raised.usd > old.raised.usd),
            };
            if raised {
                self.was_told(Wish::Raise, Some((rule.limit, rule.scope, self.outside.ceiling(rule))));
            }
        }
        meter::budgets(&mut self.meters, &self.settings.rules, &self.outside);
        meter::waiting(&mut self.meters, &self.settings.rules, &self.holds);
    }

    /// Asked at each of its doors, it has at most one request for each of its threads.
    pub(super) fn asks(&mut self) {
        self.requests.told += 1;
        self.requests.open = (self.requests.open + 1).min(1 + self.session.subagents_active() as u64);
        self.outside.at_door = true;
    }

    /// What it has spent so far comes with the answer, and all that it said before comes before that.
    pub(super) fn knocks(&mut self) {
        if self.can_ask() {
            self.inject(OwnRequest::GetUsage);
        }
    }

    pub(super) fn ordered(&mut self, order: &Order) {
        let before = std::mem::replace(&mut self.order, *order);
        (self.outside.raised, self.outside.paused) = (order.raised, order.paused);
        if before.paused != order.paused {
            self.spared = self.session.turn().filter(|_| order.paused).map(|turn| turn.started);
            self.outside.resumed_at = (!order.paused).then_some(self.now.mono);
            self.was_told(if order.paused { Wish::Pause } else { Wish::Resume }, None);
        }
        for (limit, ceiling) in order.raised.each() {
            if !before.raised.each().any(|before| before == (limit, ceiling)) {
                self.was_told(Wish::Raise, Some((limit, Scope::Session, ceiling)));
            }
        }
        if order.interrupts > before.interrupts {
            // What is paused at once is asked for one thing.
            if order.paused == before.paused {
                self.was_told(Wish::Interrupt, None);
            }
            self.begin(Goal::Turn, Scope::Session, ExitReason::Shutdown, Step::Interrupt, SIGTERM, None);
        }
        if order.stop && !before.stop {
            self.was_told(Wish::Stop, None);
            self.stop(Stop::Signal(SIGTERM));
        }
    }

    fn was_told(&mut self, order: Wish, raised: Option<(Limit, Scope, f64)>) {
        let session = self.session.id().to_owned();
        let (limit, scope, ceiling) = (raised.map(|one| one.0), raised.map(|one| one.1), raised.map(|one| one.2));
        self.fold(Update::Ordered { session, order, limit, scope, ceiling });
    }

    /// Tells what the agent is held up by, and when it is so no longer.
    fn hold(&mut self, why: Option<Why>) {
        let why = why.filter(|why| why.stall().is_some());
        let before = std::mem::replace(&mut self.held, why);
        if before != why {
            for (why, on) in [(before, false), (why, true)] {
                if let Some(kind) = why.and_then(Why::stall) {
                    self.fold(Update::Stalled { kind, on, why });
                }
            }
        }
    }

    pub(super) fn stop(&mut self, stop: Stop) {
        let signal = match stop {
            Stop::Signal(signal) => signal,
            Stop::AppGone => SIGTERM,
        };
        let first = if self.can_inject() { Step::End } else { Step::Terminate };
        self.begin(Goal::Process, Scope::Session, ExitReason::Shutdown, first, signal, None);
    }

    pub(super) fn exit(&mut self, exit: Exit) {
        self.book_container();
        let reason = match (&self.ladder, exit) {
            (Some(ladder), _) => ladder.reason,
            // A shell around the CLI says it with a code. That a tool was killed before is no reason to think so of the CLI.
            (None, Exit::Signal(SIGKILL) | Exit::Code(137)) if self.out_of_memory => ExitReason::Oom,
            (None, Exit::Signal(_) | Exit::Code(129 | 130 | 143)) => ExitReason::Signal,
            (None, Exit::Code(0)) => ExitReason::Clean,
            (None, Exit::Code(_)) if !self.session.spoke() && self.settings.parse => ExitReason::InitFailed,
            (None, Exit::Code(_)) => ExitReason::Error,
        };
        self.session.exited(reason, exit, self.truncated, self.now);
        self.drain_session();
        self.exited = true;
        if let Some(ladder) = &self.ladder {
            let (step, since) = (ladder.step, ladder.since);
            let enforced = self.enforced(ladder);
            self.fold(Update::StepEnded { step, lasted: self.now.mono.saturating_sub(since) });
            self.fold(enforced);
        }
        for request in self.asker.give_up() {
            self.fold(Update::Asked { request, answered: false });
        }
        if let Some(spans) = &mut self.spans {
            spans.finish(self.now);
        }
        if let Some(Reconciliation { stream, native }) = self.session.reconciliation() {
            self.meters.add_usd(&COST_RECONCILIATION_ERROR, &["over"], stream.saturating_sub(native));
            self.meters.add_usd(&COST_RECONCILIATION_ERROR, &["under"], native.saturating_sub(stream));
        }
    }
}

/// What only the CLI says, and no echo of what the app said.
fn is_protocol(event: &Event) -> bool {
    matches!(
        event,
        Event::Init(_)
            | Event::Status { .. }
            | Event::Stream(_)
            | Event::Result(_)
            | Event::SessionState { .. }
            | Event::HookStarted { .. }
            | Event::ControlResponse { .. }
    )
}

/// Whether money may have moved, so that a question is worth asking.
fn asks_money(event: &Event) -> bool {
    use crate::event::Stream;
    matches!(
        event,
        Event::Result(_)
            | Event::Assistant(_)
            | Event::User(_)
            | Event::Stream(Stream::MessageStop)
            | Event::TaskUpdated { .. }
            | Event::TaskEnded { .. }
            | Event::TaskProgress { .. }
            | Event::Compacted { .. }
    )
}

//! How turns, requests and calls begin and end, and what all spans have in common.

use super::*;
use crate::content::message;
use crate::telemetry::SpanId;

impl Spans {
    pub(super) fn turn_started(&mut self, turn: u64, at: Duration) -> Option<Context> {
        self.turn = Turn::default();
        let (semconv, agent) = (self.settings.semconv, self.settings.agent_name.clone());
        let open = self.start(Key::Turn, None, format!("invoke_agent {agent}"), SpanKind::Internal, at)?;
        let attributes = &mut open.span.attributes;
        put(attributes, "gen_ai.operation.name", "invoke_agent");
        semconv.put(attributes, AGENT_PROVIDER, ANTHROPIC);
        put(attributes, "gen_ai.agent.name", agent);
        put(attributes, "claude_agent.turn", turn);
        Some(open.span.context)
    }

    pub(super) fn turn_ended(&mut self, update: &Update, at: Duration) -> Option<Context> {
        let Update::TurnEnded { session, outcome, reason, answers, num_turns, cost, tokens, confirmed, .. } = update else {
            return None;
        };
        // Nobody waits for these any more.
        self.unanswered(*outcome, at);
        self.end(&Key::Compact, at, End::Failed("compaction_failed"));
        self.end_all(at, |key, _| matches!(key, Key::Permission(_)));
        let turn = std::mem::take(&mut self.turn);
        let open = self.tree.get(&Key::Turn)?;
        let context = open.span.context;
        let attributes = &mut open.span.attributes;
        self.who.describe(attributes);
        if !session.is_empty() {
            put(attributes, "gen_ai.conversation.id", session.as_str());
        }
        let (mut before, opening) = (None, self.opening.take());
        let opens = opening.is_some();
        if let Some((start, from)) = opening {
            put(attributes, "claude_agent.session.start", start.as_str());
            if let Some(from) = &from {
                put(attributes, "claude_agent.session.from", from.as_str());
            }
            before = from;
        }
        if let Some(model) = &self.model {
            put(attributes, "gen_ai.request.model", model.as_str());
        }
        put(attributes, "claude_agent.outcome", outcome.as_str());
        if let Some(reason) = reason {
            put(attributes, "claude_agent.terminal_reason", reason.as_str());
        }
        if let Some(num_turns) = num_turns {
            put(attributes, "claude_agent.num_turns", *num_turns);
        }
        if let Some(cause) = turn.missing {
            put(attributes, "claude_agent.cause", cause.as_str());
        }
        put(attributes, "claude_agent.answers", *answers);
        put(attributes, "claude_agent.cost_usd", *cost);
        put(attributes, "claude_agent.confirmed", *confirmed);
        usage(attributes, **tokens);
        // The conventions have no cached tokens here.
        put(attributes, "claude_agent.usage.cache_read.input_tokens", tokens.cache_read);
        put(attributes, "claude_agent.usage.cache_write.input_tokens", written(**tokens));
        if turn.keep {
            put(attributes, "claude_agent.keep", true);
        }
        let of_this_process = self.last.as_ref().filter(|(_, last)| last == session || Some(last) == before.as_ref());
        let of_another = || {
            [Some(session), before.as_ref()].into_iter().flatten().filter(|_| opens).find_map(|id| self.settings.turns.get(id))
        };
        if let Some(to) = of_this_process.map(|(to, _)| to).or_else(of_another) {
            let attributes = vec![("claude_agent.link", "previous_turn".into())];
            open.span.links.push(Link { to: *to, attributes });
        }
        let end = match outcome {
            Outcome::Success => End::Well,
            // Who wanted it has got it.
            Outcome::Interrupted if self.gone.is_none() => End::Well,
            Outcome::SuccessIsError => End::Failed(turn.failure.unwrap_or(outcome.as_str())),
            Outcome::MaxTurns
            | Outcome::DuringExecution
            | Outcome::MaxBudget
            | Outcome::StructuredOutput
            | Outcome::NoResult
            | Outcome::StuckKilled
            | Outcome::LimitStopped
            | Outcome::Crashed
            | Outcome::Interrupted => End::Failed(outcome.as_str()),
        };
        self.end(&Key::Turn, at, end);
        self.last = Some((context, session.clone()));
        self.behind = Some(context);
        if self.gone.is_none() && !self.tree.has(&Key::Shutdown) {
            (self.limit, self.step) = (None, None);
        }
        Some(context)
    }

    /// A request that nobody answered is told if it is known to have been made.
    fn unanswered(&mut self, outcome: Outcome, at: Duration) {
        let made = |request: &Request| request.said || !request.retries.is_empty();
        if let Some(request) = self.request.take().filter(made) {
            let error = self.turn.failure.unwrap_or_else(|| self.gone.map_or(outcome.as_str(), MissingCause::as_str));
            self.request_failed(request, error, at);
        }
    }

    fn request_failed(&mut self, request: Request, error: &'static str, at: Duration) -> Option<Context> {
        // The answer to one that came before may still be open.
        self.end(&Key::Chat(MAIN.to_owned()), at, End::Lost);
        let model = self.model.clone().unwrap_or_else(|| String::from("unknown"));
        self.chat(MAIN, &model, &model, None, request, at)?;
        self.end(&Key::Chat(MAIN.to_owned()), at, End::Failed(error))
    }

    pub(super) fn api_failed(&mut self, error: &'static str, parent: Option<&str>, at: Duration) -> Option<Context> {
        let failed = vec![("error.type", error.into())];
        if let Some(call) = parent {
            return self.event(&Key::Subagent(call.to_owned()), at, "api_error", failed);
        }
        self.turn.failure = Some(error);
        self.event(&Key::Turn, at, "api_error", failed);
        if self.tree.has(&Key::Chat(MAIN.to_owned())) {
            return self.context();
        }
        let request = self.request.take()?;
        self.request_failed(request, error, at)
    }

    pub(super) fn answering(
        &mut self,
        answer: &str,
        model: &str,
        parent: Option<&str>,
        streamed: bool,
        at: Duration,
    ) -> Option<Context> {
        let thread = parent.unwrap_or(MAIN);
        self.end(&Key::Chat(thread.to_owned()), at, End::Lost);
        let (request, asked_for) = match parent {
            None => (self.request.take(), self.model.clone()),
            Some(call) => {
                let asked = self.tree.get(&Key::Subagent(call.to_owned())).and_then(|agent| agent.asked.take());
                (asked.map(|start| Request { start, said: false, retries: Vec::new() }), None)
            }
        };
        // Where the stream is shown, an answer's beginning is a fact; else it is the first that is heard of a request.
        let request = request.unwrap_or(Request { start: at, said: streamed, retries: Vec::new() });
        let waited = (streamed && request.said).then(|| at.saturating_sub(request.start));
        let context = self.chat(thread, asked_for.as_deref().unwrap_or(model), model, Some(answer), request, at)?;
        if let Some(open) = self.tree.get(&Key::Chat(thread.to_owned())) {
            open.streamed = streamed;
            if let Some(waited) = waited {
                self.settings.semconv.put(&mut open.span.attributes, FIRST_CHUNK, waited);
            }
        }
        Some(context)
    }

    fn chat(
        &mut self,
        thread: &str,
        asked_for: &str,
        model: &str,
        answer: Option<&str>,
        request: Request,
        at: Duration,
    ) -> Option<Context> {
        let parent = (thread != MAIN).then_some(thread);
        let place = self.home(parent, at);
        let semconv = self.settings.semconv;
        let name = format!("chat {asked_for}");
        let open = self.start(Key::Chat(thread.to_owned()), place, name, SpanKind::Client, request.start)?;
        let attributes = &mut open.span.attributes;
        put(attributes, "gen_ai.operation.name", "chat");
        semconv.put(attributes, PROVIDER, ANTHROPIC);
        put(attributes, "gen_ai.request.model", asked_for);
        if let Some(answer) = answer {
            put(attributes, "gen_ai.response.model", model);
            put(attributes, "gen_ai.response.id", answer);
        }
        put(attributes, "claude_agent.source", if parent.is_some() { "subagent" } else { "main" });
        if !request.said {
            put(attributes, "claude_agent.timing", "inferred");
        }
        if !request.retries.is_empty() {
            put(attributes, "claude_agent.retries", u64::try_from(request.retries.len()).unwrap_or(u64::MAX));
        }
        open.span.events = request.retries;
        Some(open.span.context)
    }

    pub(super) fn answered(&mut self, answered: &Answered, at: Duration) -> Option<Context> {
        let Answered { answer, parent, stop_reason, since, tokens, settled, .. } = answered;
        let key = Key::Chat(parent.clone().unwrap_or_default());
        let semconv = self.settings.semconv;
        let open = self.tree.get(&key)?;
        let attributes = &mut open.span.attributes;
        debug_assert!(attributes.contains(&("gen_ai.response.id", answer.as_str().into())), "one answer a thread");
        if let Some(reason) = stop_reason {
            put(attributes, "gen_ai.response.finish_reasons", Value::List(vec![reason.clone()]));
        }
        if *settled || !tokens.is_zero() {
            put(attributes, "gen_ai.usage.input_tokens", tokens.prompt());
            semconv.put(attributes, CACHE_READ, tokens.cache_read);
            semconv.put(attributes, CACHE_WRITE, written(*tokens));
        }
        if *settled {
            put(attributes, "gen_ai.usage.output_tokens", tokens.output);
        }
        let end = if open.streamed && stop_reason.is_none() { End::Failed("truncated") } else { End::Well };
        self.end(&key, at.saturating_sub(*since), end)
    }

    pub(super) fn tool_ended(&mut self, call: &str, outcome: ToolOutcome, at: Duration) -> Option<Context> {
        let key = Key::Tool(call.to_owned());
        let open = self.tree.get(&key)?;
        put(&mut open.span.attributes, "claude_agent.outcome", outcome.as_str());
        let agent = open.under.clone().filter(|under| matches!(under, Key::Subagent(_)));
        // Who was asked for it has nothing to say any more.
        self.end_all(at, |child, open| open.under.as_ref() == Some(&key) && !matches!(child, Key::Subagent(_)));
        let end = match outcome {
            ToolOutcome::Ok => End::Well,
            ToolOutcome::Error => End::Failed("tool_error"),
            ToolOutcome::Denied => End::Well,
            ToolOutcome::Interrupted => End::Failed("interrupted"),
            ToolOutcome::Lost => End::Lost,
        };
        if let Some(agent) = agent.and_then(|agent| self.tree.get(&agent)) {
            agent.asked = Some(at);
        }
        self.end(&key, at, end)
    }

    pub(super) fn hook_ended(&mut self, hook: &str, outcome: &str, at: Duration) -> Option<Context> {
        let key = Key::Hook(hook.to_owned());
        put(&mut self.tree.get(&key)?.span.attributes, "claude_agent.outcome", outcome);
        self.end(&key, at, if outcome == "error" { End::Failed("hook_error") } else { End::Well })
    }

    pub(super) fn shutdown(&mut self, at: Duration) {
        let place = self.tree.place(Key::Turn);
        let (behind, limit) = (self.behind.filter(|_| place.is_none()), self.limit);
        if let Some(open) = self.start(Key::Shutdown, place, String::from("shutdown"), SpanKind::Internal, at) {
            open.span.links.extend(behind.map(|to| Link { to, attributes: vec![("claude_agent.link", "previous_turn".into())] }));
            if let Some(limit) = limit {
                put(&mut open.span.attributes, "claude_agent.limit", limit.as_str());
                put(&mut open.span.attributes, "claude_agent.keep", true);
            }
        }
    }

    // ---- what all have in common

    /// Where the work of a thread hangs.
    pub(super) fn home(&mut self, parent: Option<&str>, at: Duration) -> Option<Place> {
        let agent = parent.and_then(|call| self.tree.place(Key::Subagent(call.to_owned())));
        if let Some(place) = agent.or_else(|| self.tree.place(Key::Turn)) {
            return Some(place);
        }
        if let Some(parent) = self.behind {
            return Some(Place { parent, under: None });
        }
        if !self.tree.has(&Key::Background) {
            self.start(Key::Background, None, String::from("claude_agent.background"), SpanKind::Internal, at);
        }
        self.tree.place(Key::Background)
    }

    /// The call that waits for this server of the app: the CLI does not say which.
    pub(super) fn called(&self, server: &str) -> Option<Place> {
        let word = |text: &str| text.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-', "_");
        let prefix = format!("execute_tool mcp__{}__", word(server));
        let taken =
            |key: &Key| self.tree.iter().any(|(child, open)| matches!(child, Key::Mcp(_)) && open.under.as_ref() == Some(key));
        self.tree
            .iter()
            .filter(|(key, open)| matches!(key, Key::Tool(_)) && open.span.name.starts_with(&prefix) && !taken(key))
            .min_by_key(|(_, open)| open.span.start)
            .and_then(|(key, _)| self.tree.place(key.clone()))
    }

    /// Without a place it is a root: of a trace of its own, unless the app or the process has one for all.
    pub(super) fn start(
        &mut self,
        key: Key,
        place: Option<Place>,
        name: String,
        kind: SpanKind,
        at: Duration,
    ) -> Option<&mut Open> {
        if self.settings.native_traces && matches!(key, Key::Chat(_) | Key::Tool(_) | Key::Permission(_)) {
            return None;
        }
        // The same name twice, without an end between.
        self.end(&key, at, End::Lost);
        let (parent, under) = match place {
            Some(place) => (Some(place.parent), place.under),
            None => (self.process.or(self.settings.parent), None),
        };
        let trace = parent.map_or_else(|| self.ids.trace(), |parent| parent.trace);
        let sampled = parent.map_or_else(|| self.settings.sampler.keeps(trace), |parent| parent.sampled);
        let context = Context { trace, span: self.ids.span(), sampled };
        let session = self.session.clone();
        let parent: Option<SpanId> = parent.map(|parent| parent.span);
        let open = self.tree.start(key, under, blank(context, parent, name, kind, at))?;
        if !session.is_empty() {
            put(&mut open.span.attributes, "gen_ai.conversation.id", session);
        }
        Some(open)
    }

    pub(super) fn end(&mut self, key: &Key, at: Duration, end: End) -> Option<Context> {
        let mut open = self.tree.take(key)?;
        let attributes = &mut open.span.attributes;
        if !self.session.is_empty() && !attributes.iter().any(|(key, _)| *key == "gen_ai.conversation.id") {
            put(attributes, "gen_ai.conversation.id", self.session.as_str());
        }
        if !open.said.is_empty() {
            let finish = attributes.iter().find_map(|(key, value)| match value {
                Value::List(reasons) if *key == "gen_ai.response.finish_reasons" => reasons.first().cloned(),
                _ => None,
            });
            if *key == Key::Turn {
                put(attributes, "gen_ai.input.messages", message("user", &open.said, None));
            } else {
                let finish = finish.unwrap_or_else(|| String::from("error"));
                put(attributes, "gen_ai.output.messages", message("assistant", &open.said, Some(&finish)));
            }
        }
        if matches!(key, Key::Permission(_)) && !attributes.iter().any(|(key, _)| *key == "claude_agent.decision") {
            put(attributes, "claude_agent.decision", "cancelled");
        }
        let ours = self.gone.is_some() || end == End::Lost;
        let error = match (end, self.gone) {
            // A turn knows best how it ended.
            (End::Failed(error), _) if *key == Key::Turn => Some(error),
            (_, Some(cause)) => Some(cause.as_str()),
            (End::Failed(error), None) => Some(error),
            (End::Lost, None) => Some("lost"),
            (End::Well, None) => None,
        };
        if let Some(error) = error {
            put(attributes, "error.type", error);
            put(attributes, "claude_agent.keep", true);
            if ours {
                put(attributes, "claude_agent.closed_by", "sidecar");
            }
            if let Some(limit) = self.limit {
                put(attributes, "claude_agent.limit", limit.as_str());
            }
            open.span.status = Status::Error(error.to_owned());
        }
        let (context, under) = (self.tree.finish(open, at), *key == Key::Background);
        // Its last child takes it along.
        if !under && self.tree.has(&Key::Background) {
            let children = self.tree.keys(|_, open| open.under == Some(Key::Background));
            if children.is_empty() {
                self.end(&Key::Background, at, End::Well);
            }
        }
        Some(context)
    }

    pub(super) fn end_all(&mut self, at: Duration, which: impl Fn(&Key, &Open) -> bool) {
        for key in self.tree.keys(which) {
            self.end(&key, at, End::Well);
        }
    }

    pub(super) fn event(&mut self, key: &Key, at: Duration, name: &'static str, attributes: Attributes) -> Option<Context> {
        let open = self.tree.get(key)?;
        open.event(at, name, attributes);
        Some(open.span.context)
    }

    /// What is done about a limit, or to stop: said where it is done, even if that has just ended.
    pub(super) fn stop_event(&mut self, at: Duration, name: &'static str, attributes: Attributes) -> Option<Context> {
        for key in [Key::Shutdown, Key::Turn] {
            if self.tree.has(&key) {
                return self.event(&key, at, name, attributes);
            }
        }
        let turn = self.behind?;
        let span = self.tree.done.iter_mut().rev().find(|span| span.context == turn)?;
        span.events.push(SpanEvent { time: at, name, attributes });
        Some(turn)
    }
}

/// All that was sent, cached or not: what Anthropic calls input is only a part of it.
fn usage(attributes: &mut Attributes, tokens: Tokens) {
    put(attributes, "gen_ai.usage.input_tokens", tokens.prompt());
    put(attributes, "gen_ai.usage.output_tokens", tokens.output);
}

fn written(tokens: Tokens) -> u64 {
    tokens.cache_write_5m.saturating_add(tokens.cache_write_1h)
}

/// The CLI's words for a failed request; others are `_OTHER`, as the conventions have it.
pub(super) fn class(error: &str) -> &'static str {
    const CLASSES: [&str; 11] = [
        "authentication_failed",
        "oauth_org_not_allowed",
        "billing_error",
        "rate_limit",
        "overloaded",
        "invalid_request",
        "model_not_found",
        "server_error",
        "max_output_tokens",
        "connection_failed",
        "unknown",
    ];
    CLASSES.into_iter().find(|class| *class == error).unwrap_or("_OTHER")
}

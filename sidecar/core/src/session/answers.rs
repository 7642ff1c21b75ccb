//! The model's answers: frame by frame, in the main loop and in subagents.

use std::time::Duration;

use super::{Call, Current, MAIN, NAME, OPEN, Session, thread};
use crate::Now;
use crate::event::{Assistant, Block, SYNTHETIC_MODEL, Stream};
use crate::metric::bounded;
use crate::update::{Answered, Source, Update};

impl Session {
    /// The model is asked; what it answers is timed from here.
    pub(super) fn asked(&mut self, said: bool, now: Now) {
        self.asked_model = Some(now.mono);
        self.out.push(Update::Requested { said });
    }

    pub(super) fn assistant(&mut self, assistant: Assistant, parent: Option<&str>, now: Now) {
        self.rested = false;
        self.begin_turn_of(parent, now);
        if let Some(error) = &assistant.error {
            let (error, parent) = (bounded(error, NAME).to_owned(), parent.map(str::to_owned));
            self.out.push(Update::ApiFailed { session: self.id.clone(), error, parent });
        }
        let model = assistant.model.as_deref().unwrap_or_default();
        let Some(id) = assistant.id.as_deref().filter(|_| model != SYNTHETIC_MODEL) else { return };
        self.thread_says(id, model, parent, assistant.usage.as_ref(), false, now);
        let streamed = self.threads.get(thread(parent)).is_some_and(|current| current.streamed);
        if let (Some(reason), Some(usage)) = (&assistant.stop_reason, &assistant.usage) {
            // Only answers that came in one piece carry their final usage here, and nothing comes after it.
            self.ledger.final_usage(id, usage);
            self.stop_reason(parent, reason);
            if !streamed {
                self.ledger.complete(id, now.unix);
                self.flush();
            }
        }
        for block in assistant.blocks {
            match block {
                Block::Text { bytes } | Block::Thinking { bytes } if !streamed => self.ledger.grow(id, bytes),
                Block::ToolUse { call, tool, input_bytes: bytes, input_hash, aim } => {
                    if !streamed {
                        self.ledger.grow(id, bytes);
                    }
                    if !streamed {
                        // Where the stream is not shown, a call is the sign that the answer is complete.
                        self.ledger.complete(id, now.unix);
                        self.flush();
                    }
                    let tool = bounded(&tool, NAME).to_owned();
                    let (started, thread) = (now.mono, thread(parent).to_owned());
                    let signature = crate::detect::signature(&tool, input_hash);
                    self.tool_started(call, Call { tool, started, thread, denied: false, signature, aim }, bytes);
                }
                Block::Text { .. } | Block::Thinking { .. } | Block::Other => {}
            }
        }
    }

    pub(super) fn stream(&mut self, stream: Stream, parent: Option<&str>, now: Now) {
        let key = thread(parent);
        match stream {
            Stream::MessageStart { id, model, usage, ttft_ms } => {
                self.rested = false;
                self.begin_turn_of(parent, now);
                self.retry_until = None;
                let model = model.unwrap_or_default();
                if let Some(id) = id {
                    self.thread_says(&id, &model, parent, usage.as_ref(), true, now);
                }
                if let Some(ms) = ttft_ms {
                    let model = crate::price::canonical(&model).into_owned();
                    self.out.push(Update::FirstToken { model, after: Duration::from_millis(ms) });
                }
            }
            Stream::Delta { bytes } => {
                if let Some(current) = self.threads.get_mut(key) {
                    current.last = now.mono;
                    self.ledger.grow(&current.id, bytes);
                }
            }
            Stream::MessageDelta { usage, stop_reason } => {
                self.frame(key, now);
                if let (Some(current), Some(usage)) = (self.threads.get(key), &usage) {
                    self.ledger.final_usage(&current.id, usage);
                }
                if let Some(reason) = stop_reason {
                    self.stop_reason(parent, &reason);
                }
            }
            Stream::MessageStop => {
                self.frame(key, now);
                self.complete_thread(key, now);
            }
            Stream::BlockStart { tool } => {
                if let (Some(_), Some(current)) = (tool, self.threads.get_mut(key)) {
                    current.wants_tool = true;
                }
            }
            Stream::BlockStop | Stream::Other => {}
        }
    }

    pub(super) fn frame(&mut self, key: &str, now: Now) {
        if let Some(current) = self.threads.get_mut(key) {
            current.last = now.mono;
        }
    }

    pub(super) fn stop_reason(&mut self, parent: Option<&str>, reason: &str) {
        if let Some(current) = self.threads.get_mut(thread(parent)) {
            current.wants_tool = reason == "tool_use";
            current.stop_reason = Some(bounded(reason, NAME).to_owned());
        }
    }

    /// A frame of an answer in a thread: an answer before it is complete now.
    pub(super) fn thread_says(
        &mut self,
        id: &str,
        model: &str,
        parent: Option<&str>,
        usage: Option<&crate::event::Usage>,
        streamed: bool,
        now: Now,
    ) {
        let key = thread(parent);
        let new = self.ledger.answer(id, model, parent, usage);
        let current = self.threads.get(key).is_some_and(|current| current.id == id);
        if current {
            self.frame(key, now);
        }
        if parent.is_some_and(|call| !self.agents.contains_key(call)) && new {
            // An older CLI announces no task.
            let call = parent.unwrap_or_default().to_owned();
            self.agent_started(call, None, None, false, 1, now);
        }
        if !current && new {
            self.complete_thread(key, now);
            self.loops.answer_began(key);
            let booked = crate::price::canonical(model).into_owned();
            self.out.push(Update::Answering {
                answer: id.to_owned(),
                model: booked.clone(),
                parent: parent.map(str::to_owned),
                streamed,
            });
            if parent.is_none() {
                self.rounds += 1;
            }
            if let Some(turn) = &mut self.turn {
                turn.answers += 1;
                turn.rounds += u64::from(parent.is_none());
            }
            if self.threads.len() < OPEN {
                self.threads.insert(
                    key.to_owned(),
                    Current {
                        id: id.to_owned(),
                        model: booked,
                        last: now.mono,
                        asked: if parent.is_none() { self.asked_model.take() } else { None },
                        stop_reason: None,
                        streamed,
                        wants_tool: false,
                    },
                );
            }
            if let (None, Some(usage)) = (parent, usage) {
                self.context_used(model, usage.tokens.prompt());
            }
        }
    }

    pub(super) fn context_used(&mut self, model: &str, prompt: u64) {
        let model = crate::price::canonical(model).into_owned();
        if let Some(window) = self.window_of(&model) {
            #[expect(clippy::cast_precision_loss, reason = "a ratio")]
            self.out.push(Update::ContextUsed { ratio: prompt as f64 / window as f64 });
        }
        self.context = Some((prompt, model));
    }

    /// Known when the first result has told it.
    pub(super) fn window_of(&self, canonical: &str) -> Option<u64> {
        self.windows.get(canonical).copied().or(self.window).filter(|window| *window > 0)
    }

    pub(super) fn complete_thread(&mut self, key: &str, now: Now) {
        // The stream's stop comes before the assistant's last line is known to be the last: keep the thread, close the answer.
        let Some(current) = self.threads.get_mut(key) else { return };
        let id = std::mem::take(&mut current.id);
        if id.is_empty() {
            return;
        }
        let (tokens, settled) = self.ledger.used(&id).unwrap_or_default();
        // What the CLI itself puts behind a stream that was cut is no word of the API.
        let settled = settled && (current.stop_reason.is_some() || !current.streamed);
        let update = Update::Answered(Box::new(Answered {
            session: self.id.clone(),
            answer: id.clone(),
            model: current.model.clone(),
            source: if key == MAIN { Source::Main } else { Source::Subagent },
            parent: (key != MAIN).then(|| key.to_owned()),
            stop_reason: current.stop_reason.take(),
            duration: current.asked.take().map(|asked| current.last.saturating_sub(asked)),
            since: now.mono.saturating_sub(current.last),
            tokens,
            settled,
        }));
        self.ledger.complete(&id, now.unix);
        self.loops.answered(key == MAIN);
        self.out.push(update);
        self.flush();
    }

    pub(super) fn complete_all(&mut self, now: Now) {
        let keys: Vec<String> = self.threads.keys().cloned().collect();
        for key in keys {
            self.complete_thread(&key, now);
        }
        self.threads.clear();
    }
}

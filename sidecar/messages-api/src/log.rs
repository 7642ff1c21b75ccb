//! What was served: a line per request in a file, and the sums of it by model.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::request::{Agent, Request};
use crate::script::Usage;

/// The record of a server; its clones share it.
#[derive(Debug, Clone, Default)]
pub struct Log(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    file: Option<File>,
    asked: u64,
    served: BTreeMap<String, Tokens>,
}

/// Tokens by kind, as they are priced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Tokens {
    /// Sent, neither read from nor written to a cache.
    pub input: u64,
    /// Generated.
    pub output: u64,
    /// Read from a cache.
    pub cache_read: u64,
    /// Written to a cache for five minutes; also what is written without a word of how long.
    pub cache_write_5m: u64,
    /// Written to a cache for an hour.
    pub cache_write_1h: u64,
    /// Not tokens: searches, which have a price of their own.
    pub web_search_requests: u64,
}

impl Log {
    /// Appends to a file as it happens.
    pub fn to_file(path: &Path) -> std::io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self(Arc::new(Mutex::new(Inner { file: Some(file), ..Inner::default() }))))
    }

    /// What clients were told they used, by the model they asked for.
    pub fn served(&self) -> BTreeMap<String, Tokens> {
        self.lock().served.clone()
    }

    /// How many requests for messages came, answered or not.
    pub fn asked(&self) -> u64 {
        self.lock().asked
    }

    /// The number of a new request, from 1.
    pub(crate) fn number(&self) -> u64 {
        let mut inner = self.lock();
        inner.asked += 1;
        inner.asked
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A line half written is no reason to stop the count.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, line: &Line) {
        let mut inner = self.lock();
        if let Some(usage) = &line.usage {
            inner.served.entry(line.model.clone()).or_default().add(usage);
        }
        if let Some(file) = &mut inner.file {
            let mut json = serde_json::to_vec(line).expect("strings and numbers only");
            json.push(b'\n');
            if let Err(error) = file.write_all(&json) {
                tell(&error);
            }
        }
    }
}

#[expect(clippy::print_stderr, reason = "a log that cannot be written has no other place to say so")]
fn tell(error: &std::io::Error) {
    eprintln!("messages-api: cannot write the log: {error}");
}

impl Tokens {
    fn add(&mut self, usage: &Usage) {
        self.input += usage.input_tokens;
        self.output += usage.output_tokens;
        self.cache_read += usage.cache_read_input_tokens;
        match usage.cache_creation {
            Some(written) => {
                self.cache_write_5m += written.ephemeral_5m_input_tokens;
                self.cache_write_1h += written.ephemeral_1h_input_tokens;
            }
            None => self.cache_write_5m += usage.cache_creation_input_tokens,
        }
        self.web_search_requests += usage.server_tool_use.map_or(0, |server| server.web_search_requests);
    }
}

/// One request, logged when it is over, however that came about.
pub(crate) struct Entry {
    log: Log,
    began: Instant,
    pub(crate) line: Line,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct Line {
    /// When it came, in seconds since 1970.
    t: f64,
    ms: u64,
    pub(crate) n: u64,
    model: String,
    stream: bool,
    agent: Agent,
    session: String,
    turn: u32,
    nth: u32,
    attempt: u32,
    messages: u32,
    results: u32,
    tools: u32,
    /// Index of the rule; absent if none fitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rule: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) about: Option<String>,
    pub(crate) action: Action,
    /// The last that the client was told; nothing if it was told nothing.
    pub(crate) usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<u16>,
    pub(crate) message_id: Option<String>,
    /// Ended by the script before its end.
    pub(crate) cut: bool,
    /// Ended by the client before its end.
    pub(crate) client_gone: bool,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct Action {
    pub(crate) kind: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) blocks: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stop_reason: Option<String>,
}

impl Entry {
    pub(crate) fn new(log: Log, n: u64, request: &Request, at: crate::script::Position) -> Self {
        let t = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64());
        let line = Line {
            t,
            n,
            model: request.model.clone(),
            stream: request.stream,
            agent: request.agent,
            session: request.session.clone(),
            turn: request.turn,
            nth: at.nth,
            attempt: at.attempt,
            messages: request.messages,
            results: request.results,
            tools: request.tools,
            // Until somebody reaches the end.
            client_gone: true,
            ..Line::default()
        };
        Self { log, began: Instant::now(), line }
    }

    /// The end was reached, or the script's own end before it.
    pub(crate) fn over(&mut self) {
        self.line.client_gone = false;
    }

    /// It ends here, as scripted.
    pub(crate) fn cut(&mut self) {
        self.line.cut = true;
        self.over();
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.line.ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.log.add(&self.line);
    }
}

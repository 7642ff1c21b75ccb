//! One session: its agent, started when it is talked to, and one turn at a time.
//!
//! ```text
//!   resting ──message──► working ──result──► waiting ──message──► working …
//!      ▲                    │                   │
//!      └────── its agent has ended (idle, a limit, room for another): the next message resumes the conversation
//! ```

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, timeout};

use super::child::{Child, Line};
use super::{GRACE, House, shape};

/// Events that wait for a client to read them; the rest waits in the wrapper, which has a file for that.
const EVENTS: usize = 64;
/// A client that reads nothing for so long is gone.
const SLOW: Duration = Duration::from_secs(30);
/// Less than any proxy waits for a word.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long a turn waits for another agent to make room for it.
const ROOM: Duration = Duration::from_secs(20);
/// How often it looks.
const LOOK: Duration = Duration::from_millis(50);
/// What the CLI says of a conversation whose transcript is gone.
const NO_CONVERSATION: &str = "No conversation found";
/// What the sidecar's own refusals begin with.
const OURS: &str = "agent-sidecar: ";
/// What an agent is told that wants to ask somebody.
const DENIED: &str = "Nobody can be asked in this session, so what needs permission is denied. It can be allowed where the agent is started: \
                      --allowedTools, --permission-mode, or --serve-permissions allow.";

/// What a talk is told to do.
pub(super) enum Ask {
    Say(String, mpsc::Sender<Bytes>),
    /// End the agent; the next message begins another.
    Rest,
    /// For good.
    End,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct State {
    /// A turn is under way.
    pub(super) busy: bool,
    /// It has an agent.
    pub(super) runs: bool,
    /// Which was told to end.
    pub(super) rests: bool,
    pub(super) used: Option<Instant>,
    pub(super) cost: Cost,
    /// Turns that were begun.
    pub(super) turns: u64,
    over: bool,
    /// And its conversation is not gone on with.
    dropped: bool,
}

/// What a session has cost here by its results, in USD. The books are the ledger's: what was interrupted may be missing here.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    usd: f64,
    /// All that its agent has cost, by that agent's last result.
    total: f64,
}

impl Cost {
    /// Another agent, which counts from nothing; or, being resumed, from what was before, and then says what is new.
    fn begins(&mut self) {
        self.total = 0.0;
    }

    fn result(&mut self, result: &Value) {
        let Some(total) = result["total_cost_usd"].as_f64() else { return };
        let models = result["model_usage_since_last_result"].as_object();
        let new = models.map(|models| models.values().filter_map(|model| model["costUSD"].as_f64()).sum::<f64>());
        let counted = if total < self.total { total } else { total - self.total };
        self.usd += new.unwrap_or(counted);
        self.total = total;
    }

    pub(super) fn usd(self) -> f64 {
        self.usd
    }
}

pub(super) struct Talk {
    asks: mpsc::Sender<Ask>,
    state: Mutex<State>,
}

impl Talk {
    /// Nothing runs yet.
    pub(super) fn begin(id: &str, house: &Arc<House>) -> Arc<Talk> {
        // One turn, and one of each of the others, see below.
        let (asks, told) = mpsc::channel(4);
        let talk = Arc::new(Talk { asks, state: Mutex::default() });
        let driver = Driver { id: id.to_owned(), house: Arc::clone(house), talk: Arc::clone(&talk), told, child: None };
        tokio::spawn(driver.drive());
        talk
    }

    pub(super) fn state(&self) -> State {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn is_over(&self) -> bool {
        self.state().over
    }

    /// The next turn is whoever's who calls this.
    pub(super) fn reserve(&self) {
        self.set(|state| (state.busy, state.turns) = (true, state.turns + 1));
    }

    /// What is heard of the turn that was reserved.
    pub(super) fn say(&self, prompt: String) -> mpsc::Receiver<Bytes> {
        let (client, events) = mpsc::channel(EVENTS);
        if self.asks.try_send(Ask::Say(prompt, client)).is_err() {
            // Ended in between: nobody says anything, and the stream is over.
            self.set(|state| state.busy = false);
        }
        events
    }

    pub(super) fn rest(&self) {
        if !self.state().rests {
            self.set(|state| state.rests = true);
            self.asks.try_send(Ask::Rest).ok();
        }
    }

    /// For good: what its agent still says is not remembered.
    pub(super) fn drop_it(&self) {
        self.set(|state| state.dropped = true);
        self.end();
    }

    pub(super) fn end(&self) {
        if !self.is_over() {
            self.set(|state| state.over = true);
            self.asks.try_send(Ask::End).ok();
        }
    }
}

enum Next {
    Ask(Option<Ask>),
    Line(Option<Line>),
}

/// What a line means for the turn.
enum Heard {
    Nothing,
    /// It is over: well, or with what went wrong.
    Over(Result<(), String>),
}

struct Driver {
    id: String,
    house: Arc<House>,
    talk: Arc<Talk>,
    told: mpsc::Receiver<Ask>,
    child: Option<Child>,
}

impl Driver {
    async fn drive(mut self) {
        loop {
            match self.next().await {
                Next::Ask(Some(Ask::Say(prompt, client))) => {
                    let ends = self.turn(&prompt, client).await;
                    if ends {
                        break;
                    }
                }
                Next::Ask(Some(Ask::Rest)) | Next::Line(None) => {
                    self.rest().await;
                }
                Next::Ask(Some(Ask::End) | None) => break,
                // Of what it does by itself nobody is told: the ledger has it.
                Next::Line(Some(line)) => {
                    self.hear(line, &mut None).await;
                }
            }
        }
        self.rest().await;
    }

    async fn next(&mut self) -> Next {
        let line = async {
            match &mut self.child {
                Some(child) => child.line().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ask = self.told.recv() => Next::Ask(ask),
            line = line => Next::Line(line),
        }
    }

    /// Ends the agent, if there is one: its exit code.
    async fn rest(&mut self) -> Option<i32> {
        let code = match self.child.take() {
            Some(child) => Some(child.exit(self.grace()).await),
            None => None,
        };
        self.talk.set(|state| (state.runs, state.rests) = (false, false));
        code
    }

    fn grace(&self) -> Duration {
        self.house.options.grace.unwrap_or(GRACE)
    }

    /// From a message to its end, which the client is told. Whether this was the last.
    async fn turn(&mut self, prompt: &str, client: mpsc::Sender<Bytes>) -> bool {
        let mut client = Some(client);
        let (outcome, ends) = self.talk_to(prompt, &mut client).await;
        // Before the client knows: it may have the next message ready.
        self.talk.set(|state| (state.busy, state.used) = (false, Some(Instant::now())));
        let last = match outcome {
            Ok(()) => shape::done(),
            Err(what) => shape::error(&what),
        };
        tell(&mut client, last).await;
        ends
    }

    async fn talk_to(&mut self, prompt: &str, client: &mut Option<mpsc::Sender<Bytes>>) -> (Result<(), String>, bool) {
        let message =
            json!({"type": "user", "message": {"role": "user", "content": prompt}, "parent_tool_use_id": null, "session_id": ""});
        // One that was on its way out, for having been idle, is started again; one that was just started is not.
        let mut fresh = false;
        let mut said = false;
        loop {
            if self.child.is_none() {
                if let Err(what) = self.start().await {
                    return (Err(what), false);
                }
                fresh = true;
                said = false;
            }
            let Some(child) = &mut self.child else { return (Err(String::from("there is no agent")), false) };
            if !said {
                said = child.say(&message).await.is_ok();
            }
            if said {
                let (outcome, ends, silent) = self.follow(client).await;
                match outcome {
                    Some(outcome) => return (outcome, ends),
                    None if fresh || ends || !silent => {
                        let code = self.rest().await.unwrap_or_default();
                        return (Err(ended(code, ends)), ends);
                    }
                    None => {}
                }
            } else if fresh {
                let code = self.rest().await.unwrap_or_default();
                return (Err(ended(code, false)), false);
            }
            self.rest().await;
        }
    }

    /// Passes on what the agent says, until its turn is over (what came of it) or it has ended (`None`); whether the session is to end, and
    /// whether nothing was heard.
    async fn follow(&mut self, client: &mut Option<mpsc::Sender<Bytes>>) -> (Option<Result<(), String>>, bool, bool) {
        let mut tick = tokio::time::interval(KEEP_ALIVE);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut ends, mut silent) = (false, true);
        let grace = self.grace();
        let mut deadline = None;
        loop {
            let Some(child) = &mut self.child else { return (None, ends, silent) };
            let listens = client.clone();
            let left = async {
                match listens.filter(|_| self.house.options.interrupt) {
                    Some(client) => client.closed().await,
                    None => std::future::pending().await,
                }
            };
            let late = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                line = child.line() => {
                    let Some(line) = line else { return (None, ends, silent) };
                    silent = false;
                    if let Heard::Over(outcome) = self.hear(line, client).await
                        && !ends
                    {
                        return (Some(outcome), false, false);
                    }
                }
                ask = self.told.recv() => match ask {
                    Some(Ask::End) | None => {
                        ends = true;
                        child.terminate();
                        deadline = Some(tokio::time::Instant::now() + grace);
                    }
                    // Whoever works does not rest, and has its turn.
                    Some(Ask::Rest) => self.talk.set(|state| state.rests = false),
                    Some(Ask::Say(..)) => {}
                },
                _ = tick.tick() => {
                    if let Some(client) = client {
                        client.try_send(shape::nothing()).ok();
                    }
                }
                () = left => {
                    *client = None;
                    let interrupt = json!({"type": "control_request", "request_id": "serve-interrupt", "request": {"subtype": "interrupt"}});
                    child.say(&interrupt).await.ok();
                }
                () = late => return (None, ends, silent),
            }
        }
    }

    /// Starts the agent, with its conversation if it has one, as soon as there is room.
    async fn start(&mut self) -> Result<(), String> {
        let waited = timeout(ROOM, async {
            while !self.talk.is_over() && !self.house.take_room(&self.talk) {
                tokio::time::sleep(LOOK).await;
            }
        });
        if waited.await.is_err() {
            return Err(String::from("as many agents work as may: try again later"));
        }
        if self.talk.is_over() {
            return Err(String::from("the session was ended"));
        }
        let resume = self.house.conversation(&self.id);
        let wrapper = self.house.recipe.wrapper(&self.house.program, &self.id, self.house.has_dirs, resume.as_deref());
        match Child::start(wrapper, &self.house.reaper) {
            Ok(child) => {
                self.child = Some(child);
                self.talk.set(|state| state.cost.begins());
                Ok(())
            }
            Err(error) => {
                self.talk.set(|state| state.runs = false);
                tracing::error!(%error, "an agent cannot be started");
                Err(String::from("the agent cannot be started"))
            }
        }
    }

    async fn hear(&mut self, line: Line, client: &mut Option<mpsc::Sender<Bytes>>) -> Heard {
        let line = match line {
            Line::Whole(line) => line,
            Line::Cut(begin) => {
                tracing::warn!("a line is too long to be passed on");
                let result = begin.starts_with(br#"{"type":"result""#);
                return if result {
                    Heard::Over(Err(String::from("the result is too long to be passed on")))
                } else {
                    Heard::Nothing
                };
            }
        };
        // Whatever else a program prints is no message.
        let Ok(value) = serde_json::from_slice::<Value>(&line) else { return Heard::Nothing };
        let kind = value["type"].as_str().unwrap_or_default();
        if kind == "control_request" {
            if let (Some(answer), Some(child)) = (self.answer(&value), &mut self.child) {
                // One that reads no more ends, and that is heard.
                child.say(&answer).await.ok();
            }
            return Heard::Nothing;
        }
        let answered = kind == "assistant" && value["parent_tool_use_id"].is_null();
        // One that was refused before it began was never written down, and cannot be resumed.
        let worked = kind == "result" && value["num_turns"].as_u64().is_some_and(|turns| turns > 0);
        if let Some(conversation) = value["session_id"].as_str().filter(|_| answered || worked)
            && !self.talk.state().dropped
        {
            self.house.remember(&self.id, conversation);
        }
        if let Some(message) = shape::message(self.house.options.form, &line, &value) {
            tell(client, message).await;
        }
        if kind == "result" {
            self.talk.set(|state| state.cost.result(&value));
        }
        // A background task's turn of its own comes between.
        if kind != "result" || value["origin"]["kind"] == "task-notification" {
            return Heard::Nothing;
        }
        Heard::Over(self.judge(&value))
    }

    /// What a result says.
    fn judge(&self, result: &Value) -> Result<(), String> {
        let said = result["result"].as_str().unwrap_or_default();
        // The model has no say where it was not asked.
        if result["num_turns"] == 0
            && let Some(at) = said.find(OURS)
        {
            return Err(said[at + OURS.len()..].lines().next().unwrap_or_default().to_owned());
        }
        if result["is_error"] != true {
            return Ok(());
        }
        let errors: Vec<&str> = result["errors"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        if errors.iter().any(|error| error.contains(NO_CONVERSATION)) && !self.talk.state().dropped {
            self.house.forget(&self.id);
            return Err(String::from("its conversation is gone: the next message begins a new one"));
        }
        let what = if said.is_empty() { errors.join("; ") } else { said.to_owned() };
        Err(if what.is_empty() { result["subtype"].as_str().unwrap_or("error").to_owned() } else { what })
    }

    /// What the agent wants to know of its host, who has nobody to ask.
    fn answer(&self, request: &Value) -> Option<Value> {
        let (id, asked) = (request.get("request_id")?, &request["request"]);
        let answer = match asked["subtype"].as_str().unwrap_or_default() {
            "can_use_tool" if self.house.options.allow => json!({"behavior": "allow", "updatedInput": asked["input"]}),
            "can_use_tool" => json!({"behavior": "deny", "message": DENIED}),
            "hook_callback" => json!({}),
            "elicitation" => json!({"action": "decline"}),
            other => {
                let error = format!("nobody answers `{other}` here");
                return Some(
                    json!({"type": "control_response", "response": {"subtype": "error", "request_id": id, "error": error}}),
                );
            }
        };
        Some(json!({"type": "control_response", "response": {"subtype": "success", "request_id": id, "response": answer}}))
    }
}

fn ended(code: i32, wanted: bool) -> String {
    match code {
        _ if wanted => String::from("the session was ended"),
        125..=127 => format!("the agent was not started (exit code {code}): the log of its container says why"),
        code => format!("the agent has ended in the middle of its turn (exit code {code})"),
    }
}

/// One that takes nothing for too long, or has hung up, is told no more; the turn goes on.
async fn tell(client: &mut Option<mpsc::Sender<Bytes>>, event: Bytes) {
    if let Some(listens) = client
        && !matches!(timeout(SLOW, listens.send(event)).await, Ok(Ok(())))
    {
        *client = None;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_session_costs_what_is_new_of_each_of_its_agents() {
        let said = |total: f64| json!({"total_cost_usd": total});
        let new = |total: f64, of: &[f64]| {
            let models: serde_json::Map<_, _> =
                of.iter().enumerate().map(|(n, usd)| (format!("model-{n}"), json!({"costUSD": usd}))).collect();
            json!({"total_cost_usd": total, "model_usage_since_last_result": models})
        };
        for (agents, usd) in [
            // Who begins at nothing each time.
            (vec![vec![said(0.25), said(0.75)], vec![said(0.75)], vec![said(1.0)]], 2.5),
            // In one of which the conversation was begun anew.
            (vec![vec![said(0.75), said(0.25), said(0.5)]], 1.25),
            // Who goes on with the sum, here or from elsewhere.
            (vec![vec![new(0.25, &[0.25]), new(0.75, &[0.25, 0.25])], vec![new(1.0, &[0.25])]], 1.0),
            (vec![vec![new(5.25, &[0.25])], vec![new(5.25, &[])]], 0.25),
        ] {
            let mut cost = Cost::default();
            for results in &agents {
                cost.begins();
                results.iter().for_each(|result| cost.result(result));
                // What says nothing of it has cost nothing.
                cost.result(&json!({"subtype": "error_during_execution"}));
            }
            assert_eq!(cost.usd(), usd, "{agents:?}");
        }
    }
}

//! What we ask the CLI ourselves, under ids of our own: its running totals, and to stop.
//!
//! Only after the app has spoken (an `initialize` may have to be the first line), the CLI has answered in its protocol, and before the
//! app's end was forwarded.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::monitor::Action;
use crate::update::OwnRequest;

/// Ids of ours start like this, then with the run's nonce. Neither SDK makes such ids.
pub const ID_PREFIX: &str = "agent-sidecar:";
/// The CLI answers within 20 ms, also in the middle of a turn; a paused container takes longer.
const GIVE_UP: Duration = Duration::from_secs(5);
/// Between two questions for the totals. One costs the CLI about a millisecond.
const PAUSE: Duration = Duration::from_millis(250);
/// While subagents or background tasks run, whose calls the stream does not show.
const PAUSE_UNSEEN: Duration = Duration::from_secs(5);
/// Money after the last result (prompt suggestions) is there about this long after it.
const AFTERTHOUGHT: Duration = Duration::from_secs(3);

/// See the module's head.
#[derive(Debug)]
pub struct Asker {
    nonce: String,
    number: u64,
    pending: BTreeMap<String, (OwnRequest, Duration)>,
    app_spoke: bool,
    cli_spoke: bool,
    wanted: bool,
    asked_at: Option<Duration>,
    /// When to look once more although nothing was said.
    again: Option<Duration>,
    /// The app's end is held back since then, for the answer to this question.
    eof: Option<(Duration, String)>,
    /// The file that is there while messages are to be turned away, and says why.
    hold_file: String,
}

impl Asker {
    pub fn new(nonce: &str, hold_file: &str) -> Asker {
        Asker {
            nonce: nonce.to_owned(),
            number: 0,
            pending: BTreeMap::new(),
            app_spoke: false,
            cli_spoke: false,
            wanted: false,
            asked_at: None,
            again: None,
            eof: None,
            hold_file: hold_file.to_owned(),
        }
    }

    pub fn app_spoke(&self) -> bool {
        self.app_spoke
    }

    /// Whether it is safe to speak: the app has, and what answers it speaks the CLI's protocol.
    pub fn may_speak(&self) -> bool {
        self.app_spoke && self.cli_spoke
    }

    /// The other side has shown that it speaks the protocol: a program that only looks like the CLI gets no line from us.
    pub fn cli_spoke(&mut self) {
        self.cli_spoke = true;
    }

    /// The app's first line went through: from now on we may speak.
    pub fn first_line(&mut self) {
        self.app_spoke = true;
        self.wanted = true;
    }

    /// Money may have moved.
    pub fn want_usage(&mut self) {
        self.wanted = true;
    }

    /// The question for the totals, if one is due.
    pub fn usage(&mut self, now: Duration, unseen: bool) -> Option<Action> {
        if unseen && self.again.is_none() {
            self.again = Some(now + PAUSE_UNSEEN);
        }
        if !self.due(now) {
            return None;
        }
        // Asked for a reason: look again a little later, for what comes after a result.
        self.again = if self.wanted { Some(now + AFTERTHOUGHT) } else { None };
        self.wanted = false;
        Some(self.ask(OwnRequest::GetUsage, now))
    }

    fn due(&self, now: Duration) -> bool {
        self.earliest().is_some_and(|at| at <= now)
    }

    fn earliest(&self) -> Option<Duration> {
        if self.eof.is_some() || self.asks_usage() {
            return None;
        }
        let rested = self.asked_at.map_or(Duration::ZERO, |at| at + PAUSE);
        match (self.wanted, self.again) {
            (true, _) => Some(rested),
            (false, Some(again)) => Some(again.max(rested)),
            (false, None) => None,
        }
    }

    /// Whether a question for the totals was not answered yet.
    pub fn asks_usage(&self) -> bool {
        self.pending.values().any(|(request, _)| *request == OwnRequest::GetUsage)
    }

    /// When to come back.
    pub fn deadline(&self, can_ask: bool) -> Option<Duration> {
        let give_up = self.pending.values().map(|(_, at)| *at + GIVE_UP).min();
        [give_up, self.earliest().filter(|_| can_ask)].into_iter().flatten().min()
    }

    /// The last question, for whose answer the app's end is held back.
    pub fn last_usage(&mut self, now: Duration) -> Option<Action> {
        let action = self.ask(OwnRequest::GetUsage, now);
        if let Action::Inject { request_id, .. } = &action {
            self.eof = Some((now, request_id.clone()));
        }
        Some(action)
    }

    /// Since when the app's end is held back.
    pub fn eof(&self) -> Option<Duration> {
        self.eof.as_ref().map(|(since, _)| *since)
    }

    pub fn eof_answered(&self) -> bool {
        self.eof.as_ref().is_some_and(|(_, id)| !self.pending.contains_key(id))
    }

    pub fn eof_forwarded(&mut self) {
        self.eof = None;
    }

    /// A line with a new id of ours.
    pub fn ask(&mut self, request: OwnRequest, now: Duration) -> Action {
        self.number += 1;
        let request_id = format!("{ID_PREFIX}{}:{}", self.nonce, self.number);
        let body = match request {
            // Without `skip_behaviors` it would scan a week of transcripts.
            OwnRequest::GetUsage => serde_json::json!({"subtype": "get_usage", "skip_behaviors": true}),
            OwnRequest::Interrupt | OwnRequest::EndSession => serde_json::json!({"subtype": request.as_str()}),
            OwnRequest::Refuse => told(&hooks(None)),
            OwnRequest::Hold => told(&hooks(Some(&self.hold_file))),
        };
        let line = serde_json::json!({"type": "control_request", "request_id": request_id, "request": body});
        if request == OwnRequest::GetUsage {
            self.asked_at = Some(now);
        }
        self.pending.insert(request_id.clone(), (request, now));
        Action::Inject { request_id, line: format!("{line}\n") }
    }

    /// An answer came, or the question could not be put: which one it was.
    pub fn answered(&mut self, id: &str) -> Option<OwnRequest> {
        self.pending.remove(id).map(|(request, _)| request)
    }

    /// Questions that have waited too long.
    pub fn expire(&mut self, now: Duration) -> Vec<OwnRequest> {
        let late: Vec<String> =
            self.pending.iter().filter(|(_, (_, at))| *at + GIVE_UP <= now).map(|(id, _)| id.clone()).collect();
        late.iter().filter_map(|id| self.answered(id)).collect()
    }

    /// Nobody will answer any more.
    pub fn give_up(&mut self) -> Vec<OwnRequest> {
        std::mem::take(&mut self.pending).into_values().map(|(request, _)| request).collect()
    }
}

/// What the app is told when its message is turned away. Plain words: a shell handles them, and they are put into JSON.
const REASON: &str = "agent-sidecar: a limit of this session is used up";
pub(crate) const SHARED_REASON: &str = "agent-sidecar: a budget that this session shares with others is used up";
/// The same, but there is more of it, which is for others.
pub(crate) fn share_reason(budget: &str, numbers: &str) -> String {
    format!(
        "agent-sidecar: the fair share of the {budget} budget that this session shares with others is used up; {numbers}; it goes on when others need less"
    )
}
pub(crate) const PAUSED_REASON: &str = "agent-sidecar: this session is paused; it goes on when somebody resumes it";

/// How long a tool's end waits for an interrupt, in seconds.
const AT_BOUNDARY: u32 = 3;
/// After so many seconds the CLI goes on without our hook: it must not wait for ever at a door that nobody opens any more. A message
/// may have to wait for the first answer that somebody else gets: see [`crate::budget::GUESS`].
const AT_DOOR: u32 = 20;
const WITH_MESSAGE: u32 = 60;
/// What is knocked with: a message, and anything else.
pub const MESSAGE: u8 = b'm';
const ANYTHING: u8 = b'a';

/// Has the CLI itself refuse every further prompt, by a hook that only blocks: no request to the model, and a result within 40 ms that
/// both SDKs take as an ended turn (seen on 2.1.197 and 2.1.330; `interrupt` behind the message loses the race on the latter). The
/// settings merge with the app's own, whose hooks go on working, and are written to no file. `/compact` asks the model without a
/// prompt, so it has a hook of its own. With a file, all of that only while the file is there, for the reason in it. Told again, the
/// last word holds.
///
/// Before it looks, it knocks, while another file is there, as it is near the end of a budget: beside the file are two pipes, if
/// somebody answers. It writes a byte into one, and reads one from the other as soon as what it is about to ask for is reserved, or the
/// file says that there is nothing left. So no answer is too quick.
///
/// If the file says so, a turn that runs is not to ask the model again. The interrupt that ends it takes the CLI a tenth of a second,
/// and the next request is made at once when the tools are done: so a hook holds the CLI there until the interrupt is heeded, which
/// ends the hook as well, and ends the turn itself if none comes (with a result that has no words).
pub fn hooks(file: Option<&str>) -> serde_json::Value {
    let (block, compact) = match file {
        None => (format!(r#"echo '{{"decision":"block","reason":"{REASON}"}}'"#), format!("echo '{REASON}' >&2; exit 2")),
        Some(file) => {
            let held = format!("{{ IFS= read -r why < '{}'; }} 2>/dev/null", quoted(file));
            (
                format!(r#"{}if {held}; then printf '{{"decision":"block","reason":"%s"}}\n' "$why"; fi"#, knock(file, MESSAGE)),
                format!(r#"{}if {held}; then echo "$why" >&2; exit 2; fi"#, knock(file, ANYTHING)),
            )
        }
    };
    let hook =
        |command: &str, timeout| serde_json::json!([{"hooks": [{"type": "command", "command": command, "timeout": timeout}]}]);
    let mut hooks = serde_json::json!({"UserPromptSubmit": hook(&block, WITH_MESSAGE), "PreCompact": hook(&compact, AT_DOOR)});
    if let Some(file) = file {
        let knock = knock(file, ANYTHING);
        let stopped = format!("{{ {{ IFS= read -r why && IFS= read -r now; }} < '{}'; }} 2>/dev/null", quoted(file));
        let stop = format!(
            r#"{knock}if {stopped}; then sleep {AT_BOUNDARY}; printf '{{"continue":false,"stopReason":"%s"}}\n' "$why"; fi"#
        );
        hooks["PostToolBatch"] = hook(&stop, AT_DOOR);
        // It cannot be turned away, but the interrupt is there before it asks.
        hooks["SubagentStart"] = hook(&format!("{knock}if {stopped}; then sleep {AT_BOUNDARY}; fi"), AT_DOOR);
    }
    hooks
}

/// Said while the CLI runs. Whoever has switched hooks off is not asked here: nothing else would hold it.
fn told(hooks: &serde_json::Value) -> serde_json::Value {
    serde_json::json!({"subtype": "apply_flag_settings", "settings": {"disableAllHooks": false, "hooks": hooks}})
}

/// The pipes beside the file: into the first the CLI's hooks knock, from the second they are let through, a byte for each.
pub fn doors(file: &str) -> [String; 2] {
    [format!("{file}.knock"), format!("{file}.open")]
}

/// The file that is there while they are to knock.
pub fn near(file: &str) -> String {
    format!("{file}.near")
}

/// Whoever has knocked reads already, and where nobody reads nobody is let through. Read and write: a pipe that nobody listens at takes
/// the byte, too. If those who would answer die, so does the other end of what is read.
fn knock(file: &str, with: u8) -> String {
    let ([knock, open], near) = (doors(file).map(|path| quoted(&path)), quoted(&near(file)));
    let with = char::from(with);
    format!(
        "[ -e '{near}' ] && [ -p '{knock}' ] && [ -p '{open}' ] && {{ printf {with} 1<> '{knock}' && read -r _; }} < '{open}'; "
    )
}

fn quoted(path: &str) -> String {
    path.replace('\'', r"'\''")
}

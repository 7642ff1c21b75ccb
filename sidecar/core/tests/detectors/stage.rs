//! A session that is made up: what its CLI says, as the CLI writes it, and what the monitor thinks of it.

use std::time::Duration;

use agent_sidecar_core::detect::CEILINGS;
use agent_sidecar_core::limit::{Ceiling, Limit, Mode, Rule, Scope};
use agent_sidecar_core::update::Step;
use agent_sidecar_core::{Exit, Input, Monitor, Now, Output, Settings};
use serde_json::{Value, json};

/// The detectors as they are by default.
pub(crate) fn rules() -> Vec<Rule> {
    let rule = |(limit, n)| Rule { limit, scope: Scope::Turn, ceiling: Ceiling::Count(n), mode: Mode::Shadow };
    CEILINGS.into_iter().map(rule).collect()
}

/// What was said of a run, and after how many answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Told {
    pub(crate) kind: Limit,
    pub(crate) step: Step,
    pub(crate) answers: u64,
}

pub(crate) struct Stage {
    pub(crate) monitor: Monitor,
    now: Duration,
    ids: u64,
    pub(crate) answers: u64,
    pub(crate) told: Vec<Told>,
    /// Whose turn it is to speak: a subagent, by its call.
    pub(crate) thread: Option<String>,
}

/// A call and what comes back: the tool, its input, its result, whether it failed.
pub(crate) type Call<'a> = (&'a str, Value, &'a str, bool);

pub(crate) fn bash<'a>(command: &str, result: &'a str) -> Call<'a> {
    ("Bash", json!({"command": command, "description": "Run it"}), result, false)
}

pub(crate) fn fails<'a>(command: &str, result: &'a str) -> Call<'a> {
    ("Bash", json!({"command": command, "description": "Run it"}), result, true)
}

pub(crate) fn read<'a>(file: &str, result: &'a str) -> Call<'a> {
    ("Read", json!({"file_path": file}), result, false)
}

pub(crate) fn edit(file: &str, from: &str, to: &str) -> Call<'static> {
    let input = json!({"file_path": file, "old_string": from, "new_string": to});
    ("Edit", input, "The file has been updated successfully.", false)
}

impl Default for Stage {
    fn default() -> Stage {
        Stage::new(rules())
    }
}

impl Stage {
    pub(crate) fn new(rules: Vec<Rule>) -> Stage {
        let settings = Settings { rules, ..Settings::default() };
        let now = Duration::ZERO;
        let monitor = Monitor::new(settings, false, Now { mono: now, unix: DAY });
        let mut stage = Stage { monitor, now, ids: 0, answers: 0, told: Vec::new(), thread: None };
        stage.put(Input::Spawned { pid: 7 });
        stage
    }

    pub(crate) fn put(&mut self, input: Input<'_>) {
        self.monitor.handle(Now { mono: self.now, unix: DAY + self.now }, input);
        while let Some(output) = self.monitor.poll_output() {
            if let Output::Decided(decision) = output {
                self.told.push(Told { kind: decision.limit, step: decision.step, answers: self.answers });
            }
        }
    }

    pub(crate) fn cli(&mut self, line: &Value) {
        self.now += Duration::from_millis(200);
        self.put(Input::Stdout(format!("{line}\n").as_bytes()));
    }

    pub(crate) fn ask(&mut self) {
        let line = json!({"type": "user", "message": {"role": "user", "content": "go on"}});
        self.put(Input::Stdin(format!("{line}\n").as_bytes()));
        self.cli(&json!({"type": "system", "subtype": "init", "session_id": "s", "claude_code_version": "2.1.330"}));
    }

    fn id(&mut self, what: &str) -> String {
        self.ids += 1;
        format!("{what}_{}", self.ids)
    }

    fn assistant(&mut self, content: &Value) {
        self.answers += 1;
        let id = self.id("msg");
        let message =
            json!({"id": id, "model": "claude-opus-5-5", "usage": {"input_tokens": 9, "output_tokens": 1}, "content": content});
        self.cli(&json!({"type": "assistant", "session_id": "s", "parent_tool_use_id": self.thread, "message": message}));
    }

    /// An answer with these calls, and their results.
    pub(crate) fn round(&mut self, calls: &[Call<'_>]) {
        let ids: Vec<String> = calls.iter().map(|_| self.id("toolu")).collect();
        let block =
            |((tool, input, ..), id): (&Call<'_>, &String)| json!({"type": "tool_use", "id": id, "name": tool, "input": input});
        self.assistant(&calls.iter().zip(&ids).map(block).collect());
        for ((.., result, failed), id) in calls.iter().zip(&ids) {
            let block = json!({"type": "tool_result", "tool_use_id": id, "content": result, "is_error": failed});
            let message = json!({"role": "user", "content": [block]});
            self.cli(&json!({"type": "user", "session_id": "s", "parent_tool_use_id": self.thread, "message": message}));
        }
    }

    pub(crate) fn call(&mut self, call: Call<'_>) {
        self.round(&[call]);
    }

    /// An answer without a call that does not end the turn.
    pub(crate) fn talk(&mut self) {
        self.assistant(&json!([{"type": "text", "text": "Done."}]));
        let message = json!({"role": "user", "content": [{"type": "text", "text": "Stop hook feedback: go on"}]});
        self.cli(&json!({"type": "user", "session_id": "s", "isSynthetic": true, "message": message}));
    }

    pub(crate) fn compacted(&mut self, trigger: &str) {
        let about = json!({"trigger": trigger, "pre_tokens": 170_000, "post_tokens": 30_000, "duration_ms": 9_000});
        self.cli(&json!({"type": "system", "subtype": "compact_boundary", "session_id": "s", "compact_metadata": about}));
    }

    /// Starts a subagent; what is said next, it says, until [`Stage::home`].
    pub(crate) fn subagent(&mut self) -> String {
        self.thread = None;
        let call = self.id("toolu");
        self.assistant(&json!([{"type": "tool_use", "id": call, "name": "Agent", "input": {"prompt": call}}]));
        self.cli(&json!({"type": "system", "subtype": "task_started", "session_id": "s", "task_id": format!("t{call}"),
            "tool_use_id": call, "task_type": "local_agent", "subagent_type": "general-purpose", "spawn_depth": 1}));
        self.thread = Some(call.clone());
        call
    }

    /// The subagent reports.
    pub(crate) fn home(&mut self, call: &str) {
        self.thread = None;
        self.cli(&json!({"type": "system", "subtype": "task_notification", "session_id": "s", "task_id": format!("t{call}"), "status": "completed"}));
        let block = json!({"type": "tool_result", "tool_use_id": call, "content": [{"type": "text", "text": "All is well."}]});
        self.cli(&json!({"type": "user", "session_id": "s", "message": {"role": "user", "content": [block]}}));
    }

    /// The turn ends well.
    pub(crate) fn end(&mut self) {
        self.assistant(&json!([{"type": "text", "text": "Done."}]));
        self.cli(&json!({"type": "result", "session_id": "s", "subtype": "success", "is_error": false, "terminal_reason": "completed"}));
    }

    pub(crate) fn exit(&mut self) {
        self.put(Input::StdoutEnd);
        self.put(Input::Exited(Exit::Code(0)));
    }

    /// The first that was said of this kind.
    pub(crate) fn first(&self, step: Step) -> Option<Told> {
        self.told.iter().copied().find(|told| told.step == step)
    }
}

/// The day of the recordings.
pub(crate) const DAY: Duration = Duration::from_secs(1_795_392_000);

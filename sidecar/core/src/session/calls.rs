//! Tools, subagents, permissions, hooks and background tasks: what is open, and how it ended.

use std::time::Duration;

use super::{Agent, Call, MAIN, OPEN, Permission, Session, name, thread};
use crate::Now;
use crate::detect::{Ended, Kind};
use crate::event::{Aim, Request, Task, ToolResult, User};
use crate::meter::tool_class;
use crate::update::{ToolClass, ToolOutcome, Update};

impl Session {
    pub(super) fn user(&mut self, user: &User, parent: Option<&str>, now: Now) {
        for result in &user.results {
            self.complete_thread(thread(parent), now);
            let Some(call) = self.calls.remove(&result.call) else { continue };
            if self.answered.len() < OPEN {
                self.answered.insert(result.call.clone());
            }
            let outcome = match () {
                () if call.denied || result.denied => ToolOutcome::Denied,
                () if result.interrupted => ToolOutcome::Interrupted,
                () if result.error => ToolOutcome::Error,
                () => ToolOutcome::Ok,
            };
            // One that was announced as a task says itself when it ends: its call may be answered as soon as it is launched.
            if let Some(agent) = self.agents.get(&result.call).filter(|agent| !agent.background && agent.task.is_none()) {
                let duration = now.mono.saturating_sub(agent.started);
                let outcome = if result.error { "failed" } else { "completed" };
                self.agents.remove(&result.call);
                self.agent_ended(result.call.clone(), outcome, duration, now);
            }
            self.permissions.retain(|_, permission| permission.call.as_deref() != Some(result.call.as_str()));
            self.looked_at(&call, result, outcome);
            self.tool_ended(&result.call, call, outcome, now);
        }
        if parent.is_none() && self.turn.is_some() && (!user.results.is_empty() || user.synthetic) {
            self.asked(false, now);
        }
    }

    pub(super) fn tool_started(&mut self, id: String, call: Call, bytes: usize) {
        if let Some(current) = self.threads.get_mut(&call.thread) {
            current.wants_tool = true;
        }
        if self.calls.contains_key(&id) || self.answered.contains(&id) || self.calls.len() >= OPEN {
            return;
        }
        if call.tool == "WebSearch" {
            self.ledger.unseen_call();
        }
        self.loops.call_began(&call.thread);
        self.out.push(Update::ToolStarted {
            session: self.id.clone(),
            call: id.clone(),
            tool: call.tool.clone(),
            parent: (call.thread != MAIN).then(|| call.thread.clone()),
            bytes,
        });
        self.calls.insert(id, call);
    }

    /// What a call came to, for those who look for circles.
    pub(super) fn looked_at(&mut self, call: &Call, result: &ToolResult, outcome: ToolOutcome) {
        let failed = match outcome {
            ToolOutcome::Ok => false,
            ToolOutcome::Error | ToolOutcome::Denied => true,
            // Somebody else ended it: that says nothing of the agent.
            ToolOutcome::Interrupted | ToolOutcome::Lost => return,
        };
        // That something is not there is an answer to who looked for it.
        let looked_for = outcome == ToolOutcome::Error && matches!(call.tool.as_str(), "Read" | "LS" | "Glob" | "Grep");
        self.loops.call_ended(
            &call.thread,
            &Ended {
                call: call.signature,
                result: result.hash,
                bytes: result.bytes,
                error: failed.then_some(if looked_for { 0 } else { result.error_hash }),
                kind: match (call.aim, tool_class(&call.tool)) {
                    (Aim::Wait, _) => Kind::Wait,
                    // What was not let is no look.
                    (Aim::Look, _) if !failed || result.ran => Kind::Look,
                    (Aim::Press, _) if !failed => Kind::Press,
                    _ if call.tool == "TodoWrite" => Kind::Note,
                    _ if matches!(call.tool.as_str(), "TaskCreate" | "TaskUpdate") => Kind::Task,
                    (_, ToolClass::File | ToolClass::Shell | ToolClass::Web) => Kind::Plain,
                    (_, ToolClass::Agent | ToolClass::Mcp | ToolClass::Other) => Kind::Opaque,
                },
            },
        );
        let streaks = self.loops.streaks();
        self.repeating(streaks.identical.max(streaks.alternating).max(streaks.same_error));
    }

    pub(super) fn repeating(&mut self, repeats: u64) {
        if std::mem::replace(&mut self.repeats, repeats) != repeats {
            self.out.push(Update::Repeating { streak: repeats });
        }
    }

    pub(super) fn tool_ended(&mut self, id: &str, call: Call, outcome: ToolOutcome, now: Now) {
        self.out.push(Update::ToolEnded {
            session: self.id.clone(),
            call: id.to_owned(),
            tool: call.tool,
            outcome,
            duration: now.mono.saturating_sub(call.started),
        });
    }

    pub(super) fn end_calls(&mut self, which: impl Fn(&Call) -> bool, outcome: ToolOutcome, now: Now) {
        let ids: Vec<String> = self.calls.iter().filter(|(_, call)| which(call)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            if let Some(call) = self.calls.remove(&id) {
                self.tool_ended(&id, call, outcome, now);
            }
        }
    }

    pub(super) fn task_started(&mut self, task: Task, now: Now) {
        match task.kind.as_deref() {
            Some("local_agent") | None => {
                let call = task.call.unwrap_or_else(|| task.task.clone());
                self.agent_started(call, Some(task.task), task.subagent_type, task.background, task.depth.max(1), now);
            }
            Some(_) => {
                if self.shells.len() < OPEN {
                    self.shells.insert(task.task);
                }
            }
        }
    }

    pub(super) fn agent_started(
        &mut self,
        call: String,
        task: Option<String>,
        kind: Option<String>,
        background: bool,
        depth: u64,
        now: Now,
    ) {
        self.ledger.subagent_seen();
        if let Some(agent) = self.agents.get_mut(&call) {
            agent.task = task.or(agent.task.take());
            agent.background |= background;
            return;
        }
        if self.agents.len() >= OPEN {
            return;
        }
        self.out.push(Update::SubagentStarted {
            session: self.id.clone(),
            kind: name(kind, "unknown"),
            call: call.clone(),
            task: task.clone(),
            depth,
            background,
        });
        self.loops.subagent_began();
        self.agents.insert(call, Agent { started: now.mono, depth, background, task });
        self.agents_changed();
    }

    pub(super) fn task_ended(&mut self, task: &str, status: Option<&str>, now: Now) {
        self.shells.remove(task);
        let found = self.agents.iter().find(|(_, agent)| agent.task.as_deref() == Some(task)).map(|(call, _)| call.clone());
        if let Some((call, agent)) = found.and_then(|call| self.agents.remove_entry(&call)) {
            let outcome = match status {
                Some("completed") => "completed",
                Some("failed") => "failed",
                Some("stopped" | "killed") => "stopped",
                _ => "other",
            };
            self.agent_ended(call, outcome, now.mono.saturating_sub(agent.started), now);
        }
    }

    pub(super) fn agent_ended(&mut self, call: String, outcome: &'static str, duration: Duration, now: Now) {
        // What it said last is all that it said.
        self.complete_thread(&call, now);
        self.threads.remove(&call);
        self.loops.subagent_ended(&call);
        self.out.push(Update::SubagentEnded { call, outcome, duration });
        self.agents_changed();
    }

    pub(super) fn agents_changed(&mut self) {
        let depth = self.agents.values().map(|agent| agent.depth).max().unwrap_or_default();
        self.out.push(Update::Subagents { active: self.agents.len(), depth });
        self.background_changed();
    }

    pub(super) fn background_changed(&mut self) {
        let kind = |kind: &str| self.background.iter().filter(|(_, k)| k.as_deref() == Some(kind)).count();
        let (agents, shells) = (kind("local_agent"), kind("local_bash"));
        let others = self.background.len() - agents - shells;
        self.out.push(Update::BackgroundTasks { agents, shells, others });
    }

    pub(super) fn cli_asks(&mut self, id: String, request: Request, now: Now) {
        if self.permissions.len() + self.mcp_calls.len() + self.callbacks.len() >= OPEN {
            return;
        }
        match request {
            Request::CanUseTool { tool, call } => self.asks(id, call, name(tool, "unknown"), now),
            Request::McpMessage { server, method, id: true } if method.as_deref() == Some("tools/call") => {
                let server = name(server, "unknown");
                self.out.push(Update::McpStarted { request: id.clone(), server: server.clone() });
                self.mcp_calls.insert(id, (server, now.mono));
            }
            // A person is asked something.
            Request::Other(kind) if kind == "elicitation" || kind == "request_user_dialog" => self.asks(id, None, kind, now),
            Request::HookCallback { event } => {
                self.out.push(Update::HookStarted { hook: id.clone(), event: name(event, "unknown") });
                self.callbacks.insert(id);
            }
            Request::Initialize
            | Request::McpMessage { .. }
            | Request::Interrupt
            | Request::EndSession
            | Request::GetUsage
            | Request::Other(_) => {}
        }
    }

    pub(super) fn asks(&mut self, request: String, call: Option<String>, tool: String, now: Now) {
        self.out.push(Update::PermissionAsked { request: request.clone(), call: call.clone(), tool: tool.clone() });
        self.permissions.insert(request, Permission { call, tool, since: now.mono });
    }

    pub(super) fn called_back(&mut self, id: &str, outcome: &'static str) {
        if let Some(hook) = self.callbacks.take(id) {
            self.out.push(Update::HookAnswered { hook, outcome });
        }
    }

    pub(super) fn decided(&mut self, request: String, decision: &'static str, now: Now) {
        if let Some(Permission { call, tool, since }) = self.permissions.remove(&request) {
            let wait = now.mono.saturating_sub(since);
            self.out.push(Update::PermissionDecided { request, call, tool, decision, wait });
        }
    }
}

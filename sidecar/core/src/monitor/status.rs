//! What `/status` and the journal say of an agent that lives.

use serde::Serialize;

use super::Monitor;
use crate::detect::why::{Vitals, Why};
use crate::limit::Used;
use crate::report::{SessionReport, Sums};
use crate::tokens::Usd;
use crate::update::Activity;
use crate::who::{self, Who};

/// See [`Monitor::status`].
#[derive(Debug, Serialize)]
pub struct Status<'a> {
    sessions: Vec<LiveSession<'a>>,
    totals: Sums,
}

#[derive(Debug, Serialize)]
struct LiveSession<'a> {
    /// Absent until the CLI has said its session's name.
    #[serde(flatten)]
    report: Option<&'a SessionReport>,
    state: Activity,
    state_seconds: f64,
    why: Why,
    process: &'a Vitals,
    /// Until its memory reaches the limit, if it goes on so.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_seconds_left: Option<f64>,
    silent_seconds: f64,
    refusing: bool,
    paused: bool,
    tools_in_flight: usize,
    subagents_active: usize,
    background_tasks: usize,
    permissions_pending: usize,
    cli_version: Option<&'a str>,
    cli_pid: Option<u32>,
    /// When the CLI was started. Times are seconds since the Unix epoch: whoever reads this later knows how long ago.
    started: f64,
    state_since: f64,
    model: Option<&'a str>,
    /// The turn that runs.
    turn: Option<LiveTurn>,
    /// Answers of the main loop, in all turns.
    rounds: u64,
    context: Option<ContextFill>,
    /// The call in flight that began first.
    tool: Option<LiveCall<'a>>,
    last_event: Option<LastEvent>,
    /// Of the last entry of its [`Timeline`].
    timeline: u64,
    limits: Vec<Used>,
    slot: u32,
    #[serde(flatten)]
    who: &'a Who,
    /// What it shares with another tenant's agent.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    tenant_conflicts: &'a [who::Shared],
}

#[derive(Debug, Serialize)]
struct LiveTurn {
    number: u64,
    since: f64,
    rounds: u64,
    cost_usd: Usd,
}

/// Absent: the window is told with the first result.
#[derive(Debug, Serialize)]
struct ContextFill {
    tokens: u64,
    window: Option<u64>,
    ratio: Option<f64>,
}

#[derive(Debug, Serialize)]
struct LiveCall<'a> {
    name: &'a str,
    since: f64,
}

#[derive(Debug, Serialize)]
struct LastEvent {
    kind: &'static str,
    at: f64,
}

impl Monitor {
    /// What `/status` says: the live session with its state and limits, and the sums of this process.
    pub fn status(&self) -> Status<'_> {
        let live = (!self.exited).then(|| LiveSession {
            report: self.report.current(),
            state: self.session.activity(),
            why: self.why(),
            process: &self.vitals,
            memory_seconds_left: self.growth.left().map(|left| left.as_secs_f64()),
            silent_seconds: self.now.mono.saturating_sub(self.session.last_active()).as_secs_f64(),
            refusing: self.refusing || self.held(),
            paused: self.order.paused,
            state_seconds: self.now.mono.saturating_sub(self.session.activity_since()).as_secs_f64(),
            tools_in_flight: self.session.calls_in_flight(),
            subagents_active: self.session.subagents_active(),
            background_tasks: self.session.background_tasks(),
            permissions_pending: self.session.permissions_pending(),
            cli_version: self.session.version(),
            cli_pid: self.pid(),
            started: self.unix_of(self.spawned_at),
            state_since: self.unix_of(self.session.activity_since()),
            model: self.session.model(),
            turn: self.session.turn().map(|turn| LiveTurn {
                number: turn.number,
                since: self.unix_of(turn.started),
                rounds: turn.rounds,
                cost_usd: turn.cost,
            }),
            rounds: self.session.rounds(),
            context: self.session.context().map(|(tokens, window)| ContextFill {
                tokens,
                window,
                #[expect(clippy::cast_precision_loss, reason = "a ratio")]
                ratio: window.map(|window| tokens as f64 / window as f64),
            }),
            tool: self.session.call_in_flight().map(|(name, since)| LiveCall { name, since: self.unix_of(since) }),
            last_event: self.timeline.heard().map(|(kind, at)| LastEvent { kind, at: at.as_secs_f64() }),
            timeline: self.timeline.last(),
            limits: self.limits(),
            slot: 0,
            who: &self.settings.who,
            tenant_conflicts: &self.conflicts,
        });
        Status { sessions: live.into_iter().collect(), totals: self.report.totals() }
    }

    /// The next line of this wrapper's journal: what changed since a mark, and the next mark.
    pub fn journal(&mut self, since: u64) -> (crate::hub::Line, u64) {
        let Status { sessions, totals } = self.status();
        // What cannot be said is not said: the numbers are what matters.
        let sessions = sessions.iter().filter_map(|session| serde_json::to_value(session).ok()).collect();
        let mut line = crate::hub::Line {
            unix: self.now.unix.as_secs_f64(),
            sessions,
            totals,
            live: self.live(),
            ready: self.ready(),
            ..crate::hub::Line::default()
        };
        let mark = crate::hub::changes(&mut self.meters, since, &mut line);
        (line, mark)
    }
}

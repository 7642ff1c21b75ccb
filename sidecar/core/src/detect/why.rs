//! What an agent is about, or held up by: its own events, and what the kernel says of its process. Never silence alone: six silent minutes
//! before an answer are normal.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::sample::{Sample, Sockets};
use crate::update::{Activity, Stall, labels};

labels! {
    /// Why it is in the state that it is in.
    Why {
        Starting = "starting",
        WaitingInput = "waiting_input",
        /// The model is asked and has not begun to answer, or thinks where nobody sees it.
        Thinking = "thinking",
        Answering = "answering",
        Tool = "tool",
        LongTool = "long_tool",
        Subagent = "subagent",
        /// The turn is over; a command that was started in it is not.
        Background = "background_task",
        Permission = "permission",
        RetryBackoff = "retry_backoff",
        Compacting = "compacting",
        Idle = "idle",
        Draining = "draining",
        /// Its output is not read: text, a terminal.
        Unseen = "unseen",
        /// Stopped by a signal or by the freezer.
        Frozen = "frozen",
        /// Waits for a disk or a file server, where no signal reaches it.
        Uninterruptible = "uninterruptible",
        /// The container may not use the CPU that it needs.
        Throttled = "throttled",
        /// The model is asked, and there is no connection that works.
        NetworkDead = "network_dead",
        /// It computes without end and says nothing.
        Spinning = "spinning",
        /// The last answer asks for nothing more, and there is no result.
        NoResult = "no_result",
        /// The result is there, its input is over, and it does not end.
        PostResult = "post_result_hang",
    }
}

impl Why {
    /// What it is called where it is nothing that an agent should be in.
    pub fn stall(self) -> Option<Stall> {
        match self {
            Why::Frozen => Some(Stall::Frozen),
            Why::Uninterruptible => Some(Stall::Uninterruptible),
            Why::NetworkDead => Some(Stall::NetworkDead),
            Why::Spinning => Some(Stall::Spinning),
            Why::PostResult => Some(Stall::PostResult),
            Why::Starting
            | Why::WaitingInput
            | Why::Thinking
            | Why::Answering
            | Why::Tool
            | Why::LongTool
            | Why::Subagent
            | Why::Background
            | Why::Permission
            | Why::RetryBackoff
            | Why::Compacting
            | Why::Idle
            | Why::Draining
            | Why::Unseen
            | Why::Throttled
            | Why::NoResult => None,
        }
    }
}

/// A tool that runs for longer is a long one: most end within seconds.
const LONG_TOOL: Duration = Duration::from_secs(60);
/// An answer whose last frame is older than this is none that is being said.
const ANSWERING: Duration = Duration::from_secs(10);
/// Silence that is too short to look for its cause.
const QUIET: Duration = Duration::from_secs(10);
/// A result follows the last answer within a moment; hooks may take their time.
const RESULT: Duration = Duration::from_secs(30);
/// The CLI ends within a second of its input; a busy machine takes longer.
const EXIT: Duration = Duration::from_secs(10);
/// What is seen in so many readings in a row is no accident of the moment.
const SURE: u32 = 2;
const SURE_OF_CPU: u32 = 3;
/// Of a core, or of the time.
const BUSY: f64 = 0.9;
const THROTTLED: f64 = 0.5;

/// What the session says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Doing {
    /// Whether or not it is past a time limit.
    pub activity: Activity,
    /// Nothing is known but that it runs.
    pub unseen: bool,
    pub in_turn: bool,
    pub turns: u64,
    /// Since when nobody said anything.
    pub silent: Duration,
    /// An answer has begun and is not complete.
    pub answering: bool,
    /// The last answer asks for nothing more.
    pub answered: bool,
    /// How long the oldest call has run.
    pub call: Option<Duration>,
    pub subagents: usize,
    /// How long the CLI's input has been over.
    pub input_over: Option<Duration>,
}

/// What the last readings say of the CLI's process.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Vitals {
    /// As /proc has it: running, sleeping, in uninterruptible sleep, stopped, …
    pub process_state: Option<char>,
    pub frozen: bool,
    /// Cores that the CLI and its tools used since the reading before.
    pub cli_cpu: Option<f64>,
    pub tool_cpu: Option<f64>,
    pub throttled_ratio: Option<f64>,
    /// Only while it works: they are not looked for otherwise.
    pub sockets: Option<Sockets>,
    #[serde(skip)]
    frozen_since: Option<Duration>,
    #[serde(skip)]
    uninterruptible: u32,
    /// It has been seen with a connection. Who never had one reaches the model by another way: a Unix socket, perhaps.
    #[serde(skip)]
    connects: bool,
    #[serde(skip)]
    unconnected: u32,
    #[serde(skip)]
    busy: u32,
    #[serde(skip)]
    before: Option<Before>,
}

#[derive(Clone, Copy, Debug)]
struct Before {
    at: Duration,
    cli: Duration,
    tools: Duration,
    throttled: Option<Duration>,
}

impl Vitals {
    pub fn sampled(&mut self, sample: &Sample, at: Duration) {
        let now = Before {
            at,
            cli: sample.cpu("cli"),
            tools: sample.cpu("tool") + sample.cpu("mcp"),
            throttled: sample.container.throttled,
        };
        let cli = sample.cli.as_ref();
        self.process_state = cli.map(|cli| cli.state);
        self.sockets = cli.and_then(|cli| cli.sockets);
        self.frozen = sample.container.frozen == Some(true) || matches!(self.process_state, Some('T' | 't'));
        self.frozen_since = if self.frozen { self.frozen_since.or(Some(at)) } else { None };
        let again = |count: u32, is: bool| if is { count.saturating_add(1) } else { 0 };
        self.uninterruptible = again(self.uninterruptible, self.process_state == Some('D'));
        self.connects |= self.sockets.is_some_and(|sockets| sockets != Sockets::default());
        self.unconnected = again(self.unconnected, self.sockets.is_some_and(|sockets| self.connects && sockets.working() == 0));
        if let Some(before) = self.before.filter(|before| before.at < at) {
            let share = |now: Duration, then: Duration| now.saturating_sub(then).as_secs_f64() / (at - before.at).as_secs_f64();
            self.cli_cpu = Some(share(now.cli, before.cli));
            self.tool_cpu = Some(share(now.tools, before.tools));
            self.throttled_ratio = now.throttled.zip(before.throttled).map(|(now, then)| share(now, then));
        }
        self.busy = again(self.busy, self.cli_cpu.is_some_and(|cpu| cpu >= BUSY));
        self.before = Some(now);
    }

    /// Since when the CLI has not been running at all.
    pub fn frozen_since(&self) -> Option<Duration> {
        self.frozen_since
    }

    /// Nobody ran for this long.
    pub fn slept(&mut self, gap: Duration) {
        self.frozen_since = self.frozen_since.map(|since| since + gap);
    }

    /// What keeps it from running, whatever it has to do.
    fn held(&self) -> Option<Why> {
        match () {
            () if self.frozen => Some(Why::Frozen),
            () if self.uninterruptible >= SURE => Some(Why::Uninterruptible),
            () => None,
        }
    }

    fn throttled(&self) -> bool {
        self.throttled_ratio.is_some_and(|ratio| ratio >= THROTTLED)
    }
}

/// See the module's head.
pub fn why(doing: &Doing, vitals: &Vitals) -> Why {
    let quiet = doing.silent >= QUIET;
    let of_activity = match doing.activity {
        Activity::Draining => return Why::Draining,
        Activity::Starting => Why::Starting,
        Activity::WaitingInput => Why::WaitingInput,
        Activity::Permission => Why::Permission,
        Activity::RetryBackoff => Why::RetryBackoff,
        Activity::Compacting => Why::Compacting,
        Activity::Tool if !doing.in_turn => Why::Background,
        Activity::Tool if doing.call.is_some_and(|lasted| lasted >= LONG_TOOL) => Why::LongTool,
        Activity::Tool => Why::Tool,
        Activity::Idle if doing.turns > 0 && doing.input_over.is_some_and(|lasted| lasted >= EXIT) => Why::PostResult,
        Activity::Idle => Why::Idle,
        Activity::Model | Activity::Stuck => match () {
            () if doing.unseen => Why::Unseen,
            () if doing.answered && doing.silent >= RESULT => Why::NoResult,
            () if quiet && vitals.busy >= SURE_OF_CPU => Why::Spinning,
            () if quiet && vitals.unconnected >= SURE => Why::NetworkDead,
            () if doing.subagents > 0 => Why::Subagent,
            () if doing.answering && doing.silent < ANSWERING => Why::Answering,
            () => Why::Thinking,
        },
    };
    vitals.held().unwrap_or(match of_activity {
        // What the CLI itself would do, if it could.
        Why::Starting | Why::Thinking | Why::NoResult | Why::Compacting if vitals.throttled() => Why::Throttled,
        why => why,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::{CliSample, ContainerSample, RoleSample};

    fn doing(activity: Activity, silent: u64) -> Doing {
        Doing {
            activity,
            unseen: false,
            in_turn: true,
            turns: 1,
            silent: Duration::from_secs(silent),
            answering: false,
            answered: false,
            call: None,
            subagents: 0,
            input_over: None,
        }
    }

    /// A reading each five seconds, as often as told.
    fn vitals(readings: u32, state: char, cores: f64, sockets: Option<Sockets>, container: &ContainerSample) -> Vitals {
        let mut vitals = Vitals::default();
        for n in 0..readings {
            // It had a connection once.
            let sockets = if n == 0 { sockets.map(|_| Sockets { established: 1, ..Sockets::default() }) } else { sockets };
            let role = RoleSample { cpu: Duration::from_secs_f64(5.0 * cores) * n, ..RoleSample::new("cli") };
            let cli = Some(CliSample { state, sockets });
            let sample = Sample { roles: vec![role], cli, container: container.clone(), ..Sample::default() };
            vitals.sampled(&sample, Duration::from_secs(5) * n);
        }
        vitals
    }

    #[test]
    fn each_cause_is_told_apart() {
        let free = ContainerSample::default();
        let connected = Some(Sockets { established: 2, connecting: 0, unanswered: 0 });
        let deaf = Some(Sockets { established: 1, connecting: 1, unanswered: 1 });
        let well = || vitals(4, 'S', 0.01, connected, &free);
        let model = |silent| doing(Activity::Model, silent);
        let mut unconnected = Vitals::default();
        for n in 0..4 {
            let cli = Some(CliSample { state: 'S', sockets: Some(Sockets::default()) });
            unconnected.sampled(&Sample { cli, ..Sample::default() }, Duration::from_secs(5) * n);
        }
        let cases: Vec<(&str, Doing, Vitals, Why)> = vec![
            ("six silent minutes", model(360), well(), Why::Thinking),
            ("the same, where sockets cannot be seen", model(360), vitals(4, 'S', 0.0, None, &free), Why::Thinking),
            ("nothing known of the process", model(360), Vitals::default(), Why::Thinking),
            ("text comes", Doing { answering: true, ..model(1) }, well(), Why::Answering),
            ("text came", Doing { answering: true, ..model(100) }, well(), Why::Thinking),
            ("no connection", model(60), vitals(4, 'S', 0.0, Some(Sockets::default()), &free), Why::NetworkDead),
            ("nobody answers", model(60), vitals(4, 'S', 0.0, deaf, &free), Why::NetworkDead),
            ("no connection for a moment", model(60), vitals(2, 'S', 0.0, Some(Sockets::default()), &free), Why::Thinking),
            ("no connection, and it just spoke", model(2), vitals(4, 'S', 0.0, Some(Sockets::default()), &free), Why::Thinking),
            ("computes", model(60), vitals(5, 'R', 1.0, connected, &free), Why::Spinning),
            ("computes and speaks", Doing { answering: true, ..model(0) }, vitals(5, 'R', 1.0, connected, &free), Why::Answering),
            (
                "a terminal",
                Doing { unseen: true, ..model(600) },
                vitals(4, 'S', 0.0, Some(Sockets::default()), &free),
                Why::Unseen,
            ),
            ("a subagent works", Doing { subagents: 1, ..model(60) }, well(), Why::Subagent),
            ("the result is due", Doing { answered: true, ..model(40) }, well(), Why::NoResult),
            ("a tool", Doing { call: Some(Duration::from_secs(5)), ..doing(Activity::Tool, 5) }, well(), Why::Tool),
            ("a long tool", Doing { call: Some(LONG_TOOL), ..doing(Activity::Tool, 60) }, well(), Why::LongTool),
            ("a background command", Doing { in_turn: false, ..doing(Activity::Tool, 60) }, well(), Why::Background),
            ("a person is asked", doing(Activity::Permission, 600), well(), Why::Permission),
            ("a retry is due", doing(Activity::RetryBackoff, 30), well(), Why::RetryBackoff),
            ("idle", Doing { in_turn: false, ..doing(Activity::Idle, 600) }, well(), Why::Idle),
            (
                "no end after the result",
                Doing { in_turn: false, input_over: Some(EXIT), ..doing(Activity::Idle, 60) },
                well(),
                Why::PostResult,
            ),
            ("never a connection", model(60), unconnected, Why::Thinking),
            ("stopped", model(60), vitals(1, 'T', 0.0, None, &free), Why::Frozen),
            ("stopped in a tool", doing(Activity::Tool, 6), vitals(1, 'T', 0.0, None, &free), Why::Frozen),
            (
                "frozen with its container",
                model(60),
                vitals(1, 'S', 0.0, None, &ContainerSample { frozen: Some(true), ..free.clone() }),
                Why::Frozen,
            ),
            ("waits for a disk", model(60), vitals(3, 'D', 0.0, None, &free), Why::Uninterruptible),
            ("waited for a disk", model(60), vitals(1, 'D', 0.0, None, &free), Why::Thinking),
            ("on its way out", doing(Activity::Draining, 60), vitals(1, 'T', 0.0, None, &free), Why::Draining),
        ];
        for (what, doing, vitals, expected) in cases {
            assert_eq!(why(&doing, &vitals), expected, "{what}");
        }
    }

    #[test]
    fn a_container_that_may_not_run_is_throttled() {
        let mut vitals = Vitals::default();
        for (at, throttled) in [(0, 0), (5, 4)] {
            let container = ContainerSample { throttled: Some(Duration::from_secs(throttled)), ..ContainerSample::default() };
            vitals.sampled(&Sample { container, ..Sample::default() }, Duration::from_secs(at));
        }
        assert_eq!(why(&doing(Activity::Model, 60), &vitals), Why::Throttled);
        assert_eq!(why(&doing(Activity::Tool, 60), &vitals), Why::Tool);
    }

    #[test]
    fn a_stop_is_dated_from_when_it_was_first_seen() {
        let mut vitals = Vitals::default();
        for (at, state, since) in [(5, 'S', None), (10, 'T', Some(10)), (15, 'T', Some(10)), (20, 'S', None), (25, 'T', Some(25))]
        {
            let cli = Some(CliSample { state, sockets: None });
            vitals.sampled(&Sample { cli, ..Sample::default() }, Duration::from_secs(at));
            assert_eq!(vitals.frozen_since(), since.map(Duration::from_secs));
        }
    }
}

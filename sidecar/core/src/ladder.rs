//! Stopping, one step after another: each asks harder than the one before, and has a deadline.
//!
//! ```text
//!   Interrupt ──(no result)──► End ──(no exit)──► Terminate ──(no exit)──► Kill
//!   the turn ends              a result, then      no result               everything below us
//!   with a result              a clean exit
//! ```

use std::time::Duration;

use crate::limit::Scope;
use crate::monitor::Signal;
use crate::tokens::Usd;
use crate::update::{ExitReason, Step};

/// How long each step may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// The real CLI answers an interrupt within 0.2 s; tools take longer to die.
    pub interrupt: Duration,
    /// It ends within 1.4 s of `end_session`, on a busy machine within twice that. Together with the next one inside the five seconds
    /// that the SDKs give us.
    pub end: Duration,
    /// It ends within 0.5 s of a signal: its output is always read.
    pub terminate: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { interrupt: Duration::from_secs(3), end: Duration::from_secs(3), terminate: Duration::from_millis(1_500) }
    }
}

impl Patience {
    /// From the decision to the kill.
    pub fn whole(&self) -> Duration {
        self.interrupt + self.end + self.terminate
    }
}

/// What has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    Turn,
    Process,
}

/// A stop under way.
#[derive(Clone, Debug)]
pub struct Ladder {
    pub goal: Goal,
    pub scope: Scope,
    /// What the process's end is called when it comes to that.
    pub reason: ExitReason,
    pub step: Step,
    /// The signal to end with.
    pub signal: Signal,
    pub decided: Duration,
    /// Spent above the ceiling is what was spent above this.
    pub ceiling: Option<Usd>,
    pub since: Duration,
    deadline: Option<Duration>,
    patience: Patience,
}

impl Ladder {
    pub fn new(
        goal: Goal,
        scope: Scope,
        reason: ExitReason,
        first: Step,
        signal: Signal,
        patience: Patience,
        now: Duration,
    ) -> Ladder {
        let mut ladder = Ladder {
            goal,
            scope,
            reason,
            step: first,
            signal,
            decided: now,
            ceiling: None,
            since: now,
            deadline: None,
            patience,
        };
        ladder.enter(first, now);
        ladder
    }

    /// When the present step has had its time.
    pub fn deadline(&self) -> Option<Duration> {
        self.deadline
    }

    /// The next step, if the present one has had its time.
    pub fn climb(&mut self, now: Duration) -> Option<Step> {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return None;
        }
        let next = match self.step {
            Step::Warn | Step::Refuse | Step::Interrupt => Step::End,
            Step::End => Step::Terminate,
            Step::Terminate | Step::Kill => Step::Kill,
        };
        self.goal = Goal::Process;
        self.enter(next, now);
        Some(next)
    }

    /// Goes on with a harder step at once.
    pub fn enter(&mut self, step: Step, now: Duration) {
        self.step = step;
        self.since = now;
        self.deadline = match step {
            Step::Warn | Step::Refuse => None,
            Step::Interrupt => Some(now + self.patience.interrupt),
            Step::End => Some(now + self.patience.end),
            Step::Terminate => Some(now + self.patience.terminate),
            // A process in an uninterruptible sleep: tried again until it is gone.
            Step::Kill => Some(now + KILL_AGAIN),
        };
    }
}

/// A kill is repeated after this long: a process may have been born meanwhile.
const KILL_AGAIN: Duration = Duration::from_millis(500);

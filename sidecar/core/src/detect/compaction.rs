//! A context that is full again as soon as it was compacted.

use std::collections::BTreeSet;

/// Answers after which a compaction was worth its while: a healthy agent works for a hundred and more.
const SOON: u64 = 8;
/// Where all that it does is new, as when it reads what is larger than its context, so many will do.
const SOON_AT_WORK: u64 = 3;
/// Calls that are remembered. Beyond that all is new again.
const SEEN: usize = 4_096;

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub(super) struct Compactions {
    answers: u64,
    streak: u64,
    /// Calls of this turn, those before the last compaction included.
    seen: BTreeSet<u64>,
    /// Since the last compaction: calls, and those among them that were never made before.
    calls: u64,
    new: u64,
}

impl Compactions {
    pub(super) fn answered(&mut self) {
        self.answers = self.answers.saturating_add(1);
    }

    pub(super) fn called(&mut self, call: u64) {
        if self.seen.len() >= SEEN {
            self.seen.clear();
        }
        self.calls = self.calls.saturating_add(1);
        self.new = self.new.saturating_add(u64::from(self.seen.insert(call)));
    }

    pub(super) fn compacted(&mut self) {
        let works = self.new > self.calls / 2;
        let soon = self.answers <= if works { SOON_AT_WORK } else { SOON };
        self.streak = if soon { self.streak.saturating_add(1) } else { 1 };
        (self.answers, self.calls, self.new) = (0, 0, 0);
    }

    pub(super) fn streak(&self) -> u64 {
        // Once it has worked for a while, it was no thrashing.
        if self.answers > SOON { 0 } else { self.streak }
    }
}

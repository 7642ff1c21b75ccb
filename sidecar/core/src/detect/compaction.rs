//! A context that is full again as soon as it was compacted.

/// Answers after which a compaction was worth its while: a healthy agent works for a hundred and more.
const SOON: u64 = 8;

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub(super) struct Compactions {
    answers: u64,
    streak: u64,
}

impl Compactions {
    pub(super) fn answered(&mut self) {
        self.answers = self.answers.saturating_add(1);
    }

    pub(super) fn compacted(&mut self) {
        let soon = self.answers <= SOON;
        self.streak = if soon { self.streak.saturating_add(1) } else { 1 };
        self.answers = 0;
    }

    pub(super) fn streak(&self) -> u64 {
        // Once it has worked for a while, it was no thrashing.
        if self.answers > SOON { 0 } else { self.streak }
    }
}

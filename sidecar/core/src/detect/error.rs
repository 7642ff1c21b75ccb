//! The same failure again, whatever is tried. The same call with the same error is a repeated call and not counted here.

use super::Round;

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub(super) struct SameError {
    error: u64,
    calls: u64,
    streak: u64,
}

impl SameError {
    pub(super) fn round(&mut self, round: &Round) {
        if round.news {
            *self = SameError::default();
        } else if round.neutral || round.looked || round.errors == 0 {
            // To look again at what is known changes nothing, and what is tried after a wait may well fail as before.
        } else if self.streak == 0 || self.error != round.errors {
            *self = SameError { error: round.errors, calls: round.calls, streak: 1 };
        } else if self.calls != round.calls {
            self.calls = round.calls;
            self.streak += 1;
        }
    }

    pub(super) fn streak(&self) -> u64 {
        self.streak
    }
}

//! Answers that bring no news: every call was new and failed, or had been made before in this turn with the same result, or there was
//! none.

use std::collections::BTreeSet;

use super::Round;

/// Calls and results that are remembered. Beyond that they are news again.
const SEEN: usize = 4_096;
/// Answers that a wait makes up for: its own, and the looks that it was waited for.
const FORGIVEN: u64 = 4;

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    seen: BTreeSet<u64>,
    stale: u64,
}

impl Progress {
    /// Whether this call, with its result a pair, tells something that was not known.
    pub(super) fn is_news(&mut self, call: u64, pair: u64, succeeded: bool) -> bool {
        if self.seen.len() + 2 > SEEN {
            self.seen.clear();
        }
        let new_call = self.seen.insert(call);
        self.seen.insert(pair) && (succeeded || !new_call)
    }

    pub(super) fn answered(&mut self) {
        self.stale = self.stale.saturating_add(1);
    }

    /// What the answer that was counted led to.
    pub(super) fn round(&mut self, round: &Round) {
        if round.news {
            self.stale = 0;
        } else if round.neutral {
            self.stale = self.stale.saturating_sub(if round.waited { FORGIVEN } else { 1 });
        }
    }

    pub(super) fn forget(&mut self) {
        self.seen.clear();
    }

    #[cfg(test)]
    pub(super) fn remembered(&self) -> usize {
        self.seen.len()
    }

    pub(super) fn stale(&self) -> u64 {
        self.stale
    }
}

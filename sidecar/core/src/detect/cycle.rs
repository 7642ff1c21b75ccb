//! The same round again and again, or the same few in turn.

use super::Round;

/// The longest cycle that is recognised: edit, test, edit back, test.
const LONGEST: usize = 4;

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub(super) struct Cycles {
    /// The last rounds, the latest first.
    recent: [Option<u64>; LONGEST],
    /// How many rounds in a row were each the same as the one so many places before it.
    runs: [u64; LONGEST],
}

impl Cycles {
    pub(super) fn round(&mut self, round: &Round) {
        if round.neutral || round.looked {
            *self = Cycles::default();
            return;
        }
        for (before, run) in self.recent.iter().zip(&mut self.runs) {
            *run = if *before == Some(round.signature) { *run + 1 } else { 0 };
        }
        self.recent.rotate_right(1);
        self.recent[0] = Some(round.signature);
    }

    /// Rounds in a row that were the same.
    pub(super) fn identical(&self) -> u64 {
        self.runs[0] + u64::from(self.recent[0].is_some())
    }

    /// How often the rounds of one cycle came in the same order.
    pub(super) fn alternating(&self) -> u64 {
        (2..=LONGEST)
            .filter_map(|length| {
                let (run, length) = (self.runs[length - 1], length as u64);
                // Where all of a cycle is the same, it is none.
                (self.identical() < length && run > 0).then(|| 1 + run / length)
            })
            .max()
            .unwrap_or_default()
    }
}

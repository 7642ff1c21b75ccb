//! What people ask of agents that run: one list for all wrappers, in which each finds what is asked of it.
//!
//! What holds until it is taken back is a state. What is done once is a count, so that nothing is done again by who reads it again.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::limit::{Limit, Rule, Scope};
use crate::tokens::Usd;

/// Of another version is not read.
pub const VERSION: u32 = 1;

/// To what a session's own limits were raised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Raised {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usd: Option<Usd>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turns: Option<u64>,
}

impl Raised {
    pub fn is_empty(&self) -> bool {
        *self == Raised::default()
    }

    /// Which limits, in their own units.
    pub fn each(&self) -> impl Iterator<Item = (Limit, f64)> + use<> {
        #[expect(clippy::cast_precision_loss, reason = "for people and ratios")]
        let count = |n: Option<u64>| n.map(|n| n as f64);
        let each =
            [(Limit::CostUsd, self.usd.map(Usd::to_f64)), (Limit::Tokens, count(self.tokens)), (Limit::Turns, count(self.turns))];
        each.into_iter().filter_map(|(limit, ceiling)| Some((limit, ceiling?)))
    }

    /// What a rule was raised to.
    pub fn of(&self, rule: &Rule) -> Option<f64> {
        let of = |(limit, ceiling)| (limit == rule.limit && rule.scope == Scope::Session).then_some(ceiling);
        self.each().find_map(of)
    }

    fn with(self, other: Raised) -> Raised {
        Raised { usd: other.usd.or(self.usd), tokens: other.tokens.or(self.tokens), turns: other.turns.or(self.turns) }
    }
}

/// Something that is asked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum What {
    /// Take no more messages; `now`: and end the turn that runs.
    Pause {
        now: bool,
    },
    Resume,
    Interrupt,
    Stop,
    Raise(Raised),
}

/// All that is asked of one agent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Order {
    pub paused: bool,
    /// How often its turn was to be interrupted, so far.
    pub interrupts: u64,
    pub stop: bool,
    pub raised: Raised,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Own {
    /// Unless the same was said to all.
    paused: Option<bool>,
    interrupts: u64,
    stop: bool,
    raised: Raised,
}

/// See the module's head.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Orders {
    version: u32,
    /// All are, those that are started later, too.
    paused: bool,
    interrupts: u64,
    runs: BTreeMap<String, Own>,
}

impl Orders {
    /// None instead of some that cannot be understood.
    pub fn checked(self) -> Orders {
        if self.version == VERSION { self } else { Orders { version: VERSION, ..Orders::default() } }
    }

    /// What is asked of a run.
    pub fn of(&self, run: &str) -> Order {
        let own = self.runs.get(run).cloned().unwrap_or_default();
        Order {
            paused: own.paused.unwrap_or(self.paused),
            interrupts: self.interrupts.saturating_add(own.interrupts),
            stop: own.stop,
            raised: own.raised,
        }
    }

    /// Asks something of these runs.
    pub fn give(&mut self, runs: &[String], what: What) {
        for run in runs {
            let own = self.runs.entry(run.clone()).or_default();
            match what {
                What::Pause { now } => {
                    own.paused = Some(true);
                    own.interrupts += u64::from(now);
                }
                What::Resume => own.paused = Some(false),
                What::Interrupt => own.interrupts = own.interrupts.saturating_add(1),
                What::Stop => own.stop = true,
                What::Raise(raised) => own.raised = own.raised.with(raised),
            }
        }
    }

    /// Pauses all, and those that are started later; or lets all go on.
    pub fn pause_all(&mut self, paused: bool, now: bool) {
        self.paused = paused;
        self.interrupts += u64::from(now);
        self.runs.values_mut().for_each(|own| own.paused = None);
    }

    /// Forgets what was asked of those that are gone. Says whether there was anything.
    pub fn keep(&mut self, lives: impl Fn(&str) -> bool) -> bool {
        let before = self.runs.len();
        self.runs.retain(|run, _| lives(run));
        self.runs.len() != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finds_what_is_asked_of_it_and_of_all() {
        let mut orders = Orders::default().checked();
        let (a, b) = ([String::from("a")], [String::from("b")]);
        orders.give(&a, What::Pause { now: true });
        assert_eq!((orders.of("a").paused, orders.of("a").interrupts, orders.of("b")), (true, 1, Order::default()));
        orders.pause_all(true, false);
        orders.give(&a, What::Resume);
        assert_eq!((orders.of("a").paused, orders.of("b").paused, orders.of("later").paused), (false, true, true));
        orders.pause_all(true, true);
        assert_eq!((orders.of("a").paused, orders.of("a").interrupts, orders.of("b").interrupts), (true, 2, 1));
        orders.pause_all(false, false);
        orders.give(&b, What::Raise(Raised { tokens: Some(5), ..Raised::default() }));
        orders.give(&b, What::Raise(Raised { turns: Some(7), ..Raised::default() }));
        let raised: Vec<_> = orders.of("b").raised.each().collect();
        assert_eq!(raised, [(Limit::Tokens, 5.0), (Limit::Turns, 7.0)]);
        assert!(!orders.of("a").paused && !orders.of("b").paused);
        let kept = serde_json::to_string(&orders).unwrap();
        assert_eq!(serde_json::from_str::<Orders>(&kept).unwrap().checked(), orders);
        assert!(orders.keep(|run| run == "a") && !orders.keep(|run| run == "a"));
        assert!(orders.of("b").raised.is_empty());
    }
}

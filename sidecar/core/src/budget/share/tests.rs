use proptest::prelude::*;

use super::*;
use crate::budget::Purse;
use crate::limit::{SHARED, Shared};

const NOON: u64 = 1_795_392_000 + 12 * 3_600;
const KEPT: u64 = 60;
/// What an answer may cost, and nothing costs more.
const MOST: u64 = 50;

/// Agents at one book, with a budget of so many tokens in a scope.
struct Yard {
    book: Book,
    how: How,
    scope: Scope,
    cap: u64,
    now: u64,
    agents: BTreeMap<&'static str, Agent>,
}

#[derive(Default)]
struct Agent {
    tenant: &'static str,
    weight: u64,
    purse: Purse,
    spent: u64,
    asks: bool,
    works: bool,
}

impl Yard {
    fn new(how: How, scope: Scope, cap: u64) -> Yard {
        Yard { book: Book::begun(0), how, scope, cap, now: NOON, agents: BTreeMap::new() }
    }

    /// Agents of tenants that weigh so much.
    fn with(mut self, agents: &[(&'static str, &'static str, u64)]) -> Yard {
        for (run, tenant, weight) in agents {
            self.agents.insert(run, Agent { tenant, weight: *weight, ..Agent::default() });
        }
        self
    }

    fn periods(&self) -> Periods {
        let ends = Duration::from_secs(NOON + 12 * 3_600);
        Periods::new(crate::price::day(Duration::from_secs(self.now)), ends, ends)
    }

    fn say(&mut self, run: &'static str) -> Shared {
        let (periods, now) = (self.periods(), Duration::from_secs(self.now));
        let at = self.scope.shared().unwrap();
        let mut caps = [Caps::default(); SHARED];
        caps[at].tokens = Some(self.cap);
        let agent = self.agents.get_mut(run).unwrap();
        agent.purse.spent(Amount::new(Usd::ZERO, agent.spent), &periods);
        let claim = Claim {
            tenant: Some(agent.tenant).filter(|tenant| !tenant.is_empty()),
            asks: agent.asks.then_some(Amount::new(Usd::ZERO, MOST)),
            caps,
            sharing: Sharing { how: self.how, kept: Duration::from_secs(KEPT) },
            weight: agent.weight,
            works: agent.works,
            now,
            ..Claim::default()
        };
        self.book.write(run, &agent.purse, &claim, &periods)[at].unwrap()
    }

    /// Whether it is let: then it waits for an answer.
    fn asks(&mut self, run: &'static str) -> bool {
        let agent = self.agents.get_mut(run).unwrap();
        (agent.asks, agent.works) = (true, true);
        let shared = self.say(run);
        let let_in =
            shared.spent.tokens + shared.before.tokens < self.cap && shared.shares.tokens.is_none_or(|part| !part.is_over());
        if !let_in {
            self.agents.get_mut(run).unwrap().asks = false;
            self.say(run);
        }
        let_in
    }

    fn answered(&mut self, run: &'static str, cost: u64) {
        let agent = self.agents.get_mut(run).unwrap();
        agent.asks = false;
        agent.spent += cost;
        self.say(run);
    }

    /// One answer after the other, for as long as it is let.
    fn takes_all(&mut self, run: &'static str, cost: u64) -> u64 {
        let before = self.agents[run].spent;
        while self.asks(run) {
            self.answered(run, cost);
        }
        self.agents[run].spent - before
    }

    fn rests(&mut self, run: &'static str) {
        self.agents.get_mut(run).unwrap().works = false;
        self.say(run);
    }

    fn spent(&self) -> u64 {
        self.agents.values().map(|agent| agent.spent).sum()
    }
}

/// All work from the beginning; what each can take, one after the other.
fn taken(how: How, scope: Scope, agents: &[(&'static str, &'static str, u64)]) -> Vec<u64> {
    let mut yard = Yard::new(how, scope, 1_200).with(agents);
    for (run, ..) in agents {
        assert!(yard.asks(run));
        yard.answered(run, 0);
    }
    agents.iter().map(|(run, ..)| yard.takes_all(run, 10)).collect()
}

#[test]
fn each_has_its_part_while_the_others_work() {
    let agents = [("a", "", 1), ("b", "", 1), ("c", "", 1)];
    assert_eq!(taken(How::Fair, Scope::Container, &agents), [400, 400, 400]);
    assert_eq!(taken(How::Fair, Scope::ContainerDay, &agents), [400, 400, 400]);
    assert_eq!(taken(How::FirstCome, Scope::Container, &agents), [1_200, 0, 0]);
    assert_eq!(taken(How::Tenants, Scope::Container, &agents), [1_200, 0, 0], "they are one tenant's, who is nobody");
}

#[test]
fn tenants_have_what_they_weigh_and_their_agents_the_same_each() {
    let agents = [("a", "t", 2), ("b", "t", 2), ("c", "u", 1)];
    assert_eq!(taken(How::Fair, Scope::Container, &agents), [400, 400, 400]);
    assert_eq!(taken(How::Tenants, Scope::Container, &agents), [800, 0, 400]);
    assert_eq!(taken(How::Fair, Scope::Tenant, &agents), [600, 600, 1_200], "each tenant has a budget of its own");
    assert_eq!(taken(How::Tenants, Scope::TenantMonth, &agents), [1_200, 0, 1_200]);
}

#[test]
fn what_is_nobodys_any_more_is_everybodys() {
    let mut yard = Yard::new(How::Fair, Scope::Container, 1_000).with(&[("a", "", 1), ("b", "", 1)]);
    for run in ["a", "b"] {
        assert!(yard.asks(run));
        yard.answered(run, 100);
    }
    assert_eq!(yard.takes_all("a", 100), 400);
    let part = yard.say("a").shares.tokens.unwrap();
    assert_eq!((part.had, part.of, part.tenants), (500, 500, false));
    // It rests: for a while what is its own is kept.
    yard.rests("b");
    yard.now += KEPT - 1;
    assert!(!yard.asks("a"));
    yard.now += 1;
    assert_eq!(yard.say("a").shares.tokens, None, "it is the only one");
    yard.asks("a");
    yard.answered("a", 100);
    // It is back, and what is left is its own.
    assert!(yard.asks("b"));
    assert!(!yard.asks("a"));
    yard.answered("b", 100);
    yard.book.close("b");
    assert_eq!(yard.takes_all("a", 100), 200, "all but what the other has spent");
    assert_eq!(yard.spent(), 1_000);
}

#[test]
fn who_came_late_finds_its_part_of_what_is_left() {
    let mut yard = Yard::new(How::Fair, Scope::Container, 1_000).with(&[("a", "", 1), ("b", "", 1), ("c", "", 1)]);
    assert_eq!([yard.asks("a"), yard.asks("a")], [true, true]);
    yard.answered("a", 700);
    for run in ["b", "c"] {
        assert!(yard.asks(run), "{run}");
        yard.answered(run, 0);
    }
    assert!(!yard.asks("a"), "it has had twice its part");
    assert_eq!([yard.takes_all("b", 10), yard.takes_all("c", 10)], [150, 150]);
}

#[test]
fn who_is_frozen_or_has_a_clock_of_its_own_keeps_nothing_for_ever() {
    let mut yard = Yard::new(How::Fair, Scope::Container, 1_000).with(&[("a", "", 1), ("b", "", 1)]);
    assert!(yard.asks("b"));
    yard.answered("b", 0);
    yard.how = How::Fair;
    assert_eq!(yard.takes_all("a", 100), 500);
    // It says that it works, and then nothing more.
    yard.now += KEPT.max(UNHEARD);
    assert!(yard.asks("a"));
    // The clock was set back by a day: its last word is of a time to come.
    yard.now -= 86_400;
    assert!(yard.asks("a"));
}

#[test]
fn who_works_says_so_now_and_then_and_the_book_does_not_change_in_between() {
    let mut yard = Yard::new(How::Fair, Scope::Container, 1_000).with(&[("a", "", 1)]);
    assert!(yard.asks("a"));
    let before = yard.book.clone();
    yard.now += SAID - 1;
    yard.say("a");
    assert_eq!(yard.book, before);
    yard.now += 1;
    yard.say("a");
    assert_ne!(yard.book, before);
}

#[test]
fn everybody_can_see_who_has_what() {
    let mut yard = Yard::new(How::Fair, Scope::Container, 1_000).with(&[("a", "t", 3), ("b", "u", 1)]);
    assert!(yard.asks("a"));
    yard.answered("a", 50);
    assert!(yard.asks("b"));
    let standing = &yard.book.standings(&yard.periods(), Duration::from_secs(yard.now))[0];
    let shares: Vec<_> = standing.shares.iter().map(|(run, shares)| (run.as_str(), shares.tokens.unwrap())).collect();
    let part = |had, of| Part { had, of, tenants: true };
    assert_eq!(shares, [("a", part(50, 750)), ("b", part(0, 250))]);
}

#[derive(Clone, Debug)]
enum Act {
    /// Asks, or has its answer, which costs so much.
    Go(usize, u64),
    Rest(usize),
    End(usize),
    Wait(u64),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        12 => (0..8_usize, 1..=MOST).prop_map(|(who, cost)| Act::Go(who, cost)),
        1 => (0..8_usize).prop_map(Act::Rest),
        1 => (0..8_usize).prop_map(Act::End),
        1 => (0..40_u64).prop_map(Act::Wait),
    ]
}

const AGENTS: [(&str, &str, u64); 8] =
    [("0", "t", 1), ("1", "t", 1), ("2", "t", 1), ("3", "u", 2), ("4", "u", 2), ("5", "v", 3), ("6", "", 1), ("7", "", 1)];

proptest! {
    /// Whatever they do: all together are above the budget by one answer at most; and while there is money, whoever has had least of
    /// those who work, as they weigh, is not refused for its share.
    #[test]
    fn no_more_than_there_is_and_never_nobody(
        acts in proptest::collection::vec(act(), 1..150), how in 0..2_usize, cap in 100..1_500_u64,
    ) {
        let how = [How::Fair, How::Tenants][how];
        let mut yard = Yard::new(how, Scope::Container, cap).with(&AGENTS);
        for act in acts {
            match act {
                Act::Go(who, cost) => {
                    let run = AGENTS[who].0;
                    if yard.agents[run].asks {
                        yard.answered(run, cost);
                    } else {
                        yard.asks(run);
                    }
                }
                Act::Rest(who) => yard.rests(AGENTS[who].0),
                Act::End(who) => {
                    let (run, tenant, weight) = AGENTS[who];
                    let past = yard.agents[run].spent;
                    yard.book.close(run);
                    yard.agents.insert(run, Agent { tenant, weight, ..Agent::default() });
                    // What it has spent counts on.
                    yard.agents.entry("past").or_default().spent += past;
                }
                Act::Wait(seconds) => yard.now += seconds,
            }
            let spent = yard.spent();
            prop_assert!(spent < cap + MOST, "{spent} of {cap}");
            // Nobody waits for an answer: what they have is what they have had.
            if spent < cap && yard.agents.values().all(|agent| !agent.asks) {
                let (kept, now) = (Duration::from_secs(KEPT), Duration::from_secs(yard.now));
                let claims = |run: &str| yard.book.runs.get(run).is_some_and(|entry| entry.claims(kept, now));
                let works: Vec<_> = AGENTS.iter().map(|(run, ..)| *run).filter(|run| claims(run)).collect();
                let parts: Vec<_> = works.iter().map(|run| yard.say(run).shares.tokens).collect();
                prop_assert!(
                    works.is_empty() || parts.iter().any(|part| part.is_none_or(|part| !part.is_over())),
                    "{} of {cap}: {parts:?}", spent
                );
            }
        }
    }

    /// Of those who work all the time and take what they can, in any order and all at once, each ends with its part, but for an
    /// answer of each of the others'.
    #[test]
    fn in_the_end_each_has_had_its_part(order in proptest::collection::vec((0..5_usize, 1..=MOST), 600), cap in 1_000..4_000_u64) {
        const WEIGHTS: [u64; 5] = [1, 2, 3, 1, 5];
        let runs = ["0", "1", "2", "3", "4"];
        let mut yard = Yard::new(How::Fair, Scope::ContainerDay, cap);
        for (run, weight) in runs.iter().zip(WEIGHTS) {
            yard.agents.insert(run, Agent { tenant: run, weight, works: true, ..Agent::default() });
            yard.say(run);
        }
        for (who, cost) in order {
            let run = runs[who];
            if yard.agents[run].asks { yard.answered(run, cost) } else { yard.asks(run); }
        }
        for run in runs {
            if yard.agents[run].asks { yard.answered(run, 1) }
        }
        // The slow have what is left, and it is theirs.
        for run in runs {
            yard.takes_all(run, 7);
        }
        prop_assert!((cap..cap + MOST).contains(&yard.spent()));
        for (run, weight) in runs.iter().zip(WEIGHTS) {
            let (had, part) = (yard.agents[run].spent, cap * weight / 12);
            prop_assert!(had + 5 * MOST >= part && had < part + MOST + 1, "{run}: {had} of {part}");
        }
    }

    /// What is one's own, by hand: the level at which all that is left is used, found by trying.
    #[test]
    fn nobody_has_more_while_somebody_could_have_had_it(all in proptest::collection::vec((0..500_u64, 1..6_u64, any::<bool>()), 1..9), pot in 0..3_000_u64) {
        let all: Vec<Claimant> = all.into_iter().map(|(had, weight, works)| Claimant { had, weight, works }).collect();
        let works: Vec<&Claimant> = all.iter().filter(|one| one.works).collect();
        let idle: u64 = all.iter().filter(|one| !one.works).map(|one| one.had).sum();
        let had: u64 = works.iter().map(|one| one.had).sum();
        prop_assume!(idle + had < pot && !works.is_empty());
        let ends: u64 = works.iter().map(|one| one.of(pot, all.iter()).max(one.had)).sum();
        prop_assert!((pot - idle..pot - idle + works.len() as u64).contains(&ends), "all of it is somebody's: {ends} of {}", pot - idle);
        let under: Vec<_> = works.iter().filter(|one| one.had < one.of(pot, all.iter())).collect();
        prop_assert!(!under.is_empty());
        for one in &under {
            for other in &under {
                let (own, others) = (one.of(pot, all.iter()), other.of(pot, all.iter()));
                prop_assert!(own.abs_diff(others * one.weight / other.weight) <= one.weight + 1, "{own} {others}: by weight alone");
            }
        }
    }
}

//! Who is next, where several wait for one of a few seats.
//!
//! Of each tenant it is counted how many seats it was given, each worth less the more the tenant weighs. The next free seat is for the
//! tenant with the lowest count, and of those who wait for it for whoever came first. Whoever comes anew, or back, begins no lower than
//! whoever was served last, so that nobody can save up.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Of another version is not read.
pub const VERSION: u32 = 1;
/// What a seat counts for who weighs one; what it counts for others is a whole number up to weights of a million or so.
const SEAT: u64 = 1 << 20;

/// Somebody who waits, or sits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Place {
    tenant: String,
    weight: u64,
    /// Who came first; nothing for who sits.
    number: Option<u64>,
}

/// See the module's head.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Queue {
    version: u32,
    number: u64,
    places: BTreeMap<String, Place>,
    /// What each tenant was given.
    given: BTreeMap<String, u64>,
    /// What the tenant had been given that was served last.
    now: u64,
}

impl Queue {
    /// An empty one instead of one that cannot be understood.
    pub fn checked(self) -> Queue {
        if self.version == VERSION { self } else { Queue { version: VERSION, ..Queue::default() } }
    }

    pub fn runs(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Somebody waits from now on; said again, it keeps its place.
    pub fn join(&mut self, run: &str, tenant: &str, weight: u64) {
        if self.places.contains_key(run) {
            return;
        }
        if !self.places.values().any(|place| place.tenant == tenant && place.number.is_some()) {
            let given = self.given.entry(tenant.to_owned()).or_default();
            *given = self.now.max(*given);
        }
        self.number = self.number.saturating_add(1);
        let place = Place { tenant: tenant.to_owned(), weight: weight.max(1), number: Some(self.number) };
        self.places.insert(run.to_owned(), place);
    }

    /// Whether there is a seat for this one, of so many: then it sits from now on. Those who do not ask for theirs are passed over, and
    /// keep their places.
    pub fn sit(&mut self, run: &str, seats: u64, asks: impl Fn(&str) -> bool) -> bool {
        let taken = self.places.values().filter(|place| place.number.is_none()).count() as u64;
        let waits = self.places.iter().filter_map(|(run, place)| Some((run, place, place.number?))).filter(|(run, ..)| asks(run));
        let given = |place: &Place| self.given.get(&place.tenant).copied().unwrap_or_default();
        let mut waits: Vec<_> = waits.map(|(run, place, number)| (given(place), number, run.clone())).collect();
        waits.sort();
        let Some((_, _, next)) = waits.first().filter(|_| taken < seats).cloned() else { return false };
        if next != run {
            return false;
        }
        let Some(place) = self.places.get_mut(run) else { return false };
        place.number = None;
        let given = self.given.entry(place.tenant.clone()).or_default();
        self.now = *given;
        *given = given.saturating_add(SEAT / place.weight);
        true
    }

    /// Somebody who sits works for another than was thought. Where it was taken from stays as it is; to the other it counts as given.
    /// But not while one of its own waits, and never for more than a seat above whoever was served last: else those who wait could be
    /// kept from a seat for ever.
    pub fn learn(&mut self, run: &str, tenant: &str, weight: u64) {
        let waits = self.places.values().any(|place| place.tenant == tenant && place.number.is_some());
        let Some(place) = self.places.get_mut(run).filter(|place| place.number.is_none() && place.tenant != tenant) else {
            return;
        };
        tenant.clone_into(&mut place.tenant);
        place.weight = weight.max(1);
        if !waits {
            let most = self.now.saturating_add(SEAT);
            let given = self.given.entry(tenant.to_owned()).or_default();
            *given = (*given).max(self.now).saturating_add(SEAT / place.weight).min(most).max(*given);
        }
    }

    /// Those who are gone, from the line or from their seats.
    pub fn keep(&mut self, lives: impl Fn(&str) -> bool) {
        self.places.retain(|run, _| lives(run));
        let here: BTreeSet<&String> = self.places.values().map(|place| &place.tenant).collect();
        // Of the others it matters only who would begin above the rest.
        self.given.retain(|tenant, given| here.contains(tenant) || *given > self.now);
    }

    pub fn leave(&mut self, run: &str) {
        self.keep(|one| one != run);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Who sits down, one after the other, when `seats` are free.
    fn seated(queue: &mut Queue, seats: u64) -> Vec<String> {
        let mut seated = Vec::new();
        loop {
            let runs: Vec<String> = queue.runs().map(str::to_owned).collect();
            match runs.into_iter().find(|run| queue.sit(run, seats, |_| true)) {
                Some(run) => seated.push(run),
                None => return seated,
            }
        }
    }

    #[test]
    fn who_came_first_is_first_and_tenants_take_turns() {
        let mut queue = Queue::default().checked();
        for (run, tenant) in [("z", "a"), ("y", "a"), ("x", "a"), ("w", "b"), ("v", "b")] {
            queue.join(run, tenant, 1);
        }
        queue.join("z", "a", 1);
        assert_eq!(seated(&mut queue, 3), ["z", "w", "y"]);
        queue.leave("w");
        assert_eq!(seated(&mut queue, 3), ["v"], "two were given to the one, and one to the other");
        queue.join("u", "b", 1);
        assert!(!queue.sit("u", 4, |_| true), "two were given to both, and the other one came first");
        assert!(queue.sit("u", 4, |run| run != "x"), "and is frozen");
        let kept = serde_json::to_string(&queue).unwrap();
        assert_eq!(serde_json::from_str::<Queue>(&kept).unwrap().checked(), queue);
    }

    #[test]
    fn who_weighs_twice_as_much_gets_twice_as_many() {
        let mut queue = Queue::default().checked();
        for n in 0..30 {
            queue.join(&format!("a{n}"), "a", 2);
            queue.join(&format!("b{n}"), "b", 1);
        }
        let seated = seated(&mut queue, 30);
        assert_eq!(seated.iter().filter(|run| run.starts_with('a')).count(), 20);
    }

    #[test]
    fn a_seat_is_its_tenants_once_that_is_known() {
        let mut queue = Queue::default().checked();
        queue.join("first", "", 1);
        assert_eq!(seated(&mut queue, 1), ["first"]);
        queue.learn("first", "acme", 1);
        queue.join("acme's", "acme", 1);
        queue.join("other", "other", 1);
        queue.leave("first");
        assert_eq!(seated(&mut queue, 1), ["other"], "the one had its seat");
        queue.leave("other");
        assert_eq!(seated(&mut queue, 1), ["acme's"]);
    }

    #[derive(Clone, Debug)]
    enum Act {
        Join(usize),
        Leave(usize),
        /// All who wait ask, from this one on.
        Ask(usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![(0..40_usize).prop_map(Act::Join), (0..40_usize).prop_map(Act::Leave), (0..40_usize).prop_map(Act::Ask)]
    }

    proptest! {
        /// No seat stays free while somebody waits who asks, none is given twice, and of a tenant nobody overtakes.
        #[test]
        fn all_seats_are_used_and_none_twice(acts in proptest::collection::vec(act(), 1..300), seats in 1..5_u64) {
            let mut queue = Queue::default().checked();
            let tenant = |n: usize| (n % 4).to_string();
            let mut line: Vec<usize> = Vec::new();
            let mut sitting: Vec<usize> = Vec::new();
            for act in acts {
                match act {
                    Act::Join(n) if !line.contains(&n) && !sitting.contains(&n) => {
                        queue.join(&n.to_string(), &tenant(n), 1 + n as u64 % 3);
                        line.push(n);
                    }
                    Act::Join(_) => {}
                    Act::Leave(n) => {
                        queue.leave(&n.to_string());
                        line.retain(|one| *one != n);
                        sitting.retain(|one| *one != n);
                    }
                    Act::Ask(from) => {
                        loop {
                            let asks: Vec<usize> = line.clone();
                            let next = (0..asks.len()).map(|i| asks[(i + from) % asks.len()]).find(|n| queue.sit(&n.to_string(), seats, |_| true));
                            let Some(next) = next else { break };
                            let first = line.iter().find(|n| tenant(**n) == tenant(next));
                            prop_assert_eq!(first, Some(&next), "somebody of the same tenant came before");
                            line.retain(|one| *one != next);
                            sitting.push(next);
                        }
                        prop_assert!(line.is_empty() || sitting.len() as u64 == seats);
                    }
                }
                prop_assert!(sitting.len() as u64 <= seats);
            }
        }

        /// Whatever others do, whoever waits is served after so many seats as there are others before it, and one for each tenant and
        /// weight.
        #[test]
        fn nobody_starves(others in proptest::collection::vec(0..5_usize, 100), weights in proptest::collection::vec(1..4_u64, 6)) {
            let mut queue = Queue::default().checked();
            for n in 0..3 {
                queue.join(&format!("before{n}"), "5", weights[5]);
            }
            queue.join("mine", "5", weights[5]);
            let mut given = 0;
            for (n, tenant) in others.iter().enumerate() {
                // Those who come and go all the time, each for one seat.
                let run = format!("other{n}");
                queue.join(&run, &tenant.to_string(), weights[*tenant]);
                let seated = seated(&mut queue, 1);
                given += seated.len();
                // Some turn out to be of the tenant that waits.
                seated.iter().filter(|_| n % 2 == 0).for_each(|run| queue.learn(run, "5", weights[5]));
                if seated.contains(&String::from("mine")) {
                    break;
                }
                seated.iter().for_each(|run| queue.leave(run));
            }
            // Four of its own; and for each of them each other tenant is served as often as it weighs more, and once.
            prop_assert!(given <= 4 + 5 * 4 * (3 + 1), "{given}");
            prop_assert!(queue.places.get("mine").is_none_or(|place| place.number.is_none()));
        }
    }
}

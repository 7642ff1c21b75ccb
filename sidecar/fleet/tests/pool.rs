//! Containers made ahead: whatever happens, no container is two sessions', and none is left.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed; helpers are tests, too")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use agent_fleet::lifecycle::Phase;
use agent_fleet::plan::{self, Action, Outcome, Policy, Seen, Step};
use agent_fleet::pool::{self, Ahead, Pool, Refill};
use agent_fleet::provider::{Error, Price, Sandbox, Size, Spec, State};
use agent_fleet::session::{Pattern, Report, Session, SessionId, Wanted};
use jiff::Timestamp;
use proptest::prelude::*;

fn price() -> Price {
    Price { running: 3600.0, paused: 0.0, stopped: 0.0, source: String::from("a test: a dollar a second") }
}

fn spec() -> Spec {
    let (env, secrets, labels) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let (key, image) = (String::new(), String::from("i"));
    let ttl = Duration::from_secs(3600);
    Spec {
        key,
        image,
        command: vec![],
        env,
        secrets,
        size: Size::default(),
        ports: vec![],
        labels,
        ttl,
        idle: None,
        avoid: vec![],
    }
}

fn start() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn ahead(size: usize) -> Ahead {
    let pool = Pool { size, max_age: Duration::from_secs(600), per_minute: 20 };
    let (template, provider) = (String::from("t"), String::from("p"));
    Ahead { template, pool, provider, pattern: Pattern::LongRunning, spec: spec() }
}

/// What is kept, as a store keeps it: by versions. Two fleets read it at different times, and write what they have read.
struct World {
    now: Timestamp,
    kept: BTreeMap<SessionId, Session>,
    /// What each fleet believes: it may be old.
    read: [BTreeMap<SessionId, Session>; 2],
    seen: BTreeMap<SessionId, Seen>,
    /// By key: what they do.
    containers: BTreeMap<String, State>,
    created: BTreeMap<String, u32>,
    refills: [Refill; 2],
    fate: Vec<u8>,
    asked: usize,
    given: usize,
}

impl World {
    fn new(fate: Vec<u8>) -> Self {
        World {
            now: start(),
            kept: BTreeMap::new(),
            read: [BTreeMap::new(), BTreeMap::new()],
            seen: BTreeMap::new(),
            containers: BTreeMap::new(),
            created: BTreeMap::new(),
            refills: [Refill::default(), Refill::default()],
            fate,
            asked: 0,
            given: 0,
        }
    }

    fn happens(&mut self) -> u8 {
        self.fate.pop().unwrap_or(255)
    }

    fn insert(&mut self, session: Session) {
        self.kept.entry(session.id.clone()).or_insert(session);
    }

    /// Written if it is the version that was read.
    fn update(&mut self, session: &Session) -> bool {
        let right = self.kept[&session.id].version == session.version;
        if right {
            self.kept.insert(session.id.clone(), Session { version: session.version + 1, ..session.clone() });
        }
        right
    }

    fn update_both(&mut self, one: &Session, other: &Session) -> bool {
        let right = [one, other].iter().all(|session| self.kept[&session.id].version == session.version);
        right && self.update(one) && self.update(other)
    }

    /// Who has what, by the store: never two the same.
    fn check(&self) {
        let mut holders: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for session in self.kept.values().filter(|session| session.holds) {
            holders.entry(session.key()).or_default().push(session.id.to_string());
        }
        for (key, of) in &holders {
            assert!(of.len() == 1, "{key} is {of:?}'s");
        }
        for (key, state) in &self.containers {
            assert!(state.is_gone() || holders.contains_key(key), "nobody has {key}");
        }
        assert!(self.created.values().all(|times| *times == 1), "{:?}", self.created);
    }

    fn find(&self, session: &Session) -> Sandbox {
        let key = session.key();
        let state = self.containers.get(&key).cloned().unwrap_or(State::Missing);
        let (native, key, exit_code) = (key.clone(), Some(key), (state == State::Stopped).then_some(0));
        let labels = BTreeMap::new();
        Sandbox {
            key,
            native,
            state,
            reason: None,
            exit_code,
            size: None,
            created: None,
            deadline: None,
            labels,
            node: None,
            disrupted: None,
        }
    }

    fn perform(&mut self, action: &Action, session: &Session) -> Outcome {
        let key = session.key();
        match action {
            Action::Create => {
                if !self.containers.contains_key(&key) {
                    *self.created.entry(key.clone()).or_default() += 1;
                    self.containers.insert(key, State::Running);
                }
                return Outcome::Made(Box::new(self.find(session)));
            }
            Action::Ask => return Outcome::Answered(true),
            Action::Delete => drop(self.containers.remove(&key)),
            Action::Stop => self.containers.get_mut(&key).into_iter().for_each(|state| *state = State::Stopped),
            _ => {}
        }
        Outcome::Done
    }

    /// One step of one session by one fleet, from what that fleet has read of it.
    fn step(&mut self, fleet: usize, id: &SessionId) {
        let stale = self.happens() < 60;
        let read = self.read[fleet].get(id).filter(|_| stale).cloned();
        let session = read.unwrap_or_else(|| self.kept[id].clone());
        self.read[fleet].insert(id.clone(), session.clone());
        let policy = Policy { settle: Duration::ZERO, tries: 3, ..Policy::default() };
        match plan::next(&session, self.seen.get(id), &policy, self.now) {
            Step::Wait(_) => {}
            Step::Enter(phase, why) => {
                let mut entered = session;
                plan::enter_phase(&mut entered, phase, why, &price(), self.now);
                self.update(&entered);
            }
            Step::Do(Action::Create) if pool::may_take(&session) && self.take(fleet, &session) => {}
            Step::Do(action) => {
                let mut about = session.clone();
                if plan::about_to(&mut about, &action, self.now) && !self.update(&about) {
                    return;
                }
                let about = self.kept[id].clone();
                // Another fleet may have gone on meanwhile: only who drives it does anything.
                if about.phase != session.phase
                    || about.native != session.native
                    || about.holds != session.holds && action != Action::Create
                {
                    return;
                }
                let fault = self.happens();
                let failed = |what: &str| Outcome::Failed(Error::Unsure { provider: "test", what: what.to_owned() });
                let outcome = match fault {
                    0..15 => failed("not done"),
                    15..30 => {
                        self.perform(&action, &about);
                        failed("done")
                    }
                    30..45 => {
                        self.perform(&action, &about);
                        self.seen.remove(id);
                        return;
                    }
                    _ => self.perform(&action, &about),
                };
                let (mut kept, looked) = (self.kept[id].clone(), action == Action::Look);
                if looked && matches!(outcome, Outcome::Done) {
                    let sandbox = self.find(&about);
                    plan::saw(&mut kept, &sandbox, &policy, &price(), self.now);
                    self.seen.insert(id.clone(), Seen { sandbox, at: self.now });
                } else {
                    self.seen.remove(id);
                }
                if kept.phase == about.phase {
                    plan::record(&mut kept, &action, &outcome, &policy, &price(), self.now);
                }
                self.update(&kept);
            }
        }
    }

    /// Takes what a fleet believes to be there: it may be another's by now.
    fn take(&mut self, fleet: usize, session: &Session) -> bool {
        let kind = pool::kind(&session.provider, &session.spec);
        let now = self.now;
        let known = self.kept.iter().map(|(id, kept)| self.read[fleet].get(id).unwrap_or(kept));
        let fits = known.filter(|spare| spare.spare() == Some(&kind) && pool::may_give(spare, now));
        for mut spare in fits.cloned().collect::<Vec<_>>() {
            let mut with = session.clone();
            pool::hand_over(&mut spare, &mut with, &price(), self.now);
            if self.update_both(&with, &spare) {
                self.given += 1;
                // The answer may be lost: then it is read again.
                return true;
            }
            self.read[fleet].remove(&spare.id);
            if self.kept[&session.id].version != session.version {
                return true;
            }
        }
        false
    }

    fn refill(&mut self, fleet: usize, of: &Ahead) {
        let now = self.now;
        for id in self.refills[fleet].making().cloned().collect::<Vec<_>>() {
            let spare = self.kept.get(&id).cloned();
            self.refills[fleet].saw(&id, spare.as_ref(), now);
        }
        let stock: Vec<Session> = self.kept.values().filter(|session| session.pool.is_some()).cloned().collect();
        let made = stock.len();
        for step in self.refills[fleet].next(&of.pool, &stock, now) {
            match step {
                pool::Step::Make => {
                    let mut spare = of.spare(now);
                    spare.id = format!("spare-{fleet}-{made}-{}", self.kept.len()).parse().unwrap();
                    self.refills[fleet].asked(&spare.id, now);
                    self.insert(spare);
                }
                pool::Step::Discard(id, _) => self.want_gone(&id),
            }
        }
    }

    fn want_gone(&mut self, id: &SessionId) {
        let session = self.kept.get_mut(id).unwrap();
        if !session.phase.is_last() {
            session.wanted = Wanted::Gone;
            session.version += 1;
        }
    }

    fn ask(&mut self) {
        let id = format!("s{}", self.asked).parse().unwrap();
        self.asked += 1;
        let session = Session::new(id, ("t", "o"), Pattern::LongRunning, "p", spec(), self.now);
        self.insert(session);
    }

    fn ids(&self) -> Vec<SessionId> {
        self.kept.values().filter(|session| !session.is_over()).map(|session| session.id.clone()).collect()
    }
}

/// In all cases: a property over nothing given away would say nothing.
static GIVEN: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 300, failure_persistence: None, ..ProptestConfig::default() })]
    fn whatever_happens(fate in prop::collection::vec(any::<u8>(), 200..1500)) {
        let mut world = World::new(fate);
        let of = ahead(3);
        while !world.fate.is_empty() {
            match world.happens() {
                0..12 => world.ask(),
                12..40 => {
                    let fleet = usize::from(world.happens() % 2);
                    world.refill(fleet, &of);
                }
                40..44 => world.now += Duration::from_secs(45),
                44..48 => {
                    let n = usize::from(world.happens());
                    let ids = world.ids();
                    if !ids.is_empty() {
                        world.want_gone(&ids[n % ids.len()]);
                    }
                }
                // A container ends by itself.
                48..52 => {
                    let n = usize::from(world.happens());
                    let keys: Vec<String> = world.containers.keys().cloned().collect();
                    if !keys.is_empty() {
                        world.containers.insert(keys[n % keys.len()].clone(), State::Stopped);
                    }
                }
                n => {
                    let ids = world.ids();
                    if !ids.is_empty() {
                        let at = usize::from(world.happens()) % ids.len();
                        for _ in 0..=n % 8 {
                            world.step(usize::from(n % 2), &ids[at]);
                            world.check();
                        }
                        world.now += Duration::from_millis(200);
                    }
                }
            }
            world.check();
        }
        // All is to end: nothing is made ahead any more.
        for id in world.ids() {
            world.want_gone(&id);
        }
        for _ in 0..1000 {
            world.read = Default::default();
            for id in world.ids() {
                // What is seen is soon old: a look, and what follows from it.
                (0..6).for_each(|_| world.step(0, &id));
                world.check();
            }
            world.now += Duration::from_secs(1);
            if world.ids().is_empty() {
                break;
            }
        }
        let left: Vec<&Session> = world.kept.values().filter(|session| !session.is_over()).collect();
        prop_assert!(left.is_empty(), "{left:#?}");
        prop_assert!(world.containers.is_empty(), "{:?}", world.containers);
        GIVEN.fetch_add(world.given, std::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn no_container_is_two_sessions_and_none_is_left() {
    whatever_happens();
    let given = GIVEN.load(std::sync::atomic::Ordering::Relaxed);
    assert!(given > 64, "{given} were given away");
}

/// A spare that waits, made then.
fn waiting(id: &str, of: &Ahead, made: Timestamp) -> Session {
    let mut spare = Session { id: id.parse().unwrap(), ..of.spare(made) };
    (spare.phase, spare.holds, spare.native, spare.made) = (Phase::Ready, true, Some(String::from("c")), Some(made));
    spare.metered_since = Some(made);
    spare
}

#[test]
fn what_it_costs_until_it_is_taken_is_nobodys_and_nothing_is_counted_twice() {
    let of = ahead(1);
    let mut spare = waiting("spare", &of, start());
    let mut session = Session::new("s".parse().unwrap(), ("t", "o"), Pattern::LongRunning, "p", spec(), start());
    session.phase = Phase::Creating;
    let at = |seconds| start() + Duration::from_secs(seconds);
    pool::hand_over(&mut spare, &mut session, &price(), at(60));
    plan::meter(&mut spare, &price(), at(100));
    plan::meter(&mut session, &price(), at(100));
    assert_eq!((spare.container_usd, session.container_usd), (60.0, 40.0));
    assert_eq!(session.made, Some(start()), "its life is the container's");
    assert_eq!((spare.holds, session.holds, spare.phase), (false, true, Phase::Stopped));
    assert_eq!(spare.given, Some(session.id.clone()));
    assert_ne!(spare.key(), agent_fleet::session::container_key("town", &session.id, 1));
    assert_eq!(spare.key(), session.key(), "by the name that it was made with");
}

#[test]
fn only_what_is_made_of_the_same_fits() {
    let same = pool::kind("p", &spec());
    let mut whose = spec();
    whose.key = String::from("k");
    whose.labels.extend([("agent-fleet.tenant", "t"), ("agent-fleet.session", "s")].map(|(a, b)| (a.to_owned(), b.to_owned())));
    whose.env.insert(String::from("TRACEPARENT"), String::from("00-1-2-01"));
    assert_eq!(pool::kind("p", &whose), same, "whose it is does not matter");
    let mut others: BTreeSet<String> = BTreeSet::from([same.clone(), pool::kind("q", &spec())]);
    let of = |change: fn(&mut Spec)| {
        let mut spec = spec();
        change(&mut spec);
        pool::kind("p", &spec)
    };
    others.insert(of(|spec| spec.image = String::from("j")));
    others.insert(of(|spec| spec.ttl = Duration::from_secs(1)));
    others.insert(of(|spec| drop(spec.env.insert(String::from("A"), String::from("b")))));
    others.insert(of(|spec| drop(spec.labels.insert(String::from("team"), String::from("b")))));
    assert_eq!(others.len(), 6, "each is another");
}

#[test]
fn what_works_has_worked_or_is_too_old_is_not_given_away() {
    let of = ahead(1);
    let spare = waiting("spare", &of, start());
    let now = start() + Duration::from_secs(10);
    assert!(pool::may_give(&spare, now));
    let report = |cost_usd, busy_until| Some(Report { at: now, busy_until, cost_usd, conversation: None, memory_bytes: None });
    let not = [
        Session { report: report(0.0, Some(now + Duration::from_secs(30))), ..spare.clone() },
        Session { report: report(0.1, None), ..spare.clone() },
        Session { wanted: Wanted::Gone, ..spare.clone() },
        Session { phase: Phase::Starting, ..spare.clone() },
        Session { given: Some("s".parse().unwrap()), ..spare.clone() },
    ];
    for spare in &not {
        assert!(!pool::may_give(spare, now), "{spare:?}");
    }
    assert!(!pool::may_give(&spare, start() + of.pool.max_age));
    assert!(pool::may_give(&Session { report: report(0.0, None), ..spare }, now));
}

#[test]
fn a_pool_is_filled_within_its_bounds_and_old_ones_are_replaced_before_they_go() {
    let of = Ahead { pool: Pool { size: 5, max_age: Duration::from_secs(600), per_minute: 3 }, ..ahead(5) };
    let mut refill = Refill::default();
    let count = |steps: &[pool::Step]| steps.iter().filter(|step| **step == pool::Step::Make).count();
    assert_eq!(count(&refill.next(&of.pool, &[], start())), 3, "in a minute");
    for n in 0..3 {
        refill.asked(&format!("s{n}").parse().unwrap(), start());
    }
    let three: Vec<Session> = (0..3).map(|n| waiting(&format!("s{n}"), &of, start())).collect();
    assert_eq!(count(&refill.next(&of.pool, &three, start() + Duration::from_secs(59))), 0);
    assert_eq!(count(&refill.next(&of.pool, &three, start() + Duration::from_secs(60))), 2);
    // When nine tenths of their time are over they do not count.
    assert_eq!(count(&refill.next(&of.pool, &three, start() + Duration::from_secs(541))), 3);
    // One too many, as two fleets may make it: the one that is not up yet.
    let mut six: Vec<Session> = (0..6).map(|n| waiting(&format!("s{n}"), &of, start())).collect();
    six[4].phase = Phase::Creating;
    let steps = refill.next(&of.pool, &six, start());
    assert_eq!(steps, [pool::Step::Discard("s4".parse().unwrap(), "there are enough")]);
}

#[test]
fn a_provider_that_fails_is_asked_ever_less_often() {
    let of = ahead(5);
    let mut refill = Refill::default();
    let mut now = start();
    let mut asked = Vec::new();
    while asked.len() < 5 {
        for step in refill.next(&of.pool, &[], now) {
            assert_eq!(step, pool::Step::Make);
            let spare = Session { id: format!("s{}", asked.len()).parse().unwrap(), phase: Phase::Failed, ..of.spare(now) };
            refill.asked(&spare.id, now);
            refill.saw(&spare.id, Some(&spare), now);
            asked.push(now.duration_since(start()).as_secs());
            if refill.making().count() == 0 && asked.len() > 1 {
                break;
            }
        }
        now += Duration::from_secs(1);
        assert!(now < start() + Duration::from_secs(500), "{asked:?}");
    }
    assert!(asked[4] - asked[1] > 20, "{asked:?}");
    let up = waiting("s9", &of, now);
    refill.asked(&up.id, now);
    refill.saw(&up.id, Some(&up), now);
    let later = now + Duration::from_secs(60);
    assert_eq!(refill.next(&of.pool, std::slice::from_ref(&up), later).len(), 0, "it has come up, and may end yet");
    refill.saw(&up.id, Some(&up), later);
    assert_eq!(refill.next(&of.pool, &[up], later).len(), 4, "it works again");
}

/// What `end` makes of one that is up, five seconds after it was asked for: how many are made in an hour.
fn made_in_an_hour(end: impl Fn(&mut Session)) -> usize {
    let of = ahead(5);
    let mut refill = Refill::default();
    let mut stock: Vec<Session> = vec![];
    let mut made = 0;
    for second in (0..3600).step_by(2) {
        let now = start() + Duration::from_secs(second);
        for spare in &mut stock {
            let age = now.duration_since(spare.created).as_secs();
            (spare.phase, spare.holds) = (Phase::Ready, true);
            if age >= 5 {
                end(spare);
            }
            refill.saw(&spare.id, Some(spare), now);
        }
        stock.retain(|spare| spare.phase == Phase::Ready && spare.pool.is_some());
        for _ in refill.next(&of.pool, &stock, now) {
            let spare = Session { id: format!("s{made}").parse().unwrap(), ..of.spare(now) };
            refill.asked(&spare.id, now);
            stock.push(spare);
            made += 1;
        }
    }
    made
}

#[test]
fn what_comes_up_and_ends_at_once_is_made_ever_less_often() {
    let lost = |phase| move |spare: &mut Session| spare.phase = phase;
    for phase in [Phase::Failed, Phase::Destroyed, Phase::Paused] {
        let made = made_in_an_hour(lost(phase));
        assert!((5..20).contains(&made), "{phase}: {made}");
    }
    // Whose container ends as soon as he has it is no better off.
    let given = |phase| {
        move |spare: &mut Session| {
            (spare.pool, spare.tenant, spare.phase) = (None, String::from("t"), phase);
        }
    };
    let made = made_in_an_hour(given(Phase::Failed));
    assert!((5..20).contains(&made), "{made}");
    // Of five that are always taken, used up and made anew, as many as may be.
    for phase in [Phase::Destroyed, Phase::Paused] {
        let made = made_in_an_hour(given(phase));
        assert!(made > 1000, "{phase}: {made}");
    }
    assert_eq!(made_in_an_hour(|_| {}), 35, "those that live are made again when they are old: seven times in an hour");
}

#[test]
fn what_is_discarded_or_too_old_has_not_failed() {
    let of = ahead(1);
    for gone in [
        Session { wanted: Wanted::Gone, phase: Phase::Stopping, ..waiting("s", &of, start()) },
        Session { ends: start(), phase: Phase::Stopping, ..waiting("s", &of, start()) },
    ] {
        let mut refill = Refill::default();
        refill.asked(&gone.id, start());
        assert_eq!(refill.saw(&gone.id, Some(&gone), start()), None);
        assert_eq!((refill.making().count(), refill.next(&of.pool, &[], start()).len()), (0, 1));
    }
}

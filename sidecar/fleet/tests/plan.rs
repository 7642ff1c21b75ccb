//! The plan against a world that fails: whatever happens, a session ends, nothing of it is left, and there are never two containers of it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed; helpers are tests, too")]

use std::collections::BTreeMap;
use std::time::Duration;

use agent_fleet::lifecycle::Phase;
use agent_fleet::place::{Place, Places, Share};
use agent_fleet::plan::{Action, Outcome, PauseBy, Policy, Seen, Step, about_to, enter_phase, heard, next, orphans, record, saw};
use agent_fleet::provider::{Error, KEY_LABEL, Price, SESSION_LABEL, Sandbox, Size, Spec, State};
use agent_fleet::session::{Pattern, Report, Session, Wanted};
use jiff::Timestamp;
use proptest::prelude::*;

fn price() -> Price {
    Price { running: 0.05, paused: 0.0, stopped: 0.01, source: String::from("a test") }
}

fn spec() -> Spec {
    Spec {
        key: String::new(),
        image: String::from("i"),
        command: vec![],
        env: BTreeMap::new(),
        secrets: BTreeMap::new(),
        size: Size::default(),
        ports: vec![],
        labels: BTreeMap::new(),
        ttl: Duration::from_secs(3600),
        idle: None,
        avoid: vec![],
    }
}

const TAKEN: &str = "the cluster takes its pod away";

fn start() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn session(pattern: Pattern) -> Session {
    Session::new("s".parse().unwrap(), ("t", "o"), pattern, "p", spec(), start())
}

fn report(at: Timestamp, busy_until: Option<Timestamp>) -> Report {
    Report { at, busy_until, cost_usd: 0.5, conversation: None, memory_bytes: None }
}

/// A provider with containers, a clock, and a fleet that keeps one session.
struct World {
    now: Timestamp,
    kept: Session,
    seen: Option<Seen>,
    policy: Policy,
    /// By key: what they do, and since when they can be found.
    containers: BTreeMap<String, (State, Timestamp)>,
    /// By key: those that somebody takes away, and when they are gone.
    leaving: BTreeMap<String, Timestamp>,
    /// By key: those that we have removed, and when they are gone.
    removed: BTreeMap<String, Timestamp>,
    /// How long that takes.
    removal: Duration,
    most: usize,
    /// What else happens, one for each moment that something could: none when it is used up.
    fate: Vec<u8>,
    ready: bool,
    lag: Duration,
    trail: Vec<Phase>,
    hooked: Vec<(u32, Phase)>,
    /// How often what was put away was brought into one.
    brought: usize,
}

impl World {
    fn new(pattern: Pattern, pause_by: PauseBy, fate: Vec<u8>, lag: Duration) -> Self {
        let mut policy = Policy {
            idle_after: Some(Duration::from_secs(60)),
            keep_alive: Some(Duration::from_secs(300)),
            pause_by,
            ..Policy::default()
        };
        let mut kept = session(pattern);
        if pattern == Pattern::Shared && pause_by == PauseBy::Archive {
            kept.place = Some(Place::of(&kept, Share { sessions_per_container: 2, containers: None }));
        }
        policy.shared(&kept);
        // A place is known to be there at once.
        let lag = if kept.place.is_some() { Duration::ZERO } else { lag };
        let (containers, leaving, removed, trail) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new(), vec![Phase::Requested]);
        World {
            now: start(),
            kept,
            seen: None,
            policy,
            containers,
            leaving,
            removed,
            removal: lag / 100,
            most: 0,
            fate,
            ready: true,
            lag,
            trail,
            hooked: vec![],
            brought: 0,
        }
    }

    fn happens(&mut self) -> u8 {
        self.fate.pop().unwrap_or(255)
    }

    fn alive(&self) -> usize {
        self.containers.values().filter(|(state, _)| !state.is_gone()).count()
    }

    fn find(&self) -> Sandbox {
        let key = self.kept.key();
        let known = self.containers.get(&key).filter(|(_, from)| *from <= self.now);
        Sandbox {
            key: Some(key.clone()),
            native: format!("native-{key}"),
            state: known.map_or(State::Missing, |(state, _)| state.clone()),
            reason: None,
            exit_code: known.and_then(|(state, _)| (*state == State::Stopped).then_some(0)),
            size: None,
            created: None,
            deadline: None,
            labels: BTreeMap::new(),
            node: known.and(Some(String::from("n"))),
            disrupted: self.leaving.contains_key(&key).then(|| String::from(TAKEN)),
        }
    }

    fn take_away(&mut self, within: Duration) {
        let key = self.kept.key();
        if let Some(found) = self.containers.get_mut(&key) {
            found.0 = State::Stopping;
            self.leaving.insert(key, self.now + within);
        }
    }

    /// What the provider makes of it.
    fn perform(&mut self, action: &Action) -> Outcome {
        let key = self.kept.key();
        let now = self.now;
        let held = self.kept.holds;
        let container = self.containers.get_mut(&key);
        match action {
            Action::Hooks => self.hooked.push((self.kept.generation, self.kept.phase)),
            Action::Create => {
                assert!(held, "a container that is created must be known before");
                self.containers.entry(key).or_insert((State::Running, now + self.lag));
                self.most = self.most.max(self.alive());
                return Outcome::Made(Box::new(self.find()));
            }
            Action::Ask => return Outcome::Answered(self.ready),
            Action::Persist => return Outcome::Persisted(String::from("kept")),
            Action::Delete if self.removal.is_zero() => drop(self.containers.remove(&key)),
            Action::Delete => {
                container.into_iter().for_each(|found| found.0 = State::Stopping);
                self.removed.entry(key).or_insert(now + self.removal);
            }
            Action::Hydrate => self.brought += 1,
            Action::Start | Action::Resume => container.into_iter().for_each(|found| found.0 = State::Running),
            Action::Pause => container.into_iter().for_each(|found| found.0 = State::Paused),
            Action::Stop => container.into_iter().for_each(|found| found.0 = State::Stopped),
            Action::Look | Action::KeepAlive(_) | Action::Avoid(_) => {}
        }
        Outcome::Done
    }

    /// One step; false when there is nothing more to do.
    fn step(&mut self) -> bool {
        let (now, leaving, removed) = (self.now, &self.leaving, &self.removed);
        self.containers.retain(|key, _| leaving.get(key).into_iter().chain(removed.get(key)).all(|at| *at > now));
        match next(&self.kept, self.seen.as_ref(), &self.policy, self.now) {
            Step::Enter(phase, why) => {
                assert!(self.kept.phase.leads_to(phase), "{} -> {phase}", self.kept.phase);
                let generation = self.kept.generation;
                enter_phase(&mut self.kept, phase, why, &price(), self.now);
                self.trail.push(phase);
                // It was of the one before.
                self.seen = self.seen.take().filter(|_| self.kept.generation == generation);
            }
            Step::Wait(None) => return false,
            Step::Wait(Some(until)) => {
                assert!(until > self.now, "{} waits for the past: {until} at {}", self.kept.phase, self.now);
                self.now = until;
                self.chance();
            }
            Step::Do(Action::Look) => {
                if self.happens() < 20 {
                    let error = Error::Failed { provider: "test", what: String::from("away") };
                    record(&mut self.kept, &Action::Look, &Outcome::Failed(error), &self.policy, &price(), self.now);
                    return true;
                }
                let sandbox = self.find();
                saw(&mut self.kept, &sandbox, &self.policy, &price(), self.now);
                record(&mut self.kept, &Action::Look, &Outcome::Done, &self.policy, &price(), self.now);
                self.seen = Some(Seen { sandbox, at: self.now });
            }
            Step::Do(action) => {
                about_to(&mut self.kept, &action, self.now);
                let fault = self.happens();
                let error = |what: &str| Outcome::Failed(Error::Unsure { provider: "test", what: what.to_owned() });
                let outcome = match fault {
                    // Not done; done and not heard of; done, and whoever did it is gone.
                    0..25 => error("not done"),
                    25..50 => {
                        self.perform(&action);
                        error("done")
                    }
                    50..70 => {
                        self.perform(&action);
                        self.seen = None;
                        return true;
                    }
                    70..75 if action == Action::Hooks => Outcome::Vetoed(String::from("no")),
                    // It is taken away before anybody has seen it.
                    75..85 if action == Action::Create => {
                        let made = self.perform(&action);
                        self.take_away(Duration::from_secs(u64::from(fault % 2)));
                        made
                    }
                    70..75 => Outcome::Failed(Error::Refused { provider: "test", what: String::from("never") }),
                    _ => self.perform(&action),
                };
                self.now += Duration::from_millis(10);
                self.seen = None;
                record(&mut self.kept, &action, &outcome, &self.policy, &price(), self.now);
                if self.trail.last() != Some(&self.kept.phase) {
                    self.trail.push(self.kept.phase);
                }
            }
        }
        true
    }

    /// What others do meanwhile.
    fn chance(&mut self) {
        let key = self.kept.key();
        let now = self.now;
        let report = |busy_until| Report { at: now, busy_until, cost_usd: 0.5, conversation: None, memory_bytes: None };
        match self.happens() {
            0..10 => self.kept.wanted = Wanted::Paused,
            10..40 if self.kept.wanted != Wanted::Gone => self.kept.wanted = Wanted::Running,
            40..45 => self.kept.wanted = Wanted::Gone,
            45..60 => self.containers.get_mut(&key).into_iter().for_each(|found| found.0 = State::Stopped),
            60..70 => {
                self.containers.remove(&key);
            }
            70..75 => self.ready = !self.ready,
            75..120 => self.kept.report = Some(report(Some(now + Duration::from_secs(30)))),
            120..220 => self.kept.report = Some(report(None)),
            220..225 => self.take_away(Duration::from_secs(30)),
            _ => {}
        }
    }

    fn run(&mut self, most: usize) -> bool {
        (0..most).all(|_| self.step())
    }
}

fn patterns() -> impl Strategy<Value = (Pattern, PauseBy)> {
    prop_oneof![
        Just((Pattern::Ephemeral, PauseBy::Nothing)),
        Just((Pattern::LongRunning, PauseBy::Provider)),
        Just((Pattern::Hybrid, PauseBy::Archive)),
        Just((Pattern::Hybrid, PauseBy::Provider)),
        Just((Pattern::Shared, PauseBy::Nothing)),
        // With a place among others.
        Just((Pattern::Shared, PauseBy::Archive)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_nothing_is_left_and_never_are_there_two(
        (pattern, pause_by) in patterns(),
        fate in prop::collection::vec(any::<u8>(), 0..400),
        lag in prop_oneof![Just(0), Just(5)],
    ) {
        let mut world = World::new(pattern, pause_by, fate, Duration::from_secs(lag));
        // It runs until it has ended, or sleeps with nobody asking: then its time is over some day.
        let busy = world.run(20_000);
        prop_assert!(!busy, "it comes to no end: {:?}", world.trail);
        prop_assert!(world.kept.phase.is_last(), "{:?}", world.trail);
        prop_assert_eq!(world.alive(), 0, "{:?}", world.trail);
        prop_assert!(!world.kept.holds);
        prop_assert!(world.most <= 1, "{} at once: {:?}", world.most, world.trail);
        let again = world.trail.split(|phase| !matches!(phase, Phase::Creating | Phase::Starting | Phase::Resuming)).map(<[Phase]>::len).max();
        prop_assert!(again.is_some_and(|again| again <= 9), "it is made anew for ever: {:?}", world.trail);
        prop_assert!(world.kept.container_usd >= 0.0 && world.kept.container_seconds <= 3600.0 + 300.0, "{}", world.kept.container_seconds);
    }
}

#[test]
fn an_ephemeral_one_goes_straight_through() {
    let mut world = World::new(Pattern::Ephemeral, PauseBy::Nothing, vec![], Duration::ZERO);
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    world.kept.report = Some(Report {
        at: world.now,
        busy_until: Some(world.now + Duration::from_secs(30)),
        cost_usd: 0.25,
        conversation: None,
        memory_bytes: None,
    });
    while world.kept.phase != Phase::Active {
        assert!(world.step());
    }
    world.containers.values_mut().for_each(|found| found.0 = State::Stopped);
    assert!(!world.run(100));
    use Phase::*;
    assert_eq!(world.trail, [Requested, Creating, Starting, Ready, Active, Stopped, Destroyed]);
    let hooked: Vec<Phase> = world.hooked.iter().map(|(_, phase)| *phase).collect();
    assert_eq!(hooked, world.trail, "the hooks of each phase, once");
    assert_eq!(world.kept.cost_usd(), 0.25);
    assert_eq!(world.kept.reason.as_deref(), Some("its work is done"));
}

#[test]
fn a_hybrid_one_is_put_away_when_it_is_idle_and_goes_on_in_another_container() {
    let mut world = World::new(Pattern::Hybrid, PauseBy::Archive, vec![], Duration::ZERO);
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    let first = world.kept.key();
    world.kept.report = Some(Report { at: world.now, busy_until: None, cost_usd: 1.0, conversation: None, memory_bytes: None });
    let began = world.now;
    while world.kept.phase != Phase::Paused {
        assert!(world.step());
    }
    let idle = world.now.duration_since(began).as_secs();
    assert!((60..70).contains(&idle), "{idle}");
    assert_eq!((world.alive(), world.kept.holds, world.kept.archive.as_deref()), (0, false, Some("kept")));
    // It rests, until somebody wants it.
    assert!((0..3).all(|_| world.step() && world.kept.phase == Phase::Paused || world.now >= world.kept.ends));
    let mut world = World { now: began + Duration::from_secs(100), ..world };
    world.kept.phase = Phase::Paused;
    world.kept.wanted = Wanted::Running;
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    assert_ne!(world.kept.key(), first);
    assert!(world.kept.hydrated, "with what was put away");
    world.kept.report = Some(Report { at: world.now, busy_until: None, cost_usd: 0.5, conversation: None, memory_bytes: None });
    assert_eq!(world.kept.cost_usd(), 1.5, "of both containers");
}

#[test]
fn one_of_several_is_put_away_and_goes_on_in_another_place() {
    use Phase::*;
    let mut world = World::new(Pattern::Shared, PauseBy::Archive, vec![], Duration::ZERO);
    while world.kept.phase != Ready {
        assert!(world.step());
    }
    world.kept.report = Some(report(world.now, None));
    while world.kept.phase != Paused {
        assert!(world.step());
    }
    assert_eq!(world.trail, [Requested, Creating, Starting, Ready, Pausing, Paused]);
    assert_eq!((world.alive(), world.kept.holds, world.kept.archive.as_deref()), (0, false, Some("kept")));
    world.kept.wanted = Wanted::Running;
    while world.kept.phase != Ready {
        assert!(world.step());
    }
    assert_eq!(world.trail[6..], [Resuming, Creating, Starting, Ready]);
    assert!(world.kept.hydrated && world.kept.generation == 2);
    world.kept.report = Some(report(world.now, None));
    assert_eq!(world.kept.cost_usd(), 1.0, "its own part, of both");
}

#[test]
fn who_is_in_a_container_that_dies_goes_on_with_what_was_put_away_last() {
    for (archive, to) in [(Some("before"), Phase::Paused), (None, Phase::Failed)] {
        let mut world = World::new(Pattern::Shared, PauseBy::Archive, vec![], Duration::ZERO);
        while world.kept.phase != Phase::Ready {
            assert!(world.step());
        }
        (world.kept.archive, world.kept.hydrated) = (archive.map(String::from), true);
        world.kept.report = Some(report(world.now, None));
        world.containers.values_mut().for_each(|found| found.0 = State::Failed);
        while world.kept.phase != to || world.kept.holds {
            assert!(world.step());
        }
        assert_eq!(world.kept.archive.as_deref(), archive);
    }
}

/// A container that somebody is in, until it is to end for this.
fn container_of_several(clears: bool, why: impl Fn(&mut World)) -> World {
    let mut world = World::new(Pattern::Shared, PauseBy::Nothing, vec![], Duration::ZERO);
    let taken = ["guest".parse().unwrap()].into();
    world.kept.places = Some(Places { kind: String::from("k"), most: 2, pinned: false, taken, empty_since: None });
    world.policy.clears = clears;
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    world.kept.report = Some(report(world.now, None));
    why(&mut world);
    while world.kept.phase == Phase::Ready {
        assert!(world.step());
    }
    world
}

#[test]
fn a_container_of_several_ends_when_those_in_it_are_put_away() {
    let drained = |world: &mut World| world.policy.drained = Some(world.now + Duration::from_secs(600));
    let node = |world: &mut World| world.policy.node_drained = Some(world.now);
    let taken = |world: &mut World| world.take_away(Duration::from_secs(30));
    let old = |world: &mut World| world.now = world.kept.ends - Duration::from_secs(300);
    type Happens<'a> = &'a dyn Fn(&mut World);
    let reasons: [(&str, Happens); 4] = [
        ("its provider is being drained", &drained),
        ("its node is being drained", &node),
        (TAKEN, &taken),
        ("its container's time is over", &old),
    ];
    for (why, happens) in reasons {
        let mut world = container_of_several(true, happens);
        assert_eq!((world.kept.phase, world.kept.reason.as_deref()), (Phase::Pausing, Some(why)));
        assert_eq!(world.kept.spare(), None, "nobody new comes");
        let began = world.now;
        world.run(3);
        assert_eq!(world.kept.phase, Phase::Pausing, "{why}");
        world.kept.places.as_mut().unwrap().taken.clear();
        while world.kept.phase == Phase::Pausing {
            assert!(world.step());
        }
        assert_eq!((world.kept.phase, world.kept.reason.as_deref()), (Phase::Stopping, Some(why)));
        assert!(world.now < began + Duration::from_secs(300));
        // Whose conversations stay in it ends with it.
        let at_once = container_of_several(false, happens);
        assert_eq!(at_once.kept.phase, Phase::Stopping, "{why}");
    }
}

#[test]
fn who_cannot_be_put_away_in_time_does_not_keep_a_container() {
    let drained = |world: &mut World| world.policy.drained = Some(world.now + Duration::from_secs(3000));
    let mut world = container_of_several(true, drained);
    let began = world.now;
    while world.kept.phase == Phase::Pausing {
        assert!(world.step());
    }
    assert_eq!((world.kept.phase, world.now), (Phase::Stopping, began + Duration::from_secs(300)));
    // Nor does one that has died meanwhile wait for anybody.
    let mut world = container_of_several(true, drained);
    world.containers.values_mut().for_each(|found| found.0 = State::Stopped);
    while world.kept.phase == Phase::Pausing {
        assert!(world.step());
    }
    assert_eq!(world.kept.phase, Phase::Failed);
}

#[test]
fn what_holds_a_container_up_is_said_when_it_is_late() {
    let mut world = World::new(Pattern::Ephemeral, PauseBy::Nothing, vec![], Duration::ZERO);
    while world.kept.phase != Phase::Starting {
        assert!(world.step());
    }
    let now = world.now + Duration::from_secs(120);
    let reason = Some(String::from("ImagePullBackOff: no such image"));
    let seen = Seen { sandbox: Sandbox { state: State::Creating, reason, ..world.find() }, at: now };
    let said = Some(String::from("it was not ready within 120 s: ImagePullBackOff: no such image"));
    assert_eq!(next(&world.kept, Some(&seen), &world.policy, now), Step::Enter(Phase::Failed, said));
}

/// Whatever provider it is: what is known of a failure before anybody spoke is in its words.
#[test]
fn why_it_was_never_ready_is_said() {
    let mut world = World::new(Pattern::Ephemeral, PauseBy::Nothing, vec![], Duration::ZERO);
    while world.kept.phase != Phase::Starting || !world.kept.hooked {
        assert!(world.step());
    }
    let at = |state: State, exit_code, reason: Option<&str>| {
        let sandbox = Sandbox { state, exit_code, reason: reason.map(String::from), ..world.find() };
        Seen { sandbox, at: world.now }
    };
    let failed = |kept: &Session, seen: &Seen, now| match next(kept, Some(seen), &world.policy, now) {
        Step::Enter(Phase::Failed, Some(why)) => why,
        other => panic!("{other:?}"),
    };
    for (code, reason, says) in [
        (Some(3), None, "it ended before it was ready (exit code 3)"),
        (Some(127), None, "it ended before it was ready (exit code 127: its command was not found)"),
        (Some(137), None, "it ended before it was ready (exit code 137: killed; if nobody did it, for want of memory)"),
        (Some(137), Some("OOMKilled"), "it ended before it was ready (exit code 137: OOMKilled)"),
        (None, Some("Evicted: low on memory"), "it ended before it was ready (Evicted: low on memory)"),
    ] {
        assert_eq!(failed(&world.kept, &at(State::Stopped, code, reason), world.now), says);
    }
    let late = world.now + Duration::from_secs(120);
    for (state, says) in [
        (State::Running, "it was not ready within 120 s: its container runs, and the sidecar in it does not answer"),
        (State::Creating, "it was not ready within 120 s: its container is still being made"),
    ] {
        assert_eq!(failed(&world.kept, &Seen { at: late, ..at(state, None, None) }, late), says);
    }
    // It is told while it is waited for, and remembered when there is nothing left that could tell it.
    let mut kept = world.kept.clone();
    saw(
        &mut kept,
        &at(State::Creating, None, Some("ImagePullBackOff: no such image")).sandbox,
        &world.policy,
        &price(),
        world.now,
    );
    assert_eq!(kept.reason.as_deref(), Some("ImagePullBackOff: no such image"));
    // When the provider has had the time to know it.
    let settled = world.now + Duration::from_secs(60);
    let gone = Seen { at: settled, ..at(State::Missing, None, None) };
    assert_eq!(failed(&kept, &gone, settled), "it was gone before it was ready: ImagePullBackOff: no such image");
    let mute = |code| at(State::Stopped, code, None);
    assert_eq!(failed(&kept, &mute(None), world.now), "it ended before it was ready (ImagePullBackOff: no such image)");
    // It has begun after all.
    assert_eq!(failed(&kept, &mute(Some(1)), world.now), "it ended before it was ready (exit code 1)");
    // Who wants its end has said why.
    (kept.wanted, kept.reason) = (Wanted::Gone, Some(String::from("enough")));
    saw(&mut kept, &at(State::Running, None, Some("unhealthy")).sandbox, &world.policy, &price(), world.now);
    assert_eq!(kept.reason.as_deref(), Some("enough"));
}

#[test]
fn what_cannot_be_put_away_when_its_time_is_over_is_not_tried_all_the_time() {
    let mut world = World::new(Pattern::Hybrid, PauseBy::Archive, vec![], Duration::ZERO);
    world.kept.ends = start() + Duration::from_secs(7200);
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    world.kept.report = Some(report(world.now, None));
    let mut tried = 0;
    // Its container's hour, and twenty minutes more.
    while world.now < start() + Duration::from_secs(4800) {
        match next(&world.kept, world.seen.as_ref(), &world.policy, world.now) {
            Step::Do(Action::Persist) => {
                tried += 1;
                assert!(tried < 100, "at {}", world.now);
                let never = Outcome::Failed(Error::Refused { provider: "test", what: String::from("too large") });
                record(&mut world.kept, &Action::Persist, &never, &world.policy, &price(), world.now);
            }
            _ => assert!(world.step()),
        }
    }
    assert!((4..40).contains(&tried), "{tried}");
    assert_eq!(world.kept.phase, Phase::Idle, "it is there, until its own end");
}

/// What works is put away as it is when there is no more waiting for it.
#[test]
fn what_works_at_the_deadline_of_a_drain_is_put_away_and_does_not_go_round_in_a_circle() {
    for node in [false, true] {
        let mut world = World::new(Pattern::Hybrid, PauseBy::Archive, vec![], Duration::ZERO);
        while world.kept.phase != Phase::Ready {
            assert!(world.step());
        }
        let deadline = world.now + Duration::from_secs(60);
        match node {
            true => world.policy.node_drained = Some(deadline),
            false => world.policy.drained = Some(deadline),
        }
        while world.now < deadline {
            world.kept.report = Some(report(world.now, Some(world.now + Duration::from_secs(600))));
            assert!(world.step());
        }
        assert_eq!(world.kept.phase, Phase::Active, "it was waited for");
        for _ in 0..20 {
            world.step();
            if world.kept.phase == Phase::Paused {
                break;
            }
        }
        use Phase::*;
        assert_eq!(world.trail, [Requested, Creating, Starting, Ready, Active, Pausing, Paused]);
        assert_eq!(world.kept.archive.as_deref(), Some("kept"));
        // One of them has others.
        world.kept.wanted = Wanted::Running;
        let next = next(&world.kept, None, &Policy { node_drained: None, ..world.policy.clone() }, world.now);
        assert!(matches!(next, Step::Do(Action::Hooks)), "{next:?}");
        world.kept.hooked = true;
        world.policy.node_drained = None;
        assert_eq!(world.step() && world.kept.phase == Phase::Resuming, node);
    }
}

#[test]
fn what_is_idle_on_a_node_that_is_drained_goes_at_once() {
    for (pattern, pause_by, to) in [
        (Pattern::Hybrid, PauseBy::Archive, Phase::Pausing),
        (Pattern::Hybrid, PauseBy::Provider, Phase::Pausing),
        (Pattern::Hybrid, PauseBy::Nothing, Phase::Stopping),
        (Pattern::LongRunning, PauseBy::Provider, Phase::Stopping),
    ] {
        let mut world = World::new(pattern, pause_by, vec![], Duration::ZERO);
        world.policy.idle_after = None;
        while world.kept.phase != Phase::Ready {
            assert!(world.step());
        }
        assert_eq!(world.kept.node.as_deref(), Some("n"));
        world.kept.report = Some(report(world.now, None));
        world.policy.node_drained = Some(world.now + Duration::from_secs(3600));
        while world.kept.phase == Phase::Ready {
            assert!(world.step());
        }
        assert_eq!((world.kept.phase, world.kept.reason.as_deref()), (to, Some("its node is being drained")));
    }
}

#[test]
fn what_is_taken_away_is_put_away_in_time_where_it_can_be_and_has_not_failed() {
    use Phase::*;
    for (pattern, pause_by, archive, seconds, ends) in [
        (Pattern::Ephemeral, PauseBy::Nothing, None, 30, vec![Stopping, Stopped, Destroyed]),
        (Pattern::LongRunning, PauseBy::Provider, None, 30, vec![Stopping, Stopped, Destroyed]),
        (Pattern::Hybrid, PauseBy::Archive, None, 30, vec![Pausing, Paused]),
        // It was gone before anybody looked, but not before it was known.
        (Pattern::Hybrid, PauseBy::Archive, Some("before"), 0, vec![Pausing, Paused]),
        (Pattern::Hybrid, PauseBy::Archive, None, 0, vec![Stopping, Stopped, Destroyed]),
        (Pattern::Hybrid, PauseBy::Provider, None, 0, vec![Stopping, Stopped, Destroyed]),
    ] {
        let mut world = World::new(pattern, pause_by, vec![], Duration::ZERO);
        while world.kept.phase != Ready {
            assert!(world.step());
        }
        world.kept.archive = archive.map(String::from);
        // It works, and is not waited for.
        world.kept.report = Some(report(world.now, Some(world.now + Duration::from_secs(600))));
        world.policy.keep_alive = None;
        while world.kept.phase != Active {
            assert!(world.step());
        }
        world.now += world.policy.settle;
        world.take_away(Duration::from_secs(seconds));
        let going = world.find();
        saw(&mut world.kept, &going, &world.policy, &price(), world.now);
        world.seen = None;
        let last = *ends.last().unwrap();
        for _ in 0..100 {
            if world.kept.phase == last {
                break;
            }
            world.step();
        }
        assert_eq!(world.trail[5..], ends, "{pattern:?} {pause_by:?} {archive:?}");
        assert_eq!(world.kept.reason.as_deref(), Some(TAKEN), "{pattern:?}");
        if last == Paused {
            let kept = if seconds > 0 { "kept" } else { "before" };
            assert_eq!((world.kept.archive.as_deref(), world.kept.holds), (Some(kept), false));
            // The next one is another.
            world.kept.wanted = Wanted::Running;
            while world.kept.phase != Ready {
                assert!(world.step());
            }
            assert_eq!((world.kept.disrupted.as_deref(), world.alive()), (None, 1));
        }
    }
}

/// Evicted while its image is pulled, or its sidecar begins: who has asked for it waits a little longer, and hears of no failure.
#[test]
fn what_is_taken_away_before_it_is_ready_is_made_anew_when_it_is_gone() {
    use Phase::*;
    for seconds in [0, 30] {
        let mut world = World::new(Pattern::Ephemeral, PauseBy::Nothing, vec![], Duration::ZERO);
        (world.ready, world.removal) = (false, Duration::from_secs(5));
        while world.kept.phase != Starting {
            assert!(world.step());
        }
        let (first, made) = (world.kept.key(), world.now);
        world.take_away(Duration::from_secs(seconds));
        while world.kept.phase == Starting {
            assert!(world.step());
            assert!(world.kept.holds || world.alive() == 0, "it is held until it is gone");
        }
        assert_eq!((world.kept.phase, world.kept.reason.as_deref(), world.kept.holds), (Creating, Some(TAKEN), false));
        // It is paid for as long as it may have been there: what a provider does not know yet is waited for.
        let paid = world.kept.container_seconds;
        assert!((paid - world.now.duration_since(made).as_secs_f64()).abs() < 0.1, "{paid}");
        world.ready = true;
        while world.kept.phase != Ready {
            assert!(world.step());
        }
        assert_eq!(world.trail, [Requested, Creating, Starting, Creating, Starting, Ready]);
        assert_eq!(world.hooked.iter().filter(|(generation, _)| *generation == 2).count(), 2, "{:?}", world.hooked);
        assert_ne!(world.kept.key(), first);
        let Session { generation, lost, disrupted, reason, .. } = &world.kept;
        assert_eq!((generation, lost, disrupted, reason), (&2, &0, &None, &None));
        assert_eq!((world.most, world.alive()), (1, 1));
    }
}

#[test]
fn what_is_always_taken_away_before_it_is_ready_has_failed_in_the_end() {
    let mut world = World::new(Pattern::LongRunning, PauseBy::Nothing, vec![], Duration::ZERO);
    world.ready = false;
    while !world.kept.phase.is_last() {
        let new = world.kept.phase == Phase::Starting && !world.leaving.contains_key(&world.kept.key());
        if new {
            world.take_away(Duration::from_secs(1));
        }
        assert!(world.step());
    }
    assert_eq!(world.trail.iter().filter(|phase| **phase == Phase::Creating).count(), 4, "{:?}", world.trail);
    let why = format!("4 of its containers were taken away before they were ready: {TAKEN}");
    assert_eq!((world.kept.phase, world.kept.reason.as_deref()), (Phase::Failed, Some(why.as_str())));
    assert!(!world.run(100));
    assert_eq!((world.alive(), world.kept.holds, world.most), (0, false, 1));
}

/// Its node does not answer: its pod may still run there, and no other is made beside it.
#[test]
fn what_is_taken_away_and_does_not_go_is_held() {
    let mut world = World::new(Pattern::LongRunning, PauseBy::Nothing, vec![], Duration::ZERO);
    (world.ready, world.removal) = (false, Duration::from_secs(1200));
    while world.kept.phase != Phase::Starting {
        assert!(world.step());
    }
    let began = world.now;
    world.take_away(Duration::from_secs(1200));
    // A fleet asks no more than once a second, as its service does.
    while world.kept.phase == Phase::Starting {
        assert!(world.step());
        world.now += Duration::from_millis(500);
    }
    let took = world.now.duration_since(began).as_secs();
    assert!((240..243).contains(&took), "{took}");
    let why = format!("it was not ready within 240 s: {TAKEN}");
    assert_eq!((world.kept.phase, world.kept.reason), (Phase::Failed, Some(why)));
    assert!(world.kept.holds && world.most == 1);
}

#[test]
fn what_is_brought_back_is_brought_into_the_next_one_as_well() {
    let mut world = World::new(Pattern::Hybrid, PauseBy::Archive, vec![], Duration::ZERO);
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    world.kept.report = Some(report(world.now, None));
    while world.kept.phase != Phase::Paused {
        assert!(world.step());
    }
    (world.kept.wanted, world.ready) = (Wanted::Running, false);
    while !(world.kept.phase == Phase::Starting && world.kept.hydrated) {
        assert!(world.step());
    }
    // Its sidecar has told what it was brought: there is a copy of that.
    world.kept.report = Some(report(world.now, None));
    world.take_away(Duration::from_secs(30));
    while world.kept.phase == Phase::Starting {
        assert!(world.step());
    }
    assert!(!world.kept.hydrated && world.kept.phase == Phase::Creating, "{:?}", world.trail);
    world.ready = true;
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    assert_eq!((world.kept.generation, world.kept.hydrated, world.brought), (3, true, 2));
    assert_eq!((world.kept.archive.as_deref(), world.kept.cost_usd()), (Some("kept"), 1.0), "of the first two");
}

/// There is no other of what was in it, and a task that was begun is not begun again. Of what was made ahead the pool makes another.
#[test]
fn what_was_begun_or_is_nobodys_is_not_made_anew_and_has_not_failed() {
    use Phase::*;
    let begun = |world: &mut World| world.kept.report = Some(report(world.now, None));
    let spare = |world: &mut World| world.kept.pool = Some(String::from("kind"));
    let sleeps = |world: &mut World| {
        world.ready = true;
        while world.kept.phase != Ready {
            assert!(world.step());
        }
        world.kept.wanted = Wanted::Paused;
        world.kept.report = Some(Report { cost_usd: 0.0, ..report(world.now, None) });
        while world.kept.phase != Paused {
            assert!(world.step());
        }
        (world.kept.wanted, world.ready) = (Wanted::Running, false);
        world.now += Duration::from_secs(1);
        world.kept.since = world.now;
        while world.kept.phase != Starting {
            assert!(world.step());
        }
    };
    type Prepare<'a> = &'a dyn Fn(&mut World);
    let all: [(Prepare, Pattern, PauseBy); 3] = [
        (&begun, Pattern::Ephemeral, PauseBy::Nothing),
        (&spare, Pattern::LongRunning, PauseBy::Nothing),
        (&sleeps, Pattern::Hybrid, PauseBy::Provider),
    ];
    for (prepare, pattern, pause_by) in all {
        // Seen while it goes, and when it is gone.
        for seconds in [0, 30] {
            let mut world = World::new(pattern, pause_by, vec![], Duration::ZERO);
            world.ready = false;
            while world.kept.phase != Starting {
                assert!(world.step());
            }
            prepare(&mut world);
            world.now += world.policy.settle;
            world.take_away(Duration::from_secs(seconds));
            assert!(!world.run(200));
            assert_eq!(world.trail[world.trail.len() - 4..], [Starting, Stopping, Stopped, Destroyed], "{:?}", world.trail);
            assert_eq!((world.kept.reason.as_deref(), world.alive()), (Some(TAKEN), 0));
        }
    }
}

/// Kubelet ends its pod while it wakes, and what it keeps is still there: it is woken again, and sleeps on where that is in vain.
#[test]
fn what_sleeps_on_its_disk_sleeps_on_when_it_cannot_be_woken() {
    use Phase::*;
    let mut world = World::new(Pattern::Hybrid, PauseBy::Provider, vec![], Duration::ZERO);
    while world.kept.phase != Ready {
        assert!(world.step());
    }
    world.kept.report = Some(report(world.now, None));
    while world.kept.phase != Paused {
        assert!(world.step());
    }
    (world.kept.wanted, world.ready) = (Wanted::Running, false);
    let before = world.trail.len();
    while world.trail.len() == before || world.kept.phase != Paused {
        if world.kept.phase == Starting && world.kept.disrupted.is_none() {
            world.leaving.insert(world.kept.key(), world.now + Duration::from_secs(3600));
            world.containers.values_mut().for_each(|found| found.0 = State::Stopped);
            world.seen = None;
        }
        assert!(world.step());
    }
    let woken = [[Resuming, Starting]; 4].concat();
    assert_eq!(world.trail[before..], [&woken[..], &[Pausing, Paused]].concat());
    let Session { wanted, holds, reason, generation, .. } = &world.kept;
    assert_eq!((wanted, holds, reason.as_deref(), generation), (&Wanted::Paused, &true, Some(TAKEN), &1));
    // Somebody wants it again, and there is room for it.
    world.leaving.clear();
    (world.kept.wanted, world.ready) = (Wanted::Running, true);
    while world.kept.phase != Ready {
        assert!(world.step());
    }
    assert_eq!(world.kept.generation, 1);
}

/// Kubelet has ended its pod for its node, and what it keeps is still there.
#[test]
fn what_sleeps_on_its_disk_is_woken_when_it_is_ended_from_outside() {
    let mut world = World::new(Pattern::Hybrid, PauseBy::Provider, vec![], Duration::ZERO);
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    world.kept.report = Some(report(world.now, Some(world.now + Duration::from_secs(600))));
    world.take_away(Duration::from_secs(3600));
    world.containers.values_mut().for_each(|found| found.0 = State::Stopped);
    world.now += world.policy.look_every;
    while world.kept.phase != Phase::Paused {
        assert!(world.step());
    }
    assert_eq!((world.kept.reason.as_deref(), world.kept.holds), (Some(TAKEN), true));
    world.leaving.clear();
    world.kept.wanted = Wanted::Running;
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    assert_eq!((world.kept.generation, world.kept.disrupted.as_deref()), (1, None));
}

/// Of a Sandbox its controller makes the pod anew by itself.
#[test]
fn what_is_placed_anew_without_us_is_told_of_the_nodes_that_are_drained() {
    let mut world = World::new(Pattern::Hybrid, PauseBy::Provider, vec![], Duration::ZERO);
    let nodes = |names: &[&str]| Some(names.iter().map(ToString::to_string).collect::<Vec<_>>());
    world.policy.avoid = nodes(&["a"]);
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    world.kept.report = Some(report(world.now, Some(world.now + Duration::from_secs(3000))));
    let told = |world: &mut World| {
        let mut told = vec![];
        let until = world.now + Duration::from_secs(100);
        while world.now < until {
            if let Step::Do(Action::Avoid(nodes)) = next(&world.kept, world.seen.as_ref(), &world.policy, world.now) {
                told.push(nodes);
            }
            assert!(world.step());
        }
        told
    };
    assert_eq!(told(&mut world), Vec::<Vec<String>>::new(), "that one was known when it was made");
    for names in [&["a", "b"][..], &[]] {
        world.policy.avoid = nodes(names);
        assert_eq!(told(&mut world), [names], "once");
    }
    // What cannot be said is said again, and keeps nothing up; what never can is let be.
    world.policy.avoid = nodes(&["c"]);
    for (error, again) in [
        (Error::Failed { provider: "test", what: String::from("away") }, true),
        (Error::Refused { provider: "test", what: String::from("never") }, false),
    ] {
        world.kept.retry_at = None;
        while !matches!(next(&world.kept, world.seen.as_ref(), &world.policy, world.now), Step::Do(Action::Avoid(_))) {
            assert!(world.step());
        }
        let failed = Outcome::Failed(error);
        let action = Action::Avoid(vec![String::from("c")]);
        record(&mut world.kept, &action, &failed, &world.policy, &price(), world.now);
        assert_eq!(world.kept.avoids != ["c"], again);
        assert!(!matches!(next(&world.kept, world.seen.as_ref(), &world.policy, world.now), Step::Do(Action::Avoid(_))));
    }
    assert!(world.kept.phase == Phase::Active, "{:?}", world.trail);
}

/// Its sidecar does not give it: that is tried until it is gone, and it is said.
#[test]
fn what_could_not_be_put_away_in_time_says_so() {
    let mut world = World::new(Pattern::Hybrid, PauseBy::Archive, vec![], Duration::ZERO);
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    world.now += world.policy.settle;
    world.take_away(Duration::from_secs(30));
    let mut tried = 0;
    while !world.kept.phase.is_last() {
        match next(&world.kept, world.seen.as_ref(), &world.policy, world.now) {
            Step::Do(Action::Persist) => {
                tried += 1;
                let works = Outcome::Failed(Error::Failed { provider: "test", what: String::from("an agent works") });
                record(&mut world.kept, &Action::Persist, &works, &world.policy, &price(), world.now);
            }
            _ => assert!(world.step()),
        }
    }
    assert!((30..=62).contains(&tried), "{tried}: as long as it is there, and not ever more seldom");
    assert_eq!(world.kept.phase, Phase::Destroyed);
    assert_eq!(world.kept.reason, Some(format!("{TAKEN}; it ended before it was put away")));
}

/// A provider removes some time after its end what nobody has looked at: it has run, and is not begun again.
#[test]
fn what_may_be_gone_because_it_had_ended_is_not_made_anew() {
    let world = World::new(Pattern::Ephemeral, PauseBy::Nothing, vec![], Duration::ZERO);
    let policy = Policy { forgets: Some(Duration::from_secs(60)), ..Policy::default() };
    let at = |seconds: u64| start() + Duration::from_secs(seconds);
    let gone = Sandbox { state: State::Missing, disrupted: Some(String::from(TAKEN)), ..world.find() };
    let begun = |reported: Option<u64>| {
        let mut kept = session(Pattern::Ephemeral);
        (kept.phase, kept.hooked, kept.holds) = (Phase::Starting, true, true);
        (kept.made, kept.native) = (Some(start()), Some(String::from("c")));
        kept.report = reported.map(|at_| report(at(at_), None));
        kept
    };
    for (reported, now, taken) in [
        (None, at(59), true),
        (None, at(60), false),
        // It was there half a minute ago: it cannot be gone for its age.
        (Some(30), at(60), true),
        (Some(30), at(90), false),
    ] {
        let mut kept = begun(reported);
        saw(&mut kept, &gone, &policy, &price(), now);
        assert_eq!(kept.disrupted.is_some(), taken, "{reported:?} {now}");
        let seen = Seen { sandbox: gone.clone(), at: now };
        let step = next(&kept, Some(&seen), &policy, now);
        // What somebody has heard of has begun, and is not made anew either.
        let again = matches!(step, Step::Enter(Phase::Creating, _));
        let failed = matches!(step, Step::Enter(Phase::Failed, _));
        assert_eq!((again, failed), (taken && reported.is_none(), !taken), "{reported:?} {now}: {step:?}");
    }
    // Whose provider keeps what has ended until it is removed was taken away, however long ago that was.
    let mut kept = begun(None);
    saw(&mut kept, &gone, &Policy::default(), &price(), at(3600));
    assert!(kept.disrupted.is_some());
}

/// Our own wish is no disruption, and what a provider ends when it was told to is none.
#[test]
fn what_we_end_is_not_taken_away() {
    for phase in Phase::ALL {
        let mut kept = session(Pattern::Hybrid);
        (kept.phase, kept.holds, kept.native) = (phase, true, Some(String::from("c")));
        let policy = Policy { pause_by: PauseBy::Archive, ..Policy::default() };
        let world = World::new(Pattern::Hybrid, PauseBy::Archive, vec![], Duration::ZERO);
        let going = Sandbox { state: State::Stopping, disrupted: Some(String::from(TAKEN)), ..world.find() };
        saw(&mut kept, &going, &policy, &price(), start());
        let theirs = phase.is_up() || matches!(phase, Phase::Requested | Phase::Creating | Phase::Starting | Phase::Pausing);
        assert_eq!(kept.disrupted.is_some(), theirs, "{phase}");
    }
    let mut world = World::new(Pattern::LongRunning, PauseBy::Nothing, vec![], Duration::ZERO);
    world.kept.ends = start() + Duration::from_secs(7200);
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    world.now += Duration::from_secs(3600);
    world.take_away(Duration::from_secs(30));
    while world.kept.phase != Phase::Stopping {
        assert!(world.step());
    }
    assert_eq!(world.kept.reason.as_deref(), Some("its container's time is over"));
}

#[test]
fn who_begins_to_work_while_it_is_put_away_is_left_where_it_is() {
    let mut world = World::new(Pattern::Hybrid, PauseBy::Archive, vec![], Duration::ZERO);
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    world.kept.report = Some(report(world.now, None));
    while !world.kept.persisted {
        assert!(world.step());
    }
    world.kept.report = Some(report(world.now, Some(world.now + Duration::from_secs(30))));
    while world.kept.phase != Phase::Active {
        assert!(world.step());
    }
    assert_eq!((world.alive(), world.find().state), (1, State::Running), "{:?}", world.trail);
}

#[test]
fn who_is_woken_though_its_container_is_old_does_what_it_was_woken_for() {
    let mut world = World::new(Pattern::Hybrid, PauseBy::Provider, vec![], Duration::ZERO);
    world.policy.recycle.age = Some(Duration::from_secs(600));
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    world.now += Duration::from_secs(1200);
    world.kept.report = Some(report(world.now, None));
    world.kept.since = world.now;
    world.kept.idle_since = Some(world.now);
    // It was only just heard of, and has not worked yet.
    let until = world.now + Duration::from_secs(50);
    while world.now < until {
        assert!(world.step());
        assert_eq!(world.kept.phase, Phase::Ready, "{:?}", world.trail);
    }
    world.kept.report = Some(report(world.now, Some(world.now + Duration::from_secs(5))));
    while world.kept.phase != Phase::Active {
        assert!(world.step());
    }
    while world.kept.phase != Phase::Pausing {
        assert!(world.step());
    }
    assert_eq!(
        world.kept.reason.as_deref().map(|why| why.contains("old") || why.contains("age")),
        Some(true),
        "{:?}",
        world.kept.reason
    );
}

#[test]
fn who_has_never_been_heard_of_is_not_idle() {
    let mut world = World::new(Pattern::Ephemeral, PauseBy::Nothing, vec![], Duration::ZERO);
    while world.kept.phase != Phase::Ready {
        assert!(world.step());
    }
    while world.now < start() + Duration::from_secs(1800) {
        assert!(world.step());
        assert_eq!(world.kept.phase, Phase::Ready);
    }
}

#[test]
fn a_sidecar_that_begins_anew_does_not_take_back_what_it_has_cost() {
    let mut kept = session(Pattern::Hybrid);
    let mut say = |cost_usd| {
        heard(&mut kept, &Report { at: start(), busy_until: None, cost_usd, conversation: None, memory_bytes: None });
        kept.cost_usd()
    };
    // Sums of the same in another order are the same.
    let said = [1.0, 1.5, 1.5 - 1e-12, 0.0, 0.25].map(&mut say);
    assert_eq!(said.map(|usd| (usd * 1e6).round() / 1e6), [1.0, 1.5, 1.5, 1.5, 1.75]);
}

#[test]
fn a_veto_creates_nothing() {
    let mut world = World::new(Pattern::Ephemeral, PauseBy::Nothing, vec![72], Duration::ZERO);
    assert!(!world.run(100));
    assert_eq!(world.trail, [Phase::Requested, Phase::Failed]);
    assert_eq!((world.kept.reason.as_deref(), world.most), (Some("no"), 0));
}

#[test]
fn a_provider_that_is_away_is_waited_for_as_long_as_a_container_may_take() {
    let mut world = World::new(Pattern::Ephemeral, PauseBy::Nothing, vec![], Duration::ZERO);
    while world.kept.phase != Phase::Creating || !world.kept.hooked {
        assert!(world.step());
    }
    let began = world.now;
    let mut tried = 0;
    let end = loop {
        match next(&world.kept, None, &world.policy, world.now) {
            Step::Do(Action::Create) => {
                tried += 1;
                about_to(&mut world.kept, &Action::Create, world.now);
                let away = Outcome::Failed(Error::Failed { provider: "test", what: String::from("away") });
                record(&mut world.kept, &Action::Create, &away, &world.policy, &price(), world.now);
            }
            Step::Wait(Some(until)) => world.now = until,
            step => break step,
        }
    };
    let failed = Step::Enter(Phase::Failed, Some(String::from("it was not created within 120 s: test: away")));
    assert_eq!((end, tried), (failed, 8), "after 0.5, 1, 2, 4, 8, 16 and 32 s, and once a minute");
    assert!(world.now.duration_since(began).as_secs() >= 120);
}

/// Tried again after half a minute, or found then: what it has cost after a minute, by when it was made.
#[test]
fn a_container_is_paid_for_since_it_was_made_and_one_that_never_was_is_not() {
    let at = |seconds: i64| start() + jiff::SignedDuration::from_secs(seconds);
    let paid = |made: Option<Option<Timestamp>>, found: bool| {
        let mut world = World::new(Pattern::Ephemeral, PauseBy::Nothing, vec![], Duration::ZERO);
        while world.kept.phase != Phase::Creating || !world.kept.hooked {
            assert!(world.step());
        }
        let (kept, policy, price) = (&mut world.kept, Policy::default(), price());
        let refused = Outcome::Failed(Error::Failed { provider: "test", what: String::from("exceeded quota") });
        about_to(kept, &Action::Create, at(0));
        record(kept, &Action::Create, &refused, &policy, &price, at(1));
        if let Some(created) = made {
            let sandbox = Sandbox { created, state: State::Creating, ..world.find() };
            let kept = &mut world.kept;
            if found {
                saw(kept, &sandbox, &policy, &price, at(31));
            } else {
                about_to(kept, &Action::Create, at(30));
                record(kept, &Action::Create, &Outcome::Made(Box::new(sandbox)), &policy, &price, at(31));
            }
        }
        enter_phase(&mut world.kept, Phase::Stopping, None, &price, at(60));
        world.kept.container_seconds
    };
    for found in [false, true] {
        assert_eq!(paid(Some(Some(at(30))), found), 30.0);
        assert_eq!(paid(Some(Some(at(0))), found), 60.0, "its answer was lost");
        // Nobody knows, so it may have been the first time.
        assert_eq!(paid(Some(None), found), 60.0);
        // Its provider's clock is wrong.
        assert_eq!((paid(Some(Some(at(-3600))), found), paid(Some(Some(at(3600))), found)), (60.0, 29.0));
    }
    assert_eq!(paid(None, false), 0.0);
}

/// The provider is asked about it, and its answer is of another shape, each time.
#[test]
fn what_nobody_can_read_is_removed_all_the_same_when_it_is_to_be() {
    let policy = Policy::default();
    let mut over = session(Pattern::Ephemeral);
    (over.phase, over.holds, over.hooked, over.native) = (Phase::Failed, true, true, Some(String::from("n")));
    let unreadable = || Outcome::Failed(Error::Failed { provider: "test", what: String::from("an answer of another shape") });
    let mut now = start();
    for _ in 0..policy.tries {
        assert_eq!(next(&over, None, &policy, now), Step::Do(Action::Look));
        record(&mut over, &Action::Look, &unreadable(), &policy, &price(), now);
        now = over.retry_at.unwrap();
    }
    assert_eq!(next(&over, None, &policy, now), Step::Do(Action::Delete));
    record(&mut over, &Action::Delete, &Outcome::Done, &policy, &price(), now);
    assert!(over.holds, "that it is gone is not known by that");
    assert_eq!(next(&over, None, &policy, now), Step::Do(Action::Look));
    // Nobody knows what it is called: there is nothing to be deleted.
    (over.native, over.failures) = (None, policy.tries);
    assert_eq!(next(&over, None, &policy, now), Step::Do(Action::Look));
}

#[test]
fn what_nobody_holds_is_an_orphan_when_it_is_not_just_being_made() {
    let now = start();
    let grace = Duration::from_secs(60);
    let sandbox = |key: &str, age: u64| Sandbox {
        key: Some(key.to_owned()),
        native: key.to_owned(),
        state: State::Running,
        reason: None,
        exit_code: None,
        size: None,
        created: Some(now - Duration::from_secs(age)),
        deadline: None,
        labels: BTreeMap::from([(SESSION_LABEL.to_owned(), String::from("s")), (KEY_LABEL.to_owned(), key.to_owned())]),
        node: None,
        disrupted: None,
    };
    let mut held = session(Pattern::Ephemeral);
    held.holds = true;
    let key = held.key();
    let sessions = BTreeMap::from([(held.id.clone(), held)]);
    let mut strange = sandbox("strange", 100);
    strange.labels.clear();
    let ageless = Sandbox { created: None, ..sandbox("of an age that nobody can read", 0) };
    let others = [sandbox("young", 10), sandbox("older than what we know", 501), strange, ageless];
    let found: Vec<Sandbox> = [sandbox(&key, 100), sandbox("old", 100)].into_iter().chain(others).collect();
    let left: Vec<&str> =
        orphans(&found, &sessions, now - Duration::from_secs(500), grace, now).iter().map(|one| one.native.as_str()).collect();
    assert_eq!(left, ["old"]);
}

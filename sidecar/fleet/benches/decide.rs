//! What is decided in a second, and what ten thousand containers need in memory, on one core and with nothing around it: `cargo bench -p agent-fleet --bench
//! decide`. Containers are simulated and time is an argument; each round is the same, and the middle of several is what is printed.

#![expect(clippy::print_stdout, reason = "it is what it is for")]

use std::collections::BTreeMap;
use std::error::Error;
use std::time::{Duration, Instant};

use agent_fleet::lifecycle::Phase;
use agent_fleet::plan::{self, Action, Outcome, Policy, Seen, Step};
use agent_fleet::provider::{FLEET_LABEL, KEY_LABEL, Price, SESSION_LABEL, Sandbox, State};
use agent_fleet::session::{Pattern, Report, Session};
use jiff::Timestamp;

const SESSIONS: usize = 10_000;
const ROUNDS: usize = 7;
/// An agent works so long, and is then left alone.
const WORKS: Duration = Duration::from_secs(120);
/// A life longer than this many steps is no life.
const STEPS: usize = 1000;

struct World {
    policy: Policy,
    price: Price,
    began: Timestamp,
}

/// A session, and what its container does.
#[derive(Clone)]
struct One {
    session: Session,
    state: State,
    /// What was seen last, in this look.
    seen: Option<Seen>,
}

fn session(n: usize, now: Timestamp) -> Result<One, Box<dyn Error>> {
    let id = format!("session-{n}");
    let labels: BTreeMap<_, _> = [(FLEET_LABEL, "bench"), (KEY_LABEL, &*id), (SESSION_LABEL, &*id)].into();
    let spec = serde_json::from_value(serde_json::json!({
        "key": id, "image": "registry.example/agent@sha256:0000000000000000000000000000000000000000000000000000000000000000",
        "env": {"ANTHROPIC_BASE_URL": "http://gateway", "TASK": "x".repeat(200)}, "labels": labels, "ttl": {"secs": 3600, "nanos": 0},
    }))?;
    let session = Session::new(id.parse()?, ("tenant", "ada"), Pattern::LongRunning, "simulated", spec, now);
    Ok(One { session, state: State::Missing, seen: None })
}

impl World {
    fn sandbox(session: &Session, state: State) -> Sandbox {
        Sandbox {
            key: Some(session.spec.key.clone()),
            native: session.spec.key.clone(),
            state,
            reason: None,
            exit_code: None,
            size: None,
            created: None,
            deadline: None,
            labels: session.spec.labels.clone(),
            node: None,
            disrupted: None,
        }
    }

    fn report(&self, now: Timestamp) -> Report {
        let works = now < self.began + WORKS;
        let cost_usd = now.duration_since(self.began).as_secs_f64() / 1e3;
        Report { at: now, busy_until: works.then(|| now + WORKS), cost_usd, conversation: None, memory_bytes: Some(300 << 20) }
    }

    /// One decision, and what comes of it. When the next is due; `None`: at once.
    fn step(&self, one: &mut One, now: Timestamp) -> Option<Option<Timestamp>> {
        let session = &mut one.session;
        match plan::next(session, one.seen.as_ref(), &self.policy, now) {
            Step::Wait(until) => {
                one.seen = None;
                return Some(until);
            }
            Step::Enter(phase, reason) => plan::enter_phase(session, phase, reason, &self.price, now),
            Step::Do(action) => {
                plan::about_to(session, &action, now);
                let (mut outcome, mut looked, mut report) = (Outcome::Done, None, None);
                match &action {
                    Action::Create => {
                        one.state = State::Created;
                        outcome = Outcome::Made(Box::new(Self::sandbox(session, State::Created)));
                    }
                    Action::Start => one.state = State::Running,
                    Action::Stop => one.state = State::Stopped,
                    Action::Delete => one.state = State::Missing,
                    Action::Look => {
                        looked = Some(Self::sandbox(session, one.state.clone()));
                        report = (session.phase.is_up() && one.state == State::Running).then(|| self.report(now));
                    }
                    Action::Ask => (outcome, report) = (Outcome::Answered(true), Some(self.report(now))),
                    _ => {}
                }
                // As the service does it.
                plan::meter(session, &self.price, now);
                if let Some(sandbox) = &looked {
                    plan::saw(session, sandbox, &self.policy, &self.price, now);
                }
                if let Some(report) = report.as_ref().filter(|_| session.holds) {
                    plan::heard(session, report);
                }
                plan::record(session, &action, &outcome, &self.policy, &self.price, now);
                one.seen = looked.map(|sandbox| Seen { sandbox, at: now });
            }
        }
        None
    }
}

/// What this process holds in memory now.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

/// How many there were in a second, in the middle of all rounds.
#[expect(clippy::cast_precision_loss, reason = "some millions")]
fn say(what: &str, rounds: &mut [(usize, Duration)]) {
    rounds.sort_by_key(|(_, took)| *took);
    let (n, took) = rounds[rounds.len() / 2];
    println!(
        "{what:<44} {:>10.0}/s  {:>6.2} us each, {n} in a round",
        n as f64 / took.as_secs_f64(),
        took.as_secs_f64() * 1e6 / n as f64
    );
}

fn main() -> Result<(), Box<dyn Error>> {
    let began: Timestamp = "2026-11-26T12:00:00Z".parse()?;
    let policy = Policy {
        idle_after: Some(Duration::from_secs(60)),
        look_every: Duration::from_secs(5),
        settle: Duration::ZERO,
        ..Policy::default()
    };
    let price = Price { running: 0.05, paused: 0.05, stopped: 0.0, source: String::from("a bench") };
    let world = World { policy, price, began };

    let before = resident_kib();
    let new = (0..SESSIONS).map(|n| session(n, began)).collect::<Result<Vec<One>, _>>()?;
    println!("{SESSIONS} sessions in memory: {} MiB", (resident_kib() - before) >> 10);

    // Each up to when its agent works and there is nothing to do for a while.
    let mut working = new.clone();
    for one in &mut working {
        let mut steps = 0;
        while world.step(one, began).is_none() {
            steps += 1;
            if steps > STEPS {
                return Err(format!("it is {} for ever", one.session.phase).into());
            }
        }
    }
    if let Some(other) = working.iter().find(|one| one.session.phase != Phase::Active) {
        return Err(format!("it is {} and not at work", other.session.phase).into());
    }

    // What is decided most: of one that was just looked at, that there is nothing to do.
    let now = began + world.policy.look_every;
    let seen = |one: &One| Seen { sandbox: World::sandbox(&one.session, State::Running), at: now };
    let looked: Vec<Seen> = working.iter().map(seen).collect();
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for (one, seen) in working.iter().zip(&looked) {
            let step = plan::next(&one.session, Some(seen), &world.policy, now);
            if !matches!(step, Step::Wait(Some(until)) if until > now) {
                return Err(format!("{step:?} is no rest").into());
            }
        }
        rounds.push((SESSIONS, start.elapsed()));
    }
    say("one decision, after a look", &mut rounds);

    // A look: that it is due, what was seen and said of it, and that there is nothing to do until the next.
    let mut rounds = Vec::new();
    for n in 1..=ROUNDS {
        let (now, start) = (began + world.policy.look_every * u32::try_from(n)?, Instant::now());
        for one in &mut working {
            while world.step(one, now).is_none() {}
        }
        rounds.push((SESSIONS, start.elapsed()));
    }
    say("a whole look, without what it waits for", &mut rounds);

    // Lives: made, looked at every five seconds while it works and is idle, stopped, removed.
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let (mut all, mut decisions, start) = (new.clone(), 0, Instant::now());
        for one in &mut all {
            let mut now = began;
            for step in 0.. {
                decisions += 1;
                match world.step(one, now) {
                    Some(Some(until)) => now = until,
                    Some(None) => break,
                    None if step > STEPS => return Err(format!("it is {} for ever", one.session.phase).into()),
                    None => {}
                }
            }
        }
        rounds.push((decisions, start.elapsed()));
        if let Some(other) = all.iter().find(|one| one.session.phase != Phase::Destroyed || one.session.holds) {
            return Err(format!("it is {} at its end", other.session.phase).into());
        }
    }
    say("decisions of whole lives, and what is done", &mut rounds);
    Ok(())
}

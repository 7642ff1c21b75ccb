//! What is done next for a session: a function of what is kept, what was seen, and the time.
//!
//! [`next`] says one step; whoever does it tells [`record`] what came of it, and keeps what that makes of the session *before* the step after. So a
//! fleet may die between any two steps, and the next one goes on: every step can be done twice, and a container that may exist is never forgotten
//! ([`Session::holds`]).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;

use crate::lifecycle::Phase;
use crate::provider::{self, KEY_LABEL, Pause, Price, SESSION_LABEL, Sandbox, State};
use crate::session::{Pattern, Report, Session, SessionId, Wanted};

/// How a session is to be treated.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// How long a container may take until its sidecar speaks.
    pub ready_within: Duration,
    /// How long an agent may be idle. `None`: for ever.
    pub idle_after: Option<Duration>,
    /// When a container is given up at the next quiet moment.
    pub recycle: Recycle,
    /// Nothing new is made at its provider, and until then what works there may go on.
    pub drained: Option<Timestamp>,
    /// The same of the node that its container is on: others are made elsewhere.
    pub node_drained: Option<Timestamp>,
    /// Nodes that are drained, where its container is placed anew without us: it is told of them. `None`: it is not.
    pub avoid: Option<Vec<String>>,
    /// How long what has ended by itself is known, where its provider removes it then.
    pub forgets: Option<Duration>,
    /// How long a container may take to end.
    pub stop_grace: Duration,
    pub pause_by: PauseBy,
    /// Those that are in it are put away before it ends.
    pub clears: bool,
    /// How far ahead the provider's timers are moved while the agent works. `None`: it has none.
    pub keep_alive: Option<Duration>,
    /// How often a container is looked at that nobody has heard of.
    pub look_every: Duration,
    /// How long a provider may not know what it has made.
    pub settle: Duration,
    /// How often a step is tried that fails.
    pub tries: u32,
    pub backoff: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            ready_within: Duration::from_secs(120),
            idle_after: None,
            recycle: Recycle::default(),
            drained: None,
            node_drained: None,
            avoid: None,
            forgets: None,
            stop_grace: Duration::from_secs(20),
            pause_by: PauseBy::Nothing,
            clears: false,
            keep_alive: None,
            look_every: Duration::from_secs(30),
            settle: Duration::from_secs(15),
            tries: 5,
            backoff: Duration::from_millis(500),
        }
    }
}

impl Policy {
    /// What is otherwise for one of several in a container, and for that: see [`crate::place`].
    pub fn shared(&mut self, session: &Session) {
        if session.place.is_none() && session.places.is_none() {
            return;
        }
        let away = self.pause_by == PauseBy::Archive;
        self.clears = away && session.places.is_some();
        // A provider would pause all that are in it.
        self.pause_by = if away && session.place.is_some() { PauseBy::Archive } else { PauseBy::Nothing };
        if session.place.is_some() {
            // The container's age and memory are its own, and its timers.
            self.recycle = Recycle::default();
            self.keep_alive = None;
            self.settle = Duration::ZERO;
            // It is made, and speaks, before the session in it does.
            self.ready_within *= 3;
        }
    }
}

/// What makes a container be given up when its agent is idle: a hybrid session goes on in another, one that is not ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recycle {
    pub age: Option<Duration>,
    /// In use, by the sidecar's word.
    pub memory_bytes: Option<u64>,
    /// What it grows by in an hour, since the container was warm.
    pub growth_per_hour_bytes: Option<u64>,
}

/// What a container needs in its first minutes is no growth, and what it grew in a few minutes says nothing of an hour.
const WARM: Duration = Duration::from_secs(300);
const GROWTH_OVER: Duration = Duration::from_secs(900);

impl Recycle {
    /// Why, if a container is to be given up now.
    pub fn due(&self, session: &Session, now: Timestamp) -> Option<String> {
        if self.age.zip(session.made).is_some_and(|(age, made)| made + age <= now) {
            return Some(String::from("its container is old"));
        }
        let memory = session.report.as_ref().and_then(|report| report.memory_bytes)?;
        if self.memory_bytes.is_some_and(|most| memory >= most) {
            return Some(format!("its container uses {} MiB of memory", memory >> 20));
        }
        let (at, warm) = session.warm?;
        let over = now.duration_since(at).as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a few bytes of an exabyte")]
        let growth = memory.saturating_sub(warm) as f64 * 3600.0 / over.max(1.0);
        #[expect(clippy::cast_precision_loss, reason = "a few bytes of an exabyte")]
        let most = self.growth_per_hour_bytes.filter(|_| over >= GROWTH_OVER.as_secs_f64()).map(|most| most as f64);
        most.is_some_and(|most| growth >= most)
            .then(|| format!("its container's memory grows by {:.0} MiB an hour", growth / f64::from(1 << 20)))
    }
}

/// What a pause is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PauseBy {
    /// There is none.
    Nothing,
    /// The provider's own.
    Provider,
    /// What the session has is put away, and the container destroyed.
    Archive,
}

impl PauseBy {
    /// How a session is paused: by the provider if it is cheaper then, else by putting away what it has.
    pub fn of(pattern: Pattern, can: Pause, archive: bool) -> Self {
        match (pattern, can) {
            (_, Pause::Memory) => PauseBy::Provider,
            (Pattern::Hybrid, _) if archive => PauseBy::Archive,
            (_, Pause::Frozen | Pause::Disk) => PauseBy::Provider,
            (_, Pause::No) => PauseBy::Nothing,
        }
    }
}

/// The longest that is waited before a failed step is tried again.
const BACKOFF_MOST: Duration = Duration::from_secs(60);
/// How often a container is looked at that is about to change.
const LOOK_SOON: Duration = Duration::from_secs(1);
/// How often what sleeps is thought of: it may cost all the same.
const SLEEP: Duration = Duration::from_secs(600);

/// How often one that is wanted asks whether its provider may be used again.
const DRAINED_AGAIN: Duration = Duration::from_secs(10);
/// How long one is left alone that could not be put away.
const BACK: Duration = Duration::from_secs(300);
/// How long a container of several stays that has nobody in it, unless somebody says otherwise.
const EMPTY: Duration = Duration::from_secs(300);
/// How long those in it are given to be put away, before it ends.
const CLEARED: Duration = Duration::from_secs(300);
/// How long it is tried to put away what one has that is taken away: no cluster gives it longer.
const LAST_WORDS: Duration = Duration::from_secs(600);
/// So many containers may be taken away in a row before they are ready: then there is no place for it.
const LOST_MOST: u32 = 4;
const DRAINED: &str = "its provider is being drained";
const LIVED: &str = "its container's time is over";
pub(crate) const NODE_DRAINED: &str = "its node is being drained";

/// Sums of the same in another order differ by less, in USD.
const ROUNDED: f64 = 1e-6;

#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    Do(Action),
    /// It comes into this phase, and why.
    Enter(Phase, Option<String>),
    /// Nothing is to be done before then. `None`: until somebody wants something.
    Wait(Option<Timestamp>),
}

/// What touches the world.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Run the hooks of the phase.
    Hooks,
    Create,
    /// See what the container is doing; by its key, if nobody knows what it is called.
    Look,
    Start,
    /// Whether the sidecar in it answers.
    Ask,
    Hydrate,
    KeepAlive(Timestamp),
    /// Say which nodes it is not to be on when it is placed anew.
    Avoid(Vec<String>),
    Pause,
    Persist,
    Resume,
    Stop,
    Delete,
}

impl Action {
    pub fn name(&self) -> &'static str {
        match self {
            Action::Hooks => "hooks",
            Action::Create => "create",
            Action::Look => "look",
            Action::Start => "start",
            Action::Ask => "ask",
            Action::Hydrate => "hydrate",
            Action::KeepAlive(_) => "keep_alive",
            Action::Avoid(_) => "avoid",
            Action::Pause => "pause",
            Action::Persist => "persist",
            Action::Resume => "resume",
            Action::Stop => "stop",
            Action::Delete => "delete",
        }
    }

    /// Whether what came of it can be forgotten: then it is looked at, or done, once more. Not what can be done once alone: what was put away is not asked for
    /// again when its container is gone.
    pub fn is_found_out_again(&self) -> bool {
        match self {
            Action::Hooks
            | Action::Look
            | Action::Start
            | Action::Ask
            | Action::KeepAlive(_)
            | Action::Avoid(_)
            | Action::Pause
            | Action::Resume
            | Action::Stop
            | Action::Delete => true,
            Action::Create | Action::Hydrate | Action::Persist => false,
        }
    }
}

/// What came of an action.
#[derive(Debug)]
pub enum Outcome {
    Done,
    /// The hooks have said no, or one that must not fail has.
    Vetoed(String),
    /// A hook is to be tried again then.
    Later(Timestamp),
    Made(Box<Sandbox>),
    Answered(bool),
    /// What was put away, by its name in the store of conversations.
    Persisted(String),
    Failed(provider::Error),
}

impl Outcome {
    /// In a word, for what is counted.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::Done | Outcome::Made(_) | Outcome::Persisted(_) | Outcome::Answered(true) => "ok",
            Outcome::Answered(false) => "unanswered",
            Outcome::Later(_) => "later",
            Outcome::Vetoed(_) => "veto",
            Outcome::Failed(error) => match error {
                provider::Error::Busy { .. } => "busy",
                provider::Error::Unsure { .. } => "unsure",
                provider::Error::Failed { .. } => "failed",
                provider::Error::Refused { .. } => "refused",
                provider::Error::Missing { .. } => "missing",
                provider::Error::Unsupported { .. } => "unsupported",
            },
        }
    }
}

/// What a container was doing, and when that was seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub sandbox: Sandbox,
    pub at: Timestamp,
}

/// What is next. What was seen is of the container that the session has now, and of none before it.
pub fn next(session: &Session, seen: Option<&Seen>, policy: &Policy, now: Timestamp) -> Step {
    Planner { session, seen, policy, now }.next()
}

struct Planner<'a> {
    session: &'a Session,
    seen: Option<&'a Seen>,
    policy: &'a Policy,
    now: Timestamp,
}

/// An answer at once, where there is one.
type Maybe = Option<Step>;

fn enter(phase: Phase, why: impl Into<String>) -> Step {
    Step::Enter(phase, Some(why.into()))
}

impl Planner<'_> {
    fn next(&self) -> Step {
        let found = match self.session.phase {
            Phase::Requested => self.requested(),
            Phase::Creating => self.creating(),
            Phase::Starting => self.starting(),
            Phase::Ready | Phase::Active | Phase::Idle => self.up(),
            Phase::Pausing => self.pausing(),
            Phase::Paused => self.paused(),
            Phase::Resuming => self.resuming(),
            Phase::Stopping => self.stopping(),
            Phase::Stopped | Phase::Failed => self.removing(),
            Phase::Destroyed => self.hooks(),
        };
        found.unwrap_or(Step::Wait(None))
    }

    fn requested(&self) -> Maybe {
        if self.unwanted().is_some() {
            return Some(enter(Phase::Destroyed, "it was taken back"));
        }
        if self.policy.drained.is_some() {
            return Some(enter(Phase::Failed, DRAINED));
        }
        self.hooks().or(Some(Step::Enter(Phase::Creating, None)))
    }

    fn creating(&self) -> Maybe {
        // What was put away is not lost for that: it was wanted before.
        if self.policy.drained.is_some() && !self.session.holds && self.session.archive.is_none() {
            return Some(enter(Phase::Failed, DRAINED));
        }
        let first = self.unwanted().or_else(|| self.late("created")).or_else(|| self.hooks()).or_else(|| self.later());
        first.or(Some(match self.session.native {
            None => Step::Do(Action::Create),
            Some(_) => Step::Enter(Phase::Starting, None),
        }))
    }

    fn starting(&self) -> Maybe {
        if let Some(step) = self.unwanted().or_else(|| self.late("ready")).or_else(|| self.hooks()).or_else(|| self.later()) {
            return Some(step);
        }
        if let Some(why) = &self.session.disrupted {
            return Some(self.lost(why));
        }
        let container = match self.look(LOOK_SOON) {
            Ok(container) => container,
            Err(step) => return Some(step),
        };
        Some(match container.state {
            State::Created => Step::Do(Action::Start),
            State::Running if self.session.archive.is_some() && !self.session.hydrated => Step::Do(Action::Hydrate),
            State::Running => Step::Do(Action::Ask),
            State::Stopped | State::Failed => {
                // What was seen of it before, if it says no more: what held it up is no reason for the end of one that has begun.
                let before = || self.session.reason.clone().filter(|_| container.exit_code.is_none());
                let reason = container.reason.clone().or_else(before);
                let last = Sandbox { reason, ..container.clone() };
                enter(Phase::Failed, format!("it ended before it was ready{}", why(&last)))
            }
            State::Missing | State::Destroyed if !self.settling() => {
                enter(Phase::Failed, format!("it was gone before it was ready{}", self.last_words()))
            }
            State::Creating
            | State::Pausing
            | State::Paused
            | State::Stopping
            | State::Missing
            | State::Destroyed
            | State::Unknown(_) => self.soon(),
        })
    }

    /// Its container is taken away before it was ready: nobody has failed, and another is made when this one is gone.
    fn lost(&self, why: &str) -> Step {
        let session = self.session;
        // Its pool makes another.
        if session.pool.is_some() {
            return enter(Phase::Stopping, why);
        }
        let too_often = session.lost + 1 >= LOST_MOST;
        // There is no other of what was begun; but what sleeps on its disk may wake there once more.
        if begun(session) {
            return match self.look(LOOK_SOON) {
                Err(look) => look,
                Ok(container) if container.state == State::Stopped && self.sleeps_on_disk() => {
                    enter(if too_often { Phase::Pausing } else { Phase::Resuming }, why)
                }
                Ok(_) => enter(Phase::Stopping, why),
            };
        }
        if too_often {
            return enter(Phase::Failed, format!("{LOST_MOST} of its containers were taken away before they were ready: {why}"));
        }
        if !session.holds {
            return enter(Phase::Creating, why);
        }
        self.removed()
    }

    fn up(&self) -> Maybe {
        if let Some(step) = self.unwanted().or_else(|| self.hooks()) {
            return Some(step);
        }
        let container = match self.look(self.policy.look_every) {
            Ok(container) => container,
            Err(step) => return Some(self.later().unwrap_or(step)),
        };
        if let Some(step) = self.disrupted(container) {
            return Some(step);
        }
        match container.state {
            State::Running | State::Unknown(_) => {}
            // It has come and gone with a provider that forgets for a moment.
            State::Missing | State::Destroyed if self.settling() => return Some(self.soon()),
            State::Paused if self.session.pool.is_some() || self.session.places.is_some() => {
                return Some(enter(Phase::Stopping, "the provider has paused it"));
            }
            State::Paused => return Some(enter(Phase::Paused, "the provider has paused it")),
            State::Creating | State::Created | State::Pausing | State::Stopping => return Some(self.soon()),
            State::Stopped if container.exit_code == Some(0) && self.session.pattern == Pattern::Ephemeral => {
                return Some(enter(Phase::Stopped, "its work is done"));
            }
            State::Stopped | State::Failed | State::Missing | State::Destroyed => {
                let what = format!("its container has ended{}", why(container));
                let kept = (self.session.pattern == Pattern::Hybrid || self.rests()) && self.session.archive.is_some();
                return Some(enter(if kept { Phase::Pausing } else { Phase::Failed }, what));
            }
        }
        let told = self.policy.avoid.as_ref().is_none_or(|avoid| *avoid == self.session.avoids);
        // What does not succeed keeps nothing up: it is tried again beside all else.
        if let Some(avoid) = self.policy.avoid.as_ref().filter(|_| !told && self.later().is_none()) {
            return Some(Step::Do(Action::Avoid(avoid.clone())));
        }
        let look_again = self.seen.map_or(self.now, |seen| seen.at + self.policy.look_every);
        let back = self.back();
        let clears = CLEARED.min(self.session.spec.ttl / 4);
        if self.is_left() && self.session.ends - clears <= self.now {
            return Some(enter(Phase::Pausing, LIVED));
        }
        // The provider, or the reconciler, ends it then anyway.
        if self.session.metered_since.is_some() && self.has_lived() {
            let kept = self.policy.pause_by == PauseBy::Archive && self.session.pattern == Pattern::Hybrid;
            if let Some(again) = back.filter(|_| kept) {
                return Some(self.wait(vec![self.session.ends, look_again, again]));
            }
            return Some(enter(if kept { Phase::Pausing } else { Phase::Stopping }, LIVED));
        }
        // It waits to be somebody's, and is nobody's until it is too old.
        if self.session.pool.is_some() {
            return Some(self.wait(vec![self.session.ends, look_again]));
        }
        if let Some((_, why)) = self.drained().filter(|(until, _)| *until <= self.now) {
            if let Some(again) = back.filter(|_| self.quiet() == Phase::Pausing) {
                return Some(self.wait(vec![self.session.ends, look_again, again]));
            }
            return Some(self.later().unwrap_or_else(|| enter(self.quiet(), why)));
        }
        if self.session.wanted == Wanted::Paused && self.policy.pause_by != PauseBy::Nothing {
            return Some(enter(Phase::Pausing, "somebody asked for it"));
        }
        self.work()
    }

    fn has_lived(&self) -> bool {
        self.session.made.is_some_and(|made| made + self.session.spec.ttl <= self.now)
    }

    /// Until when what works may go on where its container is, and why no longer.
    fn drained(&self) -> Option<(Timestamp, &'static str)> {
        let all = self.policy.drained.map(|until| (until, DRAINED));
        let node = self.policy.node_drained.map(|until| (until, NODE_DRAINED));
        all.into_iter().chain(node).min()
    }

    /// What has ended is there as if it had been paused.
    fn sleeps_on_disk(&self) -> bool {
        self.policy.pause_by == PauseBy::Provider && self.session.pattern == Pattern::Hybrid
    }

    /// What becomes of one whose container is taken away: what it has is put away while there is time, and nobody calls it a failure.
    fn disrupted(&self, container: &Sandbox) -> Option<Step> {
        let why = self.session.disrupted.as_ref()?;
        if self.session.pool.is_some() {
            return Some(enter(Phase::Stopping, why));
        }
        // What a provider ends when it was told to is not taken away.
        let why = if self.has_lived() { LIVED } else { why };
        let there = match container.state {
            State::Stopped => self.sleeps_on_disk(),
            State::Failed | State::Missing | State::Destroyed => false,
            State::Creating
            | State::Created
            | State::Running
            | State::Pausing
            | State::Paused
            | State::Stopping
            | State::Unknown(_) => true,
        };
        let kept = there || self.session.archive.is_some();
        Some(enter(if kept { self.quiet() } else { Phase::Stopping }, why))
    }

    /// One that is back because it could not be put away: that is not tried all the time, but again then.
    fn back(&self) -> Option<Timestamp> {
        let back = self.session.phase == Phase::Idle && self.session.reason.is_some();
        Some(self.session.since + BACK).filter(|again| back && *again > self.now)
    }

    /// What follows from what the sidecar says of its agents.
    fn work(&self) -> Maybe {
        let look_again = self.seen.map_or(self.now, |seen| seen.at + self.policy.look_every);
        let mut wake = vec![self.session.ends, look_again];
        wake.extend(self.drained().map(|(until, _)| until));
        let busy_until = self.session.report.as_ref().and_then(|report| report.busy_until).filter(|until| *until > self.now);
        if let Some(until) = busy_until {
            if self.session.phase != Phase::Active {
                return Some(Step::Enter(Phase::Active, None));
            }
            if let Some(ahead) = self.policy.keep_alive {
                let wanted = (self.now + ahead).min(self.session.ends);
                // Again when half of it is over, and never beyond the end.
                let again = self.session.kept_until.map(|kept| kept - ahead / 2);
                let whole = self.session.kept_until >= Some(self.session.ends);
                if !whole && again.is_none_or(|again| again <= self.now) {
                    return Some(self.later().unwrap_or(Step::Do(Action::KeepAlive(wanted))));
                }
                wake.extend(again.filter(|_| !whole));
            }
            wake.push(until);
            return Some(self.wait(wake));
        }
        if self.session.phase == Phase::Active {
            return Some(Step::Enter(Phase::Idle, None));
        }
        // By its own word alone: who has never heard of it does not know.
        if let (Some(since), Some(_)) = (self.session.idle_since, &self.session.report) {
            let aged = self.policy.recycle.age.and_then(|age| Some(self.session.made? + age));
            let idle = match &self.session.places {
                // One of several is idle when nobody is in it.
                Some(places) => places.empty_since.map(|empty| empty.max(since) + self.policy.idle_after.unwrap_or(EMPTY)),
                None => self.policy.idle_after.map(|after| (since + after).max(self.back().unwrap_or(since))),
            };
            let quiet = self.quiet();
            if idle.is_some_and(|at| at <= self.now) {
                let why = if self.session.places.is_some() { "nobody is in it" } else { "its agent is idle" };
                return Some(self.later().unwrap_or_else(|| enter(quiet, why)));
            }
            let drained = self.drained().map(|(_, why)| why.to_owned());
            // Who was woken, or has just begun, is first to do what it was wanted for.
            let calm = since + self.policy.look_every;
            let worked = self.session.phase == Phase::Idle && calm <= self.now;
            let recycled = self.policy.recycle.due(self.session, self.now).filter(|_| worked);
            if let Some(why) = drained.or(recycled) {
                let Some(again) = self.back() else {
                    return Some(self.later().unwrap_or_else(|| enter(quiet, why)));
                };
                wake.push(again);
            }
            wake.extend(Some(calm).filter(|at| *at > self.now));
            wake.extend(idle);
            wake.extend(aged.filter(|at| *at > self.now));
        }
        Some(self.wait(wake))
    }

    /// What becomes of one that is not to go on here.
    fn quiet(&self) -> Phase {
        if self.rests() || self.is_left() { Phase::Pausing } else { Phase::Stopping }
    }

    /// Whether it can go on later.
    fn rests(&self) -> bool {
        let can = self.policy.pause_by != PauseBy::Nothing;
        can && (self.session.pattern == Pattern::Hybrid || self.session.place.is_some())
    }

    /// Whether somebody is in it who is to be put away before it ends.
    fn is_left(&self) -> bool {
        self.policy.clears && self.session.places.as_ref().is_some_and(|places| !places.taken.is_empty())
    }

    /// Of several: those in it are put away as long as it stands, and it ends when they are, or have had long enough.
    fn clearing(&self) -> Maybe {
        let until = self.session.since + CLEARED;
        if !self.is_left() || until <= self.now {
            return Some(Step::Enter(Phase::Stopping, self.session.reason.clone()));
        }
        let container = match self.look(self.policy.look_every) {
            Ok(container) => container,
            Err(step) => return Some(self.later().unwrap_or(step)),
        };
        if matches!(container.state, State::Stopped | State::Failed | State::Missing | State::Destroyed) {
            return Some(match &self.session.disrupted {
                Some(why) => enter(Phase::Stopping, why),
                None => enter(Phase::Failed, format!("its container has ended{}", why(container))),
            });
        }
        let look_again = self.seen.map_or(self.now, |seen| seen.at + self.policy.look_every);
        Some(self.wait(vec![until, self.session.ends, look_again]))
    }

    fn pausing(&self) -> Maybe {
        if let Some(step) = self.unwanted().or_else(|| self.hooks()) {
            return Some(step);
        }
        if self.session.places.is_some() {
            return self.clearing();
        }
        let disrupted = self.session.disrupted.as_ref();
        if !self.session.holds {
            return Some(Step::Enter(Phase::Paused, disrupted.cloned()));
        }
        let in_vain = !self.session.persisted
            && match disrupted {
                None => self.session.failures >= self.policy.tries,
                Some(_) => self.session.since + LAST_WORDS <= self.now,
            };
        match disrupted {
            None if in_vain => return Some(enter(Phase::Idle, format!("it could not be put away: {}", self.reason()))),
            Some(why) if in_vain && self.session.archive.is_none() => {
                return Some(enter(Phase::Stopping, format!("{why}; it could not be put away: {}", self.reason())));
            }
            _ => {}
        }
        if let Some(step) = self.later() {
            return Some(step);
        }
        let container = match self.look(LOOK_SOON) {
            Ok(container) => container,
            Err(step) => return Some(step),
        };
        let ended = matches!(container.state, State::Stopped | State::Failed | State::Missing | State::Destroyed);
        let by_provider = self.policy.pause_by == PauseBy::Provider;
        let busy = self.session.report.as_ref().and_then(|report| report.busy_until).is_some_and(|until| until > self.now);
        // There is no waiting for it any more.
        let late = disrupted.is_some() || self.drained().is_some_and(|(until, _)| until <= self.now);
        // What was put away is not all of it any more.
        if busy && !self.has_lived() && !late && container.state == State::Running && self.policy.pause_by == PauseBy::Archive {
            return Some(Step::Enter(Phase::Idle, None));
        }
        Some(match &container.state {
            State::Paused if by_provider => Step::Enter(Phase::Paused, None),
            State::Stopped if by_provider && disrupted.is_some() => Step::Enter(Phase::Paused, disrupted.cloned()),
            State::Running if by_provider => Step::Do(Action::Pause),
            // What was put away before is what there is.
            _ if ended && (self.session.persisted || self.session.archive.is_some()) => Step::Do(Action::Delete),
            _ if ended && let Some(why) = disrupted => enter(Phase::Stopping, format!("{why}; it ended before it was put away")),
            _ if ended => enter(Phase::Failed, format!("it ended before it was put away{}", why(container))),
            _ if by_provider => self.soon(),
            // What was put away before is what there is.
            _ if in_vain => Step::Do(Action::Delete),
            _ if self.session.persisted && self.session.failures >= self.policy.tries => Step::Do(Action::Delete),
            _ if self.session.persisted => Step::Do(Action::Stop),
            State::Running => Step::Do(Action::Persist),
            // Its sidecar may still answer.
            State::Stopping if disrupted.is_some() => Step::Do(Action::Persist),
            _ => self.soon(),
        })
    }

    fn paused(&self) -> Maybe {
        if let Some(step) = self.unwanted().or_else(|| self.hooks()) {
            return Some(step);
        }
        if self.session.wanted == Wanted::Running && self.policy.drained.is_some() {
            return Some(self.wait(vec![self.session.ends, self.now + DRAINED_AGAIN]));
        }
        if self.session.wanted == Wanted::Running {
            return Some(Step::Enter(Phase::Resuming, None));
        }
        Some(self.wait(vec![self.session.ends, self.now + SLEEP]))
    }

    fn resuming(&self) -> Maybe {
        if let Some(step) = self.unwanted().or_else(|| self.late("resumed")).or_else(|| self.hooks()).or_else(|| self.later()) {
            return Some(step);
        }
        if !self.session.holds {
            return Some(Step::Enter(Phase::Creating, None));
        }
        let container = match self.look(LOOK_SOON) {
            Ok(container) => container,
            Err(step) => return Some(step),
        };
        Some(match container.state {
            State::Paused | State::Stopped => Step::Do(Action::Resume),
            State::Running => Step::Enter(Phase::Starting, None),
            State::Missing | State::Destroyed | State::Failed => {
                enter(Phase::Failed, format!("its paused container is gone{}", why(container)))
            }
            State::Creating | State::Created | State::Pausing | State::Stopping | State::Unknown(_) => self.soon(),
        })
    }

    fn stopping(&self) -> Maybe {
        if let Some(step) = self.hooks() {
            return Some(step);
        }
        // What does not end when it is asked to is ended by force, when it is removed.
        if !self.session.holds || self.session.failures >= self.policy.tries {
            return Some(Step::Enter(Phase::Stopped, None));
        }
        if let Some(step) = self.later() {
            return Some(step);
        }
        let container = match self.look(LOOK_SOON) {
            Ok(container) => container,
            Err(step) => return Some(step),
        };
        Some(match container.state {
            State::Missing | State::Destroyed if self.settling() => self.soon(),
            State::Stopped | State::Failed | State::Missing | State::Destroyed | State::Created => {
                Step::Enter(Phase::Stopped, None)
            }
            State::Running | State::Paused | State::Pausing | State::Creating | State::Stopping | State::Unknown(_) => {
                Step::Do(Action::Stop)
            }
        })
    }

    /// What is left of a container is removed, however often that has to be tried.
    fn removing(&self) -> Maybe {
        if let Some(step) = self.hooks() {
            return Some(step);
        }
        if !self.session.holds {
            return (self.session.phase == Phase::Stopped).then_some(Step::Enter(Phase::Destroyed, None));
        }
        Some(self.later().unwrap_or_else(|| self.removed()))
    }

    /// As often as it takes until it is gone.
    fn removed(&self) -> Step {
        match self.look(LOOK_SOON) {
            // One that is gone is no longer held: see `saw`. It may only not be there yet.
            Ok(container) if container.state.is_gone() => self.soon(),
            Ok(_) => Step::Do(Action::Delete),
            // What nobody can read is removed all the same: that it is gone is seen when it is.
            Err(_) if self.session.failures >= self.policy.tries && self.session.native.is_some() => Step::Do(Action::Delete),
            Err(look) => look,
        }
    }

    /// What is not wanted any more, or whose time is over.
    fn unwanted(&self) -> Maybe {
        if self.session.wanted == Wanted::Gone {
            return Some(Step::Enter(Phase::Stopping, self.session.reason.clone()));
        }
        (self.session.ends <= self.now).then(|| enter(Phase::Stopping, "its time is over"))
    }

    /// A provider that is away for a while is waited for as long as a container may take.
    fn late(&self, what: &str) -> Maybe {
        // One that is taken away has as long again to be gone.
        let within = self.policy.ready_within * if self.session.disrupted.is_some() { 2 } else { 1 };
        let late = self.session.since + within <= self.now;
        let seconds = within.as_secs();
        late.then(|| enter(Phase::Failed, format!("it was not {what} within {seconds} s{}", self.last_words())))
    }

    /// What is known of why: that an image cannot be pulled is said by the container alone.
    fn last_words(&self) -> String {
        let seen = self.seen.map(|seen| &seen.sandbox);
        let session = self.session;
        let reason = session.disrupted.as_ref().or(session.reason.as_ref()).or(seen.and_then(|seen| seen.reason.as_ref()));
        let words = reason.map(String::as_str).or_else(|| match seen?.state {
            State::Running => Some("its container runs, and the sidecar in it does not answer"),
            State::Creating => Some("its container is still being made"),
            State::Created
            | State::Pausing
            | State::Paused
            | State::Stopping
            | State::Stopped
            | State::Failed
            | State::Destroyed
            | State::Missing
            | State::Unknown(_) => None,
        });
        words.map_or_else(String::new, |words| format!(": {words}"))
    }

    fn reason(&self) -> &str {
        self.session.reason.as_deref().unwrap_or("nobody knows why")
    }

    fn hooks(&self) -> Maybe {
        (!self.session.hooked).then(|| self.later().unwrap_or(Step::Do(Action::Hooks)))
    }

    /// What has failed is not tried again at once.
    fn later(&self) -> Maybe {
        self.session.retry_at.filter(|at| *at > self.now).map(|at| {
            // Its end is not waited past.
            let ends = Some(self.session.ends).filter(|ends| *ends > self.now);
            Step::Wait(Some(ends.map_or(at, |ends| ends.min(at))))
        })
    }

    /// What it is doing, if that was seen lately.
    fn look(&self, every: Duration) -> Result<&Sandbox, Step> {
        match self.seen {
            Some(seen) if seen.at + every > self.now => Ok(&seen.sandbox),
            _ => Err(Step::Do(Action::Look)),
        }
    }

    fn settling(&self) -> bool {
        settling(self.session, self.policy, self.now)
    }

    /// It is about to change: looked at again.
    fn soon(&self) -> Step {
        match self.look(LOOK_SOON) {
            Ok(_) => Step::Wait(self.seen.map(|seen| seen.at + LOOK_SOON)),
            Err(look) => look,
        }
    }

    fn wait(&self, until: Vec<Timestamp>) -> Step {
        Step::Wait(until.into_iter().min())
    }
}

/// Whether it may be there though the provider does not know it yet.
fn settling(session: &Session, policy: &Policy, now: Timestamp) -> bool {
    session.made.is_some_and(|made| made + policy.settle > now)
}

/// What a code says that is no program's own: of who could not run it, or of the signal that ended it.
fn meaning(code: i32) -> Option<&'static str> {
    Some(match code {
        125 => "what was to run its command could not begin",
        126 => "its command cannot be executed",
        127 => "its command was not found",
        134 => "aborted",
        137 => "killed; if nobody did it, for want of memory",
        139 => "a segmentation fault",
        143 => "told to end",
        _ => return None,
    })
}

fn why(container: &Sandbox) -> String {
    let meant = container.exit_code.and_then(meaning).map(str::to_owned);
    match (container.exit_code, container.reason.clone().or(meant)) {
        (Some(code), Some(reason)) => format!(" (exit code {code}: {reason})"),
        (Some(code), None) => format!(" (exit code {code})"),
        (None, Some(reason)) => format!(" ({reason})"),
        (None, None) => String::new(),
    }
}

/// A session comes into a phase.
///
/// # Panics
/// In tests, when that phase may not follow.
pub fn enter_phase(session: &mut Session, phase: Phase, reason: Option<String>, price: &Price, now: Timestamp) {
    debug_assert!(session.phase.leads_to(phase), "{} does not lead to {phase}", session.phase);
    meter(session, price, now);
    if session.phase == Phase::Starting && matches!(phase, Phase::Creating | Phase::Resuming) {
        session.lost += 1;
    }
    if phase == Phase::Creating && session.phase != Phase::Requested {
        session.generation += 1;
        session.native = None;
        session.node = None;
        session.taken = None;
        session.warm = None;
        session.hydrated = false;
        session.disrupted = None;
        // What its container had to end before holds for no other.
        session.ends = session.own_ends.take().unwrap_or(session.ends);
    }
    session.idle_since = matches!(phase, Phase::Ready | Phase::Idle).then_some(now);
    match phase {
        Phase::Pausing => (session.persisted, session.lost) = (false, 0),
        Phase::Starting => session.kept_until = None,
        Phase::Ready => session.lost = 0,
        Phase::Resuming => (session.kept_until, session.disrupted) = (None, None),
        _ => {}
    }
    session.wanted = match (session.wanted, phase) {
        // It rests until somebody wants something of it, also if that is while it is put away.
        (Wanted::Running, Phase::Pausing) => Wanted::Paused,
        (Wanted::Running, Phase::Paused) if session.phase != Phase::Pausing => Wanted::Paused,
        // It could not be put away: that is not tried for ever.
        (Wanted::Paused, Phase::Idle) => Wanted::Running,
        (wanted, _) => wanted,
    };
    session.phase = phase;
    session.since = now;
    session.hooked = false;
    session.failures = 0;
    session.retry_at = None;
    // Why it ended is what is asked of one that is over.
    if reason.is_some() || !matches!(phase, Phase::Stopped | Phase::Destroyed) {
        session.reason = reason;
    }
}

/// What is to be kept before an action is done; says whether that is anything.
pub fn about_to(session: &mut Session, action: &Action, now: Timestamp) -> bool {
    if *action != Action::Create {
        return false;
    }
    // From here on there may be one, whoever dies.
    session.holds = true;
    session.made = Some(now);
    session.metered_since.get_or_insert(now);
    true
}

/// What came of an action, and what was seen by it.
pub fn record(session: &mut Session, action: &Action, outcome: &Outcome, policy: &Policy, price: &Price, now: Timestamp) {
    match outcome {
        Outcome::Failed(provider::Error::Missing { .. }) if *action == Action::Delete => {}
        Outcome::Failed(error) => return failed(session, action, error, policy, price, now),
        Outcome::Vetoed(why) => {
            session.reason = Some(why.clone());
            session.hooked = true;
            if session.phase.can_be_vetoed() {
                enter_phase(session, Phase::Failed, Some(why.clone()), price, now);
            }
            return;
        }
        Outcome::Later(at) => {
            session.retry_at = Some(*at);
            return;
        }
        Outcome::Made(sandbox) => {
            made(session, sandbox, now);
            session.node.clone_from(&sandbox.node);
            session.avoids = policy.avoid.clone().unwrap_or_default();
        }
        Outcome::Answered(true) => enter_phase(session, Phase::Ready, None, price, now),
        Outcome::Answered(false) => {
            session.retry_at = Some(now + LOOK_SOON / 4);
            return;
        }
        Outcome::Persisted(name) => {
            session.archive = Some(name.clone());
            session.persisted = true;
        }
        Outcome::Done => match action {
            Action::Hooks => session.hooked = true,
            Action::Hydrate => session.hydrated = true,
            Action::KeepAlive(until) => session.kept_until = Some(*until),
            Action::Avoid(nodes) => session.avoids.clone_from(nodes),
            Action::Resume => session.avoids = policy.avoid.clone().unwrap_or_default(),
            Action::Create
            | Action::Look
            | Action::Start
            | Action::Ask
            | Action::Pause
            | Action::Persist
            | Action::Stop
            | Action::Delete => {}
        },
    }
    session.failures = 0;
    session.retry_at = None;
}

/// What a container was seen to do: one that is to be gone, and is, is held no longer.
pub fn saw(session: &mut Session, sandbox: &Sandbox, policy: &Policy, price: &Price, now: Timestamp) {
    // A list may say less of it than who asks for it alone is told.
    if session.native.is_some() || sandbox.node.is_some() {
        session.node.clone_from(&sandbox.node);
    }
    if session.native.is_none() && !sandbox.state.is_gone() {
        made(session, sandbox, now);
    }
    if session.disrupted.is_none() && !asked_to_end(session, policy) && !forgotten(session, sandbox, policy, now) {
        session.disrupted.clone_from(&sandbox.disrupted);
    }
    // What holds it up is all that is known when it is gone. Why somebody wants its end is not lost for that.
    if session.phase == Phase::Starting && session.wanted == Wanted::Running && sandbox.reason.is_some() {
        session.reason.clone_from(&sandbox.reason);
    }
    let to_be_gone = match session.phase {
        Phase::Stopping | Phase::Stopped | Phase::Failed => true,
        // Another is made.
        Phase::Starting => session.disrupted.is_some() && !begun(session),
        Phase::Pausing => policy.pause_by == PauseBy::Archive && (session.persisted || session.archive.is_some()),
        _ => false,
    };
    if to_be_gone && sandbox.state.is_gone() && !settling(session, policy, now) {
        meter(session, price, now);
        session.holds = false;
        session.node = None;
        session.metered_since = None;
        session.made = None;
        session.cost_before_usd = session.cost_usd();
        session.report = None;
    }
}

/// Whether it may be gone because it had ended, so long ago that its provider has removed it. What is known to have been there later was taken away.
fn forgotten(session: &Session, sandbox: &Sandbox, policy: &Policy, now: Timestamp) -> bool {
    let there = session.made.max(session.report.as_ref().map(|report| report.at));
    let long_ago = policy.forgets.is_some_and(|after| there.is_none_or(|there| there + after <= now));
    sandbox.state.is_gone() && long_ago
}

/// Whether there is something in a container that is not ready yet, and nowhere else: it sleeps in there, or its agent has been at work before anybody asked.
fn begun(session: &Session) -> bool {
    let works = |report: &Report| report.at < session.since || report.busy_until.is_some() || report.cost_usd > 0.0;
    session.archive.is_none() && session.report.as_ref().is_some_and(works)
}

/// Whether its container ends because we want it to.
fn asked_to_end(session: &Session, policy: &Policy) -> bool {
    match session.phase {
        Phase::Requested | Phase::Creating | Phase::Starting | Phase::Ready | Phase::Active | Phase::Idle => false,
        // Before what it has was put away nobody has ended it.
        Phase::Pausing => session.persisted || policy.pause_by != PauseBy::Archive,
        Phase::Paused | Phase::Resuming | Phase::Stopping | Phase::Stopped | Phase::Destroyed | Phase::Failed => true,
    }
}

/// What its sidecar has said. One that says less than before has begun anew, and what was before is not forgotten.
pub fn heard(session: &mut Session, report: &Report) {
    // An answer that was on its way while the sidecar spoke by itself is older than that.
    if session.report.as_ref().is_some_and(|last| last.at > report.at) {
        return;
    }
    if let Some(last) = &session.report
        && report.cost_usd + ROUNDED < last.cost_usd
    {
        session.cost_before_usd += last.cost_usd;
    }
    if report.conversation.is_some() {
        session.conversation.clone_from(&report.conversation);
    }
    if let (None, Some(made), Some(memory)) = (session.warm, session.made, report.memory_bytes)
        && made + WARM <= report.at
    {
        session.warm = Some((report.at, memory));
    }
    session.report = Some(report.clone());
}

fn failed(session: &mut Session, action: &Action, error: &provider::Error, policy: &Policy, price: &Price, now: Timestamp) {
    session.reason = Some(error.to_string());
    // What cannot be done for this session, ever.
    if !error.is_passing() {
        match action {
            Action::Create | Action::Start | Action::Hydrate | Action::Resume => {
                return enter_phase(session, Phase::Failed, Some(error.to_string()), price, now);
            }
            Action::Pause | Action::Persist => session.failures = policy.tries.saturating_sub(1),
            Action::Stop => session.failures = policy.tries.saturating_sub(1),
            // The provider's timer is only behind ours.
            Action::KeepAlive(until) => session.kept_until = Some(*until),
            // It is placed anew as it would have been.
            Action::Avoid(nodes) => session.avoids.clone_from(nodes),
            Action::Hooks | Action::Look | Action::Ask | Action::Delete => {}
        }
    }
    session.failures = session.failures.saturating_add(1);
    // Of one that is taken away there is soon nothing left to ask for.
    let hurries = *action == Action::Persist && session.disrupted.is_some();
    let failures = if hurries { 1 } else { session.failures };
    let doubled = policy.backoff.saturating_mul(1 << (failures - 1).min(10)).min(BACKOFF_MOST);
    let asked = match error {
        provider::Error::Busy { after: Some(after), .. } => (*after).min(BACKOFF_MOST),
        _ => Duration::ZERO,
    };
    session.retry_at = Some(now + doubled.max(asked));
}

/// There is a container, and it is paid for since it was made: not since that was tried first, which may have been refused for a while.
fn made(session: &mut Session, sandbox: &Sandbox, now: Timestamp) {
    if session.native.is_none() {
        let created = sandbox.created.map(|created| created.min(now));
        session.metered_since = session.metered_since.map(|tried| created.map_or(tried, |created| created.max(tried)));
    }
    session.native = Some(sandbox.native.clone());
}

/// Adds up what the container has cost since it was last asked. As long as none is known there may be none, and nothing is added: once it is, it is
/// paid for from its beginning.
pub fn meter(session: &mut Session, price: &Price, now: Timestamp) {
    let Some(since) = session.metered_since.filter(|_| session.holds && session.native.is_some()) else { return };
    let seconds = now.duration_since(since).as_secs_f64().max(0.0);
    let rate = match session.phase {
        Phase::Paused => price.paused,
        Phase::Stopped => price.stopped,
        _ => price.running,
    };
    session.container_seconds += seconds;
    session.container_usd += seconds / 3600.0 * rate;
    // Whose clock is behind has nothing counted twice.
    session.metered_since = Some(now.max(since));
}

/// Containers with our label that no session holds: of a fleet's own, and old enough that nobody is about to write down that they are theirs. Those
/// that are older than the store are not: it may be the wrong one, or a new one in the place of one that was lost. Those whose age nobody says may be
/// either, and are not.
pub fn orphans<'a>(
    found: &'a [Sandbox],
    sessions: &BTreeMap<SessionId, Session>,
    born: Timestamp,
    grace: Duration,
    now: Timestamp,
) -> Vec<&'a Sandbox> {
    let held: BTreeSet<String> = sessions.values().filter(|session| session.holds).map(Session::key).collect();
    let young = |created: Timestamp| created + grace > now;
    let before = |created: Timestamp| created < born;
    let labelled = |sandbox: &Sandbox| sandbox.labels.contains_key(SESSION_LABEL) && sandbox.labels.contains_key(KEY_LABEL);
    found
        .iter()
        .filter(|sandbox| labelled(sandbox) && !sandbox.state.is_gone())
        .filter(|sandbox| sandbox.created.is_some_and(|created| !young(created) && !before(created)))
        .filter(|sandbox| sandbox.key.as_ref().is_none_or(|key| !held.contains(key)))
        .collect()
}

//! Containers made ahead, so that who asks for a session does not wait for one.
//!
//! One that is made ahead is a session of nobody's (`tenant` and `owner` are empty, and its hooks are not run): kept, driven, paid for and removed like every
//! other. A session that comes to be created takes the container of one that fits, in one write of both, or has its own made. So there is no
//! moment at which two have it or none has, whoever dies.
//!
//! ```text
//!   spare:   requested ─► creating ─► starting ─► ready ─┬─► stopped ─► destroyed    its container is another's
//!                                                        │ update_both
//!   session:             requested ─► creating ──────────┴─► starting ─► ready ─► …
//! ```
//!
//! What fits is decided by what they are made of ([`kind`]): a session whose environment is its own never gets what was made ahead, nor does one whose
//! template was changed since.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::config::{TENANT_LABEL, Template};
use crate::drain::node_of;
use crate::lifecycle::Phase;
use crate::metric::{POOL_CLAIMS, POOL_FAILURES};
use crate::plan::{self, NODE_DRAINED};
use crate::provider::{FLEET_LABEL, KEY_LABEL, Price, SESSION_LABEL, Spec};
use crate::service::{Error, Fleet};
use crate::session::{Pattern, Session, SessionId, Wanted};
use crate::store::{self, Filter};

/// How many that fit are tried before a session has its own made: others try at the same time.
const TRIES: usize = 8;
/// How often it is begun again where somebody has written to one that is still there: a fifth of a second in all.
const ROUNDS: u64 = 20;
/// How often what is there is held against what is to be there.
const EVERY: Duration = Duration::from_secs(2);
/// Where there is none: only what is left of one that was there has to go.
const SELDOM: Duration = Duration::from_secs(60);
/// Many who take at once are one reason to look.
const BREATH: Duration = Duration::from_millis(200);
/// After the first that has failed nothing is made for so long, then twice as long, up to the most.
const BACKOFF: Duration = Duration::from_secs(5);
const BACKOFF_MOST: Duration = Duration::from_secs(600);
/// One that has been up for so long works, or half of its time, where that is less: one that came up and ended at once does not.
const LIVED: Duration = Duration::from_secs(60);
const MINUTE: Duration = Duration::from_secs(60);

/// How many are made ahead, as a template says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    pub size: usize,
    /// After this it is nobody's, and another takes its place.
    pub max_age: Duration,
    /// How many are made in a minute, at most.
    pub per_minute: usize,
}

/// A pool, and what its containers are made of.
#[derive(Clone, Debug)]
pub struct Ahead {
    pub template: String,
    pub pool: Pool,
    pub provider: String,
    pub pattern: Pattern,
    /// As of a session of nobody's.
    pub spec: Spec,
}

impl Ahead {
    /// `None`: nothing of it is made ahead.
    pub fn of(template: &Template, fleet: &str) -> Option<Self> {
        let mut pool = template.pool.clone()?;
        let mut spec = template.spec_for(fleet, &SessionId::fresh(), "", 1);
        // It is nobody's.
        spec.labels.remove(TENANT_LABEL);
        // Nobody keeps it awake: it is given away, or replaced, before its provider puts it to sleep.
        if let Some(idle) = spec.idle {
            pool.max_age = pool.max_age.min(idle / 2);
        }
        let (provider, pattern) = (template.provider.clone(), template.pattern);
        Some(Self { template: template.name.clone(), pool, provider, pattern, spec })
    }

    pub fn kind(&self) -> String {
        kind(&self.provider, &self.spec)
    }

    /// One that is asked for by nobody.
    pub fn spare(&self, now: Timestamp) -> Session {
        let id = SessionId::fresh();
        let mut spare = Session::new(id, ("", ""), self.pattern, &self.provider, self.spec.clone(), now);
        spare.pool = Some(self.kind());
        spare.ends = now + self.pool.max_age;
        spare
    }
}

/// Which sessions a container fits: those that are made of the same at the same provider, whoever they are.
pub fn kind(provider: &str, spec: &Spec) -> String {
    let mut same = spec.clone();
    same.key.clear();
    // A trace is each session's own.
    same.env.remove(crate::trace::VARIABLE);
    for label in [FLEET_LABEL, KEY_LABEL, SESSION_LABEL, TENANT_LABEL] {
        same.labels.remove(label);
    }
    // Maps are in order: the same is written alike.
    let written = serde_json::to_string(&(provider, &same)).unwrap_or_default();
    let digest = ring::digest::digest(&ring::digest::SHA256, written.as_bytes());
    digest.as_ref().iter().take(16).fold(String::new(), |mut hex, byte| {
        // A String takes everything.
        write!(hex, "{byte:02x}").ok();
        hex
    })
}

/// Whether a session has its container from a pool, if there is one: none was made for it, and none may have been.
pub fn may_take(session: &Session) -> bool {
    let none = session.native.is_none() && !session.holds;
    // What was put away is there before its agent begins, in a container of its own.
    session.phase == Phase::Creating && none && session.pool.is_none() && session.archive.is_none()
}

/// Whether a spare may be given away now.
pub fn may_give(spare: &Session, now: Timestamp) -> bool {
    let works = spare.report.as_ref().and_then(|report| report.busy_until).is_some_and(|until| until > now);
    spare.spare().is_some() && spare.ends > now && !works && spare.disrupted.is_none()
}

/// The container goes over. What it has cost until now is nobody's, and from now on the session's.
pub fn hand_over(spare: &mut Session, session: &mut Session, price: &Price, now: Timestamp) {
    let why = Some(format!("its container is session {}'s", session.id));
    plan::meter(spare, price, now);
    session.taken = Some(spare.key());
    session.native = spare.native.take();
    session.node = spare.node.take();
    session.made = spare.made.take();
    // Who comes into it later is to end before it does: its life began when it was made.
    if let (Some(_), Some(made)) = (&session.places, session.made) {
        session.end_by(made + session.spec.ttl);
    }
    session.metered_since = Some(now);
    session.holds = true;
    plan::enter_phase(spare, Phase::Stopped, why, price, now);
    spare.given = Some(session.id.clone());
    spare.holds = false;
    spare.metered_since = None;
    spare.report = None;
}

/// What is to be done for a pool.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Make one more.
    Make,
    /// This one is not needed.
    Discard(SessionId, &'static str),
}

/// What is known of the making of a pool's containers: kept by whose duty it is, and begun anew by the next.
#[derive(Clone, Debug, Default)]
pub struct Refill {
    /// When the last of them were asked for.
    made: Vec<Timestamp>,
    /// Those that have not shown yet whether they work, and when they were first seen up.
    making: BTreeMap<SessionId, Option<Timestamp>>,
    /// How many have failed in a row.
    failures: u32,
    retry_at: Option<Timestamp>,
}

impl Refill {
    pub fn making(&self) -> impl Iterator<Item = &SessionId> {
        self.making.keys()
    }

    pub fn asked(&mut self, id: &SessionId, now: Timestamp) {
        self.made.push(now);
        self.making.insert(id.clone(), None);
    }

    /// What became of one that was asked for: of the session that has its container, if it was given away. `None`: nobody knows it.
    /// Says for how long nothing is made now, if it has failed.
    pub fn saw(&mut self, id: &SessionId, session: Option<&Session>, now: Timestamp) -> Option<Duration> {
        let up = self.making.get_mut(id)?;
        let fate = session.map_or(Fate::Neither, |session| {
            if session.phase.is_up() {
                up.get_or_insert(now);
            }
            fate(session, *up, now)
        });
        match fate {
            Fate::Open => return None,
            Fate::Works => self.failures = 0,
            Fate::Failed => self.failures = self.failures.saturating_add(1),
            Fate::Neither => {}
        }
        self.making.remove(id);
        if fate != Fate::Failed {
            return None;
        }
        let doubled = BACKOFF.saturating_mul(1 << (self.failures - 1).min(10)).min(BACKOFF_MOST);
        self.retry_at = Some(now + doubled);
        Some(doubled)
    }

    /// What is to be done now: `stock` is what there is of it, in whatever phase.
    pub fn next(&mut self, pool: &Pool, stock: &[Session], now: Timestamp) -> Vec<Step> {
        self.made.retain(|made| *made + MINUTE > now);
        let counts = |spare: &&Session| {
            let comes = matches!(spare.phase, Phase::Requested | Phase::Creating | Phase::Starting);
            spare.given.is_none() && spare.wanted == Wanted::Running && (comes || spare.phase.is_up())
        };
        let there: Vec<&Session> = stock.iter().filter(counts).collect();
        // What is about to be too old is replaced before it is.
        let fresh: Vec<&&Session> = there.iter().filter(|spare| spare.ends > now + pool.max_age / 10).collect();
        let mut steps = Vec::new();
        if let Some(surplus) = fresh.len().checked_sub(pool.size) {
            // Those that are not up yet are the least loss; of the others the oldest.
            let mut order: Vec<&&&Session> = fresh.iter().collect();
            order.sort_by_key(|spare| (spare.phase.is_up(), spare.created, spare.id.clone()));
            steps.extend(order.iter().take(surplus).map(|spare| Step::Discard(spare.id.clone(), "there are enough")));
        }
        let mut missing = pool.size.saturating_sub(fresh.len()).min(pool.per_minute.saturating_sub(self.made.len()));
        if self.failures > 0 {
            // One, to see whether it works again.
            let waits = self.retry_at.is_some_and(|at| at > now) || !self.making.is_empty();
            missing = if waits { 0 } else { missing.min(1) };
        }
        steps.extend(std::iter::repeat_n(Step::Make, missing));
        steps
    }
}

/// What one that was asked for says about the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Open,
    Works,
    Failed,
    Neither,
}

fn fate(session: &Session, up: Option<Timestamp>, now: Timestamp) -> Fate {
    // It was given to somebody whom nobody asked about.
    let Some(spare) = session.pool.as_ref().map(|_| session).filter(|spare| spare.given.is_none()) else {
        return match session.phase {
            Phase::Failed => Fate::Failed,
            _ if session.given.is_some() => Fate::Neither,
            Phase::Requested | Phase::Creating | Phase::Starting => Fate::Open,
            phase if phase.is_up() && !lived(session, up, now) => Fate::Open,
            // Whoever has it has done with it what he wanted.
            _ => Fate::Works,
        };
    };
    match spare.phase {
        Phase::Failed => Fate::Failed,
        _ if spare.wanted != Wanted::Running || spare.disrupted.is_some() => Fate::Neither,
        Phase::Requested | Phase::Creating | Phase::Starting => Fate::Open,
        Phase::Ready | Phase::Active | Phase::Idle if !lived(spare, up, now) => Fate::Open,
        Phase::Ready | Phase::Active | Phase::Idle => Fate::Works,
        // Its time is over.
        _ if spare.ends <= now => Fate::Neither,
        // By itself: nobody wanted it to.
        Phase::Pausing | Phase::Paused | Phase::Resuming | Phase::Stopping | Phase::Stopped | Phase::Destroyed => Fate::Failed,
    }
}

fn lived(session: &Session, up: Option<Timestamp>, now: Timestamp) -> bool {
    let life = Duration::try_from(session.ends.duration_since(session.created)).unwrap_or_default();
    up.is_some_and(|up| up + LIVED.min(life / 2) <= now)
}

impl Fleet {
    /// What was made ahead for sessions like this one becomes its own. `None`: it has its own made.
    pub(crate) async fn take(&self, session: &Session) -> Result<Option<Session>, Error> {
        if !may_take(session) || self.pools().is_empty() {
            return Ok(None);
        }
        let kind = kind(&session.provider, &session.spec);
        let Some(ahead) = self.pools().iter().find(|ahead| ahead.kind() == kind) else { return Ok(None) };
        let price = self.provider(&session.provider)?.price(session.spec.size);
        for round in 0..ROUNDS {
            let mut contended = false;
            for spare in self.store().spares(&kind, TRIES).await? {
                let now = self.now();
                if !may_give(&spare, now) || self.node_drained_until(&spare).is_some() {
                    continue;
                }
                let before = spare.clone();
                let (mut spare, mut with) = (spare, session.clone());
                hand_over(&mut spare, &mut with, &price, now);
                self.label(&mut with);
                match self.store().update_both(&mut with, &mut spare).await {
                    Ok(()) => {
                        self.metrics().spent(&before, &spare);
                        self.metrics().add(&POOL_CLAIMS, &["taken"], 1.0);
                        tracing::info!(session = %with.id, container = with.native, "a session has a container that was made ahead");
                        // What it has cost as nobody's is booked, and its place is filled.
                        if let Err(error) = self.store().wake(&spare.id).await {
                            tracing::warn!(session = %spare.id, %error, "what is no longer needed is seen to later");
                        }
                        self.refill.notify_one();
                        return Ok(Some(with));
                    }
                    // It is another's, or was only looked at; or the session is another by now: which of them is seen when it is read again.
                    Err(store::Error::Conflict(_))
                        if self.store().get(&session.id).await?.is_some_and(|kept| kept.version == session.version) =>
                    {
                        contended = true;
                    }
                    Err(store::Error::Conflict(_)) => return Ok(self.store().get(&session.id).await?),
                    Err(error) => return Err(error.into()),
                }
            }
            if !contended {
                break;
            }
            // Out of step with who writes all the time.
            tokio::time::sleep(Duration::from_millis(round)).await;
        }
        self.metrics().add(&POOL_CLAIMS, &["missed"], 1.0);
        tracing::debug!(session = %session.id, template = %ahead.template, "nothing that was made ahead is left");
        Ok(None)
    }

    /// Fills pools again, and empties those that are no longer in the configuration.
    pub(crate) async fn refill_for_ever(self: Arc<Self>) {
        let mut refills = BTreeMap::new();
        loop {
            if let Err(error) = self.refill(&mut refills).await {
                tracing::error!(%error, "what is made ahead cannot be seen to");
            }
            tokio::time::sleep(BREATH).await;
            let every = if self.pools().is_empty() { SELDOM } else { EVERY };
            tokio::select! {
                () = self.refill.notified() => {}
                () = tokio::time::sleep(every) => {}
            }
        }
    }

    /// Once, for all pools, if nobody else does.
    pub async fn refill(&self, refills: &mut BTreeMap<String, Refill>) -> Result<(), Error> {
        let (me, lease) = self.me();
        if !self.store().duty("pools", me, lease).await? {
            refills.clear();
            return Ok(());
        }
        let nobodys = Filter { tenant: Some(String::new()), ..Filter::default() };
        let mut stock: BTreeMap<String, Vec<Session>> = BTreeMap::new();
        for (_, spare) in self.matching(&nobodys).await? {
            stock.entry(spare.pool.clone().unwrap_or_default()).or_default().push(spare);
        }
        let now = self.now();
        let drained = self.store().drains().await?;
        for ahead in self.pools() {
            let kind = ahead.kind();
            if drained.contains_key(&ahead.provider) {
                // What ends there ends for that.
                refills.remove(&kind);
                continue;
            }
            let refill = refills.entry(kind.clone()).or_default();
            for id in refill.making().cloned().collect::<Vec<_>>() {
                let session = self.holder(&id).await?;
                if let Some(wait) = refill.saw(&id, session.as_ref(), now) {
                    let why = session.and_then(|session| session.reason);
                    self.metrics().add(&POOL_FAILURES, &[&ahead.template], 1.0);
                    tracing::warn!(
                        template = ahead.template,
                        session = %id,
                        why,
                        failures = refill.failures,
                        wait_seconds = wait.as_secs(),
                        "what was made ahead has failed; the next is made later"
                    );
                }
            }
            let there = stock.remove(&kind).unwrap_or_default();
            let node_drained = |spare: &Session| node_of(spare).is_some_and(|at| drained.contains_key(&at));
            let (leave, stay): (Vec<Session>, Vec<Session>) = there.into_iter().partition(node_drained);
            for spare in leave.iter().filter(|spare| spare.given.is_none() && spare.wanted != Wanted::Gone) {
                self.want(&spare.id, Wanted::Gone, NODE_DRAINED).await?;
            }
            for step in refill.next(&ahead.pool, &stay, now) {
                match step {
                    Step::Make => {
                        let mut spare = ahead.spare(now);
                        self.label(&mut spare);
                        // Noted first: one that may have been kept has been asked for.
                        refill.asked(&spare.id, now);
                        self.store().insert(&spare).await?;
                        self.due();
                    }
                    Step::Discard(id, why) => drop(self.want(&id, Wanted::Gone, why).await?),
                }
            }
        }
        // Of what nothing is made ahead any more, or in another way.
        for spare in stock.into_values().flatten().filter(|spare| spare.given.is_none() && spare.wanted != Wanted::Gone) {
            self.want(&spare.id, Wanted::Gone, "nothing is made ahead like this any more").await?;
        }
        Ok(())
    }

    /// Whose session this is about: the container of one that was made ahead still says its first name.
    pub async fn holder(&self, id: &SessionId) -> Result<Option<Session>, Error> {
        let Some(session) = self.store().get(id).await? else { return Ok(None) };
        match &session.given {
            Some(to) => Ok(self.store().get(to).await?),
            None => Ok(Some(session)),
        }
    }
}

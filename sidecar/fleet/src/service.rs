//! Drives sessions: does what [`crate::plan`] says, keeps what came of it, and lets go of each until something is due again.
//!
//! ```text
//!   store ──claim──► session ─► next ─► do ─► record ─► kept ─┐
//!                       ▲           └──────────◄──────────────┘ … until there is nothing to do: released, and due again at T
//!   provider's events ──┴── somebody's wish: due at once
//! ```
//!
//! A fleet that dies loses its lease, and another (or it itself, anew) goes on from what was kept.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt};
use jiff::Timestamp;
use tokio::sync::{Notify, Semaphore, broadcast, watch};
use tokio::time::Instant;

use crate::budget::{Budgets, needs};
use crate::config::Tenant;
use crate::conversation::{self, Conversations};
use crate::hook::Verdict;
use crate::inside::Inside;
use crate::lifecycle::Phase;
use crate::metric::{self, Metrics};
use crate::place::{self, App, Found};
use crate::plan::{self, Action, Outcome, PauseBy, Policy, Seen, Step};
use crate::pool::Ahead;
use crate::provider::{self, FLEET_LABEL, KEY_LABEL, Provider, SESSION_LABEL, Sandbox, Secret, State};
use crate::session::{Report, Session, SessionId, Wanted};
use crate::store::{self, Filter, HookRun, Inserted, Store, Within};
use crate::token::Tokens;
use crate::trace::{self, Traces};

mod reported;

pub use reported::{Lease, NotHeard, Told};

/// How long a fleet that is not heard of keeps its sessions, unless somebody says otherwise.
pub const LEASE: Duration = Duration::from_secs(30);
/// How often the store is asked what is due, when nobody says so.
const POLL: Duration = Duration::from_secs(1);
/// A sidecar speaks some hundredths of a second after its container was started: as long as this it is asked again and again, the more seldom the longer it
/// takes, before that it did not answer is written down.
const FIRST_WORD: Duration = Duration::from_secs(1);
const FIRST_WORD_EVERY: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));
/// Phases that who waits for one session has not heard of yet, of all sessions: who missed some looks.
const MOVES: usize = 1024;
/// Sessions that are driven at the same time.
const AT_ONCE: usize = 64;
/// Of these, at most so many of one provider, where there are several: one that hangs does not hold up what the others do.
const OF_ONE: usize = AT_ONCE / 2;
/// How soon one is looked at again whose provider has all it may have.
const HELD_UP: Duration = Duration::from_secs(2);
/// A session whose provider is in no configuration waits for the next one.
const NOBODYS: Duration = Duration::from_secs(300);
/// Steps of one session in one go: more is no way to an end.
const STEPS: usize = 200;
/// How often somebody else may have written in between: where the store is slow, who drives it has its next write waiting already.
const CONFLICTS: u64 = 100;
/// How often everything that exists is held against everything that is kept.
const RECONCILE: Duration = Duration::from_secs(60);
/// A container without a session is younger than this only while it is being made.
const ORPHAN_GRACE: Duration = Duration::from_secs(120);
/// How often conversations are looked for that nobody needs any more.
const SWEEP: Duration = Duration::from_secs(600);
/// How many sessions are read at a time when a fleet begins.
const BEFORE: usize = 500;
/// Pages of a list, at most: a provider that never ends must not keep us for ever.
const PAGES: usize = 1000;

/// What runs when a session comes into a phase.
#[async_trait]
pub trait Hooks: Send + Sync {
    /// Runs what is due of its phase. No and failures are heard where [`Phase::can_be_vetoed`].
    async fn run(&self, session: &Session) -> Verdict;

    /// Runs again what nobody waits for, of whatever phase. When there is more of that.
    async fn beside(&self, _: &Session) -> Option<Timestamp> {
        None
    }

    /// Tells a dead letter once more. `None`: there is none of this key.
    async fn redeliver(&self, _: &Session, _: &str) -> store::Result<Option<HookRun>> {
        Ok(None)
    }
}

/// How each session is treated, from its template.
pub trait Policies: Send + Sync {
    fn policy(&self, session: &Session) -> Policy;
    /// The port of the sidecar in it.
    fn port(&self, session: &Session) -> u16;

    /// The port of the app in it, with the token that is said to it.
    fn app(&self, _session: &Session) -> Option<App> {
        None
    }

    /// What is made ahead.
    fn pools(&self) -> &[Ahead] {
        &[]
    }
}

/// What everybody may ask now.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

pub struct Fleet {
    /// What its containers are labelled with: the same for all that share a store.
    name: String,
    /// This process alone.
    me: String,
    store: Arc<dyn Store>,
    providers: BTreeMap<String, Arc<dyn Provider>>,
    hooks: Arc<dyn Hooks>,
    policies: Arc<dyn Policies>,
    inside: Arc<dyn Inside>,
    budgets: Budgets,
    clock: Clock,
    lease: Duration,
    due: Notify,
    /// Who came into another phase here.
    moves: broadcast::Sender<SessionId>,
    /// Something of what was made ahead was taken.
    pub(crate) refill: Notify,
    /// Where nothing new is made: as it was a moment ago.
    pub(crate) drained: std::sync::RwLock<BTreeMap<String, Timestamp>>,
    /// Who asks for that: what was read first is not written last.
    pub(crate) seeing_drains: tokio::sync::Mutex<()>,
    /// Who asks for a session counts what there is: one at a time.
    admitting: tokio::sync::Mutex<()>,
    /// Who looks for a place in a container: likewise.
    pub(crate) placing: tokio::sync::Mutex<()>,
    metrics: Arc<Metrics>,
    traces: Option<Traces>,
    /// It ends, or has.
    ended: watch::Sender<bool>,
    away: Option<Arc<Conversations>>,
    tokens: Option<Tokens>,
    /// Where containers reach us.
    url: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("there is no provider `{0}`")]
    NoProvider(String),
    #[error("provider `{provider}` {refusals}")]
    Unable { provider: String, refusals: String },
    #[error("tenant `{tenant}` has {most} sessions, which is all it may have")]
    Full { tenant: String, most: u64 },
    #[error("{0}")]
    OverBudget(String),
    #[error("provider `{provider}` is being drained: nothing new is made there")]
    Drained { provider: String },
    #[error(
        "provider `{provider}` does not put containers on nodes of its choice, so none of them can be drained: `agent-fleet drain {provider}` empties all of it"
    )]
    NoNodes { provider: String },
    #[error("session {0} goes round in a circle")]
    Circle(SessionId),
}

impl Fleet {
    pub fn new(
        name: &str,
        store: Arc<dyn Store>,
        providers: BTreeMap<String, Arc<dyn Provider>>,
        (hooks, policies, inside): (Arc<dyn Hooks>, Arc<dyn Policies>, Arc<dyn Inside>),
        tenants: BTreeMap<String, Tenant>,
        clock: Clock,
    ) -> Self {
        let budgets = Budgets::new(Arc::clone(&store), tenants);
        let me = format!("{name}-{}", uuid::Uuid::now_v7());
        let (due, refill, admitting) = (Notify::new(), Notify::new(), tokio::sync::Mutex::default());
        let (name, drained) = (name.to_owned(), std::sync::RwLock::default());
        let (metrics, ended) = (Arc::default(), watch::Sender::new(false));
        Self {
            name,
            me,
            store,
            providers,
            hooks,
            policies,
            inside,
            budgets,
            clock,
            lease: LEASE,
            due,
            moves: broadcast::Sender::new(MOVES),
            refill,
            drained,
            seeing_drains: tokio::sync::Mutex::default(),
            admitting,
            placing: tokio::sync::Mutex::default(),
            metrics,
            traces: None,
            ended,
            away: None,
            tokens: None,
            url: None,
        }
    }

    /// Where conversations are put away.
    #[must_use]
    pub fn with_conversations(self, away: Option<Conversations>) -> Self {
        Self { away: away.map(Arc::new), ..self }
    }

    /// What containers are told of us: what their tokens are made of, and where they reach us.
    #[must_use]
    pub fn with_tokens(self, tokens: Option<Tokens>, url: Option<String>) -> Self {
        Self { tokens, url, ..self }
    }

    #[must_use]
    pub fn with_lease(self, lease: Duration) -> Self {
        Self { lease, ..self }
    }

    #[must_use]
    pub fn with_metrics(self, metrics: Arc<Metrics>) -> Self {
        Self { metrics, ..self }
    }

    /// With a trace of each session.
    #[must_use]
    pub fn with_traces(self, traces: Traces) -> Self {
        Self { traces: Some(traces), ..self }
    }

    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    pub fn budgets(&self) -> &Budgets {
        &self.budgets
    }

    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// For who would listen on for ever.
    pub fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    /// Tells a dead letter of a hook once more.
    pub async fn redeliver(&self, session: &Session, key: &str) -> store::Result<Option<HookRun>> {
        self.hooks.redeliver(session, key).await
    }

    pub fn now(&self) -> Timestamp {
        (self.clock)()
    }

    pub fn provider(&self, name: &str) -> Result<&Arc<dyn Provider>, Error> {
        self.providers.get(name).ok_or_else(|| Error::NoProvider(name.to_owned()))
    }

    pub(crate) fn me(&self) -> (&str, Duration) {
        (&self.me, self.lease)
    }

    pub(crate) fn pools(&self) -> &[Ahead] {
        self.policies.pools()
    }

    /// Who is asked about the sessions in a container, and where.
    pub(crate) fn inside_of(&self, session: &Session) -> (Arc<dyn Inside>, Option<App>) {
        (Arc::clone(&self.inside), self.policies.app(session))
    }

    /// What containers are known by, if what this session has is put away, or what those in it have.
    pub(crate) fn tokens_of(&self, session: &Session) -> Option<Tokens> {
        let mut policy = self.policies.policy(session);
        policy.shared(session);
        self.tokens.clone().filter(|_| policy.pause_by == PauseBy::Archive || policy.clears)
    }

    /// For who waits until one session is in another phase: [`moved`].
    pub(crate) fn moves(&self) -> broadcast::Receiver<SessionId> {
        self.moves.subscribe()
    }

    /// Something is due at once.
    pub(crate) fn due(&self) {
        self.due.notify_one();
    }

    pub fn providers(&self) -> &BTreeMap<String, Arc<dyn Provider>> {
        &self.providers
    }

    /// Keeps a new session, which is then driven. The same id twice is one. Not if it is refused by what its tenant may have, or its provider can.
    pub async fn create(&self, mut session: Session) -> Result<Inserted, Error> {
        let provider = self.provider_of(&session)?;
        if let Some(known) = self.store.get(&session.id).await? {
            return Ok(Inserted::Known(Box::new(known)));
        }
        let can = self.provider(&session.provider)?.capabilities();
        let refusals = provider::refusals(&can, &session.spec);
        if !refusals.is_empty() {
            return Err(Error::Unable { provider: session.provider, refusals: refusals.join("; ") });
        }
        if self.store.drains().await?.contains_key(&session.provider) {
            return Err(Error::Drained { provider: session.provider });
        }
        let _admitting = self.admitting.lock().await;
        let now = self.now();
        let most = self.budgets.tenants().get(&session.tenant).and_then(|tenant| tenant.max_sessions);
        if let Some(most) = most {
            let counts = self.store.count().await?;
            let open = counts.iter().filter(|(phase, _, of, _)| !phase.is_last() && *of == session.tenant);
            // Before anything is set aside for it. Containers of several are none that somebody has asked for.
            if open.map(|(_, _, _, count)| count).sum::<u64>() >= most && self.asked_for(&session.tenant).await? >= most {
                return Err(Error::Full { tenant: session.tenant, most });
            }
        }
        let price = provider.price(session.spec.size);
        if let Err(why) = self.budgets.admit(&session, &price, now).await? {
            return Err(Error::OverBudget(why));
        }
        self.label(&mut session);
        if let Some(traces) = self.traces.as_ref().filter(|_| provider.capabilities().env) {
            let parent = traces.context(&session).to_traceparent();
            session.spec.env.entry(trace::VARIABLE.to_owned()).or_insert(parent);
        }
        let inserted = match most {
            // Another fleet may have counted at the same time.
            Some(most) => self.store.insert_within(&session, Within::Tenant(most)).await,
            None => self.store.insert(&session).await.map(Some),
        };
        let inserted = match (inserted, most) {
            (Ok(None), most) => {
                self.budgets.release(&session, now).await?;
                return Err(Error::Full { tenant: session.tenant, most: most.unwrap_or_default() });
            }
            (Ok(Some(inserted)), _) => Ok(inserted),
            (Err(error), _) => Err(error),
        };
        match &inserted {
            Ok(Inserted::New) => {}
            // Another fleet was asked for the same. What was set aside for it here is not its own, or no more what it has cost.
            Ok(Inserted::Known(known)) if known.tenant != session.tenant => self.budgets.release(&session, now).await?,
            Ok(Inserted::Known(known)) if !known.cost_at.is_empty() || known.is_over() => {
                self.charge(&mut known.as_ref().clone(), &price).await?;
            }
            Ok(Inserted::Known(_)) => {}
            // It may be there all the same.
            Err(_) => {
                if let Ok(None) = self.store.get(&session.id).await {
                    self.budgets.release(&session, now).await?;
                }
            }
        }
        self.due.notify_one();
        Ok(inserted?)
    }

    async fn asked_for(&self, tenant: &str) -> Result<u64, Error> {
        let all = self.matching(&Filter { tenant: Some(tenant.to_owned()), ..Filter::default() }).await?;
        let open = all.values().filter(|session| !session.phase.is_last() && session.places.is_none());
        Ok(open.count().try_into().unwrap_or(u64::MAX))
    }

    /// The container's name and labels, by which it is found again.
    pub(crate) fn label(&self, session: &mut Session) {
        // Which fleet's it is, is in its name.
        session.spec.labels.insert(FLEET_LABEL.to_owned(), self.name.clone());
        let key = session.key();
        session.spec.labels.extend([(SESSION_LABEL.to_owned(), session.id.to_string()), (KEY_LABEL.to_owned(), key.clone())]);
        session.spec.key = key;
    }

    /// Somebody wants something of a session. What it is then; `None`: there is none.
    pub async fn want(&self, id: &SessionId, wanted: Wanted, why: &str) -> Result<Option<Session>, Error> {
        if self.store.want(id, wanted, why, self.now()).await? {
            self.store.wake(id).await?;
            self.due.notify_one();
        }
        Ok(self.store.get(id).await?)
    }

    /// Reads, changes and writes until nobody has written in between.
    async fn change(&self, session: &mut Session, change: impl Fn(&mut Session)) -> Result<(), Error> {
        self.change_so(session, true, change).await
    }

    /// Durably, or so that what is found out again may be.
    async fn change_so(&self, session: &mut Session, durably: bool, change: impl Fn(&mut Session)) -> Result<(), Error> {
        for n in 0..CONFLICTS {
            let mut changed = session.clone();
            change(&mut changed);
            let kept = if durably { self.store.update(&mut changed).await } else { self.store.note(&mut changed).await };
            match kept {
                Ok(()) => {
                    self.metrics.spent(session, &changed);
                    *session = changed;
                    return Ok(());
                }
                Err(store::Error::Conflict(_)) => {
                    // Out of step with who writes all the time, and 5 s in all.
                    tokio::time::sleep(Duration::from_millis(n)).await;
                    let id = &session.id;
                    *session = self.store.get(id).await?.ok_or_else(|| store::Error::Missing(id.clone()))?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::Circle(session.id.clone()))
    }

    /// Drives what is due until it is told to end; what is under way then is finished up to its next step.
    pub async fn run(self: Arc<Self>, mut end: watch::Receiver<bool>) {
        let room = Arc::new(Semaphore::new(AT_ONCE));
        let mut tasks = tokio::task::JoinSet::new();
        // They end with us, however that is.
        let mut beside = tokio::task::JoinSet::new();
        let fleet = Arc::clone(&self);
        beside.spawn(again_and_again("renewing leases", move || Arc::clone(&fleet).renew()));
        let fleet = Arc::clone(&self);
        beside.spawn(again_and_again("listening to providers", move || Arc::clone(&fleet).listen()));
        let fleet = Arc::clone(&self);
        beside.spawn(again_and_again("looking for orphans", move || Arc::clone(&fleet).reconcile_for_ever()));
        let fleet = Arc::clone(&self);
        beside.spawn(again_and_again("removing conversations", move || Arc::clone(&fleet).sweep_for_ever()));
        let fleet = Arc::clone(&self);
        beside.spawn(again_and_again("asking what is drained", move || Arc::clone(&fleet).see_drains_for_ever()));
        let fleet = Arc::clone(&self);
        beside.spawn(again_and_again("making containers ahead", move || Arc::clone(&fleet).refill_for_ever()));
        let of_one = if self.providers.len() > 1 { OF_ONE } else { AT_ONCE };
        let shares: BTreeMap<&String, Arc<Semaphore>> =
            self.providers.keys().map(|name| (name, Arc::new(Semaphore::new(of_one)))).collect();
        // Nothing is made or woken before it is known where it must not be, and nothing put away before it is known whether anything was.
        while !*end.borrow()
            && let Err(error) = self.see_before().await
        {
            tracing::error!(%error, "it is not known what is drained, or was put away");
            tokio::time::sleep(POLL).await;
        }
        while !*end.borrow() {
            let mut held_up = false;
            while tasks.try_join_next().is_some() {}
            let free = room.available_permits();
            let claimed = if free == 0 { Ok(Vec::new()) } else { self.store.claim(&self.me, self.lease, free).await };
            match claimed {
                Ok(sessions) => {
                    for session in sessions {
                        let share = shares.get(&session.provider).map(|share| Arc::clone(share).try_acquire_owned());
                        if let Some(Err(_)) = share {
                            held_up = true;
                            self.release(&session.id, Some(self.now() + HELD_UP)).await;
                            continue;
                        }
                        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { break };
                        let (fleet, mut end) = (Arc::clone(&self), end.clone());
                        tasks.spawn(async move {
                            let wake = fleet.drive_and_release(session, &end).await;
                            drop((permit, share));
                            // There is room for another.
                            fleet.due.notify_one();
                            // What is due before the store is asked again is not late for that.
                            let left = wake.and_then(|at| Duration::try_from(at.duration_since(fleet.now())).ok());
                            if let Some(left) = left.filter(|left| *left < POLL) {
                                tokio::select! {
                                    () = tokio::time::sleep(left) => fleet.due.notify_one(),
                                    _ = end.changed() => {}
                                }
                            }
                        });
                    }
                }
                Err(error) => tracing::error!(%error, "what is due cannot be read"),
            }
            // Behind those that are held up there are others.
            let poll = if held_up { POLL / 20 } else { POLL };
            tokio::select! {
                () = self.due.notified() => {}
                () = tokio::time::sleep(poll) => {}
                _ = end.changed() => {}
            }
        }
        self.ended.send_replace(true);
        // What is under way is finished under our lease.
        while tasks.join_next().await.is_some() {}
        beside.shutdown().await;
    }

    async fn renew(self: Arc<Self>) {
        loop {
            tokio::time::sleep(self.lease / 3).await;
            if let Err(error) = self.store.renew(&self.me, self.lease).await {
                tracing::error!(%error, "the lease cannot be renewed: another fleet may take over");
            }
        }
    }

    async fn drive_and_release(&self, session: Session, end: &watch::Receiver<bool>) -> Option<Timestamp> {
        let id = session.id.clone();
        // A session that is not released is renewed, and driven by nobody.
        let wake = match AssertUnwindSafe(self.drive(session, end)).catch_unwind().await {
            Ok(Ok(wake)) => wake,
            Ok(Err(error @ Error::NoProvider(_))) => {
                tracing::warn!(session = %id, %error, "a session cannot be driven with this configuration");
                Some(self.now() + NOBODYS)
            }
            Ok(Err(error)) => {
                tracing::error!(session = %id, %error, "a session cannot be driven now");
                Some(self.now() + POLL * 5)
            }
            Err(_) => {
                tracing::error!(session = %id, "driving a session has panicked: it is tried again");
                Some(self.now() + POLL * 5)
            }
        };
        self.release(&id, wake).await;
        wake
    }

    async fn release(&self, id: &SessionId, wake: Option<Timestamp>) {
        if let Err(error) = self.store.release(&self.me, id, wake).await {
            tracing::error!(session = %id, %error, "a session cannot be released: it is due when its lease is over");
        }
    }

    /// Does what is to be done, up to when there is nothing for a while. When it is due again.
    pub async fn drive(&self, mut session: Session, end: &watch::Receiver<bool>) -> Result<Option<Timestamp>, Error> {
        let provider = self.provider_of(&session)?;
        let price = provider.price(session.spec.size);
        let mut policy = self.policies.policy(&session);
        policy.drained = self.drained_until(&session.provider);
        policy.forgets = provider.forgets();
        policy.shared(&session);
        let mut seen: Option<Seen> = None;
        // Until when a sidecar may say its first word.
        let mut patience = None;
        // It was told to end, or removed, and may take a while.
        let mut told_to_end = None;
        for _ in 0..STEPS {
            if *end.borrow() {
                return Ok(Some(self.now()));
            }
            // Where it is may have been seen a moment ago.
            policy.node_drained = self.node_drained_until(&session);
            policy.avoid = provider.places_anew().then(|| self.drained_nodes(&session.provider));
            let step = match plan::next(&session, seen.as_ref(), &policy, self.now()) {
                Step::Do(action) if told_to_end.as_ref() == Some(&action) && is_ending(seen.as_ref()) => {
                    Step::Wait(Some(self.now() + POLL))
                }
                step => step,
            };
            match step {
                Step::Wait(until) => {
                    // While it sleeps nobody looks at it, and when it is over nobody will.
                    let wanted = session.wanted;
                    if session.is_over() || session.phase == Phase::Paused && session.holds {
                        self.charge(&mut session, &price).await?;
                    }
                    self.forget(&session).await;
                    if session.wanted == wanted {
                        return Ok(until.into_iter().chain(self.hooks.beside(&session).await).min());
                    }
                }
                Step::Enter(phase, reason) => {
                    let now = self.now();
                    // Who has written meanwhile may have wanted something else: then it is thought over again.
                    let mut entered = session.clone();
                    plan::enter_phase(&mut entered, phase, reason.clone(), &price, now);
                    self.label(&mut entered);
                    match self.store.update(&mut entered).await {
                        Ok(()) => {
                            self.metrics.spent(&session, &entered);
                            self.entered(&session, &entered);
                            // What was seen and done was of the one before.
                            if entered.generation != session.generation {
                                (seen, told_to_end) = (None, None);
                            }
                            session = entered;
                            self.tell_guests(&session).await;
                            // Who is to end is looked at, and asked, for the last time.
                            if is_last_time(session.phase) {
                                seen = None;
                            }
                        }
                        Err(store::Error::Conflict(_)) => {
                            session = self.read(&session.id).await?;
                            continue;
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                Step::Do(action) => {
                    if action == Action::Create && session.place.is_some() {
                        let grace = Some(policy.stop_grace).filter(|_| policy.pause_by != PauseBy::Archive);
                        match self.place(&session, grace).await? {
                            Found::Session(found) => session = *found,
                            Found::Nothing(error) => {
                                let (before, now, outcome) = (session.clone(), self.now(), Outcome::Failed(error));
                                self.change(&mut session, |session| {
                                    if session.phase == before.phase {
                                        plan::record(session, &action, &outcome, &policy, &price, now);
                                    }
                                })
                                .await?;
                                if session.phase != before.phase {
                                    self.entered(&before, &session);
                                }
                            }
                        }
                        continue;
                    }
                    if action == Action::Create
                        && let Some(taken) = self.take(&session).await?
                    {
                        session = taken;
                        continue;
                    }
                    let mut about = session.clone();
                    if plan::about_to(&mut about, &action, self.now()) {
                        match self.store.update(&mut about).await {
                            Ok(()) => session = about,
                            Err(store::Error::Conflict(_)) => {
                                session = self.read(&session.id).await?;
                                continue;
                            }
                            Err(error) => return Err(error.into()),
                        }
                    }
                    let (began, began_at) = (std::time::Instant::now(), self.now());
                    let before = session.clone();
                    let (outcome, looked, report) = self.perform(&action, &session, &provider, patience).await;
                    if matches!((&action, &outcome), (Action::Stop | Action::Delete, Outcome::Done)) {
                        told_to_end = Some(action.clone());
                    }
                    if matches!(action, Action::Create | Action::Start | Action::Resume) {
                        patience = Some(Instant::now() + FIRST_WORD);
                    }
                    self.count(&action, &outcome, &session.provider, began.elapsed());
                    let now = self.now();
                    if let Some(traces) = &self.traces {
                        traces.done(&session, &action, &outcome, began_at, now);
                    }
                    self.change_so(&mut session, !action.is_found_out_again(), |session| {
                        plan::meter(session, &price, now);
                        if let Some(sandbox) = &looked {
                            plan::saw(session, sandbox, &policy, &price, now);
                        }
                        // What others have ended meanwhile has been added up.
                        if let Some(report) = report.as_ref().filter(|_| session.holds) {
                            plan::heard(session, report);
                        }
                        if session.phase == before.phase {
                            plan::record(session, &action, &outcome, &policy, &price, now);
                        }
                    })
                    .await?;
                    // What several share is told of once.
                    if let (None, Some(why), None) = (&before.disrupted, &session.disrupted, &session.place) {
                        self.metrics.add(&metric::DISRUPTIONS, &[&session.provider], 1.0);
                        tracing::warn!(session = %session.id, node = session.node, why, "its container is taken away");
                    }
                    if session.phase != before.phase {
                        self.entered(&before, &session);
                        self.tell_guests(&session).await;
                    }
                    if report.is_some() || action == Action::Delete || session.holds && action == Action::Look {
                        self.charge(&mut session, &price).await?;
                    }
                    if let Outcome::Failed(error) = &outcome {
                        tracing::warn!(session = %session.id, ?action, %error, failures = session.failures, "a step failed");
                    }
                    // What was made is what it was made as, where that is to be acted on at once.
                    let made = match outcome {
                        Outcome::Made(sandbox) if matches!(sandbox.state, State::Created | State::Running) => Some(*sandbox),
                        _ => None,
                    };
                    seen = match looked.or(made) {
                        Some(sandbox) => Some(Seen { sandbox, at: now }),
                        // Whatever was done may have changed it.
                        None if matches!(action, Action::Hooks | Action::Ask | Action::KeepAlive(_) | Action::Avoid(_)) => seen,
                        None => None,
                    };
                }
            }
        }
        Err(Error::Circle(session.id))
    }

    fn entered(&self, before: &Session, session: &Session) {
        self.metrics.entered(before, session);
        // Nobody waits, mostly.
        drop(self.moves.send(session.id.clone()));
        if let Some(traces) = &self.traces {
            traces.entered(before, session);
        }
        tracing::info!(session = %session.id, phase = %session.phase, reason = session.reason, "a session");
    }

    /// Books what it has cost by now; a session whose tenant has nothing left is to end.
    async fn charge(&self, session: &mut Session, price: &provider::Price) -> Result<(), Error> {
        // What several cost is booked on their container.
        if session.place.is_some() {
            return Ok(());
        }
        let now = self.now();
        let mut metered = session.clone();
        plan::meter(&mut metered, price, now);
        let periods = self.budgets.periods(&metered, now);
        if periods != session.cost_at {
            self.budgets.close(&metered, &periods).await?;
            self.change(session, |session| session.cost_at = periods.clone()).await?;
            metered.cost_at = periods;
        }
        if let Some((why, beyond)) = self.budgets.charge(&metered, now).await?
            && session.wanted != Wanted::Gone
            && !session.phase.is_last()
            // What is set aside for others is not spent: nobody ends for that.
            && beyond >= self.set_aside(&session.tenant).await?
        {
            tracing::warn!(session = %session.id, tenant = %session.tenant, "its budget is spent");
            self.change(session, |session| {
                session.wanted = Wanted::Gone;
                session.reason = Some(why.clone());
            })
            .await?;
        }
        Ok(())
    }

    /// What is set aside for those of a tenant that have not cost anything yet, in USD.
    async fn set_aside(&self, tenant: &str) -> Result<f64, Error> {
        let phases = vec![Phase::Requested, Phase::Creating, Phase::Starting];
        let filter = Filter { tenant: Some(tenant.to_owned()), phases, ..Filter::default() };
        let waiting = self.matching(&filter).await?;
        // For one of several it is set aside with its container.
        let own = waiting.values().filter(|session| session.cost_at.is_empty() && session.place.is_none());
        let usd = own.filter_map(|session| {
            let provider = self.providers.get(&session.provider)?;
            Some(needs(session, &provider.price(session.spec.size)))
        });
        Ok(usd.sum())
    }

    async fn read(&self, id: &SessionId) -> Result<Session, Error> {
        Ok(self.store.get(id).await?.ok_or_else(|| store::Error::Missing(id.clone()))?)
    }

    fn count(&self, action: &Action, outcome: &Outcome, provider: &str, took: Duration) {
        self.metrics.add(&metric::ACTIONS_DONE, &[action.name(), provider, outcome.name()], 1.0);
        self.metrics.observe(&metric::ACTION_DURATION, &[action.name(), provider], took);
    }

    /// Does it: what came of it, what was seen, and what the sidecar said.
    async fn perform(
        &self,
        action: &Action,
        session: &Session,
        provider: &Arc<dyn Provider>,
        patience: Option<Instant>,
    ) -> (Outcome, Option<Sandbox>, Option<Report>) {
        let outcome = match action {
            // Nobody has asked for what is made ahead, or for several: theirs run for who takes it, or is in it.
            Action::Hooks if session.pool.is_some() || session.places.is_some() => Outcome::Done,
            Action::Hooks => match self.hooks.run(session).await {
                Verdict::Go => Outcome::Done,
                Verdict::Retry(at) => Outcome::Later(at),
                Verdict::Veto(why) | Verdict::Failed(why) => Outcome::Vetoed(why),
            },
            Action::Create => match provider.create(&self.told(session)).await {
                Ok(sandbox) => Outcome::Made(Box::new(sandbox)),
                Err(error) => Outcome::Failed(error),
            },
            Action::Look => match self.look(session, provider).await {
                Ok(sandbox) => {
                    let up = session.phase.is_up() || is_last_time(session.phase);
                    let up = up && sandbox.state == State::Running;
                    let report = if up { self.ask(session, provider).await.ok() } else { None };
                    return (Outcome::Done, Some(sandbox), report);
                }
                Err(error) => Outcome::Failed(error),
            },
            Action::Ask => {
                let said = self.first_word(session, provider, patience).await;
                if let Err(error) = &said {
                    tracing::debug!(session = %session.id, %error, "the sidecar does not answer yet");
                }
                return (Outcome::Answered(said.is_ok()), None, said.ok());
            }
            Action::Hydrate => match self.bring(session, provider).await {
                // The container is there before its sidecar listens.
                Err(conversation::Error::NotYet(what)) => {
                    tracing::debug!(session = %session.id, %what, "the sidecar does not answer yet");
                    Outcome::Answered(false)
                }
                brought => done(brought.map_err(|error| away(provider, error))),
            },
            Action::Persist => match self.put_away(session, provider).await {
                Ok(kept) => {
                    // What to go on with: said with what else is known of it.
                    let named = session.report.clone().map(|report| Report { conversation: kept.conversation, ..report });
                    return (Outcome::Persisted(kept.name), None, named);
                }
                Err(error) => Outcome::Failed(away(provider, error)),
            },
            Action::Start => done(provider.start(native(session)).await),
            Action::KeepAlive(until) => done(provider.keep_alive(native(session), *until).await),
            Action::Avoid(nodes) => done(provider.avoid(native(session), nodes).await),
            Action::Pause => done(provider.pause(native(session)).await),
            Action::Resume => done(provider.resume(native(session), &self.drained_nodes(&session.provider)).await),
            Action::Stop => done(provider.stop(native(session), self.policies.policy(session).stop_grace).await),
            Action::Delete => done(provider.delete(native(session)).await),
        };
        (outcome, None, None)
    }

    /// What the container is made of, with what it is told of us: that is kept nowhere.
    fn told(&self, session: &Session) -> provider::Spec {
        let mut spec = session.spec.clone();
        spec.avoid = self.drained_nodes(&session.provider);
        let Some(tokens) = &self.tokens else { return spec };
        // Who gives no environment is told nothing: its sidecar is asked.
        if !self.provider(&session.provider).is_ok_and(|provider| provider.capabilities().env) {
            return spec;
        }
        let policy = self.policies.policy(session);
        let mut tell = |name: &str, value: String| drop(spec.env.insert(format!("AGENT_SIDECAR_{name}"), value));
        tell("FLEET_CONTAINER", spec.key.clone());
        tell("FLEET_SESSION", session.id.to_string());
        if let Some(url) = &self.url {
            tell("FLEET_URL", url.clone());
            tell("FLEET_LEASE", format!("{}s", spec.ttl.as_secs()));
        }
        if policy.pause_by == PauseBy::Archive {
            tell("CONVERSATION_SERVE", String::from("true"));
            if session.archive.is_some() {
                tell("CONVERSATION_WAIT", format!("{}s", policy.ready_within.as_secs()));
            }
        }
        if let Some(conversation) = &session.conversation {
            spec.env.insert(String::from("AGENT_FLEET_CONVERSATION"), conversation.clone());
        }
        let token = Secret::Given(provider::secret::Value::new(tokens.of(&spec.key)));
        spec.secrets.insert(String::from("AGENT_SIDECAR_FLEET_TOKEN"), token);
        spec
    }

    async fn put_away(&self, session: &Session, provider: &Arc<dyn Provider>) -> conversation::Result<conversation::Kept> {
        let (away, token, endpoint) = self.conversation_of(session, provider).await?;
        away.put_away(session, &endpoint, &token, self.now()).await
    }

    async fn bring(&self, session: &Session, provider: &Arc<dyn Provider>) -> conversation::Result<()> {
        let (away, token, endpoint) = self.conversation_of(session, provider).await?;
        away.bring(session, session.archive.as_deref().unwrap_or_default(), &endpoint, &token).await
    }

    async fn conversation_of(
        &self,
        session: &Session,
        provider: &Arc<dyn Provider>,
    ) -> conversation::Result<(&Conversations, String, provider::Endpoint)> {
        let (Some(away), Some(tokens)) = (&self.away, &self.tokens) else {
            return Err(conversation::Error::Lasting(String::from("there is no [conversations] any more")));
        };
        let (at, mut port, mut key) = (native(session), self.policies.port(session), session.key());
        if session.place.is_some() {
            // Its app is asked, and the container is the one that all of them are in.
            let unknown = |what: String| conversation::Error::Passing(what);
            let (house, _) = place::parse(at).ok_or_else(|| unknown(String::from("it has no place")))?;
            key = self.read(&house).await.map_err(|error| unknown(error.to_string()))?.key();
            port = self.policies.app(session).map_or(port, |(port, _)| port);
        }
        let endpoint = match session.disrupted {
            Some(_) => provider.last_endpoint(at, port).await,
            None => provider.endpoint(at, port).await,
        };
        let endpoint = endpoint.map_err(|error| match error.is_passing() {
            true => conversation::Error::Passing(error.to_string()),
            false => conversation::Error::Lasting(error.to_string()),
        })?;
        Ok((away, tokens.of(&key), endpoint))
    }

    /// What was put away of a session that is over goes with it, unless it is to be kept for a while; what is left then, [`Self::sweep`] finds.
    async fn forget(&self, session: &Session) {
        // What has failed may not have failed by itself: its conversation is not gone at once.
        let gone = session.phase == Phase::Destroyed && session.archive.is_some();
        let away = self.away.as_ref().filter(|away| away.keep_for.is_none() && gone);
        if let Some(away) = away
            && let Err(error) = away.forget(&session.id).await
        {
            tracing::warn!(session = %session.id, %error, "what was put away of it is removed later");
        }
    }

    async fn see_before(&self) -> Result<(), Error> {
        self.see_drains().await?;
        let Some(away) = &self.away else { return Ok(()) };
        let phases = Phase::ALL.into_iter().filter(|phase| !phase.is_last()).collect();
        let (filter, mut after) = (Filter { phases, ..Filter::default() }, None);
        for _ in 0..PAGES {
            let page = self.store.list(&filter, after.as_ref(), BEFORE).await?;
            if page.iter().any(|session| session.archive.is_some()) {
                away.shelf.expects();
                return Ok(());
            }
            match page.last() {
                Some(last) if page.len() == BEFORE => after = Some(last.id.clone()),
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    async fn sweep_for_ever(self: Arc<Self>) {
        let Some(away) = &self.away else { return };
        loop {
            tokio::time::sleep(SWEEP).await;
            match away.sweep(&self.store, self.now()).await {
                Ok(0) => {}
                Ok(removed) => tracing::info!(removed, "conversations of sessions that are over were removed"),
                Err(error) => tracing::warn!(%error, "conversations that nobody needs cannot be removed now"),
            }
        }
    }

    /// By what the provider calls it; by its key, if nobody knows that.
    async fn look(&self, session: &Session, provider: &Arc<dyn Provider>) -> provider::Result<Sandbox> {
        if let Some(native) = &session.native {
            return provider.state(native).await;
        }
        let labels = BTreeMap::from([(FLEET_LABEL.to_owned(), self.name.clone()), (KEY_LABEL.to_owned(), session.key())]);
        let (found, unread) = list(provider, &labels).await?;
        let key = session.key();
        let ours = found.into_iter().find(|sandbox| sandbox.key.as_ref() == Some(&key) && !sandbox.state.is_gone());
        match ours {
            None if unread > 0 => Err(provider::hidden(provider.name(), unread)),
            ours => Ok(ours.unwrap_or_else(|| missing(&key))),
        }
    }

    async fn first_word(
        &self,
        session: &Session,
        provider: &Arc<dyn Provider>,
        patience: Option<Instant>,
    ) -> Result<Report, String> {
        let (mut pause, longest) = FIRST_WORD_EVERY;
        loop {
            let said = self.ask(session, provider).await;
            if said.is_ok() || patience.is_none_or(|until| until <= Instant::now() + pause) {
                return said;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    async fn ask(&self, session: &Session, provider: &Arc<dyn Provider>) -> Result<Report, String> {
        // Who tells is not asked, but for the last time: what it has not told by now it may never tell.
        if let Some(report) = reported::fresh(session, self.now()).filter(|_| !is_last_time(session.phase)) {
            return Ok(report);
        }
        if session.place.is_some() {
            let (port, token) = self.policies.app(session).ok_or("its template names no `app_port`")?;
            let endpoint = provider.endpoint(native(session), port).await.map_err(|error| error.to_string())?;
            return self.inside.session(&endpoint, token.as_ref().map(|token| token.reveal()), &session.id, self.now()).await;
        }
        let port = self.policies.port(session);
        let endpoint = provider.endpoint(native(session), port).await.map_err(|error| error.to_string())?;
        self.inside.report(&endpoint, self.now()).await
    }

    /// What providers say is happening makes sessions due.
    async fn listen(self: Arc<Self>) {
        let labels = BTreeMap::from([(FLEET_LABEL.to_owned(), self.name.clone())]);
        let telling = self.providers.values().filter(|provider| provider.capabilities().events).map(|provider| {
            let (fleet, labels) = (&self, &labels);
            async move {
                let mut deaf = false;
                loop {
                    match provider.events(labels).await {
                        Ok(mut events) => {
                            deaf = false;
                            while let Some(Ok(happened)) = events.next().await {
                                fleet.heard(happened.session.as_deref()).await;
                            }
                        }
                        // Said once: what happens is seen a little later then.
                        Err(error) if !deaf => {
                            deaf = true;
                            tracing::warn!(provider = provider.name(), %error, "a provider does not tell what happens there");
                        }
                        Err(_) => {}
                    }
                    tokio::time::sleep(POLL).await;
                }
            }
        });
        futures_util::future::join_all(telling).await;
    }

    async fn heard(&self, session: Option<&str>) {
        let Some(id) = session.and_then(|id| id.parse::<SessionId>().ok()) else { return };
        // Its container may be another's by now, and still say its first name. One that nobody knows is the reconciler's.
        let Ok(Some(session)) = self.holder(&id).await else { return };
        if self.store.wake(&session.id).await.is_ok() {
            self.due.notify_one();
        }
    }

    /// Every session that is not over.
    async fn all(&self) -> Result<BTreeMap<SessionId, Session>, Error> {
        self.matching(&Filter::default()).await
    }

    pub(crate) async fn matching(&self, filter: &Filter) -> Result<BTreeMap<SessionId, Session>, Error> {
        let mut all = BTreeMap::new();
        let mut after: Option<SessionId> = None;
        loop {
            let page = self.store.list(filter, after.as_ref(), 500).await?;
            let Some(last) = page.last() else { return Ok(all) };
            after = Some(last.id.clone());
            all.extend(page.into_iter().map(|session| (session.id.clone(), session)));
        }
    }

    async fn reconcile_for_ever(self: Arc<Self>) {
        loop {
            if let Err(error) = self.reconcile().await {
                tracing::error!(%error, "what exists cannot be held against what is kept");
            }
            tokio::time::sleep(RECONCILE).await;
        }
    }

    /// Removes containers that no session holds. How many.
    pub async fn reconcile(&self) -> Result<usize, Error> {
        let labels = BTreeMap::from([(FLEET_LABEL.to_owned(), self.name.clone())]);
        let born = self.store.born().await?;
        let mut removed = 0;
        for (name, provider) in self.providers.iter().filter(|(_, provider)| provider.capabilities().list) {
            let (found, unread) = match list(provider, &labels).await {
                Ok(listed) => listed,
                Err(error) => {
                    tracing::warn!(provider = %name, %error, "what exists there is not known");
                    self.metrics.add(&metric::RECONCILES, &[name, "failed"], 1.0);
                    continue;
                }
            };
            // What cannot be read is not removed, and nobody is gone because of it: only what is on the list is acted on.
            let ageless = found.iter().filter(|sandbox| sandbox.created.is_none()).count();
            self.metrics.set(&metric::UNREAD, &[name], (unread + ageless) as f64);
            if ageless > 0 {
                let what = "containers do not say when they were made: none of them is removed for want of a session";
                tracing::warn!(provider = %name, containers = ageless, "{what}");
            }
            let before = found.iter().filter(|sandbox| sandbox.created.is_some_and(|created| created < born)).count();
            self.metrics.set(&metric::STRANGERS, &[name], before as f64);
            if before > 0 {
                let what = "containers of this fleet's name are older than its store, and left alone: is it the right store? Else remove them by hand";
                tracing::warn!(provider = %name, containers = before, "{what}");
            }
            // Kept after it was found: what was written down meanwhile is no orphan.
            let kept = self.all().await?;
            for orphan in plan::orphans(&found, &kept, born, ORPHAN_GRACE, self.now()) {
                // It may have been given away while the pages were read.
                let first = orphan.labels.get(SESSION_LABEL).and_then(|id| id.parse::<SessionId>().ok());
                let holder = if let Some(id) = first { self.holder(&id).await? } else { None };
                if holder.is_some_and(|one| one.holds && orphan.key.as_ref() == Some(&one.key())) {
                    continue;
                }
                tracing::warn!(provider = %name, container = %orphan.native, "a container that no session holds is removed");
                match provider.delete(&orphan.native).await {
                    Ok(()) => {
                        removed += 1;
                        self.metrics.add(&metric::ORPHANS_REMOVED, &[name], 1.0);
                    }
                    Err(error) => tracing::warn!(provider = %name, %error, "it cannot be removed now"),
                }
            }
            self.metrics.add(&metric::RECONCILES, &[name, "ok"], 1.0);
            self.metrics.set(&metric::RECONCILED_AT, &[name], self.now().as_millisecond() as f64 / 1e3);
        }
        Ok(removed)
    }
}

/// Waits until a session is in another phase, but no longer than this: another fleet may drive it.
pub(crate) async fn moved(moves: &mut broadcast::Receiver<SessionId>, id: &SessionId, most: Duration) {
    let heard = async { while moves.recv().await.is_ok_and(|moved| moved != *id) {} };
    drop(tokio::time::timeout(most, heard).await);
}

/// A mistake in what one provider does is not the end of what every session needs.
async fn again_and_again<F: Future<Output = ()>>(what: &'static str, begin: impl Fn() -> F) {
    while AssertUnwindSafe(begin()).catch_unwind().await.is_err() {
        tracing::error!("{what} has panicked: it is begun again");
        tokio::time::sleep(POLL).await;
    }
}

fn done(result: provider::Result<()>) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(error) => Outcome::Failed(error),
    }
}

fn away(provider: &Arc<dyn Provider>, error: conversation::Error) -> provider::Error {
    let provider = provider.name();
    match error {
        conversation::Error::NotYet(what) | conversation::Error::Passing(what) => provider::Error::Failed { provider, what },
        conversation::Error::Lasting(what) => provider::Error::Refused { provider, what },
    }
}

/// Whether it is about to end, or to be put away: nobody can ask it later.
fn is_last_time(phase: Phase) -> bool {
    matches!(phase, Phase::Pausing | Phase::Stopping)
}

fn is_ending(seen: Option<&Seen>) -> bool {
    seen.is_some_and(|seen| seen.sandbox.state == State::Stopping)
}

fn native(session: &Session) -> &str {
    session.native.as_deref().unwrap_or_default()
}

fn missing(key: &str) -> Sandbox {
    Sandbox {
        key: Some(key.to_owned()),
        native: String::new(),
        state: State::Missing,
        reason: None,
        exit_code: None,
        size: None,
        created: None,
        deadline: None,
        labels: BTreeMap::new(),
        node: None,
        disrupted: None,
    }
}

/// All that have these labels; and how many more there are that cannot be read.
async fn list(provider: &Arc<dyn Provider>, labels: &BTreeMap<String, String>) -> provider::Result<(Vec<Sandbox>, usize)> {
    let (mut found, mut unread, mut next) = (Vec::new(), 0, None);
    for _ in 0..PAGES {
        let page = provider.list(labels, next.as_deref()).await?;
        found.extend(page.sandboxes);
        unread += page.unread;
        next = page.next;
        if next.is_none() {
            return Ok((found, unread));
        }
    }
    // Half a list would make orphans of the rest.
    Err(provider::Error::Failed { provider: provider.name(), what: String::from("its list has no end") })
}

//! A provider, sidecars and hooks in memory, and fleets that drive sessions between them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_fleet::config::Tenant;
use agent_fleet::hook::Verdict;
use agent_fleet::inside::Inside;
use agent_fleet::lifecycle::Phase;
use agent_fleet::metric::{Counted, Metrics};
use agent_fleet::place::App;
use agent_fleet::plan::{PauseBy, Policy};
use agent_fleet::pool::Ahead;
use agent_fleet::provider::{
    Capabilities, Endpoint, Error, Exec, Executed, Happened, Page, Pause, Price, Provider, Result, Sandbox, Size, Spec, State,
};
use agent_fleet::service::{Clock, Fleet, Hooks, Policies};
use agent_fleet::session::{Pattern, Report, Session, SessionId};
use agent_fleet::store::{self, Store};
use agent_fleet::token::Tokens;
use async_trait::async_trait;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use tokio::sync::watch;

/// A provider in memory. One call in `every` fails: not done, done and not said, or done and never answered.
pub(crate) struct Cloud {
    pub(crate) sandboxes: Mutex<BTreeMap<String, Sandbox>>,
    pub(crate) created: Mutex<BTreeMap<String, u32>>,
    pub(crate) calls: AtomicU64,
    pub(crate) every: AtomicU64,
    /// The next look is a mistake of ours.
    pub(crate) panics: AtomicBool,
    /// In USD an hour.
    pub(crate) paused: Mutex<f64>,
    /// Where every container's port leads to, and what has to be sent with each request; nowhere, if it is empty. Behind a `/`, its name follows.
    pub(crate) app: Mutex<String>,
    /// Keys of those that are on the list, and nobody can read.
    pub(crate) unread: Mutex<BTreeSet<String>>,
    /// Nothing is ever answered.
    pub(crate) hangs: Mutex<bool>,
    /// Its machines, if it says which of them a container is on: that with the fewest, of those that it is not to be on.
    pub(crate) nodes: Mutex<Vec<String>>,
    /// What is told to end takes until the test says so.
    pub(crate) slow: AtomicBool,
    /// So does what is to be made.
    pub(crate) full: AtomicBool,
}

impl Cloud {
    pub(crate) fn new(every: u64) -> Arc<Self> {
        let (calls, every) = (AtomicU64::new(0), AtomicU64::new(every));
        let (sandboxes, created, panics, paused) = (Mutex::default(), Mutex::default(), AtomicBool::default(), Mutex::default());
        let (app, hangs, unread) = (Mutex::default(), Mutex::default(), Mutex::default());
        let (nodes, slow, full) = (Mutex::default(), AtomicBool::default(), AtomicBool::default());
        Arc::new(Self { sandboxes, created, calls, every, panics, paused, app, unread, hangs, nodes, slow, full })
    }

    fn node(&self, sandboxes: &BTreeMap<String, Sandbox>, avoid: &[String]) -> Option<String> {
        let nodes = self.nodes.lock().unwrap();
        let on = |node: &String| sandboxes.values().filter(|one| one.node.as_ref() == Some(node)).count();
        nodes.iter().filter(|node| !avoid.contains(*node)).min_by_key(|node| on(node)).cloned()
    }

    /// Somebody there takes it away: it is told to end, and has a while.
    pub(crate) fn take_away(&self, native: &str, why: &str) {
        let mut sandboxes = self.sandboxes.lock().unwrap();
        let sandbox = sandboxes.get_mut(native).unwrap();
        (sandbox.state, sandbox.disrupted) = (State::Stopping, Some(why.to_owned()));
    }

    /// Whether this call is done, and what is answered.
    pub(crate) async fn fate(&self) -> (bool, Option<Error>) {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        if *self.hangs.lock().unwrap() {
            std::future::pending::<()>().await;
        }
        tokio::task::yield_now().await;
        let every = self.every.load(Ordering::SeqCst);
        if every == 0 || !call.is_multiple_of(every) {
            return (true, None);
        }
        let what = String::from("the line is cut");
        match (call / every) % 3 {
            0 => (false, Some(Error::Failed { provider: "cloud", what })),
            1 => (true, Some(Error::Unsure { provider: "cloud", what })),
            _ => (false, Some(Error::Busy { provider: "cloud", after: None })),
        }
    }

    pub(crate) async fn set(&self, native: &str, state: State) -> Result<()> {
        let (done, error) = self.fate().await;
        let mut sandboxes = self.sandboxes.lock().unwrap();
        let Some(sandbox) = sandboxes.get_mut(native) else { return Err(Error::Missing { provider: "cloud" }) };
        if done {
            sandbox.state = state;
        }
        error.map_or(Ok(()), Err)
    }

    pub(crate) fn end(&self, native: &str, code: i32) {
        let mut sandboxes = self.sandboxes.lock().unwrap();
        let sandbox = sandboxes.get_mut(native).unwrap();
        (sandbox.state, sandbox.exit_code) = (State::Stopped, Some(code));
    }

    pub(crate) fn alive(&self) -> usize {
        self.sandboxes.lock().unwrap().len()
    }

    pub(crate) fn gone() -> Sandbox {
        let (labels, native) = (BTreeMap::new(), String::new());
        Sandbox {
            key: None,
            native,
            state: State::Missing,
            reason: None,
            exit_code: None,
            size: None,
            created: None,
            deadline: None,
            labels,
            node: None,
            disrupted: None,
        }
    }
}

#[async_trait]
impl Provider for Cloud {
    fn name(&self) -> &'static str {
        "cloud"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            command: true,
            env: true,
            provider_secrets: false,
            size: true,
            ports: true,
            list: true,
            ttl: None,
            idle_timer: false,
            pause: Pause::Memory,
            exec: false,
            logs: false,
            events: false,
            endpoint: true,
            traffic_keeps_awake: false,
            nodes: !self.nodes.lock().unwrap().is_empty(),
        }
    }

    fn price(&self, _: Size) -> Price {
        Price { running: 0.05, paused: *self.paused.lock().unwrap(), stopped: 0.0, source: String::from("a test") }
    }

    async fn create(&self, spec: &Spec) -> Result<Sandbox> {
        while self.full.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let (done, error) = self.fate().await;
        let mut sandboxes = self.sandboxes.lock().unwrap();
        if done && !sandboxes.contains_key(&spec.key) {
            *self.created.lock().unwrap().entry(spec.key.clone()).or_default() += 1;
            let node = self.node(&sandboxes, &spec.avoid);
            let sandbox = Sandbox {
                node,
                key: Some(spec.key.clone()),
                native: spec.key.clone(),
                state: State::Created,
                created: Some(Timestamp::now()),
                labels: spec.labels.clone(),
                ..Cloud::gone()
            };
            sandboxes.insert(spec.key.clone(), sandbox);
        }
        match error {
            Some(error) => Err(error),
            None => Ok(sandboxes[&spec.key].clone()),
        }
    }

    async fn start(&self, native: &str) -> Result<()> {
        self.set(native, State::Running).await
    }

    async fn state(&self, native: &str) -> Result<Sandbox> {
        let (_, error) = self.fate().await;
        assert!(!self.panics.swap(false, Ordering::SeqCst), "as the test wants it");
        let found = self.sandboxes.lock().unwrap().get(native).cloned();
        error.map_or(Ok(found.unwrap_or_else(Cloud::gone)), Err)
    }

    async fn list(&self, labels: &BTreeMap<String, String>, page: Option<&str>) -> Result<Page> {
        let (_, error) = self.fate().await;
        let sandboxes = self.sandboxes.lock().unwrap();
        let after = page.unwrap_or_default();
        let matching = sandboxes.values().filter(|one| labels.iter().all(|(name, value)| one.labels.get(name) == Some(value)));
        let mut page: Vec<Sandbox> = matching.filter(|one| one.native.as_str() > after).take(7).cloned().collect();
        let next = (page.len() == 7).then(|| page[6].native.clone());
        let (all, unread) = (page.len(), self.unread.lock().unwrap());
        page.retain(|one| !unread.contains(&one.native));
        error.map_or(Ok(Page { unread: all - page.len(), sandboxes: page, next }), Err)
    }

    async fn exec(&self, _: &str, _: &Exec) -> Result<Executed> {
        Err(Error::Unsupported { provider: "cloud", verb: "exec", hint: None })
    }

    async fn logs(&self, _: &str, _: usize) -> Result<Vec<u8>> {
        Err(Error::Unsupported { provider: "cloud", verb: "logs", hint: None })
    }

    async fn keep_alive(&self, _: &str, _: Timestamp) -> Result<()> {
        Ok(())
    }

    async fn pause(&self, native: &str) -> Result<()> {
        self.set(native, State::Paused).await?;
        // Where it is one of several, it leaves it.
        self.sandboxes.lock().unwrap().get_mut(native).into_iter().for_each(|one| one.node = None);
        Ok(())
    }

    async fn resume(&self, native: &str, avoid: &[String]) -> Result<()> {
        self.set(native, State::Running).await?;
        let mut sandboxes = self.sandboxes.lock().unwrap();
        let node = self.node(&sandboxes, avoid);
        sandboxes.get_mut(native).into_iter().for_each(|one| one.node.clone_from(&node));
        Ok(())
    }

    async fn stop(&self, native: &str, _: Duration) -> Result<()> {
        let state = if self.slow.load(Ordering::SeqCst) { State::Stopping } else { State::Stopped };
        self.set(native, state).await
    }

    async fn delete(&self, native: &str) -> Result<()> {
        let (done, error) = self.fate().await;
        if done {
            self.sandboxes.lock().unwrap().remove(native);
        }
        error.map_or(Ok(()), Err)
    }

    async fn endpoint(&self, native: &str, _: u16) -> Result<Endpoint> {
        let app = self.app.lock().unwrap().clone();
        let url = match app.as_str() {
            "" => format!("http://{native}"),
            app if app.ends_with('/') => format!("{app}{native}"),
            _ => app,
        };
        Ok(Endpoint { url, headers: vec![(String::from("x-provider-key"), String::from("key-of-the-provider"))] })
    }

    async fn events(&self, _: &BTreeMap<String, String>) -> Result<BoxStream<'static, Result<Happened>>> {
        Err(Error::Unsupported { provider: "cloud", verb: "events", hint: None })
    }
}

/// What sidecars say: whatever a test has put there.
#[derive(Default)]
pub(crate) struct Words(pub(crate) Mutex<Option<(bool, f64)>>);

#[async_trait]
impl Inside for Words {
    async fn report(&self, _: &Endpoint, now: Timestamp) -> std::result::Result<Report, String> {
        let (busy, cost_usd) = self.0.lock().unwrap().ok_or("it does not answer")?;
        Ok(Report {
            at: now,
            busy_until: busy.then(|| now + Duration::from_secs(60)),
            cost_usd,
            conversation: None,
            memory_bytes: None,
        })
    }
}

/// Writes down each phase that it is called for, and says no to sessions named so, or not now.
#[derive(Default)]
pub(crate) struct Trail(pub(crate) Mutex<Vec<(SessionId, Phase)>>);

#[async_trait]
impl Hooks for Trail {
    async fn run(&self, session: &Session) -> Verdict {
        self.0.lock().unwrap().push((session.id.clone(), session.phase));
        if session.id.as_str().starts_with("held") {
            return Verdict::Retry(Timestamp::now() + Duration::from_secs(3600));
        }
        let refused = session.id.as_str().starts_with("refused") && session.phase == Phase::Creating;
        if refused { Verdict::Veto(String::from("not today")) } else { Verdict::Go }
    }
}

/// What containers' tokens are made of.
pub(crate) const SECRET: &str = "0123456789abcdef0123456789abcdef";

pub(crate) struct Same(Policy, Vec<Ahead>);

impl Policies for Same {
    fn policy(&self, _: &Session) -> Policy {
        self.0.clone()
    }

    fn port(&self, _: &Session) -> u16 {
        9477
    }

    fn app(&self, _: &Session) -> Option<App> {
        Some((8000, None))
    }

    fn pools(&self) -> &[Ahead] {
        &self.1
    }
}

pub(crate) struct Town {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) cloud: Arc<Cloud>,
    pub(crate) words: Arc<Words>,
    pub(crate) trail: Arc<Trail>,
    pub(crate) policy: Policy,
    pub(crate) tenants: BTreeMap<String, Tenant>,
    pub(crate) pools: Vec<Ahead>,
    /// Who says what sidecars say, if not [`Words`].
    pub(crate) inside: Option<Arc<dyn Inside>>,
    /// Providers beside the cloud.
    pub(crate) others: BTreeMap<String, Arc<dyn Provider>>,
    pub(crate) metrics: Arc<Metrics>,
}

impl Town {
    pub(crate) async fn new(every: u64) -> Self {
        let policy = Policy {
            backoff: Duration::from_millis(2),
            look_every: Duration::from_millis(50),
            settle: Duration::ZERO,
            tries: 20,
            pause_by: PauseBy::Provider,
            ..Policy::default()
        };
        let words = Words(Mutex::new(Some((false, 0.5))));
        let metrics = Arc::new(Metrics::new(["cloud"], ["acme", "globex"], []));
        Town {
            store: Counted::over(store::memory().await.unwrap(), &metrics),
            cloud: Cloud::new(every),
            words: Arc::new(words),
            trail: Arc::default(),
            policy,
            tenants: BTreeMap::new(),
            pools: vec![],
            inside: None,
            others: BTreeMap::new(),
            metrics,
        }
    }

    pub(crate) fn fleet(&self) -> Arc<Fleet> {
        self.fleet_with(Arc::clone(&self.trail) as Arc<dyn Hooks>)
    }

    pub(crate) fn fleet_with(&self, hooks: Arc<dyn Hooks>) -> Arc<Fleet> {
        self.made(hooks, Arc::new(Timestamp::now))
    }

    pub(crate) fn fleet_at(&self, clock: Clock) -> Arc<Fleet> {
        self.made(Arc::clone(&self.trail) as Arc<dyn Hooks>, clock)
    }

    fn made(&self, hooks: Arc<dyn Hooks>, clock: Clock) -> Arc<Fleet> {
        let mut providers = self.others.clone();
        providers.insert(String::from("cloud"), Arc::clone(&self.cloud) as Arc<dyn Provider>);
        let policies = Arc::new(Same(self.policy.clone(), self.pools.clone())) as Arc<dyn Policies>;
        let inside = self.inside.clone().unwrap_or_else(|| Arc::clone(&self.words) as Arc<dyn Inside>);
        let edges = (hooks, policies, inside);
        let fleet = Fleet::new("town", Arc::clone(&self.store), providers, edges, self.tenants.clone(), clock);
        let fleet = fleet.with_lease(Duration::from_secs(2)).with_tokens(Some(Tokens::new(SECRET)), None);
        Arc::new(fleet.with_metrics(Arc::clone(&self.metrics)))
    }

    pub(crate) async fn get(&self, id: &str) -> Session {
        self.store.get(&id.parse().unwrap()).await.unwrap().unwrap()
    }

    pub(crate) async fn reaches(&self, id: &str, phase: Phase) -> Session {
        for _ in 0..3000 {
            let session = self.get(id).await;
            if session.phase == phase {
                return session;
            }
            assert!(!session.phase.is_last(), "{id} is {} and not {phase}: {:?}", session.phase, session.reason);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("waited in vain for {id} to be {phase}; it is {:?}", self.get(id).await);
    }

    /// Its phases so far, when the hooks of that one have been run: the store has a phase before they are.
    pub(crate) async fn phases_to(&self, id: &str, phase: Phase) -> Vec<Phase> {
        until(&format!("the hooks of {phase} are run for {id}"), || async { self.phases(id).contains(&phase) }).await;
        self.phases(id)
    }

    pub(crate) fn phases(&self, id: &str) -> Vec<Phase> {
        let trail = self.trail.0.lock().unwrap();
        trail.iter().filter(|(of, _)| of.as_str() == id).map(|(_, phase)| *phase).collect()
    }
}

pub(crate) async fn until<F: Future<Output = bool>>(what: &str, so: impl Fn() -> F) {
    for _ in 0..6000 {
        if so().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("waited in vain until {what}");
}

pub(crate) fn session(id: &str, pattern: Pattern) -> Session {
    let now = Timestamp::now();
    let spec = Spec {
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
    };
    Session::new(id.parse().unwrap(), ("t", "o"), pattern, "cloud", spec, now)
}

pub(crate) struct Running {
    pub(crate) end: watch::Sender<bool>,
    pub(crate) task: tokio::task::JoinHandle<()>,
}

pub(crate) fn run(fleet: &Arc<Fleet>) -> Running {
    let (end, ended) = watch::channel(false);
    Running { end, task: tokio::spawn(Arc::clone(fleet).run(ended)) }
}

impl Running {
    pub(crate) async fn stop(self) {
        self.end.send(true).unwrap();
        self.task.await.unwrap();
    }
}

impl Town {
    pub(crate) async fn reaches_end(&self, id: &str) {
        for _ in 0..6000 {
            let session = self.get(id).await;
            if session.phase.is_last() && !session.holds {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("waited in vain for the end of {:?}", self.get(id).await);
    }
}

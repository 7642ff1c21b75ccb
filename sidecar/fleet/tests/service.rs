//! The service against a provider that fails, with fleets that die: nothing is left, nothing is created twice, and every session comes to its end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_fleet::config::{Elsewhere, Tenant};
use agent_fleet::hook::{self, Act, Hook, Runner, Verdict};
use agent_fleet::inside::Inside;
use agent_fleet::lifecycle::Phase;
use agent_fleet::plan::{PauseBy, Policy};
use agent_fleet::provider::{
    Capabilities, Endpoint, Error, Exec, Executed, FLEET_LABEL, Happened, KEY_LABEL, Page, Pause, Price, Provider, Result,
    SESSION_LABEL, Sandbox, Size, Spec, State,
};
use agent_fleet::service::{Fleet, Hooks, Policies};
use agent_fleet::session::{Pattern, Report, Session, SessionId, Wanted};
use agent_fleet::store::{self, Filter, Inserted, Store};
use async_trait::async_trait;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use tokio::sync::watch;

/// A provider in memory. One call in `every` fails: not done, done and not said, or done and never answered.
struct Cloud {
    sandboxes: Mutex<BTreeMap<String, Sandbox>>,
    created: Mutex<BTreeMap<String, u32>>,
    calls: AtomicU64,
    every: AtomicU64,
}

impl Cloud {
    fn new(every: u64) -> Arc<Self> {
        let (calls, every) = (AtomicU64::new(0), AtomicU64::new(every));
        Arc::new(Self { sandboxes: Mutex::default(), created: Mutex::default(), calls, every })
    }

    /// Whether this call is done, and what is answered.
    async fn fate(&self) -> (bool, Option<Error>) {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        tokio::task::yield_now().await;
        let every = self.every.load(Ordering::SeqCst);
        if every == 0 || call % every != 0 {
            return (true, None);
        }
        let what = String::from("the line is cut");
        match (call / every) % 3 {
            0 => (false, Some(Error::Failed { provider: "cloud", what })),
            1 => (true, Some(Error::Unsure { provider: "cloud", what })),
            _ => (false, Some(Error::Busy { provider: "cloud", after: None })),
        }
    }

    async fn set(&self, native: &str, state: State) -> Result<()> {
        let (done, error) = self.fate().await;
        let mut sandboxes = self.sandboxes.lock().unwrap();
        let Some(sandbox) = sandboxes.get_mut(native) else { return Err(Error::Missing { provider: "cloud" }) };
        if done {
            sandbox.state = state;
        }
        error.map_or(Ok(()), Err)
    }

    fn end(&self, native: &str, code: i32) {
        let mut sandboxes = self.sandboxes.lock().unwrap();
        let sandbox = sandboxes.get_mut(native).unwrap();
        (sandbox.state, sandbox.exit_code) = (State::Stopped, Some(code));
    }

    fn alive(&self) -> usize {
        self.sandboxes.lock().unwrap().len()
    }

    fn gone() -> Sandbox {
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
        }
    }

    fn price(&self, _: Size) -> Price {
        Price { running: 0.05, paused: 0.0, stopped: 0.0, source: String::from("a test") }
    }

    async fn create(&self, spec: &Spec) -> Result<Sandbox> {
        let (done, error) = self.fate().await;
        let mut sandboxes = self.sandboxes.lock().unwrap();
        if done && !sandboxes.contains_key(&spec.key) {
            *self.created.lock().unwrap().entry(spec.key.clone()).or_default() += 1;
            let sandbox = Sandbox {
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
        let found = self.sandboxes.lock().unwrap().get(native).cloned();
        error.map_or(Ok(found.unwrap_or_else(Cloud::gone)), Err)
    }

    async fn list(&self, labels: &BTreeMap<String, String>, page: Option<&str>) -> Result<Page> {
        let (_, error) = self.fate().await;
        let sandboxes = self.sandboxes.lock().unwrap();
        let after = page.unwrap_or_default();
        let matching = sandboxes.values().filter(|one| labels.iter().all(|(name, value)| one.labels.get(name) == Some(value)));
        let page: Vec<Sandbox> = matching.filter(|one| one.native.as_str() > after).take(7).cloned().collect();
        let next = (page.len() == 7).then(|| page[6].native.clone());
        error.map_or(Ok(Page { sandboxes: page, next }), Err)
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
        self.set(native, State::Paused).await
    }

    async fn resume(&self, native: &str) -> Result<()> {
        self.set(native, State::Running).await
    }

    async fn stop(&self, native: &str, _: Duration) -> Result<()> {
        self.set(native, State::Stopped).await
    }

    async fn delete(&self, native: &str) -> Result<()> {
        let (done, error) = self.fate().await;
        if done {
            self.sandboxes.lock().unwrap().remove(native);
        }
        error.map_or(Ok(()), Err)
    }

    async fn endpoint(&self, native: &str, _: u16) -> Result<Endpoint> {
        Ok(Endpoint { url: format!("http://{native}"), headers: vec![] })
    }

    async fn events(&self, _: &BTreeMap<String, String>) -> Result<BoxStream<'static, Result<Happened>>> {
        Err(Error::Unsupported { provider: "cloud", verb: "events", hint: None })
    }
}

/// What sidecars say: whatever a test has put there.
#[derive(Default)]
struct Words(Mutex<Option<(bool, f64)>>);

#[async_trait]
impl Inside for Words {
    async fn report(&self, _: &Endpoint, now: Timestamp) -> std::result::Result<Report, String> {
        let (busy, cost_usd) = self.0.lock().unwrap().ok_or("it does not answer")?;
        Ok(Report { at: now, busy_until: busy.then(|| now + Duration::from_secs(60)), cost_usd, conversation: None })
    }
}

/// Writes down each phase that it is called for, and says no to sessions named so.
#[derive(Default)]
struct Trail(Mutex<Vec<(SessionId, Phase)>>);

#[async_trait]
impl Hooks for Trail {
    async fn run(&self, session: &Session) -> Verdict {
        self.0.lock().unwrap().push((session.id.clone(), session.phase));
        let refused = session.id.as_str().starts_with("refused") && session.phase == Phase::Creating;
        if refused { Verdict::Veto(String::from("not today")) } else { Verdict::Go }
    }
}

struct Same(Policy);

impl Policies for Same {
    fn policy(&self, _: &Session) -> Policy {
        self.0.clone()
    }

    fn port(&self, _: &Session) -> u16 {
        9477
    }
}

struct Town {
    store: Arc<dyn Store>,
    cloud: Arc<Cloud>,
    words: Arc<Words>,
    trail: Arc<Trail>,
    policy: Policy,
    tenants: BTreeMap<String, Tenant>,
}

impl Town {
    async fn new(every: u64) -> Self {
        let policy = Policy {
            backoff: Duration::from_millis(2),
            look_every: Duration::from_millis(50),
            settle: Duration::ZERO,
            tries: 20,
            pause_by: PauseBy::Provider,
            ..Policy::default()
        };
        let words = Words(Mutex::new(Some((false, 0.5))));
        Town {
            store: store::memory().await.unwrap(),
            cloud: Cloud::new(every),
            words: Arc::new(words),
            trail: Arc::default(),
            policy,
            tenants: BTreeMap::new(),
        }
    }

    fn fleet(&self) -> Arc<Fleet> {
        self.fleet_with(Arc::clone(&self.trail) as Arc<dyn Hooks>)
    }

    fn fleet_with(&self, hooks: Arc<dyn Hooks>) -> Arc<Fleet> {
        let providers = BTreeMap::from([(String::from("cloud"), Arc::clone(&self.cloud) as Arc<dyn Provider>)]);
        let edges = (hooks, Arc::new(Same(self.policy.clone())) as Arc<dyn Policies>, Arc::clone(&self.words) as Arc<dyn Inside>);
        let fleet = Fleet::new("town", Arc::clone(&self.store), providers, edges, self.tenants.clone(), Arc::new(Timestamp::now));
        Arc::new(fleet.with_lease(Duration::from_secs(2)))
    }

    async fn get(&self, id: &str) -> Session {
        self.store.get(&id.parse().unwrap()).await.unwrap().unwrap()
    }

    async fn reaches(&self, id: &str, phase: Phase) -> Session {
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

    fn phases(&self, id: &str) -> Vec<Phase> {
        let trail = self.trail.0.lock().unwrap();
        trail.iter().filter(|(of, _)| of.as_str() == id).map(|(_, phase)| *phase).collect()
    }
}

fn session(id: &str, pattern: Pattern) -> Session {
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
    };
    Session::new(id.parse().unwrap(), ("t", "o"), pattern, "cloud", spec, now)
}

struct Running {
    end: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

fn run(fleet: &Arc<Fleet>) -> Running {
    let (end, ended) = watch::channel(false);
    Running { end, task: tokio::spawn(Arc::clone(fleet).run(ended)) }
}

impl Running {
    async fn stop(self) {
        self.end.send(true).unwrap();
        self.task.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_created_works_sleeps_wakes_and_is_destroyed() {
    let mut town = Town::new(0).await;
    town.policy.idle_after = Some(Duration::from_millis(100));
    let fleet = town.fleet();
    let running = run(&fleet);
    *town.words.0.lock().unwrap() = Some((true, 0.5));
    assert_eq!(fleet.create(session("a", Pattern::Hybrid)).await.unwrap(), Inserted::New);
    assert!(
        matches!(fleet.create(session("a", Pattern::Hybrid)).await.unwrap(), Inserted::Known(_)),
        "the same once more is the same"
    );
    let active = town.reaches("a", Phase::Active).await;
    assert_eq!(active.cost_usd(), 0.5);
    let sandbox = town.cloud.sandboxes.lock().unwrap().values().next().unwrap().clone();
    assert_eq!(sandbox.labels[FLEET_LABEL], "town");
    assert_eq!(sandbox.labels[SESSION_LABEL], "a");
    assert_eq!(sandbox.labels[KEY_LABEL], active.key());

    *town.words.0.lock().unwrap() = Some((false, 0.75));
    // Its last word was that it works for a minute: that it does not is heard when it is looked at.
    let paused = town.reaches("a", Phase::Paused).await;
    assert_eq!(paused.cost_usd(), 0.75);
    *town.words.0.lock().unwrap() = Some((true, 1.0));
    assert!(fleet.want(&paused.id, Wanted::Running, "a message").await.unwrap().is_some());
    town.reaches("a", Phase::Active).await;
    fleet.want(&paused.id, Wanted::Gone, "enough").await.unwrap();
    let gone = town.reaches("a", Phase::Destroyed).await;
    assert_eq!((town.cloud.alive(), gone.holds, gone.cost_usd()), (0, false, 1.0));
    assert!(gone.container_usd > 0.0 && gone.container_seconds > 0.0);
    // A wish for what is gone changes nothing.
    fleet.want(&paused.id, Wanted::Running, "again").await.unwrap();
    assert_eq!(town.get("a").await.wanted, Wanted::Gone);
    use Phase::*;
    let phases = town.phases("a");
    assert_eq!(phases[..6], [Requested, Creating, Starting, Ready, Active, Idle], "{phases:?}");
    assert_eq!(phases[phases.len() - 3..], [Stopping, Stopped, Destroyed], "{phases:?}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_no_creates_nothing_and_an_end_is_an_end() {
    let town = Town::new(0).await;
    let fleet = town.fleet();
    let running = run(&fleet);
    fleet.create(session("refused-1", Pattern::Ephemeral)).await.unwrap();
    let refused = town.reaches("refused-1", Phase::Failed).await;
    assert_eq!(refused.reason.as_deref(), Some("not today"));
    assert!(town.cloud.created.lock().unwrap().is_empty());
    for (id, code, end) in [("well", 0, Phase::Destroyed), ("badly", 3, Phase::Failed)] {
        fleet.create(session(id, Pattern::Ephemeral)).await.unwrap();
        let up = town.reaches(id, Phase::Ready).await;
        town.cloud.end(up.native.as_deref().unwrap(), code);
        let ended = town.reaches(id, end).await;
        assert_eq!(ended.reason.as_deref().is_some_and(|why| why.contains("exit code 3")), code == 3, "{:?}", ended.reason);
    }
    for _ in 0..1000 {
        if town.cloud.alive() == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(town.cloud.alive(), 0, "what has failed is removed, too");
    assert!(fleet.create(Session { provider: String::from("nowhere"), ..session("x", Pattern::Ephemeral) }).await.is_err());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_has_what_it_has_and_no_more() {
    let mut town = Town::new(0).await;
    let zone = jiff::tz::TimeZone::UTC;
    let tenant = Tenant {
        name: String::from("t"),
        budget_usd_per_day: None,
        budget_usd_per_month: Some(1.0),
        zone,
        max_sessions: Some(3),
    };
    town.tenants.insert(String::from("t"), tenant);
    let fleet = town.fleet();
    let running = run(&fleet);
    // An hour of a container is 0.05 USD; ten hours of it would be half of what there is.
    let long = |id: &str, hours: u64| {
        let mut long = session(id, Pattern::LongRunning);
        long.spec.ttl = Duration::from_secs(hours * 3600);
        long
    };
    fleet.create(long("a", 10)).await.unwrap();
    let refused = fleet.create(long("b", 11)).await.unwrap_err().to_string();
    assert!(
        refused.contains("budget of tenant `t`") && refused.contains("0.50 are spent or set aside, and this needs 0.55"),
        "{refused}"
    );
    fleet.create(long("b", 8)).await.unwrap();
    // What it really costs takes the place of what was set aside.
    for id in ["a", "b"] {
        town.reaches(id, Phase::Ready).await;
    }
    *town.words.0.lock().unwrap() = Some((true, 0.2));
    for id in ["a", "b"] {
        while town.get(id).await.cost_usd() != 0.2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    fleet.create(long("c", 1)).await.unwrap();
    let full = fleet.create(long("d", 1)).await.unwrap_err().to_string();
    assert!(full.contains("has 3 sessions"), "{full}");
    // Three that cost 0.2 are within 1; at 0.4 each they are not, and whoever is asked first ends.
    town.reaches("c", Phase::Active).await;
    *town.words.0.lock().unwrap() = Some((true, 0.4));
    let mut over = None;
    while over.is_none() {
        tokio::time::sleep(Duration::from_millis(10)).await;
        for id in ["a", "b", "c"] {
            over = over.or(Some(town.get(id).await).filter(|session| session.wanted == Wanted::Gone));
        }
    }
    let over = town.reaches(over.unwrap().id.as_str(), Phase::Destroyed).await;
    assert!(over.cost_usd() >= 0.4);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_session_holds_is_removed_when_it_is_old_enough() {
    let town = Town::new(0).await;
    let fleet = town.fleet();
    let mut held = session("held", Pattern::LongRunning);
    (held.holds, held.phase, held.hooked) = (true, Phase::Idle, true);
    fleet.create(held.clone()).await.unwrap();
    let strange = |key: &str, fleet: &str, age: u64| {
        let labels = [(FLEET_LABEL, fleet), (KEY_LABEL, key), (SESSION_LABEL, "s")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let sandbox = Sandbox {
            key: Some(key.to_owned()),
            native: key.to_owned(),
            state: State::Running,
            created: Some(Timestamp::now() - Duration::from_secs(age)),
            labels: labels.into(),
            ..Cloud::gone()
        };
        town.cloud.sandboxes.lock().unwrap().insert(key.to_owned(), sandbox);
    };
    strange(&held.key(), "town", 1000);
    (0..20).for_each(|n| strange(&format!("lost-{n}"), "town", 1000));
    strange("young", "town", 1);
    strange("of-another", "elsewhere", 1000);
    assert_eq!(fleet.reconcile().await.unwrap(), 20, "over all pages of the list");
    let left: Vec<String> = town.cloud.sandboxes.lock().unwrap().keys().cloned().collect();
    assert_eq!(left, [held.key(), String::from("of-another"), String::from("young")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fleets_die_and_the_line_is_cut_and_nothing_is_left_or_created_twice() {
    let town = Town::new(5).await;
    let sessions = 120;
    let mut fleets: Vec<(Arc<Fleet>, Running)> = Vec::new();
    for _ in 0..2 {
        let fleet = town.fleet();
        fleets.push((Arc::clone(&fleet), run(&fleet)));
    }
    for n in 0..sessions {
        fleets[n % 2].0.create(session(&format!("s{n}"), Pattern::Ephemeral)).await.unwrap();
        if n % 20 == 19 {
            // Killed in the middle of whatever it does: nothing of it goes on, and its lease runs out.
            let (_, dead) = fleets.remove(0);
            dead.task.abort();
            let fleet = town.fleet();
            fleets.push((Arc::clone(&fleet), run(&fleet)));
        }
    }
    let ids: Vec<SessionId> = (0..sessions).map(|n| format!("s{n}").parse().unwrap()).collect();
    for id in &ids {
        fleets[0].0.want(id, Wanted::Gone, "the test is over").await.unwrap();
    }
    for id in &ids {
        town.reaches_end(id.as_str()).await;
    }
    assert_eq!(town.cloud.alive(), 0, "nothing is left");
    assert!(town.cloud.created.lock().unwrap().values().all(|times| *times == 1), "nothing was created twice");
    let over = Filter { over: true, ..Filter::default() };
    let held = town.store.list(&over, None, 1000).await.unwrap();
    assert_eq!(held.len(), sessions);
    assert!(held.iter().all(|session| !session.holds));
    for (_, running) in fleets {
        running.stop().await;
    }
}

impl Town {
    async fn reaches_end(&self, id: &str) {
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

/// A session waits for its hooks without being held, and what nobody waits for is tried again until it is done, also when the session is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_that_fail_are_tried_again_between_and_beside_the_steps() {
    let town = Town::new(0).await;
    let file = std::env::temp_dir().join(format!("agent-fleet-{}-hooks", std::process::id()));
    let hook = |name: &str, on: Phase, required: bool| {
        // Well done at the third try.
        let script = format!("echo {name} >> {0}; [ $(grep -c {name} {0}) -ge 3 ]", file.display());
        let argv = ["/bin/sh", "-c", &script].map(String::from).to_vec();
        let act = Act::Command { argv, pass: vec![] };
        let (name, timeout) = (String::from(name), Duration::from_secs(60));
        Hook { name, on: vec![on], templates: vec![], act, timeout, retries: 5, required, veto: true }
    };
    let hooks = vec![hook("first", Phase::Requested, true), hook("last", Phase::Destroyed, false)];
    let runner = Runner { hooks: hook::Hooks::new("town", hooks, Arc::new(Elsewhere)).unwrap(), store: Arc::clone(&town.store) };
    let fleet = town.fleet_with(Arc::new(runner));
    let running = run(&fleet);
    fleet.create(session("a", Pattern::LongRunning)).await.unwrap();
    town.reaches("a", Phase::Ready).await;
    fleet.want(&"a".parse().unwrap(), Wanted::Gone, "somebody asked for it").await.unwrap();
    town.reaches("a", Phase::Destroyed).await;
    let tried = async || {
        let runs = town.store.hook_runs(&"a".parse().unwrap()).await.unwrap();
        runs.iter().map(|run| format!("{} {}", run.hook, run.outcome)).collect::<Vec<_>>()
    };
    for _ in 0..3000 {
        if tried().await.len() >= 6 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    running.stop().await;
    assert_eq!(tried().await, ["first failed", "first failed", "first ok", "last failed", "last failed", "last ok"]);
    std::fs::remove_file(file).unwrap();
}

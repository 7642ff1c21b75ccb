//! What every provider must do, in one table. A provider's own tests say how it is reached and how it is disturbed ([`World`]), and call [`run`].
//!
//! What a provider declares that it cannot do is tried too: it has to be refused. What a world cannot be made to do is left out, and said.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use agent_fleet::provider::{
    Capabilities, Endpoint, Error, Exec, Executed, Happened, KEY_LABEL, Pause, Provider, Result, SESSION_LABEL, Sandbox, Secret,
    Size, Spec, State,
};
use async_trait::async_trait;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use jiff::Timestamp;

mod cases;

/// No case takes longer, on whatever machine.
const CASE_MOST: Duration = Duration::from_secs(240);
/// Providers are eventually consistent: what must become true does so within this.
const SOON: Duration = Duration::from_secs(60);

/// What a container does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Does {
    /// Nothing, until it is asked to end, and ends then.
    Wait,
    /// Nothing, and it does not hear that it is asked to end.
    Ignore,
    /// Ends at once, with this code.
    Exit(u8),
    /// Answers `GET /` on its port with 200.
    Serve(u16),
}

/// What a disturbance is about. Of a provider's requests for it the one that does the deed is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Create,
    State,
    List,
    Delete,
}

/// What happens to the next request for a [`Call`], once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is done, and the connection is closed without an answer.
    LoseAnswer,
    /// It is done, and the connection is closed in the middle of the answer's body.
    CutAnswer,
    /// It is not done: this status.
    Status(u16),
    /// It is not done: 429, with `Retry-After`.
    Limit(Duration),
    /// The same, with the date that is so much later.
    LimitUntil(Duration),
    /// It is done, and the answer comes that much later.
    Slow(Duration),
    /// The answer says a state that nobody knows.
    UnknownState,
    /// The answer has a field more.
    UnknownField,
    /// One container in the answer is of another shape: no object, an empty one, or one of its fields, whichever comes as the so manyeth.
    Garbled(usize),
}

/// A provider's surroundings: the fake that it talks to, or the proxy before the real one.
#[async_trait]
pub(crate) trait World: Send + Sync {
    /// A container that does this: image, command, what else the provider needs. Key, labels and life are the suite's. `None`: none can be had.
    fn spec(&self, does: Does) -> Option<Spec>;
    /// What the price list says of 1 CPU, 1 GiB and 5 GiB, in USD per hour, running.
    fn price_usd(&self) -> f64;
    /// How many containers are on a page of a list; `None`: all.
    fn page(&self) -> Option<usize>;
    /// Disturbs the next request. `false`: that cannot be done here.
    fn arm(&self, call: Call, fault: Fault) -> bool;
    /// How many of the disturbances have not happened yet.
    fn armed(&self) -> usize;
    /// How many containers there truly are with this key, in whatever state: not by the provider's word.
    async fn count(&self, key: &str) -> usize;
    /// Waits until a container that runs hears, or has stopped its ears: a real one needs a moment for that.
    async fn listens(&self, _native: &str) {}
}

/// One thing that a provider must do.
struct Case {
    promise: &'static str,
    run: for<'a> fn(&'a Suite<'a>) -> BoxFuture<'a, Outcome>,
}

enum Outcome {
    Kept,
    /// Not tried, and why.
    LeftOut(&'static str),
}

/// What the cases share.
struct Suite<'a> {
    provider: &'a dyn Provider,
    world: &'a dyn World,
    can: Capabilities,
    made: Mutex<Vec<String>>,
}

/// Tries every case, and fails with the names of those that did not hold.
pub(crate) async fn run(provider: &dyn Provider, world: &dyn World) {
    let suite = Suite { provider, world, can: provider.capabilities(), made: Mutex::default() };
    let mut broken = Vec::new();
    for case in cases::ALL {
        let began = Instant::now();
        let done = tokio::time::timeout(CASE_MOST, AssertUnwindSafe((case.run)(&suite)).catch_unwind()).await;
        let said = match done {
            Ok(Ok(Outcome::Kept)) if world.armed() == 0 => String::from("kept"),
            Ok(Ok(Outcome::Kept)) => String::from("BROKEN: a disturbance was never met"),
            Ok(Ok(Outcome::LeftOut(why))) => format!("left out: {why}"),
            Ok(Err(_)) => String::from("BROKEN"),
            Err(_) => format!("BROKEN: not done in {} s", CASE_MOST.as_secs()),
        };
        eprintln!("{}: {} ({:.1} s): {said}", provider.name(), case.promise, began.elapsed().as_secs_f64());
        if said.starts_with("BROKEN") {
            broken.push(case.promise);
        }
        suite.tidy().await;
    }
    assert!(broken.is_empty(), "{} does not keep: {broken:#?}", provider.name());
}

impl Suite<'_> {
    /// A container's spec, with a key and a session of its own.
    fn spec(&self, does: Does) -> Option<Spec> {
        let unique = uuid::Uuid::now_v7().simple().to_string();
        let key = format!("agent-{}-1", &unique[12..]);
        let mut spec = self.world.spec(does)?;
        spec.labels.insert(String::from(KEY_LABEL), key.clone());
        spec.labels.insert(String::from(SESSION_LABEL), unique);
        spec.ttl =
            self.can.ttl.map_or(Duration::from_secs(3600), |bounds| bounds.most.min(Duration::from_secs(3600)).max(bounds.least));
        self.made.lock().expect("no case panics with it").push(key.clone());
        Some(Spec { key, ..spec })
    }

    /// The label that only this spec's container has.
    fn label(&self, spec: &Spec) -> BTreeMap<String, String> {
        spec.labels.iter().filter(|(name, _)| *name == SESSION_LABEL).map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// Created, by as many tries as it takes: what does not pass is a failure.
    async fn created(&self, spec: &Spec) -> Sandbox {
        let began = Instant::now();
        loop {
            match self.provider.create(spec).await {
                Ok(sandbox) => return sandbox,
                Err(error) if error.is_passing() && began.elapsed() < SOON => wait(error).await,
                Err(error) => panic!("create: {error}"),
            }
        }
    }

    /// Created, started where that is needed, and running.
    async fn up(&self, spec: &Spec) -> Sandbox {
        let sandbox = self.created(spec).await;
        assert_eq!(sandbox.key.as_deref(), Some(spec.key.as_str()));
        self.started(&sandbox).await;
        self.becomes(&sandbox.native, "running", |now| now.state == State::Running).await
    }

    async fn started(&self, sandbox: &Sandbox) {
        if matches!(sandbox.state, State::Created | State::Stopped) {
            match self.provider.start(&sandbox.native).await {
                // It was quick, and there it runs once: it is over already.
                Err(Error::Unsupported { .. }) if sandbox.state == State::Stopped => {}
                done => done.expect("start"),
            }
        }
    }

    /// What it is once it is like that.
    async fn becomes(&self, native: &str, what: &str, like: impl Fn(&Sandbox) -> bool) -> Sandbox {
        let began = Instant::now();
        loop {
            let now = self.provider.state(native).await.expect("state");
            if like(&now) {
                return now;
            }
            assert!(began.elapsed() < SOON, "it is not {what}: {now:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Everything with these labels, over all pages; and how many those were.
    async fn listed(&self, labels: &BTreeMap<String, String>) -> Result<(Vec<Sandbox>, usize)> {
        let (mut all, mut pages, mut next) = (Vec::new(), 0, None::<String>);
        loop {
            let page = self.provider.list(labels, next.as_deref()).await?;
            all.extend(page.sandboxes);
            pages += 1;
            assert!(pages < 1000, "pages without an end");
            match page.next {
                Some(more) => next = Some(more),
                None => return Ok((all, pages)),
            }
        }
    }

    async fn shell(&self, native: &str, script: &str) -> Result<Executed> {
        self.provider.exec(native, &shell(script)).await
    }

    /// Removes what a case has left.
    async fn tidy(&self) {
        let made = std::mem::take(&mut *self.made.lock().expect("no case panics with it"));
        for key in made {
            if self.world.count(&key).await == 0 {
                continue;
            }
            let spec = BTreeMap::from([(String::from(KEY_LABEL), key.clone())]);
            if let Ok((left, _)) = self.listed(&spec).await {
                for sandbox in left {
                    if let Err(error) = self.provider.delete(&sandbox.native).await {
                        eprintln!("{}: {key} is left: {error}", self.provider.name());
                    }
                }
            }
        }
    }
}

fn shell(script: &str) -> Exec {
    Exec {
        argv: ["sh", "-c", script].map(String::from).to_vec(),
        env: BTreeMap::new(),
        stdin: Vec::new(),
        timeout: Duration::from_secs(60),
        detached: false,
    }
}

/// Asks until it is answered.
pub(crate) async fn serves(at: &Endpoint) {
    // As the fleet's own main does, or somebody else here has.
    drop(rustls::crypto::ring::default_provider().install_default());
    let client = reqwest::Client::builder().no_proxy().build().expect("a client");
    let began = Instant::now();
    loop {
        let asked = at.headers.iter().fold(client.get(&at.url), |asked, (name, value)| asked.header(name, value));
        match asked.send().await {
            Ok(answer) if answer.status() == 200 => return,
            said => assert!(began.elapsed() < SOON, "{}: {said:?}", at.url),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// As long as a provider asks for, or a little.
async fn wait(error: Error) {
    let after = match error {
        Error::Busy { after: Some(after), .. } => after,
        _ => Duration::from_millis(100),
    };
    tokio::time::sleep(after.min(SOON)).await;
}

fn unsupported<T: std::fmt::Debug>(result: Result<T>) {
    assert!(matches!(result, Err(Error::Unsupported { .. })), "what it cannot do is not refused: {result:?}");
}

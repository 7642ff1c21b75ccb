//! What a fleet does with ten thousand containers that run, on the core it is given: `cargo bench -p agent-fleet --bench drive -- [URL]`. Containers and their
//! sidecars are simulated and answer at once; all else is the service, with SQLite in a scratch file where no URL says otherwise.

#![expect(clippy::print_stdout, reason = "it is what it is for")]

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use agent_fleet::config::Tenant;
use agent_fleet::hook::Verdict;
use agent_fleet::inside::Inside;
use agent_fleet::lifecycle::Phase;
use agent_fleet::plan::Policy;
use agent_fleet::provider::{
    self, Capabilities, Endpoint, Exec, Executed, FLEET_LABEL, Happened, KEY_LABEL, Page, Pause, Price, Provider, SESSION_LABEL,
    Sandbox, Size, Spec, State,
};
use agent_fleet::service::{Fleet, Hooks, Policies};
use agent_fleet::session::{Pattern, Report, Session};
use agent_fleet::store;
use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use jiff::tz::TimeZone;

const SESSIONS: usize = 10_000;
const TENANTS: usize = 100;
/// How long it is watched for.
const WATCHED: Duration = Duration::from_secs(15);
const NAME: &str = "bench";

/// All of its containers run, and are looked at.
#[derive(Default)]
struct Simulated {
    looks: AtomicUsize,
}

fn sandbox(key: &str) -> Sandbox {
    let labels = [(FLEET_LABEL, NAME), (KEY_LABEL, key), (SESSION_LABEL, key)];
    Sandbox {
        key: Some(key.to_owned()),
        native: key.to_owned(),
        state: State::Running,
        reason: None,
        exit_code: None,
        size: None,
        created: None,
        deadline: None,
        labels: labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
        node: None,
        disrupted: None,
    }
}

#[async_trait]
impl Provider for Simulated {
    fn name(&self) -> &'static str {
        "simulated"
    }

    /// As Docker can.
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
            pause: Pause::Frozen,
            exec: true,
            logs: true,
            events: true,
            endpoint: true,
            traffic_keeps_awake: false,
            nodes: false,
        }
    }

    fn price(&self, _: Size) -> Price {
        Price { running: 0.05, paused: 0.05, stopped: 0.0, source: String::from("a bench") }
    }

    async fn create(&self, spec: &Spec) -> provider::Result<Sandbox> {
        Ok(sandbox(&spec.key))
    }

    async fn start(&self, _: &str) -> provider::Result<()> {
        Ok(())
    }

    async fn state(&self, native: &str) -> provider::Result<Sandbox> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        Ok(sandbox(native))
    }

    async fn list(&self, _: &BTreeMap<String, String>, _: Option<&str>) -> provider::Result<Page> {
        Ok(Page { sandboxes: (0..SESSIONS).map(|n| sandbox(&name(n))).collect(), unread: 0, next: None })
    }

    async fn exec(&self, _: &str, _: &Exec) -> provider::Result<Executed> {
        Ok(Executed::default())
    }

    async fn logs(&self, _: &str, _: usize) -> provider::Result<Vec<u8>> {
        Ok(Vec::new())
    }

    async fn keep_alive(&self, _: &str, _: Timestamp) -> provider::Result<()> {
        Ok(())
    }

    async fn pause(&self, _: &str) -> provider::Result<()> {
        Ok(())
    }

    async fn resume(&self, _: &str, _: &[String]) -> provider::Result<()> {
        Ok(())
    }

    async fn stop(&self, _: &str, _: Duration) -> provider::Result<()> {
        Ok(())
    }

    async fn delete(&self, _: &str) -> provider::Result<()> {
        Ok(())
    }

    async fn endpoint(&self, _: &str, _: u16) -> provider::Result<Endpoint> {
        Ok(Endpoint { url: String::from("http://nowhere"), headers: Vec::new() })
    }

    async fn events(&self, _: &BTreeMap<String, String>) -> provider::Result<BoxStream<'static, provider::Result<Happened>>> {
        Ok(futures_util::stream::pending().boxed())
    }
}

/// Each agent works, and costs more by and by.
struct Works(Instant);

#[async_trait]
impl Inside for Works {
    async fn report(&self, _: &Endpoint, now: Timestamp) -> Result<Report, String> {
        let (busy_until, cost_usd) = (Some(now + Duration::from_secs(60)), self.0.elapsed().as_secs_f64() / 1e3);
        Ok(Report { at: now, busy_until, cost_usd, conversation: None, memory_bytes: Some(300 << 20) })
    }
}

struct Quiet;

#[async_trait]
impl Hooks for Quiet {
    async fn run(&self, _: &Session) -> Verdict {
        Verdict::Go
    }
}

/// Each is looked at each second: five times as often as at Docker, and more than there is time for.
struct Often(Policy);

impl Policies for Often {
    fn policy(&self, _: &Session) -> Policy {
        self.0.clone()
    }

    fn port(&self, _: &Session) -> u16 {
        9477
    }
}

fn name(n: usize) -> String {
    format!("session-{n}")
}

/// One whose agent works.
fn session(n: usize, tenants: &[Tenant], now: Timestamp) -> Result<Session, Box<dyn Error>> {
    let key = name(n);
    let spec = serde_json::from_value(serde_json::json!({
        "key": key, "image": "registry.example/agent@sha256:0000000000000000000000000000000000000000000000000000000000000000",
        "env": {"ANTHROPIC_BASE_URL": "http://gateway", "TASK": "x".repeat(200)}, "labels": sandbox(&key).labels, "ttl": {"secs": 36000, "nanos": 0},
    }))?;
    let tenant = &tenants[n % tenants.len()];
    let mut session = Session::new(key.parse()?, (&tenant.name, "ada"), Pattern::LongRunning, "simulated", spec, now);
    (session.phase, session.hooked, session.holds) = (Phase::Active, true, true);
    (session.native, session.taken) = (Some(key.clone()), Some(key));
    (session.made, session.metered_since) = (Some(now), Some(now));
    session.cost_at = tenant.periods(now).into_iter().map(|(period, _)| (period, 0.0)).collect();
    Ok(session)
}

/// What this process holds in memory now, and has held at most, in MiB.
fn memory() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let of = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).map_or(0, |kib| kib >> 10)
    };
    (of("VmRSS:"), of("VmHWM:"))
}

async fn measure(url: &str, tenants: usize) -> Result<(), Box<dyn Error>> {
    let store = store::open(url).await?;
    let now = Timestamp::now();
    let budgets = (0..tenants).map(|n| Tenant {
        name: format!("tenant-{n}"),
        budget_usd_per_day: Some(1e6),
        budget_usd_per_month: Some(1e7),
        zone: TimeZone::UTC,
        max_sessions: None,
    });
    let budgets: Vec<Tenant> = budgets.collect();
    for n in 0..SESSIONS {
        store.insert(&session(n, &budgets, now)?).await?;
    }
    let budgets = budgets.into_iter().map(|tenant| (tenant.name.clone(), tenant));
    let simulated = Arc::new(Simulated::default());
    let providers = BTreeMap::from([(String::from("simulated"), Arc::clone(&simulated) as Arc<dyn Provider>)]);
    let policy = Policy { look_every: Duration::from_secs(1), ..Policy::default() };
    let with: (Arc<dyn Hooks>, Arc<dyn Policies>, Arc<dyn Inside>) =
        (Arc::new(Quiet), Arc::new(Often(policy)), Arc::new(Works(Instant::now())));
    let fleet = Arc::new(Fleet::new(NAME, store, providers, with, budgets.collect(), Arc::new(Timestamp::now)));
    let (end, ends) = tokio::sync::watch::channel(false);
    let running = tokio::spawn(Arc::clone(&fleet).run(ends));
    // What is begun with is over: all that exists is held against all that is kept.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (began, before) = (Instant::now(), simulated.looks.load(Ordering::Relaxed));
    tokio::time::sleep(WATCHED).await;
    let (looks, took) = (simulated.looks.load(Ordering::Relaxed) - before, began.elapsed());
    end.send(true)?;
    running.await?;
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    let each = looks as f64 / took.as_secs_f64();
    let (resident, most) = memory();
    println!(
        "look, decide, keep and bill, {tenants:>3} tenant{}  {each:>7.0}/s  {resident:>4} MiB, {most} at most",
        if tenants == 1 { " " } else { "s" }
    );
    let began = Instant::now();
    let removed = fleet.reconcile().await?;
    println!("hold all that exists against all that is kept {:>6.0} ms, {removed} orphans", began.elapsed().as_secs_f64() * 1e3);
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let scratch = std::env::temp_dir().join(format!("agent-fleet-bench-{}", std::process::id()));
    for tenants in [TENANTS, 1] {
        let file = format!("sqlite:{}/{tenants}.db", scratch.display());
        measure(url.as_deref().unwrap_or(&file), tenants).await?;
        // One database is of one fleet.
        if url.is_some() {
            return Ok(());
        }
    }
    std::fs::remove_dir_all(scratch)?;
    Ok(())
}

//! A thousand sessions of three tenants while fleets are killed, the line to the provider is cut and containers die: no orphan, no double, and the books
//! say what it has cost.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent_fleet::config::Tenant;
use agent_fleet::inside::Inside;
use agent_fleet::provider::{Endpoint, State};
use agent_fleet::service::Fleet;
use agent_fleet::session::{Pattern, Report, Session, SessionId, Wanted};
use agent_fleet::store::{self, Filter, Store};
use async_trait::async_trait;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use sqlx::{AssertSqlSafe, Connection, Executor};

use crate::town::{Cloud, Running, Town, run, session};

const SESSIONS: usize = 1000;
const TENANTS: [&str; 3] = ["t0", "t1", "t2"];
/// What each container's agent costs, from when it is first asked: nobody has to know more of it.
const USD: f64 = 0.25;

/// Sidecars that answer as long as their containers run, and what they have said.
struct Sidecars {
    cloud: Arc<Cloud>,
    said: Mutex<BTreeSet<String>>,
}

#[async_trait]
impl Inside for Sidecars {
    async fn report(&self, at: &Endpoint, now: Timestamp) -> Result<Report, String> {
        let native = at.url.trim_start_matches("http://").to_owned();
        let sandboxes = self.cloud.sandboxes.lock().unwrap();
        if sandboxes.get(&native).is_none_or(|sandbox| sandbox.state != State::Running) {
            return Err(String::from("nobody is there"));
        }
        self.said.lock().unwrap().insert(native);
        let busy_until = Some(now + Duration::from_secs(60));
        Ok(Report { at: now, busy_until, cost_usd: USD, conversation: None, memory_bytes: None })
    }
}

/// A number that is the same in every run.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % sides
    }
}

fn month(now: Timestamp) -> String {
    tenant("x").periods(now).remove(0).0
}

fn tenant(name: &str) -> Tenant {
    let (name, zone) = (name.to_owned(), TimeZone::UTC);
    Tenant { name, budget_usd_per_day: None, budget_usd_per_month: Some(1e6), zone, max_sessions: None }
}

async fn survive(store: Arc<dyn Store>) {
    let mut town = Town::new(11).await;
    town.store = store;
    // A thousand that are looked at often keep a busy machine busy.
    town.policy.look_every = Duration::from_secs(30);
    town.policy.backoff = Duration::from_millis(20);
    town.policy.tries = 50;
    town.tenants.extend(TENANTS.map(|name| (name.to_owned(), tenant(name))));
    let said = Sidecars { cloud: Arc::clone(&town.cloud), said: Mutex::default() };
    let sidecars = Arc::new(said);
    town.inside = Some(Arc::clone(&sidecars) as Arc<dyn Inside>);
    let began = Instant::now();
    let started = Timestamp::now();
    let mut dice = Dice(7);
    let mut fleets: Vec<(Arc<Fleet>, Running)> = Vec::new();
    let start = |town: &Town| {
        let fleet = town.fleet();
        (Arc::clone(&fleet), run(&fleet))
    };
    fleets.extend([start(&town), start(&town)]);
    let ids: Vec<SessionId> = (0..SESSIONS).map(|n| format!("s{n}").parse().unwrap()).collect();
    for (n, id) in ids.iter().enumerate() {
        let asked = Session { tenant: TENANTS[n % 3].to_owned(), ..session(id.as_str(), Pattern::LongRunning) };
        fleets[n % 2].0.create(asked).await.unwrap();
        match dice.throw(40) {
            // Killed in the middle of whatever it does.
            0 => {
                let (_, dead) = fleets.remove(dice.throw(2));
                dead.task.abort();
                fleets.push(start(&town));
            }
            1..4 => {
                let session = town.store.get(&ids[dice.throw(n + 1)]).await.unwrap().unwrap();
                // What was said and not heard of would be in no book: one that has not spoken, or was heard.
                let (key, heard) = (session.key(), session.report.is_some());
                let mut sandboxes = town.cloud.sandboxes.lock().unwrap();
                if let Some(sandbox) = sandboxes.get_mut(&key).filter(|_| heard || !sidecars.said.lock().unwrap().contains(&key))
                {
                    (sandbox.state, sandbox.exit_code) = (State::Failed, Some(137));
                }
            }
            4..8 => {
                let of = &ids[dice.throw(n + 1)];
                let session = town.store.get(of).await.unwrap().unwrap();
                if session.report.is_some() {
                    fleets[0].0.want(of, Wanted::Gone, "somebody had enough").await.unwrap();
                }
            }
            // Nothing is answered for a while, and then all again.
            8 => town.cloud.every.store(2, std::sync::atomic::Ordering::SeqCst),
            9..14 => town.cloud.every.store(11, std::sync::atomic::Ordering::SeqCst),
            _ => {}
        }
    }
    town.cloud.every.store(11, std::sync::atomic::Ordering::SeqCst);
    // Everybody is heard of, or is over.
    let mut open = ids.clone();
    while !open.is_empty() {
        assert!(began.elapsed() < Duration::from_secs(600), "{} are still not heard of", open.len());
        // A list of a thousand is work, too.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let listed = town.store.list(&Filter { over: true, ..Filter::default() }, None, 2 * SESSIONS).await.unwrap();
        let ready: BTreeSet<&SessionId> = listed
            .iter()
            .filter(|session| session.report.is_some() || session.phase.is_last())
            .map(|session| &session.id)
            .collect();
        open.retain(|id| !ready.contains(id));
    }
    for id in &ids {
        fleets[0].0.want(id, Wanted::Gone, "the test is over").await.unwrap();
    }
    for id in &ids {
        town.reaches_end(id.as_str()).await;
    }
    for (_, running) in fleets {
        running.stop().await;
    }
    assert_eq!(town.cloud.alive(), 0, "nothing is left");
    assert!(town.cloud.created.lock().unwrap().values().all(|times| *times == 1), "nothing was created twice");

    let all = town.store.list(&Filter { over: true, ..Filter::default() }, None, 2 * SESSIONS).await.unwrap();
    assert_eq!(all.len(), SESSIONS);
    let told = sidecars.said.lock().unwrap().len();
    let agents: f64 = all.iter().map(Session::cost_usd).sum();
    #[expect(clippy::cast_precision_loss, reason = "some hundreds")]
    let truth = told as f64 * USD;
    assert!((agents - truth).abs() < 1e-6, "agents have cost {truth}, and {agents} are kept");
    assert!(told > SESSIONS / 2, "{told}");
    if month(started) == month(Timestamp::now()) {
        for name in TENANTS {
            let kept: f64 = all.iter().filter(|session| session.tenant == name).map(Session::total_usd).sum();
            let booked = town.store.spent(name, &month(started)).await.unwrap();
            assert!((kept - booked).abs() < 1e-5, "`{name}` has spent {kept}, and {booked} are booked");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_sessions_survive_everything_on_sqlite() {
    // On a disk of memory where there is one: what a disk does is another test's.
    let shm = std::path::Path::new("/dev/shm");
    let parent = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
    let dir = parent.join(format!("agent-fleet-{}-chaos", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    survive(store::open(&format!("sqlite:{}", dir.join("db").display())).await.unwrap()).await;
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_sessions_survive_everything_on_postgres() {
    let Ok(server) = std::env::var("AGENT_FLEET_TEST_POSTGRES") else { return };
    let schema = format!("chaos_{}", uuid::Uuid::now_v7().simple());
    let mut connection = sqlx::PgConnection::connect(&server).await.unwrap();
    connection.execute(AssertSqlSafe(format!("CREATE SCHEMA {schema}"))).await.unwrap();
    connection.close().await.unwrap();
    let joint = if server.contains('?') { '&' } else { '?' };
    survive(store::open(&format!("{server}{joint}options[search_path]={schema}")).await.unwrap()).await;
}

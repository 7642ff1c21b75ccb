//! How quick a store is, and how large with ten thousand sessions: `cargo bench -p agent-fleet --bench store -- [URL]`. SQLite in a scratch file, where no URL
//! says otherwise.

#![expect(clippy::print_stdout, reason = "it is what it is for")]

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use agent_fleet::lifecycle::Phase;
use agent_fleet::session::Session;
use agent_fleet::store::{self, Filter, Store};

const SESSIONS: usize = 10_000;
/// Made ahead.
const SPARES: usize = 2_000;
/// As many as a fleet drives at once.
const BATCH: usize = 64;
const LEASE: Duration = Duration::from_secs(3600);

fn session(n: usize) -> serde_json::Result<Session> {
    serde_json::from_value(serde_json::json!({
        "id": format!("session-{n}"), "tenant": format!("tenant-{}", n % 100), "owner": "ada", "pattern": "ephemeral", "provider": "docker",
        "spec": {
            "key": format!("agent-{n}"), "image": "registry.example/agent@sha256:0000000000000000000000000000000000000000000000000000000000000000",
            "env": {"ANTHROPIC_BASE_URL": "http://gateway", "TASK": "x".repeat(200)}, "labels": {"agent-fleet": "one"}, "ttl": {"secs": 3600, "nanos": 0},
        },
        "wanted": "running", "phase": "active", "since": "2026-11-26T12:00:00Z", "created": "2026-11-26T12:00:00Z", "ends": "2026-11-26T13:00:00Z",
        "generation": 1, "hooked": true, "holds": true, "native": format!("container-{n}"),
        "report": {"at": "2026-11-26T12:09:59Z", "busy_until": "2026-11-26T12:11:00Z", "cost_usd": 0.1},
    }))
}

/// One whose container waits for somebody.
fn spare(n: usize) -> serde_json::Result<Session> {
    let mut spare = session(n)?;
    if let Ok(id) = format!("spare-{n}").parse() {
        spare.id = id;
    }
    (spare.pool, spare.phase, spare.holds, spare.native) =
        (Some(String::from("kind")), Phase::Ready, true, Some(format!("container-{n}")));
    // One whose agent has worked is nobody's any more.
    spare.report = None;
    Ok(spare)
}

/// What this process holds in memory now.
fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).map_or(0, |kib| kib / 1024)
}

fn say(what: &str, n: usize, began: Instant) {
    let seconds = began.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    let each = n as f64 / seconds;
    println!("{what:<40} {each:>9.0}/s  {seconds:>7.2} s  {:>4} MiB", resident_mib());
}

/// All of them, by so many tasks.
async fn each<F>(tasks: usize, work: impl Fn(usize) -> F + Clone + Send + 'static) -> Result<(), Box<dyn Error>>
where
    F: Future<Output = store::Result<()>> + Send + 'static,
{
    let tasks: Vec<_> = (0..tasks)
        .map(|task| {
            let work = work.clone();
            tokio::spawn(async move {
                for n in (task..SESSIONS).step_by(tasks) {
                    work(n).await?;
                }
                Ok::<_, store::Error>(())
            })
        })
        .collect();
    for task in tasks {
        task.await??;
    }
    Ok(())
}

async fn measure(store: Arc<dyn Store>) -> Result<(), Box<dyn Error>> {
    let began = Instant::now();
    let all: Arc<Vec<Session>> = Arc::new((0..SESSIONS).map(session).collect::<Result<_, _>>()?);
    let inserted = (store.clone(), all.clone());
    each(BATCH, move |n| {
        let (store, all) = inserted.clone();
        async move { store.insert(&all[n]).await.map(drop) }
    })
    .await?;
    drop(all);
    say("insert, each a write of its own", SESSIONS, began);

    let began = Instant::now();
    let mut claimed = 0;
    while claimed < SESSIONS {
        claimed += store.claim("bench", LEASE, BATCH).await?.len();
    }
    say("claim, 64 at a time", SESSIONS, began);

    let began = Instant::now();
    let renewed = store.renew("bench", LEASE).await?;
    say("renew, all at once", usize::try_from(renewed)?, began);

    for (durably, what) in [(true, "get, update, release"), (false, "get, note, release")] {
        store.claim("bench", LEASE, SESSIONS).await?;
        let (began, driven) = (Instant::now(), store.clone());
        each(BATCH, move |n| {
            let store = driven.clone();
            async move {
                let id = format!("session-{n}").parse().map_err(store::Error::Store)?;
                let mut session = store.get(&id).await?.ok_or(store::Error::Missing(id.clone()))?;
                session.failures += 1;
                if durably {
                    store.update(&mut session).await?
                } else {
                    store.note(&mut session).await?
                }
                store.release("bench", &id, Some(session.created)).await
            }
        })
        .await?;
        say(what, SESSIONS, began);
    }

    // As sessions take what was made ahead: what waits is looked for, and both are written or neither.
    for n in 0..SPARES {
        store.insert(&spare(n)?).await?;
    }
    let began = Instant::now();
    let conflicts = Arc::new(AtomicUsize::new(0));
    let (taking, lost) = (store.clone(), conflicts.clone());
    each(BATCH, move |n| {
        let (store, lost) = (taking.clone(), lost.clone());
        async move {
            if n >= SPARES {
                return Ok(());
            }
            let id = format!("session-{n}").parse().map_err(store::Error::Store)?;
            let mut session = store.get(&id).await?.ok_or(store::Error::Missing(id))?;
            loop {
                let spares = store.spares("kind", 8).await?;
                if spares.is_empty() {
                    return Err(store::Error::Store(String::from("there is none left in the pool")));
                }
                for mut spare in spares {
                    (spare.given, spare.holds, spare.phase) = (Some(session.id.clone()), false, Phase::Stopped);
                    (session.taken, session.holds) = (Some(spare.key()), true);
                    match store.update_both(&mut session, &mut spare).await {
                        Ok(()) => return Ok(()),
                        Err(store::Error::Conflict(_)) => drop(lost.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => return Err(error),
                    }
                }
            }
        }
    })
    .await?;
    say("take from a pool of 2,000, 64 at a time", SPARES, began);
    println!("{:<40} {:>9} took what was another's by then", "", conflicts.load(Ordering::Relaxed));

    let began = Instant::now();
    store.count().await?;
    say("count", SESSIONS, began);

    let began = Instant::now();
    let (mut listed, mut after) = (0, None);
    loop {
        let page = store.list(&Filter::default(), after.as_ref(), 500).await?;
        let Some(last) = page.last() else { break };
        listed += page.len();
        after = Some(last.id.clone());
    }
    say("list, 500 at a time", listed, began);
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let scratch = std::env::temp_dir().join(format!("agent-fleet-bench-{}", std::process::id()));
    let store = store::open(&url.clone().unwrap_or_else(|| format!("sqlite:{}/fleet.db", scratch.display()))).await?;
    println!("{:<40} {:>30} MiB", "", resident_mib());
    let measured = measure(store).await;
    if url.is_none() {
        std::fs::remove_dir_all(scratch)?;
    }
    measured
}

//! The service against a provider that fails, with fleets that die: nothing is left, nothing is created twice, and every session comes to its end.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed; helpers are tests, too")]

mod api;
mod chaos;
mod money;
mod nodes;
mod places;
mod pools;
mod proxy;
mod reported;
mod town;

use std::sync::Arc;
use std::time::Duration;

use agent_fleet::config::{Elsewhere, Tenant};
use agent_fleet::hook::{self, Act, Hook, Runner};
use agent_fleet::lifecycle::Phase;
use agent_fleet::provider::{FLEET_LABEL, KEY_LABEL, SESSION_LABEL, Sandbox, State};
use agent_fleet::service::Fleet;
use agent_fleet::session::{Pattern, Session, SessionId, Wanted};
use agent_fleet::store::{Filter, Inserted};
use jiff::Timestamp;

use crate::town::{Cloud, Running, Town, run, session};

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
    let phases = town.phases_to("a", Destroyed).await;
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
    *town.words.0.lock().unwrap() = Some((true, 0.0));
    let fleet = town.fleet();
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
    // What it really costs takes the place of what was set aside, as soon as it runs.
    let running = run(&fleet);
    for id in ["a", "b"] {
        town.reaches(id, Phase::Active).await;
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
    assert!(over.reason.as_ref().is_some_and(|why| why.contains("1 USD, is spent")), "{:?}", over.reason);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_session_holds_is_removed_when_it_is_old_enough() {
    let town = Town::new(0).await;
    // An hour later: what is in the store is older than anything that it could not know.
    let later = || Timestamp::now() + Duration::from_secs(3600);
    let fleet = town.fleet_at(Arc::new(later));
    let mut held = session("held", Pattern::LongRunning);
    (held.holds, held.phase, held.hooked) = (true, Phase::Idle, true);
    fleet.create(held).await.unwrap();
    let held = town.get("held").await;
    let strange = |key: &str, fleet: &str, age: u64| {
        let labels = [(FLEET_LABEL, fleet), (KEY_LABEL, key), (SESSION_LABEL, "s")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let sandbox = Sandbox {
            key: Some(key.to_owned()),
            native: key.to_owned(),
            state: State::Running,
            created: Some(later() - Duration::from_secs(age)),
            labels: labels.into(),
            ..Cloud::gone()
        };
        town.cloud.sandboxes.lock().unwrap().insert(key.to_owned(), sandbox);
    };
    strange(&held.key(), "town", 1000);
    (0..20).for_each(|n| strange(&format!("lost-{n}"), "town", 1000));
    strange("young", "town", 1);
    strange("of-another", "elsewhere", 1000);
    strange("of-another-store", "town", 4000);
    assert_eq!(fleet.reconcile().await.unwrap(), 20, "over all pages of the list");
    let left: Vec<String> = town.cloud.sandboxes.lock().unwrap().keys().cloned().collect();
    assert_eq!(left, [held.key(), String::from("of-another"), String::from("of-another-store"), String::from("young")]);
}

/// It is on the provider's list, and nobody can read it there: it is not gone, and not an orphan that nobody finds again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_of_a_list_is_neither_lost_nor_forgotten() {
    let mut town = Town::new(0).await;
    town.policy.tries = 3;
    let fleet = town.fleet();
    // Its creation was not heard of again: it is found by its key alone.
    let mut ending = session("a", Pattern::LongRunning);
    (ending.holds, ending.phase, ending.hooked, ending.wanted) = (true, Phase::Stopping, true, Wanted::Gone);
    fleet.create(ending).await.unwrap();
    let (key, labels) = (town.get("a").await.key(), town.get("a").await.spec.labels);
    let created = Some(Timestamp::now() - Duration::from_secs(1000));
    let sandbox =
        Sandbox { key: Some(key.clone()), native: key.clone(), state: State::Running, created, labels, ..Cloud::gone() };
    town.cloud.sandboxes.lock().unwrap().insert(key.clone(), sandbox);
    town.cloud.unread.lock().unwrap().insert(key.clone());
    assert_eq!(fleet.reconcile().await.unwrap(), 0);
    let running = run(&fleet);
    // As often as it is asked about, and then it is to be removed: still nobody says that it is gone.
    let why = loop {
        let now = town.get("a").await;
        assert!(now.holds, "it is taken for gone: {:?}", now.reason);
        if now.phase == Phase::Stopped && now.failures > 0 {
            break now.reason.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert!(why.contains("cannot be read"), "{why}");
    assert_eq!(town.cloud.alive(), 1);
    town.cloud.unread.lock().unwrap().clear();
    town.reaches_end("a").await;
    assert_eq!(town.cloud.alive(), 0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fleets_die_and_the_line_is_cut_and_nothing_is_left_or_created_twice() {
    let dir = std::env::temp_dir().join(format!("agent-fleet-{}-deaths", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let mut town = Town::new(5).await;
    // One in memory is gone with its connection, which may be closed when who waits for it is killed.
    town.store = agent_fleet::store::open(&format!("sqlite:{}", dir.join("db").display())).await.unwrap();
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
    std::fs::remove_dir_all(dir).unwrap();
}

/// One that is let go of is driven again: a lease that is only renewed would keep it for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mistake_of_ours_does_not_keep_a_session() {
    let town = Town::new(0).await;
    let fleet = town.fleet();
    let running = run(&fleet);
    town.cloud.panics.store(true, std::sync::atomic::Ordering::SeqCst);
    fleet.create(session("a", Pattern::LongRunning)).await.unwrap();
    town.reaches("a", Phase::Ready).await;
    assert!(!town.cloud.panics.load(std::sync::atomic::Ordering::SeqCst));
    running.stop().await;
}

#[tokio::test]
async fn what_has_failed_and_has_a_container_is_neither_an_orphan_nor_forgotten() {
    let town = Town::new(0).await;
    let fleet = town.fleet();
    let failed = Session { holds: true, phase: Phase::Failed, ..session("a", Pattern::Ephemeral) };
    fleet.create(failed.clone()).await.unwrap();
    let labels = town.get("a").await.spec.labels;
    let created = Some(Timestamp::now() - Duration::from_secs(1000));
    let (key, native) = (Some(failed.key()), failed.key());
    let sandbox = Sandbox { key, native, state: State::Running, created, labels, ..Cloud::gone() };
    town.cloud.sandboxes.lock().unwrap().insert(failed.key(), sandbox);
    // Hooks may want to see what has failed before it is removed.
    assert_eq!(fleet.reconcile().await.unwrap(), 0);
    assert_eq!(town.store.prune(Timestamp::now() + Duration::from_secs(1000)).await.unwrap(), 0);
    let mut gone = town.get("a").await;
    gone.holds = false;
    town.store.update(&mut gone).await.unwrap();
    assert_eq!(town.store.prune(Timestamp::now() + Duration::from_secs(1000)).await.unwrap(), 1);
}

#[tokio::test]
async fn who_is_wanted_again_is_not_put_to_sleep_at_that_moment() {
    let town = Town::new(0).await;
    let fleet = town.fleet();
    let long_ago = Timestamp::now() - Duration::from_secs(1000);
    let idle = Session { holds: true, phase: Phase::Idle, idle_since: Some(long_ago), ..session("a", Pattern::Hybrid) };
    fleet.create(idle.clone()).await.unwrap();
    let wanted = fleet.want(&idle.id, Wanted::Running, "a message").await.unwrap().unwrap();
    assert!(wanted.idle_since > Some(long_ago + Duration::from_secs(900)));
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

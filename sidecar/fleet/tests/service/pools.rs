//! What is made ahead, what is given up, and what is drained.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use agent_fleet::drain::Where;
use agent_fleet::lifecycle::Phase;
use agent_fleet::plan::PauseBy;
use agent_fleet::pool::{Ahead, Pool};
use agent_fleet::provider::{Provider, State};
use agent_fleet::service;
use agent_fleet::session::{Pattern, Session, Wanted};
use agent_fleet::store::Filter;

use crate::town::{Cloud, Town, run, session, until};

pub(crate) fn ahead(size: usize) -> Ahead {
    let pool = Pool { size, max_age: Duration::from_secs(1800), per_minute: 100_000 };
    let (template, provider, spec) = (String::from("task"), String::from("cloud"), session("x", Pattern::LongRunning).spec);
    Ahead { template, pool, provider, pattern: Pattern::LongRunning, spec }
}

/// Containers that wait for somebody.
pub(crate) async fn waiting(town: &Town) -> Vec<Session> {
    let nobodys = Filter { tenant: Some(String::new()), ..Filter::default() };
    let all = town.store.list(&nobodys, None, 1000).await.unwrap();
    all.into_iter().filter(|spare| spare.spare().is_some()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_has_what_was_made_ahead_and_its_place_is_filled() {
    let mut town = Town::new(0).await;
    *town.words.0.lock().unwrap() = Some((false, 0.0));
    town.pools = vec![ahead(2)];
    let (one, other) = (town.fleet(), town.fleet());
    let running = [run(&one), run(&other)];
    until("two wait", || async { waiting(&town).await.len() == 2 }).await;
    let there: BTreeSet<String> = town.cloud.created.lock().unwrap().keys().cloned().collect();
    assert_eq!(there.len(), 2, "two fleets make no more than one does");
    assert!(town.trail.0.lock().unwrap().is_empty(), "nobody has asked for them: no hook is run");

    // What is made in the place of the first that is taken could else be had by the second.
    town.cloud.full.store(true, Ordering::SeqCst);
    for (fleet, id) in [(&one, "a"), (&other, "b")] {
        fleet.create(session(id, Pattern::LongRunning)).await.unwrap();
    }
    let mut has = BTreeSet::new();
    for id in ["a", "b"] {
        let up = town.reaches(id, Phase::Ready).await;
        assert!(up.holds && up.taken.is_some());
        has.insert(up.key());
        use Phase::*;
        assert_eq!(town.phases_to(id, Ready).await[..4], [Requested, Creating, Starting, Ready], "its hooks are run");
    }
    assert_eq!(has, there, "each has one of those that were there");
    town.cloud.full.store(false, Ordering::SeqCst);
    let mut own = session("c", Pattern::LongRunning);
    own.spec.env.insert(String::from("ITS"), String::from("own"));
    one.create(own).await.unwrap();
    let made = town.reaches("c", Phase::Ready).await;
    assert!(made.taken.is_none() && !there.contains(&made.key()), "nothing fits whose environment is its own");
    until("two wait again", || async { waiting(&town).await.len() == 2 }).await;
    // What its container says of itself is what it was made as.
    let key = town.get("a").await.key();
    let first = town.cloud.sandboxes.lock().unwrap()[&key].labels["agent-fleet.session"].clone();
    assert_eq!(one.holder(&first.parse().unwrap()).await.unwrap().unwrap().id.as_str(), "a");

    one.want(&"a".parse().unwrap(), Wanted::Gone, "enough").await.unwrap();
    town.reaches_end("a").await;
    assert_eq!(one.reconcile().await.unwrap(), 0, "those that wait are no orphans");
    for running in running {
        running.stop().await;
    }
    // The template is no longer in the configuration, or is another: nothing is left of it.
    town.pools = vec![];
    let fleet = town.fleet();
    let running = run(&fleet);
    until("none waits", || async {
        fleet.refill(&mut BTreeMap::new()).await.unwrap();
        town.cloud.alive() == 2
    })
    .await;
    assert!(waiting(&town).await.is_empty());
    running.stop().await;
}

/// Who drives it looks at it all the time: it is given away all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_made_ahead_is_not_missed_because_it_is_written_to() {
    let mut town = Town::new(0).await;
    *town.words.0.lock().unwrap() = Some((false, 0.0));
    town.pools = vec![ahead(1)];
    let fleet = town.fleet();
    let running = run(&fleet);
    for id in ["a", "b", "c", "d", "e", "f"] {
        until("one waits", || async { waiting(&town).await.len() == 1 }).await;
        let (store, spare) = (Arc::clone(&town.store), waiting(&town).await.remove(0).id);
        let writes = tokio::spawn(async move {
            loop {
                let mut spare = store.get(&spare).await.unwrap().unwrap();
                if spare.given.is_some() {
                    return;
                }
                store.note(&mut spare).await.ok();
            }
        });
        fleet.create(session(id, Pattern::LongRunning)).await.unwrap();
        assert!(town.reaches(id, Phase::Ready).await.taken.is_some(), "{id}");
        writes.await.unwrap();
    }
    running.stop().await;
}

/// What nobody had is in nobody's book, what somebody has is in his.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_costs_nobody_and_is_added_up_all_the_same() {
    let mut town = Town::new(0).await;
    *town.words.0.lock().unwrap() = Some((false, 0.0));
    town.pools = vec![ahead(1)];
    let fleet = town.fleet();
    let running = run(&fleet);
    until("one waits", || async { waiting(&town).await.len() == 1 }).await;
    let spare = waiting(&town).await.remove(0);
    fleet.create(session("a", Pattern::LongRunning)).await.unwrap();
    town.reaches("a", Phase::Ready).await;
    let period = agent_fleet::config::Tenant {
        name: String::new(),
        budget_usd_per_day: None,
        budget_usd_per_month: Some(1.0),
        zone: jiff::tz::TimeZone::UTC,
        max_sessions: None,
    };
    let (month, _) = period.periods(fleet.now()).remove(0);
    until("it is booked", || async {
        let given = town.get(spare.id.as_str()).await;
        let open: f64 = waiting(&town).await.iter().map(|spare| spare.container_usd).sum();
        given.phase == Phase::Destroyed
            && town.store.spent("", &month).await.unwrap() + 1e-8 >= given.container_usd + open
            && given.container_usd > 0.0
    })
    .await;
    running.stop().await;
}

/// It says that it is ready, and is gone: the store has it as up, and then as failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_ends_as_soon_as_it_is_ready_is_not_made_for_ever() {
    let mut town = Town::new(0).await;
    *town.words.0.lock().unwrap() = Some((false, 0.0));
    town.pools = vec![ahead(1)];
    let fleet = town.fleet();
    let running = run(&fleet);
    let made = || town.cloud.created.lock().unwrap().len();
    // The second is made after a while, when the first has failed.
    until("two have come up and ended", || async {
        // What is made after them is none of what is counted below.
        if made() == 2 {
            return true;
        }
        for spare in waiting(&town).await {
            let mut sandboxes = town.cloud.sandboxes.lock().unwrap();
            if let Some(container) = sandboxes.get_mut(spare.native.as_deref().unwrap()) {
                (container.state, container.exit_code) = (State::Stopped, Some(3));
            }
        }
        false
    })
    .await;
    let told = fleet.metrics().exposition([]);
    assert!(told.contains("agent_fleet_pool_failures_total{template=\"task\"} 1"), "{told}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provider_that_is_drained_is_empty_in_the_end_and_gets_nothing_new() {
    let mut town = Town::new(0).await;
    town.policy.pause_by = PauseBy::Nothing;
    town.pools = vec![ahead(1)];
    let fleet = town.fleet();
    let running = run(&fleet);
    *town.words.0.lock().unwrap() = Some((false, 0.0));
    until("one waits", || async { waiting(&town).await.len() == 1 }).await;
    fleet.create(session("idle", Pattern::LongRunning)).await.unwrap();
    town.reaches("idle", Phase::Ready).await;
    until("its place is filled", || async { waiting(&town).await.len() == 1 }).await;
    let ends = fleet.now() + Duration::from_secs(3600);
    assert!(fleet.drain(&Where::all("nowhere"), Some(ends)).await.is_err());
    fleet.drain(&Where::all("cloud"), Some(ends)).await.unwrap();
    let refused = fleet.create(session("new", Pattern::LongRunning)).await.unwrap_err();
    assert!(matches!(refused, service::Error::Drained { .. }), "{refused}");
    let gone = town.reaches("idle", Phase::Destroyed).await;
    assert_eq!(gone.reason.as_deref(), Some("its provider is being drained"));
    // Gone at the provider is not yet known to be gone.
    until("nothing is left, also of what was made ahead", || async {
        town.cloud.alive() == 0 && fleet.progress(&Where::all("cloud")).await.unwrap().left == 0
    })
    .await;

    // Used again; and what works then goes on until the deadline and no longer.
    fleet.drain(&Where::all("cloud"), None).await.unwrap();
    *town.words.0.lock().unwrap() = Some((true, 0.0));
    fleet.create(session("works", Pattern::LongRunning)).await.unwrap();
    town.reaches("works", Phase::Active).await;
    fleet.drain(&Where::all("cloud"), Some(ends)).await.unwrap();
    let looks = town.cloud.calls.load(std::sync::atomic::Ordering::SeqCst);
    until("it was looked at a few times", || async { town.cloud.calls.load(std::sync::atomic::Ordering::SeqCst) > looks + 5 })
        .await;
    assert_eq!(town.get("works").await.phase, Phase::Active);
    fleet.drain(&Where::all("cloud"), Some(fleet.now())).await.unwrap();
    town.reaches("works", Phase::Destroyed).await;
    running.stop().await;
}

/// Every call of one provider waits: the other's sessions are served all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_provider_that_hangs_does_not_hold_up_another() {
    let mut town = Town::new(0).await;
    let stuck = Cloud::new(0);
    *stuck.hangs.lock().unwrap() = true;
    town.others.insert(String::from("stuck"), Arc::clone(&stuck) as Arc<dyn Provider>);
    let fleet = town.fleet();
    for n in 0..150 {
        let provider = String::from("stuck");
        fleet.create(Session { provider, ..session(&format!("a{n}"), Pattern::LongRunning) }).await.unwrap();
    }
    let running = run(&fleet);
    fleet.create(session("z", Pattern::LongRunning)).await.unwrap();
    town.reaches("z", Phase::Ready).await;
    running.task.abort();
}

/// By the store's word something was put away: a directory in which nothing is seen is not the right one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_that_begins_expects_what_was_put_away() {
    use agent_fleet::conversation::{Conversations, Error, Shelf, directory::Directory};
    let town = Town::new(0).await;
    let archive = Some(String::from("town/a/1"));
    let asleep = Session { phase: Phase::Paused, wanted: Wanted::Paused, archive, ..session("a", Pattern::Hybrid) };
    town.store.insert(&asleep).await.unwrap();
    let root = std::env::temp_dir().join(format!("agent-fleet-not-mounted-{}", uuid::Uuid::now_v7()));
    let shelf = Arc::new(Directory::new(root.clone()));
    let away = Conversations {
        fleet: String::from("town"),
        shelf: Arc::clone(&shelf) as Arc<dyn Shelf>,
        client: agent_fleet::build::client().unwrap(),
        spool: std::env::temp_dir(),
        keep: 1,
        keep_for: None,
        max_size: 1 << 20,
    };
    let fleet = Arc::new(Arc::into_inner(town.fleet()).unwrap().with_conversations(Some(away)));
    let running = run(&fleet);
    fleet.create(session("b", Pattern::LongRunning)).await.unwrap();
    town.reaches("b", Phase::Ready).await;
    let refused = shelf.put("town/b/1", std::path::Path::new("/dev/null")).await;
    assert!(matches!(refused, Err(Error::Passing(_))) && !root.exists(), "{refused:?}");
    running.stop().await;
}

#[test]
fn a_container_is_given_up_for_its_age_and_for_its_memory() {
    use agent_fleet::plan::{Recycle, heard};
    use agent_fleet::session::Report;
    let mut kept = session("a", Pattern::LongRunning);
    let made = kept.created;
    kept.made = Some(made);
    let at = |minutes: u64| made + Duration::from_secs(minutes * 60);
    let say = |kept: &mut Session, minutes: u64, mib: u64| {
        heard(
            kept,
            &Report { at: at(minutes), busy_until: None, cost_usd: 0.0, conversation: None, memory_bytes: Some(mib << 20) },
        );
    };
    let age = Recycle { age: Some(Duration::from_secs(3600)), ..Recycle::default() };
    assert_eq!((age.due(&kept, at(59)), age.due(&kept, at(60))), (None, Some(String::from("its container is old"))));
    let most = Recycle { memory_bytes: Some(500 << 20), ..Recycle::default() };
    let growth = Recycle { growth_per_hour_bytes: Some(100 << 20), ..Recycle::default() };
    assert_eq!(most.due(&kept, at(1)), None, "whose sidecar cannot say");
    // What it needs at its start is no growth.
    say(&mut kept, 0, 10);
    say(&mut kept, 6, 300);
    say(&mut kept, 12, 320);
    assert_eq!(growth.due(&kept, at(12)), None, "too soon to say");
    say(&mut kept, 36, 340);
    assert_eq!((most.due(&kept, at(36)), growth.due(&kept, at(36))), (None, None), "80 MiB an hour");
    say(&mut kept, 36, 500);
    assert_eq!(most.due(&kept, at(36)).as_deref(), Some("its container uses 500 MiB of memory"));
    assert_eq!(growth.due(&kept, at(36)).as_deref(), Some("its container's memory grows by 400 MiB an hour"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_old_ends_when_it_is_idle_and_not_before() {
    let mut town = Town::new(0).await;
    town.policy.recycle.age = Some(Duration::from_millis(1));
    town.policy.pause_by = PauseBy::Nothing;
    *town.words.0.lock().unwrap() = Some((true, 0.1));
    let fleet = town.fleet();
    let running = run(&fleet);
    fleet.create(session("a", Pattern::LongRunning)).await.unwrap();
    town.reaches("a", Phase::Active).await;
    until("it has cost something", || async { town.get("a").await.cost_usd() == 0.1 }).await;
    assert_eq!(town.get("a").await.phase, Phase::Active);
    *town.words.0.lock().unwrap() = Some((false, 0.1));
    assert_eq!(town.reaches("a", Phase::Destroyed).await.reason.as_deref(), Some("its container is old"));
    running.stop().await;
}

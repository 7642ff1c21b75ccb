//! Nodes that are to be empty, and containers that somebody takes away: what is there goes on elsewhere, and none of it is a failure.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_fleet::conversation::directory::Directory;
use agent_fleet::conversation::{Conversations, Shelf};
use agent_fleet::drain::Where;
use agent_fleet::lifecycle::Phase;
use agent_fleet::plan::PauseBy;
use agent_fleet::provider::{KEY_LABEL, State};
use agent_fleet::service;
use agent_fleet::session::{Pattern, Session, Wanted};
use agent_fleet::store::Filter;
use axum::Router;
use axum::body::Bytes;
use axum::routing::get;
use tokio::sync::watch;

use crate::pools::{ahead, waiting};
use crate::town::{Town, run, session, until};

const AWAY: &str = "the cluster takes its pod away (EvictionByEvictionAPI: Eviction API: evicting)";

async fn town() -> Town {
    let town = Town::new(0).await;
    *town.words.0.lock().unwrap() = Some((false, 0.0));
    *town.cloud.nodes.lock().unwrap() = vec![String::from("n1"), String::from("n2")];
    town
}

fn node_of(session: &Session) -> &str {
    session.node.as_deref().unwrap_or_default()
}

/// Once it is known where it is.
async fn placed(town: &Town, id: &str) -> Session {
    until("it is known where it is", || async { town.get(id).await.node.is_some() }).await;
    town.get(id).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_drained_is_empty_in_the_end_and_what_was_there_is_elsewhere() {
    let mut town = town().await;
    town.pools = vec![ahead(2)];
    let (fleet, other) = (town.fleet(), town.fleet());
    let running = [run(&fleet), run(&other)];
    until("two wait, on a node each", || async {
        let mut on: Vec<String> = waiting(&town).await.iter().map(|spare| node_of(spare).to_owned()).collect();
        on.sort();
        on == ["n1", "n2"]
    })
    .await;
    // What is its own is in no container that was made before.
    let own = |id: &str, pattern| {
        let mut own = session(id, pattern);
        own.spec.env.insert(String::from("ITS"), String::from(id));
        own
    };
    for id in ["a", "b"] {
        fleet.create(own(id, Pattern::Hybrid)).await.unwrap();
        town.reaches(id, Phase::Ready).await;
    }
    let (a, b) = (placed(&town, "a").await, placed(&town, "b").await);
    assert_ne!(a.node, b.node);
    let (here, there) = (node_of(&a).to_owned(), node_of(&b).to_owned());
    let place = Where::node("cloud", &here);
    assert_eq!(fleet.progress(&place).await.unwrap().left, 2, "the session, and one that waits");

    let ends = fleet.now() + Duration::from_secs(3600);
    let begun = fleet.drain(&place, Some(ends)).await.unwrap();
    assert_eq!(begun.until, Some(ends));
    let gone = town.reaches("a", Phase::Paused).await;
    assert_eq!(gone.reason, None);
    until("nothing is left there, and two wait elsewhere", || async {
        let spares = waiting(&town).await;
        fleet.progress(&place).await.unwrap().left == 0 && spares.len() == 2 && spares.iter().all(|one| node_of(one) == there)
    })
    .await;
    assert_eq!(town.get("b").await.phase, Phase::Ready, "on the other node nothing happens");
    assert!(fleet.progress(&Where::node("cloud", &there)).await.unwrap().until.is_none());
    // It is no failure of what is made ahead.
    let told = fleet.metrics().exposition([]);
    assert!(!told.lines().any(|line| line.starts_with("agent_fleet_pool_failures_total") && !line.ends_with(" 0")), "{told}");

    // Whoever makes it: the other fleet knows it by the time that the first has seen it everywhere.
    other.drain(&place, Some(ends)).await.unwrap();
    for (fleet, id) in [(&fleet, "c"), (&other, "d")] {
        fleet.create(own(id, Pattern::LongRunning)).await.unwrap();
        town.reaches(id, Phase::Ready).await;
        assert_eq!(node_of(&placed(&town, id).await), there);
    }
    fleet.want(&a.id, Wanted::Running, "a message").await.unwrap();
    town.reaches("a", Phase::Ready).await;
    assert_eq!(node_of(&placed(&town, "a").await), there, "it goes on elsewhere, and not when the drain is over");

    fleet.drain(&place, None).await.unwrap();
    other.drain(&place, None).await.unwrap();
    fleet.create(own("e", Pattern::LongRunning)).await.unwrap();
    town.reaches("e", Phase::Ready).await;
    assert_eq!(node_of(&placed(&town, "e").await), here, "it is used again");
    for running in running {
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_works_on_a_node_that_is_drained_is_waited_for_until_the_deadline() {
    let town = town().await;
    *town.words.0.lock().unwrap() = Some((true, 0.0));
    let fleet = town.fleet();
    let running = run(&fleet);
    fleet.create(session("works", Pattern::LongRunning)).await.unwrap();
    town.reaches("works", Phase::Active).await;
    let place = Where::node("cloud", node_of(&placed(&town, "works").await));
    let begun = fleet.drain(&place, Some(fleet.now() + Duration::from_secs(3600))).await.unwrap();
    assert_eq!((begun.left, begun.asleep, begun.sessions), (1, 0, vec!["works".parse().unwrap()]));
    let looks = town.cloud.calls.load(Ordering::SeqCst);
    until("it was looked at a few times", || async { town.cloud.calls.load(Ordering::SeqCst) > looks + 5 }).await;
    assert_eq!(town.get("works").await.phase, Phase::Active);
    fleet.drain(&place, Some(fleet.now())).await.unwrap();
    let gone = town.reaches("works", Phase::Destroyed).await;
    assert_eq!(gone.reason.as_deref(), Some("its node is being drained"));
    // Of the provider as a whole nothing is said.
    assert!(fleet.progress(&Where::all("cloud")).await.unwrap().until.is_none());
    running.stop().await;
}

#[tokio::test]
async fn a_provider_without_nodes_says_so_and_one_that_had_some_is_used_again() {
    let town = Town::new(0).await;
    let (fleet, place) = (town.fleet(), Where::node("cloud", "n1"));
    for until in [Some(fleet.now()), None] {
        let refused = fleet.drain(&place, until).await.unwrap_err();
        assert!(matches!(refused, service::Error::NoNodes { .. }), "{refused}");
        assert!(refused.to_string().ends_with("`agent-fleet drain cloud` empties all of it"), "{refused}");
    }
    assert!(fleet.progress(&place).await.is_err() && town.store.drains().await.unwrap().is_empty());
    // It was another kind of provider when it was begun.
    town.store.drain("cloud/n1", Some(fleet.now())).await.unwrap();
    assert!(fleet.drain(&place, None).await.unwrap().until.is_none());
    assert!(town.store.drains().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_taken_away_ends_and_says_why_and_has_not_failed() {
    let mut town = town().await;
    town.pools = vec![ahead(1)];
    let fleet = town.fleet();
    let running = run(&fleet);
    until("one waits", || async { waiting(&town).await.len() == 1 }).await;
    let spare = waiting(&town).await.remove(0);
    let own = |id: &str, pattern| {
        let mut own = session(id, pattern);
        own.spec.env.insert(String::from("ITS"), String::from(id));
        own
    };
    for (id, pattern) in [("task", Pattern::Ephemeral), ("long", Pattern::LongRunning)] {
        fleet.create(own(id, pattern)).await.unwrap();
        town.reaches(id, Phase::Ready).await;
    }
    for id in ["task", "long", spare.id.as_str()] {
        let native = town.get(id).await.native.unwrap();
        town.cloud.take_away(&native, AWAY);
    }
    for id in ["task", "long", spare.id.as_str()] {
        let gone = town.reaches(id, Phase::Destroyed).await;
        assert_eq!(gone.reason.as_deref(), Some(AWAY), "{id}");
    }
    // Seen when it was gone already, and by its end alone.
    fleet.create(own("late", Pattern::LongRunning)).await.unwrap();
    let up = town.reaches("late", Phase::Ready).await;
    {
        let mut sandboxes = town.cloud.sandboxes.lock().unwrap();
        let sandbox = sandboxes.get_mut(up.native.as_deref().unwrap()).unwrap();
        (sandbox.state, sandbox.exit_code, sandbox.disrupted) = (State::Stopped, Some(137), Some(AWAY.to_owned()));
    }
    assert_eq!(town.reaches("late", Phase::Destroyed).await.reason.as_deref(), Some(AWAY));
    until("another waits", || async { waiting(&town).await.len() == 1 }).await;
    let told = fleet.metrics().exposition([]);
    for line in [
        "agent_fleet_disruptions_total{provider=\"cloud\"} 4",
        "agent_fleet_phases_entered_total{phase=\"failed\",provider=\"cloud\"} 0",
    ] {
        assert!(told.lines().any(|found| found == line), "{line}\n{told}");
    }
    assert!(!told.lines().any(|line| line.starts_with("agent_fleet_pool_failures_total") && !line.ends_with(" 0")), "{told}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_taken_away_before_it_is_ready_is_made_anew_elsewhere() {
    let mut town = town().await;
    town.pools = vec![ahead(1)];
    *town.words.0.lock().unwrap() = None;
    let fleet = town.fleet();
    let running = run(&fleet);
    let mut own = session("a", Pattern::Ephemeral);
    own.spec.env.insert(String::from("ITS"), String::from("own"));
    fleet.create(own).await.unwrap();
    let nobodys = || async {
        let all = Filter { tenant: Some(String::new()), phases: vec![Phase::Starting], ..Filter::default() };
        town.store.list(&all, None, 10).await.unwrap()
    };
    until("both begin", || async {
        nobodys().await.iter().any(|spare| spare.native.is_some()) && town.get("a").await.phase == Phase::Starting
    })
    .await;
    let (spare, first) = (nobodys().await.remove(0), town.get("a").await);
    for native in [&spare.native, &first.native] {
        town.cloud.take_away(native.as_deref().unwrap(), AWAY);
    }
    until("another begins", || async {
        let now = town.get("a").await;
        now.generation == 2 && now.phase == Phase::Starting
    })
    .await;
    let next = town.get("a").await;
    assert!(next.native != first.native && next.spec.labels[KEY_LABEL] == next.key(), "{next:?}");
    assert_eq!(town.reaches("a", Phase::Starting).await.lost, 1);
    // Of what was made ahead the pool makes another.
    let gone = town.reaches(spare.id.as_str(), Phase::Destroyed).await;
    assert_eq!(gone.reason.as_deref(), Some(AWAY));
    *town.words.0.lock().unwrap() = Some((false, 0.0));
    let up = town.reaches("a", Phase::Ready).await;
    until("another waits", || async { waiting(&town).await.len() == 1 }).await;
    assert_eq!((up.disrupted, up.lost, town.cloud.alive()), (None, 0, 2));
    assert!(town.cloud.created.lock().unwrap().values().all(|times| *times == 1));
    use Phase::*;
    assert_eq!(town.phases_to("a", Ready).await, [Requested, Creating, Starting, Creating, Starting, Ready]);
    assert!(up.container_seconds > 0.0, "what was taken away is paid for");
    assert_eq!(fleet.reconcile().await.unwrap(), 0);
    let told = fleet.metrics().exposition([]);
    for line in [
        "agent_fleet_disruptions_total{provider=\"cloud\"} 2",
        "agent_fleet_phases_entered_total{phase=\"failed\",provider=\"cloud\"} 0",
    ] {
        assert!(told.lines().any(|found| found == line), "{line}\n{told}");
    }
    assert!(!told.lines().any(|line| line.starts_with("agent_fleet_pool_failures_total") && !line.ends_with(" 0")), "{told}");
    running.stop().await;
}

/// A sidecar that gives what is to be put away, also while its container is told to end, and takes it; and how often it has done either.
#[derive(Default)]
struct Sidecar {
    given: AtomicUsize,
    taken: Mutex<Vec<usize>>,
}

async fn serve(sidecar: &Arc<Sidecar>) -> String {
    let (give, take) = (Arc::clone(sidecar), Arc::clone(sidecar));
    let conversation = get(move || async move {
        give.given.fetch_add(1, Ordering::SeqCst);
        // An archive of nothing.
        vec![0_u8; 1024]
    })
    .put(move |body: Bytes| async move { take.taken.lock().unwrap().push(body.len()) });
    let app = Router::new().route("/v1/conversation", conversation).route("/livez", get(|| async {}));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(axum::serve(listener, app).into_future());
    format!("http://{at}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_session_has_is_put_away_while_its_container_is_taken_away_and_goes_on_elsewhere() {
    let mut town = town().await;
    town.policy.pause_by = PauseBy::Archive;
    let sidecar = Arc::<Sidecar>::default();
    *town.cloud.app.lock().unwrap() = serve(&sidecar).await;
    // It works all the time: there is no waiting for it.
    *town.words.0.lock().unwrap() = Some((true, 0.25));
    let root = std::env::temp_dir().join(format!("agent-fleet-taken-away-{}", uuid::Uuid::now_v7()));
    std::fs::create_dir_all(&root).unwrap();
    let away = Conversations {
        fleet: String::from("town"),
        shelf: Arc::new(Directory::new(root.clone())) as Arc<dyn Shelf>,
        client: agent_fleet::build::client().unwrap(),
        spool: root.clone(),
        keep: 1,
        keep_for: None,
        max_size: 1 << 20,
    };
    let fleet = Arc::new(Arc::into_inner(town.fleet()).unwrap().with_conversations(Some(away)));
    let running = run(&fleet);
    fleet.create(session("a", Pattern::Hybrid)).await.unwrap();
    let up = town.reaches("a", Phase::Active).await;
    town.cloud.take_away(up.native.as_deref().unwrap(), AWAY);
    let paused = town.reaches("a", Phase::Paused).await;
    assert_eq!((paused.reason.as_deref(), paused.holds, paused.node.as_deref()), (Some(AWAY), false, None));
    assert!(paused.archive.is_some() && sidecar.given.load(Ordering::SeqCst) == 1);
    // The next one is taken away when it has what it had, and before it has spoken.
    *town.words.0.lock().unwrap() = None;
    fleet.want(&paused.id, Wanted::Running, "a message").await.unwrap();
    until("it has what it had", || async { town.get("a").await.hydrated }).await;
    let next = town.get("a").await;
    assert_eq!((next.phase, next.generation, sidecar.taken.lock().unwrap().len()), (Phase::Starting, 2, 1));
    town.cloud.take_away(next.native.as_deref().unwrap(), AWAY);
    until("another is made", || async { town.get("a").await.generation == 3 }).await;
    *town.words.0.lock().unwrap() = Some((true, 0.25));
    let again = town.reaches("a", Phase::Active).await;
    assert_eq!((again.generation, again.disrupted, again.hydrated), (3, None, true));
    assert_eq!(sidecar.taken.lock().unwrap().len(), 2, "it has what it had");
    running.stop().await;
    std::fs::remove_dir_all(root).unwrap();
}

/// What is told to end, and takes a while, is not told all the time.
#[tokio::test]
async fn what_is_ending_is_waited_for() {
    let town = town().await;
    let fleet = town.fleet();
    let (_end, ended) = watch::channel(false);
    fleet.create(session("a", Pattern::LongRunning)).await.unwrap();
    while town.get("a").await.phase != Phase::Ready {
        let due = town.store.claim("test", Duration::from_secs(60), 1).await.unwrap();
        for session in due {
            let id = session.id.clone();
            let wake = fleet.drive(session, &ended).await.unwrap();
            town.store.release("test", &id, wake).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    town.cloud.slow.store(true, Ordering::SeqCst);
    let ready = fleet.want(&"a".parse().unwrap(), Wanted::Gone, "enough").await.unwrap().unwrap();
    let calls = town.cloud.calls.load(Ordering::SeqCst);
    let asked = fleet.now();
    let wake = fleet.drive(ready, &ended).await.unwrap();
    assert!(wake.is_some_and(|at| at >= asked + Duration::from_secs(1)), "it is looked at again, and not at once: {wake:?}");
    assert_eq!(town.get("a").await.phase, Phase::Stopping);
    assert!(town.cloud.calls.load(Ordering::SeqCst) - calls < 6, "it was asked all the time");
}

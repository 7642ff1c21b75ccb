//! Several sessions in one container: none is filled beyond what it takes, each ends for itself, and what they cost is booked once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_fleet::config::Tenant;
use agent_fleet::conversation::directory::Directory;
use agent_fleet::conversation::{Conversations, Shelf};
use agent_fleet::drain::Where;
use agent_fleet::inside::Inside;
use agent_fleet::lifecycle::Phase;
use agent_fleet::place::{Place, Share, order};
use agent_fleet::plan::PauseBy;
use agent_fleet::provider::{Endpoint, State};
use agent_fleet::service::{self, Fleet};
use agent_fleet::session::{Pattern, Report, Session, SessionId, Wanted};
use agent_fleet::store::Filter;
use agent_fleet::token::Tokens;
use async_trait::async_trait;
use axum::Router;
use axum::extract::Path;
use axum::http::StatusCode;
use axum::routing::any;
use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::pools::{ahead, waiting};
use crate::town::{Cloud, SECRET, Town, run, session, until};

/// What containers say while they run, and what each session in them does.
struct Rooms {
    cloud: Arc<Cloud>,
    works: Mutex<BTreeSet<SessionId>>,
    ended: Mutex<Vec<SessionId>>,
    /// What nobody needs any more where it is: the container, and whose it was.
    forgotten: Mutex<Vec<(String, SessionId)>>,
    /// What was brought: the container, whose it is, and what.
    brought: Mutex<Vec<(String, SessionId, String)>>,
    /// Somebody has been in one of them.
    used: AtomicBool,
    /// Those that have not begun yet.
    mute: Mutex<BTreeSet<SessionId>>,
    /// No container says anything.
    silent: AtomicBool,
}

/// What one session's agent costs, and a container's agents in all.
const USD: f64 = 0.25;
const ALL_USD: f64 = 1.0;

fn container(at: &Endpoint) -> &str {
    at.url.rsplit('/').next().unwrap()
}

impl Rooms {
    fn says(&self, at: &Endpoint, now: Timestamp, busy: bool, cost_usd: f64) -> Result<Report, String> {
        let runs = self.cloud.sandboxes.lock().unwrap().get(container(at)).map(|one| one.state.clone());
        if runs != Some(State::Running) || self.silent.load(Ordering::SeqCst) {
            return Err(String::from("nobody is there"));
        }
        let busy_until = busy.then(|| now + Duration::from_secs(60));
        Ok(Report { at: now, busy_until, cost_usd, conversation: None, memory_bytes: None })
    }
}

#[async_trait]
impl Inside for Rooms {
    async fn report(&self, at: &Endpoint, now: Timestamp) -> Result<Report, String> {
        let busy = !self.works.lock().unwrap().is_empty();
        self.says(at, now, busy, if self.used.load(Ordering::SeqCst) { ALL_USD } else { 0.0 })
    }

    async fn session(&self, at: &Endpoint, _: Option<&str>, id: &SessionId, now: Timestamp) -> Result<Report, String> {
        if self.mute.lock().unwrap().contains(id) {
            return Err(String::from("it has not begun"));
        }
        let busy = self.works.lock().unwrap().contains(id);
        self.used.store(true, Ordering::SeqCst);
        self.says(at, now, busy, USD)
    }

    async fn end(&self, at: &Endpoint, _: Option<&str>, id: &SessionId) -> Result<(), String> {
        self.says(at, Timestamp::now(), false, 0.0)?;
        self.ended.lock().unwrap().push(id.clone());
        Ok(())
    }

    async fn forget(&self, at: &Endpoint, token: &str, id: &SessionId) -> Result<(), String> {
        self.says(at, Timestamp::now(), false, 0.0)?;
        assert!(Tokens::new(SECRET).is_of(container(at), token));
        self.forgotten.lock().unwrap().push((container(at).to_owned(), id.clone()));
        Ok(())
    }
}

/// Gives what a session has, and takes it, while its container runs and it does not work.
async fn give(rooms: &Arc<Rooms>) -> String {
    type Asked = (Arc<Rooms>, axum::http::Method, String, SessionId, axum::http::HeaderMap, axum::body::Bytes);
    async fn answer((rooms, method, of, id, headers, body): Asked) -> (StatusCode, Vec<u8>) {
        let bearer = headers["authorization"].to_str().unwrap().trim_start_matches("Bearer ").to_owned();
        let at = Endpoint { url: format!("http://{of}"), headers: vec![] };
        if !Tokens::new(SECRET).is_of(&of, &bearer) {
            return (StatusCode::UNAUTHORIZED, vec![]);
        }
        match rooms.says(&at, Timestamp::now(), false, 0.0) {
            Err(_) => (StatusCode::BAD_GATEWAY, vec![]),
            Ok(_) if method == axum::http::Method::PUT => {
                rooms.brought.lock().unwrap().push((of, id, String::from_utf8_lossy(&body).trim_end_matches('\0').to_owned()));
                (StatusCode::OK, vec![])
            }
            Ok(_) if rooms.works.lock().unwrap().contains(&id) => (StatusCode::CONFLICT, vec![]),
            // No archive of anything else, but one that has an end.
            Ok(_) => (StatusCode::OK, [format!("of {id}").into_bytes(), vec![0; 1024]].concat()),
        }
    }
    let rooms = Arc::clone(rooms);
    let conversation = any(move |method, Path((of, id)): Path<(String, String)>, headers, body| {
        answer((Arc::clone(&rooms), method, of, id.parse().unwrap(), headers, body))
    });
    let app = Router::new().route("/{container}/sessions/{id}/conversation", conversation);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(axum::serve(listener, app).into_future());
    format!("http://{at}/")
}

/// A fleet that puts away what sessions have that share a container.
async fn archiving(town: &mut Town, rooms: &Arc<Rooms>, root: &std::path::Path) -> Arc<Fleet> {
    town.policy.pause_by = PauseBy::Archive;
    *town.cloud.app.lock().unwrap() = give(rooms).await;
    std::fs::create_dir_all(root).unwrap();
    let away = Conversations {
        fleet: String::from("town"),
        shelf: Arc::new(Directory::new(root.to_owned())) as Arc<dyn Shelf>,
        client: agent_fleet::build::client().unwrap(),
        spool: root.to_owned(),
        keep: 1,
        keep_for: None,
        max_size: 1 << 20,
    };
    Arc::new(Arc::into_inner(town.fleet()).unwrap().with_conversations(Some(away)))
}

fn scratch(name: &str) -> std::path::PathBuf {
    std::env::temp_dir().join(format!("agent-fleet-{name}-{}", uuid::Uuid::now_v7()))
}

async fn town(every: u64) -> (Town, Arc<Rooms>) {
    let mut town = Town::new(every).await;
    let rooms = Arc::new(Rooms {
        cloud: Arc::clone(&town.cloud),
        works: Mutex::default(),
        ended: Mutex::default(),
        forgotten: Mutex::default(),
        brought: Mutex::default(),
        used: AtomicBool::default(),
        mute: Mutex::default(),
        silent: AtomicBool::default(),
    });
    town.inside = Some(Arc::clone(&rooms) as Arc<dyn Inside>);
    town.policy.idle_after = None;
    (town, rooms)
}

fn guest(id: &str, sessions_per_container: usize, containers: Option<usize>) -> Session {
    let mut guest = session(id, Pattern::Shared);
    guest.place = Some(Place::of(&guest, Share { sessions_per_container, containers }));
    guest
}

/// The containers that are there, with who is in them.
async fn houses(town: &Town) -> BTreeMap<SessionId, BTreeSet<String>> {
    let all = town.store.list(&Filter::default(), None, 1000).await.unwrap();
    let houses = all.into_iter().filter_map(|one| Some((one.id, one.places?.taken.iter().map(ToString::to_string).collect())));
    houses.collect()
}

/// Which container a session is in.
async fn house_of(town: &Town, id: &str) -> Session {
    let native = town.get(id).await.native.unwrap();
    town.get(native.split_once('/').unwrap().0).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_share_a_container_and_each_ends_for_itself() {
    let (town, rooms) = town(0).await;
    let fleet = town.fleet();
    let running = run(&fleet);
    for id in ["a", "b", "c"] {
        fleet.create(guest(id, 3, None)).await.unwrap();
    }
    for id in ["a", "b", "c"] {
        let up = town.reaches(id, Phase::Ready).await;
        assert!(up.holds && up.total_usd() <= USD);
        use Phase::*;
        assert_eq!(town.phases_to(id, Ready).await[..4], [Requested, Creating, Starting, Ready], "its hooks are run");
    }
    assert_eq!(town.cloud.alive(), 1, "one container is all that they need");
    let house = house_of(&town, "a").await;
    assert!(town.phases(house.id.as_str()).is_empty(), "nobody has asked for the container");
    let places = house.places.unwrap();
    assert_eq!(places.taken.iter().map(SessionId::as_str).collect::<Vec<_>>(), ["a", "b", "c"]);

    // Who works is active, and nobody else is.
    rooms.works.lock().unwrap().insert("b".parse().unwrap());
    town.reaches("b", Phase::Active).await;
    assert_eq!(town.get("a").await.phase, Phase::Ready);
    // No place is left: another container for the next.
    fleet.create(guest("d", 3, None)).await.unwrap();
    town.reaches("d", Phase::Ready).await;
    assert_eq!(town.cloud.alive(), 2);

    fleet.want(&"a".parse().unwrap(), Wanted::Gone, "enough").await.unwrap();
    town.reaches_end("a").await;
    assert_eq!(*rooms.ended.lock().unwrap(), ["a".parse().unwrap()], "its agent is told to end, and no other");
    assert_eq!((town.get("b").await.phase, town.cloud.alive()), (Phase::Active, 2));
    // Its place is the next one's: the fullest first.
    fleet.create(guest("e", 3, None)).await.unwrap();
    town.reaches("e", Phase::Ready).await;
    assert_eq!((house_of(&town, "e").await.id, town.cloud.alive()), (house.id, 2));
    assert_eq!(fleet.reconcile().await.unwrap(), 0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_shares_with_another_tenant_or_caller_or_what_is_made_of_something_else() {
    let (town, _) = town(0).await;
    let fleet = town.fleet();
    let running = run(&fleet);
    let place = |mut one: Session| {
        let share = one.place.unwrap().share;
        one.place = None;
        one.place = Some(Place::of(&one, share));
        one
    };
    let mut image = guest("image", 8, None);
    image.spec.image = String::from("another");
    let tenant = Session { tenant: String::from("globex"), ..guest("tenant", 8, None) };
    let owner = Session { owner: String::from("another"), ..guest("owner", 8, None) };
    for one in [guest("one", 8, None), image, tenant, owner] {
        fleet.create(place(one)).await.unwrap();
    }
    let mut found = BTreeSet::new();
    for id in ["one", "image", "tenant", "owner"] {
        town.reaches(id, Phase::Ready).await;
        let house = house_of(&town, id).await;
        assert_eq!(house.tenant, town.get(id).await.tenant);
        found.insert(house.id);
    }
    assert_eq!(found.len(), 4);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_several_share_comes_from_a_pool_and_ends_when_it_would_have() {
    let (mut town, _) = town(0).await;
    town.pools = vec![ahead(1)];
    let fleet = town.fleet();
    let running = run(&fleet);
    until("one waits", || async { waiting(&town).await.len() == 1 }).await;
    let spare = waiting(&town).await.remove(0);
    for id in ["a", "b", "c"] {
        fleet.create(guest(id, 3, None)).await.unwrap();
    }
    for id in ["a", "b", "c"] {
        town.reaches(id, Phase::Ready).await;
    }
    let house = house_of(&town, "a").await;
    assert_eq!((house.taken.as_ref(), house.places.unwrap().taken.len()), (Some(&spare.key()), 3));
    // Its life began when it was made, and those in it end before it.
    let ends = house.made.unwrap() + house.spec.ttl;
    assert_eq!((house.made, house.ends), (spare.made, ends));
    fleet.want(&"c".parse().unwrap(), Wanted::Gone, "enough").await.unwrap();
    town.reaches_end("c").await;
    fleet.create(guest("d", 3, None)).await.unwrap();
    let late = town.reaches("d", Phase::Ready).await;
    assert!(late.ends < ends && house_of(&town, "d").await.id == house.id);
    assert_eq!(fleet.reconcile().await.unwrap(), 0, "what was given away is no orphan");
    let container = house.native.unwrap();
    for id in ["a", "b", "d"] {
        fleet.want(&id.parse().unwrap(), Wanted::Gone, "enough").await.unwrap();
        town.reaches_end(id).await;
    }
    fleet.want(&house.id, Wanted::Gone, "enough").await.unwrap();
    town.reaches_end(house.id.as_str()).await;
    assert!(!town.cloud.sandboxes.lock().unwrap().contains_key(&container));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_that_dies_ends_all_that_are_in_it_once() {
    let (town, _) = town(0).await;
    let fleet = town.fleet();
    let running = run(&fleet);
    for id in ["a", "b"] {
        fleet.create(guest(id, 2, None)).await.unwrap();
        town.reaches(id, Phase::Ready).await;
    }
    let house = house_of(&town, "a").await;
    town.cloud.end(house.native.as_deref().unwrap(), 137);
    for id in ["a", "b", house.id.as_str()] {
        town.reaches_end(id).await;
        let over = town.get(id).await;
        assert_eq!((over.phase, over.reason.is_some_and(|why| why.contains("its container has ended"))), (Phase::Failed, true));
    }
    for id in ["a", "b"] {
        let told = town.phases_to(id, Phase::Failed).await.iter().filter(|phase| **phase == Phase::Failed).count();
        assert_eq!(told, 1, "{id}");
    }
    assert_eq!(town.cloud.alive(), 0);
    // Who comes then is in another.
    fleet.create(guest("c", 2, None)).await.unwrap();
    town.reaches("c", Phase::Ready).await;
    assert_ne!(house_of(&town, "c").await.id, house.id);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_in_a_container_that_is_taken_away_waits_in_another() {
    const AWAY: &str = "the cluster takes its pod away";
    let (town, rooms) = town(0).await;
    let fleet = town.fleet();
    let running = run(&fleet);
    // The container is not ready itself: it is made anew, and who has a place in it keeps that.
    rooms.silent.store(true, Ordering::SeqCst);
    fleet.create(guest("a", 2, None)).await.unwrap();
    until("its container begins", || async {
        let native = town.get("a").await.native;
        native.is_some() && house_of(&town, "a").await.phase == Phase::Starting
    })
    .await;
    let house = house_of(&town, "a").await;
    town.cloud.take_away(house.native.as_deref().unwrap(), AWAY);
    until("it is made anew", || async { house_of(&town, "a").await.generation == 2 }).await;
    rooms.silent.store(false, Ordering::SeqCst);
    let up = town.reaches("a", Phase::Ready).await;
    assert_eq!((house_of(&town, "a").await.id, up.generation, up.disrupted), (house.id.clone(), 1, None));

    // It is ready, and one of those in it is not yet.
    rooms.mute.lock().unwrap().insert("b".parse().unwrap());
    fleet.create(guest("b", 2, None)).await.unwrap();
    town.reaches("b", Phase::Starting).await;
    let native = house_of(&town, "a").await.native;
    town.cloud.take_away(native.as_deref().unwrap(), AWAY);
    let gone = town.reaches("a", Phase::Destroyed).await;
    assert!(gone.reason.as_deref().is_some_and(|why| why.ends_with(AWAY)), "{:?}", gone.reason);
    until("the other has another place", || async { town.get("b").await.generation == 2 }).await;
    rooms.mute.lock().unwrap().clear();
    let up = town.reaches("b", Phase::Ready).await;
    assert_ne!(house_of(&town, "b").await.id, house.id);
    assert_eq!(up.disrupted, None);
    town.reaches_end(house.id.as_str()).await;
    assert_eq!(town.cloud.alive(), 1);
    // Both times one container, however many were in it.
    let told = fleet.metrics().exposition([]);
    assert!(told.contains("agent_fleet_disruptions_total{provider=\"cloud\"} 2\n"), "{told}");
    assert!(told.contains("agent_fleet_phases_entered_total{phase=\"failed\",provider=\"cloud\"} 0\n"), "{told}");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_stays_as_long_as_somebody_is_in_it_and_ends_all_where_it_ends() {
    let (mut town, rooms) = town(0).await;
    town.policy.idle_after = Some(Duration::from_millis(300));
    let fleet = town.fleet();
    let running = run(&fleet);
    // Each is idle for long and ends; the container ends when the last has gone. Who works is there to be seen, however late that is.
    rooms.works.lock().unwrap().extend(["a", "b"].map(|id| id.parse::<SessionId>().unwrap()));
    for id in ["a", "b"] {
        fleet.create(guest(id, 2, None)).await.unwrap();
    }
    for id in ["a", "b"] {
        town.reaches(id, Phase::Active).await;
    }
    let house = house_of(&town, "a").await.id;
    rooms.works.lock().unwrap().clear();
    for id in ["a", "b"] {
        town.reaches(id, Phase::Destroyed).await;
    }
    let gone = town.reaches(house.as_str(), Phase::Destroyed).await;
    assert_eq!(gone.reason.as_deref(), Some("nobody is in it"));
    running.stop().await;

    town.policy.idle_after = None;
    let fleet = town.fleet();
    let running = run(&fleet);
    for id in ["c", "d"] {
        fleet.create(guest(id, 2, None)).await.unwrap();
        town.reaches(id, Phase::Ready).await;
    }
    let house = house_of(&town, "c").await.id;
    assert!(matches!(fleet.want(&house, Wanted::Gone, "a test").await, Ok(Some(_))));
    for id in ["c", "d"] {
        let gone = town.reaches(id, Phase::Destroyed).await;
        assert_eq!(gone.reason.as_deref(), Some("its container is to end: a test"));
    }
    town.reaches_end(house.as_str()).await;
    assert_eq!(town.cloud.alive(), 0);
    running.stop().await;
}

/// Between two writes: that of its container, and the one that tells it why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_sees_that_its_container_is_to_end_before_it_is_told_has_not_failed() {
    let (town, _) = town(0).await;
    let fleet = town.fleet();
    let running = run(&fleet);
    fleet.create(guest("a", 2, None)).await.unwrap();
    town.reaches("a", Phase::Ready).await;
    running.stop().await;
    let mut house = house_of(&town, "a").await;
    house.phase = Phase::Stopping;
    town.store.update(&mut house).await.unwrap();
    let (_end, ended) = tokio::sync::watch::channel(false);
    fleet.drive(town.get("a").await, &ended).await.unwrap();
    assert_eq!(town.get("a").await.phase, Phase::Ready);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_several_cost_is_booked_once_and_spent_for_all() {
    let (mut town, rooms) = town(0).await;
    let tenant = Tenant {
        name: String::from("t"),
        budget_usd_per_day: None,
        budget_usd_per_month: Some(10.0),
        zone: TimeZone::UTC,
        max_sessions: Some(3),
    };
    let (month, _) = tenant.periods(Timestamp::now()).remove(0);
    town.tenants.insert(String::from("t"), tenant);
    let fleet = town.fleet();
    let running = run(&fleet);
    for id in ["a", "b", "c"] {
        fleet.create(guest(id, 3, None)).await.unwrap();
    }
    let full = fleet.create(guest("d", 3, None)).await.unwrap_err();
    assert!(matches!(full, service::Error::Full { most: 3, .. }), "{full}: the container is none that was asked for");
    rooms.works.lock().unwrap().insert("a".parse().unwrap());
    town.reaches("a", Phase::Active).await;
    for id in ["b", "c"] {
        town.reaches(id, Phase::Ready).await;
        until("its own cost is shown", || async { town.get(id).await.cost_usd() == USD }).await;
    }
    for id in ["a", "b", "c"] {
        fleet.want(&id.parse().unwrap(), Wanted::Gone, "enough").await.unwrap();
        town.reaches_end(id).await;
    }
    let house = houses(&town).await.into_keys().next().unwrap();
    rooms.works.lock().unwrap().clear();
    fleet.want(&house, Wanted::Gone, "enough").await.unwrap();
    town.reaches_end(house.as_str()).await;
    until("it is booked", || async {
        let spent = town.store.spent("t", &month).await.unwrap();
        let house = town.get(house.as_str()).await;
        house.cost_usd() == ALL_USD && (spent - house.total_usd()).abs() < 1e-6
    })
    .await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_session_is_in_the_container_that_it_belongs_to() {
    let (mut town, _) = town(0).await;
    let fleet = town.fleet();
    let running = run(&fleet);
    // Three containers for two each: who finds its own full is in the next, and who finds all full is not taken.
    let mut free = [2_usize; 3];
    for n in 0..6 {
        let id = format!("s{n}");
        fleet.create(guest(&id, 2, Some(3))).await.unwrap();
        town.reaches(&id, Phase::Ready).await;
        let belongs = order(&id.parse().unwrap(), 3).into_iter().find(|at| free[*at] > 0).unwrap();
        free[belongs] -= 1;
        assert!(house_of(&town, &id).await.places.unwrap().kind.ends_with(&format!(".{belongs}")), "{id}");
    }
    assert_eq!(town.cloud.alive(), 3);
    running.stop().await;
    // Only where a place is waited for in vain is the wait short: what is made may take its time.
    town.policy.ready_within = Duration::from_millis(300);
    let fleet = town.fleet();
    let running = run(&fleet);
    fleet.create(guest("s6", 2, Some(3))).await.unwrap();
    town.reaches_end("s6").await;
    let refused = town.get("s6").await;
    assert!(refused.phase == Phase::Failed && refused.reason.unwrap().contains("all of its containers are full"));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_container_is_overfilled_or_left_while_fleets_die_and_a_provider_fails() {
    const SESSIONS: usize = 24;
    let dir = std::env::temp_dir().join(format!("agent-fleet-{}-places", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let (mut town, _) = town(7).await;
    // One in memory is gone with its connection, which may be closed when who waits for it is killed.
    town.store = agent_fleet::store::open(&format!("sqlite:{}", dir.join("db").display())).await.unwrap();
    town.policy.tries = 50;
    let mut fleets = vec![town.fleet(), town.fleet()];
    let mut running: Vec<_> = fleets.iter().map(run).collect();
    let ids: Vec<String> = (0..SESSIONS).map(|n| format!("s{n}")).collect();
    for (n, id) in ids.iter().enumerate() {
        fleets[n % 2].create(guest(id, 4, None)).await.unwrap();
        if n % 8 == 7 {
            running.remove(0).task.abort();
            fleets.remove(0);
            fleets.push(town.fleet());
            running.push(run(&fleets[1]));
        }
    }
    for id in &ids {
        until("it is up", || async { town.get(id).await.phase.is_up() }).await;
    }
    let there = houses(&town).await;
    let seated: usize = there.values().map(BTreeSet::len).sum();
    assert!(seated == SESSIONS && there.values().all(|taken| taken.len() <= 4), "{there:?}");
    for (house, taken) in &there {
        for id in taken {
            assert_eq!(town.get(id).await.native, Some(format!("{house}/{id}")), "both say the same");
        }
    }
    assert_eq!(there.len(), SESSIONS / 4, "two that look at the same time make one");
    assert!(town.cloud.created.lock().unwrap().values().all(|times| *times == 1), "nothing is made twice");
    for id in &ids {
        fleets[0].want(&id.parse().unwrap(), Wanted::Gone, "enough").await.unwrap();
    }
    for id in &ids {
        town.reaches_end(id).await;
    }
    until("every place is free", || async { houses(&town).await.values().all(BTreeSet::is_empty) }).await;
    for house in houses(&town).await.into_keys() {
        fleets[0].want(&house, Wanted::Gone, "enough").await.unwrap();
        town.reaches_end(house.as_str()).await;
    }
    assert_eq!(town.cloud.alive(), 0);
    for one in running {
        one.stop().await;
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_comes_into_a_container_whose_node_is_drained_and_it_ends_when_it_is_quiet() {
    let (town, rooms) = town(0).await;
    *town.cloud.nodes.lock().unwrap() = vec![String::from("n1"), String::from("n2")];
    let fleet = town.fleet();
    let running = run(&fleet);
    rooms.works.lock().unwrap().insert("a".parse().unwrap());
    // There is to be one container of them.
    fleet.create(guest("a", 3, Some(1))).await.unwrap();
    town.reaches("a", Phase::Active).await;
    until("it is known where it is", || async { town.get("a").await.node.is_some() }).await;
    let first = house_of(&town, "a").await;
    let place = Where::node("cloud", first.node.as_deref().unwrap());
    let begun = fleet.drain(&place, Some(fleet.now() + Duration::from_secs(3600))).await.unwrap();
    assert_eq!(begun.left, 2, "the container, and who is in it");
    fleet.create(guest("b", 3, Some(1))).await.unwrap();
    town.reaches("b", Phase::Ready).await;
    let second = house_of(&town, "b").await;
    assert!(second.id != first.id && second.node != first.node);
    assert_eq!(town.get("a").await.phase, Phase::Active, "it works");
    rooms.works.lock().unwrap().clear();
    // Whichever of both was looked at first.
    let why = town.reaches("a", Phase::Destroyed).await.reason.unwrap();
    assert!(why.ends_with("its node is being drained"), "{why}");
    town.reaches_end(first.id.as_str()).await;
    assert_eq!(fleet.progress(&place).await.unwrap().left, 0);
    assert_eq!(town.get("b").await.phase, Phase::Ready);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_idle_is_put_away_and_goes_on_wherever_there_is_a_place() {
    let (mut town, rooms) = town(0).await;
    let root = scratch("places-idle");
    town.policy.idle_after = Some(Duration::from_millis(300));
    let fleet = archiving(&mut town, &rooms, &root).await;
    let running = run(&fleet);
    let [a, b, c] = ["a", "b", "c"].map(|id| id.parse::<SessionId>().unwrap());
    let works = |ids: &[&SessionId]| *rooms.works.lock().unwrap() = ids.iter().map(|id| (*id).clone()).collect();
    works(&[&a, &b, &c]);
    for id in ["a", "b"] {
        fleet.create(guest(id, 2, None)).await.unwrap();
    }
    for id in ["a", "b"] {
        town.reaches(id, Phase::Active).await;
    }
    let first = house_of(&town, "a").await;
    until("its part is known", || async { town.get("a").await.cost_usd() == USD }).await;
    works(&[&b, &c]);
    let paused = town.reaches("a", Phase::Paused).await;
    assert!(!paused.holds && paused.archive.is_some() && paused.ends > first.ends - town.policy.stop_grace);
    assert_eq!(*rooms.forgotten.lock().unwrap(), [(first.key(), a.clone())], "nothing of it is left there");
    assert_eq!(rooms.ended.lock().unwrap().as_slice(), std::slice::from_ref(&a));
    assert_eq!(town.get("b").await.phase, Phase::Active, "who works hears nothing of it");
    // Its place is the next one's.
    fleet.create(guest("c", 2, None)).await.unwrap();
    town.reaches("c", Phase::Active).await;
    assert_eq!((house_of(&town, "c").await.id, town.cloud.alive()), (first.id.clone(), 1));
    // It is wanted: there is no place left, and another container for it.
    works(&[&a, &b, &c]);
    fleet.want(&a, Wanted::Running, "a message").await.unwrap();
    let again = town.reaches("a", Phase::Active).await;
    let second = house_of(&town, "a").await;
    assert_ne!(second.id, first.id);
    assert!(again.hydrated && again.generation == 2);
    assert_eq!(*rooms.brought.lock().unwrap(), [(second.key(), a.clone(), String::from("of a"))]);
    until("its part goes on", || async { town.get("a").await.cost_usd() == 2.0 * USD }).await;
    // By a wish, as soon as it does not work.
    works(&[&b]);
    for id in [&a, &c] {
        fleet.want(id, Wanted::Paused, "somebody asked for it").await.unwrap();
        town.reaches(id.as_str(), Phase::Paused).await;
    }
    works(&[&a, &b]);
    fleet.want(&a, Wanted::Running, "a message").await.unwrap();
    town.reaches("a", Phase::Active).await;
    assert_eq!(house_of(&town, "a").await.id, first.id, "where somebody is");
    fleet.want(&a, Wanted::Gone, "enough").await.unwrap();
    town.reaches_end("a").await;
    running.stop().await;
    std::fs::remove_dir_all(root).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_in_a_container_that_is_to_end_is_put_away_while_it_stands() {
    let (mut town, rooms) = town(0).await;
    let root = scratch("places-drained");
    *town.cloud.nodes.lock().unwrap() = vec![String::from("n1"), String::from("n2")];
    let fleet = archiving(&mut town, &rooms, &root).await;
    let running = run(&fleet);
    rooms.works.lock().unwrap().extend(["a", "b"].map(|id| id.parse::<SessionId>().unwrap()));
    for id in ["a", "b"] {
        fleet.create(guest(id, 2, None)).await.unwrap();
    }
    for id in ["a", "b"] {
        town.reaches(id, Phase::Active).await;
    }
    until("it is known where it is", || async { house_of(&town, "a").await.node.is_some() }).await;
    let first = house_of(&town, "a").await;
    // It works, until there is no more waiting for it; and then until its turn is over.
    let node = first.node.clone().unwrap();
    fleet.drain(&Where::node("cloud", &node), Some(fleet.now() + Duration::from_millis(200))).await.unwrap();
    let clearing = town.reaches(first.id.as_str(), Phase::Pausing).await;
    assert!(clearing.reason.unwrap().contains("its node is being drained") && town.cloud.alive() == 1);
    rooms.works.lock().unwrap().clear();
    for id in ["a", "b"] {
        let paused = town.reaches(id, Phase::Paused).await;
        assert!(paused.archive.is_some() && !paused.holds, "{:?}", paused.reason);
    }
    let over = town.reaches(first.id.as_str(), Phase::Destroyed).await;
    assert_eq!(over.reason.as_deref(), Some("its node is being drained"));
    fleet.want(&"a".parse().unwrap(), Wanted::Running, "a message").await.unwrap();
    let again = town.reaches("a", Phase::Ready).await;
    assert!(again.hydrated && again.disrupted.is_none());
    assert_ne!(house_of(&town, "a").await.node, Some(node));
    let told = fleet.metrics().exposition([]);
    assert!(told.contains("agent_fleet_disruptions_total{provider=\"cloud\"} 0"), "nobody has taken anything away");
    running.stop().await;
    std::fs::remove_dir_all(root).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_in_a_container_that_dies_goes_on_with_what_was_put_away_last() {
    let (mut town, rooms) = town(0).await;
    let root = scratch("places-died");
    let fleet = archiving(&mut town, &rooms, &root).await;
    let running = run(&fleet);
    for id in ["a", "b"] {
        fleet.create(guest(id, 2, None)).await.unwrap();
        town.reaches(id, Phase::Ready).await;
    }
    let a: SessionId = "a".parse().unwrap();
    fleet.want(&a, Wanted::Paused, "somebody asked for it").await.unwrap();
    town.reaches("a", Phase::Paused).await;
    fleet.want(&a, Wanted::Running, "a message").await.unwrap();
    let kept = town.reaches("a", Phase::Ready).await.archive;
    let house = house_of(&town, "a").await;
    town.cloud.end(house.native.as_deref().unwrap(), 137);
    let paused = town.reaches("a", Phase::Paused).await;
    assert!(!paused.holds && paused.archive == kept);
    // Of the other one nothing was ever put away.
    town.reaches_end("b").await;
    assert_eq!(town.get("b").await.phase, Phase::Failed);
    fleet.want(&a, Wanted::Running, "a message").await.unwrap();
    let again = town.reaches("a", Phase::Ready).await;
    assert!(again.hydrated && house_of(&town, "a").await.id != house.id);
    running.stop().await;
    std::fs::remove_dir_all(root).unwrap();
}

//! What each store promises, of each store: SQLite in memory and in a file, and PostgreSQL where `AGENT_FLEET_TEST_POSTGRES` has the URL of a server in
//! which schemas may be made.

#![expect(clippy::unwrap_used, reason = "what fails here is a test")]

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use agent_fleet::lifecycle::Phase;
use agent_fleet::place::{self, Places};
use agent_fleet::session::{Report, Session, SessionId, Wanted};
use agent_fleet::store::{self, Error, Filter, HOOK_RUNS_MOST, HookRun, Inserted, Store, Within};
use jiff::{SignedDuration, Timestamp};
use sqlx::{AssertSqlSafe, Connection, Executor};
use tokio::sync::{RwLock, RwLockReadGuard};

#[path = "store/death.rs"]
mod death;
#[path = "store/model.rs"]
mod model;

/// A lease that no test outlives, and one that is over as soon as it is given.
const LONG: Duration = Duration::from_secs(3600);
const OVER: Duration = Duration::ZERO;

/// A store of a test's own, and what it is kept in.
struct Fresh {
    url: String,
    store: Arc<dyn Store>,
    _directory: Option<Directory>,
    /// Others may use the server, and nobody may crash it.
    _server: Option<RwLockReadGuard<'static, ()>>,
}

static SERVER: RwLock<()> = RwLock::const_new(());

struct Directory(std::path::PathBuf);

impl Directory {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("agent-fleet-{}", uuid::Uuid::now_v7()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

async fn memory() -> Option<Fresh> {
    let store = store::memory().await.unwrap();
    Some(Fresh { url: String::new(), store, _directory: None, _server: None })
}

async fn file() -> Option<Fresh> {
    let directory = Directory::new();
    let url = format!("sqlite:{}/fleet.db", directory.0.display());
    let store = store::open(&url).await.unwrap();
    Some(Fresh { url, store, _directory: Some(directory), _server: None })
}

/// In a schema of its own. `None`: there is no server to test with.
async fn postgres() -> Option<Fresh> {
    let server = std::env::var("AGENT_FLEET_TEST_POSTGRES").ok()?;
    let guard = SERVER.read().await;
    let url = schema_of_its_own(&server).await;
    let store = store::open(&url).await.unwrap();
    Some(Fresh { url, store, _directory: None, _server: Some(guard) })
}

async fn schema_of_its_own(server: &str) -> String {
    let schema = format!("test_{}", uuid::Uuid::now_v7().simple());
    let mut connection = sqlx::PgConnection::connect(server).await.unwrap();
    connection.execute(AssertSqlSafe(format!("CREATE SCHEMA {schema}"))).await.unwrap();
    connection.close().await.unwrap();
    let joint = if server.contains('?') { '&' } else { '?' };
    format!("{server}{joint}options[search_path]={schema}")
}

/// Each of these for each store.
macro_rules! promises {
    ($($promise:ident)*) => {
        promises! { @of memory $($promise)* }
        promises! { @of file $($promise)* }
        promises! { @of postgres $($promise)* }
    };
    (@of $store:ident $($promise:ident)*) => {
        mod $store {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                if let Some(fresh) = super::$store().await {
                    super::$promise(&fresh).await;
                }
            })*
        }
    };
}

promises! {
    a_session_comes_back_as_it_was_written
    one_that_is_there_is_left_as_it_is
    who_has_not_read_the_last_version_does_not_write
    what_is_not_there_is_said_to_be_missing
    a_list_goes_on_where_the_last_one_ended
    a_list_is_of_those_that_are_asked_for
    what_is_wanted_is_written_whoever_writes_beside_it
    it_knows_since_when_it_is_there
    they_are_counted_by_phase_provider_and_tenant
    a_session_is_driven_by_one_fleet_at_a_time
    the_longest_due_comes_first
    a_lease_that_is_over_is_anybodys
    a_lease_is_held_as_long_as_it_is_renewed
    who_does_not_hold_it_does_not_let_go_of_it
    what_is_released_is_due_when_it_was_said
    what_is_due_is_not_due_before
    what_is_wanted_while_it_is_driven_is_seen_by_who_drives_it_next
    what_is_wanted_while_it_is_claimed_is_not_lost
    what_happens_while_it_is_driven_is_not_forgotten
    what_is_reserved_fits_below_the_limit
    what_is_spent_is_in_the_place_of_what_was_reserved
    who_books_hears_what_all_have_spent
    what_many_book_at_once_is_all_there_and_heard
    what_cannot_be_written_keeps_nobody_else_from_it
    hooks_are_remembered_in_their_order
    of_many_runs_of_hooks_the_last_are_kept
    what_is_over_is_forgotten_and_nothing_else
    what_one_gives_the_other_has_and_neither_if_somebody_was_first
    of_many_who_take_one_each_has_another
    a_duty_is_one_fleets_until_its_lease_is_over
    what_is_drained_is_known_until_it_is_no_longer
    whatever_is_written_into_a_name_stays_text
    two_hundred_sessions_are_each_claimed_once
    of_many_who_change_it_one_does
    of_many_who_want_a_place_no_more_have_one_than_there_are
    what_many_reserve_at_once_stays_below_the_limit
    of_many_who_ask_at_once_a_tenant_has_no_more_than_it_may
    of_many_who_make_what_is_missing_one_does
    what_is_written_is_there_when_it_is_opened_again
}

fn id(name: &str) -> SessionId {
    name.parse().unwrap()
}

fn session(name: &str) -> Session {
    serde_json::from_value(serde_json::json!({
        "id": name, "tenant": "blue", "owner": "ada", "pattern": "ephemeral", "provider": "docker",
        "spec": { "key": "agent-1", "image": "agent:1", "ports": [8080], "ttl": { "secs": 600, "nanos": 0 } },
        "wanted": "running", "phase": "requested", "generation": 1,
        "since": "2026-11-26T12:00:00.123456789Z", "created": "2026-11-26T12:00:00.123456789Z", "ends": "2026-11-26T13:00:00.123456789Z",
    }))
    .unwrap()
}

fn run(name: &str, attempt: u32) -> HookRun {
    serde_json::from_value(serde_json::json!({
        "session": name, "generation": 1, "phase": "creating", "hook": "admit", "at": "2026-11-26T12:00:00.123456789Z", "seconds": 0.25,
        "attempt": attempt, "outcome": "failed", "said": "no\n\"quotes\" \0 ünd 🦀",
    }))
    .unwrap()
}

async fn insert(store: &dyn Store, names: &[&str]) {
    for name in names {
        assert_eq!(store.insert(&session(name)).await.unwrap(), Inserted::New);
    }
}

async fn claimed(store: &dyn Store, fleet: &str, lease: Duration) -> Vec<String> {
    names(&store.claim(fleet, lease, 1000).await.unwrap())
}

fn names(sessions: &[Session]) -> Vec<String> {
    let mut names: Vec<String> = sessions.iter().map(|session| session.id.to_string()).collect();
    names.sort();
    names
}

async fn a_session_comes_back_as_it_was_written(Fresh { store, .. }: &Fresh) {
    let mut full = session("full");
    full.spec.env.insert(String::from("GREETING"), String::from("a\n\"b\" \u{0} ünd 🦀"));
    full.native = Some(String::from("f00"));
    full.node = Some(String::from("node-1"));
    full.disrupted = Some(String::from("evicted"));
    full.retry_at = Some(Timestamp::MAX);
    full.report = Some(Report {
        at: Timestamp::MIN,
        busy_until: None,
        cost_usd: 0.1 + 0.2,
        conversation: Some(String::from("c")),
        memory_bytes: Some(1 << 20),
    });
    full.container_usd = f64::MIN_POSITIVE;
    full.version = 7;
    assert_eq!(store.insert(&full).await.unwrap(), Inserted::New);
    assert_eq!(store.get(&full.id).await.unwrap().unwrap(), full);
    full.phase = Phase::Creating;
    full.holds = true;
    store.update(&mut full).await.unwrap();
    assert_eq!(full.version, 8);
    assert_eq!(store.get(&full.id).await.unwrap().unwrap(), full);
    assert_eq!(store.claim("a", LONG, 1).await.unwrap(), [full]);
}

async fn one_that_is_there_is_left_as_it_is(Fresh { store, .. }: &Fresh) {
    let first = session("one");
    store.insert(&first).await.unwrap();
    let second = Session { tenant: String::from("red"), ..first.clone() };
    assert_eq!(store.insert(&second).await.unwrap(), Inserted::Known(Box::new(first.clone())));
    assert_eq!(store.get(&first.id).await.unwrap().unwrap(), first);
}

async fn who_has_not_read_the_last_version_does_not_write(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["one"]).await;
    let mut first = store.get(&id("one")).await.unwrap().unwrap();
    let mut second = first.clone();
    // Whoever drives it: what is asked of a session is written beside.
    assert_eq!(claimed(&**store, "a", LONG).await, ["one"]);
    first.wanted = Wanted::Gone;
    store.update(&mut first).await.unwrap();
    second.failures = 3;
    assert!(matches!(store.update(&mut second).await, Err(Error::Conflict(of)) if of == id("one")));
    assert_eq!(second.version, 0);
    assert_eq!(store.get(&id("one")).await.unwrap().unwrap(), first);
}

async fn what_is_not_there_is_said_to_be_missing(Fresh { store, .. }: &Fresh) {
    let missing = |result| matches!(result, Err(Error::Missing(of)) if of == id("none"));
    assert_eq!(store.get(&id("none")).await.unwrap(), None);
    assert!(missing(store.update(&mut session("none")).await));
    assert!(missing(store.wake(&id("none")).await));
    assert!(missing(store.log_hook(&run("none", 1)).await));
    assert_eq!(store.hook_runs(&id("none")).await.unwrap(), []);
    assert_eq!(store.spent("none", "2026").await.unwrap(), 0.0);
    store.release("a", &id("none"), None).await.unwrap();
}

async fn a_list_goes_on_where_the_last_one_ended(Fresh { store, .. }: &Fresh) {
    // In the order of bytes: a database's language would have it otherwise.
    let sorted = ["B", "Z_", "a", "a-1", "a1", "a_", "b"];
    insert(&**store, &["a1", "b", "a", "Z_", "a_", "B", "a-1"]).await;
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let page = store.list(&Filter::default(), after.as_ref(), 3).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.id.clone());
        seen.extend(page.iter().map(|session| session.id.to_string()));
    }
    assert_eq!(seen, sorted);
}

async fn a_list_is_of_those_that_are_asked_for(Fresh { store, .. }: &Fresh) {
    let of = |name: &str, owner: &str, tenant: &str, provider: &str, phase| Session {
        owner: owner.to_owned(),
        tenant: tenant.to_owned(),
        provider: provider.to_owned(),
        phase,
        ..session(name)
    };
    for one in [
        of("a", "ada", "blue", "docker", Phase::Active),
        of("b", "bob", "blue", "docker", Phase::Idle),
        of("c", "ada", "red", "e2b", Phase::Idle),
        of("d", "ada", "blue", "docker", Phase::Destroyed),
        of("e", "ada", "red", "docker", Phase::Failed),
    ] {
        store.insert(&one).await.unwrap();
    }
    let some = |text: &str| Some(text.to_owned());
    let none = Filter::default;
    for (filter, expected) in [
        (none(), "abc"),
        (Filter { over: true, ..none() }, "abcde"),
        (Filter { owner: some("ada"), ..none() }, "ac"),
        (Filter { owner: some("ADA"), ..none() }, ""),
        (Filter { tenant: some("blue"), over: true, ..none() }, "abd"),
        (Filter { provider: some("docker"), tenant: some("blue"), ..none() }, "ab"),
        (Filter { phases: vec![Phase::Idle], ..none() }, "bc"),
        (Filter { phases: vec![Phase::Idle, Phase::Active], owner: some("ada"), ..none() }, "ac"),
        (Filter { phases: vec![Phase::Failed, Phase::Active], over: true, ..none() }, "ae"),
        (Filter { phases: vec![Phase::Failed], ..none() }, ""),
        (Filter { owner: some("nobody"), over: true, ..none() }, ""),
    ] {
        assert_eq!(names(&store.list(&filter, None, 10).await.unwrap()).concat(), expected, "{filter:?}");
    }
    // It moves to where it is now.
    let mut moved = store.get(&id("a")).await.unwrap().unwrap();
    moved.phase = Phase::Failed;
    moved.tenant = String::from("red");
    store.update(&mut moved).await.unwrap();
    assert_eq!(names(&store.list(&none(), None, 10).await.unwrap()).concat(), "bc");
    let red = Filter { tenant: some("red"), over: true, ..none() };
    assert_eq!(names(&store.list(&red, None, 10).await.unwrap()).concat(), "ace");
}

async fn what_is_wanted_is_written_whoever_writes_beside_it(Fresh { store, .. }: &Fresh) {
    let now: Timestamp = "2026-11-26T10:00:00.5Z".parse().unwrap();
    let idle = Session {
        idle_since: Some(now - Duration::from_secs(60)),
        reason: Some(String::from("tired")),
        cost_before_usd: 0.1,
        ..session("a")
    };
    store.insert(&idle).await.unwrap();
    let mut driven = store.get(&id("a")).await.unwrap().unwrap();
    assert!(store.want(&id("a"), Wanted::Paused, "not said", now).await.unwrap());
    assert!(matches!(store.update(&mut driven).await, Err(Error::Conflict(_))), "who drives it reads it again");
    let read = || async { store.get(&id("a")).await.unwrap().unwrap() };
    let paused = read().await;
    let same = Session { wanted: Wanted::Paused, version: paused.version, ..idle.clone() };
    assert_eq!(paused, same, "and nothing else is changed");
    assert!(store.want(&id("a"), Wanted::Running, "", now).await.unwrap());
    assert_eq!(read().await.idle_since, Some(now), "its rest begins anew");
    assert!(store.want(&id("a"), Wanted::Gone, "enough", now).await.unwrap());
    let gone = read().await;
    assert_eq!((gone.wanted, gone.reason.as_deref()), (Wanted::Gone, Some("enough")));
    assert!(!store.want(&id("a"), Wanted::Running, "", now).await.unwrap(), "what is to be gone stays so");
    assert!(!store.want(&id("nobody"), Wanted::Gone, "", now).await.unwrap());
    store.insert(&Session { phase: Phase::Failed, ..session("b") }).await.unwrap();
    assert!(!store.want(&id("b"), Wanted::Running, "", now).await.unwrap());
    insert(&**store, &["c"]).await;
    assert!(store.want(&id("c"), Wanted::Running, "", now).await.unwrap());
    assert_eq!(store.get(&id("c")).await.unwrap().unwrap().idle_since, None);
}

async fn it_knows_since_when_it_is_there(Fresh { store, .. }: &Fresh) {
    // By its own clock, which is this machine's here, in whole seconds.
    let born = store.born().await.unwrap();
    let age = Timestamp::now().duration_since(born).as_secs();
    assert!((0..3600).contains(&age), "{born}");
    insert(&**store, &["a"]).await;
    assert_eq!(store.born().await.unwrap(), born);
}

async fn they_are_counted_by_phase_provider_and_tenant(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["a", "b"]).await;
    let red = Session { tenant: String::from("red"), phase: Phase::Destroyed, ..session("c") };
    store.insert(&red).await.unwrap();
    let of = |phase, tenant: &str, n| (phase, String::from("docker"), tenant.to_owned(), n);
    assert_eq!(store.count().await.unwrap(), [of(Phase::Destroyed, "red", 1), of(Phase::Requested, "blue", 2)]);
}

async fn a_session_is_driven_by_one_fleet_at_a_time(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["a", "b"]).await;
    assert_eq!(store.claim("one", LONG, 1).await.unwrap().len(), 1);
    assert_eq!(store.claim("two", LONG, 9).await.unwrap().len(), 1);
    assert_eq!(claimed(&**store, "one", LONG).await, [""; 0]);
    assert_eq!(claimed(&**store, "three", LONG).await, [""; 0]);
}

async fn the_longest_due_comes_first(Fresh { store, .. }: &Fresh) {
    let now = Timestamp::now();
    insert(&**store, &["a", "b", "c"]).await;
    assert_eq!(claimed(&**store, "one", LONG).await, ["a", "b", "c"]);
    for (name, hours) in [("a", 1), ("b", 3), ("c", 2)] {
        store.release("one", &id(name), Some(now - SignedDuration::from_hours(hours))).await.unwrap();
    }
    // Woken again and again, it does not fall behind.
    store.wake(&id("b")).await.unwrap();
    for name in ["b", "c", "a"] {
        assert_eq!(names(&store.claim("one", LONG, 1).await.unwrap()), [name]);
    }
}

async fn a_lease_that_is_over_is_anybodys(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["a"]).await;
    assert_eq!(claimed(&**store, "one", OVER).await, ["a"]);
    assert_eq!(claimed(&**store, "two", LONG).await, ["a"]);
    assert_eq!(claimed(&**store, "one", LONG).await, [""; 0]);
    // Who has lost it does not get it back by renewing, and takes it from nobody by letting go.
    assert_eq!(store.renew("one", LONG).await.unwrap(), 0);
    store.release("one", &id("a"), Some(Timestamp::MIN)).await.unwrap();
    assert_eq!(claimed(&**store, "one", LONG).await, [""; 0]);
    assert_eq!(store.renew("two", LONG).await.unwrap(), 1);
}

async fn a_lease_is_held_as_long_as_it_is_renewed(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["a", "b", "c"]).await;
    assert_eq!(claimed(&**store, "one", OVER).await, ["a", "b", "c"]);
    assert_eq!(store.renew("one", LONG).await.unwrap(), 3);
    assert_eq!(claimed(&**store, "two", LONG).await, [""; 0]);
    assert_eq!(store.renew("one", OVER).await.unwrap(), 3);
    assert_eq!(claimed(&**store, "two", LONG).await, ["a", "b", "c"]);
    assert_eq!(store.renew("nobody", LONG).await.unwrap(), 0);
    assert_eq!(store.renew("two", Duration::MAX).await.unwrap(), 3);
}

async fn who_does_not_hold_it_does_not_let_go_of_it(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["a"]).await;
    assert_eq!(claimed(&**store, "one", LONG).await, ["a"]);
    store.release("two", &id("a"), Some(Timestamp::MIN)).await.unwrap();
    assert_eq!(claimed(&**store, "two", LONG).await, [""; 0]);
}

async fn what_is_released_is_due_when_it_was_said(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["late", "never", "now", "soon"]).await;
    assert_eq!(claimed(&**store, "one", LONG).await.len(), 4);
    let now = Timestamp::now();
    store.release("one", &id("late"), Some(now + SignedDuration::from_hours(1))).await.unwrap();
    store.release("one", &id("never"), None).await.unwrap();
    store.release("one", &id("now"), Some(now)).await.unwrap();
    store.release("one", &id("soon"), Some(now + SignedDuration::from_millis(700))).await.unwrap();
    // On a machine that is slow beyond measure it may be `soon` already.
    let first = claimed(&**store, "two", LONG).await;
    assert!(first == ["now"] || Timestamp::now() > now + SignedDuration::from_millis(700), "{first:?}");
    let mut all: BTreeSet<String> = first.into_iter().collect();
    while !all.contains("soon") {
        tokio::time::sleep(Duration::from_millis(20)).await;
        all.extend(claimed(&**store, "two", LONG).await);
    }
    assert!(Timestamp::now() > now + SignedDuration::from_millis(700));
    assert_eq!(all.into_iter().collect::<Vec<_>>(), ["now", "soon"]);
    store.wake(&id("late")).await.unwrap();
    store.wake(&id("never")).await.unwrap();
    assert_eq!(claimed(&**store, "two", LONG).await, ["late", "never"]);
    // The ends of time are times.
    store.release("two", &id("late"), Some(Timestamp::MIN)).await.unwrap();
    store.release("two", &id("now"), Some(Timestamp::MAX)).await.unwrap();
    assert_eq!(claimed(&**store, "two", LONG).await, ["late"]);
}

async fn what_is_due_is_not_due_before(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["a"]).await;
    assert_eq!(claimed(&**store, "one", LONG).await, ["a"]);
    // In every part of a millisecond.
    for n in 0..50 {
        let wake = Timestamp::now() + SignedDuration::from_micros(3000 + n * 20);
        store.release("one", &id("a"), Some(wake)).await.unwrap();
        while claimed(&**store, "one", LONG).await.is_empty() {}
        let now = Timestamp::now();
        assert!(now >= wake, "{n}: {now} is before {wake}");
    }
}

/// By itself or by another fleet, of both of which nothing is lost.
async fn what_is_wanted_while_it_is_driven_is_seen_by_who_drives_it_next(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["a"]).await;
    for (n, next) in ["one", "two"].into_iter().enumerate() {
        let mut driven = store.claim("one", LONG, 1).await.unwrap().remove(0);
        let why = format!("wish {n}");
        store.want(&id("a"), if n == 0 { Wanted::Paused } else { Wanted::Gone }, &why, Timestamp::now()).await.unwrap();
        store.wake(&id("a")).await.unwrap();
        assert_eq!(claimed(&**store, "one", LONG).await, [""; 0]);
        assert_eq!(claimed(&**store, "two", LONG).await, [""; 0]);
        // Who drives it has not read the wish, and does not write over it.
        assert!(matches!(store.note(&mut driven).await, Err(Error::Conflict(of)) if of == id("a")));
        assert!(matches!(store.update(&mut driven).await, Err(Error::Conflict(of)) if of == id("a")));
        store.release("one", &id("a"), Some(Timestamp::MAX)).await.unwrap();
        let seen = store.claim(next, LONG, 1).await.unwrap().remove(0);
        assert_eq!(seen.wanted, if n == 0 { Wanted::Paused } else { Wanted::Gone });
        store.release(next, &id("a"), Some(Timestamp::now())).await.unwrap();
    }
}

async fn what_is_wanted_while_it_is_claimed_is_not_lost(fresh: &Fresh) {
    let [one, two] = twice(fresh).await;
    insert(&*one, &["a"]).await;
    // Whichever comes first, whoever's the other is.
    for n in 0..100 {
        let wanted = if n % 2 == 0 { Wanted::Paused } else { Wanted::Running };
        let (claims, wishes) = if n % 4 < 2 { (&one, &one) } else { (&one, &two) };
        let start = Arc::new(tokio::sync::Barrier::new(2));
        let claim = tokio::spawn({
            let (store, start) = (Arc::clone(claims), Arc::clone(&start));
            async move {
                start.wait().await;
                // Who claims waits for no lock, and finds nothing while it is being woken.
                loop {
                    if let Some(claimed) = store.claim("one", LONG, 1).await.unwrap().pop() {
                        return claimed;
                    }
                }
            }
        });
        start.wait().await;
        assert!(wishes.want(&id("a"), wanted, "", Timestamp::now()).await.unwrap());
        wishes.wake(&id("a")).await.unwrap();
        let mut driven = claim.await.unwrap();
        if driven.wanted != wanted {
            assert!(matches!(claims.update(&mut driven).await, Err(Error::Conflict(of)) if of == id("a")));
            claims.release("one", &id("a"), Some(Timestamp::MAX)).await.unwrap();
            driven = claims.claim("two", LONG, 1).await.unwrap().pop().expect("it was woken");
            assert_eq!(driven.wanted, wanted);
            claims.release("two", &id("a"), Some(Timestamp::now())).await.unwrap();
        } else {
            claims.release("one", &id("a"), Some(Timestamp::now())).await.unwrap();
        }
    }
}

async fn what_happens_while_it_is_driven_is_not_forgotten(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["a"]).await;
    assert_eq!(claimed(&**store, "one", LONG).await, ["a"]);
    store.wake(&id("a")).await.unwrap();
    assert_eq!(claimed(&**store, "two", LONG).await, [""; 0]);
    store.release("one", &id("a"), None).await.unwrap();
    assert_eq!(claimed(&**store, "one", LONG).await, ["a"]);
    // It was seen: once.
    store.release("one", &id("a"), Some(Timestamp::MAX)).await.unwrap();
    assert_eq!(claimed(&**store, "one", LONG).await, [""; 0]);
    // What woke it before it was claimed is seen by who claims it.
    store.wake(&id("a")).await.unwrap();
    assert_eq!(claimed(&**store, "one", LONG).await, ["a"]);
    store.release("one", &id("a"), None).await.unwrap();
    assert_eq!(claimed(&**store, "one", LONG).await, [""; 0]);
    // And by who claims it after one who has died over it.
    store.wake(&id("a")).await.unwrap();
    assert_eq!(claimed(&**store, "one", OVER).await, ["a"]);
    assert_eq!(claimed(&**store, "two", LONG).await, ["a"]);
}

async fn what_is_reserved_fits_below_the_limit(Fresh { store, .. }: &Fresh) {
    let reserve = |name: &'static str, usd| async move { store.reserve("blue", "2026-11", &id(name), usd, 1.0).await.unwrap() };
    // Ten times a tenth is one, which it is not in floating point.
    for name in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"] {
        assert!(reserve(name, 0.1).await, "{name}");
    }
    assert_eq!(store.spent("blue", "2026-11").await.unwrap(), 1.0);
    assert!(!reserve("k", 0.000_000_001).await);
    assert!(reserve("k", 0.0).await);
    assert!(reserve("j", 0.05).await);
    assert!(!reserve("j", 0.2).await);
    assert!(reserve("l", 0.05).await);
    assert_eq!(store.spent("blue", "2026-11").await.unwrap(), 1.0);
    assert!(store.reserve("blue", "2026-12", &id("a"), 1.0, 1.0).await.unwrap());
    assert!(store.reserve("red", "2026-11", &id("a"), 5.0, f64::INFINITY).await.unwrap());
    assert!(!store.reserve("red", "2026-11", &id("b"), 5.0, 0.0).await.unwrap());
}

async fn what_is_spent_is_in_the_place_of_what_was_reserved(Fresh { store, .. }: &Fresh) {
    assert!(store.reserve("blue", "2026", &id("a"), 3.0, 10.0).await.unwrap());
    store.spend("blue", "2026", &id("a"), 1.25).await.unwrap();
    assert_eq!(store.spent("blue", "2026").await.unwrap(), 1.25);
    // Nobody's leave is asked.
    store.spend("blue", "2026", &id("b"), 10.0).await.unwrap();
    assert_eq!(store.spent("blue", "2026").await.unwrap(), 11.25);
    assert!(!store.reserve("blue", "2026", &id("c"), 0.01, 10.0).await.unwrap());
    // What is beyond all sense is much, and no mistake of the next who asks.
    store.spend("blue", "2026", &id("b"), f64::INFINITY).await.unwrap();
    store.spend("blue", "2026", &id("c"), f64::MAX).await.unwrap();
    assert!(!store.reserve("blue", "2026", &id("d"), 0.01, 1e6).await.unwrap());
    assert!(store.spent("blue", "2026").await.unwrap() > 2e9);
    store.spend("blue", "2026", &id("c"), 0.0).await.unwrap();
    store.spend("blue", "2026", &id("b"), f64::NAN).await.unwrap();
    store.spend("blue", "2026", &id("a"), -5.0).await.unwrap();
    assert_eq!(store.spent("blue", "2026").await.unwrap(), 0.0);
}

async fn who_books_hears_what_all_have_spent(Fresh { store, url, .. }: &Fresh) {
    let (day, month) = (String::from("2026-11-26"), String::from("2026-11"));
    let book = |store: Arc<dyn Store>, name: &'static str, usd: f64| {
        let spent = [(day.clone(), usd), (month.clone(), usd + 1.0)];
        async move { store.book("blue", &id(name), &spent).await.unwrap() }
    };
    assert!(store.book("blue", &id("a"), &[]).await.unwrap().is_empty());
    assert_eq!(book(store.clone(), "a", 1.0).await, [1.0, 2.0]);
    assert_eq!(book(store.clone(), "b", 0.5).await, [1.5, 3.5]);
    // It is in the place of what was there, however often it is said.
    assert_eq!(book(store.clone(), "a", 2.0).await, [2.5, 4.5]);
    assert_eq!(book(store.clone(), "a", 2.0).await, [2.5, 4.5]);
    assert_eq!(book(store.clone(), "a", 0.0).await, [0.5, 2.5]);
    // What is set aside between is heard at once, also in the place of what was spent, and no other tenant's is.
    assert!(store.reserve("blue", &day, &id("c"), 3.0, 10.0).await.unwrap());
    assert_eq!(book(store.clone(), "b", 0.5).await, [3.5, 2.5]);
    assert!(store.reserve("blue", &day, &id("b"), 1.0, 10.0).await.unwrap());
    store.spend("red", &day, &id("d"), 9.0).await.unwrap();
    assert_eq!(book(store.clone(), "a", 0.0).await, [4.0, 2.5]);
    store.spend("blue", &day, &id("c"), 0.0).await.unwrap();
    assert_eq!(book(store.clone(), "a", 0.0).await, [1.0, 2.5]);
    if url.is_empty() {
        return;
    }
    // What is written by another process is heard a little later, whatever is booked meanwhile.
    let other = store::open(url).await.unwrap();
    assert_eq!(book(other.clone(), "e", 4.0).await, [5.0, 7.5]);
    let written = std::time::Instant::now();
    loop {
        let (asked, sums) = (written.elapsed(), book(store.clone(), "a", 0.0).await);
        if sums == [5.0, 7.5] {
            break;
        }
        // Not of all periods at the same time.
        let old_or_new = [1.0, 5.0].contains(&sums[0]) && [2.5, 7.5].contains(&sums[1]);
        assert!(old_or_new && asked < store::SUMS_HOLD, "{sums:?} after {asked:?}");
    }
}

async fn what_many_book_at_once_is_all_there_and_heard(Fresh { store, .. }: &Fresh) {
    let bookers: Vec<_> = (0..150u32)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut heard = Vec::new();
                for round in 1..=3 {
                    let spent = [(String::from("2026"), f64::from(round))];
                    heard.extend(store.book("blue", &id(&format!("s{n}")), &spent).await.unwrap());
                }
                heard
            })
        })
        .collect();
    let mut most: f64 = 0.0;
    for booker in bookers {
        let heard = booker.await.unwrap();
        // It grows, and one's own is in it.
        assert!(heard.is_sorted() && heard[0] >= 1.0 && heard[2] <= 450.0, "{heard:?}");
        most = most.max(heard[2]);
    }
    // Who was the last has heard of all.
    assert_eq!((most, store.spent("blue", "2026").await.unwrap()), (450.0, 450.0));
}

async fn what_cannot_be_written_keeps_nobody_else_from_it(Fresh { store, .. }: &Fresh) {
    // So much that no sum of it is a number.
    for n in 0..10 {
        drop(store.book("rich", &id(&format!("r{n}")), &[(String::from("2026"), f64::MAX)]).await);
    }
    // Then it is not known any more.
    assert!(!store.reserve("rich", "2026", &id("a"), 1.0, 1.0).await.unwrap_or_default());
    let bookers: Vec<_> = (0..20)
        .map(|n| {
            let (store, tenant) = (store.clone(), if n % 5 == 0 { "rich" } else { "blue" });
            tokio::spawn(async move { store.book(tenant, &id(&format!("s{n}")), &[(String::from("2026"), 1.0)]).await })
        })
        .collect();
    for (n, booker) in bookers.into_iter().enumerate() {
        let booked = booker.await.unwrap();
        assert_eq!(booked.is_ok(), n % 5 != 0, "{n}: {booked:?}");
    }
    assert_eq!(store.spent("blue", "2026").await.unwrap(), 16.0);
}

async fn hooks_are_remembered_in_their_order(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["a", "b"]).await;
    let runs = [run("a", 1), run("a", 2), HookRun { outcome: String::from("ok"), ..run("a", 3) }];
    for one in &runs {
        store.log_hook(one).await.unwrap();
        store.log_hook(&run("b", 1)).await.unwrap();
    }
    assert_eq!(store.hook_runs(&id("a")).await.unwrap(), runs);
    assert_eq!(store.hook_runs(&id("b")).await.unwrap().len(), 3);
}

async fn of_many_runs_of_hooks_the_last_are_kept(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["a", "b"]).await;
    store.log_hook(&run("b", 1)).await.unwrap();
    let most = u32::try_from(HOOK_RUNS_MOST).unwrap();
    for attempt in 1..=most + 2 {
        store.log_hook(&run("a", attempt)).await.unwrap();
    }
    let kept: Vec<u32> = store.hook_runs(&id("a")).await.unwrap().iter().map(|run| run.attempt).collect();
    assert_eq!(kept, (3..=most + 2).collect::<Vec<_>>());
    assert_eq!(store.hook_runs(&id("b")).await.unwrap().len(), 1);
}

async fn what_is_over_is_forgotten_and_nothing_else(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["live"]).await;
    // More than are forgotten at a time.
    for n in 0..450 {
        let phase = if n % 2 == 0 { Phase::Destroyed } else { Phase::Failed };
        store.insert(&Session { phase, ..session(&format!("over{n}")) }).await.unwrap();
    }
    store.log_hook(&run("over0", 1)).await.unwrap();
    store.spend("blue", "2026", &id("over0"), 2.0).await.unwrap();
    let now = Timestamp::now();
    assert_eq!(store.prune(now - SignedDuration::from_hours(1)).await.unwrap(), 0);
    assert_eq!(store.prune(now + SignedDuration::from_hours(1)).await.unwrap(), 450);
    assert_eq!(names(&store.list(&Filter { over: true, ..Filter::default() }, None, 10).await.unwrap()), ["live"]);
    // Its hooks go with it. What it has spent in the period stays.
    assert_eq!(store.hook_runs(&id("over0")).await.unwrap(), []);
    assert_eq!(store.spent("blue", "2026").await.unwrap(), 2.0);
    // Also when another is called the same.
    assert!(!store.reserve("blue", "2026", &id("over0"), 1.0, 2.5).await.unwrap());
    assert!(store.reserve("blue", "2026", &id("over0"), 0.5, 2.5).await.unwrap());
    assert_eq!(store.spent("blue", "2026").await.unwrap(), 2.5);
    // Not for ever.
    store.prune(now + SignedDuration::from_hours(401 * 24)).await.unwrap();
    assert_eq!(store.spent("blue", "2026").await.unwrap(), 0.0);
}

async fn whatever_is_written_into_a_name_stays_text(Fresh { store, .. }: &Fresh) {
    let name = "'; DROP TABLE sessions; -- %_\\\" $1 ?";
    let odd = Session { tenant: name.to_owned(), owner: name.to_owned(), provider: name.to_owned(), ..session("odd") };
    store.insert(&odd).await.unwrap();
    insert(&**store, &["even"]).await;
    let some = Some(name.to_owned());
    let filter = Filter { tenant: some.clone(), owner: some.clone(), provider: some, ..Filter::default() };
    assert_eq!(store.list(&filter, None, 10).await.unwrap(), [odd]);
    assert!(store.reserve(name, name, &id("odd"), 1.0, 1.0).await.unwrap());
    assert_eq!(store.spent(name, name).await.unwrap(), 1.0);
    assert_eq!(claimed(&**store, name, LONG).await, ["even", "odd"]);
    assert_eq!(store.renew(name, LONG).await.unwrap(), 2);
}

async fn two_hundred_sessions_are_each_claimed_once(Fresh { store, .. }: &Fresh) {
    for n in 0..200 {
        insert(&**store, &[&format!("s{n}")]).await;
    }
    let fleets: Vec<_> = (0..8)
        .map(|n| {
            let (store, fleet) = (store.clone(), format!("fleet{n}"));
            tokio::spawn(async move {
                let mut mine = Vec::new();
                loop {
                    let some = store.claim(&fleet, LONG, 7).await.unwrap();
                    if some.is_empty() {
                        return (fleet, mine);
                    }
                    mine.extend(some);
                }
            })
        })
        .collect();
    let mut by: HashMap<SessionId, String> = HashMap::new();
    for fleet in fleets {
        let (fleet, mine) = fleet.await.unwrap();
        assert_eq!(store.renew(&fleet, LONG).await.unwrap(), mine.len() as u64);
        for session in mine {
            let other = by.insert(session.id.clone(), fleet.clone());
            assert_eq!(other, None, "{} was claimed by {fleet}, too", session.id);
        }
    }
    assert_eq!(by.len(), 200);
}

async fn of_many_who_change_it_one_does(Fresh { store, .. }: &Fresh) {
    insert(&**store, &["a"]).await;
    let writers: Vec<_> = (0..8)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut done = 0;
                while done < 10 {
                    let mut read = store.get(&id("a")).await.unwrap().unwrap();
                    read.failures += 1;
                    // However it is written, it was read before.
                    let kept = if done % 2 == 0 { store.update(&mut read).await } else { store.note(&mut read).await };
                    match kept {
                        Ok(()) => done += 1,
                        Err(Error::Conflict(_)) => tokio::task::yield_now().await,
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let last = store.get(&id("a")).await.unwrap().unwrap();
    assert_eq!((last.failures, last.version), (80, 80));
}

async fn what_many_reserve_at_once_stays_below_the_limit(Fresh { store, .. }: &Fresh) {
    // Often, as those who ask do not always meet.
    for period in 0..25 {
        let period = format!("2026-{period}");
        let askers: Vec<_> = (0..8)
            .map(|n| {
                let (store, period) = (store.clone(), period.clone());
                tokio::spawn(async move { store.reserve("blue", &period, &id(&format!("s{n}")), 0.4, 1.0).await.unwrap() })
            })
            .collect();
        let mut granted = 0;
        for asker in askers {
            granted += u32::from(asker.await.unwrap());
        }
        assert_eq!(granted, 2, "{period}");
        assert_eq!(store.spent("blue", &period).await.unwrap(), 0.8);
    }
}

/// The store twice, as two processes have it.
async fn twice(Fresh { store, url, .. }: &Fresh) -> [Arc<dyn Store>; 2] {
    let other = if url.is_empty() { Arc::clone(store) } else { store::open(url).await.unwrap() };
    [Arc::clone(store), other]
}

async fn of_many_who_ask_at_once_a_tenant_has_no_more_than_it_may(fresh: &Fresh) {
    let stores = twice(fresh).await;
    let of = |name: &str, tenant: &str| Session { tenant: tenant.to_owned(), ..session(name) };
    // Often, as those who ask do not always meet.
    for round in 0..8 {
        let tenant = format!("tenant-{round}");
        // Neither of these counts: a container of several, and one that is at its end and may still have one.
        let house = Session { owner: String::new(), ..of(&format!("house-{round}"), &tenant) };
        let failed = Session { phase: Phase::Failed, holds: true, ..of(&format!("failed-{round}"), &tenant) };
        for one in [&house, &failed] {
            stores[0].insert(one).await.unwrap();
        }
        let asking = (0..8).map(|n| {
            let (store, one) = (Arc::clone(&stores[n % 2]), of(&format!("s{n}-{round}"), &tenant));
            tokio::spawn(async move { (one.clone(), store.insert_within(&one, Within::Tenant(3)).await.unwrap()) })
        });
        let asked: Vec<_> = futures_util::future::join_all(asking).await.into_iter().map(|one| one.unwrap()).collect();
        let mut new = asked.into_iter().filter_map(|(one, said)| said.map(|said| (one, said)));
        let (mut one, said) = new.next().unwrap();
        assert_eq!((said, new.clone().count()), (Inserted::New, 2));
        assert!(new.all(|(_, said)| said == Inserted::New));
        // Who is there is known also where there is no room.
        let known = stores[1].insert_within(&one, Within::Tenant(3)).await.unwrap();
        assert_eq!(known, Some(Inserted::Known(Box::new(one.clone()))));
        one.phase = Phase::Destroyed;
        stores[0].update(&mut one).await.unwrap();
        for (name, said) in [("next", Some(Inserted::New)), ("after", None)] {
            let next = of(&format!("{name}-{round}"), &tenant);
            assert_eq!(stores[1].insert_within(&next, Within::Tenant(3)).await.unwrap(), said);
        }
    }
}

async fn of_many_who_make_what_is_missing_one_does(fresh: &Fresh) {
    let stores = twice(fresh).await;
    let house = |name: &str, kind: &str| {
        let mut house = session(name);
        let kind = kind.to_owned();
        house.places = Some(Places { kind, most: 2, pinned: false, taken: BTreeSet::new(), empty_since: None });
        house
    };
    for round in 0..8 {
        let kind = format!("kind-{round}");
        let mut known = Vec::new();
        // One, and then one more beside that.
        for more in 0..2 {
            let making = (0..8).map(|n| {
                let (store, one) = (Arc::clone(&stores[n % 2]), house(&format!("h{n}-{more}-{round}"), &kind));
                let known = known.clone();
                tokio::spawn(async move { store.insert_within(&one, Within::Beside(&known)).await.unwrap().map(|_| one.id) })
            });
            let made = futures_util::future::join_all(making).await;
            let made: Vec<SessionId> = made.into_iter().filter_map(|one| one.unwrap()).collect();
            assert_eq!(made.len(), 1, "{round} {more}");
            known.extend(made);
        }
    }
}

async fn what_is_written_is_there_when_it_is_opened_again(Fresh { store, url, .. }: &Fresh) {
    if url.is_empty() {
        // In memory there is nothing to open again, and another is another.
        insert(&**store, &["a"]).await;
        assert_eq!(memory().await.unwrap().store.get(&id("a")).await.unwrap(), None);
        return;
    }
    insert(&**store, &["a", "b"]).await;
    assert_eq!(claimed(&**store, "one", LONG).await, ["a", "b"]);
    store.release("one", &id("b"), Some(Timestamp::now())).await.unwrap();
    // Beside the first, as another process would.
    let again = store::open(url).await.unwrap();
    assert_eq!(again.get(&id("a")).await.unwrap().unwrap(), session("a"));
    assert_eq!(claimed(&*again, "two", LONG).await, ["b"]);
    // Who has the name of one that has died does not go on holding what that held.
    assert_eq!(again.renew("one", LONG).await.unwrap(), 0);
    assert_eq!(store.renew("one", LONG).await.unwrap(), 1);
    assert_eq!(claimed(&**store, "one", LONG).await, [""; 0]);
}

/// One whose container waits.
fn spare(name: &str) -> Session {
    let mut spare = session(name);
    (spare.pool, spare.phase, spare.holds, spare.native) =
        (Some(String::from("kind")), Phase::Ready, true, Some(name.to_owned()));
    spare
}

async fn what_one_gives_the_other_has_and_neither_if_somebody_was_first(Fresh { store, .. }: &Fresh) {
    let (mut gives, mut takes) = (spare("gives"), session("takes"));
    for session in [&gives, &takes] {
        store.insert(session).await.unwrap();
    }
    let kinds =
        async |kind: &str| store.spares(kind, 8).await.unwrap().into_iter().map(|spare| spare.id.to_string()).collect::<Vec<_>>();
    assert_eq!((kinds("kind").await, kinds("another").await.len()), (vec![String::from("gives")], 0));
    let (old_gives, old_takes) = (gives.clone(), takes.clone());
    (gives.given, gives.holds, takes.taken, takes.holds) = (Some(takes.id.clone()), false, Some(gives.key()), true);
    gives.phase = Phase::Stopped;
    store.update_both(&mut takes, &mut gives).await.unwrap();
    assert_eq!((takes.version, gives.version), (1, 1));
    assert_eq!(
        (store.get(&id("takes")).await.unwrap(), store.get(&id("gives")).await.unwrap()),
        (Some(takes.clone()), Some(gives.clone()))
    );
    assert!(kinds("kind").await.is_empty(), "it is no longer there to be taken");
    // Whichever of the two was changed: neither is.
    for (mut one, mut other) in [(old_takes, gives.clone()), (takes.clone(), old_gives)] {
        one.reason = Some(String::from("too late"));
        other.reason = Some(String::from("too late"));
        let conflict = store.update_both(&mut one, &mut other).await.unwrap_err();
        assert!(matches!(conflict, Error::Conflict(_)), "{conflict}");
    }
    assert_eq!((store.get(&id("takes")).await.unwrap(), store.get(&id("gives")).await.unwrap()), (Some(takes), Some(gives)));
}

async fn of_many_who_take_one_each_has_another(Fresh { store, .. }: &Fresh) {
    for n in 0..20 {
        store.insert(&spare(&format!("spare-{n}"))).await.unwrap();
        store.insert(&session(&format!("s{n}"))).await.unwrap();
    }
    let takers = (0..20).map(|n| {
        let store = Arc::clone(store);
        tokio::spawn(async move {
            let mut taker = store.get(&id(&format!("s{n}"))).await.unwrap().unwrap();
            loop {
                for mut spare in store.spares("kind", 3).await.unwrap() {
                    (spare.given, spare.phase, spare.holds) = (Some(taker.id.clone()), Phase::Stopped, false);
                    taker.taken = Some(spare.key());
                    match store.update_both(&mut taker, &mut spare).await {
                        Ok(()) => return spare.id,
                        Err(Error::Conflict(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        })
    });
    let taken: BTreeSet<SessionId> =
        futures_util::future::join_all(takers).await.into_iter().map(|taken| taken.unwrap()).collect();
    assert_eq!(taken.len(), 20);
}

async fn of_many_who_want_a_place_no_more_have_one_than_there_are(Fresh { store, .. }: &Fresh) {
    let now: Timestamp = "2026-11-26T12:00:00Z".parse().unwrap();
    for n in 0..2 {
        let mut house = session(&format!("house-{n}"));
        house.places = Some(Places {
            kind: String::from("kind"),
            most: 4,
            pinned: false,
            taken: BTreeSet::new(),
            empty_since: Some(house.created),
        });
        store.insert(&house).await.unwrap();
    }
    let guests = (0..12).map(|n| {
        let store = Arc::clone(store);
        tokio::spawn(async move {
            let guest = session(&format!("g{n}"));
            store.insert(&guest).await.unwrap();
            loop {
                let houses = store.spares("kind", 8).await.unwrap();
                // None is told that has no place left.
                if houses.is_empty() {
                    return None;
                }
                for mut house in houses {
                    assert!(place::may_seat(&house, now));
                    let mut seated = guest.clone();
                    place::seat(&mut seated, &mut house, Some(Duration::ZERO), now);
                    match store.update_both(&mut seated, &mut house).await {
                        Ok(()) => return Some(seated),
                        Err(Error::Conflict(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        })
    });
    let done = futures_util::future::join_all(guests).await;
    let seated: BTreeSet<String> = done.into_iter().filter_map(|one| one.unwrap()?.native).collect();
    let mut taken = BTreeSet::new();
    for name in ["house-0", "house-1"] {
        let places = store.get(&id(name)).await.unwrap().unwrap().places.unwrap();
        assert_eq!((places.taken.len(), places.free(), places.empty_since), (4, 0, None));
        taken.extend(places.taken.iter().map(|guest| format!("{name}/{guest}")));
    }
    assert_eq!(seated, taken, "who has a place is known to its container, and nobody else is");
}

async fn a_duty_is_one_fleets_until_its_lease_is_over(Fresh { store, .. }: &Fresh) {
    assert!(store.duty("pools", "a", LONG).await.unwrap());
    assert!(!store.duty("pools", "b", LONG).await.unwrap());
    assert!(store.duty("another", "b", LONG).await.unwrap());
    assert!(store.duty("pools", "a", OVER).await.unwrap(), "it goes on with it");
    assert!(store.duty("pools", "b", LONG).await.unwrap());
    assert!(!store.duty("pools", "a", LONG).await.unwrap());
}

async fn what_is_drained_is_known_until_it_is_no_longer(Fresh { store, .. }: &Fresh) {
    let until: Timestamp = "2026-11-26T12:00:00.123456789Z".parse().unwrap();
    store.drain("docker", Some(Timestamp::MIN)).await.unwrap();
    store.drain("docker", Some(until)).await.unwrap();
    store.drain("fly", Some(until)).await.unwrap();
    assert_eq!(store.drains().await.unwrap(), [("docker", until), ("fly", until)].map(|(name, at)| (name.to_owned(), at)).into());
    store.drain("docker", None).await.unwrap();
    assert_eq!(store.drains().await.unwrap().into_keys().collect::<Vec<_>>(), ["fly"]);
    // A node of it is another matter than all of it.
    store.drain("fly/ip-10-0-0-1.internal", Some(Timestamp::MAX)).await.unwrap();
    assert_eq!(
        store.drains().await.unwrap(),
        [("fly", until), ("fly/ip-10-0-0-1.internal", Timestamp::MAX)].map(|(name, at)| (name.to_owned(), at)).into()
    );
    store.drain("fly", None).await.unwrap();
    assert_eq!(store.drains().await.unwrap().into_keys().collect::<Vec<_>>(), ["fly/ip-10-0-0-1.internal"]);
    store.drain("fly/ip-10-0-0-1.internal", None).await.unwrap();
    assert!(store.drains().await.unwrap().is_empty());
}

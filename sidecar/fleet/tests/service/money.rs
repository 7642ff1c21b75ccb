//! What tenants may spend: nothing is forgotten, and nothing stays set aside for what came to nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use agent_fleet::budget::Budgets;
use agent_fleet::config::Tenant;
use agent_fleet::lifecycle::Phase;
use agent_fleet::service;
use agent_fleet::session::{Pattern, Report, Session, Wanted};
use agent_fleet::store::{self, Inserted, Store};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::town::{Town, run, session};

fn tenant(name: &str, day: Option<f64>, month: Option<f64>, max_sessions: Option<u64>) -> (String, Tenant) {
    let (budget_usd_per_day, budget_usd_per_month) = (day, month);
    let zone = TimeZone::UTC;
    (name.to_owned(), Tenant { name: name.to_owned(), budget_usd_per_day, budget_usd_per_month, zone, max_sessions })
}

/// An hour of a container is 0.05 USD.
fn long(id: &str, hours: u64) -> Session {
    let mut long = session(id, Pattern::LongRunning);
    long.spec.ttl = Duration::from_secs(hours * 3600);
    long.ends = long.created + long.spec.ttl;
    long
}

async fn spent(town: &Town, name: &str) -> f64 {
    let (period, _) = town.tenants[name].periods(Timestamp::now()).remove(0);
    town.store.spent(name, &period).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_stays_set_aside_for_what_came_to_nothing() {
    let mut town = Town::new(0).await;
    town.tenants.extend([tenant("t", None, Some(1.0), None)]);
    let fleet = town.fleet();
    // Said no to by a hook, and taken back before it was begun.
    fleet.create(long("refused-1", 5)).await.unwrap();
    fleet.create(long("held-1", 5)).await.unwrap();
    assert_eq!(spent(&town, "t").await, 0.5);
    let running = run(&fleet);
    fleet.want(&"held-1".parse().unwrap(), Wanted::Gone, "it was taken back").await.unwrap();
    for _ in 0..3000 {
        if spent(&town, "t").await == 0.0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(spent(&town, "t").await, 0.0);
    fleet.create(long("all-there-is", 20)).await.unwrap();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_fleets_together_make_no_more_than_a_tenant_may_have() {
    let mut town = Town::new(0).await;
    town.tenants.extend([tenant("t", None, Some(100.0), Some(3))]);
    let fleets = [town.fleet(), town.fleet(), town.fleet(), town.fleet()];
    let asking = (0..12).map(|n| {
        let fleet = Arc::clone(&fleets[n % 4]);
        tokio::spawn(async move { fleet.create(long(&format!("s{n}"), 5)).await })
    });
    let mut made = 0;
    for asked in futures_util::future::join_all(asking).await {
        match asked.unwrap() {
            Ok(inserted) => made += u32::from(inserted == Inserted::New),
            Err(error) => assert!(matches!(error, service::Error::Full { most: 3, .. }), "{error}"),
        }
    }
    assert_eq!(made, 3);
    assert_eq!(spent(&town, "t").await, 0.75, "nothing stays set aside for the others");
}

#[tokio::test]
async fn who_is_asked_for_the_same_at_the_same_time_sets_nothing_aside_for_it() {
    let mut town = Town::new(0).await;
    town.tenants.extend([tenant("t", None, Some(100.0), None), tenant("u", None, Some(100.0), None)]);
    let (one, other) = (town.fleet(), town.fleet());
    for n in 0..20 {
        let of_u = Session { tenant: String::from("u"), ..long(&format!("s{n}"), 20) };
        let of_t = long(&format!("s{n}"), 20);
        let (first, second) = tokio::join!(one.create(of_t), other.create(of_u));
        let new = [first.unwrap(), second.unwrap()].into_iter().filter(|inserted| *inserted == Inserted::New).count();
        assert_eq!(new, 1);
    }
    let all = spent(&town, "t").await + spent(&town, "u").await;
    assert!((all - 20.0).abs() < 1e-6, "1 USD for each of 20: {all}");
}

#[tokio::test]
async fn who_comes_at_once_is_counted_one_by_one() {
    let mut town = Town::new(0).await;
    town.tenants.extend([tenant("t", None, None, Some(3))]);
    let fleet = town.fleet();
    let asked = (0..10).map(|n| fleet.create(long(&format!("s{n}"), 1)));
    let answers = futures_util::future::join_all(asked).await;
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_works_does_not_end_for_what_is_only_set_aside() {
    let mut town = Town::new(0).await;
    town.tenants.extend([tenant("t", None, Some(1.0), None)]);
    *town.words.0.lock().unwrap() = Some((true, 0.3));
    let fleet = town.fleet();
    let running = run(&fleet);
    fleet.create(long("works", 1)).await.unwrap();
    while town.get("works").await.cost_usd() != 0.3 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    fleet.create(long("held", 13)).await.unwrap();
    *town.words.0.lock().unwrap() = Some((true, 0.4));
    let looked = |session: &Session| session.report.as_ref().filter(|said| said.cost_usd == 0.4).map(|said| said.at);
    let mut looks = std::collections::BTreeSet::new();
    while looks.len() < 3 {
        let works = town.get("works").await;
        assert_eq!(works.wanted, Wanted::Running, "0.4 of 1 are spent: {:?}", works.reason);
        looks.extend(looked(&works));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    *town.words.0.lock().unwrap() = Some((true, 1.0));
    let over = town.reaches("works", Phase::Destroyed).await;
    assert!(over.reason.is_some_and(|why| why.contains("is spent")));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_spent_since_the_last_look_is_asked_for_before_the_end() {
    let mut town = Town::new(0).await;
    town.policy.look_every = Duration::from_secs(3600);
    let fleet = town.fleet();
    let running = run(&fleet);
    *town.words.0.lock().unwrap() = Some((true, 0.5));
    fleet.create(long("a", 1)).await.unwrap();
    town.reaches("a", Phase::Active).await;
    *town.words.0.lock().unwrap() = Some((true, 0.9));
    fleet.want(&"a".parse().unwrap(), Wanted::Gone, "enough").await.unwrap();
    assert_eq!(town.reaches("a", Phase::Destroyed).await.cost_usd(), 0.9);
    running.stop().await;
}

/// Frozen processes keep their memory, and its price.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_sleeps_and_costs_all_the_same_ends_when_nothing_is_left() {
    let mut town = Town::new(0).await;
    town.tenants.extend([tenant("t", None, Some(1.0), None)]);
    let fleet = town.fleet();
    let running = run(&fleet);
    fleet.create(long("a", 1)).await.unwrap();
    town.reaches("a", Phase::Ready).await;
    fleet.want(&"a".parse().unwrap(), Wanted::Paused, "somebody asked for it").await.unwrap();
    town.reaches("a", Phase::Paused).await;
    // However short a while it is since it was counted last.
    *town.cloud.paused.lock().unwrap() = 1e12;
    // The time for it has come.
    town.store.wake(&"a".parse().unwrap()).await.unwrap();
    town.reaches("a", Phase::Destroyed).await;
    running.stop().await;
}

#[tokio::test]
async fn over_midnight_each_day_has_what_was_spent_in_it_whatever_the_clock_says() {
    let store: Arc<dyn Store> = store::memory().await.unwrap();
    let (name, of) = tenant("t", Some(100.0), None, None);
    let budgets = Budgets::new(Arc::clone(&store), BTreeMap::from([(name, of)]));
    let mut kept = session("a", Pattern::LongRunning);
    let at = |text: &str| text.parse::<Timestamp>().unwrap();
    let book = async |kept: &mut Session, now: Timestamp, cost_usd: f64| {
        kept.report = Some(Report { at: now, busy_until: None, cost_usd, conversation: None, memory_bytes: None });
        let periods = budgets.periods(kept, now);
        budgets.close(kept, &periods).await.unwrap();
        kept.cost_at = periods;
        budgets.charge(kept, now).await.unwrap();
    };
    book(&mut kept, at("2026-11-26T23:59:58Z"), 1.0).await;
    book(&mut kept, at("2026-11-27T00:00:03Z"), 1.5).await;
    // A clock that is behind: another fleet's, or ours, set back.
    book(&mut kept, at("2026-11-26T23:59:59Z"), 1.75).await;
    book(&mut kept, at("2026-11-27T00:01:00Z"), 2.0).await;
    assert_eq!(store.spent("t", "2026-11-26").await.unwrap(), 1.5);
    assert_eq!(store.spent("t", "2026-11-27").await.unwrap(), 0.5);
}

//! Whatever is done in whatever order comes to what a few maps would come to.

use std::collections::BTreeMap;

use agent_fleet::lifecycle::Phase;
use agent_fleet::session::{Session, SessionId};
use agent_fleet::store::{Error, Filter, HookRun, Inserted, Store};
use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::{Fresh, LONG, OVER, file, id, memory, postgres, run, session};

const NAMES: [&str; 5] = ["A", "a", "a-1", "b", "b_"];
const FLEETS: [&str; 3] = ["one", "two", "three"];
const TENANTS: [&str; 2] = ["blue", "red"];

#[derive(Clone, Debug)]
enum Operation {
    Insert {
        name: usize,
        tenant: usize,
        phase: Phase,
    },
    /// What was read, or what was read before the last change.
    Update {
        name: usize,
        stale: bool,
        phase: Phase,
    },
    List {
        tenant: Option<usize>,
        phases: Vec<Phase>,
        over: bool,
        after: Option<usize>,
        most: usize,
    },
    Count,
    Claim {
        fleet: usize,
        held: bool,
        most: usize,
    },
    Renew {
        fleet: usize,
        held: bool,
    },
    Release {
        fleet: usize,
        name: usize,
        due: Due,
    },
    Wake {
        name: usize,
    },
    Reserve {
        tenant: usize,
        name: usize,
        cents: u32,
    },
    Spend {
        tenant: usize,
        name: usize,
        cents: u32,
    },
    /// The same, and what all have spent is asked.
    Book {
        tenant: usize,
        name: usize,
        cents: u32,
    },
    LogHook {
        name: usize,
        attempt: u32,
    },
    Prune {
        all: bool,
    },
}

#[derive(Clone, Copy, Debug)]
enum Due {
    Now,
    Later,
    Never,
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    let name = || 0..NAMES.len();
    let fleet = || 0..FLEETS.len();
    let tenant = || 0..TENANTS.len();
    let phase = || prop::sample::select(vec![Phase::Requested, Phase::Active, Phase::Idle, Phase::Destroyed, Phase::Failed]);
    let due = || prop::sample::select(vec![Due::Now, Due::Later, Due::Never]);
    prop_oneof![
        3 => (name(), tenant(), phase()).prop_map(|(name, tenant, phase)| Insert { name, tenant, phase }),
        3 => (name(), any::<bool>(), phase()).prop_map(|(name, stale, phase)| Update { name, stale, phase }),
        1 => (prop::option::of(tenant()), prop::collection::vec(phase(), 0..3), any::<bool>(), prop::option::of(name()), 0..6usize)
            .prop_map(|(tenant, phases, over, after, most)| List { tenant, phases, over, after, most }),
        1 => Just(Count),
        4 => (fleet(), any::<bool>(), 0..4usize).prop_map(|(fleet, held, most)| Claim { fleet, held, most }),
        1 => (fleet(), any::<bool>()).prop_map(|(fleet, held)| Renew { fleet, held }),
        4 => (fleet(), name(), due()).prop_map(|(fleet, name, due)| Release { fleet, name, due }),
        3 => name().prop_map(|name| Wake { name }),
        2 => (tenant(), name(), 0..60u32).prop_map(|(tenant, name, cents)| Reserve { tenant, name, cents }),
        1 => (tenant(), name(), 0..60u32).prop_map(|(tenant, name, cents)| Spend { tenant, name, cents }),
        3 => (tenant(), name(), 0..60u32).prop_map(|(tenant, name, cents)| Book { tenant, name, cents }),
        1 => (name(), 1..9u32).prop_map(|(name, attempt)| LogHook { name, attempt }),
        1 => any::<bool>().prop_map(|all| Prune { all }),
    ]
}

#[derive(Debug)]
struct Row {
    session: Session,
    due: bool,
    woken: bool,
    /// By whom, and whether the lease still holds.
    lease: Option<(&'static str, bool)>,
}

#[derive(Default)]
struct Model {
    rows: BTreeMap<SessionId, Row>,
    hooks: BTreeMap<SessionId, Vec<HookRun>>,
    cents: BTreeMap<(&'static str, &'static str), u32>,
    /// Of those that are forgotten.
    pruned: BTreeMap<&'static str, u32>,
}

impl Model {
    fn missing<T: std::fmt::Debug>(name: &str, result: Result<T, Error>) {
        assert!(matches!(&result, Err(Error::Missing(of)) if *of == id(name)), "{result:?}");
    }

    fn cents(&self, tenant: &str) -> u32 {
        let kept: u32 = self.cents.iter().filter(|((of, _), _)| *of == tenant).map(|(_, cents)| cents).sum();
        kept + self.pruned.get(tenant).unwrap_or(&0)
    }

    /// Does it to both, and holds what the store says against what should be.
    async fn check(&mut self, store: &dyn Store, operation: &Operation) {
        match operation {
            Operation::Insert { name, tenant, phase } => {
                let new = Session { tenant: TENANTS[*tenant].to_owned(), phase: *phase, ..session(NAMES[*name]) };
                let expected = match self.rows.get(&new.id) {
                    Some(row) => Inserted::Known(Box::new(row.session.clone())),
                    None => Inserted::New,
                };
                assert_eq!(store.insert(&new).await.unwrap(), expected);
                self.rows.entry(new.id.clone()).or_insert(Row { session: new, due: true, woken: false, lease: None });
            }
            Operation::Update { name, stale, phase } => {
                let name = NAMES[*name];
                let Some(row) = self.rows.get_mut(&id(name)) else {
                    return Self::missing(name, store.update(&mut session(name)).await);
                };
                let mut changed = row.session.clone();
                changed.phase = *phase;
                changed.failures += 1;
                if *stale {
                    changed.version -= 1;
                    let result = store.update(&mut changed).await;
                    assert!(matches!(&result, Err(Error::Conflict(of)) if *of == id(name)), "{result:?}");
                } else {
                    store.update(&mut changed).await.unwrap();
                    assert_eq!(changed.version, row.session.version + 1);
                    row.session = changed;
                }
            }
            Operation::List { tenant, phases, over, after, most } => {
                let tenant = tenant.map(|tenant| TENANTS[tenant].to_owned());
                let filter = Filter { tenant: tenant.clone(), phases: phases.clone(), over: *over, ..Filter::default() };
                let after = after.map(|name| id(NAMES[name]));
                let expected: Vec<Session> = self
                    .rows
                    .values()
                    .map(|row| &row.session)
                    .filter(|session| after.as_ref().is_none_or(|after| session.id > *after))
                    .filter(|session| tenant.as_ref().is_none_or(|tenant| session.tenant == *tenant))
                    .filter(|session| phases.is_empty() || phases.contains(&session.phase))
                    .filter(|session| *over || !session.phase.is_last())
                    .take(*most)
                    .cloned()
                    .collect();
                assert_eq!(store.list(&filter, after.as_ref(), *most).await.unwrap(), expected);
            }
            Operation::Count => {
                let mut expected = BTreeMap::new();
                for Row { session, .. } in self.rows.values() {
                    *expected.entry((session.phase, session.provider.clone(), session.tenant.clone())).or_insert(0) += 1;
                }
                let counted = store.count().await.unwrap().into_iter();
                assert_eq!(
                    counted.map(|(phase, provider, tenant, n)| ((phase, provider, tenant), n)).collect::<BTreeMap<_, _>>(),
                    expected
                );
            }
            Operation::Claim { fleet, held, most } => {
                let free = |row: &Row| row.due && !matches!(row.lease, Some((_, true)));
                let expected = self.rows.values().filter(|row| free(row)).count().min(*most);
                let claimed = store.claim(FLEETS[*fleet], if *held { LONG } else { OVER }, *most).await.unwrap();
                assert_eq!(claimed.len(), expected);
                // Which of them is a matter of time.
                for session in claimed {
                    let row = self.rows.get_mut(&session.id).unwrap();
                    assert!(free(row), "{row:?}");
                    assert_eq!(session, row.session);
                    row.lease = Some((FLEETS[*fleet], *held));
                    row.woken = false;
                }
            }
            Operation::Renew { fleet, held } => {
                let fleet = FLEETS[*fleet];
                let mine = self.rows.values_mut().filter_map(|row| row.lease.as_mut()).filter(|(by, _)| *by == fleet);
                let renewed = mine.map(|lease| lease.1 = *held).count() as u64;
                assert_eq!(store.renew(fleet, if *held { LONG } else { OVER }).await.unwrap(), renewed);
            }
            Operation::Release { fleet, name, due } => {
                let at = match due {
                    Due::Now => Some(Timestamp::now() - SignedDuration::from_secs(1)),
                    Due::Later => Some(Timestamp::now() + SignedDuration::from_hours(1)),
                    Due::Never => None,
                };
                store.release(FLEETS[*fleet], &id(NAMES[*name]), at).await.unwrap();
                if let Some(row) = self.rows.get_mut(&id(NAMES[*name]))
                    && row.lease.is_some_and(|(by, _)| by == FLEETS[*fleet])
                {
                    row.due = row.woken || matches!(due, Due::Now);
                    row.woken = false;
                    row.lease = None;
                }
            }
            Operation::Wake { name } => match self.rows.get_mut(&id(NAMES[*name])) {
                Some(row) => {
                    store.wake(&id(NAMES[*name])).await.unwrap();
                    row.due = true;
                    row.woken = true;
                }
                None => Self::missing(NAMES[*name], store.wake(&id(NAMES[*name])).await),
            },
            Operation::Reserve { tenant, name, cents } => {
                let (tenant, name) = (TENANTS[*tenant], NAMES[*name]);
                let others = self.cents(tenant) - self.cents.get(&(tenant, name)).unwrap_or(&0);
                let fits = others + cents <= 100;
                assert_eq!(store.reserve(tenant, "2026", &id(name), f64::from(*cents) / 100.0, 1.0).await.unwrap(), fits);
                if fits {
                    self.cents.insert((tenant, name), *cents);
                }
            }
            Operation::Spend { tenant, name, cents } => {
                let (tenant, name) = (TENANTS[*tenant], NAMES[*name]);
                store.spend(tenant, "2026", &id(name), f64::from(*cents) / 100.0).await.unwrap();
                self.cents.insert((tenant, name), *cents);
            }
            Operation::Book { tenant, name, cents } => {
                let (tenant, name) = (TENANTS[*tenant], NAMES[*name]);
                let spent =
                    [("2026", *cents), ("2026-11", 7)].map(|(period, cents)| (period.to_owned(), f64::from(cents) / 100.0));
                self.cents.insert((tenant, name), *cents);
                let sums = store.book(tenant, &id(name), &spent).await.unwrap();
                assert_eq!(sums[0], f64::from(self.cents(tenant)) / 100.0);
                assert!(sums.len() == 2 && sums[1] >= 0.07, "{sums:?}");
            }
            Operation::LogHook { name, attempt } => {
                let run = run(NAMES[*name], *attempt);
                if !self.rows.contains_key(&run.session) {
                    return Self::missing(NAMES[*name], store.log_hook(&run).await);
                }
                store.log_hook(&run).await.unwrap();
                self.hooks.entry(run.session.clone()).or_default().push(run);
            }
            Operation::Prune { all } => {
                let hour = SignedDuration::from_hours(1);
                let before = if *all { Timestamp::now() + hour } else { Timestamp::now() - hour };
                let had = self.rows.len();
                self.rows.retain(|_, row| !(*all && row.session.phase.is_last()));
                self.hooks.retain(|id, _| self.rows.contains_key(id));
                // What they have spent is nobody's who is called the same after that.
                let gone = self.cents.extract_if(.., |(_, name), _| *all && !self.rows.contains_key(&id(name)));
                let gone: Vec<_> = gone.collect();
                for ((tenant, _), cents) in gone {
                    *self.pruned.entry(tenant).or_default() += cents;
                }
                assert_eq!(store.prune(before).await.unwrap(), (had - self.rows.len()) as u64);
            }
        }
    }

    /// Whether all that can be read is as it should be.
    async fn same(&self, store: &dyn Store) {
        for name in NAMES {
            assert_eq!(store.get(&id(name)).await.unwrap().as_ref(), self.rows.get(&id(name)).map(|row| &row.session));
            assert_eq!(store.hook_runs(&id(name)).await.unwrap(), self.hooks.get(&id(name)).cloned().unwrap_or_default());
        }
        for tenant in TENANTS {
            assert_eq!(store.spent(tenant, "2026").await.unwrap(), f64::from(self.cents(tenant)) / 100.0);
        }
    }
}

/// Tries so many stores with operations in any order. `None`: there is none to try.
fn any_order(cases: u32, fresh: impl AsyncFn() -> Option<Fresh>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 2000, ..Config::default() };
    TestRunner::new(config)
        .run(&prop::collection::vec(operation(), 1..60), |operations| {
            runtime.block_on(async {
                let Some(fresh) = fresh().await else { return };
                let mut model = Model::default();
                for operation in &operations {
                    model.check(&*fresh.store, operation).await;
                }
                model.same(&*fresh.store).await;
            });
            Ok(())
        })
        .unwrap();
}

#[test]
fn in_any_order_in_memory() {
    any_order(100, memory);
}

#[test]
fn in_any_order_in_a_file() {
    any_order(6, file);
}

#[test]
fn in_any_order_in_postgres() {
    any_order(10, postgres);
}

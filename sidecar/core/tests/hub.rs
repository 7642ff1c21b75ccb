//! The registry against a model: wrappers that write, die and come late, hubs that die between any two of their steps.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed; helpers are tests, too")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use agent_sidecar_core::hub::{Hello, Line, Registry, Stored, VERSION, changes};
use agent_sidecar_core::metric::{
    self, CONTAINER_CPU, CONTEXT_USED, COST, Cell, Kind, Meters, PERMISSION_DENIALS, SESSIONS_ACTIVE, TIME, TOKENS, TURN_COST,
    TURNS,
};
use agent_sidecar_core::tokens::Usd;
use proptest::prelude::*;

const SLOTS: usize = 4;

/// A wrapper and its journal, as the disk has it.
struct Wrapper {
    hello: Hello,
    meters: Meters,
    since: u64,
    alive: bool,
}

/// What a disk keeps when everybody dies.
#[derive(Default)]
struct Disk {
    journals: BTreeMap<String, Vec<u8>>,
    stored: Vec<u8>,
}

struct Hub {
    registry: Registry,
    read: BTreeMap<String, usize>,
}

impl Hub {
    fn start(disk: &Disk) -> Hub {
        let stored: Stored = serde_json::from_slice(&disk.stored).unwrap_or_default();
        Hub { registry: Registry::new(SLOTS, metric::MAX_SERIES, &[], &stored), read: BTreeMap::new() }
    }

    /// Reads what is new. `die_after`: at most so many of the steps that change the disk are done.
    fn scan(&mut self, disk: &mut Disk, alive: &BTreeSet<String>, die_after: usize) -> bool {
        let mut ended = Vec::new();
        for (run, journal) in &disk.journals {
            let at = self.read.entry(run.clone()).or_insert(0);
            while let Some(end) = journal[*at..].iter().position(|b| *b == b'\n') {
                let line = &journal[*at..*at + end];
                if *at == 0 {
                    self.registry.join(serde_json::from_slice(line).unwrap());
                } else if let Ok(line) = serde_json::from_slice::<Line>(line) {
                    self.registry.update(run, line);
                }
                *at += end + 1;
            }
            if !alive.contains(run) {
                ended.push(run.clone());
            }
        }
        for run in &ended {
            self.registry.retire(run);
        }
        let mut steps = 0;
        let mut step = || {
            steps += 1;
            steps <= die_after
        };
        if !ended.is_empty() {
            if !step() {
                return false;
            }
            disk.stored = serde_json::to_vec(&self.registry.stored()).unwrap();
        }
        for run in ended {
            if !step() {
                return false;
            }
            disk.journals.remove(&run);
            self.read.remove(&run);
            self.registry.forget(&run);
        }
        true
    }
}

#[derive(Clone, Debug)]
enum Step {
    Start(u8),
    Count(u8, u64),
    /// Writes what changed; all of it, or the line torn at this share.
    Write(u8, Option<u8>),
    /// Writes everything again into a new journal.
    Compact(u8),
    Kill(u8),
    Scan,
    /// The hub dies, somewhere within a scan.
    HubDies(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => any::<u8>().prop_map(Step::Start),
        6 => (any::<u8>(), 1..1_000_u64).prop_map(|(who, n)| Step::Count(who, n)),
        5 => (any::<u8>(), proptest::option::weighted(0.1, any::<u8>())).prop_map(|(who, torn)| Step::Write(who, torn)),
        1 => any::<u8>().prop_map(Step::Compact),
        2 => any::<u8>().prop_map(Step::Kill),
        3 => Just(Step::Scan),
        2 => (0..6_u8).prop_map(Step::HubDies),
    ];
    proptest::collection::vec(step, 1..120)
}

/// What was certainly told, by tenant: what the sums have to be.
type Truth = BTreeMap<String, (u64, u64, u64)>;

fn line(wrapper: &mut Wrapper) -> Vec<u8> {
    let mut line = Line { live: true, ready: true, ..Line::default() };
    wrapper.since = changes(&mut wrapper.meters, wrapper.since, &mut line);
    let mut bytes = serde_json::to_vec(&line).unwrap();
    bytes.push(b'\n');
    bytes
}

fn hello(wrapper: &Wrapper) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(&wrapper.hello).unwrap();
    bytes.push(b'\n');
    bytes
}

fn counted(meters: &Meters) -> (u64, u64, u64) {
    let tokens = meters.family(&TOKENS).unwrap().series().map(|series| match series.cell {
        Cell::Count(n) => n,
        _ => 0,
    });
    let usd = meters.family(&COST).unwrap().series().map(|series| match series.cell {
        Cell::Usd(usd) => usd.pico(),
        _ => 0,
    });
    let Some(Cell::Histogram(h)) = meters.get(&TURN_COST, &[]) else { panic!("it is there from the start") };
    (tokens.sum(), usd.sum(), h.count)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn what_was_written_is_counted_once_whoever_dies(steps in steps()) {
        let mut disk = Disk::default();
        let mut hub = Hub::start(&disk);
        let mut wrappers: Vec<Wrapper> = Vec::new();
        // Of each wrapper: what its last whole line said.
        let mut told: BTreeMap<String, (u64, u64, u64)> = BTreeMap::new();
        let alive = |wrappers: &[Wrapper]| -> BTreeSet<String> {
            wrappers.iter().filter(|one| one.alive).map(|one| one.hello.run.clone()).collect()
        };
        for step in steps {
            let n = wrappers.len();
            let pick = |who: u8| (n > 0).then(|| usize::from(who) % n);
            match step {
                Step::Start(tenant) => {
                    let run = format!("run{n:04}");
                    let labels = vec![(String::from("tenant"), format!("t{}", tenant % 3))];
                    let hello_of = Hello { hub: VERSION, run: run.clone(), pid: 1, started: 0.0, world: String::new(), labels };
                    let wrapper = Wrapper { hello: hello_of, meters: Meters::default(), since: 0, alive: true };
                    disk.journals.insert(run.clone(), hello(&wrapper));
                    told.insert(run, (0, 0, 0));
                    wrappers.push(wrapper);
                }
                Step::Count(who, n) => if let Some(at) = pick(who) && wrappers[at].alive {
                    let meters = &mut wrappers[at].meters;
                    meters.add(&TOKENS, &[&format!("m{}", n % 12), "input", "main"], n);
                    meters.add_usd(&COST, &["m", "main"], Usd::from_pico(n * 7));
                    meters.observe(&TURN_COST, &[], 0.25);
                },
                Step::Write(who, torn) => if let Some(at) = pick(who) && wrappers[at].alive {
                    let bytes = line(&mut wrappers[at]);
                    let journal = disk.journals.get_mut(&wrappers[at].hello.run).unwrap();
                    // After a torn line comes a new one, with everything.
                    match torn {
                        Some(share) => {
                            let cut = (bytes.len() - 1) * usize::from(share) / 256;
                            journal.extend(&bytes[..cut]);
                            journal.push(b'\n');
                            wrappers[at].since = 0;
                        }
                        None => {
                            journal.extend(bytes);
                            told.insert(wrappers[at].hello.run.clone(), counted(&wrappers[at].meters));
                        }
                    }
                },
                Step::Compact(who) => if let Some(at) = pick(who) && wrappers[at].alive {
                    wrappers[at].since = 0;
                    let mut bytes = hello(&wrappers[at]);
                    bytes.extend(line(&mut wrappers[at]));
                    let run = wrappers[at].hello.run.clone();
                    disk.journals.insert(run.clone(), bytes);
                    hub.read.remove(&run);
                    told.insert(run, counted(&wrappers[at].meters));
                },
                Step::Kill(who) => if let Some(at) = pick(who) { wrappers[at].alive = false },
                Step::Scan => { hub.scan(&mut disk, &alive(&wrappers), usize::MAX); }
                Step::HubDies(after) => {
                    hub.scan(&mut disk, &alive(&wrappers), usize::from(after));
                    hub = Hub::start(&disk);
                }
            }
        }
        hub.scan(&mut disk, &alive(&wrappers), usize::MAX);
        let mut truth = Truth::new();
        for wrapper in &wrappers {
            let sum = truth.entry(wrapper.hello.labels[0].1.clone()).or_default();
            let (tokens, pico, turns) = told[&wrapper.hello.run];
            *sum = (sum.0 + tokens, sum.1 + pico, sum.2 + turns);
        }
        let (groups, _) = hub.registry.expose(0.0);
        let sums: Truth = groups
            .iter()
            .filter(|(labels, _)| !labels.is_empty())
            .map(|(labels, meters)| (labels[0].1.clone(), counted(meters)))
            .collect();
        for (tenant, sum) in truth {
            prop_assert_eq!(sums.get(&tenant).copied().unwrap_or_default(), sum, "{}", tenant);
        }
        prop_assert!(disk.journals.keys().all(|run| alive(&wrappers).contains(run)), "no journal outlives its wrapper");
    }
}

/// What one wrapper would write, whole.
fn written(meters: &mut Meters) -> Line {
    let mut line = Line { live: true, ready: true, ..Line::default() };
    changes(meters, 0, &mut line);
    line
}

fn join(registry: &mut Registry, run: &str, tenant: &str, meters: &mut Meters) {
    let labels = vec![(String::from("tenant"), tenant.to_owned())];
    assert!(registry.join(Hello { hub: VERSION, run: run.to_owned(), pid: 1, started: 0.0, world: String::new(), labels }));
    registry.update(run, written(meters));
}

fn all_series(registry: &Registry) -> usize {
    let (groups, house) = registry.expose(0.0);
    groups.iter().map(|(_, meters)| meters.series_count()).sum::<usize>() + house.series_count()
}

#[test]
fn ten_thousand_sessions_leave_as_many_series_as_one() {
    let mut registry = Registry::new(8, metric::MAX_SERIES, &[], &Stored::default());
    let session = |i: u64| {
        let mut meters = Meters::default();
        meters.add(&TOKENS, &[&format!("model{i}"), "input", "main"], 1);
        meters.add(&PERMISSION_DENIALS, &[&format!("tool{i}")], 1);
        meters.add(&TURNS, &["success"], 1);
        meters.set(&CONTEXT_USED, &["0"], 0.5);
        meters.set(&SESSIONS_ACTIVE, &[], 1.0);
        meters
    };
    let mut peak = 0;
    for i in 0..10_000_u64 {
        join(&mut registry, &format!("run{i}"), &format!("t{}", i % 3), &mut session(i));
        // Up to sixteen at once.
        if i >= 16 {
            registry.retire(&format!("run{}", i - 16));
            registry.forget(&format!("run{}", i - 16));
        }
        if i == 200 {
            peak = all_series(&registry);
        }
    }
    let now = all_series(&registry);
    assert!(now <= peak, "{now} series, {peak} after two hundred");
    let (groups, house) = registry.expose(0.0);
    let mut turns = 0;
    for (labels, meters) in &groups {
        assert!(meters.series_count() < metric::MAX_SERIES, "{labels:?}");
        if let Some(Cell::Count(n)) = meters.get(&TURNS, &["success"]) {
            turns += n;
        }
        let slots = meters.family(&CONTEXT_USED).unwrap().series().count();
        assert!(slots <= 9, "eight slots, and the others: {slots}");
    }
    assert_eq!(turns, 10_000);
    assert_eq!(house.get(&metric::HUB_RETIRED, &[]), Some(&Cell::Count(10_000 - 16)));
    let kept = serde_json::to_vec(&registry.stored()).unwrap();
    assert!(kept.len() < 100_000, "{}", kept.len());
}

#[test]
fn tenants_beyond_fifty_are_one() {
    let mut registry = Registry::new(8, metric::MAX_SERIES, &[], &Stored::default());
    for i in 0..200 {
        let mut meters = Meters::default();
        meters.add(&TURNS, &["success"], 1);
        join(&mut registry, &format!("run{i}"), &format!("tenant{i}"), &mut meters);
    }
    let (groups, _) = registry.expose(0.0);
    assert_eq!(groups.len(), 51);
    let (_, others) = groups.iter().find(|(labels, _)| labels.iter().any(|(_, value)| value == "other")).unwrap();
    assert_eq!(others.get(&TURNS, &["success"]), Some(&Cell::Count(150)));
}

#[test]
fn a_slot_is_the_lowest_that_is_free() {
    let mut registry = Registry::new(2, metric::MAX_SERIES, &[], &Stored::default());
    let start = |registry: &mut Registry, run: &str, ratio: f64| {
        let mut meters = Meters::default();
        meters.set(&CONTEXT_USED, &["0"], ratio);
        join(registry, run, "t", &mut meters);
    };
    let slots = |registry: &Registry| -> Vec<(String, f64)> {
        let (groups, _) = registry.expose(0.0);
        let meters = &groups.last().unwrap().1;
        let series = meters.family(&CONTEXT_USED).unwrap().series();
        series.map(|series| (series.values[0].clone(), series.cell.to_f64())).collect()
    };
    for (run, ratio) in [("a", 0.1), ("b", 0.2), ("c", 0.3), ("d", 0.4)] {
        start(&mut registry, run, ratio);
    }
    let named = |all: &[(&str, f64)]| all.iter().map(|(slot, ratio)| ((*slot).to_owned(), *ratio)).collect::<Vec<_>>();
    assert_eq!(slots(&registry), named(&[("0", 0.1), ("1", 0.2), ("other", 0.4)]), "the fullest of the others");
    registry.retire("a");
    start(&mut registry, "e", 0.5);
    assert_eq!(slots(&registry), named(&[("0", 0.5), ("1", 0.2), ("other", 0.4)]));
}

#[test]
fn what_all_wrappers_see_is_not_added_up() {
    let mut registry = Registry::new(8, metric::MAX_SERIES, &[], &Stored::default());
    for (run, seconds) in [("a", 5.0), ("b", 7.0), ("c", 6.0)] {
        let mut meters = Meters::default();
        meters.raise(&CONTAINER_CPU, &[], seconds);
        meters.add_time(&TIME, &["model"], Duration::from_secs(2));
        join(&mut registry, run, "t", &mut meters);
        registry.retire(run);
    }
    let (groups, _) = registry.expose(0.0);
    let meters = &groups.last().unwrap().1;
    assert_eq!(meters.get(&CONTAINER_CPU, &[]), Some(&Cell::Time(Duration::from_secs(7))));
    assert_eq!(meters.get(&TIME, &["model"]), Some(&Cell::Time(Duration::from_secs(6))));
    // A new container counts from zero; what agents did stays done.
    let (groups, _) = Registry::new(8, metric::MAX_SERIES, &[], &registry.stored()).expose(0.0);
    let meters = &groups.last().unwrap().1;
    assert_eq!(meters.get(&CONTAINER_CPU, &[]), None, "and who has not looked yet does not say zero");
    assert_eq!(meters.get(&TIME, &["model"]), Some(&Cell::Time(Duration::from_secs(6))));
}

#[test]
fn what_is_no_number_of_the_catalogue_is_refused_and_counted() {
    let mut registry = Registry::new(8, metric::MAX_SERIES, &[], &Stored::default());
    join(&mut registry, "a", "t", &mut Meters::default());
    for text in [
        r#"["claude_agent_nonsense_total",[],{"n":1}]"#,
        r#"["claude_agent_turns_total",["success","more"],{"n":1}]"#,
        r#"["claude_agent_turns_total",["success"],{"pusd":1}]"#,
        r#"["claude_agent_turn_cost_usd",[],{"h":[[1,2],0]}]"#,
        r#"["claude_agent_turn_cost_usd",[],{"h":[[1,2,3,4,5,6,7,8,9,10,11,12],9218868437227405312]}]"#,
    ] {
        let line = format!(r#"{{"unix":1,"series":[{text}],"live":true,"ready":true}}"#);
        registry.update("a", serde_json::from_str(&line).unwrap());
    }
    let (groups, house) = registry.expose(0.0);
    assert_eq!(house.get(&metric::HUB_REFUSED, &["shape"]), Some(&Cell::Count(5)));
    assert_eq!(groups.last().unwrap().1.get(&TURNS, &["success"]), Some(&Cell::Count(0)));
    let other =
        Hello { hub: VERSION + 1, run: String::from("b"), pid: 1, started: 0.0, world: String::new(), labels: Vec::new() };
    assert!(!registry.join(other));
    assert_eq!(registry.runs().count(), 1);
    // A total does not fall.
    for n in [5, 3] {
        let line =
            format!(r#"{{"unix":1,"series":[["claude_agent_turns_total",["success"],{{"n":{n}}}]],"live":true,"ready":true}}"#);
        registry.update("a", serde_json::from_str(&line).unwrap());
    }
    assert_eq!(registry.expose(0.0).0.last().unwrap().1.get(&TURNS, &["success"]), Some(&Cell::Count(5)));
}

#[test]
fn the_rules_are_stated_for_every_gauge_with_a_place() {
    for metric in metric::CATALOG.iter().filter(|metric| metric.labels.contains(&"slot")) {
        assert_eq!(metric.kind, Kind::Gauge, "{}: a counter of a slot would fall when the slot is reused", metric.name);
    }
}

#[test]
fn who_learns_late_for_whom_it_works_is_counted_there_alone() {
    let mut registry = Registry::new(SLOTS, metric::MAX_SERIES, &[], &Stored::default());
    let hello = |labels: &[(&str, &str)]| Hello {
        hub: VERSION,
        run: String::from("a"),
        pid: 1,
        started: 0.0,
        world: String::new(),
        labels: labels.iter().map(|(label, value)| ((*label).to_owned(), (*value).to_owned())).collect(),
    };
    let mut meters = Meters::default();
    let mut tell = |registry: &mut Registry, hello: Hello, turns: u64| {
        meters.add(&TURNS, &["success"], turns);
        let mut line = Line::default();
        changes(&mut meters, 0, &mut line);
        assert!(registry.join(hello));
        registry.update("a", line);
    };
    let turns = |registry: &Registry| -> Vec<(String, u64)> {
        let (groups, _) = registry.expose(1.0);
        let count = |meters: &Meters| match meters.get(&TURNS, &["success"]) {
            Some(Cell::Count(n)) => *n,
            _ => 0,
        };
        let name = |labels: &[(String, String)]| labels.first().map_or(String::new(), |(_, value)| value.clone());
        groups.iter().map(|(labels, meters)| (name(labels), count(meters))).collect()
    };
    tell(&mut registry, hello(&[]), 1);
    assert_eq!(turns(&registry), [(String::new(), 1)]);
    tell(&mut registry, hello(&[("tenant", "acme")]), 1);
    assert_eq!(turns(&registry), [(String::from("acme"), 2)], "and nowhere else any more");
    registry.retire("a");
    assert_eq!(turns(&registry), [(String::from("acme"), 2)]);
    let again = Registry::new(SLOTS, metric::MAX_SERIES, &[], &registry.stored());
    assert_eq!(turns(&again), [(String::from("acme"), 2)]);
}

#[test]
fn a_pid_that_two_wrappers_have_names_neither() {
    // In containers that share a hub, many begin as PID 1.
    let mut registry = Registry::new(SLOTS, metric::MAX_SERIES, &[], &Stored::default());
    for (run, pid) in [("a", 1), ("b", 1), ("c", 7)] {
        registry.join(Hello { hub: VERSION, run: run.to_owned(), pid, started: 0.0, world: String::new(), labels: Vec::new() });
    }
    registry.update("b", Line { sessions: vec![serde_json::json!({"session_id": "7"})], ..Line::default() });
    assert_eq!(registry.find("1"), None);
    assert_eq!(registry.find("7"), Some(("b", 1)), "a session's name goes before a pid");
    registry.retire("b");
    registry.forget("b");
    assert_eq!((registry.find("1"), registry.find("7")), (Some(("a", 1)), Some(("c", 7))));
}

#[test]
fn sums_beyond_all_numbers_end_there_and_no_hub() {
    let mut registry = Registry::new(SLOTS, metric::MAX_SERIES, &[], &Stored::default());
    let all = u64::MAX;
    let forged = serde_json::json!({
        "unix": 1.0, "live": true, "ready": true,
        "series": [["claude_agent_turns_total", ["success"], {"n": all}], ["claude_agent_cost_usd_total", ["m", "stream"], {"pusd": all}]],
        "totals": {
            "turns": all, "cost_usd": 1e300, "cost_estimated": false, "tokens": {"input": all}, "models": {},
            "tool_calls": {"Bash": {"ok": all, "error": all}},
            "subagents": all, "api_retries": all, "parse_errors": all, "unknown_events": all,
            "container": {"seconds": 1e18, "cost_usd": 1e300},
        },
    });
    for run in ["a", "b"] {
        registry.join(Hello {
            hub: VERSION,
            run: run.to_owned(),
            pid: 1,
            started: 0.0,
            world: String::new(),
            labels: Vec::new(),
        });
        registry.update(run, serde_json::from_value(forged.clone()).unwrap());
    }
    assert_eq!(registry.sessions(1.0).1.turns, all);
    registry.expose(1.0);
    registry.retire("a");
    registry.retire("b");
    let mut totals = registry.sessions(1.0).1;
    // As a hub of several users does with theirs.
    totals.add(&totals.clone());
    assert_eq!((totals.turns, totals.tool_calls["Bash"].ok), (all, all));
}

#[test]
fn what_is_kept_of_a_line_is_bounded_whoever_wrote_it() {
    let mut registry = Registry::new(SLOTS, metric::MAX_SERIES, &[], &Stored::default());
    let labels = [("tenant", "acme"), ("tenant", "other"), ("pid", "9"), ("x", "y")];
    let labels = labels.map(|(label, value)| (label.to_owned(), value.to_owned())).to_vec();
    let hello = Hello { hub: VERSION, run: String::from("a"), pid: 1, started: 0.0, world: String::new(), labels };
    registry.join(hello);
    let session = |more: usize| serde_json::json!({"session_id": "s", "more": vec![0; more]});
    let models: BTreeMap<String, serde_json::Value> =
        (0..1_000).map(|n| (n.to_string(), serde_json::json!({"cost_usd": 1, "tokens": {}}))).collect();
    let mut line = serde_json::to_value(Line::default()).unwrap();
    line["totals"]["models"] = serde_json::json!(models);
    line["sessions"] = serde_json::json!([session(10)]);
    registry.update("a", serde_json::from_value(line.clone()).unwrap());
    let (sessions, sums) = registry.sessions(1.0);
    let said = |name: &str| sessions[0][name].clone();
    assert_eq!([said("tenant"), said("pid"), said("x")], ["acme".into(), 1.into(), serde_json::Value::Null]);
    assert!(sums.models.len() < 300, "{}", sums.models.len());
    let cost: f64 = sums.models.values().map(|spend| spend.cost_usd.to_f64()).sum();
    assert!((cost - 1_000.0).abs() < 1e-6, "{cost}");
    line["sessions"] = serde_json::json!([session(100_000)]);
    registry.update("a", serde_json::from_value(line).unwrap());
    assert!(registry.sessions(1.0).0.is_empty());
    assert_eq!(registry.expose(1.0).1.get(&metric::HUB_REFUSED, &["room"]), Some(&Cell::Count(1)));
}

use super::*;
use crate::sample::{ContainerSample, Sample};

#[test]
fn names_follow_the_rules_of_the_trade() {
    let mut names = BTreeSet::new();
    for (i, metric) in CATALOG.iter().enumerate() {
        let name = metric.name;
        assert_eq!(metric.index, i, "{name} knows its place");
        assert!(names.insert(name), "{name} is there once");
        assert!(name.starts_with("claude_agent_") || name.starts_with("agent_sidecar_"), "{name}");
        assert_eq!(name.ends_with("_total"), metric.kind == Kind::Counter, "{name}");
        assert_eq!(name.ends_with("_info"), metric.kind == Kind::Info, "{name}");
        assert_eq!(!metric.buckets.is_empty(), metric.kind == Kind::Histogram, "{name}");
        assert!(metric.buckets.windows(2).all(|pair| pair[0] < pair[1]), "{name}");
        assert!(metric.help.ends_with('.'), "{name}: {}", metric.help);
        assert!(metric.unit == Unit::None || name.contains(metric.unit.as_str()), "{name}");
        assert!(metric.zero.iter().all(|values| values.len() == metric.labels.len()), "{name}");
        for label in metric.labels {
            assert!(!["session", "session_id", "user", "pid", "path", "cwd", "le"].contains(label), "{name}: {label}");
        }
    }
}

#[test]
fn what_does_not_fit_is_counted_and_the_bound_holds() {
    let mut meters = Meters::new(300);
    let start = meters.series_count();
    assert!(start < 300, "{start} series at the start");
    for i in 0..1_000 {
        meters.add(&ENFORCEMENTS, &[&format!("limit{i}"), "turn", "warn", "shadow"], 1);
    }
    assert_eq!(meters.series_count(), 301, "the bound, and the counter of the refusals");
    assert_eq!(meters.get(&SERIES_LIMIT_HITS, &[ENFORCEMENTS.name]), Some(&Cell::Count(1_000 - (300 - start) as u64)),);
}

#[test]
fn money_finds_room_whatever_was_there_before() {
    let mut meters = Meters::new(0);
    meters.add(&TOOL_CALLS, &["Bash", "ok"], 1);
    let usd = Usd::from_f64(0.07);
    meters.add_usd(&COST, &["claude-opus-5-5", "main"], usd);
    meters.add(&TOKENS, &["claude-opus-5-5", "input", "main"], 3);
    assert_eq!(meters.get(&TOOL_CALLS, &["Bash", "ok"]), None);
    assert_eq!(meters.get(&COST, &["claude-opus-5-5", "main"]), Some(&Cell::Usd(usd)));
    assert_eq!(meters.get(&TOKENS, &["claude-opus-5-5", "input", "main"]), Some(&Cell::Count(3)));
    assert_eq!(meters.get(&SERIES_LIMIT_HITS, &[TOOL_CALLS.name]), Some(&Cell::Count(1)));
}

#[test]
fn a_label_that_others_choose_is_bounded() {
    let mut meters = Meters::default();
    for i in 0..100 {
        meters.add(&PERMISSION_DENIALS, &[&format!("tool{i}")], 1);
    }
    assert_eq!(meters.get(&PERMISSION_DENIALS, &["tool22"]), Some(&Cell::Count(1)));
    assert_eq!(meters.get(&PERMISSION_DENIALS, &["tool23"]), None);
    assert_eq!(meters.get(&PERMISSION_DENIALS, &[OTHER]), Some(&Cell::Count(77)));
}

#[test]
fn histograms_put_a_bound_into_its_own_bucket() {
    let mut meters = Meters::default();
    for value in [0.001, 0.002, 1_000.0] {
        meters.observe(&TURN_COST, &[], value);
    }
    let Some(Cell::Histogram(h)) = meters.get(&TURN_COST, &[]) else { panic!("no histogram") };
    assert_eq!((h.counts[0], h.counts[1], h.counts[COST_USD.len()], h.count), (1, 1, 1, 3));
}

#[test]
fn what_the_kernel_has_counted_before_us_does_not_begin_at_zero() {
    let mut meters = Meters::default();
    let kernels: Vec<&'static Metric> = CATALOG.iter().copied().filter(|metric| metric.begins_anywhere()).collect();
    assert_eq!(kernels.len(), 5);
    for metric in &kernels {
        assert_eq!(
            meters.family(metric).unwrap().series().count(),
            0,
            "{}: a zero, and the first reading, are a leap",
            metric.name
        );
    }
    let container = ContainerSample { oom_kills: Some(4), cpu: Some(Duration::from_secs(9_000)), ..ContainerSample::default() };
    Sample { container, ..Sample::default() }.measure(&mut meters);
    assert_eq!(meters.get(&CONTAINER_OOM_KILLS, &[]), Some(&Cell::Count(4)));
    assert_eq!(meters.get(&CONTAINER_CPU, &[]), Some(&Cell::Time(Duration::from_secs(9_000))));
}

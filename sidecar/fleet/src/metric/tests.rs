use super::*;

#[test]
fn names_are_as_prometheus_wants_them() {
    let mut seen = BTreeSet::new();
    for Metric { name, kind, unit, labels, buckets, .. } in CATALOG {
        assert!(seen.insert(name), "{name} is there twice");
        assert!(name.starts_with("agent_fleet_") && name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{name}");
        assert_eq!(*kind == Kind::Counter, name.ends_with("_total"), "{name}");
        assert_eq!(*kind == Kind::Histogram, !buckets.is_empty(), "{name}");
        let plain = name.trim_end_matches("_total");
        assert!(*unit == Unit::None || plain.ends_with(unit.as_str()), "{name} does not say that it is in {}", unit.as_str());
        assert!(!labels.contains(&"le") && !labels.contains(&"session") && !labels.contains(&"owner"), "{name}");
        assert!(buckets.is_sorted(), "{name}");
    }
}

#[test]
fn the_page_is_the_catalogue() {
    assert_eq!(page(), include_str!("../../../../docs/fleet-metrics.md"), "run `make docs`");
}

#[test]
fn a_histogram_has_each_in_its_bucket_and_all_after_it() {
    let metrics = Metrics::new(["local"], [], []);
    for seconds in [0.25, 3.0, 3.0, 10_000.0] {
        metrics.observe(&READY, &["local"], Duration::from_secs_f64(seconds));
    }
    let text = metrics.exposition([]);
    for line in [
        "agent_fleet_ready_seconds_bucket{provider=\"local\",le=\"0.25\"} 1",
        "agent_fleet_ready_seconds_bucket{provider=\"local\",le=\"2.5\"} 1",
        "agent_fleet_ready_seconds_bucket{provider=\"local\",le=\"5\"} 3",
        "agent_fleet_ready_seconds_bucket{provider=\"local\",le=\"600\"} 3",
        "agent_fleet_ready_seconds_bucket{provider=\"local\",le=\"+Inf\"} 4",
        "agent_fleet_ready_seconds_sum{provider=\"local\"} 10006.25",
        "agent_fleet_ready_seconds_count{provider=\"local\"} 4",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[test]
fn a_name_of_the_configuration_is_quoted_and_no_other_is_told() {
    let metrics = Metrics::new([], ["a\"b\\c"], []);
    let labels = ["budget", metrics.tenant("a\"b\\c")];
    metrics.add(&REFUSALS, &labels, 1.0);
    metrics.add(&REFUSALS, &["budget", metrics.tenant("whoever asks")], 1.0);
    let text = metrics.exposition([]);
    assert!(text.contains(r#"agent_fleet_refusals_total{reason="budget",tenant="a\"b\\c"} 1"#), "{text}");
    assert!(text.contains(r#"agent_fleet_refusals_total{reason="budget",tenant="other"} 1"#), "{text}");
}

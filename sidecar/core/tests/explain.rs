//! What `explain` tells of the recordings: its parts add up to what the report says, which the recordings' own test holds against what
//! the API served.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::time::Duration;

use agent_sidecar_core::explain::{Explainer, Session};
use agent_sidecar_core::record::{Fact, Record};
use agent_sidecar_core::report::Report;
use agent_sidecar_core::tokens::{Tokens, Usd};
use agent_sidecar_core::update::{Activity, Basis, Source};
use agent_sidecar_core::{Exit, Input, Monitor, Now, Output, Settings};

/// A line in each tenth of a second, and what was written of it.
fn recorded(bytes: &[u8]) -> (Report, Vec<Record>) {
    let mut now = Now { mono: Duration::ZERO, unix: Duration::from_secs(1_795_392_000) };
    let mut monitor = Monitor::new(Settings::default(), true, now);
    let mut records = Vec::new();
    let mut drain = |monitor: &mut Monitor| {
        while let Some(output) = monitor.poll_output() {
            if let Output::Record(record) = output {
                records.push(record);
            }
        }
    };
    monitor.handle(now, Input::Spawned { pid: 1 });
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        now.mono += Duration::from_millis(100);
        now.unix += Duration::from_millis(100);
        monitor.handle(now, Input::Stdout(line));
        drain(&mut monitor);
    }
    monitor.handle(now, Input::StdoutEnd);
    monitor.handle(now, Input::Exited(Exit::Code(0)));
    drain(&mut monitor);
    (monitor.report().clone(), records)
}

fn explained(records: &[Record]) -> Vec<Session> {
    let mut explainer = Explainer::default();
    for record in records {
        // As they are on the disk.
        let line = serde_json::to_string(record).unwrap();
        explainer.on(&serde_json::from_str(&line).unwrap());
    }
    explainer.sessions().to_vec()
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-9
}

#[test]
fn the_parts_add_up_to_the_ledger() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut seen = 0;
    for entry in std::fs::read_dir(data).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        // What went over the wire in both directions is another form.
        if !name.ends_with(".jsonl") || name.contains("wire") {
            continue;
        }
        let (report, records) = recorded(&std::fs::read(&path).unwrap());
        let sessions = explained(&records);
        assert_eq!(records.iter().map(|r| r.seq).collect::<Vec<_>>(), (0..records.len() as u64).collect::<Vec<_>>(), "{name}");
        for told in report.sessions() {
            let session = sessions.iter().find(|s| Some(&s.session_id) == told.session_id.as_ref()).unwrap();
            let sums = &told.sums;
            let usd = sums.cost_usd.to_f64();
            assert!(close(session.spend.cost_usd(), usd), "{name}: {} {usd}", session.spend.cost_usd());
            assert_eq!(session.spend.tokens(), sums.tokens, "{name}");
            let turns: f64 = session.turns.iter().map(|turn| turn.spend.cost_usd()).sum();
            assert!(close(turns + session.between_turns.cost_usd(), usd), "{name}: the turns");
            let models: f64 = session.models.values().map(|model| model.spend.cost_usd()).sum();
            assert!(close(models, usd), "{name}: the models");
            let sources: f64 = session.sources.values().map(|spend| spend.cost_usd()).sum();
            assert!(close(sources, usd), "{name}: the sources");
            assert_eq!(session.turns.len() as u64, sums.turns, "{name}: {:?}", session.turns);
            assert!(session.turns.iter().all(|turn| turn.outcome.is_some()), "{name}");
            for (tool, calls) in &sums.tool_calls {
                let part = &session.tools[tool];
                assert_eq!((part.ok, part.error), (calls.ok, calls.error), "{name}: {tool}");
            }
            assert_eq!(session.subagents.len() as u64, sums.subagents, "{name}");
            assert_eq!(session.retries.values().sum::<u64>(), sums.api_retries, "{name}");
            seen += 1;
        }
        // The ledger alone says what the stream said.
        let mut again = Report::default();
        records.iter().filter_map(|record| record.fact.to_update()).for_each(|update| again.on(&update));
        for (ours, theirs) in again.sessions().iter().zip(report.sessions()) {
            assert_eq!((&ours.sums.models, &ours.sums.tool_calls), (&theirs.sums.models, &theirs.sums.tool_calls), "{name}");
            assert_eq!((ours.sums.subagents, ours.sums.api_retries), (theirs.sums.subagents, theirs.sums.api_retries), "{name}");
        }
        // All of the time is told, and once.
        let time: f64 = sessions.iter().flat_map(|session| session.time.values()).sum();
        let lines = std::fs::read(&path).unwrap().split_inclusive(|byte| *byte == b'\n').count();
        #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
        let lasted = lines as f64 / 10.0;
        assert!((time - lasted).abs() < 0.2, "{name}: {time} of {lasted} seconds");
    }
    assert!(seen >= 50, "{seen} sessions");
}

#[test]
fn a_turn_has_what_was_done_for_it() {
    let (report, records) = recorded(include_bytes!("data/01_basic_text.jsonl"));
    let sessions = explained(&records);
    let [turn] = sessions[0].turns.as_slice() else { panic!("{:?}", sessions[0].turns) };
    assert!(close(turn.spend.cost_usd(), report.totals().cost_usd.to_f64()) && sessions[0].between_turns == Default::default());
    assert_eq!((turn.requests, turn.tool_calls, sessions.len()), (3, 2, 1));
}

#[test]
fn a_subagent_has_its_own_calls() {
    let background = include_bytes!("data/05a_subagent.jsonl");
    let foreground = include_bytes!("data/07t_sub_fg.jsonl");
    for (bytes, expected) in [(background.as_slice(), (1, 2, true)), (foreground, (3, 3, false))] {
        let sessions = explained(&recorded(bytes).1);
        let [one] = sessions[0].subagents.as_slice() else { panic!("{:?}", sessions[0].subagents) };
        assert_eq!((one.tool_calls, one.requests, one.background), expected);
        assert!(one.outcome.is_some() && sessions[0].sources[&Source::Subagent].cost_usd() > 0.0);
        assert!(sessions[0].time[&Activity::Tool] > 0.0);
    }
}

fn line(time: f64, fact: Fact) -> Record {
    Record { time, run: "r".into(), seq: 0, who: agent_sidecar_core::who::Who::default(), fact }
}

fn request(tokens: Tokens, model: &str) -> Fact {
    Fact::RequestCompleted {
        session_id: "s".into(),
        model: model.into(),
        source: Source::Main,
        parent: None,
        stop_reason: None,
        duration_seconds: Some(1.0),
        tokens,
        settled: true,
    }
}

#[test]
fn a_prompt_that_was_not_read_from_the_cache_has_a_cause() {
    let written = Tokens { input: 10, cache_write_5m: 9_990, ..Tokens::default() };
    let read = Tokens { input: 10, cache_read: 9_990, cache_write_5m: 500, ..Tokens::default() };
    let compacted = Fact::Compacted { session_id: "s".into(), trigger: "auto".into(), pre_tokens: 10_500, post_tokens: 900 };
    let records = [
        line(1.0, Fact::TurnStarted { session_id: "s".into(), turn: 1 }),
        line(10.0, request(written, "a")),
        line(20.0, request(read, "a")),
        line(30.0, request(written, "a")),
        line(400.0, request(written, "a")),
        line(4_100.0, request(written, "a")),
        line(4_110.0, request(written, "b")),
        line(4_111.0, compacted),
        line(4_120.0, request(written, "b")),
    ];
    let sessions = explained(&records);
    let causes: Vec<_> = sessions[0].cache_misses.iter().map(|miss| (miss.cause, miss.tokens)).collect();
    assert_eq!(
        causes,
        [
            ("the prompt changed, or was not cached", 10_500),
            ("expired after five minutes", 10_000),
            ("expired after an hour", 10_000),
            ("another model", 10_000),
            ("compaction", 10_000),
        ]
    );
    assert_eq!(sessions[0].turns[0].cache_misses, 5);
    let ratio = sessions[0].cache_hit_ratio.unwrap();
    assert!((ratio - 9_990.0 / 70_500.0).abs() < 1e-9, "{ratio}");
}

#[test]
fn what_is_taken_back_later_may_be_more_than_a_turn_had() {
    let spent = |usd: f64, basis| Fact::Spent {
        list_usd: None,
        session_id: "s".into(),
        model: "m".into(),
        source: Source::Main,
        basis,
        tokens: Tokens::default(),
        cost_usd: Usd::from_f64(usd),
        web_searches: 0,
        unpriced: false,
    };
    let taken = Fact::Corrected {
        list_usd: None,
        session_id: "s".into(),
        model: "m".into(),
        direction: agent_sidecar_core::update::Direction::Over,
        cost_usd: Usd::from_f64(0.5),
        tokens: Tokens::default(),
    };
    let ended = |turn| Fact::TurnEnded {
        session_id: "s".into(),
        turn,
        outcome: agent_sidecar_core::update::Outcome::Success,
        cost_usd: Usd::ZERO,
        duration_seconds: 1.0,
        confirmed: true,
    };
    let start = |turn| Fact::TurnStarted { session_id: "s".into(), turn };
    let facts = [start(1), spent(1.0, Basis::Estimate), ended(1), start(2), spent(0.1, Basis::Confirmed), taken, ended(2)];
    let sessions = explained(&facts.map(|fact| line(1.0, fact)));
    let costs: Vec<f64> = sessions[0].turns.iter().map(|turn| turn.spend.cost_usd()).collect();
    assert!(close(costs[0], 1.0) && close(costs[1], -0.4) && close(sessions[0].spend.cost_usd(), 0.6), "{costs:?}");
}

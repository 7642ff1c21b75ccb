//! The detectors held against runs with a label: who is sick is told, who is healthy is left alone.

mod corpus;
mod healthy;
mod stage;
mod table;

use agent_sidecar_core::update::Step;
use corpus::Label;

#[test]
fn nobody_who_is_healthy_is_stopped_or_warned_of() {
    let (runs, recordings) = (table::runs(), table::recordings());
    assert!(recordings.len() > 40, "{} recordings", recordings.len());
    let healthy: Vec<_> = runs.iter().chain(&recordings).filter(|row| row.label == Label::Healthy).collect();
    assert!(healthy.len() > 70, "{} healthy runs", healthy.len());
    let told: Vec<_> = healthy.iter().filter(|row| row.warned.is_some() || row.stopped.is_some()).collect();
    for row in &told {
        println!("{}: warned {:?}, stopped {:?}", row.name, row.warned, row.stopped);
    }
    assert!(told.is_empty());
}

#[test]
fn who_is_sick_is_warned_of_and_then_stopped_as_what_it_is() {
    let mut wrong = Vec::new();
    for row in table::runs() {
        let kinds = (row.warned.map(|told| told.kind), row.stopped.map(|told| told.kind));
        let expected = match row.label {
            Label::Sick(kind) => (Some(kind), Some(kind)),
            // To be moved to the others by whoever makes them seen.
            Label::Healthy | Label::Unseen(_) => (None, None),
        };
        let order = row.warned.zip(row.stopped).is_none_or(|(warned, stopped)| warned.answers < stopped.answers);
        if kinds != expected || !order {
            wrong.push(format!("{}: {:?}, {:?}", row.name, row.warned, row.stopped));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_page_says_what_was_measured() {
    let page = include_str!("../../../../docs/detectors.md");
    assert!(page == table::renewed(page), "docs/detectors.md is not what was measured: run `make docs`");
}

#[test]
fn a_circle_that_comes_in_one_read_is_told_too() {
    let line = |n: u32| {
        format!(
            r#"{{"type":"assistant","session_id":"s","message":{{"id":"m{n}","model":"claude-opus-5-5","content":[{{"type":"tool_use","id":"t{n}","name":"Read","input":{{}}}}]}}}}
{{"type":"user","session_id":"s","message":{{"content":[{{"type":"tool_result","tool_use_id":"t{n}","content":"x"}}]}}}}
"#
        )
    };
    let mut all: String = (0..12).map(line).collect();
    all += "{\"type\":\"result\",\"session_id\":\"s\",\"subtype\":\"success\"}\n";
    let mut stage = stage::Stage::default();
    stage.put(agent_sidecar_core::Input::Stdout(all.as_bytes()));
    assert_eq!(stage.told.iter().map(|told| told.step).collect::<Vec<_>>(), [Step::Warn, Step::Interrupt]);
}

#[test]
fn a_circle_is_told_once_in_a_turn_and_again_in_the_next() {
    let mut stage = stage::Stage::default();
    for _ in 0..2 {
        stage.ask();
        for _ in 0..30 {
            stage.call(stage::read("a", "b"));
        }
        stage.end();
    }
    let steps: Vec<Step> = stage
        .told
        .iter()
        .filter(|told| told.kind == agent_sidecar_core::limit::Limit::IdenticalCalls)
        .map(|told| told.step)
        .collect();
    assert_eq!(steps, [Step::Warn, Step::Interrupt, Step::Warn, Step::Interrupt]);
    let meters = stage.monitor.meters();
    use agent_sidecar_core::metric::{Cell, LOOP_DETECTIONS, REPEAT_STREAK};
    assert_eq!(meters.get(&LOOP_DETECTIONS, &["identical_call", "warn"]), Some(&Cell::Count(2)));
    assert_eq!(meters.get(&LOOP_DETECTIONS, &["identical_call", "interrupt"]), Some(&Cell::Count(2)));
    assert_eq!(meters.get(&REPEAT_STREAK, &["0"]).unwrap().to_f64(), 0.0);
}

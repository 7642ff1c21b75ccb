//! Random runs: whatever an agent says, nothing breaks; and whoever does new things is left alone.

use proptest::prelude::*;
use serde_json::json;

use crate::stage::{Stage, bash, edit, fails, read};

/// A step of a healthy agent: most bring news; what repeats does so a few times, or waits.
fn healthy(stage: &mut Stage, step: u8, n: usize) {
    match step % 12 {
        0 | 1 => stage.call(read(&format!("{n}.rs"), "fn f() {}")),
        2 | 3 => stage.call(edit("a.rs", &n.to_string(), "new")),
        4 => stage.call(bash("make test", &format!("{n} passed"))),
        5 => {
            stage.call(fails("make test", "Exit code 2"));
            stage.call(edit("a.rs", &n.to_string(), "newer"));
        }
        6 => {
            for _ in 0..30 {
                stage.call(("BashOutput", json!({"bash_id": "b"}), "running", false));
            }
        }
        7 => {
            for _ in 0..30 {
                stage.call(bash("sleep 1; cat log", "nothing yet"));
            }
        }
        8 => {
            let agent = stage.subagent();
            stage.call(read(&format!("{n}.rs"), "fn f() {}"));
            stage.home(&agent);
        }
        9 => stage.round(&[read(&format!("x{n}"), "x"), bash(&format!("wc x{n}"), "1"), fails("false", "Exit code 1")]),
        10 => stage.call(bash("git status", "clean")),
        _ => {
            stage.end();
            stage.ask();
        }
    }
}

/// What a healthy agent does between any two steps, or its looks at an unchanged tree could come in a row.
fn news(stage: &mut Stage, n: usize) {
    stage.call(bash(&format!("step {n}"), &format!("done {n}")));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn an_agent_that_gets_on_is_left_alone(steps in proptest::collection::vec(any::<u8>(), 1..60)) {
        let mut stage = Stage::default();
        stage.ask();
        for (n, step) in steps.iter().enumerate() {
            healthy(&mut stage, *step, n);
            news(&mut stage, n);
        }
        stage.end();
        prop_assert_eq!(&stage.told, &[]);
    }

    #[test]
    fn whatever_is_said_nothing_breaks(steps in proptest::collection::vec((0u8..9, 0u8..4, any::<bool>()), 1..200)) {
        let mut stage = Stage::default();
        let mut agents = Vec::new();
        for (what, which, failed) in steps {
            let text = which.to_string();
            match what {
                0 => stage.ask(),
                1 => stage.end(),
                2 => stage.compacted(if failed { "auto" } else { "manual" }),
                3 => stage.talk(),
                4 => agents.push(stage.subagent()),
                5 => if let Some(agent) = agents.pop() { stage.home(&agent) },
                6 => stage.thread = agents.get(usize::from(which)).cloned(),
                7 => stage.round(&[("Bash", json!({"command": text}), "a", failed), ("mcp__a__b", json!([[{}], null, 1.5]), &text, false)]),
                _ => stage.call(("Read", json!({"file_path": text}), "same", failed)),
            }
        }
        stage.exit();
    }
}

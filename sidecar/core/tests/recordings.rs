//! Recorded sessions of the real CLI, and what each must yield. The `.meta.json` beside a recording holds what the API served: the
//! truth that tokens are compared with, wherever the CLI told it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::PathBuf;
use std::time::Duration;

use agent_sidecar_core::metric::{self, Cell};
use agent_sidecar_core::report::Report;
use agent_sidecar_core::tokens::{Tokens, Usd};
use agent_sidecar_core::{Exit, Input, Monitor, Now, Settings};
use proptest::prelude::*;

/// How far the numbers can be held against what was served.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Truth {
    /// To the last token.
    Served,
    /// The CLI itself had to guess the output of a cut answer; its own word is all there is.
    CliGuess,
    /// To the last token, by our own prices: the CLI's totals hold what the session cost before.
    Priced,
    /// No result came: our own estimate, of which the input is exact.
    Estimate,
    /// Most of the stream was never delivered.
    Cut,
}
use Truth::*;

/// Name, cost in dollars, turns, last outcome of each session, tools (ok/error), subagents, retries, parse errors.
type Row = (&'static str, Truth, &'static str, u64, &'static str, &'static str, u64, u64, u64);

#[rustfmt::skip]
const RECORDINGS: &[Row] = &[
    ("01_basic_text", Served, "0.025344", 1, "success", "Bash 2/0", 0, 0, 0),
    ("01b_basic_old", Served, "0.03918", 1, "success", "Bash 2/0", 0, 0, 0),
    ("01c_json", Served, "0.025344", 1, "success", "", 0, 0, 0),
    ("02_control_ro", Served, "0.034792", 2, "success", "Bash 2/0", 0, 0, 0),
    ("02c_noinit", Served, "0.014896", 2, "success", "", 0, 0, 0),
    ("03_midturn_usage", Served, "0.022344", 1, "success", "Bash 2/0", 0, 0, 0),
    ("03b_burst", Served, "0.014896", 2, "success", "", 0, 0, 0),
    ("03d_compact_clear", Served, "0.0097546", 8, "success success", "", 0, 0, 0),
    ("04a_first", Served, "0.001292", 2, "success", "", 0, 0, 0),
    ("04b_resume", Served, "0.000646", 1, "success", "", 0, 0, 0),
    ("04c_fork", Served, "0.000646", 1, "success", "", 0, 0, 0),
    ("04g_resume_unknown", Served, "0", 1, "error_during_execution", "", 0, 0, 0),
    ("04j_kill9", Estimate, "0.001192", 2, "no_result", "Bash 0/1", 0, 0, 0),
    ("04k_resume_killed", Served, "0.000646", 1, "success", "", 0, 0, 0),
    ("05a_subagent", Served, "0.1939292", 2, "success", "Agent 1/0 Bash 1/0", 1, 0, 0),
    ("05c_subagent_bg", Served, "0.1939292", 2, "success", "Agent 1/0 Bash 1/0", 1, 0, 0),
    ("06b_fallback529", Served, "0.01", 1, "success", "", 0, 2, 0),
    ("06b_websearch", Served, "0.09", 1, "success", "WebSearch 1/0", 0, 0, 0),
    ("07a_maxturns3", Served, "0.025344", 1, "error_max_turns", "Bash 3/0", 0, 0, 0),
    ("07g_budget", Served, "0.025344", 1, "error_max_budget", "Bash 2/1", 0, 0, 0),
    ("07o_stream_maxturns2", Served, "0.044688", 3, "success", "Bash 5/0", 0, 0, 0),
    ("07q_parallel_tools", Served, "0.014896", 1, "success", "Bash 4/0", 0, 0, 0),
    ("07t_sub_fg", Served, "0.12", 1, "success", "Agent 1/0 Bash 3/0", 1, 0, 0),
    ("07w_sub_bg_budget", Served, "0.08", 1, "success", "Agent 1/0 Bash 1/1", 1, 0, 0),
    ("08_http401", Served, "0", 1, "no_result", "", 0, 7, 0),
    ("08_http500_x3_then_ok", Served, "0.007448", 1, "success", "", 0, 3, 0),
    ("08_http529_r2", Served, "0", 1, "success_is_error", "", 0, 2, 0),
    ("08m_cut_after_tool", CliGuess, "0.013016", 1, "success", "Bash 1/0", 0, 0, 0),
    ("08m_cut_mid_text", CliGuess, "0.012696", 1, "success", "", 0, 1, 0),
    ("08m_refusal", Served, "0.014896", 1, "success_is_error", "", 0, 0, 0),
    ("09_hang_TERM", Served, "0", 1, "no_result", "", 0, 0, 0),
    ("09_idle_end_session", Served, "0.007448", 1, "success", "", 0, 0, 0),
    ("09_stream_INT", CliGuess, "0.005688", 1, "interrupted", "", 0, 0, 0),
    ("09_stream_TERM", Estimate, "0.005608", 1, "no_result", "", 0, 0, 0),
    ("09_stream_end_session", CliGuess, "0.005588", 1, "interrupted", "", 0, 0, 0),
    ("09_stream_interrupt", CliGuess, "0.005608", 1, "interrupted", "", 0, 0, 0),
    ("09_tool_interrupt", Served, "0.014896", 1, "success", "Bash 0/1", 0, 0, 0),
    ("12f_stall6", Cut, "0.018708", 1, "no_result", "", 0, 0, 1),
    ("14a_thinking", Served, "0.007448", 1, "success", "", 0, 0, 0),
    ("14b_hooks", Served, "0.015896", 1, "success", "Bash 1/0", 0, 0, 0),
    ("14d_denied", Served, "0.014896", 1, "success", "Bash 0/1", 0, 0, 0),
    ("14f2_ratelimit_oauth", Served, "0.003724", 1, "success", "", 0, 0, 0),
    ("14i_state", Served, "0.015896", 1, "success", "Bash 1/0", 0, 0, 0),
    ("15a_tool_progress", Served, "0.014896", 1, "success", "Bash 1/0", 0, 0, 0),
    ("16_json_verbose", Served, "0.007448", 1, "success", "", 0, 0, 0),
    ("18b_mirror", Served, "0.044688", 1, "success", "Agent 1/0 Bash 2/0 Write 0/1", 1, 0, 0),
    ("20h_interrupt_cancelq", Served, "0", 1, "interrupted", "", 0, 0, 0),
    ("22b_suggest_cost", Served, "0.001938", 2, "success", "", 0, 0, 0),
    ("24c_sub_retry", Served, "0.022344", 1, "success", "Agent 1/0", 1, 3, 0),
    ("24f_perm_interrupt", CliGuess, "0.007448", 1, "interrupted", "Bash 0/1", 0, 0, 0),
    ("30_json_resume", Priced, "0.00178", 1, "success", "", 0, 0, 0),
    ("30_json_verbose_resume", Priced, "0.00534", 1, "success", "Bash 2/0", 0, 0, 0),
    ("30_old_first", Served, "0.002475", 1, "success", "", 0, 0, 0),
    ("30_old_resume", Served, "0.007425", 1, "success", "Bash 2/0", 0, 0, 0),
];

fn path(file: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "data", file].iter().collect()
}

/// The day of the recordings.
const DAY: Duration = Duration::from_secs(1_795_392_000);

fn replay(processes: &[&[u8]], chunk: usize) -> Monitor {
    let now = Now { mono: Duration::ZERO, unix: DAY };
    let mut monitor = Monitor::new(Settings::default(), true, now);
    for bytes in processes {
        monitor.handle(now, Input::Spawned { pid: 1 });
        for part in bytes.chunks(chunk) {
            monitor.handle(now, Input::Stdout(part));
        }
        monitor.handle(now, Input::StdoutEnd);
    }
    monitor.handle(now, Input::Exited(Exit::Code(0)));
    monitor
}

/// What the API served in whole: answers that it cut are for the CLI to guess.
fn served(name: &str) -> Tokens {
    let text = std::fs::read_to_string(path(&format!("{name}.meta.json"))).unwrap();
    let meta: serde_json::Value = serde_json::from_str(&text).unwrap();
    let count = |value: &serde_json::Value| value.as_u64().unwrap_or_default();
    meta["mock_requests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|request| &request["action"]["usage"])
        .map(|usage| Tokens {
            input: count(&usage["input_tokens"]),
            output: count(&usage["output_tokens"]),
            cache_read: count(&usage["cache_read_input_tokens"]),
            cache_write_5m: count(&usage["cache_creation"]["ephemeral_5m_input_tokens"]),
            cache_write_1h: count(&usage["cache_creation"]["ephemeral_1h_input_tokens"]),
        })
        .sum()
}

fn tools(report: &Report) -> String {
    let calls = report.totals().tool_calls;
    calls.iter().map(|(tool, calls)| format!("{tool} {}/{}", calls.ok, calls.error)).collect::<Vec<_>>().join(" ")
}

#[test]
fn each_recording_yields_what_was_served() {
    for &(name, truth, cost, turns, outcomes, calls, subagents, retries, errors) in RECORDINGS {
        let bytes = std::fs::read(path(&format!("{name}.jsonl"))).unwrap();
        let monitor = replay(&[&bytes], 65_536);
        let report = monitor.report();
        let totals = report.totals();
        let ended: Vec<&str> =
            report.sessions().iter().map(|session| session.outcome.map_or("none", |outcome| outcome.as_str())).collect();
        assert_eq!(ended.join(" "), outcomes, "{name}");
        assert_eq!(totals.cost_usd.to_string(), cost, "{name}");
        assert_eq!((totals.turns, tools(report).as_str()), (turns, calls), "{name}");
        assert_eq!((totals.subagents, totals.api_retries), (subagents, retries), "{name}");
        assert_eq!((totals.parse_errors, totals.unknown_events), (errors, 0), "{name}");
        assert_eq!(totals.cost_estimated, matches!(truth, Priced | Estimate | Cut), "{name}");
        let served = served(name);
        match truth {
            Served | Priced => assert_eq!(totals.tokens, served, "{name}"),
            CliGuess | Estimate => {
                let inputs = |tokens: Tokens| Tokens { output: 0, ..tokens };
                assert_eq!(inputs(totals.tokens), inputs(served), "{name}");
                eprintln!("{name}: {} of {} output tokens", totals.tokens.output, served.output);
            }
            Cut => assert!(served.covers(&totals.tokens), "{name}"),
        }
    }
}

#[test]
fn no_recording_is_left_out() {
    let mut found: Vec<String> = std::fs::read_dir(path("."))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter_map(|name| name.strip_suffix(".jsonl").map(str::to_owned))
        .filter(|name| !name.ends_with(".wire"))
        .collect();
    found.sort();
    let mut listed: Vec<String> = RECORDINGS.iter().map(|row| row.0.to_owned()).collect();
    listed.sort();
    assert_eq!(found, listed);
}

#[test]
fn how_the_bytes_come_changes_nothing() {
    for name in ["03d_compact_clear", "05c_subagent_bg", "12f_stall6", "16_json_verbose", "18b_mirror"] {
        let bytes = std::fs::read(path(&format!("{name}.jsonl"))).unwrap();
        let whole = replay(&[&bytes], usize::MAX).report().clone();
        for chunk in [1, 7, 4_096] {
            assert_eq!(*replay(&[&bytes], chunk).report(), whole, "{name} in pieces of {chunk}");
        }
    }
}

/// A recording, line by line.
fn lines(name: &str) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(path(&format!("{name}.jsonl"))).unwrap();
    bytes.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()
}

#[test]
fn a_line_that_comes_twice_counts_once() {
    // Without a result what was written is guessed by its length, and a list is one line, which holds a process.
    let confirmed = |truth| matches!(truth, Served | CliGuess);
    for &(name, ..) in RECORDINGS.iter().filter(|row| confirmed(row.1) && row.0 != "16_json_verbose") {
        let lines = lines(name);
        let twice: Vec<&[u8]> = lines.iter().flat_map(|line| [line.as_slice(), line]).collect();
        assert_eq!(*replay(&[&twice.concat()], 65_536).report(), *replay(&[&lines.concat()], 65_536).report(), "{name}");
    }
}

#[test]
fn a_result_that_was_lost_is_in_the_next_ones_totals() {
    for name in ["02_control_ro", "02c_noinit", "04a_first", "05c_subagent_bg", "07o_stream_maxturns2"] {
        let mut lines = lines(name);
        let whole = replay(&[&lines.concat()], 65_536).report().totals();
        let first = lines.iter().position(|line| line.windows(15).any(|part| part == b"\"type\":\"result\"")).unwrap();
        lines.remove(first);
        let now = Now { mono: Duration::ZERO, unix: DAY };
        let mut monitor = Monitor::new(Settings::default(), false, now);
        monitor.handle(now, Input::Spawned { pid: 1 });
        monitor.handle(now, Input::Stdout(&lines.concat()));
        monitor.handle(now, Input::Exited(Exit::Code(0)));
        let totals = monitor.report().totals();
        assert_eq!((totals.cost_usd, totals.tokens), (whole.cost_usd, whole.tokens), "{name}");
    }
}

#[test]
fn an_older_process_that_did_more_than_the_one_before_is_another() {
    // Its totals begin at zero again and are no smaller: nothing in them falls.
    let (first, second) = (lines("30_old_first"), lines("30_old_resume"));
    let totals = replay(&[&[first.concat(), second.concat()].concat()], 65_536).report().totals();
    assert_eq!(totals.tokens, served("30_old_first") + served("30_old_resume"));
    assert_eq!(totals.cost_usd.to_string(), "0.0099");
}

#[test]
fn what_came_before_a_name_is_the_first_sessions() {
    let report = |bytes: &[u8]| serde_json::to_value(replay(&[bytes], 65_536).report()).unwrap();
    let named = report(&[b"[SandboxDebug]\n".to_vec(), lines("02c_noinit").concat()].concat());
    assert_eq!((&named["sessions"][0]["parse_errors"], &named["totals"]["parse_errors"]), (&1.into(), &1.into()));
    // And one that never has a name is one, too.
    let text = String::from_utf8(lines("02c_noinit").concat()).unwrap().replace("session_id", "id");
    let nameless = report(text.as_bytes());
    assert_eq!(nameless["sessions"][0]["session_id"], serde_json::Value::Null);
    assert_eq!(nameless["sessions"][0]["outcome"], "success");
    assert_eq!(nameless["sessions"][0]["cost_usd"], nameless["totals"]["cost_usd"]);
    assert_eq!(nameless["totals"]["turns"], 2);
}

#[test]
fn totals_that_cannot_be_read_are_not_made_up_for_twice() {
    // What the CLI was asked in between tells all of it; a result that tells nothing must not make it count again.
    let text = String::from_utf8(lines("02_control_ro").concat()).unwrap();
    let broken = ["modelUsage", "model_usage_since_last_result", "total_cost_usd", "usage"]
        .iter()
        .fold(text.clone(), |text, key| text.lines().map(|line| if line.contains("\"type\":\"result\"") { line.replace(&format!("\"{key}\""), "\"x\"") } else { line.to_owned() } + "\n").collect());
    let (broken, whole) = (replay(&[broken.as_bytes()], 65_536), replay(&[text.as_bytes()], 65_536));
    let (broken, whole) = (broken.report().totals(), whole.report().totals());
    let inputs = |tokens: Tokens| Tokens { output: 0, ..tokens };
    assert_eq!((inputs(broken.tokens), broken.cost_estimated), (inputs(whole.tokens), true));
    assert!(broken.cost_usd <= whole.cost_usd);
}

#[test]
fn a_cli_that_tells_no_models_is_believed_its_total() {
    let turn = |total: f64| {
        format!(
            r#"{{"type":"assistant","session_id":"s","message":{{"id":"m{total}","model":"claude-opus-5-5","content":[]}}}}
{{"type":"result","subtype":"success","session_id":"s","total_cost_usd":{total},"usage":{{"input_tokens":10,"output_tokens":7}}}}
"#
        )
    };
    let totals = replay(&[[turn(0.25), turn(0.75)].concat().as_bytes()], 65_536).report().totals();
    assert_eq!((totals.cost_usd.to_string().as_str(), totals.turns, totals.cost_estimated), ("0.75", 2, false));
    assert_eq!(totals.models["claude-opus-5-5"].tokens, Tokens { input: 20, output: 14, ..Tokens::default() });
}

#[test]
fn processes_one_after_another_add_up() {
    // A session, its resume, a fork of it, and a resume after a kill: each process is counted for itself.
    let names = ["04a_first", "04b_resume", "04c_fork", "04j_kill9", "04k_resume_killed", "01b_basic_old"];
    let files: Vec<Vec<u8>> = names.iter().map(|name| std::fs::read(path(&format!("{name}.jsonl"))).unwrap()).collect();
    let parts: Vec<&[u8]> = files.iter().map(Vec::as_slice).collect();
    let joined = replay(&parts, 65_536).report().totals();
    let in_one_file = replay(&[&parts.concat()], 65_536).report().totals();
    assert_eq!((in_one_file.cost_usd, in_one_file.tokens, in_one_file.turns), (joined.cost_usd, joined.tokens, joined.turns));
    let one_by_one = parts.iter().map(|part| replay(&[part], 65_536).report().totals());
    let (cost, tokens, turns) = one_by_one.fold(Default::default(), |(cost, tokens, turns), totals| {
        (cost + totals.cost_usd, tokens + totals.tokens, turns + totals.turns)
    });
    assert_eq!((joined.cost_usd, joined.tokens, joined.turns), (cost, tokens, turns));
}

#[test]
fn a_killed_process_after_an_older_version_is_another() {
    // The older one tells no pid, the killed one has no result: what tells them apart is the version. The names of their answers are
    // the same, as they are in any two recordings.
    for killed in ["09_stream_TERM", "12f_stall6"] {
        let (first, second) = (lines("01b_basic_old").concat(), lines(killed).concat());
        let [old, new] = [&first, &second].map(|bytes| replay(&[bytes], 65_536).report().totals());
        let both = replay(&[&[first, second].concat()], 65_536);
        let totals = both.report().totals();
        assert_eq!((totals.cost_usd, totals.tokens), (old.cost_usd + new.cost_usd, old.tokens + new.tokens), "{killed}");
        assert_eq!(both.report().sessions().len(), 2, "{killed}");
    }
}

#[test]
fn another_process_with_another_name_is_one_session_more() {
    for names in [["01_basic_text", "09_stream_TERM"], ["01b_basic_old", "01_basic_text"]] {
        let bytes = names.map(|name| lines(name).concat()).concat();
        let monitor = replay(&[&bytes], 65_536);
        let began = |start| monitor.meters().get(&metric::SESSIONS, &[start]).map_or(0.0, Cell::to_f64);
        assert_eq!(["fresh", "clear", "resume"].map(began), [2.0, 0.0, 0.0], "{names:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_processes_in_one_file_add_up(names in proptest::sample::subsequence(RECORDINGS.to_vec(), 2..5).prop_shuffle()) {
        let mut bytes = Vec::new();
        let (mut cost, mut tokens, mut turns, mut retries) = (Usd::ZERO, Tokens::default(), 0, 0);
        let mut tools: Vec<String> = Vec::new();
        for &(name, .., count, _, calls, _, again, _) in &names {
            let one = lines(name).concat();
            let totals = replay(&[&one], 65_536).report().totals();
            cost += totals.cost_usd;
            tokens += totals.tokens;
            turns += count;
            retries += again;
            tools.extend(calls.split_whitespace().map(str::to_owned));
            bytes.extend(one);
            if bytes.last() != Some(&b'\n') {
                bytes.push(b'\n');
            }
        }
        let totals = replay(&[&bytes], 65_536).report().totals();
        let of = |names: &[Row]| names.iter().map(|row| row.0).collect::<Vec<_>>().join(" ");
        prop_assert_eq!((totals.cost_usd, totals.tokens), (cost, tokens), "{}", of(&names));
        prop_assert_eq!((totals.turns, totals.api_retries), (turns, retries), "{}", of(&names));
        let calls: u64 = totals.tool_calls.values().map(|calls| calls.ok + calls.error).sum();
        let expected: u64 = tools.iter().filter_map(|word| word.split_once('/')).map(|(ok, error)| ok.parse::<u64>().unwrap() + error.parse::<u64>().unwrap()).sum();
        prop_assert_eq!(calls, expected, "{}", of(&names));
    }
}

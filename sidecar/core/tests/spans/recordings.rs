//! Every recording as a trace: sound, complete, without content, and cut anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use agent_sidecar_core::log::LEDGER;
use agent_sidecar_core::span::{Semconv, TraceSettings};
use agent_sidecar_core::telemetry::{Context, Span, Status, Value};
use agent_sidecar_core::{Exit, Input, Settings};
use proptest::prelude::*;

use crate::{GIVEN, Run, get, int, is_turn, text, told_alike, trace};

fn data() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "data"].iter().collect()
}

/// Each recording, by its name.
fn recordings() -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(data()).unwrap().map(|entry| entry.unwrap().path());
    files
        .filter(|path| path.extension().is_some_and(|ext| ext == "jsonl"))
        .map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap()))
        .collect()
}

/// A line each ten milliseconds, where nobody wrote down when it came; a recorded wire has both directions and their times.
fn replay(name: &str, bytes: &[u8], exit: Exit, settings: TraceSettings) -> Run {
    let mut run = Run::new(Settings { trace: settings, events: true, ..Settings::default() }, true);
    if name.ends_with(".wire") {
        for line in bytes.split(|b| *b == b'\n') {
            let Ok(line) = serde_json::from_slice::<serde_json::Value>(line) else { continue };
            let (Some(dir), Some(said)) = (line["dir"].as_str(), line["line"].as_str()) else { continue };
            run.now = Duration::from_secs_f64(line["t"].as_f64().unwrap());
            if dir == "in" {
                run.app(said)
            } else {
                run.cli(said)
            };
        }
    } else {
        for line in bytes.split_inclusive(|b| *b == b'\n') {
            run.now += Duration::from_millis(10);
            run.put(Input::Stdout(line));
        }
    }
    run.now += Duration::from_millis(10);
    run.exit(exit);
    run
}

/// The ids of the model's answers.
fn answers(bytes: &[u8]) -> BTreeSet<String> {
    fn walk(value: &serde_json::Value, ids: &mut BTreeSet<String>) {
        match value {
            serde_json::Value::Array(items) => items.iter().for_each(|item| walk(item, ids)),
            serde_json::Value::Object(_) => {
                // In a recorded wire the line is a string.
                if let Some(line) = value["line"].as_str() {
                    if let Ok(line) = serde_json::from_str(line) {
                        walk(&line, ids);
                    }
                    return;
                }
                let message = match value["type"].as_str() {
                    Some("assistant") => &value["message"],
                    Some("stream_event") => &value["event"]["message"],
                    _ => return,
                };
                if let (Some(id), Some(model)) = (message["id"].as_str(), message["model"].as_str())
                    && model != "<synthetic>"
                {
                    ids.insert(id.to_owned());
                }
            }
            _ => {}
        }
    }
    let mut ids = BTreeSet::new();
    for line in bytes.split(|b| *b == b'\n') {
        if let Ok(value) = serde_json::from_slice(line) {
            walk(&value, &mut ids);
        }
    }
    ids
}

/// What holds for any trace, however the process ended.
fn sound(run: &Run, settings: &TraceSettings) -> Result<(), String> {
    let by_id: BTreeMap<_, _> = run.spans.iter().map(|span| (span.context.span, span)).collect();
    let check = |ok: bool, what: String| if ok { Ok(()) } else { Err(format!("{what}\n{}", run.tree())) };
    check(by_id.len() == run.spans.len(), String::from("an id is there twice"))?;
    let mut turns = BTreeSet::new();
    for span in &run.spans {
        let name = &span.name;
        check(span.start <= span.end, format!("{name} ends before it begins"))?;
        check(span.context.span.0 != [0; 8] && span.context.trace.0 != [0; 16], format!("{name} has no id"))?;
        let keys: BTreeSet<_> = span.attributes.iter().map(|(key, _)| key).collect();
        check(keys.len() == span.attributes.len(), format!("{name} says something twice: {:?}", span.attributes))?;
        let ours = |key: &str| {
            ["gen_ai.", "claude_agent."].iter().any(|prefix| key.starts_with(prefix))
                || ["error.type", "mcp.method.name", "http.response.status_code"].contains(&key)
        };
        let said = span.attributes.iter().chain(span.events.iter().flat_map(|event| &event.attributes));
        for (key, _) in said.chain(span.links.iter().flat_map(|link| &link.attributes)) {
            check(ours(key), format!("{name} says {key}"))?;
        }
        let failed = matches!(span.status, Status::Error(_));
        check(failed == get(span, "error.type").is_some(), format!("{name} fails without a reason, or the other way round"))?;
        check(!failed || get(span, "claude_agent.keep").is_some(), format!("{name} may be sampled away"))?;
        for event in &span.events {
            check(span.start <= event.time && event.time <= span.end, format!("{name}: {} out of time", event.name))?;
        }
        match span.parent.and_then(|id| by_id.get(&id)) {
            Some(parent) => {
                check(parent.context.trace == span.context.trace, format!("{name} is in another trace than its parent"))?;
                check(parent.start <= span.start, format!("{name} begins before {}", parent.name))?;
                // In the background work goes on: subagents after their call, hooks and the way out after the turn.
                let outlives = ["invoke_agent", "hook", "shutdown"].iter().any(|kind| name.starts_with(kind));
                // A stopped subagent's call is answered when it has been stopped.
                let stopped = get(parent, "claude_agent.outcome").is_some_and(|outcome| *outcome == Value::Str("stopped".into()));
                let within = span.end <= parent.end || outlives || stopped || span.start >= parent.end;
                check(within, format!("{name} ends after {}", parent.name))?;
            }
            None => {
                let root =
                    is_turn(span) || ["claude_agent.background", "claude_agent.process", "shutdown"].contains(&name.as_str());
                check(root, format!("{name} has no parent"))?;
                check(span.parent == settings.parent.map(|parent| parent.span), format!("{name} hangs in the air"))?;
            }
        }
        if is_turn(span) {
            let shared = settings.parent.is_some() || settings.native_traces;
            check(turns.insert(span.context.trace) || shared, String::from("two turns in a trace"))?;
        }
    }
    check(run.monitor.context().is_none() && run.monitor.spans_dropped() == 0, String::from("something is still open"))?;
    for (n, event) in (0..).zip(&run.logs) {
        check(event.sequence == n, format!("a gap before {}", event.name))?;
        check(LEDGER.iter().any(|(name, _)| *name == event.name), format!("{} is not on the list", event.name))?;
        let known = |context: Context| by_id.get(&context.span).is_some_and(|span| span.context == context);
        check(event.context.is_none_or(known), format!("{} belongs to a span that is not there", event.name))?;
    }
    Ok(())
}

/// Recordings in which the model is asked in ways that the stream does not show.
const UNSEEN: &[(&str, &str)] = &[
    ("03d_compact_clear", "compaction"),
    ("06b_websearch", "the search asks, too"),
    ("22b_suggest_cost", "a suggestion for the next prompt"),
];

#[test]
fn each_recording_is_a_sound_trace_of_what_it_counts() {
    let mut compared = Vec::new();
    for (name, bytes) in recordings() {
        let run = replay(&name, &bytes, Exit::Code(0), trace());
        sound(&run, &trace()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let totals = run.monitor.report().totals();
        let turns: Vec<_> = run.spans.iter().filter(|span| is_turn(span)).collect();
        assert_eq!(turns.len() as u64, totals.turns, "{name}\n{}", run.tree());
        let started = run.logs.iter().filter(|event| event.name == "turn.started").count();
        assert_eq!(started, turns.len(), "{name}");
        let tools = run.spans.iter().filter(|span| span.name.starts_with("execute_tool ")).count() as u64;
        assert_eq!(tools, totals.tool_calls.values().map(|calls| calls.ok + calls.error).sum::<u64>(), "{name}");
        let agents = run.spans.iter().filter(|span| get(span, "claude_agent.depth").is_some()).count() as u64;
        assert_eq!(agents, totals.subagents, "{name}\n{}", run.tree());
        let chats: Vec<_> = run.spans.iter().filter(|span| span.name.starts_with("chat ")).collect();
        let (answered, failed): (Vec<&Span>, Vec<&Span>) =
            chats.into_iter().partition(|chat| get(chat, "gen_ai.response.id").is_some());
        let ids: BTreeSet<_> = answered.iter().map(|chat| text(chat, "gen_ai.response.id").to_owned()).collect();
        assert_eq!((ids.len(), &ids), (answered.len(), &answers(&bytes)), "{name}");
        assert!(failed.iter().all(|chat| matches!(chat.status, Status::Error(_))), "{name}\n{}", run.tree());
        let retries = run.spans.iter().filter(|span| !is_turn(span)).flat_map(|span| &span.events);
        assert_eq!(retries.filter(|event| event.name == "api_retry").count() as u64, totals.api_retries, "{name}");

        // Where the API told the end of each answer, they add up to the bill.
        let told = |chat: &&Span| int(chat, "gen_ai.usage.output_tokens").is_some();
        if !answered.is_empty() && answered.iter().all(told) && !UNSEEN.iter().any(|(unseen, _)| *unseen == name) {
            let sum = |key| answered.iter().filter_map(|chat| int(chat, key)).sum::<i64>() as u64;
            assert_eq!(sum("gen_ai.usage.input_tokens"), totals.tokens.prompt(), "{name}\n{}", run.tree());
            assert_eq!(sum("gen_ai.usage.output_tokens"), totals.tokens.output, "{name}\n{}", run.tree());
            assert_eq!(sum("gen_ai.usage.cache_read.input_tokens"), totals.tokens.cache_read, "{name}");
            compared.push(name.clone());
        }
        // Turns tell what was spent in them.
        let spent: i64 = turns.iter().filter_map(|turn| int(turn, "gen_ai.usage.output_tokens")).sum();
        assert!(spent as u64 <= totals.tokens.output, "{name}");
    }
    assert!(compared.len() >= 9, "only these could be compared: {compared:?}");
}

#[test]
fn processes_one_after_another_are_told_apart() {
    let all = recordings();
    let names = ["04a_first", "04b_resume", "04c_fork", "04j_kill9", "04k_resume_killed", "01b_basic_old", "05c_subagent_bg"];
    let joined: Vec<u8> = names.iter().flat_map(|name| all[*name].clone()).collect();
    let told = replay("", &joined, Exit::Code(0), trace());
    let mut known = Run::new(Settings { trace: trace(), events: true, ..Settings::default() }, true);
    for (n, name) in names.iter().enumerate() {
        if n > 0 {
            known.put(Input::Spawned { pid: 8 });
        }
        for line in all[*name].split_inclusive(|b| *b == b'\n') {
            known.now += Duration::from_millis(10);
            known.put(Input::Stdout(line));
        }
        known.put(Input::StdoutEnd);
    }
    known.exit(Exit::Code(0));
    for run in [told, known] {
        sound(&run, &trace()).unwrap();
        let turns = run.spans.iter().filter(|span| is_turn(span)).count() as u64;
        assert_eq!(turns, run.monitor.report().totals().turns, "{}", run.tree());
        // What one left open ended with it, and not with the last.
        let killed = run.spans.iter().find(|span| get(span, "claude_agent.closed_by").is_some()).unwrap();
        assert!(killed.end < run.spans.last().unwrap().start, "{}", run.tree());
        let resumed = run.spans.iter().filter(|span| is_turn(span) && !span.links.is_empty()).count();
        assert!(resumed >= 3, "{resumed} turns are linked\n{}", run.tree());
    }
}

#[test]
fn what_the_app_itself_answers_is_timed_at_the_wire() {
    let run = replay("11_ts_full.wire", &recordings()["11_ts_full.wire"], Exit::Code(0), trace());
    let lasted = |name: &str| {
        let span = run.one(name);
        (span.end - span.start).as_micros()
    };
    assert_eq!((lasted("hook PreToolUse"), lasted("hook Stop")), (6_000, 700));
    assert_eq!(lasted("permission Bash"), 3_300);
}

#[test]
fn the_apps_own_trace_holds_them_all() {
    let parent = Context::from_traceparent(GIVEN);
    let settings = TraceSettings { parent, ..trace() };
    for (name, bytes) in recordings() {
        let run = replay(&name, &bytes, Exit::Code(0), settings.clone());
        sound(&run, &settings).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(run.spans.iter().all(|span| Some(span.context.trace) == parent.map(|parent| parent.trace)), "{name}");
    }
}

#[test]
fn beside_the_clis_own_traces_there_is_no_double_tree() {
    let settings = TraceSettings { native_traces: true, ..trace() };
    for (name, bytes) in recordings() {
        let run = replay(&name, &bytes, Exit::Code(0), settings.clone());
        sound(&run, &settings).unwrap_or_else(|error| panic!("{name}: {error}"));
        let process = run.one("claude_agent.process");
        assert_eq!(Some(process.context), run.monitor.child_context(), "{name}");
        assert!(run.spans.iter().all(|span| span.context.trace == process.context.trace), "{name}");
        assert!(!run.spans.iter().any(|span| ["chat ", "execute_tool ", "permission "].iter().any(|n| span.name.starts_with(n))));
        let turns = run.spans.iter().filter(|span| is_turn(span)).count() as u64;
        assert_eq!(turns, run.monitor.report().totals().turns, "{name}");
    }
}

#[test]
fn the_cli_is_given_what_the_app_gave_or_the_process_or_nothing() {
    let given = Context::from_traceparent(GIVEN);
    let of = |settings: TraceSettings| settings.child_context();
    assert_eq!(of(trace()), None);
    assert_eq!(of(TraceSettings { parent: given, ..trace() }), given);
    assert_eq!(of(TraceSettings { parent: given, native_traces: true, ..trace() }), given);
    assert!(of(TraceSettings { native_traces: true, ..trace() }).is_some());
    assert_eq!(of(TraceSettings { native_traces: true, on: false, ..trace() }), None);
}

#[test]
fn nobody_pays_for_what_is_off() {
    let bytes = &recordings()["05c_subagent_bg"];
    let mut run = Run::new(Settings::default(), true);
    run.put(Input::Stdout(bytes)).exit(Exit::Code(0));
    assert!(run.spans.is_empty() && run.logs.is_empty() && !run.records.is_empty());
}

#[test]
fn the_same_seed_gives_the_same_trace_and_another_seed_other_ids() {
    let bytes = &recordings()["18b_mirror"];
    let ids = |seed| -> BTreeSet<_> {
        let settings = TraceSettings { seed, ..trace() };
        replay("", bytes, Exit::Code(0), settings).spans.iter().map(|span| span.context.span).collect()
    };
    assert_eq!(ids(1), ids(1));
    assert!(ids(1).is_disjoint(&ids(2)));
}

// ---- no content

/// Everything that people, models and tools said in a recording, and where: long enough to be no accident.
fn canaries(value: &serde_json::Value, inside: bool, found: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::String(said) if inside && said.len() >= 6 => {
            found.insert(said.clone());
        }
        serde_json::Value::String(said) if said.contains('@') || said.starts_with('/') => {
            found.insert(said.clone());
        }
        serde_json::Value::Array(items) => items.iter().for_each(|item| canaries(item, inside, found)),
        serde_json::Value::Object(fields) => {
            for (key, field) in fields {
                // Names and ids are what traces are made of.
                let names = [
                    "type",
                    "subtype",
                    "name",
                    "id",
                    "session_id",
                    "tool_use_id",
                    "task_id",
                    "agentId",
                    "subagent_type",
                    "agentType",
                    "model",
                    "resolvedModel",
                    "status",
                    "hook_event",
                    "hook_event_name",
                    "hookEventName",
                    "behavior",
                ];
                if names.contains(&key.as_str()) {
                    continue;
                }
                if key == "line" {
                    if let Some(line) = field.as_str().and_then(|line| serde_json::from_str(line).ok()) {
                        canaries(&line, inside, found);
                    }
                    continue;
                }
                let content = [
                    "text",
                    "thinking",
                    "input",
                    "content",
                    "tool_use_result",
                    "result",
                    "cwd",
                    "prompt",
                    "description",
                    "summary",
                    "message",
                    "output",
                    "stdout",
                    "stderr",
                    "partial_json",
                    "errors",
                    "email",
                    "account",
                    "command",
                    "signature",
                ];
                // Of a message only its content is content: the rest of it is ids and usage.
                let deeper = content.contains(&key.as_str()) && !(key == "message" && field.is_object());
                canaries(field, inside || deeper, found);
            }
        }
        _ => {}
    }
}

#[test]
fn no_word_of_anybody_is_in_any_signal() {
    let mut searched = 0;
    for (name, bytes) in recordings() {
        let mut found = BTreeSet::new();
        let meta = std::fs::read(data().join(format!("{}.meta.json", name.trim_end_matches(".wire")))).unwrap();
        for line in bytes.split(|b| *b == b'\n').chain([meta.as_slice()]) {
            if let Ok(value) = serde_json::from_slice::<serde_json::Value>(line) {
                canaries(&value, false, &mut found);
            }
        }
        for semconv in Semconv::ALL {
            let run = replay(&name, &bytes, Exit::Signal(9), TraceSettings { semconv, ..trace() });
            let mut said = String::new();
            // Keys are ours; only values could be somebody's.
            let mut tell =
                |attributes: &[(&str, Value)]| attributes.iter().for_each(|(_, value)| writeln!(said, "{value:?}").unwrap());
            run.logs.iter().for_each(|event| tell(&event.attributes));
            for span in &run.spans {
                tell(&[("", Value::Str(span.name.clone()))]);
                tell(&span.attributes);
                span.events.iter().for_each(|event| tell(&event.attributes));
                span.links.iter().for_each(|link| tell(&link.attributes));
            }
            let told =
                |canary: &&String| said.contains(canary.as_str()) || said.contains(format!("{canary:?}").trim_matches('"'));
            let told: Vec<&String> = found.iter().filter(told).collect();
            assert!(told.is_empty(), "{name} tells {told:?}");
            for never in ["@", "sk-ant", "/workspace", "/home", "secret"] {
                assert!(!said.contains(never), "{name} tells {never}");
            }
        }
        searched += found.len();
    }
    assert!(searched > 300, "only {searched} canaries");
}

// ---- cut anywhere

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_cut_all_is_closed_and_says_why(which in 0usize..1_000, at in 0.0..1.0f64, how in 0usize..4, native: bool) {
        static ALL: std::sync::LazyLock<Vec<(String, Vec<u8>)>> = std::sync::LazyLock::new(|| recordings().into_iter().collect());
        let (name, bytes) = &ALL[which % ALL.len()];
        let cut = (bytes.len() as f64 * at) as usize;
        let exit = [Exit::Code(0), Exit::Code(1), Exit::Code(143), Exit::Signal(9)][how];
        let settings = TraceSettings { native_traces: native, ..trace() };
        let run = replay(name, &bytes[..cut], exit, settings.clone());
        sound(&run, &settings).map_err(TestCaseError::fail)?;
        let totals = run.monitor.report().totals();
        if !native {
            let tools = run.spans.iter().filter(|span| span.name.starts_with("execute_tool ")).count() as u64;
            prop_assert_eq!(tools, totals.tool_calls.values().map(|calls| calls.ok + calls.error).sum::<u64>());
        }
        for span in &run.spans[run.before_exit..] {
            if ["claude_agent.process", "shutdown"].contains(&span.name.as_str()) {
                continue;
            }
            prop_assert!(get(span, "error.type").is_some(), "{} at {}: {}\n{}", name, cut, span.name, run.tree());
            prop_assert_eq!(text(span, "claude_agent.closed_by"), "sidecar");
        }
    }
}

#[test]
fn the_ledger_and_the_log_use_the_same_words() {
    let told: usize = recordings().iter().map(|(name, bytes)| told_alike(&replay(name, bytes, Exit::Code(0), trace()))).sum();
    assert!(told > 150, "only {told}");
}

#[test]
fn the_page_names_all_that_is_said() {
    let page = include_str!("../../../../docs/telemetry.md");
    let settings = TraceSettings { semconv: Semconv::Both, ..trace() };
    let mut said: BTreeSet<&'static str> = LEDGER.iter().map(|(name, _)| *name).collect();
    for (name, bytes) in recordings() {
        let run = replay(&name, &bytes, Exit::Signal(9), settings.clone());
        said.extend(run.spans.iter().flat_map(|span| span.attributes.iter().map(|(key, _)| *key)));
    }
    let missing: Vec<_> = said.into_iter().filter(|word| !page.contains(&format!("`{word}`"))).collect();
    assert!(missing.is_empty(), "docs/telemetry.md does not name {missing:?}");
}

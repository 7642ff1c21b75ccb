//! What lines become: recorded ones, one of each kind, hostile ones.

#![expect(clippy::unwrap_used, reason = "a test that cannot read its recordings has failed")]

use std::path::Path;

use agent_sidecar_core::event::claude_code::{parse_array, parse_stdin, parse_stdout};
use agent_sidecar_core::event::{
    Aim, Answer, Assistant, Block, Broken, Event, Init, Message, MirroredAnswer, ModelTotal, RateWindow, Request, SessionState,
    Status, Stream, Task, ToolResult, TurnResult, Usage, User,
};
use agent_sidecar_core::tokens::{Tokens, Usd};
use proptest::prelude::*;
use serde_json::Value;

/// The lines of every recording with the side that said them, each with where it is from.
fn recorded() -> Vec<(String, bool, Vec<u8>)> {
    let mut lines = Vec::new();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut files: Vec<_> = std::fs::read_dir(data).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "jsonl")) {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read(file).unwrap();
        for (n, line) in text.split(|b| *b == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
            let from = format!("{name}:{}", n + 1);
            if name.ends_with(".wire.jsonl") {
                let frame: Value = serde_json::from_slice(line).unwrap();
                if let (Some(side), Some(line)) = (frame["dir"].as_str(), frame["line"].as_str()) {
                    lines.push((from, side == "out", line.as_bytes().to_vec()));
                }
            } else {
                lines.push((from, true, line.to_vec()));
            }
        }
    }
    assert!(lines.len() > 1_000, "{} lines", lines.len());
    lines
}

fn messages(stdout: bool, line: &[u8]) -> Vec<Result<Message, Broken>> {
    match (stdout, line.first()) {
        (true, Some(b'[')) => parse_array(line).unwrap_or_else(|broken| vec![Err(broken)]),
        (true, _) => vec![parse_stdout(line)],
        (false, _) => vec![parse_stdin(line)],
    }
}

#[test]
fn every_recorded_line_is_understood_whole() {
    let mut cut = Vec::new();
    for (from, stdout, line) in recorded() {
        for message in messages(stdout, &line) {
            match message {
                Ok(message) => {
                    assert_eq!(message.misshapen, 0, "{from}: {message:?}");
                    assert!(!matches!(message.event, Event::Unknown { .. }), "{from}: {message:?}");
                }
                // The recorder kept the first part of one long answer in each wire log; a stalled reader lost the end of one line.
                Err(Broken::Truncated) => cut.push(from.clone()),
                Err(broken) => panic!("{from}: {broken:?}"),
            }
        }
    }
    let files: Vec<&str> = cut.iter().map(|from| from.split(':').next().unwrap()).collect();
    assert_eq!(files, ["11_py_full.wire.jsonl", "11_ts_full.wire.jsonl", "12f_stall6.jsonl"]);
}

#[test]
fn the_order_of_keys_says_nothing() {
    let to_the_digit = |usd: &mut f64| *usd = Usd::from_f64(*usd).to_f64();
    for (from, stdout, line) in recorded() {
        // Read into a table and written from it, keys come sorted.
        let Ok(value) = serde_json::from_slice::<Value>(&line) else { continue };
        let sorted = serde_json::to_vec(&value).unwrap();
        let (mut plain, mut other) = (messages(stdout, &line), messages(stdout, &sorted));
        // Tables come in the order of their keys, and what is hashed as it is written, or measured, in other bytes.
        plain.iter_mut().chain(&mut other).flatten().for_each(|message| match &mut message.event {
            Event::Assistant(answer) => answer.blocks.iter_mut().for_each(|block| {
                if let Block::ToolUse { input_bytes, .. } = block {
                    *input_bytes = 0;
                }
            }),
            Event::User(user) => user.results.iter_mut().for_each(|result| {
                (result.hash, result.error_hash, result.bytes) = (0, 0, 0);
            }),
            Event::Result(result) => {
                result.total_cost_usd.iter_mut().for_each(to_the_digit);
                for totals in result.model_usage.iter_mut().chain(&mut result.since_last) {
                    totals.sort_by(|a, b| a.model.cmp(&b.model));
                    totals.iter_mut().for_each(|total| to_the_digit(&mut total.cost_usd));
                }
            }
            Event::ControlResponse { answer: Answer::Usage { total_cost_usd, models }, .. } => {
                total_cost_usd.iter_mut().for_each(to_the_digit);
                models.iter_mut().for_each(|total| to_the_digit(&mut total.cost_usd));
            }
            _ => {}
        });
        assert_eq!(plain, other, "{from}");
    }
}

fn of(event: Event) -> Message {
    Message { session_id: Some("s".into()), parent: None, event, misshapen: 0 }
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

#[test]
fn what_each_message_says() {
    let tokens = Tokens { input: 12, output: 120, cache_read: 5_000, cache_write_5m: 700, cache_write_1h: 100 };
    let usage = Usage { tokens, web_searches: 2, inference_geo: some("us"), speed: some("fast"), has_input: true };
    let used = r#"{"input_tokens":12,"output_tokens":120,"cache_read_input_tokens":5000,"cache_creation_input_tokens":800,
        "cache_creation":{"ephemeral_5m_input_tokens":700,"ephemeral_1h_input_tokens":100},"server_tool_use":{"web_search_requests":2},
        "inference_geo":"us","speed":"fast","iterations":null}"#;
    let total = ModelTotal {
        model: "m[1m]".into(),
        canonical: some("m"),
        tokens,
        cost_usd: 0.007448,
        web_searches: 2,
        told_apart: true,
        cost_basis: some("list"),
        context_window: Some(1_000_000),
    };
    let totals = r#"{"m[1m]":{"inputTokens":12,"outputTokens":120,"cacheReadInputTokens":5000,"cacheCreationInputTokens":800,
        "cacheCreationEphemeral5mInputTokens":700,"cacheCreationEphemeral1hInputTokens":100,"webSearchRequests":2,
        "costUSD":0.007448,"contextWindow":1000000,"canonicalModel":"m","costBasis":"list","provider":"firstParty"}}"#;
    let old = r#"{"m":{"inputTokens":1,"cacheCreationInputTokens":800,"costUSD":1}}"#;
    let old_total = ModelTotal {
        model: "m".into(),
        tokens: Tokens { input: 1, cache_write_5m: 800, ..Tokens::default() },
        cost_usd: 1.0,
        ..ModelTotal::default()
    };
    let result = |call: &str, error, denied, interrupted| ToolResult {
        call: call.into(),
        error,
        denied,
        interrupted,
        ..ToolResult::default()
    };
    let said = |results| User { results, ..User::default() };

    for (line, event) in [
        (
            r#""type":"system","subtype":"init","model":"m","claude_code_version":"2.1","permissionMode":"default","apiKeySource":"x",
               "mcp_servers":[{"name":"a","status":"connected"},{"name":"b"}],"messaging_socket_path":"/tmp/cc-socks/16293.sock""#
                .to_owned(),
            Event::Init(Init {
                model: some("m"),
                version: some("2.1"),
                permission_mode: some("default"),
                api_key_source: some("x"),
                mcp_servers: vec![("a".into(), "connected".into()), ("b".into(), String::new())],
                pid: Some(16_293),
            }),
        ),
        (
            r#""type":"system","subtype":"status","status":null,"permissionMode":"plan","compact_result":"failed""#.into(),
            Event::Status { status: Status::None, permission_mode: some("plan"), compact_failed: true },
        ),
        (
            r#""type":"system","subtype":"status","status":"requesting""#.into(),
            Event::Status { status: Status::Requesting, permission_mode: None, compact_failed: false },
        ),
        (
            format!(
                r#""type":"assistant","message":{{"id":"msg_1","model":"m","usage":{used},"stop_reason":null,"content":[
                {{"type":"text","text":"a\n\u00e9\ud83d\ude00"}},{{"type":"thinking","thinking":"hmm"}},
                {{"type":"tool_use","id":"c","name":"Bash","input":{{}}}},{{"type":"server_tool_use","id":"d","name":"web_search"}}]}},
                "error":"overloaded","aborted":true,"subagent_type":"general-purpose""#
            ),
            Event::Assistant(Assistant {
                id: some("msg_1"),
                model: some("m"),
                usage: Some(usage.clone()),
                stop_reason: None,
                blocks: vec![
                    Block::Text { bytes: 8 },
                    Block::Thinking { bytes: 3 },
                    Block::ToolUse { call: "c".into(), tool: "Bash".into(), input_bytes: 2, input_hash: 0, aim: Aim::Work },
                    Block::Other,
                ],
                error: some("overloaded"),
                aborted: true,
                subagent_type: some("general-purpose"),
            }),
        ),
        (
            r#""type":"user","message":{"content":"hi"},"uuid":"u","shouldQuery":false,"isReplay":true,"isSynthetic":true"#.into(),
            Event::User(User {
                results: Vec::new(),
                prompt: true,
                synthetic: true,
                replay: true,
                uuid: some("u"),
                silent: true,
            }),
        ),
        (
            // The results of parallel calls: one ran, one was turned away by a rule.
            r#""type":"user","message":{"content":[{"tool_use_id":"a","type":"tool_result","content":[{"type":"text","text":"x"}]},
               {"type":"tool_result","content":"no","is_error":true,"tool_use_id":"b"}]},"tool_use_result":"Error: no",
               "tool_result_meta":[{"id":"a","permission_decision":{"decision":"accept","source":"config"}},
               {"id":"b","non_execution_kind":"user-rejected","permission_decision":{"decision":"reject","source":"config"}}]"#
                .into(),
            Event::User(said(vec![result("a", false, false, false), result("b", true, true, false)])),
        ),
        (
            // Interrupted while a person was asked.
            r#""type":"user","message":{"content":[{"type":"tool_result","is_error":true,"tool_use_id":"a"}]},
               "tool_use_result":"User rejected tool use","tool_result_meta":[{"id":"a","non_execution_kind":"user-rejected"}]"#
                .into(),
            Event::User(said(vec![result("a", true, true, false)])),
        ),
        (
            r#""type":"user","message":{"content":[{"type":"tool_result","tool_use_id":"a"}]},"tool_use_result":{"interrupted":true}"#
                .into(),
            Event::User(said(vec![result("a", false, false, true)])),
        ),
        (
            format!(r#""type":"stream_event","event":{{"type":"message_start","message":{{"id":"i","model":"m","usage":{used}}}}},"ttft_ms":7"#),
            Event::Stream(Stream::MessageStart { id: some("i"), model: some("m"), usage: Some(usage.clone()), ttft_ms: Some(7) }),
        ),
        (
            r#""type":"stream_event","event":{"type":"content_block_start","content_block":{"type":"tool_use","id":"c","name":"Bash"}}"#
                .into(),
            Event::Stream(Stream::BlockStart { tool: Some(("c".into(), "Bash".into())) }),
        ),
        (
            r#""type":"stream_event","event":{"type":"content_block_start","content_block":{"type":"text","text":""}}"#.into(),
            Event::Stream(Stream::BlockStart { tool: None }),
        ),
        (
            r#""type":"stream_event","event":{"delta":{"partial_json":"{\"a\"","type":"input_json_delta"},"type":"content_block_delta"}"#
                .into(),
            Event::Stream(Stream::Delta { bytes: 4 }),
        ),
        (r#""type":"stream_event","event":{"type":"content_block_stop"}"#.into(), Event::Stream(Stream::BlockStop)),
        (
            r#""type":"stream_event","event":{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":9}}"#
                .into(),
            Event::Stream(Stream::MessageDelta {
                usage: Some(Usage { tokens: Tokens { output: 9, ..Tokens::default() }, ..Usage::default() }),
                stop_reason: some("end_turn"),
            }),
        ),
        (r#""type":"stream_event","event":{"type":"message_stop"}"#.into(), Event::Stream(Stream::MessageStop)),
        (r#""type":"stream_event","event":{"type":"ping"}"#.into(), Event::Stream(Stream::Other)),
        (
            format!(
                r#""duration_api_ms":5,"total_cost_usd":0.25,"usage":{used},"modelUsage":{old},"model_usage_since_last_result":{totals},
                "permission_denials":[{{"tool_name":"Bash"}},{{}}],"terminal_reason":"max_turns","subagent_stats":{{"spawned":3}},
                "is_error":true,"num_turns":4,"subtype":"error_max_turns","type":"result","duration_ms":6,"result_index":0,
                "queued_turn_count":1,"local_command":"compact","origin":{{"kind":"task-notification"}},"api_error_status":529,
                "ttft_ms":8,"startup_failure_reason":"auth""#
            ),
            Event::Result(Box::new(TurnResult {
                uuid: some("u"),
                subtype: some("error_max_turns"),
                is_error: true,
                terminal_reason: some("max_turns"),
                num_turns: 4,
                duration_ms: 6,
                duration_api_ms: 5,
                total_cost_usd: Some(0.25),
                usage: Some(usage.clone()),
                model_usage: Some(vec![old_total]),
                since_last: Some(vec![total.clone()]),
                index: Some(0),
                queued: 1,
                local_command: some("compact"),
                origin: some("task-notification"),
                api_error_status: Some(529),
                ttft_ms: Some(8),
                permission_denials: 2,
                startup_failure: some("auth"),
                subagents_spawned: Some(3),
            })),
        ),
        (
            r#""type":"result","subtype":"success","model_usage_since_last_result":{},"api_error_status":null"#.into(),
            Event::Result(Box::new(TurnResult { uuid: some("u"), subtype: some("success"), since_last: Some(Vec::new()), ..TurnResult::default() })),
        ),
        (
            r#""type":"system","subtype":"api_retry","attempt":2,"retry_delay_ms":1207,"error_status":null,"error":"unknown""#.into(),
            Event::ApiRetry { uuid: some("u"), attempt: 2, delay_ms: 1_207, status: None, error: some("unknown") },
        ),
        (
            r#""type":"tool_progress","tool_use_id":"c-heartbeat-0","tool_name":"Bash","parent_tool_use_id":"c",
               "elapsed_time_seconds":30,"heartbeat":true"#
                .into(),
            Event::ToolProgress {
                uuid: some("u"),
                tool: some("Bash"),
                call: some("c"),
                elapsed_s: 30.0,
                heartbeat: true,
                retry_error: None,
            },
        ),
        (
            r#""type":"tool_progress","tool_use_id":"agent_msg_1","tool_name":"Agent","elapsed_time_seconds":0,
               "subagent_retry":{"attempt":1,"error_status":529,"error_category":"overloaded"}"#
                .into(),
            Event::ToolProgress {
                uuid: some("u"),
                tool: some("Agent"),
                call: some("agent_msg_1"),
                elapsed_s: 0.0,
                heartbeat: false,
                retry_error: some("overloaded"),
            },
        ),
        (
            r#""type":"system","subtype":"task_started","task_id":"t","tool_use_id":"c","task_type":"local_agent",
               "is_backgrounded":true,"subagent_type":"x","spawn_depth":1,"parent_task_id":"p""#
                .into(),
            Event::TaskStarted(Task {
                task: "t".into(),
                call: some("c"),
                kind: some("local_agent"),
                background: true,
                subagent_type: some("x"),
                depth: 1,
                parent_task: some("p"),
            }),
        ),
        (
            r#""type":"system","subtype":"task_updated","task_id":"t","patch":{"status":"failed"}"#.into(),
            Event::TaskUpdated { task: "t".into(), status: some("failed") },
        ),
        (
            r#""type":"system","subtype":"task_notification","task_id":"t","status":"completed""#.into(),
            Event::TaskEnded { task: "t".into(), status: some("completed") },
        ),
        (
            r#""type":"system","subtype":"background_tasks_changed","tasks":[{"task_id":"t","task_type":"local_bash"},{"id":"u"}]"#.into(),
            Event::BackgroundTasks { tasks: vec![("t".into(), some("local_bash")), ("u".into(), None)] },
        ),
        (
            r#""type":"system","subtype":"compact_boundary","compact_metadata":{"trigger":"manual","pre_tokens":9,"post_tokens":3,
               "duration_ms":5}"#
                .into(),
            Event::Compacted { trigger: some("manual"), pre_tokens: 9, post_tokens: 3, duration_ms: 5 },
        ),
        (
            r#""type":"system","subtype":"permission_denied","tool_name":"Bash","tool_use_id":"c""#.into(),
            Event::PermissionDenied { tool: some("Bash"), call: some("c") },
        ),
        (
            r#""type":"system","subtype":"hook_response","hook_id":"h","hook_event":"Stop","outcome":"success","exit_code":-1"#.into(),
            Event::HookEnded { hook: "h".into(), event: some("Stop"), outcome: some("success"), exit_code: Some(-1) },
        ),
        (
            r#""type":"system","subtype":"session_state_changed","state":"requires_action""#.into(),
            Event::SessionState { state: SessionState::RequiresAction },
        ),
        (
            r#""type":"system","subtype":"model_fallback","trigger":"overloaded","original_model":"a","fallback_model":"b""#.into(),
            Event::ModelFallback { trigger: some("overloaded"), from: some("a"), to: some("b") },
        ),
        (
            r#""type":"rate_limit_event","rate_limit_info":{"status":"allowed","resetsAt":1,"rateLimitType":"five_hour",
               "unifiedWindows":{"five_hour":{"utilization":0.91,"resetsAt":2}}}"#
                .into(),
            Event::RateLimit {
                status: some("allowed"),
                windows: vec![RateWindow { window: "five_hour".into(), utilization: Some(0.91), resets_at: Some(2.0) }],
            },
        ),
        (
            r#""type":"rate_limit_event","rate_limit_info":{"status":"rejected","resetsAt":1,"rateLimitType":"seven_day"}"#.into(),
            Event::RateLimit {
                status: some("rejected"),
                windows: vec![RateWindow { window: "seven_day".into(), utilization: None, resets_at: Some(1.0) }],
            },
        ),
        (
            format!(
                r#""type":"transcript_mirror","entries":[{{"type":"user","message":"text"}},{{"type":"assistant","isSidechain":true,
                "message":{{"id":"i","model":"m","usage":{used},"stop_reason":"end_turn"}}}}]"#
            ),
            Event::Mirror {
                answers: vec![MirroredAnswer {
                    id: "i".into(),
                    model: some("m"),
                    usage,
                    stop_reason: some("end_turn"),
                    sidechain: true,
                }],
            },
        ),
        (
            r#""type":"control_request","request_id":"r","request":{"subtype":"can_use_tool","tool_name":"Bash","tool_use_id":"c",
               "input":{"hook_event_name":7}}"#
                .into(),
            Event::ControlRequest { id: "r".into(), request: Request::CanUseTool { tool: some("Bash"), call: some("c") } },
        ),
        (
            r#""type":"control_request","request_id":"r","request":{"subtype":"hook_callback","input":{"hook_event_name":"Stop"}}"#.into(),
            Event::ControlRequest { id: "r".into(), request: Request::HookCallback { event: some("Stop") } },
        ),
        (
            r#""type":"control_request","request_id":"r","request":{"subtype":"mcp_message","server_name":"calc",
               "message":{"jsonrpc":"2.0","method":"tools/list","id":0}}"#
                .into(),
            Event::ControlRequest {
                id: "r".into(),
                request: Request::McpMessage { server: some("calc"), method: some("tools/list"), id: true },
            },
        ),
        (
            format!(
                r#""type":"control_response","response":{{"subtype":"success","request_id":"r","response":{{"session":
                {{"total_cost_usd":0.25,"model_usage":{totals}}}}}}}"#
            ),
            Event::ControlResponse {
                id: "r".into(),
                ok: true,
                answer: Answer::Usage { total_cost_usd: Some(0.25), models: vec![total] },
            },
        ),
        (
            r#""type":"control_response","response":{"subtype":"success","request_id":"r","response":{"pid":7,"claude_code_version":"2"}}"#
                .into(),
            Event::ControlResponse { id: "r".into(), ok: true, answer: Answer::Initialized { pid: Some(7), version: some("2") } },
        ),
        (
            r#""type":"control_response","response":{"subtype":"success","request_id":"r","response":{"behavior":"deny"}}"#.into(),
            Event::ControlResponse { id: "r".into(), ok: true, answer: Answer::Permission { allow: false } },
        ),
        (
            r#""type":"control_response","response":{"subtype":"error","request_id":"r","error":"no"}"#.into(),
            Event::ControlResponse { id: "r".into(), ok: false, answer: Answer::Other },
        ),
        (r#""type":"control_cancel_request","request_id":"r""#.into(), Event::ControlCancel { id: "r".into() }),
        (r#""type":"command_lifecycle","state":"queued""#.into(), Event::CommandLifecycle { state: some("queued") }),
        (r#""type":"conversation_reset""#.into(), Event::ConversationReset),
        (r#""type":"keep_alive""#.into(), Event::KeepAlive),
        (r#""type":"system","subtype":"thinking_tokens""#.into(), Event::ThinkingTokens),
        (r#""type":"system","subtype":"worker_shutting_down""#.into(), Event::Known),
        (r#""type":"auth_status""#.into(), Event::Known),
        (r#""type":"new","subtype":"x""#.into(), Event::Unknown { kind: "new".into(), subtype: some("x") }),
        (r#""type":"system","subtype":"new""#.into(), Event::Unknown { kind: "system".into(), subtype: some("new") }),
        (r#""type":"system""#.into(), Event::Unknown { kind: "system".into(), subtype: None }),
    ] {
        for line in [format!("{{{line},\"session_id\":\"s\",\"uuid\":\"u\"}}"), format!("{{\"uuid\":\"u\",\"session_id\":\"s\",{line}}}")] {
            let mut message = parse_stdout(line.as_bytes()).unwrap_or_else(|broken| panic!("{broken:?}: {line}"));
            if let (Event::User(read), Event::User(User { uuid: None, .. })) = (&mut message.event, &event) {
                read.uuid = None;
            }
            // What the hashes tell apart is said below.
            match &mut message.event {
                Event::User(user) => user.results.iter_mut().for_each(|result| {
                    (result.hash, result.error_hash, result.bytes) = (0, 0, 0);
                }),
                Event::Assistant(answer) => answer.blocks.iter_mut().for_each(|block| {
                    if let Block::ToolUse { input_hash, .. } = block {
                        *input_hash = 0;
                    }
                }),
                _ => {}
            }
            assert_eq!(message, of(event.clone()), "{line}");
        }
    }
}

/// Of a call with this input: what tells it apart, and whether it waits.
fn call(tool: &str, input: &str) -> (u64, Aim) {
    let line = format!(
        r#"{{"type":"assistant","message":{{"id":"m","content":[{{"type":"tool_use","id":"c","input":{input},"name":"{tool}"}}]}}}}"#
    );
    let Event::Assistant(answer) = parse_stdout(line.as_bytes()).unwrap().event else { panic!("no answer: {line}") };
    let Block::ToolUse { input_hash, aim, .. } = answer.blocks[0] else { panic!("no call: {line}") };
    (input_hash, aim)
}

#[test]
fn equal_inputs_are_one_call_and_others_are_not() {
    for (tool, one, same) in [
        ("Read", r#"{"a":1,"b":[1,{"c":null,"d":true}]}"#, r#"{ "b" : [1, {"d":true, "c":null}], "a":1 }"#),
        ("Read", r#"{"é":"\u00e9\n"}"#, "{\"\\u00e9\":\"é\\n\"}"),
        ("Bash", r#"{"command":"ls","description":"List"}"#, r#"{"description":"List them","command":"ls"}"#),
    ] {
        assert_eq!(call(tool, one), call(tool, same), "{one} {same}");
    }
    for (tool, one, other) in [
        ("Read", r#"{"a":1}"#, r#"{"a":"1"}"#),
        ("Read", r#"{"a":[1,2]}"#, r#"{"a":[2,1]}"#),
        ("Read", r#"{"a":"x","b":"y"}"#, r#"{"a":"y","b":"x"}"#),
        ("Read", r#"{"a":{}}"#, r#"{"a":[]}"#),
        ("Read", "[]", "{}"),
        ("Edit", r#"{"command":"ls","description":"List"}"#, r#"{"command":"ls","description":"List them"}"#),
    ] {
        assert_ne!(call(tool, one), call(tool, other), "{one} {other}");
    }
}

#[test]
fn a_command_works_or_looks_or_waits() {
    for (command, aim) in [
        ("sleep 5", Aim::Wait),
        ("make; sleep 5&& tail log", Aim::Wait),
        (r"until curl -s x\ndo sleep 1\ndone", Aim::Wait),
        ("gh run watch 7", Aim::Wait),
        ("kubectl wait --for=condition=ready pod/a", Aim::Wait),
        ("bash -c 'sleep 30; cat log'", Aim::Wait),
        (r#"ssh host \"sleep 5\""#, Aim::Wait),
        ("python3 -c 'import time; time.sleep(9)'", Aim::Wait),
        ("pwsh -c 'Start-Sleep 9'", Aim::Wait),
        ("/bin/sleep 9", Aim::Wait),
        ("docker compose up --wait", Aim::Wait),
        ("helm upgrade a b --wait=true", Aim::Wait),
        ("kubectl rollout status deploy/web --timeout=60s", Aim::Wait),
        ("cat /tmp/claude-0/-work/5f/tasks/b7.output", Aim::Wait),
        ("gh pr checks 7 | cat", Aim::Look),
        ("cd /work && kubectl -n web get pods 2>&1 | tail -3", Aim::Look),
        ("tail -3 build.log", Aim::Look),
        ("curl -s localhost/health || true", Aim::Look),
        ("aws ecs describe-services --services web", Aim::Look),
        ("tmux capture-pane -p", Aim::Look),
        ("tmux send-keys -t a Down", Aim::Press),
        ("tmux send-keys -t a Down; tmux capture-pane -p", Aim::Press),
        ("cat sleep.rs wait/watch.txt", Aim::Work),
        ("npm test", Aim::Work),
        ("npm test 2>&1 | tail -20", Aim::Work),
        ("npm test; curl localhost", Aim::Work),
        ("jest --watch=false", Aim::Work),
        ("kubectl apply -f a.yaml", Aim::Work),
        ("git status", Aim::Work),
        ("", Aim::Work),
    ] {
        assert_eq!(call("Bash", &format!(r#"{{"command":"{command}"}}"#)).1, aim, "{command}");
        assert_eq!(call("Grep", &format!(r#"{{"command":"{command}"}}"#)).1, Aim::Work, "{command}");
    }
    for (tool, aim) in [
        ("BashOutput", Aim::Wait),
        ("mcp__browser__wait_for", Aim::Wait),
        ("mcp__x__TaskOutput", Aim::Wait),
        ("mcp__ci__getBuildStatus", Aim::Look),
        ("mcp__browser__press_key", Aim::Press),
        ("mcp__tracker__show", Aim::Work),
        ("Write", Aim::Work),
    ] {
        assert_eq!(call(tool, "{}").1, aim, "{tool}");
    }
    let read = |path: &str| call("Read", &format!(r#"{{"file_path":"{path}"}}"#)).1;
    assert_eq!((read("/tmp/claude-0/-srv-app/5f/tasks/b7.output"), read("/srv/app/tasks/b7.md")), (Aim::Wait, Aim::Work));
}

#[test]
fn errors_that_differ_in_their_numbers_are_one_kind() {
    let error = |text: &str| {
        let line = format!(
            r#"{{"type":"user","message":{{"content":[{{"type":"tool_result","content":"{text}","is_error":true,"tool_use_id":"a"}}]}}}}"#
        );
        let Event::User(user) = parse_stdout(line.as_bytes()).unwrap().event else { panic!("no user: {line}") };
        (user.results[0].error_hash, user.results[0].hash)
    };
    let (one, other) = (error("error at 12:07, request req_011x"), error("error at 9:13, request req_7y"));
    assert_eq!(one.0, other.0);
    assert_ne!(one.1, other.1);
    assert_ne!(one.0, error("warning at 12:07, request req_011x").0);
    assert_eq!(error("Exit code 1").0, 0, "it does not say what went wrong");
    // The CLI names what it is about behind the first line.
    let own = |what: &str| error(&format!(r"<tool_use_error>String not found\nString: {what}")).0;
    assert_eq!(own("a"), own("b"));
    assert_ne!(error(r"Exit code 1\na").0, error(r"Exit code 1\nb").0);
}

#[test]
fn a_field_of_the_wrong_type_is_absent_and_counted() {
    for (line, misshapen) in [
        (r#"{"type":"result","num_turns":"4"}"#, 1),
        (r#"{"type":"result","num_turns":-4,"duration_ms":1e999,"total_cost_usd":-1,"usage":7}"#, 4),
        (r#"{"type":"result","num_turns":[{"a":[]}],"is_error":"yes","modelUsage":[]}"#, 3),
        (r#"{"type":"result","num_turns":null,"is_error":null,"modelUsage":null,"usage":null}"#, 0),
        (r#"{"type":"result","usage":{"input_tokens":99999999999999999999999}}"#, 1),
        (r#"{"type":"result","usage":{"input_tokens":{},"cache_creation":1}}"#, 2),
        (r#"{"type":"result","session_id":7,"parent_tool_use_id":{}}"#, 2),
        (r#"{"type":"assistant","message":"hi"}"#, 1),
        (r#"{"type":"assistant","message":{"content":[1,"a",{"type":7}]}}"#, 3),
        (r#"{"type":"user","message":{"content":[{"type":"tool_result"}]},"tool_use_result":[1]}"#, 0),
        // What comes twice is no reason to lose the rest; so is what nobody asked for.
        (r#"{"type":"result","num_turns":1,"num_turns":2,"type":"result","x":{"num_turns":"a"}}"#, 0),
    ] {
        for message in [parse_stdout(line.as_bytes()), parse_stdin(line.as_bytes())] {
            assert_eq!(message.map(|message| message.misshapen), Ok(misshapen), "{line}");
        }
    }
    // A float that is a whole number is one; a count that fits is kept.
    let line = br#"{"type":"result","num_turns":3.0,"duration_ms":18446744073709551615,"queued_turn_count":1e2}"#;
    let Event::Result(result) = parse_stdout(line).unwrap().event else { panic!("no result") };
    assert_eq!((result.num_turns, result.duration_ms, result.queued), (3, u64::MAX, 100));
}

#[test]
fn a_broken_line_says_why() {
    let nested = |n: usize| format!(r#"{{"type":"keep_alive","a":{}{}}}"#, "[".repeat(n), "]".repeat(n));
    for (line, expected) in [
        ("hello", Broken::NotJson),
        ("[SandboxDebug] x", Broken::NotJson),
        ("{\"type\":\"x\"} {}", Broken::NotJson),
        ("{\"type\":\"x\",}", Broken::NotJson),
        ("{\"type\":\"x\" \"a\":1}", Broken::NotJson),
        ("{\"type\":\"x\",\"a\":01}", Broken::NotJson),
        ("{\"type\":\"x\",\"a\":tru}", Broken::NotJson),
        ("{\"type\":\"x\",\"a\":[1}]", Broken::NotJson),
        ("\0\0\0", Broken::NotJson),
        ("{\"type\":\"x\",\0}", Broken::NotJson),
        ("42", Broken::NotObject),
        ("\"text\"", Broken::NotObject),
        ("{}", Broken::NoType),
        ("{\"a\":1}", Broken::NoType),
        ("{\"type\":7}", Broken::NoType),
        ("", Broken::Truncated),
        ("{", Broken::Truncated),
        ("{\"type\":\"res", Broken::Truncated),
        ("{\"type\":\"result\",\"num_turns\":", Broken::Truncated),
        ("{\"type\":\"x\",\"a\":tr", Broken::Truncated),
        ("{\"type\":\"x\",\"a\":\"\\", Broken::Truncated),
        (&nested(200), Broken::NotJson),
    ] {
        assert_eq!(parse_stdout(line.as_bytes()), Err(expected), "{line}");
    }
    parse_stdout(nested(120).as_bytes()).unwrap();
}

#[test]
fn bytes_that_are_no_text_do_not_cost_the_line() {
    let message = parse_stdout(b"{\"type\":\"user\",\"session_id\":\"s\xff\",\"message\":{\"content\":\"\xc3\x28\"}}").unwrap();
    assert_eq!(message.session_id.as_deref(), Some("s\u{fffd}"));
    assert!(matches!(message.event, Event::User(User { prompt: true, .. })));
}

#[test]
fn names_are_cut_to_what_names_have() {
    let long = "é".repeat(5_000);
    let message = parse_stdout(format!(r#"{{"type":"{long}","subtype":"{long}","session_id":"{long}"}}"#).as_bytes()).unwrap();
    assert_eq!(message.session_id.map(|id| id.len()), Some(256));
    assert_eq!(message.event, Event::Unknown { kind: "é".repeat(32), subtype: Some("é".repeat(32)) });
}

#[test]
fn of_a_list_that_breaks_off_the_messages_before_count() {
    let alive = Message { event: Event::KeepAlive, ..Message::default() };
    for (line, expected) in [
        ("[]", Ok(vec![])),
        ("[{\"type\":\"keep_alive\"}, {}]", Ok(vec![Ok(alive.clone()), Err(Broken::NoType)])),
        ("[{\"type\":\"keep_alive\"},{\"type\":\"res", Ok(vec![Ok(alive.clone()), Err(Broken::Truncated)])),
        ("[{\"type\":\"keep_alive\"}", Ok(vec![Ok(alive.clone()), Err(Broken::Truncated)])),
        ("[{\"type\":\"keep_alive\"}] x", Ok(vec![Ok(alive), Err(Broken::NotJson)])),
        ("[1]", Ok(vec![Err(Broken::NotObject)])),
        ("[{\"type\":", Err(Broken::Truncated)),
        ("[debug] x", Err(Broken::NotJson)),
        ("{}", Err(Broken::NoType)),
    ] {
        assert_eq!(parse_array(line.as_bytes()), expected, "{line}");
    }
}

/// Text as an answer may have it, and as somebody would write it who wants to be taken for a message.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z .]{0,40}",
        "(?s).{0,60}",
        Just(r#""},"type":"result","total_cost_usd":1000,"x":""#.to_owned()),
        Just("\"}},\"session_id\":\"x\",\"parent_tool_use_id\":null,\"uuid\":\"y\"}\n{\"type\":\"result\"".to_owned()),
        Just("\\\"\\\\".to_owned()),
        Just("\u{1f600}\u{0}\u{7f}".to_owned()),
    ]
}

/// Lines like a delta, most of them not quite one.
fn like_a_delta() -> impl Strategy<Value = String> {
    let json = |text: String| serde_json::to_string(&text).unwrap();
    let key = prop_oneof![
        4 => Just(r#""text_delta","text""#),
        3 => Just(r#""input_json_delta","partial_json""#),
        3 => Just(r#""thinking_delta","thinking""#),
        1 => Just(r#""signature_delta","signature""#),
        1 => Just(r#""text_delta","thinking""#),
    ];
    let index =
        prop_oneof![6 => Just("0"), 2 => Just("12"), 1 => Just("01"), 1 => Just("-1"), 1 => Just("\"1\""), 1 => Just("1.5")];
    let parent = prop_oneof![6 => Just("null".to_owned()), 1 => text().prop_map(json)];
    let extra = prop_oneof![
        6 => Just(String::new()),
        2 => text().prop_map(move |t| format!(",\"thinking_display\":{}", json(t))),
        1 => Just(",\"type\":\"result\"".to_owned()),
        1 => Just(",\"session_id\":\"other\"".to_owned()),
        1 => Just(",\"event\":{\"type\":\"message_stop\"}".to_owned()),
        1 => Just(",\"uuid\":null".to_owned()),
    ];
    let api = prop_oneof![5 => text().prop_map(move |t| format!(",\"api_message_id\":{}", json(t))), 1 => Just(String::new())];
    let tail = prop_oneof![8 => Just("}"), 1 => Just("} "), 1 => Just(""), 1 => Just("}}"), 1 => Just("}{\"type\":\"result\"}")];
    (key, index, text(), text(), parent, extra, (api, any::<bool>(), tail)).prop_map(
        move |(key, index, content, session, parent, extra, (api, first, tail))| {
            let (before, behind) = if first { (extra, api) } else { (api, extra) };
            format!(
                r#"{{"type":"stream_event","event":{{"type":"content_block_delta","index":{index},"delta":{{"type":{key}:{}}}}},"session_id":{},"parent_tool_use_id":{parent},"uuid":"u"{before}{behind}{tail}"#,
                json(content),
                json(session),
            )
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// stdin's lines never take the short cut.
    #[test]
    fn the_short_cut_says_what_the_long_way_says(line in like_a_delta(), cut in any::<proptest::sample::Index>(), flip in any::<u8>()) {
        prop_assert_eq!(parse_stdout(line.as_bytes()), parse_stdin(line.as_bytes()));
        let at = cut.index(line.len());
        prop_assert_eq!(parse_stdout(&line.as_bytes()[..at]), parse_stdin(&line.as_bytes()[..at]));
        let mut bytes = line.into_bytes();
        bytes[at] = flip;
        prop_assert_eq!(parse_stdout(&bytes), parse_stdin(&bytes));
    }

    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let (_, _, _) = (parse_stdout(&bytes), parse_stdin(&bytes), parse_array(&bytes));
    }

    #[test]
    fn bytes_of_json_are_survived(text in r#"[\[\]{}:,"\\0-9a-u.+-]{0,60}"#) {
        let whole = serde_json::from_str::<Value>(&text);
        // Numbers out of range are JSON to us, and what is in strings is not looked at; but what is JSON is so to us.
        if let Err(Broken::NotJson | Broken::Truncated) = parse_stdout(text.as_bytes()) {
            prop_assert!(whole.is_err());
        }
    }

    /// A recorded line with something else in place of one of its values still is a message, of the same kind.
    #[test]
    fn a_line_with_a_strange_value_is_still_a_message(n in any::<proptest::sample::Index>(), place in any::<proptest::sample::Index>(), strange in 0usize..8) {
        let lines = LINES.with(|lines| lines.clone());
        let mut value: Value = lines[n.index(lines.len())].clone();
        let strange = [
            Value::Null, Value::from(-1), Value::from(1e300), Value::from(u64::MAX), Value::from("x"), Value::from(vec![1]),
            serde_json::json!({ "type": "result" }), Value::from(true),
        ][strange].clone();
        let places = places(&value);
        let pointer = &places[place.index(places.len())];
        *value.pointer_mut(pointer).unwrap() = strange;
        let line = serde_json::to_vec(&value).unwrap();
        match parse_stdout(&line) {
            Ok(_) => {}
            Err(broken) => prop_assert!(broken == Broken::NoType && pointer == "/type", "{broken:?} at {pointer}"),
        }
    }

    /// Cut anywhere, a recorded line is cut off, and nothing else.
    #[test]
    fn a_line_cut_anywhere_is_cut_off(n in any::<proptest::sample::Index>(), at in any::<proptest::sample::Index>()) {
        let lines = LINES.with(|lines| lines.clone());
        let line = serde_json::to_vec(&lines[n.index(lines.len())]).unwrap();
        let at = at.index(line.len());
        prop_assert_eq!(parse_stdout(&line[..at]), Err(Broken::Truncated));
    }
}

thread_local! {
    /// One recorded line of each length: of every kind, and not the same hundred deltas.
    static LINES: std::rc::Rc<Vec<Value>> = std::rc::Rc::new({
        let mut lines: Vec<Vec<u8>> = recorded().into_iter().map(|(_, _, line)| line).filter(|line| line.len() < 8_000).collect();
        lines.sort_by_key(Vec::len);
        lines.dedup_by_key(|line| line.len());
        lines.iter().filter_map(|line| serde_json::from_slice::<Value>(line).ok()).filter(Value::is_object).collect()
    });
}

/// The way to each value in a value.
fn places(value: &Value) -> Vec<String> {
    let escape = |key: &str| key.replace('~', "~0").replace('/', "~1");
    let inner: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(key, value)| (escape(key), value)).collect(),
        Value::Array(elements) => elements.iter().enumerate().map(|(n, value)| (n.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    inner
        .into_iter()
        .flat_map(|(key, value)| {
            std::iter::once(format!("/{key}")).chain(places(value).into_iter().map(move |rest| format!("/{key}{rest}")))
        })
        .collect()
}

//! What happens when, as trees. Time is moved, never waited for.

use std::collections::BTreeSet;
use std::time::Duration;

use agent_sidecar_core::content::Gates;
use agent_sidecar_core::limit::{Ceiling, Limit, Mode, Rule, Scope};
use agent_sidecar_core::span::{Sampler, Semconv, TraceSettings};
use agent_sidecar_core::telemetry::{Context, Span, Status, Value};
use agent_sidecar_core::update::Start;
use agent_sidecar_core::{Exit, Input, Now, Settings, Signal, Stop};

use crate::{DAY, GIVEN, Run, get, int, is_turn, text, told_alike, trace};

const SESSION: &str = "5f0a2f6e-95cb-4b0f-a56c-0a3e2d1c9b7f";

#[test]
fn a_call_waits_for_a_person_and_for_a_tool_of_the_app() {
    let mut run = Run::live(trace(), &[]);
    run.ask().at(1.0).init("s").at(2.0).answer(1, None, Some(("toolu_1", "mcp__my_calc__add")));
    run.at(3.0).cli(
        r#"{"type":"control_request","request_id":"p1","request":{"subtype":"can_use_tool","tool_name":"mcp__my_calc__add","input":{"secret":1},"tool_use_id":"toolu_1"}}"#,
    );
    run.at(63.0).app(
        r#"{"type":"control_response","response":{"subtype":"success","request_id":"p1","response":{"behavior":"allow","updatedInput":{}}}}"#,
    );
    run.at(64.0).cli(
        r#"{"type":"control_request","request_id":"m1","request":{"subtype":"mcp_message","server_name":"my calc","message":{"jsonrpc":"2.0","id":3,"method":"tools/call","params":{"name":"add"}}}}"#,
    );
    run.at(66.0).app(r#"{"type":"control_response","response":{"subtype":"success","request_id":"m1","response":{}}}"#);
    run.at(67.0).tool_result("toolu_1", None, false).at(69.0).answer(2, None, None).at(70.0).result("s", "success", "completed");
    run.exit(Exit::Code(0));
    assert_eq!(
        run.tree(),
        "invoke_agent claude-code 0-70 outcome=success
  chat claude-opus-5-5 0-2 timing=inferred
  execute_tool mcp__my_calc__add 2-67 outcome=ok
    permission mcp__my_calc__add 3-63 decision=allow
    mcp my calc 64-66
  chat claude-opus-5-5 67-69 timing=inferred"
    );
    let tool = run.one("execute_tool mcp__my_calc__add");
    assert_eq!((text(tool, "gen_ai.tool.type"), text(tool, "gen_ai.tool.call.id")), ("extension", "toolu_1"));
    assert_eq!(tool.status, Status::Unset);
    let decided = run.logs.iter().find(|event| event.name == "permission.decided").unwrap();
    assert_eq!(decided.context, Some(run.one("permission mcp__my_calc__add").context));
    assert!(decided.attributes.contains(&("claude_agent.wait_seconds", Value::Float(60.0))), "{:?}", decided.attributes);
}

#[test]
fn subagents_nest_and_those_in_the_background_outlive_their_call_and_their_turn() {
    let started = |call: &str, task: &str, background: bool| {
        format!(
            r#"{{"type":"system","subtype":"task_started","session_id":"s","task_id":"{task}","tool_use_id":"{call}","task_type":"local_agent","subagent_type":"explorer","spawn_depth":1,"is_backgrounded":{background}}}"#
        )
    };
    let mut run = Run::live(trace(), &[]);
    run.ask().init("s").at(1.0).answer(1, None, Some(("fore", "Agent"))).cli(&started("fore", "t1", false));
    run.at(2.0).answer(2, Some("fore"), Some(("inner", "Bash"))).at(3.0).tool_result("inner", Some("fore"), true);
    run.at(4.0)
        .answer(3, Some("fore"), None)
        .at(5.0)
        .cli(r#"{"type":"system","subtype":"task_notification","session_id":"s","task_id":"t1","status":"completed"}"#);
    run.tool_result("fore", None, false).at(6.0).answer(4, None, Some(("back", "Agent"))).cli(&started("back", "t2", true));
    run.at(7.0).tool_result("back", None, false).at(8.0).answer(5, None, None).at(9.0).result("s", "success", "completed");
    // The agent goes on; the main loop joins in when it has ended.
    run.at(20.0).answer(6, Some("back"), Some(("late", "Bash"))).at(30.0).tool_result("late", Some("back"), false);
    run.at(40.0).cli(r#"{"type":"system","subtype":"task_notification","session_id":"s","task_id":"t2","status":"completed"}"#);
    run.at(41.0).init("s").at(42.0).answer(7, None, None).at(43.0).result("s", "success", "completed").exit(Exit::Code(0));
    assert_eq!(
        run.tree(),
        "invoke_agent claude-code 0-9 outcome=success
  chat claude-opus-5-5 0-1 timing=inferred
  execute_tool Agent 1-5 outcome=ok
    invoke_agent explorer 1-5 outcome=completed
      chat claude-opus-5-5 1-2 timing=inferred
      execute_tool Bash 2-3 outcome=error !tool_error
      chat claude-opus-5-5 3-4 timing=inferred
  chat claude-opus-5-5 5-6 timing=inferred
  execute_tool Agent 6-7 outcome=ok
    invoke_agent explorer 6-40 outcome=completed
      chat claude-opus-5-5 6-20 timing=inferred
      execute_tool Bash 20-30 outcome=ok
  chat claude-opus-5-5 7-8 timing=inferred
invoke_agent claude-code 41-43 outcome=success
  chat claude-opus-5-5 41-42 timing=inferred"
    );
    let traces: BTreeSet<_> = run.spans.iter().map(|span| span.context.trace).collect();
    assert_eq!(traces.len(), 2);
}

#[test]
fn what_goes_on_between_turns_belongs_to_the_turn_before_or_to_a_root_of_its_own() {
    let hook = |id: &str, event: &str, outcome: Option<&str>| match outcome {
        None => {
            format!(r#"{{"type":"system","subtype":"hook_started","session_id":"s","hook_id":"{id}","hook_event":"{event}"}}"#)
        }
        Some(outcome) => format!(
            r#"{{"type":"system","subtype":"hook_response","session_id":"s","hook_id":"{id}","hook_event":"{event}","outcome":"{outcome}"}}"#
        ),
    };
    let mut run = Run::live(trace(), &[]);
    run.cli(&hook("a", "SessionStart", None)).at(1.0).cli(&hook("b", "SessionStart", None));
    run.at(2.0).cli(&hook("a", "SessionStart", Some("success"))).at(3.0).cli(&hook("b", "SessionStart", Some("error")));
    run.at(4.0).ask().init("s").at(5.0).answer(1, None, None).at(6.0).result("s", "success", "completed");
    run.at(7.0).cli(&hook("c", "Notification", None)).at(8.0).cli(&hook("c", "Notification", Some("success")));
    run.at(9.0).exit(Exit::Code(0));
    assert_eq!(
        run.tree(),
        "claude_agent.background 0-3
  hook SessionStart 0-2 outcome=success
  hook SessionStart 1-3 outcome=error !hook_error
invoke_agent claude-code 4-6 outcome=success
  chat claude-opus-5-5 4-5 timing=inferred
  hook Notification 7-8 outcome=success"
    );
}

#[test]
fn a_crash_closes_all_that_is_open() {
    let mut run = Run::live(trace(), &[]);
    run.ask().init("s").at(1.0).answer(1, None, Some(("toolu_1", "Bash"))).at(2.0);
    run.cli(
        r#"{"type":"control_request","request_id":"p1","request":{"subtype":"can_use_tool","tool_name":"Bash","tool_use_id":"toolu_1"}}"#,
    );
    run.cli(r#"{"type":"system","subtype":"hook_started","session_id":"s","hook_id":"h","hook_event":"PreToolUse"}"#);
    run.at(3.0);
    let turn = run.monitor.context();
    run.exit(Exit::Signal(11));
    assert_eq!(turn, Some(run.one("invoke_agent claude-code").context), "what exemplars point at");
    assert_eq!(
        run.tree(),
        "invoke_agent claude-code 0-3 outcome=crashed closed_by=sidecar !crashed
  chat claude-opus-5-5 0-1 timing=inferred closed_by=sidecar !crash
  execute_tool Bash 1-3 outcome=lost closed_by=sidecar !crash
    permission Bash 2-3 decision=cancelled closed_by=sidecar !crash
  hook PreToolUse 2-3 closed_by=sidecar !crash"
    );
    assert_eq!(run.monitor.context(), None);
    let names: Vec<_> = run.logs.iter().map(|event| event.name).collect();
    assert_eq!(
        names,
        [
            "turn.started",
            "session.started",
            "request.completed",
            "tool.completed",
            "result.missing",
            "turn.ended",
            "process.exited",
            "session.ended"
        ]
    );
}

#[test]
fn a_limit_says_on_the_turn_what_was_decided_and_done() {
    let rules = [Rule {
        limit: Limit::Duration,
        scope: Scope::Turn,
        ceiling: Ceiling::Time(Duration::from_secs(10)),
        mode: Mode::Enforce,
    }];
    let mut run = Run::live(trace(), &rules);
    run.ask().init("s").at(1.0).answer(1, None, Some(("toolu_1", "Bash"))).at(10.5);
    run.tool_result("toolu_1", None, true).result("s", "error_during_execution", "aborted_tools");
    // Nobody answers the next time: asked harder, and killed.
    run.at(20.0).ask().at(21.0).answer(2, None, Some(("toolu_2", "Bash"))).at(60.0).exit(Exit::Signal(9));
    assert_eq!(
        run.tree(),
        "invoke_agent claude-code 0-10.5 outcome=limit_stopped limit=duration !limit_stopped [limit] [limit] [limit] [limit] [step] [enforced]
  chat claude-opus-5-5 0-1 timing=inferred
  execute_tool Bash 1-10.5 outcome=error limit=duration !tool_error
invoke_agent claude-code 20-60 outcome=limit_stopped limit=duration closed_by=sidecar !limit_stopped [limit] [limit] [limit] [limit] [step]
  chat claude-opus-5-5 20-21 limit=duration timing=inferred closed_by=sidecar !limit
  execute_tool Bash 21-60 outcome=interrupted limit=duration closed_by=sidecar !limit
  shutdown 33-60 limit=duration reason=limit [step] [step] [step] [enforced]"
    );
    let keep = run.spans.iter().filter(|span| get(span, "claude_agent.keep").is_some()).count();
    assert_eq!(keep, run.spans.len() - 1, "only a request that came to its end is like any other");
    told_alike(&run);
    let enforced: Vec<_> = run.logs.iter().filter(|event| event.name == "limit.enforced").collect();
    assert_eq!(enforced.len(), 4);
    assert!(enforced[1].attributes.contains(&("claude_agent.latency_seconds", Value::Float(0.5))), "{enforced:?}");
    assert!(enforced[3].attributes.contains(&("claude_agent.action", Value::Str("kill".into()))), "{enforced:?}");
}

#[test]
fn a_stop_from_outside_is_a_span_with_its_steps() {
    let mut run = Run::live(trace(), &[]);
    run.ask().init("s").at(1.0).answer(1, None, None).at(2.0).result("s", "success", "completed");
    run.at(10.0).put(Input::Stop(Stop::Signal(Signal(15)))).at(14.0).exit(Exit::Code(143));
    assert_eq!(
        run.tree(),
        "invoke_agent claude-code 0-2 outcome=success
  chat claude-opus-5-5 0-1 timing=inferred
shutdown 10-14 reason=shutdown [step] [step] [enforced]"
    );
    // Idle is no part of the turn, but comes after it.
    let (turn, shutdown) = (run.one("invoke_agent claude-code"), run.one("shutdown"));
    assert_ne!(turn.context.trace, shutdown.context.trace);
    assert_eq!(shutdown.links[0].to, turn.context);
    assert!(!run.logs.iter().any(|event| event.name == "limit.enforced"), "nobody's limit was enforced");
}

#[test]
fn turns_are_linked_and_the_first_says_where_its_session_comes_from() {
    let mut run = Run::new(
        Settings {
            trace: trace(),
            events: true,
            start: Start::Fork,
            resume: Some(String::from("11111111-2222-3333-4444-555555555555")),
            ..Settings::default()
        },
        false,
    );
    for session in [SESSION, SESSION] {
        run.ask().init(session).result(session, "success", "completed");
    }
    // `/clear`: another session, which goes on from this one.
    run.cli(&format!(r#"{{"type":"conversation_reset","session_id":"{SESSION}"}}"#));
    let other = "99999999-95cb-4b0f-a56c-0a3e2d1c9b7f";
    run.ask().init(other).result(other, "success", "completed").exit(Exit::Code(0));
    let turns = run.named("invoke_agent claude-code");
    let said = |turn: &Span| {
        let said = |key| get(turn, key).map(|_| text(turn, key).to_owned()).unwrap_or_default();
        [said("gen_ai.conversation.id"), said("claude_agent.session.start"), said("claude_agent.session.from")]
    };
    assert_eq!(said(turns[0]), [SESSION, "fork", "11111111-2222-3333-4444-555555555555"]);
    assert_eq!(said(turns[1]), [SESSION, "", ""]);
    assert_eq!(said(turns[2]), [other, "clear", SESSION]);
    assert!(turns[0].links.is_empty());
    for (turn, before) in [(turns[1], turns[0]), (turns[2], turns[1])] {
        assert_eq!(turn.links[0].to, before.context);
        assert_ne!(turn.context.trace, before.context.trace);
    }
    told_alike(&run);

    // What another process has told of the session, or of the one that it is a fork of, is gone on from, too.
    let before = "11111111-2222-3333-4444-555555555555";
    let known = Context::from_traceparent(GIVEN).unwrap();
    for (start, told) in [(Start::Resume, SESSION), (Start::Continue, SESSION), (Start::Fork, before), (Start::Fresh, "other")] {
        let turns = [(told.to_owned(), known)].into();
        let resume = matches!(start, Start::Resume | Start::Fork).then(|| told.to_owned());
        let settings = Settings { trace: TraceSettings { turns, ..trace() }, start, resume, ..Settings::default() };
        let mut run = Run::new(settings, false);
        for _ in 0..2 {
            run.ask().init(SESSION).result(SESSION, "success", "completed");
        }
        let turns = run.named("invoke_agent claude-code");
        let links = |turn: &Span| turn.links.iter().map(|link| link.to).collect::<Vec<_>>();
        assert_eq!(links(turns[0]), if start == Start::Fresh { vec![] } else { vec![known] }, "{start:?}");
        assert_eq!(links(turns[1]), [turns[0].context]);
    }

    // A name or a path that was given in place of an id is nobody's business.
    let settings =
        Settings { trace: trace(), start: Start::Resume, resume: Some(String::from("/home/me/s.jsonl")), ..Settings::default() };
    let mut run = Run::new(settings, false);
    run.ask().init(SESSION).result(SESSION, "success", "completed").exit(Exit::Code(0));
    assert_eq!(said(run.one("invoke_agent claude-code")), [SESSION, "resume", ""]);
}

#[test]
fn content_is_told_where_its_gate_is_open_and_in_spans_alone() {
    let told = |gates: Gates| {
        let mut run = Run::live(TraceSettings { gates, ..trace() }, &[]);
        run.ask().init("s").answer(1, None, Some(("t1", "Agent"))).answer(2, Some("t1"), Some(("t2", "Bash")));
        run.tool_result("t2", Some("t1"), false).answer(3, Some("t1"), None).tool_result("t1", None, false);
        run.answer(4, None, None).result("s", "success", "completed").exit(Exit::Code(0));
        assert!(run.logs.iter().all(|event| !format!("{event:?}").contains("do it")));
        told_alike(&run);
        let mut said: Vec<String> = Vec::new();
        for span in &run.spans {
            for (key, value) in &span.attributes {
                if ["messages", "arguments", "result"].iter().any(|end| key.ends_with(end)) {
                    let Value::Str(text) = value else { panic!("{value:?}") };
                    said.push(format!("{} {key} {text}", span.name));
                }
            }
        }
        said.sort();
        said.join("\n")
    };
    let shut = Gates::default();
    assert_eq!(told(shut.clone()), "");
    assert_eq!(
        told(Gates { prompts: true, ..shut.clone() }),
        r#"invoke_agent claude-code gen_ai.input.messages [{"parts":[{"content":"do it","type":"text"}],"role":"user"}]"#
    );
    let message = r#"[{"finish_reason":"error","parts":[{"content":"done","type":"text"}],"role":"assistant"}]"#;
    let line = format!("chat claude-opus-5-5 gen_ai.output.messages {message}");
    assert_eq!(told(Gates { answers: true, ..shut.clone() }), format!("{line}\n{line}"));
    assert_eq!(
        told(Gates { tool_inputs: true, ..shut.clone() }),
        "execute_tool Agent gen_ai.tool.call.arguments {\"secret\":1}\nexecute_tool Bash gen_ai.tool.call.arguments {\"secret\":1}"
    );
    assert_eq!(
        told(Gates { tool_outputs: true, secrets: vec![String::from("no")], ..shut }),
        "execute_tool Agent gen_ai.tool.call.result [scrubbed]\nexecute_tool Bash gen_ai.tool.call.result [scrubbed]"
    );
}

#[test]
fn if_we_are_killed_what_was_under_way_has_been_told_to_whoever_comes_next() {
    let now = |run: &Run| Now { mono: run.now, unix: run.day + run.now };
    let mut run = Run::live(trace(), &[]);
    assert_eq!(run.monitor.last_words(now(&run)), (vec![], vec![]), "nothing has begun");
    run.ask().init("s").at(2.0).answer(1, None, Some(("toolu_1", "Bash"))).at(5.0);
    let before = run.spans.len();
    let (spans, events) = run.monitor.last_words(now(&run));
    let mut names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["chat claude-opus-5-5", "execute_tool Bash", "invoke_agent claude-code"]);
    let turn = spans.iter().find(|span| span.name.starts_with("invoke_agent")).unwrap();
    assert!(matches!(get(turn, "claude_agent.cost_usd"), Some(Value::Float(usd)) if *usd > 0.0), "what is known of its cost");
    for span in &spans {
        assert_eq!((text(span, "error.type"), text(span, "claude_agent.closed_by")), ("sidecar_lost", "successor"));
        // Of the answer nothing was heard since.
        assert_eq!((span.end - DAY).as_secs_f64(), if span.name.starts_with("chat") { 2.0 } else { 5.0 });
    }
    let said: Vec<&str> = events.iter().map(|event| event.name).collect();
    assert_eq!(said, ["request.completed", "tool.completed", "result.missing", "turn.ended", "process.exited", "session.ended"]);
    assert_eq!(events[0].sequence, run.logs.last().unwrap().sequence + 1);
    // Asked or not, nothing changes: the turn ends as ever, under the same ids.
    assert_eq!(run.spans.len(), before);
    run.at(6.0).tool_result("toolu_1", None, false).at(7.0).result("s", "success", "completed");
    assert_eq!(run.one("invoke_agent claude-code").context, turn.context);
    assert_eq!(run.monitor.last_words(now(&run)), (vec![], vec![]), "nothing is under way");
    run.exit(Exit::Code(0));
    assert_eq!(run.monitor.last_words(now(&run)), (vec![], vec![]));
    told_alike(&run);
}

#[test]
fn a_sampler_keeps_whole_traces_and_heeds_the_app_where_it_is_to() {
    let kept = |sampler: Sampler, parent: Option<Context>| {
        let mut run = Run::live(TraceSettings { sampler, parent, ..trace() }, &[]);
        for n in 0..200 {
            run.ask().init("s").answer(n, None, None).result("s", "success", "completed");
        }
        run.exit(Exit::Code(0));
        let turns = run.spans.iter().filter(|span| is_turn(span) && span.context.sampled);
        let traces: BTreeSet<_> = turns.map(|turn| turn.context.trace).collect();
        assert!(run.spans.iter().all(|span| span.context.sampled == traces.contains(&span.context.trace)));
        run.spans.iter().filter(|span| is_turn(span) && span.context.sampled).count()
    };
    let given = Context::from_traceparent(GIVEN);
    let dropped = given.map(|context| Context { sampled: false, ..context });
    assert_eq!(kept(Sampler { ratio: 0.0, follow: true }, None), 0);
    assert!((20..=80).contains(&kept(Sampler { ratio: 0.25, follow: true }, None)));
    assert_eq!(kept(Sampler { ratio: 0.0, follow: true }, given), 200);
    assert_eq!(kept(Sampler { ratio: 0.0, follow: false }, given), 0);
    assert_eq!(kept(Sampler { ratio: 1.0, follow: false }, dropped), 200);
}

#[test]
fn the_apps_span_is_the_parent_of_every_turn() {
    let parent = Context::from_traceparent(&GIVEN.replace("-01", "-00")).unwrap();
    let mut run = Run::live(TraceSettings { parent: Some(parent), ..trace() }, &[]);
    run.ask().init("s").answer(1, None, None).result("s", "success", "completed");
    run.ask().answer(2, None, None).result("s", "success", "completed").exit(Exit::Code(0));
    for turn in run.named("invoke_agent claude-code") {
        assert_eq!((turn.context.trace, turn.parent), (parent.trace, Some(parent.span)));
    }
    assert!(run.spans.iter().all(|span| !span.context.sampled), "who does not sample does not want the rest of it, either");
    assert_eq!(run.monitor.child_context(), Some(parent));
}

#[test]
fn a_request_that_never_succeeds_is_a_failed_one() {
    let retry = r#"{"type":"system","subtype":"api_retry","session_id":"s","attempt":1,"max_retries":10,"retry_delay_ms":500,"error_status":529,"error":"overloaded"}"#;
    let mut run = Run::live(trace(), &[]);
    run.ask().init("s").at(1.0).cli(r#"{"type":"system","subtype":"status","status":"requesting","session_id":"s"}"#);
    run.at(2.0).cli(retry).at(3.0).cli(retry).at(4.0).cli(
        r#"{"type":"assistant","session_id":"s","error":"overloaded","message":{"id":"x","model":"<synthetic>","content":[{"type":"text","text":"API Error: secret"}]}}"#,
    );
    run.cli(r#"{"type":"result","session_id":"s","subtype":"success","is_error":true,"terminal_reason":"api_error"}"#);
    run.exit(Exit::Code(1));
    assert_eq!(
        run.tree(),
        "invoke_agent claude-code 0-4 outcome=success_is_error !overloaded [api_retry] [api_retry] [api_error]
  chat claude-opus-5-5 1-4 !overloaded [api_retry] [api_retry]"
    );
    let retry = &run.one("chat claude-opus-5-5").events[0];
    assert!(retry.attributes.contains(&("http.response.status_code", Value::Int(529))), "{retry:?}");
}

#[test]
fn what_is_too_much_is_dropped_and_counted() {
    let mut run = Run::live(trace(), &[]);
    run.ask().init("s");
    for call in 0..1_100 {
        run.answer(1, None, Some((&format!("toolu_{call}"), "Bash")));
    }
    for beat in 0..200 {
        run.cli(&format!(
            r#"{{"type":"tool_progress","session_id":"s","tool_use_id":"toolu_0-heartbeat-{beat}","tool_name":"Bash","parent_tool_use_id":"toolu_0","elapsed_time_seconds":{beat},"heartbeat":true}}"#
        ));
    }
    run.exit(Exit::Signal(9));
    // The turn and its chat are there, too.
    assert_eq!(run.named("execute_tool Bash").len(), 1_022);
    assert_eq!(run.monitor.report().totals().tool_calls["Bash"].error, 1_100);
    let long = run.named("execute_tool Bash").into_iter().find(|span| !span.events.is_empty()).unwrap();
    assert_eq!((long.events.len(), int(long, "claude_agent.events_dropped")), (128, Some(72)));
    assert_eq!(run.monitor.spans_dropped(), 78 + 72);
}

#[test]
fn names_follow_the_version_that_is_wanted() {
    let chat = |semconv| {
        let mut run = Run::live(TraceSettings { semconv, ..trace() }, &[]);
        run.ask().init("s").answer(1, None, None).result("s", "success", "completed").exit(Exit::Code(0));
        run.one("chat claude-opus-5-5").clone()
    };
    let (old, new, both) = (chat(Semconv::V136), chat(Semconv::GenAi01), chat(Semconv::Both));
    for (key, had) in [("gen_ai.system", &old), ("gen_ai.provider.name", &new)] {
        assert_eq!((text(had, key), text(&both, key)), ("anthropic", "anthropic"));
    }
    assert!(get(&old, "gen_ai.provider.name").is_none() && get(&new, "gen_ai.system").is_none());
    // Cached tokens are input, too.
    assert_eq!(int(&new, "gen_ai.usage.input_tokens"), Some(15));
}

#[test]
fn a_clock_that_is_set_back_ends_nothing_before_it_began() {
    let mut run = Run::live(trace(), &[]);
    run.ask().init("s").at(10.0);
    run.day -= Duration::from_secs(3_600);
    run.at(20.0).answer(1, None, None).result("s", "success", "completed").at(30.0).ask().at(31.0).result(
        "s",
        "success",
        "completed",
    );
    run.exit(Exit::Code(0));
    let times: Vec<_> = run.named("invoke_agent claude-code").iter().map(|turn| (turn.start, turn.end)).collect();
    let at = |day: Duration, seconds| day + Duration::from_secs(seconds);
    assert_eq!(times, [(at(DAY, 0), at(DAY, 20)), (at(run.day, 30), at(run.day, 31))]);
}

#[test]
fn some_things_are_told_once() {
    let mut run = Run::live(trace(), &[]);
    for _ in 0..3 {
        run.ask();
        run.cli(
            r#"{"type":"system","subtype":"init","session_id":"s","mcp_servers":[{"name":"a","status":"connected"},{"name":"b","status":"failed"}]}"#,
        );
        run.cli(r#"{"type":"telepathy","session_id":"s"}"#);
        run.cli(r#"{"type":"mail me at me@example.com","session_id":"s"}"#).result("s", "success", "completed");
    }
    let count = |name| run.logs.iter().filter(|event| event.name == name).count();
    assert_eq!((count("mcp.up"), count("mcp.down"), count("event.unknown"), count("turn.ended")), (1, 1, 2, 3));
    let told = run.logs.iter().filter(|event| event.name == "event.unknown").map(|event| event.attributes[1].1.clone());
    assert_eq!(told.collect::<Vec<_>>(), [Value::Str("telepathy".into()), Value::Str("other".into())]);
}

//! What people who watch are told of a session: a fold over what happened, as text.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use agent_sidecar_core::limit::{Ceiling, Limit, Mode, Rule, Scope};
use agent_sidecar_core::timeline::ENTRIES;
use agent_sidecar_core::tokens::Usd;
use agent_sidecar_core::{Exit, Input, Monitor, Now, Settings};
use serde_json::Value;

const DAY: u64 = 1_795_392_000;

struct Watched {
    monitor: Monitor,
    now: f64,
}

impl Watched {
    fn new(rules: Vec<Rule>) -> Watched {
        let settings = Settings { rules, ..Settings::default() };
        let now = Now { mono: Duration::ZERO, unix: Duration::from_secs(DAY) };
        let mut watched = Watched { monitor: Monitor::new(settings, false, now), now: 0.0 };
        watched.put(Input::Spawned { pid: 7 });
        watched
    }

    fn put(&mut self, input: Input<'_>) {
        let mono = Duration::from_secs_f64(self.now);
        self.monitor.handle(Now { mono, unix: Duration::from_secs(DAY) + mono }, input);
        while self.monitor.poll_output().is_some() {}
    }

    /// Half a second later, the CLI says this.
    fn cli(&mut self, line: &str) {
        self.now += 0.5;
        self.put(Input::Stdout(format!("{line}\n").as_bytes()));
    }

    fn app(&mut self, line: &str) {
        self.now += 0.5;
        self.put(Input::Stdin(format!("{line}\n").as_bytes()));
    }

    fn status(&self) -> Value {
        serde_json::to_value(self.monitor.status()).unwrap()["sessions"][0].clone()
    }

    /// When, what, and what is known of it.
    fn told(&self) -> String {
        let line = |entry| {
            let mut entry = serde_json::to_value(entry).unwrap();
            let object = entry.as_object_mut().unwrap();
            object.remove("n");
            let at = object.remove("at").unwrap().as_f64().unwrap() - f64::from(u32::try_from(DAY).unwrap());
            let kind = object.remove("kind").unwrap();
            let rest: Vec<String> = object.iter().map(|(key, value)| format!("{key}={value}")).collect();
            format!("{at:>5.1} {} {}\n", kind.as_str().unwrap(), rest.join(" ").replace('"', ""))
        };
        self.monitor.timeline().after(0).map(line).collect()
    }
}

const INIT: &str = r#"{"type":"system","subtype":"init","session_id":"s","model":"claude-opus-5-5"}"#;
const PROMPT: &str = r#"{"type":"user","message":{"role":"user","content":"SECRET prompt"}}"#;

fn answer(id: u64, parent: &str, block: &str) -> String {
    format!(
        r#"{{"type":"assistant","session_id":"s","parent_tool_use_id":{parent},"message":{{"id":"msg_{id}","model":"claude-opus-5-5","stop_reason":"tool_use","usage":{{"input_tokens":100,"cache_read_input_tokens":900,"output_tokens":50}},"content":[{block}]}}}}"#
    )
}

fn call(id: u64, tool: &str) -> String {
    format!(r#"{{"type":"tool_use","id":"toolu_{id}","name":"{tool}","input":{{"command":"SECRET {id}"}}}}"#)
}

fn result_of(id: u64, parent: &str, error: bool) -> String {
    format!(
        r#"{{"type":"user","session_id":"s","parent_tool_use_id":{parent},"message":{{"role":"user","content":[{{"type":"tool_result","tool_use_id":"toolu_{id}","is_error":{error},"content":"SECRET"}}]}}}}"#
    )
}

#[test]
fn a_turn_is_told_step_by_step_and_nothing_of_what_was_said() {
    let mut s = Watched::new(vec![Rule {
        limit: Limit::CostUsd,
        scope: Scope::Session,
        ceiling: Ceiling::Usd(Usd::from_f64(0.05)),
        mode: Mode::Shadow,
    }]);
    s.app(PROMPT);
    s.cli(INIT);
    s.cli(&answer(1, "null", &call(1, "Bash")));
    s.cli(&result_of(1, "null", true));
    s.cli(&answer(2, "null", &call(2, "Agent")));
    s.cli(&answer(3, "\"toolu_2\"", &call(3, "Read")));
    let status = s.status();
    assert_eq!((&status["turn"]["number"], &status["turn"]["rounds"]), (&1.into(), &2.into()), "{status}");
    assert_eq!((&status["tool"]["name"], &status["model"]), (&"Agent".into(), &"claude-opus-5-5".into()), "{status}");
    assert_eq!(status["context"], serde_json::json!({"tokens": 1000, "window": null, "ratio": null}), "{status}");
    assert_eq!(status["tool"]["since"].as_f64().unwrap() - status["started"].as_f64().unwrap(), 2.5, "{status}");
    assert_eq!(status["last_event"]["kind"], "assistant");
    s.cli(&result_of(3, "\"toolu_2\"", false));
    s.cli(&result_of(2, "null", false));
    s.cli(r#"{"type":"system","subtype":"api_retry","session_id":"s","attempt":1,"max_retries":10,"retry_delay_ms":500,"error_status":529,"error":"overloaded"}"#);
    s.cli(&answer(4, "null", r#"{"type":"text","text":"SECRET answer"}"#));
    s.cli(r#"{"type":"result","subtype":"success","session_id":"s","is_error":false,"num_turns":3,"total_cost_usd":0.03,"modelUsage":{"claude-opus-5-5":{"inputTokens":400,"outputTokens":200,"cacheReadInputTokens":3600,"costUSD":0.03,"contextWindow":200000}}}"#);
    assert_eq!(s.status()["context"]["ratio"], 0.005);
    assert_eq!(s.status()["turn"], Value::Null);
    s.put(Input::StdoutEnd);
    s.put(Input::Exited(Exit::Code(0)));
    let told = s.told();
    assert!(!told.contains("SECRET") && !told.contains("toolu_"), "{told}");
    assert_eq!(
        told,
        "  0.5 turn_started turn=1
  1.0 session session_id=s start=fresh
  2.0 request cached=900 cost_usd=0.00158 input=1000 model=claude-opus-5-5 output=50 seconds=1.0 source=main
  2.0 tool outcome=error seconds=0.5 source=main tool=Bash
  3.0 subagent_started agent=unknown background=false
  3.5 request cached=900 cost_usd=0.00158 input=1000 model=claude-opus-5-5 output=50 source=subagent
  3.5 tool outcome=ok seconds=0.5 source=subagent tool=Read
  4.0 request cached=900 cost_usd=0.00158 input=1000 model=claude-opus-5-5 output=50 seconds=0.5 source=main
  4.0 subagent_ended agent=unknown outcome=completed seconds=1.0
  4.0 tool outcome=ok seconds=1.5 source=main tool=Agent
  4.5 retried delay_seconds=0.5 error=overloaded status=529
  5.5 request cached=900 cost_usd=0.00158 input=1000 model=claude-opus-5-5 output=50 seconds=1.0 source=main
  5.5 turn_ended confirmed=true cost_usd=0.03 outcome=success seconds=5.0 turn=1
  5.5 limit action=warn ceiling=0.05 level=0.5 limit=usd mode=shadow observed=0.03 scope=session
  5.5 exited exit_code=0 reason=clean
"
    );
}

#[test]
fn the_oldest_go_and_whoever_has_read_some_is_told_the_rest() {
    let mut s = Watched::new(Vec::new());
    s.app(PROMPT);
    s.cli(INIT);
    for id in 0..2 * ENTRIES as u64 {
        s.cli(&answer(id, "null", &call(id, &"long".repeat(100))));
        s.cli(&result_of(id, "null", false));
    }
    let timeline = s.monitor.timeline();
    let numbers = |after| timeline.after(after).map(|entry| entry.n).collect::<Vec<_>>();
    let last = timeline.last();
    assert!(last > 4 * ENTRIES as u64 - 10, "{last}");
    assert_eq!(numbers(0), (last - ENTRIES as u64 + 1..=last).collect::<Vec<_>>());
    assert_eq!(numbers(last - 2), [last - 1, last]);
    assert!(numbers(last).is_empty() && numbers(u64::MAX).is_empty());
    let longest = timeline.after(0).map(|entry| serde_json::to_string(entry).unwrap().len()).max().unwrap();
    assert!(longest < 512, "{longest}");
}

//! For whom an agent works: learnt from what the app says, in time for everything that is told of it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::time::Duration;

use agent_sidecar_core::metric::{self, Cell};
use agent_sidecar_core::span::TraceSettings;
use agent_sidecar_core::telemetry::Value;
use agent_sidecar_core::who::{Guarded, Learn, Name, Shared, Surroundings, Who};
use agent_sidecar_core::{Exit, Input, Monitor, Now, Output, Settings};

const INIT: &str = r#"{"type":"system","subtype":"init","session_id":"s","model":"claude-opus-5-5"}"#;
const RESULT: &str = r#"{"type":"result","subtype":"success","is_error":false,"session_id":"s","num_turns":1,"total_cost_usd":0.5,"modelUsage":{"claude-opus-5-5":{"inputTokens":10,"outputTokens":5,"costUSD":0.5}}}"#;
const HELLO: &str = r#"{"type":"control_request","request_id":"1","request":{"subtype":"initialize"}}"#;
const PROMPT: &str =
    r#"{"type":"user","metadata":{"tenant":"acme","user":"anna"},"message":{"role":"user","content":"x"},"session_id":""}"#;

struct Bench {
    monitor: Monitor,
    said: Vec<String>,
}

impl Bench {
    fn new(sources: &[(Name, &str)]) -> Bench {
        let sources: Vec<_> = sources.iter().map(|(name, text)| (*name, text.parse().unwrap())).collect();
        let at = Surroundings {
            env: &|_| None,
            pod_labels: &|| None,
            pod_annotations: &|| None,
            resource: &|_| None,
            args: &[],
            cwd: &|| String::from("/"),
        };
        let fixed = Who { team: Some(String::from("red")), ..Who::default() };
        let (who, learn) = Learn::begin(&fixed, &sources, None, &at);
        let trace = TraceSettings { on: true, ..TraceSettings::default() };
        let settings = Settings { who, learn, trace, events: true, ..Settings::default() };
        let mut bench = Bench { monitor: Monitor::new(settings, false, Now::default()), said: Vec::new() };
        bench.put(Input::Spawned { pid: 7 });
        bench
    }

    fn put(&mut self, input: Input<'_>) {
        let now = Now { mono: Duration::from_secs(1), unix: Duration::from_secs(1_795_392_000) };
        self.monitor.handle(now, input);
        while let Some(output) = self.monitor.poll_output() {
            let whose = |attributes: &[(&'static str, Value)]| {
                let told = |name: &str| attributes.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
                let text = |name: &str| match told(name) {
                    Some(Value::Str(text)) => text,
                    _ => String::from("-"),
                };
                format!("{} {} {}", text("claude_agent.tenant"), text("claude_agent.team"), text("user.id"))
            };
            match output {
                Output::Record(record) => {
                    let line = serde_json::to_value(&record).unwrap();
                    let of = |key: &str| line[key].as_str().unwrap_or("-").to_owned();
                    self.said.push(format!("{}: {} {} {}", of("event"), of("tenant"), of("team"), of("user")));
                }
                Output::Log(event) => self.said.push(format!("{}: {}", event.name, whose(&event.attributes))),
                Output::Span(span) if span.name.starts_with("invoke_agent") => {
                    self.said.push(format!("span: {}", whose(&span.attributes)));
                }
                Output::Known => self.said.push(String::from("known")),
                Output::Action(_) | Output::Decided(_) | Output::Span(_) => {}
            }
        }
    }

    fn line(&mut self, from_app: bool, line: &str) {
        let line = format!("{line}\n");
        self.put(if from_app { Input::Stdin(line.as_bytes()) } else { Input::Stdout(line.as_bytes()) });
    }

    fn run(&mut self) -> Vec<&str> {
        self.line(true, HELLO);
        self.line(true, PROMPT);
        self.line(false, INIT);
        self.line(false, RESULT);
        self.put(Input::StdinEnd);
        self.put(Input::StdoutEnd);
        self.put(Input::Exited(Exit::Code(0)));
        self.said.iter().map(String::as_str).collect()
    }
}

#[test]
fn what_the_first_message_says_is_in_all_that_is_told_of_it() {
    let mut bench = Bench::new(&[(Name::Tenant, "message:metadata.tenant"), (Name::User, "message:metadata.user")]);
    assert_eq!(serde_json::to_value(bench.monitor.status()).unwrap()["sessions"][0]["team"], "red");
    bench.run();
    assert_eq!(bench.said.first().map(String::as_str), Some("known"), "before anything else: {:?}", bench.said);
    assert!(bench.said.len() > 8, "{:?}", bench.said);
    for said in &bench.said[1..] {
        assert!(said.ends_with(": acme red anna"), "{said}");
    }
    for what in ["spent", "turn.ended", "span", "process_exited"] {
        assert_eq!(bench.said.iter().filter(|said| said.starts_with(&format!("{what}:"))).count(), 1, "{what}");
    }
    let labels = bench.monitor.who().labels();
    assert_eq!(labels, [("tenant", String::from("acme")), ("team", String::from("red"))], "a user is no label");
}

#[test]
fn who_never_says_it_has_said_so() {
    let mut bench = Bench::new(&[(Name::Tenant, "message:nothing")]);
    let said = bench.run();
    assert_eq!(said.iter().filter(|said| **said == "known").count(), 1);
    assert!(said[1..].iter().all(|said| said.contains(": - red -")), "{said:?}");
    let mut silent = Bench::new(&[(Name::Tenant, "message:nothing")]);
    silent.put(Input::StdinEnd);
    assert_eq!(silent.said, ["known"]);
}

#[test]
fn a_conflict_is_told_once_everywhere() {
    let mut bench = Bench::new(&[]);
    for _ in 0..2 {
        bench.put(Input::Conflict { kind: Shared::ConfigDir, owner: "globex", action: Guarded::Flagged });
    }
    assert_eq!(bench.said, ["tenant.conflict: - red -", "tenant_conflict: - red -"]);
    let counted = |kind: &str| bench.monitor.meters().get(&metric::TENANT_CONFLICTS, &[kind, "flagged"]).cloned();
    assert_eq!((counted("config_dir"), counted("cwd")), (Some(Cell::Count(1)), Some(Cell::Count(0))));
    let status = serde_json::to_value(bench.monitor.status()).unwrap();
    assert_eq!(status["sessions"][0]["tenant_conflicts"], serde_json::json!(["config_dir"]));
}

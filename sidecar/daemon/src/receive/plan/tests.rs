use super::*;

fn user(environment: &[(&str, &str)]) -> Surroundings {
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Surroundings { environment, settings: BTreeMap::new() }
}

/// What is set and where it goes on to, in one text; or why not.
fn plan(choice: Choice, blind: bool, user: &Surroundings) -> String {
    match decide(choice, true, blind, user) {
        Decision::Off => String::from("off"),
        Decision::StayOut(why) => format!("out: {why}"),
        Decision::On(plan) => {
            let set = plan.variables("B").into_iter().map(|(name, value)| format!("{name}={value}\n")).collect::<String>();
            let forwarded = Signal::ALL.iter().filter_map(|signal| plan.destination(*signal));
            set + &forwarded.map(|to| format!("> {to}\n")).collect::<String>()
        }
    }
}

const ON: (&str, &str) = ("CLAUDE_CODE_ENABLE_TELEMETRY", "1");
const METRICS: (&str, &str) = ("OTEL_METRICS_EXPORTER", "otlp");
const LOGS: (&str, &str) = ("OTEL_LOGS_EXPORTER", "otlp");
const HTTP: (&str, &str) = ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json");

#[test]
fn only_where_nothing_else_tells_unless_told_to() {
    let nobody = user(&[]);
    assert_eq!(plan(Choice::Auto, false, &nobody), "off");
    assert_eq!(plan(Choice::Off, true, &nobody), "off");
    assert!(plan(Choice::Auto, true, &nobody).contains("CLAUDE_CODE_ENABLE_TELEMETRY=1"));
    assert!(plan(Choice::On, false, &nobody).contains("CLAUDE_CODE_ENABLE_TELEMETRY=1"));
    assert!(matches!(decide(Choice::On, false, false, &nobody), Decision::Off), "`claude --version` exports nothing");
    assert_eq!(plan(Choice::Auto, false, &user(&[ON, METRICS, LOGS, HTTP])), "off", "a user's own is left alone");
}

#[test]
fn who_had_no_telemetry_sends_none_to_anybody_else() {
    let app = user(&[METRICS, ("OTEL_TRACES_EXPORTER", "otlp"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://app:4318")]);
    let expected = "CLAUDE_CODE_ENABLE_TELEMETRY=1
OTEL_EXPORTER_OTLP_LOGS_PROTOCOL=http/protobuf
OTEL_EXPORTER_OTLP_METRICS_PROTOCOL=http/protobuf
OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=delta
OTEL_LOGS_EXPORTER=otlp
OTEL_LOGS_EXPORT_INTERVAL=500
OTEL_METRICS_EXPORTER=otlp
OTEL_METRIC_EXPORT_INTERVAL=1000
OTEL_TRACES_EXPORTER=none
OTEL_EXPORTER_OTLP_LOGS_ENDPOINT=B/v1/logs
OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=B/v1/metrics
";
    assert_eq!(plan(Choice::Auto, true, &app), expected);
    assert_eq!(plan(Choice::Auto, true, &user(&[("CLAUDE_CODE_ENABLE_TELEMETRY", "0")])), expected);
}

#[test]
fn a_users_own_goes_on_to_where_it_went() {
    let base = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://his:4318/x/");
    let own = ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://logs/in?a=b");
    let interval = ("OTEL_METRIC_EXPORT_INTERVAL", "30000");
    assert_eq!(
        plan(Choice::Auto, true, &user(&[ON, METRICS, LOGS, HTTP, base, own, interval])),
        "OTEL_LOGS_EXPORT_INTERVAL=500
OTEL_EXPORTER_OTLP_LOGS_ENDPOINT=B/v1/logs
OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=B/v1/metrics
> http://his:4318/x/v1/metrics
> http://logs/in?a=b
"
    );
    // What he does not export is ours alone, and what he exports otherwise goes on.
    let said = plan(Choice::Auto, true, &user(&[ON, ("OTEL_METRICS_EXPORTER", "prometheus"), LOGS, HTTP]));
    assert!(said.contains("OTEL_METRICS_EXPORTER=prometheus,otlp\n"), "{said}");
    assert!(said.contains("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL=http/protobuf\n"), "{said}");
    assert!(!said.contains("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL"), "{said}");
    assert!(said.ends_with("> http://localhost:4318/v1/logs\n"), "{said}");
}

#[test]
fn what_cannot_be_forwarded_is_not_taken() {
    for (variables, why) in [
        (vec![ON, METRICS, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")], "as grpc"),
        (vec![ON, METRICS, HTTP, ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "grpc")], "as grpc"),
        (vec![ON, METRICS], "no protocol"),
        (vec![ON, METRICS, HTTP, ("OTEL_EXPORTER_OTLP_ENDPOINT", "unix://his")], "no http:// or https:// URL"),
        (vec![ON, METRICS, HTTP, ("OTEL_EXPORTER_OTLP_ENDPOINT", "nowhere in particular")], "no URL"),
        (vec![ON, METRICS, HTTP, ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://me:geheim@his:4318")], "a password in it"),
        (vec![ON, METRICS, HTTP, ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/key")], "CLIENT_KEY"),
    ] {
        let said = plan(Choice::Auto, true, &user(&variables));
        assert!(said.starts_with("out: ") && said.contains(why), "{variables:?}: {said}");
    }
}

#[test]
fn settings_files_win_and_are_believed() {
    let settings = |text: &str| Surroundings { settings: env_of(text), ..user(&[]) };
    for name in ["CLAUDE_CODE_ENABLE_TELEMETRY", "OTEL_METRICS_EXPORTER"] {
        let said = plan(Choice::Auto, true, &settings(&format!(r#"{{"env": {{"{name}": "none"}}}}"#)));
        assert!(said.starts_with("out: ") && said.contains(name), "{said}");
    }
    let own = r#"{"env": {"CLAUDE_CODE_ENABLE_TELEMETRY": 1, "OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://his"}}"#;
    assert!(plan(Choice::Auto, true, &settings(own)).ends_with("> http://his/v1/metrics\n"));
    assert_eq!(env_of("no JSON"), BTreeMap::new());
    assert_eq!(env_of(r#"{"model": "opus"}"#), BTreeMap::new());
}

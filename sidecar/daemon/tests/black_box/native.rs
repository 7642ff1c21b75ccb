//! A CLI that exports its own telemetry, as far as nothing else tells what it spends.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::*;

/// A program called `claude`, in Python: what it exports it says with `post`.
fn claude(dir: &Path, program: &str) -> PathBuf {
    let path = dir.join("claude");
    let head = r#"#!/usr/bin/env python3
import json, os, signal, socket, sys, time, urllib.error, urllib.request

def url(signal):
    return os.environ[f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT"]

def cost(usd, end):
    model = {"key": "model", "value": {"stringValue": "claude-opus-5-5"}}
    session = {"key": "session.id", "value": {"stringValue": "one"}}
    point = {"attributes": [model, session], "startTimeUnixNano": "1", "timeUnixNano": str(end), "asDouble": usd}
    metric = {"name": "claude_code.cost.usage", "sum": {"aggregationTemporality": 1, "isMonotonic": True, "dataPoints": [point]}}
    return json.dumps({"resourceMetrics": [{"scopeMetrics": [{"metrics": [metric]}]}]}).encode()

def post(url, body, kind="application/json", **headers):
    request = urllib.request.Request(url, body, {"content-type": kind, **headers})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers["content-type"], answer.read()
    except urllib.error.HTTPError as error:
        return error.code
"#;
    std::fs::write(&path, format!("{head}\n{program}\n")).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    path
}

struct Run {
    out: String,
    said: String,
    code: Option<i32>,
    spent: f64,
}

/// Runs it to its end, in text mode unless the arguments say otherwise.
fn run(name: &str, program: &str, flags: &[&str], args: &[&str], env: &[(&str, &str)]) -> Run {
    let dir = scratch(&format!("native-{name}"));
    let ledger = dir.join("ledger.jsonl");
    std::fs::remove_file(&ledger).ok();
    let mut command = Command::new(SIDECAR);
    // What other tests run on this machine is told of here, too.
    command.args(["run", "--listen", "off", "--patrol=false", "--ledger"]).arg(&ledger).args(flags);
    command.arg("--").arg(claude(&dir, program)).args(args);
    for (variable, _) in std::env::vars().filter(|(name, _)| name.starts_with("OTEL_") || name.starts_with("CLAUDE_")) {
        command.env_remove(variable);
    }
    let out = command.env("HOME", &dir).envs(env.iter().copied()).stdin(Stdio::null()).output().unwrap();
    let lines = std::fs::read_to_string(&ledger).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    Run {
        out: String::from_utf8(out.stdout).unwrap(),
        said: String::from_utf8(out.stderr).unwrap(),
        code: out.status.code(),
        spent: lines.filter(|line| line["event"] == "spent").map(|line| line["cost_usd"].as_f64().unwrap()).sum(),
    }
}

#[test]
fn what_is_exported_is_spent_and_repetitions_are_not() {
    let program = r#"
for usd, end in [(0.5, 2), (0.25, 3), (0.5, 2)]:
    print(post(url("metrics"), cost(usd, end)))
print(post(url("logs"), b"", "application/x-protobuf; charset=utf-8"))
"#;
    let run = run("spent", program, &[], &["-p", "hi"], &[]);
    let taken = "(200, 'application/json', b'{}')\n".repeat(3) + "(200, 'application/x-protobuf', b'')\n";
    assert_eq!((run.out, run.said, run.code), (taken, String::new(), Some(0)));
    assert_eq!(run.spent, 0.75);
}

#[test]
fn strangers_and_nonsense_are_refused() {
    let program = r#"
to = url("metrics")
root, token = to.split("/v1/")[0].rsplit("/", 1)
assert len(token) == 32
print(post(f"{root}/v1/metrics", cost(1, 2)), post(f"{root}/{'0' * 32}/v1/metrics", cost(1, 2)), post(f"{to}x", cost(1, 2)))
print(post(to, cost(1, 2), "text/plain"), post(to, cost(1, 2), **{"content-encoding": "br"}))
print(post(to, b"{"), post(to, b"\xff" * 100, "application/x-protobuf"), post(to, b"x", **{"content-encoding": "gzip"}))
print(post(to, b" " * (9 << 20)))
host, port = root.split("//")[1].split(":")
idle = [socket.create_connection((host, int(port))) for _ in range(200)]
print(post(to, cost(0.5, 9))[0])
"#;
    let run = run("strangers", program, &[], &["-p", "hi"], &[]);
    assert_eq!(run.out, "404 404 404\n415 415\n400 400 400\n413\n200\n", "{}", run.said);
    assert_eq!((run.spent, run.code), (0.5, Some(0)));
}

#[test]
fn what_was_sent_before_a_kill_is_counted() {
    // No answer is waited for: it is in the kernel's hands, at best.
    let program = r#"
host, rest = url("metrics").split("//")[1].split("/", 1)
body = cost(0.5, 2)
sock = socket.create_connection(host.split(":"))
sock.sendall(f"POST /{rest} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
os.kill(os.getpid(), signal.SIGKILL)
"#;
    let run = run("kill", program, &[], &["-p", "hi"], &[]);
    assert_eq!((run.spent, run.code), (0.5, Some(137)), "{}", run.said);
}

#[test]
fn a_budget_ends_text_mode() {
    let program = r#"
for end in range(2, 100):
    post(url("metrics"), cost(0.1, end))
    time.sleep(0.05)
"#;
    let run = run("budget", program, &["--max-cost-usd", "0.35"], &["-p", "hi"], &[]);
    assert_eq!(run.code, Some(143), "{}", run.said);
    assert!(run.spent >= 0.35 && run.spent < 2.0, "{}", run.spent);
}

#[test]
fn nothing_is_asked_for_where_it_is_not_needed() {
    let program = "print('OTEL_METRICS_EXPORTER' in os.environ, 'CLAUDE_CODE_ENABLE_TELEMETRY' in os.environ)";
    for (flags, args) in [
        (&[][..], &["--version"][..]),
        (&[], &["mcp", "list"]),
        (&["--native-telemetry", "off"], &["-p", "hi"]),
        (&[], &["-p", "hi", "--output-format", "stream-json", "--verbose"]),
    ] {
        let run = run("off", program, flags, args, &[]);
        assert_eq!((run.out.as_str(), run.said.as_str()), ("False False\n", ""), "{flags:?} {args:?}");
    }
}

#[test]
fn a_users_own_export_over_grpc_is_left_alone() {
    let program = "print(os.environ.get('OTEL_EXPORTER_OTLP_METRICS_ENDPOINT'), os.environ['OTEL_METRICS_EXPORTER'])";
    let grpc =
        [("CLAUDE_CODE_ENABLE_TELEMETRY", "1"), ("OTEL_METRICS_EXPORTER", "otlp"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")];
    let run = run("grpc", program, &[], &["-p", "hi"], &grpc);
    assert_eq!(run.out, "None otlp\n");
    assert!(run.said.contains("left alone") && run.said.contains("http/protobuf"), "{}", run.said);
}

#[test]
fn who_exports_nothing_is_said_to() {
    let run = run("silent", "pass", &[], &["-p", "hi"], &[]);
    assert_eq!((run.spent, run.code), (0.0, Some(0)));
    assert!(run.said.contains("exported no telemetry"), "{}", run.said);
}

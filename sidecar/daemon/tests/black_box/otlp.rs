//! What a collector gets of a run, and of one that was killed.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::Signal;

use crate::support::*;

/// Paths and bodies.
type Posts = Vec<(String, Vec<u8>)>;

/// Takes whatever is posted to it.
struct Collector {
    url: String,
    posts: Arc<Mutex<Posts>>,
}

impl Collector {
    fn start() -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let posts: Arc<Mutex<Posts>> = Arc::default();
        let theirs = Arc::clone(&posts);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let posts = Arc::clone(&theirs);
                std::thread::spawn(move || {
                    let mut stream = BufReader::new(stream);
                    while let Some(post) = post(&mut stream) {
                        posts.lock().unwrap().push(post);
                        stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").ok();
                    }
                });
            }
        });
        Collector { url, posts }
    }

    /// How often a text is in what was posted to a path.
    fn told(&self, path: &str, text: &str) -> usize {
        let posts = self.posts.lock().unwrap();
        let of = posts.iter().filter(|(to, _)| to == path);
        of.map(|(_, body)| body.windows(text.len()).filter(|window| *window == text.as_bytes()).count()).sum()
    }
}

fn post(stream: &mut impl BufRead) -> Option<(String, Vec<u8>)> {
    let (mut path, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).ok().filter(|n| *n > 0)?;
        match line.trim_end().split_once(' ') {
            None => break,
            Some(("POST" | "CONNECT", rest)) => path = rest.split(' ').next().unwrap().to_owned(),
            Some((name, value)) if name.eq_ignore_ascii_case("content-length:") => length = value.parse().unwrap(),
            Some(_) => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    Some((path, body))
}

/// A wrapper around a CLI in sh, which has the lines of the recording at hand.
fn run(dir: &Path, collector: &str, program: &str) -> Command {
    let mut command = Command::new(SIDECAR);
    command.args(["run", "--listen", "off", "--otlp-endpoint", collector, "--otlp-queue-dir"]).arg(dir.join("queue"));
    command.args(["--", "sh", "-c", program, "sh"]).args(ONE_SHOT);
    let ours = |name: &str| name.starts_with("OTEL_") || name.starts_with("TRACE") || name.to_uppercase().ends_with("_PROXY");
    for (variable, _) in std::env::vars().filter(|(name, _)| ours(name)) {
        command.env_remove(variable);
    }
    command
}

fn fresh(name: &str) -> PathBuf {
    let dir = scratch(name);
    std::fs::remove_dir_all(dir.join("queue")).ok();
    dir
}

const CALL: &str = r#"{"type":"assistant","session_id":"s","parent_tool_use_id":null,"message":{"id":"msg_1","model":"claude-opus-5-5","usage":{"input_tokens":10,"output_tokens":1},"content":[{"type":"tool_use","id":"toolu_1","name":"Bash","input":{}}]}}"#;

#[test]
fn a_kill_of_ours_in_mid_turn_is_told_by_the_next_start() {
    let (dir, collector) = (fresh("otlp-killed"), Collector::start());
    let program = format!("echo '{INIT}'; echo '{CALL}'; exec sleep 600");
    let mut killed = Running::start(run(&dir, &collector.url, &program));
    let will = |signal: &str, text: &str| {
        let dirs = std::fs::read_dir(dir.join("queue")).ok()?.flatten();
        let will = dirs.map(|entry| entry.path().join(format!("will.{signal}"))).find_map(|path| std::fs::read(path).ok())?;
        will.windows(text.len()).any(|window| window == text.as_bytes()).then_some(())
    };
    // One is written after the other.
    wait_for("the open call to be on disk", || will("traces", "execute_tool Bash"));
    wait_for("what happened in it to be, too", || will("logs", "successor"));
    killed.signal(Signal::KILL);
    killed.code();
    assert_eq!(collector.told("/v1/traces", "execute_tool"), 0, "nothing had ended");

    let done = run(&dir, &collector.url, &format!("echo '{INIT}'")).stdin(Stdio::null()).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    wait_for("the dead one's trace", || (collector.told("/v1/traces", "execute_tool Bash") > 0).then_some(()));
    assert_eq!(collector.told("/v1/traces", "execute_tool Bash"), 1, "once");
    // Its turn, its answer and its call: each has it as attribute and as status.
    assert_eq!(collector.told("/v1/traces", "sidecar_lost"), 6);
    wait_for("the dead one's events", || (collector.told("/v1/logs", "successor") > 0).then_some(()));
    // Who ends on a busy machine leaves an empty directory to the next.
    let inside = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let dirs = inside(&dir.join("queue")).filter(|path| !path.ends_with("turns"));
    let left: Vec<PathBuf> =
        dirs.flat_map(|dir| inside(&dir).collect::<Vec<_>>()).filter(|path| !path.ends_with("lock")).collect();
    assert!(left.is_empty(), "nothing is left: {left:?}");
}

#[test]
fn a_session_that_is_resumed_by_another_process_is_linked_to_its_last_turn() {
    let (dir, collector) = (fresh("otlp-resumed"), Collector::start());
    let session = "5f0a2f6e-95cb-4b0f-a56c-0a3e2d1c9b7f";
    let program = format!("echo '{}'", CALL.replace(r#""session_id":"s""#, &format!(r#""session_id":"{session}""#)));
    let ran = |args: &[&str]| {
        let mut command = run(&dir, &collector.url, &program);
        assert!(command.args(args).stdin(Stdio::null()).output().unwrap().status.success());
        collector.told("/v1/traces", "previous_turn")
    };
    assert_eq!(ran(&[]), 0);
    assert_eq!(ran(&["--resume", session]), 1);
    assert_eq!(ran(&["--continue"]), 2);
}

#[test]
fn a_trace_that_the_app_does_not_keep_is_not_sent_and_one_that_it_keeps_has_its_state() {
    let (dir, collector) = (fresh("otlp-unsampled"), Collector::start());
    let told = |flags: &str| {
        let parent = format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}");
        let mut command = run(&dir, &collector.url, &format!("echo '{INIT}'; echo '{CALL}'"));
        command.env("TRACEPARENT", parent).env("TRACESTATE", "vendor=t61rcWkgMzE").stdin(Stdio::null()).output().unwrap();
        (collector.told("/v1/traces", "execute_tool Bash"), collector.told("/v1/traces", "vendor=t61rcWkgMzE"))
    };
    assert_eq!(told("00"), (0, 0));
    assert!(collector.posts.lock().unwrap().iter().all(|(path, _)| path != "/v1/traces"), "not even an empty message");
    let (tools, states) = told("01");
    assert_eq!(tools, 1);
    assert_eq!(states, 3, "the turn, the answer and the call");
}

#[test]
fn content_leaves_only_by_the_gate_that_was_opened_and_without_its_secrets() {
    let call = CALL.replace(r#""input":{}"#, r#""input":{"command":"canary-input hunter2-the-second"}"#);
    let result = r#"{"type":"user","session_id":"s","parent_tool_use_id":null,"message":{"role":"user","content":[{"type":"tool_result","tool_use_id":"toolu_1","content":"canary-output sk-ant-api03-0123456789abcdef"}]}}"#;
    let program = format!("echo '{INIT}'; echo '{call}'; echo '{result}'");
    for (gate, told) in [
        (None, None),
        (Some("--content-tool-inputs"), Some("canary-input")),
        (Some("--content-tool-outputs"), Some("canary-output")),
    ] {
        let (dir, collector) = (fresh("otlp-content"), Collector::start());
        let (ledger, events) = (dir.join("ledger.jsonl"), dir.join("events.jsonl"));
        std::fs::remove_file(&ledger).ok();
        std::fs::remove_file(&events).ok();
        let mut command = Command::new(SIDECAR);
        command.args(["run", "--listen", "off", "--log-level", "debug", "--otlp-endpoint", &collector.url, "--otlp-queue-dir"]);
        command.arg(dir.join("queue")).arg("--ledger").arg(&ledger).arg("--events").arg(&events).args(gate);
        command.args(["--", "sh", "-c", &program, "sh"]).args(ONE_SHOT).env("DATABASE_PASSWORD", "hunter2-the-second");
        let done = command.stdin(Stdio::null()).output().unwrap();
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        let sinks = [read(&ledger), read(&events), String::from_utf8(done.stderr).unwrap()];
        for canary in ["canary-input", "canary-output", "hunter2", "sk-ant-"] {
            let expected = usize::from(told == Some(canary));
            assert_eq!(collector.told("/v1/traces", canary), expected, "{gate:?} {canary}");
            assert_eq!(collector.told("/v1/logs", canary) + collector.told("/v1/metrics", canary), 0, "{gate:?} {canary}");
            assert!(sinks.iter().all(|sink| !sink.contains(canary)), "{gate:?} {canary}");
        }
        assert_eq!(collector.told("/v1/traces", "[scrubbed]"), usize::from(gate.is_some()));
    }
}

#[test]
fn a_collector_beyond_a_proxy_is_reached_through_it_and_one_beside_us_is_not() {
    // It says yes to whoever wants through, and then is the collector itself. The name leads nowhere but there.
    let beyond = "http://collector.invalid:4318";
    let traced = |name: &str, endpoint: &str, variables: &[(&str, &str)]| {
        let mut command = run(&fresh(name), endpoint, &format!("echo '{INIT}'; echo '{CALL}'"));
        let done = command.envs(variables.iter().copied()).stdin(Stdio::null()).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    };
    let proxy = Collector::start();
    let with_key = proxy.url.replace("http://", "http://user:secret@");
    traced("otlp-proxy", beyond, &[("HTTP_PROXY", &with_key), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")]);
    assert!(proxy.told("/v1/traces", "execute_tool Bash") == 1);
    let asked = |proxy: &Collector| proxy.posts.lock().unwrap().iter().filter(|(to, _)| to == "collector.invalid:4318").count();
    assert!(asked(&proxy) > 0, "by CONNECT");
    // What is not to go through it does not.
    let shunned = Collector::start();
    traced(
        "otlp-no-proxy",
        beyond,
        &[("HTTP_PROXY", &shunned.url), ("NO_PROXY", "other.invalid,.invalid"), ("OTEL_BSP_EXPORT_TIMEOUT", "500")],
    );
    assert!(shunned.posts.lock().unwrap().is_empty());
    let collector = Collector::start();
    traced("otlp-here", &collector.url, &[("HTTP_PROXY", &shunned.url), ("ALL_PROXY", &shunned.url)]);
    assert_eq!(collector.told("/v1/traces", "execute_tool Bash"), 1);
    assert!(shunned.posts.lock().unwrap().is_empty());
}

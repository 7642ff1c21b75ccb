//! Agents behind HTTP: the hosting cookbook's contract, one turn at a time, and conversations that go on whatever ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::*;

/// A CLI that does as it is told, and writes down how it was started. Its cost is a cent a turn.
const CLI: &str = r#"
import json, os, sys, time, uuid
log, argv = sys.argv[1], sys.argv[2:]
resume = [word.split("=")[1] for word in argv if word.startswith("--resume=")]
session = resume[0] if resume else str(uuid.uuid4())
open(log, "a").write(json.dumps({"pid": os.getpid(), "resume": resume, "argv": argv, "env": sorted(os.environ),
    "session": os.environ.get("AGENT_SESSION"), "config": os.environ.get("CLAUDE_CONFIG_DIR"), "cwd": os.getcwd()}) + "\n")
def say(**what): print(json.dumps({"session_id": session, **what}), flush=True)
def hear(): return json.loads(sys.stdin.readline() or "null")
turns = 0
def result(text, n=1, **more):
    used = {"inputTokens": 10 * turns, "outputTokens": turns, "costUSD": turns / 100}
    say(**{"type": "result", "subtype": "success", "is_error": False, "result": text, "num_turns": n, "total_cost_usd": turns / 100, "modelUsage": {"m": used}, **more})
if resume == ["lost"]:
    say(type="result", subtype="error_during_execution", is_error=True, num_turns=0, errors=["No conversation found with session ID: lost"])
    sys.exit(1)
while (heard := hear()) is not None:
    if heard["type"] != "user": continue
    text = heard["message"]["content"]
    say(type="system", subtype="init", model="m")
    if text == "die": os._exit(3)
    config = os.environ.get("CLAUDE_CONFIG_DIR", "")
    if config.startswith(os.path.dirname(log)):
        os.makedirs(config + "/projects/work", exist_ok=True)
        open(f"{config}/projects/work/{session}.jsonl", "a").write(text + "\n")
    if text == "refused": result("Operation stopped by hook: agent-sidecar: a limit of this session is used up", 0); continue
    turns += 1
    say(type="assistant", message={"id": str(turns), "role": "assistant", "model": "m", "content": [{"type": "text", "text": f"{os.getpid()} {turns}"}]})
    if text.startswith("ask "):
        print(json.dumps({"type": "control_request", "request_id": "r", "request": {"subtype": text[4:], "tool_name": "Bash", "input": {"command": "ls"}}}), flush=True)
        while (heard := hear())["type"] != "control_response": pass
        text = json.dumps(heard)
    if text.startswith("wait "):
        while not os.path.exists(text[5:]): time.sleep(.01)
    if text == "until interrupted":
        while (heard := hear()).get("request", {}).get("subtype") != "interrupt": pass
        open(log, "a").write(json.dumps({"interrupted": True}) + "\n")
    if text == "a task ends": result("of the task", origin={"kind": "task-notification"})
    if text == "long": print('{"type":"assistant","filler":"' + "x" * (17 << 20) + '"}', flush=True)
    if text == "fails": result("it cannot be done", subtype="error_during_execution", is_error=True); continue
    result(text)
    if text == "bye": break
"#;

pub(crate) const TOKEN: &str = "0123456789abcdef-token";

pub(crate) struct Server {
    running: Running,
    pub(crate) address: SocketAddr,
    dir: PathBuf,
    _log: BufReader<std::process::ChildStderr>,
}

pub(crate) fn command(dir: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(SIDECAR);
    command
        .env("AGENT_SIDECAR_SERVE_LISTEN", "127.0.0.1:0")
        .args(["serve", "--listen", "off", "--socket"])
        .arg(dir.join("hub.sock"));
    command.arg("--serve-state").arg(dir.join("book.json")).arg("--ledger").arg(dir.join("ledger.jsonl")).args(flags);
    command.args(["--", "python3", "-u", "-c", CLI]).arg(dir.join("log")).env("AGENT_SIDECAR_PATROL", "false");
    command
}

impl Server {
    fn start(dir: &Path, flags: &[&str]) -> Server {
        Server::of(command(dir, flags), dir)
    }

    pub(crate) fn of(mut command: Command, dir: &Path) -> Server {
        command.env("AGENT_AUTH_TOKEN", TOKEN).stderr(Stdio::piped());
        let mut running = Running::start(command);
        let mut log = BufReader::new(running.child.stderr.take().unwrap());
        let mut line = String::new();
        log.read_line(&mut line).unwrap();
        let address = line.trim_end().rsplit_once("address=").and_then(|(_, address)| address.parse().ok());
        let address = address.unwrap_or_else(|| panic!("no address in: {line}"));
        Server { running, address, dir: dir.to_owned(), _log: log }
    }

    fn connect(&self, method: &str, path: &str, head: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        let host = if head.contains("Host: ") { "" } else { "Host: here\r\n" };
        let request =
            format!("{method} {path} HTTP/1.1\r\n{host}Connection: close\r\n{head}Content-Length: {length}\r\n\r\n{body}");
        // Who is refused early may have closed.
        stream.write_all(request.as_bytes()).ok();
        stream
    }

    /// The status, and the body as it came.
    fn raw(&self, method: &str, path: &str, head: &str, body: &str) -> (u16, String) {
        let mut answer = String::new();
        self.connect(method, path, head, body).read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer}"));
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    pub(crate) fn ask(&self, method: &str, path: &str) -> (u16, Value) {
        let (status, body) = self.raw(method, path, &bearer(), "");
        (status, serde_json::from_str(&body).unwrap_or_default())
    }

    /// A turn that has begun.
    pub(crate) fn begin(&self, id: &str, prompt: &str) -> Stream {
        let body = json!({"prompt": prompt}).to_string();
        let mut stream = BufReader::new(self.connect("POST", &format!("/sessions/{id}/messages"), &bearer(), &body));
        let mut status = String::new();
        stream.read_line(&mut status).unwrap();
        Stream { status: status.split(' ').nth(1).unwrap().parse().unwrap(), stream }
    }

    /// A whole one: its events.
    fn say(&self, id: &str, prompt: &str) -> Vec<(String, Value)> {
        let mut turn = self.begin(id, prompt);
        assert_eq!(turn.status, 200);
        std::iter::from_fn(|| turn.next()).collect()
    }

    /// What the last event says; it is of this name.
    pub(crate) fn last(&self, id: &str, prompt: &str, name: &str) -> String {
        let events = self.say(id, prompt);
        let (last, data) = events.last().unwrap_or_else(|| panic!("no events for {prompt}"));
        assert_eq!(last, name, "{events:?}");
        match name {
            "done" => events[events.len() - 2].1["result"].as_str().unwrap().to_owned(),
            _ => data["message"].as_str().unwrap().to_owned(),
        }
    }

    pub(crate) fn starts(&self) -> Vec<Value> {
        let log = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        log.lines().map(|line| serde_json::from_str(line).unwrap()).filter(|line: &Value| line["pid"].is_number()).collect()
    }

    pub(crate) fn stop(mut self) -> Option<i32> {
        self.running.signal(Signal::TERM);
        self.running.code()
    }
}

fn bearer() -> String {
    format!("Authorization: Bearer {TOKEN}\r\n")
}

pub(crate) struct Stream {
    pub(crate) status: u16,
    stream: BufReader<TcpStream>,
}

impl Stream {
    /// The next event: its name, and its data, if it has any.
    pub(crate) fn next(&mut self) -> Option<(String, Value)> {
        let mut name = String::new();
        let mut line = String::new();
        while {
            line.clear();
            self.stream.read_line(&mut line).unwrap() > 0
        } {
            if let Some(event) = line.strip_prefix("event: ") {
                event.trim_end().clone_into(&mut name);
            } else if let Some(data) = line.strip_prefix("data: ") {
                return Some((name, serde_json::from_str(data).unwrap_or_default()));
            }
        }
        None
    }
}

#[test]
fn messages_are_answered_as_the_contract_says() {
    let dir = Scratch::new("serve", "contract");
    let server = Server::start(&dir, &[]);
    assert_eq!(server.raw("GET", "/health", "", ""), (200, String::from(r#"{"status":"ok"}"#)));
    let message = r#"{"prompt": "hello", "more": 1}"#;
    for head in ["", "Authorization: Bearer 0123456789abcdef-tokem\r\n", "Authorization: Basic 0123456789abcdef-token\r\n"] {
        assert_eq!(server.raw("POST", "/sessions/a/messages", head, message).0, 401, "{head}");
        assert_eq!(server.raw("GET", "/sessions", head, "").0, 401, "{head}");
    }
    for id in ["-a", "_a", "a.b", "a%20b", "", &"x".repeat(65)] {
        assert_eq!(server.raw("POST", &format!("/sessions/{id}/messages"), &bearer(), message).0, 400, "{id}");
    }
    for body in ["", "hello", "[]", "{}", r#"{"prompt": 1}"#, r#"{"prompt": " "}"#, r#"{"message": "hello"}"#] {
        assert_eq!(server.raw("POST", "/sessions/a/messages", &bearer(), body).0, 400, "{body}");
    }
    assert_eq!(
        server.raw("POST", "/sessions/a/messages", &bearer(), &format!(r#"{{"prompt": "{}"}}"#, "x".repeat(1 << 20))).0,
        413
    );
    assert_eq!(server.ask("GET", "/sessions/a/messages").0, 405);
    assert_eq!(server.ask("GET", "/nothing").0, 404);
    assert_eq!(server.starts().len(), 0, "nobody was started for any of this");

    let first = server.say("a", "hello");
    let names: Vec<(&str, &str)> =
        first.iter().map(|(name, data)| (name.as_str(), data["type"].as_str().unwrap_or_default())).collect();
    let expected = [("message", "SystemMessage"), ("message", "AssistantMessage"), ("message", "ResultMessage"), ("done", "")];
    assert_eq!(names, expected);
    assert_eq!(first[2].1["result"], "hello");
    // The same agent, and nothing of the turn before.
    let second = server.say("a", "and more");
    assert_eq!(second.len(), 4);
    let text = |events: &[(String, Value)]| events[1].1["content"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!(text(&second).split(' ').next(), text(&first).split(' ').next());
    assert!(text(&second).ends_with(" 2"), "{second:?}");
    let (status, listed) = server.ask("GET", "/sessions");
    assert_eq!((status, &listed["sessions"][0]["id"], &listed["sessions"][0]["state"]), (200, &json!("a"), &json!("waiting")));
    assert_eq!(server.ask("GET", "/sessions/a").1["conversation"], first[2].1["session_id"]);
    assert_eq!(server.ask("GET", "/sessions/b").0, 404);

    let started = server.starts();
    assert_eq!(started.len(), 1);
    let argv = started[0]["argv"].to_string();
    for flag in ["--permission-prompt-tool", "stdio", "stream-json", "--verbose"] {
        assert!(argv.contains(flag), "{argv}");
    }
    let env = started[0]["env"].to_string();
    assert!(!env.contains("AGENT_AUTH_TOKEN") && !env.contains("SERVE_TOKEN"), "{env}");
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn a_session_has_one_turn_at_a_time_and_others_do_not_wait_for_it() {
    let dir = Scratch::new("serve", "turns");
    let server = Server::start(&dir, &[]);
    let go = dir.join("go");
    let mut turn = server.begin("a", &format!("wait {}", go.display()));
    assert_eq!(turn.next().unwrap().1["subtype"], "init");
    assert_eq!(server.begin("a", "me, too").status, 409);
    assert_eq!(server.last("b", "hello", "done"), "hello");
    assert_eq!(server.ask("GET", "/sessions/a").1["state"], "working");
    std::fs::write(&go, "").unwrap();
    while turn.next().unwrap().0 != "done" {}
    // Right behind it: whoever has read the end may go on.
    for n in 0..20 {
        assert_eq!(server.last("a", &n.to_string(), "done"), n.to_string());
    }
    assert_eq!(server.starts().len(), 2);
}

#[test]
fn a_conversation_goes_on_after_its_agent_has_ended_and_after_a_restart() {
    let dir = Scratch::new("serve", "resume");
    let server = Server::start(&dir, &[]);
    assert_eq!(server.last("a", "bye", "done"), "bye");
    let conversation = server.ask("GET", "/sessions/a").1["conversation"].clone();
    // It may still be on its way out: either is right.
    assert_eq!(server.last("a", "again", "done"), "again");
    assert_eq!(server.last("a", "die", "error"), "the agent has ended in the middle of its turn (exit code 3)");
    assert_eq!(server.last("a", "and again", "done"), "and again");
    // Nothing was said in it that could be resumed.
    assert_eq!(server.last("b", "die", "error"), "the agent has ended in the middle of its turn (exit code 3)");
    assert_eq!(server.last("b", "hello", "done"), "hello");
    assert_eq!(server.stop(), Some(0));

    let server = Server::start(&dir, &[]);
    assert_eq!(
        server.ask("GET", "/sessions/a").1,
        json!({"id": "a", "state": "resting", "conversation": conversation, "cost_usd": 0.0})
    );
    assert_eq!(server.last("a", "once more", "done"), "once more");
    let resumed: Vec<Value> = server.starts().iter().map(|start| start["resume"].clone()).collect();
    let none = json!([]);
    assert_eq!(resumed, [none.clone(), json!([conversation]), json!([conversation]), none.clone(), none, json!([conversation])]);
    // Another server's sessions are another's.
    assert_eq!(server.ask("DELETE", "/sessions/a").0, 204);
    assert_eq!(server.ask("DELETE", "/sessions/a").0, 404);
    assert_eq!(server.last("a", "anew", "done"), "anew");
    assert_eq!(server.starts().last().unwrap()["resume"], json!([]));
}

#[test]
fn each_session_has_directories_of_its_own_and_comes_back_to_them() {
    let dir = Scratch::new("serve", "directories");
    let root = dir.join("agents");
    let flags = ["--agent-dirs", root.to_str().unwrap()];
    let server = Server::start(&dir, &flags);
    for (id, prompt) in [("a", "hello"), ("b", "hello"), ("a", "bye"), ("a", "again")] {
        assert_eq!(server.last(id, prompt, "done"), prompt);
    }
    let starts = server.starts();
    let told: Vec<[&str; 3]> =
        starts.iter().map(|start| ["session", "config", "cwd"].map(|key| start[key].as_str().unwrap_or_default())).collect();
    let of = |id: &str| {
        let home = std::fs::canonicalize(&root).unwrap().join("_").join(id);
        [id.to_owned(), home.join("config").display().to_string(), home.join("workspace").display().to_string()]
    };
    assert_eq!(told, [of("a"), of("b"), of("a")]);
    assert_eq!(starts[2]["resume"], json!([server.ask("GET", "/sessions/a").1["conversation"]]));
    // Two turns, and one of an agent that began at nothing again.
    let cost = server.ask("GET", "/sessions/a").1["cost_usd"].as_f64().unwrap();
    assert!((cost - 0.03).abs() < 1e-9, "{cost}");
    assert_eq!(server.stop(), Some(0));
    for more in [["--agent-from", "env:X"], ["--agent-dirs-at-end", "remove"]] {
        let done = command(&dir, &[&flags[..], &more[..]].concat()).env("AGENT_AUTH_TOKEN", TOKEN).output().unwrap();
        assert!(
            done.status.code() == Some(1) && String::from_utf8(done.stderr).unwrap().contains("finds its directory by its id")
        );
    }
}

#[test]
fn one_whose_transcript_is_gone_says_so_once_and_begins_anew() {
    let dir = Scratch::new("serve", "lost");
    std::fs::write(dir.join("book.json"), r#"{"version":1,"sessions":{"a":{"conversation":"lost","used":1}}}"#).unwrap();
    let server = Server::start(&dir, &[]);
    assert_eq!(server.last("a", "hello", "error"), "its conversation is gone: the next message begins a new one");
    assert_eq!(server.last("a", "hello", "done"), "hello");
}

#[test]
fn what_an_agent_asks_of_its_host_is_answered_and_never_hangs() {
    let dir = Scratch::new("serve", "asked");
    let server = Server::start(&dir, &[]);
    let answered = |server: &Server, what: &str| -> Value {
        serde_json::from_str::<Value>(&server.last("a", &format!("ask {what}"), "done")).unwrap()["response"].clone()
    };
    let denied = answered(&server, "can_use_tool");
    assert_eq!(denied["response"]["behavior"], "deny");
    assert!(denied["response"]["message"].as_str().unwrap().contains("--allowedTools"), "{denied}");
    assert_eq!(answered(&server, "elicitation")["response"]["action"], "decline");
    assert_eq!(answered(&server, "of_tomorrow")["subtype"], "error");
    assert_eq!(server.stop(), Some(0));
    let server = Server::start(&dir, &["--serve-permissions", "allow", "--serve-messages", "cli"]);
    let events = server.say("b", "ask can_use_tool");
    let result = &events[events.len() - 2].1;
    assert_eq!(result["type"], "result", "as the CLI says it");
    let allowed: Value = serde_json::from_str(result["result"].as_str().unwrap()).unwrap();
    assert_eq!(allowed["response"]["response"], json!({"behavior": "allow", "updatedInput": {"command": "ls"}}));
}

#[test]
fn a_turn_that_came_to_nothing_is_an_error_and_one_of_a_task_is_no_end() {
    let dir = Scratch::new("serve", "errors");
    let server = Server::start(&dir, &[]);
    assert_eq!(server.last("a", "refused", "error"), "a limit of this session is used up");
    assert_eq!(server.last("a", "fails", "error"), "it cannot be done");
    let results: Vec<Value> = server.say("a", "a task ends").into_iter().map(|(_, data)| data["result"].clone()).collect();
    assert_eq!(results[2..4], ["of the task", "a task ends"]);
    // A line without measure is left out, and the turn goes on.
    assert_eq!(server.last("a", "long", "done"), "long");
    assert_eq!(server.starts().len(), 1);
}

#[test]
fn there_are_so_many_agents_at_once_and_who_waits_longest_makes_room() {
    let dir = Scratch::new("serve", "room");
    let server = Server::start(&dir, &["--serve-max-agents", "2"]);
    let go = dir.join("go");
    server.last("a", "hello", "done");
    server.last("b", "hello", "done");
    assert_eq!(server.last("c", "hello", "done"), "hello");
    let states = |server: &Server| -> Vec<String> {
        let listed = server.ask("GET", "/sessions").1["sessions"].clone();
        listed.as_array().unwrap().iter().map(|one| one["state"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(states(&server), ["resting", "waiting", "waiting"]);
    // Two at once: each finds room.
    let (mut d, mut e) = (server.begin("d", "hello"), server.begin("e", "hello"));
    for turn in [&mut d, &mut e] {
        let last = std::iter::from_fn(|| turn.next()).last().unwrap();
        assert_eq!(last.0, "done", "{last:?}");
    }
    assert_eq!(states(&server), ["resting", "resting", "resting", "waiting", "waiting"]);
    // Those that work are not ended for anybody.
    let wait = format!("wait {}", go.display());
    let (mut b, mut c) = (server.begin("b", &wait), server.begin("c", &wait));
    assert!(b.next().is_some() && c.next().is_some());
    assert_eq!(server.begin("a", "hello").status, 503);
    std::fs::write(&go, "").unwrap();
    while b.next().unwrap().0 != "done" {}
    assert_eq!(server.last("a", "hello", "done"), "hello");
    while c.next().unwrap().0 != "done" {}
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn who_hangs_up_ends_a_turn_only_where_that_was_asked_for() {
    let dir = Scratch::new("serve", "gone");
    let go = dir.join("go");
    let server = Server::start(&dir, &[]);
    let mut turn = server.begin("a", &format!("wait {}", go.display()));
    turn.next().unwrap();
    drop(turn);
    assert_eq!(server.ask("GET", "/sessions/a").1["state"], "working");
    std::fs::write(&go, "").unwrap();
    wait_for("the turn to end", || (server.ask("GET", "/sessions/a").1["state"] == "waiting").then_some(()));
    let booked = || std::fs::read_to_string(dir.join("ledger.jsonl")).unwrap_or_default();
    wait_for("its cost", || booked().contains("\"cost_usd\":0.01").then_some(()));
    assert_eq!(server.stop(), Some(0));

    let server = Server::start(&dir, &["--serve-interrupt-when-gone"]);
    let mut turn = server.begin("b", "until interrupted");
    turn.next().unwrap();
    drop(turn);
    let log = || std::fs::read_to_string(dir.join("log")).unwrap();
    wait_for("the interrupt", || log().contains("interrupted").then_some(()));
}

#[test]
fn what_is_ended_leaves_nothing_and_is_told_so() {
    let dir = Scratch::new("serve", "ended");
    let server = Server::start(&dir, &["--stop-end", "100ms", "--stop-terminate", "500ms"]);
    let mut turn = server.begin("a", "wait /nonexistent");
    turn.next().unwrap();
    assert_eq!(server.ask("DELETE", "/sessions/a").0, 204);
    let last = std::iter::from_fn(|| turn.next()).last().unwrap();
    assert_eq!(last, (String::from("error"), json!({"message": "the session was ended"})));
    // What its agent says on its way out is not remembered.
    assert_eq!(server.ask("GET", "/sessions/a").0, 404);
    let mut turn = server.begin("b", "wait /nonexistent");
    turn.next().unwrap();
    let pids: Vec<i32> = server.starts().iter().map(|start| start["pid"].as_i64().unwrap().try_into().unwrap()).collect();
    assert_eq!(pids.len(), 2);
    server.running.signal(Signal::TERM);
    let last = std::iter::from_fn(|| turn.next()).last().unwrap();
    assert_eq!(last.0, "error");
    pids.into_iter().for_each(gone);
    assert_eq!({ server }.running.code(), Some(0));
}

#[test]
fn what_an_agent_says_after_its_session_was_ended_is_not_remembered_and_it_counts_until_it_is_gone() {
    let dir = Scratch::new("serve", "dropped");
    let server = Server::start(&dir, &["--serve-max-agents", "1"]);
    let go = dir.join("go");
    let mut turn = server.begin("a", &format!("wait {}", go.display()));
    while turn.next().unwrap().0 != "message" {}
    assert_eq!(server.ask("DELETE", "/sessions/a").0, 204);
    let mut next = server.begin("a", "hello");
    let pid = |n: usize| i32::try_from(server.starts()[n]["pid"].as_i64().unwrap()).unwrap();
    let first = pid(0);
    std::fs::write(&go, "").unwrap();
    assert!(std::iter::from_fn(|| turn.next()).any(|event| event.0 == "error"));
    let answer = std::iter::from_fn(|| next.next()).last().unwrap();
    assert_eq!(answer.0, "done", "{answer:?}");
    gone(first);
    assert_eq!(server.starts()[1]["resume"], json!([]), "another conversation");
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn a_crowd_that_says_nothing_keeps_nobody_out() {
    let dir = Scratch::new("serve", "crowd");
    let server = Server::start(&dir, &[]);
    let go = dir.join("go");
    let mut turn = server.begin("a", &format!("wait {}", go.display()));
    turn.next().unwrap();
    let crowd: Vec<TcpStream> = (0..520).map(|_| TcpStream::connect(server.address).unwrap()).collect();
    assert_eq!(server.raw("GET", "/health", "", "").0, 200);
    // Whoever has a turn, keeps it.
    std::fs::write(&go, "").unwrap();
    assert_eq!(std::iter::from_fn(|| turn.next()).last().unwrap().0, "done");
    drop(crowd);
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn without_a_token_it_serves_loopback_alone_and_no_page_in_a_browser() {
    let dir = Scratch::new("serve", "open");
    let refused = |flags: &[&str], token: Option<&str>| {
        let mut command = command(&dir, flags);
        command.env_remove("AGENT_AUTH_TOKEN").envs(token.map(|token| ("AGENT_AUTH_TOKEN", token)));
        let done = command.output().unwrap();
        assert_eq!(done.status.code(), Some(1));
        String::from_utf8(done.stderr).unwrap()
    };
    assert!(refused(&[], None).contains("there is no token"));
    assert!(refused(&["--serve-listen", "0.0.0.0:0", "--serve-open"], None).contains("loopback alone"));
    assert!(refused(&[], Some("short")).contains("AGENT_AUTH_TOKEN: a token has at least 16"));
    assert!(refused(&["--serve-token-file", "/nonexistent"], None).contains("the token cannot be had"));
    let mut command = command(&dir, &["--serve-open"]);
    command.env_remove("AGENT_AUTH_TOKEN").stderr(Stdio::piped());
    let mut running = Running::start(command);
    let mut log = BufReader::new(running.child.stderr.take().unwrap());
    let mut line = String::new();
    log.read_line(&mut line).unwrap();
    let address = line.trim_end().rsplit_once("address=").unwrap().1.parse().unwrap();
    let server = Server { running, address, dir: dir.to_owned(), _log: log };
    let message = r#"{"prompt": "hello"}"#;
    assert_eq!(server.raw("POST", "/sessions/a/messages", "Origin: http://evil.example\r\n", message).0, 403);
    assert_eq!(server.raw("POST", "/sessions/a/messages", "Sec-Fetch-Site: cross-site\r\n", message).0, 403);
    // A name that leads here all of a sudden.
    assert_eq!(server.raw("POST", "/sessions/a/messages", "Host: evil.example\r\n", message).0, 421);
    assert_eq!(server.starts().len(), 0);
    assert_eq!(server.raw("POST", "/sessions/a/messages", "", message).0, 200);
}

const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;
const FIN: u8 = 0x80;

/// A client that can also do what none may.
struct Socket {
    stream: BufReader<TcpStream>,
}

impl Socket {
    /// The status, and the socket if there is one.
    fn open(server: &Server, path: &str, head: &str) -> (u16, Option<Socket>) {
        let mut stream = TcpStream::connect(server.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: here\r\n{head}\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut stream = BufReader::new(stream);
        let (mut answer, mut line) = (String::new(), String::new());
        while line != "\r\n" {
            line.clear();
            assert!(stream.read_line(&mut line).unwrap() > 0, "{answer}");
            answer.push_str(&line);
        }
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        // The example of the RFC.
        let opened = status == 101 && answer.contains("sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n");
        (status, opened.then_some(Socket { stream }))
    }

    fn of(server: &Server, id: &str) -> Socket {
        Socket::open(server, &format!("/sessions/{id}/ws"), &format!("{}{UPGRADE}", bearer())).1.unwrap()
    }

    fn write(&mut self, first: u8, payload: &[u8]) {
        let key = [1, 2, 3, 4];
        let mut frame = vec![first];
        match payload.len() {
            n @ ..126 => frame.push(0x80 | u8::try_from(n).unwrap()),
            n => {
                frame.push(0x80 | 127);
                frame.extend((n as u64).to_be_bytes());
            }
        }
        frame.extend(key);
        frame.extend(payload.iter().enumerate().map(|(at, byte)| byte ^ key[at % 4]));
        // Who is refused early may have closed.
        self.stream.get_mut().write_all(&frame).ok();
    }

    fn say(&mut self, prompt: &str) {
        self.write(FIN | TEXT, json!({"prompt": prompt}).to_string().as_bytes());
    }

    /// The next frame's kind, and what is in it.
    fn frame(&mut self) -> (u8, Vec<u8>) {
        let mut head = [0; 2];
        self.stream.read_exact(&mut head).unwrap();
        assert_eq!((head[0] & 0xf0, head[1] & 0x80), (FIN, 0), "whole, and without a mask");
        let size = match head[1] {
            126 => {
                let mut size = [0; 2];
                self.stream.read_exact(&mut size).unwrap();
                u64::from(u16::from_be_bytes(size))
            }
            127 => {
                let mut size = [0; 8];
                self.stream.read_exact(&mut size).unwrap();
                u64::from_be_bytes(size)
            }
            n => u64::from(n),
        };
        let mut payload = vec![0; usize::try_from(size).unwrap()];
        self.stream.read_exact(&mut payload).unwrap();
        (head[0] & 0xf, payload)
    }

    /// The next event.
    fn event(&mut self) -> Value {
        loop {
            match self.frame() {
                (TEXT, text) => return serde_json::from_slice(&text).unwrap(),
                (PING, said) => self.write(FIN | PONG, &said),
                (PONG, _) => {}
                (kind, what) => panic!("{kind} {what:?}"),
            }
        }
    }

    /// The events of a turn.
    fn turn(&mut self) -> Vec<Value> {
        let mut events = Vec::new();
        while !events.last().is_some_and(|event: &Value| event["event"] != "message") {
            events.push(self.event());
        }
        events
    }

    /// Why it was closed; after that nothing comes.
    fn closed(mut self) -> u16 {
        loop {
            if let (CLOSE, said) = self.frame() {
                self.write(FIN | CLOSE, &said);
                let mut rest = Vec::new();
                self.stream.read_to_end(&mut rest).ok();
                assert_eq!(rest, b"");
                return u16::from_be_bytes([said[0], said[1]]);
            }
        }
    }
}

const UPGRADE: &str = "Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

#[test]
fn a_websocket_says_the_same_and_messages_wait_for_their_turn() {
    let dir = Scratch::new("serve", "socket");
    let server = Server::start(&dir, &["--serve-messages", "cli"]);
    let told = server.say("a", "hello");
    let mut socket = Socket::of(&server, "a");
    socket.say("hello");
    let events = socket.turn();
    let names: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names, told.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>());
    assert_eq!(events[0]["data"], told[0].1);
    assert_eq!((&events[2]["data"]["result"], events[3].get("data")), (&json!("hello"), None));
    // In two frames, with a ping between; what is no message is told so, and nothing else comes of it.
    let message = json!({"prompt": "in parts"}).to_string();
    socket.write(TEXT, &message.as_bytes()[..7]);
    socket.write(FIN | PING, b"still there?");
    socket.write(FIN, &message.as_bytes()[7..]);
    socket.write(FIN | TEXT, br#"{"prompt": " "}"#);
    assert_eq!(socket.frame(), (PONG, b"still there?".to_vec()));
    let mut events = socket.turn();
    let refused = events.iter().position(|event| event["event"] == "error").unwrap();
    assert_eq!(events.remove(refused)["data"], json!({"message": "`prompt` is empty", "status": 400}));
    if events.last().is_none_or(|event| event["event"] != "done") {
        events.extend(socket.turn());
    }
    assert_eq!(events[events.len() - 2]["data"]["result"], "in parts");
    // One turn at a time, each in its order; who else speaks is told to wait, here and there.
    let go = dir.join("go");
    socket.say(&format!("wait {}", go.display()));
    assert_eq!(socket.event()["data"]["subtype"], "init");
    for n in 0..3 {
        socket.say(&n.to_string());
    }
    assert_eq!(server.begin("a", "me, too").status, 409);
    let mut other = Socket::of(&server, "a");
    other.say("me, too");
    assert_eq!(other.event()["data"]["status"], 409);
    socket.write(FIN | PING, b"in the middle");
    while socket.frame() != (PONG, b"in the middle".to_vec()) {}
    std::fs::write(&go, "").unwrap();
    socket.turn();
    for n in 0..3 {
        let turn = socket.turn();
        assert_eq!(turn[turn.len() - 2]["data"]["result"], n.to_string());
    }
    // As a fleet says whose it is.
    let head = format!("{}{UPGRADE}Agent-Session: b\r\n", bearer());
    let mut third = Socket::open(&server, "/ws", &head).1.unwrap();
    third.say("fails");
    assert_eq!(third.turn().last().unwrap()["data"]["message"], "it cannot be done");
    assert_eq!(server.ask("GET", "/sessions/b").1["state"], "waiting");
    // Whoever closes is answered in kind; the end of the server is one, too.
    third.write(FIN | CLOSE, &[&4001_u16.to_be_bytes()[..], b"enough"].concat());
    assert_eq!(third.closed(), 4001);
    socket.say("until interrupted");
    while socket.event()["data"]["type"] != "assistant" {}
    server.running.signal(Signal::TERM);
    assert_eq!(other.closed(), 1001);
    assert_eq!(socket.turn().last().unwrap()["data"]["message"], "the session was ended");
    assert_eq!(socket.closed(), 1001);
    let mut server = server;
    assert_eq!(server.running.code(), Some(0));
}

#[test]
fn a_websocket_is_for_whom_the_contract_says_and_ends_with_a_reason() {
    let dir = Scratch::new("serve", "handshake");
    let server = Server::start(&dir, &["--serve-interrupt-when-gone"]);
    let status = |path: &str, head: &str| Socket::open(&server, path, head).0;
    let with = |from: &str, to: &str| format!("{}{}", bearer(), UPGRADE.replace(from, to));
    assert_eq!(status("/sessions/a/ws", UPGRADE), 401);
    assert_eq!(status("/sessions/-a/ws", &with("", "")), 400);
    assert_eq!(status("/ws", &with("", "")), 400, "nobody says whose");
    assert_eq!(status("/sessions/a/ws", &with("Version: 13", "Version: 8")), 426);
    assert_eq!(status("/sessions/a/ws", &with("WebSocket\r", "h2c\r")), 426);
    assert_eq!(status("/sessions/a/ws", &with("dGhl", "")), 400);
    let code = |first: u8, payload: &[u8]| {
        let mut socket = Socket::of(&server, "a");
        socket.write(first, payload);
        socket.closed()
    };
    assert_eq!(code(FIN | BINARY, b"{}"), 1003);
    assert_eq!(code(FIN | TEXT, b"\xff"), 1007);
    assert_eq!(code(FIN | TEXT, &vec![b' '; (1 << 20) + 1]), 1009);
    assert_eq!(code(FIN | 0x40 | TEXT, b"{}"), 1002);
    let mut socket = Socket::of(&server, "a");
    socket.stream.get_mut().write_all(b"\x81\x00").unwrap();
    assert_eq!(socket.closed(), 1002, "without a mask");
    assert_eq!(server.starts().len(), 0, "nobody was started for any of this");
    // Who says more than may wait is sent away, and the turn that nobody listens to any more is interrupted.
    let mut socket = Socket::of(&server, "a");
    for _ in 0..20 {
        socket.say("until interrupted");
    }
    assert_eq!(socket.closed(), 1008);
    wait_for("the turn to end", || (server.ask("GET", "/sessions/a").1["state"] == "waiting").then_some(()));
    assert!(std::fs::read_to_string(dir.join("log")).unwrap().contains("interrupted\": true"));
    assert_eq!(server.stop(), Some(0));
}

//! Vercel Sandbox, of one team and project.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::contract::Contract;
use super::machine::Machine;
use super::{Api, Content, Reply, Request, TOKEN};
use crate::conformance::Call;

pub(crate) const PAGE: usize = 3;
/// How long a session takes to begin, and to end.
const TAKES: Duration = Duration::from_millis(200);

pub(crate) struct Vercel {
    api: Contract,
    boxes: Mutex<Vec<Sandbox>>,
}

struct Sandbox {
    asked: Value,
    created: i64,
    timeout: i64,
    machine: Arc<Machine>,
    session: u32,
    status: &'static str,
    changed: Instant,
    started: i64,
    /// What the session has been given, in milliseconds.
    given: i64,
}

fn now() -> i64 {
    Timestamp::now().as_millisecond()
}

impl Vercel {
    pub(crate) fn new() -> Self {
        Self { api: Contract::parse(include_str!("../../../../tests/specs/vercel/api.json")), boxes: Mutex::default() }
    }

    pub(crate) fn count(&self, key: &str) -> usize {
        self.boxes.lock().unwrap().iter().filter(|sandbox| sandbox.name() == key).count()
    }

    /// How many sessions it has had, and how long the last may last.
    pub(crate) fn sessions(&self, key: &str) -> (u32, Duration) {
        let boxes = self.boxes.lock().unwrap();
        let sandbox = boxes.iter().find(|sandbox| sandbox.name() == key).expect("it is there");
        (sandbox.session, Duration::from_millis(sandbox.given.try_into().expect("a time")))
    }

    async fn manage(&self, request: &Request) -> Reply {
        let no = |status: u16, message: &str| Reply::json(status, self.refuse(status, message));
        let body = request.json();
        if let ("POST", ["v2", "sandboxes", "sessions", id, "cmd"]) = (request.method.as_str(), &request.segments()[..]) {
            let machine = {
                let mut boxes = self.boxes.lock().unwrap();
                boxes.iter_mut().for_each(Sandbox::settle);
                let Some(sandbox) = boxes.iter().find(|sandbox| sandbox.session_id() == *id) else {
                    return no(404, "no such session");
                };
                if sandbox.status != "running" {
                    return no(410, "Sandbox is stopped");
                }
                sandbox.machine.clone()
            };
            return command(machine, id, &body).await;
        }
        let mut boxes = self.boxes.lock().unwrap();
        boxes.iter_mut().for_each(Sandbox::settle);
        match (request.method.as_str(), &request.segments()[..]) {
            ("POST", ["v3", "sandboxes"]) => {
                let name = body["name"].as_str().expect("the contract says so");
                if boxes.iter().any(|sandbox| sandbox.name() == name) {
                    return no(409, "A sandbox with this name already exists");
                }
                if body["image"] == "none" {
                    return no(404, "Image not found");
                }
                let env = serde_json::from_value(body["env"].clone()).unwrap_or_default();
                let timeout = body["timeout"].as_i64().unwrap_or(300_000);
                let mut sandbox = Sandbox {
                    machine: Arc::new(Machine::new(env)),
                    asked: body.clone(),
                    created: now(),
                    timeout,
                    session: 0,
                    status: "stopped",
                    changed: Instant::now(),
                    started: 0,
                    given: 0,
                };
                sandbox.begin();
                let said = sandbox.looked();
                boxes.push(sandbox);
                Reply::json(200, said)
            }
            ("GET", ["v2", "sandboxes"]) => {
                let tag = request.query("tags").and_then(|tag| tag.split_once(':'));
                let fit = boxes.iter().filter(|sandbox| tag.is_none_or(|(name, value)| sandbox.asked["tags"][name] == value));
                let fit: Vec<Value> = fit.map(Sandbox::said).collect();
                let from: usize = request.query("cursor").map_or(0, |cursor| cursor.parse().expect("one of ours"));
                let next = (from + PAGE < fit.len()).then(|| (from + PAGE).to_string());
                let page: Vec<Value> = fit.into_iter().skip(from).take(PAGE).collect();
                Reply::json(200, json!({"pagination": {"count": page.len(), "next": next}, "sandboxes": page}))
            }
            ("POST", ["v2", "sandboxes", "sessions", id, verb]) => {
                let Some(sandbox) = boxes.iter_mut().find(|sandbox| sandbox.session_id() == *id) else {
                    return no(404, "no such session");
                };
                match *verb {
                    _ if !matches!(sandbox.status, "running" | "pending") => return no(422, "Sandbox is not running"),
                    "stop" => sandbox.halt(),
                    // It adds.
                    _ => sandbox.given += body["duration"].as_i64().expect("the contract says so"),
                }
                Reply::json(200, json!({ "session": sandbox.run() }))
            }
            (method, ["v2", "sandboxes", name]) => {
                let Some(at) = boxes.iter().position(|sandbox| sandbox.name() == *name) else {
                    return no(404, "Sandbox not found");
                };
                let sandbox = &mut boxes[at];
                match method {
                    "DELETE" => return Reply::json(200, json!({ "sandbox": boxes.remove(at).said() })),
                    "PATCH" => {
                        sandbox.timeout = body["timeout"].as_i64().unwrap_or(sandbox.timeout);
                        return Reply::json(200, json!({ "sandbox": sandbox.said() }));
                    }
                    _ if request.query("resume") == Some("true") && sandbox.status == "stopped" => sandbox.begin(),
                    _ => {}
                }
                Reply::json(200, sandbox.looked())
            }
            other => panic!("the contract has {other:?}"),
        }
    }
}

async fn command(machine: Arc<Machine>, session: &str, body: &Value) -> Reply {
    let mut argv = vec![body["command"].as_str().expect("the contract says so").to_owned()];
    argv.extend(serde_json::from_value::<Vec<String>>(body["args"].clone()).unwrap_or_default());
    let env: BTreeMap<String, String> = serde_json::from_value(body["env"].clone()).unwrap_or_default();
    let said = |exit: Value| {
        let command = json!({
            "id": "cmd_1", "name": argv[0], "args": argv[1..], "cwd": "/vercel/sandbox", "sessionId": session, "exitCode": exit, "startedAt": now(),
        });
        json!({ "command": command })
    };
    if body["wait"] != true {
        return match machine.spawn(&argv, &env, false) {
            Ok(mut child) => {
                std::thread::spawn(move || child.wait());
                Reply::json(200, said(Value::Null))
            }
            Err(error) => Reply::json(400, json!({"error": {"code": "bad_request", "message": error.to_string()}})),
        };
    }
    let most = Duration::from_millis(body["timeout"].as_u64().unwrap_or(300_000));
    let (words, env) = (argv.clone(), env.clone());
    let asks = argv.iter().any(|word| word.contains("kill -TERM"));
    let done = tokio::task::spawn_blocking(move || {
        if asks {
            machine.settle();
        }
        machine.run(&words, &env, b"", most)
    })
    .await
    .expect("it runs");
    let mut lines = vec![said(Value::Null)];
    match done {
        Ok(done) => {
            if body["logs"] == true {
                for (stream, bytes) in [("stdout", &done.stdout), ("stderr", &done.stderr)] {
                    for piece in String::from_utf8_lossy(bytes).as_bytes().chunks(60_000) {
                        lines.push(json!({"stream": stream, "data": String::from_utf8_lossy(piece)}));
                    }
                }
            }
            lines.push(said(json!(done.code.unwrap_or(137))));
        }
        Err(error) => lines.push(json!({"stream": "error", "data": {"code": "spawn", "message": error.to_string()}})),
    }
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    Reply { status: 200, headers: Vec::new(), content: Content::Bytes("application/x-ndjson", text.into_bytes()) }
}

impl Sandbox {
    fn name(&self) -> &str {
        self.asked["name"].as_str().unwrap_or_default()
    }

    fn session_id(&self) -> String {
        format!("sess-{}-{}", self.name(), self.session)
    }

    fn begin(&mut self) {
        self.session += 1;
        (self.status, self.changed, self.started, self.given) = ("pending", Instant::now(), now(), self.timeout);
    }

    fn halt(&mut self) {
        self.machine.halt();
        (self.status, self.changed) = ("stopping", Instant::now());
    }

    fn settle(&mut self) {
        match self.status {
            "pending" if self.changed.elapsed() > TAKES => self.status = "running",
            "stopping" if self.changed.elapsed() > TAKES => self.status = "stopped",
            "running" if self.started + self.given <= now() => self.halt(),
            _ => {}
        }
    }

    fn said(&self) -> Value {
        json!({
            "name": self.name(), "persistent": true, "vcpus": self.asked["resources"]["vcpus"],
            "memory": self.asked["resources"]["vcpus"].as_u64().unwrap_or(1) * 2048, "timeout": self.timeout, "createdAt": self.created,
            "updatedAt": now(), "currentSessionId": self.session_id(), "status": self.status, "tags": self.asked["tags"],
        })
    }

    fn run(&self) -> Value {
        json!({
            "id": self.session_id(), "memory": 2048, "vcpus": 1, "region": "iad1", "timeout": self.given, "status": self.status,
            "requestedAt": self.started, "startedAt": self.started, "createdAt": self.started, "cwd": "/vercel/sandbox", "updatedAt": now(),
        })
    }

    fn looked(&self) -> Value {
        let route = |port: &Value| json!({"url": format!("https://sb-{port}.vercel.run"), "subdomain": format!("sb-{port}"), "port": port});
        let routes: Vec<Value> = self.asked["ports"].as_array().into_iter().flatten().map(route).collect();
        json!({ "sandbox": self.said(), "session": self.run(), "routes": routes })
    }
}

impl Api for Vercel {
    fn call(&self, request: &Request) -> Option<Call> {
        match (request.method.as_str(), &request.segments()[..]) {
            ("POST", ["v3", "sandboxes"]) => Some(Call::Create),
            ("GET", ["v2", "sandboxes"]) => Some(Call::List),
            ("GET", ["v2", "sandboxes", _]) => Some(Call::State),
            ("DELETE", ["v2", "sandboxes", _]) => Some(Call::Delete),
            _ => None,
        }
    }

    fn judge(&self, request: &Request) -> Result<(), String> {
        if request.header("authorization") != format!("Bearer {TOKEN}") || request.query("teamId") != Some("team_fake") {
            return Err(String::from("without the token or the team"));
        }
        self.api.request(&request.method, &request.path, &request.query, &request.body)?;
        let body = request.json();
        let many = |name: &str, most: usize| {
            let has = body[name].as_object().map(serde_json::Map::len).or(body[name].as_array().map(Vec::len));
            has.is_some_and(|has| has > most)
        };
        if many("tags", 5) || many("ports", 4) { Err(String::from("too many tags or ports")) } else { Ok(()) }
    }

    fn judge_reply(&self, request: &Request, reply: &Reply) -> Result<(), String> {
        match &reply.content {
            Content::Json(body) => self.api.answer(&request.method, &request.path, reply.status, body),
            Content::Bytes(..) | Content::Stream(..) | Content::Upgrade(..) => Ok(()),
        }
    }

    fn answer<'a>(&'a self, request: &'a Request) -> BoxFuture<'a, Reply> {
        self.manage(request).boxed()
    }

    fn refuse(&self, status: u16, message: &str) -> Value {
        json!({"error": {"code": status.to_string(), "message": message}})
    }

    fn unknown_state(&self, body: &mut Value) {
        body["sandbox"]["status"] = json!("hibernating");
    }
}

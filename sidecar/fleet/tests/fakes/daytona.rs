//! Daytona: its interface and, below another path, the toolbox of each container.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::contract::Contract;
use super::machine::{Machine, kill};
use super::{Api, Content, Reply, Request, TOKEN};
use crate::conformance::Call;

pub(crate) const PAGE: usize = 3;
/// How long a start takes.
const STARTS: Duration = Duration::from_millis(300);

pub(crate) struct Daytona {
    api: Contract,
    toolbox: Contract,
    address: String,
    boxes: Mutex<Vec<Sandbox>>,
}

struct Sandbox {
    id: String,
    asked: Value,
    created: Timestamp,
    state: &'static str,
    started: Instant,
    activity: u32,
    machine: Arc<Machine>,
    /// The process that was begun first: what is asked to end.
    main: Option<u32>,
    sessions: Vec<String>,
}

impl Daytona {
    pub(crate) fn new(address: &str) -> Self {
        Self {
            api: Contract::parse(include_str!("../../../../tests/specs/daytona/api.json")),
            toolbox: Contract::parse(include_str!("../../../../tests/specs/daytona/toolbox.json")),
            address: address.to_owned(),
            boxes: Mutex::default(),
        }
    }

    pub(crate) fn count(&self, key: &str) -> usize {
        self.boxes.lock().unwrap().iter().filter(|sandbox| sandbox.asked["name"] == key).count()
    }

    /// What was asked for when it was made, and how often it was said to be needed.
    pub(crate) fn made(&self, key: &str) -> (Value, u32) {
        let boxes = self.boxes.lock().unwrap();
        let sandbox = boxes.iter().find(|sandbox| sandbox.asked["name"] == key).expect("it is there");
        (sandbox.asked.clone(), sandbox.activity)
    }

    fn manage(&self, request: &Request) -> Reply {
        let no = |status: u16, message: &str| Reply::json(status, self.refuse(status, message));
        let mut boxes = self.boxes.lock().unwrap();
        for sandbox in boxes.iter_mut() {
            sandbox.settle();
        }
        match (request.method.as_str(), &request.segments()[..]) {
            ("POST", ["sandbox"]) => {
                let asked = request.json();
                if asked["snapshot"] == "none" {
                    return no(404, "Snapshot none not found");
                }
                if boxes.iter().any(|sandbox| sandbox.asked["name"] == asked["name"]) {
                    return no(409, "Sandbox with this name already exists");
                }
                let env = serde_json::from_value(asked["env"].clone()).unwrap_or_default();
                let sandbox = Sandbox {
                    id: uuid::Uuid::now_v7().to_string(),
                    machine: Arc::new(Machine::new(env)),
                    asked,
                    created: Timestamp::now(),
                    state: "creating",
                    started: Instant::now(),
                    activity: 0,
                    main: None,
                    sessions: Vec::new(),
                };
                let said = sandbox.said(&self.address);
                boxes.push(sandbox);
                Reply::json(200, said)
            }
            ("GET", ["sandbox"]) => {
                let asked: BTreeMap<String, Value> =
                    serde_json::from_str(request.query("labels").unwrap_or("{}")).expect("labels");
                let fit =
                    boxes.iter().filter(|sandbox| asked.iter().all(|(name, value)| sandbox.asked["labels"][name] == *value));
                let fit: Vec<Value> = fit.map(|sandbox| sandbox.said(&self.address)).collect();
                let from: usize = request.query("cursor").map_or(0, |cursor| cursor.parse().expect("one of ours"));
                let next = (from + PAGE < fit.len()).then(|| (from + PAGE).to_string());
                Reply::json(200, json!({"items": fit.into_iter().skip(from).take(PAGE).collect::<Vec<_>>(), "nextCursor": next}))
            }
            (method, ["sandbox", native, verb @ ..]) => {
                let Some(at) = boxes.iter().position(|sandbox| sandbox.id == *native || sandbox.asked["name"] == *native) else {
                    return no(404, &format!("Sandbox with ID or name {native} not found"));
                };
                let sandbox = &mut boxes[at];
                match (method, verb) {
                    ("GET", []) => {}
                    ("DELETE", []) => {
                        let mut said = boxes.remove(at).said(&self.address);
                        said["state"] = json!("destroyed");
                        return Reply::json(200, said);
                    }
                    ("POST", ["start"]) if matches!(sandbox.state, "stopped" | "paused") => {
                        (sandbox.state, sandbox.started) = ("starting", Instant::now())
                    }
                    ("POST", ["start"]) => return no(400, "Sandbox is not in valid state"),
                    ("POST", ["pause"]) => sandbox.state = "paused",
                    ("POST", ["stop"]) if sandbox.state == "stopped" => return no(400, "Sandbox is not started"),
                    ("POST", ["stop"]) => {
                        sandbox.state = "stopping";
                        if request.query("force") == Some("true") {
                            sandbox.halt();
                        } else if let Some(main) = sandbox.main {
                            sandbox.machine.settle();
                            kill("-TERM", &main.to_string());
                        } else {
                            sandbox.halt();
                        }
                    }
                    ("POST", ["last-activity"]) => {
                        sandbox.activity += 1;
                        return Reply::empty(201);
                    }
                    ("GET", ["ports", port, "preview-url"]) => {
                        let url = format!("https://{port}-{}.proxy.daytona.work", sandbox.id);
                        return Reply::json(200, json!({"sandboxId": sandbox.id, "url": url, "token": "pv-7f3a"}));
                    }
                    other => panic!("the contract has {other:?}"),
                }
                Reply::json(200, sandbox.said(&self.address))
            }
            other => panic!("the contract has {other:?}"),
        }
    }

    async fn work(&self, request: &Request) -> Reply {
        let no = |status: u16, message: &str| {
            let path = request.path.join("/");
            let said = json!({"code": "FAKE", "message": message, "method": request.method, "path": path, "statusCode": status, "timestamp": "2026-01-01T00:00:00Z"});
            Reply::json(status, said)
        };
        let machine = {
            let mut boxes = self.boxes.lock().unwrap();
            let Some(sandbox) = boxes.iter_mut().find(|sandbox| sandbox.id == request.path[1]) else {
                return no(404, "no such sandbox");
            };
            sandbox.settle();
            if sandbox.state != "started" {
                return no(400, "Sandbox is not started");
            }
            sandbox.machine.clone()
        };
        let body = request.json();
        let shell = |command: &Value| ["sh", "-c", command.as_str().expect("the contract says so")].map(String::from).to_vec();
        let change = |change: &mut dyn FnMut(&mut Sandbox) -> Reply| {
            let mut boxes = self.boxes.lock().unwrap();
            boxes.iter_mut().find(|sandbox| sandbox.id == request.path[1]).map_or_else(|| no(404, "it has gone"), change)
        };
        match &request.segments()[2..] {
            ["process", "execute"] => {
                let env = serde_json::from_value(body["envs"].clone()).unwrap_or_default();
                let most = Duration::from_secs(body["timeout"].as_u64().unwrap_or(10));
                let argv = shell(&body["command"]);
                let done = tokio::task::spawn_blocking(move || machine.run(&argv, &env, b"", most))
                    .await
                    .expect("it runs")
                    .expect("there is a shell");
                if done.timed_out {
                    return no(408, "command execution timeout");
                }
                // Both outputs in one, as they came.
                let both = [done.stdout, done.stderr].concat();
                Reply::json(200, json!({"exitCode": done.code.unwrap_or(-1), "result": String::from_utf8_lossy(&both)}))
            }
            ["process", "session"] => change(&mut |sandbox| {
                let id = body["sessionId"].as_str().expect("the contract says so").to_owned();
                if sandbox.sessions.contains(&id) {
                    return no(409, "session already exists");
                }
                sandbox.sessions.push(id);
                Reply::empty(201)
            }),
            ["process", "session", id, "exec"] => change(&mut |sandbox| {
                if !sandbox.sessions.iter().any(|has| has == id) {
                    return no(404, "session not found");
                }
                let mut child = sandbox
                    .machine
                    .spawn(
                        &shell(&json!(format!("exec {}", body["command"].as_str().expect("the contract says so")))),
                        &BTreeMap::new(),
                        false,
                    )
                    .expect("there is a shell");
                if sandbox.asked["name"] == **id && sandbox.main.is_none() {
                    sandbox.main = Some(child.id());
                }
                std::thread::spawn(move || child.wait());
                Reply::json(202, json!({"cmdId": "1"}))
            }),
            other => panic!("the contract has {other:?}"),
        }
    }
}

impl Sandbox {
    /// What time has made of it.
    fn settle(&mut self) {
        match self.state {
            "creating" | "starting" if self.started.elapsed() > STARTS => self.state = "started",
            "stopping" if self.main.is_none_or(|main| !std::path::Path::new(&format!("/proc/{main}")).exists()) => {
                self.halt();
                self.state = "stopped";
            }
            _ => {}
        }
    }

    fn halt(&mut self) {
        self.machine.halt();
        self.main = None;
        self.sessions.clear();
    }

    fn said(&self, address: &str) -> Value {
        let minutes = self.asked["ttlMinutes"].as_u64().unwrap_or(0);
        json!({
            "id": self.id, "organizationId": "fake", "name": self.asked["name"], "user": "daytona", "env": {}, "labels": self.asked["labels"],
            "public": false, "networkBlockAll": false, "target": "us", "cpu": 1, "gpu": 0, "memory": 1, "disk": 5, "state": self.state,
            "createdAt": self.created.to_string(), "autoDestroyAt": (self.created + Duration::from_secs(60 * minutes)).to_string(),
            // What their newer SDKs ask for, and the contract does not know yet.
            "kvm": false,
            "autoStopInterval": self.asked["autoStopInterval"],
            "toolboxProxyUrl": format!("{address}/toolbox"),
        })
    }
}

impl Api for Daytona {
    fn call(&self, request: &Request) -> Option<Call> {
        match (request.method.as_str(), &request.segments()[..]) {
            ("POST", ["sandbox"]) => Some(Call::Create),
            ("GET", ["sandbox"]) => Some(Call::List),
            ("GET", ["sandbox", _]) => Some(Call::State),
            ("DELETE", ["sandbox", _]) => Some(Call::Delete),
            _ => None,
        }
    }

    fn judge(&self, request: &Request) -> Result<(), String> {
        if request.header("authorization") != format!("Bearer {TOKEN}") {
            return Err(String::from("without the token"));
        }
        match request.path[0].as_str() {
            "toolbox" => self.toolbox.request(&request.method, &request.path[2..], &request.query, &request.body),
            _ => self.api.request(&request.method, &request.path, &request.query, &request.body),
        }
    }

    fn judge_reply(&self, request: &Request, reply: &Reply) -> Result<(), String> {
        let body = if let Content::Json(body) = &reply.content { body } else { &Value::Null };
        match request.path[0].as_str() {
            "toolbox" => self.toolbox.answer(&request.method, &request.path[2..], reply.status, body),
            _ => self.api.answer(&request.method, &request.path, reply.status, body),
        }
    }

    fn answer<'a>(&'a self, request: &'a Request) -> BoxFuture<'a, Reply> {
        async move { if request.path[0] == "toolbox" { self.work(request).await } else { self.manage(request) } }.boxed()
    }

    fn refuse(&self, status: u16, message: &str) -> Value {
        json!({"statusCode": status, "message": message, "error": "fake"})
    }

    fn unknown_state(&self, body: &mut Value) {
        body["state"] = json!("hibernating");
    }
}

//! E2B: its interface and, told apart by a header, the daemon in each sandbox.

use std::collections::BTreeMap;
use std::io::Read;
use std::process::ChildStdin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::contract::Contract;
use super::machine::{Machine, kill};
use super::{Api, Content, Reply, Request, TOKEN};
use crate::conformance::Call;
use agent_fleet::provider::KEY_LABEL;

/// Containers on a page, however many are asked for.
pub(crate) const PAGE: usize = 3;

pub(crate) struct E2b {
    api: Contract,
    daemon: Contract,
    /// How long a new one is not listed.
    pub(crate) lag: Mutex<Duration>,
    boxes: Mutex<Vec<Box>>,
}

struct Box {
    id: String,
    template: String,
    metadata: BTreeMap<String, String>,
    started: Timestamp,
    ends: Timestamp,
    paused: bool,
    machine: Arc<Machine>,
    processes: Arc<Mutex<Vec<Process>>>,
}

struct Process {
    pid: u32,
    tag: Option<String>,
    command: Vec<String>,
    stdin: Option<ChildStdin>,
}

impl E2b {
    pub(crate) fn new() -> Self {
        Self {
            api: Contract::parse(include_str!("../../../../tests/specs/e2b/api.json")),
            daemon: Contract::parse(include_str!("../../../../tests/specs/e2b/process.json")),
            lag: Mutex::default(),
            boxes: Mutex::default(),
        }
    }

    pub(crate) fn count(&self, key: &str) -> usize {
        self.tidied().iter().filter(|sandbox| sandbox.metadata.get(KEY_LABEL).is_some_and(|has| has == key)).count()
    }

    /// Puts one there that nobody has asked for through us.
    pub(crate) fn insert(&self, key: &str) -> String {
        let metadata = BTreeMap::from([(String::from(KEY_LABEL), key.to_owned())]);
        self.add("base", metadata, BTreeMap::new(), 300)
    }

    pub(crate) fn ends(&self, id: &str) -> Timestamp {
        self.tidied().iter().find(|sandbox| sandbox.id == id).expect("it is there").ends
    }

    /// Those that are there, without those whose time is over.
    fn tidied(&self) -> std::sync::MutexGuard<'_, Vec<Box>> {
        let mut boxes = self.boxes.lock().unwrap();
        boxes.retain(|sandbox| sandbox.paused || sandbox.ends > Timestamp::now());
        boxes
    }

    fn add(&self, template: &str, metadata: BTreeMap<String, String>, env: BTreeMap<String, String>, timeout: u64) -> String {
        let id = format!("i{}", &uuid::Uuid::now_v7().simple().to_string()[12..]);
        let now = Timestamp::now();
        self.tidied().push(Box {
            id: id.clone(),
            template: template.to_owned(),
            metadata,
            started: now,
            ends: now + Duration::from_secs(timeout),
            paused: false,
            machine: Arc::new(Machine::new(env)),
            processes: Arc::default(),
        });
        id
    }

    fn list(&self, request: &Request) -> Reply {
        let asked = reqwest::Url::parse(&format!("query:?{}", request.query("metadata").unwrap_or_default()))
            .expect("a query in a query");
        let asked: Vec<(String, String)> = asked.query_pairs().into_owned().collect();
        let states = request.query("state").unwrap_or("running,paused");
        let lag = *self.lag.lock().unwrap();
        let boxes = self.tidied();
        let mut fit: Vec<&Box> = boxes
            .iter()
            .filter(|sandbox| sandbox.started + lag <= Timestamp::now())
            .filter(|sandbox| asked.iter().all(|(name, value)| sandbox.metadata.get(name) == Some(value)))
            .filter(|sandbox| states.split(',').any(|state| state == sandbox.state()))
            .collect();
        // The newest first.
        fit.reverse();
        let from =
            request.query("nextToken").map_or(0, |token| token.trim_start_matches("from-").parse().expect("a token of ours"));
        let next = from + PAGE;
        let mut reply = Reply::json(200, fit.iter().skip(from).take(PAGE).map(|sandbox| sandbox.listed()).collect());
        if next < fit.len() {
            reply.headers.push(("x-next-token", format!("from-{next}")));
        }
        reply
    }

    fn manage(&self, request: &Request) -> Reply {
        let body = request.json();
        let no = |status: u16, message: &str| Reply::json(status, self.refuse(status, message));
        let seconds = |least: u64| body["timeout"].as_u64().unwrap_or(least);
        match (request.method.as_str(), &request.segments()[..]) {
            ("POST", ["v2", "sandboxes"]) => {
                if body["templateID"] == "none" {
                    return no(404, "template 'none' not found");
                }
                if seconds(300) > 24 * 3600 {
                    return no(400, "Timeout cannot be greater than 24 hours");
                }
                let map = |name: &str| serde_json::from_value(body[name].clone()).unwrap_or_default();
                let template = body["templateID"].as_str().expect("the contract says so");
                let id = self.add(template, map("metadata"), map("envVars"), seconds(300));
                Reply::json(201, self.made(&id))
            }
            ("GET", ["v2", "sandboxes"]) => self.list(request),
            (method, ["sandboxes", id] | ["sandboxes", id, ..] | ["v2", "sandboxes", id, ..]) => {
                let mut boxes = self.tidied();
                let Some(at) = boxes.iter().position(|sandbox| sandbox.id == *id) else {
                    return no(404, &format!("Sandbox {id} not found"));
                };
                let sandbox = &mut boxes[at];
                match (method, *request.segments().last().expect("it has one")) {
                    ("DELETE", _) => drop(boxes.remove(at)),
                    ("POST", "timeout") if sandbox.paused => return no(404, "it is paused"),
                    ("POST", "timeout") => sandbox.ends = Timestamp::now() + Duration::from_secs(seconds(15)),
                    ("POST", "pause") if sandbox.paused => return no(409, "it is paused already"),
                    ("POST", "pause") => sandbox.paused = true,
                    ("POST", "connect") => {
                        let status = if sandbox.paused { 201 } else { 200 };
                        let ends = Timestamp::now() + Duration::from_secs(seconds(300));
                        sandbox.ends = if sandbox.paused { ends } else { ends.max(sandbox.ends) };
                        sandbox.paused = false;
                        drop(boxes);
                        return Reply::json(status, self.made(id));
                    }
                    _ => {
                        let mut detail = sandbox.listed();
                        detail["envdAccessToken"] = json!(format!("envd-{id}"));
                        return Reply::json(200, detail);
                    }
                }
                Reply::empty(204)
            }
            other => panic!("the contract has {other:?}"),
        }
    }

    fn made(&self, id: &str) -> Value {
        json!({
            "templateID": "base", "sandboxID": id, "clientID": "fake", "envdVersion": "0.4.0",
            "envdAccessToken": format!("envd-{id}"), "domain": null,
        })
    }

    fn daemon(&self, request: &Request) -> Reply {
        let id = request.header("e2b-sandbox-id");
        let found = self
            .tidied()
            .iter()
            .find(|sandbox| sandbox.id == id && !sandbox.paused)
            .map(|sandbox| (sandbox.machine.clone(), sandbox.processes.clone()));
        let Some((machine, processes)) = found else {
            return Reply::json(502, json!({"sandboxId": id, "message": "The sandbox was not found", "code": 502}));
        };
        if request.header("x-access-token") != format!("envd-{id}") {
            return Reply::json(401, json!({"code": "unauthenticated", "message": "no token"}));
        }
        let body = message(request);
        if request.path[1] == "Start" {
            return start(
                &machine,
                &processes,
                &body,
                request.header("connect-timeout-ms").parse().ok().map(Duration::from_millis),
            );
        }
        let mut processes = processes.lock().unwrap();
        let (pid, tag) = (body["process"]["pid"].as_u64(), body["process"]["tag"].as_str());
        let meant = processes
            .iter_mut()
            .find(|process| pid == Some(process.pid.into()) || tag.is_some() && process.tag.as_deref() == tag);
        match (request.path[1].as_str(), meant) {
            ("List", _) => {
                let said = |process: &Process| {
                    let mut said =
                        json!({"config": {"cmd": process.command[0], "args": process.command[1..]}, "pid": process.pid});
                    if let Some(tag) = &process.tag {
                        said["tag"] = json!(tag);
                    }
                    said
                };
                return Reply::json(200, json!({"processes": processes.iter().map(said).collect::<Vec<_>>()}));
            }
            (_, None) => return Reply::json(404, json!({"code": "not_found", "message": "process not found"})),
            ("SendSignal", Some(process)) => {
                let signal = if body["signal"] == "SIGNAL_SIGTERM" { "-TERM" } else { "-KILL" };
                machine.settle();
                kill(signal, &process.pid.to_string());
            }
            ("SendInput", Some(process)) => {
                let bytes = BASE64.decode(body["input"]["stdin"].as_str().unwrap_or_default()).expect("base64");
                let stdin = process.stdin.as_mut().expect("it was asked for");
                std::io::Write::write_all(stdin, &bytes).expect("it reads");
            }
            ("CloseStdin", Some(process)) => drop(process.stdin.take()),
            other => panic!("the contract has {:?}", other.0),
        }
        Reply::json(200, json!({}))
    }
}

impl Box {
    fn state(&self) -> &'static str {
        if self.paused { "paused" } else { "running" }
    }

    fn listed(&self) -> Value {
        json!({
            "templateID": self.template, "sandboxID": self.id, "clientID": "fake", "startedAt": self.started.to_string(), "cpuCount": 1,
            "memoryMB": 1024, "diskSizeMB": 5120, "endAt": self.ends.to_string(), "metadata": self.metadata, "state": self.state(),
            "envdVersion": "0.4.0",
        })
    }
}

/// A request of the daemon's, out of its envelope if it is in one.
fn message(request: &Request) -> Value {
    if request.header("content-type") != "application/connect+json" {
        return request.json();
    }
    let (head, body) = request.body.split_at_checked(5).unwrap_or_default();
    let length = head.get(1..).map_or(0, |length| u32::from_be_bytes(length.try_into().expect("four")));
    if length as usize != body.len() { Value::Null } else { serde_json::from_slice(body).unwrap_or_default() }
}

fn envelope(last: bool, body: &Value) -> Vec<u8> {
    let body = body.to_string().into_bytes();
    [&[if last { 2 } else { 0 }][..], &u32::try_from(body.len()).expect("short").to_be_bytes(), &body].concat()
}

/// Runs it, and tells what it does.
fn start(machine: &Machine, processes: &Arc<Mutex<Vec<Process>>>, body: &Value, most: Option<Duration>) -> Reply {
    let (tell, told) = mpsc::unbounded_channel();
    let stream = Reply { status: 200, headers: Vec::new(), content: Content::Stream("application/connect+json", told) };
    let mut command = vec![body["process"]["cmd"].as_str().expect("the contract says so").to_owned()];
    command.extend(
        body["process"]["args"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|word| word.as_str().expect("the contract says so").to_owned()),
    );
    let env = serde_json::from_value(body["process"]["envs"].clone()).unwrap_or_default();
    let mut child = match machine.spawn(&command, &env, body["stdin"] != false) {
        Ok(child) => child,
        Err(error) => {
            let why = json!({"error": {"code": "not_found", "message": format!("fork/exec {}: {error}", command[0])}});
            tell.send(envelope(true, &why)).expect("it is held");
            return stream;
        }
    };
    let pid = child.id();
    let process = Process { pid, tag: body["tag"].as_str().map(str::to_owned), command, stdin: child.stdin.take() };
    processes.lock().unwrap().push(process);
    // Who has gone away does not hear it.
    let last = tell.clone();
    let say = move |event: Value| drop(tell.send(envelope(false, &json!({ "event": event }))));
    say(json!({"start": {"pid": pid}}));
    let timed = Arc::new(Mutex::new(false));
    if let Some(most) = most {
        let (timed, processes) = (timed.clone(), processes.clone());
        std::thread::spawn(move || {
            std::thread::sleep(most);
            if processes.lock().unwrap().iter().any(|process| process.pid == pid) {
                *timed.lock().unwrap() = true;
                kill("-KILL", &format!("-{pid}"));
            }
        });
    }
    let (out, err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let pass = |name: &'static str, mut from: std::boxed::Box<dyn Read + Send>, say: std::boxed::Box<dyn Fn(Value) + Send>| {
        std::thread::spawn(move || {
            let mut buffer = vec![0; 32 << 10];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                say(json!({"data": {name: BASE64.encode(&buffer[..n])}}));
            }
        })
    };
    let readers = [
        pass("stdout", std::boxed::Box::new(out), std::boxed::Box::new(say.clone())),
        pass("stderr", std::boxed::Box::new(err), std::boxed::Box::new(say.clone())),
    ];
    let processes = processes.clone();
    std::thread::spawn(move || {
        let status = child.wait().expect("it is ours");
        processes.lock().unwrap().retain(|process| process.pid != pid);
        for reader in readers {
            reader.join().expect("it reads");
        }
        if *timed.lock().unwrap() {
            let why = json!({"error": {"code": "deadline_exceeded", "message": "context deadline exceeded"}});
            return drop(last.send(envelope(true, &why)));
        }
        // What is nothing is left out, as proto3's JSON does.
        let mut end = json!({"exited": status.code().is_some(), "status": status.to_string()});
        match status.code() {
            Some(0) => {}
            code => end["exitCode"] = json!(code.unwrap_or(-1)),
        }
        say(json!({ "end": end }));
        drop(last.send(envelope(true, &json!({}))));
    });
    stream
}

impl Api for E2b {
    fn call(&self, request: &Request) -> Option<Call> {
        match (request.method.as_str(), &request.segments()[..]) {
            ("POST", ["v2", "sandboxes"]) => Some(Call::Create),
            ("GET", ["v2", "sandboxes"]) => Some(Call::List),
            ("GET", ["sandboxes", _]) => Some(Call::State),
            ("DELETE", ["sandboxes", _]) => Some(Call::Delete),
            _ => None,
        }
    }

    fn judge(&self, request: &Request) -> Result<(), String> {
        if request.path[0] != "process.Process" {
            if request.header("x-api-key") != TOKEN {
                return Err(String::from("without the token"));
            }
            return self.api.request(&request.method, &request.path, &request.query, &request.body);
        }
        if !request.header("x-api-key").is_empty() {
            return Err(String::from("a sandbox learns the token"));
        }
        if request.header("connect-protocol-version") != "1" || request.header("e2b-sandbox-port") != "49983" {
            return Err(String::from("not as the daemon is spoken to"));
        }
        let streamed = request.path.get(1).is_some_and(|method| method == "Start");
        if request.header("content-type") != if streamed { "application/connect+json" } else { "application/json" } {
            return Err(String::from("the wrong kind of message"));
        }
        self.daemon.request(&request.method, &request.path, &request.query, message(request).to_string().as_bytes())
    }

    fn judge_reply(&self, request: &Request, reply: &Reply) -> Result<(), String> {
        let contract = if request.path[0] == "process.Process" { &self.daemon } else { &self.api };
        match &reply.content {
            Content::Json(body) => contract.answer(&request.method, &request.path, reply.status, body),
            Content::Bytes(..) => contract.answer(&request.method, &request.path, reply.status, &Value::Null),
            Content::Stream(..) | Content::Upgrade(..) => Ok(()),
        }
    }

    fn answer<'a>(&'a self, request: &'a Request) -> BoxFuture<'a, Reply> {
        async move { if request.path[0] == "process.Process" { self.daemon(request) } else { self.manage(request) } }.boxed()
    }

    fn refuse(&self, status: u16, message: &str) -> Value {
        json!({"code": status, "message": message})
    }

    fn unknown_state(&self, body: &mut Value) {
        body["state"] = json!("hibernating");
    }
}

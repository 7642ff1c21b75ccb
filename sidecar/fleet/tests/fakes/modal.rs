//! Modal: its interface, and the router of the host that all its containers are on.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::process::ChildStdin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD as BASE64, URL_SAFE_NO_PAD};
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::grpc::{Api, No, Reply, Request};
use super::machine::{Machine, kill};
use crate::conformance::Call;
use agent_fleet::provider::KEY_LABEL;

/// Sandboxes on a page.
pub(crate) const PAGE: usize = 2;
pub(crate) const TOKEN_ID: &str = "ak-0000000000000000000000";
pub(crate) const TOKEN_SECRET: &str = "as-0000000000000000000000";
const ROUTER_TOKEN: &str = "router-jwt";
pub(crate) const CONTRACT: &str = include_str!("../../../../tests/specs/modal/contract.json");

pub(crate) struct Modal {
    address: String,
    /// Lists do not say tags, as those of Modal's own mock.
    pub(crate) bare: std::sync::atomic::AtomicBool,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    apps: BTreeMap<String, String>,
    /// By their definition, and whether somebody has waited for its end.
    images: Vec<(Value, bool)>,
    secrets: Vec<BTreeMap<String, String>>,
    named: BTreeMap<String, usize>,
    boxes: Vec<Box>,
    execs: BTreeMap<String, Arc<Run>>,
    clock: f64,
}

struct Box {
    id: String,
    app: String,
    name: String,
    tags: Vec<Value>,
    definition: Value,
    created: f64,
    machine: Arc<Machine>,
    ended: Arc<Mutex<Option<(i32, i32)>>>,
    run: Option<Arc<Run>>,
}

/// A process, with what it has said.
struct Run {
    pid: u32,
    stdin: Mutex<Option<ChildStdin>>,
    fed: Mutex<u64>,
    said: [Mutex<Said>; 2],
    end: Mutex<Option<std::process::ExitStatus>>,
}

#[derive(Default)]
struct Said {
    bytes: Vec<u8>,
    over: bool,
}

impl Run {
    fn begin(mut child: std::process::Child) -> Arc<Self> {
        let run = Arc::new(Self {
            pid: child.id(),
            stdin: Mutex::new(child.stdin.take()),
            fed: Mutex::default(),
            said: Default::default(),
            end: Mutex::default(),
        });
        let outputs: [std::boxed::Box<dyn Read + Send>; 2] = [
            std::boxed::Box::new(child.stdout.take().expect("piped")),
            std::boxed::Box::new(child.stderr.take().expect("piped")),
        ];
        for (which, mut from) in outputs.into_iter().enumerate() {
            let run = run.clone();
            std::thread::spawn(move || {
                let mut piece = [0; 64 << 10];
                while let Ok(length @ 1..) = from.read(&mut piece) {
                    run.said[which].lock().unwrap().bytes.extend_from_slice(&piece[..length]);
                }
                run.said[which].lock().unwrap().over = true;
            });
        }
        let waits = run.clone();
        std::thread::spawn(move || {
            let end = child.wait().ok();
            *waits.end.lock().unwrap() = end;
        });
        run
    }

    fn end(&self) -> Option<std::process::ExitStatus> {
        *self.end.lock().unwrap()
    }
}

fn no<T>(code: u8, why: impl Into<String>) -> Result<T, No> {
    Err(No(code, why.into()))
}

fn text<'a>(body: &'a Value, name: &str) -> &'a str {
    body[name].as_str().unwrap_or_default()
}

fn pairs(entries: &Value) -> BTreeMap<String, String> {
    let entries = entries.as_array().into_iter().flatten();
    entries.map(|entry| (text(entry, "key").to_owned(), text(entry, "value").to_owned())).collect()
}

impl Box {
    fn result(&self) -> Option<(i32, i32)> {
        let mut ended = self.ended.lock().unwrap();
        if ended.is_none()
            && let Some(end) = self.run.as_ref().and_then(|run| run.end())
        {
            let code = end.code().unwrap_or(137);
            *ended = Some((if code == 0 { 1 } else { 2 }, code));
        }
        *ended
    }

    fn outcome(&self) -> Value {
        self.result().map_or(json!({}), |(status, code)| json!({ "status": status, "exitcode": code }))
    }

    fn handle(&self) -> Value {
        json!({ "app_id": self.app, "result": self.outcome() })
    }
}

impl Modal {
    pub(crate) fn new(address: &str) -> Self {
        Self { address: address.to_owned(), bare: Default::default(), state: Arc::default() }
    }

    /// Those that nobody has terminated.
    pub(crate) fn count(&self, key: &str) -> usize {
        let state = self.state.lock().unwrap();
        let has =
            |sandbox: &&Box| sandbox.tags.iter().any(|tag| text(tag, "tag_name") == KEY_LABEL && text(tag, "tag_value") == key);
        state.boxes.iter().filter(has).filter(|sandbox| sandbox.result().is_none_or(|(status, _)| status != 3)).count()
    }

    /// What one was asked for as.
    pub(crate) fn definition(&self, id: &str) -> Value {
        let state = self.state.lock().unwrap();
        state.boxes.iter().find(|sandbox| sandbox.id == id).expect("it is there").definition.clone()
    }

    pub(crate) fn retag(&self, id: &str, labels: &BTreeMap<String, String>) {
        let mut state = self.state.lock().unwrap();
        let sandbox = state.boxes.iter_mut().find(|sandbox| sandbox.id == id).expect("it is there");
        sandbox.tags = labels.iter().map(|(name, value)| json!({ "tag_name": name, "tag_value": value })).collect();
    }

    pub(crate) fn images(&self) -> Vec<Value> {
        self.state.lock().unwrap().images.iter().map(|(image, _)| image.clone()).collect()
    }

    pub(crate) fn keep(&self, name: &str, variable: &str, value: &str) {
        let mut state = self.state.lock().unwrap();
        state.secrets.push(BTreeMap::from([(variable.to_owned(), value.to_owned())]));
        let at = state.secrets.len() - 1;
        state.named.insert(name.to_owned(), at);
    }

    /// Ends one as Modal itself does.
    pub(crate) fn end(&self, id: &str, status: i32) {
        let state = self.state.lock().unwrap();
        let sandbox = state.boxes.iter().find(|sandbox| sandbox.id == id).expect("it is there");
        *sandbox.ended.lock().unwrap() = Some((status, 0));
        sandbox.machine.halt();
    }

    fn api(&self, request: &Request) -> Result<Reply, No> {
        let mut state = self.state.lock().unwrap();
        let body = &request.body;
        let one = |value: Value| Ok(Reply::One(value));
        match request.method.as_str() {
            "AuthTokenGet" => {
                let claims = URL_SAFE_NO_PAD.encode(json!({ "exp": Timestamp::now().as_second() + 1200 }).to_string());
                one(json!({ "token": format!("e30.{claims}.x") }))
            }
            "AppGetOrCreate" => {
                let (name, next) = (text(body, "app_name").to_owned(), state.apps.len() + 1);
                if !state.apps.contains_key(&name) && body["object_creation_type"] != 1 {
                    return no(5, format!("App '{name}' not found"));
                }
                one(json!({ "app_id": state.apps.entry(name).or_insert_with(|| format!("ap-{next}")) }))
            }
            "ImageGetOrCreate" => {
                let image = &body["image"];
                if image["dockerfile_commands"][0] == "FROM none" {
                    return one(json!({ "image_id": "im-0", "result": { "status": 2, "exception": "manifest unknown" } }));
                }
                let at = state.images.iter().position(|(known, _)| known == image).unwrap_or_else(|| {
                    state.images.push((image.clone(), false));
                    state.images.len() - 1
                });
                let mut made = json!({ "image_id": format!("im-{}", at + 1) });
                if state.images[at].1 {
                    made["result"] = json!({ "status": 1 });
                }
                one(made)
            }
            "ImageJoinStreaming" => {
                let at: usize = text(body, "image_id").trim_start_matches("im-").parse().map_err(|_| No(5, String::new()))?;
                state.images[at - 1].1 = true;
                let (tell, told) = mpsc::unbounded_channel();
                for piece in [
                    json!({ "entry_id": "1", "task_logs": [{ "data": "building\n" }] }),
                    json!({ "entry_id": "2", "result": { "status": 1 }, "metadata": {} }),
                    json!({ "eof": true }),
                ] {
                    tell.send(piece).expect("it is listened to");
                }
                Ok(Reply::Many(told))
            }
            "SecretGetOrCreate" => {
                let name = text(body, "deployment_name");
                let kind = body["object_creation_type"].as_i64().unwrap_or(0);
                let at = match (kind, name.is_empty()) {
                    (0, false) => {
                        let at = state.named.get(name).copied().ok_or_else(|| No(5, format!("Secret '{name}' not found")))?;
                        for key in body["required_keys"].as_array().into_iter().flatten() {
                            if !state.secrets[at].contains_key(key.as_str().expect("text")) {
                                return no(5, format!("Secret is missing key(s): {key}"));
                            }
                        }
                        at
                    }
                    (4, true) if !text(body, "app_id").is_empty() => {
                        state.secrets.push(pairs(&body["env_dict"]));
                        state.secrets.len() - 1
                    }
                    other => return no(3, format!("a secret like {other:?}")),
                };
                one(json!({ "secret_id": format!("st-{at}"), "metadata": {} }))
            }
            "SandboxCreate" => self.create(&mut state, body).map(Reply::One),
            "SandboxList" | "SandboxListV2" => {
                let before = body["before_timestamp"].as_f64().filter(|before| *before > 0.0).unwrap_or(f64::MAX);
                let wanted = body["tags"].as_array().cloned().unwrap_or_default();
                let rows = state.boxes.iter().rev().filter(|sandbox| {
                    sandbox.created < before
                        && (body["app_id"].is_null() || sandbox.app == text(body, "app_id"))
                        && (body["include_finished"] == true || sandbox.result().is_none())
                        && wanted.iter().all(|tag| sandbox.tags.contains(tag))
                });
                let bare = self.bare.load(std::sync::atomic::Ordering::Relaxed);
                let row = |sandbox: &Box| {
                    let tags: &[Value] = if bare { &[] } else { &sandbox.tags };
                    json!({
                        "id": sandbox.id, "created_at": sandbox.created, "app_id": sandbox.app, "tags": tags, "name": sandbox.name,
                        "timeout_secs": sandbox.definition["timeout_secs"], "metadata": sandbox.handle(),
                        "task_info": { "id": format!("ta-{}", sandbox.id), "started_at": sandbox.created, "result": sandbox.outcome() },
                    })
                };
                one(json!({ "sandboxes": rows.take(PAGE).map(row).collect::<Vec<_>>() }))
            }
            // This one's containers are all of the other kind.
            "SandboxGetFromNameV2" => no(5, "Sandbox not found"),
            "SandboxGetFromName" => {
                let app = state.apps.get(text(body, "app_name")).cloned().unwrap_or_default();
                let found = state.boxes.iter().find(|sandbox| {
                    sandbox.app == app && sandbox.name == text(body, "sandbox_name") && sandbox.result().is_none()
                });
                let found = found.ok_or_else(|| No(5, String::from("Sandbox not found")))?;
                one(json!({ "sandbox_id": found.id, "metadata": found.handle() }))
            }
            "TaskGetCommandRouterAccess" => {
                let id = text(body, "task_id").trim_start_matches("ta-");
                match state.boxes.iter().find(|sandbox| sandbox.id == id) {
                    Some(sandbox) if sandbox.result().is_none() => one(json!({ "url": self.address, "jwt": ROUTER_TOKEN })),
                    _ => no(9, "Task has already finished"),
                }
            }
            method => {
                let found = state.boxes.iter_mut().find(|sandbox| sandbox.id == text(body, "sandbox_id"));
                let Some(sandbox) = found else { return no(5, "Sandbox not found") };
                match method {
                    "SandboxWait" => one(json!({ "result": sandbox.outcome(), "metadata": sandbox.handle() })),
                    "SandboxTagsGet" => one(json!({ "tags": sandbox.tags })),
                    "SandboxGetTaskId" => one(json!({ "task_id": format!("ta-{}", sandbox.id) })),
                    "SandboxGetTunnels" => {
                        let ports = sandbox.definition["open_ports"]["ports"].as_array().cloned().unwrap_or_default();
                        let tunnel = |port: &Value| json!({ "host": format!("{}.modal.host", &sandbox.id[3..]), "port": 443, "container_port": port["port"] });
                        one(json!({ "result": { "status": 1 }, "tunnels": ports.iter().map(tunnel).collect::<Vec<_>>() }))
                    }
                    "SandboxTerminate" => {
                        let existing = sandbox.outcome();
                        if sandbox.result().is_none() {
                            *sandbox.ended.lock().unwrap() = Some((3, 137));
                            sandbox.machine.halt();
                        }
                        one(if existing == json!({}) { json!({}) } else { json!({ "existing_result": existing }) })
                    }
                    "SandboxGetLogs" => {
                        let which = body["file_descriptor"].as_u64().unwrap_or(0);
                        let Some(run) = sandbox.run.clone().filter(|_| matches!(which, 1 | 2)) else {
                            return no(3, "which output?");
                        };
                        Ok(Reply::Many(logs(run, which as usize - 1)))
                    }
                    other => panic!("the contract has {other}"),
                }
            }
        }
    }

    fn create(&self, state: &mut State, body: &Value) -> Result<Value, No> {
        let definition = &body["definition"];
        let (app, name) = (text(body, "app_id").to_owned(), text(definition, "name").to_owned());
        if !state.apps.values().any(|known| *known == app) {
            return no(5, "App not found");
        }
        if state.boxes.iter().any(|sandbox| sandbox.app == app && sandbox.name == name && sandbox.result().is_none()) {
            return no(6, format!("Sandbox with name '{name}' already exists"));
        }
        let image =
            text(definition, "image_id").trim_start_matches("im-").parse().ok().and_then(|at: usize| state.images.get(at - 1));
        if !image.is_some_and(|(_, built)| *built) {
            return no(9, "Image has not been built");
        }
        let seconds = definition["timeout_secs"].as_u64().unwrap_or(0);
        if seconds == 0 || seconds > 24 * 3600 || definition["resources"]["milli_cpu"].as_u64().unwrap_or(0) < 125 {
            return no(3, "out of bounds");
        }
        let mut env = BTreeMap::new();
        for id in definition["secret_ids"].as_array().into_iter().flatten() {
            let at: usize = id.as_str().expect("text").trim_start_matches("st-").parse().expect("one of ours");
            env.extend(state.secrets[at].clone());
        }
        let argv: Vec<String> = serde_json::from_value(definition["entrypoint_args"].clone()).unwrap_or_default();
        let machine = Arc::new(Machine::new(env));
        let run = match argv.is_empty() {
            true => None,
            false => Some(Run::begin(machine.spawn(&argv, &BTreeMap::new(), false).map_err(|error| No(3, error.to_string()))?)),
        };
        // Each is younger than the one before, whatever the clock says.
        let now = Timestamp::now().as_microsecond() as f64 / 1e6;
        state.clock = if now > state.clock { now } else { state.clock + 1e-6 };
        let id = format!("sb-{}", &uuid::Uuid::now_v7().simple().to_string()[10..]);
        let sandbox = Box {
            id: id.clone(),
            app: app.clone(),
            name,
            tags: body["tags"].as_array().cloned().unwrap_or_default(),
            definition: definition.clone(),
            created: state.clock,
            machine,
            ended: Arc::default(),
            run,
        };
        state.boxes.push(sandbox);
        Ok(json!({ "sandbox_id": id, "metadata": { "app_id": app } }))
    }

    fn router(&self, request: &Request) -> Result<Reply, No> {
        let body = &request.body;
        let (machine, execs) = {
            let state = self.state.lock().unwrap();
            let id = text(body, "task_id").trim_start_matches("ta-").to_owned();
            let sandbox = state.boxes.iter().find(|sandbox| sandbox.id == id && sandbox.result().is_none());
            let Some(sandbox) = sandbox else { return no(5, "Task not found") };
            (sandbox.machine.clone(), state.execs.clone())
        };
        let exec = execs.get(text(body, "exec_id")).cloned();
        if request.method == "TaskExecStart" {
            if exec.is_some() {
                return Ok(Reply::One(json!({})));
            }
            let argv: Vec<String> = serde_json::from_value(body["command_args"].clone()).unwrap_or_default();
            let mut env = pairs(&body["env"]);
            for source in body["secret_sources"].as_array().into_iter().flatten() {
                env.extend(pairs(&source["env"]["contents"]));
            }
            let run = Run::begin(machine.spawn(&argv, &env, true).map_err(|error| No(3, error.to_string()))?);
            if let Some(seconds) = body["timeout_secs"].as_u64() {
                let run = run.clone();
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_secs(seconds));
                    if run.end().is_none() {
                        kill("-KILL", &format!("-{}", run.pid));
                    }
                });
            }
            self.state.lock().unwrap().execs.insert(text(body, "exec_id").to_owned(), run);
            return Ok(Reply::One(json!({})));
        }
        let Some(run) = exec else { return no(5, "Exec not found") };
        match request.method.as_str() {
            "TaskExecStdinWrite" => {
                let mut fed = run.fed.lock().unwrap();
                if body["offset"].as_u64().unwrap_or(0) != *fed {
                    return no(9, "stdin offset mismatch");
                }
                let data = BASE64.decode(text(body, "data")).expect("base64");
                let mut stdin = run.stdin.lock().unwrap();
                // Who does not read gets no more.
                let heard = stdin.as_mut().is_some_and(|stdin| stdin.write_all(&data).is_ok());
                *fed += data.len() as u64;
                if body["eof"] == true || !heard {
                    drop(stdin.take());
                }
                Ok(Reply::One(json!({})))
            }
            "TaskExecStdioRead" => {
                let which = body["file_descriptor"].as_u64().unwrap_or(0) as usize;
                Ok(Reply::Many(follow(run, which, body["offset"].as_u64().unwrap_or(0) as usize, usize::MAX)))
            }
            "TaskExecPoll" => Ok(Reply::One(run.end().map_or(json!({}), exit))),
            other => panic!("the contract has {other}"),
        }
    }
}

fn exit(end: std::process::ExitStatus) -> Value {
    use std::os::unix::process::ExitStatusExt;
    end.code().map_or_else(|| json!({ "signal": end.signal() }), |code| json!({ "code": code }))
}

/// An output from there on, until it is over or as many looks were taken.
fn follow(run: Arc<Run>, which: usize, mut offset: usize, looks: usize) -> mpsc::UnboundedReceiver<Value> {
    let (tell, told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        for _ in 0..looks {
            let over = {
                let said = run.said[which].lock().unwrap();
                let pieces = said.bytes.get(offset..).unwrap_or_default();
                offset += pieces.len();
                for piece in pieces.chunks(64 << 10) {
                    if tell.send(json!({ "data": BASE64.encode(piece) })).is_err() {
                        return;
                    }
                }
                said.over
            };
            if over {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    told
}

/// Line by line; and for a container that runs on without an end.
fn logs(run: Arc<Run>, which: usize) -> mpsc::UnboundedReceiver<Value> {
    let (tell, told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut sent = 0;
        loop {
            let (lines, over) = {
                let said = run.said[which].lock().unwrap();
                let lines: Vec<String> =
                    said.bytes.split_inclusive(|byte| *byte == b'\n').map(|line| String::from_utf8_lossy(line).into()).collect();
                (lines, said.over)
            };
            for line in lines.iter().skip(sent) {
                let item = json!({ "data": line, "timestamp": sent as f64, "file_descriptor": which + 1 });
                if tell.send(json!({ "items": [item], "entry_id": sent.to_string() })).is_err() {
                    return;
                }
                sent += 1;
            }
            if over {
                drop(tell.send(json!({ "eof": true })));
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    told
}

impl Api for Modal {
    fn call(&self, method: &str) -> Option<Call> {
        match method {
            "SandboxCreate" => Some(Call::Create),
            "SandboxWait" => Some(Call::State),
            "SandboxList" => Some(Call::List),
            "SandboxTerminate" => Some(Call::Delete),
            _ => None,
        }
    }

    fn judge(&self, request: &Request) -> Result<(), String> {
        if request.header("content-type") != "application/grpc" || request.header("te") != "trailers" {
            return Err(String::from("it is no gRPC"));
        }
        if request.method.starts_with("TaskExec") {
            let right = request.header("authorization") == format!("Bearer {ROUTER_TOKEN}")
                && request.header("x-modal-token-secret").is_empty();
            return if right { Ok(()) } else { Err(String::from("it is not the router's token")) };
        }
        let wanted = [("x-modal-token-id", TOKEN_ID), ("x-modal-token-secret", TOKEN_SECRET)];
        if let Some((name, _)) = wanted.iter().find(|(name, value)| request.header(name) != *value) {
            return Err(format!("`{name}` is not right"));
        }
        let said = ["x-modal-client-version", "x-modal-python-version"].iter().all(|name| !request.header(name).is_empty());
        if request.header("x-modal-client-type") != "1" || !said {
            return Err(String::from("no client that is known"));
        }
        let streams = matches!(request.method.as_str(), "ImageJoinStreaming" | "SandboxGetLogs");
        if !streams
            && (request.header("x-idempotency-key").is_empty() || request.header("x-retry-attempt").parse::<u32>().is_err())
        {
            return Err(String::from("nothing that makes two of it one"));
        }
        Ok(())
    }

    fn answer<'a>(&'a self, request: &'a Request) -> BoxFuture<'a, Result<Reply, No>> {
        std::boxed::Box::pin(async move {
            if request.method == "TaskExecWait" {
                let run = self.state.lock().unwrap().execs.get(text(&request.body, "exec_id")).cloned();
                let Some(run) = run else { return no(5, "Exec not found") };
                loop {
                    if let Some(end) = run.end() {
                        return Ok(Reply::One(exit(end)));
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            if request.method == "SandboxTagsSet" {
                let mut state = self.state.lock().unwrap();
                let id = text(&request.body, "sandbox_id");
                let Some(sandbox) = state.boxes.iter_mut().find(|sandbox| sandbox.id == id) else {
                    return no(5, "Sandbox not found");
                };
                sandbox.tags = request.body["tags"].as_array().cloned().unwrap_or_default();
                return Ok(Reply::One(json!({})));
            }
            if request.method.starts_with("TaskExec") { self.router(request) } else { self.api(request) }
        })
    }

    fn unknown_state(&self, body: &mut Value) {
        body["result"] = json!({ "status": 99 });
    }
}

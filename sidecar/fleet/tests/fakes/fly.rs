//! Fly Machines, of one app.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::contract::Contract;
use super::machine::{Machine, kill};
use super::{Api, Content, Reply, Request, TOKEN};
use crate::conformance::Call;

pub(crate) const PAGE: usize = 3;

pub(crate) struct Fly {
    api: Contract,
    machines: Mutex<Vec<Vm>>,
}

struct Vm {
    id: String,
    name: String,
    config: Value,
    created: Timestamp,
    /// What was done to it last, if that is more than its process knows.
    state: &'static str,
    machine: Arc<Machine>,
    pid: Option<u32>,
    /// How its process ended: its code, or what a shell would say of a signal.
    ended: Arc<Mutex<Option<i64>>>,
}

impl Fly {
    pub(crate) fn new() -> Self {
        Self { api: Contract::parse(include_str!("../../../../tests/specs/fly/api.json")), machines: Mutex::default() }
    }

    pub(crate) fn count(&self, key: &str) -> usize {
        self.machines.lock().unwrap().iter().filter(|vm| vm.name == key).count()
    }

    pub(crate) fn config(&self, key: &str) -> Value {
        self.machines.lock().unwrap().iter().find(|vm| vm.name == key).expect("it is there").config.clone()
    }

    async fn manage(&self, request: &Request) -> Reply {
        let no = |status: u16, message: &str| Reply::json(status, self.refuse(status, message));
        let body = request.json();
        if let ("POST", [_, _, _, _, id, "exec"]) = (request.method.as_str(), &request.segments()[..]) {
            let found = self
                .machines
                .lock()
                .unwrap()
                .iter()
                .find(|vm| vm.id == *id)
                .map(|vm| (vm.said()["state"] == "started", vm.machine.clone()));
            return match found {
                None => no(404, "machine not found"),
                Some((false, _)) => no(412, "machine not running"),
                Some((true, machine)) => exec(machine, &body).await,
            };
        }
        let mut machines = self.machines.lock().unwrap();
        match (request.method.as_str(), &request.segments()[3..]) {
            ("POST", ["machines"]) => {
                let name = body["name"].as_str().unwrap_or_default();
                if let Some(vm) = machines.iter().find(|vm| vm.name == name) {
                    let why = format!(
                        "already_exists: unique machine name violation, machine ID {} already exists with name \"{name}\"",
                        vm.id
                    );
                    return no(409, &why);
                }
                if body["config"]["image"] == "none" {
                    return no(400, "invalid config.image: could not resolve");
                }
                let env = serde_json::from_value(body["config"]["env"].clone()).unwrap_or_default();
                let mut vm = Vm {
                    id: uuid::Uuid::now_v7().simple().to_string()[12..].to_owned(),
                    name: name.to_owned(),
                    config: body["config"].clone(),
                    created: Timestamp::now(),
                    state: "started",
                    machine: Arc::new(Machine::new(env)),
                    pid: None,
                    ended: Arc::default(),
                };
                vm.start();
                let said = vm.said();
                machines.push(vm);
                Reply::json(200, said)
            }
            ("GET", ["machines"]) => {
                let asked = || request.query.iter().filter_map(|(name, value)| Some((name.strip_prefix("metadata.")?, value)));
                let fit = machines.iter().filter(|vm| asked().all(|(name, value)| vm.config["metadata"][name] == **value));
                let fit: Vec<Value> = fit.map(Vm::said).collect();
                let from: usize = request.query("cursor").map_or(0, |cursor| cursor.parse().expect("one of ours"));
                let mut reply = Reply::json(200, fit.iter().skip(from).take(PAGE).cloned().collect());
                if from + PAGE < fit.len() {
                    reply.headers.push(("fly-next-cursor", (from + PAGE).to_string()));
                }
                reply
            }
            (method, ["machines", id, verb @ ..]) => {
                let Some(at) = machines.iter().position(|vm| vm.id == *id) else { return no(404, "machine not found") };
                let vm = &mut machines[at];
                let state = vm.said()["state"].as_str().expect("it has one").to_owned();
                match (method, verb) {
                    ("GET", []) => return Reply::json(200, vm.said()),
                    ("DELETE", []) if state == "started" && request.query("force") != Some("true") => {
                        return no(412, "it is running");
                    }
                    ("DELETE", []) => drop(machines.remove(at)),
                    ("POST", ["start"]) if state == "suspended" => vm.state = "started",
                    ("POST", ["start"]) if state == "stopped" => vm.start(),
                    ("POST", ["start"]) => return no(412, "machine still active, refusing to start"),
                    ("POST", ["suspend"]) if state == "started" => vm.state = "suspended",
                    ("POST", ["suspend"]) => return no(412, "it cannot be suspended"),
                    ("POST", ["stop"]) if state == "started" => vm.stop(body["timeout"].as_str().expect("we say when")),
                    ("POST", ["stop"]) => return no(412, "it cannot be stopped"),
                    other => panic!("the contract has {other:?}"),
                }
                Reply::json(200, json!({"ok": true}))
            }
            other => panic!("the contract has {other:?}"),
        }
    }
}

async fn exec(machine: Arc<Machine>, body: &Value) -> Reply {
    let argv: Vec<String> = serde_json::from_value(body["command"].clone()).expect("the contract says so");
    let most = Duration::from_secs(body["timeout"].as_u64().unwrap_or(60));
    let stdin = body["stdin"].as_str().unwrap_or_default().as_bytes().to_vec();
    let done = tokio::task::spawn_blocking(move || machine.run(&argv, &BTreeMap::new(), &stdin, most)).await.expect("it runs");
    match done {
        Ok(done) if done.timed_out => Reply::json(408, json!({"error": "deadline_exceeded"})),
        Ok(done) => {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            Reply::json(
                200,
                json!({"exit_code": done.code.unwrap_or(137), "exit_signal": 0, "stdout": text(&done.stdout), "stderr": text(&done.stderr)}),
            )
        }
        Err(error) => Reply::json(400, json!({"error": error.to_string()})),
    }
}

impl Vm {
    fn start(&mut self) {
        let argv: Vec<String> = serde_json::from_value(self.config["init"]["exec"].clone()).unwrap_or_default();
        let argv = if argv.is_empty() { ["sleep", "1000"].map(String::from).to_vec() } else { argv };
        let mut child = self.machine.spawn(&argv, &BTreeMap::new(), false).expect("it is a program");
        (self.state, self.pid, self.ended) = ("started", Some(child.id()), Arc::default());
        let ended = self.ended.clone();
        std::thread::spawn(move || {
            let status = child.wait().expect("it is ours");
            *ended.lock().unwrap() = Some(status.code().map_or(137, i64::from));
        });
    }

    fn stop(&mut self, timeout: &str) {
        let most = Duration::from_secs(timeout.trim_end_matches('s').parse().expect("a time like 10s"));
        let (pid, ended) = (self.pid.expect("it was started"), self.ended.clone());
        self.machine.settle();
        self.state = "stopping";
        kill("-TERM", &pid.to_string());
        std::thread::spawn(move || {
            std::thread::sleep(most);
            if ended.lock().unwrap().is_none() {
                kill("-KILL", &format!("-{pid}"));
            }
        });
    }

    fn said(&self) -> Value {
        let ended = *self.ended.lock().unwrap();
        let mut events = vec![json!({"id": "e1", "type": "launch", "status": "created", "source": "user", "timestamp": 1})];
        if let Some(code) = ended {
            let exit =
                json!({"exit_event": {"exit_code": code, "oom_killed": false, "requested_stop": self.state == "stopping"}});
            events.insert(
                0,
                json!({"id": "e2", "type": "exit", "status": "stopped", "source": "flyd", "timestamp": 2, "request": exit}),
            );
        }
        json!({
            "id": self.id, "name": self.name, "state": ended.map_or(self.state, |_| "stopped"), "config": self.config, "created_at": self.created.to_string(),
            "private_ip": "fdaa:0:1::2", "region": "ams", "instance_id": "01", "host_status": "ok", "events": events,
        })
    }
}

impl Api for Fly {
    fn call(&self, request: &Request) -> Option<Call> {
        match (request.method.as_str(), &request.segments()[3..]) {
            ("POST", ["machines"]) => Some(Call::Create),
            ("GET", ["machines"]) => Some(Call::List),
            ("GET", ["machines", _]) => Some(Call::State),
            ("DELETE", ["machines", _]) => Some(Call::Delete),
            _ => None,
        }
    }

    fn judge(&self, request: &Request) -> Result<(), String> {
        if request.header("authorization") != format!("Bearer {TOKEN}") {
            return Err(String::from("without the token"));
        }
        // What the contract lets pass and they do not.
        if request.method == "POST" && request.body.is_empty() {
            return Err(String::from("an empty body"));
        }
        // An order without a body in the contract may have an empty one.
        let body: &[u8] = if request.body == b"{}" { b"" } else { &request.body };
        self.api.request(&request.method, &request.path, &request.query, body)
    }

    fn judge_reply(&self, request: &Request, reply: &Reply) -> Result<(), String> {
        let body = if let Content::Json(body) = &reply.content { body } else { &Value::Null };
        self.api.answer(&request.method, &request.path, reply.status, body)
    }

    fn answer<'a>(&'a self, request: &'a Request) -> BoxFuture<'a, Reply> {
        self.manage(request).boxed()
    }

    fn refuse(&self, _status: u16, message: &str) -> Value {
        json!({ "error": message })
    }

    fn unknown_state(&self, body: &mut Value) {
        body["state"] = json!("hibernating");
    }
}
